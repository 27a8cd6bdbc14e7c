//! From a path to storage: file or device, locked, mapped or not, direct or not.

use std::fs::{File, FileType};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{CWD, Mode, OFlags, fcntl_getfl, fcntl_setfl, openat};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::nbd::uri::is_uri;
use crate::storage::aligned::AlignedStorage;
use crate::storage::device::DeviceStorage;
use crate::storage::file::FileStorage;
use crate::storage::lock::{hold_too, lock, promote, unlock};
use crate::storage::nbd;
use crate::storage::{HostId, Storage};

/// Whether changes are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Access {
    /// Reads only.
    #[default]
    Read,
    /// Reads and writes.
    Write,
}

/// What protects against other processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sharing {
    /// Take the locks that QEMU takes; fail where another process holds conflicting ones.
    #[default]
    Locked,
    /// Take no locks (`--force-share`); for reading only.
    Force,
    /// Take the same locks as `Locked`, which this process has already by another open file, and keeps
    /// until this one is open: there is no moment without them.
    Ours,
}

/// Whether anybody relies on flushes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Flushing {
    /// A flush means stable media: a server that has no way to say so is refused.
    #[default]
    Needed,
    /// Nothing has to be on stable media ever (`-t unsafe`): files and devices are not synced.
    Waived,
}

/// How the host's page cache is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Caching {
    /// Reads from a mapping where the file system is local, else positioned reads.
    #[default]
    Mapped,
    /// Positioned reads and writes through the page cache (`--no-mmap`).
    Buffered,
    /// `O_DIRECT` (`-t none`, `-t directsync`).
    Direct,
}

/// How to open a host object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StorageOptions {
    /// Whether changes are wanted.
    pub access: Access,
    /// What protects against other processes.
    pub sharing: Sharing,
    /// How the host's page cache is used.
    pub caching: Caching,
    /// Whether anybody relies on flushes.
    pub flushing: Flushing,
}

/// Opens a regular file, a block device, or what an NBD URI names.
///
/// # Errors
/// The host's, and those of [`nbd::open`]; `Invalid` for directories, pipes, sockets and character devices, which are not even
/// opened; `Locked` where another process holds it; `Unsupported` for direct I/O where the file
/// system has none.
pub fn open(path: &Path, options: &StorageOptions) -> Result<Arc<dyn Storage>> {
    match is_uri(path) {
        true => open_uri(path, options),
        false => adopt(open_file(path, options.access)?, path, options),
    }
}

/// Opens what an NBD URI names.  Locks and caches are the server's.
///
/// # Errors
/// Those of [`nbd::open`].
pub fn open_uri(uri: &Path, options: &StorageOptions) -> Result<Arc<dyn Storage>> {
    let text = uri.to_str();
    let text = text.ok_or_else(|| Error::invalid("is no URI: it is not UTF-8").at(uri))?;
    let options = nbd::Options {
        flushing: options.flushing,
        ..nbd::Options::new(options.access)
    };
    nbd::open(text, &options)
}

/// Opens a regular file or a block device, and no more than that: no locks, nothing read.
///
/// # Errors
/// Those of [`open`] that this can have.
pub fn open_file(path: &Path, access: Access) -> Result<File> {
    open_file_at(CWD, path, path, access)
}

/// As [`open_file`], where `name` leads from a directory; messages call it `path`.
///
/// # Errors
/// Those of [`open_file`].
pub(crate) fn open_file_at(
    directory: impl AsFd,
    name: &Path,
    path: &Path,
    access: Access,
) -> Result<File> {
    let open = |flags: OFlags| {
        let opened = openat(&directory, name, flags | OFlags::CLOEXEC, Mode::empty());
        opened.map(File::from)
    };
    // Looked at first: opening some devices does things, and opening a pipe waits for its other
    // end.
    let seen = open(OFlags::PATH).map_err(|e| Error::io("open", e.into()).at(path))?;
    check(&seen).at(path)?;
    let flags = match access {
        Access::Read => OFlags::RDONLY,
        Access::Write => OFlags::RDWR,
    };
    // What was a file a moment ago may be a pipe now.
    let file = open(flags | OFlags::NONBLOCK | OFlags::NOCTTY)
        .map_err(|e| Error::io(doing(access), e.into()).at(path))?;
    check(&file).at(path)?;
    Ok(file)
}

fn check(file: &File) -> Result<()> {
    let metadata = file.metadata();
    let metadata = metadata.map_err(|e| Error::io("look at the file", e))?;
    check_kind(metadata.file_type())
}

fn doing(access: Access) -> &'static str {
    match access {
        Access::Read => "open",
        Access::Write => "open for writing",
    }
}

/// Refuses what is neither a regular file nor a block device.
///
/// # Errors
/// `Invalid`, saying what it is.
pub(crate) fn check_kind(kind: FileType) -> Result<()> {
    let found = match kind {
        kind if kind.is_file() || kind.is_block_device() => return Ok(()),
        kind if kind.is_dir() => "a directory",
        kind if kind.is_fifo() => "a pipe",
        kind if kind.is_socket() => "a socket",
        kind if kind.is_char_device() => "a character device",
        _ => "something else",
    };
    Err(Error::invalid(format!(
        "is {found} (allowed: a regular file or a block device)"
    )))
}

/// Takes the locks of a writer for what this process has open as `reader`, for reading, without a moment
/// in which another process can; they last until the file that is returned is closed, and all that is
/// opened as [`Sharing::Ours`] meanwhile.  Nothing is changed.
///
/// # Errors
/// `Locked` where another process has it open; `Io` where its name leads elsewhere by now; `Unsupported`
/// for what is not on this host; the host's.  Then `reader` has the locks it had.
pub fn open_for_writing_too(reader: &dyn Storage) -> Result<File> {
    let (Some(path), Some(fd)) = (reader.path(), reader.locked_fd()) else {
        let text = "is not on this host (allowed: files and block devices)";
        return Err(Error::unsupported(text).at_opt(reader.path()));
    };
    let file = open_file(path, Access::Write)?;
    if HostId::of_fd(&file) != reader.host_id() {
        return Err(Error::new(ErrorKind::Io, "was replaced while it was open").at(path));
    }
    match promote(file.as_fd(), fd) {
        Ok(()) => Ok(file),
        Err(e) => {
            unlock(file.as_fd());
            Err(e.at(path))
        }
    }
}

/// Gives `reader` the locks back that [`open_for_writing_too`] took from it, before what that returned is
/// closed.
///
/// # Errors
/// The host's.
pub fn reads_again(reader: &dyn Storage) -> Result<()> {
    let fd = reader.locked_fd();
    fd.map_or(Ok(()), |fd| {
        hold_too(fd, Access::Read).map_err(|e| e.at_opt(reader.path()))
    })
}

/// Makes storage of an open file, such as a temporary one: locks it, and sets it up for the kind
/// of I/O that is asked for.  `options.access` is what it was opened for.
///
/// # Errors
/// Those of [`open`].
pub fn adopt(file: File, path: &Path, options: &StorageOptions) -> Result<Arc<dyn Storage>> {
    let metadata = file.metadata();
    let metadata = metadata.map_err(|e| Error::io("look at the file", e).at(path))?;
    check_kind(metadata.file_type()).at(path)?;
    set_flags(&file, options.caching).at(path)?;
    match options.sharing {
        Sharing::Locked => lock(file.as_fd(), options.access).at(path)?,
        Sharing::Ours => hold_too(file.as_fd(), options.access).at(path)?,
        Sharing::Force => {}
    }
    let caching = options.caching;
    if metadata.file_type().is_block_device() {
        let device = DeviceStorage::new(file, path, options.access, caching)?;
        let device = device.with_flushing(options.flushing);
        return Ok(match caching {
            Caching::Direct => Arc::new(AlignedStorage::new(device)?),
            _ => Arc::new(device),
        });
    }
    let file = FileStorage::with_caching(file, path, caching)?;
    let file = file.with_flushing(options.flushing);
    Ok(match caching {
        Caching::Direct => Arc::new(AlignedStorage::new(file)?),
        _ => Arc::new(file),
    })
}

/// Takes back `O_NONBLOCK`, and sets `O_DIRECT` where it is asked for.
fn set_flags(file: &File, caching: Caching) -> Result<()> {
    let fail = |e: rustix::io::Errno| Error::io("set the file's flags", e.into());
    let mut flags = fcntl_getfl(file).map_err(fail)? - OFlags::NONBLOCK;
    flags.set(OFlags::DIRECT, caching == Caching::Direct);
    match fcntl_setfl(file, flags) {
        Err(rustix::io::Errno::INVAL) if caching == Caching::Direct => Err(Error::unsupported(
            "the file system has no direct I/O (cache modes none and directsync need it)",
        )),
        done => done.map_err(fail),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn what_is_neither_file_nor_device_is_refused_by_name_and_never_waited_for() {
        let dir = tempfile::tempdir().expect("a scratch directory");
        let pipe = dir.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, 0o600.into()).expect("makes a pipe");
        let socket = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).expect("binds");
        let cases = [
            (dir.path(), "a directory"),
            (&pipe, "a pipe"),
            (&socket, "a socket"),
            (Path::new("/dev/null"), "a character device"),
        ];
        for (path, what) in cases {
            for access in [Access::Read, Access::Write] {
                let error = open_file(path, access).expect_err(what);
                assert_eq!(error.kind(), ErrorKind::Invalid);
                assert!(error.message().contains(what), "{error}");
                assert_eq!(error.path(), Some(path));
            }
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = open(Path::new("/no/such/file"), &StorageOptions::default());
        let error = error.expect_err("is not there");
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert_eq!(error.path(), Some(Path::new("/no/such/file")));
    }

    #[test]
    fn an_image_open_for_writing_is_locked_and_force_reads_it() {
        let named = tempfile::NamedTempFile::new().expect("a temporary file");
        let options = |access, sharing| StorageOptions {
            access,
            sharing,
            ..StorageOptions::default()
        };
        let _writer = open(named.path(), &options(Access::Write, Sharing::Locked)).expect("opens");
        let read = open(named.path(), &options(Access::Read, Sharing::Locked));
        assert_eq!(read.expect_err("locked").kind(), ErrorKind::Locked);
        open(named.path(), &options(Access::Read, Sharing::Force)).expect("takes no locks");
    }

    #[test]
    fn the_lock_ends_with_the_storage_though_it_was_mapped_and_duplicated() {
        let named = tempfile::NamedTempFile::new().expect("a temporary file");
        let mut options = StorageOptions {
            access: Access::Write,
            ..StorageOptions::default()
        };
        let writer = open(named.path(), &options).expect("opens");
        writer.write_at(&[1; 8192], 0).expect("writes");
        writer.read_at(&mut [0; 100], 50).expect("reads");
        // As a child process has it between fork and exec.
        let fd = writer.fd().expect("a file has one");
        let _duplicate = fd.try_clone_to_owned().expect("duplicates");
        drop(writer);
        options.access = Access::Read;
        open(named.path(), &options).expect("nobody holds it");
    }
}

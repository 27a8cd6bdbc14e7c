//! What is there under the name of a target, and whether a new file can take its place.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, OFlags, StatxAttributes, StatxFlags, fcntl_getfl, fcntl_setfl, statfs, statx,
};

use crate::cli::removed::parent;
use crate::error::{Error, ErrorKind, Result};
use crate::nbd::uri::is_uri;
use crate::util::moment::moment;

/// Most symbolic links that are followed to a file that does not exist.
const MAX_LINKS: usize = 40;
/// `f_type` of procfs.
const PROCFS: u64 = 0x9fa0;

/// What is there under the target's name.
#[derive(Debug, Clone)]
pub enum Existing {
    /// Nothing.
    Nothing,
    /// A regular file.
    File(Metadata),
    /// A block device.
    Device(Metadata),
    /// A regular file that a process has open: the name leads to that, not to a name of the file,
    /// which may have none.
    Open(Metadata),
    /// What a server has, as an NBD URI names it.
    Remote,
}

/// Where a name leads to, symbolic links followed.
enum Way {
    /// To a name.
    Name(PathBuf),
    /// To what a process has open: `/proc/PID/fd/N`.
    Open(PathBuf),
}

/// Follows symbolic links from `given`, and says what is there.
///
/// # Errors
/// The host's; `Invalid` for what is neither a regular file nor a block device, and for what a
/// process has open and would not be written to by it.
pub fn look(given: &Path) -> Result<(PathBuf, Existing)> {
    if is_uri(given) {
        return Ok((given.to_owned(), Existing::Remote));
    }
    let way = follow(given)?;
    let (Way::Name(path) | Way::Open(path)) = &way;
    let found = match std::fs::metadata(path) {
        Ok(found) => found,
        Err(e) if e.kind() == io::ErrorKind::NotFound && matches!(way, Way::Name(_)) => {
            return Ok((path.clone(), Existing::Nothing));
        }
        Err(e) => return Err(Error::io("open", e).at(given)),
    };
    let kind = found.file_type();
    let existing = match way {
        Way::Name(_) if kind.is_file() => Existing::File(found),
        _ if kind.is_block_device() => Existing::Device(found),
        Way::Open(_) if kind.is_file() => {
            may_be_written(path).map_err(|e| e.at(given))?;
            Existing::Open(found)
        }
        _ => {
            let what = match kind {
                k if k.is_dir() => "a directory",
                k if k.is_char_device() => "a character device",
                k if k.is_fifo() => "a pipe",
                k if k.is_socket() => "a socket",
                _ => "something else",
            };
            let text = format!("is {what} (allowed as a target: regular files and block devices)");
            return Err(Error::invalid(text).at(given));
        }
    };
    Ok((way.into_path(), existing))
}

/// The writing end of the pipe that `given` leads to, where a process has that open.
///
/// # Errors
/// The host's, such as that nobody has it open for reading; `Invalid` where it is the reading end.
pub fn pipe(given: &Path) -> Result<Option<File>> {
    if is_uri(given) {
        return Ok(None);
    }
    let Way::Open(path) = follow(given)? else {
        return Ok(None);
    };
    let found = std::fs::metadata(&path).map_err(|e| Error::io("open", e).at(given))?;
    if !found.file_type().is_fifo() {
        return Ok(None);
    }
    may_be_written(&path).map_err(|e| e.at(given))?;
    // Without, it would wait for a reader that does not come.
    let file = File::options()
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path)
        .map_err(|e| Error::io("open the pipe", e).at(given))?;
    let waits = fcntl_getfl(&file).and_then(|flags| fcntl_setfl(&file, flags - OFlags::NONBLOCK));
    waits.map_err(|e| Error::io("set the pipe's flags", e.into()).at(given))?;
    Ok(Some(file))
}

/// Refuses names relative to an image that is reached through what a process has open.
///
/// # Errors
/// `Invalid`; those of [`look`].
pub fn refuse_open(given: &Path, what: &str) -> Result<()> {
    match look(given)?.1 {
        Existing::Open(_) => Err(Error::invalid(format!(
            "is what a process has open, which has no directory where {what} could be looked for \
             (allowed: the name of a file)"
        ))
        .at(given)),
        _ => Ok(()),
    }
}

/// Refuses a file that no other file can be renamed over.
///
/// # Errors
/// `Unsupported`, naming the way out.
pub(super) fn may_be_replaced(path: &Path) -> Result<()> {
    let has = |path: &Path, attribute| {
        let found = statx(CWD, path, AtFlags::empty(), StatxFlags::empty());
        found.is_ok_and(|f| (f.stx_attributes & f.stx_attributes_mask).contains(attribute))
    };
    let why = if has(path, StatxAttributes::MOUNT_ROOT) {
        "is a mount point, which no new file can replace"
    } else if has(parent(path), StatxAttributes::APPEND) {
        "is in a directory that files are only added to, so no new file can replace it"
    } else {
        return Ok(());
    };
    Err(Error::unsupported(format!(
        "{why} (convert -n writes in place)"
    )))
}

impl Way {
    fn into_path(self) -> PathBuf {
        let (Self::Name(path) | Self::Open(path)) = self;
        path
    }
}

/// Follows symbolic links, also to a name that is still free.
fn follow(given: &Path) -> Result<Way> {
    let mut path = given.to_owned();
    for _ in 0..MAX_LINKS {
        match std::fs::symlink_metadata(&path) {
            // What such a link says is no name: " (deleted)" for one, or "pipe:[1234]".
            Ok(found) if found.is_symlink() && is_on_procfs(&path) => return Ok(Way::Open(path)),
            Ok(found) if found.is_symlink() => {
                let link = std::fs::read_link(&path);
                let link = link.map_err(|e| Error::io("follow the link", e).at(&path))?;
                path = parent(&path).join(link);
            }
            // That it is not there, or may not be looked at, shows when it is opened.
            _ => return Ok(Way::Name(path)),
        }
    }
    let text = format!("leads through more than {MAX_LINKS} symbolic links");
    Err(Error::new(ErrorKind::Invalid, text).at(given))
}

fn is_on_procfs(link: &Path) -> bool {
    statfs(parent(link)).is_ok_and(|found| u64::try_from(found.f_type) == Ok(PROCFS))
}

/// Refuses what the process that has it open could not write from the start: what is there would
/// be lost, or go where it does not belong.
fn may_be_written(path: &Path) -> Result<()> {
    let unknown = |e| Error::io("find out how it is open", e);
    let directory = std::fs::canonicalize(parent(path)).map_err(unknown)?;
    let name = path.file_name().unwrap_or_default();
    let info = directory.with_file_name("fdinfo").join(name);
    let info = std::fs::read_to_string(info).map_err(unknown)?;
    let field = |name: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(name));
        line.map(str::trim)
    };
    let flags = field("flags:").and_then(|text| i32::from_str_radix(text, 8).ok());
    let why = match (flags, field("pos:")) {
        (Some(flags), _) if flags & libc::O_ACCMODE == libc::O_RDONLY => "is open for reading only",
        (Some(flags), _) if flags & libc::O_APPEND != 0 => "is open for appending only",
        (Some(_), Some("0")) => return Ok(()),
        _ => "has been read or written already",
    };
    Err(Error::invalid(format!(
        "{why} (allowed: a descriptor at the start of a file, open for writing; as DST, - streams)"
    )))
}

/// Returns once the names in a directory are on stable media.
///
/// # Errors
/// The host's.
pub(super) fn sync_directory(directory: &OwnedFd) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = rustix::fs::openat(directory, ".", flags, rustix::fs::Mode::empty())?;
    moment();
    Ok(rustix::fs::fsync(opened)?)
}

//! Where a new image is written: beside its name, to be renamed into place once it is whole.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata, Permissions};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempPath;

use crate::cli::Globals;
use crate::error::{Error, ErrorKind, Result};
use crate::nbd::uri::is_uri;
use crate::storage::Storage;
use crate::storage::open::{Access, StorageOptions, open};

mod adopt;

use adopt::adopt;

/// Most symbolic links that are followed to a file that does not exist.
const MAX_LINKS: usize = 40;
/// Most bytes of the target's name that go into that of the temporary file.
const MAX_NAME: usize = 200;

/// Whether the image must be on stable media before it is called done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durable {
    /// Yes.
    Yes,
    /// Only where it replaces a file, which must not be lost to a power cut.
    WhenReplacing,
}

/// What is there under the target's name.
#[derive(Debug, Clone)]
pub enum Existing {
    /// Nothing.
    Nothing,
    /// A regular file.
    File(Metadata),
    /// A block device.
    Device(Metadata),
    /// What a server has, as an NBD URI names it.
    Remote,
}

/// A new image on its way to its name, with owner, mode, access control list and attributes of the
/// file it is to replace.
/// Dropped before [`Target::commit`], it leaves nothing
/// behind, and what was there before is untouched; a block device is written in place.
#[derive(Debug)]
pub struct Target {
    /// The name as the user gave it.
    given: PathBuf,
    /// The same with symbolic links followed.
    path: PathBuf,
    /// `None`: in place.
    temp: Option<TempPath>,
    existing: Existing,
    /// Keeps others from the file that is to be replaced.
    _lock: Option<Arc<dyn Storage>>,
}

/// Follows symbolic links from `given`, and says what is there.
///
/// # Errors
/// The host's; `Invalid` for what is neither a regular file nor a block device.
pub fn look(given: &Path) -> Result<(PathBuf, Existing)> {
    if is_uri(given) {
        return Ok((given.to_owned(), Existing::Remote));
    }
    let path = follow(given)?;
    let found = match std::fs::metadata(&path) {
        Ok(found) => found,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok((path, Existing::Nothing)),
        Err(e) => return Err(Error::io("open", e).at(given)),
    };
    let kind = found.file_type();
    let existing = if kind.is_file() {
        Existing::File(found)
    } else if kind.is_block_device() {
        Existing::Device(found)
    } else {
        let what = match kind {
            k if k.is_dir() => "a directory",
            k if k.is_char_device() => "a character device",
            k if k.is_fifo() => "a pipe",
            k if k.is_socket() => "a socket",
            _ => "something else",
        };
        let text = format!("is {what} (allowed as a target: regular files and block devices)");
        return Err(Error::invalid(text).at(given));
    };
    Ok((path, existing))
}

/// Makes durable what was written to a server, over the connections that alone tell whether it is
/// still there; before they are given up.  What was written to a file is the host's until then.
///
/// # Errors
/// Those of [`Storage::sync`].
pub fn settle(storage: &dyn Storage) -> Result<()> {
    match storage.path().is_some_and(is_uri) {
        true => storage.sync(),
        false => Ok(()),
    }
}

impl Target {
    /// Makes an empty file beside `given`, after locking what is there under that name.
    ///
    /// # Errors
    /// Those of [`look`]; the host's; `Locked` where another process holds what is there.
    pub fn begin(given: &Path) -> Result<Self> {
        let (path, existing) = look(given)?;
        let (temp, lock) = match &existing {
            Existing::Device(_) | Existing::Remote => (None, None),
            Existing::Nothing => (Some(beside(&path, 0o666)?), None),
            Existing::File(old) => {
                let options = StorageOptions {
                    access: Access::Write,
                    ..StorageOptions::default()
                };
                let lock = open(&path, &options).map_err(|e| e.renamed(&path, given))?;
                let temp = beside(&path, 0o600)?;
                adopt(&temp, &path, old).map_err(|e| e.renamed(&temp, given))?;
                (Some(temp), Some(lock))
            }
        };
        Ok(Self {
            given: given.to_owned(),
            path,
            temp,
            existing,
            _lock: lock,
        })
    }

    /// The file or device to write to.
    pub fn path(&self) -> &Path {
        self.temp.as_deref().unwrap_or(&self.path)
    }

    /// The name as the user gave it.
    pub fn given(&self) -> &Path {
        &self.given
    }

    /// Whether a file that is there under that name is to be replaced.
    pub fn replaces(&self) -> bool {
        matches!(self.existing, Existing::File(_))
    }

    /// Tells the user where the file that is to be replaced has other names: they keep the old one.
    pub fn note_links(&self, globals: &Globals) {
        if matches!(&self.existing, Existing::File(old) if old.nlink() > 1) {
            globals.note(&format!(
                "{}: is replaced, and its other names (hard links) keep what it was",
                self.given.display()
            ));
        }
    }

    /// Whether what is written goes straight to a device or a server, which holds anything before.
    pub fn in_place(&self) -> bool {
        self.temp.is_none()
    }

    /// The same error, about the name that the user gave, where it is about the temporary file.
    #[must_use]
    pub fn name(&self, error: Error) -> Error {
        error.renamed(self.path(), &self.given)
    }

    /// Puts the image under its name.  Nothing may be written to it any more, and what was written
    /// to a server has been made durable by [`settle`] or a flush.
    ///
    /// # Errors
    /// The host's; then the name still stands for what it stood for before.
    pub fn commit(mut self, durable: Durable) -> Result<()> {
        if let Existing::Remote = self.existing {
            return Ok(());
        }
        let Some(temp) = self.temp.take() else {
            return sync(&self.path).map_err(|e| Error::io("sync", e).at(&self.given));
        };
        let replaces = matches!(self.existing, Existing::File(_));
        let durable = replaces || durable == Durable::Yes;
        if durable {
            sync(&temp).map_err(|e| Error::io("sync", e).at(&self.given))?;
        }
        let placed = if replaces {
            temp.persist(&self.path)
        } else {
            place_new(temp, &self.path)
        };
        placed
            .map_err(|e| Error::io("rename the new image into place", e.error).at(&self.given))?;
        if durable {
            let directory = directory(&self.path);
            sync(directory).map_err(|e| Error::io("sync the directory", e).at(directory))?;
        }
        Ok(())
    }
}

/// Puts a file under a name that was free when it was begun; whoever took it since keeps it.
fn place_new(temp: TempPath, path: &Path) -> std::result::Result<(), tempfile::PathPersistError> {
    match temp.persist_noclobber(path) {
        // File systems without links and without this kind of rename.
        Err(e) if e.error.kind() != io::ErrorKind::AlreadyExists && !path.exists() => {
            e.path.persist(path)
        }
        done => done,
    }
}

/// Storage beside `given`, with `options`, that has no name: it is gone when it is closed.
///
/// # Errors
/// The host's.
pub fn unnamed_beside(given: &Path, options: &StorageOptions) -> Result<Arc<dyn Storage>> {
    let temp = match is_uri(given) {
        // What belongs beside a server's disk goes where this host keeps such files.
        true => beside(&std::env::temp_dir().join("vdtool"), 0o600)?,
        false => beside(&follow(given)?, 0o600)?,
    };
    open(&temp, options).map_err(|e| e.renamed(&temp, given))
}

fn beside(path: &Path, mode: u32) -> Result<TempPath> {
    let mut prefix = OsString::from(".");
    let name = path.file_name().unwrap_or(OsStr::new("image")).as_bytes();
    prefix.push(OsString::from_vec(
        name[..name.len().min(MAX_NAME)].to_vec(),
    ));
    prefix.push(".");
    let made = tempfile::Builder::new()
        .prefix(&prefix)
        .suffix(".tmp")
        .permissions(Permissions::from_mode(mode))
        .tempfile_in(directory(path));
    // A directory that takes no new file may hold one that can be written.
    let doing = match path.exists() {
        true => "make a new file beside it (convert -n writes in place)",
        false => "make a file beside it",
    };
    let made = made.map_err(|e| Error::io(doing, plain(e)).at(path))?;
    Ok(made.into_temp_path())
}

/// The host's error without the temporary name that is added to it.
fn plain(error: io::Error) -> io::Error {
    use io::ErrorKind as Kind;
    match error.kind() {
        kind @ (Kind::NotADirectory
        | Kind::NotFound
        | Kind::PermissionDenied
        | Kind::QuotaExceeded
        | Kind::ReadOnlyFilesystem
        | Kind::StorageFull) => kind.into(),
        _ => error,
    }
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Follows symbolic links, also to a name that is still free.
fn follow(given: &Path) -> Result<PathBuf> {
    let mut path = given.to_owned();
    for _ in 0..MAX_LINKS {
        match std::fs::symlink_metadata(&path) {
            Ok(found) if found.is_symlink() => {
                let link = std::fs::read_link(&path);
                let link = link.map_err(|e| Error::io("follow the link", e).at(&path))?;
                path = directory(&path).join(link);
            }
            // That it is not there, or may not be looked at, shows when it is opened.
            _ => return Ok(path),
        }
    }
    let text = format!("leads through more than {MAX_LINKS} symbolic links");
    Err(Error::new(ErrorKind::Invalid, text).at(given))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(dir).expect("is there");
        let mut names: Vec<String> = entries
            .map(|e| e.expect("reads").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_target_that_is_dropped_leaves_nothing_and_the_old_file_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let (old, new) = (dir.path().join("old.raw"), dir.path().join("new.raw"));
        std::fs::write(&old, b"old").expect("writes");
        for path in [&old, &new] {
            let target = Target::begin(path).expect("begins");
            std::fs::write(target.path(), b"half").expect("writes");
        }
        assert_eq!(names(dir.path()), ["old.raw"]);
        assert_eq!(std::fs::read(&old).expect("reads"), b"old");
    }

    #[test]
    fn the_mode_of_a_replaced_file_is_kept_and_links_are_followed() {
        let dir = tempfile::tempdir().expect("a directory");
        let (old, link) = (dir.path().join("old.raw"), dir.path().join("link"));
        std::fs::write(&old, b"old").expect("writes");
        std::fs::set_permissions(&old, Permissions::from_mode(0o640)).expect("sets");
        std::os::unix::fs::symlink("old.raw", &link).expect("links");
        let target = Target::begin(&link).expect("begins");
        std::fs::write(target.path(), b"new").expect("writes");
        target.commit(Durable::WhenReplacing).expect("commits");
        let found = std::fs::metadata(&old).expect("is there");
        assert_eq!(found.mode() & 0o7777, 0o640);
        assert_eq!(std::fs::read(&old).expect("reads"), b"new");
        assert!(
            std::fs::symlink_metadata(&link)
                .expect("is there")
                .is_symlink()
        );
        assert_eq!(names(dir.path()), ["link", "old.raw"]);
    }

    #[test]
    fn a_link_to_a_free_name_is_followed_and_a_taken_name_is_not_overwritten() {
        let dir = tempfile::tempdir().expect("a directory");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("new.raw", &link).expect("links");
        let target = Target::begin(&link).expect("begins");
        target.commit(Durable::Yes).expect("commits");
        assert_eq!(names(dir.path()), ["link", "new.raw"]);
        let other = dir.path().join("other.raw");
        let target = Target::begin(&other).expect("begins");
        std::fs::write(&other, b"someone else's").expect("writes");
        target.commit(Durable::Yes).expect_err("the name was taken");
        assert_eq!(std::fs::read(&other).expect("reads"), b"someone else's");
    }

    #[test]
    fn what_cannot_hold_an_image_is_refused_by_name() {
        let dir = tempfile::tempdir().expect("a directory");
        let pairs = [
            (dir.path(), "directory"),
            (Path::new("/dev/null"), "character device"),
        ];
        for (path, what) in pairs {
            let error = Target::begin(path).expect_err("refused");
            assert!(error.message().contains(what), "{error}");
        }
        let nowhere = dir.path().join("no/where.raw");
        assert!(Target::begin(&nowhere).is_err());
        let circle = dir.path().join("circle");
        std::os::unix::fs::symlink("circle", &circle).expect("links");
        let error = Target::begin(&circle).expect_err("never ends");
        assert!(error.message().contains("symbolic links"), "{error}");
    }

    #[test]
    fn a_very_long_name_has_room_for_what_is_added_to_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("x".repeat(255));
        Target::begin(&path)
            .expect("begins")
            .commit(Durable::WhenReplacing)
            .expect("commits");
        assert!(path.exists());
    }
}

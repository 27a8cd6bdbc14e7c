//! Where a new image is written: beside its name, to be put into place once it is whole.
//!
//! An image may be of several files, one of which names the others.  They appear together: at any
//! moment a reader finds all of the old ones or all of the new ones.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::cli::Globals;
use crate::cli::removed::parent;
use crate::error::{Error, ErrorKind, Result};
use crate::nbd::uri::is_uri;
use crate::storage::open::{Access, Sharing, StorageOptions, open};
use crate::storage::{self, HostId, Storage};

mod adopt;
mod exchange;
#[cfg(test)]
mod listed;
mod look;
mod several;
mod stale;
mod temp;

use adopt::adopt;
pub use exchange::Kept;
pub use look::{Existing, look, pipe, refuse_open};
use look::{may_be_replaced, sync_directory};
pub use several::Rename;
use stale::Kind;
use temp::Temp;

/// Whether the image must be on stable media before it is called done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durable {
    /// Yes.
    Yes,
    /// Only where it replaces a file, which must not be lost to a power cut.
    WhenReplacing,
}

/// A new image on its way to its name, with owner, mode, access control list and attributes of the
/// file it is to replace, and the further files that it is made of.
/// Dropped before [`Target::commit`], it leaves nothing
/// behind, and what was there before is untouched; a block device is written in place, and so is
/// a file that is reached through a descriptor.
#[derive(Debug)]
pub struct Target {
    image: New,
    /// The files that the image names, in the order in which they were added.
    others: Vec<Other>,
}

/// A file that the image names.
#[derive(Debug)]
struct Other {
    new: New,
    /// The name that the image has for it.
    recorded: PathBuf,
    /// Names of its new content that a kill left.
    left: Vec<OsString>,
}

/// One file, on its way.
#[derive(Debug)]
struct New {
    /// The name as the user gave it.
    given: PathBuf,
    /// The same with symbolic links followed.
    path: PathBuf,
    /// `None`: in place.
    temp: Option<Temp>,
    existing: Existing,
    /// Keeps others from the file that is to be replaced.
    lock: Option<Arc<dyn Storage>>,
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

/// Storage beside `given`, with `options`, that has no name: it is gone when it is closed.
///
/// # Errors
/// The host's.
pub fn unnamed_beside(given: &Path, options: &StorageOptions) -> Result<Arc<dyn Storage>> {
    let directory = match look(given)? {
        // What belongs beside a server's disk, or beside what has no name, goes where this host
        // keeps such files.
        (_, Existing::Remote | Existing::Open(_)) => std::env::temp_dir(),
        (path, _) => parent(&path).to_owned(),
    };
    let made = tempfile::tempfile_in(directory);
    let file = made.map_err(|e| Error::io("make a file beside it", plain(e)).at(given))?;
    storage::open::adopt(file, given, options)
}

impl Target {
    /// Makes an empty file beside `given`, after locking what is there under that name, and
    /// removes what a run that was killed left there.
    ///
    /// # Errors
    /// Those of [`look`]; the host's; `Locked` where another process holds what is there;
    /// `Unsupported` where nothing can be renamed over it.
    pub fn begin(given: &Path) -> Result<Self> {
        Self::begin_over(given, None)
    }

    /// As [`Target::begin`]; where what is there is the file `ours`, this process has it locked, until
    /// what is begun has ended.
    ///
    /// # Errors
    /// Those of [`Target::begin`].
    pub fn begin_over(given: &Path, ours: Option<HostId>) -> Result<Self> {
        Ok(Self {
            image: New::begin(given, ours)?,
            others: Vec::new(),
        })
    }

    /// Adds a file at `path`, which the image names `recorded`.
    ///
    /// # Errors
    /// Those of [`Target::begin`].
    pub fn add(&mut self, path: &Path, recorded: &Path) -> Result<()> {
        refuse_open(path, "a further file")?;
        let new = New::begin(path, None)?;
        let left = match &new.temp {
            None => Vec::new(),
            Some(temp) => {
                if new.replaces() {
                    let linked = temp.can_be_linked();
                    linked
                        .map_err(|e| new.fail("have two names for one file, to replace it", e))?;
                }
                several::generation(&self.image).left(temp.directory(), &new.path)
            }
        };
        self.others.push(Other {
            new,
            recorded: recorded.to_owned(),
            left,
        });
        Ok(())
    }

    /// The file or device to write the image to.
    pub fn path(&self) -> &Path {
        self.image.written()
    }

    /// The files or devices to write the further files to.
    pub fn others(&self) -> impl Iterator<Item = &Path> {
        self.others.iter().map(|other| other.new.written())
    }

    /// Tells the user what is replaced that he may not think of: the files that the image names,
    /// and those that have other names, which keep what they were.
    pub fn note_replaced(&self, globals: &Globals) {
        for other in self.others.iter().filter(|o| o.new.replaces()) {
            globals.note(&format!(
                "{}: the data file is there already and is replaced",
                other.new.given.display()
            ));
        }
        for new in self.all() {
            if matches!(&new.existing, Existing::File(old) if old.nlink() > 1) {
                globals.note(&format!(
                    "{}: is replaced, and its other names (hard links) keep what it was",
                    new.given.display()
                ));
            }
        }
    }

    /// Whether what is written goes straight to a device or a server, which holds anything before.
    pub fn in_place(&self) -> bool {
        matches!(self.image.existing, Existing::Device(_) | Existing::Remote)
    }

    /// The same error, about the name that the user gave, where it is about a file on its way.
    #[must_use]
    pub fn name(&self, error: Error) -> Error {
        self.all().fold(error, |error, new| new.name(error))
    }

    /// Puts an image of one file under its name.  Nothing may be written to it any more, and what
    /// was written to a server has been made durable by [`settle`] or a flush.
    ///
    /// # Errors
    /// The host's; then the name still stands for what it stood for before.
    pub fn commit(self, durable: Durable) -> Result<()> {
        self.commit_named(durable, &nameless)
    }

    fn all(&self) -> impl Iterator<Item = &New> {
        std::iter::once(&self.image).chain(self.others.iter().map(|o| &o.new))
    }
}

impl New {
    fn begin(given: &Path, ours: Option<HostId>) -> Result<Self> {
        let (path, existing) = look(given)?;
        let (temp, lock) = match &existing {
            Existing::Device(_) | Existing::Remote => (None, None),
            Existing::Open(_) => {
                let emptied = open(&path, &writable()).and_then(|file| file.set_len(0));
                emptied.map_err(|e| e.renamed(&path, given))?;
                (None, None)
            }
            Existing::Nothing => (Some(beside(&path, 0o666)?), None),
            Existing::File(old) => {
                may_be_replaced(&path).map_err(|e| e.at(given))?;
                let mut options = writable();
                if ours.is_some() && ours == Some(HostId::of(old)) {
                    options.sharing = Sharing::Ours;
                }
                let lock = open(&path, &options).map_err(|e| e.renamed(&path, given))?;
                if options.sharing == Sharing::Ours && lock.host_id() != ours {
                    let text = "was replaced while it was open";
                    return Err(Error::new(ErrorKind::Io, text).at(given));
                }
                let temp = beside(&path, 0o600)?;
                adopt(temp.path(), &path, old).map_err(|e| e.renamed(temp.path(), given))?;
                (Some(temp), Some(lock))
            }
        };
        if let Some(temp) = &temp {
            for name in Kind::Temporary.left(temp.directory(), &path) {
                Kind::Temporary.remove(temp.directory(), &path, &name);
            }
        }
        Ok(Self {
            given: given.to_owned(),
            path,
            temp,
            existing,
            lock,
        })
    }

    fn written(&self) -> &Path {
        self.temp.as_ref().map_or(&self.path, Temp::path)
    }

    fn replaces(&self) -> bool {
        matches!(self.existing, Existing::File(_))
    }

    fn file_name(&self) -> &OsStr {
        self.path.file_name().unwrap_or_default()
    }

    /// The same error, about the name that the user gave; for want of room beside the old file, it
    /// names the way out.
    fn name(&self, error: Error) -> Error {
        let lacks_room = error.kind() == ErrorKind::NoSpace
            && error.path() == Some(self.written())
            && self.replaces();
        let error = error.renamed(self.written(), &self.given);
        match lacks_room {
            true => error
                .noted("the file that it replaces is kept until then (convert -n writes in place)"),
            false => error,
        }
    }

    fn fail(&self, doing: &str, error: io::Error) -> Error {
        Error::io(doing, error).at(&self.given)
    }

    /// Returns once it is on stable media.
    fn sync(&self) -> Result<()> {
        let synced = match (&self.temp, &self.existing) {
            (_, Existing::Remote) => Ok(()),
            (Some(temp), _) => temp.sync(),
            (None, _) => File::open(&self.path).and_then(|file| file.sync_all()),
        };
        synced.map_err(|e| self.fail("sync", e))
    }

    fn sync_directory(&self) -> Result<()> {
        let directory: Option<&OwnedFd> = self.temp.as_ref().map(|t| &**t.directory());
        let synced = directory.map_or(Ok(()), sync_directory);
        synced.map_err(|e| Error::io("sync the directory", e).at(parent(&self.path)))
    }
}

/// Of an image of one file.
fn nameless(_image: &Path, _names: &[PathBuf]) -> Result<()> {
    Err(Error::invalid("the image has no names for further files"))
}

fn writable() -> StorageOptions {
    StorageOptions {
        access: Access::Write,
        ..StorageOptions::default()
    }
}

fn beside(path: &Path, mode: u32) -> Result<Temp> {
    // A directory that takes no new file may hold one that can be written.
    let doing = match path.exists() {
        true => "make a new file beside it (convert -n writes in place)",
        false => "make a file beside it",
    };
    Temp::beside(path, mode).map_err(|e| Error::io(doing, plain(e)).at(path))
}

/// The host's error without a temporary name that is added to it.
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

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::listed::names;
    use super::*;

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

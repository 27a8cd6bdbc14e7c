//! A new file on its way to its name: without one, where the host has such files, else under one
//! that goes with its owner.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, linkat, openat};
use rustix::io::Errno;

use super::stale::{Kind, claimed};
use crate::cli::removed::{Removed, open_directory, parent};
use crate::storage::filesystem::FileSystem;
use crate::util::moment::moment;

/// How often a file is made anew that somebody took for one that was left behind.
const TRIES: usize = 8;

/// A new file beside the name that it is for.
#[derive(Debug)]
pub(super) struct Temp {
    directory: Arc<OwnedFd>,
    /// As it was given, for messages and for names.
    beside: PathBuf,
    file: File,
    /// `None`: it has none yet.
    name: Option<Named>,
    /// What opens it.
    path: PathBuf,
}

/// The name of a file that is not in place yet.
#[derive(Debug)]
struct Named {
    removed: Removed,
    name: OsString,
}

impl Temp {
    /// Makes an empty file beside `path`, with `mode` as far as the process's mask allows.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn beside(path: &Path, mode: u32) -> io::Result<Self> {
        let directory = Arc::new(open_directory(parent(path))?);
        match unnamed(&directory, mode) {
            Some(file) => Self::without_name(path, directory, file?),
            None => Self::with_name(path, directory, mode),
        }
    }

    fn without_name(beside: &Path, directory: Arc<OwnedFd>, file: File) -> io::Result<Self> {
        // Before anybody can see it.
        claimed(&file)?;
        Ok(Self {
            path: through(&file),
            directory,
            beside: beside.to_owned(),
            file,
            name: None,
        })
    }

    /// Where the host has no files without names.
    fn with_name(beside: &Path, directory: Arc<OwnedFd>, mode: u32) -> io::Result<Self> {
        for _ in 0..TRIES {
            // Its number is not known before it is there.
            let (removed, file) = Kind::Temporary.name(beside, 0, |name| {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
                Removed::make(&directory, name, || {
                    let mode = Mode::from_raw_mode(mode);
                    Ok(File::from(openat(&*directory, name, flags, mode)?))
                })
            })?;
            // Who looks for what was left behind may have had it before us.
            if !claimed(&file)? || file.metadata()?.nlink() == 0 {
                removed.keep();
                continue;
            }
            let name = Kind::Temporary.name(beside, file.metadata()?.ino(), |name| {
                removed.change(name)?;
                Ok(name.to_owned())
            })?;
            // The name may lead elsewhere by the time that it is opened.
            let path = opened(&file).unwrap_or_else(|| parent(beside).join(&name));
            return Ok(Self {
                directory,
                beside: beside.to_owned(),
                file,
                name: Some(Named { removed, name }),
                path,
            });
        }
        Err(io::ErrorKind::ResourceBusy.into())
    }

    /// What opens it, until it is in place.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What opens it afterwards, too; `None` where only its name does.
    pub(super) fn opened(&self) -> Option<PathBuf> {
        opened(&self.file)
    }

    /// Returns once it is on stable media.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    /// The directory that it lies in.
    pub(super) fn directory(&self) -> &Arc<OwnedFd> {
        &self.directory
    }

    /// Gives it `name`, which was free when it was begun; whoever took it since keeps it.
    pub(super) fn place_new(&self, name: &OsStr) -> io::Result<()> {
        let Some(Named { removed, .. }) = &self.name else {
            return self.link(name);
        };
        match removed.rename(name, RenameFlags::NOREPLACE) {
            Err(e) if has_no_such_rename(&e) => match self.link(name) {
                // Without links either.
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists && !self.beside.exists() => {
                    removed.rename(name, RenameFlags::empty())
                }
                linked => linked,
            },
            renamed => renamed,
        }
    }

    /// Gives it `name`, in place of whatever has it, and leaves it any other names that it has.
    pub(super) fn replace(&self, name: &OsStr) -> io::Result<()> {
        let (removed, _) = self.linked(Kind::Temporary)?;
        removed.rename(name, RenameFlags::empty())
    }

    /// As [`Temp::replace`], for a file that needs no other name; on file systems without links,
    /// too.
    pub(super) fn replace_alone(&self, name: &OsStr) -> io::Result<()> {
        match &self.name {
            Some(own) => own.removed.rename(name, RenameFlags::empty()),
            None => self.replace(name),
        }
    }

    /// Another name for it, and what that is.
    pub(super) fn linked(&self, kind: Kind<'_>) -> io::Result<(Removed, OsString)> {
        kind.name(&self.beside, self.file.metadata()?.ino(), |name| {
            let (removed, ()) = Removed::make(&self.directory, name, || self.link(name))?;
            Ok((removed, name.to_owned()))
        })
    }

    /// Whether it can have two names at once.
    pub(super) fn can_be_linked(&self) -> io::Result<()> {
        match self.name {
            Some(_) => self.linked(Kind::Temporary).map(drop),
            // It gets its first name by a link.
            None => Ok(()),
        }
    }

    fn link(&self, name: &OsStr) -> io::Result<()> {
        let directory = &*self.directory;
        moment();
        let linked = match &self.name {
            Some(own) => linkat(directory, &own.name, directory, name, AtFlags::empty()),
            None => linkat(CWD, &self.path, directory, name, AtFlags::SYMLINK_FOLLOW),
        };
        Ok(linked?)
    }
}

/// Whether the host has no way to rename that leaves a taken name alone.
fn has_no_such_rename(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP)
    )
}

/// A file without a name; `None` where the host has none, or has no way to name it later.
fn unnamed(directory: &OwnedFd, mode: u32) -> Option<io::Result<File>> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = match openat(directory, ".", flags, Mode::from_raw_mode(mode)) {
        Ok(file) => File::from(file),
        // As kernels and file systems without them say it.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::INVAL | Errno::NOSYS) => {
            return None;
        }
        Err(e) => return Some(Err(e.into())),
    };
    // Whether it can be named, only its server knows, and says so at the end.
    if FileSystem::of(file.as_fd()) == FileSystem::Remote {
        return None;
    }
    opened(&file).is_some().then_some(Ok(file))
}

/// The way to an open file, where there is one.
fn opened(file: &File) -> Option<PathBuf> {
    let identity = |m: std::fs::Metadata| (m.dev(), m.ino());
    let own = file.metadata().map(identity).ok()?;
    let path = through(file);
    let seen = std::fs::metadata(&path).map(identity).ok()?;
    (own == seen).then_some(path)
}

/// The way to an open file, also where it has no name.
fn through(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::cli::target::listed::names;

    /// Both ways of making a file, where the host has both.
    fn both(path: &Path) -> Vec<Temp> {
        let directory = || Arc::new(open_directory(parent(path)).expect("opens"));
        let named = Temp::with_name(path, directory(), 0o600).expect("makes");
        let mut temps = vec![named];
        match unnamed(&directory(), 0o600) {
            Some(file) => {
                let file = file.expect("makes");
                temps.push(Temp::without_name(path, directory(), file).expect("makes"));
            }
            None => eprintln!("skipped: no files without names here"),
        }
        temps
    }

    #[test]
    fn with_and_without_a_name_until_then_a_file_comes_to_its_name() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("a");
        let name = OsStr::new("a");
        for temp in both(&path) {
            std::fs::write(temp.path(), b"new").expect("writes");
            temp.sync().expect("syncs");
            temp.can_be_linked().expect("links");
            temp.place_new(name).expect("is free");
            drop(temp);
            assert_eq!(names(dir.path()), ["a"]);
            for temp in both(&path) {
                std::fs::write(temp.path(), b"newer").expect("writes");
                let error = temp.place_new(name).expect_err("is taken");
                assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
                assert_eq!(std::fs::read(&path).expect("reads"), b"new");
                temp.replace_alone(name).expect("replaces");
                assert_eq!(std::fs::read(&path).expect("reads"), b"newer");
                drop(temp);
                assert_eq!(names(dir.path()), ["a"]);
                std::fs::write(&path, b"new").expect("writes");
            }
            std::fs::remove_file(&path).expect("removes");
        }
    }

    #[test]
    fn a_file_that_is_placed_keeps_its_other_names() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("a");
        std::fs::write(&path, b"old").expect("writes");
        for temp in both(&path) {
            std::fs::write(temp.path(), b"new").expect("writes");
            let (other, name) = temp.linked(Kind::Temporary).expect("links");
            temp.replace(OsStr::new("a")).expect("replaces");
            drop(temp);
            for path in [&path, &dir.path().join(&name)] {
                assert_eq!(std::fs::read(path).expect("reads"), b"new");
            }
            drop(other);
            assert_eq!(names(dir.path()), ["a"]);
        }
    }

    #[test]
    fn a_file_that_somebody_took_for_a_leftover_is_made_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("a");
        let done = AtomicBool::new(false);
        let (done, dir, path) = (&done, dir.path(), &path);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let directory = open_directory(dir).expect("opens");
                while !done.load(Ordering::Relaxed) {
                    for name in Kind::Temporary.left(&directory, path) {
                        Kind::Temporary.remove(&directory, path, &name);
                    }
                }
            });
            for _ in 0..300 {
                let directory = Arc::new(open_directory(dir).expect("opens"));
                let temp = Temp::with_name(path, directory, 0o600);
                let placed = temp.and_then(|temp| temp.place_new(OsStr::new("a")));
                placed.expect("nobody takes it away");
                std::fs::remove_file(path).expect("is there");
            }
            done.store(true, Ordering::Relaxed);
        });
    }
}

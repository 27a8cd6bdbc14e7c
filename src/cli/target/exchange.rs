//! Putting a new image under a name whose old file goes on under another one.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, RenameFlags, linkat, renameat_with};
use rustix::io::Errno;

use super::{Durable, Target, nameless, sync_directory};
use crate::cli::removed::{Removed, open_directory, parent};
use crate::error::{Error, Result};
use crate::storage::HostId;
use crate::util::moment::moment;

impl Target {
    /// As [`Target::commit`]; the file that it replaces, which is open as `old`, goes on as `new`,
    /// which is free or a name of that file already.  At any moment both names are there or `new`
    /// alone is missing; on a host without hard links `new` may for a moment be the new image.
    ///
    /// # Errors
    /// The host's; then the old file has the name it had, `new`, or both.
    pub fn commit_keeping(self, old: BorrowedFd<'_>, new: &Path) -> Result<()> {
        self.keep_seen(old, new, &mut || {})
    }

    fn keep_seen(self, old: BorrowedFd<'_>, new: &Path, seen: &mut dyn FnMut()) -> Result<()> {
        match self.keep(old, new)? {
            Some(kept) => {
                // From here on it may be the only one: where the rest fails it stays, and is harmless.
                kept.keep();
                self.commit_seen(Durable::Yes, &nameless, seen)
            }
            None => self.exchange(new.file_name().unwrap_or_default(), new),
        }
    }

    /// The first half of [`Target::commit_keeping`]: gives the old file its other name, which goes when
    /// what is returned is dropped; `None` on a host without hard links.
    ///
    /// # Errors
    /// As [`Target::commit_keeping`]; nothing has changed then.
    pub fn keep(&self, old: BorrowedFd<'_>, new: &Path) -> Result<Option<Kept>> {
        let failed = |e: io::Error| Error::io("give the file another name", e).at(new);
        let directory = open_directory(parent(new)).map_err(failed)?;
        let directory = Arc::new(directory);
        let name = new.file_name().unwrap_or_default();
        self.refuse_replaced(old)?;
        let mut linked = None;
        if HostId::named(new) == HostId::of_fd(old) {
            // Or the name that is about to be taken is the only one.
            let links = rustix::fs::fstat(old)
                .map_err(|e| failed(e.into()))?
                .st_nlink;
            if links < 2 {
                return Err(failed(io::ErrorKind::AlreadyExists.into()));
            }
        } else {
            match link(&directory, name, old) {
                Ok(removed) => linked = Some(removed),
                Err(e) if has_no_links(&e) => return Ok(None),
                Err(e) => return Err(failed(e)),
            }
            self.refuse_replaced(old)?;
        }
        // The old content has its other name for good before it loses the one it had, whoever gave
        // it that.
        sync_directory(&directory).map_err(failed)?;
        Ok(Some(Kept {
            linked,
            file: self.image.path.clone(),
            id: HostId::of_fd(old),
        }))
    }

    /// Returns once the new image is on stable media; what is written to it later is not.
    ///
    /// # Errors
    /// The host's.
    pub fn sync(&self) -> Result<()> {
        self.all().try_for_each(|new| new.sync())
    }

    /// Refuses to take the name from another file than the one that is `old`, and locked.
    ///
    /// # Errors
    /// `Io`.
    pub fn refuse_replaced(&self, old: BorrowedFd<'_>) -> Result<()> {
        let id = HostId::of_fd(old);
        let locked = self.image.lock.as_ref().and_then(|lock| lock.host_id());
        if id.is_some() && HostId::named(&self.image.path) == id && locked == id {
            return Ok(());
        }
        let text = "was replaced while it was open";
        Err(Error::new(crate::ErrorKind::Io, text).at(&self.image.given))
    }

    /// The same where no file has two names: the new image takes the free one, and then both are
    /// exchanged.
    fn exchange(self, name: &OsStr, new: &Path) -> Result<()> {
        let failed = |e: io::Error| Error::io("exchange it with the new image", e).at(new);
        let temp = match &self.image.temp {
            Some(temp) if parent(new) == parent(&self.image.path) => temp,
            _ => return Err(failed(io::ErrorKind::CrossesDevices.into())),
        };
        self.image.sync()?;
        temp.place_new(name).map_err(failed)?;
        let directory = temp.directory();
        let own = self.image.file_name();
        moment();
        if let Err(e) = renameat_with(directory, name, directory, own, RenameFlags::EXCHANGE) {
            drop(Removed::at(new));
            return Err(failed(e.into()));
        }
        let synced = sync_directory(directory);
        synced.map_err(|e| Error::io("sync the directory", e).at(parent(new)))?;
        // What is renamed is not always in the directory's own blocks.
        let file = File::open(new).and_then(|file| file.sync_all());
        file.map_err(|e| Error::io("sync", e).at(new))
    }
}

/// The other name of an old file that has lost none yet.
#[derive(Debug)]
pub struct Kept {
    /// `None`: it had it before.
    linked: Option<Removed>,
    /// The name that it is to lose.
    file: PathBuf,
    id: Option<HostId>,
}

impl Kept {
    /// Leaves it there.
    pub fn keep(mut self) {
        self.linked.take().into_iter().for_each(Removed::keep);
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        // Somebody may have taken the old one away: then this one is the only one.
        if HostId::named(&self.file) != self.id {
            self.linked.take().into_iter().for_each(Removed::keep);
        }
    }
}

/// Gives what is open as `old` a name that is free.
fn link(directory: &Arc<OwnedFd>, name: &OsStr, old: BorrowedFd<'_>) -> io::Result<Removed> {
    let through = format!("/proc/self/fd/{}", old.as_raw_fd());
    let flags = AtFlags::SYMLINK_FOLLOW;
    let make = || Ok(linkat(CWD, &*through, &**directory, name, flags)?);
    Removed::make(directory, name, make).map(|(removed, ())| removed)
}

/// Whether a file cannot have two names there.
fn has_no_links(error: &io::Error) -> bool {
    let code = error.raw_os_error();
    let codes = [Errno::PERM, Errno::OPNOTSUPP, Errno::MLINK, Errno::NOSYS];
    codes.iter().any(|errno| Some(errno.raw_os_error()) == code)
}

#[cfg(test)]
mod tests {
    use super::super::listed::names;
    use super::*;

    /// An old file `a`, and a target that is to take its name.
    fn target(dir: &Path) -> (Target, File) {
        std::fs::write(dir.join("a"), b"old").expect("writes");
        let target = Target::begin(&dir.join("a")).expect("begins");
        std::fs::write(target.path(), b"new").expect("writes");
        (target, File::open(dir.join("a")).expect("opens"))
    }

    fn read(dir: &Path, name: &str) -> Vec<u8> {
        std::fs::read(dir.join(name)).expect("reads")
    }

    #[test]
    fn the_old_file_goes_on_under_its_new_name() {
        use std::os::fd::AsFd;
        let dir = tempfile::tempdir().expect("a directory");
        let dir = dir.path();
        let (new, old) = target(dir);
        new.commit_keeping(old.as_fd(), &dir.join("b"))
            .expect("commits");
        assert_eq!(
            (read(dir, "a"), read(dir, "b")),
            (b"new".to_vec(), b"old".to_vec())
        );
        assert_eq!(names(dir), ["a", "b"]);
        std::fs::remove_file(dir.join("b")).expect("removes");
        // A run that was killed had linked it.
        let (new, old) = target(dir);
        std::fs::hard_link(dir.join("a"), dir.join("b")).expect("links");
        new.commit_keeping(old.as_fd(), &dir.join("b"))
            .expect("commits");
        assert_eq!(
            (read(dir, "a"), read(dir, "b")),
            (b"new".to_vec(), b"old".to_vec())
        );
        let (new, old) = target(dir);
        new.commit_keeping(old.as_fd(), &dir.join("b"))
            .expect_err("is taken");
        assert_eq!(
            (read(dir, "a"), read(dir, "b")),
            (b"old".to_vec(), b"old".to_vec())
        );
        assert_eq!(names(dir), ["a", "b"]);
    }

    #[test]
    fn the_old_content_is_kept_whatever_ends_it_once_it_lost_its_name() {
        use std::os::fd::AsFd;
        use std::panic::{AssertUnwindSafe, catch_unwind};
        let dir = tempfile::tempdir().expect("a directory");
        let dir = dir.path();
        let (new, old) = target(dir);
        let run = || {
            let mut seen = || panic!("after the rename");
            new.keep_seen(old.as_fd(), &dir.join("b"), &mut seen)
        };
        catch_unwind(AssertUnwindSafe(run)).expect_err("ends early");
        assert_eq!(
            (read(dir, "a"), read(dir, "b")),
            (b"new".to_vec(), b"old".to_vec())
        );
    }

    #[test]
    fn a_file_that_took_the_name_meanwhile_is_not_replaced() {
        use std::os::fd::AsFd;
        for has_link in [false, true] {
            let dir = tempfile::tempdir().expect("a directory");
            let dir = dir.path();
            let (new, old) = target(dir);
            if has_link {
                std::fs::hard_link(dir.join("a"), dir.join("b")).expect("links");
            }
            std::fs::write(dir.join("c"), b"another").expect("writes");
            std::fs::rename(dir.join("c"), dir.join("a")).expect("renames");
            let error = new.commit_keeping(old.as_fd(), &dir.join("b"));
            let text = error.expect_err("is another").to_string();
            assert!(text.contains("was replaced"), "{text}");
            assert_eq!(read(dir, "a"), b"another");
        }
    }

    #[test]
    fn without_hard_links_both_are_exchanged() {
        let dir = tempfile::tempdir().expect("a directory");
        let dir = dir.path();
        let (new, _) = target(dir);
        new.exchange(OsStr::new("b"), &dir.join("b"))
            .expect("exchanges");
        assert_eq!(
            (read(dir, "a"), read(dir, "b")),
            (b"new".to_vec(), b"old".to_vec())
        );
        assert_eq!(names(dir), ["a", "b"]);
        let (new, _) = target(dir);
        new.exchange(OsStr::new("b"), &dir.join("b"))
            .expect_err("is taken");
        assert_eq!(
            (read(dir, "a"), read(dir, "b")),
            (b"old".to_vec(), b"old".to_vec())
        );
        let elsewhere = dir.join("no/where");
        let (new, _) = target(dir);
        new.exchange(OsStr::new("where"), &elsewhere)
            .expect_err("lies elsewhere");
        assert_eq!(names(dir), ["a", "b"]);
    }
}

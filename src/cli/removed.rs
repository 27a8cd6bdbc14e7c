//! Names that go when the process ends: temporary files, sockets, the file with the process id.
//!
//! They are kept in one table, so that a process that is told to end while it is stuck removes them
//! as well.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, RenameFlags, openat, renameat, renameat_with, statat, unlinkat,
};

use crate::cli::exit::Exit;
use crate::storage::HostId;
use crate::util::moment::moment;

/// All names there are now.
static TABLE: Mutex<Table> = Mutex::new(Table {
    next: 0,
    names: BTreeMap::new(),
});

struct Table {
    next: u64,
    names: BTreeMap<u64, Name>,
}

#[derive(Debug, Clone)]
struct Name {
    directory: Arc<OwnedFd>,
    name: OsString,
    /// What had that name when it was noted: whatever has it by then is not ours.
    id: Option<HostId>,
}

impl Name {
    fn unlink(&self) {
        if self.id.is_some() && self.found() == self.id {
            moment();
            // Nothing is lost where somebody else removed it.
            let _ = unlinkat(&*self.directory, &self.name, AtFlags::empty());
        }
    }

    fn found(&self) -> Option<HostId> {
        let found = statat(&*self.directory, &self.name, AtFlags::SYMLINK_NOFOLLOW);
        found.ok().map(|found| HostId::of_stat(&found))
    }

    fn rename(&self, to: &OsStr, flags: RenameFlags) -> io::Result<()> {
        let directory = &*self.directory;
        moment();
        let renamed = match flags.is_empty() {
            true => renameat(directory, &self.name, directory, to),
            false => renameat_with(directory, &self.name, directory, to, flags),
        };
        Ok(renamed?)
    }
}

/// A name that is removed when this is dropped, where it is still of the same file.
#[derive(Debug)]
pub struct Removed {
    id: u64,
}

impl Removed {
    /// The name in a directory that `make` makes.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn make<T>(
        directory: &Arc<OwnedFd>,
        name: &OsStr,
        make: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<(Self, T)> {
        // Held meanwhile: there is no moment at which it is there and not in the table.
        let mut table = TABLE.lock();
        moment();
        let made = make()?;
        let id = table.next;
        table.next += 1;
        let mut name = Name {
            directory: Arc::clone(directory),
            name: name.to_owned(),
            id: None,
        };
        name.id = name.found();
        table.names.insert(id, name);
        Ok((Self { id }, made))
    }

    /// A name that is there.
    ///
    /// # Errors
    /// The host's.
    pub fn at(path: &Path) -> io::Result<Self> {
        let directory = open_directory(parent(path))?;
        let name = path.file_name().unwrap_or_default();
        Self::make(&Arc::new(directory), name, || Ok(())).map(|(removed, ())| removed)
    }

    /// Gives the file the name `to` in the same directory, which stays.
    ///
    /// # Errors
    /// The host's, such as that the name is taken, where `flags` say that it is then kept; then
    /// nothing has changed.
    pub fn rename(&self, to: &OsStr, flags: RenameFlags) -> io::Result<()> {
        let mut table = TABLE.lock();
        let Some(name) = table.names.get(&self.id) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        name.rename(to, flags)?;
        table.names.remove(&self.id);
        Ok(())
    }

    /// Gives the file another name, which is removed in place of the one it had.
    ///
    /// # Errors
    /// The host's; then nothing has changed.
    pub fn change(&self, to: &OsStr) -> io::Result<()> {
        let mut table = TABLE.lock();
        let Some(name) = table.names.get_mut(&self.id) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        name.rename(to, RenameFlags::empty())?;
        to.clone_into(&mut name.name);
        Ok(())
    }

    /// Leaves it there.
    pub fn keep(self) {
        TABLE.lock().names.remove(&self.id);
    }
}

impl Drop for Removed {
    fn drop(&mut self) {
        let name = TABLE.lock().names.remove(&self.id);
        name.iter().for_each(Name::unlink);
    }
}

/// Removes all names there are, and ends the process.
pub fn abandon(exit: Exit) -> ! {
    // Held to the end, so that no other thread makes more.
    let table = TABLE.lock();
    table.names.values().for_each(Name::unlink);
    std::process::exit(exit.code().into())
}

/// The directory that a name lies in.
pub fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// A directory, to name files in it.
///
/// # Errors
/// The host's.
pub fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(openat(CWD, path, flags, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_goes_with_its_owner_unless_it_is_given_another_one() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name: &str| dir.path().join(name);
        for name in ["gone", "kept", "old"] {
            std::fs::write(path(name), name).expect("writes");
        }
        drop(Removed::at(&path("gone")).expect("is there"));
        Removed::at(&path("kept")).expect("is there").keep();
        let renamed = Removed::at(&path("old")).expect("is there");
        renamed.change(OsStr::new("new")).expect("renames");
        let kept = OsStr::new("kept");
        let taken = renamed.rename(kept, RenameFlags::NOREPLACE);
        taken.expect_err("the name is taken");
        renamed.rename(kept, RenameFlags::empty()).expect("renames");
        drop(renamed);
        std::fs::write(path("replaced"), b"ours").expect("writes");
        let replaced = Removed::at(&path("replaced")).expect("is there");
        std::fs::write(path("other"), b"somebody else's").expect("writes");
        std::fs::rename(path("other"), path("replaced")).expect("renames");
        drop(replaced);
        let entries = std::fs::read_dir(dir.path()).expect("reads");
        let names: Vec<OsString> = entries.map(|e| e.expect("reads").file_name()).collect();
        let mut names = names;
        names.sort();
        assert_eq!(names, ["kept", "replaced"]);
        assert_eq!(std::fs::read(path("kept")).expect("reads"), b"old");
    }
}

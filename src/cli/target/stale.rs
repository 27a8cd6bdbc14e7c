//! Names of files that are being made, and the removal of those that a kill left behind.
//!
//! `.NAME.vdtool-INODE-RANDOM.tmp` lies beside `NAME`, which it is for.  Whoever makes it holds a
//! lock on it.  One that nobody holds and that is the inode of which its name speaks was left behind;
//! anything else is somebody else's.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{AtFlags, Dir, Mode, OFlags, openat, statat, unlinkat};

use crate::error::ErrorKind;
use crate::storage::lock::claim;

/// Most bytes of other names that go into one.
const MAX_NAME: usize = 160;
/// What tells these names from others.
const MARK: &[u8] = b".vdtool-";
/// Hexadecimal digits that two processes hardly have in common.
const RANDOM: usize = 8;
/// How often a name is made up that is taken.
const TRIES: usize = 64;

/// What a file under such a name is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind<'a> {
    /// Not whole yet, or about to get its name.
    Temporary,
    /// The whole new content of the name it is for, which an image meanwhile names in its place.
    Generation {
        /// The file name of that image.
        image: &'a OsStr,
        /// The inode of the directory where that is.
        home: u64,
    },
}

impl Kind<'_> {
    /// Makes up names for the file `inode` (0: not known) that is for `path`, until `f` finds one
    /// that is free.
    ///
    /// # Errors
    /// Those of `f`.
    pub(super) fn name<T>(
        self,
        path: &Path,
        inode: u64,
        mut f: impl FnMut(&OsStr) -> io::Result<T>,
    ) -> io::Result<T> {
        let prefix = self.prefix(path);
        for _ in 0..TRIES {
            // Each has keys of its own; those of a process come from the host.
            let random = RandomState::new().build_hasher().finish() >> 32;
            let mut name = prefix.clone();
            name.extend(format!("{inode:x}-{random:0RANDOM$x}").into_bytes());
            name.extend(self.suffix());
            match f(OsStr::from_bytes(&name)) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                done => return done,
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    fn prefix(self, path: &Path) -> Vec<u8> {
        let own = path.file_name().unwrap_or(OsStr::new("image")).as_bytes();
        let mut name = vec![b'.'];
        match self {
            Self::Temporary => {
                name.extend(&own[..own.len().min(MAX_NAME)]);
                name.extend(MARK);
            }
            Self::Generation { image, home } => {
                let image = image.as_bytes();
                name.extend(&own[..own.len().min(MAX_NAME / 2)]);
                name.push(b'.');
                name.extend(&image[..image.len().min(MAX_NAME / 2)]);
                name.extend(MARK);
                name.extend(format!("{home:x}-").into_bytes());
            }
        }
        name
    }

    fn suffix(self) -> &'static [u8] {
        match self {
            Self::Temporary => b".tmp",
            Self::Generation { .. } => b".data",
        }
    }

    /// The inode of which `name` speaks, where it is a name of this kind for `path`.
    fn inode(self, path: &Path, name: &[u8]) -> Option<u64> {
        let rest = name.strip_prefix(&*self.prefix(path))?;
        let rest = std::str::from_utf8(rest.strip_suffix(self.suffix())?).ok()?;
        let (inode, random) = rest.split_once('-')?;
        let is_hex = |text: &str| text.bytes().all(|b| b.is_ascii_hexdigit());
        match random.len() == RANDOM && is_hex(random) && is_hex(inode) {
            true => u64::from_str_radix(inode, 16).ok(),
            false => None,
        }
    }

    /// The names of this kind for `path` that are in `directory`; none where it cannot be read.
    pub(super) fn left(self, directory: &OwnedFd, path: &Path) -> Vec<OsString> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = openat(directory, ".", flags, Mode::empty());
        let Ok(entries) = opened.and_then(Dir::read_from) else {
            return Vec::new();
        };
        let names = entries.filter_map(|entry| Some(entry.ok()?.file_name().to_bytes().to_vec()));
        names
            .filter(|name| self.inode(path, name).is_some())
            .map(OsString::from_vec)
            .collect()
    }

    /// Removes the file `name`, found by [`Kind::left`], where nobody makes it any more.
    pub(super) fn remove(self, directory: &OwnedFd, path: &Path, name: &OsStr) {
        // It is in nobody's way: a failure is no reason not to go on.
        let _ = self.try_remove(directory, path, name);
    }

    fn try_remove(self, directory: &OwnedFd, path: &Path, name: &OsStr) -> io::Result<()> {
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let seen = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        if !rustix::fs::FileType::from_raw_mode(seen.st_mode).is_file() {
            return Ok(());
        }
        let file = File::from(openat(directory, name, flags, Mode::empty())?);
        let found = file.metadata()?;
        let spoken_of = match self.inode(path, name.as_bytes()) {
            // A kill found it before it was written to.
            Some(0) => found.len() == 0,
            inode => inode == Some(found.ino()),
        };
        if spoken_of && found.is_file() && claim(file.as_fd()).is_ok() {
            let now = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
            if (now.st_dev, now.st_ino) == (found.dev(), found.ino()) {
                unlinkat(directory, name, AtFlags::empty())?;
            }
        }
        Ok(())
    }
}

/// Whether the file is ours now; also where the file system has no locks.
///
/// # Errors
/// The host's.
pub(super) fn claimed(file: &File) -> io::Result<bool> {
    match claim(file.as_fd()) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == ErrorKind::Unsupported => Ok(true),
        Err(e) if e.kind() == ErrorKind::Locked => Ok(false),
        Err(e) => Err(io::Error::from_raw_os_error(e.errno())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::removed::open_directory;
    use crate::cli::target::listed::names;

    /// Makes a file that is called as one on its way to `for_path`, with `inode` in its name
    /// (`None`: its own) and `bytes` in it.
    fn left(kind: Kind<'_>, for_path: &Path, inode: Option<u64>, bytes: &[u8]) -> String {
        let plain = for_path.with_file_name("plain");
        std::fs::write(&plain, bytes).expect("writes");
        let inode = inode.unwrap_or_else(|| std::fs::metadata(&plain).expect("is there").ino());
        let named = kind.name(for_path, inode, |name| {
            std::fs::rename(&plain, for_path.with_file_name(name))?;
            Ok(name.to_string_lossy().into_owned())
        });
        named.expect("renames")
    }

    /// What is left in a directory once leftovers for `path` are removed.
    fn swept(kind: Kind<'_>, path: &Path) -> Vec<String> {
        let dir = path.parent().expect("has one");
        let directory = open_directory(dir).expect("opens");
        for name in kind.left(&directory, path) {
            kind.remove(&directory, path, &name);
        }
        names(dir)
    }

    #[test]
    fn only_what_was_left_behind_for_this_name_is_removed() {
        let generation = Kind::Generation {
            image: OsStr::new("a.qcow2"),
            home: 0x77,
        };
        for kind in [Kind::Temporary, generation] {
            let dir = tempfile::tempdir().expect("a directory");
            let path = dir.path().join("a.raw");
            left(kind, &path, None, b"half");
            left(kind, &path, Some(0), b"");
            let mut stay = vec![
                // Copied, or written to by somebody else.
                left(kind, &path, Some(1), b"half"),
                left(kind, &path, Some(0), b"half"),
                left(kind, &dir.path().join("b.raw"), None, b"half"),
                left(kind, &dir.path().join("a.raw.vdtool-1"), None, b"half"),
                "a.raw".to_owned(),
                ".a.raw.vdtool-1-0123456.tmp".to_owned(),
                ".a.raw.vdtool-1-01234567.tmp.old".to_owned(),
                ".a.raw.abcdef.tmp".to_owned(),
            ];
            stay.iter().skip(4).for_each(|name| {
                std::fs::write(dir.path().join(name), b"mine").expect("writes");
            });
            let held = left(kind, &path, None, b"half");
            let holder = File::options();
            let holder = { holder }
                .read(true)
                .write(true)
                .open(dir.path().join(&held));
            let holder = holder.expect("opens");
            assert!(claimed(&holder).expect("locks"));
            stay.push(held);
            stay.sort();
            assert_eq!(swept(kind, &path), stay);
            drop(holder);
            assert_eq!(swept(kind, &path).len(), stay.len() - 1);
        }
    }

    #[test]
    fn what_only_looks_like_a_leftover_is_left_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("a.raw");
        let target = dir.path().join("precious");
        std::fs::write(&target, b"mine").expect("writes");
        let inode = std::fs::metadata(&target).expect("is there").ino();
        let link = Kind::Temporary.name(&path, inode, |name| {
            std::os::unix::fs::symlink("precious", dir.path().join(name))?;
            Ok(name.to_string_lossy().into_owned())
        });
        let folder = Kind::Temporary.name(&path, 0, |name| {
            std::fs::create_dir(dir.path().join(name))?;
            Ok(name.to_string_lossy().into_owned())
        });
        let mut stay = [
            link.expect("links"),
            folder.expect("makes"),
            "precious".to_owned(),
        ];
        stay.sort();
        assert_eq!(swept(Kind::Temporary, &path), stay);
    }

    #[test]
    fn names_fit_whatever_the_names_they_are_made_of() {
        let long = "x".repeat(255);
        let generation = Kind::Generation {
            image: OsStr::new(&long),
            home: u64::MAX,
        };
        for kind in [Kind::Temporary, generation] {
            let made = kind.name(Path::new(&long), u64::MAX, |name| Ok(name.to_owned()));
            let made = made.expect("is made up");
            assert!(made.len() <= 255, "{}", made.len());
            let found = kind.inode(Path::new(&long), made.as_bytes());
            assert_eq!(found, Some(u64::MAX));
        }
    }
}

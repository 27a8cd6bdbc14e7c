//! The directory of an image, held open.
//!
//! Whoever may rename things can put another directory in the place of an image's own after it was
//! looked at.  So it is opened, the image is looked up in it, and from then on every name is looked
//! up in what is open, whatever becomes of the directory's own name.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, openat, openat2, statat,
};
use rustix::io::Errno;

use crate::error::{Error, ErrorKind, Result};
use crate::nbd::uri::is_uri;
use crate::storage::HostId;
use crate::storage::open::{Access, open_file_at};

/// Most times that something is done again because somebody renamed something meanwhile.
const TRIES: usize = 16;

/// The directory that an image is in, or a new one is to be in.
#[derive(Debug)]
pub struct Home {
    directory: OwnedFd,
    /// Where it is, without symbolic links.
    real: PathBuf,
    /// The same for messages: as the user wrote it, where that is the same.
    shown: PathBuf,
}

impl Home {
    /// The directory of the image `id`, which was opened at `path`.
    ///
    /// # Errors
    /// `Io` where `path` leads to something else by now; the host's.
    pub(in crate::chain) fn of(id: HostId, path: &Path) -> Result<Self> {
        let mut last = Error::new(ErrorKind::Io, "was replaced while it was open");
        for _ in 0..TRIES {
            match Self::holding(id, path) {
                Ok(Some(home)) => return Ok(home),
                Ok(None) => {}
                Err(e) => last = Error::io("find the directory of the image", e),
            }
        }
        Err(last.at(path))
    }

    /// The directory that `path` leads to now; `None` where the image there is another.
    fn holding(id: HostId, path: &Path) -> std::io::Result<Option<Self>> {
        let real = std::fs::canonicalize(path)?;
        let linked = std::fs::symlink_metadata(path)?.is_symlink();
        let parent = |p: &Path| p.parent().unwrap_or(Path::new("/")).to_owned();
        let home = Self::open_directory(parent(&real))?;
        let name = real.file_name().unwrap_or_default();
        let found = statat(&home.directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        Ok((HostId::of_stat(&found) == id).then(|| match linked {
            true => home,
            false => Self {
                shown: parent(path),
                ..home
            },
        }))
    }

    /// The directory of a file at `path` that need not be there; of what a server has, the one that
    /// the process is in.
    ///
    /// # Errors
    /// The host's.
    pub fn of_new(path: &Path) -> Result<Self> {
        let parent = match path.parent() {
            Some(parent) if !is_uri(path) && !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let opened = std::fs::canonicalize(parent).and_then(Self::open_directory);
        opened.map_err(|e| Error::io("open the directory", e).at(parent))
    }

    fn open_directory(real: PathBuf) -> std::io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            directory: openat(CWD, &real, flags, Mode::empty())?,
            shown: real.clone(),
            real,
        })
    }

    /// The directory at `path`, which the user named.
    pub(in crate::chain) fn at(path: &Path) -> std::io::Result<Self> {
        let home = Self::open_directory(std::fs::canonicalize(path)?)?;
        Ok(Self {
            shown: path.to_owned(),
            ..home
        })
    }

    /// The directory that it is in.
    pub(super) fn above(&self) -> std::io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = openat(&self.directory, "..", flags, Mode::empty())?;
        let real = self.real.parent().unwrap_or(&self.real).to_owned();
        Ok(Self {
            directory,
            shown: real.clone(),
            real,
        })
    }

    /// The directory called `name` in it, which is no symbolic link to elsewhere.
    pub(super) fn within(&self, name: &str) -> rustix::io::Result<Self> {
        Ok(Self {
            directory: self.beneath(Path::new(name), OFlags::PATH | OFlags::DIRECTORY)?,
            real: self.real.join(name),
            shown: self.shown.join(name),
        })
    }

    /// Which directory it is.
    pub(super) fn id(&self) -> Option<HostId> {
        HostId::of_fd(&self.directory)
    }

    /// The names in it, `most` of them at most, of what may be a file; in no order.
    pub(in crate::chain) fn names(&self, most: usize) -> rustix::io::Result<Vec<OsString>> {
        let listed = self.beneath(Path::new("."), OFlags::RDONLY | OFlags::DIRECTORY)?;
        let entries = Dir::read_from(listed)?.filter_map(|entry| entry.ok());
        let may_be_file =
            |kind: FileType| kind.is_file() || kind.is_symlink() || kind == FileType::Unknown;
        let files = entries.filter(|entry| may_be_file(entry.file_type()));
        let names = files.map(|f| OsStr::from_bytes(f.file_name().to_bytes()).to_owned());
        Ok(names.take(most).collect())
    }

    /// Where it is, without symbolic links.
    pub fn path(&self) -> &Path {
        &self.real
    }

    /// What messages call the file called `name`.
    pub(in crate::chain) fn shown(&self, name: &OsStr) -> PathBuf {
        self.shown.join(name)
    }

    /// What messages call the directory.
    pub(super) fn shown_itself(&self) -> PathBuf {
        match self.shown.as_os_str().is_empty() {
            true => ".".into(),
            false => self.shown.clone(),
        }
    }

    /// What `name` leads to from here, through symbolic links.
    pub(super) fn leads_to(&self, name: &OsStr) -> rustix::io::Result<HostId> {
        statat(&self.directory, name, AtFlags::empty()).map(|stat| HostId::of_stat(&stat))
    }

    /// Opens what a name that the user gave leads to from here; messages call it `shown`.
    ///
    /// # Errors
    /// Those of [`crate::storage::open::open_file`].
    pub(in crate::chain) fn open(
        &self,
        name: &OsStr,
        shown: &Path,
        access: Access,
    ) -> Result<File> {
        open_file_at(&self.directory, Path::new(name), shown, access)
    }

    /// The way from here to the file called `name`; `None` where it is an absolute name that leads
    /// elsewhere.
    pub(super) fn way<'a>(&self, name: &'a OsStr) -> Option<&'a Path> {
        let name = Path::new(name);
        if !name.is_absolute() {
            return Some(name);
        }
        let way = name
            .strip_prefix(&self.real)
            .or_else(|_| name.strip_prefix(&self.shown));
        way.ok()
            .filter(|_| self.shown.is_absolute() || name.starts_with(&self.real))
    }

    /// Opens the file at `way` below it, and nothing that is elsewhere.
    pub(super) fn beneath(&self, way: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let flags = flags | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        for _ in 0..TRIES {
            match openat2(&self.directory, way, flags, Mode::empty(), resolve) {
                // Somebody renamed something on the way; the kernel asks to try again.
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(Errno::NOSYS) => return beneath_by_hand(&self.directory, way, flags),
                opened => return opened,
            }
        }
        Err(Errno::AGAIN)
    }
}

/// The same for kernels before 5.6: component by component, and no symbolic links at all.
pub(super) fn beneath_by_hand(
    directory: &OwnedFd,
    way: &Path,
    flags: OFlags,
) -> rustix::io::Result<OwnedFd> {
    let mut names: Vec<OsString> = Vec::new();
    for component in way.components() {
        match component {
            Component::Normal(name) => names.push(name.to_owned()),
            Component::CurDir => {}
            _ => return Err(Errno::XDEV),
        }
    }
    let last = names.pop().ok_or(Errno::ISDIR)?;
    let step = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut at = directory
        .as_fd()
        .try_clone_to_owned()
        .map_err(|_| Errno::MFILE)?;
    for name in names {
        at = openat(&at, name, step, Mode::empty())?;
    }
    let file = openat(&at, last, flags | OFlags::NOFOLLOW, Mode::empty())?;
    // With O_PATH a link is opened itself.
    match rustix::fs::fstat(&file) {
        Ok(stat) if rustix::fs::FileType::from_raw_mode(stat.st_mode).is_symlink() => {
            Err(Errno::LOOP)
        }
        _ => Ok(file),
    }
}

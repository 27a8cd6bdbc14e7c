//! The policy for files that an image names: its backing file, and other files it is made of.
//!
//! A header is not to be trusted: a guest may have written it.  What it names is opened from the
//! image's own directory and below, as the kernel resolves it (no way up, no magic links), and
//! only where it is a regular file or a block device.  The user widens that by naming files.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::io::Errno;

use crate::chain::open::References;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::open::Companions;
use crate::nbd::uri::is_uri;
use crate::storage::Storage;
use crate::storage::open::{Access, StorageOptions, adopt, check_kind, open_file, open_uri};
use crate::util::text::printable;

/// What a file is, whatever it is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    /// That of an open file.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn of_file(file: &File) -> Result<Self> {
        let metadata = file.metadata();
        metadata
            .map(|m| Self::of(&m))
            .map_err(|e| Error::io("look at the file", e))
    }

    fn of(metadata: &std::fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }
}

/// How far an image's names are to be believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trust {
    /// The user, or an image that is trusted so far, said what format it is of.
    Stated,
    /// It or an image above it was probed, so that a guest may have made it look like an image:
    /// only files of its own owner are opened.
    Probed,
    /// It is a backing file that was probed itself: nothing that it names is opened.
    None,
}

/// An open image, as the one that names other files.
#[derive(Debug, Clone)]
pub(super) struct Namer {
    /// As messages show it; the URI of one that a server has.
    pub(super) path: PathBuf,
    /// How far its names are believed.
    pub(super) trust: Trust,
    /// Which file it is; `None`: a server has it.
    pub(super) id: Option<FileId>,
    owner: u32,
}

/// The directory of an image, for the names in it.
struct Place {
    /// Where the file really is, symbolic links resolved.
    directory: PathBuf,
    /// The same for messages: as the user wrote it, where that is the same.
    shown: PathBuf,
}

/// What an image names.
#[derive(Debug)]
pub(super) enum Found {
    /// A file or a device.
    File { file: File, path: PathBuf },
    /// What a server has.
    Remote { uri: PathBuf },
}

impl Namer {
    /// For an image that was opened as `file` at `path`.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn new(file: &File, path: &Path, trust: Trust) -> Result<Self> {
        let metadata = file.metadata();
        let metadata = metadata.map_err(|e| Error::io("look at the file", e).at(path))?;
        Ok(Self {
            path: path.to_owned(),
            trust,
            id: Some(FileId::of(&metadata)),
            owner: metadata.uid(),
        })
    }

    /// For an image that a server has.
    pub(super) fn remote(uri: &Path, trust: Trust) -> Self {
        Self {
            path: uri.to_owned(),
            trust,
            id: None,
            owner: 0,
        }
    }

    fn place(&self) -> Result<Place> {
        let path = &self.path;
        let look = |e| Error::io("find the directory of the image", e).at(path);
        let real = std::fs::canonicalize(path).map_err(look)?;
        if Some(FileId::of(&std::fs::metadata(&real).map_err(look)?)) != self.id {
            return Err(Error::new(ErrorKind::Io, "was replaced while it was open").at(path));
        }
        let linked = std::fs::symlink_metadata(path).map_err(look)?.is_symlink();
        let parent = |p: &Path| p.parent().unwrap_or(Path::new("/")).to_owned();
        let directory = parent(&real);
        Ok(Place {
            shown: if linked {
                directory.clone()
            } else {
                parent(path)
            },
            directory,
        })
    }

    /// Opens the file that the image calls `name`, if the policy allows it; `what` says in
    /// messages what it is.
    ///
    /// # Errors
    /// `NotFound` where it is not there; `Denied` where it may not be opened; `Invalid` where it
    /// is neither a file nor a block device; the host's.
    pub(super) fn open(
        &self,
        name: &str,
        what: &str,
        access: Access,
        references: &References,
        remotes: &[String],
    ) -> Result<Found> {
        if self.trust == Trust::None {
            return Err(self.denied(
                name,
                what,
                "but its own format was guessed, so that is not opened (--backing-format says it)",
            ));
        }
        if is_uri(Path::new(name)) {
            return self.open_remote(name, what, remotes);
        }
        if self.id.is_none() {
            return self.open_from_remote(name, what, access, references);
        }
        let place = self.place()?;
        let path = place.shown.join(name);
        let file = match references {
            References::Any => open_file(&path, access)?,
            References::Confined { allowed } => match place.listed(name, allowed) {
                Some(listed) => open_file(listed, access)?,
                None => self.open_confined(&place, name, what, access)?,
            },
        };
        Ok(Found::File { file, path })
    }

    /// A URI in an image is followed only where the user named that very URI: a server is asked
    /// things, and may be anywhere.
    fn open_remote(&self, name: &str, what: &str, remotes: &[String]) -> Result<Found> {
        match remotes.iter().any(|allowed| allowed == name) {
            true => Ok(Found::Remote { uri: name.into() }),
            false => {
                let why = format!(
                    "and servers are asked only where the user names them (--allow-ref '{}' \
                     allows it)",
                    printable(name)
                );
                Err(self.denied(name, what, &why))
            }
        }
    }

    /// An image that a server has lies in no directory of this host.
    fn open_from_remote(
        &self,
        name: &str,
        what: &str,
        access: Access,
        references: &References,
    ) -> Result<Found> {
        let path = Path::new(name);
        let listed = match references {
            References::Any => true,
            References::Confined { allowed } => allowed.iter().any(|a| a == path),
        };
        if !path.is_absolute() || !listed {
            let why = "while the image itself is at a server (allowed: an absolute name that \
                       --allow-ref names too)";
            return Err(self.denied(name, what, why));
        }
        Ok(Found::File {
            file: open_file(path, access)?,
            path: path.to_owned(),
        })
    }

    fn open_confined(&self, place: &Place, name: &str, what: &str, access: Access) -> Result<File> {
        let path = &place.shown.join(name);
        let hint = |why: &str| format!("{why} (--allow-ref {} allows it)", printable_path(path));
        let outside = || self.denied(name, what, &hint("which is not in its directory or below"));
        let way = place.way(name).ok_or_else(outside)?;
        let resolved = |e: Errno| match e {
            Errno::XDEV | Errno::LOOP => outside(),
            e => Error::io("open", e.into()).at(path),
        };
        let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory =
            openat(CWD, &place.directory, directory, Mode::empty()).map_err(resolved)?;
        // A look first, because opening some devices does things.
        let seen = File::from(beneath(&directory, way, OFlags::PATH).map_err(resolved)?);
        let seen = seen.metadata();
        let seen = seen.map_err(|e| Error::io("look at the file", e).at(path))?;
        check_kind(seen.file_type()).at(path)?;
        if self.trust == Trust::Probed && seen.uid() != self.owner {
            let why = "which belongs to another user, while the format of the image that names \
                       it was guessed";
            return Err(self.denied(name, what, &hint(why)));
        }
        let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
        let flags = match access {
            Access::Read => flags | OFlags::RDONLY,
            Access::Write => flags | OFlags::RDWR,
        };
        let file = File::from(beneath(&directory, way, flags).map_err(resolved)?);
        match file.metadata() {
            Ok(now) if FileId::of(&now) == FileId::of(&seen) => Ok(file),
            Ok(_) => Err(Error::new(ErrorKind::Io, "was replaced while it was opened").at(path)),
            Err(e) => Err(Error::io("look at the file", e).at(path)),
        }
    }

    fn denied(&self, name: &str, what: &str, why: &str) -> Error {
        let text = format!("names '{}' as its {what}, {why}", printable(name));
        Error::new(ErrorKind::Denied, text).at(&self.path)
    }
}

impl Place {
    /// The entry of the user's list that is the file called `name`.
    fn listed<'a>(&self, name: &str, allowed: &'a [PathBuf]) -> Option<&'a Path> {
        if allowed.is_empty() {
            return None;
        }
        let id = |path: &Path| std::fs::metadata(path).map(|m| FileId::of(&m)).ok();
        let wanted = id(&self.directory.join(name))?;
        let listed = allowed.iter().find(|path| id(path) == Some(wanted));
        listed.map(PathBuf::as_path)
    }

    /// The way from the image's directory to the file called `name`; `None` where it is an
    /// absolute name that leads elsewhere.
    fn way<'a>(&self, name: &'a str) -> Option<&'a Path> {
        let name = Path::new(name);
        if !name.is_absolute() {
            return Some(name);
        }
        let way = name
            .strip_prefix(&self.directory)
            .or_else(|_| name.strip_prefix(&self.shown));
        way.ok()
            .filter(|_| self.shown.is_absolute() || name.starts_with(&self.directory))
    }
}

fn printable_path(path: &Path) -> String {
    printable(&path.to_string_lossy())
}

/// Opens the file at `way` below `directory`, and nothing that is elsewhere.
fn beneath(directory: &OwnedFd, way: &Path, flags: OFlags) -> std::result::Result<OwnedFd, Errno> {
    const TRIES: usize = 16;
    let flags = flags | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    for _ in 0..TRIES {
        match openat2(directory, way, flags, Mode::empty(), resolve) {
            // Somebody renamed something on the way; the kernel asks to try again.
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(Errno::NOSYS) => return beneath_by_hand(directory, way, flags),
            opened => return opened,
        }
    }
    Err(Errno::AGAIN)
}

/// The same for kernels before 5.6: component by component, and no symbolic links at all.
fn beneath_by_hand(
    directory: &OwnedFd,
    way: &Path,
    flags: OFlags,
) -> std::result::Result<OwnedFd, Errno> {
    let mut names: Vec<&OsStr> = Vec::new();
    for component in way.components() {
        match component {
            Component::Normal(name) => names.push(name),
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

/// Opens further files of one image, by the policy for the files it names.
#[derive(Debug)]
pub(super) struct Confined {
    pub(super) namer: Namer,
    pub(super) references: References,
    pub(super) remotes: Vec<String>,
    pub(super) storage: StorageOptions,
    /// Opened in place of what the image names.
    pub(super) stand_in: Option<PathBuf>,
}

impl Companions for Confined {
    fn open(&self, name: &str, what: &str) -> Result<Arc<dyn Storage>> {
        if let Some(path) = &self.stand_in {
            return crate::storage::open::open(path, &self.storage);
        }
        let access = self.storage.access;
        let found = self
            .namer
            .open(name, what, access, &self.references, &self.remotes)?;
        let itself = || {
            let text = format!("names itself as its {what}");
            Err(Error::corrupt(text).at(&self.namer.path))
        };
        match found {
            Found::Remote { uri } if uri == self.namer.path => itself(),
            Found::Remote { uri } => open_uri(&uri, &self.storage),
            Found::File { file, path } => {
                if Some(FileId::of_file(&file).at(&path)?) == self.namer.id {
                    return itself();
                }
                adopt(file, &path, &self.storage)
            }
        }
    }
}

#[cfg(test)]
mod tests;

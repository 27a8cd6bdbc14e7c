//! The policy for files that an image names: its backing file, and other files it is made of.
//!
//! A header is not to be trusted: a guest may have written it.  What it names is opened from the
//! image's own directory and below, as the kernel resolves it (no way up, no magic links), and
//! only where it is a regular file or a block device.  The user widens that by naming files.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::chain::open::{References, shared};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::open::Companions;
use crate::nbd::uri::is_uri;
use crate::storage::open::{Access, StorageOptions, adopt, check_kind, open_file, open_uri};
use crate::storage::{HostId, Storage};
use crate::util::text::printable;

mod home;
pub(in crate::chain) mod search;

pub use home::Home;

/// What helps where an image is not believed because its own format was guessed.
const SAYS_IT: &str = "(--backing-format says it)";

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
    pub(super) id: Option<HostId>,
    owner: u32,
    /// Its directory, from when it is first needed.
    home: Arc<OnceLock<Arc<Home>>>,
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
            id: Some(HostId::of(&metadata)),
            owner: metadata.uid(),
            home: Arc::default(),
        })
    }

    /// For an image that a server has.
    pub(super) fn remote(uri: &Path, trust: Trust) -> Self {
        Self {
            path: uri.to_owned(),
            trust,
            id: None,
            owner: 0,
            home: Arc::default(),
        }
    }

    /// The directory that holds the image `id`, for all names in it.
    fn home(&self, id: HostId) -> Result<&Arc<Home>> {
        if let Some(home) = self.home.get() {
            return Ok(home);
        }
        let home = Arc::new(Home::of(id, &self.path)?);
        Ok(self.home.get_or_init(|| home))
    }

    /// Gives up the directory: the image names nothing more.
    pub(super) fn leave(&mut self) {
        self.home = Arc::default();
    }

    /// The error of opening what the image calls `name` in its `field`, saying that it does.
    pub(super) fn blamed(&self, error: Error, name: &OsStr, what: &str, field: &str) -> Error {
        match error.path() == Some(&self.path) {
            true => error,
            false => error.noted(format_args!(
                "the {what} of {}, named '{}' in its {field}",
                printable(&self.path),
                printable(name)
            )),
        }
    }

    /// Opens the file that the image calls `name`, if the policy allows it; `what` says in
    /// messages what it is.
    ///
    /// # Errors
    /// `NotFound` where it is not there; `Denied` where it may not be opened; `Invalid` where it
    /// is neither a file nor a block device; the host's.
    pub(super) fn open(
        &self,
        name: &OsStr,
        what: &str,
        access: Access,
        references: &References,
        remotes: &[String],
    ) -> Result<Found> {
        if self.trust == Trust::None {
            let why = format!("but its own format was guessed, so that is not opened {SAYS_IT}");
            return Err(self.denied(name, what, &why));
        }
        if is_uri(Path::new(name)) {
            return self.open_remote(name, what, remotes);
        }
        let Some(id) = self.id else {
            return self.open_from_remote(name, what, access, references);
        };
        let home = self.home(id)?;
        let path = home.shown(name);
        let file = match references {
            References::Any { .. } => home.open(name, &path, access)?,
            References::Confined { allowed } => match listed(home, name, allowed) {
                Some((listed, id)) => open_listed(listed, id, access)?,
                None => self.open_confined(home, name, what, access)?,
            },
        };
        Ok(Found::File { file, path })
    }

    /// A URI in an image is followed only where the user named that very URI: a server is asked
    /// things, and may be anywhere.
    fn open_remote(&self, name: &OsStr, what: &str, remotes: &[String]) -> Result<Found> {
        match remotes.iter().any(|allowed| **allowed == *name) {
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
        name: &OsStr,
        what: &str,
        access: Access,
        references: &References,
    ) -> Result<Found> {
        let path = Path::new(name);
        let listed = match references {
            References::Any { .. } => true,
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

    fn open_confined(&self, home: &Home, name: &OsStr, what: &str, access: Access) -> Result<File> {
        let path = &home.shown(name);
        let hint = |why: &str| format!("{why} (--allow-ref '{}' allows it)", printable(path));
        let outside = || match home.leads_to(name) {
            // No advice to allow what is not there.
            Err(e @ (Errno::NOENT | Errno::NOTDIR)) => Error::io("open", e.into()).at(path),
            _ => self.denied(name, what, &hint("which is not in its directory or below")),
        };
        let way = home.way(name).ok_or_else(outside)?;
        let resolved = |e: Errno| match e {
            Errno::XDEV | Errno::LOOP => outside(),
            e => Error::io("open", e.into()).at(path),
        };
        // A look first, because opening some devices does things.
        let seen = File::from(home.beneath(way, OFlags::PATH).map_err(resolved)?);
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
        let file = File::from(home.beneath(way, flags).map_err(resolved)?);
        match HostId::of_fd(&file) == Some(HostId::of(&seen)) {
            true => Ok(file),
            false => Err(replaced(path)),
        }
    }

    fn denied(&self, name: &OsStr, what: &str, why: &str) -> Error {
        let text = format!("names '{}' as its {what}, {why}", printable(name));
        Error::new(ErrorKind::Denied, text).at(&self.path)
    }
}

/// Most names of a directory that are looked at for one that differs in case.
const MAX_NAMES: usize = 1 << 16;

/// Whether two names are the same but for case; what is no text is so for ASCII alone.
fn is_same_word(one: &OsStr, other: &OsStr) -> bool {
    match (one.to_str(), other.to_str()) {
        (Some(one), Some(other)) => one.to_lowercase() == other.to_lowercase(),
        _ => one.eq_ignore_ascii_case(other),
    }
}

fn replaced(path: &Path) -> Error {
    Error::new(ErrorKind::Io, "was replaced while it was opened").at(path)
}

/// The entry of the user's list that is the file called `name`, and which file that is.
fn listed<'a>(home: &Home, name: &OsStr, allowed: &'a [PathBuf]) -> Option<(&'a Path, HostId)> {
    if allowed.is_empty() {
        return None;
    }
    let wanted = home.leads_to(name).ok()?;
    let mut allowed = allowed.iter();
    let listed = allowed.find(|path| HostId::named(path) == Some(wanted))?;
    Some((listed, wanted))
}

/// Opens what the user listed, and no other file that has its name by now.
fn open_listed(path: &Path, id: HostId, access: Access) -> Result<File> {
    let file = open_file(path, access)?;
    match HostId::of_fd(&file) == Some(id) {
        true => Ok(file),
        false => Err(replaced(path)),
    }
}

/// Opens further files of one image, by the policy for the files it names.
#[derive(Debug)]
pub(super) struct Confined {
    pub(super) namer: Namer,
    pub(super) references: References,
    pub(super) remotes: Vec<String>,
    pub(super) storage: StorageOptions,
    /// Files whose locks this process has already.
    pub(super) ours: Vec<HostId>,
    /// Names that the image has for files, and what is opened in their place.
    pub(super) stand_ins: Vec<(OsString, PathBuf)>,
}

impl Companions for Confined {
    fn open(&self, name: &OsStr, what: &str) -> Result<Arc<dyn Storage>> {
        self.open_among(name, what, &[])
    }

    fn open_in_any_case(
        &self,
        name: &OsStr,
        what: &str,
        opened: &[Arc<dyn Storage>],
    ) -> Result<Arc<dyn Storage>> {
        match self.open_among(name, what, opened) {
            Err(e) if e.kind() == ErrorKind::NotFound => match self.alike(name, what)? {
                Some(other) => self.open_among(&other, what, opened),
                None => Err(e),
            },
            opened => opened,
        }
    }
}

impl Confined {
    /// Opens what the image calls `name`, unless it is among `opened`.
    fn open_among(
        &self,
        name: &OsStr,
        what: &str,
        opened: &[Arc<dyn Storage>],
    ) -> Result<Arc<dyn Storage>> {
        if let Some((_, path)) = self.stand_ins.iter().find(|(called, _)| called == name) {
            return crate::storage::open::open(path, &self.storage);
        }
        self.follow(name, what, opened).map_err(|e| match e.kind() {
            ErrorKind::NotFound if !is_uri(Path::new(name)) => {
                let text = format!(
                    "names '{}' as its {what}, which is not there",
                    printable(name)
                );
                Error::new(ErrorKind::NotFound, text).at(&self.namer.path)
            }
            _ => self.namer.blamed(e, name, what, "header"),
        })
    }

    /// The only name in the image's directory that differs from `name` in case alone.
    fn alike(&self, name: &OsStr, what: &str) -> Result<Option<OsString>> {
        let Some(id) = self.namer.id else {
            return Ok(None);
        };
        let home = self.namer.home(id)?;
        let names = home.names(MAX_NAMES);
        let names = names.map_err(|e| Error::io("list the directory of the image", e.into()))?;
        let mut names = names.into_iter().filter(|other| is_same_word(name, other));
        match (names.next(), names.next()) {
            (one, None) => Ok(one),
            (None, _) => Ok(None),
            (Some(one), Some(other)) => Err(Error::invalid(format!(
                "names '{}' as its {what}, which is not there, while '{}' and '{}' differ from it \
                 in case alone",
                printable(name),
                printable(&one),
                printable(&other)
            ))
            .at(&self.namer.path)),
        }
    }

    fn follow(
        &self,
        name: &OsStr,
        what: &str,
        opened: &[Arc<dyn Storage>],
    ) -> Result<Arc<dyn Storage>> {
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
                let id = HostId::of_fd(&file);
                if id == self.namer.id {
                    return itself();
                }
                let is_it = |other: &&Arc<dyn Storage>| id.is_some() && other.host_id() == id;
                match opened.iter().find(is_it) {
                    Some(same) => Ok(Arc::clone(same)),
                    None => adopt(file, &path, &shared(&self.storage, id, &self.ours)),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;

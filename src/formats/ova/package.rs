//! A package: a descriptor, a manifest and files, in one archive or side by side.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::sync::Arc;

use crate::container::tar::{self, Kind, Member};
use crate::error::{Error, ErrorKind, Result};
use crate::formats::ova::descriptor::{self, Envelope, name_of};
use crate::formats::ova::manifest::{self, Manifest};
use crate::image::open::{Companions, OpenOptions};
use crate::storage::Storage;
use crate::storage::window::{Window, all_bytes};
use crate::util::text::printable;

/// An open package.
#[derive(Debug)]
pub(super) struct Package {
    pub(super) envelope: Envelope,
    /// Name of the descriptor, where it has one, and its bytes.
    pub(super) descriptor: (OsString, Arc<dyn Storage>),
    pub(super) seal: Seal,
    /// Whether there is a certificate: it is not verified.
    pub(super) certificate: bool,
    place: Place,
}

/// The manifest, as it was found.
#[derive(Debug)]
pub(super) enum Seal {
    /// There is none.
    None,
    /// It was not looked for: no file beside the descriptor is to be opened.
    Unknown,
    /// It is there, and no manifest.
    Damaged(Error),
    /// It is there.
    Manifest(Manifest),
}

/// Where the files of a package are.
#[derive(Debug)]
enum Place {
    Archive {
        storage: Arc<dyn Storage>,
        members: Vec<Member>,
        /// What the names of files begin with: the directory of the descriptor.
        folder: Vec<u8>,
    },
    Beside(Option<Arc<dyn Companions>>),
}

impl Package {
    /// Opens the archive in `storage`.
    ///
    /// # Errors
    /// Those of [`tar::members`] and [`Envelope::parse`]; `WrongFormat` where there is no descriptor
    /// or more than one.
    pub(super) fn archive(storage: Arc<dyn Storage>) -> Result<Self> {
        let members = tar::members(&*storage)?;
        let descriptor = descriptor_of(&members)?;
        let name = descriptor.name.clone();
        let slash = name.as_bytes().iter().rposition(|b| *b == b'/');
        let folder = name.as_bytes()[..slash.map_or(0, |at| at + 1)].to_vec();
        let text = open_member(&storage, descriptor)?;
        let envelope = parse(&*text)?;
        let mut package = Self {
            envelope,
            descriptor: (last(&name).to_owned(), text),
            seal: Seal::None,
            certificate: false,
            place: Place::Archive {
                storage,
                members,
                folder,
            },
        };
        package.find_manifest()?;
        Ok(package)
    }

    /// Opens the descriptor in `storage`, with files beside it.
    ///
    /// # Errors
    /// Those of [`Envelope::parse`] and of [`Companions::open`].
    pub(super) fn beside(storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<Self> {
        let envelope = parse(&*storage)?;
        let name = storage.path().and_then(Path::file_name);
        let name = name.unwrap_or_default().to_owned();
        let mut package = Self {
            envelope,
            descriptor: (name, storage),
            seal: Seal::Unknown,
            certificate: false,
            place: Place::Beside(options.companions.clone()),
        };
        if options.companions.is_some() {
            package.find_manifest()?;
        }
        Ok(package)
    }

    /// Names of all files of the package, as far as they are known.
    pub(super) fn members(&self) -> &[Member] {
        match &self.place {
            Place::Archive { members, .. } => members,
            Place::Beside(_) => &[],
        }
    }

    /// Whether files may be opened.
    pub(super) fn is_open(&self) -> bool {
        !matches!(&self.place, Place::Beside(None))
    }

    /// The object that holds the archive, or the descriptor.
    pub(super) fn storage(&self) -> &Arc<dyn Storage> {
        match &self.place {
            Place::Archive { storage, .. } => storage,
            Place::Beside(_) => &self.descriptor.1,
        }
    }

    /// The directory of the descriptor in an archive, with its slash.
    pub(super) fn folder(&self) -> &[u8] {
        match &self.place {
            Place::Archive { folder, .. } => folder,
            Place::Beside(_) => &[],
        }
    }

    /// Opens the file that the descriptor calls `name`.
    ///
    /// # Errors
    /// `NotFound` where it is not there; `Unsupported` for what is no plain file; those of
    /// [`Companions::open`].
    pub(super) fn open(&self, name: &OsStr, what: &str) -> Result<Arc<dyn Storage>> {
        match &self.place {
            Place::Archive {
                storage,
                members,
                folder,
            } => {
                let whole = OsString::from_vec([folder, name.as_bytes()].concat());
                let member = members.iter().find(|member| member.name == whole);
                let member = member.ok_or_else(|| {
                    let text = format!("has no '{}' in it, its {what}", printable(&whole));
                    Error::new(ErrorKind::NotFound, text).at_opt(storage.path())
                })?;
                open_member(storage, member)
            }
            Place::Beside(Some(companions)) => companions.open(name, what),
            Place::Beside(None) => Err(Error::new(
                ErrorKind::NotFound,
                format!("its {what} '{}' was not opened", printable(name)),
            )),
        }
    }

    /// The name of the file at `place` among those that the descriptor refers to.
    ///
    /// # Errors
    /// Those of [`name_of`].
    pub(super) fn file_name(&self, place: usize) -> Result<OsString> {
        let file = self.envelope.files.get(place);
        name_of(file.map_or("", |file| &*file.href))
    }

    fn find_manifest(&mut self) -> Result<()> {
        let stem = Path::new(&self.descriptor.0).file_stem();
        let stem = stem.unwrap_or_default().to_owned();
        let named = |extension: &str| {
            let mut name = stem.clone();
            name.push(extension);
            name
        };
        self.certificate = match &self.place {
            Place::Archive { .. } => {
                let mut certificates = self.members().iter();
                certificates.any(|m| has_extension(&m.name, "cert"))
            }
            Place::Beside(_) => self.open(&named(".cert"), "certificate").is_ok(),
        };
        let opened = match &self.place {
            Place::Archive {
                storage,
                members,
                folder,
            } => {
                let wanted = OsString::from_vec([folder, named(".mf").as_bytes()].concat());
                match manifest_of(members, &wanted)? {
                    Some(member) => open_member(storage, member),
                    None => return Ok(()),
                }
            }
            Place::Beside(_) => self.open(&named(".mf"), "manifest"),
        };
        self.seal = match opened {
            Err(e) if e.kind() == ErrorKind::NotFound => Seal::None,
            Err(e) => return Err(e),
            Ok(storage) => {
                let bytes = all_bytes(&*storage, manifest::MAX_BYTES, "the manifest");
                match bytes.and_then(|bytes| Manifest::parse(&bytes)) {
                    Ok(manifest) => Seal::Manifest(manifest),
                    Err(e) => Seal::Damaged(e),
                }
            }
        };
        Ok(())
    }
}

/// The manifest of an archive, in whichever directory: that which is called `wanted`, else the only
/// one.
fn manifest_of<'a>(members: &'a [Member], wanted: &OsStr) -> Result<Option<&'a Member>> {
    let mut all = members.iter().filter(|m| has_extension(&m.name, "mf"));
    if let Some(member) = all.clone().find(|member| member.name == wanted) {
        return Ok(Some(member));
    }
    match (all.next(), all.next()) {
        (Some(one), Some(other)) => Err(Error::corrupt(format!(
            "has manifests '{}' and '{}' in it, and none of the name of its descriptor, '{}'",
            printable(&one.name),
            printable(&other.name),
            printable(wanted)
        ))),
        (one, _) => Ok(one),
    }
}

fn parse(storage: &dyn Storage) -> Result<Envelope> {
    let bytes = all_bytes(storage, descriptor::MAX_BYTES, "the descriptor")?;
    Envelope::parse(&bytes)
}

/// The member of which messages and manifests show no more than the last part.
fn last(name: &OsStr) -> &OsStr {
    Path::new(name).file_name().unwrap_or(name)
}

fn has_extension(name: &OsStr, extension: &str) -> bool {
    let found = Path::new(name).extension();
    // What macOS adds to archives is none of the package.
    let is_added = last(name).as_bytes().starts_with(b"._");
    !is_added && found.is_some_and(|found| found.eq_ignore_ascii_case(extension))
}

/// The only descriptor of an archive.
fn descriptor_of(members: &[Member]) -> Result<&Member> {
    let mut found = members.iter().filter(|m| has_extension(&m.name, "ovf"));
    match (found.next(), found.next()) {
        (Some(one), None) => Ok(one),
        (None, _) => Err(Error::new(
            ErrorKind::WrongFormat,
            "has no descriptor (a member *.ovf) in it",
        )),
        (Some(one), Some(other)) => Err(Error::corrupt(format!(
            "has two descriptors in it, '{}' and '{}' (allowed: one)",
            printable(&one.name),
            printable(&other.name)
        ))),
    }
}

fn open_member(storage: &Arc<dyn Storage>, member: &Member) -> Result<Arc<dyn Storage>> {
    if member.kind != Kind::File {
        let text = format!(
            "member '{}' is {} (allowed: a file whose bytes are all there)",
            printable(&member.name),
            member.kind.words()
        );
        return Err(Error::unsupported(text).at_opt(storage.path()));
    }
    let name = Path::new(&member.name);
    Ok(Arc::new(Window::new(
        Arc::clone(storage),
        member.data.clone(),
        name,
    )?))
}

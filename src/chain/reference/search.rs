//! A parent that is known by its identity alone.
//!
//! Formats that store no path leave it to others to know where a parent is.  It is looked for among
//! the files that the user allows, in the image's own directory, and in the directories that the user
//! allows.  Only regular files are looked at, no more of them than
//! [`MAX_LOOKED`] for a chain, each once; of each the header is read, without a lock.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::OFlags;
use uuid::Uuid;

use crate::chain::open::References;
use crate::chain::reference::{Home, Namer, SAYS_IT, Trust, open_listed, replaced};
use crate::error::{Error, ErrorKind, Result};
use crate::image::open::{OpenOptions, Purpose};
use crate::image::{Driver, probe};
use crate::nbd::uri::is_uri;
use crate::storage::HostId;
use crate::storage::open::{Access, Caching, Flushing, Sharing, StorageOptions, adopt, open_file};

/// Most files that are looked at for one chain.
const MAX_LOOKED: usize = 4096;
/// Most names of one directory that are read.
const MAX_NAMES: usize = 1 << 16;
/// The directory, below that of a disk, where VirtualBox keeps its children.
const SNAPSHOTS: &str = "Snapshots";

/// What was learnt of the images of a chain's directories.
#[derive(Debug, Default)]
pub(in crate::chain) struct Search {
    looked: usize,
    directories: Vec<Listing>,
}

/// The images of one format in one directory.
#[derive(Debug)]
struct Listing {
    directory: Option<HostId>,
    driver: &'static Driver,
    owner: Option<u32>,
    files: usize,
    images: Vec<Candidate>,
}

/// An image that has an identity.
#[derive(Debug, Clone)]
pub(in crate::chain) struct Candidate {
    /// The directory it was found in; `None`: the user named it.
    home: Option<Arc<Home>>,
    name: OsString,
    /// As messages show it.
    pub(in crate::chain) path: PathBuf,
    pub(in crate::chain) id: HostId,
    pub(in crate::chain) identity: Uuid,
    pub(in crate::chain) state: Option<Uuid>,
}

/// What a look for one image came to.
#[derive(Debug, Default)]
pub(in crate::chain) struct Looked {
    /// All files of the first place that has any.
    pub(in crate::chain) found: Vec<Candidate>,
    /// The directories looked in.
    pub(in crate::chain) directories: Vec<PathBuf>,
    /// The files looked at.
    pub(in crate::chain) files: usize,
    /// Where it may be, and was not looked for.
    pub(in crate::chain) elsewhere: Option<Elsewhere>,
}

/// The directory above that of a child that VirtualBox made.
#[derive(Debug)]
pub(in crate::chain) struct Elsewhere {
    pub(in crate::chain) directory: PathBuf,
    /// Names there that end as those of images of the format do, in order.
    pub(in crate::chain) names: Vec<OsString>,
}

impl Search {
    /// Looks for images of `driver` with `identity`, for the image `above`.
    ///
    /// # Errors
    /// `Denied` where `above` is not to be believed; the host's about its own directory.
    pub(in crate::chain) fn find(
        &mut self,
        above: &Namer,
        references: &References,
        (driver, identity): (&'static Driver, Uuid),
    ) -> Result<Looked> {
        if above.trust == Trust::None {
            let text = format!(
                "has a backing file, but its own format was guessed, so that is not looked for \
                 {SAYS_IT}"
            );
            return Err(Error::new(ErrorKind::Denied, text).at(&above.path));
        }
        let mut looked = Looked::default();
        let is_it = |image: &Candidate| image.identity == identity;
        let before = self.looked;
        let listed = listed(references).filter_map(|path| self.look_at(path, driver));
        looked.found = listed.filter(|image| is_it(image)).collect();
        looked.files = self.looked - before;
        let owner = (above.trust == Trust::Probed).then_some(above.owner);
        for home in places(above, references)? {
            if !looked.found.is_empty() {
                break;
            }
            looked.directories.push(home.shown_itself());
            let listing = self.listing(&home, driver, owner);
            looked.files += listing.files;
            let images = listing.images.iter().filter(|image| is_it(image));
            looked.found = images.cloned().collect();
        }
        // Names of one file are one image.
        looked.found.sort_by(|a, b| a.path.cmp(&b.path));
        let mut ids = Vec::new();
        looked.found.retain(|image| {
            let new = !ids.contains(&image.id);
            ids.push(image.id);
            new
        });
        if looked.found.is_empty() {
            looked.elsewhere = elsewhere(above, references, driver);
        }
        Ok(looked)
    }

    /// Whether some files were not looked at because there are too many.
    pub(in crate::chain) fn is_exhausted(&self) -> bool {
        self.looked >= MAX_LOOKED
    }

    /// What is known of a directory, which is looked through the first time.
    fn listing(
        &mut self,
        home: &Arc<Home>,
        driver: &'static Driver,
        owner: Option<u32>,
    ) -> &Listing {
        let directory = home.id();
        let known = self
            .directories
            .iter()
            .position(|l| l.directory == directory && l.driver == driver && l.owner == owner);
        let index = known.unwrap_or_else(|| {
            let before = self.looked;
            let images = self.look_through(home, driver, owner);
            self.directories.push(Listing {
                directory,
                driver,
                owner,
                files: self.looked - before,
                images,
            });
            self.directories.len() - 1
        });
        &self.directories[index]
    }

    fn look_through(
        &mut self,
        home: &Arc<Home>,
        driver: &'static Driver,
        owner: Option<u32>,
    ) -> Vec<Candidate> {
        // What cannot be listed has nothing that can be found.
        let mut names = home.names(MAX_NAMES).unwrap_or_default();
        // Those that are called like such images first, then in order, so that it is the same each time.
        names.sort_by_cached_key(|name| (!is_called(driver, name), name.clone()));
        let mut images = Vec::new();
        for name in names {
            if self.is_exhausted() {
                break;
            }
            if let Some(file) = open_in(home, &name, owner) {
                self.looked += 1;
                images.extend(
                    identify(driver, file, home.shown(&name)).map(|found| Candidate {
                        home: Some(Arc::clone(home)),
                        name,
                        ..found
                    }),
                );
            }
        }
        images
    }

    /// What the file is that the user named.
    fn look_at(&mut self, path: &Path, driver: &'static Driver) -> Option<Candidate> {
        if self.is_exhausted() {
            return None;
        }
        let file = open_file(path, Access::Read).ok()?;
        self.looked += 1;
        identify(driver, file, path.to_owned())
    }
}

impl Candidate {
    /// Opens it again, for what it is to be used for.
    ///
    /// # Errors
    /// `Io` where it is another file by now; the host's.
    pub(in crate::chain) fn open(&self, access: Access) -> Result<File> {
        let Some(home) = &self.home else {
            return open_listed(&self.path, self.id, access);
        };
        let flags = match access {
            Access::Read => OFlags::RDONLY,
            Access::Write => OFlags::RDWR,
        };
        let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY;
        let opened = home.beneath(Path::new(&self.name), flags);
        let file = opened.map_err(|e| Error::io("open", e.into()).at(&self.path))?;
        match HostId::of_fd(&file) == Some(self.id) {
            true => Ok(file.into()),
            false => Err(replaced(&self.path)),
        }
    }
}

/// The files that the user allows to be opened.
fn listed(references: &References) -> impl Iterator<Item = &Path> {
    let allowed: &[PathBuf] = match references {
        References::Any => &[],
        References::Confined { allowed } => allowed,
    };
    let paths = allowed.iter().filter(|path| !is_uri(path));
    paths.filter(|path| !path.is_dir()).map(PathBuf::as_path)
}

/// The directories that are looked in, nearest first.
fn places(above: &Namer, references: &References) -> Result<Vec<Arc<Home>>> {
    let mut places = Vec::new();
    if let Some(id) = above.id {
        let own = above.home(id)?;
        places.push(Arc::clone(own));
        places.extend(own.within(SNAPSHOTS).ok().map(Arc::new));
        if *references == References::Any
            && let Ok(up) = own.above()
        {
            places.extend(up.within(SNAPSHOTS).ok().map(Arc::new));
            places.push(Arc::new(up));
        }
    }
    if let References::Confined { allowed } = references {
        let directories = allowed.iter().filter(|path| !is_uri(path) && path.is_dir());
        places.extend(directories.filter_map(|path| Home::at(path).ok().map(Arc::new)));
    }
    let mut ids = Vec::new();
    places.retain(|place| {
        let new = !ids.contains(&place.id());
        ids.push(place.id());
        new
    });
    Ok(places)
}

/// Where a child in VirtualBox's directory for children has its parent, if that is not looked in.
fn elsewhere(above: &Namer, references: &References, driver: &Driver) -> Option<Elsewhere> {
    let own = above.home(above.id?).ok()?;
    let is_snapshots = own.path().file_name()?.eq_ignore_ascii_case(SNAPSHOTS);
    let References::Confined { allowed } = references else {
        return None;
    };
    let up = own.above().ok().filter(|_| is_snapshots)?;
    if allowed.iter().any(|path| HostId::named(path) == up.id()) {
        return None;
    }
    let mut names = up.names(MAX_NAMES).unwrap_or_default();
    names.retain(|name| is_called(driver, name));
    names.sort();
    Some(Elsewhere {
        directory: up.path().to_owned(),
        names,
    })
}

/// Whether a file's name ends as those of the driver's images do.
fn is_called(driver: &Driver, name: &OsStr) -> bool {
    let extension = Path::new(name).extension().unwrap_or_default();
    let extension = extension.as_bytes().to_ascii_lowercase();
    driver.extensions.iter().any(|e| e.as_bytes() == extension)
}

/// Opens the regular file called `name` for a look, if it is there, may be read, and is `owner`'s.
fn open_in(home: &Home, name: &OsStr, owner: Option<u32>) -> Option<File> {
    let way = Path::new(name);
    let seen = File::from(home.beneath(way, OFlags::PATH).ok()?);
    let seen = seen.metadata().ok()?;
    if !seen.is_file() || owner.is_some_and(|owner| owner != seen.uid()) {
        return None;
    }
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = home.beneath(way, flags).ok()?;
    (HostId::of_fd(&file) == Some(HostId::of(&seen))).then(|| file.into())
}

/// What an image in `file` says who it is; `None` where it is of another format, or has no identity.
fn identify(driver: &'static Driver, file: File, path: PathBuf) -> Option<Candidate> {
    let id = HostId::of_fd(&file)?;
    let options = StorageOptions {
        access: Access::Read,
        sharing: Sharing::Force,
        caching: Caching::Buffered,
        flushing: Flushing::Waived,
    };
    let storage = adopt(file, &path, &options).ok()?;
    probe::probe(&[driver], &[], &*storage).ok()?;
    let options = OpenOptions {
        purpose: Purpose::Describe,
        ..OpenOptions::default()
    };
    let image = (driver.open)(storage, &options).ok()?;
    Some(Candidate {
        home: None,
        name: OsString::new(),
        path,
        id,
        identity: image.identity()?,
        state: image.state(),
    })
}

//! A parent that is known by its identity alone.
//!
//! Formats that store no path leave it to others to know where a parent is.  It is looked for among
//! the files that the user allows, in the image's own directory, and in the directories that the user
//! allows: the one in the state wanted, else one in another state, of the first place that has any.
//! Only regular files are looked at, no more of them than [`MAX_LOOKED`] for a chain and for each
//! directory that the user allows, each once; of each the header is read, without a lock.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::io::Errno;
use uuid::Uuid;

use crate::chain::open::References;
use crate::chain::reference::{Home, Namer, SAYS_IT, Trust, open_listed, replaced};
use crate::error::{Error, ErrorKind, Result};
use crate::image::open::{OpenOptions, Purpose};
use crate::image::{Driver, probe};
use crate::nbd::uri::is_uri;
use crate::storage::HostId;
use crate::storage::open::{Access, Caching, Flushing, Sharing, StorageOptions, adopt, open_file};

/// Most files that are looked at for one chain near its images, and in one directory that the user
/// named.
const MAX_LOOKED: usize = 4096;
/// Most names of one directory that are read.
pub(in crate::chain) const MAX_NAMES: usize = 1 << 16;
/// The directory, below that of a disk, where VirtualBox keeps its children.
const SNAPSHOTS: &str = "Snapshots";

/// What was learnt of the images of a chain's directories.
#[derive(Debug, Default)]
pub(in crate::chain) struct Search {
    /// Near the images.
    looked: usize,
    directories: Vec<Listing>,
}

/// A directory that is looked in.
#[derive(Debug)]
enum Nearness {
    /// Near the image.
    Near(Arc<Home>),
    /// Where the user says.
    Named(Arc<Home>),
}

/// Who an image has to be.
#[derive(Debug, Clone, Copy)]
pub(in crate::chain) struct Wanted {
    pub(in crate::chain) driver: &'static Driver,
    pub(in crate::chain) identity: Uuid,
    /// Preferred; `None`: any will do.
    pub(in crate::chain) state: Option<Uuid>,
}

/// The images of one format in one directory.
#[derive(Debug)]
struct Listing {
    directory: Option<HostId>,
    driver: &'static Driver,
    owner: Option<u32>,
    files: usize,
    images: Vec<Candidate>,
    passed: Vec<Passed>,
    is_cut: bool,
}

/// A file that may be what is looked for, and was not looked at.
#[derive(Debug, Clone)]
pub(in crate::chain) struct Passed {
    pub(in crate::chain) path: PathBuf,
    pub(in crate::chain) why: String,
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
    /// All files in the state wanted, of the first place that has any; where none has, all files of
    /// the first place that has any in another.
    pub(in crate::chain) found: Vec<Candidate>,
    /// The directories looked in.
    pub(in crate::chain) directories: Vec<PathBuf>,
    /// The files looked at.
    pub(in crate::chain) files: usize,
    /// Files that were not.
    pub(in crate::chain) passed: Vec<Passed>,
    /// Whether more were not, because there are too many.
    pub(in crate::chain) is_cut: bool,
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
    /// Looks for the image `wanted` for the image `above`.
    ///
    /// # Errors
    /// `Denied` where `above` is not to be believed; the host's about its own directory.
    pub(in crate::chain) fn find(
        &mut self,
        above: &Namer,
        references: &References,
        wanted: Wanted,
    ) -> Result<Looked> {
        if above.trust == Trust::None {
            let text = format!(
                "has a backing file, but its own format was guessed, so that is not looked for \
                 {SAYS_IT}"
            );
            return Err(Error::new(ErrorKind::Denied, text).at(&above.path));
        }
        let mut looked = Looked::default();
        let mut listed = Vec::new();
        for path in listed_files(references) {
            match look_at(path, wanted.driver) {
                Ok(image) => {
                    looked.files += 1;
                    listed.extend(image);
                }
                Err(e) => looked.passed.push(Passed::new(path.to_owned(), &e)),
            }
        }
        let mut is_it = looked.add(&listed, wanted);
        let owner = (above.trust == Trust::Probed).then_some(above.owner);
        for place in places(above, references)? {
            if is_it {
                break;
            }
            looked.directories.push(place.home().shown_itself());
            let listing = self.listing(&place, wanted.driver, owner);
            looked.files += listing.files;
            looked.is_cut |= listing.is_cut;
            looked.passed.extend(listing.passed.iter().cloned());
            is_it = looked.add(&listing.images, wanted);
        }
        if looked.found.is_empty() {
            looked.elsewhere = elsewhere(above, references, wanted.driver);
        }
        Ok(looked)
    }

    /// What is known of a directory, which is looked through the first time.
    fn listing(
        &mut self,
        place: &Nearness,
        driver: &'static Driver,
        owner: Option<u32>,
    ) -> &Listing {
        let directory = place.home().id();
        let known = self
            .directories
            .iter()
            .position(|l| l.directory == directory && l.driver == driver && l.owner == owner);
        let index = known.unwrap_or_else(|| {
            let most = match place {
                Nearness::Near(_) => MAX_LOOKED.saturating_sub(self.looked),
                Nearness::Named(_) => MAX_LOOKED,
            };
            let listing = look_through(place.home(), driver, owner, most);
            if let Nearness::Near(_) = place {
                self.looked += listing.files;
            }
            self.directories.push(listing);
            self.directories.len() - 1
        });
        &self.directories[index]
    }
}

impl Nearness {
    fn home(&self) -> &Arc<Home> {
        let (Self::Near(home) | Self::Named(home)) = self;
        home
    }
}

impl Looked {
    /// Takes those of the images of one place that are wanted; whether one is in the state wanted.
    fn add(&mut self, images: &[Candidate], wanted: Wanted) -> bool {
        let mut ids = Vec::new();
        let mut those: Vec<_> = images
            .iter()
            .filter(|image| image.identity == wanted.identity)
            .collect();
        // Names of one file are one image.
        those.sort_by(|a, b| a.path.cmp(&b.path));
        those.retain(|image| {
            let new = !ids.contains(&image.id);
            ids.push(image.id);
            new
        });
        let is_in_state = |image: &Candidate| wanted.state.is_none_or(|s| image.state == Some(s));
        let exact = those.iter().any(|image| is_in_state(image));
        if exact {
            those.retain(|image| is_in_state(image));
        }
        if exact || self.found.is_empty() {
            self.found = those.into_iter().cloned().collect();
        }
        exact
    }
}

impl Passed {
    fn new(path: PathBuf, why: &dyn std::fmt::Display) -> Self {
        let why = why.to_string();
        Self { path, why }
    }
}

/// Looks at no more than `most` files of a directory.
fn look_through(
    home: &Arc<Home>,
    driver: &'static Driver,
    owner: Option<u32>,
    most: usize,
) -> Listing {
    let mut listing = Listing {
        directory: home.id(),
        driver,
        owner,
        files: 0,
        images: Vec::new(),
        passed: Vec::new(),
        is_cut: false,
    };
    // What cannot be listed has nothing that can be found.
    let mut names = home.names(MAX_NAMES).unwrap_or_default();
    // Those that are called like such images first, then in order, so that it is the same each time.
    names.sort_by_cached_key(|name| (!is_called(driver, name), name.clone()));
    for name in names {
        if listing.files >= most {
            listing.is_cut = true;
            break;
        }
        match open_in(home, &name, owner) {
            Ok(file) => {
                listing.files += 1;
                let image = identify(driver, file, home.shown(&name));
                listing.images.extend(image.map(|found| Candidate {
                    home: Some(Arc::clone(home)),
                    name,
                    ..found
                }));
            }
            Err(why) if is_called(driver, &name) => {
                listing.passed.push(Passed::new(home.shown(&name), &why));
            }
            Err(_) => {}
        }
    }
    listing
}

/// What the file is that the user named.
fn look_at(path: &Path, driver: &'static Driver) -> Result<Option<Candidate>> {
    let file = open_file(path, Access::Read)?;
    Ok(identify(driver, file, path.to_owned()))
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
fn listed_files(references: &References) -> impl Iterator<Item = &Path> {
    let paths = references.allowed().iter().filter(|path| !is_uri(path));
    // Whatever may be named need not be there.
    let files = paths.filter(|path| path.exists() && !path.is_dir());
    files.map(PathBuf::as_path)
}

/// The directories that are looked in, nearest first.
fn places(above: &Namer, references: &References) -> Result<Vec<Nearness>> {
    let mut places = Vec::new();
    if let Some(id) = above.id {
        let own = above.home(id)?;
        places.push(Nearness::Near(Arc::clone(own)));
        let children = |home: &Home| {
            home.within(SNAPSHOTS)
                .ok()
                .map(Arc::new)
                .map(Nearness::Near)
        };
        places.extend(children(own));
        if let References::Any { .. } = references
            && let Ok(up) = own.above()
        {
            places.extend(children(&up));
            places.push(Nearness::Near(Arc::new(up)));
        }
    }
    let named = references.allowed().iter().filter(|path| !is_uri(path));
    let homes = named
        .filter(|p| p.is_dir())
        .filter_map(|p| Home::at(p).ok());
    places.extend(homes.map(Arc::new).map(Nearness::Named));
    let mut ids = Vec::new();
    places.retain(|place| {
        let new = !ids.contains(&place.home().id());
        ids.push(place.home().id());
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
pub(in crate::chain) fn is_called(driver: &Driver, name: &OsStr) -> bool {
    let extension = Path::new(name).extension().unwrap_or_default();
    let extension = extension.as_bytes().to_ascii_lowercase();
    driver.extensions.iter().any(|e| e.as_bytes() == extension)
}

/// Opens the regular file called `name` for a look.
///
/// # Errors
/// Why it is not looked at.
pub(in crate::chain) fn open_in(
    home: &Home,
    name: &OsStr,
    owner: Option<u32>,
) -> Result<File, String> {
    let way = Path::new(name);
    let failed = |e: Errno| match e {
        Errno::XDEV => "a symbolic link that leads out of the directory".to_owned(),
        e => std::io::Error::from(e).to_string(),
    };
    let seen = File::from(home.beneath(way, OFlags::PATH).map_err(failed)?);
    let seen = seen.metadata().map_err(|e| e.to_string())?;
    if !seen.is_file() {
        return Err("no regular file".to_owned());
    }
    if let Some(owner) = owner.filter(|owner| *owner != seen.uid()) {
        let its = seen.uid();
        return Err(format!(
            "user {its}'s, the image is user {owner}'s and its format was guessed"
        ));
    }
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = home.beneath(way, flags).map_err(failed)?;
    match HostId::of_fd(&file) == Some(HostId::of(&seen)) {
        true => Ok(file.into()),
        false => Err("replaced meanwhile".to_owned()),
    }
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

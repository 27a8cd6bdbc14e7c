//! From a path to a chain: formats, the layers below, and the policy for files an image names.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::chain::files::HostFile;
use crate::chain::reference::search::Search;
use crate::chain::reference::{Confined, Found, Namer, Trust};
use crate::chain::{Base, Chain};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::formats::refused::REFUSED;
use crate::formats::{self, DRIVERS};
use crate::image::contents::Contents;
use crate::image::open::{Companions, Damaged, OpenOptions, Purpose, WriteOrder};
use crate::image::options::OptionValues;
use crate::image::snapshot::Pick;
use crate::image::{Backing, Driver, Image, probe};
use crate::nbd::uri::is_uri;
use crate::storage::highwater::{HighWater, Watched};
use crate::storage::open::{Access, Sharing, StorageOptions, adopt, open_file, open_uri};
use crate::storage::{HostId, Storage};
use crate::util::grace::Grace;
use crate::util::progress::Watcher;

mod below;
mod link;
mod live;

pub use crate::chain::reference::Home;
pub(in crate::chain) use link::Link;
pub use live::{Live, open_live};

/// Which files an image may make us open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum References {
    /// Those in the image's own directory and below, and those listed.
    Confined {
        /// Further files that may be opened.
        allowed: Vec<PathBuf>,
    },
    /// Any.
    Any {
        /// Where else images are looked for that are known by their identity alone.
        allowed: Vec<PathBuf>,
    },
}

impl References {
    /// Any, and nothing is looked for anywhere else than near the image.
    pub const ANY: Self = Self::Any {
        allowed: Vec::new(),
    };

    /// What the user listed.
    pub fn allowed(&self) -> &[PathBuf] {
        let (Self::Confined { allowed } | Self::Any { allowed }) = self;
        allowed
    }

    /// Has these in the list too.
    pub fn allow(&mut self, more: impl IntoIterator<Item = PathBuf>) {
        let (Self::Confined { allowed } | Self::Any { allowed }) = self;
        allowed.extend(more);
    }
}

impl Default for References {
    fn default() -> Self {
        Self::Confined {
            allowed: Vec::new(),
        }
    }
}

/// What to do about the layers below the top one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Follow {
    /// Open them all.
    #[default]
    Yes,
    /// Open this many layers in all, the top one counted; those below as with `No`.
    Layers(usize),
    /// Open none of them: data that is there cannot be read.
    No,
}

/// What to do about a layer that was changed since the one above it was made, so that the disk may
/// be no disk that ever was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Changed {
    /// Refuse it.
    #[default]
    Refuse,
    /// Read it as it is now.
    Accept,
}

/// How to open a chain.
#[derive(Debug, Clone, Default)]
pub struct ChainOptions {
    /// How the top layer's file is opened; the layers below are opened alike, but for reading.
    pub storage: StorageOptions,
    /// Format of the top layer; `None`: probed by content.
    pub format: Option<&'static Driver>,
    /// Format of backing files whose format is not recorded; `None`: such a file is probed, and what
    /// it names in turn is not opened.
    pub backing_format: Option<&'static Driver>,
    /// What to do about the layers below.
    pub follow: Follow,
    /// Which files an image may make us open.
    pub references: References,
    /// NBD URIs that an image may name; others are not followed, whatever `references` says.
    pub remotes: Vec<String>,
    /// Whether the top layer's metadata waits for its data.
    pub order: WriteOrder,
    /// Why the top layer is opened; those below it are used, or described as it is.
    pub purpose: Purpose,
    /// What to do about data of the top layer whose own codes say that it is wrong.
    pub damaged: Damaged,
    /// The internal snapshot of the top layer to show instead of its disk as it is now.
    pub snapshot: Option<Pick>,
    /// Which disk of a file that holds several is the top layer: its number, counted from 1, or its
    /// name; `None`: the only one.
    pub member: Option<OsString>,
    /// Where files are that the top layer names, by the name that it has for them, for an image that
    /// is not in its place yet.
    pub files: Vec<(OsString, PathBuf)>,
    /// How many links, from the top layer on, are followed as the images have them whatever
    /// `parents` says.
    pub followed: usize,
    /// What lies below the layers from there on, topmost first, whatever they name; further down, what
    /// they name.
    pub parents: Vec<PathBuf>,
    /// What to do where a layer was changed since the one above it was made.
    pub changed: Changed,
    /// The top layer is opened to list the operations that it consists of, and cannot be read.
    pub listed: bool,
    /// Format options as typed (`K=V,..`), checked against the top layer's format.
    pub values: Vec<OsString>,
    /// Who is told of what must be read whole before a layer can be used, and asked whether to stop.
    pub watcher: Watcher,
    /// Who is told how far into the top layer's file is written.
    pub high_water: Option<Arc<HighWater>>,
    /// Files whose locks this process has already by chains that stay open until this one is.
    pub ours: Vec<HostId>,
}

impl ChainOptions {
    /// For reading a disk, everything else as it comes.
    pub fn read() -> Self {
        Self::default()
    }

    /// For reading and writing a disk, everything else as it comes.
    pub fn write() -> Self {
        let storage = StorageOptions {
            access: Access::Write,
            ..StorageOptions::default()
        };
        Self {
            storage,
            ..Self::default()
        }
    }
}

/// Opens the image at `path` and, as `options` say, the layers below it.
///
/// # Errors
/// Those of the host and of the formats; `Denied` where an image names a file that the policy
/// does not let us open; `NotFound` where a backing file is nowhere; `OutOfRange` for too many
/// layers; `Corrupt` for a cycle, and for a backing file that is not the one meant or has changed;
/// `Invalid` where there are fewer layers than `options.parents` has files for.  The path is that of
/// the layer at fault.
pub fn open(path: &Path, options: &ChainOptions) -> Result<Chain> {
    let chain = Walk::begin(look(path, options.storage.access)?, options)?.all()?;
    refuse_surplus(path, chain.layers().len(), options)?;
    Ok(chain)
}

/// As [`open`], one of several images: takes those of `options.parents` that are its own, and leaves
/// the others for the next.
///
/// # Errors
/// Those of [`open`].
pub fn open_next(path: &Path, options: &mut ChainOptions) -> Result<Chain> {
    let chain = Walk::begin(look(path, options.storage.access)?, options)?.all()?;
    let below = (chain.layers().len() - 1).saturating_sub(options.followed);
    options.parents.drain(..below.min(options.parents.len()));
    Ok(chain)
}

/// Refuses to leave out what the user said lies below: it is the wrong image, or the wrong parents.
fn refuse_surplus(path: &Path, layers: usize, options: &ChainOptions) -> Result<()> {
    let below = (layers - 1).saturating_sub(options.followed);
    let given = options.parents.len();
    if options.follow != Follow::Yes || given <= below {
        return Ok(());
    }
    let text = format!("was given {given} parents (--parent), and has {below} images below it");
    Err(Error::invalid(text).at(path))
}

/// Whether the file at `path` is of a format whose files hold disks.
///
/// # Errors
/// Those of [`open`] for one layer.
pub fn holds_disks(path: &Path, options: &ChainOptions) -> Result<bool> {
    let options = ChainOptions {
        member: None,
        values: Vec::new(),
        ..options.clone()
    };
    let walk = Walk::new(&options);
    let seen = walk.look(look(path, options.storage.access)?, &walk.top())?;
    Ok(formats::container(seen.driver).is_some())
}

/// What is in the file at `path`, where it is of a format whose files hold disks and no disk of it
/// is chosen.
///
/// # Errors
/// Those of [`open`] for one layer; a disk that cannot be opened is listed.
pub fn contents(path: &Path, options: &ChainOptions) -> Result<Option<Contents>> {
    let walk = Walk::new(options);
    let seen = walk.look(look(path, options.storage.access)?, &walk.top())?;
    match formats::container(seen.driver) {
        Some(container) if options.member.is_none() => {
            (container.contents)(seen.storage, &seen.options)
                .at(path)
                .map(Some)
        }
        _ => Ok(None),
    }
}

/// As [`open`], the image that `name` leads to from `home`, as the user gave it; messages call it
/// `path`.
///
/// # Errors
/// Those of [`open`].
pub fn open_from(home: &Home, name: &OsStr, path: &Path, options: &ChainOptions) -> Result<Chain> {
    let found = match is_uri(Path::new(name)) {
        true => Found::Remote { uri: name.into() },
        false => Found::File {
            file: home.open(name, path, options.storage.access)?,
            path: path.to_owned(),
        },
    };
    let chain = Walk::begin(found, options)?.all()?;
    refuse_surplus(path, chain.layers().len(), options)?;
    Ok(chain)
}

/// As [`open`], the image that is open as `file`, for what `options` want it for; messages call it
/// `path`.
///
/// # Errors
/// Those of [`open`].
pub fn open_opened(file: File, path: &Path, options: &ChainOptions) -> Result<Chain> {
    let path = path.to_owned();
    Walk::begin(Found::File { file, path }, options)?.all()
}

/// As [`open`], in two chains: the layers above `base`, and those from there on, the first of which
/// is opened for writing.  It is found from the layers above it again, so that it is the one that
/// they name, and must be what it was in a chain that was opened before.
///
/// # Errors
/// Those of [`open`]; `Io` where the layer is another one now.
pub fn open_in_two(path: &Path, options: &ChainOptions, base: &HostFile) -> Result<(Chain, Chain)> {
    let changed = || changed(path);
    let mut walk = Walk::begin(look(path, options.storage.access)?, options)?;
    while walk.layers.len() < base.layer {
        if !walk.descend(Access::Read)? {
            return Err(changed());
        }
    }
    // Each chain waits for its own readers.
    let grace = std::mem::take(&mut walk.grace);
    if !walk.descend(Access::Write)? {
        return Err(changed());
    }
    let found = walk.layers.last().map(|l| &l.namer);
    if !found.is_some_and(|found| base.is_same(found.id, &found.path)) {
        return Err(changed());
    }
    while walk.descend(Access::Read)? {}
    refuse_surplus(path, walk.layers.len(), options)?;
    walk.tell_sizes();
    let lower = images(walk.layers.split_off(base.layer));
    let upper = Chain::new(images(walk.layers), Base::NotOpened, grace)?;
    Ok((upper, Chain::new(lower, Base::Zeroes, walk.grace)?))
}

fn changed(path: &Path) -> Error {
    Error::new(ErrorKind::Io, "what lies below it has changed").at(path)
}

/// The directory of the top image of a chain, from which the names in it lead.
///
/// # Errors
/// `Io` where the image was replaced since it was opened; the host's.
pub fn home(chain: &Chain) -> Result<Home> {
    let top = chain.top().storage();
    let path = top.path().unwrap_or(Path::new(""));
    match top.host_id() {
        Some(id) => Home::of(id, path),
        None => Home::of_new(path),
    }
}

/// Opens the image at `path` and none of the files that it names.
///
/// # Errors
/// Those of [`open`] for one layer.
pub fn open_top(path: &Path, options: &ChainOptions) -> Result<Chain> {
    let options = ChainOptions {
        follow: Follow::No,
        ..options.clone()
    };
    open(path, &options)
}

/// How a file is opened some of which this process has open already.
pub(in crate::chain) fn shared(
    storage: &StorageOptions,
    id: Option<HostId>,
    ours: &[HostId],
) -> StorageOptions {
    match (storage.sharing, id) {
        (Sharing::Locked, Some(id)) if ours.contains(&id) => StorageOptions {
            sharing: Sharing::Ours,
            ..*storage
        },
        _ => *storage,
    }
}

/// The layers opened so far, and how to open more.
struct Walk<'a> {
    options: &'a ChainOptions,
    grace: Arc<Grace>,
    layers: Vec<Layer>,
    search: Search,
}

/// One open layer, and what follows the names in it.
pub(in crate::chain) struct Layer {
    pub(in crate::chain) image: Box<dyn Image>,
    pub(in crate::chain) namer: Namer,
}

/// What holds a layer, looked at and not opened as an image.
struct Seen {
    namer: Namer,
    storage: Arc<dyn Storage>,
    driver: &'static Driver,
    options: OpenOptions,
}

/// What one layer is opened with.
struct How<'a> {
    storage: StorageOptions,
    format: Option<&'static Driver>,
    /// How far it is trusted where its format is stated, and where it is probed.
    stated: Trust,
    probed: Trust,
    order: WriteOrder,
    purpose: Purpose,
    damaged: Damaged,
    snapshot: Option<&'a Pick>,
    member: Option<&'a OsString>,
    files: &'a [(OsString, PathBuf)],
    values: &'a [OsString],
    high_water: Option<&'a Arc<HighWater>>,
}

impl<'a> Walk<'a> {
    fn new(options: &'a ChainOptions) -> Self {
        Self {
            options,
            grace: Arc::default(),
            layers: Vec::new(),
            search: Search::default(),
        }
    }

    /// How the top layer is opened.
    fn top(&self) -> How<'a> {
        let options = self.options;
        How {
            storage: options.storage,
            format: options.format,
            stated: Trust::Stated,
            probed: Trust::Probed,
            order: options.order,
            purpose: options.purpose,
            damaged: options.damaged,
            snapshot: options.snapshot.as_ref(),
            member: options.member.as_ref(),
            files: &options.files,
            values: &options.values,
            high_water: options.high_water.as_ref(),
        }
    }

    /// With the top layer open.
    fn begin(found: Found, options: &'a ChainOptions) -> Result<Self> {
        Self::begin_as(found, options, Trust::Stated)
    }

    /// As `begin`, of an image that is believed as far as `stated` says where its format is stated.
    fn begin_as(found: Found, options: &'a ChainOptions, stated: Trust) -> Result<Self> {
        let mut walk = Self::new(options);
        let how = How {
            stated,
            ..walk.top()
        };
        let top = walk.layer(found, &how)?;
        walk.layers.push(top);
        Ok(walk)
    }

    /// Opens what lies below, as far as it is wanted.
    fn all(mut self) -> Result<Chain> {
        let base = loop {
            let wanted = match self.options.follow {
                Follow::Yes => true,
                Follow::Layers(most) => self.layers.len() < most,
                Follow::No => false,
            };
            if !wanted {
                break match self.backing() {
                    Some(_) => Base::NotOpened,
                    None => Base::Zeroes,
                };
            }
            if !self.descend(Access::Read)? {
                break Base::Zeroes;
            }
        };
        self.tell_sizes();
        Chain::new(images(self.layers), base, self.grace)
    }

    /// Tells each layer how large the disk right below it is, the lowest first.
    fn tell_sizes(&self) {
        for pair in self.layers.windows(2).rev() {
            if let [above, below] = pair {
                above.image.lies_over(below.image.virtual_size());
            }
        }
    }

    /// Opens the layer below the last; whether there is one.
    fn descend(&mut self, access: Access) -> Result<bool> {
        let Some(backing) = self.backing() else {
            return Ok(false);
        };
        let below = self.below(&backing, access)?;
        if let Some(above) = self.layers.last_mut() {
            above.namer.leave();
        }
        self.layers.push(below);
        Ok(true)
    }

    /// What the last layer says lies below it.
    fn backing(&self) -> Option<Backing> {
        self.layers.last()?.image.backing()
    }

    /// Opens what holds a layer, finds its format, and how it is to be opened.
    fn look(&self, found: Found, how: &How<'_>) -> Result<Seen> {
        let trust = match how.format {
            Some(_) => how.stated,
            None => how.probed,
        };
        let (namer, mut storage) = match found {
            Found::File { file, path } => {
                let namer = Namer::new(&file, &path, trust)?;
                let storage = shared(&how.storage, namer.id, &self.options.ours);
                (namer, adopt(file, &path, &storage)?)
            }
            Found::Remote { uri } => {
                let storage = open_uri(&uri, &how.storage)?;
                (Namer::remote(&uri, trust), storage)
            }
        };
        if let Some(high) = how.high_water {
            storage = Arc::new(Watched::new(storage, Arc::clone(high)));
        }
        let path = &namer.path.clone();
        let driver = match how.format {
            Some(driver) => driver,
            None => probe::probe(DRIVERS, REFUSED, &*storage).at(path)?,
        };
        let companions = Confined {
            namer: namer.clone(),
            references: self.options.references.clone(),
            remotes: self.options.remotes.clone(),
            storage: how.storage,
            ours: self.options.ours.clone(),
            stand_ins: how.files.to_vec(),
        };
        let companions: Arc<dyn Companions> = Arc::new(companions);
        let image = OpenOptions {
            companions: match self.options.follow {
                Follow::Yes | Follow::Layers(_) => Some(Arc::clone(&companions)),
                Follow::No => None,
            },
            needed: Some(companions),
            damaged: how.damaged,
            access: how.storage.access,
            order: how.order,
            purpose: how.purpose,
            grace: Arc::clone(&self.grace),
            snapshot: how.snapshot.cloned(),
            member: how.member.cloned(),
            listed: self.options.listed && self.layers.is_empty(),
            values: OptionValues::parse(driver.open_options, driver.name, how.values).at(path)?,
            watcher: self.options.watcher.clone(),
        };
        if how.member.is_some() && formats::container(driver).is_none() {
            let text = format!(
                "is one disk, of format '{}' (--member is for files that hold several)",
                driver.name
            );
            return Err(Error::invalid(text).at(path));
        }
        Ok(Seen {
            namer,
            storage,
            driver,
            options: image,
        })
    }

    fn layer(&self, found: Found, how: &How<'_>) -> Result<Layer> {
        let Seen {
            namer,
            storage,
            driver,
            options,
        } = self.look(found, how)?;
        let path = &namer.path;
        let mut image = (driver.open)(storage, &options).at(path)?;
        if how.snapshot.is_some() && image.as_snapshots().is_none() {
            let text = format!(
                "images of format '{}' have no internal snapshots",
                driver.name
            );
            return Err(Error::unsupported(text).at(path));
        }
        Ok(Layer { image, namer })
    }
}

fn images(layers: Vec<Layer>) -> Vec<Box<dyn Image>> {
    layers.into_iter().map(|l| l.image).collect()
}

/// Opens what the user named, without looking at its content.
pub(in crate::chain) fn look(path: &Path, access: Access) -> Result<Found> {
    let path = path.to_owned();
    match is_uri(&path) {
        true => Ok(Found::Remote { uri: path }),
        false => Ok(Found::File {
            file: open_file(&path, access)?,
            path,
        }),
    }
}

#[cfg(test)]
mod tests;

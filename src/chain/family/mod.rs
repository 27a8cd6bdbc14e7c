//! Families of images: which lies below which, and what is wrong with the links.
//!
//! Each image is opened with what lies right below it, by the same policy and the same checks as by
//! every other command that reads it, so that what is said of a link here is what they would say.
//! Nothing else is opened but the files that were named, those of the directories that were named,
//! and what those images name as far as the policy allows it; nothing is changed, and no lock is
//! taken, so that images of running machines are seen too.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use crate::chain::open::{ChainOptions, Changed, Layer, Link, look};
use crate::chain::reference::search::{MAX_NAMES, Search, is_called, open_in};
use crate::chain::reference::{Found, Home, Trust};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::formats::DRIVERS;
use crate::image::info::{HostInfo, ImageInfo};
use crate::image::open::Purpose;
use crate::image::{BackingName, Driver, Image, Source, Wait};
use crate::storage::HostId;
use crate::storage::open::{Access, Sharing};

mod trouble;

pub use trouble::{Fault, Remedy, Trouble};

/// Most images that one survey holds.
pub const MAX_IMAGES: usize = 1 << 16;

/// What a survey came to.
#[derive(Debug, Default)]
pub struct Family {
    /// The images, each once whatever it is called, in the order in which they were met.
    pub members: Vec<Member>,
    /// Files of directories that have the marks of an image, or its name, and cannot be read.
    pub unread: Vec<Error>,
    /// Whether there was more than is looked at.
    pub is_cut: bool,
}

/// One image.
#[derive(Debug)]
pub struct Member {
    /// What it says of itself.
    pub info: ImageInfo,
    /// Who it is, in formats that say it.
    pub identity: Option<Uuid>,
    /// When it is, in formats that say it.
    pub state: Option<Uuid>,
    /// Bytes of the disk that it stores itself, compressed ones as they are read; `None` where its
    /// tables cannot be read.
    pub own: Option<u64>,
    /// The names that it has for what lies below it.
    pub names: Vec<Name>,
    /// What lies below it: an index of [`Family::members`], or nothing that was found.
    pub parent: Option<usize>,
    /// What is wrong with what lies below it, worst first.
    pub troubles: Vec<Trouble>,
    key: Key,
    driver: &'static Driver,
    is_named: bool,
}

impl Member {
    /// The file that holds its header; `None`: a server has it.
    pub fn id(&self) -> Option<HostId> {
        match self.key {
            Key::Host(id) => Some(id),
            Key::Uri(_) => None,
        }
    }
}

/// One name that an image has for what lies below it.
#[derive(Debug)]
pub struct Name {
    /// As it stands in the image.
    pub name: BackingName,
    /// The image it leads to: an index of [`Family::members`], or why it leads to none.
    pub leads_to: Result<usize, String>,
}

/// What an image is known by.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Key {
    Host(HostId),
    Uri(PathBuf),
}

impl Key {
    fn of(found: &Found) -> Option<Self> {
        match found {
            Found::File { file, .. } => HostId::of_fd(file).map(Self::Host),
            Found::Remote { uri } => Some(Self::Uri(uri.clone())),
        }
    }

    fn of_layer(layer: &Layer) -> Self {
        match layer.namer.id {
            Some(id) => Self::Host(id),
            None => Self::Uri(layer.namer.path.clone()),
        }
    }
}

/// An image that is to be looked at.
struct Job {
    place: Place,
    /// As an image above it has it; `None`: probed.
    format: Option<&'static Driver>,
    stated: Trust,
    origin: Origin,
}

/// Where an image is; files of directories are opened when they are looked at, not all at once.
enum Place {
    Found(Found),
    Entry(Arc<Home>, OsString),
}

/// How an image was opened that is open now.
struct Seen<'a> {
    found: &'a Found,
    options: &'a ChainOptions,
    stated: Trust,
    is_named: bool,
    /// Where it stands already, by a guess at its format.
    known: Option<usize>,
}

impl Seen<'_> {
    /// What lies below it, if that is refused with `error` for its state alone.
    fn in_another_state(&self, error: &Error, search: &mut Search) -> Option<Layer> {
        if error.kind() != ErrorKind::Corrupt {
            return None;
        }
        let options = ChainOptions {
            changed: Changed::Accept,
            ..self.options.clone()
        };
        let link = Link::open(again(self.found).ok()?, &options, self.stated, search);
        link.ok()?.below.ok()?
    }
}

/// How an image came to be looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// The user named it.
    Named,
    /// It lies in a directory that the user named.
    Listed,
    /// An image has it below it.
    Linked,
}

/// Looks at the images at `places`, those in the directories among them, and what lies below them.
/// `options` say which files images may name; `go_on` is asked before each image.
///
/// # Errors
/// Those of [`crate::chain::open::open`] for an image that is named itself; those of `go_on`.
pub fn survey(
    places: &[PathBuf],
    options: &ChainOptions,
    go_on: &dyn Fn() -> Result<()>,
) -> Result<Family> {
    let mut survey = Survey::new(options);
    for place in places {
        survey.take(place)?;
    }
    while let Some(job) = survey.jobs.pop_front() {
        go_on()?;
        survey.look_at(job)?;
    }
    Ok(survey.finish())
}

struct Survey {
    options: ChainOptions,
    family: Family,
    known: HashMap<Key, usize>,
    /// Each image is looked at once in each format.
    looked: HashSet<(Key, &'static str)>,
    jobs: VecDeque<Job>,
    search: Search,
    /// By image, what it has below it, and where each of its names leads.
    parents: Vec<Option<Key>>,
    leads: Vec<Vec<Result<Key, String>>>,
}

impl Survey {
    fn new(options: &ChainOptions) -> Self {
        let mut options = options.clone();
        options.purpose = Purpose::Describe;
        options.storage.access = Access::Read;
        options.storage.sharing = Sharing::Force;
        Self {
            options,
            family: Family::default(),
            known: HashMap::new(),
            looked: HashSet::new(),
            jobs: VecDeque::new(),
            search: Search::default(),
            parents: Vec::new(),
            leads: Vec::new(),
        }
    }

    /// Lists what lies at one place.
    fn take(&mut self, place: &Path) -> Result<()> {
        if !place.is_dir() {
            let found = look(place, Access::Read)?;
            self.jobs.push_back(Job {
                place: Place::Found(found),
                format: self.options.format,
                stated: Trust::Stated,
                origin: Origin::Named,
            });
            return Ok(());
        }
        let failed = |e: std::io::Error| Error::io("read the directory", e).at(place);
        let home = Home::at(place).map_err(failed)?;
        let names = home.names(MAX_NAMES + 1).map_err(|e| failed(e.into()));
        let mut names = names?;
        names.sort();
        self.family.is_cut |= names.len() > MAX_NAMES;
        let home = Arc::new(home);
        let entries = names.into_iter().take(MAX_NAMES).map(|name| Job {
            place: Place::Entry(Arc::clone(&home), name),
            format: None,
            stated: Trust::Stated,
            origin: Origin::Listed,
        });
        self.jobs.extend(entries);
        Ok(())
    }

    /// Opens one image with what lies right below it.
    fn look_at(&mut self, job: Job) -> Result<()> {
        let found = match job.place {
            Place::Found(found) => found,
            // What is no file of the directory is none of its images.
            Place::Entry(home, name) => match open_in(&home, &name, None) {
                Ok(file) => Found::File {
                    file,
                    path: home.shown(&name),
                },
                Err(why) => {
                    if DRIVERS.iter().any(|driver| is_called(driver, &name)) {
                        let error = Error::invalid(format!("was not looked at: {why}"));
                        self.family.unread.push(error.at(home.shown(&name)));
                    }
                    return Ok(());
                }
            },
        };
        let known = Key::of(&found).and_then(|key| self.known.get(&key).copied());
        if let Some(known) = known {
            let member = &mut self.family.members[known];
            member.is_named |= job.origin != Origin::Listed;
            // The image above says what it is read as; only a guess is replaced.
            if job.format.is_none_or(|format| format == member.driver) {
                return Ok(());
            }
        }
        if self.family.members.len() >= MAX_IMAGES {
            self.family.is_cut = true;
            return Ok(());
        }
        let options = ChainOptions {
            format: job.format,
            ..self.options.clone()
        };
        match Link::open(again(&found)?, &options, job.stated, &mut self.search) {
            Ok(link) => {
                let seen = Seen {
                    found: &found,
                    options: &options,
                    stated: job.stated,
                    is_named: job.origin != Origin::Listed,
                    known,
                };
                self.add(link, &seen);
            }
            Err(e) if job.origin == Origin::Named => return Err(e),
            Err(e) => self.family.unread.push(e),
        }
        Ok(())
    }

    fn add(&mut self, link: Link, seen: &Seen<'_>) {
        let Link { above, below } = link;
        let backing = above.image.backing();
        let mut troubles = Vec::new();
        let below = below.unwrap_or_else(|e| {
            // In another state is still there.
            let accepted = seen.in_another_state(&e, &mut self.search);
            troubles.push(Trouble::new(&e, accepted.is_some()));
            accepted
        });
        let parent = below.as_ref().map(|layer| self.expect(layer));
        let names = backing.iter().flat_map(|b| b.names.iter());
        let leads = names
            .map(|name| self.lead(&above, name))
            .collect::<Vec<_>>();
        let member = Member {
            info: match ImageInfo::of(&*above.image) {
                Ok(info) => info,
                Err(e) => return self.family.unread.push(e),
            },
            identity: above.image.identity(),
            state: above.image.state(),
            own: own(&*above.image).ok(),
            names: Vec::new(),
            parent: None,
            troubles,
            key: Key::of_layer(&above),
            driver: above.image.driver(),
            is_named: seen.is_named,
        };
        let index = seen.known.unwrap_or(self.family.members.len());
        self.known.insert(member.key.clone(), index);
        match seen.known {
            Some(index) => {
                self.family.members[index] = member;
                self.parents[index] = parent;
                self.leads[index] = leads;
            }
            None => {
                self.family.members.push(member);
                self.parents.push(parent);
                self.leads.push(leads);
            }
        }
    }

    /// Has the image below another looked at too.
    fn expect(&mut self, layer: &Layer) -> Key {
        let key = Key::of_layer(layer);
        if !self.looked.insert((key.clone(), layer.image.driver().name)) {
            return key;
        }
        let found = match layer.image.storage().fd() {
            Some(fd) if layer.namer.id.is_some() => {
                let path = layer.namer.path.clone();
                let file = fd.try_clone_to_owned().map(File::from);
                file.ok().map(|file| Found::File { file, path })
            }
            _ => Some(Found::Remote {
                uri: layer.namer.path.clone(),
            }),
        };
        if let Some(found) = found {
            self.jobs.push_front(Job {
                place: Place::Found(found),
                format: Some(layer.image.driver()),
                stated: layer.namer.trust,
                origin: Origin::Linked,
            });
        }
        key
    }

    /// Where a name leads, as far as the policy lets anybody look.
    fn lead(&self, above: &Layer, name: &BackingName) -> Result<Key, String> {
        let ChainOptions {
            references,
            remotes,
            ..
        } = &self.options;
        let what = "backing file";
        let found = above
            .namer
            .open(&name.path, what, Access::Read, references, remotes);
        let said = |e: Error| match std::error::Error::source(&e) {
            Some(cause) => format!("{}: {cause}", e.message()),
            None => e.message().to_owned(),
        };
        let found = found.map_err(said)?;
        Key::of(&found).ok_or_else(|| "is nothing that has an identity".to_owned())
    }

    /// With all links drawn, and what only the whole family shows.
    fn finish(self) -> Family {
        let (mut family, known) = (self.family, self.known);
        let index = |key: &Key| known.get(key).copied();
        for (at, (parent, leads)) in self.parents.iter().zip(self.leads).enumerate() {
            family.members[at].parent = parent.as_ref().and_then(index);
            let backing = family.members[at].info.backing.clone();
            let names = backing.map(|b| b.names).unwrap_or_default();
            let names = names.into_iter().zip(leads).map(|(name, lead)| Name {
                name,
                leads_to: lead.and_then(|key| {
                    index(&key).ok_or_else(|| "is no image that was looked at".to_owned())
                }),
            });
            family.members[at].names = names.collect();
        }
        let mut family = family.without_loose_files();
        trouble::judge(&mut family.members);
        family
    }
}

impl Family {
    /// Without files of directories that are any bytes and belong to nobody.
    fn without_loose_files(mut self) -> Self {
        let linked: HashSet<usize> = self.members.iter().filter_map(|m| m.parent).collect();
        let members = self.members.iter().enumerate();
        let is_kept: Vec<bool> = members
            .map(|(at, m)| m.is_named || !m.driver.is_plain || linked.contains(&at))
            .collect();
        let mut place = 0;
        let places: Vec<Option<usize>> = is_kept
            .iter()
            .map(|kept| {
                let at = place;
                place += usize::from(*kept);
                kept.then_some(at)
            })
            .collect();
        let mut kept = is_kept.iter().copied();
        self.members.retain(|_| kept.next().unwrap_or(true));
        let moved = |index: usize| places.get(index).copied().flatten();
        for member in &mut self.members {
            member.parent = member.parent.and_then(moved);
            for name in &mut member.names {
                let kept = name.leads_to.as_ref().ok().copied().map(moved);
                if let Some(kept) = kept {
                    name.leads_to = kept.ok_or_else(|| "is no image that is known".to_owned());
                }
            }
        }
        self
    }

    /// The images that have the one in the file `id` below them, whether what their names lead to is
    /// what they want or not.
    pub fn above(&self, id: HostId) -> Vec<&Member> {
        let key = Key::Host(id);
        let below = self.members.iter().position(|member| member.key == key);
        let names_it = |member: &&Member| {
            let mut leads = member.names.iter().filter_map(|n| n.leads_to.as_ref().ok());
            below.is_some() && (member.parent == below || leads.any(|at| Some(*at) == below))
        };
        self.members.iter().filter(names_it).collect()
    }

    /// By image, those right above it, in order.
    pub fn children(&self) -> Vec<Vec<usize>> {
        let mut children = vec![Vec::new(); self.members.len()];
        for (index, member) in self.members.iter().enumerate() {
            if let Some(parent) = member.parent {
                children[parent].push(index);
            }
        }
        children
    }

    /// All images with their depths, each tree from its base on, each image before what lies above
    /// it; of a cycle, from one of its images on.
    pub fn in_order(&self) -> Vec<(usize, usize)> {
        let children = self.children();
        let mut order = Vec::with_capacity(self.members.len());
        let mut seen = vec![false; self.members.len()];
        let bases = (0..self.members.len()).filter(|i| self.members[*i].parent.is_none());
        // What is left after the bases lies on cycles, and above them.
        for base in bases.chain(0..self.members.len()) {
            let mut next = vec![(base, 0)];
            while let Some((index, depth)) = next.pop() {
                if std::mem::replace(&mut seen[index], true) {
                    continue;
                }
                order.push((index, depth));
                next.extend(
                    children[index]
                        .iter()
                        .rev()
                        .map(|child| (*child, depth + 1)),
                );
            }
        }
        order
    }

    /// Whether anything is wrong with any link, or an image could not be read.
    pub fn has_faults(&self) -> bool {
        let mut troubles = self.members.iter().flat_map(|member| &member.troubles);
        let is_damaged = |error: &Error| error.kind() != ErrorKind::Unsupported;
        self.unread.iter().any(is_damaged) || troubles.any(|trouble| trouble.fault.is_wrong())
    }
}

/// The same once more, for another look.
fn again(found: &Found) -> Result<Found> {
    Ok(match found {
        Found::File { file, path } => Found::File {
            file: File::from(
                file.as_fd()
                    .try_clone_to_owned()
                    .map_err(|e| Error::io("open", e))
                    .at(path)?,
            ),
            path: path.clone(),
        },
        Found::Remote { uri } => Found::Remote { uri: uri.clone() },
    })
}

/// Bytes of the disk that an image stores itself.
///
/// # Errors
/// Those of [`Image::map`].
pub fn own(image: &dyn Image) -> Result<u64> {
    let (size, mut at, mut sum) = (image.virtual_size(), 0, 0);
    while at < size {
        let run = image.map(at, size - at, Wait::Yes)?;
        if matches!(run.source, Source::Stored { .. } | Source::Encoded) {
            sum += run.len;
        }
        at += run.len;
    }
    if !image.may_be_unwritten() {
        return Ok(sum);
    }
    let taken = HostInfo::of(image.storage())?.disk_size;
    Ok(sum.min(taken.unwrap_or(sum)))
}

//! Images taken out of the middle of a chain: what they have goes into one below them, and those
//! above are linked to that.
//!
//! The order is what makes it safe.  While data goes into the base, FILE still hides it, so that the
//! children read as before; the base keeps the state that the image above it has recorded.  Once the
//! base is on stable media each child is linked to it by one change of its header: before and after it
//! reads the same.  Only when no child needs them are the images between emptied or removed, from the
//! base up, so that what is left of them still reads as FILE did.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};

use crate::chain::open::{ChainOptions, Follow};
use crate::chain::{self, Chain, HostFile};
use crate::cli::backing::{clean, describe, relative};
use crate::cli::commit::figures::Figures;
use crate::cli::commit::{Args, depth_of, expect};
use crate::cli::common::ProgressArgs;
use crate::cli::exit::Exit;
use crate::cli::reach::{has_names, refuse_unreachable};
use crate::cli::removed::parent;
use crate::cli::target::look;
use crate::cli::{Globals, interrupt, progress, signal};
use crate::copy::{self, default_workers};
use crate::error::{Error, ErrorKind, Result};
use crate::image::create::CreateBacking;
use crate::image::{Driver, Image, Relink, Role, Source, Wait};
use crate::storage::open::{Access, Sharing};
use crate::storage::{HostId, Storage};
use crate::util::moment::moment;
use crate::util::text::printable;

/// One of the images, by what it is and where.
#[derive(Debug, Clone)]
pub(in crate::cli) struct Node {
    pub(in crate::cli) path: PathBuf,
    pub(in crate::cli) id: Option<HostId>,
    pub(super) driver: &'static Driver,
    /// Bytes of its disk.
    pub(in crate::cli) size: u64,
    /// Further files that it is made of.
    pub(super) others: Vec<(PathBuf, Option<HostId>)>,
}

impl Node {
    fn of(chain: &Chain, layer: usize) -> Option<Self> {
        let image = chain.layers().get(layer)?;
        // Names in it lead from where the file is, and not from where a link to it is.
        let real = |path: &Path| look(path).map_or_else(|_| clean(path), |(path, _)| clean(&path));
        let place = |storage: &dyn Storage| Some((real(storage.path()?), storage.host_id()));
        let (path, id) = place(image.storage())?;
        let parts = image
            .parts()
            .into_iter()
            .filter(|part| part.role == Role::Data);
        Some(Self {
            path,
            id,
            driver: image.driver(),
            size: image.virtual_size(),
            others: parts.filter_map(|part| place(part.storage)).collect(),
        })
    }

    /// Removes it, the file that names the others last.
    fn remove(&self) -> Result<()> {
        for (path, id) in self.others.iter().chain([&(self.path.clone(), self.id)]) {
            let failed = |e| Error::io("remove", e).at(path);
            if HostId::named(path) != *id {
                return Err(Error::new(ErrorKind::Io, "was replaced meanwhile").at(path));
            }
            // The file itself, not a link to it.
            let path = &*std::fs::canonicalize(path).map_err(failed)?;
            moment();
            std::fs::remove_file(path).map_err(failed)?;
            let directory = File::open(parent(path));
            directory.and_then(|d| d.sync_all()).map_err(failed)?;
        }
        Ok(())
    }
}

/// What was asked for.
pub(in crate::cli) struct Wanted {
    /// The highest image that goes into the base.
    pub(in crate::cli) file: PathBuf,
    /// The base, as `--base` has it.
    pub(in crate::cli) base: Option<OsString>,
    /// The images above.
    pub(in crate::cli) children: Vec<PathBuf>,
    /// Whether the images that went into the base are removed.
    pub(in crate::cli) remove: bool,
    /// How the images are read.
    pub(in crate::cli) options: ChainOptions,
}

/// What there is to do.
pub(in crate::cli) struct Plan {
    pub(super) wanted: Wanted,
    /// For looking, without locks.
    pub(in crate::cli) look: ChainOptions,
    /// FILE and the images between it and the base, top first, as far as they are there.
    pub(in crate::cli) layers: Vec<Node>,
    pub(in crate::cli) base: Node,
    /// The children that have FILE below them.
    pub(in crate::cli) waiting: Vec<Node>,
    /// Those that have the base below them.
    pub(super) linked: Vec<Node>,
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps it from being done.
pub(super) fn run(args: &Args, globals: &Globals) -> anyhow::Result<Exit> {
    signal::catch()?;
    let options = args
        .open
        .plan_cached(args.format, Access::Read, args.cache)?;
    let plan = Plan::new(Wanted {
        file: args.file.clone(),
        base: args.base.clone(),
        children: args.children.clone(),
        remove: args.remove,
        options,
    })?;
    plan.refuse()?;
    if args.dry_run {
        plan.say(globals)?;
        return Ok(Exit::Done);
    }
    let mut done = false;
    if !plan.waiting.is_empty() {
        plan.merge(&args.progress, globals)?;
        done = true;
        // Somebody may have made one meanwhile: what lies over the base is safe, others are not.
        plan.refuse_others()?;
    }
    done |= match args.remove {
        true => plan.remove()?,
        false => plan.empty(&|text| globals.note(text))?,
    };
    globals.note("images that have these below them and lie in other directories are not known");
    globals.say(match done {
        true => "Image committed.",
        false => "Nothing is left to do.",
    })?;
    Ok(Exit::Done)
}

impl Plan {
    /// Looks at the images; nothing is refused yet that could be done.
    ///
    /// # Errors
    /// `Invalid` where the images do not lie on each other so; those of the images.
    pub(in crate::cli) fn new(wanted: Wanted) -> Result<Self> {
        let mut look = wanted.options.clone();
        look.storage.sharing = Sharing::Force;
        let children = wanted.children.iter();
        let children = children.map(|child| Child::open(child, &look));
        let children = children.collect::<Result<Vec<_>>>()?;
        let (layers, base) = find(&wanted, &look, &children)?;
        let mut plan = Self {
            wanted,
            look,
            layers,
            base,
            waiting: Vec::new(),
            linked: Vec::new(),
        };
        for child in children {
            plan.add(child)?;
        }
        Ok(plan)
    }

    fn add(&mut self, child: Child) -> Result<()> {
        let Child { node, below } = child;
        let mut own = self.layers.iter().chain([&self.base]);
        if own.any(|own| own.id == node.id) {
            let text = "is one of the images that go into the base, or that itself (allowed as a \
                        child: one that has FILE below it)";
            return Err(Error::invalid(text).at(&node.path));
        }
        let is = |other: Option<&Node>| other.is_some_and(|other| below.id == other.id);
        let known = self
            .waiting
            .iter()
            .chain(&self.linked)
            .any(|n| n.id == node.id);
        match (is(self.layers.first()), is(Some(&self.base)), known) {
            (_, _, true) => {}
            (true, ..) => self.waiting.push(node),
            (_, true, _) => self.linked.push(node),
            _ => {
                let text = format!(
                    "has {} below it (allowed as a child: an image that has {} below it)",
                    printable(&below.path),
                    printable(&self.wanted.file)
                );
                return Err(Error::invalid(text).at(&node.path));
            }
        }
        Ok(())
    }

    fn say(&self, globals: &Globals) -> anyhow::Result<()> {
        if self.waiting.is_empty() {
            return globals.say("All children are linked already.");
        }
        let chain = chain::open::open(&self.wanted.file, &self.look)?;
        Figures::of(&chain, self.layers.len())?.say(globals)
    }

    /// Moves all data into the base, and links the children to it.
    fn merge(&self, progress: &ProgressArgs, globals: &Globals) -> anyhow::Result<()> {
        let file = &self.wanted.file;
        let options = self.wanted.options.clone();
        // Whoever has one of them open keeps it, before anything is moved.
        let mut children = Vec::new();
        for child in &self.waiting {
            children.push(self.lock_child(child, &options)?);
        }
        for layer in &self.layers {
            drop(self.for_writing(layer)?);
        }
        let full = chain::open::open(file, &options)?;
        let mut files = full.files().into_iter();
        let target = files.find(|f| f.layer == self.layers.len() && f.role == Role::Header);
        let target = target.filter(|target| target.id == self.base.id);
        let target = target.ok_or_else(|| Error::invalid("has changed meanwhile").at(file))?;
        drop(full);
        let (upper, base) = self.open_in_two(options, &target, &mut children)?;
        let bar = progress::start("commit", upper.virtual_size(), progress, globals);
        let moved = match self.linked.is_empty() {
            true => copy::commit(&upper, &base, default_workers(), &bar),
            // All is there: what others have recorded of it stays right.
            false => Ok(()),
        };
        let closed = base.close();
        moved?;
        closed?;
        bar.finish();
        let backings = self.waiting.iter().map(|child| self.backing(&base, child));
        let backings = backings.collect::<Result<Vec<_>>>()?;
        drop((upper, base));
        for ((child, backing), mut chain) in self.waiting.iter().zip(backings).zip(children) {
            link(&mut chain, &backing).map_err(|e| e.at(&child.path))?;
        }
        Ok(())
    }

    /// Opens a child, which nobody else may change from then on, and looks at it once more.
    fn lock_child(&self, child: &Node, options: &ChainOptions) -> Result<Chain> {
        let chain = self.for_writing(child)?;
        let below = Child::open(&child.path, &self.look)?.below;
        if Some(below.id) != self.layers.first().map(|file| file.id) {
            let text = "was given another backing image meanwhile";
            return Err(Error::new(ErrorKind::Io, text).at(&child.path));
        }
        let has_names = has_names(chain.top());
        refuse_unreachable(has_names, &self.base.path, &child.path, &options.references)?;
        Ok(chain)
    }

    /// Opens FILE and the images down to the base, and the base, which may be written to: the image
    /// right above it accepts it at every moment, and all `children` can have it below them.
    fn open_in_two(
        &self,
        mut options: ChainOptions,
        target: &HostFile,
        children: &mut [Chain],
    ) -> Result<(Chain, Chain)> {
        let file = &self.wanted.file;
        let expects = self.layers.len() == 1 && self.linked.is_empty();
        if expects {
            options.storage.access = Access::Write;
        }
        let (mut upper, base) = chain::open::open_in_two(file, &options, target)?;
        for (child, chain) in self.waiting.iter().zip(children) {
            let backing = self.backing(&base, child)?;
            let relink = relinks(chain).and_then(|relink| relink.may_relink(Some(&backing)));
            relink.map_err(|e| e.at(&child.path))?;
        }
        if !expects || !expect(&mut upper, &base).map_err(|e| e.at(file))? {
            // What it has recorded stays right, and nobody else may have recorded it.
            base.top().keep_state();
        }
        Ok((upper, base))
    }

    /// What a child's header is to say of the base.
    ///
    /// # Errors
    /// The host's.
    pub(in crate::cli) fn backing(&self, base: &Chain, child: &Node) -> Result<CreateBacking> {
        let home = parent(&child.path);
        let name = relative(home, &self.base.path);
        if self.base.id.is_none() || HostId::named(home.join(&name)) != self.base.id {
            let text = format!("{} does not lead to the base from there", printable(&name));
            return Err(Error::new(ErrorKind::Io, text).at(&child.path));
        }
        describe(name.as_os_str(), home, &self.base.path, base.top())
    }

    /// Opens one image, and nothing below it; it must be the one that was looked at.
    ///
    /// # Errors
    /// `Io` where it is not; those of the image.
    pub(in crate::cli) fn for_writing(&self, node: &Node) -> Result<Chain> {
        let mut options = ChainOptions {
            format: Some(node.driver),
            follow: Follow::Layers(1),
            ..self.look.clone()
        };
        options.storage.access = Access::Write;
        options.storage.sharing = Sharing::Locked;
        let chain = chain::open::open(&node.path, &options)?;
        match chain.top().storage().host_id() == node.id {
            true => Ok(chain),
            false => Err(Error::new(ErrorKind::Io, "was replaced meanwhile").at(&node.path)),
        }
    }

    /// Removes FILE and what lies between it and the base, the lowest first; whether there was any.
    fn remove(&self) -> Result<bool> {
        for node in self.layers.iter().rev() {
            interrupt::check()?;
            // Nobody has it open, and nobody opens it any more.
            let chain = self.for_writing(node)?;
            node.remove()?;
            drop(chain);
        }
        Ok(!self.layers.is_empty())
    }

    /// Empties them in the same order; whether any had something.
    ///
    /// # Errors
    /// Those of the images.
    pub(in crate::cli) fn empty(&self, note: &dyn Fn(&str)) -> Result<bool> {
        let mut done = false;
        // The base has become as long as FILE.
        let mut shortest = u64::MAX;
        for node in self.layers.iter().rev() {
            interrupt::check()?;
            if node.size > shortest {
                note(&format!(
                    "{}: is not emptied: an image between it and the base is shorter",
                    printable(&node.path)
                ));
                continue;
            }
            shortest = node.size;
            let mut chain = self.for_writing(node)?;
            if !has_any(chain.top())? {
                continue;
            }
            chain.top().keep_state();
            let emptied = match chain.top_mut().as_empty() {
                Some(image) => image.empty(),
                None => Err(Error::unsupported("the format cannot")),
            };
            match emptied {
                Err(e) if e.kind() == ErrorKind::Unsupported => note(&format!(
                    "{}: is not emptied ({}, format '{}'); what it has is in the base too",
                    printable(&node.path),
                    e.message(),
                    node.driver.name
                )),
                emptied => {
                    emptied.map_err(|e| e.at(&node.path))?;
                    done = true;
                }
            }
            chain.close()?;
        }
        Ok(done)
    }
}

/// Has an image lie over another, over which it reads the same.
///
/// # Errors
/// `Unsupported`; the host's.
pub(in crate::cli) fn link(chain: &mut Chain, backing: &CreateBacking) -> Result<()> {
    chain.top().keep_state();
    relinks(chain)?.relink(Some(backing))?;
    chain.close()
}

/// What changes what an image says of the one below it.
///
/// # Errors
/// `Unsupported`.
pub(in crate::cli) fn relinks(chain: &mut Chain) -> Result<&mut dyn Relink> {
    let name = chain.top().driver().name;
    chain.top_mut().as_relink().ok_or_else(|| {
        let text = format!("images of format '{name}' cannot be given another backing image");
        Error::unsupported(text)
    })
}

/// Whether an image hides anything of what lies below it, be it by zeroes.
fn has_any(image: &dyn Image) -> Result<bool> {
    let (size, mut at) = (image.virtual_size(), 0);
    while at < size {
        let run = image.map(at, size - at, Wait::Yes)?;
        if !matches!(run.source, Source::Below) {
            return Ok(true);
        }
        at += run.len;
    }
    Ok(false)
}

/// An image above, and what lies right below it.
struct Child {
    node: Node,
    below: Node,
}

impl Child {
    fn open(path: &Path, look: &ChainOptions) -> Result<Self> {
        let options = ChainOptions {
            format: None,
            follow: Follow::Layers(2),
            parents: Vec::new(),
            ..look.clone()
        };
        let chain = chain::open::open(path, &options)?;
        let nodes = Node::of(&chain, 0).zip(Node::of(&chain, 1));
        let (node, below) =
            nodes.ok_or_else(|| Error::invalid("has no image below it").at(path))?;
        Ok(Self { node, below })
    }
}

/// FILE and the images between it and the base, and the base: as the chain has them, or where a run
/// that was killed has removed some, what is left of it, and what all children have below them.
fn find(wanted: &Wanted, look: &ChainOptions, children: &[Child]) -> Result<(Vec<Node>, Node)> {
    let refused = match chain::open::open(&wanted.file, look) {
        Ok(chain) => {
            let depth = match &wanted.base {
                None => 1,
                Some(base) => depth_of(&chain, base, &wanted.file)?,
            };
            let layers = (0..depth).filter_map(|layer| Node::of(&chain, layer));
            let layers: Vec<Node> = layers.collect();
            return match Node::of(&chain, depth) {
                Some(base) if layers.len() == depth => Ok((layers, base)),
                _ => Err(Error::invalid("has no backing file to commit into").at(&wanted.file)),
            };
        }
        Err(e) if e.kind() == ErrorKind::NotFound => e,
        Err(e) => return Err(e),
    };
    let Some(base) = children.first().map(|child| &child.below) else {
        return Err(refused);
    };
    let named = wanted.base.as_deref().map(Path::new);
    let is_named = |name: &Path| {
        let beside = parent(&wanted.file).join(name);
        HostId::named(name) == base.id || HostId::named(beside) == base.id
    };
    let agree = children.iter().all(|child| child.below.id == base.id);
    if !agree || !named.is_none_or(is_named) || HostId::named(&wanted.file) == base.id {
        return Err(refused);
    }
    Ok((left(&wanted.file, look, base), base.clone()))
}

/// What is left of the images from FILE down to the base.
fn left(file: &Path, look: &ChainOptions, base: &Node) -> Vec<Node> {
    let mut layers = Vec::new();
    loop {
        let options = ChainOptions {
            follow: Follow::Layers(layers.len() + 1),
            ..look.clone()
        };
        let opened = chain::open::open(file, &options);
        match opened.ok().and_then(|chain| Node::of(&chain, layers.len())) {
            Some(node) if node.id != base.id => layers.push(node),
            _ => return layers,
        }
    }
}

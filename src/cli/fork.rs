//! `vdtool fork`.

mod live;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::chain::family::{own, survey};
use crate::chain::open::{ChainOptions, Follow};
use crate::chain::{self, Chain};
use crate::cli::backing::{clean, describe, relative};
use crate::cli::common::{OpenArgs, parse_driver};
use crate::cli::create::{creator, format};
use crate::cli::exit::Exit;
use crate::cli::reach::{has_names, refuse_unreachable};
use crate::cli::removed::parent;
use crate::cli::target::{Durable, Existing, Target, look};
use crate::cli::{Globals, interrupt, signal};
use crate::error::{Error, ErrorKind, Result};
use crate::image::create::{CreateBacking, CreateOptions};
use crate::image::{Driver, Image};
use crate::storage::HostId;
use crate::storage::open::{Access, Sharing};
use crate::util::moment::moment;
use crate::util::text::printable;

pub(super) use live::{Live, ids};

const HELP: &str = "\
EXAMPLES:
  vdtool fork disk.vhd base.vhd
  vdtool fork disk.qcow2 base.qcow2 test.qcow2

NOTES:
  The file of FILE goes on as NEW, not a byte of it copied, and an empty image over it takes the name
  FILE; NEW2 is another one. So FILE reads as before, and what is written to it from then on does not
  change NEW, which is to be left alone. At any moment FILE is the old file or the new image. Where
  the program is killed the same command finishes what it began. An image that others in its
  directory have below them is refused: they would have to be linked to NEW. What lies below FILE must
  be in the directory of NEW or below it, and NEW in that of FILE, as for all images; --allow-ref
  widens that here too, and every later command needs it as well.

EXIT STATUS:
  0              done
  1              failed: FILE reads as before
  2              wrong usage
  63             the format has no such operation
  129, 130, 143  stopped by SIGHUP, SIGINT, SIGTERM; as 1";

/// Arguments of `fork`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct Args {
    /// Format of the image; without it the content decides.
    #[arg(short, long, value_name = "FMT", value_parser = parse_driver)]
    pub format: Option<&'static Driver>,
    /// How the image is opened.
    #[command(flatten)]
    pub open: OpenArgs,
    /// The image.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// The name that its content gets.
    #[arg(value_name = "NEW")]
    pub new: PathBuf,
    /// Another empty image over it.
    #[arg(value_name = "NEW2")]
    pub second: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps it from being done.
pub fn run(args: &Args, globals: &Globals) -> anyhow::Result<Exit> {
    signal::catch()?;
    let options = args.open.plan(args.format, Access::Read)?;
    let fork = Fork::new(args, options)?;
    let is_done = fork.is_done()?;
    let second = match &args.second {
        Some(second) => fork.begin_second(second, is_done)?,
        None => None,
    };
    match is_done {
        true => globals.note(&format!(
            "{}: is an empty image over {} already",
            printable(&args.file),
            printable(&args.new)
        )),
        false => fork.carry_out()?,
    }
    if let Some(second) = second {
        fork.finish_second(second)?;
    }
    globals.say("Image forked.")?;
    Ok(Exit::Done)
}

/// What is to be done.
struct Fork<'a> {
    args: &'a Args,
    options: ChainOptions,
    /// Both absolute, and without symbolic links.
    file: PathBuf,
    new: PathBuf,
}

impl<'a> Fork<'a> {
    fn new(args: &'a Args, mut options: ChainOptions) -> Result<Self> {
        let (file, existing) = look(&args.file)?;
        let refused = |text: &str, path: &Path| Err(Error::invalid(text).at(path));
        match existing {
            Existing::File(_) => {}
            Existing::Nothing => {
                let missing = rustix::io::Errno::NOENT.into();
                return Err(Error::io("open", missing).at(&args.file));
            }
            _ => {
                return refused(
                    "is no file that has a name (allowed: a regular file)",
                    &args.file,
                );
            }
        }
        let (new, existing) = look(&args.new)?;
        if !matches!(existing, Existing::Nothing | Existing::File(_)) {
            return refused(
                "is no name for a file (allowed: a name that is free)",
                &args.new,
            );
        }
        let itself = [Some(&args.new), args.second.as_ref()];
        for name in itself.into_iter().flatten() {
            if clean(&look(name)?.0) == clean(&file) {
                return refused("is FILE itself (allowed: a name that is free)", name);
            }
        }
        if let Some(second) = &args.second
            && clean(&look(second)?.0) == clean(&new)
        {
            return refused("is named twice", second);
        }
        let directory = std::fs::metadata(parent(&new));
        directory.map_err(|e| Error::io("open the directory", e).at(&args.new))?;
        options.storage.sharing = Sharing::Force;
        Ok(Self {
            file: clean(&file),
            new: clean(&new),
            args,
            options,
        })
    }

    fn open(&self, path: &Path, layers: usize) -> Result<Chain> {
        let options = ChainOptions {
            follow: Follow::Layers(layers),
            ..self.options.clone()
        };
        chain::open::open(path, &options)
    }

    /// Whether NEW is the base of an empty FILE, as a run that was killed leaves them; where it was
    /// killed before, what it left is removed.
    ///
    /// # Errors
    /// `Invalid` where NEW is anything else.
    fn is_done(&self) -> Result<bool> {
        let Some(id) = HostId::named(&self.new) else {
            return Ok(false);
        };
        if HostId::named(&self.file) == Some(id) {
            return Ok(false);
        }
        let taken = || Err(taken(&self.args.new));
        let mut options = self.options.clone();
        options.references.allow([self.new.clone()]);
        options.follow = Follow::Layers(2);
        let below = |chain: &Chain| chain.layers().get(1).and_then(|l| l.storage().host_id());
        if let Ok(chain) = chain::open::open(&self.file, &options)
            && below(&chain) == Some(id)
            && own(chain.top())? == 0
        {
            return Ok(true);
        }
        // An empty image that has itself below it was to be exchanged with FILE.
        let Ok(left) = self.open(&self.new, 1) else {
            return taken();
        };
        let names = left.top().backing().map(|b| b.names).unwrap_or_default();
        let home = chain::open::home(&left)?;
        let mut leads = names
            .iter()
            .map(|n| HostId::named(home.path().join(&n.path)));
        if !leads.any(|lead| lead == Some(id)) || own(left.top())? != 0 {
            return taken();
        }
        moment();
        std::fs::remove_file(&self.new).map_err(|e| Error::io("remove", e).at(&self.args.new))?;
        Ok(false)
    }

    fn carry_out(&self) -> Result<()> {
        let moves = parent(&self.new) != parent(&self.file);
        let target = Target::begin(&self.args.file)?;
        let chain = self.open(&self.file, 2)?;
        self.refuse_children(&chain)?;
        self.refuse_linked(&chain)?;
        if chain.top().parts().len() > 1 && moves {
            let text = "is made of several files, which are not moved to another directory";
            return Err(Error::unsupported(text).at(&self.args.file));
        }
        let lower = match moves {
            true => self.lower(&chain)?,
            false => None,
        };
        let backing = named(chain.top(), &self.new, parent(&self.file))?;
        empty_over(&target, chain.top().driver(), backing)?;
        self.refuse_unreachable(target.path(), &self.new, &self.file)?;
        if let Some(lower) = &lower {
            self.refuse_unreachable(&self.file, &lower.absolute, &self.new)?;
            // A name that leads there from both places.
            let name = lower.absolute.clone().into();
            let create = CreateBacking {
                name,
                ..lower.clone()
            };
            self.relink(&self.file, &create)?;
        }
        let old = chain.top().storage().fd();
        let old = old.ok_or_else(|| Error::invalid("is no file").at(&self.args.file))?;
        target.commit_keeping(old, &self.new)?;
        drop(chain);
        lower.map_or(Ok(()), |lower| self.relink(&self.new, &lower))
    }

    /// Refuses to have `below` lie below the image that is open at `image`, where that, at `file`,
    /// could not open it.
    fn refuse_unreachable(&self, image: &Path, below: &Path, file: &Path) -> Result<()> {
        let options = ChainOptions {
            follow: Follow::No,
            format: None,
            ..self.options.clone()
        };
        let has_names = has_names(chain::open::open(image, &options)?.top());
        refuse_unreachable(has_names, below, file, &self.options.references)
    }

    /// What lies below the image, as it is to be named from where that moves; `None`: nothing, or it
    /// has no name.
    fn lower(&self, chain: &Chain) -> Result<Option<CreateBacking>> {
        let names = chain.top().backing().map(|b| b.names).unwrap_or_default();
        let lower = chain.layers().get(1).filter(|_| !names.is_empty());
        let Some((lower, path)) = lower.and_then(|l| Some((l, l.storage().path()?))) else {
            return Ok(None);
        };
        named(&**lower, &clean(path), parent(&self.new)).map(Some)
    }

    /// Refuses an image that others have below them: they would name one that changes.
    fn refuse_children(&self, chain: &Chain) -> Result<()> {
        let Some(id) = chain.top().storage().host_id() else {
            return Ok(());
        };
        let places = [parent(&self.file).to_owned()];
        let family = survey(&places, &self.options, &interrupt::check)?;
        match &*family.above(id) {
            [] => Ok(()),
            [child, others @ ..] => {
                let text = format!(
                    "lies below {}{} (allowed: an image that no other in its directory has below it)",
                    printable(child.info.path.as_deref().unwrap_or(Path::new(""))),
                    match others.len() {
                        0 => String::new(),
                        more => format!(" and {more} more"),
                    }
                );
                Err(Error::invalid(text).at(&self.args.file))
            }
        }
    }

    /// Refuses a file that has other names than FILE and, after a run that was killed, NEW: who writes
    /// by one of them would change the base.  Where NEW leads to FILE by the one name that it has, the
    /// new image would take that, and nothing would be left of FILE.
    fn refuse_linked(&self, chain: &Chain) -> Result<()> {
        let id = chain.top().storage().host_id();
        let own = 1 + u64::from(HostId::named(&self.new) == id);
        let found = std::fs::metadata(&self.file);
        let names = found.map_err(|e| Error::io("look at", e).at(&self.file))?;
        match names.nlink() {
            links if links == own => Ok(()),
            links if links < own => {
                let text = "is FILE itself, by another path (allowed: a name that is free)";
                Err(Error::invalid(text).at(&self.args.new))
            }
            links => Err(Error::invalid(format!(
                "has {} other names (hard links), by which the base could be written to (allowed: none)",
                links - own
            ))
            .at(&self.args.file)),
        }
    }

    /// Has the image at `path` name what lies below it so; the target has FILE locked.
    fn relink(&self, path: &Path, create: &CreateBacking) -> Result<()> {
        let mut options = self.options.clone();
        options.references.allow([create.absolute.clone()]);
        options.follow = Follow::Layers(2);
        options.storage.access = Access::Write;
        if path == self.new {
            options.storage.sharing = Sharing::Locked;
        }
        let mut image = chain::open::open(path, &options)?;
        image.top().keep_state();
        let driver = image.top().driver();
        let relink = image.top_mut().as_relink().ok_or_else(|| {
            let text = format!(
                "images of format '{}' cannot be given other names",
                driver.name
            );
            Error::unsupported(text).at(path)
        })?;
        relink.relink(Some(create)).map_err(|e| e.at(path))?;
        image.close()
    }

    /// Takes the name of the other empty image over NEW, which is free, or was made by a run that was
    /// killed.
    fn begin_second<'p>(&self, second: &'p Path, is_done: bool) -> Result<Option<&'p Path>> {
        let (path, existing) = look(second)?;
        if matches!(existing, Existing::Nothing) {
            return Ok(Some(second));
        }
        let below = |chain: &Chain| chain.layers().get(1).and_then(|l| l.storage().host_id());
        let found = self.open(&path, 2).ok().and_then(|chain| below(&chain));
        match is_done && found.is_some() && found == HostId::named(&self.new) {
            true => Ok(None),
            false => Err(taken(second)),
        }
    }

    /// Makes another empty image over NEW.
    fn finish_second(&self, second: &Path) -> Result<()> {
        let chain = self.open(&self.new, 1)?;
        let target = Target::begin(second)?;
        let home = clean(&look(second)?.0);
        let backing = named(chain.top(), &self.new, parent(&home))?;
        empty_over(&target, chain.top().driver(), backing)?;
        self.refuse_unreachable(target.path(), &self.new, &home)?;
        target.commit(Durable::Yes)
    }
}

fn taken(path: &Path) -> Error {
    Error::invalid("is there already (allowed: a name that is free)").at(path)
}

/// What the header of an image in the directory `home` says about `image` at the path `absolute`.
fn named(image: &dyn Image, absolute: &Path, home: &Path) -> Result<CreateBacking> {
    let name = relative(home, absolute);
    describe(name.as_os_str(), home, absolute, image)
}

/// Makes an image that has nothing of its own where `target` is written.
fn empty_over(target: &Target, driver: &'static Driver, backing: CreateBacking) -> Result<()> {
    let creator = creator(driver)?;
    let size = backing.virtual_size;
    let options = CreateOptions {
        size,
        backing: Some(backing),
        ..CreateOptions::default()
    };
    let options = (creator.settle)(&options)?;
    if options.size != size {
        let text = format!(
            "an image over it would have {} bytes, not the {size} of its disk",
            options.size
        );
        return Err(Error::new(ErrorKind::OutOfRange, text).at(target.path()));
    }
    format(target, creator, &options, &|_| {})
}

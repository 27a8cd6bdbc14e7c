//! `vdtool rebase`.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use uuid::Uuid;

use crate::chain::open::{ChainOptions, Follow, Home};
use crate::chain::{self, Chain, HostFile};
use crate::cli::backing;
use crate::cli::cache::CacheMode;
use crate::cli::common::{OpenArgs, ProgressArgs, parse_driver};
use crate::cli::exit::{Exit, usage};
use crate::cli::{Globals, progress, signal};
use crate::copy::rebase::Store;
use crate::copy::{self, Joined, default_workers};
use crate::error::{Error, Result};
use crate::formats;
use crate::image::create::CreateBacking;
use crate::image::{Driver, Relink};
use crate::storage::open::Access;
use crate::util::text::printable;

const HELP: &str = "\
EXAMPLES:
  vdtool rebase -b newbase.qcow2 -F qcow2 child.qcow2
  vdtool rebase -b '' child.qcow2
  vdtool rebase -u -b moved/base.qcow2 -F qcow2 child.qcow2

NOTES:
  The disk reads the same afterwards: what it has from the old backing image and the new one does
  not have is copied into FILE first. With -b '' all of it is, and FILE needs no backing image any
  more. With -u only the name is changed, and no data of the backing images is read: for one that
  was moved or renamed. Of FILE in a format that records the identity of its backing image, such as
  vhd, vhdx and vdi, the new one must be there. The name is relative to the directory of FILE.

EXIT STATUS:
  0              done
  1              failed: the disk of FILE is unharmed, and rebase can be run again
  2              wrong usage
  63             the format has no such operation
  129, 130, 143  stopped by SIGHUP, SIGINT, SIGTERM; as 1";

/// Arguments of `rebase`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct Args {
    /// Format of the image; without it the content decides.
    #[arg(short, long, value_name = "FMT", value_parser = parse_driver)]
    pub format: Option<&'static Driver>,
    /// The new backing image; an empty name: none.
    #[arg(
        short,
        long,
        value_name = "BACKING",
        required_unless_present = "unsafe_mode"
    )]
    pub backing: Option<OsString>,
    /// Format of the new backing image; without it the content decides, with -u what FILE records.
    #[arg(short = 'F', long = "new-backing-format", value_name = "FMT", value_parser = parse_driver)]
    pub new_backing_format: Option<&'static Driver>,
    /// Change the name only, and open neither backing image.
    #[arg(short = 'u', long = "unsafe", alias = "backing-unsafe")]
    pub unsafe_mode: bool,
    /// Compress what is copied, in formats that can.
    #[arg(short, long, conflicts_with = "unsafe_mode")]
    pub compress: bool,
    /// How the page cache is used for FILE.
    #[arg(short = 't', long, value_enum, value_name = "CACHE")]
    pub cache: Option<CacheMode>,
    /// How the page cache is used for the backing images.
    #[arg(short = 'T', long = "backing-cache", value_enum, value_name = "CACHE")]
    pub source_cache: Option<CacheMode>,
    /// How progress is shown.
    #[command(flatten)]
    pub progress: ProgressArgs,
    /// How the images are opened.
    #[command(flatten)]
    pub open: OpenArgs,
    /// The image whose backing image is changed.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

impl Args {
    /// The format of the new backing image; `--backing-format` is qemu-img's long word for it.
    fn new_format(&self) -> Option<&'static Driver> {
        self.new_backing_format.or(self.open.backing_format)
    }

    fn backing(&self) -> Option<&OsStr> {
        self.backing.as_deref().filter(|name| !name.is_empty())
    }

    fn plan(
        &self,
        format: Option<&'static Driver>,
        access: Access,
    ) -> anyhow::Result<ChainOptions> {
        let cache = match access {
            Access::Write => self.cache,
            Access::Read => self.source_cache,
        };
        self.open.plan_cached(format, access, cache)
    }
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps it from being done.
pub fn run(args: &Args, globals: &Globals) -> anyhow::Result<Exit> {
    if args.backing().is_none() && args.new_backing_format.is_some() {
        return Err(usage("-F names the format of -b, which is missing"));
    }
    match args.unsafe_mode {
        true => name_only(args)?,
        false => keep(args, globals)?,
    }
    Ok(Exit::Done)
}

/// Copies what would change, then changes the name.
fn keep(args: &Args, globals: &Globals) -> anyhow::Result<()> {
    let mut options = args.plan(args.format, Access::Write)?;
    let mut chain = chain::open::open_next(&args.file, &mut options)?;
    relink_of(&mut chain).map_err(|e| e.at(&args.file))?;
    // It reads as before.
    chain.top().keep_state();
    if args.compress {
        chain.top().as_compress().map_err(|e| e.at(&args.file))?;
    }
    if let Some(name) = args.backing() {
        backing::refuse_uri(chain.top().driver(), name).map_err(|e| e.at(&args.file))?;
    }
    let below = match args.backing() {
        Some(name) => Some(below(args, &chain, name, globals)?),
        None => None,
    };
    let (disk, create) = match below {
        Some(below) => (Joined::new(vec![below.chain])?, Some(below.create)),
        None => {
            args.open.parents.after([&chain]).refuse_any()?;
            (Joined::new(Vec::new())?, None)
        }
    };
    signal::catch()?;
    let total = chain.virtual_size();
    let bar = progress::start("rebase", total, &args.progress, globals);
    let store = match args.compress {
        true => Store::Compressed,
        false => Store::Plain,
    };
    copy::rebase(&chain, &disk, store, default_workers(), &bar)?;
    bar.finish();
    // The name changes only once all that it needs is on stable media.
    chain.flush()?;
    relink(&mut chain, create.as_ref(), &args.file)
}

fn name_only(args: &Args) -> anyhow::Result<()> {
    let options = ChainOptions {
        follow: Follow::No,
        ..args.plan(args.format, Access::Write)?
    };
    let mut chain = chain::open::open(&args.file, &options)?;
    let create = match args.backing() {
        None => None,
        Some(name) => {
            let Some(format) = args.new_format().or_else(|| recorded(&chain)) else {
                return Err(usage(
                    "-u does not open the backing image, and FILE records no format of it that is \
                     known, so -F must be given",
                ));
            };
            let home = chain::open::home(&chain)?;
            let absolute = backing::locate(&home, name);
            backing::refuse_uri(chain.top().driver(), name).map_err(|e| e.at(&args.file))?;
            refuse_own(&chain, &[HostFile::named(&absolute)], &args.file)?;
            let modified = backing::modified(&absolute);
            let (identity, state) = match chain.top().identity() {
                Some(_) => identity(args, &home, name, &absolute, format)?,
                None => (None, None),
            };
            Some(CreateBacking {
                name: name.to_owned(),
                relative: backing::relative(home.path(), &absolute),
                format: format.name,
                identity,
                state,
                modified: modified.unwrap_or(SystemTime::UNIX_EPOCH),
                virtual_size: 0,
                cluster_size: None,
                sector_size: None,
                physical_sector_size: None,
                absolute,
            })
        }
    };
    let done = relink_of(&mut chain).and_then(|top| {
        top.may_relink(create.as_ref())?;
        // Nobody knows what it reads as from the new name on.
        top.renew_state()?;
        top.relink(create.as_ref())
    });
    done.map_err(|e| e.at(&args.file))?;
    Ok(chain.close()?)
}

/// The format that the image records of what lies below it: a new name for it changes nothing.
fn recorded(chain: &Chain) -> Option<&'static Driver> {
    formats::by_name(&chain.top().backing()?.format?)
}

/// The identity of the new backing image and its state, in formats that record them.
fn identity(
    args: &Args,
    home: &Home,
    name: &OsStr,
    path: &Path,
    format: &'static Driver,
) -> anyhow::Result<(Option<Uuid>, Option<Uuid>)> {
    let options = ChainOptions {
        follow: Follow::No,
        ..args.plan(Some(format), Access::Read)?
    };
    let below = chain::open::open_from(home, name, path, &options)?;
    Ok((below.top().identity(), below.top().state()))
}

fn relink_of(chain: &mut Chain) -> Result<&mut dyn Relink> {
    let format = chain.top().driver().name;
    chain.top_mut().as_relink().ok_or_else(|| {
        Error::unsupported(format!(
            "images of format '{format}' cannot be given another backing image"
        ))
    })
}

fn relink(chain: &mut Chain, backing: Option<&CreateBacking>, file: &Path) -> anyhow::Result<()> {
    let done = relink_of(chain).and_then(|top| top.relink(backing));
    done.map_err(|e| e.at(file))?;
    Ok(chain.close()?)
}

/// The new backing image: open, and as the header is to name it.
struct Below {
    chain: Chain,
    create: CreateBacking,
}

fn below(args: &Args, top: &Chain, name: &OsStr, globals: &Globals) -> anyhow::Result<Below> {
    let home = chain::open::home(top)?;
    let absolute = backing::locate(&home, name);
    // Before its own lock keeps it out.
    refuse_own(top, &[HostFile::named(&absolute)], &args.file)?;
    let mut options = args.plan(args.new_format(), Access::Read)?;
    args.open.parents.after([top]).give(&mut options);
    let chain = chain::open::open_from(&home, name, &absolute, &options)?;
    refuse_own(top, &chain.files(), &args.file)?;
    let create = backing::describe(name, home.path(), &absolute, chain.top())?;
    if args.new_format().is_none() {
        globals.note(&format!(
            "{}: the content decided that its format is {} (-F names it)",
            printable(&absolute),
            create.format
        ));
    }
    Ok(Below { chain, create })
}

/// Refuses a new backing image that is made of a file of the image itself.
fn refuse_own(top: &Chain, below: &[HostFile], file: &Path) -> Result<()> {
    let mut own = top.files().into_iter().filter(|f| f.layer == 0);
    let is_own = |own: &HostFile| {
        let path = own.path.as_deref().unwrap_or(Path::new(""));
        below.iter().any(|b| b.is_same(own.id, path))
    };
    match own.any(|own| is_own(&own)) {
        true => Err(Error::invalid(
            "the new backing image is the image itself, or made of a file of it",
        )
        .at(file)),
        false => Ok(()),
    }
}

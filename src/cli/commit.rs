//! `vdtool commit`.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::chain::open::{ChainOptions, Follow};
use crate::chain::{self, Chain};
use crate::cli::cache::CacheMode;
use crate::cli::common::{OpenArgs, ProgressArgs, parse_driver};
use crate::cli::exit::Exit;
use crate::cli::{Globals, progress, signal};
use crate::copy::{self, default_workers};
use crate::error::{Error, ErrorKind, Result};
use crate::image::Driver;
use crate::storage::open::Access;
use crate::util::text::printable;

const HELP: &str = "\
EXAMPLES:
  vdtool commit child.qcow2
  vdtool commit -d child.vhd
  vdtool commit -b base.qcow2 grandchild.qcow2

NOTES:
  What the image has goes into its backing image, or, with -b, what all images above BASE have, the
  top-most where several have it, each byte once. A base that is smaller grows. Without -b and -d
  the image is emptied afterwards, in formats that can; its disk reads the same before, during and
  after. Images between the top and BASE, and others that have BASE below them, hold nonsense
  afterwards and are to be deleted.

EXIT STATUS:
  0              done
  1              failed: the disk of FILE is unharmed, and commit can be run again
  2              wrong usage
  63             the format has no such operation
  129, 130, 143  stopped by SIGHUP, SIGINT, SIGTERM; as 1";

/// Arguments of `commit`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct Args {
    /// Format of the image; without it the content decides.
    #[arg(short, long, value_name = "FMT", value_parser = parse_driver)]
    pub format: Option<&'static Driver>,
    /// The image below FILE to commit into; without it, the one right below. Implies -d.
    #[arg(short, long, value_name = "BASE")]
    pub base: Option<PathBuf>,
    /// Leave the image as it is instead of emptying it.
    #[arg(short, long)]
    pub drop: bool,
    /// How the page cache is used.
    #[arg(short = 't', long, value_enum, value_name = "CACHE")]
    pub cache: Option<CacheMode>,
    /// How progress is shown.
    #[command(flatten)]
    pub progress: ProgressArgs,
    /// How the images are opened.
    #[command(flatten)]
    pub open: OpenArgs,
    /// The top image.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps it from being done.
pub fn run(args: &Args, globals: &Globals) -> anyhow::Result<Exit> {
    let target = find(args)?;
    let empties = !args.drop && args.base.is_none();
    let access = if empties { Access::Write } else { Access::Read };
    let mut upper = chain::open::open(
        &args.file,
        &ChainOptions {
            follow: Follow::Layers(target.depth),
            ..args.open.plan_cached(args.format, access, args.cache)?
        },
    )?;
    let base = chain::open::open(
        &target.path,
        &args
            .open
            .plan_cached(Some(target.driver), Access::Write, args.cache)?,
    )?;
    signal::catch()?;
    let total = upper.virtual_size();
    let bar = progress::start("commit", total, &args.progress, globals);
    copy::commit(&upper, &base, default_workers(), &bar)?;
    bar.finish();
    base.flush()?;
    base.close()?;
    base.top().storage().sync()?;
    if empties {
        empty(&mut upper, &args.file, globals)?;
    }
    globals.say("Image committed.")?;
    Ok(Exit::Done)
}

/// What is committed into.
struct Target {
    /// Layers above it.
    depth: usize,
    path: PathBuf,
    driver: &'static Driver,
}

fn find(args: &Args) -> anyhow::Result<Target> {
    let chain = chain::open::open(
        &args.file,
        &args
            .open
            .plan_cached(args.format, Access::Read, args.cache)?,
    )?;
    let depth = match &args.base {
        None => 1,
        Some(base) => depth_of(&chain, base, &args.file)?,
    };
    let Some(layer) = chain.layers().get(depth) else {
        let text = "has no backing file to commit into";
        return Err(Error::new(ErrorKind::Invalid, text).at(&args.file).into());
    };
    let Some(path) = layer.storage().path() else {
        return Err(Error::invalid("the backing image has no path")
            .at(&args.file)
            .into());
    };
    Ok(Target {
        depth,
        path: path.to_owned(),
        driver: layer.driver(),
    })
}

/// The layer of a chain, below its top, that is the file `base`.
fn depth_of(chain: &Chain, base: &Path, file: &Path) -> Result<usize> {
    let found = std::fs::metadata(base).map_err(|e| Error::io("open", e).at(base))?;
    let same = |path: &Path| {
        std::fs::metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == (found.dev(), found.ino()))
    };
    let place = chain
        .layers()
        .iter()
        .skip(1)
        .position(|l| l.storage().path().is_some_and(same));
    place.map(|index| index + 1).ok_or_else(|| {
        let text = format!("'{}' is not below it", printable(&base.to_string_lossy()));
        Error::new(ErrorKind::Invalid, text).at(file)
    })
}

/// Takes from the top image what its backing image has now.
fn empty(upper: &mut Chain, file: &Path, globals: &Globals) -> anyhow::Result<()> {
    let format = upper.top().driver().name;
    let done = match upper.top_mut().as_empty() {
        Some(top) => top.empty(),
        None => Err(Error::unsupported("the format cannot")),
    };
    match done {
        Err(e) if e.kind() == ErrorKind::Unsupported => globals.note(&format!(
            "{}: is not emptied ({}, format '{format}'); what it has is in the backing image too",
            file.display(),
            e.message()
        )),
        done => done.map_err(|e| e.at(file))?,
    }
    upper.close()?;
    upper.top().storage().sync()?;
    Ok(())
}

//! `vdtool bitmap`.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::chain::open::{ChainOptions, Follow};
use crate::chain::{self, Chain};
use crate::cli::common::{OpenArgs, parse_driver, parse_size};
use crate::cli::dirty::marks::{self, Marks};
use crate::cli::exit::{Exit, usage};
use crate::cli::{Globals, progress, signal};
use crate::copy::bitmaps::{bitmaps_of_mut, merge_bitmap};
use crate::error::{Context, Result};
use crate::image::Driver;
use crate::image::bitmap::Recording;
use crate::storage::open::Access;

const HELP: &str = "\
EXAMPLES:
  vdtool bitmap --add disk.qcow2 since-monday
  vdtool bitmap --add -g 1M --disable disk.qcow2 frozen
  vdtool bitmap --merge since-monday disk.qcow2 frozen
  vdtool bitmap --merge b0 -b snap.qcow2 -F qcow2 disk.qcow2 b0
  vdtool bitmap --merge-log disk.dirty disk.qcow2 since-monday
  vdtool bitmap --remove disk.qcow2 frozen

NOTES:
  A dirty bitmap takes note of what is written to a disk, for backups of what changed; qcow2 has
  them. Several changes may be asked for at once; they are made in the order add, clear, merge,
  enable or disable, remove. \"info\" lists the bitmaps. One that is \"in use\" was not saved by a
  writer that crashed, and can only be removed.

EXIT STATUS:
  0   done
  1   failed
  2   wrong usage
  63  the format has no such operation";

/// Arguments of `bitmap`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct Args {
    /// Format of the image; without it the content decides.
    #[arg(short, long, value_name = "FMT", value_parser = parse_driver)]
    pub format: Option<&'static Driver>,
    /// What to do.
    #[command(flatten)]
    pub actions: Actions,
    /// Bytes that one bit of a new bitmap stands for [default: the cluster size, at least 4k]
    #[arg(short, long, value_name = "SIZE", requires = "add", value_parser = parse_size)]
    pub granularity: Option<u64>,
    /// Merge from a bitmap of this image.
    #[arg(short = 'b', long, value_name = "FILE", requires = "merge")]
    pub source_file: Option<PathBuf>,
    /// Format of that image; without it its content decides.
    #[arg(short = 'F', long, value_name = "FMT", requires = "source_file", value_parser = parse_driver)]
    pub source_format: Option<&'static Driver>,
    /// How to open the images.
    #[command(flatten)]
    pub open: OpenArgs,
    /// The image.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// The bitmap.
    #[arg(value_name = "NAME")]
    pub name: OsString,
}

/// What to do with a bitmap.
#[derive(Debug, Clone, Default, clap::Args)]
#[group(required = true, multiple = true)]
pub struct Actions {
    /// Add it; it takes note of writes unless --disable is given too.
    #[arg(long)]
    pub add: bool,
    /// Remove it.
    #[arg(long)]
    pub remove: bool,
    /// Forget what it has taken note of.
    #[arg(long)]
    pub clear: bool,
    /// Have it take note of writes.
    #[arg(long)]
    pub enable: bool,
    /// Have it take note of writes no more.
    #[arg(long, conflicts_with = "enable")]
    pub disable: bool,
    /// Add what another bitmap has taken note of; repeatable.
    #[arg(long, value_name = "SOURCE")]
    pub merge: Vec<OsString>,
    /// Add what a log of changes has, or a list of ranges; repeatable.
    #[arg(long, value_name = "LOG")]
    pub merge_log: Vec<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps it from being done.
pub fn run(args: &Args, _globals: &Globals) -> anyhow::Result<Exit> {
    if args.actions.add && args.actions.remove {
        return Err(usage("--add and --remove contradict each other"));
    }
    let source = match &args.source_file {
        Some(path) => {
            let plan = args.open.plan(args.source_format, Access::Read)?;
            Some(chain::open::open(path, &alone(plan))?)
        }
        None => None,
    };
    let plan = args.open.plan(args.format, Access::Write)?;
    let mut chain = chain::open::open(&args.file, &alone(plan))?;
    signal::catch()?;
    chain.top_mut().watch(progress::watcher("bitmap"));
    change(args, source.as_ref(), &mut chain).at(&args.file)?;
    chain.close()?;
    Ok(Exit::Done)
}

/// The bits are in the image itself.
fn alone(options: ChainOptions) -> ChainOptions {
    ChainOptions {
        follow: Follow::No,
        ..options
    }
}

fn change(args: &Args, source: Option<&Chain>, chain: &mut Chain) -> Result<()> {
    let (actions, name) = (&args.actions, &*args.name);
    if actions.add {
        let recording = match actions.disable {
            true => Recording::Off,
            false => Recording::On,
        };
        bitmaps_of_mut(chain)?.add(name, args.granularity, recording)?;
    }
    if actions.clear {
        bitmaps_of_mut(chain)?.clear(name)?;
    }
    for from in &actions.merge {
        merge_bitmap(source, from, chain, name)?;
    }
    for log in &actions.merge_log {
        let marks = Marks(marks::read(log, chain.virtual_size()).at(log)?);
        bitmaps_of_mut(chain)?.merge(name, "".as_ref(), Some(&marks))?;
    }
    if actions.enable {
        bitmaps_of_mut(chain)?.set_recording(name, Recording::On)?;
    }
    if actions.disable && !actions.add {
        bitmaps_of_mut(chain)?.set_recording(name, Recording::Off)?;
    }
    if actions.remove {
        bitmaps_of_mut(chain)?.remove(name)?;
    }
    Ok(())
}

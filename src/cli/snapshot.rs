//! `vdtool snapshot`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::SystemTime;

use crate::chain::open::{ChainOptions, Follow};
use crate::chain::{self, Chain};
use crate::cli::common::{OpenArgs, OutputArgs, OutputFormat, parse_driver, print};
use crate::cli::exit::{Exit, usage};
use crate::cli::{Globals, progress, signal};
use crate::error::{Context, Error, Result};
use crate::image::snapshot::Pick;
use crate::image::{Driver, Snapshots};
use crate::output;
use crate::storage::open::Access;

const HELP: &str = "\
EXAMPLES:
  vdtool snapshot -c before-upgrade disk.qcow2
  vdtool snapshot -l disk.qcow2
  vdtool snapshot -a before-upgrade disk.qcow2
  vdtool snapshot -d before-upgrade disk.qcow2

NOTES:
  Snapshots are kept in the image itself; qcow2 has them. Applying one makes the disk what it was,
  and what it was until then is lost, unless it is in a snapshot too. \"convert -l\" copies one into
  an image of its own. A change is on stable media when the command ends, and is there as a whole
  or not at all when it is killed.

EXIT STATUS:
  0   done
  1   failed, and the image is as it was
  2   wrong usage
  63  the format has no such operation";

/// Arguments of `snapshot`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct Args {
    /// Format of the image; without it the content decides.
    #[arg(short, long, value_name = "FMT", value_parser = parse_driver)]
    pub format: Option<&'static Driver>,
    /// What to do; without any of them, list.
    #[command(flatten)]
    pub action: ActionArgs,
    /// How to print the list.
    #[command(flatten)]
    pub output: OutputArgs,
    /// How to open the image.
    #[command(flatten)]
    pub open: OpenArgs,
    /// The image.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// What to do with snapshots.
#[derive(Debug, Clone, Default, clap::Args)]
#[group(multiple = false)]
pub struct ActionArgs {
    /// List the snapshots.
    #[arg(short, long)]
    pub list: bool,
    /// Make a snapshot of this name.
    #[arg(short, long, value_name = "NAME")]
    pub create: Vec<OsString>,
    /// Make the disk what it was in the snapshot of this id or name.
    #[arg(short, long, value_name = "NAME")]
    pub apply: Vec<OsString>,
    /// Delete the first snapshot of this name or id.
    #[arg(short, long, value_name = "NAME")]
    pub delete: Vec<OsString>,
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps it from being done.
pub fn run(args: &Args, _globals: &Globals) -> anyhow::Result<Exit> {
    let action = &args.action;
    let (create, apply) = (once("-c", &action.create)?, once("-a", &action.apply)?);
    let delete = once("-d", &action.delete)?;
    if let Some(name) = create {
        change(args, |snapshots| snapshots.create(name, SystemTime::now()))?;
    } else if let Some(name) = apply {
        change(args, |snapshots| snapshots.apply(&Pick::Any(name.clone())))?;
    } else if let Some(name) = delete {
        let which = Pick::NameFirst(name.clone());
        change(args, |snapshots| snapshots.delete(&which))?;
    } else {
        list(args)?;
    }
    Ok(Exit::Done)
}

/// The one name that was given; of two, one would be forgotten without a word.
fn once<'a>(option: &str, names: &'a [OsString]) -> anyhow::Result<Option<&'a OsString>> {
    match names {
        [] => Ok(None),
        [name] => Ok(Some(name)),
        _ => Err(usage(format!(
            "the argument '{option}' cannot be used more than once"
        ))),
    }
}

fn open(args: &Args, access: Access) -> anyhow::Result<Chain> {
    let options = ChainOptions {
        // What lies below is the same in all snapshots.
        follow: Follow::No,
        ..args.open.plan(args.format, access)?
    };
    Ok(chain::open::open(&args.file, &options)?)
}

fn list(args: &Args) -> anyhow::Result<()> {
    let chain = open(args, Access::Read)?;
    // An image of a format without snapshots has none.
    let list = chain.top().snapshots().at(&args.file)?;
    print(|out| {
        match args.output.output {
            OutputFormat::Human => output::snapshot::human(out, &list)?,
            OutputFormat::Json => output::snapshot::json(out, &list)?,
        }
        Ok(())
    })
}

fn change(args: &Args, act: impl FnOnce(&mut dyn Snapshots) -> Result<()>) -> anyhow::Result<()> {
    let mut chain = open(args, Access::Write)?;
    // A change ends by itself, soon; a signal must not leave leaks.
    signal::catch()?;
    chain.top_mut().watch(progress::watcher("snapshot"));
    act(snapshots(&mut chain).at(&args.file)?).at(&args.file)?;
    chain.close()?;
    Ok(())
}

fn snapshots(chain: &mut Chain) -> Result<&mut dyn Snapshots> {
    let format = chain.top().driver().name;
    chain.top_mut().as_snapshots().ok_or_else(|| {
        Error::unsupported(format!(
            "images of format '{format}' have no internal snapshots"
        ))
    })
}

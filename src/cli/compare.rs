//! `vdtool compare`.

use std::path::{Path, PathBuf};

use serde_json::json;

use crate::chain::{self, Chain};
use crate::cli::cache::CacheMode;
use crate::cli::common::{
    OpenArgs, OutputArgs, OutputFormat, ParentArgs, ProgressArgs, parse_driver, print,
};
use crate::cli::exit::{self, Exit, coded};
use crate::cli::{Globals, progress, sealed, signal};
use crate::copy::{self, Allocation, Failure, Joined, Outcome, Step, default_workers};
use crate::error::ErrorKind;
use crate::image::Driver;
use crate::storage::open::Access;

const HELP: &str = "\
EXAMPLES:
  vdtool compare disk.vhd disk.raw
  vdtool compare -s a.vhd b.vhd
  vdtool compare --output json disk.vhd disk.raw

Where one disk is longer, the rest of it must be zeroes.

EXIT STATUS:
  0              the same
  1              different, or wrong usage
  2              an image could not be opened
  3              where an image has data could not be found out
  4              data could not be read
  63             an image is of a format, or has a feature, that is not supported
  129, 130, 143  stopped by SIGHUP, SIGINT, SIGTERM";

/// Arguments of `compare`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct Args {
    /// Format of the first image; without it the content decides.
    #[arg(short, long, alias = "a-format", value_name = "FMT", value_parser = parse_driver)]
    pub format: Option<&'static Driver>,
    /// Format of the second image; without it the content decides.
    #[arg(short = 'F', long, alias = "b-format", value_name = "FMT", value_parser = parse_driver)]
    pub second_format: Option<&'static Driver>,
    /// Sizes must be equal too, and data, zeroes and holes in the same places.
    #[arg(short, long)]
    pub strict: bool,
    /// Do not compare the images with the digests that a manifest has of them.
    #[arg(long)]
    pub no_manifest: bool,
    /// How the page cache is used.
    #[arg(
        short = 'T',
        long,
        value_enum,
        value_name = "CACHE",
        default_value = "writeback"
    )]
    pub cache: CacheMode,
    /// How the result is printed.
    #[command(flatten)]
    pub output: OutputArgs,
    /// How progress is shown.
    #[command(flatten)]
    pub progress: ProgressArgs,
    /// How the images are opened.
    #[command(flatten)]
    pub open: OpenArgs,
    /// The first image.
    #[arg(value_name = "A")]
    pub first: PathBuf,
    /// The second image.
    #[arg(value_name = "B")]
    pub second: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps the images from being compared.
pub fn run(args: &Args, globals: &Globals) -> anyhow::Result<Exit> {
    signal::catch()?;
    let parents = &args.open.parents;
    let [first, second] = members(args)?;
    let a = open(args, &args.first, args.format, parents, first)?;
    let rest = parents.after(a.chains());
    let b = open(args, &args.second, args.second_format, &rest, second)?;
    let rest = rest.after(b.chains());
    rest.refuse_any().map_err(|e| coded(Exit::Failed, e))?;
    let allocation = match args.strict {
        true => Allocation::Compared,
        false => Allocation::Ignored,
    };
    if a.len() != b.len() && !args.strict {
        globals.note(&format!(
            "the sizes differ: {} and {} bytes",
            a.len(),
            b.len()
        ));
    }
    let total = a.len().max(b.len());
    let bar = progress::start("compare", total, &args.progress, globals);
    let outcome = copy::compare(&a, &b, allocation, default_workers(), &bar).map_err(failed)?;
    // Only now were both read whole.
    if outcome == Outcome::Same && !args.no_manifest {
        let step = Step::Read;
        let chains = a.chains().chain(b.chains());
        sealed::verify(chains.flat_map(Chain::layers))
            .map_err(|error| failed(Failure { step, error }))?;
    }
    bar.finish();
    let verdict = match outcome {
        Outcome::Same => Exit::Done,
        Outcome::Content(_) | Outcome::Allocation(_) | Outcome::Length => Exit::Failed,
    };
    exit::answer(report(args, globals, outcome), verdict)
}

/// For which of the two `--member` is: for those that hold disks, of which there is one.
fn members(args: &Args) -> anyhow::Result<[bool; 2]> {
    if args.open.member.is_none() {
        return Ok([false; 2]);
    }
    let holds = |path: &Path, format| -> anyhow::Result<bool> {
        let options = args.open.plan(format, Access::Read);
        let options = options.map_err(|e| coded(Exit::Failed, e))?;
        let holds = chain::open::holds_disks(path, &options);
        holds.map_err(|e| match e.kind() {
            ErrorKind::Unsupported => e.into(),
            _ => coded(Exit::NotOpened, e),
        })
    };
    let first = holds(&args.first, args.format)?;
    let second = holds(&args.second, args.second_format)?;
    // Where neither does, whoever opens the first says so.
    Ok([first || !second, second])
}

fn open(
    args: &Args,
    path: &Path,
    format: Option<&'static Driver>,
    parents: &ParentArgs,
    takes_member: bool,
) -> anyhow::Result<Joined> {
    let mut options = args
        .open
        .plan(format, Access::Read)
        .map_err(|e| coded(Exit::Failed, e))?;
    options.member = options.member.filter(|_| takes_member);
    if let Some(caching) = args.cache.caching() {
        options.storage.caching = caching;
    }
    parents.give(&mut options);
    chain::open::open_next(path, &mut options)
        .and_then(|chain| Joined::new(vec![chain]))
        .map_err(|e| match e.kind() {
            ErrorKind::Unsupported => e.into(),
            _ => coded(Exit::NotOpened, e),
        })
}

fn failed(failure: Failure) -> anyhow::Error {
    let exit = match failure.step {
        Step::Extents => Exit::NoExtents,
        Step::Read => Exit::NotRead,
    };
    match failure.error.kind() {
        ErrorKind::Cancelled => failure.error.into(),
        _ => coded(exit, failure.error),
    }
}

fn report(args: &Args, globals: &Globals, outcome: Outcome) -> anyhow::Result<()> {
    if args.output.output == OutputFormat::Human {
        return globals.say(&sentence(outcome));
    }
    let (difference, offset) = match outcome {
        Outcome::Same => (None, None),
        Outcome::Content(at) => (Some("content"), Some(at)),
        Outcome::Allocation(at) => (Some("allocation"), Some(at)),
        Outcome::Length => (Some("size"), None),
    };
    let value = json!({
        "identical": outcome == Outcome::Same,
        "difference": difference,
        "offset": offset,
    });
    print(|out| Ok(writeln!(out, "{value:#}")?))
}

/// The result in qemu-img's words.
fn sentence(outcome: Outcome) -> String {
    match outcome {
        Outcome::Same => "Images are identical.".to_owned(),
        Outcome::Content(at) => format!("Content mismatch at offset {at} ({at:#x})!"),
        Outcome::Allocation(at) => {
            format!("Strict mode: Offset {at} ({at:#x}) block status mismatch!")
        }
        Outcome::Length => "Strict mode: Image size mismatch!".to_owned(),
    }
}

//! `vdtool compact`.

use std::path::PathBuf;

use serde_json::json;

use crate::chain;
use crate::chain::open::{ChainOptions, Follow};
use crate::cli::common::{OpenArgs, OutputArgs, OutputFormat, ProgressArgs, parse_driver, print};
use crate::cli::exit::Exit;
use crate::cli::{Globals, progress, signal};
use crate::copy::compact::{Options, Outcome, compact};
use crate::error::Context;
use crate::image::info::HostInfo;
use crate::image::{Driver, Image};
use crate::output::json as output_json;
use crate::storage::open::Access;
use crate::util::size;

const HELP: &str = "\
EXAMPLES:
  vdtool compact disk.vdi
  vdtool compact --dry-run disk.qcow2
  vdtool compact --no-scan disk.vhd

NOTES:
  What the disk reads as does not change, whatever stops the command. First the image is checked:
  where more than leaks is found nothing is done, and leaks are given back. Then space that holds
  zeroes is freed, unless --no-scan is given: file systems write zeroes where they are told to (for
  example by zerofree), not where files are deleted. In the end blocks of a VDI, VHD or VHDX that
  lie last in the file are moved to free places and the file is cut; free clusters of a qcow2 are
  given back to the host where they are, and its end is cut. Layers below are not opened.

EXIT STATUS:
  0              done
  1              failed
  2              wrong usage
  63             the format holds no space that could be given back
  129, 130, 143  stopped by SIGHUP, SIGINT, SIGTERM; what was done until then stays done";

/// Arguments of `compact`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct Args {
    /// Format of the image; without it the content decides.
    #[arg(short, long, value_name = "FMT", value_parser = parse_driver)]
    pub format: Option<&'static Driver>,
    /// Do not look for stored zeroes.
    #[arg(long)]
    pub no_scan: bool,
    /// Say what could be given back, and change nothing.
    #[arg(short = 'n', long)]
    pub dry_run: bool,
    /// How to print the result.
    #[command(flatten)]
    pub output: OutputArgs,
    /// How progress is shown.
    #[command(flatten)]
    pub progress: ProgressArgs,
    /// How to open it.
    #[command(flatten)]
    pub open: OpenArgs,
    /// The image.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps it from being done.
pub fn run(args: &Args, globals: &Globals) -> anyhow::Result<Exit> {
    let access = match args.dry_run {
        true => Access::Read,
        false => Access::Write,
    };
    let options = ChainOptions {
        // Its own files, and nothing below it.
        follow: Follow::Layers(1),
        ..args.open.plan(args.format, access)?
    };
    signal::catch()?;
    let chain = chain::open::open(&args.file, &options)?;
    let format = chain.top().driver().name;
    let before = Taken::by(chain.top())?;
    let bar = progress::start("compact", chain.virtual_size(), &args.progress, globals);
    let how = Options {
        scan: !args.no_scan,
        dry_run: args.dry_run,
    };
    let done = compact(chain.top(), how, &bar).at(&args.file);
    let closed = match args.dry_run {
        true => Ok(()),
        // What was freed is given back, however far it came.
        false => chain.close(),
    };
    let outcome = done?;
    closed?;
    bar.finish();
    let after = Taken::by(chain.top())?;
    match args.output.output {
        OutputFormat::Human => globals.say(&text(outcome, before, after, args.dry_run))?,
        OutputFormat::Json => print(|out| {
            let value = json!({
                "filename": output_json::path(&args.file),
                "format": format,
                "dry-run": args.dry_run,
                "zero-bytes": outcome.zero,
                "unused-bytes": outcome.unused,
                "moved-bytes": outcome.moved,
                "length-before": before.len,
                "length": after.len,
                "actual-size-before": before.disk_size,
                "actual-size": after.disk_size,
            });
            Ok(output_json::write(out, &value)?)
        })?,
    }
    Ok(Exit::Done)
}

/// What the files of an image take.
#[derive(Debug, Clone, Copy)]
struct Taken {
    len: u64,
    /// `None` where the host does not say.
    disk_size: Option<u64>,
}

impl Taken {
    fn by(image: &dyn Image) -> crate::Result<Self> {
        let mut all = Self {
            len: 0,
            disk_size: Some(0),
        };
        for part in image.parts() {
            let host = HostInfo::of(part.storage)?;
            all.len += host.len;
            all.disk_size = all.disk_size.zip(host.disk_size).map(|(a, b)| a + b);
        }
        Ok(all)
    }
}

fn text(outcome: Outcome, before: Taken, after: Taken, dry_run: bool) -> String {
    let (zero, unused) = (size::human(outcome.zero), size::human(outcome.unused));
    if dry_run {
        return format!(
            "{zero} of zeroes could be freed, and {unused} of the file are in use by nothing."
        );
    }
    let moved = size::human(outcome.moved);
    let taken = |host: Taken| host.disk_size.unwrap_or(host.len);
    format!(
        "Image compacted: {zero} of zeroes freed, {moved} moved; the file takes {}, before {}.",
        size::human(taken(after)),
        size::human(taken(before)),
    )
}

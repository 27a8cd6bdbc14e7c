//! `vdtool map`.

use std::io::Write;
use std::ops::Range;
use std::path::PathBuf;

use crate::chain::open::ChainOptions;
use crate::chain::{self, Chain};
use crate::cli::Globals;
use crate::cli::common::{OpenArgs, OutputArgs, OutputFormat, parse_driver, parse_size, print};
use crate::cli::exit::Exit;
use crate::error::ErrorKind;
use crate::image::Driver;
use crate::image::open::Purpose;
use crate::output::map::{Human, Json, tracks};
use crate::storage::open::Access;

const HELP: &str = "\
EXAMPLES:
  vdtool map disk.vhd
  vdtool map --output json disk.vhd | jq '[.[] | select(.data) | .length] | add'
  vdtool map -s 1G -l 64M disk.vhd

STATES:
  The states are data, compressed, zero (a layer says that the bytes are zeroes, or the file of a
  raw or preallocated one has a hole there) and hole (no layer has the bytes: they read as zeroes).
  Of a disc where all its tracks lie is printed too; for programs \"info --output json\" has that.

EXIT STATUS:
  0   done
  1   failed: the image or one below it cannot be opened or is damaged
  2   wrong usage";

/// Arguments of `map`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct Args {
    /// Format of the image; without it the content decides.
    #[arg(short, long, value_name = "FMT", value_parser = parse_driver)]
    pub format: Option<&'static Driver>,
    /// First byte of the disk to look at.
    #[arg(short, long, value_name = "START", value_parser = parse_size, default_value = "0")]
    pub start_offset: u64,
    /// How many bytes to look at; without it, all up to the end.
    #[arg(short = 'l', long, value_name = "LEN", value_parser = parse_size)]
    pub max_length: Option<u64>,
    /// How to print it.
    #[command(flatten)]
    pub output: OutputArgs,
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
pub fn run(args: &Args, _globals: &Globals) -> anyhow::Result<Exit> {
    let options = args.open.plan(args.format, Access::Read)?;
    let chain = opened(args, options)?;
    let size = chain.virtual_size();
    let start = args.start_offset.min(size);
    let end = args
        .max_length
        .map_or(size, |len| start.saturating_add(len).min(size));
    print(|out| match args.output.output {
        OutputFormat::Human => human(out, &chain, start..end),
        OutputFormat::Json => json(out, &chain, start..end),
    })?;
    Ok(Exit::Done)
}

/// The chain.  A disc without data has no disk, and tracks all the same.
fn opened(args: &Args, mut options: ChainOptions) -> crate::Result<Chain> {
    match chain::open::open(&args.file, &options) {
        Err(e) if e.kind() == ErrorKind::Unsupported => {
            options.purpose = Purpose::Describe;
            match chain::open::open(&args.file, &options) {
                Ok(chain) if chain.top().as_disc().is_some() => Ok(chain),
                _ => Err(e),
            }
        }
        opened => opened,
    }
}

fn human(out: &mut dyn Write, chain: &Chain, range: Range<u64>) -> anyhow::Result<()> {
    let writer = Human::new(chain);
    writer.start(out)?;
    for extent in chain.extents(range)? {
        writer.extent(out, &extent?)?;
    }
    if let Some(disc) = chain.top().as_disc() {
        tracks(out, disc)?;
    }
    Ok(())
}

fn json(out: &mut dyn Write, chain: &Chain, range: Range<u64>) -> anyhow::Result<()> {
    let mut writer = Json::new(chain);
    for extent in chain.extents(range)? {
        writer.extent(out, &extent?)?;
    }
    Ok(writer.finish(out)?)
}

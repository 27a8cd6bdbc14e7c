//! `vdtool info`.

use std::path::PathBuf;

use crate::chain::open::{ChainOptions, Follow};
use crate::chain::{self, Chain};
use crate::cli::Globals;
use crate::cli::common::{OpenArgs, OutputArgs, OutputFormat, parse_driver, print};
use crate::cli::exit::Exit;
use crate::error::{Error, ErrorKind};
use crate::image::Driver;
use crate::image::info::ImageInfo;
use crate::image::open::Purpose;
use crate::output;
use crate::storage::open::Access;

const HELP: &str = "\
EXAMPLES:
  vdtool info disk.vhd
  vdtool info --output json disk.vhd | jq '.\"virtual-size\"'
  vdtool info --backing-chain child.vhd
  vdtool info --member 2 appliance.ova
  vdtool info --ops update.cow | jq -c 'select(.type == \"copy\")'

OPERATIONS:
  With --ops each operation of the file (android-cow) is one line of JSON, in the order of the file:
  index, type, and as far as it has them new-block, blocks, source-block (copy), source-offset (xor),
  data-offset, data-length, compression, label, skip (cluster). Of version 3, which keeps its sequence
  data and labels beside the operations, the former comes first, and a label before the operation whose
  index it has.

EXIT STATUS:
  0   done
  1   failed: the file cannot be opened, is not of the format, or is damaged
  2   wrong usage
  63  the file is of a format, or has a feature, that is not supported";

/// Arguments of `info`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct Args {
    /// Format of the image; without it the content decides.
    #[arg(short, long, value_name = "FMT", value_parser = parse_driver)]
    pub format: Option<&'static Driver>,
    /// Show the images below it as well, top first; otherwise no other than its own are opened.
    #[arg(short, long)]
    pub backing_chain: bool,
    /// Show the operations that the file consists of, one JSON line for each, in formats that have
    /// such.
    #[arg(long, conflicts_with = "backing_chain")]
    pub ops: bool,
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
    let follow = if args.backing_chain {
        Follow::Yes
    } else {
        Follow::Layers(1)
    };
    let options = ChainOptions {
        follow,
        purpose: Purpose::Describe,
        listed: args.ops,
        ..args.open.plan(args.format, Access::Read)?
    };
    if args.ops {
        return operations(args, &options);
    }
    if let Some(contents) = chain::open::contents(&args.file, &options)? {
        print(|out| {
            match args.output.output {
                OutputFormat::Human => output::contents::human(out, &contents)?,
                OutputFormat::Json => output::contents::json(out, &contents)?,
            }
            Ok(())
        })?;
        return Ok(Exit::Done);
    }
    let chain = chain::open::open(&args.file, &options)?;
    let layers = describe(&chain)?;
    print(|out| {
        match (args.output.output, args.backing_chain, &*layers) {
            (OutputFormat::Human, ..) => output::info::human(out, &layers)?,
            (OutputFormat::Json, false, [top, ..]) => output::info::json(out, top)?,
            (OutputFormat::Json, ..) => output::info::json_chain(out, &layers)?,
        }
        Ok(())
    })?;
    Ok(Exit::Done)
}

/// Prints the operations, each as it is found.
fn operations(args: &Args, options: &ChainOptions) -> anyhow::Result<Exit> {
    let chain = chain::open::open(&args.file, options)?;
    let image = chain.top();
    let Some(operations) = image.as_operations() else {
        let text = format!(
            "images of format '{}' have no operations",
            image.driver().name
        );
        return Err(Error::unsupported(text).at(&args.file).into());
    };
    print(|out| {
        let mut failed = None;
        let done = operations.each(&mut |operation| {
            let line = serde_json::to_string(operation).unwrap_or_default();
            writeln!(out, "{line}").map_err(|e| {
                failed = Some(e);
                Error::new(ErrorKind::Cancelled, "nobody takes them")
            })
        });
        match failed {
            Some(e) => Err(e.into()),
            None => Ok(done.map_err(|e| e.at(&args.file))?),
        }
    })?;
    Ok(Exit::Done)
}

/// What the layers know about themselves; each is told where the one below it was found.
fn describe(chain: &Chain) -> crate::Result<Vec<ImageInfo>> {
    let mut layers = Vec::with_capacity(chain.layers().len());
    for layer in chain.layers() {
        layers.push(ImageInfo::of(&**layer)?);
    }
    let found: Vec<Option<PathBuf>> = layers.iter().skip(1).map(|l| l.path.clone()).collect();
    for (layer, below) in layers.iter_mut().zip(found) {
        layer.backing_path = below;
    }
    Ok(layers)
}

//! `vdtool dd`.

use std::ffi::{OsStr, OsString};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::chain;
use crate::cli::cache::CacheMode;
use crate::cli::common::{OpenArgs, parse_driver, target_driver};
use crate::cli::exit::{Exit, complain, usage};
use crate::cli::{Globals, convert, signal};
use crate::copy::Joined;
use crate::image::Driver;
use crate::storage::open::Access;
use crate::util::size;
use crate::util::text::printable;

const HELP: &str = "\
EXAMPLES:
  vdtool dd if=disk.qcow2 of=first.raw bs=1M count=16
  vdtool dd -O vhd if=disk.qcow2 of=rest.vhd bs=1M skip=16

OPERANDS:
  if=INPUT   the image to read
  of=OUTPUT  the image to make
  bs=SIZE    size of a block [default: 512]
  count=N    blocks to copy; without it, all
  skip=N     blocks of INPUT to leave out first

NOTES:
  OUTPUT is a new image, as convert makes one; an image that was there before is replaced. Of the
  blocks that are skipped none counts as copied.

EXIT STATUS:
  0              done
  1              failed; nothing new is under the target's name
  2              wrong usage
  63             the format has no such operation
  129, 130, 143  stopped by SIGHUP, SIGINT, SIGTERM";

/// Most bytes of a block.
const MAX_BLOCK: u64 = i32::MAX as u64;

/// Arguments of `dd`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP, override_usage = "vdtool dd [OPTIONS] if=INPUT of=OUTPUT [bs=SIZE] [count=N] [skip=N]")]
pub struct Args {
    /// Format of INPUT; without it the content decides.
    #[arg(short, long, value_name = "FMT", value_parser = parse_driver)]
    pub format: Option<&'static Driver>,
    /// Format of OUTPUT; without it the extension decides, else it is raw.
    #[arg(short = 'O', long, value_name = "FMT", value_parser = parse_driver)]
    pub output_format: Option<&'static Driver>,
    /// How INPUT is opened.
    #[command(flatten)]
    pub open: OpenArgs,
    /// What is copied.
    #[arg(value_name = "OPERAND", required = true)]
    pub operands: Vec<OsString>,
}

/// What is to be copied.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    input: Option<PathBuf>,
    output: Option<PathBuf>,
    block: Option<u64>,
    count: Option<u64>,
    skip: Option<u64>,
}

impl Plan {
    fn new(operands: &[OsString]) -> Result<Self, String> {
        let mut plan = Self::default();
        for operand in operands {
            // Names are bytes.
            let bytes = operand.as_bytes();
            let end = bytes.iter().position(|b| *b == b'=');
            let (key, value) = bytes.split_at(end.unwrap_or(bytes.len()));
            let value = OsStr::from_bytes(value.get(1..).unwrap_or_default());
            let key = String::from_utf8_lossy(key);
            let number = || {
                let value = value.to_string_lossy();
                size::parse(&value).map_err(|e| format!("operand '{key}': {e}"))
            };
            match &*key {
                "if" => plan.input = Some(value.into()),
                "of" => plan.output = Some(value.into()),
                "bs" => plan.block = Some(number()?),
                "count" => plan.count = Some(number()?),
                "skip" => plan.skip = Some(number()?),
                _ => {
                    return Err(format!(
                        "operand '{}' is unknown (allowed: if, of, bs, count, skip)",
                        printable(&*key)
                    ));
                }
            }
        }
        match plan.block {
            Some(block) if !(1..=MAX_BLOCK).contains(&block) => Err(format!(
                "operand 'bs' is {block} (allowed: 1 to {MAX_BLOCK})"
            )),
            _ => Ok(plan),
        }
    }

    /// The part of a disk of `size` bytes; `None`: what is skipped reaches past its end.
    fn part(&self, size: u64) -> Option<Range<u64>> {
        let block = self.block.unwrap_or(512);
        let start = block.checked_mul(self.skip.unwrap_or(0))?;
        let rest = size.checked_sub(start)?;
        let len = self.count.map_or(rest, |count| block.saturating_mul(count));
        Some(start..start + len.min(rest))
    }
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps it from being done; what was under the target's name is then still there.
pub fn run(args: &Args, globals: &Globals) -> anyhow::Result<Exit> {
    let plan = Plan::new(&args.operands).map_err(usage)?;
    let (Some(input), Some(output)) = (&plan.input, &plan.output) else {
        return Err(usage("dd needs if=INPUT and of=OUTPUT"));
    };
    let driver = target_driver(args.output_format, output, globals)?;
    signal::catch()?;
    let source = source(args, &plan, input)?;
    let convert = convert::Args {
        target_cache: CacheMode::Unsafe,
        open: args.open.clone(),
        // What an image is kept in is compared with its digests where all of it is read.
        no_manifest: plan.count.is_some() || plan.skip.is_some(),
        ..convert::Args::default()
    };
    convert::write(&convert, &source, driver, output, globals)?;
    Ok(Exit::Done)
}

fn source(args: &Args, plan: &Plan, input: &Path) -> anyhow::Result<Joined> {
    let chain = chain::open::open(input, &args.open.plan(args.format, Access::Read)?)?;
    let size = chain.virtual_size();
    let part = plan.part(size).unwrap_or_else(|| {
        // A disk without bytes is what is left.
        complain(&format!(
            "warning: {}: cannot skip to specified offset: the disk has {size} bytes",
            input.display()
        ));
        size..size
    });
    Ok(Joined::part_of(chain, part)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(text: &str) -> Result<Plan, String> {
        let words: Vec<OsString> = text.split_whitespace().map(OsString::from).collect();
        Plan::new(&words)
    }

    #[test]
    fn blocks_are_counted_after_those_that_are_skipped_where_qemu_img_counts_both() {
        for (text, part) in [
            ("", Some(0..10_000)),
            ("count=3", Some(0..1536)),
            ("bs=1k count=2 skip=3", Some(3072..5120)),
            ("bs=1k skip=9", Some(9216..10_000)),
            ("bs=1000 skip=10", Some(10_000..10_000)),
            ("bs=1000 skip=11", None),
            ("bs=1G skip=7E", None),
            ("bs=1G count=7E", Some(0..10_000)),
            ("bs=1k count=0", Some(0..0)),
        ] {
            let plan = plan(text).expect(text);
            assert_eq!(plan.part(10_000), part, "{text}");
        }
    }

    #[test]
    fn wrong_operands_are_named() {
        for (text, part) in [
            ("seek=1", "'seek'"),
            ("bs=0", "'bs' is 0"),
            ("bs=2G", "2147483647"),
            ("count=x", "operand 'count'"),
            ("file", "'file'"),
        ] {
            let error = plan(text).expect_err(text);
            assert!(error.contains(part), "{error}");
        }
    }
}

//! `vdtool resize`.

use std::ops::Range;
use std::path::PathBuf;

use clap::ValueEnum;

use crate::chain::{self, Chain};
use crate::cli::common::{OpenArgs, parse_driver};
use crate::cli::create::refuse_falloc;
use crate::cli::exit::{Exit, usage};
use crate::cli::{Globals, progress, signal};
use crate::copy::progress::Progress;
use crate::error::{Context, Error};
use crate::image::Driver;
use crate::image::options::OptionKind;
use crate::storage::open::Access;
use crate::storage::{fill_space, give_space};
use crate::util::text::printable;
use crate::util::{range, size};

const HELP: &str = "\
EXAMPLES:
  vdtool resize disk.vhd 40G
  vdtool resize disk.vhd +10G
  vdtool resize --shrink disk.raw -512M
  vdtool resize --preallocation falloc disk.raw 8G

NOTES:
  New bytes read as zeroes. Partitions and file systems inside the disk are not looked at: make
  them smaller before the disk, and larger after it.

EXIT STATUS:
  0   done
  1   failed, and the size is as it was
  2   wrong usage
  63  the format has no such operation";

/// Bytes that are given space between two looks whether to stop.
const STEP: u64 = 64 << 20;

/// What is done about the space of new bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum PreallocationArg {
    /// Nothing.
    #[default]
    Off,
    /// Tables lead to it, in formats that have some.
    Metadata,
    /// It is allocated.
    Falloc,
    /// It is allocated and written with zeroes.
    Full,
}

impl PreallocationArg {
    /// As it is typed.
    fn word(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Metadata => "metadata",
            Self::Falloc => "falloc",
            Self::Full => "full",
        }
    }
}

/// Arguments of `resize`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct Args {
    /// Format of the image; without it the content decides.
    #[arg(short, long, value_name = "FMT", value_parser = parse_driver)]
    pub format: Option<&'static Driver>,
    /// Allow a smaller size: what lies past it is lost.
    #[arg(long)]
    pub shrink: bool,
    /// What to do about the space of new bytes.
    #[arg(long, value_enum, default_value_t, value_name = "MODE")]
    pub preallocation: PreallocationArg,
    /// How to open it.
    #[command(flatten)]
    pub open: OpenArgs,
    /// The image.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// The new size; with + or - in front, the change.
    #[arg(value_name = "[+-]SIZE", value_parser = Change::parse, allow_hyphen_values = true)]
    pub size: Change,
}

/// A new size, or a change of the old one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// To this many bytes.
    To(u64),
    /// By this many more.
    Grow(u64),
    /// By this many less.
    Shrink(u64),
}

impl Change {
    /// Parses `SIZE`, `+SIZE`, `-SIZE`.
    ///
    /// # Errors
    /// Says why the text is none of them.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (change, number): (fn(u64) -> Self, &str) = match text.as_bytes().first() {
            Some(b'+') => (Self::Grow, &text[1..]),
            Some(b'-') => (Self::Shrink, &text[1..]),
            _ => (Self::To, text),
        };
        size::parse(number).map(change).map_err(|e| e.to_string())
    }

    /// The new size of a disk of `old` bytes; `None` where it has no meaning.
    pub fn apply(self, old: u64) -> Option<u64> {
        match self {
            Self::To(new) => Some(new),
            Self::Grow(more) => old.checked_add(more).filter(|&n| i64::try_from(n).is_ok()),
            Self::Shrink(less) => old.checked_sub(less),
        }
    }
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps it from being done.
pub fn run(args: &Args, globals: &Globals) -> anyhow::Result<Exit> {
    // The layers below are opened too: what they have past the old size must not show.
    let options = args.open.plan(args.format, Access::Write)?;
    let mut chain = chain::open::open(&args.file, &options)?;
    let old = chain.virtual_size();
    let new = args.size.apply(old).ok_or_else(|| {
        usage(format!(
            "{}: the new size would be below 0 or above 2^63 - 1 bytes (it is {old} bytes now)",
            printable(&args.file)
        ))
    })?;
    allowed(args, &chain, old..new)?;
    if args.preallocation == PreallocationArg::Falloc {
        refuse_falloc(&args.file)?;
    }
    // From here on a signal leaves the old size or the new one.
    signal::catch()?;
    chain.top_mut().watch(progress::watcher("resize"));
    set_size(&chain, new, args.preallocation)?;
    chain.close()?;
    globals.say("Image resized.")?;
    Ok(Exit::Done)
}

/// Refuses what would lose data without being asked to, and what cannot be done, before anything
/// is changed.
fn allowed(args: &Args, chain: &Chain, sizes: Range<u64>) -> anyhow::Result<()> {
    let Range {
        start: old,
        end: new,
    } = sizes.clone();
    let file = &args.file;
    if new < old && !args.shrink {
        let why = format!(
            "the new size of {new} bytes is smaller than {old} bytes, and what lies past it \
             would be lost; --shrink allows it"
        );
        return Err(Error::invalid(why).at(file).into());
    }
    may_preallocate(chain, sizes, args.preallocation).at(file)?;
    Ok(())
}

/// Refuses a preallocation that cannot be done when the size goes from `sizes.start` to
/// `sizes.end`, before anything is changed.
///
/// # Errors
/// `Invalid` where the disk does not grow; `Unsupported` by the format.
pub(super) fn may_preallocate(
    chain: &Chain,
    sizes: Range<u64>,
    how: PreallocationArg,
) -> crate::Result<()> {
    if how == PreallocationArg::Off {
        return Ok(());
    }
    if sizes.end < sizes.start {
        return Err(Error::invalid("preallocation is for growing only"));
    }
    let image = chain.top();
    let tables = image.cluster_size().is_some();
    let word = how.word();
    let takes = |word: &str| match image.driver().creator.as_ref() {
        Some(creator) => (creator.options.iter())
            .filter(|spec| spec.name == "preallocation")
            .any(|spec| matches!(spec.kind, OptionKind::Choice(words) if words.contains(&word))),
        None => false,
    };
    // A format that lays out tables ahead of data when it makes an image does so when it grows.
    let allowed = match tables {
        true => takes(PreallocationArg::Metadata.word()),
        false => takes(word),
    };
    if !allowed {
        let allocates = if tables {
            "this image of"
        } else {
            "an image of"
        };
        let words = if tables { "off" } else { "off, falloc, full" };
        let why = format!(
            "{allocates} format '{}' cannot grow with preallocation={word} (allowed: {words})",
            image.driver().name
        );
        return Err(Error::unsupported(why));
    }
    Ok(())
}

/// Sets the size and gives new bytes space; where that fails the size is as it was.
///
/// # Errors
/// Those of [`Chain::resize`] and of the host.
pub(super) fn set_size(chain: &Chain, new: u64, how: PreallocationArg) -> crate::Result<()> {
    let old = chain.virtual_size();
    chain.resize(new)?;
    if new > old && how != PreallocationArg::Off {
        preallocate(chain, old..new, how).or_else(|e| {
            chain.resize(old)?;
            Err(e)
        })?;
    }
    Ok(())
}

/// Gives the range space, run by run as the image stores it.
fn preallocate(chain: &Chain, range: Range<u64>, how: PreallocationArg) -> crate::Result<()> {
    let bar = progress::hidden("resize", range::len(&range));
    chain.give_space(range, &mut |storage, place| {
        let mut at = place.start;
        while at < place.end {
            bar.check()?;
            let piece = at..place.end.min(at + STEP);
            at = piece.end;
            let done = range::len(&piece);
            match how {
                PreallocationArg::Off | PreallocationArg::Metadata => {}
                PreallocationArg::Falloc => give_space(storage, piece)?,
                PreallocationArg::Full => fill_space(storage, piece)?,
            }
            bar.advance(done);
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_absolute_or_a_change() {
        for (text, new) in [
            ("512", Some(512)),
            ("+1k", Some(5120)),
            ("-1k", Some(3072)),
            ("-4k", Some(0)),
            ("-8k", None),
            ("+7E", Some((7 << 60) + 4096)),
        ] {
            let change = Change::parse(text).expect(text);
            assert_eq!(change.apply(4096), new, "{text}");
        }
        assert_eq!(Change::Grow(i64::MAX.unsigned_abs()).apply(1), None);
        for text in ["", "+", "-", "--1k", "+-1k", "1x"] {
            assert!(Change::parse(text).is_err(), "{text}");
        }
    }
}

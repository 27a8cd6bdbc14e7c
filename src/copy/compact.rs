//! Giving back the space that one image takes for nothing.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::image::check::Repair;
use crate::image::{Compact, Image, Source, Wait};
use crate::storage::Storage;
use crate::util::align::{clamp_len, down, len64};
use crate::util::buf::is_zero;
use crate::util::progress::{Progress, Silent};
use crate::util::range;

/// Bytes read at a time; the first look at a unit is shorter.
const STEP: u64 = 1 << 20;
/// Bytes of a unit that are looked at first: most data is not zero for long.
const FIRST: u64 = 64 << 10;
/// Space that is freed in one go, at most.
const MOST: u64 = 64 << 20;

/// What compacting an image does, or would do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Bytes of the disk whose space was freed, since they read as zeroes.
    pub zero: u64,
    /// Bytes of the file that were held for nothing before.
    pub unused: u64,
    /// Bytes that were moved.
    pub moved: u64,
}

/// How an image is compacted.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Stored zeroes are looked for.
    pub scan: bool,
    /// Nothing is changed.
    pub dry_run: bool,
}

/// Frees what is stored of a disk and reads as zeroes, then gives back what the file holds for
/// nothing.  The disk reads as before at any time.  For an image that was not written to since it was
/// opened or closed, with no request under way; the caller closes it.
///
/// # Errors
/// `Unsupported` where the format cannot; `Corrupt` where a check finds more than leaks: then nothing
/// is changed; the host's; `Cancelled`.
pub fn compact(image: &dyn Image, options: Options, progress: &dyn Progress) -> Result<Outcome> {
    let Some(compact) = image.as_compact() else {
        return Err(Error::unsupported(format!(
            "format '{}' holds no space that could be given back",
            image.driver().name
        )));
    };
    let leaks = leaks(image)?;
    let mut outcome = Outcome {
        // What is freed now is told of as zeroes.
        unused: compact.unused(progress)?,
        ..Outcome::default()
    };
    if !options.dry_run {
        drop_leaks(image, leaks)?;
        image.keep_state();
    }
    if options.scan && compact.frees() {
        let mut scan = || {
            outcome.zero = free_zeroes(image, compact, options, progress)?;
            Ok(())
        };
        match image.as_resize() {
            Some(resize) if !options.dry_run => resize.unrecorded(&mut scan)?,
            _ => scan()?,
        }
    }
    if options.dry_run {
        return Ok(outcome);
    }
    image.flush()?;
    outcome.moved = compact.pack(progress)?;
    Ok(outcome)
}

/// How many clusters an image leaks; refuses one whose metadata is wrong.
fn leaks(image: &dyn Image) -> Result<u64> {
    let Some(check) = image.as_check() else {
        return Ok(0);
    };
    let report = check.check(Repair::Nothing, &Silent)?;
    match report.corruptions > 0 || report.check_errors > 0 {
        true => Err(Error::corrupt(format!(
            "a check finds {} corruptions (allowed: compacting after `check -r all`)",
            report.corruptions
        ))),
        false => Ok(report.leaks),
    }
}

/// Gives back what an image leaks.
fn drop_leaks(image: &dyn Image, leaks: u64) -> Result<()> {
    if leaks > 0
        && let Some(check) = image.as_check()
    {
        check.check(Repair::Leaks, &Silent)?;
    }
    Ok(())
}

/// Frees the units that are stored and read as zeroes; how many bytes of the disk that is.
fn free_zeroes(
    image: &dyn Image,
    compact: &dyn Compact,
    options: Options,
    progress: &dyn Progress,
) -> Result<u64> {
    let size = image.virtual_size();
    let unit = image.cluster_size().unwrap_or(1).max(1);
    let mut scan = Scan {
        image,
        bytes: Vec::new(),
    };
    let (mut at, mut zero) = (0, 0);
    let mut run: Range<u64> = 0..0;
    while at < size {
        progress.check()?;
        let end = size.min(at + unit);
        let found = scan.is_stored_zero(at..end)?;
        let next = match found {
            Look::Zero | Look::Data => end,
            Look::None(until) | Look::Said(until) => down(until, unit).max(end).min(size),
        };
        if matches!(found, Look::Said(_)) {
            // Formats may keep space for zeroes that their metadata tells of.
            free(compact, options, &(at..next))?;
        }
        if found == Look::Zero && run.end == at && range::len(&run) < MOST {
            run.end = end;
        } else {
            let done = std::mem::replace(&mut run, at..at);
            zero += free(compact, options, &done)?;
            if found == Look::Zero {
                run = at..end;
            }
        }
        progress.advance(next - at);
        at = next;
    }
    Ok(zero + free(compact, options, &run)?)
}

/// Frees a run, or would; how many bytes of the disk it is.
fn free(compact: &dyn Compact, options: Options, run: &Range<u64>) -> Result<u64> {
    if !run.is_empty() && !options.dry_run {
        compact.free(run)?;
    }
    Ok(range::len(run))
}

/// What a unit is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    /// It has space, and reads as zeroes.
    Zero,
    /// It has space, and something in it, or is compressed.
    Data,
    /// The image has nothing there, and so on up to this offset.
    None(u64),
    /// Its metadata says that it reads as zeroes, and so on up to this offset.
    Said(u64),
}

struct Scan<'a> {
    image: &'a dyn Image,
    bytes: Vec<u8>,
}

impl Scan<'_> {
    fn is_stored_zero(&mut self, unit: Range<u64>) -> Result<Look> {
        let (mut at, mut stored) = (unit.start, false);
        while at < unit.end {
            let run = self
                .image
                .map(at, self.image.virtual_size() - at, Wait::Yes)?;
            let end = unit.end.min(at + run.len);
            match run.source {
                Source::Stored { storage, host, .. } => {
                    stored = true;
                    if !self.is_zero(storage, host..host + (end - at))? {
                        return Ok(Look::Data);
                    }
                }
                Source::Encoded | Source::Moved(_) => return Ok(Look::Data),
                Source::Below
                    if self.image.caps().backing
                        && (stored || at != unit.start || end < unit.end) =>
                {
                    // Part of it shows the image below.
                    return Ok(Look::Data);
                }
                Source::Below if at == unit.start && end == unit.end => {
                    return Ok(Look::None(at + run.len));
                }
                Source::Zero if at == unit.start && end == unit.end => {
                    return Ok(Look::Said(at + run.len));
                }
                Source::Below | Source::Zero => {}
            }
            at = end;
        }
        match stored {
            true => Ok(Look::Zero),
            false => Ok(Look::Said(unit.end)),
        }
    }

    fn is_zero(&mut self, storage: &dyn Storage, host: Range<u64>) -> Result<bool> {
        let mut at = host.start;
        let mut step = FIRST;
        while at < host.end {
            let run = storage.run(at, host.end - at)?;
            if !run.data {
                at += run.len;
                continue;
            }
            let len = clamp_len(run.len.min(step), usize::MAX);
            self.bytes.resize(len.max(self.bytes.len()), 0);
            storage.read_at(&mut self.bytes[..len], at)?;
            if !is_zero(&self.bytes[..len]) {
                return Ok(false);
            }
            at += len64(len);
            step = STEP;
        }
        Ok(true)
    }
}

//! Any sources into a target image.

use std::sync::atomic::AtomicBool;

use crate::chain::Chain;
use crate::copy::differ::Differ;
use crate::copy::engine::{Engine, Job};
use crate::copy::joined::Joined;
use crate::copy::pace::Pace;
use crate::copy::plan::{Before, Space};
use crate::copy::progress::Progress;
use crate::copy::put::Putter;
use crate::copy::salvage::{Lost, Reader};
use crate::copy::scan::{self, KEEP, Runs, Scanner, Scratch};
use crate::error::{Error, ErrorKind, Result};

/// Work range: large enough that the host can give space in large pieces.
const RANGE: u64 = 32 << 20;
/// Most units that are scanned in a work range, which bounds the list of its pieces.
const MAX_UNITS: u64 = 8192;
/// Look-ups made in one go for runs that need no work.
const MAX_LOOK_UPS: usize = 1 << 16;

/// How zero runs within data are treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scan {
    /// Those of 4 KiB are left out, unless the host can share the data without moving it.
    #[default]
    Cheapest,
    /// Those of this many bytes or more are left out; a multiple of 512, not 0.
    Runs(u64),
    /// They are written, and so is what the sources do not have: the target gets all its space.
    Full,
}

/// How a target is written.
#[derive(Clone, Copy)]
pub struct Convert<'a> {
    /// Threads that work; at least 1.
    pub workers: usize,
    /// How zero runs within data are treated.
    pub scan: Scan,
    /// What the target reads as before.
    pub before: Before,
    /// The backing image of the target; needed with [`Before::Backed`].
    pub backing: Option<&'a Joined>,
    /// Read errors become zeroes that this is told of; `None`: they end the job.
    pub salvage: Option<&'a Lost<'a>>,
    /// Most bytes moved in a second.
    pub rate: Option<u64>,
}

impl std::fmt::Debug for Convert<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Convert")
            .field("workers", &self.workers)
            .field("scan", &self.scan)
            .field("before", &self.before)
            .field("salvage", &self.salvage.is_some())
            .field("rate", &self.rate)
            .finish_non_exhaustive()
    }
}

/// Bytes that [`convert`] tells its progress of in all.
pub fn total(sources: &Joined, target: &Chain, before: Before) -> u64 {
    match before {
        // Past the end of the sources the backing image must not show.
        Before::Backed => target.virtual_size(),
        Before::Zeroes | Before::Unknown => sources.len(),
    }
}

/// Makes the target read as the sources do.  What it holds past their end stays, except with
/// [`Before::Backed`], where it becomes zeroes.
///
/// Where the target assigns space it does so in guest order, so that the result is the same
/// whatever the number of workers.  Nothing is flushed or closed.
///
/// # Errors
/// `OutOfRange` where the target is smaller than the sources; `Cancelled`; those of the chains.
/// Then any part of the target may have been written.
pub fn convert(
    sources: &Joined,
    target: &Chain,
    options: &Convert<'_>,
    progress: &dyn Progress,
) -> Result<()> {
    if target.virtual_size() < sources.len() {
        let text = format!(
            "the target holds {} bytes, the source has {}",
            target.virtual_size(),
            sources.len()
        );
        return Err(Error::new(ErrorKind::OutOfRange, text).at_opt(target.top().storage().path()));
    }
    let total = total(sources, target, options.before);
    let size = range_size(sources, target, options);
    let scanner = scanner(sources, target, options, size)?;
    let putter = Putter {
        target,
        reader: scanner.reader,
        before: options.before,
        pace: options.rate.map(Pace::new),
        progress,
        runs: scanner.runs,
        reserve: AtomicBool::new(true),
    };
    let skips = options.before == Before::Zeroes && options.scan != Scan::Full;
    let idle = |at: u64, end: u64| match skips {
        true => zero_run(sources, at, end),
        false => Ok(0),
    };
    let engine = Engine::new(total, size, &idle, progress);
    let workers = options.workers.clamp(1, super::MAX_WORKERS);
    engine.run(workers, Scratch::default, |scratch, job| -> Result<()> {
        one(&engine, &scanner, &putter, job, scratch)
    })
}

/// One work range: scan, have space assigned in turn, write.
fn one(
    engine: &Engine<'_>,
    scanner: &Scanner<'_>,
    putter: &Putter<'_>,
    job: &Job,
    scratch: &mut Scratch,
) -> Result<()> {
    let _tickets = scanner.sources.enter();
    let pieces = scanner.scan(job, scratch)?;
    let top = scanner.target.top();
    if let Some(layout) = top.as_layout() {
        let zeroes_take_space = scanner.before == Before::Backed && top.limits().zero_align == 0;
        if !engine.wait_turn(job) {
            return Ok(());
        }
        layout
            .assign(&scan::to_assign(&pieces, zeroes_take_space))
            .map_err(|e| e.at_opt(top.storage().path()))?;
        engine.turn_over(job);
    }
    putter.put(job, &pieces, scratch)
}

fn scanner<'a>(
    sources: &'a Joined,
    target: &'a Chain,
    options: &Convert<'a>,
    size: u64,
) -> Result<Scanner<'a>> {
    let reader = Reader {
        sources,
        salvage: options.salvage,
    };
    let runs = runs(options.scan, size);
    let differ = match (options.before, options.backing) {
        (Before::Backed, None) => {
            return Err(Error::invalid("the backing image is not open"));
        }
        (Before::Backed, Some(backing)) => {
            let unit = runs.map_or(4096, |r| r.unit);
            Some(Differ::new(reader, backing, unit))
        }
        _ => None,
    };
    let may_share = !matches!(options.scan, Scan::Runs(_)) && options.salvage.is_none();
    Ok(Scanner {
        sources,
        target,
        reader,
        before: options.before,
        space: match options.scan {
            Scan::Full => Space::Full,
            Scan::Cheapest | Scan::Runs(_) => Space::Sparse,
        },
        runs,
        share: sources
            .chains()
            .map(|_| AtomicBool::new(may_share))
            .collect(),
        differ,
    })
}

fn min_run(scan: Scan) -> Option<u64> {
    match scan {
        Scan::Cheapest => Some(4096),
        Scan::Runs(min) => Some(min.max(512)),
        Scan::Full => None,
    }
}

/// A zero run is found in units no larger than 4 KiB, or a work range of one huge cluster would be
/// scanned into too many pieces.
fn runs(scan: Scan, size: u64) -> Option<Runs> {
    min_run(scan).map(|min| {
        let unit = if min.is_multiple_of(4096) { 4096 } else { 512 };
        let floor = (size / MAX_UNITS / 8).checked_next_power_of_two();
        Runs {
            unit: unit.max(floor.unwrap_or(1 << 20).min(1 << 20)),
            min,
        }
    })
}

/// A multiple of the target's cluster, so that no two workers write to the same one, and where it
/// can be of the sources'.
fn range_size(sources: &Joined, target: &Chain, options: &Convert<'_>) -> u64 {
    let encoded = options.salvage.is_some()
        || sources
            .chains()
            .flat_map(Chain::layers)
            .any(|l| !l.caps().host_offsets);
    let unit = runs(options.scan, RANGE).map_or(4096, |r| r.unit);
    let mut size = RANGE.min(unit.saturating_mul(MAX_UNITS));
    if encoded {
        size = size.min(crate::util::align::len64(KEEP));
    }
    let cluster = target.top().cluster_size().unwrap_or(1).max(1);
    let with_source = sources
        .chains()
        .filter_map(|c| c.top().cluster_size())
        .try_fold(cluster, |all, c| lcm(all, c.max(1)))
        .filter(|&all| all <= RANGE);
    let multiple = with_source.unwrap_or(cluster);
    size.checked_next_multiple_of(multiple).unwrap_or(multiple)
}

fn lcm(a: u64, b: u64) -> Option<u64> {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    (a / x).checked_mul(b)
}

/// Bytes from `at`, up to `end`, that read as zeroes without looking at data; perhaps more follow.
fn zero_run(sources: &Joined, at: u64, end: u64) -> Result<u64> {
    let _tickets = sources.enter();
    let mut reached = at;
    for _ in 0..MAX_LOOK_UPS {
        if reached >= end {
            break;
        }
        // A range that cannot be looked up is left to a worker, who knows what to do about it.
        match sources.find(reached, end - reached) {
            Ok(found) if found.is_zero() => reached += found.len,
            _ => break,
        }
    }
    Ok(reached - at)
}

//! Any sources into a target image.

use std::sync::atomic::AtomicBool;

use crate::chain::Chain;
use crate::copy::differ::{Differ, Known};
use crate::copy::engine::{Engine, Job};
use crate::copy::joined::Joined;
use crate::copy::pace::Pace;
use crate::copy::plan::{Before, Only, Space};
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
    /// What alone is looked at: all else of the target stays as it is.  Not with [`Before::Zeroes`] and
    /// [`Before::Backed`], for which it would be wrong.
    pub only: Option<&'a Only<'a>>,
}

impl std::fmt::Debug for Convert<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Convert")
            .field("workers", &self.workers)
            .field("scan", &self.scan)
            .field("before", &self.before)
            .field("salvage", &self.salvage.is_some())
            .field("rate", &self.rate)
            .field("only", &self.only.is_some())
            .finish_non_exhaustive()
    }
}

/// Bytes that [`convert`] tells its progress of in all.
pub fn total(sources: &Joined, target: &Chain, before: Before) -> u64 {
    match before {
        // Past the end of the sources the backing image must not show.
        Before::Backed => target.virtual_size(),
        Before::Zeroes | Before::Unknown | Before::Itself => sources.len(),
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
    check_fits(sources, target)?;
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
    let idle = |at: u64, end: u64| match options.only {
        Some(only) => Ok(only(at..end).map_or(end, |part| part.start) - at),
        None if skips => zero_run(sources, at, end),
        None => Ok(0),
    };
    let engine = Engine::new(total, size, &idle, progress);
    let workers = options.workers.clamp(1, super::MAX_WORKERS);
    engine.run(workers, Scratch::default, |scratch, job| -> Result<()> {
        one(&engine, &scanner, &putter, job, scratch)
    })
}

/// Refuses a target that is smaller than the sources.
pub(super) fn check_fits(sources: &Joined, target: &Chain) -> Result<()> {
    if target.virtual_size() >= sources.len() {
        return Ok(());
    }
    let text = format!(
        "the target holds {} bytes, the source has {}",
        target.virtual_size(),
        sources.len()
    );
    Err(Error::new(ErrorKind::OutOfRange, text).at_opt(target.top().storage().path()))
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
        let is_known = matches!(scanner.before, Before::Backed | Before::Itself);
        let zeroes_take_space = is_known && top.limits().zero_align == 0;
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
    let differ = differ(reader, target, options, runs.map_or(4096, |r| r.unit))?;
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
        only: options.only,
    })
}

/// What compares with what the target reads as, in units of `unit` bytes, where that is known.
pub(super) fn differ<'a>(
    reader: Reader<'a>,
    target: &'a Chain,
    options: &Convert<'a>,
    unit: u64,
) -> Result<Option<Differ<'a>>> {
    match (options.before, options.backing) {
        (Before::Backed, None) => Err(Error::invalid("the backing image is not open")),
        (Before::Backed, Some(backing)) => {
            let known = Known::Backing(backing);
            Ok(Some(Differ::new(reader, known, unit)))
        }
        (Before::Itself, _) => Ok(Some(Differ::new(reader, Known::Itself(target), unit))),
        _ => Ok(None),
    }
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
    // What is decoded together, by one worker.
    let chunks = sources.chains().flat_map(Chain::layers);
    let chunks = chunks.filter_map(|layer| layer.caps().encoded);
    let with_source = sources
        .chains()
        .filter_map(|c| c.top().cluster_size())
        .chain(chunks)
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
pub(super) fn zero_run(sources: &Joined, at: u64, end: u64) -> Result<u64> {
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

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::sync::Arc;

    use parking_lot::Mutex;

    use super::*;
    use crate::copy::joined::tests::{joined, raw_chain};
    use crate::copy::progress::Silent;
    use crate::storage::Storage;
    use crate::storage::memory::{Change, Fault, MemoryStorage, Op};
    use crate::util::align::len64;
    use crate::util::range;

    const MIB: usize = 1 << 20;

    fn options(before: Before) -> Convert<'static> {
        Convert {
            workers: 3,
            scan: Scan::Cheapest,
            before,
            backing: None,
            salvage: None,
            rate: None,
            only: None,
        }
    }

    /// Data, and runs of zeroes of many lengths.
    fn pattern(len: usize) -> Vec<u8> {
        let mut rng = fastrand::Rng::with_seed(11);
        let mut bytes = vec![0; len];
        let mut at = 0;
        while at < len {
            let end = (at + rng.usize(1..300_000)).min(len);
            if rng.bool() {
                rng.fill(&mut bytes[at..end]);
            }
            at = end;
        }
        bytes
    }

    fn convert_to(
        target: &Arc<MemoryStorage>,
        disks: &[&[u8]],
        options: &Convert<'_>,
    ) -> Result<()> {
        let chain = raw_chain(Arc::clone(target) as Arc<dyn Storage>);
        convert(&joined(disks), &chain, options, &Silent)
    }

    #[test]
    fn sources_joined_at_odd_places_arrive_whole_whatever_was_there() {
        let bytes = pattern(34 * MIB + 123);
        let (a, rest) = bytes.split_at(13 * MIB + 77);
        let (b, c) = rest.split_at(1);
        let cases = [
            (Before::Zeroes, 0, Scan::Cheapest),
            (Before::Zeroes, 0, Scan::Runs(1 << 20)),
            (Before::Zeroes, 0, Scan::Runs(512)),
            (Before::Unknown, 9, Scan::Cheapest),
            (Before::Unknown, 9, Scan::Full),
        ];
        for (before, old, scan) in cases {
            let target = Arc::new(MemoryStorage::from_bytes(&vec![old; bytes.len() + 50]));
            let options = Convert {
                scan,
                ..options(before)
            };
            convert_to(&target, &[a, b, c], &options).expect("memory takes all");
            let found = target.to_bytes();
            assert!(found[..bytes.len()] == bytes, "{before:?} {scan:?}");
            assert!(found[bytes.len()..].iter().all(|&b| b == old));
        }
    }

    #[test]
    fn zeroes_are_not_written_to_a_new_target_unless_asked_for() {
        let mut bytes = vec![0; 8 * MIB];
        bytes[5 * MIB] = 1;
        for (scan, most) in [(Scan::Cheapest, 4096), (Scan::Full, 8 * MIB)] {
            let target = Arc::new(MemoryStorage::from_bytes(&vec![0; bytes.len()]));
            target.record();
            let options = Convert {
                scan,
                ..options(Before::Zeroes)
            };
            convert_to(&target, &[&bytes], &options).expect("memory takes all");
            let written = target.changes().iter().fold(0, |sum, change| match change {
                Change::Write { bytes, .. } => sum + bytes.len(),
                _ => sum,
            });
            assert_eq!(written, most, "{scan:?}");
        }
    }

    #[test]
    fn what_is_not_to_be_copied_stays_as_it_is() {
        let bytes = pattern(70 * MIB + 123);
        let parts = [
            4096..8192,
            12_288..16_384,
            30 * MIB..30 * MIB + 4096,
            31 * MIB..65 * MIB + 1,
            70 * MIB + 100..70 * MIB + 123,
        ];
        let only = |range: Range<u64>| {
            let parts = parts.iter().map(|p| len64(p.start)..len64(p.end));
            parts.filter_map(|p| range::intersect(&p, &range)).next()
        };
        for scan in [Scan::Cheapest, Scan::Runs(1 << 20), Scan::Full] {
            let target = Arc::new(MemoryStorage::from_bytes(&vec![9; bytes.len()]));
            let options = Convert {
                scan,
                only: Some(&only),
                ..options(Before::Unknown)
            };
            convert_to(&target, &[&bytes], &options).expect("memory takes all");
            let mut wanted = vec![9; bytes.len()];
            for part in &parts {
                wanted[part.clone()].copy_from_slice(&bytes[part.clone()]);
            }
            assert!(target.to_bytes() == wanted, "{scan:?}");
        }
    }

    #[test]
    fn a_target_that_is_too_small_is_refused_and_untouched() {
        let target = Arc::new(MemoryStorage::from_bytes(&[7; 100]));
        let error = convert_to(&target, &[&[1; 101]], &options(Before::Unknown));
        assert_eq!(error.expect_err("too small").kind(), ErrorKind::OutOfRange);
        assert_eq!(target.to_bytes(), [7; 100]);
    }

    #[test]
    fn a_full_target_ends_the_job() {
        let target = Arc::new(MemoryStorage::from_bytes(&vec![0; 80 * MIB]));
        target.inject(Fault {
            op: Op::Change,
            after: 5,
            count: usize::MAX,
            errno: libc::ENOSPC,
        });
        let error = convert_to(&target, &[&vec![1; 80 * MIB]], &options(Before::Zeroes));
        assert_eq!(error.expect_err("is full").kind(), ErrorKind::NoSpace);
    }

    #[test]
    fn what_cannot_be_read_ends_the_job_or_becomes_zeroes_that_are_told_of() {
        let source = || {
            let source = MemoryStorage::from_bytes(&vec![1; 64 << 10]);
            source.inject(Fault {
                op: Op::Read,
                after: 0,
                count: 3,
                errno: libc::EIO,
            });
            Joined::new(vec![raw_chain(Arc::new(source))]).expect("short")
        };
        let target = Arc::new(MemoryStorage::from_bytes(&vec![0; 64 << 10]));
        let chain = raw_chain(Arc::clone(&target) as Arc<dyn Storage>);
        convert(&source(), &chain, &options(Before::Zeroes), &Silent).expect_err("EIO");

        let told = Mutex::new(Vec::new());
        let lost = |at: u64, len: u64, _: &Error| told.lock().push((at, len));
        let salvaging = Convert {
            salvage: Some(&lost),
            ..options(Before::Zeroes)
        };
        convert(&source(), &chain, &salvaging, &Silent).expect("goes on");
        // The first failure is of the whole read, which is then tried again unit by unit.
        assert_eq!(told.into_inner(), [(0, 4096), (4096, 4096)]);
        let found = target.to_bytes();
        assert!(found[..8192].iter().all(|&b| b == 0));
        assert!(found[8192..].iter().all(|&b| b == 1));
    }

    #[test]
    fn work_ranges_are_whole_clusters() {
        assert_eq!(lcm(6, 4), Some(12));
        assert_eq!(lcm(u64::MAX, 2), None);
        let target = raw_chain(Arc::new(MemoryStorage::new()));
        let sources = joined(&[&[1; 512]]);
        let size = |scan| {
            let options = Convert {
                scan,
                ..options(Before::Zeroes)
            };
            range_size(&sources, &target, &options)
        };
        assert_eq!(size(Scan::Cheapest), RANGE);
        assert_eq!(size(Scan::Runs(512)), 512 * MAX_UNITS);
    }
}

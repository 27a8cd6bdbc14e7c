//! Any sources into a target image that stores them compressed.

use crate::chain::Chain;
use crate::copy::convert::{Convert, Scan, check_fits, differ, total, zero_run};
use crate::copy::engine::{Engine, Job};
use crate::copy::joined::Joined;
use crate::copy::pace::Pace;
use crate::copy::plan::{Before, Space};
use crate::copy::progress::Progress;
use crate::copy::salvage::Reader;
use crate::copy::units::{Collector, Hand, range_size};
use crate::error::Result;
use crate::image::compress::{Compress, Existing};
use crate::storage::Zeroing;

/// As [`crate::copy::convert()`], with all that holds data compressed: whole clusters, those that do
/// not shrink stored as they are, zero clusters left out.
///
/// The result is the same whatever the number of workers.
///
/// # Errors
/// `Unsupported` where the target cannot; else as [`crate::copy::convert()`].
pub fn compress(
    sources: &Joined,
    target: &Chain,
    options: &Convert<'_>,
    progress: &dyn Progress,
) -> Result<()> {
    check_fits(sources, target)?;
    let top = target.top();
    let path = top.storage().path();
    let compress = top.as_compress().map_err(|e| e.at_opt(path))?;
    let unit = top.cluster_size().unwrap_or(1).max(1);
    let reader = Reader {
        sources,
        salvage: options.salvage,
    };
    let collector = Collector {
        reader,
        before: options.before,
        space: space(options.scan),
        differ: differ(reader, target, options, 4096)?,
        unit,
        kept: matches!(options.before, Before::Unknown | Before::Itself).then_some(target),
        pace: options.rate.map(Pace::new),
        progress,
    };
    let skips = options.before == Before::Zeroes && options.scan != Scan::Full;
    let idle = |at: u64, end: u64| match skips {
        true => zero_run(sources, at, end),
        false => Ok(0),
    };
    let total = total(sources, target, options.before);
    let engine = Engine::new(total, range_size(unit), &idle, progress);
    let workers = options.workers.clamp(1, super::MAX_WORKERS);
    let done = engine.run(workers, Hand::default, |hand, job| -> Result<()> {
        one(&engine, &collector, compress, target, job, hand)
    });
    done.map_err(|e| e.at_opt(path))
}

/// Whether zero clusters are stored.
pub(super) fn space(scan: Scan) -> Space {
    match scan {
        Scan::Full => Space::Full,
        Scan::Cheapest | Scan::Runs(_) => Space::Sparse,
    }
}

/// One work range: read, encode, have space given in turn, write.
fn one(
    engine: &Engine<'_>,
    collector: &Collector<'_>,
    compress: &dyn Compress,
    target: &Chain,
    job: &Job,
    hand: &mut Hand,
) -> Result<()> {
    if hand.encoder.is_none() {
        hand.encoder = Some(compress.encoder()?);
    }
    let tickets = collector.reader.sources.enter();
    collector.collect(job, hand)?;
    drop(tickets);
    if !engine.wait_turn(job) {
        return Ok(());
    }
    // Tables are made for zeroes as well, so this too happens in order.
    for zeroes in &hand.batch.zeroes {
        target.zero(zeroes.clone(), Zeroing::MayUnmap)?;
    }
    let placed = compress.place(&hand.batch.units, Existing::Replace)?;
    engine.turn_over(job);
    placed.store(&hand.batch.bytes)
}

//! Disks as images, to a target that takes bytes in order and nothing else.

use std::io::Write;

use parking_lot::Mutex;

use crate::copy::compress::space;
use crate::copy::convert::{Convert, Scan, zero_run};
use crate::copy::count::data_clusters;
use crate::copy::engine::Engine;
use crate::copy::joined::Joined;
use crate::copy::pace::Pace;
use crate::copy::plan::Before;
use crate::copy::progress::Progress;
use crate::copy::salvage::{Lost, Reader};
use crate::copy::units::{Collector, Hand, range_size};
use crate::error::{Error, Result};
use crate::image::compress::Sequence;

/// Bytes that [`send_image`] tells its progress of in all.
pub fn total(sources: &Joined) -> u64 {
    sources.len().saturating_mul(2)
}

/// Clusters of `cluster` bytes that may hold data, as a [`Sequence`] wants to know ahead.
///
/// # Errors
/// `Cancelled`; those of the chains.
pub fn most_clusters(
    sources: &Joined,
    cluster: u64,
    options: &Convert<'_>,
    progress: &dyn Progress,
) -> Result<u64> {
    match options.scan == Scan::Full || options.salvage.is_some() {
        true => Ok(sources.len().div_ceil(cluster.max(1))),
        false => data_clusters(sources, cluster.max(1), progress),
    }
}

/// Writes `sources` to `out` as the image that `sequence` plans: read, and compressed, twice, once
/// to learn the sizes and once to write.  Of the options, what the target was before does not
/// count: it is new.
///
/// # Errors
/// `Cancelled`; `Corrupt` where the sources changed meanwhile; those of the chains and of `out`.
/// Then any number of bytes may have been written.
pub fn send_image(
    sources: &Joined,
    sequence: &mut dyn Sequence,
    out: &mut (dyn Write + Send),
    options: &Convert<'_>,
    progress: &dyn Progress,
) -> Result<()> {
    // Told of once, not twice.
    let silent = |_: u64, _: u64, _: &Error| {};
    let first = options.salvage.map(|_| &silent as &Lost<'_>);
    let sink = &mut std::io::sink();
    if !sequence.is_one_pass() {
        pass(sources, sequence, sink, options, first, progress)?;
    }
    pass(sources, sequence, out, options, options.salvage, progress)?;
    out.flush().map_err(|e| Error::io("write to the stream", e))
}

fn pass(
    sources: &Joined,
    sequence: &mut dyn Sequence,
    out: &mut (dyn Write + Send),
    options: &Convert<'_>,
    salvage: Option<&Lost<'_>>,
    progress: &dyn Progress,
) -> Result<()> {
    let unit = sequence.cluster_size();
    sequence.begin(out)?;
    let collector = Collector {
        reader: Reader { sources, salvage },
        before: Before::Zeroes,
        space: space(options.scan),
        differ: None,
        unit,
        kept: None,
        pace: options.rate.map(Pace::new),
        progress,
    };
    let idle = |at: u64, end: u64| match options.scan {
        Scan::Full => Ok(0),
        Scan::Cheapest | Scan::Runs(_) => zero_run(sources, at, end),
    };
    let engine = Engine::new(sources.len(), range_size(unit), &idle, progress);
    let target = Mutex::new((&mut *sequence, &mut *out));
    let workers = options.workers.clamp(1, super::MAX_WORKERS);
    engine.run(workers, Hand::default, |hand, job| -> Result<()> {
        if !hand.ready {
            hand.encoder = target.lock().0.encoder()?;
            hand.ready = true;
        }
        let tickets = sources.enter();
        collector.collect(job, hand)?;
        drop(tickets);
        if engine.wait_turn(job) {
            let (sequence, out) = &mut *target.lock();
            sequence.add(&hand.batch.units, &hand.batch.bytes, *out)?;
            engine.turn_over(job);
        }
        Ok(())
    })?;
    sequence.finish(out)
}

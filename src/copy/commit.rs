//! The layers above an image moved down into it, each byte once.

use std::ops::Range;

use crate::chain::Chain;
use crate::copy::engine::Engine;
use crate::copy::progress::Progress;
use crate::error::{Error, Result};
use crate::image::{Source, Wait};
use crate::storage::Zeroing;
use crate::util::align::{clamp_len, len64};

/// Work range.
const RANGE: u64 = 16 << 20;
/// Bytes moved at a time.
const STEP: usize = 1 << 20;

/// Writes what the layers of `upper` have, the top-most first where several have it, into `base`,
/// which lies right below the last of them and is open for writing; tells `progress` of as many
/// bytes as the upper disk has.  A base that is smaller than the upper disk grows first; one that
/// is larger keeps its size and what it has past the upper disk's end.
///
/// At every moment the upper disk reads the same.  Nothing is flushed.
///
/// # Errors
/// `Unsupported` where the base cannot grow; `Cancelled`; those of the chains.
pub fn commit(upper: &Chain, base: &Chain, workers: usize, progress: &dyn Progress) -> Result<()> {
    let size = upper.virtual_size();
    if base.virtual_size() < size {
        base.resize(size)?;
    }
    let idle = |at: u64, end: u64| -> Result<u64> {
        let _ticket = upper.enter();
        let found = upper.resolve_layers(at, end - at, Wait::Yes)?;
        Ok(match found.source {
            Source::Below => found.len,
            _ => 0,
        })
    };
    let engine = Engine::new(size, range_size(base), &idle, progress);
    let workers = workers.clamp(1, super::MAX_WORKERS);
    engine.run(workers, Vec::new, |buf, job| -> Result<(), Error> {
        move_down(upper, base, job.range.clone(), buf, progress)
    })
}

/// A multiple of the base's cluster, so that no two workers write to the same one.
pub(super) fn range_size(target: &Chain) -> u64 {
    let cluster = target.top().cluster_size().unwrap_or(1).max(1);
    RANGE.checked_next_multiple_of(cluster).unwrap_or(cluster)
}

fn move_down(
    upper: &Chain,
    base: &Chain,
    range: Range<u64>,
    buf: &mut Vec<u8>,
    progress: &dyn Progress,
) -> Result<()> {
    let _ticket = upper.enter();
    let mut at = range.start;
    while at < range.end {
        progress.check()?;
        let found = upper.resolve_layers(at, range.end - at, Wait::Yes)?;
        let end = at + found.len;
        match found.source {
            Source::Below => {}
            Source::Zero => base.zero(at..end, Zeroing::MayUnmap)?,
            Source::Stored { storage, host, .. } => {
                let run = storage.run(host, found.len)?;
                let end = at + run.len;
                match run.data {
                    true => copy(upper, base, at..end, buf)?,
                    false => base.zero(at..end, Zeroing::MayUnmap)?,
                }
                at = end;
                continue;
            }
            Source::Encoded => copy(upper, base, at..end, buf)?,
        }
        at = end;
    }
    Ok(())
}

/// Copies bytes that an upper layer has.
fn copy(upper: &Chain, base: &Chain, range: Range<u64>, buf: &mut Vec<u8>) -> Result<()> {
    buf.resize(STEP, 0);
    let mut at = range.start;
    while at < range.end {
        let part = clamp_len(range.end - at, STEP);
        upper.read_at(&mut buf[..part], at)?;
        base.write_at(&buf[..part], at)?;
        at += len64(part);
    }
    Ok(())
}

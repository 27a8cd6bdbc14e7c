//! The layers above an image moved down into it, each byte once.

use std::ops::Range;

use crate::chain::Chain;
use crate::copy::engine::Engine;
use crate::copy::find::{Found, Place, Unwritten};
use crate::copy::progress::Progress;
use crate::copy::whole::{Home, Whole};
use crate::error::{Error, Result};
use crate::image::{Source, Wait};
use crate::storage::Zeroing;
use crate::util::align::{clamp_len, len64};
use crate::util::buf::is_zero;
use crate::util::range;

/// Work range.
const RANGE: u64 = 16 << 20;
/// Work ranges of a part of the disk.
const PARTS: u64 = 16;
/// The host is asked for holes in no less: to move them costs less than to ask.
const ASK: u64 = 256 << 10;
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
/// `Unsupported` where the base cannot grow, and for layers that are merged in place; `Cancelled`; those of the chains.
pub fn commit(upper: &Chain, base: &Chain, workers: usize, progress: &dyn Progress) -> Result<()> {
    refuse_merging(upper)?;
    let size = upper.virtual_size();
    if base.virtual_size() < size {
        base.resize(size)?;
    }
    commit_part(upper, base, 0..size, workers, progress)
}

/// Refuses layers that are made of bytes of the base that others would be written over.
fn refuse_merging(upper: &Chain) -> Result<()> {
    let mut layers = upper.layers().iter();
    match layers.find(|layer| layer.as_merge().is_some()) {
        None => Ok(()),
        Some(layer) => {
            let text = "lies over the base and is merged in place, by itself (allowed above the base: other formats)";
            Err(Error::unsupported(text).at_opt(layer.storage().path()))
        }
    }
}

/// Bytes of a disk that is committed in parts: the start of each is a multiple of it.
pub fn part_size(base: &Chain) -> u64 {
    range_size(base).saturating_mul(PARTS)
}

/// As [`commit`], of a range of the disk, which starts at a multiple of [`part_size`]; the base is large
/// enough.  What a call that failed has written of the range may be written again.
///
/// # Errors
/// As [`commit`].
pub fn commit_part(
    upper: &Chain,
    base: &Chain,
    part: Range<u64>,
    workers: usize,
    progress: &dyn Progress,
) -> Result<()> {
    refuse_merging(upper)?;
    let idle = |at: u64, end: u64| -> Result<u64> {
        let _ticket = upper.enter();
        let found = upper.resolve_layers(at, end - at, Wait::Yes)?;
        Ok(match found.source {
            Source::Below => found.len,
            _ => 0,
        })
    };
    let engine = Engine::of(part, range_size(base), &idle, progress);
    let down = Down {
        upper,
        base,
        // New space over zeroes needs no sync of its own.
        whole: Whole::new(base).filter(|_| base.top().caps().backing),
        unwritten: Unwritten::of([upper]),
        progress,
    };
    let workers = workers.clamp(1, super::MAX_WORKERS);
    engine.run(workers, Vec::new, |buf, job| -> Result<(), Error> {
        down.range(job.range.clone(), buf)
    })?;
    down.whole.map_or(Ok(()), |whole| whole.finish())
}

/// A multiple of the base's cluster, so that no two workers write to the same one.
pub(super) fn range_size(target: &Chain) -> u64 {
    let cluster = target.top().cluster_size().unwrap_or(1).max(1);
    RANGE.checked_next_multiple_of(cluster).unwrap_or(cluster)
}

/// Moves ranges down.
struct Down<'a> {
    upper: &'a Chain,
    base: &'a Chain,
    /// Where many clusters are written by one sync.
    whole: Option<Whole<'a>>,
    /// Upper layers in which the host is asked for holes.
    unwritten: Unwritten,
    progress: &'a dyn Progress,
}

/// What an upper layer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Has {
    Data,
    Zeroes,
}

impl Down<'_> {
    fn range(&self, range: Range<u64>, buf: &mut Vec<u8>) -> Result<()> {
        let _ticket = self.upper.enter();
        let mut at = range.start;
        while at < range.end {
            self.progress.check()?;
            let (len, has) = self.find(at, range.end - at)?;
            at += match has {
                None => len,
                Some(has) => self.part(at..at + len, has, buf)?,
            };
        }
        Ok(())
    }

    /// What the upper layers have at `at`, and how far that goes.
    fn find(&self, at: u64, len: u64) -> Result<(u64, Option<Has>)> {
        let mut found = Found::of(self.upper.resolve_layers(at, len, Wait::Yes)?);
        if found.len >= ASK {
            found = self.unwritten.ask(found)?;
        }
        let has = match found.place {
            Place::Hole => None,
            Place::Zero => Some(Has::Zeroes),
            Place::Stored { .. } | Place::Encoded => Some(Has::Data),
        };
        Ok((found.len, has))
    }

    /// Moves a part of a range of one kind; how much, which may be more than was given, where it
    /// ends within a cluster.
    fn part(&self, part: Range<u64>, has: Has, buf: &mut Vec<u8>) -> Result<u64> {
        let mut end = part.end;
        if let Some(whole) = &self.whole {
            match whole.home(part.start, range::len(&part))? {
                Home::InPlace(len) => end = part.start + len,
                Home::Cluster(cluster) => match (&has, part.end - part.end % whole.cluster()) {
                    (Has::Zeroes, whole_end) if cluster == part.start && whole_end > cluster => {
                        end = whole_end;
                    }
                    _ => return self.cluster(whole, part, cluster, buf),
                },
            }
        }
        let part = part.start..end;
        let len = range::len(&part);
        match has {
            Has::Data => self.copy(part, buf)?,
            Has::Zeroes => self.base.zero(part, Zeroing::MayUnmap)?,
        }
        Ok(len)
    }

    /// Leaves the cluster at `cluster` to be stored as it is to read, with all that the upper layers
    /// have of it, beginning with `part`, which starts in it; how much of the disk from there on is
    /// done then.
    fn cluster(
        &self,
        whole: &Whole<'_>,
        part: Range<u64>,
        cluster: u64,
        buf: &mut Vec<u8>,
    ) -> Result<u64> {
        let base = self.base.virtual_size();
        let all = cluster..base.min(cluster + whole.cluster());
        let end = all.end.min(self.upper.virtual_size());
        buf.resize(STEP.max(clamp_len(whole.cluster(), usize::MAX)), 0);
        let buf = &mut buf[..clamp_len(range::len(&all), usize::MAX)];
        if part.start > cluster || part.end < all.end {
            self.base.read_at(buf, cluster)?;
        }
        let mut from = part.start;
        while from < end {
            let (len, has) = self.find(from, end - from)?;
            let first = clamp_len(from - cluster, buf.len());
            let bytes = &mut buf[first..first + clamp_len(len, usize::MAX)];
            match has {
                None => {}
                Some(Has::Data) => self.upper.read_at(bytes, from)?,
                Some(Has::Zeroes) => bytes.fill(0),
            }
            from += len;
        }
        if is_zero(buf) {
            self.base.zero(all, Zeroing::MayUnmap)?;
        } else {
            whole.add(cluster, buf)?;
        }
        Ok(end - part.start)
    }

    /// Copies bytes that an upper layer has.
    fn copy(&self, part: Range<u64>, buf: &mut Vec<u8>) -> Result<()> {
        buf.resize(STEP, 0);
        let mut at = part.start;
        while at < part.end {
            self.progress.check()?;
            let len = clamp_len(part.end - at, STEP);
            self.upper.read_at(&mut buf[..len], at)?;
            self.base.write_at(&buf[..len], at)?;
            at += len64(len);
        }
        Ok(())
    }
}

//! What each block of the new disk is made of: found by the bytes, whatever their digests say.

use std::hash::{DefaultHasher, Hasher};
use std::ops::Range;

use parking_lot::Mutex;

use super::Disks;
use crate::copy::progress::Progress;
use crate::error::{Error, ErrorKind, Result};
use crate::image::delta::{Make, Step};
use crate::util::align::{clamp_len, len64};
use crate::util::buf::is_zero;
use crate::util::parallel;

/// Blocks that one thread takes at a time; copies go on from one to the next within these.
const RANGE: u64 = 512;
/// Blocks with the same digest that are looked at.
const MOST_ALIKE: usize = 8;
/// A block differs from what was at its place by no more than one byte in so many.
const FEW: usize = 4;

/// The digest and the place of each block of the old disk that is not zero, in order.
type Index = Vec<(u64, u32)>;

/// The blocks that are made, in order.
pub(super) fn scan(
    disks: &Disks<'_>,
    differs: bool,
    most: u64,
    workers: usize,
    progress: &dyn Progress,
) -> Result<Vec<Step>> {
    let index = index(disks, workers, progress)?;
    let found = Mutex::new((Vec::new(), 0));
    let blocks = disks.blocks();
    let mut ranges = ranges(blocks);
    parallel::for_each(workers, &mut ranges, Buffers::default, |buffers, range| {
        progress.check()?;
        let first = range.start;
        let mut steps = Vec::new();
        let scan = Scan {
            disks,
            index: &index,
            differs,
        };
        scan.range(range.clone(), buffers, &mut steps)?;
        let mut found = found.lock();
        found.1 += len64(steps.len());
        // Before there is no memory for more.
        if found.1 > most {
            return Err(Error::new(
                ErrorKind::OutOfRange,
                format!("the disks differ in more than {most} blocks (allowed: so many)"),
            ));
        }
        found.0.push((first, steps));
        drop(found);
        progress.advance((range.end - range.start) * disks.block);
        crate::Result::Ok(())
    })?;
    let (mut found, _) = found.into_inner();
    found.sort_unstable_by_key(|(first, _)| *first);
    Ok(found.into_iter().flat_map(|(_, steps)| steps).collect())
}

fn ranges(blocks: u64) -> impl Iterator<Item = Range<u64>> + Send {
    let starts = (0..blocks).step_by(clamp_len(RANGE, usize::MAX));
    starts.map(move |start| start..blocks.min(start + RANGE))
}

fn digest(block: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(block);
    hasher.finish()
}

fn index(disks: &Disks<'_>, workers: usize, progress: &dyn Progress) -> Result<Index> {
    let all = Mutex::new(Index::new());
    // One that is not whole is no source.
    let blocks = disks.old.len() / disks.block;
    let mut ranges = ranges(blocks);
    parallel::for_each(
        workers,
        &mut ranges,
        Vec::new,
        |buf: &mut Vec<u8>, range| {
            progress.check()?;
            let len = (range.end - range.start) * disks.block;
            buf.resize(clamp_len(len, usize::MAX), 0);
            disks.old.read_at(buf, range.start * disks.block)?;
            let blocks = buf.chunks(disks.block_len());
            let blocks = (range.start..).zip(blocks).filter(|(_, b)| !is_zero(b));
            let digests =
                blocks.filter_map(|(n, block)| Some((digest(block), u32::try_from(n).ok()?)));
            let digests: Index = digests.collect();
            all.lock().extend(digests);
            progress.advance(len);
            crate::Result::Ok(())
        },
    )?;
    let mut all = all.into_inner();
    all.sort_unstable();
    Ok(all)
}

#[derive(Default)]
struct Buffers {
    new: Vec<u8>,
    old: Vec<u8>,
    other: Vec<u8>,
}

struct Scan<'a> {
    disks: &'a Disks<'a>,
    index: &'a Index,
    differs: bool,
}

impl Scan<'_> {
    fn range(&self, range: Range<u64>, buffers: &mut Buffers, out: &mut Vec<Step>) -> Result<()> {
        let disks = self.disks;
        let len = clamp_len((range.end - range.start) * disks.block, usize::MAX);
        let Buffers { new, old, other } = buffers;
        new.resize(len, 0);
        old.resize(len, 0);
        disks.new.read_at(new, range.start * disks.block)?;
        disks.old.read_at(old, range.start * disks.block)?;
        let size = disks.block_len();
        let pairs = new.chunks(size).zip(old.chunks(size));
        // The copy before, which may go on.
        let mut last = None;
        for (block, (new, old)) in (range.start..).zip(pairs) {
            let is_there = (block + 1) * disks.block <= disks.old.len();
            let at_end = disks.new.len() == disks.old.len();
            if new == old && (is_there || at_end) {
                continue;
            }
            let make = if is_zero(new) {
                Make::Zero
            } else if let Some(from) = self.alike(new, last, other)? {
                last = from.checked_add(1);
                Make::Copy(from)
            } else if self.differs && is_there && is_close(new, old) {
                Make::Differ
            } else {
                Make::Store
            };
            out.push(Step {
                block: u32::try_from(block).unwrap_or(u32::MAX),
                blocks: 1,
                make,
            });
        }
        Ok(())
    }

    /// A block of the old disk with these bytes: `next` where that is one, else the first.
    fn alike(&self, new: &[u8], next: Option<u32>, buf: &mut Vec<u8>) -> Result<Option<u32>> {
        let digest = digest(new);
        let first = self.index.partition_point(|(other, _)| *other < digest);
        let alike = self.index.iter().skip(first);
        let alike = alike.take_while(|(other, _)| *other == digest);
        let is_next = next.filter(|next| self.index.binary_search(&(digest, *next)).is_ok());
        buf.resize(new.len(), 0);
        for from in is_next
            .into_iter()
            .chain(alike.take(MOST_ALIKE).map(|(_, block)| *block))
        {
            self.disks
                .old
                .read_at(buf, u64::from(from) * self.disks.block)?;
            if buf == new {
                return Ok(Some(from));
            }
        }
        Ok(None)
    }
}

/// Whether few enough bytes differ that a difference is likely to be shorter.
fn is_close(new: &[u8], old: &[u8]) -> bool {
    let differ = new.iter().zip(old).filter(|(a, b)| a != b).count();
    len64(differ) * len64(FEW) <= len64(new.len())
}

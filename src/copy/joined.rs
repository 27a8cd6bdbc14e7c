//! Several disks joined end to end.

use std::ops::Range;

use crate::chain::Chain;
use crate::copy::find::Found;
use crate::error::{Error, ErrorKind, Result};
use crate::image::Wait;
use crate::util::align::{clamp_len, len64};
use crate::util::grace::Ticket;
use crate::util::range::intersect;

/// Disks joined end to end, each as long as its virtual size, or a part of one.  Reads as zeroes
/// past the end.
#[derive(Debug)]
pub struct Joined {
    parts: Vec<Part>,
    len: u64,
}

#[derive(Debug)]
struct Part {
    chain: Chain,
    /// What of it counts.
    window: Range<u64>,
    /// Where that is among all.
    start: u64,
}

impl Joined {
    /// Joins `chains` in order.
    ///
    /// # Errors
    /// `OutOfRange` where the lengths add up to more than 2^63 - 1 bytes.
    pub fn new(chains: Vec<Chain>) -> Result<Self> {
        let mut len = 0u64;
        let mut parts = Vec::with_capacity(chains.len());
        for chain in chains {
            let start = len;
            len = len
                .checked_add(chain.virtual_size())
                .filter(|&l| i64::try_from(l).is_ok())
                .ok_or_else(|| {
                    Error::new(
                        ErrorKind::OutOfRange,
                        "the disks joined are longer than 2^63 - 1 bytes",
                    )
                })?;
            let window = 0..chain.virtual_size();
            parts.push(Part {
                chain,
                window,
                start,
            });
        }
        Ok(Self { parts, len })
    }

    /// A part of one disk.
    ///
    /// # Errors
    /// `OutOfRange` where it reaches past the end of the disk.
    pub fn part_of(chain: Chain, part: Range<u64>) -> Result<Self> {
        let size = chain.virtual_size();
        if part.start > part.end || part.end > size {
            let text = format!(
                "the part {:#x}..{:#x} is not inside the disk of {size:#x} bytes",
                part.start, part.end
            );
            return Err(Error::new(ErrorKind::OutOfRange, text));
        }
        Ok(Self {
            len: part.end - part.start,
            parts: vec![Part {
                chain,
                window: part,
                start: 0,
            }],
        })
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The disks, in order.
    pub fn chains(&self) -> impl Iterator<Item = &Chain> {
        self.parts.iter().map(|p| &p.chain)
    }

    /// Fills all of `buf` from `at`; bytes past the end are zeroes.
    ///
    /// # Errors
    /// Those of the chains.
    pub fn read_at(&self, buf: &mut [u8], at: u64) -> Result<()> {
        let wanted = at..at.saturating_add(len64(buf.len()));
        let mut done = 0;
        for part in self.touched(&wanted) {
            let Some(here) = intersect(&wanted, &part.range()) else {
                continue;
            };
            let len = clamp_len(here.end - here.start, buf.len() - done);
            part.chain
                .read_at(&mut buf[done..done + len], part.offset(here.start))?;
            done += len;
        }
        buf[done..].fill(0);
        Ok(())
    }

    /// What is at `at`, looking no further than `len`, which is not 0.  Hold [`Joined::enter`]
    /// from before the call until what it found is no longer used.
    ///
    /// # Errors
    /// Those of the chains.
    pub(super) fn find(&self, at: u64, len: u64) -> Result<Found<'_>> {
        self.locate(at, len)?.asked()
    }

    /// As `find`, without a question to the host: its holes count as stored.
    ///
    /// # Errors
    /// Those of the chains.
    pub(super) fn locate(&self, at: u64, len: u64) -> Result<Found<'_>> {
        match self.part_at(at) {
            Some((index, part)) => {
                let offset = part.offset(at);
                let len = len.min(part.window.end - offset);
                let mut found = Found::of(part.chain.resolve(offset, len, Wait::Yes)?);
                found.part = index;
                Ok(found)
            }
            None => Ok(Found::hole(len)),
        }
    }

    /// Keeps the offsets that `find` hands out valid.
    pub(super) fn enter(&self) -> Vec<Ticket> {
        self.parts.iter().map(|p| p.chain.enter()).collect()
    }

    fn part_at(&self, at: u64) -> Option<(usize, &Part)> {
        if at >= self.len {
            return None;
        }
        let index = self.parts.partition_point(|p| p.range().end <= at);
        self.parts.get(index).map(|p| (index, p))
    }

    fn touched(&self, range: &Range<u64>) -> &[Part] {
        let first = self.parts.partition_point(|p| p.range().end <= range.start);
        let end = self.parts.partition_point(|p| p.start < range.end);
        self.parts.get(first..end.max(first)).unwrap_or_default()
    }
}

impl Part {
    fn range(&self) -> Range<u64> {
        self.start..self.start + (self.window.end - self.window.start)
    }

    /// Where in the disk `at`, which is inside this part, is.
    fn offset(&self, at: u64) -> u64 {
        self.window.start + (at - self.start)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::chain::{Base, State};
    use crate::formats::raw;
    use crate::image::open::OpenOptions;
    use crate::storage::Storage;
    use crate::storage::memory::MemoryStorage;
    use crate::storage::open::Access;

    /// A raw disk in memory.
    pub(crate) fn raw_chain(storage: Arc<dyn Storage>) -> Chain {
        let options = OpenOptions {
            access: Access::Write,
            ..OpenOptions::default()
        };
        let image = (raw::DRIVER.open)(storage, &options).expect("raw opens anything");
        Chain::new(vec![image], Base::Zeroes, options.grace).expect("one layer")
    }

    /// Disks in memory that hold these bytes, joined.
    pub(crate) fn joined(disks: &[&[u8]]) -> Joined {
        let chains = disks
            .iter()
            .map(|d| raw_chain(Arc::new(MemoryStorage::from_bytes(d))))
            .collect();
        Joined::new(chains).expect("short")
    }

    #[test]
    fn reads_cross_the_seams_and_end_in_zeroes() {
        let joined = joined(&[&[1; 3], &[], &[2; 2], &[3; 4]]);
        assert_eq!(joined.len(), 9);
        let mut buf = [9; 12];
        joined.read_at(&mut buf, 0).expect("reads");
        assert_eq!(buf, [1, 1, 1, 2, 2, 3, 3, 3, 3, 0, 0, 0]);
        let mut buf = [9; 3];
        joined.read_at(&mut buf, 4).expect("reads");
        assert_eq!(buf, [2, 3, 3]);
        joined.read_at(&mut buf, 20).expect("reads");
        assert_eq!(buf, [0; 3]);
    }

    #[test]
    fn a_part_of_a_disk_begins_and_ends_where_it_was_cut() {
        let chain = || raw_chain(Arc::new(MemoryStorage::from_bytes(&[1, 2, 3, 4, 5])));
        let part = Joined::part_of(chain(), 1..4).expect("inside");
        let mut buf = [9; 4];
        part.read_at(&mut buf, 0).expect("reads");
        assert_eq!((part.len(), buf), (3, [2, 3, 4, 0]));
        let found = part.find(1, 100).expect("finds");
        assert_eq!((found.len, found.state()), (2, State::Data));
        assert_eq!(part.find(3, 5).expect("finds").state(), State::Hole);
        Joined::part_of(chain(), 1..6).expect_err("past the end");
    }

    #[test]
    fn what_is_found_ends_at_a_seam_and_past_the_end_is_a_hole() {
        let joined = joined(&[&[1; 3], &[2; 2]]);
        let found = joined.find(1, 100).expect("finds");
        assert_eq!((found.len, found.part), (2, 0));
        let found = joined.find(3, 100).expect("finds");
        assert_eq!((found.len, found.part), (2, 1));
        let found = joined.find(5, 100).expect("finds");
        assert_eq!((found.len, found.state()), (100, State::Hole));
    }
}

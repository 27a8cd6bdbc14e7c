//! The space of the file: which of it is free, and taking it.

use std::ops::Range;
use std::sync::atomic::Ordering;

use crate::error::{ErrorKind, Result};
use crate::formats::vhd::batmap;
use crate::formats::vhd::footer::Kind;
use crate::formats::vhd::geometry::SECTOR;
use crate::formats::vhd::layout::{Blocks, UNUSED};
use crate::formats::vhd::sparse::{Shape, Sparse};
use crate::image::units::Taken;
use crate::storage::Zeroing;
use crate::util::align::clamp_len;
use crate::util::range;

/// The file grows by at most this much more than is needed, so that moving the footer costs one
/// sync for many blocks.
const AHEAD: u64 = 32 << 20;
/// Blocks the file grows ahead by, at most.
const AHEAD_BLOCKS: u64 = 15;
/// Where table words end.
const LIMIT: u64 = UNUSED as u64 * SECTOR;
/// Freed blocks remembered for reuse, 4 bytes each; more than that are left for `check`.
const MAX_FREED: usize = 1 << 20;

/// What is known of the file's space.
#[derive(Debug, Default)]
pub(super) struct Space {
    /// First byte past everything in use, from which on all is zero; `None` until it was looked for.
    pub(super) tail: Option<u64>,
    /// Where the footer at the end is, while there is one.
    pub(super) footer: Option<u64>,
    /// Whether the file's end is not as a clean close leaves it.
    pub(super) grown: bool,
    /// Where a footer was that is still to be erased before space after it is taken.
    pub(super) stale: Option<u64>,
    /// Free blocks.
    pub(super) ready: Vec<u32>,
    /// The same, and they read as zeroes.
    pub(super) clean: Vec<u32>,
    /// Space between blocks, on storage of fixed length.
    gaps: Vec<u32>,
    /// Whether no two blocks lie upon each other, once that was looked for.
    pub(super) disjoint: Option<bool>,
}

impl Space {
    /// Space of a file whose footer is at `footer`.
    pub(super) fn new(footer: Option<u64>) -> Self {
        Self {
            footer,
            ..Self::default()
        }
    }

    /// A footer was written at `host`, at the end of the file.
    pub(super) fn footer_is_at(&mut self, host: u64) {
        self.footer = Some(host);
        self.tail = None;
    }

    /// The file is about to end at `end`: what is free behind it is no more.
    pub(super) fn forget_behind(&mut self, end: u64) {
        for slots in [&mut self.ready, &mut self.clean, &mut self.gaps] {
            slots.retain(|slot| u64::from(*slot) * SECTOR < end);
        }
    }

    /// The free blocks, which no table word names.
    fn listed(&self) -> impl Iterator<Item = u32> {
        self.ready.iter().chain(&self.clean).copied()
    }

    /// The gaps, in order, which are no longer known then.
    pub(super) fn take_gaps(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.gaps)
    }

    /// Whether part of a range of the file is a free block or a gap.
    pub(super) fn lists(&self, host: &Range<u64>, blocks: Blocks) -> bool {
        let mut slots = self.listed().chain(self.gaps.iter().copied());
        slots.any(|slot| {
            let at = u64::from(slot) * SECTOR;
            range::intersect(&(at..at + blocks.len()), host).is_some()
        })
    }

    /// The end of the last free block: no table word names it, and still it is not to be taken twice.
    pub(super) fn listed_end(&self, blocks: Blocks) -> u64 {
        let last = self.listed().max();
        last.map_or(0, |slot| u64::from(slot) * SECTOR + blocks.len())
    }
}

impl Sparse {
    /// Space of blocks, the first of which begins at `host`.
    pub(super) fn blocks_at(&self, host: u64, count: u64, zeroed: bool) -> Taken {
        Taken {
            lead: self.blocks.bitmap,
            zeroed,
            ..Taken::new(host + self.blocks.bitmap, count, self.blocks.stride())
        }
    }

    /// Finds space for one to `count` blocks.
    pub(super) fn take_blocks(
        &self,
        space: &mut Space,
        shape: &Shape,
        count: u64,
    ) -> Result<Taken> {
        let tail = self.tail(space, shape)?;
        if let Some(slot) = space.clean.pop() {
            return Ok(self.blocks_at(u64::from(slot) * SECTOR, 1, true));
        }
        if let Some(slot) = space.ready.pop() {
            return Ok(self.take_slot(slot));
        }
        match self.take_new(space, shape, tail, count) {
            Err(e) if e.kind() == ErrorKind::NoSpace => match space.gaps.pop() {
                // The storage, of fixed length, is used up to its end.
                Some(slot) => Ok(self.take_slot(slot)),
                None => Err(e),
            },
            done => done,
        }
    }

    fn take_slot(&self, slot: u32) -> Taken {
        let host = u64::from(slot) * SECTOR;
        self.blocks_at(host, 1, self.punch(host).is_ok())
    }

    /// Takes space behind all that is in use.
    fn take_new(&self, space: &mut Space, shape: &Shape, tail: u64, count: u64) -> Result<Taken> {
        let (len, stride) = (self.blocks.len(), self.blocks.stride());
        let host = self.blocks.place(tail);
        let end = self.footer_place().unwrap_or(LIMIT);
        let room = end.saturating_sub(host + len) / stride + 1;
        let count = count.min(room);
        let end = self.limit(host + (count - 1) * stride + len)?;
        let ahead = match self.kind {
            // Its blocks are taken when they are wanted.
            Kind::Differencing => self.ahead_blocks() * stride,
            Kind::Dynamic | Kind::Fixed => 0,
        };
        self.make_room(space, shape, end, ahead)?;
        space.tail = Some(end);
        // Behind all that is in use a file is zero, a device is anything.
        Ok(self.blocks_at(host, count, !self.storage.has_fixed_len()))
    }

    /// How many blocks the file grows by beyond what is needed at once.
    pub(super) fn ahead_blocks(&self) -> u64 {
        AHEAD_BLOCKS.min(AHEAD / self.blocks.stride())
    }

    /// Lists the space between blocks of storage of fixed length, which cannot grow once its end
    /// is reached.  Called before any space is taken.
    pub(super) fn find_gaps(&self, space: &mut Space, shape: &Shape) -> Result<()> {
        // A batmap that cannot be trusted may still be somebody's, wherever it is.
        if matches!(shape.batmap, batmap::Found::Damaged(_)) {
            return Ok(());
        }
        let waiting = self.allocator.waiting().into_iter();
        let waiting =
            waiting.flat_map(|host| host.step_by(clamp_len(self.blocks.len(), usize::MAX)));
        let waiting = waiting.filter_map(|host| u32::try_from(host / SECTOR).ok());
        space.gaps.clear();
        let Some(words) = self.named(shape, space.listed().chain(waiting).collect())? else {
            return Ok(());
        };
        let hosts = words.iter().map(|word| u64::from(*word) * SECTOR);
        let mut used = 0;
        for part in self.in_order(shape, hosts) {
            let mut host = self.blocks.place(used);
            while host + self.blocks.len() <= part.start && space.gaps.len() < MAX_FREED {
                space.gaps.extend(u32::try_from(host / SECTOR));
                host += self.blocks.stride();
            }
            used = used.max(part.end);
        }
        Ok(())
    }

    /// All metadata, and blocks that begin at `hosts`, which ascend; in order.
    pub(super) fn in_order<I: Iterator<Item = u64>>(
        &self,
        shape: &Shape,
        hosts: I,
    ) -> impl Iterator<Item = Range<u64>> + use<I> {
        let mut metadata = self.metadata(shape);
        metadata.sort_unstable_by_key(|r| r.start);
        let len = self.blocks.len();
        let mut metadata = metadata.into_iter().peekable();
        let mut blocks = hosts.map(move |host| host..host + len).peekable();
        std::iter::from_fn(move || match (metadata.peek(), blocks.peek()) {
            (Some(m), Some(b)) if m.start <= b.start => metadata.next(),
            (_, Some(_)) => blocks.next(),
            (_, None) => metadata.next(),
        })
    }

    /// Takes `len` bytes at a sector of the file for metadata.
    pub(super) fn take_bytes(&self, space: &mut Space, shape: &Shape, len: u64) -> Result<u64> {
        let host = self.tail(space, shape)?.next_multiple_of(SECTOR);
        let end = self.limit(host + len.next_multiple_of(SECTOR))?;
        self.make_room(space, shape, end, 0)?;
        space.tail = Some(end);
        Ok(host)
    }

    /// Takes all up to `end` for metadata.
    pub(super) fn take_until(&self, space: &mut Space, shape: &Shape, end: u64) -> Result<()> {
        self.make_room(space, shape, self.limit(end)?, 0)?;
        space.tail = Some(end);
        Ok(())
    }

    /// Whether metadata lies in a range of the file.
    pub(super) fn is_metadata(&self, shape: &Shape, host: &Range<u64>) -> bool {
        self.metadata(shape)
            .iter()
            .any(|part| range::intersect(part, host).is_some())
    }

    /// Where all metadata is, but for the footer at the end.
    pub(super) fn metadata(&self, shape: &Shape) -> Vec<Range<u64>> {
        let data_end = self.data_end.load(Ordering::Acquire);
        let locators = shape.header.locators();
        let locators = locators.iter().filter_map(|l| {
            // Of room that does not fit, what it holds is there all the same.
            let ends = [l.space_bytes(), l.len.into()].map(|len| l.offset.saturating_add(len));
            let end = ends.into_iter().find(|end| *end <= data_end)?;
            Some(l.offset..end)
        });
        let batmap = shape.batmap().into_iter().flat_map(|map| map.ranges());
        let reserved = shape.reserved.iter().chain(batmap).cloned();
        reserved.chain(locators).collect()
    }

    /// Lists a block as free that nothing names; what is beyond the list is left for `check`.
    pub(super) fn list_free(&self, space: &mut Space, host: u64) {
        if let Ok(slot) = u32::try_from(host / SECTOR)
            && space.ready.len() + space.clean.len() < MAX_FREED
        {
            space.ready.push(slot);
        }
    }

    /// Gives the space of free blocks back to the host.
    pub(super) fn punch_ready(&self, space: &mut Space) {
        // A hint: what cannot be punched now is zeroed when it is taken.
        while let Some(slot) = space.ready.last()
            && self.punch(u64::from(*slot) * SECTOR).is_ok()
        {
            space.clean.extend(space.ready.pop());
        }
    }

    fn punch(&self, host: u64) -> Result<()> {
        self.storage
            .zero(host..host + self.blocks.len(), Zeroing::MayUnmap)
    }

    /// Whether no two blocks lie upon each other, so that the space of one may be freed.
    pub(super) fn is_disjoint(&self, space: &mut Space, shape: &Shape) -> Result<bool> {
        if let Some(disjoint) = space.disjoint {
            return Ok(disjoint);
        }
        let words = self.named(shape, Vec::new())?;
        let sectors = self.blocks.len() / SECTOR;
        let apart = |pair: &[u32]| u64::from(pair[1]) - u64::from(pair[0]) >= sectors;
        let disjoint = words.is_some_and(|words| words.windows(2).all(apart));
        space.disjoint = Some(disjoint);
        Ok(disjoint)
    }

    /// Some words and all that the table has of blocks, in order; none where there are too many.
    fn named(&self, shape: &Shape, mut words: Vec<u32>) -> Result<Option<Vec<u32>>> {
        shape.table.each(&*self.storage, |_, word| {
            if word != UNUSED && words.len() <= 4 * MAX_FREED {
                words.push(word);
            }
            Ok(())
        })?;
        words.sort_unstable();
        Ok(Some(words).filter(|words| words.len() <= 4 * MAX_FREED))
    }
}

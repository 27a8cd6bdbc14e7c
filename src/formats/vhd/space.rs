//! The space of the file: which of it is free, and taking it.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::atomic::Ordering;

use crate::error::{ErrorKind, Result};
use crate::formats::vhd::batmap;
use crate::formats::vhd::footer::Kind;
use crate::formats::vhd::geometry::SECTOR;
use crate::formats::vhd::layout::{Blocks, UNUSED};
use crate::formats::vhd::sparse::{Shape, Sparse};
use crate::image::open::WriteOrder;
use crate::storage::Zeroing;
use crate::storage::syncs::Stamp;
use crate::util::align::{self, clamp_len, len64};
use crate::util::grace::Moment;
use crate::util::range;

/// The file grows by at most this much more than is needed, so that moving the footer costs one
/// sync for many blocks.
const AHEAD: u64 = 32 << 20;
/// Blocks the file grows ahead by, at most.
const AHEAD_BLOCKS: u64 = 15;
/// Freed blocks remembered for reuse, 4 bytes each; more than that are left for `check`.
const MAX_FREED: usize = 1 << 20;
/// Table bytes read at a time.
const STEP: u64 = 64 << 10;

/// Blocks that were made unreachable together.
#[derive(Debug)]
pub(super) struct Freed {
    slots: Vec<u32>,
    moment: Moment,
    stamp: Stamp,
}

/// Space assigned to blocks ahead of their writes: neighbours in the disk and in the file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Assigned {
    count: u64,
    host: u64,
}

/// Space for one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Spot {
    /// Where it begins.
    pub(super) host: u64,
    /// Whether it reads as zeroes.
    pub(super) zeroed: bool,
    /// Whether it does so on stable media too.
    pub(super) ready: bool,
}

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
    /// Freed blocks that may still be read, or named by the table on stable media.
    pub(super) pending: VecDeque<Freed>,
    /// Freed blocks that may be taken.
    pub(super) ready: Vec<u32>,
    /// The same, and they read as zeroes.
    pub(super) clean: Vec<u32>,
    /// How many are in these three.
    pub(super) freed: usize,
    pub(super) assigned: BTreeMap<u64, Assigned>,
    /// Space between blocks, on storage of fixed length.
    gaps: Vec<u32>,
    /// The part from `tail` on that is zero on stable media.
    pub(super) zeroes: Range<u64>,
    /// Whether no two blocks lie upon each other, once that was looked for.
    disjoint: Option<bool>,
}

impl Spot {
    /// Space that reads as zeroes, maybe not on stable media.
    fn zeroed(host: u64) -> Self {
        Self {
            host,
            zeroed: true,
            ready: false,
        }
    }
}

impl Space {
    /// Space of a file whose footer is at `footer`.
    pub(super) fn new(footer: Option<u64>) -> Self {
        Self {
            footer,
            ..Self::default()
        }
    }

    /// Where the footer at the end is, while there is one.
    pub(super) fn footer(&self) -> Option<u64> {
        self.footer
    }

    /// A footer was written at `host`, at the end of the file.
    pub(super) fn footer_is_at(&mut self, host: u64) {
        self.footer = Some(host);
        self.tail = None;
        self.zeroes = 0..0;
    }

    /// The blocks that are freed or assigned, which no table word names.
    fn listed(&self, blocks: Blocks) -> impl Iterator<Item = u32> {
        let freed = self.pending.iter().flat_map(|f| &f.slots);
        let freed = freed.chain(&self.ready).chain(&self.clean).copied();
        let assigned = self.assigned.values().flat_map(move |run| {
            let hosts = (0..run.count).map(move |i| run.host + i * blocks.stride());
            hosts.filter_map(|host| u32::try_from(host / SECTOR).ok())
        });
        freed.chain(assigned)
    }

    /// Whether part of a range of the file is freed, assigned or a gap.
    pub(super) fn lists(&self, host: &Range<u64>, blocks: Blocks) -> bool {
        let mut slots = self.listed(blocks).chain(self.gaps.iter().copied());
        slots.any(|slot| {
            let at = u64::from(slot) * SECTOR;
            range::intersect(&(at..at + blocks.len()), host).is_some()
        })
    }

    /// The end of the last block that is freed or assigned: no table word names it, and still it
    /// is not to be taken twice.
    pub(super) fn listed_end(&self, blocks: Blocks) -> u64 {
        let last = self.listed(blocks).max();
        last.map_or(0, |slot| u64::from(slot) * SECTOR + blocks.len())
    }

    /// Takes the space that was assigned to a block.
    fn take_assigned(&mut self, index: u64, stride: u64) -> Option<u64> {
        let (&first, &run) = self.assigned.range(..=index).next_back()?;
        let before = index - first;
        if before >= run.count {
            return None;
        }
        self.assigned.remove(&first);
        let host = run.host + before * stride;
        for (first, count, host) in [
            (first, before, run.host),
            (index + 1, run.count - before - 1, host + stride),
        ] {
            if count > 0 {
                self.assigned.insert(first, Assigned { count, host });
            }
        }
        Some(host)
    }

    /// Whether a block has space assigned to it.
    pub(super) fn is_assigned(&self, index: u64) -> bool {
        let run = self.assigned.range(..=index).next_back();
        run.is_some_and(|(first, run)| index - first < run.count)
    }
}

impl Sparse {
    /// Finds space for block `index`.
    pub(super) fn take(&self, space: &mut Space, shape: &Shape, index: u64) -> Result<Spot> {
        let tail = self.tail(space, shape)?;
        if let Some(host) = space.take_assigned(index, self.blocks.stride()) {
            return Ok(Spot {
                zeroed: !self.storage.has_fixed_len(),
                ..Spot::zeroed(host)
            });
        }
        self.settle(space);
        if let Some(slot) = space.clean.pop() {
            space.freed -= 1;
            return Ok(Spot::zeroed(u64::from(slot) * SECTOR));
        }
        if let Some(slot) = space.ready.pop() {
            space.freed -= 1;
            let host = u64::from(slot) * SECTOR;
            return Ok(Spot {
                zeroed: self.punch(host).is_ok(),
                ..Spot::zeroed(host)
            });
        }
        match self.take_new(space, shape, tail) {
            Err(e) if e.kind() == ErrorKind::NoSpace => self.take_left(space).ok_or(e),
            done => done,
        }
    }

    /// Takes space behind all that is in use.
    fn take_new(&self, space: &mut Space, shape: &Shape, tail: u64) -> Result<Spot> {
        let host = self.blocks.place(tail);
        let end = self.limit(host + self.blocks.len())?;
        let ahead = (self.blocks.stride() * AHEAD_BLOCKS).min(AHEAD);
        let ahead = align::down(ahead, self.blocks.stride());
        let zeroed = self.zeroed_room(space, shape, tail..end, ahead)?;
        space.tail = Some(end);
        Ok(Spot {
            zeroed,
            ready: space.zeroes.start <= host && end <= space.zeroes.end,
            ..Spot::zeroed(host)
        })
    }

    /// Takes space between blocks of storage of fixed length that is used up to its end.
    fn take_left(&self, space: &mut Space) -> Option<Spot> {
        let host = u64::from(space.gaps.pop()?) * SECTOR;
        Some(Spot {
            zeroed: self.punch(host).is_ok(),
            ..Spot::zeroed(host)
        })
    }

    /// Lists the space between blocks of storage of fixed length, which cannot grow once its end
    /// is reached.  Called before any space is taken.
    pub(super) fn find_gaps(&self, space: &mut Space, shape: &Shape) -> Result<()> {
        // A batmap that cannot be trusted may still be somebody's, wherever it is.
        if matches!(shape.batmap, batmap::Found::Damaged(_)) {
            return Ok(());
        }
        let mut words: Vec<u32> = space.listed(self.blocks).collect();
        self.each_word(shape, |_, word| {
            if word != UNUSED && words.len() <= 4 * MAX_FREED {
                words.push(word);
            }
            Ok(())
        })?;
        space.gaps.clear();
        if words.len() > 4 * MAX_FREED {
            return Ok(());
        }
        words.sort_unstable();
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

    /// Makes room up to the end of `new`, which begins where all that is in use ends, and up to
    /// `ahead` more; whether it reads as zeroes.  What does so on stable media is in
    /// [`Space::zeroes`].
    fn zeroed_room(
        &self,
        space: &mut Space,
        shape: &Shape,
        new: Range<u64>,
        ahead: u64,
    ) -> Result<bool> {
        let since = self.syncs.stamp();
        let moved = self.make_room(space, shape, new.end, ahead)?;
        let Some(place) = self.footer_place() else {
            // A child's blocks wait for stable media themselves, whatever is there before.
            if let Some(end) = moved
                && self.kind == Kind::Dynamic
            {
                // Where the old footer was there are zeroes on stable media from now on, as behind it.
                self.ordered(since)?;
                space.zeroes = new.start..end;
            }
            return Ok(true);
        };
        if self.kind == Kind::Differencing {
            // What a block of it does not have may be anything.
            return Ok(false);
        }
        if new.end > space.zeroes.end || new.start < space.zeroes.start {
            let end = place.min(new.end.saturating_add(ahead));
            match self.storage.zero(new.start..end, Zeroing::MayUnmap) {
                Err(e) if e.kind() == ErrorKind::Unsupported => return Ok(false),
                done => done?,
            }
            self.ordered(since)?;
            space.zeroes = new.start..end;
        }
        Ok(true)
    }

    /// Assigns space to the blocks from `index` on, `count` of them; the file's range they get.
    pub(super) fn assign_run(
        &self,
        space: &mut Space,
        shape: &Shape,
        index: u64,
        count: u64,
    ) -> Result<Range<u64>> {
        let tail = self.tail(space, shape)?;
        let host = self.blocks.place(tail);
        let len = (count - 1)
            .checked_mul(self.blocks.stride())
            .and_then(|l| l.checked_add(self.blocks.len()));
        let end = self.limit(len.and_then(|l| l.checked_add(host)).unwrap_or(u64::MAX))?;
        self.make_room(space, shape, end, 0)?;
        space.tail = Some(end);
        space.assigned.insert(index, Assigned { count, host });
        Ok(host..end)
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
        let locators = locators
            .iter()
            .map(|l| l.offset..l.offset.saturating_add(l.space_bytes()))
            .filter(|part| part.end <= data_end);
        let batmap = shape.batmap().into_iter().flat_map(|map| map.ranges());
        let reserved = shape.reserved.iter().chain(batmap).cloned();
        reserved.chain(locators).collect()
    }

    /// Space that was taken but never published may be taken again.
    pub(super) fn give_back(&self, space: &mut Space, host: u64) {
        if let Ok(slot) = u32::try_from(host / SECTOR)
            && space.freed < MAX_FREED
        {
            space.ready.push(slot);
            space.freed += 1;
        }
    }

    /// Turns space that was assigned and never used into free blocks.
    pub(super) fn return_assigned(&self, space: &mut Space) {
        for (_, run) in std::mem::take(&mut space.assigned) {
            for i in 0..run.count {
                self.give_back(space, run.host + i * self.blocks.stride());
            }
        }
    }

    /// Space of blocks that were just made unreachable.
    pub(super) fn free(&self, space: &mut Space, mut slots: Vec<u32>) {
        slots.truncate(MAX_FREED - space.freed.min(MAX_FREED));
        space.freed += slots.len();
        if !slots.is_empty() {
            space.pending.push_back(Freed {
                slots,
                moment: self.grace.now(),
                stamp: self.syncs.stamp(),
            });
        }
    }

    /// Makes freed space ready that nobody can read any more, and that no table on stable media
    /// names any more.
    pub(super) fn settle(&self, space: &mut Space) {
        while let Some(freed) = space.pending.front() {
            let durable = self.order == WriteOrder::Unordered || self.syncs.is_durable(freed.stamp);
            if !durable || !self.grace.passed(freed.moment) {
                break;
            }
            if let Some(freed) = space.pending.pop_front() {
                space.ready.extend(freed.slots);
            }
        }
    }

    /// Gives the space of freed blocks back to the host, as far as that may be done yet.
    pub(super) fn punch_ready(&self, space: &mut Space) {
        self.settle(space);
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

    /// Returns once what was written since `stamp` is on stable media, where order matters.
    pub(super) fn ordered(&self, stamp: Stamp) -> Result<()> {
        match self.order {
            WriteOrder::Ordered => self.syncs.wait(&*self.storage, stamp),
            WriteOrder::Unordered => Ok(()),
        }
    }

    /// Calls `f` with each word of the table, straight from the file.
    pub(super) fn each_word(
        &self,
        shape: &Shape,
        mut f: impl FnMut(u64, u32) -> Result<()>,
    ) -> Result<()> {
        let len = shape.table.len() * 4;
        let mut bytes = vec![0; clamp_len(len.min(STEP), usize::MAX)];
        let mut at = 0;
        while at < len {
            let step = clamp_len(len - at, bytes.len());
            let part = &mut bytes[..step];
            self.storage.read_at(part, shape.table.host() + at)?;
            for (i, word) in part.as_chunks::<4>().0.iter().enumerate() {
                f(at / 4 + len64(i), u32::from_be_bytes(*word))?;
            }
            at += len64(step);
        }
        Ok(())
    }

    /// Whether no two blocks lie upon each other, so that the space of one may be freed.
    pub(super) fn is_disjoint(&self, space: &mut Space, shape: &Shape) -> Result<bool> {
        if let Some(disjoint) = space.disjoint {
            return Ok(disjoint);
        }
        let mut words = Vec::new();
        let mut fits = true;
        self.each_word(shape, |_, word| {
            fits &= words.len() < 4 * MAX_FREED;
            if word != UNUSED && fits {
                words.push(word);
            }
            Ok(())
        })?;
        words.sort_unstable();
        let sectors = self.blocks.len() / SECTOR;
        let apart = words
            .windows(2)
            .all(|pair| u64::from(pair[1]) - u64::from(pair[0]) >= sectors);
        space.disjoint = Some(apart && fits);
        Ok(apart && fits)
    }
}

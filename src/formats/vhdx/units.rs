//! Giving blocks space: what of it is VHDX's own.

use std::ops::Range;
use std::sync::atomic::Ordering;

use crate::error::{Error, ErrorKind, Result};
use crate::formats::vhdx::bat::{Block, Shape};
use crate::formats::vhdx::bytes::MB;
use crate::formats::vhdx::image::Vhdx;
use crate::formats::vhdx::scan;
use crate::image::open::WriteOrder;
use crate::image::units::{
    Allocator, Content, Grid, New, Slots, Space, Taken, Target, Unit, Units,
};
use crate::image::{Image, Layout, Store, Wait};
use crate::storage::{Storage, Zeroing, zero_or_write};

/// Blocks made ready ahead at most, and their bytes.
const AHEAD: u64 = 16;
const AHEAD_BYTES: u64 = 16 << 20;

/// The MiB of the file, of which blocks and metadata take some.
pub(super) const MIBS: Grid = Grid {
    start: 0,
    lead: 0,
    stride: MB,
};

/// The MiB in which host bytes lie.
pub(super) fn mibs(host: &Range<u64>) -> Range<u64> {
    host.start / MB..host.end.div_ceil(MB)
}

impl Vhdx {
    /// Learns which parts of the file are in use.
    ///
    /// # Errors
    /// `Corrupt` where an entry is wrong; the host's.
    pub(super) fn learn(&self) -> Result<()> {
        let shape = self.reread()?;
        if let Some(text) = shape.regions.beyond(self.journal.size()) {
            return Err(Error::corrupt(format!("{text} (allowed: reading)")));
        }
        let slots = scan::scan(self, &shape, |wrong| {
            let allowed = "allowed: writing after `check -r all`";
            Err(Error::corrupt(format!("{} ({allowed})", wrong.text())))
        })?;
        self.adopt(slots);
        Ok(())
    }

    /// Goes by these parts of the file as those that are in use, with what waits to be given back.
    pub(super) fn adopt(&self, mut slots: Slots) {
        for host in self.allocator.unnamed(self) {
            mibs(&host).for_each(|number| {
                slots.add(number);
            });
        }
        *self.slots.lock() = slots;
    }

    /// Ends what was written through the log, and has the file end behind what is in use.
    pub(super) fn end_session(&self) -> Result<()> {
        self.journal.finish()?;
        // A check cuts the file itself, where that is safe.
        if self.uses && self.allocator.has_begun() && !self.shape.load().metadata.fixed {
            self.trim()?;
        }
        match self.allocator.order.policy() {
            WriteOrder::Ordered => Store::flush(self),
            WriteOrder::Unordered => Ok(()),
        }
    }

    /// Where the file may end where what is in use ends at `end`, and so many blocks have space: a fixed
    /// disk keeps room for all ([MS-VHDX] 2.6.2.1).
    pub(super) fn kept_end(&self, end: u64, stored: u64) -> u64 {
        let shape = self.shape.load();
        let missing = shape.blocks().saturating_sub(stored);
        match shape.metadata.fixed {
            true => end.saturating_add(missing.saturating_mul(self.block)),
            false => end,
        }
    }

    /// Has the file end behind what is in use; the log holds nothing.
    pub(super) fn trim(&self) -> Result<()> {
        let mut slots = self.slots.lock();
        slots.trim();
        let end = slots.end() * MB;
        match self.file.has_fixed_len() || slots.used() == 0 || self.file.size() <= end {
            true => Ok(()),
            false => self.file.set_len(end),
        }
    }

    /// Makes a part of a block that is stored read as zeroes, where it is.
    pub(super) fn zero_within(&self, host: u64, part: Range<u64>, how: Zeroing) -> Result<()> {
        // The file may end within the block: what it cuts off reads as zeroes.
        let part = host + part.start..(host + part.end).min(self.file.size());
        match part.is_empty() {
            true => Ok(()),
            false => zero_or_write(&*self.file, part, how),
        }
    }

    /// What a block becomes that is dropped, without a change of the data that it keeps.
    fn dropped(&self, shape: &Shape, old: Block, target: Target) -> Block {
        let backed = self.has_backing();
        match (old, target) {
            (Block::Present(_), Target::ZeroKept) => old,
            (Block::Present(_), _) if shape.metadata.fixed => old,
            (_, Target::Below) => Block::Absent,
            (Block::Absent, Target::Dropped) => old,
            (Block::Zero, _) => old,
            _ if backed => Block::Zero,
            _ => Block::Absent,
        }
    }

    /// Drops blocks whose entries lie side by side.
    fn drop_run(
        &self,
        shape: &Shape,
        blocks: Range<u64>,
        target: Target,
        freed: &mut Vec<Range<u64>>,
    ) -> Result<()> {
        let how = match target {
            Target::ZeroKept => Zeroing::KeepSpace,
            _ => Zeroing::MayUnmap,
        };
        let (mut words, mut gone) = (Vec::new(), Vec::new());
        let mut changed = false;
        for index in blocks.clone() {
            let old = self.find(shape, index, Wait::Yes)?;
            let new = self.dropped(shape, old, target);
            match old.host() {
                Some(host) if new == old => self.zero_within(host, 0..self.block, how)?,
                Some(host) => gone.push(host..host + self.block),
                None => {}
            }
            changed |= new != old;
            words.push(new.word());
        }
        if changed {
            let first = shape.grid.index(blocks.start);
            shape.table.publish(&*self.journal, first, &words)?;
            freed.append(&mut gone);
        }
        Ok(())
    }
}

impl Units for Vhdx {
    type Entries<'a> = ();

    fn allocator(&self) -> Result<&Allocator> {
        match self.write {
            true => Ok(&self.allocator),
            false => Err(Error::read_only()),
        }
    }

    fn unit_len(&self) -> u64 {
        self.block
    }

    fn disk_end(&self) -> u64 {
        self.shape.load().blocks() * self.block
    }

    fn has_backing(&self) -> bool {
        self.locator.is_some()
    }

    fn data(&self) -> Result<&dyn Storage> {
        Ok(&*self.file)
    }

    fn together(&self, index: u64) -> Range<u64> {
        let shape = self.shape.load();
        let chunk = shape.grid.chunk(index);
        chunk.start..chunk.end.min(shape.blocks())
    }

    fn unit(&self, index: u64) -> Result<Unit> {
        let (space, whole) = match self.find(&self.shape.load(), index, Wait::Yes)? {
            Block::Present(host) => (Space::Own(host), Some(Content::Stored)),
            // It gets space as a whole block, which no sector bitmap is asked about.
            Block::Partial(host) => (Space::Shared(host), None),
            Block::Absent => (Space::None, Some(Content::Below)),
            _ => (Space::None, Some(Content::Zero)),
        };
        Ok(Unit {
            space,
            whole,
            word: 0,
        })
    }

    fn parts(
        &self,
        index: u64,
        _unit: &Unit,
        within: &Range<u64>,
    ) -> Result<Vec<(Content, Range<u64>)>> {
        let shape = self.shape.load();
        let mut parts = Vec::new();
        let mut at = within.start;
        while at < within.end {
            let (here, end) = self.sectors(&shape, index, at..within.end, Wait::Yes)?;
            let content = if here {
                Content::Stored
            } else {
                Content::Below
            };
            parts.push((content, at..end));
            at = end;
        }
        Ok(parts)
    }

    /// The data is another from now on, unless it only moves.
    fn announce(&self) -> Result<()> {
        let next = match self.keeps_state.load(Ordering::Relaxed) {
            true => None,
            false => self.next_state()?,
        };
        self.journal.announce(next)?;
        *self.next.lock() = None;
        Ok(())
    }

    fn ahead(&self) -> Range<u64> {
        1..(AHEAD_BYTES / self.block).clamp(1, AHEAD)
    }

    fn take(&self, _index: u64, count: u64) -> Result<Taken> {
        let each = self.block / MB;
        let mut slots = self.slots.lock();
        let mut run = slots.vacant_run(each);
        if run.end > slots.end() {
            let room = match self.file.has_fixed_len() {
                true => (self.file.size() / MB).saturating_sub(run.start) / each,
                false => count,
            };
            run.end = run.start + each.saturating_mul(count.min(room).max(1));
        }
        // The entry has room for a number of 44 bits.
        if run.end >= 1 << 44 {
            return Err(Error::new(
                ErrorKind::NoSpace,
                "the file would be too long for a VHDX",
            ));
        }
        let count = (run.end - run.start) / each;
        let taken = slots.claim(&*self.file, MIBS, run)?;
        Ok(Taken {
            count,
            stride: self.block,
            ..taken
        })
    }

    fn untake(&self, taken: &Taken) {
        self.slots.lock().give(mibs(&taken.bytes(self.block)));
    }

    fn open(&self, units: Range<u64>, _first: u64, _waits: bool) -> Result<(Range<u64>, ())> {
        Ok((units, ()))
    }

    fn publish(&self, _entries: (), new: &[New], _reached: &mut usize) -> Result<()> {
        let shape = self.shape.load();
        let words: Vec<u64> = new
            .iter()
            .map(|new| Block::Present(new.host).word())
            .collect();
        let first = new.first().map_or(0, |new| shape.grid.index(new.index));
        shape.table.publish(&*self.journal, first, &words)
    }

    fn drop_units(
        &self,
        guest: &Range<u64>,
        target: Target,
        freed: &mut Vec<Range<u64>>,
    ) -> Result<()> {
        let shape = self.shape.load();
        let mut at = guest.start / self.block;
        let last = guest.end.div_ceil(self.block);
        while at < last {
            let end = last.min(shape.grid.chunk(at).end);
            self.drop_run(&shape, at..end, target, freed)?;
            at = end;
        }
        Ok(())
    }

    /// The host gets it back first, then others may take it.
    fn give_back(&self, freed: Vec<Range<u64>>) -> Result<()> {
        let mut done = Ok(());
        for host in freed {
            let stored = host.start..host.end.min(self.file.size());
            let given = match stored.is_empty() {
                true => Ok(()),
                false => self.file.zero(stored, Zeroing::MayUnmap),
            };
            match given {
                Err(e) if e.kind() != ErrorKind::Unsupported => done = Err(e),
                _ => self.slots.lock().give(mibs(&host)),
            }
        }
        done
    }
}

impl Layout for Vhdx {
    fn assign(&self, ranges: &[Range<u64>]) -> Result<()> {
        self.allocator()?.assign(self, ranges)
    }
}

//! Giving blocks space: what of it is VDI's own.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::formats::vdi::header::{COUNT, DISK_ID, FREE, Header, Kind, STATE_ID, ZERO};
use crate::formats::vdi::image::{Shape, Vdi};
use crate::image::units::{
    Allocator, Content, Fault, New, Slots, Space, Taken, Target, Unit, Units,
};
use crate::image::{Layout, Wait};
use crate::storage::{Storage, Zeroing, zero_or_write};
use crate::util::random;

/// Blocks made ready ahead at most, and their bytes.
const AHEAD: u64 = 16;
const AHEAD_BYTES: u64 = 16 << 20;

/// Which blocks of the file are in use; others take the one at the end next, as the header counts.
#[derive(Debug, Default)]
pub(super) struct Counted {
    pub(super) slots: Slots,
    /// The count in the file, as far as is known.
    written: Option<u64>,
}

impl Vdi {
    /// Refuses what is never changed.
    pub(super) fn may_change(&self) -> Result<()> {
        let flags = self.shape.load().header.flags();
        match self.kind == Kind::Undo || flags != 0 {
            true => Err(Error::unsupported(format!(
                "a disk of type '{}' with flags {flags:#x} is not written to (allowed: other types than undo, without flags)",
                self.kind.word()
            ))),
            false => Ok(()),
        }
    }

    /// Learns which blocks are in use.
    ///
    /// # Errors
    /// `Corrupt` where an entry is wrong; the host's.
    pub(super) fn learn(&self) -> Result<()> {
        let blocks = self.scan(&*self.reread()?, |index, number, fault| {
            let text = fault.text(index, number);
            let allowed = "allowed: writing after `check -r all`";
            Err(Error::corrupt(format!("{text} ({allowed})")))
        })?;
        *self.blocks.lock() = blocks;
        Ok(())
    }

    /// Which blocks the map names; `wrong` is told of entries that are.
    pub(super) fn scan(
        &self,
        shape: &Shape,
        mut wrong: impl FnMut(u64, u64, Fault) -> Result<()>,
    ) -> Result<Counted> {
        let (grid, size) = (shape.header.grid(), self.storage.size());
        let mut slots = Slots::default();
        shape.map.each(&*self.storage, |index, number| {
            let number = u64::from(number);
            match number < u64::from(ZERO) {
                true => match slots.name(grid, number, size)? {
                    Some(fault) => wrong(index, number, fault),
                    None => Ok(()),
                },
                false => Ok(()),
            }
        })?;
        let count = shape.header.word(COUNT);
        slots.reach(count.min(shape.header.entries()));
        let written = Some(count);
        Ok(Counted { slots, written })
    }

    /// Writes how many blocks the file has, where the header says otherwise.
    pub(super) fn write_count(&self, blocks: &mut Counted) -> Result<()> {
        let end = blocks.slots.end();
        if blocks.written != Some(end) {
            let at = self.shape.load().header.at(COUNT) as u64;
            let count = u32::try_from(end).unwrap_or(u32::MAX);
            blocks.written = None;
            self.storage.write_at(&count.to_le_bytes(), at)?;
            blocks.written = Some(end);
        }
        Ok(())
    }

    /// Takes blocks that no entry names; they are counted, because others go by that alone.
    pub(super) fn claim(
        &self,
        blocks: &mut Counted,
        header: &Header,
        numbers: Range<u64>,
    ) -> Result<Taken> {
        let grid = header.grid();
        let taken = blocks.slots.claim(&*self.storage, grid, numbers)?;
        self.write_count(blocks)
            .inspect_err(|_| blocks.slots.untake(grid, &taken))?;
        Ok(taken)
    }

    /// Leaves the end of the file as a clean close leaves it: behind the last block in use.
    pub(super) fn trim(&self, blocks: &mut Counted) -> Result<()> {
        blocks.slots.trim();
        self.write_count(blocks)?;
        let grid = self.shape.load().header.grid();
        let end = grid.host(blocks.slots.end()).start;
        match self.storage.has_fixed_len() || self.storage.size() <= end {
            true => Ok(()),
            false => self.storage.set_len(end),
        }
    }

    /// What the map says of block `index`.
    pub(super) fn number(&self, index: u64) -> Result<u32> {
        self.shape.load().map.get(&*self.storage, index, Wait::Yes)
    }

    /// Makes a part of a block that is stored read as zeroes, where it is.
    pub(super) fn zero_within(&self, index: u64, part: Range<u64>, how: Zeroing) -> Result<()> {
        let data = self.locate(&self.shape.load().header, index, self.number(index)?)?;
        zero_or_write(&*self.storage, data + part.start..data + part.end, how)
    }
}

impl Units for Vdi {
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
        self.shape.load().header.blocks() * self.block
    }

    fn has_backing(&self) -> bool {
        self.kind.has_parent()
    }

    fn data(&self) -> Result<&dyn Storage> {
        Ok(&*self.storage)
    }

    fn together(&self, _index: u64) -> Range<u64> {
        0..self.shape.load().header.blocks()
    }

    fn unit(&self, index: u64) -> Result<Unit> {
        let (space, whole) = match self.number(index)? {
            FREE => (Space::None, Content::Below),
            ZERO => (Space::None, Content::Zero),
            number => {
                let host = self.locate(&self.shape.load().header, index, number)?;
                (Space::Own(host), Content::Stored)
            }
        };
        Ok(Unit {
            space,
            whole: Some(whole),
            word: 0,
        })
    }

    /// The state of the disk is another from now on; a disk without identity gets one.
    fn announce(&self) -> Result<()> {
        let (identity, state) = (random::uuid()?, random::uuid()?);
        self.rewrite(|header| {
            if header.uuid(DISK_ID).is_none() {
                header.set(DISK_ID, &identity.to_bytes_le());
            }
            header.set(STATE_ID, &state.to_bytes_le());
        })
    }

    fn ahead(&self) -> Range<u64> {
        1..(AHEAD_BYTES / self.block).clamp(1, AHEAD)
    }

    fn take(&self, _index: u64, count: u64) -> Result<Taken> {
        let header = &self.shape.load().header;
        let mut blocks = self.blocks.lock();
        // VirtualBox takes no file with more blocks than entries.
        let numbers = blocks.slots.vacant(count, header.entries());
        self.claim(&mut blocks, header, numbers)
    }

    fn untake(&self, taken: &Taken) {
        let grid = self.shape.load().header.grid();
        self.blocks.lock().slots.untake(grid, taken);
    }

    fn open(&self, units: Range<u64>, _first: u64, _waits: bool) -> Result<(Range<u64>, ())> {
        Ok((units, ()))
    }

    fn publish(&self, _entries: (), new: &[New], _reached: &mut usize) -> Result<()> {
        let shape = self.shape.load();
        let grid = shape.header.grid();
        let number = |new: &New| u32::try_from(grid.number(new.host)).unwrap_or(FREE);
        let numbers: Vec<u32> = new.iter().map(number).collect();
        let first = new.first().map_or(0, |new| new.index);
        shape.map.publish(&*self.storage, first, &numbers)
    }

    /// Blocks keep their space, which the host gets back: the map names as many as the header counts.
    fn drop_units(
        &self,
        guest: &Range<u64>,
        target: Target,
        _freed: &mut Vec<Range<u64>>,
    ) -> Result<()> {
        let how = match target {
            Target::ZeroKept => Zeroing::KeepSpace,
            _ => Zeroing::MayUnmap,
        };
        for index in guest.start / self.block..guest.end.div_ceil(self.block) {
            match self.number(index)? {
                // What the parent has must not show again.
                FREE if self.has_backing() && target != Target::Dropped => {
                    let shape = self.shape.load();
                    shape.map.publish(&*self.storage, index, &[ZERO])?;
                }
                FREE | ZERO => {}
                _ => self.zero_within(index, 0..self.block, how)?,
            }
        }
        Ok(())
    }
}

impl Layout for Vdi {
    fn assign(&self, ranges: &[Range<u64>]) -> Result<()> {
        self.allocator()?.assign(self, ranges)
    }
}

//! Giving blocks space: what of it is VDI's own.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::formats::vdi::header::{DISK_ID, FREE, STATE_ID, ZERO};
use crate::formats::vdi::image::Vdi;
use crate::image::units::{Allocator, Content, New, Space, Taken, Target, Unit, Units};
use crate::image::{Layout, Wait};
use crate::storage::{Storage, Zeroing, zero_or_write};
use crate::util::random;

/// Blocks made ready ahead at most, and their bytes.
const AHEAD: u64 = 16;
const AHEAD_BYTES: u64 = 16 << 20;

impl Vdi {
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
        let shape = self.shape.load();
        let header = &shape.header;
        let mut slots = self.slots.lock();
        let (first, count) = match slots.gap() {
            Some(number) => (number, 1),
            // VirtualBox takes no file with more blocks than entries.
            None => {
                let room = header.entries().saturating_sub(slots.end);
                (slots.end, count.min(room).max(1))
            }
        };
        let zeroed = self.claim(&mut slots, header, first, count)?;
        Ok(Taken {
            zeroed,
            ..header.taken(first, count)
        })
    }

    fn untake(&self, taken: &Taken) {
        let header = &self.shape.load().header;
        let first = header.number(taken.host);
        let mut slots = self.slots.lock();
        (first..first + taken.count).for_each(|number| slots.remove(number));
        // A sync may have failed, and lost what was written of it.
        slots.counted = None;
    }

    fn open(&self, units: Range<u64>, _first: u64, _waits: bool) -> Result<(Range<u64>, ())> {
        Ok((units, ()))
    }

    fn publish(&self, _entries: (), new: &[New], _reached: &mut usize) -> Result<()> {
        let shape = self.shape.load();
        let number = |new: &New| u32::try_from(shape.header.number(new.host)).unwrap_or(FREE);
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

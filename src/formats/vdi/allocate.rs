//! Giving blocks space: what of it is VDI's own.

use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};
use crate::formats::vdi::header::{FREE, Kind, ZERO};
use crate::formats::vdi::image::Vdi;
use crate::image::units::{Allocator, Content, New, Space, Taken, Target, Unit, Units};
use crate::image::{Layout, Wait};
use crate::storage::{Storage, Zeroing, zero_or_write};
use crate::util::align::clamp_len;
use crate::util::random;

/// Most entries of a map that is written to: those of 512 TiB in blocks of 1 MiB.
const MAX_ENTRIES: u64 = 1 << 29;
/// Blocks made ready ahead at most.
const AHEAD: u64 = 16;
/// Unused blocks that are remembered; the others are left for `check`.
const MAX_FREE: usize = 1 << 20;

/// Which blocks of the file are in use.
#[derive(Debug, Default)]
pub(super) struct Slots {
    /// Nothing is in use from this one on.
    pub(super) end: u64,
    /// What the header in the file says of that.
    pub(super) counted: u64,
    /// Unused ones before it.
    pub(super) free: Vec<u32>,
}

/// What a map uses.
#[derive(Debug, Default)]
pub(super) struct Used {
    /// A bit for each block of the file.
    bits: Vec<u64>,
    /// Entries that name a block.
    pub(super) count: u64,
    /// The last of those blocks, and one.
    pub(super) end: u64,
}

impl Used {
    /// Notes that an entry names a block; false where another does so too.
    pub(super) fn add(&mut self, number: u64) -> bool {
        let word = clamp_len(number / 64, usize::MAX);
        if word >= self.bits.len() {
            self.bits.resize((word + 1).next_power_of_two(), 0);
        }
        let bit = 1 << (number % 64);
        let new = self.bits[word] & bit == 0;
        self.bits[word] |= bit;
        self.count += u64::from(new);
        self.end = self.end.max(number + 1);
        new
    }

    /// Blocks below `end` that no entry names.
    pub(super) fn unused(&self, end: u64) -> impl Iterator<Item = u32> {
        let used = |number: u64| {
            let word = self.bits.get(clamp_len(number / 64, usize::MAX));
            word.is_some_and(|word| word & 1 << (number % 64) != 0)
        };
        (0..end)
            .filter(move |n| !used(*n))
            .filter_map(|n| u32::try_from(n).ok())
    }
}

impl Vdi {
    /// Before changes: refuses what must not be written to, and learns which blocks are in use.
    pub(super) fn prepare(&self) -> Result<()> {
        let shape = self.shape.load();
        let header = &shape.header;
        if self.kind == Kind::Undo || header.flags() != 0 {
            return Err(Error::unsupported(format!(
                "a disk of type '{}' with flags {:#x} is not written to (allowed: reading; other types without flags)",
                self.kind.word(),
                header.flags()
            )));
        }
        if header.entries() > MAX_ENTRIES {
            return Err(Error::unsupported(format!(
                "a map of {} entries is not written to (allowed: up to {MAX_ENTRIES})",
                header.entries()
            )));
        }
        let mut used = Used::default();
        shape.map.each(&*self.storage, |index, number| {
            if number < ZERO {
                self.locate(header, index, number)?;
                let number = u64::from(number);
                let whole = header.host(number).end <= self.storage.size();
                if !used.add(number) || !whole {
                    return Err(Error::corrupt(format!(
                        "block {index}: its map entry {number:#x} names a block that another names too, or that the file cuts off (allowed: writing after `check -r all`)"
                    )));
                }
            }
            Ok(())
        })?;
        let end = used.end.max(header.count().min(header.entries()));
        *self.slots.lock() = Slots {
            end,
            counted: header.count(),
            free: used.unused(end).take(MAX_FREE).collect(),
        };
        Ok(())
    }

    /// Writes how many blocks are in use, where the header says otherwise.
    pub(super) fn write_count(&self, slots: &mut Slots) -> Result<()> {
        if slots.counted != slots.end {
            let shape = self.shape.load();
            let count = u32::try_from(slots.end).unwrap_or(u32::MAX).to_le_bytes();
            self.storage
                .write_at(&count, shape.header.fields.count as u64)?;
            slots.counted = slots.end;
        }
        Ok(())
    }

    /// Leaves the end of the file as a clean close leaves it: behind the last block that is in use.
    pub(super) fn trim(&self) -> Result<()> {
        let mut slots = self.slots.lock();
        slots.free.sort_unstable();
        while slots
            .free
            .last()
            .is_some_and(|last| u64::from(*last) + 1 == slots.end)
        {
            slots.free.pop();
            slots.end -= 1;
        }
        if slots.counted == slots.end || !self.allocator.has_begun() {
            return Ok(());
        }
        self.write_count(&mut slots)?;
        let end = self.shape.load().header.host(slots.end).start;
        match self.storage.has_fixed_len() || self.storage.size() <= end {
            true => Ok(()),
            false => self.storage.set_len(end),
        }
    }

    /// What the map says of block `index`.
    fn number(&self, index: u64) -> Result<u32> {
        self.shape.load().map.get(&*self.storage, index, Wait::Yes)
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
        self.shape.load().header.entries() * self.block
    }

    fn has_backing(&self) -> bool {
        matches!(self.kind, Kind::Undo | Kind::Differencing)
    }

    fn data(&self) -> Result<&dyn Storage> {
        Ok(&*self.storage)
    }

    fn together(&self, _index: u64) -> Range<u64> {
        0..self.shape.load().header.entries()
    }

    fn unit(&self, index: u64) -> Result<Unit> {
        let (space, whole) = match self.number(index)? {
            FREE => (Space::None, Content::Below),
            ZERO => (Space::None, Content::Zero),
            number => {
                let shape = self.shape.load();
                let host = self.locate(&shape.header, index, number)?;
                (Space::Own(host), Content::Stored)
            }
        };
        Ok(Unit {
            space,
            whole: Some(whole),
            word: 0,
        })
    }

    fn parts(
        &self,
        _index: u64,
        unit: &Unit,
        _within: &Range<u64>,
    ) -> Result<Vec<(Content, Range<u64>)>> {
        Ok(vec![(unit.whole.unwrap_or(Content::Stored), 0..self.block)])
    }

    /// The state of the disk is another from now on; a disk without identity gets one.
    fn announce(&self) -> Result<()> {
        let header = &self.shape.load().header;
        let mut uuids = self.uuids.lock();
        let disk = match uuids[0] {
            uuid if uuid.is_nil() => random::uuid()?,
            uuid => uuid,
        };
        let changed = [disk, random::uuid()?];
        let bytes = changed.map(|uuid| uuid.to_bytes_le()).concat();
        let since = self.allocator.order.now();
        self.storage.write_at(&bytes, header.fields.uuids as u64)?;
        // Whatever becomes of the sync, the file says so already.
        *uuids = changed;
        self.allocator.order.settle(since)
    }

    fn ahead(&self) -> Range<u64> {
        let most = (AHEAD << 20) / self.block;
        1..most.clamp(1, AHEAD)
    }

    fn take(&self, _index: u64, count: u64) -> Result<Taken> {
        let shape = self.shape.load();
        let header = &shape.header;
        let mut slots = self.slots.lock();
        let (first, count, zeroed) = match slots.free.pop() {
            Some(number) => {
                let host = header.host(u64::from(number));
                let zeroed = self.storage.zero(host, Zeroing::MayUnmap).is_ok();
                (u64::from(number), 1, zeroed)
            }
            None => {
                let first = slots.end;
                let count = count.min(header.entries().saturating_sub(first)).max(1);
                let end = first + count;
                if end > u64::from(ZERO) {
                    return Err(Error::new(
                        ErrorKind::NoSpace,
                        "the map has no more numbers",
                    ));
                }
                // Before the map names them: others go by the count alone.
                slots.end = end;
                let file = header.host(end).start;
                let grown = self.write_count(&mut slots).and_then(|()| {
                    match self.storage.size() < file {
                        // Blocks are there as a whole.
                        true => self.storage.write_at(&[0], file - 1),
                        false => Ok(()),
                    }
                });
                if let Err(e) = grown {
                    slots
                        .free
                        .extend((first..end).filter_map(|n| u32::try_from(n).ok()));
                    return Err(e);
                }
                (first, count, !self.storage.has_fixed_len())
            }
        };
        Ok(Taken {
            lead: header.extra(),
            zeroed,
            ..Taken::new(
                header.host(first).start + header.extra(),
                count,
                header.total(),
            )
        })
    }

    fn untake(&self, taken: &Taken) {
        let header = &self.shape.load().header;
        let first = (taken.host - taken.lead - header.data()) / header.total();
        let numbers = (first..first + taken.count).filter_map(|n| u32::try_from(n).ok());
        let mut slots = self.slots.lock();
        let room = MAX_FREE.saturating_sub(slots.free.len());
        slots.free.extend(numbers.take(room));
    }

    fn open(&self, units: Range<u64>, _first: u64, _waits: bool) -> Result<(Range<u64>, ())> {
        Ok((units, ()))
    }

    fn complete(&self, _entries: &(), _new: &[New]) -> Result<()> {
        Ok(())
    }

    fn publish(&self, _entries: (), new: &[New]) -> Result<()> {
        let shape = self.shape.load();
        let header = &shape.header;
        let number = |new: &New| (new.host - header.extra() - header.data()) / header.total();
        let numbers = new
            .iter()
            .map(|new| u32::try_from(number(new)).unwrap_or(FREE));
        let numbers: Vec<u32> = numbers.collect();
        let first = new.first().map_or(0, |new| new.index);
        shape.map.publish(&*self.storage, first, &numbers)
    }

    /// Blocks keep their space, which the host gets back: the map names as many as the header counts.
    fn drop_units(&self, guest: &Range<u64>, target: Target) -> Result<Vec<Range<u64>>> {
        let shape = self.shape.load();
        let how = match target {
            Target::ZeroKept => Zeroing::KeepSpace,
            _ => Zeroing::MayUnmap,
        };
        for index in guest.start / self.block..guest.end.div_ceil(self.block) {
            match self.number(index)? {
                // What the parent has must not show again.
                FREE if self.has_backing() && target != Target::Dropped => {
                    shape.map.publish(&*self.storage, index, &[ZERO])?;
                }
                FREE | ZERO => {}
                number => {
                    let host = self.locate(&shape.header, index, number)?;
                    zero_or_write(&*self.storage, host..host + self.block, how)?;
                }
            }
        }
        Ok(Vec::new())
    }

    fn give_back(&self, _freed: Vec<Range<u64>>) -> Result<()> {
        Ok(())
    }
}

impl Layout for Vdi {
    fn assign(&self, ranges: &[Range<u64>]) -> Result<()> {
        self.allocator()?.assign(self, ranges)
    }
}

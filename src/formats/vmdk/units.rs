//! Giving grains space: what of it is VMDK's own.

use std::ops::Range;
use std::sync::atomic::Ordering;

use crate::error::{Error, ErrorKind, Result};
use crate::formats::vmdk::header::SECTOR;
use crate::formats::vmdk::sparse::Sparse;
use crate::formats::vmdk::tables::{Entry, Tables};
use crate::image::Wait;
use crate::image::units::{Allocator, Content, Grid, New, Space, Taken, Target, Unit, Units};
use crate::storage::{Storage, Zeroing, zero_or_write};
use crate::util::align::{clamp_len, len64};

/// Grains made ready ahead at most, and their bytes.
const AHEAD: u64 = 64;
const AHEAD_BYTES: u64 = 16 << 20;
/// Sectors that an entry can name.
const SECTORS: u64 = 1 << 32;

impl Sparse {
    /// Numbers of grains that entries can name.
    fn room(grid: Grid) -> u64 {
        (SECTORS * SECTOR).saturating_sub(grid.start) / grid.stride
    }

    /// Writes entries of one table, from `index` on: first in its copy, as the primary is what is read.
    pub(super) fn write_entries(&self, tables: &Tables, index: u64, words: &[u32]) -> Result<()> {
        let storage = &*self.storage;
        let per_table = tables.geometry.per_table;
        let (number, at) = (index / per_table, index % per_table * 4);
        let Entry::At(table) = tables.table(storage, number, Wait::Yes)? else {
            return Err(Error::corrupt(format!("grain {index} has no table")));
        };
        let copy = tables.copy(storage, number)?;
        let write = || {
            if let Some(copy) = copy {
                let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
                storage.write_at(&bytes, copy + at)?;
            }
            tables.words.publish(storage, table + at, words)
        };
        write().inspect_err(|_| {
            if let Some(writer) = &self.writer {
                writer.torn.store(true, Ordering::Release);
            }
        })
    }

    /// Sees to it that table `number` is there.
    fn make_table(&self, number: u64) -> Result<()> {
        let (storage, writer) = (&*self.storage, self.writer()?);
        let tables = self.tables.load();
        if matches!(tables.table(storage, number, Wait::Yes)?, Entry::At(_)) {
            return Ok(());
        }
        let _making = writer.making.lock();
        let old = tables.table(storage, number, Wait::Yes)?;
        if matches!(old, Entry::At(_)) {
            return Ok(());
        }
        let hides = old == Entry::Zero && writer.has_backing;
        if hides && !tables.geometry.zeroes {
            return Err(Error::unsupported(format!(
                "entry {number} of the grain directory hides the parent, and the file has no entries of tables that do"
            )));
        }
        let len = tables.geometry.per_table * 4;
        let host = self.take_table(1 + u64::from(tables.rgd.is_some()))?;
        if hides {
            let sets = 1 + u64::from(tables.rgd.is_some());
            let words = clamp_len(tables.geometry.per_table * sets, usize::MAX);
            storage.write_at(&[1, 0, 0, 0].repeat(words), host)?;
            writer.allocator.order.settle()?;
        }
        tables.words.forget(host..host + len);
        if let Some(rgd) = &tables.rgd {
            let sector = u32::try_from((host + len) / SECTOR).unwrap_or(u32::MAX);
            rgd.publish(storage, number, &[sector])?;
            // No table that is read is ever without its copy.
            writer.allocator.order.settle()?;
        }
        tables.publish_table(storage, number, host)
    }

    /// Takes space for so many tables, one behind the other, which are zero on stable media.
    pub(super) fn take_table(&self, count: u64) -> Result<u64> {
        let (storage, writer) = (&*self.storage, self.writer()?);
        let len = self.geometry().per_table * 4 * count;
        let mut space = writer.space.lock();
        let grid = space.grid;
        let count = len.div_ceil(grid.stride);
        let first = space.slots.end();
        if first + count > Self::room(grid) {
            return Err(full());
        }
        let taken = space.slots.claim(storage, grid, first..first + count)?;
        let zeroed = match taken.zeroed {
            true => Ok(()),
            false => zero_or_write(storage, taken.bytes(grid.stride), Zeroing::KeepSpace),
        };
        let noted = zeroed.and_then(|()| self.write_free(grid, space.slots.end()));
        noted.inspect_err(|_| space.slots.untake(grid, &taken))?;
        drop(space);
        writer.allocator.order.settle()?;
        Ok(taken.host)
    }

    /// Notes where others take space next, where the header says that.
    pub(super) fn write_free(&self, grid: Grid, end: u64) -> Result<()> {
        let Some(at) = self.free_field else {
            return Ok(());
        };
        let sector = grid.host(end).start / SECTOR;
        let sector = u32::try_from(sector).unwrap_or(u32::MAX);
        self.storage.write_at(&sector.to_le_bytes(), at)
    }

    /// Makes a grain that is stored read as zeroes, where it is.
    fn zero_grain(&self, host: u64, how: Zeroing) -> Result<()> {
        let end = (host + self.unit_len()).min(self.storage.size());
        zero_or_write(&*self.storage, host..end, how)
    }
}

fn full() -> Error {
    Error::new(
        ErrorKind::NoSpace,
        "the extent is full: its tables name no sector from 2 TiB on",
    )
}

impl Units for Sparse {
    type Entries<'a> = ();

    fn allocator(&self) -> Result<&Allocator> {
        Ok(&self.writer()?.allocator)
    }

    fn unit_len(&self) -> u64 {
        self.geometry().grain
    }

    fn disk_end(&self) -> u64 {
        let geometry = self.geometry();
        geometry.grains() * geometry.grain
    }

    fn has_backing(&self) -> bool {
        self.writer.as_ref().is_some_and(|w| w.has_backing)
    }

    fn data(&self) -> Result<&dyn Storage> {
        Ok(&*self.storage)
    }

    fn together(&self, index: u64) -> Range<u64> {
        let geometry = self.geometry();
        let first = index - index % geometry.per_table;
        first..(first + geometry.per_table).min(geometry.grains())
    }

    fn next_to_drop(&self, index: u64, end: u64, target: Target) -> Result<u64> {
        let hides = self.has_backing() && matches!(target, Target::Zero | Target::ZeroKept);
        let tables = self.tables.load();
        let per_table = tables.geometry.per_table;
        let mut index = index;
        while index < end {
            let table = tables.table(&*self.storage, index / per_table, Wait::Yes)?;
            if matches!(table, Entry::Below) && !hides {
                index = (index / per_table + 1) * per_table;
                continue;
            }
            match tables.entry(&*self.storage, index, Wait::Yes)? {
                Entry::Below if !hides => {}
                Entry::Zero if target != Target::Below => {}
                _ => break,
            }
            index += 1;
        }
        Ok(index.min(end))
    }

    fn unit(&self, index: u64) -> Result<Unit> {
        let entry = self.tables.load().entry(&*self.storage, index, Wait::Yes)?;
        let (space, whole) = match entry {
            Entry::Below => (Space::None, Content::Below),
            Entry::Zero => (Space::None, Content::Zero),
            Entry::At(host) => (Space::Own(host), Content::Stored),
        };
        Ok(Unit {
            space,
            whole: Some(whole),
            word: 0,
        })
    }

    fn announce(&self) -> Result<()> {
        self.writer()?.session.begin()?;
        self.begin_unclean()
    }

    fn ahead(&self) -> Range<u64> {
        1..(AHEAD_BYTES / self.unit_len()).clamp(1, AHEAD)
    }

    fn take(&self, _index: u64, count: u64) -> Result<Taken> {
        let mut space = self.writer()?.space.lock();
        let grid = space.grid;
        let room = Self::room(grid);
        let grains = match space.partial {
            true => space.slots.end()..space.slots.end() + 1,
            false => space.slots.vacant(count, room),
        };
        if grains.end > room {
            return Err(full());
        }
        let taken = space.slots.claim(&*self.storage, grid, grains)?;
        self.write_free(grid, space.slots.end())
            .inspect_err(|_| space.slots.untake(grid, &taken))?;
        Ok(taken)
    }

    fn untake(&self, taken: &Taken) {
        if let Some(writer) = &self.writer {
            let mut space = writer.space.lock();
            let grid = space.grid;
            space.slots.untake(grid, taken);
        }
    }

    fn make_tables(&self, units: Range<u64>) -> Result<()> {
        let per_table = self.geometry().per_table;
        let tables = units.start / per_table..units.end.div_ceil(per_table);
        tables
            .into_iter()
            .try_for_each(|number| self.make_table(number))
    }

    fn open(&self, units: Range<u64>, first: u64, _waits: bool) -> Result<(Range<u64>, ())> {
        self.make_table(first / self.geometry().per_table)?;
        Ok((units, ()))
    }

    fn publish(&self, _entries: (), new: &[New], _reached: &mut usize) -> Result<()> {
        let word = |new: &New| u32::try_from(new.host / SECTOR).unwrap_or(u32::MAX);
        let words: Vec<u32> = new.iter().map(word).collect();
        let first = new.first().map_or(0, |new| new.index);
        self.write_entries(&self.tables.load(), first, &words)
    }

    fn may_drop(&self, target: Target) -> Result<()> {
        let hides = matches!(target, Target::Zero | Target::ZeroKept);
        match hides && self.has_backing() && !self.geometry().zeroes {
            true => Err(Error::unsupported(
                "the extent has no entries that hide the parent (zeroed_grain=on)",
            )),
            false => Ok(()),
        }
    }

    fn drop_units(
        &self,
        guest: &Range<u64>,
        target: Target,
        freed: &mut Vec<Range<u64>>,
    ) -> Result<()> {
        let grain = self.unit_len();
        let tables = self.tables.load();
        let hides = tables.geometry.zeroes;
        for index in guest.start / grain..guest.end.div_ceil(grain) {
            let entry = tables.entry(&*self.storage, index, Wait::Yes)?;
            // What the parent has must not show again.
            let below = target == Target::Below || !self.has_backing();
            let word = match (entry, target) {
                (Entry::At(host), Target::ZeroKept) => {
                    self.zero_grain(host, Zeroing::KeepSpace)?;
                    continue;
                }
                (Entry::At(_), _) if below => 0,
                (Entry::At(_), _) if hides => 1,
                (Entry::At(host), _) => {
                    self.zero_grain(host, Zeroing::MayUnmap)?;
                    continue;
                }
                (Entry::Zero, Target::Below) => 0,
                (Entry::Below, Target::Zero | Target::ZeroKept) if self.has_backing() => 1,
                (Entry::Zero | Entry::Below, _) => continue,
            };
            if !matches!(entry, Entry::At(_)) {
                self.make_table(index / tables.geometry.per_table)?;
            }
            self.write_entries(&tables, index, &[word])?;
            if let Entry::At(host) = entry {
                freed.push(host..host + grain);
            }
        }
        Ok(())
    }

    fn give_back(&self, freed: Vec<Range<u64>>) -> Result<()> {
        let mut space = self.writer()?.space.lock();
        let grid = space.grid;
        for host in freed {
            let there = host.start..host.end.min(self.storage.size());
            if !there.is_empty() {
                // The host gets it back where it can; it is made zero before others get it.
                let _ = self.storage.zero(there, Zeroing::MayUnmap);
            }
            let count = len64(1).max((host.end - host.start) / grid.stride);
            let taken = grid.taken(grid.number(host.start), count);
            space.slots.untake(grid, &taken);
        }
        Ok(())
    }
}

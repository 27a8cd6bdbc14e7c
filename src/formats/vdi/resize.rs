//! Change of a disk's size, and moving blocks.

use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};
use crate::formats::vdi::header::{COUNT, DATA, DISK, ENTRIES, FREE, Kind, MAP, SECTOR, ZERO};
use crate::formats::vdi::image::{Shape, Vdi};
use crate::image::table::{Endian, Table};
use crate::image::units::{Taken, Units};
use crate::image::{Compact, Empty, LayerBelow, Resize};
use crate::storage::{Zeroing, zero_or_write};
use crate::util::progress::{Progress, Silent};

/// Blocks moved in one go.
const STEP: usize = 16 << 10;

impl Resize for Vdi {
    fn resize(&self, virtual_size: u64, below: LayerBelow) -> Result<()> {
        self.allocator()?;
        if !virtual_size.is_multiple_of(SECTOR) {
            return Err(Error::invalid(format!(
                "a VDI of {virtual_size} bytes (allowed: a multiple of {SECTOR})"
            )));
        }
        // Space that no entry names is about to be counted anew.
        drop(self.allocator.release_unused(self));
        match virtual_size.cmp(&self.shape.load().header.size()) {
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Less => self.shrink(virtual_size),
            std::cmp::Ordering::Greater => self.grow(virtual_size, below),
        }
    }
}

impl Empty for Vdi {
    fn empty(&mut self) -> Result<()> {
        self.allocator()?;
        if !self.has_backing() {
            return Err(Error::unsupported("nothing lies below it"));
        }
        drop(self.allocator.release_unused(&*self));
        self.allocator.begin(&*self)?;
        self.drop_behind(0)?;
        self.allocator.order.settle()
    }
}

impl Vdi {
    /// Grows: entries first, then what they hold, then the size that shows them.
    fn grow(&self, size: u64, below: LayerBelow) -> Result<()> {
        let old = self.shape.load_full();
        let (blocks, entries) = (old.header.blocks(), size.div_ceil(self.block));
        let hidden = if self.has_backing() { below.end()? } else { 0 };
        let cut = old.header.size() % self.block;
        let last = match cut {
            0 => ZERO,
            _ => self.number(blocks - 1)?,
        };
        if last == FREE && hidden > old.header.size() {
            return Err(Error::unsupported(
                "the disk's last block has no space of its own: data of the parent could show (allowed: after a write to it)",
            ));
        }
        old.header.may_have(entries)?;
        self.allocator.begin(self)?;
        if last < ZERO {
            self.zero_within(blocks - 1, cut..self.block, Zeroing::KeepSpace)?;
        }
        let mut behind = blocks..old.header.entries();
        if behind.try_fold(false, |any, index| {
            Ok::<_, Error>(any || self.number(index)? < ZERO)
        })? {
            self.drop_behind(blocks)?;
        }
        if entries > old.header.entries() {
            self.enlarge_map(entries)?;
        }
        match self.kind {
            Kind::Fixed => {
                let first = self.claim_zeroes(entries - blocks)?;
                self.fill_map(blocks..entries, |index| first + index - blocks)?;
            }
            // What would become visible of the parent reads as zeroes.
            _ => self.fill_map(blocks..entries, |index| match index * self.block < hidden {
                true => u64::from(ZERO),
                false => u64::from(FREE),
            })?,
        }
        self.allocator.order.settle()?;
        self.rewrite(|header| header.set(DISK, &size.to_le_bytes()))?;
        self.learn()
    }

    /// Shrinks: the size first, durably; then entries behind the new end go, and the last blocks of the
    /// file take the place of those that they named.
    fn shrink(&self, size: u64) -> Result<()> {
        self.allocator.begin(self)?;
        let blocks = size.div_ceil(self.block);
        let cut = size % self.block;
        self.rewrite(|header| header.set(DISK, &size.to_le_bytes()))?;
        if cut != 0 && self.number(blocks - 1)? < ZERO {
            self.zero_within(blocks - 1, cut..self.block, Zeroing::MayUnmap)?;
        }
        self.drop_behind(blocks)?;
        // Version 0 has its data right behind the last entry.
        if self.shape.load().header.has_places() {
            self.rewrite(|header| header.set_word(ENTRIES, blocks))?;
        }
        self.learn()
    }

    /// Frees the blocks that entries from `first` on name, and has the last blocks of the file take
    /// their place.
    fn drop_behind(&self, first: u64) -> Result<()> {
        let entries = self.shape.load().header.entries();
        self.fill_map(first..entries, |_| u64::from(FREE))?;
        self.allocator.order.settle()?;
        self.pack(&Silent)?;
        Ok(())
    }

    /// Writes entries of the map.
    fn fill_map(&self, range: Range<u64>, entry: impl Fn(u64) -> u64) -> Result<()> {
        let map = &self.shape.load().map;
        map.fill(&*self.storage, range, |index| {
            Ok(u32::try_from(entry(index)).unwrap_or(FREE))
        })
    }

    /// Takes `count` new blocks at the end; they read as zeroes.  The number of the first.
    fn claim_zeroes(&self, count: u64) -> Result<u64> {
        let header = &self.shape.load().header;
        let mut blocks = self.blocks.lock();
        let first = blocks.slots.end();
        let taken = self.claim(&mut blocks, header, first..first + count)?;
        if !taken.zeroed {
            let host = taken.bytes(self.block);
            zero_or_write(&*self.storage, host, Zeroing::KeepSpace)?;
        }
        self.allocator.order.settle()?;
        Ok(first)
    }

    /// Makes room for `entries` entries, the new ones free: before the data, else in the place of the
    /// first blocks, which move to the end.
    fn enlarge_map(&self, entries: u64) -> Result<()> {
        let shape = self.shape.load_full();
        let old = &shape.header;
        let mut start = old.map().start;
        let mut gone = 0;
        if start + entries * 4 > old.data() {
            start = old.data().next_multiple_of(4);
            gone = (start + entries * 4 - old.data()).div_ceil(old.grid().stride);
        }
        let data = old.grid().host(gone).start;
        if data > u64::from(u32::MAX) {
            let text = format!("the data would begin at {data:#x} (allowed: below 4 GiB)");
            return Err(Error::new(ErrorKind::OutOfRange, text));
        }
        self.vacate(&shape, gone)?;
        let first = if gone > 0 { 0 } else { old.entries() };
        let new = Table::new(start, entries, Endian::Little);
        new.fill(&*self.storage, first..entries, |index| {
            match index < old.entries() {
                true => Ok(match self.number(index)? {
                    number @ ZERO.. => number,
                    number => u32::try_from(u64::from(number) - gone).unwrap_or(FREE),
                }),
                false => Ok(FREE),
            }
        })?;
        let count = {
            let slots = &mut self.blocks.lock().slots;
            // Until they are counted anew none is free: it would be another by the new header.
            for number in 0..slots.end() {
                slots.add(number);
            }
            slots.end() - gone
        };
        self.allocator.order.settle()?;
        self.rewrite(|header| {
            header.set_word(MAP, start);
            header.set_word(DATA, data);
            header.set_word(ENTRIES, entries);
            header.set_word(COUNT, count);
        })?;
        self.learn()
    }

    /// Has the first `gone` blocks of the file be elsewhere.
    fn vacate(&self, shape: &Shape, gone: u64) -> Result<()> {
        let mut blocks = self.blocks.lock();
        // Nothing goes there.
        (0..gone).for_each(|number| {
            blocks.slots.add(number);
        });
        drop(blocks);
        loop {
            let mut blocks = Vec::new();
            shape.map.each(&*self.storage, |index, number| {
                if u64::from(number) < gone && blocks.len() < STEP {
                    blocks.push(index);
                }
                Ok(())
            })?;
            match blocks.is_empty() {
                true => return Ok(()),
                false => self.allocator.move_away(self, &blocks)?,
            }
        }
    }
}

impl Compact for Vdi {
    fn frees(&self) -> bool {
        self.kind != Kind::Fixed
    }

    fn free(&self, guest: &Range<u64>) -> Result<()> {
        let word = if self.has_backing() { ZERO } else { FREE };
        let blocks = guest.start / self.block..guest.end.div_ceil(self.block);
        self.fill_map(blocks, |_| u64::from(word))
    }

    fn unused(&self, _progress: &dyn Progress) -> Result<u64> {
        let shape = self.reread()?;
        let blocks = self.scan(&shape, |index, number, fault| {
            Err(Error::corrupt(fault.text(index, number)))
        })?;
        Ok((blocks.slots.end() - blocks.slots.used()) * shape.header.grid().stride)
    }

    fn pack(&self, progress: &dyn Progress) -> Result<u64> {
        drop(self.allocator.release_unused(self));
        // Blocks that lost their entry are free only once that is on stable media.
        self.allocator.order.settle()?;
        let mut moved = 0;
        loop {
            self.learn()?;
            let (grid, entries) = {
                let header = &self.shape.load().header;
                (header.grid(), header.entries())
            };
            let holes = {
                let mut blocks = self.blocks.lock();
                let holes = blocks.slots.holes(STEP);
                // Whatever comes of it: entries may name them from here on.
                for number in &holes {
                    blocks.slots.add(*number);
                }
                holes
            };
            let holes: Vec<Taken> = holes.into_iter().map(|n| grid.taken(n, 1)).collect();
            if holes.is_empty() {
                self.trim(&mut self.blocks.lock())?;
                return Ok(moved);
            }
            moved += self.allocator.move_down(self, entries, &holes, progress)?;
        }
    }
}

//! Change of a disk's size, and moving blocks.

use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};
use crate::formats::vdi::header::{COUNT, DATA, DISK, ENTRIES, FREE, Kind, MAP, SECTOR, ZERO};
use crate::formats::vdi::image::{Shape, Vdi};
use crate::formats::vdi::slots::Slots;
use crate::image::table::{Endian, Table};
use crate::image::units::{Taken, Units};
use crate::image::{Compact, LayerBelow, Resize};
use crate::storage::{Zeroing, zero_or_write};
use crate::util::align::len64;
use crate::util::progress::{Progress, Silent};

/// Map entries written, and blocks moved, in one go.
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

impl Vdi {
    /// Grows: entries first, then what they hold, then the size that shows them.
    fn grow(&self, size: u64, below: LayerBelow) -> Result<()> {
        let old = self.shape.load_full();
        let (blocks, entries) = (old.header.blocks(), size.div_ceil(self.block));
        let hidden = match below {
            LayerBelow::Size(size) => size,
            LayerBelow::NotOpened if self.has_backing() => {
                return Err(Error::unsupported(
                    "a differencing disk does not grow while its parent is not open: data of the parent could show",
                ));
            }
            LayerBelow::Nothing | LayerBelow::NotOpened => 0,
        };
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
        self.allocator.order.settle_all()?;
        self.rewrite(|header| header.set(DISK, &size.to_le_bytes()))?;
        self.learn()
    }

    /// Shrinks: entries behind the new end go, then the last blocks of the file take the place of those
    /// that they named, then the size.
    fn shrink(&self, size: u64) -> Result<()> {
        self.allocator.begin(self)?;
        let entries = self.shape.load().header.entries();
        let blocks = size.div_ceil(self.block);
        let cut = size % self.block;
        if cut != 0 && self.number(blocks - 1)? < ZERO {
            self.zero_within(blocks - 1, cut..self.block, Zeroing::MayUnmap)?;
        }
        self.fill_map(blocks..entries, |_| u64::from(FREE))?;
        self.allocator.order.settle_all()?;
        self.pack(&Silent)?;
        self.rewrite(|header| {
            header.set(DISK, &size.to_le_bytes());
            // Version 0 has its data right behind the last entry.
            if header.has_places() {
                header.set_word(ENTRIES, blocks);
            }
        })?;
        self.learn()
    }

    /// Writes entries of the map.
    fn fill_map(&self, range: Range<u64>, entry: impl Fn(u64) -> u64) -> Result<()> {
        let shape = self.shape.load();
        for start in range.clone().step_by(STEP) {
            let indices = start..range.end.min(start + len64(STEP));
            let words = indices.map(|index| u32::try_from(entry(index)).unwrap_or(FREE));
            let words: Vec<u32> = words.collect();
            shape.map.publish(&*self.storage, start, &words)?;
        }
        Ok(())
    }

    /// Takes `count` new blocks at the end; they read as zeroes.  The number of the first.
    fn claim_zeroes(&self, count: u64) -> Result<u64> {
        let shape = self.shape.load();
        let mut slots = self.slots.lock();
        let first = slots.end;
        if !self.claim(&mut slots, &shape.header, first, count)? {
            let host = shape.header.host(first).start..shape.header.host(first + count).start;
            zero_or_write(&*self.storage, host, Zeroing::KeepSpace)?;
        }
        self.allocator.order.settle_all()?;
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
            gone = (start + entries * 4 - old.data()).div_ceil(old.total());
        }
        let data = old.host(gone).start;
        if data > u64::from(u32::MAX) {
            let text = format!("the data would begin at {data:#x} (allowed: below 4 GiB)");
            return Err(Error::new(ErrorKind::OutOfRange, text));
        }
        let mut slots = self.slots.lock();
        let first = match gone {
            0 => old.entries(),
            _ => {
                slots.end = slots.end.max(gone);
                self.vacate(&shape, &mut slots, gone)?;
                0
            }
        };
        let new = Table::new(start, entries, Endian::Little);
        for first in (first..entries).step_by(STEP) {
            let indices = first..entries.min(first + len64(STEP));
            let words = indices.map(|index| match index < old.entries() {
                true => Ok(match self.number(index)? {
                    number @ ZERO.. => number,
                    number => u32::try_from(u64::from(number) - gone).unwrap_or(FREE),
                }),
                false => Ok(FREE),
            });
            let words: Result<Vec<u32>> = words.collect();
            new.publish(&*self.storage, first, &words?)?;
        }
        let count = slots.end - gone;
        drop(slots);
        self.allocator.order.settle_all()?;
        self.rewrite(|header| {
            header.set_word(MAP, start);
            header.set_word(DATA, data);
            header.set_word(ENTRIES, entries);
            header.set_word(COUNT, count);
        })?;
        self.learn()
    }

    /// Has the first `gone` blocks of the file be elsewhere.
    fn vacate(&self, shape: &Shape, slots: &mut Slots, gone: u64) -> Result<()> {
        // Nothing goes there.
        (0..gone).for_each(|number| {
            slots.add(number);
        });
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
                false => self.relocate(slots, &blocks)?,
            }
        }
    }

    /// Gives blocks that have space other space: gaps, or at the end.
    pub(super) fn relocate(&self, slots: &mut Slots, blocks: &[u64]) -> Result<()> {
        let header = &self.shape.load().header;
        let new = blocks.iter().map(|index| {
            let number = slots.gap().unwrap_or(slots.end);
            self.claim(slots, header, number, 1)?;
            Ok((*index, header.taken(number, 1)))
        });
        let moves: Result<Vec<_>> = new.collect();
        self.allocator.move_units(self, &moves?, &Silent)
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
        let slots = self.scan(&*self.reread()?, |index, number, fault| {
            Err(Error::corrupt(fault.text(index, number)))
        })?;
        Ok((slots.end - slots.used) * self.shape.load().header.total())
    }

    fn pack(&self, progress: &dyn Progress) -> Result<u64> {
        drop(self.allocator.release_unused(self));
        // Blocks that lost their entry are free only once that is on stable media.
        self.allocator.order.settle_all()?;
        let mut moved = 0;
        loop {
            self.learn()?;
            let shape = self.shape.load_full();
            let holes = self.slots.lock().holes(STEP).into_iter();
            let holes: Vec<Taken> = holes.map(|n| shape.header.taken(n, 1)).collect();
            if holes.is_empty() {
                self.trim(&mut self.slots.lock())?;
                return Ok(moved);
            }
            let entries = shape.header.entries();
            moved += self.allocator.move_down(self, entries, &holes, progress)?;
        }
    }
}

//! Change of a disk's size.

use std::ops::Range;
use std::sync::atomic::AtomicU64;

use crate::error::{Error, ErrorKind, Result};
use crate::formats::vhdx::bat::{Block, Grid, Shape, Use};
use crate::formats::vhdx::bytes::MB;
use crate::formats::vhdx::image::Vhdx;
use crate::formats::vhdx::metadata::MAX_DISK;
use crate::formats::vhdx::region::PLACES;
use crate::formats::vhdx::units::MIBS;
use crate::image::table::{Endian, Table};
use crate::image::units::Units;
use crate::image::{LayerBelow, Resize, Wait};
use crate::storage::{Zeroing, zero_or_write};
use crate::util::align::len64;

/// Words copied by one write.
const TOGETHER: usize = 4096;

impl Resize for Vhdx {
    fn resize(&self, virtual_size: u64, below: LayerBelow) -> Result<()> {
        self.allocator()?;
        let shape = self.shape.load_full();
        let sector = shape.grid.sector;
        if !virtual_size.is_multiple_of(sector) {
            return Err(Error::invalid(format!(
                "a VHDX of {virtual_size} bytes (allowed: a multiple of {sector})"
            )));
        }
        if virtual_size == 0 || virtual_size > MAX_DISK {
            return Err(Error::new(
                ErrorKind::OutOfRange,
                format!("a VHDX of {virtual_size} bytes (allowed: {sector} to {MAX_DISK})"),
            ));
        }
        // Space that no entry names is about to be counted anew.
        drop(self.allocator.release_unused(self));
        match virtual_size.cmp(&shape.metadata.size) {
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Less => self.shrink(&shape, virtual_size),
            std::cmp::Ordering::Greater => self.grow(&shape, virtual_size, below),
        }
    }
}

/// What a disk becomes that grows.
struct Growth {
    size: u64,
    /// Blocks that are new.
    blocks: Range<u64>,
    /// Up to where there may be data below.
    hidden: u64,
    /// Where the first new block is, where all have space.
    first: Option<u64>,
}

impl Growth {
    /// The entry of a new block.
    fn entry(&self, grid: Grid, index: u64) -> u64 {
        let Use::Block(block) = grid.of(index) else {
            return 0;
        };
        let entry = match self.first {
            Some(first) => Block::Present(first + (block - self.blocks.start) * grid.block),
            // What would become visible of the parent reads as zeroes.
            None if block * grid.block < self.hidden => Block::Zero,
            None => Block::Absent,
        };
        match self.blocks.contains(&block) {
            true => entry.word(),
            false => 0,
        }
    }
}

impl Vhdx {
    /// Grows: entries that nobody looks at yet, then the size that shows them.
    fn grow(&self, shape: &Shape, size: u64, below: LayerBelow) -> Result<()> {
        let old = shape.metadata.size;
        let hidden = if self.has_backing() { below.end()? } else { 0 };
        self.may_end_within(shape, hidden > old)?;
        self.allocator.begin(self)?;
        self.zero_tail(shape, old, Zeroing::KeepSpace)?;
        // Nothing of the log is to be put in place later than what follows.
        self.journal.finish()?;
        let mut growth = Growth {
            size,
            blocks: shape.blocks()..shape.grid.blocks(size),
            hidden,
            first: None,
        };
        if shape.metadata.fixed {
            growth.first = Some(self.claim_zeroes(growth.blocks.end - growth.blocks.start)?);
        }
        let entries = shape.grid.entries(size);
        match entries * 8 <= shape.regions.bat.end - shape.regions.bat.start {
            true => self.extend_table(shape, &growth)?,
            false => self.move_table(shape, &growth)?,
        }
        self.journal.finish()?;
        self.learn()
    }

    /// Refuses a disk whose last block would show what is behind its end.
    fn may_end_within(&self, shape: &Shape, hides: bool) -> Result<()> {
        if shape.metadata.size.is_multiple_of(self.block) {
            return Ok(());
        }
        match self.find(shape, shape.blocks() - 1, Wait::Yes)? {
            Block::Partial(_) => {}
            Block::Absent if hides => {}
            _ => return Ok(()),
        }
        Err(Error::unsupported(
            "the disk's last block has no space of its own, or has it in part: data of the parent could show (allowed: after a write to it)",
        ))
    }

    /// Has the last block of a disk of `size` bytes read as zeroes behind its end.
    fn zero_tail(&self, shape: &Shape, size: u64, how: Zeroing) -> Result<()> {
        let cut = size % self.block;
        if cut == 0 {
            return Ok(());
        }
        match self.find(shape, size / self.block, Wait::Yes)? {
            Block::Present(host) => self.zero_within(host, cut..self.block, how),
            _ => Ok(()),
        }
    }

    /// Refuses a disk of `size` bytes whose last block would be here in part: what is behind its end
    /// cannot be made to read as zeroes.
    fn may_be_cut(&self, shape: &Shape, size: u64) -> Result<()> {
        if size.is_multiple_of(self.block) {
            return Ok(());
        }
        match self.find(shape, size / self.block, Wait::Yes)? {
            Block::Partial(_) => Err(Error::unsupported(
                "the disk's last block is here in part (allowed: after a write to it)",
            )),
            _ => Ok(()),
        }
    }

    /// Takes `count` new blocks at the end; they read as zeroes.  Where the first is.
    fn claim_zeroes(&self, count: u64) -> Result<u64> {
        let mut slots = self.slots.lock();
        slots.trim();
        let (first, each) = (slots.end(), self.block / MB);
        let taken = slots.claim(&*self.file, MIBS, first..first + count * each)?;
        let host = first * MB..(first + count * each) * MB;
        if !taken.zeroed {
            zero_or_write(&*self.file, host.clone(), Zeroing::KeepSpace)?;
        }
        Ok(host.start)
    }

    /// Writes entries of new blocks behind those that count.
    fn extend_table(&self, shape: &Shape, growth: &Growth) -> Result<()> {
        let grid = shape.grid;
        let table: Table<AtomicU64> = Table::of_words(
            shape.regions.bat.start,
            grid.entries(growth.size),
            Endian::Little,
        );
        self.clear_from(shape, growth.blocks.start)?;
        self.write_entries(&table, grid, growth)?;
        self.allocator.order.settle()?;
        self.switch(&[(shape.metadata.size_at(), &growth.size.to_le_bytes())])
    }

    /// Writes the new entries that are not zero.
    fn write_entries(&self, table: &Table<AtomicU64>, grid: Grid, growth: &Growth) -> Result<()> {
        let end = match growth.first {
            Some(_) => growth.blocks.end,
            None => growth.blocks.end.min(growth.hidden.div_ceil(grid.block)),
        };
        if end <= growth.blocks.start {
            return Ok(());
        }
        let (first, last) = (grid.index(growth.blocks.start), grid.index(end - 1));
        // The sector bitmap of the chunk that the disk ended in stays.
        let mut at = first;
        while at <= last {
            let Use::Block(block) = grid.of(at) else {
                at += 1;
                continue;
            };
            let stop = (at + grid.chunk(block).end - block).min(last + 1);
            table.fill(&*self.file, at..stop, |index| Ok(growth.entry(grid, index)))?;
            at = stop;
        }
        Ok(())
    }

    /// Clears entries from that of `block` on that do not count, but for the sector bitmap of a chunk
    /// that does.  The log holds nothing.
    fn clear_from(&self, shape: &Shape, block: u64) -> Result<()> {
        let (grid, bat) = (shape.grid, &shape.regions.bat);
        let at = |index: u64| bat.start + index * 8;
        let chunk = grid.chunk(block);
        let first = grid.index(block);
        let end = bat.end;
        let cuts = match chunk.start == block {
            true => [at(first)..end, end..end],
            false => {
                let bitmap = first + (chunk.end - block);
                [at(first)..at(bitmap), at(bitmap + 1)..end]
            }
        };
        for part in cuts {
            let part = part.start.min(end)..part.end.min(end).min(self.file.size());
            if !part.is_empty() {
                zero_or_write(&*self.file, part, Zeroing::MayUnmap)?;
            }
        }
        Ok(())
    }

    /// Makes a longer table, and has both region tables name it at once with the size.
    fn move_table(&self, shape: &Shape, growth: &Growth) -> Result<()> {
        let grid = shape.grid;
        let entries = grid.entries(growth.size);
        let run = {
            let mut slots = self.slots.lock();
            let run = slots.vacant_run((entries * 8).div_ceil(MB));
            let host = run.start * MB..run.end * MB;
            if !slots.claim(&*self.file, MIBS, run)?.zeroed {
                zero_or_write(&*self.file, host.clone(), Zeroing::MayUnmap)?;
            }
            host
        };
        let table: Table<AtomicU64> = Table::of_words(run.start, entries, Endian::Little);
        let kept = grid.index(growth.blocks.start);
        let mut words = Vec::new();
        let mut first = 0;
        shape.table.each_stored(&*self.journal, |index, word| {
            let counts = index < kept || matches!(grid.of(index), Use::Bitmap(_));
            if word == 0 || !counts {
                return Ok(());
            }
            if index != first + len64(words.len()) || words.len() >= TOGETHER {
                table.publish(&*self.file, first, &words)?;
                (first, words) = (index, Vec::new());
            }
            words.push(word);
            Ok(())
        })?;
        table.publish(&*self.file, first, &words)?;
        self.write_entries(&table, grid, growth)?;
        self.allocator.order.settle()?;
        let regions = shape.regions.with_bat(run).to_bytes();
        self.switch(&[
            (PLACES[0], &regions),
            (PLACES[1], &regions),
            (shape.metadata.size_at(), &growth.size.to_le_bytes()),
        ])
    }

    /// Changes what says how large the disk is.  Whatever fails after it, that is its size.
    fn switch(&self, changes: &[(u64, &[u8])]) -> Result<()> {
        self.journal.change(changes)?;
        self.reread()?;
        Ok(())
    }

    /// Shrinks: the size first, behind which nobody looks at entries.
    fn shrink(&self, shape: &Shape, size: u64) -> Result<()> {
        let blocks = shape.grid.blocks(size);
        self.may_be_cut(shape, size)?;
        self.allocator.begin(self)?;
        self.switch(&[(shape.metadata.size_at(), &size.to_le_bytes())])?;
        // Before data and entries are cleared and space is given away.
        self.journal.finish()?;
        self.zero_tail(shape, size, Zeroing::MayUnmap)?;
        self.clear_from(shape, blocks)?;
        self.allocator.order.settle()?;
        self.learn()?;
        self.trim()
    }
}

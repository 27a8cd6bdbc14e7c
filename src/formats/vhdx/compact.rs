//! Giving back space: blocks move down into gaps, and the file ends behind the last.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::formats::vhdx::bat::Block;
use crate::formats::vhdx::bytes::MB;
use crate::formats::vhdx::entry::{PAGE, SECTOR};
use crate::formats::vhdx::image::Vhdx;
use crate::formats::vhdx::journal::MAX_PAGES;
use crate::formats::vhdx::scan;
use crate::formats::vhdx::units::MIBS;
use crate::image::units::{Taken, Units};
use crate::image::{Compact, Empty};
use crate::util::align::{clamp_len, down};
use crate::util::progress::Progress;

/// Blocks moved in one go.
const STEP: usize = 4 << 10;

impl Compact for Vhdx {
    fn frees(&self) -> bool {
        !self.shape.load().metadata.fixed
    }

    fn free(&self, guest: &Range<u64>) -> Result<()> {
        let word = match self.has_backing() {
            true => Block::Zero.word(),
            false => Block::Absent.word(),
        };
        let shape = self.shape.load();
        let blocks = guest.start / self.block..guest.end.div_ceil(self.block);
        let mut at = blocks.start;
        while at < blocks.end {
            let end = blocks.end.min(shape.grid.chunk(at).end);
            let entries = shape.grid.index(at)..shape.grid.index(at) + (end - at);
            shape.table.fill(&*self.journal, entries, |_| Ok(word))?;
            at = end;
        }
        Ok(())
    }

    fn unused(&self, _progress: &dyn Progress) -> Result<u64> {
        let slots = scan::scan(self, &*self.reread()?, |wrong| {
            Err(Error::corrupt(wrong.text()))
        })?;
        let (each, mut gaps) = (self.block / MB, slots);
        let (used, end) = (gaps.used(), gaps.end());
        let mut room = 0;
        // Gaps that blocks can move into.
        while end - used - room >= each {
            let run = gaps.vacant_run(each);
            if run.end > end {
                break;
            }
            room += each;
            run.for_each(|number| {
                gaps.add(number);
            });
        }
        Ok(room * MB)
    }

    fn pack(&self, progress: &dyn Progress) -> Result<u64> {
        drop(self.allocator.release_unused(self));
        // Blocks that lost their entry are free only once that is on stable media.
        self.allocator.order.settle()?;
        let mut moved = 0;
        loop {
            self.learn()?;
            let holes = self.holes();
            let blocks = self.shape.load().blocks();
            match self.allocator.move_down(self, blocks, &holes, progress)? {
                0 => break,
                more => moved += more,
            }
        }
        self.learn()?;
        self.journal.finish()?;
        self.trim()?;
        Ok(moved)
    }
}

impl Empty for Vhdx {
    fn empty(&mut self) -> Result<()> {
        self.allocator()?;
        let shape = self.shape.load_full();
        if shape.metadata.fixed {
            return Err(Error::unsupported(
                "a fixed VHDX keeps the space of all blocks",
            ));
        }
        let mut pages = Vec::new();
        shape.table.each_stored(&*self.journal, |index, word| {
            let page = down(shape.table.host() + index * 8, SECTOR);
            if word != 0 && pages.last() != Some(&page) {
                pages.push(page);
            }
            Ok(())
        })?;
        if pages.len() > MAX_PAGES {
            return Err(Error::unsupported(format!(
                "its table has blocks in {} pages, which do not change at once (allowed: {MAX_PAGES})",
                pages.len()
            )));
        }
        drop(self.allocator.release_unused(&*self));
        // It reads as before, so its state is not another.
        let zeroes = [0; PAGE];
        let end = shape.table.host() + shape.table.len() * 8;
        let changes = pages.iter().map(|page| {
            let len = clamp_len(end - page, PAGE);
            (*page, &zeroes[..len])
        });
        let changes: Vec<(u64, &[u8])> = changes.collect();
        self.journal.change(&changes)?;
        self.journal.finish()?;
        self.learn()?;
        self.trim()?;
        self.allocator.order.settle()
    }
}

impl Vhdx {
    /// Gaps that have room for a block each; nothing else takes them from here on.
    fn holes(&self) -> Vec<Taken> {
        let mut slots = self.slots.lock();
        let (each, end) = (self.block / MB, slots.end());
        let mut holes = Vec::new();
        while holes.len() < STEP {
            let run = slots.vacant_run(each);
            if run.end > end {
                break;
            }
            holes.push(Taken {
                count: 1,
                stride: self.block,
                ..MIBS.taken(run.start, each)
            });
            run.for_each(|number| {
                slots.add(number);
            });
        }
        holes
    }
}

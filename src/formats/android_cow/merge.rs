//! The merge: what the file makes, written into the disk below in place, so that whatever stops it,
//! what is there says how to go on (section d of the description of the format).
//!
//! Blocks that are made of the old disk go through the scratch area, a window at a time: their new
//! bytes are there, durably, before the first of them is overwritten.  What needs no old bytes is
//! written in batches, again where it was not counted yet.

use std::collections::BTreeSet;

use super::check::judge;
use super::header::{BLOCK, BLOCK_LEN, MERGED_AT};
use super::image::AndroidCow;
use super::ops::End;
use super::table::Entry;
use super::window::{self, ENTRY, FILLING, READY};
use crate::error::{Error, Result};
use crate::image::merge::{Merge, MergeBase};
use crate::util::align::{clamp_len, len64};
use crate::util::progress::Progress;

/// Operations that need no old bytes and are counted together.
const BATCH: usize = 256;
/// Bytes that they have at most, but for the last of them.
const BATCH_BYTES: u64 = 4 << 20;

impl AndroidCow {
    fn step<'a>(&'a self, order: &[u32], step: usize) -> Option<&'a Entry> {
        self.table.entries.get(*order.get(step)? as usize)
    }

    /// Refuses a merge that would lose data, or could not be gone on with.
    fn refuse_merge(&self, order: &[u32], first: usize) -> Result<()> {
        if let End::Label(_) = self.end {
            return Err(Error::unsupported(
                "is merged whole or not at all (--open-options label= is for reading)",
            ));
        }
        let mut gone = None;
        judge(&self.table, order, first, &mut |found| {
            gone = gone.or(Some(found));
        });
        if let Some(found) = gone {
            return Err(Error::corrupt(format!(
                "is not merged, since data would be lost: step {} makes block {} of block {}, which a step before it overwrites (convert makes the disk all the same)",
                found.step, found.block, found.reads
            )));
        }
        let mut left = order.iter().skip(first);
        let left = left
            .by_ref()
            .filter_map(|place| self.table.entries.get(*place as usize));
        for entry in left.filter(|entry| entry.kind().is_ordered()) {
            self.is_below(entry, Self::read_from(entry))?;
            if window::most(&self.header) == 0 {
                return Err(Error::unsupported(format!(
                    "has a scratch area of {} bytes, in which no block has room: a merge that is stopped could not be gone on with",
                    self.header.scratch
                )));
            }
        }
        Ok(())
    }

    /// Says how many operations are merged, and in which state the scratch area is, in one write.
    fn count(&self, merged: usize, state: u8) -> Result<()> {
        let end = match self.header.scratch {
            0 => MERGED_AT + 8,
            _ => self.header.scratch_at() + 1,
        };
        let mut bytes = vec![0; clamp_len(end - MERGED_AT, 256)];
        self.storage.read_at(&mut bytes, MERGED_AT)?;
        if let Some(count) = bytes.first_chunk_mut() {
            *count = len64(merged).to_le_bytes();
        }
        if let Some(last) = bytes.last_mut().filter(|_| self.header.scratch > 0) {
            *last = state;
        }
        self.storage.write_at(&bytes, MERGED_AT)?;
        self.storage.sync()
    }

    /// Goes on with a window that was ready when a merge was stopped; how many steps are done then.
    fn recover(&self, order: &[u32], first: usize, base: &dyn MergeBase) -> Result<usize> {
        let is_done = |block: u64| {
            let found = self.table.find(block).ok();
            found.is_some_and(|place| self.table.entries[place].is_merged())
        };
        let waiting: BTreeSet<u64> = self
            .window
            .keys()
            .copied()
            .filter(|b| !is_done(*b))
            .collect();
        if waiting.is_empty() {
            // They are in the base, and it is not said yet that the area is free.
            self.count(first, FILLING)?;
            return Ok(first);
        }
        let next = order.iter().skip(first).take(waiting.len());
        let next = next.filter_map(|place| self.table.entries.get(*place as usize));
        let next: BTreeSet<u64> = next.map(|entry| u64::from(entry.block)).collect();
        if next != waiting {
            return Err(Error::corrupt(
                "the blocks in the scratch area are not those that the merge goes on with",
            ));
        }
        let mut buf = [0; BLOCK_LEN];
        for (block, host) in self
            .window
            .iter()
            .filter(|(block, _)| waiting.contains(block))
        {
            self.storage.read_at(&mut buf, *host)?;
            base.write_at(&buf, block * BLOCK)?;
        }
        base.flush()?;
        let done = first + waiting.len();
        self.count(done, FILLING)?;
        Ok(done)
    }

    /// Does the next steps, those of them that are made of the old disk: as many as a window has room
    /// for.
    fn window(
        &self,
        order: &[u32],
        first: usize,
        buf: &mut Vec<u8>,
        base: &dyn MergeBase,
    ) -> Result<usize> {
        let most = clamp_len(window::most(&self.header), usize::MAX);
        let steps = (first..).map_while(|step| self.step(order, step));
        let steps = steps.take_while(|entry| entry.kind().is_ordered());
        let entries: Vec<&Entry> = steps.take(most).collect();
        let start = self.header.scratch_at();
        let data = start + window::table_len(&self.header);
        buf.resize(entries.len() * BLOCK_LEN, 0);
        let mut table = vec![0; clamp_len(window::table_len(&self.header) - 1, usize::MAX)];
        let slots = table.chunks_exact_mut(clamp_len(ENTRY, usize::MAX));
        let blocks = entries.iter().zip(buf.chunks_mut(BLOCK_LEN)).zip(slots);
        for ((at, ((entry, block), slot)), _) in
            (data..).step_by(BLOCK_LEN).zip(blocks).zip(0..most)
        {
            self.made(entry, block, base)?;
            slot[..8].copy_from_slice(&u64::from(entry.block).to_le_bytes());
            slot[8..].copy_from_slice(&at.to_le_bytes());
        }
        self.storage.write_at(buf, data)?;
        self.storage.write_at(&table, start + 1)?;
        self.storage.sync()?;
        self.count(first, READY)?;
        for (entry, block) in entries.iter().zip(buf.chunks(BLOCK_LEN)) {
            base.write_at(block, u64::from(entry.block) * BLOCK)?;
        }
        base.flush()?;
        let done = first + entries.len();
        self.count(done, FILLING)?;
        Ok(done)
    }

    /// Does the next steps, those of them that need no old bytes: as many as are counted together.
    fn batch(
        &self,
        order: &[u32],
        first: usize,
        buf: &mut Vec<u8>,
        base: &dyn MergeBase,
    ) -> Result<usize> {
        let (mut step, mut bytes) = (first, 0);
        while let Some(entry) = self.step(order, step) {
            if entry.kind().is_ordered() || step - first == BATCH || bytes >= BATCH_BYTES {
                break;
            }
            let blocks = entry.blocks();
            let len = (blocks.end - blocks.start) * BLOCK;
            buf.resize(clamp_len(len, usize::MAX), 0);
            self.made(entry, buf, base)?;
            base.write_at(buf, blocks.start * BLOCK)?;
            bytes += len;
            step += 1;
        }
        base.flush()?;
        self.count(step, FILLING)?;
        Ok(step)
    }
}

impl Merge for AndroidCow {
    fn left(&self) -> u64 {
        let left = self.table.entries.iter().filter(|entry| !entry.is_merged());
        let blocks = left.map(|entry| entry.blocks().end - entry.blocks().start);
        blocks.sum::<u64>() * BLOCK
    }

    fn merge(&self, base: &dyn MergeBase, progress: &dyn Progress) -> Result<()> {
        let order = self
            .table
            .merge_order(&*self.storage, &self.header, self.end)?;
        let mut done = clamp_len(self.header.merged, usize::MAX);
        self.refuse_merge(&order, done)?;
        let told = |from: usize, to: usize| {
            let steps = (from..to).filter_map(|step| self.step(&order, step));
            let blocks = steps.map(|entry| entry.blocks().end - entry.blocks().start);
            progress.advance(blocks.sum::<u64>() * BLOCK);
        };
        if !self.window.is_empty() {
            let next = self.recover(&order, done, base)?;
            told(done, next);
            done = next;
        }
        let mut buf = Vec::new();
        while let Some(entry) = self.step(&order, done) {
            progress.check()?;
            let next = match entry.kind().is_ordered() {
                true => self.window(&order, done, &mut buf, base)?,
                false => self.batch(&order, done, &mut buf, base)?,
            };
            told(done, next);
            done = next;
        }
        Ok(())
    }
}

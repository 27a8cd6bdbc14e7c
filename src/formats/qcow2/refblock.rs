//! The refcount structure: a table of blocks, each a cluster of counters of 1 to 64 bits.
//!
//! Counters narrower than a byte fill it from its least significant bit; wider ones are
//! big-endian.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::entry::OFFSET;
use super::header::{Header, MAX_REFTABLE_BYTES};
use crate::error::{Error, Result};
use crate::image::words::{Endian, Words};
use crate::image::{Wait, be64};
use crate::storage::Storage;
use crate::util::align::{clamp_len, is_aligned};
use crate::util::buf::is_zero;
use crate::util::progress::Progress;
use crate::util::range;

/// Bytes of blocks kept in memory.
const CACHE_BYTES: u64 = 16 << 20;

/// A counter's width: 1 << order bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Width(u32);

impl Width {
    /// From the header's `refcount_order`, which is at most 6.
    pub(super) fn new(order: u32) -> Self {
        debug_assert!(order <= 6);
        Self(order)
    }

    /// Bits of a counter.
    pub(super) fn bits(self) -> u32 {
        1 << self.0
    }

    /// The largest count.
    pub(super) fn max(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }

    /// log2 of the counters in a block of `1 << cluster_bits` bytes.
    pub(super) fn block_bits(self, cluster_bits: u32) -> u32 {
        cluster_bits + 3 - self.0
    }

    /// Counter `index` of a block.
    pub(super) fn get(self, block: &[u8], index: usize) -> u64 {
        if self.0 < 3 {
            let per_byte = 8 >> self.0;
            let shift = (index % per_byte) << self.0;
            return u64::from(block[index / per_byte] >> shift) & self.max();
        }
        let len = 1 << (self.0 - 3);
        let bytes = &block[index * len..(index + 1) * len];
        bytes
            .iter()
            .fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    /// Sets counter `index` of a block to `value`, at most [`Width::max`].
    pub(super) fn set(self, block: &mut [u8], index: usize, value: u64) {
        debug_assert!(value <= self.max());
        if self.0 < 3 {
            let per_byte = 8 >> self.0;
            let shift = (index % per_byte) << self.0;
            let mask = u8::try_from(self.max()).unwrap_or(u8::MAX) << shift;
            let byte = &mut block[index / per_byte];
            *byte = *byte & !mask | (u8::try_from(value).unwrap_or(u8::MAX) << shift) & mask;
            return;
        }
        let len = 1usize << (self.0 - 3);
        let bytes = value.to_be_bytes();
        block[index * len..(index + 1) * len].copy_from_slice(&bytes[8 - len..]);
    }

    /// The bytes of a block that hold the counters from `first` to before `end`.
    pub(super) fn bytes(self, first: usize, end: usize) -> Range<usize> {
        let bit = |index: usize| index << self.0;
        bit(first) / 8..bit(end).div_ceil(8)
    }

    /// Blocks of `len` bytes in all whose counters in a range are 1, and the others 0.
    pub(super) fn ones(self, len: u64, counters: Range<u64>) -> Vec<u8> {
        let mut bytes = vec![0; clamp_len(len, usize::MAX)];
        for counter in counters {
            self.set(&mut bytes, clamp_len(counter, usize::MAX), 1);
        }
        bytes
    }
}

/// Where the refcounts of an image are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// log2 of the cluster size.
    pub(super) cluster_bits: u32,
    /// Width of a counter.
    pub(super) width: Width,
    /// Offset of the table.
    pub(super) table: u64,
    /// Its length in clusters.
    pub(super) table_clusters: u64,
}

impl Place {
    /// Where a header says that they are.
    pub(super) fn of(header: &Header) -> Self {
        Self {
            cluster_bits: header.cluster_bits,
            width: Width::new(header.refcount_order),
            table: header.reftable_offset,
            table_clusters: u64::from(header.reftable_clusters),
        }
    }

    /// Bytes of a cluster, and so of a block.
    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// log2 of the counters in a block.
    pub(super) fn block_bits(&self) -> u32 {
        self.width.block_bits(self.cluster_bits)
    }

    /// Most bytes of a table: a cluster at least.
    pub(super) fn most_table_bytes(&self) -> u64 {
        MAX_REFTABLE_BYTES.max(self.cluster_size())
    }

    /// The bytes of the table.
    pub(super) fn table_range(&self) -> Range<u64> {
        let len = self.table_clusters << self.cluster_bits;
        self.table..self.table.saturating_add(len)
    }

    /// Where the block of an entry of the table is, in a file of `len` bytes; what is wrong with
    /// the entry, where something is.
    pub(super) fn block(&self, entry: u64, len: u64) -> std::result::Result<Option<u64>, String> {
        let size = self.cluster_size();
        if entry & !OFFSET != 0 || !is_aligned(entry, size) || entry >= len && entry != 0 {
            return Err(format!(
                "is at {entry:#x} (allowed: multiples of {size:#x} below {len:#x})"
            ));
        }
        Ok(Some(entry).filter(|host| *host != 0))
    }
}

/// The refcount structure in a file.
#[derive(Debug)]
pub(super) struct Structure {
    pub(super) file: Arc<dyn Storage>,
    pub(super) place: Place,
    table: Words<AtomicU64>,
}

impl Structure {
    /// The one at `place`.
    pub(super) fn new(file: Arc<dyn Storage>, place: Place) -> Self {
        let table = Words::new(4096, 64, Endian::Big);
        Self { file, place, table }
    }

    /// From now on it is elsewhere.
    pub(super) fn move_to(&mut self, place: Place) {
        self.place = place;
        self.table.forget(0..u64::MAX);
    }

    /// Entries of the table.
    pub(super) fn table_len(&self) -> u64 {
        range::len(&self.place.table_range()) / 8
    }

    /// Offset of block `index`; `None` where there is none, so that its counts are 0.
    pub(super) fn block(&self, index: u64) -> Result<Option<u64>> {
        if index >= self.table_len() {
            return Ok(None);
        }
        let host = self.place.table + index * 8;
        self.judged(index, self.table.get(&*self.file, host, Wait::Yes)?)
    }

    fn judged(&self, index: u64, entry: u64) -> Result<Option<u64>> {
        let block = self.place.block(entry, self.file.size());
        block.map_err(|fault| Error::corrupt(format!("refcount block {index} {fault}")))
    }

    /// Index and offset of all blocks there are.
    pub(super) fn blocks(&self) -> Result<Vec<(u64, u64)>> {
        let words = be64::read(&*self.file, self.place.table_range())?;
        let blocks = (0..).zip(words).map(|(index, word)| {
            let host = self.judged(index, word)?;
            Ok(host.map(|host| (index, host)))
        });
        blocks.filter_map(Result::transpose).collect()
    }

    /// The bytes of the block at `host`.
    pub(super) fn read(&self, host: u64) -> Result<Vec<u8>> {
        be64::read_bytes(&*self.file, host..host + self.place.cluster_size())
    }

    /// Gives `found` the runs of clusters below `end` that have refcount 0, in order.  Where no
    /// block is, or one of zeroes, nothing is looked at one by one.
    ///
    /// # Errors
    /// Those of `found`, which end it; the host's; `Cancelled`.
    pub(super) fn free_runs(
        &self,
        end: u64,
        progress: &dyn Progress,
        found: &mut dyn FnMut(Range<u64>) -> Result<()>,
    ) -> Result<()> {
        let (width, bits) = (self.place.width, self.place.block_bits());
        let mut run = 0..0;
        for index in 0..self.table_len().min(end.div_ceil(1 << bits)) {
            progress.check()?;
            let clusters = index << bits..((index + 1) << bits).min(end);
            // Not on the word of the host that it is a hole: space is given back by this.
            let bytes = self.block(index)?.map(|host| self.read(host)).transpose()?;
            let Some(bytes) = bytes.filter(|bytes| !is_zero(bytes)) else {
                run.end = clusters.end;
                continue;
            };
            for (within, cluster) in clusters.enumerate() {
                if width.get(&bytes, within) > 0 {
                    if !run.is_empty() {
                        found(run)?;
                    }
                    run = cluster + 1..cluster + 1;
                } else {
                    run.end = cluster + 1;
                }
            }
        }
        match run.start < end {
            true => found(run.start..end),
            false => Ok(()),
        }
    }

    /// Has the entries from `index` on point at blocks.
    pub(super) fn point_at(&self, index: u64, blocks: &[u64]) -> Result<()> {
        let host = self.place.table + index * 8;
        self.table.publish(&*self.file, host, blocks)
    }
}

/// A block in memory.
#[derive(Debug)]
pub(super) struct Block {
    /// Its offset.
    pub(super) host: u64,
    /// Its counters.
    pub(super) bytes: Vec<u8>,
    /// They are not in the file yet.
    pub(super) changed: bool,
    used: u64,
}

impl Block {
    /// Block at `host`.
    pub(super) fn new(host: u64, bytes: Vec<u8>, changed: bool) -> Self {
        Self {
            host,
            bytes,
            changed,
            used: 0,
        }
    }

    fn write_back(&mut self, file: &dyn Storage) -> Result<()> {
        if self.changed {
            file.write_at(&self.bytes, self.host)?;
            self.changed = false;
        }
        Ok(())
    }
}

/// Blocks kept in memory, by index.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    kept: HashMap<u64, Block>,
    clock: u64,
}

impl Blocks {
    /// Block `index`; `None` where there is none.
    pub(super) fn get(&mut self, structure: &Structure, index: u64) -> Result<Option<&mut Block>> {
        if !self.kept.contains_key(&index) {
            let Some(host) = structure.block(index)? else {
                return Ok(None);
            };
            let block = Block::new(host, structure.read(host)?, false);
            self.keep(structure, index, block)?;
        }
        self.clock += 1;
        let mut block = self.kept.get_mut(&index);
        if let Some(block) = &mut block {
            block.used = self.clock;
        }
        Ok(block)
    }

    /// Keeps block `index`; where there are many, those not used lately are written and forgotten.
    pub(super) fn keep(
        &mut self,
        structure: &Structure,
        index: u64,
        mut block: Block,
    ) -> Result<()> {
        let most = clamp_len(CACHE_BYTES / structure.place.cluster_size(), usize::MAX);
        if self.kept.len() >= most {
            let mut uses: Vec<u64> = self.kept.values().map(|b| b.used).collect();
            let (_, median, _) = uses.select_nth_unstable(most / 2);
            let mut old = self.kept.values_mut().filter(|b| b.used <= *median);
            old.try_for_each(|b| b.write_back(&*structure.file))?;
            self.kept.retain(|_, b| b.used > *median);
        }
        self.clock += 1;
        block.used = self.clock;
        self.kept.insert(index, block);
        Ok(())
    }

    /// Writes all that changed.
    pub(super) fn flush(&mut self, file: &dyn Storage) -> Result<()> {
        let mut blocks = self.kept.values_mut();
        blocks.try_for_each(|block| block.write_back(file))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_every_width_keep_their_neighbours() {
        for order in 0..=6 {
            let width = Width::new(order);
            let count = (512 * 8) >> order;
            let mut block = vec![0; 512];
            let value = |i: usize| (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) & width.max();
            (0..count).for_each(|i| width.set(&mut block, i, value(i)));
            (0..count).for_each(|i| assert_eq!(width.get(&block, i), value(i), "{order} {i}"));
            width.set(&mut block, 3, 0);
            assert_eq!(width.get(&block, 2), value(2));
            assert_eq!(width.get(&block, 3), 0);
            assert_eq!(width.get(&block, 4), value(4));
        }
    }

    #[test]
    fn narrow_counters_fill_a_byte_from_its_low_end() {
        let mut block = vec![0; 512];
        Width::new(0).set(&mut block, 1, 1);
        assert_eq!(block[0], 2);
        Width::new(4).set(&mut block, 1, 0x102);
        assert_eq!(block[2..4], [1, 2]);
    }

    #[test]
    fn the_bytes_of_a_run_cover_it() {
        assert_eq!(Width::new(0).bytes(3, 9), 0..2);
        assert_eq!(Width::new(4).bytes(1, 3), 2..6);
    }
}

//! Refcounts of a structure that is being built and that nothing points at yet: changed in
//! memory, written when there are many of them and at the end.

use std::collections::HashMap;
use std::ops::Range;

use super::refblock::Width;
use super::refcount::Step;
use crate::error::{Error, Result};
use crate::storage::Storage;
use crate::util::align::{clamp_len, len64};

/// Bytes of blocks kept in memory.
const CACHE_BYTES: u64 = 16 << 20;

#[derive(Debug)]
struct Block {
    bytes: Vec<u8>,
    used: u64,
    changed: bool,
}

/// Refcounts with a table in memory, which is at most as long as a refcount table may be.
#[derive(Debug)]
pub(super) struct Counts {
    cluster_bits: u32,
    width: Width,
    /// Offset of each block; 0: there is none, so that its counts are 0.
    table: Vec<u64>,
    blocks: HashMap<u64, Block>,
    clock: u64,
}

impl Counts {
    /// No blocks yet, room for `len` of them.
    pub(super) fn new(cluster_bits: u32, width: Width, len: usize) -> Self {
        Self {
            cluster_bits,
            width,
            table: vec![0; len],
            blocks: HashMap::new(),
            clock: 0,
        }
    }

    /// log2 of the counters in a block.
    pub(super) fn block_bits(&self) -> u32 {
        self.width.block_bits(self.cluster_bits)
    }

    /// Puts block `index`, which has room in the table, at `host`.
    pub(super) fn place(
        &mut self,
        file: &dyn Storage,
        index: u64,
        host: u64,
        bytes: Vec<u8>,
    ) -> Result<()> {
        if let Some(entry) = self.table.get_mut(clamp_len(index, usize::MAX)) {
            *entry = host;
        }
        self.keep(file, index, bytes, true)
    }

    /// How many things point at a cluster.
    pub(super) fn get(&mut self, file: &dyn Storage, cluster: u64) -> Result<u64> {
        let (width, bits) = (self.width, self.block_bits());
        let index = clamp_len(cluster & ((1 << bits) - 1), usize::MAX);
        let block = self.block(file, cluster >> bits)?;
        Ok(block.map_or(0, |block| width.get(&block.bytes, index)))
    }

    /// Counts each of `clusters` up or down by one.
    ///
    /// # Errors
    /// `Unsupported` where a count needs more bits than it has; `Corrupt` where it was 0; the
    /// host's.
    pub(super) fn step(
        &mut self,
        file: &dyn Storage,
        clusters: Range<u64>,
        step: Step,
    ) -> Result<()> {
        let (width, bits) = (self.width, self.block_bits());
        let mut at = clusters.start;
        while at < clusters.end {
            let index = at >> bits;
            let end = clusters.end.min((index + 1) << bits);
            let Some(block) = self.block(file, index)? else {
                return Err(unused(at));
            };
            block.changed = true;
            for cluster in at..end {
                let within = clamp_len(cluster & ((1 << bits) - 1), usize::MAX);
                let count = width.get(&block.bytes, within);
                let changed = match (count, step) {
                    (0, _) => return Err(unused(cluster)),
                    (count, Step::Up) if count >= width.max() => {
                        return Err(Error::unsupported(format!(
                            "cluster {cluster} is referred to {count} times, and refcounts of {} bits hold no more (amend -o refcount_bits=16 makes room)",
                            width.bits()
                        )));
                    }
                    (count, Step::Up) => count + 1,
                    (count, Step::Down) => count - 1,
                };
                width.set(&mut block.bytes, within, changed);
            }
            at = end;
        }
        Ok(())
    }

    /// Writes the blocks that changed, and the table at `host`.
    pub(super) fn flush(&mut self, file: &dyn Storage, host: u64) -> Result<()> {
        for (index, block) in self.blocks.iter_mut().filter(|(_, b)| b.changed) {
            write(file, &self.table, *index, block)?;
        }
        let mut bytes: Vec<u8> = self.table.iter().flat_map(|h| h.to_be_bytes()).collect();
        let cluster = clamp_len(1 << self.cluster_bits, usize::MAX);
        bytes.resize(bytes.len().next_multiple_of(cluster), 0);
        file.write_at(&bytes, host)
    }

    fn block(&mut self, file: &dyn Storage, index: u64) -> Result<Option<&mut Block>> {
        self.clock += 1;
        let place = clamp_len(index, usize::MAX);
        let Some(host) = self.table.get(place).copied().filter(|h| *h != 0) else {
            return Ok(None);
        };
        if !self.blocks.contains_key(&index) {
            let mut bytes = vec![0; clamp_len(1 << self.cluster_bits, usize::MAX)];
            file.read_at(&mut bytes, host)?;
            self.keep(file, index, bytes, false)?;
        }
        let mut block = self.blocks.get_mut(&index);
        if let Some(block) = &mut block {
            block.used = self.clock;
        }
        Ok(block)
    }

    fn keep(
        &mut self,
        file: &dyn Storage,
        index: u64,
        bytes: Vec<u8>,
        changed: bool,
    ) -> Result<()> {
        let most = clamp_len(CACHE_BYTES >> self.cluster_bits, usize::MAX).max(4);
        if self.blocks.len() >= most {
            self.let_go(file)?;
        }
        let used = self.clock;
        self.blocks.insert(
            index,
            Block {
                bytes,
                used,
                changed,
            },
        );
        Ok(())
    }

    /// Forgets the half of the blocks that were not used lately.
    fn let_go(&mut self, file: &dyn Storage) -> Result<()> {
        let mut uses: Vec<u64> = self.blocks.values().map(|b| b.used).collect();
        let middle = uses.len() / 2;
        let (_, median, _) = uses.select_nth_unstable(middle);
        let median = *median;
        for (index, block) in &mut self.blocks {
            if block.used <= median && block.changed {
                write(file, &self.table, *index, block)?;
            }
        }
        self.blocks.retain(|_, b| b.used > median);
        Ok(())
    }
}

fn write(file: &dyn Storage, table: &[u64], index: u64, block: &mut Block) -> Result<()> {
    let host = table.get(clamp_len(index, usize::MAX)).copied();
    file.write_at(&block.bytes, host.unwrap_or(0))?;
    block.changed = false;
    Ok(())
}

fn unused(cluster: u64) -> Error {
    Error::corrupt(format!(
        "cluster {cluster} is in use, but its refcount is 0 (check -r all mends it)"
    ))
}

/// Bytes of a block whose first counter is that of cluster `first`, from what `count` says.
pub(super) fn convert(
    width: Width,
    cluster_bits: u32,
    first: u64,
    mut count: impl FnMut(u64) -> Result<u64>,
) -> Result<Vec<u8>> {
    let mut bytes = vec![0; clamp_len(1 << cluster_bits, usize::MAX)];
    for index in 0..1usize << width.block_bits(cluster_bits) {
        let cluster = first + len64(index);
        let found = count(cluster)?;
        if found > width.max() {
            return Err(Error::unsupported(format!(
                "cluster {cluster} is referred to {found} times, and refcounts of {} bits hold no more than {}",
                width.bits(),
                width.max()
            )));
        }
        width.set(&mut bytes, index, found);
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryStorage;

    #[test]
    fn counts_survive_being_let_go_and_read_again() {
        let file = MemoryStorage::new();
        let width = Width::new(4);
        // Blocks of 2 MiB, of which 8 are kept.
        let mut counts = Counts::new(21, width, 20);
        for index in 0..20 {
            let bytes = vec![1; 2 << 20];
            counts
                .place(&file, index, (1 + index) << 21, bytes)
                .expect("memory has room");
        }
        for index in 0..20u64 {
            let cluster = (index << 20) + index;
            counts
                .step(&file, cluster..cluster + 2, Step::Up)
                .expect("in range");
        }
        for index in 0..20u64 {
            let cluster = (index << 20) + index;
            assert_eq!(counts.get(&file, cluster).expect("reads"), 0x102);
            assert_eq!(counts.get(&file, cluster + 2).expect("reads"), 0x101);
        }
        counts.flush(&file, 0).expect("memory has room");
        let mut entry = [0; 8];
        file.read_at(&mut entry, 8).expect("reads");
        assert_eq!(u64::from_be_bytes(entry), 2 << 21);
    }

    #[test]
    fn a_count_that_needs_more_bits_is_refused() {
        let file = MemoryStorage::new();
        let mut counts = Counts::new(9, Width::new(0), 1);
        counts
            .place(&file, 0, 512, vec![0x01; 512])
            .expect("memory has room");
        let error = counts.step(&file, 0..1, Step::Up).expect_err("one bit");
        assert!(error.message().contains("1 bits"), "{error}");
        let error = counts.step(&file, 1..2, Step::Up).expect_err("unused");
        assert_eq!(error.kind(), crate::ErrorKind::Corrupt);
        assert!(convert(Width::new(0), 9, 0, |_| Ok(2)).is_err());
    }
}

//! Refcounts: which clusters of the file are in use, and how often; finding free ones.
//!
//! Counts are written through as they change.  Raising a count before anything points at the
//! cluster, and lowering it after nothing does any more, means that a crash leaves at worst a
//! leak; the callers see to that order.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::AtomicU64;

use super::header::Header;
use super::refblock::Width;
use crate::error::{Error, ErrorKind, Result};
use crate::image::Wait;
use crate::image::open::WriteOrder;
use crate::image::words::{Endian, Words};
use crate::storage::Storage;
use crate::util::align::{clamp_len, is_aligned, len64};
use crate::util::range;

/// Bytes of refcount blocks kept in memory.
const CACHE_BYTES: u64 = 4 << 20;
/// Bytes of counters between two runs that are written with them rather than by a write each.
const JOINED: u64 = 4096;
/// Where the header has the table's offset (8 bytes) and its length in clusters (4 bytes).
pub(super) const HEADER_FIELD: u64 = 48;
/// Bytes of refcount blocks made at once at most, but for one.
const BLOCK_BYTES: u64 = 256 << 10;
/// Entries of the table in a sector.
const SECTOR_ENTRIES: u64 = 64;
/// Host offsets have 56 bits.
const MAX_HOST: u64 = 1 << 56;

/// Up or down by one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// One more thing points at it.
    Up,
    /// One fewer.
    Down,
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
}

#[derive(Debug)]
struct Block {
    host: u64,
    bytes: Vec<u8>,
    used: u64,
}

/// The refcounts of one image.  Behind one mutex: all changes are made by one thread at a time.
#[derive(Debug)]
pub(super) struct Refcounts {
    place: Place,
    table: Words<AtomicU64>,
    blocks: HashMap<u64, Block>,
    clock: u64,
    /// No cluster before this one is free.
    next: u64,
    /// No cluster from this one on has ever held anything.
    fresh: u64,
    /// Clusters of the file as it was opened; 0 once it is known that none of them is in use that
    /// is counted as free.
    opened: u64,
    /// Where compressed clusters go on, within a cluster that is in use for nothing else.
    pub(super) tail: Option<u64>,
    order: WriteOrder,
    /// Offsets of blocks made since they were last asked for.
    made: Vec<u64>,
    /// The clusters of a table that was replaced since then: whoever guards metadata does not know
    /// yet that they are free.
    retired: Range<u64>,
}

/// Says whether a free cluster may be taken.
pub(super) type Allowed<'a> = dyn Fn(u64) -> Result<()> + 'a;

impl Refcounts {
    /// The refcounts at `place` of a file that is `len` bytes long.
    pub(super) fn new(place: Place, len: u64, order: WriteOrder) -> Self {
        Self {
            place,
            table: Words::new(4096, 64, Endian::Big),
            blocks: HashMap::new(),
            clock: 0,
            next: 0,
            fresh: len.div_ceil(1 << place.cluster_bits),
            opened: len.div_ceil(1 << place.cluster_bits),
            tail: None,
            order,
            made: Vec::new(),
            retired: 0..0,
        }
    }

    /// Offsets of the blocks that were made since the last call.
    pub(super) fn made(&mut self) -> Vec<u64> {
        self.retired = 0..0;
        std::mem::take(&mut self.made)
    }

    /// Where they are now.
    pub(super) fn place(&self) -> Place {
        self.place
    }

    fn cluster_size(&self) -> u64 {
        1 << self.place.cluster_bits
    }

    fn block_bits(&self) -> u32 {
        self.place.width.block_bits(self.place.cluster_bits)
    }

    fn table_len(&self) -> u64 {
        (self.place.table_clusters << self.place.cluster_bits) / 8
    }

    /// How many things point at a cluster.
    pub(super) fn count(&mut self, file: &dyn Storage, cluster: u64) -> Result<u64> {
        let (width, bits) = (self.place.width, self.block_bits());
        let index = clamp_len(cluster & ((1 << bits) - 1), usize::MAX);
        let block = self.block(file, cluster >> bits)?;
        Ok(block.map_or(0, |block| width.get(&block.bytes, index)))
    }

    /// Whether the next free cluster is one of the file as it was opened, and it is not known yet
    /// that all of them are free.
    pub(super) fn is_to_reuse(&mut self, file: &dyn Storage) -> Result<bool> {
        Ok(self.opened > 0 && self.find_free(file, &(1..2))?.start < self.opened)
    }

    /// What is free is free.
    pub(super) fn all_is_counted(&mut self) {
        self.opened = 0;
    }

    /// The runs of clusters below `end` that have refcount 0, in order; `None` where there are more
    /// than `most`.
    pub(super) fn free_runs(
        &mut self,
        file: &dyn Storage,
        end: u64,
        most: usize,
    ) -> Result<Option<Vec<Range<u64>>>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        let mut at = 0;
        while at < end {
            let next = (at + 1).next_multiple_of(1 << self.block_bits());
            let stop = match self.has_block(file, at)? {
                true if self.count(file, at)? > 0 => {
                    at += 1;
                    continue;
                }
                true => at + 1,
                false => next.min(end),
            };
            range::push_merged(&mut runs, at..stop);
            if runs.len() > most {
                return Ok(None);
            }
            at = stop;
        }
        Ok(Some(runs))
    }

    /// The largest count.
    pub(super) fn most(&self) -> u64 {
        self.place.width.max()
    }

    /// Whether a count of the cluster is stored.
    pub(super) fn has_block(&self, file: &dyn Storage, cluster: u64) -> Result<bool> {
        let host = self.block_host(file, cluster >> self.block_bits())?;
        Ok(host.is_some())
    }

    /// The block with index `index`; `None` where there is none, so that its counts are 0.
    fn block(&mut self, file: &dyn Storage, index: u64) -> Result<Option<&mut Block>> {
        self.clock += 1;
        if !self.blocks.contains_key(&index) {
            let Some(host) = self.block_host(file, index)? else {
                return Ok(None);
            };
            let mut bytes = vec![0; clamp_len(self.cluster_size(), usize::MAX)];
            file.read_at(&mut bytes, host)?;
            self.keep(index, host, bytes);
        }
        let mut block = self.blocks.get_mut(&index);
        if let Some(block) = &mut block {
            block.used = self.clock;
        }
        Ok(block)
    }

    fn block_host(&self, file: &dyn Storage, index: u64) -> Result<Option<u64>> {
        if index >= self.table_len() {
            return Ok(None);
        }
        let host = self
            .table
            .get(file, self.place.table + index * 8, Wait::Yes)?;
        if host == 0 {
            return Ok(None);
        }
        if !is_aligned(host, self.cluster_size()) || host >= file.size() {
            return Err(Error::corrupt(format!(
                "refcount table entry {index} is {host:#x} (allowed: multiples of {:#x} below {:#x})",
                self.cluster_size(),
                file.size()
            )));
        }
        Ok(Some(host))
    }

    fn keep(&mut self, index: u64, host: u64, bytes: Vec<u8>) {
        let most = clamp_len(CACHE_BYTES >> self.place.cluster_bits, usize::MAX).max(2);
        if self.blocks.len() >= most {
            let oldest = self
                .blocks
                .iter()
                .min_by_key(|(_, b)| b.used)
                .map(|(i, _)| *i);
            oldest.and_then(|i| self.blocks.remove(&i));
        }
        self.blocks.insert(
            index,
            Block {
                host,
                bytes,
                used: self.clock,
            },
        );
    }

    /// Takes free clusters in one piece, at least `count.start` and at most `count.end - 1`, counts
    /// them once each, and says which they are.
    ///
    /// # Errors
    /// `NoSpace` past what offsets can express; the host's; then nothing is taken, though the
    /// refcount structure may have grown.  That of `allowed`; then the cluster that it is about
    /// stays counted: that it was not was the damage.
    pub(super) fn take(
        &mut self,
        file: &dyn Storage,
        count: Range<u64>,
        allowed: &Allowed<'_>,
    ) -> Result<Taken> {
        debug_assert!(count.start >= 1 && count.start < count.end);
        loop {
            let clusters = self.find_free(file, &count)?;
            self.check_allowed(file, clusters.clone(), allowed)?;
            if self.cover(file, &clusters)? {
                continue;
            }
            self.step(file, clusters.clone(), Step::Up)?;
            let fresh = clusters.start >= self.fresh;
            self.took(&clusters);
            let bits = self.place.cluster_bits;
            return Ok(Taken {
                host: clusters.start << bits,
                clusters,
                fresh,
            });
        }
    }

    /// Refuses clusters that are free and not allowed; the one that it is about is counted: that it
    /// was not was the damage.
    pub(super) fn check_allowed(
        &mut self,
        file: &dyn Storage,
        mut clusters: Range<u64>,
        allowed: &Allowed<'_>,
    ) -> Result<()> {
        let retired = self.retired.clone();
        let refused =
            clusters.find_map(|c| Some((c, allowed(c).err()?)).filter(|_| !retired.contains(&c)));
        let Some((cluster, error)) = refused else {
            return Ok(());
        };
        let block = cluster >> self.block_bits();
        if self.block_host(file, block)?.is_some() {
            self.step(file, cluster..cluster + 1, Step::Up)?;
        }
        Err(error)
    }

    /// Notes that clusters are no longer free.
    pub(super) fn took(&mut self, clusters: &Range<u64>) {
        if clusters.start == self.next {
            self.next = clusters.end;
        }
        self.fresh = self.fresh.max(clusters.end);
    }

    /// The first free clusters in one piece, as many as `take` is asked for.
    pub(super) fn find_free(
        &mut self,
        file: &dyn Storage,
        count: &Range<u64>,
    ) -> Result<Range<u64>> {
        let mut run = self.next..self.next;
        let mut first_free = None;
        while run.end - run.start + 1 < count.end {
            if run.end >= MAX_HOST >> self.place.cluster_bits {
                let text = format!("the image file has no room left below {MAX_HOST:#x}");
                return Err(Error::new(ErrorKind::NoSpace, text));
            }
            if self.count(file, run.end)? == 0 {
                first_free = first_free.or(Some(run.end));
                run.end += 1;
            } else if run.end - run.start >= count.start {
                break;
            } else {
                run = run.end + 1..run.end + 1;
            }
        }
        self.next = first_free.unwrap_or(self.next);
        Ok(run)
    }

    /// Sees to it that all of `clusters`, which are free, have a block; true where it had to make
    /// one, which takes free clusters itself.
    pub(super) fn cover(&mut self, file: &dyn Storage, clusters: &Range<u64>) -> Result<bool> {
        let bits = self.block_bits();
        for index in clusters.start >> bits..=(clusters.end - 1) >> bits {
            if index >= self.table_len() {
                self.grow_table(file, index)?;
                return Ok(true);
            }
            if self.block_host(file, index)?.is_none() {
                let part = clusters.start.max(index << bits)..clusters.end.min((index + 1) << bits);
                self.make_blocks(file, index, part)?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Makes block `index` in the first of `clusters`, which are free and which it counts itself;
    /// where that costs a sync, with as many that come next as there are before, so that they cost
    /// none.
    fn make_blocks(&mut self, file: &dyn Storage, index: u64, clusters: Range<u64>) -> Result<()> {
        let count = match self.order {
            WriteOrder::Ordered => self.following(file, index, clusters.end - clusters.start)?,
            WriteOrder::Unordered => 1,
        };
        let (first, size) = (clusters.start, self.cluster_size());
        let host = first << self.place.cluster_bits;
        let mut bytes = vec![0; clamp_len(count * size, usize::MAX)];
        let own = first - (index << self.block_bits());
        for cluster in own..own + count {
            let cluster = clamp_len(cluster, usize::MAX);
            self.place.width.set(&mut bytes, cluster, 1);
        }
        file.write_at(&bytes, host)?;
        self.settle(file)?;
        let hosts: Vec<u64> = (0..count).map(|block| host + block * size).collect();
        self.table
            .publish(file, self.place.table + index * 8, &hosts)?;
        self.fresh = self.fresh.max(first + count);
        self.made.extend(hosts);
        bytes.truncate(clamp_len(size, usize::MAX));
        self.keep(index, host, bytes);
        Ok(())
    }

    /// How many blocks from `index` on, which there is none of, are made at once in `room` clusters
    /// that the first of them counts.  Their entries in the table reach stable media in one piece.
    fn following(&self, file: &dyn Storage, index: u64, room: u64) -> Result<u64> {
        let sector = (index / SECTOR_ENTRIES + 1) * SECTOR_ENTRIES;
        let most = (BLOCK_BYTES >> self.place.cluster_bits)
            .min(index)
            .min(room);
        let end = (index + most).min(sector).min(self.table_len());
        let mut next = index + 1;
        while next < end && self.block_host(file, next)?.is_none() {
            next += 1;
        }
        Ok(next - index)
    }

    /// A longer table that has an entry `index`, in clusters that no block counts yet, with the
    /// blocks that count it right behind it.
    fn grow_table(&mut self, file: &dyn Storage, index: u64) -> Result<()> {
        let (bits, size) = (self.block_bits(), self.cluster_size());
        let old = self.place;
        let len = (index + 1).max(self.table_len() + self.table_len() / 2 + 1);
        let table_clusters = (len * 8).div_ceil(size);
        let first = self.table_len().max(self.fresh.div_ceil(1 << bits));
        let mut blocks = 1;
        while (table_clusters + blocks).div_ceil(1 << bits) > blocks {
            blocks += 1;
        }
        let table_clusters = table_clusters.max(((first + blocks) * 8).div_ceil(size));
        let start = first << bits;
        let mut table = vec![0; clamp_len(table_clusters << self.place.cluster_bits, usize::MAX)];
        let old_bytes = clamp_len(self.table_len() * 8, usize::MAX);
        file.read_at(&mut table[..old_bytes], old.table)?;
        let mut used = table_clusters + blocks;
        for block in 0..blocks {
            let mut bytes = vec![0; clamp_len(size, usize::MAX)];
            let here = used.min(1 << bits);
            (0..clamp_len(here, usize::MAX)).for_each(|i| self.place.width.set(&mut bytes, i, 1));
            used -= here;
            let host = (start + table_clusters + block) << self.place.cluster_bits;
            file.write_at(&bytes, host)?;
            let entry = clamp_len((first + block) * 8, usize::MAX);
            table[entry..entry + 8].copy_from_slice(&host.to_be_bytes());
        }
        let host = start << self.place.cluster_bits;
        file.write_at(&table, host)?;
        self.settle(file)?;
        self.point_header(file, host, table_clusters)?;
        let bits = self.place.cluster_bits;
        let made = (0..blocks).map(|block| (start + table_clusters + block) << bits);
        self.made.extend(made);
        self.fresh = self.fresh.max(start + table_clusters + blocks);
        self.settle(file)?;
        let freed = old.table >> self.place.cluster_bits;
        self.retired = freed..freed + old.table_clusters;
        self.step(file, self.retired.clone(), Step::Down)
    }

    fn point_header(&mut self, file: &dyn Storage, table: u64, clusters: u64) -> Result<()> {
        let count = u32::try_from(clusters).map_err(|_| {
            Error::new(
                ErrorKind::NoSpace,
                "the refcount table has no room left to grow",
            )
        })?;
        let mut field = table.to_be_bytes().to_vec();
        field.extend(count.to_be_bytes());
        file.write_at(&field, HEADER_FIELD)?;
        self.place = Place {
            table,
            table_clusters: clusters,
            ..self.place
        };
        self.table.forget(0..u64::MAX);
        Ok(())
    }

    /// What was written so far comes before what is written next, in a power cut too.
    fn settle(&self, file: &dyn Storage) -> Result<()> {
        if self.order == WriteOrder::Ordered {
            file.sync()
        } else {
            Ok(())
        }
    }

    /// Counts each of `clusters` up or down by one.
    ///
    /// # Errors
    /// `Corrupt` where a count would leave its range or has no block; the host's.  Clusters
    /// before the one at fault are changed.
    pub(super) fn step(
        &mut self,
        file: &dyn Storage,
        clusters: Range<u64>,
        step: Step,
    ) -> Result<()> {
        let bits = self.block_bits();
        let mut at = clusters.start;
        while at < clusters.end {
            let index = at >> bits;
            let end = clusters.end.min((index + 1) << bits);
            self.step_in_block(file, index, std::slice::from_ref(&(at..end)), step)?;
            at = end;
        }
        Ok(())
    }

    /// As [`Refcounts::step`], of many runs in ascending order, by few writes.
    ///
    /// # Errors
    /// As [`Refcounts::step`]; what would have been changed by one write with the cluster at fault
    /// is not.
    pub(super) fn step_each(
        &mut self,
        file: &dyn Storage,
        runs: &[Range<u64>],
        step: Step,
    ) -> Result<()> {
        let bits = self.block_bits();
        let gap = (JOINED * 8) / u64::from(self.place.width.bits());
        let mut near: Vec<Range<u64>> = Vec::new();
        let in_blocks = runs.iter().flat_map(|run| {
            let blocks = run.start >> bits..(run.end.saturating_sub(1) >> bits) + 1;
            blocks.map(move |i| run.start.max(i << bits)..run.end.min((i + 1) << bits))
        });
        for run in in_blocks.filter(|run| !run.is_empty()) {
            if let Some(last) = near.last()
                && (last.start >> bits != run.start >> bits || run.start > last.end + gap)
            {
                self.step_in_block(file, last.start >> bits, &near, step)?;
                near.clear();
            }
            near.push(run);
        }
        match near.last() {
            Some(last) => self.step_in_block(file, last.start >> bits, &near, step),
            None => Ok(()),
        }
    }

    /// Counts runs in ascending order, all of one block, by one write.
    fn step_in_block(
        &mut self,
        file: &dyn Storage,
        index: u64,
        runs: &[Range<u64>],
        step: Step,
    ) -> Result<()> {
        let (width, bits) = (self.place.width, self.block_bits());
        let low = |cluster: u64| clamp_len(cluster - (index << bits), usize::MAX);
        let start = runs.first().map_or(0, |run| low(run.start));
        let span = start..runs.iter().map(|run| low(run.end)).max().unwrap_or(start);
        let wrong = |cluster: usize, count: u64| {
            let cluster = (index << bits) + len64(cluster);
            Error::corrupt(format!(
                "the refcount of cluster {cluster} is {count} and cannot go {step:?}"
            ))
        };
        let tail = self.tail.map(|tail| tail >> self.place.cluster_bits);
        let has_tail = |run: &Range<u64>| tail.is_some_and(|tail| run.contains(&tail));
        if step == Step::Down && runs.iter().any(has_tail) {
            self.tail = None;
        }
        let Some(block) = self.block(file, index)? else {
            return Err(wrong(span.start, 0));
        };
        let mut freed = None;
        let bytes = width.bytes(span.start, span.end);
        let before = block.bytes[bytes.clone()].to_vec();
        for cluster in runs.iter().flat_map(|run| low(run.start)..low(run.end)) {
            let count = width.get(&block.bytes, cluster);
            let changed = match step {
                Step::Up => count.checked_add(1).filter(|c| *c <= width.max()),
                Step::Down => count.checked_sub(1),
            };
            let Some(changed) = changed else {
                block.bytes[bytes].copy_from_slice(&before);
                return Err(wrong(cluster, count));
            };
            width.set(&mut block.bytes, cluster, changed);
            if changed == 0 {
                let cluster = (index << bits) + len64(cluster);
                freed = freed.map_or(Some(cluster), |first: u64| Some(first.min(cluster)));
            }
        }
        let host = block.host + len64(bytes.start);
        if let Err(e) = file.write_at(&block.bytes[bytes.clone()], host) {
            block.bytes[bytes].copy_from_slice(&before);
            return Err(e);
        }
        self.next = self.next.min(freed.unwrap_or(u64::MAX));
        Ok(())
    }
}

impl Refcounts {
    /// Raises the counts from that of cluster `first` on by `rises`, block by block.
    ///
    /// # Errors
    /// As [`Refcounts::step`].
    pub(super) fn rise(&mut self, file: &dyn Storage, first: u64, rises: &[u64]) -> Result<()> {
        let bits = self.block_bits();
        let end = first + len64(rises.len());
        let mut at = first;
        while at < end {
            let index = at >> bits;
            let stop = end.min((index + 1) << bits);
            let part =
                &rises[clamp_len(at - first, usize::MAX)..clamp_len(stop - first, usize::MAX)];
            self.rise_in_block(file, index, at, part)?;
            at = stop;
        }
        Ok(())
    }

    fn rise_in_block(
        &mut self,
        file: &dyn Storage,
        index: u64,
        first: u64,
        rises: &[u64],
    ) -> Result<()> {
        let (width, bits) = (self.place.width, self.block_bits());
        let low = clamp_len(first - (index << bits), usize::MAX);
        let bytes = width.bytes(low, low + rises.len());
        let wrong = |cluster: usize| {
            let cluster = (index << bits) + len64(cluster);
            Error::corrupt(format!("the refcount of cluster {cluster} cannot go up"))
        };
        let Some(block) = self.block(file, index)? else {
            return Err(wrong(low));
        };
        let before = block.bytes[bytes.clone()].to_vec();
        let mut done = Ok(());
        for (cluster, rise) in (low..).zip(rises) {
            let count = width.get(&block.bytes, cluster).checked_add(*rise);
            match count.filter(|c| *c <= width.max()) {
                Some(count) => width.set(&mut block.bytes, cluster, count),
                None => done = Err(wrong(cluster)),
            }
        }
        let host = block.host + len64(bytes.start);
        let done = done.and_then(|()| file.write_at(&block.bytes[bytes.clone()], host));
        if done.is_err() {
            block.bytes[bytes].copy_from_slice(&before);
        }
        done
    }
}

/// Clusters that were taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Taken {
    /// Offset of the first.
    pub(super) host: u64,
    /// Which they are.
    pub(super) clusters: Range<u64>,
    /// They never held anything: they read as zeroes.
    pub(super) fresh: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryStorage;

    /// A file with a header cluster, a table and one block that counts the three.
    fn file(cluster_bits: u32, order: u32) -> (MemoryStorage, Refcounts) {
        let size = 1usize << cluster_bits;
        let width = Width::new(order);
        let mut bytes = vec![0; 3 * size];
        bytes[size..size + 8].copy_from_slice(&(2 * size as u64).to_be_bytes());
        (0..3).for_each(|i| width.set(&mut bytes[2 * size..], i, 1));
        let place = Place {
            cluster_bits,
            width,
            table: size as u64,
            table_clusters: 1,
        };
        let len = bytes.len() as u64;
        (
            MemoryStorage::from_bytes(&bytes),
            Refcounts::new(place, len, WriteOrder::Unordered),
        )
    }

    #[test]
    fn clusters_are_taken_in_order_and_taken_again_after_they_are_freed() {
        let (file, mut refcounts) = file(16, 4);
        assert_eq!(
            refcounts
                .take(&file, 2..3, &|_| Ok(()))
                .expect("room")
                .clusters,
            3..5
        );
        assert_eq!(
            refcounts
                .take(&file, 1..2, &|_| Ok(()))
                .expect("room")
                .clusters,
            5..6
        );
        refcounts.step(&file, 4..5, Step::Down).expect("was taken");
        let again = refcounts.take(&file, 1..2, &|_| Ok(())).expect("room");
        assert_eq!((again.clusters, again.fresh), (4..5, false));
        assert_eq!(
            refcounts
                .take(&file, 2..3, &|_| Ok(()))
                .expect("room")
                .clusters,
            6..8
        );
    }

    #[test]
    fn small_clusters_grow_blocks_and_table_and_count_everything_once() {
        for order in 0..=6 {
            let (file, mut refcounts) = file(9, order);
            let mut taken = Vec::<Taken>::new();
            // Past what one table of 64 entries counts, so that the table grows.
            let blocks_bits = refcounts.block_bits();
            let wanted = (70u64 << blocks_bits).min(40_000);
            for _ in 0..wanted / 37 {
                taken.push(refcounts.take(&file, 1..38, &|_| Ok(())).expect("room"));
            }
            let mut seen = std::collections::HashSet::new();
            for cluster in taken.iter().flat_map(|t| t.clusters.clone()) {
                assert!(seen.insert(cluster), "cluster {cluster} was taken twice");
                assert_eq!(refcounts.count(&file, cluster).expect("reads"), 1);
            }
            let place = refcounts.place();
            let reopened = &mut Refcounts::new(place, file.size(), WriteOrder::Unordered);
            for cluster in seen {
                assert_eq!(reopened.count(&file, cluster).expect("reads"), 1);
            }
            let table = place.table >> 9;
            assert_eq!(
                reopened.count(&file, table).expect("reads"),
                1,
                "order {order}"
            );
        }
    }

    #[test]
    fn a_table_that_was_replaced_is_free_at_once_whoever_still_guards_it() {
        let (file, mut refcounts) = file(9, 6);
        let guarded = |cluster: u64| match cluster {
            1 => Err(Error::corrupt("the table is there")),
            _ => Ok(()),
        };
        let mut taken = Vec::new();
        while !taken.contains(&1) {
            assert!(taken.len() < 10_000, "the table never grew");
            let one = refcounts.take(&file, 1..2, &guarded).expect("room");
            taken.push(one.clusters.start);
        }
        assert!(refcounts.place().table > 512);
    }

    #[test]
    fn runs_are_counted_down_by_one_write_for_neighbours_and_for_each_block() {
        let (file, mut refcounts) = file(9, 4);
        let mut take = || refcounts.take(&file, 1..2, &|_| Ok(()));
        let taken: Vec<u64> = (0..700)
            .map(|_| take().expect("there is room").clusters.start)
            .collect();
        let gone = [&taken[..1], &taken[5..9], &taken[300..600]].concat();
        let mut runs = Vec::new();
        for cluster in &gone {
            crate::util::range::push_merged(&mut runs, *cluster..cluster + 1);
        }
        file.record();
        // What would go below zero changes nothing.
        let twice = [runs[0].clone(), runs[0].clone()];
        assert!(refcounts.step_each(&file, &twice, Step::Down).is_err());
        assert!(file.changes().is_empty());
        let done = refcounts.step_each(&file, &runs, Step::Down);
        done.expect("all were counted");
        // 700 counters and those of their blocks are in four blocks at most.
        assert!(file.changes().len() <= 4, "{:?}", file.changes());
        for cluster in &taken {
            let count = refcounts.count(&file, *cluster).expect("memory reads");
            assert_eq!(count, u64::from(!gone.contains(cluster)), "{cluster}");
        }
        let again = refcounts.take(&file, 1..2, &|_| Ok(())).expect("is free");
        assert_eq!(again.clusters.start, taken[0]);
    }

    #[test]
    fn a_count_never_leaves_its_range() {
        let (file, mut refcounts) = file(16, 0);
        assert!(refcounts.step(&file, 2..3, Step::Up).is_err());
        assert!(refcounts.step(&file, 5..6, Step::Down).is_err());
        assert_eq!(refcounts.count(&file, 2).expect("reads"), 1);
        assert_eq!(refcounts.count(&file, 5).expect("reads"), 0);
    }
}

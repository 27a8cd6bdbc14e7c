//! Refcounts: which clusters of the file are in use, and how often; finding free ones.
//!
//! Counts are written through as they change.  Raising a count before anything points at the
//! cluster, and lowering it after nothing does any more, means that a crash leaves at worst a
//! leak; the callers see to that order.  Those of a structure that nothing points at yet wait for
//! [`Refcounts::flush`].

use std::ops::Range;
use std::sync::Arc;

use super::guard::Guard;
use super::refblock::{Block, Blocks, Place, Structure, Width};
use crate::error::{Error, ErrorKind, Result};
use crate::image::open::WriteOrder;
use crate::image::units::Taken;
use crate::storage::Storage;
use crate::util::align::{clamp_len, len64};
use crate::util::progress::Silent;
use crate::util::range;

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

/// The refcounts of one image.  Behind one mutex: all changes are made by one thread at a time.
#[derive(Debug)]
pub(super) struct Refcounts {
    structure: Structure,
    blocks: Blocks,
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
    /// Is told where the structure is.
    guard: Arc<Guard>,
    /// Nothing points at the structure yet, and nothing is taken from it.
    is_draft: bool,
}

/// Says whether a free cluster may be taken.
pub(super) type Allowed<'a> = dyn Fn(u64) -> Result<()> + 'a;

impl Refcounts {
    /// The refcounts at `place` of `file`; `guard` guards their clusters.
    pub(super) fn new(
        file: Arc<dyn Storage>,
        place: Place,
        order: WriteOrder,
        guard: Arc<Guard>,
    ) -> Self {
        let clusters = file.size().div_ceil(place.cluster_size());
        Self {
            structure: Structure::new(file, place),
            blocks: Blocks::default(),
            next: 0,
            fresh: clusters,
            opened: clusters,
            tail: None,
            order,
            guard,
            is_draft: false,
        }
    }

    /// Those of a structure at `place` of `file` whose table is written and that nothing points at.
    pub(super) fn draft(file: Arc<dyn Storage>, place: Place) -> Self {
        Self {
            is_draft: true,
            ..Self::new(file, place, WriteOrder::Unordered, Arc::default())
        }
    }

    /// Makes `bytes` those of a draft's block `index`, which is at `host`.
    pub(super) fn set_block(&mut self, index: u64, host: u64, bytes: Vec<u8>) -> Result<()> {
        let block = Block::new(host, bytes, true);
        self.blocks.keep(&self.structure, index, block)
    }

    /// Writes what changed of a draft.
    pub(super) fn flush(&mut self) -> Result<()> {
        self.blocks.flush(&*self.structure.file)
    }

    /// Where they are now.
    pub(super) fn place(&self) -> Place {
        self.structure.place
    }

    /// The image file.
    pub(super) fn file(&self) -> &dyn Storage {
        &*self.structure.file
    }

    fn cluster_size(&self) -> u64 {
        self.place().cluster_size()
    }

    fn block_bits(&self) -> u32 {
        self.place().block_bits()
    }

    /// How many things point at a cluster.
    pub(super) fn count(&mut self, cluster: u64) -> Result<u64> {
        let (width, bits) = (self.place().width, self.block_bits());
        let index = clamp_len(cluster & ((1 << bits) - 1), usize::MAX);
        let block = self.blocks.get(&self.structure, cluster >> bits)?;
        Ok(block.map_or(0, |block| width.get(&block.bytes, index)))
    }

    /// Whether the next free cluster is one of the file as it was opened, and it is not known yet
    /// that all of them are free.
    pub(super) fn is_to_reuse(&mut self) -> Result<bool> {
        Ok(self.opened > 0 && self.find_free(&(1..2))?.start < self.opened)
    }

    /// What is free is free.
    pub(super) fn all_is_counted(&mut self) {
        self.opened = 0;
    }

    /// Gives `found` the runs of clusters below `end` that have refcount 0, in order.
    ///
    /// # Errors
    /// Those of `found`, which end it; the host's.
    pub(super) fn free_runs(
        &self,
        end: u64,
        found: &mut dyn FnMut(Range<u64>) -> Result<()>,
    ) -> Result<()> {
        self.structure.free_runs(end, &Silent, found)
    }

    /// Whether a count of the cluster is stored.
    pub(super) fn has_block(&self, cluster: u64) -> Result<bool> {
        let block = self.structure.block(cluster >> self.block_bits())?;
        Ok(block.is_some())
    }

    /// Takes free clusters in one piece, at least `count.start` and at most `count.end - 1`, counts
    /// them once each, and says where they are.
    ///
    /// # Errors
    /// `NoSpace` past what offsets can express; the host's; then nothing is taken, though the
    /// refcount structure may have grown.  That of `allowed`; then the cluster that it is about
    /// stays counted: that it was not was the damage.
    pub(super) fn take(&mut self, count: Range<u64>, allowed: &Allowed<'_>) -> Result<Taken> {
        debug_assert!(count.start >= 1 && count.start < count.end);
        loop {
            let clusters = self.find_free(&count)?;
            self.check_allowed(clusters.clone(), allowed)?;
            if self.cover(&clusters)? {
                continue;
            }
            self.step(clusters.clone(), Step::Up)?;
            let (zeroed, size) = (clusters.start >= self.fresh, self.cluster_size());
            self.took(&clusters);
            let taken = Taken::new(clusters.start * size, range::len(&clusters), size);
            return Ok(Taken { zeroed, ..taken });
        }
    }

    /// Refuses clusters that are free and not allowed; the one that it is about is counted: that it
    /// was not was the damage.
    pub(super) fn check_allowed(
        &mut self,
        mut clusters: Range<u64>,
        allowed: &Allowed<'_>,
    ) -> Result<()> {
        let refused = clusters.find_map(|c| Some((c, allowed(c).err()?)));
        let Some((cluster, error)) = refused else {
            return Ok(());
        };
        if self.has_block(cluster)? {
            self.step(cluster..cluster + 1, Step::Up)?;
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
    pub(super) fn find_free(&mut self, count: &Range<u64>) -> Result<Range<u64>> {
        let mut run = self.next..self.next;
        let mut first_free = None;
        while run.end - run.start + 1 < count.end {
            if run.end >= MAX_HOST / self.cluster_size() {
                let text = format!("the image file has no room left below {MAX_HOST:#x}");
                return Err(Error::new(ErrorKind::NoSpace, text));
            }
            if self.count(run.end)? == 0 {
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
    pub(super) fn cover(&mut self, clusters: &Range<u64>) -> Result<bool> {
        let bits = self.block_bits();
        for index in clusters.start >> bits..=(clusters.end - 1) >> bits {
            if index >= self.structure.table_len() {
                self.grow_table(index)?;
                return Ok(true);
            }
            if self.structure.block(index)?.is_none() {
                let part = clusters.start.max(index << bits)..clusters.end.min((index + 1) << bits);
                self.make_blocks(index, part)?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Makes block `index` in the first of `clusters`, which are free and which it counts itself;
    /// where that costs a sync, with as many that come next as there are before, so that they cost
    /// none.
    fn make_blocks(&mut self, index: u64, clusters: Range<u64>) -> Result<()> {
        let count = match self.order {
            WriteOrder::Ordered => self.following(index, range::len(&clusters))?,
            WriteOrder::Unordered => 1,
        };
        let (first, size) = (clusters.start, self.cluster_size());
        let own = first - (index << self.block_bits());
        let mut bytes = self.place().width.ones(count * size, own..own + count);
        self.file().write_at(&bytes, first * size)?;
        self.settle()?;
        let hosts: Vec<u64> = (first..first + count).map(|c| c * size).collect();
        self.structure.point_at(index, &hosts)?;
        self.fresh = self.fresh.max(first + count);
        hosts.into_iter().for_each(|host| self.guard.insert(host));
        bytes.truncate(clamp_len(size, usize::MAX));
        let block = Block::new(first * size, bytes, false);
        self.blocks.keep(&self.structure, index, block)
    }

    /// How many blocks from `index` on, which there is none of, are made at once in `room` clusters
    /// that the first of them counts.  Their entries in the table reach stable media in one piece.
    fn following(&self, index: u64, room: u64) -> Result<u64> {
        let sector = (index / SECTOR_ENTRIES + 1) * SECTOR_ENTRIES;
        let most = (BLOCK_BYTES / self.cluster_size()).min(index).min(room);
        let end = (index + most).min(sector).min(self.structure.table_len());
        let mut next = index + 1;
        while next < end && self.structure.block(next)?.is_none() {
            next += 1;
        }
        Ok(next - index)
    }

    /// A longer table that has an entry `index`, in clusters that no block counts yet, with the
    /// blocks that count it right behind it.
    fn grow_table(&mut self, index: u64) -> Result<()> {
        let (bits, size, old) = (self.block_bits(), self.cluster_size(), self.place());
        let old_len = self.structure.table_len();
        let most = old.most_table_bytes();
        let len = (index + 1).max((old_len + old_len / 2 + 1).min(most / 8));
        let first = old_len.max(self.fresh.div_ceil(1 << bits));
        let mut blocks = 1;
        // Blocks for the table and themselves, and a table with entries for those.
        let table_clusters = loop {
            let clusters = (len.max(first + blocks) * 8).div_ceil(size);
            if clusters * size > most || clusters + blocks <= blocks << bits {
                break clusters;
            }
            blocks += 1;
        };
        if table_clusters * size > most {
            let text = format!("the refcount table would have more than {most} bytes");
            return Err(Error::new(ErrorKind::NoSpace, text));
        }
        let start = first << bits;
        let mut table = vec![0; clamp_len(table_clusters * size, usize::MAX)];
        let old_bytes = clamp_len(old_len * 8, usize::MAX);
        self.file().read_at(&mut table[..old_bytes], old.table)?;
        let mut used = table_clusters + blocks;
        let hosts = start + table_clusters..start + table_clusters + blocks;
        for (block, cluster) in (first..).zip(hosts.clone()) {
            let here = used.min(1 << bits);
            used -= here;
            let bytes = old.width.ones(size, 0..here);
            self.file().write_at(&bytes, cluster * size)?;
            let entry = clamp_len(block * 8, usize::MAX);
            table[entry..entry + 8].copy_from_slice(&(cluster * size).to_be_bytes());
        }
        self.file().write_at(&table, start * size)?;
        self.settle()?;
        self.point_header(start * size, table_clusters)?;
        self.fresh = self.fresh.max(hosts.end);
        hosts.for_each(|cluster| self.guard.insert(cluster * size));
        self.settle()?;
        let freed = old.table / size;
        self.step(freed..freed + old.table_clusters, Step::Down)
    }

    fn point_header(&mut self, table: u64, table_clusters: u64) -> Result<()> {
        let clusters = u32::try_from(table_clusters).unwrap_or(u32::MAX);
        let mut field = table.to_be_bytes().to_vec();
        field.extend(clusters.to_be_bytes());
        self.file().write_at(&field, HEADER_FIELD)?;
        self.structure.move_to(Place {
            table,
            table_clusters,
            ..self.place()
        });
        self.guard.set_refcount_table(self.place());
        Ok(())
    }

    /// What was written so far comes before what is written next, in a power cut too.
    fn settle(&self) -> Result<()> {
        match self.order {
            WriteOrder::Ordered => self.file().sync(),
            WriteOrder::Unordered => Ok(()),
        }
    }

    /// Counts each of `clusters` up or down by one.
    ///
    /// # Errors
    /// `Corrupt` where a count is 0 or has no block that should not, `Unsupported` where one needs
    /// more bits than it has; the host's.  Clusters before the one at fault are changed.
    pub(super) fn step(&mut self, clusters: Range<u64>, step: Step) -> Result<()> {
        let in_blocks = split(clusters, 1, self.block_bits());
        in_blocks
            .into_iter()
            .try_for_each(|run| self.change(&[run], step))
    }

    /// As [`Refcounts::step`], of runs in ascending order, each as often as it says, by few writes.
    ///
    /// # Errors
    /// As [`Refcounts::step`]; what would have been changed by one write with the cluster at fault
    /// is not.
    pub(super) fn step_each(
        &mut self,
        runs: impl IntoIterator<Item = (Range<u64>, u64)>,
        step: Step,
    ) -> Result<()> {
        let bits = self.block_bits();
        let gap = (JOINED * 8) / u64::from(self.place().width.bits());
        let mut near: Vec<(Range<u64>, u64)> = Vec::new();
        for (run, by) in runs.into_iter().flat_map(|(run, by)| split(run, by, bits)) {
            if let Some((last, _)) = near.last()
                && (last.start >> bits != run.start >> bits || run.start > last.end + gap)
            {
                self.change(&near, step)?;
                near.clear();
            }
            near.push((run, by));
        }
        self.change(&near, step)
    }

    /// Counts runs in ascending order, all of one block, by one write.
    fn change(&mut self, runs: &[(Range<u64>, u64)], step: Step) -> Result<()> {
        let Some((first, _)) = runs.first() else {
            return Ok(());
        };
        let (width, bits, first) = (self.place().width, self.block_bits(), first.start);
        let index = first >> bits;
        let low = |cluster: u64| clamp_len(cluster - (index << bits), usize::MAX);
        let end = runs.iter().map(|(run, _)| low(run.end)).max();
        let tail = self.tail.map(|tail| tail / self.cluster_size());
        if step == Step::Down && tail.is_some_and(|t| runs.iter().any(|(run, _)| run.contains(&t)))
        {
            self.tail = None;
        }
        let Some(block) = self.blocks.get(&self.structure, index)? else {
            return Err(wrong(width, first, 0, step));
        };
        let bytes = width.bytes(low(first), end.unwrap_or(0));
        let before = block.bytes[bytes.clone()].to_vec();
        let mut done = Ok(());
        let mut freed = u64::MAX;
        'runs: for (run, by) in runs {
            for cluster in run.clone() {
                let count = width.get(&block.bytes, low(cluster));
                let changed = match step {
                    Step::Up if self.is_draft && count == 0 => None,
                    Step::Up => count.checked_add(*by).filter(|c| *c <= width.max()),
                    Step::Down => count.checked_sub(*by),
                };
                let Some(changed) = changed else {
                    done = Err(wrong(width, cluster, count, step));
                    break 'runs;
                };
                width.set(&mut block.bytes, low(cluster), changed);
                if changed == 0 {
                    freed = freed.min(cluster);
                }
            }
        }
        let host = block.host + len64(bytes.start);
        block.changed |= self.is_draft;
        if done.is_ok() && !self.is_draft {
            done = self
                .structure
                .file
                .write_at(&block.bytes[bytes.clone()], host);
        }
        match done.is_ok() {
            true => self.next = self.next.min(freed),
            false => block.bytes[bytes].copy_from_slice(&before),
        }
        done
    }
}

/// The parts of a run of clusters that each block counts, with how often each is meant.
fn split(run: Range<u64>, by: u64, bits: u32) -> impl Iterator<Item = (Range<u64>, u64)> {
    let blocks = run.start >> bits..(run.end.saturating_sub(1) >> bits) + 1;
    let parts = blocks.map(move |i| run.start.max(i << bits)..run.end.min((i + 1) << bits));
    parts
        .filter(|part| !part.is_empty())
        .map(move |part| (part, by))
}

/// The error for a count that cannot change so.
fn wrong(width: Width, cluster: u64, count: u64, step: Step) -> Error {
    match (step, count) {
        (Step::Up, 1..) => Error::unsupported(format!(
            "cluster {cluster} is referred to {count} times, and refcounts of {} bits hold no more (amend -o refcount_bits=16 makes room)",
            width.bits()
        )),
        _ => Error::corrupt(format!(
            "cluster {cluster} is in use, but its refcount is {count} (check -r all mends it)"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryStorage;

    /// A file with a header cluster, a table and one block that counts the three.
    fn file(cluster_bits: u32, order: u32) -> (Arc<MemoryStorage>, Refcounts) {
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
        let file = Arc::new(MemoryStorage::from_bytes(&bytes));
        let refcounts = open(&file, place);
        (file, refcounts)
    }

    fn open(file: &Arc<MemoryStorage>, place: Place) -> Refcounts {
        let file: Arc<dyn Storage> = Arc::<MemoryStorage>::clone(file);
        Refcounts::new(file, place, WriteOrder::Unordered, Arc::default())
    }

    /// The clusters taken next, from one on to fewer than `end`.
    fn take(refcounts: &mut Refcounts, count: Range<u64>) -> Range<u64> {
        let taken = refcounts.take(count, &|_| Ok(())).expect("room");
        let bytes = taken.bytes(taken.stride);
        bytes.start / taken.stride..bytes.end / taken.stride
    }

    #[test]
    fn clusters_are_taken_in_order_and_taken_again_after_they_are_freed() {
        let (_, mut refcounts) = file(16, 4);
        assert_eq!(take(&mut refcounts, 2..3), 3..5);
        assert_eq!(take(&mut refcounts, 1..2), 5..6);
        refcounts.step(4..5, Step::Down).expect("was taken");
        let again = refcounts.take(1..2, &|_| Ok(())).expect("room");
        assert_eq!((again.host, again.zeroed), (4 << 16, false));
        assert_eq!(take(&mut refcounts, 2..3), 6..8);
    }

    #[test]
    fn small_clusters_grow_blocks_and_table_and_count_everything_once() {
        for order in 0..=6 {
            let (file, mut refcounts) = file(9, order);
            let mut taken = Vec::new();
            // Past what one table of 64 entries counts, so that the table grows.
            let blocks_bits = refcounts.block_bits();
            let wanted = (70u64 << blocks_bits).min(40_000);
            for _ in 0..wanted / 37 {
                taken.push(take(&mut refcounts, 1..38));
            }
            let mut seen = std::collections::HashSet::new();
            for cluster in taken.into_iter().flatten() {
                assert!(seen.insert(cluster), "cluster {cluster} was taken twice");
                assert_eq!(refcounts.count(cluster).expect("reads"), 1);
            }
            let place = refcounts.place();
            let reopened = &mut open(&file, place);
            for cluster in seen {
                assert_eq!(reopened.count(cluster).expect("reads"), 1);
            }
            let table = place.table >> 9;
            assert_eq!(reopened.count(table).expect("reads"), 1, "order {order}");
        }
    }

    #[test]
    fn a_table_that_was_replaced_is_guarded_no_longer_and_free_at_once() {
        let (_, mut refcounts) = file(9, 6);
        let guard = Arc::clone(&refcounts.guard);
        guard.set_refcount_table(refcounts.place());
        let guarded = |cluster: u64| match guard.refcount_table().contains(&(cluster << 9)) {
            true => Err(Error::corrupt("the table is there")),
            false => Ok(()),
        };
        let mut taken = Vec::new();
        while !taken.contains(&512) {
            assert!(taken.len() < 10_000, "the table never grew");
            taken.push(refcounts.take(1..2, &guarded).expect("room").host);
        }
        assert!(refcounts.place().table > 512);
    }

    #[test]
    fn a_table_longer_than_any_reader_takes_is_refused_before_it_is_made() {
        let (file, mut refcounts) = file(9, 6);
        // 64 counters a block, and 1 << 20 entries in the longest table.
        let far = 1 << 26;
        refcounts.fresh = far;
        file.record();
        let error = refcounts.cover(&(far..far + 1)).expect_err("no room");
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert!(file.changes().is_empty());
        refcounts.fresh = far >> 2;
        refcounts.cover(&(far / 4..far / 4 + 1)).expect("has room");
        assert!(
            refcounts.place().table_clusters << 9
                <= crate::formats::qcow2::header::MAX_REFTABLE_BYTES
        );
    }

    #[test]
    fn counts_of_a_draft_survive_being_let_go_and_read_again() {
        let file = Arc::new(MemoryStorage::new());
        let place = Place {
            cluster_bits: 21,
            width: Width::new(4),
            table: 0,
            table_clusters: 1,
        };
        // Blocks of 2 MiB, of which 8 are kept.
        let hosts: Vec<u64> = (1..21).map(|i| i << 21).collect();
        let table = crate::image::be64::bytes(hosts.clone());
        file.write_at(&table, 0).expect("memory has room");
        file.set_len(32 << 21).expect("memory has room");
        let mut counts = Refcounts::draft(Arc::<MemoryStorage>::clone(&file), place);
        for (index, host) in (0..).zip(&hosts) {
            let done = counts.set_block(index, *host, vec![1; 2 << 20]);
            done.expect("memory has room");
        }
        for cluster in (0..20u64).map(|index| (index << 20) + index) {
            counts
                .step(cluster..cluster + 2, Step::Up)
                .expect("in range");
        }
        counts.flush().expect("memory has room");
        let mut reopened = open(&file, place);
        for cluster in (0..20u64).map(|index| (index << 20) + index) {
            for counts in [&mut counts, &mut reopened] {
                assert_eq!(counts.count(cluster).expect("reads"), 0x102);
                assert_eq!(counts.count(cluster + 2).expect("reads"), 0x101);
            }
        }
    }

    #[test]
    fn a_count_of_a_draft_that_needs_more_bits_or_was_0_is_refused() {
        let (file, refcounts) = file(9, 0);
        let mut counts = Refcounts::draft(file, refcounts.place());
        let error = counts.step(0..1, Step::Up).expect_err("one bit");
        assert!(error.message().contains("1 bits"), "{error}");
        let error = counts.step(3..4, Step::Up).expect_err("unused");
        assert_eq!(error.kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn runs_are_counted_down_by_one_write_for_neighbours_and_for_each_block() {
        let (file, mut refcounts) = file(9, 4);
        let taken: Vec<u64> = (0..700).map(|_| take(&mut refcounts, 1..2).start).collect();
        let gone = [&taken[..1], &taken[5..9], &taken[300..600]].concat();
        let mut runs = Vec::new();
        for cluster in &gone {
            crate::util::range::push_merged(&mut runs, *cluster..cluster + 1);
        }
        file.record();
        // What would go below zero changes nothing.
        let once = |runs: &[Range<u64>]| runs.iter().map(|r| (r.clone(), 1)).collect::<Vec<_>>();
        let twice = once(&[runs[0].clone(), runs[0].clone()]);
        assert!(refcounts.step_each(twice, Step::Down).is_err());
        assert!(file.changes().is_empty());
        let done = refcounts.step_each(once(&runs), Step::Down);
        done.expect("all were counted");
        // 700 counters and those of their blocks are in four blocks at most.
        assert!(file.changes().len() <= 4, "{:?}", file.changes());
        for cluster in &taken {
            let count = refcounts.count(*cluster).expect("memory reads");
            assert_eq!(count, u64::from(!gone.contains(cluster)), "{cluster}");
        }
        assert_eq!(take(&mut refcounts, 1..2).start, taken[0]);
    }

    #[test]
    fn a_count_never_leaves_its_range() {
        let (_, mut refcounts) = file(16, 0);
        assert!(refcounts.step(2..3, Step::Up).is_err());
        assert!(refcounts.step(5..6, Step::Down).is_err());
        assert_eq!(refcounts.count(2).expect("reads"), 1);
        assert_eq!(refcounts.count(5).expect("reads"), 0);
    }
}

//! Changes that touch refcounts and tables everywhere, made as one.
//!
//! The refcounts are built anew in clusters that are free, every table that changes is written to
//! a free cluster as well, and the header, whose first sector points at all of them, is switched
//! in one write.  Until then the image is as it was, but for the clusters taken, which a crash
//! leaves as leaks.

use std::collections::BTreeSet;
use std::ops::Range;

use super::Qcow2;
use super::counts::{Counts, convert};
use super::entry::{COPIED, Cluster};
use super::header::{Header, MAX_REFTABLE_BYTES};
use super::refblock::Width;
use super::refcount::{Refcounts, Step};
use super::switch::switch;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{Storage, Zeroing};
use crate::util::align::{clamp_len, is_aligned, len64};
use crate::util::range::push_merged;

/// What a rewrite takes clusters for, before it begins.
#[derive(Debug, Clone, Copy)]
pub(super) struct Needs<'n> {
    /// Second-level tables, at most.
    pub(super) tables: u64,
    /// Lengths in bytes of what must lie in one piece, each.
    pub(super) runs: &'n [u64],
    /// log2 of the width of the new refcounts in bits.
    pub(super) refcount_order: u32,
}

/// What becomes of the old table where one must be copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Replaced {
    /// The copy takes its place everywhere.
    Everywhere,
    /// Others go on using it.
    Here,
}

/// A rewrite under way.  Dropped before [`Rewrite::commit`], it gives back what it took.
#[derive(Debug)]
pub(super) struct Rewrite<'a> {
    image: &'a Qcow2,
    /// The refcounts to be.
    pub(super) counts: Counts,
    /// The header to be.
    pub(super) header: Header,
    /// Clusters taken for tables and not used.
    spare: Vec<u64>,
    /// Offsets of the runs that were asked for, not handed out yet, last first.
    runs: Vec<u64>,
    /// All clusters taken.
    taken: Vec<Range<u64>>,
    /// The old structure's blocks by index.
    old_blocks: Vec<OldBlock>,
    old_width: Width,
    switched: bool,
}

#[derive(Debug, Clone, Copy)]
struct OldBlock {
    index: u64,
    host: u64,
}

impl Drop for Rewrite<'_> {
    fn drop(&mut self) {
        if self.switched {
            return;
        }
        let Ok(writer) = self.image.writer() else {
            return;
        };
        let mut refcounts = writer.refcounts.lock();
        for run in self.taken.drain(..) {
            // Where this fails too, they stay a leak.
            drop(refcounts.step(&*self.image.file, run, Step::Down));
        }
    }
}

impl<'a> Rewrite<'a> {
    /// Takes what is needed and copies the refcounts.
    ///
    /// # Errors
    /// `Unsupported` where a count needs more bits; `OutOfRange` where the table would be too
    /// long; `Corrupt`; the host's.  Then nothing is changed.
    pub(super) fn begin(image: &'a Qcow2, needs: &Needs<'_>) -> Result<Self> {
        image.start_writing()?;
        image.release_assigned()?;
        image.release_freed()?;
        let header = Header::read(&*image.file)?;
        let width = Width::new(needs.refcount_order);
        let mut rewrite = Self {
            image,
            counts: Counts::new(header.cluster_bits, width, 0),
            old_width: Width::new(header.refcount_order),
            header,
            spare: Vec::new(),
            runs: Vec::new(),
            taken: Vec::new(),
            old_blocks: Vec::new(),
            switched: false,
        };
        let mut refcounts = image.writer()?.refcounts.lock();
        image.count_uncounted(&mut refcounts)?;
        rewrite.take_spare(&mut refcounts, needs.tables)?;
        for len in needs.runs.iter().rev() {
            let host = rewrite.take_run(&mut refcounts, *len)?;
            rewrite.runs.push(host);
        }
        rewrite.build(&mut refcounts, width)?;
        drop(refcounts);
        rewrite.header.refcount_order = needs.refcount_order;
        Ok(rewrite)
    }

    /// The image file.
    pub(super) fn file(&self) -> &'a dyn Storage {
        &*self.image.file
    }

    fn cluster_bits(&self) -> u32 {
        self.header.cluster_bits
    }

    fn take_spare(&mut self, refcounts: &mut Refcounts, count: u64) -> Result<()> {
        let mut left = count;
        while left > 0 {
            let taken = refcounts.take(&*self.image.file, 1..left + 1, &self.image.allowed())?;
            left -= taken.clusters.end - taken.clusters.start;
            let bits = self.cluster_bits();
            self.spare.extend(taken.clusters.clone().map(|c| c << bits));
            self.taken.push(taken.clusters);
        }
        Ok(())
    }

    /// Clusters in one piece for `len` bytes; 0 for none.
    fn take_run(&mut self, refcounts: &mut Refcounts, len: u64) -> Result<u64> {
        let count = len.div_ceil(1 << self.cluster_bits());
        if count == 0 {
            return Ok(0);
        }
        let taken = refcounts.take(&*self.image.file, count..count + 1, &self.image.allowed())?;
        self.taken.push(taken.clusters);
        Ok(taken.host)
    }

    /// Builds the new refcounts as a copy of the old ones, without the old structure itself.
    fn build(&mut self, refcounts: &mut Refcounts, width: Width) -> Result<()> {
        let bits = self.cluster_bits();
        let (old_bits, new_bits) = (self.old_width.block_bits(bits), width.block_bits(bits));
        let mut hosts = Vec::new();
        let mut table = None;
        let wanted = loop {
            self.old_blocks = old_blocks(&*self.image.file, refcounts)?;
            let wanted: BTreeSet<u64> = self
                .old_blocks
                .iter()
                .flat_map(|b| {
                    let first = (b.index << old_bits) >> new_bits;
                    let last = (((b.index + 1) << old_bits) - 1) >> new_bits;
                    first..=last
                })
                .collect();
            let len = wanted.last().map_or(0, |last| last + 1) * 8;
            if len > MAX_REFTABLE_BYTES {
                let text = format!(
                    "the refcount table would have {len} bytes (allowed: {MAX_REFTABLE_BYTES})"
                );
                return Err(Error::new(ErrorKind::OutOfRange, text));
            }
            let missing = wanted.len().saturating_sub(hosts.len());
            let clusters = len.div_ceil(1 << bits).max(1);
            match table {
                Some((_, enough)) if enough >= clusters && missing == 0 => break wanted,
                Some((_, enough)) if enough >= clusters => {
                    let before = self.spare.len();
                    self.take_spare(refcounts, len64(missing))?;
                    hosts.extend(self.spare.drain(before..));
                }
                _ => {
                    let host = self.take_run(refcounts, clusters << bits)?;
                    if let Some((old, clusters)) = table.replace((host, clusters)) {
                        self.spare.extend((0..clusters).map(|i| old + (i << bits)));
                    }
                }
            }
        };
        let (table_host, clusters) = table.unwrap_or((0, 0));
        self.spare.extend(hosts.drain(wanted.len()..));
        let entries = clamp_len((clusters << bits) / 8, usize::MAX);
        self.counts = Counts::new(bits, width, entries);
        for (index, host) in wanted.into_iter().zip(hosts) {
            let bytes = self.copied_block(index, width)?;
            self.image.watcher.advance(len64(bytes.len()));
            self.counts.place(&*self.image.file, index, host, bytes)?;
        }
        let old = refcounts.place();
        self.header.reftable_offset = table_host;
        self.header.reftable_clusters = u32::try_from(clusters).unwrap_or(u32::MAX);
        self.release(old.table..old.table + (old.table_clusters << bits))?;
        for block in self.old_blocks.clone() {
            self.release(block.host..block.host + (1 << bits))?;
        }
        Ok(())
    }

    /// Block `index` of the new structure, with the counts that the old one has.
    fn copied_block(&self, index: u64, width: Width) -> Result<Vec<u8>> {
        let (bits, old) = (self.cluster_bits(), self.old_width);
        let file = &*self.image.file;
        let read = |index: u64| -> Result<Vec<u8>> {
            let mut bytes = vec![0; clamp_len(1 << bits, usize::MAX)];
            let found = self.old_blocks.binary_search_by_key(&index, |b| b.index);
            if let Some(block) = found.ok().and_then(|i| self.old_blocks.get(i)) {
                file.read_at(&mut bytes, block.host)?;
            }
            Ok(bytes)
        };
        if old == width {
            return read(index);
        }
        let old_bits = old.block_bits(bits);
        let mut at = (index << width.block_bits(bits)) >> old_bits;
        let mut bytes = read(at)?;
        convert(width, bits, index << width.block_bits(bits), |cluster| {
            if cluster >> old_bits != at {
                at = cluster >> old_bits;
                bytes = read(at)?;
            }
            let within = clamp_len(cluster & ((1 << old_bits) - 1), usize::MAX);
            Ok(old.get(&bytes, within))
        })
    }

    /// The next of the runs that were asked for, in that order.
    pub(super) fn run(&mut self) -> u64 {
        self.runs.pop().unwrap_or(0)
    }

    /// Counts down what a range of the file was used for.
    pub(super) fn release(&mut self, host: Range<u64>) -> Result<()> {
        let bits = self.cluster_bits();
        let clusters = host.start >> bits..host.end.div_ceil(1 << bits);
        self.counts.step(&*self.image.file, clusters, Step::Down)
    }

    fn read_table(&self, host: u64) -> Result<Vec<u8>> {
        if host >= self.image.file.size() {
            return Err(Error::corrupt(format!(
                "an L2 table is at {host:#x} (the file ends at {:#x})",
                self.image.file.size()
            )));
        }
        let mut bytes = vec![0; clamp_len(1 << self.cluster_bits(), usize::MAX)];
        self.image.file.read_at(&mut bytes, host)?;
        self.image.watcher.advance(len64(bytes.len()));
        Ok(bytes)
    }

    /// Writes a changed second-level table to a cluster of its own.
    pub(super) fn write_table(&mut self, bytes: &[u8]) -> Result<u64> {
        let host = self.spare_cluster()?;
        self.image.file.write_at(bytes, host)?;
        Ok(host)
    }

    /// One of the clusters that were taken for tables, counted once.
    pub(super) fn spare_cluster(&mut self) -> Result<u64> {
        self.spare.pop().ok_or_else(|| {
            Error::corrupt("more L2 tables change than there are (check -r all mends the image)")
        })
    }

    /// Counts everything that the tables of `l1` refer to down, and the tables.
    pub(super) fn drop_tables(&mut self, l1: &[u64]) -> Result<()> {
        for entry in l1 {
            if let Some(host) = self.image.layout.table(*entry)? {
                let table = self.read_table(host)?;
                self.step_table(&table, Step::Down)?;
                self.release(host..host + (1 << self.cluster_bits()))?;
            }
        }
        Ok(())
    }

    /// Counts everything that the tables of `l1` refer to up, and the tables: one more thing
    /// points at them, which is what the words of `l1` say afterwards.
    pub(super) fn share_tables(&mut self, l1: &mut [u64], replaced: Replaced) -> Result<()> {
        let bits = self.cluster_bits();
        for entry in l1 {
            let Some(host) = self.image.layout.table(*entry)? else {
                *entry = 0;
                continue;
            };
            let mut table = self.read_table(host)?;
            self.step_table(&table, Step::Up)?;
            let changed = self.flag(&mut table, |_, _| Ok(false))?;
            *entry = host;
            if changed {
                *entry = self.write_table(&table)?;
            }
            let grown = match (changed, replaced) {
                (true, Replaced::Here) => {
                    // Nothing else points at the copy.
                    *entry |= COPIED;
                    continue;
                }
                (true, Replaced::Everywhere) => {
                    self.release(host..host + (1 << bits))?;
                    *entry
                }
                (false, _) => host,
            };
            let cluster = grown >> bits;
            self.counts
                .step(&*self.image.file, cluster..cluster + 1, Step::Up)?;
        }
        Ok(())
    }

    /// Marks in the tables of `l1` what nothing else refers to.
    pub(super) fn own_tables(&mut self, l1: &mut [u64]) -> Result<()> {
        let bits = self.cluster_bits();
        for entry in l1 {
            let Some(host) = self.image.layout.table(*entry)? else {
                *entry = 0;
                continue;
            };
            let mut table = self.read_table(host)?;
            let file = &*self.image.file;
            let own = |counts: &mut Counts, host: u64| Ok(counts.get(file, host >> bits)? == 1);
            *entry = host;
            if self.flag(&mut table, own)? {
                *entry = self.write_table(&table)?;
                self.release(host..host + (1 << bits))?;
            }
            if self.counts.get(&*self.image.file, *entry >> bits)? == 1 {
                *entry |= COPIED;
            }
        }
        Ok(())
    }

    /// Sets the flags of a table's standard clusters; whether any changed.
    fn flag(
        &mut self,
        table: &mut [u8],
        own: impl Fn(&mut Counts, u64) -> Result<bool>,
    ) -> Result<bool> {
        let len = clamp_len(self.image.layout.entry_len(), usize::MAX);
        let mut changed = false;
        for bytes in table.chunks_exact_mut(len) {
            let Some(word) = bytes.first_chunk_mut::<8>() else {
                continue;
            };
            let entry = u64::from_be_bytes(*word);
            if entry == 0 {
                continue;
            }
            let wanted = match self.image.layout.cluster(entry)? {
                Cluster::Standard { host, .. } if host != 0 && own(&mut self.counts, host)? => {
                    entry | COPIED
                }
                _ => entry & !COPIED,
            };
            changed |= wanted != entry;
            *word = wanted.to_be_bytes();
        }
        Ok(changed)
    }

    /// Counts what a table's entries refer to up or down.
    fn step_table(&mut self, table: &[u8], step: Step) -> Result<()> {
        let len = clamp_len(self.image.layout.entry_len(), usize::MAX);
        let bits = self.cluster_bits();
        let mut run = 0..0;
        for bytes in table.chunks_exact(len) {
            let word = bytes.first_chunk().copied().map_or(0, u64::from_be_bytes);
            let clusters = match self.image.layout.cluster(word)? {
                Cluster::Standard { host: 0, .. } if word != 0 => {
                    return Err(Error::corrupt(format!(
                        "an L2 entry is {word:#018x}, which points at the header"
                    )));
                }
                Cluster::Standard { host, .. } => host >> bits..(host >> bits) + 1,
                Cluster::Compressed(packed) => packed.start >> bits..((packed.end - 1) >> bits) + 1,
                Cluster::Unallocated | Cluster::Zero => continue,
            };
            if run.end == clusters.start {
                run.end = clusters.end;
                continue;
            }
            self.counts.step(&*self.image.file, run, step)?;
            run = clusters;
        }
        self.counts.step(&*self.image.file, run, step)
    }

    /// Makes it all valid at once, durably, then gives back what is no longer used.
    pub(super) fn commit(mut self) -> Result<()> {
        let bits = self.cluster_bits();
        let mut unused = std::mem::take(&mut self.spare);
        unused.sort_unstable();
        for host in unused {
            self.release(host..host + (1 << bits))?;
        }
        let file = &*self.image.file;
        self.counts.flush(file, self.header.reftable_offset)?;
        file.sync()?;
        // From here on a failure leaves it open which of the two headers is there.
        self.switched = true;
        switch(file, &self.header)?;
        self.punch()
    }

    /// Gives the host back what nothing refers to any more.
    fn punch(&mut self) -> Result<()> {
        let bits = self.cluster_bits();
        let file = &*self.image.file;
        let mut freed: Vec<Range<u64>> = Vec::new();
        for block in std::mem::take(&mut self.old_blocks) {
            let mut bytes = vec![0; clamp_len(1 << bits, usize::MAX)];
            file.read_at(&mut bytes, block.host)?;
            self.image.watcher.advance(len64(bytes.len()));
            let first = block.index << self.old_width.block_bits(bits);
            for within in 0..1usize << self.old_width.block_bits(bits) {
                let cluster = first + len64(within);
                if self.old_width.get(&bytes, within) != 0 && self.counts.get(file, cluster)? == 0 {
                    push_merged(&mut freed, cluster << bits..(cluster + 1) << bits);
                }
            }
            for run in freed.drain(..) {
                let run = run.start..run.end.min(file.size());
                if run.start < run.end {
                    // Where the host cannot, the space is reused all the same.
                    drop(file.zero(run, Zeroing::MayUnmap));
                }
            }
        }
        Ok(())
    }
}

/// The blocks of the structure in force.
fn old_blocks(file: &dyn Storage, refcounts: &Refcounts) -> Result<Vec<OldBlock>> {
    let place = refcounts.place();
    let len = (place.table_clusters << place.cluster_bits).min(MAX_REFTABLE_BYTES.max(2 << 20));
    let mut bytes = vec![0; clamp_len(len, usize::MAX)];
    file.read_at(&mut bytes, place.table)?;
    let mut blocks = Vec::new();
    for (index, word) in bytes.chunks_exact(8).enumerate() {
        let host = word.first_chunk().copied().map_or(0, u64::from_be_bytes);
        if host == 0 {
            continue;
        }
        if !is_aligned(host, 1 << place.cluster_bits) || host >= file.size() {
            return Err(Error::corrupt(format!(
                "refcount table entry {index} is {host:#x} (allowed: multiples of {:#x} below {:#x})",
                1u64 << place.cluster_bits,
                file.size()
            )));
        }
        blocks.push(OldBlock {
            index: len64(index),
            host,
        });
    }
    Ok(blocks)
}

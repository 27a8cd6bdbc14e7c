//! Changes that touch refcounts and tables everywhere, made as one.
//!
//! The refcounts are built anew in clusters that are free, every table that changes is written to
//! a free cluster as well, and the header, whose first sector points at all of them, is switched
//! in one write.  Until then the image is as it was, but for the clusters taken, which a crash
//! leaves as leaks.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use super::Qcow2;
use super::entry::COPIED;
use super::header::{Header, MAX_REFTABLE_BYTES};
use super::refblock::{Place, Structure, Width};
use super::refcount::{Refcounts, Step};
use super::snapshot_table::SnapshotTable;
use super::switch::switch;
use super::writer::Loose;
use crate::error::{Error, ErrorKind, Result};
use crate::image::be64;
use crate::storage::Storage;
use crate::util::align::{clamp_len, len64};
use crate::util::range::push_merged;

/// What a rewrite takes clusters for, before it begins.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Needs<'n> {
    /// Second-level tables, at most.
    pub(super) tables: u64,
    /// Lengths in bytes of what must lie in one piece, each.
    pub(super) runs: &'n [u64],
    /// log2 of the width of the new refcounts in bits, where it is another.
    pub(super) refcount_order: Option<u32>,
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
    counts: Refcounts,
    /// The header to be.
    pub(super) header: Header,
    /// Clusters taken for tables and not used.
    spare: Vec<u64>,
    /// Offsets of the runs that were asked for, not handed out yet, last first.
    runs: Vec<u64>,
    /// All clusters taken.
    pub(super) taken: Loose<'a>,
    old: Structure,
    /// Index and offset of its blocks.
    old_blocks: Vec<(u64, u64)>,
}

impl Qcow2 {
    /// Has `change` prepare a rewrite, commits it, and looks at the header again.
    pub(super) fn rewrite(
        &mut self,
        needs: &Needs<'_>,
        change: impl FnOnce(&mut Rewrite<'_>) -> Result<()>,
    ) -> Result<()> {
        let done = Rewrite::begin(self, needs).and_then(|mut rewrite| {
            change(&mut rewrite)?;
            rewrite.commit()
        });
        let reloaded = self.reload();
        done.and(reloaded)
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
        let mut header = Header::read(&*image.file)?;
        if let Some(order) = needs.refcount_order {
            header.refcount_order = order;
        }
        let mut taken = Loose::new(image);
        let mut spare = taken.take_each(needs.tables)?;
        let runs = needs.runs.iter().rev().map(|len| taken.take_run(*len));
        let runs = runs.collect::<Result<_>>()?;
        let (bits, size) = (header.cluster_bits, header.cluster_size());
        let width = Width::new(header.refcount_order);
        let (mut table, mut table_clusters, mut hosts) = (0, 0, Vec::new());
        // What it takes may need more blocks of the old structure.
        let (old, old_blocks, wanted) = loop {
            let place = image.writer()?.refcounts.lock().place();
            let old = Structure::new(Arc::clone(&image.file), place);
            let blocks = old.blocks()?;
            let wanted = wanted(&blocks, place.block_bits(), width.block_bits(bits))?;
            let clusters = (wanted.last().map_or(1, |last| last + 1) * 8).div_ceil(size);
            if clusters > table_clusters {
                spare.extend((0..table_clusters).map(|i| table + i * size));
                (table, table_clusters) = (taken.take_run(clusters * size)?, clusters);
            } else if wanted.len() > hosts.len() {
                hosts.extend(taken.take_each(len64(wanted.len() - hosts.len()))?);
            } else {
                break (old, blocks, wanted);
            }
        };
        spare.extend(hosts.drain(wanted.len()..));
        let blocks: Vec<(u64, u64)> = wanted.into_iter().zip(hosts).collect();
        let mut words = vec![0; clamp_len(table_clusters * size / 8, usize::MAX)];
        for (index, host) in &blocks {
            words[clamp_len(*index, usize::MAX)] = *host;
        }
        image.file.write_at(&be64::bytes(words), table)?;
        header.reftable_offset = table;
        header.reftable_clusters = u32::try_from(table_clusters).unwrap_or(u32::MAX);
        let counts = Refcounts::draft(Arc::clone(&image.file), Place::of(&header));
        let mut rewrite = Self {
            image,
            counts,
            header,
            spare,
            runs,
            taken,
            old,
            old_blocks,
        };
        for (index, host) in blocks {
            let bytes = rewrite.copied_block(index, width)?;
            image.watcher.advance(len64(bytes.len()));
            rewrite.counts.set_block(index, host, bytes)?;
        }
        rewrite.release(rewrite.old.place.table_range())?;
        for (_, host) in rewrite.old_blocks.clone() {
            rewrite.release(host..host + size)?;
        }
        Ok(rewrite)
    }

    /// The image file.
    pub(super) fn file(&self) -> &'a dyn Storage {
        &*self.image.file
    }

    fn size(&self) -> u64 {
        self.header.cluster_size()
    }

    /// Block `index` of the new structure, with the counts that the old one has.
    fn copied_block(&self, index: u64, width: Width) -> Result<Vec<u8>> {
        let old = self.old.place.width;
        let read = |index: u64| {
            let found = self.old_blocks.binary_search_by_key(&index, |b| b.0);
            match found.ok().and_then(|i| self.old_blocks.get(i)) {
                Some((_, host)) => self.old.read(*host),
                None => Ok(vec![0; clamp_len(self.size(), usize::MAX)]),
            }
        };
        if old == width {
            return read(index);
        }
        let (old_bits, bits) = (
            self.old.place.block_bits(),
            width.block_bits(self.header.cluster_bits),
        );
        let mut at = (index << bits) >> old_bits;
        let mut counts = read(at)?;
        let mut bytes = vec![0; clamp_len(self.size(), usize::MAX)];
        for (within, cluster) in (index << bits..(index + 1) << bits).enumerate() {
            if cluster >> old_bits != at {
                at = cluster >> old_bits;
                counts = read(at)?;
            }
            let count = old.get(
                &counts,
                clamp_len(cluster & ((1 << old_bits) - 1), usize::MAX),
            );
            if count > width.max() {
                return Err(Error::unsupported(format!(
                    "cluster {cluster} is referred to {count} times, and refcounts of {} bits hold no more than {}",
                    width.bits(),
                    width.max()
                )));
            }
            width.set(&mut bytes, within, count);
        }
        Ok(bytes)
    }

    /// The next of the runs that were asked for, in that order.
    pub(super) fn run(&mut self) -> u64 {
        self.runs.pop().unwrap_or(0)
    }

    /// Counts what a range of the file is used for up or down, some times.
    pub(super) fn step(&mut self, host: &Range<u64>, times: u64, step: Step) -> Result<()> {
        let clusters = self.image.layout.clusters(host);
        self.counts.step_each([(clusters, times)], step)
    }

    /// Counts down what a range of the file was used for.
    pub(super) fn release(&mut self, host: Range<u64>) -> Result<()> {
        self.step(&host, 1, Step::Down)
    }

    fn is_used_once(&mut self, host: u64) -> Result<bool> {
        Ok(self.counts.count(host >> self.header.cluster_bits)? == 1)
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

    /// Gives each table that words of `l1` point at to `each`, with its offset, which says what the
    /// word is to be.
    fn each_table(
        &mut self,
        l1: &mut [u64],
        mut each: impl FnMut(&mut Self, u64, Vec<u8>) -> Result<u64>,
    ) -> Result<()> {
        for entry in l1 {
            *entry = match self.image.layout.table(*entry)? {
                None => 0,
                Some(host) => {
                    let table = self.image.read_table(host)?;
                    each(self, host, table)?
                }
            };
        }
        Ok(())
    }

    /// Counts everything that the tables of `l1` refer to down, and the tables.
    pub(super) fn drop_tables(&mut self, l1: &[u64]) -> Result<()> {
        self.each_table(&mut l1.to_vec(), |rewrite, host, table| {
            rewrite.step_table(&table, Step::Down)?;
            rewrite.release(host..host + rewrite.size())?;
            Ok(0)
        })
    }

    /// Counts everything that the tables of `l1` refer to up, and the tables: one more thing
    /// points at them, which is what the words of `l1` say afterwards.
    pub(super) fn share_tables(&mut self, l1: &mut [u64], replaced: Replaced) -> Result<()> {
        let (layout, size) = (self.image.layout, self.size());
        self.each_table(l1, |rewrite, host, mut table| {
            rewrite.step_table(&table, Step::Up)?;
            let mut shared = host;
            if layout.change_entries(&mut table, |word| Ok(word & !COPIED))? {
                shared = rewrite.write_table(&table)?;
                if replaced == Replaced::Here {
                    // Nothing else points at the copy.
                    return Ok(shared | COPIED);
                }
                rewrite.release(host..host + size)?;
            }
            rewrite.step(&(shared..shared + size), 1, Step::Up)?;
            Ok(shared)
        })
    }

    /// Marks in the tables of `l1` what nothing else refers to.
    pub(super) fn own_tables(&mut self, l1: &mut [u64]) -> Result<()> {
        let (layout, size) = (self.image.layout, self.size());
        self.each_table(l1, |rewrite, host, mut table| {
            let changed = layout.change_entries(&mut table, |word| {
                let whole = layout.cluster(word)?.whole().filter(|host| *host != 0);
                let own = whole.map_or(Ok(false), |host| rewrite.is_used_once(host))?;
                Ok(if own { word | COPIED } else { word & !COPIED })
            })?;
            let mut owned = host;
            if changed {
                owned = rewrite.write_table(&table)?;
                rewrite.release(host..host + size)?;
            }
            let flag = if rewrite.is_used_once(owned)? {
                COPIED
            } else {
                0
            };
            Ok(owned | flag)
        })
    }

    /// Counts what a table's entries refer to up or down.
    fn step_table(&mut self, table: &[u8], step: Step) -> Result<()> {
        let layout = self.image.layout;
        let mut run = 0..0;
        for (word, _) in layout.entries(table) {
            let cluster = layout.cluster(word)?;
            if cluster.whole() == Some(0) {
                return Err(Error::corrupt(format!(
                    "an L2 entry is {word:#018x}, which points at the header"
                )));
            }
            let clusters = layout.clusters(&layout.host(cluster));
            if clusters.is_empty() {
                continue;
            }
            if run.end == clusters.start {
                run.end = clusters.end;
                continue;
            }
            self.counts.step(run, step)?;
            run = clusters;
        }
        self.counts.step(run, step)
    }

    /// Puts the active first-level table into the next run and lets go of the old one.
    pub(super) fn replace_l1(&mut self, l1: &[u64]) -> Result<()> {
        let host = self.run();
        if l1.is_empty() {
            // A disk of no bytes has no table, wherever the header says that it is.
            return Ok(());
        }
        self.write(be64::bytes(l1.iter().copied()), host)?;
        self.release(self.header.l1())?;
        self.header.l1_offset = host;
        self.header.l1_len = u32::try_from(l1.len()).unwrap_or(u32::MAX);
        Ok(())
    }

    /// Puts the snapshot table into the next run and lets go of the old one.
    pub(super) fn replace_snapshots(&mut self, table: &SnapshotTable) -> Result<()> {
        let host = self.run();
        let old = SnapshotTable::read(self.file(), &self.header)?;
        let start = self.header.snapshots_offset;
        // The padding of the last entry needs no cluster of its own.
        self.release(start..start + len64(old.encode()?.len()))?;
        self.write(table.encode()?, host)?;
        self.header.snapshots_offset = if table.entries.is_empty() { 0 } else { host };
        self.header.snapshot_count = u32::try_from(table.entries.len())
            .map_err(|_| Error::new(ErrorKind::OutOfRange, "there are too many snapshots"))?;
        Ok(())
    }

    /// Writes what a run was asked for.
    pub(super) fn write(&self, bytes: Vec<u8>, host: u64) -> Result<()> {
        match bytes.is_empty() {
            true => Ok(()),
            false => be64::write_padded(self.file(), bytes, host, self.size()),
        }
    }

    /// Makes it all valid at once, durably, then gives back what is no longer used.
    pub(super) fn commit(mut self) -> Result<()> {
        let mut unused = std::mem::take(&mut self.spare);
        unused.sort_unstable();
        for host in unused {
            self.release(host..host + self.size())?;
        }
        self.counts.flush()?;
        self.file().sync()?;
        // From here on a failure leaves it open which of the two headers is there.
        self.taken.keep();
        switch(self.file(), &self.header)?;
        self.punch()
    }

    /// Gives the host back what nothing refers to any more.
    fn punch(&mut self) -> Result<()> {
        let (width, bits) = (self.old.place.width, self.old.place.block_bits());
        for (index, host) in std::mem::take(&mut self.old_blocks) {
            let bytes = self.old.read(host)?;
            self.image.watcher.advance(len64(bytes.len()));
            let mut freed: Vec<Range<u64>> = Vec::new();
            for (within, cluster) in (index << bits..(index + 1) << bits).enumerate() {
                if width.get(&bytes, within) != 0 && self.counts.count(cluster)? == 0 {
                    push_merged(&mut freed, cluster..cluster + 1);
                }
            }
            self.image.punch(&freed);
        }
        Ok(())
    }
}

/// The blocks of `1 << new_bits` counters that take the place of old ones, which ascend.
fn wanted(old: &[(u64, u64)], old_bits: u32, new_bits: u32) -> Result<BTreeSet<u64>> {
    let of = |index: u64| {
        let last = ((index + 1) << old_bits) - 1;
        (index << old_bits) >> new_bits..=last >> new_bits
    };
    let len = old.last().map_or(0, |(last, _)| of(*last).end() + 1) * 8;
    if len > MAX_REFTABLE_BYTES {
        let text =
            format!("the refcount table would have {len} bytes (allowed: {MAX_REFTABLE_BYTES})");
        return Err(Error::new(ErrorKind::OutOfRange, text));
    }
    Ok(old.iter().flat_map(|(index, _)| of(*index)).collect())
}

/// Tables that a first-level table points at.
pub(super) fn count_tables(l1: &[u64]) -> u64 {
    len64(l1.iter().filter(|e| **e != 0).count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_structure_that_would_be_too_long_is_refused_before_it_is_made() {
        // Each of them becomes 64, more than memory should hold.
        let old: Vec<(u64, u64)> = (0..1 << 20).map(|index| (index, 0)).collect();
        let begun = std::time::Instant::now();
        let error = wanted(&old, 18, 12).expect_err("is too long");
        assert_eq!(error.kind(), ErrorKind::OutOfRange);
        assert!(begun.elapsed().as_secs() < 5, "{:?}", begun.elapsed());
        let same = wanted(&old[7..9], 12, 13).expect("is short");
        assert!(same.iter().eq(&[3, 4]));
        let more = wanted(&old[1..2], 13, 12).expect("is short");
        assert!(more.iter().eq(&[2, 3]));
    }
}

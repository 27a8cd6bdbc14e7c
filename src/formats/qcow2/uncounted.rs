//! Clusters that are in use and that nothing counts.
//!
//! An image whose refcounts are damaged offers them as free, and who takes one overwrites what is in
//! it.  Before space of the file as it was opened is used again, all tables are looked at once, and
//! such clusters are counted: nothing else of the damage is touched, and a check names it.

use super::Qcow2;
use super::entry::Cluster;
use super::guard::{addresses, damaged};
use super::refcount::{Refcounts, Step};
use super::snapshot_table::SnapshotTable;
use crate::error::Result;
use crate::util::align::clamp_len;
use crate::util::range;

/// Clusters that are counted so at most.
const MOST: usize = 1 << 20;

impl Qcow2 {
    /// Counts what is in use and not counted, once, before free clusters of the old file are taken.
    pub(super) fn count_uncounted(&self, refcounts: &mut Refcounts) -> Result<()> {
        let file = &*self.file;
        if self.external().is_some() || !refcounts.is_to_reuse(file)? {
            return Ok(());
        }
        let mut found = Vec::new();
        for table in self.second_level_tables()? {
            let words = addresses(file, table..table + self.layout.cluster_size());
            let step = clamp_len(self.layout.entry_len() / 8, 2);
            // What cannot be read is in nobody's use.
            for word in words.unwrap_or_default().into_iter().step_by(step) {
                self.uncounted_of(word, refcounts, &mut found)?;
            }
            if found.len() > MOST {
                return Err(damaged("too many clusters in use have refcount 0"));
            }
        }
        found.sort_unstable();
        found.dedup();
        for cluster in found {
            if !refcounts.has_block(file, cluster)? {
                let text = format!("cluster {cluster}, which is in use, has no refcount");
                return Err(damaged(&text));
            }
            refcounts.step(file, cluster..cluster + 1, Step::Up)?;
        }
        Ok(())
    }

    /// The second-level tables of the disk and of its snapshots.
    fn second_level_tables(&self) -> Result<Vec<u64>> {
        let snapshots = SnapshotTable::read(&*self.file, &self.header)?;
        let others = snapshots.entries.iter().map(|entry| {
            let start = entry.l1_offset();
            start..start.saturating_add(u64::from(entry.l1_len()) * 8)
        });
        let mut tables = Vec::new();
        for first_level in others.chain([self.l1_range()]) {
            if range::len(&first_level) > 0 {
                let words = addresses(&*self.file, first_level)?;
                tables.extend(words.iter().filter_map(|w| self.layout.table(*w).ok()?));
            }
        }
        tables.sort_unstable();
        tables.dedup();
        Ok(tables)
    }

    /// Adds the clusters of an entry that have refcount 0.
    fn uncounted_of(
        &self,
        word: u64,
        refcounts: &mut Refcounts,
        found: &mut Vec<u64>,
    ) -> Result<()> {
        let bits = self.layout.cluster_bits;
        let clusters = match self.layout.cluster(word) {
            Ok(Cluster::Standard { host, .. }) => host >> bits..(host >> bits) + 1,
            Ok(Cluster::Compressed(packed)) => packed.start >> bits..packed.end.div_ceil(1 << bits),
            _ => return Ok(()),
        };
        // What lies past the end of the file is not there.
        let end = self.file.size().div_ceil(1 << bits);
        for cluster in clusters.start..clusters.end.min(end) {
            if refcounts.count(&*self.file, cluster)? == 0 {
                found.push(cluster);
            }
        }
        Ok(())
    }
}

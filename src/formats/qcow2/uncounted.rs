//! Clusters that are in use and that nothing counts.
//!
//! An image whose refcounts are damaged offers them as free, and who takes one overwrites what is in
//! it.  Before space of the file as it was opened is used again, all tables are looked at once, and
//! such clusters are counted: nothing else of the damage is touched, and a check names it.

use std::collections::BTreeMap;
use std::ops::Range;

use super::Qcow2;
use super::entry::Cluster;
use super::guard::{addresses, damaged};
use super::refcount::Refcounts;
use super::snapshot_table::SnapshotTable;
use crate::error::Result;
use crate::util::align::clamp_len;
use crate::util::range;

/// Clusters that are counted so at most, and runs of free clusters that are looked at.
const MOST: usize = 1 << 20;

/// References to clusters that nothing counts, by cluster.
type Uncounted = BTreeMap<u64, u64>;

impl Qcow2 {
    /// Counts what is in use and not counted, once, before free clusters of the old file are taken.
    pub(super) fn count_uncounted(&self, refcounts: &mut Refcounts) -> Result<()> {
        let file = &*self.file;
        if self.external().is_some() || !refcounts.is_to_reuse(file)? {
            return Ok(());
        }
        let end = file.size().div_ceil(self.layout.cluster_size());
        let Some(free) = refcounts.free_runs(file, end, MOST)? else {
            return Err(damaged("there are too many pieces of free space"));
        };
        let mut found = Uncounted::new();
        for (table, users) in self.second_level_tables()? {
            let words = addresses(file, table..table + self.layout.cluster_size());
            let step = clamp_len(self.layout.entry_len() / 8, 2);
            // What cannot be read is in nobody's use.
            for word in words.unwrap_or_default().into_iter().step_by(step) {
                self.add_uncounted(word, users, &free, &mut found);
            }
            if found.len() > MOST {
                return Err(damaged("too many clusters in use have refcount 0"));
            }
        }
        for cluster in found.keys() {
            if !refcounts.has_block(file, *cluster)? {
                let text = format!("cluster {cluster}, which is in use, has no refcount");
                return Err(damaged(&text));
            }
        }
        for (cluster, users) in found {
            refcounts.rise(file, cluster, &[users.min(refcounts.most())])?;
        }
        refcounts.all_is_counted();
        Ok(())
    }

    /// The second-level tables of the disk and of its snapshots, and how many of these use each.
    fn second_level_tables(&self) -> Result<BTreeMap<u64, u64>> {
        let snapshots = SnapshotTable::read(&*self.file, &self.header)?;
        let others = snapshots.entries.iter().map(|entry| {
            let start = entry.l1_offset();
            start..start.saturating_add(u64::from(entry.l1_len()) * 8)
        });
        let mut tables = BTreeMap::new();
        for first_level in others.chain([self.l1_range()]) {
            if range::len(&first_level) > 0 {
                let words = addresses(&*self.file, first_level)?;
                let hosts = words.iter().filter_map(|w| self.layout.table(*w).ok()?);
                hosts.for_each(|host| *tables.entry(host).or_default() += 1);
            }
        }
        Ok(tables)
    }

    /// Adds the clusters of an entry that are among the `free` ones.
    fn add_uncounted(&self, word: u64, users: u64, free: &[Range<u64>], found: &mut Uncounted) {
        let bits = self.layout.cluster_bits;
        let clusters = match self.layout.cluster(word) {
            Ok(Cluster::Standard { host, .. }) => host >> bits..(host >> bits) + 1,
            Ok(Cluster::Compressed(packed)) => packed.start >> bits..packed.end.div_ceil(1 << bits),
            _ => return,
        };
        for cluster in clusters {
            let after = free.partition_point(|run| run.start <= cluster);
            if free[..after].last().is_some_and(|run| cluster < run.end) {
                *found.entry(cluster).or_default() += users;
            }
        }
    }
}

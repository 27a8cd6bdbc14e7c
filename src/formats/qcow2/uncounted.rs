//! Clusters that are in use and that nothing counts.
//!
//! An image whose refcounts are damaged offers them as free, and who takes one overwrites what is
//! in it.  Before space of the file as it was opened is used again, all tables are looked at once,
//! and such clusters are counted: nothing else of the damage is touched, and a check names it.

use std::collections::BTreeMap;
use std::ops::Range;

use super::Qcow2;
use super::metadata::damaged;
use super::refcount::{Refcounts, Step};
use super::snapshot_table::{Entry, SnapshotTable};
use crate::error::Result;
use crate::image::be64;

/// Clusters that are counted so at most, and runs of free clusters that are looked at.
const MOST: usize = 1 << 20;

/// References to clusters that nothing counts, by cluster.
type Uncounted = BTreeMap<u64, u64>;

impl Qcow2 {
    /// Counts what is in use and not counted, once, before free clusters of the old file are taken.
    ///
    /// The refcounts stay locked meanwhile: all who take clusters wait for this in any case, and
    /// what others give back must not become free, and be looked for here, after its entry was
    /// changed.
    pub(super) fn count_uncounted(&self, refcounts: &mut Refcounts) -> Result<()> {
        let file = &*self.file;
        if self.external().is_some() || !refcounts.is_to_reuse()? {
            return Ok(());
        }
        let end = file.size().div_ceil(self.layout.cluster_size());
        let mut free = Vec::new();
        refcounts.free_runs(end, &mut |run| {
            free.push(run);
            match free.len() > MOST {
                true => Err(damaged("there are too many pieces of free space")),
                false => Ok(()),
            }
        })?;
        let mut found = Uncounted::new();
        for (table, users) in self.second_level_tables()? {
            // What cannot be read is in nobody's use.
            let end = table + self.layout.cluster_size();
            let bytes = be64::read_bytes(file, table..end).unwrap_or_default();
            for (word, _) in self.layout.entries(&bytes) {
                self.add_uncounted(word, users, &free, &mut found);
            }
            if found.len() > MOST {
                return Err(damaged("too many clusters in use have refcount 0"));
            }
        }
        for cluster in found.keys() {
            if !refcounts.has_block(*cluster)? {
                let text = format!("cluster {cluster}, which is in use, has no refcount");
                return Err(damaged(&text));
            }
        }
        let most = refcounts.place().width.max();
        let runs = found.into_iter();
        let runs = runs.map(|(cluster, users)| (cluster..cluster + 1, users.min(most)));
        refcounts.step_each(runs, Step::Up)?;
        refcounts.all_is_counted();
        Ok(())
    }

    /// The second-level tables of the disk and of its snapshots, and how many of these use each.
    fn second_level_tables(&self) -> Result<BTreeMap<u64, u64>> {
        let snapshots = SnapshotTable::read(&*self.file, &self.header)?;
        let lists = snapshots.entries.iter().map(Entry::l1);
        let mut tables = BTreeMap::new();
        for list in lists.chain([self.tables.first_level()]) {
            let words = be64::read(&*self.file, list)?;
            let hosts = words.iter().filter_map(|w| self.layout.table(*w).ok()?);
            hosts.for_each(|host| *tables.entry(host).or_default() += 1);
        }
        Ok(tables)
    }

    /// Adds the clusters of an entry that are among the `free` ones.
    fn add_uncounted(&self, word: u64, users: u64, free: &[Range<u64>], found: &mut Uncounted) {
        let Ok(cluster) = self.layout.cluster(word) else {
            return;
        };
        for cluster in self.layout.clusters(&self.layout.host(cluster)) {
            let after = free.partition_point(|run| run.start <= cluster);
            if free[..after].last().is_some_and(|run| cluster < run.end) {
                *found.entry(cluster).or_default() += users;
            }
        }
    }
}

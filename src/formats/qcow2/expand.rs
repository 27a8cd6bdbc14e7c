//! Zero clusters made what version 2 can say: nothing, or zeroes.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::Qcow2;
use super::entry::{Cluster, Layout};
use super::refcount::Step;
use super::rewrite::{Needs, Rewrite, count_tables};
use super::snapshot_table::SnapshotTable;
use crate::error::{Error, Result};
use crate::image::units::Target;
use crate::image::{Image, Source, Wait, be64};
use crate::storage::{Zeroing, zero_or_write};
use crate::util::align::{down, len64};

/// Most entries of first-level tables of snapshots: 16 MiB of them.
const MAX_WORDS: u64 = 2 << 20;
/// Most clusters taken for zero clusters of snapshots; their offsets are 32 MiB.
const MAX_ZEROES: u64 = 4 << 20;

/// Whether a second-level entry is of a zero cluster; with the cluster that it keeps.
fn zero_cluster(layout: Layout, word: u64) -> Result<Option<Cluster>> {
    let cluster = layout.cluster(word)?;
    Ok(cluster.zero.then_some(cluster))
}

/// A table with zero clusters that first-level tables point at.
#[derive(Debug, Clone, Copy)]
struct Found {
    /// How often.
    times: u64,
    /// Its zero clusters.
    zeroes: u64,
}

/// The zero clusters of snapshots, and what is to be done about them.
#[derive(Debug)]
pub(super) struct Expansion {
    table: SnapshotTable,
    /// The disk's first-level table.
    active: Vec<u64>,
    /// The first-level tables of the snapshots.
    lists: Vec<Vec<u64>>,
    /// The tables that have zero clusters, by offset.
    found: BTreeMap<u64, Found>,
    /// Clusters that take the place of zero clusters; 0: nothing does, and nothing lies below.
    clusters: u64,
}

impl Expansion {
    fn carry_out(&mut self, rewrite: &mut Rewrite<'_>, layout: Layout) -> Result<()> {
        let mut moved = HashMap::new();
        for (host, found) in &self.found {
            let new = without_zeroes(rewrite, layout, *host, found.times, self.clusters > 0)?;
            moved.insert(*host, new);
        }
        let lists = self.lists.iter_mut();
        for word in lists.chain(std::iter::once(&mut self.active)).flatten() {
            if let Some(host) = layout.table(*word)?
                && let Some(new) = moved.get(&host)
            {
                *word = *word - host + new;
            }
        }
        rewrite.own_tables(&mut self.active)?;
        rewrite.replace_l1(&self.active)?;
        for (entry, l1) in self.table.entries.iter_mut().zip(&self.lists) {
            let host = rewrite.run();
            rewrite.write(be64::bytes(l1.iter().copied()), host)?;
            rewrite.release(entry.l1())?;
            entry.set_l1(host, entry.l1_len());
        }
        rewrite.replace_snapshots(&self.table)
    }
}

impl Qcow2 {
    /// The zero clusters of a second-level table.
    fn count_zeroes(&self, host: u64) -> Result<u64> {
        let mut count = 0;
        for (word, _) in self.layout.entries(&self.read_table(host)?) {
            count += u64::from(zero_cluster(self.layout, word)?.is_some());
        }
        Ok(count)
    }

    /// What is to be done about the zero clusters of snapshots; `None`: nothing.
    ///
    /// # Errors
    /// `Unsupported` where they are too many; `Corrupt`; the host's.
    pub(super) fn plan_expansion(&self) -> Result<Option<Expansion>> {
        let table = SnapshotTable::read(&*self.file, &self.header)?;
        if table.entries.is_empty() {
            return Ok(None);
        }
        let words: u64 = table.entries.iter().map(|e| u64::from(e.l1_len())).sum();
        if words > MAX_WORDS {
            return Err(Error::unsupported(format!(
                "compat=0.10: the L1 tables of snapshots have {words} entries (allowed: {MAX_WORDS})"
            )));
        }
        let active = self.active_l1()?;
        let lists = table.entries.iter();
        let lists = lists.map(|entry| be64::read(&*self.file, entry.l1()));
        let lists: Vec<Vec<u64>> = lists.collect::<Result<_>>()?;
        let found = self.tables_with_zeroes(lists.iter().chain(std::iter::once(&active)))?;
        if found.is_empty() {
            return Ok(None);
        }
        let clusters = self.clusters_instead_of(&found)?;
        Ok(Some(Expansion {
            table,
            active,
            lists,
            found,
            clusters,
        }))
    }

    /// Replaces zero clusters in all tables, those of snapshots and those shared with them: by
    /// nothing where nothing lies below the image, else by clusters that read as zeroes.  Without
    /// snapshots it does nothing.
    pub(super) fn expand_zeroes_of_snapshots(&mut self) -> Result<()> {
        let Some(mut plan) = self.plan_expansion()? else {
            return Ok(());
        };
        let mut runs = vec![len64(plan.active.len()) * 8];
        runs.extend(plan.lists.iter().map(|l1| len64(l1.len()) * 8));
        runs.push(len64(plan.table.encode()?.len()));
        let needs = Needs {
            tables: len64(plan.found.len()) + count_tables(&plan.active) + plan.clusters,
            runs: &runs,
            ..Needs::default()
        };
        let layout = self.layout;
        self.rewrite(&needs, |rewrite| plan.carry_out(rewrite, layout))
    }

    /// The tables that have zero clusters, by offset.
    fn tables_with_zeroes<'a>(
        &self,
        lists: impl Iterator<Item = &'a Vec<u64>>,
    ) -> Result<BTreeMap<u64, Found>> {
        let mut found: BTreeMap<u64, Found> = BTreeMap::new();
        let mut sound: HashSet<u64> = HashSet::new();
        for entry in lists.flatten() {
            let Some(host) = self.layout.table(*entry)? else {
                continue;
            };
            if let Some(found) = found.get_mut(&host) {
                found.times += 1;
            } else if !sound.contains(&host) {
                match self.count_zeroes(host)? {
                    0 => drop(sound.insert(host)),
                    zeroes => drop(found.insert(host, Found { times: 1, zeroes })),
                }
            }
        }
        Ok(found)
    }

    /// How many clusters take the place of zero clusters.
    fn clusters_instead_of(&self, found: &BTreeMap<u64, Found>) -> Result<u64> {
        if self.header.backing_name.is_none() {
            return Ok(0);
        }
        let count = found.values().map(|found| found.zeroes).sum();
        if count > MAX_ZEROES {
            return Err(Error::unsupported(format!(
                "compat=0.10: {count} zero clusters of snapshots hide the backing file (allowed: {MAX_ZEROES}; snapshot -d takes some away)"
            )));
        }
        Ok(count)
    }

    /// Replaces the disk's zero clusters: by nothing where nothing lies below, else by zeroes.
    pub(super) fn expand_zeroes(&self) -> Result<()> {
        let mut at = 0;
        while at < self.size() {
            let run = self.map(at, self.size() - at, Wait::Yes)?;
            let end = at + run.len;
            if matches!(run.source, Source::Zero) {
                self.expand(at..end)?;
            }
            at = end;
        }
        self.release_freed()
    }

    fn expand(&self, zeroes: std::ops::Range<u64>) -> Result<()> {
        if self.header.backing_name.is_none() {
            let start = down(zeroes.start, self.layout.cluster_size());
            return self.drop_range(&(start..zeroes.end), Target::Below);
        }
        self.store_zeroes(&zeroes)
    }
}

/// Writes a table again without its zero clusters, for the `times` words that point at it: where.
fn without_zeroes(
    rewrite: &mut Rewrite<'_>,
    layout: Layout,
    host: u64,
    times: u64,
    hides: bool,
) -> Result<u64> {
    let size = layout.cluster_size();
    let mut bytes = be64::read_bytes(rewrite.file(), host..host + size)?;
    layout.change_entries(&mut bytes, |word| {
        let Some(cluster) = zero_cluster(layout, word)? else {
            return Ok(word);
        };
        rewrite.step(&layout.host(cluster), times, Step::Down)?;
        match hides {
            true => zeroes_for(rewrite, times),
            false => Ok(0),
        }
    })?;
    let new = rewrite.write_table(&bytes)?;
    rewrite.step(&(new..new + size), times - 1, Step::Up)?;
    rewrite.step(&(host..host + size), times, Step::Down)?;
    Ok(new)
}

/// A cluster that reads as zeroes, counted `times` times: once for each way to it.
fn zeroes_for(rewrite: &mut Rewrite<'_>, times: u64) -> Result<u64> {
    let (file, host) = (rewrite.file(), rewrite.spare_cluster()?);
    let end = host + rewrite.header.cluster_size();
    zero_or_write(file, host..end, Zeroing::MayUnmap)?;
    if file.size() < end {
        file.write_at(&[0], end - 1)?;
    }
    rewrite.step(&(host..end), times - 1, Step::Up)?;
    Ok(host)
}

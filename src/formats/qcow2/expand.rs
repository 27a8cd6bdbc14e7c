//! Zero clusters made what version 2 can say: nothing, or zeroes.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::Qcow2;
use super::entry::{Cluster, Layout};
use super::refcount::Step;
use super::rewrite::{Needs, Rewrite};
use super::snapshot::{count_tables, replace_l1, replace_table, write_l1};
use super::snapshot_table::SnapshotTable;
use crate::error::{Error, Result};
use crate::image::units::{Target, Units};
use crate::image::{Image, Slot, Source, Wait};
use crate::storage::{Zeroing, zero_or_write};
use crate::util::align::{clamp_len, down, len64};
use crate::util::range;

/// Most entries of first-level tables of snapshots: 16 MiB of them.
const MAX_WORDS: u64 = 2 << 20;
/// Most clusters taken for zero clusters of snapshots; their offsets are 32 MiB.
const MAX_ZEROES: u64 = 4 << 20;

/// Whether a second-level entry is of a zero cluster; with the cluster that it keeps.
fn zero_cluster(layout: Layout, word: u64) -> Result<Option<Cluster>> {
    let cluster = layout.cluster(word)?;
    let zero = matches!(
        cluster,
        Cluster::Zero | Cluster::Standard { zero: true, .. }
    );
    Ok(zero.then_some(cluster))
}

/// What takes the place of a zero cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Instead {
    /// Nothing, and nothing lies below.
    Nothing,
    /// A cluster that reads as zeroes.
    Zeroes,
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
    instead: Instead,
    /// Clusters that take the place of zero clusters.
    clusters: u64,
}

impl Expansion {
    fn carry_out(&mut self, rewrite: &mut Rewrite<'_>, layout: Layout) -> Result<()> {
        let mut moved = HashMap::new();
        for (host, found) in &self.found {
            let new = without_zeroes(rewrite, layout, *host, found.times, self.instead)?;
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
        replace_l1(rewrite, &self.active)?;
        for (entry, l1) in self.table.entries.iter_mut().zip(&self.lists) {
            let host = rewrite.run();
            write_l1(rewrite, l1, host)?;
            let len = u64::from(entry.l1_len()) * 8;
            rewrite.release(entry.l1_offset()..entry.l1_offset() + len)?;
            entry.set_l1(host, entry.l1_len());
        }
        replace_table(rewrite, &self.table)
    }
}

impl Qcow2 {
    /// The zero clusters of a second-level table.
    fn count_zeroes(&self, host: u64) -> Result<u64> {
        let mut bytes = vec![0; clamp_len(self.layout.cluster_size(), usize::MAX)];
        self.file.read_at(&mut bytes, host)?;
        self.watcher.advance(len64(bytes.len()));
        let mut count = 0;
        for word in bytes.as_chunks::<8>().0 {
            let zero = zero_cluster(self.layout, u64::from_be_bytes(*word))?.is_some();
            count += u64::from(zero);
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
        let mut lists = Vec::new();
        for entry in &table.entries {
            lists.push(self.read_l1(entry.l1_offset(), entry.l1_len())?);
        }
        let found = self.tables_with_zeroes(lists.iter().chain(std::iter::once(&active)))?;
        if found.is_empty() {
            return Ok(None);
        }
        let (instead, clusters) = self.instead_of(&found)?;
        Ok(Some(Expansion {
            table,
            active,
            lists,
            found,
            instead,
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
            refcount_order: self.header.refcount_order,
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

    /// What takes the place of zero clusters, and how many clusters that needs.
    fn instead_of(&self, found: &BTreeMap<u64, Found>) -> Result<(Instead, u64)> {
        if self.header.backing_name.is_none() {
            return Ok((Instead::Nothing, 0));
        }
        let count = found.values().map(|found| found.zeroes).sum();
        if count > MAX_ZEROES {
            return Err(Error::unsupported(format!(
                "compat=0.10: {count} zero clusters of snapshots hide the backing file (allowed: {MAX_ZEROES}; snapshot -d takes some away)"
            )));
        }
        Ok((Instead::Zeroes, count))
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
        let mut at = zeroes.start;
        while at < zeroes.end {
            let mut fill = |slot: Slot<'_>| {
                let end = slot.host + range::len(&slot.guest);
                match slot.zeroed {
                    true => Ok(()),
                    false => zero_or_write(slot.storage, slot.host..end, Zeroing::KeepSpace),
                }
            };
            at += self
                .allocator()?
                .allocate(self, at..zeroes.end, &mut fill)?;
        }
        Ok(())
    }
}

/// Writes a table again without its zero clusters, for the `times` words that point at it: where.
fn without_zeroes(
    rewrite: &mut Rewrite<'_>,
    layout: Layout,
    host: u64,
    times: u64,
    instead: Instead,
) -> Result<u64> {
    let size = layout.cluster_size();
    let mut bytes = vec![0; clamp_len(size, usize::MAX)];
    rewrite.file().read_at(&mut bytes, host)?;
    for word in bytes.as_chunks_mut::<8>().0 {
        if let Some(cluster) = zero_cluster(layout, u64::from_be_bytes(*word))? {
            *word = match instead {
                Instead::Nothing => [0; 8],
                Instead::Zeroes => zeroes_for(rewrite, times)?.to_be_bytes(),
            };
            if let Cluster::Standard { host, .. } = cluster {
                for _ in 0..times {
                    rewrite.release(host..host + size)?;
                }
            }
        }
    }
    let new = rewrite.write_table(&bytes)?;
    use_again(rewrite, new, times - 1)?;
    for _ in 0..times {
        rewrite.release(host..host + size)?;
    }
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
    use_again(rewrite, host, times - 1)?;
    Ok(host)
}

/// Counts a cluster up.
fn use_again(rewrite: &mut Rewrite<'_>, host: u64, times: u64) -> Result<()> {
    let (file, cluster) = (rewrite.file(), host >> rewrite.header.cluster_bits);
    let mut uses = 0..times;
    uses.try_for_each(|_| rewrite.counts.step(file, cluster..cluster + 1, Step::Up))
}

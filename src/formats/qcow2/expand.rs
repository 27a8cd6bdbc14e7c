//! Zero clusters made what version 2 can say: nothing, or zeroes.

use std::collections::{HashMap, HashSet};

use super::Qcow2;
use super::entry::{Cluster, Layout};
use super::refcount::Step;
use super::rewrite::{Needs, Rewrite};
use super::snapshot::{count_tables, replace_l1, replace_table, write_l1};
use super::snapshot_table::SnapshotTable;
use super::space::Become;
use crate::error::{Error, Result};
use crate::image::{Image, Slot, Source, Wait};
use crate::storage::{Zeroing, zero_or_write};
use crate::util::align::{clamp_len, down, len64};
use crate::util::range;

/// Most entries of first-level tables of snapshots: 16 MiB of them.
const MAX_WORDS: u64 = 2 << 20;

/// Whether a second-level entry is of a zero cluster; with the cluster that it keeps.
fn zero_cluster(layout: Layout, word: u64) -> Result<Option<Cluster>> {
    let cluster = layout.cluster(word)?;
    let zero = matches!(
        cluster,
        Cluster::Zero | Cluster::Standard { zero: true, .. }
    );
    Ok(zero.then_some(cluster))
}

impl Qcow2 {
    /// Whether a table that `l1` points at has zero clusters.
    pub(super) fn has_zero_clusters(&self, l1: &[u64]) -> Result<bool> {
        for entry in l1 {
            if let Some(host) = self.layout.table(*entry)?
                && self.table_has_zeroes(host)?
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn table_has_zeroes(&self, host: u64) -> Result<bool> {
        let mut bytes = vec![0; clamp_len(self.layout.cluster_size(), usize::MAX)];
        self.file.read_at(&mut bytes, host)?;
        for word in bytes.as_chunks::<8>().0 {
            if zero_cluster(self.layout, u64::from_be_bytes(*word))?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Replaces zero clusters by nothing in all tables, those of snapshots and those shared with
    /// them.  Nothing lies below the image; without snapshots it does nothing.
    pub(super) fn expand_zeroes_of_snapshots(&mut self) -> Result<()> {
        let mut table = SnapshotTable::read(&*self.file, &self.header)?;
        if table.entries.is_empty() || self.header.backing_name.is_some() {
            return Ok(());
        }
        let words: u64 = table.entries.iter().map(|e| u64::from(e.l1_len())).sum();
        if words > MAX_WORDS {
            return Err(Error::unsupported(format!(
                "compat=0.10: the L1 tables of snapshots have {words} entries (allowed: {MAX_WORDS})"
            )));
        }
        let mut active = self.active_l1()?;
        let mut lists = Vec::new();
        for entry in &table.entries {
            lists.push(self.read_l1(entry.l1_offset(), entry.l1_len())?);
        }
        // How often each table that has zero clusters is pointed at.
        let mut times: HashMap<u64, u64> = HashMap::new();
        let mut sound: HashSet<u64> = HashSet::new();
        for entry in lists.iter().chain(std::iter::once(&active)).flatten() {
            let Some(host) = self.layout.table(*entry)? else {
                continue;
            };
            if let Some(count) = times.get_mut(&host) {
                *count += 1;
            } else if !sound.contains(&host) {
                if self.table_has_zeroes(host)? {
                    times.insert(host, 1);
                } else {
                    sound.insert(host);
                }
            }
        }
        if times.is_empty() {
            return Ok(());
        }
        let mut runs = vec![len64(active.len()) * 8];
        runs.extend(lists.iter().map(|l1| len64(l1.len()) * 8));
        runs.push(len64(table.encode()?.len()));
        let needs = Needs {
            tables: len64(times.len()) + count_tables(&active),
            runs: &runs,
            refcount_order: self.header.refcount_order,
        };
        let layout = self.layout;
        self.rewrite(&needs, |rewrite| {
            let mut moved = HashMap::new();
            for (host, times) in times {
                moved.insert(host, without_zeroes(rewrite, layout, host, times)?);
            }
            for word in lists
                .iter_mut()
                .chain(std::iter::once(&mut active))
                .flatten()
            {
                if let Some(host) = layout.table(*word)?
                    && let Some(new) = moved.get(&host)
                {
                    *word = *word - host + new;
                }
            }
            rewrite.own_tables(&mut active)?;
            replace_l1(rewrite, &active)?;
            for (entry, l1) in table.entries.iter_mut().zip(&lists) {
                let host = rewrite.run();
                write_l1(rewrite, l1, host)?;
                let len = u64::from(entry.l1_len()) * 8;
                rewrite.release(entry.l1_offset()..entry.l1_offset() + len)?;
                entry.set_l1(host, entry.l1_len());
            }
            replace_table(rewrite, &table)
        })
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
            return self.each_cluster(&(start..zeroes.end), Become::Unallocated);
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
            at += self.allocate_range(at, zeroes.end - at, &mut fill)?;
        }
        Ok(())
    }
}

/// Writes a table again without its zero clusters, for the `times` words that point at it: where.
fn without_zeroes(rewrite: &mut Rewrite<'_>, layout: Layout, host: u64, times: u64) -> Result<u64> {
    let size = layout.cluster_size();
    let mut bytes = vec![0; clamp_len(size, usize::MAX)];
    rewrite.file().read_at(&mut bytes, host)?;
    for word in bytes.as_chunks_mut::<8>().0 {
        if let Some(cluster) = zero_cluster(layout, u64::from_be_bytes(*word))? {
            *word = [0; 8];
            if let Cluster::Standard { host, .. } = cluster {
                for _ in 0..times {
                    rewrite.release(host..host + size)?;
                }
            }
        }
    }
    let new = rewrite.write_table(&bytes)?;
    let cluster = new >> layout.cluster_bits;
    for _ in 1..times {
        let file = rewrite.file();
        rewrite.counts.step(file, cluster..cluster + 1, Step::Up)?;
    }
    for _ in 0..times {
        rewrite.release(host..host + size)?;
    }
    Ok(new)
}

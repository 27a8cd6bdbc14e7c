//! From a guest offset to a place: the two table levels, merged into runs.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::entry::{Cluster, Layout, SUBCLUSTERS};
use crate::error::{Error, ErrorKind, Result};
use crate::image::Wait;
use crate::image::units::{Content, Space};
use crate::image::words::{Endian, Words};
use crate::storage::Storage;
use crate::util::range;

/// Bytes of table in one cached page.
const PAGE: u64 = 4096;
/// Pages cached: 16 MiB of tables, which cover 128 GiB of clusters of 64 KiB.
const PAGES: usize = 4096;
/// Clusters that one look-up merges at most.
const MERGE: u64 = 4096;

/// Where a run of guest bytes is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// The layer below has it.
    Below,
    /// Zeroes.
    Zero,
    /// At `host` of the data file; `copied` allows changes in place.
    Stored {
        /// Offset in the data file.
        host: u64,
        /// Nothing else refers to it.
        copied: bool,
    },
    /// Compressed.
    Compressed,
}

impl Place {
    fn stored(cluster: Cluster, host: u64) -> Self {
        let copied = matches!(cluster.space, Space::Own(_));
        Self::Stored { host, copied }
    }
}

/// A run of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Found {
    /// Bytes from the offset asked for.
    pub(super) len: u64,
    /// Where they are.
    pub(super) place: Place,
}

/// A first-level table and the second-level tables it points at.
#[derive(Debug)]
pub(super) struct Tables {
    layout: Layout,
    l2_bits: u32,
    l1_start: AtomicU64,
    l1_end: AtomicU64,
    file: Arc<dyn Storage>,
    words: Words<AtomicU64>,
    /// Whether guest data is in another file, where offset 0 is as good as any.
    data_file: bool,
}

impl Tables {
    /// The tables that the first-level one at `l1` of `file` leads to.
    pub(super) fn new(
        file: Arc<dyn Storage>,
        layout: Layout,
        l2_bits: u32,
        l1: &Range<u64>,
        data_file: bool,
    ) -> Self {
        let words = Words::new(PAGE, PAGES, Endian::Big);
        let tables = Self {
            file,
            layout,
            l2_bits,
            l1_start: AtomicU64::new(0),
            l1_end: AtomicU64::new(0),
            words,
            data_file,
        };
        tables.move_first_level(l1);
        tables
    }

    /// Where the first-level table is.
    pub(super) fn first_level(&self) -> Range<u64> {
        self.l1_start.load(Ordering::Acquire)..self.l1_end.load(Ordering::Acquire)
    }

    /// From now on the first-level table is elsewhere.  No request is under way.
    pub(super) fn move_first_level(&self, to: &Range<u64>) {
        self.words.forget(0..u64::MAX);
        self.l1_start.store(to.start, Ordering::Release);
        self.l1_end.store(to.end, Ordering::Release);
    }

    /// Entry `index` of the first-level table.
    pub(super) fn l1_entry(&self, index: u64, wait: Wait) -> Result<u64> {
        let table = self.first_level();
        let len = range::len(&table) / 8;
        if index >= len {
            return Err(Error::corrupt(format!(
                "L1 entry {index} is needed (the table has {len})"
            )));
        }
        self.words.get(&*self.file, table.start + index * 8, wait)
    }

    /// Offset of the entry of `at` in its second-level table; `None` where there is no table.
    pub(super) fn entry_offset(&self, at: u64, wait: Wait) -> Result<Option<u64>> {
        let cluster = at >> self.layout.cluster_bits;
        let l1 = self.l1_entry(cluster >> self.l2_bits, wait)?;
        let Some(table) = self.layout.table(l1)? else {
            return Ok(None);
        };
        // Missing entries would read as zeroes, and their data as lost.
        if table + self.layout.cluster_size() > self.file.size() {
            return Err(Error::corrupt(format!(
                "the L2 table of {at:#x} is at {table:#x}, and is not whole (the file ends at {:#x})",
                self.file.size()
            )));
        }
        let index = cluster & ((1 << self.l2_bits) - 1);
        Ok(Some(table + index * self.layout.entry_len()))
    }

    /// The first word of the entry at `host`, decoded.
    pub(super) fn cluster(&self, host: u64, wait: Wait) -> Result<Cluster> {
        self.decode(self.words.get(&*self.file, host, wait)?, host)
    }

    fn decode(&self, word: u64, host: u64) -> Result<Cluster> {
        let cluster = self.layout.cluster(word)?;
        if cluster.whole() == Some(0) && !self.data_file {
            return Err(Error::corrupt(format!(
                "the L2 entry at {host:#x} points at the header (allowed: a cluster after it)"
            )));
        }
        Ok(cluster)
    }

    /// Whether the entries from that of `at` on, all of one second-level table, are `words`.
    pub(super) fn holds(&self, at: u64, words: &[u64]) -> Result<bool> {
        let Some(first) = self.entry_offset(at, Wait::Yes)? else {
            return Ok(words.iter().all(|word| *word == 0));
        };
        for (entry, word) in (first..).step_by(8).zip(words) {
            if self.words.get(&*self.file, entry, Wait::Yes)? != *word {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Writes entries of one second-level table to the file from `host` on, then shows them.
    pub(super) fn publish(&self, host: u64, words: &[u64]) -> Result<()> {
        self.words.publish(&*self.file, host, words)
    }

    /// Writes entry `index` of the first-level table to the file, then shows it.
    pub(super) fn publish_l1(&self, index: u64, word: u64) -> Result<()> {
        let host = self.first_level().start + index * 8;
        self.words.publish(&*self.file, host, &[word])
    }

    /// Forgets what it knows of a range that is about to be written by other means.
    pub(super) fn forget(&self, host: Range<u64>) {
        self.words.forget(host);
    }

    /// The second word of the entry at `host`: the bits of its subclusters; 0 without them.
    pub(super) fn bits(&self, host: u64, wait: Wait) -> Result<u64> {
        if self.layout.extended {
            self.words.get(&*self.file, host + 8, wait)
        } else {
            Ok(0)
        }
    }

    /// The run at `at`, looking no further than `len` and the end of the second-level table.
    pub(super) fn find(&self, at: u64, len: u64, wait: Wait) -> Result<Found> {
        let cluster_size = self.layout.cluster_size();
        let covered = cluster_size << self.l2_bits;
        let in_table = covered - at % covered;
        let len = len.min(in_table).min(MERGE * cluster_size);
        let Some(first) = self.entry_offset(at, wait)? else {
            return Ok(Found {
                len,
                place: Place::Below,
            });
        };
        let mut found: Option<Found> = None;
        let mut next = at;
        let end = at + len;
        while next < end {
            let entries = (next >> self.layout.cluster_bits) - (at >> self.layout.cluster_bits);
            let entry = first + entries * self.layout.entry_len();
            let part = self.find_in_cluster(entry, next, end, wait)?;
            match &mut found {
                None => found = Some(part),
                Some(run) if continues(run, &part) => run.len += part.len,
                Some(_) => break,
            }
            next += part.len;
        }
        Ok(found.unwrap_or(Found {
            len,
            place: Place::Below,
        }))
    }

    /// The run at `at` within the cluster that the entry at `entry` describes.
    fn find_in_cluster(&self, entry: u64, at: u64, end: u64, wait: Wait) -> Result<Found> {
        let size = self.layout.cluster_size();
        let within = at % size;
        let rest = (size - within).min(end - at);
        let (cluster, bits) = match self.layout.extended {
            true => self.both(entry, wait)?,
            false => (self.cluster(entry, wait)?, 0),
        };
        if self.layout.extended && cluster.packed().is_none() {
            return self.find_subclusters(&cluster, bits, within, rest);
        }
        let place = match cluster.space {
            _ if cluster.zero => Place::Zero,
            Space::None => Place::Below,
            Space::Own(host) | Space::Shared(host) => Place::stored(cluster, host + within),
            Space::Encoded { .. } => Place::Compressed,
        };
        Ok(Found { len: rest, place })
    }

    /// Both words of an extended entry, as one change left them: the bits of one change say
    /// nothing about the place of another.
    fn both(&self, entry: u64, wait: Wait) -> Result<(Cluster, u64)> {
        let cluster = self.cluster(entry, wait)?;
        let bits = self.bits(entry, wait)?;
        let (stored, zero) = (bits & u64::from(u32::MAX), bits >> SUBCLUSTERS);
        let agree = stored & zero == 0 && (stored == 0 || cluster.space != Space::None);
        if agree && self.cluster(entry, wait)? == cluster {
            return Ok((cluster, bits));
        }
        if wait == Wait::No {
            return Err(Error::new(
                ErrorKind::WouldBlock,
                "the entry is being changed",
            ));
        }
        let [word, bits] = self.words.pair(&*self.file, entry)?;
        Ok((self.decode(word, entry)?, bits))
    }

    fn find_subclusters(
        &self,
        cluster: &Cluster,
        bits: u64,
        within: u64,
        rest: u64,
    ) -> Result<Found> {
        let unit = self.layout.subcluster_size();
        let kind_at = |offset: u64| {
            let index = u32::try_from(offset / unit).unwrap_or(u32::MAX);
            self.layout.subcluster(cluster, bits, index)
        };
        let kind = kind_at(within)?;
        let mut len = unit - within % unit;
        while len < rest && kind_at(within + len)? == kind {
            len += unit;
        }
        let place = match (kind, cluster.whole()) {
            (Content::Zero, _) => Place::Zero,
            (Content::Stored, Some(host)) => Place::stored(*cluster, host + within),
            _ => Place::Below,
        };
        Ok(Found {
            len: len.min(rest),
            place,
        })
    }
}

/// Whether `next` continues the run: the same kind and, where stored, next in the file.
fn continues(run: &Found, next: &Found) -> bool {
    match (run.place, next.place) {
        (Place::Stored { host, copied }, Place::Stored { host: h, copied: c }) => {
            copied == c && host.checked_add(run.len) == Some(h)
        }
        (a, b) => a == b,
    }
}

//! Entries that name clusters behind the end of the file as it was opened.
//!
//! A file that was cut has such, and they are errors: until the file grows, when what others write
//! there would show through them, and be written over.  So a table is looked at once before its
//! first change, and one that nobody has changed has nothing behind that end.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Qcow2;
use crate::error::{Error, Result};
use crate::image::be64;
use crate::util::align::clamp_len;

/// Where the file ended, and which tables were looked at since.
#[derive(Debug)]
pub(super) struct Behind {
    /// In whole clusters.
    end: AtomicU64,
    /// A bit for each entry of the first-level table as it was opened.
    tables: Box<[AtomicU64]>,
}

impl Behind {
    /// Of a file that ends at `end`, in whole clusters, with a first-level table of `len` entries.
    pub(super) fn new(end: u64, len: u64) -> Self {
        let words = clamp_len(len.div_ceil(64), usize::MAX);
        Self {
            end: AtomicU64::new(end),
            tables: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// The file ends there now, and its tables may have been changed by other means.
    pub(super) fn renew(&self, end: u64) {
        self.tables
            .iter()
            .for_each(|w| w.store(0, Ordering::Relaxed));
        self.end.store(end, Ordering::Release);
    }

    fn end(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }

    /// Whether the table of a first-level entry was looked at; one that is new needs no look.
    fn is_seen(&self, l1_index: u64) -> bool {
        let word = self.tables.get(clamp_len(l1_index / 64, usize::MAX));
        word.is_none_or(|w| w.load(Ordering::Acquire) & 1 << (l1_index % 64) != 0)
    }

    fn see(&self, l1_index: u64) {
        if let Some(word) = self.tables.get(clamp_len(l1_index / 64, usize::MAX)) {
            word.fetch_or(1 << (l1_index % 64), Ordering::AcqRel);
        }
    }
}

impl Qcow2 {
    /// Before the first change of the table at `host`, if there is one: refuses it where it names
    /// data that the file did not have.
    pub(super) fn look_behind(&self, l1_index: u64, host: Option<u64>) -> Result<()> {
        let behind = &self.writer()?.behind;
        if self.external().is_some() || behind.is_seen(l1_index) {
            return Ok(());
        }
        if let Some(host) = host {
            let end = behind.end();
            let bytes = be64::read_bytes(&*self.file, host..host + self.layout.cluster_size())?;
            for (index, (word, bits)) in (0..).zip(self.layout.entries(&bytes)) {
                if let Some(found) = self.named_behind(word, bits, end) {
                    let units = l1_index << self.header.l2_bits();
                    return Err(behind_at(
                        (units + index) << self.layout.cluster_bits,
                        found,
                        end,
                    ));
                }
            }
        }
        behind.see(l1_index);
        Ok(())
    }

    /// The tables were changed by other means: from now on the file ends where it does.
    pub(super) fn renew_behind(&self) {
        if let Some(writer) = &self.writer {
            let end = self
                .file
                .size()
                .next_multiple_of(self.layout.cluster_size());
            writer.behind.renew(end);
        }
    }

    /// Where the data of an entry is, if that is behind `end`; zeroes need no bytes there.
    fn named_behind(&self, word: u64, bits: u64, end: u64) -> Option<u64> {
        let cluster = self.layout.cluster(word).ok()?;
        let host = self.layout.host(cluster);
        let empty = self.layout.extended && cluster.packed().is_none() && bits << 32 == 0;
        (!cluster.zero && !empty && !host.is_empty() && host.start >= end).then_some(host.start)
    }

    /// How many of `len` bytes at `host`, where the entry of `at` says that its data is, may be
    /// there: all where its table was looked at, else those that the file had.
    pub(super) fn not_behind(&self, host: u64, len: u64, at: u64) -> Result<u64> {
        let Some(behind) = self.writer.as_ref().map(|w| &w.behind) else {
            return Ok(len);
        };
        let end = behind.end();
        let l1_index = at >> self.layout.cluster_bits >> self.header.l2_bits();
        if host + len <= end || self.external().is_some() || behind.is_seen(l1_index) {
            return Ok(len);
        }
        match end.saturating_sub(host) {
            0 => Err(behind_at(at, host, end)),
            len => Ok(len),
        }
    }
}

fn behind_at(at: u64, host: u64, end: u64) -> Error {
    Error::corrupt(format!(
        "the cluster of {at:#x} is at {host:#x} (the file ended at {end:#x} when it was opened)"
    ))
}

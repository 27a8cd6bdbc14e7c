//! Where the metadata is that guest data must never overwrite, whatever tables and refcounts say.
//!
//! Header, first-level table, refcount table, refcount blocks, and the active second-level tables;
//! the snapshot table and the tables of snapshots; bitmaps.  Learnt before the first change; looked
//! up without a lock with each overwrite.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;

use super::Qcow2;
use super::metadata::{Fixed, Subject};
use super::refblock::Place;
use crate::error::{Error, Result};
use crate::util::align::{clamp_len, down, len64};

/// Clusters kept one by one at most, 16 MiB of them; what is beyond is not guarded.
const MAX_KEPT: usize = 1 << 20;
/// In a slot: never used.
const EMPTY: u64 = 0;
/// In a slot: no longer used.
const GONE: u64 = 1;

/// Host offsets in a table with open addressing, at least half of it empty.
#[derive(Debug)]
struct Slots {
    words: Box<[AtomicU64]>,
}

impl Slots {
    /// With room for as many more as these.
    fn of(hosts: &[u64]) -> Self {
        let len = (hosts.len().max(16) * 4).next_power_of_two();
        let words = (0..len).map(|_| AtomicU64::new(EMPTY)).collect();
        let slots = Self { words };
        hosts.iter().for_each(|host| slots.insert(*host));
        slots
    }

    /// The slots in the order in which `host` looks for its own.
    fn probe(&self, host: u64) -> impl Iterator<Item = &AtomicU64> {
        let len = self.words.len();
        let hash = (host >> 9).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
        let first = clamp_len(hash % len64(len), len - 1);
        self.words[first..].iter().chain(&self.words[..first])
    }

    fn find(&self, host: u64) -> Option<&AtomicU64> {
        for word in self.probe(host) {
            match word.load(Ordering::Acquire) {
                EMPTY => return None,
                found if found == host => return Some(word),
                _ => {}
            }
        }
        None
    }

    fn insert(&self, host: u64) {
        let free = |w: &&AtomicU64| w.load(Ordering::Acquire) <= GONE;
        if let Some(word) = self.probe(host).find(free) {
            word.store(host, Ordering::Release);
        }
    }

    fn kept(&self) -> Vec<u64> {
        let words = self.words.iter().map(|w| w.load(Ordering::Acquire));
        words.filter(|w| *w > GONE).collect()
    }
}

/// What is guarded.
#[derive(Debug, Default)]
pub(super) struct Guard {
    slots: ArcSwapOption<Slots>,
    /// What stays where it is until it is all learnt again.
    fixed: ArcSwapOption<Fixed>,
    /// Slots that were used since they were made; held while they change.
    used: Mutex<usize>,
    reftable_start: AtomicU64,
    reftable_end: AtomicU64,
}

impl Guard {
    /// Whether a cluster is one of those kept one by one, or of what else is guarded.
    fn contains(&self, host: u64) -> bool {
        let (slots, fixed) = (self.slots.load(), self.fixed.load());
        self.refcount_table().contains(&host)
            || slots.as_ref().is_some_and(|s| s.find(host).is_some())
            || fixed.as_ref().is_some_and(|f| f.contains(host))
    }

    /// Forgets everything, and guards these clusters from now on.
    pub(super) fn learn(&self, kept: &[u64], fixed: Fixed) {
        let mut used = self.used.lock();
        *used = kept.len().min(MAX_KEPT);
        self.slots.store(Some(Arc::new(Slots::of(&kept[..*used]))));
        self.fixed.store(Some(Arc::new(fixed)));
    }

    /// Guards a cluster from now on.
    pub(super) fn insert(&self, host: u64) {
        let mut used = self.used.lock();
        let slots = self.slots.load();
        let full = slots.as_ref().is_none_or(|s| *used * 2 >= s.words.len());
        if full {
            let kept = slots.as_ref().map_or_else(Vec::new, |s| s.kept());
            *used = kept.len();
            self.slots.store(Some(Arc::new(Slots::of(&kept))));
        }
        if let Some(slots) = self.slots.load().as_ref()
            && *used < MAX_KEPT
        {
            slots.insert(host);
            *used += 1;
        }
    }

    /// Guards a cluster no longer.
    pub(super) fn remove(&self, host: u64) {
        let _used = self.used.lock();
        let slots = self.slots.load();
        if let Some(word) = slots.as_ref().and_then(|s| s.find(host)) {
            word.store(GONE, Ordering::Release);
        }
    }

    /// Where the refcount table is now.
    pub(super) fn set_refcount_table(&self, place: Place) {
        let table = place.table_range();
        self.reftable_start.store(table.start, Ordering::Release);
        self.reftable_end.store(table.end, Ordering::Release);
    }

    /// Where it is.
    pub(super) fn refcount_table(&self) -> Range<u64> {
        self.reftable_start.load(Ordering::Acquire)..self.reftable_end.load(Ordering::Acquire)
    }
}

impl Qcow2 {
    /// Whether metadata that is in use lies in the cluster at `host` of the image file.
    pub(super) fn is_metadata(&self, host: u64) -> bool {
        let Some(writer) = &self.writer else {
            return false;
        };
        let size = self.layout.cluster_size();
        let host = down(host, size);
        host < size || self.tables.first_level().contains(&host) || writer.guard.contains(host)
    }

    /// As `is_metadata`, of an offset where guest data is: it may be that of another file.
    pub(super) fn is_guarded(&self, host: u64) -> bool {
        self.external().is_none() && self.is_metadata(host)
    }

    /// How many of `len` bytes at `host` come before the first cluster that is guarded.
    pub(super) fn unguarded(&self, host: u64, len: u64) -> u64 {
        let size = self.layout.cluster_size();
        let starts = (down(host, size)..host + len).step_by(clamp_len(size, usize::MAX));
        let guarded = starts.into_iter().find(|start| self.is_guarded(*start));
        guarded.map_or(len, |start| start.saturating_sub(host))
    }

    /// Whether guest data is not at its own offset `at` in an external data file, but at `host`.
    pub(super) fn is_misplaced(&self, host: u64, at: u64) -> bool {
        host != at && self.external().is_some()
    }

    /// The error for a write that metadata is in the way of.
    pub(super) fn metadata_at(&self, host: u64) -> Error {
        Error::corrupt(format!(
            "a write would go to {host:#x}, where metadata is in use; check names the damage"
        ))
    }

    /// Learns where the metadata is, and refuses an image whose metadata is damaged: what is
    /// refused here is what a check names.
    pub(super) fn guard_metadata(&self, place: Place) -> Result<()> {
        let subject = Subject {
            file: &*self.file,
            header: &self.header,
            l1: self.tables.first_level(),
            refcounts: place,
            directory: self.directory()?,
        };
        subject.learn(&self.writer()?.guard)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_guarded_is_found_until_it_is_let_go() {
        let guard = Guard::default();
        (1..5000u64).for_each(|i| guard.insert(i << 16));
        (1..5000u64).for_each(|i| assert!(guard.contains(i << 16), "{i}"));
        assert!(!guard.contains(5000 << 16));
        (1..5000u64).for_each(|i| guard.remove(i << 16));
        assert!((1..5000u64).all(|i| !guard.contains(i << 16)));
        for round in 0..10_000u64 {
            guard.insert(round << 16);
            guard.remove(round << 16);
        }
        let len = guard.slots.load().as_ref().map(|s| s.words.len());
        assert!(len.is_some_and(|len| len < 1 << 16), "{len:?}");
    }
}

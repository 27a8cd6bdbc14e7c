//! Where the metadata is that guest data must never overwrite, whatever tables and refcounts say.
//!
//! Header, first-level table, refcount table, refcount blocks, and the active second-level tables;
//! the snapshot table and the tables of snapshots; bitmaps.  Learnt before the first change; looked
//! up without a lock with each overwrite.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;

use super::Qcow2;
use super::bitmap_dir::Directory;
use super::entry::Layout;
use super::guard_fixed::Fixed;
use super::header::{Header, MAX_REFTABLE_BYTES};
use super::refcount::Place;
use crate::error::{Error, Result};
use crate::storage::Storage;
use crate::util::align::{clamp_len, down, len64};
use crate::util::range::intersect;

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
    fn new(count: usize) -> Self {
        let len = (count.max(16) * 4).next_power_of_two();
        Self {
            words: (0..len).map(|_| AtomicU64::new(EMPTY)).collect(),
        }
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

    fn kept(&self) -> impl Iterator<Item = u64> {
        let words = self.words.iter().map(|w| w.load(Ordering::Acquire));
        words.filter(|w| *w > GONE)
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
    /// Whether a cluster is one of those kept one by one, or of the refcount table.
    fn contains(&self, host: u64) -> bool {
        self.refcount_table().contains(&host) || self.is_kept(host) || self.is_fixed(host)
    }

    /// Whether a cluster is one of those kept one by one.
    pub(super) fn is_kept(&self, host: u64) -> bool {
        let slots = self.slots.load();
        slots.as_ref().is_some_and(|s| s.find(host).is_some())
    }

    fn is_fixed(&self, host: u64) -> bool {
        let fixed = self.fixed.load();
        fixed.as_ref().is_some_and(|f| f.contains(host))
    }

    /// The clusters kept one by one.
    pub(super) fn kept(&self) -> Vec<u64> {
        let slots = self.slots.load();
        slots.as_ref().map_or_else(Vec::new, |s| s.kept().collect())
    }

    /// Guards a cluster from now on.
    pub(super) fn insert(&self, host: u64) {
        let mut used = self.used.lock();
        let full = match self.slots.load().as_ref() {
            None => true,
            Some(slots) => *used * 2 >= slots.words.len(),
        };
        if full {
            let kept: Vec<u64> = match self.slots.load().as_ref() {
                None => Vec::new(),
                Some(slots) => slots.kept().collect(),
            };
            let new = Slots::new(kept.len() + 1);
            kept.iter().for_each(|host| new.insert(*host));
            *used = kept.len();
            self.slots.store(Some(std::sync::Arc::new(new)));
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
        let len = place.table_clusters << place.cluster_bits;
        self.reftable_start.store(place.table, Ordering::Release);
        self.reftable_end
            .store(place.table.saturating_add(len), Ordering::Release);
    }

    /// Where it is.
    pub(super) fn refcount_table(&self) -> Range<u64> {
        self.reftable_start.load(Ordering::Acquire)..self.reftable_end.load(Ordering::Acquire)
    }

    /// Forgets everything.
    fn clear(&self) {
        let mut used = self.used.lock();
        *used = 0;
        self.slots.store(None);
        self.fixed.store(None);
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
        host < size || self.l1_range().contains(&host) || writer.guard.contains(host)
    }

    /// As `is_metadata`, of an offset where guest data is: it may be that of another file.
    pub(super) fn is_guarded(&self, host: u64) -> bool {
        self.external().is_none() && self.is_metadata(host)
    }

    /// Whether guest data is not at its own offset `at` in an external data file, but at `host`.
    pub(super) fn is_misplaced(&self, host: u64, at: u64) -> bool {
        host != at && self.external().is_some()
    }

    pub(super) fn l1_range(&self) -> Range<u64> {
        let table = self.tables.first_level();
        table.offset..table.offset.saturating_add(table.len * 8)
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
            layout: self.layout,
            l1: self.l1_range(),
            refcounts: place,
            directory: self.directory()?,
        };
        subject.learn(&self.writer()?.guard)
    }
}

/// What a guard learns from.
#[derive(Debug)]
pub(super) struct Subject<'a> {
    pub(super) file: &'a dyn Storage,
    pub(super) header: &'a Header,
    pub(super) layout: Layout,
    /// The active first-level table.
    pub(super) l1: Range<u64>,
    /// Where the refcounts are.
    pub(super) refcounts: Place,
    pub(super) directory: Directory,
}

/// Refuses the image in `file` where opening it for writing, or the first change, would.
pub(super) fn judge(file: &dyn Storage) -> Result<()> {
    let header = Header::read(file)?;
    let len = u64::from(header.l1_len) * 8;
    let subject = Subject {
        file,
        header: &header,
        layout: header.layout(),
        l1: header.l1_offset..header.l1_offset.saturating_add(len),
        refcounts: Place::of(&header),
        directory: Directory::read(file, &header)?,
    };
    subject.learn(&Guard::default())
}

impl Subject<'_> {
    fn learn(&self, guard: &Guard) -> Result<()> {
        guard.clear();
        guard.set_refcount_table(self.refcounts);
        if let Some(fault) = self.header.faults().first() {
            return Err(damaged(fault));
        }
        let (size, l1) = (self.layout.cluster_size(), &self.l1);
        let reftable = self.refcount_table();
        // A disk of no bytes has no table.
        let l1_in_header = !l1.is_empty() && l1.start < size;
        if intersect(l1, &reftable).is_some() || l1_in_header || reftable.start < size {
            return Err(overlap(reftable.start));
        }
        for (what, range) in [("the L1 table", l1), ("the refcount table", &reftable)] {
            if !self.layout.is_inside(range, self.file.size()) {
                let text = format!("{what} ends at {:#x}, past the end of the file", range.end);
                return Err(damaged(&text));
            }
        }
        for (index, word) in addresses(self.file, l1.clone())?.into_iter().enumerate() {
            let host = self.second_level(&format_args!("the L1 table"), index, word)?;
            host.map_or(Ok(()), |host| self.keep(guard, host))?;
        }
        let mut blocks = Vec::new();
        for word in addresses(self.file, reftable)? {
            match self.layout.refcount_block(word, self.file.size()) {
                Err(fault) => return Err(damaged(&format!("a refcount block {fault}"))),
                Ok(host) => blocks.extend(host),
            }
        }
        blocks.sort_unstable();
        blocks.iter().try_for_each(|host| self.keep(guard, *host))?;
        let fixed = self.fixed(guard, &blocks)?;
        guard.fixed.store(fixed.map(std::sync::Arc::new));
        Ok(())
    }

    fn refcount_table(&self) -> Range<u64> {
        let place = self.refcounts;
        let most = MAX_REFTABLE_BYTES.max(self.layout.cluster_size());
        let bytes = (place.table_clusters << place.cluster_bits).min(most);
        place.table..place.table.saturating_add(bytes)
    }

    /// Where the second-level table of entry `index` is, which is refused where it is damaged.
    pub(super) fn second_level(
        &self,
        table: &dyn std::fmt::Display,
        index: usize,
        word: u64,
    ) -> Result<Option<u64>> {
        let fault = |fault: String| damaged(&format!("entry {index} of {table} {fault}"));
        let host = self.layout.first_level(word).map_err(fault)?;
        let size = self.layout.cluster_size();
        match host {
            Some(host)
                if !self
                    .layout
                    .is_inside(&(host..host + size), self.file.size()) =>
            {
                Err(fault(format!(
                    "points at {host:#x}, past the end of the file"
                )))
            }
            host => Ok(host),
        }
    }

    /// Guards a cluster that nothing else may be in.
    fn keep(&self, guard: &Guard, host: u64) -> Result<()> {
        let (size, l1) = (self.layout.cluster_size(), &self.l1);
        let twice = l1.start < host + size && host < l1.end || guard.contains(host);
        if twice {
            return Err(overlap(host));
        }
        guard.insert(host);
        Ok(())
    }
}

/// The error for metadata that keeps an image from being written.
pub(super) fn damaged(what: &str) -> Error {
    Error::corrupt(format!(
        "{what}, so the image is not written; check names the damage"
    ))
}

pub(super) fn overlap(host: u64) -> Error {
    Error::corrupt(format!(
        "the metadata at {host:#x} overlaps other metadata, so the image is not written; check names the damage"
    ))
}

/// The words of a table.
pub(super) fn addresses(file: &dyn Storage, host: Range<u64>) -> Result<Vec<u64>> {
    let mut bytes = vec![0; clamp_len(host.end - host.start, usize::MAX)];
    file.read_at(&mut bytes, host.start)?;
    let words = bytes.as_chunks::<8>().0.iter();
    Ok(words.map(|w| u64::from_be_bytes(*w)).collect())
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

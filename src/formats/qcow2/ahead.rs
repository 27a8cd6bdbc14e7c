//! Space made ready ahead of the writes that will want it.
//!
//! A cluster that reads as zeroes before its entry appears, and would read as zeroes if only the
//! entry outlived a power cut, needs no order between its data and its entry.  Its count, its place
//! in the file and its zeroes must be on stable media before: one sync sees to that for many
//! clusters, where each of them would need one otherwise.  A kill leaves what was not used as
//! leaks, at most [`MOST`] bytes of them.

use std::ops::Range;

use super::Qcow2;
use super::allocate::Space;
use super::refcount::{Step, Taken};
use crate::error::{ErrorKind, Result};
use crate::image::open::WriteOrder;
use crate::storage::Zeroing;

/// Bytes made ready at a time, at most, beyond what is needed at once.
const MOST: u64 = 16 << 20;
/// Clusters, at most.
const MOST_CLUSTERS: u64 = 1024;
/// What part of a disk is made ready at a time, at most.
const PART: u64 = 16;
/// Runs that they may be in.
const MAX_RUNS: usize = 64;

/// Clusters that are counted, zero and on stable media, and that nothing points at.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    /// The next one to use is last.
    runs: Vec<Taken>,
    /// Clusters to make ready next time: few for who writes little.
    next: u64,
    /// The host cannot make clusters zero without writing zeroes.
    useless: bool,
}

impl Ahead {
    /// Up to `count` clusters in one piece.
    fn pop(&mut self, count: u64, cluster_bits: u32) -> Option<Taken> {
        let last = self.runs.last_mut()?;
        let len = last.clusters.end - last.clusters.start;
        if len <= count {
            return self.runs.pop();
        }
        let first = Taken {
            clusters: last.clusters.start..last.clusters.start + count,
            ..last.clone()
        };
        last.clusters.start += count;
        last.host += count << cluster_bits;
        Some(first)
    }
}

impl Qcow2 {
    /// Up to `count` clusters whose entries need not wait for their data; `None` where order does
    /// not matter, or the host cannot make clusters zero without writing zeroes.
    ///
    /// # Errors
    /// Those of taking clusters, and the host's.
    pub(super) fn ready_space(&self, count: u64) -> Result<Option<Space>> {
        let writer = self.writer()?;
        if writer.order() == WriteOrder::Unordered || self.external().is_some() {
            return Ok(None);
        }
        let mut ahead = writer.ahead.lock();
        if ahead.useless {
            return Ok(None);
        }
        if ahead.runs.is_empty() {
            let want = ahead.next.max(count);
            ahead.next = (want * 2).min(self.most_ahead());
            ahead.runs = self.make_ready(want)?;
            ahead.useless = ahead.runs.is_empty();
        }
        let taken = ahead.pop(count, self.layout.cluster_bits);
        Ok(taken.map(Space::ready))
    }

    fn most_ahead(&self) -> u64 {
        let bytes = MOST.min(self.size() / PART);
        (bytes >> self.layout.cluster_bits).min(MOST_CLUSTERS)
    }

    /// Takes some `want` clusters and sees to it that they may be used at once, the first of them
    /// last; none where the host cannot make them zero.
    fn make_ready(&self, want: u64) -> Result<Vec<Taken>> {
        let since = self.moment()?;
        let mut runs = self.unnamed([]);
        let mut left = want;
        while left > 0 && runs.taken.len() < MAX_RUNS {
            let taken = self.take(1..left + 1)?;
            left -= taken.clusters.end - taken.clusters.start;
            runs.taken.push(taken.clone());
            if !self.make_zero(&taken)? {
                return Ok(Vec::new());
            }
        }
        self.settle_since(since)?;
        let mut runs = runs.name();
        runs.reverse();
        Ok(runs)
    }

    /// Makes clusters that were just taken read as zeroes, inside the file; false where the host
    /// has no way to do so but to write them.
    pub(super) fn make_zero(&self, taken: &Taken) -> Result<bool> {
        let host = self.bytes_of(taken);
        self.tables.forget(host.clone());
        // A cluster whose first write failed may lie past the end.
        let stored = host.start..host.end.min(self.file.size());
        if !taken.fresh && !stored.is_empty() {
            match self.file.zero(stored, Zeroing::MayUnmap) {
                Err(e) if e.kind() == ErrorKind::Unsupported => return Ok(false),
                done => done?,
            }
        }
        if self.file.size() < host.end {
            // Grows the file and never cuts it, whatever other threads write behind us.
            self.file.write_at(&[0], host.end - 1)?;
        }
        Ok(true)
    }

    fn bytes_of(&self, taken: &Taken) -> Range<u64> {
        let bits = self.layout.cluster_bits;
        taken.clusters.start << bits..taken.clusters.end << bits
    }

    /// Gives back what was made ready and not used, and the end of the file where that is it.  With
    /// no request under way.
    pub(super) fn release_ahead(&self) -> Result<()> {
        let writer = self.writer()?;
        let mut runs = std::mem::take(&mut *writer.ahead.lock()).runs;
        runs.sort_by_key(|run| run.host);
        for run in runs.iter().rev() {
            let mut refcounts = writer.refcounts.lock();
            refcounts.step(&*self.file, run.clusters.clone(), Step::Down)?;
            drop(refcounts);
            let host = self.bytes_of(run);
            if host.end == self.file.size() {
                // Where the file cannot be cut, a device, the end of it is free all the same.
                drop(self.file.set_len(host.start));
            }
        }
        Ok(())
    }
}

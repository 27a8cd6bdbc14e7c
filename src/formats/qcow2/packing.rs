//! Host bytes for compressed clusters: one after another, several to a host cluster.
//!
//! Each host cluster is counted once for each compressed cluster that touches it.  The last one is
//! rarely full, and the next compressed cluster goes on there, as long as nothing of it was given
//! back and its count has room.

use std::ops::Range;

use super::refcount::{Allowed, Refcounts, Step};
use crate::error::{Error, ErrorKind, Result};
use crate::util::align::{clamp_len, len64};

/// Host bytes for some compressed clusters.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Packing {
    /// Where each begins.
    pub(super) hosts: Vec<u64>,
    /// Host clusters that were free before, ascending.
    pub(super) taken: Vec<Range<u64>>,
}

/// Where byte strings would go from a given offset on.
#[derive(Debug, PartialEq, Eq)]
struct Laid {
    hosts: Vec<u64>,
    /// By how much the counts rise, from the cluster of the offset on.
    rises: Vec<u64>,
    /// Where the last one ends.
    end: u64,
}

/// Lays out byte strings of `lens` bytes (1 to `size` - 1) from `start` on, whose host cluster of
/// `size` bytes has the count `used`, as long as they end before the cluster `limit` and no count
/// exceeds `most`.
fn lay(start: u64, used: u64, lens: &[u64], size: u64, most: u64, limit: u64) -> Laid {
    let first = start / size;
    let mut laid = Laid {
        hosts: Vec::with_capacity(lens.len()),
        rises: Vec::new(),
        end: start,
    };
    for len in lens {
        let mut at = laid.end;
        let rise = laid.rises.get(index(at / size - first)).copied();
        let before = if at / size == first { used } else { 0 };
        if !at.is_multiple_of(size) && rise.unwrap_or(0) + before >= most {
            at = (at / size + 1) * size;
        }
        let last = (at + len - 1) / size;
        if last >= limit {
            break;
        }
        if laid.rises.len() <= index(last - first) {
            laid.rises.resize(index(last - first) + 1, 0);
        }
        for cluster in at / size..=last {
            laid.rises[index(cluster - first)] += 1;
        }
        laid.hosts.push(at);
        laid.end = at + len;
    }
    laid
}

fn index(distance: u64) -> usize {
    clamp_len(distance, usize::MAX)
}

/// The host clusters of `len` bytes at `host`.
pub(super) fn clusters(host: u64, len: u64, bits: u32) -> Range<u64> {
    host >> bits..((host + len - 1) >> bits) + 1
}

impl Refcounts {
    /// Gives host bytes to compressed clusters of `lens` bytes (each 1 to one cluster less one),
    /// in order, all below `limit`, and counts their host clusters.  The file then reaches to the
    /// end of those.
    ///
    /// # Errors
    /// `NoSpace` at `limit`; the host's; that of `allowed`, as [`Refcounts::take`]; then nothing is
    /// taken, though the refcount structure may have grown.
    pub(super) fn pack(
        &mut self,
        lens: &[u64],
        limit: u64,
        allowed: &Allowed<'_>,
    ) -> Result<Packing> {
        let mut packing = Packing::default();
        while packing.hosts.len() < lens.len() {
            let rest = &lens[packing.hosts.len()..];
            if let Err(e) = self.pack_run(rest, limit, allowed, &mut packing) {
                let done = packing.hosts.iter().zip(lens);
                for (host, len) in done {
                    // Where this fails too, they stay a leak.
                    drop(self.unpack(*host, *len));
                }
                return Err(e);
            }
        }
        Ok(packing)
    }

    /// Counts the host clusters of a compressed cluster down again.
    pub(super) fn unpack(&mut self, host: u64, len: u64) -> Result<()> {
        let clusters = clusters(host, len, self.place().cluster_bits);
        self.step(clusters, Step::Down)
    }

    /// As many of `lens` as one run of host clusters takes; none where the refcount structure
    /// had to grow first.
    fn pack_run(
        &mut self,
        lens: &[u64],
        limit: u64,
        allowed: &Allowed<'_>,
        packing: &mut Packing,
    ) -> Result<()> {
        let bits = self.place().cluster_bits;
        let (size, most) = (1u64 << bits, self.place().width.max());
        let (start, used) = match self.tail()? {
            Some(tail) => tail,
            None => (self.find_free(&(1..2))?.start << bits, 0),
        };
        let wanted = lay(start, used, lens, size, most, u64::MAX);
        let begun = u64::from(start % size != 0);
        let first = (start >> bits) + begun;
        let end = (start >> bits) + len64(wanted.rises.len());
        let free = first..self.free_until(first..end.max(first))?;
        let laid = match free.end == end {
            true => wanted,
            false => lay(start, used, lens, size, most, free.end),
        };
        if laid.hosts.is_empty() {
            // What follows the begun cluster is taken.
            self.tail = None;
            return Ok(());
        }
        if laid.end > limit {
            let text = format!("compressed clusters have no room left below {limit:#x}");
            return Err(Error::new(ErrorKind::NoSpace, text));
        }
        let new = first..(start >> bits) + len64(laid.rises.len());
        self.check_allowed(new.clone(), allowed)?;
        if !new.is_empty() && self.cover(&new)? {
            return Ok(());
        }
        if self.file().size() < new.end << bits && !new.is_empty() {
            // Nobody has bytes there yet, and nobody gets any before this is done.
            self.file().write_at(&[0], (new.end << bits) - 1)?;
        }
        let rises = (start >> bits..).zip(&laid.rises);
        let rises = rises.filter(|(_, rise)| **rise > 0);
        self.step_each(rises.map(|(c, rise)| (c..c + 1, *rise)), Step::Up)?;
        self.took(&new);
        self.tail = (laid.end % size != 0).then_some(laid.end);
        packing.hosts.extend(laid.hosts);
        if !new.is_empty() {
            packing.taken.push(new);
        }
        Ok(())
    }

    /// Where the next compressed cluster can go on in a host cluster that was begun, and the count
    /// of that one.
    fn tail(&mut self) -> Result<Option<(u64, u64)>> {
        let Some(tail) = self.tail else {
            return Ok(None);
        };
        let used = self.count(tail >> self.place().cluster_bits)?;
        let open = used > 0 && used < self.place().width.max();
        Ok(open.then_some((tail, used)))
    }

    /// Where the free clusters from `range.start` on end, at most at `range.end`.
    fn free_until(&mut self, range: Range<u64>) -> Result<u64> {
        for cluster in range.clone() {
            if self.count(cluster)? != 0 {
                return Ok(cluster);
            }
        }
        Ok(range.end)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::refblock::{Place, Width};
    use super::*;
    use crate::image::open::WriteOrder;
    use crate::storage::Storage;
    use crate::storage::memory::MemoryStorage;

    #[test]
    fn byte_strings_follow_each_other_until_a_count_is_full() {
        let laid = lay(1100, 1, &[100, 400, 500], 1000, 9, 9);
        assert_eq!(laid.hosts, [1100, 1200, 1600]);
        assert_eq!((laid.rises, laid.end), (vec![3, 1], 2100));
        let laid = lay(1100, 1, &[100, 400, 500], 1000, 2, 9);
        assert_eq!(laid.hosts, [1100, 2000, 2400]);
        assert_eq!(laid.rises, [1, 2]);
        let laid = lay(1000, 0, &[100, 400], 1000, 1, 9);
        assert_eq!(laid.hosts, [1000, 2000]);
        let laid = lay(1900, 1, &[200], 1000, 9, 2);
        assert_eq!(laid.hosts, [0; 0]);
    }

    /// A file with a header cluster, a table and one block that counts the three.
    fn refcounts(order: u32) -> (Arc<MemoryStorage>, Refcounts) {
        let width = Width::new(order);
        let mut bytes = vec![0; 3 << 12];
        bytes[1 << 12..][..8].copy_from_slice(&(2u64 << 12).to_be_bytes());
        (0..3).for_each(|i| width.set(&mut bytes[2 << 12..], i, 1));
        let place = Place {
            cluster_bits: 12,
            width,
            table: 1 << 12,
            table_clusters: 1,
        };
        let file = Arc::new(MemoryStorage::from_bytes(&bytes));
        let shared: Arc<dyn Storage> = Arc::<MemoryStorage>::clone(&file);
        let order = WriteOrder::Unordered;
        (file, Refcounts::new(shared, place, order, Arc::default()))
    }

    #[test]
    fn what_is_packed_is_counted_for_each_that_touches_it_and_given_back_whole() {
        for order in 0..=6 {
            let (file, mut refcounts) = refcounts(order);
            let most = Width::new(order).max();
            let mut rng = fastrand::Rng::with_seed(3);
            let mut all = Vec::new();
            for round in 0..40 {
                let lens: Vec<u64> = (0..rng.usize(1..30)).map(|_| rng.u64(1..4096)).collect();
                let packing = refcounts
                    .pack(&lens, 1 << 40, &|_| Ok(()))
                    .expect("is taken");
                all.extend(packing.hosts.into_iter().zip(lens));
                if round % 3 == 0 {
                    refcounts.take(1..3, &|_| Ok(())).expect("is taken");
                }
            }
            let mut counts = std::collections::BTreeMap::new();
            let mut end = 0;
            for (host, len) in &all {
                assert!(*host >= 3 << 12 && host + len <= file.size());
                clusters(*host, *len, 12).for_each(|c| *counts.entry(c).or_insert(0) += 1);
                assert!(*host >= end, "they ascend and do not overlap");
                end = host + len;
            }
            for (cluster, count) in &counts {
                assert!(*count <= most);
                let found = refcounts.count(*cluster).expect("reads");
                assert_eq!(found, *count, "order {order}, cluster {cluster}");
            }
            for (host, len) in all {
                refcounts.unpack(host, len).expect("was counted");
            }
            for cluster in counts.keys() {
                assert_eq!(refcounts.count(*cluster).expect("reads"), 0);
            }
            assert_eq!(refcounts.tail, None, "nothing is begun that is free");
        }
    }

    #[test]
    fn nothing_is_packed_past_what_an_entry_can_express() {
        let (_, mut refcounts) = refcounts(4);
        let error = refcounts.pack(&[4000; 10], 5 << 12, &|_| Ok(()));
        assert_eq!(error.expect_err("no room").kind(), ErrorKind::NoSpace);
        refcounts
            .pack(&[4000, 4000], 5 << 12, &|_| Ok(()))
            .expect("room");
    }
}

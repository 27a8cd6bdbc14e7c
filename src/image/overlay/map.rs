//! Which clusters an overlay has, as runs: neighbours of one kind take one entry, so that memory
//! grows with fragments, not with bytes.

use std::collections::BTreeMap;
use std::ops::Range;

/// Where a run of clusters is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// In the storage, from this slot on; slots are numbered in units of a cluster.
    Slot(u64),
    /// Nowhere: they read as zeroes.
    Zero,
}

impl Place {
    /// The place `count` clusters further on.
    fn after(self, count: u64) -> Self {
        match self {
            Self::Slot(slot) => Self::Slot(slot + count),
            Self::Zero => Self::Zero,
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    count: u64,
    place: Place,
}

/// Clusters by index; those not in it belong to the layer below.
#[derive(Debug, Default)]
pub(super) struct ClusterMap {
    entries: BTreeMap<u64, Entry>,
}

impl ClusterMap {
    /// Where `cluster` is, and for how many clusters from it that holds, at most `limit`.
    pub(super) fn find(&self, cluster: u64, limit: u64) -> (Option<Place>, u64) {
        if let Some((&start, entry)) = self.entries.range(..=cluster).next_back() {
            let into = cluster - start;
            if into < entry.count {
                return (Some(entry.place.after(into)), limit.min(entry.count - into));
            }
        }
        let next = self.entries.range(cluster..).next();
        (None, next.map_or(limit, |(&n, _)| limit.min(n - cluster)))
    }

    /// Puts a run of clusters at `place`, whatever was known of them.
    pub(super) fn set(&mut self, clusters: Range<u64>, place: Place) {
        self.forget(&clusters);
        let mut start = clusters.start;
        let mut entry = Entry {
            count: clusters.end - clusters.start,
            place,
        };
        if let Some((&before, &left)) = self.entries.range(..start).next_back()
            && before + left.count == start
            && left.place.after(left.count) == place
        {
            start = before;
            entry = Entry {
                count: left.count + entry.count,
                place: left.place,
            };
        }
        if let Some(&right) = self.entries.get(&clusters.end)
            && entry.place.after(entry.count) == right.place
        {
            self.entries.remove(&clusters.end);
            entry.count += right.count;
        }
        self.entries.insert(start, entry);
    }

    /// Leaves a run of clusters to the layer below.
    pub(super) fn forget(&mut self, clusters: &Range<u64>) {
        if let Some((&start, &entry)) = self.entries.range(..clusters.start).next_back()
            && start + entry.count > clusters.start
        {
            let count = clusters.start - start;
            self.entries.insert(start, Entry { count, ..entry });
            self.keep_tail(start, entry, clusters.end);
        }
        while let Some((&start, &entry)) = self.entries.range(clusters.clone()).next() {
            self.entries.remove(&start);
            self.keep_tail(start, entry, clusters.end);
        }
    }

    /// Puts back what an entry has from `end` on.
    fn keep_tail(&mut self, start: u64, entry: Entry, end: u64) {
        if start + entry.count > end {
            let tail = Entry {
                count: start + entry.count - end,
                place: entry.place.after(end - start),
            };
            self.entries.insert(end, tail);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COUNT: u64 = 60;

    fn matches(map: &ClusterMap, model: &[Option<Place>]) {
        for (at, place) in (0..COUNT).zip(model) {
            let (found, run) = map.find(at, COUNT - at);
            assert_eq!(found, *place, "{at}");
            assert!(run > 0);
            for into in 0..run {
                let index = usize::try_from(at + into).expect("small");
                assert_eq!(model[index], place.map(|p| p.after(into)), "{at}+{into}");
            }
        }
    }

    #[test]
    fn runs_agree_with_a_list_of_clusters_after_any_changes() {
        let mut random = fastrand::Rng::with_seed(7);
        let mut map = ClusterMap::default();
        let mut model = vec![None; usize::try_from(COUNT).expect("small")];
        for _ in 0..3000 {
            let start = random.u64(0..COUNT);
            let end = random.u64(start + 1..=COUNT);
            let place = match random.u8(0..3) {
                0 => None,
                1 => Some(Place::Zero),
                _ => Some(Place::Slot(random.u64(0..4) * 10 + start)),
            };
            match place {
                Some(place) => map.set(start..end, place),
                None => map.forget(&(start..end)),
            }
            for cluster in start..end {
                let index = usize::try_from(cluster).expect("small");
                model[index] = place.map(|p| p.after(cluster - start));
            }
            matches(&map, &model);
        }
    }

    #[test]
    fn sequential_clusters_take_one_entry() {
        let mut map = ClusterMap::default();
        for cluster in 0..1000 {
            map.set(cluster..cluster + 1, Place::Slot(cluster));
        }
        assert_eq!(map.entries.len(), 1);
    }
}

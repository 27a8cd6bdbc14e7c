//! Metadata that stays where it is while guests write: that of snapshots and of bitmaps.

use std::ops::Range;

use super::guard::{Guard, Subject, addresses, damaged, overlap};
use super::snapshot_table::SnapshotTable;
use super::{bitmap_dir, snapshot_table};
use crate::error::Result;
use crate::util::align::{down, len64};
use crate::util::range::{intersect, push_merged};

/// Words of tables looked at: 16 MiB of them; what the others point at is not guarded.
const MAX_WORDS: u64 = 2 << 20;

/// Ranges of whole clusters, in order, apart from each other.
#[derive(Debug)]
pub(super) struct Fixed(Vec<Range<u64>>);

impl Fixed {
    /// From ranges in any order; `None`: there are none.
    fn new(mut ranges: Vec<Range<u64>>) -> Option<Self> {
        ranges.sort_unstable_by_key(|r| r.start);
        let mut merged: Vec<Range<u64>> = Vec::new();
        for range in ranges {
            match merged.last_mut() {
                Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
                _ => merged.push(range),
            }
        }
        (!merged.is_empty()).then_some(Self(merged))
    }

    /// Whether an offset lies in one of them.
    pub(super) fn contains(&self, host: u64) -> bool {
        find(&self.0, host).is_some()
    }
}

/// The range that holds `host`, of ranges in order that do not overlap.
fn find(ranges: &[Range<u64>], host: u64) -> Option<&Range<u64>> {
    let after = ranges.partition_point(|r| r.start <= host);
    ranges[..after].last().filter(|r| r.end > host)
}

impl Subject<'_> {
    /// Where snapshots and bitmaps have their metadata; `blocks` are those of refcounts, in order.
    ///
    /// # Errors
    /// `Corrupt` where it is damaged, or where it overlaps itself or other metadata.
    pub(super) fn fixed(&self, guard: &Guard, blocks: &[u64]) -> Result<Option<Fixed>> {
        let snapshots = SnapshotTable::read(self.file, self.header)?;
        if let Some(index) = snapshots.incomplete(self.header) {
            return Err(damaged(&format!(
                "snapshot {index} has too little extra data for version 3"
            )));
        }
        let range = |start: u64, len: u64| start..start.saturating_add(len);
        let l1 = |e: &snapshot_table::Entry| range(e.l1_offset(), u64::from(e.l1_len()) * 8);
        let first_level: Vec<Range<u64>> = snapshots.entries.iter().map(l1).collect();
        let bitmaps = self.directory.entries.iter();
        let bitmaps: Vec<Range<u64>> =
            (bitmaps.map(|e| range(e.table(), e.table_len() * 8))).collect();
        let table_len = len64(snapshots.encode()?.len());
        let mut alone = vec![range(self.header.snapshots_offset, table_len)];
        alone.extend(self.directory.place.map(|p| range(p.offset, p.len)));
        alone.extend(first_level.iter().chain(&bitmaps).cloned());
        alone.retain(|r| !r.is_empty());
        let len = self.file.size();
        // The padding of the snapshot table's last entry need not be there.
        if let Some(past) = alone.iter().find(|r| !self.layout.is_inside(r, len)) {
            let text = format!("metadata at {:#x} is past the end of the file", past.start);
            return Err(damaged(&text));
        }
        let size = self.layout.cluster_size();
        let whole = |r: &mut Range<u64>| {
            let end = r.end.checked_next_multiple_of(size);
            *r = down(r.start, size)..end.unwrap_or(u64::MAX);
        };
        alone.iter_mut().for_each(whole);
        alone.sort_unstable_by_key(|r| r.start);
        self.check_alone(guard, &alone)?;
        let mut found = self.snapshot_tables(&first_level, |host| {
            self.meets(host, guard, &alone) || blocks.binary_search(&host.start).is_ok()
        })?;
        let others = Fixed::new(found.clone());
        found.extend(self.bitmap_clusters(&bitmaps, |host| {
            self.meets(host, guard, &alone)
                || guard.is_kept(host.start)
                || others.as_ref().is_some_and(|o| o.contains(host.start))
        })?);
        alone.extend(found);
        Ok(Fixed::new(alone))
    }

    /// Whether a cluster is in the header, the active first-level table, the refcount table, or
    /// one of `ranges`, in order.
    fn meets(&self, host: &Range<u64>, guard: &Guard, ranges: &[Range<u64>]) -> bool {
        let reftable = guard.refcount_table();
        host.start < self.layout.cluster_size()
            || intersect(host, &self.l1).is_some()
            || intersect(host, &reftable).is_some()
            || find(ranges, host.start).is_some()
    }

    /// Refuses ranges, in order, that overlap each other or what is guarded already.
    fn check_alone(&self, guard: &Guard, ranges: &[Range<u64>]) -> Result<()> {
        let twice = ranges.windows(2).find(|p| p[0].end > p[1].start);
        let met = |r: &&Range<u64>| self.meets(r, guard, &[]);
        let found = twice.map(|p| &p[1]).or_else(|| ranges.iter().find(met));
        match found {
            Some(range) => Err(overlap(range.start)),
            None => match (guard.kept().into_iter()).find(|h| find(ranges, *h).is_some()) {
                Some(host) => Err(overlap(host)),
                None => Ok(()),
            },
        }
    }

    /// The second-level tables of snapshots: those of one may be those of another and of the disk,
    /// but no snapshot has one twice, and none has `met` other metadata.
    fn snapshot_tables(
        &self,
        tables: &[Range<u64>],
        met: impl Fn(&Range<u64>) -> bool,
    ) -> Result<Vec<Range<u64>>> {
        let size = self.layout.cluster_size();
        let mut found = Vec::new();
        for (number, words) in self.all_words(tables).enumerate() {
            let what = format!("the L1 table of snapshot {number}");
            let mut hosts = Vec::new();
            for (index, word) in words?.into_iter().enumerate() {
                hosts.extend(self.second_level(&what, index, word)?);
            }
            if let Some(host) = hosts.iter().find(|h| met(&(**h..**h + size))) {
                return Err(overlap(*host));
            }
            hosts
                .iter()
                .for_each(|h| push_merged(&mut found, *h..*h + size));
            each_once(&mut hosts)?;
        }
        Ok(found)
    }

    /// The clusters that hold the bits of bitmaps, each only once, and none that has `met` other
    /// metadata.
    fn bitmap_clusters(
        &self,
        tables: &[Range<u64>],
        met: impl Fn(&Range<u64>) -> bool,
    ) -> Result<Vec<Range<u64>>> {
        let size = self.layout.cluster_size();
        let mut hosts = Vec::new();
        for words in self.all_words(tables) {
            for word in words? {
                let Ok(host) = bitmap_dir::cluster(word, size) else {
                    return Err(damaged(&format!("an entry of a bitmap is {word:#018x}")));
                };
                let past = |r: &Range<u64>| !self.layout.is_inside(r, self.file.size());
                match host.map(|host| host..host + size) {
                    Some(r) if past(&r) || met(&r) => {
                        return Err(overlap(r.start));
                    }
                    _ => hosts.extend(host),
                }
            }
        }
        each_once(&mut hosts)?;
        Ok(hosts.into_iter().map(|host| host..host + size).collect())
    }

    /// The words of each table in turn, [`MAX_WORDS`] of them all.
    fn all_words(&self, tables: &[Range<u64>]) -> impl Iterator<Item = Result<Vec<u64>>> {
        let mut left = MAX_WORDS;
        tables.iter().map(move |table| {
            let end = table.end.min(table.start.saturating_add(left * 8));
            left -= (end - table.start) / 8;
            addresses(self.file, table.start..end)
        })
    }
}

/// Puts clusters in order, and refuses one that is there twice.
fn each_once(hosts: &mut [u64]) -> Result<()> {
    hosts.sort_unstable();
    match hosts.windows(2).find(|p| p[0] == p[1]) {
        Some(pair) => Err(overlap(pair[0])),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_in_any_order_are_found() {
        let fixed = Fixed::new(vec![8..10, 0..2, 1..4, 20..22, 4..5]).expect("has some");
        let inside: Vec<u64> = (0..30).filter(|h| fixed.contains(*h)).collect();
        assert_eq!(inside, [0, 1, 2, 3, 4, 8, 9, 20, 21]);
        assert!(Fixed::new(Vec::new()).is_none());
    }
}

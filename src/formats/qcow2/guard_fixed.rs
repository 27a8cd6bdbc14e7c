//! Metadata that stays where it is while guests write: that of snapshots and of bitmaps.

use std::ops::Range;

use super::Qcow2;
use super::entry::OFFSET;
use super::guard::{addresses, overlap};
use super::snapshot_table::SnapshotTable;
use crate::error::Result;
use crate::util::align::{down, is_aligned, len64};
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

impl Qcow2 {
    /// Where snapshots and bitmaps have their metadata.
    ///
    /// # Errors
    /// `Corrupt` where it is damaged, or where it overlaps itself or other metadata.
    pub(super) fn fixed_metadata(&self) -> Result<Option<Fixed>> {
        let size = self.layout.cluster_size();
        let whole = |start: u64, len: u64| {
            let end = start.saturating_add(len);
            down(start, size)..end.checked_next_multiple_of(size).unwrap_or(u64::MAX)
        };
        let snapshots = SnapshotTable::read(&*self.file, &self.header)?;
        let directory = self.directory()?;
        let mut tables: Vec<Range<u64>> = Vec::new();
        let first_level = snapshots.entries.iter();
        tables.extend(first_level.map(|e| whole(e.l1_offset(), u64::from(e.l1_len()) * 8)));
        let bitmaps = directory.entries.iter();
        tables.extend(bitmaps.map(|e| whole(e.table(), e.table_len() * 8)));
        let mut alone = tables.clone();
        alone.push(whole(
            self.header.snapshots_offset,
            len64(snapshots.encode()?.len()),
        ));
        alone.extend(directory.place.map(|p| whole(p.offset, p.len)));
        alone.retain(|r| !r.is_empty());
        alone.sort_unstable_by_key(|r| r.start);
        self.check_alone(&alone)?;
        alone.extend(self.pointed_at(&tables)?);
        Ok(Fixed::new(alone))
    }

    /// Refuses ranges, in order, that overlap each other or what is guarded already.
    fn check_alone(&self, ranges: &[Range<u64>]) -> Result<()> {
        let size = self.layout.cluster_size();
        let twice = ranges.windows(2).find(|p| p[0].end > p[1].start);
        let (l1, reftable) = (self.l1_range(), self.writer()?.guard.refcount_table());
        let met = |r: &&Range<u64>| {
            r.start < size || intersect(r, &l1).is_some() || intersect(r, &reftable).is_some()
        };
        let found = twice.map(|p| &p[1]).or_else(|| ranges.iter().find(met));
        let kept = || self.writer().map(|w| w.guard.kept()).unwrap_or_default();
        match found {
            Some(range) => Err(overlap(range.start)),
            None => match kept().into_iter().find(|h| find(ranges, *h).is_some()) {
                Some(host) => Err(overlap(host)),
                None => Ok(()),
            },
        }
    }

    /// The clusters that the words of tables point at.
    fn pointed_at(&self, tables: &[Range<u64>]) -> Result<Vec<Range<u64>>> {
        let size = self.layout.cluster_size();
        let mut left = MAX_WORDS;
        let mut found = Vec::new();
        for table in tables {
            let end = table
                .end
                .min(self.file.size())
                .min(table.start.saturating_add(left * 8));
            if end <= table.start {
                continue;
            }
            left -= (end - table.start) / 8;
            for word in addresses(&*self.file, table.start..end)? {
                let host = word & OFFSET;
                if host != 0 && is_aligned(host, size) {
                    push_merged(&mut found, host..host + size);
                }
            }
        }
        Ok(found)
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

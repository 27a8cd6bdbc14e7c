//! Where the metadata of an image is: learnt, and judged, before its first change.

use std::fmt::Display;
use std::ops::Range;

use super::bitmap_dir::{self, Directory};
use super::guard::Guard;
use super::header::Header;
use super::refblock::Place;
use super::snapshot_table::{self, SnapshotTable};
use crate::error::{Error, Result};
use crate::image::be64;
use crate::storage::Storage;
use crate::util::align::{down, len64};
use crate::util::range;

/// Words of tables looked at: 16 MiB of them; what the others point at is not guarded.
const MAX_WORDS: u64 = 2 << 20;

/// Ranges of whole clusters, in order, apart from each other.
#[derive(Debug)]
pub(super) struct Fixed(Vec<Range<u64>>);

impl Fixed {
    /// From ranges in any order, which may overlap.
    fn new(mut ranges: Vec<Range<u64>>) -> Self {
        ranges.sort_unstable_by_key(|r| r.start);
        let mut merged: Vec<Range<u64>> = Vec::new();
        for range in ranges {
            match merged.last_mut() {
                Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
                _ => merged.push(range),
            }
        }
        Self(merged)
    }

    /// Whether an offset lies in one of them.
    pub(super) fn contains(&self, host: u64) -> bool {
        let after = self.0.partition_point(|r| r.start <= host);
        self.0[..after].last().is_some_and(|r| r.end > host)
    }
}

/// An image whose metadata is looked for.
#[derive(Debug)]
pub(super) struct Subject<'a> {
    pub(super) file: &'a dyn Storage,
    pub(super) header: &'a Header,
    /// The active first-level table.
    pub(super) l1: Range<u64>,
    /// Where the refcounts are.
    pub(super) refcounts: Place,
    pub(super) directory: Directory,
}

/// Refuses the image in `file` where opening it for writing, or the first change, would.
pub(super) fn judge(file: &dyn Storage) -> Result<()> {
    let header = Header::read(file)?;
    let subject = Subject {
        file,
        header: &header,
        l1: header.l1(),
        refcounts: Place::of(&header),
        directory: Directory::read(file, &header)?,
    };
    subject.learn(&Guard::default())
}

impl Subject<'_> {
    /// Has `guard` guard all metadata.
    ///
    /// # Errors
    /// `Corrupt` where some is damaged, or overlaps other metadata; then nothing is guarded.
    pub(super) fn learn(&self, guard: &Guard) -> Result<()> {
        guard.learn(&[], Fixed(Vec::new()));
        guard.set_refcount_table(self.refcounts);
        if let Some(fault) = self.header.faults().first() {
            return Err(damaged(fault));
        }
        let bitmaps = self.directory.entries.iter();
        let bitmaps: Vec<Range<u64>> = bitmaps.map(bitmap_dir::Entry::table_range).collect();
        let (snapshot_table, snapshots) = self.snapshots()?;
        let moving = self.whole([
            ("the header", 0..self.header.cluster_size()),
            ("the L1 table", self.l1.clone()),
            ("the refcount table", self.refcounts.table_range()),
        ])?;
        let place = self.directory.place.map_or(0..0, |place| place.range());
        let lists = snapshots
            .iter()
            .map(|l1| ("a snapshot's L1 table", l1.clone()));
        let tables = bitmaps.iter().map(|t| ("a bitmap's table", t.clone()));
        let ends = [
            ("the snapshot table", snapshot_table),
            ("the bitmap directory", place),
        ];
        let mut fixed = self.whole(ends.into_iter().chain(lists).chain(tables))?;
        let alone = apart([&*moving, &*fixed].concat())?;
        let (kept, blocks) = self.kept()?;
        apart_from(&kept, |host| alone.contains(host))?;
        let mut shared = Vec::new();
        for (number, words) in self.all_words(&snapshots).enumerate() {
            let mut hosts =
                self.second_level(&format!("the L1 table of snapshot {number}"), words?)?;
            each_once(&mut hosts)?;
            apart_from(&hosts, |h| {
                alone.contains(h) || blocks.binary_search(&h).is_ok()
            })?;
            shared.append(&mut hosts);
        }
        let shared = Fixed::new(self.clusters(&shared));
        let bits = self.bitmap_clusters(&bitmaps)?;
        apart_from(&bits, |host| {
            alone.contains(host) || kept.binary_search(&host).is_ok() || shared.contains(host)
        })?;
        fixed.extend(shared.0);
        fixed.extend(self.clusters(&bits));
        guard.learn(&kept, Fixed::new(fixed));
        Ok(())
    }

    /// Where the snapshot table is, and the first-level tables of the snapshots.
    fn snapshots(&self) -> Result<(Range<u64>, Vec<Range<u64>>)> {
        let snapshots = SnapshotTable::read(self.file, self.header)?;
        if let Some(index) = snapshots.incomplete(self.header) {
            return Err(damaged(&format!(
                "snapshot {index} has too little extra data for version 3"
            )));
        }
        let start = self.header.snapshots_offset;
        let table = start..start.saturating_add(len64(snapshots.encode()?.len()));
        let lists = snapshots.entries.iter().map(snapshot_table::Entry::l1);
        Ok((table, lists.collect()))
    }

    /// The whole clusters of ranges, which are refused where they are not in the file.
    fn whole<'n>(
        &self,
        ranges: impl IntoIterator<Item = (&'n str, Range<u64>)>,
    ) -> Result<Vec<Range<u64>>> {
        let (size, len) = (self.header.cluster_size(), self.file.size());
        let ranges = ranges.into_iter().filter(|(_, range)| !range.is_empty());
        let whole = ranges.map(|(what, range)| {
            // The padding of the snapshot table's last entry need not be there.
            match self.header.layout().is_inside(&range, len) {
                true => Ok(down(range.start, size)..range.end.next_multiple_of(size)),
                false => Err(damaged(&format!(
                    "{what} ends at {:#x}, past the end of the file",
                    range.end
                ))),
            }
        });
        whole.collect()
    }

    /// The clusters at some offsets.
    fn clusters(&self, hosts: &[u64]) -> Vec<Range<u64>> {
        let size = self.header.cluster_size();
        hosts.iter().map(|host| *host..host + size).collect()
    }

    /// Where the second-level tables of the disk and the refcount blocks are, in order; and the
    /// blocks alone.
    fn kept(&self) -> Result<(Vec<u64>, Vec<u64>)> {
        let words = be64::read(self.file, self.l1.clone())?;
        let mut kept = self.second_level(&"the L1 table", words)?;
        let words = be64::read(self.file, self.refcounts.table_range())?;
        let blocks = words.into_iter().map(|word| {
            let block = self.refcounts.block(word, self.file.size());
            block.map_err(|fault| damaged(&format!("a refcount block {fault}")))
        });
        let mut blocks: Vec<u64> = blocks
            .filter_map(Result::transpose)
            .collect::<Result<_>>()?;
        blocks.sort_unstable();
        kept.extend(&blocks);
        each_once(&mut kept)?;
        Ok((kept, blocks))
    }

    /// Where the second-level tables are that the words of a first-level table point at, which is
    /// refused where it is damaged.
    fn second_level(&self, table: &dyn Display, words: Vec<u64>) -> Result<Vec<u64>> {
        let (layout, len) = (self.header.layout(), self.file.size());
        let mut hosts = Vec::new();
        for (index, word) in words.into_iter().enumerate() {
            let fault = |fault: String| damaged(&format!("entry {index} of {table} {fault}"));
            let Some(host) = layout.first_level(word).map_err(fault)? else {
                continue;
            };
            if !layout.is_inside(&(host..host + layout.cluster_size()), len) {
                let text = format!("points at {host:#x}, past the end of the file");
                return Err(fault(text));
            }
            hosts.push(host);
        }
        Ok(hosts)
    }

    /// The clusters that hold the bits of bitmaps, in order.
    fn bitmap_clusters(&self, tables: &[Range<u64>]) -> Result<Vec<u64>> {
        let (layout, size) = (self.header.layout(), self.header.cluster_size());
        let mut hosts = Vec::new();
        for words in self.all_words(tables) {
            for word in words? {
                let Ok(host) = bitmap_dir::cluster(word, size) else {
                    return Err(damaged(&format!("an entry of a bitmap is {word:#018x}")));
                };
                match host {
                    Some(h) if !layout.is_inside(&(h..h + size), self.file.size()) => {
                        return Err(overlap(h));
                    }
                    host => hosts.extend(host),
                }
            }
        }
        each_once(&mut hosts)?;
        Ok(hosts)
    }

    /// The words of each table in turn, [`MAX_WORDS`] of them all.
    fn all_words(&self, tables: &[Range<u64>]) -> impl Iterator<Item = Result<Vec<u64>>> {
        let mut left = MAX_WORDS;
        tables.iter().map(move |table| {
            let end = table.end.min(table.start.saturating_add(left * 8));
            left -= (end - table.start) / 8;
            be64::read(self.file, table.start..end)
        })
    }
}

/// The error for metadata that keeps an image from being written.
pub(super) fn damaged(what: &str) -> Error {
    Error::corrupt(format!(
        "{what}, so the image is not written; check names the damage"
    ))
}

fn overlap(host: u64) -> Error {
    Error::corrupt(format!(
        "the metadata at {host:#x} overlaps other metadata, so the image is not written; check names the damage"
    ))
}

/// Puts ranges in order, and refuses some that overlap.
fn apart(mut ranges: Vec<Range<u64>>) -> Result<Fixed> {
    ranges.sort_unstable_by_key(|r| r.start);
    match ranges
        .windows(2)
        .find(|p| range::intersect(&p[0], &p[1]).is_some())
    {
        Some(pair) => Err(overlap(pair[1].start)),
        None => Ok(Fixed(ranges)),
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

/// Refuses clusters that something else is in.
fn apart_from(hosts: &[u64], others: impl Fn(u64) -> bool) -> Result<()> {
    match hosts.iter().find(|host| others(**host)) {
        Some(host) => Err(overlap(*host)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_in_any_order_are_found() {
        let fixed = Fixed::new(vec![8..10, 0..2, 1..4, 20..22, 4..5]);
        let inside: Vec<u64> = (0..30).filter(|h| fixed.contains(*h)).collect();
        assert_eq!(inside, [0, 1, 2, 3, 4, 8, 9, 20, 21]);
        assert!(!Fixed::new(Vec::new()).contains(0));
    }
}

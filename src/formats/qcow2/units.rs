//! Giving clusters space, and taking it back: what of it is qcow2's own.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Qcow2;
use super::bitmap::Tracker;
use super::entry::{COPIED, Cluster, SUBCLUSTERS, ZERO};
use super::refcount::Step;
use super::writer::Table;
use crate::error::{Error, Result};
use crate::image::Wait;
use crate::image::units::{Allocator, Content, New, Space, Taken, Target, Unit, Units};
use crate::storage::Storage;
use crate::util::align::down;
use crate::util::range::{self, intersect};

/// Bytes made ready at a time, at most, beyond what is needed at once.
const MOST: u64 = 16 << 20;
/// Clusters, at most.
const MOST_CLUSTERS: u64 = 1024;
/// What part of a disk is made ready at a time, at most.
const PART: u64 = 16;
/// All stored-bits of an extended entry.
const ALL: u64 = !0 >> SUBCLUSTERS;

/// Bits for the subclusters of `part`, a range within a cluster in whole subclusters.
fn mask(part: &Range<u64>, unit: u64) -> u64 {
    let (first, end) = (part.start / unit, part.end.div_ceil(unit));
    let below = |n: u64| if n >= 64 { !0 } else { (1u64 << n) - 1 };
    below(end) & !below(first)
}

/// One cluster as its entry describes it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    /// Where it is.
    pub(super) cluster: Cluster,
    /// The bits of its subclusters; 0 without them.
    pub(super) bits: u64,
}

impl Qcow2 {
    /// The cluster at guest offset `start`, as its entry has it now, to be changed.
    ///
    /// # Errors
    /// `Corrupt` where it is at another place of a data file than its own, which may be that of
    /// another; the host's.
    pub(super) fn entry(&self, start: u64) -> Result<Entry> {
        let Some(entry) = self.tables.entry_offset(start, Wait::Yes)? else {
            return Ok(Entry {
                cluster: Cluster::BELOW,
                bits: 0,
            });
        };
        let cluster = self.tables.cluster(entry, Wait::Yes)?;
        if let Some(host) = cluster.whole()
            && self.is_misplaced(host, start)
        {
            return Err(Error::corrupt(format!(
                "the cluster of {start:#x} is at {host:#x} of the data file (expected: at its own offset), so it is not written; check names the damage"
            )));
        }
        let bits = self.tables.bits(entry, Wait::Yes)?;
        Ok(Entry { cluster, bits })
    }

    /// What all of a cluster reads as, where that is one thing.
    fn whole(&self, entry: Entry) -> Option<Content> {
        let stored = match entry.cluster.space {
            Space::Encoded { .. } => return Some(Content::Stored),
            Space::None => None,
            Space::Own(_) | Space::Shared(_) => Some(Content::Stored),
        };
        match (self.layout.extended, entry.bits) {
            (false, _) if entry.cluster.zero => Some(Content::Zero),
            (false, _) => Some(stored.unwrap_or(Content::Below)),
            (true, 0) if stored.is_none() => Some(Content::Below),
            (true, bits) if stored.is_none() && bits == !ALL => Some(Content::Zero),
            (true, bits) => stored.filter(|_| bits == ALL),
        }
    }

    /// The first-level entry that stands for a unit.
    fn l1_index(&self, index: u64) -> u64 {
        index >> self.header.l2_bits()
    }

    /// The units whose entries are in the table of a first-level entry.
    fn units_of(&self, l1_index: u64) -> Range<u64> {
        l1_index << self.header.l2_bits()..(l1_index + 1) << self.header.l2_bits()
    }

    /// Lets go of what a cluster's old entry referred to.
    pub(super) fn free_cluster(&self, cluster: Cluster) -> Result<()> {
        match self.unnamed(cluster.space) {
            Some(host) => self.free(host),
            None => Ok(()),
        }
    }

    /// The words of an entry.
    fn words(&self, new: &New) -> Vec<u64> {
        let word = new.host | COPIED;
        if !self.layout.extended {
            return vec![word];
        }
        let filled = mask(&new.filled, self.layout.subcluster_size());
        vec![word, (new.old.word | filled) & !(filled << SUBCLUSTERS)]
    }

    /// Writes those of the entries that are in a table of the units `part`.
    fn publish_part(&self, part: &Range<u64>, table: &Table<'_>, new: &[New]) -> Result<()> {
        let first = new.partition_point(|n| n.index < part.start);
        let end = new.partition_point(|n| n.index < part.end);
        for run in new[first..end].chunk_by(|a, b| a.index + 1 == b.index) {
            let words: Vec<u64> = run.iter().flat_map(|n| self.words(n)).collect();
            self.publish_entries(table.host(), run[0].index, &words)?;
        }
        Ok(())
    }

    /// Shows new entries to readers, from that of unit `index` on.
    pub(super) fn publish_entries(&self, table: u64, index: u64, words: &[u64]) -> Result<()> {
        let index = index & ((1 << self.header.l2_bits()) - 1);
        let host = table + index * self.layout.entry_len();
        self.tables.publish(host, words)
    }

    /// The new entry of a whole cluster that is dropped, and whether it keeps its space.
    fn dropped(&self, cluster: Cluster, target: Target) -> (Vec<u64>, bool) {
        if target == Target::Dropped && cluster == Cluster::BELOW {
            return (vec![0; if self.layout.extended { 2 } else { 1 }], true);
        }
        let zero = target != Target::Below;
        let external = self.external().is_some() && zero;
        let keep = match cluster.space {
            Space::Own(host) if target == Target::ZeroKept || external => Some(host),
            _ => None,
        };
        let word = keep.map_or(0, |host| host | COPIED);
        if self.layout.extended {
            return (vec![word, if zero { !ALL } else { 0 }], keep.is_some());
        }
        (vec![word | if zero { ZERO } else { 0 }], keep.is_some())
    }

    /// As `dropped`, of some subclusters of a cluster that is not compressed.
    fn dropped_part(&self, entry: Entry, part: &Range<u64>, target: Target) -> (Vec<u64>, bool) {
        debug_assert!(self.layout.extended);
        let mask = mask(part, self.layout.subcluster_size());
        let rest = entry.bits & !(mask | mask << SUBCLUSTERS);
        let stored = entry.bits & mask;
        let bits = match target {
            Target::Below => rest,
            Target::Dropped => entry.bits & !stored | stored << SUBCLUSTERS,
            Target::Zero | Target::ZeroKept => rest | mask << SUBCLUSTERS,
        };
        let own = matches!(entry.cluster.space, Space::Own(_));
        let flag = if own { COPIED } else { 0 };
        let Some(host) = entry.cluster.whole() else {
            return (vec![0, bits], true);
        };
        if bits & ALL == 0 && target != Target::ZeroKept && self.external().is_none() {
            return (vec![0, bits], false);
        }
        (vec![host | flag, bits], true)
    }

    /// Changes the entries of one second-level table that a range touches; what they referred to is
    /// added to `freed`.
    fn drop_in_table(
        &self,
        range: &Range<u64>,
        target: Target,
        freed: &mut Vec<Range<u64>>,
    ) -> Result<()> {
        let size = self.layout.cluster_size();
        let span = down(range.start, size)..range.end.next_multiple_of(size);
        let starts = (span.start >> self.layout.cluster_bits..span.end >> self.layout.cluster_bits)
            .map(|index| index << self.layout.cluster_bits);
        let entries: Vec<Entry> = starts
            .clone()
            .map(|at| self.entry(at))
            .collect::<Result<_>>()?;
        let has_none = |e: &Entry| e.cluster.space == Space::None;
        if target == Target::Dropped && entries.iter().all(has_none) {
            return Ok(());
        }
        let index = span.start >> self.layout.cluster_bits;
        let (mut words, mut gone) = (Vec::new(), Vec::new());
        for (start, entry) in starts.zip(entries) {
            let end = match range.end >= self.size() {
                true => start + size,
                false => range.end.min(start + size),
            };
            let part = range.start.max(start) - start..end - start;
            let packed = entry.cluster.packed().is_some();
            let by_parts = self.layout.extended && target == Target::Dropped && !packed;
            let (entry_words, kept) = if range::len(&part) == size && !by_parts {
                self.dropped(entry.cluster, target)
            } else {
                // It may have become compressed since the ends were looked at.
                check_part(start, entry.cluster)?;
                self.dropped_part(entry, &part, target)
            };
            words.extend(entry_words);
            if !kept {
                gone.extend(self.unnamed(entry.cluster.space));
            }
        }
        if self.tables.holds(span.start, &words)? {
            return Ok(());
        }
        let table = self.own_table(self.l1_index(index))?;
        self.publish_entries(table, index, &words)?;
        freed.append(&mut gone);
        Ok(())
    }

    /// Gives clusters back to the host, and to whoever wants them next.
    fn release(&self, runs: &[Range<u64>]) -> Result<()> {
        let mut refcounts = self.writer()?.refcounts.lock();
        let once = runs.iter().map(|run| (run.clone(), 1));
        refcounts.step_each(once, Step::Down)?;
        let mut free: Vec<Range<u64>> = Vec::new();
        for cluster in runs.iter().cloned().flatten() {
            let seen = free.last().is_some_and(|last| cluster < last.end);
            if !seen && refcounts.count(cluster)? == 0 {
                range::push_merged(&mut free, cluster..cluster + 1);
            }
        }
        self.punch(&free);
        if !free.is_empty() {
            self.decoded.clear();
        }
        Ok(())
    }
}

/// Refuses a change in part of the cluster at `start` where that has no parts.
pub(super) fn check_part(start: u64, cluster: Cluster) -> Result<()> {
    match cluster.packed() {
        Some(_) => Err(Error::unsupported(format!(
            "the cluster at {start:#x} is compressed, and cannot change in part"
        ))),
        None => Ok(()),
    }
}

impl Units for Qcow2 {
    /// Second-level tables, each with the units whose entries are in it.
    type Entries<'a> = Vec<(Range<u64>, Table<'a>)>;

    fn allocator(&self) -> Result<&Allocator> {
        Ok(&self.writer()?.allocator)
    }

    fn unit_len(&self) -> u64 {
        self.layout.cluster_size()
    }

    fn part_len(&self) -> u64 {
        self.layout.subcluster_size()
    }

    fn disk_end(&self) -> u64 {
        self.size()
    }

    fn has_backing(&self) -> bool {
        self.header.backing_name.is_some()
    }

    fn data(&self) -> Result<&dyn Storage> {
        self.data
            .as_deref()
            .ok_or_else(|| Error::unsupported("the data file was not opened"))
    }

    fn together(&self, _index: u64) -> Range<u64> {
        0..self.size().div_ceil(self.layout.cluster_size())
    }

    fn next_to_drop(&self, index: u64, end: u64, target: Target) -> Result<u64> {
        let bits = self.layout.cluster_bits;
        let nothing = matches!(target, Target::Below | Target::Dropped);
        let mut index = index;
        while (!self.has_backing() || nothing)
            && index < end
            && self
                .tables
                .entry_offset(index << bits, Wait::Yes)?
                .is_none()
        {
            index = self.units_of(self.l1_index(index)).end;
        }
        Ok(index.min(end))
    }

    fn unit(&self, index: u64) -> Result<Unit> {
        let entry = self.entry(index << self.layout.cluster_bits)?;
        let space = entry.cluster.space;
        match space {
            Space::Own(host) if self.is_guarded(host) => Err(self.metadata_at(host)),
            space => Ok(Unit {
                space,
                whole: self.whole(entry),
                word: match space {
                    Space::Encoded { .. } => ALL,
                    _ => entry.bits,
                },
            }),
        }
    }

    fn parts(
        &self,
        index: u64,
        _unit: &Unit,
        _within: &Range<u64>,
    ) -> Result<Vec<(Content, Range<u64>)>> {
        let entry = self.entry(index << self.layout.cluster_bits)?;
        let len = self.layout.subcluster_size();
        if let Some(content) = self.whole(entry) {
            return Ok(vec![(content, 0..self.layout.cluster_size())]);
        }
        let mut parts: Vec<(Content, Range<u64>)> = Vec::new();
        for number in 0..SUBCLUSTERS {
            let content = (self.layout).subcluster(&entry.cluster, entry.bits, number)?;
            let start = u64::from(number) * len;
            match parts.last_mut() {
                Some((last, part)) if *last == content => part.end = start + len,
                _ => parts.push((content, start..start + len)),
            }
        }
        Ok(parts)
    }

    fn decoded(&self, index: u64, unit: &Unit) -> Result<Arc<[u8]>> {
        match unit.space {
            Space::Encoded { start, end } => {
                self.decode_kept(start..end, index << self.layout.cluster_bits)
            }
            _ => Err(Error::corrupt(
                "a cluster that is not compressed is no more",
            )),
        }
    }

    /// What the header promises and this driver does not keep up is taken back, durably, and
    /// bitmaps begin to record.
    fn announce(&self) -> Result<()> {
        let writer = self.writer()?;
        let mut tracker = writer.tracker.lock();
        self.prepare()?;
        // One that is there already still has what it recorded.
        if tracker.is_none() {
            *tracker = Tracker::start(&*self.file, self.directory()?, self.header.cluster_bits)?;
        }
        writer.tracking.store(tracker.is_some(), Ordering::Release);
        Ok(())
    }

    fn note(&self, guest: &Range<u64>) -> Result<()> {
        self.record(guest)
    }

    fn ahead(&self) -> Range<u64> {
        if self.external().is_some() {
            return 0..0;
        }
        let bytes = MOST.min(self.size() / PART);
        1..(bytes >> self.layout.cluster_bits).clamp(1, MOST_CLUSTERS)
    }

    fn take(&self, index: u64, count: u64) -> Result<Taken> {
        if self.external().is_some() {
            let size = self.layout.cluster_size();
            return Ok(Taken::new(index * size, count, size));
        }
        let taken = self.take_clusters(1..count + 1)?;
        self.tables.forget(taken.bytes(self.unit_len()));
        Ok(taken)
    }

    fn untake(&self, taken: &Taken) {
        if self.external().is_none() {
            // Where this fails too, they stay a leak.
            drop(self.uncount(&taken.bytes(self.unit_len())));
        }
    }

    fn make_tables(&self, units: Range<u64>) -> Result<()> {
        let mut tables = self.l1_index(units.start)..self.l1_index(units.end.max(1) - 1) + 1;
        tables.try_for_each(|l1_index| self.own_table(l1_index).map(drop))
    }

    fn open(
        &self,
        units: Range<u64>,
        first: u64,
        waits: bool,
    ) -> Result<(Range<u64>, Self::Entries<'_>)> {
        let asked = self.l1_index(first);
        let mut run = self.units_of(asked);
        let table = match waits {
            true => self.table_to_change(asked)?,
            false => Table::shown(self.own_table(asked)?),
        };
        let mut tables = vec![(run.clone(), table)];
        let after = asked + 1..self.l1_index(units.end.max(1) - 1) + 1;
        let before = (self.l1_index(units.start)..asked).rev();
        for l1_index in after.chain(before) {
            let part = self.units_of(l1_index);
            // Where one cannot be had now, the run ends there.
            if run.end != part.start && run.start != part.end {
                continue;
            }
            let table = match waits {
                true => self.another_to_change(l1_index),
                false => self
                    .own_table(l1_index)
                    .map(|host| Some(Table::shown(host))),
            };
            let Ok(Some(table)) = table else { continue };
            run = run.start.min(part.start)..run.end.max(part.end);
            tables.push((part, table));
        }
        Ok((intersect(&run, &units).unwrap_or(units), tables))
    }

    fn complete(&self, entries: &Self::Entries<'_>, new: &[New]) -> Result<()> {
        let (data, size) = (self.data()?, self.layout.cluster_size());
        let end = |new: &New| new.host + size.min(self.size() - new.index * size);
        if let Some(end) = new.iter().map(end).max()
            && data.size() < end
        {
            // Grows the file and never cuts it, whatever other threads write behind us.
            data.write_at(&[0], end - 1)?;
        }
        // Nobody sees these tables before their own entries appear.
        let mut hidden = entries.iter().filter(|(_, table)| !table.shows());
        hidden.try_for_each(|(part, table)| self.publish_part(part, table, new))
    }

    fn publish(&self, entries: Self::Entries<'_>, new: &[New]) -> Result<()> {
        let (shown, hidden): (Vec<_>, Vec<_>) = entries.into_iter().partition(|(_, t)| t.shows());
        for (part, table) in &shown {
            self.publish_part(part, table, new)?;
        }
        hidden
            .into_iter()
            .try_for_each(|(_, table)| self.show(table))
    }

    fn drop_units(
        &self,
        guest: &Range<u64>,
        target: Target,
        freed: &mut Vec<Range<u64>>,
    ) -> Result<()> {
        let mut at = guest.start;
        while at < guest.end {
            let units = self.units_of(self.l1_index(at >> self.layout.cluster_bits));
            let end = guest.end.min(units.end << self.layout.cluster_bits);
            self.drop_in_table(&(at..end), target, freed)?;
            at = end;
        }
        Ok(())
    }

    /// Whole clusters; none where metadata is, whoever points there.
    fn unnamed(&self, old: Space) -> Option<Range<u64>> {
        let size = self.layout.cluster_size();
        let host = match old {
            Space::None => return None,
            // Each cluster that it touches was counted once for it.
            Space::Encoded { start, end } => down(start, size)..end.next_multiple_of(size),
            Space::Own(host) | Space::Shared(host) => host..host + size,
        };
        let kept = self.external().is_some() || self.is_guarded(host.start);
        (!kept).then_some(host)
    }

    fn give_back(&self, mut freed: Vec<Range<u64>>) -> Result<()> {
        freed.sort_by_key(|host| host.start);
        let mut runs: Vec<Range<u64>> = Vec::new();
        // Neighbours become one; what is listed twice was counted twice.
        for host in freed {
            range::push_merged(&mut runs, self.layout.clusters(&host));
        }
        self.release(&runs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_cover_whole_subclusters() {
        assert_eq!(mask(&(0..2048), 2048), 1);
        assert_eq!(mask(&(2048..8192), 2048), 0b1110);
        assert_eq!(mask(&(0..65_536), 2048), 0xffff_ffff);
    }
}

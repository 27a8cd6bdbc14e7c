//! Zeroing and discarding by metadata; space assigned ahead in guest order.

use std::ops::Range;

use super::Qcow2;
use super::allocate::{Space, Unit, mask};
use super::entry::{COPIED, Cluster, SUBCLUSTERS, ZERO};
use super::feature;
use super::refcount::{Step, Taken};
use crate::error::{Error, Result};
use crate::image::open::WriteOrder;
use crate::image::{Layout as AssignLayout, Wait};
use crate::storage::Zeroing;
use crate::util::align::down;
use crate::util::range;

/// What a cluster is to become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Become {
    /// Zero, its space given back.
    Zero,
    /// Zero, its space kept where it is its own.
    ZeroKept,
    /// Unallocated.
    Unallocated,
    /// Zero where it holds something, its space given back; what the layer below has stays there.
    Dropped,
}

impl Qcow2 {
    /// [`crate::image::Image::zero`].
    pub(super) fn zero_range(&self, range: &Range<u64>, how: Zeroing) -> Result<()> {
        self.start_writing()?;
        self.record(range)?;
        let raw_data = self.external().is_some();
        if raw_data && self.header.autoclear & feature::DATA_FILE_RAW != 0 {
            // The data file must read as the disk does, so the zeroes belong there.
            return Err(Error::unsupported(
                "the data file must itself read as zeroes",
            ));
        }
        if self.header.version < 3 && self.header.backing_name.is_some() {
            return Err(Error::unsupported("version 2 images have no zero clusters"));
        }
        let target = match how {
            _ if self.header.version < 3 => Become::Unallocated,
            Zeroing::MayUnmap => Become::Zero,
            Zeroing::KeepSpace => Become::ZeroKept,
        };
        self.each_cluster(range, target)
    }

    /// [`crate::image::Image::discard`].
    pub(super) fn discard_range(&self, range: &Range<u64>) -> Result<()> {
        self.start_writing()?;
        self.record(range)?;
        let backed = self.header.backing_name.is_some();
        // Without zero clusters, what lies below would show again.
        if self.external().is_some() || backed && self.header.version < 3 {
            return Err(Error::unsupported(
                "the range cannot be dropped by metadata alone",
            ));
        }
        let target = match backed {
            true => Become::Dropped,
            false => Become::Unallocated,
        };
        self.each_cluster(range, target)
    }

    /// Refuses a range that begins or ends within a compressed cluster, which has no parts.
    fn check_ends(&self, range: &Range<u64>) -> Result<()> {
        let size = self.layout.cluster_size();
        for at in [range.start, range.end] {
            if at % size != 0 && at < self.size() {
                let start = down(at, size);
                check_part(start, self.unit(start)?.cluster)?;
            }
        }
        Ok(())
    }

    /// Changes whole subclusters, skipping what has no table where there is nothing to change.
    pub(super) fn each_cluster(&self, range: &Range<u64>, target: Become) -> Result<()> {
        self.check_ends(range)?;
        let size = self.layout.cluster_size();
        let covered = size << self.header.l2_bits();
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min(down(at, covered) + covered);
            let empty = self
                .tables
                .entry_offset(&*self.file, at, Wait::Yes)?
                .is_none();
            let nothing = matches!(target, Become::Unallocated | Become::Dropped);
            if empty && (self.header.backing_name.is_none() || nothing) {
                at = end;
                continue;
            }
            let next = end.min(down(at, size) + (1 << 10) * size);
            self.change_clusters(&(at..next), target)?;
            at = next;
        }
        self.release_much()
    }

    /// Changes the clusters of a range within one second-level table.
    fn change_clusters(&self, range: &Range<u64>, target: Become) -> Result<()> {
        let size = self.layout.cluster_size();
        let span = down(range.start, size)..range.end.next_multiple_of(size);
        let writer = self.writer()?;
        let _reserved = loop {
            if let Some(reserved) = writer.reservations.reserve(span.clone()) {
                break reserved;
            }
        };
        let bits = self.layout.cluster_bits + self.header.l2_bits();
        let step = usize::try_from(size).unwrap_or(usize::MAX);
        let units = (span.start..span.end).step_by(step).map(|at| self.unit(at));
        let units: Vec<Unit> = units.collect::<Result<_>>()?;
        let is_nowhere = |u: &Unit| matches!(u.cluster, Cluster::Unallocated | Cluster::Zero);
        if target == Become::Dropped && units.iter().all(is_nowhere) {
            return Ok(());
        }
        let mut words = Vec::new();
        let mut freed = Vec::new();
        for (start, unit) in (span.start..span.end).step_by(step).zip(units) {
            let end = if range.end >= self.size() {
                start + size
            } else {
                range.end.min(start + size)
            };
            let part = range.start.max(start) - start..end - start;
            let packed = matches!(unit.cluster, Cluster::Compressed(_));
            let by_parts = self.layout.extended && target == Become::Dropped && !packed;
            let (entry, kept) = if range::len(&part) == size && !by_parts {
                self.changed(unit.cluster, target)
            } else {
                // It may have become compressed since the ends were looked at.
                check_part(start, unit.cluster)?;
                self.changed_part(unit, &part, target)
            };
            words.extend(entry);
            if !kept {
                freed.push(unit.cluster);
            }
        }
        if self.tables.holds(&*self.file, span.start, &words)? {
            return Ok(());
        }
        let table = self.own_table(span.start >> bits)?;
        self.publish(table, span.start, &words)?;
        freed
            .into_iter()
            .try_for_each(|cluster| self.free_cluster(cluster))
    }

    /// The new entry, and whether the cluster's space stays its own.
    fn changed(&self, cluster: Cluster, target: Become) -> (Vec<u64>, bool) {
        if target == Become::Dropped && cluster == Cluster::Unallocated {
            return (vec![0], true);
        }
        let zero = target != Become::Unallocated;
        let external = self.external().is_some() && zero;
        let own = match cluster {
            Cluster::Standard {
                host, copied: true, ..
            } => Some(host),
            _ => None,
        };
        let keep = own.filter(|_| target == Become::ZeroKept || external);
        let word = keep.map_or(0, |host| host | COPIED);
        if self.layout.extended {
            let bits = if zero { !0 << SUBCLUSTERS } else { 0 };
            return (vec![word, bits], keep.is_some());
        }
        (vec![word | if zero { ZERO } else { 0 }], keep.is_some())
    }

    /// As `changed`, for some subclusters of a cluster that is not compressed.
    fn changed_part(&self, unit: Unit, part: &Range<u64>, target: Become) -> (Vec<u64>, bool) {
        debug_assert!(self.layout.extended);
        let mask = mask(part, self.layout.subcluster_size());
        let rest = unit.bits & !(mask | mask << SUBCLUSTERS);
        let stored = unit.bits & mask;
        let bits = match target {
            Become::Unallocated => rest,
            Become::Dropped => unit.bits & !stored | stored << SUBCLUSTERS,
            Become::Zero | Become::ZeroKept => rest | mask << SUBCLUSTERS,
        };
        let Cluster::Standard { host, copied, .. } = unit.cluster else {
            return (vec![0, bits], true);
        };
        let empty = bits & !(!0 << SUBCLUSTERS) == 0;
        if empty && target != Become::ZeroKept && self.external().is_none() {
            return (vec![0, bits], false);
        }
        (vec![host | if copied { COPIED } else { 0 }, bits], true)
    }

    /// Space that [`AssignLayout::assign`] set aside for clusters from guest offset `start` on.
    pub(super) fn assigned_space(&self, start: u64, count: u64) -> Result<Option<Space>> {
        let writer = self.writer()?;
        let mut assigned = writer.assigned.lock();
        let at = start >> self.layout.cluster_bits;
        let Some((&first, _)) = assigned.range(..=at).next_back() else {
            return Ok(None);
        };
        let before = at - first;
        let Some(run) = assigned
            .get(&first)
            .filter(|run| before < range::len(&run.clusters))
            .cloned()
        else {
            return Ok(None);
        };
        assigned.remove(&first);
        let len = range::len(&run.clusters);
        let end = len.min(before + count);
        if before > 0 {
            assigned.insert(first, self.part(&run, 0..before));
        }
        if end < len {
            assigned.insert(first + end, self.part(&run, end..len));
        }
        Ok(Some(Space::new(self.part(&run, before..end))))
    }

    /// A part of a run, counted in clusters from its first.
    pub(super) fn part(&self, run: &Taken, part: Range<u64>) -> Taken {
        Taken {
            host: run.host + (part.start << self.layout.cluster_bits),
            clusters: run.clusters.start + part.start..run.clusters.start + part.end,
            fresh: run.fresh,
        }
    }
}

/// Refuses a change in part of the cluster at `start` where that has no parts.
fn check_part(start: u64, cluster: Cluster) -> Result<()> {
    match cluster {
        Cluster::Compressed(_) => Err(Error::unsupported(format!(
            "the cluster at {start:#x} is compressed, and cannot change in part"
        ))),
        _ => Ok(()),
    }
}

impl AssignLayout for Qcow2 {
    fn assign(&self, ranges: &[Range<u64>]) -> Result<()> {
        self.start_writing()?;
        if self.external().is_some() {
            return ranges.iter().try_for_each(|r| self.reserve_host(r.clone()));
        }
        let mut wanted = Vec::new();
        for range in ranges {
            self.want(range, &mut wanted)?;
        }
        self.assign_wanted(&wanted)
    }
}

impl Qcow2 {
    /// Adds the guest clusters of a range, which lies after those before, that have no space and
    /// none assigned; ranges may meet in one cluster.
    fn want(&self, range: &Range<u64>, wanted: &mut Vec<Range<u64>>) -> Result<()> {
        let bits = self.layout.cluster_bits;
        let seen = wanted.last().map_or(0, |last| last.end);
        let mut at = (range.start >> bits).max(seen);
        let end = range.end.div_ceil(1 << bits);
        while at < end {
            // Tables come first, in guest order too.
            self.own_table(at >> self.header.l2_bits())?;
            let in_table = ((at >> self.header.l2_bits()) + 1) << self.header.l2_bits();
            let stop = end.min(in_table);
            at = match self.unassigned(at..stop)? {
                Some(free) => {
                    range::push_merged(wanted, free.clone());
                    free.end
                }
                None => stop,
            };
        }
        Ok(())
    }

    /// Assigns space to guest clusters, in as few pieces as there are.  Where order matters it is
    /// made ready, all of it by one sync; where the host cannot do that, nothing is assigned.
    fn assign_wanted(&self, wanted: &[Range<u64>]) -> Result<()> {
        let ordered = self.writer()?.order() != WriteOrder::Unordered;
        let since = self.moment()?;
        let mut left: u64 = wanted.iter().map(range::len).sum();
        let mut runs = self.unnamed([]);
        while left > 0 {
            let taken = self.take(1..left + 1)?;
            left -= range::len(&taken.clusters);
            runs.taken.push(taken.clone());
            if !self.prepare_assigned(&taken, ordered)? {
                return Ok(());
            }
        }
        if ordered && !runs.taken.is_empty() {
            self.settle_since(since)?;
        }
        self.hand_out(wanted, runs.name())
    }

    /// Whether clusters that were just taken can be assigned.
    fn prepare_assigned(&self, taken: &Taken, ordered: bool) -> Result<bool> {
        let host = taken.clusters.start << self.layout.cluster_bits
            ..taken.clusters.end << self.layout.cluster_bits;
        self.tables.forget(host.clone());
        let usable = !ordered || self.make_zero(taken)?;
        self.reserve_host(host)?;
        Ok(usable)
    }

    /// Notes which guest clusters get which of the runs, both in order.
    fn hand_out(&self, wanted: &[Range<u64>], runs: Vec<Taken>) -> Result<()> {
        let mut assigned = self.writer()?.assigned.lock();
        let mut wanted = wanted.iter().cloned();
        let mut guest = 0..0;
        for run in runs {
            let (mut used, len) = (0, range::len(&run.clusters));
            while used < len {
                if guest.is_empty() {
                    let Some(next) = wanted.next() else {
                        return Ok(());
                    };
                    guest = next;
                }
                let count = range::len(&guest).min(len - used);
                assigned.insert(guest.start, self.part(&run, used..used + count));
                guest.start += count;
                used += count;
            }
        }
        Ok(())
    }

    /// Gives back what was assigned, or made ready, and not used.
    pub(super) fn release_assigned(&self) -> Result<()> {
        self.release_ahead()?;
        let writer = self.writer()?;
        let assigned = std::mem::take(&mut *writer.assigned.lock());
        let mut refcounts = writer.refcounts.lock();
        let mut clusters = assigned.into_values().map(|taken| taken.clusters);
        clusters.try_for_each(|run| refcounts.step(&*self.file, run, Step::Down))
    }

    /// The first run of guest clusters in a range of one second-level table that have no space and
    /// none assigned.
    fn unassigned(&self, clusters: Range<u64>) -> Result<Option<Range<u64>>> {
        let start = clusters.start << self.layout.cluster_bits;
        let table = self.tables.entry_offset(&*self.file, start, Wait::Yes)?;
        let is_free = |index: u64| -> Result<bool> {
            let Some(first) = table else { return Ok(true) };
            let entry = first + (index - clusters.start) * self.layout.entry_len();
            let cluster = self.tables.cluster(&*self.file, entry, Wait::Yes)?;
            Ok(!matches!(cluster, Cluster::Standard { copied: true, .. }))
        };
        let mut at = clusters.start;
        while at < clusters.end {
            let gap = self.not_assigned(at..clusters.end)?;
            at = gap.start;
            while at < gap.end && !is_free(at)? {
                at += 1;
            }
            let free = at;
            while at < gap.end && is_free(at)? {
                at += 1;
            }
            if free < at {
                return Ok(Some(free..at));
            }
        }
        Ok(None)
    }

    /// The first run of guest clusters in a range that have none assigned; empty, at its end, where
    /// there are none.
    fn not_assigned(&self, clusters: Range<u64>) -> Result<Range<u64>> {
        let assigned = self.writer()?.assigned.lock();
        let mut at = clusters.start;
        if let Some((first, run)) = assigned.range(..=at).next_back() {
            at = at.max(first + range::len(&run.clusters));
        }
        for (first, run) in assigned.range(at..clusters.end.max(at)) {
            if *first > at {
                return Ok(at..*first);
            }
            at = first + range::len(&run.clusters);
        }
        let at = at.min(clusters.end);
        Ok(at..clusters.end)
    }

    fn reserve_host(&self, host: Range<u64>) -> Result<()> {
        use crate::error::ErrorKind;
        if range::len(&host) == 0 {
            return Ok(());
        }
        match self.data()?.reserve(host) {
            Err(e) if e.kind() == ErrorKind::Unsupported => Ok(()),
            done => done,
        }
    }
}

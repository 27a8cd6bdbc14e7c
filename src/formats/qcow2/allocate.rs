//! Giving guest ranges space: what each cluster holds, new clusters, filling, publishing.

use std::ops::Range;

use super::Qcow2;
use super::entry::{COPIED, Cluster, SUBCLUSTERS, Subcluster};
use super::refcount::Taken;
use super::writer::Since;
use crate::error::{Error, Result};
use crate::image::open::WriteOrder;
use crate::image::{Fill, Old, Slot, Wait};
use crate::storage::Storage;
use crate::util::align::down;
use crate::util::range::{self, intersect};

/// Bytes given space in one go at most.
const MAX_SPAN: u64 = 64 << 20;

/// One cluster as its entry describes it, under a reservation.
#[derive(Debug, Clone, Copy)]
pub(super) struct Unit {
    /// Where it is.
    pub(super) cluster: Cluster,
    /// The bits of its subclusters; 0 without them.
    pub(super) bits: u64,
}

impl Unit {
    /// It reads as zeroes, all of it, whatever lies below.
    pub(super) fn is_zero(self, extended: bool) -> bool {
        self.plain(extended) == Some(Subcluster::Zero)
    }

    /// The whole cluster reads from one place that is not in this file.
    fn plain(self, extended: bool) -> Option<Subcluster> {
        match (self.cluster, extended) {
            (Cluster::Unallocated, false) => Some(Subcluster::Below),
            (Cluster::Zero, false) => Some(Subcluster::Zero),
            (Cluster::Unallocated, true) if self.bits == 0 => Some(Subcluster::Below),
            (Cluster::Unallocated, true) if self.bits == !0 << SUBCLUSTERS => {
                Some(Subcluster::Zero)
            }
            _ => None,
        }
    }
}

/// Bits for the subclusters of `part`, a range within a cluster in whole subclusters.
pub(super) fn mask(part: &Range<u64>, unit: u64) -> u64 {
    let (first, end) = (part.start / unit, part.end.div_ceil(unit));
    let below = |n: u64| if n >= 64 { !0 } else { (1u64 << n) - 1 };
    below(end) & !below(first)
}

impl Qcow2 {
    /// [`crate::image::Image::allocate`].
    pub(super) fn allocate_range(&self, at: u64, len: u64, fill: &mut Fill<'_>) -> Result<u64> {
        self.start_writing()?;
        let request = self.in_one_go(at, len);
        self.allocate_around(&request, &request, fill)
    }

    /// [`crate::image::Image::allocate_ahead`].
    pub(super) fn allocate_following(&self, at: u64, len: u64, fill: &mut Fill<'_>) -> Result<u64> {
        self.start_writing()?;
        let request = self.in_one_go(at, len);
        let writer = self.writer()?;
        // Where nobody waits for syncs there is nothing to save.
        let around = match writer.order() {
            WriteOrder::Ordered => writer.followed.around(&request),
            WriteOrder::Unordered => request.clone(),
        };
        self.allocate_around(&request, &around, fill)
    }

    /// The part of a request that is given space in one go.
    fn in_one_go(&self, at: u64, len: u64) -> Range<u64> {
        at..(at + len).min(down(at, self.layout.cluster_size()) + MAX_SPAN)
    }

    /// Gives the request space, and moves what is `around` it where it has to move.
    fn allocate_around(
        &self,
        request: &Range<u64>,
        around: &Range<u64>,
        fill: &mut Fill<'_>,
    ) -> Result<u64> {
        let size = self.layout.cluster_size();
        let first = down(request.start, size);
        let covered = size << self.header.l2_bits();
        let in_table = request.start..request.end.min(down(first, covered) + covered);
        let span = match self.moves(self.unit(first)?) {
            true => {
                let end = around.end.min(self.size()).max(request.end);
                down(around.start, size)..end.next_multiple_of(size)
            }
            false => first..in_table.end.next_multiple_of(size),
        };
        self.record(request)?;
        let writer = self.writer()?;
        let Some(_reserved) = writer.reservations.reserve(span.clone()) else {
            return Ok(0);
        };
        let unit = self.unit(first)?;
        let own = matches!(unit.cluster, Cluster::Standard { copied: true, .. });
        match unit.plain(self.layout.extended) {
            Some(old) if self.is_zero(old) => {
                let span = first..in_table.end.next_multiple_of(size);
                self.allocate_plain(in_table, span, old, fill)
            }
            _ if own => {
                let request = request.start..request.end.min(first + size);
                self.allocate_rest(&request, unit, fill)
            }
            _ => self.move_run(request, &span, fill),
        }
    }

    /// The cluster at `start`, as its entry has it now, to be changed.
    ///
    /// # Errors
    /// `Corrupt` where it is at another place of a data file than its own, which may be that of
    /// another; the host's.
    pub(super) fn unit(&self, start: u64) -> Result<Unit> {
        let Some(entry) = self.tables.entry_offset(&*self.file, start, Wait::Yes)? else {
            return Ok(Unit {
                cluster: Cluster::Unallocated,
                bits: 0,
            });
        };
        let cluster = self.tables.cluster(&*self.file, entry, Wait::Yes)?;
        if let Cluster::Standard { host, .. } = cluster
            && self.is_misplaced(host, start)
        {
            return Err(Error::corrupt(format!(
                "the cluster of {start:#x} is at {host:#x} of the data file (expected: at its own offset), so it is not written; check names the damage"
            )));
        }
        let bits = self.tables.bits(&*self.file, entry, Wait::Yes)?;
        Ok(Unit { cluster, bits })
    }

    /// Gives new space to clusters that all read as zeroes, and have none.
    fn allocate_plain(
        &self,
        request: Range<u64>,
        span: Range<u64>,
        old: Subcluster,
        fill: &mut Fill<'_>,
    ) -> Result<u64> {
        let size = self.layout.cluster_size();
        let mut count = 1;
        while span.start + count * size < span.end
            && self
                .unit(span.start + count * size)?
                .plain(self.layout.extended)
                == Some(old)
        {
            count += 1;
        }
        let since = self.moment()?;
        let table =
            self.own_table(span.start >> (self.layout.cluster_bits + self.header.l2_bits()))?;
        let space = self.zero_space(span.start, count)?;
        let mut unnamed = self.unnamed(space.taken.clone());
        let guest = span.start..span.start + space.count * size;
        let unit = self.layout.subcluster_size();
        let whole =
            request.start - request.start % unit..request.end.next_multiple_of(unit).min(guest.end);
        let slot = Slot {
            guest: whole.start..whole.end.min(self.size()),
            storage: self.data()?,
            host: space.host + (whole.start - guest.start),
            old: match old {
                Subcluster::Zero => Old::Zero,
                _ => Old::Below,
            },
            zeroed: space.fresh,
        };
        fill(slot)?;
        self.finish(&space, &guest, since)?;
        let mut words = Vec::new();
        for index in 0..space.count {
            words.push((space.host + index * size) | COPIED);
            if self.layout.extended {
                let cluster = guest.start + index * size..guest.start + (index + 1) * size;
                let stored = intersect(&cluster, &whole).map_or(0, |part| {
                    mask(
                        &(part.start - cluster.start..part.end - cluster.start),
                        unit,
                    )
                });
                let zero = if old == Subcluster::Zero {
                    !stored & !0 >> SUBCLUSTERS
                } else {
                    0
                };
                words.push(stored | zero << SUBCLUSTERS);
            }
        }
        unnamed.name();
        self.publish(table, guest.start, &words)?;
        Ok(request.end.min(guest.end) - request.start)
    }

    /// Fills the subclusters of the request that a cluster with space of its own does not have.
    fn allocate_rest(&self, request: &Range<u64>, unit: Unit, fill: &mut Fill<'_>) -> Result<u64> {
        let (size, part_len) = (self.layout.cluster_size(), self.layout.subcluster_size());
        let Cluster::Standard { host, .. } = unit.cluster else {
            return Ok(0);
        };
        let start = down(request.start, size);
        let within = request.start - start..request.end - start;
        // What is stored in place is the caller's to overwrite; nobody fills it here.
        let within = within.start..self.unstored_end(unit, &within)?;
        if self.is_guarded(host) {
            return Err(self.metadata_at(host));
        }
        if within.is_empty() {
            return Ok(0);
        }
        let since = self.moment()?;
        let table = self.own_table(start >> (self.layout.cluster_bits + self.header.l2_bits()))?;
        let space = Space {
            host,
            count: 1,
            fresh: false,
            ready: false,
            taken: None,
        };
        let mut bits = unit.bits;
        let grown = down(within.start, part_len)..within.end.next_multiple_of(part_len);
        for (kind, part) in self.parts(unit)? {
            let Some(part) = intersect(&part, &grown).filter(|_| kind != Subcluster::Stored) else {
                continue;
            };
            bits |= mask(&part, part_len);
            bits &= !(mask(&part, part_len) << SUBCLUSTERS);
            self.fill_part(start, &part, kind, host, fill)?;
        }
        self.finish(&space, &(start..start + size), since)?;
        let mut words = vec![host | COPIED];
        if self.layout.extended {
            words.push(bits);
        }
        self.publish(table, start, &words)?;
        Ok(range::len(&within))
    }

    fn fill_part(
        &self,
        start: u64,
        part: &Range<u64>,
        kind: Subcluster,
        host: u64,
        fill: &mut Fill<'_>,
    ) -> Result<()> {
        fill(Slot {
            guest: start + part.start..(start + part.end).min(self.size()),
            storage: self.data()?,
            host: host + part.start,
            old: match kind {
                Subcluster::Below => Old::Below,
                _ => Old::Zero,
            },
            zeroed: false,
        })
    }

    /// Where the first stored part of a range within a cluster begins; its end where none does.
    fn unstored_end(&self, unit: Unit, within: &Range<u64>) -> Result<u64> {
        let parts = self.parts(unit)?.into_iter();
        let mut stored = parts.filter_map(|(kind, part)| {
            intersect(&part, within).filter(|_| kind == Subcluster::Stored)
        });
        Ok(stored.next().map_or(within.end, |part| part.start))
    }

    /// The cluster cut into runs of subclusters that read alike, as ranges within it.
    pub(super) fn parts(&self, unit: Unit) -> Result<Vec<(Subcluster, Range<u64>)>> {
        let (size, len) = (self.layout.cluster_size(), self.layout.subcluster_size());
        let whole = match unit.cluster {
            Cluster::Compressed(_) => Some(Subcluster::Stored),
            _ if self.layout.extended => None,
            Cluster::Standard { zero: false, .. } => Some(Subcluster::Stored),
            Cluster::Standard { .. } | Cluster::Zero => Some(Subcluster::Zero),
            Cluster::Unallocated => Some(Subcluster::Below),
        };
        if let Some(kind) = whole {
            return Ok(vec![(kind, 0..size)]);
        }
        let mut parts: Vec<(Subcluster, Range<u64>)> = Vec::new();
        for index in 0..SUBCLUSTERS {
            let kind = self.layout.subcluster(&unit.cluster, unit.bits, index)?;
            let start = u64::from(index) * len;
            match parts.last_mut() {
                Some((last, part)) if *last == kind => part.end = start + len,
                _ => parts.push((kind, start..start + len)),
            }
        }
        Ok(parts)
    }

    /// Space for up to `count` clusters from guest offset `start`: assigned, new, or, with an
    /// external data file, at the guest offset itself.
    pub(super) fn space(&self, start: u64, count: u64) -> Result<Space> {
        if self.external().is_some() {
            return Ok(Space {
                host: start,
                count,
                fresh: false,
                ready: false,
                taken: None,
            });
        }
        if let Some(space) = self.assigned_space(start, count)? {
            return Ok(space);
        }
        let taken = self.take(1..count + 1)?;
        self.tables
            .forget(taken.host..taken.host + (count << self.layout.cluster_bits));
        Ok(Space::new(taken))
    }

    /// Whether clusters read as zeroes that have no space.
    fn is_zero(&self, old: Subcluster) -> bool {
        match old {
            Subcluster::Zero => true,
            Subcluster::Below => self.header.backing_name.is_none(),
            Subcluster::Stored => false,
        }
    }

    /// As `space`, for clusters that read as zeroes.
    fn zero_space(&self, start: u64, count: u64) -> Result<Space> {
        if let Some(space) = self.assigned_space(start, count)? {
            // What is assigned while order matters was made ready.
            return Ok(match self.writer()?.order() {
                WriteOrder::Unordered => space,
                WriteOrder::Ordered => space.made_ready(),
            });
        }
        match self.ready_space(count)? {
            Some(space) => Ok(space),
            None => self.space(start, count),
        }
    }

    /// After the fill: the file reaches the end of the clusters, and data comes before metadata.
    fn finish(&self, space: &Space, guest: &Range<u64>, since: Since) -> Result<()> {
        let data = self.data()?;
        let len = (guest.end.min(self.size()) - guest.start)
            .min(space.count * self.layout.cluster_size());
        let end = space.host + len;
        if data.size() < end {
            // Grows the file and never cuts it, whatever other threads write behind us.
            data.write_at(&[0], end - 1)?;
        }
        match space.ready {
            true => Ok(()),
            false => self.settle_since(since),
        }
    }

    /// Shows new entries to readers, from the one of guest offset `start` on.
    pub(super) fn publish(&self, table: u64, start: u64, words: &[u64]) -> Result<()> {
        let index = (start >> self.layout.cluster_bits) & ((1 << self.header.l2_bits()) - 1);
        self.tables
            .publish(&*self.file, table + index * self.layout.entry_len(), words)
    }

    /// Lets go of what a cluster's old entry referred to.
    pub(super) fn free_cluster(&self, cluster: Cluster) -> Result<()> {
        match cluster {
            Cluster::Compressed(packed) => {
                // Each cluster that it touches was counted once for it.
                self.free(packed.start..packed.end)
            }
            // What metadata lies in is not given back, whoever points there.
            Cluster::Standard { host, .. } if self.is_guarded(host) => Ok(()),
            Cluster::Standard { host, .. } if self.external().is_none() => {
                self.free(host..host + self.layout.cluster_size())
            }
            _ => Ok(()),
        }
    }

    /// Where guest data is.
    pub(super) fn data(&self) -> Result<&dyn Storage> {
        self.data
            .as_deref()
            .ok_or_else(|| Error::unsupported("the data file was not opened"))
    }
}

/// Space for clusters, contiguous in the data file.
#[derive(Debug)]
pub(super) struct Space {
    /// Offset of the first.
    pub(super) host: u64,
    /// How many.
    pub(super) count: u64,
    /// They read as zeroes.
    pub(super) fresh: bool,
    /// So they do on stable media, where their counts are too.
    ready: bool,
    /// What to give back where nothing comes to refer to it.
    pub(super) taken: Option<Taken>,
}

impl Space {
    pub(super) fn new(taken: Taken) -> Self {
        let count = taken.clusters.end - taken.clusters.start;
        Self {
            host: taken.host,
            count,
            fresh: taken.fresh,
            ready: false,
            taken: Some(taken),
        }
    }

    /// Of clusters that were made ready.
    pub(super) fn ready(taken: Taken) -> Self {
        Self::new(taken).made_ready()
    }

    fn made_ready(self) -> Self {
        Self {
            fresh: true,
            ready: true,
            ..self
        }
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

//! What an image opened for writing has beyond a read-only one: refcounts, reservations, freed
//! space, and the order of writes.
//!
//! Locks, outermost first: a reservation of the guest range; the stripe of its second-level table
//! (held while a table is made or copied, and until its copy shows); `ahead`; `freed`; `refcounts`.
//! Nothing else is held while guest data is written.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use parking_lot::{Mutex, MutexGuard};

use super::Qcow2;
use super::behind::Behind;
use super::bitmap::Tracker;
use super::entry::COPIED;
use super::extension;
use super::feature;
use super::guard::Guard;
use super::refcount::{Refcounts, Step};
use crate::error::{Error, Result};
use crate::image::units::{Allocator, Taken};
use crate::image::{Wait, be64};
use crate::storage::Zeroing;
use crate::util::align::{clamp_len, len64};
use crate::util::range;

/// Tables that are made or copied at the same time.
const STRIPES: usize = 512;
/// Offset of the autoclear bits in the header.
const AUTOCLEAR_FIELD: u64 = 88;

/// What an image opened for writing has beyond a read-only one.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) refcounts: Mutex<Refcounts>,
    pub(super) allocator: Allocator,
    stripes: Box<[Mutex<()>]>,
    /// Metadata that guest data must not overwrite.
    pub(super) guard: Arc<Guard>,
    pub(super) behind: Behind,
    /// There is a tracker.
    pub(super) tracking: AtomicBool,
    /// The bitmaps are where the header in the file says, not the one that was read on opening.
    pub(super) new_header: AtomicBool,
    /// The bitmaps that record.  Outside `refcounts`.
    pub(super) tracker: Mutex<Option<Tracker>>,
}

/// A second-level table that may be changed in place.
#[derive(Debug)]
pub(super) struct Table<'a> {
    host: u64,
    /// Nothing points at it yet.
    hidden: Option<Hidden<'a>>,
}

#[derive(Debug)]
struct Hidden<'a> {
    index: u64,
    taken: Loose<'a>,
    /// What it is to replace.
    old: Option<u64>,
    _stripe: MutexGuard<'a, ()>,
}

impl Table<'_> {
    /// One that the first-level table points at.
    pub(super) fn shown(host: u64) -> Self {
        Self { host, hidden: None }
    }

    /// Its offset.
    pub(super) fn host(&self) -> u64 {
        self.host
    }

    /// The first-level table points at it.
    pub(super) fn shows(&self) -> bool {
        self.hidden.is_none()
    }
}

impl Writer {
    pub(super) fn new(
        refcounts: Refcounts,
        guard: Arc<Guard>,
        behind: Behind,
        allocator: Allocator,
    ) -> Self {
        Self {
            refcounts: Mutex::new(refcounts),
            allocator,
            stripes: (0..STRIPES).map(|_| Mutex::default()).collect(),
            guard,
            behind,
            tracking: AtomicBool::new(false),
            new_header: AtomicBool::new(false),
            tracker: Mutex::default(),
        }
    }
}

/// Clusters of the image file that nothing points at yet: given back when it is dropped.
#[derive(Debug)]
pub(super) struct Loose<'a> {
    image: &'a Qcow2,
    /// Bytes of the file, in the order in which they were taken.
    pub(super) runs: Vec<Range<u64>>,
}

impl<'a> Loose<'a> {
    /// None yet.
    pub(super) fn new(image: &'a Qcow2) -> Self {
        let runs = Vec::new();
        Self { image, runs }
    }

    /// Clusters in one piece for `len` bytes: where; 0 for none.
    pub(super) fn take_run(&mut self, len: u64) -> Result<u64> {
        match len.div_ceil(self.image.layout.cluster_size()) {
            0 => Ok(0),
            count => Ok(self.take(count..count + 1)?.start),
        }
    }

    /// Clusters, one by one: where each is.
    pub(super) fn take_each(&mut self, count: u64) -> Result<Vec<u64>> {
        let size = self.image.layout.cluster_size();
        let mut hosts = Vec::new();
        while len64(hosts.len()) < count {
            let run = self.take(1..count - len64(hosts.len()) + 1)?;
            hosts.extend(run.step_by(clamp_len(size, usize::MAX)));
        }
        Ok(hosts)
    }

    fn take(&mut self, count: Range<u64>) -> Result<Range<u64>> {
        let taken = self.image.take_clusters(count)?;
        let run = taken.bytes(taken.stride);
        range::push_merged(&mut self.runs, run.clone());
        Ok(run)
    }

    /// Takes over what another has.
    pub(super) fn append(&mut self, other: &mut Self) {
        self.runs.append(&mut other.runs);
    }

    /// From now on something may point at them, whatever comes.
    pub(super) fn keep(&mut self) {
        self.runs.clear();
    }
}

impl Drop for Loose<'_> {
    fn drop(&mut self) {
        for run in self.runs.drain(..) {
            // Where this fails too, they stay a leak.
            drop(self.image.uncount(&run));
        }
    }
}

impl Qcow2 {
    /// The writer's parts.
    pub(super) fn writer(&self) -> Result<&Writer> {
        self.writer.as_ref().ok_or_else(Error::read_only)
    }

    /// Before the first change.
    pub(super) fn start_writing(&self) -> Result<()> {
        self.writer()?.allocator.begin(self)
    }

    /// Before any change: learns where metadata is, and takes back what the header promises and
    /// this driver does not keep up, durably.
    pub(super) fn prepare(&self) -> Result<()> {
        let place = self.writer()?.refcounts.lock().place();
        self.guard_metadata(place)?;
        let has_bitmaps = extension::data(&self.header.extensions, extension::BITMAPS).is_some();
        let unkept = if has_bitmaps { 0 } else { feature::BITMAPS };
        let kept = self.header.autoclear & feature::KEPT_AUTOCLEAR & !unkept;
        if self.header.version >= 3 && kept != self.header.autoclear {
            self.file.write_at(&kept.to_be_bytes(), AUTOCLEAR_FIELD)?;
            self.file.sync()?;
        }
        Ok(())
    }

    /// All writes so far, of metadata and data, come before those that follow, in a power cut too.
    pub(super) fn settle(&self) -> Result<()> {
        self.writer()?.allocator.order.settle()
    }

    /// Takes clusters of the image file.
    pub(super) fn take_clusters(&self, count: Range<u64>) -> Result<Taken> {
        self.refcounts()?.take(count, &self.allowed())
    }

    /// The refcounts, to take clusters: what is free is free.
    pub(super) fn refcounts(&self) -> Result<MutexGuard<'_, Refcounts>> {
        let mut refcounts = self.writer()?.refcounts.lock();
        self.count_uncounted(&mut refcounts)?;
        Ok(refcounts)
    }

    /// Counts the clusters of a range of the image file down, which nothing points at any more.
    pub(super) fn uncount(&self, host: &Range<u64>) -> Result<()> {
        let clusters = self.layout.clusters(host);
        self.writer()?.refcounts.lock().step(clusters, Step::Down)
    }

    /// Gives the host back clusters that are free.
    pub(super) fn punch(&self, free: &[Range<u64>]) {
        let size = self.layout.cluster_size();
        for clusters in free {
            let host = clusters.start * size..(clusters.end * size).min(self.file.size());
            if range::len(&host) > 0 {
                // Where the host cannot, the space is reused all the same.
                drop(self.file.zero(host, Zeroing::MayUnmap));
            }
        }
    }

    /// The second-level table at `host`, for a change of all of them.
    pub(super) fn read_table(&self, host: u64) -> Result<Vec<u8>> {
        if host >= self.file.size() {
            return Err(Error::corrupt(format!(
                "an L2 table is at {host:#x} (the file ends at {:#x})",
                self.file.size()
            )));
        }
        let size = self.layout.cluster_size();
        self.watcher.advance(size);
        be64::read_bytes(&*self.file, host..host + size)
    }

    /// Refuses clusters that metadata is in.
    pub(super) fn allowed(&self) -> impl Fn(u64) -> Result<()> + '_ {
        let bits = self.layout.cluster_bits;
        move |cluster| match self.is_metadata(cluster << bits) {
            true => Err(self.metadata_at(cluster << bits)),
            false => Ok(()),
        }
    }

    /// Where the second-level table of a first-level entry is, which may be changed in place:
    /// makes it, or copies it where snapshots share it.
    pub(super) fn own_table(&self, l1_index: u64) -> Result<u64> {
        let stripe = self.stripe(l1_index)?.lock();
        let table = self.change_table(l1_index, stripe, || {
            self.writer()?.allocator.ready_space(self, 0, 1)
        })?;
        let host = table.host;
        if !table.shows() {
            self.settle()?;
        }
        self.show(table)?;
        Ok(host)
    }

    /// As `own_table`, but a table that it had to make does not show yet: [`Qcow2::show`] follows
    /// once all that was written since before the call is on stable media.
    pub(super) fn table_to_change(&self, l1_index: u64) -> Result<Table<'_>> {
        let stripe = self.stripe(l1_index)?.lock();
        self.change_table(l1_index, stripe, || Ok(None))
    }

    /// As `table_to_change`, for who has such a table already, which others may wait for: `None`
    /// where it would have to wait itself.
    pub(super) fn another_to_change(&self, l1_index: u64) -> Result<Option<Table<'_>>> {
        let stripe = self.stripe(l1_index)?.try_lock();
        let table = stripe.map(|stripe| self.change_table(l1_index, stripe, || Ok(None)));
        table.transpose()
    }

    fn stripe(&self, l1_index: u64) -> Result<&Mutex<()>> {
        Ok(&self.writer()?.stripes[clamp_len(l1_index, usize::MAX) % STRIPES])
    }

    /// As `table_to_change`; an empty one may show at once where `ready` has space for it.
    fn change_table<'a>(
        &'a self,
        l1_index: u64,
        stripe: MutexGuard<'a, ()>,
        ready: impl Fn() -> Result<Option<Taken>>,
    ) -> Result<Table<'a>> {
        let entry = self.tables.l1_entry(l1_index, Wait::Yes)?;
        let old = self.layout.table(entry)?;
        self.look_behind(l1_index, old)?;
        if let Some(host) = old
            && entry & COPIED != 0
        {
            return Ok(Table::shown(host));
        }
        if old.is_none()
            && let Some(space) = ready()?
        {
            let host = space.host;
            self.tables.forget(host..host + self.layout.cluster_size());
            self.point_at_table(l1_index, host)?;
            return Ok(Table::shown(host));
        }
        let mut taken = Loose::new(self);
        let host = taken.take_run(1)?;
        self.fill_table(host, old)?;
        Ok(Table {
            host,
            hidden: Some(Hidden {
                index: l1_index,
                taken,
                old,
                _stripe: stripe,
            }),
        })
    }

    /// Has the first-level table point at a table that is on stable media, where it does not yet.
    /// A table that is never shown is given back.
    pub(super) fn show(&self, table: Table<'_>) -> Result<()> {
        let Some(mut hidden) = table.hidden else {
            return Ok(());
        };
        hidden.taken.keep();
        self.point_at_table(hidden.index, table.host)?;
        let Some(old) = hidden.old else {
            return Ok(());
        };
        self.writer()?.guard.remove(old);
        self.free(old..old + self.layout.cluster_size())
    }

    fn point_at_table(&self, l1_index: u64, host: u64) -> Result<()> {
        self.writer()?.guard.insert(host);
        self.tables.publish_l1(l1_index, host | COPIED)
    }

    fn fill_table(&self, host: u64, old: Option<u64>) -> Result<()> {
        let size = self.layout.cluster_size();
        let bytes = match old {
            Some(old) => be64::read_bytes(&*self.file, old..old + size)?,
            None => vec![0; clamp_len(size, usize::MAX)],
        };
        self.file.write_at(&bytes, host)?;
        // Not before: a look at a table beside it may have read what was there.
        self.tables.forget(host..host + size);
        Ok(())
    }

    /// Lets go of a range of the image file: its clusters are given back once no reader can be
    /// there any more and what referred to it is gone from stable media too.
    pub(super) fn free(&self, host: Range<u64>) -> Result<()> {
        self.writer()?.allocator.free(self, host)
    }

    /// Gives back what was freed and has passed its grace point.
    pub(super) fn release_freed(&self) -> Result<()> {
        self.writer()?.allocator.release(self)
    }
}

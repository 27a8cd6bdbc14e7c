//! What an image opened for writing has beyond a read-only one: refcounts, reservations, freed
//! space, and the order of writes.
//!
//! Locks, outermost first: a reservation of the guest range; the stripe of its second-level table
//! (held while a table is made or copied, and until its copy shows); `ahead`; `freed`; `refcounts`.
//! Nothing else is held while guest data is written.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, MutexGuard};

use super::Qcow2;
use super::bitmap::Tracker;
use super::entry::COPIED;
use super::extension;
use super::feature;
use super::guard::Guard;
use super::refcount::Refcounts;
use crate::error::{Error, Result};
use crate::image::Wait;
use crate::image::units::{Allocator, Taken, Unnamed};
use crate::util::align::clamp_len;
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
    pub(super) guard: Guard,
    /// There is a tracker.
    pub(super) tracking: AtomicBool,
    /// The header in the file says more than the one that was read on opening.
    new_header: AtomicBool,
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
    taken: Unnamed<'a, Qcow2>,
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
    pub(super) fn new(refcounts: Refcounts, allocator: Allocator) -> Self {
        Self {
            refcounts: Mutex::new(refcounts),
            allocator,
            stripes: (0..STRIPES).map(|_| Mutex::default()).collect(),
            guard: Guard::default(),
            tracking: AtomicBool::new(false),
            new_header: AtomicBool::new(false),
            tracker: Mutex::default(),
        }
    }

    /// From now on the bitmaps are where the header in the file says.
    pub(super) fn expect_new_header(&self) {
        self.new_header.store(true, Ordering::Release);
    }

    /// The header was read again.
    pub(super) fn header_was_read(&self) {
        self.new_header.store(false, Ordering::Release);
    }

    /// Whether the bitmaps are where the header in the file says.
    pub(super) fn has_new_header(&self) -> bool {
        self.new_header.load(Ordering::Acquire)
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
        let kept = self.header.autoclear & feature::KEPT_AUTOCLEAR;
        let mut extensions = self.header.extensions.iter();
        let kept = match extensions.any(|e| e.kind == extension::BITMAPS) {
            true => kept,
            false => kept & !feature::BITMAPS,
        };
        if self.header.version >= 3 && kept != self.header.autoclear {
            self.file.write_at(&kept.to_be_bytes(), AUTOCLEAR_FIELD)?;
            self.file.sync()?;
        }
        Ok(())
    }

    /// All writes so far, of metadata and data, come before those that follow, in a power cut too.
    /// For operations that run alone; others take the moment before they write.
    pub(super) fn settle(&self) -> Result<()> {
        self.writer()?.allocator.order.settle_all()
    }

    /// Takes clusters of the image file.
    pub(super) fn take_clusters(&self, count: Range<u64>) -> Result<Taken> {
        let taken = self.taking(|refcounts| refcounts.take(&*self.file, count, &self.allowed()))?;
        let count = range::len(&taken.clusters);
        Ok(Taken {
            zeroed: taken.fresh,
            ..Taken::new(taken.host, count, self.layout.cluster_size())
        })
    }

    /// Runs `take`, then guards what the refcount structure took for itself.
    pub(super) fn taking<T>(&self, take: impl FnOnce(&mut Refcounts) -> Result<T>) -> Result<T> {
        let writer = self.writer()?;
        let mut refcounts = writer.refcounts.lock();
        self.count_uncounted(&mut refcounts)?;
        let before = refcounts.place();
        let taken = take(&mut refcounts);
        let made = refcounts.made();
        made.into_iter().for_each(|host| writer.guard.insert(host));
        if refcounts.place() != before {
            writer.guard.set_refcount_table(refcounts.place());
        }
        taken
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
        let order = &self.writer()?.allocator.order;
        let since = order.now();
        let stripe = self.stripe(l1_index)?.lock();
        let table = self.change_table(l1_index, stripe, || {
            self.writer()?.allocator.ready_space(self, 0, 1)
        })?;
        let host = table.host;
        if !table.shows() {
            order.settle(since)?;
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
        let entry = self.tables.l1_entry(&*self.file, l1_index, Wait::Yes)?;
        let old = self.layout.table(entry)?;
        if let Some(host) = old
            && entry & COPIED != 0
        {
            return Ok(Table::shown(host));
        }
        if old.is_none()
            && let Some(space) = ready()?
        {
            let host = space.host;
            self.point_at_table(l1_index, host)?;
            return Ok(Table::shown(host));
        }
        let taken = self.take_clusters(1..2)?;
        let host = taken.host;
        let taken = Unnamed::new(self, vec![taken]);
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
        let Some(hidden) = table.hidden else {
            return Ok(());
        };
        hidden.taken.named();
        self.point_at_table(hidden.index, table.host)?;
        let Some(old) = hidden.old else {
            return Ok(());
        };
        self.writer()?.guard.remove(old);
        self.free(old..old + self.layout.cluster_size())
    }

    fn point_at_table(&self, l1_index: u64, host: u64) -> Result<()> {
        self.writer()?.guard.insert(host);
        self.tables.publish_l1(&*self.file, l1_index, host | COPIED)
    }

    fn fill_table(&self, host: u64, old: Option<u64>) -> Result<()> {
        let mut bytes = vec![0; clamp_len(self.layout.cluster_size(), usize::MAX)];
        if let Some(old) = old {
            self.file.read_at(&mut bytes, old)?;
        }
        self.tables.forget(host..host + self.layout.cluster_size());
        self.file.write_at(&bytes, host)
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

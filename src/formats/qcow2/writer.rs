//! What an image opened for writing has beyond a read-only one: refcounts, reservations, freed
//! space, and the order of writes.
//!
//! Locks, outermost first: a reservation of the guest range; the stripe of its second-level table
//! (held while a table is made or copied, and until its copy shows); `ahead`; `freed`; `refcounts`.
//! Nothing else is held while guest data is written.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, MutexGuard};

use super::Qcow2;
use super::ahead::Ahead;
use super::allocate::Space;
use super::bitmap::Tracker;
use super::entry::COPIED;
use super::extension;
use super::feature;
use super::guard::Guard;
use super::refcount::{Refcounts, Step, Taken};
use crate::error::{Error, ErrorKind, Result};
use crate::image::Wait;
use crate::image::follow::Followed;
use crate::image::open::WriteOrder;
use crate::image::reserve::Reservations;
use crate::storage::Zeroing;
use crate::storage::syncs::{Stamp, Syncs};
use crate::util::align::clamp_len;
use crate::util::grace::{Grace, Moment};
use crate::util::range;

/// Tables that are made or copied at the same time.
const STRIPES: usize = 512;
/// Freed ranges kept before they must be given back.
const MAX_FREED: usize = 4096;
/// Freed bytes that wait for a flush, so that many little ranges are given back by one sync.
const MUCH_FREED: u64 = 64 << 20;
/// Offset of the autoclear bits in the header.
const AUTOCLEAR_FIELD: u64 = 88;

/// What an image opened for writing has beyond a read-only one.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) refcounts: Mutex<Refcounts>,
    pub(super) reservations: Reservations,
    stripes: Box<[Mutex<()>]>,
    freed: Mutex<Freed>,
    /// Clusters taken ahead for runs of guest clusters that have none yet, by the first of each.
    /// Innermost.
    pub(super) assigned: Mutex<BTreeMap<u64, Taken>>,
    /// Clusters that may be pointed at before their data is on stable media.
    pub(super) ahead: Mutex<Ahead>,
    /// Who goes through clusters that have to move.
    pub(super) followed: Followed,
    syncs: Syncs,
    data_syncs: Syncs,
    order: WriteOrder,
    grace: Arc<Grace>,
    /// The first change was announced.
    pub(super) started: AtomicBool,
    /// Metadata that guest data must not overwrite.
    pub(super) guard: Guard,
    /// There is a tracker.
    pub(super) tracking: AtomicBool,
    /// The header in the file says more than the one that was read on opening.
    new_header: AtomicBool,
    /// The bitmaps that record.  Outside `refcounts`.
    pub(super) tracker: Mutex<Option<Tracker>>,
}

/// A moment in the life of both files.
#[derive(Debug, Clone, Copy)]
pub(super) struct Since {
    file: Stamp,
    data: Stamp,
}

/// What waits to be given back.
#[derive(Debug, Default)]
struct Freed {
    runs: Vec<FreedRun>,
    /// Clusters of all runs.
    clusters: u64,
}

/// Clusters that nothing refers to any more, but that readers may still be reading and that a
/// power cut may bring back.
#[derive(Debug)]
struct FreedRun {
    clusters: Range<u64>,
    since: Moment,
    /// When the first of them were freed.
    written: Since,
    /// When the last were.
    last: Since,
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
    taken: Unnamed<'a>,
    /// What it is to replace.
    old: Option<u64>,
    _stripe: MutexGuard<'a, ()>,
}

/// Clusters that were taken and that nothing refers to yet; given back where that stays so, by
/// unwinding too.
#[derive(Debug)]
pub(super) struct Unnamed<'a> {
    image: &'a Qcow2,
    pub(super) taken: Vec<Taken>,
}

impl Unnamed<'_> {
    /// From here on something may refer to them, whatever comes: they stay counted.
    pub(super) fn name(&mut self) -> Vec<Taken> {
        std::mem::take(&mut self.taken)
    }
}

impl Drop for Unnamed<'_> {
    fn drop(&mut self) {
        self.taken.iter().for_each(|taken| self.image.untake(taken));
    }
}

impl Table<'_> {
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
    pub(super) fn new(refcounts: Refcounts, order: WriteOrder, grace: Arc<Grace>) -> Self {
        Self {
            refcounts: Mutex::new(refcounts),
            reservations: Reservations::default(),
            stripes: (0..STRIPES).map(|_| Mutex::default()).collect(),
            freed: Mutex::default(),
            assigned: Mutex::default(),
            ahead: Mutex::default(),
            followed: Followed::default(),
            syncs: Syncs::default(),
            data_syncs: Syncs::default(),
            order,
            grace,
            started: AtomicBool::new(false),
            guard: Guard::default(),
            tracking: AtomicBool::new(false),
            new_header: AtomicBool::new(false),
            tracker: Mutex::default(),
        }
    }
}

impl Writer {
    /// Whether changes have begun, so that data may be overwritten in place.
    pub(super) fn has_started(&self) -> bool {
        self.started.load(Ordering::Acquire)
    }

    /// Has the next change look at the metadata again, which was changed by other means.
    pub(super) fn start_again(&self) {
        self.started.store(false, Ordering::Release);
    }

    /// Has changes go on without bitmaps that record, until [`Writer::start_again`].
    pub(super) fn start_unrecorded(&self) {
        self.started.store(true, Ordering::Release);
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

    /// Whether metadata waits for data.
    pub(super) fn order(&self) -> WriteOrder {
        self.order
    }
}

impl Qcow2 {
    /// The writer's parts.
    pub(super) fn writer(&self) -> Result<&Writer> {
        self.writer.as_ref().ok_or_else(Error::read_only)
    }

    /// Before the first change: what the header promises and this driver does not keep up is
    /// taken back, durably, and bitmaps begin to record.
    pub(super) fn start_writing(&self) -> Result<()> {
        let writer = self.writer()?;
        if writer.started.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut tracker = writer.tracker.lock();
        if writer.started.load(Ordering::Acquire) {
            return Ok(());
        }
        self.prepare()?;
        // One that is there already still has what it recorded.
        if tracker.is_none() {
            *tracker = Tracker::start(&*self.file, self.directory()?, self.header.cluster_bits)?;
        }
        writer.tracking.store(tracker.is_some(), Ordering::Release);
        writer.started.store(true, Ordering::Release);
        Ok(())
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

    /// The present moment: to be taken before the writes that [`Qcow2::settle_since`] is to wait
    /// for.
    pub(super) fn moment(&self) -> Result<Since> {
        let writer = self.writer()?;
        Ok(Since {
            file: writer.syncs.stamp(),
            data: writer.data_syncs.stamp(),
        })
    }

    /// All writes so far, of metadata and data, come before those that follow, in a power cut too.
    /// For operations that run alone; others take the moment before they write.
    pub(super) fn settle(&self) -> Result<()> {
        self.settle_since(self.moment()?)
    }

    /// All writes since `since` come before those that follow, in a power cut too.
    ///
    /// # Errors
    /// The host's, and that of any sync since then: it may have lost the writes.
    pub(super) fn settle_since(&self, since: Since) -> Result<()> {
        let writer = self.writer()?;
        if writer.order == WriteOrder::Unordered {
            return Ok(());
        }
        if let Some(data) = self.external() {
            writer.data_syncs.wait(data, since.data)?;
        }
        writer.syncs.wait(&*self.file, since.file)
    }

    /// Whether all writes from `since` until `last` are known to be on stable media.
    pub(super) fn is_settled(&self, since: Since, last: Since) -> Result<bool> {
        let writer = self.writer()?;
        let data =
            self.external().is_none() || writer.data_syncs.is_durable_since(since.data, last.data);
        Ok(data && writer.syncs.is_durable_since(since.file, last.file))
    }

    /// Makes all completed writes durable, and tells once of a sync that failed since.
    pub(super) fn flush_all(&self, writer: &Writer) -> Result<()> {
        if let Some(data) = self.external() {
            writer.data_syncs.flush(data)?;
        }
        writer.syncs.flush(&*self.file)
    }

    /// Takes clusters of the image file.
    pub(super) fn take(&self, count: Range<u64>) -> Result<Taken> {
        self.taking(|refcounts| refcounts.take(&*self.file, count, &self.allowed()))
    }

    /// Runs `take`, then guards what the refcount structure took for itself.
    pub(super) fn taking<T>(&self, take: impl FnOnce(&mut Refcounts) -> Result<T>) -> Result<T> {
        let writer = self.writer()?;
        let mut refcounts = writer.refcounts.lock();
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

    /// Has clusters that were taken given back unless something comes to refer to them.
    pub(super) fn unnamed(&self, taken: impl IntoIterator<Item = Taken>) -> Unnamed<'_> {
        Unnamed {
            image: self,
            taken: taken.into_iter().collect(),
        }
    }

    /// Gives clusters back that were taken and that nothing refers to yet.
    pub(super) fn untake(&self, taken: &Taken) {
        if let Some(writer) = &self.writer {
            // Where this fails too, they stay a leak.
            let step =
                writer
                    .refcounts
                    .lock()
                    .step(&*self.file, taken.clusters.clone(), Step::Down);
            drop(step);
        }
    }

    /// Where the second-level table of a first-level entry is, which may be changed in place:
    /// makes it, or copies it where snapshots share it.
    pub(super) fn own_table(&self, l1_index: u64) -> Result<u64> {
        let since = self.moment()?;
        let stripe = self.stripe(l1_index)?.lock();
        let table = self.change_table(l1_index, stripe, || self.ready_space(1))?;
        let host = table.host;
        if !table.shows() {
            self.settle_since(since)?;
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
        ready: impl Fn() -> Result<Option<Space>>,
    ) -> Result<Table<'a>> {
        let entry = self.tables.l1_entry(&*self.file, l1_index, Wait::Yes)?;
        let old = self.layout.table(entry)?;
        if let Some(host) = old
            && entry & COPIED != 0
        {
            return Ok(Table { host, hidden: None });
        }
        if old.is_none()
            && let Some(space) = ready()?
        {
            let host = space.host;
            self.point_at_table(l1_index, host)?;
            return Ok(Table { host, hidden: None });
        }
        let taken = self.take(1..2)?;
        let host = taken.host;
        let taken = self.unnamed([taken]);
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
        hidden.taken.name();
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
        let writer = self.writer()?;
        let bits = self.layout.cluster_bits;
        let clusters = host.start >> bits..host.end.div_ceil(1 << bits);
        let mut freed = writer.freed.lock();
        let since = writer.grace.now();
        let written = self.moment()?;
        freed.clusters += range::len(&clusters);
        match freed.runs.last_mut() {
            Some(last) if last.clusters.end == clusters.start && last.since == since => {
                last.clusters.end = clusters.end;
                last.last = written;
            }
            _ => freed.runs.push(FreedRun {
                clusters,
                since,
                written,
                last: written,
            }),
        }
        let full = freed.runs.len() >= MAX_FREED;
        drop(freed);
        if full { self.release_freed() } else { Ok(()) }
    }

    /// As `release_freed`, where so much was freed that it should not wait for a flush.
    pub(super) fn release_much(&self) -> Result<()> {
        let writer = self.writer()?;
        // Who comes next does not hold up what was freed now.
        writer.grace.passed(writer.grace.now());
        let freed = writer.freed.lock().clusters;
        match freed >= MUCH_FREED >> self.layout.cluster_bits {
            true => self.release_freed(),
            false => Ok(()),
        }
    }

    /// Does `work`; where there is no room for it, again once what was freed is given back.
    pub(super) fn with_room<T>(&self, mut work: impl FnMut() -> Result<T>) -> Result<T> {
        match work() {
            Err(e) if e.kind() == ErrorKind::NoSpace && self.gives_back()? => work(),
            done => done,
        }
    }

    /// Gives back what was freed; whether that was anything.
    fn gives_back(&self) -> Result<bool> {
        let waiting = || Ok::<_, Error>(self.writer()?.freed.lock().clusters);
        let before = waiting()?;
        self.release_freed()?;
        Ok(waiting()? < before)
    }

    /// Gives back what was freed and has passed its grace point.
    pub(super) fn release_freed(&self) -> Result<()> {
        let writer = self.writer()?;
        let passed: Vec<FreedRun> = {
            let mut freed = writer.freed.lock();
            let mut old = std::mem::take(&mut freed.runs);
            old.sort_by_key(|f| f.since);
            let kept = old
                .iter()
                .position(|f| !writer.grace.passed(f.since))
                .unwrap_or(old.len());
            freed.runs = old.split_off(kept);
            freed.clusters = freed.runs.iter().map(|f| range::len(&f.clusters)).sum();
            old
        };
        // Where a sync failed since, they stay leaks.
        self.settle_freed(&passed)?;
        let mut clusters: Vec<Range<u64>> = passed.into_iter().map(|f| f.clusters).collect();
        clusters.sort_by_key(|c| c.start);
        let mut runs: Vec<Range<u64>> = Vec::new();
        // Neighbours become one; what is listed twice was counted twice.
        clusters
            .into_iter()
            .for_each(|c| range::push_merged(&mut runs, c));
        self.release(&mut writer.refcounts.lock(), &runs)
    }

    /// What referred to freed clusters is gone from stable media.
    fn settle_freed(&self, freed: &[FreedRun]) -> Result<()> {
        let is_settled = |f: &FreedRun| self.is_settled(f.written, f.last);
        let settled: Result<Vec<bool>> = freed.iter().map(is_settled).collect();
        match freed.first() {
            Some(first) if !settled?.iter().all(|settled| *settled) => {
                self.settle_since(first.written)
            }
            _ => Ok(()),
        }
    }

    fn release(&self, refcounts: &mut Refcounts, runs: &[Range<u64>]) -> Result<()> {
        refcounts.step_each(&*self.file, runs, Step::Down)?;
        let bits = self.layout.cluster_bits;
        let mut free: Vec<Range<u64>> = Vec::new();
        for cluster in runs.iter().cloned().flatten() {
            let seen = free.last().is_some_and(|last| cluster < last.end);
            if !seen && refcounts.count(&*self.file, cluster)? == 0 {
                range::push_merged(&mut free, cluster..cluster + 1);
            }
        }
        for clusters in &free {
            let host = clusters.start << bits..clusters.end << bits;
            let host = host.start..host.end.min(self.file.size());
            if range::len(&host) > 0 {
                // Where the host cannot, the space is reused all the same.
                drop(self.file.zero(host, Zeroing::MayUnmap));
            }
        }
        if !free.is_empty() {
            self.decoded.clear();
        }
        Ok(())
    }
}

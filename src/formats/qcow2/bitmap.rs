//! Dirty bitmaps: recording while guests write, and changes of the bitmaps themselves.
//!
//! Before the first write the bitmaps that record are marked as in use, durably; the mark goes
//! when all bits are on stable media.  A crash in between leaves it, and everybody knows.

use std::ffi::OsStr;
use std::ops::Range;
use std::sync::atomic::Ordering;

use super::Qcow2;
use super::bitmap_dir::{Directory, Entry, GRANULARITY, IN_USE, table_len};
use super::header::Header;
use super::recorder::{Recorder, Take};
use super::refcount::Step;
use super::switch::switch;
use crate::error::{Error, Result};
use crate::image::bitmap::{Bitmap, Bitmaps, Recording};
use crate::storage::Storage;
use crate::util::align::{clamp_len, len64};
use crate::util::range;
use crate::util::text::printable;

/// Granularity where none is asked for: the cluster size, but not less than this.
const MIN_DEFAULT: u64 = 4096;
/// Table bytes written at a time.
const STEP: u64 = 1 << 20;

/// The bitmaps that record.
#[derive(Debug)]
pub(super) struct Tracker {
    bitmaps: Vec<Tracked>,
}

#[derive(Debug)]
struct Tracked {
    entry: Entry,
    recorder: Recorder,
}

impl Tracker {
    /// Marks the bitmaps that record as in use, durably; `None`: there are none.
    pub(super) fn start(
        file: &dyn Storage,
        directory: Directory,
        cluster_bits: u32,
    ) -> Result<Option<Self>> {
        let mut bitmaps = Vec::new();
        for mut entry in directory.entries {
            if entry.is_recording() && !entry.is_in_use() {
                entry.write_in_use(file, IN_USE)?;
                let recorder = Recorder::new(&entry, cluster_bits);
                bitmaps.push(Tracked { entry, recorder });
            }
        }
        if bitmaps.is_empty() {
            return Ok(None);
        }
        file.sync()?;
        Ok(Some(Self { bitmaps }))
    }

    /// How many bytes from the start of a range, which is not empty, are recorded in all bitmaps.
    pub(super) fn known(&self, range: &Range<u64>) -> u64 {
        let known = self.bitmaps.iter().map(|b| b.recorder.known(range));
        known.min().unwrap_or_else(|| range::len(range))
    }

    /// Records a write to a range.
    pub(super) fn record(
        &mut self,
        range: &Range<u64>,
        store: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let mut full = false;
        for bitmap in &mut self.bitmaps {
            full |= bitmap.recorder.set(range);
        }
        if full { store(self) } else { Ok(()) }
    }

    /// The recorder of a bitmap that records.
    fn recorder(&self, name: &OsStr) -> Option<&Recorder> {
        let mut bitmaps = self.bitmaps.iter();
        let found = bitmaps.find(|b| b.entry.is_called(name));
        found.map(|b| &b.recorder)
    }

    /// Merges what was recorded into the file.
    pub(super) fn store(&mut self, file: &dyn Storage, take: &mut Take<'_>) -> Result<()> {
        let mut bitmaps = self.bitmaps.iter_mut();
        bitmaps.try_for_each(|b| b.recorder.store(file, take))
    }

    /// Says that the bitmaps are not in use any more, after all they record is in the file.
    pub(super) fn finish(&mut self, file: &dyn Storage, take: &mut Take<'_>) -> Result<()> {
        self.store(file, take)?;
        file.sync()?;
        let mut bitmaps = self.bitmaps.iter_mut();
        bitmaps.try_for_each(|b| b.entry.write_in_use(file, 0))
    }
}

impl Qcow2 {
    /// Records a change of a range of guest bytes; before the change.
    pub(super) fn record(&self, range: &Range<u64>) -> Result<()> {
        let writer = self.writer()?;
        if !writer.tracking.load(Ordering::Acquire) {
            return Ok(());
        }
        let range = range.start..range.end.min(self.size());
        match (&mut *writer.tracker.lock(), range.is_empty()) {
            (Some(tracker), false) => tracker.record(&range, |tracker| {
                tracker.store(&*self.file, &mut || self.take_for_bitmap())
            }),
            _ => Ok(()),
        }
    }

    /// How many bytes of a range, which is not empty, may be written in place as far as bitmaps
    /// are concerned; 0: [`Qcow2::record`] comes first.
    pub(super) fn recorded(&self, range: &Range<u64>) -> u64 {
        let Some(writer) = &self.writer else {
            return 0;
        };
        if !writer.allocator.has_begun() {
            return 0;
        }
        if !writer.tracking.load(Ordering::Acquire) {
            return range::len(range);
        }
        let tracker = writer.tracker.lock();
        tracker.as_ref().map_or(0, |t| t.known(range))
    }

    /// Leaves the bitmaps as a clean close leaves them.
    pub(super) fn finish_bitmaps(&self) -> Result<()> {
        let writer = self.writer()?;
        let mut tracker = writer.tracker.lock();
        if let Some(tracker) = &mut *tracker {
            if !writer.allocator.has_begun() {
                // A change of the whole image since the last write moved metadata.
                self.prepare()?;
            }
            tracker.finish(&*self.file, &mut || self.take_for_bitmap())?;
        }
        *tracker = None;
        writer.tracking.store(false, Ordering::Release);
        writer.allocator.begin_again();
        Ok(())
    }

    /// The directory, for a change of it; nothing records meanwhile.
    pub(super) fn bitmaps_for_change(&mut self) -> Result<Directory> {
        self.writer()?;
        self.release_assigned()?;
        self.finish_bitmaps()?;
        self.reload()?;
        if self.header.version < 3 {
            return Err(Error::unsupported(
                "images of version 2 (compat=0.10) have no bitmaps",
            ));
        }
        let directory = Directory::read(&*self.file, &self.header)?;
        self.prepare()?;
        Ok(directory)
    }

    /// Writes a directory to new clusters: where; 0 where it is empty.
    pub(super) fn write_directory(&self, bytes: &[u8]) -> Result<u64> {
        let host = self.new_run(len64(bytes.len()))?;
        if host != 0 {
            let mut padded = bytes.to_vec();
            let cluster = clamp_len(self.layout.cluster_size(), usize::MAX);
            padded.resize(padded.len().next_multiple_of(cluster), 0);
            self.file.write_at(&padded, host)?;
        }
        Ok(host)
    }

    /// Makes `directory` the directory; then lets go of the old one and of `clusters`.
    pub(super) fn replace_directory(
        &mut self,
        directory: &Directory,
        clusters: &[Range<u64>],
    ) -> Result<()> {
        let bytes = directory.encode()?;
        let mut header = Header::read(&*self.file)?;
        let host = self.write_directory(&bytes)?;
        directory.point(&mut header, host, len64(bytes.len()));
        switch(&*self.file, &header)?;
        let bits = header.cluster_bits;
        let old = directory.place.map(|p| {
            let end = (p.offset + p.len).div_ceil(1 << bits);
            p.offset >> bits..end
        });
        let writer = self.writer()?;
        let mut refcounts = writer.refcounts.lock();
        for run in old.into_iter().chain(clusters.iter().cloned()) {
            refcounts.step(&*self.file, run, Step::Down)?;
        }
        drop(refcounts);
        self.reload()
    }

    /// Clusters in one piece for `len` bytes; 0 for none.
    fn new_run(&self, len: u64) -> Result<u64> {
        match len.div_ceil(self.layout.cluster_size()) {
            0 => Ok(0),
            count => Ok(self.take_clusters(count..count + 1)?.host),
        }
    }

    /// A table of zeroes.
    pub(super) fn new_table(&self, entries: u64) -> Result<u64> {
        let host = self.new_run(entries * 8)?;
        let len = (entries * 8).next_multiple_of(self.layout.cluster_size());
        let mut at = 0;
        while at < len {
            let part = (len - at).min(STEP);
            self.file
                .write_at(&vec![0; clamp_len(part, usize::MAX)], host + at)?;
            at += part;
        }
        Ok(host)
    }

    /// All clusters of one bitmap: its table and its bits.
    fn bitmap_clusters(&self, entry: &Entry) -> Result<Vec<Range<u64>>> {
        let bits = self.layout.cluster_bits;
        let end = entry.table() + entry.table_len() * 8;
        let table = entry.table() >> bits..end.div_ceil(1 << bits);
        let recorder = Recorder::new(entry, bits);
        let clusters = recorder.clusters(&*self.file)?;
        let data = clusters.into_iter().map(|c| c..c + 1);
        Ok(std::iter::once(table).chain(data).collect())
    }

    fn granularity_bits(&self, granularity: Option<u64>) -> Result<u8> {
        let default = self.layout.cluster_size().max(MIN_DEFAULT);
        let granularity = granularity.unwrap_or(default);
        let bits = u8::try_from(granularity.trailing_zeros()).unwrap_or(0);
        if !granularity.is_power_of_two() || !GRANULARITY.contains(&bits) {
            return Err(Error::invalid(format!(
                "the bitmap's granularity is {granularity} (allowed: powers of two from 512 to 2G)"
            )));
        }
        Ok(bits)
    }
}

impl Bitmaps for Qcow2 {
    fn list(&self) -> Result<Vec<Bitmap>> {
        Ok(self.directory()?.describe())
    }

    fn dirty(&self, name: &OsStr, at: u64, most: usize) -> Result<Vec<Range<u64>>> {
        // Held: nothing begins to record, or ends it, meanwhile.
        let tracker = self.writer.as_ref().map(|w| w.tracker.lock());
        if let Some(recorder) = tracker.as_ref().and_then(|t| t.as_ref()?.recorder(name)) {
            return recorder.dirty(&*self.file, self.size(), at, most);
        }
        let directory = self.directory()?;
        let index = directory.find_sound(name)?;
        let recorder = Recorder::new(&directory.entries[index], self.header.cluster_bits);
        recorder.dirty(&*self.file, self.size(), at, most)
    }

    fn add(&mut self, name: &OsStr, granularity: Option<u64>, recording: Recording) -> Result<()> {
        let mut directory = self.bitmaps_for_change()?;
        if directory.find(name).is_ok() {
            return Err(Error::invalid(format!(
                "has a bitmap '{}' already",
                printable(name)
            )));
        }
        let bits = self.granularity_bits(granularity)?;
        let entries = table_len(&self.header, self.size(), bits);
        if entries == 0 {
            return Err(Error::unsupported("a disk of 0 bytes has no bitmaps"));
        }
        let mut entry = Entry::new(name, bits, entries)?;
        entry.set_recording(recording);
        entry.set_table(self.new_table(entries)?, entries)?;
        directory.entries.push(entry);
        self.replace_directory(&directory, &[])
    }

    fn remove(&mut self, name: &OsStr) -> Result<()> {
        let mut directory = self.bitmaps_for_change()?;
        let index = directory.find(name)?;
        let entry = directory.entries.remove(index);
        let clusters = self.bitmap_clusters(&entry)?;
        self.replace_directory(&directory, &clusters)
    }

    fn clear(&mut self, name: &OsStr) -> Result<()> {
        let mut directory = self.bitmaps_for_change()?;
        let index = directory.find_sound(name)?;
        let clusters = self.bitmap_clusters(&directory.entries[index])?;
        let len = directory.entries[index].table_len();
        directory.entries[index].set_table(self.new_table(len)?, len)?;
        self.replace_directory(&directory, &clusters)
    }

    fn set_recording(&mut self, name: &OsStr, recording: Recording) -> Result<()> {
        let mut directory = self.bitmaps_for_change()?;
        let index = directory.find_sound(name)?;
        directory.entries[index].set_recording(recording);
        self.replace_directory(&directory, &[])
    }

    fn merge(&mut self, into: &OsStr, name: &OsStr, source: Option<&dyn Bitmaps>) -> Result<()> {
        self.do_merge(into, name, source)
    }
}

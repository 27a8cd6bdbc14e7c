//! Dirty bitmaps: recording while guests write, and changes of the bitmaps themselves.
//!
//! Before the first write the bitmaps that record are marked as in use, durably; the mark goes
//! when all bits are on stable media.  A crash in between leaves it, and everybody knows.

use std::ffi::OsStr;
use std::ops::Range;
use std::sync::atomic::Ordering;

use super::Qcow2;
use super::bitmap_dir::{Directory, Entry, GRANULARITY, IN_USE, table_len};
use super::recorder::{Recorder, Take};
use crate::error::{Error, Result};
use crate::image::bitmap::{Bitmap, Bitmaps, Recording};
use crate::storage::Storage;
use crate::util::range;
use crate::util::text::printable;

/// Granularity where none is asked for: the cluster size, but not less than this.
const MIN_DEFAULT: u64 = 4096;

/// The bitmaps that record.
#[derive(Debug)]
pub(super) struct Tracker {
    bitmaps: Vec<Recorder>,
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
                bitmaps.push(Recorder::new(entry, cluster_bits));
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
        let known = self.bitmaps.iter().map(|b| b.known(range));
        known.min().unwrap_or_else(|| range::len(range))
    }

    /// The recorder of a bitmap that records.
    fn recorder(&self, name: &OsStr) -> Option<&Recorder> {
        let mut bitmaps = self.bitmaps.iter();
        bitmaps.find(|b| b.entry.is_called(name))
    }

    /// Merges what was recorded into the file.
    pub(super) fn store(&mut self, file: &dyn Storage, take: &mut Take<'_>) -> Result<()> {
        let mut bitmaps = self.bitmaps.iter_mut();
        bitmaps.try_for_each(|b| b.store(file, take))
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
        let mut tracker = writer.tracker.lock();
        let Some(tracker) = tracker.as_mut().filter(|_| !range.is_empty()) else {
            return Ok(());
        };
        let mut full = false;
        for bitmap in &mut tracker.bitmaps {
            full |= bitmap.set(&range);
        }
        match full {
            true => tracker.store(&*self.file, &mut || self.take_for_bitmap()),
            false => Ok(()),
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

    /// Takes one cluster for a bitmap that records, which is metadata from now on.
    fn take_for_bitmap(&self) -> Result<u64> {
        let taken = self.take_clusters(1..2)?;
        self.writer()?.guard.insert(taken.host);
        Ok(taken.host)
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
        let entry = directory.entries[index].clone();
        let recorder = Recorder::new(entry, self.header.cluster_bits);
        recorder.dirty(&*self.file, self.size(), at, most)
    }

    fn add(&mut self, name: &OsStr, granularity: Option<u64>, recording: Recording) -> Result<()> {
        self.change_bitmaps(|change| {
            if change.new.find(name).is_ok() {
                return Err(Error::invalid(format!(
                    "has a bitmap '{}' already",
                    printable(name)
                )));
            }
            let image = change.image;
            let bits = image.granularity_bits(granularity)?;
            let entries = table_len(&image.header, image.size(), bits);
            if entries == 0 {
                return Err(Error::unsupported("a disk of 0 bytes has no bitmaps"));
            }
            let mut entry = Entry::new(name, bits)?;
            entry.set_recording(recording);
            change.fill(&mut entry, entries, 0)?;
            change.new.entries.push(entry);
            Ok(())
        })
    }

    fn remove(&mut self, name: &OsStr) -> Result<()> {
        self.change_bitmaps(|change| {
            let index = change.new.find(name)?;
            change.new.entries.remove(index);
            Ok(())
        })
    }

    fn clear(&mut self, name: &OsStr) -> Result<()> {
        self.change_bitmaps(|change| {
            let index = change.new.find_sound(name)?;
            let mut entry = change.new.entries[index].clone();
            let len = entry.table_len();
            change.fill(&mut entry, len, 0)?;
            change.new.entries[index] = entry;
            Ok(())
        })
    }

    fn set_recording(&mut self, name: &OsStr, recording: Recording) -> Result<()> {
        self.change_bitmaps(|change| {
            let index = change.new.find_sound(name)?;
            change.new.entries[index].set_recording(recording);
            Ok(())
        })
    }

    fn merge(&mut self, into: &OsStr, name: &OsStr, source: Option<&dyn Bitmaps>) -> Result<()> {
        self.change_bitmaps(|change| change.merge(into, name, source))
    }
}

//! Bitmaps written anew beside the old ones, to take their place in one step.
//!
//! A copy has a table of its own and shares the clusters of the original until they are to change.
//! Nothing points at it before the header does, so a crash leaves the bitmap as it was, or as it is
//! to be, and at worst leaks.

use std::cell::Cell;
use std::ffi::OsStr;

use super::Qcow2;
use super::bitmap_dir::{Directory, Entry, table_len};
use super::header::Header;
use super::recorder::{ONES, Recorder};
use super::refcount::Step;
use super::switch::switch;
use crate::error::{Error, Result};
use crate::image::bitmap::Bitmaps;
use crate::storage::Storage;
use crate::util::align::{clamp_len, len64};

/// Table bytes moved at a time.
const STEP: u64 = 1 << 20;
/// Ranges of a source merged at a time.
const BATCH: usize = 1 << 16;
/// Guest bytes recorded in one go: no more than fit the pages in memory, whatever the granularity.
const RECORD_STEP: u64 = 16 << 30;
/// Bits of a table's entry that hold an offset.
const OFFSET: u64 = super::entry::OFFSET;

/// All bitmaps for a disk of another size.
#[derive(Debug)]
pub(super) struct Resized {
    old: Directory,
    new: Directory,
    /// Where the new directory is.
    host: u64,
    /// The header may point at it.
    switched: Cell<bool>,
}

/// What bitmaps that record have for a disk of another size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Recorded {
    /// What they recorded.
    Kept,
    /// All bits.
    All,
}

/// Which of the bitmaps before and after a resize.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// Those of the old size.
    Old,
    /// Those of the new size.
    New,
}

impl Qcow2 {
    /// The directory as it is now: a resize moves it while the image stays open.
    pub(super) fn directory(&self) -> Result<Directory> {
        match self.writer.as_ref().is_some_and(|w| w.has_new_header()) {
            true => Directory::read(&*self.file, &Header::read(&*self.file)?),
            false => Directory::read(&*self.file, &self.header),
        }
    }

    /// Takes one cluster for a bitmap, which is metadata from now on.
    pub(super) fn take_for_bitmap(&self) -> Result<u64> {
        let taken = self.take_clusters(1..2)?;
        self.writer()?.guard.insert(taken.host);
        Ok(taken.host)
    }

    /// A copy of a bitmap whose table has `len` entries, those that the original does not have 0.
    fn copy_bitmap(&self, original: &Entry, len: u64) -> Result<Entry> {
        let mut copy = original.clone();
        copy.set_table(self.new_table(len)?, len)?;
        let bytes = original.table_len().min(len) * 8;
        let mut at = 0;
        while at < bytes {
            let part = clamp_len((bytes - at).min(STEP), usize::MAX);
            let mut words = vec![0; part];
            self.file.read_at(&mut words, original.table() + at)?;
            self.file.write_at(&words, copy.table() + at)?;
            at += len64(part);
        }
        Ok(copy)
    }

    /// A bitmap like `original` whose table has `len` entries, all bits set.
    fn full_bitmap(&self, original: &Entry, len: u64) -> Result<Entry> {
        let mut full = original.clone();
        full.set_table(self.new_table(len)?, len)?;
        let (mut at, end) = (full.table(), full.table() + len * 8);
        while at < end {
            let words = clamp_len((end - at).min(STEP) / 8, usize::MAX);
            let bytes = ONES.to_be_bytes().repeat(words);
            self.file.write_at(&bytes, at)?;
            at += len64(bytes.len());
        }
        Ok(full)
    }

    /// Gives back the table of a bitmap and the clusters that the table of `kept`, of which it is
    /// the copy or the original, does not share.
    fn drop_bitmap(&self, entry: &Entry, kept: &Entry) -> Result<()> {
        let bits = self.layout.cluster_bits;
        let recorder = Recorder::new(entry, bits);
        let mut refcounts = self.writer()?.refcounts.lock();
        let file = &*self.file;
        for index in 0..entry.table_len() {
            let host = recorder.entry(file, index)? & OFFSET;
            if host != 0 && host != kept.word(file, index)? & OFFSET {
                let cluster = host >> bits;
                refcounts.step(file, cluster..cluster + 1, Step::Down)?;
            }
        }
        let end = (entry.table() + entry.table_len() * 8).div_ceil(1 << bits);
        refcounts.step(file, entry.table() >> bits..end, Step::Down)
    }

    /// Sets in the bitmap `into` what is set in the bitmap `name` of `source`, or of this image.
    pub(super) fn do_merge(
        &mut self,
        into: &OsStr,
        name: &OsStr,
        source: Option<&dyn Bitmaps>,
    ) -> Result<()> {
        let mut directory = self.bitmaps_for_change()?;
        let index = directory.find_sound(into)?;
        let old = directory.entries[index].clone();
        let new = self.copy_bitmap(&old, old.table_len())?;
        if let Err(e) = self.fill_copy(&new, &old, name, source) {
            // Where this fails too, they stay leaks.
            drop(self.drop_bitmap(&new, &old));
            return Err(e);
        }
        directory.entries[index] = new.clone();
        self.replace_directory(&directory, &[])?;
        self.drop_bitmap(&old, &new)?;
        self.reload()
    }

    fn fill_copy(
        &self,
        copy: &Entry,
        original: &Entry,
        name: &OsStr,
        source: Option<&dyn Bitmaps>,
    ) -> Result<()> {
        let source: &dyn Bitmaps = source.unwrap_or(self);
        let mut recorder = Recorder::of_copy(copy, original, self.layout.cluster_bits);
        let mut take = || self.take_for_bitmap();
        let mut at = 0;
        while at < self.size() {
            let ranges = source.dirty(name, at, BATCH)?;
            let Some(last) = ranges.last() else {
                break;
            };
            at = last.end;
            for range in &ranges {
                let range = range.start..range.end.min(self.size());
                if !range.is_empty() && recorder.set(&range) {
                    recorder.store(&*self.file, &mut take)?;
                }
            }
        }
        recorder.store(&*self.file, &mut take)
    }

    /// Refuses another size where a bitmap cannot follow it, before anything is changed.
    pub(super) fn check_bitmaps_before_resize(&self, size: u64) -> Result<()> {
        let directory = self.directory()?;
        if size == 0 && !directory.entries.is_empty() {
            return Err(Error::unsupported(
                "the image has bitmaps, and a disk of 0 bytes has none (bitmap --remove takes them away)",
            ));
        }
        for entry in &directory.entries {
            directory.find_sound(entry.name())?;
            entry
                .clone()
                .set_table(0, self.table_len_for(entry, size))?;
        }
        Ok(())
    }

    fn table_len_for(&self, entry: &Entry, size: u64) -> u64 {
        table_len(&self.header, size, entry.granularity_bits())
    }

    /// Copies of all bitmaps for a disk of `size` bytes, which has zero bits where it is longer;
    /// `None`: there are no bitmaps.  Nothing records meanwhile.
    pub(super) fn bitmaps_of_size(&self, size: u64, recorded: Recorded) -> Result<Option<Resized>> {
        let old = self.directory()?;
        if old.entries.is_empty() {
            return Ok(None);
        }
        let mut new = old.clone();
        new.entries.clear();
        let mut resized = Resized {
            old,
            new,
            host: 0,
            switched: Cell::new(false),
        };
        if let Err(e) = self.copy_bitmaps_of_size(&mut resized, size, recorded) {
            self.give_back(&resized);
            return Err(e);
        }
        Ok(Some(resized))
    }

    fn copy_bitmaps_of_size(
        &self,
        resized: &mut Resized,
        size: u64,
        recorded: Recorded,
    ) -> Result<()> {
        let end = size.min(self.size());
        for entry in &resized.old.entries {
            let len = self.table_len_for(entry, size);
            if recorded == Recorded::All && entry.is_recording() {
                let full = self.full_bitmap(entry, len)?;
                resized.new.entries.push(full);
                continue;
            }
            let copy = self.copy_bitmap(entry, len)?;
            resized.new.entries.push(copy.clone());
            let recorder = Recorder::new(&copy, self.layout.cluster_bits);
            recorder.cut(&*self.file, end, &mut || self.take_for_bitmap())?;
        }
        resized.host = self.write_directory(&resized.new.encode()?)?;
        Ok(())
    }

    /// Before the disk becomes another one, of `size` bytes: all of it counts as written.  Where
    /// that is another size, bitmaps for it, for [`Resized::point`] and
    /// [`Qcow2::bitmaps_after_jump`].
    pub(super) fn bitmaps_before_jump(&self, size: u64) -> Result<Option<Resized>> {
        if size == self.size() || self.directory()?.entries.is_empty() {
            self.start_writing()?;
            let starts = (0..size).step_by(clamp_len(RECORD_STEP, usize::MAX));
            let mut parts = starts.map(|at| at..size.min(at + RECORD_STEP));
            return parts.try_for_each(|part| self.record(&part)).map(|()| None);
        }
        self.finish_bitmaps()?;
        self.check_bitmaps_before_resize(size)?;
        self.prepare()?;
        self.writer()?.allocator.begin_unannounced();
        let made = self.bitmaps_of_size(size, Recorded::All);
        if made.is_err() {
            self.writer()?.allocator.begin_again();
        }
        made
    }

    /// After the disk became another one, or did not.
    pub(super) fn bitmaps_after_jump(&self, resized: &Resized, done: Result<()>) -> Result<()> {
        self.writer()?.allocator.begin_again();
        match done {
            Ok(()) => self.drop_old_bitmaps(resized),
            Err(e) => {
                self.give_back(resized);
                Err(e)
            }
        }
    }

    /// Gives back the copies where the header cannot point at them; what fails stays a leak.
    pub(super) fn give_back(&self, resized: &Resized) {
        if resized.switched.get() {
            return;
        }
        for (new, old) in resized.new.entries.iter().zip(&resized.old.entries) {
            drop(self.drop_bitmap(new, old));
        }
        if let (true, Ok(bytes)) = (resized.host != 0, resized.new.encode()) {
            drop(self.drop_run(resized.host, len64(bytes.len())));
        }
    }

    /// Makes `change` and has the header point at the bitmaps of one side, in one step.
    pub(super) fn switch_bitmaps(
        &self,
        resized: &Resized,
        side: Side,
        change: impl FnOnce(&mut Header),
    ) -> Result<()> {
        let mut header = Header::read(&*self.file)?;
        change(&mut header);
        match (side, resized.old.place) {
            (Side::New, _) => resized.point(&mut header)?,
            (Side::Old, Some(place)) => resized.old.point(&mut header, place.offset, place.len),
            (Side::Old, None) => {}
        }
        resized.switched.set(true);
        self.writer()?.expect_new_header();
        switch(&*self.file, &header)
    }

    /// Gives back what the old bitmaps had alone, after the header points at the new ones.
    pub(super) fn drop_old_bitmaps(&self, resized: &Resized) -> Result<()> {
        for (old, new) in resized.old.entries.iter().zip(&resized.new.entries) {
            self.drop_bitmap(old, new)?;
        }
        match resized.old.place {
            Some(place) => self.drop_run(place.offset, place.len),
            None => Ok(()),
        }
    }

    fn drop_run(&self, host: u64, len: u64) -> Result<()> {
        let bits = self.layout.cluster_bits;
        let clusters = host >> bits..(host + len).div_ceil(1 << bits);
        let mut refcounts = self.writer()?.refcounts.lock();
        refcounts.step(&*self.file, clusters, Step::Down)
    }
}

impl Resized {
    /// Has `header`, which is about to be switched to, point at the bitmaps of the new size.
    pub(super) fn point(&self, header: &mut Header) -> Result<()> {
        let len = len64(self.new.encode()?.len());
        self.new.point(header, self.host, len);
        self.switched.set(true);
        Ok(())
    }
}

impl Entry {
    /// Word `index` of its table; 0 past its end.
    fn word(&self, file: &dyn Storage, index: u64) -> Result<u64> {
        if index >= self.table_len() {
            return Ok(0);
        }
        let mut word = [0; 8];
        file.read_at(&mut word, self.table() + index * 8)?;
        Ok(u64::from_be_bytes(word))
    }
}

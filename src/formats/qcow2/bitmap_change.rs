//! Changes of the bitmaps there are: others are written beside them and take their place in one
//! step.
//!
//! A copy has a table of its own and shares the clusters of the original until they are to change.
//! Nothing points at it before the header does, so a crash leaves the bitmaps as they were, or as
//! they are to be, and at worst leaks.

use std::ffi::OsStr;
use std::ops::Range;
use std::sync::atomic::Ordering;

use super::Qcow2;
use super::bitmap_dir::{Directory, Entry, ONES, cluster, table_len, unsound};
use super::header::Header;
use super::recorder::Recorder;
use super::rewrite::Rewrite;
use super::switch::switch;
use super::writer::Loose;
use crate::error::{Error, Result};
use crate::image::be64;
use crate::image::bitmap::Bitmaps;
use crate::util::align::{clamp_len, len64};
use crate::util::range;

/// Words of a table moved at a time: the largest cluster.
const STEP: u64 = (2 << 20) / 8;
/// Ranges of a source merged at a time.
const BATCH: usize = 1 << 16;
/// Guest bytes recorded in one go: no more than fit the pages in memory, whatever the granularity.
const RECORD_STEP: u64 = 16 << 30;

/// What bitmaps that record have for a disk of another size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Recorded {
    /// What they recorded.
    Kept,
    /// All bits.
    All,
}

/// A change under way.  Dropped before the header points at the new bitmaps, it gives back what it
/// took.
#[derive(Debug)]
pub(super) struct Change<'a> {
    pub(super) image: &'a Qcow2,
    old: Directory,
    /// The bitmaps to be.  Those that have the table they had are as they were.
    pub(super) new: Directory,
    /// All clusters taken for them.
    taken: Loose<'a>,
    /// Where their directory is, and its length.
    place: (u64, u64),
}

/// The parts of a table of `len` words that are moved at a time.
fn parts(len: u64) -> impl Iterator<Item = Range<u64>> {
    let starts = (0..len).step_by(clamp_len(STEP, usize::MAX));
    starts.map(move |at| at..len.min(at + STEP))
}

impl<'a> Change<'a> {
    /// Of the bitmaps as they are.  Nothing records meanwhile.
    fn new(image: &'a Qcow2) -> Result<Self> {
        let old = image.directory()?;
        Ok(Self {
            image,
            new: old.clone(),
            old,
            taken: Loose::new(image),
            place: (0, 0),
        })
    }

    /// Gives a bitmap a new table of `len` entries, of which `words` says each part.
    fn set_table(
        &mut self,
        entry: &mut Entry,
        len: u64,
        words: impl Fn(Range<u64>) -> Result<Vec<u64>>,
    ) -> Result<()> {
        // Refused before anything is taken.
        entry.set_table(0, len)?;
        let (file, size) = (&*self.image.file, self.image.layout.cluster_size());
        let host = self.taken.take_run(len * 8)?;
        for part in parts(len) {
            let at = host + part.start * 8;
            be64::write_padded(file, be64::bytes(words(part)?), at, size)?;
        }
        entry.set_table(host, len)
    }

    /// Gives a bitmap a new table of `len` entries that are all the same.
    pub(super) fn fill(&mut self, entry: &mut Entry, len: u64, word: u64) -> Result<()> {
        self.set_table(entry, len, |part| {
            Ok(vec![word; clamp_len(range::len(&part), usize::MAX)])
        })
    }

    /// Gives a bitmap a copy of its table that has `len` entries, those that were not there 0.
    fn copy(&mut self, entry: &mut Entry, len: u64) -> Result<()> {
        let (image, original) = (self.image, entry.clone());
        self.set_table(entry, len, |part| original.words(&*image.file, part))
    }

    /// Gives the bitmaps tables for a disk of `size` bytes, with zero bits where it is longer.
    fn resize(&mut self, size: u64, recorded: Recorded) -> Result<()> {
        let image = self.image;
        let (file, bits) = (&*image.file, image.layout.cluster_bits);
        for index in 0..self.new.entries.len() {
            let mut entry = self.new.entries[index].clone();
            let len = table_len(&image.header, size, entry.granularity_bits());
            if recorded == Recorded::All && entry.is_recording() {
                self.fill(&mut entry, len, ONES)?;
            } else {
                self.copy(&mut entry, len)?;
                let recorder = Recorder::new(entry.clone(), bits);
                let end = size.min(image.size());
                recorder.cut(file, end, &mut || self.taken.take_run(1))?;
            }
            self.new.entries[index] = entry;
        }
        Ok(())
    }

    /// Sets in the bitmap `into` what is set in the bitmap `name` of `source`, or of this image.
    pub(super) fn merge(
        &mut self,
        into: &OsStr,
        name: &OsStr,
        source: Option<&dyn Bitmaps>,
    ) -> Result<()> {
        let image = self.image;
        let source: &dyn Bitmaps = source.unwrap_or(image);
        let index = self.new.find_sound(into)?;
        let original = self.new.entries[index].clone();
        let mut entry = original.clone();
        self.copy(&mut entry, original.table_len())?;
        self.new.entries[index] = entry.clone();
        let mut recorder = Recorder::of_copy(entry, original, image.layout.cluster_bits);
        let mut take = || self.taken.take_run(1);
        let mut at = 0;
        while at < image.size() {
            let ranges = source.dirty(name, at, BATCH)?;
            let Some(last) = ranges.last() else {
                break;
            };
            at = last.end;
            for range in &ranges {
                let range = range.start..range.end.min(image.size());
                if !range.is_empty() && recorder.set(&range) {
                    recorder.store(&*image.file, &mut take)?;
                }
            }
        }
        recorder.store(&*image.file, &mut take)
    }

    /// Writes the new directory to new clusters.
    fn write(&mut self) -> Result<()> {
        let bytes = self.new.encode()?;
        let len = len64(bytes.len());
        self.place = (self.taken.take_run(len)?, len);
        match bytes.is_empty() {
            true => Ok(()),
            false => {
                let size = self.image.layout.cluster_size();
                be64::write_padded(&*self.image.file, bytes, self.place.0, size)
            }
        }
    }

    /// Makes `change` and has the header point at the new bitmaps, in one step.
    pub(super) fn switch(&mut self, change: impl FnOnce(&mut Header)) -> Result<()> {
        self.write()?;
        let file = &*self.image.file;
        let mut header = Header::read(file)?;
        change(&mut header);
        self.new.point(&mut header, self.place.0, self.place.1);
        self.taken.keep();
        let new_header = &self.image.writer()?.new_header;
        new_header.store(true, Ordering::Release);
        switch(file, &header)
    }

    /// Gives `gone` what the old bitmaps have alone: after the header points at the new ones
    /// nothing refers to that.
    fn old_alone(&self, gone: &mut dyn FnMut(&Range<u64>) -> Result<()>) -> Result<()> {
        let (file, size) = (&*self.image.file, self.image.layout.cluster_size());
        for old in &self.old.entries {
            let kept = self.new.entries.iter().find(|e| e.is_called(old.name()));
            if kept.is_some_and(|kept| kept.table() == old.table()) {
                continue;
            }
            for part in parts(old.table_len()) {
                let shared = kept
                    .map(|kept| kept.words(file, part.clone()))
                    .transpose()?;
                let shared = shared
                    .unwrap_or_default()
                    .into_iter()
                    .chain(std::iter::repeat(0));
                let words = old.words(file, part.clone())?;
                for ((index, word), shared) in part.zip(words).zip(shared) {
                    let host = cluster(word, size).map_err(|word| unsound(index, word, size))?;
                    if let Some(host) = host.filter(|_| word != shared) {
                        gone(&(host..host + size))?;
                    }
                }
            }
            gone(&old.table_range())?;
        }
        match self.old.place {
            Some(place) => gone(&place.range()),
            None => Ok(()),
        }
    }

    /// Gives back what the old bitmaps had alone, after the header points at the new ones.
    pub(super) fn drop_old(&self) -> Result<()> {
        self.old_alone(&mut |host| self.image.uncount(host))
    }

    /// Has a rewrite do what is left, in its own step.
    pub(super) fn hand_over(mut self, rewrite: &mut Rewrite<'a>) -> Result<()> {
        self.old_alone(&mut |host| rewrite.release(host.clone()))?;
        self.new
            .point(&mut rewrite.header, self.place.0, self.place.1);
        rewrite.taken.append(&mut self.taken);
        Ok(())
    }
}

impl Qcow2 {
    /// The directory as it is now: a resize moves it while the image stays open.
    pub(super) fn directory(&self) -> Result<Directory> {
        let writer = self.writer.as_ref();
        match writer.is_some_and(|w| w.new_header.load(Ordering::Acquire)) {
            true => Directory::read(&*self.file, &Header::read(&*self.file)?),
            false => Directory::read(&*self.file, &self.header),
        }
    }

    /// Makes a change of bitmaps, durably.
    pub(super) fn change_bitmaps(
        &mut self,
        change: impl FnOnce(&mut Change<'_>) -> Result<()>,
    ) -> Result<()> {
        self.writer()?;
        self.release_assigned()?;
        self.finish_bitmaps()?;
        self.reload()?;
        if self.header.version < 3 {
            return Err(Error::unsupported(
                "images of version 2 (compat=0.10) have no bitmaps",
            ));
        }
        self.prepare()?;
        let mut bitmaps = Change::new(self)?;
        change(&mut bitmaps)?;
        // What is damaged is refused while all is as it was.
        bitmaps.old_alone(&mut |_| Ok(()))?;
        bitmaps.switch(|_| {})?;
        bitmaps.drop_old()?;
        drop(bitmaps);
        self.reload()
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
            let len = table_len(&self.header, size, entry.granularity_bits());
            entry.clone().set_table(0, len)?;
        }
        Ok(())
    }

    /// The bitmaps for a disk of `size` bytes; `None`: there are none.  Nothing records meanwhile.
    pub(super) fn bitmaps_of_size(
        &self,
        size: u64,
        recorded: Recorded,
    ) -> Result<Option<Change<'_>>> {
        let mut change = Change::new(self)?;
        if change.old.entries.is_empty() {
            return Ok(None);
        }
        change.resize(size, recorded)?;
        Ok(Some(change))
    }

    /// Before the disk becomes another one, of `size` bytes: all of it counts as written.  Where
    /// that is another size, bitmaps for it, for [`Change::hand_over`].
    pub(super) fn bitmaps_before_jump(&self, size: u64) -> Result<Option<Change<'_>>> {
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
        let mut change = self.bitmaps_of_size(size, Recorded::All)?;
        change.as_mut().map_or(Ok(()), Change::write)?;
        Ok(change)
    }
}

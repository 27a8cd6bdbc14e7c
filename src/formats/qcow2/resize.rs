//! Change of a disk's size.
//!
//! A longer disk gets table entries first, which the header names with the old size; then what it
//! shows is zeroed, then one write of the header says so.  A shorter disk has its size first, then
//! loses what lies past its end.  So whatever fails or is killed midway, nothing has to be undone.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::Qcow2;
use super::bitmap_change::{Change, Recorded};
use super::header::{Header, MAX_L1_BYTES};
use super::writer::Loose;
use crate::error::{Error, ErrorKind, Result};
use crate::image::units::{Target, Units};
use crate::image::{Image, LayerBelow, Old, Resize, Slot, Source, Wait, be64};
use crate::storage::{Zeroing, write_zeroes, zero_or_write};
use crate::util::align::{clamp_len, down};
use crate::util::range;

/// Virtual sizes are multiples of this.
const SECTOR: u64 = 512;
/// Where the header has the size (8 bytes), the encryption method (4), the length of the
/// first-level table (4) and its offset (8).
const SIZE_FIELD: u64 = 24;

impl Resize for Qcow2 {
    fn resize(&self, virtual_size: u64, below: LayerBelow) -> Result<()> {
        self.check_resize(virtual_size)?;
        if virtual_size == self.size() {
            self.start_writing()?;
            return self.release_assigned();
        }
        self.release_assigned()?;
        self.finish_bitmaps()?;
        self.check_bitmaps_before_resize(virtual_size)?;
        // Bitmaps take no note of what the resize itself writes, and begin anew with the next
        // write.
        self.unrecorded(&mut || self.resize_with_bitmaps(virtual_size, below))
    }

    fn unrecorded(&self, give: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.finish_bitmaps()?;
        self.prepare()?;
        self.writer()?.allocator.begin_unannounced();
        let done = give();
        self.writer()?.allocator.begin_again();
        done
    }
}

/// Writes a slot: zeroes from guest offset `from` on, before it what was there.
fn zero_from(slot: &Slot<'_>, from: u64) -> Result<()> {
    let kept = range::len(&(slot.guest.start..from.min(slot.guest.end)));
    let end = slot.host + range::len(&slot.guest);
    if kept > 0 {
        let Old::Bytes(bytes) = slot.old else {
            return Err(Error::unsupported(
                "the disk's last cluster has no space of its own",
            ));
        };
        let bytes = &bytes[..clamp_len(kept, bytes.len())];
        slot.storage.write_at(bytes, slot.host)?;
    }
    if slot.zeroed || slot.host + kept == end {
        return Ok(());
    }
    zero_or_write(slot.storage, slot.host + kept..end, Zeroing::MayUnmap)
}

impl Qcow2 {
    fn check_resize(&self, size: u64) -> Result<()> {
        self.writer()?;
        if !size.is_multiple_of(SECTOR) {
            return Err(Error::invalid(format!(
                "a qcow2 image of {size} bytes (allowed: a multiple of 512)"
            )));
        }
        if self.header.version < 3 && self.header.snapshot_count > 0 {
            return Err(Error::unsupported(
                "an image of version 2 with snapshots is not resized: they do not record their size",
            ));
        }
        if size > i64::MAX.unsigned_abs() || self.header.l1_needed(size) * 8 > MAX_L1_BYTES {
            let most = self.header.most_size();
            return Err(Error::new(
                ErrorKind::OutOfRange,
                format!("the size is {size} (allowed: {most} with this cluster size)"),
            ));
        }
        if self.external().is_none() && self.has_data_file() {
            return Err(Error::unsupported(
                "the data file was not opened, so the image is not resized",
            ));
        }
        Ok(())
    }

    fn resize_with_bitmaps(&self, size: u64, below: LayerBelow) -> Result<()> {
        let old = self.size();
        let mut bitmaps = self.bitmaps_of_size(size, Recorded::Kept)?;
        match size > old {
            true => self.grow(old..size, below, bitmaps.as_mut())?,
            false => self.shrink(size, bitmaps.as_mut())?,
        }
        bitmaps.map_or(Ok(()), |bitmaps| bitmaps.drop_old())
    }

    fn grow(
        &self,
        new: Range<u64>,
        below: LayerBelow,
        bitmaps: Option<&mut Change<'_>>,
    ) -> Result<()> {
        let hidden = match below {
            LayerBelow::Nothing => new.start..new.start,
            LayerBelow::Size(size) => new.start..size.clamp(new.start, new.end),
            LayerBelow::NotOpened => {
                return Err(Error::unsupported(
                    "the image does not grow while its backing file is not open: data there could show",
                ));
            }
        };
        // What a shrink that was killed has left there, or a snapshot of a machine's state.
        self.drop_behind(new.start)?;
        self.lengthen_first_level(self.header.l1_needed(new.end))?;
        self.size.store(new.end, Ordering::Release);
        let zeroed = self.zero_new(&new, &hidden).and_then(|()| self.settle());
        zeroed.inspect_err(|_| self.size.store(new.start, Ordering::Release))?;
        self.write_size(new.end, &self.tables.first_level(), bitmaps)
    }

    /// Makes all of `new` read as zeroes; the image below has data in `hidden`.
    fn zero_new(&self, new: &Range<u64>, hidden: &Range<u64>) -> Result<()> {
        let size = self.layout.cluster_size();
        let tail = new.start..new.start.next_multiple_of(size).min(new.end);
        let mut at = tail.start;
        while at < tail.end {
            at += self.zero_run(&(at..tail.end), hidden)?;
        }
        // All of it is new, so whole clusters can be zeroed.
        let end = hidden.end.next_multiple_of(size).min(new.end);
        let whole = tail.end..end.max(tail.end);
        if !whole.is_empty() && self.header.version >= 3 {
            self.drop_range(&whole, Target::Zero)?;
        } else if !whole.is_empty() {
            self.store_zeroes(&whole)?;
        }
        self.zero_raw_data(new)
    }

    /// Zeroes what the cluster at the old end of the disk holds past it; how far it came.
    fn zero_run(&self, tail: &Range<u64>, hidden: &Range<u64>) -> Result<u64> {
        let run = self.map(tail.start, range::len(tail), Wait::Yes)?;
        match run.source {
            Source::Zero => {}
            Source::Below if hidden.end <= tail.start => {}
            Source::Below => {
                let unit = self.layout.subcluster_size();
                let part = tail.start..tail.start + run.len;
                if !part.start.is_multiple_of(unit) {
                    return Err(Error::unsupported(
                        "the disk's last cluster has no space of its own",
                    ));
                }
                self.drop_range(&part, Target::Zero)?;
            }
            Source::Stored {
                storage,
                host,
                writable: true,
            } => {
                let end = (host + run.len).min(storage.size());
                zero_or_write(storage, host..end.max(host), Zeroing::KeepSpace)?;
            }
            _ => {
                let mut fill = |slot: Slot<'_>| zero_from(&slot, tail.start);
                return self.allocator()?.allocate(self, tail.clone(), &mut fill);
            }
        }
        Ok(run.len)
    }

    /// Gives a range zeroes of its own: version 2 has no zero clusters.
    pub(super) fn store_zeroes(&self, range: &Range<u64>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let mut fill = |slot: Slot<'_>| zero_from(&slot, range.start);
            let done = self.allocator()?.allocate(self, at..range.end, &mut fill)?;
            if done == 0 {
                return Err(Error::corrupt(format!(
                    "the bytes at {at:#x} have space already, which holds something else"
                )));
            }
            at += done;
        }
        Ok(())
    }

    /// A raw data file reads as the disk does, and is as long.
    fn zero_raw_data(&self, new: &Range<u64>) -> Result<()> {
        let raw = self.header.data_file_is_raw();
        let Some(data) = self.external().filter(|_| raw) else {
            return Ok(());
        };
        let stale = new.start..data.size().min(new.end);
        if !stale.is_empty() {
            zero_or_write(data, stale, Zeroing::MayUnmap)?;
        }
        if data.size() < new.end {
            data.set_len(new.end)?;
        }
        Ok(())
    }

    /// Has the header name a first-level table of at least `len` entries, durably: the present one, with
    /// what follows it in its last cluster, or a copy of it elsewhere.  Nothing refers to the new
    /// entries, which are 0.
    fn lengthen_first_level(&self, len: u64) -> Result<()> {
        let (old, size) = (self.tables.first_level(), self.layout.cluster_size());
        let (end, used) = (old.start + len * 8, range::len(&old));
        if end <= old.end {
            return Ok(());
        }
        let mut taken = Loose::new(self);
        let new = if len * 8 <= used.next_multiple_of(size) {
            write_zeroes(&*self.file, old.end..end)?;
            old.start..end
        } else {
            let host = taken.take_run(len * 8)?;
            let mut bytes = be64::read_bytes(&*self.file, old.clone())?;
            bytes.resize(clamp_len(len * 8, usize::MAX), 0);
            be64::write_padded(&*self.file, bytes, host, size)?;
            host..host + len * 8
        };
        self.settle()?;
        // From here on the header may name it, whatever comes.
        taken.keep();
        self.write_size(self.size(), &new, None)?;
        if new.start == old.start {
            return Ok(());
        }
        // Where this fails it stays a leak.
        drop(self.uncount(&old));
        // It is metadata no more.
        self.prepare()
    }

    /// Says in the header, in one write, how long the disk is, where its table is and where the
    /// bitmaps of that length are; on stable media when it returns.  What was written before need
    /// not be.
    ///
    /// # Errors
    /// The host's; the image then goes by what the header in the file says.
    fn write_size(
        &self,
        size: u64,
        table: &Range<u64>,
        bitmaps: Option<&mut Change<'_>>,
    ) -> Result<()> {
        let len = u32::try_from(range::len(table) / 8)
            .map_err(|_| Error::corrupt("the L1 table is too long for the header"))?;
        let written = match bitmaps {
            Some(bitmaps) => bitmaps.switch(|header| {
                header.size = size;
                header.l1_len = len;
                header.l1_offset = table.start;
            }),
            None => {
                let mut fields = size.to_be_bytes().to_vec();
                fields.extend([0; 4]);
                fields.extend(len.to_be_bytes());
                fields.extend(table.start.to_be_bytes());
                let written = self.file.write_at(&fields, SIZE_FIELD);
                written.and_then(|()| self.file.sync())
            }
        };
        if let Ok(header) = Header::read(&*self.file) {
            self.size.store(header.size, Ordering::Release);
            self.tables.move_first_level(&header.l1());
        }
        written
    }

    /// Shrinks: the size first, durably, with a table no longer than it needs, so that a kill leaves
    /// leaks; then what it no longer shows goes.
    fn shrink(&self, size: u64, bitmaps: Option<&mut Change<'_>>) -> Result<()> {
        let old = self.tables.first_level();
        let needed = self.header.l1_needed(size).max(1) * 8;
        let table = old.start..old.end.min(old.start + needed);
        self.write_size(size, &table, bitmaps)?;
        self.tables.move_first_level(&old);
        let dropped = self.drop_behind(size);
        self.tables.move_first_level(&table);
        dropped?;
        let cluster = self.layout.cluster_size();
        let rest = table.end.next_multiple_of(cluster)..old.end.next_multiple_of(cluster);
        if !rest.is_empty() {
            self.uncount(&rest)?;
        }
        let raw = self.header.data_file_is_raw();
        match self.external().filter(|_| raw) {
            Some(data) if data.size() > size => data.set_len(size),
            _ => Ok(()),
        }
    }

    /// Lets go of all that the tables have behind a disk of `size` bytes.
    fn drop_behind(&self, size: u64) -> Result<()> {
        let covered = self.layout.cluster_size() << self.header.l2_bits();
        let tables = range::len(&self.tables.first_level()) / 8;
        let first = size.next_multiple_of(self.layout.cluster_size());
        let whole = first.next_multiple_of(covered);
        if first < whole && whole / covered <= tables {
            self.drop_range(&(first..whole), Target::Below)?;
        }
        for index in whole / covered..tables {
            self.drop_table(index)?;
        }
        self.release_freed()
    }

    /// Lets go of a whole second-level table and of all that it points at.
    fn drop_table(&self, l1_index: u64) -> Result<()> {
        let entry = self.tables.l1_entry(l1_index, Wait::Yes)?;
        let Some(table) = self.layout.table(entry)? else {
            return Ok(());
        };
        let size = self.layout.cluster_size();
        let mut clusters = Vec::new();
        for (word, _) in self.layout.entries(&self.read_table(table)?) {
            clusters.push(self.layout.cluster(word)?);
        }
        self.tables.publish_l1(l1_index, 0)?;
        self.writer()?.guard.remove(table);
        for cluster in clusters {
            self.free_cluster(cluster)?;
        }
        self.free(down(table, size)..table + size)
    }
}

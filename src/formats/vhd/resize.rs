//! Change of a disk's size.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::error::{Error, ErrorKind, Result};
use crate::formats::vhd::batmap;
use crate::formats::vhd::fixed::Fixed;
use crate::formats::vhd::footer::{self, Creator, Footer};
use crate::formats::vhd::geometry::{Geometry, MAX_SIZE, SECTOR, SizeRule};
use crate::formats::vhd::layout::UNUSED;
use crate::formats::vhd::open::End;
use crate::formats::vhd::space::Space;
use crate::formats::vhd::sparse::{Shape, Sparse};
use crate::image::table::{Endian, Table};
use crate::image::units::Units;
use crate::image::{LayerBelow, Resize, Slot, Wait};
use crate::storage::{Zeroing, zero_or_write};
use crate::util::align::len64;
use crate::util::range;

/// Bytes of the header from its table's offset to its checksum: one write within one sector.
const TABLE_FIELDS: Range<usize> = 16..40;

/// Refuses sizes that the format cannot hold, and images of which only one size counts by force.
fn check_size(size: u64, rule: SizeRule) -> Result<()> {
    if rule != SizeRule::Auto {
        return Err(Error::unsupported(
            "a disk is not resized while size_rule forces one of its sizes (allowed: size_rule=auto)",
        ));
    }
    if !size.is_multiple_of(SECTOR) {
        return Err(Error::invalid(format!(
            "a VHD of {size} bytes (allowed: a multiple of 512)"
        )));
    }
    if size > MAX_SIZE {
        return Err(Error::new(
            ErrorKind::OutOfRange,
            format!("a VHD of {size} bytes (allowed: up to {MAX_SIZE}, 2040 GiB)"),
        ));
    }
    Ok(())
}

/// The footer for another size: of one whose creator's readers go by the geometry, the geometry
/// is exact, or so large that all go by the current size.
fn resized(footer: &Footer, size: u64) -> Footer {
    let by_geometry = [*b"vpc ", *b"qemu"].contains(&footer.creator_app);
    let geometry = Geometry::for_size(size);
    let geometry = match by_geometry && geometry.bytes() != size {
        true => Geometry::MAX,
        false => geometry,
    };
    footer.resized(size, geometry)
}

impl Resize for Fixed {
    fn resize(&self, virtual_size: u64, _below: LayerBelow) -> Result<()> {
        self.disk.may_write()?;
        check_size(virtual_size, self.rule)?;
        let state = *self.state.lock();
        let size = self.disk.size();
        if virtual_size == size && state.footer.current_size.get() == size {
            return Ok(());
        }
        if self.disk.storage.has_fixed_len() && virtual_size > state.data_end {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!(
                    "a fixed VHD of {virtual_size} bytes (the device has room for {})",
                    state.data_end
                ),
            ));
        }
        let footer = resized(&state.footer, virtual_size);
        // What lies between the disk and its footer is not zero yet.
        let slack = size..state.data_end.min(virtual_size);
        if !slack.is_empty() {
            zero_or_write(&*self.disk.storage, slack, Zeroing::MayUnmap)?;
            self.disk.storage.sync()?;
        }
        self.put_footer(footer, virtual_size)?;
        self.disk.set_size(virtual_size);
        Ok(())
    }
}

impl Fixed {
    /// Puts `footer`, the only one there is, right behind a disk that ends at `end`, and ends the
    /// file behind it; on storage of fixed length it stays where it is.
    pub(super) fn put_footer(&self, footer: Footer, end: u64) -> Result<()> {
        let state = *self.state.lock();
        let (stays, shrinks) = (self.disk.storage.has_fixed_len(), end < self.disk.size());
        if stays || shrinks && state.data_end.is_multiple_of(SECTOR) {
            // One sector, which is written whole or not at all.  Of a disk that shrinks nothing is
            // overwritten before it is shorter.
            footer.write(&*self.disk.storage, state.data_end)?;
            self.state.lock().footer = footer.sealed();
            self.disk.set_size(end.min(self.disk.size()));
            self.disk.storage.sync()?;
            if stays {
                return Ok(());
            }
        }
        if end + footer::LEN64 > state.data_end {
            // The old one is in the way: first it steps aside as it is, and its place, which the
            // disk may show from now on, becomes zero.
            let aside = end.max(state.data_end).next_multiple_of(SECTOR) + footer::LEN64;
            self.move_footer(state.footer, aside)?;
            self.disk.storage.sync()?;
        }
        self.move_footer(footer, end)
    }

    /// Puts the footer at `host`, where it does not meet the old one, and ends the file behind it.
    ///
    /// At every moment a whole footer is at the end of the file: the old one until the new one is
    /// on stable media.
    fn move_footer(&self, footer: Footer, host: u64) -> Result<()> {
        let mut state = self.state.lock();
        let old = state.data_end;
        footer.write(&*self.disk.storage, host)?;
        self.disk.storage.sync()?;
        if host > old {
            self.disk.storage.write_at(&[0; footer::LEN], old)?;
        } else {
            self.disk.storage.set_len(host + footer::LEN64)?;
        }
        state.footer = footer.sealed();
        state.data_end = host;
        Ok(())
    }
}

impl Resize for Sparse {
    fn resize(&self, virtual_size: u64, below: LayerBelow) -> Result<()> {
        self.allocator()?;
        check_size(virtual_size, self.rule)?;
        if matches!(*self.end.lock(), End::Killed | End::Damaged(_)) {
            return Err(Error::corrupt(
                "the footer at the end is damaged (allowed: resizing after `check -r all`)",
            ));
        }
        let shape = self.shape.load_full();
        match virtual_size.cmp(&shape.size) {
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Less => self.shrink(&shape, virtual_size),
            std::cmp::Ordering::Greater => self.grow(&shape, virtual_size, below),
        }
    }
}

impl Sparse {
    /// Grows: what becomes visible is made zero first, then there is a table for it, then the
    /// footers say so.
    fn grow(&self, shape: &Arc<Shape>, size: u64, below: LayerBelow) -> Result<()> {
        let below = if self.has_backing() { below.end()? } else { 0 };
        // The image below has data there, which must not show.
        let hidden = shape.size..size.min(below);
        self.zero_padding(shape, size)?;
        let entries = self.blocks.count(size);
        let mut now = Arc::clone(shape);
        self.drop_behind(shape, self.blocks.count(shape.size)..shape.table.len())?;
        if entries > shape.table.len() {
            now = self.enlarge_table(shape, entries)?;
        }
        self.allocator.order.settle()?;
        if !hidden.is_empty() {
            // Nobody else uses the disk meanwhile.
            self.growing.store(size, Ordering::Relaxed);
            let covered = self.cover(&now, hidden);
            self.growing.store(0, Ordering::Relaxed);
            covered?;
            self.allocator.order.settle()?;
        }
        self.set_size(&now, size)
    }

    /// Zeroes what the last block holds past the disk's old end.
    fn zero_padding(&self, shape: &Shape, size: u64) -> Result<()> {
        let index = self.blocks.index(shape.size);
        if shape.size.is_multiple_of(self.blocks.data) {
            return Ok(());
        }
        if let Some(host) = self.locate(shape, index, Wait::Yes)? {
            // The file may end within the block, where its writer cut off what the disk did not show.
            let mut space = self.space.lock();
            self.tail(&mut space, shape)?;
            self.make_room(&mut space, shape, host + self.blocks.len(), 0)?;
        }
        self.zero_cut(shape, size)
    }

    /// Zeroes what the last block holds past the disk's end, up to `end`, and the file has of that.
    fn zero_cut(&self, shape: &Shape, end: u64) -> Result<()> {
        let index = self.blocks.index(shape.size);
        let block = self.blocks.guest(index);
        if shape.size == block.start {
            return Ok(());
        }
        let Some(host) = self.locate(shape, index, Wait::Yes)? else {
            return Ok(());
        };
        let data = host + self.blocks.bitmap;
        let end = data + (block.end.min(end) - block.start);
        let end = end.min(self.data_end.load(Ordering::Acquire));
        let start = data + (shape.size - block.start);
        zero_or_write(&*self.storage, start..end, Zeroing::MayUnmap)
    }

    /// Gives new bytes zeroes of their own, since the image below has data there.
    fn cover(&self, shape: &Shape, hidden: Range<u64>) -> Result<()> {
        let mut fill = |slot: Slot<'_>| {
            let host = slot.host..slot.host + range::len(&slot.guest);
            match slot.zeroed {
                true => Ok(()),
                false => zero_or_write(slot.storage, host, Zeroing::MayUnmap),
            }
        };
        let mut at = hidden.start;
        while at < hidden.end {
            let index = self.blocks.index(at);
            let block = self.blocks.guest(index);
            let end = hidden.end.min(block.end);
            if let Some(host) = self.locate(shape, index, Wait::Yes)? {
                let sectors = (at - block.start) / SECTOR..(end - block.start).div_ceil(SECTOR);
                let run = self.bitmaps.run(&*self.storage, host, sectors, Wait::Yes)?;
                if run.present {
                    // Its padding was zeroed before.
                    at = (at + run.count * SECTOR).min(end);
                    continue;
                }
            }
            at += self.allocator.allocate(self, at..end, &mut fill)?;
        }
        Ok(())
    }

    /// Makes room for `entries` words: in place where nothing is in the way, else at the end.
    fn enlarge_table(&self, shape: &Arc<Shape>, entries: u64) -> Result<Arc<Shape>> {
        let count = u32::try_from(entries)
            .map_err(|_| Error::new(ErrorKind::OutOfRange, "the table would be too long"))?;
        let unnamed = self.allocator.unnamed(self);
        let mut space = self.space.lock();
        let mut shape = Arc::clone(shape);
        // tapdisk finds its batmap behind the table: where that grows, the batmap is dropped.
        if !matches!(shape.batmap, batmap::Found::None) {
            self.tail(&mut space, &shape)?;
            self.replace_footers(&space, &shape, shape.footer.created_by(Creator::Win))?;
            shape = self.shape.load_full();
        }
        let old = shape.table.host();
        let before = self.tail(&mut space, &shape)?;
        let laid = self.lay_table(&mut space, &shape, entries, &unnamed);
        let host = laid.inspect_err(|_| {
            // Nothing refers to the room that was made; where it stays it is a leak.
            let _ = self.cut(&mut space, &shape, before);
        })?;
        let header = shape.header.with_table(host, count);
        let fields = &header.to_bytes()[TABLE_FIELDS];
        let at = shape.footer.header_offset() + len64(TABLE_FIELDS.start);
        self.storage.write_at(fields, at)?;
        let unused = old..old + shape.table.len() * 4;
        let shape = Shape::new(shape.footer, header, self.rule, batmap::Found::None);
        let shape = Arc::new(shape);
        // It is what the file says, whatever becomes of the sync.
        self.shape.store(Arc::clone(&shape));
        self.allocator.order.settle()?;
        if host != old {
            // Where it stays it is a leak.
            let _ = self.storage.zero(unused, Zeroing::MayUnmap);
        }
        Ok(shape)
    }

    /// Writes a table of `entries` words, the old ones and then unused ones, to where it has room:
    /// not to what is `unnamed`.
    fn lay_table(
        &self,
        space: &mut Space,
        shape: &Shape,
        entries: u64,
        unnamed: &[Range<u64>],
    ) -> Result<u64> {
        let old = &shape.table;
        let (host, first) =
            match self.extend_in_place(space, shape, old.host() + entries * 4, unnamed)? {
                true => (old.host(), old.len()),
                false => (self.take_bytes(space, shape, entries * 4)?, 0),
            };
        let end = (host + entries * 4).next_multiple_of(SECTOR);
        let new = Table::new(host, (end - host) / 4, Endian::Big);
        new.fill(&*self.storage, first..new.len(), |index| {
            match index < old.len() {
                true => old.get(&*self.storage, index, Wait::Yes),
                false => Ok(UNUSED),
            }
        })?;
        self.allocator.order.settle()?;
        Ok(host)
    }

    /// Has the table end at `end`, if only unused space is between.
    fn extend_in_place(
        &self,
        space: &mut Space,
        shape: &Shape,
        end: u64,
        unnamed: &[Range<u64>],
    ) -> Result<bool> {
        let start = shape.table.host() + shape.table.len() * 4;
        let end = end.next_multiple_of(SECTOR);
        let tail = self.tail(space, shape)?;
        if tail <= start.next_multiple_of(SECTOR) {
            // Nothing is behind the table.
            self.take_until(space, shape, end)?;
            return Ok(true);
        }
        let wanted = start..end;
        let taken = unnamed
            .iter()
            .any(|host| range::intersect(host, &wanted).is_some());
        let listed = taken || space.lists(&wanted, self.blocks);
        if end > tail || listed || self.is_metadata(shape, &wanted) {
            return Ok(false);
        }
        let mut free = true;
        shape.table.each(&*self.storage, |_, word| {
            let host = u64::from(word) * SECTOR;
            let block = host..host + self.blocks.len();
            free &= word == UNUSED || range::intersect(&block, &wanted).is_none();
            Ok(())
        })?;
        Ok(free)
    }

    /// Shrinks: the footers first, then what they no longer show is given back.
    fn shrink(&self, shape: &Arc<Shape>, size: u64) -> Result<()> {
        let blocks = self.blocks.count(size)..self.blocks.count(shape.size);
        for index in blocks.clone() {
            self.locate(shape, index, Wait::Yes)?;
        }
        self.set_size(shape, size)?;
        let shape = self.shape.load_full();
        self.drop_behind(&shape, blocks)?;
        self.zero_cut(&shape, u64::MAX)
    }

    /// Frees blocks behind the end of the disk, as far as they are where blocks may be.
    fn drop_behind(&self, shape: &Shape, blocks: Range<u64>) -> Result<()> {
        // Words that nobody looked at may by now be upon what has been taken since.
        self.space.lock().disjoint = None;
        for index in blocks {
            let word = shape.table.get(&*self.storage, index, Wait::Yes)?;
            if word == UNUSED {
                continue;
            }
            let host = u64::from(word) * SECTOR;
            let host = host..host + self.blocks.len();
            let fits = host.end <= self.data_end.load(Ordering::Acquire)
                && !self.is_metadata(shape, &host)
                && self.is_disjoint(&mut self.space.lock(), shape)?;
            shape.table.publish(&*self.storage, index, &[UNUSED])?;
            if fits {
                self.allocator.free(self, host)?;
            }
        }
        Ok(())
    }

    /// Writes both footers for another size, and shows it.
    fn set_size(&self, shape: &Shape, size: u64) -> Result<()> {
        let mut space = self.space.lock();
        let footer = resized(&shape.footer, size);
        self.tail(&mut space, shape)?;
        self.complete_end(&mut space, shape)?;
        self.replace_footers(&space, shape, footer)
    }
}

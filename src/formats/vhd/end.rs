//! The end of the file: room for more, and the footer that moves with it.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::error::{Error, ErrorKind, Result};
use crate::formats::vhd::batmap;
use crate::formats::vhd::footer::{self, Footer};
use crate::formats::vhd::geometry::SECTOR;
use crate::formats::vhd::layout::UNUSED;
use crate::formats::vhd::space::Space;
use crate::formats::vhd::sparse::{Shape, Sparse};
use crate::image::open::WriteOrder;
use crate::util::align::clamp_len;
use crate::util::buf::is_zero;

impl Sparse {
    /// Where the footer has to be: at the end of storage whose length is fixed, such as the logical
    /// volumes that XenServer keeps its disks on.  Elsewhere it is behind what is in use.
    pub(super) fn footer_place(&self) -> Option<u64> {
        let size = self.storage.size();
        let fixed = self.storage.has_fixed_len();
        fixed.then(|| size.saturating_sub(footer::LEN64))
    }

    /// Has the footer right behind `used`, which is past everything in use.
    pub(super) fn cut(&self, space: &mut Space, shape: &Shape, used: u64) -> Result<()> {
        space.tail = Some(used);
        space.grown = true;
        self.trim(space, shape)
    }

    /// Writes both footers anew, one after the other, so that one is whole at any time; once the one at
    /// the end is written the disk goes by it, whatever becomes of the rest.
    pub(super) fn replace_footers(
        &self,
        space: &Space,
        shape: &Shape,
        footer: Footer,
    ) -> Result<()> {
        let Some(host) = space.footer else {
            return Err(Error::corrupt(
                "there is no whole footer at the end (allowed: repairing that first)",
            ));
        };
        let bytes = footer.sealed().to_bytes();
        let batmap = batmap::read(&*self.storage, &footer, &shape.header)?;
        let shape = Shape::new(footer, shape.header, self.rule, batmap);
        self.storage.write_at(&bytes, host)?;
        self.shape.store(Arc::new(shape));
        self.allocator.order.settle()?;
        self.write_in_order(&bytes, 0)
    }

    /// Refuses space past where table words end.
    pub(super) fn limit(&self, end: u64) -> Result<u64> {
        if end / SECTOR < u64::from(UNUSED) {
            return Ok(end);
        }
        Err(Error::new(
            ErrorKind::NoSpace,
            "the file would grow beyond 2 TiB, where the format ends",
        ))
    }

    /// Moves the footer so that all before `end` is free of it, and then `ahead` more.
    ///
    /// The new footer is on stable media before anything may touch the old one.
    pub(super) fn make_room(
        &self,
        space: &mut Space,
        shape: &Shape,
        end: u64,
        ahead: u64,
    ) -> Result<()> {
        space.grown = true;
        if let Some(place) = self.footer_place() {
            return self.keep_within(space, shape, end, place);
        }
        self.erase_stale(space)?;
        if self.allocator.order.policy() == WriteOrder::Unordered {
            space.stale = space.footer.take_if(|f| *f < end);
            self.erase_stale(space)?;
            self.data_end.fetch_max(end, Ordering::AcqRel);
            return Ok(());
        }
        if space.footer.is_some_and(|f| f >= end) {
            return Ok(());
        }
        let new = self.limit(end + ahead).unwrap_or(end);
        self.write_footer(shape, new)?;
        space.stale = space.footer.replace(new);
        self.data_end.store(new, Ordering::Release);
        self.erase_stale(space)
    }

    /// Refuses to use anything from `place` on, where the footer is, or is to be from now on: the
    /// volume may have grown since.
    fn keep_within(&self, space: &mut Space, shape: &Shape, end: u64, place: u64) -> Result<()> {
        let end = end.max(space.tail.unwrap_or(0));
        if end > place {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!(
                    "{end} bytes and a footer are needed, and there are {}",
                    place + footer::LEN64
                ),
            ));
        }
        if space.footer.is_none() {
            self.write_footer(shape, place)?;
            space.footer = Some(place);
            self.data_end.store(place, Ordering::Release);
        }
        Ok(())
    }

    /// Writes the footer at `host` and waits until it is on stable media.
    pub(super) fn write_footer(&self, shape: &Shape, host: u64) -> Result<()> {
        self.write_in_order(&shape.footer.sealed().to_bytes(), host)
    }

    /// Writes, and waits until that is on stable media, where order matters.
    pub(super) fn write_in_order(&self, bytes: &[u8], host: u64) -> Result<()> {
        self.storage.write_at(bytes, host)?;
        self.allocator.order.settle()
    }

    fn erase_stale(&self, space: &mut Space) -> Result<()> {
        if let Some(old) = space.stale {
            self.storage.write_at(&[0; footer::LEN], old)?;
            space.stale = None;
        }
        Ok(())
    }

    /// The first byte past everything in use.
    pub(super) fn tail(&self, space: &mut Space, shape: &Shape) -> Result<u64> {
        if let Some(tail) = space.tail {
            return Ok(tail);
        }
        let used = self.taken_end(space, shape)?;
        if self.storage.has_fixed_len() {
            self.find_gaps(space, shape)?;
        }
        let tail = match space.footer {
            // The footer is far away, and what lies between is free, whatever it holds.
            _ if self.storage.has_fixed_len() => used,
            // What lies between is taken only where it is a hole: nobody's data.
            Some(at) if used < at && self.is_hole(used..at)? => used,
            Some(at) => used.max(at),
            None => used.max(self.storage.size()),
        };
        space.tail = Some(tail);
        Ok(tail)
    }

    /// The end of what is in use, or waits to be used again.
    fn taken_end(&self, space: &Space, shape: &Shape) -> Result<u64> {
        let used = self.used_end(shape)?.max(space.listed_end(self.blocks));
        // The table on stable media may still name it.
        let waiting = self.allocator.waiting().into_iter().map(|host| host.end);
        Ok(used.max(waiting.max().unwrap_or(0)))
    }

    fn is_hole(&self, host: Range<u64>) -> Result<bool> {
        const PAGE: u64 = 64 << 10;
        let run = self.storage.run(host.start, host.end - host.start)?;
        let known = if run.data { 0 } else { run.len };
        let rest = host.start + known..host.end;
        if rest.is_empty() || rest.end - rest.start > PAGE {
            return Ok(rest.is_empty());
        }
        let mut bytes = vec![0; clamp_len(rest.end - rest.start, usize::MAX)];
        self.storage.read_at(&mut bytes, rest.start)?;
        Ok(is_zero(&bytes))
    }

    /// The end of the last block or metadata.
    ///
    /// # Errors
    /// `Corrupt` where the table points outside the file: space that it names must not be taken.
    pub(super) fn used_end(&self, shape: &Shape) -> Result<u64> {
        let bounds = self.bounds(shape);
        let mut end = self.metadata_end(shape);
        let blocks = self.blocks.count(shape.size);
        shape.table.each(&*self.storage, |index, word| {
            let host = match bounds.locate(index, word) {
                Ok(host) => host,
                // Past the disk's end nothing is read: such words do not count.
                Err(_) if index >= blocks => None,
                Err(e) => return Err(e),
            };
            end = end.max(host.map_or(0, |h| h + self.blocks.len()));
            Ok(())
        })?;
        Ok(end)
    }

    /// The end of the last metadata, but for the footer.
    pub(super) fn metadata_end(&self, shape: &Shape) -> u64 {
        let parts = self.metadata(shape);
        let end = parts.iter().map(|part| part.end).max();
        end.unwrap_or_default().next_multiple_of(SECTOR)
    }

    /// Leaves the file's end as a clean close leaves it: the footer right behind what is in use.
    pub(super) fn trim(&self, space: &mut Space, shape: &Shape) -> Result<()> {
        if !space.grown && space.ready.is_empty() && space.clean.is_empty() {
            return self.allocator.order.settle();
        }
        let mut tail = self.tail(space, shape)?;
        let floor = self.metadata_end(shape);
        let unused: Vec<u32> = space.clean.drain(..).collect();
        space.ready.extend(unused);
        space.ready.sort_unstable();
        let gap = self.blocks.stride() - self.blocks.len();
        let before = tail;
        while let Some(slot) = space.ready.last() {
            let host = u64::from(*slot) * SECTOR;
            if host < floor || tail > host + self.blocks.len() + gap {
                break;
            }
            tail = host;
            space.ready.pop();
        }
        if tail < before && gap > 0 {
            // What pads the first of them is not needed either.
            tail = tail.min(self.taken_end(space, shape)?);
        }
        self.punch_ready(space);
        // Should that fail, what is behind may be anything.
        space.tail = None;
        match self.footer_place() {
            Some(place) => {
                self.keep_within(space, shape, tail, place)?;
                self.allocator.order.settle()?;
            }
            None => self.end_at(space, shape, tail)?,
        }
        space.tail = Some(tail);
        space.grown = false;
        Ok(())
    }

    /// Has the file end with a footer at `tail`.
    fn end_at(&self, space: &mut Space, shape: &Shape, tail: u64) -> Result<()> {
        shape.footer.write(&*self.storage, tail)?;
        // The one that is cut off was good until now.
        self.allocator.order.settle()?;
        self.storage.set_len(tail + footer::LEN64)?;
        // One that could not be erased was cut off, or the new one is in its place.
        space.stale = space.stale.filter(|old| *old + footer::LEN64 <= tail);
        space.footer = Some(tail);
        self.data_end.store(tail, Ordering::Release);
        Ok(())
    }

    /// Writes the footer where an unordered image has none, so that the file is whole.
    pub(super) fn complete_end(&self, space: &mut Space, shape: &Shape) -> Result<()> {
        if self.allocator.order.policy() == WriteOrder::Ordered || space.footer.is_some() {
            return Ok(());
        }
        let tail = self.tail(space, shape)?;
        if let Some(place) = self.footer_place() {
            return self.keep_within(space, shape, tail, place);
        }
        self.write_footer(shape, tail)?;
        space.footer = Some(tail);
        Ok(())
    }
}

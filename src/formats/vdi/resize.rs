//! Change of a disk's size.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::formats::vdi::header::{FREE, Header, Kind, SECTOR, ZERO};
use crate::formats::vdi::image::{Shape, Vdi};
use crate::image::units::Units;
use crate::image::{LayerBelow, Resize, Wait};
use crate::storage::{Zeroing, zero_or_write};

impl Resize for Vdi {
    fn resize(&self, virtual_size: u64, below: LayerBelow) -> Result<()> {
        self.allocator()?;
        if !virtual_size.is_multiple_of(SECTOR) {
            return Err(Error::invalid(format!(
                "a VDI of {virtual_size} bytes (allowed: a multiple of {SECTOR})"
            )));
        }
        let shape = self.shape.load_full();
        let size = shape.header.size();
        if virtual_size == size {
            return Ok(());
        }
        if virtual_size < size || self.kind == Kind::Fixed {
            return Err(Error::unsupported(
                "this disk is not resized so (allowed: growing of dynamic and differencing disks)",
            ));
        }
        self.grow(&shape, virtual_size, below)
    }
}

impl Vdi {
    fn grow(&self, shape: &Shape, size: u64, below: LayerBelow) -> Result<()> {
        let old = &shape.header;
        let entries = size.div_ceil(self.block).max(old.entries());
        let room = old.data().saturating_sub(old.map().start) / 4;
        if entries > room || entries >= u64::from(ZERO) {
            return Err(Error::new(
                ErrorKind::OutOfRange,
                format!(
                    "a map of {entries} entries (the file has room for {room}; allowed: a copy made by convert)"
                ),
            ));
        }
        let hidden = match below {
            _ if !self.has_backing() => 0,
            LayerBelow::Nothing => 0,
            LayerBelow::Size(size) => size,
            LayerBelow::NotOpened => {
                return Err(Error::unsupported(
                    "a differencing disk does not grow while its parent is not open: data of the parent could show",
                ));
            }
        };
        let last = old.size() / self.block;
        let shows = hidden > old.size() && !old.size().is_multiple_of(self.block);
        if shows && shape.map.get(&*self.storage, last, Wait::Yes)? == FREE {
            return Err(Error::unsupported(
                "the disk's last block has no space of its own: data of the parent could show",
            ));
        }
        self.allocator.begin(self)?;
        self.zero_padding(shape)?;
        // What becomes visible of the parent reads as zeroes.
        let number = |index: u64| match index * self.block < hidden {
            true => ZERO,
            false => FREE,
        };
        let first = old.size().div_ceil(self.block);
        let words = (first..entries).flat_map(|index| number(index).to_le_bytes());
        let words: Vec<u8> = words.collect();
        let order = &self.allocator.order;
        self.storage.write_at(&words, old.map().start + first * 4)?;
        order.settle_all()?;
        let mut header = Header::read(&*self.storage)?;
        let count = u32::try_from(entries).unwrap_or(FREE).to_le_bytes();
        header.set(header.fields.entries, &count);
        header.set(header.fields.disk, &size.to_le_bytes());
        // One sector, which is the old one or the new one.
        self.storage.write_at(&header.bytes, 0)?;
        order.settle_all()?;
        self.shape.store(Arc::new(Shape::new(header)));
        Ok(())
    }

    /// Zeroes what the last block holds past the disk's end.
    fn zero_padding(&self, shape: &Shape) -> Result<()> {
        let (size, index) = (shape.header.size(), shape.header.size() / self.block);
        if size.is_multiple_of(self.block) {
            return Ok(());
        }
        let number = shape.map.get(&*self.storage, index, Wait::Yes)?;
        if number >= ZERO {
            return Ok(());
        }
        let data = self.locate(&shape.header, index, number)?;
        let part = data + (size - index * self.block)..data + self.block;
        zero_or_write(&*self.storage, part, Zeroing::KeepSpace)
    }
}

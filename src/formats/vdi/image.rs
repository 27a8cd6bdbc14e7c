//! An open disk: where its bytes are.

use std::ops::Range;
use std::sync::Arc;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::formats::vdi::header::{
    COUNT, DISK_ID, FREE, Header, Kind, PARENT_ID, PARENT_STATE_ID, STATE_ID, ZERO,
};
use crate::formats::vdi::units::Counted;
use crate::image::info::Detail;
use crate::image::open::{OpenOptions, Purpose};
use crate::image::table::{Endian, Table};
use crate::image::units::{Allocator, Order, Units};
use crate::image::{
    Backing, Caps, Check, Compact, Driver, Empty, Image, Layout, Relink, Resize, Run, Source,
    Store, Wait,
};
use crate::storage::open::Access;
use crate::storage::{Limits, Storage};

/// What a change of size replaces.
#[derive(Debug)]
pub(super) struct Shape {
    pub(super) header: Header,
    pub(super) map: Table,
}

impl Shape {
    pub(super) fn new(header: Header) -> Self {
        let map = Table::new(header.map().start, header.entries(), Endian::Little);
        Self { header, map }
    }
}

/// An open disk.
#[derive(Debug)]
pub(super) struct Vdi {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) write: bool,
    pub(super) kind: Kind,
    /// Bytes of a block's data.
    pub(super) block: u64,
    pub(super) shape: ArcSwap<Shape>,
    pub(super) allocator: Allocator,
    pub(super) blocks: Mutex<Counted>,
}

impl Vdi {
    /// Opens the disk in `storage`.
    pub(super) fn open(storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<Self> {
        let header = Header::read(&*storage)?;
        let order = Order::new(options.order, Arc::clone(&storage), None);
        let image = Self {
            write: options.access == Access::Write,
            kind: header.kind()?,
            block: header.block(),
            shape: ArcSwap::from_pointee(Shape::new(header)),
            allocator: Allocator::new(order, Arc::clone(&options.grace)),
            blocks: Mutex::default(),
            storage,
        };
        if image.write && options.purpose == Purpose::Use {
            image.may_change()?;
            image.learn()?;
        }
        Ok(image)
    }

    /// What the header in the file says now.  With no change under way.
    pub(super) fn reread(&self) -> Result<Arc<Shape>> {
        let shape = Arc::new(Shape::new(Header::read(&*self.storage)?));
        self.shape.store(Arc::clone(&shape));
        Ok(shape)
    }

    /// Changes the header in the file, whose sector is the old one or the new one at any time.  With no
    /// change under way.
    pub(super) fn rewrite(&self, change: impl FnOnce(&mut Header)) -> Result<()> {
        let mut header = Header::read(&*self.storage)?;
        change(&mut header);
        self.storage.write_at(&header.bytes, 0)?;
        self.shape.store(Arc::new(Shape::new(header)));
        self.allocator.order.settle()
    }

    /// Where the data of block `index` is, of which the map says `number`.
    ///
    /// # Errors
    /// `Corrupt` where the block begins outside the file.
    pub(super) fn locate(&self, header: &Header, index: u64, number: u32) -> Result<u64> {
        let host = header.grid().host(u64::from(number));
        if host.start + header.extra() < self.storage.size() {
            return Ok(host.start + header.extra());
        }
        Err(Error::corrupt(format!(
            "block {index}: its map entry {number:#x} puts it at {:#x}..{:#x} (allowed: inside the file of {:#x} bytes)",
            host.start,
            host.end,
            self.storage.size()
        )))
    }

    /// Bytes of `range`, which begins in block `index`, for which the map goes on as `follows` says, a
    /// block's number after that of the block before.
    fn alike(
        &self,
        map: &Table,
        index: u64,
        range: Range<u64>,
        follows: impl Fn(u64, u32) -> bool,
    ) -> u64 {
        let others = index + 1..range.end.div_ceil(self.block);
        let end = map.alike(others, |next, number| follows(next - index, number));
        range.end.min(end * self.block) - range.start
    }

    /// The run of bytes that are stored from `at` on, in block `index` and those that follow it in the
    /// file too.
    fn stored(&self, shape: &Shape, index: u64, number: u32, range: Range<u64>) -> Result<Run<'_>> {
        let data = self.locate(&shape.header, index, number)?;
        let host = data + (range.start - index * self.block);
        let joined = shape.header.extra() == 0;
        let follows = |n: u64, next: u32| joined && u64::from(next) == u64::from(number) + n;
        let len = self.alike(&shape.map, index, range, follows);
        // The file may end within a block; what it cuts off reads as zeroes.
        let there = self.storage.size().saturating_sub(host);
        if there == 0 {
            let source = Source::Zero;
            return Ok(Run { len, source });
        }
        let source = Source::Stored {
            storage: &*self.storage,
            host,
            // The first change is made by `allocate`, which sees to the header.
            writable: self.write && self.allocator.has_begun(),
        };
        let len = len.min(there);
        Ok(Run { len, source })
    }
}

impl Image for Vdi {
    fn driver(&self) -> &'static Driver {
        &super::DRIVER
    }

    fn virtual_size(&self) -> u64 {
        self.shape.load().header.size()
    }

    fn cluster_size(&self) -> Option<u64> {
        Some(self.block)
    }

    fn limits(&self) -> Limits {
        let unit = u32::try_from(self.block).unwrap_or(0);
        Limits {
            zero_align: unit,
            discard_align: unit,
            ..self.storage.limits()
        }
    }

    fn caps(&self) -> Caps {
        Caps {
            write: self.write,
            backing: self.has_backing(),
            ..Caps::STORED
        }
    }

    fn storage(&self) -> &dyn Storage {
        &*self.storage
    }

    fn map(&self, at: u64, len: u64, wait: Wait) -> Result<Run<'_>> {
        let shape = self.shape.load();
        let range = at..at + len.min(shape.header.size().saturating_sub(at));
        let index = at / self.block;
        let source = match shape.map.get(&*self.storage, index, wait)? {
            FREE => Source::Below,
            ZERO => Source::Zero,
            number => return self.stored(&shape, index, number, range),
        };
        let zero = matches!(source, Source::Zero);
        let follows = |_: u64, next: u32| next == if zero { ZERO } else { FREE };
        let len = self.alike(&shape.map, index, range, follows);
        Ok(Run { len, source })
    }

    fn store(&self) -> Option<&dyn Store> {
        Some(self)
    }

    fn close(&self) -> Result<()> {
        self.allocator.close(self)?;
        if self.allocator.has_begun() {
            self.trim(&mut self.blocks.lock())?;
        }
        self.allocator.order.settle()
    }

    fn backing(&self) -> Option<Backing> {
        let header = &self.shape.load().header;
        self.kind.has_parent().then(|| Backing {
            names: Vec::new(),
            format: Some("vdi".to_owned()),
            identity: header.uuid(PARENT_ID),
            state: header.uuid(PARENT_STATE_ID),
        })
    }

    fn identity(&self) -> Option<Uuid> {
        self.shape.load().header.uuid(DISK_ID)
    }

    fn keep_state(&self) {
        self.allocator.begin_unannounced();
    }

    fn state(&self) -> Option<Uuid> {
        self.shape.load().header.uuid(STATE_ID)
    }

    fn details(&self) -> Vec<Detail> {
        let header = &self.shape.load().header;
        let uuid = |field| header.uuid(field).unwrap_or_default().to_string();
        let mut details = vec![
            Detail::new("subformat", self.kind.word()),
            Detail::new("block-size", self.block),
            Detail::new("allocated-blocks", header.word(COUNT)),
            Detail::new("uuid", uuid(DISK_ID)),
            Detail::new("modify-uuid", uuid(STATE_ID)),
        ];
        if self.kind.has_parent() {
            details.push(Detail::new("parent-uuid", uuid(PARENT_ID)));
            details.push(Detail::new("parent-modify-uuid", uuid(PARENT_STATE_ID)));
        }
        if header.extra() > 0 {
            details.push(Detail::new("block-extra", header.extra()));
        }
        let comment = header.comment();
        if !comment.is_empty() {
            details.push(Detail::new("comment", comment));
        }
        details
    }

    fn as_check(&self) -> Option<&dyn Check> {
        Some(self)
    }

    fn as_relink(&mut self) -> Option<&mut dyn Relink> {
        Some(self)
    }

    fn as_empty(&mut self) -> Option<&mut dyn Empty> {
        Some(self)
    }

    fn as_compact(&self) -> Option<&dyn Compact> {
        Some(self)
    }

    fn as_resize(&self) -> Option<&dyn Resize> {
        Some(self)
    }

    fn as_layout(&self) -> Option<&dyn Layout> {
        self.write.then_some(self)
    }
}

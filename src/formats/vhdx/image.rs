//! An open disk: where its bytes are.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::formats::vhdx::bat::Shape;
use crate::formats::vhdx::header;
use crate::formats::vhdx::journal::Journal;
use crate::formats::vhdx::locator::Locator;
use crate::image::info::Detail;
use crate::image::open::{OpenOptions, Purpose};
use crate::image::units::{Allocator, Order, Slots, Units};
use crate::image::words::{Endian, Words};
use crate::image::{
    Backing, Caps, Check, Compact, Driver, Empty, Image, Layout, Relink, Resize, Run, Store, Wait,
};
use crate::storage::open::Access;
use crate::storage::{Limits, Storage};
use crate::util::random;

/// Bytes of sector bitmaps in one page in memory, and how many pages there are.
const PAGE: u64 = 4096;
const PAGES: usize = 64;

/// An open disk.
#[derive(Debug)]
pub(super) struct Vhdx {
    pub(super) file: Arc<dyn Storage>,
    /// Where metadata is read and written, with what the log holds.
    pub(super) journal: Arc<Journal>,
    /// Where guest data is.
    pub(super) data: Arc<dyn Storage>,
    pub(super) write: bool,
    /// Everything that the file says of its space is sound.
    pub(super) uses: bool,
    /// Bytes of a block.
    pub(super) block: u64,
    /// What is known of the parent, where there is one.
    pub(super) locator: Option<Locator>,
    pub(super) shape: ArcSwap<Shape>,
    pub(super) bitmaps: Words<AtomicU64>,
    pub(super) allocator: Allocator,
    /// Which MiB of the file are in use.
    pub(super) slots: Mutex<Slots>,
    /// Changes leave the disk as it is.
    pub(super) keeps_state: AtomicBool,
    /// The state that it comes to with the next change, where somebody was told.
    pub(super) next: Mutex<Option<Uuid>>,
    /// Why the log cannot be replayed, where it cannot.
    pub(super) log_fault: Mutex<Option<String>>,
    creator: String,
}

impl Vhdx {
    /// Opens the disk in `storage`.
    pub(super) fn open(storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<Self> {
        let order = Arc::new(Order::new(options.order, Arc::clone(&storage), None));
        let journal = Journal::open(Arc::clone(&storage), Arc::clone(&order))?;
        let write = options.access == Access::Write;
        let uses = write && options.purpose == Purpose::Use;
        let log_fault = match (journal.load_log(), options.purpose) {
            (Err(e), Purpose::Check) => Some(e.message().to_owned()),
            (done, _) => {
                done?;
                None
            }
        };
        if uses {
            journal.replay()?;
        }
        let journal = Arc::new(journal);
        let shape = Shape::read(&*journal, &journal.header().log())?;
        let locator = match shape.metadata.has_parent {
            true => Some(read_locator(&shape, &*journal)?),
            false => None,
        };
        let data: Arc<dyn Storage> = match journal.is_dirty() {
            true => Arc::clone(&journal) as Arc<dyn Storage>,
            false => Arc::clone(&storage),
        };
        let image = Self {
            write,
            uses,
            block: shape.metadata.block,
            locator,
            shape: ArcSwap::from_pointee(shape),
            bitmaps: Words::new(PAGE, PAGES, Endian::Little),
            allocator: Allocator::new(order, Arc::clone(&options.grace)),
            slots: Mutex::default(),
            keeps_state: AtomicBool::new(false),
            next: Mutex::default(),
            log_fault: Mutex::new(log_fault),
            creator: header::creator(&*storage)?,
            file: storage,
            journal,
            data,
        };
        if uses {
            image.learn()?;
        }
        Ok(image)
    }

    /// What the file says now of where everything is.  With no change under way.
    pub(super) fn reread(&self) -> Result<Arc<Shape>> {
        let shape = Shape::read(&*self.journal, &self.journal.header().log())?;
        let shape = Arc::new(shape);
        self.shape.store(Arc::clone(&shape));
        Ok(shape)
    }
}

/// What the file says of the parent.
pub(super) fn read_locator(shape: &Shape, storage: &dyn Storage) -> Result<Locator> {
    match shape.metadata.locator(storage)? {
        Some(item) => Locator::from_bytes(&item),
        None => Err(Error::corrupt(
            "the disk is a differencing one, and its metadata has no parent locator",
        )),
    }
}

impl Image for Vhdx {
    fn driver(&self) -> &'static Driver {
        &super::DRIVER
    }

    fn virtual_size(&self) -> u64 {
        self.shape.load().metadata.size
    }

    fn cluster_size(&self) -> Option<u64> {
        Some(self.block)
    }

    fn limits(&self) -> Limits {
        let unit = u32::try_from(self.block).unwrap_or(0);
        Limits {
            zero_align: unit,
            discard_align: unit,
            ..self.file.limits()
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
        &*self.file
    }

    fn map(&self, at: u64, len: u64, wait: Wait) -> Result<Run<'_>> {
        self.look_up(at, len, wait)
    }

    fn store(&self) -> Option<&dyn Store> {
        Some(self)
    }

    fn close(&self) -> Result<()> {
        self.allocator.close(self)?;
        self.end_session()
    }

    fn backing(&self) -> Option<Backing> {
        self.locator.as_ref().map(Locator::backing)
    }

    fn other_state(&self) -> Option<Uuid> {
        self.locator.as_ref().and_then(Locator::other_state)
    }

    fn sector_size(&self) -> Option<u64> {
        Some(self.shape.load().grid.sector)
    }

    fn physical_sector_size(&self) -> Option<u64> {
        Some(self.shape.load().metadata.physical)
    }

    fn identity(&self) -> Option<Uuid> {
        Some(self.shape.load().metadata.id)
    }

    fn keep_state(&self) {
        self.keeps_state.store(true, Ordering::Relaxed);
    }

    fn state(&self) -> Option<Uuid> {
        Some(self.journal.header().data_write)
    }

    fn next_state(&self) -> Result<Option<Uuid>> {
        let mut next = self.next.lock();
        if next.is_none() {
            *next = Some(random::uuid()?);
        }
        Ok(*next)
    }

    fn is_dirty(&self) -> bool {
        self.journal.is_dirty()
    }

    fn details(&self) -> Vec<Detail> {
        let shape = self.shape.load();
        let (metadata, header) = (&shape.metadata, self.journal.header());
        let log = header.log();
        let mut details = vec![
            Detail::new("subformat", self.kind()),
            Detail::new("block-size", self.block),
            Detail::new("logical-sector-size", metadata.logical),
            Detail::new("physical-sector-size", metadata.physical),
            Detail::new("log-size", log.end - log.start),
            Detail::new("virtual-disk-id", metadata.id.to_string()),
            Detail::new("file-write-guid", header.file_write.to_string()),
            Detail::new("data-write-guid", header.data_write.to_string()),
        ];
        if let Some(backing) = self.backing() {
            let state = backing.state.unwrap_or_default();
            details.push(Detail::new("parent-linkage", state.to_string()));
        }
        if let Some(state) = self.other_state() {
            details.push(Detail::new("parent-linkage2", state.to_string()));
        }
        if metadata.unknown() > 0 {
            details.push(Detail::new("other-metadata-items", metadata.unknown()));
        }
        if !self.creator.is_empty() {
            details.push(Detail::new("creator", self.creator.clone()));
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

impl Vhdx {
    /// The word that `info` shows.
    pub(super) fn kind(&self) -> &'static str {
        match (self.locator.is_some(), self.shape.load().metadata.fixed) {
            (true, _) => "differencing",
            (false, true) => "fixed",
            (false, false) => "dynamic",
        }
    }
}

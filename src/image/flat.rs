//! Disks whose bytes lie in order from the start of a storage object.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};
use crate::image::open::{OpenOptions, WriteOrder};
use crate::image::store::Store;
use crate::image::{Caps, Fill, Run};
use crate::storage::open::Access;
use crate::storage::{Storage, Zeroing};

/// A disk in place.
#[derive(Debug)]
pub struct Flat {
    /// The object that holds it.
    pub storage: Arc<dyn Storage>,
    write: bool,
    order: WriteOrder,
    size: AtomicU64,
}

impl Flat {
    /// The first `size` bytes of `storage`.
    pub fn new(storage: Arc<dyn Storage>, options: &OpenOptions, size: u64) -> Self {
        Self {
            storage,
            write: options.access == Access::Write,
            order: options.order,
            size: AtomicU64::new(size),
        }
    }

    /// Refuses changes of what is open for reading.
    ///
    /// # Errors
    /// `ReadOnly`.
    pub fn may_write(&self) -> Result<()> {
        match self.write {
            true => Ok(()),
            false => Err(Error::read_only()),
        }
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Shows another size.
    pub fn set_size(&self, size: u64) {
        self.size.store(size, Ordering::Release);
    }

    /// [`crate::image::Image::caps`], of data that stays where it is.
    pub fn caps(&self) -> Caps {
        Caps {
            write: self.write,
            offsets_stay: true,
            ..Caps::STORED
        }
    }

    /// [`crate::image::Image::map`].
    pub fn map(&self, at: u64, len: u64) -> Run<'_> {
        let inside = len.min(self.size().saturating_sub(at));
        Run::in_place(&*self.storage, at, inside, self.write)
    }

    /// [`crate::image::Image::close`].
    ///
    /// # Errors
    /// The host's.
    pub fn close(&self) -> Result<()> {
        match self.order {
            WriteOrder::Ordered => self.storage.sync(),
            WriteOrder::Unordered => Ok(()),
        }
    }
}

impl Store for Flat {
    fn allocate(&self, _guest: Range<u64>, _fill: &mut Fill<'_>) -> Result<u64> {
        // Everything is stored already, so `map` never sends anyone here but on a read-only image.
        Err(Error::read_only())
    }

    fn zero(&self, guest: Range<u64>, how: Zeroing) -> Result<()> {
        self.may_write()?;
        self.storage.zero(guest, how)
    }

    fn discard(&self, guest: Range<u64>) -> Result<()> {
        self.zero(guest, Zeroing::MayUnmap)
    }

    fn flush(&self) -> Result<()> {
        self.storage.sync()
    }
}

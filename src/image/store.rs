//! What keeps the data of an image, however it does: in place, or in units that are given space.

use std::ops::Range;

use crate::error::Result;
use crate::image::Fill;
use crate::image::units::{Target, Units};
use crate::storage::Zeroing;

/// What an image leaves its changes of data to.
///
/// Each method is that of [`crate::image::Image`] by the same name, with its contract.
#[expect(clippy::missing_errors_doc, reason = "they are those of the image")]
pub trait Store {
    /// Gives the start of `guest` space of its own.
    fn allocate(&self, guest: Range<u64>, fill: &mut Fill<'_>) -> Result<u64>;
    /// As `allocate`, for one of many requests of clients.
    fn allocate_ahead(&self, guest: Range<u64>, fill: &mut Fill<'_>) -> Result<u64> {
        self.allocate(guest, fill)
    }
    /// Makes an aligned range read as zeroes.
    fn zero(&self, guest: Range<u64>, how: Zeroing) -> Result<()>;
    /// Drops an aligned range.
    fn discard(&self, guest: Range<u64>) -> Result<()>;
    /// Makes all completed writes durable.
    fn flush(&self) -> Result<()>;
}

impl<U: Units> Store for U {
    fn allocate(&self, guest: Range<u64>, fill: &mut Fill<'_>) -> Result<u64> {
        self.allocator()?.allocate(self, guest, fill)
    }

    fn allocate_ahead(&self, guest: Range<u64>, fill: &mut Fill<'_>) -> Result<u64> {
        self.allocator()?.allocate_following(self, guest, fill)
    }

    fn zero(&self, guest: Range<u64>, how: Zeroing) -> Result<()> {
        let target = match how {
            Zeroing::MayUnmap => Target::Zero,
            Zeroing::KeepSpace => Target::ZeroKept,
        };
        self.allocator()?.drop_units(self, &guest, target)
    }

    fn discard(&self, guest: Range<u64>) -> Result<()> {
        self.allocator()?.drop_units(self, &guest, Target::Dropped)
    }

    fn flush(&self) -> Result<()> {
        match self.allocator() {
            Ok(allocator) => allocator.flush(self),
            // What is open for reading has nothing to wait for.
            Err(_) => Ok(()),
        }
    }
}

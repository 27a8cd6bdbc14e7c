//! Giving back the space that an image takes for nothing.

use std::ops::Range;

use crate::error::Result;
use crate::util::progress::Progress;

/// Giving back the space that an image takes for nothing, in formats that allocate.
///
/// The disk reads as before at any time, after a kill and a power cut too.  Called on a sound image
/// that was not written to since it was opened or closed, with no request under way.
pub trait Compact {
    /// Whether [`Compact::free`] can be done with this image.
    fn frees(&self) -> bool;
    /// Takes the space of the units that a range of the disk touches, which reads as zeroes.
    ///
    /// # Errors
    /// `Unsupported`, with nothing changed, where they would read as something else without; the
    /// host's.
    fn free(&self, guest: &Range<u64>) -> Result<()>;
    /// Host bytes that are held for nothing, as far as [`Compact::pack`] can give them back.
    ///
    /// # Errors
    /// The host's; `Cancelled`.
    fn unused(&self, progress: &dyn Progress) -> Result<u64>;
    /// Gives back what is held for nothing, and ends the file behind what is in use; how many bytes
    /// were moved for that.
    ///
    /// # Errors
    /// The host's; `Cancelled`: then what was done stays done.
    fn pack(&self, progress: &dyn Progress) -> Result<u64>;
}

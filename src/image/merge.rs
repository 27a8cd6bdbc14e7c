//! Images that are merged into the disk below them in place, and say themselves how far that is.

use crate::error::Result;
use crate::image::Below;
use crate::util::progress::Progress;

/// The disk that an image is merged into.
pub trait MergeBase: Below {
    /// Writes all of `buf` at `at`, inside the disk.
    ///
    /// # Errors
    /// Those of the disk.
    fn write_at(&self, buf: &[u8], at: u64) -> Result<()>;
    /// Returns once every completed write is on stable media.
    ///
    /// # Errors
    /// Those of the disk.
    fn flush(&self) -> Result<()>;
}

/// Merging in place.
pub trait Merge {
    /// Bytes of the disk that are to be written still.
    fn left(&self) -> u64;
    /// Writes what the image makes into `base`, which is at least as large as its disk, from where an
    /// earlier merge was stopped.  Whatever stops this one, the image over `base` reads as before, once it
    /// is opened anew, and a merge goes on from there.
    ///
    /// Tells `progress` of as many bytes as [`Merge::left`] says, and asks it between two steps whether to
    /// stop.
    ///
    /// # Errors
    /// `Corrupt` for an image that would lose data, with nothing changed; `Unsupported` for one that a
    /// merge could not be gone on with; `Cancelled`; those of the disk and of the host.
    fn merge(&self, base: &dyn MergeBase, progress: &dyn Progress) -> Result<()>;
}

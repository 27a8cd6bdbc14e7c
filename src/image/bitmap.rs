//! Dirty bitmaps: what was written to a disk since some moment, kept in the image itself.

use std::ffi::{OsStr, OsString};
use std::ops::Range;

use crate::error::Result;

/// Whether a bitmap takes note of writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recording {
    /// It does.
    On,
    /// It stays as it is.
    Off,
}

/// One bitmap, as its image's directory has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name, unique in the image: bytes.
    pub name: OsString,
    /// Guest bytes that one bit stands for.
    pub granularity: u64,
    /// Whether it takes note of writes.
    pub recording: Recording,
    /// A writer did not close the image, so the bits cannot be relied on.
    pub in_use: bool,
}

/// The bitmaps of one image.
pub trait Bitmaps {
    /// All of them, in order.
    ///
    /// # Errors
    /// `Corrupt` where the directory is damaged; the host's.
    fn list(&self) -> Result<Vec<Bitmap>>;
    /// At most `most` ranges of guest bytes from `at` on whose bits are set in the bitmap `name`,
    /// ascending and not touching; fewer: there are no more.  Writes through this object that have
    /// completed are in it where it records.
    ///
    /// # Errors
    /// `NotFound`; `Corrupt` where it is in use or damaged; the host's.
    fn dirty(&self, name: &OsStr, at: u64, most: usize) -> Result<Vec<Range<u64>>>;
    /// Adds an empty bitmap.
    ///
    /// # Errors
    /// `Invalid` for a name that is taken or too long, and a granularity that is not a power of
    /// two within the format's limits; `Unsupported` where the image can have none; the host's.
    fn add(&mut self, name: &OsStr, granularity: Option<u64>, recording: Recording) -> Result<()>;
    /// Removes a bitmap, also one that is in use.
    ///
    /// # Errors
    /// `NotFound`; the host's.
    fn remove(&mut self, name: &OsStr) -> Result<()>;
    /// Clears all bits.
    ///
    /// # Errors
    /// As [`Bitmaps::dirty`].
    fn clear(&mut self, name: &OsStr) -> Result<()>;
    /// Has the bitmap take note of writes from now on, or no more.
    ///
    /// # Errors
    /// As [`Bitmaps::dirty`].
    fn set_recording(&mut self, name: &OsStr, recording: Recording) -> Result<()>;
    /// Sets in the bitmap `into` what is set in the bitmap `name` of `source`, a disk of the same
    /// size; `None`: of this image.  It is there as a whole or not at all, after a crash too, and
    /// durable when it returns.
    ///
    /// # Errors
    /// As [`Bitmaps::dirty`] of both.
    fn merge(&mut self, into: &OsStr, name: &OsStr, source: Option<&dyn Bitmaps>) -> Result<()>;
}

//! Making files that hold disks.
//!
//! What comes first in such a file tells of what comes later: sizes and digests.  Its own length does
//! not depend on them, so that it can be written last where the target can seek; where it cannot,
//! all disks are made twice, and only the second time written.

use std::fmt;

use crate::error::Result;
use crate::image::options::{OptionSpec, OptionValues};
use crate::util::digest::Algorithm;

/// How files of a container's format are made.
#[derive(Debug)]
pub struct Assembler {
    /// The `-o` options it takes.
    pub options: &'static [OptionSpec],
    /// The format of disks in it.
    pub disk_format: &'static str,
    /// The options of that format, as one would type them.
    ///
    /// # Errors
    /// `Invalid` where the options contradict each other.
    pub disk_options: fn(&OptionValues) -> Result<Vec<String>>,
    /// Plans a file.
    ///
    /// # Errors
    /// `Invalid` where the options contradict each other or the disks.
    pub plan: fn(&Plan<'_>) -> Result<Box<dyn Assembly>>,
}

/// What a file is made with.
#[derive(Debug, Clone, Copy)]
pub struct Plan<'a> {
    /// Virtual sizes of the disks in bytes, in order.
    pub disks: &'a [u64],
    /// Options, checked against the assembler's rows.
    pub values: &'a OptionValues,
    /// The name of the file without its extension, where it has one.
    pub stem: Option<&'a str>,
    /// The user's own description, in place of one that is made.
    pub description: Option<&'a [u8]>,
}

/// A disk as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Bytes.
    pub len: u64,
    /// The digest of them, where one is wanted.
    pub digest: Option<String>,
}

/// A planned file: what stands around the disks.
pub trait Assembly: fmt::Debug + Send + Sync {
    /// The digest of each disk that [`Assembly::head`] wants.
    fn digest(&self) -> Option<Algorithm>;
    /// Bytes of what comes before all disks.
    fn head_len(&self) -> u64;
    /// What comes before all disks.
    ///
    /// # Errors
    /// `Invalid` for disks that cannot be described.
    fn head(&self, disks: &[Stored]) -> Result<Vec<u8>>;
    /// Bytes of what comes before each disk.
    fn before_len(&self) -> u64;
    /// What comes before the disk with this number, counted from 0, of `len` bytes.
    ///
    /// # Errors
    /// `Invalid` for one that cannot be described.
    fn before(&self, number: usize, len: u64) -> Result<Vec<u8>>;
    /// Bytes of zeroes that come after a disk of `len` bytes.
    fn after(&self, len: u64) -> u64;
    /// Bytes of zeroes that come after all of them, which end at `at`.
    fn end(&self, at: u64) -> u64;
}

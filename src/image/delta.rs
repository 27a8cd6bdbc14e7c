//! Files that hold what makes one disk of another: how a format writes them.
//!
//! What there is to do is found out above ([`Step`]s in an order in which a merge in place loses
//! nothing); a format says in which units and by which means, and lays it out.

use std::fmt;
use std::ops::Range;

use crate::error::Result;
use crate::image::compress::Encoder;
use crate::image::options::{OptionSpec, OptionValues};
use crate::storage::Storage;

/// How blocks of the new disk are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Make {
    /// As this block of the old disk is.
    Copy(u32),
    /// As the old disk is at the same place, but for few bytes.
    Differ,
    /// Of zeroes.
    Zero,
    /// Of bytes that are stored.
    Store,
}

/// Blocks of the new disk, and how they are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// The first of them.
    pub block: u32,
    /// How many: one, unless they are stored; then a power of two.
    pub blocks: u32,
    /// How they are made.
    pub make: Make,
}

impl Step {
    /// Whether it reads the old disk, so that it must be done before that is overwritten.
    pub fn reads(&self) -> bool {
        matches!(self.make, Make::Copy(_) | Make::Differ)
    }
}

/// The data of a step as it is stored; none for copies and zeroes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Data {
    /// It is a difference to the old disk, not the bytes themselves.
    pub is_difference: bool,
    /// As it is stored.
    pub bytes: Vec<u8>,
}

/// Hands over the data of some steps, in order.
pub type Fetch<'f> = dyn FnMut(Range<usize>) -> Result<Vec<Data>> + 'f;

/// How one new file is written.
pub trait Plan: fmt::Debug + Sync {
    /// Bytes of a block.
    fn block(&self) -> u64;
    /// The most blocks that are stored together; a power of two.
    fn together(&self) -> u32;
    /// The most blocks that a file may make.
    fn most(&self) -> u64;
    /// Whether a difference to the old disk may be stored.
    fn differs(&self) -> bool;
    /// The means of one thread to encode; `None`: data is stored as it is.
    ///
    /// # Errors
    /// `Io` where there is no memory for them.
    fn encoder(&self) -> Result<Option<Box<dyn Encoder>>>;
    /// How data is stored that does not shrink.
    ///
    /// # Errors
    /// Those of the compressor.
    fn stubborn(&self, bytes: &[u8]) -> Result<Vec<u8>>;
    /// Writes the file into an empty object.
    ///
    /// # Errors
    /// Those of `fetch`; `OutOfRange` for more than the format holds; the host's.
    fn write(&self, storage: &dyn Storage, steps: &[Step], fetch: &mut Fetch<'_>) -> Result<()>;
}

/// How files of a format are made of two disks.
pub struct DeltaMaker {
    /// What `-o` takes.
    pub options: &'static [OptionSpec],
    /// What the options come to.
    ///
    /// # Errors
    /// `Invalid` where they contradict each other.
    pub plan: fn(&OptionValues) -> Result<Box<dyn Plan>>,
}

impl fmt::Debug for DeltaMaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeltaMaker").finish_non_exhaustive()
    }
}

//! Units stored compressed: encoded by any number of threads, given space in guest order.
//!
//! Encoding needs no image state and takes nearly all of the time, so it runs in parallel.  Only
//! the sizes that come out of it decide where everything goes; handing them over in guest order
//! makes the file the same whatever the number of threads.

use std::fmt;
use std::io::Write;

use crate::error::Result;

/// How the bytes of a unit are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Encoded, in this many bytes: fewer than the unit has.
    Packed(u64),
    /// As they are.
    Plain,
}

/// One unit of allocation that is to be stored as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unit {
    /// Guest offset: a multiple of the cluster size.
    pub at: u64,
    /// How it is stored.
    pub form: Form,
}

impl Unit {
    /// Bytes that it takes, in an image with clusters of `cluster_size` bytes.
    pub fn stored_len(&self, cluster_size: u64) -> u64 {
        match self.form {
            Form::Packed(len) => len,
            Form::Plain => cluster_size,
        }
    }
}

/// What becomes of units that the image has already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// They are refused.
    Refuse,
    /// They are replaced, and their space is given back.
    Replace,
}

/// Encodes units, one at a time: the state of one thread.
pub trait Encoder: fmt::Debug + Send {
    /// Encodes `unit`, which is a whole cluster, into `out`, which is as long; how many bytes it
    /// takes there, or `None` where it would not be shorter.
    ///
    /// # Errors
    /// Those of the codec.
    fn encode(&mut self, unit: &[u8], out: &mut [u8]) -> Result<Option<usize>>;
}

/// Space that was given to units and does not show yet; dropped, it is given back.
pub trait Placed: Send {
    /// Writes the units, whose bytes as they are stored lie in `bytes` one after another.  They do
    /// not show yet.
    ///
    /// # Errors
    /// `Invalid` for too few bytes; the host's.
    fn write(&mut self, bytes: &[u8]) -> Result<()>;
    /// Shows the units, which were written.  They are on stable media before the words that show
    /// them, unless the image was opened `Unordered`; one sync does for all that were written
    /// before it.
    ///
    /// # Errors
    /// `Invalid` for a unit that the image has by now and that was not to be replaced; the host's.
    /// Some of the units may then have been stored; those that were not are as they were.
    fn show(self: Box<Self>) -> Result<()>;
    /// Writes the units and shows them.
    ///
    /// # Errors
    /// Those of both.
    fn store(mut self: Box<Self>, bytes: &[u8]) -> Result<()> {
        self.write(bytes)?;
        self.show()
    }
}

/// Storing units compressed, in images of formats that can.
pub trait Compress: Sync {
    /// The means of one thread.
    ///
    /// # Errors
    /// `NoMemory` and the like, where the codec cannot be had.
    fn encoder(&self) -> Result<Box<dyn Encoder>>;
    /// Gives host space to `units`, which ascend and do not overlap, in an order that depends on
    /// nothing but them and what was placed before.
    ///
    /// # Errors
    /// `Invalid` for a unit that the image has and that is not to be replaced; the host's,
    /// `NoSpace` among them; then nothing has changed, though tables may have been made.
    fn place<'a>(&'a self, units: &[Unit], existing: Existing) -> Result<Box<dyn Placed + 'a>>;
}

/// A new image that is written from its first byte to its last, to a target that cannot seek.
///
/// It is made in two passes over the same units: the first one only learns where everything will
/// be, and what it writes is to be thrown away.  [`Sequence::begin`] starts a pass and
/// [`Sequence::finish`] ends it.
pub trait Sequence: Send {
    /// Unit of allocation in bytes.
    fn cluster_size(&self) -> u64;
    /// Whether one pass does: nothing that is written depends on what comes after it.
    fn is_one_pass(&self) -> bool {
        false
    }
    /// The means of one thread to encode units; `None`: they are to be handed over as they are.
    ///
    /// # Errors
    /// As [`Compress::encoder`].
    fn encoder(&self) -> Result<Option<Box<dyn Encoder>>>;
    /// Starts a pass: writes what comes before the first unit.
    ///
    /// # Errors
    /// Those of `out`.
    fn begin(&mut self, out: &mut dyn Write) -> Result<()>;
    /// Writes units that follow those added before; their bytes as they are stored lie in `bytes`
    /// one after another.
    ///
    /// # Errors
    /// Those of `out`; `NoSpace` past what the format can hold.
    fn add(&mut self, units: &[Unit], bytes: &[u8], out: &mut dyn Write) -> Result<()>;
    /// Ends a pass: writes what comes after the last unit.
    ///
    /// # Errors
    /// Those of `out`; `Corrupt` where the second pass did not get what the first one got, so that
    /// what was written is no image.
    fn finish(&mut self, out: &mut dyn Write) -> Result<()>;
}

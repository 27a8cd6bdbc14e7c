//! Disks of sectors that are stored with more than their data: reading and writing them by part.
//!
//! A sector of an optical disc is stored with what the drive needs: a pattern to find it, its
//! address, codes to detect and to correct errors.  Who repairs, verifies or copies a disc wants
//! some of these parts and not others, of some sectors and not others.  A request says so as a list
//! of segments ([`Segments`]), shared and never changed; [`Pieces`] walks it and yields the runs of
//! bytes that it means.  A driver has one thing to do: fetch a sector whole and say where its parts
//! lie ([`Sectors`]).

use std::fmt;

use crate::error::{Error, ErrorKind, Result};

mod access;
mod parts;
mod pieces;
mod segments;

pub use access::{read, write};
pub use parts::Parts;
pub use pieces::{Piece, Pieces};
pub use segments::{Segment, Segments, Unit};

/// Most parts that one sector has.
const MAX_PARTS: usize = 8;

/// Where in a whole sector a part lies, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Span {
    /// Which part: one, never several.
    pub part: Parts,
    /// Its first byte.
    pub start: usize,
    /// The first byte after it.
    pub end: usize,
}

/// The parts of one sector that are stored, in order; they do not overlap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Layout {
    spans: [Span; MAX_PARTS],
    count: usize,
}

impl Layout {
    /// These parts, as far as they lie in `stored` bytes of the whole sector.
    pub fn new(
        parts: impl IntoIterator<Item = (Parts, std::ops::Range<usize>)>,
        stored: &std::ops::Range<usize>,
    ) -> Self {
        let mut layout = Self::default();
        for (part, range) in parts {
            let (start, end) = (range.start.max(stored.start), range.end.min(stored.end));
            if start < end && layout.count < MAX_PARTS {
                layout.spans[layout.count] = Span { part, start, end };
                layout.count += 1;
            }
        }
        layout
    }

    /// The parts, in order.
    pub fn spans(&self) -> &[Span] {
        &self.spans[..self.count]
    }

    /// All of them as one set.
    pub fn parts(&self) -> Parts {
        let parts = self.spans().iter().map(|span| span.part);
        parts.fold(Parts::NONE, Parts::union)
    }
}

/// A disk of sectors with parts.
///
/// All methods may be called from any number of threads.
pub trait Sectors: fmt::Debug + Send + Sync {
    /// Sectors of the disc: addresses (LBA) are below it.
    fn end(&self) -> u64;
    /// Bytes of a whole sector, the longest that there is; addresses in bytes count sectors of this
    /// length.
    fn whole_len(&self) -> usize;
    /// Fills `buf`, of [`Sectors::whole_len`] bytes, with the sector as a whole, and says which of
    /// its parts are stored; bytes of what is not stored are 0.  Codes are neither verified nor
    /// used.
    ///
    /// # Errors
    /// `OutOfRange` past the end of the disc; `NotFound` for a sector that is not stored at all;
    /// the host's.
    fn fetch(&self, lba: u64, buf: &mut [u8]) -> Result<Layout>;
    /// Stores what `change` makes of the whole sector, of which it changes `parts` alone.  Codes
    /// that depend on what it changed and are not among `parts` are made anew.
    ///
    /// # Errors
    /// `Corrupt` where a part of the data is changed and the codes say that the rest of it is
    /// wrong: new codes would hide that; those of `change`, of [`Sectors::fetch`], and the host's.
    fn change(
        &self,
        lba: u64,
        parts: Parts,
        change: &mut dyn FnMut(&mut [u8], &Layout) -> Result<Whole>,
    ) -> Result<()>;
}

/// How much of the data of a sector a change replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whole {
    /// All of it, or none.
    Yes,
    /// A part of it, so that the rest must be known to be right.
    No,
}

/// The error for a sector past the end.
pub fn past_the_end(lba: u64, end: u64) -> Error {
    let text = format!("sector {lba} is past the end of the disc at {end}");
    Error::new(ErrorKind::OutOfRange, text)
}

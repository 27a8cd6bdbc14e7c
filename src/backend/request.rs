//! What a backend is asked to do.

use std::ops::Range;

use crate::storage::Zeroing;
use crate::util::align::len64;
use crate::util::range;

/// What is counted and limited apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Zeroing.
    Zero,
    /// Discards.
    Discard,
    /// Flushes.
    Flush,
}

impl Kind {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 5] = [
        Self::Read,
        Self::Write,
        Self::Zero,
        Self::Discard,
        Self::Flush,
    ];

    /// Whether it changes the disk.
    pub fn changes(self) -> bool {
        matches!(self, Self::Write | Self::Zero | Self::Discard)
    }

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Zero => "zero",
            Self::Discard => "discard",
            Self::Flush => "flush",
        }
    }
}

/// One request; buffers belong to the caller.
#[derive(Debug)]
pub enum Request<'a> {
    /// Fill the buffer from `at`.
    Read {
        /// Guest offset in bytes.
        at: u64,
        /// What to fill.
        buf: &'a mut [u8],
    },
    /// Write the buffer at `at`.
    Write {
        /// Guest offset in bytes.
        at: u64,
        /// What to write.
        buf: &'a [u8],
        /// Durable before it completes.
        fua: bool,
    },
    /// Write one byte all over a range.
    Fill {
        /// Guest range in bytes.
        range: Range<u64>,
        /// What to write.
        byte: u8,
        /// Durable before it completes.
        fua: bool,
    },
    /// Write the buffer at `at` and store it compressed; as
    /// [`Chain::write_compressed`](crate::chain::Chain::write_compressed) allows it.
    Compress {
        /// Guest offset in bytes.
        at: u64,
        /// What to write.
        buf: &'a [u8],
    },
    /// Make a range read as zeroes.
    Zero {
        /// Guest range in bytes.
        range: Range<u64>,
        /// What may become of the space.
        how: Zeroing,
        /// What to do where that needs data to be written.
        fallback: Fallback,
        /// Durable before it completes.
        fua: bool,
    },
    /// Give a range's space back.
    Discard {
        /// Guest range in bytes.
        range: Range<u64>,
    },
    /// Make completed writes durable.
    Flush,
}

/// What to do where a range cannot be zeroed by metadata or holes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fallback {
    /// Write zeroes.
    Write,
    /// Fail with `Unsupported`, with nothing changed.
    Refuse,
}

/// A request without its bytes: what has to be known to admit it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    /// What it does.
    pub kind: Kind,
    /// Guest range in bytes; empty for a flush.  One past the end of numbers ends there, and is
    /// refused as out of bounds.
    pub range: Range<u64>,
    /// Whether it is durable before it completes.
    pub fua: bool,
}

impl Shape {
    /// Bytes that it covers.
    pub fn len(&self) -> u64 {
        range::len(&self.range)
    }

    /// Whether it covers no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Request<'_> {
    /// The request without its bytes.
    pub fn shape(&self) -> Shape {
        let span = |at: u64, len: usize| at..at.saturating_add(len64(len));
        let (kind, range, fua) = match self {
            Self::Read { at, buf } => (Kind::Read, span(*at, buf.len()), false),
            Self::Write { at, buf, fua } => (Kind::Write, span(*at, buf.len()), *fua),
            Self::Fill { range, fua, .. } => (Kind::Write, range.clone(), *fua),
            Self::Compress { at, buf } => (Kind::Write, span(*at, buf.len()), false),
            Self::Zero { range, fua, .. } => (Kind::Zero, range.clone(), *fua),
            Self::Discard { range } => (Kind::Discard, range.clone(), false),
            Self::Flush => (Kind::Flush, 0..0, false),
        };
        Shape { kind, range, fua }
    }
}

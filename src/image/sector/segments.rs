//! Which sectors, or bytes of sectors, are meant, and which parts of them.

use std::sync::Arc;

use super::Parts;
use crate::error::{Error, ErrorKind, Result};

/// What the addresses of a list of segments count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Sectors.
    Blocks,
    /// Bytes of whole sectors, each of [`super::Sectors::whole_len`] bytes, from the first sector
    /// of the disc on, whatever is stored of them.
    Bytes,
}

/// A run of sectors or bytes, and what is meant of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// The first.
    pub start: u64,
    /// How many; 0 is an empty segment.
    pub len: u64,
    /// Which parts; those that a sector does not have are left out.
    pub parts: Parts,
}

/// A list of segments in the order in which they are dealt with; they may overlap.
///
/// A clone is the same list: it is shared, and never changes.
#[derive(Debug, Clone)]
pub struct Segments {
    unit: Unit,
    list: Arc<[Segment]>,
}

impl Segments {
    /// Most segments of one list.
    pub const MAX: usize = 1 << 16;

    /// A list of segments whose addresses count `unit`.
    ///
    /// # Errors
    /// `OutOfRange` for more than [`Segments::MAX`], and for one that ends past 2^63; `Invalid` for
    /// one that means no part.
    pub fn new(unit: Unit, list: impl Into<Arc<[Segment]>>) -> Result<Self> {
        let list = list.into();
        if list.len() > Self::MAX {
            let text = format!("{} segments (allowed: {})", list.len(), Self::MAX);
            return Err(Error::new(ErrorKind::OutOfRange, text));
        }
        for Segment { start, len, parts } in list.iter() {
            if parts.is_empty() {
                return Err(Error::invalid("a segment without any part"));
            }
            let end = start.checked_add(*len);
            if end.is_none_or(|end| i64::try_from(end).is_err()) {
                let text = format!("{len} from {start} on end past 2^63 - 1");
                return Err(Error::new(ErrorKind::OutOfRange, text));
            }
        }
        Ok(Self { unit, list })
    }

    /// What the addresses count.
    pub fn unit(&self) -> Unit {
        self.unit
    }

    /// How many segments there are.
    pub fn count(&self) -> usize {
        self.list.len()
    }

    /// The segment at `index`.
    pub fn get(&self, index: usize) -> Option<Segment> {
        self.list.get(index).copied()
    }
}

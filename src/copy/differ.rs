//! What a target needs that reads as something known: only what that does not give already.

use std::ops::Range;

use crate::chain::Chain;
use crate::copy::find::{Found, Place, find, same_object};
use crate::copy::joined::Joined;
use crate::copy::salvage::Reader;
use crate::copy::scan::{Content, IO_STEP, Piece, Scratch, push};
use crate::error::Result;
use crate::util::align::{clamp_len, len64};
use crate::util::buf::is_zero;
use crate::util::grace::Ticket;

/// What a target reads as before it is written to.
#[derive(Debug, Clone, Copy)]
pub(super) enum Known<'a> {
    /// Its backing image.
    Backing(&'a Joined),
    /// The target as it is.
    Itself(&'a Chain),
}

impl<'a> Known<'a> {
    fn find(self, at: u64, len: u64) -> Result<Found<'a>> {
        match self {
            Self::Backing(backing) => backing.find(at, len),
            Self::Itself(target) => find(target, at, len),
        }
    }

    fn read_at(self, buf: &mut [u8], at: u64) -> Result<()> {
        match self {
            Self::Backing(backing) => backing.read_at(buf, at),
            Self::Itself(target) => target.read_at(buf, at),
        }
    }

    /// Keeps what `find` found valid.
    fn enter(self) -> Option<Ticket> {
        match self {
            // Nobody writes to it, and it is asked for as the sources are.
            Self::Backing(_) => None,
            Self::Itself(target) => Some(target.enter()),
        }
    }
}

/// Compares the sources with what the target reads as.
pub(super) struct Differ<'a> {
    reader: Reader<'a>,
    known: Known<'a>,
    /// What is compared as a whole, in bytes.
    unit: usize,
    /// The layers of the source from the second on are those of the backing image.
    same_below: bool,
}

impl<'a> Differ<'a> {
    /// Compares in units of `unit` bytes, which is not 0.
    pub(super) fn new(reader: Reader<'a>, known: Known<'a>, unit: u64) -> Self {
        Self {
            same_below: match known {
                Known::Backing(backing) => same_below(reader.sources, backing),
                Known::Itself(_) => false,
            },
            reader,
            known,
            unit: clamp_len(unit, IO_STEP / 2),
        }
    }

    /// Adds the pieces of an extent of the sources.
    pub(super) fn scan(
        &self,
        at: u64,
        found: &Found<'a>,
        pieces: &mut Vec<Piece<'a>>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        if self.same_below && found.depth > 0 && found.part == 0 {
            return Ok(());
        }
        let end = at + found.len;
        let mut at = at;
        let _ticket = self.known.enter();
        while at < end {
            let below = self.known.find(at, end - at)?;
            let range = at..at + below.len;
            at = range.end;
            if found.is_zero() && below.is_zero() {
                continue;
            }
            if same_place(found, &below, range.start - (end - found.len)) {
                continue;
            }
            self.compare(range, pieces, scratch)?;
        }
        Ok(())
    }

    fn compare(
        &self,
        range: Range<u64>,
        pieces: &mut Vec<Piece<'a>>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let (ours, theirs) = scratch.io().split_at_mut(IO_STEP / 2);
            let len = clamp_len(range.end - at, ours.len());
            let (ours, theirs) = (&mut ours[..len], &mut theirs[..len]);
            self.reader.read_at(ours, at)?;
            self.known.read_at(theirs, at)?;
            for (a, b) in ours.chunks(self.unit).zip(theirs.chunks(self.unit)) {
                let end = at + len64(a.len());
                if a != b {
                    let content = if is_zero(a) {
                        Content::Zeroes
                    } else {
                        Content::Read
                    };
                    push(pieces, 0, at..end, content);
                }
                at = end;
            }
        }
        Ok(())
    }
}

/// Whether both are the same bytes of the same object; `offset` is how far into `ours` `theirs`
/// begins.
fn same_place(ours: &Found<'_>, theirs: &Found<'_>, offset: u64) -> bool {
    match (ours.place, theirs.place) {
        (
            Place::Stored { storage, host },
            Place::Stored {
                storage: other,
                host: there,
            },
        ) => host.checked_add(offset) == Some(there) && same_object(storage, other),
        _ => false,
    }
}

/// Whether the layer below the source's top is the backing image itself.
fn same_below(sources: &Joined, backing: &Joined) -> bool {
    let (mut ours, mut theirs) = (sources.chains(), backing.chains());
    let (Some(source), None) = (ours.next(), ours.next()) else {
        return false;
    };
    let (Some(below), Some(backing)) = (source.layers().get(1), theirs.next()) else {
        return false;
    };
    let top = backing.top();
    // Of a part of a disk the offsets are others; so they may be where the top layer is made of bytes
    // elsewhere in the one below, which only such do that are merged into it in place.
    sources.len() == source.virtual_size()
        && source.top().as_merge().is_none()
        && same_object(below.storage(), top.storage())
        && below.driver() == top.driver()
        && below.virtual_size() == top.virtual_size()
}

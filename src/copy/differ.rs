//! What a target with a backing image needs: only what that image does not give already.

use std::ops::Range;

use crate::copy::find::{Found, Place, same_object};
use crate::copy::joined::Joined;
use crate::copy::salvage::Reader;
use crate::copy::scan::{Content, IO_STEP, Piece, Scratch, push};
use crate::error::Result;
use crate::util::align::{clamp_len, len64};
use crate::util::buf::is_zero;

/// Compares the sources with the backing image of the target.
pub(super) struct Differ<'a> {
    reader: Reader<'a>,
    backing: &'a Joined,
    /// What is compared as a whole, in bytes.
    unit: usize,
    /// The layers of the source from the second on are those of the backing image.
    same_below: bool,
}

impl<'a> Differ<'a> {
    /// Compares in units of `unit` bytes, which is not 0.
    pub(super) fn new(reader: Reader<'a>, backing: &'a Joined, unit: u64) -> Self {
        Self {
            same_below: same_below(reader.sources, backing),
            reader,
            backing,
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
        while at < end {
            let below = self.backing.find(at, end - at)?;
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
            self.backing.read_at(theirs, at)?;
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
    same_object(below.storage(), top.storage())
        && below.driver().name == top.driver().name
        && below.virtual_size() == top.virtual_size()
}

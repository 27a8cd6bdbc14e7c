//! All entries of the table: what of the file they name, and what is wrong with them.

use std::ops::Range;

use crate::error::Result;
use crate::formats::vhdx::bat::{Block, Shape, Use, anchor, odd_bits};
use crate::formats::vhdx::bytes::MB;
use crate::formats::vhdx::image::Vhdx;
use crate::formats::vhdx::units::{MIBS, mibs};
use crate::image::units::{Fault, Slots};
use crate::storage::Storage;
use crate::util::range::intersect;

/// What may be wrong with an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Problem {
    /// The space that it names cannot be.
    Space(Fault),
    /// The space that it names is that of the headers, the log or a region.
    Metadata,
    /// It has no data, and the space that is kept for it is not its own or not in the file.
    Anchor,
    /// The format keeps its state for later, or only blocks have it.
    State,
    /// Its block is partially present, and there is no parent.
    NoParent,
    /// Its block is partially present, and there is no sector bitmap.
    NoBitmap,
    /// Bits of it are set that mean nothing.
    Bits,
}

/// An entry that is wrong.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wrong {
    /// Which entry of the table.
    pub(super) index: u64,
    pub(super) of: Use,
    pub(super) word: u64,
    pub(super) problem: Problem,
}

impl Wrong {
    /// What is wrong.
    pub(super) fn text(&self) -> String {
        let of = match self.of {
            Use::Block(block) => format!("block {block}"),
            Use::Bitmap(chunk) => format!("sector bitmap {chunk}"),
        };
        let what = match self.problem {
            Problem::Space(Fault::Lost) => "its space begins behind the end of the file",
            Problem::Space(Fault::Cut) => "its space is cut off by the end of the file",
            Problem::Space(Fault::Shared) => "its space overlaps that of something else",
            Problem::Metadata => "its space is that of other metadata",
            Problem::Anchor => "the space kept for it is not its own, or not inside the file",
            Problem::State => "it has a state that it cannot have",
            Problem::NoParent => "it is partially present in a disk without a parent",
            Problem::NoBitmap => "it is partially present and has no sector bitmap",
            Problem::Bits => "it has bits that mean nothing",
        };
        format!("{of}: its BAT entry is {:#x}: {what}", self.word)
    }
}

/// The MiB of the file that are in use; `wrong` is told of entries that are.
///
/// # Errors
/// `NoSpace` for more than is kept track of; those of `wrong`; the host's.
pub(super) fn scan(
    image: &Vhdx,
    shape: &Shape,
    mut wrong: impl FnMut(Wrong) -> Result<()>,
) -> Result<Slots> {
    let size = image.journal.size();
    let mut slots = Slots::default();
    let fixed = [
        0..MB,
        image.journal.header_log().clone(),
        shape.regions.bat.clone(),
        shape.regions.metadata.clone(),
    ];
    // Who overlaps an optional region has data of its own, as one that overlaps another block.
    for host in fixed.iter().chain(shape.regions.optional()) {
        // Optional regions may lie anywhere; see `Regions::beyond`.
        if let Some(host) = intersect(host, &(0..size)) {
            slots.name_run(MIBS, mibs(&host), size)?;
        }
    }
    shape.table.each_stored(&*image.journal, |index, word| {
        let of = shape.grid.of(index);
        let mut found = |problem| {
            wrong(Wrong {
                index,
                of,
                word,
                problem,
            })
        };
        // In a differencing disk the last chunk has entries for all blocks that it could have.
        let is_behind = matches!(of, Use::Block(block) if block >= shape.blocks());
        if word == 0 || is_behind {
            return Ok(());
        }
        let block = Block::from_word(word);
        let len = match of {
            Use::Bitmap(_) => MB,
            Use::Block(_) => image.block,
        };
        let host = block.host().or(anchor(word));
        let host = host.map(|host| host..host.saturating_add(len));
        let meets = |host: &Range<u64>| fixed.iter().any(|o| intersect(o, host).is_some());
        let is_metadata = host.as_ref().is_some_and(meets);
        // Whatever else is wrong with the entry, nobody else takes its space.
        let fault = match &host {
            Some(host) if !is_metadata => slots.name_run(MIBS, mibs(host), size)?,
            _ => None,
        };
        match (of, block) {
            (_, Block::Unknown(_)) | (Use::Bitmap(_), Block::Partial(_) | Block::Zero) => {
                return found(Problem::State);
            }
            (Use::Bitmap(_), Block::Present(_)) if image.locator.is_none() => {
                return found(Problem::State);
            }
            (Use::Block(_), Block::Partial(_)) if image.locator.is_none() => {
                return found(Problem::NoParent);
            }
            (Use::Block(number), Block::Partial(_)) => {
                let bitmap = shape.bitmap(&*image.journal, number, crate::image::Wait::Yes);
                if bitmap.is_err() {
                    return found(Problem::NoBitmap);
                }
            }
            _ => {}
        }
        match (block, is_metadata, fault) {
            (Block::Zero, true, _) | (Block::Zero, _, Some(_)) => return found(Problem::Anchor),
            (_, true, _) => return found(Problem::Metadata),
            (_, _, Some(fault)) => return found(Problem::Space(fault)),
            (_, false, None) => {}
        }
        match odd_bits(word) {
            0 => Ok(()),
            _ => found(Problem::Bits),
        }
    })?;
    Ok(slots)
}

//! The scratch area: what a merge was about to write into the base when it was stopped.

use std::collections::BTreeMap;

use super::header::{BLOCK, Header};
use super::table::Table;
use crate::error::{Error, Result};
use crate::storage::Storage;
use crate::util::align::len64;

/// The state of a scratch area that is in use and says nothing yet.
pub(super) const FILLING: u8 = 1;
/// The state of one whose blocks are what the base is to become.
pub(super) const READY: u8 = 2;
/// Bytes of an entry: a block and where its bytes are in the file.
pub(super) const ENTRY: u64 = 16;

/// Bytes of the state and the entries, before the data.
pub(super) fn table_len(header: &Header) -> u64 {
    header.scratch / BLOCK * ENTRY
}

/// The most blocks that a window has.
pub(super) fn most(header: &Header) -> u64 {
    let table = table_len(header);
    let blocks = header.scratch.saturating_sub(table) / BLOCK;
    // One byte of state, and an entry of zeroes at the end.
    blocks.min((table / ENTRY).saturating_sub(2))
}

/// Whether the state of the scratch area is that of one whose blocks are ready.
///
/// # Errors
/// The host's.
pub(super) fn is_ready(storage: &dyn Storage, header: &Header) -> Result<bool> {
    let mut state = [0];
    storage.read_at(&mut state, header.scratch_at())?;
    Ok(header.scratch > 0 && state[0] == READY)
}

/// Blocks whose bytes are in the scratch area, and where: none unless its state says so.
///
/// # Errors
/// `Corrupt` for an unknown state, for blocks that no operation makes, and for bytes outside the
/// scratch area; the host's.
pub(super) fn read(
    storage: &dyn Storage,
    header: &Header,
    table: &Table,
) -> Result<BTreeMap<u64, u64>> {
    let mut blocks = BTreeMap::new();
    let start = header.scratch_at();
    if header.scratch == 0 {
        return Ok(blocks);
    }
    let mut state = [0];
    storage.read_at(&mut state, start)?;
    match state[0] {
        0 | FILLING => return Ok(blocks),
        READY => {}
        other => {
            return Err(Error::corrupt(format!(
                "the state of the scratch area is {other} (allowed: 0 idle, 1 filling, 2 ready)"
            )));
        }
    }
    let data = start + table_len(header)..start + header.scratch;
    let mut bytes = vec![0; usize::try_from(table_len(header)).unwrap_or(0)];
    storage.read_at(&mut bytes, start)?;
    for (index, entry) in bytes
        .get(1..)
        .unwrap_or_default()
        .chunks_exact(16)
        .enumerate()
    {
        let word = |at: usize| {
            let part = entry.get(at..).and_then(|b| b.first_chunk().copied());
            part.map_or(0, u64::from_le_bytes)
        };
        let (block, at) = (word(0), word(8));
        if (block, at) == (0, 0) {
            break;
        }
        let wrong = |why: &str| {
            Err(Error::corrupt(format!(
                "entry {index} of the scratch area, block {block} at {at:#x}: {why}"
            )))
        };
        let inside = at >= data.start && at.checked_add(BLOCK).is_some_and(|end| end <= data.end);
        if !inside {
            return wrong("its bytes are not in the scratch area");
        }
        let Ok(found) = table.find(block) else {
            return wrong("no operation makes that block");
        };
        if !table.entries[found].kind().is_ordered() {
            return wrong("its operation is neither copy nor xor");
        }
        if blocks.insert(block, at).is_some() {
            return wrong("one before it is of the same block");
        }
    }
    debug_assert!(len64(blocks.len()) <= header.scratch / BLOCK);
    Ok(blocks)
}

//! The head of our own logs: one sector, little-endian, with a checksum; the bitmap comes behind it.
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | magic |
//! | 8 | 4 | version |
//! | 12 | 4 | 0 closed, 1 in use |
//! | 16 | 8 | bytes of the disk |
//! | 24 | 8 | bytes of a region |
//! | 32 | 16 | the disk's identity, or zeroes |
//! | 48 | 8 | offset of the bitmap |
//! | 508 | 4 | CRC-32 of the bytes before |

use uuid::Uuid;

use crate::dirty::layout::{Head, Kind, Usage};
use crate::dirty::regions::{Geometry, MAX_GRANULARITY, MIN_GRANULARITY};
use crate::error::{Error, Result};

pub(super) const MAGIC: &[u8; 8] = b"vdtdirty";
const VERSION: u32 = 1;
/// Bytes of the head.
pub(super) const LEN: usize = 512;
/// Where the bitmap is put.
pub(super) const BITMAP: u64 = 4096;
const SUM: usize = 508;

/// Reads a head.
///
/// # Errors
/// `Corrupt` and `Unsupported`, naming the field.
pub(super) fn parse(bytes: &[u8; LEN]) -> Result<Head> {
    let word = |at: usize| {
        bytes[at..]
            .first_chunk()
            .copied()
            .map_or(0, u32::from_le_bytes)
    };
    let quad = |at: usize| {
        bytes[at..]
            .first_chunk()
            .copied()
            .map_or(0, u64::from_le_bytes)
    };
    let sum = crc32fast::hash(&bytes[..SUM]);
    if word(SUM) != sum {
        return Err(Error::corrupt(format!(
            "the checksum of the head is {:#x} (allowed: {sum:#x})",
            word(SUM)
        )));
    }
    if word(8) != VERSION {
        return Err(Error::unsupported(format!(
            "the log has version {} (allowed: {VERSION})",
            word(8)
        )));
    }
    let usage = match word(12) {
        0 => Usage::Closed,
        1 => Usage::Open,
        other => {
            let text = format!("the log's state is {other} (allowed: 0, 1)");
            return Err(Error::corrupt(text));
        }
    };
    check_granularity(quad(24))?;
    if quad(48) < len_of_head() || !quad(48).is_multiple_of(512) || quad(48) > MAX_GRANULARITY {
        return Err(Error::corrupt(format!(
            "the bitmap is at {:#x} (allowed: a multiple of 512 from {:#x} to {MAX_GRANULARITY:#x})",
            quad(48),
            len_of_head()
        )));
    }
    let disk = Uuid::from_bytes(bytes[32..].first_chunk().copied().unwrap_or_default());
    Ok(Head {
        kind: Kind::Own,
        geometry: Geometry::new(quad(16), quad(24)).map_err(|e| Error::corrupt(e.message()))?,
        bitmap: quad(48),
        inverted: false,
        usage,
        disk: (!disk.is_nil()).then_some(disk),
        links: None,
    })
}

fn len_of_head() -> u64 {
    crate::util::align::len64(LEN)
}

/// Refuses regions that are too small or too large.
///
/// # Errors
/// `Invalid`.
pub(super) fn check_granularity(granularity: u64) -> Result<()> {
    let is_right =
        granularity.is_power_of_two() && (MIN_GRANULARITY..=MAX_GRANULARITY).contains(&granularity);
    match is_right {
        true => Ok(()),
        false => Err(Error::invalid(format!(
            "a granularity of {granularity} bytes (allowed: powers of two from {MIN_GRANULARITY} to {MAX_GRANULARITY})"
        ))),
    }
}

/// The bytes of a head.
pub(super) fn to_bytes(head: &Head) -> [u8; LEN] {
    let mut bytes = [0; LEN];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    let state = u32::from(head.usage != Usage::Closed);
    bytes[12..16].copy_from_slice(&state.to_le_bytes());
    bytes[16..24].copy_from_slice(&head.geometry.size().to_le_bytes());
    bytes[24..32].copy_from_slice(&head.geometry.granularity().to_le_bytes());
    bytes[32..48].copy_from_slice(head.disk.unwrap_or_default().as_bytes());
    bytes[48..56].copy_from_slice(&head.bitmap.to_le_bytes());
    let sum = crc32fast::hash(&bytes[..SUM]);
    bytes[SUM..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

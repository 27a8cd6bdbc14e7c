//! Logs of XenServer's changed block tracking: 48 bytes as its machines have them, little-endian, then
//! a bit for each 64 KiB.  Nothing in it says what it is, so that all of it must fit.

use uuid::Uuid;

use crate::dirty::layout::{Head, Kind, Usage};
use crate::dirty::regions::Geometry;
use crate::error::{Error, Result};

/// Bytes of the head.
pub(super) const LEN: usize = 48;
/// Bytes of a region.
pub(super) const GRANULARITY: u64 = 64 << 10;

/// Reads a head of a file of `len` bytes.
///
/// # Errors
/// `WrongFormat` and `Corrupt`, naming the field.
pub(super) fn parse(bytes: &[u8], len: u64) -> Result<Head> {
    let consistent = bytes[32..]
        .first_chunk()
        .copied()
        .map_or(0, u32::from_le_bytes);
    let size = bytes[40..]
        .first_chunk()
        .copied()
        .map_or(0, u64::from_le_bytes);
    let usage = match consistent {
        1 => Usage::Closed,
        0 => Usage::Lost,
        other => {
            let text = format!("the flag of consistency is {other} (allowed: 0, 1)");
            return Err(Error::corrupt(text));
        }
    };
    let geometry = Geometry::new(size, GRANULARITY).map_err(|e| Error::corrupt(e.message()))?;
    let needed = 48 + geometry.regions().div_ceil(8);
    if len < needed {
        return Err(Error::corrupt(format!(
            "the file has {len} bytes (allowed: {needed} at least, for a disk of {size} bytes)"
        )));
    }
    let uuid = |at: usize| Uuid::from_bytes(bytes[at..].first_chunk().copied().unwrap_or_default());
    Ok(Head {
        kind: Kind::Cbt,
        geometry,
        bitmap: 48,
        inverted: false,
        usage,
        disk: None,
        links: Some([uuid(0), uuid(16)]),
    })
}

/// Whether a file of `len` bytes can be nothing else: its length fits the disk to the word.
pub(super) fn looks_like(bytes: &[u8], len: u64) -> bool {
    parse(bytes, len).is_ok_and(|head| {
        let words = head.geometry.regions().div_ceil(64);
        head.geometry.size() > 0 && bytes[36..40] == [0; 4] && len - 48 <= words * 8
    })
}

/// The bytes of a head.
pub(super) fn to_bytes(head: &Head) -> [u8; LEN] {
    let mut bytes = [0; LEN];
    let [parent, child] = head.links.unwrap_or_default();
    bytes[..16].copy_from_slice(parent.as_bytes());
    bytes[16..32].copy_from_slice(child.as_bytes());
    let consistent = u32::from(head.usage == Usage::Closed);
    bytes[32..36].copy_from_slice(&consistent.to_le_bytes());
    bytes[40..].copy_from_slice(&head.geometry.size().to_le_bytes());
    bytes
}

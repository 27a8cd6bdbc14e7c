//! The log of device-mapper's mirrors on a disk, and of cmirrord: sixteen bytes, little-endian, and
//! behind two sectors the bitmap, in which a set bit is a clean region.  How large regions are is in the
//! mirror's table and not in the log.

use crate::dirty::layout::{Head, Kind, Usage};
use crate::dirty::regions::{Geometry, MAX_REGIONS};
use crate::error::{Error, Result};

/// `MiRr` as a number of this order of bytes.
pub(super) const MAGIC: u32 = 0x4d69_5272;
const VERSION: u32 = 2;
/// Bytes of the head.
pub(super) const LEN: usize = 16;
/// Where the bitmap is.
pub(super) const BITMAP: u64 = 1024;

/// Regions whose size nobody told are taken for so large.
const UNKNOWN: u64 = 512 << 10;

/// Reads a head; `granularity` and `size` are what the user knows.
///
/// # Errors
/// `Unsupported` for another version; `Corrupt` for more regions than there may be; `Invalid` where what
/// the user knows cannot be.
pub(super) fn parse(bytes: &[u8], granularity: Option<u64>, size: Option<u64>) -> Result<Head> {
    let word = |at: usize| {
        bytes[at..]
            .first_chunk()
            .copied()
            .map_or(0, u32::from_le_bytes)
    };
    let regions = bytes[8..]
        .first_chunk()
        .copied()
        .map_or(0, u64::from_le_bytes);
    if !(1..=VERSION).contains(&word(4)) {
        return Err(Error::unsupported(format!(
            "the log has version {} (allowed: 1, 2)",
            word(4)
        )));
    }
    if regions > MAX_REGIONS {
        return Err(Error::corrupt(format!(
            "the log has {regions} regions (allowed: {MAX_REGIONS})"
        )));
    }
    let granularity = match (granularity, size) {
        (Some(granularity), _) => granularity,
        (None, Some(size)) => fitting(regions, size)?,
        (None, None) => UNKNOWN,
    };
    let all = regions.checked_mul(granularity);
    let all = all.ok_or_else(|| {
        Error::invalid(format!(
            "{regions} regions of {granularity} bytes are no disk"
        ))
    })?;
    let size = size.unwrap_or(all);
    let geometry = Geometry::new(size, granularity)?;
    if geometry.regions() != regions {
        return Err(Error::invalid(format!(
            "a disk of {size} bytes has {} regions of {granularity} (allowed: {regions}, as the log has)",
            geometry.regions()
        )));
    }
    Ok(Head {
        kind: Kind::Mirror,
        geometry,
        bitmap: BITMAP,
        inverted: true,
        usage: Usage::Closed,
        disk: None,
        links: None,
    })
}

/// How large the regions are of which a disk of `size` bytes has so many.
fn fitting(regions: u64, size: u64) -> Result<u64> {
    let all = (9..63).map(|shift| 1_u64 << shift);
    let mut fitting = all.filter(|granularity| size.div_ceil(*granularity) == regions);
    fitting.next().ok_or_else(|| {
        Error::invalid(format!(
            "a disk of {size} bytes cannot have {regions} regions, as the log has"
        ))
    })
}

/// The bytes of a head.
pub(super) fn to_bytes(head: &Head) -> [u8; LEN] {
    let mut bytes = [0; LEN];
    bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
    bytes[4..8].copy_from_slice(&VERSION.to_le_bytes());
    bytes[8..].copy_from_slice(&head.geometry.regions().to_le_bytes());
    bytes
}

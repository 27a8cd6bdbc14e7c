//! What the block device tells its users about itself.

use libublk::sys;

use super::request::SECTOR;
use crate::backend::Geometry;
use crate::error::{Error, Result};

/// Largest discard, and largest zeroing that writes nothing, in bytes.
const MAX_RANGE: u64 = 1 << 30;
/// Largest zeroing that may write: long enough to be worth it, short enough not to hang.
const MAX_WRITTEN: u64 = 32 << 20;
/// The driver takes logical blocks up to a page.
const MAX_LOGICAL: u32 = 4096;

/// The size in sectors of a device for a disk of `virtual_size` bytes.  What a sector would hold
/// only in part is left out, as with any block device.
///
/// # Errors
/// `Invalid` where the disk is not made of whole blocks larger than a sector.
pub(super) fn sectors(geometry: &Geometry) -> Result<u64> {
    let block = logical(geometry)?;
    let size = geometry.virtual_size;
    if u64::from(block) > SECTOR && !size.is_multiple_of(u64::from(block)) {
        return Err(Error::invalid(format!(
            "the disk has {size} bytes (allowed with --logical-block-size {block}: multiples of \
             {block})"
        )));
    }
    Ok(size / SECTOR)
}

fn logical(geometry: &Geometry) -> Result<u32> {
    let block = geometry.logical_block_size.max(512);
    if block > MAX_LOGICAL {
        return Err(Error::invalid(format!(
            "the logical block size is {block} (allowed by ublk: 512 to {MAX_LOGICAL})"
        )));
    }
    Ok(block)
}

/// The parameters for a disk, with requests of at most `max_io` bytes.
///
/// # Errors
/// As [`sectors`].
pub(super) fn of(geometry: &Geometry, max_io: u32) -> Result<sys::ublk_params> {
    let block = logical(geometry)?;
    let physical = geometry.physical_block_size.max(block);
    let mut attrs = 0;
    if !geometry.writable {
        attrs |= sys::UBLK_ATTR_READ_ONLY;
    }
    if geometry.volatile_cache {
        attrs |= sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA;
    }
    let basic = sys::ublk_param_basic {
        attrs,
        logical_bs_shift: shift(block),
        physical_bs_shift: shift(physical),
        io_opt_shift: shift(best(geometry, physical, max_io)),
        io_min_shift: shift(physical),
        max_sectors: max_io / 512,
        chunk_sectors: 0,
        dev_sectors: sectors(geometry)?,
        virt_boundary_mask: 0,
    };
    let mut params = sys::ublk_params {
        len: u32::try_from(size_of::<sys::ublk_params>()).unwrap_or(u32::MAX),
        types: sys::UBLK_PARAM_TYPE_BASIC,
        basic,
        ..Default::default()
    };
    if geometry.writable {
        params.types |= sys::UBLK_PARAM_TYPE_DISCARD;
        params.discard = discard(geometry, block);
    }
    Ok(params)
}

/// The size of request that costs least: a cluster, where that is a size a request can have.
fn best(geometry: &Geometry, physical: u32, max_io: u32) -> u32 {
    let cluster = geometry.zero_align.max(geometry.discard_align);
    let fits = cluster.is_power_of_two() && (physical..=max_io).contains(&cluster);
    if fits { cluster } else { physical }
}

fn discard(geometry: &Geometry, block: u32) -> sys::ublk_param_discard {
    let offered = geometry.discard_align > 0;
    let max_zero = match geometry.zero_align {
        0 => MAX_WRITTEN,
        _ => MAX_RANGE,
    };
    sys::ublk_param_discard {
        discard_alignment: 0,
        discard_granularity: geometry.discard_align.max(block),
        max_discard_sectors: if offered { in_sectors(MAX_RANGE) } else { 0 },
        max_write_zeroes_sectors: in_sectors(max_zero),
        max_discard_segments: 1,
        reserved0: 0,
    }
}

fn in_sectors(bytes: u64) -> u32 {
    u32::try_from(bytes / SECTOR).unwrap_or(u32::MAX)
}

/// The exponent of a power of two.
fn shift(size: u32) -> u8 {
    u8::try_from(size.trailing_zeros()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry() -> Geometry {
        Geometry {
            virtual_size: 10 << 20,
            writable: true,
            logical_block_size: 512,
            physical_block_size: 4096,
            max_transfer: 1 << 20,
            volatile_cache: true,
            zero_align: 65536,
            discard_align: 65536,
        }
    }

    #[test]
    fn a_qcow2_disk_offers_discard_by_clusters_flush_and_fua() {
        let params = of(&geometry(), 1 << 20).expect("fits");
        assert_eq!(params.basic.dev_sectors, 20480);
        assert_eq!(
            (
                params.basic.logical_bs_shift,
                params.basic.physical_bs_shift
            ),
            (9, 12)
        );
        assert_eq!(
            (params.basic.io_opt_shift, params.basic.max_sectors),
            (16, 2048)
        );
        let attrs = sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA;
        assert_eq!(params.basic.attrs, attrs);
        assert_eq!(params.discard.discard_granularity, 65536);
        assert_eq!(params.discard.max_discard_segments, 1);
    }

    #[test]
    fn a_read_only_disk_offers_nothing_that_changes_it() {
        let geometry = Geometry {
            writable: false,
            volatile_cache: false,
            ..geometry()
        };
        let params = of(&geometry, 1 << 20).expect("fits");
        assert_eq!(params.basic.attrs, sys::UBLK_ATTR_READ_ONLY);
        assert_eq!(params.types, sys::UBLK_PARAM_TYPE_BASIC);
    }

    #[test]
    fn a_format_that_cannot_discard_still_takes_zeroes() {
        let geometry = Geometry {
            zero_align: 0,
            discard_align: 0,
            ..geometry()
        };
        let discard = of(&geometry, 1 << 20).expect("fits").discard;
        assert_eq!(
            (discard.max_discard_sectors, discard.discard_granularity),
            (0, 512)
        );
        assert_eq!(discard.max_write_zeroes_sectors, 65536);
    }

    #[test]
    fn a_size_that_blocks_do_not_divide_is_refused_by_name() {
        let geometry = Geometry {
            virtual_size: 4096 + 512,
            logical_block_size: 4096,
            ..geometry()
        };
        let error = of(&geometry, 1 << 20).expect_err("half a block");
        assert!(error.to_string().contains("multiples of 4096"), "{error}");
        let large = Geometry {
            logical_block_size: 8192,
            physical_block_size: 8192,
            ..geometry
        };
        of(&large, 1 << 20).expect_err("larger than a page");
    }
}

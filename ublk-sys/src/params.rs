//! What a block device tells its users, as the server sets it.

use serde::{Deserialize, Serialize};

/// No writes are taken.
pub const UBLK_ATTR_READ_ONLY: u32 = 1 << 0;
/// Seeks cost time.
pub const UBLK_ATTR_ROTATIONAL: u32 = 1 << 1;
/// Completed writes may be lost until a flush.
pub const UBLK_ATTR_VOLATILE_CACHE: u32 = 1 << 2;
/// Single writes may ask to be durable.
pub const UBLK_ATTR_FUA: u32 = 1 << 3;

/// [`ublk_params::basic`] is set.
pub const UBLK_PARAM_TYPE_BASIC: u32 = 1 << 0;
/// [`ublk_params::discard`] is set.
pub const UBLK_PARAM_TYPE_DISCARD: u32 = 1 << 1;
/// [`ublk_params::devt`] is set.
pub const UBLK_PARAM_TYPE_DEVT: u32 = 1 << 2;
/// [`ublk_params::zoned`] is set.
pub const UBLK_PARAM_TYPE_ZONED: u32 = 1 << 3;
/// [`ublk_params::dma`] is set.
pub const UBLK_PARAM_TYPE_DMA_ALIGN: u32 = 1 << 4;
/// [`ublk_params::seg`] is set.
pub const UBLK_PARAM_TYPE_SEGMENT: u32 = 1 << 5;

/// Least that a segment may be limited to, in bytes.
pub const UBLK_MIN_SEGMENT_SIZE: u32 = 4096;

/// Size and block sizes.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, Serialize, Deserialize)]
pub struct ublk_param_basic {
    /// `UBLK_ATTR_*`.
    pub attrs: u32,
    /// Logical block size, as a power of two.
    pub logical_bs_shift: u8,
    /// Physical block size.
    pub physical_bs_shift: u8,
    /// Best size of a request.
    pub io_opt_shift: u8,
    /// Smallest size that costs nothing extra.
    pub io_min_shift: u8,
    /// Largest request in sectors.
    pub max_sectors: u32,
    /// Requests do not cross multiples of this many sectors; 0: they may.
    pub chunk_sectors: u32,
    /// Size of the device in sectors.
    pub dev_sectors: u64,
    /// Segments do not cross multiples of this plus one.
    pub virt_boundary_mask: u64,
}

/// Discarding and zeroing.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, Serialize, Deserialize)]
pub struct ublk_param_discard {
    /// Offset in bytes of the first granule.
    pub discard_alignment: u32,
    /// Unit of space that is given back, in bytes.
    pub discard_granularity: u32,
    /// Largest discard in sectors; 0: none.
    pub max_discard_sectors: u32,
    /// Largest zeroing in sectors; 0: none.
    pub max_write_zeroes_sectors: u32,
    /// Most ranges in a discard.
    pub max_discard_segments: u16,
    /// 0.
    pub reserved0: u16,
}

/// The device numbers, as the driver gave them; cannot be set.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, Serialize, Deserialize)]
pub struct ublk_param_devt {
    /// Of the character device.
    pub char_major: u32,
    /// Of the character device.
    pub char_minor: u32,
    /// Of the block device.
    pub disk_major: u32,
    /// Of the block device.
    pub disk_minor: u32,
}

/// Zones.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, Serialize, Deserialize)]
pub struct ublk_param_zoned {
    /// Most open zones.
    pub max_open_zones: u32,
    /// Most active zones.
    pub max_active_zones: u32,
    /// Largest append in sectors.
    pub max_zone_append_sectors: u32,
    /// 0.
    pub reserved: [u8; 20],
}

/// Alignment of memory that requests use.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, Serialize, Deserialize)]
pub struct ublk_param_dma_align {
    /// Bits that addresses and lengths must not have.
    pub alignment: u32,
    /// 0.
    pub pad: [u8; 4],
}

/// Pieces of memory that requests are made of.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, Serialize, Deserialize)]
pub struct ublk_param_segment {
    /// Segments do not cross multiples of this plus one.
    pub seg_boundary_mask: u64,
    /// Largest segment in bytes.
    pub max_segment_size: u32,
    /// Most segments of a request.
    pub max_segments: u16,
    /// 0.
    pub pad: [u8; 2],
}

/// All of it; a driver that knows fewer kinds takes the front part.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, Serialize, Deserialize)]
pub struct ublk_params {
    /// Length in bytes that is set or asked for.
    pub len: u32,
    /// `UBLK_PARAM_TYPE_*` that are set.
    pub types: u32,
    /// Size and block sizes.
    pub basic: ublk_param_basic,
    /// Discarding and zeroing.
    pub discard: ublk_param_discard,
    /// Device numbers.
    pub devt: ublk_param_devt,
    /// Zones.
    pub zoned: ublk_param_zoned,
    /// Alignment of memory.
    pub dma: ublk_param_dma_align,
    /// Pieces of memory.
    pub seg: ublk_param_segment,
}

const _: () = {
    assert!(size_of::<ublk_param_basic>() == 32);
    assert!(core::mem::offset_of!(ublk_param_basic, max_sectors) == 8);
    assert!(core::mem::offset_of!(ublk_param_basic, dev_sectors) == 16);
    assert!(size_of::<ublk_param_discard>() == 20);
    assert!(core::mem::offset_of!(ublk_param_discard, max_discard_segments) == 16);
    assert!(size_of::<ublk_param_devt>() == 16);
    assert!(size_of::<ublk_param_zoned>() == 32);
    assert!(size_of::<ublk_param_dma_align>() == 8);
    assert!(size_of::<ublk_param_segment>() == 16);
    assert!(core::mem::offset_of!(ublk_params, basic) == 8);
    assert!(core::mem::offset_of!(ublk_params, discard) == 40);
    assert!(core::mem::offset_of!(ublk_params, devt) == 60);
    assert!(core::mem::offset_of!(ublk_params, zoned) == 76);
    assert!(core::mem::offset_of!(ublk_params, dma) == 108);
    assert!(core::mem::offset_of!(ublk_params, seg) == 120);
    assert!(size_of::<ublk_params>() == 136);
};

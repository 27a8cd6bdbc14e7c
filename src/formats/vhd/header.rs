//! The dynamic header: where the table of blocks is, and what the parent is called.

use uuid::Uuid;
use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{Error, ErrorKind, Result};
use crate::formats::vhd::footer::{Strictness, checksum};
use crate::formats::vhd::locator::{self, Locator};

/// Length of the header in bytes.
pub(super) const LEN: usize = 1024;
/// The same, for offsets.
pub(super) const LEN64: u64 = 1024;
/// Locators a header has room for.
pub(super) const LOCATORS: usize = 8;
/// Smallest block we read: one sector.
pub(super) const MIN_BLOCK: u64 = 512;
/// Largest block we read; writers use 2 MiB or 512 KiB.
pub(super) const MAX_BLOCK: u64 = 256 << 20;
/// Most entries of a table: what 2040 GiB, the largest disk, has in blocks of 4 KiB.
const MAX_ENTRIES: u64 = (2040 << 30) / 4096;
/// UTF-16 units of a parent's name.
pub(super) const NAME_UNITS: usize = 256;

const COOKIE: [u8; 8] = *b"cxsparse";
const VERSION: u32 = 0x0001_0000;

/// The bytes, as the specification lays them out; big-endian.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
struct RawHeader {
    /// "cxsparse".
    cookie: [u8; 8],
    /// All ones; nothing follows.
    data_offset: U64,
    /// Offset of the table of blocks.
    table_offset: U64,
    /// Header version, major and minor: 1.0.
    version: U32,
    /// Words in the table.
    max_entries: U32,
    /// Bytes in a block, without its bitmap.
    block_size: U32,
    /// Complement of the sum of all bytes, this field as 0.
    checksum: U32,
    /// Identity of the parent; zeroes: none, or a raw file.
    parent_uuid: [u8; 16],
    /// When the parent was last changed, seconds since 2000-01-01 UTC.
    parent_timestamp: U32,
    /// Zero.
    reserved1: U32,
    /// The parent's file name, UTF-16, most significant byte first.
    parent_name: [u8; 512],
    /// Where else the parent's name is written.
    locators: [[u8; locator::ENTRY_LEN]; LOCATORS],
    /// Zero.
    reserved2: [u8; 256],
}

const _: () = {
    assert!(size_of::<RawHeader>() == LEN);
    assert!(std::mem::offset_of!(RawHeader, table_offset) == 16);
    assert!(std::mem::offset_of!(RawHeader, checksum) == 36);
    assert!(std::mem::offset_of!(RawHeader, parent_name) == 64);
    assert!(std::mem::offset_of!(RawHeader, locators) == 576);
    assert!(std::mem::offset_of!(RawHeader, reserved2) == 768);
};

const CHECKSUM_FIELD: usize = std::mem::offset_of!(RawHeader, checksum);

/// A header whose fields are within bounds; bytes that it gives no meaning are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    raw: RawHeader,
}

/// What a new header says of the parent.
#[derive(Debug, Clone)]
pub(super) struct NewParent {
    /// Its identity; nil: a raw file.
    pub(super) uuid: Uuid,
    /// When it was last changed, seconds since 2000-01-01 UTC.
    pub(super) timestamp: u32,
    /// Its file name.
    pub(super) name: String,
    /// Where its paths are written.
    pub(super) locators: Vec<Locator>,
}

impl Header {
    /// A header of a new image.
    pub(super) fn new(
        table: u64,
        entries: u32,
        block_size: u32,
        parent: Option<&NewParent>,
    ) -> Self {
        let raw = RawHeader {
            cookie: COOKIE,
            data_offset: u64::MAX.into(),
            table_offset: table.into(),
            version: VERSION.into(),
            max_entries: entries.into(),
            block_size: block_size.into(),
            checksum: 0.into(),
            parent_uuid: [0; 16],
            parent_timestamp: 0.into(),
            reserved1: 0.into(),
            parent_name: [0; 512],
            locators: [[0; locator::ENTRY_LEN]; LOCATORS],
            reserved2: [0; 256],
        };
        Self { raw }.with_parent(parent)
    }

    /// The same header with another parent, or none.
    #[must_use]
    pub(super) fn with_parent(mut self, parent: Option<&NewParent>) -> Self {
        let raw = &mut self.raw;
        raw.parent_uuid = [0; 16];
        raw.parent_timestamp = 0.into();
        raw.parent_name = [0; 512];
        raw.locators = [[0; locator::ENTRY_LEN]; LOCATORS];
        if let Some(parent) = parent {
            raw.parent_uuid = *parent.uuid.as_bytes();
            raw.parent_timestamp = parent.timestamp.into();
            let units = parent.name.encode_utf16().take(NAME_UNITS - 1);
            for (to, unit) in raw.parent_name.as_chunks_mut::<2>().0.iter_mut().zip(units) {
                *to = unit.to_be_bytes();
            }
            for (to, locator) in raw.locators.iter_mut().zip(&parent.locators) {
                *to = locator.to_bytes();
            }
        }
        self.sealed()
    }

    /// Reads a header.
    ///
    /// # Errors
    /// `Corrupt` for a wrong cookie or checksum, and for fields out of bounds; `Unsupported` for
    /// an unknown version.
    pub(super) fn parse(bytes: &[u8; LEN], strictness: Strictness) -> Result<Self> {
        let raw = RawHeader::read_from_bytes(bytes)
            .map_err(|_| Error::corrupt("the dynamic header is not 1024 bytes long"))?;
        if raw.cookie != COOKIE {
            return Err(Error::corrupt(format!(
                "the dynamic header begins with '{}' (allowed: 'cxsparse')",
                raw.cookie.escape_ascii()
            )));
        }
        let header = Self { raw };
        if strictness == Strictness::Strict && !header.checksum_is_right() {
            return Err(Error::corrupt(format!(
                "the dynamic header's checksum is {:#010x} (its bytes give {:#010x})",
                raw.checksum,
                header.right_checksum()
            )));
        }
        if raw.version.get() != VERSION {
            return Err(Error::unsupported(format!(
                "dynamic header version {:#010x} (allowed: {VERSION:#010x})",
                raw.version
            )));
        }
        check_block_size(header.block_size())?;
        if header.max_entries() > MAX_ENTRIES {
            return Err(Error::corrupt(format!(
                "the table has {} entries (allowed: {MAX_ENTRIES})",
                header.max_entries()
            )));
        }
        Ok(header)
    }

    /// The bytes to be written.
    pub(super) fn to_bytes(self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        bytes.copy_from_slice(self.raw.as_bytes());
        bytes
    }

    /// The same header with the checksum its bytes give.
    #[must_use]
    pub(super) fn sealed(mut self) -> Self {
        self.raw.checksum = self.right_checksum().into();
        self
    }

    /// The same header with another table.
    #[must_use]
    pub(super) fn with_table(mut self, table: u64, entries: u32) -> Self {
        self.raw.table_offset = table.into();
        self.raw.max_entries = entries.into();
        self.sealed()
    }

    fn right_checksum(&self) -> u32 {
        checksum(self.raw.as_bytes(), CHECKSUM_FIELD)
    }

    /// Whether the checksum fits the bytes.
    pub(super) fn checksum_is_right(&self) -> bool {
        self.raw.checksum.get() == self.right_checksum()
    }

    /// Offset of the table of blocks.
    pub(super) fn table_offset(&self) -> u64 {
        self.raw.table_offset.get()
    }

    /// Words in the table.
    pub(super) fn max_entries(&self) -> u64 {
        u64::from(self.raw.max_entries.get())
    }

    /// Bytes in a block, without its bitmap.
    pub(super) fn block_size(&self) -> u64 {
        u64::from(self.raw.block_size.get())
    }

    /// Identity of the parent; nil: none, or a raw file.
    pub(super) fn parent_uuid(&self) -> Uuid {
        Uuid::from_bytes(self.raw.parent_uuid)
    }

    /// When the parent was last changed, seconds since 2000-01-01 UTC.
    pub(super) fn parent_timestamp(&self) -> u32 {
        self.raw.parent_timestamp.get()
    }

    /// The parent's file name, up to the first zero; `None` where it is no UTF-16.
    pub(super) fn parent_name(&self) -> Option<String> {
        let (pairs, _) = self.raw.parent_name.as_chunks::<2>();
        locator::utf16(pairs.iter().map(|p| u16::from_be_bytes(*p)))
    }

    /// The locators that are in use.
    pub(super) fn locators(&self) -> Vec<Locator> {
        let parsed = self.raw.locators.iter().map(Locator::from_bytes);
        parsed.filter(|l| !l.is_unused()).collect()
    }

    /// Whether all reserved bytes are zero.
    pub(super) fn reserved_is_zero(&self) -> bool {
        self.raw.reserved1.get() == 0 && self.raw.reserved2.iter().all(|b| *b == 0)
    }
}

/// Refuses a block size that cannot be read.
///
/// # Errors
/// `Corrupt`, with what is allowed.
pub(super) fn check_block_size(size: u64) -> Result<()> {
    if size.is_power_of_two() && (MIN_BLOCK..=MAX_BLOCK).contains(&size) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Corrupt,
        format!(
            "the block size is {size} (allowed: a power of two from {MIN_BLOCK} to {MAX_BLOCK})"
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_being_written_and_read() {
        let parent = NewParent {
            uuid: Uuid::new_v4(),
            timestamp: 77,
            name: "größe.vhd".to_owned(),
            locators: Vec::new(),
        };
        let header = Header::new(1536, 9, 2 << 20, Some(&parent));
        let read = Header::parse(&header.to_bytes(), Strictness::Strict).expect("is whole");
        assert_eq!(read.parent_name().as_deref(), Some("größe.vhd"));
        assert_eq!(read.parent_uuid(), parent.uuid);
        assert_eq!((read.table_offset(), read.max_entries()), (1536, 9));
        assert!(read.locators().is_empty());
    }

    #[test]
    fn any_changed_byte_is_noticed() {
        let header = Header::new(1536, 9, 2 << 20, None);
        for at in 0..LEN {
            let mut bytes = header.to_bytes();
            bytes[at] ^= 4;
            Header::parse(&bytes, Strictness::Strict).expect_err("a byte was changed");
        }
    }

    #[test]
    fn block_sizes_that_are_no_power_of_two_or_out_of_bounds_are_refused() {
        for size in [0, 1, 128, 513, (2 << 20) + 512, 0x1234_5678, 512 << 20] {
            let header = Header::new(1536, 9, size, None);
            let error = Header::parse(&header.to_bytes(), Strictness::Lax).expect_err("too odd");
            assert!(error.to_string().contains("block size"), "{error}");
        }
    }
}

//! The header of a copy-on-write file of ESX (vmfsSparse), as section 5 of `vmdk.md` has it.

use crate::error::{Error, Result};
use crate::formats::vmdk::header::SECTOR;
use crate::formats::vmdk::tables::Geometry;
use crate::storage::{Storage, start_over};

/// Bytes of a header.
const LEN: usize = 2048;
const SECTORS: u64 = 4;
const VERSION: usize = 4;
const FLAGS: usize = 8;
const CAPACITY: usize = 12;
const GRAIN: usize = 16;
const GD: usize = 20;
const ENTRIES: usize = 24;
/// The sector from which on others take space.
pub(super) const FREE: u64 = 28;
const FREE_AT: usize = 28;
/// Entries of a table.
pub(super) const PER_TABLE: u64 = 4096;
/// Largest grain in sectors, and largest directory.
const MAX_GRAIN: u32 = 2048;
const MAX_ENTRIES: u32 = 1 << 20;

/// A header, as it is in the file.
#[derive(Debug, Clone)]
pub(super) struct Header {
    bytes: [u8; LEN],
}

impl Header {
    /// Reads the header of a file and checks it.
    ///
    /// # Errors
    /// `WrongFormat`, `Corrupt`, `Unsupported`, naming the field; the host's.
    pub(super) fn read(storage: &dyn Storage) -> Result<Self> {
        let mut bytes = [0; LEN];
        storage.read_at(&mut bytes, 0)?;
        let header = Self { bytes };
        if !header.bytes.starts_with(b"COWD") {
            let text = "has no header of a copy-on-write extent (allowed: COWD at its start)";
            return Err(Error::new(crate::error::ErrorKind::WrongFormat, text));
        }
        if header.word(VERSION) != 1 {
            let text = format!("version is {} (allowed: 1)", header.word(VERSION));
            return Err(Error::unsupported(text));
        }
        Ok(header)
    }

    fn word(&self, at: usize) -> u32 {
        let bytes = self.bytes[at..].first_chunk();
        bytes.copied().map_or(0, u32::from_le_bytes)
    }

    /// Where things are, in bytes.
    ///
    /// # Errors
    /// `Corrupt` for numbers that cannot be, and for a directory outside a file of `size` bytes.
    pub(super) fn geometry(&self, size: u64) -> Result<Geometry> {
        let (grain, gd) = (self.word(GRAIN), self.word(GD));
        if !(1..=MAX_GRAIN).contains(&grain) || !grain.is_power_of_two() {
            return Err(Error::corrupt(format!(
                "the grain size is {grain} (allowed: a power of two from 1 to {MAX_GRAIN} sectors)"
            )));
        }
        let gd_host = u64::from(gd) * SECTOR;
        let geometry = Geometry {
            capacity: u64::from(self.word(CAPACITY)) * SECTOR,
            grain: u64::from(grain) * SECTOR,
            per_table: PER_TABLE,
            gd: gd_host,
            rgd: None,
            first: (gd_host + u64::from(self.word(ENTRIES)) * 4).next_multiple_of(SECTOR),
            zeroes: false,
            zero_tables: false,
        };
        let (entries, needed) = (self.word(ENTRIES), geometry.tables());
        if u64::from(entries) < needed || entries > MAX_ENTRIES {
            return Err(Error::corrupt(format!(
                "the grain directory has {entries} entries (allowed: {needed} to {MAX_ENTRIES})"
            )));
        }
        let end = gd_host + u64::from(entries) * 4;
        if gd_host < SECTORS * SECTOR || end > size {
            return Err(Error::corrupt(format!(
                "the grain directory is at {gd_host:#x}..{end:#x} (allowed: inside the file of {size} bytes, behind its header)"
            )));
        }
        Ok(geometry)
    }
}

/// Sectors before the first table of a new file: the header and the directory.
pub(super) fn overhead(sectors: u64, grain: u64) -> u64 {
    let entries = sectors.div_ceil(grain).div_ceil(PER_TABLE).max(1);
    SECTORS + (entries * 4).div_ceil(SECTOR)
}

/// Makes a file without grains, and without tables: they come with the first grain of each.
///
/// # Errors
/// `OutOfRange` for more sectors than the header can say; the host's.
pub(super) fn create(storage: &dyn Storage, sectors: u64, grain: u64) -> Result<()> {
    let end = overhead(sectors, grain);
    let entries = sectors.div_ceil(grain).div_ceil(PER_TABLE);
    let mut bytes = [0; LEN];
    bytes[..4].copy_from_slice(b"COWD");
    let mut put = |at: usize, value: u64| {
        let value = u32::try_from(value).map_err(|_| {
            let text =
                format!("a copy-on-write extent of {sectors} sectors (allowed: less than 2^32)");
            Error::new(crate::error::ErrorKind::OutOfRange, text)
        })?;
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        Ok::<_, Error>(())
    };
    for (at, value) in [
        (VERSION, 1),
        (FLAGS, 3),
        (CAPACITY, sectors),
        (GRAIN, grain),
        (GD, SECTORS),
        (ENTRIES, entries),
        (FREE_AT, end),
    ] {
        put(at, value)?;
    }
    start_over(storage, end * SECTOR)?;
    storage.write_at(&bytes, 0)
}

//! The header: one sector, whose fields are where the version has them.

use std::ops::Range;

use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::image::units::Grid;
use crate::storage::Storage;
use crate::util::align::clamp_len;

/// What marks a header.
pub(super) const SIGNATURE: u32 = 0xbeda_107f;
/// Bytes of a header that are read and written.
pub(super) const LEN: usize = 512;
/// The map's number of a block that has no space.
pub(super) const FREE: u32 = u32::MAX;
/// The map's number of a block that reads as zeroes and has no space.
pub(super) const ZERO: u32 = u32::MAX - 1;
/// Guest sizes are whole sectors.
pub(super) const SECTOR: u64 = 512;
/// The version that is written, and that of the first releases.
const VERSION: u32 = 0x0001_0001;
const VERSION_0: u32 = 2;
/// Largest block, and largest room before a block's data.
const MAX_BLOCK: u64 = 256 << 20;
/// Smallest length of version 1 as its field has it, and where that counts from.
const MIN_HEADER: u64 = 384;
const HEADER: u64 = 72;
/// Where version 0 has its map.
const MAP_0: u64 = 420;

/// Where versions 0 and 1 have a field; 0: not at all.
pub(super) type Field = [usize; 2];
const HEADER_LEN: Field = [0, 72];
pub(super) const KIND: Field = [72, 76];
const FLAGS: Field = [76, 80];
const COMMENT: Field = [80, 84];
pub(super) const MAP: Field = [0, 340];
pub(super) const DATA: Field = [0, 344];
pub(super) const SECTOR_LEN: Field = [348, 360];
pub(super) const SECTOR_LEN_AGAIN: Field = [0, 468];
pub(super) const DISK: Field = [352, 368];
pub(super) const BLOCK: Field = [360, 376];
const EXTRA: Field = [0, 380];
pub(super) const ENTRIES: Field = [364, 384];
/// How many blocks the file has: others take the one of this number next.
pub(super) const COUNT: Field = [368, 388];
/// Who the disk is, and in which state; who its parent is, and in which state it was.
pub(super) const DISK_ID: Field = [372, 392];
pub(super) const STATE_ID: Field = [388, 408];
pub(super) const PARENT_ID: Field = [404, 424];
pub(super) const PARENT_STATE_ID: Field = [0, 440];

/// What a disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Blocks get space when they are written.
    Dynamic = 1,
    /// All blocks have space.
    Fixed,
    /// As differencing, thrown away when the machine is switched off.
    Undo,
    /// What it does not have is in the parent.
    Differencing,
}

impl Kind {
    const ALL: [(Self, &str); 4] = [
        (Self::Dynamic, "dynamic"),
        (Self::Fixed, "fixed"),
        (Self::Undo, "undo"),
        (Self::Differencing, "differencing"),
    ];

    /// The word that `info` shows.
    pub(super) fn word(self) -> &'static str {
        Self::ALL[self as usize - 1].1
    }

    /// Whether what it does not have is in a parent.
    pub(super) fn has_parent(self) -> bool {
        matches!(self, Self::Undo | Self::Differencing)
    }
}

/// A header whose fields fit together.
#[derive(Debug, Clone)]
pub(super) struct Header {
    pub(super) bytes: [u8; LEN],
    /// 0 or 1.
    version: usize,
}

impl Header {
    /// A header of the version that is written, in which nothing is said yet.
    pub(super) fn new() -> Self {
        let mut header = Self {
            bytes: [0; LEN],
            version: 1,
        };
        header.bytes[64..68].copy_from_slice(&SIGNATURE.to_le_bytes());
        header.bytes[68..72].copy_from_slice(&VERSION.to_le_bytes());
        header.set_word(HEADER_LEN, 400);
        header.set_word(SECTOR_LEN, SECTOR);
        header.set_word(SECTOR_LEN_AGAIN, SECTOR);
        header
    }

    /// Reads the header of `storage`.
    ///
    /// # Errors
    /// `Corrupt` and `Unsupported`, by field; the host's.
    pub(super) fn read(storage: &dyn Storage) -> Result<Self> {
        let size = storage.size();
        // A small disk of version 0 without data may end before.
        let len = clamp_len(size, LEN);
        let mut bytes = [0; LEN];
        storage.read_at(&mut bytes[..len], 0)?;
        let mut header = Self { bytes, version: 1 };
        if header.word([0, 64]) != u64::from(SIGNATURE) {
            return Err(Error::corrupt(format!(
                "the signature is {:#010x} (allowed: {SIGNATURE:#010x})",
                header.word([0, 64])
            )));
        }
        let version = header.word([0, 68]);
        header.version = match version {
            version if version == u64::from(VERSION_0) => 0,
            version if version >> 16 == 1 => 1,
            version => {
                return Err(Error::unsupported(format!(
                    "the version is {version:#010x} (allowed: 1.x and {VERSION_0:#010x})"
                )));
            }
        };
        if size < SECTOR && header.has_places() {
            return Err(Error::corrupt(format!(
                "the file of {size} bytes ends within the header (allowed: at least {LEN})"
            )));
        }
        header.kind()?;
        header.check(size).map(|()| header)
    }

    /// Refuses more map entries than the disk can come to have.
    pub(super) fn may_have(&self, entries: u64) -> Result<()> {
        if entries <= self.entries() || entries <= u64::from(ZERO) && self.has_places() {
            return Ok(());
        }
        let text = format!(
            "a map of {entries} entries (allowed: up to {ZERO}, in disks of version 1; a copy by convert has room)"
        );
        Err(Error::new(ErrorKind::OutOfRange, text))
    }

    /// Refuses sizes and places that contradict each other or a file of `len` bytes.
    fn check(&self, len: u64) -> Result<()> {
        let (block, extra, entries) = (self.block(), self.word(EXTRA), self.word(ENTRIES));
        let (map, data, first) = (self.map(), self.data(), HEADER + MIN_HEADER);
        let most = block.saturating_mul(entries);
        let wrong = |text: String| Err(Error::corrupt(text));
        if self.has_places() && self.word(HEADER_LEN) < MIN_HEADER {
            return wrong(format!(
                "the header's length is {} (allowed: at least {MIN_HEADER})",
                self.word(HEADER_LEN)
            ));
        }
        if !block.is_power_of_two() || !(SECTOR..=MAX_BLOCK).contains(&block) {
            return wrong(format!(
                "the block size is {block} (allowed: powers of two from {SECTOR} to {MAX_BLOCK})"
            ));
        }
        if extra != 0 && !extra.is_power_of_two() || extra > MAX_BLOCK {
            return wrong(format!(
                "there are {extra} bytes before each block (allowed: 0, or a power of two up to {MAX_BLOCK})"
            ));
        }
        if entries > u64::from(ZERO) || self.disk() > most {
            return wrong(format!(
                "the disk has {} bytes, its map of {entries} entries has room for {most} (allowed: as much, in less than {ZERO} entries)",
                self.disk()
            ));
        }
        if self.has_places() && (map.start < first || !map.start.is_multiple_of(4)) {
            return wrong(format!(
                "the map is at {:#x} (allowed: multiples of 4 from {first:#x} on)",
                map.start
            ));
        }
        if map.end > len || map.end > data {
            return wrong(format!(
                "the map is at {:#x}..{:#x}, the data at {data:#x} (allowed: both inside the file of {len:#x} bytes, in this order)",
                map.start, map.end
            ));
        }
        Ok(())
    }

    /// Whether the header says where the map and the data are; else the data follows the map.
    pub(super) fn has_places(&self) -> bool {
        self.version > 0
    }

    /// Where a field is, in versions that have it.
    pub(super) fn at(&self, field: Field) -> usize {
        field[self.version]
    }

    /// A 32-bit field; 0 where the version does not have it.
    pub(super) fn word(&self, field: Field) -> u64 {
        let word = match self.at(field) {
            0 => None,
            at => self.bytes[at..].first_chunk().copied(),
        };
        u64::from(u32::from_le_bytes(word.unwrap_or_default()))
    }

    /// Changes a field, in versions that have it, here alone.
    pub(super) fn set(&mut self, field: Field, bytes: &[u8]) {
        match self.at(field) {
            0 => {}
            at => self.bytes[at..at + bytes.len()].copy_from_slice(bytes),
        }
    }

    /// As [`Header::set`], of 32 bits.
    pub(super) fn set_word(&mut self, field: Field, value: u64) {
        self.set(
            field,
            &u32::try_from(value).unwrap_or(u32::MAX).to_le_bytes(),
        );
    }

    /// An identity; none where it is zero or the version does not have it.
    pub(super) fn uuid(&self, field: Field) -> Option<Uuid> {
        let bytes = self.bytes[self.at(field)..].first_chunk().copied();
        let uuid = Uuid::from_bytes_le(bytes.unwrap_or_default());
        Some(uuid).filter(|uuid| self.at(field) > 0 && !uuid.is_nil())
    }

    /// What the disk is.
    ///
    /// # Errors
    /// `Unsupported` for what is unknown.
    pub(super) fn kind(&self) -> Result<Kind> {
        let number = self.word(KIND);
        let mut all = Kind::ALL.iter().map(|(kind, _)| *kind);
        all.find(|kind| *kind as u64 == number).ok_or_else(|| {
            Error::unsupported(format!(
                "the image type is {number} (allowed: 1 dynamic, 2 fixed, 3 undo, 4 differencing)"
            ))
        })
    }

    /// Flags, of which none is known that matters.
    pub(super) fn flags(&self) -> u64 {
        self.word(FLAGS)
    }

    /// The comment, as far as it is text.
    pub(super) fn comment(&self) -> String {
        let start = self.at(COMMENT);
        let text = self.bytes[start..start + 256].split(|b| *b == 0).next();
        String::from_utf8_lossy(text.unwrap_or_default()).into_owned()
    }

    /// Bytes of the disk as the field has them.
    pub(super) fn disk(&self) -> u64 {
        let bytes = self.bytes[self.at(DISK)..].first_chunk().copied();
        u64::from_le_bytes(bytes.unwrap_or_default())
    }

    /// Bytes of the disk that a guest sees: whole sectors.
    pub(super) fn size(&self) -> u64 {
        self.disk() - self.disk() % SECTOR
    }

    /// Bytes of a block's data.
    pub(super) fn block(&self) -> u64 {
        self.word(BLOCK)
    }

    /// Bytes before the data of each block that belong to it.
    pub(super) fn extra(&self) -> u64 {
        self.word(EXTRA)
    }

    /// Entries of the map.
    pub(super) fn entries(&self) -> u64 {
        self.word(ENTRIES)
    }

    /// Entries that the disk has use for.
    pub(super) fn blocks(&self) -> u64 {
        self.size().div_ceil(self.block())
    }

    /// Where the map is.
    pub(super) fn map(&self) -> Range<u64> {
        let start = if self.has_places() {
            self.word(MAP)
        } else {
            MAP_0
        };
        start..start + self.entries() * 4
    }

    /// Where blocks begin.
    pub(super) fn data(&self) -> u64 {
        match self.has_places() {
            true => self.word(DATA),
            false => self.map().end,
        }
    }

    /// Where the blocks of the file are.
    pub(super) fn grid(&self) -> Grid {
        Grid {
            start: self.data(),
            lead: self.extra(),
            stride: self.block() + self.extra(),
        }
    }
}

//! The header: one sector, whose fields are where the version has them.

use std::ops::Range;

use uuid::Uuid;

use crate::error::{Error, Result};
use crate::image::units::Taken;
use crate::storage::Storage;

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
/// The version that is written.
pub(super) const VERSION: u32 = 0x0001_0001;
/// The version of the first releases.
const VERSION_0: u32 = 2;
/// Largest block, and largest room before a block's data.
const MAX_BLOCK: u64 = 256 << 20;
/// Smallest header of version 1, and its offset.
const MIN_HEADER: u32 = 384;
const HEADER: u64 = 72;

/// What a disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Blocks get space when they are written.
    Dynamic,
    /// All blocks have space.
    Fixed,
    /// As differencing, thrown away when the machine is switched off.
    Undo,
    /// What it does not have is in the parent.
    Differencing,
}

impl Kind {
    /// The number that stands for it.
    pub(super) fn number(self) -> u32 {
        match self {
            Self::Dynamic => 1,
            Self::Fixed => 2,
            Self::Undo => 3,
            Self::Differencing => 4,
        }
    }

    /// The word that `info` shows.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Dynamic => "dynamic",
            Self::Fixed => "fixed",
            Self::Undo => "undo",
            Self::Differencing => "differencing",
        }
    }

    /// Whether what it does not have is in a parent.
    pub(super) fn has_parent(self) -> bool {
        matches!(self, Self::Undo | Self::Differencing)
    }
}

/// Where fields are.
#[derive(Debug)]
pub(super) struct Fields {
    pub(super) kind: usize,
    flags: usize,
    pub(super) disk: usize,
    block: usize,
    extra: Option<usize>,
    pub(super) entries: usize,
    pub(super) count: usize,
    /// Of the disk itself, of its state, and of the parent.
    pub(super) uuids: usize,
    /// Of the parent's state.
    pub(super) parent_state: Option<usize>,
}

/// Of version 0.
static V0: Fields = Fields {
    kind: 72,
    flags: 76,
    disk: 352,
    block: 360,
    extra: None,
    entries: 364,
    count: 368,
    uuids: 372,
    parent_state: None,
};

/// Of version 1.
pub(super) static V1: Fields = Fields {
    kind: 76,
    flags: 80,
    disk: 368,
    block: 376,
    extra: Some(380),
    entries: 384,
    count: 388,
    uuids: 392,
    parent_state: Some(PARENT_STATE),
};

/// Where version 1 has the state of the parent.
pub(super) const PARENT_STATE: usize = 440;
/// Where version 1 has the map's offset, and that of the data.
pub(super) const MAP_FIELD: usize = 340;
pub(super) const DATA_FIELD: usize = 344;
/// Where version 0 has its map.
const MAP_0: u64 = 420;

/// A header whose fields fit together.
#[derive(Debug, Clone)]
pub(super) struct Header {
    pub(super) bytes: [u8; LEN],
    pub(super) fields: &'static Fields,
    pub(super) kind: Kind,
}

impl Header {
    /// Reads the header of `storage`.
    ///
    /// # Errors
    /// `Corrupt` and `Unsupported`, by field; the host's.
    pub(super) fn read(storage: &dyn Storage) -> Result<Self> {
        if storage.size() < SECTOR {
            return Err(Error::corrupt(format!(
                "the file of {} bytes ends within the header (allowed: at least {LEN})",
                storage.size()
            )));
        }
        let mut bytes = [0; LEN];
        storage.read_at(&mut bytes, 0)?;
        let word = |at: usize| word(&bytes, at);
        if word(64) != SIGNATURE {
            return Err(Error::corrupt(format!(
                "the signature is {:#010x} (allowed: {SIGNATURE:#010x})",
                word(64)
            )));
        }
        let fields = match word(68) {
            VERSION_0 => &V0,
            version if version >> 16 == 1 => &V1,
            version => {
                return Err(Error::unsupported(format!(
                    "the version is {version:#010x} (allowed: 1.x and 0x00000002)"
                )));
            }
        };
        if fields.extra.is_some() && word(72) < MIN_HEADER {
            return Err(Error::corrupt(format!(
                "the header's length is {} (allowed: at least {MIN_HEADER})",
                word(72)
            )));
        }
        let kind = match word(fields.kind) {
            1 => Kind::Dynamic,
            2 => Kind::Fixed,
            3 => Kind::Undo,
            4 => Kind::Differencing,
            kind => {
                return Err(Error::unsupported(format!(
                    "the image type is {kind} (allowed: 1 dynamic, 2 fixed, 3 undo, 4 differencing)"
                )));
            }
        };
        let header = Self {
            bytes,
            fields,
            kind,
        };
        header.check(storage.size()).map(|()| header)
    }

    /// Refuses sizes and places that contradict each other or a file of `len` bytes.
    fn check(&self, len: u64) -> Result<()> {
        let (block, extra) = (self.block(), self.extra());
        let wrong = |text: String| Err(Error::corrupt(text));
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
        if self.entries() > u64::from(ZERO) || self.disk() > block.saturating_mul(self.entries()) {
            return wrong(format!(
                "the disk has {} bytes, its map of {} entries has room for {} (allowed: as much, in less than {ZERO} entries)",
                self.disk(),
                self.entries(),
                block.saturating_mul(self.entries())
            ));
        }
        let map = self.map();
        let least = HEADER + u64::from(MIN_HEADER);
        if self.has_fields() && (map.start < least || !map.start.is_multiple_of(4)) {
            return wrong(format!(
                "the map is at {:#x} (allowed: multiples of 4 from {least:#x} on)",
                map.start
            ));
        }
        if map.end > len || map.end > self.data() {
            return wrong(format!(
                "the map is at {:#x}..{:#x}, the data at {:#x} (allowed: both inside the file of {len:#x} bytes, in this order)",
                map.start,
                map.end,
                self.data()
            ));
        }
        Ok(())
    }

    /// A 32-bit field.
    pub(super) fn word(&self, at: usize) -> u64 {
        u64::from(word(&self.bytes, at))
    }

    /// Changes a field, here alone.
    pub(super) fn set(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Changes a 32-bit field, here alone.
    pub(super) fn set_word(&mut self, at: usize, value: u64) {
        self.set(at, &u32::try_from(value).unwrap_or(u32::MAX).to_le_bytes());
    }

    /// Flags, of which none is known that matters.
    pub(super) fn flags(&self) -> u64 {
        self.word(self.fields.flags)
    }

    /// Bytes of the disk as the field has them.
    pub(super) fn disk(&self) -> u64 {
        self.word(self.fields.disk) | self.word(self.fields.disk + 4) << 32
    }

    /// Bytes of the disk that a guest sees: whole sectors.
    pub(super) fn size(&self) -> u64 {
        self.disk() - self.disk() % SECTOR
    }

    /// Bytes of a block's data.
    pub(super) fn block(&self) -> u64 {
        self.word(self.fields.block)
    }

    /// Bytes before the data of each block that belong to it.
    pub(super) fn extra(&self) -> u64 {
        self.fields.extra.map_or(0, |at| self.word(at))
    }

    /// Bytes from one block to the next.
    pub(super) fn total(&self) -> u64 {
        self.block() + self.extra()
    }

    /// Entries of the map.
    pub(super) fn entries(&self) -> u64 {
        self.word(self.fields.entries)
    }

    /// How many blocks have space, as the header has it: others take the one of this number next.
    pub(super) fn count(&self) -> u64 {
        self.word(self.fields.count)
    }

    /// Where the map is.
    pub(super) fn map(&self) -> Range<u64> {
        let start = match self.has_fields() {
            true => self.word(MAP_FIELD),
            false => MAP_0,
        };
        start..start + self.entries() * 4
    }

    /// Where blocks begin.
    pub(super) fn data(&self) -> u64 {
        match self.has_fields() {
            true => self.word(DATA_FIELD),
            false => self.map().end,
        }
    }

    /// Whether the header says where the map and the data are, as that of version 1 does.
    pub(super) fn has_fields(&self) -> bool {
        self.fields.extra.is_some()
    }

    /// Entries that the disk has use for.
    pub(super) fn blocks(&self) -> u64 {
        self.size().div_ceil(self.block())
    }

    /// The number of the block of the file whose data begins at `host`.
    pub(super) fn number(&self, host: u64) -> u64 {
        (host - self.extra() - self.data()) / self.total()
    }

    /// Where block number `number` of the file is, with what is before its data.
    pub(super) fn host(&self, number: u64) -> Range<u64> {
        let start = self.data() + number * self.total();
        start..start + self.total()
    }

    /// The space of blocks of the file, of which nothing is known.
    pub(super) fn taken(&self, first: u64, count: u64) -> Taken {
        Taken {
            lead: self.extra(),
            ..Taken::new(self.host(first).start + self.extra(), count, self.total())
        }
    }

    /// One of the identities: 0 the disk's, 1 its state's, 2 the parent's.
    pub(super) fn uuid(&self, number: usize) -> Uuid {
        self.uuid_at(self.fields.uuids + 16 * number)
    }

    /// The identity of the parent's state when the child was made.
    pub(super) fn parent_state(&self) -> Uuid {
        self.fields
            .parent_state
            .map_or(Uuid::nil(), |at| self.uuid_at(at))
    }

    /// Notes the state of the parent, where this version has a field for it.
    pub(super) fn set_parent_state(&mut self, state: Uuid) {
        if let Some(at) = self.fields.parent_state {
            self.set(at, &state.to_bytes_le());
        }
    }

    fn uuid_at(&self, at: usize) -> Uuid {
        let bytes = self.bytes[at..].first_chunk().copied();
        Uuid::from_bytes_le(bytes.unwrap_or_default())
    }

    /// The comment, as far as it is text.
    pub(super) fn comment(&self) -> String {
        let start = self.fields.flags + 4;
        let text = self.bytes[start..start + 256].split(|b| *b == 0).next();
        String::from_utf8_lossy(text.unwrap_or_default()).into_owned()
    }
}

fn word(bytes: &[u8; LEN], at: usize) -> u32 {
    let word = bytes[at..].first_chunk().copied();
    u32::from_le_bytes(word.unwrap_or_default())
}

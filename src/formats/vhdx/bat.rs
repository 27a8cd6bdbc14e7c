//! The block allocation table: where blocks and sector bitmaps are ([MS-VHDX] 2.5).

use std::ops::Range;
use std::sync::atomic::AtomicU64;

use crate::error::{Error, Result};
use crate::formats::vhdx::bytes::MB;
use crate::formats::vhdx::metadata::Metadata;
use crate::formats::vhdx::region::Regions;
use crate::image::Wait;
use crate::image::table::{Endian, Table};
use crate::storage::Storage;

/// Sectors of a chunk: those of which one sector bitmap says where they are.
const CHUNK: u64 = 1 << 23;
/// The bits of an entry that say what state the block is in, and those that say nothing.
const STATE: u64 = 7;
const RESERVED: u64 = (MB - 1) & !STATE;

/// What an entry says of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Block {
    /// It has no space: as the parent, or zeroes.
    Absent,
    /// It has no space that counts, and reads as zeroes.
    Zero,
    /// It is here.
    Present(u64),
    /// Some of its sectors are here, as the sector bitmap says; the others are the parent's.
    Partial(u64),
    /// A state that the format keeps for later.
    Unknown(u64),
}

impl Block {
    /// What an entry says.
    pub(super) fn from_word(word: u64) -> Self {
        let host = word & !(MB - 1);
        match word & STATE {
            0 => Self::Absent,
            1..=3 => Self::Zero,
            6 => Self::Present(host),
            7 => Self::Partial(host),
            state => Self::Unknown(state),
        }
    }

    /// The entry.
    pub(super) fn word(self) -> u64 {
        match self {
            Self::Absent => 0,
            Self::Zero => 2,
            Self::Present(host) => host | 6,
            Self::Partial(host) => host | 7,
            Self::Unknown(state) => state,
        }
    }

    /// Where its space is.
    pub(super) fn host(self) -> Option<u64> {
        match self {
            Self::Present(host) | Self::Partial(host) => Some(host),
            _ => None,
        }
    }
}

/// What an entry of the table is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// Block of this number.
    Block(u64),
    /// The sector bitmap of the chunk of this number.
    Bitmap(u64),
}

/// Where the entries are, by the size of the disk and of its blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Grid {
    /// Bytes of a block.
    pub(super) block: u64,
    /// Bytes of a sector.
    pub(super) sector: u64,
    /// Blocks of a chunk.
    ratio: u64,
    has_parent: bool,
}

impl Grid {
    pub(super) fn new(block: u64, sector: u64, has_parent: bool) -> Self {
        Self {
            block,
            sector,
            ratio: CHUNK * sector / block,
            has_parent,
        }
    }

    /// Blocks of a disk of `size` bytes.
    pub(super) fn blocks(self, size: u64) -> u64 {
        size.div_ceil(self.block)
    }

    /// Entries of a disk of `size` bytes, which is not 0.
    pub(super) fn entries(self, size: u64) -> u64 {
        let blocks = self.blocks(size);
        match self.has_parent {
            true => blocks.div_ceil(self.ratio) * (self.ratio + 1),
            false => blocks + blocks.saturating_sub(1) / self.ratio,
        }
    }

    /// The entry of a block.
    pub(super) fn index(self, block: u64) -> u64 {
        block + block / self.ratio
    }

    /// What an entry is for.
    pub(super) fn of(self, index: u64) -> Use {
        let chunk = index / (self.ratio + 1);
        match index % (self.ratio + 1) == self.ratio {
            true => Use::Bitmap(chunk),
            false => Use::Block(index - chunk),
        }
    }

    /// The first block whose entry is `index` or one behind it.
    pub(super) fn block_from(self, index: u64) -> u64 {
        index - index / (self.ratio + 1)
    }

    /// The blocks of a block's chunk, whose entries lie side by side.
    pub(super) fn chunk(self, block: u64) -> Range<u64> {
        let start = block - block % self.ratio;
        start..start + self.ratio
    }

    /// The entry of the sector bitmap of a block's chunk.
    fn bitmap(self, block: u64) -> u64 {
        block / self.ratio * (self.ratio + 1) + self.ratio
    }
}

/// What a change of size replaces.
#[derive(Debug)]
pub(super) struct Shape {
    pub(super) metadata: Metadata,
    pub(super) regions: Regions,
    pub(super) grid: Grid,
    pub(super) table: Table<AtomicU64>,
}

impl Shape {
    /// Reads where everything is.
    ///
    /// # Errors
    /// `Corrupt`, `Unsupported`, by field; the host's.
    pub(super) fn read(storage: &dyn Storage, log: &Range<u64>) -> Result<Self> {
        let regions = Regions::read(storage, log)?;
        let metadata = Metadata::read(storage, &regions.metadata)?;
        let grid = Grid::new(metadata.block, metadata.logical, metadata.has_parent);
        let (entries, room) = (grid.entries(metadata.size), &regions.bat);
        if entries > (room.end - room.start) / 8 {
            return Err(Error::corrupt(format!(
                "the BAT region has {:#x} bytes (allowed: {:#x} at least, for a disk of {} bytes)",
                room.end - room.start,
                entries * 8,
                metadata.size
            )));
        }
        let table = Table::of_words(room.start, entries, Endian::Little);
        Ok(Self {
            metadata,
            regions,
            grid,
            table,
        })
    }

    /// Blocks of the disk.
    pub(super) fn blocks(&self) -> u64 {
        self.grid.blocks(self.metadata.size)
    }

    /// What the table says of a block.
    ///
    /// # Errors
    /// The host's; `WouldBlock`.
    pub(super) fn block(&self, storage: &dyn Storage, block: u64, wait: Wait) -> Result<Block> {
        let word = self.table.get(storage, self.grid.index(block), wait)?;
        Ok(Block::from_word(word))
    }

    /// Where the sector bitmap is that says which sectors of a block are here.
    ///
    /// # Errors
    /// `Corrupt` where there is none; the host's; `WouldBlock`.
    pub(super) fn bitmap(&self, storage: &dyn Storage, block: u64, wait: Wait) -> Result<u64> {
        let index = self.grid.bitmap(block);
        let word = self.table.get(storage, index, wait)?;
        match Block::from_word(word) {
            Block::Present(host)
                if host >= MB
                    && ends_within(host, storage.size())
                    && [&self.regions.bat, &self.regions.metadata]
                        .into_iter()
                        .all(|region| host + MB <= region.start || region.end <= host) =>
            {
                Ok(host)
            }
            _ => Err(Error::corrupt(format!(
                "block {block} is partially present, and the entry {word:#x} of its sector bitmap names none inside the file"
            ))),
        }
    }
}

/// Whether a sector bitmap at `host` is inside a file of `size` bytes.
fn ends_within(host: u64, size: u64) -> bool {
    host.checked_add(MB).is_some_and(|end| end <= size)
}

/// Where the space is that an entry of a block without data keeps for it: others write to it again
/// where it was, and refuse a file that does not have it.
pub(super) fn anchor(word: u64) -> Option<u64> {
    let host = word & !(MB - 1);
    (matches!(word & STATE, 1 | 3) && host != 0).then_some(host)
}

/// The entry without the space that is kept for its block.
pub(super) fn without_anchor(word: u64) -> u64 {
    word & STATE
}

/// Bits of an entry that are to be zero, where they are not; of blocks without space the place too.
pub(super) fn odd_bits(word: u64) -> u64 {
    match Block::from_word(word) {
        // Others take a place for one that is in use.
        Block::Zero if word & STATE == 2 => word & !STATE,
        _ => word & RESERVED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_undefined_and_unmapped_blocks_keep_space_without_data() {
        for state in 0..8 {
            let kept = anchor((5 * MB) | state);
            assert_eq!(kept, matches!(state, 1 | 3).then_some(5 * MB), "{state}");
            assert_eq!(anchor(state), None, "{state} without a place");
        }
        assert_eq!(without_anchor((5 * MB) | 3), 3);
    }

    #[test]
    fn a_sector_bitmap_at_the_end_of_all_numbers_is_in_no_file() {
        assert!(!ends_within(!(MB - 1), u64::MAX));
        assert!(ends_within(MB, 2 * MB));
        assert!(!ends_within(MB, 2 * MB - 1));
    }
}

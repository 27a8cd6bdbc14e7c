//! Where things are in a file with a table: blocks, and what they must not lie upon.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::formats::vhd::footer;
use crate::formats::vhd::geometry::SECTOR;
use crate::formats::vhd::header::{self, Header};
use crate::util::{align, range};

/// The table word of a block that has no space.
pub(super) const UNUSED: u32 = u32::MAX;
/// Our own blocks have their data at a multiple of this, as tapdisk's have.
const DATA_ALIGN: u64 = 4096;

/// Sizes of the parts of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Blocks {
    /// Bytes of data.
    pub(super) data: u64,
    /// Bytes of bitmap before them, whole sectors.
    pub(super) bitmap: u64,
}

impl Blocks {
    /// Blocks with `data` bytes of data.
    pub(super) fn new(data: u64) -> Self {
        let bits = data.div_ceil(SECTOR);
        let bitmap = bits.div_ceil(8).next_multiple_of(SECTOR);
        Self { data, bitmap }
    }

    /// Bytes of a block with its bitmap.
    pub(super) fn len(self) -> u64 {
        self.bitmap + self.data
    }

    /// Sectors of data.
    pub(super) fn sectors(self) -> u64 {
        self.data / SECTOR
    }

    /// Blocks of a disk of `size` bytes.
    pub(super) fn count(self, size: u64) -> u64 {
        size.div_ceil(self.data)
    }

    /// Where a block of our own goes that may begin at `from`: its data is aligned.
    pub(super) fn place(self, from: u64) -> u64 {
        let unit = DATA_ALIGN.min(self.data);
        (from + self.bitmap).next_multiple_of(unit) - self.bitmap
    }

    /// From the start of one block of our own to that of the next.
    pub(super) fn stride(self) -> u64 {
        self.len().next_multiple_of(DATA_ALIGN.min(self.data))
    }

    /// The block that holds the byte `at` of the disk.
    pub(super) fn index(self, at: u64) -> u64 {
        at / self.data
    }

    /// The bytes of the disk that block `index` stands for.
    pub(super) fn guest(self, index: u64) -> Range<u64> {
        index * self.data..(index + 1) * self.data
    }
}

/// The parts of the file that hold metadata which no block may lie upon.
pub(super) fn reserved(header_offset: u64, header: &Header) -> [Range<u64>; 3] {
    let table = header.table_offset();
    [
        0..footer::LEN64,
        header_offset..header_offset + header::LEN64,
        table..table + header.max_entries() * 4,
    ]
}

/// What the checks of one table word need.
#[derive(Debug)]
pub(super) struct Bounds<'a> {
    /// Sizes of a block's parts.
    pub(super) blocks: Blocks,
    /// Size of the disk.
    pub(super) size: u64,
    /// First byte of the file that no block may hold: the footer.
    pub(super) data_end: u64,
    /// Metadata.
    pub(super) reserved: &'a [Range<u64>],
}

impl Bounds<'_> {
    /// Where block `index` begins, of which the table says `word`; `None` where it has no space.
    ///
    /// Of the disk's last block only what the disk shows must be in the file: some writers cut
    /// off the rest.
    ///
    /// # Errors
    /// `Corrupt` where the block lies outside the file's data or upon metadata.
    pub(super) fn locate(&self, index: u64, word: u32) -> Result<Option<u64>> {
        if word == UNUSED {
            return Ok(None);
        }
        let host = u64::from(word) * SECTOR;
        let start = index * self.blocks.data;
        let shown = align::up(self.size.saturating_sub(start), SECTOR)
            .unwrap_or(self.blocks.data)
            .min(self.blocks.data);
        let whole = host..host + self.blocks.bitmap + shown;
        if whole.end > self.data_end {
            return Err(Error::corrupt(format!(
                "block {index}: its table entry {word:#x} puts it at {:#x}..{:#x} (allowed: up to {:#x}, where the data ends)",
                whole.start, whole.end, self.data_end
            )));
        }
        if let Some(hit) = self
            .reserved
            .iter()
            .find(|r| range::intersect(r, &whole).is_some())
        {
            return Err(Error::corrupt(format!(
                "block {index}: its table entry {word:#x} puts it at {:#x}..{:#x}, upon metadata at {:#x}..{:#x} (allowed: past all metadata)",
                whole.start, whole.end, hit.start, hit.end
            )));
        }
        Ok(Some(host))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitmaps_are_whole_sectors() {
        for (data, bitmap) in [
            (512, 512),
            (512 << 10, 512),
            (2 << 20, 512),
            (4 << 20, 1024),
            (256 << 20, 64 << 10),
        ] {
            assert_eq!(Blocks::new(data).bitmap, bitmap);
        }
    }

    #[test]
    fn data_of_our_blocks_is_aligned_and_blocks_do_not_meet() {
        for data in [512, 1024, 4096, 2 << 20, 64 << 20] {
            let blocks = Blocks::new(data);
            let first = blocks.place(2048);
            assert!(first >= 2048);
            assert!((first + blocks.bitmap).is_multiple_of(data.min(4096)));
            let second = blocks.place(first + blocks.len());
            assert_eq!(second, first + blocks.stride());
        }
    }

    #[test]
    fn words_outside_the_data_or_upon_metadata_are_corrupt() {
        let header = Header::new(1536, 4, 2 << 20, None);
        let blocks = Blocks::new(2 << 20);
        let bounds = Bounds {
            blocks,
            size: (6 << 20) + 512,
            data_end: 16 << 20,
            reserved: &reserved(512, &header),
        };
        assert_eq!(bounds.locate(0, UNUSED).expect("unused"), None);
        assert_eq!(bounds.locate(0, 4).expect("after the table"), Some(2048));
        for word in [0, 1, 2, 3, u32::MAX - 1, 32768, 28672] {
            bounds.locate(0, word).expect_err("outside");
        }
        let error = bounds.locate(1, 0x7fff_0000).expect_err("past the end");
        for part in ["block 1", "0x7fff0000", "0x1000000"] {
            assert!(error.to_string().contains(part), "{error}");
        }
        assert!(bounds.locate(3, 32766).is_ok(), "one sector is shown");
    }
}

//! Sector bitmaps: which sectors of a block it holds.  Most significant bit first.
//!
//! Kept by the sector of the file they are in, so that bit 0 of a page is the highest of its first
//! word.

use std::ops::Range;
use std::sync::atomic::AtomicU64;

use crate::error::Result;
use crate::image::Wait;
use crate::image::words::{Endian, Words};
use crate::storage::Storage;
use crate::util::align::clamp_len;

/// Bytes of bitmap in a page: one sector, the bits of 2 MiB.
const PAGE: u64 = 512;
/// Bits in a page.
const PAGE_BITS: u64 = PAGE * 8;
/// Pages kept, 512 KiB; a prime, so that bitmaps, which lie a block apart, use all places.
const SLOTS: usize = 1021;

/// A run of sectors of one state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SectorRun {
    /// Whether the block holds them.
    pub(super) present: bool,
    /// How many; never 0.
    pub(super) count: u64,
}

/// All sector bitmaps of an image.
#[derive(Debug)]
pub(super) struct Bitmaps(Words<AtomicU64>);

impl Default for Bitmaps {
    fn default() -> Self {
        Self(Words::new(PAGE, SLOTS, Endian::Big))
    }
}

impl Bitmaps {
    /// The run of sectors at the start of `sectors`, which is not empty, in the block whose bitmap is
    /// at `host`; no further than one page.
    ///
    /// # Errors
    /// The host's; `WouldBlock` where the page must be read and `wait` does not allow it.
    pub(super) fn run(
        &self,
        storage: &dyn Storage,
        host: u64,
        sectors: Range<u64>,
        wait: Wait,
    ) -> Result<SectorRun> {
        let page = sectors.start / PAGE_BITS;
        let first = sectors.start % PAGE_BITS;
        let end = (sectors.end - page * PAGE_BITS).min(PAGE_BITS);
        let words = self.0.page(storage, host + page * PAGE, wait)?;
        Ok(run_of(
            |bit| words.get(clamp_len(bit / 64, usize::MAX)),
            first,
            end,
        ))
    }

    /// Sets the bits of `sectors` in the bitmap at `host`, in the file and then for readers.
    ///
    /// # Errors
    /// The host's; then any of the bits may be set in the file, and readers see none of the page
    /// that failed.
    pub(super) fn set(&self, storage: &dyn Storage, host: u64, sectors: Range<u64>) -> Result<()> {
        for page in sectors.start / PAGE_BITS..sectors.end.div_ceil(PAGE_BITS) {
            let first = page * PAGE_BITS / 64;
            self.0.change(storage, host + page * PAGE, |number, word| {
                word | bits(first + number as u64, &sectors)
            })?;
        }
        Ok(())
    }

    /// Writes the bitmap of a new block of `len` bytes at `host`, with the bits of `sectors` set.
    /// No reader knows of the block yet.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn create(
        &self,
        storage: &dyn Storage,
        host: u64,
        len: u64,
        sectors: Range<u64>,
    ) -> Result<()> {
        let words: Vec<u64> = (0..len / 8).map(|number| bits(number, &sectors)).collect();
        self.0.publish(storage, host, &words)
    }

    /// Forgets all pages; no request is under way.
    pub(super) fn forget(&self) {
        self.0.forget(0..u64::MAX);
    }
}

/// The bits of word `number` of a bitmap that stand for `sectors`.
fn bits(number: u64, sectors: &Range<u64>) -> u64 {
    let at = |sector: u64| sector.clamp(number * 64, number * 64 + 64) - number * 64;
    // All from a bit on.
    let from = |bit: u64| {
        u64::MAX
            .checked_shr(u32::try_from(bit).unwrap_or(64))
            .unwrap_or(0)
    };
    from(at(sectors.start)) & !from(at(sectors.end))
}

/// The run of bits at `first` and before `end`, `word` being that of a bit.
///
/// Asks for each word once: bits are set meanwhile, and two answers need not agree.
fn run_of(word: impl Fn(u64) -> u64, first: u64, end: u64) -> SectorRun {
    let mut bit = first;
    let mut bits = word(bit);
    let present = bits & (1 << (63 - bit % 64)) != 0;
    loop {
        let other = if present { !bits } else { bits };
        let rest = other << (bit % 64);
        if rest != 0 {
            bit += u64::from(rest.leading_zeros());
            break;
        }
        bit = (bit / 64 + 1) * 64;
        if bit >= end {
            break;
        }
        bits = word(bit);
    }
    let count = bit.min(end) - first;
    SectorRun { present, count }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::error::ErrorKind;
    use crate::storage::memory::MemoryStorage;

    fn runs(bitmaps: &Bitmaps, storage: &MemoryStorage, host: u64, end: u64) -> Vec<(bool, u64)> {
        let mut at = 0;
        let mut runs = Vec::new();
        while at < end {
            let run = bitmaps
                .run(storage, host, at..end, Wait::Yes)
                .expect("memory reads");
            runs.push((run.present, run.count));
            at += run.count;
        }
        runs
    }

    #[test]
    fn bits_are_read_from_the_highest_down() {
        let storage = MemoryStorage::from_bytes(&[0b1100_0001, 0x80]);
        let bitmaps = Bitmaps::default();
        assert_eq!(
            runs(&bitmaps, &storage, 0, 20),
            [(true, 2), (false, 5), (true, 2), (false, 11)]
        );
    }

    #[test]
    fn a_run_ends_with_its_page_and_crosses_words() {
        let storage = MemoryStorage::from_bytes(&[0xff; 1024]);
        let bitmaps = Bitmaps::default();
        assert_eq!(
            runs(&bitmaps, &storage, 0, 8192),
            [(true, 4096), (true, 4096)]
        );
        assert_eq!(runs(&bitmaps, &storage, 0, 70), [(true, 70)]);
    }

    #[test]
    fn bits_set_from_many_threads_are_all_there() {
        let storage = MemoryStorage::new();
        let bitmaps = Bitmaps::default();
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let (storage, bitmaps) = (&storage, &bitmaps);
                scope.spawn(move || {
                    for bit in (thread..8192).step_by(4) {
                        bitmaps.set(storage, 512, bit..bit + 1).expect("memory");
                    }
                });
            }
        });
        assert_eq!(storage.to_bytes()[512..], [0xff; 1024]);
        assert_eq!(
            runs(&bitmaps, &storage, 512, 8192),
            [(true, 4096), (true, 4096)]
        );
    }

    #[test]
    fn a_bit_that_is_set_while_its_run_is_looked_for_leaves_no_empty_run() {
        for bit in [0, 5, 63, 64, 4095] {
            // Whatever is asked for is set right after it was told.
            let words = Cell::new(0);
            let word = |_| words.replace(u64::MAX);
            let run = run_of(word, bit, PAGE_BITS);
            let count = 64 - bit % 64;
            assert_eq!((run.present, run.count), (false, count), "{bit}");
        }
    }

    #[test]
    fn a_new_bitmap_replaces_what_was_known_of_the_old() {
        let storage = MemoryStorage::from_bytes(&[0xff; 512]);
        let bitmaps = Bitmaps::default();
        assert_eq!(runs(&bitmaps, &storage, 0, 16), [(true, 16)]);
        bitmaps.create(&storage, 0, 512, 4..6).expect("memory");
        assert_eq!(
            runs(&bitmaps, &storage, 0, 16),
            [(false, 4), (true, 2), (false, 10)]
        );
    }

    #[test]
    fn nothing_is_read_when_waiting_is_not_allowed() {
        let storage = MemoryStorage::from_bytes(&[0xff; 512]);
        let bitmaps = Bitmaps::default();
        let error = bitmaps.run(&storage, 0, 0..1, Wait::No).expect_err("cold");
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
    }
}

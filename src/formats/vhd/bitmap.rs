//! Sector bitmaps: which sectors of a block it holds.  Most significant bit first.
//!
//! Kept by the sector of the file they are in, in a fixed number of pages, so memory is bounded
//! whatever the image's size.  Readers take no lock once a page is there; a bit that changes is
//! written to the file first and then stored in the page.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;

use crate::error::{Error, ErrorKind, Result};
use crate::image::Wait;
use crate::storage::Storage;
use crate::util::align::clamp_len;

/// Bytes of bitmap in a page: one sector, the bits of 2 MiB.
const PAGE: usize = 512;
const PAGE64: u64 = 512;
/// Bits in a page.
const PAGE_BITS: u64 = PAGE64 * 8;
const WORDS: usize = 64;
/// Pages kept: 512 KiB.
const SLOTS: u64 = 1024;

#[derive(Debug)]
struct Page {
    host: u64,
    /// As big-endian numbers, so that bit 0 of the page is the highest of word 0.
    words: [AtomicU64; WORDS],
}

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
pub(super) struct Bitmaps {
    slots: Box<[ArcSwapOption<Page>]>,
    /// Held while a page is read and while bits are written, so that no page is read in between.
    /// Innermost: nothing is locked under it.
    fill: Mutex<()>,
}

impl Default for Bitmaps {
    fn default() -> Self {
        Self {
            slots: (0..SLOTS).map(|_| ArcSwapOption::empty()).collect(),
            fill: Mutex::new(()),
        }
    }
}

impl Bitmaps {
    /// The run of sectors at `sector` of the block whose bitmap is at `host`, at most `count`,
    /// which is not 0, and no further than one page.
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
        let words = self.page(storage, host + page * PAGE64, wait)?;
        Ok(run_of(|bit| words.word(bit), first, end))
    }

    fn page(&self, storage: &dyn Storage, host: u64, wait: Wait) -> Result<Arc<Page>> {
        let slot = self.slot(host);
        if let Some(page) = slot.load_full().filter(|p| p.host == host) {
            return Ok(page);
        }
        if wait == Wait::No {
            return Err(Error::new(
                ErrorKind::WouldBlock,
                "the bitmap is not in memory",
            ));
        }
        let _fill = self.fill.lock();
        self.load(storage, host)
    }

    /// The page, read where it is not there; the caller holds `fill`.
    fn load(&self, storage: &dyn Storage, host: u64) -> Result<Arc<Page>> {
        let slot = self.slot(host);
        if let Some(page) = slot.load_full().filter(|p| p.host == host) {
            return Ok(page);
        }
        let mut bytes = [0; PAGE];
        storage.read_alone(&mut bytes, host)?;
        let page = Arc::new(Page::from_bytes(host, &bytes));
        slot.store(Some(Arc::clone(&page)));
        Ok(page)
    }

    fn slot(&self, host: u64) -> &ArcSwapOption<Page> {
        // Bitmaps are about a block apart; the division brings those of neighbours together.
        let mixed = (host / PAGE64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        &self.slots[clamp_len(mixed % SLOTS, usize::MAX)]
    }

    /// Sets the bits of `sectors` in the bitmap at `host`, in the file and then for readers.
    ///
    /// # Errors
    /// The host's; then any of the bits may be set in the file, and readers see none of the page
    /// that failed.
    pub(super) fn set(&self, storage: &dyn Storage, host: u64, sectors: Range<u64>) -> Result<()> {
        let _fill = self.fill.lock();
        let mut at = sectors.start;
        while at < sectors.end {
            let index = at / PAGE_BITS;
            let end = sectors.end.min((index + 1) * PAGE_BITS);
            let page = self.load(storage, host + index * PAGE64)?;
            let mut bytes = page.to_bytes();
            for bit in at - index * PAGE_BITS..end - index * PAGE_BITS {
                bytes[clamp_len(bit / 8, usize::MAX)] |= 0x80 >> (bit % 8);
            }
            storage.write_at(&bytes, page.host)?;
            page.store(&bytes);
            at = end;
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
        let mut bytes = vec![0u8; clamp_len(len, usize::MAX)];
        for bit in sectors {
            bytes[clamp_len(bit / 8, usize::MAX)] |= 0x80 >> (bit % 8);
        }
        let _fill = self.fill.lock();
        storage.write_at(&bytes, host)?;
        // Pages of a block that was here before are not what the file holds now.
        for host in (host..host + len).step_by(PAGE) {
            let slot = self.slot(host);
            if slot.load().as_ref().is_some_and(|p| p.host == host) {
                slot.store(None);
            }
        }
        Ok(())
    }

    /// Forgets all pages; no request is under way.
    pub(super) fn forget(&self) {
        let _fill = self.fill.lock();
        for slot in &self.slots {
            slot.store(None);
        }
    }
}

impl Page {
    fn from_bytes(host: u64, bytes: &[u8; PAGE]) -> Self {
        let (words, _) = bytes.as_chunks::<8>();
        Self {
            host,
            words: std::array::from_fn(|i| AtomicU64::new(u64::from_be_bytes(words[i]))),
        }
    }

    fn to_bytes(&self) -> [u8; PAGE] {
        let mut bytes = [0; PAGE];
        for (to, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(&self.words) {
            *to = word.load(Ordering::Acquire).to_be_bytes();
        }
        bytes
    }

    fn store(&self, bytes: &[u8; PAGE]) {
        for (word, from) in self.words.iter().zip(bytes.as_chunks::<8>().0) {
            word.store(u64::from_be_bytes(*from), Ordering::Release);
        }
    }

    fn word(&self, bit: u64) -> u64 {
        self.words[clamp_len(bit / 64, WORDS - 1)].load(Ordering::Acquire)
    }
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
    use super::*;
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
        let storage = MemoryStorage::from_bytes(&[0; 512]);
        let bitmaps = Bitmaps::default();
        let page = bitmaps.page(&storage, 0, Wait::Yes).expect("reads");
        for bit in [0, 5, 63, 64, 4095] {
            page.store(&[0; PAGE]);
            // Whatever is asked for is set right after it was told.
            let word = |at: u64| {
                let word = page.word(at);
                page.store(&[0xff; PAGE]);
                word
            };
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

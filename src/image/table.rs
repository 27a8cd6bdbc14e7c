//! One-level allocation tables of 32-bit words: the pages in memory, the words on disk.
//!
//! Shared by the formats that differ only in byte order and in what the words mean.  Pages are
//! read on first use and kept in a fixed number of slots, so memory is bounded whatever the
//! table's length.  Readers take no lock once a page is there; a word that changes is written to
//! the file first and then stored in the page.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;

use crate::error::{Error, ErrorKind, Result};
use crate::image::Wait;
use crate::storage::Storage;
use crate::util::align::clamp_len;

/// Words in a page: 16 KiB of table.
const PAGE_WORDS: u64 = 4096;
/// Pages kept: 4 MiB of table, all of that of the largest VHD with blocks of 2 MiB.
const SLOTS: u64 = 256;

/// Byte order of the words on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endian {
    /// Most significant byte first.
    Big,
    /// Least significant byte first.
    Little,
}

#[derive(Debug)]
struct Page {
    index: u64,
    words: Box<[AtomicU32]>,
}

/// A table of `len` words at `host` of a storage object.
#[derive(Debug)]
pub struct Table {
    host: u64,
    len: u64,
    endian: Endian,
    slots: Box<[ArcSwapOption<Page>]>,
    /// Held while a page is read and while a word is published, so that no page is read in
    /// between.  Innermost: nothing is locked under it.
    fill: Mutex<()>,
}

impl Table {
    /// A table of `len` words at `host`; reads nothing yet.
    pub fn new(host: u64, len: u64, endian: Endian) -> Self {
        let slots = len.div_ceil(PAGE_WORDS).clamp(1, SLOTS);
        let slots = (0..slots).map(|_| ArcSwapOption::empty()).collect();
        Self {
            host,
            len,
            endian,
            slots,
            fill: Mutex::new(()),
        }
    }

    /// Number of words.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no words.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Offset of the table in the file.
    pub fn host(&self) -> u64 {
        self.host
    }

    /// The word at `index`, which is below `len`.
    ///
    /// # Errors
    /// The host's; `WouldBlock` where the page must be read and `wait` does not allow it.
    pub fn get(&self, storage: &dyn Storage, index: u64, wait: Wait) -> Result<u32> {
        debug_assert!(index < self.len);
        let (page, word) = (
            index / PAGE_WORDS,
            clamp_len(index % PAGE_WORDS, usize::MAX),
        );
        let slot = &self.slots[self.slot(page)];
        if let Some(found) = slot.load().as_ref().filter(|p| p.index == page) {
            return Ok(found.words[word].load(Ordering::Acquire));
        }
        if wait == Wait::No {
            return Err(Error::new(
                ErrorKind::WouldBlock,
                "the table page is not in memory",
            ));
        }
        let _fill = self.fill.lock();
        if let Some(found) = slot.load().as_ref().filter(|p| p.index == page) {
            return Ok(found.words[word].load(Ordering::Acquire));
        }
        let read = Arc::new(self.read_page(storage, page)?);
        let value = read.words[word].load(Ordering::Acquire);
        slot.store(Some(read));
        Ok(value)
    }

    /// Writes the word at `index` to the file, then shows it to readers.
    ///
    /// # Errors
    /// The host's; readers then see the old word.
    pub fn publish(&self, storage: &dyn Storage, index: u64, value: u32) -> Result<()> {
        debug_assert!(index < self.len);
        let bytes = match self.endian {
            Endian::Big => value.to_be_bytes(),
            Endian::Little => value.to_le_bytes(),
        };
        let _fill = self.fill.lock();
        storage.write_at(&bytes, self.host + index * 4)?;
        let page = index / PAGE_WORDS;
        if let Some(found) = self.slots[self.slot(page)]
            .load()
            .as_ref()
            .filter(|p| p.index == page)
        {
            let word = clamp_len(index % PAGE_WORDS, usize::MAX);
            found.words[word].store(value, Ordering::Release);
        }
        Ok(())
    }

    fn slot(&self, page: u64) -> usize {
        clamp_len(
            page % crate::util::align::len64(self.slots.len()),
            usize::MAX,
        )
    }

    fn read_page(&self, storage: &dyn Storage, page: u64) -> Result<Page> {
        let first = page * PAGE_WORDS;
        let count = (self.len - first).min(PAGE_WORDS);
        let mut bytes = vec![0; clamp_len(count * 4, usize::MAX)];
        storage.read_at(&mut bytes, self.host + first * 4)?;
        let (words, _) = bytes.as_chunks::<4>();
        let decode = |word: &[u8; 4]| match self.endian {
            Endian::Big => u32::from_be_bytes(*word),
            Endian::Little => u32::from_le_bytes(*word),
        };
        let words = words.iter().map(|w| AtomicU32::new(decode(w))).collect();
        Ok(Page { index: page, words })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryStorage;

    #[test]
    fn a_table_larger_than_its_slots_still_reads_right() {
        let storage = MemoryStorage::new();
        let len = PAGE_WORDS * (SLOTS + 3);
        let table = Table::new(512, len, Endian::Big);
        for index in [0, PAGE_WORDS * SLOTS, len - 1, 1] {
            table
                .publish(&storage, index, 7 + u32::from(index == 1))
                .expect("memory has room");
        }
        for _ in 0..2 {
            assert_eq!(table.get(&storage, 0, Wait::Yes).expect("reads"), 7);
            assert_eq!(
                table
                    .get(&storage, PAGE_WORDS * SLOTS, Wait::Yes)
                    .expect("reads"),
                7
            );
            assert_eq!(table.get(&storage, 1, Wait::Yes).expect("reads"), 8);
            assert_eq!(table.get(&storage, len - 1, Wait::Yes).expect("reads"), 7);
        }
    }

    #[test]
    fn a_page_not_in_memory_is_not_read_when_waiting_is_not_allowed() {
        let storage = MemoryStorage::from_bytes(&[0, 0, 0, 9]);
        let table = Table::new(0, 1, Endian::Big);
        let error = table
            .get(&storage, 0, Wait::No)
            .expect_err("nothing was read yet");
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        assert_eq!(table.get(&storage, 0, Wait::Yes).expect("reads"), 9);
        assert_eq!(table.get(&storage, 0, Wait::No).expect("is there now"), 9);
    }
}

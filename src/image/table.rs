//! One-level allocation tables of 32-bit or 64-bit words, shared by the formats that differ only in
//! byte order and in what the words mean.

use std::ops::Range;
use std::sync::atomic::AtomicU32;

use crate::error::Result;
use crate::image::Wait;
use crate::image::words::Words;
pub use crate::image::words::{Endian, Word};
use crate::storage::Storage;
use crate::util::align::{clamp_len, len64};
use crate::util::range;

/// Bytes of table in one cached page.
const PAGE: u64 = 16 << 10;
/// Bytes read at a time.
const STEP: u64 = 64 << 10;
/// Words written at a time.
const FILL: usize = 256 << 10;
/// Words looked at for one answer.
const LOOK_AHEAD: u64 = 4096;
/// Pages cached: 4 MiB of table, all of that of the largest VHD with blocks of 2 MiB.
const SLOTS: u64 = 257;

/// A table of `len` words at `host` of a storage object.
#[derive(Debug)]
pub struct Table<W = AtomicU32> {
    host: u64,
    len: u64,
    words: Words<W>,
}

impl Table {
    /// A table of `len` words of 32 bits at `host`, a multiple of 4; reads nothing yet.
    pub fn new(host: u64, len: u64, endian: Endian) -> Self {
        Self::of_words(host, len, endian)
    }
}

impl<W: Word> Table<W> {
    /// Bytes of a word.
    const WORD: u64 = W::LEN as u64;

    /// A table of `len` words at `host`, a multiple of their length; reads nothing yet.
    pub fn of_words(host: u64, len: u64, endian: Endian) -> Self {
        let slots = (len.saturating_mul(Self::WORD).div_ceil(PAGE) + 1).min(SLOTS);
        Self {
            host,
            len,
            words: Words::new(PAGE, clamp_len(slots, usize::MAX), endian),
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
    pub fn get(&self, storage: &dyn Storage, index: u64, wait: Wait) -> Result<W::Value> {
        debug_assert!(index < self.len);
        self.words
            .get(storage, self.host + index * Self::WORD, wait)
    }

    /// Calls `f` with each word of the table, straight from the file.
    ///
    /// # Errors
    /// The host's; those of `f`, which end it.
    pub fn each(
        &self,
        storage: &dyn Storage,
        f: impl FnMut(u64, W::Value) -> Result<()>,
    ) -> Result<()> {
        self.each_of(storage, 0..self.len * Self::WORD, f)
    }

    /// As [`Table::each`], without words that lie in holes of the file: they are zero.
    ///
    /// # Errors
    /// As there.
    pub fn each_stored(
        &self,
        storage: &dyn Storage,
        mut f: impl FnMut(u64, W::Value) -> Result<()>,
    ) -> Result<()> {
        let len = self.len * Self::WORD;
        let mut at = 0;
        while at < len {
            let run = storage.run(self.host + at, len - at)?;
            let end = at + run.len;
            // A word that lies in both is data.
            let end = match run.data {
                true => len.min(end.next_multiple_of(Self::WORD)),
                false => end / Self::WORD * Self::WORD,
            };
            let next = end.max(at + Self::WORD);
            if run.data || end <= at {
                self.each_of(storage, at..next, &mut f)?;
            }
            at = next;
        }
        Ok(())
    }

    /// Calls `f` with the words in a range of bytes of the table.
    fn each_of(
        &self,
        storage: &dyn Storage,
        range: Range<u64>,
        mut f: impl FnMut(u64, W::Value) -> Result<()>,
    ) -> Result<()> {
        let mut bytes = vec![0; clamp_len((range.end - range.start).min(STEP), usize::MAX)];
        let mut at = range.start;
        while at < range.end {
            let step = clamp_len(range.end - at, bytes.len());
            let part = &mut bytes[..step];
            storage.read_at(part, self.host + at)?;
            for (i, word) in part.chunks_exact(W::LEN).enumerate() {
                f(at / Self::WORD + len64(i), self.words.decode(word))?;
            }
            at += len64(step);
        }
        Ok(())
    }

    /// The end of the words from the first of `indices` on of which `follows` says so, which gets the
    /// number and the value of each.  Only what is in memory, and not too many: the answer may be
    /// smaller, never wrong.
    pub fn alike(&self, indices: Range<u64>, follows: impl Fn(u64, W::Value) -> bool) -> u64 {
        let end = indices.end.min(indices.start.saturating_add(LOOK_AHEAD));
        let mut index = indices.start;
        while index < end {
            let host = self.host + index * Self::WORD;
            let counted = self
                .words
                .count_while(host, end - index, |n, word| follows(index + n, word));
            let Some(counted) = counted else { break };
            index += counted.words;
            if counted.ended {
                break;
            }
        }
        index
    }

    /// The end of the words from the first of `indices` on that are zero because they lie in a hole of
    /// the file, where the first of them was not looked at yet; the answer may be smaller, never wrong.
    pub fn hole(&self, storage: &dyn Storage, indices: Range<u64>) -> u64 {
        let (start, len) = (indices.start, range::len(&indices));
        if len == 0 || self.get(storage, start, Wait::No).is_ok() {
            return start;
        }
        let run = storage.run(
            self.host + start * Self::WORD,
            len.saturating_mul(Self::WORD),
        );
        match run {
            Ok(run) if !run.data => start + (run.len / Self::WORD).min(len),
            // Who reads the words is told what fails.
            _ => start,
        }
    }

    /// Writes words of which `word` says what they are to be.
    ///
    /// # Errors
    /// The host's; those of `word`.
    pub fn fill(
        &self,
        storage: &dyn Storage,
        indices: Range<u64>,
        word: impl Fn(u64) -> Result<W::Value>,
    ) -> Result<()> {
        for first in indices.clone().step_by(FILL) {
            let part = first..indices.end.min(first + len64(FILL));
            let words: Result<Vec<W::Value>> = part.map(&word).collect();
            self.publish(storage, first, &words?)?;
        }
        Ok(())
    }

    /// Writes the words from `index` on to the file, then shows them to readers.
    ///
    /// # Errors
    /// The host's; readers then see the old words.
    pub fn publish(&self, storage: &dyn Storage, index: u64, values: &[W::Value]) -> Result<()> {
        debug_assert!(index + len64(values.len()) <= self.len);
        self.words
            .publish(storage, self.host + index * Self::WORD, values)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;
    use crate::error::ErrorKind;
    use crate::storage::memory::MemoryStorage;

    const WORDS: u64 = PAGE / 4;

    #[test]
    fn a_table_larger_than_its_slots_still_reads_right() {
        let storage = MemoryStorage::new();
        let len = WORDS * (SLOTS + 3);
        let table = Table::new(512, len, Endian::Big);
        for index in [0, WORDS * SLOTS, len - 1, 1] {
            table
                .publish(&storage, index, &[7 + u32::from(index == 1)])
                .expect("memory has room");
        }
        for _ in 0..2 {
            assert_eq!(table.get(&storage, 0, Wait::Yes).expect("reads"), 7);
            assert_eq!(
                table
                    .get(&storage, WORDS * SLOTS, Wait::Yes)
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

    #[test]
    fn words_in_holes_are_left_out_and_no_others() {
        let storage = MemoryStorage::new();
        storage.set_len(1 << 20).expect("has room");
        let table: Table<AtomicU64> = Table::of_words(24, 100_000, Endian::Little);
        let wanted = [0, 1, 20_000, 20_001, 50_509, 99_999];
        for index in wanted {
            table
                .publish(&storage, index, &[index + 7])
                .expect("has room");
        }
        let (mut found, mut seen) = (Vec::new(), 0);
        table
            .each_stored(&storage, |index, word| {
                seen += 1;
                if word != 0 {
                    assert_eq!(word, index + 7);
                    found.push(index);
                }
                Ok(())
            })
            .expect("reads");
        assert_eq!(found, wanted);
        assert!(seen < 10_000, "{seen}");
    }

    #[test]
    fn words_in_holes_that_nobody_looked_at_are_passed_over() {
        let storage = MemoryStorage::new();
        storage.set_len(1 << 20).expect("has room");
        let table: Table<AtomicU64> = Table::of_words(24, 100_000, Endian::Little);
        table.publish(&storage, 50_000, &[7]).expect("has room");
        let end = table.hole(&storage, 10..100_000);
        assert!((40_000..=50_000).contains(&end), "{end}");
        assert_eq!(table.hole(&storage, 10..20), 20);
        assert_eq!(table.hole(&storage, 50_000..100_000), 50_000);
        assert_eq!(table.hole(&storage, 10..10), 10);
        // In memory: its words are looked at.
        table.get(&storage, 10, Wait::Yes).expect("reads");
        assert_eq!(table.hole(&storage, 10..100_000), 10);
    }

    #[test]
    fn a_table_is_filled_piece_by_piece_and_looked_along_as_far_as_it_is_in_memory() {
        let storage = MemoryStorage::new();
        let len = len64(FILL) + 10;
        let table = Table::new(16, len, Endian::Little);
        let word = |index: u64| Ok(u32::try_from(index).unwrap_or(0));
        table.fill(&storage, 1..len, word).expect("has room");
        let follows = |index, word| index == u64::from(word);
        assert_eq!(table.alike(5..len, follows), 5, "nothing is read");
        table.get(&storage, 5, Wait::Yes).expect("reads");
        let end = table.alike(5..len, follows);
        assert!(end > 5 && end <= 4096 + 5, "{end}");
        assert_eq!(table.alike(5..9, follows), 9);
        assert_eq!(table.alike(5..9, |index, _| index < 7), 7);
        let mut next = 0;
        table
            .each(&storage, |index, word| {
                next += 1;
                assert_eq!(u64::from(word), index);
                Ok(())
            })
            .expect("reads");
        assert_eq!(next, len);
    }
}

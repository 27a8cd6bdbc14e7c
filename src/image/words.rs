//! Words of on-disk tables: pages of them in memory, changes through the file.
//!
//! Pages are read on first use and kept in a fixed number of slots, so memory is bounded whatever
//! the image's size.  Readers take no lock once a page is there.  A word that changes is written
//! to the file first and stored in the page after that.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;

use crate::error::{Error, ErrorKind, Result};
use crate::image::Wait;
use crate::storage::Storage;
use crate::util::align::{clamp_len, len64};
use crate::util::cached::CacheSlots;
use crate::util::range;

/// Pages shorter than this are no parts of a longer table.
const ALONE: u64 = 4096;

/// Byte order of the words on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endian {
    /// Most significant byte first.
    Big,
    /// Least significant byte first.
    Little,
}

/// A word that other threads may look at while it changes.
pub trait Word: Send + Sync + 'static {
    /// Its value.
    type Value: Copy + fmt::Debug;
    /// Its length on disk in bytes.
    const LEN: usize;
    /// From `LEN` bytes on disk.
    fn decode(bytes: &[u8], endian: Endian) -> Self;
    /// Adds the bytes on disk.
    fn encode(value: Self::Value, endian: Endian, bytes: &mut Vec<u8>);
    /// Reads it; what was written before its last change is seen.
    fn load(&self) -> Self::Value;
    /// Changes it; what was written before is seen by those who see the change.
    fn store(&self, value: Self::Value);
}

macro_rules! word {
    ($atomic:ty, $value:ty) => {
        impl Word for $atomic {
            type Value = $value;
            const LEN: usize = size_of::<$value>();
            fn decode(bytes: &[u8], endian: Endian) -> Self {
                let bytes = bytes.first_chunk().copied().unwrap_or_default();
                Self::new(match endian {
                    Endian::Big => <$value>::from_be_bytes(bytes),
                    Endian::Little => <$value>::from_le_bytes(bytes),
                })
            }
            fn encode(value: $value, endian: Endian, bytes: &mut Vec<u8>) {
                bytes.extend(match endian {
                    Endian::Big => value.to_be_bytes(),
                    Endian::Little => value.to_le_bytes(),
                });
            }
            fn load(&self) -> $value {
                self.load(Ordering::Acquire)
            }
            fn store(&self, value: $value) {
                self.store(value, Ordering::Release);
            }
        }
    };
}

word!(AtomicU32, u32);
word!(AtomicU64, u64);

/// What [`Words::count_while`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counted {
    /// Words that are as was asked.
    pub words: u64,
    /// Whether the next one is not.
    pub ended: bool,
}

/// Cached pages of one storage object, by their offset in it.
pub struct Words<W> {
    page_len: u64,
    endian: Endian,
    slots: CacheSlots<Page<W>>,
    /// Held while a page is read and while a word is published, so that no page is read in
    /// between.  Innermost: nothing is locked under it.
    fill: Mutex<()>,
    word: PhantomData<W>,
}

/// Where a page is kept.
type Slot<W> = ArcSwapOption<Page<W>>;

/// Words of one page.
#[derive(Debug)]
pub struct Page<W> {
    host: u64,
    words: Box<[W]>,
}

impl<W: Word> Page<W> {
    /// The word at `index`, as it is now.
    pub fn get(&self, index: usize) -> W::Value {
        self.words[index].load()
    }
}

impl<W> fmt::Debug for Words<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (slots, len) = (self.slots.count(), self.page_len);
        write!(f, "Words({slots} slots of {len} bytes)")
    }
}

impl<W: Word> Words<W> {
    /// At most `slots` pages of `page_len` bytes, a power of two.
    pub fn new(page_len: u64, slots: usize, endian: Endian) -> Self {
        debug_assert!(page_len.is_power_of_two());
        Self {
            page_len,
            endian,
            slots: CacheSlots::new(slots),
            fill: Mutex::new(()),
            word: PhantomData,
        }
    }

    /// A word from its bytes.
    pub fn decode(&self, bytes: &[u8]) -> W::Value {
        W::decode(bytes, self.endian).load()
    }

    /// The word at `host`, a multiple of its length.
    ///
    /// # Errors
    /// As [`Words::page`].
    pub fn get(&self, storage: &dyn Storage, host: u64, wait: Wait) -> Result<W::Value> {
        let page = host - host % self.page_len;
        if let Some(slot) = self.slot(page)
            && let Some(found) = slot.load().as_ref().filter(|p| p.host == page)
        {
            return Ok(found.get(self.within(host)));
        }
        Ok(self.page(storage, host, wait)?.get(self.within(host)))
    }

    /// The page that `host` is in; it is not changed any more once another has taken its place.
    ///
    /// # Errors
    /// The host's; `WouldBlock` where the page must be read and `wait` does not allow it.
    pub fn page(&self, storage: &dyn Storage, host: u64, wait: Wait) -> Result<Arc<Page<W>>> {
        let page = host - host % self.page_len;
        if let Some(found) = self.kept(page) {
            return Ok(found);
        }
        if wait == Wait::No {
            return Err(Error::new(
                ErrorKind::WouldBlock,
                "the table page is not in memory",
            ));
        }
        let _fill = self.fill.lock();
        self.load(storage, page)
    }

    /// How many words from `host` on, at most `most` and none behind the end of their page, are as
    /// `follows` says, which gets the distance of each; `None` where the page is not in memory.
    pub fn count_while(
        &self,
        host: u64,
        most: u64,
        follows: impl Fn(u64, W::Value) -> bool,
    ) -> Option<Counted> {
        let page = host - host % self.page_len;
        let slot = self.slot(page)?.load();
        let found = slot.as_ref().filter(|p| p.host == page)?;
        let words = &found.words[self.within(host)..];
        let words = &words[..clamp_len(most, words.len())];
        let other = (0..).zip(words).find(|(n, word)| !follows(*n, word.load()));
        Some(match other {
            Some((n, _)) => Counted {
                words: n,
                ended: true,
            },
            None => Counted {
                words: len64(words.len()),
                ended: false,
            },
        })
    }

    /// Two neighbouring words from `host` on, as one call of [`Words::publish`] left both.
    ///
    /// Waits for a publisher and for the disk; for when two calls of [`Words::get`] do not agree.
    ///
    /// # Errors
    /// The host's.
    pub fn pair(&self, storage: &dyn Storage, host: u64) -> Result<[W::Value; 2]> {
        let _fill = self.fill.lock();
        let page = self.load(storage, host - host % self.page_len)?;
        let word = self.within(host);
        Ok([page.get(word), page.get(word + 1)])
    }

    /// Changes the words of the page at `host` as `change` says, which gets the number and the value of
    /// each: in the file, whose page is written as a whole, then for readers.
    ///
    /// # Errors
    /// The host's; readers then see the old words.
    pub fn change(
        &self,
        storage: &dyn Storage,
        host: u64,
        change: impl Fn(usize, W::Value) -> W::Value,
    ) -> Result<()> {
        let _fill = self.fill.lock();
        let page = self.load(storage, host)?;
        let words = page.words.iter().enumerate();
        let values: Vec<W::Value> = words.map(|(i, w)| change(i, w.load())).collect();
        storage.write_at(&self.encode(&values), host)?;
        for (word, value) in page.words.iter().zip(values) {
            word.store(value);
        }
        Ok(())
    }

    /// Writes neighbouring words from `host` on to the file in one piece, then shows them to
    /// readers one by one.
    ///
    /// # Errors
    /// The host's; readers then see the old words.
    pub fn publish(&self, storage: &dyn Storage, host: u64, values: &[W::Value]) -> Result<()> {
        let bytes = self.encode(values);
        let _fill = self.fill.lock();
        storage.write_at(&bytes, host)?;
        for (index, value) in values.iter().enumerate() {
            let host = host + len64(index * W::LEN);
            let page = host - host % self.page_len;
            if let Some(slot) = self.slot(page)
                && let Some(found) = slot.load().as_ref().filter(|p| p.host == page)
            {
                found.words[self.within(host)].store(*value);
            }
        }
        Ok(())
    }

    /// Forgets what it knows of a range of the file that no longer holds words, or that was
    /// written by other means.
    pub fn forget(&self, host: Range<u64>) {
        let _fill = self.fill.lock();
        let forget = |slot: &Slot<W>| {
            let met = slot.load().as_ref().is_some_and(|p| {
                p.host < host.end && p.host.saturating_add(self.page_len) > host.start
            });
            if met {
                slot.store(None);
            }
        };
        let pages = host.start / self.page_len..host.end.div_ceil(self.page_len);
        match range::len(&pages) < len64(self.slots.count()) {
            // Each page has but one place.
            true => pages
                .filter_map(|page| self.slots.get(page))
                .for_each(forget),
            false => self.slots.made().for_each(forget),
        }
    }

    fn encode(&self, values: &[W::Value]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(values.len() * W::LEN);
        for value in values {
            W::encode(*value, self.endian, &mut bytes);
        }
        bytes
    }

    /// Which word of its page the one at `host` is.
    fn within(&self, host: u64) -> usize {
        clamp_len(host % self.page_len, usize::MAX) / W::LEN
    }

    /// Where a page would be; `None` where nothing was kept near it yet.
    fn slot(&self, page: u64) -> Option<&Slot<W>> {
        self.slots.get(page / self.page_len)
    }

    fn kept(&self, page: u64) -> Option<Arc<Page<W>>> {
        self.slot(page)?.load_full().filter(|p| p.host == page)
    }

    /// The page, read where it is not there; the caller holds `fill`.
    fn load(&self, storage: &dyn Storage, page: u64) -> Result<Arc<Page<W>>> {
        if let Some(found) = self.kept(page) {
            return Ok(found);
        }
        let mut bytes = vec![0; clamp_len(self.page_len, usize::MAX)];
        match self.page_len < ALONE {
            true => storage.read_alone(&mut bytes, page)?,
            false => storage.read_at(&mut bytes, page)?,
        }
        let words = bytes.chunks_exact(W::LEN);
        let words = words.map(|w| W::decode(w, self.endian)).collect();
        let read = Arc::new(Page { host: page, words });
        let slot = self.slots.make(page / self.page_len);
        slot.store(Some(Arc::clone(&read)));
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryStorage;

    #[test]
    fn what_is_forgotten_is_read_again_and_nothing_else() {
        const PAGES: u64 = 40;
        // From one word of one page to more pages than there are places.
        for forgotten in [
            0..8,
            4096..4104,
            4090..8200,
            0..PAGES * 4096,
            1000..u64::MAX,
        ] {
            let file = MemoryStorage::from_bytes(&[0; 40 * 4096]);
            let words = Words::<AtomicU64>::new(4096, 64, Endian::Big);
            for page in 0..PAGES {
                let word = words.get(&file, page * 4096, Wait::Yes).expect("reads");
                assert_eq!(word, 0);
            }
            file.write_at(&[0xff; 40 * 4096], 0).expect("writes");
            words.forget(forgotten.clone());
            for page in 0..PAGES {
                let host = page * 4096;
                let met = range::intersect(&(host..host + 4096), &forgotten).is_some();
                let word = words.get(&file, host, Wait::Yes).expect("reads");
                assert_eq!(word != 0, met, "{page} of {forgotten:?}");
            }
        }
    }
}

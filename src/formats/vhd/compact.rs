//! Giving space back: free blocks dropped, the last blocks moved into their places.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::formats::vhd::geometry::SECTOR;
use crate::formats::vhd::sparse::{Shape, Sparse};
use crate::image::units::Taken;
use crate::image::{Compact, Store};
use crate::util::align::len64;
use crate::util::progress::Progress;

impl Sparse {
    /// Space between blocks for one block each, in order; none of it is listed as free any more.
    fn take_holes(&self, shape: &Shape) -> Result<Vec<Taken>> {
        if self.storage.has_fixed_len() {
            return Err(Error::unsupported(
                "a device has the length that it has (allowed: compacting of files)",
            ));
        }
        // No table word names them either.
        drop(self.allocator.release_unused(self));
        let mut space = self.space.lock();
        space.ready.clear();
        space.clean.clear();
        self.find_gaps(&mut space, shape)?;
        let gaps = space.take_gaps();
        drop(space);
        let hosts = gaps.into_iter().map(|slot| u64::from(slot) * SECTOR);
        Ok(hosts.map(|host| self.blocks_at(host, 1, false)).collect())
    }
}

impl Compact for Sparse {
    fn frees(&self) -> bool {
        self.may_free(&self.shape.load())
    }

    fn free(&self, guest: &Range<u64>) -> Result<()> {
        Store::discard(self, guest.clone())
    }

    fn unused(&self, _progress: &dyn Progress) -> Result<u64> {
        let holes = self.take_holes(&self.shape.load())?;
        Ok(len64(holes.len()) * self.blocks.stride())
    }

    fn pack(&self, progress: &dyn Progress) -> Result<u64> {
        // Blocks that lost their entry are free only once that is on stable media.
        self.allocator.order.settle()?;
        let shape = self.shape.load_full();
        let holes = self.take_holes(&shape)?;
        let count = self.blocks.count(shape.size);
        let moved = self.allocator.move_down(self, count, &holes, progress);
        self.bitmaps.forget();
        let moved = moved?;
        let used = self.used_end(&shape)?;
        self.cut(&mut self.space.lock(), &shape, used)?;
        Ok(moved)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use crate::formats::vhd::create::CREATOR;
    use crate::formats::vhd::footer::{self, Strictness};
    use crate::formats::vhd::header::{self, Header};
    use crate::formats::vhd::open;
    use crate::image::check::Repair;
    use crate::image::create::CreateOptions;
    use crate::image::open::OpenOptions;
    use crate::image::options::OptionValues;
    use crate::image::{Image, Source, Wait};
    use crate::storage::Storage;
    use crate::storage::memory::MemoryStorage;
    use crate::storage::open::Access;
    use crate::util::progress::Silent;

    const BLOCK: u64 = 16 << 10;
    const LEN: usize = 16 << 10;
    const TEXT: &[u8] = b"a parent's name";

    fn open_for_writing(storage: &Arc<MemoryStorage>) -> Box<dyn Image> {
        let options = OpenOptions {
            access: Access::Write,
            ..OpenOptions::default()
        };
        open::open(Arc::clone(storage) as Arc<dyn Storage>, &options).expect("opens")
    }

    /// Has the table lie behind the blocks, and behind it a locator's text, for which the header says
    /// that there is more room than the file has.
    fn table_behind(storage: &MemoryStorage) -> u64 {
        let mut bytes = [0; header::LEN];
        storage.read_at(&mut bytes, 512).expect("reads");
        let old = Header::parse(&bytes, Strictness::Strict).expect("is whole");
        let end = storage.size() - footer::LEN64;
        let mut table = [0xff; 512];
        let len = usize::try_from(old.max_entries() * 4).expect("small");
        storage
            .read_at(&mut table[..len], old.table_offset())
            .expect("reads");
        storage.write_at(&table, end).expect("writes");
        storage
            .write_at(&[0; 512], old.table_offset())
            .expect("writes");
        let mut bytes = old.with_table(end, 8).to_bytes();
        let fields = [2000, u32::try_from(TEXT.len()).expect("small"), 0, 0];
        let locator = [b"W2ru".to_vec(), fields.map(u32::to_be_bytes).concat()].concat();
        bytes[576..576 + 20].copy_from_slice(&locator);
        bytes[592..600].copy_from_slice(&(end + 512).to_be_bytes());
        let new = Header::parse(&bytes, Strictness::Lax).expect("makes sense");
        storage
            .write_at(&new.sealed().to_bytes(), 512)
            .expect("writes");
        storage.write_at(TEXT, end + 512).expect("writes");
        let mut footer = [0; footer::LEN];
        storage.read_at(&mut footer, 0).expect("reads");
        storage.write_at(&footer, end + 1024).expect("writes");
        end
    }

    #[test]
    fn a_table_and_texts_behind_the_blocks_stay_where_they_are() {
        let storage = Arc::new(MemoryStorage::new());
        let values = OptionValues::parse(CREATOR.options, "vhd", ["block_size=16k"]);
        let options = CreateOptions {
            size: 8 * BLOCK,
            values: values.expect("valid"),
            ..CreateOptions::default()
        };
        (CREATOR.create)(&*storage, &options).expect("creates");
        let image = open_for_writing(&storage);
        for index in 0..5u8 {
            let at = u64::from(index) * BLOCK;
            let mut fill = |slot: crate::image::Slot<'_>| {
                let bytes = [index + 1; LEN];
                slot.storage.write_at(&bytes, slot.host)
            };
            image.allocate(at, BLOCK, &mut fill).expect("has room");
        }
        image.close().expect("closes");
        drop(image);
        let table = table_behind(&storage);
        let image = open_for_writing(&storage);
        let store = image.store().expect("has one");
        store.discard(0..2 * BLOCK).expect("discards");
        store.flush().expect("gives them back");
        let compact = image.as_compact().expect("can be");
        assert_eq!(compact.pack(&Silent).expect("packs"), 2 * BLOCK);
        image.close().expect("closes");
        drop(image);
        assert_eq!(storage.size(), table + 1024 + footer::LEN64);
        let mut text = [0; TEXT.len()];
        storage.read_at(&mut text, table + 512).expect("reads");
        assert_eq!(text, TEXT);
        let image = open_for_writing(&storage);
        for index in 2..5u8 {
            let run = image.map(u64::from(index) * BLOCK, BLOCK, Wait::Yes);
            let Source::Stored { host, .. } = run.expect("maps").source else {
                panic!("block {index} is gone");
            };
            let mut bytes = [0; LEN];
            storage.read_at(&mut bytes, host).expect("reads");
            assert!(bytes.iter().all(|b| *b == index + 1), "block {index}");
        }
        let check = image.as_check().expect("has one");
        let report = check.check(Repair::Nothing, &Silent).expect("checks");
        assert_eq!(report.corruptions, 0, "{report:?}");
    }

    #[test]
    fn a_table_whose_words_straddle_others_is_refused() {
        let storage = Arc::new(MemoryStorage::new());
        let options = CreateOptions {
            size: 8 << 20,
            ..CreateOptions::default()
        };
        (CREATOR.create)(&*storage, &options).expect("creates");
        let mut bytes = [0; header::LEN];
        storage.read_at(&mut bytes, 512).expect("reads");
        let old = Header::parse(&bytes, Strictness::Strict).expect("is whole");
        for (off, opens) in [(0, true), (1, false), (2, false), (4, true)] {
            let header = old.with_table(old.table_offset() + off, 4);
            storage.write_at(&header.to_bytes(), 512).expect("writes");
            let storage = Arc::clone(&storage) as Arc<dyn Storage>;
            let opened = open::open(storage, &OpenOptions::default());
            assert_eq!(opened.is_ok(), opens, "{off}");
        }
    }
}

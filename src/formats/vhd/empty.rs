//! A differencing disk without data of its own.
//!
//! The table loses its words first, and blocks that must stay lose their bits; once that is on stable
//! media what they named is in nobody's way, and the file ends behind the metadata.  Killed between,
//! blocks are leaks.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::formats::vhd::batmap;
use crate::formats::vhd::footer::{Creator, Kind};
use crate::formats::vhd::geometry::SECTOR;
use crate::formats::vhd::layout::UNUSED;
use crate::formats::vhd::sparse::{Shape, Sparse};
use crate::image::Wait;
use crate::image::relink::Empty;
use crate::storage::Zeroing;

impl Empty for Sparse {
    fn empty(&mut self) -> Result<()> {
        if self.kind != Kind::Differencing {
            return Err(Error::unsupported("nothing lies below it"));
        }
        self.whole_footer("emptying it")?;
        let mut shape = self.shape.load_full();
        if !self.is_disjoint(&mut self.space.lock(), &shape)? {
            return Err(Error::unsupported("blocks lie upon each other"));
        }
        drop(self.allocator.release_unused(&*self));
        // A map that calls blocks full would do so of those that come in their place.
        if !matches!(shape.batmap, batmap::Found::None) {
            let footer = shape.footer.created_by(Creator::Win);
            self.replace_footers(&self.space.lock(), &shape, footer)?;
            shape = self.shape.load_full();
        }
        let floor = self.metadata_end(&shape);
        let kept = self.clear_before(&shape, floor)?;
        let words = 0..shape.table.len();
        let word = |index| kept.get(&index).copied().unwrap_or(UNUSED);
        (shape.table).fill(&*self.storage, words, |index| Ok(word(index)))?;
        self.allocator.order.settle()?;
        for word in kept.values() {
            let host = u64::from(*word) * SECTOR;
            let data = host + self.blocks.bitmap..host + self.blocks.len();
            // Where the host cannot, they keep their space, and nothing shows it.
            drop(self.storage.zero(data, Zeroing::MayUnmap));
        }
        let mut space = self.space.lock();
        space.forget_behind(floor);
        self.cut(&mut space, &shape, floor)?;
        drop(space);
        self.storage.sync()
    }
}

impl Sparse {
    /// Clears the bitmaps of the blocks before `floor`, which are between metadata, where the file
    /// cannot end: they stay, and hold nothing.  Their words by their numbers.
    fn clear_before(&self, shape: &Shape, floor: u64) -> Result<BTreeMap<u64, u32>> {
        let mut kept = BTreeMap::new();
        for index in 0..self.blocks.count(shape.size) {
            match self.locate(shape, index, Wait::Yes)? {
                Some(host) if host < floor => {
                    let word = u32::try_from(host / SECTOR)
                        .map_err(|_| Error::corrupt("a block lies where no word leads"))?;
                    let len = self.blocks.bitmap;
                    self.bitmaps.create(&*self.storage, host, len, 0..0)?;
                    kept.insert(index, word);
                }
                _ => {}
            }
        }
        Ok(kept)
    }
}

//! A differencing disk without data of its own.
//!
//! The table loses its words first; once that is on stable media the blocks that they named are in
//! nobody's way, and the file ends behind the metadata.  Killed between, they are leaks.

use crate::error::{Error, Result};
use crate::formats::vhd::batmap;
use crate::formats::vhd::footer::{Creator, Kind};
use crate::formats::vhd::layout::UNUSED;
use crate::formats::vhd::sparse::Sparse;
use crate::image::Wait;
use crate::image::relink::Empty;
use crate::image::units::Units;

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
        let mut before = Vec::new();
        for index in 0..self.blocks.count(shape.size) {
            match self.locate(&shape, index, Wait::Yes)? {
                Some(host) if host < floor => before.push(host..host + self.blocks.len()),
                _ => {}
            }
        }
        let words = 0..shape.table.len();
        shape.table.fill(&*self.storage, words, |_| Ok(UNUSED))?;
        self.allocator.order.settle()?;
        // Between metadata, where the file cannot end.
        self.give_back(before)?;
        let mut space = self.space.lock();
        space.forget_behind(floor);
        self.cut(&mut space, &shape, floor)?;
        drop(space);
        self.storage.sync()
    }
}

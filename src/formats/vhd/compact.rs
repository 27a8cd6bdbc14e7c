//! Giving space back: free blocks dropped, the last blocks moved into their places.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::formats::vhd::geometry::SECTOR;
use crate::formats::vhd::sparse::{Shape, Sparse};
use crate::image::Compact;
use crate::image::units::Taken;
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
        self.free_blocks(guest)
    }

    fn unused(&self, _progress: &dyn Progress) -> Result<u64> {
        let holes = self.take_holes(&self.shape.load())?;
        Ok(len64(holes.len()) * self.blocks.stride())
    }

    fn pack(&self, progress: &dyn Progress) -> Result<u64> {
        // Blocks that lost their entry are free only once that is on stable media.
        self.allocator.order.settle_all()?;
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

//! Giving back space: of grains that read as zeroes, and between grains.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::formats::vmdk::extent::Data;
use crate::formats::vmdk::image::Vmdk;
use crate::formats::vmdk::line::Access;
use crate::formats::vmdk::sparse::Sparse;
use crate::image::Compact;
use crate::image::units::{Taken, Units};
use crate::storage::Zeroing;
use crate::util::align::len64;
use crate::util::progress::Progress;
use crate::util::range::intersect;

/// Grains moved in one go.
const STEP: usize = 16 << 10;

impl Vmdk {
    /// The sparse files that are written to, and the bytes of the disk that each holds.
    fn sparse(&self) -> impl Iterator<Item = (Range<u64>, &Sparse)> {
        self.extents.iter().filter_map(|extent| match &extent.data {
            Data::Sparse(sparse)
                if sparse.packed.is_none() && extent.line.access == Access::ReadWrite =>
            {
                Some((extent.guest(), &**sparse))
            }
            _ => None,
        })
    }

    /// Whether anything can be given back.
    pub(super) fn is_compacted(&self) -> bool {
        self.sparse().next().is_some()
    }
}

impl Compact for Vmdk {
    fn frees(&self) -> bool {
        self.sparse()
            .all(|(_, sparse)| !sparse.has_backing() || sparse.geometry().zeroes)
    }

    fn free(&self, guest: &Range<u64>) -> Result<()> {
        for (own, sparse) in self.sparse() {
            let Some(part) = intersect(guest, &own) else {
                continue;
            };
            let tables = sparse.tables.load();
            let grain = tables.geometry.grain;
            let word = u32::from(sparse.has_backing());
            // Of a grain that others of the disk's units have a part in nothing is known; behind the
            // end of the extent nothing is.
            let first = (part.start - own.start).div_ceil(grain);
            let end = match part.end == own.end {
                true => (part.end - own.start).div_ceil(grain),
                false => (part.end - own.start) / grain,
            };
            for index in first..end {
                if sparse.unit(index)?.is_own() {
                    sparse.allocator()?.begin(sparse)?;
                    sparse.write_entries(&tables, index, &[word])?;
                }
            }
        }
        Ok(())
    }

    fn unused(&self, _progress: &dyn Progress) -> Result<u64> {
        let mut unused = 0;
        for (_, sparse) in self.sparse() {
            let found = sparse.scan(&sparse.tables.load(), |wrong| {
                Err(Error::corrupt(wrong.text))
            })?;
            unused += len64(sparse.held(&found)?.len()) * found.grid.stride;
            let end = found.grid.host(found.slots.end()).start;
            unused += sparse.storage.size().saturating_sub(end);
        }
        Ok(unused)
    }

    fn pack(&self, progress: &dyn Progress) -> Result<u64> {
        let mut moved = 0;
        for (_, sparse) in self.sparse() {
            moved += sparse.pack(progress)?;
        }
        Ok(moved)
    }
}

impl Sparse {
    /// Gives the host back what it keeps between what is in use, where it can.
    pub(super) fn punch(&self) -> Result<()> {
        let space = self.writer()?.space.lock();
        for host in self.held(&space)? {
            let _ = self
                .storage
                .zero(host..host + space.grid.stride, Zeroing::MayUnmap);
        }
        Ok(())
    }

    /// Moves the last grains into gaps, and ends the file behind what is in use; bytes moved.
    pub(super) fn pack(&self, progress: &dyn Progress) -> Result<u64> {
        // Grains that lost their entry are free only once that is on stable media.
        self.release()?;
        let mut moved = 0;
        loop {
            self.learn()?;
            let (grid, holes) = {
                let mut space = self.writer()?.space.lock();
                let holes = space.slots.gaps(STEP);
                // Whatever comes of it: entries may name them from here on.
                for number in &holes {
                    space.slots.add(*number);
                }
                (space.grid, holes)
            };
            let holes: Vec<Taken> = holes.into_iter().map(|n| grid.taken(n, 1)).collect();
            let grains = self.geometry().grains();
            let step = match holes.is_empty() {
                true => 0,
                false => {
                    self.allocator()?.begin(self)?;
                    let allocator = self.allocator()?;
                    allocator.move_down(self, grains, &holes, progress)?
                }
            };
            if step == 0 {
                self.learn()?;
                self.trim()?;
                self.punch()?;
                return Ok(moved);
            }
            moved += step;
        }
    }
}

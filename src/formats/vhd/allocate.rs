//! Giving blocks space, and taking it back: what of it is VHD's own.

use std::ops::Range;
use std::sync::atomic::Ordering;

use crate::error::{Error, ErrorKind, Result};
use crate::formats::vhd::footer::Kind;
use crate::formats::vhd::geometry::SECTOR;
use crate::formats::vhd::layout::UNUSED;
use crate::formats::vhd::sparse::{Shape, Sparse};
use crate::image::units::{Allocator, Content, New, Space, Taken, Target, Unit, Units};
use crate::image::{Layout, Wait};
use crate::storage::Storage;

/// Blocks that are given space, or sectors, by one sync at most.
const TOGETHER: u64 = 64;

impl Sparse {
    /// What the sectors of a block that it does not have read as.
    fn absent(&self) -> Content {
        match self.kind {
            Kind::Differencing => Content::Below,
            // QEMU reads no bitmaps in dynamic disks, so all sectors are there and zero.
            Kind::Dynamic | Kind::Fixed => Content::Zero,
        }
    }

    /// The table word of a block whose data is at `host`.
    fn word(&self, host: u64) -> Result<u32> {
        u32::try_from((host - self.blocks.bitmap) / SECTOR)
            .map_err(|_| Error::new(ErrorKind::NoSpace, "the file is beyond 2 TiB"))
    }

    /// Whether blocks can lose their space.
    pub(super) fn may_free(&self, shape: &Shape) -> bool {
        self.kind == Kind::Dynamic && shape.batmap().is_none() && !self.keeps_blocks()
    }
}

impl Units for Sparse {
    type Entries<'a> = ();

    fn allocator(&self) -> Result<&Allocator> {
        match self.write {
            true => Ok(&self.allocator),
            false => Err(Error::read_only()),
        }
    }

    fn unit_len(&self) -> u64 {
        self.blocks.data
    }

    fn part_len(&self) -> u64 {
        SECTOR
    }

    fn stores_whole(&self) -> bool {
        self.kind == Kind::Dynamic
    }

    fn has_free_parts(&self) -> bool {
        true
    }

    fn disk_end(&self) -> u64 {
        let size = self.shape.load().size;
        let size = size.max(self.growing.load(Ordering::Relaxed));
        match self.kind {
            Kind::Differencing => size.next_multiple_of(SECTOR),
            Kind::Dynamic | Kind::Fixed => self.blocks.count(size) * self.blocks.data,
        }
    }

    fn has_backing(&self) -> bool {
        self.kind == Kind::Differencing
    }

    fn data(&self) -> Result<&dyn Storage> {
        Ok(&*self.storage)
    }

    fn together(&self, index: u64) -> Range<u64> {
        index.saturating_sub(TOGETHER - 1)..index + TOGETHER
    }

    fn unit(&self, index: u64) -> Result<Unit> {
        let shape = self.shape.load();
        let Some(host) = self.locate(&shape, index, Wait::Yes)? else {
            return Ok(Unit {
                space: Space::None,
                whole: Some(Content::Below),
                word: 0,
            });
        };
        let sectors = 0..self.blocks.sectors();
        let full = shape.batmap().is_some_and(|map| map.is_full(index));
        let run = self
            .bitmaps
            .run(&*self.storage, host, sectors.clone(), Wait::Yes)?;
        let whole = match (run.present || full, run.count == sectors.end || full) {
            (true, true) => Some(Content::Stored),
            (false, true) => Some(self.absent()),
            (_, false) => None,
        };
        Ok(Unit {
            space: Space::Own(host + self.blocks.bitmap),
            whole,
            word: 0,
        })
    }

    fn parts(
        &self,
        _index: u64,
        unit: &Unit,
        within: &Range<u64>,
    ) -> Result<Vec<(Content, Range<u64>)>> {
        let Space::Own(data) = unit.space else {
            return Ok(vec![(Content::Below, 0..self.blocks.data)]);
        };
        let host = data - self.blocks.bitmap;
        let mut parts: Vec<(Content, Range<u64>)> = Vec::new();
        let mut sector = within.start / SECTOR;
        while sector * SECTOR < within.end {
            let rest = sector..within.end.div_ceil(SECTOR);
            let run = self.bitmaps.run(&*self.storage, host, rest, Wait::Yes)?;
            let content = match run.present {
                true => Content::Stored,
                false => self.absent(),
            };
            let part = sector * SECTOR..(sector + run.count) * SECTOR;
            sector += run.count;
            match parts.last_mut() {
                Some((last, before)) if *last == content => before.end = part.end,
                _ => parts.push((content, part)),
            }
        }
        Ok(parts)
    }

    fn ahead(&self) -> Range<u64> {
        match self.kind {
            // What is below a child's blocks shows until they are there.
            Kind::Differencing => 0..0,
            Kind::Dynamic | Kind::Fixed => {
                let blocks = self.ahead_blocks() + 1;
                blocks..blocks
            }
        }
    }

    fn take(&self, _index: u64, count: u64) -> Result<Taken> {
        self.allocator.release_ready(self)?;
        self.take_blocks(&mut self.space.lock(), &self.shape.load(), count)
    }

    fn untake(&self, taken: &Taken) {
        let mut space = self.space.lock();
        for number in 0..taken.count {
            let host = taken.host + number * taken.stride - taken.lead;
            self.list_free(&mut space, host);
        }
    }

    fn open(&self, units: Range<u64>, _first: u64, _waits: bool) -> Result<(Range<u64>, ())> {
        Ok((units, ()))
    }

    fn complete(&self, _entries: &(), new: &[New]) -> Result<()> {
        for block in new.iter().filter(|block| block.has_moved()) {
            let bits = match self.kind {
                // The bits of the padding too, as other writers set them.
                Kind::Dynamic | Kind::Fixed => 0..self.blocks.bitmap * 8,
                Kind::Differencing => block.filled.start / SECTOR..block.filled.end / SECTOR,
            };
            let host = block.host - self.blocks.bitmap;
            self.bitmaps
                .create(&*self.storage, host, self.blocks.bitmap, bits)?;
        }
        Ok(())
    }

    fn publish(&self, _entries: (), new: &[New], reached: &mut usize) -> Result<()> {
        let shape = self.shape.load();
        *reached = 0;
        for run in new.chunk_by(|a, b| a.has_moved() && b.has_moved()) {
            let first = &run[0];
            if first.has_moved() {
                let words: Result<Vec<u32>> = run.iter().map(|new| self.word(new.host)).collect();
                let words = words?;
                *reached += run.len();
                shape.table.publish(&*self.storage, first.index, &words)?;
                continue;
            }
            *reached += 1;
            let host = first.host - self.blocks.bitmap;
            let sectors = first.filled.start / SECTOR..first.filled.end / SECTOR;
            self.bitmaps.set(&*self.storage, host, sectors)?;
        }
        Ok(())
    }

    /// Blocks of differencing disks would show the parent; XenServer's batmap names others.
    fn may_drop(&self, target: Target) -> Result<()> {
        let shape = self.shape.load();
        if target == Target::ZeroKept || !self.may_free(&shape) {
            return Err(Error::unsupported(
                "the blocks of this disk do not give their space back, or do not keep it",
            ));
        }
        match self.is_disjoint(&mut self.space.lock(), &shape)? {
            true => Ok(()),
            false => Err(Error::unsupported("blocks lie upon each other")),
        }
    }

    fn drop_units(
        &self,
        guest: &Range<u64>,
        _target: Target,
        freed: &mut Vec<Range<u64>>,
    ) -> Result<()> {
        let shape = self.shape.load();
        let blocks = guest.start.div_ceil(self.blocks.data)..guest.end.div_ceil(self.blocks.data);
        let mut named = Vec::new();
        for index in blocks.clone() {
            if let Some(host) = self.locate(&shape, index, Wait::Yes)? {
                named.push(host..host + self.blocks.len());
            }
        }
        if !named.is_empty() {
            let words = vec![UNUSED; blocks.count()];
            let first = guest.start.div_ceil(self.blocks.data);
            shape.table.publish(&*self.storage, first, &words)?;
        }
        freed.append(&mut named);
        Ok(())
    }

    fn give_back(&self, freed: Vec<Range<u64>>) -> Result<()> {
        let mut space = self.space.lock();
        for mut host in freed {
            while host.start < host.end {
                self.list_free(&mut space, host.start);
                host.start += self.blocks.len();
            }
        }
        self.punch_ready(&mut space);
        Ok(())
    }
}

impl Layout for Sparse {
    fn assign(&self, ranges: &[Range<u64>]) -> Result<()> {
        self.allocator()?.assign(self, ranges)
    }
}

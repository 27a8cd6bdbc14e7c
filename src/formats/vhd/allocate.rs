//! Giving bytes space, and taking it back: reserve under the lock, fill without it, publish.

use std::ops::Range;

use crate::error::ErrorKind;
use crate::error::{Error, Result};
use crate::formats::vhd::footer::Kind;
use crate::formats::vhd::geometry::SECTOR;
use crate::formats::vhd::layout::UNUSED;
use crate::formats::vhd::space::Spot;
use crate::formats::vhd::sparse::{Shape, Sparse};
use crate::image::{Fill, Layout, Old, Slot, Wait};
use crate::storage::Zeroing;
use crate::util::range;

/// Blocks freed under one hold of the lock.
const FREE_STEP: u64 = 1024;
/// Pieces to reserve that are no further apart than this are reserved as one.
const RESERVE_GAP: u64 = 8192;

/// What a thread has reserved, to fill and publish.
#[derive(Debug)]
struct Claim {
    index: u64,
    /// Guest bytes that nobody else fills meanwhile.
    guest: Range<u64>,
    work: Work,
}

#[derive(Debug)]
enum Work {
    /// A block without space: it gets this.
    Block(Spot),
    /// Sectors that the block at this offset does not have yet.
    Sectors(u64),
}

impl Sparse {
    /// As [`crate::image::Image::allocate`].
    pub(super) fn allocate_at(&self, at: u64, len: u64, fill: &mut Fill<'_>) -> Result<u64> {
        if !self.write {
            return Err(Error::read_only());
        }
        let shape = self.shape.load_full();
        let Some(claim) = self.claim(&shape, at, len)? else {
            return Ok(0);
        };
        let done = match claim.work {
            Work::Block(spot) => self.fill_block(&shape, &claim, spot, at..at + len, fill),
            Work::Sectors(host) => self.fill_sectors(&claim, host, fill),
        };
        self.space.lock().release(&claim.guest);
        self.changed.notify_all();
        done.map(|end| end.min(at + len) - at)
    }

    /// Reserves what the bytes from `at` need; `None` where they have it, or had to be waited for.
    fn claim(&self, shape: &Shape, at: u64, len: u64) -> Result<Option<Claim>> {
        let mut space = self.space.lock();
        let index = self.blocks.index(at);
        let block = self.blocks.guest(index);
        let host = self.locate(shape, index, Wait::Yes)?;
        let guest = match host {
            None => block,
            Some(host) => {
                let sectors = self.sectors(index, &(at..at + len));
                let first = sectors.start;
                let run = self.bitmaps.run(&*self.storage, host, sectors, Wait::Yes)?;
                if run.present || shape.batmap().is_some_and(|m| m.is_full(index)) {
                    return Ok(None);
                }
                let start = block.start + first * SECTOR;
                start..start + run.count * SECTOR
            }
        };
        if space.is_busy(&guest) {
            self.changed.wait(&mut space);
            return Ok(None);
        }
        let work = match host {
            None => Work::Block(self.take(&mut space, shape, index)?),
            Some(host) => Work::Sectors(host),
        };
        space.busy.push(guest.clone());
        Ok(Some(Claim { index, guest, work }))
    }

    /// The sectors within block `index` that a guest range touches.
    fn sectors(&self, index: u64, guest: &Range<u64>) -> Range<u64> {
        let block = self.blocks.guest(index);
        let part = range::intersect(guest, &block).unwrap_or(block.start..block.start);
        (part.start - block.start) / SECTOR..(part.end - block.start).div_ceil(SECTOR)
    }

    /// Fills and publishes a new block; the end of what is there then.
    fn fill_block(
        &self,
        shape: &Shape,
        claim: &Claim,
        spot: Spot,
        request: Range<u64>,
        fill: &mut Fill<'_>,
    ) -> Result<u64> {
        let sectors = match self.kind {
            // QEMU reads no bitmaps in dynamic disks, so all sectors are there and zero.
            Kind::Dynamic | Kind::Fixed => 0..self.blocks.sectors(),
            Kind::Differencing => self.sectors(claim.index, &request),
        };
        let start = claim.guest.start;
        let guest = start + sectors.start * SECTOR..start + sectors.end * SECTOR;
        let filled = self.fill_space(spot, guest.clone(), sectors, start, fill);
        if let Err(e) = filled {
            self.give_back(&mut self.space.lock(), spot.host);
            return Err(e);
        }
        // From here on the file may name the space, whatever the answer: it is not given back.
        let word = u32::try_from(spot.host / SECTOR)
            .map_err(|_| Error::new(ErrorKind::NoSpace, "the file is beyond 2 TiB"))?;
        shape.table.publish(&*self.storage, claim.index, word)?;
        Ok(guest.end)
    }

    /// Has a new block's data written, and its bitmap, and waits until both are on stable media,
    /// unless a power cut that leaves only the block's table word leaves what was there before.
    fn fill_space(
        &self,
        spot: Spot,
        guest: Range<u64>,
        sectors: Range<u64>,
        block_start: u64,
        fill: &mut Fill<'_>,
    ) -> Result<()> {
        let stamp = self.syncs.stamp();
        let bits = match self.kind {
            // The bits of the padding too, as other writers set them.
            Kind::Dynamic | Kind::Fixed => 0..self.blocks.bitmap * 8,
            Kind::Differencing => sectors,
        };
        fill(Slot {
            storage: &*self.storage,
            host: spot.host + self.blocks.bitmap + (guest.start - block_start),
            guest,
            old: self.old(),
            zeroed: spot.zeroed,
        })?;
        self.bitmaps
            .create(&*self.storage, spot.host, self.blocks.bitmap, bits)?;
        match spot.ready && self.kind == Kind::Dynamic {
            true => Ok(()),
            false => self.ordered(stamp),
        }
    }

    /// Fills sectors of a block that has space, then sets their bits; the end of what is there.
    fn fill_sectors(&self, claim: &Claim, host: u64, fill: &mut Fill<'_>) -> Result<u64> {
        let start = self.blocks.guest(claim.index).start;
        let stamp = self.syncs.stamp();
        fill(Slot {
            guest: claim.guest.clone(),
            storage: &*self.storage,
            host: host + self.blocks.bitmap + (claim.guest.start - start),
            old: self.old(),
            // Under a bit that is 0 there may be anything.
            zeroed: false,
        })?;
        self.ordered(stamp)?;
        let sectors = self.sectors(claim.index, &claim.guest);
        self.bitmaps.set(&*self.storage, host, sectors)?;
        Ok(claim.guest.end)
    }

    fn old(&self) -> Old<'static> {
        match self.kind {
            Kind::Differencing => Old::Below,
            Kind::Dynamic | Kind::Fixed => Old::Zero,
        }
    }

    /// Takes the space of whole blocks back, so that they read as zeroes.
    ///
    /// # Errors
    /// `Unsupported` in differencing disks, which would show the parent; where XenServer's batmap
    /// names the blocks; and where blocks lie upon each other.
    pub(super) fn free_blocks(&self, guest: &Range<u64>) -> Result<()> {
        if !self.write {
            return Err(Error::read_only());
        }
        let shape = self.shape.load_full();
        if self.kind == Kind::Differencing || shape.batmap().is_some() {
            return Err(Error::unsupported("the blocks of this disk are kept"));
        }
        if !self.is_disjoint(&mut self.space.lock(), &shape)? {
            return Err(Error::unsupported("blocks lie upon each other"));
        }
        let blocks = guest.start.div_ceil(self.blocks.data)..guest.end.div_ceil(self.blocks.data);
        let mut index = blocks.start;
        while index < blocks.end {
            let end = blocks.end.min(index + FREE_STEP);
            self.free_some(&shape, index..end)?;
            index = end;
        }
        Ok(())
    }

    fn free_some(&self, shape: &Shape, blocks: Range<u64>) -> Result<()> {
        let mut space = self.space.lock();
        let guest = blocks.start * self.blocks.data..blocks.end * self.blocks.data;
        while space.is_busy(&guest) {
            self.changed.wait(&mut space);
        }
        let mut slots = Vec::new();
        let mut result = Ok(());
        for index in blocks {
            result = self.free_one(shape, index, &mut slots);
            if result.is_err() {
                break;
            }
        }
        self.free(&mut space, slots);
        result
    }

    fn free_one(&self, shape: &Shape, index: u64, slots: &mut Vec<u32>) -> Result<()> {
        if let Some(host) = self.locate(shape, index, Wait::Yes)? {
            shape.table.publish(&*self.storage, index, UNUSED)?;
            slots.extend(u32::try_from(host / SECTOR));
        }
        Ok(())
    }

    /// As [`crate::image::Image::zero`].
    pub(super) fn zero_blocks(&self, guest: &Range<u64>, how: Zeroing) -> Result<()> {
        match how {
            Zeroing::MayUnmap => self.free_blocks(guest),
            Zeroing::KeepSpace => Err(Error::unsupported("freed blocks do not keep their space")),
        }
    }

    /// As [`crate::image::Image::flush`].
    pub(super) fn flush_all(&self) -> Result<()> {
        if !self.write {
            return Ok(());
        }
        self.complete(&mut self.space.lock(), &self.shape.load())?;
        self.syncs.flush(&*self.storage)?;
        self.punch_ready(&mut self.space.lock());
        Ok(())
    }

    fn assign_ranges(&self, ranges: &[Range<u64>]) -> Result<Vec<Range<u64>>> {
        let shape = self.shape.load_full();
        let mut space = self.space.lock();
        let mut pieces = Vec::new();
        for guest in ranges {
            let end = guest.end.min(shape.size);
            let blocks = self.blocks.index(guest.start)..end.div_ceil(self.blocks.data);
            let mut index = blocks.start;
            while index < blocks.end {
                let free = |i: u64| -> Result<bool> {
                    let word = shape.table.get(&*self.storage, i, Wait::Yes)?;
                    Ok(word == UNUSED
                        && !space.is_assigned(i)
                        && !space.is_busy(&self.blocks.guest(i)))
                };
                let mut count = 0;
                while index + count < blocks.end && free(index + count)? {
                    count += 1;
                }
                if count > 0 {
                    let host = self.assign_run(&mut space, &shape, index, count)?;
                    self.pieces(host.start, index..index + count, guest, &mut pieces);
                }
                index += count.max(1);
            }
        }
        Ok(pieces)
    }

    /// The parts of newly assigned blocks that a guest range touches, bitmaps included.
    fn pieces(
        &self,
        mut host: u64,
        blocks: Range<u64>,
        guest: &Range<u64>,
        pieces: &mut Vec<Range<u64>>,
    ) {
        for index in blocks {
            let sectors = self.sectors(index, guest);
            let data = host + self.blocks.bitmap;
            let mut piece = data + sectors.start * SECTOR..data + sectors.end * SECTOR;
            if sectors.start == 0 {
                piece.start = host;
            }
            match pieces.last_mut() {
                Some(last) if piece.start >= last.end && piece.start - last.end <= RESERVE_GAP => {
                    last.end = piece.end;
                }
                _ => pieces.push(piece),
            }
            host += self.blocks.stride();
        }
    }
}

impl Layout for Sparse {
    fn assign(&self, ranges: &[Range<u64>]) -> Result<()> {
        if !self.write {
            return Err(Error::read_only());
        }
        for piece in self.assign_ranges(ranges)? {
            match self.storage.reserve(piece) {
                Err(e) if e.kind() == ErrorKind::Unsupported => break,
                done => done?,
            }
        }
        Ok(())
    }
}

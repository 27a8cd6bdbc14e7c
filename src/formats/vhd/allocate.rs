//! Giving bytes space, and taking it back: reserve under the lock, fill without it, publish.

use std::ops::Range;

use crate::error::ErrorKind;
use crate::error::{Error, Result};
use crate::formats::vhd::footer::Kind;
use crate::formats::vhd::geometry::SECTOR;
use crate::formats::vhd::layout::UNUSED;
use crate::formats::vhd::space::Spot;
use crate::formats::vhd::sparse::{Shape, Sparse};
use crate::image::reserve::Reserved;
use crate::image::{Fill, Layout, Old, Slot, Wait};
use crate::storage::Zeroing;
use crate::util::range;

/// Blocks freed under one hold of the lock.
const FREE_STEP: u64 = 1024;
/// Pieces to reserve that are no further apart than this are reserved as one.
const RESERVE_GAP: u64 = 8192;

/// What a thread has reserved, to fill and publish.
#[derive(Debug)]
struct Claim<'a> {
    index: u64,
    /// Guest bytes that nobody else fills meanwhile.
    guest: Range<u64>,
    work: Work<'a>,
    _reserved: Reserved<'a>,
}

#[derive(Debug)]
enum Work<'a> {
    /// A block without space: it gets this.
    Block(Taken<'a>),
    /// Sectors that the block at this offset does not have yet.
    Sectors(u64),
}

/// Space that was taken for a block and that nothing names yet; given back where that stays so.
#[derive(Debug)]
struct Taken<'a> {
    image: &'a Sparse,
    spot: Spot,
    named: bool,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if !self.named {
            let mut space = self.image.space.lock();
            self.image.give_back(&mut space, self.spot.host);
        }
    }
}

impl Sparse {
    /// As [`crate::image::Image::allocate`].
    pub(super) fn allocate_at(&self, at: u64, len: u64, fill: &mut Fill<'_>) -> Result<u64> {
        if !self.write {
            return Err(Error::read_only());
        }
        let shape = self.shape.load_full();
        let Some(mut claim) = self.claim(&shape, at, len)? else {
            return Ok(0);
        };
        let (index, guest) = (claim.index, &claim.guest);
        let end = match &mut claim.work {
            Work::Block(taken) => self.fill_block(&shape, index, taken, at..at + len, fill)?,
            Work::Sectors(host) => self.fill_sectors(index, guest, *host, fill)?,
        };
        Ok(end.min(at + len) - at)
    }

    /// Reserves what the bytes from `at` need; `None` where they have it, or had to be waited for.
    fn claim(&self, shape: &Shape, at: u64, len: u64) -> Result<Option<Claim<'_>>> {
        let index = self.blocks.index(at);
        let Some(missing) = self.missing(shape, index, at..at + len)? else {
            return Ok(None);
        };
        let (host, guest) = missing.clone();
        let Some(reserved) = self.reservations.reserve(guest.clone()) else {
            return Ok(None);
        };
        // From here on it cannot change; until here it could.
        if self.missing(shape, index, at..at + len)? != Some(missing) {
            return Ok(None);
        }
        let work = match host {
            Some(host) => Work::Sectors(host),
            None => Work::Block(Taken {
                image: self,
                spot: self.take(&mut self.space.lock(), shape, index)?,
                named: false,
            }),
        };
        Ok(Some(Claim {
            index,
            guest,
            work,
            _reserved: reserved,
        }))
    }

    /// Where block `index` is, and the bytes that it does not have from the start of `request` on:
    /// the whole block where it has no space; `None` where it has them.
    fn missing(
        &self,
        shape: &Shape,
        index: u64,
        request: Range<u64>,
    ) -> Result<Option<(Option<u64>, Range<u64>)>> {
        let block = self.blocks.guest(index);
        let Some(host) = self.locate(shape, index, Wait::Yes)? else {
            return Ok(Some((None, block)));
        };
        let sectors = self.sectors(index, &request);
        let start = block.start + sectors.start * SECTOR;
        let run = self.bitmaps.run(&*self.storage, host, sectors, Wait::Yes)?;
        if run.present || shape.batmap().is_some_and(|m| m.is_full(index)) {
            return Ok(None);
        }
        Ok(Some((Some(host), start..start + run.count * SECTOR)))
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
        index: u64,
        taken: &mut Taken<'_>,
        request: Range<u64>,
        fill: &mut Fill<'_>,
    ) -> Result<u64> {
        let sectors = match self.kind {
            // QEMU reads no bitmaps in dynamic disks, so all sectors are there and zero.
            Kind::Dynamic | Kind::Fixed => 0..self.blocks.sectors(),
            Kind::Differencing => self.sectors(index, &request),
        };
        let start = self.blocks.guest(index).start;
        let guest = start + sectors.start * SECTOR..start + sectors.end * SECTOR;
        self.fill_space(taken.spot, guest.clone(), sectors, start, fill)?;
        let word = u32::try_from(taken.spot.host / SECTOR)
            .map_err(|_| Error::new(ErrorKind::NoSpace, "the file is beyond 2 TiB"))?;
        // From here on the file may name the space, whatever the answer.
        taken.named = true;
        shape.table.publish(&*self.storage, index, word)?;
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
    fn fill_sectors(
        &self,
        index: u64,
        guest: &Range<u64>,
        host: u64,
        fill: &mut Fill<'_>,
    ) -> Result<u64> {
        let start = self.blocks.guest(index).start;
        let stamp = self.syncs.stamp();
        fill(Slot {
            guest: guest.clone(),
            storage: &*self.storage,
            host: host + self.blocks.bitmap + (guest.start - start),
            old: self.old(),
            // Under a bit that is 0 there may be anything.
            zeroed: false,
        })?;
        self.ordered(stamp)?;
        let sectors = self.sectors(index, guest);
        self.bitmaps.set(&*self.storage, host, sectors)?;
        Ok(guest.end)
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
    /// names the blocks; on storage of fixed length; and where blocks lie upon each other.
    pub(super) fn free_blocks(&self, guest: &Range<u64>) -> Result<()> {
        if !self.write {
            return Err(Error::read_only());
        }
        let shape = self.shape.load_full();
        if self.kind == Kind::Differencing || shape.batmap().is_some() || self.keeps_blocks() {
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
        let guest = blocks.start * self.blocks.data..blocks.end * self.blocks.data;
        let _reserved = self.reservations.wait(&guest);
        let mut space = self.space.lock();
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
                    // Who begins to fill it from here on takes what is assigned to it.
                    Ok(!self.reservations.holds(&self.blocks.guest(i))
                        && !space.is_assigned(i)
                        && shape.table.get(&*self.storage, i, Wait::Yes)? == UNUSED)
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

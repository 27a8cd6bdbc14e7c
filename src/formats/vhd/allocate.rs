//! Giving bytes space, and taking it back: reserve under the lock, fill without it, publish.

use std::ops::Range;

use crate::error::ErrorKind;
use crate::error::{Error, Result};
use crate::formats::vhd::footer::Kind;
use crate::formats::vhd::geometry::SECTOR;
use crate::formats::vhd::layout::UNUSED;
use crate::formats::vhd::space::Spot;
use crate::formats::vhd::sparse::{Shape, Sparse};
use crate::image::open::WriteOrder;
use crate::image::reserve::Reserved;
use crate::image::{Fill, Layout, Old, Slot, Wait};
use crate::storage::Zeroing;
use crate::util::{align, range};

/// Blocks freed under one hold of the lock.
const FREE_STEP: u64 = 1024;
/// Pieces to reserve that are no further apart than this are reserved as one.
const RESERVE_GAP: u64 = 8192;
/// Bytes whose way to stable media begins before the sync.
const BEGIN_EARLY: u64 = 1 << 20;

/// Blocks that are given space, or sectors, by one sync at most.
const MAX_CLAIMS: usize = 64;

/// What a thread has reserved, to fill and publish.
#[derive(Debug)]
struct Claim<'a> {
    index: u64,
    /// Guest bytes that the block gets.
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
        self.allocate_around(&(at..at + len), &(at..at + len), fill)
    }

    /// As [`crate::image::Image::allocate_ahead`].
    pub(super) fn allocate_following(&self, at: u64, len: u64, fill: &mut Fill<'_>) -> Result<u64> {
        let request = at..at + len;
        // In a dynamic disk what comes next has space without a sync, or is zero.
        let mut around = match (self.kind, self.order) {
            (Kind::Differencing, WriteOrder::Ordered) => self.followed.around(&request),
            _ => request.clone(),
        };
        let size = self.shape.load().size.next_multiple_of(SECTOR);
        around.end = around.end.min(size.max(request.end));
        self.allocate_around(&request, &around, fill)
    }

    fn allocate_around(
        &self,
        request: &Range<u64>,
        around: &Range<u64>,
        fill: &mut Fill<'_>,
    ) -> Result<u64> {
        if !self.write {
            return Err(Error::read_only());
        }
        let shape = self.shape.load_full();
        let mut claims = self.claims(&shape, request, around)?;
        match claims.is_empty() {
            true => Ok(0),
            false => self.carry_out(&shape, &mut claims, request, fill),
        }
    }

    /// Reserves what the bytes from the start of `request` on need, block by block without a gap;
    /// nothing where they have it, or had to be waited for.
    fn claims(
        &self,
        shape: &Shape,
        request: &Range<u64>,
        around: &Range<u64>,
    ) -> Result<Vec<Claim<'_>>> {
        let mut claims: Vec<Claim<'_>> = Vec::new();
        let mut at = request.start;
        while at < around.end && claims.len() < MAX_CLAIMS {
            let index = self.blocks.index(at);
            let block = self.blocks.guest(index);
            let Some(missing) = self.missing(shape, index, at, around)? else {
                break;
            };
            let (host, guest) = missing.clone();
            let busy = if host.is_some() { &guest } else { &block }.clone();
            let reserved = match claims.is_empty() {
                true => self.reservations.reserve(busy),
                // Who waits for others holds nothing that they could wait for.
                false => self.reservations.try_reserve(busy),
            };
            let Some(reserved) = reserved else { break };
            // From here on it cannot change; until here it could.
            if self.missing(shape, index, at, around)? != Some(missing) {
                break;
            }
            let work = match host {
                Some(host) => Work::Sectors(host),
                None => match self.take(&mut self.space.lock(), shape, index) {
                    Ok(spot) => Work::Block(Taken {
                        image: self,
                        spot,
                        named: false,
                    }),
                    // Those before it can be written.
                    Err(_) if !claims.is_empty() => break,
                    Err(e) => return Err(e),
                },
            };
            at = guest.end;
            let whole = guest.end == block.end;
            claims.push(Claim {
                index,
                guest,
                work,
                _reserved: reserved,
            });
            if !whole {
                break;
            }
        }
        Ok(claims)
    }

    /// Where block `index` is, and what of the bytes `around` `at` it does not have and is to get;
    /// `None` where it has the byte at `at`.
    fn missing(
        &self,
        shape: &Shape,
        index: u64,
        at: u64,
        around: &Range<u64>,
    ) -> Result<Option<(Option<u64>, Range<u64>)>> {
        let block = self.blocks.guest(index);
        let wanted = self.sectors(index, around);
        let bytes = |sectors: Range<u64>| {
            block.start + sectors.start * SECTOR..block.start + sectors.end * SECTOR
        };
        let Some(host) = self.locate(shape, index, Wait::Yes)? else {
            return Ok(Some(match self.kind {
                // QEMU reads no bitmaps in dynamic disks, so all sectors are there and zero.
                Kind::Dynamic | Kind::Fixed => (None, block),
                Kind::Differencing => (None, bytes(wanted)),
            }));
        };
        let first = (at - block.start) / SECTOR;
        for from in [wanted.start, first] {
            let run = self
                .bitmaps
                .run(&*self.storage, host, from..wanted.end, Wait::Yes)?;
            if !run.present && from + run.count > first {
                let full = shape.batmap().is_some_and(|m| m.is_full(index));
                return Ok((!full).then(|| (Some(host), bytes(from..from + run.count))));
            }
        }
        Ok(None)
    }

    /// Fills what was claimed, waits once until that is on stable media, and publishes it; how much
    /// of the request is there then.
    fn carry_out(
        &self,
        shape: &Shape,
        claims: &mut Vec<Claim<'_>>,
        request: &Range<u64>,
        fill: &mut Fill<'_>,
    ) -> Result<u64> {
        let stamp = self.syncs.stamp();
        self.fill_claims(claims, request, fill)?;
        // A power cut that leaves only the table word of a block that is ready leaves what was there
        // before.
        let ready = |c: &Claim<'_>| matches!(&c.work, Work::Block(taken) if taken.spot.ready);
        let free = self.kind == Kind::Dynamic && claims.iter().all(ready);
        if !free {
            self.ordered(stamp)?;
        }
        claims
            .iter_mut()
            .try_for_each(|claim| self.publish(shape, claim))?;
        let (Some(first), Some(last)) = (claims.first(), claims.last()) else {
            return Ok(0);
        };
        if self.kind == Kind::Differencing {
            self.followed.worked_on(first.guest.start..last.guest.end);
        }
        Ok(last.guest.end.min(request.end) - request.start)
    }

    /// Fills what was claimed.  Where that fails for what was not asked for, it is no longer claimed.
    fn fill_claims(
        &self,
        claims: &mut Vec<Claim<'_>>,
        request: &Range<u64>,
        fill: &mut Fill<'_>,
    ) -> Result<()> {
        let mut done = 0;
        for claim in claims.iter_mut() {
            let asked = range::intersect(&claim.guest, request);
            match self.fill_claim(claim, request, fill) {
                Ok(()) => done += 1,
                Err(e) if asked.is_some() => return Err(e),
                Err(_) => break,
            }
        }
        claims.truncate(done);
        Ok(())
    }

    fn fill_claim(
        &self,
        claim: &mut Claim<'_>,
        request: &Range<u64>,
        fill: &mut Fill<'_>,
    ) -> Result<()> {
        let mut parts = vec![claim.guest.clone()];
        if self.kind == Kind::Differencing
            && let Some(asked) = range::intersect(&claim.guest, request)
        {
            // What was asked for first: the rest may fail.
            let asked = align::down(asked.start, SECTOR)..asked.end.next_multiple_of(SECTOR);
            let (before, after) = (claim.guest.start..asked.start, asked.end..claim.guest.end);
            parts = vec![asked, before, after];
        }
        parts.retain(|part| !part.is_empty());
        for (index, part) in parts.iter().enumerate() {
            if let Err(e) = self.fill_part(claim, part, fill) {
                if index == 0 {
                    return Err(e);
                }
                claim.guest = parts[0].clone();
                break;
            }
        }
        match &claim.work {
            Work::Block(taken) => {
                let bits = match self.kind {
                    // The bits of the padding too, as other writers set them.
                    Kind::Dynamic | Kind::Fixed => 0..self.blocks.bitmap * 8,
                    Kind::Differencing => self.sectors(claim.index, &claim.guest),
                };
                self.bitmaps
                    .create(&*self.storage, taken.spot.host, self.blocks.bitmap, bits)
            }
            Work::Sectors(_) => Ok(()),
        }
    }

    fn fill_part(&self, claim: &Claim<'_>, part: &Range<u64>, fill: &mut Fill<'_>) -> Result<()> {
        let (block, zeroed) = match &claim.work {
            Work::Block(taken) => (taken.spot.host, taken.spot.zeroed),
            // Under a bit that is 0 there may be anything.
            Work::Sectors(host) => (*host, false),
        };
        let within = part.start - self.blocks.guest(claim.index).start;
        let host = block + self.blocks.bitmap + within;
        fill(Slot {
            guest: part.clone(),
            storage: &*self.storage,
            host,
            old: match self.kind {
                Kind::Differencing => Old::Below,
                Kind::Dynamic | Kind::Fixed => Old::Zero,
            },
            zeroed,
        })?;
        if self.kind == Kind::Differencing && range::len(part) >= BEGIN_EARLY {
            // The sync that follows has less to wait for.
            self.storage.write_back(host..host + range::len(part));
        }
        Ok(())
    }

    /// Shows what was filled to readers.
    fn publish(&self, shape: &Shape, claim: &mut Claim<'_>) -> Result<()> {
        match &mut claim.work {
            Work::Block(taken) => {
                let word = u32::try_from(taken.spot.host / SECTOR)
                    .map_err(|_| Error::new(ErrorKind::NoSpace, "the file is beyond 2 TiB"))?;
                // From here on the file may name the space, whatever the answer.
                taken.named = true;
                shape.table.publish(&*self.storage, claim.index, word)
            }
            Work::Sectors(host) => {
                let sectors = self.sectors(claim.index, &claim.guest);
                self.bitmaps.set(&*self.storage, *host, sectors)
            }
        }
    }

    /// The sectors within block `index` that a guest range touches.
    fn sectors(&self, index: u64, guest: &Range<u64>) -> Range<u64> {
        let block = self.blocks.guest(index);
        let part = range::intersect(guest, &block).unwrap_or(block.start..block.start);
        (part.start - block.start) / SECTOR..(part.end - block.start).div_ceil(SECTOR)
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

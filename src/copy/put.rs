//! Writing pieces: straight to where the target keeps them, or into space that it gives.

use std::ops::Range;
use std::sync::atomic::AtomicBool;

use crate::chain::Chain;
use crate::copy::engine::Job;
use crate::copy::pace::{self, Pace};
use crate::copy::plan::Before;
use crate::copy::progress::Progress;
use crate::copy::room::{Density, Known, Room};
use crate::copy::salvage::Reader;
use crate::copy::scan::{Content, IO_STEP, Piece, Runs, Scratch};
use crate::copy::transfer::{Gaps, Sieve, Transfer};
use crate::error::Result;
use crate::image::{Slot, Source, Wait};
use crate::storage::{Storage, Zeroing, write_zeroes, zero_or_write};
use crate::util::align::{clamp_len, len64};
use crate::util::range::{self, intersect};

/// Writes pieces to a target.
pub(super) struct Putter<'a> {
    pub(super) target: &'a Chain,
    pub(super) reader: Reader<'a>,
    pub(super) before: Before,
    pub(super) pace: Option<Pace>,
    pub(super) progress: &'a dyn Progress,
    /// How zero runs in stored data are found; `None`: they are data.
    pub(super) runs: Option<Runs>,
    /// Whether the host may still be able to reserve space.
    pub(super) reserve: AtomicBool,
}

/// Where guest bytes go: guest offset `guest` is at `host`.
#[derive(Clone, Copy)]
struct Home<'a> {
    storage: &'a dyn Storage,
    guest: u64,
    host: u64,
    /// What becomes of zero runs in stored data.
    gaps: Gaps,
}

impl Home<'_> {
    fn host(&self, guest: u64) -> u64 {
        self.host + (guest - self.guest)
    }

    fn hosts(&self, guest: &Range<u64>) -> Range<u64> {
        self.host(guest.start)..self.host(guest.end)
    }
}

impl Putter<'_> {
    /// Writes the pieces of a work range, which ascend.
    pub(super) fn put(&self, job: &Job, pieces: &[Piece<'_>], scratch: &mut Scratch) -> Result<()> {
        let _ticket = self.target.enter();
        let top = self.target.top();
        let mut at = job.range.start;
        let mut rest = pieces;
        while let Some((piece, later)) = rest.split_first() {
            at = at.max(piece.range.start);
            if at >= piece.range.end {
                rest = later;
                continue;
            }
            self.progress.check()?;
            at = match piece.from {
                Content::Done => piece.range.end,
                Content::Zeroes => {
                    self.target.zero(at..piece.range.end, Zeroing::MayUnmap)?;
                    piece.range.end
                }
                _ => match top.map(at, job.range.end - at, Wait::Yes)? {
                    crate::image::Run {
                        len,
                        source:
                            Source::Stored {
                                storage,
                                host,
                                writable: true,
                            },
                    } => {
                        let home = Home {
                            storage,
                            guest: at,
                            host,
                            gaps: match self.before {
                                Before::Zeroes => Gaps::GiveBack,
                                Before::Unknown | Before::Backed | Before::Itself => Gaps::Clear,
                            },
                        };
                        self.stored(home, at..at + len, rest, scratch)?
                    }
                    _ if matches!(self.before, Before::Unknown | Before::Itself) => {
                        self.through(at, piece, scratch)?
                    }
                    _ => self.allocate(job, at..piece.range.end, pieces, scratch)?,
                },
            };
        }
        Ok(())
    }

    /// Writes data pieces that begin in `run`, up to its end or to a piece that is not data; how
    /// far that is.
    fn stored(
        &self,
        home: Home<'_>,
        run: Range<u64>,
        pieces: &[Piece<'_>],
        scratch: &mut Scratch,
    ) -> Result<u64> {
        let count = pieces
            .iter()
            .take_while(|p| is_data(p) && p.range.start < run.end)
            .count();
        let pieces = pieces.get(..count).unwrap_or_default();
        let mut density = std::mem::take(&mut scratch.density);
        let mut room = self.room(home, &run, pieces, &mut density);
        let mut reached = run.start;
        for piece in pieces {
            let Some(part) = intersect(&piece.range, &run) else {
                continue;
            };
            self.write(home, piece, &part, &mut room, scratch)?;
            reached = part.end;
        }
        scratch.density = density;
        Ok(reached)
    }

    /// Writes the piece at `at` through the chain, which keeps what the piece does not cover.
    fn through(&self, at: u64, piece: &Piece<'_>, scratch: &mut Scratch) -> Result<u64> {
        let step = (piece.range.end - at).min(len64(IO_STEP));
        self.pace(step)?;
        let part = at..at + step;
        if let Content::Kept(first) = piece.from {
            let bytes = kept(scratch, piece, first, &part);
            self.target.write_at(bytes, at)?;
            return Ok(part.end);
        }
        let buf = &mut scratch.io()[..clamp_len(step, IO_STEP)];
        match piece.from {
            Content::Stored { storage, host } => {
                storage.read_at(buf, host + (at - piece.range.start))?;
            }
            Content::Read => self.reader.read_at(buf, at)?,
            Content::Fill | Content::Zeroes | Content::Done | Content::Kept(_) => buf.fill(0),
        }
        self.target.write_at(buf, at)?;
        Ok(part.end)
    }

    /// Has the target give space to a range, and fills that space with whatever pieces fall into
    /// it; how far it is filled.
    fn allocate(
        &self,
        job: &Job,
        range: Range<u64>,
        pieces: &[Piece<'_>],
        scratch: &mut Scratch,
    ) -> Result<u64> {
        let at = range.start;
        let mut filled = at;
        let done = self
            .target
            .top()
            .allocate(at, range.end - at, &mut |slot| {
                self.fill(job, &slot, pieces, scratch)?;
                filled = filled.max(slot.guest.end.min(job.range.end));
                Ok(())
            })?;
        Ok(if done == 0 { at } else { filled.max(at + done) })
    }

    /// Leaves a slot as the sources have it.
    fn fill(
        &self,
        job: &Job,
        slot: &Slot<'_>,
        pieces: &[Piece<'_>],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let home = Home {
            storage: slot.storage,
            guest: slot.guest.start,
            host: slot.host,
            gaps: match slot.zeroed {
                true => Gaps::GiveBack,
                false => Gaps::Clear,
            },
        };
        let first = pieces.partition_point(|p| p.range.end <= slot.guest.start);
        let end = pieces.partition_point(|p| p.range.start < slot.guest.end);
        let pieces = pieces.get(first..end).unwrap_or_default();
        let mut density = std::mem::take(&mut scratch.density);
        let mut room = match self.target.top().as_layout() {
            None => self.room(home, &slot.guest, pieces, &mut density),
            Some(_) => Room::assigned(slot.storage, &self.reserve, &mut density),
        };
        let mut at = slot.guest.start;
        for piece in pieces {
            let Some(part) = intersect(&piece.range, &slot.guest) else {
                continue;
            };
            self.gap(job, slot, home, at..part.start, &mut room, scratch)?;
            match piece.from {
                Content::Zeroes => zeroes(slot, home, &part)?,
                _ => self.write(home, piece, &part, &mut room, scratch)?,
            }
            at = part.end;
        }
        self.gap(job, slot, home, at..slot.guest.end, &mut room, scratch)?;
        scratch.density = density;
        Ok(())
    }

    /// Writes what no piece covers: zeroes where pieces leave out zeroes, else what the sources
    /// hold.
    fn gap(
        &self,
        job: &Job,
        slot: &Slot<'_>,
        home: Home<'_>,
        range: Range<u64>,
        room: &mut Room<'_>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let inside = range.start >= job.range.start && range.end <= job.range.end;
        if inside && self.before == Before::Zeroes {
            return zeroes(slot, home, &range);
        }
        self.read_write(home, &range, room, scratch)
    }

    /// Writes a part of a piece to its home.
    fn write(
        &self,
        home: Home<'_>,
        piece: &Piece<'_>,
        part: &Range<u64>,
        room: &mut Room<'_>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        if matches!(piece.from, Content::Kept(_) | Content::Fill) {
            room.before(home.host(part.start), Known::Written)?;
        }
        match piece.from {
            Content::Stored { storage, host } => {
                let transfer = Transfer {
                    src: storage,
                    from: host + (part.start - piece.range.start),
                    dst: home.storage,
                    to: home.hosts(part),
                    runs: self.runs,
                    gaps: home.gaps,
                };
                transfer.run(&mut scratch.reader, room, &|bytes| self.pace(bytes))
            }
            Content::Read => self.read_write(home, part, room, scratch),
            Content::Kept(first) => {
                self.pace(range::len(part))?;
                let bytes = kept(scratch, piece, first, part);
                home.storage.write_at(bytes, home.host(part.start))
            }
            Content::Fill => self.write_zeroes(home, part),
            Content::Zeroes | Content::Done => Ok(()),
        }
    }

    fn read_write(
        &self,
        home: Home<'_>,
        range: &Range<u64>,
        room: &mut Room<'_>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let start = home.host(range.start);
        let mut sieve = Sieve::new(home.storage, start, self.runs, home.gaps, room);
        let mut at = range.start;
        while at < range.end {
            let len = clamp_len(range.end - at, IO_STEP);
            self.pace(len64(len))?;
            sieve.before(home.host(at))?;
            let buf = &mut scratch.io()[..len];
            self.reader.read_at(buf, at)?;
            sieve.put(buf, home.host(at), &|part, to| {
                home.storage.write_at(part, to)
            })?;
            at += len64(len);
        }
        sieve.finish(home.host(range.end))
    }

    fn write_zeroes(&self, home: Home<'_>, range: &Range<u64>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(len64(IO_STEP));
            self.pace(len)?;
            let host = home.host(at);
            write_zeroes(home.storage, host..host + len)?;
            at += len;
        }
        Ok(())
    }

    /// The space that pieces will take in their home, to be given ahead of the writes.
    fn room<'r>(
        &'r self,
        home: Home<'r>,
        run: &Range<u64>,
        pieces: &[Piece<'_>],
        density: &'r mut Density,
    ) -> Room<'r> {
        let ranges = pieces
            .iter()
            .filter(|p| takes_space(p))
            .filter_map(|p| Some(home.hosts(&intersect(&p.range, run)?)));
        Room::new(home.storage, ranges, &self.reserve, density)
    }

    /// Waits until `bytes` more may be moved, or the user wants to stop.
    fn pace(&self, bytes: u64) -> Result<()> {
        pace::wait(self.pace.as_ref(), bytes, self.progress)
    }
}

/// Whether a piece has bytes of its own, as opposed to zeroes that may be stated, or nothing.
fn is_data(piece: &Piece<'_>) -> bool {
    !matches!(piece.from, Content::Zeroes)
}

fn takes_space(piece: &Piece<'_>) -> bool {
    !matches!(piece.from, Content::Zeroes | Content::Done)
}

fn kept<'s>(scratch: &'s Scratch, piece: &Piece<'_>, first: usize, part: &Range<u64>) -> &'s [u8] {
    let start = first + clamp_len(part.start - piece.range.start, usize::MAX >> 1);
    let end = start + clamp_len(range::len(part), usize::MAX >> 1);
    &scratch.kept[start..end]
}

fn zeroes(slot: &Slot<'_>, home: Home<'_>, range: &Range<u64>) -> Result<()> {
    match slot.zeroed {
        true => Ok(()),
        false => zero_or_write(home.storage, home.hosts(range), Zeroing::MayUnmap),
    }
}

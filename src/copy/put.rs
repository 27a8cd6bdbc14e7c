//! Writing pieces: straight to where the target keeps them, or into space that it gives.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::chain::Chain;
use crate::copy::engine::Job;
use crate::copy::pace::{self, Pace};
use crate::copy::plan::Before;
use crate::copy::progress::Progress;
use crate::copy::salvage::Reader;
use crate::copy::scan::{Content, IO_STEP, Piece, Runs, Scratch};
use crate::copy::transfer::{Gaps, Transfer};
use crate::error::{ErrorKind, Result};
use crate::image::{Slot, Source, Wait};
use crate::storage::{Storage, Zeroing, zero_or_write};
use crate::util::align::{clamp_len, len64};
use crate::util::range::{self, intersect};

/// Pieces closer together than this are given space together: one larger piece costs the host
/// less than two.
const RESERVE_GAP: u64 = 64 << 10;
/// Less than this is not worth a call of its own.
const RESERVE_MIN: u64 = 128 << 10;

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
        self.reserve(home, &run, pieces)?;
        let mut reached = run.start;
        for piece in pieces {
            let Some(part) = intersect(&piece.range, &run) else {
                continue;
            };
            self.write(home, piece, &part, scratch)?;
            reached = part.end;
        }
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
        if self.target.top().as_layout().is_none() {
            self.reserve(home, &slot.guest, pieces)?;
        }
        let mut at = slot.guest.start;
        for piece in pieces {
            let Some(part) = intersect(&piece.range, &slot.guest) else {
                continue;
            };
            self.gap(job, slot, home, at..part.start, scratch)?;
            match piece.from {
                Content::Zeroes => zeroes(slot, home, &part)?,
                _ => self.write(home, piece, &part, scratch)?,
            }
            at = part.end;
        }
        self.gap(job, slot, home, at..slot.guest.end, scratch)
    }

    /// Writes what no piece covers: zeroes where pieces leave out zeroes, else what the sources
    /// hold.
    fn gap(
        &self,
        job: &Job,
        slot: &Slot<'_>,
        home: Home<'_>,
        range: Range<u64>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let inside = range.start >= job.range.start && range.end <= job.range.end;
        if inside && self.before == Before::Zeroes {
            return zeroes(slot, home, &range);
        }
        self.read_write(home, &range, scratch)
    }

    /// Writes a part of a piece to its home.
    fn write(
        &self,
        home: Home<'_>,
        piece: &Piece<'_>,
        part: &Range<u64>,
        scratch: &mut Scratch,
    ) -> Result<()> {
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
                transfer.run(&mut scratch.reader, &|bytes| self.pace(bytes))
            }
            Content::Read => self.read_write(home, part, scratch),
            Content::Kept(first) => {
                self.pace(range::len(part))?;
                let bytes = kept(scratch, piece, first, part);
                home.storage.write_at(bytes, home.host(part.start))
            }
            Content::Fill => self.write_zeroes(home, part, scratch),
            Content::Zeroes | Content::Done => Ok(()),
        }
    }

    fn read_write(&self, home: Home<'_>, range: &Range<u64>, scratch: &mut Scratch) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let len = clamp_len(range.end - at, IO_STEP);
            self.pace(len64(len))?;
            let buf = &mut scratch.io()[..len];
            self.reader.read_at(buf, at)?;
            home.storage.write_at(buf, home.host(at))?;
            at += len64(len);
        }
        Ok(())
    }

    fn write_zeroes(
        &self,
        home: Home<'_>,
        range: &Range<u64>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let buf = scratch.io();
        buf.fill(0);
        let mut at = range.start;
        while at < range.end {
            let len = clamp_len(range.end - at, IO_STEP);
            self.pace(len64(len))?;
            home.storage.write_at(&buf[..len], home.host(at))?;
            at += len64(len);
        }
        Ok(())
    }

    /// Has the host give space to the pieces in large parts, which costs less than giving it as
    /// they are written.
    fn reserve(&self, home: Home<'_>, run: &Range<u64>, pieces: &[Piece<'_>]) -> Result<()> {
        if !self.reserve.load(Ordering::Relaxed) {
            return Ok(());
        }
        let mut wanted: Option<Range<u64>> = None;
        for piece in pieces.iter().filter(|p| takes_space(p)) {
            let Some(part) = intersect(&piece.range, run) else {
                continue;
            };
            wanted = match wanted {
                Some(w) if part.start - w.end <= RESERVE_GAP => Some(w.start..part.end),
                Some(w) => {
                    self.reserve_one(home, &w)?;
                    Some(part)
                }
                None => Some(part),
            };
        }
        wanted.map_or(Ok(()), |w| self.reserve_one(home, &w))
    }

    fn reserve_one(&self, home: Home<'_>, range: &Range<u64>) -> Result<()> {
        if range::len(range) < RESERVE_MIN {
            return Ok(());
        }
        match home.storage.reserve(home.hosts(range)) {
            Err(e) if e.kind() == ErrorKind::Unsupported => {
                self.reserve.store(false, Ordering::Relaxed);
                Ok(())
            }
            // There are zeroes in it that need no space: perhaps the rest fits.
            Err(e) if e.kind() == ErrorKind::NoSpace => Ok(()),
            done => done,
        }
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

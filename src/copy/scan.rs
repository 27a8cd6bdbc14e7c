//! What of a work range must be written: extents planned, zero runs left out.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::chain::Chain;
use crate::copy::differ::Differ;
use crate::copy::engine::Job;
use crate::copy::find::{Found, Place};
use crate::copy::joined::Joined;
use crate::copy::plan::{Action, Before, Only, Space, action};
use crate::copy::room::Density;
use crate::copy::salvage::Reader;
use crate::copy::transfer::any_data;
use crate::error::{ErrorKind, Result};
use crate::image::{Source, Wait};
use crate::storage::{self, Storage};
use crate::util::align::{self, clamp_len, len64};
use crate::util::buf::nonzero;
use crate::util::range;

/// Smaller clusters than this are not looked at one by one.
const PROBE_MIN: u64 = 64 << 10;
/// Decoded bytes a worker keeps between scanning and writing.
pub(super) const KEEP: usize = 4 << 20;
/// Bytes that pass through a worker's buffer at a time.
pub(super) const IO_STEP: usize = 1 << 20;

/// A part of a work range that must be written, or is already.
#[derive(Debug, Clone)]
pub(super) struct Piece<'a> {
    /// Guest bytes of the target; never empty.
    pub(super) range: Range<u64>,
    /// What they shall be.
    pub(super) from: Content<'a>,
}

/// What a piece shall hold.
#[derive(Debug, Clone, Copy)]
pub(super) enum Content<'a> {
    /// The bytes at `host`; there may be zero runs among them.
    Stored {
        /// The object that holds them.
        storage: &'a dyn Storage,
        /// Offset there.
        host: u64,
    },
    /// What the sources read as.
    Read,
    /// Bytes that the worker keeps, from this offset on.
    Kept(usize),
    /// Zeroes, by whatever means.
    Zeroes,
    /// Zeroes that take space.
    Fill,
    /// What is there: it was shared.
    Done,
}

/// Buffers of one worker; they get memory when they are first used.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) kept: Vec<u8>,
    pub(super) io: Vec<u8>,
    pub(super) density: Density,
    pub(super) reader: storage::copy::Reader,
}

impl Scratch {
    /// The buffer bytes pass through.
    pub(super) fn io(&mut self) -> &mut [u8] {
        if self.io.is_empty() {
            self.io = vec![0; IO_STEP];
        }
        &mut self.io
    }

    /// Makes room for at most `len` more bytes to keep; their offset, and how many they are.
    fn keep(&mut self, len: u64) -> (usize, usize) {
        if self.kept.capacity() == 0 {
            self.kept.reserve_exact(KEEP);
        }
        let first = self.kept.len();
        let room = clamp_len(len, KEEP.saturating_sub(first));
        self.kept.resize(first + room, 0);
        (first, room)
    }
}

/// How zero runs are found in data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Runs {
    /// Units that are looked at as a whole, in bytes.
    pub(super) unit: u64,
    /// Shortest run that is left out, in bytes.
    pub(super) min: u64,
}

/// What scanning a work range needs to know.
pub(super) struct Scanner<'a> {
    pub(super) sources: &'a Joined,
    pub(super) target: &'a Chain,
    pub(super) reader: Reader<'a>,
    pub(super) before: Before,
    pub(super) space: Space,
    /// `None`: data is written whole.
    pub(super) runs: Option<Runs>,
    /// By source: whether sharing blocks with the target may still work.
    pub(super) share: Vec<AtomicBool>,
    /// What the backing image holds, for a target that has one.
    pub(super) differ: Option<Differ<'a>>,
    /// What alone is looked at.
    pub(super) only: Option<&'a Only<'a>>,
}

impl<'a> Scanner<'a> {
    /// The pieces of a work range, ascending.  The caller holds the sources' tickets.
    pub(super) fn scan(&self, job: &Job, scratch: &mut Scratch) -> Result<Vec<Piece<'a>>> {
        scratch.kept.clear();
        let Some(only) = self.only else {
            return self.scan_part(&job.range, scratch);
        };
        let mut pieces = Vec::new();
        let mut at = job.range.start;
        while let Some(part) = only(at..job.range.end) {
            // Nothing joins what lies on both sides of what is not looked at.
            pieces.append(&mut self.scan_part(&part, scratch)?);
            at = part.end;
        }
        Ok(pieces)
    }

    fn scan_part(&self, part: &Range<u64>, scratch: &mut Scratch) -> Result<Vec<Piece<'a>>> {
        let mut pieces = Vec::new();
        let mut at = part.start;
        while at < part.end {
            let found = self.reader.find(at, part.end - at)?;
            self.extent(at, &found, &mut pieces, scratch)?;
            at += found.len;
        }
        Ok(match self.before {
            Before::Unknown => with_zeroes(pieces, part),
            Before::Zeroes | Before::Backed | Before::Itself => pieces,
        })
    }

    fn extent(
        &self,
        at: u64,
        found: &Found<'a>,
        pieces: &mut Vec<Piece<'a>>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        match action(found.state(), self.before, self.space) {
            Action::Copy => self.copy(at, found, pieces, scratch),
            Action::Differ => match &self.differ {
                Some(differ) => differ.scan(at, found, pieces, scratch),
                None => self.copy(at, found, pieces, scratch),
            },
            Action::Fill => {
                push(pieces, 0, at..at + found.len, Content::Fill);
                Ok(())
            }
            // Zero extents and the zero runs between data become one request at the end.
            Action::Zero | Action::Skip => Ok(()),
        }
    }

    fn copy(
        &self,
        at: u64,
        found: &Found<'a>,
        pieces: &mut Vec<Piece<'a>>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let Place::Stored { storage, host } = found.place else {
            return self.decoded(at, found.len, pieces, scratch);
        };
        let content = Content::Stored { storage, host };
        if self.shared(at, found)? {
            push(pieces, 0, at..at + found.len, Content::Done);
            return Ok(());
        }
        match (self.runs, self.target.top().as_layout()) {
            (Some(runs), Some(_)) => self.probe(at..at + found.len, content, runs, pieces, scratch),
            _ => {
                push(pieces, 0, at..at + found.len, content);
                Ok(())
            }
        }
    }

    /// For a target that gives space by the cluster: leaves out clusters that only have zeroes.
    fn probe(
        &self,
        range: Range<u64>,
        content: Content<'a>,
        runs: Runs,
        pieces: &mut Vec<Piece<'a>>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let Content::Stored { storage, host } = content else {
            return Ok(());
        };
        let content = |guest: u64| Content::Stored {
            storage,
            host: host + (guest - range.start),
        };
        let hosts =
            |part: &Range<u64>| host + (part.start - range.start)..host + (part.end - range.start);
        let cluster = self.target.top().cluster_size().unwrap_or(1).max(1);
        if cluster < PROBE_MIN {
            for part in storage::copy::nonzero(storage, hosts(&range), runs.unit)? {
                let first = range.start + (part.start - host);
                let part = first..first + range::len(&part);
                push(pieces, runs.min, part, content(first));
            }
            return Ok(());
        }
        let mut at = range.start;
        while at < range.end {
            let next = align::up(at + 1, cluster).map_or(range.end, |n| n.min(range.end));
            if any_data(&mut scratch.reader, storage, hosts(&(at..next)))? {
                push(pieces, 0, at..next, content(at));
            }
            at = next;
        }
        Ok(())
    }

    /// Reads what is not stored as it is; keeps it where there is room.
    fn decoded(
        &self,
        at: u64,
        len: u64,
        pieces: &mut Vec<Piece<'a>>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let (first, room) = scratch.keep(len);
        let kept = &mut scratch.kept[first..];
        self.reader.read_at(kept, at)?;
        match self.runs {
            None => push(pieces, 0, at..at + len64(room), Content::Kept(first)),
            Some(runs) => {
                for part in nonzero(kept, clamp_len(runs.unit, usize::MAX)) {
                    let guest = at + len64(part.start)..at + len64(part.end);
                    push(pieces, runs.min, guest, Content::Kept(first + part.start));
                }
            }
        }
        push(pieces, 0, at + len64(room)..at + len, Content::Read);
        Ok(())
    }

    /// Shares the blocks with the target, where that may still work and does.
    fn shared(&self, at: u64, found: &Found<'a>) -> Result<bool> {
        let Place::Stored { storage, host } = found.place else {
            return Ok(false);
        };
        let Some(may) = self.share.get(found.part) else {
            return Ok(false);
        };
        if !may.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let run = self.target.top().map(at, found.len, Wait::Yes)?;
        let Source::Stored {
            storage: target,
            host: to,
            writable: true,
        } = run.source
        else {
            return Ok(false);
        };
        if run.len < found.len {
            return Ok(false);
        }
        match storage::copy::share(storage, host, target, to, found.len) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == ErrorKind::Unsupported => {
                may.store(false, Ordering::Relaxed);
                Ok(false)
            }
            Err(e) => Err(e),
        }
    }
}

/// Adds a piece; joins it to the last one where both are of one kind and continue each other,
/// after a gap shorter than `gap` at most.
pub(super) fn push<'a>(
    pieces: &mut Vec<Piece<'a>>,
    gap: u64,
    range: Range<u64>,
    from: Content<'a>,
) {
    if range.is_empty() {
        return;
    }
    if let Some(last) = pieces.last_mut() {
        let between = range.start - last.range.end;
        if (between == 0 || between < gap) && continues(last, &range, from) {
            last.range.end = range.end;
            return;
        }
    }
    pieces.push(Piece { range, from });
}

fn continues(last: &Piece<'_>, range: &Range<u64>, from: Content<'_>) -> bool {
    let distance = range.start - last.range.start;
    match (last.from, from) {
        (
            Content::Stored { storage, host },
            Content::Stored {
                storage: next,
                host: at,
            },
        ) => std::ptr::addr_eq(storage, next) && host.checked_add(distance) == Some(at),
        (Content::Kept(first), Content::Kept(at)) => len64(first) + distance == len64(at),
        (Content::Read, Content::Read)
        | (Content::Zeroes, Content::Zeroes)
        | (Content::Fill, Content::Fill)
        | (Content::Done, Content::Done) => last.range.end == range.start,
        _ => false,
    }
}

/// The pieces, and zeroes for all that they leave out of `range`.
fn with_zeroes<'a>(pieces: Vec<Piece<'a>>, range: &Range<u64>) -> Vec<Piece<'a>> {
    let mut all = Vec::with_capacity(pieces.len());
    let mut at = range.start;
    for piece in pieces {
        push(&mut all, 0, at..piece.range.start, Content::Zeroes);
        at = piece.range.end;
        all.push(piece);
    }
    push(&mut all, 0, at..range.end, Content::Zeroes);
    all
}

/// The ranges of pieces for which a target that assigns space ahead is to do so.
pub(super) fn to_assign(pieces: &[Piece<'_>], zeroes_take_space: bool) -> Vec<Range<u64>> {
    let mut ranges = Vec::new();
    for piece in pieces {
        let wanted = match piece.from {
            Content::Done => false,
            Content::Zeroes => zeroes_take_space,
            Content::Stored { .. } | Content::Read | Content::Kept(_) | Content::Fill => true,
        };
        if wanted {
            range::push_merged(&mut ranges, piece.range.clone());
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryStorage;

    #[test]
    fn short_gaps_are_closed_and_long_ones_are_kept() {
        let storage = MemoryStorage::new();
        let stored = |host| Content::Stored {
            storage: &storage,
            host,
        };
        let mut pieces = Vec::new();
        for (range, host) in [(0..4, 100), (6..8, 106), (16..20, 116), (20..24, 200)] {
            push(&mut pieces, 8, range, stored(host));
        }
        let ranges: Vec<_> = pieces.iter().map(|p| p.range.clone()).collect();
        assert_eq!(ranges, [0..8, 16..20, 20..24]);
    }

    #[test]
    fn zeroes_fill_what_the_pieces_leave_out() {
        let mut pieces = Vec::new();
        push(&mut pieces, 0, 4..6, Content::Read);
        push(&mut pieces, 0, 6..7, Content::Done);
        let all = with_zeroes(pieces, &(0..10));
        let ranges: Vec<_> = all.iter().map(|p| p.range.clone()).collect();
        assert_eq!(ranges, [0..4, 4..6, 6..7, 7..10]);
        assert!(matches!(all[0].from, Content::Zeroes));
        assert!(matches!(all[3].from, Content::Zeroes));
    }
}

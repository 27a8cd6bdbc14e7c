//! Stored data on its way: each chunk is read once, scanned for zeroes and written from there.

use std::ops::Range;

use crate::copy::room::{Known, Room};
use crate::copy::scan::Runs;
use crate::error::{ErrorKind, Result};
use crate::storage::copy::{CHUNK, Reader, copy, offloads, peek};
use crate::storage::{Storage, Zeroing, zero_or_write};
use crate::util::align::{clamp_len, len64};
use crate::util::buf::nonzero;

/// Zero runs shorter than this are written rather than zeroed by a call of their own.
const WORTH: u64 = 64 << 10;

/// What becomes of zero runs in the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gaps {
    /// It reads as zeroes there; space that they were given is given back.
    GiveBack,
    /// They must be zeroed.
    Clear,
}

/// Bytes of one object that belong into another.
#[derive(Debug, Clone)]
pub(super) struct Transfer<'a> {
    pub(super) src: &'a dyn Storage,
    pub(super) from: u64,
    pub(super) dst: &'a dyn Storage,
    pub(super) to: Range<u64>,
    /// How zero runs are found; `None`: they are data.
    pub(super) runs: Option<Runs>,
    pub(super) gaps: Gaps,
}

impl Transfer<'_> {
    /// Moves all of it; `before` is called ahead of each chunk with the bytes it has.
    pub(super) fn run(
        &self,
        reader: &mut Reader,
        room: &mut Room<'_>,
        before: &dyn Fn(u64) -> Result<()>,
    ) -> Result<()> {
        let offloads = offloads(self.src, self.dst);
        let mut sieve = Sieve::new(self.dst, self.to.start, self.runs, self.gaps, room);
        let mut at = self.to.start;
        while at < self.to.end {
            // Whole chunks of the target: the host keeps them in larger pieces.
            let len = (self.to.end - at).min(len64(CHUNK) - at % len64(CHUNK));
            before(len)?;
            sieve.before(at)?;
            let host = self.from + (at - self.to.start);
            let chunk = reader.chunk(self.src, host..host + len)?;
            sieve.put(
                chunk.bytes(&(host..host + len)),
                at,
                &|part, to| match offloads {
                    true => copy(self.src, host + (to - at), self.dst, to, len64(part.len())),
                    false => self.dst.write_at(part, to),
                },
            )?;
            at += len;
        }
        sieve.finish(at)
    }
}

/// Bytes on their way to one object, in order: zero runs among them are left out.
pub(super) struct Sieve<'s, 'r> {
    dst: &'s dyn Storage,
    /// How zero runs are found; `None`: they are data.
    runs: Option<Runs>,
    gaps: Gaps,
    room: &'s mut Room<'r>,
    /// Zeroes that nothing was done about begin here.
    gap: u64,
}

impl<'s, 'r> Sieve<'s, 'r> {
    /// For bytes from `start` of `dst` on.
    pub(super) fn new(
        dst: &'s dyn Storage,
        start: u64,
        runs: Option<Runs>,
        gaps: Gaps,
        room: &'s mut Room<'r>,
    ) -> Self {
        Self {
            dst,
            runs,
            gaps,
            room,
            gap: start,
        }
    }

    /// To be called before the bytes for `at` are looked at.
    pub(super) fn before(&mut self, at: u64) -> Result<()> {
        let known = match self.runs {
            None => Known::Written,
            Some(_) => Known::Scanned,
        };
        self.room.before(at, known)
    }

    /// Has `write` write what of the next bytes, which are for `at`, is not left out.
    pub(super) fn put(
        &mut self,
        bytes: &[u8],
        at: u64,
        write: &dyn Fn(&[u8], u64) -> Result<()>,
    ) -> Result<()> {
        let parts = match self.runs {
            None => std::iter::once(0..bytes.len()).collect(),
            Some(runs) => {
                let parts = nonzero(bytes, clamp_len(runs.unit, usize::MAX));
                self.close_gaps(parts, runs.min)
            }
        };
        self.room
            .saw(len64(bytes.len()), holes(&parts, bytes.len()));
        for part in parts {
            let to = at + len64(part.start);
            self.clear(to)?;
            write(&bytes[part.clone()], to)?;
            self.gap = at + len64(part.end);
        }
        Ok(())
    }

    /// The bytes end at `at`.
    pub(super) fn finish(mut self, at: u64) -> Result<()> {
        self.clear(at)
    }

    /// The parts, and with them the gaps that are too short to be left out.
    fn close_gaps(&self, parts: Vec<Range<usize>>, min: u64) -> Vec<Range<usize>> {
        let min = match self.gaps {
            Gaps::Clear => min.max(WORTH),
            Gaps::GiveBack => min,
        };
        let mut closed: Vec<Range<usize>> = Vec::with_capacity(parts.len());
        for part in parts {
            match closed.last_mut() {
                Some(last) if len64(part.start - last.end) < min => last.end = part.end,
                _ => closed.push(part),
            }
        }
        closed
    }

    /// Leaves zeroes up to `end` as they are to be.
    fn clear(&mut self, end: u64) -> Result<()> {
        let gap = self.gap..end;
        self.gap = end;
        match self.gaps {
            _ if gap.is_empty() => Ok(()),
            Gaps::Clear => zero_or_write(self.dst, gap, Zeroing::MayUnmap),
            Gaps::GiveBack => match self.room.given(&gap) {
                None => Ok(()),
                Some(given) => match self.dst.zero(given, Zeroing::MayUnmap) {
                    Err(e) if e.kind() == ErrorKind::Unsupported => Ok(()),
                    done => done,
                },
            },
        }
    }
}

/// How many parts of `len` bytes the ascending `parts` leave out.
fn holes(parts: &[Range<usize>], len: usize) -> usize {
    match (parts.first(), parts.last()) {
        (Some(first), Some(last)) => {
            parts.len() - 1 + usize::from(first.start > 0) + usize::from(last.end < len)
        }
        _ => 1,
    }
}

/// Whether any byte of `host` is not zero; looks no further than the first that is not.
pub(super) fn any_data(reader: &mut Reader, src: &dyn Storage, host: Range<u64>) -> Result<bool> {
    if peek(src, &host) {
        return Ok(true);
    }
    let mut at = host.start;
    let mut step = 4096;
    while at < host.end {
        let end = at.saturating_add(step).min(host.end);
        if !reader.chunk(src, at..end)?.nonzero(end - at).is_empty() {
            return Ok(true);
        }
        at = end;
        step = (step * 16).min(len64(CHUNK));
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::copy::room::Density;
    use crate::storage::memory::MemoryStorage;

    const RUNS: Runs = Runs {
        unit: 4096,
        min: 4096,
    };

    /// Three MiB with data at a few places, some of them at the seams of chunks.
    fn source() -> Vec<u8> {
        let mut bytes = vec![0; 3 << 20];
        for (at, len) in [
            (5000, 10),
            (1 << 20, 70_000),
            ((2 << 20) - 1, 2),
            ((3 << 20) - 1, 1),
        ] {
            bytes[at..at + len].fill(7);
        }
        bytes
    }

    #[test]
    fn whatever_becomes_of_gaps_the_target_reads_as_the_source() {
        let bytes = source();
        let src = MemoryStorage::from_bytes(&bytes);
        for (gaps, old) in [(Gaps::GiveBack, 0), (Gaps::Clear, 9)] {
            for (first, end) in [(0, bytes.len()), (100, bytes.len() - 5000), (5000, 5010)] {
                let dst = MemoryStorage::from_bytes(&vec![old; bytes.len() + 50]);
                let transfer = Transfer {
                    src: &src,
                    from: len64(first),
                    dst: &dst,
                    to: 50..50 + len64(end - first),
                    runs: Some(RUNS),
                    gaps,
                };
                let may = AtomicBool::new(true);
                let mut density = Density::default();
                let to = std::iter::once(transfer.to.clone());
                let mut room = Room::new(&dst, to, &may, &mut density);
                transfer
                    .run(&mut Reader::new(), &mut room, &|_| Ok(()))
                    .expect("memory takes all");
                let found = dst.to_bytes();
                assert!(
                    found[50..50 + end - first] == bytes[first..end],
                    "{gaps:?} {first}"
                );
                assert!(found[..50].iter().all(|&b| b == old));
                assert!(found[50 + end - first..].iter().all(|&b| b == old));
            }
        }
    }

    #[test]
    fn data_is_found_wherever_it_is() {
        let bytes = source();
        let src = MemoryStorage::from_bytes(&bytes);
        let mut reader = Reader::new();
        for (range, expected) in [
            (0..3 << 20, true),
            (8192..1 << 20, false),
            (8192..(1 << 20) + 1, true),
            (0..5000, false),
            (1_200_000..(2 << 20) - 1, false),
            (1_200_000..2 << 20, true),
        ] {
            let found = any_data(&mut reader, &src, range.clone()).expect("memory reads");
            assert_eq!(found, expected, "{range:?}");
        }
    }
}

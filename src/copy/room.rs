//! Space given ahead of the writes: in large pieces where data is dense, not at all where zeroes
//! are strewn among it.
//!
//! A host gives space in large pieces at less cost than write by write.  What it gives for zeroes
//! that are then found in the data must be given back, a call for each run of them.  So as much is
//! asked for ahead as has been seen without such a run.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{ErrorKind, Result};
use crate::storage::Storage;
use crate::util::range;

/// Less than this is not worth a call of its own.
const LEAST: u64 = 128 << 10;
/// Most that is asked for ahead.
const MOST: u64 = 32 << 20;

/// No host gives space in smaller pieces.
const BLOCK: u64 = 4096;
/// Less than this is not given back of clusters, which have the space all the same.
const ASSIGNED: u64 = 64 << 10;

/// How much data one worker has seen since it met zeroes in it.
#[derive(Debug, Default)]
pub(super) struct Density {
    calm: u64,
}

impl Density {
    /// Notes a chunk of data of `len` bytes with `holes` runs of zeroes in it.
    fn saw(&mut self, len: u64, holes: usize) {
        self.calm = match holes {
            0 => (self.calm + len).min(MOST),
            _ => 0,
        };
    }
}

/// What is written where, as far as it is known ahead.
pub(super) struct Room<'a> {
    dst: &'a dyn Storage,
    /// Ranges of it that will be written, ascending; those that may hold zeroes are.
    wanted: Vec<Range<u64>>,
    /// Up to here space was asked for.
    given: u64,
    /// Less than this is not worth giving back.
    worth: u64,
    /// Whether the host may still be able to.
    may: &'a AtomicBool,
    density: &'a mut Density,
}

/// Whether what is to be written may turn out to be zeroes that are left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Known {
    /// All of it will be written.
    Written,
    /// It is looked at first.
    Scanned,
}

impl<'a> Room<'a> {
    /// For ranges of `dst`, ascending; those that touch count as one.
    pub(super) fn new(
        dst: &'a dyn Storage,
        ranges: impl Iterator<Item = Range<u64>>,
        may: &'a AtomicBool,
        density: &'a mut Density,
    ) -> Self {
        let mut wanted = Vec::new();
        if may.load(Ordering::Relaxed) {
            for range in ranges {
                range::push_merged(&mut wanted, range);
            }
            wanted.retain(|w| range::len(w) >= LEAST);
        }
        Self {
            dst,
            wanted,
            given: 0,
            worth: BLOCK,
            may,
            density,
        }
    }

    /// For a format that assigned the space, and had the host give it.
    pub(super) fn assigned(
        dst: &'a dyn Storage,
        may: &'a AtomicBool,
        density: &'a mut Density,
    ) -> Self {
        Self {
            dst,
            wanted: Vec::new(),
            given: u64::MAX,
            worth: ASSIGNED,
            may,
            density,
        }
    }

    /// Has the host give space to what is written from `at` on.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn before(&mut self, at: u64, known: Known) -> Result<()> {
        if at < self.given || self.wanted.is_empty() {
            return Ok(());
        }
        let next = self.wanted.partition_point(|w| w.end <= at);
        let Some(wanted) = self.wanted.get(next).filter(|w| w.start <= at) else {
            return Ok(());
        };
        let most = match known {
            Known::Written => u64::MAX,
            Known::Scanned => self.density.calm,
        };
        let range = at..wanted.end.min(at.saturating_add(most));
        if range::len(&range) < LEAST {
            return Ok(());
        }
        match self.dst.reserve(range.clone()) {
            Ok(()) => self.given = range.end,
            Err(e) if e.kind() == ErrorKind::Unsupported => {
                self.may.store(false, Ordering::Relaxed);
                self.wanted.clear();
            }
            // There are zeroes in it that need no space: perhaps the rest fits.
            Err(e) if e.kind() == ErrorKind::NoSpace => self.given = range.end,
            Err(e) => return Err(e),
        }
        Ok(())
    }

    /// Notes a chunk of data that was looked at, and how many runs of zeroes it has.
    pub(super) fn saw(&mut self, len: u64, holes: usize) {
        self.density.saw(len, holes);
    }

    /// The part of a range that was given space ahead, where that is worth giving back.
    pub(super) fn given(&self, range: &Range<u64>) -> Option<Range<u64>> {
        let given = range.start..range.end.min(self.given);
        (range::len(&given) >= self.worth).then_some(given)
    }
}

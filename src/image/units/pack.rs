//! Moving the last units of a file into free space before them.

use std::ops::Range;

use crate::error::Result;
use crate::image::units::{Allocator, New, Space, Taken, Unit, Units, Unnamed};
use crate::storage::{Zeroing, zero_or_write};
use crate::util::align::{clamp_len, len64};
use crate::util::progress::{Progress, Silent};

/// Bytes moved by one sync, or one unit.
const TOGETHER: u64 = 64 << 20;
/// Bytes copied at a time.
const STEP: u64 = 1 << 20;

impl Allocator {
    /// Moves the last units of the file, of `units` in all, into `holes`: space for one unit each, in
    /// ascending order, which nothing else takes meanwhile.  How many bytes were moved.
    ///
    /// Data is on stable media before the entry that names it, and the place that a unit leaves is
    /// taken by nobody.
    ///
    /// # Errors
    /// The host's; `Cancelled`.
    pub fn move_down<U: Units>(
        &self,
        units: &U,
        count: u64,
        holes: &[Taken],
        progress: &dyn Progress,
    ) -> Result<u64> {
        let last = last_units(units, count, holes.len())?;
        let pairs: Vec<(u64, Taken)> = last
            .into_iter()
            .zip(holes)
            .take_while(|((host, _), hole)| hole.host < *host)
            .map(|((_, index), hole)| (index, *hole))
            .collect();
        self.move_units(units, &pairs, progress)?;
        Ok(len64(pairs.len()) * units.unit_len())
    }

    /// Gives units that have space other space, as [`Units::take`] finds it.  Nothing else changes
    /// meanwhile.
    ///
    /// # Errors
    /// Those of taking space; the host's.
    pub fn move_away<U: Units>(&self, units: &U, indices: &[u64]) -> Result<()> {
        let mut unnamed = Unnamed::new(units, Vec::new());
        for index in indices {
            unnamed.runs.push(units.take(*index, 1)?);
        }
        let moves: Vec<_> = indices.iter().copied().zip(unnamed.named()).collect();
        self.move_units(units, &moves, &Silent)
    }

    /// Gives units that have space other space, which nothing else takes meanwhile.  Nothing else
    /// changes meanwhile; a power cut leaves each of them where it was or where it is to be.
    ///
    /// # Errors
    /// The host's; `Cancelled`.
    pub fn move_units<U: Units>(
        &self,
        units: &U,
        moves: &[(u64, Taken)],
        progress: &dyn Progress,
    ) -> Result<()> {
        let size = units.unit_len();
        let batch = clamp_len((TOGETHER / size).max(1), usize::MAX);
        for batch in moves.chunks(batch) {
            progress.check()?;
            let mut new = Vec::with_capacity(batch.len());
            for (index, space) in batch {
                let old = units.unit(*index)?;
                let Space::Own(host) = old.space else {
                    continue;
                };
                copy(
                    units,
                    host - space.lead..host + size,
                    space.host - space.lead,
                )?;
                let entry = New {
                    index: *index,
                    old: Unit {
                        space: Space::None,
                        ..old
                    },
                    host: space.host,
                    filled: 0..size,
                };
                new.push(entry);
            }
            self.order.settle()?;
            for entry in &new {
                let (_, entries) = units.open(entry.index..entry.index + 1, entry.index, true)?;
                units.publish(entries, std::slice::from_ref(entry), &mut 1)?;
            }
        }
        self.order.settle()
    }
}

/// Host offset and index of the `most` units that lie last in the file, the last one first.
fn last_units<U: Units>(units: &U, count: u64, most: usize) -> Result<Vec<(u64, u64)>> {
    let mut last = std::collections::BinaryHeap::new();
    for index in 0..count {
        if let Space::Own(host) = units.unit(index)?.space {
            last.push(std::cmp::Reverse((host, index)));
            if last.len() > most {
                last.pop();
            }
        }
    }
    Ok(last.into_sorted_vec().into_iter().map(|r| r.0).collect())
}

/// Copies host bytes; holes stay such, where the host can make them.
fn copy<U: Units>(units: &U, from: Range<u64>, to: u64) -> Result<()> {
    let storage = units.data()?;
    let mut bytes = vec![0; clamp_len(STEP.min(from.end - from.start), usize::MAX)];
    let mut at = from.start;
    while at < from.end {
        let run = storage.run(at, (from.end - at).min(STEP))?;
        let target = to + (at - from.start);
        if run.data {
            let part = &mut bytes[..clamp_len(run.len, usize::MAX)];
            storage.read_at(part, at)?;
            storage.write_at(part, target)?;
        } else {
            zero_or_write(storage, target..target + run.len, Zeroing::MayUnmap)?;
        }
        at += run.len;
    }
    Ok(())
}

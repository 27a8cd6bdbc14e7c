//! Guest bytes as whole units of the target: what is zero set aside, the rest encoded.

use std::ops::Range;

use crate::chain::Chain;
use crate::copy::differ::Differ;
use crate::copy::engine::Job;
use crate::copy::pace::{self, Pace};
use crate::copy::plan::{Action, Before, Space, action};
use crate::copy::progress::Progress;
use crate::copy::salvage::Reader;
use crate::copy::scan::Scratch;
use crate::error::Result;
use crate::image::compress::{Encoder, Form, Unit};
use crate::util::align::{clamp_len, down, len64};
use crate::util::buf::is_zero;

/// Work range, where a cluster is not longer: a worker holds this much of what it encoded.
const RANGE: u64 = 2 << 20;
/// Bytes read at a time, where a cluster is not longer.
const STEP: u64 = 1 << 20;

/// Work ranges for units of `unit` bytes: whole units.
pub(super) fn range_size(unit: u64) -> u64 {
    RANGE.checked_next_multiple_of(unit).unwrap_or(unit)
}

/// Units of one work range.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// Those that hold data, ascending.
    pub(super) units: Vec<Unit>,
    /// Their bytes as they are stored, one after another.
    pub(super) bytes: Vec<u8>,
    /// What is to read as zeroes and may not yet; ascending.
    pub(super) zeroes: Vec<Range<u64>>,
}

/// What one worker has.
#[derive(Debug, Default)]
pub(super) struct Hand {
    pub(super) batch: Batch,
    /// `None`: units are stored as they are.
    pub(super) encoder: Option<Box<dyn Encoder>>,
    /// The encoder was asked for.
    pub(super) ready: bool,
    scratch: Scratch,
    input: Vec<u8>,
}

/// Makes batches.
pub(super) struct Collector<'a> {
    pub(super) reader: Reader<'a>,
    pub(super) before: Before,
    pub(super) space: Space,
    /// What the backing image holds, for a target that has one.
    pub(super) differ: Option<Differ<'a>>,
    /// Bytes of a unit.
    pub(super) unit: u64,
    /// A target whose bytes past the end of the sources stay.
    pub(super) kept: Option<&'a Chain>,
    pub(super) pace: Option<Pace>,
    pub(super) progress: &'a dyn Progress,
}

impl Collector<'_> {
    /// Leaves the units of a work range in `hand.batch`.  The caller holds the sources' tickets.
    pub(super) fn collect(&self, job: &Job, hand: &mut Hand) -> Result<()> {
        let batch = &mut hand.batch;
        batch.units.clear();
        batch.bytes.clear();
        batch.zeroes.clear();
        let mut at = job.range.start;
        for data in self.data(job, &mut hand.scratch)? {
            self.zero(at..data.start, job, &mut hand.batch);
            at = data.end;
            let step = STEP.max(self.unit);
            let mut from = data.start;
            while from < data.end {
                let end = data.end.min(from + step);
                self.read(from..end, job, hand)?;
                from = end;
            }
        }
        self.zero(at..job.range.end, job, &mut hand.batch);
        Ok(())
    }

    /// Whole units of the work range that data touches, or that differ from the backing image.
    fn data(&self, job: &Job, scratch: &mut Scratch) -> Result<Vec<Range<u64>>> {
        let mut data = Vec::new();
        let mut at = job.range.start;
        while at < job.range.end {
            let found = self.reader.find(at, job.range.end - at)?;
            match (action(found.state(), self.before, self.space), &self.differ) {
                (Action::Copy | Action::Fill, _) | (Action::Differ, None) => {
                    push_units(&mut data, at..at + found.len, self.unit);
                }
                (Action::Differ, Some(differ)) => {
                    let mut pieces = Vec::new();
                    differ.scan(at, &found, &mut pieces, scratch)?;
                    for piece in pieces {
                        push_units(&mut data, piece.range, self.unit);
                    }
                }
                (Action::Zero | Action::Skip, _) => {}
            }
            at += found.len;
        }
        Ok(data)
    }

    /// Notes a range that is to read as zeroes, where it may not.
    fn zero(&self, range: Range<u64>, job: &Job, batch: &mut Batch) {
        if self.before != Before::Unknown {
            return;
        }
        self.note_zero(range, job, batch);
    }

    fn note_zero(&self, range: Range<u64>, job: &Job, batch: &mut Batch) {
        let range = range.start..range.end.min(job.range.end);
        crate::util::range::push_merged(&mut batch.zeroes, range);
    }

    /// Reads units and encodes them.
    fn read(&self, range: Range<u64>, job: &Job, hand: &mut Hand) -> Result<()> {
        let len = range.end - range.start;
        pace::wait(self.pace.as_ref(), len, self.progress)?;
        let mut input = std::mem::take(&mut hand.input);
        input.resize(clamp_len(STEP.max(self.unit), usize::MAX), 0);
        let done = self.read_into(&mut input[..clamp_len(len, usize::MAX)], range, job, hand);
        hand.input = input;
        done
    }

    fn read_into(
        &self,
        buf: &mut [u8],
        range: Range<u64>,
        job: &Job,
        hand: &mut Hand,
    ) -> Result<()> {
        self.reader.read_at(buf, range.start)?;
        if let Some(target) = self.kept
            && range.end > job.range.end
        {
            let end = range.end.min(target.virtual_size()).max(job.range.end);
            let part = job.range.end - range.start..end - range.start;
            let part = clamp_len(part.start, buf.len())..clamp_len(part.end, buf.len());
            target.read_at(&mut buf[part], job.range.end)?;
        }
        let mut at = range.start;
        for unit in buf.chunks(clamp_len(self.unit, usize::MAX)) {
            let end = at + len64(unit.len());
            match is_zero(unit) && self.space == Space::Sparse {
                true if self.before == Before::Zeroes => {}
                true => self.note_zero(at..end, job, &mut hand.batch),
                false => encode(at, unit, hand)?,
            }
            at = end;
        }
        Ok(())
    }
}

/// Adds a unit that holds data.
fn encode(at: u64, unit: &[u8], hand: &mut Hand) -> Result<()> {
    let bytes = &mut hand.batch.bytes;
    let first = bytes.len();
    if bytes.capacity() == 0 {
        bytes.reserve_exact(clamp_len(RANGE.max(len64(unit.len())), usize::MAX));
    }
    let encoded = match &mut hand.encoder {
        None => None,
        Some(encoder) => {
            bytes.resize(first + unit.len(), 0);
            let len = encoder.encode(unit, &mut bytes[first..])?;
            bytes.truncate(first + len.unwrap_or(0));
            len
        }
    };
    let form = match encoded {
        Some(len) => Form::Packed(len64(len)),
        None => {
            bytes.extend_from_slice(unit);
            Form::Plain
        }
    };
    hand.batch.units.push(Unit { at, form });
    Ok(())
}

/// Adds the units that a range touches.
fn push_units(units: &mut Vec<Range<u64>>, range: Range<u64>, unit: u64) {
    let start = down(range.start, unit);
    let end = range.end.next_multiple_of(unit);
    match units.last_mut() {
        Some(last) if last.end >= start => last.end = last.end.max(end),
        _ => units.push(start..end),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_touched_twice_are_there_once() {
        let mut units = Vec::new();
        for range in [5..6, 7..9, 20..24, 24..25, 41..50] {
            push_units(&mut units, range, 8);
        }
        assert_eq!(units, [0..32, 40..56]);
    }

    #[test]
    fn work_ranges_are_whole_units() {
        for unit in [512, 65_536, 2 << 20, 3 << 20] {
            assert!(range_size(unit).is_multiple_of(unit));
        }
    }
}

//! Which units an allocation changes, and what of each is filled.

use std::ops::Range;

use crate::error::Result;
use crate::image::units::{Content, New, Space, Taken, Unit, Units};
use crate::util::align::{down, up};
use crate::util::range::intersect;

/// A unit that changes.
#[derive(Debug)]
pub(super) struct Move {
    pub(super) index: u64,
    /// As it was.
    pub(super) unit: Unit,
    /// Where its data goes, as soon as that is known.
    pub(super) host: u64,
    /// The space was taken for it.
    pub(super) taken: Option<Taken>,
    /// What of it is filled, whole parts, beside what it has stored.
    pub(super) filled: Range<u64>,
    /// What of that was asked for; empty in units that are only expected to be written next.
    pub(super) asked: Range<u64>,
}

impl Move {
    pub(super) fn new_entry(&self) -> New {
        New {
            index: self.index,
            old: self.unit,
            host: self.host,
            filled: self.filled.clone(),
        }
    }

    /// Whether all it needs is on stable media, so that its entry may show at once.
    pub(super) fn is_ready(&self) -> bool {
        self.taken.is_some_and(|taken| taken.ready)
    }
}

/// What is asked for, and what else may be done with it.
#[derive(Debug)]
pub(super) struct Goal<'a, U> {
    pub(super) units: &'a U,
    /// Guest bytes that were asked for.
    pub(super) request: Range<u64>,
    /// Guest bytes around them that may be worked on too.
    pub(super) around: Range<u64>,
    /// Entries show only after a sync.
    pub(super) waits: bool,
}

/// Whether a power cut between a unit's entry and its data would lose something: whether it holds
/// anything but zeroes.
fn waits<U: Units>(units: &U, unit: &Unit) -> bool {
    match (unit.whole, unit.space) {
        (Some(Content::Zero), _) => false,
        (_, Space::Shared(_) | Space::Encoded { .. }) => true,
        _ => units.has_backing(),
    }
}

impl<'a, U: Units> Goal<'a, U> {
    pub(super) fn new(
        units: &'a U,
        request: &Range<u64>,
        around: &Range<u64>,
        most: u64,
    ) -> Result<Self> {
        let size = units.unit_len();
        let first = request.start / size;
        let together = units.together(first);
        let limits = together.start * size..(together.end * size).min(units.disk_end());
        let most = down(request.start, size).saturating_add(most.max(size));
        let request = request.start..request.end.min(limits.end).min(most);
        let waits = waits(units, &units.unit(first)?);
        let around = match waits {
            true => around.start.max(limits.start)..around.end.min(limits.end).max(request.end),
            false => request.clone(),
        };
        Ok(Self {
            units,
            request,
            around,
            waits,
        })
    }

    /// What must be reserved, and what should be.
    pub(super) fn spans(&self) -> Result<(Range<u64>, Range<u64>)> {
        let (size, part) = (self.units.unit_len(), self.units.part_len());
        let unit = self.unit_range(self.request.start / size);
        if !self.units.has_free_parts() || !self.units.unit(unit.start / size)?.is_own() {
            let wish = down(self.around.start, size)..round_up(self.around.end, size);
            return Ok((unit, wish));
        }
        let must = down(self.request.start, part)..round_up(self.request.end, part).min(unit.end);
        let start = down(self.around.start, part).max(unit.start);
        let end = match self.around.end <= unit.end {
            true => round_up(self.around.end, part),
            false => round_up(self.around.end, size),
        };
        Ok((must, start..end))
    }

    /// The units that change: that of the start of the request, and those before and after it
    /// without a gap.  None where it has all it needs.
    pub(super) fn plan(&self, reserved: &Range<u64>) -> Result<Vec<Move>> {
        let size = self.units.unit_len();
        let first = self.request.start / size;
        let mut moves = Vec::new();
        let Some(next) = self.consider(first, self.request.start, reserved)? else {
            return Ok(moves);
        };
        let mut index = first;
        while !next.unit.is_own() && index > 0 && (index - 1) * size >= self.around.start {
            index -= 1;
            let start = index * size;
            match self.consider(index, start, reserved) {
                Ok(Some(before)) if !before.unit.is_own() => moves.push(before),
                _ => break,
            }
        }
        moves.reverse();
        let mut index = first;
        let mut next = Some(next);
        while let Some(found) = next.take() {
            let whole = found.filled.end == size || !found.unit.is_own();
            moves.push(found);
            index += 1;
            if whole && index * size < self.around.end {
                // What is wrong with it is told to those who need it.
                let after = self.consider(index, index * size, reserved);
                next = after.unwrap_or_default();
            }
        }
        Ok(moves)
    }

    fn unit_range(&self, index: u64) -> Range<u64> {
        let size = self.units.unit_len();
        index * size..(index + 1) * size
    }

    /// The change of unit `index` that gives the byte `at` space; `None` where it has some, or does
    /// not go with the others.
    fn consider(&self, index: u64, at: u64, reserved: &Range<u64>) -> Result<Option<Move>> {
        let (size, part) = (self.units.unit_len(), self.units.part_len());
        let range = self.unit_range(index);
        let unit = self.units.unit(index)?;
        if waits(self.units, &unit) != self.waits {
            return Ok(None);
        }
        let within = |guest: &Range<u64>| {
            let met = intersect(guest, &range).unwrap_or(range.start..range.start);
            down(met.start - range.start, part)..round_up(met.end - range.start, part).min(size)
        };
        let (mut filled, mut asked) = (within(&self.around), within(&self.request));
        match unit.space {
            Space::Own(_) => {
                let Some(run) = self.missing(index, &unit, at - range.start, &filled)? else {
                    return Ok(None);
                };
                let reserved = within_exact(reserved, &range);
                let Some(run) = intersect(&run, &reserved) else {
                    return Ok(None);
                };
                asked = intersect(&asked, &run).unwrap_or(run.start..run.start);
                filled = run;
            }
            _ if reserved.start > range.start || reserved.end < range.end => return Ok(None),
            _ if self.units.stores_whole() => filled = 0..size,
            _ => {}
        }
        Ok(Some(Move {
            index,
            unit,
            host: match unit.space {
                Space::Own(host) => host,
                _ => 0,
            },
            taken: None,
            filled,
            asked,
        }))
    }

    /// The run of parts around the byte `at` of a unit, within `wanted`, that are not stored.
    fn missing(
        &self,
        index: u64,
        unit: &Unit,
        at: u64,
        wanted: &Range<u64>,
    ) -> Result<Option<Range<u64>>> {
        let parts = match unit.whole {
            Some(Content::Stored) => return Ok(None),
            Some(_) => return Ok(Some(wanted.clone())),
            None => self.units.parts(index, unit, wanted)?,
        };
        let mut run: Option<Range<u64>> = None;
        for (content, part) in parts {
            match &mut run {
                _ if content == Content::Stored && part.end <= at => run = None,
                _ if content == Content::Stored => break,
                Some(run) => run.end = part.end,
                None => run = Some(part),
            }
        }
        let run = run.filter(|run| run.contains(&at));
        Ok(run.and_then(|run| intersect(&run, wanted)))
    }
}

/// The part of a unit's range that a guest range covers, as a range within it.
fn within_exact(guest: &Range<u64>, unit: &Range<u64>) -> Range<u64> {
    let met = intersect(guest, unit).unwrap_or(unit.start..unit.start);
    met.start - unit.start..met.end - unit.start
}

/// Up to a multiple of `align`; as far as numbers go.
fn round_up(at: u64, align: u64) -> u64 {
    up(at, align).unwrap_or(u64::MAX)
}

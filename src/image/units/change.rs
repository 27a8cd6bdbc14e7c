//! Dropping units, freeing their space, setting space aside; flush and close.

use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};
use crate::image::open::WriteOrder;
use crate::image::units::ahead::make_zero;
use crate::image::units::{Allocator, Freed, Taken, Target, Units, Unnamed};
use crate::util::align::down;
use crate::util::range::{self, intersect};

/// Units changed under one reservation, at most.
const STEP: u64 = 1024;
/// Freed ranges kept before they must be given back.
const MAX_FREED: usize = 4096;
/// Freed bytes that wait for a flush, so that many little ranges are given back by one sync.
const MUCH_FREED: u64 = 64 << 20;
/// What is reserved is as much as this, or a whole unit, at least.
const RESERVE: u64 = 64 << 10;
/// Pieces of a file to reserve that are no further apart than this are reserved as one.
const RESERVE_GAP: u64 = 8192;

impl Allocator {
    /// Drops what units have: all those that an aligned range of the disk touches.
    ///
    /// # Errors
    /// Those of [`Units::may_drop`]; the host's.
    pub fn drop_units<U: Units>(
        &self,
        units: &U,
        guest: &Range<u64>,
        target: Target,
    ) -> Result<()> {
        units.may_drop(target)?;
        self.begin(units)?;
        units.note(guest)?;
        let size = units.unit_len();
        let mut at = guest.start;
        loop {
            let last = guest.end.div_ceil(size);
            let next = units.next_to_drop(at / size, last, target)?;
            at = at.max(next.saturating_mul(size));
            if at >= guest.end {
                return self.release_much(units);
            }
            let end = guest.end.min(down(at, size) + STEP * size);
            let span = down(at, size)..end.next_multiple_of(size);
            let _reserved = self.reservations.wait(&span);
            let mut freed = Vec::new();
            let dropped = units.drop_units(&(at..end), target, &mut freed);
            dropped.and(self.free_all(units, freed))?;
            at = end;
        }
    }

    /// Drops all that units have, so that what lies below is read; on stable media when it returns.
    /// Where it fails, or is killed, a part of them is dropped.  For formats that have an entry for
    /// what lies below and free its unit ([`Target::Below`]).
    ///
    /// # Errors
    /// `Unsupported` where nothing lies below; those of [`Allocator::drop_units`].
    pub fn empty<U: Units>(&self, units: &U) -> Result<()> {
        if !units.has_backing() {
            return Err(Error::unsupported("nothing lies below it"));
        }
        self.drop_units(units, &(0..units.disk_end()), Target::Below)?;
        self.flush(units)
    }

    /// Lets go of a host range that no entry names any more: it is given back once no reader can be
    /// there and the entry that named it is gone from stable media too.
    ///
    /// # Errors
    /// The host's, where so much waits that some must be given back now.
    pub fn free<U: Units>(&self, units: &U, host: Range<u64>) -> Result<()> {
        let mut freed = self.freed.lock();
        freed.push(host, &self.order, &self.grace);
        let full = freed.len() >= MAX_FREED;
        drop(freed);
        match full {
            true => self.release(units),
            false => Ok(()),
        }
    }

    /// As [`Allocator::free`], of all of them, whatever becomes of the first.
    pub(super) fn free_all<U: Units>(
        &self,
        units: &U,
        hosts: impl IntoIterator<Item = Range<u64>>,
    ) -> Result<()> {
        let freed = hosts.into_iter().map(|host| self.free(units, host));
        freed.fold(Ok(()), Result::and)
    }

    /// As [`Allocator::release`], where so much was freed that it should not wait for a flush.
    fn release_much<U: Units>(&self, units: &U) -> Result<()> {
        // Who comes next does not hold up what was freed now.
        self.grace.passed(self.grace.now());
        let freed = self.freed.lock().bytes();
        match freed >= MUCH_FREED {
            true => self.release(units),
            false => Ok(()),
        }
    }

    /// Host ranges that wait to be given back.
    pub fn waiting(&self) -> Vec<Range<u64>> {
        self.freed.lock().iter().cloned().collect()
    }

    /// Gives back what was freed, and what was made ready for others; whether that was anything.
    pub(super) fn gives_back<U: Units>(&self, units: &U) -> Result<bool> {
        let before = self.freed.lock().bytes();
        self.release(units)?;
        let freed = self.freed.lock().bytes() < before;
        Ok(self.release_ahead(units) || freed)
    }

    /// Gives back what was freed, nobody reads any more, and is known to be gone from stable media.
    ///
    /// # Errors
    /// The host's.
    pub fn release_ready<U: Units>(&self, units: &U) -> Result<()> {
        let ready = self.freed.lock().ready(&self.order, &self.grace);
        match ready.is_empty() {
            true => Ok(()),
            false => units.give_back(ready),
        }
    }

    /// As [`Allocator::release_ready`], having waited for stable media.
    ///
    /// # Errors
    /// The host's.
    pub fn release<U: Units>(&self, units: &U) -> Result<()> {
        let ready = Freed::settled(&self.freed, &self.order, &self.grace)?;
        match ready.is_empty() {
            true => Ok(()),
            false => units.give_back(ready),
        }
    }

    /// Host ranges that are taken and that no entry names: freed, set aside, or made ready.
    pub fn unnamed<U: Units>(&self, units: &U) -> Vec<Range<u64>> {
        let size = units.unit_len();
        let mut ranges: Vec<Range<u64>> = self.freed.lock().iter().cloned().collect();
        let mut add = |taken: &Taken| ranges.push(taken.bytes(size));
        self.assigned.lock().iter().for_each(&mut add);
        self.ahead.lock().iter().for_each(&mut add);
        ranges
    }

    /// Sets space aside, in guest order, for all units that `ranges` (ascending) touch and that have
    /// none of their own; where it can be named at once then, it is made ready, all of it by one sync,
    /// unless that would cost a write of all the space: entries wait for their data then.
    ///
    /// # Errors
    /// The host's, `NoSpace` among them; then nothing more is set aside than before.
    pub fn assign<U: Units>(&self, units: &U, ranges: &[Range<u64>]) -> Result<()> {
        self.begin(units)?;
        let _assigning = self.assigning.lock();
        let mut wanted: Vec<Range<u64>> = Vec::new();
        for guest in ranges {
            self.want(units, guest, &mut wanted)?;
        }
        let mut ready = self.order.policy() == WriteOrder::Ordered && !units.has_backing();
        let mut unnamed = Unnamed::new(units, Vec::new());
        let mut runs = take_wanted(&mut unnamed, &wanted, &mut ready)?;
        reserve(units, ranges, &runs)?;
        if ready && !runs.is_empty() {
            self.order.settle()?;
        }
        unnamed.named();
        let mut assigned = self.assigned.lock();
        for (first, run) in &mut runs {
            (run.zeroed, run.ready) = (run.zeroed || ready, ready);
            assigned.insert(*first, *run);
        }
        Ok(())
    }

    /// Adds the units of a guest range, which lies behind those before, that have no space of their
    /// own and none set aside; ranges may meet in one unit.
    fn want<U: Units>(
        &self,
        units: &U,
        guest: &Range<u64>,
        wanted: &mut Vec<Range<u64>>,
    ) -> Result<()> {
        let size = units.unit_len();
        let seen = wanted.last().map_or(0, |last| last.end);
        let end = guest.end.min(units.disk_end()).div_ceil(size);
        let mut index = (guest.start / size).max(seen);
        while index < end {
            let stop = end.min(units.together(index).end);
            // Tables come first, in guest order too.
            units.make_tables(index..stop)?;
            let free = self.unassigned(units, index..stop)?;
            if !free.is_empty() {
                range::push_merged(wanted, free.clone());
            }
            index = free.end;
        }
        Ok(())
    }

    /// The first run of units that have no space of their own and none set aside; empty, at its end,
    /// where there is none.
    fn unassigned<U: Units>(&self, units: &U, range: Range<u64>) -> Result<Range<u64>> {
        let mut at = range.start;
        while at < range.end {
            let gap = self.assigned.lock().gap(at..range.end);
            at = gap.start;
            while at < gap.end && units.unit(at)?.is_own() {
                at += 1;
            }
            let free = at;
            while at < gap.end && !units.unit(at)?.is_own() {
                at += 1;
            }
            if free < at {
                return Ok(free..at);
            }
        }
        Ok(range.end..range.end)
    }

    /// Makes all completed writes durable, and gives back what was freed.
    ///
    /// # Errors
    /// The host's.
    pub fn flush<U: Units>(&self, units: &U) -> Result<()> {
        self.order.flush()?;
        self.release_ready(units)
    }

    /// Gives back what was set aside, made ready or freed, as far as nobody reads there.  With no
    /// request under way.
    ///
    /// # Errors
    /// The host's.  Where a sync has failed nothing is changed: it is left as by a kill.
    pub fn close<U: Units>(&self, units: &U) -> Result<()> {
        self.order.sound()?;
        drop(self.release_unused(units));
        self.release(units)
    }
}

/// Has the host reserve the parts of space just set aside that guest ranges touch.
fn reserve<U: Units>(units: &U, ranges: &[Range<u64>], runs: &[(u64, Taken)]) -> Result<()> {
    let size = units.unit_len();
    let part = units.part_len().min(RESERVE);
    let mut pieces: Vec<Range<u64>> = Vec::new();
    let mut ranges = ranges.iter().peekable();
    for (first, run) in runs {
        for number in 0..run.count {
            let unit = (first + number) * size..(first + number + 1) * size;
            let host = run.host + number * run.stride;
            while let Some(guest) = ranges.peek() {
                if let Some(met) = intersect(guest, &unit) {
                    let start = down(met.start - unit.start, part);
                    let end = (met.end - unit.start).next_multiple_of(part);
                    // What belongs to the unit goes with its first part.
                    let lead = if start == 0 { run.lead } else { 0 };
                    let piece = host + start - lead..host + end;
                    match pieces.last_mut() {
                        Some(p) if piece.start >= p.end && piece.start - p.end <= RESERVE_GAP => {
                            p.end = piece.end;
                        }
                        Some(p) if (p.start..p.end).contains(&piece.start) => {
                            p.end = p.end.max(piece.end);
                        }
                        _ => pieces.push(piece),
                    }
                }
                if guest.end > unit.end {
                    break;
                }
                ranges.next();
            }
        }
    }
    for piece in pieces {
        match units.data()?.reserve(piece) {
            Err(e) if e.kind() == ErrorKind::Unsupported => break,
            done => done?,
        }
    }
    Ok(())
}

/// Takes space for all wanted units, in as few pieces as there are; for which each run is.  It is made
/// zero where it is to be `ready`, which is no longer so where it cannot be.
fn take_wanted<U: Units>(
    unnamed: &mut Unnamed<'_, U>,
    wanted: &[Range<u64>],
    ready: &mut bool,
) -> Result<Vec<(u64, Taken)>> {
    let mut runs = Vec::new();
    let mut wanted = wanted.iter().cloned();
    let mut left: u64 = wanted.clone().map(|w| range::len(&w)).sum();
    let mut next = wanted.next().unwrap_or(0..0);
    while left > 0 {
        let taken = unnamed.units.take(next.start, left)?;
        unnamed.runs.push(taken);
        *ready = *ready && make_zero(unnamed.units, &taken)?;
        left = left.saturating_sub(taken.count);
        let mut used = 0;
        while used < taken.count && !next.is_empty() {
            let count = range::len(&next).min(taken.count - used);
            runs.push((next.start, taken.part(used..used + count)));
            next.start += count;
            used += count;
            if next.is_empty() {
                next = wanted.next().unwrap_or(0..0);
            }
        }
    }
    Ok(runs)
}

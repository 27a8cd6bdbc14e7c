//! Dropping units, freeing their space, setting space aside; flush and close.

use std::ops::Range;

use crate::error::{ErrorKind, Result};
use crate::image::units::{Allocator, Freed, Space, Target, Units};
use crate::util::align::down;
use crate::util::range::intersect;

/// Units changed under one reservation, at most.
const STEP: u64 = 1024;
/// Freed ranges kept before they must be given back.
const MAX_FREED: usize = 4096;
/// Pieces to reserve that are no further apart than this are reserved as one.
const RESERVE_GAP: u64 = 8192;

impl Allocator {
    /// Drops what units have, all those that an aligned range touches.
    ///
    /// # Errors
    /// The host's.
    pub fn drop_units(&self, units: &dyn Units, guest: &Range<u64>, target: Target) -> Result<()> {
        self.begin(units)?;
        units.note(guest)?;
        let size = units.unit_len();
        let mut at = guest.start;
        while at < guest.end {
            let table = units.table_end(at / size).saturating_mul(size);
            let end = guest.end.min(table).min(down(at, size) + STEP * size);
            let span = down(at, size)..end.next_multiple_of(size);
            let _reserved = loop {
                if let Some(reserved) = self.reservations.reserve(span.clone()) {
                    break reserved;
                }
            };
            let freed = units.drop_units(&(at..end), target)?;
            freed
                .into_iter()
                .try_for_each(|host| self.free(units, host))?;
            at = end;
        }
        self.release(units)
    }

    /// Lets go of a host range that no entry names any more: it is given back once no reader can be
    /// there and the entry that named it is gone from stable media too.
    ///
    /// # Errors
    /// The host's, where so much waits that some must be given back now.
    pub fn free(&self, units: &dyn Units, host: Range<u64>) -> Result<()> {
        let mut freed = self.freed.lock();
        freed.push(host, &self.order, &self.grace);
        let full = freed.len() >= MAX_FREED;
        drop(freed);
        match full {
            true => self.release(units),
            false => Ok(()),
        }
    }

    /// Gives back what was freed and has passed its grace point.
    ///
    /// # Errors
    /// The host's.
    pub fn release(&self, units: &dyn Units) -> Result<()> {
        let ready = Freed::settled(&self.freed, &self.order, &self.grace)?;
        match ready.is_empty() {
            true => Ok(()),
            false => units.give_back(ready),
        }
    }

    /// Sets space aside for all units that `ranges` (ascending) touch and that have none.
    ///
    /// # Errors
    /// The host's, `NoSpace` among them; what was set aside so far stays so.
    pub fn assign(&self, units: &dyn Units, ranges: &[Range<u64>]) -> Result<()> {
        self.begin(units)?;
        let mut pieces: Vec<Range<u64>> = Vec::new();
        let size = units.unit_len();
        for range in ranges {
            let end = range.end.min(units.disk_size()).div_ceil(size);
            let mut index = range.start / size;
            while index < end {
                let stop = end.min(units.table_end(index));
                units.own_table(index)?;
                let free = self.unassigned(units, index..stop)?;
                if free.is_empty() {
                    index = stop;
                    continue;
                }
                let taken = units.take(free.start, free.end - free.start)?;
                for i in 0..taken.count {
                    let unit = (free.start + i) * size..(free.start + i + 1) * size;
                    let Some(part) = intersect(&unit, range) else {
                        continue;
                    };
                    let host = taken.host + i * taken.stride;
                    let host = host + (part.start - unit.start)..host + (part.end - unit.start);
                    match pieces.last_mut() {
                        Some(p) if host.start >= p.end && host.start - p.end <= RESERVE_GAP => {
                            p.end = host.end;
                        }
                        _ => pieces.push(host),
                    }
                }
                self.assigned.lock().insert(free.start, taken);
                index = free.start + taken.count;
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

    /// The first run of units that have no space of their own and none set aside; empty where there
    /// is none.
    fn unassigned(&self, units: &dyn Units, range: Range<u64>) -> Result<Range<u64>> {
        let mut at = range.start;
        while at < range.end {
            let gap = self.assigned.lock().gap(at..range.end);
            let is_free = |i| Ok::<_, crate::Error>(!matches!(units.unit(i)?.space, Space::Own(_)));
            at = gap.start;
            while at < gap.end && !is_free(at)? {
                at += 1;
            }
            let free = at;
            while at < gap.end && is_free(at)? {
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
    pub fn flush(&self, units: &dyn Units) -> Result<()> {
        self.order.flush()?;
        self.release(units)
    }

    /// Gives back what was set aside, made ready or freed, as far as nobody reads there.
    ///
    /// # Errors
    /// The host's.
    pub fn close(&self, units: &dyn Units) -> Result<()> {
        self.release_unused(units);
        self.release(units)
    }
}

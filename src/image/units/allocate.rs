//! Giving units space: reserve, take, fill, wait, publish, free.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::error::Result;
use crate::image::reserve::Reservations;
use crate::image::units::ahead::Ahead;
use crate::image::units::assigned::Assigned;
use crate::image::units::{Freed, Moment, New, Order, Part, Space, Taken, Unit, Units};
use crate::image::{Fill, Old, Slot};
use crate::util::align::{clamp_len, down};
use crate::util::grace::Grace;
use crate::util::range::intersect;

/// Bytes given space in one go at most.
const MAX_SPAN: u64 = 64 << 20;

/// What all allocating formats share.
///
/// Locks, outermost first: the reservation of units; `starting`; `ahead`; then those of the format.
/// `freed` and `assigned` are innermost.  Nothing but the reservation is held while guest data is
/// written.
#[derive(Debug)]
pub struct Allocator {
    /// The order of writes.
    pub order: Order,
    pub(super) grace: Arc<Grace>,
    pub(super) reservations: Reservations,
    started: AtomicBool,
    starting: Mutex<()>,
    pub(super) freed: Mutex<Freed>,
    pub(super) assigned: Mutex<Assigned>,
    pub(super) ahead: Mutex<Ahead>,
}

/// Units that get space together: neighbours that read alike, or one that has something.
#[derive(Debug)]
struct Piece {
    first: u64,
    space: Taken,
    /// Whether the space was taken for it.
    taken: bool,
    /// As it was; of neighbours, each.
    unit: Unit,
    /// What is filled, by the range within the piece.
    fills: Vec<(Part, Range<u64>)>,
}

impl Allocator {
    /// The allocator of an image that was just opened.
    pub fn new(order: Order, grace: Arc<Grace>) -> Self {
        Self {
            order,
            grace,
            reservations: Reservations::default(),
            started: AtomicBool::new(false),
            starting: Mutex::new(()),
            freed: Mutex::default(),
            assigned: Mutex::default(),
            ahead: Mutex::default(),
        }
    }

    /// Whether the first change was announced, so that data may be overwritten in place.
    pub fn has_begun(&self) -> bool {
        self.started.load(Ordering::Acquire)
    }

    /// Has the next change announced again.
    pub fn begin_again(&self) {
        self.started.store(false, Ordering::Release);
    }

    /// Announces the first change of a session, once.
    ///
    /// # Errors
    /// Those of [`Units::announce`].
    pub fn begin(&self, units: &dyn Units) -> Result<()> {
        if self.has_begun() {
            return Ok(());
        }
        let _starting = self.starting.lock();
        if !self.has_begun() {
            units.announce()?;
            self.started.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// [`crate::image::Image::allocate`].
    ///
    /// # Errors
    /// As there.
    pub fn allocate(
        &self,
        units: &dyn Units,
        at: u64,
        len: u64,
        fill: &mut Fill<'_>,
    ) -> Result<u64> {
        self.begin(units)?;
        let size = units.unit_len();
        let first = at / size;
        let limit = (at + len)
            .min(units.table_end(first).saturating_mul(size))
            .min(first * size + MAX_SPAN.max(size));
        let span = first * size..limit.next_multiple_of(size);
        units.note(&(at..limit))?;
        let Some(_reserved) = self.reservations.reserve(span) else {
            return Ok(0);
        };
        let since = self.order.now();
        let mut pieces = Vec::new();
        let planned = self.plan(units, at..limit, &mut pieces);
        let done = planned.and_then(|end| {
            self.fill_all(units, &pieces, since, fill)?;
            Ok(end)
        });
        match done {
            Ok(end) => {
                self.publish(units, pieces)?;
                Ok(end - at)
            }
            Err(e) => {
                let taken = pieces.iter().filter(|p| p.taken);
                taken.for_each(|p| units.untake(&p.space));
                Err(e)
            }
        }
    }

    /// Takes space for the units of a request, up to one that has its own already; where the request
    /// is then covered to.
    fn plan(&self, units: &dyn Units, request: Range<u64>, pieces: &mut Vec<Piece>) -> Result<u64> {
        let size = units.unit_len();
        let mut at = request.start;
        let mut owned = false;
        while at < request.end {
            let index = at / size;
            let unit = units.unit(index)?;
            let within = at - index * size..(request.end - index * size).min(size);
            let fills = wanted(&unit, &within, units.part_len());
            if fills.is_empty() {
                // Stored in place: the caller's to overwrite.
                break;
            }
            if !std::mem::replace(&mut owned, true) {
                units.own_table(index)?;
            }
            at = match unit.whole() {
                Some(part) => self.plan_alike(units, index, part, at..request.end, pieces)?,
                None => self.plan_one(units, index, unit, fills, within, pieces)?,
            };
        }
        Ok(at)
    }

    /// Space for neighbours that have none and read alike.
    fn plan_alike(
        &self,
        units: &dyn Units,
        first: u64,
        part: Part,
        request: Range<u64>,
        pieces: &mut Vec<Piece>,
    ) -> Result<u64> {
        let size = units.unit_len();
        let end = request.end.div_ceil(size);
        let mut count = 1;
        while first + count < end && units.unit(first + count)?.whole() == Some(part) {
            count += 1;
        }
        let space = self.space(units, first, count, part)?;
        let stop = request.end.min((first + space.count) * size);
        let unit = units.part_len();
        let whole = down(request.start - first * size, unit)
            ..(stop - first * size)
                .next_multiple_of(unit)
                .min(space.count * size);
        pieces.push(Piece {
            first,
            space,
            taken: true,
            unit: Unit::plain(part, size),
            fills: vec![(part, whole)],
        });
        Ok(stop)
    }

    /// Space for one unit that has something.
    fn plan_one(
        &self,
        units: &dyn Units,
        index: u64,
        unit: Unit,
        fills: Vec<(Part, Range<u64>)>,
        within: Range<u64>,
        pieces: &mut Vec<Piece>,
    ) -> Result<u64> {
        let size = units.unit_len();
        let own = match unit.space {
            Space::Own(host) => Some(host),
            _ => None,
        };
        let space = match own {
            Some(host) => Taken::new(host, 1, size),
            None => self.space(units, index, 1, Part::Stored)?,
        };
        // In place, up to what is stored already.
        let end = match own {
            Some(_) => fills
                .last()
                .map_or(within.end, |(_, part)| part.end.min(within.end)),
            None => within.end,
        };
        pieces.push(Piece {
            first: index,
            space,
            taken: own.is_none(),
            unit,
            fills,
        });
        Ok(index * size + end)
    }

    /// Space for up to `count` units that read as `part`: set aside, ready, or new.
    fn space(&self, units: &dyn Units, first: u64, count: u64, part: Part) -> Result<Taken> {
        if let Some(space) = self.assigned.lock().take(first, count) {
            return Ok(space);
        }
        let zero = part == Part::Zero || part == Part::Below && !units.has_backing();
        if zero && let Some(space) = self.ready_space(units, first, count)? {
            return Ok(space);
        }
        units.take(first, count)
    }

    /// Has all pieces filled, and what belongs to them written and on stable media.
    fn fill_all(
        &self,
        units: &dyn Units,
        pieces: &[Piece],
        since: Moment,
        fill: &mut Fill<'_>,
    ) -> Result<()> {
        let mut wait = false;
        for piece in pieces {
            fill_piece(units, piece, fill)?;
            units.complete(&piece.space, &piece.entries(units.unit_len()))?;
            wait |= !piece.space.ready;
        }
        match wait {
            true => self.order.settle(since),
            false => Ok(()),
        }
    }

    /// Shows the new entries, neighbours together, and frees what the old ones named.
    fn publish(&self, units: &dyn Units, pieces: Vec<Piece>) -> Result<()> {
        let size = units.unit_len();
        let mut run: Option<(u64, Vec<New>)> = None;
        for piece in &pieces {
            let new = piece.entries(size);
            match &mut run {
                Some((first, words)) if *first + words.len() as u64 == piece.first => {
                    words.extend(new);
                }
                _ => {
                    if let Some((first, words)) = run.replace((piece.first, new)) {
                        units.publish(first, &words)?;
                    }
                }
            }
        }
        if let Some((first, words)) = run {
            units.publish(first, &words)?;
        }
        for piece in pieces.into_iter().filter(|p| p.taken) {
            match piece.unit.space {
                Space::None | Space::Own(_) => {}
                Space::Shared(host) => self.free(units, host..host + size)?,
                Space::Encoded(host) => self.free(units, host)?,
            }
        }
        Ok(())
    }
}

impl Piece {
    /// The new entries of its units.
    fn entries(&self, size: u64) -> Vec<New> {
        let units = (0..self.space.count).map(|i| {
            let unit = i * size..(i + 1) * size;
            let parts = self.fills.iter().filter_map(|(_, part)| {
                let part = intersect(part, &unit)?;
                Some(part.start - unit.start..part.end - unit.start)
            });
            New {
                host: self.space.host + i * self.space.stride,
                stored: parts.collect(),
            }
        });
        units.collect()
    }
}

/// The parts of a unit that must be filled for a range within it to be stored; none where it is
/// stored in place already.
fn wanted(unit: &Unit, within: &Range<u64>, part_len: u64) -> Vec<(Part, Range<u64>)> {
    let own = matches!(unit.space, Space::Own(_));
    let grown = down(within.start, part_len)..within.end.next_multiple_of(part_len);
    let mut fills = Vec::new();
    for (part, range) in &unit.parts {
        match (part, own) {
            (Part::Stored, true) if range.end <= within.start => {}
            // What is stored in place is overwritten there, not filled.
            (Part::Stored, true) => break,
            // All that is stored elsewhere moves.
            (Part::Stored, false) => fills.push((*part, range.clone())),
            _ => fills.extend(intersect(range, &grown).map(|r| (*part, r))),
        }
    }
    fills
}

/// Has a piece filled, clipped to the disk, and the file reach the end of its units.
fn fill_piece(units: &dyn Units, piece: &Piece, fill: &mut Fill<'_>) -> Result<()> {
    let size = units.unit_len();
    let start = piece.first * size;
    let storage = units.data()?;
    let moves = piece.taken && piece.fills.iter().any(|(part, _)| *part == Part::Stored);
    let bytes = match moves {
        true => units.old_bytes(piece.first, &piece.unit)?,
        false => Vec::new(),
    };
    let end = units.disk_size();
    for (part, within) in &piece.fills {
        let guest = start + within.start..(start + within.end).min(end);
        if guest.is_empty() {
            continue;
        }
        fill(Slot {
            guest,
            storage,
            host: piece.space.host + within.start,
            old: match part {
                Part::Below => Old::Below,
                Part::Zero => Old::Zero,
                Part::Stored => Old::Bytes(
                    &bytes
                        [clamp_len(within.start, bytes.len())..clamp_len(within.end, bytes.len())],
                ),
            },
            zeroed: piece.space.zeroed,
        })?;
    }
    let len = (end.saturating_sub(start)).min(piece.space.count * size);
    let last = piece.space.host + len;
    if piece.space.count > 0 && storage.size() < last {
        // Grows the file and never cuts it, whatever other threads write behind us.
        storage.write_at(&[0], last - 1)?;
    }
    Ok(())
}

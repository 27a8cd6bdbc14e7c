//! Giving units space: reserve, take, fill, wait, publish, free.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::error::{ErrorKind, Result};
use crate::image::Fill;
use crate::image::follow::Followed;
use crate::image::open::WriteOrder;
use crate::image::reserve::Reservations;
use crate::image::units::ahead::Ahead;
use crate::image::units::assigned::Assigned;
use crate::image::units::plan::{Goal, Move};
use crate::image::units::{Freed, New, Order, Taken, Units};
use crate::util::align::len64;
use crate::util::grace::Grace;

/// Bytes given space in one go at most.
const MAX_SPAN: u64 = 64 << 20;
/// Runs of new space that one go may get.
const MAX_RUNS: usize = 64;

/// What all allocating formats share.
///
/// Locks, outermost first: `assigning`; the reservation of units; `starting`; what [`Units::open`]
/// locks; `ahead`; then those of the format.  `freed` and `assigned` are innermost.  Nothing but the
/// second and the fourth is held while guest data is written.
#[derive(Debug)]
pub struct Allocator {
    /// The order of writes.
    pub order: Arc<Order>,
    pub(super) grace: Arc<Grace>,
    /// Guest ranges that some thread changes.
    pub reservations: Reservations,
    followed: Followed,
    started: AtomicBool,
    starting: Mutex<()>,
    pub(super) freed: Mutex<Freed>,
    /// Held while space is set aside, so that no two set some aside for one unit.
    pub(super) assigning: Mutex<()>,
    pub(super) assigned: Mutex<Assigned>,
    pub(super) ahead: Mutex<Ahead>,
}

/// Units that get space together; space that no entry was to name is given back when it is dropped.
struct Batch<'a, U: Units> {
    units: &'a U,
    moves: Vec<Move>,
    /// Of how many of them, from the first on, entries may name the space.
    named: usize,
}

impl<U: Units> Batch<'_, U> {
    /// The units themselves, guest bytes of them that were or are to be worked on.
    fn span(&self) -> Range<u64> {
        let first = self.moves.first().map_or(0, |m| m.index);
        first..self.moves.last().map_or(first, |m| m.index + 1)
    }

    /// Leaves out units, and gives their space back.
    fn keep(&mut self, keep: impl Fn(usize, &Move) -> bool) {
        let mut number = 0;
        let dropped = self.moves.extract_if(.., |unit| {
            number += 1;
            !keep(number - 1, unit)
        });
        let dropped: Vec<Move> = dropped.collect();
        untake(self.units, &dropped);
    }
}

impl<U: Units> Drop for Batch<'_, U> {
    fn drop(&mut self) {
        untake(self.units, self.moves.get(self.named..).unwrap_or(&[]));
    }
}

fn untake<U: Units>(units: &U, moves: &[Move]) {
    for taken in moves.iter().filter_map(|m| m.taken) {
        units.untake(&taken);
    }
}

impl Allocator {
    /// The allocator of an image that was just opened.
    pub fn new(order: impl Into<Arc<Order>>, grace: Arc<Grace>) -> Self {
        Self {
            order: order.into(),
            grace,
            reservations: Reservations::default(),
            followed: Followed::default(),
            started: AtomicBool::new(false),
            starting: Mutex::new(()),
            freed: Mutex::default(),
            assigning: Mutex::new(()),
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

    /// Has changes go on without an announcement, until [`Allocator::begin_again`].
    pub fn begin_unannounced(&self) {
        self.started.store(true, Ordering::Release);
    }

    /// Announces the first change of a session, once.
    ///
    /// # Errors
    /// Those of [`Units::announce`].
    pub fn begin<U: Units>(&self, units: &U) -> Result<()> {
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
    pub fn allocate<U: Units>(
        &self,
        units: &U,
        request: Range<u64>,
        fill: &mut Fill<'_>,
    ) -> Result<u64> {
        self.begin(units)?;
        self.allocate_around(units, &request, &request, fill)
    }

    /// [`crate::image::Image::allocate_ahead`].
    ///
    /// # Errors
    /// As there.
    pub fn allocate_following<U: Units>(
        &self,
        units: &U,
        request: Range<u64>,
        fill: &mut Fill<'_>,
    ) -> Result<u64> {
        self.begin(units)?;
        // Where nobody waits for syncs there is nothing to save.
        let around = match self.order.policy() {
            WriteOrder::Ordered => self.followed.around(&request),
            WriteOrder::Unordered => request.clone(),
        };
        self.allocate_around(units, &request, &around, fill)
    }

    /// Where there is no room, again once what was freed is given back.
    fn allocate_around<U: Units>(
        &self,
        units: &U,
        request: &Range<u64>,
        around: &Range<u64>,
        fill: &mut Fill<'_>,
    ) -> Result<u64> {
        match self.try_to_allocate(units, request, around, fill) {
            Err(e) if e.kind() == ErrorKind::NoSpace && self.gives_back(units)? => {
                self.try_to_allocate(units, request, request, fill)
            }
            done => done,
        }
    }

    fn try_to_allocate<U: Units>(
        &self,
        units: &U,
        request: &Range<u64>,
        around: &Range<u64>,
        fill: &mut Fill<'_>,
    ) -> Result<u64> {
        let goal = Goal::new(units, request, around, MAX_SPAN)?;
        units.note(&goal.request)?;
        let (must, wish) = goal.spans()?;
        let Some(reserved) = self.reservations.reserve_around(must, wish) else {
            return Ok(0);
        };
        let moves = goal.plan(reserved.range())?;
        if moves.is_empty() {
            return Ok(0);
        }
        let mut batch = Batch {
            units,
            moves,
            named: 0,
        };
        self.carry_out(&goal, &mut batch, fill)
    }

    /// Gives the units of a batch space; how many bytes of the request are there then.
    fn carry_out<U: Units>(
        &self,
        goal: &Goal<'_, U>,
        batch: &mut Batch<'_, U>,
        fill: &mut Fill<'_>,
    ) -> Result<u64> {
        let units = goal.units;
        let asked = goal.request.start / units.unit_len();
        let (open, entries) = units.open(batch.span(), asked, goal.waits)?;
        batch.keep(|_, unit| open.contains(&unit.index));
        let first = batch.moves.partition_point(|unit| unit.index < asked);
        self.give_space(batch, first, goal.waits)?;
        if !goal.fill(&batch.moves, fill)? {
            batch.keep(|_, unit| !unit.asked.is_empty());
            if !units.stores_whole() {
                let moves = batch.moves.iter_mut();
                moves.for_each(|unit| unit.filled = unit.asked.clone());
            }
        }
        let new: Vec<New> = batch.moves.iter().map(Move::new_entry).collect();
        units.complete(&entries, &new)?;
        // Ready space says nothing of what a unit held until now.
        if goal.waits || !batch.moves.iter().all(Move::is_ready) {
            self.order.settle()?;
        }
        // From here on the file may name the space, whatever the answer.
        batch.named = new.len();
        units.publish(entries, &new, &mut batch.named)?;
        let size = units.unit_len();
        let (Some(start), Some(end)) = (new.first(), new.last()) else {
            return Ok(0);
        };
        let start = start.index * size + start.filled.start;
        let end = end.index * size + end.filled.end;
        if goal.waits {
            self.followed.worked_on(start..end);
        }
        let moved = new.iter().filter(|new| new.has_moved());
        let hosts = moved.filter_map(|new| units.unnamed(new.old.space));
        self.free_all(units, hosts)?;
        Ok(end.min(goal.request.end) - goal.request.start)
    }

    /// Takes space for all units of a batch that have none of their own, in guest order from the one
    /// numbered `first` on.  Where there is not enough, those that nobody asked for are no longer in
    /// it, and then those behind.
    fn give_space<U: Units>(
        &self,
        batch: &mut Batch<'_, U>,
        first: usize,
        waits: bool,
    ) -> Result<()> {
        let len = batch.moves.len();
        let got = self.give_run(batch, first..len, waits)?;
        batch.keep(|number, _| number < first || number < got);
        if got == len
            && self
                .give_run(batch, 0..first, waits)
                .is_ok_and(|got| got == first)
        {
            return Ok(());
        }
        batch.keep(|number, _| number >= first);
        Ok(())
    }

    /// Takes space for some units of a batch; up to which of them there was some.
    fn give_run<U: Units>(
        &self,
        batch: &mut Batch<'_, U>,
        moves: Range<usize>,
        waits: bool,
    ) -> Result<usize> {
        let mut at = moves.start;
        for _ in 0..MAX_RUNS {
            while batch.moves[at..moves.end]
                .first()
                .is_some_and(|m| m.unit.is_own())
            {
                at += 1;
            }
            let wanting = batch.moves[at..moves.end].iter();
            let count = wanting.take_while(|m| !m.unit.is_own()).count();
            if count == 0 {
                break;
            }
            let space = self.space(batch.units, batch.moves[at].index, len64(count), waits);
            let space = match space {
                Err(e) if at == moves.start => return Err(e),
                Err(_) => break,
                Ok(space) => space,
            };
            for (unit, number) in batch.moves[at..at + count].iter_mut().zip(0..space.count) {
                let taken = space.part(number..number + 1);
                unit.host = taken.host;
                unit.taken = Some(taken);
                at += 1;
            }
        }
        Ok(at)
    }

    /// Space for up to `count` units: set aside, ready, or new.
    fn space<U: Units>(&self, units: &U, first: u64, count: u64, waits: bool) -> Result<Taken> {
        if let Some(space) = self.assigned.lock().take(first, count) {
            return Ok(space);
        }
        if !waits && let Some(space) = self.ready_space(units, first, count)? {
            return Ok(space);
        }
        units.take(first, count)
    }
}

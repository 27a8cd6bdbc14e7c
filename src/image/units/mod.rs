//! The ground of formats that allocate: units of host space for units of the disk.
//!
//! A format says what its entries hold and how it takes space ([`Units`]).  Everything that is the
//! same for all of them exists once, in [`Allocator`]: one writer at a time for a unit, filling
//! with no lock held, what must be on stable media before an entry appears, space set aside in
//! guest order, space made ready ahead, freed space that waits, and the first change of a session.
//!
//! ```text
//! reserve the units -> take space -> fill it -> wait for stable media -> publish -> free the old
//! ```
//!
//! Whatever fails before "publish" leaves the entries as they were and gives the space back; from
//! then on the file may name the space, and what it may name is not given back whatever the answer.
//!
//! Units whose old content a power cut must not lose, or that hold something which shows through,
//! wait for one sync before their entries appear: as many as lie side by side wait together, and
//! where a writer goes on in order, those that come next with them ([`crate::image::follow`]).
//! Units that read as zeroes before and after need no sync of their own, because the space they
//! get was made zero on stable media ahead of them.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::storage::Storage;

mod ahead;
mod allocate;
mod assigned;
mod change;
mod fill;
mod freed;
mod order;
mod pack;
mod plan;
mod slots;

pub use allocate::Allocator;
pub use freed::Freed;
pub use order::{Moment, Order};
pub use slots::{Fault, Grid, Slots};

/// What part of a unit reads as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// As the layer below, or as zeroes where there is none.
    Below,
    /// As zeroes.
    Zero,
    /// As what is stored, plain or compressed.
    Stored,
}

/// The space that a unit has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// None.
    None,
    /// Its own, whose data begins at this host offset: it may be written in place.
    Own(u64),
    /// Shared with others, such as internal snapshots: it may only be read.
    Shared(u64),
    /// These host bytes hold it compressed.
    Encoded {
        /// Offset of the first.
        start: u64,
        /// Offset behind the last.
        end: u64,
    },
}

/// One unit, as its entry describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unit {
    /// The space it has.
    pub space: Space,
    /// What all of it reads as; `None` where its parts differ ([`Units::parts`]).
    pub whole: Option<Content>,
    /// What else the format keeps in an entry.
    pub word: u64,
}

impl Unit {
    /// Whether it has space of its own.
    pub fn is_own(&self) -> bool {
        matches!(self.space, Space::Own(_))
    }
}

/// Space for some units, one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    /// Host offset of the data of the first.
    pub host: u64,
    /// How many units it is for.
    pub count: u64,
    /// Bytes from the data of one to that of the next.
    pub stride: u64,
    /// Bytes before the data of each that belong to it too.
    pub lead: u64,
    /// It reads as zeroes.
    pub zeroed: bool,
    /// It does so on stable media, and so does all that must be there before an entry names it.
    pub ready: bool,
}

impl Taken {
    /// Space of which nothing is known.
    pub fn new(host: u64, count: u64, stride: u64) -> Self {
        Self {
            host,
            count,
            stride,
            lead: 0,
            zeroed: false,
            ready: false,
        }
    }

    /// The space of some of the units, counted from the first.
    pub fn part(self, units: Range<u64>) -> Self {
        Self {
            host: self.host + units.start * self.stride,
            count: units.end - units.start,
            ..self
        }
    }

    /// Host bytes from the first that belongs to the first unit to the end of the data of the last,
    /// of `unit` bytes each.
    pub fn bytes(&self, unit: u64) -> Range<u64> {
        let last = self.host + self.count.saturating_sub(1) * self.stride;
        self.host - self.lead..last + unit
    }
}

/// A unit's new entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct New {
    /// Which unit.
    pub index: u64,
    /// As it was.
    pub old: Unit,
    /// Host offset of its data.
    pub host: u64,
    /// What of it is stored there from now on, whole parts, beside what was stored before; the rest
    /// reads as before.
    pub filled: Range<u64>,
}

impl New {
    /// Whether it has other space than before.
    pub fn has_moved(&self) -> bool {
        !self.old.is_own()
    }
}

/// What a format gives: where its units are, and how space is taken.
///
/// Methods that change a unit are called with it reserved.  None is called with a lock of the
/// [`Allocator`] held but `ahead`, so that each format's own locks lie inside that one.
pub trait Units: fmt::Debug + Send + Sync {
    /// Entries that are about to change, from before their units are filled until they show: what the
    /// format locks or makes for them.  Dropped, they stay as they were.
    type Entries<'a>
    where
        Self: 'a;

    /// What the formats share.
    ///
    /// # Errors
    /// `ReadOnly`.
    fn allocator(&self) -> Result<&Allocator>;
    /// Bytes of one unit.
    fn unit_len(&self) -> u64;
    /// Bytes of the smallest part of a unit that can be stored alone; a unit's where it has none.
    fn part_len(&self) -> u64 {
        self.unit_len()
    }
    /// Whether all of a unit that gets space is stored there.
    fn stores_whole(&self) -> bool {
        self.part_len() == self.unit_len()
    }
    /// Whether parts of one unit can be published by several threads at once.
    fn has_free_parts(&self) -> bool {
        false
    }
    /// End of what is filled: the disk's size in bytes, or up to a unit more.
    fn disk_end(&self) -> u64;
    /// Whether what no unit has is read from a layer below.
    fn has_backing(&self) -> bool;
    /// The object that guest data is written to.
    ///
    /// # Errors
    /// Where it is not open.
    fn data(&self) -> Result<&dyn Storage>;
    /// The units around `index` that one allocation may change together, and no others.
    fn together(&self, index: u64) -> Range<u64>;
    /// The first unit from `index` on, below `end`, that `target` may have to change; `end` where
    /// none has.  A hint, for disks that are mostly empty.
    ///
    /// # Errors
    /// The host's.
    fn next_to_drop(&self, index: u64, end: u64, target: Target) -> Result<u64> {
        let _ = (end, target);
        Ok(index)
    }
    /// The unit `index`, waiting for its table where need be.
    ///
    /// # Errors
    /// `Corrupt` where its entry points outside what it may; the host's.
    fn unit(&self, index: u64) -> Result<Unit>;
    /// What the parts of a unit read as that a range within it touches, in runs, in order, without
    /// gaps; they may reach past the range.  For units whose parts differ.
    ///
    /// # Errors
    /// As [`Units::unit`].
    fn parts(
        &self,
        index: u64,
        unit: &Unit,
        within: &Range<u64>,
    ) -> Result<Vec<(Content, Range<u64>)>> {
        let _ = (index, within);
        let whole = unit.whole.unwrap_or(Content::Stored);
        Ok(vec![(whole, 0..self.unit_len())])
    }
    /// All bytes of a unit that is compressed.
    ///
    /// # Errors
    /// `Corrupt` where they do not decode; the host's.
    fn decoded(&self, index: u64, unit: &Unit) -> Result<Arc<[u8]>> {
        let _ = (index, unit);
        Err(Error::unsupported("the format has no compressed data"))
    }

    /// Before the first change of a session: what must be said in the file, durably, before anything
    /// in it changes (dirty flags, the identity of the state).
    ///
    /// # Errors
    /// The host's; then nothing is changed.
    fn announce(&self) -> Result<()> {
        Ok(())
    }
    /// Before a range of the disk changes: what must be noted of it.
    ///
    /// # Errors
    /// The host's.
    fn note(&self, guest: &Range<u64>) -> Result<()> {
        let _ = guest;
        Ok(())
    }
    /// How many units are made ready ahead of those who want them: at first, and at most.  None where
    /// entries of this image always wait.
    fn ahead(&self) -> Range<u64>;
    /// Takes space for 1 to `count` units in one piece, unit `index` being the first; unless it is
    /// ready it is named by an entry only after all that this wrote is on stable media.
    ///
    /// # Errors
    /// `NoSpace`, and the host's; then nothing is taken.
    fn take(&self, index: u64, count: u64) -> Result<Taken>;
    /// Gives space back that was taken and that no entry names, in the file neither.  Where that
    /// fails it stays a leak.
    fn untake(&self, taken: &Taken);
    /// Sees to it that the tables for the entries of `units` are there, for space that is set aside.
    ///
    /// # Errors
    /// The host's, `NoSpace` among them.
    fn make_tables(&self, units: Range<u64>) -> Result<()> {
        let _ = units;
        Ok(())
    }
    /// Sees to it that the entries of `units` can be changed in place, at least that of `first`, and
    /// says of which that is so; `waits` where a sync follows before they do, so that nothing need be
    /// on stable media yet.
    ///
    /// # Errors
    /// The host's, `NoSpace` among them.
    fn open(
        &self,
        units: Range<u64>,
        first: u64,
        waits: bool,
    ) -> Result<(Range<u64>, Self::Entries<'_>)>;
    /// After the data of units was written: writes what else must be there, in units and in tables
    /// that nothing points at, before entries show.
    ///
    /// # Errors
    /// The host's.
    fn complete(&self, entries: &Self::Entries<'_>, new: &[New]) -> Result<()> {
        let _ = (entries, new);
        Ok(())
    }
    /// Writes entries, which are neighbours in order, and shows them to readers.
    ///
    /// # Errors
    /// The host's; the file may then have the new entries or the old ones, but for those from number
    /// `reached` on where that was lowered: it has the old ones of these, whatever comes.
    fn publish(&self, entries: Self::Entries<'_>, new: &[New], reached: &mut usize) -> Result<()>;
    /// Whether entries of this image can change as `target` says.
    ///
    /// # Errors
    /// `Unsupported` where they cannot.
    fn may_drop(&self, target: Target) -> Result<()> {
        let _ = target;
        Ok(())
    }
    /// Changes the entries of all units of an aligned range of the disk, so that it reads as zeroes,
    /// as `target` says; adds the host ranges that nothing names then to `freed`.
    ///
    /// # Errors
    /// The host's; `freed` then has those of the entries that were changed.
    fn drop_units(
        &self,
        guest: &Range<u64>,
        target: Target,
        freed: &mut Vec<Range<u64>>,
    ) -> Result<()>;
    /// The host bytes to give back of space that a unit no longer has.
    fn unnamed(&self, old: Space) -> Option<Range<u64>> {
        match old {
            Space::None => None,
            Space::Own(host) | Space::Shared(host) => Some(host..host + self.unit_len()),
            Space::Encoded { start, end } => Some(start..end),
        }
    }
    /// Takes back space that was freed: no reader is there any more, and no entry on stable media.
    ///
    /// # Errors
    /// The host's; then it stays a leak.
    fn give_back(&self, freed: Vec<Range<u64>>) -> Result<()> {
        let _ = freed;
        Ok(())
    }
}

/// Space that was taken and that nothing names yet: given back when it is dropped.
#[derive(Debug)]
pub struct Unnamed<'a, U: Units> {
    units: &'a U,
    /// Runs of it.
    pub runs: Vec<Taken>,
}

impl<'a, U: Units> Unnamed<'a, U> {
    /// Some runs, none perhaps.
    pub fn new(units: &'a U, runs: Vec<Taken>) -> Self {
        Self { units, runs }
    }

    /// From now on something may name it, whatever comes.
    pub fn named(mut self) -> Vec<Taken> {
        std::mem::take(&mut self.runs)
    }
}

impl<U: Units> Drop for Unnamed<'_, U> {
    fn drop(&mut self) {
        self.runs.iter().for_each(|run| self.units.untake(run));
    }
}

/// What units become that are dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Zeroes, their space given back.
    Zero,
    /// Zeroes, their space kept where it is their own.
    ZeroKept,
    /// Zeroes where they have something of their own, their space given back; what the layer below
    /// has stays there.
    Dropped,
    /// What the layer below has, their space given back.
    Below,
}

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
//! then on the file may name the space, and it is not given back whatever the answer.

use std::fmt;
use std::ops::Range;

use crate::error::Result;
use crate::storage::{Storage, Zeroing};

mod ahead;
mod allocate;
mod assigned;
mod change;
mod freed;
mod order;

pub use allocate::Allocator;
pub use freed::Freed;
pub use order::{Moment, Order};

/// What part of a unit reads as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// As the layer below, or as zeroes where there is none.
    Below,
    /// As zeroes.
    Zero,
    /// As what is stored, plain or compressed.
    Stored,
}

/// The space that a unit has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Space {
    /// None.
    None,
    /// Its own, whose data begins at this host offset: it may be written in place.
    Own(u64),
    /// Shared with others, such as internal snapshots: it may only be read.
    Shared(u64),
    /// A range of host bytes that holds it compressed.
    Encoded(Range<u64>),
}

/// One unit, as its entry describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// The space it has.
    pub space: Space,
    /// What it reads as, in runs of bytes within the unit, in order and without gaps.
    pub parts: Vec<(Part, Range<u64>)>,
}

impl Unit {
    /// A unit of `len` bytes without space that reads as `part` everywhere.
    pub fn plain(part: Part, len: u64) -> Self {
        Self {
            space: Space::None,
            parts: vec![(part, 0..len)],
        }
    }

    /// A unit of `len` bytes that is stored in space of its own from `host` on.
    pub fn stored(host: u64, len: u64) -> Self {
        Self {
            space: Space::Own(host),
            parts: vec![(Part::Stored, 0..len)],
        }
    }

    /// What all of it reads as, where it has no space.
    fn whole(&self) -> Option<Part> {
        match (&self.space, &self.parts[..]) {
            (Space::None, [(part, _)]) => Some(*part),
            _ => None,
        }
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

    /// Host bytes from the data of the first to the end of that of the last, of `unit` bytes each.
    pub fn bytes(&self, unit: u64) -> Range<u64> {
        self.host..self.host + self.count.saturating_sub(1) * self.stride + unit
    }
}

/// A unit's new entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct New {
    /// Host offset of its data.
    pub host: u64,
    /// What of the unit is stored there from now on; the rest reads as before.
    pub stored: Vec<Range<u64>>,
}

/// What units become that are dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Zeroes, whatever lies below.
    Zero(Zeroing),
    /// Whatever needs no space and no data of the layer below: zeroes.
    Nothing,
}

/// What a format gives: where its units are, and how space is taken.
///
/// All methods but [`Units::unit`] are called with the units in question reserved, or for no unit in
/// particular; none is called with a lock of the [`Allocator`] held, so that each format's own locks
/// lie inside those of the allocator.
pub trait Units: fmt::Debug + Send + Sync {
    /// Bytes of one unit: a power of two.
    fn unit_len(&self) -> u64;
    /// Bytes of the smallest part of a unit that can be stored alone; a unit's where it has none.
    fn part_len(&self) -> u64 {
        self.unit_len()
    }
    /// Size of the disk in bytes.
    fn disk_size(&self) -> u64;
    /// Whether what no unit has is read from a layer below.
    fn has_backing(&self) -> bool;
    /// The object that guest data is written to.
    ///
    /// # Errors
    /// Where it is not open.
    fn data(&self) -> Result<&dyn Storage>;
    /// End of the units whose entries are in one table with that of `index`: no allocation goes
    /// further.
    fn table_end(&self, index: u64) -> u64;
    /// The unit `index`, waiting for its table where need be.
    ///
    /// # Errors
    /// `Corrupt` where its entry points outside what it may; the host's.
    fn unit(&self, index: u64) -> Result<Unit>;
    /// Bytes that a unit holds compressed, or shares, as they are to be copied: all of it.
    ///
    /// # Errors
    /// `Corrupt` where they do not decode; the host's.
    fn old_bytes(&self, index: u64, unit: &Unit) -> Result<Vec<u8>>;

    /// Before the first change of a session: what must be said in the file, durably, before anything
    /// in it changes (dirty flags, the identity of the state).
    ///
    /// # Errors
    /// The host's; then nothing is changed.
    fn announce(&self) -> Result<()>;
    /// Before a range of the disk changes: what must be noted of it.
    ///
    /// # Errors
    /// The host's.
    fn note(&self, guest: &Range<u64>) -> Result<()> {
        let _ = guest;
        Ok(())
    }
    /// Sees to it that the entry of a unit can be changed in place.
    ///
    /// # Errors
    /// The host's, `NoSpace` among them.
    fn own_table(&self, index: u64) -> Result<()> {
        let _ = index;
        Ok(())
    }
    /// Takes space for 1 to `count` units in one piece, unit `index` being the first; unless it is
    /// ready it is named by an entry only after all that this wrote is on stable media.
    ///
    /// # Errors
    /// `NoSpace`, and the host's; then nothing is taken.
    fn take(&self, index: u64, count: u64) -> Result<Taken>;
    /// Gives space back that was taken and that no entry names, in the file neither.  Where that
    /// fails it stays a leak.
    fn untake(&self, taken: &Taken);
    /// After the data of units was written: writes what else a unit must hold before an entry
    /// names it.
    ///
    /// # Errors
    /// The host's.
    fn complete(&self, taken: &Taken, new: &[New]) -> Result<()> {
        let _ = (taken, new);
        Ok(())
    }
    /// Writes the entries of the units from `first` on, then shows them to readers.
    ///
    /// # Errors
    /// The host's; the file may then have the new entries or the old ones.
    fn publish(&self, first: u64, new: &[New]) -> Result<()>;
    /// Changes the entries of all units that an aligned range of the disk touches, within one table;
    /// the host ranges that nothing names then.
    ///
    /// # Errors
    /// The host's.
    fn drop_units(&self, guest: &Range<u64>, target: Target) -> Result<Vec<Range<u64>>>;
    /// Takes back space that was freed: no reader is there any more, and no entry on stable media.
    ///
    /// # Errors
    /// The host's; then it stays a leak.
    fn give_back(&self, freed: Vec<Range<u64>>) -> Result<()>;
}

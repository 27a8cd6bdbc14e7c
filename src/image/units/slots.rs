//! Units of one size, one behind the other from a start: which of them are in use, and taking them.

use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};
use crate::image::units::Taken;
use crate::storage::{Storage, Zeroing};
use crate::util::align::{clamp_len, len64};

/// Most units of a file that is written to or checked: a bit each.
const MAX_UNITS: u64 = 1 << 31;

/// Where the units of a file are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Where the first begins.
    pub start: u64,
    /// Bytes of each before its data.
    pub lead: u64,
    /// Bytes from one to the next, all of one unit.
    pub stride: u64,
}

impl Grid {
    /// Where a unit is, with what is before its data.
    pub fn host(self, number: u64) -> Range<u64> {
        let start = self.start + number * self.stride;
        start..start + self.stride
    }

    /// The number of the unit whose data begins at `host`.
    pub fn number(self, host: u64) -> u64 {
        (host - self.lead - self.start) / self.stride
    }

    /// The space of units, of which nothing is known.
    pub fn taken(self, first: u64, count: u64) -> Taken {
        Taken {
            lead: self.lead,
            ..Taken::new(self.host(first).start + self.lead, count, self.stride)
        }
    }
}

/// What may be wrong with an entry of a table that names units by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// Its unit begins behind the end of the file.
    Lost,
    /// The file ends within its unit.
    Cut,
    /// Another entry, before it, names the same unit.
    Shared,
}

impl Fault {
    /// What is wrong with entry `index`, which names `number`.
    pub fn text(self, index: u64, number: u64) -> String {
        let what = match self {
            Self::Lost => "begins behind the end of the file",
            Self::Cut => "is cut off by the end of the file",
            Self::Shared => "is named by another entry too",
        };
        format!("block {index}: its map entry is {number:#x}, and that block {what}")
    }
}

/// Which units of a file are in use: entries name them, or will.
#[derive(Debug, Default)]
pub struct Slots {
    bits: Vec<u64>,
    used: u64,
    end: u64,
    /// All before this word of the bits are in use.
    full: usize,
}

impl Slots {
    /// How many are in use.
    pub fn used(&self) -> u64 {
        self.used
    }

    /// Behind the last that is in use, or more.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Has the end not lie before `end`.
    pub fn reach(&mut self, end: u64) {
        self.end = self.end.max(end);
    }

    /// Notes that an entry names a unit of a file of `size` bytes, and says what is wrong with that.
    ///
    /// # Errors
    /// `NoSpace` for more units than are kept track of.
    pub fn name(&mut self, grid: Grid, number: u64, size: u64) -> Result<Option<Fault>> {
        let host = grid.host(number);
        if host.start + grid.lead >= size {
            return Ok(Some(Fault::Lost));
        }
        check_number(number)?;
        Ok(match self.add(number) {
            false => Some(Fault::Shared),
            true => (host.end > size).then_some(Fault::Cut),
        })
    }

    /// Notes that a unit is in use; false where it was.
    pub fn add(&mut self, number: u64) -> bool {
        let word = clamp_len(number / 64, usize::MAX);
        if word >= self.bits.len() {
            self.bits.resize(word + 1, 0);
        }
        let bit = 1 << (number % 64);
        let new = self.bits[word] & bit == 0;
        self.bits[word] |= bit;
        self.used += u64::from(new);
        self.reach(number + 1);
        new
    }

    /// Notes that a unit is in no use any more.
    fn remove(&mut self, number: u64) {
        let word = clamp_len(number / 64, usize::MAX);
        self.bits[word] &= !(1 << (number % 64));
        self.used -= 1;
        self.full = self.full.min(word);
    }

    /// The first unit that is in no use, unless that is at the end.
    fn gap(&mut self) -> Option<u64> {
        let rest = &self.bits[self.full.min(self.bits.len())..];
        let full = rest.iter().take_while(|word| **word == u64::MAX).count();
        self.full += full;
        let word = self.bits.get(self.full);
        let ones = word.map_or(0, |word| word.trailing_ones());
        Some(len64(self.full) * 64 + u64::from(ones)).filter(|number| *number < self.end)
    }

    /// The first units in no use that lie where all would lie that are, had none a gap before it.
    pub fn holes(&self, most: usize) -> Vec<u64> {
        let is_free = |number: &u64| {
            let word = self.bits.get(clamp_len(number / 64, usize::MAX));
            word.is_none_or(|word| word & 1 << (number % 64) == 0)
        };
        (0..self.used).filter(is_free).take(most).collect()
    }

    /// The first units in no use before the end.
    pub fn gaps(&self, most: usize) -> Vec<u64> {
        let words = self.bits.iter().enumerate().skip(self.full);
        let free = words.flat_map(|(index, word)| {
            let free = (0..64).filter(move |bit| word & 1 << bit == 0);
            free.map(move |bit| len64(index) * 64 + bit)
        });
        free.take_while(|number| *number < self.end)
            .take(most)
            .collect()
    }

    /// Has the end right behind the last unit in use.
    pub fn trim(&mut self) {
        while self.bits.last() == Some(&0) {
            self.bits.pop();
        }
        let last = self.bits.last().map_or(64, |word| word.leading_zeros());
        self.end = (len64(self.bits.len()) * 64).saturating_sub(u64::from(last % 64));
    }

    /// Which units to take where up to `count` are wanted: the first gap, else those at the end, one
    /// at least and no more than `room` of them in all.
    pub fn vacant(&mut self, count: u64, room: u64) -> Range<u64> {
        match self.gap() {
            Some(number) => number..number + 1,
            None => {
                let count = count.min(room.saturating_sub(self.end)).max(1);
                self.end..self.end + count
            }
        }
    }

    /// Takes units that no entry names; they are in the file as a whole then.
    ///
    /// # Errors
    /// `NoSpace`, and the host's; then none is taken.
    pub fn claim(&mut self, storage: &dyn Storage, grid: Grid, units: Range<u64>) -> Result<Taken> {
        check_number(units.end)?;
        let host = grid.host(units.start).start..grid.host(units.end).start;
        let size = storage.size();
        let there = host.start..host.end.min(size);
        let zeroed = there.is_empty() || storage.zero(there, Zeroing::MayUnmap).is_ok();
        if size < host.end {
            // Grows the file and never cuts it, whatever other threads write behind us.
            storage.write_at(&[0], host.end - 1)?;
        }
        let taken = grid.taken(units.start, units.end - units.start);
        units.for_each(|number| {
            self.add(number);
        });
        Ok(Taken { zeroed, ..taken })
    }

    /// Gives units back that were taken.
    pub fn untake(&mut self, grid: Grid, taken: &Taken) {
        let first = grid.number(taken.host);
        (first..first + taken.count).for_each(|number| self.remove(number));
    }
}

fn check_number(number: u64) -> Result<()> {
    match number < MAX_UNITS {
        true => Ok(()),
        false => Err(Error::new(
            ErrorKind::NoSpace,
            format!("block {number} of the file (allowed: numbers below {MAX_UNITS})"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryStorage;

    const GRID: Grid = Grid {
        start: 1000,
        lead: 10,
        stride: 110,
    };

    #[test]
    fn gaps_come_first_and_the_end_next_and_all_is_in_the_file_then() {
        let storage = MemoryStorage::new();
        let mut slots = Slots::default();
        for number in (0..200).filter(|n| ![70, 130].contains(n)) {
            assert!(slots.add(number));
        }
        assert!(!slots.add(5), "it was in use");
        assert_eq!(slots.vacant(9, 1000), 70..71);
        let taken = slots.claim(&storage, GRID, 70..71).expect("has room");
        assert_eq!(taken.host, 1000 + 70 * 110 + 10);
        assert!(taken.zeroed && storage.size() >= taken.host + 100);
        assert_eq!(slots.holes(9), [130]);
        assert_eq!(slots.vacant(9, 1000), 130..131);
        slots.add(130);
        assert_eq!(slots.vacant(9, 1000), 200..209);
        assert_eq!(slots.vacant(9, 203), 200..203);
        assert_eq!(slots.vacant(9, 0), 200..201, "one at least");
        slots.untake(GRID, &taken);
        assert_eq!(slots.vacant(9, 1000), 70..71);
        slots.untake(GRID, &GRID.taken(130, 70));
        slots.trim();
        assert_eq!((slots.used(), slots.end()), (129, 130));
        slots
            .claim(&storage, GRID, MAX_UNITS..MAX_UNITS + 1)
            .expect_err("too far");
    }

    #[test]
    fn entries_that_cannot_be_right_are_told_apart() {
        let mut slots = Slots::default();
        // Four units, and half of the fifth.
        let size = 1000 + 4 * 110 + 60;
        let mut name = |number| slots.name(GRID, number, size).expect("is near");
        assert_eq!(name(3), None);
        assert_eq!(name(3), Some(Fault::Shared));
        assert_eq!(name(4), Some(Fault::Cut));
        assert_eq!(name(5), Some(Fault::Lost));
        assert_eq!(name(u64::from(u32::MAX)), Some(Fault::Lost));
        assert_eq!((slots.used(), slots.end()), (2, 5));
    }
}

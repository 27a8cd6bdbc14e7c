//! Which blocks of the file are in use.

use crate::error::{Error, ErrorKind, Result};
use crate::formats::vdi::header::{COUNT, Header, Kind, ZERO};
use crate::formats::vdi::image::{Shape, Vdi};
use crate::storage::Zeroing;
use crate::util::align::{clamp_len, len64};

/// Most blocks of a file that is written to or checked: a bit each.
const MAX_BLOCKS: u64 = 1 << 31;

/// Which blocks of the file are in use: the map names them, or will.
#[derive(Debug, Default)]
pub(super) struct Slots {
    bits: Vec<u64>,
    /// How many.
    pub(super) used: u64,
    /// Others take the block of this number next: nothing from it on is in use.
    pub(super) end: u64,
    /// What the header in the file says of that, as far as is known.
    pub(super) counted: Option<u64>,
    /// All before this word of the bits are in use.
    full: usize,
}

/// What may be wrong with an entry of the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fault {
    /// Its block begins behind the end of the file.
    Lost,
    /// The file ends within its block.
    Cut,
    /// Another entry, before it, names the same block.
    Shared,
}

impl Fault {
    pub(super) fn text(self, index: u64, number: u64) -> String {
        let what = match self {
            Self::Lost => "begins behind the end of the file",
            Self::Cut => "is cut off by the end of the file",
            Self::Shared => "is named by another entry too",
        };
        format!("block {index}: its map entry is {number:#x}, and that block {what}")
    }
}

impl Slots {
    /// Notes that a block is in use; false where it was.
    pub(super) fn add(&mut self, number: u64) -> bool {
        let word = clamp_len(number / 64, usize::MAX);
        if word >= self.bits.len() {
            self.bits.resize(word + 1, 0);
        }
        let bit = 1 << (number % 64);
        let new = self.bits[word] & bit == 0;
        self.bits[word] |= bit;
        self.used += u64::from(new);
        self.end = self.end.max(number + 1);
        new
    }

    /// Notes that a block is in no use any more.
    pub(super) fn remove(&mut self, number: u64) {
        let word = clamp_len(number / 64, usize::MAX);
        self.bits[word] &= !(1 << (number % 64));
        self.used -= 1;
        self.full = self.full.min(word);
    }

    /// The first block that is in no use, unless that is at the end.
    pub(super) fn gap(&mut self) -> Option<u64> {
        let rest = &self.bits[self.full.min(self.bits.len())..];
        let full = rest.iter().take_while(|word| **word == u64::MAX).count();
        self.full += full;
        let ones = self
            .bits
            .get(self.full)
            .map_or(0, |word| word.trailing_ones());
        Some(len64(self.full) * 64 + u64::from(ones)).filter(|number| *number < self.end)
    }

    /// The first blocks in no use that lie where all would lie that are, had none a gap before it.
    pub(super) fn holes(&self, most: usize) -> Vec<u64> {
        let is_free = |number: &u64| {
            let word = self.bits.get(clamp_len(number / 64, usize::MAX));
            word.is_none_or(|word| word & 1 << (number % 64) == 0)
        };
        (0..self.used).filter(is_free).take(most).collect()
    }

    /// Has the end right behind the last block in use.
    pub(super) fn trim(&mut self) {
        while self.bits.last() == Some(&0) {
            self.bits.pop();
        }
        let last = self.bits.last().map_or(64, |word| word.leading_zeros());
        self.end = (len64(self.bits.len()) * 64).saturating_sub(u64::from(last % 64));
    }
}

fn too_many(number: u64) -> Error {
    let text = format!("block {number} of the file (allowed: numbers below {MAX_BLOCKS})");
    Error::new(ErrorKind::NoSpace, text)
}

impl Vdi {
    /// Refuses what is never changed.
    pub(super) fn may_change(&self) -> Result<()> {
        let flags = self.shape.load().header.flags();
        match self.kind == Kind::Undo || flags != 0 {
            true => Err(Error::unsupported(format!(
                "a disk of type '{}' with flags {flags:#x} is not written to (allowed: other types than undo, without flags)",
                self.kind.word()
            ))),
            false => Ok(()),
        }
    }

    /// Learns which blocks are in use.
    ///
    /// # Errors
    /// `Corrupt` where an entry is wrong; the host's.
    pub(super) fn learn(&self) -> Result<()> {
        let slots = self.scan(&*self.reread()?, |index, number, fault| {
            let text = fault.text(index, number);
            let allowed = "allowed: writing after `check -r all`";
            Err(Error::corrupt(format!("{text} ({allowed})")))
        })?;
        *self.slots.lock() = slots;
        Ok(())
    }

    /// Which blocks the map names; `wrong` is told of entries that are.
    pub(super) fn scan(
        &self,
        shape: &Shape,
        mut wrong: impl FnMut(u64, u64, Fault) -> Result<()>,
    ) -> Result<Slots> {
        let header = &shape.header;
        let mut slots = Slots::default();
        let size = self.storage.size();
        shape.map.each(&*self.storage, |index, number| {
            let number = match number {
                ZERO.. => return Ok(()),
                number => u64::from(number),
            };
            let host = header.host(number);
            if host.start + header.extra() >= size {
                return wrong(index, number, Fault::Lost);
            }
            if number >= MAX_BLOCKS {
                return Err(too_many(number));
            }
            match slots.add(number) {
                false => wrong(index, number, Fault::Shared),
                true if host.end > size => wrong(index, number, Fault::Cut),
                true => Ok(()),
            }
        })?;
        slots.counted = Some(header.word(COUNT));
        slots.end = slots.end.max(header.word(COUNT).min(header.entries()));
        Ok(slots)
    }

    /// Writes how many blocks the file has, where the header says otherwise.
    pub(super) fn write_count(&self, slots: &mut Slots) -> Result<()> {
        if slots.counted != Some(slots.end) {
            let at = self.shape.load().header.at(COUNT) as u64;
            let count = u32::try_from(slots.end).unwrap_or(u32::MAX);
            self.storage.write_at(&count.to_le_bytes(), at)?;
            slots.counted = Some(slots.end);
        }
        Ok(())
    }

    /// Takes `count` blocks from `first` on, which no entry names: they are counted, because others go
    /// by that alone, and there as a whole.  Whether they read as zeroes.
    pub(super) fn claim(
        &self,
        slots: &mut Slots,
        header: &Header,
        first: u64,
        count: u64,
    ) -> Result<bool> {
        let end = first + count;
        if end > MAX_BLOCKS {
            return Err(too_many(end));
        }
        let (start, end) = (header.host(first).start, header.host(end).start);
        let size = self.storage.size();
        let there = start..end.min(size);
        let zeroed =
            there.is_empty() || self.storage.zero(there.clone(), Zeroing::MayUnmap).is_ok();
        slots.end = slots.end.max(first + count);
        self.write_count(slots)?;
        if size < end {
            self.storage.write_at(&[0], end - 1)?;
        }
        (first..first + count).for_each(|number| {
            slots.add(number);
        });
        Ok(zeroed)
    }

    /// Leaves the end of the file as a clean close leaves it: behind the last block in use.
    pub(super) fn trim(&self, slots: &mut Slots) -> Result<()> {
        slots.trim();
        self.write_count(slots)?;
        let end = self.shape.load().header.host(slots.end).start;
        match self.storage.has_fixed_len() || self.storage.size() <= end {
            true => Ok(()),
            false => self.storage.set_len(end),
        }
    }
}

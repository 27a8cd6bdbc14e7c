//! What makes which block: the operations in memory, twenty bytes each, by the blocks they make.

use std::collections::BTreeMap;
use std::ops::Range;

use super::header::{BLOCK, Header, Packing, Reader};
use super::ops::{End, Kind, MAX_DATA, Op, Ops};
use crate::error::{Error, Result};
use crate::storage::Storage;
use crate::util::align::len64;
use crate::util::progress::Watcher;

/// Operations between two looks at whether to stop.
const LOOK: u64 = 1 << 16;

/// An operation that makes blocks, packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    /// The first block that it makes.
    pub(super) block: u32,
    source_low: u32,
    data_low: u32,
    source_high: u16,
    data_high: u16,
    /// From the lowest bit: 19 of the length of the data, 2 of the kind, 3 of the factor, 3 of the
    /// packing, whether it is merged, whether sequence data names it, whether version 3 has it, whether
    /// what it reads is lost.
    word: u32,
}

const _: () = assert!(size_of::<Entry>() == 20);
const KIND: u32 = 19;
const FACTOR: u32 = 21;
const PACKING: u32 = 24;
const MERGED: u32 = 1 << 27;
const LISTED: u32 = 1 << 28;
const THIRD: u32 = 1 << 29;
const LOST: u32 = 1 << 30;

impl Entry {
    fn new(op: &Op) -> Result<Self> {
        let kind = match op.kind {
            Kind::Copy => 0,
            Kind::Replace => 1,
            Kind::Zero => 2,
            _ => 3,
        };
        let low = |value: u64| u32::try_from(value & 0xffff_ffff);
        let high = |value: u64| u16::try_from(value >> 32);
        let packed = || -> Result<Self, std::num::TryFromIntError> {
            Ok(Self {
                block: u32::try_from(op.new)?,
                source_low: low(op.source)?,
                data_low: low(op.data)?,
                source_high: high(op.source)?,
                data_high: high(op.data)?,
                word: u32::try_from(op.len.min(MAX_DATA))?
                    | kind << KIND
                    | op.factor << FACTOR
                    | u32::from(op.packing.number()) << PACKING,
            })
        };
        packed().map_err(|_| op.wrong("a number is too large"))
    }

    pub(super) fn kind(&self) -> Kind {
        match self.word >> KIND & 3 {
            0 => Kind::Copy,
            1 => Kind::Replace,
            2 => Kind::Zero,
            _ => Kind::Xor,
        }
    }

    /// The blocks that it makes.
    pub(super) fn blocks(&self) -> Range<u64> {
        let first = u64::from(self.block);
        first..first + (1 << (self.word >> FACTOR & 7))
    }

    /// The block, or the offset, of what it reads.
    pub(super) fn source(&self) -> u64 {
        u64::from(self.source_low) | u64::from(self.source_high) << 32
    }

    /// Where its data is in the file.
    pub(super) fn data(&self) -> Range<u64> {
        let start = u64::from(self.data_low) | u64::from(self.data_high) << 32;
        start..start + (u64::from(self.word) & MAX_DATA)
    }

    pub(super) fn packing(&self) -> Packing {
        Packing::from_number(self.word >> PACKING & 7).unwrap_or(Packing::Plain)
    }

    pub(super) fn is_merged(&self) -> bool {
        self.word & MERGED != 0
    }

    /// Whether it is not merged, and what it reads was overwritten by one that is.
    pub(super) fn is_lost(&self) -> bool {
        self.word & LOST != 0
    }

    /// Whether it is of a file of version 3.
    pub(super) fn is_third(&self) -> bool {
        self.word & THIRD != 0
    }

    fn is_listed(&self) -> bool {
        self.word & LISTED != 0
    }
}

/// What is wanted of the operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// To find what makes a block.
    All,
    /// To know what there is: nothing is kept of any.
    Counts,
}

/// All operations that make blocks, by the blocks.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) entries: Vec<Entry>,
    /// How many make blocks, the block after the last that they make, and how the first data is packed.
    pub(super) making: u64,
    pub(super) end: u64,
    pub(super) packing: Option<Packing>,
    /// Entries of sequence data.
    pub(super) listed: u64,
    /// Blocks that sequence data lists, in its order.
    sequence: Vec<u32>,
    /// Operations of any kind.
    pub(super) ops: u64,
    /// How many of each kind: copy, replace, zero, xor, label, cluster, sequence.
    pub(super) kinds: [u64; 7],
}

impl Table {
    /// Reads the operations of a file, as far as `end`.
    ///
    /// # Errors
    /// `Corrupt` for operations out of their limits, two for one block, and sequence data that names
    /// other blocks; `Cancelled`; the host's.
    pub(super) fn read(
        storage: &dyn Storage,
        header: &Header,
        end: End,
        wanted: Wanted,
        watcher: &Watcher,
    ) -> Result<Self> {
        let mut table = Self::default();
        if let Some(tables) = &header.third {
            let at = header.sequence_at();
            table.read_sequence(storage, at..at + 4 * tables.sequence, wanted)?;
        }
        let mut ops = Ops::new(storage, header, end)?;
        // As many of those that come first in a merge in the order of the file.
        let mut first = header.merged;
        while let Some(op) = ops.next()? {
            table.count(&op);
            if op.kind == Kind::Sequence {
                table.add_sequence(storage, &op, wanted)?;
            } else if op.kind.makes() && wanted == Wanted::All {
                table.add(&op, header, &mut first)?;
            }
            if op.index % LOOK == 0 {
                watcher.check()?;
            }
        }
        if wanted == Wanted::Counts {
            return Ok(table);
        }
        // Which are merged follows from the order of all of them.
        let is_prefix = header.version == 3 && table.sequence.is_empty();
        if matches!(end, End::Label(_)) && header.merged > 0 && !is_prefix {
            return Err(Error::unsupported(
                "is partly merged, and which operations are follows from all of them (allowed: without label=)",
            ));
        }
        table.entries.sort_unstable_by_key(|entry| entry.block);
        table.refuse_twice()?;
        if table.sequence.is_empty() {
            table.mark_rest(first)?;
        } else {
            table.mark_listed(header.merged)?;
        }
        Ok(table)
    }

    fn count(&mut self, op: &Op) {
        self.ops += 1;
        let kinds = [
            Kind::Copy,
            Kind::Replace,
            Kind::Zero,
            Kind::Xor,
            Kind::Label,
            Kind::Cluster,
            Kind::Sequence,
        ];
        for (kind, count) in kinds.iter().zip(&mut self.kinds) {
            *count += u64::from(*kind == op.kind);
        }
        if op.kind.makes() {
            self.making += 1;
            self.end = self.end.max(op.new + op.blocks());
        }
        if matches!(op.kind, Kind::Replace | Kind::Xor) {
            self.packing = self.packing.or(Some(op.packing));
        }
    }

    fn add_sequence(&mut self, storage: &dyn Storage, op: &Op, wanted: Wanted) -> Result<()> {
        match op.len.is_multiple_of(4) {
            true => self.read_sequence(storage, op.data..op.data + op.len, wanted),
            false => Err(op.wrong(format!(
                "its data is {} bytes, which end inside an entry (allowed: a multiple of 4)",
                op.len
            ))),
        }
    }

    fn add(&mut self, op: &Op, header: &Header, first: &mut u64) -> Result<()> {
        let mut entry = Entry::new(op)?;
        if header.version == 3 {
            entry.word |= THIRD;
        }
        let in_order = header.version == 3 || op.kind.is_ordered();
        if in_order && *first > 0 {
            *first -= 1;
            entry.word |= MERGED;
        }
        self.entries.push(entry);
        Ok(())
    }

    fn read_sequence(
        &mut self,
        storage: &dyn Storage,
        data: Range<u64>,
        wanted: Wanted,
    ) -> Result<()> {
        self.listed += (data.end - data.start) / 4;
        if wanted == Wanted::Counts {
            return Ok(());
        }
        let mut reader = Reader::new(storage);
        for at in data.step_by(4) {
            if len64(self.sequence.len()) >= super::header::MAX_SEQUENCE {
                return Err(Error::corrupt("there is too much sequence data"));
            }
            let Some(bytes) = reader.bytes::<4>(at)? else {
                return Err(Error::corrupt("sequence data is cut off"));
            };
            self.sequence.push(u32::from_le_bytes(bytes));
        }
        Ok(())
    }

    fn refuse_twice(&self) -> Result<()> {
        for pair in self.entries.windows(2) {
            if let [one, other] = pair
                && one.blocks().end > u64::from(other.block)
            {
                return Err(Error::corrupt(format!(
                    "two operations make block {} (allowed: one)",
                    other.block
                )));
            }
        }
        Ok(())
    }

    /// Marks those that are merged after those that come in the order of the file: by block.
    fn mark_rest(&mut self, mut count: u64) -> Result<()> {
        for entry in &mut self.entries {
            if count == 0 {
                break;
            }
            if entry.word & (MERGED | LISTED) == 0 {
                entry.word |= MERGED;
                count -= 1;
            }
        }
        match count {
            0 => Ok(()),
            _ => Err(Error::corrupt(format!(
                "num_merge_ops says {} more operations are merged than there are ({})",
                count,
                self.entries.len()
            ))),
        }
    }

    /// Marks what sequence data lists, and those that are merged.
    fn mark_listed(&mut self, merged: u64) -> Result<()> {
        for entry in &mut self.entries {
            entry.word &= !MERGED;
        }
        let mut left = merged;
        for index in 0..self.sequence.len() {
            let block = self.sequence[index];
            let found = self.entries.binary_search_by_key(&block, |e| e.block);
            let wrong = |why: &str| {
                Err(Error::corrupt(format!(
                    "entry {index} of the sequence data names block {block}, {why}"
                )))
            };
            let Ok(found) = found else {
                return wrong("which no operation makes, as far as they are read");
            };
            let entry = &mut self.entries[found];
            if entry.is_listed() {
                return wrong("which one before it names too");
            }
            entry.word |= LISTED;
            if left > 0 {
                entry.word |= MERGED;
                left -= 1;
            }
        }
        self.mark_rest(left)
    }

    /// Marks those that are not merged and read a block that was overwritten by one that is, or that the
    /// merge had ready in `window`.
    pub(super) fn mark_lost(&mut self, window: &BTreeMap<u64, u64>) {
        let done =
            |entry: &Entry| entry.is_merged() || window.contains_key(&u64::from(entry.block));
        if !self.entries.iter().any(done) {
            return;
        }
        let is_made = |block: u64| self.find(block).is_ok_and(|at| done(&self.entries[at]));
        let is_lost = |entry: &Entry| {
            let blocks = entry.blocks();
            let mut read = match entry.kind() {
                _ if done(entry) => 0..0,
                Kind::Copy => entry.source()..entry.source() + (blocks.end - blocks.start),
                Kind::Xor => entry.source() / BLOCK..(entry.source() + BLOCK).div_ceil(BLOCK),
                _ => 0..0,
            };
            read.any(is_made)
        };
        let lost: Vec<usize> = (0..self.entries.len())
            .filter(|at| is_lost(&self.entries[*at]))
            .collect();
        for at in lost {
            self.entries[at].word |= LOST;
        }
    }

    /// The place of the entry that makes `block`, or of the first one behind it.
    pub(super) fn find(&self, block: u64) -> Result<usize, usize> {
        let after = self
            .entries
            .partition_point(|entry| u64::from(entry.block) <= block);
        match after.checked_sub(1) {
            Some(before) if self.entries[before].blocks().contains(&block) => Ok(before),
            _ => Err(after),
        }
    }

    /// The places of all entries in the order of a merge: what sequence data lists, or what copies and
    /// combines, in the order of the file, then the rest by block; of version 3 without sequence data,
    /// all in the order of the file.
    ///
    /// # Errors
    /// As [`Table::read`].
    pub(super) fn merge_order(
        &self,
        storage: &dyn Storage,
        header: &Header,
        end: End,
    ) -> Result<Vec<u32>> {
        let place = |block: u32| {
            let found = self.entries.binary_search_by_key(&block, |e| e.block);
            let found = found.ok().and_then(|place| u32::try_from(place).ok());
            found.ok_or_else(|| Error::corrupt("the file changed while it was read"))
        };
        let mut order = Vec::with_capacity(self.entries.len());
        if self.sequence.is_empty() {
            let mut ops = Ops::new(storage, header, end)?;
            while let Some(op) = ops.next()? {
                let in_order = header.version == 3 && op.kind.makes();
                if in_order || op.kind.is_ordered() {
                    order.push(place(u32::try_from(op.new).unwrap_or(u32::MAX))?);
                }
            }
        } else {
            for block in &self.sequence {
                order.push(place(*block)?);
            }
        }
        if order.len() < self.entries.len() {
            let mut is_in = vec![false; self.entries.len()];
            for place in &order {
                if let Some(is_in) = is_in.get_mut(*place as usize) {
                    *is_in = true;
                }
            }
            let rest = (0u32..).zip(&is_in).filter(|(_, is_in)| !**is_in);
            order.extend(rest.map(|(place, _)| place));
        }
        match order.len() == self.entries.len() {
            true => Ok(order),
            false => Err(Error::corrupt("the file changed while it was read")),
        }
    }
}

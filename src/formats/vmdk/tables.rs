//! A directory of tables of 32-bit sectors: where a grain is.

use std::sync::atomic::AtomicU32;

use crate::error::{Error, Result};
use crate::formats::vmdk::header::SECTOR;
use crate::image::Wait;
use crate::image::table::{Endian, Table};
use crate::image::words::Words;
use crate::storage::Storage;

/// Bytes of a cached page of tables, and how many there are: 4 MiB.
const PAGE: u64 = 16 << 10;
const PAGES: usize = 257;
/// Grains looked at for one answer.
const LOOK_AHEAD: u64 = 4096;

/// What a header says of its file, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Geometry {
    /// Length of the disk.
    pub(super) capacity: u64,
    /// Length of a grain.
    pub(super) grain: u64,
    /// Entries of a table.
    pub(super) per_table: u64,
    /// Where the directory is, and its copy.
    pub(super) gd: u64,
    pub(super) rgd: Option<u64>,
    /// No grain begins before.
    pub(super) first: u64,
    /// An entry of 1 reads as zeroes.
    pub(super) zeroes: bool,
    /// So does a directory's.
    pub(super) zero_tables: bool,
}

impl Geometry {
    pub(super) fn grains(&self) -> u64 {
        self.capacity.div_ceil(self.grain)
    }

    pub(super) fn tables(&self) -> u64 {
        self.grains().div_ceil(self.per_table)
    }
}

/// What an entry says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entry {
    /// The layer below has it; zeroes where there is none.
    Below,
    Zero,
    /// Host offset of the grain.
    At(u64),
}

/// The tables of one file.
#[derive(Debug)]
pub(super) struct Tables {
    pub(super) geometry: Geometry,
    pub(super) gd: Table,
    /// The directory of the second copies.
    pub(super) rgd: Option<Table>,
    pub(super) words: Words<AtomicU32>,
}

impl Tables {
    pub(super) fn new(geometry: Geometry) -> Self {
        Self {
            gd: Table::new(geometry.gd, geometry.tables(), Endian::Little),
            rgd: geometry
                .rgd
                .map(|host| Table::new(host, geometry.tables(), Endian::Little)),
            words: Words::new(PAGE, PAGES, Endian::Little),
            geometry,
        }
    }

    /// Where table `number` is.
    ///
    /// # Errors
    /// `Corrupt` where it is not inside the file as a whole; the host's; `WouldBlock` as `wait` says.
    pub(super) fn table(&self, storage: &dyn Storage, number: u64, wait: Wait) -> Result<Entry> {
        let word = self.gd.get(storage, number, wait)?;
        self.table_at(storage, number, word)
    }

    /// The same of an entry that was read.
    pub(super) fn table_at(&self, storage: &dyn Storage, number: u64, word: u32) -> Result<Entry> {
        match word {
            0 => return Ok(Entry::Below),
            1 if self.geometry.zero_tables => return Ok(Entry::Zero),
            _ => {}
        }
        let host = u64::from(word) * SECTOR;
        let end = host + self.geometry.per_table * 4;
        match word > 1 && end <= storage.size() {
            true => Ok(Entry::At(host)),
            false => Err(Error::corrupt(format!(
                "entry {number} of the grain directory is {word:#x}: the table would be at {host:#x}..{end:#x} (allowed: inside the file of {} bytes)",
                storage.size()
            ))),
        }
    }

    /// Has the directory's entry `number` lead to the table at `host`.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn publish_table(
        &self,
        storage: &dyn Storage,
        number: u64,
        host: u64,
    ) -> Result<()> {
        let sector = u32::try_from(host / SECTOR).unwrap_or(u32::MAX);
        self.gd.publish(storage, number, &[sector])
    }

    /// Where the second copy of table `number` is, where there are any.
    ///
    /// # Errors
    /// `Corrupt` where there should be one, and is none; the host's.
    pub(super) fn copy(&self, storage: &dyn Storage, number: u64) -> Result<Option<u64>> {
        let Some(rgd) = &self.rgd else {
            return Ok(None);
        };
        let word = rgd.get(storage, number, Wait::Yes)?;
        match self.table_at(storage, number, word) {
            Ok(Entry::At(host)) => Ok(Some(host)),
            _ => Err(Error::corrupt(format!(
                "entry {number} of the redundant grain directory is {word:#x}, which is no table (allowed: writing after `check -r all`)"
            ))),
        }
    }

    /// Where grain `index` is.
    ///
    /// # Errors
    /// `Corrupt` where its table or itself lies where it may not; the host's; `WouldBlock`.
    pub(super) fn entry(&self, storage: &dyn Storage, index: u64, wait: Wait) -> Result<Entry> {
        let per_table = self.geometry.per_table;
        match self.table(storage, index / per_table, wait)? {
            Entry::At(table) => {
                let word = self
                    .words
                    .get(storage, table + index % per_table * 4, wait)?;
                self.grain_at(storage, index, word)
            }
            other => Ok(other),
        }
    }

    /// What an entry of a table says that was read.
    pub(super) fn grain_at(&self, storage: &dyn Storage, index: u64, word: u32) -> Result<Entry> {
        match word {
            0 => return Ok(Entry::Below),
            1 if self.geometry.zeroes => return Ok(Entry::Zero),
            _ => {}
        }
        let host = u64::from(word) * SECTOR;
        match host >= self.geometry.first && host < storage.size() {
            true => Ok(Entry::At(host)),
            false => Err(Error::corrupt(format!(
                "grain {index}: its table entry {word:#x} puts it at {host:#x} (allowed: inside the file of {} bytes, not before {:#x})",
                storage.size(),
                self.geometry.first
            ))),
        }
    }

    /// The end of the grains from `index` on, below `end`, whose entries are as `follows` says, which
    /// gets the distance from `index`.  Waits for nothing: the answer may be smaller, never wrong.
    pub(super) fn alike(
        &self,
        storage: &dyn Storage,
        index: u64,
        end: u64,
        follows: impl Fn(u64, Entry) -> bool,
    ) -> u64 {
        let per_table = self.geometry.per_table;
        let stop = end.min(index.saturating_add(LOOK_AHEAD));
        let mut next = index + 1;
        while next < stop {
            match self.table(storage, next / per_table, Wait::No) {
                Ok(Entry::At(table)) => {
                    let last = stop.min((next / per_table + 1) * per_table);
                    while next < last {
                        let at = table + next % per_table * 4;
                        let word = self.words.get(storage, at, Wait::No);
                        let entry = word.and_then(|word| self.grain_at(storage, next, word));
                        if !entry.is_ok_and(|entry| follows(next - index, entry)) {
                            return next;
                        }
                        next += 1;
                    }
                }
                Ok(other) if follows(next - index, other) => {
                    next = self.skip(next / per_table, other) * per_table;
                }
                _ => return next.min(end),
            }
        }
        next.min(end).max(index + 1)
    }

    /// The end of the tables from `number` on that are none, as `what` says.
    fn skip(&self, number: u64, what: Entry) -> u64 {
        let word = u32::from(what == Entry::Zero);
        let others = number + 1..self.gd.len();
        self.gd.alike(others, |_, other| other == word)
    }
}

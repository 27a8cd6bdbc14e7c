//! A space-efficient sparse file of ESX (seSparse), which is read; section 5 of `vmdk.md`.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::error::{Error, ErrorKind, Result};
use crate::formats::vmdk::header::{SECTOR, SECTOR_LEN};
use crate::image::words::{Endian, Words};
use crate::image::{Run, Source, Wait};
use crate::storage::Storage;

/// The first word of a file.
pub(super) const MAGIC: u64 = 0xcafe_babe;
/// The first word of the header of what changes.
const VOLATILE_MAGIC: u64 = 0xcafe_cafe;
const VERSION: u64 = 0x2_0000_0001;
/// Sectors of a grain and of a table, of the only version.
const GRAIN_SECTORS: u64 = 8;
const TABLE_SECTORS: u64 = 64;
const GRAIN: u64 = GRAIN_SECTORS * SECTOR;
const TABLE: u64 = TABLE_SECTORS * SECTOR;
/// Entries of a table.
const PER_TABLE: u64 = TABLE / 8;
/// Bytes of a cached page of tables, and how many there are.
const PAGE: u64 = TABLE;
const PAGES: usize = 129;
/// Grains looked at for one answer.
const LOOK_AHEAD: u64 = PER_TABLE;

/// An open file.
#[derive(Debug)]
pub(super) struct SeSparse {
    storage: Arc<dyn Storage>,
    capacity: u64,
    gd: u64,
    tables: u64,
    grains: u64,
    words: Words<AtomicU64>,
}

/// What an entry says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    Below,
    Zero,
    At(u64),
}

impl SeSparse {
    /// Opens the file in `storage`.
    ///
    /// # Errors
    /// `WrongFormat`, `Corrupt`, `Unsupported`, naming the field; the host's.
    pub(super) fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        let mut bytes = [0; SECTOR_LEN];
        storage.read_at(&mut bytes, 0)?;
        let word = |at: usize| {
            bytes[at..]
                .first_chunk()
                .copied()
                .map_or(0, u64::from_le_bytes)
        };
        if word(0) != MAGIC {
            let text = format!(
                "the magic is {:#x} (allowed: {MAGIC:#x} of a seSparse extent)",
                word(0)
            );
            return Err(Error::new(ErrorKind::WrongFormat, text));
        }
        for (field, at, allowed) in [
            ("version", 8, VERSION),
            ("the grain size", 24, GRAIN_SECTORS),
            ("the size of a grain table", 32, TABLE_SECTORS),
            ("the flags", 40, 0),
        ] {
            if word(at) != allowed {
                let text = format!("{field} is {:#x} (allowed: {allowed:#x})", word(at));
                return Err(Error::unsupported(text));
            }
        }
        let size = storage.size();
        let host = |field: &str, at: usize| {
            let host = word(at).checked_mul(SECTOR).filter(|host| *host < size);
            host.ok_or_else(|| {
                Error::corrupt(format!(
                    "{field} is at sector {:#x} (allowed: inside the file of {size} bytes)",
                    word(at)
                ))
            })
        };
        let capacity = word(16)
            .checked_mul(SECTOR)
            .filter(|c| i64::try_from(*c).is_ok());
        let capacity = capacity.ok_or_else(|| {
            Error::corrupt(format!(
                "the capacity is {:#x} sectors (allowed: less than 2^63 bytes)",
                word(16)
            ))
        })?;
        let this = Self {
            capacity,
            gd: host("the grain directory", 128)?,
            tables: host("the first grain table", 144)?,
            // The first grain may not have been written yet.
            grains: word(192)
                .checked_mul(SECTOR)
                .filter(|g| *g > 0)
                .ok_or_else(|| {
                    Error::corrupt(format!("the first grain is at sector {:#x}", word(192)))
                })?,
            words: Words::new(PAGE, PAGES, Endian::Little),
            storage,
        };
        let entries = capacity.div_ceil(GRAIN).div_ceil(PER_TABLE);
        let end = entries
            .checked_mul(8)
            .and_then(|len| this.gd.checked_add(len));
        if end.is_none_or(|end| end > size) || word(136).saturating_mul(SECTOR) / 8 < entries {
            return Err(Error::corrupt(format!(
                "the grain directory has {} sectors at {:#x} (allowed: {entries} entries, inside the file of {size} bytes)",
                word(136),
                this.gd
            )));
        }
        this.check_volatile(host("the volatile header", 80)?)?;
        Ok(this)
    }

    fn check_volatile(&self, host: u64) -> Result<()> {
        let mut bytes = [0; 32];
        self.storage.read_at(&mut bytes, host)?;
        let [magic, _, _, replay] = [0, 8, 16, 24].map(|at: usize| {
            bytes[at..]
                .first_chunk()
                .copied()
                .map_or(0, u64::from_le_bytes)
        });
        if magic != VOLATILE_MAGIC {
            return Err(Error::corrupt(format!(
                "the volatile header at {host:#x} begins with {magic:#x} (allowed: {VOLATILE_MAGIC:#x})"
            )));
        }
        match replay {
            0 => Ok(()),
            _ => Err(Error::unsupported(
                "the extent has a journal to replay (ESX does it)",
            )),
        }
    }

    /// Length of the disk in bytes.
    pub(super) fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Bytes of a grain.
    pub(super) const fn grain() -> u64 {
        GRAIN
    }

    fn word(&self, host: u64, wait: Wait) -> Result<u64> {
        self.words.get(&*self.storage, host, wait)
    }

    fn entry(&self, index: u64, wait: Wait) -> Result<Entry> {
        let number = index / PER_TABLE;
        let gde = self.word(self.gd + number * 8, wait)?;
        if gde == 0 {
            return Ok(Entry::Below);
        }
        let table = self.tables + (gde & u64::from(u32::MAX)) * TABLE;
        if gde >> 32 != 0x1000_0000 || table + TABLE > self.storage.size() {
            return Err(Error::corrupt(format!(
                "entry {number} of the grain directory is {gde:#x} (allowed: 0, or 0x10000000 and the number of a table inside the file)"
            )));
        }
        let gte = self.word(table + index % PER_TABLE * 8, wait)?;
        match gte >> 60 {
            0 if gte == 0 => return Ok(Entry::Below),
            1 | 2 => return Ok(Entry::Zero),
            3 => {
                let number = gte >> 48 & 0xfff | (gte & 0xffff_ffff_ffff) << 12;
                let host = number
                    .checked_mul(GRAIN)
                    .and_then(|host| host.checked_add(self.grains));
                if let Some(host) = host.filter(|host| *host < self.storage.size()) {
                    return Ok(Entry::At(host));
                }
            }
            _ => {}
        }
        Err(Error::corrupt(format!(
            "grain {index}: its table entry is {gte:#x} (allowed: 0, or a first digit of 1, 2, or 3 and the number of a grain inside the file)"
        )))
    }

    /// As [`crate::image::Image::map`]; past its end are zeroes.
    pub(super) fn map(&self, at: u64, len: u64, wait: Wait) -> Result<Run<'_>> {
        if at >= self.capacity {
            let source = Source::Zero;
            return Ok(Run { len, source });
        }
        let end = self.capacity.min(at.saturating_add(len));
        let (index, last) = (at / GRAIN, end.div_ceil(GRAIN));
        let entry = self.entry(index, wait)?;
        let follows = |next: u64| match (entry, self.entry(next, Wait::No)) {
            (Entry::At(first), Ok(Entry::At(other))) => other == first + (next - index) * GRAIN,
            (this, Ok(other)) => this == other,
            (_, Err(_)) => false,
        };
        let stop = last.min(index + LOOK_AHEAD);
        let last = (index + 1..stop)
            .find(|next| !follows(*next))
            .unwrap_or(stop);
        let len = end.min(last * GRAIN) - at;
        let source = match entry {
            Entry::Below => Source::Below,
            Entry::Zero => Source::Zero,
            Entry::At(host) => Source::Stored {
                storage: &*self.storage,
                host: host + at % GRAIN,
                writable: false,
            },
        };
        Ok(Run { len, source })
    }
}

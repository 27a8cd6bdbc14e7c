//! Entries of the log: changes of the file's 4 KiB pages, each entry as a whole or not at all
//! ([MS-VHDX] 2.3.1).

use std::ops::Range;

use uuid::Uuid;

use crate::error::Result;
use crate::formats::vhdx::bytes::{guid_at, put, u32_at, u64_at};
use crate::storage::Storage;
use crate::util::align::{clamp_len, len64};
use crate::util::range::intersect;

/// Bytes of a sector of the log, and of a page that an entry changes.
pub(super) const SECTOR: u64 = 4096;
pub(super) const PAGE: usize = 4096;
/// Bytes of an entry's header, and of a descriptor.
const HEAD: u64 = 64;
const DESCRIPTOR: u64 = 32;
/// Headers and what is before them are never in the log.
const FIRST_PAGE: u64 = 192 << 10;
/// Most descriptors of a log that is replayed.
pub(super) const MAX_DESCRIPTORS: u64 = 1 << 20;
/// Bytes read at a time.
pub(super) const STEP: u64 = 256 << 10;

/// The log: a ring in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ring {
    /// Where it is.
    pub(super) host: Range<u64>,
}

impl Ring {
    /// Bytes of the ring.
    pub(super) fn len(&self) -> u64 {
        self.host.end - self.host.start
    }

    /// A place in the ring, `bytes` behind another.
    pub(super) fn step(&self, at: u64, bytes: u64) -> u64 {
        (at + bytes) % self.len()
    }

    /// The parts of the file in which `len` bytes from `at` on are.
    fn parts(&self, at: u64, len: usize) -> [Range<u64>; 2] {
        let end = at + len64(len);
        let first = self.host.start + at..self.host.start + end.min(self.len());
        let rest = end.saturating_sub(self.len());
        [first, self.host.start..self.host.start + rest]
    }

    pub(super) fn read(&self, storage: &dyn Storage, buf: &mut [u8], at: u64) -> Result<()> {
        let [first, rest] = self.parts(at, buf.len());
        let (a, b) = buf.split_at_mut(clamp_len(first.end - first.start, buf.len()));
        storage.read_at(a, first.start)?;
        match b.is_empty() {
            true => Ok(()),
            false => storage.read_at(b, rest.start),
        }
    }

    pub(super) fn write(&self, storage: &dyn Storage, buf: &[u8], at: u64) -> Result<()> {
        let [first, rest] = self.parts(at, buf.len());
        let (a, b) = buf.split_at(clamp_len(first.end - first.start, buf.len()));
        storage.write_at(a, first.start)?;
        match b.is_empty() {
            true => Ok(()),
            false => storage.write_at(b, rest.start),
        }
    }
}

/// What an entry's header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    /// Where in the ring it is, and how long.
    pub(super) at: u64,
    pub(super) len: u64,
    /// One more than that of the entry before.
    pub(super) sequence: u64,
    /// Where the oldest entry is that is not in place yet.
    pub(super) tail: u64,
    /// How long the file is at least.
    pub(super) flushed: u64,
    /// How long it is to be.
    pub(super) last: u64,
    descriptors: u64,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Descriptor {
    /// A page, of which the log's sector at this place of the ring has all but the first and the last
    /// bytes.
    Data {
        host: u64,
        sector: u64,
        lead: [u8; 8],
        trail: [u8; 4],
    },
    /// A range is to read as zeroes.
    Zero(Range<u64>),
}

impl Head {
    /// What the sector at `at` may be the first of: an entry of the log called `guid`.
    pub(super) fn parse(sector: &[u8], at: u64, guid: Uuid, ring: &Ring) -> Option<Self> {
        let head = Self {
            at,
            len: u32_at(sector, 8).into(),
            tail: u32_at(sector, 12).into(),
            sequence: u64_at(sector, 16),
            descriptors: u32_at(sector, 24).into(),
            flushed: u64_at(sector, 48),
            last: u64_at(sector, 56),
        };
        let is_one = sector.starts_with(b"loge") && guid_at(sector, 32) == guid;
        let fits = (SECTOR..ring.len()).contains(&head.len)
            && head.table() <= head.len
            && head.descriptors <= MAX_DESCRIPTORS
            && head.tail < ring.len()
            && head.flushed.max(head.last) < 1 << 63;
        let aligned = head.len.is_multiple_of(SECTOR) && head.tail.is_multiple_of(SECTOR);
        (is_one && fits && aligned && head.sequence > 0).then_some(head)
    }

    /// Bytes of the header and the descriptors, in whole sectors.
    fn table(&self) -> u64 {
        (HEAD + self.descriptors * DESCRIPTOR).next_multiple_of(SECTOR)
    }

    /// What the entry changes; `None` where it was not written as a whole, or says what cannot be.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn read(
        &self,
        storage: &dyn Storage,
        ring: &Ring,
    ) -> Result<Option<Vec<Descriptor>>> {
        let mut table = vec![0; clamp_len(self.table(), usize::MAX)];
        ring.read(storage, &mut table, self.at)?;
        let sum = u32_at(&table, 4);
        put(&mut table, 4, &[0; 4]);
        let Some(descriptors) = self.parse_table(&table, ring) else {
            return Ok(None);
        };
        let mut crc = crc32c::crc32c(&table);
        let mut buf = vec![0; clamp_len(STEP.min(self.len - self.table()), usize::MAX)];
        let mut done = self.table();
        while done < self.len {
            let part = clamp_len(self.len - done, buf.len());
            let part = &mut buf[..part];
            ring.read(storage, part, ring.step(self.at, done))?;
            if !part.chunks_exact(PAGE).all(|sector| self.owns(sector)) {
                return Ok(None);
            }
            crc = crc32c::crc32c_append(crc, part);
            done += len64(part.len());
        }
        Ok((crc == sum).then_some(descriptors))
    }

    /// Whether a sector of data is this entry's.
    fn owns(&self, sector: &[u8]) -> bool {
        let sequence = u64::from(u32_at(sector, 4)) << 32 | u64::from(u32_at(sector, PAGE - 4));
        sector.starts_with(b"data") && sequence == self.sequence
    }

    fn parse_table(&self, table: &[u8], ring: &Ring) -> Option<Vec<Descriptor>> {
        let mut descriptors = Vec::new();
        let mut data = self.table();
        let table = table.get(clamp_len(HEAD, usize::MAX)..)?;
        let table = table.chunks_exact(clamp_len(DESCRIPTOR, usize::MAX));
        for bytes in table.take(clamp_len(self.descriptors, usize::MAX)) {
            let host = u64_at(bytes, 16);
            let (len, descriptor) = match bytes.get(..4)? {
                b"desc" => {
                    let sector = ring.step(self.at, data);
                    data += SECTOR;
                    let lead = bytes.get(8..)?.first_chunk().copied()?;
                    let trail = bytes.get(4..)?.first_chunk().copied()?;
                    let data = Descriptor::Data {
                        host,
                        sector,
                        lead,
                        trail,
                    };
                    (SECTOR, data)
                }
                b"zero" => {
                    let len = u64_at(bytes, 8);
                    (len, Descriptor::Zero(host..host.checked_add(len)?))
                }
                _ => return None,
            };
            let host = host..host.checked_add(len).filter(|end| *end < 1 << 63)?;
            let aligned = host.start.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR);
            let may_be =
                aligned && host.start >= FIRST_PAGE && intersect(&host, &ring.host).is_none();
            if !may_be || u64_at(bytes, 24) != self.sequence {
                return None;
            }
            descriptors.push(descriptor);
        }
        (data == self.len).then_some(descriptors)
    }
}

/// The page that a sector of data and its descriptor stand for.
pub(super) fn page(mut sector: [u8; PAGE], lead: [u8; 8], trail: [u8; 4]) -> [u8; PAGE] {
    put(&mut sector, 0, &lead);
    put(&mut sector, PAGE - 4, &trail);
    sector
}

/// Bytes of an entry that changes so many pages.
pub(super) fn len(pages: usize) -> u64 {
    (HEAD + len64(pages) * DESCRIPTOR).next_multiple_of(SECTOR) + len64(pages) * SECTOR
}

/// What a new entry says, but for the pages.
#[derive(Debug, Clone, Copy)]
pub(super) struct NewEntry {
    pub(super) guid: Uuid,
    pub(super) sequence: u64,
    pub(super) tail: u64,
    pub(super) flushed: u64,
    pub(super) last: u64,
}

impl NewEntry {
    /// The entry's bytes, with pages at offsets of the file.
    pub(super) fn to_bytes(self, pages: &[(u64, Box<[u8; PAGE]>)]) -> Vec<u8> {
        let len = len(pages.len());
        let mut bytes = vec![0; clamp_len(len, usize::MAX)];
        let word = |value: u64| u32::try_from(value).unwrap_or(u32::MAX).to_le_bytes();
        put(&mut bytes, 0, b"loge");
        put(&mut bytes, 8, &word(len));
        put(&mut bytes, 12, &word(self.tail));
        put(&mut bytes, 16, &self.sequence.to_le_bytes());
        put(&mut bytes, 24, &word(len64(pages.len())));
        put(&mut bytes, 32, &self.guid.to_bytes_le());
        put(&mut bytes, 48, &self.flushed.to_le_bytes());
        put(&mut bytes, 56, &self.last.to_le_bytes());
        let table = clamp_len(len - len64(pages.len()) * SECTOR, usize::MAX);
        for (number, (host, page)) in pages.iter().enumerate() {
            let at = clamp_len(HEAD + len64(number) * DESCRIPTOR, usize::MAX);
            put(&mut bytes, at, b"desc");
            put(&mut bytes, at + 4, &page[PAGE - 4..]);
            put(&mut bytes, at + 8, &page[..8]);
            put(&mut bytes, at + 16, &host.to_le_bytes());
            put(&mut bytes, at + 24, &self.sequence.to_le_bytes());
            let at = table + number * PAGE;
            put(&mut bytes, at, &page[..]);
            put(&mut bytes, at, b"data");
            put(&mut bytes, at + 4, &word(self.sequence >> 32));
            put(
                &mut bytes,
                at + PAGE - 4,
                &word(self.sequence & u64::from(u32::MAX)),
            );
        }
        let crc = crc32c::crc32c(&bytes);
        put(&mut bytes, 4, &crc.to_le_bytes());
        bytes
    }
}

//! The table of internal snapshots: entries of varying length, one after another.

use std::ffi::OsStr;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::header::{Header, MAX_L1_BYTES, MAX_SNAPSHOTS};
use crate::error::{Error, ErrorKind, Result};
use crate::image::be64;
use crate::image::snapshot::Snapshot;
use crate::storage::Storage;
use crate::util::align::{clamp_len, len64};

/// Longest table in bytes; 64 MiB, as QEMU has it.
const MAX_BYTES: u64 = 64 << 20;
/// Most bytes of extra data in an entry, as QEMU has it.
const MAX_EXTRA: usize = 1024;
/// Extra data that is known: size of the VM state, size of the disk, instruction count.
const EXTRA_LEN: usize = 24;
/// Extra data that an entry has in version 3: size of the VM state and of the disk.
pub(super) const EXTRA_V3: usize = 16;
/// Where an entry has no instruction count.
const NO_ICOUNT: u64 = u64::MAX;

/// The fixed part of an entry.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    /// 0: offset of the snapshot's first-level table.
    l1_offset: U64,
    /// 8: its entries.
    l1_len: U32,
    /// 12: bytes of the identifier.
    id_len: U16,
    /// 14: bytes of the name.
    name_len: U16,
    /// 16: seconds since 1970.
    date_sec: U32,
    /// 20: nanoseconds after that.
    date_nsec: U32,
    /// 24: how long the VM had run, in nanoseconds.
    vm_clock_nsec: U64,
    /// 32: bytes of VM state, where the extra data does not say.
    vm_state_size: U32,
    /// 36: bytes of extra data, which follows.
    extra_len: U32,
}

const HEAD: usize = size_of::<Raw>();

/// One entry, with all that it takes to write it again as it was.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    head: Raw,
    extra: Vec<u8>,
    id: Vec<u8>,
    name: Vec<u8>,
}

impl Entry {
    /// A new entry with a first-level table of `l1_len` words at `l1_offset`.
    pub(super) fn new(id: u64, name: &OsStr, date: std::time::Duration, disk_size: u64) -> Self {
        let id = id.to_string().into_bytes();
        let extra = be64::bytes([0, disk_size, NO_ICOUNT]);
        let short = |len: usize| U16::new(u16::try_from(len).unwrap_or(u16::MAX));
        let head = Raw {
            l1_offset: U64::ZERO,
            l1_len: U32::ZERO,
            id_len: short(id.len()),
            name_len: short(name.len()),
            date_sec: U32::new(u32::try_from(date.as_secs()).unwrap_or(u32::MAX)),
            date_nsec: U32::new(date.subsec_nanos()),
            vm_clock_nsec: U64::ZERO,
            vm_state_size: U32::ZERO,
            extra_len: U32::new(u32::try_from(EXTRA_LEN).unwrap_or(0)),
        };
        Self {
            head,
            extra,
            id,
            name: name.as_bytes().to_vec(),
        }
    }

    /// The bytes of the snapshot's first-level table.
    pub(super) fn l1(&self) -> Range<u64> {
        let (offset, len) = (self.head.l1_offset.get(), self.l1_len());
        offset..offset.saturating_add(u64::from(len) * 8)
    }

    /// Its entries.
    pub(super) fn l1_len(&self) -> u32 {
        self.head.l1_len.get()
    }

    /// Says where the snapshot's first-level table is.
    pub(super) fn set_l1(&mut self, offset: u64, len: u32) {
        self.head.l1_offset = U64::new(offset);
        self.head.l1_len = U32::new(len);
    }

    fn complete(&mut self, size: u64) {
        if self.extra.len() >= EXTRA_LEN {
            return;
        }
        let state = u64::from(self.head.vm_state_size.get());
        let words = [
            self.extra_word(0).unwrap_or(state),
            self.extra_word(1).unwrap_or(size),
            NO_ICOUNT,
        ];
        self.extra = be64::bytes(words);
        self.head.extra_len = U32::new(u32::try_from(EXTRA_LEN).unwrap_or(0));
    }

    /// Its identifier as a number, where it is one.
    pub(super) fn number(&self) -> Option<u64> {
        std::str::from_utf8(&self.id).ok()?.parse().ok()
    }

    /// Word `index` of the extra data, where there is one.
    fn extra_word(&self, index: usize) -> Option<u64> {
        be64::words(&self.extra).nth(index)
    }

    /// What users see of it; the disk had `size` bytes where the entry does not say.
    pub(super) fn describe(&self, size: u64) -> Snapshot {
        let text = |bytes: &[u8]| OsStr::from_bytes(bytes).to_owned();
        let state = u64::from(self.head.vm_state_size.get());
        Snapshot {
            id: text(&self.id),
            name: text(&self.name),
            vm_state_size: self.extra_word(0).unwrap_or(state),
            date_sec: self.head.date_sec.get(),
            date_nsec: self.head.date_nsec.get(),
            vm_clock_nsec: self.head.vm_clock_nsec.get(),
            icount: self.extra_word(2).filter(|i| *i != NO_ICOUNT),
            disk_size: self.extra_word(1).unwrap_or(size),
        }
    }

    fn encode_into(&self, bytes: &mut Vec<u8>) {
        bytes.extend(self.head.as_bytes());
        bytes.extend(&self.extra);
        bytes.extend(&self.id);
        bytes.extend(&self.name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }

    /// Its first-level table lies where one can be.
    fn check(&self, header: &Header, index: usize) -> Result<()> {
        let (l1, len) = (self.l1(), u64::from(self.l1_len()) * 8);
        if len > MAX_L1_BYTES {
            return Err(Error::corrupt(format!(
                "the L1 table of snapshot {index} has {} entries (allowed: {})",
                len / 8,
                MAX_L1_BYTES / 8
            )));
        }
        header.check_table_place(&format!("L1 table of snapshot {index}"), l1.start, len)
    }

    /// Bytes of extra data.
    pub(super) fn extra_len(&self) -> usize {
        self.extra.len()
    }
}

/// A table as it is on disk.
#[derive(Debug, Clone, Default)]
pub(super) struct SnapshotTable {
    /// Its entries, in order.
    pub(super) entries: Vec<Entry>,
}

impl SnapshotTable {
    /// Reads and validates the table that `header` points at.
    pub(super) fn read(file: &dyn Storage, header: &Header) -> Result<Self> {
        let mut reader = Reader::new(file, header);
        let count = header.snapshot_count.min(MAX_SNAPSHOTS);
        let mut entries = Vec::new();
        for index in 0..clamp_len(u64::from(count), usize::MAX) {
            let entry = reader.entry(index)?;
            entry.check(header, index)?;
            entries.push(entry);
        }
        Ok(Self { entries })
    }

    /// The first entry that lacks the extra data that the version of `header` wants.
    pub(super) fn incomplete(&self, header: &Header) -> Option<usize> {
        let least = if header.version >= 3 { EXTRA_V3 } else { 0 };
        self.entries.iter().position(|e| e.extra.len() < least)
    }

    /// Gives all entries the extra data that version 3 wants, where they have less: of a disk of
    /// `size` bytes.
    pub(super) fn complete(&mut self, size: u64) {
        self.entries.iter_mut().for_each(|e| e.complete(size));
    }

    /// The bytes of the table.
    ///
    /// # Errors
    /// `OutOfRange` where it would be longer than one may be.
    pub(super) fn encode(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.entries.iter().for_each(|e| e.encode_into(&mut bytes));
        let most = clamp_len(u64::from(MAX_SNAPSHOTS), usize::MAX);
        if len64(bytes.len()) > MAX_BYTES || self.entries.len() > most {
            let text = format!(
                "the snapshot table would have {} bytes for {} snapshots (allowed: {MAX_BYTES}, {most})",
                bytes.len(),
                self.entries.len()
            );
            return Err(Error::new(ErrorKind::OutOfRange, text));
        }
        Ok(bytes)
    }

    /// What users see of the snapshots, where the disk has `size` bytes now.
    pub(super) fn describe(&self, size: u64) -> Vec<Snapshot> {
        self.entries.iter().map(|e| e.describe(size)).collect()
    }

    /// A number that no snapshot is identified by.
    pub(super) fn free_id(&self) -> u64 {
        let most = self.entries.iter().filter_map(Entry::number).max();
        most.map_or(1, |most| most.saturating_add(1))
    }
}

/// Reads a table entry by entry.
pub(super) struct Reader<'a> {
    file: &'a dyn Storage,
    /// Where the last entry ends.
    pub(super) at: u64,
    /// Where the table ends at the latest.
    end: u64,
}

impl<'a> Reader<'a> {
    /// Of the table that `header` points at.
    pub(super) fn new(file: &'a dyn Storage, header: &Header) -> Self {
        let at = header.snapshots_offset;
        let end = at.saturating_add(MAX_BYTES).min(file.size());
        Self { file, at, end }
    }

    fn bytes(&mut self, len: usize) -> Result<Vec<u8>> {
        let end = self
            .at
            .checked_add(len64(len))
            .filter(|end| *end <= self.end);
        let Some(end) = end else {
            return Err(Error::corrupt(format!(
                "the snapshot table reaches past {:#x} (allowed: {MAX_BYTES} bytes, within the file of {:#x})",
                self.at,
                self.file.size()
            )));
        };
        let bytes = be64::read_bytes(self.file, self.at..end)?;
        self.at = end;
        Ok(bytes)
    }

    /// The next entry, which is that of snapshot `index`.
    ///
    /// # Errors
    /// `Corrupt` where it is longer than one may be, or not in the file; the host's.
    pub(super) fn entry(&mut self, index: usize) -> Result<Entry> {
        self.at = self.at.saturating_add((8 - self.at % 8) % 8);
        let head = Raw::read_from_bytes(&self.bytes(HEAD)?)
            .map_err(|_| Error::corrupt("a snapshot entry is too short"))?;
        let extra_len = clamp_len(u64::from(head.extra_len.get()), usize::MAX);
        if extra_len > MAX_EXTRA {
            return Err(Error::corrupt(format!(
                "snapshot {index} has {extra_len} bytes of extra data (allowed: {MAX_EXTRA})"
            )));
        }
        let id_len = usize::from(head.id_len.get());
        let name_len = usize::from(head.name_len.get());
        let mut extra = self.bytes(extra_len + id_len + name_len)?;
        let mut id = extra.split_off(extra_len);
        let name = id.split_off(id_len);
        Ok(Entry {
            head,
            extra,
            id,
            name,
        })
    }
}

//! The directory of dirty bitmaps: entries of varying length, one after another.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::entry::OFFSET;
use super::extension;
use super::feature;
use super::header::Header;
use crate::error::{Error, ErrorKind, Result};
use crate::image::be64;
use crate::image::bitmap::{Bitmap, Recording};
use crate::storage::Storage;
use crate::util::align::{clamp_len, is_aligned, len64};
use crate::util::range;
use crate::util::text::printable;

/// Most bitmaps, as QEMU has it.
const MAX_COUNT: u64 = 65_535;
/// Longest name in bytes.
const MAX_NAME: usize = 1023;
/// Longest directory in bytes that is read: that many bitmaps with names of average length.
const MAX_BYTES: u64 = 64 << 20;
/// log2 of the smallest and the largest granularity.
pub(super) const GRANULARITY: std::ops::RangeInclusive<u8> = 9..=31;
/// Longest table of one bitmap in entries, as QEMU has it.
const MAX_TABLE: u64 = 0x800_0000 / 8;

/// A writer has it open, or did not close it.
pub(super) const IN_USE: u32 = 1;
/// It takes note of writes.
const AUTO: u32 = 2;
/// Its extra data, though unknown, does not change what it means.
const EXTRA_COMPATIBLE: u32 = 4;
/// The only type there is: a dirty bitmap.
const DIRTY_TRACKING: u8 = 1;
/// Offset of an entry's flags in it.
const FLAGS: u64 = 12;

/// The fixed part of an entry.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    /// 0: offset of the bitmap's table.
    table: U64,
    /// 8: its entries.
    table_len: U32,
    /// 12: flags.
    flags: U32,
    /// 16: type.
    kind: u8,
    /// 17: log2 of the granularity in bytes.
    granularity_bits: u8,
    /// 18: bytes of the name.
    name_len: U16,
    /// 20: bytes of extra data, which follows, before the name.
    extra_len: U32,
}

const HEAD: usize = size_of::<Raw>();

/// One entry, with all that it takes to write it again as it was.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    raw: Raw,
    extra: Vec<u8>,
    name: Vec<u8>,
    /// Where its flags are in the file; 0: nowhere yet.
    flags_at: u64,
}

impl Entry {
    /// A new one without a table.
    pub(super) fn new(name: &OsStr, granularity_bits: u8) -> Result<Self> {
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(Error::invalid(format!(
                "the bitmap's name '{}' has {} bytes (allowed: 1 to {MAX_NAME})",
                printable(name),
                name.len()
            )));
        }
        Ok(Self {
            raw: Raw {
                table: U64::ZERO,
                table_len: U32::ZERO,
                flags: U32::ZERO,
                kind: DIRTY_TRACKING,
                granularity_bits,
                name_len: U16::new(u16::try_from(name.len()).unwrap_or(u16::MAX)),
                extra_len: U32::ZERO,
            },
            extra: Vec::new(),
            name: name.as_bytes().to_vec(),
            flags_at: 0,
        })
    }

    /// Its name.
    pub(super) fn name(&self) -> &OsStr {
        OsStr::from_bytes(&self.name)
    }

    /// Whether that is its name.
    pub(super) fn is_called(&self, name: &OsStr) -> bool {
        self.name == name.as_bytes()
    }

    /// Offset of its table.
    pub(super) fn table(&self) -> u64 {
        self.raw.table.get()
    }

    /// The bytes of its table.
    pub(super) fn table_range(&self) -> Range<u64> {
        let len = self.table_len() * 8;
        self.table()..self.table().saturating_add(len)
    }

    /// Words of its table; 0 past its end.
    pub(super) fn words(&self, file: &dyn Storage, part: Range<u64>) -> Result<Vec<u64>> {
        let place = |index: u64| self.table() + index.min(self.table_len()) * 8;
        let mut words = be64::read(file, place(part.start)..place(part.end))?;
        words.resize(clamp_len(range::len(&part), usize::MAX), 0);
        Ok(words)
    }

    /// Says where its table is, and how many entries it has.
    ///
    /// # Errors
    /// `Invalid` where they are too many.
    pub(super) fn set_table(&mut self, host: u64, len: u64) -> Result<()> {
        if len > MAX_TABLE {
            return Err(Error::invalid(format!(
                "bitmap '{}' would have a table of {len} entries (allowed: {MAX_TABLE}); a larger granularity makes it smaller",
                printable(self.name())
            )));
        }
        self.raw.table = U64::new(host);
        self.raw.table_len = U32::new(u32::try_from(len).unwrap_or(u32::MAX));
        Ok(())
    }

    /// Entries of its table.
    pub(super) fn table_len(&self) -> u64 {
        u64::from(self.raw.table_len.get())
    }

    /// log2 of the granularity in bytes.
    pub(super) fn granularity_bits(&self) -> u8 {
        self.raw.granularity_bits
    }

    /// Whether a writer has it open, or did not close it.
    pub(super) fn is_in_use(&self) -> bool {
        self.raw.flags.get() & IN_USE != 0
    }

    /// Whether it takes note of writes.
    pub(super) fn is_recording(&self) -> bool {
        self.raw.flags.get() & AUTO != 0
    }

    /// Says whether it takes note of writes.
    pub(super) fn set_recording(&mut self, recording: Recording) {
        let flags = self.raw.flags.get() & !AUTO;
        self.raw.flags = U32::new(match recording {
            Recording::On => flags | AUTO,
            Recording::Off => flags,
        });
    }

    /// Says in the file whether it is in use.
    pub(super) fn write_in_use(&mut self, file: &dyn Storage, in_use: u32) -> Result<()> {
        self.raw.flags = U32::new(self.raw.flags.get() & !IN_USE | in_use);
        file.write_at(self.raw.flags.as_bytes(), self.flags_at)
    }

    fn describe(&self) -> Bitmap {
        Bitmap {
            name: self.name().to_owned(),
            granularity: 1 << self.raw.granularity_bits,
            recording: match self.is_recording() {
                true => Recording::On,
                false => Recording::Off,
            },
            in_use: self.is_in_use(),
        }
    }

    fn encode_into(&self, bytes: &mut Vec<u8>) {
        bytes.extend(self.raw.as_bytes());
        bytes.extend(&self.extra);
        bytes.extend(&self.name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }

    fn check(&self, header: &Header) -> Result<()> {
        let name = printable(self.name());
        let wrong = |what: String| Err(Error::corrupt(format!("bitmap '{name}': {what}")));
        let raw = &self.raw;
        if raw.kind != DIRTY_TRACKING {
            return wrong(format!("its type is {} (allowed: 1)", raw.kind));
        }
        if !GRANULARITY.contains(&raw.granularity_bits) {
            return wrong(format!(
                "its granularity is 2^{} (allowed: 2^9 to 2^31)",
                raw.granularity_bits
            ));
        }
        let unknown = raw.flags.get() & !(IN_USE | AUTO | EXTRA_COMPATIBLE);
        if unknown != 0 {
            return wrong(format!("its flags are {:#x} (allowed: 0x7)", raw.flags));
        }
        if !self.extra.is_empty() && raw.flags.get() & EXTRA_COMPATIBLE == 0 {
            return wrong("it has extra data that is not known".to_owned());
        }
        let (table, len) = (self.table(), self.table_len());
        let needed = table_len(header, header.size, raw.granularity_bits);
        if self.name.is_empty() {
            return wrong("its name is empty".to_owned());
        }
        // One that is in use may be for another size, but never without a table.
        let lost = len == 0 && needed > 0;
        if lost || !self.is_in_use() && len != needed {
            return wrong(format!("its table has {len} entries (expected: {needed})"));
        }
        let fits = table
            .checked_add(len * 8)
            .is_some_and(|end| i64::try_from(end).is_ok());
        let placed = table != 0 && is_aligned(table, header.cluster_size()) && fits;
        if len > MAX_TABLE || (len > 0 && !placed) {
            return wrong(format!(
                "its table has {len} entries at {table:#x} (allowed: {MAX_TABLE}, at a multiple of {:#x})",
                header.cluster_size()
            ));
        }
        Ok(())
    }
}

/// A word of a bitmap's table for a cluster of ones that has no space.
pub(super) const ONES: u64 = 1;

/// Where the cluster of a word of a bitmap's table is; `None`: its bits are all the same.
///
/// # Errors
/// The word itself, where no table has it.
pub(super) fn cluster(word: u64, cluster_size: u64) -> std::result::Result<Option<u64>, u64> {
    let host = word & OFFSET;
    let sound = word & !(OFFSET | ONES) == 0 && is_aligned(host, cluster_size);
    // The lowest bit says which, where there is no cluster.
    match sound && (host == 0 || word & ONES == 0) {
        true => Ok(Some(host).filter(|host| *host != 0)),
        false => Err(word),
    }
}

/// The error for a word of a bitmap's table that no table has.
pub(super) fn unsound(index: u64, word: u64, cluster_size: u64) -> Error {
    Error::corrupt(format!(
        "entry {index} of a bitmap's table is {word:#018x} (allowed: 0, 1, multiples of {cluster_size:#x} within the file)"
    ))
}

/// Bytes of the directory's entry of a new bitmap with a name of `name_len` bytes.
pub(super) fn entry_len(name_len: usize) -> u64 {
    len64((HEAD + name_len).next_multiple_of(8))
}

/// Entries of the table of a bitmap of a disk of `size` bytes.
pub(super) fn table_len(header: &Header, size: u64, granularity_bits: u8) -> u64 {
    let bits = size.div_ceil(1 << granularity_bits);
    bits.div_ceil(8).div_ceil(header.cluster_size())
}

/// Where a directory is, as the header's extension says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// Its offset.
    pub(super) offset: u64,
    /// Its length in bytes.
    pub(super) len: u64,
    /// Entries in it.
    count: u64,
}

impl Place {
    /// The bytes of the directory.
    pub(super) fn range(&self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.len)
    }

    /// From the header; `None`: there are no bitmaps, or none that agree with the image.
    pub(super) fn read(header: &Header) -> Result<Option<Self>> {
        let data = extension::data(&header.extensions, extension::BITMAPS);
        let Some(data) = data.filter(|_| header.autoclear & feature::BITMAPS != 0) else {
            return Ok(None);
        };
        let words: Vec<u64> = be64::words(data).collect();
        let ([first, len, offset], 24) = (&*words, data.len()) else {
            return Err(Error::corrupt(format!(
                "the bitmaps extension has {} bytes (expected: 24)",
                data.len()
            )));
        };
        let reserved = first & u64::from(u32::MAX);
        if reserved != 0 {
            return Err(Error::corrupt(format!(
                "the bitmaps extension has {reserved:#x} in a reserved field (expected: 0)"
            )));
        }
        let place = Self {
            offset: *offset,
            len: *len,
            count: first >> 32,
        };
        let placed = place.offset != 0 && is_aligned(place.offset, header.cluster_size());
        let fits = place.offset.checked_add(place.len).is_some();
        if place.count > MAX_COUNT || place.len > MAX_BYTES || !placed || !fits {
            return Err(Error::corrupt(format!(
                "the bitmap directory has {} entries in {} bytes at {:#x} (allowed: {MAX_COUNT}, {MAX_BYTES}, a multiple of {:#x})",
                place.count,
                place.len,
                place.offset,
                header.cluster_size()
            )));
        }
        Ok(Some(place))
    }
}

/// The bitmaps of an image.
#[derive(Debug, Clone, Default)]
pub(super) struct Directory {
    /// Its entries, in order.
    pub(super) entries: Vec<Entry>,
    /// Where it was read from.
    pub(super) place: Option<Place>,
}

/// A directory as it is in the file, with all that is wrong with it.
#[derive(Debug)]
pub(super) struct Scan {
    /// Where it is.
    pub(super) place: Place,
    /// Its entries, each with what is wrong with it alone.
    pub(super) entries: Vec<(Entry, Option<Error>)>,
    /// Why it is not what its header says.
    pub(super) fault: Option<Error>,
}

impl Scan {
    /// Reads the directory that `header` points at; `None`: there is none.
    ///
    /// # Errors
    /// `Corrupt` where the header does not say where it is, or it is not inside the file; the
    /// host's.
    pub(super) fn read(file: &dyn Storage, header: &Header) -> Result<Option<Self>> {
        let Some(place) = Place::read(header)? else {
            return Ok(None);
        };
        if place.offset + place.len > file.size() {
            return Err(Error::corrupt(format!(
                "the bitmap directory at {:#x} has {} bytes (the file ends at {:#x})",
                place.offset,
                place.len,
                file.size()
            )));
        }
        let bytes = be64::read_bytes(file, place.range())?;
        let mut scan = Self {
            place,
            entries: Vec::new(),
            fault: None,
        };
        scan.fault = scan.entries_of(&bytes, header).err();
        Ok(Some(scan))
    }

    fn entries_of(&mut self, bytes: &[u8], header: &Header) -> Result<()> {
        let mut rest = bytes;
        let mut names = HashSet::new();
        for index in 0..self.place.count {
            let at = self.place.offset + (self.place.len - len64(rest.len()));
            let short =
                || Error::corrupt(format!("the bitmap directory ends within entry {index}"));
            let (raw, tail) = Raw::read_from_prefix(rest).map_err(|_| short())?;
            let extra_len = clamp_len(u64::from(raw.extra_len.get()), usize::MAX);
            let name_len = usize::from(raw.name_len.get());
            let extra = tail.get(..extra_len).ok_or_else(short)?;
            let name = tail.get(extra_len..extra_len.saturating_add(name_len));
            let name = name.ok_or_else(short)?;
            let entry = Entry {
                raw,
                extra: extra.to_vec(),
                name: name.to_vec(),
                flags_at: at + FLAGS,
            };
            let fault = match names.insert(name) {
                true => entry.check(header).err(),
                false => Some(Error::corrupt(format!(
                    "two bitmaps are called '{}'",
                    printable(entry.name())
                ))),
            };
            self.entries.push((entry, fault));
            let used = (HEAD + extra_len + name_len).next_multiple_of(8);
            rest = rest.get(used..).ok_or_else(short)?;
        }
        match rest.len() {
            0 => Ok(()),
            len => Err(Error::corrupt(format!(
                "the bitmap directory has {len} bytes after its last entry (expected: 0)"
            ))),
        }
    }
}

impl Directory {
    /// Reads and validates the directory that `header` points at; empty where there is none.
    pub(super) fn read(file: &dyn Storage, header: &Header) -> Result<Self> {
        let Some(scan) = Scan::read(file, header)? else {
            return Ok(Self::default());
        };
        let mut entries = Vec::new();
        for (entry, fault) in scan.entries {
            fault.map_or(Ok(()), Err)?;
            entries.push(entry);
        }
        scan.fault.map_or(Ok(()), Err)?;
        Ok(Self {
            entries,
            place: Some(scan.place),
        })
    }

    /// The index of the bitmap called `name`.
    pub(super) fn find(&self, name: &OsStr) -> Result<usize> {
        let found = self.entries.iter().position(|e| e.is_called(name));
        found.ok_or_else(|| {
            let text = format!(
                "has no bitmap '{}' (it has {})",
                printable(name),
                self.entries.len()
            );
            Error::new(ErrorKind::NotFound, text)
        })
    }

    /// As `find`, of a bitmap whose bits can be relied on.
    pub(super) fn find_sound(&self, name: &OsStr) -> Result<usize> {
        let index = self.find(name)?;
        match self.entries.get(index).is_some_and(Entry::is_in_use) {
            false => Ok(index),
            true => Err(Error::corrupt(format!(
                "bitmap '{}' is in use: a writer did not close the image (it can only be removed)",
                printable(name)
            ))),
        }
    }

    /// What users see of the bitmaps.
    pub(super) fn describe(&self) -> Vec<Bitmap> {
        self.entries.iter().map(Entry::describe).collect()
    }

    /// The bytes of the directory.
    pub(super) fn encode(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.entries.iter().for_each(|e| e.encode_into(&mut bytes));
        if len64(bytes.len()) > MAX_BYTES || len64(self.entries.len()) > MAX_COUNT {
            let text = format!(
                "the bitmap directory would have {} entries in {} bytes (allowed: {MAX_COUNT}, {MAX_BYTES})",
                self.entries.len(),
                bytes.len()
            );
            return Err(Error::new(ErrorKind::OutOfRange, text));
        }
        Ok(bytes)
    }

    /// Has `header` point at this directory, `len` bytes at `offset`; at none where it is empty.
    pub(super) fn point(&self, header: &mut Header, offset: u64, len: u64) {
        let count = len64(self.entries.len());
        let data = (count > 0).then(|| be64::bytes([count << 32, len, offset]));
        match data {
            Some(_) => header.autoclear |= feature::BITMAPS,
            None => header.autoclear &= !feature::BITMAPS,
        }
        extension::set(&mut header.extensions, extension::BITMAPS, data);
    }
}

//! The header of a hosted sparse file: one sector, its fields as section 3 of `vmdk.md` has them.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::formats::vmdk::create::{self, Shape};
use crate::formats::vmdk::tables::Geometry;
use crate::storage::Storage;
use crate::util::range;

/// What all offsets and lengths are in.
pub(super) const SECTOR: u64 = 512;
/// The same, as a length in memory.
pub(super) const SECTOR_LEN: usize = 512;
/// Bytes of a header.
pub(super) const LEN: usize = 512;
/// A grain directory's offset that says: the header at the end of the file has it.
pub(super) const AT_END: u64 = u64::MAX;

/// The file has two copies of each table.
pub(super) const REDUNDANT: u32 = 1 << 1;
/// An entry of 1 reads as zeroes.
pub(super) const ZEROES: u32 = 1 << 2;
const NEWLINES: u32 = 1;
const COMPRESSED: u32 = 1 << 16;
const MARKERS: u32 = 1 << 17;
/// From this flag on those that are not known keep the file from being read.
const FIRST_REQUIRED: u32 = 16;

/// Grains in sectors, of those that are read: 4 KiB to 64 MiB.
const GRAINS: Range<u64> = 8..131_072 + 1;
/// Sectors of a grain that is decoded as a whole.
const MAX_PACKED: u64 = 4096;
/// Entries of a table, of those that are read.
const ENTRIES: Range<u32> = 128..512 + 1;
/// Sectors of less than 2^63 bytes.
const MOST_SECTORS: u64 = (1 << 54) - 1;
/// Sectors of a descriptor inside.
const MAX_DESCRIPTOR: u64 = 2048;

const VERSION: usize = 4;
const FLAGS: usize = 8;
const CAPACITY: usize = 12;
const GRAIN: usize = 20;
const DESCRIPTOR: usize = 28;
const DESCRIPTOR_LEN: usize = 36;
const PER_TABLE: usize = 44;
const RGD: usize = 48;
const GD: usize = 56;
const OVERHEAD: usize = 64;
/// A byte that is not 0 while somebody writes.
pub(super) const UNCLEAN: u64 = 72;
const UNCLEAN_AT: usize = 72;
const LINES: usize = 73;
const COMPRESSION: usize = 77;
/// What a transfer as text would change.
const NEWLINE_TEST: &[u8] = b"\n \r\n";

/// A header, as it is in the file.
#[derive(Debug, Clone)]
pub(super) struct Header {
    pub(super) bytes: [u8; LEN],
}

impl Header {
    /// That of a new sparse file, which has this shape.
    pub(super) fn new(shape: &Shape, zeroes: bool) -> Self {
        let mut header = Self { bytes: [0; LEN] };
        header.put(0, b"KDMV");
        header.put(VERSION, &u32::to_le_bytes(if zeroes { 2 } else { 1 }));
        let flags = NEWLINES | REDUNDANT | if zeroes { ZEROES } else { 0 };
        header.put(FLAGS, &flags.to_le_bytes());
        for (at, value) in [
            (CAPACITY, shape.sectors),
            (GRAIN, shape.grain),
            (DESCRIPTOR, create::DESCRIPTOR),
            (DESCRIPTOR_LEN, create::DESCRIPTOR_SECTORS),
            (RGD, shape.rgd),
            (GD, shape.gd),
            (OVERHEAD, shape.overhead),
        ] {
            header.put(at, &value.to_le_bytes());
        }
        header.put(PER_TABLE, &512_u32.to_le_bytes());
        header.put(LINES, NEWLINE_TEST);
        header
    }

    /// That of a stream, whose directory is in sector `gd`; [`AT_END`] in the header at its start.
    pub(super) fn stream(shape: &Shape, overhead: u64, gd: u64) -> Self {
        let mut header = Self::new(shape, false);
        header.put(VERSION, &3_u32.to_le_bytes());
        header.put(FLAGS, &(NEWLINES | COMPRESSED | MARKERS).to_le_bytes());
        header.put(RGD, &[0; 8]);
        header.put(GD, &gd.to_le_bytes());
        header.put(OVERHEAD, &overhead.to_le_bytes());
        header.put(COMPRESSION, &1_u16.to_le_bytes());
        header
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Has the disk have so many sectors, and the directories be there.
    pub(super) fn set_shape(&mut self, sectors: u64, gd: u64, rgd: Option<u64>) {
        self.put(CAPACITY, &sectors.to_le_bytes());
        self.put(GD, &gd.to_le_bytes());
        if let Some(rgd) = rgd {
            self.put(RGD, &rgd.to_le_bytes());
        }
    }

    /// Reads the header at `host`, of a file that begins with one, and checks what does not depend on
    /// others.
    ///
    /// # Errors
    /// `WrongFormat`, `Corrupt`, `Unsupported`, naming the field; the host's.
    pub(super) fn read(storage: &dyn Storage, host: u64) -> Result<Self> {
        let mut bytes = [0; LEN];
        storage.read_at(&mut bytes, host)?;
        let header = Self { bytes };
        header.check(storage.size())?;
        Ok(header)
    }

    fn check(&self, size: u64) -> Result<()> {
        if self.bytes.starts_with(b"kdmv") {
            return Err(Error::corrupt(
                "the magic is 'kdmv': the file is incomplete, whoever wrote it did not finish",
            ));
        }
        if !self.bytes.starts_with(b"KDMV") {
            let text = "has no header of a sparse extent (allowed: KDMV at its start)";
            return Err(Error::new(crate::error::ErrorKind::WrongFormat, text));
        }
        if !(1..=3).contains(&self.version()) {
            let text = format!("version is {} (allowed: 1, 2, 3)", self.version());
            return Err(Error::unsupported(text));
        }
        self.check_flags()?;
        let end = self.descriptor_sectors();
        if end.is_none_or(|end| end.end > size / SECTOR || end.end - end.start > MAX_DESCRIPTOR) {
            return Err(Error::corrupt(format!(
                "the descriptor is {} sectors from {} on (allowed: up to {MAX_DESCRIPTOR}, inside the file of {size} bytes)",
                self.quad(DESCRIPTOR_LEN),
                self.quad(DESCRIPTOR)
            )));
        }
        match self.is_only_descriptor() {
            true => Ok(()),
            false => self.check_shape(size),
        }
    }

    fn check_flags(&self) -> Result<()> {
        let flags = self.flags();
        if flags & NEWLINES != 0 && !self.bytes[LINES..].starts_with(NEWLINE_TEST) {
            return Err(Error::corrupt(
                "the line ends at 73 were changed: the file was transferred as text",
            ));
        }
        let unknown = flags & !(COMPRESSED | MARKERS) & (u32::MAX << FIRST_REQUIRED);
        let stream = (flags & COMPRESSED != 0, flags & MARKERS != 0);
        let compression = self.half(COMPRESSION);
        let allowed = match stream {
            (true, true) => 1,
            (false, false) => 0,
            _ => {
                let text =
                    format!("flags are {flags:#x} (allowed: bits 16 and 17 both, or neither)");
                return Err(Error::unsupported(text));
            }
        };
        if unknown != 0 {
            let text = format!("flags are {flags:#x}, of which {unknown:#x} are not known");
            return Err(Error::unsupported(text));
        }
        if compression != allowed {
            return Err(Error::unsupported(format!(
                "the compression is {compression} with flags {flags:#x} (allowed: {allowed})"
            )));
        }
        Ok(())
    }

    fn check_shape(&self, size: u64) -> Result<()> {
        let (grain, per_table, capacity) = (self.grain(), self.per_table(), self.capacity());
        let wrong = |field: &str, found: u64, allowed: String| {
            Err(Error::corrupt(format!(
                "{field} is {found} (allowed: {allowed})"
            )))
        };
        if !grain.is_power_of_two() || !GRAINS.contains(&grain) {
            let allowed = format!(
                "a power of two from {} to {} sectors",
                GRAINS.start,
                GRAINS.end - 1
            );
            return wrong("the grain size", grain, allowed);
        }
        if self.is_stream() && grain > MAX_PACKED {
            let allowed = format!("at most {MAX_PACKED} sectors where grains are compressed");
            return wrong("the grain size", grain, allowed);
        }
        if !per_table.is_power_of_two() || !ENTRIES.contains(&per_table) {
            let allowed = "a power of two from 128 to 512".to_owned();
            return wrong(
                "the number of entries in a grain table",
                per_table.into(),
                allowed,
            );
        }
        let most = (grain << 32).min(MOST_SECTORS);
        if capacity > most {
            return wrong("the capacity", capacity, format!("at most {most} sectors"));
        }
        let overhead = self.quad(OVERHEAD);
        if overhead.checked_mul(SECTOR).is_none_or(|end| end > size) {
            let allowed = format!("the file has {} sectors: it is truncated", size / SECTOR);
            return wrong("the first sector of data", overhead, allowed);
        }
        if self.is_at_end() && !self.is_stream() {
            let allowed = "in a stream only".to_owned();
            return wrong("the offset of the grain directory", AT_END, allowed);
        }
        Ok(())
    }

    /// Refuses directories, of `len` bytes each, that lie over each other, the descriptor, or the
    /// first grain.
    fn check_apart(&self, geometry: &Geometry, len: u64) -> Result<()> {
        let named = |host: u64, name| (host..host + len, name);
        let mut parts = vec![
            named(geometry.gd, "the grain directory"),
            (geometry.first..geometry.first + 1, "the first grain"),
        ];
        parts.extend(
            geometry
                .rgd
                .map(|host| named(host, "the redundant grain directory")),
        );
        parts.extend(self.descriptor().map(|host| (host, "the descriptor")));
        for (index, (one, name)) in parts.iter().enumerate() {
            for (other, its) in &parts[index + 1..] {
                if let Some(both) = range::intersect(one, other) {
                    return Err(Error::corrupt(format!(
                        "{name} and {its} both have the bytes {:#x}..{:#x} (allowed: apart)",
                        both.start, both.end
                    )));
                }
            }
        }
        Ok(())
    }

    fn word(&self, at: usize) -> u32 {
        let bytes = self.bytes[at..].first_chunk();
        bytes.copied().map_or(0, u32::from_le_bytes)
    }

    fn half(&self, at: usize) -> u16 {
        let bytes = self.bytes[at..].first_chunk();
        bytes.copied().map_or(0, u16::from_le_bytes)
    }

    fn quad(&self, at: usize) -> u64 {
        let bytes = self.bytes[at..].first_chunk();
        bytes.copied().map_or(0, u64::from_le_bytes)
    }

    pub(super) fn version(&self) -> u32 {
        self.word(VERSION)
    }

    pub(super) fn flags(&self) -> u32 {
        self.word(FLAGS)
    }

    /// Sectors of the disk that it holds.
    pub(super) fn capacity(&self) -> u64 {
        self.quad(CAPACITY)
    }

    /// Sectors of a grain.
    pub(super) fn grain(&self) -> u64 {
        self.quad(GRAIN)
    }

    pub(super) fn per_table(&self) -> u32 {
        self.word(PER_TABLE)
    }

    /// Whether grains are compressed, each behind a marker.
    pub(super) fn is_stream(&self) -> bool {
        self.flags() & COMPRESSED != 0
    }

    /// Whether the header at the end of the file says where the directory is.
    pub(super) fn is_at_end(&self) -> bool {
        self.quad(GD) == AT_END
    }

    /// Whether the last writer did not close the file.
    pub(super) fn is_unclean(&self) -> bool {
        self.bytes.get(UNCLEAN_AT) != Some(&0)
    }

    /// Flags that are not known and that a writer would have to know.
    pub(super) fn odd_flags(&self) -> u32 {
        self.flags() & !(NEWLINES | REDUNDANT | ZEROES | COMPRESSED | MARKERS)
    }

    /// Whether it is there for the sake of the descriptor alone.
    pub(super) fn is_only_descriptor(&self) -> bool {
        self.capacity() == 0 && self.quad(DESCRIPTOR) != 0
    }

    fn descriptor_sectors(&self) -> Option<Range<u64>> {
        let start = self.quad(DESCRIPTOR);
        match start {
            0 => Some(0..0),
            start => Some(start..start.checked_add(self.quad(DESCRIPTOR_LEN))?),
        }
    }

    /// Where the descriptor is, in bytes; `None`: there is no place for one.
    pub(super) fn descriptor(&self) -> Option<Range<u64>> {
        let sectors = self.descriptor_sectors().filter(|s| !s.is_empty())?;
        Some(sectors.start * SECTOR..sectors.end * SECTOR)
    }

    /// Where things are, in bytes.
    ///
    /// # Errors
    /// `Corrupt` for a directory outside a file of `size` bytes.
    pub(super) fn geometry(&self, size: u64) -> Result<Geometry> {
        let capacity = self.capacity() * SECTOR;
        let grain = self.grain() * SECTOR;
        let mut geometry = Geometry {
            capacity,
            grain,
            per_table: u64::from(self.per_table()),
            gd: 0,
            rgd: None,
            first: self.quad(OVERHEAD).max(1) * SECTOR,
            zeroes: self.flags() & ZEROES != 0,
            zero_tables: self.version() == 2,
        };
        let len = geometry.tables() * 4;
        let inside = |field: &str, sector: u64| {
            let host = sector.checked_mul(SECTOR);
            let end = host.and_then(|host| host.checked_add(len));
            host.filter(|host| *host > 0 && end.is_some_and(|end| end <= size))
                .ok_or_else(|| {
                    Error::corrupt(format!(
                        "{field} is {len} bytes from sector {sector:#x} on (allowed: inside the file of {size} bytes, behind its header)"
                    ))
                })
        };
        geometry.gd = inside("the grain directory", self.quad(GD))?;
        // Of streams nobody reads the other copy.
        if self.flags() & REDUNDANT != 0 && !self.is_stream() {
            geometry.rgd = Some(inside("the redundant grain directory", self.quad(RGD))?);
        }
        self.check_apart(&geometry, len)?;
        Ok(geometry)
    }
}

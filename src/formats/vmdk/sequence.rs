//! A stream, written from its first byte to its last in one pass: section 4 of `vmdk.md`.
//!
//! Header, descriptor; for each table that has grains these, its marker, itself; the directory and
//! the footer behind their markers; one sector of zeroes, with which the file must end.  Nothing of it
//! depends on what comes later, so that nothing is read twice.

use std::io::Write;

use libdeflater::{CompressionLvl, Compressor};

use crate::error::{Error, ErrorKind, Result};
use crate::formats::vmdk::create::{DESCRIPTOR, DESCRIPTOR_SECTORS, PER_TABLE, Plan, Shape, TABLE};
use crate::formats::vmdk::header::{AT_END, Header, SECTOR, SECTOR_LEN};
use crate::formats::vmdk::options::{LEVEL, Subformat};
use crate::formats::vmdk::stream::{FOOTER, MARKER};
use crate::image::compress::{Encoder, Form, Sequence, Unit};
use crate::image::create::CreateOptions;
use crate::image::options::OptionValues;
use crate::storage::{Storage, start_over};
use crate::util::align::{clamp_len, len64};

/// Types of markers before metadata.
const GRAIN_TABLE: u32 = 1;
const DIRECTORY: u32 = 2;
/// Where the first grain is, at least: where others have it.
const FIRST: u64 = 128;
/// Longest piece that deflate stores as it is.
const STORED: usize = 0xffff;

/// How a zlib stream that was not compressed begins.
const PLAIN: [u8; 2] = [0x78, 0x01];

/// Plans a stream; see [`crate::image::driver::NewSequence`].
pub(super) fn new(
    options: &CreateOptions,
    _data_clusters: u64,
    values: Option<&OptionValues>,
) -> Result<Box<dyn Sequence>> {
    let plan = Plan::new(options)?;
    if plan.subformat != Subformat::Stream {
        return Err(Error::unsupported(format!(
            "a VMDK of subformat {} cannot be written in order (allowed: streamOptimized)",
            plan.subformat.name()
        )));
    }
    let level = values
        .and_then(|v| v.number("compression_level"))
        .unwrap_or(LEVEL);
    let level = i32::try_from(level)
        .ok()
        .filter(|level| (1..=12).contains(level));
    let level = level
        .ok_or_else(|| Error::invalid("compression_level is out of range (allowed: 1 to 12)"))?;
    Ok(Box::new(Stream::new(&plan, level)?))
}

/// Makes a stream without grains.
pub(super) fn empty(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    let mut stream = new(options, 0, None)?;
    if storage.has_fixed_len() {
        return Err(Error::unsupported(
            "a stream (streamOptimized) ends where its file does (allowed: in a file, not on a device)",
        ));
    }
    let mut bytes = Vec::new();
    stream.begin(&mut bytes)?;
    stream.finish(&mut bytes)?;
    start_over(storage, 0)?;
    storage.write_at(&bytes, 0)
}

/// Bytes of a stream with so many grains, at most.
pub(super) fn measure(plan: &Plan, grains: u64) -> u64 {
    let shape = plan.shape(plan.size / SECTOR);
    let tables = shape.tables.min(grains);
    let grain = (MARKER + longest(plan.grain)).next_multiple_of(SECTOR);
    let end = Shape::directory(shape.tables) + 1 + 3;
    (FIRST + tables * (TABLE + 1) + end) * SECTOR + grains.saturating_mul(grain)
}

/// Bytes of a grain that does not become shorter.
fn longest(grain: u64) -> u64 {
    grain + 5 * grain.div_ceil(len64(STORED)) + 6
}

#[derive(Debug)]
struct Stream {
    shape: Shape,
    level: i32,
    descriptor: Vec<u8>,
    /// The directory, and the table at work with the sector at which it is.
    directory: Vec<u32>,
    table: Vec<u32>,
    number: u64,
    sector: u64,
    overhead: u64,
}

impl Stream {
    fn new(plan: &Plan, level: i32) -> Result<Self> {
        let descriptor = plan.descriptor()?.to_bytes();
        let room = DESCRIPTOR_SECTORS * SECTOR;
        if len64(descriptor.len()) > room {
            return Err(Error::new(
                ErrorKind::OutOfRange,
                format!(
                    "the descriptor has {} bytes (allowed: {room})",
                    descriptor.len()
                ),
            ));
        }
        let shape = plan.shape(plan.size / SECTOR);
        Ok(Self {
            level,
            descriptor,
            directory: vec![0; clamp_len(shape.tables, usize::MAX)],
            table: vec![0; clamp_len(PER_TABLE, usize::MAX)],
            number: 0,
            sector: 0,
            overhead: FIRST.max(DESCRIPTOR + DESCRIPTOR_SECTORS),
            shape,
        })
    }

    /// Writes bytes, and zeroes to the end of the sector.
    fn put(&mut self, parts: &[&[u8]], out: &mut dyn Write) -> Result<()> {
        let fail = |e| Error::io("write to the stream", e);
        let mut len = 0;
        for part in parts {
            out.write_all(part).map_err(fail)?;
            len += len64(part.len());
        }
        let end = len.next_multiple_of(SECTOR);
        let zeroes = [0; SECTOR_LEN];
        let rest = clamp_len(end - len, usize::MAX);
        out.write_all(&zeroes[..rest]).map_err(fail)?;
        self.sector += end / SECTOR;
        Ok(())
    }

    /// Writes metadata behind its marker; the sector at which it is.
    fn put_marked(&mut self, kind: u32, bytes: &[u8], out: &mut dyn Write) -> Result<u64> {
        let sectors = len64(bytes.len()).div_ceil(SECTOR);
        self.put(&[&sectors.to_le_bytes(), &[0; 4], &kind.to_le_bytes()], out)?;
        let at = self.sector;
        self.put(&[bytes], out)?;
        Ok(at)
    }

    /// Writes the table at work, where it names anything, and goes on to another.
    fn end_table(&mut self, next: u64, out: &mut dyn Write) -> Result<()> {
        if self.table.iter().any(|word| *word != 0) {
            let bytes = bytes_of(&self.table);
            let at = self.put_marked(GRAIN_TABLE, &bytes, out)?;
            let number = clamp_len(self.number, usize::MAX);
            self.directory[number] = named(at)?;
            self.table.fill(0);
        }
        self.number = next;
        Ok(())
    }

    fn grain(&mut self, unit: &Unit, stored: &[u8], out: &mut dyn Write) -> Result<()> {
        let index = unit.at / (self.shape.grain * SECTOR);
        if index / PER_TABLE != self.number {
            self.end_table(index / PER_TABLE, out)?;
        }
        self.table[clamp_len(index % PER_TABLE, usize::MAX)] = named(self.sector)?;
        let first = (unit.at / SECTOR).to_le_bytes();
        let plain;
        let data = match unit.form {
            Form::Packed(_) => stored,
            Form::Plain => {
                plain = plain_zlib(stored);
                &plain
            }
        };
        let len = u32::try_from(data.len()).unwrap_or(u32::MAX).to_le_bytes();
        self.put(&[&first, &len, data], out)
    }
}

/// A sector as an entry names it.
fn named(sector: u64) -> Result<u32> {
    u32::try_from(sector).map_err(|_| {
        let text = "the stream is longer than its tables can name (allowed: 2 TiB)";
        Error::new(ErrorKind::NoSpace, text)
    })
}

fn bytes_of(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// A zlib stream of bytes as they are.
fn plain_zlib(bytes: &[u8]) -> Vec<u8> {
    let mut out = PLAIN.to_vec();
    let mut pieces = bytes.chunks(STORED).peekable();
    while let Some(piece) = pieces.next() {
        let len = u16::try_from(piece.len()).unwrap_or(u16::MAX);
        out.push(u8::from(pieces.peek().is_none()));
        out.extend(len.to_le_bytes());
        out.extend((!len).to_le_bytes());
        out.extend_from_slice(piece);
    }
    out.extend(adler32(bytes).to_be_bytes());
    out
}

/// The checksum at the end of a zlib stream (RFC 1950).
fn adler32(bytes: &[u8]) -> u32 {
    const MODULUS: u32 = 65_521;
    /// So many bytes can be added before the sums must be reduced.
    const STEP: usize = 5552;
    let (mut a, mut b) = (1_u32, 0_u32);
    for piece in bytes.chunks(STEP) {
        for byte in piece {
            a += u32::from(*byte);
            b += a;
        }
        a %= MODULUS;
        b %= MODULUS;
    }
    b << 16 | a
}

impl Sequence for Stream {
    fn cluster_size(&self) -> u64 {
        self.shape.grain * SECTOR
    }

    fn is_one_pass(&self) -> bool {
        true
    }

    fn encoder(&self) -> Result<Option<Box<dyn Encoder>>> {
        let level = CompressionLvl::new(self.level)
            .map_err(|e| Error::invalid(format!("compression_level: {e:?}")))?;
        Ok(Some(Box::new(Zlib(Compressor::new(level)))))
    }

    fn begin(&mut self, out: &mut dyn Write) -> Result<()> {
        self.sector = 0;
        let header = Header::stream(&self.shape, self.overhead, AT_END);
        let descriptor = self.descriptor.clone();
        let rest = (self.overhead - 1) * SECTOR - len64(descriptor.len());
        let rest = vec![0; clamp_len(rest, usize::MAX)];
        self.put(&[&header.bytes, &descriptor, &rest], out)
    }

    fn add(&mut self, units: &[Unit], bytes: &[u8], out: &mut dyn Write) -> Result<()> {
        let mut bytes = bytes;
        for unit in units {
            let len = clamp_len(unit.stored_len(self.cluster_size()), usize::MAX);
            let (stored, rest) = bytes
                .split_at_checked(len)
                .ok_or_else(|| Error::invalid("too few bytes for these grains"))?;
            self.grain(unit, stored, out)?;
            bytes = rest;
        }
        Ok(())
    }

    fn finish(&mut self, out: &mut dyn Write) -> Result<()> {
        self.end_table(0, out)?;
        let mut directory = bytes_of(&self.directory);
        directory.resize(directory.len().next_multiple_of(SECTOR_LEN), 0);
        let gd = self.put_marked(DIRECTORY, &directory, out)?;
        let footer = Header::stream(&self.shape, self.overhead, gd);
        self.put_marked(FOOTER, &footer.bytes, out)?;
        self.put(&[&[0; SECTOR_LEN]], out)
    }
}

/// Compresses grains.
struct Zlib(Compressor);

impl std::fmt::Debug for Zlib {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Zlib")
    }
}

impl Encoder for Zlib {
    fn encode(&mut self, unit: &[u8], out: &mut [u8]) -> Result<Option<usize>> {
        let most = unit.len().saturating_sub(1).min(out.len());
        Ok(self.0.zlib_compress(unit, &mut out[..most]).ok())
    }
}

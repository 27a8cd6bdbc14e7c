//! The header, of versions 1, 2 and 3 (section d of the description of the format).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::error::{Error, Result};
use crate::image::codec::Method;
use crate::storage::Storage;
use crate::util::align::len64;

/// The first eight bytes.
pub(super) const MAGIC: u64 = 0x436f_7763_4f57_2121;
/// Bytes of a block, of all files that there are.
pub(super) const BLOCK: u64 = 4096;
/// The same, as a length in memory.
pub(super) const BLOCK_LEN: usize = 4096;
/// Bytes of the largest header, that of version 3; no version has more.
pub(super) const HEADER_3: u64 = 78;
/// Bytes of the header of version 2.
pub(super) const HEADER_2: u64 = 38;
/// Bytes of the header of version 1, which has no scratch area.
const HEADER_1: u64 = 34;
/// Bytes of an operation.
pub(super) const OP_2: u64 = 20;
/// Bytes of an operation of version 3.
pub(super) const OP_3: u64 = 16;
/// Bytes of the footer of version 2.
pub(super) const FOOTER: u64 = 84;
/// Bytes of the scratch area of new files.
pub(super) const SCRATCH: u64 = 2 << 20;
/// The longest scratch area: writers make 2 MiB.
pub(super) const MAX_SCRATCH: u64 = 64 << 20;
/// Most slots of a cluster of operations: writers make 1024.
const MAX_CLUSTER: u32 = 1 << 20;
/// Most operations: as many blocks as 256 GiB have.
pub(super) const MAX_OPS: u64 = 1 << 26;
/// Most entries of sequence data, each of which names an operation.
pub(super) const MAX_SEQUENCE: u64 = MAX_OPS;
/// Most resume points of version 3: writers keep 4.
const MAX_RESUME: u32 = 4096;
/// Bytes of a resume point.
pub(super) const RESUME: u64 = 16;
/// log2 of the most blocks that one operation writes.
pub(super) const MAX_FACTOR: u32 = 6;
/// Offset of the count of merged operations.
pub(super) const MERGED_AT: u64 = 26;

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Prefix {
    pub(super) magic: U64,
    pub(super) major: U16,
    pub(super) minor: U16,
    pub(super) header_size: U16,
    pub(super) footer_size: U16,
    pub(super) op_size: U16,
    pub(super) block_size: U32,
    pub(super) cluster_ops: U32,
    pub(super) merged: U64,
    pub(super) scratch: U32,
}

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Third {
    pub(super) sequence: U64,
    pub(super) resume: U32,
    pub(super) resume_max: U32,
    pub(super) ops: U64,
    pub(super) ops_max: U64,
    pub(super) compression: U32,
    pub(super) largest: U32,
}

const _: () = assert!(size_of::<Prefix>() == 38 && size_of::<Third>() == 40);

/// What a header says, within its limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    /// 1, 2 or 3.
    pub(super) version: u16,
    /// Bytes of it.
    pub(super) size: u64,
    /// Slots of a cluster of operations; 0: there are none.
    pub(super) cluster_ops: u64,
    /// Operations that are merged into the base.
    pub(super) merged: u64,
    /// Bytes of the scratch area behind it.
    pub(super) scratch: u64,
    /// What only version 3 has.
    pub(super) third: Option<Tables>,
}

/// The tables of version 3.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tables {
    /// Entries of sequence data.
    pub(super) sequence: u64,
    /// Resume points, those that there is room for.
    pub(super) resume: u64,
    pub(super) resume_max: u64,
    /// Operations, and slots for such.
    pub(super) ops: u64,
    pub(super) ops_max: u64,
    /// How data is compressed.
    pub(super) packing: Packing,
    /// The most bytes that one operation writes.
    pub(super) largest: u64,
}

/// How the data of an operation is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    /// As it is.
    Plain,
    /// Compressed.
    Packed(Method),
}

impl Packing {
    /// From the number that stands for it.
    ///
    /// # Errors
    /// `Unsupported` for one that there is not.
    pub(super) fn from_number(number: u32) -> Result<Self> {
        Ok(match number {
            0 => Self::Plain,
            1 => Self::Packed(Method::Gz),
            2 => Self::Packed(Method::Brotli),
            3 => Self::Packed(Method::Lz4),
            4 => Self::Packed(Method::Zstd),
            _ => {
                return Err(Error::unsupported(format!(
                    "compression is {number} (allowed: 0 none, 1 gz, 2 brotli, 3 lz4, 4 zstd)"
                )));
            }
        })
    }

    /// The number that stands for it.
    pub(super) fn number(self) -> u8 {
        match self {
            Self::Plain => 0,
            Self::Packed(Method::Gz) => 1,
            Self::Packed(Method::Brotli) => 2,
            Self::Packed(Method::Lz4) => 3,
            Self::Packed(Method::Zstd) => 4,
        }
    }

    /// Its name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Plain => "none",
            Self::Packed(method) => method.name(),
        }
    }
}

/// An error for a field that is not what it may be.
fn field(name: &str, found: impl std::fmt::Display, allowed: impl std::fmt::Display) -> Error {
    Error::corrupt(format!("{name} is {found} (allowed: {allowed})"))
}

impl Header {
    /// Reads the header of `storage`.
    ///
    /// # Errors
    /// `WrongFormat` for none; `Unsupported` for other versions and block sizes; `Corrupt` for fields
    /// out of their limits; the host's.
    pub(super) fn read(storage: &dyn Storage) -> Result<Self> {
        let mut bytes = [0; 78];
        storage.read_at(&mut bytes, 0)?;
        let (prefix, third) = bytes.split_at(size_of::<Prefix>());
        let (Ok(prefix), Ok(third)) = (
            Prefix::read_from_bytes(prefix),
            Third::read_from_bytes(third),
        ) else {
            return Err(Error::corrupt("the header is cut off"));
        };
        if prefix.magic.get() != MAGIC {
            return Err(Error::new(
                crate::error::ErrorKind::WrongFormat,
                "is no Android COW file",
            ));
        }
        let (major, minor) = (prefix.major.get(), prefix.minor.get());
        if !(1..=3).contains(&major) || minor != 0 {
            return Err(Error::unsupported(format!(
                "is of version {major}.{minor} (allowed: 1.0, 2.0, 3.0)"
            )));
        }
        if u64::from(prefix.block_size.get()) != BLOCK {
            return Err(Error::unsupported(format!(
                "block_size is {} (allowed: {BLOCK})",
                prefix.block_size
            )));
        }
        let header = Self::checked(&prefix, &third)?;
        header.fits(storage.size()).map(|()| header)
    }

    fn checked(prefix: &Prefix, third: &Third) -> Result<Self> {
        let version = prefix.major.get();
        let size = u64::from(prefix.header_size.get());
        let (least, most) = match version {
            1 => (HEADER_1, HEADER_3),
            2 => (HEADER_2, HEADER_3),
            _ => (HEADER_3, HEADER_3),
        };
        if !(least..=most).contains(&size) {
            return Err(field("header_size", size, format!("{least} to {most}")));
        }
        let exact = |name: &str, found: U16, allowed: u64| match u64::from(found.get()) {
            found if found == allowed => Ok(()),
            found => Err(field(name, found, allowed)),
        };
        let (op, footer) = if version == 3 {
            (OP_3, 0)
        } else {
            (OP_2, FOOTER)
        };
        exact("op_size", prefix.op_size, op)?;
        exact("footer_size", prefix.footer_size, footer)?;
        let cluster = prefix.cluster_ops.get();
        let fits = match version {
            3 => cluster == 0,
            _ => cluster != 1 && cluster <= MAX_CLUSTER,
        };
        if !fits {
            let allowed = match version {
                3 => "0".to_owned(),
                _ => format!("0, 2 to {MAX_CLUSTER}"),
            };
            return Err(field("cluster_ops", cluster, allowed));
        }
        let scratch = match version {
            1 => 0,
            _ => u64::from(prefix.scratch.get()),
        };
        if scratch > MAX_SCRATCH {
            return Err(field(
                "buffer_size",
                scratch,
                format!("up to {MAX_SCRATCH}"),
            ));
        }
        let merged = prefix.merged.get();
        if merged > MAX_OPS {
            return Err(field("num_merge_ops", merged, format!("up to {MAX_OPS}")));
        }
        Ok(Self {
            version,
            size,
            cluster_ops: u64::from(cluster),
            merged,
            scratch,
            third: (version == 3).then(|| Tables::checked(third)).transpose()?,
        })
    }

    /// Refuses tables that the file has no room for.
    fn fits(&self, len: u64) -> Result<()> {
        let end = match &self.third {
            Some(_) => self.data_at(),
            None => self.ops_at(),
        };
        match end > len {
            true => Err(Error::corrupt(format!(
                "the file has {len} bytes, and header, scratch area and tables end at {end}"
            ))),
            false => Ok(()),
        }
    }

    /// Offset of the scratch area, and of its state.
    pub(super) fn scratch_at(&self) -> u64 {
        self.size
    }

    /// Offset of sequence data, in version 3.
    pub(super) fn sequence_at(&self) -> u64 {
        self.size + self.scratch
    }

    /// Offset of resume points, in version 3.
    pub(super) fn resume_at(&self) -> u64 {
        self.sequence_at() + self.third.as_ref().map_or(0, |t| 4 * t.sequence)
    }

    /// Offset of the first operation.
    pub(super) fn ops_at(&self) -> u64 {
        self.resume_at() + self.third.as_ref().map_or(0, |t| RESUME * t.resume_max)
    }

    /// Offset of the first data.
    pub(super) fn data_at(&self) -> u64 {
        match &self.third {
            Some(tables) => self.ops_at() + OP_3 * tables.ops_max,
            None => self.ops_at() + OP_2 * self.cluster_ops.max(1),
        }
    }
}

impl Tables {
    fn checked(third: &Third) -> Result<Self> {
        let count = |name: &str, found: U64, most: u64| match found.get() {
            found if found <= most => Ok(found),
            found => Err(field(name, found, format!("up to {most}"))),
        };
        let ops_max = count("op_count_max", third.ops_max, MAX_OPS)?;
        let resume_max = third.resume_max.get();
        if resume_max > MAX_RESUME {
            return Err(field(
                "resume_point_max",
                resume_max,
                format!("up to {MAX_RESUME}"),
            ));
        }
        let largest = u64::from(third.largest.get());
        let most = BLOCK << MAX_FACTOR;
        if largest > most || (largest != 0 && !(largest.is_power_of_two() && largest >= BLOCK)) {
            return Err(field(
                "max_compression_size",
                largest,
                format!("a power of two from {BLOCK} to {most}"),
            ));
        }
        Ok(Self {
            // Each entry names an operation; few are read all the same, to say which does not.
            sequence: count(
                "sequence_data_count",
                third.sequence,
                MAX_SEQUENCE.min(third.ops.get().max(4096)),
            )?,
            // Writers let the count exceed what there is room for.
            resume: u64::from(third.resume.get().min(resume_max)),
            resume_max: u64::from(resume_max),
            ops: count("op_count", third.ops, ops_max)?,
            ops_max,
            packing: Packing::from_number(third.compression.get())?,
            largest: largest.max(BLOCK),
        })
    }
}

/// Reads words of a table one after the other, a bounded number at a time.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    storage: &'a dyn Storage,
    /// What is in the buffer, and from where.
    buf: Vec<u8>,
    at: u64,
}

/// Bytes read at a time.
const BUFFER: u64 = 64 << 10;

impl<'a> Reader<'a> {
    pub(super) fn new(storage: &'a dyn Storage) -> Self {
        Self {
            storage,
            buf: Vec::new(),
            at: 0,
        }
    }

    /// The `N` bytes at `at`; `None` where the file ends before.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn bytes<const N: usize>(&mut self, at: u64) -> Result<Option<[u8; N]>> {
        let len = len64(N);
        let inside = |buf: &[u8], start: u64| at >= start && at + len <= start + len64(buf.len());
        if !inside(&self.buf, self.at) {
            let rest = self.storage.size().saturating_sub(at).min(BUFFER);
            if rest < len {
                return Ok(None);
            }
            self.buf.resize(usize::try_from(rest).unwrap_or(0), 0);
            self.storage.read_at(&mut self.buf, at)?;
            self.at = at;
        }
        let from = usize::try_from(at - self.at).unwrap_or(usize::MAX);
        Ok(self.buf.get(from..).and_then(|b| b.first_chunk().copied()))
    }
}

//! The header of a qcow2 image, versions 2 and 3, as QEMU's "qcow2 image format" lays it out.
//!
//! [`Header`] is validated: its offsets are aligned, its tables lie within what the bounds below
//! allow, and it keeps whatever it does not know so that a rewrite changes nothing else.

use std::ffi::{OsStr, OsString};
use std::ops::Range;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::encryption::Encryption;
use super::entry::Layout;
use super::extension::{self, Extension};
use super::feature;
use crate::error::{Error, ErrorKind, Result};
use crate::image::be64;
use crate::image::codec::Compression;
use crate::image::open::Purpose;
use crate::storage::Storage;
use crate::storage::open::Access;
use crate::util::align::{clamp_len, is_aligned, len64};

/// First four bytes: `QFI` and 0xfb.
pub(super) const MAGIC: u32 = 0x5146_49fb;
/// Length of a version 2 header.
const LEN_V2: u32 = 72;
/// Length of the version 3 fields that every version 3 image has.
pub(super) const LEN_V3: usize = 104;
/// Smallest and largest cluster: 512 bytes and 2 MiB.
pub(super) const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Smallest cluster with extended entries: 16 KiB, so that a subcluster is at least a sector.
pub(super) const EXTENDED_MIN_BITS: u32 = 14;
/// Longest first-level table in bytes; 32 MiB, as QEMU has it.
pub(super) const MAX_L1_BYTES: u64 = 32 << 20;
/// Longest refcount table in bytes; 8 MiB, as QEMU has it.
pub(super) const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// Longest backing file name in bytes.
pub(super) const MAX_BACKING_NAME: u32 = 1023;
/// Longest name of a backing file's format in bytes, as QEMU has it.
const MAX_FORMAT_NAME: usize = 15;
/// Most internal snapshots, as QEMU has it.
pub(super) const MAX_SNAPSHOTS: u32 = 65_536;
/// Longest header with what may follow the known fields.
const MAX_HEADER_LEN: u32 = 4096;

/// What a header is read for, which says what of it must be right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// To say what it is, encrypted or not.
    Describe,
    /// To read the disk, which needs no refcounts.
    Read,
    /// To write to it, too.
    Write,
    /// To check it: what the checker can look at or make anew may be wrong.
    Check,
}

impl Need {
    /// What opening an image so needs.
    pub(super) fn of(purpose: Purpose, access: Access) -> Self {
        match (purpose, access) {
            (Purpose::Check, _) => Self::Check,
            (Purpose::Describe, _) => Self::Describe,
            (Purpose::Use, Access::Read) => Self::Read,
            (Purpose::Use, Access::Write) => Self::Write,
        }
    }
}

/// The fields on disk, all big-endian.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    /// 0: [`MAGIC`].
    magic: U32,
    /// 4: 2 or 3.
    version: U32,
    /// 8: offset of the backing file's name; 0: no backing file.
    backing_offset: U64,
    /// 16: its length in bytes.
    backing_len: U32,
    /// 20: log2 of the cluster size.
    cluster_bits: U32,
    /// 24: virtual size in bytes.
    size: U64,
    /// 32: 0 none, 1 AES, 2 LUKS.
    crypt_method: U32,
    /// 36: entries of the active first-level table.
    l1_len: U32,
    /// 40: its offset.
    l1_offset: U64,
    /// 48: offset of the refcount table.
    reftable_offset: U64,
    /// 56: its length in clusters.
    reftable_clusters: U32,
    /// 60: number of internal snapshots.
    snapshot_count: U32,
    /// 64: offset of the snapshot table.
    snapshots_offset: U64,
    /// 72: bits that a reader must understand.
    incompatible: U64,
    /// 80: bits that a reader may ignore.
    compatible: U64,
    /// 88: bits that a writer which does not know them clears.
    autoclear: U64,
    /// 96: log2 of the width of a refcount in bits.
    refcount_order: U32,
    /// 100: length of the header; where the extensions begin.
    header_len: U32,
}

const _: () = assert!(size_of::<Raw>() == LEN_V3);

/// A validated header.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Header {
    /// 2 or 3.
    pub(super) version: u32,
    /// log2 of the cluster size in bytes.
    pub(super) cluster_bits: u32,
    /// Virtual size in bytes.
    pub(super) size: u64,
    /// Entries of the active first-level table.
    pub(super) l1_len: u32,
    /// Its offset.
    pub(super) l1_offset: u64,
    /// Offset of the refcount table.
    pub(super) reftable_offset: u64,
    /// Its length in clusters.
    pub(super) reftable_clusters: u32,
    /// Number of internal snapshots.
    pub(super) snapshot_count: u32,
    /// Offset of the snapshot table.
    pub(super) snapshots_offset: u64,
    /// Bits that a reader must understand; 0 in version 2.
    pub(super) incompatible: u64,
    /// Bits that a reader may ignore; 0 in version 2.
    pub(super) compatible: u64,
    /// Bits that a writer which does not know them clears; 0 in version 2.
    pub(super) autoclear: u64,
    /// log2 of the width of a refcount in bits; 4 in version 2.
    pub(super) refcount_order: u32,
    /// How clusters are compressed.
    pub(super) compression: Compression,
    /// How guest data is encrypted.
    pub(super) encryption: Option<Encryption>,
    /// Name of the backing file: bytes, as the host has them.
    pub(super) backing_name: Option<OsString>,
    /// Where the header has a backing file's name of no bytes; 0: nowhere.
    pub(super) nameless_at: u64,
    /// Header bytes after the known fields, kept as they are.
    pub(super) rest: Vec<u8>,
    /// Extensions, in order, kept as they are.
    pub(super) extensions: Vec<Extension>,
    /// What is wrong with the end of their list.
    pub(super) list_fault: Option<String>,
}

impl Header {
    /// That of a new image of this version, whose disk has no bytes, without tables.
    pub(super) fn new(version: u32) -> Self {
        let mut header = Self {
            version,
            cluster_bits: 16,
            refcount_order: 4,
            ..Self::default()
        };
        if version >= 3 {
            header.rest = vec![0; 8];
            let names = Some(feature::name_table());
            extension::set(&mut header.extensions, extension::FEATURE_NAMES, names);
        }
        header
    }

    /// Reads and validates the header of `storage`, all of it.
    pub(super) fn read(storage: &dyn Storage) -> Result<Self> {
        Self::read_for(storage, Need::Write)
    }

    /// As `read`; what is not needed may be wrong.
    pub(super) fn read_for(storage: &dyn Storage, need: Need) -> Result<Self> {
        let mut bytes = [0; LEN_V3];
        storage.read_at(&mut bytes, 0)?;
        let raw =
            Raw::read_from_bytes(&bytes).map_err(|_| Error::corrupt("the header is too short"))?;
        let mut header = Self::from_raw(&raw)?;
        let header_len = header.read_rest(storage, &raw)?;
        if storage.size() < u64::from(header_len) {
            return Err(Error::corrupt(format!(
                "the header has {header_len} bytes (the file ends at {:#x})",
                storage.size()
            )));
        }
        let end = match raw.backing_offset.get() {
            0 => header.cluster_size(),
            offset => offset.min(header.cluster_size()),
        };
        let list = u64::from(header_len)..end;
        (header.extensions, header.list_fault) = extension::read(storage, list)?;
        let names = extension::data(&header.extensions, extension::FEATURE_NAMES);
        feature::check_incompatible(header.incompatible, names.unwrap_or_default())?;
        header.backing_name = read_backing_name(storage, &raw, header.cluster_size())?;
        if raw.backing_len.get() == 0 {
            header.nameless_at = raw.backing_offset.get();
        }
        header.check(need)?;
        header.encryption = Encryption::of(raw.crypt_method.get())?;
        match header.encryption {
            Some(encryption) if need != Need::Describe => Err(encryption.refusal()),
            _ => Ok(header),
        }
    }

    fn from_raw(raw: &Raw) -> Result<Self> {
        if raw.magic.get() != MAGIC {
            let text = format!(
                "is not a qcow2 image (magic {:#010x}, allowed {MAGIC:#010x})",
                raw.magic
            );
            return Err(Error::new(ErrorKind::WrongFormat, text));
        }
        let version = raw.version.get();
        if version != 2 && version != 3 {
            let text = format!("qcow2 version {version} is not supported (allowed: 2, 3)");
            return Err(Error::unsupported(text));
        }
        let cluster_bits = raw.cluster_bits.get();
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return Err(Error::corrupt(format!(
                "the header's cluster_bits are {cluster_bits} (allowed: 9 to 21)"
            )));
        }
        let mut header = Self {
            cluster_bits,
            size: raw.size.get(),
            l1_len: raw.l1_len.get(),
            l1_offset: raw.l1_offset.get(),
            reftable_offset: raw.reftable_offset.get(),
            reftable_clusters: raw.reftable_clusters.get(),
            snapshot_count: raw.snapshot_count.get(),
            snapshots_offset: raw.snapshots_offset.get(),
            ..Self::new(version)
        };
        if version == 3 {
            header.incompatible = raw.incompatible.get();
            header.compatible = raw.compatible.get();
            header.autoclear = raw.autoclear.get();
            header.refcount_order = raw.refcount_order.get();
        }
        Ok(header)
    }

    /// Reads what follows the known fields; returns the header's length.
    fn read_rest(&mut self, storage: &dyn Storage, raw: &Raw) -> Result<u32> {
        if self.version == 2 {
            return Ok(LEN_V2);
        }
        let len = raw.header_len.get();
        let max = MAX_HEADER_LEN.min(1 << self.cluster_bits);
        if !(104..=max).contains(&len) {
            return Err(Error::corrupt(format!(
                "the header's header_length is {len} (allowed: 104 to {max})"
            )));
        }
        self.rest = be64::read_bytes(storage, len64(LEN_V3)..u64::from(len))?;
        self.compression = match self.rest.first().copied().unwrap_or(0) {
            0 => Compression::Zlib,
            1 => Compression::Zstd,
            other => {
                let text =
                    format!("compression type {other} is not supported (allowed: 0 zlib, 1 zstd)");
                return Err(Error::unsupported(text));
            }
        };
        let flagged = self.incompatible & feature::COMPRESSION != 0;
        if flagged != (self.compression != Compression::Zlib) {
            return Err(Error::corrupt(format!(
                "the header's compression type is {:?}, but its incompatible bits {:#x} say otherwise",
                self.compression, self.incompatible
            )));
        }
        Ok(len)
    }

    fn check(&self, need: Need) -> Result<()> {
        if self.refcount_order > 6 {
            return Err(Error::corrupt(format!(
                "the header's refcount_order is {} (allowed: 0 to 6)",
                self.refcount_order
            )));
        }
        if self.extended_l2() && self.cluster_bits < EXTENDED_MIN_BITS {
            return Err(Error::corrupt(format!(
                "the header's cluster_bits are {} with extended L2 entries (allowed: 14 to 21)",
                self.cluster_bits
            )));
        }
        self.check_first_level()?;
        if need == Need::Write {
            self.check_refcount_table()?;
        }
        match need {
            Need::Describe | Need::Read | Need::Write => self.check_snapshot_table(),
            Need::Check => Ok(()),
        }
    }

    fn check_first_level(&self) -> Result<()> {
        let l1_bytes = u64::from(self.l1_len) * 8;
        if l1_bytes > MAX_L1_BYTES {
            return Err(Error::corrupt(format!(
                "the L1 table has {} entries (allowed: {})",
                self.l1_len,
                MAX_L1_BYTES / 8
            )));
        }
        if u64::from(self.l1_len) < self.l1_needed(self.size) {
            return Err(Error::corrupt(format!(
                "the L1 table has {} entries, a disk of {} bytes needs {}",
                self.l1_len,
                self.size,
                self.l1_needed(self.size)
            )));
        }
        self.check_table_place("L1 table", self.l1_offset, l1_bytes)
    }

    fn check_refcount_table(&self) -> Result<()> {
        let reftable = u64::from(self.reftable_clusters) << self.cluster_bits;
        if reftable == 0 || reftable > MAX_REFTABLE_BYTES.max(self.cluster_size()) {
            return Err(Error::corrupt(format!(
                "the refcount table has {reftable} bytes (allowed: 1 to {MAX_REFTABLE_BYTES})"
            )));
        }
        self.check_table_place("refcount table", self.reftable_offset, reftable)
    }

    fn check_snapshot_table(&self) -> Result<()> {
        if self.snapshot_count > MAX_SNAPSHOTS {
            return Err(Error::corrupt(format!(
                "the header counts {} snapshots (allowed: {MAX_SNAPSHOTS})",
                self.snapshot_count
            )));
        }
        let snapshots = u64::from(self.snapshot_count != 0);
        self.check_table_place("snapshot table", self.snapshots_offset, snapshots)
    }

    /// Refuses a table of `len` bytes that lies where none can be.
    pub(super) fn check_table_place(&self, name: &str, offset: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let fits = offset
            .checked_add(len)
            .is_some_and(|end| i64::try_from(end).is_ok());
        if !is_aligned(offset, self.cluster_size()) || offset == 0 || !fits {
            return Err(Error::corrupt(format!(
                "the {name} is at {offset:#x} (allowed: a non-zero multiple of the cluster size {:#x})",
                self.cluster_size()
            )));
        }
        Ok(())
    }

    /// What is wrong with it, though it keeps nobody from reading the disk.
    pub(super) fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.data_file_is_raw() && !self.has_data_file() {
            faults.push(
                "the header says that the data file is raw (autoclear bit 1), but there is none"
                    .to_owned(),
            );
        }
        if self.nameless_at != 0 {
            faults.push(format!(
                "the backing file's name is at {:#x} and has no bytes (expected: at 0, or some)",
                self.nameless_at
            ));
        }
        if let Some(name) = extension::data(&self.extensions, extension::BACKING_FORMAT)
            && name.len() > MAX_FORMAT_NAME
        {
            faults.push(format!(
                "the name of the backing file's format has {} bytes (allowed: {MAX_FORMAT_NAME})",
                name.len()
            ));
        }
        faults.extend(self.list_fault.clone());
        for (what, len, at) in self.tables_to_be() {
            if len == 0 && !self.is_place(at) {
                faults.push(format!(
                    "the {what} of no entries is at {at:#x} (allowed: multiples of the cluster size {:#x})",
                    self.cluster_size()
                ));
            }
        }
        faults
    }

    /// What is wrong where the header does not name the external data file: nobody opens it then,
    /// and a change that gives it a name is taken.
    pub(super) fn unnamed_data_file(&self) -> Option<String> {
        let missing = self.has_data_file() && self.data_file_name().is_none();
        missing.then(|| "the image has an external data file, but does not name it".to_owned())
    }

    /// Tables that an image need not have: name, entries, offset.
    fn tables_to_be(&self) -> [(&'static str, u32, u64); 2] {
        [
            ("L1 table", self.l1_len, self.l1_offset),
            ("snapshot table", self.snapshot_count, self.snapshots_offset),
        ]
    }

    /// Whether a table could be at an offset.
    fn is_place(&self, at: u64) -> bool {
        is_aligned(at, self.cluster_size()) && i64::try_from(at).is_ok()
    }

    /// The same without what [`Header::faults`] finds, as far as that can be taken away.
    pub(super) fn without_faults(mut self) -> Self {
        if !self.has_data_file() {
            self.autoclear &= !feature::DATA_FILE_RAW;
        }
        self.nameless_at = 0;
        self.list_fault = None;
        let [l1, snapshots] = self
            .tables_to_be()
            .map(|(_, len, at)| len == 0 && !self.is_place(at));
        if l1 {
            self.l1_offset = 0;
        }
        if snapshots {
            self.snapshots_offset = 0;
        }
        self
    }

    /// Length of the fields, known and unknown; where the extensions begin.
    pub(super) fn len(&self) -> u64 {
        match self.version {
            2 => u64::from(LEN_V2),
            _ => len64(LEN_V3 + self.rest.len()),
        }
    }

    /// The fields as they are on disk, with a backing file's name of `name_len` bytes at
    /// `name_at`.
    pub(super) fn encode(&self, name_at: u64, name_len: u64) -> Vec<u8> {
        let raw = Raw {
            magic: U32::new(MAGIC),
            version: U32::new(self.version),
            backing_offset: U64::new(name_at),
            backing_len: U32::new(u32::try_from(name_len).unwrap_or(0)),
            cluster_bits: U32::new(self.cluster_bits),
            size: U64::new(self.size),
            crypt_method: U32::ZERO,
            l1_len: U32::new(self.l1_len),
            l1_offset: U64::new(self.l1_offset),
            reftable_offset: U64::new(self.reftable_offset),
            reftable_clusters: U32::new(self.reftable_clusters),
            snapshot_count: U32::new(self.snapshot_count),
            snapshots_offset: U64::new(self.snapshots_offset),
            incompatible: U64::new(self.incompatible),
            compatible: U64::new(self.compatible),
            autoclear: U64::new(self.autoclear),
            refcount_order: U32::new(self.refcount_order),
            header_len: U32::new(u32::try_from(self.len()).unwrap_or(0)),
        };
        let mut bytes = raw.as_bytes().to_vec();
        bytes.extend(&self.rest);
        bytes.truncate(clamp_len(self.len(), usize::MAX));
        bytes
    }

    /// Whether the external data file can be read as a raw image.
    pub(super) fn data_file_is_raw(&self) -> bool {
        self.autoclear & feature::DATA_FILE_RAW != 0
    }

    /// Names another backing file and its format, or none.
    pub(super) fn set_backing(&mut self, name: Option<&OsStr>, format: Option<&str>) {
        self.backing_name = name.map(OsStr::to_owned);
        let format = format.map(|f| f.as_bytes().to_vec());
        extension::set(&mut self.extensions, extension::BACKING_FORMAT, format);
    }

    /// Cluster size in bytes.
    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Whether guest data is in an external data file.
    pub(super) fn has_data_file(&self) -> bool {
        self.incompatible & feature::DATA_FILE != 0
    }

    /// The largest disk that a first-level table can cover.
    pub(super) fn most_size(&self) -> u64 {
        (MAX_L1_BYTES / 8).saturating_mul(1 << (self.cluster_bits + self.l2_bits()))
    }

    /// The bytes of the active first-level table.
    pub(super) fn l1(&self) -> Range<u64> {
        let len = u64::from(self.l1_len) * 8;
        self.l1_offset..self.l1_offset.saturating_add(len)
    }

    /// What decides how entries of tables are read.
    pub(super) fn layout(&self) -> Layout {
        Layout {
            cluster_bits: self.cluster_bits,
            extended: self.extended_l2(),
            version: self.version,
        }
    }

    /// Whether entries of second-level tables have two words.
    pub(super) fn extended_l2(&self) -> bool {
        self.incompatible & feature::EXTENDED_L2 != 0
    }

    /// log2 of the number of entries in a second-level table.
    pub(super) fn l2_bits(&self) -> u32 {
        self.cluster_bits - if self.extended_l2() { 4 } else { 3 }
    }

    /// First-level entries that a disk of `size` bytes needs.
    pub(super) fn l1_needed(&self, size: u64) -> u64 {
        size.div_ceil(1 << (self.cluster_bits + self.l2_bits()))
    }

    /// The backing file's format, where it is recorded.
    pub(super) fn backing_format(&self) -> Option<String> {
        let name = extension::data(&self.extensions, extension::BACKING_FORMAT)?;
        // No format has such a name; it is looked up and shown, and never goes to the host.
        Some(String::from_utf8_lossy(name).into_owned())
    }

    /// Name of the external data file, where it is recorded.
    pub(super) fn data_file_name(&self) -> Option<OsString> {
        let name = extension::data(&self.extensions, extension::DATA_FILE_NAME)?;
        Some(OsStr::from_bytes(name).to_owned())
    }
}

fn read_backing_name(storage: &dyn Storage, raw: &Raw, cluster: u64) -> Result<Option<OsString>> {
    let (offset, len) = (raw.backing_offset.get(), raw.backing_len.get());
    if offset == 0 || len == 0 {
        return Ok(None);
    }
    if len > MAX_BACKING_NAME {
        return Err(Error::corrupt(format!(
            "the backing file's name has {len} bytes (allowed: {MAX_BACKING_NAME})"
        )));
    }
    if offset
        .checked_add(u64::from(len))
        .is_none_or(|end| end > cluster)
    {
        return Err(Error::corrupt(format!(
            "the backing file's name is at {offset:#x}, {len} bytes long (allowed: within the first cluster of {cluster:#x})"
        )));
    }
    let name = be64::read_bytes(storage, offset..offset + u64::from(len))?;
    Ok(Some(OsString::from_vec(name)))
}

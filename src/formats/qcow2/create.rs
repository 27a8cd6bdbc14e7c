//! New images: header, refcounts, an empty first-level table.

use std::ffi::OsStr;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;

use super::extension;
use super::feature;
use super::header::{MAGIC, MAX_BACKING_NAME, MAX_L1_BYTES, MAX_REFTABLE_BYTES};
use super::preallocate;
use super::refblock::Width;
use crate::error::{Error, ErrorKind, Result};
use crate::image::codec::Compression;
use crate::image::create::{CreateOptions, Preallocation};
use crate::image::options::{OptionKind, OptionSpec};
use crate::storage::{Storage, start_over};
use crate::util::align::{clamp_len, len64};

/// The `-o` options.
pub(super) const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "compat",
        kind: OptionKind::Choice(&["0.10", "v2", "1.1", "v3"]),
        default: "1.1",
        help: "version: 0.10 (v2) or 1.1 (v3)",
    },
    OptionSpec {
        name: "cluster_size",
        kind: OptionKind::Size,
        default: "64k",
        help: "unit of allocation: a power of two from 512 to 2M",
    },
    OptionSpec {
        name: "refcount_bits",
        kind: OptionKind::Number,
        default: "16",
        help: "width of a reference count: 1, 2, 4, 8, 16, 32 or 64",
    },
    OptionSpec {
        name: "lazy_refcounts",
        kind: OptionKind::Bool,
        default: "off",
        help: "let QEMU put off refcount updates",
    },
    OptionSpec {
        name: "extended_l2",
        kind: OptionKind::Bool,
        default: "off",
        help: "allocation bits for 32 subclusters in each cluster",
    },
    OptionSpec {
        name: "compression_type",
        kind: OptionKind::Choice(&["zlib", "zstd"]),
        default: "zlib",
        help: "how clusters are compressed",
    },
    OptionSpec {
        name: "data_file",
        kind: OptionKind::File,
        default: "",
        help: "keep guest data in this file, which is made too; relative to the image's directory",
    },
    OptionSpec {
        name: "data_file_raw",
        kind: OptionKind::Bool,
        default: "off",
        help: "keep the data file readable as a raw image",
    },
    OptionSpec {
        name: "preallocation",
        kind: OptionKind::Choice(&Preallocation::WORDS),
        default: "off",
        help: "how much space is allocated at once: tables (metadata), and data (falloc, full)",
    },
];

/// What is to be made, checked.
#[derive(Debug)]
pub(super) struct Plan {
    version: u32,
    pub(super) cluster_bits: u32,
    pub(super) refcount_order: u32,
    pub(super) incompatible: u64,
    compatible: u64,
    autoclear: u64,
    compression: u8,
    /// Virtual size in bytes.
    pub(super) size: u64,
    /// Entries of the first-level table.
    pub(super) l1_len: u64,
    /// What is allocated at once.
    pub(super) preallocation: Preallocation,
}

impl Plan {
    pub(super) fn new(options: &CreateOptions) -> Result<Self> {
        let extended = options.values.bool("extended_l2") == Some(true);
        check_together(options, extended)?;
        Self::unchecked(options)
    }

    /// As `new`, where it does not matter that files and options may not go together.
    pub(super) fn unchecked(options: &CreateOptions) -> Result<Self> {
        let values = &options.values;
        let version = match values.text("compat") {
            Some("0.10" | "v2") => 2,
            _ => 3,
        };
        let extended = values.bool("extended_l2") == Some(true);
        let lazy = values.bool("lazy_refcounts") == Some(true);
        let zstd = values.text("compression_type") == Some("zstd");
        let external = values.name("data_file").is_some();
        let raw = values.bool("data_file_raw") == Some(true);
        let cluster_bits = cluster_bits(options)?;
        let refcount_order = refcount_order(values.number("refcount_bits").unwrap_or(16))?;
        if version == 2 && (extended || lazy || zstd || external || refcount_order != 4) {
            return Err(Error::invalid(
                "extended_l2, lazy_refcounts, zstd, data_file and refcount_bits other than 16 need compat=1.1",
            ));
        }
        if extended && cluster_bits < super::header::EXTENDED_MIN_BITS {
            return Err(Error::invalid(format!(
                "cluster_size is {} with extended_l2 (allowed: 16k to 2M)",
                1u64 << cluster_bits
            )));
        }
        let l2_bits = cluster_bits - if extended { 4 } else { 3 };
        let size = options
            .size
            .checked_next_multiple_of(512)
            .unwrap_or(u64::MAX);
        let l1_len = size.div_ceil(1 << (cluster_bits + l2_bits));
        if l1_len * 8 > MAX_L1_BYTES {
            let most = (MAX_L1_BYTES / 8) << (cluster_bits + l2_bits);
            return Err(Error::new(
                ErrorKind::OutOfRange,
                format!(
                    "the size is {size} (allowed: {most} with clusters of {})",
                    1u64 << cluster_bits
                ),
            ));
        }
        let bit = |on: bool, bit: u64| if on { bit } else { 0 };
        Ok(Self {
            version,
            cluster_bits,
            refcount_order,
            incompatible: bit(extended, feature::EXTENDED_L2)
                | bit(zstd, feature::COMPRESSION)
                | bit(external, feature::DATA_FILE),
            compatible: bit(lazy, feature::LAZY_REFCOUNTS),
            autoclear: bit(raw, feature::DATA_FILE_RAW),
            compression: u8::from(zstd),
            size,
            l1_len,
            preallocation: match options.preallocation() {
                // The data file is to be the disk, so every cluster must lead there.
                Preallocation::Off if raw => Preallocation::Metadata,
                asked => asked,
            },
        })
    }

    /// Bytes of a cluster.
    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries of second-level tables have two words.
    pub(super) fn extended(&self) -> bool {
        self.incompatible & feature::EXTENDED_L2 != 0
    }

    /// How clusters are compressed.
    pub(super) fn compression(&self) -> Compression {
        match self.compression {
            0 => Compression::Zlib,
            _ => Compression::Zstd,
        }
    }

    /// 2 or 3.
    pub(super) fn version(&self) -> u32 {
        self.version
    }

    /// Guest data is in another file.
    pub(super) fn external(&self) -> bool {
        self.incompatible & feature::DATA_FILE != 0
    }

    /// It can have bitmaps.
    pub(super) fn has_bitmaps(&self) -> bool {
        self.version >= 3
    }

    /// Clusters of the disk.
    pub(super) fn clusters(&self) -> u64 {
        self.size.div_ceil(self.cluster_size())
    }

    /// Clusters that are allocated at once: of second-level tables, and of data in the image.
    fn preallocated(&self) -> (u64, u64) {
        if self.preallocation == Preallocation::Off {
            return (0, 0);
        }
        let data = if self.external() { 0 } else { self.clusters() };
        (self.l1_len, data)
    }

    /// Where things are, in clusters.
    fn layout(&self) -> Layout {
        let size = self.cluster_size();
        let l1 = (self.l1_len * 8).div_ceil(size);
        let per_block = 1u64 << Width::new(self.refcount_order).block_bits(self.cluster_bits);
        let (l2, data) = self.preallocated();
        let mut blocks = 1u64;
        loop {
            let table = (blocks * 8).div_ceil(size);
            let all = 1 + table + blocks + l1 + l2 + data;
            if blocks * per_block >= all {
                let table = 1..1 + table;
                let blocks = table.end..table.end + blocks;
                let l1 = blocks.end..blocks.end + l1;
                let l2 = l1.end..l1.end + l2;
                return Layout {
                    data: l2.end..l2.end + data,
                    l2,
                    l1,
                    table,
                    blocks,
                };
            }
            blocks = blocks.max((all - blocks).div_ceil(per_block)) + 1;
        }
    }
}

/// Where things are, in clusters.
#[derive(Debug)]
pub(super) struct Layout {
    table: Range<u64>,
    blocks: Range<u64>,
    /// The first-level table.
    pub(super) l1: Range<u64>,
    /// The second-level tables.
    pub(super) l2: Range<u64>,
    /// Guest data.
    pub(super) data: Range<u64>,
}

/// Refuses options that contradict each other.
fn check_together(options: &CreateOptions, extended: bool) -> Result<()> {
    let values = &options.values;
    let external = values.name("data_file").is_some();
    let raw = values.bool("data_file_raw") == Some(true);
    if external && options.files.is_empty() {
        return Err(Error::unsupported(
            "an image with data_file is not made here (allowed: create, convert)",
        ));
    }
    if raw && !external {
        return Err(Error::invalid("data_file_raw=on needs data_file"));
    }
    if options.backing.is_none() {
        return Ok(());
    }
    if raw {
        return Err(Error::invalid(
            "data_file_raw=on and a backing file exclude each other",
        ));
    }
    if options.preallocation() != Preallocation::Off && !extended {
        return Err(Error::invalid(
            "preallocation and a backing file need extended_l2=on",
        ));
    }
    Ok(())
}

/// log2 of the cluster size asked for.
fn cluster_bits(options: &CreateOptions) -> Result<u32> {
    let size = options.values.number("cluster_size").unwrap_or(64 << 10);
    if !size.is_power_of_two() || !(512..=2 << 20).contains(&size) {
        return Err(Error::invalid(format!(
            "cluster_size is {size} (allowed: a power of two from 512 to 2M)"
        )));
    }
    Ok(size.trailing_zeros())
}

fn refcount_order(bits: u64) -> Result<u32> {
    if !bits.is_power_of_two() || bits > 64 {
        return Err(Error::invalid(format!(
            "refcount_bits is {bits} (allowed: 1, 2, 4, 8, 16, 32, 64)"
        )));
    }
    Ok(bits.trailing_zeros())
}

/// Bytes of a cluster with these options.
pub(super) fn cluster_size(options: &CreateOptions) -> Result<u64> {
    cluster_bits(options).map(|bits| 1 << bits)
}

/// Formats an empty object.
pub(super) fn create(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    let plan = Plan::new(options)?;
    let layout = plan.layout();
    let size = plan.cluster_size();
    if layout.table.end - layout.table.start > MAX_REFTABLE_BYTES.div_ceil(size) {
        return Err(Error::new(
            ErrorKind::OutOfRange,
            "the refcount table would be too long",
        ));
    }
    let header = header(&plan, layout.l1.start, &layout.table, options)?;
    start_over(storage, layout.data.end * size)?;
    write_refcounts(storage, &plan, &layout)?;
    let data = options.files.first().map_or(storage, |file| &**file);
    preallocate::preallocate(storage, data, &plan, &layout)?;
    // Last, so that a file cut short on the way is no image.
    storage.write_at(&header, 0)
}

fn write_refcounts(storage: &dyn Storage, plan: &Plan, layout: &Layout) -> Result<()> {
    let (size, width) = (plan.cluster_size(), Width::new(plan.refcount_order));
    let per_block = 1u64 << width.block_bits(plan.cluster_bits);
    let mut table = Vec::new();
    for (index, cluster) in layout.blocks.clone().enumerate() {
        let mut block = vec![0; clamp_len(size, usize::MAX)];
        let used = layout
            .data
            .end
            .saturating_sub(len64(index) * per_block)
            .min(per_block);
        (0..clamp_len(used, usize::MAX)).for_each(|i| width.set(&mut block, i, 1));
        storage.write_at(&block, cluster * size)?;
        table.extend((cluster * size).to_be_bytes());
    }
    storage.write_at(&table, layout.table.start * size)
}

/// The first cluster's bytes: fields, extensions, backing name.  `l1` is the first cluster of the
/// first-level table, `reftable` those of the refcount table.
pub(super) fn header(
    plan: &Plan,
    l1: u64,
    reftable: &Range<u64>,
    options: &CreateOptions,
) -> Result<Vec<u8>> {
    let size = plan.cluster_size();
    let mut tail = Vec::new();
    if let Some(backing) = &options.backing {
        push_extension(
            &mut tail,
            extension::BACKING_FORMAT,
            super::relink::recorded_format(backing.format).as_bytes(),
        );
    }
    if let Some(name) = options.values.name("data_file") {
        push_extension(&mut tail, extension::DATA_FILE_NAME, name.as_bytes());
    }
    if plan.version >= 3 {
        push_extension(&mut tail, extension::FEATURE_NAMES, &feature::name_table());
    }
    tail.extend([0; 8]);
    let header_len = if plan.version == 2 { 72 } else { 112 };
    let name = options.backing.as_ref();
    let name = name.map_or(OsStr::new(""), |b| &b.name);
    let name_at = header_len + len64(tail.len());
    if len64(name.len()) > u64::from(MAX_BACKING_NAME) || name_at + len64(name.len()) > size {
        let most = u64::from(MAX_BACKING_NAME).min(size.saturating_sub(name_at));
        return Err(Error::invalid(format!(
            "the backing file's name has {} bytes (allowed: {most})",
            name.len()
        )));
    }
    let mut bytes = Vec::new();
    let push32 = |bytes: &mut Vec<u8>, value: u32| bytes.extend(value.to_be_bytes());
    push32(&mut bytes, MAGIC);
    push32(&mut bytes, plan.version);
    bytes.extend(if name.is_empty() { 0 } else { name_at }.to_be_bytes());
    push32(&mut bytes, u32::try_from(name.len()).unwrap_or(0));
    push32(&mut bytes, plan.cluster_bits);
    bytes.extend(plan.size.to_be_bytes());
    push32(&mut bytes, 0);
    push32(&mut bytes, u32::try_from(plan.l1_len).unwrap_or(0));
    // A disk of no bytes has no table, and nothing is counted for it.
    let l1 = if plan.l1_len == 0 { 0 } else { l1 };
    bytes.extend((l1 * size).to_be_bytes());
    bytes.extend((reftable.start * size).to_be_bytes());
    push32(
        &mut bytes,
        u32::try_from(reftable.end - reftable.start).unwrap_or(0),
    );
    push32(&mut bytes, 0);
    bytes.extend(0u64.to_be_bytes());
    if plan.version >= 3 {
        for bits in [plan.incompatible, plan.compatible, plan.autoclear] {
            bytes.extend(bits.to_be_bytes());
        }
        push32(&mut bytes, plan.refcount_order);
        push32(&mut bytes, 112);
        bytes.extend([plan.compression, 0, 0, 0, 0, 0, 0, 0]);
    }
    bytes.extend(tail);
    bytes.extend(name.as_bytes());
    Ok(bytes)
}

fn push_extension(bytes: &mut Vec<u8>, kind: u32, data: &[u8]) {
    bytes.extend(kind.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap_or(0).to_be_bytes());
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
}

//! New images: header, refcounts, a first-level table; tables that lead to every cluster, and the
//! space for them, where that is asked for.  How long the file gets: as qemu-img counts it, to the
//! byte.

use std::ops::Range;
use std::os::unix::ffi::OsStrExt;

use super::bitmap_dir::entry_len;
use super::entry::COPIED;
use super::extension;
use super::feature;
use super::header::{Header, MAX_BACKING_NAME, MAX_L1_BYTES, MAX_REFTABLE_BYTES};
use super::refblock::Place;
use super::switch::{Name, encode, list_end};
use crate::error::{Error, ErrorKind, Result};
use crate::image::be64;
use crate::image::bitmap::Bitmap;
use crate::image::codec::Compression;
use crate::image::create::{CreateOptions, Preallocation};
use crate::image::options::{OptionKind, OptionSpec};
use crate::storage::{Storage, fill_space, give_space, start_over};
use crate::util::align::{clamp_len, len64};
use crate::util::range;

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
    /// The header to be; where tables are is for later.
    pub(super) header: Header,
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
        let data_file = values
            .name("data_file")
            .map(|name| name.as_bytes().to_vec());
        let raw = values.bool("data_file_raw") == Some(true);
        let cluster_bits = cluster_bits(options)?;
        let refcount_order = refcount_order(values.number("refcount_bits").unwrap_or(16))?;
        let external = data_file.is_some();
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
        let bit = |on: bool, bit: u64| if on { bit } else { 0 };
        let size = options.size.checked_next_multiple_of(512);
        let mut header = Header {
            cluster_bits,
            size: size.unwrap_or(u64::MAX),
            incompatible: bit(extended, feature::EXTENDED_L2)
                | bit(zstd, feature::COMPRESSION)
                | bit(external, feature::DATA_FILE),
            compatible: bit(lazy, feature::LAZY_REFCOUNTS),
            autoclear: bit(raw, feature::DATA_FILE_RAW),
            refcount_order,
            ..Header::new(version)
        };
        if zstd {
            header.compression = Compression::Zstd;
            header.rest[0] = 1;
        }
        extension::set(&mut header.extensions, extension::DATA_FILE_NAME, data_file);
        if let Some(backing) = &options.backing {
            let format = super::relink::recorded_format(backing.format);
            header.set_backing(Some(&backing.name), Some(format));
        }
        let l1_len = header.l1_needed(header.size);
        if l1_len * 8 > MAX_L1_BYTES {
            let text = format!(
                "the size is {} (allowed: {} with clusters of {})",
                header.size,
                header.most_size(),
                header.cluster_size()
            );
            return Err(Error::new(ErrorKind::OutOfRange, text));
        }
        header.l1_len = u32::try_from(l1_len).unwrap_or(u32::MAX);
        Ok(Self {
            header,
            preallocation: match options.preallocation() {
                // The data file is to be the disk, so every cluster must lead there.
                Preallocation::Off if raw => Preallocation::Metadata,
                asked => asked,
            },
        })
    }

    /// Bytes of a cluster.
    pub(super) fn cluster_size(&self) -> u64 {
        self.header.cluster_size()
    }

    /// Clusters of the disk.
    pub(super) fn clusters(&self) -> u64 {
        self.header.size.div_ceil(self.cluster_size())
    }

    /// Clusters of the first-level table.
    pub(super) fn l1_clusters(&self) -> u64 {
        range::len(&self.header.l1()).div_ceil(self.cluster_size())
    }

    /// Clusters of the refcount table and of the refcount blocks that count `clusters` and
    /// themselves.
    pub(super) fn refcounts(&self, clusters: u64) -> (u64, u64) {
        let per_block = 1u64 << Place::of(&self.header).block_bits();
        let (mut table, mut blocks) = (1, 1);
        loop {
            let next = (clusters + blocks + table).div_ceil(per_block);
            let next_table = (next * 8).div_ceil(self.cluster_size());
            if (next_table, next) == (table, blocks) {
                return (table, blocks);
            }
            (table, blocks) = (next_table, next);
        }
    }

    /// Clusters that are allocated at once: of second-level tables, and of data in the image.
    fn preallocated(&self) -> (u64, u64) {
        if self.preallocation == Preallocation::Off {
            return (0, 0);
        }
        let data = match self.header.has_data_file() {
            true => 0,
            false => self.clusters(),
        };
        (u64::from(self.header.l1_len), data)
    }

    /// Where things are, in clusters.
    fn layout(&self) -> Layout {
        let (l2, data) = self.preallocated();
        let l1 = self.l1_clusters();
        let (table, blocks) = self.refcounts(1 + l1 + l2 + data);
        let table = 1..1 + table;
        let blocks = table.end..table.end + blocks;
        let l1 = blocks.end..blocks.end + l1;
        let l2 = l1.end..l1.end + l2;
        Layout {
            data: l2.end..l2.end + data,
            l2,
            l1,
            table,
            blocks,
        }
    }
}

/// Where things are, in clusters.
#[derive(Debug)]
struct Layout {
    table: Range<u64>,
    blocks: Range<u64>,
    /// The first-level table.
    l1: Range<u64>,
    /// The second-level tables.
    l2: Range<u64>,
    /// Guest data.
    data: Range<u64>,
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

/// log2 of a refcount's bits.
pub(super) fn refcount_order(bits: u64) -> Result<u32> {
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
    let header = header(&plan, layout.l1.start, &layout.table)?;
    start_over(storage, layout.data.end * size)?;
    write_refcounts(storage, &plan, &layout)?;
    let data = options.files.first().map_or(storage, |file| &**file);
    preallocate(storage, data, &plan, &layout)?;
    // Last, so that a file cut short on the way is no image.
    storage.write_at(&header, 0)
}

fn write_refcounts(storage: &dyn Storage, plan: &Plan, layout: &Layout) -> Result<()> {
    let (size, place) = (plan.cluster_size(), Place::of(&plan.header));
    let per_block = 1u64 << place.block_bits();
    let mut left = layout.data.end;
    for cluster in layout.blocks.clone() {
        let used = left.min(per_block);
        left -= used;
        storage.write_at(&place.width.ones(size, 0..used), cluster * size)?;
    }
    let table = be64::bytes(layout.blocks.clone().map(|cluster| cluster * size));
    storage.write_at(&table, layout.table.start * size)
}

/// The first cluster's bytes: fields, extensions, backing name.  `l1` is the first cluster of the
/// first-level table, `reftable` those of the refcount table.
pub(super) fn header(plan: &Plan, l1: u64, reftable: &Range<u64>) -> Result<Vec<u8>> {
    let size = plan.cluster_size();
    let mut header = plan.header.clone();
    // A disk of no bytes has no table, and nothing is counted for it.
    header.l1_offset = if header.l1_len == 0 { 0 } else { l1 * size };
    header.reftable_offset = reftable.start * size;
    header.reftable_clusters = u32::try_from(range::len(reftable)).unwrap_or(u32::MAX);
    let at = list_end(&header, |_| true);
    let len = len64(header.backing_name.as_ref().map_or(0, |name| name.len()));
    let most = u64::from(MAX_BACKING_NAME).min(size.saturating_sub(at));
    if len > most || at > size {
        return Err(Error::invalid(format!(
            "the backing file's name has {len} bytes (allowed: {most})"
        )));
    }
    let name = Name { at, len };
    Ok(encode(&header, name.or_none(), |_| true))
}

/// Writes the tables of a preallocated disk to `storage`, and gives its clusters space in `data`.
fn preallocate(
    storage: &dyn Storage,
    data: &dyn Storage,
    plan: &Plan,
    layout: &Layout,
) -> Result<()> {
    if plan.preallocation == Preallocation::Off {
        return Ok(());
    }
    let size = plan.cluster_size();
    let host = match plan.header.has_data_file() {
        true => 0..plan.header.size,
        false => layout.data.start * size..layout.data.end * size,
    };
    write_tables(storage, plan, layout, host.start)?;
    if plan.header.has_data_file() {
        data.set_len(plan.header.size)?;
    }
    match plan.preallocation {
        Preallocation::Off | Preallocation::Metadata => Ok(()),
        Preallocation::Falloc => give_space(data, host),
        Preallocation::Full => fill_space(data, host),
    }
}

/// Both table levels; cluster 0 of the disk is at `first`.
fn write_tables(storage: &dyn Storage, plan: &Plan, layout: &Layout, first: u64) -> Result<()> {
    let size = plan.cluster_size();
    let mut l1: Vec<u64> = Vec::new();
    let per_table = size / plan.header.layout().entry_len();
    for (index, cluster) in layout.l2.clone().enumerate() {
        let host = cluster * size;
        l1.push(host | COPIED);
        let start = index as u64 * per_table;
        let mut table = Vec::with_capacity(clamp_len(size, usize::MAX));
        for guest in start..(start + per_table).min(plan.clusters()) {
            table.extend(((first + guest * size) | COPIED).to_be_bytes());
            if plan.header.extended_l2() {
                // Space, but no subcluster in use: each reads as zeroes or as the layer below.
                table.extend([0; 8]);
            }
        }
        storage.write_at(&table, host)?;
    }
    storage.write_at(&be64::bytes(l1), layout.l1.start * size)
}

/// Length of the file with `data_clusters` clusters of data.  All tables are counted as if the
/// disk were full, so a sparse disk takes less.
pub(super) fn measure(options: &CreateOptions, data_clusters: u64) -> Result<u64> {
    let plan = Plan::unchecked(options)?;
    let (size, clusters) = (plan.cluster_size(), plan.clusters());
    let data = match plan.preallocation {
        Preallocation::Off | Preallocation::Metadata => data_clusters.min(clusters),
        Preallocation::Falloc | Preallocation::Full => clusters,
    };
    let l2 = clusters.div_ceil(size / plan.header.layout().entry_len());
    let fixed = 1 + l2.div_ceil(size / 8) + l2;
    let (table, blocks) = plan.refcounts(fixed + clusters);
    Ok((fixed + table + blocks + data) * size)
}

/// Length of copies of bitmaps, none of their clusters left out, and of their directory.  Bitmaps
/// that are in use are not copied.
pub(super) fn measure_bitmaps(options: &CreateOptions, bitmaps: &[Bitmap]) -> Option<u64> {
    let plan = Plan::unchecked(options).ok()?;
    if plan.header.version < 3 {
        return None;
    }
    let size = plan.cluster_size();
    let whole = |bytes: u64| bytes.next_multiple_of(size);
    let sound = || bitmaps.iter().filter(|b| !b.in_use);
    let one = |bitmap: &Bitmap| {
        let bytes = options.size.div_ceil(bitmap.granularity.max(1)).div_ceil(8);
        whole(bytes) + whole(bytes.div_ceil(size) * 8)
    };
    let directory: u64 = sound().map(|b| entry_len(b.name.len())).sum();
    Some(sound().map(one).sum::<u64>() + whole(directory))
}

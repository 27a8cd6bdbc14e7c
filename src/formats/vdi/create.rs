//! Making new disks.

use std::ops::RangeInclusive;

use crate::error::{Error, ErrorKind, Result};
use crate::formats::vdi::header::{
    self, COUNT, DATA, DISK, DISK_ID, ENTRIES, FREE, Header, KIND, Kind, MAP, PARENT_ID,
    PARENT_STATE_ID, SECTOR, STATE_ID, ZERO,
};
use crate::formats::vdi::relink::parent_of;
use crate::image::create::{CreateOptions, PREALLOCATION, Preallocation, SUBFORMAT, preallocate};
use crate::image::driver::Creator;
use crate::image::options::{OptionKind, OptionSpec};
use crate::image::table::{Endian, Table};
use crate::storage::{Storage, start_over};
use crate::util::align::up;
use crate::util::random;

/// Blocks are as large as all programs take them, unless asked otherwise; in a child as in its parent.
const BLOCK: u64 = 1 << 20;
/// Blocks that we make.
const BLOCKS: RangeInclusive<u64> = 4 << 10..=256 << 20;
/// Where the map is, and what the data is aligned to.
const ALIGN: u64 = 1 << 20;
/// Text at the start of the file.
const TEXT: &[u8] = b"<<< vdtool VirtualBox Disk Image >>>\n";

/// How new disks are made.
pub(super) const CREATOR: Creator = Creator {
    create,
    settle: |options| {
        let plan = Plan::new(options)?;
        let values = options.values.clone();
        let subformat = if plan.fixed { "fixed" } else { "dynamic" };
        Ok(CreateOptions {
            size: plan.size,
            values: values.with(&SUBFORMAT, subformat)?,
            ..options.clone()
        })
    },
    measure: |options, data_clusters| {
        let plan = Plan::new(options)?;
        let blocks = if plan.fixed {
            plan.entries()
        } else {
            data_clusters
        };
        Ok(plan.data() + blocks * plan.block)
    },
    measure_bitmaps: |_, _| None,
    cluster_size: |options| Plan::new(options).map(|plan| plan.block),
    options: &[SUBFORMAT, STATIC, BLOCK_SIZE, PREALLOCATION],
    compress: None,
    sequence: None,
};

const STATIC: OptionSpec = OptionSpec {
    name: "static",
    kind: OptionKind::Bool,
    default: "",
    help: "as qemu-img has it: on stands for subformat=fixed",
};

const BLOCK_SIZE: OptionSpec = OptionSpec {
    name: "block_size",
    kind: OptionKind::Size,
    default: "1M",
    help: "unit of allocation, a power of two from 4k to 256M, in a child that of its parent; VirtualBox takes 128k to 128M, other tools 1M",
};

/// What the options mean.
struct Plan {
    size: u64,
    block: u64,
    fixed: bool,
    preallocation: Preallocation,
}

impl Plan {
    fn new(options: &CreateOptions) -> Result<Self> {
        let fixed = options.values.text("subformat").map(|word| word == "fixed");
        let fixed = match (fixed, options.values.bool("static")) {
            (Some(a), Some(b)) if a != b => {
                return Err(Error::invalid(
                    "subformat and static contradict each other (allowed: one of them)",
                ));
            }
            (a, b) => a.or(b).unwrap_or_default(),
        };
        let preallocation = options.preallocation_of("VDI", fixed)?;
        let asked = options.block_size(&BLOCKS)?;
        let parent = options.backing.as_ref();
        let parent = parent.filter(|parent| parent.format == super::DRIVER.name);
        let block = asked.or(parent.and_then(|parent| parent.cluster_size));
        let block = block.unwrap_or(BLOCK);
        let plan = Self {
            size: up(options.size, SECTOR).unwrap_or(u64::MAX),
            block,
            fixed,
            preallocation,
        };
        // The data begins below 4 GiB, behind the map.
        match plan.entries() < u64::from(ZERO) && u32::try_from(plan.data()).is_ok() {
            true => Ok(plan),
            false => Err(Error::new(
                ErrorKind::OutOfRange,
                format!(
                    "a VDI of {} bytes in blocks of {block} (allowed: a map that ends below 4 GiB, of less than {ZERO} entries)",
                    options.size
                ),
            )),
        }
    }

    fn entries(&self) -> u64 {
        self.size.div_ceil(self.block)
    }

    fn data(&self) -> u64 {
        (ALIGN + self.entries() * 4).next_multiple_of(ALIGN)
    }

    fn header(&self, options: &CreateOptions) -> Result<Header> {
        let mut header = Header::new();
        let backing = options.backing.as_ref();
        let kind = match (backing, self.fixed) {
            (Some(_), _) => Kind::Differencing,
            (None, true) => Kind::Fixed,
            (None, false) => Kind::Dynamic,
        };
        header.bytes[..TEXT.len()].copy_from_slice(TEXT);
        header.set_word(KIND, kind as u64);
        header.set_word(MAP, ALIGN);
        header.set_word(DATA, self.data());
        header.set(DISK, &self.size.to_le_bytes());
        header.set_word(header::BLOCK, self.block);
        header.set_word(ENTRIES, self.entries());
        header.set_word(COUNT, if self.fixed { self.entries() } else { 0 });
        header.set(DISK_ID, &random::uuid()?.to_bytes_le());
        header.set(STATE_ID, &random::uuid()?.to_bytes_le());
        if let Some(backing) = backing {
            header.set(PARENT_ID, &parent_of(backing)?.to_bytes_le());
            let state = backing.state.unwrap_or_default();
            header.set(PARENT_STATE_ID, &state.to_bytes_le());
        }
        Ok(header)
    }
}

fn create(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    let plan = Plan::new(options)?;
    let header = plan.header(options)?;
    let blocks = if plan.fixed { plan.entries() } else { 0 };
    let end = plan.data() + blocks * plan.block;
    start_over(storage, end)?;
    let map = Table::new(ALIGN, plan.entries(), Endian::Little);
    map.fill(storage, 0..plan.entries(), |index| {
        Ok(match plan.fixed {
            true => u32::try_from(index).unwrap_or(FREE),
            false => FREE,
        })
    })?;
    preallocate(storage, plan.data()..end, plan.preallocation)?;
    storage.write_at(&header.bytes, 0)
}

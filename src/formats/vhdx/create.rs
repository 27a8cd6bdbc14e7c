//! Making new disks.

use std::ops::Range;
use std::sync::atomic::AtomicU64;

use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::formats::vhdx::bat::{Block, Grid, Use};
use crate::formats::vhdx::bytes::MB;
use crate::formats::vhdx::header::{self, Header, MAX_LOG};
use crate::formats::vhdx::locator::Locator;
use crate::formats::vhdx::metadata::{BLOCKS, MAX_DISK, NewMetadata};
use crate::formats::vhdx::region::{self, Regions};
use crate::image::create::{CreateOptions, PREALLOCATION, Preallocation, SUBFORMAT, preallocate};
use crate::image::driver::Creator;
use crate::image::options::{OptionKind, OptionSpec};
use crate::image::table::{Endian, Table};
use crate::storage::{Storage, start_over};
use crate::util::align::up;
use crate::util::random;

/// Blocks are this large, or larger where the table would have more entries than this.
const BLOCK: u64 = 2 << 20;
const ENTRIES: u64 = 1 << 20;
/// The program, as the file names it.
const CREATOR_NAME: &str = concat!("vdtool ", env!("CARGO_PKG_VERSION"));

/// How new disks are made.
pub(super) const CREATOR: Creator = Creator {
    create,
    settle: |options| {
        let plan = Plan::new(options)?;
        let subformat = if plan.fixed { "fixed" } else { "dynamic" };
        Ok(CreateOptions {
            size: plan.size,
            values: options.values.clone().with(&SUBFORMAT, subformat)?,
            ..options.clone()
        })
    },
    measure: |options, data_clusters| {
        let plan = Plan::new(options)?;
        let blocks = if plan.fixed {
            plan.blocks()
        } else {
            data_clusters
        };
        Ok(plan.bat().end + blocks * plan.block)
    },
    measure_bitmaps: |_, _| None,
    cluster_size: |options| Plan::new(options).map(|plan| plan.block),
    options: &[
        SUBFORMAT,
        BLOCK_SIZE,
        LOG_SIZE,
        LOGICAL,
        PHYSICAL,
        ZERO_STATE,
        PREALLOCATION,
    ],
    compress: None,
    sequence: None,
};

const BLOCK_SIZE: OptionSpec = OptionSpec {
    name: "block_size",
    kind: OptionKind::Size,
    default: "",
    help: "unit of allocation, a power of two from 1M to 256M; 2M, and more for disks from 4T on; Windows takes 32M",
};

const LOG_SIZE: OptionSpec = OptionSpec {
    name: "log_size",
    kind: OptionKind::Size,
    default: "1M",
    help: "room for changes of metadata that are not in place yet, a multiple of 1M",
};

const LOGICAL: OptionSpec = OptionSpec {
    name: "logical_sector_size",
    kind: OptionKind::Choice(&["512", "4096"]),
    default: "512",
    help: "bytes of a sector as a guest sees it, in a child those of its parent; QEMU reads no 4096",
};

const PHYSICAL: OptionSpec = OptionSpec {
    name: "physical_sector_size",
    kind: OptionKind::Choice(&["512", "4096"]),
    default: "4096",
    help: "bytes of a sector as the guest is told that hardware has it, in a child those of its parent",
};

const ZERO_STATE: OptionSpec = OptionSpec {
    name: "block_state_zero",
    kind: OptionKind::Bool,
    default: "",
    help: "as qemu-img has it: blocks without space are marked as zero rather than not present; on in none",
};

/// What the options mean.
#[derive(Debug)]
struct Plan {
    size: u64,
    block: u64,
    fixed: bool,
    log: u64,
    logical: u64,
    physical: u64,
    /// Blocks without space say that they are zero.
    zero: bool,
    has_parent: bool,
    preallocation: Preallocation,
}

impl Plan {
    fn new(options: &CreateOptions) -> Result<Self> {
        let values = &options.values;
        let fixed = values.text("subformat") == Some("fixed");
        let preallocation = options.preallocation_of("VHDX", fixed)?;
        let parent = options.backing.as_ref();
        let below = parent.and_then(|parent| parent.sector_size);
        let sector = |name| values.text(name).and_then(|text| text.parse().ok());
        let logical = sector(LOGICAL.name).or(below).unwrap_or(512);
        if below.is_some_and(|below| below != logical) {
            return Err(Error::invalid(format!(
                "logical_sector_size is {logical} (allowed: {}, as the backing file has it)",
                below.unwrap_or_default()
            )));
        }
        let size = up(options.size, logical).unwrap_or(u64::MAX);
        if size == 0 || size > MAX_DISK {
            return Err(Error::new(
                ErrorKind::OutOfRange,
                format!(
                    "a VHDX of {} bytes (allowed: 1 to {MAX_DISK})",
                    options.size
                ),
            ));
        }
        let log = values.number("log_size").unwrap_or(MB);
        if !log.is_multiple_of(MB) || !(MB..=MAX_LOG).contains(&log) {
            return Err(Error::invalid(format!(
                "log_size is {log} (allowed: multiples of {MB} from there to {MAX_LOG})"
            )));
        }
        let zero = values.bool(ZERO_STATE.name).unwrap_or_default();
        if zero && parent.is_some() {
            return Err(Error::invalid(
                "block_state_zero would hide all of the backing file (allowed: off)",
            ));
        }
        let block = options.block_size(&BLOCKS)?;
        Ok(Self {
            size,
            block: block.unwrap_or_else(|| block_for(size)),
            fixed,
            log,
            logical,
            // A child has what belongs to its parent's disk ([MS-VHDX] 2.6.1.2).
            physical: sector(PHYSICAL.name)
                .or(parent.and_then(|parent| parent.physical_sector_size))
                .unwrap_or(4096),
            zero,
            has_parent: parent.is_some(),
            preallocation,
        })
    }

    fn grid(&self) -> Grid {
        Grid::new(self.block, self.logical, self.has_parent)
    }

    fn blocks(&self) -> u64 {
        self.grid().blocks(self.size)
    }

    fn log(&self) -> Range<u64> {
        MB..MB + self.log
    }

    fn metadata(&self) -> Range<u64> {
        self.log().end..self.log().end + MB
    }

    fn bat(&self) -> Range<u64> {
        let start = self.metadata().end;
        let len = (self.grid().entries(self.size) * 8).next_multiple_of(MB);
        start..start + len
    }

    /// Writes the table of blocks, where it does not read as it is to.
    fn write_table(&self, storage: &dyn Storage) -> Result<()> {
        if !self.fixed && !self.zero {
            return Ok(());
        }
        let (grid, first) = (self.grid(), self.bat().end);
        let entries = grid.entries(self.size);
        let table: Table<AtomicU64> = Table::of_words(self.bat().start, entries, Endian::Little);
        table.fill(storage, 0..entries, |index| {
            Ok(match grid.of(index) {
                Use::Bitmap(_) => 0,
                Use::Block(_) if !self.fixed => Block::Zero.word(),
                Use::Block(block) => Block::Present(first + block * self.block).word(),
            })
        })
    }
}

fn block_for(size: u64) -> u64 {
    let mut block = BLOCK;
    while size.div_ceil(block) > ENTRIES && block < *BLOCKS.end() {
        block *= 2;
    }
    block
}

fn create(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    let plan = Plan::new(options)?;
    let id = match &options.backing {
        // A child is the same disk to the guest.
        Some(backing) => backing.identity.unwrap_or_else(Uuid::nil),
        None => random::uuid()?,
    };
    let locator = options.backing.as_ref().map(Locator::new).transpose()?;
    let locator = locator.map(|locator| locator.to_bytes());
    let header = Header::new(random::uuid()?, random::uuid()?, &plan.log());
    let metadata = NewMetadata {
        size: plan.size,
        block: plan.block,
        fixed: plan.fixed,
        id,
        logical: plan.logical,
        physical: plan.physical,
        locator: locator.as_deref(),
    };
    let start = plan.bat().end;
    let blocks = if plan.fixed { plan.blocks() } else { 0 };
    let end = start + blocks * plan.block;
    start_over(storage, end)?;
    plan.write_table(storage)?;
    preallocate(storage, start..end, plan.preallocation)?;
    storage.write_at(&metadata.to_bytes(), plan.metadata().start)?;
    let regions = Regions::new(plan.bat(), plan.metadata()).to_bytes();
    for place in region::PLACES {
        storage.write_at(&regions, place)?;
    }
    header::create(storage, CREATOR_NAME, &header)
}

//! Making new images.

use std::ops::RangeInclusive;
use std::time::SystemTime;

use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::formats::vhd::footer::{self, Creator as App, Footer, Kind, NewFooter};
use crate::formats::vhd::geometry::{Geometry, MAX_SIZE, SECTOR};
use crate::formats::vhd::header::{self, Header, NewParent};
use crate::formats::vhd::layout::{Blocks, UNUSED};
use crate::formats::vhd::locator::{self, Code, Locator};
use crate::image::create::{
    CreateBacking, CreateOptions, PREALLOCATION, Preallocation, SUBFORMAT, preallocate,
};
use crate::image::driver::Creator;
use crate::image::options::{OptionKind, OptionSpec};
use crate::image::table::{Endian, Table};
use crate::storage::{Storage, Zeroing, has_room, zero_or_write};
use crate::util::align::{clamp_len, len64};
use crate::util::random;

/// Where our tables begin: behind the footer's copy and the header.
const TABLE: u64 = footer::LEN64 + header::LEN64;
/// Blocks are as large as all other writers make them, unless asked otherwise.
const BLOCK_SIZE: u64 = 2 << 20;
/// Blocks that we make.  All readers take 512 KiB and 2 MiB; libvhd none above 2 MiB.
const BLOCKS: RangeInclusive<u64> = 4 << 10..=256 << 20;
/// What Azure wants sizes to be a multiple of.
const AZURE_UNIT: u64 = 1 << 20;

/// How new images are made.
pub(super) const CREATOR: Creator = Creator {
    create,
    settle,
    measure,
    measure_bitmaps: |_, _| None,
    cluster_size: |options| {
        let plan = Plan::new(options)?;
        Ok(match plan.kind {
            Kind::Fixed => 1,
            Kind::Dynamic | Kind::Differencing => plan.blocks.data,
        })
    },
    options: &[SUBFORMAT, BLOCK, SIZE, FORCE_SIZE, PROFILE, PREALLOCATION],
    compress: None,
    sequence: None,
};

const BLOCK: OptionSpec = OptionSpec {
    name: "block_size",
    kind: OptionKind::Size,
    default: "2M",
    help: "unit of allocation, a power of two from 4k to 256M; other tools know 2M and 512k, Xen none above 2M",
};

const SIZE: OptionSpec = OptionSpec {
    name: "size_rule",
    kind: OptionKind::Choice(&["exact", "chs"]),
    default: "exact",
    help: "the size as given, or rounded up to what a geometry describes, for readers that go by it",
};

const FORCE_SIZE: OptionSpec = OptionSpec {
    name: "force_size",
    kind: OptionKind::Bool,
    default: "",
    help: "as qemu-img has it: on stands for size_rule=exact, off for size_rule=chs",
};

const PROFILE: OptionSpec = OptionSpec {
    name: "profile",
    kind: OptionKind::Choice(&["azure"]),
    default: "",
    help: "azure: fixed, exact, rounded up to whole MiB",
};

/// What the options mean.
#[derive(Debug)]
struct Plan<'a> {
    kind: Kind,
    size: u64,
    geometry: Geometry,
    creator: App,
    blocks: Blocks,
    preallocation: Preallocation,
    backing: Option<&'a CreateBacking>,
}

impl<'a> Plan<'a> {
    fn new(options: &'a CreateOptions) -> Result<Self> {
        let text = |name| options.values.text(name);
        let azure = text("profile") == Some("azure");
        let backing = options.backing.as_ref();
        let kind = kind(text("subformat"), azure, backing.is_some())?;
        let chs = by_geometry(text("size_rule"), options.values.bool("force_size"))?;
        if azure && chs {
            return Err(Error::invalid(
                "profile=azure goes with size_rule=exact (found: chs)",
            ));
        }
        let size = size(options.size, azure, chs)?;
        let blocks = Blocks::new(block_size(options, kind)?);
        let preallocation = options.preallocation_of("VHD", kind == Kind::Fixed)?;
        // A geometry that has come to its end says nothing about the size, under any creator.
        let (creator, geometry) = match chs {
            true if Geometry::for_size(size).bytes() != size => (App::Qemu, Geometry::MAX),
            true => (App::Qemu, Geometry::for_size(size)),
            false => (App::Win, Geometry::for_size(size)),
        };
        let plan = Self {
            kind,
            size,
            geometry,
            creator,
            blocks,
            preallocation,
            backing,
        };
        plan.check_length()?;
        Ok(plan)
    }

    /// Refuses blocks so small that a full disk would not fit into 2 TiB of file.
    fn check_length(&self) -> Result<()> {
        if self.kind == Kind::Fixed {
            return Ok(());
        }
        let end = self.length(self.blocks.count(self.size));
        if end.is_some_and(|end| end / SECTOR < u64::from(u32::MAX)) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::OutOfRange,
            format!(
                "with blocks of {} a full disk of {} bytes would need a file beyond 2 TiB, where the format ends (allowed: larger blocks)",
                self.blocks.data, self.size
            ),
        ))
    }

    fn entries(&self) -> u64 {
        self.blocks.count(self.size)
    }

    fn table_end(&self) -> u64 {
        TABLE + (self.entries() * 4).next_multiple_of(SECTOR)
    }

    /// Where the first locator's data goes, and the end of all metadata at the start.
    fn metadata_end(&self) -> u64 {
        let locators = self.parent_paths().into_iter();
        let room: u64 = locators.map(|(_, data)| room(&data)).sum();
        self.table_end() + room
    }

    /// Length of the file once `blocks` blocks have space.
    fn length(&self, blocks: u64) -> Option<u64> {
        let start = self.metadata_end();
        let end = match blocks {
            0 => start,
            n => self
                .blocks
                .stride()
                .checked_mul(n - 1)?
                .checked_add(self.blocks.place(start) + self.blocks.len())?,
        };
        end.checked_add(footer::LEN64)
    }

    fn parent_paths(&self) -> Vec<(Code, Vec<u8>)> {
        self.backing.map(parent_paths).unwrap_or_default()
    }
}

/// A parent's paths as locators hold them, in UTF-16; none where the relative one cannot be, and
/// without the absolute one where that cannot be.
pub(super) fn parent_paths(backing: &CreateBacking) -> Vec<(Code, Vec<u8>)> {
    let Some(relative) = backing.relative.to_str() else {
        return Vec::new();
    };
    let paths = [
        (Code::W2ru, Some(relative)),
        (Code::W2ku, backing.absolute.to_str()),
        (Code::MacX, Some(relative)),
    ];
    let paths = paths
        .into_iter()
        .filter_map(|(code, path)| Some((code, path?)));
    let paths = paths.map(|(code, path)| (code, locator::data(code, path)));
    paths.collect()
}

/// Whole sectors that a locator's data takes.
pub(super) fn room(data: &[u8]) -> u64 {
    len64(data.len()).next_multiple_of(SECTOR)
}

/// Whether the size is to be what a geometry describes.
fn by_geometry(rule: Option<&str>, force: Option<bool>) -> Result<bool> {
    let chs = rule.map(|rule| rule == "chs");
    match (chs, force) {
        (Some(chs), Some(force)) if chs == force => Err(Error::invalid(
            "size_rule and force_size contradict each other (allowed: one of them)",
        )),
        (Some(chs), _) => Ok(chs),
        (None, force) => Ok(force == Some(false)),
    }
}

fn kind(subformat: Option<&str>, azure: bool, backing: bool) -> Result<Kind> {
    if azure && subformat == Some("dynamic") {
        return Err(Error::invalid(
            "profile=azure goes with subformat=fixed (found: dynamic)",
        ));
    }
    Ok(match subformat {
        _ if azure => Kind::Fixed,
        Some("fixed") => Kind::Fixed,
        _ if backing => Kind::Differencing,
        _ => Kind::Dynamic,
    })
}

/// The size in whole sectors, rounded as asked.
fn size(asked: u64, azure: bool, chs: bool) -> Result<u64> {
    let unit = if azure { AZURE_UNIT } else { SECTOR };
    let size = asked
        .checked_next_multiple_of(unit)
        .filter(|s| *s <= MAX_SIZE);
    let Some(size) = size else {
        return Err(Error::new(
            ErrorKind::OutOfRange,
            format!("a VHD of {asked} bytes (allowed: up to {MAX_SIZE}, 2040 GiB)"),
        ));
    };
    Ok(match chs {
        true => Geometry::round_up(size),
        false => size,
    })
}

fn block_size(options: &CreateOptions, kind: Kind) -> Result<u64> {
    let asked = options.block_size(&BLOCKS)?;
    match kind == Kind::Fixed && asked.is_some() {
        true => Err(Error::invalid(
            "block_size is not for fixed disks: they have no blocks",
        )),
        false => Ok(asked.unwrap_or(BLOCK_SIZE)),
    }
}

fn settle(options: &CreateOptions) -> Result<CreateOptions> {
    let plan = Plan::new(options)?;
    let subformat = match plan.kind {
        Kind::Fixed => "fixed",
        Kind::Dynamic | Kind::Differencing => "dynamic",
    };
    let rule = match plan.creator {
        App::Qemu => "chs",
        App::Win => "exact",
    };
    let values = options.values.clone();
    let values = values.with(&SUBFORMAT, subformat)?.with(&SIZE, rule)?;
    Ok(CreateOptions {
        size: plan.size,
        values,
        ..options.clone()
    })
}

fn measure(options: &CreateOptions, data_clusters: u64) -> Result<u64> {
    if options.backing.is_some() {
        return Err(Error::unsupported(
            "a target with a backing image cannot be measured: what it needs depends on content",
        ));
    }
    let plan = Plan::new(options)?;
    let too_long = || Error::new(ErrorKind::OutOfRange, "the file would be too long");
    match plan.kind {
        Kind::Fixed => plan.size.checked_add(footer::LEN64).ok_or_else(too_long),
        _ => plan
            .length(data_clusters.min(plan.entries()))
            .ok_or_else(too_long),
    }
}

fn create(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    let plan = Plan::new(options)?;
    let new = NewFooter {
        kind: plan.kind,
        size: plan.size,
        geometry: plan.geometry,
        creator: plan.creator,
        uuid: random::uuid()?,
    };
    let end = start(storage, &plan)?;
    let footer = Footer::new(&new, SystemTime::now());
    match plan.kind {
        Kind::Fixed => create_fixed(storage, &plan, &footer, end),
        Kind::Dynamic | Kind::Differencing => create_sparse(storage, &plan, &footer, end),
    }
}

/// Empties the file; where the footer goes.  That is behind everything else, or at the end of
/// storage whose length is fixed, where other programs look for it.
fn start(storage: &dyn Storage, plan: &Plan<'_>) -> Result<u64> {
    let end = match plan.kind {
        Kind::Fixed => plan.size,
        Kind::Dynamic | Kind::Differencing => plan.metadata_end(),
    };
    if !storage.has_fixed_len() {
        storage.set_len(0)?;
        return Ok(end);
    }
    let size = storage.size();
    if !size.is_multiple_of(SECTOR) {
        return Err(Error::unsupported(format!(
            "a VHD on a device of {size} bytes (allowed: a multiple of {SECTOR})"
        )));
    }
    has_room(storage, end.saturating_add(footer::LEN64))?;
    Ok(size - footer::LEN64)
}

fn create_fixed(storage: &dyn Storage, plan: &Plan<'_>, footer: &Footer, end: u64) -> Result<()> {
    match plan.preallocation {
        Preallocation::Off | Preallocation::Metadata if storage.has_fixed_len() => {
            zero_or_write(storage, 0..plan.size, Zeroing::MayUnmap)?;
        }
        how => preallocate(storage, 0..plan.size, how)?,
    }
    storage.write_at(&footer.to_bytes(), end)
}

fn create_sparse(storage: &dyn Storage, plan: &Plan<'_>, footer: &Footer, end: u64) -> Result<()> {
    let parent = plan
        .backing
        .map(|b| new_parent(b, plan.table_end()))
        .transpose()?;
    let entries = u32::try_from(plan.entries())
        .map_err(|_| Error::new(ErrorKind::OutOfRange, "the table would be too long"))?;
    let block_size = u32::try_from(plan.blocks.data)
        .map_err(|_| Error::new(ErrorKind::OutOfRange, "the blocks would be too large"))?;
    let header = Header::new(TABLE, entries, block_size, parent.as_ref());
    storage.write_at(&footer.to_bytes(), 0)?;
    storage.write_at(&header.to_bytes(), footer::LEN64)?;
    let words = (plan.table_end() - TABLE) / 4;
    Table::new(TABLE, words, Endian::Big).fill(storage, 0..words, |_| Ok(UNUSED))?;
    write_paths(storage, plan.parent_paths(), plan.table_end())?;
    storage.write_at(&footer.to_bytes(), end)
}

/// Writes what locators point at in order from `at` on; where it ends.
pub(super) fn write_paths(
    storage: &dyn Storage,
    paths: Vec<(Code, Vec<u8>)>,
    mut at: u64,
) -> Result<u64> {
    for (_, mut data) in paths {
        let room = room(&data);
        data.resize(clamp_len(room, usize::MAX), 0);
        storage.write_at(&data, at)?;
        at += room;
    }
    Ok(at)
}

/// What the header says of the parent, whose paths lie in order from `at`.
///
/// # Errors
/// `Unsupported`, `Invalid` for a parent that a VHD cannot name.
pub(super) fn new_parent(backing: &CreateBacking, at: u64) -> Result<NewParent> {
    let uuid = match (backing.format, backing.identity) {
        ("raw", _) => Uuid::nil(),
        ("vhd", Some(uuid)) if !uuid.is_nil() => uuid,
        ("vhd", _) => {
            return Err(Error::unsupported(format!(
                "the backing file '{}' has no identity by which a VHD could name it",
                crate::util::text::printable(&backing.name)
            )));
        }
        (format, _) => {
            return Err(Error::unsupported(format!(
                "a VHD over a backing file of format '{format}' (allowed: vhd, raw)"
            )));
        }
    };
    let name = backing.absolute.file_name().and_then(|n| n.to_str());
    let paths = parent_paths(backing);
    let (Some(name), false) = (name, paths.is_empty()) else {
        return Err(Error::invalid(format!(
            "the backing file's path '{}' is not UTF-8, so a VHD, which has UTF-16, cannot hold it",
            crate::util::text::printable(&backing.relative)
        )));
    };
    if name.encode_utf16().count() >= header::NAME_UNITS {
        return Err(Error::invalid(format!(
            "the backing file's name is longer than the {} units a VHD has room for",
            header::NAME_UNITS - 1
        )));
    }
    Ok(NewParent {
        uuid,
        timestamp: footer::timestamp(backing.modified),
        name: name.to_owned(),
        locators: locators(at, &paths)?,
    })
}

/// The header's entries for data that lies in order from `at`.
fn locators(mut at: u64, paths: &[(Code, Vec<u8>)]) -> Result<Vec<Locator>> {
    let mut locators = Vec::new();
    for (code, data) in paths {
        let too_long = |_| Error::invalid("the backing file's path is too long for a VHD");
        let room = room(data);
        if len64(data.len()) > locator::MAX_DATA {
            return Err(Error::invalid(format!(
                "the backing file's path takes {} bytes (allowed: {})",
                data.len(),
                locator::MAX_DATA
            )));
        }
        locators.push(Locator {
            code: *code,
            // In bytes, as Hyper-V and libvhd have it: 512 and more cannot be mistaken.
            space: u32::try_from(room).map_err(too_long)?,
            len: u32::try_from(data.len()).map_err(too_long)?,
            offset: at,
        });
        at += room;
    }
    Ok(locators)
}

//! Making new disks.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::formats::vmdk::descriptor::{Descriptor, NO_CID};
use crate::formats::vmdk::header::{self, SECTOR};
use crate::formats::vmdk::line::{Access, ExtentLine, Kind};
use crate::formats::vmdk::options::{self, Adapter, Subformat};
use crate::formats::vmdk::relink::parent_of;
use crate::formats::vmdk::session::new_cid;
use crate::formats::vmdk::{cowd, sequence};
use crate::image::create::{CreateOptions, Preallocation, preallocate};
use crate::image::driver::Creator;
use crate::image::table::{Endian, Table};
use crate::storage::{Storage, start_over};
use crate::util::align::len64;
use crate::util::random;
use crate::util::text::printable;

/// Grains are as large as all programs make them, unless asked otherwise.
const GRAIN: u64 = 64 << 10;
/// Sectors of a part of a split disk: 2047 MiB, as VMware has it.
pub(super) const PART: u64 = 4_192_256;
/// Sectors that an entry can name, and what ESX counts in.
const SECTORS: u64 = 1 << 32;
/// Entries of a table.
pub(super) const PER_TABLE: u64 = 512;
/// Where an embedded descriptor is, and its sectors: other programs look nowhere else.
pub(super) const DESCRIPTOR: u64 = 1;
pub(super) const DESCRIPTOR_SECTORS: u64 = 20;

/// How new disks are made.
pub(super) const CREATOR: Creator = Creator {
    create,
    settle: |options| {
        let plan = Plan::new(options)?;
        let named = plan.parts()?.into_iter().filter_map(|line| line.name);
        let values = options.values.clone();
        Ok(CreateOptions {
            size: plan.size,
            values: values.with(&options::SUBFORMAT, plan.subformat.name())?,
            named: match plan.subformat.is_inside() {
                true => Vec::new(),
                false => named.collect(),
            },
            in_order: plan.subformat == Subformat::Stream,
            ..options.clone()
        })
    },
    measure: |options, data_clusters| {
        let plan = Plan::new(options)?;
        plan.measure(data_clusters)
    },
    measure_bitmaps: |_, _| None,
    cluster_size: |options| Plan::new(options).map(|plan| plan.grain),
    options: options::OPTIONS,
    compress: Some(options::COMPRESSION),
    sequence: Some(sequence::new),
};

/// What the options mean.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) size: u64,
    pub(super) grain: u64,
    pub(super) subformat: Subformat,
    zeroes: bool,
    preallocation: Preallocation,
    adapter: Adapter,
    hardware: String,
    tools: String,
    name: OsString,
    parent: Option<(u32, OsString)>,
}

impl Plan {
    pub(super) fn new(options: &CreateOptions) -> Result<Self> {
        let subformat = Subformat::of(options)?;
        let flat = subformat.is_flat();
        let preallocation = options.preallocation_of("VMDK", flat)?;
        let grain = match (options::grain(options)?, subformat) {
            (Some(_), _) if flat => {
                return Err(Error::invalid("grain_size is for sparse disks"));
            }
            (None, Subformat::VmfsSparse) => SECTOR,
            (grain, _) => grain.unwrap_or(GRAIN),
        };
        let unit = match subformat {
            Subformat::VmfsSparse => SECTOR,
            _ if flat => SECTOR,
            _ => grain,
        };
        let size = options.size.checked_next_multiple_of(unit);
        let size = size
            .filter(|size| i64::try_from(*size).is_ok())
            .ok_or_else(|| {
                out_of_range(format!(
                    "a VMDK of {} bytes (allowed: less than 2^63)",
                    options.size
                ))
            })?;
        if let Some(backing) = &options.backing {
            if flat || subformat == Subformat::Stream {
                return Err(Error::invalid(format!(
                    "a VMDK of subformat {} has no backing file (allowed with one: monolithicSparse, twoGbMaxExtentSparse, vmfsSparse)",
                    subformat.name()
                )));
            }
            parent_of(backing)?;
        }
        let parent = options.backing.as_ref();
        let parent = parent
            .map(|b| Ok((parent_of(b)?, b.name.clone())))
            .transpose()?;
        let zeroes = options.values.bool("zeroed_grain") == Some(true);
        if zeroes && !matches!(subformat, Subformat::Sparse | Subformat::SplitSparse) {
            return Err(Error::invalid(
                "zeroed_grain is for monolithicSparse and twoGbMaxExtentSparse",
            ));
        }
        let plan = Self {
            size,
            grain,
            subformat,
            zeroes,
            preallocation,
            adapter: Adapter::of(options, subformat)?,
            hardware: options::hardware(options)?,
            tools: options::tools(options),
            name: options.name.clone(),
            parent,
        };
        plan.check()?;
        Ok(plan)
    }

    fn check(&self) -> Result<()> {
        let sectors = self.size / SECTOR;
        if sectors == 0 && !self.subformat.is_flat() {
            // A sparse file of no sectors holds a descriptor and no data.
            return Err(out_of_range(format!(
                "a VMDK of subformat {} and 0 bytes (allowed: at least {SECTOR})",
                self.subformat.name()
            )));
        }
        let most = match self.subformat {
            Subformat::VmfsSparse => SECTORS - 1,
            Subformat::Sparse | Subformat::Stream => {
                let tables = self.shape(sectors).overhead;
                if tables >= SECTORS {
                    return Err(out_of_range(format!(
                        "a disk of {} bytes has tables that end behind 2 TiB (allowed: larger grains, or twoGbMaxExtentSparse)",
                        self.size
                    )));
                }
                (self.grain / SECTOR).saturating_mul(SECTORS)
            }
            Subformat::SplitSparse | Subformat::SplitFlat => {
                PART * len64(super::descriptor::MAX_EXTENTS)
            }
            Subformat::Flat | Subformat::Vmfs => u64::MAX,
        };
        match sectors <= most {
            true => Ok(()),
            false => Err(out_of_range(format!(
                "a VMDK of subformat {} and {} bytes (allowed: up to {} bytes)",
                self.subformat.name(),
                self.size,
                most.saturating_mul(SECTOR)
            ))),
        }
    }

    /// The extents, with the names of their files.
    pub(super) fn parts(&self) -> Result<Vec<ExtentLine>> {
        let sectors = self.size / SECTOR;
        let (kind, part) = match self.subformat {
            Subformat::Sparse | Subformat::Stream => (Kind::Sparse, u64::MAX),
            Subformat::SplitSparse => (Kind::Sparse, PART),
            Subformat::Flat => (Kind::Flat, u64::MAX),
            Subformat::SplitFlat => (Kind::Flat, PART),
            Subformat::Vmfs => (Kind::Vmfs, u64::MAX),
            Subformat::VmfsSparse => (Kind::VmfsSparse, u64::MAX),
        };
        let count = sectors.div_ceil(part).max(1);
        let line = |number: u64| {
            let before = number * part.min(sectors);
            Ok(ExtentLine {
                access: Access::ReadWrite,
                sectors: part.min(sectors - before),
                kind,
                name: Some(self.part_name(number + 1)?),
                offset: 0,
            })
        };
        (0..count).map(line).collect()
    }

    /// What the file of an extent is called, after the disk.
    fn part_name(&self, number: u64) -> Result<OsString> {
        if self.name.as_bytes().iter().any(|b| b"\"\n\r\0".contains(b)) {
            return Err(Error::invalid(format!(
                "a VMDK is not called '{}' (allowed: no quotes and no line ends: its descriptor has no way to write them)",
                printable(&self.name)
            )));
        }
        if self.subformat.is_inside() {
            let unnamed = OsString::from("disk.vmdk");
            return Ok(if self.name.is_empty() {
                unnamed
            } else {
                self.name.clone()
            });
        }
        let name = self.name.as_bytes();
        let stem = name.strip_suffix(b".vmdk").unwrap_or(name);
        let mut new = OsStr::from_bytes(stem).to_owned();
        new.push(match self.subformat {
            Subformat::Flat | Subformat::Vmfs => "-flat".to_owned(),
            Subformat::SplitFlat => format!("-f{number:03}"),
            Subformat::VmfsSparse => "-delta".to_owned(),
            _ => format!("-s{number:03}"),
        });
        new.push(".vmdk");
        Ok(new)
    }

    /// The descriptor, with a new CID.
    pub(super) fn descriptor(&self) -> Result<Descriptor> {
        let (cid, longer) = new_cid(None)?;
        let mut text = Vec::new();
        let mut line = |line: &[u8]| {
            text.extend_from_slice(line);
            text.push(b'\n');
        };
        let parent = self.parent.as_ref().map_or(NO_CID, |(cid, _)| *cid);
        line(b"# Disk DescriptorFile");
        line(b"version=1");
        line(format!("CID={cid:08x}").as_bytes());
        line(format!("parentCID={parent:08x}").as_bytes());
        line(format!("createType=\"{}\"", self.subformat.name()).as_bytes());
        if let Some((_, name)) = &self.parent {
            line(&[b"parentFileNameHint=\"", name.as_bytes(), b"\""].concat());
        }
        line(b"");
        line(b"# Extent description");
        for part in self.parts()? {
            line(&part.to_bytes());
        }
        line(b"");
        line(b"# The Disk Data Base");
        line(b"#DDB");
        line(b"");
        line(format!("ddb.virtualHWVersion = \"{}\"", self.hardware).as_bytes());
        let geometry = self.adapter.geometry(self.size);
        for (key, value) in ["cylinders", "heads", "sectors"].iter().zip(geometry) {
            line(format!("ddb.geometry.{key} = \"{value}\"").as_bytes());
        }
        line(format!("ddb.adapterType = \"{}\"", self.adapter.name()).as_bytes());
        line(format!("ddb.toolsVersion = \"{}\"", self.tools).as_bytes());
        line(
            format!(
                "ddb.longContentID = \"{:032x}\"",
                longer << 32 | u128::from(cid)
            )
            .as_bytes(),
        );
        line(format!("ddb.uuid = \"{}\"", uuid()?).as_bytes());
        Descriptor::parse(&text)
    }

    /// Where things are in a sparse file that holds so many sectors.
    pub(super) fn shape(&self, sectors: u64) -> Shape {
        Shape::new(sectors, self.grain / SECTOR)
    }

    fn measure(&self, data_clusters: u64) -> Result<u64> {
        let sectors = self.size / SECTOR;
        let data = data_clusters.saturating_mul(self.grain);
        let parts = self.parts()?;
        Ok(match self.subformat {
            Subformat::Flat | Subformat::Vmfs | Subformat::SplitFlat => self.size,
            Subformat::Stream => sequence::measure(self, data_clusters),
            Subformat::VmfsSparse => {
                let tables = sectors.div_ceil(cowd::PER_TABLE).min(data_clusters);
                cowd::overhead(sectors, self.grain / SECTOR) * SECTOR
                    + data
                    + tables * cowd::PER_TABLE * 4
            }
            Subformat::Sparse | Subformat::SplitSparse => {
                let overhead = parts
                    .iter()
                    .map(|p| self.shape(p.sectors).overhead * SECTOR);
                overhead.sum::<u64>() + data
            }
        })
    }
}

/// Where the tables of a hosted sparse file are, in sectors.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) sectors: u64,
    pub(super) grain: u64,
    pub(super) tables: u64,
    pub(super) rgd: u64,
    pub(super) gd: u64,
    /// The first grain.
    pub(super) overhead: u64,
}

impl Shape {
    pub(super) fn new(sectors: u64, grain: u64) -> Self {
        let tables = sectors.div_ceil(grain).div_ceil(PER_TABLE);
        let rgd = DESCRIPTOR + DESCRIPTOR_SECTORS;
        let set = Self::directory(tables) + tables * TABLE;
        let gd = rgd + set;
        Self {
            sectors,
            grain,
            tables,
            rgd,
            gd,
            overhead: (gd + set).next_multiple_of(grain),
        }
    }

    /// Sectors of the directory of so many tables.
    pub(super) fn directory(tables: u64) -> u64 {
        (tables * 4).div_ceil(SECTOR)
    }
}

/// Sectors of a table.
pub(super) const TABLE: u64 = PER_TABLE * 4 / SECTOR;

/// A UUID in VMware's spelling.
fn uuid() -> Result<String> {
    let random = random::uuid()?;
    let mut bytes = *random.as_bytes();
    let last = 0x90 | bytes[3] & 0xf;
    bytes[..4].copy_from_slice(&[0x60, 0, 0xc2, last]);
    let words = |part: &[u8]| {
        let words: Vec<String> = part.iter().map(|b| format!("{b:02x}")).collect();
        words.join(" ")
    };
    Ok(format!("{}-{}", words(&bytes[..8]), words(&bytes[8..])))
}

pub(super) fn out_of_range(text: String) -> Error {
    Error::new(ErrorKind::OutOfRange, text)
}

fn create(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    let plan = Plan::new(options)?;
    if plan.subformat == Subformat::Stream {
        return sequence::empty(storage, options);
    }
    let parts = plan.parts()?;
    let descriptor = plan.descriptor()?.to_bytes();
    if plan.subformat == Subformat::Sparse {
        sparse(storage, &plan, parts[0].sectors, &descriptor)?;
        return Ok(());
    }
    if options.files.len() != parts.len() {
        return Err(Error::unsupported(format!(
            "a VMDK of subformat {} is made of {} further files, which are not made here (allowed: create, convert)",
            plan.subformat.name(),
            parts.len()
        )));
    }
    for (part, file) in parts.iter().zip(&options.files) {
        make_part(&plan, part, file).map_err(|e| e.at_opt(file.path()))?;
    }
    start_over(storage, 0)?;
    storage.write_at(&descriptor, 0)
}

fn make_part(plan: &Plan, part: &ExtentLine, file: &Arc<dyn Storage>) -> Result<()> {
    match part.kind {
        Kind::Sparse => sparse(&**file, plan, part.sectors, &[]),
        Kind::VmfsSparse => cowd::create(&**file, part.sectors, plan.grain / SECTOR),
        _ => {
            let len = part.len()?;
            start_over(&**file, len)?;
            preallocate(&**file, 0..len, plan.preallocation)
        }
    }
}

/// A sparse file without grains: all tables are there, and name none.
fn sparse(storage: &dyn Storage, plan: &Plan, sectors: u64, descriptor: &[u8]) -> Result<()> {
    let shape = plan.shape(sectors);
    let room = DESCRIPTOR_SECTORS * SECTOR;
    if len64(descriptor.len()) > room {
        return Err(out_of_range(format!(
            "the descriptor has {} bytes (allowed: {room}): the name of the parent is too long",
            descriptor.len()
        )));
    }
    start_over(storage, shape.overhead * SECTOR)?;
    for directory in [shape.rgd, shape.gd] {
        let first = directory + Shape::directory(shape.tables);
        let table = Table::new(directory * SECTOR, shape.tables, Endian::Little);
        table.fill(storage, 0..shape.tables, |number| {
            let sector = u32::try_from(first + number * TABLE);
            sector.map_err(|_| out_of_range(format!("table {number} lies behind 2 TiB")))
        })?;
    }
    if !descriptor.is_empty() {
        storage.write_at(descriptor, DESCRIPTOR * SECTOR)?;
    }
    let header = header::Header::new(&shape, plan.zeroes);
    storage.write_at(&header.bytes, 0)
}

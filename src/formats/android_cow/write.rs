//! New files.

use std::io;
use std::ops::Range;

use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32, U64};

use super::header::{
    BLOCK, BLOCK_LEN, FOOTER, HEADER_2, HEADER_3, MAGIC, MAX_FACTOR, MAX_OPS, OP_2, OP_3, Packing,
    Prefix, RESUME, SCRATCH, Third,
};
use crate::error::{Error, ErrorKind, Result};
use crate::image::codec::Method;
use crate::image::compress::Encoder;
use crate::image::delta::{Data, DeltaMaker, Fetch, Make, Plan, Step};
use crate::image::options::{OptionKind, OptionSpec, OptionValues};
use crate::storage::Storage;
use crate::util::align::{clamp_len, len64};

/// Slots of a cluster of operations in new files of version 2.
const CLUSTER: u64 = 1024;
/// Resume points that new files of version 3 have room for.
const POINTS: u64 = 4;
/// Bytes that are encoded and written at a time.
const BATCH: u64 = 8 << 20;

/// How files are made of two disks.
pub(in crate::formats) static MAKER: DeltaMaker = DeltaMaker {
    options: &[
        OptionSpec {
            name: "version",
            kind: OptionKind::Choice(&["2", "3"]),
            default: "2",
            help: "version of the format",
        },
        OptionSpec {
            name: "compression",
            kind: OptionKind::Choice(&["none", "gz", "brotli", "lz4", "zstd"]),
            default: "lz4",
            help: "how data is compressed",
        },
        OptionSpec {
            name: "block_factor",
            kind: OptionKind::Size,
            default: "64k",
            help: "version 3: the most bytes that are compressed together, a power of two from 4k to 256k",
        },
    ],
    plan: |values| Ok(Box::new(Made::new(values)?)),
};

/// What a new file is like.
#[derive(Debug, Clone, Copy)]
struct Made {
    is_third: bool,
    packing: Packing,
    largest: u64,
}

impl Made {
    fn new(values: &OptionValues) -> Result<Self> {
        let is_third = values.text("version") == Some("3");
        let number = match values.text("compression") {
            Some("none") => 0,
            Some("gz") => 1,
            Some("brotli") => 2,
            Some("zstd") => 4,
            _ => 3,
        };
        let factor = values.number("block_factor");
        let most = BLOCK << MAX_FACTOR;
        if let Some(bytes) = factor {
            if !is_third {
                return Err(Error::invalid("block_factor is for version=3"));
            }
            if !bytes.is_power_of_two() || !(BLOCK..=most).contains(&bytes) {
                return Err(Error::invalid(format!(
                    "block_factor is {bytes} (allowed: a power of two from {BLOCK} to {most})"
                )));
            }
        }
        let packing = Packing::from_number(number)?;
        let largest = match (is_third, packing) {
            // Data that is not compressed gains nothing.
            (false, _) | (_, Packing::Plain) => BLOCK,
            _ => factor.unwrap_or(64 << 10),
        };
        Ok(Self {
            is_third,
            packing,
            largest,
        })
    }

    fn prefix(&self) -> Prefix {
        let [major, header, footer, op] = match self.is_third {
            true => [3, HEADER_3, 0, OP_3],
            false => [2, HEADER_2, FOOTER, OP_2],
        };
        let short = |value: u64| U16::new(u16::try_from(value).unwrap_or(0));
        let word = |value: u64| U32::new(u32::try_from(value).unwrap_or(0));
        Prefix {
            magic: U64::new(MAGIC),
            major: short(major),
            minor: short(0),
            header_size: short(header),
            footer_size: short(footer),
            op_size: short(op),
            block_size: word(BLOCK),
            cluster_ops: word(if self.is_third { 0 } else { CLUSTER }),
            merged: U64::new(0),
            scratch: word(SCRATCH),
        }
    }

    /// Writes a file of version 2: operations in clusters, each before its data.
    fn second(&self, out: &dyn Storage, steps: &[Step], fetch: &mut Fetch<'_>) -> Result<()> {
        let (mut at, mut count) = (HEADER_2 + SCRATCH, 0);
        let per = clamp_len(CLUSTER - 1, usize::MAX);
        for (group, index) in steps.chunks(per).zip((0..).step_by(per)) {
            let mut data_at = at + OP_2 * CLUSTER;
            let mut ops = Vec::with_capacity(clamp_len(OP_2 * CLUSTER, usize::MAX));
            let mut all = Vec::new();
            for (step, data) in group.iter().zip(fetch(index..index + group.len())?) {
                let (kind, source) = number(step, &data, data_at);
                let has_data = matches!(kind, 2 | 6);
                let packing = if has_data { self.packing.number() } else { 0 };
                let len = u16::try_from(data.bytes.len()).map_err(|_| too_long(step))?;
                ops.extend([kind, packing]);
                ops.extend(len.to_le_bytes());
                ops.extend(u64::from(step.block).to_le_bytes());
                ops.extend(source.to_le_bytes());
                data_at += u64::from(len);
                all.extend(data.bytes);
            }
            let room = OP_2 * (CLUSTER - 1) - len64(ops.len());
            ops.extend([5, 0, 0, 0]);
            ops.extend(0u64.to_le_bytes());
            ops.extend((room + len64(all.len())).to_le_bytes());
            count += len64(group.len()) + 1;
            ops.resize(clamp_len(OP_2 * CLUSTER, usize::MAX), 0);
            ops.append(&mut all);
            out.write_at(&ops, at)?;
            at += len64(ops.len());
        }
        let mut footer = vec![255, 0, 64, 0];
        footer.extend((count * OP_2).to_le_bytes());
        footer.extend(count.to_le_bytes());
        footer.resize(clamp_len(FOOTER, usize::MAX), 0);
        out.write_at(&footer, at)?;
        // Last, so that what was not finished is none of the format.
        out.write_at(self.prefix().as_bytes(), 0)
    }

    /// Writes a file of version 3: all operations, then all data.  It is merged in the order of the file,
    /// and who merges it takes what reads the old disk first: a difference that turned out to be no
    /// shorter than the block comes behind all of these.
    fn third(&self, out: &dyn Storage, steps: &[Step], fetch: &mut Fetch<'_>) -> Result<()> {
        let op_at = HEADER_3 + SCRATCH + RESUME * POINTS;
        let mut file = ThirdFile {
            out,
            op_at,
            data_at: op_at + OP_3 * len64(steps.len()),
        };
        let reading = steps.iter().take_while(|step| step.reads()).count();
        let mut late: Vec<Range<usize>> = Vec::new();
        for batch in batches(steps, 0..reading) {
            let data = fetch(batch.clone())?;
            let are_late = file.add(&steps[batch.clone()], data, |step, data| {
                step.make == Make::Differ && !data.is_difference
            })?;
            if are_late {
                late.push(batch);
            }
        }
        for batch in late {
            let data = fetch(batch.clone())?;
            file.add(&steps[batch], data, |step, data| {
                step.make != Make::Differ || data.is_difference
            })?;
        }
        for batch in batches(steps, reading..steps.len()) {
            let data = fetch(batch.clone())?;
            file.add(&steps[batch], data, |_, _| false)?;
        }
        let data_at = file.data_at;
        let third = Third {
            sequence: U64::new(0),
            resume: U32::new(0),
            resume_max: U32::new(u32::try_from(POINTS).unwrap_or(0)),
            ops: U64::new(len64(steps.len())),
            ops_max: U64::new(len64(steps.len())),
            compression: U32::new(self.packing.number().into()),
            largest: U32::new(u32::try_from(self.largest).unwrap_or(0)),
        };
        // A file without data ends with its tables.
        if out.size() < data_at {
            out.set_len(data_at)?;
        }
        let header = [self.prefix().as_bytes(), third.as_bytes()].concat();
        out.write_at(&header, 0)
    }
}

/// A file of version 3 on its way.
struct ThirdFile<'a> {
    out: &'a dyn Storage,
    op_at: u64,
    data_at: u64,
}

impl ThirdFile<'_> {
    /// Adds steps with their data, but for those of which `is_left_out` says so; whether there were such.
    fn add(
        &mut self,
        steps: &[Step],
        data: Vec<Data>,
        is_left_out: impl Fn(&Step, &Data) -> bool,
    ) -> Result<bool> {
        let (mut ops, mut all, mut left_out) = (Vec::new(), Vec::new(), false);
        for (step, data) in steps.iter().zip(data) {
            if is_left_out(step, &data) {
                left_out = true;
                continue;
            }
            let (kind, source) = number(step, &data, self.data_at + len64(all.len()));
            let len = u32::try_from(data.bytes.len()).map_err(|_| too_long(step))?;
            let factor = u64::from(step.blocks.max(1).ilog2());
            ops.extend(len.to_le_bytes());
            ops.extend(step.block.to_le_bytes());
            ops.extend((u64::from(kind) << 60 | factor << 57 | source).to_le_bytes());
            all.extend(data.bytes);
        }
        self.out.write_at(&ops, self.op_at)?;
        self.out.write_at(&all, self.data_at)?;
        self.op_at += len64(ops.len());
        self.data_at += len64(all.len());
        Ok(left_out)
    }
}

/// Steps of a range that are encoded together, one after the other.
fn batches(steps: &[Step], range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let mut start = range.start;
    std::iter::from_fn(move || {
        let rest = steps
            .get(start..range.end)
            .filter(|rest| !rest.is_empty())?;
        let mut bytes = 0;
        let batch = rest.iter().take_while(|step| {
            bytes += u64::from(step.blocks) * BLOCK;
            bytes <= BATCH
        });
        let end = start + batch.count().max(1);
        Some(std::mem::replace(&mut start, end)..end)
    })
}

fn too_long(step: &Step) -> Error {
    Error::new(
        ErrorKind::OutOfRange,
        format!("the data of block {} is too long", step.block),
    )
}

/// The type of an operation and its source; its data, where it has any, will be at `data_at`.
fn number(step: &Step, data: &Data, data_at: u64) -> (u8, u64) {
    match step.make {
        Make::Copy(from) => (1, from.into()),
        Make::Zero => (3, 0),
        Make::Differ if data.is_difference => (6, u64::from(step.block) * BLOCK),
        Make::Differ | Make::Store => (2, data_at),
    }
}

impl Plan for Made {
    fn block(&self) -> u64 {
        BLOCK
    }

    fn together(&self) -> u32 {
        u32::try_from(self.largest / BLOCK).unwrap_or(1)
    }

    fn most(&self) -> u64 {
        MAX_OPS / 2 * u64::from(self.together())
    }

    fn differs(&self) -> bool {
        self.packing != Packing::Plain
    }

    fn encoder(&self) -> Result<Option<Box<dyn Encoder>>> {
        match self.packing {
            Packing::Plain => Ok(None),
            Packing::Packed(method) => method.encoder().map(Some),
        }
    }

    fn stubborn(&self, bytes: &[u8]) -> Result<Vec<u8>> {
        match self.packing {
            // Version 2 has no way to say that these are stored as they are.
            Packing::Packed(method @ (Method::Gz | Method::Brotli)) if !self.is_third => {
                method.encode_longer(bytes)
            }
            _ => Ok(bytes.to_vec()),
        }
    }

    fn write(&self, storage: &dyn Storage, steps: &[Step], fetch: &mut Fetch<'_>) -> Result<()> {
        if len64(steps.len()) > MAX_OPS / 2 {
            return Err(Error::io(
                "write so many operations",
                io::Error::from(io::ErrorKind::FileTooLarge),
            ));
        }
        debug_assert_eq!(len64(BLOCK_LEN), BLOCK);
        match self.is_third {
            true => self.third(storage, steps, fetch),
            false => self.second(storage, steps, fetch),
        }
    }
}

//! Operations one after the other, as they are in the file.

use super::header::{
    BLOCK, FOOTER, Header, MAX_FACTOR, MAX_OPS, OP_2, OP_3, Packing, RESUME, Reader,
};
use crate::error::{Error, Result};
use crate::image::operations::Operation;
use crate::storage::Storage;

/// Blocks that a disk may have: 16 TiB.
pub(super) const MAX_BLOCKS: u64 = 1 << 32;
/// The most bytes of data of one operation: twice what it may decode to, but one.
pub(super) const MAX_DATA: u64 = (1 << 19) - 1;
/// Sources and data lie below this offset.
const MAX_OFFSET: u64 = 1 << 48;

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Copy,
    Replace,
    Zero,
    Xor,
    Label,
    Cluster,
    Sequence,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Copy => "copy",
            Self::Replace => "replace",
            Self::Zero => "zero",
            Self::Xor => "xor",
            Self::Label => "label",
            Self::Cluster => "cluster",
            Self::Sequence => "sequence",
        }
    }

    fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Copy,
            2 => Self::Replace,
            3 => Self::Zero,
            4 => Self::Label,
            5 => Self::Cluster,
            6 => Self::Xor,
            7 => Self::Sequence,
            _ => return None,
        })
    }

    /// Whether it makes blocks of the disk.
    pub(super) fn makes(self) -> bool {
        self.is_ordered() || matches!(self, Self::Replace | Self::Zero)
    }

    /// Whether it reads the disk below, so that the order of the merge matters.
    pub(super) fn is_ordered(self) -> bool {
        matches!(self, Self::Copy | Self::Xor)
    }
}

/// One operation, within the limits of the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Op {
    pub(super) index: u64,
    pub(super) kind: Kind,
    pub(super) packing: Packing,
    /// The first block that it makes, and log2 of how many.
    pub(super) new: u64,
    pub(super) factor: u32,
    /// As in the file: a block, an offset, a label, or bytes to skip.
    pub(super) source: u64,
    /// Where its data is, and how long that is.
    pub(super) data: u64,
    pub(super) len: u64,
}

impl Op {
    /// Blocks that it makes.
    pub(super) fn blocks(&self) -> u64 {
        1 << self.factor
    }

    fn has_data(&self) -> bool {
        matches!(self.kind, Kind::Replace | Kind::Xor | Kind::Sequence)
    }

    /// For those who want to see it.
    pub(super) fn shown(&self) -> Operation {
        let some = |is: bool, value: u64| is.then_some(value);
        let kind = self.kind;
        let packed = matches!(kind, Kind::Replace | Kind::Xor);
        Operation {
            index: self.index,
            kind: kind.name(),
            new_block: some(kind.makes(), self.new),
            blocks: some(kind.makes(), self.blocks()),
            source_block: some(kind == Kind::Copy, self.source),
            source_offset: some(kind == Kind::Xor, self.source),
            data_offset: some(self.has_data(), self.data),
            data_length: some(self.has_data(), self.len),
            compression: packed.then_some(self.packing.name()),
            label: some(kind == Kind::Label, self.source),
            skip: some(kind == Kind::Cluster, self.source),
        }
    }

    /// An error about it.
    pub(super) fn wrong(&self, text: impl std::fmt::Display) -> Error {
        Error::corrupt(format!(
            "operation {} ({}): {text}",
            self.index,
            self.kind.name()
        ))
    }

    /// Refuses what no operation may be, in a file of `size` bytes.
    fn checked(self, size: u64) -> Result<Self> {
        if self.kind.makes() && self.new + self.blocks() > MAX_BLOCKS {
            let most = MAX_BLOCKS - 1;
            return Err(self.wrong(format!("new_block is {} (allowed: up to {most})", self.new)));
        }
        let most = match self.kind {
            Kind::Copy => Some(MAX_BLOCKS - 1),
            Kind::Xor => Some(MAX_BLOCKS * BLOCK - BLOCK),
            _ => None,
        };
        if let Some(most) = most.filter(|most| self.source > *most) {
            return Err(self.wrong(format!("source is {} (allowed: up to {most})", self.source)));
        }
        if !self.has_data() {
            return Ok(self);
        }
        let end = self.data.checked_add(self.len);
        if end.is_none_or(|end| end > size || end > MAX_OFFSET) {
            return Err(self.wrong(format!(
                "its data is {} bytes at {:#x} (allowed: up to the end of the file at {size:#x})",
                self.len, self.data
            )));
        }
        let fits = match (self.kind, self.packing) {
            (Kind::Sequence, _) => true,
            (_, Packing::Plain) => self.len == self.blocks() * BLOCK,
            _ => (1..=MAX_DATA).contains(&self.len),
        };
        match fits {
            true => Ok(self),
            false => Err(self.wrong(format!("data_length is {}", self.len))),
        }
    }
}

/// Where the list ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// Where the file says so: at its footer, or after as many operations as the header has.
    Whole,
    /// At this label.
    Label(u64),
}

/// The operations of a file.
#[derive(Debug)]
pub(super) struct Ops<'a> {
    header: &'a Header,
    reader: Reader<'a>,
    size: u64,
    end: End,
    /// Operations seen.
    index: u64,
    /// Where the next one is, and where the next data is.
    at: u64,
    data: u64,
    /// Slots of the cluster that are left.
    left: u64,
    last_label: Option<u64>,
    /// Operations there are to be, in version 3.
    count: u64,
    done: bool,
}

impl<'a> Ops<'a> {
    /// Begins at the first.
    ///
    /// # Errors
    /// `Corrupt` where there is no such label; the host's.
    pub(super) fn new(storage: &'a dyn Storage, header: &'a Header, end: End) -> Result<Self> {
        let mut ops = Self {
            header,
            reader: Reader::new(storage),
            size: storage.size(),
            end,
            index: 0,
            at: header.ops_at(),
            data: header.data_at(),
            left: header.cluster_ops,
            last_label: None,
            count: header.third.as_ref().map_or(0, |t| t.ops),
            done: false,
        };
        if let (Some(_), End::Label(label)) = (&header.third, end) {
            ops.count = ops.resume_point(label)?;
        }
        Ok(ops)
    }

    /// How many operations there are up to a label, in version 3.
    fn resume_point(&mut self, label: u64) -> Result<u64> {
        for (found, count) in resume_points(self.header, &mut self.reader)? {
            if found == label && count <= self.count {
                return Ok(count);
            }
        }
        Err(no_label(label))
    }

    /// The next operation; `None` at the end.
    ///
    /// # Errors
    /// `Corrupt` for one out of its limits, and for a list that does not end where it is to; the
    /// host's.
    pub(super) fn next(&mut self) -> Result<Option<Op>> {
        if self.done {
            return Ok(None);
        }
        if self.index >= MAX_OPS && self.header.third.is_none() {
            return Err(Error::corrupt(format!(
                "there are more operations than {MAX_OPS}"
            )));
        }
        match &self.header.third {
            Some(_) => self.next_3(),
            None => self.next_2(),
        }
    }

    fn next_3(&mut self) -> Result<Option<Op>> {
        let Some(tables) = &self.header.third else {
            return Ok(None);
        };
        if self.index == self.count {
            self.done = true;
            return Ok(None);
        }
        let Some(bytes) = self.reader.bytes::<16>(self.at)? else {
            return Err(Error::corrupt(format!(
                "the file ends before operation {}",
                self.index
            )));
        };
        let [len, new, low, high] = words(&bytes);
        let info = u64::from(low) | u64::from(high) << 32;
        let number = u8::try_from(info >> 60).unwrap_or(0);
        let kind = Kind::from_number(number).filter(|kind| kind.makes());
        let Some(kind) = kind else {
            return Err(Error::corrupt(format!(
                "operation {}: its type is {number} (allowed: 1 copy, 2 replace, 3 zero, 6 xor)",
                self.index
            )));
        };
        let op = Op {
            index: self.index,
            kind,
            packing: tables.packing,
            new: u64::from(new),
            factor: u32::try_from(info >> 57 & 7).unwrap_or(7),
            source: info & (MAX_OFFSET - 1),
            data: self.data,
            len: u64::from(len),
        };
        if info >> 48 & 0x1ff != 0 {
            return Err(op.wrong("its reserved bits are set (allowed: 0)"));
        }
        let most = match kind {
            Kind::Replace => tables.largest,
            _ => BLOCK,
        };
        if op.factor > MAX_FACTOR || BLOCK << op.factor > most {
            return Err(op.wrong(format!(
                "it makes {} bytes (allowed: up to {most})",
                BLOCK << op.factor
            )));
        }
        if kind == Kind::Replace && op.source != self.data {
            return Err(op.wrong(format!(
                "its data is at {:#x} (allowed: {:#x}, where that before it ends)",
                op.source, self.data
            )));
        }
        let op = op.checked(self.size)?;
        if op.has_data() {
            self.data += op.len;
        } else if op.len != 0 {
            return Err(op.wrong(format!("data_length is {} (allowed: 0)", op.len)));
        }
        self.at += OP_3;
        self.index += 1;
        Ok(Some(op))
    }

    fn next_2(&mut self) -> Result<Option<Op>> {
        let Some(bytes) = self.reader.bytes::<20>(self.at)? else {
            return Err(self.unfinished());
        };
        let [kind, packing, ..] = bytes;
        let len = u16::from_le_bytes([bytes[2], bytes[3]]);
        let word = |at: usize| {
            let bytes = bytes.get(at..).and_then(|b| b.first_chunk().copied());
            bytes.map_or(0, u64::from_le_bytes)
        };
        let (new, source) = (word(4), word(12));
        if kind == 255 {
            self.footer(new, source)?;
            self.done = true;
            return Ok(None);
        }
        let Some(kind) = Kind::from_number(kind) else {
            return match kind {
                0 => Err(self.unfinished()),
                _ => Err(Error::corrupt(format!(
                    "operation {} at {:#x}: its type is {kind} (allowed: 1 to 7, 255)",
                    self.index, self.at
                ))),
            };
        };
        let mut op = Op {
            index: self.index,
            kind,
            packing: Packing::from_number(packing.into())?,
            new,
            factor: 0,
            source,
            data: self.data,
            len: u64::from(len),
        };
        if matches!(kind, Kind::Replace | Kind::Sequence) {
            op.data = source;
        }
        if len != 0 && !op.has_data() {
            return Err(op.wrong(format!("it has {len} bytes of data (allowed: none)")));
        }
        if kind.makes() && new >= MAX_BLOCKS {
            let most = MAX_BLOCKS - 1;
            return Err(op.wrong(format!("new_block is {new} (allowed: up to {most})")));
        }
        let op = op.checked(self.size)?;
        // What a merge changes is no data.
        let first = self.header.ops_at();
        if op.has_data() && op.data < first {
            return Err(op.wrong(format!(
                "its data is at {:#x} (allowed: from {first:#x} on)",
                op.data
            )));
        }
        self.pass_2(&op)?;
        self.index += 1;
        Ok(Some(op))
    }

    /// Goes on to what follows an operation of version 2.
    fn pass_2(&mut self, op: &Op) -> Result<()> {
        let clusters = self.header.cluster_ops;
        let len = if op.has_data() { op.len } else { 0 };
        self.data += len;
        self.at += OP_2;
        if clusters == 0 {
            if op.kind == Kind::Sequence && len > 0 {
                return Err(Error::unsupported(
                    "has sequence data and no clusters of operations: its writer wrote the next operation over it",
                ));
            }
            self.at += len;
            self.data += OP_2;
        } else {
            self.left -= 1;
        }
        match op.kind {
            Kind::Cluster => self.next_cluster(op)?,
            _ if clusters > 0 && self.left == 0 => {
                return Err(op.wrong("is the last of its cluster (allowed there: cluster)"));
            }
            Kind::Label => {
                self.last_label = Some(op.source);
                self.done = self.end == End::Label(op.source);
            }
            _ => {}
        }
        Ok(())
    }

    fn next_cluster(&mut self, op: &Op) -> Result<()> {
        let clusters = self.header.cluster_ops;
        let next = self.at.checked_add(op.source);
        let wanted = match clusters {
            0 => self.at,
            _ => self.data,
        };
        if next != Some(wanted) {
            return Err(op.wrong(format!(
                "the next cluster is {} bytes further (allowed: {})",
                op.source,
                wanted.saturating_sub(self.at)
            )));
        }
        self.at = wanted;
        self.left = clusters;
        self.data += OP_2 * clusters;
        Ok(())
    }

    /// Judges the footer.
    fn footer(&self, ops_size: u64, count: u64) -> Result<()> {
        if let End::Label(label) = self.end {
            return Err(no_label(label));
        }
        if self.at + FOOTER > self.size {
            return Err(Error::corrupt("the footer is cut off"));
        }
        if count != self.index || Some(ops_size) != self.index.checked_mul(OP_2) {
            return Err(Error::corrupt(format!(
                "the footer says {count} operations in {ops_size} bytes (allowed: {}, as there are, in {})",
                self.index,
                self.index.saturating_mul(OP_2)
            )));
        }
        Ok(())
    }

    fn unfinished(&self) -> Error {
        if let End::Label(label) = self.end {
            return no_label(label);
        }
        let label = match self.last_label {
            Some(label) => format!("--open-options label={label} reads it up to its last label"),
            None => "it has no label that it could be read up to".to_owned(),
        };
        Error::corrupt(format!(
            "has no footer at {:#x}: its writer did not finish it ({label})",
            self.at
        ))
    }
}

fn no_label(label: u64) -> Error {
    Error::invalid(format!("has no label {label}"))
}

fn words(bytes: &[u8; 16]) -> [u32; 4] {
    let word = |i: usize| {
        let part = bytes.get(4 * i..).and_then(|b| b.first_chunk().copied());
        part.map_or(0, u32::from_le_bytes)
    };
    [word(0), word(1), word(2), word(3)]
}

/// Labels of version 3 and how many operations there are before each, in the order of the file.
///
/// # Errors
/// The host's.
pub(super) fn resume_points(header: &Header, reader: &mut Reader<'_>) -> Result<Vec<(u64, u64)>> {
    let mut points = Vec::new();
    let count = header.third.as_ref().map_or(0, |tables| tables.resume);
    for index in 0..count {
        let Some(bytes) = reader.bytes::<16>(header.resume_at() + RESUME * index)? else {
            break;
        };
        let [a, b, c, d] = words(&bytes);
        let word = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        points.push((word(a, b), word(c, d)));
    }
    Ok(points)
}

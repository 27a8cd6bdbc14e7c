//! Files made byte by byte, as their description has them.

use std::io::Write as _;

use crate::util::Seeded;

pub(crate) const BLOCK: usize = 4096;

/// What an operation does.
#[derive(Debug, Clone)]
pub(crate) enum Do {
    Copy(u64),
    /// Blocks of the new disk, as many as are given.
    Replace(Vec<u8>),
    Zero,
    /// What the block is to be, and the offset of what it is a difference to.
    Xor(Vec<u8>, u64),
    Label(u64),
    Sequence(Vec<u32>),
}

/// A file to be made.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) version: u16,
    /// Slots of clusters, in versions 1 and 2.
    pub(crate) cluster: u32,
    /// 0 none, 1 gz, 4 zstd.
    pub(crate) compression: u8,
    pub(crate) merged: u64,
    pub(crate) ops: Vec<(u64, Do)>,
    pub(crate) footer: bool,
    pub(crate) scratch: u32,
}

impl Plan {
    pub(crate) fn new(version: u16, compression: u8) -> Self {
        Self {
            version,
            cluster: if version == 3 { 0 } else { 6 },
            compression,
            merged: 0,
            ops: Vec::new(),
            footer: true,
            scratch: if version == 1 { 0 } else { 2 << 20 },
        }
    }

    pub(crate) fn add(&mut self, block: u64, what: Do) -> &mut Self {
        self.ops.push((block, what));
        self
    }

    fn packed(&self, bytes: &[u8]) -> Vec<u8> {
        let packed = match self.compression {
            0 => return bytes.to_vec(),
            1 => {
                let mut z =
                    flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
                z.write_all(bytes).expect("memory");
                z.finish().expect("memory")
            }
            4 => zstd::bulk::compress(bytes, 1).expect("compresses"),
            other => panic!("compression {other}"),
        };
        // Version 2 has no rule for gz that did not shrink, so it stays as it came out.
        let raw = packed.len() >= bytes.len() && (self.version == 3 || self.compression == 4);
        if raw { bytes.to_vec() } else { packed }
    }

    /// Number, data and source of an operation; `at` is where its data will be.
    fn parts(&self, what: &Do, old: &[u8], at: u64) -> (u8, Vec<u8>, u64) {
        match what {
            Do::Copy(block) => (1, vec![], *block),
            Do::Replace(bytes) => (2, self.packed(bytes), at),
            Do::Zero => (3, vec![], 0),
            Do::Label(label) => (4, vec![], *label),
            Do::Sequence(blocks) => {
                let bytes = blocks.iter().flat_map(|b| b.to_le_bytes()).collect();
                (7, bytes, at)
            }
            Do::Xor(bytes, offset) => {
                let at = usize::try_from(*offset).expect("small");
                let old = &old[at..at + BLOCK];
                let bytes: Vec<u8> = bytes.iter().zip(old).map(|(a, b)| a ^ b).collect();
                (6, self.packed(&bytes), *offset)
            }
        }
    }

    fn header(&self) -> Vec<u8> {
        let mut out = 0x436f_7763_4f57_2121_u64.to_le_bytes().to_vec();
        let [size, footer, op] = match self.version {
            1 => [34, 84, 20],
            2 => [38, 84, 20],
            _ => [78, 0, 16],
        };
        for word in [self.version, 0, size, footer, op] {
            out.extend(word.to_le_bytes());
        }
        out.extend(&BLOCK.to_le_bytes()[..4]);
        out.extend(self.cluster.to_le_bytes());
        out.extend(self.merged.to_le_bytes());
        if self.version > 1 {
            out.extend(self.scratch.to_le_bytes());
        }
        out
    }

    /// The file, over a disk that is `old`.
    pub(crate) fn bytes(&self, old: &[u8]) -> Vec<u8> {
        match self.version {
            3 => self.third(old),
            _ => self.second(old),
        }
    }

    fn third(&self, old: &[u8]) -> Vec<u8> {
        let is_op = |what: &Do| !matches!(what, Do::Label(_) | Do::Sequence(_));
        let count = self.ops.iter().filter(|(_, w)| is_op(w)).count();
        let sequence = self.ops.iter().filter_map(|(_, what)| match what {
            Do::Sequence(blocks) => Some(blocks.clone()),
            _ => None,
        });
        let sequence: Vec<u32> = sequence.flatten().collect();
        let mut out = self.header();
        out.extend((sequence.len() as u64).to_le_bytes());
        // More points than there is room for, as AOSP's writer leaves it.
        out.extend(9u32.to_le_bytes());
        out.extend(4u32.to_le_bytes());
        out.extend((count as u64).to_le_bytes());
        out.extend((count as u64 + 5).to_le_bytes());
        out.extend(u32::from(self.compression).to_le_bytes());
        out.extend(65_536u32.to_le_bytes());
        out.resize(out.len() + self.scratch as usize, 0);
        sequence.iter().for_each(|b| out.extend(b.to_le_bytes()));
        let (points, mut at_op) = (out.len(), 0u64);
        out.resize(points + 4 * 16, 0);
        let ops = out.len();
        out.resize(ops + (count + 5) * 16, 0);
        let (mut point, mut slot) = (points, ops);
        for (block, what) in &self.ops {
            let (number, data, source) = self.parts(what, old, out.len() as u64);
            if let Do::Label(label) = what {
                out[point..point + 8].copy_from_slice(&label.to_le_bytes());
                out[point + 8..point + 16].copy_from_slice(&at_op.to_le_bytes());
                point += 16;
            }
            if !is_op(what) {
                continue;
            }
            let factor = match what {
                Do::Replace(bytes) => (bytes.len() / BLOCK).trailing_zeros(),
                _ => 0,
            };
            let info = u64::from(number) << 60 | u64::from(factor) << 57 | source;
            out[slot..slot + 4].copy_from_slice(&data.len().to_le_bytes()[..4]);
            out[slot + 4..slot + 8].copy_from_slice(&block.to_le_bytes()[..4]);
            out[slot + 8..slot + 16].copy_from_slice(&info.to_le_bytes());
            slot += 16;
            at_op += 1;
            out.extend(data);
        }
        out
    }

    fn second(&self, old: &[u8]) -> Vec<u8> {
        let mut out = self.header();
        out.resize(out.len() + self.scratch as usize, 0);
        let mut seen = 0u64;
        let per = (self.cluster as usize).saturating_sub(1).max(1);
        for group in self.ops.chunks(per) {
            let start = out.len();
            let mut at = start + 20 * (self.cluster as usize).max(1);
            let (mut slots, mut all) = (Vec::new(), Vec::new());
            for (block, what) in group {
                let (number, data, source) = self.parts(what, old, at as u64);
                let packing = if matches!(number, 2 | 6) {
                    self.compression
                } else {
                    0
                };
                slots.extend([number, packing]);
                slots.extend(&data.len().to_le_bytes()[..2]);
                slots.extend(block.to_le_bytes());
                slots.extend(source.to_le_bytes());
                at += data.len();
                all.extend(data);
                seen += 1;
            }
            if self.cluster > 0 {
                let room = 20 * self.cluster as usize - slots.len() - 20;
                slots.extend([5, 0, 0, 0]);
                slots.extend(0u64.to_le_bytes());
                slots.extend(((room + all.len()) as u64).to_le_bytes());
                slots.resize(20 * self.cluster as usize, 0);
                seen += 1;
            }
            out.extend(slots);
            out.extend(all);
        }
        if self.footer {
            out.extend([255, 0, 64, 0]);
            out.extend((seen * 20).to_le_bytes());
            out.extend(seen.to_le_bytes());
            out.resize(out.len() + 64, 0);
        }
        out
    }

    /// The new disk.
    pub(crate) fn model(&self, old: &[u8]) -> Vec<u8> {
        let mut new = old.to_vec();
        for (block, what) in &self.ops {
            apply(*block, what, old, &mut new);
        }
        new
    }
}

/// Does one operation, which reads `old`.
pub(crate) fn apply(block: u64, what: &Do, old: &[u8], new: &mut Vec<u8>) {
    let bytes = match what {
        Do::Copy(from) => {
            let from = usize::try_from(*from).expect("small") * BLOCK;
            old[from..from + BLOCK].to_vec()
        }
        Do::Replace(bytes) | Do::Xor(bytes, _) => bytes.clone(),
        Do::Zero => vec![0; BLOCK],
        Do::Label(_) | Do::Sequence(_) => return,
    };
    let at = usize::try_from(block).expect("small") * BLOCK;
    if new.len() < at + bytes.len() {
        new.resize(at + bytes.len(), 0);
    }
    new[at..at + bytes.len()].copy_from_slice(&bytes);
}

/// Bytes that shrink somewhat.
pub(crate) fn text(rng: &mut Seeded, len: usize) -> Vec<u8> {
    let word = rng.bytes(61);
    let mut bytes: Vec<u8> = word.iter().copied().cycle().take(len).collect();
    for _ in 0..len / 100 {
        let at = rng.usize(0..len);
        bytes[at] = rng.u8(..);
    }
    bytes
}

/// A file with operations of all kinds, in an order that merges; over a disk of 40 blocks.
pub(crate) fn all_kinds(version: u16, compression: u8, rng: &mut Seeded, old: &[u8]) -> Plan {
    let mut plan = Plan::new(version, compression);
    plan.add(0, Do::Copy(9))
        .add(1, Do::Copy(9))
        .add(0x1_0000_0000 - 1, Do::Label(1));
    plan.add(9, Do::Copy(10)).add(10, Do::Copy(39));
    let mut close = old[20 * BLOCK..21 * BLOCK].to_vec();
    close[77] ^= 1;
    plan.add(20, Do::Xor(close.clone(), 20 * BLOCK as u64));
    plan.add(21, Do::Xor(close, 30 * BLOCK as u64 + 777))
        .add(0, Do::Label(2));
    plan.add(3, Do::Zero).add(4, Do::Zero).add(45, Do::Zero);
    let noise = rng.bytes(BLOCK);
    plan.add(38, Do::Replace(noise));
    match version {
        3 => {
            let many = text(rng, 8 * BLOCK);
            plan.add(50, Do::Replace(many));
        }
        _ => (50..58).for_each(|block| {
            let one = text(rng, BLOCK);
            plan.add(block, Do::Replace(one));
        }),
    }
    plan.add(0, Do::Label(3));
    plan
}

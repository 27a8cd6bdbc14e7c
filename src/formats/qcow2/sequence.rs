//! New images from the first byte to the last, for targets that cannot seek.
//!
//! The header, the refcount table and the first-level table come first; then data, with each
//! second-level table behind the data it leads to, and each refcount block behind the clusters it
//! counts.  So only the two tables at the front must be known ahead, and a first pass that writes
//! to nowhere learns them: memory grows by 8 bytes for each second-level table and each refcount
//! block, 1/65536 of the data or less with clusters of 64 KiB.

use std::collections::BTreeMap;
use std::io::Write;
use std::ops::Range;

use super::create::{self, Plan};
use super::entry::{COPIED, Layout};
use super::header::MAX_REFTABLE_BYTES;
use super::packing::clusters;
use super::refblock::Width;
use crate::error::{Error, ErrorKind, Result};
use crate::image::codec::Codec;
use crate::image::compress::{Encoder, Form, Sequence, Unit};
use crate::image::create::{CreateOptions, Preallocation};
use crate::image::options::OptionValues;
use crate::util::align::{clamp_len, down, len64};
use crate::util::buf::zeroes;

/// What the front of the image must know.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Tables {
    /// Second-level tables: which, and where.
    l2: Vec<(u64, u64)>,
    /// Refcount blocks, by index: where.
    blocks: Vec<u64>,
}

/// How far one pass is.
#[derive(Debug, Default)]
struct Pass {
    /// Bytes written.
    at: u64,
    tables: Tables,
    /// The second-level table that is being filled: which, and its bytes.
    l2: Option<(u64, Vec<u8>)>,
    /// Refcount blocks that are not written yet, by index.
    blocks: BTreeMap<u64, Vec<u8>>,
}

/// An image on its way.
#[derive(Debug)]
struct Ordered {
    layout: Layout,
    /// Of a refcount.
    width: Width,
    header: Vec<u8>,
    codec: Option<Codec>,
    /// Clusters of the refcount table and of the first-level table.
    reftable: Range<u64>,
    l1: Range<u64>,
    pass: Pass,
    /// What the first pass found.
    known: Option<Tables>,
}

/// The `sequence` of the registry row.
pub(super) fn sequence(
    options: &CreateOptions,
    data_clusters: u64,
    compress: Option<&OptionValues>,
) -> Result<Box<dyn Sequence>> {
    let plan = Plan::new(options)?;
    let external = plan.header.has_data_file();
    if external || plan.preallocation != Preallocation::Off || options.backing.is_some() {
        return Err(Error::unsupported(
            "a stream has no data file, no preallocation and no backing file",
        ));
    }
    let codec = compress.map(|values| Codec::new(plan.header.compression, values));
    let reftable = 1..1 + reftable_clusters(&plan, data_clusters);
    let l1 = reftable.end..reftable.end + plan.l1_clusters();
    Ok(Box::new(Ordered {
        layout: plan.header.layout(),
        width: Width::new(plan.header.refcount_order),
        header: create::header(&plan, l1.start, &reftable)?,
        codec: codec.transpose()?,
        reftable,
        l1,
        pass: Pass::default(),
        known: None,
    }))
}

/// Clusters of a refcount table that is long enough whatever is wasted between the units.
fn reftable_clusters(plan: &Plan, data_clusters: u64) -> u64 {
    let data = data_clusters.min(plan.clusters());
    // Each unit, table or block may leave the rest of the cluster before it empty.
    let tables = 2 * u64::from(plan.header.l1_len).min(data);
    let most = 3 * data + tables + plan.l1_clusters() + 16;
    let (_, blocks) = plan.refcounts(most);
    let (table, _) = plan.refcounts(most + blocks + 1);
    table.min(MAX_REFTABLE_BYTES.div_ceil(plan.cluster_size()))
}

fn write_all(out: &mut dyn Write, bytes: &[u8]) -> Result<()> {
    out.write_all(bytes)
        .map_err(|e| Error::io("write to the stream", e))
}

impl Ordered {
    fn size(&self) -> u64 {
        self.layout.cluster_size()
    }

    fn block_bits(&self) -> u32 {
        self.width.block_bits(self.layout.cluster_bits)
    }

    fn put(&mut self, bytes: &[u8], out: &mut dyn Write) -> Result<()> {
        self.pass.at += len64(bytes.len());
        write_all(out, bytes)
    }

    /// Writes zeroes up to an offset.
    fn pad(&mut self, to: u64, out: &mut dyn Write) -> Result<()> {
        while self.pass.at < to {
            let len = clamp_len(to - self.pass.at, zeroes().len());
            self.put(&zeroes()[..len], out)?;
        }
        Ok(())
    }

    /// Writes zeroes up to the next cluster.
    fn align(&mut self, out: &mut dyn Write) -> Result<()> {
        self.pad(self.pass.at.next_multiple_of(self.size()), out)
    }

    /// Counts clusters once more.
    fn count(&mut self, clusters: Range<u64>) -> Result<()> {
        let (width, bits) = (self.width, self.block_bits());
        let most = (self.reftable.end - self.reftable.start) * self.size() / 8;
        for cluster in clusters {
            let index = cluster >> bits;
            if index >= most {
                return Err(Error::new(
                    ErrorKind::NoSpace,
                    "the image gets larger than its refcount table was planned for",
                ));
            }
            let size = clamp_len(self.size(), usize::MAX);
            let block = self.pass.blocks.entry(index);
            let block = block.or_insert_with(|| vec![0; size]);
            let low = clamp_len(cluster - (index << bits), usize::MAX);
            let count = width.get(block, low) + 1;
            width.set(block, low, count);
        }
        Ok(())
    }

    /// How often a cluster was counted, as long as its block is not written.
    fn counted(&self, cluster: u64) -> u64 {
        let bits = self.block_bits();
        let block = self.pass.blocks.get(&(cluster >> bits));
        let low = clamp_len(cluster & ((1 << bits) - 1), usize::MAX);
        block.map_or(0, |block| self.width.get(block, low))
    }

    /// Writes the blocks whose clusters are all behind us.
    fn write_blocks(&mut self, out: &mut dyn Write) -> Result<()> {
        loop {
            let here = self.pass.at.div_ceil(self.size());
            match self.pass.blocks.first_key_value() {
                Some((index, _)) if (index + 1) << self.block_bits() <= here => {
                    self.write_block(out)?;
                }
                _ => return Ok(()),
            }
        }
    }

    /// Writes the first block, in a cluster of its own.
    fn write_block(&mut self, out: &mut dyn Write) -> Result<()> {
        self.align(out)?;
        let host = self.pass.at;
        self.count(clusters(host, 1, self.layout.cluster_bits))?;
        let Some((index, block)) = self.pass.blocks.pop_first() else {
            return Ok(());
        };
        let blocks = &mut self.pass.tables.blocks;
        blocks.resize(clamp_len(index, usize::MAX), 0);
        blocks.push(host);
        self.put(&block, out)
    }

    /// Writes the second-level table that was being filled.
    fn write_table(&mut self, out: &mut dyn Write) -> Result<()> {
        let Some((index, table)) = self.pass.l2.take() else {
            return Ok(());
        };
        self.write_blocks(out)?;
        self.align(out)?;
        let host = self.pass.at;
        self.count(clusters(host, 1, self.layout.cluster_bits))?;
        self.pass.tables.l2.push((index, host | COPIED));
        self.put(&table, out)
    }

    /// Sets the entry of a unit in the second-level table.
    fn enter(&mut self, unit: &Unit, words: &[u64]) {
        let per_table = self.size() / self.layout.entry_len();
        let entry = (unit.at / self.size()) % per_table * self.layout.entry_len();
        let entry = clamp_len(entry, usize::MAX);
        if let Some((_, table)) = &mut self.pass.l2 {
            let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_be_bytes()).collect();
            table[entry..entry + bytes.len()].copy_from_slice(&bytes);
        }
    }

    /// Writes one unit.
    fn unit(&mut self, unit: &Unit, bytes: &[u8], out: &mut dyn Write) -> Result<()> {
        self.write_blocks(out)?;
        let size = self.size();
        let within = self.pass.at % size;
        let full = self.counted(self.pass.at / size) >= self.width.max();
        if unit.form == Form::Plain || within != 0 && full {
            self.align(out)?;
            self.write_blocks(out)?;
        }
        let (host, len) = (self.pass.at, len64(bytes.len()));
        if host + len > self.layout.packed_limit() {
            let text = format!(
                "the image has no room left below {:#x}",
                self.layout.packed_limit()
            );
            return Err(Error::new(ErrorKind::NoSpace, text));
        }
        self.count(clusters(host, len, self.layout.cluster_bits))?;
        let words = match unit.form {
            Form::Packed(len) => self.layout.packed_words(host, len),
            Form::Plain => self.layout.stored_words(host),
        };
        self.enter(unit, &words);
        self.put(bytes, out)
    }

    /// Writes units of one second-level table: the compressed ones in one piece, then the others.
    fn units(&mut self, units: &[Unit], bytes: &[u8], out: &mut dyn Write) -> Result<()> {
        for plain in [false, true] {
            let mut at = 0;
            for unit in units {
                let len = clamp_len(unit.stored_len(self.size()), usize::MAX);
                let part = bytes.get(at..at + len);
                let part = part.ok_or_else(|| Error::invalid("fewer bytes than the units have"))?;
                if (unit.form == Form::Plain) == plain {
                    self.unit(unit, part, out)?;
                }
                at += len;
            }
        }
        Ok(())
    }

    /// Writes the entries of a table that begins here, up to the last one that is not zero.
    fn write_front(&mut self, entries: &[(u64, u64)], out: &mut dyn Write) -> Result<()> {
        let start = self.pass.at;
        for (index, word) in entries {
            self.pad(start + index * 8, out)?;
            self.put(&word.to_be_bytes(), out)?;
        }
        Ok(())
    }
}

impl Sequence for Ordered {
    fn cluster_size(&self) -> u64 {
        self.size()
    }

    fn encoder(&self) -> Result<Option<Box<dyn Encoder>>> {
        self.codec.map(Codec::encoder).transpose()
    }

    fn begin(&mut self, out: &mut dyn Write) -> Result<()> {
        self.pass = Pass::default();
        let size = self.size();
        let known = self.known.take();
        let header = self.header.clone();
        self.put(&header, out)?;
        self.align(out)?;
        if let Some(known) = &known {
            let blocks: Vec<(u64, u64)> = (0..).zip(known.blocks.iter().copied()).collect();
            self.write_front(&blocks, out)?;
            self.pad(self.reftable.end * size, out)?;
            self.write_front(&known.l2, out)?;
        }
        self.pad(self.l1.end * size, out)?;
        self.known = known;
        self.count(0..self.l1.end)
    }

    fn add(&mut self, units: &[Unit], bytes: &[u8], out: &mut dyn Write) -> Result<()> {
        let size = self.size();
        let covered = size / self.layout.entry_len() * size;
        let (mut units, mut bytes) = (units, bytes);
        while let Some(first) = units.first() {
            let index = first.at / covered;
            let end = down(first.at, covered).saturating_add(covered);
            let count = units.partition_point(|u| u.at < end);
            let (here, later) = units.split_at(count);
            let len: u64 = here.iter().map(|u| u.stored_len(size)).sum();
            let len = clamp_len(len, bytes.len());
            if self.pass.l2.as_ref().is_some_and(|(i, _)| *i != index) {
                self.write_table(out)?;
            }
            if self.pass.l2.is_none() {
                self.pass.l2 = Some((index, vec![0; clamp_len(size, usize::MAX)]));
            }
            self.units(here, &bytes[..len], out)?;
            (units, bytes) = (later, &bytes[len..]);
        }
        Ok(())
    }

    fn finish(&mut self, out: &mut dyn Write) -> Result<()> {
        self.write_table(out)?;
        self.write_blocks(out)?;
        while !self.pass.blocks.is_empty() {
            self.write_block(out)?;
        }
        let found = std::mem::take(&mut self.pass.tables);
        match self.known.replace(found) {
            Some(known) if self.known.as_ref() != Some(&known) => Err(Error::corrupt(
                "the source changed while it was read, so what was written is no image",
            )),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::options::OptionValues;

    fn options(text: &str) -> CreateOptions {
        CreateOptions {
            size: 40 << 20,
            values: OptionValues::parse(create::OPTIONS, "qcow2", [text]).expect("known"),
            ..CreateOptions::default()
        }
    }

    /// Units of both forms all over the disk, and bytes for them.
    fn units(size: u64, seed: u64) -> (Vec<Unit>, Vec<u8>) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let (mut units, mut bytes) = (Vec::new(), Vec::new());
        let mut at = 0;
        while at < 40 << 20 {
            let form = match rng.bool() {
                true => Form::Packed(rng.u64(1..size)),
                false => Form::Plain,
            };
            let unit = Unit { at, form };
            bytes.resize(
                bytes.len() + clamp_len(unit.stored_len(size), usize::MAX),
                7,
            );
            units.push(unit);
            at += rng.u64(1..40) * size;
        }
        (units, bytes)
    }

    fn pass(sequence: &mut dyn Sequence, seed: u64) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        let (units, bytes) = units(sequence.cluster_size(), seed);
        sequence.begin(&mut out)?;
        sequence.add(&units, &bytes, &mut out)?;
        sequence.finish(&mut out).map(|()| out)
    }

    #[test]
    fn both_passes_are_as_long_and_differ_at_the_front_alone() {
        for text in [
            "cluster_size=512",
            "cluster_size=512,refcount_bits=64",
            "cluster_size=4k,refcount_bits=1",
            "cluster_size=16k,extended_l2=on",
            "cluster_size=2M",
        ] {
            let mut sequence = sequence(&options(text), u64::MAX, None).expect("valid");
            let first = pass(&mut *sequence, 1).expect("memory takes all");
            let second = pass(&mut *sequence, 1).expect("memory takes all");
            assert_eq!(first.len(), second.len(), "{text}");
            assert!(len64(second.len()).is_multiple_of(sequence.cluster_size()));
            let same = first.iter().rev().zip(second.iter().rev());
            let same = same.take_while(|(a, b)| a == b).count();
            assert!(same < second.len() && same > second.len() / 2, "{text}");
        }
    }

    #[test]
    fn a_source_that_changed_between_the_passes_is_an_error() {
        let mut sequence = sequence(&options("cluster_size=4k"), 1 << 20, None).expect("valid");
        pass(&mut *sequence, 1).expect("memory takes all");
        let done = pass(&mut *sequence, 2).map(|bytes| bytes.len());
        let error = done.expect_err("other sizes");
        assert_eq!(error.kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn more_data_than_was_planned_for_is_an_error_and_no_panic() {
        let options = options("cluster_size=512,refcount_bits=64");
        let mut sequence = sequence(&options, 0, None).expect("valid");
        let done = pass(&mut *sequence, 1).map(|bytes| bytes.len());
        let error = done.expect_err("no room in the refcount table");
        assert_eq!(error.kind(), ErrorKind::NoSpace);
    }
}

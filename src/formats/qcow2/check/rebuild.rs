//! A new refcount structure, behind everything that the file holds.

use super::Checker;
use super::refs;
use crate::error::{Error, ErrorKind, Result};
use crate::formats::qcow2::header::MAX_REFTABLE_BYTES;
use crate::formats::qcow2::refcount::HEADER_FIELD;
use crate::util::align::{clamp_len, len64};

/// Where the new structure goes, in clusters.
#[derive(Debug)]
struct Plan {
    /// First cluster of the table; the blocks follow it.
    start: u64,
    table: u64,
    /// Indices of the blocks that are needed, ascending.
    blocks: Vec<u64>,
}

impl Plan {
    fn end(&self) -> u64 {
        self.start + self.table + len64(self.blocks.len())
    }
}

impl Checker<'_> {
    /// Writes all counts into a new table and new blocks, then has the header point there.  The
    /// old structure is not used any more and becomes free with that.
    pub(super) fn rebuild(&mut self) -> Result<()> {
        self.forget_structure();
        let bits = self.width().block_bits(self.layout.cluster_bits);
        let most = MAX_REFTABLE_BYTES.max(self.layout.cluster_size());
        if self.clusters() >> bits >= most / 8 {
            let text = format!(
                "a new refcount table behind {:#x} would have more than {most} bytes",
                self.file.size()
            );
            return Err(Error::new(ErrorKind::OutOfRange, text));
        }
        let plan = self.plan();
        let table_bytes = plan.table << self.layout.cluster_bits;
        let clusters = u32::try_from(plan.table)
            .ok()
            .filter(|_| table_bytes <= most);
        let Some(clusters) = clusters else {
            let text = format!("the new refcount table has {table_bytes} bytes (allowed: {most})");
            return Err(Error::new(ErrorKind::OutOfRange, text));
        };
        let mut table = vec![0; clamp_len(table_bytes, usize::MAX)];
        for (number, index) in plan.blocks.iter().enumerate() {
            let host = (plan.start + plan.table + len64(number)) << self.layout.cluster_bits;
            let bytes = self.block(*index, &plan);
            self.file.write_at(&bytes, host)?;
            let entry = clamp_len(index * 8, usize::MAX);
            table[entry..entry + 8].copy_from_slice(&host.to_be_bytes());
        }
        let start = plan.start << self.layout.cluster_bits;
        self.file.write_at(&table, start)?;
        self.file.sync()?;
        let mut field = start.to_be_bytes().to_vec();
        field.extend(clusters.to_be_bytes());
        self.file.write_at(&field, HEADER_FIELD)?;
        self.file.sync()?;
        self.differs.retain(|_, _| false);
        self.report.image_end_offset = plan.end() << self.layout.cluster_bits;
        self.unusable = false;
        Ok(())
    }

    /// What the old structure takes is not counted.
    fn forget_structure(&mut self) {
        let sole = std::mem::take(&mut self.sole);
        for (what, clusters) in sole {
            if what.starts_with(refs::BLOCK) || what.starts_with(refs::TABLE) {
                clusters.for_each(|cluster| self.counts.drop_one(cluster));
            } else {
                self.sole.push((what, clusters));
            }
        }
    }

    /// The count that a cluster gets.
    fn new_count(&self, cluster: u64, plan: &Plan) -> u64 {
        if (plan.start..plan.end()).contains(&cluster) {
            return 1;
        }
        let found = self.counts.get(cluster);
        // What could not be followed may refer to any cluster, so none is free.
        let least = u64::from(!self.is_complete() && cluster < plan.start);
        found.max(least).min(self.width().max())
    }

    fn block(&self, index: u64, plan: &Plan) -> Vec<u8> {
        let width = self.width();
        let bits = width.block_bits(self.layout.cluster_bits);
        let mut bytes = vec![0; clamp_len(self.layout.cluster_size(), usize::MAX)];
        for within in 0..1usize << bits {
            let count = self.new_count((index << bits) + len64(within), plan);
            if count > 0 {
                width.set(&mut bytes, within, count);
            }
        }
        bytes
    }

    fn plan(&self) -> Plan {
        let bits = self.width().block_bits(self.layout.cluster_bits);
        let start = self.clusters();
        let used = |index: &u64| {
            !self.is_complete()
                || !self
                    .counts
                    .is_empty(index << bits..((index + 1) << bits).min(start))
        };
        let before: Vec<u64> = (0..start.div_ceil(1 << bits)).filter(used).collect();
        let mut plan = Plan {
            start,
            table: 1,
            blocks: before.clone(),
        };
        loop {
            let own = plan.start >> bits..((plan.end() - 1) >> bits) + 1;
            let last = own.end;
            let mut blocks = before.clone();
            blocks.extend(own.filter(|index| before.last() != Some(index)));
            let table = (last * 8).div_ceil(self.layout.cluster_size());
            if table == plan.table && blocks.len() == plan.blocks.len() {
                return plan;
            }
            plan = Plan {
                start,
                table,
                blocks,
            };
        }
    }
}

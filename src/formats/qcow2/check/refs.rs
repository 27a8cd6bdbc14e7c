//! The refcount structure itself, and the counts in it beside those that were found.

use std::ops::Range;

use super::Checker;
use super::tables::words;
use crate::error::Result;
use crate::formats::qcow2::header::MAX_REFTABLE_BYTES;
use crate::formats::qcow2::refblock::Width;
use crate::image::check::{Repair, Severity};
use crate::util::align::{clamp_len, is_aligned, len64};

/// What findings call the refcount table.
pub(super) const TABLE: &str = "the refcount table";
/// What findings call a refcount block.
pub(super) const BLOCK: &str = "refcount block";
/// Wrong counts remembered one by one.
const MAX_DIFFERS: usize = 1 << 20;

/// Neighbouring clusters whose counts are wrong in the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Wrong {
    first: u64,
    len: u64,
    /// As the file has it.
    is: u64,
    /// As it was counted.
    expected: u64,
    done: bool,
}

impl Checker<'_> {
    pub(super) fn width(&self) -> Width {
        Width::new(self.header.refcount_order)
    }

    /// Clusters that the file has, the last in part.
    pub(super) fn clusters(&self) -> u64 {
        self.file.size().div_ceil(self.layout.cluster_size())
    }

    /// Counts the refcount table and the blocks; where each block is.
    pub(super) fn refcount_table(&mut self) -> Result<Vec<Option<u64>>> {
        let (start, size) = (self.header.reftable_offset, self.layout.cluster_size());
        let len = u64::from(self.header.reftable_clusters) << self.layout.cluster_bits;
        let placed = start != 0 && is_aligned(start, size) && start < self.file.size();
        if !placed || len == 0 || len > MAX_REFTABLE_BYTES.max(size) {
            self.unusable = true;
            self.structure.push(format!(
                "{TABLE} has {len} bytes at {start:#x} (allowed: 1 to {MAX_REFTABLE_BYTES}, in clusters of the file)"
            ));
            return Ok(Vec::new());
        }
        if !self.mark_sole(TABLE.to_owned(), start..start.saturating_add(len))? {
            self.unusable = true;
            return Ok(Vec::new());
        }
        let mut bytes = vec![0; clamp_len(len, usize::MAX)];
        self.file.read_at(&mut bytes, start)?;
        let mut blocks = Vec::new();
        for (index, word) in words(&bytes).enumerate() {
            blocks.push(self.refcount_block(index, word)?);
        }
        Ok(blocks)
    }

    fn refcount_block(&mut self, index: usize, word: u64) -> Result<Option<u64>> {
        let size = self.layout.cluster_size();
        let host = match self.layout.refcount_block(word, self.file.size()) {
            Ok(Some(host)) => host,
            Ok(None) => return Ok(None),
            Err(fault) => {
                self.unusable = true;
                self.structure.push(format!("{BLOCK} {index} {fault}"));
                return Ok(None);
            }
        };
        self.mark_sole(format!("{BLOCK} {index}"), host..host + size)?;
        Ok(Some(host))
    }

    /// Compares the counts of all blocks, and sets them right where that is allowed.
    pub(super) fn compare(&mut self, blocks: &[Option<u64>]) -> Result<()> {
        for text in std::mem::take(&mut self.structure) {
            let done = self.rebuilds().then(|| "made anew".to_owned());
            self.report.add(Severity::Corruption, 1, text, done);
        }
        let bits = self.width().block_bits(self.layout.cluster_bits);
        let host = |index: u64| {
            let index = usize::try_from(index).ok()?;
            blocks.get(index).copied().flatten()
        };
        let mut indices = self.counts.blocks(bits);
        // A used cluster that has no block: the structure must grow, so it is made anew.
        self.unusable |= indices.iter().any(|index| {
            let span = index << bits..(index + 1) << bits;
            host(*index).is_none() && span.into_iter().any(|c| self.counts.get(c) > 0)
        });
        let known = (0..len64(blocks.len())).filter(|index| host(*index).is_some());
        indices.extend(known);
        indices.sort_unstable();
        indices.dedup();
        for index in indices {
            self.progress.check()?;
            let first = index << bits;
            self.compare_block(host(index), first..first + (1 << bits))?;
        }
        Ok(())
    }

    fn compare_block(&mut self, host: Option<u64>, clusters: Range<u64>) -> Result<()> {
        if host.is_none() && self.counts.is_empty(clusters.clone()) {
            return Ok(());
        }
        let width = self.width();
        let mut bytes = vec![0; clamp_len(self.layout.cluster_size(), usize::MAX)];
        if let Some(host) = host {
            self.file.read_at(&mut bytes, host)?;
        }
        let all = self.clusters();
        let mut wrong: Option<Wrong> = None;
        let mut changed: Option<Range<usize>> = None;
        for (index, cluster) in clusters.enumerate() {
            let (is, expected) = (width.get(&bytes, index), self.counts.get(cluster));
            if (is > 0 || expected > 0) && cluster < all {
                let end = (cluster + 1) << self.layout.cluster_bits;
                self.report.image_end_offset = self.report.image_end_offset.max(end);
            }
            if is == expected {
                continue;
            }
            let (set, done) = self.decide(is, expected);
            if set {
                width.set(&mut bytes, index, expected);
                if is > expected && expected == 1 {
                    self.lowered.insert(cluster);
                }
                let first = changed.map_or(index, |c| c.start);
                changed = Some(first..index + 1);
            }
            if !done && self.differs.len() < MAX_DIFFERS {
                self.differs.insert(cluster, is);
            }
            match &mut wrong {
                Some(w)
                    if w.first + w.len == cluster
                        && (w.is, w.expected, w.done) == (is, expected, done) =>
                {
                    w.len += 1;
                }
                _ => {
                    if let Some(before) = wrong.take() {
                        self.found(before);
                    }
                    wrong = Some(Wrong {
                        first: cluster,
                        len: 1,
                        is,
                        expected,
                        done,
                    });
                }
            }
        }
        if let Some(last) = wrong {
            self.found(last);
        }
        if let (Some(changed), Some(host)) = (changed, host) {
            let part = width.bytes(changed.start, changed.end);
            self.file
                .write_at(&bytes[part.clone()], host + len64(part.start))?;
        }
        Ok(())
    }

    /// Whether a wrong count is set in its block, and whether the repair mends it at all.
    fn decide(&self, is: u64, expected: u64) -> (bool, bool) {
        // A count of 1 goes with a flag, which is for later: no more of them than can be kept.
        let room = expected != 1 || self.lowered.len() < MAX_DIFFERS;
        let mends = match self.repair {
            Repair::Nothing => false,
            Repair::Leaks => is > expected && self.is_complete() && room,
            Repair::All => (is < expected || self.is_complete()) && expected <= self.width().max(),
        };
        (
            mends && !self.unusable,
            mends && (!self.unusable || self.rebuilds()),
        )
    }

    fn found(&mut self, wrong: Wrong) {
        let Wrong {
            first,
            len,
            is,
            expected,
            done,
        } = wrong;
        let severity = if is > expected {
            Severity::Leak
        } else {
            Severity::Corruption
        };
        let start = first << self.layout.cluster_bits;
        let which = match len {
            1 => format!("cluster {first} at {start:#x} has"),
            _ => format!(
                "clusters {first} to {} from {start:#x} have",
                first + len - 1
            ),
        };
        let text = format!("{which} refcount {is} (used: {expected})");
        let done = done.then(|| "set right".to_owned());
        self.report.add(severity, len, text, done);
    }
}

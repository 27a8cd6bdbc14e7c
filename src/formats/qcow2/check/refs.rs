//! The refcount structure itself, and the counts in it beside those that were found.

use std::ops::Range;

use super::Checker;
use crate::error::Result;
use crate::formats::qcow2::header::MAX_REFTABLE_BYTES;
use crate::formats::qcow2::refblock::{Place, Width};
use crate::image::be64;
use crate::image::check::{Repair, Severity};
use crate::util::align::{clamp_len, is_aligned, len64};
use crate::util::range;

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

impl Wrong {
    fn continues(&self, next: &Self) -> bool {
        let same = |w: &Self| (w.is, w.expected, w.done);
        self.first + self.len == next.first && same(self) == same(next)
    }
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
        let place = Place::of(&self.header);
        let (table, size) = (place.table_range(), self.layout.cluster_size());
        let (start, len) = (table.start, range::len(&table));
        let placed = start != 0 && is_aligned(start, size) && start < self.file.size();
        if !placed || len == 0 || len > place.most_table_bytes() {
            self.unusable = true;
            self.structure.push(format!(
                "{TABLE} has {len} bytes at {start:#x} (allowed: 1 to {MAX_REFTABLE_BYTES}, in clusters of the file)"
            ));
            return Ok(Vec::new());
        }
        if !self.mark_sole(TABLE.to_owned(), table.clone())? {
            self.unusable = true;
            return Ok(Vec::new());
        }
        let words = be64::read(self.file, table)?.into_iter().enumerate();
        words
            .map(|(i, word)| self.refcount_block(i, word))
            .collect()
    }

    fn refcount_block(&mut self, index: usize, word: u64) -> Result<Option<u64>> {
        let size = self.layout.cluster_size();
        let host = match Place::of(&self.header).block(word, self.file.size()) {
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
        let size = self.layout.cluster_size();
        let mut bytes = match host {
            Some(host) => be64::read_bytes(self.file, host..host + size)?,
            None => vec![0; clamp_len(size, usize::MAX)],
        };
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
            let next = Wrong {
                first: cluster,
                len: 1,
                is,
                expected,
                done,
            };
            match &mut wrong {
                Some(last) if last.continues(&next) => last.len += 1,
                _ => wrong.replace(next).into_iter().for_each(|w| self.found(w)),
            }
        }
        wrong.into_iter().for_each(|last| self.found(last));
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
        let severity = match wrong.is > wrong.expected {
            true => Severity::Leak,
            false => Severity::Corruption,
        };
        let start = wrong.first << self.layout.cluster_bits;
        let (first, last) = (wrong.first, wrong.first + wrong.len - 1);
        let which = match wrong.len {
            1 => format!("cluster {first} at {start:#x} has"),
            _ => format!("clusters {first} to {last} from {start:#x} have"),
        };
        let text = format!("{which} refcount {} (used: {})", wrong.is, wrong.expected);
        let done = wrong.done.then(|| "set right".to_owned());
        self.report.add(severity, wrong.len, text, done);
    }
}

//! `check`: the list of operations, all data decoded, and whether a merge keeps what it still needs.

use parking_lot::Mutex;

use super::header::BLOCK;
use super::image::{AndroidCow, is_plain};
use super::ops::Kind;
use super::table::{Entry, Table};
use crate::error::{ErrorKind, Result};
use crate::image::check::{Check, Repair, Report, Severity};
use crate::util::align::{clamp_len, len64};
use crate::util::parallel;
use crate::util::progress::Progress;

/// Operations that one thread takes at a time.
const BATCH: usize = 256;

/// A step of a merge that reads what one before it overwrites.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Unsafe {
    /// Which step it is, counted from 0.
    pub(super) step: usize,
    /// The block that it makes, and the one that is gone by then.
    pub(super) block: u64,
    pub(super) reads: u64,
}

/// Judges a merge by what each step overwrites and reads: tells `found` of steps, from the one at
/// `first` on, that read a block which a step before them overwrites.
pub(super) fn judge(table: &Table, order: &[u32], first: usize, found: &mut dyn FnMut(Unsafe)) {
    let mut done = vec![false; table.entries.len()];
    for (step, place) in order.iter().enumerate() {
        let place = *place as usize;
        let Some(entry) = table.entries.get(place) else {
            continue;
        };
        if step >= first {
            let gone = reads(entry).into_iter().flatten().find(|block| {
                let place = table.find(*block).ok();
                place.is_some_and(|place| done.get(place) == Some(&true))
            });
            if let Some(reads) = gone {
                found(Unsafe {
                    step,
                    block: u64::from(entry.block),
                    reads,
                });
            }
        }
        if let Some(done) = done.get_mut(place) {
            *done = true;
        }
    }
}

/// The blocks of the disk below that an operation reads: two where they begin within one.
fn reads(entry: &Entry) -> [Option<u64>; 2] {
    match entry.kind() {
        Kind::Copy => [Some(entry.source()), None],
        Kind::Xor => {
            let first = entry.source() / BLOCK;
            let second = (!entry.source().is_multiple_of(BLOCK)).then_some(first + 1);
            [Some(first), second]
        }
        _ => [None, None],
    }
}

impl AndroidCow {
    /// Decodes all data; what does not decode is told in the order of the blocks.
    fn decode_all(&self, progress: &dyn Progress, report: &mut Report) -> Result<()> {
        let wrong = Mutex::new((Vec::new(), 0_u64));
        let mut batches = self.table.entries.chunks(BATCH);
        parallel::for_each(parallel::cores(), &mut batches, Vec::new, |buf, entries| {
            progress.check()?;
            for entry in entries {
                if !matches!(entry.kind(), Kind::Replace | Kind::Xor) {
                    continue;
                }
                let blocks = entry.blocks();
                buf.resize(
                    clamp_len((blocks.end - blocks.start) * BLOCK, usize::MAX),
                    0,
                );
                match self.decode(entry, buf) {
                    Err(e) if e.kind() == ErrorKind::Corrupt => {
                        let mut wrong = wrong.lock();
                        wrong.1 += 1;
                        wrong.0.push((entry.block, e.message().to_owned()));
                        // As many as are told, from the first block on.
                        if wrong.0.len() >= 2 * Report::MAX_FINDINGS {
                            wrong.0.sort();
                            wrong.0.truncate(Report::MAX_FINDINGS);
                        }
                    }
                    done => done?,
                }
                progress.advance(entry.data().end - entry.data().start);
            }
            crate::Result::Ok(())
        })?;
        let (mut wrong, count) = wrong.into_inner();
        wrong.sort();
        wrong.truncate(Report::MAX_FINDINGS);
        let more = count - len64(wrong.len());
        for (_, text) in wrong {
            report.corruption(text, None);
        }
        if more > 0 {
            let text = format!("the data of {more} more operations is damaged");
            report.add(Severity::Corruption, more, text, None);
        }
        Ok(())
    }

    fn judge_merge(&self, report: &mut Report) -> Result<()> {
        let order = self
            .table
            .merge_order(&*self.storage, &self.header, self.end)?;
        let first = clamp_len(self.header.merged, usize::MAX);
        judge(&self.table, &order, first, &mut |found| {
            report.corruption(
                format!(
                    "a merge would lose data: step {} makes block {} of block {}, which a step before it overwrites",
                    found.step, found.block, found.reads
                ),
                None,
            );
        });
        Ok(())
    }
}

impl Check for AndroidCow {
    fn check(&self, _repair: Repair, progress: &dyn Progress) -> Result<Report> {
        let mut report = Report {
            image_end_offset: self.storage.size(),
            ..Report::default()
        };
        for fault in &self.faults {
            report.corruption(fault.clone(), None);
        }
        let blocks = |entry: &Entry| entry.blocks().end - entry.blocks().start;
        report.total_clusters = crate::image::Image::virtual_size(self).div_ceil(BLOCK);
        for entry in &self.table.entries {
            report.allocated_clusters += blocks(entry);
            if matches!(entry.kind(), Kind::Replace | Kind::Xor) && !is_plain(entry) {
                report.compressed_clusters += blocks(entry);
            }
        }
        self.decode_all(progress, &mut report)?;
        if self.faults.is_empty() {
            self.judge_merge(&mut report)?;
        }
        Ok(report)
    }

    fn work(&self) -> u64 {
        let data = self.table.entries.iter();
        let data = data.filter(|e| matches!(e.kind(), Kind::Replace | Kind::Xor));
        data.map(|e| e.data().end - e.data().start).sum::<u64>()
    }
}

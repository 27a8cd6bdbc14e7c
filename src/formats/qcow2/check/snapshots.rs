//! The snapshot table: where each snapshot keeps its first-level table.

use super::Checker;
use super::tables::FirstLevel;
use crate::error::Result;
use crate::formats::qcow2::header::{Header, MAX_L1_BYTES, MAX_SNAPSHOTS};
use crate::formats::qcow2::refcount::Step;
use crate::formats::qcow2::snapshot_table::{EXTRA_V3, SnapshotTable};
use crate::formats::qcow2::switch::switch;
use crate::image::check::{Repair, Severity};
use crate::util::align::{clamp_len, is_aligned, len64};

/// Bytes of an entry before its extra data.
const FIXED: usize = 40;
/// Most bytes of extra data, as QEMU has it.
const MAX_EXTRA: u64 = 1024;
/// Longest table in bytes, as QEMU has it.
const MAX_BYTES: u64 = 64 << 20;

impl Checker<'_> {
    /// The first-level tables of all snapshots; counts the snapshot table.
    pub(super) fn snapshots(&mut self) -> Result<Vec<FirstLevel>> {
        let (count, start) = (self.header.snapshot_count, self.header.snapshots_offset);
        if count == 0 {
            return Ok(Vec::new());
        }
        let aligned = start != 0 && is_aligned(start, self.layout.cluster_size());
        if count > MAX_SNAPSHOTS || !aligned || start >= self.file.size() {
            self.complete = false;
            self.corrupt(format!(
                "the snapshot table has {count} entries at {start:#x} (allowed: {MAX_SNAPSHOTS}, in a cluster of the file)"
            ));
            return Ok(Vec::new());
        }
        let mut list = Vec::new();
        let mut at = start;
        for index in 0..count {
            let Some(end) = self.snapshot(index, at, &mut list)? else {
                self.complete = false;
                break;
            };
            at = end;
            // The padding of the last entry need not be there.
            if at - start > MAX_BYTES || at > self.file.size().next_multiple_of(8) {
                self.complete = false;
                self.corrupt(format!(
                    "the snapshot table ends at {at:#x} (allowed: {MAX_BYTES} bytes, within the file)"
                ));
                break;
            }
        }
        self.mark_sole("the snapshot table".to_owned(), start..at)?;
        Ok(list)
    }

    /// One entry; where the next one begins.
    fn snapshot(&mut self, index: u32, at: u64, list: &mut Vec<FirstLevel>) -> Result<Option<u64>> {
        let mut entry = [0; FIXED];
        self.file.read_at(&mut entry, at)?;
        let number = |range: std::ops::Range<usize>| {
            entry[range]
                .iter()
                .fold(0, |value: u64, byte| value << 8 | u64::from(*byte))
        };
        let (offset, len) = (number(0..8), number(8..12));
        let (id, name, extra) = (number(12..14), number(14..16), number(36..40));
        if extra > MAX_EXTRA {
            self.corrupt(format!(
                "snapshot {index} has {extra} bytes of extra data (allowed: {MAX_EXTRA})"
            ));
            return Ok(None);
        }
        if self.header.version >= 3 && extra < len64(EXTRA_V3) {
            self.incomplete.push((index, extra));
        }
        let nowhere = offset == 0 && len > 0;
        let aligned = is_aligned(offset, self.layout.cluster_size());
        if nowhere || !aligned || len * 8 > MAX_L1_BYTES {
            self.complete = false;
            self.corrupt(format!(
                "the L1 table of snapshot {index} has {len} entries at {offset:#x} (allowed: {}, at a non-zero multiple of {:#x})",
                MAX_L1_BYTES / 8,
                self.layout.cluster_size()
            ));
        } else {
            list.push(FirstLevel {
                what: format!("the L1 table of snapshot {index}"),
                offset,
                len,
                active: false,
                number: list.len() + 2,
            });
        }
        Ok(Some(
            (at + len64(FIXED) + extra + id + name).next_multiple_of(8),
        ))
    }

    /// Reports entries that lack what version 3 has.  Where all else is sound, a repair writes the
    /// table anew, with what they are taken for meanwhile.
    pub(super) fn complete_snapshots(&mut self) -> Result<()> {
        let incomplete = std::mem::take(&mut self.incomplete);
        if incomplete.is_empty() {
            return Ok(());
        }
        let mends = self.is_sound() && self.repair == Repair::All;
        if mends {
            self.replace_snapshot_table()?;
        }
        for (index, extra) in incomplete {
            let text = format!(
                "snapshot {index} has {extra} bytes of extra data (expected: at least {EXTRA_V3})"
            );
            let done = mends.then(|| "completed".to_owned());
            self.report.add(Severity::Corruption, 1, text, done);
        }
        Ok(())
    }

    fn replace_snapshot_table(&mut self) -> Result<()> {
        let file = self.file;
        file.sync()?;
        let mut header = Header::read(file)?;
        let mut table = SnapshotTable::read(file, &header)?;
        let bits = header.cluster_bits;
        let clusters = |bytes: &[u8]| len64(bytes.len()).div_ceil(1 << bits);
        let old = header.snapshots_offset >> bits;
        let old = old..old + clusters(&table.encode()?);
        table.complete(header.size);
        let mut bytes = table.encode()?;
        let mut refcounts = self.refcounts_now()?;
        let count = clusters(&bytes);
        let taken = refcounts.take(file, count..count + 1, &self.unused())?;
        bytes.resize(clamp_len(count << bits, usize::MAX), 0);
        file.write_at(&bytes, taken.host)?;
        // The table of counts may have moved to make room.
        header = Header {
            snapshots_offset: taken.host,
            ..Header::read(file)?
        };
        switch(file, &header)?;
        self.report.image_end_offset =
            (self.report.image_end_offset).max(taken.clusters.end << bits);
        refcounts.step(file, old, Step::Down)
    }
}

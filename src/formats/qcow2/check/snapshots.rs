//! The snapshot table: where each snapshot keeps its first-level table.

use super::Checker;
use super::tables::FirstLevel;
use crate::error::{ErrorKind, Result};
use crate::formats::qcow2::header::{Header, MAX_L1_BYTES, MAX_SNAPSHOTS};
use crate::formats::qcow2::refcount::Step;
use crate::formats::qcow2::snapshot_table::{EXTRA_V3, Entry, Reader, SnapshotTable};
use crate::formats::qcow2::switch::switch;
use crate::image::be64;
use crate::image::check::{Repair, Severity};
use crate::util::align::{clamp_len, is_aligned, len64};

impl Checker<'_> {
    /// The first-level tables of all snapshots; counts the snapshot table.
    pub(super) fn snapshots(&mut self) -> Result<Vec<FirstLevel>> {
        let (count, start) = (self.header.snapshot_count, self.header.snapshots_offset);
        if count == 0 {
            return Ok(Vec::new());
        }
        let aligned = start != 0 && is_aligned(start, self.layout.cluster_size());
        if count > MAX_SNAPSHOTS || !aligned || start >= self.file.size() {
            self.lost(format!(
                "the snapshot table has {count} entries at {start:#x} (allowed: {MAX_SNAPSHOTS}, in a cluster of the file)"
            ));
            return Ok(Vec::new());
        }
        let mut list = Vec::new();
        let mut reader = Reader::new(self.file, &self.header);
        let mut end = start;
        for index in 0..clamp_len(u64::from(count), usize::MAX) {
            match reader.entry(index) {
                Ok(entry) => {
                    self.snapshot(index, &entry, &mut list);
                    end = reader.at;
                }
                Err(e) if e.kind() == ErrorKind::Corrupt => {
                    self.lost(e.message().to_owned());
                    break;
                }
                Err(e) => return Err(e),
            }
        }
        // The padding of the last entry need not be there.
        self.mark_sole("the snapshot table".to_owned(), start..end)?;
        Ok(list)
    }

    fn snapshot(&mut self, index: usize, entry: &Entry, list: &mut Vec<FirstLevel>) {
        let (offset, len) = (entry.l1().start, u64::from(entry.l1_len()));
        if self.header.version >= 3 && entry.extra_len() < EXTRA_V3 {
            self.incomplete.push((index, entry.extra_len()));
        }
        let nowhere = offset == 0 && len > 0;
        let aligned = is_aligned(offset, self.layout.cluster_size());
        if nowhere || !aligned || len * 8 > MAX_L1_BYTES {
            self.lost(format!(
                "the L1 table of snapshot {index} has {len} entries at {offset:#x} (allowed: {}, at a non-zero multiple of {:#x})",
                MAX_L1_BYTES / 8,
                self.layout.cluster_size()
            ));
            return;
        }
        list.push(FirstLevel {
            what: format!("the L1 table of snapshot {index}"),
            offset,
            len,
            active: false,
            number: list.len() + 2,
        });
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
        let (start, len) = (header.snapshots_offset, len64(table.encode()?.len()));
        let old = self.layout.clusters(&(start..start + len));
        table.complete(header.size);
        let (bytes, size) = (table.encode()?, self.layout.cluster_size());
        let mut refcounts = self.refcounts_now()?;
        let count = len64(bytes.len()).div_ceil(size);
        let taken = refcounts.take(count..count + 1, &self.unused())?;
        be64::write_padded(file, bytes, taken.host, size)?;
        // The table of counts may have moved to make room.
        header = Header {
            snapshots_offset: taken.host,
            ..Header::read(file)?
        };
        switch(file, &header)?;
        let end = taken.bytes(size).end;
        self.report.image_end_offset = self.report.image_end_offset.max(end);
        refcounts.step(old, Step::Down)
    }
}

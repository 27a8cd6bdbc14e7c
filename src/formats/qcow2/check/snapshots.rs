//! The snapshot table: where each snapshot keeps its first-level table.

use super::Checker;
use super::tables::FirstLevel;
use crate::error::Result;
use crate::formats::qcow2::header::{MAX_L1_BYTES, MAX_SNAPSHOTS};
use crate::util::align::{is_aligned, len64};

/// Bytes of an entry before its extra data.
const FIXED: usize = 40;
/// Most bytes of extra data, as QEMU has it.
const MAX_EXTRA: u64 = 1024;
/// Extra data that an entry has in version 3: size of the VM state and of the disk.
const EXTRA_V3: u64 = 16;
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
            if at - start > MAX_BYTES || at > self.file.size() {
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
        if self.header.version >= 3 && extra < EXTRA_V3 {
            self.corrupt(format!(
                "snapshot {index} has {extra} bytes of extra data (expected: at least {EXTRA_V3})"
            ));
        }
        let aligned = is_aligned(offset, self.layout.cluster_size());
        if !aligned || len * 8 > MAX_L1_BYTES {
            self.complete = false;
            self.corrupt(format!(
                "the L1 table of snapshot {index} has {len} entries at {offset:#x} (allowed: {}, at a multiple of {:#x})",
                MAX_L1_BYTES / 8,
                self.layout.cluster_size()
            ));
        } else {
            list.push(FirstLevel {
                what: format!("the L1 table of snapshot {index}"),
                offset,
                len,
                active: false,
            });
        }
        Ok(Some(
            (at + len64(FIXED) + extra + id + name).next_multiple_of(8),
        ))
    }
}

//! Internal snapshots: a first-level table of their own, everything below it shared.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::Qcow2;
use super::bitmap_copy::Resized;
use super::entry::Layout;
use super::header::{Header, MAX_L1_BYTES};
use super::lookup::Tables;
use super::refcount::{Place, Refcounts};
use super::rewrite::{Needs, Replaced, Rewrite};
use super::snapshot_table::{Entry, SnapshotTable};
use crate::error::{Error, ErrorKind, Result};
use crate::image::snapshot::{Pick, Snapshots};
use crate::util::align::{clamp_len, len64};
use crate::util::text::printable;

/// Longest name in bytes, as QEMU has it.
const MAX_NAME: usize = 255;

impl Qcow2 {
    /// The table, for a change of it; the header is looked at again first.
    fn snapshots_for_change(&mut self) -> Result<SnapshotTable> {
        self.writer()?;
        self.reload()?;
        if self.has_data_file() {
            return Err(Error::unsupported(
                "an image with an external data file has no internal snapshots",
            ));
        }
        SnapshotTable::read(&*self.file, &self.header)
    }

    /// The words of a first-level table.
    pub(super) fn read_l1(&self, offset: u64, len: u32) -> Result<Vec<u64>> {
        let len = (u64::from(len) * 8).min(MAX_L1_BYTES);
        let mut bytes = vec![0; clamp_len(len, usize::MAX)];
        self.file.read_at(&mut bytes, offset)?;
        let word = |bytes: &[u8]| bytes.first_chunk().copied().map_or(0, u64::from_be_bytes);
        Ok(bytes.chunks_exact(8).map(word).collect())
    }

    /// Looks at the header again, after it was switched.
    pub(super) fn reload(&mut self) -> Result<()> {
        let header = Header::read(&*self.file)?;
        self.tables = Tables::new(
            self.layout,
            header.l2_bits(),
            header.l1_offset,
            u64::from(header.l1_len),
            self.has_data_file(),
        );
        self.decoded.clear();
        if let Some(writer) = &self.writer {
            let mut refcounts = writer.refcounts.lock();
            *refcounts = Refcounts::new(
                Place::of(&header),
                self.file.size(),
                writer.allocator.order.policy(),
            );
            writer.allocator.begin_again();
            writer.header_was_read();
        }
        self.layout.version = header.version;
        self.size = AtomicU64::new(header.size);
        self.header = header;
        Ok(())
    }

    /// Has `change` prepare a rewrite, commits it, and looks at the header again.
    pub(super) fn rewrite(
        &mut self,
        needs: &Needs<'_>,
        change: impl FnOnce(&mut Rewrite<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut rewrite = Rewrite::begin(self, needs)?;
        change(&mut rewrite)?;
        let done = rewrite.commit();
        self.reload()?;
        done
    }

    pub(super) fn active_l1(&self) -> Result<Vec<u64>> {
        let table = self.tables.first_level();
        let len = u32::try_from(table.len).unwrap_or(u32::MAX);
        self.read_l1(table.offset, len)
    }

    fn do_create(&mut self, name: &OsStr, now: SystemTime) -> Result<()> {
        let mut table = self.snapshots_for_change()?;
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(Error::invalid(format!(
                "the snapshot's name '{}' has {} bytes (allowed: 1 to {MAX_NAME})",
                printable(name),
                name.len()
            )));
        }
        let date = now.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let entry = Entry::new(table.free_id(), name, date, self.size());
        table.entries.push(entry);
        let table_len = len64(table.encode()?.len());
        let mut l1 = self.active_l1()?;
        let l1_len = len64(l1.len()) * 8;
        let needs = Needs {
            tables: count_tables(&l1),
            runs: &[l1_len, l1_len, table_len],
            refcount_order: self.header.refcount_order,
        };
        self.rewrite(&needs, |rewrite| {
            rewrite.share_tables(&mut l1, Replaced::Everywhere)?;
            replace_l1(rewrite, &l1)?;
            let copy = rewrite.run();
            write_l1(rewrite, &l1, copy)?;
            let len = rewrite.header.l1_len;
            table
                .entries
                .iter_mut()
                .rev()
                .take(1)
                .for_each(|e| e.set_l1(copy, len));
            replace_table(rewrite, &table)
        })
    }

    fn do_apply(&mut self, which: &Pick) -> Result<()> {
        let table = self.snapshots_for_change()?;
        let list = table.describe(self.header.size);
        let index = which.find(&list)?;
        let (Some(entry), Some(snapshot)) = (table.entries.get(index), list.get(index)) else {
            return Err(Error::corrupt("the snapshot table changed"));
        };
        let size = snapshot.disk_size;
        let needed = self.header.l1_needed(size);
        let l1_len = needed.max(u64::from(entry.l1_len()));
        if l1_len * 8 > MAX_L1_BYTES {
            return Err(Error::corrupt(format!(
                "the snapshot's disk has {size} bytes, which need {needed} L1 entries (allowed: {})",
                MAX_L1_BYTES / 8
            )));
        }
        let bitmaps = self.bitmaps_before_jump(size)?;
        let done = self.jump(entry, size, l1_len, bitmaps.as_ref());
        match bitmaps {
            Some(bitmaps) => self.bitmaps_after_jump(&bitmaps, done),
            None => done,
        }
    }

    /// Makes the disk that of a snapshot, of `size` bytes, with a table of `l1_len` entries.
    fn jump(
        &mut self,
        entry: &Entry,
        size: u64,
        l1_len: u64,
        bitmaps: Option<&Resized>,
    ) -> Result<()> {
        let old = self.active_l1()?;
        let mut l1 = self.read_l1(entry.l1_offset(), entry.l1_len())?;
        judge_l1(self.layout, &l1)?;
        l1.resize(clamp_len(l1_len, usize::MAX), 0);
        let needs = Needs {
            tables: count_tables(&l1),
            runs: &[l1_len * 8],
            refcount_order: self.header.refcount_order,
        };
        self.rewrite(&needs, |rewrite| {
            rewrite.drop_tables(&old)?;
            rewrite.share_tables(&mut l1, Replaced::Here)?;
            replace_l1(rewrite, &l1)?;
            rewrite.header.size = size;
            bitmaps.map_or(Ok(()), |b| b.point(&mut rewrite.header))
        })
    }

    fn do_delete(&mut self, which: &Pick) -> Result<()> {
        let mut table = self.snapshots_for_change()?;
        let index = which.find(&table.describe(self.header.size))?;
        let entry = table.entries.remove(index);
        let table_len = len64(table.encode()?.len());
        let gone = self.read_l1(entry.l1_offset(), entry.l1_len())?;
        let mut l1 = self.active_l1()?;
        let needs = Needs {
            tables: count_tables(&l1),
            runs: &[len64(l1.len()) * 8, table_len],
            refcount_order: self.header.refcount_order,
        };
        self.rewrite(&needs, |rewrite| {
            rewrite.drop_tables(&gone)?;
            let end = entry.l1_offset() + len64(gone.len()) * 8;
            rewrite.release(entry.l1_offset()..end)?;
            rewrite.own_tables(&mut l1)?;
            replace_l1(rewrite, &l1)?;
            replace_table(rewrite, &table)
        })
    }
}

impl Snapshots for Qcow2 {
    fn create(&mut self, name: &OsStr, now: SystemTime) -> Result<()> {
        self.do_create(name, now)
    }

    fn apply(&mut self, which: &Pick) -> Result<()> {
        self.do_apply(which)
    }

    fn delete(&mut self, which: &Pick) -> Result<()> {
        self.do_delete(which)
    }
}

/// Refuses a first-level table that has damaged entries, or one second-level table twice.
fn judge_l1(layout: Layout, l1: &[u64]) -> Result<()> {
    let mut seen = HashSet::new();
    for (index, word) in l1.iter().enumerate() {
        let wrong = |what: String| {
            Error::corrupt(format!(
                "entry {index} of the snapshot's L1 table {what}; check names the damage"
            ))
        };
        if let Some(host) = layout.first_level(*word).map_err(wrong)?
            && !seen.insert(host)
        {
            return Err(wrong(format!("points at {host:#x}, as another one does")));
        }
    }
    Ok(())
}

/// Tables that a first-level table points at.
pub(super) fn count_tables(l1: &[u64]) -> u64 {
    len64(l1.iter().filter(|e| **e != 0).count())
}

pub(super) fn write_l1(rewrite: &Rewrite<'_>, l1: &[u64], host: u64) -> Result<()> {
    let bytes: Vec<u8> = l1.iter().flat_map(|e| e.to_be_bytes()).collect();
    write_padded(rewrite, bytes, host)
}

fn write_padded(rewrite: &Rewrite<'_>, mut bytes: Vec<u8>, host: u64) -> Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    let cluster = clamp_len(rewrite.header.cluster_size(), usize::MAX);
    bytes.resize(bytes.len().next_multiple_of(cluster), 0);
    rewrite.file().write_at(&bytes, host)
}

/// Puts the active first-level table into the next run and lets go of the old one.
pub(super) fn replace_l1(rewrite: &mut Rewrite<'_>, l1: &[u64]) -> Result<()> {
    let host = rewrite.run();
    if l1.is_empty() {
        // A disk of no bytes has no table, wherever the header says that it is.
        return Ok(());
    }
    write_l1(rewrite, l1, host)?;
    let header = &rewrite.header;
    let old = header.l1_offset..header.l1_offset + u64::from(header.l1_len) * 8;
    rewrite.release(old)?;
    rewrite.header.l1_offset = host;
    rewrite.header.l1_len = u32::try_from(l1.len()).unwrap_or(u32::MAX);
    Ok(())
}

/// Puts the snapshot table into the next run and lets go of the old one.
pub(super) fn replace_table(rewrite: &mut Rewrite<'_>, table: &SnapshotTable) -> Result<()> {
    let host = rewrite.run();
    let old = SnapshotTable::read(rewrite.file(), &rewrite.header)?;
    let start = rewrite.header.snapshots_offset;
    // The padding of the last entry needs no cluster of its own.
    rewrite.release(start..start + len64(old.encode()?.len()))?;
    write_padded(rewrite, table.encode()?, host)?;
    rewrite.header.snapshots_offset = if table.entries.is_empty() { 0 } else { host };
    rewrite.header.snapshot_count = u32::try_from(table.entries.len())
        .map_err(|_| Error::new(ErrorKind::OutOfRange, "there are too many snapshots"))?;
    Ok(())
}

//! Internal snapshots: a first-level table of their own, everything below it shared.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::Qcow2;
use super::entry::Layout;
use super::header::{Header, MAX_L1_BYTES};
use super::lookup::Tables;
use super::refblock::Place;
use super::refcount::Refcounts;
use super::rewrite::{Needs, Replaced, Rewrite, count_tables};
use super::snapshot_table::{Entry, SnapshotTable};
use super::switch::switch;
use crate::error::{Error, Result};
use crate::image::be64;
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

    /// Changes the header, durably, and looks at it again.
    pub(super) fn change_header(&mut self, change: impl FnOnce(&mut Header)) -> Result<()> {
        let old = Header::read(&*self.file)?;
        let mut header = old.clone();
        change(&mut header);
        if header != old {
            switch(&*self.file, &header)?;
        }
        self.reload()
    }

    /// Looks at the header again, after it was switched.
    pub(super) fn reload(&mut self) -> Result<()> {
        let header = Header::read(&*self.file)?;
        self.tables = Tables::new(
            Arc::clone(&self.file),
            self.layout,
            header.l2_bits(),
            &header.l1(),
            self.has_data_file(),
        );
        self.decoded.clear();
        self.renew_behind();
        if let Some(writer) = &self.writer {
            let mut refcounts = writer.refcounts.lock();
            *refcounts = Refcounts::new(
                Arc::clone(&self.file),
                Place::of(&header),
                writer.allocator.order.policy(),
                Arc::clone(&writer.guard),
            );
            writer.allocator.begin_again();
            writer.new_header.store(false, Ordering::Release);
        }
        self.layout.version = header.version;
        self.size = AtomicU64::new(header.size);
        self.header = header;
        Ok(())
    }

    /// The words of the active first-level table.
    pub(super) fn active_l1(&self) -> Result<Vec<u64>> {
        be64::read(&*self.file, self.tables.first_level())
    }

    /// Makes the disk that of a snapshot, of `size` bytes, with a table of `l1_len` entries.
    fn jump(&self, entry: &Entry, size: u64, l1_len: u64) -> Result<()> {
        let bitmaps = self.bitmaps_before_jump(size)?;
        let old = self.active_l1()?;
        let mut l1 = be64::read(&*self.file, entry.l1())?;
        judge_l1(self.layout, &l1)?;
        l1.resize(clamp_len(l1_len, usize::MAX), 0);
        let needs = Needs {
            tables: count_tables(&l1),
            runs: &[l1_len * 8],
            ..Needs::default()
        };
        let mut rewrite = Rewrite::begin(self, &needs)?;
        rewrite.drop_tables(&old)?;
        rewrite.share_tables(&mut l1, Replaced::Here)?;
        rewrite.replace_l1(&l1)?;
        rewrite.header.size = size;
        bitmaps.map_or(Ok(()), |bitmaps| bitmaps.hand_over(&mut rewrite))?;
        rewrite.commit()
    }
}

impl Snapshots for Qcow2 {
    fn create(&mut self, name: &OsStr, now: SystemTime) -> Result<()> {
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
            ..Needs::default()
        };
        self.rewrite(&needs, |rewrite| {
            rewrite.share_tables(&mut l1, Replaced::Everywhere)?;
            rewrite.replace_l1(&l1)?;
            let copy = rewrite.run();
            rewrite.write(be64::bytes(l1.iter().copied()), copy)?;
            let len = rewrite.header.l1_len;
            let made = table.entries.last_mut();
            made.into_iter().for_each(|entry| entry.set_l1(copy, len));
            rewrite.replace_snapshots(&table)
        })
    }

    fn apply(&mut self, which: &Pick) -> Result<()> {
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
        let done = self.jump(entry, size, l1_len);
        let reloaded = self.reload();
        done.and(reloaded)
    }

    fn delete(&mut self, which: &Pick) -> Result<()> {
        let mut table = self.snapshots_for_change()?;
        let index = which.find(&table.describe(self.header.size))?;
        let entry = table.entries.remove(index);
        let table_len = len64(table.encode()?.len());
        let gone = be64::read(&*self.file, entry.l1())?;
        let mut l1 = self.active_l1()?;
        let needs = Needs {
            tables: count_tables(&l1),
            runs: &[len64(l1.len()) * 8, table_len],
            ..Needs::default()
        };
        self.rewrite(&needs, |rewrite| {
            rewrite.drop_tables(&gone)?;
            rewrite.release(entry.l1())?;
            rewrite.own_tables(&mut l1)?;
            rewrite.replace_l1(&l1)?;
            rewrite.replace_snapshots(&table)
        })
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

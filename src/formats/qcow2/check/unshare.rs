//! Second-level tables that one first-level table has twice: writers would change one part of the
//! disk with the other.  Each further entry gets a copy of its own.

use std::sync::Arc;

use super::Checker;
use super::tables::FirstLevel;
use crate::error::{Error, Result};
use crate::formats::qcow2::entry::{COMPRESSED, COPIED};
use crate::formats::qcow2::header::Header;
use crate::formats::qcow2::refblock::Place;
use crate::formats::qcow2::refcount::{Refcounts, Step};
use crate::image::be64;
use crate::image::check::{Repair, Severity};
use crate::image::open::WriteOrder;

/// Most entries that a repair gives a table of their own.
const MAX_REPEATS: usize = 1 << 16;

/// A first-level entry that points where another one of the same table does.
#[derive(Debug, Clone)]
pub(super) struct Repeat {
    /// Where the entry is in the file.
    pub(super) at: u64,
    /// The table that it points at.
    host: u64,
    /// It is the disk's, not a snapshot's.
    pub(super) active: bool,
    /// What is wrong.
    text: String,
}

impl Checker<'_> {
    /// Takes note of an entry that points where another one of the same table does.
    pub(super) fn repeated(&mut self, table: &FirstLevel, index: u64, host: u64) {
        let text = format!(
            "entry {index} of {} points at {host:#x}, as another one does",
            table.what
        );
        if self.repeats.len() >= MAX_REPEATS {
            // More than a repair takes on: the image stays as it is.
            self.corrupt(text);
            return;
        }
        self.repeats.push(Repeat {
            at: table.offset + index * 8,
            host,
            active: table.active,
            text,
        });
    }

    /// The refcounts as they are now, for a repair that takes clusters.
    pub(super) fn refcounts_now(&self) -> Result<Refcounts> {
        let place = Place::of(&Header::read(self.file)?);
        let file = Arc::clone(self.shared);
        Ok(Refcounts::new(
            file,
            place,
            WriteOrder::Ordered,
            Arc::default(),
        ))
    }

    /// Refuses clusters that something was found to use.
    pub(super) fn unused(&self) -> impl Fn(u64) -> Result<()> + '_ {
        |cluster| match self.counts.get(cluster) {
            0 => Ok(()),
            _ => Err(Error::corrupt(format!("cluster {cluster} is not free"))),
        }
    }

    /// Reports tables that are there twice.  Where all else is sound, a repair copies them: what
    /// they point at is counted for each entry already.
    pub(super) fn unshare(&mut self) -> Result<()> {
        let repeats = std::mem::take(&mut self.repeats);
        // Without counts of what is in a data file, nobody could tell that it is shared.
        let mends = self.repair == Repair::All && self.is_sound() && !self.external;
        if mends && !repeats.is_empty() {
            self.copy_tables(&repeats)?;
        }
        for repeat in repeats {
            let done = mends.then(|| "copied".to_owned());
            self.report.add(Severity::Corruption, 1, repeat.text, done);
        }
        Ok(())
    }

    /// Copies are durable before anything points there, and the tables are let go of after that.
    fn copy_tables(&self, repeats: &[Repeat]) -> Result<()> {
        let file = self.file;
        file.sync()?;
        let mut refcounts = self.refcounts_now()?;
        let mut copies = Vec::new();
        for repeat in repeats {
            self.progress.check()?;
            let taken = refcounts.take(1..2, &self.unused())?;
            let table = repeat.host..repeat.host + self.layout.cluster_size();
            let mut table = be64::read_bytes(file, table)?;
            // What it points at is shared.
            self.layout.change_entries(&mut table, |word| {
                let flag = if word & COMPRESSED == 0 { COPIED } else { 0 };
                Ok(word & !flag)
            })?;
            file.write_at(&table, taken.host)?;
            copies.push(taken.host);
        }
        file.sync()?;
        for (repeat, host) in repeats.iter().zip(copies) {
            let flag = if repeat.active { COPIED } else { 0 };
            file.write_at(&(host | flag).to_be_bytes(), repeat.at)?;
        }
        file.sync()?;
        for repeat in repeats {
            let cluster = repeat.host >> self.layout.cluster_bits;
            refcounts.step(cluster..cluster + 1, Step::Down)?;
        }
        Ok(())
    }
}

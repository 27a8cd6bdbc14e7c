//! Check of one sparse file: tables and their copies, grains, what nothing names.

use crate::error::Result;
use crate::formats::vmdk::check::leak;
use crate::formats::vmdk::header::{SECTOR, UNCLEAN};
use crate::formats::vmdk::space::{What, Wrong};
use crate::formats::vmdk::sparse::Sparse;
use crate::formats::vmdk::tables::{Entry, Tables};
use crate::image::Wait;
use crate::image::check::{Repair, Report, Severity};
use crate::image::units::Units;
use crate::util::align::{clamp_len, len64};
use crate::util::progress::Progress;
use std::sync::atomic::Ordering;

/// Entries that are mended in one pass at most; others are counted, and mended by the next.
const MAX_FAULTS: usize = 1 << 16;

/// What the two copies of the tables are to each other.
#[derive(Debug, Default)]
struct Copies {
    /// Tables that have no second copy.
    none: Vec<u64>,
    /// How many entries differ.
    differ: u64,
}

impl Sparse {
    /// Checks it, and mends what `repair` allows.
    pub(super) fn check(
        &self,
        report: &mut Report,
        repair: Repair,
        progress: &dyn Progress,
    ) -> Result<()> {
        let tables = self.tables.load_full();
        let (mut faults, mut more) = (Vec::new(), 0);
        let mut found = self.scan(&tables, |wrong| {
            match faults.len() < MAX_FAULTS {
                true => faults.push(wrong),
                false => more += 1,
            }
            progress.check()
        })?;
        report.total_clusters += tables.geometry.grains();
        report.allocated_clusters += found.grains;
        let end = found.grid.host(found.slots.end()).start;
        report.image_end_offset = report.image_end_offset.max(end);
        let sound = faults.is_empty();
        if !sound {
            // What is not read may name anything that is in the file: space is taken behind it.
            let behind = self.storage.size().saturating_sub(found.grid.start);
            found.slots.reach(behind.div_ceil(found.grid.stride));
            found.partial = true;
        }
        if let Some(writer) = &self.writer {
            *writer.space.lock() = found;
        }
        let mut zero_tables = 0;
        tables.gd.each(&*self.storage, |_, word| {
            zero_tables += u64::from(word == 1 && tables.geometry.zero_tables);
            Ok(())
        })?;
        if zero_tables > 0 {
            report.note(format!(
                "{zero_tables} entries of the grain directory are 1: all that their tables would have reads as zeroes"
            ));
        }
        faults.sort_by_key(|wrong| wrong.what);
        self.mend_all(report, &tables, faults, more, repair)?;
        if more > 0 {
            let text = format!("{more} more entries are wrong");
            report.add(Severity::Corruption, more, text, None);
        }
        self.check_copies(report, &tables, sound, repair)?;
        if sound {
            self.check_unused(report, repair)?;
        }
        self.check_unclean(report, repair)
    }

    /// Tells of wrong entries, and mends what `repair` allows; `more` of them are wrong beside these.
    fn mend_all(
        &self,
        report: &mut Report,
        tables: &Tables,
        faults: Vec<Wrong>,
        more: u64,
        repair: Repair,
    ) -> Result<()> {
        let mends = repair == Repair::All && !faults.is_empty();
        if mends {
            // The disk is about to read as something else.
            self.writer()?.session.begin()?;
            self.mark_unclean()?;
        }
        let is_table = |wrong: &Wrong| matches!(wrong.what, What::Table | What::Stuck);
        let unread = faults.iter().any(is_table);
        for wrong in faults {
            let may = match wrong.what {
                What::Shared => more == 0,
                // Whether its grain is another's is known once all tables are.
                What::Lost => !unread,
                _ => true,
            };
            let did = match mends && may {
                true => self.mend(tables, &wrong)?,
                false => None,
            };
            report.corruption(wrong.text, did);
        }
        match mends {
            true => self.unmark_unclean(),
            false => Ok(()),
        }
    }

    /// Mends one entry; what was done.
    fn mend(&self, tables: &Tables, wrong: &Wrong) -> Result<Option<&'static str>> {
        let storage = &*self.storage;
        Ok(match wrong.what {
            What::Stuck => None,
            What::Table => match tables.copy(storage, wrong.index) {
                Ok(Some(copy)) => {
                    let host = self.remake_table(tables, copy)?;
                    tables.publish_table(storage, wrong.index, host)?;
                    Some("the table was made anew from its second copy")
                }
                _ => None,
            },
            What::Copy => match (&tables.rgd, tables.table(storage, wrong.index, Wait::Yes)?) {
                (Some(rgd), Entry::At(first)) => {
                    let host = self.remake_table(tables, first)?;
                    let sector = u32::try_from(host / SECTOR).unwrap_or(u32::MAX);
                    rgd.publish(storage, wrong.index, &[sector])?;
                    Some("it was made anew")
                }
                _ => None,
            },
            What::Lost => match self.second(tables, wrong.index)? {
                Some(word) => {
                    self.write_entries(tables, wrong.index, &[word])?;
                    Some("the entry of the second copy took its place")
                }
                None => None,
            },
            What::Cut => match tables.entry(storage, wrong.index, Wait::Yes)? {
                Entry::At(host) if !storage.has_fixed_len() => {
                    storage.set_len(storage.size().max(host + tables.geometry.grain))?;
                    Some("what is missing reads as zeroes")
                }
                _ => None,
            },
            What::Shared => {
                self.allocator()?.move_away(self, &[wrong.index])?;
                Some("it was given a copy of its own")
            }
        })
    }

    /// What the second copy says of a grain, where that can be: it lies where others do, and in space
    /// that is in no use.
    fn second(&self, tables: &Tables, index: u64) -> Result<Option<u32>> {
        let (storage, per_table) = (&*self.storage, tables.geometry.per_table);
        let Ok(Some(copy)) = tables.copy(storage, index / per_table) else {
            return Ok(None);
        };
        let mut word = [0; 4];
        storage.read_at(&mut word, copy + index % per_table * 4)?;
        let word = u32::from_le_bytes(word);
        let Ok(Entry::At(host)) = tables.grain_at(storage, index, word) else {
            return Ok(None);
        };
        let mut space = self.writer()?.space.lock();
        let grid = space.grid;
        let behind = host
            .checked_sub(grid.start)
            .filter(|b| b.is_multiple_of(grid.stride));
        let Some(number) = behind.map(|b| b / grid.stride) else {
            return Ok(None);
        };
        let fault = space.slots.name(grid, number, storage.size())?;
        Ok(fault.is_none().then_some(word))
    }

    /// A new table that holds what is at `host`.
    fn remake_table(&self, tables: &Tables, host: u64) -> Result<u64> {
        let storage = &*self.storage;
        let mut bytes = vec![0; clamp_len(tables.geometry.per_table * 4, usize::MAX)];
        storage.read_at(&mut bytes, host)?;
        let host = self.take_table(1)?;
        storage.write_at(&bytes, host)?;
        self.allocator()?.order.settle()?;
        tables.words.forget(host..host + len64(bytes.len()));
        Ok(host)
    }

    fn check_copies(
        &self,
        report: &mut Report,
        tables: &Tables,
        sound: bool,
        repair: Repair,
    ) -> Result<()> {
        let Some(rgd) = &tables.rgd else {
            return Ok(());
        };
        let copies = self.compare(tables)?;
        if !copies.none.is_empty() {
            let mends = sound && repair == Repair::All;
            if mends {
                let len = tables.geometry.per_table * 4;
                for number in &copies.none {
                    let host = self.take_table(1)?;
                    tables.words.forget(host..host + len);
                    let sector = u32::try_from(host / SECTOR);
                    rgd.publish(&*self.storage, *number, &[sector.unwrap_or(u32::MAX)])?;
                }
                self.align_copies()?;
            }
            let text = format!("{} tables have no second copy", copies.none.len());
            let did = mends.then(|| "they were given one".to_owned());
            report.add(Severity::Corruption, len64(copies.none.len()), text, did);
        }
        if copies.differ > 0 {
            // A writer that died between the two leaves no more than that.
            let left = self.unclean.load(Ordering::Acquire);
            let mends = sound && (repair == Repair::All || left && repair == Repair::Leaks);
            let mends = mends && copies.none.is_empty();
            if mends {
                self.align_copies()?;
            }
            let severity = if left {
                Severity::Leak
            } else {
                Severity::Corruption
            };
            let text = format!(
                "{} entries differ between the two copies of the tables",
                copies.differ
            );
            let did = mends.then(|| "the second copy is as the first now".to_owned());
            report.add(severity, copies.differ, text, did);
        }
        Ok(())
    }

    fn compare(&self, tables: &Tables) -> Result<Copies> {
        let storage = &*self.storage;
        let len = clamp_len(tables.geometry.per_table * 4, usize::MAX);
        let (mut first, mut second) = (vec![0; len], vec![0; len]);
        let mut copies = Copies::default();
        for number in 0..tables.gd.len() {
            let Ok(Entry::At(host)) = tables.table(storage, number, Wait::Yes) else {
                continue;
            };
            let copy = match tables.copy(storage, number) {
                Ok(Some(copy)) if copy != host => copy,
                Ok(_) => {
                    copies.none.push(number);
                    continue;
                }
                Err(e) if e.kind() == crate::error::ErrorKind::Corrupt => {
                    copies.none.push(number);
                    continue;
                }
                Err(e) => return Err(e),
            };
            storage.read_at(&mut first, host)?;
            storage.read_at(&mut second, copy)?;
            let words = first.chunks_exact(4).zip(second.chunks_exact(4));
            copies.differ += len64(words.filter(|(a, b)| a != b).count());
        }
        Ok(copies)
    }

    /// Space that nothing names: between grains where the host keeps it, and behind the last.
    fn check_unused(&self, report: &mut Report, repair: Repair) -> Result<()> {
        let storage = &*self.storage;
        let scanned;
        let writer = self.writer.as_ref();
        let (grid, end, behind, held) = {
            let space = match writer {
                Some(writer) => &*writer.space.lock(),
                None => {
                    scanned = self.scan(&self.tables.load(), |_| Ok(()))?;
                    &scanned
                }
            };
            let end = space.grid.host(space.slots.end()).start;
            let behind = match storage.has_fixed_len() {
                true => 0,
                false => storage.size().saturating_sub(end),
            };
            (space.grid, end, behind, self.held(space)?)
        };
        let mends = repair != Repair::Nothing;
        let grains = len64(held.len());
        if grains > 0 {
            if mends {
                for host in &held {
                    let _ = storage.zero(
                        *host..*host + grid.stride,
                        crate::storage::Zeroing::MayUnmap,
                    );
                }
            }
            let text = format!("{grains} grains of the file are in use by nothing");
            leak(
                report,
                grains,
                text,
                mends.then_some("the host has their space back"),
            );
        }
        if behind > 0 {
            if mends {
                self.trim()?;
            }
            let text = format!("{behind} bytes from {end:#x} on belong to nothing");
            let grains = behind.div_ceil(grid.stride);
            leak(report, grains, text, mends.then_some("the file was cut"));
        }
        Ok(())
    }

    /// Grains between others that nothing names, and for which the host keeps space.
    pub(super) fn held(&self, space: &crate::formats::vmdk::space::InUse) -> Result<Vec<u64>> {
        let mut held = Vec::new();
        if self.storage.has_fixed_len() {
            return Ok(held);
        }
        let unused = space.slots.end() - space.slots.used();
        let mut holes = space
            .slots
            .gaps(MAX_FAULTS.min(clamp_len(unused, MAX_FAULTS)));
        holes.retain(|number| *number < space.slots.end());
        for number in holes {
            let host = space.grid.host(number);
            if self.storage.run(host.start, space.grid.stride)?.data {
                held.push(host.start);
            }
        }
        Ok(held)
    }

    fn check_unclean(&self, report: &mut Report, repair: Repair) -> Result<()> {
        if !self.unclean.load(Ordering::Acquire) {
            return Ok(());
        }
        let clean = report.corruptions == 0;
        if repair != Repair::Nothing && clean {
            self.allocator()?.order.settle()?;
            self.storage.write_at(&[0], UNCLEAN)?;
            self.unclean.store(false, Ordering::Release);
            report.note("the file was not closed; its flag was cleared");
        } else {
            report.note("the file was not closed by its last writer");
        }
        Ok(())
    }
}

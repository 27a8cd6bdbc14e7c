//! Consistency check: the map, the count of blocks, the end of the file.

use crate::error::Result;
use crate::formats::vdi::header::{COUNT, SECTOR, ZERO};
use crate::formats::vdi::image::{Shape, Vdi};
use crate::image::Compact;
use crate::image::check::{Check, Repair, Report, Severity, settle};
use crate::image::units::{Fault, Units};
use crate::util::align::len64;
use crate::util::progress::{Progress, Silent};

/// Entries that are mended in one pass at most; others are counted, and mended by the next.
const MAX_FAULTS: usize = 1 << 16;

impl Check for Vdi {
    fn check(&self, repair: Repair, _progress: &dyn Progress) -> Result<Report> {
        if repair != Repair::Nothing {
            self.allocator()?;
            self.may_change()?;
        }
        settle(repair, |repair| {
            // As the pass before left it.
            let report = self.pass(&*self.reread()?, repair)?;
            if repair != Repair::Nothing {
                self.storage.sync()?;
            }
            Ok(report)
        })
    }
}

impl Vdi {
    fn pass(&self, shape: &Shape, repair: Repair) -> Result<Report> {
        let header = &shape.header;
        let mut report = Report {
            total_clusters: header.blocks(),
            ..Report::default()
        };
        let (mut faults, mut more) = (Vec::new(), 0);
        let mut blocks = self.scan(shape, |index, number, fault| {
            match faults.len() < MAX_FAULTS {
                true => faults.push((index, number, fault)),
                false => more += 1,
            }
            Ok(())
        })?;
        let (used, end) = (blocks.slots.used(), blocks.slots.end());
        report.allocated_clusters = used;
        report.image_end_offset = header.grid().host(end).start;
        if header.word(COUNT) < end {
            let text = format!(
                "{} blocks are counted, and the file has {end}: others would write over one that is in use",
                header.word(COUNT),
            );
            let did = match repair {
                Repair::Nothing => None,
                Repair::Leaks | Repair::All => {
                    self.write_count(&mut blocks)?;
                    Some(format!("{end} are counted now"))
                }
            };
            report.add(Severity::Corruption, 1, text, did);
        }
        *self.blocks.lock() = blocks;
        // Blocks that are counted, and of which the file has nothing, are in use.
        let mut lost: Vec<u64> = faults
            .iter()
            .filter(|(_, number, fault)| *fault == Fault::Lost && *number < header.word(COUNT))
            .map(|(_, number, _)| *number)
            .collect();
        lost.sort_unstable();
        lost.dedup();
        let named = used + len64(lost.len()) + more;
        self.check_entries(&mut report, shape, faults, more, repair)?;
        if more > 0 {
            let text = format!("{more} more map entries are wrong");
            report.add(Severity::Corruption, more, text, None);
        }
        self.check_end(&mut report, shape, end, named, repair)?;
        if !header.disk().is_multiple_of(SECTOR) {
            report.note(format!(
                "the disk has {} bytes: what is past its last whole sector does not show",
                header.disk()
            ));
        }
        Ok(report)
    }

    fn check_entries(
        &self,
        report: &mut Report,
        shape: &Shape,
        mut faults: Vec<(u64, u64, Fault)>,
        more: u64,
        repair: Repair,
    ) -> Result<()> {
        // First what must not come to lie inside the file.
        faults.sort_by_key(|(_, _, fault)| *fault);
        if repair == Repair::All && faults.iter().any(|(_, _, fault)| *fault == Fault::Lost) {
            // The disk is about to read as something else.
            self.announce()?;
        }
        for (index, number, fault) in faults {
            let did = match fault {
                _ if repair != Repair::All => None,
                Fault::Lost => {
                    shape.map.publish(&*self.storage, index, &[ZERO])?;
                    Some("its data is lost: it reads as zeroes now")
                }
                // Of those that are left for the next pass, one may name what a copy takes.
                Fault::Shared if more > 0 => None,
                Fault::Shared => {
                    self.allocator.move_away(self, &[index])?;
                    Some("it was given a copy of its own")
                }
                Fault::Cut if self.storage.has_fixed_len() => None,
                Fault::Cut => {
                    self.storage.set_len(shape.header.grid().host(number).end)?;
                    Some("what is missing reads as zeroes")
                }
            };
            report.corruption(fault.text(index, number), did);
        }
        Ok(())
    }

    /// What of the file nothing names; entries name `named` blocks, there or not.
    fn check_end(
        &self,
        report: &mut Report,
        shape: &Shape,
        end: u64,
        named: u64,
        repair: Repair,
    ) -> Result<()> {
        let grid = shape.header.grid();
        let counted = shape.header.word(COUNT).max(end);
        let unused = counted.saturating_sub(named);
        let end = grid.host(end).start;
        let behind = match self.storage.has_fixed_len() {
            true => 0,
            false => self.storage.size().saturating_sub(end),
        };
        if unused == 0 && behind == 0 {
            return Ok(());
        }
        // Space that a wrong entry stands for is not given away.
        let sound = report.corruptions + report.corruptions_fixed == 0;
        let packs = sound && repair != Repair::Nothing;
        if packs {
            self.pack(&Silent)?;
        }
        let did = || packs.then(|| "the file was packed and cut".to_owned());
        if unused > 0 {
            let text = format!("{unused} blocks that are counted are in use by nothing");
            report.add(Severity::Leak, unused, text, did());
        }
        if behind > 0 {
            let text = format!("{behind} bytes from {end:#x} on belong to nothing");
            let blocks = behind.div_ceil(grid.stride);
            report.add(Severity::Leak, blocks, text, did());
        }
        Ok(())
    }
}

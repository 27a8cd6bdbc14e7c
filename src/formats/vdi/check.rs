//! Consistency check: the map, the count of blocks, the end of the file.

use crate::error::Result;
use crate::formats::vdi::header::{COUNT, SECTOR, ZERO};
use crate::formats::vdi::image::{Shape, Vdi};
use crate::formats::vdi::slots::{Fault, Slots};
use crate::image::Compact;
use crate::image::check::{Check, Repair, Report, Severity, settle};
use crate::image::units::Units;
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
        let mut slots = self.scan(shape, |index, number, fault| {
            match faults.len() < MAX_FAULTS {
                true => faults.push((index, number, fault)),
                false => more += 1,
            }
            Ok(())
        })?;
        report.allocated_clusters = slots.used;
        report.image_end_offset = header.host(slots.end).start;
        if header.word(COUNT) < slots.end {
            let text = format!(
                "{} blocks are counted, and the file has {}: others would write over one that is in use",
                header.word(COUNT),
                slots.end
            );
            let did = match repair {
                Repair::Nothing => None,
                Repair::Leaks | Repair::All => {
                    self.write_count(&mut slots)?;
                    Some(format!("{} are counted now", slots.end))
                }
            };
            report.add(Severity::Corruption, 1, text, did);
        }
        // Blocks that are counted, and of which the file has nothing, are in use.
        let mut lost: Vec<u64> = faults
            .iter()
            .filter(|(_, number, fault)| *fault == Fault::Lost && *number < header.word(COUNT))
            .map(|(_, number, _)| *number)
            .collect();
        lost.sort_unstable();
        lost.dedup();
        let named = slots.used + len64(lost.len()) + more;
        self.check_entries(&mut report, shape, &mut slots, faults, repair)?;
        if more > 0 {
            let text = format!("{more} more map entries are wrong");
            report.add(Severity::Corruption, more, text, None);
        }
        self.check_end(&mut report, shape, &slots, named, repair)?;
        if !header.disk().is_multiple_of(SECTOR) {
            let text = format!(
                "the disk has {} bytes: what is past its last whole sector does not show",
                header.disk()
            );
            report.add(Severity::Note, 0, text, None);
        }
        Ok(report)
    }

    fn check_entries(
        &self,
        report: &mut Report,
        shape: &Shape,
        slots: &mut Slots,
        mut faults: Vec<(u64, u64, Fault)>,
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
                Fault::Shared => {
                    self.relocate(slots, &[index])?;
                    Some("it was given a copy of its own")
                }
                Fault::Cut if self.storage.has_fixed_len() => None,
                Fault::Cut => {
                    self.storage.set_len(shape.header.host(number).end)?;
                    Some("what is missing reads as zeroes")
                }
            };
            let text = fault.text(index, number);
            report.add(Severity::Corruption, 1, text, did.map(str::to_owned));
        }
        Ok(())
    }

    /// What of the file nothing names; entries name `named` blocks, there or not.
    fn check_end(
        &self,
        report: &mut Report,
        shape: &Shape,
        slots: &Slots,
        named: u64,
        repair: Repair,
    ) -> Result<()> {
        let counted = shape.header.word(COUNT).max(slots.end);
        let unused = counted.saturating_sub(named);
        let end = shape.header.host(slots.end).start;
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
            let blocks = behind.div_ceil(shape.header.total());
            report.add(Severity::Leak, blocks, text, did());
        }
        Ok(())
    }
}

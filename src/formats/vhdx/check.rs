//! Consistency check: the log, the headers, the region tables, the table of blocks, the end of the file.

use crate::error::Result;
use crate::formats::vhdx::bat::{Block, Shape, Use, anchor, odd_bits, without_anchor};
use crate::formats::vhdx::bytes::MB;
use crate::formats::vhdx::image::Vhdx;
use crate::formats::vhdx::region::PLACES;
use crate::formats::vhdx::scan::{self, Problem, Wrong};
use crate::image::check::{Check, Repair, Report, Severity, settle};
use crate::image::units::{Fault, Units};
use crate::storage::Storage;
use crate::util::progress::Progress;

/// Entries that are mended in one pass at most; others are counted, and mended by the next.
const MAX_FAULTS: usize = 1 << 16;

impl Check for Vhdx {
    fn check(&self, repair: Repair, _progress: &dyn Progress) -> Result<Report> {
        if repair != Repair::Nothing {
            self.allocator()?;
        }
        let mut before = Report::default();
        self.check_log(&mut before, repair)?;
        // What a log that counts may still say is not written over.
        let repair = match *self.log_fault.lock() {
            Some(_) => Repair::Nothing,
            None => repair,
        };
        self.check_headers(&mut before, repair)?;
        let mut report = settle(repair, |repair| {
            let report = self.pass(repair)?;
            if repair != Repair::Nothing {
                // The file is cut by `check_end` alone.
                self.journal.finish()?;
                self.allocator.order.settle()?;
            }
            Ok(report)
        })?;
        report.corruptions += before.corruptions;
        report.corruptions_fixed += before.corruptions_fixed;
        before.findings.append(&mut report.findings);
        before.findings.truncate(Report::MAX_FINDINGS);
        report.findings = before.findings;
        Ok(report)
    }
}

impl Vhdx {
    fn check_log(&self, report: &mut Report, repair: Repair) -> Result<()> {
        let fault = self.log_fault.lock().clone();
        match fault {
            Some(fault) if repair != Repair::All => report.corruption(fault, None),
            Some(fault) => {
                let did = match self.journal.is_cut() {
                    true => {
                        self.journal.replay()?;
                        "what the log held was put in place; what the file lacks is lost"
                    }
                    false => {
                        self.journal.drop_log()?;
                        "the log was dropped: what it held is lost"
                    }
                };
                *self.log_fault.lock() = None;
                report.corruption(fault, Some(did));
            }
            None if self.journal.is_dirty() => {
                let mended = repair != Repair::Nothing;
                if mended {
                    self.journal.replay()?;
                }
                report.note(match mended {
                    true => "the log held changes that were not in place; now they are",
                    false => "the log holds changes that are not in place yet; they are taken into account",
                });
            }
            None => {}
        }
        Ok(())
    }

    fn check_headers(&self, report: &mut Report, repair: Repair) -> Result<()> {
        let Some(fault) = self.journal.fault() else {
            return Ok(());
        };
        // Whoever was killed while writing one leaves that; the other counts.
        report.note(match repair {
            Repair::Nothing => fault,
            Repair::Leaks | Repair::All => {
                self.journal.announce(None)?;
                format!("{fault}; it was written anew")
            }
        });
        Ok(())
    }

    fn pass(&self, repair: Repair) -> Result<Report> {
        let shape = self.reread()?;
        let mut report = Report {
            total_clusters: shape.blocks(),
            ..Report::default()
        };
        self.check_regions(&mut report, &shape, repair)?;
        // Whatever gets space next might get that.
        let repair = match shape.regions.beyond(self.journal.size()) {
            None => repair,
            Some(text) => {
                report.corruption(text, None);
                Repair::Nothing
            }
        };
        let (mut faults, mut more) = (Vec::new(), 0);
        let slots = scan::scan(self, &shape, |wrong| {
            match faults.len() < MAX_FAULTS {
                true => faults.push(wrong),
                false => more += 1,
            }
            Ok(())
        })?;
        let (used, end) = (slots.used(), slots.end() * MB);
        report.allocated_clusters = self.count(&shape)?;
        report.image_end_offset = end;
        self.adopt(slots);
        self.check_entries(&mut report, &shape, faults, more > 0, repair)?;
        if more > 0 {
            let text = format!("{more} more BAT entries are wrong");
            report.add(Severity::Corruption, more, text, None);
        }
        debug_assert!(used > 0, "the headers are");
        self.check_end(&mut report, end, repair)?;
        Ok(report)
    }

    /// Blocks that have space.
    fn count(&self, shape: &Shape) -> Result<u64> {
        let mut count = 0;
        shape.table.each_stored(&*self.journal, |index, word| {
            let is_block = matches!(shape.grid.of(index), Use::Block(b) if b < shape.blocks());
            count += u64::from(is_block && Block::from_word(word).host().is_some());
            Ok(())
        })?;
        Ok(count)
    }

    fn check_regions(&self, report: &mut Report, shape: &Shape, repair: Repair) -> Result<()> {
        let Some(fault) = &shape.regions.fault else {
            return Ok(());
        };
        let did = (repair != Repair::Nothing).then_some("both are alike now");
        if did.is_some() {
            let bytes = shape.regions.to_bytes();
            self.journal.change(&PLACES.map(|place| (place, &*bytes)))?;
        }
        report.corruption(fault.clone(), did);
        Ok(())
    }

    fn check_entries(
        &self,
        report: &mut Report,
        shape: &Shape,
        mut faults: Vec<Wrong>,
        more: bool,
        repair: Repair,
    ) -> Result<()> {
        // What is mended by other space comes last: none is taken that others name.
        faults.sort_by_key(|wrong| wrong.problem == Problem::Space(Fault::Shared));
        for wrong in faults {
            let did = match repair {
                Repair::All => self.mend(shape, &wrong, more)?,
                Repair::Nothing | Repair::Leaks => None,
            };
            report.corruption(wrong.text(), did);
        }
        Ok(())
    }

    /// Sets an entry right, where that can be; what was done.
    fn mend(&self, shape: &Shape, wrong: &Wrong, more: bool) -> Result<Option<&'static str>> {
        let block = Block::from_word(wrong.word);
        let nothing = match (wrong.of, self.has_backing()) {
            (Use::Block(_), true) => Block::Zero,
            _ => Block::Absent,
        };
        let (new, did) = match (wrong.problem, wrong.of) {
            (Problem::Space(Fault::Lost) | Problem::Metadata | Problem::State, Use::Block(_)) => {
                // The disk is about to read as something else.
                self.allocator.begin(self)?;
                (nothing, "its data is lost: it reads as zeroes now")
            }
            (Problem::Space(Fault::Lost) | Problem::Metadata | Problem::State, Use::Bitmap(_)) => {
                (nothing, "there is no sector bitmap now")
            }
            (Problem::NoParent, _) => match block.host() {
                Some(host) => (Block::Present(host), "it is present as a whole now"),
                None => return Ok(None),
            },
            (Problem::Anchor, _) => {
                let word = without_anchor(wrong.word);
                shape.table.publish(&*self.journal, wrong.index, &[word])?;
                return Ok(Some("no space is kept for it now"));
            }
            (Problem::Bits, _) if anchor(wrong.word).is_some() => {
                let word = wrong.word & !odd_bits(wrong.word);
                shape.table.publish(&*self.journal, wrong.index, &[word])?;
                return Ok(Some("they are zero now"));
            }
            (Problem::Bits, _) => (block, "they are zero now"),
            (Problem::Space(Fault::Cut), _) => return self.lengthen(block),
            // Of those that are left for the next pass, one may name what a copy takes.
            (Problem::Space(Fault::Shared), Use::Block(number))
                if !more && matches!(block, Block::Present(_)) =>
            {
                self.allocator.move_away(self, &[number])?;
                return Ok(Some("it was given a copy of its own"));
            }
            (Problem::Space(Fault::Shared) | Problem::NoBitmap, _) => return Ok(None),
        };
        shape
            .table
            .publish(&*self.journal, wrong.index, &[new.word()])?;
        Ok(Some(did))
    }

    fn lengthen(&self, block: Block) -> Result<Option<&'static str>> {
        let end = block.host().map(|host| host.saturating_add(self.block));
        match end {
            Some(end) if !self.file.has_fixed_len() => {
                self.file.set_len(end.max(self.file.size()))?;
                Ok(Some("what is missing reads as zeroes"))
            }
            _ => Ok(None),
        }
    }

    /// What of the file nothing names, behind all that is named.
    fn check_end(&self, report: &mut Report, end: u64, repair: Repair) -> Result<()> {
        let kept = self.kept_end(end, report.allocated_clusters);
        let behind = match self.file.has_fixed_len() {
            true => 0,
            false => self.file.size().saturating_sub(kept),
        };
        if behind == 0 || kept > end {
            return Ok(());
        }
        // Space that a wrong entry stands for is not given away.
        let sound = report.corruptions + report.corruptions_fixed == 0;
        let cuts = sound && repair != Repair::Nothing;
        if cuts {
            self.journal.finish()?;
            self.trim()?;
        }
        let text = format!("{behind} bytes from {end:#x} on belong to nothing");
        let did = cuts.then(|| "the file was cut".to_owned());
        report.add(Severity::Leak, behind.div_ceil(self.block), text, did);
        Ok(())
    }
}

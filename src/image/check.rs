//! Consistency check of one image's metadata.

use crate::error::Result;
use crate::util::progress::Progress;

/// Most passes of one repair.
const MAX_PASSES: u32 = 8;

/// What a check may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Repair {
    /// Nothing.
    #[default]
    Nothing,
    /// Leaks: space that nothing refers to.
    Leaks,
    /// Leaks and corruptions.
    All,
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// Space is lost, data is not.
    Leak,
    /// Metadata is wrong.
    Corruption,
    /// Odd, but readers agree on the content: neither leak nor corruption.
    Note,
}

/// One thing found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What was found, where, and what was expected.
    pub text: String,
    /// What the repair did about it; `None` where it is still so.
    pub repaired: Option<String>,
}

/// A sector with parts that are wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadSector {
    /// Its address.
    pub lba: u64,
    /// The parts, by name.
    pub parts: Vec<&'static str>,
    /// Whether its codes tell beyond doubt what was there.
    pub correctable: bool,
}

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Findings in order; at most [`Report::MAX_FINDINGS`] are kept, all are counted.
    pub findings: Vec<Finding>,
    /// Corruptions that remain.
    pub corruptions: u64,
    /// Leaks that remain, in clusters.
    pub leaks: u64,
    /// Corruptions that were repaired.
    pub corruptions_fixed: u64,
    /// Leaks that were repaired, in clusters.
    pub leaks_fixed: u64,
    /// Places that could not be read.
    pub check_errors: u64,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// Clusters that have space.
    pub allocated_clusters: u64,
    /// Allocated clusters that do not follow their predecessor in the file.
    pub fragmented_clusters: u64,
    /// Clusters stored compressed.
    pub compressed_clusters: u64,
    /// End of the last used byte in the file.
    pub image_end_offset: u64,
    /// Sectors with parts that are wrong, in order, at most [`Report::MAX_SECTORS`]; `None`: the
    /// format has none with codes.
    pub sectors: Option<Vec<BadSector>>,
}

impl Report {
    /// Sectors listed: as many as a disc has.
    pub const MAX_SECTORS: usize = 500_000;

    /// Texts kept; a hostile image may have millions of faults.
    pub const MAX_FINDINGS: usize = 1000;

    /// Adds something that is odd but changes nothing.
    pub fn note(&mut self, text: impl Into<String>) {
        self.add(Severity::Note, 1, text.into(), None);
    }

    /// Adds a corruption, and what was done about it.
    pub fn corruption(&mut self, text: impl Into<String>, repaired: Option<&str>) {
        let repaired = repaired.map(str::to_owned);
        self.add(Severity::Corruption, 1, text.into(), repaired);
    }

    /// Adds a finding that stands for `count` clusters or faults, and counts it.
    pub fn add(&mut self, severity: Severity, count: u64, text: String, repaired: Option<String>) {
        let counter = match (severity, repaired.is_some()) {
            (Severity::Leak, false) => Some(&mut self.leaks),
            (Severity::Leak, true) => Some(&mut self.leaks_fixed),
            (Severity::Corruption, false) => Some(&mut self.corruptions),
            (Severity::Corruption, true) => Some(&mut self.corruptions_fixed),
            (Severity::Note, _) => None,
        };
        if let Some(counter) = counter {
            *counter += count;
        }
        if self.findings.len() < Self::MAX_FINDINGS {
            self.findings.push(Finding {
                severity,
                text,
                repaired,
            });
        }
    }
}

/// Repairs in passes, until one has nothing left to mend: what one sets right may let the next do
/// more.  The report has what all of them mended and what the last one found standing.
///
/// # Errors
/// Those of `pass`.
pub fn settle(repair: Repair, mut pass: impl FnMut(Repair) -> Result<Report>) -> Result<Report> {
    let mut report = pass(repair)?;
    for _ in 1..MAX_PASSES {
        if report.corruptions_fixed + report.leaks_fixed == 0 {
            break;
        }
        let after = pass(repair)?;
        let idle = after.corruptions_fixed + after.leaks_fixed == 0;
        report = joined(report, after);
        if idle {
            break;
        }
    }
    Ok(report)
}

/// What a repair did, and what another look found afterwards.
pub fn joined(repaired: Report, mut after: Report) -> Report {
    after.corruptions_fixed += repaired.corruptions_fixed;
    after.leaks_fixed += repaired.leaks_fixed;
    let done = repaired.findings.into_iter();
    let mut findings: Vec<Finding> = done.filter(|f| f.repaired.is_some()).collect();
    findings.append(&mut after.findings);
    findings.truncate(Report::MAX_FINDINGS);
    Report { findings, ..after }
}

/// Consistency check of one image's metadata.
pub trait Check {
    /// Walks all metadata, repairs what `repair` allows, and reports.
    ///
    /// Findings about the layers below (a missing or wrong parent) are the caller's, who opens
    /// them.
    ///
    /// Tells `progress` of as many bytes as [`Check::work`] says, more or less.
    ///
    /// # Errors
    /// The host's, and `Cancelled`; after that a repair is done in part, as after a kill.  Findings
    /// are not errors.
    fn check(&self, repair: Repair, progress: &dyn Progress) -> Result<Report>;
    /// How many bytes a check has to go through, roughly; 0: nobody knows.
    fn work(&self) -> u64 {
        0
    }
}

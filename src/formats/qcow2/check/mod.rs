//! Consistency check: every reference is followed and counted, then compared with the refcounts.
//!
//! The checker believes nothing but the header's geometry and reads the file itself, not what the
//! driver has in memory, so it serves before an image is used, too.  Tables are read in the order
//! of the file, each once, however many snapshots share it.

mod bitmaps;
mod copied;
mod counts;
mod rebuild;
mod refs;
mod snapshots;
mod tables;
mod unshare;
mod writable;

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use super::Qcow2;
use super::entry::{Layout, OFFSET};
use super::feature;
use super::header::{Header, Need};
use super::snapshot_table::SnapshotTable;
use crate::error::{Error, Result};
use crate::image::be64;
use crate::image::check::{Check, Repair, Report, Severity, settle};
use crate::storage::Storage;
use crate::util::align::{is_aligned, len64};
use crate::util::progress::Progress;
use crate::util::range;

use counts::{Counts, Kind, Met};
use unshare::Repeat;

/// Offset of the incompatible bits in the header.
const INCOMPATIBLE_FIELD: u64 = 72;
/// Most first-level entries of snapshots that are looked at before a check, to show how far it is.
const MAX_WORK: u64 = 1 << 21;

/// One check, from its start to its report.
struct Checker<'a> {
    file: &'a dyn Storage,
    /// The same, for refcounts that change.
    shared: &'a Arc<dyn Storage>,
    header: Header,
    layout: Layout,
    /// Guest data is in another file, which has no refcounts.
    external: bool,
    repair: Repair,
    progress: &'a dyn Progress,
    counts: Counts,
    /// Clusters of metadata that nothing else may point at, by what they are.
    sole: Vec<(String, Range<u64>)>,
    /// Everything that refers to clusters could be read, so what was not counted is not used.
    complete: bool,
    /// Something points past the end of the file, so that the file must not grow.
    dangling: bool,
    /// The refcount structure cannot be used as it is.
    unusable: bool,
    /// It lies where tables or guest data are, too, and which of them is right nobody can tell.
    ambiguous: bool,
    /// What is wrong with it.
    structure: Vec<String>,
    /// Second-level tables with entries that no table has: they may be something else.
    doubtful: HashSet<u64>,
    /// Refcounts on disk that are wrong and stay so, by cluster.
    differs: HashMap<u64, u64>,
    /// Words that the repair is going to set right.
    fixes: usize,
    /// Clusters whose counts this repair lowered to 1: their copied flags are to be set.
    lowered: HashSet<u64>,
    /// First-level entries that point where another one of the same table does.
    repeats: Vec<Repeat>,
    /// What is wrong with bitmaps, which may use clusters that were not counted.
    bitmap_faults: Vec<bitmaps::Fault>,
    damaged: Damaged,
    /// Snapshots of version 3 that lack what version 3 has: index, bytes of extra data.
    incomplete: Vec<(usize, usize)>,
    report: Report,
}

impl Check for Qcow2 {
    fn check(&self, repair: Repair, progress: &dyn Progress) -> Result<Report> {
        if repair != Repair::Nothing && self.writer.is_none() {
            return Err(Error::read_only());
        }
        let report = settle(repair, |repair| check(&self.file, repair, progress));
        if repair != Repair::Nothing {
            self.tables.forget(0..u64::MAX);
            self.decoded.clear();
            self.renew_behind();
        }
        report
    }

    fn work(&self) -> u64 {
        // What cannot be read is for the check to say.
        Header::read_for(&*self.file, Need::Check)
            .and_then(|header| work(&*self.file, &header))
            .unwrap_or(0)
    }
}

/// Bytes of second-level tables that a check looks at: all once, and the active ones again; 0 where
/// there are too many first-level tables to find out.
fn work(file: &dyn Storage, header: &Header) -> Result<u64> {
    let snapshots = SnapshotTable::read(file, header)?.entries;
    let lengths = snapshots.iter().map(|e| u64::from(e.l1_len()));
    if lengths.sum::<u64>() > MAX_WORK {
        return Ok(0);
    }
    let count = |l1| {
        let words = be64::read(file, l1)?;
        Ok(len64(words.iter().filter(|w| **w & OFFSET != 0).count()))
    };
    let counts = snapshots.iter().map(|entry| count(entry.l1()));
    let count = counts.sum::<Result<u64>>()? + 2 * count(header.l1())?;
    Ok(count.saturating_mul(header.cluster_size()))
}

/// What becomes of bitmaps that are damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Damaged {
    /// A repair takes them away.
    TakenAway,
    /// They stay: nobody asked for a repair.
    Kept,
}

/// Checks the image in `file`, and repairs what `repair` allows in one pass; a repair is on stable
/// media when it returns.
pub(super) fn check(
    file: &Arc<dyn Storage>,
    repair: Repair,
    progress: &dyn Progress,
) -> Result<Report> {
    pass(file, repair, progress, Damaged::TakenAway)
}

/// As `check` with a repair of everything but bitmaps, for a writer that finds the counts out of
/// date.
pub(super) fn recount(file: &Arc<dyn Storage>, progress: &dyn Progress) -> Result<Report> {
    pass(file, Repair::All, progress, Damaged::Kept)
}

fn pass(
    shared: &Arc<dyn Storage>,
    repair: Repair,
    progress: &dyn Progress,
    damaged: Damaged,
) -> Result<Report> {
    let file = &**shared;
    let header = Header::read_for(file, Need::Check)?;
    let layout = header.layout();
    let report = Report {
        total_clusters: header.size.div_ceil(header.cluster_size()),
        ..Report::default()
    };
    let mut checker = Checker {
        file,
        shared,
        external: header.has_data_file(),
        layout,
        header,
        repair,
        progress,
        counts: Counts::default(),
        sole: Vec::new(),
        complete: true,
        dangling: false,
        unusable: false,
        ambiguous: false,
        structure: Vec::new(),
        doubtful: HashSet::new(),
        differs: HashMap::new(),
        fixes: 0,
        lowered: HashSet::new(),
        repeats: Vec::new(),
        bitmap_faults: Vec::new(),
        damaged,
        incomplete: Vec::new(),
        report,
    };
    checker.run()?;
    Ok(checker.report)
}

impl Checker<'_> {
    fn run(&mut self) -> Result<()> {
        self.mark_sole("the header".to_owned(), 0..self.layout.cluster_size())?;
        let snapshots = self.snapshots()?;
        let tables = self.first_level(&snapshots)?;
        self.bitmaps()?;
        let blocks = self.refcount_table()?;
        let fixes = self.second_level(&tables)?;
        self.overlaps();
        if !self.is_complete() && self.repair != Repair::Nothing {
            let text = "leaks are not given back: what could not be followed may refer to them";
            self.report.add(Severity::Note, 1, text.to_owned(), None);
        }
        self.compare(&blocks)?;
        if self.rebuilds() {
            self.rebuild()?;
        }
        self.copied(&tables)?;
        self.apply(&fixes)?;
        self.mend_bitmaps()?;
        self.unshare()?;
        self.complete_snapshots()?;
        self.header_faults()?;
        self.writable()?;
        self.finish()
    }

    /// Whether what was not counted is not used.
    fn is_complete(&self) -> bool {
        self.complete && self.bitmap_faults.is_empty()
    }

    /// Whether nothing is wrong any more but what is reported later, so that a repair may rely on
    /// counts and tables.
    fn is_sound(&self) -> bool {
        self.report.corruptions == 0
            && self.report.check_errors == 0
            && self.differs.is_empty()
            && self.is_complete()
            && !self.dangling
            && !self.unusable
    }

    /// Whether the repair makes the refcount structure anew.
    fn rebuilds(&self) -> bool {
        self.unusable && self.repair == Repair::All && !self.dangling && !self.ambiguous
    }

    fn corrupt(&mut self, text: String) {
        self.report.add(Severity::Corruption, 1, text, None);
    }

    /// As `corrupt`, where what it refers to cannot be followed for that.
    fn lost(&mut self, text: String) {
        self.complete = false;
        self.corrupt(text);
    }

    /// Counts a reference to a range of the file; false, with a finding, where it is not inside.
    fn mark(
        &mut self,
        what: &dyn Fn() -> String,
        host: Range<u64>,
        times: u64,
        kind: Kind,
    ) -> Result<bool> {
        if !self.layout.is_inside(&host, self.file.size()) {
            let end = self.file.size();
            self.dangling = true;
            self.corrupt(format!(
                "{} is at {:#x}, {} bytes long (the file ends at {end:#x})",
                what(),
                host.start,
                range::len(&host)
            ));
            return Ok(false);
        }
        let bits = self.layout.cluster_bits;
        for cluster in self.layout.clusters(&host) {
            if self.counts.add(cluster, times, kind)? == Met::OtherKind {
                // Whichever of the two is wrong pointed elsewhere once.
                let other = match kind {
                    Kind::Data => "metadata",
                    Kind::Table => "guest data",
                };
                self.lost(format!(
                    "{} at {:#x} overlaps {other} in the cluster at {:#x}",
                    what(),
                    host.start,
                    cluster << bits
                ));
            }
        }
        Ok(true)
    }

    /// Counts metadata that nothing else may point at.
    fn mark_sole(&mut self, what: String, host: Range<u64>) -> Result<bool> {
        let marked = self.mark(&|| what.clone(), host.clone(), 1, Kind::Table)?;
        if marked && range::len(&host) > 0 {
            let clusters = self.layout.clusters(&host);
            self.sole.push((what, clusters));
        }
        Ok(marked)
    }

    /// Metadata that something else points at, too.
    fn overlaps(&mut self) {
        let sole = std::mem::take(&mut self.sole);
        // How often such metadata is in a cluster, where anything else is.
        let mut uses: HashMap<u64, u64> = HashMap::new();
        for cluster in sole.iter().flat_map(|(_, clusters)| clusters.clone()) {
            if self.counts.get(cluster) > 1 {
                *uses.entry(cluster).or_default() += 1;
            }
        }
        for (what, clusters) in &sole {
            let mut shared = clusters.clone().filter(|c| self.counts.get(*c) > 1);
            if let Some(first) = shared.next() {
                let count = 1 + shared.count();
                let host = first << self.layout.cluster_bits;
                let text = format!(
                    "{what}: {count} of its clusters, the first at {host:#x}, have another use too"
                );
                self.complete = false;
                if what.starts_with(refs::BLOCK) || what.starts_with(refs::TABLE) {
                    let mut clusters = clusters.clone();
                    let uses = |c: u64| uses.get(&c).copied().unwrap_or(1);
                    self.ambiguous |= clusters.any(|c| self.counts.get(c) > uses(c));
                    self.unusable = true;
                    self.structure.push(text);
                } else {
                    self.corrupt(text);
                }
            }
        }
        self.sole = sole;
    }

    /// Whether nothing but one table is in the cluster at `host`.
    fn is_unshared(&self, host: u64) -> bool {
        let cluster = host >> self.layout.cluster_bits;
        is_aligned(host, self.layout.cluster_size())
            && host < self.file.size()
            && !self.sole.iter().any(|(_, s)| s.contains(&cluster))
            && self.counts.is_table(cluster)
    }

    /// Words of second-level tables that are wrong in themselves, set right.
    fn apply(&mut self, fixes: &[tables::Fix]) -> Result<()> {
        for fix in fixes {
            let done = self.repair == Repair::All
                && self.is_unshared(fix.table)
                && !self.doubtful.contains(&fix.table);
            if done {
                self.file.write_at(&fix.word.to_be_bytes(), fix.host)?;
            }
            let done = done.then(|| format!("set to {:#018x}", fix.word));
            self.report
                .add(Severity::Corruption, 1, fix.text.clone(), done);
        }
        Ok(())
    }

    /// After a repair that leaves nothing wrong: the bits that say otherwise.
    fn finish(&mut self) -> Result<()> {
        let marks = self.header.incompatible & (feature::DIRTY | feature::CORRUPT);
        let clean = self.report.corruptions == 0 && self.report.check_errors == 0;
        let clear = self.repair != Repair::Nothing && clean && marks != 0;
        if self.repair != Repair::Nothing {
            self.file.sync()?;
        }
        if clear {
            let bits = self.header.incompatible & !marks;
            self.file
                .write_at(&bits.to_be_bytes(), INCOMPATIBLE_FIELD)?;
            self.file.sync()?;
        }
        let done = || clear.then(|| "cleared".to_owned());
        if marks & feature::CORRUPT != 0 {
            // Nobody writes to it so.
            let text = "the image is marked corrupt (incompatible bit 1)".to_owned();
            self.report.add(Severity::Corruption, 1, text, done());
        }
        if marks & feature::DIRTY != 0 {
            let text = "the image was not closed cleanly (dirty bit)".to_owned();
            self.report.add(Severity::Note, 1, text, done());
        }
        Ok(())
    }
}

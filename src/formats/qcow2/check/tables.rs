//! First-level and second-level tables: every entry looked at once, every cluster counted.

use std::collections::HashMap;
use std::fmt::Display;
use std::ops::Range;

use super::Checker;
use super::counts::Kind;
use crate::error::{Error, ErrorKind, Result};
use crate::formats::qcow2::entry::{COMPRESSED, COPIED, OFFSET, SUBCLUSTERS, ZERO};
use crate::image::be64;
use crate::image::check::Repair;
use crate::image::units::Space;
use crate::util::align::{clamp_len, is_aligned, len64};

/// Bits of a second-level entry that must be 0 where the cluster is not compressed.
const L2_RESERVED: u64 = !(OFFSET | COPIED | ZERO);
/// Bytes of tables read at a time.
const STEP: u64 = 1 << 20;
/// Most second-level tables: as many as the longest first-level table has entries.
const MAX_TABLES: usize = 1 << 22;
/// Most bytes of first-level tables, those of snapshots among them.
const MAX_FIRST_LEVEL: u64 = 4 << 30;
/// Most words that a repair sets right in one run.
const MAX_FIXES: usize = 1 << 16;

/// Where one first-level table is.
#[derive(Debug, Clone)]
pub(super) struct FirstLevel {
    /// What it is, for findings.
    pub(super) what: String,
    /// Its offset, a multiple of the cluster size.
    pub(super) offset: u64,
    /// Its entries.
    pub(super) len: u64,
    /// It is that of the disk, not of a snapshot.
    pub(super) active: bool,
    /// Which it is of those that are looked at, from 1 on.
    pub(super) number: usize,
}

/// One second-level table.
#[derive(Debug, Clone, Copy)]
pub(super) struct Table {
    /// Its offset.
    pub(super) host: u64,
    /// First-level entries that point at it.
    pub(super) times: u64,
    /// The first index in the active first-level table that points at it.
    pub(super) active: Option<u64>,
    /// The first-level table that was last seen to point at it.
    pub(super) seen: usize,
}

/// A word of a second-level table that is wrong in itself, and what it should be.
#[derive(Debug)]
pub(super) struct Fix {
    /// Offset of the table.
    pub(super) table: u64,
    /// Offset of the word.
    pub(super) host: u64,
    /// The right word.
    pub(super) word: u64,
    /// What is wrong.
    pub(super) text: String,
}

/// Where an entry is.
#[derive(Debug, Clone, Copy)]
struct At {
    table: Table,
    index: u64,
    host: u64,
}

impl At {
    /// What is wrong with the entry, as a finding.
    fn text(self, what: &dyn Display) -> String {
        format!("the L2 entry at {:#x} {what}", self.host)
    }
}

impl Checker<'_> {
    /// Counts all first-level tables; gives the second-level ones in the order of the file.
    pub(super) fn first_level(&mut self, snapshots: &[FirstLevel]) -> Result<Vec<Table>> {
        let active = FirstLevel {
            what: "the L1 table".to_owned(),
            offset: self.header.l1_offset,
            len: u64::from(self.header.l1_len),
            active: true,
            number: 1,
        };
        if self.external && !snapshots.is_empty() {
            self.corrupt(format!(
                "there are {} snapshots in an image with an external data file (allowed: 0)",
                snapshots.len()
            ));
        }
        let bytes: u64 = snapshots.iter().map(|s| s.len * 8).sum();
        if bytes > MAX_FIRST_LEVEL {
            let text = format!(
                "the L1 tables of snapshots have {bytes} bytes (allowed in a check: {MAX_FIRST_LEVEL})"
            );
            return Err(Error::new(ErrorKind::OutOfRange, text));
        }
        let mut found = HashMap::new();
        for table in std::iter::once(&active).chain(snapshots) {
            let end = table.offset.saturating_add(table.len * 8);
            let cut = table.active && end > self.file.size();
            if cut && table.offset < self.file.size() {
                // Nobody opens it so: what is missing would read as nothing.
                self.dangling = true;
                self.lost(format!(
                    "{} ends at {end:#x} (the file ends at {:#x})",
                    table.what,
                    self.file.size()
                ));
            }
            if self.mark_sole(table.what.clone(), table.offset..end)? {
                self.first_level_entries(table, &mut found)?;
            } else {
                self.complete = false;
            }
        }
        let mut tables: Vec<Table> = found.into_values().collect();
        tables.sort_unstable_by_key(|t| t.host);
        for table in &tables {
            let end = table.host.saturating_add(self.layout.cluster_size());
            let what = || "an L2 table".to_owned();
            if !self.mark(&what, table.host..end, table.times, Kind::Table)? {
                self.complete = false;
            }
        }
        let end = self.file.size();
        tables.retain(|t| t.host < end);
        Ok(tables)
    }

    fn first_level_entries(
        &mut self,
        table: &FirstLevel,
        found: &mut HashMap<u64, Table>,
    ) -> Result<()> {
        let end = table.offset + table.len * 8;
        let mut at = table.offset;
        while at < end {
            let run = self.file.run(at, (end - at).min(STEP))?;
            let len = run.len.next_multiple_of(8).min(end - at);
            let mut bytes = vec![0; clamp_len(len, usize::MAX)];
            if run.data {
                self.file.read_at(&mut bytes, at)?;
                for (index, word) in be64::words(&bytes).enumerate() {
                    let index = (at - table.offset) / 8 + len64(index);
                    self.first_level_entry(table, index, word, found)?;
                }
            }
            at += len;
        }
        Ok(())
    }

    /// Judges and counts one entry.
    fn first_level_entry(
        &mut self,
        table: &FirstLevel,
        index: u64,
        word: u64,
        found: &mut HashMap<u64, Table>,
    ) -> Result<()> {
        let judged = self.layout.first_level(word);
        if let Err(fault) = &judged {
            self.lost(format!("entry {index} of {} {fault}", table.what));
        }
        // Where only flags are wrong, the offset is counted.
        let host = judged.unwrap_or(Some(word & OFFSET)).unwrap_or(0);
        if host == 0 || !is_aligned(host, self.layout.cluster_size()) {
            return Ok(());
        }
        if found.len() >= MAX_TABLES && !found.contains_key(&host) {
            let text = format!("there are too many L2 tables to check (allowed: {MAX_TABLES})");
            return Err(Error::new(ErrorKind::OutOfRange, text));
        }
        let entry = found.entry(host).or_insert(Table {
            host,
            times: 0,
            active: None,
            seen: 0,
        });
        entry.times += 1;
        let repeated = entry.seen == table.number;
        entry.seen = table.number;
        if table.active && entry.active.is_none() {
            entry.active = Some(index);
        }
        if repeated {
            self.repeated(table, index, host);
        }
        Ok(())
    }

    /// Calls `each` with every table and its bytes; neighbours are read in one piece.
    pub(super) fn each_table(
        &mut self,
        tables: &[Table],
        mut each: impl FnMut(&mut Self, Table, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let size = self.layout.cluster_size();
        let most = clamp_len(STEP / size, usize::MAX).max(1);
        let mut rest = tables;
        let mut buf = Vec::new();
        // The file is known to hold data up to here.
        let mut data = 0;
        while let Some(first) = rest.first() {
            self.progress.check()?;
            let follows = |pair: &[Table]| pair[0].host.checked_add(size) == Some(pair[1].host);
            let more = rest.windows(2).take(most - 1).take_while(|p| follows(p));
            let (run, after) = rest.split_at(1 + more.count());
            rest = after;
            let times = run.iter().map(|t| t.times).fold(0, u64::saturating_add);
            self.progress.advance(times.saturating_mul(size));
            let end = first.host + size * len64(run.len());
            if end > data {
                let found = self.file.run(first.host, end - first.host)?;
                if !found.data && first.host + found.len >= end {
                    continue;
                }
                data = if found.data {
                    first.host + found.len
                } else {
                    0
                };
            }
            buf.resize(clamp_len(size, usize::MAX) * run.len(), 0);
            self.file.read_at(&mut buf, first.host)?;
            for (table, bytes) in run.iter().zip(buf.chunks(clamp_len(size, usize::MAX))) {
                each(self, *table, bytes)?;
            }
        }
        Ok(())
    }

    /// Counts what all second-level tables point at; gives the words that can be set right.
    pub(super) fn second_level(&mut self, tables: &[Table]) -> Result<Vec<Fix>> {
        let mut fixes = Vec::new();
        self.each_table(tables, |checker, table, bytes| {
            let (layout, before) = (checker.layout, checker.report.corruptions);
            // Where the next cluster of the disk would be, were it in one piece with the last.
            let mut next = None;
            for (index, (word, bits)) in (0..).zip(layout.entries(bytes)) {
                if word != 0 || bits != 0 {
                    let host = table.host + index * layout.entry_len();
                    let at = At { table, index, host };
                    let fix = checker.second_level_entry(at, word, bits, &mut next)?;
                    fixes.extend(fix);
                }
            }
            if checker.report.corruptions > before {
                checker.doubtful.insert(table.host);
            }
            Ok(())
        })?;
        Ok(fixes)
    }

    fn second_level_entry(
        &mut self,
        at: At,
        word: u64,
        bits: u64,
        next: &mut Option<u64>,
    ) -> Result<Option<Fix>> {
        if word & COMPRESSED == 0 && word & L2_RESERVED != 0 {
            self.lost(at.text(&format_args!("is {word:#018x} (reserved bits must be 0)")));
        }
        let stored = bits & !(!0 << SUBCLUSTERS);
        match self.layout.cluster(word).map(|cluster| cluster.space) {
            Ok(Space::Encoded { start, end }) => {
                if bits != 0 {
                    self.corrupt(at.text(&format_args!(
                        "is of a compressed cluster and has the subcluster bitmap {bits:#018x} (expected: 0)"
                    )));
                }
                self.compressed(at, word, start..end)
            }
            Ok(Space::None) => {
                if stored != 0 {
                    self.corrupt(at.text(&format_args!(
                        "has no space, but stored subclusters (bitmap {bits:#018x})"
                    )));
                }
                Ok(None)
            }
            Ok(Space::Own(host) | Space::Shared(host)) => {
                if stored & bits >> SUBCLUSTERS != 0 {
                    self.corrupt(at.text(&format_args!(
                        "has subclusters that are both stored and zero (bitmap {bits:#018x})"
                    )));
                }
                self.standard(at, host, next)
            }
            // The entry does not decode: its offset is misaligned.
            Err(_) => Ok(self.misaligned(at, word, stored)),
        }
    }

    fn standard(&mut self, at: At, host: u64, next: &mut Option<u64>) -> Result<Option<Fix>> {
        let size = self.layout.cluster_size();
        if at.table.active.is_some() {
            self.report.allocated_clusters += 1;
            if next.is_some_and(|next| next != host) {
                self.report.fragmented_clusters += 1;
            }
            *next = Some(host + size);
        }
        if self.external {
            self.in_data_file(at, host);
        } else if host == 0 {
            self.lost(at.text(&"points at the header (allowed: a cluster after it)"));
        } else {
            self.count("a cluster", at, host..host + size)?;
        }
        Ok(None)
    }

    /// Counts what an entry points at.
    fn count(&mut self, what: &str, at: At, host: Range<u64>) -> Result<()> {
        let what = || format!("{what} (L2 entry at {:#x})", at.host);
        if !self.mark(&what, host, at.table.times, Kind::Data)? {
            self.complete = false;
        }
        Ok(())
    }

    /// In a data file guest data is at its own offset, raw or not, so that nothing is there twice.
    fn in_data_file(&mut self, at: At, host: u64) {
        let Some(l1) = at.table.active else {
            return;
        };
        let cluster = (l1 << self.header.l2_bits()) + at.index;
        let guest = cluster.checked_mul(self.layout.cluster_size());
        if guest != Some(host) {
            self.corrupt(at.text(&format_args!(
                "points at {host:#x} of the data file (expected: the guest offset)"
            )));
        }
    }

    fn compressed(&mut self, at: At, word: u64, packed: Range<u64>) -> Result<Option<Fix>> {
        if self.external {
            let text = "is of a compressed cluster in an image with an external data file";
            self.corrupt(at.text(&text));
            return Ok(None);
        }
        if at.table.active.is_some() {
            // Compressed clusters are fragments by nature.
            self.report.allocated_clusters += 1;
            self.report.compressed_clusters += 1;
            self.report.fragmented_clusters += 1;
        }
        self.count("a compressed cluster", at, packed)?;
        if word & COPIED == 0 {
            return Ok(None);
        }
        let text = at.text(&"is of a compressed cluster and has the copied flag (expected: not)");
        Ok(self.fix(at, word & !COPIED, text))
    }

    /// An entry that points nowhere: without data it can be made what it reads as.
    fn misaligned(&mut self, at: At, word: u64, stored: u64) -> Option<Fix> {
        let (host, size) = (word & OFFSET, self.layout.cluster_size());
        let text = at.text(&format_args!(
            "points at {host:#x} (allowed: multiples of {size:#x})"
        ));
        let data = match self.layout.extended {
            true => stored != 0,
            false => word & ZERO == 0 || self.layout.version < 3,
        };
        if data {
            self.lost(text);
            return None;
        }
        let zero = if self.layout.extended { 0 } else { ZERO };
        self.fix(at, zero, text)
    }

    fn fix(&mut self, at: At, word: u64, text: String) -> Option<Fix> {
        if self.repair != Repair::All || self.fixes >= MAX_FIXES {
            self.corrupt(text);
            return None;
        }
        self.fixes += 1;
        Some(Fix {
            table: at.table.host,
            host: at.host,
            word,
            text,
        })
    }
}

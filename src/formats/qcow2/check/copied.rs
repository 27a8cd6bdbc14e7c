//! The copied flags of the active tables: set exactly where the refcount is 1.

use super::Checker;
use super::tables::Table;
use crate::error::Result;
use crate::formats::qcow2::entry::{COMPRESSED, COPIED, OFFSET};
use crate::image::be64;
use crate::image::check::{Repair, Severity};
use crate::util::align::is_aligned;

impl Checker<'_> {
    /// The refcount that the file has now.
    fn refcount(&self, host: u64) -> u64 {
        let cluster = host >> self.layout.cluster_bits;
        let differs = self.differs.get(&cluster).copied();
        differs.unwrap_or_else(|| self.counts.get(cluster))
    }

    /// Looks at the flags of the active first-level table and of its second-level tables.
    pub(super) fn copied(&mut self, tables: &[Table]) -> Result<()> {
        let sound = !self.unusable && self.report.check_errors == 0;
        let mends = match self.repair {
            Repair::Nothing => false,
            // Only flags that this repair made wrong, or another before it that was stopped.
            Repair::Leaks => sound,
            Repair::All => sound && self.differs.is_empty(),
        };
        if mends {
            // Counts come before flags that rely on them.
            self.file.sync()?;
        }
        let len = u64::from(self.header.l1_len);
        for table in tables {
            let Some(index) = table.active else { continue };
            if index < len {
                self.copied_word(self.header.l1_offset + index * 8, mends)?;
            }
        }
        let repeats = std::mem::take(&mut self.repeats);
        let mut active = repeats.iter().filter(|r| r.active);
        active.try_for_each(|repeat| self.copied_word(repeat.at, mends))?;
        self.repeats = repeats;
        let active: Vec<Table> = tables
            .iter()
            .copied()
            .filter(|t| t.active.is_some())
            // Each is looked at once more, whoever else points at it.
            .map(|t| Table { times: 1, ..t })
            .collect();
        self.each_table(&active, |checker, table, bytes| {
            let mends = mends && !checker.doubtful.contains(&table.host);
            let layout = checker.layout;
            for (index, (word, _)) in (0..).zip(layout.entries(bytes)) {
                let host = word & OFFSET;
                if word & COMPRESSED != 0 || host == 0 {
                    continue;
                }
                let at = table.host + index * layout.entry_len();
                match checker.external {
                    true => checker.copied_in_data_file(at, word, mends)?,
                    false => checker.copied_entry("L2", at, word, mends)?,
                }
            }
            Ok(())
        })
    }

    /// Nobody counts the clusters of a data file: each has one that points at it.
    fn copied_in_data_file(&mut self, at: u64, word: u64, mends: bool) -> Result<()> {
        if word & COPIED != 0 {
            return Ok(());
        }
        let done = mends && self.repair == Repair::All && self.is_complete();
        if done {
            self.file.write_at(&(word | COPIED).to_be_bytes(), at)?;
        }
        let done = done.then(|| "set".to_owned());
        let text = format!(
            "the L2 entry at {at:#x} is {word:#018x}, of a cluster in the data file (copied flag)"
        );
        self.report.add(Severity::Corruption, 1, text, done);
        Ok(())
    }

    fn copied_word(&mut self, at: u64, mends: bool) -> Result<()> {
        let word = be64::read_one(self.file, at)?;
        self.copied_entry("L1", at, word, mends)
    }

    fn copied_entry(&mut self, which: &str, at: u64, word: u64, mends: bool) -> Result<()> {
        let host = word & OFFSET;
        let inside = host < self.file.size() && is_aligned(host, self.layout.cluster_size());
        if !inside {
            // Found before, and no flag would help it.
            return Ok(());
        }
        let count = self.refcount(host);
        let (is, expected) = (word & COPIED != 0, count == 1);
        if is == expected {
            return Ok(());
        }
        let cluster = host >> self.layout.cluster_bits;
        let lowered = self.lowered.contains(&cluster);
        // Of one that gave a leak back and was stopped before it set the flag that goes with it.
        let stopped = !is && self.counts.get(cluster) == 1;
        // A flag is set only where nothing unseen may refer to the cluster.
        let done = mends
            && (is || self.is_complete())
            && (lowered || stopped || self.repair == Repair::All);
        if done {
            let right = word ^ COPIED;
            self.file.write_at(&right.to_be_bytes(), at)?;
        }
        let text = format!(
            "the {which} entry at {at:#x} is {word:#018x}, but the refcount of {host:#x} is {count} (copied flag)"
        );
        // With a leak given back the flag of the last one that is left changes: no damage.
        let severity = match done && lowered {
            true => Severity::Note,
            false => Severity::Corruption,
        };
        let done = done.then(|| if is { "cleared" } else { "set" }.to_owned());
        self.report.add(severity, 1, text, done);
        Ok(())
    }
}

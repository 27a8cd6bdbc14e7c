//! Check of a stream: each grain behind its marker, and how the file ends.

use crate::error::{ErrorKind, Result};
use crate::formats::vmdk::header::{SECTOR, SECTOR_LEN};
use crate::formats::vmdk::sparse::Sparse;
use crate::formats::vmdk::stream::{MARKER, MARKER_LEN, marker_of};
use crate::formats::vmdk::tables::Entry;
use crate::image::Wait;
use crate::image::check::{Repair, Report};
use crate::util::align::clamp_len;
use crate::util::progress::Progress;

/// Wrong grains that are told of.
const MAX_FAULTS: u64 = 1 << 16;

impl Sparse {
    /// Checks it, and mends its end where `repair` allows that.
    pub(super) fn check_stream(
        &self,
        report: &mut Report,
        write: bool,
        repair: Repair,
        progress: &dyn Progress,
    ) -> Result<()> {
        let Some(packed) = &self.packed else {
            return Ok(());
        };
        let (storage, tables) = (&*self.storage, self.tables.load());
        let geometry = tables.geometry;
        let mut grain = vec![0; clamp_len(geometry.grain, usize::MAX)];
        let (mut index, mut wrong, mut end) = (0, 0, geometry.first);
        let mut before = 0;
        report.total_clusters += geometry.grains();
        while index < geometry.grains() {
            progress.check()?;
            let found = match tables.entry(storage, index, Wait::Yes) {
                Ok(Entry::At(host)) => {
                    let read = packed.read(storage, &tables, &mut grain, index * geometry.grain);
                    read.map(|_| host)
                }
                Ok(_) => {
                    index = tables.alike(storage, index, geometry.grains(), |_, next| {
                        !matches!(next, Entry::At(_))
                    });
                    continue;
                }
                Err(e) => Err(e),
            };
            match found {
                Ok(host) => {
                    let mut marker = [0; MARKER_LEN];
                    storage.read_at(&mut marker, host)?;
                    let (_, len) = marker_of(&marker);
                    report.allocated_clusters += 1;
                    report.compressed_clusters += 1;
                    report.fragmented_clusters += u64::from(before != host && before != 0);
                    before = (host + MARKER + len).next_multiple_of(SECTOR);
                    end = end.max(before);
                }
                Err(e) if e.kind() == ErrorKind::Corrupt && wrong < MAX_FAULTS => {
                    report.corruption(e.message().to_owned(), None);
                    wrong += 1;
                }
                Err(e) => return Err(e),
            }
            index += 1;
        }
        report.image_end_offset = report.image_end_offset.max(end);
        match self.ends_with_footer {
            // The footer is looked for at the end, so that is where it is.
            true => Ok(()),
            false => {
                // Tables may lie behind the grains.
                let all = end.max(self.tables_end()?);
                self.check_end(report, all, wrong == 0 && write && all == end, repair)
            }
        }
    }

    /// Behind the last of its directory, its tables and its descriptor.
    fn tables_end(&self) -> Result<u64> {
        let (storage, tables) = (&*self.storage, self.tables.load());
        let geometry = tables.geometry;
        let mut end = geometry.gd + geometry.tables() * 4;
        end = end.max(self.kept.as_ref().map_or(0, |host| host.end));
        tables.gd.each(storage, |number, word| {
            if let Ok(Entry::At(host)) = tables.table_at(storage, number, word) {
                end = end.max(host + geometry.per_table * 4);
            }
            Ok(())
        })?;
        Ok(end.next_multiple_of(SECTOR))
    }

    /// A stream whose tables come first ends with one sector of zeroes behind its last grain: others
    /// take the first such sector for the end, and compare what they read up to there.
    fn check_end(&self, report: &mut Report, end: u64, mends: bool, repair: Repair) -> Result<()> {
        let storage = &*self.storage;
        let mut last = [0; SECTOR_LEN];
        storage.read_at(&mut last, end)?;
        if storage.size() == end + SECTOR && last.iter().all(|byte| *byte == 0) {
            return Ok(());
        }
        let mends = mends && repair == Repair::All && !storage.has_fixed_len();
        if mends {
            storage.set_len(end)?;
            storage.set_len(end + SECTOR)?;
            storage.sync()?;
        }
        let text = format!(
            "the stream has {} bytes (allowed: {}, its grains and one sector of zeroes, at which others stop)",
            storage.size(),
            end + SECTOR
        );
        report.corruption(text, mends.then_some("it ends there now"));
        Ok(())
    }
}

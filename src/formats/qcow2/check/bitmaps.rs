//! The bitmap directory and the tables of the bitmaps in it, counted.
//!
//! Bitmaps hold no guest data, and one that is damaged keeps the whole image from being opened by
//! others.  So a repair takes it away, as those do who make bitmaps and find it unusable.

use std::collections::HashSet;
use std::ops::Range;

use super::counts::Kind;
use super::{Checker, Damaged};
use crate::error::{Error, ErrorKind, Result};
use crate::formats::qcow2::bitmap_dir::{self, Directory, Entry, Scan};
use crate::formats::qcow2::header::Header;
use crate::formats::qcow2::switch::switch;
use crate::image::be64;
use crate::image::check::{Repair, Severity};
use crate::util::align::len64;
use crate::util::range;

/// Bytes of a table read at a time.
const STEP: usize = 1 << 20;

/// Something that is wrong with bitmaps.
#[derive(Debug)]
pub(super) struct Fault {
    /// The bitmap's place in the directory; `None`: it is the directory itself.
    bitmap: Option<usize>,
    /// What is wrong.
    text: String,
}

impl Checker<'_> {
    fn bitmap_fault(&mut self, bitmap: Option<usize>, text: impl Into<String>) {
        let text = text.into();
        self.bitmap_faults.push(Fault { bitmap, text });
    }

    /// Counts the bitmap directory, the tables and the clusters of all bitmaps.
    pub(super) fn bitmaps(&mut self) -> Result<()> {
        let scan = match Scan::read(self.file, &self.header) {
            Ok(Some(scan)) => scan,
            Ok(None) => return Ok(()),
            Err(e) if e.kind() == ErrorKind::Corrupt => {
                self.bitmap_fault(None, e.message());
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        let place = scan.place.range();
        if let Some(cluster) = self.met(&place) {
            self.bitmap_fault(
                None,
                format!("the bitmap directory is at {cluster:#x}, which has another use too"),
            );
            return Ok(());
        }
        self.mark_sole("the bitmap directory".to_owned(), place)?;
        for (index, (entry, fault)) in scan.entries.iter().enumerate() {
            match fault {
                Some(fault) => self.bitmap_fault(Some(index), fault.message()),
                None => self.bitmap(index, entry)?,
            }
        }
        if let Some(fault) = scan.fault {
            self.bitmap_fault(None, fault.message());
        }
        Ok(())
    }

    /// The first cluster of a range of the file that something else was found to use.
    fn met(&self, host: &Range<u64>) -> Option<u64> {
        let bits = self.layout.cluster_bits;
        let mut clusters = self.layout.clusters(host);
        let met = clusters.find(|cluster| self.counts.get(*cluster) > 0);
        met.map(|cluster| cluster << bits)
    }

    /// Whether a range can be counted for a bitmap; false, with a finding, where not.
    fn bitmap_has(&mut self, index: usize, what: &str, host: &Range<u64>) -> bool {
        let fault = if !self.layout.is_inside(host, self.file.size()) {
            let (len, end) = (range::len(host), self.file.size());
            Some(format!("{len} bytes long (the file ends at {end:#x})"))
        } else {
            let met = self.met(host);
            met.map(|cluster| format!("and {cluster:#x} has another use too"))
        };
        match fault {
            None => true,
            Some(fault) => {
                let start = host.start;
                self.bitmap_fault(
                    Some(index),
                    format!("{what} of bitmap {index} is at {start:#x}, {fault}"),
                );
                false
            }
        }
    }

    fn bitmap(&mut self, index: usize, entry: &Entry) -> Result<()> {
        let table = entry.table_range();
        if !self.bitmap_has(index, "the table", &table) {
            return Ok(());
        }
        self.mark_sole(format!("the table of bitmap {index}"), table.clone())?;
        for at in table.clone().step_by(STEP) {
            let part = at..table.end.min(at + len64(STEP));
            for word in be64::read(self.file, part)? {
                if !self.bitmap_cluster(index, word)? {
                    // One fault says enough of a bitmap.
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Counts the cluster of a word of a table; false, with a finding, where it cannot be.
    fn bitmap_cluster(&mut self, index: usize, word: u64) -> Result<bool> {
        let size = self.layout.cluster_size();
        let host = match bitmap_dir::cluster(word, size) {
            Ok(Some(host)) => host..host.saturating_add(size),
            Ok(None) => return Ok(true),
            Err(word) => {
                self.bitmap_fault(
                    Some(index),
                    format!(
                        "an entry of the table of bitmap {index} is {word:#018x} (allowed: multiples of {size:#x}, 0, 1)"
                    ),
                );
                return Ok(false);
            }
        };
        if !self.bitmap_has(index, "a cluster", &host) {
            return Ok(false);
        }
        let what = || format!("a cluster of bitmap {index}");
        self.mark(&what, host, 1, Kind::Table)
    }

    /// Reports what is wrong with bitmaps; a repair takes those away, and what they use is a leak
    /// from then on.
    pub(super) fn mend_bitmaps(&mut self) -> Result<()> {
        if self.bitmap_faults.is_empty() {
            return Ok(());
        }
        let mut done = None;
        if self.repair == Repair::All && self.damaged == Damaged::TakenAway {
            match self.drop_bitmaps() {
                Ok(()) => done = Some("taken away".to_owned()),
                // The header is damaged, or has no room to change; nothing was written.
                Err(e) if matches!(e.kind(), ErrorKind::Unsupported | ErrorKind::Corrupt) => {}
                Err(e) => return Err(e),
            }
        }
        // They stay, for what was not counted.
        for fault in &self.bitmap_faults {
            self.report
                .add(Severity::Corruption, 1, fault.text.clone(), done.clone());
        }
        Ok(())
    }

    /// Takes the bitmaps with faults away, all where the directory has some itself.  The image is
    /// without bitmaps while the others are written to where the directory is.
    fn drop_bitmaps(&mut self) -> Result<()> {
        let mut header = Header::read(self.file)?.without_faults();
        let kept = self.kept_bitmaps(&header)?;
        Directory::default().point(&mut header, 0, 0);
        switch(self.file, &header)?;
        let Some((kept, offset)) = kept else {
            return Ok(());
        };
        let bytes = kept.encode()?;
        self.file.write_at(&bytes, offset)?;
        self.file.sync()?;
        kept.point(&mut header, offset, len64(bytes.len()));
        switch(self.file, &header)
    }

    /// The bitmaps without faults, and where their directory is to be.
    fn kept_bitmaps(&self, header: &Header) -> Result<Option<(Directory, u64)>> {
        let faulty: Option<HashSet<usize>> = self.bitmap_faults.iter().map(|f| f.bitmap).collect();
        let Some(faulty) = faulty else {
            return Ok(None);
        };
        let Some(scan) = Scan::read(self.file, header)? else {
            return Err(Error::corrupt("the bitmap directory changed"));
        };
        let place = scan.place;
        let mut clusters = self.layout.clusters(&place.range());
        if clusters.any(|cluster| self.counts.get(cluster) != 1) {
            return Ok(None);
        }
        let entries = scan.entries.into_iter().enumerate();
        let entries = entries.filter(|(index, _)| !faulty.contains(index));
        let kept = Directory {
            entries: entries.map(|(_, (entry, _))| entry).collect(),
            place: Some(place),
        };
        Ok((!kept.entries.is_empty()).then_some((kept, place.offset)))
    }
}

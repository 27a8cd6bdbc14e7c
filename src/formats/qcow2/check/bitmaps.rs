//! The bitmap directory and the tables of the bitmaps in it, counted.

use super::Checker;
use super::counts::Kind;
use crate::error::{ErrorKind, Result};
use crate::formats::qcow2::bitmap_dir::{self, Directory};
use crate::formats::qcow2::extension;
use crate::util::align::{clamp_len, is_aligned};

/// Autoclear bit 0: the bitmaps extension is consistent.
const BITMAPS: u64 = 1;
/// Bytes of the extension.
const EXTENSION_LEN: usize = 24;
/// Most bitmaps, as QEMU has it.
const MAX_BITMAPS: u64 = 65_535;
/// Longest directory in bytes, as QEMU has it.
const MAX_DIRECTORY: u64 = 1024 * MAX_BITMAPS;
/// Longest table of one bitmap in entries, as QEMU has it.
const MAX_TABLE: u64 = 0x800_0000 / 8;
/// Bytes of a directory entry before its extra data.
const FIXED: usize = 24;
/// Bytes of a table read at a time.
const STEP: u64 = 1 << 20;

fn number(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

impl Checker<'_> {
    /// Counts the bitmap directory, the tables and the clusters of all bitmaps.
    pub(super) fn bitmaps(&mut self) -> Result<()> {
        let found = self.header.extensions.iter();
        let mut found = found.filter(|e| e.kind == extension::BITMAPS);
        let Some(data) = found.next().map(|e| e.data.clone()) else {
            return Ok(());
        };
        if self.header.autoclear & BITMAPS == 0 {
            return Ok(());
        }
        if data.len() != EXTENSION_LEN {
            self.complete = false;
            self.corrupt(format!(
                "the bitmaps extension has {} bytes (expected: {EXTENSION_LEN})",
                data.len()
            ));
            return Ok(());
        }
        let (count, len, start) = (
            number(&data[..4]),
            number(&data[8..16]),
            number(&data[16..24]),
        );
        let aligned = start != 0 && is_aligned(start, self.layout.cluster_size());
        if count > MAX_BITMAPS || len > MAX_DIRECTORY || !aligned {
            self.complete = false;
            self.corrupt(format!(
                "the bitmap directory has {count} entries in {len} bytes at {start:#x} (allowed: {MAX_BITMAPS}, {MAX_DIRECTORY}, a multiple of {:#x})",
                self.layout.cluster_size()
            ));
            return Ok(());
        }
        if !self.mark_sole(
            "the bitmap directory".to_owned(),
            start..start.saturating_add(len),
        )? {
            self.complete = false;
            return Ok(());
        }
        let mut directory = vec![0; clamp_len(len, usize::MAX)];
        self.file.read_at(&mut directory, start)?;
        let before = self.report.corruptions;
        self.bitmap_entries(&directory, count)?;
        if self.report.corruptions == before {
            // What makes bitmaps unusable otherwise may be a lost table.
            match Directory::read(self.file, &self.header) {
                Err(e) if e.kind() == ErrorKind::Corrupt => {
                    self.complete = false;
                    self.corrupt(e.message().to_owned());
                }
                read => return read.map(drop),
            }
        }
        Ok(())
    }

    fn bitmap_entries(&mut self, directory: &[u8], count: u64) -> Result<()> {
        let mut rest = directory;
        for index in 0..count {
            let Some(entry) = rest.get(..FIXED) else {
                self.complete = false;
                self.corrupt(format!(
                    "the bitmap directory ends within entry {index} (expected: {count} entries)"
                ));
                return Ok(());
            };
            let (table, entries) = (number(&entry[..8]), number(&entry[8..12]));
            let (name, extra) = (number(&entry[18..20]), number(&entry[20..24]));
            let len = clamp_len(name + extra, usize::MAX).saturating_add(FIXED);
            rest = rest.get(len.next_multiple_of(8)..).unwrap_or_default();
            self.bitmap(index, table, entries)?;
        }
        if !rest.is_empty() {
            self.complete = false;
            self.corrupt(format!(
                "the bitmap directory has {} bytes after its last entry (expected: 0)",
                rest.len()
            ));
        }
        Ok(())
    }

    fn bitmap(&mut self, index: u64, table: u64, entries: u64) -> Result<()> {
        let aligned = table != 0 && is_aligned(table, self.layout.cluster_size());
        if !aligned || entries > MAX_TABLE {
            self.complete = false;
            self.corrupt(format!(
                "the table of bitmap {index} has {entries} entries at {table:#x} (allowed: {MAX_TABLE}, at a multiple of {:#x})",
                self.layout.cluster_size()
            ));
            return Ok(());
        }
        let end = table.saturating_add(entries * 8);
        if !self.mark_sole(format!("the table of bitmap {index}"), table..end)? {
            self.complete = false;
            return Ok(());
        }
        let mut at = table;
        while at < end {
            let mut bytes = vec![0; clamp_len((end - at).min(STEP), usize::MAX)];
            self.file.read_at(&mut bytes, at)?;
            for word in bytes.chunks_exact(8).map(number) {
                self.bitmap_cluster(index, word)?;
            }
            at += STEP;
        }
        Ok(())
    }

    fn bitmap_cluster(&mut self, index: u64, word: u64) -> Result<()> {
        let size = self.layout.cluster_size();
        let host = match bitmap_dir::cluster(word, size) {
            Ok(Some(host)) => host,
            Ok(None) => return Ok(()),
            Err(word) => {
                self.complete = false;
                self.corrupt(format!(
                    "an entry of the table of bitmap {index} is {word:#018x} (allowed: multiples of {size:#x}, 0, 1)"
                ));
                return Ok(());
            }
        };
        if self.counts.get(host >> self.layout.cluster_bits) > 0 {
            self.complete = false;
            self.corrupt(format!(
                "a cluster of bitmap {index} is at {host:#x}, which has another use too"
            ));
        }
        let what = || format!("a cluster of bitmap {index}");
        if !self.mark(&what, host..host + size, 1, Kind::Table)? {
            self.complete = false;
        }
        Ok(())
    }
}

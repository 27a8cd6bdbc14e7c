//! Feature bits: which are known, what they are called, what an image's own table calls others.

use crate::error::{Error, Result};
use crate::util::text::printable;

/// Incompatible: refcounts may be wrong, lazily written.
pub(super) const DIRTY: u64 = 1 << 0;
/// Incompatible: metadata is known to be wrong.
pub(super) const CORRUPT: u64 = 1 << 1;
/// Incompatible: guest data is in another file.
pub(super) const DATA_FILE: u64 = 1 << 2;
/// Incompatible: clusters are compressed by what the header says, not by deflate.
pub(super) const COMPRESSION: u64 = 1 << 3;
/// Incompatible: entries of second-level tables have two words, with bits for subclusters.
pub(super) const EXTENDED_L2: u64 = 1 << 4;
/// Every incompatible bit that this driver understands.
const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;

/// Compatible: refcounts are written lazily while the dirty bit is set.
pub(super) const LAZY_REFCOUNTS: u64 = 1 << 0;

/// Autoclear: the bitmaps agree with the image.
pub(super) const BITMAPS: u64 = 1 << 0;
/// Autoclear: the external data file can be read as a raw image.
pub(super) const DATA_FILE_RAW: u64 = 1 << 1;
/// Autoclear bits that still hold after this driver has written.
pub(super) const KEPT_AUTOCLEAR: u64 = BITMAPS | DATA_FILE_RAW;

/// Every bit with the name that others show where they do not know it.
const NAMES: [(u8, u8, &str); 7] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
];

/// The feature name table of a new image.
pub(super) fn name_table() -> Vec<u8> {
    let row = |(kind, bit, name): &(u8, u8, &str)| {
        let mut row = vec![*kind, *bit];
        row.extend(name.as_bytes());
        row.resize(ROW, 0);
        row
    };
    NAMES.iter().flat_map(row).collect()
}

/// Bytes of one row of the table.
const ROW: usize = 48;
/// Rows looked at; there are three kinds of 64 bits.
const MAX_ROWS: usize = 192;

/// Refuses incompatible bits that this driver does not understand, by the names that the image's
/// own table has for them.
pub(super) fn check_incompatible(bits: u64, names: &[u8]) -> Result<()> {
    let unknown = bits & !KNOWN;
    if unknown == 0 {
        return Ok(());
    }
    let rows = || names.chunks_exact(ROW).take(MAX_ROWS);
    let name = |bit: u8| match rows().find(|row| row[..2] == [0, bit]) {
        Some(row) => {
            let text = row[2..].split(|b| *b == 0).next().unwrap_or_default();
            format!("'{}'", printable(&*String::from_utf8_lossy(text)))
        }
        None => format!("unnamed bit {bit}"),
    };
    let unknown_bits = (0..64).filter(|bit| unknown & (1 << bit) != 0);
    let names: Vec<String> = unknown_bits.map(name).collect();
    Err(Error::unsupported(format!(
        "the image needs features that are not supported: {} (incompatible bits {unknown:#x}, allowed: {KNOWN:#x})",
        names.join(", ")
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_incompatible_bit_is_refused_by_the_name_the_image_gives_it() {
        let mut table = vec![0u8; 2 * ROW];
        table[1] = 7;
        table[2..12].copy_from_slice(b"time trave");
        let error = check_incompatible(1 << 7 | DIRTY | 1 << 40, &table).expect_err("unknown");
        let text = error.to_string();
        assert!(
            text.contains("'time trave'") && text.contains("unnamed bit 40"),
            "{text}"
        );
        assert!(check_incompatible(KNOWN, &table).is_ok());
    }
}

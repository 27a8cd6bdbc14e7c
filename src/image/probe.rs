//! Guessing a format from bytes.

use crate::error::Result;
use crate::image::Driver;
use crate::storage::Storage;
use crate::util::align::{clamp_len, len64};

/// Bytes looked at from the start.
pub const HEAD: usize = 4096;
/// Bytes looked at from the end.
pub const TAIL: usize = 512;

/// What a probe sees: no file, no path, no I/O.
#[derive(Debug, Clone, Copy)]
pub struct ProbeInput<'a> {
    /// First bytes of the object, at most 4096.
    pub head: &'a [u8],
    /// Last bytes of the object, at most 512 (VHD footer, DMG trailer).
    pub tail: &'a [u8],
    /// Its length in bytes.
    pub len: u64,
    /// Lower-case file name extension, for formats with no magic (cue sheets).
    pub extension: Option<&'a str>,
}

/// The driver whose probe scores highest; the earlier row where two score the same.
///
/// # Errors
/// The host's, when reading the ends of the object; `Unsupported` where the bytes are of a
/// format that vdtool knows by name but does not read.
pub fn probe(drivers: &[&'static Driver], storage: &dyn Storage) -> Result<&'static Driver> {
    let len = storage.size();
    let mut head = vec![0; clamp_len(len, HEAD)];
    storage.read_at(&mut head, 0)?;
    let mut tail = vec![0; clamp_len(len, TAIL)];
    let tail_start = len - len64(tail.len());
    storage.read_at(&mut tail, tail_start)?;
    let extension = storage
        .path()
        .and_then(|p| p.extension())
        .map(|e| e.to_string_lossy().to_ascii_lowercase());
    let input = ProbeInput {
        head: &head,
        tail: &tail,
        len,
        extension: extension.as_deref(),
    };
    best(drivers, &input).map_err(|e| e.at_opt(storage.path()))
}

fn best(drivers: &[&'static Driver], input: &ProbeInput<'_>) -> Result<&'static Driver> {
    let mut best: Option<(u8, &'static Driver)> = None;
    for driver in drivers {
        let score = (driver.probe)(input);
        if score > best.map_or(0, |(s, _)| s) {
            best = Some((score, driver));
        }
    }
    best.map(|(_, driver)| driver).ok_or_else(|| {
        crate::error::Error::new(
            crate::error::ErrorKind::WrongFormat,
            "is of no format that vdtool knows",
        )
    })
}

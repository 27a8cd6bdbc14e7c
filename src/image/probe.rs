//! Guessing a format from bytes.

use crate::error::{Error, ErrorKind, Result};
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

/// A format that is recognised by its name, by a file name extension or by its bytes, and not
/// supported.
#[derive(Debug)]
pub struct Refused {
    /// The name users know it by.
    pub name: &'static str,
    /// Other names for it.
    pub aliases: &'static [&'static str],
    /// File name extensions that stand for it, lower case.
    pub extensions: &'static [&'static str],
    /// What it is, in a few words.
    pub about: &'static str,
    /// Whether the bytes look like this format.
    pub probe: fn(&ProbeInput<'_>) -> bool,
}

/// A driver with this score or more is sure enough of its format.
const SURE: u8 = 50;

/// The driver whose probe scores highest; the earlier row where two score the same.
///
/// # Errors
/// The host's, when reading the ends of the object; `Unsupported` where the bytes are of a
/// format that vdtool knows by name but does not read.
pub fn probe(
    drivers: &[&'static Driver],
    refused: &[&[Refused]],
    storage: &dyn Storage,
) -> Result<&'static Driver> {
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
    best(drivers, refused, &input).map_err(|e| e.at_opt(storage.path()))
}

/// As [`probe`], of bytes that are not in an object, or not yet.
///
/// # Errors
/// `Unsupported` as there.
pub fn best(
    drivers: &[&'static Driver],
    refused: &[&[Refused]],
    input: &ProbeInput<'_>,
) -> Result<&'static Driver> {
    let mut best: Option<(u8, &'static Driver)> = None;
    for driver in drivers {
        let score = (driver.probe)(input);
        if score > best.map_or(0, |(s, _)| s) {
            best = Some((score, driver));
        }
    }
    if let Some((score, driver)) = best
        && score >= SURE
    {
        return Ok(driver);
    }
    let mut known = refused.iter().copied().flatten();
    if let Some(format) = known.find(|format| (format.probe)(input)) {
        return Err(Error::unsupported(format!(
            "is of format '{}' ({}), which is not supported (-f raw takes its bytes as they are)",
            format.name, format.about
        )));
    }
    best.map(|(_, driver)| driver)
        .ok_or_else(|| Error::new(ErrorKind::WrongFormat, "is of no format that vdtool knows"))
}

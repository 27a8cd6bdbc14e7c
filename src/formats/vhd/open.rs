//! Opening: which footer counts, and what the rest must look like before anything is believed.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::formats::vhd::fixed::Fixed;
use crate::formats::vhd::footer::{self, Footer, Kind, Strictness};
use crate::formats::vhd::geometry::SizeRule;
use crate::formats::vhd::sparse::Sparse;
use crate::image::Image;
use crate::image::open::{OpenOptions, Purpose};
use crate::storage::Storage;
use crate::storage::open::Access;

/// The state of the footer at the end of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum End {
    /// All 512 bytes are right.
    Whole,
    /// It lacks its last byte, as old versions of Virtual PC wrote it.
    Short,
    /// tapdisk has replaced it: the image is in use, or was not closed.
    Killed,
    /// It is wrong, and how.
    Damaged(String),
}

/// The footer to go by, and where the data ends.
#[derive(Debug)]
pub(super) struct Found {
    /// From the end, or the copy at the start.
    pub(super) footer: Footer,
    /// What is at the end.
    pub(super) end: End,
    /// Where the footer at the end begins; the file's length where it is not usable.
    pub(super) data_end: u64,
}

/// Opens a VHD.
pub(super) fn open(storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<Box<dyn Image>> {
    let strictness = strictness(options);
    let found = find(&*storage, strictness)?;
    if options.access == Access::Write
        && options.purpose != Purpose::Check
        && found.end == End::Killed
    {
        return Err(Error::new(
            ErrorKind::Locked,
            "tapdisk has the image open or did not close it: its footer is all 0xc7 (allowed: reading; `check -r all` restores it)",
        ));
    }
    let rule = options.values.text("size_rule").unwrap_or_default();
    let rule = SizeRule::from_word(rule);
    Ok(match found.footer.kind() {
        Kind::Fixed => Box::new(Fixed::open(storage, options, found, rule)?),
        Kind::Dynamic | Kind::Differencing => {
            Box::new(Sparse::open(storage, options, found, rule)?)
        }
    })
}

/// Whether wrong checksums are refused.
pub(super) fn strictness(options: &OpenOptions) -> Strictness {
    let ignore = options.values.text("checksum") == Some("ignore");
    match options.purpose {
        Purpose::Use | Purpose::Describe if !ignore => Strictness::Strict,
        _ => Strictness::Lax,
    }
}

/// Reads the footer at the end, or, where that is damaged, the copy at the start.
///
/// # Errors
/// `WrongFormat` where there is neither; `Corrupt` where both are damaged; `Unsupported`.
pub(super) fn find(storage: &dyn Storage, strictness: Strictness) -> Result<Found> {
    let (at, short) = end_offset(storage.size())?;
    let mut bytes = [0; footer::LEN];
    storage.read_at(&mut bytes, at)?;
    let whole = if short { End::Short } else { End::Whole };
    let damage = match Footer::parse(&bytes, Strictness::Strict) {
        Ok(footer) => {
            return Ok(Found {
                footer,
                end: whole,
                data_end: at,
            });
        }
        // A checksum that fits proves that what it says was meant.
        Err(e) if e.kind() == ErrorKind::Unsupported && strictness == Strictness::Strict => {
            return Err(e);
        }
        Err(e) if Footer::is_poisoned(&bytes) => return Err(e),
        Err(e) => e,
    };
    let end = match Footer::is_killed(&bytes) {
        true => End::Killed,
        false => End::Damaged(damage.message().to_owned()),
    };
    let mut copy = [0; footer::LEN];
    storage.read_at(&mut copy, 0)?;
    let copy = Footer::parse(&copy, Strictness::Strict).and_then(with_table);
    match copy {
        Ok(footer) => Ok(Found {
            footer,
            end,
            data_end: storage.size(),
        }),
        Err(e) => match Footer::parse(&bytes, strictness) {
            Ok(footer) => Ok(Found {
                footer,
                end: End::Damaged(damage.message().to_owned()),
                data_end: at,
            }),
            Err(_) => Err(neither(&damage, &e, &end)),
        },
    }
}

/// A footer at the start is a copy only where the disk has a table.
fn with_table(footer: Footer) -> Result<Footer> {
    match footer.kind() {
        Kind::Fixed => Err(Error::corrupt("a fixed disk has no copy of its footer")),
        Kind::Dynamic | Kind::Differencing => Ok(footer),
    }
}

/// Where the footer at the end begins, and whether it lacks its last byte.
fn end_offset(size: u64) -> Result<(u64, bool)> {
    let len = if size % 512 == 511 { 511 } else { 512 };
    match size.checked_sub(len) {
        Some(at) => Ok((at, len == 511)),
        None => Err(Error::new(
            ErrorKind::WrongFormat,
            format!("is {size} bytes long (a VHD has at least 511)"),
        )),
    }
}

fn neither(at_end: &Error, at_start: &Error, end: &End) -> Error {
    if *end == End::Killed {
        return Error::corrupt(format!(
            "its footer is all 0xc7: tapdisk has it open or did not close it; the copy at 0x0: {}",
            at_start.message()
        ));
    }
    let foreign = [at_end, at_start]
        .iter()
        .all(|e| e.kind() == ErrorKind::WrongFormat);
    let kind = match foreign {
        true => ErrorKind::WrongFormat,
        false => ErrorKind::Corrupt,
    };
    Error::new(
        kind,
        format!(
            "no usable footer: at the end: {}; at 0x0: {}",
            at_end.message(),
            at_start.message()
        ),
    )
}

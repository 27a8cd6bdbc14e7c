//! Dirty bitmaps from one image into another.

use std::ffi::OsStr;

use crate::chain::Chain;
use crate::error::{Error, ErrorKind, Result};
use crate::image::bitmap::{Bitmaps, Recording};
use crate::util::text::printable;

/// What is done about bitmaps that cannot be relied on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Broken {
    /// They are an error.
    Refuse,
    /// They are left out.
    Skip,
}

/// The bitmaps of the top layer, to be read.
///
/// # Errors
/// `Unsupported` where the format has none.
pub fn bitmaps_of(chain: &Chain) -> Result<&dyn Bitmaps> {
    chain.top().bitmaps().ok_or_else(|| none(chain))
}

/// The bitmaps of the top layer, to be changed.
///
/// # Errors
/// `Unsupported` where the format has none.
pub fn bitmaps_of_mut(chain: &mut Chain) -> Result<&mut dyn Bitmaps> {
    let error = none(chain);
    chain.top_mut().as_bitmaps().ok_or(error)
}

fn none(chain: &Chain) -> Error {
    let top = chain.top();
    Error::unsupported(format!(
        "images of format '{}' have no bitmaps",
        top.driver().name
    ))
    .at_opt(top.storage().path())
}

/// Sets in the bitmap `into` of `target` what is set in the bitmap `name` of `source`; `None`: of
/// `target` itself.
///
/// # Errors
/// `Invalid` for disks of different sizes; those of [`Bitmaps`].
pub fn merge_bitmap(
    source: Option<&Chain>,
    name: &OsStr,
    target: &mut Chain,
    into: &OsStr,
) -> Result<()> {
    let size = target.virtual_size();
    if let Some(other) = source.map(Chain::virtual_size).filter(|s| *s != size) {
        let text = format!(
            "bitmap '{}' is of a disk of {other} bytes (expected: {size})",
            printable(name)
        );
        return Err(Error::new(ErrorKind::Invalid, text));
    }
    let source = source.map(bitmaps_of).transpose()?;
    bitmaps_of_mut(target)?.merge(into, name, source)
}

/// Copies all bitmaps of the top layer of `source`; tells `skipped` of those left out.
///
/// # Errors
/// `Corrupt` for one that is in use, unless it is to be skipped; those of [`Bitmaps`].
pub fn copy_bitmaps(
    source: &Chain,
    target: &mut Chain,
    broken: Broken,
    skipped: &mut dyn FnMut(&OsStr),
) -> Result<()> {
    for bitmap in bitmaps_of(source)?.list()? {
        let name = &bitmap.name;
        if bitmap.in_use && broken == Broken::Skip {
            skipped(name);
            continue;
        }
        if bitmap.in_use {
            return Err(Error::corrupt(format!(
                "bitmap '{}' is in use: a writer did not close the image (--skip-broken-bitmaps leaves it out)",
                printable(name)
            )));
        }
        bitmaps_of_mut(target)?.add(name, Some(bitmap.granularity), Recording::Off)?;
        merge_bitmap(Some(source), name, target, name)?;
        if bitmap.recording == Recording::On {
            bitmaps_of_mut(target)?.set_recording(name, Recording::On)?;
        }
    }
    Ok(())
}

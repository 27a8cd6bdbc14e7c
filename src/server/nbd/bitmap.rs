//! Dirty bitmaps that clients may look at.

use std::ops::Range;

use crate::backend::Backend;
use crate::chain::Chain;
use crate::error::{Error, ErrorKind, Result};
use crate::image::bitmap::Bitmap;
use crate::util::text::printable;

/// Refuses a bitmap that is not there, or whose bits cannot be relied on.  One that records shows
/// what clients have written up to the moment they ask.
pub(super) fn check(backend: &Backend, name: &str) -> Result<()> {
    let chain = backend.chain();
    let path = chain.top().storage().path();
    let wrong = |kind, why: &str| {
        let text = format!("bitmap '{}' {why}", printable(name));
        Err(Error::new(kind, text).at_opt(path))
    };
    let found: Option<Bitmap> = match chain.top().bitmaps() {
        Some(bitmaps) => bitmaps.list()?.into_iter().find(|b| b.name == name),
        None => None,
    };
    let Some(found) = found else {
        return wrong(ErrorKind::NotFound, "is not there");
    };
    if found.in_use {
        return wrong(
            ErrorKind::Invalid,
            "is in use: its writer did not close the image, so its bits cannot be relied on",
        );
    }
    Ok(())
}

/// Dirty and clean runs of a range, at most `most`: length, and whether it is dirty.
///
/// # Errors
/// Those of the bitmap.
pub(super) fn runs(
    chain: &Chain,
    name: &str,
    range: Range<u64>,
    most: usize,
) -> Result<Vec<(u64, bool)>> {
    let Some(bitmaps) = chain.top().bitmaps() else {
        return Err(Error::new(ErrorKind::NotFound, "the image has no bitmaps"));
    };
    let ask = most.div_ceil(2).max(1);
    let found = bitmaps.dirty(name.as_ref(), range.start, ask)?;
    let is_all = found.len() < ask;
    let mut runs = Vec::new();
    let mut at = range.start;
    for dirty in found {
        let dirty = dirty.start.clamp(at, range.end)..dirty.end.clamp(at, range.end);
        if at < dirty.start {
            runs.push((dirty.start - at, false));
        }
        if !dirty.is_empty() {
            runs.push((dirty.end - dirty.start, true));
        }
        at = dirty.end;
    }
    if at < range.end && is_all {
        runs.push((range.end - at, false));
    }
    runs.truncate(most);
    Ok(runs)
}

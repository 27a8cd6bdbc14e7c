//! What changed, from wherever a user has it: a log, a list of ranges, a bitmap of an image.

use std::ffi::{OsStr, OsString};
use std::ops::Range;
use std::path::Path;

use serde::Deserialize;

use crate::chain::{self, Chain};
use crate::cli::common::OpenArgs;
use crate::cli::dirty::storage;
use crate::copy::bitmaps::bitmaps_of;
use crate::dirty::regions::MAX_REGIONS;
use crate::dirty::{Assumed, DirtyLog, Geometry, Regions, Usage};
use crate::error::{Error, Result};
use crate::image::Bitmaps;
use crate::image::bitmap::{Bitmap, Recording};
use crate::nbd::uri::is_uri;
use crate::storage::open::{Access, StorageOptions};
use crate::storage::{Storage, nbd};
use crate::util::align::clamp_len;

/// Most bytes of a list of ranges.
const MAX_LIST: u64 = 64 << 20;
/// Ranges of a bitmap that are asked for at a time.
const RANGES: usize = 4096;
/// Smallest regions that ranges in bytes are kept in.
const FINEST: u64 = 4096;

/// A list of ranges as `dirty dump` prints it.
#[derive(Debug, Deserialize)]
struct List {
    size: Option<u64>,
    dirty: Vec<Part>,
}

#[derive(Debug, Deserialize)]
struct Part {
    start: u64,
    length: u64,
}

/// Opens an image whose size and bitmaps matter, and not its content.
///
/// # Errors
/// Those of opening it.
pub fn image(path: &Path, open: &OpenArgs) -> anyhow::Result<Chain> {
    let mut options = open.plan(None, Access::Read)?;
    options.follow = chain::open::Follow::No;
    Ok(chain::open::open(path, &options)?)
}

/// What is marked in the log, or named in the list, at `path`, of a disk of `size` bytes.
///
/// # Errors
/// Those of [`DirtyLog::open`]; `Invalid` for a list that is none; `Corrupt` for a log that may lack
/// marks; `Invalid` for one of a disk of another size.
pub fn read(path: &Path, size: u64) -> Result<Regions> {
    let file = storage(path, StorageOptions::default())?;
    let mut first = [0; 64];
    file.read_at(&mut first, 0)?;
    let text = first.trim_ascii_start();
    if text.starts_with(b"{") || text.starts_with(b"[") {
        return list(&*file, size);
    }
    let assumed = Assumed {
        size: Some(size),
        ..Assumed::default()
    };
    let log = DirtyLog::open(file, &assumed)?;
    if log.usage() == Usage::Lost {
        return Err(Error::corrupt(
            "the log was not closed by its writer and may lack marks (allowed: a copy of the whole disk)",
        ));
    }
    Ok(log.into_regions())
}

fn list(file: &dyn Storage, size: u64) -> Result<Regions> {
    let len = file.size();
    if len > MAX_LIST {
        let text = format!("the list has {len} bytes (allowed: {MAX_LIST})");
        return Err(Error::invalid(text));
    }
    let mut bytes = vec![0; clamp_len(len, usize::MAX)];
    file.read_at(&mut bytes, 0)?;
    let wrong = |e: serde_json::Error| Error::invalid(format!("is no list of ranges: {e}"));
    let list = match bytes.trim_ascii_start().starts_with(b"[") {
        true => List {
            size: None,
            dirty: serde_json::from_slice(&bytes).map_err(wrong)?,
        },
        false => serde_json::from_slice(&bytes).map_err(wrong)?,
    };
    if let Some(other) = list.size.filter(|other| *other != size) {
        return Err(Error::invalid(format!(
            "is of a disk of {other} bytes (allowed: {size})"
        )));
    }
    let regions = fine(size)?;
    for Part { start, length } in list.dirty {
        match start.checked_add(length).filter(|end| *end <= size) {
            Some(end) => regions.mark(&(start..end)),
            None => {
                return Err(Error::invalid(format!(
                    "{length} bytes at {start} (allowed: inside the disk of {size} bytes)"
                )));
            }
        }
    }
    Ok(regions)
}

/// What the bitmap `name` of an image, or of the server's export that it is, has taken note of; the disk
/// has `size` bytes.
///
/// # Errors
/// `Unsupported` where the image has no bitmaps; those of reading one; `Invalid` where its size is
/// another.
pub fn of_bitmap(image: &Chain, name: &OsStr, size: u64) -> Result<Regions> {
    if let Some(uri) = remote(image) {
        return of_server(&uri, name, size);
    }
    if image.virtual_size() != size {
        return Err(Error::invalid(format!(
            "has {} bytes (allowed: {size})",
            image.virtual_size()
        )));
    }
    let bitmaps = bitmaps_of(image)?;
    let granularity = bitmaps.list()?.into_iter().find(|b| b.name == name);
    let regions = match granularity {
        Some(bitmap) => Regions::new(Geometry::new(size, bitmap.granularity)?),
        None => fine(size)?,
    };
    let mut at = 0;
    loop {
        let ranges: Vec<Range<u64>> = bitmaps.dirty(name, at, RANGES)?;
        ranges.iter().for_each(|range| regions.mark(range));
        match ranges.last() {
            Some(last) if ranges.len() == RANGES => at = last.end,
            _ => return Ok(regions),
        }
    }
}

/// The URI of a disk that is what a server has, as it is.
fn remote(image: &Chain) -> Option<String> {
    let path = image.top().storage().path()?;
    let is_one = is_uri(path) && image.layers().len() == 1 && image.top().bitmaps().is_none();
    is_one.then(|| path.to_str().map(str::to_owned)).flatten()
}

/// What the bitmap `name` of a server's export has taken note of.
fn of_server(uri: &str, name: &OsStr, size: u64) -> Result<Regions> {
    let name = name.to_str();
    let name = name.ok_or_else(|| Error::invalid("the name of the bitmap is not UTF-8"))?;
    let regions = fine(size)?;
    let options = nbd::Options::new(Access::Read);
    let found = nbd::dirty_bitmap(uri, name, &options, |range| {
        regions.mark(&range);
        Ok(())
    })?;
    match found == size {
        true => Ok(regions),
        false => Err(Error::invalid(format!(
            "the export has {found} bytes by now (before: {size})"
        ))),
    }
}

/// The marks of a log, to be merged into a bitmap of an image.
#[derive(Debug)]
pub struct Marks(pub Regions);

impl Bitmaps for Marks {
    fn list(&self) -> Result<Vec<Bitmap>> {
        Ok(vec![Bitmap {
            name: OsString::new(),
            granularity: self.0.geometry().granularity(),
            recording: Recording::Off,
            in_use: false,
        }])
    }

    fn dirty(&self, _name: &OsStr, at: u64, most: usize) -> Result<Vec<Range<u64>>> {
        Ok(self.0.dirty(at).take(most).collect())
    }

    fn add(&mut self, _name: &OsStr, _granularity: Option<u64>, _how: Recording) -> Result<()> {
        Err(Error::read_only())
    }

    fn remove(&mut self, _name: &OsStr) -> Result<()> {
        Err(Error::read_only())
    }

    fn clear(&mut self, _name: &OsStr) -> Result<()> {
        Err(Error::read_only())
    }

    fn set_recording(&mut self, _name: &OsStr, _recording: Recording) -> Result<()> {
        Err(Error::read_only())
    }

    fn merge(&mut self, _: &OsStr, _: &OsStr, _: Option<&dyn Bitmaps>) -> Result<()> {
        Err(Error::read_only())
    }
}

/// Regions as small as there may be.
fn fine(size: u64) -> Result<Regions> {
    let needed = size.div_ceil(MAX_REGIONS).next_power_of_two();
    Ok(Regions::new(Geometry::new(size, needed.max(FINEST))?))
}

//! From a sheet, or a file without one, to files that are open and tracks that are laid out.

use std::ffi::OsString;
use std::sync::Arc;

use super::parse::{is_sheet, parse};
use super::place::{Extent, place};
use super::sheet::{FileKind, FileLine, Index, MAX_SHEET, Sheet, TrackLine};
use super::wave;
use crate::error::{Error, ErrorKind, Result};
use crate::image::disc::{Mode, SYNC, Table};
use crate::image::open::OpenOptions;
use crate::storage::Storage;
use crate::util::align::clamp_len;
use crate::util::text::printable;

/// A file that holds sectors.
#[derive(Debug, Clone)]
pub(super) struct Bin {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) kind: FileKind,
}

/// What an image consists of.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) files: Vec<Bin>,
    pub(super) table: Table,
}

/// Opens all files of the image in `header`.
pub(super) fn open(header: &Arc<dyn Storage>, options: &OpenOptions) -> Result<Opened> {
    match options.values.number("sector") {
        Some(sector) => bare(header, sector),
        None => sheet(&**header, options),
    }
}

fn sheet(header: &dyn Storage, options: &OpenOptions) -> Result<Opened> {
    let len = header.size();
    if len > MAX_SHEET {
        let text = format!(
            "the sheet has {len} bytes (allowed: {MAX_SHEET}; --open-options sector=2352 reads a file of sectors without one)"
        );
        return Err(Error::new(ErrorKind::OutOfRange, text));
    }
    let mut text = vec![0; clamp_len(len, usize::MAX)];
    header.read_at(&mut text, 0)?;
    if !is_sheet(&text) {
        let why =
            "is no CUE sheet (--open-options sector=2352 reads a file of sectors without one)";
        return Err(Error::new(ErrorKind::WrongFormat, why));
    }
    let sheet = parse(&text)?;
    // One that is named twice is opened once: it could not be locked twice.
    let mut opened = Vec::with_capacity(sheet.files.len());
    for file in &sheet.files {
        opened.push(companion(file, options, &opened)?);
    }
    let kinds = sheet.files.iter().map(|file| file.kind);
    let files = opened.into_iter().zip(kinds);
    let files: Vec<Bin> = files.map(|(storage, kind)| Bin { storage, kind }).collect();
    let extents = files
        .iter()
        .zip(&sheet.files)
        .map(|(bin, line)| extent(bin, &line.name));
    let table = place(&sheet, &extents.collect::<Result<Vec<_>>>()?)?;
    Ok(Opened { files, table })
}

fn companion(
    file: &FileLine,
    options: &OpenOptions,
    opened: &[Arc<dyn Storage>],
) -> Result<Arc<dyn Storage>> {
    let Some(companions) = &options.needed else {
        return Err(Error::unsupported(
            "the files that the sheet names cannot be opened",
        ));
    };
    let what = format!("file (line {})", file.line);
    companions.open_in_any_case(&file.name, &what, opened)
}

fn extent(bin: &Bin, name: &OsString) -> Result<Extent> {
    let data = match bin.kind {
        FileKind::Binary | FileKind::Motorola => 0..bin.storage.size(),
        FileKind::Wave => {
            let found = wave::samples(&*bin.storage);
            found.map_err(|e| e.at_opt(bin.storage.path()))?
        }
    };
    Ok(Extent {
        data,
        kind: bin.kind,
        name: printable(name),
    })
}

/// A file of sectors without a sheet: one track.
fn bare(file: &Arc<dyn Storage>, sector: u64) -> Result<Opened> {
    let mode = match sector {
        2048 => Mode::Mode1Data,
        2324 => Mode::Mode2Form2,
        2336 => Mode::Mode2Data,
        2352 => first_mode(&**file)?,
        2448 => Mode::Cdg,
        _ => {
            let text = format!("sector is {sector} (allowed: 2048, 2324, 2336, 2352, 2448)");
            return Err(Error::invalid(text));
        }
    };
    let bin = Bin {
        storage: Arc::clone(file),
        kind: FileKind::Binary,
    };
    let name = file
        .path()
        .map_or_else(OsString::new, |path| path.as_os_str().to_owned());
    let index = Index {
        number: 1,
        file: 0,
        frame: 0,
        line: 0,
    };
    let track = TrackLine {
        number: 1,
        mode,
        session: 1,
        flags: Vec::new(),
        isrc: None,
        texts: Vec::new(),
        pregap: 0,
        postgap: 0,
        indexes: vec![index],
        line: 0,
    };
    let sheet = Sheet {
        tracks: vec![track],
        ..Sheet::default()
    };
    let table = place(&sheet, &[extent(&bin, &name)?])?;
    let files = vec![bin];
    Ok(Opened { files, table })
}

/// The mode of sectors that are stored with all that they have, by the first of them.
fn first_mode(file: &dyn Storage) -> Result<Mode> {
    let mut head = [0; 16];
    file.read_at(&mut head, 0)?;
    Ok(match (head[..12] == SYNC, head[15]) {
        (true, 2) => Mode::Mode2,
        (true, _) => Mode::Mode1,
        (false, _) => Mode::Audio,
    })
}

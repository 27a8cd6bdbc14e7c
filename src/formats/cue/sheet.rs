//! What a sheet says, before it is known how long its files are.

use std::ffi::OsString;

use crate::image::disc::Mode;

/// Longest sheet that is read, in bytes.
pub(super) const MAX_SHEET: u64 = 1 << 20;
/// Most files that a sheet names.
pub(super) const MAX_FILES: usize = 256;
/// Highest number of a track, and of an index.
pub(super) const MAX_NUMBER: u8 = 99;
/// Most lines that are kept as they are.
pub(super) const MAX_TEXTS: usize = 10_000;

/// How a file holds sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileKind {
    /// One after the other.
    Binary,
    /// The same, with the two bytes of each sound sample swapped.
    Motorola,
    /// As the sound of a RIFF file.
    Wave,
}

/// A file that the sheet names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FileLine {
    pub(super) name: OsString,
    pub(super) kind: FileKind,
    pub(super) line: usize,
}

/// Where an index is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Index {
    pub(super) number: u8,
    pub(super) file: usize,
    /// Sectors from the start of the file.
    pub(super) frame: u64,
    pub(super) line: usize,
}

/// A track.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TrackLine {
    pub(super) number: u8,
    pub(super) mode: Mode,
    pub(super) session: u8,
    pub(super) flags: Vec<String>,
    pub(super) isrc: Option<OsString>,
    pub(super) texts: Vec<OsString>,
    /// Sectors before and after it that are not stored.
    pub(super) pregap: u64,
    pub(super) postgap: u64,
    /// In order; at least one is not 0.
    pub(super) indexes: Vec<Index>,
    pub(super) line: usize,
}

/// A sheet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Sheet {
    pub(super) catalog: Option<OsString>,
    pub(super) texts: Vec<OsString>,
    pub(super) files: Vec<FileLine>,
    /// At least one.
    pub(super) tracks: Vec<TrackLine>,
}

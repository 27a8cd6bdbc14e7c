//! What a disc consists of.

use std::ffi::OsString;

use super::{Mode, Msf};

/// The contents of a disc.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Table {
    /// Its tracks, in order.
    pub tracks: Vec<Track>,
    /// Sectors of the disc: the first address after its last track.
    pub end: u64,
    /// Its number in catalogues.
    pub catalog: Option<OsString>,
    /// Lines about the disc that are kept as they are: CD-TEXT, remarks.
    pub texts: Vec<OsString>,
}

/// One track.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Track {
    /// Its number, 1 to 99.
    pub number: u8,
    /// How its sectors are stored.
    pub mode: Mode,
    /// The session it is in, from 1.
    pub session: u8,
    /// Its flags, as they are written.
    pub flags: Vec<String>,
    /// Its recording code.
    pub isrc: Option<OsString>,
    /// Lines about it that are kept as they are.
    pub texts: Vec<OsString>,
    /// The first address after the track before it: where its pause begins.
    pub start: u64,
    /// Address of its index 1, where what is in it begins.
    pub lba: u64,
    /// The first address after it.
    pub end: u64,
    /// Its runs of sectors, in order, without gaps from `start` to `end`.
    pub runs: Vec<Run>,
}

/// Sectors of one index of one track.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Address of the first.
    pub lba: u64,
    /// How many.
    pub sectors: u64,
    /// 0: the pause before the track; from 1 on the track itself.
    pub index: u8,
    /// Where they are stored; `None`: nowhere, they are silence or zeroes.
    pub stored: Option<Stored>,
}

/// Where sectors are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// In which file of the image.
    pub file: usize,
    /// Offset there of the first.
    pub host: u64,
    /// Where the data ends that the last of them may be cut off by: they are zero from there on.
    pub end: u64,
}

impl Run {
    /// The first address after it.
    pub fn end(&self) -> u64 {
        self.lba + self.sectors
    }
}

impl Track {
    /// Sectors from its index 1 to its end, without a gap after it that is not stored.
    pub fn sectors(&self) -> u64 {
        self.body().fold(0, |sum, run| sum + run.sectors)
    }

    /// What is stored of it, from its index 1 on.
    pub fn body(&self) -> impl Iterator<Item = &Run> {
        let is_body = |run: &&Run| run.index > 0 && run.stored.is_some();
        self.runs.iter().filter(is_body)
    }

    /// Where its index 1 is on the disc.
    pub fn msf(&self) -> Msf {
        Msf::of_lba(self.lba)
    }
}

impl Table {
    /// The track called `number`.
    pub fn track(&self, number: u64) -> Option<&Track> {
        self.tracks
            .iter()
            .find(|track| u64::from(track.number) == number)
    }

    /// The first track that holds data.
    pub fn first_data(&self) -> Option<&Track> {
        self.tracks.iter().find(|track| !track.mode.is_audio())
    }

    /// The track and the run that the sector at `lba` is in; `None` past the end, and between
    /// sessions.
    pub fn find(&self, lba: u64) -> Option<(&Track, &Run)> {
        let track = self.tracks.partition_point(|track| track.end <= lba);
        let track = self.tracks.get(track)?;
        let run = track.runs.partition_point(|run| run.end() <= lba);
        let run = track.runs.get(run).filter(|run| run.lba <= lba)?;
        Some((track, run))
    }
}

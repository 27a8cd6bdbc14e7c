//! New discs: of a disk, and of other discs.

use std::ffi::{OsStr, OsString};

use super::sheet::MAX_SHEET;
use crate::error::{Error, ErrorKind, Result};
use crate::image::disc::plan::{Maker, NewFile, Origin, Piece, Plan, Template};
use crate::image::disc::table::Run;
use crate::image::disc::{Mode, Msf, Table, Track, USER};
use crate::image::options::{OptionKind, OptionSpec, OptionValues};
use crate::util::align::len64;

/// Sectors up to minute 100: an address has two digits for minutes.
const MAX_SECTORS: u64 = 100 * 60 * 75 - 150;

/// Bytes that names take more while files are put into place.
const ROOM: u64 = 64 << 10;

/// How discs are made.
pub(in crate::formats) static MAKER: Maker = Maker {
    options: &[
        OptionSpec {
            name: "mode",
            kind: OptionKind::Choice(&["2048", "2352", "mode2-form1"]),
            default: "2352",
            help: "how data is stored: alone, with its codes, as mode 2 form 1; of a disc, without it as it is there",
        },
        OptionSpec {
            name: "layout",
            kind: OptionKind::Choice(&["single", "per-track"]),
            default: "single",
            help: "one BIN file for the disc, or one for each track",
        },
    ],
    of_disk,
    of_disc,
};

fn of_disk(size: u64, values: &OptionValues, stem: &OsStr) -> Result<Plan> {
    let mode = match values.text("mode") {
        Some("2048") => Mode::Mode1Data,
        Some("mode2-form1") => Mode::Mode2,
        _ => Mode::Mode1,
    };
    let sectors = size.div_ceil(len64(USER));
    if sectors == 0 || (mode.has_header() && sectors > MAX_SECTORS) {
        let text = format!("a disc of {sectors} sectors (allowed: 1 to {MAX_SECTORS})");
        return Err(Error::new(ErrorKind::OutOfRange, text));
    }
    let run = Run {
        lba: 0,
        sectors,
        index: 1,
        stored: None,
    };
    let track = Track {
        number: 1,
        mode,
        session: 1,
        flags: Vec::new(),
        isrc: None,
        texts: Vec::new(),
        start: 0,
        lba: 0,
        end: sectors,
        runs: vec![run],
    };
    let mut writer = Writer::new(values, stem)?;
    writer.begin_file(&track);
    let piece = Piece {
        origin: Origin::Disk(0),
        sectors,
        from: Mode::Mode1Data,
        mode,
        lba: 0,
        host: 0,
    };
    writer.track(&track, mode, &[(1, piece)]);
    writer.done()
}

/// How the data of a track is to be stored.
fn mode(track: &Track, values: &OptionValues) -> Result<Mode> {
    use Mode::{Cdi, CdiData, Mode1, Mode1Data, Mode2, Mode2Data, Mode2Form1, Mode2Form2};
    let mode = track.mode;
    Ok(match (values.text("mode"), mode) {
        (None, _) => mode,
        _ if mode.is_audio() => mode,
        (Some("2048"), Mode1 | Mode1Data) => Mode1Data,
        (Some("2048"), _) => Mode2Form1,
        (Some("mode2-form1"), Cdi | CdiData) => Cdi,
        (Some("mode2-form1"), _) => Mode2,
        (_, Mode1 | Mode1Data) => Mode1,
        (_, Mode2 | Mode2Data | Mode2Form1) => Mode2,
        (_, Cdi | CdiData) => Cdi,
        (_, Mode2Form2) => {
            let (number, name) = (track.number, mode.name());
            let text = format!("track {number} is {name}: nothing tells what else its sectors had");
            return Err(Error::unsupported(text));
        }
        (_, _) => mode,
    })
}

fn of_disc(table: &Table, only: Option<u8>, values: &OptionValues, stem: &OsStr) -> Result<Plan> {
    let mut writer = Writer::new(values, stem)?;
    writer.alone = only.is_some();
    if let Some(catalog) = &table.catalog {
        writer.line(0, &[b"CATALOG ", catalog.as_encoded_bytes()]);
    }
    table
        .texts
        .iter()
        .for_each(|text| writer.line(0, &[text.as_encoded_bytes()]));
    let tracks = table
        .tracks
        .iter()
        .filter(|t| only.is_none_or(|only| t.number == only));
    let mut session = 1;
    for (n, track) in tracks.enumerate() {
        let mode = mode(track, values)?;
        let is_next = only.is_none() && track.session != session;
        if is_next {
            session = track.session;
            writer.line(0, &[format!("REM SESSION {session:02}").as_bytes()]);
        }
        // A session begins with a file of its own, as it does on the disc.
        if n == 0 || writer.per_track || is_next {
            writer.begin_file(track);
        }
        let runs = track.runs.iter().filter(|run| run.stored.is_some());
        let runs = runs.filter(|run| only.is_none() || run.index > 0);
        let moved = only.map_or(0, |_| track.lba);
        let mut host = writer.end();
        let mut index = 0;
        let mut pieces: Vec<(u8, Piece)> = Vec::new();
        for run in runs {
            // One without sectors is not among them.
            index = if run.index == 0 { 0 } else { index + 1 };
            pieces.push((index, piece(track, run, mode, moved, host)));
            host += run.sectors * len64(mode.len());
        }
        writer.track(track, mode, &pieces);
    }
    writer.done()
}

fn piece(track: &Track, run: &Run, mode: Mode, moved: u64, host: u64) -> Piece {
    Piece {
        origin: Origin::Disc(run.lba),
        sectors: run.sectors,
        from: track.mode,
        mode,
        lba: run.lba - moved,
        host,
    }
}

/// A sheet and its files, as far as they are written.
struct Writer {
    stem: OsString,
    per_track: bool,
    files: Vec<NewFile>,
    between: Vec<Vec<u8>>,
    text: Vec<u8>,
    /// Sectors of the last file.
    frames: u64,
    /// It is for one track out of several.
    alone: bool,
}

impl Writer {
    fn new(values: &OptionValues, stem: &OsStr) -> Result<Self> {
        let is_end = |byte: &u8| matches!(byte, b'\n' | b'\r');
        if stem.as_encoded_bytes().iter().any(is_end) {
            let text = "a CUE sheet has no names with line ends in them";
            return Err(Error::invalid(text).at(stem));
        }
        Ok(Self {
            stem: stem.to_owned(),
            per_track: values.text("layout") == Some("per-track"),
            files: Vec::new(),
            between: Vec::new(),
            text: Vec::new(),
            frames: 0,
            alone: false,
        })
    }

    fn line(&mut self, indent: usize, parts: &[&[u8]]) {
        self.text.extend(std::iter::repeat_n(b' ', indent));
        parts.iter().for_each(|part| self.text.extend(*part));
        self.text.extend(b"\r\n");
    }

    /// The next file, which begins with this track.
    fn begin_file(&mut self, track: &Track) {
        let mut name = self.stem.clone();
        if self.per_track {
            name.push(format!(" (Track {:02})", track.number));
        } else if !self.files.is_empty() {
            name.push(format!(" (Session {:02})", track.session));
        }
        name.push(".bin");
        self.files.push(NewFile {
            name,
            head: Vec::new(),
            pieces: Vec::new(),
            len: 0,
        });
        self.text.extend(b"FILE \"");
        self.between.push(std::mem::take(&mut self.text));
        self.text.extend(b"\" BINARY\r\n");
        self.frames = 0;
    }

    /// Where the last file ends.
    fn end(&self) -> u64 {
        self.files.last().map_or(0, |file| file.len)
    }

    fn track(&mut self, track: &Track, mode: Mode, pieces: &[(u8, Piece)]) {
        let number = track.number;
        self.line(
            2,
            &[format!("TRACK {number:02} {}", mode.name()).as_bytes()],
        );
        track
            .texts
            .iter()
            .for_each(|text| self.line(4, &[text.as_encoded_bytes()]));
        if !track.flags.is_empty() {
            self.line(4, &[format!("FLAGS {}", track.flags.join(" ")).as_bytes()]);
        }
        if let Some(isrc) = &track.isrc {
            self.line(4, &[b"ISRC ", isrc.as_encoded_bytes()]);
        }
        // A track by itself begins where its index 1 is.
        let [before, after] = if self.alone { [0, 0] } else { gaps(track) };
        if before > 0 {
            self.line(
                4,
                &[format!("PREGAP {}", Msf::of_frames(before)).as_bytes()],
            );
        }
        for (index, piece) in pieces {
            let time = Msf::of_frames(self.frames);
            self.line(4, &[format!("INDEX {index:02} {time}").as_bytes()]);
            self.frames += piece.sectors;
        }
        if after > 0 {
            self.line(
                4,
                &[format!("POSTGAP {}", Msf::of_frames(after)).as_bytes()],
            );
        }
        if let Some(file) = self.files.last_mut() {
            for (_, piece) in pieces {
                file.len = piece.host + piece.sectors * len64(mode.len());
                file.pieces.push(*piece);
            }
        }
    }

    /// What is to be made.
    ///
    /// # Errors
    /// `OutOfRange` for a sheet that would be too long to be read again.
    fn done(mut self) -> Result<Plan> {
        self.between.push(self.text);
        let text = Template {
            between: self.between,
        };
        let names: Vec<&OsString> = self.files.iter().map(|file| &file.name).collect();
        let len = len64(text.with(&names).len());
        if len + ROOM > MAX_SHEET {
            let why = format!("a sheet of {len} bytes (allowed: {})", MAX_SHEET - ROOM);
            return Err(Error::new(ErrorKind::OutOfRange, why));
        }
        Ok(Plan {
            files: self.files,
            text: Some(text),
        })
    }
}

/// Sectors before and after a track that are not stored.
fn gaps(track: &Track) -> [u64; 2] {
    let unstored = |run: &&Run| run.stored.is_none();
    let is_whole = track.runs.iter().all(|run| run.stored.is_none());
    if is_whole {
        return [0, 0];
    }
    let before = track.runs.first().filter(unstored);
    let after = track.runs.last().filter(unstored);
    [before, after].map(|run| run.map_or(0, |run| run.sectors))
}

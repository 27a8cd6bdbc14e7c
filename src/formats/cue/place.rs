//! Where the tracks of a sheet lie: in its files, and on the disc.

use std::ops::Range;

use super::sheet::{FileKind, Index, Sheet, TrackLine};
use crate::error::{Error, ErrorKind, Result};
use crate::image::disc::table::{Run, Stored, Table, Track};
use crate::util::align::len64;

/// Between two sessions: lead-out, lead-in, and the pause before the first track.
const AFTER_FIRST: u64 = 6750 + 4500 + 150;
/// The same further on, where lead-outs are shorter.
const AFTER_OTHER: u64 = 2250 + 4500 + 150;
/// Most sectors of a disc: more than any medium has.
const MAX_SECTORS: u64 = 1 << 32;

/// A file that is open.
#[derive(Debug, Clone)]
pub(super) struct Extent {
    /// Where its sectors are.
    pub(super) data: Range<u64>,
    pub(super) kind: FileKind,
    /// What messages call it.
    pub(super) name: String,
}

/// A run of sectors before its place on the disc is known.
#[derive(Debug)]
struct Piece {
    track: usize,
    index: u8,
    sectors: u64,
    stored: Stored,
}

/// Lays a sheet out.
///
/// # Errors
/// `Corrupt` where an index lies past the end of its file, or a file ends within a sector;
/// `OutOfRange` for more sectors than a disc has.
pub(super) fn place(sheet: &Sheet, files: &[Extent]) -> Result<Table> {
    let mut pieces = Vec::new();
    for (file, extent) in files.iter().enumerate() {
        pieces.extend(cut(sheet, file, extent)?);
    }
    let mut disc = Lay { lba: 0, session: 1 };
    let mut tracks = Vec::with_capacity(sheet.tracks.len());
    for (number, line) in sheet.tracks.iter().enumerate() {
        let own = pieces.iter().filter(|piece| piece.track == number);
        tracks.push(disc.track(line, own)?);
    }
    Ok(Table {
        end: disc.lba,
        catalog: sheet.catalog.clone(),
        texts: sheet.texts.clone(),
        tracks,
    })
}

/// The runs of sectors of one file.
fn cut(sheet: &Sheet, file: usize, extent: &Extent) -> Result<Vec<Piece>> {
    let all = sheet.tracks.iter().enumerate();
    let marks = all.flat_map(|(track, line)| line.indexes.iter().map(move |index| (track, *index)));
    let marks: Vec<(usize, Index)> = marks.filter(|(_, index)| index.file == file).collect();
    let mut pieces = Vec::new();
    let mut host = extent.data.start;
    for (n, (track, index)) in marks.iter().enumerate() {
        let line = &sheet.tracks[*track];
        // What a file has before its first index belongs to the pause before that.
        if n == 0 && index.frame > 0 {
            let sectors = index.frame;
            pieces.push(piece((*track, 0, file), sectors, &mut host, line, extent)?);
        }
        let sectors = match marks.get(n + 1) {
            Some((_, next)) => next.frame - index.frame,
            None => rest(host, line, extent)?,
        };
        if host > extent.data.end {
            return Err(past(index, extent));
        }
        let of = (*track, index.number, file);
        let run = piece(of, sectors, &mut host, line, extent);
        pieces.push(run.map_err(|e| e.noted(format_args!("line {}", index.line)))?);
    }
    Ok(pieces)
}

fn past(index: &Index, extent: &Extent) -> Error {
    let (line, name) = (index.line, &extent.name);
    let end = extent.data.end;
    Error::corrupt(format!(
        "line {line}: the index lies past the end of '{name}' at {end:#x}"
    ))
}

fn piece(
    (track, index, file): (usize, u8, usize),
    sectors: u64,
    host: &mut u64,
    line: &TrackLine,
    extent: &Extent,
) -> Result<Piece> {
    let size = len64(line.mode.len());
    let start = *host;
    let end = sectors
        .checked_mul(size)
        .and_then(|len| start.checked_add(len));
    // The last sector of sound in a file with a head may be cut short.
    let most = match extent.kind {
        FileKind::Wave => extent.data.end.saturating_add(size - 1),
        FileKind::Binary | FileKind::Motorola => extent.data.end,
    };
    *host = end.filter(|end| *end <= most).ok_or_else(|| {
        let (number, name, end) = (line.number, &extent.name, extent.data.end);
        Error::corrupt(format!(
            "track {number} is to have {sectors} sectors of {size} bytes from {start:#x} of '{name}', which ends at {end:#x}"
        ))
    })?;
    let stored = Stored {
        file,
        host: start,
        end: extent.data.end,
    };
    Ok(Piece {
        track,
        index,
        sectors,
        stored,
    })
}

/// Sectors up to the end of the file.
fn rest(host: u64, line: &TrackLine, extent: &Extent) -> Result<u64> {
    let size = len64(line.mode.len());
    let len = extent.data.end.saturating_sub(host);
    if extent.kind == FileKind::Wave {
        return Ok(len.div_ceil(size));
    }
    match len % size {
        0 => Ok(len / size),
        over => Err(Error::corrupt(format!(
            "'{}' ends within a sector: the last of track {} has {over} bytes (allowed: {size})",
            extent.name, line.number
        ))),
    }
}

/// How far the disc is laid out.
struct Lay {
    lba: u64,
    session: u8,
}

impl Lay {
    fn track<'p>(
        &mut self,
        line: &TrackLine,
        pieces: impl Iterator<Item = &'p Piece>,
    ) -> Result<Track> {
        if line.session != self.session {
            let is_first = self.session == 1;
            self.lba += if is_first { AFTER_FIRST } else { AFTER_OTHER };
            self.session = line.session;
        }
        let start = self.lba;
        let mut runs = Vec::new();
        let mut lba = None;
        self.run(&mut runs, 0, line.pregap, None);
        for piece in pieces {
            if piece.index > 0 && piece.sectors > 0 {
                lba.get_or_insert(self.lba);
            }
            self.run(&mut runs, piece.index, piece.sectors, Some(piece.stored));
        }
        let last = line.indexes.last().map_or(1, |index| index.number);
        self.run(&mut runs, last, line.postgap, None);
        let Some(lba) = lba else {
            let (number, line) = (line.number, line.line);
            return Err(Error::corrupt(format!(
                "line {line}: track {number} has no sectors"
            )));
        };
        if self.lba > MAX_SECTORS {
            let text = format!("has {} sectors and more (allowed: {MAX_SECTORS})", self.lba);
            return Err(Error::new(ErrorKind::OutOfRange, text));
        }
        Ok(Track {
            number: line.number,
            mode: line.mode,
            session: line.session,
            flags: line.flags.clone(),
            isrc: line.isrc.clone(),
            texts: line.texts.clone(),
            start,
            lba,
            end: self.lba,
            runs,
        })
    }

    fn run(&mut self, runs: &mut Vec<Run>, index: u8, sectors: u64, stored: Option<Stored>) {
        if sectors > 0 {
            runs.push(Run {
                lba: self.lba,
                sectors,
                index,
                stored,
            });
            self.lba += sectors;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::parse::parse;
    use super::*;

    fn extent(kind: FileKind, data: Range<u64>) -> Extent {
        Extent {
            data,
            kind,
            name: "x".to_owned(),
        }
    }

    fn laid(text: &str, sectors: &[u64]) -> Result<Table> {
        let files = sectors
            .iter()
            .map(|n| extent(FileKind::Binary, 0..n * 2352));
        place(&parse(text.as_bytes())?, &files.collect::<Vec<_>>())
    }

    /// Number, start of the pause, index 1, end.
    fn places(table: &Table) -> Vec<(u8, u64, u64, u64)> {
        let tracks = table.tracks.iter();
        tracks.map(|t| (t.number, t.start, t.lba, t.end)).collect()
    }

    #[test]
    fn pauses_count_whether_they_are_stored_or_not() {
        let text = "FILE a BINARY\nTRACK 01 MODE1/2352\nINDEX 01 00:00:00\nTRACK 02 AUDIO\nPREGAP 00:02:00\nINDEX 01 00:04:00\nTRACK 03 AUDIO\nINDEX 00 00:06:00\nINDEX 01 00:08:00\nPOSTGAP 00:01:00";
        let table = laid(text, &[800]).expect("is right");
        let expected = [(1, 0, 0, 300), (2, 300, 450, 600), (3, 600, 750, 1025)];
        assert_eq!(places(&table), expected);
        assert_eq!(table.end, 1025);
        let hosts: Vec<_> = table
            .tracks
            .iter()
            .map(|t| t.body().next().expect("stored"))
            .collect();
        let hosts: Vec<_> = hosts
            .iter()
            .map(|r| r.stored.expect("is").host / 2352)
            .collect();
        assert_eq!(hosts, [0, 300, 600]);
        assert_eq!(
            table.find(449).map(|(t, r)| (t.number, r.stored)),
            Some((2, None))
        );
        assert!(table.find(1025).is_none());
        assert_eq!(table.tracks[2].sectors(), 200);
    }

    #[test]
    fn files_follow_each_other_and_what_precedes_the_first_index_is_a_pause() {
        let text = "FILE a BINARY\nTRACK 01 AUDIO\nINDEX 01 00:00:00\nFILE b BINARY\nTRACK 02 AUDIO\nINDEX 00 00:00:00\nINDEX 01 00:02:00\nFILE c BINARY\nTRACK 03 AUDIO\nINDEX 01 00:02:00";
        let table = laid(text, &[100, 200, 300]).expect("is right");
        let expected = [(1, 0, 0, 100), (2, 100, 250, 300), (3, 300, 450, 600)];
        assert_eq!(places(&table), expected);
    }

    #[test]
    fn each_track_counts_its_own_sectors() {
        let text = "FILE a BINARY\nTRACK 01 MODE1/2048\nINDEX 01 00:00:00\nTRACK 02 AUDIO\nINDEX 01 00:00:10\nTRACK 03 MODE2/2336\nINDEX 01 00:00:12";
        let sheet = parse(text.as_bytes()).expect("is right");
        let len = 10 * 2048 + 2 * 2352 + 5 * 2336;
        let table = place(&sheet, &[extent(FileKind::Binary, 0..len)]).expect("is right");
        assert_eq!(
            places(&table),
            [(1, 0, 0, 10), (2, 10, 10, 12), (3, 12, 12, 17)]
        );
        let cut = place(&sheet, &[extent(FileKind::Binary, 0..len - 1)]);
        let error = cut.expect_err("is cut").to_string();
        assert!(error.contains("2335 bytes (allowed: 2336)"), "{error}");
    }

    #[test]
    fn sessions_lie_apart() {
        let text = "FILE a BINARY\nTRACK 01 AUDIO\nINDEX 01 00:00:00\nREM SESSION 02\nFILE b BINARY\nTRACK 02 MODE2/2352\nINDEX 01 00:00:00";
        let table = laid(text, &[100, 50]).expect("is right");
        assert_eq!(
            places(&table),
            [(1, 0, 0, 100), (2, 11_500, 11_500, 11_550)]
        );
        assert!(table.find(5000).is_none());
    }

    #[test]
    fn what_lies_past_the_end_of_a_file_is_refused() {
        let text = "FILE a BINARY\nTRACK 01 AUDIO\nINDEX 01 00:02:00";
        let error = laid(text, &[149]).expect_err("is short").to_string();
        assert!(error.contains("which ends at"), "{error}");
        let text =
            "FILE a BINARY\nTRACK 01 AUDIO\nINDEX 01 00:00:00\nTRACK 02 AUDIO\nINDEX 01 99:00:00";
        laid(text, &[10]).expect_err("is short");
        let empty = "FILE a BINARY\nTRACK 01 AUDIO\nINDEX 01 00:00:00";
        let error = laid(empty, &[0]).expect_err("is empty").to_string();
        assert!(error.contains("has no sectors"), "{error}");
    }

    #[test]
    fn sound_in_a_wave_file_may_end_within_a_sector() {
        let sheet = parse(b"FILE a WAVE\nTRACK 01 AUDIO\nINDEX 01 00:00:00").expect("is right");
        let table = place(&sheet, &[extent(FileKind::Wave, 44..44 + 2352 + 4)]).expect("is right");
        assert_eq!(table.end, 2);
        assert_eq!(table.tracks[0].runs[0].stored.expect("is").end, 44 + 2356);
    }
}

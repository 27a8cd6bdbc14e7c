//! From the text of a sheet to what it says.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use super::sheet::{FileKind, FileLine, Index, MAX_FILES, MAX_NUMBER, MAX_TEXTS, Sheet, TrackLine};
use crate::error::{Error, Result};
use crate::image::disc::{FRAMES, Mode};
use crate::util::text::printable;

/// Words of lines that are kept and change nothing.
const TEXTS: [&str; 13] = [
    "TITLE",
    "PERFORMER",
    "SONGWRITER",
    "COMPOSER",
    "ARRANGER",
    "MESSAGE",
    "GENRE",
    "DISC_ID",
    "UPC_EAN",
    "SIZE_INFO",
    "TOC_INFO",
    "CDTEXTFILE",
    "REM",
];
/// Words of lines that mean something.
const WORDS: [&str; 9] = [
    "CATALOG", "FILE", "TRACK", "INDEX", "PREGAP", "POSTGAP", "FLAGS", "ISRC", "REM",
];
const FLAGS: [&str; 5] = ["DCP", "4CH", "PRE", "SCMS", "DATA"];
/// Most minutes of a time: more than any file is long.
const MAX_MINUTES: u64 = 9999;

/// Whether the first line that says anything begins with a word of a sheet.
pub(super) fn is_sheet(text: &[u8]) -> bool {
    let first = lines(text)
        .map(|(_, line)| line)
        .find(|line| !line.is_empty());
    let word = first.map(|line| split_word(line).0).unwrap_or_default();
    let known = WORDS.iter().chain(&TEXTS);
    known
        .into_iter()
        .any(|known| known.as_bytes().eq_ignore_ascii_case(word))
}

/// The lines of a text and their numbers, without blanks around them, whatever ends them.
fn lines(text: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    const MARK: &[u8] = b"\xef\xbb\xbf";
    let text = text.strip_prefix(MARK).unwrap_or(text);
    let mut rest = Some(text);
    let mut number = 0;
    std::iter::from_fn(move || {
        let text = rest?;
        number += 1;
        let end = text.iter().position(|b| matches!(b, b'\n' | b'\r'));
        let line = &text[..end.unwrap_or(text.len())];
        rest = end.map(|end| match &text[end..] {
            [b'\r', b'\n', rest @ ..] => rest,
            [_, rest @ ..] => rest,
            [] => &[],
        });
        Some((number, line.trim_ascii()))
    })
}

/// The first word of a line, and what follows it.
fn split_word(line: &[u8]) -> (&[u8], &[u8]) {
    let end = line.iter().position(u8::is_ascii_whitespace);
    let (word, rest) = line.split_at(end.unwrap_or(line.len()));
    (word, rest.trim_ascii())
}

fn is_word(word: &[u8], known: &str) -> bool {
    known.as_bytes().eq_ignore_ascii_case(word)
}

fn shown(bytes: &[u8]) -> String {
    printable(&OsString::from_vec(bytes.to_vec()))
}

/// What has been read so far.
struct Parser {
    sheet: Sheet,
    line: usize,
    session: u8,
    texts: usize,
}

/// Reads a sheet.
///
/// # Errors
/// `Corrupt` with the line that makes no sense; `Unsupported` for what vdtool has not.
pub(super) fn parse(text: &[u8]) -> Result<Sheet> {
    if text.starts_with(b"\xff\xfe") || text.starts_with(b"\xfe\xff") {
        let why = "is in UTF-16 (allowed: UTF-8, and any encoding that has ASCII in it)";
        return Err(Error::unsupported(why));
    }
    if text.contains(&0) {
        return Err(Error::corrupt("is no CUE sheet: it has zero bytes in it"));
    }
    let mut parser = Parser {
        sheet: Sheet::default(),
        line: 0,
        session: 1,
        texts: 0,
    };
    for (number, line) in lines(text) {
        parser.line = number;
        if !line.is_empty() {
            parser.take(line)?;
        }
    }
    parser.end_track()?;
    match parser.sheet.tracks.is_empty() {
        true => Err(Error::corrupt("has no track")),
        false => Ok(parser.sheet),
    }
}

impl Parser {
    fn wrong(&self, why: &str) -> Error {
        Error::corrupt(format!("line {}: {why}", self.line))
    }

    fn take(&mut self, line: &[u8]) -> Result<()> {
        let (word, rest) = split_word(line);
        let known = WORDS.iter().find(|known| is_word(word, known));
        match known {
            Some(&"FILE") => self.file(rest),
            Some(&"TRACK") => self.track(rest),
            Some(&"INDEX") => self.index(rest),
            Some(&"PREGAP") => self.pregap(rest),
            Some(&"POSTGAP") => self.postgap(rest),
            Some(&"FLAGS") => self.flags(rest),
            Some(&"ISRC") => {
                let code = OsString::from_vec(rest.to_vec());
                self.current("ISRC")?.isrc = Some(code);
                Ok(())
            }
            Some(&"CATALOG") => {
                self.sheet.catalog = Some(OsString::from_vec(rest.to_vec()));
                Ok(())
            }
            Some(_) => self.remark(line, rest),
            None if TEXTS.iter().any(|known| is_word(word, known)) => self.keep(line),
            None => Err(self.wrong(&format!(
                "'{}' is no word of a CUE sheet (allowed: {}, {})",
                shown(word),
                WORDS.join(", "),
                TEXTS[..12].join(", ")
            ))),
        }
    }

    /// The track that a line is about.
    fn current(&mut self, what: &str) -> Result<&mut TrackLine> {
        let error = self.wrong(&format!("{what} before the first TRACK"));
        self.sheet.tracks.last_mut().ok_or(error)
    }

    fn keep(&mut self, line: &[u8]) -> Result<()> {
        self.texts += 1;
        if self.texts > MAX_TEXTS {
            return Err(self.wrong(&format!("one more line of text (allowed: {MAX_TEXTS})")));
        }
        let line = OsString::from_vec(line.to_vec());
        match self.sheet.tracks.last_mut() {
            Some(track) => track.texts.push(line),
            None => self.sheet.texts.push(line),
        }
        Ok(())
    }

    /// A remark: some say what sheets have no word for.
    fn remark(&mut self, line: &[u8], rest: &[u8]) -> Result<()> {
        let (word, number) = split_word(rest);
        if !is_word(word, "SESSION") {
            return match ["LEAD-OUT", "LEAD-IN", "PREGAP"]
                .iter()
                .any(|w| is_word(word, w))
            {
                // They say where sessions end, which follows from what is in them.
                true => Ok(()),
                false => self.keep(line),
            };
        }
        let next = self.number(number, "session")?;
        let last = if self.sheet.tracks.is_empty() {
            1
        } else {
            self.session + 1
        };
        if next != self.session && next != last {
            let why = format!("session {next} follows session {}", self.session);
            return Err(self.wrong(&why));
        }
        if next != self.session {
            self.end_track()?;
        }
        self.session = next;
        Ok(())
    }

    fn number(&self, text: &[u8], what: &str) -> Result<u8> {
        let number = std::str::from_utf8(text)
            .ok()
            .filter(|t| t.bytes().all(|b| b.is_ascii_digit()));
        let number = number.and_then(|text| text.parse().ok());
        number.filter(|n| *n <= MAX_NUMBER).ok_or_else(|| {
            let found = shown(text);
            self.wrong(&format!(
                "the number of the {what} is '{found}' (allowed: 0 to {MAX_NUMBER})"
            ))
        })
    }

    fn file(&mut self, rest: &[u8]) -> Result<()> {
        let (name, kind) = self.quoted(rest)?;
        let kinds = [
            ("BINARY", FileKind::Binary),
            ("MOTOROLA", FileKind::Motorola),
            ("WAVE", FileKind::Wave),
        ];
        let found = kinds.iter().find(|(known, _)| is_word(kind, known));
        let Some((_, kind)) = found else {
            let others = ["AIFF", "MP3", "FLAC", "OGG"];
            let text = format!(
                "line {}: the file is of type '{}' (allowed: BINARY, MOTOROLA, WAVE)",
                self.line,
                shown(kind)
            );
            return Err(match others.iter().any(|known| is_word(kind, known)) {
                true => Error::unsupported(text),
                false => Error::corrupt(text),
            });
        };
        if name.is_empty() || name == b"." || name == b".." {
            return Err(self.wrong("the file has no name"));
        }
        let goes_on = self
            .sheet
            .tracks
            .last()
            .is_some_and(|t| !has_body(t) && !t.indexes.is_empty());
        if !goes_on {
            self.end_track()?;
        }
        if self.sheet.files.len() >= MAX_FILES {
            return Err(self.wrong(&format!("one more file (allowed: {MAX_FILES})")));
        }
        self.sheet.files.push(FileLine {
            name: OsString::from_vec(name.to_vec()),
            kind: *kind,
            line: self.line,
        });
        Ok(())
    }

    /// A name, in quotes or not, and the word behind it.
    fn quoted<'l>(&self, rest: &'l [u8]) -> Result<(&'l [u8], &'l [u8])> {
        let split = match rest.strip_prefix(b"\"") {
            Some(rest) => {
                let end = rest.iter().rposition(|b| *b == b'"');
                end.map(|end| (&rest[..end], rest[end + 1..].trim_ascii()))
            }
            None => {
                let start = rest.iter().rposition(u8::is_ascii_whitespace);
                start.map(|start| (rest[..start].trim_ascii(), &rest[start + 1..]))
            }
        };
        split.ok_or_else(|| self.wrong("FILE is followed by a name and a type"))
    }

    fn track(&mut self, rest: &[u8]) -> Result<()> {
        self.end_track()?;
        if self.sheet.files.is_empty() {
            return Err(self.wrong("TRACK before the first FILE"));
        }
        let (number, mode) = split_word(rest);
        let number = self.number(number, "track")?;
        let last = self.sheet.tracks.last().map(|track| track.number);
        let is_next = last.map_or(number > 0, |last| number == last + 1);
        if !is_next {
            let last = last.map_or("none".to_owned(), |last| format!("track {last}"));
            return Err(self.wrong(&format!("track {number} follows {last}")));
        }
        let Some(mode) = Mode::named(mode) else {
            let (found, known) = (shown(mode), Mode::names());
            return Err(self.wrong(&format!(
                "the track is of mode '{found}' (allowed: {known})"
            )));
        };
        let kind = self.sheet.files.last().map(|file| file.kind);
        if kind == Some(FileKind::Wave) && mode != Mode::Audio {
            return Err(self.wrong(&format!(
                "a WAVE file has a track {} (allowed: AUDIO)",
                mode.name()
            )));
        }
        self.sheet.tracks.push(TrackLine {
            number,
            mode,
            session: self.session,
            flags: Vec::new(),
            isrc: None,
            texts: Vec::new(),
            pregap: 0,
            postgap: 0,
            indexes: Vec::new(),
            line: self.line,
        });
        Ok(())
    }

    /// Refuses to leave a track that does not begin anywhere.
    fn end_track(&self) -> Result<()> {
        match self.sheet.tracks.last() {
            Some(track) if !has_body(track) => {
                let number = track.number;
                Err(Error::corrupt(format!(
                    "line {}: track {number} has no INDEX 01",
                    track.line
                )))
            }
            _ => Ok(()),
        }
    }

    fn index(&mut self, rest: &[u8]) -> Result<()> {
        let (number, time) = split_word(rest);
        let number = self.number(number, "index")?;
        let frame = self.time(time)?;
        let file = self.sheet.files.len().saturating_sub(1);
        let line = self.line;
        let before = self
            .sheet
            .tracks
            .iter()
            .flat_map(|t| &t.indexes)
            .next_back()
            .copied();
        let track = self.current("INDEX")?;
        let last = track.indexes.last().map(|index| index.number);
        let is_next = match last {
            None => number <= 1,
            Some(last) => number == last + 1,
        };
        if track.postgap > 0 {
            return Err(self.wrong("INDEX after POSTGAP"));
        }
        if !is_next {
            let why = match last {
                None => format!("the first index is {number} (allowed: 00, 01)"),
                Some(last) => format!("index {number} follows index {last}"),
            };
            return Err(self.wrong(&why));
        }
        track.indexes.push(Index {
            number,
            file,
            frame,
            line,
        });
        match before.filter(|before| before.file == file && before.frame > frame) {
            Some(_) => Err(self.wrong("the index lies before the one above it")),
            None => Ok(()),
        }
    }

    /// `MM:SS:FF` as sectors.
    fn time(&self, text: &[u8]) -> Result<u64> {
        let wrong = || {
            let found = shown(text);
            self.wrong(&format!(
                "'{found}' is no time (allowed: MM:SS:FF, minutes to {MAX_MINUTES}, seconds below 60, frames below 75)"
            ))
        };
        let number = |text: &[u8]| -> Option<u64> {
            let is_number =
                !text.is_empty() && text.len() <= 4 && text.iter().all(u8::is_ascii_digit);
            let text = std::str::from_utf8(text).ok().filter(|_| is_number)?;
            text.parse().ok()
        };
        let parts: Vec<Option<u64>> = text.split(|b| *b == b':').map(number).collect();
        match *parts {
            [Some(m), Some(s), Some(f)] if m <= MAX_MINUTES && s < 60 && f < FRAMES => {
                Ok((m * 60 + s) * FRAMES + f)
            }
            _ => Err(wrong()),
        }
    }

    fn pregap(&mut self, rest: &[u8]) -> Result<()> {
        let gap = self.time(rest)?;
        let track = self.current("PREGAP")?;
        if !track.indexes.is_empty() || track.pregap > 0 {
            return Err(self.wrong("PREGAP stands before the first INDEX, once"));
        }
        track.pregap = gap;
        Ok(())
    }

    fn postgap(&mut self, rest: &[u8]) -> Result<()> {
        let gap = self.time(rest)?;
        let track = self.current("POSTGAP")?;
        if !has_body(track) || track.postgap > 0 {
            return Err(self.wrong("POSTGAP stands after INDEX 01, once"));
        }
        track.postgap = gap;
        Ok(())
    }

    fn flags(&mut self, rest: &[u8]) -> Result<()> {
        let mut flags = Vec::new();
        for word in rest
            .split(u8::is_ascii_whitespace)
            .filter(|word| !word.is_empty())
        {
            let Some(flag) = FLAGS.iter().find(|known| is_word(word, known)) else {
                let found = shown(word);
                let known = FLAGS.join(", ");
                return Err(
                    self.wrong(&format!("the flag '{found}' is unknown (allowed: {known})"))
                );
            };
            flags.push((*flag).to_owned());
        }
        self.current("FLAGS")?.flags = flags;
        Ok(())
    }
}

fn has_body(track: &TrackLine) -> bool {
    track.indexes.iter().any(|index| index.number > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str, part: &str) {
        let error = parse(text.as_bytes()).expect_err(text).to_string();
        assert!(error.contains(part), "{text}: {error}");
    }

    const HEAD: &str = "FILE \"a.bin\" BINARY\nTRACK 01 MODE1/2352\n";

    #[test]
    fn all_words_are_read_whatever_ends_the_lines_and_in_any_case() {
        let text = "CATALOG 0000010271955\nTITLE \"x\"\nREM DATE 1999\nfile a b.bin binary\n  Track 01 mode1/2352\n    TITLE \"t\"\n    FLAGS DCP PRE\n    ISRC ABCDE1234567\n    PREGAP 00:02:00\n    INDEX 01 00:00:00\nFILE \"q\"uote.wav\" WAVE\n\nTRACK 02 AUDIO\nINDEX 00 00:00:00\nINDEX 01 00:02:00\nPOSTGAP 00:01:00\nREM SESSION 02\nFILE m.bin MOTOROLA\nTRACK 03 AUDIO\nINDEX 01 00:00:00";
        for end in ["\n", "\r\n", "\r"] {
            let text = format!("\u{feff}{}", text.replace('\n', end));
            let sheet = parse(text.as_bytes()).expect("is right");
            assert_eq!(sheet.catalog.as_deref(), Some("0000010271955".as_ref()));
            assert_eq!(sheet.texts, ["TITLE \"x\"", "REM DATE 1999"]);
            let names: Vec<_> = sheet.files.iter().map(|f| (&*f.name, f.kind)).collect();
            let kinds = [FileKind::Binary, FileKind::Wave, FileKind::Motorola];
            for (found, (name, kind)) in names
                .iter()
                .zip(["a b.bin", "q\"uote.wav", "m.bin"].iter().zip(kinds))
            {
                assert_eq!((found.0.to_str(), found.1), (Some(*name), kind));
            }
            let [one, two, three] = &*sheet.tracks else {
                panic!("three tracks");
            };
            assert_eq!((one.number, one.mode, one.pregap), (1, Mode::Mode1, 150));
            assert_eq!(one.flags, ["DCP", "PRE"]);
            assert_eq!(one.isrc.as_deref(), Some("ABCDE1234567".as_ref()));
            assert_eq!(two.indexes[1].frame, 150);
            assert_eq!((two.postgap, two.session, three.session), (75, 1, 2));
        }
    }

    #[test]
    fn names_are_bytes() {
        let sheet =
            parse(b"FILE \"caf\xe9.bin\" BINARY\nTRACK 1 AUDIO\nINDEX 1 0:0:0").expect("right");
        assert_eq!(sheet.files[0].name.as_encoded_bytes(), b"caf\xe9.bin");
    }

    #[test]
    fn a_pause_may_lie_at_the_end_of_the_file_before() {
        let text = "FILE a WAVE\nTRACK 01 AUDIO\nINDEX 01 00:00:00\nTRACK 02 AUDIO\nINDEX 00 00:10:00\nFILE b WAVE\nINDEX 01 00:00:00";
        let sheet = parse(text.as_bytes()).expect("is right");
        let files: Vec<usize> = sheet.tracks[1].indexes.iter().map(|i| i.file).collect();
        assert_eq!(files, [0, 1]);
    }

    #[test]
    fn sheets_that_make_no_sense_are_refused_by_line() {
        refused("", "has no track");
        refused("TRACK 01 AUDIO", "line 1: TRACK before");
        refused("INDEX 01 00:00:00", "line 1: INDEX before");
        refused(HEAD, "line 2: track 1 has no INDEX 01");
        refused(
            &format!("{HEAD}INDEX 00 00:00:00\nTRACK 02 AUDIO"),
            "no INDEX 01",
        );
        refused(&format!("{HEAD}INDEX 02 00:00:00"), "first index is 2");
        refused(&format!("{HEAD}INDEX 01 -1:00:00"), "no time");
        refused(&format!("{HEAD}INDEX 01 00:06:93"), "frames below 75");
        refused(&format!("{HEAD}INDEX 01 00:60:00"), "seconds below 60");
        refused(&format!("{HEAD}INDEX 01 00:00"), "no time");
        refused(
            &format!("{HEAD}INDEX 01 00:00:00\nINDEX 03 00:01:00"),
            "index 3 follows index 1",
        );
        let two = "INDEX 01 00:01:00\nTRACK 02 AUDIO\nINDEX 01 00:00:74";
        refused(&format!("{HEAD}{two}"), "line 5: the index lies before");
        refused(
            &format!("{HEAD}INDEX 01 00:00:00\nTRACK 03 AUDIO"),
            "track 3 follows track 1",
        );
        refused(
            &format!("{HEAD}INDEX 01 00:00:00\nTRACK 100 AUDIO"),
            "0 to 99",
        );
        refused("FILE a.bin\nTRACK 01 AUDIO", "a name and a type");
        refused("FILE a.mp3 MP3", "type 'MP3'");
        refused("FILE \"\" BINARY", "no name");
        refused("FILE a BINARY\nTRACK 01 MODE3/2352", "MODE1/2352");
        refused("FILE a WAVE\nTRACK 01 MODE1/2352", "allowed: AUDIO");
        refused("FOO", "'FOO' is no word");
        refused(
            &format!("{HEAD}INDEX 01 00:00:00\nPREGAP 00:02:00"),
            "before the first INDEX",
        );
        refused(&format!("{HEAD}POSTGAP 00:02:00"), "after INDEX 01");
        refused(&format!("{HEAD}FLAGS XYZ"), "allowed: DCP");
        refused("REM SESSION 05", "session 5 follows");
        refused("a\0", "zero bytes");
        parse(b"\xff\xfeF\0").expect_err("UTF-16");
    }

    #[test]
    fn ten_thousand_tracks_and_files_are_too_many() {
        let tracks = (1..=10_000).map(|n| format!("TRACK {n:02} AUDIO\nINDEX 01 00:00:00\n"));
        let text: String = std::iter::once("FILE a BINARY\n".to_owned())
            .chain(tracks)
            .collect();
        refused(&text, "0 to 99");
        refused(&"FILE a BINARY\n".repeat(10_000), "one more file");
        refused(&"REM x\n".repeat(20_000), "one more line of text");
    }
}

//! wav: the sound of discs, a file for each track.  It is written, and never read as a disk.

use std::ffi::{OsStr, OsString};

use crate::error::{Error, ErrorKind, Result};
use crate::formats::cue::wave;
use crate::image::Driver;
use crate::image::disc::plan::{Maker, NewFile, Origin, Piece, Plan};
use crate::image::disc::{Mode, RAW, Table, Track};
use crate::image::options::OptionValues;
use crate::util::align::len64;

/// What `-O wav` stands for; it is not among the formats that are opened.
pub static DRIVER: Driver = Driver {
    name: "wav",
    aliases: &[],
    extensions: &["wav"],
    about: "sound of discs",
    is_plain: false,
    names_uris: false,
    probe: |_| 0,
    open: |_, _| Err(Error::unsupported("sound is no disk")),
    open_options: &[],
    creator: None,
};

/// How they are made.
pub(super) static MAKER: Maker = Maker {
    options: &[],
    of_disk: |_, _, _| {
        Err(Error::unsupported(
            "wav is made of tracks of sound, which only discs have",
        ))
    },
    of_disc,
};

fn of_disc(table: &Table, only: Option<u8>, _values: &OptionValues, _stem: &OsStr) -> Result<Plan> {
    let tracks = table
        .tracks
        .iter()
        .filter(|t| only.is_none_or(|only| t.number == only));
    let tracks = tracks.filter(|track| only.is_some() || track.mode.is_audio());
    let files: Vec<NewFile> = tracks.map(file).collect::<Result<_>>()?;
    match files.is_empty() {
        true => Err(Error::unsupported("has no track of sound")),
        false => Ok(Plan { files, text: None }),
    }
}

fn file(track: &Track) -> Result<NewFile> {
    if !track.mode.is_audio() {
        let text = format!(
            "track {} is {} (allowed: AUDIO)",
            track.number,
            track.mode.name()
        );
        return Err(Error::unsupported(text));
    }
    let samples = track.sectors() * len64(RAW);
    let Some(head) = wave::head(samples) else {
        let text = format!(
            "track {} has {samples} bytes, more than a WAVE file holds",
            track.number
        );
        return Err(Error::new(ErrorKind::OutOfRange, text));
    };
    let piece = Piece {
        origin: Origin::Disc(track.lba),
        sectors: track.sectors(),
        from: track.mode,
        mode: Mode::Audio,
        lba: track.lba,
        host: len64(head.len()),
    };
    Ok(NewFile {
        name: OsString::from(format!("track{:02}.wav", track.number)),
        len: len64(head.len()) + samples,
        head: head.to_vec(),
        pieces: vec![piece],
    })
}

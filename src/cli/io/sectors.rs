//! `read` and `write` of parts of sectors.

use std::path::Path;
use std::time::Instant;

use crate::cli::cache::CacheMode;
use crate::cli::io::args::{Parsed, parse_size};
use crate::cli::io::command::{Command, Outcome};
use crate::cli::io::disk::{Disk, failed, uninterrupted};
use crate::cli::io::pattern::{self, Bytes};
use crate::cli::io::report::Report;
use crate::cli::io::session::Session;
use crate::error::{Error, ErrorKind, Result};
use crate::image::sector::{self, Parts, Piece, Sectors, Segment, Segments, Unit};
use crate::util::align::len64;

/// The options that are words.
pub(super) const WORDS: &[&str] = &["parts", "lba", "count"];

/// Whether any of them was given.
pub(super) fn are_meant(parsed: &Parsed) -> bool {
    WORDS
        .iter()
        .any(|word| parsed.of_word(word).next().is_some())
}

/// The segments that were typed.
fn segments(parsed: &Parsed, command: &Command) -> anyhow::Result<Segments> {
    let sizes =
        |word| -> anyhow::Result<Vec<u64>> { parsed.of_word(word).map(parse_size).collect() };
    let (lbas, counts) = (sizes("lba")?, sizes("count")?);
    let parts = parsed
        .of_word("parts")
        .map(|text| Parts::parse(&text.to_string_lossy()));
    let parts: Vec<Parts> = parts.collect::<Result<_>>()?;
    let operands = parsed.operands.iter().map(|word| parse_size(word));
    let operands: Vec<u64> = operands.collect::<anyhow::Result<_>>()?;
    let (unit, ranges): (Unit, Vec<(u64, u64)>) = match (&*lbas, &*operands) {
        ([], []) => return Err(command.misused("--parts needs --lba, or OFFSET and LEN")),
        ([], [..]) if !operands.len().is_multiple_of(2) => {
            return Err(command.misused("--parts takes pairs of OFFSET and LEN"));
        }
        ([], [..]) => {
            let (pairs, _) = operands.as_chunks::<2>();
            (
                Unit::Bytes,
                pairs.iter().map(|[at, len]| (*at, *len)).collect(),
            )
        }
        ([..], []) => {
            let counts = counts.iter().copied().chain(std::iter::repeat(1));
            (Unit::Blocks, lbas.iter().copied().zip(counts).collect())
        }
        _ => return Err(command.misused("--lba stands instead of OFFSET and LEN")),
    };
    if counts.len() > lbas.len() {
        return Err(command.misused("--count is for --lba, once for each"));
    }
    let parts_of = |n: usize| match *parts {
        [one] => Some(one),
        _ if parts.len() == ranges.len() => parts.get(n).copied(),
        _ => None,
    };
    let list = ranges.iter().enumerate().map(|(n, (start, len))| {
        Some(Segment {
            start: *start,
            len: *len,
            parts: parts_of(n)?,
        })
    });
    let Some(list) = list.collect::<Option<Vec<Segment>>>() else {
        return Err(command.misused("--parts is given once, or once for each --lba or OFFSET"));
    };
    Ok(Segments::new(unit, list)?)
}

/// The sectors of the image that takes the writes.
fn on<T>(
    disk: &Disk,
    verb: &'static str,
    run: impl FnOnce(&dyn Sectors) -> Result<T>,
) -> anyhow::Result<T> {
    let chain = disk.backend.chain();
    let top = chain.top();
    let done = match top.as_sectors() {
        Some(sectors) => run(sectors),
        None => Err(Error::unsupported(format!(
            "format '{}' has no sectors with parts",
            top.driver().name
        ))),
    };
    done.map_err(|e| failed(verb, e.at_opt(top.storage().path())))
}

/// Refuses options that are for the disk's own bytes.
fn refuse(parsed: &Parsed, command: &Command, letters: &str) -> anyhow::Result<()> {
    match letters.chars().find(|letter| parsed.has(*letter)) {
        Some(letter) => Err(command.misused(&format!("-{letter} is not for --parts"))),
        None => Ok(()),
    }
}

/// What was done since `start`, from the byte at `first` on.
fn done(verb: &'static str, first: Option<u64>, len: u64, start: Instant) -> Report {
    Report {
        verb,
        at: first.unwrap_or(0),
        len,
        time: start.elapsed(),
    }
}

/// Where a piece is among the bytes of whole sectors.
fn place(piece: &Piece, whole: usize) -> u64 {
    piece
        .lba
        .saturating_mul(len64(whole))
        .saturating_add(len64(piece.range.start))
}

/// Something other than the request failed: the output is gone.
fn lost(error: anyhow::Error, kept: &mut Option<anyhow::Error>) -> Error {
    *kept = Some(error);
    Error::new(ErrorKind::Cancelled, "the output is gone")
}

/// `read --parts`.
pub(super) fn read(
    session: &mut Session,
    parsed: &Parsed,
    command: &Command,
) -> anyhow::Result<Outcome> {
    refuse(parsed, command, "bsl")?;
    let segments = segments(parsed, command)?;
    let byte = parsed
        .value('P')
        .map(|text| pattern::parse_byte(&text.to_string_lossy()));
    let byte = byte.transpose()?;
    let form = session.form(parsed);
    let dump = parsed.has('v') && !parsed.has('q');
    let (disk, out) = session.parts()?;
    let (mut first, mut differs, mut kept) = (None, None, None);
    let start = Instant::now();
    let read = on(disk, "read", |sectors| {
        let whole = sectors.whole_len();
        let len = sector::read(sectors, &segments, &mut |piece, bytes| {
            let at = place(piece, whole);
            first.get_or_insert(at);
            let wrong = byte.and_then(|byte| bytes.iter().position(|b| *b != byte));
            differs = differs.or(wrong.map(|n| at + len64(n)));
            if dump {
                out.dump(bytes, at).map_err(|e| lost(e.into(), &mut kept))?;
            }
            uninterrupted("read").map_err(|e| lost(e, &mut kept))
        })?;
        match len {
            0 => Err(Error::invalid(
                "none of these sectors has any of these parts",
            )),
            len => Ok(len),
        }
    });
    let len = read.map_err(|e| kept.unwrap_or(e))?;
    if let Some(at) = differs {
        out.line(&format!(
            "Pattern verification failed at offset {at}, {len} bytes"
        ))?;
    }
    done("read", first, len, start).print(out, form)?;
    Ok(match differs {
        Some(_) => Outcome::Differs,
        None => Outcome::Done,
    })
}

/// `write --parts`.
pub(super) fn write(
    session: &mut Session,
    parsed: &Parsed,
    command: &Command,
) -> anyhow::Result<Outcome> {
    refuse(parsed, command, "bcnuz")?;
    if parsed.has('P') && parsed.has('s') {
        return Err(command.misused("Only one of -P and -s can be specified at the same time"));
    }
    let segments = segments(parsed, command)?;
    let bytes = match (parsed.value('s'), parsed.value('P')) {
        (Some(path), _) => Bytes::from_file(Path::new(path), u64::MAX)?,
        (None, Some(byte)) => Bytes::Same(pattern::parse_byte(&byte.to_string_lossy())?),
        (None, None) => Bytes::Same(pattern::DEFAULT),
    };
    let form = session.form(parsed);
    let (disk, out) = session.parts()?;
    let (mut first, mut from, mut kept) = (None, 0, None);
    let start = Instant::now();
    let written = on(disk, "write", |sectors| {
        let whole = sectors.whole_len();
        sector::write(sectors, &segments, &mut |piece, buf| {
            uninterrupted("write").map_err(|e| lost(e, &mut kept))?;
            first.get_or_insert(place(piece, whole));
            bytes.fill(buf, from)?;
            from += len64(buf.len());
            Ok(())
        })
    });
    let len = written.map_err(|e| kept.unwrap_or(e))?;
    sync(disk)?;
    done("wrote", first, len, start).print(out, form)?;
    Ok(Outcome::Done)
}

/// Makes what was written durable, unless the cache mode says that nothing has to be.
fn sync(disk: &Disk) -> anyhow::Result<()> {
    match disk.spec.cache {
        CacheMode::Unsafe => Ok(()),
        _ => disk.backend.chain().flush().map_err(|e| failed("flush", e)),
    }
}

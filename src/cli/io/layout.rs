//! How long the disk is and which of its bytes have space: `length`, `truncate`, `map`, `alloc`.

use std::ops::Range;

use crate::chain::Chain;
use crate::cli::io::args::Parsed;
use crate::cli::io::command::{Command, Needs, Outcome};
use crate::cli::io::disk::{failed, uninterrupted};
use crate::cli::io::report::whole;
use crate::cli::io::session::Session;
use crate::cli::resize::{self, PreallocationArg};
use crate::error::Error;
use crate::image::{Source, Wait};
use crate::util::range;

pub(super) static LENGTH: Command = Command {
    name: "length",
    aliases: &["l"],
    usage: "",
    letters: "",
    words: &[],
    operands: 0..=0,
    needs: Needs::Disk,
    about: "print the size of the disk",
    help: "",
    run: |session, _| {
        let (disk, out) = session.parts()?;
        out.line(&whole(disk.backend.geometry().virtual_size))?;
        Ok(Outcome::Done)
    },
};

pub(super) static TRUNCATE: Command = Command {
    name: "truncate",
    aliases: &["t"],
    usage: "[-m MODE] SIZE",
    letters: "m:",
    words: &[],
    operands: 1..=1,
    needs: Needs::Disk,
    about: "set the size of the disk",
    help: "\
-m  off, falloc or full: what to do about the space of new bytes

What lies past the new end is lost, without a question.",
    run: truncate,
};

pub(super) static MAP: Command = Command {
    name: "map",
    aliases: &[],
    usage: "",
    letters: "",
    words: &[],
    operands: 0..=0,
    needs: Needs::Disk,
    about: "list what the image itself has, as opposed to its backing image or nobody",
    help: "",
    run: map,
};

pub(super) static ALLOC: Command = Command {
    name: "alloc",
    aliases: &["a"],
    usage: "OFFSET [LEN]",
    letters: "",
    words: &[],
    operands: 1..=2,
    needs: Needs::Disk,
    about: "count the bytes of a range (512 where LEN is left out) that the image itself has",
    help: "",
    run: alloc,
};

fn truncate(session: &mut Session, parsed: &Parsed) -> anyhow::Result<Outcome> {
    let size = parsed.size_at(0)?;
    let how = match parsed.value('m') {
        Some(mode) => TRUNCATE.mode(mode)?,
        None => PreallocationArg::Off,
    };
    let chain = session.disk()?.backend.chain();
    let fail = |e: Error| failed("truncate", e.at_opt(chain.top().storage().path()));
    resize::may_preallocate(&chain, chain.virtual_size()..size, how).map_err(fail)?;
    resize::set_size(&chain, size, how).map_err(fail)?;
    Ok(Outcome::Done)
}

fn map(session: &mut Session, _parsed: &Parsed) -> anyhow::Result<Outcome> {
    let (disk, out) = session.parts()?;
    let chain = disk.backend.chain();
    for piece in pieces("map", &chain, 0..chain.virtual_size()) {
        let piece = piece?;
        let len = range::len(&piece.range);
        let word = match piece.allocated {
            true => "    allocated",
            false => "not allocated",
        };
        let (size, start) = (whole(len), whole(piece.range.start));
        let at = piece.range.start;
        out.line(&format!(
            "{size} ({len:#x}) bytes {word} at offset {start} ({at:#x})"
        ))?;
    }
    Ok(Outcome::Done)
}

fn alloc(session: &mut Session, parsed: &Parsed) -> anyhow::Result<Outcome> {
    /// What a range without a length covers: a sector.
    const DEFAULT: u64 = 512;
    let at = parsed.size_at(0)?;
    let len = match parsed.operands.len() {
        1 => DEFAULT,
        _ => parsed.size_at(1)?,
    };
    let (disk, out) = session.parts()?;
    let chain = disk.backend.chain();
    let size = chain.virtual_size();
    let range = at.min(size)..at.saturating_add(len).min(size);
    let total = range::len(&range);
    let mut allocated = 0;
    for piece in pieces("alloc", &chain, range) {
        let piece = piece?;
        if piece.allocated {
            allocated += range::len(&piece.range);
        }
    }
    let at = whole(at);
    out.line(&format!(
        "{allocated}/{total} bytes allocated at offset {at}"
    ))?;
    Ok(Outcome::Done)
}

/// A run of bytes that the top layer has or does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) range: Range<u64>,
    pub(super) allocated: bool,
}

/// The pieces of a range inside the disk, neighbours of one kind joined.
pub(super) fn pieces(
    verb: &'static str,
    chain: &Chain,
    range: Range<u64>,
) -> impl Iterator<Item = anyhow::Result<Piece>> {
    let mut runs = runs(verb, chain, range);
    let mut ahead = None;
    std::iter::from_fn(move || {
        let mut piece: Piece = match ahead.take().or_else(|| runs.next())? {
            Ok(piece) => piece,
            Err(e) => return Some(Err(e)),
        };
        for next in runs.by_ref() {
            match next {
                Ok(next) if next.allocated == piece.allocated => piece.range.end = next.range.end,
                other => {
                    ahead = Some(other);
                    break;
                }
            }
        }
        Some(Ok(piece))
    })
}

fn runs(
    verb: &'static str,
    chain: &Chain,
    range: Range<u64>,
) -> impl Iterator<Item = anyhow::Result<Piece>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        let start = at;
        // An error is the last item.
        at = range.end;
        let found = uninterrupted(verb).and_then(|()| {
            let _ticket = chain.enter();
            let top = chain.top();
            let run = top.map(start, range.end - start, Wait::Yes);
            let run = run.map_err(|e| failed(verb, e.at_opt(top.storage().path())))?;
            Ok((run.len, !matches!(run.source, Source::Below)))
        });
        Some(found.map(|(len, allocated)| {
            at = start + len;
            Piece {
                range: start..at,
                allocated,
            }
        }))
    })
}

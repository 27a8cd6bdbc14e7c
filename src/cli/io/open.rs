//! `open`, `close`, `reopen`.

use std::ffi::OsStr;
use std::path::PathBuf;

use crate::cli::cache::{AioMode, CacheMode};
use crate::cli::common;
use crate::cli::io::args::Parsed;
use crate::cli::io::command::{Command, Needs, Outcome};
use crate::cli::io::disk::{Spec, Target};
use crate::cli::io::session::Session;
use crate::image::options::{double_commas, split_commas};
use crate::storage::open::Access;
use crate::util::text::{printable, split_equals};

pub(super) static OPEN: Command = Command {
    name: "open",
    aliases: &["o"],
    usage: "[-CiknrsU] [-t CACHE] [-d DISCARD] [-i AIO] [-o K=V,..] FILE",
    letters: "CknrsUi:t:d:o:",
    words: &[],
    operands: 1..=1,
    needs: Needs::Nothing,
    about: "open an image",
    help: "\
-C  write into the image what is read from those below it
-d  unmap or ignore: what becomes of discards
-i  no effect
-k  no effect
-n  the same as -t none
-o  driver=FORMAT, read-only=on, force-share=on, and options of the format
-r  for reading only
-s  writes go to a temporary layer and are lost when the image is closed
-t  writeback, writethrough, none, directsync or unsafe
-U  take no locks; for reading only

Example: open -o driver=raw disk.img",
    run: open,
};

pub(super) static CLOSE: Command = Command {
    name: "close",
    aliases: &["c"],
    usage: "",
    letters: "",
    words: &[],
    operands: 0..=0,
    needs: Needs::Disk,
    about: "close the image",
    help: "",
    run: |session, _| {
        session.close()?;
        Ok(Outcome::Done)
    },
};

pub(super) static REOPEN: Command = Command {
    name: "reopen",
    aliases: &[],
    usage: "[-r | -w] [-c CACHE] [-o K=V,..]",
    letters: "rwc:o:",
    words: &[],
    operands: 0..=0,
    needs: Needs::Disk,
    about: "open the image again with other options",
    help: "\
-c  writeback, writethrough, none, directsync or unsafe
-o  options of the format, besides those it has
-r  for reading only
-w  for reading and writing

The format stays what it was.  A snapshot (open -s) is not reopened: it would lose its writes.",
    run: reopen,
};

fn open(session: &mut Session, parsed: &Parsed) -> anyhow::Result<Outcome> {
    let path = parsed.operands.first().map(PathBuf::from);
    let mut spec = session.spec(path.unwrap_or_default());
    spec.copies = parsed.has('C');
    if parsed.has('r') {
        spec.access = Access::Read;
    }
    if parsed.has('s') {
        spec.target = Target::Overlay;
    }
    if parsed.has('U') {
        spec.args.force_share = true;
    }
    if parsed.has('n') {
        spec.cache = CacheMode::None;
    }
    if let Some(mode) = parsed.value('t') {
        spec.cache = OPEN.mode(mode)?;
    }
    if let Some(mode) = parsed.value('i') {
        OPEN.mode::<AioMode>(mode)?;
    }
    if let Some(mode) = parsed.value('d') {
        spec.discard = OPEN.mode(mode)?;
    }
    add_options(&mut spec, parsed, &OPEN)?;
    session.open(spec)?;
    Ok(Outcome::Done)
}

/// Takes over what `-o` says: options of opening by their QEMU names, the rest to the format.
fn add_options(spec: &mut Spec, parsed: &Parsed, command: &Command) -> anyhow::Result<()> {
    for option in parsed.values('o').flat_map(split_commas) {
        let (key, value) = split_equals(&option).unwrap_or((&option, OsStr::new("on")));
        // What is no text is no word that is known.
        let value = &*value.to_string_lossy();
        match &*key.to_string_lossy() {
            "driver" => {
                let format = common::parse_driver(value)
                    .map_err(|e| command.misused(&format!("driver={}: {e}", printable(value))))?;
                spec.format = Some(format);
            }
            "read-only" | "readonly" => {
                spec.access = match on(value, command)? {
                    true => Access::Read,
                    false => Access::Write,
                };
            }
            "force-share" => spec.args.force_share = on(value, command)?,
            _ => spec.values.push(double_commas(&option)),
        }
    }
    Ok(())
}

fn on(value: &str, command: &Command) -> anyhow::Result<bool> {
    match value {
        "on" | "true" | "yes" => Ok(true),
        "off" | "false" | "no" => Ok(false),
        _ => {
            let value = printable(value);
            Err(command.misused(&format!("'{value}' is neither on nor off")))
        }
    }
}

fn reopen(session: &mut Session, parsed: &Parsed) -> anyhow::Result<Outcome> {
    let before = session.disk()?.spec.clone();
    let mut spec = before.clone();
    if before.target == Target::Overlay {
        return Err(REOPEN.misused("a snapshot would lose its writes"));
    }
    match (parsed.has('r'), parsed.has('w')) {
        (true, true) => return Err(REOPEN.misused("Only one -r/-w option may be given")),
        (true, false) => spec.access = Access::Read,
        (false, true) => spec.access = Access::Write,
        (false, false) => {}
    }
    if let Some(mode) = parsed.value('c') {
        spec.cache = REOPEN.mode(mode)?;
    }
    add_options(&mut spec, parsed, &REOPEN)?;
    // Its own locks would keep it out, so it is closed first.
    spec.format = before.format;
    session.close()?;
    session
        .open(spec)
        .map_err(|error| match session.open(before) {
            Ok(()) => error,
            Err(again) => error.context(format!("no file is open now ({again:#})")),
        })?;
    Ok(Outcome::Done)
}

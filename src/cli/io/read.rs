//! `read`, `readv`, `aio_read`.

use std::time::Duration;

use crate::backend::Request;
use crate::cli::io::args::Parsed;
use crate::cli::io::command::{Command, Needs, Outcome};
use crate::cli::io::disk::{STEP, steps};
use crate::cli::io::pattern::{self, Expected};
use crate::cli::io::report::Report;
use crate::cli::io::sectors;
use crate::cli::io::session::Session;
use crate::util::align::clamp_len;
use crate::util::buf::AlignedBuf;

/// Start of the buffers, so that direct I/O needs no bounce.
pub(super) const BUFFER_ALIGN: usize = 4096;

pub(super) static READ: Command = Command {
    name: "read",
    aliases: &["r"],
    usage: "[-bCpqrv] [-P PATTERN [-s START] [-l LEN]] OFFSET LEN | --parts PARTS {--lba N [--count N] | OFFSET LEN}..",
    letters: "bCpqrvP:s:l:",
    words: sectors::WORDS,
    operands: 0..=usize::MAX,
    needs: Needs::Disk,
    about: "read a range, and show it or compare it with a pattern",
    help: "\
-b  the VM state instead of the disk (refused: not supported)
-C  report as bytes,operations,time,bytes/s,operations/s
-l  length of the part to compare, with -P
-p  no effect
-P  compare every byte with this one (0 to 255); where one differs, the exit code is 1
-q  no report, no dump
-r  no effect
-s  start of the part to compare, with -P, counted from OFFSET
-v  show the bytes
--parts PARTS  these parts of sectors: sync, header, subheader, data, edc, zero, ecc, all
--lba N  with --parts: from this sector on; repeatable
--count N  with --lba: so many sectors; 1 unless given

With --parts, OFFSET and LEN count bytes of whole sectors from the first of the disc on, whatever is
stored of them, and there may be several pairs. --parts may be given once, or for each of them.

Example: read -P 0xcd -v 4k 512
Example: read -v --parts edc,ecc --lba 16 --count 4",
    run: |session, parsed| match sectors::are_meant(parsed) {
        true => sectors::read(session, parsed, &READ),
        false => {
            READ.check_count(parsed, 2)?;
            read(session, parsed, &READ)
        }
    },
};

pub(super) static READV: Command = Command {
    name: "readv",
    aliases: &[],
    usage: "[-Cqrv] [-P PATTERN] OFFSET LEN [LEN..]",
    letters: "CqrvP:",
    words: &[],
    operands: 2..=usize::MAX,
    needs: Needs::Disk,
    about: "read a range given as several lengths",
    help: "\
-C  report as bytes,operations,time,bytes/s,operations/s
-P  compare every byte with this one (0 to 255); where one differs, the exit code is 1
-q  no report, no dump
-r  no effect
-v  show the bytes

The lengths follow each other on the disk.",
    run: |session, parsed| read(session, parsed, &READV),
};

pub(super) static AIO_READ: Command = Command {
    name: "aio_read",
    aliases: &[],
    usage: "[-Cqrv] [-P PATTERN] OFFSET LEN [LEN..]",
    letters: "CqrvP:",
    words: &[],
    operands: 2..=usize::MAX,
    needs: Needs::Disk,
    about: "the same as readv",
    help: "\
-C  report as bytes,operations,time,bytes/s,operations/s
-P  compare every byte with this one (0 to 255); where one differs, the exit code is 1
-q  no report, no dump
-r  no effect
-v  show the bytes

The read is complete when the command ends; aio_flush need not follow.",
    run: |session, parsed| read(session, parsed, &AIO_READ),
};

fn read(session: &mut Session, parsed: &Parsed, command: &Command) -> anyhow::Result<Outcome> {
    if parsed.has('b') {
        anyhow::bail!("read failed: -b is refused: VM state is not supported");
    }
    let at = parsed.size_at(0)?;
    let len = parsed.sizes_from(1)?;
    let expected = expected(parsed, len, command)?;
    let form = session.form(parsed);
    let dump = parsed.has('v') && !parsed.has('q');
    let (disk, out) = session.parts()?;
    let range = disk.range("read", at, len)?;
    let mut buf = AlignedBuf::new(clamp_len(len.min(STEP), usize::MAX), BUFFER_ALIGN);
    let mut time = Duration::ZERO;
    let mut outcome = Outcome::Done;
    for step in steps("read", range, STEP) {
        let step = step?;
        let buf = &mut buf[..clamp_len(step.end - step.start, usize::MAX)];
        let at_step = step.start;
        time += disk.submit("read", Request::Read { at: at_step, buf })?;
        if disk.spec.copies {
            disk.keep(buf, at_step)?;
        }
        if let Some(expected) = &expected
            && outcome == Outcome::Done
            && !expected.holds(buf, at_step - at)
        {
            outcome = Outcome::Differs;
            let (first, len) = (at.saturating_add(expected.part.start), expected.len());
            out.line(&format!(
                "Pattern verification failed at offset {first}, {len} bytes"
            ))?;
        }
        if dump {
            out.dump(buf, at_step)?;
        }
    }
    let report = Report {
        verb: "read",
        at,
        len,
        time,
    };
    report.print(out, form)?;
    Ok(outcome)
}

/// What `-P`, `-s` and `-l` say about a read of `len` bytes.
fn expected(parsed: &Parsed, len: u64, command: &Command) -> anyhow::Result<Option<Expected>> {
    let (start, count) = (parsed.size_of('s')?, parsed.size_of('l')?);
    let Some(byte) = parsed.value('P') else {
        if start.is_some() || count.is_some() {
            return Err(command.misused("-s and -l need -P"));
        }
        return Ok(None);
    };
    let byte = pattern::parse_byte(&byte.to_string_lossy())?;
    let start = start.unwrap_or(0);
    let end = match count {
        Some(count) => start.checked_add(count),
        None => Some(len),
    };
    match end.filter(|end| start <= *end && *end <= len) {
        Some(end) => Ok(Some(Expected {
            byte,
            part: start..end,
        })),
        None => anyhow::bail!("pattern verification range exceeds end of read data"),
    }
}

//! What changes the disk's bytes: `write`, `writev`, `aio_write`, `zero`, `discard`; and `flush`.

use std::path::Path;
use std::time::Duration;

use crate::backend::{Fallback, Request};
use crate::cli::cache::DiscardMode;
use crate::cli::io::args::Parsed;
use crate::cli::io::command::{Command, Needs, Outcome};
use crate::cli::io::disk::{Disk, FILL_STEP, WRITE_STEP, steps};
use crate::cli::io::pattern::{self, Bytes};
use crate::cli::io::read::BUFFER_ALIGN;
use crate::cli::io::report::Report;
use crate::cli::io::sectors;
use crate::cli::io::session::Session;
use crate::storage::Zeroing;
use crate::util::align::clamp_len;
use crate::util::buf::AlignedBuf;

pub(super) static WRITE: Command = Command {
    name: "write",
    aliases: &["w"],
    usage: "[-bcCfnpqruz] [-P PATTERN | -s FILE] OFFSET LEN | --parts PARTS {--lba N [--count N] | OFFSET LEN}..",
    letters: "bcCfnpqruzP:s:",
    words: sectors::WORDS,
    operands: 0..=usize::MAX,
    needs: Needs::Disk,
    about: "write a pattern, a file or zeroes to a range",
    help: "\
-b  the VM state instead of the disk (refused: not supported)
-c  compressed: whole clusters that are not allocated, or up to the end of the disk
-C  report as bytes,operations,time,bytes/s,operations/s
-f  durable when it completes (FUA)
-n  with -z, fail where zeroes would have to be written as data
-p  no effect
-P  write this byte (0 to 255) instead of 0xcd
-q  no report
-r  no effect
-s  write what this file, device or pipe holds, over and over
-u  with -z, give the space back where that reads as zeroes
-z  make the range read as zeroes, by metadata or holes where possible
--parts PARTS  these parts of sectors: sync, header, subheader, data, edc, zero, ecc, all
--lba N  with --parts: from this sector on; repeatable
--count N  with --lba: so many sectors; 1 unless given

With --parts, codes that are not among them are made anew for what was written. OFFSET and LEN count
bytes as for read.

Example: write -P 0xff 1M 64k
Example: write --parts data -s new.bin --lba 16 --count 4",
    run: |session, parsed| match sectors::are_meant(parsed) {
        true => sectors::write(session, parsed, &WRITE),
        false => {
            WRITE.check_count(parsed, 2)?;
            write(session, parsed, &WRITE)
        }
    },
};

pub(super) static WRITEV: Command = Command {
    name: "writev",
    aliases: &[],
    usage: "[-Cfqr] [-P PATTERN] OFFSET LEN [LEN..]",
    letters: "CfqrP:",
    words: &[],
    operands: 2..=usize::MAX,
    needs: Needs::Disk,
    about: "write a pattern to a range given as several lengths",
    help: "\
-C  report as bytes,operations,time,bytes/s,operations/s
-f  durable when it completes (FUA)
-P  write this byte (0 to 255) instead of 0xcd
-q  no report
-r  no effect

The lengths follow each other on the disk.",
    run: |session, parsed| write(session, parsed, &WRITEV),
};

pub(super) static AIO_WRITE: Command = Command {
    name: "aio_write",
    aliases: &[],
    usage: "[-Cfqruz] [-P PATTERN] OFFSET LEN [LEN..]",
    letters: "CfqruzP:",
    words: &[],
    operands: 2..=usize::MAX,
    needs: Needs::Disk,
    about: "the same as writev, and -z",
    help: "\
-C  report as bytes,operations,time,bytes/s,operations/s
-f  durable when it completes (FUA)
-P  write this byte (0 to 255) instead of 0xcd
-q  no report
-r  no effect
-u  with -z, give the space back where that reads as zeroes
-z  make the range read as zeroes, by metadata or holes where possible

The write is complete when the command ends; aio_flush need not follow.",
    run: |session, parsed| write(session, parsed, &AIO_WRITE),
};

pub(super) static ZERO: Command = Command {
    name: "zero",
    aliases: &[],
    usage: "[-Cfnqu] OFFSET LEN",
    letters: "Cfnqu",
    words: &[],
    operands: 2..=2,
    needs: Needs::Disk,
    about: "make a range read as zeroes: the same as write -z",
    help: "\
-C  report as bytes,operations,time,bytes/s,operations/s
-f  durable when it completes (FUA)
-n  fail where zeroes would have to be written as data
-q  no report
-u  give the space back where that reads as zeroes",
    run: zero,
};

pub(super) static DISCARD: Command = Command {
    name: "discard",
    aliases: &["d"],
    usage: "[-Cq] OFFSET LEN",
    letters: "Cq",
    words: &[],
    operands: 2..=2,
    needs: Needs::Disk,
    about: "give the space of a range back",
    help: "\
-C  report as bytes,operations,time,bytes/s,operations/s
-q  no report

Each byte reads afterwards as zero or as before.",
    run: discard,
};

pub(super) static FLUSH: Command = Command {
    name: "flush",
    aliases: &["f"],
    usage: "",
    letters: "",
    words: &[],
    operands: 0..=0,
    needs: Needs::Disk,
    about: "make completed writes durable",
    help: "",
    run: flush,
};

pub(super) static AIO_FLUSH: Command = Command {
    name: "aio_flush",
    aliases: &[],
    usage: "",
    letters: "",
    words: &[],
    operands: 0..=0,
    needs: Needs::Disk,
    about: "the same as flush",
    help: "Nothing is ever under way here: aio_read and aio_write are complete when they end.",
    run: flush,
};

fn write(session: &mut Session, parsed: &Parsed, command: &Command) -> anyhow::Result<Outcome> {
    if parsed.has('b') {
        anyhow::bail!("write failed: -b is refused: VM state is not supported");
    }
    let sources = ['z', 'P', 's'].map(|c| usize::from(parsed.has(c)));
    if sources.iter().sum::<usize>() > 1 {
        let all = "Only one of -z, -P, and -s can be specified at the same time";
        return Err(command.misused(all));
    }
    for option in ['u', 'n'] {
        if parsed.has(option) && !parsed.has('z') {
            return Err(command.misused(&format!("-{option} requires -z to be specified")));
        }
    }
    if parsed.has('c') && parsed.has('z') {
        return Err(command.misused("-c and -z cannot be specified at the same time"));
    }
    if parsed.has('c') && parsed.has('f') {
        return Err(command.misused("-f and -b or -c cannot be specified at the same time"));
    }
    if parsed.has('z') {
        return zero(session, parsed);
    }
    let (at, len) = (parsed.size_at(0)?, parsed.sizes_from(1)?);
    // Before a pipe is waited for.
    session.disk()?.range("write", at, len)?;
    let bytes = match (parsed.value('s'), parsed.value('P')) {
        (Some(path), _) => Bytes::from_file(Path::new(path), len)?,
        (None, Some(byte)) => Bytes::Same(pattern::parse_byte(&byte.to_string_lossy())?),
        (None, None) => Bytes::Same(pattern::DEFAULT),
    };
    let time = write_bytes(session.disk()?, parsed, &bytes, at, len)?;
    report(session, parsed, "wrote", at, len, time)
}

fn write_bytes(
    disk: &Disk,
    parsed: &Parsed,
    bytes: &Bytes,
    at: u64,
    len: u64,
) -> anyhow::Result<Duration> {
    let range = disk.range("write", at, len)?;
    if parsed.has('c') {
        disk.check_whole("write", &range)?;
    }
    let mut time = Duration::ZERO;
    if let (Bytes::Same(byte), false) = (bytes, parsed.has('c')) {
        for step in steps("write", range, FILL_STEP) {
            let request = Request::Fill {
                range: step?,
                byte: *byte,
                fua: disk.fua(parsed),
            };
            time += disk.submit("write", request)?;
        }
        return Ok(time);
    }
    let mut buf = AlignedBuf::new(clamp_len(len.min(WRITE_STEP), usize::MAX), BUFFER_ALIGN);
    for step in steps("write", range, WRITE_STEP) {
        let step = step?;
        let buf = &mut buf[..clamp_len(step.end - step.start, usize::MAX)];
        bytes.fill(buf, step.start - at)?;
        let request = match parsed.has('c') {
            true => Request::Compress {
                at: step.start,
                buf,
            },
            false => Request::Write {
                at: step.start,
                buf,
                fua: disk.fua(parsed),
            },
        };
        time += disk.submit("write", request)?;
    }
    Ok(time)
}

fn zero(session: &mut Session, parsed: &Parsed) -> anyhow::Result<Outcome> {
    let (at, len) = (parsed.size_at(0)?, parsed.sizes_from(1)?);
    let disk = session.disk()?;
    let range = disk.range("write", at, len)?;
    let how = match parsed.has('u') && disk.spec.discard == DiscardMode::Unmap {
        true => Zeroing::MayUnmap,
        false => Zeroing::KeepSpace,
    };
    let fallback = match parsed.has('n') {
        true => Fallback::Refuse,
        false => Fallback::Write,
    };
    let request = Request::Zero {
        range,
        how,
        fallback,
        fua: disk.fua(parsed),
    };
    let time = disk.submit("write", request)?;
    report(session, parsed, "wrote", at, len, time)
}

fn discard(session: &mut Session, parsed: &Parsed) -> anyhow::Result<Outcome> {
    let (at, len) = (parsed.size_at(0)?, parsed.size_at(1)?);
    let disk = session.disk()?;
    let mut range = disk.range("discard", at, len)?;
    if disk.spec.discard == DiscardMode::Ignore {
        // Still a request, so that a read-only disk refuses it.
        range.end = range.start;
    }
    let time = disk.submit("discard", Request::Discard { range })?;
    report(session, parsed, "discard", at, len, time)
}

fn flush(session: &mut Session, _parsed: &Parsed) -> anyhow::Result<Outcome> {
    session.disk()?.flush()?;
    Ok(Outcome::Done)
}

fn report(
    session: &mut Session,
    parsed: &Parsed,
    verb: &'static str,
    at: u64,
    len: u64,
    time: Duration,
) -> anyhow::Result<Outcome> {
    let form = session.form(parsed);
    let report = Report {
        verb,
        at,
        len,
        time,
    };
    report.print(&mut session.out, form)?;
    Ok(Outcome::Done)
}

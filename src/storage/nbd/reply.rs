//! Replies of a server, none of which is believed.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;

use crate::error::{Error, ErrorKind};
use crate::nbd::Link;
use crate::nbd::socket::Until;
use crate::nbd::wire::{
    EXTENDED_REPLY, Fields, Headers, SIMPLE_REPLY, STRUCTURED_REPLY, chunk, errno,
};
use crate::storage::nbd::connection::{Failure, Op, broken};
use crate::storage::nbd::negotiate::{Facts, violation};
use crate::util::align::{clamp_len, len64};
use crate::util::text::printable;

/// Longest chunk that tells of a failure.
const MAX_ERROR: u64 = 8 << 10;
/// Longest chunk with extents.
const MAX_STATUS: u64 = 16 << 20;
/// Most extents that are kept of one reply.
const MAX_EXTENTS: usize = 64 << 10;
/// Most chunks of one reply.
const MAX_CHUNKS: u32 = 1 << 20;
/// Bytes of extents looked at at a time; a multiple of both sizes of an extent.
const STEP: usize = 4096;

/// The header of a reply, or of a chunk of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) cookie: u64,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Simple { errno: u32 },
    Chunk { flags: u16, kind: u16, len: u64 },
}

/// Reads a header.
pub(super) fn header(link: &Link, headers: Headers, until: Until) -> Result<Header, Failure> {
    let mut bytes = [0; 32];
    read(link, &mut bytes[..4], until)?;
    let magic = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    let len = match (magic, headers) {
        (SIMPLE_REPLY, Headers::Simple | Headers::Structured) => 16,
        (STRUCTURED_REPLY, Headers::Structured) => 20,
        (EXTENDED_REPLY, Headers::Extended) => 32,
        _ => return Err(wrong("what should be a reply is none")),
    };
    read(link, &mut bytes[4..len], until)?;
    let mut fields = Fields::new(&bytes[4..len]);
    let decoded = match magic {
        SIMPLE_REPLY => decode_simple(&mut fields),
        _ => decode_chunk(&mut fields, headers),
    };
    decoded.ok_or_else(|| wrong("a reply that is too short"))
}

fn decode_simple(fields: &mut Fields<'_>) -> Option<Header> {
    let kind = Kind::Simple {
        errno: fields.u32()?,
    };
    let cookie = fields.u64()?;
    Some(Header { cookie, kind })
}

fn decode_chunk(fields: &mut Fields<'_>, headers: Headers) -> Option<Header> {
    let (flags, kind, cookie) = (fields.u16()?, fields.u16()?, fields.u64()?);
    let len = match headers {
        Headers::Extended => {
            let _offset = fields.u64()?;
            fields.u64()?
        }
        _ => fields.u32()?.into(),
    };
    let kind = Kind::Chunk { flags, kind, len };
    Some(Header { cookie, kind })
}

/// What has come of one reply.
#[derive(Debug, Default)]
pub(super) struct Progress {
    bytes: u64,
    chunks: u32,
    told: bool,
    failure: Option<(u32, String)>,
}

impl Progress {
    /// Takes in what follows a header; true: the reply is complete.
    pub(super) fn take(
        &mut self,
        header: &Header,
        op: &mut Op<'_>,
        link: &Link,
        facts: &Facts,
        until: Until,
    ) -> Result<bool, Failure> {
        self.chunks += 1;
        let is_last = match header.kind {
            Kind::Simple { errno } => {
                self.simple(errno, op, link, facts, until)?;
                true
            }
            Kind::Chunk { flags, kind, len } => {
                self.chunk(kind, len, op, link, facts, until)?;
                flags & chunk::DONE != 0
            }
        };
        if is_last {
            self.check_complete(op)?;
        } else if self.chunks >= MAX_CHUNKS {
            return Err(wrong("a reply without end"));
        }
        Ok(is_last)
    }

    fn simple(
        &mut self,
        errno: u32,
        op: &mut Op<'_>,
        link: &Link,
        facts: &Facts,
        until: Until,
    ) -> Result<(), Failure> {
        if self.chunks > 1 {
            return Err(wrong("a simple reply after a chunk"));
        }
        if errno != 0 {
            self.failure = Some((errno, String::new()));
            return Ok(());
        }
        match op {
            Op::Read { buf, .. } if facts.headers == Headers::Simple => {
                self.bytes = len64(buf.len());
                read(link, buf, until)
            }
            Op::Read { .. } | Op::Status { .. } => {
                Err(wrong("a simple reply where one in chunks belongs"))
            }
            _ => Ok(()),
        }
    }

    fn chunk(
        &mut self,
        kind: u16,
        len: u64,
        op: &mut Op<'_>,
        link: &Link,
        facts: &Facts,
        until: Until,
    ) -> Result<(), Failure> {
        match (kind, op) {
            (chunk::NONE, _) if len == 0 => Ok(()),
            (chunk::DATA, Op::Read { at, buf }) if len > 8 => {
                let part = self.part(*at, buf, read_u64(link, until)?, len - 8)?;
                read(link, part, until)
            }
            (chunk::HOLE, Op::Read { at, buf }) if len == 12 => {
                let start = read_u64(link, until)?;
                let len = read_u32(link, until)?;
                self.part(*at, buf, start, len.into())?.fill(0);
                Ok(())
            }
            (
                chunk::STATUS | chunk::STATUS_EXTENDED,
                Op::Status {
                    len: asked, found, ..
                },
            ) => {
                let wide = kind == chunk::STATUS_EXTENDED;
                if wide != (facts.headers == Headers::Extended) || self.told {
                    return Err(wrong("extents of another kind, or told twice"));
                }
                self.told = true;
                extents(wide, len, *asked, found, link, facts, until)
            }
            (kind, _) if kind & chunk::IS_ERROR != 0 => self.error(len, link, until),
            (kind, _) => Err(wrong(&format!("a chunk of type {kind} and {len} bytes"))),
        }
    }

    /// The part of the buffer that a chunk fills.
    fn part<'b>(
        &mut self,
        at: u64,
        buf: &'b mut [u8],
        start: u64,
        len: u64,
    ) -> Result<&'b mut [u8], Failure> {
        let first = start.checked_sub(at);
        let inside = first.and_then(|first| Some(first..first.checked_add(len)?));
        let inside = inside.filter(|part| len > 0 && part.end <= len64(buf.len()));
        let Some(part) = inside else {
            return Err(wrong("bytes that were not asked for"));
        };
        self.bytes = self.bytes.saturating_add(len);
        let start = clamp_len(part.start, buf.len());
        let end = clamp_len(part.end, buf.len());
        Ok(&mut buf[start..end])
    }

    fn error(&mut self, len: u64, link: &Link, until: Until) -> Result<(), Failure> {
        if !(6..=MAX_ERROR).contains(&len) {
            return Err(wrong(&format!("a failure told in {len} bytes")));
        }
        let mut payload = vec![0; clamp_len(len, usize::MAX)];
        read(link, &mut payload, until)?;
        let mut fields = Fields::new(&payload);
        let (errno, text) = (fields.u32(), fields.u16());
        let text = text.and_then(|len| fields.bytes(usize::from(len)));
        let (Some(errno), Some(text)) = (errno, text) else {
            return Err(wrong("a failure whose text is cut off"));
        };
        let text = printable(OsStr::from_bytes(text));
        self.failure.get_or_insert((errno, text));
        Ok(())
    }

    fn check_complete(&self, op: &Op<'_>) -> Result<(), Failure> {
        match op {
            _ if self.failure.is_some() => Ok(()),
            Op::Read { buf, .. } if self.bytes != len64(buf.len()) => Err(wrong(&format!(
                "{} bytes, where {} were asked for",
                self.bytes,
                buf.len()
            ))),
            Op::Status { .. } if !self.told => Err(wrong("a reply without extents")),
            _ => Ok(()),
        }
    }

    /// How the request went, after the reply is complete.
    pub(super) fn result(self) -> Result<(), Failure> {
        let Some((code, text)) = self.failure else {
            return Ok(());
        };
        let said = match text.is_empty() {
            true => String::new(),
            false => format!(": '{text}'"),
        };
        let host = match code {
            errno::PERM => libc::EPERM,
            errno::NOMEM => libc::ENOMEM,
            errno::INVAL => libc::EINVAL,
            errno::NOSPC => libc::ENOSPC,
            errno::OVERFLOW => libc::EOVERFLOW,
            errno::NOTSUP => libc::EOPNOTSUPP,
            errno::SHUTDOWN => {
                let text = format!("the server is about to end{said}");
                return Err(Failure::Lost(Error::new(ErrorKind::Io, text)));
            }
            // What is not known is an I/O error.
            _ => libc::EIO,
        };
        let cause = io::Error::from_raw_os_error(host);
        let doing = format!("do that: the server failed{said}");
        Err(Failure::Refused(Error::io(doing, cause)))
    }
}

/// Reads extents up to the end of what was asked for, and passes over what is too much.
fn extents(
    wide: bool,
    len: u64,
    asked: u64,
    found: &mut Vec<(u64, u32)>,
    link: &Link,
    facts: &Facts,
    until: Until,
) -> Result<(), Failure> {
    let (fixed, each) = if wide { (8, 16) } else { (4, 8) };
    let body = len.checked_sub(fixed).filter(|b| b % each == 0 && *b > 0);
    let Some(body) = body.filter(|b| *b <= MAX_STATUS) else {
        return Err(wrong(&format!("extents in {len} bytes")));
    };
    if Some(read_u32(link, until)?) != facts.context {
        return Err(wrong("a metadata context that was not chosen"));
    }
    if wide && u64::from(read_u32(link, until)?) != body / each {
        return Err(wrong("another number of extents than it says"));
    }
    found.clear();
    let mut covered = 0u64;
    let mut left = body;
    let mut buf = [0; STEP];
    while left > 0 {
        let piece = &mut buf[..clamp_len(left, STEP)];
        read(link, piece, until)?;
        left -= len64(piece.len());
        let mut fields = Fields::new(piece);
        while !fields.rest().is_empty() {
            let (len, flags) = match wide {
                true => (fields.u64(), fields.u64()),
                false => (fields.u32().map(Into::into), fields.u32().map(Into::into)),
            };
            let (Some(len), Some(flags)) = (len, flags) else {
                return Err(wrong("an extent that is cut off"));
            };
            if len == 0 {
                return Err(wrong("an extent of no bytes"));
            }
            if covered < asked && found.len() < MAX_EXTENTS {
                // Flags of other bits are of no use to us.
                let flags = u32::try_from(flags & u64::from(u32::MAX)).unwrap_or(0);
                found.push((len.min(asked - covered), flags));
            }
            covered = covered.saturating_add(len);
        }
    }
    Ok(())
}

fn wrong(what: &str) -> Failure {
    Failure::Lost(violation(what))
}

fn read(link: &Link, buf: &mut [u8], until: Until) -> Result<(), Failure> {
    link.read_exact(buf, until)
        .map_err(|e| Failure::Lost(broken(e)))
}

fn read_u64(link: &Link, until: Until) -> Result<u64, Failure> {
    let mut bytes = [0; 8];
    read(link, &mut bytes, until)?;
    Ok(u64::from_be_bytes(bytes))
}

fn read_u32(link: &Link, until: Until) -> Result<u32, Failure> {
    let mut bytes = [0; 4];
    read(link, &mut bytes, until)?;
    Ok(u32::from_be_bytes(bytes))
}

//! Agreeing with a server on an export.

use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::nbd::Link;
use crate::nbd::socket::{Socket, Until};
use crate::nbd::tls;
use crate::nbd::wire::{
    Fields, GREETING, Headers, MAX_PAYLOAD, OLDSTYLE, OPTION, OPTION_REPLY, answer, handshake,
    info, option, put_string,
};
use crate::util::align::clamp_len;
use crate::util::text::printable;

/// Longest answer to an option.
const MAX_ANSWER: u32 = 64 << 10;
/// Most answers to one option.
const MAX_ANSWERS: usize = 1024;
/// Block sizes of a server that tells none.
const DEFAULT_MIN: u32 = 1;
/// Largest smallest block size that the protocol allows.
const MAX_MIN: u32 = 64 << 10;

/// What is known of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) size: u64,
    /// Transmission flags.
    pub(super) flags: u16,
    /// Requests start and end at multiples of this.
    pub(super) min: u32,
    /// Longest read or write.
    pub(super) max: u32,
    pub(super) headers: Headers,
    /// The number of the metadata context that was asked for.
    pub(super) context: Option<u32>,
}

impl Facts {
    pub(super) fn tells_extents(&self) -> bool {
        self.context.is_some()
    }

    /// What is otherwise in `now`, each with what it was before.
    pub(super) fn changes(&self, now: &Self) -> Vec<String> {
        let mut changes = Vec::new();
        let mut note = |is_same: bool, text: String| {
            if !is_same {
                changes.push(text);
            }
        };
        let extents = |facts: &Self| match facts.context {
            None => "not told".to_owned(),
            Some(id) => format!("told under number {id}"),
        };
        let (old, size) = (self.size, now.size);
        note(old == size, format!("it has {size} bytes (before: {old})"));
        let (old, flags) = (self.flags, now.flags);
        note(
            old == flags,
            format!("its flags are {flags:#x} (before: {old:#x})"),
        );
        let (old, min) = (self.min, now.min);
        note(
            old == min,
            format!("its smallest block is {min} bytes (before: {old})"),
        );
        let (old, max) = (self.max, now.max);
        note(
            old == max,
            format!("its longest transfer is {max} bytes (before: {old})"),
        );
        let (old, headers) = (self.headers, now.headers);
        note(
            old == headers,
            format!("its replies are {headers:?} (before: {old:?})"),
        );
        let (old, context) = (extents(self), extents(now));
        note(
            old == context,
            format!("its extents are {context} (before: {old})"),
        );
        changes
    }

    /// How far one request for extents may look, of `left` bytes.
    pub(super) fn longest_status(&self, left: u64) -> u64 {
        match self.headers {
            Headers::Extended => left,
            _ => left.min(u64::from(u32::MAX - (MAX_MIN - 1))),
        }
    }
}

/// A connection that both sides agreed on.
#[derive(Debug)]
pub(super) struct Agreed {
    pub(super) link: Link,
    pub(super) facts: Facts,
}

/// One answer to an option.
struct Answer {
    kind: u32,
    data: Vec<u8>,
}

struct Client<'a> {
    link: Link,
    until: Until,
    export: &'a str,
}

/// Talks to a server until it agrees to serve `export`, and to tell of `context` where it can.
pub(super) fn negotiate(
    socket: Socket,
    export: &str,
    context: &str,
    tls: Option<&tls::Client>,
    until: Until,
) -> Result<Agreed> {
    let mut client = Client {
        link: Link::plain(Arc::new(socket)),
        until,
        export,
    };
    let padding = client.greet()?;
    if let Some(tls) = tls {
        client.start_tls(tls)?;
    }
    let headers = match client.ask(option::EXTENDED_HEADERS)? {
        true => Headers::Extended,
        false if client.ask(option::STRUCTURED_REPLY)? => Headers::Structured,
        false => Headers::Simple,
    };
    let mut facts = Facts {
        size: 0,
        flags: 0,
        min: DEFAULT_MIN,
        max: MAX_PAYLOAD,
        headers,
        context: match headers {
            Headers::Simple => None,
            Headers::Structured | Headers::Extended => client.context(context)?,
        },
    };
    if !client.go(&mut facts)? {
        client.export_name(&mut facts, padding)?;
    }
    check(&facts)?;
    Ok(Agreed {
        link: client.link,
        facts,
    })
}

fn check(facts: &Facts) -> Result<()> {
    if i64::try_from(facts.size).is_err() {
        return Err(violation(&format!("an export of {} bytes", facts.size)));
    }
    if !facts.min.is_power_of_two() || facts.min > MAX_MIN || facts.max < facts.min {
        return Err(violation(&format!(
            "block sizes from {} to {}",
            facts.min, facts.max
        )));
    }
    Ok(())
}

/// What a server must not do.
pub(super) fn violation(what: &str) -> Error {
    Error::corrupt(format!("the server violates the protocol: {what}"))
}

fn lost(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::InvalidData => Error::io("talk to the server", error),
        io::ErrorKind::UnexpectedEof => Error::new(
            ErrorKind::Io,
            "the server ended the connection during the handshake",
        ),
        io::ErrorKind::TimedOut => Error::new(ErrorKind::Io, "the server does not answer in time"),
        _ => Error::io("talk to the server", error),
    }
}

impl Client<'_> {
    /// Whether answers to `EXPORT_NAME` are padded.
    fn greet(&mut self) -> Result<bool> {
        let mut greeting = [0; 18];
        self.read(&mut greeting[..16])?;
        let mut fields = Fields::new(&greeting);
        match (fields.u64(), fields.u64()) {
            (Some(GREETING), Some(OPTION)) => {}
            (Some(GREETING), Some(OLDSTYLE)) => {
                return Err(Error::unsupported(
                    "the server speaks the oldstyle protocol, which has no names of exports",
                ));
            }
            _ => return Err(violation("it does not greet as an NBD server")),
        }
        self.read(&mut greeting[16..])?;
        let flags = u16::from_be_bytes([greeting[16], greeting[17]]);
        if flags & handshake::FIXED_NEWSTYLE == 0 {
            return Err(Error::unsupported(
                "the server does not answer options (fixed newstyle is needed)",
            ));
        }
        let ours = flags & (handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        self.send(&u32::from(ours).to_be_bytes())?;
        Ok(ours & handshake::NO_ZEROES == 0)
    }

    fn start_tls(&mut self, tls: &tls::Client) -> Result<()> {
        if !self.ask(option::STARTTLS)? {
            return Err(Error::new(
                ErrorKind::Permission,
                "the server has no TLS, which the URI asks for",
            ));
        }
        let secured = self.link.secure(tls.session()?, self.until);
        secured.map_err(|e| Error::io("set up TLS", e))
    }

    /// Asks for an option without data; false: the server does not have it.
    fn ask(&mut self, number: u32) -> Result<bool> {
        self.option(number, &[])?;
        let answer = self.answer(number)?;
        match answer.kind {
            answer::ACK => Ok(true),
            answer::TLS_REQUIRED | answer::SHUTDOWN => Err(self.refusal(&answer)),
            kind if kind & answer::ERROR != 0 => Ok(false),
            kind => Err(violation(&format!("answer {kind} to option {number}"))),
        }
    }

    /// Chooses a metadata context; its number, where the server has it.
    fn context(&mut self, context: &str) -> Result<Option<u32>> {
        let number = option::SET_META_CONTEXT;
        let mut data = Vec::new();
        put_string(&mut data, self.export);
        data.extend(1u32.to_be_bytes());
        put_string(&mut data, context);
        self.option(number, &data)?;
        let mut chosen = None;
        for _ in 0..MAX_ANSWERS {
            let answer = self.answer(number)?;
            let mut fields = Fields::new(&answer.data);
            match answer.kind {
                answer::ACK => return Ok(chosen),
                answer::META_CONTEXT => match (fields.u32(), fields.rest()) {
                    (Some(id), name) if name == context.as_bytes() => chosen = Some(id),
                    _ => return Err(violation("a metadata context that was not asked for")),
                },
                answer::TLS_REQUIRED | answer::SHUTDOWN => return Err(self.refusal(&answer)),
                kind if kind & answer::ERROR != 0 => return Ok(None),
                kind => return Err(violation(&format!("answer {kind} to a query of contexts"))),
            }
        }
        Err(violation("endless answers"))
    }

    /// Begins with the export; false: the server knows no `GO`.
    fn go(&mut self, facts: &mut Facts) -> Result<bool> {
        let mut data = Vec::new();
        put_string(&mut data, self.export);
        data.extend(1u16.to_be_bytes());
        data.extend(info::BLOCK_SIZE.to_be_bytes());
        self.option(option::GO, &data)?;
        let mut told = false;
        for _ in 0..MAX_ANSWERS {
            let answer = self.answer(option::GO)?;
            match answer.kind {
                answer::INFO => told |= fact(&answer.data, facts)?,
                answer::ACK if told => return Ok(true),
                answer::ACK => return Err(violation("an export without a size")),
                answer::UNSUPPORTED => return Ok(false),
                kind if kind & answer::ERROR != 0 => return Err(self.refusal(&answer)),
                kind => return Err(violation(&format!("answer {kind} to GO"))),
            }
        }
        Err(violation("endless answers"))
    }

    fn export_name(&mut self, facts: &mut Facts, padding: bool) -> Result<()> {
        self.option(option::EXPORT_NAME, self.export.as_bytes())?;
        let mut reply = [0; 10 + 124];
        let len = if padding { reply.len() } else { 10 };
        match self.link.read_exact(&mut reply[..len], self.until) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Err(self.unknown()),
            read => {
                read.map_err(lost)?;
                let mut fields = Fields::new(&reply);
                facts.size = fields.u64().unwrap_or_default();
                facts.flags = fields.u16().unwrap_or_default();
                Ok(())
            }
        }
    }

    fn unknown(&self) -> Error {
        let text = format!("the server has no export '{}'", printable(self.export));
        Error::new(ErrorKind::NotFound, text)
    }

    fn refusal(&self, answer: &Answer) -> Error {
        let (kind, text) = match answer.kind {
            answer::UNKNOWN => return self.unknown(),
            answer::TLS_REQUIRED => (
                ErrorKind::Permission,
                "the server wants TLS (nbds:// in the URI)",
            ),
            answer::POLICY => (ErrorKind::Permission, "the server refuses"),
            answer::SHUTDOWN => (ErrorKind::Locked, "the server takes no more clients"),
            answer::BLOCK_SIZE_REQUIRED => (ErrorKind::Unsupported, "the server refuses"),
            _ => (ErrorKind::Io, "the server refuses"),
        };
        let said = OsStr::from_bytes(&answer.data);
        let text = match said.is_empty() {
            true => text.to_owned(),
            false => format!("{text}: '{}'", printable(said)),
        };
        Error::new(kind, text)
    }

    fn option(&mut self, number: u32, data: &[u8]) -> Result<()> {
        let mut message = Vec::with_capacity(16 + data.len());
        message.extend(OPTION.to_be_bytes());
        message.extend(number.to_be_bytes());
        let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
        message.extend(len.to_be_bytes());
        message.extend(data);
        self.send(&message)
    }

    fn answer(&mut self, number: u32) -> Result<Answer> {
        let mut header = [0; 20];
        self.read(&mut header)?;
        let mut fields = Fields::new(&header);
        if fields.u64() != Some(OPTION_REPLY) {
            return Err(violation("what should be an answer to an option is none"));
        }
        let (of, kind, len) = (fields.u32(), fields.u32(), fields.u32());
        let (Some(of), Some(kind), Some(len)) = (of, kind, len) else {
            return Err(violation("an answer that is too short"));
        };
        if of != number {
            return Err(violation(&format!(
                "an answer to option {of}, where {number} was sent"
            )));
        }
        if len > MAX_ANSWER {
            return Err(violation(&format!(
                "an answer of {len} bytes (allowed: {MAX_ANSWER})"
            )));
        }
        let mut data = vec![0; clamp_len(len.into(), usize::MAX)];
        self.read(&mut data)?;
        Ok(Answer { kind, data })
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<()> {
        self.link.read_exact(buf, self.until).map_err(lost)
    }

    fn send(&mut self, bytes: &[u8]) -> Result<()> {
        let sent = self.link.write_all(&mut [IoSlice::new(bytes)], self.until);
        sent.map_err(lost)
    }
}

/// Takes note of one fact; true: it was the size.
fn fact(data: &[u8], facts: &mut Facts) -> Result<bool> {
    let mut fields = Fields::new(data);
    let short = || violation("a fact that is too short");
    match fields.u16().ok_or_else(short)? {
        info::EXPORT => {
            facts.size = fields.u64().ok_or_else(short)?;
            facts.flags = fields.u16().ok_or_else(short)?;
            Ok(true)
        }
        info::BLOCK_SIZE => {
            facts.min = fields.u32().ok_or_else(short)?;
            let _preferred = fields.u32().ok_or_else(short)?;
            facts.max = fields.u32().ok_or_else(short)?;
            Ok(false)
        }
        _ => Ok(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_export_that_changed_tells_what_did_and_what_it_was() {
        let before = Facts {
            size: 4096,
            flags: 1,
            min: 1,
            max: 1 << 20,
            headers: Headers::Simple,
            context: None,
        };
        assert_eq!(before.changes(&before), Vec::<String>::new());
        let now = Facts {
            size: 8192,
            context: Some(1),
            ..before
        };
        let told = before.changes(&now);
        assert_eq!(told[0], "it has 8192 bytes (before: 4096)");
        assert!(told[1].starts_with("its extents are told"), "{told:?}");
        let now = Facts {
            flags: 3,
            min: 512,
            max: 4096,
            headers: Headers::Structured,
            ..before
        };
        for (text, part) in before
            .changes(&now)
            .iter()
            .zip(["0x3", "512", "4096", "Structured"])
        {
            assert!(text.contains(part), "{text}");
        }
    }
}

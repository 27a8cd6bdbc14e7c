//! Agreeing with a client on an export.

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::time::Instant;

use crate::nbd::Link;
use crate::nbd::socket::Until;
use crate::nbd::wire::{
    Fields, GREETING, Headers, OPTION, OPTION_REPLY, answer, handshake, option,
};
use crate::server::nbd::guests::Presence;
use crate::server::nbd::option as offer;
use crate::server::nbd::server::{Served, Shared};
use crate::server::nbd::status::Context;
use crate::util::align::{clamp_len, len64};

/// Longest option that is looked at; of metadata contexts there may be many.
const MAX_OPTION: u32 = 64 << 10;
/// Longest option that is passed over; a longer one is no option.
const MAX_SKIPPED: u32 = 16 << 20;
/// Most options of one client.
const MAX_OPTIONS: usize = 4096;
/// Zeroes that old clients want after the answer to `EXPORT_NAME`.
const PADDING: [u8; 124] = [0; 124];

/// What client and server agreed on.
#[derive(Debug)]
pub(super) struct Agreed {
    pub(super) export: Arc<Served>,
    pub(super) headers: Headers,
    pub(super) contexts: Vec<Context>,
}

/// One client's handshake.
pub(super) struct Handshake<'a> {
    shared: &'a Shared,
    link: &'a mut Link,
    until: Until,
    /// Without a place all options are refused.
    presence: &'a mut Presence,
    padding: bool,
    headers: Headers,
    /// The export whose contexts were chosen, and they.
    contexts: Option<(Arc<Served>, Vec<Context>)>,
}

/// What follows an option.
enum Next {
    Option,
    Transmission(Agreed),
    End,
}

impl<'a> Handshake<'a> {
    pub(super) fn new(
        shared: &'a Shared,
        link: &'a mut Link,
        until: Until,
        presence: &'a mut Presence,
    ) -> Self {
        Self {
            shared,
            link,
            until,
            presence,
            padding: true,
            headers: Headers::Simple,
            contexts: None,
        }
    }

    /// Talks until they agree; `None`: the client left, or was sent away.
    ///
    /// # Errors
    /// The host's; `TimedOut`; `InvalidData` for what is no handshake.
    pub(super) fn run(mut self) -> io::Result<Option<Agreed>> {
        let mut greeting = Vec::with_capacity(18);
        greeting.extend(GREETING.to_be_bytes());
        greeting.extend(OPTION.to_be_bytes());
        greeting.extend((handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES).to_be_bytes());
        self.send(&greeting)?;
        let mut flags = [0; 4];
        self.link.read_exact(&mut flags, self.until)?;
        let flags = u32::from_be_bytes(flags);
        let known = u32::from(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        if flags & !known != 0 {
            return Err(invalid("client flags that are not known"));
        }
        self.padding = flags & u32::from(handshake::NO_ZEROES) == 0;
        for _ in 0..MAX_OPTIONS {
            match self.option()? {
                Next::Option => {}
                Next::Transmission(agreed) => return Ok(Some(agreed)),
                Next::End => return Ok(None),
            }
        }
        Err(invalid("too many options"))
    }

    fn option(&mut self) -> io::Result<Next> {
        let mut header = [0; 16];
        self.link.read_exact(&mut header, self.until)?;
        let mut fields = Fields::new(&header);
        let (magic, number, len) = (fields.u64(), fields.u32(), fields.u32());
        let (Some(OPTION), Some(number), Some(len)) = (magic, number, len) else {
            return Err(invalid("no option"));
        };
        if len > MAX_OPTION {
            self.skip(len)?;
            self.refuse(number, answer::TOO_BIG, "the option is too long")?;
            return Ok(Next::Option);
        }
        let mut data = vec![0; clamp_len(len.into(), usize::MAX)];
        self.link.read_exact(&mut data, self.until)?;
        if !self.presence.has_place() && !self.find_place(number) {
            return self.turn_away(number);
        }
        if self.shared.tls.is_some() && !self.link.is_secure() {
            return self.insecure(number, &data);
        }
        match number {
            option::EXPORT_NAME => return self.export_name(&data),
            option::ABORT => return self.abort(),
            option::GO => return self.go(number, &data),
            option::INFO => {
                self.go(number, &data)?;
            }
            option::LIST => self.list(&data)?,
            option::STARTTLS if self.link.is_secure() => {
                self.refuse(number, answer::INVALID, "TLS is there already")?;
            }
            option::STARTTLS => self.refuse(number, answer::POLICY, "TLS is not set up here")?,
            option::STRUCTURED_REPLY => self.raise(number, &data, Headers::Structured)?,
            option::EXTENDED_HEADERS => self.raise(number, &data, Headers::Extended)?,
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta(number, &data)?,
            _ => self.refuse(number, answer::UNSUPPORTED, "the option is not known")?,
        }
        Ok(Next::Option)
    }

    /// Before TLS, where it is required.
    fn insecure(&mut self, number: u32, data: &[u8]) -> io::Result<Next> {
        match (number, &self.shared.tls) {
            (option::ABORT, _) => return self.abort(),
            // Has no answer that could say so.
            (option::EXPORT_NAME, _) => return Ok(Next::End),
            (option::STARTTLS, Some(tls)) if data.is_empty() => {
                let session = tls.session().map_err(io::Error::other)?;
                self.acknowledge(number)?;
                self.link.secure(session, self.until)?;
            }
            (option::STARTTLS, _) => self.refuse(number, answer::INVALID, "it has no data")?,
            _ => self.refuse(number, answer::TLS_REQUIRED, "TLS comes first")?,
        }
        Ok(Next::Option)
    }

    /// Gets a place for the client after all, where others make room; it has as much time to agree
    /// as they had.
    fn find_place(&mut self, number: u32) -> bool {
        let found = number != option::ABORT && self.presence.await_place();
        if found {
            self.until = Instant::now().checked_add(self.shared.options.handshake);
        }
        found
    }

    fn turn_away(&mut self, number: u32) -> io::Result<Next> {
        match number {
            option::ABORT => return self.abort(),
            option::EXPORT_NAME => {}
            _ => self.refuse(
                number,
                answer::SHUTDOWN,
                "too many clients; try again later",
            )?,
        }
        Ok(Next::End)
    }

    fn abort(&mut self) -> io::Result<Next> {
        // The client may be gone already.
        let _ = self.acknowledge(option::ABORT);
        Ok(Next::End)
    }

    fn export_name(&mut self, data: &[u8]) -> io::Result<Next> {
        let found = std::str::from_utf8(data)
            .ok()
            .and_then(|n| self.shared.find(n));
        let Some(export) = found else {
            return Ok(Next::End);
        };
        let mut reply = Vec::with_capacity(10 + PADDING.len());
        reply.extend(export.size().to_be_bytes());
        reply.extend(export.flags(self.headers).to_be_bytes());
        if self.padding {
            reply.extend(PADDING);
        }
        self.send(&reply)?;
        Ok(self.agree(export))
    }

    fn agree(&mut self, export: Arc<Served>) -> Next {
        let contexts = match self.contexts.take() {
            Some((of, contexts)) if Arc::ptr_eq(&of, &export) => contexts,
            _ => Vec::new(),
        };
        Next::Transmission(Agreed {
            export,
            headers: self.headers,
            contexts,
        })
    }

    fn list(&mut self, data: &[u8]) -> io::Result<()> {
        if !data.is_empty() {
            return self.refuse(option::LIST, answer::INVALID, "it has no data");
        }
        for export in &self.shared.exports {
            self.answer(option::LIST, answer::SERVER, &offer::listed(export))?;
        }
        self.acknowledge(option::LIST)
    }

    fn raise(&mut self, number: u32, data: &[u8], to: Headers) -> io::Result<()> {
        if !data.is_empty() {
            return self.refuse(number, answer::INVALID, "it has no data");
        }
        if self.headers == Headers::Extended {
            let (code, text) = match to {
                Headers::Extended => (answer::INVALID, "extended headers are there already"),
                _ => (
                    answer::EXTENDED_HEADERS_REQUIRED,
                    "extended headers were chosen",
                ),
            };
            return self.refuse(number, code, text);
        }
        self.headers = to;
        self.acknowledge(number)
    }

    fn go(&mut self, number: u32, data: &[u8]) -> io::Result<Next> {
        let Some(wanted) = offer::Wanted::decode(data) else {
            self.refuse(number, answer::INVALID, "its length or its text is wrong")?;
            return Ok(Next::Option);
        };
        let Some(export) = self.shared.find(wanted.name) else {
            self.refuse(number, answer::UNKNOWN, "there is no such export")?;
            return Ok(Next::Option);
        };
        for fact in offer::facts(&export, &wanted, self.headers) {
            self.answer(number, answer::INFO, &fact)?;
        }
        self.acknowledge(number)?;
        match number {
            option::GO => Ok(self.agree(export)),
            _ => Ok(Next::Option),
        }
    }

    fn meta(&mut self, number: u32, data: &[u8]) -> io::Result<()> {
        if number == option::SET_META_CONTEXT {
            self.contexts = None;
        }
        if self.headers == Headers::Simple {
            return self.refuse(number, answer::INVALID, "structured replies come first");
        }
        let Some((name, queries)) = offer::decode_queries(data) else {
            return self.refuse(number, answer::INVALID, "its length or its text is wrong");
        };
        let Some(export) = self.shared.find(name) else {
            return self.refuse(number, answer::UNKNOWN, "there is no such export");
        };
        let contexts = match number {
            option::LIST_META_CONTEXT => offer::listed_contexts(&export, &queries),
            _ => offer::chosen_contexts(&export, &queries),
        };
        for context in &contexts {
            let mut reply = context.id().to_be_bytes().to_vec();
            reply.extend(context.name(&export).as_bytes());
            self.answer(number, answer::META_CONTEXT, &reply)?;
        }
        if number == option::SET_META_CONTEXT {
            self.contexts = Some((export, contexts));
        }
        self.acknowledge(number)
    }

    fn acknowledge(&mut self, number: u32) -> io::Result<()> {
        self.answer(number, answer::ACK, &[])
    }

    fn refuse(&mut self, number: u32, code: u32, text: &str) -> io::Result<()> {
        self.answer(number, code, text.as_bytes())
    }

    fn answer(&mut self, number: u32, code: u32, data: &[u8]) -> io::Result<()> {
        let mut reply = Vec::with_capacity(20 + data.len());
        reply.extend(OPTION_REPLY.to_be_bytes());
        reply.extend(number.to_be_bytes());
        reply.extend(code.to_be_bytes());
        reply.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
        reply.extend(data);
        self.send(&reply)
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.link.write_all(&mut [IoSlice::new(bytes)], self.until)
    }

    fn skip(&mut self, len: u32) -> io::Result<()> {
        if len > MAX_SKIPPED {
            return Err(invalid("an option of an absurd length"));
        }
        let mut buf = [0; 4096];
        let mut left = u64::from(len);
        while left > 0 {
            let step = clamp_len(left, buf.len());
            self.link.read_exact(&mut buf[..step], self.until)?;
            left -= len64(step);
        }
        Ok(())
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

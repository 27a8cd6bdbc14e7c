//! A client that says exactly what a test has it say.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use vdtool::nbd::wire::{
    EXTENDED_REPLY, Fields, GREETING, Headers, OPTION, OPTION_REPLY, Request, SIMPLE_REPLY,
    STRUCTURED_REPLY, answer, chunk, info, option, put_string,
};

use super::SOON;

/// A connection that a test has in its hands.
pub(super) struct Raw {
    pub(super) stream: UnixStream,
    pub(super) headers: Headers,
    pub(super) size: u64,
    pub(super) flags: u16,
}

/// An answer to an option.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) kind: u32,
    pub(super) data: Vec<u8>,
}

/// A whole reply: the error, if any, and the bytes of data, in order of their offsets.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Reply {
    pub(super) errno: u32,
    pub(super) data: Vec<u8>,
    /// Payloads of chunks with extents.
    pub(super) extents: Vec<Vec<u8>>,
}

impl Raw {
    /// Connects and exchanges flags.
    pub(super) fn connect(socket: &Path) -> Self {
        let mut raw = Self::silent(socket);
        assert_eq!(raw.u64(), GREETING);
        assert_eq!(raw.u64(), OPTION);
        assert_eq!(raw.u16(), 3);
        raw.send(&3u32.to_be_bytes());
        raw
    }

    /// Connects and says nothing.
    pub(super) fn silent(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).expect("connects");
        stream.set_read_timeout(Some(SOON)).expect("sets a limit");
        stream.set_write_timeout(Some(SOON)).expect("sets a limit");
        Self {
            stream,
            headers: Headers::Simple,
            size: 0,
            flags: 0,
        }
    }

    /// As far as requests.
    pub(super) fn ready(socket: &Path, headers: Headers) -> Self {
        let mut raw = Self::connect(socket);
        raw.raise(headers);
        raw.go("");
        raw
    }

    pub(super) fn raise(&mut self, headers: Headers) {
        let number = match headers {
            Headers::Simple => return,
            Headers::Structured => option::STRUCTURED_REPLY,
            Headers::Extended => option::EXTENDED_HEADERS,
        };
        assert_eq!(self.ask(number, &[]).kind, answer::ACK);
        self.headers = headers;
    }

    pub(super) fn go(&mut self, name: &str) {
        self.option(option::GO, &wanted(name, &[]));
        loop {
            let answer = self.answer(option::GO);
            let mut fields = Fields::new(&answer.data);
            match answer.kind {
                answer::ACK => return,
                answer::INFO if fields.u16() == Some(info::EXPORT) => {
                    self.size = fields.u64().expect("a size");
                    self.flags = fields.u16().expect("flags");
                }
                answer::INFO => {}
                kind => panic!("answer {kind:#x} to GO: {:?}", answer.data),
            }
        }
    }

    /// Chooses contexts; their numbers and names.
    pub(super) fn contexts(&mut self, number: u32, name: &str, queries: &[&str]) -> Vec<String> {
        let mut data = Vec::new();
        put_string(&mut data, name);
        data.extend(u32::try_from(queries.len()).expect("few").to_be_bytes());
        for query in queries {
            put_string(&mut data, query);
        }
        self.option(number, &data);
        let mut found = Vec::new();
        loop {
            let answer = self.answer(number);
            match answer.kind {
                answer::ACK => return found,
                answer::META_CONTEXT => {
                    found.push(String::from_utf8(answer.data[4..].to_vec()).expect("a name"));
                }
                kind => panic!("answer {kind:#x} to a query of contexts"),
            }
        }
    }

    pub(super) fn option(&mut self, number: u32, data: &[u8]) {
        let mut message = OPTION.to_be_bytes().to_vec();
        message.extend(number.to_be_bytes());
        message.extend(u32::try_from(data.len()).expect("short").to_be_bytes());
        message.extend(data);
        self.send(&message);
    }

    pub(super) fn answer(&mut self, number: u32) -> Answer {
        assert_eq!(self.u64(), OPTION_REPLY);
        assert_eq!(self.u32(), number);
        let kind = self.u32();
        let len = self.u32();
        let data = self.bytes(usize::try_from(len).expect("short"));
        Answer { kind, data }
    }

    pub(super) fn ask(&mut self, number: u32, data: &[u8]) -> Answer {
        self.option(number, data);
        self.answer(number)
    }

    pub(super) fn request(&mut self, command: u16, flags: u16, offset: u64, len: u64) {
        let mut bytes = Vec::new();
        let request = Request {
            flags,
            command,
            cookie: COOKIE,
            offset,
            len,
        };
        request.encode(self.headers, &mut bytes);
        self.send(&bytes);
    }

    /// Makes a request that has no payload, and takes its reply.
    pub(super) fn call(&mut self, command: u16, flags: u16, offset: u64, len: u64) -> Reply {
        self.request(command, flags, offset, len);
        let is_read = command == vdtool::nbd::wire::command::READ;
        self.reply(offset, if is_read { len } else { 0 })
    }

    /// Takes the reply to a request for `len` bytes at `offset`.
    pub(super) fn reply(&mut self, offset: u64, len: u64) -> Reply {
        let mut reply = Reply {
            errno: 0,
            data: vec![0xee; usize::try_from(len).unwrap_or(0)],
            extents: Vec::new(),
        };
        loop {
            match self.u32() {
                SIMPLE_REPLY => {
                    assert_ne!(self.headers, Headers::Extended);
                    reply.errno = self.u32();
                    assert_eq!(self.u64(), COOKIE);
                    if reply.errno != 0 {
                        reply.data.clear();
                    } else if self.headers == Headers::Simple {
                        reply.data = self.bytes(reply.data.len());
                    }
                    return reply;
                }
                STRUCTURED_REPLY => assert_eq!(self.headers, Headers::Structured),
                EXTENDED_REPLY => assert_eq!(self.headers, Headers::Extended),
                magic => panic!("{magic:#x} is no reply"),
            }
            let flags = self.u16();
            self.chunk(offset, &mut reply);
            if flags & chunk::DONE != 0 {
                return reply;
            }
        }
    }

    fn chunk(&mut self, offset: u64, reply: &mut Reply) {
        let kind = self.u16();
        assert_eq!(self.u64(), COOKIE);
        let len = match self.headers {
            Headers::Extended => {
                assert_eq!(self.u64(), offset);
                self.u64()
            }
            _ => self.u32().into(),
        };
        let payload = self.bytes(usize::try_from(len).expect("short"));
        let mut fields = Fields::new(&payload);
        let place = |at: u64| usize::try_from(at - offset).expect("inside");
        match kind {
            chunk::NONE => {}
            chunk::DATA => {
                let at = place(fields.u64().expect("an offset"));
                reply.data[at..at + fields.rest().len()].copy_from_slice(fields.rest());
            }
            chunk::HOLE => {
                let at = place(fields.u64().expect("an offset"));
                let len = usize::try_from(fields.u32().expect("a length")).expect("short");
                reply.data[at..at + len].fill(0);
            }
            chunk::STATUS | chunk::STATUS_EXTENDED => reply.extents.push(payload),
            chunk::ERROR => {
                reply.errno = fields.u32().expect("an error");
                reply.data.clear();
            }
            kind => panic!("a chunk of type {kind}"),
        }
    }

    pub(super) fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("sends");
    }

    pub(super) fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).expect("receives");
        bytes
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        self.bytes(N).try_into().expect("as many")
    }

    pub(super) fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.array())
    }

    pub(super) fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.array())
    }

    pub(super) fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.array())
    }

    /// The server ends the connection; what it still had to say.
    pub(super) fn ended(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => rest,
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => rest,
            Err(e) => panic!("the server did not end the connection: {e}"),
        }
    }
}

const COOKIE: u64 = 0x1122_3344_5566_7788;

/// The data of `GO` and `INFO`.
pub(super) fn wanted(name: &str, facts: &[u16]) -> Vec<u8> {
    let mut data = Vec::new();
    put_string(&mut data, name);
    data.extend(u16::try_from(facts.len()).expect("few").to_be_bytes());
    for fact in facts {
        data.extend(fact.to_be_bytes());
    }
    data
}

//! Replies to one client.

use std::io::{self, IoSlice};
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::nbd::Link;
use crate::nbd::wire::{EXTENDED_REPLY, Headers, Request, SIMPLE_REPLY, STRUCTURED_REPLY, chunk};
use crate::server::nbd::pipe::Pipe;
use crate::util::align::len64;

/// Longest header of a reply.
const HEADER: usize = 32;
/// Longest text of an error.
const MESSAGE: usize = 512;

/// The sending side of a connection.
#[derive(Debug, Default)]
pub(super) struct Output {
    turn: Mutex<()>,
    /// Threads that send or wait for their turn.
    senders: AtomicUsize,
}

/// Whether more chunks of the same reply follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum More {
    Follows,
    Done,
}

impl Output {
    /// How many threads send, or wait for it.
    pub(super) fn senders(&self) -> usize {
        self.senders.load(Ordering::Relaxed)
    }

    /// Sends a message; others wait.
    pub(super) fn send(&self, link: &Link, parts: &mut [IoSlice<'_>]) -> io::Result<()> {
        self.in_turn(|| link.write_all(parts, None))
    }

    /// Sends what a pipe holds.
    pub(super) fn send_pipe(&self, link: &Link, pipe: &Pipe, len: usize) -> io::Result<()> {
        match link.plain_fd() {
            Some(fd) => self.in_turn(|| pipe.send(fd, len)),
            None => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Has `send` send several messages that belong together.
    pub(super) fn in_turn(&self, send: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        self.senders.fetch_add(1, Ordering::Relaxed);
        let turn = self.turn.lock();
        let done = send();
        drop(turn);
        self.senders.fetch_sub(1, Ordering::Relaxed);
        done
    }
}

/// A header, on the stack.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    bytes: [u8; HEADER + 8],
    len: usize,
}

impl Header {
    fn new() -> Self {
        Self {
            bytes: [0; HEADER + 8],
            len: 0,
        }
    }

    fn put(mut self, field: &[u8]) -> Self {
        self.bytes[self.len..self.len + field.len()].copy_from_slice(field);
        self.len += field.len();
        self
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// The header of a simple reply.
pub(super) fn simple(request: &Request, errno: u32) -> Header {
    Header::new()
        .put(&SIMPLE_REPLY.to_be_bytes())
        .put(&errno.to_be_bytes())
        .put(&request.cookie.to_be_bytes())
}

/// The header of a chunk with `len` bytes of payload.
pub(super) fn piece(
    headers: Headers,
    request: &Request,
    kind: u16,
    more: More,
    len: usize,
) -> Header {
    let flags = match more {
        More::Follows => 0,
        More::Done => chunk::DONE,
    };
    let start = |magic: u32| {
        Header::new()
            .put(&magic.to_be_bytes())
            .put(&flags.to_be_bytes())
            .put(&kind.to_be_bytes())
            .put(&request.cookie.to_be_bytes())
    };
    match headers {
        Headers::Extended => start(EXTENDED_REPLY)
            .put(&request.offset.to_be_bytes())
            .put(&len64(len).to_be_bytes()),
        _ => start(STRUCTURED_REPLY).put(&u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes()),
    }
}

/// The header of a chunk of `len` bytes of data at `at`.
pub(super) fn data(headers: Headers, request: &Request, at: u64, len: usize, more: More) -> Header {
    piece(headers, request, chunk::DATA, more, len + 8).put(&at.to_be_bytes())
}

/// A whole reply that tells of success, and brings nothing.
pub(super) fn done(headers: Headers, request: &Request) -> Header {
    match headers {
        Headers::Extended => piece(headers, request, chunk::NONE, More::Done, 0),
        _ => simple(request, 0),
    }
}

/// A whole reply to a read of no bytes.
pub(super) fn no_bytes(headers: Headers, request: &Request) -> Header {
    match headers {
        Headers::Simple => simple(request, 0),
        headers => piece(headers, request, chunk::NONE, More::Done, 0),
    }
}

/// A chunk of `len` zeroes at `at`.
pub(super) fn hole(headers: Headers, request: &Request, at: u64, len: u32, more: More) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + 12);
    bytes.extend(piece(headers, request, chunk::HOLE, more, 12).bytes());
    bytes.extend(at.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

/// A reply, or the end of one in chunks, that tells of a failure.
pub(super) fn failed(headers: Headers, request: &Request, errno: u32, text: &str) -> Vec<u8> {
    if headers == Headers::Simple {
        return simple(request, errno).bytes().to_vec();
    }
    let mut end = text.len().min(MESSAGE);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let text = &text.as_bytes()[..end];
    let mut bytes = Vec::with_capacity(HEADER + 6 + text.len());
    let header = piece(headers, request, chunk::ERROR, More::Done, 6 + text.len());
    bytes.extend(header.bytes());
    bytes.extend(errno.to_be_bytes());
    bytes.extend(u16::try_from(text.len()).unwrap_or(0).to_be_bytes());
    bytes.extend(text);
    bytes
}

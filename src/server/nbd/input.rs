//! The requests of one client, read ahead.

use std::io;

use crate::nbd::Link;
use crate::nbd::wire::{Headers, Request};
use crate::util::align::{clamp_len, len64};

/// Bytes read ahead.
const AHEAD: usize = 64 << 10;

/// What has been read of a client's requests.
#[derive(Debug)]
pub(super) struct Input {
    buf: Vec<u8>,
    start: usize,
    end: usize,
}

impl Input {
    pub(super) fn new() -> Self {
        Self {
            buf: vec![0; AHEAD],
            start: 0,
            end: 0,
        }
    }

    /// The next request; `None`: the client has ended between two.
    ///
    /// # Errors
    /// The host's; `UnexpectedEof` inside a request; `InvalidData` for what is none.
    pub(super) fn request(&mut self, link: &Link, headers: Headers) -> io::Result<Option<Request>> {
        let len = headers.request_len();
        while self.end - self.start < len {
            if self.buf.len() - self.start < len {
                self.buf.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
            }
            match link.read(&mut self.buf[self.end..], None)? {
                0 if self.start == self.end => return Ok(None),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => self.end += read,
            }
        }
        let request = Request::decode(headers, &self.buf[self.start..self.start + len]);
        self.advance(len);
        request
            .map(Some)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no request"))
    }

    /// The next request, where it is all here and `wanted`.
    pub(super) fn another(
        &mut self,
        headers: Headers,
        wanted: impl FnOnce(&Request) -> bool,
    ) -> Option<Request> {
        let len = headers.request_len();
        let bytes = self.buf[self.start..self.end].get(..len)?;
        let request = Request::decode(headers, bytes).filter(wanted)?;
        self.advance(len);
        Some(request)
    }

    /// Fills `buf` with what follows.
    ///
    /// # Errors
    /// The host's; `UnexpectedEof`.
    pub(super) fn payload(&mut self, link: &Link, buf: &mut [u8]) -> io::Result<()> {
        let here = buf.len().min(self.end - self.start);
        buf[..here].copy_from_slice(&self.buf[self.start..self.start + here]);
        self.advance(here);
        link.read_exact(&mut buf[here..], None)
    }

    /// Passes over `len` bytes.
    ///
    /// # Errors
    /// As [`Input::payload`].
    pub(super) fn skip(&mut self, link: &Link, len: u64) -> io::Result<()> {
        let here = clamp_len(len, self.end - self.start);
        self.advance(here);
        let mut left = len - len64(here);
        while left > 0 {
            // Nothing is buffered now.
            let step = clamp_len(left, self.buf.len());
            link.read_exact(&mut self.buf[..step], None)?;
            left -= len64(step);
        }
        Ok(())
    }

    fn advance(&mut self, len: usize) {
        self.start += len;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }
}

//! Reads: by reference where the disk has the bytes as they are, else through a buffer.

use std::io::IoSlice;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::backend::{Admission, Kind, Moving, Request as Asked, Shape, Verdict};
use crate::chain::{Chain, Resolved};
use crate::error::Result;
use crate::image::{Source, Wait};
use crate::nbd::wire::{Headers, Request, flag};
use crate::server::nbd::output::{self, More};
use crate::server::nbd::pipe::Pipe;
use crate::server::nbd::session::{Ended, Session, Tools, wire_errno};
use crate::storage::Storage;
use crate::util::align::{clamp_len, len64};

/// Shorter reads are copied: that costs less than the calls.
const BY_REFERENCE: u64 = 32 << 10;
/// Bytes read at a time where memory is short.
const SMALL: usize = 64 << 10;

/// How much of a read has been answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sent {
    /// All of it.
    All,
    /// The bytes before this offset; the rest goes another way.
    Before(u64),
}

impl Session {
    /// Answers a read that `check` let pass.
    pub(super) fn read(&self, request: &Request, tools: &mut Tools) -> Result<(), Ended> {
        let mut at = request.offset;
        if request.len >= BY_REFERENCE && self.splices.load(Ordering::Relaxed) {
            match self.by_reference(request, tools)? {
                Sent::All => return Ok(()),
                Sent::Before(next) => at = next,
            }
        }
        let len = clamp_len(request.offset + request.len - at, usize::MAX);
        match self.shared.budget.lease(len) {
            Some(mut buf) => match self.submit(Asked::Read { at, buf: &mut buf }) {
                Ok(()) => self.send_data(request, at, &buf, More::Done),
                Err(e) => self.answer(request, Err(e)),
            },
            None => self.in_pieces(request, at),
        }
    }

    /// Answers short reads, each on its own, with one message to the socket.
    pub(super) fn short_reads(&self, requests: &[Request], tools: &mut Tools) -> Result<(), Ended> {
        let start = Instant::now();
        let reply = &mut tools.reply;
        reply.clear();
        for request in requests {
            if let Err((code, text)) = self.check(request) {
                reply.extend(output::failed(self.headers, request, code, text));
                continue;
            }
            let before = reply.len();
            let len = clamp_len(request.len, usize::MAX);
            if len == 0 {
                reply.extend(output::no_bytes(self.headers, request).bytes());
                continue;
            }
            reply.extend(
                self.data_header(request, request.offset, len, More::Done)
                    .bytes(),
            );
            let first = reply.len();
            reply.resize(first + len, 0);
            let (at, buf) = (request.offset, &mut reply[first..]);
            if let Err(e) = self.submit(Asked::Read { at, buf }) {
                reply.truncate(before);
                let failed = output::failed(self.headers, request, wire_errno(&e), e.message());
                reply.extend(failed);
            }
        }
        self.pace(requests.len(), start.elapsed());
        self.send(&mut [IoSlice::new(reply)])
    }

    fn data_header(&self, request: &Request, at: u64, len: usize, more: More) -> output::Header {
        match self.headers {
            Headers::Simple => output::simple(request, 0),
            headers => output::data(headers, request, at, len, more),
        }
    }

    fn send_data(&self, request: &Request, at: u64, bytes: &[u8], more: More) -> Result<(), Ended> {
        if bytes.is_empty() {
            let reply = output::no_bytes(self.headers, request);
            return self.send(&mut [IoSlice::new(reply.bytes())]);
        }
        let header = self.data_header(request, at, bytes.len(), more);
        self.send(&mut [IoSlice::new(header.bytes()), IoSlice::new(bytes)])
    }

    /// Where memory is short.  A client that wants it in one piece, or knows no pieces, is sent
    /// the header first; when the storage then fails, the connection ends.
    fn in_pieces(&self, request: &Request, at: u64) -> Result<(), Ended> {
        let mut buf = vec![0; SMALL];
        let end = request.offset + request.len;
        let pieces = self.headers != Headers::Simple && request.flags & flag::DF == 0;
        let mut next = at;
        if pieces {
            while next < end {
                let buf = &mut buf[..clamp_len(end - next, SMALL)];
                if let Err(e) = self.submit(Asked::Read { at: next, buf }) {
                    return self.answer(request, Err(e));
                }
                let more = match next + len64(buf.len()) == end {
                    true => More::Done,
                    false => More::Follows,
                };
                self.send_data(request, next, buf, more)?;
                next += len64(buf.len());
            }
            return Ok(());
        }
        let len = clamp_len(end - at, usize::MAX);
        let header = self.data_header(request, at, len, More::Done);
        let sent = self.output.in_turn(|| {
            self.link
                .write_all(&mut [IoSlice::new(header.bytes())], None)?;
            while next < end {
                let buf = &mut buf[..clamp_len(end - next, SMALL)];
                self.submit(Asked::Read { at: next, buf })
                    .map_err(std::io::Error::other)?;
                self.link.write_all(&mut [IoSlice::new(buf)], None)?;
                next += len64(buf.len());
            }
            Ok(())
        });
        Ok(sent?)
    }

    /// Sends what is stored as it is without looking at it.
    fn by_reference(&self, request: &Request, tools: &mut Tools) -> Result<Sent, Ended> {
        if tools.pipe.is_none() {
            if tools.no_pipe {
                return Ok(Sent::Before(request.offset));
            }
            tools.pipe = Pipe::new();
            tools.no_pipe = tools.pipe.is_none();
        }
        let backend = &self.export.export.backend;
        let shape = Shape {
            kind: Kind::Read,
            range: request.offset..request.offset + request.len,
            fua: false,
        };
        // What has to wait, or is wrong, goes the way that knows how to.
        let Admission::Admitted(ticket) = backend.admit(self.queue, &shape) else {
            return Ok(Sent::Before(request.offset));
        };
        if ticket.moving() != Moving::Anyone {
            return Ok(Sent::Before(request.offset));
        }
        let layers_stay = backend.settings().layers_stay;
        let sent = self.send_runs(request, ticket.chain(), layers_stay, tools);
        if sent == Ok(Sent::All) {
            match backend.complete(ticket, Ok(())) {
                Verdict::Answer(_) | Verdict::Hold => {}
            }
        }
        sent
    }

    fn send_runs(
        &self,
        request: &Request,
        chain: &Chain,
        layers_stay: bool,
        tools: &mut Tools,
    ) -> Result<Sent, Ended> {
        let end = request.offset + request.len;
        let whole = self.headers == Headers::Simple || request.flags & flag::DF != 0;
        let mut at = request.offset;
        while at < end {
            let _reading = chain.enter();
            // Errors are told by the way that reads.
            let Ok(found) = chain.resolve(at, end - at, Wait::Yes) else {
                return Ok(Sent::Before(at));
            };
            if whole && found.len < end - at {
                return Ok(Sent::Before(at));
            }
            let done = match found.source {
                Source::Stored { storage, host, .. } if stays(chain, &found, layers_stay) => {
                    self.send_stored(request, at, storage, host, found.len, whole, tools)?
                }
                Source::Zero | Source::Below if !whole => {
                    self.send_hole(request, at, found.len)?;
                    found.len
                }
                _ => 0,
            };
            if done == 0 {
                return Ok(Sent::Before(at));
            }
            at += done;
        }
        Ok(Sent::All)
    }

    fn send_hole(&self, request: &Request, at: u64, len: u64) -> Result<(), Ended> {
        let more = self.more(request, at + len);
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        let reply = output::hole(self.headers, request, at, len, more);
        self.send(&mut [IoSlice::new(&reply)])
    }

    fn more(&self, request: &Request, next: u64) -> More {
        match next == request.offset + request.len {
            true => More::Done,
            false => More::Follows,
        }
    }

    /// Sends bytes of a storage object from its descriptor; how many, 0: another way is needed.
    #[expect(clippy::too_many_arguments, reason = "one run and where it goes")]
    fn send_stored(
        &self,
        request: &Request,
        at: u64,
        storage: &dyn Storage,
        host: u64,
        len: u64,
        whole: bool,
        tools: &mut Tools,
    ) -> Result<u64, Ended> {
        let (Some(fd), Some(pipe)) = (storage.fd(), &tools.pipe) else {
            return Ok(0);
        };
        let inside = storage.size().saturating_sub(host).min(len);
        let step = clamp_len(inside, pipe.room());
        if step == 0 || (whole && len64(step) < len) {
            return Ok(0);
        }
        let more = self.more(request, at + len64(step));
        let header = self.data_header(request, at, step, more);
        if !pipe.load(header.bytes(), fd, host, step) {
            // What it holds is of no use, and the next would fail like it.
            tools.pipe = None;
            self.splices.store(false, Ordering::Relaxed);
            return Ok(0);
        }
        let sent = self
            .output
            .send_pipe(&self.link, pipe, header.bytes().len() + step);
        if sent.is_err() {
            tools.pipe = None;
        }
        sent?;
        Ok(len64(step))
    }
}

/// Whether what is stored there is of this disk, at this offset, for as long as a client may take
/// to read it: pages in its socket show what is written to the file after they were sent.
fn stays(chain: &Chain, found: &Resolved<'_>, layers_stay: bool) -> bool {
    let layer = chain.layers().get(found.depth);
    let stays = layer.is_some_and(|layer| layer.caps().offsets_stay);
    stays || !chain.top().caps().write || (found.depth > 0 && layers_stay)
}

//! One client's requests.
//!
//! Threads take turns: whoever holds the input reads the next request, lets go of it, and carries
//! the request out.  Another thread is started when all are busy with the storage, not when they
//! wait to send.  Short reads that have come together are answered together, by whoever read them,
//! for as long as that is fast.

use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::Scope;
use std::time::Duration;

use parking_lot::Mutex;

use crate::backend::{Kind, QueueId};
use crate::error::{Error, Result};
use crate::nbd::Link;
use crate::nbd::wire::{Headers, MAX_PAYLOAD, Request, command, errno, flag};
use crate::server::nbd::accept::builder;
use crate::server::nbd::budget::Lease;
use crate::server::nbd::handshake::Agreed;
use crate::server::nbd::input::Input;
use crate::server::nbd::output::{self, Output};
use crate::server::nbd::pipe::Pipe;
use crate::server::nbd::server::{Served, Shared};
use crate::server::nbd::status::Context;
use crate::util::align::clamp_len;

/// Reads up to this length are answered together.
pub(super) const SHORT: u64 = 32 << 10;
/// Most reads answered together.
const BATCH: usize = 32;
/// Bytes of a write that are taken at a time where memory is short.
const SMALL: usize = 64 << 10;
/// Short reads that take longer than this each come from a slow storage: one thread for each.
const SLOW: Duration = Duration::from_micros(60);
/// Threads that wait for requests and are kept.
const IDLE: usize = 3;
/// Most bytes of a refused request that are passed over; after more the client is out of step.
const MAX_SKIPPED: u64 = 1 << 32;

/// The connection is of no more use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ended;

impl From<io::Error> for Ended {
    fn from(_: io::Error) -> Self {
        Self
    }
}

/// One client's connection, shared by the threads that serve it.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) shared: Arc<Shared>,
    pub(super) export: Arc<Served>,
    pub(super) headers: Headers,
    pub(super) contexts: Vec<Context>,
    pub(super) link: Link,
    pub(super) output: Output,
    pub(super) queue: QueueId,
    /// Whether pages may go to the socket by reference.
    pub(super) splices: AtomicBool,
    input: Mutex<Input>,
    waiting: AtomicUsize,
    /// How many short reads to answer together; 1: the storage is slow.
    batch: AtomicUsize,
    ended: AtomicBool,
    threads: AtomicUsize,
}

/// What a thread has read.
#[derive(Debug)]
enum Job {
    /// Short reads.
    Reads(Vec<Request>),
    /// A write and its bytes.
    Write(Request, Lease),
    /// Anything else.
    Other(Request),
}

/// What a thread keeps between requests.
#[derive(Debug, Default)]
pub(super) struct Tools {
    pub(super) pipe: Option<Pipe>,
    /// Whether there was none to be had.
    pub(super) no_pipe: bool,
    pub(super) reply: Vec<u8>,
}

impl Session {
    pub(super) fn new(shared: Arc<Shared>, link: Link, agreed: Agreed, number: u64) -> Self {
        let number = u32::try_from(number % u64::from(u32::MAX)).unwrap_or(0);
        Self {
            shared,
            export: agreed.export,
            headers: agreed.headers,
            contexts: agreed.contexts,
            splices: AtomicBool::new(!link.is_secure()),
            link,
            output: Output::default(),
            queue: QueueId(number),
            input: Mutex::new(Input::new()),
            waiting: AtomicUsize::new(0),
            batch: AtomicUsize::new(BATCH),
            ended: AtomicBool::new(false),
            threads: AtomicUsize::new(1),
        }
    }

    /// Serves until the client leaves; returns when the last thread has.
    pub(super) fn run(&self) {
        std::thread::scope(|scope| self.work(scope, usize::MAX));
        self.link.socket().shutdown(Shutdown::Both);
    }

    /// One thread's work; ends when `idle` others wait for requests.
    fn work<'s>(&'s self, scope: &'s Scope<'s, '_>, idle: usize) {
        let mut tools = Tools::default();
        while !self.ended.load(Ordering::Acquire) && self.waiting.load(Ordering::SeqCst) < idle {
            if self.turn(scope, &mut tools).is_err() {
                self.ended.store(true, Ordering::Release);
                // Whoever reads returns.
                self.link.socket().shutdown(Shutdown::Read);
            }
        }
    }

    /// Reads one request and carries it out.
    fn turn<'s>(
        &'s self,
        scope: &'s Scope<'s, '_>,
        tools: &mut Tools,
    ) -> std::result::Result<(), Ended> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let mut input = self.input.lock();
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        if self.ended.load(Ordering::Acquire) {
            return Ok(());
        }
        let Some(job) = self.next(&mut input)? else {
            return Ok(());
        };
        let is_fast = self.batch.load(Ordering::Relaxed) > 1;
        match job {
            Job::Reads(requests) if is_fast => self.short_reads(&requests, tools),
            job => {
                drop(input);
                self.call_another(scope);
                match job {
                    Job::Reads(requests) => self.short_reads(&requests, tools),
                    Job::Write(request, bytes) => self.write(&request, &bytes),
                    Job::Other(request) => self.carry_out(&request, tools),
                }
            }
        }
    }

    /// Has another thread read on, where none waits to do so and the storage is what all wait for.
    fn call_another<'s>(&'s self, scope: &'s Scope<'s, '_>) {
        if self.waiting.load(Ordering::SeqCst) > 0 || self.output.senders() > 1 {
            return;
        }
        // Only whoever has just let go of the input comes here: seldom two at once, and one more
        // does no harm.
        if self.threads.load(Ordering::SeqCst) >= self.shared.options.depth.max(1) {
            return;
        }
        self.threads.fetch_add(1, Ordering::SeqCst);
        let started = builder("nbd-worker").spawn_scoped(scope, move || {
            self.work(scope, IDLE);
            self.threads.fetch_sub(1, Ordering::SeqCst);
        });
        if started.is_err() {
            // Those that are there do the work.
            self.threads.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// The next thing to do; `None`: it is done already.
    fn next(&self, input: &mut Input) -> std::result::Result<Option<Job>, Ended> {
        let Some(request) = input.request(&self.link, self.headers)? else {
            return Err(Ended);
        };
        match request.command {
            command::DISCONNECT => Err(Ended),
            command::WRITE => self.take_write(input, request),
            _ if request.flags & flag::PAYLOAD != 0 && self.headers == Headers::Extended => {
                // What follows is not known to be anything.
                self.refuse_payload(input, &request)?;
                Ok(None)
            }
            command::READ if is_short(&request) => {
                let most = self.batch.load(Ordering::Relaxed);
                let mut requests = vec![request];
                while requests.len() < most {
                    match input.another(self.headers, is_short) {
                        Some(request) => requests.push(request),
                        None => break,
                    }
                }
                Ok(Some(Job::Reads(requests)))
            }
            _ => Ok(Some(Job::Other(request))),
        }
    }

    fn refuse_payload(
        &self,
        input: &mut Input,
        request: &Request,
    ) -> std::result::Result<(), Ended> {
        if request.len > MAX_SKIPPED {
            return Err(Ended);
        }
        input.skip(&self.link, request.len)?;
        self.fail(request, errno::INVAL, "the request has no payload")
    }

    /// Reads what is to be written.
    fn take_write(
        &self,
        input: &mut Input,
        request: Request,
    ) -> std::result::Result<Option<Job>, Ended> {
        if let Err((code, text)) = self.check(&request) {
            if request.len > MAX_SKIPPED {
                return Err(Ended);
            }
            input.skip(&self.link, request.len)?;
            self.fail(&request, code, text)?;
            return Ok(None);
        }
        let len = clamp_len(request.len, usize::MAX);
        match self.shared.budget.lease(len) {
            Some(mut bytes) => {
                input.payload(&self.link, &mut bytes)?;
                Ok(Some(Job::Write(request, bytes)))
            }
            None => {
                self.write_in_pieces(input, &request)?;
                Ok(None)
            }
        }
    }

    /// Where memory is short: bit by bit, while all other requests of this client wait.
    fn write_in_pieces(
        &self,
        input: &mut Input,
        request: &Request,
    ) -> std::result::Result<(), Ended> {
        let mut piece = vec![0; SMALL];
        let mut result = Ok(());
        let mut at = request.offset;
        let end = request.offset + request.len;
        while at < end {
            let len = clamp_len(end - at, piece.len());
            input.payload(&self.link, &mut piece[..len])?;
            if result.is_ok() {
                result = self.write_bytes(&piece[..len], at, request.flags & flag::FUA != 0);
            }
            at += crate::util::align::len64(len);
        }
        self.answer(request, result)
    }

    /// Takes note of how long the storage took for some short reads.
    pub(super) fn pace(&self, count: usize, time: Duration) {
        let count = u32::try_from(count).unwrap_or(u32::MAX).max(1);
        let batch = match time / count {
            each if each > SLOW => 1,
            _ => BATCH,
        };
        if self.batch.load(Ordering::Relaxed) != batch {
            self.batch.store(batch, Ordering::Relaxed);
        }
    }

    fn carry_out(&self, request: &Request, tools: &mut Tools) -> std::result::Result<(), Ended> {
        if let Err((code, text)) = self.check(request) {
            return self.fail(request, code, text);
        }
        match request.command {
            command::READ => self.read(request, tools),
            command::FLUSH => self.flush(request),
            command::TRIM => self.trim(request),
            command::CACHE => self.cache(request),
            command::WRITE_ZEROES => self.write_zeroes(request),
            command::BLOCK_STATUS => self.block_status(request),
            _ => self.fail(request, errno::INVAL, "the command is not known"),
        }
    }

    /// Refuses what makes no sense, before any memory or storage is used for it.
    pub(super) fn check(&self, request: &Request) -> Result<(), (u32, &'static str)> {
        let structured = self.headers != Headers::Simple;
        let (flags, payload, kind) = match request.command {
            command::READ if structured => (flag::DF, true, Some(Kind::Read)),
            command::READ => (0, true, Some(Kind::Read)),
            command::WRITE if self.headers == Headers::Extended => {
                (flag::PAYLOAD, true, Some(Kind::Write))
            }
            command::WRITE => (0, true, Some(Kind::Write)),
            command::FLUSH => (0, false, None),
            command::TRIM => (0, false, Some(Kind::Discard)),
            command::CACHE => (0, false, Some(Kind::Read)),
            command::WRITE_ZEROES => {
                let flags = flag::NO_HOLE | flag::FAST_ZERO;
                (flags, false, Some(Kind::Zero))
            }
            command::BLOCK_STATUS if structured => (flag::REQ_ONE, false, Some(Kind::Read)),
            _ => return Err((errno::INVAL, "the command is not known")),
        };
        // FUA makes sense wherever something changes, and is harmless elsewhere.
        if request.flags & !(flags | flag::FUA) != 0 {
            return Err((errno::INVAL, "a flag is not known for this command"));
        }
        let Some(kind) = kind else {
            return match (request.offset, request.len) {
                (0, 0) => Ok(()),
                _ => Err((errno::INVAL, "a flush has neither offset nor length")),
            };
        };
        if payload && request.len > u64::from(MAX_PAYLOAD) {
            return Err((errno::OVERFLOW, "more than 32 MiB at once"));
        }
        let geometry = self.export.export.backend.geometry();
        if kind.changes() && !geometry.writable {
            return Err((errno::PERM, "the export is read-only"));
        }
        let end = request.offset.checked_add(request.len);
        match end.is_some_and(|end| end <= geometry.virtual_size) {
            true => Ok(()),
            false if matches!(kind, Kind::Write | Kind::Zero) => {
                Err((errno::NOSPC, "past the end of the export"))
            }
            false => Err((errno::INVAL, "past the end of the export")),
        }
    }

    /// Sends a message.
    pub(super) fn send(&self, parts: &mut [IoSlice<'_>]) -> std::result::Result<(), Ended> {
        Ok(self.output.send(&self.link, parts)?)
    }

    /// Answers that a request failed.
    pub(super) fn fail(
        &self,
        request: &Request,
        code: u32,
        text: &str,
    ) -> std::result::Result<(), Ended> {
        let reply = output::failed(self.headers, request, code, text);
        self.send(&mut [IoSlice::new(&reply)])
    }

    /// Answers a request that brings nothing back.
    pub(super) fn answer(
        &self,
        request: &Request,
        result: Result<()>,
    ) -> std::result::Result<(), Ended> {
        match result {
            Ok(()) => {
                let reply = output::done(self.headers, request);
                self.send(&mut [IoSlice::new(reply.bytes())])
            }
            // Without the path: clients need not know where images lie.
            Err(e) => self.fail(request, wire_errno(&e), e.message()),
        }
    }
}

fn is_short(request: &Request) -> bool {
    request.command == command::READ && request.len <= SHORT && request.flags == 0
}

/// The protocol's number for an error.
pub(super) fn wire_errno(error: &Error) -> u32 {
    match error.errno() {
        libc::EPERM | libc::EACCES | libc::EROFS => errno::PERM,
        libc::ENOMEM => errno::NOMEM,
        libc::EINVAL => errno::INVAL,
        libc::ENOSPC | libc::EDQUOT | libc::EFBIG => errno::NOSPC,
        libc::EOVERFLOW => errno::OVERFLOW,
        libc::EOPNOTSUPP => errno::NOTSUP,
        libc::ESHUTDOWN => errno::SHUTDOWN,
        _ => errno::IO,
    }
}

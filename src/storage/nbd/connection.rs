//! One connection, with requests of many threads under way.
//!
//! Nobody but the callers reads replies.  One of those that wait holds the right to read: it reads
//! the next header, and where that is another's, hands the right over with it.  So each thread
//! takes its bytes straight into its own buffer.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::error::Error;
use crate::nbd::Link;
use crate::nbd::socket::Until;
use crate::nbd::wire::{Headers, Request, can, command, flag};
use crate::storage::Zeroing;
use crate::storage::nbd::losses::{Changes, Losses};
use crate::storage::nbd::negotiate::{Agreed, Facts};
use crate::storage::nbd::reply::{self, Header, Progress};
use crate::util::align::len64;

/// How long a farewell may take.
const FAREWELL: Duration = Duration::from_millis(100);

/// What is asked of a server.
#[derive(Debug)]
pub(super) enum Op<'a> {
    Read {
        at: u64,
        buf: &'a mut [u8],
    },
    Write {
        at: u64,
        buf: &'a [u8],
    },
    Flush,
    Zero {
        range: Range<u64>,
        how: Zeroing,
    },
    Trim {
        range: Range<u64>,
    },
    Status {
        at: u64,
        len: u64,
        /// Length and flags of extents.
        found: &'a mut Vec<(u64, u32)>,
    },
}

impl Op<'_> {
    fn is_change(&self) -> bool {
        match self {
            Self::Write { .. } | Self::Zero { .. } | Self::Trim { .. } => true,
            Self::Read { .. } | Self::Flush | Self::Status { .. } => false,
        }
    }

    fn request(&self, cookie: u64) -> Request {
        let (command, flags, offset, len) = match self {
            Self::Read { at, buf } => (command::READ, 0, *at, len64(buf.len())),
            Self::Write { at, buf } => (command::WRITE, 0, *at, len64(buf.len())),
            Self::Flush => (command::FLUSH, 0, 0, 0),
            Self::Zero { range, how } => {
                let flags = match how {
                    Zeroing::MayUnmap => 0,
                    Zeroing::KeepSpace => flag::NO_HOLE,
                };
                (
                    command::WRITE_ZEROES,
                    flags,
                    range.start,
                    range.end - range.start,
                )
            }
            Self::Trim { range } => (command::TRIM, 0, range.start, range.end - range.start),
            Self::Status { at, len, .. } => (command::BLOCK_STATUS, 0, *at, *len),
        };
        Request {
            flags,
            command,
            cookie,
            offset,
            len,
        }
    }
}

/// Why a request brought nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// The server said so.
    Refused(Error),
    /// The connection is of no more use; the request may be made again on another.
    Lost(Error),
}

#[derive(Debug)]
enum Turn {
    /// Nobody reads.
    Free,
    /// Somebody reads.
    Taken,
    /// Whoever waits for this reply is to read on.
    Of(Header),
}

/// A thread whose request has no reply yet.
#[derive(Debug)]
struct Waiter {
    woken: Arc<Condvar>,
    /// It sleeps, and does nothing else that it may be long about, such as sending.
    asleep: bool,
}

#[derive(Debug)]
struct State {
    waiting: HashMap<u64, Waiter>,
    turn: Turn,
    /// Why the connection is of no more use.
    lost: Option<String>,
    changes: Changes,
}

/// A connection to a server.
#[derive(Debug)]
pub(super) struct Connection {
    link: Link,
    facts: Facts,
    timeout: Duration,
    losses: Arc<Losses>,
    sending: Mutex<()>,
    state: Mutex<State>,
    cookie: AtomicU64,
    busy: AtomicUsize,
}

impl Connection {
    /// Tells `losses` when it is lost with changes that were not flushed.
    pub(super) fn new(agreed: Agreed, timeout: Duration, losses: Arc<Losses>) -> Self {
        Self {
            link: agreed.link,
            facts: agreed.facts,
            timeout,
            losses,
            sending: Mutex::default(),
            state: Mutex::new(State {
                waiting: HashMap::new(),
                turn: Turn::Free,
                lost: None,
                changes: Changes::default(),
            }),
            cookie: AtomicU64::new(1),
            busy: AtomicUsize::new(0),
        }
    }

    pub(super) fn facts(&self) -> &Facts {
        &self.facts
    }

    /// How many requests are under way.
    pub(super) fn busy(&self) -> usize {
        self.busy.load(Ordering::Relaxed)
    }

    pub(super) fn is_lost(&self) -> bool {
        self.state.lock().lost.is_some()
    }

    /// Whether it has changes that are not flushed; never once it is lost.
    pub(super) fn is_pending(&self) -> bool {
        self.state.lock().changes.pending()
    }

    /// Makes one request and waits for its reply.
    pub(super) fn call(&self, op: &mut Op<'_>) -> Result<(), Failure> {
        self.busy.fetch_add(1, Ordering::Relaxed);
        let cookie = self.cookie.fetch_add(1, Ordering::Relaxed);
        let woken = Arc::new(Condvar::new());
        let covered = {
            let mut state = self.state.lock();
            let waiter = Waiter {
                woken: Arc::clone(&woken),
                asleep: false,
            };
            state.waiting.insert(cookie, waiter);
            state.changes.covered()
        };
        let until = Instant::now().checked_add(self.timeout);
        let done = self
            .send(op, cookie, until)
            .and_then(|()| self.receive(op, cookie, &woken, until));
        let mut state = self.state.lock();
        state.waiting.remove(&cookie);
        match &done {
            Ok(()) => self.take_note(&mut state.changes, op, covered),
            Err(Failure::Lost(why)) => {
                let why = crate::storage::nbd::pool::full_text(why);
                state.lose(why);
                self.link.socket().shutdown(Shutdown::Both);
            }
            Err(Failure::Refused(_)) => {}
        }
        // Also where another thread lost the connection after this one had its reply.
        let State { lost, changes, .. } = &mut *state;
        if let Some(why) = lost
            && changes.give_up()
        {
            self.losses.note(why);
        }
        drop(state);
        self.busy.fetch_sub(1, Ordering::Relaxed);
        done
    }

    /// Counts a change, or what a flush covers.
    fn take_note(&self, changes: &mut Changes, op: &Op<'_>, covered: u64) {
        match op {
            Op::Flush => changes.flush(covered),
            // Without flushes changes are durable when they are answered, or nobody ever knows.
            op if op.is_change() && self.can(can::FLUSH) => changes.add(),
            _ => {}
        }
    }

    fn can(&self, flag: u16) -> bool {
        self.facts.flags & flag != 0
    }

    fn send(&self, op: &Op<'_>, cookie: u64, until: Until) -> Result<(), Failure> {
        let mut header = Vec::with_capacity(32);
        let mut request = op.request(cookie);
        if op.is_change() && self.can(can::FUA) && !self.can(can::FLUSH) {
            request.flags |= flag::FUA;
        }
        let data: &[u8] = match op {
            Op::Write { buf, .. } => {
                if self.facts.headers == Headers::Extended {
                    request.flags |= flag::PAYLOAD;
                }
                buf
            }
            _ => &[],
        };
        request.encode(self.facts.headers, &mut header);
        let _turn = self.sending.lock();
        let sent = self
            .link
            .write_all(&mut [IoSlice::new(&header), IoSlice::new(data)], until);
        sent.map_err(|e| Failure::Lost(broken(e)))
    }

    fn receive(
        &self,
        op: &mut Op<'_>,
        cookie: u64,
        woken: &Condvar,
        until: Until,
    ) -> Result<(), Failure> {
        let mut progress = Progress::default();
        loop {
            let mut header = self.await_turn(cookie, woken, until)?;
            loop {
                let next = match header.take() {
                    Some(header) => header,
                    None => reply::header(&self.link, self.facts.headers, until)?,
                };
                if next.cookie != cookie {
                    self.hand_over(next)?;
                    break;
                }
                if progress.take(&next, op, &self.link, &self.facts, until)? {
                    self.let_go();
                    return progress.result();
                }
            }
        }
    }

    /// Waits for the right to read; with a header where one was read already.
    fn await_turn(
        &self,
        cookie: u64,
        woken: &Condvar,
        until: Until,
    ) -> Result<Option<Header>, Failure> {
        let mut state = self.state.lock();
        loop {
            if let Some(why) = &state.lost {
                return Err(Failure::Lost(Error::new(crate::ErrorKind::Io, why.clone())));
            }
            match std::mem::replace(&mut state.turn, Turn::Taken) {
                Turn::Free => return Ok(None),
                Turn::Of(header) if header.cookie == cookie => return Ok(Some(header)),
                other => state.turn = other,
            }
            state.set_asleep(cookie, true);
            let timed_out = match until {
                Some(until) => woken.wait_until(&mut state, until).timed_out(),
                None => {
                    woken.wait(&mut state);
                    false
                }
            };
            state.set_asleep(cookie, false);
            if timed_out {
                return Err(Failure::Lost(broken(io::ErrorKind::TimedOut.into())));
            }
        }
    }

    /// Has the thread that waits for this reply read on.
    fn hand_over(&self, header: Header) -> Result<(), Failure> {
        let mut state = self.state.lock();
        let State { waiting, turn, .. } = &mut *state;
        let Some(waiter) = waiting.get(&header.cookie) else {
            return Err(Failure::Lost(super::negotiate::violation(
                "a reply to no request",
            )));
        };
        *turn = Turn::Of(header);
        waiter.woken.notify_one();
        Ok(())
    }

    /// Lets any other thread read: one that sleeps.  Those that do not will look by themselves
    /// when they come to wait, which may be after the server has had its replies taken.
    fn let_go(&self) {
        let mut state = self.state.lock();
        state.turn = Turn::Free;
        if let Some(other) = state.waiting.values().find(|w| w.asleep) {
            other.woken.notify_one();
        }
    }
}

impl State {
    fn lose(&mut self, why: String) {
        self.lost.get_or_insert(why);
        for waiter in self.waiting.values() {
            waiter.woken.notify_one();
        }
    }

    fn set_asleep(&mut self, cookie: u64, asleep: bool) {
        if let Some(waiter) = self.waiting.get_mut(&cookie) {
            waiter.asleep = asleep;
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.state.get_mut().lost.is_some() {
            return;
        }
        let mut farewell = Vec::with_capacity(32);
        let request = Request {
            flags: 0,
            command: command::DISCONNECT,
            cookie: 0,
            offset: 0,
            len: 0,
        };
        request.encode(self.facts.headers, &mut farewell);
        let until = Instant::now().checked_add(FAREWELL);
        // Manners: the server finds out by itself too.
        let _ = self.link.write_all(&mut [IoSlice::new(&farewell)], until);
        self.link.socket().shutdown(Shutdown::Write);
    }
}

/// The error of a connection that failed.
pub(super) fn broken(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::TimedOut => {
            Error::new(crate::ErrorKind::Io, "the server does not answer in time")
        }
        io::ErrorKind::UnexpectedEof => {
            Error::new(crate::ErrorKind::Io, "the server ended the connection")
        }
        _ => Error::io("talk to the server", error),
    }
}

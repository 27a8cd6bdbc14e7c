//! Threads for what may wait: allocation, copy-on-write, decoding, flushing, tables not in memory.
//!
//! A queue hands a request over with its ticket and gets both back through its [`Inbox`], whose
//! eventfd is in the queue's ring.  Only the queue answers the driver.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};
use rustix::event::{EventfdFlags, eventfd};

use super::process;
use super::request::Command;
use super::transfer::Channel;
use crate::backend::{Backend, Fallback, Kind, Request, Ticket};
use crate::error::{Error, Result};

/// Largest buffer that a worker keeps between requests.
const KEPT: usize = 1 << 20;

/// A request for a worker.
#[derive(Debug)]
pub(super) struct Job {
    /// Which of the queue's requests it is.
    pub(super) tag: u16,
    /// What is to be done.
    pub(super) command: Command,
    /// The right to do it.
    pub(super) ticket: Ticket,
    /// Where its bytes are: in memory that travels with it, or `None`: in the driver.
    pub(super) buffer: Option<Vec<u8>>,
    /// Who wants it back.
    pub(super) inbox: Arc<Inbox>,
}

/// A request that a worker is done with.
#[derive(Debug)]
pub(super) struct Done {
    /// Which of the queue's requests it is.
    pub(super) tag: u16,
    /// What was to be done.
    pub(super) command: Command,
    /// To be given to [`Backend::complete`].
    pub(super) ticket: Ticket,
    /// How it went.
    pub(super) result: Result<()>,
    /// The memory that came with it.
    pub(super) buffer: Option<Vec<u8>>,
}

/// How a queue leaves its requests to the next server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leaving {
    /// It ends: the driver holds requests back.
    End,
    /// It stays until the process ends: the driver still hands requests out.
    Keep,
}

/// Where a queue is told things by other threads.
#[derive(Debug)]
pub(super) struct Inbox {
    /// Number of the queue.
    pub(super) queue: u16,
    done: Mutex<Vec<Done>>,
    /// Held requests may be tried again.
    woken: AtomicBool,
    /// The server ends.
    stopping: AtomicBool,
    /// The server ends, and what it has not answered is the next one's.
    leaving: OnceLock<Leaving>,
    event: OwnedFd,
}

impl Inbox {
    /// An empty one for a queue.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn new(queue: u16) -> Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Self {
            queue,
            done: Mutex::default(),
            woken: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            leaving: OnceLock::new(),
            event: event.map_err(|e| Error::io("make an eventfd", e.into()))?,
        })
    }

    /// Becomes readable when there is something in it.
    pub(super) fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    fn ring(&self) {
        // It fails only when the counter is full, and then the queue is being told already.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    fn put(&self, done: Done) {
        let first = {
            let mut all = self.done.lock();
            all.push(done);
            all.len() == 1
        };
        if first {
            self.ring();
        }
    }

    /// Has the queue try again what it keeps.
    pub(super) fn wake(&self) {
        self.woken.store(true, Ordering::SeqCst);
        self.ring();
    }

    /// Has the queue answer what it keeps with an error, from now on.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// Whether [`Inbox::stop`] was called.
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// Has the queue answer nothing from now on: what it keeps and what comes is the next server's.
    /// No request may be under way.
    pub(super) fn leave(&self, how: Leaving) {
        let _ = self.leaving.set(how);
        self.ring();
    }

    /// How [`Inbox::leave`] was called, if it was.
    pub(super) fn leaving(&self) -> Option<Leaving> {
        self.leaving.get().copied()
    }

    /// What a request is answered that was refused; `None`: nothing, it is the next server's.
    ///
    /// The disk is closed after [`Inbox::leave`], so that a queue that was held up between its look
    /// at [`Inbox::leaving`] and the disk's refusal sees here that the disk has another server now.
    pub(super) fn refusal(&self, error: &Error) -> Option<i32> {
        self.leaving().is_none().then(|| -error.errno())
    }

    /// Empties it: the requests that are done, and whether to try again what is kept.
    pub(super) fn take(&self) -> (Vec<Done>, bool) {
        let mut count = [0; 8];
        // Cleared before it is looked into, so that nothing put in meanwhile is missed.
        let _ = rustix::io::read(&self.event, &mut count);
        let woken = self.woken.swap(false, Ordering::SeqCst);
        (std::mem::take(&mut *self.done.lock()), woken)
    }
}

#[derive(Debug, Default)]
struct Work {
    jobs: VecDeque<Job>,
    over: bool,
}

#[derive(Debug)]
struct Shared {
    work: Mutex<Work>,
    more: Condvar,
    backend: Arc<Backend>,
    channel: Channel,
}

/// The workers of one device.  Dropping it waits for them.
#[derive(Debug)]
pub(super) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Starts `count` workers for a disk whose requests' bytes are moved through `channel`.
    ///
    /// # Errors
    /// The host's, when it makes no more threads.
    pub(super) fn start(count: usize, backend: Arc<Backend>, channel: Channel) -> Result<Self> {
        let shared = Arc::new(Shared {
            work: Mutex::default(),
            more: Condvar::new(),
            backend,
            channel,
        });
        let mut pool = Self {
            shared,
            threads: Vec::with_capacity(count),
        };
        for index in 0..count {
            let shared = Arc::clone(&pool.shared);
            let thread = std::thread::Builder::new()
                .name(format!("ublk-work-{index}"))
                .spawn(move || shared.run())
                .map_err(|e| Error::io("start a thread", e))?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    /// Hands a request over.
    pub(super) fn give(&self, job: Job) {
        self.shared.work.lock().jobs.push_back(job);
        self.shared.more.notify_one();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.work.lock().over = true;
        self.shared.more.notify_all();
        for thread in self.threads.drain(..) {
            // What a worker does for a request is caught there; nothing is lost with the thread.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn run(&self) {
        process::mark_io_flusher();
        let mut spare = Vec::new();
        while let Some(job) = self.next() {
            self.carry_out(job, &mut spare);
            if spare.capacity() > KEPT {
                spare = Vec::new();
            }
        }
    }

    fn next(&self) -> Option<Job> {
        let mut work = self.work.lock();
        loop {
            if let Some(job) = work.jobs.pop_front() {
                return Some(job);
            }
            if work.over {
                return None;
            }
            self.more.wait(&mut work);
        }
    }

    fn carry_out(&self, mut job: Job, spare: &mut Vec<u8>) {
        let run = || match &mut job.buffer {
            Some(buffer) => self.execute(&job.ticket, &job.command, buffer),
            None => self.through_driver(&job.ticket, &job.command, job.tag, &job.inbox, spare),
        };
        let result = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| {
            let bug = std::io::Error::from_raw_os_error(libc::EIO);
            Err(Error::io("carry out a request: it met a bug", bug))
        });
        job.inbox.put(Done {
            tag: job.tag,
            command: job.command,
            ticket: job.ticket,
            result,
            buffer: job.buffer,
        });
    }

    /// Moves the bytes between the driver and memory of the worker.
    fn through_driver(
        &self,
        ticket: &Ticket,
        command: &Command,
        tag: u16,
        inbox: &Inbox,
        spare: &mut Vec<u8>,
    ) -> Result<()> {
        let len = command.buffer_len();
        if spare.len() < len {
            spare.resize(len, 0);
        }
        let place = self.channel.place(inbox.queue, tag);
        if command.shape.kind == Kind::Write {
            place.fetch(0, &mut spare[..len])?;
        }
        self.execute(ticket, command, &mut spare[..len])?;
        match command.shape.kind {
            Kind::Read => place.store(0, &spare[..len]),
            _ => Ok(()),
        }
    }

    fn execute(&self, ticket: &Ticket, command: &Command, buffer: &mut [u8]) -> Result<()> {
        let shape = &command.shape;
        let at = shape.range.start;
        let len = command.buffer_len();
        let mut request = match shape.kind {
            Kind::Read => Request::Read {
                at,
                buf: &mut buffer[..len],
            },
            Kind::Write => Request::Write {
                at,
                buf: &buffer[..len],
                fua: shape.fua,
            },
            Kind::Zero => Request::Zero {
                range: shape.range.clone(),
                how: command.how,
                fallback: Fallback::Write,
                fua: shape.fua,
            },
            Kind::Discard => Request::Discard {
                range: shape.range.clone(),
            },
            Kind::Flush => Request::Flush,
        };
        self.backend.execute(ticket, &mut request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_refused_once_the_disk_is_left_to_another_server_is_not_answered() {
        let inbox = Inbox::new(0).expect("there are descriptors");
        let closed = Error::invalid("it is closed");
        assert_eq!(inbox.refusal(&closed), Some(-closed.errno()));
        inbox.leave(Leaving::Keep);
        assert_eq!(inbox.refusal(&closed), None);
    }
}

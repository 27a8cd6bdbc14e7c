//! How a job on a disk in use is told to wait, to go on and to stop, and tells how far it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use serde_json::{Value, json};

use super::event::whole;
use crate::backend::{Backend, IoStatus, Kind};
use crate::copy::progress::Progress;
use crate::error::{Error, ErrorKind, Result};

/// How long a job works before it looks whether clients do, too.
const SLICE: Duration = Duration::from_millis(4);
/// Longest that it then leaves the host to them.
const LEAVE: Duration = Duration::from_millis(50);

/// How a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// It goes on.
    Running,
    /// It waits, because it was told to.
    Paused,
    /// It stopped.
    Failed,
    /// There is nothing left to do.
    Done,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Failed => "failed",
            Self::Done => "done",
        }
    }
}

/// What it was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Go,
    Wait,
    Stop,
}

#[derive(Debug)]
struct Now {
    state: State,
    told: Told,
    /// Why it stopped, or what it could not do after all else: text, errno, status.
    error: Option<(String, i32, IoStatus)>,
}

/// When a job looked at what clients do, and how much that was.
#[derive(Debug)]
struct Look {
    at: Instant,
    operations: u64,
}

/// Between a job's thread and those who ask.
#[derive(Debug)]
pub(super) struct Control {
    total: u64,
    done: AtomicU64,
    clients: Arc<Backend>,
    look: Mutex<Look>,
    now: Mutex<Now>,
    changed: Condvar,
}

impl Control {
    /// For a job of so many bytes, which leaves half of the time to the clients of a disk.
    pub(super) fn new(total: u64, clients: Arc<Backend>) -> Self {
        Self {
            total,
            done: AtomicU64::new(0),
            look: Mutex::new(Look {
                at: Instant::now(),
                operations: operations(&clients),
            }),
            clients,
            now: Mutex::new(Now {
                state: State::Running,
                told: Told::Go,
                error: None,
            }),
            changed: Condvar::new(),
        }
    }

    /// What there is to know.
    pub(super) fn status(&self) -> Value {
        let now = self.now.lock();
        let mut status = json!({
            "job": "commit",
            "state": now.state.name(),
            "done": self.done.load(Ordering::Relaxed).min(self.total),
            "total": self.total,
        });
        if let Some((text, errno, io)) = &now.error {
            status["error"] = (&**text).into();
            status["errno"] = (*errno).into();
            status["io-status"] = io.name().into();
        }
        status
    }

    /// Has the job wait, and returns once it does, or has ended.
    ///
    /// # Errors
    /// `Invalid` where it has stopped.
    pub(super) fn pause(&self) -> Result<()> {
        let mut now = self.now.lock();
        if now.state == State::Failed {
            return Err(Error::invalid("the job has failed, and does not go on"));
        }
        if now.told == Told::Go {
            now.told = Told::Wait;
        }
        self.changed.notify_all();
        while now.state == State::Running && now.told == Told::Wait {
            self.changed.wait(&mut now);
        }
        Ok(())
    }

    /// Has the job go on after a pause, or an error.
    pub(super) fn resume(&self) {
        let mut now = self.now.lock();
        if now.told == Told::Wait {
            now.told = Told::Go;
            now.state = State::Running;
            now.error = None;
        }
        self.changed.notify_all();
    }

    /// Has the job stop.
    pub(super) fn stop(&self) {
        self.now.lock().told = Told::Stop;
        self.changed.notify_all();
    }

    /// So much is done.
    pub(super) fn at(&self, done: u64) {
        self.done.store(done, Ordering::Relaxed);
    }

    /// Whether to go on, when that is known.
    ///
    /// # Errors
    /// `Cancelled`.
    pub(super) fn look(&self) -> Result<()> {
        self.leave();
        let mut now = self.now.lock();
        while now.told == Told::Wait {
            now.state = State::Paused;
            self.changed.notify_all();
            self.changed.wait(&mut now);
        }
        match now.told {
            Told::Stop => Err(Error::new(
                ErrorKind::Cancelled,
                "was stopped, and can be done by another 'ctl commit' or 'commit --children'",
            )),
            _ => Ok(()),
        }
    }

    /// The job has ended, or has stopped until it is told to go on.
    pub(super) fn ended(&self, state: State, error: Option<&Error>) {
        let mut now = self.now.lock();
        now.state = state;
        now.error = error.map(|e| (whole(e), e.errno(), IoStatus::of(e)));
        if now.told == Told::Go {
            now.told = Told::Wait;
        }
        self.changed.notify_all();
    }

    /// Waits until a job that has stopped is told to go on; false: it is not to.
    pub(super) fn wait_resumed(&self) -> bool {
        let mut now = self.now.lock();
        while now.told == Told::Wait {
            self.changed.wait(&mut now);
        }
        now.told == Told::Go
    }

    /// Leaves the host to clients for as long as the job had it, where there are any.
    fn leave(&self) {
        let mut look = self.look.lock();
        let spent = look.at.elapsed();
        if spent < SLICE {
            return;
        }
        let operations = operations(&self.clients);
        if operations != look.operations {
            sleep(spent.min(LEAVE));
        }
        *look = Look {
            at: Instant::now(),
            operations,
        };
    }
}

impl Progress for Control {
    fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    fn cancelled(&self) -> bool {
        self.now.lock().told == Told::Stop
    }

    fn check(&self) -> Result<()> {
        self.look()
    }
}

/// How much clients have asked for so far.
fn operations(backend: &Backend) -> u64 {
    let stats = backend.stats();
    let queues = stats.iter();
    queues
        .map(|q| {
            Kind::ALL
                .iter()
                .map(|kind| q.kind(*kind).operations)
                .sum::<u64>()
        })
        .sum()
}

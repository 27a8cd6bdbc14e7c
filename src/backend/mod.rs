//! A disk as consumers use it: any thread, any request, checked and counted.
//!
//! Bounds and access are checked here once; the stages are plain functions in order.  A consumer
//! that may block calls [`Backend::submit`].  A server whose threads must not block goes by the
//! steps that `submit` is made of: [`Backend::admit`], then [`Backend::execute`] on a thread that
//! may wait, or its own transfer of the bytes, then [`Backend::complete`].

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::chain::Chain;
use crate::error::{Error, ErrorKind, Result};

pub mod account;
mod check;
mod execute;
mod gate;
mod lane;
mod owner;
pub mod policy;
pub mod request;
pub mod settings;
mod swap;
pub mod throttle;

#[cfg(test)]
mod tests;

pub use account::{QueueStats, Totals};
pub use gate::WakeHandle;
pub use owner::Owner;
pub use policy::{Action, IoStatus, OnError, Policy};
pub use request::{Fallback, Kind, Request, Shape};
pub use settings::{DetectZeroes, Discard, Durability, Event, Listener, Settings};
pub use swap::Medium;
pub use throttle::{Group, Limits, Membership};

use gate::{ABSENT, BUSY, CLOSED, Gate, PAUSED, STOPPED};
use lane::{Lane, Place, Queue};

/// Longest that a blocking request waits before it looks again on its own.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// Who a request comes from: a hardware queue, a connection.  Statistics are kept by queue; one
/// past the number of queues shares the counters of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct QueueId(pub u32);

/// What may be told to a client of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Size in bytes; not always a multiple of the logical block size.
    pub virtual_size: u64,
    /// Whether writes are taken.
    pub writable: bool,
    /// Requests start and end at multiples of this, or at the end of the disk; 1: anywhere.
    pub logical_block_size: u32,
    /// What clients should keep to for speed.
    pub physical_block_size: u32,
    /// Longest transfer a client should ask for, in bytes.
    pub max_transfer: u32,
    /// Whether writes need a flush, or FUA, to be durable.
    pub volatile_cache: bool,
    /// Zeroing at multiples of this needs no data written; 0: never.
    pub zero_align: u32,
    /// Discards at multiples of this give space back; 0: never.
    pub discard_align: u32,
}

/// Whether requests are let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// They are.
    Running,
    /// They are held by hand.
    Paused,
    /// They are held since an error.
    Stopped,
    /// They are held: another image could not be opened, and the old one is closed.
    NoImage,
    /// They are refused: it is over.
    Closed,
}

impl RunState {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
            Self::NoImage => "no-image",
            Self::Closed => "closed",
        }
    }
}

/// What became of a request that asked to be let in.
#[derive(Debug)]
pub enum Admission<T = Ticket> {
    /// It may be carried out.
    Admitted(T),
    /// It is limited: ask again at this moment, or when woken.  Of several requests of one kind,
    /// ask for the oldest first.
    NotBefore(Instant),
    /// The disk is paused or stopped: keep it, and ask again when woken.
    Held,
    /// It is wrong; this is the answer.
    Refused(Error),
}

/// What to do with a request that has ended.
#[derive(Debug)]
pub enum Verdict {
    /// Answer the client so; [`Error::errno`] gives it the errno.
    Answer(Result<()>),
    /// The disk stopped: keep the request, and ask for admission again when woken.
    Hold,
}

/// A moment, in nanoseconds since the backend was made; see [`Backend::moment`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(u64);

/// A request that was let in.  Owned: it may end on another thread than it began.  One that is
/// dropped without [`Backend::complete`] was given up, and is not counted.
#[derive(Debug)]
pub struct Ticket {
    lane: Arc<Lane>,
    shape: Shape,
    begun: Moment,
    /// Whether a server may move its bytes itself.
    plain: Moving,
}

/// Who may move the bytes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moving {
    /// The server, by [`Ticket::chain`], or [`Backend::execute`].
    Anyone,
    /// Only [`Backend::execute`]: more is to be done than to move them.
    Backend,
}

impl Ticket {
    /// The disk as it is until the request ends.
    pub fn chain(&self) -> &Chain {
        &self.lane.chain
    }

    /// Who may move its bytes.  Where it is `Anyone` a server may read what [`Chain::resolve`] says
    /// is stored, and overwrite what it says the top layer stores and is writable, while it holds a
    /// ticket of [`Chain::enter`] from before the look-up.
    pub fn moving(&self) -> Moving {
        self.plain
    }

    /// Notes that a server wrote to the image's file itself, up to host offset `end`.
    pub fn wrote(&self, end: u64) {
        if let Some(high) = &self.lane.high {
            high.wrote(end);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.lane.gate.leave(&self.lane.queue.count);
    }
}

/// A disk as servers and `io` use it.
#[derive(Debug)]
pub struct Backend {
    settings: Settings,
    gate: Arc<Gate>,
    /// One for each queue: no two queues write to one line of the cache.
    lanes: Vec<Place>,
    /// Those of the lanes, whatever the chain.
    queues: Vec<Arc<Queue>>,
    status: Mutex<IoStatus>,
    /// Those of every lane; held while lanes are given others.
    limits: Mutex<Option<Arc<Membership>>>,
    /// Where blocking requests that have to wait for a limit stand in line.
    line: [Mutex<()>; 2],
    made: Instant,
    /// An image was given up a sync of which had failed, and no flush has told of it since.
    lost: AtomicBool,
    /// Held while the image, or its size, is changed.
    changing: Mutex<()>,
}

impl Backend {
    /// A backend in front of `chain`, as `io` uses it: one queue, any alignment, errors reported.
    pub fn new(chain: Chain) -> Self {
        Self::build(chain.into(), Settings::default())
    }

    /// A backend in front of an image.
    ///
    /// # Errors
    /// `Invalid` for settings that make no sense.
    pub fn with_settings(medium: impl Into<Medium>, settings: Settings) -> Result<Self> {
        settings.check()?;
        Ok(Self::build(medium.into(), settings))
    }

    fn build(medium: Medium, settings: Settings) -> Self {
        let (chain, high) = medium.parts();
        let queues: Vec<Arc<Queue>> = (0..settings.queues).map(|_| Arc::default()).collect();
        let gate = Arc::<Gate>::default();
        let lane = |queue| {
            Place::new(Lane {
                queue: Arc::clone(queue),
                gate: Arc::clone(&gate),
                chain: Arc::clone(&chain),
                high: high.clone(),
                limits: None,
            })
        };
        Self {
            lanes: queues.iter().map(lane).collect(),
            queues,
            settings,
            gate,
            status: Mutex::default(),
            limits: Mutex::default(),
            line: Default::default(),
            made: Instant::now(),
            lost: AtomicBool::new(false),
            changing: Mutex::default(),
        }
    }

    /// The disk itself, as it is now.
    pub fn chain(&self) -> Arc<Chain> {
        Arc::clone(&self.lanes[0].lane().chain)
    }

    /// Runs `look` on the disk as it is now: nobody changes its size or puts another in its place
    /// meanwhile.  It is no request: not counted, not limited, and no pause holds it.
    ///
    /// # Errors
    /// Those of `look`; that the disk is no longer in use.
    pub fn look<T>(&self, queue: QueueId, look: impl FnOnce(&Chain) -> Result<T>) -> Result<T> {
        let count = &self.queue(queue).count;
        let _looking = self.gate.look(count, BUSY | ABSENT).ok_or_else(closed)?;
        look(&self.place(queue).lane().chain)
    }

    /// What each queue has counted so far.
    pub fn stats(&self) -> Vec<QueueStats> {
        let age = self.made.elapsed();
        self.queues
            .iter()
            .map(|queue| queue.account.stats(queue.depth(), age))
            .collect()
    }

    /// What has been counted so far, over all queues.
    pub fn totals(&self, kind: Kind) -> Totals {
        let stats = self.stats();
        stats
            .iter()
            .map(|queue| *queue.kind(kind))
            .fold(Totals::default(), Totals::plus)
    }

    /// End of the highest write to the image's file since it was opened, where that is watched.
    pub fn highest_offset(&self) -> Option<u64> {
        self.lanes[0].lane().high.as_ref().map(|high| high.end())
    }

    /// How it was set up.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The limits that hold, and who shares them.
    pub fn limits(&self) -> Option<Arc<Membership>> {
        self.limits.lock().clone()
    }

    /// Puts the disk under the limits of a group, or none, instead of those it had.
    pub fn set_group(&self, group: Option<&Arc<Group>>) {
        {
            let mut limits = self.limits.lock();
            *limits = group.map(|group| Arc::new(group.join()));
            for place in &self.lanes {
                let limits = limits.clone();
                place.change(|lane| Lane { limits, ..lane });
            }
        }
        self.gate.wake();
    }

    /// Tells everybody who was held, or told to wait, to ask again: limits have changed.
    pub fn wake(&self) {
        self.gate.wake();
    }

    /// Virtual size and what may be offered to a client.
    pub fn geometry(&self) -> Geometry {
        let chain = self.chain();
        let limits = chain.top().limits();
        let writable = chain.top().caps().write;
        Geometry {
            virtual_size: chain.virtual_size(),
            writable,
            logical_block_size: self.settings.logical_block_size,
            physical_block_size: self.settings.physical_block_size,
            max_transfer: self.settings.max_transfer,
            volatile_cache: writable && self.settings.durability != Durability::EveryWrite,
            zero_align: limits.zero_align,
            discard_align: match self.settings.discard {
                Discard::Unmap => limits.discard_align,
                Discard::Ignore => 0,
            },
        }
    }

    /// Runs one request, blocking until it is done, limits, pauses and stops included.
    ///
    /// # Errors
    /// `OutOfRange`, `Invalid` and `ReadOnly`, counted as invalid, with nothing done; those of the
    /// chain, counted as failed, where the policy is to report them.
    pub fn submit(&self, queue: QueueId, request: Request<'_>) -> Result<()> {
        let mut request = request;
        let shape = request.shape();
        loop {
            let ticket = self.wait_for(queue, &shape)?;
            let result = self.execute(&ticket, &mut request);
            if let Verdict::Answer(answer) = self.complete(ticket, result) {
                return answer;
            }
        }
    }

    /// Blocks until a request is let in.
    fn wait_for(&self, queue: QueueId, shape: &Shape) -> Result<Ticket> {
        let mut place = None;
        loop {
            match self.admit(queue, shape) {
                Admission::Admitted(ticket) => return Ok(ticket),
                Admission::Refused(error) => return Err(error),
                Admission::Held => self.gate.wait_open(),
                Admission::NotBefore(at) if place.is_some() => {
                    let latest = Instant::now() + LOOK_AGAIN;
                    self.gate.wait_until(at.min(latest));
                }
                // Only the first of those who wait asks again: the others would be told the same.
                Admission::NotBefore(_) => {
                    place = Some(self.line[usize::from(shape.kind.changes())].lock());
                }
            }
        }
    }

    /// Asks for a request to be let in.  Never blocks.
    pub fn admit(&self, queue: QueueId, shape: &Shape) -> Admission {
        self.admit_at(queue, shape, self.moment())
    }

    /// The present moment.
    pub fn moment(&self) -> Moment {
        self.moment_of(Instant::now())
    }

    fn moment_of(&self, at: Instant) -> Moment {
        let age = at.saturating_duration_since(self.made).as_nanos();
        Moment(u64::try_from(age).unwrap_or(u64::MAX))
    }

    /// As [`Backend::admit`], for who has looked at the clock just now.
    pub fn admit_at(&self, queue: QueueId, shape: &Shape, now: Moment) -> Admission {
        let Ok(depth) = self.gate.enter(&self.queue(queue).count) else {
            return self.kept_out();
        };
        // Loaded once it is in: the chain stays until it is out.
        let ticket = Ticket {
            lane: self.place(queue).lane(),
            shape: shape.clone(),
            begun: now,
            plain: self.moving(shape),
        };
        if let Err(kept) = self.consider(&ticket.lane, shape, now) {
            return kept;
        }
        ticket.lane.queue.account.depth(depth);
        Admission::Admitted(ticket)
    }

    fn index(&self, queue: QueueId) -> usize {
        usize::try_from(queue.0).unwrap_or_default() % self.lanes.len()
    }

    fn place(&self, queue: QueueId) -> &Place {
        &self.lanes[self.index(queue)]
    }

    fn queue(&self, queue: QueueId) -> &Arc<Queue> {
        &self.queues[self.index(queue)]
    }

    /// What somebody is told whom the gate did not let in.
    fn kept_out<T>(&self) -> Admission<T> {
        match self.gate.flags() & CLOSED {
            0 => Admission::Held,
            _ => Admission::Refused(closed()),
        }
    }

    /// Looks at a request of somebody who is in: whether it is right, and within the limits.
    fn consider<T>(&self, lane: &Lane, shape: &Shape, now: Moment) -> Result<(), Admission<T>> {
        if let Err(e) = self.check(shape, &lane.chain) {
            lane.queue.account.invalid(shape.kind);
            return Err(Admission::Refused(e));
        }
        let Some(limits) = &lane.limits else {
            return Ok(());
        };
        let now = self.made + Duration::from_nanos(now.0);
        limits
            .ask(shape.kind, shape.len(), now)
            .map_err(Admission::NotBefore)
    }

    /// Carries out a request that was let in, on a thread that may block.  A panic is an error of
    /// this request alone.
    ///
    /// # Errors
    /// Those of the chain; hand them to [`Backend::complete`].
    pub fn execute(&self, ticket: &Ticket, request: &mut Request<'_>) -> Result<()> {
        debug_assert_eq!(request.shape(), ticket.shape);
        let run = || execute::run(ticket.chain(), request, &self.settings, &self.lost);
        catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| {
            let text = "the request met a bug and was given up";
            Err(Error::new(ErrorKind::Io, text))
        })
    }

    /// Ends a request: counts it, and applies the error policy to how it went.  A flush that
    /// failed is never held, whatever the policy: its client is told.
    pub fn complete(&self, ticket: Ticket, result: Result<()>) -> Verdict {
        self.complete_at(ticket, result, self.moment())
    }

    /// As [`Backend::complete`], for who has looked at the clock just now.
    pub fn complete_at(&self, ticket: Ticket, result: Result<()>, now: Moment) -> Verdict {
        let kind = ticket.shape.kind;
        let spent = now.0.saturating_sub(ticket.begun.0);
        let account = &ticket.lane.queue.account;
        account.done(kind, ticket.shape.len(), spent, result.is_ok(), now.0);
        self.look_at_mark(&ticket.lane);
        drop(ticket);
        self.verdict(kind, result)
    }

    /// Applies the error policy to how a request has ended.
    #[inline]
    fn verdict(&self, kind: Kind, result: Result<()>) -> Verdict {
        match result {
            Ok(()) => Verdict::Answer(Ok(())),
            Err(error) => self.failed(kind, error),
        }
    }

    #[cold]
    fn failed(&self, kind: Kind, error: Error) -> Verdict {
        let Some(action) = self.settings.policy.action(kind, &error) else {
            return Verdict::Answer(Err(error));
        };
        self.note(&error);
        if action == Action::Stop {
            self.gate.set(STOPPED);
        }
        self.settings.listener.tell(&Event::IoError {
            kind,
            error: &error,
            action,
        });
        match action {
            Action::Report => Verdict::Answer(Err(error)),
            Action::Ignore => Verdict::Answer(Ok(())),
            // It fails again for as long as the image is open.
            Action::Stop if kind == Kind::Flush => Verdict::Answer(Err(error)),
            Action::Stop => Verdict::Hold,
        }
    }

    /// Has `wake` called whenever requests that were held, or told to wait, may be tried again:
    /// from any thread, and also when nothing has changed.  It must not block.
    pub fn on_wake(&self, wake: impl Fn() + Send + Sync + 'static) -> WakeHandle {
        self.gate.on_wake(Arc::new(wake))
    }

    /// Holds further requests, and returns once none is under way.
    pub fn pause(&self) {
        self.gate.set(PAUSED);
        self.drain();
    }

    /// Whether requests are let in, and if not, why.
    pub fn run_state(&self) -> RunState {
        match self.gate.flags() {
            flags if flags & CLOSED != 0 => RunState::Closed,
            flags if flags & ABSENT != 0 => RunState::NoImage,
            flags if flags & STOPPED != 0 => RunState::Stopped,
            flags if flags & PAUSED != 0 => RunState::Paused,
            _ => RunState::Running,
        }
    }

    /// Goes on after a pause or a stop, with the I/O status reset.
    pub fn resume(&self) {
        *self.status.lock() = IoStatus::Ok;
        self.gate.clear(PAUSED | STOPPED);
    }

    /// Refuses further requests, held ones too.  Returns at once.
    pub fn shut(&self) {
        self.gate.set(CLOSED);
        self.gate.wake();
    }

    /// The first failure since the disk was opened or resumed.
    pub fn io_status(&self) -> IoStatus {
        *self.status.lock()
    }

    fn drain(&self) {
        let counts: Vec<_> = self
            .queues
            .iter()
            .flat_map(|queue| [&queue.count, &queue.held])
            .collect();
        self.gate.drain(&counts);
    }

    fn look_at_mark(&self, lane: &Lane) {
        if let Some(high) = &lane.high
            && let Some(mark) = high.passed()
        {
            let end = high.end();
            self.settings.listener.tell(&Event::Watermark { mark, end });
        }
    }

    /// Only the first error sticks.
    fn note(&self, error: &Error) {
        let mut status = self.status.lock();
        if *status == IoStatus::Ok {
            *status = IoStatus::of(error);
        }
    }
}

fn closed() -> Error {
    let gone = std::io::Error::from_raw_os_error(libc::ESHUTDOWN);
    Error::io("take the request", gone)
}

//! Limits: bytes and requests a second, with bursts, for one disk or several.
//!
//! Each limit is a leaky bucket: what is let in fills it, time empties it at the average rate, and
//! nothing is let in while it is more than full.  Several disks that share a group take turns:
//! whoever waits is let in before one that comes again.  Time is handed in, so that tests need
//! not wait for it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::backend::Kind;
use crate::error::{Error, Result};

mod parse;

/// What is limited, in the order of their numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key {
    /// Bytes a second, reads and writes together.
    Bps,
    /// Bytes a second of reads.
    BpsRead,
    /// Bytes a second of writes.
    BpsWrite,
    /// Requests a second, reads and writes together.
    Iops,
    /// Reads a second.
    IopsRead,
    /// Writes a second.
    IopsWrite,
}

impl Key {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 6] = [
        Self::Bps,
        Self::BpsRead,
        Self::BpsWrite,
        Self::Iops,
        Self::IopsRead,
        Self::IopsWrite,
    ];

    /// What users type.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bps => "bps",
            Self::BpsRead => "bps-rd",
            Self::BpsWrite => "bps-wr",
            Self::Iops => "iops",
            Self::IopsRead => "iops-rd",
            Self::IopsWrite => "iops-wr",
        }
    }

    fn counts_bytes(self) -> bool {
        matches!(self, Self::Bps | Self::BpsRead | Self::BpsWrite)
    }

    fn concerns(self, way: Way) -> bool {
        match self {
            Self::Bps | Self::Iops => true,
            Self::BpsRead | Self::IopsRead => way == Way::Read,
            Self::BpsWrite | Self::IopsWrite => way == Way::Write,
        }
    }
}

/// Reads, or writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Read,
    Write,
}

impl Way {
    /// Discards and flushes are not limited: nothing is gained by putting them off.
    fn of(kind: Kind) -> Option<Self> {
        match kind {
            Kind::Read => Some(Self::Read),
            Kind::Write | Kind::Zero => Some(Self::Write),
            Kind::Discard | Kind::Flush => None,
        }
    }
}

/// One limit, in bytes or requests a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// What is reached over time; not 0.
    pub average: u64,
    /// What is reached in a burst; at least the average.
    pub burst: Option<u64>,
    /// How long a burst may last, in seconds; at least 1.
    pub burst_seconds: u64,
}

/// The limits of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    rates: [Option<Rate>; Key::ALL.len()],
    op_size: Option<u64>,
}

impl Limits {
    /// Limits of nothing.
    pub fn none() -> Self {
        Self::default()
    }

    /// Whether nothing is limited.
    pub fn is_none(&self) -> bool {
        self.rates.iter().all(Option::is_none)
    }

    /// One of the limits.
    pub fn rate(&self, key: Key) -> Option<Rate> {
        self.rates[key as usize]
    }

    /// Requests longer than this count as several, one for each started piece of this length.
    pub fn op_size(&self) -> Option<u64> {
        self.op_size
    }

    fn units(&self, key: Key, bytes: u64) -> u64 {
        match (key.counts_bytes(), self.op_size) {
            (true, _) => bytes,
            (false, Some(size)) => bytes.div_ceil(size).max(1),
            (false, None) => 1,
        }
    }
}

/// How full a limit is.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    rate: Rate,
    level: f64,
    burst_level: f64,
}

impl Bucket {
    fn new(rate: Rate) -> Self {
        Self {
            rate,
            level: 0.0,
            burst_level: 0.0,
        }
    }

    fn leak(&mut self, time: Duration) {
        let seconds = time.as_secs_f64();
        self.level = (self.level - self.rate.average as f64 * seconds).max(0.0);
        if let Some(burst) = self.rate.burst {
            self.burst_level = (self.burst_level - burst as f64 * seconds).max(0.0);
        }
    }

    fn fill(&mut self, units: u64) {
        self.level += units as f64;
        self.burst_level += units as f64;
    }

    /// Seconds until something may be let in.
    fn wait(&self) -> f64 {
        let average = self.rate.average as f64;
        let Some(burst) = self.rate.burst.map(|b| b as f64) else {
            // A tenth of a second's worth may come at once, so that the timer's grain does not
            // cost throughput.
            return (self.level - average / 10.0) / average;
        };
        let held = (self.level - burst * self.rate.burst_seconds as f64) / average;
        match self.rate.burst_seconds {
            0 | 1 => held,
            _ => held.max((self.burst_level - burst / 10.0) / burst),
        }
    }
}

/// One disk of a group.
#[derive(Debug)]
struct Member {
    id: u64,
    /// When it was told to come again, reads and writes.
    waits: [Option<Instant>; 2],
}

#[derive(Debug)]
struct State {
    limits: Limits,
    buckets: [Option<Bucket>; Key::ALL.len()],
    leaked: Instant,
    members: Vec<Member>,
    /// Whose turn it is, reads and writes.
    turns: [Option<u64>; 2],
    next_id: u64,
}

/// Limits that any number of disks share.
#[derive(Debug)]
pub struct Group {
    state: Mutex<State>,
}

/// How long after it was to come again somebody who waits keeps others out.
const LATE: Duration = Duration::from_millis(100);

/// Shortest wait that is worth a timer.
const SHORTEST: Duration = Duration::from_millis(1);

/// Longest wait that is told; who comes then is told again.
const LONGEST: f64 = 3600.0;

impl Group {
    /// A group with nothing let in yet.
    pub fn new(limits: Limits) -> Self {
        Self {
            state: Mutex::new(State {
                limits,
                buckets: buckets(&limits),
                leaked: Instant::now(),
                members: Vec::new(),
                turns: [None; 2],
                next_id: 0,
            }),
        }
    }

    /// The limits now.
    pub fn limits(&self) -> Limits {
        self.state.lock().limits
    }

    /// Sets other limits; what was let in is forgotten.  Whoever waits should be woken.
    pub fn set(&self, limits: Limits) {
        let mut state = self.state.lock();
        state.buckets = buckets(&limits);
        state.limits = limits;
        state.turns = [None; 2];
        state.members.iter_mut().for_each(|m| m.waits = [None; 2]);
    }

    /// Adds a disk.
    pub fn join(self: &Arc<Self>) -> Membership {
        let mut state = self.state.lock();
        let id = state.next_id;
        state.next_id += 1;
        state.members.push(Member {
            id,
            waits: [None; 2],
        });
        Membership {
            group: Arc::clone(self),
            id,
        }
    }
}

fn buckets(limits: &Limits) -> [Option<Bucket>; Key::ALL.len()] {
    limits.rates.map(|rate| rate.map(Bucket::new))
}

/// A disk's place in a group; dropping it leaves the group.
#[derive(Debug)]
pub struct Membership {
    group: Arc<Group>,
    id: u64,
}

impl Membership {
    /// The group.
    pub fn group(&self) -> &Arc<Group> {
        &self.group
    }

    /// Lets a request in and counts it, or tells when to ask again.
    pub(super) fn ask(&self, kind: Kind, bytes: u64, now: Instant) -> Result<(), Instant> {
        let Some(way) = Way::of(kind) else {
            return Ok(());
        };
        let mut state = self.group.state.lock();
        if state.limits.is_none() {
            return Ok(());
        }
        state.leak(now);
        let index = way as usize;
        state.forget_late(index, now);
        let wait = state.wait(way);
        let others_turn = state.turns[index].is_some_and(|id| id != self.id);
        if wait.is_none() && !others_turn {
            state.fill(way, bytes);
            state.pass_on(index, self.id);
            return Ok(());
        }
        let at = now + wait.unwrap_or(SHORTEST);
        state.turns[index].get_or_insert(self.id);
        if let Some(member) = state.members.iter_mut().find(|m| m.id == self.id) {
            member.waits[index] = Some(at);
        }
        Err(at)
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        let mut state = self.group.state.lock();
        state.members.retain(|m| m.id != self.id);
        for turn in &mut state.turns {
            turn.take_if(|id| *id == self.id);
        }
    }
}

impl State {
    fn leak(&mut self, now: Instant) {
        let time = now.saturating_duration_since(self.leaked);
        self.leaked = self.leaked.max(now);
        for bucket in self.buckets.iter_mut().flatten() {
            bucket.leak(time);
        }
    }

    fn fill(&mut self, way: Way, bytes: u64) {
        for key in Key::ALL.into_iter().filter(|key| key.concerns(way)) {
            let units = self.limits.units(key, bytes);
            if let Some(bucket) = &mut self.buckets[key as usize] {
                bucket.fill(units);
            }
        }
    }

    /// How long until a request this way may be let in; `None`: now.
    fn wait(&self, way: Way) -> Option<Duration> {
        let keys = Key::ALL.into_iter().filter(|key| key.concerns(way));
        let waits = keys.filter_map(|key| self.buckets[key as usize].as_ref().map(Bucket::wait));
        let longest = waits.fold(0.0, f64::max);
        (longest > 0.0).then(|| Duration::from_secs_f64(longest.min(LONGEST)).max(SHORTEST))
    }

    /// Who did not come when it was to loses its turn.
    fn forget_late(&mut self, index: usize, now: Instant) {
        for member in &mut self.members {
            member.waits[index].take_if(|at| *at + LATE < now);
        }
        let waits = |id| {
            let mut members = self.members.iter();
            members.any(|m| m.id == id && m.waits[index].is_some())
        };
        if let Some(id) = self.turns[index]
            && !waits(id)
        {
            self.turns[index] = self.next_waiting(index, id);
        }
    }

    /// A request of `id` was let in: the next one that waits has the turn.
    fn pass_on(&mut self, index: usize, id: u64) {
        if let Some(member) = self.members.iter_mut().find(|m| m.id == id) {
            member.waits[index] = None;
        }
        self.turns[index] = self.next_waiting(index, id);
    }

    /// The next that waits after `id`, going round.
    fn next_waiting(&self, index: usize, id: u64) -> Option<u64> {
        let waiting = || self.members.iter().filter(|m| m.waits[index].is_some());
        let after = waiting().find(|m| m.id > id);
        after.or_else(|| waiting().next()).map(|m| m.id)
    }
}

#[cfg(test)]
mod tests;

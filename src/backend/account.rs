//! What a backend has done: operations, bytes, failures, time, by queue.
//!
//! Each queue counts in lines of the cache of its own; whoever wants sums adds them up.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use crate::backend::Kind;
use crate::util::align::clamp_len;

const KINDS: usize = Kind::ALL.len();

/// Classes of the histogram of latencies: class 0 is below 1 µs, class `n` below 2^n µs, and the
/// last everything else.
pub const CLASSES: usize = 26;

#[derive(Debug)]
struct Counters {
    operations: AtomicU64,
    bytes: AtomicU64,
    failed: AtomicU64,
    invalid: AtomicU64,
    nanoseconds: AtomicU64,
    least: AtomicU64,
    most: AtomicU64,
    classes: [AtomicU64; CLASSES],
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            operations: AtomicU64::default(),
            bytes: AtomicU64::default(),
            failed: AtomicU64::default(),
            invalid: AtomicU64::default(),
            nanoseconds: AtomicU64::default(),
            least: AtomicU64::new(u64::MAX),
            most: AtomicU64::default(),
            classes: Default::default(),
        }
    }
}

impl Counters {
    /// Notes the shortest and the longest of some times.
    fn bounds(&self, least: u64, most: u64) {
        if self.least.load(Ordering::Relaxed) > least {
            self.least.fetch_min(least, Ordering::Relaxed);
        }
        if self.most.load(Ordering::Relaxed) < most {
            self.most.fetch_max(most, Ordering::Relaxed);
        }
    }
}

/// What one thread has counted since it last told an [`Account`].
#[derive(Debug, Default)]
pub(super) struct Tally {
    kinds: [Sums; KINDS],
    /// As [`Account`]'s; 0: nothing was counted.
    last: u64,
}

#[derive(Debug)]
struct Sums {
    operations: u64,
    bytes: u64,
    failed: u64,
    nanoseconds: u64,
    least: u64,
    most: u64,
    classes: [u32; CLASSES],
    /// A bit for each class that is not 0.
    seen: u32,
}

impl Default for Sums {
    fn default() -> Self {
        Self {
            operations: 0,
            bytes: 0,
            failed: 0,
            nanoseconds: 0,
            least: u64::MAX,
            most: 0,
            classes: [0; CLASSES],
            seen: 0,
        }
    }
}

impl Tally {
    /// As [`Account::done`].
    pub(super) fn done(&mut self, kind: Kind, bytes: u64, spent: u64, ok: bool, age: u64) {
        let sums = &mut self.kinds[kind as usize];
        sums.nanoseconds += spent;
        if ok {
            sums.operations += 1;
            sums.bytes += bytes;
        } else {
            sums.failed += 1;
        }
        sums.least = sums.least.min(spent);
        sums.most = sums.most.max(spent);
        let class = class(spent);
        sums.classes[class] += 1;
        sums.seen |= 1 << class;
        // Not 0, whatever the clock says.
        self.last = age.max(1);
    }
}

/// Counters of one queue; any thread may count.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Account {
    kinds: [Counters; KINDS],
    /// When the last request ended, in nanoseconds since the backend was made.
    last: AtomicU64,
    deepest: AtomicU32,
}

/// The counters of one kind at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// Requests that were done.
    pub operations: u64,
    /// Bytes they covered.
    pub bytes: u64,
    /// Requests that failed, each time they did.
    pub failed: u64,
    /// Requests that were refused: out of bounds, or a change to a read-only disk.
    pub invalid: u64,
    /// Time spent in requests, failed ones included, from when they were let in.
    pub time: Duration,
    /// Shortest of them; 0 before the first.
    pub least: Duration,
    /// Longest of them.
    pub most: Duration,
    /// How many took how long; see [`CLASSES`].
    pub classes: [u64; CLASSES],
}

impl Totals {
    /// The counters of both.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        let ended = |t: &Self| t.operations + t.failed > 0;
        let least = match (ended(&self), ended(&other)) {
            (true, true) => self.least.min(other.least),
            (true, false) => self.least,
            _ => other.least,
        };
        Self {
            operations: self.operations + other.operations,
            bytes: self.bytes + other.bytes,
            failed: self.failed + other.failed,
            invalid: self.invalid + other.invalid,
            time: self.time + other.time,
            least,
            most: self.most.max(other.most),
            classes: std::array::from_fn(|i| self.classes[i] + other.classes[i]),
        }
    }

    /// Mean time of a request; 0 before the first.
    pub fn mean(&self) -> Duration {
        let count = u128::from(self.operations + self.failed).max(1);
        Duration::from_nanos(u64::try_from(self.time.as_nanos() / count).unwrap_or(u64::MAX))
    }
}

/// The counters of one queue at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QueueStats {
    /// By kind, in the order of [`Kind::ALL`].
    pub kinds: [Totals; KINDS],
    /// Requests under way.
    pub depth: u32,
    /// Most requests that were ever under way at once.
    pub deepest: u32,
    /// How long no request has been under way; 0 while one is.
    pub idle: Duration,
}

impl QueueStats {
    /// The counters of both; the depths are summed, the deepest ones too, as if both had been at
    /// once.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            kinds: std::array::from_fn(|i| self.kinds[i].plus(other.kinds[i])),
            depth: self.depth + other.depth,
            deepest: self.deepest + other.deepest,
            idle: self.idle.min(other.idle),
        }
    }

    /// The counters of one kind.
    pub fn kind(&self, kind: Kind) -> &Totals {
        &self.kinds[kind as usize]
    }
}

/// The class of a latency in nanoseconds.
fn class(spent: u64) -> usize {
    let bits = u64::BITS - (spent / 1000).leading_zeros();
    usize::try_from(bits).unwrap_or(CLASSES).min(CLASSES - 1)
}

impl Account {
    pub(super) fn invalid(&self, kind: Kind) {
        self.kinds[kind as usize]
            .invalid
            .fetch_add(1, Ordering::Relaxed);
    }

    /// Notes that so many requests are under way.
    pub(super) fn depth(&self, now: u32) {
        if self.deepest.load(Ordering::Relaxed) < now {
            self.deepest.fetch_max(now, Ordering::Relaxed);
        }
    }

    /// Counts a request that took `spent` and ended `age` after the backend was made, both in
    /// nanoseconds.
    pub(super) fn done(&self, kind: Kind, bytes: u64, spent: u64, ok: bool, age: u64) {
        let counters = &self.kinds[kind as usize];
        counters.nanoseconds.fetch_add(spent, Ordering::Relaxed);
        if ok {
            counters.operations.fetch_add(1, Ordering::Relaxed);
            counters.bytes.fetch_add(bytes, Ordering::Relaxed);
        } else {
            counters.failed.fetch_add(1, Ordering::Relaxed);
        }
        counters.bounds(spent, spent);
        counters.classes[class(spent)].fetch_add(1, Ordering::Relaxed);
        self.last.store(age, Ordering::Relaxed);
    }

    /// Counts what a tally holds, and empties it.
    pub(super) fn add(&self, tally: &mut Tally) {
        if tally.last == 0 {
            return;
        }
        let add = |counter: &AtomicU64, count| {
            if count > 0 {
                counter.fetch_add(count, Ordering::Relaxed);
            }
        };
        for (counters, sums) in self.kinds.iter().zip(&mut tally.kinds) {
            if sums.seen == 0 {
                continue;
            }
            add(&counters.nanoseconds, sums.nanoseconds);
            add(&counters.operations, sums.operations);
            add(&counters.bytes, sums.bytes);
            add(&counters.failed, sums.failed);
            counters.bounds(sums.least, sums.most);
            while sums.seen != 0 {
                let class = clamp_len(sums.seen.trailing_zeros().into(), CLASSES - 1);
                add(&counters.classes[class], sums.classes[class].into());
                sums.classes[class] = 0;
                sums.seen &= sums.seen - 1;
            }
            (sums.nanoseconds, sums.operations) = (0, 0);
            (sums.bytes, sums.failed) = (0, 0);
            (sums.least, sums.most) = (u64::MAX, 0);
        }
        self.last.fetch_max(tally.last, Ordering::Relaxed);
        tally.last = 0;
    }

    fn totals(&self, kind: Kind) -> Totals {
        let counters = &self.kinds[kind as usize];
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let least = match get(&counters.least) {
            u64::MAX => 0,
            least => least,
        };
        Totals {
            operations: get(&counters.operations),
            bytes: get(&counters.bytes),
            failed: get(&counters.failed),
            invalid: get(&counters.invalid),
            time: Duration::from_nanos(get(&counters.nanoseconds)),
            least: Duration::from_nanos(least),
            most: Duration::from_nanos(get(&counters.most)),
            classes: std::array::from_fn(|i| get(&counters.classes[i])),
        }
    }

    /// The counters `age` after the backend was made, with `depth` requests under way.
    pub(super) fn stats(&self, depth: u32, age: Duration) -> QueueStats {
        let last = Duration::from_nanos(self.last.load(Ordering::Relaxed));
        QueueStats {
            kinds: Kind::ALL.map(|kind| self.totals(kind)),
            depth,
            deepest: self.deepest.load(Ordering::Relaxed),
            idle: match depth {
                0 => age.saturating_sub(last),
                _ => Duration::ZERO,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_agree_with_a_model() {
        let mut random = fastrand::Rng::with_seed(3);
        let queues = [Account::default(), Account::default()];
        let mut tally = Tally::default();
        let mut times: Vec<(Kind, Duration, bool, u64)> = Vec::new();
        for step in 0..2000u64 {
            let kind = Kind::ALL[random.usize(..KINDS)];
            let spent = random.u64(..) >> random.u32(20..64);
            let (ok, bytes) = (random.u8(..) > 20, random.u64(..1 << 20));
            let queue = &queues[random.usize(..2)];
            match random.bool() {
                true => queue.done(kind, bytes, spent, ok, step),
                false => tally.done(kind, bytes, spent, ok, step),
            }
            if random.u8(..) < 20 || step == 1999 {
                queue.add(&mut tally);
            }
            times.push((kind, Duration::from_nanos(spent), ok, bytes));
        }
        let age = Duration::from_nanos(5000);
        let [a, b] = queues.map(|q| q.stats(0, age));
        let all = a.plus(b);
        assert_eq!(all.idle, Duration::from_nanos(5000 - 1999));
        for kind in Kind::ALL {
            let totals = all.kind(kind);
            let of_kind = || times.iter().filter(|t| t.0 == kind);
            let spent = || of_kind().map(|t| t.1);
            let done = || of_kind().filter(|t| t.2);
            assert_eq!(totals.operations, done().count() as u64);
            assert_eq!(totals.failed, of_kind().filter(|t| !t.2).count() as u64);
            assert_eq!(totals.bytes, done().map(|t| t.3).sum::<u64>());
            assert_eq!(totals.time, spent().sum::<Duration>());
            assert_eq!(Some(totals.least), spent().min());
            assert_eq!(Some(totals.most), spent().max());
            assert_eq!(totals.classes.iter().sum::<u64>(), spent().count() as u64);
            for (n, count) in totals.classes.iter().enumerate() {
                let micros = |t: &Duration| t.as_micros();
                let low = if n == 0 { 0 } else { 1u128 << (n - 1) };
                let high = if n == CLASSES - 1 { u128::MAX } else { 1 << n };
                let inside = spent().filter(|t| (low..high).contains(&micros(t))).count();
                assert_eq!(*count, inside as u64, "class {n}");
            }
        }
    }

    #[test]
    fn a_queue_that_did_nothing_does_not_make_the_least_time_zero() {
        let (busy, lazy) = (Account::default(), Account::default());
        let time = Duration::from_micros(7);
        busy.done(Kind::Read, 1, 7000, true, 7000);
        let all = lazy.stats(0, time).plus(busy.stats(0, time));
        assert_eq!(all.kind(Kind::Read).least, time);
        assert_eq!(all.kind(Kind::Read).mean(), time);
    }
}

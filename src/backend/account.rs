//! What a backend has done: operations, bytes, failures, time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::backend::Kind;

const KINDS: usize = Kind::ALL.len();

#[derive(Debug, Default)]
struct Counters {
    operations: AtomicU64,
    bytes: AtomicU64,
    failed: AtomicU64,
    invalid: AtomicU64,
    nanoseconds: AtomicU64,
}

/// Counters of one queue; any thread may count.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Account {
    kinds: [Counters; KINDS],
}

/// The counters of one kind at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// Requests that were done.
    pub operations: u64,
    /// Bytes they covered.
    pub bytes: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Requests that were refused: out of bounds, or a change to a read-only disk.
    pub invalid: u64,
    /// Time spent in requests, failed ones included.
    pub time: Duration,
}

impl Totals {
    /// The counters of both.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            operations: self.operations + other.operations,
            bytes: self.bytes + other.bytes,
            failed: self.failed + other.failed,
            invalid: self.invalid + other.invalid,
            time: self.time + other.time,
        }
    }
}

impl Account {
    pub(super) fn invalid(&self, kind: Kind) {
        self.kinds[kind as usize]
            .invalid
            .fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn done(&self, kind: Kind, bytes: u64, time: Duration, ok: bool) {
        let counters = &self.kinds[kind as usize];
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        counters
            .nanoseconds
            .fetch_add(nanoseconds, Ordering::Relaxed);
        if ok {
            counters.operations.fetch_add(1, Ordering::Relaxed);
            counters.bytes.fetch_add(bytes, Ordering::Relaxed);
        } else {
            counters.failed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The counters of one kind now.
    pub fn totals(&self, kind: Kind) -> Totals {
        let counters = &self.kinds[kind as usize];
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Totals {
            operations: get(&counters.operations),
            bytes: get(&counters.bytes),
            failed: get(&counters.failed),
            invalid: get(&counters.invalid),
            time: Duration::from_nanos(get(&counters.nanoseconds)),
        }
    }
}

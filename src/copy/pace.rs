//! A limit on the rate at which a job moves bytes.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::copy::progress::Progress;
use crate::error::Result;

/// How often a worker that waits looks whether the user wants to stop.
const LOOK: Duration = Duration::from_millis(50);

/// Delays its callers so that together they move no more than so many bytes a second.
#[derive(Debug)]
pub(super) struct Pace {
    bytes_per_second: u64,
    /// When the bytes taken so far may have been moved.  Innermost.
    due: Mutex<Instant>,
}

impl Pace {
    /// A pace of `bytes_per_second`, which is not 0.
    pub(super) fn new(bytes_per_second: u64) -> Self {
        Self {
            bytes_per_second: bytes_per_second.max(1),
            due: Mutex::new(Instant::now()),
        }
    }

    /// Takes `bytes`; how long the caller has to wait before it moves them.
    pub(super) fn take(&self, bytes: u64) -> Duration {
        let now = Instant::now();
        let mut due = self.due.lock();
        let start = (*due).max(now);
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
        *due = start + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX >> 8));
        start - now
    }
}

/// Waits until `bytes` more may be moved, or the user wants to stop.
///
/// # Errors
/// `Cancelled`.
pub(super) fn wait(pace: Option<&Pace>, bytes: u64, progress: &dyn Progress) -> Result<()> {
    let mut rest = pace.map_or(Duration::ZERO, |p| p.take(bytes));
    while !rest.is_zero() {
        progress.check()?;
        let step = rest.min(LOOK);
        std::thread::sleep(step);
        rest -= step;
    }
    progress.check()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takers_wait_for_those_before_them() {
        let pace = Pace::new(1000);
        assert!(pace.take(500) < Duration::from_millis(1));
        let wait = pace.take(1000);
        assert!(wait > Duration::from_millis(400) && wait <= Duration::from_millis(500));
        assert!(pace.take(1) > Duration::from_millis(1300));
    }
}

//! Guest ranges that are being given space.
//!
//! A writer reserves its clusters, fills them with no lock held, publishes them and lets go.  A
//! second writer of the same cluster waits until then, and looks the cluster up again.

use std::ops::Range;

use parking_lot::{Condvar, Mutex};

use crate::util::range;

/// The ranges that are reserved now: one per thread at most, so a list serves.
#[derive(Debug, Default)]
pub struct Reservations {
    busy: Mutex<Vec<Range<u64>>>,
    freed: Condvar,
}

/// Holds a range; dropping it lets go.
#[derive(Debug)]
pub struct Reserved<'a> {
    owner: &'a Reservations,
    range: Range<u64>,
}

impl Reservations {
    /// Reserves `range`; or, where another thread holds part of it, waits until it has let go and
    /// answers `None`: what the caller knows about the range is then out of date.
    pub fn reserve(&self, range: Range<u64>) -> Option<Reserved<'_>> {
        let meets =
            |busy: &[Range<u64>]| busy.iter().any(|b| range::intersect(b, &range).is_some());
        let mut busy = self.busy.lock();
        if meets(&busy) {
            while meets(&busy) {
                self.freed.wait(&mut busy);
            }
            return None;
        }
        busy.push(range.clone());
        Some(Reserved { owner: self, range })
    }

    /// As [`Reservations::reserve`] for `must`, and as much of `wish` around it as nobody holds.
    pub fn reserve_around(&self, must: Range<u64>, wish: Range<u64>) -> Option<Reserved<'_>> {
        let mut busy = self.busy.lock();
        if !busy.iter().any(|b| range::intersect(b, &must).is_some()) {
            let before = busy.iter().filter(|b| b.end <= must.start).map(|b| b.end);
            let after = busy.iter().filter(|b| b.start >= must.end).map(|b| b.start);
            let start = before.max().unwrap_or(0).max(wish.start).min(must.start);
            let end = after.min().unwrap_or(u64::MAX).min(wish.end).max(must.end);
            busy.push(start..end);
            return Some(Reserved {
                owner: self,
                range: start..end,
            });
        }
        drop(busy);
        self.reserve(must).and(None)
    }

    /// As [`Reservations::reserve`], waiting for as long as it takes.
    pub fn wait(&self, range: &Range<u64>) -> Reserved<'_> {
        loop {
            if let Some(reserved) = self.reserve(range.clone()) {
                return reserved;
            }
        }
    }

    /// Whether part of `range` is reserved now.
    pub fn holds(&self, range: &Range<u64>) -> bool {
        let busy = self.busy.lock();
        busy.iter().any(|b| range::intersect(b, range).is_some())
    }
}

impl Reserved<'_> {
    /// What is held.
    pub fn range(&self) -> &Range<u64> {
        &self.range
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        let mut busy = self.owner.busy.lock();
        if let Some(index) = busy.iter().position(|b| *b == self.range) {
            busy.swap_remove(index);
        }
        self.owner.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn a_second_writer_waits_and_is_told_to_look_again() {
        let reservations = Reservations::default();
        let released = AtomicBool::new(false);
        let first = reservations.reserve(0..10).expect("nobody else is here");
        std::thread::scope(|scope| {
            let second = scope.spawn(|| {
                let answer = reservations.reserve(9..20).is_none();
                (answer, released.load(Ordering::SeqCst))
            });
            assert!(
                reservations.reserve(10..12).is_some(),
                "neighbours do not wait"
            );
            std::thread::sleep(std::time::Duration::from_millis(20));
            released.store(true, Ordering::SeqCst);
            drop(first);
            assert_eq!(second.join().expect("it ends"), (true, true));
        });
        assert!(reservations.reserve(0..20).is_some());
    }
}

//! Grace points: when freed host space may be reused.
//!
//! A reader that has looked up an offset may still be reading there when the space is freed.  Each
//! request holds a [`Ticket`] for as long as its I/O lasts; space freed at one moment is reused
//! only after every ticket taken before that moment has been dropped.  Tickets are owned and
//! `Send`, so a request may end on another thread than it began.
//!
//! Two counters are enough: the epoch moves on only when nobody of the epoch before is left, so at
//! any time tickets belong to the current epoch or the one before.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Shared by all layers of a disk and every request to it.
#[derive(Debug, Default)]
pub struct Grace {
    epoch: AtomicU64,
    active: [AtomicUsize; 2],
}

/// Held by a request while it may use host offsets that it has looked up.
#[derive(Debug)]
pub struct Ticket {
    grace: Arc<Grace>,
    slot: usize,
}

/// A moment; see [`Grace::passed`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(u64);

fn slot(epoch: u64) -> usize {
    usize::from(!epoch.is_multiple_of(2))
}

impl Grace {
    /// Starts a request.
    pub fn enter(self: &Arc<Self>) -> Ticket {
        loop {
            let epoch = self.epoch.load(Ordering::SeqCst);
            let slot = slot(epoch);
            self.active[slot].fetch_add(1, Ordering::SeqCst);
            if self.epoch.load(Ordering::SeqCst) == epoch {
                return Ticket {
                    grace: Arc::clone(self),
                    slot,
                };
            }
            self.active[slot].fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// The present moment, to be kept beside space that was just made unreachable.
    pub fn now(&self) -> Moment {
        Moment(self.epoch.load(Ordering::SeqCst))
    }

    /// Whether every request that began before `moment` was taken has ended.
    ///
    /// Never waits; a false answer may be true later.
    pub fn passed(&self, moment: Moment) -> bool {
        for _ in 0..2 {
            if self.epoch.load(Ordering::SeqCst) >= moment.0 + 2 {
                return true;
            }
            self.advance();
        }
        self.epoch.load(Ordering::SeqCst) >= moment.0 + 2
    }

    fn advance(&self) {
        let epoch = self.epoch.load(Ordering::SeqCst);
        let before = slot(epoch.wrapping_add(1));
        if self.active[before].load(Ordering::SeqCst) == 0 {
            let _ =
                self.epoch
                    .compare_exchange(epoch, epoch + 1, Ordering::SeqCst, Ordering::SeqCst);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.grace.active[self.slot].fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_passes_only_when_older_tickets_are_dropped() {
        let grace = Arc::new(Grace::default());
        let old = grace.enter();
        let moment = grace.now();
        assert!(!grace.passed(moment));
        let young = grace.enter();
        assert!(!grace.passed(moment));
        drop(old);
        drop(young);
        assert!(grace.passed(moment));
    }

    #[test]
    fn a_ticket_taken_after_the_moment_does_not_hold_it_for_ever() {
        let grace = Arc::new(Grace::default());
        let moment = grace.now();
        grace.passed(moment);
        grace.passed(moment);
        let _late = grace.enter();
        assert!(grace.passed(moment));
    }

    #[test]
    fn a_ticket_can_be_dropped_on_another_thread() {
        let grace = Arc::new(Grace::default());
        let ticket = grace.enter();
        let moment = grace.now();
        std::thread::spawn(move || drop(ticket))
            .join()
            .expect("the thread ends");
        assert!(grace.passed(moment));
    }
}

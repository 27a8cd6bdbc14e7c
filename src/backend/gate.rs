//! Letting requests in, or holding them; waiting until none is under way.
//!
//! A request counts itself in on its own queue's counter and then looks at the flags; whoever
//! sets a flag then waits for the counters.  One of the two always sees the other, and requests
//! of different queues share no line of the cache that is written to.

use std::fmt;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

/// Requests wait: paused by hand.
pub(super) const PAUSED: u8 = 1;
/// Requests wait: stopped by an error.
pub(super) const STOPPED: u8 = 2;
/// Requests wait: somebody changes what must not change under them.
pub(super) const BUSY: u8 = 4;
/// Requests wait: there is no image.
pub(super) const ABSENT: u8 = 8;
/// Requests are refused: it is over.
pub(super) const CLOSED: u8 = 16;

/// Called when requests that were held, or told to wait, may be tried again.
type Wake = dyn Fn() + Send + Sync;

/// Keeps a waker registered; dropping it ends that.
pub struct WakeHandle(#[expect(dead_code, reason = "held for its drop")] Arc<Wake>);

impl fmt::Debug for WakeHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WakeHandle")
    }
}

/// The requests of one queue that are under way.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Count(AtomicU32);

impl Count {
    /// How many there are now.
    pub(super) fn now(&self) -> u32 {
        self.0.load(Ordering::SeqCst)
    }

    /// Counts another one, for somebody who is in already.
    pub(super) fn add(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// Somebody who looks, and is counted until this is dropped.
#[derive(Debug)]
pub(super) struct Looking<'g>(&'g Gate, &'g Count);

impl Drop for Looking<'_> {
    fn drop(&mut self) {
        self.0.leave(self.1);
    }
}

/// What keeps requests out.
#[derive(Default)]
pub(super) struct Gate {
    flags: AtomicU8,
    /// Guards nothing: whoever waits, for a flag or for a counter, holds it while looking.
    wait: Mutex<()>,
    changed: Condvar,
    wakers: Mutex<Vec<Weak<Wake>>>,
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate")
            .field("flags", &self.flags())
            .finish()
    }
}

impl Gate {
    /// The flags now.
    pub(super) fn flags(&self) -> u8 {
        self.flags.load(Ordering::SeqCst)
    }

    /// Counts a request in, and says how many there are then; the flags, where they keep it out.
    pub(super) fn enter(&self, count: &Count) -> Result<u32, u8> {
        let before = count.0.fetch_add(1, Ordering::SeqCst);
        match self.flags() {
            0 => Ok(before + 1),
            flags => {
                self.leave(count);
                Err(flags)
            }
        }
    }

    /// Counts somebody in who only looks, once neither of `flags` is set; `None` where it is over.
    /// Counted out when dropped.
    pub(super) fn look<'g>(&'g self, count: &'g Count, flags: u8) -> Option<Looking<'g>> {
        loop {
            count.add();
            let looking = Looking(self, count);
            match self.flags() & (flags | CLOSED) {
                0 => return Some(looking),
                found if found & CLOSED != 0 => return None,
                _ => drop(looking),
            }
            let mut waiting = self.wait.lock();
            let keeps_out = |now: u8| now & flags != 0 && now & CLOSED == 0;
            while keeps_out(self.flags()) {
                self.changed.wait(&mut waiting);
            }
        }
    }

    /// Counts a request out.
    pub(super) fn leave(&self, count: &Count) {
        if count.0.fetch_sub(1, Ordering::SeqCst) == 1 && self.flags() != 0 {
            let _looking = self.wait.lock();
            self.changed.notify_all();
        }
    }

    /// Sets flags; requests that are under way go on.  Says which were set before.
    pub(super) fn set(&self, flags: u8) -> u8 {
        let before = self.flags.fetch_or(flags, Ordering::SeqCst);
        let _looking = self.wait.lock();
        self.changed.notify_all();
        before
    }

    /// Clears flags, and wakes whoever waits if nothing keeps requests out any more.
    pub(super) fn clear(&self, flags: u8) {
        let before = self.flags.fetch_and(!flags, Ordering::SeqCst);
        if before & !flags == 0 {
            self.wake();
        } else {
            // Those who only look may go on.
            let _looking = self.wait.lock();
            self.changed.notify_all();
        }
    }

    /// Tells everybody who waits to try again.
    pub(super) fn wake(&self) {
        {
            let _looking = self.wait.lock();
            self.changed.notify_all();
        }
        let wakers: Vec<_> = {
            let mut wakers = self.wakers.lock();
            wakers.retain(|w| w.strong_count() > 0);
            wakers.iter().filter_map(Weak::upgrade).collect()
        };
        wakers.iter().for_each(|wake| wake());
    }

    /// Registers a waker.
    pub(super) fn on_wake(&self, wake: Arc<Wake>) -> WakeHandle {
        self.wakers.lock().push(Arc::downgrade(&wake));
        WakeHandle(wake)
    }

    /// Waits until requests may come in, or never will again.
    pub(super) fn wait_open(&self) {
        let mut looking = self.wait.lock();
        loop {
            let flags = self.flags();
            if flags == 0 || flags & CLOSED != 0 {
                return;
            }
            self.changed.wait(&mut looking);
        }
    }

    /// Waits until a moment, or until somebody is woken.
    pub(super) fn wait_until(&self, until: Instant) {
        let mut looking = self.wait.lock();
        self.changed.wait_until(&mut looking, until);
    }

    /// Waits until no request is under way on any queue.  A flag that keeps them out must be set.
    pub(super) fn drain(&self, counts: &[&Count]) {
        let mut looking = self.wait.lock();
        while counts.iter().any(|count| count.now() > 0) {
            self.changed.wait(&mut looking);
        }
    }
}

//! What a request of one queue needs of its backend, found by one look.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::RwLock;

use super::Membership;
use super::account::Account;
use super::gate::{Count, Gate};
use crate::chain::Chain;
use crate::storage::highwater::HighWater;

/// One queue, over the chain as it is now.
#[derive(Debug, Clone)]
pub(super) struct Lane {
    pub(super) queue: Arc<Queue>,
    pub(super) gate: Arc<Gate>,
    pub(super) chain: Arc<Chain>,
    pub(super) high: Option<Arc<HighWater>>,
    pub(super) limits: Option<Arc<Membership>>,
}

/// What a queue keeps whatever the chain.
#[derive(Debug, Default)]
pub(super) struct Queue {
    /// Requests that any thread may end.
    pub(super) count: Count,
    /// 1 while the queue's owner has requests under way.
    pub(super) held: Count,
    /// How many those are.
    owned: AtomicU32,
    pub(super) account: Account,
}

impl Queue {
    /// Requests under way.
    pub(super) fn depth(&self) -> u32 {
        self.count.now() + self.owned.load(Ordering::Relaxed)
    }

    /// Notes how many requests the queue's owner has under way.
    pub(super) fn owned(&self, under_way: u32) {
        self.owned.store(under_way, Ordering::Relaxed);
        self.account.depth(self.count.now() + under_way);
    }
}

/// Where the lane of a queue is found.  It is locked for as long as it takes to clone a pointer, on
/// a line of the cache of its own.
#[derive(Debug)]
#[repr(align(128))]
pub(super) struct Place {
    lane: RwLock<Arc<Lane>>,
    /// Another one after each change.
    version: AtomicU32,
}

impl Place {
    pub(super) fn new(lane: Lane) -> Self {
        Self {
            lane: RwLock::new(Arc::new(lane)),
            version: AtomicU32::new(0),
        }
    }

    /// The lane as it is now; it stays as it is, whatever becomes of the place.
    pub(super) fn lane(&self) -> Arc<Lane> {
        Arc::clone(&self.lane.read())
    }

    /// What has to be looked at before [`Place::lane`] to know later whether that is old.
    pub(super) fn version(&self) -> u32 {
        self.version.load(Ordering::Acquire)
    }

    /// Puts another lane in the place of the one that is there.
    pub(super) fn change(&self, next: impl FnOnce(Lane) -> Lane) {
        let old = {
            let mut lane = self.lane.write();
            let next = Arc::new(next(Lane::clone(&lane)));
            let old = std::mem::replace(&mut *lane, next);
            self.version.fetch_add(1, Ordering::Release);
            old
        };
        // It may be the last to hold an image, which takes its time to go.
        drop(old);
    }
}

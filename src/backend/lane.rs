//! What a request of one queue needs of its backend, found by one look.

use std::sync::Arc;

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
    pub(super) count: Count,
    pub(super) account: Account,
}

/// Where the lane of a queue is found.  It is locked for as long as it takes to clone a pointer, on
/// a line of the cache of its own.
#[derive(Debug)]
#[repr(align(128))]
pub(super) struct Place(RwLock<Arc<Lane>>);

impl Place {
    pub(super) fn new(lane: Lane) -> Self {
        Self(RwLock::new(Arc::new(lane)))
    }

    /// The lane as it is now; it stays as it is, whatever becomes of the place.
    pub(super) fn lane(&self) -> Arc<Lane> {
        Arc::clone(&self.0.read())
    }

    /// Puts another lane in the place of the one that is there.
    pub(super) fn change(&self, next: impl FnOnce(Lane) -> Lane) {
        let old = {
            let mut lane = self.0.write();
            let next = Arc::new(next(Lane::clone(&lane)));
            std::mem::replace(&mut *lane, next)
        };
        // It may be the last to hold an image, which takes its time to go.
        drop(old);
    }
}

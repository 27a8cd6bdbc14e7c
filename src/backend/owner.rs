//! The requests of a queue that one thread alone lets in and ends.
//!
//! [`Backend::admit`] serves any thread, and takes hold of the gate, the lane and the counters for
//! each request.  A thread that has a queue for itself holds them once, for as long as any of its
//! requests is under way, and counts in memory of its own.

use std::sync::Arc;

use super::account::Tally;
use super::{Admission, Backend, Lane, Moment, Moving, QueueId, Shape, Ticket, Verdict};
use crate::chain::Chain;
use crate::error::Result;

/// What a thread holds of a backend for the requests of its queue.
///
/// [`Owner::settle`] is to be called after each lot of requests, before the thread waits for more:
/// until then what has ended is not seen by statistics, nor by who waits for a pause.
#[derive(Debug)]
pub struct Owner {
    backend: Arc<Backend>,
    queue: QueueId,
    /// Held while requests are under way, and until [`Owner::settle`].
    lane: Option<Arc<Lane>>,
    /// When the lane was looked for.
    version: u32,
    /// Requests that were let in here and have not ended.
    under_way: u32,
    tally: Tally,
}

impl Owner {
    /// For the thread that has a queue for itself.  Others may let in requests by
    /// [`Backend::admit`], but no two have one owner each.
    pub fn new(backend: Arc<Backend>, queue: QueueId) -> Self {
        Self {
            backend,
            queue,
            lane: None,
            version: 0,
            under_way: 0,
            tally: Tally::default(),
        }
    }

    /// As [`Backend::admit_at`]; one that was let in is to be ended by [`Owner::complete`],
    /// [`Owner::hand_over`] or [`Owner::give_up`].
    #[inline]
    pub fn admit(&mut self, shape: &Shape, now: Moment) -> Admission<()> {
        let (true, Some(lane)) = (self.enter(), &self.lane) else {
            return self.backend.kept_out();
        };
        if let Err(kept) = self.backend.consider(lane, shape, now) {
            return kept;
        }
        self.under_way += 1;
        lane.queue.owned(self.under_way);
        Admission::Admitted(())
    }

    /// Sees to it that the lane is there, and is the latest; false where requests are kept out.
    fn enter(&mut self) -> bool {
        let gate = &self.backend.gate;
        let in_already = self.lane.is_some();
        if in_already && gate.flags() != 0 {
            return false;
        }
        if !in_already && gate.enter(&self.backend.queue(self.queue).held).is_err() {
            return false;
        }
        // Who is in keeps the chain as it is: only the limits of a lane can be old.
        let place = self.backend.place(self.queue);
        let latest = place.version();
        if !in_already || self.version != latest {
            self.lane = Some(place.lane());
            self.version = latest;
        }
        true
    }

    /// The disk as it is while a request is under way; `None` where none is.
    pub fn chain(&self) -> Option<&Chain> {
        self.lane.as_ref().map(|lane| &*lane.chain)
    }

    /// Who may move the bytes of a request; see [`Ticket::moving`].
    pub fn moving(&self, shape: &Shape) -> Moving {
        self.backend.moving(shape)
    }

    /// Whether anybody wants to know where in the image's file is written.
    pub fn is_watched(&self) -> bool {
        self.lane.as_ref().is_some_and(|lane| lane.high.is_some())
    }

    /// As [`Ticket::wrote`].
    pub fn wrote(&self, end: u64) {
        if let Some(high) = self.lane.as_ref().and_then(|lane| lane.high.as_ref()) {
            high.wrote(end);
        }
    }

    /// Ends a request that was let in at `begun`, as [`Backend::complete_at`].
    #[inline]
    pub fn complete(
        &mut self,
        shape: &Shape,
        begun: Moment,
        result: Result<()>,
        now: Moment,
    ) -> Verdict {
        let spent = now.0.saturating_sub(begun.0);
        self.tally
            .done(shape.kind, shape.len(), spent, result.is_ok(), now.0);
        if let Some(lane) = &self.lane {
            self.backend.look_at_mark(lane);
        }
        self.give_up();
        self.backend.verdict(shape.kind, result)
    }

    /// Turns a request that was let in at `begun` into one that any thread may end; `None` where
    /// none was let in.
    pub fn hand_over(&mut self, shape: &Shape, begun: Moment) -> Option<Ticket> {
        let lane = Arc::clone(self.lane.as_ref()?);
        lane.queue.count.add();
        self.give_up();
        Some(Ticket {
            lane,
            shape: shape.clone(),
            begun,
            plain: self.backend.moving(shape),
        })
    }

    /// Lets go of a request that was let in, uncounted.
    pub fn give_up(&mut self) {
        self.under_way = self.under_way.saturating_sub(1);
    }

    /// Counts what has ended, and lets go of the backend where nothing is under way.
    pub fn settle(&mut self) {
        let Some(lane) = &self.lane else { return };
        lane.queue.account.add(&mut self.tally);
        lane.queue.owned(self.under_way);
        if self.under_way == 0
            && let Some(lane) = self.lane.take()
        {
            // The lane goes first: who waits for the gate may want the image for itself.
            let (gate, queue) = (Arc::clone(&lane.gate), Arc::clone(&lane.queue));
            drop(lane);
            gate.leave(&queue.held);
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.under_way = 0;
        self.settle();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::backend::{Group, Kind, Limits, OnError, Policy, RunState, Settings};
    use crate::chain::Base;
    use crate::error::{Error, ErrorKind};
    use crate::formats::raw;
    use crate::image::open::OpenOptions;
    use crate::storage::memory::MemoryStorage;
    use crate::storage::open::Access;

    const QUEUE: QueueId = QueueId(0);

    fn chain(len: usize) -> Chain {
        let options = OpenOptions {
            access: Access::Write,
            ..OpenOptions::default()
        };
        let storage = Arc::new(MemoryStorage::from_bytes(&vec![5; len]));
        let image = (raw::DRIVER.open)(storage, &options).expect("raw opens");
        Chain::new(vec![image], Base::Zeroes, options.grace).expect("one layer")
    }

    fn owner() -> (Arc<Backend>, Owner) {
        let settings = Settings {
            policy: Policy {
                on_read: OnError::Report,
                on_write: OnError::Stop,
            },
            ..Settings::default()
        };
        let backend = Backend::with_settings(chain(8192), settings).expect("settings make sense");
        let backend = Arc::new(backend);
        (Arc::clone(&backend), Owner::new(backend, QUEUE))
    }

    fn shape(kind: Kind) -> Shape {
        Shape {
            kind,
            range: 0..4096,
            fua: false,
        }
    }

    /// Lets a request in, at the moment that is given back.
    fn begin(owner: &mut Owner, kind: Kind) -> Moment {
        let now = owner.backend.moment();
        let admission = owner.admit(&shape(kind), now);
        assert!(
            matches!(admission, Admission::Admitted(())),
            "{admission:?}"
        );
        now
    }

    fn end(owner: &mut Owner, kind: Kind, begun: Moment, result: Result<()>) -> Verdict {
        let now = owner.backend.moment();
        owner.complete(&shape(kind), begun, result, now)
    }

    #[test]
    fn a_pause_waits_until_the_owner_has_settled_and_holds_the_rest() {
        let (backend, mut owner) = owner();
        let [first, second] = [Kind::Read, Kind::Write].map(|kind| begin(&mut owner, kind));
        owner.settle();
        assert_eq!(backend.stats()[0].depth, 2);
        let paused = std::thread::spawn({
            let backend = Arc::clone(&backend);
            move || backend.pause()
        });
        while backend.run_state() != RunState::Paused {
            std::thread::yield_now();
        }
        let now = backend.moment();
        let held = owner.admit(&shape(Kind::Read), now);
        assert!(matches!(held, Admission::Held), "{held:?}");
        let _ = end(&mut owner, Kind::Read, first, Ok(()));
        owner.settle();
        std::thread::sleep(Duration::from_millis(20));
        assert!(!paused.is_finished(), "a write is under way");
        let _ = end(&mut owner, Kind::Write, second, Ok(()));
        owner.settle();
        paused.join().expect("pauses");
        let held = owner.admit(&shape(Kind::Read), now);
        assert!(matches!(held, Admission::Held), "{held:?}");
        backend.resume();
        begin(&mut owner, Kind::Read);
        backend.shut();
        let refused = owner.admit(&shape(Kind::Read), now);
        assert!(matches!(refused, Admission::Refused(_)), "{refused:?}");
    }

    #[test]
    fn an_owner_at_rest_lets_an_image_go_and_finds_the_next_one() {
        let (backend, mut owner) = owner();
        let begun = begin(&mut owner, Kind::Read);
        let size = |owner: &Owner| owner.chain().map(Chain::virtual_size);
        assert_eq!(size(&owner), Some(8192));
        let _ = end(&mut owner, Kind::Read, begun, Ok(()));
        owner.settle();
        assert_eq!(size(&owner), None);
        // It waits until nobody has the old one.
        backend
            .reopen(|| Ok(chain(16384).into()))
            .expect("is changed");
        begin(&mut owner, Kind::Read);
        assert_eq!(size(&owner), Some(16384));
        drop(owner);
        backend.change(chain(4096).into()).expect("nobody is left");
    }

    #[test]
    fn limits_hold_for_the_next_request_while_others_are_under_way() {
        let (backend, mut owner) = owner();
        begin(&mut owner, Kind::Read);
        let limits = Limits::parse(["iops=1"].into_iter()).expect("makes sense");
        backend.set_group(Some(&Arc::new(Group::new(limits))));
        begin(&mut owner, Kind::Read);
        let now = backend.moment();
        let late = owner.admit(&shape(Kind::Read), now);
        assert!(matches!(late, Admission::NotBefore(_)), "{late:?}");
        backend.set_group(None);
        begin(&mut owner, Kind::Read);
        owner.settle();
        assert_eq!(backend.stats()[0].depth, 3);
    }

    #[test]
    fn what_is_handed_over_stays_under_way_and_all_is_counted_once() {
        let (backend, mut owner) = owner();
        let first = begin(&mut owner, Kind::Read);
        let second = begin(&mut owner, Kind::Read);
        let third = begin(&mut owner, Kind::Read);
        let ticket = owner.hand_over(&shape(Kind::Read), second);
        let ticket = ticket.expect("one was let in");
        owner.give_up();
        let _ = end(&mut owner, Kind::Read, first.min(third), Ok(()));
        owner.settle();
        let stats = backend.stats()[0];
        assert_eq!((stats.depth, stats.deepest), (1, 3));
        assert_eq!(stats.kind(Kind::Read).operations, 1);
        let _ = backend.complete(ticket, Ok(()));
        let stats = backend.stats()[0];
        assert_eq!((stats.depth, stats.kind(Kind::Read).operations), (0, 2));
        assert_eq!(stats.kind(Kind::Read).bytes, 8192);
        assert!(owner.hand_over(&shape(Kind::Read), first).is_none());
    }

    #[test]
    fn errors_are_judged_as_others_are_and_wrong_requests_take_no_place() {
        let (backend, mut owner) = owner();
        let begun = begin(&mut owner, Kind::Write);
        let failed = Err(Error::new(ErrorKind::Io, "broken"));
        let verdict = end(&mut owner, Kind::Write, begun, failed);
        assert!(matches!(verdict, Verdict::Hold), "{verdict:?}");
        assert_eq!(backend.run_state(), RunState::Stopped);
        let now = backend.moment();
        let held = owner.admit(&shape(Kind::Read), now);
        assert!(matches!(held, Admission::Held), "{held:?}");
        backend.resume();
        let past = Shape {
            range: 8192..12288,
            ..shape(Kind::Read)
        };
        let refused = owner.admit(&past, now);
        assert!(matches!(refused, Admission::Refused(_)), "{refused:?}");
        owner.settle();
        let stats = backend.stats()[0];
        assert_eq!((stats.depth, stats.kind(Kind::Read).invalid), (0, 1));
        assert_eq!(stats.kind(Kind::Write).failed, 1);
        backend.pause();
    }
}

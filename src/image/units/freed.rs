//! Host space that nothing names any more, until it may be used again.
//!
//! A reader that looked an entry up before it changed may still be reading there, and a power cut
//! may bring the old entry back.  So freed space waits for two things: that all requests that had
//! begun have ended (its grace point), and that the change that freed it is on stable media.  Where a
//! sync has failed since, nobody knows whether it is, however many succeed after it: such space is
//! kept until the image is opened anew.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use crate::error::Result;
use crate::image::units::order::{Moment, Order};
use crate::util::grace::{self, Grace};
use crate::util::range;

/// Ranges of host bytes that were freed, oldest first.
#[derive(Debug, Default)]
pub struct Freed {
    batches: VecDeque<Batch>,
    ranges: usize,
    bytes: u64,
    /// What stable media may still name.
    lost: Vec<Range<u64>>,
}

/// What was freed in one moment.
#[derive(Debug)]
struct Batch {
    ranges: Vec<Range<u64>>,
    grace: grace::Moment,
    written: Moment,
}

impl Freed {
    /// Adds a range of host bytes whose last entry was changed in the file before this call.
    pub fn push(&mut self, host: Range<u64>, order: &Order, grace: &Arc<Grace>) {
        let (grace, written) = (grace.now(), order.now());
        self.bytes += range::len(&host);
        let same = |b: &&mut Batch| b.grace == grace && b.written == written;
        let Some(batch) = self.batches.back_mut().filter(same) else {
            self.ranges += 1;
            self.batches.push_back(Batch {
                ranges: vec![host],
                grace,
                written,
            });
            return;
        };
        match batch.ranges.last_mut() {
            Some(last) if last.end == host.start => last.end = host.end,
            _ => {
                self.ranges += 1;
                batch.ranges.push(host);
            }
        }
    }

    /// Number of ranges that wait.
    pub fn len(&self) -> usize {
        self.ranges
    }

    /// Bytes that wait.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.ranges == 0
    }

    /// All ranges that wait, or that are kept, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &Range<u64>> {
        self.batches
            .iter()
            .flat_map(|b| &b.ranges)
            .chain(&self.lost)
    }

    /// Takes out what has passed its grace point and is known to be gone from stable media.
    pub fn ready(&mut self, order: &Order, grace: &Grace) -> Vec<Range<u64>> {
        self.keep_lost(order);
        self.take(|batch| {
            order.is_settled(batch.written, batch.written) && grace.passed(batch.grace)
        })
    }

    /// As `ready`, having waited until all that has passed its grace point is gone from stable media
    /// too.
    ///
    /// # Errors
    /// The host's.
    pub fn settled(
        freed: &parking_lot::Mutex<Self>,
        order: &Order,
        grace: &Grace,
    ) -> Result<Vec<Range<u64>>> {
        let (oldest, ranges) = {
            let mut freed = freed.lock();
            freed.keep_lost(order);
            let unsettled = freed
                .batches
                .iter()
                .find(|b| !order.is_settled(b.written, b.written));
            let oldest = unsettled.map(|b| b.written);
            (oldest, freed.take(|b| grace.passed(b.grace)))
        };
        if let Some(oldest) = oldest.filter(|_| !ranges.is_empty())
            && let Err(e) = order.settle(oldest)
        {
            freed.lock().lost.extend(ranges);
            return Err(e);
        }
        Ok(ranges)
    }

    /// Keeps for good all that waits: what named it before may do so again.
    pub fn keep_all(&mut self) {
        self.keep(self.batches.len());
    }

    /// Keeps for good what was freed before a sync that failed.
    fn keep_lost(&mut self, order: &Order) {
        let lost = |b: &Batch| order.has_failed_since(b.written);
        self.keep(self.batches.iter().take_while(|b| lost(b)).count());
    }

    fn keep(&mut self, count: usize) {
        for batch in self.batches.drain(..count) {
            self.ranges -= batch.ranges.len();
            self.bytes -= batch.ranges.iter().map(range::len).sum::<u64>();
            self.lost.extend(batch.ranges);
        }
    }

    /// Takes the oldest out for as long as `may_go` says so.
    fn take(&mut self, may_go: impl Fn(&Batch) -> bool) -> Vec<Range<u64>> {
        let mut taken = Vec::new();
        while self.batches.front().is_some_and(&may_go) {
            if let Some(batch) = self.batches.pop_front() {
                self.ranges -= batch.ranges.len();
                self.bytes -= batch.ranges.iter().map(range::len).sum::<u64>();
                taken.extend(batch.ranges);
            }
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::open::WriteOrder;
    use crate::storage::memory::MemoryStorage;
    use parking_lot::Mutex;

    #[test]
    fn space_waits_for_readers_and_for_stable_media() {
        let order = Order::new(WriteOrder::Ordered, Arc::new(MemoryStorage::new()), None);
        let grace = Arc::new(Grace::default());
        let mut freed = Freed::default();
        let reader = grace.enter();
        freed.push(0..10, &order, &grace);
        freed.push(10..20, &order, &grace);
        assert_eq!(freed.len(), 1, "neighbours are one");
        assert!(freed.ready(&order, &grace).is_empty());
        order.flush().expect("syncs");
        assert!(freed.ready(&order, &grace).is_empty(), "still read");
        drop(reader);
        assert!(freed.ready(&order, &grace).iter().eq([&(0..20)]));
        freed.push(20..30, &order, &grace);
        assert!(freed.ready(&order, &grace).is_empty(), "not yet durable");
        let freed = Mutex::new(freed);
        let settled = Freed::settled(&freed, &order, &grace);
        assert!(settled.expect("waits for it").iter().eq([&(20..30)]));
        assert!(freed.lock().is_empty());
    }
}

//! Host space that nothing names any more, until it may be used again.
//!
//! A reader that looked an entry up before it changed may still be reading there, and a power cut
//! may bring the old entry back.  So freed space waits for two things: that all requests that had
//! begun have ended (its grace point), and that the change that freed it is on stable media.  After a
//! sync that failed nothing gets there: such space is kept until the image is opened anew.

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

    /// All ranges that wait.
    pub fn iter(&self) -> impl Iterator<Item = &Range<u64>> {
        self.batches.iter().flat_map(|b| &b.ranges)
    }

    /// Takes out what has passed its grace point and is known to be gone from stable media.
    pub fn ready(&mut self, order: &Order, grace: &Grace) -> Vec<Range<u64>> {
        let mut taken = Vec::new();
        let may_go = |b: &mut Batch| order.is_settled(b.written) && grace.passed(b.grace);
        while let Some(batch) = self.batches.pop_front_if(may_go) {
            self.ranges -= batch.ranges.len();
            self.bytes -= batch.ranges.iter().map(range::len).sum::<u64>();
            taken.extend(batch.ranges);
        }
        taken
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
        let waits = |b: &Batch| grace.passed(b.grace) && !order.is_settled(b.written);
        let waits = freed.lock().batches.iter().any(waits);
        if waits {
            order.settle()?;
        }
        Ok(freed.lock().ready(order, grace))
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

//! The order of writes to the files of one image: what is on stable media before what.
//!
//! An image is one file, or two: its metadata, and a data file.  A [`Moment`] is taken before the
//! first write that something later depends on; [`Order::settle`] then returns once all that was
//! written since is on stable media.  However many threads wait, one sync serves them.

use std::sync::Arc;

use crate::error::Result;
use crate::image::open::WriteOrder;
use crate::storage::Storage;
use crate::storage::syncs::{Stamp, Syncs};

/// Who waits for whom among the writes to an image.
#[derive(Debug)]
pub struct Order {
    policy: WriteOrder,
    metadata: Ordered,
    /// Where guest data is, when that is another file.
    data: Option<Ordered>,
}

#[derive(Debug)]
struct Ordered {
    file: Arc<dyn Storage>,
    syncs: Syncs,
}

/// A moment in the life of all files of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    metadata: Stamp,
    data: Option<Stamp>,
}

impl Ordered {
    fn new(file: Arc<dyn Storage>) -> Self {
        Self {
            file,
            syncs: Syncs::default(),
        }
    }
}

impl Order {
    /// The order of an image whose metadata is in `metadata`, and its guest data in `data`, where
    /// that is a file of its own.
    pub fn new(
        policy: WriteOrder,
        metadata: Arc<dyn Storage>,
        data: Option<Arc<dyn Storage>>,
    ) -> Self {
        Self {
            policy,
            metadata: Ordered::new(metadata),
            data: data.map(Ordered::new),
        }
    }

    /// Whether metadata waits for data.
    pub fn policy(&self) -> WriteOrder {
        self.policy
    }

    /// The present moment: to be taken before the writes that [`Order::settle`] waits for, and after
    /// those that [`Order::is_settled`] is asked about.
    pub fn now(&self) -> Moment {
        Moment {
            metadata: self.metadata.syncs.stamp(),
            data: self.data.as_ref().map(|d| d.syncs.stamp()),
        }
    }

    /// Returns once all writes since `since` come before those that follow, in a power cut too; at
    /// once where no order was asked for.
    ///
    /// # Errors
    /// The host's, and that of any sync since then: it may have lost the writes.
    pub fn settle(&self, since: Moment) -> Result<()> {
        if self.policy == WriteOrder::Unordered {
            return Ok(());
        }
        if let (Some(data), Some(stamp)) = (&self.data, since.data) {
            data.syncs.wait(&*data.file, stamp)?;
        }
        let metadata = &self.metadata;
        metadata.syncs.wait(&*metadata.file, since.metadata)
    }

    /// As [`Order::settle`], for all writes so far; for who runs alone.
    ///
    /// # Errors
    /// As there.
    pub fn settle_all(&self) -> Result<()> {
        self.settle(self.now())
    }

    /// Whether all that was written from before `first` until `last` is known to be on stable media,
    /// or nobody asked for an order.
    pub fn is_settled(&self, first: Moment, last: Moment) -> bool {
        let data = match (&self.data, first.data, last.data) {
            (Some(data), Some(first), Some(last)) => data.syncs.is_durable_since(first, last),
            _ => true,
        };
        let metadata = &self.metadata.syncs;
        self.policy == WriteOrder::Unordered
            || (data && metadata.is_durable_since(first.metadata, last.metadata))
    }

    /// Whether a sync has failed since `moment`, so that what was written before may be lost whatever
    /// follows; never where nobody asked for an order.
    pub fn has_failed_since(&self, moment: Moment) -> bool {
        let files = [
            (Some(&self.metadata), Some(moment.metadata)),
            (self.data.as_ref(), moment.data),
        ];
        let mut files = files.iter().filter_map(|(file, stamp)| (*file).zip(*stamp));
        self.policy == WriteOrder::Ordered
            && files.any(|(file, stamp)| file.syncs.has_failed_since(stamp))
    }

    /// Makes all completed writes durable.
    ///
    /// # Errors
    /// The host's; a sync that failed since the last flush is told of once.
    pub fn flush(&self) -> Result<()> {
        if let Some(data) = &self.data {
            data.syncs.flush(&*data.file)?;
        }
        self.metadata.syncs.flush(&*self.metadata.file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::{Change, Fault, MemoryStorage, Op};

    fn files() -> (Arc<MemoryStorage>, Arc<MemoryStorage>) {
        let files = (MemoryStorage::new(), MemoryStorage::new());
        files.0.record();
        files.1.record();
        (Arc::new(files.0), Arc::new(files.1))
    }

    #[test]
    fn data_is_on_stable_media_before_metadata_and_both_before_the_answer() {
        let (metadata, data) = files();
        let order = Order::new(WriteOrder::Ordered, metadata.clone(), Some(data.clone()));
        let since = order.now();
        assert!(!order.is_settled(since, since));
        data.inject(Fault {
            op: Op::Sync,
            after: 0,
            count: 1,
            errno: libc::EIO,
        });
        order.settle(since).expect_err("the data was lost");
        assert!(metadata.changes().is_empty(), "nothing follows lost data");
        order
            .settle(order.now())
            .expect("later writes are not lost");
        assert!(!order.is_settled(since, since));
        assert_eq!(metadata.changes(), [Change::Sync]);
        order.flush().expect_err("a flush tells of it");
        order.flush().expect("once");
    }

    #[test]
    fn without_an_order_nothing_waits() {
        let (metadata, _) = files();
        let order = Order::new(WriteOrder::Unordered, metadata.clone(), None);
        order.settle(order.now()).expect("does nothing");
        assert!(order.is_settled(order.now(), order.now()));
        assert!(metadata.changes().is_empty());
    }
}

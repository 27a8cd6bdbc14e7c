//! The order of writes to the files of one image: what is on stable media before what.
//!
//! An image is one file, or two: its metadata, and a data file.  [`Order::settle`] returns once all
//! that was written to them is on stable media; however many threads wait, one sync serves them.  Where
//! one has ever failed, none succeeds ([`crate::storage::syncs`]): nothing that rests on it is published.

use std::sync::Arc;

use crate::error::Result;
use crate::image::open::WriteOrder;
use crate::storage::Storage;
use crate::storage::syncs::Stamp;

/// Who waits for whom among the writes to an image.
#[derive(Debug)]
pub struct Order {
    policy: WriteOrder,
    metadata: Arc<dyn Storage>,
    /// Where guest data is, when that is another file.
    data: Option<Arc<dyn Storage>>,
}

/// A moment in the life of all files of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    metadata: Stamp,
    data: Option<Stamp>,
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
            metadata,
            data,
        }
    }

    /// Whether metadata waits for data.
    pub fn policy(&self) -> WriteOrder {
        self.policy
    }

    /// The present moment, after the writes that [`Order::is_settled`] is asked about.
    pub fn now(&self) -> Moment {
        Moment {
            metadata: self.metadata.syncs().stamp(),
            data: self.data.as_ref().map(|d| d.syncs().stamp()),
        }
    }

    /// Returns once all writes so far come before those that follow, in a power cut too; at once where
    /// no order was asked for.
    ///
    /// # Errors
    /// Those of [`Order::flush`].
    pub fn settle(&self) -> Result<()> {
        match self.policy {
            WriteOrder::Ordered => self.flush(),
            WriteOrder::Unordered => Ok(()),
        }
    }

    /// Whether all that was written until `moment` is known to be on stable media, or nobody asked for
    /// an order.
    pub fn is_settled(&self, moment: Moment) -> bool {
        let data = match (&self.data, moment.data) {
            (Some(data), Some(stamp)) => data.syncs().is_durable(stamp),
            _ => true,
        };
        self.policy == WriteOrder::Unordered
            || (data && self.metadata.syncs().is_durable(moment.metadata))
    }

    /// Refuses an image a sync of which has failed.
    ///
    /// # Errors
    /// `Io`, which names the file.
    pub fn sound(&self) -> Result<()> {
        let mut files = self.data.iter().chain([&self.metadata]);
        files.try_for_each(|file| file.syncs().sound(file.path()))
    }

    /// Makes all completed writes durable.
    ///
    /// # Errors
    /// The host's; where a sync has failed, for as long as the image is open.
    pub fn flush(&self) -> Result<()> {
        let mut files = self.data.iter().chain([&self.metadata]);
        files.try_for_each(|file| file.sync())
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
        assert!(!order.is_settled(since));
        data.inject(Fault {
            op: Op::Sync,
            after: 0,
            count: 1,
            errno: libc::EIO,
        });
        order.settle().expect_err("the data was lost");
        order.settle().expect_err("for good");
        assert!(metadata.changes().is_empty(), "nothing follows lost data");
        order.sound().expect_err("may be lost");
        data.open_anew();
        order.settle().expect("is another file");
        assert!(order.is_settled(since));
        assert_eq!(metadata.changes(), [Change::Sync]);
    }

    #[test]
    fn without_an_order_nothing_waits() {
        let (metadata, _) = files();
        let order = Order::new(WriteOrder::Unordered, metadata.clone(), None);
        order.settle().expect("does nothing");
        assert!(order.is_settled(order.now()));
        assert!(metadata.changes().is_empty());
    }
}

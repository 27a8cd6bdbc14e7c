//! Remembering how far into a host object has been written.
//!
//! Thin volumes are made longer when the image in them grows: whoever does that wants to know the
//! highest offset written, and to be told when it passes a mark.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::Result;
use crate::storage::syncs::Syncs;
use crate::storage::{HostId, HostRun, Limits, Storage, Zeroing};
use crate::util::align::len64;

/// No mark.
const NONE: u64 = u64::MAX;

/// The end of the highest write to a host object since it was opened, and a mark.
#[derive(Debug)]
pub struct HighWater {
    end: AtomicU64,
    mark: AtomicU64,
}

impl HighWater {
    /// Nothing was written yet; `mark` is the offset whose passing is told.
    pub fn new(mark: Option<u64>) -> Self {
        Self {
            end: AtomicU64::new(0),
            mark: AtomicU64::new(mark.unwrap_or(NONE)),
        }
    }

    /// Notes a write that ended at host offset `end`.
    pub fn wrote(&self, end: u64) {
        // Most writes are below it, and then nobody's cache line is taken away.
        if self.end.load(Ordering::Relaxed) < end {
            self.end.fetch_max(end, Ordering::Relaxed);
        }
    }

    /// End of the highest write, as a host offset in bytes; 0 before the first.
    pub fn end(&self) -> u64 {
        self.end.load(Ordering::Relaxed)
    }

    /// The mark that has been passed; each mark is told to one caller, once.
    pub fn passed(&self) -> Option<u64> {
        let mark = self.mark.load(Ordering::Relaxed);
        if mark == NONE || self.end() <= mark {
            return None;
        }
        let taken = self
            .mark
            .compare_exchange(mark, NONE, Ordering::Relaxed, Ordering::Relaxed);
        taken.ok()
    }

    /// Sets another mark, or none.
    pub fn set_mark(&self, mark: Option<u64>) {
        self.mark.store(mark.unwrap_or(NONE), Ordering::Relaxed);
    }
}

/// Storage that notes in a [`HighWater`] what is written through it.
#[derive(Debug)]
pub struct Watched {
    inner: Arc<dyn Storage>,
    high: Arc<HighWater>,
}

impl Watched {
    /// Wraps `inner`.
    pub fn new(inner: Arc<dyn Storage>, high: Arc<HighWater>) -> Self {
        Self { inner, high }
    }
}

impl Storage for Watched {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn has_fixed_len(&self) -> bool {
        self.inner.has_fixed_len()
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn path(&self) -> Option<&Path> {
        self.inner.path()
    }

    fn host_id(&self) -> Option<HostId> {
        self.inner.host_id()
    }

    /// The inner one: who writes through it tells the [`HighWater`] too.
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.fd()
    }

    fn fd_for(&self, host: &Range<u64>, unit: u64) -> Option<BorrowedFd<'_>> {
        self.inner.fd_for(host, unit)
    }

    fn locked_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.locked_fd()
    }

    fn read_at(&self, buf: &mut [u8], host: u64) -> Result<()> {
        self.inner.read_at(buf, host)
    }

    fn read_alone(&self, buf: &mut [u8], host: u64) -> Result<()> {
        self.inner.read_alone(buf, host)
    }

    fn write_at(&self, buf: &[u8], host: u64) -> Result<()> {
        self.inner.write_at(buf, host)?;
        self.high.wrote(host.saturating_add(len64(buf.len())));
        Ok(())
    }

    fn zero(&self, host: Range<u64>, how: Zeroing) -> Result<()> {
        let end = host.end;
        self.inner.zero(host, how)?;
        if how == Zeroing::KeepSpace {
            self.high.wrote(end);
        }
        Ok(())
    }

    fn discard(&self, host: Range<u64>) -> Result<()> {
        self.inner.discard(host)
    }

    fn run(&self, host: u64, len: u64) -> Result<HostRun> {
        self.inner.run(host, len)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.inner.set_len(len)
    }

    fn sync_now(&self) -> Result<()> {
        self.inner.sync_now()
    }

    fn syncs(&self) -> &Syncs {
        self.inner.syncs()
    }

    fn write_back(&self, host: Range<u64>) {
        self.inner.write_back(host);
    }

    fn reserve(&self, host: Range<u64>) -> Result<()> {
        self.inner.reserve(host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::{Fault, MemoryStorage, Op};

    #[test]
    fn the_mark_is_told_once_when_a_write_ends_past_it() {
        let high = Arc::new(HighWater::new(Some(100)));
        let memory = Arc::new(MemoryStorage::new());
        let storage = Watched::new(memory.clone(), Arc::clone(&high));
        storage.write_at(&[1; 100], 0).expect("writes");
        assert_eq!((high.end(), high.passed()), (100, None));
        memory.inject(Fault {
            op: Op::Change,
            after: 0,
            count: 1,
            errno: libc::EIO,
        });
        storage.write_at(&[1; 100], 50).expect_err("fails");
        assert_eq!((high.end(), high.passed()), (100, None));
        storage.write_at(&[1; 1], 100).expect("writes");
        storage.write_at(&[1; 1], 10).expect("writes");
        assert_eq!((high.end(), high.passed()), (101, Some(100)));
        assert_eq!(high.passed(), None);
        high.set_mark(Some(101));
        storage
            .zero(500..600, Zeroing::MayUnmap)
            .expect("gives back, if anything");
        assert_eq!(high.passed(), None);
        storage.zero(500..600, Zeroing::KeepSpace).expect("zeroes");
        assert_eq!((high.end(), high.passed()), (600, Some(101)));
    }
}

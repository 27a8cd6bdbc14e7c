//! Syncs shared by all that wait: however many threads need one at a moment, one is made.

use parking_lot::{Condvar, Mutex};

use crate::error::{Error, Result};
use crate::storage::Storage;

#[derive(Debug, Default)]
struct State {
    /// Syncs begun so far; they are numbered from 1.
    begun: u64,
    /// Number of the last sync that succeeded.
    done: u64,
    /// Whether one is under way.
    running: bool,
    /// Syncs that failed.
    failed: u64,
    /// How the last of them failed.
    errno: i32,
    /// Failures that `flush` has told of.
    told: u64,
}

/// Group commit for one storage object.
#[derive(Debug, Default)]
pub struct Syncs {
    state: Mutex<State>,
    ended: Condvar,
}

/// The moment of a change; tells later whether it is on stable media.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    begun: u64,
    failed: u64,
}

/// A sync that is under way; where it unwinds it has failed, and nobody waits for it.
struct Running<'a> {
    syncs: &'a Syncs,
    number: u64,
    /// How it failed, as far as is known.
    failure: Option<i32>,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut state = self.syncs.state.lock();
        state.running = false;
        match self.failure {
            None => state.done = state.done.max(self.number),
            Some(errno) => {
                state.failed += 1;
                state.errno = errno;
            }
        }
        self.syncs.ended.notify_all();
    }
}

impl Syncs {
    /// The present moment.  Take it before the writes for `wait`, after them for `is_durable`.
    pub fn stamp(&self) -> Stamp {
        let state = self.state.lock();
        Stamp {
            begun: state.begun,
            failed: state.failed,
        }
    }

    /// Whether what was written before `stamp` is known to be on stable media.
    pub fn is_durable(&self, stamp: Stamp) -> bool {
        let state = self.state.lock();
        state.done > stamp.begun && state.failed == stamp.failed
    }

    /// As `is_durable`, of what was written from before `first` until `last`.
    pub fn is_durable_since(&self, first: Stamp, last: Stamp) -> bool {
        first.failed == last.failed && self.is_durable(last)
    }

    /// Whether a sync has failed since `stamp`: what was written before may be lost.
    pub fn has_failed_since(&self, stamp: Stamp) -> bool {
        self.state.lock().failed != stamp.failed
    }

    /// Returns once a sync that began after the call has ended.
    ///
    /// # Errors
    /// The host's, and those of every sync since `since`: what it was to make durable is lost
    /// even where a later one succeeds.
    pub fn wait(&self, storage: &dyn Storage, since: Stamp) -> Result<()> {
        let mut state = self.state.lock();
        let need = state.begun + 1;
        loop {
            if state.failed != since.failed {
                return Err(failure(state.errno));
            }
            if state.done >= need {
                return Ok(());
            }
            if state.running {
                self.ended.wait(&mut state);
                continue;
            }
            state.running = true;
            state.begun += 1;
            let mut running = Running {
                syncs: self,
                number: state.begun,
                failure: Some(libc::EIO),
            };
            let result = parking_lot::MutexGuard::unlocked(&mut state, || {
                let result = storage.sync();
                running.failure = result.as_ref().err().map(Error::errno);
                drop(running);
                result
            });
            result?;
        }
    }

    /// Makes all completed writes durable.
    ///
    /// # Errors
    /// The host's; a sync that failed since the last flush is told of once.
    pub fn flush(&self, storage: &dyn Storage) -> Result<()> {
        let since = {
            let mut state = self.state.lock();
            if state.failed != state.told {
                state.told = state.failed;
                return Err(failure(state.errno));
            }
            Stamp {
                begun: state.begun,
                failed: state.failed,
            }
        };
        let result = self.wait(storage, since);
        if result.is_err() {
            // Of one that failed since, the next flush tells.
            self.state.lock().told = since.failed + 1;
        }
        result
    }
}

fn failure(errno: i32) -> Error {
    Error::io("sync", std::io::Error::from_raw_os_error(errno))
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::os::fd::BorrowedFd;
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
    use std::path::Path;
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::storage::memory::{Change, Fault, MemoryStorage, Op};
    use crate::storage::{HostId, HostRun, Limits, Zeroing};

    fn fail_one(storage: &MemoryStorage) {
        storage.inject(Fault {
            op: Op::Sync,
            after: 0,
            count: 1,
            errno: libc::EIO,
        });
    }

    #[test]
    fn a_wait_ends_with_a_sync_of_its_own_time() {
        let storage = MemoryStorage::new();
        storage.record();
        let syncs = Syncs::default();
        let stamp = syncs.stamp();
        assert!(!syncs.is_durable(stamp));
        syncs.wait(&storage, stamp).expect("syncs");
        assert!(syncs.is_durable(stamp));
        assert!(!syncs.is_durable(syncs.stamp()));
        syncs.wait(&storage, stamp).expect("syncs again");
        assert_eq!(storage.changes(), [Change::Sync, Change::Sync]);
    }

    #[test]
    fn a_failure_reaches_everyone_whose_writes_it_may_have_lost() {
        let storage = MemoryStorage::new();
        let syncs = Syncs::default();
        let early = syncs.stamp();
        fail_one(&storage);
        assert_eq!(
            syncs.wait(&storage, early).expect_err("fails").errno(),
            libc::EIO
        );
        syncs.wait(&storage, early).expect_err("was lost");
        assert!(!syncs.is_durable(early));
        syncs
            .wait(&storage, syncs.stamp())
            .expect("later writes are not");
        assert!(!syncs.is_durable(early), "a later sync brings nothing back");
        syncs.flush(&storage).expect_err("a flush tells of it");
        syncs.flush(&storage).expect("but once");
    }

    /// Unwinds at its first sync.
    #[derive(Debug)]
    struct Unwinding(MemoryStorage, AtomicBool);

    impl Storage for Unwinding {
        fn size(&self) -> u64 {
            self.0.size()
        }
        fn has_fixed_len(&self) -> bool {
            self.0.has_fixed_len()
        }
        fn limits(&self) -> Limits {
            self.0.limits()
        }
        fn path(&self) -> Option<&Path> {
            None
        }
        fn host_id(&self) -> Option<HostId> {
            None
        }
        fn fd(&self) -> Option<BorrowedFd<'_>> {
            None
        }
        fn read_at(&self, buf: &mut [u8], host: u64) -> Result<()> {
            self.0.read_at(buf, host)
        }
        fn write_at(&self, buf: &[u8], host: u64) -> Result<()> {
            self.0.write_at(buf, host)
        }
        fn zero(&self, host: Range<u64>, how: Zeroing) -> Result<()> {
            self.0.zero(host, how)
        }
        fn discard(&self, host: Range<u64>) -> Result<()> {
            self.0.discard(host)
        }
        fn run(&self, host: u64, len: u64) -> Result<HostRun> {
            self.0.run(host, len)
        }
        fn set_len(&self, len: u64) -> Result<()> {
            self.0.set_len(len)
        }
        fn sync(&self) -> Result<()> {
            if self.1.swap(false, Ordering::SeqCst) {
                resume_unwind(Box::new("a bug"));
            }
            self.0.sync()
        }
        fn reserve(&self, host: Range<u64>) -> Result<()> {
            self.0.reserve(host)
        }
    }

    #[test]
    fn a_sync_that_unwinds_has_failed_and_nobody_waits_for_it() {
        let storage = Unwinding(MemoryStorage::new(), AtomicBool::new(true));
        let syncs = Syncs::default();
        let early = syncs.stamp();
        let wait = || syncs.wait(&storage, early);
        assert!(catch_unwind(AssertUnwindSafe(wait)).is_err());
        let late = syncs.stamp();
        std::thread::scope(|scope| {
            let (sender, receiver) = std::sync::mpsc::channel();
            let (syncs, storage) = (&syncs, &storage);
            scope.spawn(move || sender.send(syncs.wait(storage, late).is_ok()));
            assert_eq!(receiver.recv(), Ok(true));
        });
        syncs.wait(&storage, early).expect_err("may be lost");
    }

    #[test]
    fn many_waiters_share_few_syncs() {
        let storage = MemoryStorage::new();
        storage.record();
        let syncs = Syncs::default();
        let barrier = Barrier::new(16);
        std::thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| {
                    let stamp = syncs.stamp();
                    barrier.wait();
                    syncs.wait(&storage, stamp).expect("syncs");
                    assert!(syncs.is_durable(stamp));
                });
            }
        });
        assert!((1..=16).contains(&storage.changes().len()));
    }
}

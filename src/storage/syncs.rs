//! Syncs shared by all that wait: however many threads need one at a moment, one is made.
//!
//! A sync that failed may have lost what was written before it for good: the kernel takes the pages
//! that it could not write for clean, writes them to nowhere again, and the next `fsync` answers that
//! all is well.  So a failure stays: every later sync of the object fails, until it is opened anew and
//! shows what it has.
//!
//! That holds whatever the errno.  `ENOSPC` and `EDQUOT`, of hosts that find room only when they write
//! (NFS, thin volumes), come with pages dropped like `EIO`, and room that is made later does not bring
//! them back.  `EINTR` is no failure: the standard library makes the call again, and what could not be
//! written until then is told to that one.

use std::path::Path;

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::error::{Error, ErrorKind, Result};

#[derive(Debug, Default)]
struct State {
    /// Syncs begun so far; they are numbered from 1.
    begun: u64,
    /// Number of the last sync that succeeded.
    done: u64,
    /// Whether one is under way.
    running: bool,
    /// How one of them failed.
    failed: Option<String>,
}

/// Group commit for one storage object.
#[derive(Debug, Default)]
pub struct Syncs {
    state: Mutex<State>,
    ended: Condvar,
}

/// The moment of a change; tells later whether it is on stable media.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp(u64);

/// A sync that is under way; where it unwinds it has failed, and nobody waits for it.
struct Running<'a> {
    syncs: &'a Syncs,
    number: u64,
    /// How it failed, as far as is known.
    failure: Option<String>,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut state = self.syncs.state.lock();
        state.running = false;
        match self.failure.take() {
            None => state.done = state.done.max(self.number),
            failure => state.failed = failure,
        }
        self.syncs.ended.notify_all();
    }
}

impl Syncs {
    /// The present moment, after the writes that [`Syncs::is_durable`] is asked about.
    pub fn stamp(&self) -> Stamp {
        Stamp(self.state.lock().begun)
    }

    /// Whether what was written before `stamp` is known to be on stable media.
    pub fn is_durable(&self, stamp: Stamp) -> bool {
        // None succeeds after one that failed.
        self.state.lock().done > stamp.0
    }

    /// Refuses an object, which is at `path`, a sync of which has failed.
    ///
    /// # Errors
    /// `Io`.
    pub fn sound(&self, path: Option<&Path>) -> Result<()> {
        match &self.state.lock().failed {
            None => Ok(()),
            Some(why) => Err(lost(why, path)),
        }
    }

    /// Returns once a sync that began after the call has ended; `sync` makes one of the object at
    /// `path`.
    ///
    /// # Errors
    /// That of `sync`; `Io` where one failed before.
    pub fn wait(&self, path: Option<&Path>, sync: impl Fn() -> Result<()>) -> Result<()> {
        let mut state = self.state.lock();
        let need = state.begun + 1;
        loop {
            if let Some(why) = &state.failed {
                return Err(lost(why, path));
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
                failure: Some("it met a bug".to_owned()),
            };
            let result = MutexGuard::unlocked(&mut state, || {
                let result = sync();
                running.failure = result.as_ref().err().map(Error::with_cause);
                drop(running);
                result
            });
            result?;
        }
    }

    /// Forgets a failure, as who opens the object anew does.
    pub(super) fn open_anew(&self) {
        self.state.lock().failed = None;
    }
}

fn lost(why: &str, path: Option<&Path>) -> Error {
    let text = format!(
        "a sync has failed before ({why}): what was written until then may be lost (allowed: opening it anew)"
    );
    Error::new(ErrorKind::Io, text).at_opt(path)
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
    use std::sync::Barrier;

    use super::*;
    use crate::storage::Storage;
    use crate::storage::memory::{Change, Fault, MemoryStorage, Op};

    #[test]
    fn a_wait_ends_with_a_sync_of_its_own_time() {
        let storage = MemoryStorage::new();
        storage.record();
        let stamp = storage.syncs().stamp();
        assert!(!storage.syncs().is_durable(stamp));
        storage.sync().expect("syncs");
        assert!(storage.syncs().is_durable(stamp));
        assert!(!storage.syncs().is_durable(storage.syncs().stamp()));
        storage.sync().expect("syncs again");
        assert_eq!(storage.changes(), [Change::Sync, Change::Sync]);
    }

    #[test]
    fn a_sync_that_failed_fails_all_that_follow_until_the_object_is_opened_anew() {
        for errno in [libc::EIO, libc::ENOSPC, libc::EDQUOT] {
            let storage = MemoryStorage::new().with_path("/a/disk");
            storage.sync().expect("syncs");
            let before = storage.syncs().stamp();
            storage.sync().expect("syncs");
            let stamp = storage.syncs().stamp();
            storage.inject(Fault {
                op: Op::Sync,
                after: 0,
                count: 1,
                errno,
            });
            let error = storage.sync().expect_err("fails");
            assert_eq!(error.errno(), errno);
            for _ in 0..3 {
                let error = storage.sync().expect_err("may be lost");
                assert_eq!(error.errno(), libc::EIO);
                let text = error.to_string();
                assert!(
                    text.starts_with("/a/disk: ") && text.contains("anew"),
                    "{text}"
                );
            }
            storage.syncs().sound(None).expect_err("may be lost");
            assert!(!storage.syncs().is_durable(stamp));
            assert!(storage.syncs().is_durable(before), "it was before");
            storage.open_anew();
            storage.sync().expect("another object");
        }
    }

    #[test]
    fn a_sync_that_unwinds_has_failed_and_nobody_waits_for_it() {
        let syncs = Syncs::default();
        let early = syncs.stamp();
        let wait = || syncs.wait(None, || resume_unwind(Box::new("a bug")));
        assert!(catch_unwind(AssertUnwindSafe(wait)).is_err());
        std::thread::scope(|scope| {
            let (sender, receiver) = std::sync::mpsc::channel();
            let syncs = &syncs;
            scope.spawn(move || sender.send(syncs.wait(None, || Ok(())).is_err()));
            assert_eq!(receiver.recv(), Ok(true));
        });
        assert!(!syncs.is_durable(early));
    }

    #[test]
    fn many_waiters_share_few_syncs() {
        let storage = MemoryStorage::new();
        storage.record();
        let barrier = Barrier::new(16);
        std::thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| {
                    let stamp = storage.syncs().stamp();
                    barrier.wait();
                    storage.sync().expect("syncs");
                    assert!(storage.syncs().is_durable(stamp));
                });
            }
        });
        assert!((1..=16).contains(&storage.changes().len()));
    }
}

//! One sync shared by all that wait for one.

use parking_lot::{Condvar, Mutex};

use crate::error::Result;
use crate::storage::Storage;

/// Lets threads that need their writes on stable media share syncs: while one sync runs, all who
/// come wait for the next one, which one of them makes for all.
#[derive(Debug, Default)]
pub struct Barrier {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Syncs that have begun.
    begun: u64,
    /// The last one that ended well.
    done: u64,
    /// One is under way.
    running: bool,
}

impl Barrier {
    /// Returns once everything written before the call is on stable media.
    ///
    /// # Errors
    /// The host's.  A sync that fails fails for the thread that made it; the others make their
    /// own.
    pub fn pass(&self, storage: &dyn Storage) -> Result<()> {
        let mut state = self.state.lock();
        // One that has begun may have begun before our writes; the next one covers them.
        let wanted = state.begun + 1;
        loop {
            if state.done >= wanted {
                return Ok(());
            }
            if !state.running {
                break;
            }
            self.changed.wait(&mut state);
        }
        state.begun += 1;
        state.running = true;
        let mine = state.begun;
        drop(state);
        let result = storage.sync();
        let mut state = self.state.lock();
        state.running = false;
        if result.is_ok() {
            state.done = state.done.max(mine);
        }
        self.changed.notify_all();
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::{Change, Fault, MemoryStorage, Op};

    #[test]
    fn what_was_written_before_is_synced_for_every_thread() {
        let storage = MemoryStorage::new();
        storage.record();
        let barrier = Barrier::default();
        std::thread::scope(|scope| {
            for thread in 0..8u8 {
                let (storage, barrier) = (&storage, &barrier);
                scope.spawn(move || {
                    for i in 0..50u64 {
                        let at = u64::from(thread) * 1000 + i;
                        storage.write_at(&[thread], at).expect("memory has room");
                        barrier.pass(storage).expect("syncs");
                        let changes = storage.changes();
                        let mine =
                            |c: &Change| matches!(c, Change::Write { host, .. } if *host == at);
                        let write = changes.iter().position(mine).expect("it is recorded");
                        assert!(changes[write..].contains(&Change::Sync));
                    }
                });
            }
        });
    }

    #[test]
    fn a_failed_sync_is_not_taken_for_a_good_one() {
        let storage = MemoryStorage::new();
        let barrier = Barrier::default();
        storage.inject(Fault {
            op: Op::Sync,
            after: 0,
            count: 1,
            errno: libc::EIO,
        });
        assert!(barrier.pass(&storage).is_err());
        assert!(barrier.pass(&storage).is_ok());
    }
}

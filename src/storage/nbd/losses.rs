//! What may be lost: changes that a server acknowledged and did not flush before its connection
//! was gone.
//!
//! Whether the server is still the same one, with its caches, cannot be told from here.  So the
//! next flush fails, once, as that of a file does whose pages the kernel could not write.

use parking_lot::Mutex;

use crate::error::{Error, ErrorKind, Result};

/// The changes made over one connection; under the lock that also guards whether it is lost.
#[derive(Debug, Default)]
pub(super) struct Changes {
    acknowledged: u64,
    /// How many of them a flush has covered.
    flushed: u64,
}

impl Changes {
    /// One more was acknowledged.
    pub(super) fn add(&mut self) {
        self.acknowledged += 1;
    }

    /// What a flush that is sent from now on covers.
    pub(super) fn covered(&self) -> u64 {
        self.acknowledged
    }

    /// A flush succeeded that covers as many as [`Changes::covered`] said before it was sent.
    pub(super) fn flush(&mut self, covered: u64) {
        self.flushed = self.flushed.max(covered);
    }

    /// Whether some are not flushed.
    pub(super) fn pending(&self) -> bool {
        self.acknowledged > self.flushed
    }

    /// As [`Changes::pending`]; from now on they are somebody else's concern.
    pub(super) fn give_up(&mut self) -> bool {
        let pending = self.pending();
        self.flushed = self.acknowledged;
        pending
    }
}

/// The losses of all connections to one export.
#[derive(Debug, Default)]
pub(super) struct Losses {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    noted: u64,
    /// How many a flush has told of.
    told: u64,
    /// Why the last connection was lost.
    why: String,
}

impl Losses {
    /// A connection is gone, with changes that were not flushed.
    pub(super) fn note(&self, why: &str) {
        let mut state = self.state.lock();
        state.noted += 1;
        why.clone_into(&mut state.why);
    }

    /// A flush begins: how many losses have been told of.
    pub(super) fn told(&self) -> u64 {
        self.state.lock().told
    }

    /// The flush ends before which `told` losses had been told of.
    ///
    /// # Errors
    /// All losses but those, whoever else was told of them meanwhile.
    pub(super) fn tell(&self, told: u64) -> Result<()> {
        let mut state = self.state.lock();
        if state.noted == told {
            return Ok(());
        }
        state.told = state.noted;
        let text = format!(
            "the connection was lost, and what was written since the last flush may be lost with \
             it: {}",
            state.why
        );
        Err(Error::new(ErrorKind::Io, text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_covers_what_was_acknowledged_before_it_was_sent() {
        let mut changes = Changes::default();
        assert!(!changes.pending());
        changes.add();
        let covered = changes.covered();
        changes.add();
        changes.flush(covered);
        assert!(changes.pending(), "one came while the flush was under way");
        changes.flush(changes.covered());
        // The answer to an older flush, taken in late.
        changes.flush(covered);
        assert!(!changes.pending());
        changes.add();
        assert!(changes.give_up());
        assert!(!changes.give_up(), "noted once");
    }

    #[test]
    fn a_loss_is_told_once_but_to_every_flush_it_came_in_the_way_of() {
        let losses = Losses::default();
        let (first, second) = (losses.told(), losses.told());
        losses.note("gone");
        let third = losses.told();
        losses.note("gone too");
        let error = losses.tell(first).expect_err("lost");
        assert!(error.message().contains("gone too"), "{error}");
        assert_eq!(error.errno(), libc::EIO);
        losses.tell(second).expect_err("was under way");
        losses.tell(third).expect_err("began before it was told");
        losses.tell(losses.told()).expect("was told");
    }
}

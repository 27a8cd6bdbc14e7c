//! What may be lost: changes that a server acknowledged and did not flush before its connection
//! was gone.
//!
//! Whether the server is still the same one, with its caches, cannot be told from here.  So all
//! flushes fail from then on, as those of a file do whose pages the kernel could not write.

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

/// Why connections to one export were lost that had such changes.
#[derive(Debug, Default)]
pub(super) struct Losses(Mutex<Option<String>>);

impl Losses {
    /// A connection is gone, with changes that were not flushed.
    pub(super) fn note(&self, why: &str) {
        *self.0.lock() = Some(why.to_owned());
    }

    /// Refuses where there is one; asked when a flush ends.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn none(&self) -> Result<()> {
        let Some(why) = &*self.0.lock() else {
            return Ok(());
        };
        let text = format!(
            "the connection was lost, and what was written since the last flush may be lost with \
             it: {why}"
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
}

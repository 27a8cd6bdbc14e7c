//! Where guest bytes are, for moving them: an extent with its storage.

use crate::chain::{Chain, State};
use crate::error::Result;
use crate::image::{Source, Wait};
use crate::storage::Storage;

/// What was found at an offset.
#[derive(Debug, Clone, Copy)]
pub(super) struct Found<'a> {
    /// Bytes from the offset asked for; never 0.
    pub(super) len: u64,
    /// What is there.
    pub(super) place: Place<'a>,
    /// The layer that decides it.
    pub(super) depth: usize,
    /// The disk it is in, of those joined.
    pub(super) part: usize,
}

/// What is at an offset.
#[derive(Debug, Clone, Copy)]
pub(super) enum Place<'a> {
    /// Data as it is.
    Stored {
        /// The object that holds it.
        storage: &'a dyn Storage,
        /// Offset there.
        host: u64,
    },
    /// Data that must be decoded.
    Encoded,
    /// Zeroes that a layer states.
    Zero,
    /// Zeroes because no layer has the bytes.
    Hole,
}

impl Found<'_> {
    /// Nothing, for `len` bytes.
    pub(super) fn hole(len: u64) -> Self {
        Self {
            len,
            place: Place::Hole,
            depth: usize::MAX,
            part: usize::MAX,
        }
    }

    /// How it reads.
    pub(super) fn state(&self) -> State {
        match self.place {
            Place::Stored { .. } => State::Data,
            Place::Encoded => State::Encoded,
            Place::Zero => State::Zero,
            Place::Hole => State::Hole,
        }
    }

    /// Whether it reads as zeroes without looking.
    pub(super) fn is_zero(&self) -> bool {
        matches!(self.place, Place::Zero | Place::Hole)
    }
}

/// What is at `at` of a chain, looking no further than `len`, which is not 0.  The caller holds a
/// ticket.
pub(super) fn find(chain: &Chain, at: u64, len: u64) -> Result<Found<'_>> {
    let found = chain.resolve(at, len, Wait::Yes)?;
    let (len, place) = match found.source {
        Source::Stored { storage, host, .. } => {
            let run = storage.run(host, found.len)?;
            let place = match run.data {
                true => Place::Stored { storage, host },
                false => Place::Zero,
            };
            (run.len, place)
        }
        Source::Encoded => (found.len, Place::Encoded),
        Source::Zero => (found.len, Place::Zero),
        Source::Below => (found.len, Place::Hole),
    };
    Ok(Found {
        len,
        place,
        depth: found.depth,
        part: 0,
    })
}

/// Whether two objects are the same file or device of the host.
pub(super) fn same_object(a: &dyn Storage, b: &dyn Storage) -> bool {
    if std::ptr::addr_eq(a, b) {
        return true;
    }
    let identity = |storage: &dyn Storage| {
        let stat = rustix::fs::fstat(storage.fd()?).ok()?;
        Some((stat.st_dev, stat.st_ino, stat.st_rdev))
    };
    identity(a).is_some_and(|i| identity(b) == Some(i))
}

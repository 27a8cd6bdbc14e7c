//! Where guest bytes are, for moving them: an extent with its storage.

use crate::chain::{Chain, Resolved, State};
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

impl<'a> Found<'a> {
    /// What a chain has, as its layers say: holes of the host among it count as stored.
    pub(super) fn of(found: Resolved<'a>) -> Self {
        Self {
            len: found.len,
            place: match found.source {
                Source::Stored { storage, host, .. } => Place::Stored { storage, host },
                Source::Encoded => Place::Encoded,
                Source::Zero => Place::Zero,
                Source::Below | Source::Moved(_) => Place::Hole,
            },
            depth: found.depth,
            part: 0,
        }
    }

    /// The same after the host was asked for holes.
    pub(super) fn asked(self) -> Result<Self> {
        let Place::Stored { storage, host } = self.place else {
            return Ok(self);
        };
        let run = storage.run(host, self.len)?;
        Ok(Self {
            len: run.len,
            place: match run.data {
                true => self.place,
                false => Place::Zero,
            },
            ..self
        })
    }

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

/// Which layers of disks may have long holes of the host in what they store.
#[derive(Debug)]
pub(super) struct Unwritten(Vec<Vec<bool>>);

impl Unwritten {
    /// Of disks in order, which `part` of what is found counts.
    pub(super) fn of<'c>(chains: impl IntoIterator<Item = &'c Chain>) -> Self {
        Self(chains.into_iter().map(Chain::may_be_unwritten).collect())
    }

    /// The same after the host was asked for holes where there may be long ones.
    pub(super) fn ask<'f>(&self, found: Found<'f>) -> Result<Found<'f>> {
        let layers = self.0.get(found.part);
        match layers.and_then(|layers| layers.get(found.depth)) {
            Some(true) => found.asked(),
            _ => Ok(found),
        }
    }
}

/// What is at `at` of a chain, looking no further than `len`, which is not 0.  The caller holds a
/// ticket.
pub(super) fn find(chain: &Chain, at: u64, len: u64) -> Result<Found<'_>> {
    Found::of(chain.resolve(at, len, Wait::Yes)?).asked()
}

/// Whether two objects are the same file or device of the host.
pub(super) fn same_object(a: &dyn Storage, b: &dyn Storage) -> bool {
    if std::ptr::addr_eq(a, b) {
        return true;
    }
    a.host_id().is_some_and(|id| b.host_id() == Some(id))
}

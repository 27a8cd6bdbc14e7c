//! The extents of a disk, as `map` shows them and the copy engine plans with them.

use std::ops::Range;

use crate::chain::Chain;
use crate::error::Result;
use crate::image::{ObjectId, Source, Wait};

/// How an extent reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Data.
    Data,
    /// Compressed data.
    Encoded,
    /// Zeroes that some layer states, or stores as a hole of its file.
    Zero,
    /// Zeroes because no layer has the bytes.
    Hole,
}

/// A run of guest bytes, resolved through the whole chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First guest byte.
    pub start: u64,
    /// Length in bytes; never 0.
    pub len: u64,
    /// How it reads.
    pub state: State,
    /// Layer that decides it: 0 is the top; the chain's length where no layer does.
    pub depth: usize,
    /// Offset in a file of that layer, where the bytes are stored as they are.
    pub host: Option<u64>,
    /// Which of its files that is.
    pub object: Option<ObjectId>,
}

impl Extent {
    /// First guest byte after it.
    pub fn end(&self) -> u64 {
        self.start + self.len
    }

    /// Whether `next` continues this extent: same state and layer, next in the guest and, where
    /// stored, in the file.
    fn continues_with(&self, next: &Self) -> bool {
        self.end() == next.start
            && self.state == next.state
            && self.depth == next.depth
            && self.object == next.object
            && self.host.map(|h| h.wrapping_add(self.len)) == next.host
    }
}

/// The extents of a range, in order, neighbours of one kind merged.
#[derive(Debug)]
pub struct Extents<'a> {
    chain: &'a Chain,
    /// Layers in which the host is asked for holes.
    asks: Vec<bool>,
    range: Range<u64>,
    next: Option<Extent>,
}

impl Chain {
    /// The extent at `at`, looking no further than `len`, which is not 0; `at` lies inside the
    /// disk.  A hint: another thread may write between this and a read.
    ///
    /// # Errors
    /// Those of the layers.
    pub fn extent(&self, at: u64, len: u64) -> Result<Extent> {
        self.extent_where(at, len, |_| true)
    }

    /// As `extent`; the host is asked for holes in what those layers store that `asks` names.
    fn extent_where(&self, at: u64, len: u64, asks: impl Fn(usize) -> bool) -> Result<Extent> {
        let _ticket = self.enter();
        let found = self.resolve(at, len, Wait::Yes)?;
        let object = match found.source {
            Source::Stored { storage, .. } => Some(ObjectId::of(storage)),
            _ => None,
        };
        let extent = |state, len, host| Extent {
            start: at,
            len,
            state,
            depth: found.depth,
            host,
            object,
        };
        Ok(match found.source {
            Source::Stored { host, .. } if !asks(found.depth) => {
                extent(State::Data, found.len, Some(host))
            }
            Source::Stored { storage, host, .. } => {
                let run = storage.run(host, found.len)?;
                let state = if run.data { State::Data } else { State::Zero };
                extent(state, run.len, Some(host))
            }
            Source::Encoded => extent(State::Encoded, found.len, None),
            Source::Zero => extent(State::Zero, found.len, None),
            Source::Below | Source::Moved(_) => extent(State::Hole, found.len, None),
        })
    }

    /// The extents of a range inside the disk.  Holes of the host count in layers that may have long
    /// ones ([`Chain::may_be_unwritten`]); where space is given as it is written, what is stored is
    /// data.
    ///
    /// # Errors
    /// `OutOfRange` where it is not.
    pub fn extents(&self, range: Range<u64>) -> Result<Extents<'_>> {
        self.check_range(range.start, crate::util::range::len(&range))?;
        Ok(Extents {
            chain: self,
            asks: self.may_be_unwritten(),
            range,
            next: None,
        })
    }
}

impl Extents<'_> {
    fn fetch(&mut self) -> Option<Result<Extent>> {
        if self.range.is_empty() {
            return None;
        }
        let len = self.range.end - self.range.start;
        let asks = |depth| self.asks.get(depth).is_none_or(|asks| *asks);
        let extent = self.chain.extent_where(self.range.start, len, asks);
        match &extent {
            Ok(e) => self.range.start += e.len,
            Err(_) => self.range.start = self.range.end,
        }
        Some(extent)
    }
}

impl Iterator for Extents<'_> {
    type Item = Result<Extent>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut merged = match self.next.take() {
            Some(extent) => extent,
            None => match self.fetch()? {
                Ok(extent) => extent,
                Err(e) => return Some(Err(e)),
            },
        };
        loop {
            match self.fetch() {
                Some(Ok(next)) if merged.continues_with(&next) => merged.len += next.len,
                Some(Ok(next)) => {
                    self.next = Some(next);
                    return Some(Ok(merged));
                }
                Some(Err(e)) => return Some(Err(e)),
                None => return Some(Ok(merged)),
            }
        }
    }
}

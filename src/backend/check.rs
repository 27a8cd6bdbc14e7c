//! Which requests are right, and who may carry them out.

use std::ops::Range;

use super::{Backend, DetectZeroes, Durability, Kind, Moving, Shape};
use crate::chain::Chain;
use crate::error::{Error, ErrorKind, Result};

impl Backend {
    /// Who may move the bytes of a request.
    pub(super) fn moving(&self, shape: &Shape) -> Moving {
        let durable = shape.fua || self.settings.durability == Durability::EveryWrite;
        match shape.kind {
            Kind::Read => Moving::Anyone,
            Kind::Write if !durable && self.settings.detect_zeroes == DetectZeroes::Off => {
                Moving::Anyone
            }
            _ => Moving::Backend,
        }
    }

    /// Looks at a request: whether it lies inside the disk, is made of whole blocks, and is allowed.
    #[inline]
    pub(super) fn check(&self, shape: &Shape, chain: &Chain) -> Result<()> {
        let size = chain.virtual_size();
        let range = &shape.range;
        if range.start > range.end || range.end > size {
            return Err(past_the_end(range, chain));
        }
        let block = u64::from(self.settings.logical_block_size);
        let aligned = |at: u64| at.is_multiple_of(block);
        if !aligned(range.start) || !(aligned(range.end) || range.end == size) {
            return Err(unaligned(range, block, chain));
        }
        match shape.kind.changes() && !chain.top().caps().write {
            true => Err(chain.top().read_only().at_opt(chain.top().storage().path())),
            false => Ok(()),
        }
    }
}

#[cold]
fn past_the_end(range: &Range<u64>, chain: &Chain) -> Error {
    let text = format!(
        "the request for {:#x}..{:#x} reaches past the end of the disk at {:#x}",
        range.start,
        range.end,
        chain.virtual_size()
    );
    Error::new(ErrorKind::OutOfRange, text).at_opt(chain.top().storage().path())
}

#[cold]
fn unaligned(range: &Range<u64>, block: u64, chain: &Chain) -> Error {
    let text = format!(
        "the request for {:#x}..{:#x} is not made of whole blocks of {block} bytes",
        range.start, range.end
    );
    Error::new(ErrorKind::Invalid, text).at_opt(chain.top().storage().path())
}

//! Reading the sources, and what to do where they cannot be read.

use crate::copy::find::Found;
use crate::copy::joined::Joined;
use crate::error::{Error, ErrorKind, Result};
use crate::util::align::{clamp_len, len64};

/// What is tried again on its own after a read failed, in bytes.
const UNIT: usize = 4096;

/// Told of bytes that could not be read and became zeroes: offset, length, why.  Called from any
/// of a job's threads.
pub type Lost<'a> = dyn Fn(u64, u64, &Error) + Sync + 'a;

/// The sources, read as the user wants errors treated.
#[derive(Clone, Copy)]
pub(super) struct Reader<'a> {
    pub(super) sources: &'a Joined,
    /// `None`: an error is an error.
    pub(super) salvage: Option<&'a Lost<'a>>,
}

impl<'a> Reader<'a> {
    /// As [`Joined::find`]; when salvaging, data is never handed out as stored, since only reading
    /// it shows whether it can be read.
    pub(super) fn find(&self, at: u64, len: u64) -> Result<Found<'a>> {
        if self.salvage.is_none() {
            return self.sources.find(at, len);
        }
        let unknown = |len| Found {
            len,
            place: crate::copy::find::Place::Encoded,
            ..Found::hole(len)
        };
        Ok(match self.sources.find(at, len) {
            Ok(found) if found.is_zero() => found,
            Ok(found) => unknown(found.len),
            // Reading will fail, unit by unit, and tell of it.
            Err(_) => unknown(len.min(len64(UNIT))),
        })
    }

    /// What is tried again on its own: a sector of a disc.
    fn unit(&self) -> usize {
        let discs = self
            .sources
            .chains()
            .filter(|chain| chain.top().as_disc().is_some());
        let units = discs.filter_map(|disc| disc.top().caps().encoded);
        units
            .min()
            .map_or(UNIT, |unit| clamp_len(unit.max(512), UNIT))
    }

    /// As [`Joined::read_at`]; when salvaging, what cannot be read becomes zeroes, and is told of.
    pub(super) fn read_at(&self, buf: &mut [u8], at: u64) -> Result<()> {
        let Some(lost) = self.salvage else {
            return self.sources.read_at(buf, at);
        };
        if self.sources.read_at(buf, at).is_ok() {
            return Ok(());
        }
        let mut at = at;
        for unit in buf.chunks_mut(self.unit()) {
            match self.sources.read_at(unit, at) {
                Err(e) if e.kind() == ErrorKind::Cancelled => return Err(e),
                Err(e) => {
                    unit.fill(0);
                    lost(at, len64(unit.len()), &e);
                }
                Ok(()) => {}
            }
            at += len64(unit.len());
        }
        Ok(())
    }
}

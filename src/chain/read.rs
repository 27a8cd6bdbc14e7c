//! Reading: one loop over where the bytes are.

use crate::chain::{Chain, Resolved};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Below, Source, Wait};
use crate::util::align::{clamp_len, len64};

/// How often a read looks for bytes that others change each time before it gets to them.
const LOOKS: u32 = 1000;

/// The layers from one on.
struct Under<'a> {
    chain: &'a Chain,
    first: usize,
}

impl Below for Under<'_> {
    fn read_at(&self, buf: &mut [u8], at: u64) -> Result<()> {
        self.chain.read_from(self.first, buf, at)
    }
}

impl Chain {
    /// Fills all of `buf` from `at`.
    ///
    /// # Errors
    /// `OutOfRange` past the end of the disk; those of the layers.
    pub fn read_at(&self, buf: &mut [u8], at: u64) -> Result<()> {
        self.check_range(at, len64(buf.len()))?;
        let _ticket = self.enter();
        self.read_from(0, buf, at)
    }

    /// Refuses a range that does not lie inside the disk.
    pub(crate) fn check_range(&self, at: u64, len: u64) -> Result<()> {
        let size = self.virtual_size();
        if at.checked_add(len).is_none_or(|end| end > size) {
            return Err(Error::new(
                ErrorKind::OutOfRange,
                format!("{len} bytes at {at:#x} reach past the end of the disk at {size:#x}"),
            )
            .at_opt(self.top().storage().path()));
        }
        Ok(())
    }

    /// Fills `buf` with what the layers from `first` down hold at `at`; past the end of the first
    /// of them, zeroes.  The caller holds a ticket.
    pub(super) fn read_from(&self, first: usize, buf: &mut [u8], at: u64) -> Result<()> {
        let (mut done, mut looks) = (0, 0);
        while done < buf.len() {
            let at = at + len64(done);
            let found = self.resolve_from(first, at, len64(buf.len() - done), Wait::Yes)?;
            let len = clamp_len(found.len, buf.len() - done);
            let got = self.fetch(&found, &mut buf[done..done + len])?;
            looks = if got == 0 { looks + 1 } else { 0 };
            if looks == LOOKS {
                return Err(self.unsteady(&found, at));
            }
            done += got;
        }
        Ok(())
    }

    /// How many bytes could be had; fewer than asked for where others changed them meanwhile.
    fn fetch(&self, found: &Resolved<'_>, buf: &mut [u8]) -> Result<usize> {
        match found.source {
            Source::Stored { storage, host, .. } => storage.read_at(buf, host)?,
            Source::Encoded => {
                let layer = &self.layers[found.depth];
                let under = Under {
                    chain: self,
                    first: found.depth + 1,
                };
                return layer
                    .read_encoded_over(buf, found.at, &under)
                    .map_err(|e| e.at_opt(layer.storage().path()));
            }
            Source::Zero | Source::Below | Source::Moved(_) => buf.fill(0),
        }
        Ok(buf.len())
    }

    fn unsteady(&self, found: &Resolved<'_>, at: u64) -> Error {
        let text = format!("the bytes at {at:#x} changed {LOOKS} times while they were looked for");
        let layer = self.layers.get(found.depth);
        Error::new(ErrorKind::Io, text).at_opt(layer.and_then(|l| l.storage().path()))
    }
}

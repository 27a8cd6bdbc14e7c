//! Giving space back: free clusters punched, the end of the file cut off.

use std::ops::Range;
use std::sync::Arc;

use super::Qcow2;
use super::refblock::{Place, Structure};
use crate::error::Result;
use crate::image::Compact;
use crate::storage::Zeroing;
use crate::util::progress::Progress;
use crate::util::range;

/// Hosts give back whole blocks of their file systems, which have this many bytes at least.
const HOST_BLOCK: u64 = 4096;

impl Qcow2 {
    /// Has `found` see each part of the file that nothing counts and that the host has bytes for,
    /// in order; where the last cluster that something counts ends.
    fn uncounted(
        &self,
        progress: &dyn Progress,
        found: &mut dyn FnMut(Range<u64>) -> Result<()>,
    ) -> Result<u64> {
        let place = match &self.writer {
            Some(writer) => writer.refcounts.lock().place(),
            None => Place::of(&self.header),
        };
        let size = self.layout.cluster_size();
        let end = self.file.size().div_ceil(size);
        let mut used = end;
        let structure = Structure::new(Arc::clone(&self.file), place);
        structure.free_runs(end, progress, &mut |free| {
            if free.end == end {
                used = free.start;
                return Ok(());
            }
            let (mut at, stop) = (free.start * size, free.end * size);
            while at < stop {
                progress.check()?;
                let run = self.file.run(at, stop - at)?;
                if run.data {
                    found(at..at + run.len)?;
                }
                at += run.len;
            }
            Ok(())
        })?;
        Ok(used * size)
    }
}

impl Compact for Qcow2 {
    fn frees(&self) -> bool {
        self.external().is_none() && self.may_zero().is_ok()
    }

    fn free(&self, guest: &Range<u64>) -> Result<()> {
        self.zero_range(guest, Zeroing::MayUnmap)
    }

    fn unused(&self, progress: &dyn Progress) -> Result<u64> {
        let mut unused = 0;
        let used = self.uncounted(progress, &mut |part| {
            unused += range::len(&range::cut(&part, HOST_BLOCK).body);
            Ok(())
        })?;
        Ok(unused + self.file.size().saturating_sub(used))
    }

    fn pack(&self, progress: &dyn Progress) -> Result<u64> {
        self.writer()?.allocator.flush(self)?;
        let zero = |part| self.file.zero(part, Zeroing::MayUnmap);
        let used = self.uncounted(progress, &mut |part| zero(part))?;
        if self.file.size() > used && !self.file.has_fixed_len() {
            self.file.set_len(used)?;
        }
        Ok(0)
    }
}

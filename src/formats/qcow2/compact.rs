//! Giving space back: free clusters punched, the end of the file cut off.

use std::ops::Range;

use super::Qcow2;
use super::refcount::{Place, Refcounts};
use crate::error::Result;
use crate::image::Compact;
use crate::image::open::WriteOrder;
use crate::storage::Zeroing;
use crate::util::progress::Progress;
use crate::util::range;

impl Qcow2 {
    /// Has `found` see each run of the file that nothing counts, in order; where the last cluster that
    /// something counts ends.
    fn uncounted(&self, found: &mut dyn FnMut(Range<u64>) -> Result<()>) -> Result<u64> {
        let place = match &self.writer {
            Some(writer) => writer.refcounts.lock().place(),
            None => Place::of(&self.header),
        };
        let size = self.layout.cluster_size();
        let mut counts = Refcounts::new(place, self.file.size(), WriteOrder::Unordered);
        let mut used = 0;
        for cluster in 0..self.file.size().div_ceil(size) {
            if counts.count(&*self.file, cluster)? == 0 {
                continue;
            }
            if used < cluster {
                found(used * size..cluster * size)?;
            }
            used = cluster + 1;
        }
        Ok(used * size)
    }

    /// The parts of a range of the file that the host keeps bytes for.
    fn kept(&self, host: Range<u64>, found: &mut dyn FnMut(Range<u64>)) -> Result<()> {
        let mut at = host.start;
        while at < host.end {
            let run = self.file.run(at, host.end - at)?;
            if run.data {
                found(at..at + run.len);
            }
            at += run.len;
        }
        Ok(())
    }
}

impl Compact for Qcow2 {
    fn frees(&self) -> bool {
        self.external().is_none() && self.may_zero().is_ok()
    }

    fn free(&self, guest: &Range<u64>) -> Result<()> {
        self.zero_range(guest, Zeroing::MayUnmap)
    }

    fn unused(&self) -> Result<u64> {
        let mut unused = 0;
        let used =
            self.uncounted(&mut |host| self.kept(host, &mut |part| unused += range::len(&part)))?;
        Ok(unused + self.file.size().saturating_sub(used))
    }

    fn pack(&self, progress: &dyn Progress) -> Result<u64> {
        self.writer()?.allocator.flush(self)?;
        let mut unused = Vec::new();
        let used = self.uncounted(&mut |host| {
            progress.check()?;
            self.kept(host, &mut |part| range::push_merged(&mut unused, part))
        })?;
        for part in unused {
            progress.check()?;
            self.file.zero(part, Zeroing::MayUnmap)?;
        }
        if self.file.size() > used && !self.file.has_fixed_len() {
            self.file.set_len(used)?;
        }
        Ok(0)
    }
}

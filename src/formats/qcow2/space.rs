//! Zeroing and discarding by metadata; space set aside in guest order.

use std::ops::Range;

use super::Qcow2;
use super::units::check_part;
use crate::error::{Error, ErrorKind, Result};
use crate::image::Layout as AssignLayout;
use crate::image::units::{Target, Units};
use crate::storage::Zeroing;
use crate::util::align::down;
use crate::util::range;

impl Qcow2 {
    /// [`crate::image::Image::zero`].
    pub(super) fn zero_range(&self, range: &Range<u64>, how: Zeroing) -> Result<()> {
        self.start_writing()?;
        self.may_zero()?;
        let target = match how {
            _ if self.header.version < 3 => Target::Below,
            Zeroing::MayUnmap => Target::Zero,
            Zeroing::KeepSpace => Target::ZeroKept,
        };
        self.drop_range(range, target)
    }

    /// Refuses where zeroes cannot be said by metadata.
    pub(super) fn may_zero(&self) -> Result<()> {
        let raw_data = self.external().is_some();
        if raw_data && self.header.data_file_is_raw() {
            // The data file must read as the disk does, so the zeroes belong there.
            return Err(Error::unsupported(
                "the data file must itself read as zeroes",
            ));
        }
        if self.header.version < 3 && self.header.backing_name.is_some() {
            return Err(Error::unsupported("version 2 images have no zero clusters"));
        }
        Ok(())
    }

    /// [`crate::image::Image::discard`].
    pub(super) fn discard_range(&self, range: &Range<u64>) -> Result<()> {
        self.start_writing()?;
        let backed = self.header.backing_name.is_some();
        // Without zero clusters, what lies below would show again.
        if self.external().is_some() || backed && self.header.version < 3 {
            return Err(Error::unsupported(
                "the range cannot be dropped by metadata alone",
            ));
        }
        let target = match backed {
            true => Target::Dropped,
            false => Target::Below,
        };
        self.drop_range(range, target)
    }

    /// Changes whole subclusters; a range that begins or ends within a compressed cluster, which
    /// has no parts, is refused.
    pub(super) fn drop_range(&self, range: &Range<u64>, target: Target) -> Result<()> {
        let size = self.layout.cluster_size();
        for at in [range.start, range.end] {
            if at % size != 0 && at < self.size() {
                let start = down(at, size);
                check_part(start, self.entry(start)?.cluster)?;
            }
        }
        self.allocator()?.drop_units(self, range, target)
    }

    /// Gives back what was set aside, or made ready, and not used, and the end of the file where
    /// that is it.
    pub(super) fn release_assigned(&self) -> Result<()> {
        for run in self.allocator()?.release_unused(self) {
            let host = run.bytes(self.layout.cluster_size());
            if self.external().is_none() && host.end == self.file.size() {
                // Where the file cannot be cut, a device, the end of it is free all the same.
                drop(self.file.set_len(host.start));
            }
        }
        Ok(())
    }

    fn reserve_host(&self, host: Range<u64>) -> Result<()> {
        if range::len(&host) == 0 {
            return Ok(());
        }
        match self.data()?.reserve(host) {
            Err(e) if e.kind() == ErrorKind::Unsupported => Ok(()),
            done => done,
        }
    }
}

impl AssignLayout for Qcow2 {
    fn assign(&self, ranges: &[Range<u64>]) -> Result<()> {
        self.start_writing()?;
        if self.external().is_some() {
            return ranges.iter().try_for_each(|r| self.reserve_host(r.clone()));
        }
        self.allocator()?.assign(self, ranges)
    }
}

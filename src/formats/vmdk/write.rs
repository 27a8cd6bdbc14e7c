//! Changes of the disk's data: each is left to the extents that it meets.

use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::formats::vmdk::extent::{Data, Extent};
use crate::formats::vmdk::image::Vmdk;
use crate::formats::vmdk::line::Access;
use crate::formats::vmdk::session::Session;
use crate::formats::vmdk::sparse::Sparse;
use crate::image::units::{Target, Units};
use crate::image::{Fill, Layout, Slot, Store};
use crate::storage::Zeroing;
use crate::util::range::{intersect, len};

impl Sparse {
    /// Whether there is nothing in a range for a change that may be made.
    fn has_none(&self, guest: &Range<u64>, change: Change) -> Result<bool> {
        let target = match change {
            Change::Zero(_) => Target::Zero,
            Change::Discard => Target::Dropped,
        };
        self.may_drop(target)?;
        let grain = self.unit_len();
        let (first, end) = (guest.start / grain, guest.end.div_ceil(grain));
        Ok(self.next_to_drop(first, end, target)? >= end)
    }
}

impl Extent {
    /// Whether bytes in place may be overwritten: the disk says that it is another by now.
    pub(super) fn is_open(&self) -> bool {
        self.session.as_ref().is_some_and(|s| s.has_begun())
            && self.line.access == Access::ReadWrite
    }

    /// What it is part of, where it may be written to.
    pub(super) fn session(&self) -> Result<&Arc<Session>> {
        let session = self.session.as_ref().ok_or_else(Error::read_only)?;
        let why = match (self.line.access, &self.data) {
            (Access::ReadOnly, _) => "is RDONLY",
            (Access::None, _) => "is NOACCESS",
            (_, Data::Zero) => "is of type ZERO",
            _ => return Ok(session),
        };
        Err(Error::unsupported(format!(
            "the extent of the bytes {:#x}..{:#x} {why}, and is not written to",
            self.start,
            self.end()
        )))
    }

    /// The bytes of its file that these bytes of the disk are, where it is flat.
    fn host(&self, start: u64, guest: &Range<u64>) -> Range<u64> {
        let first = start + (guest.start - self.start);
        first..first + len(guest)
    }

    fn allocate(&self, guest: Range<u64>, fill: &mut Fill<'_>, ahead: bool) -> Result<u64> {
        let (session, base) = (self.session()?, self.start);
        match (&self.data, &self.storage) {
            (Data::Sparse(sparse), _) => {
                let within = guest.start - base..guest.end - base;
                let mut fill = |slot: Slot<'_>| {
                    fill(Slot {
                        guest: slot.guest.start + base..slot.guest.end + base,
                        ..slot
                    })
                };
                let given = match ahead {
                    true => sparse.allocate_ahead(within, &mut fill)?,
                    false => Store::allocate(&**sparse, within, &mut fill)?,
                };
                Ok(given.min(len(&guest)))
            }
            (Data::Flat(start), Some(storage)) => {
                session.begin()?;
                let end = self.host(*start, &self.guest()).end;
                if storage.size() < end && !storage.has_fixed_len() {
                    storage.set_len(end)?;
                }
                // All of it is there now.
                Ok(0)
            }
            _ => Err(Error::read_only()),
        }
    }

    fn zero(&self, guest: &Range<u64>, change: Change) -> Result<()> {
        if matches!(self.data, Data::Zero) {
            return Ok(());
        }
        let (session, base) = (self.session()?, self.start);
        match (&self.data, &self.storage) {
            (Data::Sparse(sparse), _) => {
                let within = guest.start - base..guest.end - base;
                // Where nothing changes, the disk does not say that it is another.
                if sparse.has_none(&within, change)? {
                    return Ok(());
                }
                match change {
                    Change::Zero(how) => sparse.zero(within, how),
                    Change::Discard => sparse.discard(within),
                }
            }
            (Data::Flat(start), Some(storage)) => {
                session.begin()?;
                let host = self.host(*start, guest);
                let there = host.start..host.end.min(storage.size());
                let how = match change {
                    Change::Zero(how) => how,
                    Change::Discard => Zeroing::MayUnmap,
                };
                match there.is_empty() {
                    true => Ok(()),
                    false => storage.zero(there, how),
                }
            }
            _ => Err(Error::read_only()),
        }
    }

    fn flush(&self) -> Result<()> {
        match (&self.data, &self.storage) {
            (Data::Sparse(sparse), _) => Store::flush(&**sparse),
            (Data::Flat(_), Some(storage)) => storage.sync(),
            _ => Ok(()),
        }
    }

    pub(super) fn close(&self) -> Result<()> {
        match &self.data {
            Data::Sparse(sparse) => sparse.close(),
            _ => Ok(()),
        }
        .map_err(|e| e.at_opt(self.path()))
    }
}

/// How bytes become zeroes.
#[derive(Debug, Clone, Copy)]
enum Change {
    Zero(Zeroing),
    Discard,
}

impl Vmdk {
    fn change(&self, guest: &Range<u64>, change: Change) -> Result<()> {
        for extent in &self.extents {
            if let Some(part) = intersect(guest, &extent.guest()) {
                let zeroed = extent.zero(&part, change);
                zeroed.map_err(|e| e.at_opt(extent.path()))?;
            }
        }
        Ok(())
    }

    fn give(&self, guest: Range<u64>, fill: &mut Fill<'_>, ahead: bool) -> Result<u64> {
        let extent = self.extent(guest.start)?;
        let part = guest.start..guest.end.min(extent.end());
        let given = extent.allocate(part, fill, ahead);
        given.map_err(|e| e.at_opt(extent.path()))
    }
}

impl Store for Vmdk {
    fn allocate(&self, guest: Range<u64>, fill: &mut Fill<'_>) -> Result<u64> {
        self.give(guest, fill, false)
    }

    fn allocate_ahead(&self, guest: Range<u64>, fill: &mut Fill<'_>) -> Result<u64> {
        self.give(guest, fill, true)
    }

    fn zero(&self, guest: Range<u64>, how: Zeroing) -> Result<()> {
        self.change(&guest, Change::Zero(how))
    }

    fn discard(&self, guest: Range<u64>) -> Result<()> {
        self.change(&guest, Change::Discard)
    }

    fn flush(&self) -> Result<()> {
        let flush = |e: &Extent| e.flush().map_err(|error| error.at_opt(e.path()));
        self.extents.iter().try_for_each(flush)
    }
}

impl Layout for Vmdk {
    fn assign(&self, ranges: &[Range<u64>]) -> Result<()> {
        for extent in &self.extents {
            let Data::Sparse(sparse) = &extent.data else {
                continue;
            };
            let base = extent.start;
            let parts = ranges.iter().filter_map(|r| intersect(r, &extent.guest()));
            let parts: Vec<Range<u64>> = parts.map(|r| r.start - base..r.end - base).collect();
            if !parts.is_empty() {
                extent.session()?;
                let assigned = sparse.allocator()?.assign(&**sparse, &parts);
                assigned.map_err(|e| e.at_opt(extent.path()))?;
            }
        }
        Ok(())
    }
}

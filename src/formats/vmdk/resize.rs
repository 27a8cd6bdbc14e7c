//! Change of a disk's size: of its last extent.

use std::sync::atomic::Ordering;

use crate::error::{Error, Result};
use crate::formats::vmdk::create::{PART, Shape, TABLE, out_of_range};
use crate::formats::vmdk::descriptor::Descriptor;
use crate::formats::vmdk::extent::{Data, Extent};
use crate::formats::vmdk::header::{Header, SECTOR};
use crate::formats::vmdk::image::Vmdk;
use crate::formats::vmdk::line::ExtentLine;
use crate::formats::vmdk::sparse::Sparse;
use crate::formats::vmdk::tables::{Entry, Geometry, Tables};
use crate::image::table::{Endian, Table};
use crate::image::units::{Content, Units};
use crate::image::{Image, LayerBelow, Resize, Wait};
use crate::storage::{Zeroing, zero_or_write};
use crate::util::align::clamp_len;
use crate::util::progress::Silent;

/// A change of size that can be made.
struct Planned<'a> {
    last: &'a Extent,
    /// Where the last extent begins, and the length that it is to have.
    start: u64,
    len: u64,
    /// Up to where of it the parent may have data that is not to show.
    hidden: u64,
    lines: Vec<ExtentLine>,
}

/// Whether the grain that the end of the disk cuts is the disk's own by now.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cut {
    Owned,
    Later,
}

impl Resize for Vmdk {
    fn may_resize(&self, virtual_size: u64, below: LayerBelow) -> Result<()> {
        self.planned(virtual_size, below, Cut::Later).map(drop)
    }

    fn resize(&self, virtual_size: u64, below: LayerBelow) -> Result<()> {
        let old = self.virtual_size();
        let session = self.changed()?;
        let Planned {
            last,
            start,
            len,
            hidden,
            lines,
        } = self.planned(virtual_size, below, Cut::Owned)?;
        if virtual_size == old {
            return Ok(());
        }
        let relined = |descriptor: &mut Descriptor| descriptor.set_extents(lines);
        session.begin()?;
        if virtual_size > old {
            last.grow(old - start, len, hidden)?;
            session.change(relined)?;
        } else {
            session.change(relined)?;
            last.shrink(len)?;
        }
        last.end.store(virtual_size, Ordering::Release);
        self.set_size(virtual_size);
        Ok(())
    }
}

impl Vmdk {
    fn planned(&self, virtual_size: u64, below: LayerBelow, cut: Cut) -> Result<Planned<'_>> {
        let session = self.changed()?;
        self.may_change()?;
        let old = self.virtual_size();
        if !virtual_size.is_multiple_of(SECTOR) {
            return Err(Error::invalid(format!(
                "a VMDK of {virtual_size} bytes (allowed: a multiple of {SECTOR})"
            )));
        }
        let (last, start) = self.last()?;
        let len = virtual_size.checked_sub(start).filter(|len| *len > 0);
        let len = len.ok_or_else(|| {
            Error::unsupported(format!(
                "the last of the disk's extents begins at {start} (allowed: larger disks than that)"
            ))
        })?;
        self.check_len(last, len)?;
        let mut lines: Vec<ExtentLine> = session.descriptor().extents().cloned().collect();
        if let Some(line) = lines.last_mut() {
            line.sectors = len / SECTOR;
        }
        session.fits(|descriptor| descriptor.set_extents(lines.clone()))?;
        let hidden = match virtual_size == old {
            true => 0,
            false => last.may_resize(len, old, below, cut)?,
        };
        Ok(Planned {
            last,
            start,
            len,
            hidden,
            lines,
        })
    }

    fn last(&self) -> Result<(&Extent, u64)> {
        let last = self.extents.last();
        let last = last.ok_or_else(|| Error::corrupt("the disk has no extents"))?;
        Ok((last, last.start))
    }

    /// Refuses to make parts longer than others take them.
    fn check_len(&self, last: &Extent, len: u64) -> Result<()> {
        let kind = self.descriptor().and_then(|d| d.text("createtype"));
        let kind = kind.unwrap_or_default().to_ascii_lowercase();
        let split = kind.starts_with("twogb") || kind.starts_with("2gb");
        match split && len > PART * SECTOR && len > last.end() - last.start {
            true => Err(Error::unsupported(format!(
                "the disk would need another extent: the last would have {len} bytes (allowed: {}; convert makes one of any size)",
                PART * SECTOR
            ))),
            false => Ok(()),
        }
    }
}

/// Tables of a disk of `len` bytes.
fn tables_of(geometry: &Geometry, len: u64) -> u64 {
    let capacity = len;
    Geometry {
        capacity,
        ..*geometry
    }
    .tables()
}

impl Extent {
    /// Refuses what cannot be, before anything is changed; up to where of it the parent may have data
    /// that is not to show.
    fn may_resize(&self, len: u64, old_end: u64, below: LayerBelow, cut: Cut) -> Result<u64> {
        self.session()?;
        match &self.data {
            Data::Flat(_) => Ok(0),
            Data::Sparse(sparse) if sparse.is_hosted() => {
                let grows = self.start + len > old_end;
                let hidden = match grows && sparse.has_backing() {
                    true => below.end()?.min(self.start + len),
                    false => 0,
                };
                let geometry = sparse.geometry();
                if hidden > old_end && !geometry.zeroes {
                    return Err(Error::unsupported(
                        "a VMDK does not grow over data of its parent, which would show (allowed: with zeroed_grain=on, or after a rebase without a parent)",
                    ));
                }
                let (old, grain) = (old_end - self.start, geometry.grain);
                if hidden > old_end
                    && cut == Cut::Owned
                    && !old.is_multiple_of(grain)
                    && sparse.unit(old / grain)?.whole == Some(Content::Below)
                {
                    return Err(Error::unsupported(
                        "a VMDK does not grow over data of its parent within its last grain, which would show (allowed: after a rebase without a parent)",
                    ));
                }
                let room = geometry.per_table == crate::formats::vmdk::create::PER_TABLE;
                if !room && tables_of(&geometry, len) > geometry.tables() {
                    return Err(Error::unsupported(format!(
                        "its tables have {} entries (allowed where more are needed: 512)",
                        geometry.per_table
                    )));
                }
                if len / SECTOR > (geometry.grain / SECTOR) << 32 {
                    let text = "a sparse extent has at most 2^32 grains".to_owned();
                    return Err(out_of_range(text));
                }
                Ok(hidden.saturating_sub(self.start))
            }
            _ => Err(Error::unsupported(format!(
                "an extent of type {} is not resized",
                self.line.kind.word()
            ))),
        }
    }

    fn grow(&self, old: u64, len: u64, hidden: u64) -> Result<()> {
        match (&self.data, &self.storage) {
            (Data::Sparse(sparse), _) => sparse.grow(old, len, hidden),
            (Data::Flat(start), Some(storage)) => {
                // What is there behind its end is no longer cut off.
                let end = start + len;
                let there = start + old..storage.size().min(end);
                if there.start < there.end {
                    zero_or_write(&**storage, there, Zeroing::KeepSpace)?;
                }
                if storage.size() < end {
                    storage.set_len(end)?;
                }
                storage.sync()
            }
            _ => Ok(()),
        }
    }

    fn shrink(&self, len: u64) -> Result<()> {
        match (&self.data, &self.storage) {
            (Data::Sparse(sparse), _) => sparse.shrink(len),
            (Data::Flat(start), Some(storage)) => {
                let alone = storage.size() == start + (self.end() - self.start);
                match alone && !storage.has_fixed_len() {
                    true => storage.set_len(start + len),
                    false => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }
}

impl Sparse {
    /// Grows: what was cut off becomes zeroes, then tables, then the header that shows them.
    fn grow(&self, old: u64, len: u64, hidden: u64) -> Result<()> {
        self.release()?;
        self.allocator()?.begin(self)?;
        let tables = self.tables.load_full();
        let geometry = tables.geometry;
        let grains = old.div_ceil(geometry.grain);
        if !old.is_multiple_of(geometry.grain)
            && let Entry::At(host) = tables.entry(&*self.storage, grains - 1, Wait::Yes)?
        {
            let end = (host + geometry.grain).min(self.storage.size());
            let cut = host + old % geometry.grain..end;
            zero_or_write(&*self.storage, cut, Zeroing::KeepSpace)?;
        }
        self.clear_entries(&tables, grains)?;
        let wanted = tables_of(&geometry, len);
        let (gd, rgd) = match wanted > geometry.tables() {
            true => self.more_tables(&tables, wanted)?,
            false => (geometry.gd, geometry.rgd),
        };
        self.show(len, gd, rgd, |new| {
            // What would become visible of the parent reads as zeroes.
            let mut index = grains;
            let end = hidden.div_ceil(geometry.grain);
            while index < end {
                let next = end.min((index / geometry.per_table + 1) * geometry.per_table);
                let zeroes = vec![1; clamp_len(next - index, usize::MAX)];
                self.write_entries(new, index, &zeroes)?;
                index = next;
            }
            Ok(())
        })?;
        self.punch()
    }

    /// Makes directories for `wanted` tables behind what is in use, with the tables that are new; the
    /// old ones stay what they are until the header names others.
    fn more_tables(&self, tables: &Tables, wanted: u64) -> Result<(u64, Option<u64>)> {
        let storage = &*self.storage;
        let had = tables.geometry.tables();
        let (new, directory) = (wanted - had, Shape::directory(wanted) * SECTOR);
        let set = directory + new * TABLE * SECTOR;
        let copies = 1 + u64::from(tables.rgd.is_some());
        let count = (set * copies).div_ceil(TABLE * SECTOR);
        let host = self.take_table(count)?;
        let make = |host: u64, old: &Table| {
            let made = Table::new(host, wanted, Endian::Little);
            made.fill(storage, 0..wanted, |number| match number < had {
                true => old.get(storage, number, Wait::Yes),
                false => {
                    let at = host + directory + (number - had) * TABLE * SECTOR;
                    u32::try_from(at / SECTOR)
                        .map_err(|_| out_of_range("a table would lie behind 2 TiB".to_owned()))
                }
            })
        };
        make(host, &tables.gd)?;
        let rgd = match &tables.rgd {
            Some(old) => {
                make(host + set, old)?;
                Some(host + set)
            }
            None => None,
        };
        Ok((host, rgd))
    }

    /// Frees the grains from number `first` on.
    fn clear_entries(&self, tables: &Tables, first: u64) -> Result<()> {
        let (storage, geometry) = (&*self.storage, tables.geometry);
        let mut index = first;
        while index < geometry.tables() * geometry.per_table {
            let end = (index / geometry.per_table + 1) * geometry.per_table;
            if let Entry::At(_) = tables.table(storage, index / geometry.per_table, Wait::Yes)? {
                let zeroes = vec![0; clamp_len(end - index, usize::MAX)];
                self.write_entries(tables, index, &zeroes)?;
            }
            index = end;
        }
        Ok(())
    }

    /// Shrinks: entries behind the new end go, then the header says so, then the file is cut.
    fn shrink(&self, len: u64) -> Result<()> {
        self.release()?;
        self.allocator()?.begin(self)?;
        let tables = self.tables.load_full();
        let geometry = tables.geometry;
        self.clear_entries(&tables, len.div_ceil(geometry.grain))?;
        self.show(len, geometry.gd, geometry.rgd, |_| Ok(()))?;
        self.pack(&Silent).map(drop)
    }

    /// Has the header say where the tables are and how long the disk is: one sector, the old one or
    /// the new one at any time.  Before that `fill` may write to the tables.
    fn show(
        &self,
        len: u64,
        gd: u64,
        rgd: Option<u64>,
        fill: impl FnOnce(&Tables) -> Result<()>,
    ) -> Result<()> {
        let len = len.next_multiple_of(self.geometry().grain);
        let mut header = Header::read(&*self.storage, 0)?;
        header.set_shape(len / SECTOR, gd / SECTOR, rgd.map(|host| host / SECTOR));
        let geometry = header.geometry(self.storage.size())?;
        fill(&Tables::new(geometry))?;
        self.allocator()?.order.settle()?;
        self.storage.write_at(&header.bytes, 0)?;
        self.allocator()?.order.settle()?;
        self.tables
            .store(std::sync::Arc::new(Tables::new(geometry)));
        self.learn()
    }
}

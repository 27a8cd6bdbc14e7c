//! Which parts of a sparse file are in use: by grains, and by tables behind the first of them.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::formats::vmdk::header::{SECTOR, UNCLEAN};
use crate::formats::vmdk::session::Session;
use crate::formats::vmdk::spans::Spans;
use crate::formats::vmdk::sparse::{Sparse, Writer};
use crate::formats::vmdk::tables::{Entry, Tables};
use crate::image::Wait;
use crate::image::open::{OpenOptions, WriteOrder};
use crate::image::units::{Allocator, Fault, Grid, Order, Slots, Units};
use crate::util::align::{clamp_len, len64};

/// What is in use of a file.
#[derive(Debug)]
pub(super) struct InUse {
    pub(super) grid: Grid,
    pub(super) slots: Slots,
    /// How many of the slots are grains.
    pub(super) grains: u64,
    /// Tables or entries were not read that may name grains: no gap is free for certain.
    pub(super) partial: bool,
}

/// What is wrong with an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum What {
    /// The directory's entry leads to no table of its own.
    Table,
    /// The same, of the redundant directory.
    Copy,
    /// Of both.
    Stuck,
    /// The table's entry leads to no grain: behind the end, into metadata, between others.
    Lost,
    /// The file ends within its grain.
    Cut,
    /// Another entry, before it, names the same grain.
    Shared,
}

/// One wrong entry.
#[derive(Debug)]
pub(super) struct Wrong {
    /// Number of the table, or of the grain.
    pub(super) index: u64,
    pub(super) what: What,
    pub(super) text: String,
}

/// Where tables are and metadata, and how grains are told from them.
struct Scan<'a> {
    sparse: &'a Sparse,
    tables: &'a Tables,
    /// Host ranges of metadata.
    kept: Vec<Range<u64>>,
    found: Option<InUse>,
}

impl Scan<'_> {
    /// What is in use, with grains where `host`, the first, is.
    fn in_use(&mut self, host: u64) -> Result<&mut InUse> {
        if self.found.is_none() {
            let geometry = self.tables.geometry;
            let grain = geometry.grain;
            let skipped = (host % grain + grain - geometry.first % grain) % grain;
            let grid = Grid {
                start: geometry.first + skipped,
                lead: 0,
                stride: grain,
            };
            let mut slots = Slots::default();
            for range in &self.kept {
                let first = range.start.saturating_sub(grid.start) / grain;
                let last = range.end.saturating_sub(grid.start).div_ceil(grain);
                for number in first..last {
                    // As far as numbers are kept track of.
                    slots.name(grid, number, u64::MAX)?;
                }
            }
            self.found = Some(InUse {
                grid,
                slots,
                grains: 0,
                partial: false,
            });
        }
        let found = self.found.as_mut();
        found.ok_or_else(|| Error::corrupt("no grid"))
    }

    fn grain(&mut self, index: u64, word: u32) -> Result<Option<Wrong>> {
        let size = self.sparse.storage.size();
        let wrong = |what, text| Ok(Some(Wrong { index, what, text }));
        let host = match self.tables.grain_at(&*self.sparse.storage, index, word) {
            Ok(Entry::At(host)) => host,
            Ok(_) => return Ok(None),
            Err(e) => return wrong(What::Lost, e.message().to_owned()),
        };
        let found = self.in_use(host)?;
        let (grid, behind) = (found.grid, host.checked_sub(found.grid.start));
        let Some(behind) = behind.filter(|b| b.is_multiple_of(grid.stride)) else {
            let text = format!(
                "grain {index}: its table entry puts it at {host:#x} (allowed: whole grains from {:#x} on, as others are)",
                grid.start
            );
            return wrong(What::Lost, text);
        };
        let fault = found.slots.name(grid, behind / grid.stride, size)?;
        found.grains += u64::from(fault != Some(Fault::Shared));
        let text = |why: &str| {
            format!("grain {index}: its table entry is {word:#x}, and that grain {why}")
        };
        match fault {
            None => Ok(None),
            Some(Fault::Shared) => wrong(What::Shared, text("is in use by something else too")),
            Some(_) => wrong(What::Cut, text("is cut off by the end of the file")),
        }
    }
}

impl Sparse {
    /// Host offsets and numbers of tables, host ranges of metadata behind the first grain, and numbers
    /// of tables that are not read; `wrong` is told of entries of the directories that are.
    #[expect(clippy::type_complexity, reason = "one caller takes it apart")]
    fn find_tables(
        &self,
        tables: &Tables,
        wrong: &mut impl FnMut(Wrong) -> Result<()>,
    ) -> Result<(Vec<(u64, u64)>, Vec<Range<u64>>, Vec<u64>)> {
        let storage = &*self.storage;
        let (geometry, len) = (tables.geometry, tables.geometry.per_table * 4);
        let (mut hosts, mut invalid, mut spans) = (Vec::new(), Vec::new(), Spans::default());
        spans.add(0..SECTOR);
        spans.add(geometry.gd..geometry.gd + geometry.tables() * 4);
        self.kept.iter().for_each(|host| spans.add(host.clone()));
        tables.gd.each(storage, |number, word| {
            match tables.table_at(storage, number, word) {
                Ok(Entry::At(host)) => {
                    hosts.push((host, number));
                    spans.add_first(number, host..host + len);
                }
                Ok(_) => {}
                Err(_) => invalid.push((number, word)),
            }
            Ok(())
        })?;
        if let Some(rgd) = &tables.rgd {
            spans.add(rgd.host()..rgd.host() + rgd.len() * 4);
            rgd.each(storage, |number, word| {
                if let Ok(Entry::At(host)) = tables.table_at(storage, number, word) {
                    spans.add_second(number, host..host + len);
                }
                Ok(())
            })?;
        }
        let bad = spans.overlaps();
        let what = |number: &u64| match bad.second.binary_search(number) {
            Ok(_) => What::Stuck,
            Err(_) => What::Table,
        };
        for (index, word) in invalid {
            let text = match tables.table_at(storage, index, word) {
                Err(e) => e.message().to_owned(),
                Ok(_) => continue,
            };
            let what = what(&index);
            wrong(Wrong { index, what, text })?;
        }
        for index in &bad.first {
            wrong(Wrong {
                index: *index,
                what: what(index),
                text: format!("table {index} lies over other metadata"),
            })?;
        }
        for index in &bad.second {
            if bad.first.binary_search(index).is_err() {
                wrong(Wrong {
                    index: *index,
                    what: What::Copy,
                    text: format!("the second copy of table {index} lies over other metadata"),
                })?;
            }
        }
        Ok((hosts, spans.behind(geometry.first), bad.first))
    }

    /// What tables name; `wrong` is told of entries that are.
    ///
    /// # Errors
    /// The host's; those of `wrong`.
    pub(super) fn scan(
        &self,
        tables: &Tables,
        mut wrong: impl FnMut(Wrong) -> Result<()>,
    ) -> Result<InUse> {
        let storage = &*self.storage;
        let (geometry, len) = (tables.geometry, tables.geometry.per_table * 4);
        let (hosts, kept, bad) = self.find_tables(tables, &mut wrong)?;
        let mut scan = Scan {
            sparse: self,
            tables,
            kept,
            found: None,
        };
        let mut words = vec![0; clamp_len(len, usize::MAX)];
        for (host, number) in hosts {
            if bad.binary_search(&number).is_ok() {
                continue;
            }
            storage.read_at(&mut words, host)?;
            for (slot, word) in words.as_chunks::<4>().0.iter().enumerate() {
                let index = number * geometry.per_table + len64(slot);
                let word = u32::from_le_bytes(*word);
                if word == 0 || index >= geometry.grains() {
                    continue;
                }
                if let Some(found) = scan.grain(index, word)? {
                    wrong(found)?;
                }
            }
        }
        scan.in_use(0)?;
        let found = scan.found.take();
        found.ok_or_else(|| Error::corrupt("no grid"))
    }

    /// Makes ready for writing.
    ///
    /// # Errors
    /// `Unsupported` for what is never written to; `Corrupt` where an entry is wrong; the host's.
    pub(super) fn start_writing(
        &mut self,
        options: &OpenOptions,
        session: &Arc<Session>,
        has_backing: bool,
        learns: bool,
    ) -> Result<()> {
        let order = Order::new(options.order, Arc::clone(&self.storage), None);
        let allocator = Allocator::new(order, Arc::clone(&options.grace));
        let none = InUse {
            grid: Grid {
                start: self.geometry().first,
                lead: 0,
                stride: self.geometry().grain,
            },
            slots: Slots::default(),
            grains: 0,
            partial: false,
        };
        self.writer = Some(Writer {
            allocator,
            session: Arc::clone(session),
            has_backing,
            space: Mutex::new(none),
            torn: AtomicBool::new(false),
            making: Mutex::new(()),
        });
        match learns {
            true => self.learn(),
            false => Ok(()),
        }
    }

    /// Learns what is in use.
    ///
    /// # Errors
    /// `Corrupt` where an entry is wrong; the host's.
    pub(super) fn learn(&self) -> Result<()> {
        let tables = self.tables.load();
        let mut found = self.scan(&tables, |wrong| {
            let allowed = "allowed: writing after `check -r all`";
            Err(Error::corrupt(format!("{} ({allowed})", wrong.text)))
        })?;
        if let Some(at) = self.free_field {
            // Others take space from there on.
            let mut free = [0; 4];
            self.storage.read_at(&mut free, at)?;
            let free = u64::from(u32::from_le_bytes(free)) * SECTOR;
            let free = free
                .min(self.storage.size())
                .saturating_sub(found.grid.start);
            found.slots.reach(free.div_ceil(found.grid.stride));
        }
        *self.writer()?.space.lock() = found;
        Ok(())
    }

    /// Has the header say that somebody writes, durably.
    pub(super) fn begin_unclean(&self) -> Result<()> {
        if !self.is_hosted() {
            return Ok(());
        }
        if self.unclean.load(Ordering::Acquire) {
            // What a writer that died left between the two copies.
            self.align_copies()?;
        }
        let order = &self.writer()?.allocator.order;
        self.storage.write_at(&[1], UNCLEAN)?;
        order.settle()?;
        self.unclean.store(true, Ordering::Release);
        Ok(())
    }

    /// Has the header say that tables are being mended, where it does not say that already.
    pub(super) fn mark_unclean(&self) -> Result<()> {
        if self.is_hosted() && !self.unclean.load(Ordering::Acquire) {
            self.storage.write_at(&[1], UNCLEAN)?;
            self.writer()?.allocator.order.settle()?;
        }
        Ok(())
    }

    /// Takes that back, once what was mended is on stable media.
    pub(super) fn unmark_unclean(&self) -> Result<()> {
        if self.is_hosted() && !self.unclean.load(Ordering::Acquire) {
            self.writer()?.allocator.order.settle()?;
            self.storage.write_at(&[0], UNCLEAN)?;
        }
        Ok(())
    }

    /// Makes the second copies of tables what the first ones are; how many differed.
    pub(super) fn align_copies(&self) -> Result<u64> {
        let (storage, tables) = (&*self.storage, self.tables.load());
        let len = clamp_len(tables.geometry.per_table * 4, usize::MAX);
        let (mut first, mut second) = (vec![0; len], vec![0; len]);
        let mut differed = 0;
        for number in 0..tables.gd.len() {
            let Entry::At(host) = tables.table(storage, number, Wait::Yes)? else {
                continue;
            };
            let Some(copy) = tables.copy(storage, number)? else {
                continue;
            };
            storage.read_at(&mut first, host)?;
            storage.read_at(&mut second, copy)?;
            if first != second {
                storage.write_at(&first, copy)?;
                differed += 1;
            }
        }
        Ok(differed)
    }

    /// Leaves the file as a clean close leaves it.
    pub(super) fn close(&self) -> Result<()> {
        let Some(writer) = &self.writer else {
            return Ok(());
        };
        writer.allocator.close(self)?;
        if !writer.allocator.has_begun() {
            return Ok(());
        }
        self.trim()?;
        if writer.torn.load(Ordering::Acquire) {
            self.align_copies()?;
        }
        let order = &writer.allocator.order;
        order.flush()?;
        if self.is_hosted() {
            self.storage.write_at(&[0], UNCLEAN)?;
            self.unclean.store(false, Ordering::Release);
        }
        // Who changes tables after this says so again.
        writer.allocator.begin_again();
        match order.policy() {
            WriteOrder::Ordered => order.flush(),
            WriteOrder::Unordered => Ok(()),
        }
    }

    /// Ends the file behind what is in use.
    pub(super) fn trim(&self) -> Result<()> {
        let mut space = self.writer()?.space.lock();
        if space.partial {
            return Ok(());
        }
        space.slots.trim();
        let end = space.grid.host(space.slots.end()).start;
        self.write_free(space.grid, space.slots.end())?;
        match self.storage.has_fixed_len() || self.storage.size() <= end {
            true => Ok(()),
            false => self.storage.set_len(end),
        }
    }

    /// Drops what is set aside and what was freed, for changes of the file as a whole, after which
    /// all is counted anew.  With no request under way.
    pub(super) fn release(&self) -> Result<()> {
        let allocator = self.allocator()?;
        allocator.close(self)?;
        allocator.order.settle()
    }
}

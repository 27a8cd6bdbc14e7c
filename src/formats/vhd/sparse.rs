//! Dynamic and differencing disks: opening, and finding where bytes are.

use std::ffi::OsString;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::formats::vhd::batmap::{self, Batmap};
use crate::formats::vhd::bitmap::Bitmaps;
use crate::formats::vhd::details;
use crate::formats::vhd::footer::{self, Footer, Kind, Strictness};
use crate::formats::vhd::geometry::{SECTOR, SizeRule};
use crate::formats::vhd::header::{self, Header};
use crate::formats::vhd::layout::{self, Blocks, Bounds, UNUSED};
use crate::formats::vhd::locator::{self, Code};
use crate::formats::vhd::open::{self, End, Found};
use crate::formats::vhd::space::Space;
use crate::image::info::Detail;
use crate::image::open::{OpenOptions, Purpose};
use crate::image::relink::Relink;
use crate::image::table::{Endian, Table};
use crate::image::units::{Allocator, Order, Units};
use crate::image::{
    Amend, Backing, Caps, Check, Compact, Driver, Empty, Image, Layout, Resize, Run, Source, Store,
    Wait,
};
use crate::storage::open::Access;
use crate::storage::{Limits, Storage};
use crate::util::align;

/// What a change of size replaces.
#[derive(Debug)]
pub(super) struct Shape {
    /// As it is in the file.
    pub(super) footer: Footer,
    /// As it is in the file.
    pub(super) header: Header,
    /// The table of blocks.
    pub(super) table: Table,
    /// Size of the disk.
    pub(super) size: u64,
    /// Metadata that no block may lie upon.
    pub(super) reserved: [Range<u64>; 3],
    /// XenServer's batmap.
    pub(super) batmap: batmap::Found,
}

/// An open dynamic or differencing disk.
#[derive(Debug)]
pub(super) struct Sparse {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) write: bool,
    pub(super) kind: Kind,
    pub(super) rule: SizeRule,
    /// What the footer at the end is.  Locked before `space`.
    pub(super) end: Mutex<End>,
    pub(super) blocks: Blocks,
    pub(super) shape: ArcSwap<Shape>,
    /// The size that the disk is about to have, while it grows; else 0.
    pub(super) growing: AtomicU64,
    pub(super) bitmaps: Bitmaps,
    /// Where the file's data ends: no published block reaches past it.
    pub(super) data_end: AtomicU64,
    /// The parent's paths, as the locators have them.
    pub(super) locators: Vec<(Code, OsString)>,
    /// What gives blocks space.
    pub(super) allocator: Allocator,
    /// Held while space is taken, never while data is written.  Tables and bitmaps lock theirs
    /// under it.
    pub(super) space: Mutex<Space>,
}

impl Shape {
    /// A shape of what the file holds.
    pub(super) fn new(
        footer: Footer,
        header: Header,
        rule: SizeRule,
        batmap: batmap::Found,
    ) -> Self {
        let blocks = header.block_size();
        let room = header.max_entries() * blocks;
        Self {
            table: Table::new(header.table_offset(), header.max_entries(), Endian::Big),
            size: rule.size(&footer, room),
            reserved: layout::reserved(footer.header_offset(), &header),
            batmap,
            footer,
            header,
        }
    }

    /// The batmap, where it can be trusted.
    pub(super) fn batmap(&self) -> Option<&Batmap> {
        match &self.batmap {
            batmap::Found::Trusted(map) => Some(map),
            _ => None,
        }
    }
}

impl Sparse {
    /// Opens a disk with a table, whose footer was found.
    ///
    /// # Errors
    /// `Corrupt` and `Unsupported`, by name; the host's.
    pub(super) fn open(
        storage: Arc<dyn Storage>,
        options: &OpenOptions,
        found: Found,
        rule: SizeRule,
    ) -> Result<Self> {
        let strictness = open::strictness(options);
        let header = read_header(&*storage, &found.footer, strictness)?;
        check_table(&found.footer, &header, storage.size())?;
        let batmap = batmap::read(&*storage, &found.footer, &header)?;
        let shape = Shape::new(found.footer, header, rule, batmap);
        let room = header.max_entries() * header.block_size();
        if shape.size > room && options.purpose != Purpose::Check {
            return Err(Error::corrupt(format!(
                "the disk has {} bytes, its table of {} entries has room for {room}",
                shape.size,
                header.max_entries()
            )));
        }
        let locators = read_locators(&*storage, &header)?;
        let found_footer = match found.end {
            End::Whole | End::Short => Some(found.data_end),
            End::Killed | End::Damaged(_) => None,
        };
        let order = Order::new(options.order, Arc::clone(&storage), None);
        Ok(Self {
            write: options.access == Access::Write,
            kind: found.footer.kind(),
            rule,
            end: Mutex::new(found.end),
            blocks: Blocks::new(header.block_size()),
            shape: ArcSwap::from_pointee(shape),
            bitmaps: Bitmaps::default(),
            growing: AtomicU64::new(0),
            data_end: AtomicU64::new(found.data_end),
            locators,
            allocator: Allocator::new(order, Arc::clone(&options.grace)),
            space: Mutex::new(Space::new(found_footer)),
            storage,
        })
    }

    /// Whether blocks keep their space for ever: on storage of fixed length nobody gains by giving
    /// it back, and it would be missing until no reader can be there any more.
    pub(super) fn keeps_blocks(&self) -> bool {
        self.storage.has_fixed_len()
    }

    /// Where block `index` begins in the file; `None` where it has no space.
    pub(super) fn locate(&self, shape: &Shape, index: u64, wait: Wait) -> Result<Option<u64>> {
        let word = shape.table.get(&*self.storage, index, wait)?;
        self.bounds(shape).locate(index, word)
    }

    /// Where blocks may be.
    pub(super) fn bounds<'a>(&self, shape: &'a Shape) -> Bounds<'a> {
        Bounds {
            blocks: self.blocks,
            size: shape.size,
            data_end: self.data_end.load(Ordering::Acquire),
            reserved: &shape.reserved,
        }
    }

    /// The run at `at` of a block that begins at `host`.
    fn run_in_block(
        &self,
        shape: &Shape,
        host: u64,
        at: u64,
        len: u64,
        wait: Wait,
    ) -> Result<Run<'_>> {
        let index = self.blocks.index(at);
        let guest = self.blocks.guest(index);
        let within = at - guest.start;
        let len = len.min(guest.end - at);
        let full = shape.batmap().is_some_and(|map| map.is_full(index));
        let (present, len) = if full {
            (true, len)
        } else {
            let sectors = within / SECTOR..(within + len).div_ceil(SECTOR);
            let run = self.bitmaps.run(&*self.storage, host, sectors, wait)?;
            let end = (within / SECTOR + run.count) * SECTOR;
            (run.present, len.min(end - within))
        };
        let source = match (present, self.kind) {
            (true, _) => Source::Stored {
                storage: &*self.storage,
                host: host + self.blocks.bitmap + within,
                writable: self.write,
            },
            (false, Kind::Differencing) => Source::Below,
            (false, _) => Source::Zero,
        };
        Ok(Run { len, source })
    }
}

/// Reads the dynamic header.
fn read_header(storage: &dyn Storage, footer: &Footer, strictness: Strictness) -> Result<Header> {
    let at = footer.header_offset();
    let inside = at
        .checked_add(header::LEN64)
        .is_some_and(|e| e <= storage.size());
    if at < footer::LEN64 || !inside {
        return Err(Error::corrupt(format!(
            "the dynamic header is at {at:#x} with {} bytes, the file ends at {:#x} (allowed: inside the file, past the footer's copy)",
            header::LEN64,
            storage.size()
        )));
    }
    let mut bytes = [0; header::LEN];
    storage.read_at(&mut bytes, at)?;
    Header::parse(&bytes, strictness)
}

/// Refuses a table that is not inside the file, or lies upon the footer's copy or the header.
fn check_table(footer: &Footer, header: &Header, size: u64) -> Result<()> {
    let table = header.table_offset();
    // Sectors, by the format; what a word would straddle is read and written as words of other blocks.
    if !table.is_multiple_of(4) {
        return Err(Error::corrupt(format!(
            "the table begins at {table:#x} (allowed: a multiple of 512, or at least of 4)"
        )));
    }
    let end = table.checked_add(header.max_entries() * 4);
    let Some(end) = end.filter(|e| *e <= size) else {
        return Err(Error::corrupt(format!(
            "the table at {table:#x} with {} entries is not inside the file of {size:#x} bytes",
            header.max_entries()
        )));
    };
    let [copy, header, _] = layout::reserved(footer.header_offset(), header);
    let clash = |r: &Range<u64>| table < r.end && r.start < end.max(table + 1);
    if clash(&copy) || clash(&header) {
        return Err(Error::corrupt(format!(
            "the table at {table:#x}..{end:#x} lies upon the dynamic header at {:#x}..{:#x} or the footer's copy",
            header.start, header.end
        )));
    }
    Ok(())
}

/// The texts of the locators that can be read.
pub(super) fn read_locators(
    storage: &dyn Storage,
    header: &Header,
) -> Result<Vec<(Code, OsString)>> {
    let mut texts = Vec::new();
    for locator in header.locators() {
        let len = u64::from(locator.len);
        let end = locator.offset.checked_add(len);
        let inside = end.is_some_and(|e| e <= storage.size());
        if !inside || len == 0 || len > locator::MAX_DATA {
            continue;
        }
        let mut data = vec![0; align::clamp_len(len, usize::MAX)];
        storage.read_at(&mut data, locator.offset)?;
        if let Some(text) = locator::text(locator.code, &data) {
            texts.push((locator.code, text));
        }
    }
    Ok(texts)
}

impl Image for Sparse {
    fn driver(&self) -> &'static Driver {
        &super::DRIVER
    }

    fn virtual_size(&self) -> u64 {
        self.shape.load().size
    }

    fn cluster_size(&self) -> Option<u64> {
        Some(self.blocks.data)
    }

    fn limits(&self) -> Limits {
        // A differencing disk frees no blocks: the parent would show.
        if self.keeps_blocks() && self.kind == Kind::Dynamic {
            // What is given back is given back in place.
            return self.storage.limits();
        }
        let unit = match self.kind {
            Kind::Differencing => 0,
            Kind::Dynamic | Kind::Fixed => u32::try_from(self.blocks.data).unwrap_or(0),
        };
        Limits {
            zero_align: unit,
            discard_align: unit,
            ..self.storage.limits()
        }
    }

    fn caps(&self) -> Caps {
        Caps {
            write: self.write,
            backing: self.has_backing(),
            ..Caps::STORED
        }
    }

    fn storage(&self) -> &dyn Storage {
        &*self.storage
    }

    fn map(&self, at: u64, len: u64, wait: Wait) -> Result<Run<'_>> {
        let shape = self.shape.load();
        let len = len.min(shape.size.saturating_sub(at));
        let index = self.blocks.index(at);
        match self.locate(&shape, index, wait)? {
            Some(host) => self.run_in_block(&shape, host, at, len, wait),
            None => {
                let others = index + 1..self.blocks.count(at + len);
                let end = shape.table.alike(others, |_, word| word == UNUSED);
                Ok(Run {
                    len: (at + len).min(end * self.blocks.data) - at,
                    source: Source::Below,
                })
            }
        }
    }

    fn store(&self) -> Option<&dyn Store> {
        Some(self)
    }

    fn flush(&self) -> Result<()> {
        if self.write {
            self.complete_end(&mut self.space.lock(), &self.shape.load())?;
        }
        Store::flush(self)
    }

    fn close(&self) -> Result<()> {
        self.allocator.close(self)?;
        self.trim(&mut self.space.lock(), &self.shape.load())
    }

    fn backing(&self) -> Option<Backing> {
        if self.kind != Kind::Differencing {
            return None;
        }
        let shape = self.shape.load();
        let uuid = shape.header.parent_uuid();
        // XenServer's way of saying that the parent is a raw file.
        let raw = uuid.is_nil();
        Some(Backing {
            names: locator::names(&self.locators, shape.header.parent_name().as_deref()),
            format: Some(if raw { "raw" } else { "vhd" }.to_owned()),
            identity: (!raw).then_some(uuid),
            state: None,
        })
    }

    fn identity(&self) -> Option<Uuid> {
        Some(self.shape.load().footer.uuid())
    }

    fn details(&self) -> Vec<Detail> {
        let shape = self.shape.load();
        let mut details = details::of_footer(&shape.footer, &self.end.lock(), self.rule);
        let header = details::of_header(&shape.header, &shape.batmap, &self.locators);
        details.extend(header);
        details
    }

    fn as_layout(&self) -> Option<&dyn Layout> {
        Some(self)
    }

    fn as_check(&self) -> Option<&dyn Check> {
        Some(self)
    }

    fn as_relink(&mut self) -> Option<&mut dyn Relink> {
        Some(self)
    }

    fn as_amend(&mut self) -> Option<&mut dyn Amend> {
        Some(self)
    }

    fn as_empty(&mut self) -> Option<&mut dyn Empty> {
        Some(self)
    }

    fn as_compact(&self) -> Option<&dyn Compact> {
        Some(self)
    }

    fn as_resize(&self) -> Option<&dyn Resize> {
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::formats::vhd::batmap::tests::{add, tap_footer};
    use crate::formats::vhd::create::CREATOR;
    use crate::image::LayerBelow;
    use crate::image::check::Repair;
    use crate::image::create::CreateOptions;
    use crate::image::options::OptionValues;
    use crate::storage::memory::MemoryStorage;
    use crate::util::progress::Silent;

    const BLOCK: u64 = 2 << 20;

    fn open_for_writing(storage: &Arc<MemoryStorage>) -> Box<dyn Image> {
        let options = OpenOptions {
            access: Access::Write,
            ..OpenOptions::default()
        };
        open::open(Arc::clone(storage) as Arc<dyn Storage>, &options).expect("opens")
    }

    /// A disk of four blocks as tapdisk leaves it, whose batmap calls block 1 full; of blocks 0
    /// and 1, which have space, both bitmaps are empty.
    fn by_tapdisk() -> Arc<MemoryStorage> {
        let storage = Arc::new(MemoryStorage::new());
        let options = CreateOptions {
            size: 4 * BLOCK,
            ..CreateOptions::default()
        };
        (CREATOR.create)(&*storage, &options).expect("creates");
        let mut bytes = [0; footer::LEN];
        storage.read_at(&mut bytes, 0).expect("reads");
        let footer = Footer::parse(&bytes, Strictness::Strict).expect("is whole");
        let bytes = tap_footer(&footer).to_bytes();
        add(&storage, 2048, &[1]);
        storage.write_at(&bytes, 0).expect("writes");
        storage.write_at(&bytes, 3072).expect("writes");
        let image = open_for_writing(&storage);
        for index in [0, 1] {
            let mut hosts = Vec::new();
            let mut fill = |slot: crate::image::Slot<'_>| {
                hosts.push(slot.host);
                Ok(())
            };
            image
                .allocate(index * BLOCK, 512, &mut fill)
                .expect("allocates");
            for host in hosts {
                storage.write_at(&[0; 512], host - 512).expect("writes");
            }
        }
        image.close().expect("closes");
        storage
    }

    fn batmap(image: &dyn Image) -> String {
        let details = image.details().into_iter();
        let found = details.filter(|d| d.key == "batmap");
        found.map(|d| d.value.to_string()).collect()
    }

    #[test]
    fn a_trusted_batmap_spares_the_bitmap_and_survives_our_writes() {
        let image = open_for_writing(&by_tapdisk());
        assert_eq!(batmap(&*image), "\"trusted\"");
        let run = |at| image.map(at, 4096, Wait::Yes).expect("maps").source;
        assert!(matches!(run(0), Source::Zero));
        assert!(matches!(run(BLOCK), Source::Stored { .. }));
        assert!(matches!(run(2 * BLOCK), Source::Below));
    }

    #[test]
    fn what_xenserver_records_is_changed_and_nothing_else() {
        let storage = by_tapdisk();
        let before = storage.to_bytes();
        let mut image = open_for_writing(&storage);
        let amend = image.as_amend().expect("can be");
        let specs = amend.options();
        let values = |text| OptionValues::parse(specs, "vhd", [text]).expect("are known");
        for wrong in ["hidden=3", "marker=256"] {
            amend.amend(&values(wrong)).expect_err("is no such value");
        }
        amend.amend(&values("hidden=1,marker=7")).expect("is taken");
        image.close().expect("closes");
        let image = open_for_writing(&storage);
        assert_eq!(batmap(&*image), "\"trusted\"");
        let fact = |key: &str| {
            let mut details = image.details().into_iter();
            details.find(|d| d.key == key).map(|d| d.value.to_string())
        };
        let facts = ["hidden", "marker"].map(fact);
        assert_eq!(facts, ["1", "7"].map(|text| Some(text.to_owned())));
        let after = storage.to_bytes();
        let changed = (0..before.len()).filter(|at| before[*at] != after[*at]);
        // In each footer the byte and the last of the checksum, and the marker.
        assert_eq!(changed.count(), 5);
    }

    #[test]
    fn blocks_that_a_batmap_names_are_not_freed() {
        let image = open_for_writing(&by_tapdisk());
        let error = image.discard(0..BLOCK).expect_err("is kept");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn a_batmap_that_growing_would_move_is_dropped_with_its_creator() {
        let storage = by_tapdisk();
        let image = open_for_writing(&storage);
        let resize = image.as_resize().expect("resizes");
        resize
            .resize(9 * BLOCK, LayerBelow::Nothing)
            .expect("grows");
        image.close().expect("closes");
        let image = open_for_writing(&storage);
        assert_eq!(batmap(&*image), "\"none\"");
        assert_eq!(image.virtual_size(), 9 * BLOCK);
        let run = image.map(BLOCK, 512, Wait::Yes).expect("maps");
        assert!(matches!(run.source, Source::Zero), "now the bitmap counts");
    }

    #[test]
    fn a_batmap_that_contradicts_a_bitmap_is_found_and_kept() {
        let image = open_for_writing(&by_tapdisk());
        let check = image.as_check().expect("can be checked");
        let report = check.check(Repair::All, &Silent).expect("the host is well");
        assert_eq!(report.corruptions, 1, "{report:?}");
        assert!(report.findings.iter().any(|f| f.text.contains("batmap")));
    }
}

//! Any bytes as an image of any format: opened, mapped, read, checked, repaired, written.  The body
//! of the fuzz target and of the test beside it; it uses nothing but the library.

use std::ffi::OsStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use vdtool::chain::{Base, Chain};
use vdtool::container::gzip::Gunzipped;
use vdtool::container::tar;
use vdtool::formats::{DRIVERS, container};
use vdtool::image::bitmap::Recording;
use vdtool::image::check::{Repair, Report};
use vdtool::image::open::{Companions, OpenOptions, Purpose};
use vdtool::image::probe::ProbeInput;
use vdtool::image::sector::{self, Parts, Segment, Segments, Unit};
use vdtool::image::snapshot::Pick;
use vdtool::image::{Driver, Image};
use vdtool::storage::memory::MemoryStorage;
use vdtool::storage::open::Access;
use vdtool::storage::{Storage, Zeroing};
use vdtool::util::progress::Silent;
use vdtool::util::progress::Watcher;

/// Longer inputs are let go: what they add is time.  No VHDX with data is shorter than 4 MiB.
const MAX_INPUT: usize = 6 << 20;
/// Most bytes that a compressed input may come to.
const MOST_UNZIPPED: u64 = 8 << 20;
/// Extents looked at.
const MAX_EXTENTS: usize = 2000;
/// Bytes read or written at a time.
const PIECE: usize = 70_000;
/// Most bytes that a disk may get by a resize: tables in memory follow from it.
const MAX_GROWN: u64 = 1 << 40;

/// Opens `bytes` as each format that they look like and does with it all that can be done.
///
/// # Panics
/// Where the library breaks its word: what was written reads back, and a repair that says that it
/// left nothing wrong did.
pub(crate) fn exercise(bytes: &[u8]) {
    if bytes.len() > MAX_INPUT {
        return;
    }
    let input = ProbeInput {
        head: &bytes[..bytes.len().min(4096)],
        tail: &bytes[bytes.len().saturating_sub(512)..],
        len: bytes.len() as u64,
        extension: None,
    };
    parse(bytes);
    disc(bytes);
    for driver in DRIVERS.iter().filter(|d| (d.probe)(&input) > 1) {
        read(driver, bytes);
        check(driver, bytes);
        write(driver, bytes);
        change(driver, bytes);
        merge(driver, bytes);
    }
}

/// Most bytes of a disk that is merged.
const MOST_MERGED: u64 = 4 << 20;

/// Lists the operations of an image, and merges it into a disk below: that is what was read before.
fn merge(driver: &'static Driver, bytes: &[u8]) {
    let (cow, base) = (memory(bytes), memory(&[3; 300_000]));
    let Some((image, _)) = open(driver, &cow, Access::Write, Purpose::Use) else {
        return;
    };
    if let Some(operations) = image.as_operations() {
        let _ = operations.each(&mut |_| Ok(()));
    }
    let raw = vdtool::formats::PLAIN;
    let over = |image: Box<dyn Image>, access| {
        let (below, options) = open(raw, &base, access, Purpose::Use)?;
        image.lies_over(below.virtual_size());
        Some((image, below, options.grace))
    };
    if image.as_merge().is_none() || image.virtual_size() > MOST_MERGED {
        return;
    }
    let read = || {
        let (image, _) = open(driver, &cow, Access::Read, Purpose::Use)?;
        let (image, below, grace) = over(image, Access::Read)?;
        let chain = Chain::new(vec![image, below], Base::Zeroes, grace).ok()?;
        let mut all = vec![0; usize::try_from(chain.virtual_size()).ok()?];
        chain.read_at(&mut all, 0).ok().map(|()| all)
    };
    let before = read();
    let Some((image, below, grace)) = over(image, Access::Write) else {
        return;
    };
    let (Ok(upper), Ok(lower)) = (
        Chain::new(vec![image], Base::NotOpened, grace),
        Chain::new(vec![below], Base::Zeroes, Arc::default()),
    ) else {
        return;
    };
    let done = vdtool::copy::merge(&upper, &lower, &Silent);
    if let Some(before) = before {
        let after = read().expect("read before");
        assert!(after == before, "a merge changes nothing of the disk");
        assert!(
            done.is_err() || base.to_bytes() == before,
            "it is all there"
        );
    }
}

/// Reads them as what holds files.
fn parse(bytes: &[u8]) {
    let storage = memory(bytes);
    if let Ok(members) = tar::members(&*storage) {
        for member in members {
            assert!(member.data.start <= member.data.end && member.data.end <= storage.size());
        }
    }
    if let Ok(unzipped) = Gunzipped::open(storage, MOST_UNZIPPED, &Watcher::default()) {
        let mut buf = vec![0; PIECE];
        for at in places(unzipped.size()) {
            unzipped.read_at(&mut buf, at).expect("was read before");
        }
    }
    for driver in DRIVERS {
        if let Some(container) = container(driver) {
            let options = OpenOptions::default();
            let _ = (container.contents)(memory(bytes), &options);
        }
    }
}

/// The file that every name in a sheet leads to.
#[derive(Debug)]
struct Only(Arc<MemoryStorage>);

impl Companions for Only {
    fn open(&self, _name: &OsStr, _what: &str) -> vdtool::Result<Arc<dyn Storage>> {
        Ok(Arc::clone(&self.0) as Arc<dyn Storage>)
    }
}

/// A sheet, and from the first zero byte on the file of sectors that it names.
fn disc(bytes: &[u8]) {
    let Some(end) = bytes.iter().position(|b| *b == 0) else {
        return;
    };
    let (sheet, sectors) = (&bytes[..end], &bytes[end + 1..]);
    let input = ProbeInput {
        head: &sheet[..sheet.len().min(4096)],
        tail: &[],
        len: sheet.len() as u64,
        extension: Some("cue"),
    };
    for driver in DRIVERS.iter().filter(|d| (d.probe)(&input) >= 100) {
        for purpose in [Purpose::Describe, Purpose::Use, Purpose::Check] {
            let file = memory(sectors);
            let options = OpenOptions {
                access: Access::Write,
                purpose,
                needed: Some(Arc::new(Only(Arc::clone(&file)))),
                ..OpenOptions::default()
            };
            let sheet: Arc<dyn Storage> = memory(sheet);
            if let Ok(image) = (driver.open)(sheet, &options) {
                sectors_of(&*image, &file);
                read_disc(image, &options);
            }
        }
    }
}

fn read_disc(image: Box<dyn Image>, options: &OpenOptions) {
    let Ok(chain) = Chain::new(vec![image], Base::Zeroes, Arc::clone(&options.grace)) else {
        return;
    };
    let size = chain.virtual_size();
    if size > 0
        && let Ok(extents) = chain.extents(0..size)
    {
        let all = extents.take(MAX_EXTENTS).map_while(Result::ok);
        assert!(all.last().is_none_or(|last| last.end() <= size));
    }
    let mut buf = vec![0; PIECE];
    for at in places(size) {
        let _ = chain.read_at(&mut buf[..piece(size, at)], at);
    }
}

/// Reads, checks, mends and writes all that the disc has, which keeps its length.
fn sectors_of(image: &dyn Image, file: &MemoryStorage) {
    let _ = image.details();
    let (Some(disc), Some(check)) = (image.as_sectors(), image.as_check()) else {
        return;
    };
    let len = file.to_bytes().len();
    let all = |parts| {
        let len = disc.end().min(100);
        let segment = Segment {
            start: 0,
            len,
            parts,
        };
        Segments::new(Unit::Blocks, [segment]).expect("is right")
    };
    let mut found = 0;
    let read = sector::read(disc, &all(Parts::ALL), &mut |_, bytes| {
        found += bytes.len() as u64;
        Ok(())
    });
    assert!(read.is_err() || read.is_ok_and(|len| len == found));
    let before = check.check(Repair::Nothing, &Silent);
    let mended = check.check(Repair::All, &Silent);
    // Files that are one file here may be mended in one place and harmed in another.
    let is_alone = image.parts().len() == 2;
    if let (Ok(before), Ok(mended), true) = (before, mended, is_alone) {
        assert_eq!(
            before.corruptions,
            mended.corruptions + mended.corruptions_fixed
        );
        let after = check
            .check(Repair::Nothing, &Silent)
            .expect("was checked before");
        assert_eq!(
            after.corruptions, mended.corruptions,
            "{mended:?}, then {after:?}"
        );
    }
    let _ = sector::write(disc, &all(Parts::DATA), &mut |_, buf| {
        buf.fill(7);
        Ok(())
    });
    assert_eq!(file.to_bytes().len(), len);
}

fn open(
    driver: &'static Driver,
    storage: &Arc<MemoryStorage>,
    access: Access,
    purpose: Purpose,
) -> Option<(Box<dyn Image>, OpenOptions)> {
    let options = OpenOptions {
        access,
        purpose,
        ..OpenOptions::default()
    };
    let storage = Arc::clone(storage) as Arc<dyn Storage>;
    let image = (driver.open)(storage, &options).ok()?;
    Some((image, options))
}

fn chain(driver: &'static Driver, storage: &Arc<MemoryStorage>, access: Access) -> Option<Chain> {
    let (image, options) = open(driver, storage, access, Purpose::Use)?;
    let base = match image.caps().backing {
        true => Base::NotOpened,
        false => Base::Zeroes,
    };
    Chain::new(vec![image], base, options.grace).ok()
}

fn memory(bytes: &[u8]) -> Arc<MemoryStorage> {
    Arc::new(MemoryStorage::from_bytes(bytes))
}

/// Offsets all over a disk.
fn places(size: u64) -> impl Iterator<Item = u64> {
    let last = size.saturating_sub(1);
    let near = [
        0,
        511,
        65_530,
        last / 3,
        last / 2,
        size.saturating_sub(5000),
        last,
    ];
    near.into_iter().filter(move |at| *at < size)
}

fn piece(size: u64, at: u64) -> usize {
    usize::try_from(size - at).unwrap_or(PIECE).min(PIECE)
}

fn read(driver: &'static Driver, bytes: &[u8]) {
    let storage = memory(bytes);
    let Some(chain) = chain(driver, &storage, Access::Read) else {
        return;
    };
    let size = chain.virtual_size();
    if let Ok(extents) = chain.extents(0..size) {
        let mut end = 0;
        for extent in extents.take(MAX_EXTENTS).map_while(Result::ok) {
            assert!(extent.start == end && extent.len > 0, "{extent:?}");
            end = extent.end();
        }
    }
    let mut buf = vec![0; PIECE];
    for at in places(size) {
        let _ = chain.read_at(&mut buf[..piece(size, at)], at);
    }
    let top = chain.top();
    let _ = (
        top.details(),
        top.backing(),
        top.identity(),
        top.snapshots(),
    );
    if let Some(bitmaps) = top.bitmaps()
        && let Ok(list) = bitmaps.list()
    {
        for bitmap in list.iter().take(8) {
            let _ = bitmaps.dirty(&bitmap.name, 0, 1000);
        }
    }
}

fn checked(
    driver: &'static Driver,
    storage: &Arc<MemoryStorage>,
    repair: Repair,
) -> Option<Report> {
    let access = match repair {
        Repair::Nothing => Access::Read,
        Repair::Leaks | Repair::All => Access::Write,
    };
    let (image, _) = open(driver, storage, access, Purpose::Check)?;
    let check = image.as_check()?;
    let _ = check.work();
    check.check(repair, &Silent).ok()
}

fn check(driver: &'static Driver, bytes: &[u8]) {
    let storage = memory(bytes);
    let Some(found) = checked(driver, &storage, Repair::Nothing) else {
        return;
    };
    let sound = |r: &Report| r.corruptions + r.leaks + r.check_errors == 0;
    assert_eq!(storage.to_bytes(), bytes, "a check changes nothing");
    for repair in [Repair::Leaks, Repair::All] {
        let storage = memory(bytes);
        let Some(report) = checked(driver, &storage, repair) else {
            continue;
        };
        let again = checked(driver, &storage, Repair::Nothing);
        if sound(&report) {
            assert!(again.as_ref().is_some_and(sound), "{report:?} {again:?}");
        }
        if sound(&found) {
            assert!(again.as_ref().is_some_and(sound), "{found:?} {again:?}");
        }
    }
}

fn write(driver: &'static Driver, bytes: &[u8]) {
    let storage = memory(bytes);
    let Some(chain) = chain(driver, &storage, Access::Write) else {
        return;
    };
    let size = chain.virtual_size();
    let mut found = vec![0; PIECE];
    for (round, at) in places(size).chain(places(size)).enumerate() {
        let len = piece(size, at);
        let data = vec![u8::try_from(round + 1).unwrap_or(1); len];
        if chain.write_at(&data, at).is_ok() && chain.read_at(&mut found[..len], at).is_ok() {
            assert!(found[..len] == data, "{at:#x}: what was written reads back");
        }
        let middle = at..at + len as u64 / 2;
        if round % 3 == 1 && chain.zero(middle.clone(), Zeroing::MayUnmap).is_ok() {
            let half = &mut found[..len / 2];
            if chain.read_at(half, at).is_ok() {
                assert!(half.iter().all(|b| *b == 0), "{at:#x}: zeroes read back");
            }
        }
        if round % 3 == 2 {
            let _ = chain.discard(middle);
        }
    }
    let _ = chain.flush();
    for size in [size / 2, size.saturating_add(9 << 20), 100 << 20] {
        if size <= MAX_GROWN && chain.resize(size / 512 * 512).is_ok() {
            let _ = chain.write_at(&[7; 600], chain.virtual_size().saturating_sub(600));
        }
    }
    let _ = chain.close();
}

/// Changes of the image itself, one after another.
fn change(driver: &'static Driver, bytes: &[u8]) {
    let storage = memory(bytes);
    let Some(mut chain) = chain(driver, &storage, Access::Write) else {
        return;
    };
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1);
    if let Some(bitmaps) = chain.top_mut().as_bitmaps() {
        let _ = bitmaps.add("new".as_ref(), None, Recording::On);
        let names = bitmaps.list().unwrap_or_default();
        for bitmap in names.iter().take(4) {
            let _ = bitmaps.merge("new".as_ref(), &bitmap.name, None);
            let _ = bitmaps.clear(&bitmap.name);
        }
    }
    let _ = chain.write_at(&[3; 3000], chain.virtual_size() / 2);
    if let Some(snapshots) = chain.top_mut().as_snapshots() {
        let _ = snapshots.create("new".as_ref(), now);
    }
    let _ = chain.write_at(&[4; 3000], chain.virtual_size() / 2);
    if let Some(snapshots) = chain.top_mut().as_snapshots() {
        for pick in ["new", "1", "2"] {
            let _ = snapshots.apply(&Pick::Any(pick.into()));
            let _ = snapshots.delete(&Pick::Any(pick.into()));
        }
    }
    if let Some(relink) = chain.top_mut().as_relink() {
        let _ = relink.relink(None);
    }
    if let Some(empty) = chain.top_mut().as_empty() {
        let _ = empty.empty();
    }
    let _ = chain.write_at(&[5; 3000], 0);
    let _ = chain.close();
}

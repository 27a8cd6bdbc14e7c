//! Small images with any byte of their metadata changed and cut anywhere: an error or correct data,
//! never a panic, a hang or a heap of memory.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use vdtool::chain::Chain;
use vdtool::formats::DRIVERS;
use vdtool::formats::refused::REFUSED;
use vdtool::image::check::{Repair, Report};
use vdtool::image::open::{OpenOptions, Purpose, WriteOrder};
use vdtool::image::probe;
use vdtool::storage::memory::MemoryStorage;
use vdtool::storage::open::Access;
use vdtool::storage::{Storage, Zeroing};
use vdtool::util::progress::Silent;

use crate::layers::{Disk, LayerSpec, Place, check, read_all};
use crate::util::{Seeded, len, rounds, share};

/// Longest that one changed image may take; slow machines run several tests at once.
const PATIENCE: Duration = Duration::from_secs(60);
const CHUNK: usize = 64 << 10;

/// What a changed image may read as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Expect {
    /// As before, where it is not refused: what was changed is protected or does not matter.
    Same,
    /// As anything: nobody can tell the change from a real image.
    Any,
}

/// An image that is right, and what it reads as.
pub(crate) struct Sample {
    pub(crate) name: &'static str,
    disk: Disk,
    pub(crate) bytes: Vec<u8>,
    content: Vec<u8>,
    watchdog: Sender<String>,
}

impl Sample {
    pub(crate) fn new(name: &'static str, specs: &[LayerSpec]) -> Self {
        let disk = Disk::create(Place::Memory, specs);
        let mut rng = Seeded::new(name);
        let chain = disk.open(Access::Write, WriteOrder::Ordered);
        let size = chain.virtual_size();
        // Some blocks in part, one whole, some not at all; the last one too.
        for (at, count) in [(700, 3000), (size / 2, 9000), (size - 1500, 1500)] {
            chain.write_at(&rng.bytes(count), at).expect("writes");
        }
        chain.close().expect("closes");
        drop(chain);
        Self::of(name, disk)
    }

    /// The sample whose bytes are in the top layer of `disk`.
    pub(crate) fn of(name: &'static str, disk: Disk) -> Self {
        let content = read_all(&disk.open(Access::Read, WriteOrder::Ordered));
        Self {
            name,
            bytes: disk.memory()[0].to_bytes(),
            disk,
            content,
            watchdog: watchdog(),
        }
    }

    /// Does with `bytes` all that users do with an image.
    pub(crate) fn exercise(&self, bytes: &[u8], expect: Expect, what: &dyn Fn() -> String) {
        self.watchdog
            .send(format!("{}: {}", self.name, what()))
            .expect("the watchdog lives");
        let new = || Arc::new(MemoryStorage::from_bytes(bytes));
        let storage = new();
        let _ = probe::probe(DRIVERS, REFUSED, &*storage);
        self.look(&storage, expect, what);
        for repair in [Repair::Nothing, Repair::Leaks, Repair::All] {
            let storage = new();
            if self.check(&storage, repair) {
                self.look(&storage, expect, &|| {
                    format!("{}, after {repair:?}", what())
                });
            }
        }
        // Of qcow2, its own tests say so.
        if ["vhd", "vdi", "vmdk"].contains(&self.disk.driver().name) {
            self.repaired_at_once(&new(), what);
        }
        self.write(&new(), what);
        self.watchdog
            .send(String::new())
            .expect("the watchdog lives");
    }

    pub(crate) fn open(
        &self,
        storage: &Arc<MemoryStorage>,
        access: Access,
    ) -> vdtool::Result<Chain> {
        let mut storages: Vec<Arc<dyn Storage>> = vec![storage.clone()];
        let below = self.disk.memory().into_iter().skip(1);
        storages.extend(below.map(|s| s as Arc<dyn Storage>));
        self.disk
            .try_open_with(storages, access, WriteOrder::Ordered)
    }

    fn look(&self, storage: &Arc<MemoryStorage>, expect: Expect, what: &dyn Fn() -> String) {
        let Ok(chain) = self.open(storage, Access::Read) else {
            return;
        };
        let top = chain.top();
        let _ = (top.details(), top.backing(), top.identity(), top.limits());
        let size = chain.virtual_size();
        for extent in chain.extents(0..size).expect("the whole disk").take(500) {
            if extent.is_err() {
                break;
            }
        }
        if expect == Expect::Same {
            let expected = self.content.len() as u64;
            assert_eq!(size, expected, "{}: {}: size", self.name, what());
        }
        for at in self.places(size) {
            let mut found = vec![0; CHUNK.min(len((size - at).min(CHUNK as u64)))];
            if chain.read_at(&mut found, at).is_ok() && expect == Expect::Same {
                let part = len(at)..len(at) + found.len();
                let same = found == self.content[part];
                assert!(same, "{}: {}: reads wrong data", self.name, what());
            }
        }
    }

    /// Where to read: the whole disk if it is small, its ends if not.
    fn places(&self, size: u64) -> Vec<u64> {
        let chunk = 4096;
        if size <= 2 * self.content.len() as u64 {
            return (0..size).step_by(chunk).collect();
        }
        let last = size.saturating_sub(chunk as u64);
        vec![0, 5000, size / 2, last]
    }

    /// Checks the image; whether that went to its end.
    fn check(&self, storage: &Arc<MemoryStorage>, repair: Repair) -> bool {
        let options = OpenOptions {
            access: match repair {
                Repair::Nothing => Access::Read,
                Repair::Leaks | Repair::All => Access::Write,
            },
            purpose: Purpose::Check,
            ..OpenOptions::default()
        };
        let image = (self.disk.driver().open)(storage.clone(), &options);
        let Ok(image) = image else { return false };
        image
            .as_check()
            .is_some_and(|c| c.check(repair, &Silent).is_ok())
    }

    /// Repairs the image as `check -r all` does: what was repaired, and what a second look finds.
    fn repair(&self, storage: &Arc<MemoryStorage>) -> Option<(Report, Report)> {
        let options = OpenOptions {
            access: Access::Write,
            purpose: Purpose::Check,
            ..OpenOptions::default()
        };
        let image = (self.disk.driver().open)(storage.clone(), &options).ok()?;
        let run = |repair| image.as_check()?.check(repair, &Silent).ok();
        let repaired = run(Repair::All)?;
        image.flush().ok()?;
        let after = run(Repair::Nothing)?;
        image.close().ok()?;
        Some((repaired, after))
    }

    /// One repair does all that can be done: a second has nothing left to do.
    fn repaired_at_once(&self, storage: &Arc<MemoryStorage>, what: &dyn Fn() -> String) {
        let Some((_, left)) = self.repair(storage) else {
            return;
        };
        let (again, found) = self.repair(storage).expect("it was possible before");
        let findings = &again.findings[..again.findings.len().min(10)];
        let told = || format!("{}: {}: {findings:?}", self.name, what());
        assert_eq!(again.corruptions_fixed, 0, "{}", told());
        assert_eq!(again.leaks_fixed, 0, "{}", told());
        assert_eq!(found.corruptions, left.corruptions, "{}", told());
        assert_eq!(found.leaks, left.leaks, "{}", told());
    }

    /// What was written is there, or refused.
    fn write(&self, storage: &Arc<MemoryStorage>, what: &dyn Fn() -> String) {
        let Ok(chain) = self.open(storage, Access::Write) else {
            return;
        };
        let size = chain.virtual_size();
        for at in [0, 1000, size / 2 + 77, size.saturating_sub(300)] {
            let bytes = [0x5a; 300];
            let done = chain.write_at(&bytes, at);
            let mut found = [0; 300];
            if done.is_ok() && chain.read_at(&mut found, at).is_ok() {
                assert!(
                    found == bytes,
                    "{}: {}: a write at {at:#x} is lost",
                    self.name,
                    what()
                );
            }
        }
        let _ = chain.flush();
        let _ = chain.close();
    }

    /// Changes each byte of `range` to several values.
    pub(crate) fn flip(&self, range: Range<usize>, expect: Expect) {
        for at in share(range) {
            let old = self.bytes[at];
            for new in [old ^ 1, old ^ 0x80, 0, 0xff] {
                if new != old {
                    let mut bytes = self.bytes.clone();
                    bytes[at] = new;
                    self.exercise(&bytes, expect, &|| {
                        format!("byte {at:#x} from {old:#04x} to {new:#04x}")
                    });
                }
            }
        }
    }

    /// Sets a big-endian field in all copies of its structure to each value, with right
    /// checksums.
    fn field(&self, field: Field, values: &[u64]) {
        for value in values {
            let mut bytes = self.bytes.clone();
            for start in self.copies(field.structure) {
                let word = value.to_be_bytes();
                let at = start + field.offset;
                bytes[at..at + field.len].copy_from_slice(&word[8 - field.len..]);
            }
            self.seal(&mut bytes);
            let what = || format!("{field:?} is {value:#x}");
            self.exercise(&bytes, Expect::Any, &what);
        }
    }

    fn copies(&self, structure: Structure) -> Vec<usize> {
        let last = self.bytes.len() - FOOTER;
        match structure {
            Structure::Footer if self.bytes.starts_with(b"conectix") => vec![0, last],
            Structure::Footer => vec![last],
            Structure::Header => vec![FOOTER],
        }
    }

    /// Makes the checksums right.
    fn seal(&self, bytes: &mut [u8]) {
        for start in self.copies(Structure::Footer) {
            put_checksum(&mut bytes[start..start + FOOTER], 64);
        }
        if bytes.starts_with(b"conectix") {
            put_checksum(&mut bytes[FOOTER..FOOTER + HEADER], 36);
        }
    }

    /// Cuts the file at every length in `ranges`.
    pub(crate) fn cut(&self, ranges: &[Range<usize>]) {
        for range in ranges {
            for length in range.clone() {
                let cut = &self.bytes[..length.min(self.bytes.len())];
                self.exercise(cut, Expect::Same, &|| format!("cut to {length:#x}"));
            }
        }
    }

    /// Makes it longer by what another tool left.
    pub(crate) fn append(&self) {
        for length in [1, 511, 512, 4096] {
            for byte in [0, 0xff] {
                let mut bytes = self.bytes.clone();
                bytes.resize(bytes.len() + length, byte);
                let what = || format!("with {length} bytes {byte:#04x} at the end");
                self.exercise(&bytes, Expect::Same, &what);
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Structure {
    Footer,
    Header,
}

#[derive(Debug, Clone, Copy)]
struct Field {
    structure: Structure,
    offset: usize,
    len: usize,
}

const FOOTER: usize = 512;
const HEADER: usize = 1024;

/// The ones' complement of the sum of all bytes but those of the checksum.
pub(crate) fn put_checksum(bytes: &mut [u8], at: usize) {
    bytes[at..at + 4].fill(0);
    let sum = bytes
        .iter()
        .fold(0_u32, |sum, b| sum.wrapping_add(u32::from(*b)));
    bytes[at..at + 4].copy_from_slice(&(!sum).to_be_bytes());
}

/// Ends the whole test run where one image takes too long, and says which.
fn watchdog() -> Sender<String> {
    let (sender, receiver) = channel::<String>();
    std::thread::spawn(move || {
        let mut current = String::new();
        loop {
            match receiver.recv_timeout(PATIENCE) {
                Ok(next) => current = next,
                Err(RecvTimeoutError::Disconnected) => return,
                // Between two images nothing is waited for.
                Err(RecvTimeoutError::Timeout) if current.is_empty() => {}
                Err(RecvTimeoutError::Timeout) => {
                    let _ = std::io::Write::write_all(
                        &mut std::io::stderr(),
                        format!("no end after {PATIENCE:?}: {current}\n").as_bytes(),
                    );
                    std::process::abort();
                }
            }
        }
    });
    sender
}

const SIZE: u64 = 40 * 1024 + 512;

fn vhd(options: &'static str) -> LayerSpec {
    LayerSpec {
        format: "vhd",
        options,
        size: SIZE,
    }
}

const RAW: LayerSpec = LayerSpec {
    format: "raw",
    options: "",
    size: SIZE,
};

fn dynamic() -> Sample {
    Sample::new("dynamic", &[vhd("block_size=4k")])
}

fn fixed() -> Sample {
    Sample::new("fixed", &[vhd("subformat=fixed")])
}

fn differencing() -> Sample {
    Sample::new("differencing", &[vhd("block_size=4k"), RAW])
}

/// An image as XenServer's tapdisk leaves it: a batmap after the table, one block whole and marked
/// so there, one in part.
fn with_batmap() -> Sample {
    let mut bytes = vec![0; 3072];
    bytes[..FOOTER].copy_from_slice(&tap_footer());
    let header = &mut bytes[FOOTER..FOOTER + HEADER];
    header[..8].copy_from_slice(b"cxsparse");
    header[8..16].fill(0xff);
    header[16..24].copy_from_slice(&1536_u64.to_be_bytes());
    header[24..28].copy_from_slice(&0x0001_0000_u32.to_be_bytes());
    header[28..32].copy_from_slice(&11_u32.to_be_bytes());
    header[32..36].copy_from_slice(&4096_u32.to_be_bytes());
    put_checksum(header, 36);
    bytes[1536..2048].fill(0xff);
    // The block bitmaps end where a page ends, so that the data begins at a page.
    bytes[1536 + 4..1536 + 8].copy_from_slice(&7_u32.to_be_bytes());
    bytes[1536 + 12..1536 + 16].copy_from_slice(&23_u32.to_be_bytes());
    bytes[2048..2056].copy_from_slice(b"tdbatmap");
    bytes[2056..2064].copy_from_slice(&2560_u64.to_be_bytes());
    bytes[2064..2068].copy_from_slice(&1_u32.to_be_bytes());
    bytes[2068..2072].copy_from_slice(&0x0001_0002_u32.to_be_bytes());
    // Block 1 is whole: the second bit of the map, whose checksum is the complement of its sum.
    bytes[2560] = 0x40;
    bytes[2072..2076].copy_from_slice(&(!0x40_u32).to_be_bytes());
    let mut rng = Seeded::new("tap");
    bytes.resize(7 * 512, 0);
    bytes.push(0xff);
    bytes.resize(8 * 512, 0);
    bytes.extend(rng.bytes(4096));
    bytes.resize(23 * 512, 0);
    bytes.push(0x0f);
    bytes.resize(24 * 512, 0);
    bytes.extend(vec![0; 2048]);
    bytes.extend(rng.bytes(2048));
    bytes.extend(tap_footer());
    Sample::of("batmap", Disk::of_bytes("vhd", &bytes))
}

fn tap_footer() -> [u8; FOOTER] {
    let mut footer = [0; FOOTER];
    footer[..8].copy_from_slice(b"conectix");
    footer[11] = 2;
    footer[12..16].copy_from_slice(&0x0001_0000_u32.to_be_bytes());
    footer[16..24].copy_from_slice(&512_u64.to_be_bytes());
    footer[24..28].copy_from_slice(&700_000_000_u32.to_be_bytes());
    footer[28..32].copy_from_slice(b"tap\0");
    footer[32..36].copy_from_slice(&0x0001_0003_u32.to_be_bytes());
    for size in [40, 48] {
        footer[size..size + 8].copy_from_slice(&(11_u64 * 4096).to_be_bytes());
    }
    footer[56..60].copy_from_slice(&[0, 1, 4, 17]);
    footer[60..64].copy_from_slice(&3_u32.to_be_bytes());
    footer[68..84].copy_from_slice(&[0x42; 16]);
    put_checksum(&mut footer, 64);
    footer
}

/// Values at the edges of what fields hold.
pub(crate) const EDGES: [u64; 26] = [
    0,
    1,
    2,
    3,
    4,
    511,
    512,
    513,
    1024,
    1536,
    4096,
    0xffff,
    1 << 20,
    1 << 21,
    (1 << 31) - 1,
    1 << 31,
    0xffff_fe00,
    0xffff_ffff,
    1 << 32,
    2040 << 30,
    (2040 << 30) + 512,
    1 << 62,
    (1 << 63) - 512,
    1 << 63,
    u64::MAX - 511,
    u64::MAX,
];

fn big_endian(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// Where the table is, and where the first block after it may begin.
fn table(sample: &Sample) -> Range<usize> {
    let start = big_endian(&sample.bytes, FOOTER + 20) as usize;
    let entries = big_endian(&sample.bytes, FOOTER + 28) as usize;
    start..start + (entries * 4).next_multiple_of(512)
}

/// Where the blocks' bitmaps are.
fn bitmaps(sample: &Sample) -> Vec<Range<usize>> {
    let words = table(sample).step_by(4);
    words
        .map(|at| big_endian(&sample.bytes, at))
        .filter(|word| *word != u32::MAX)
        .map(|word| word as usize * 512..word as usize * 512 + 512)
        .collect()
}

#[test]
fn a_changed_byte_in_the_footer_of_a_fixed_vhd_is_an_error_or_harmless() {
    let sample = fixed();
    let end = sample.bytes.len();
    sample.flip(end - FOOTER..end, Expect::Same);
}

#[test]
fn a_changed_byte_in_either_footer_of_a_dynamic_vhd_is_an_error_or_harmless() {
    let sample = dynamic();
    let end = sample.bytes.len();
    sample.flip(0..FOOTER, Expect::Same);
    sample.flip(end - FOOTER..end, Expect::Same);
}

#[test]
fn a_changed_byte_in_the_header_of_a_dynamic_vhd_is_an_error_or_harmless() {
    dynamic().flip(FOOTER..FOOTER + HEADER, Expect::Same);
}

#[test]
fn a_changed_byte_in_the_header_of_a_differencing_vhd_is_an_error_or_harmless() {
    differencing().flip(FOOTER..FOOTER + HEADER, Expect::Same);
}

#[test]
fn a_changed_byte_in_a_table_or_a_bitmap_never_panics() {
    for sample in [dynamic(), differencing()] {
        sample.flip(table(&sample), Expect::Any);
        for bitmap in bitmaps(&sample) {
            sample.flip(bitmap, Expect::Any);
        }
    }
}

#[test]
fn a_vhd_with_a_batmap_reads_right_and_stays_sound_when_written() {
    let sample = with_batmap();
    let content = &sample.content;
    let stored = &sample.bytes;
    assert!(content[4096..8192] == stored[8 * 512..16 * 512]);
    assert!(content[3 * 4096 + 2048..4 * 4096] == stored[28 * 512..32 * 512]);
    assert!(content[..4096].iter().all(|b| *b == 0));
    let storage = Arc::new(MemoryStorage::from_bytes(stored));
    let chain = sample.open(&storage, Access::Write).expect("opens");
    let mut expected = content.clone();
    let mut rng = Seeded::new("written");
    for _ in 0..rounds(60) {
        let at = rng.usize(..expected.len() - 5000);
        let bytes = rng.bytes(5000);
        chain.write_at(&bytes, at as u64).expect("writes");
        expected[at..at + bytes.len()].copy_from_slice(&bytes);
        let gone = rng.usize(..10) * 4096;
        let range = gone as u64..gone as u64 + 4096;
        chain.zero(range, Zeroing::MayUnmap).expect("zeroes");
        expected[gone..gone + 4096].fill(0);
    }
    chain.close().expect("closes");
    drop(chain);
    let chain = sample.open(&storage, Access::Read).expect("opens");
    assert!(read_all(&chain) == expected);
    let report = check(sample.disk.driver(), storage, Repair::Nothing);
    let report = report.expect("vhd has a check");
    assert_eq!(report.corruptions, 0, "{:?}", report.findings);
}

#[test]
fn a_changed_byte_in_a_batmap_is_an_error_or_harmless() {
    let sample = with_batmap();
    sample.flip(2048..2048 + 64, Expect::Same);
    sample.flip(2560..2560 + 16, Expect::Same);
    sample.cut(&[2040..2060, 2550..2570, 3060..3080]);
}

#[test]
fn a_changed_byte_in_a_parent_locator_never_panics() {
    let sample = differencing();
    for locator in 0..8 {
        let entry = FOOTER + 576 + locator * 24;
        if sample.bytes[entry..entry + 4] == [0; 4] {
            continue;
        }
        let data = big_endian(&sample.bytes, entry + 20) as usize;
        let length = big_endian(&sample.bytes, entry + 8) as usize;
        sample.flip(data..data + length, Expect::Any);
    }
}

#[test]
fn header_fields_at_their_edges_with_right_checksums_never_panic() {
    for sample in [dynamic(), differencing()] {
        // Table offset, version, entries, block size, parent's time, and the first two locators.
        let fields = [
            (8, 8),
            (16, 8),
            (24, 4),
            (28, 4),
            (32, 4),
            (56, 4),
            (576, 4),
            (580, 4),
            (584, 4),
            (592, 8),
            (600, 4),
            (604, 4),
            (608, 4),
            (616, 8),
        ];
        for (offset, len) in fields {
            let structure = Structure::Header;
            let field = Field {
                structure,
                offset,
                len,
            };
            sample.field(field, &EDGES);
        }
    }
}

#[test]
fn footer_fields_at_their_edges_with_right_checksums_never_panic() {
    for sample in [fixed(), dynamic(), differencing()] {
        // Features, version, data offset, time, creator, sizes, geometry, type.
        let fields = [
            (8, 4),
            (12, 4),
            (16, 8),
            (24, 4),
            (28, 4),
            (40, 8),
            (48, 8),
            (56, 4),
            (60, 4),
            (84, 2),
        ];
        for (offset, len) in fields {
            let structure = Structure::Footer;
            let field = Field {
                structure,
                offset,
                len,
            };
            sample.field(field, &EDGES);
        }
    }
}

#[test]
fn every_header_byte_changed_with_right_checksums_never_panics() {
    for sample in [dynamic(), differencing()] {
        for at in (0..768).filter(|at| !(36..40).contains(at)) {
            let old = sample.bytes[FOOTER + at];
            for new in [old ^ 1, old ^ 0x80, !old] {
                let field = Field {
                    structure: Structure::Header,
                    offset: at,
                    len: 1,
                };
                sample.field(field, &[u64::from(new)]);
            }
        }
    }
}

#[test]
fn every_footer_byte_changed_with_right_checksums_never_panics() {
    for sample in [fixed(), dynamic(), differencing()] {
        for at in (0..88).filter(|at| !(64..68).contains(at)) {
            let copies = sample.copies(Structure::Footer);
            let old = sample.bytes[copies[0] + at];
            for new in [old ^ 1, old ^ 0x80, !old] {
                let field = Field {
                    structure: Structure::Footer,
                    offset: at,
                    len: 1,
                };
                sample.field(field, &[u64::from(new)]);
            }
        }
    }
}

#[test]
fn table_entries_anywhere_never_panic_and_never_overwrite_the_metadata() {
    for sample in [dynamic(), differencing()] {
        let table = table(&sample);
        let used = bitmaps(&sample);
        let file = sample.bytes.len() as u64;
        let mut values: Vec<u64> = EDGES.into_iter().filter(|v| *v < 1 << 32).collect();
        values.extend((0..=file / 512 + 10).chain(used.iter().map(|b| b.start as u64 / 512)));
        for entry in table.clone().step_by(4).take(3) {
            for value in &values {
                let mut bytes = sample.bytes.clone();
                bytes[entry..entry + 4].copy_from_slice(&value.to_be_bytes()[4..]);
                let what = || format!("the entry at {entry:#x} is {value:#x}");
                sample.exercise(&bytes, Expect::Any, &what);
                metadata_stays(&sample, &bytes, &table, &what);
            }
        }
    }
}

/// Writes through a table that may point anywhere leave the headers and the rest of the table be.
fn metadata_stays(sample: &Sample, bytes: &[u8], table: &Range<usize>, what: &dyn Fn() -> String) {
    let storage = Arc::new(MemoryStorage::from_bytes(bytes));
    let Ok(chain) = sample.open(&storage, Access::Write) else {
        return;
    };
    for at in (0..chain.virtual_size() - 700).step_by(1900) {
        let _ = chain.write_at(&[0x5a; 700], at);
    }
    drop(chain);
    let mut head = vec![0; table.start];
    storage.read_at(&mut head, 0).expect("reads");
    let same = head == bytes[..table.start];
    assert!(same, "{}: {}: the headers changed", sample.name, what());
}

#[test]
fn a_file_cut_anywhere_gives_an_error_or_correct_data() {
    for sample in [dynamic(), differencing()] {
        let end = sample.bytes.len();
        let mut ranges = vec![0..table(&sample).end + 600, end - 1100..end];
        for bitmap in bitmaps(&sample) {
            ranges.push(bitmap.start - 2..bitmap.start + 2);
            ranges.push(bitmap.end - 2..bitmap.end + 2);
            ranges.push(bitmap.end + 1000..bitmap.end + 1002);
        }
        sample.cut(&ranges);
        sample.append();
    }
    let sample = fixed();
    let end = sample.bytes.len();
    sample.cut(&[0..3, 510..514, 4095..4097, end - 1100..end]);
    sample.append();
}

#[test]
fn a_raw_image_of_any_length_is_taken() {
    let sample = Sample::new("raw", &[RAW]);
    for length in [0, 1, 511, 512, 513, 4095, 4097] {
        let bytes = &sample.bytes[..length];
        let storage = Arc::new(MemoryStorage::from_bytes(bytes));
        let chain = sample.open(&storage, Access::Read).expect("raw opens");
        assert_eq!(read_all(&chain), bytes);
    }
}

//! Damaged qcow2 images: what the check finds and mends, beside qemu-img.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use tempfile::TempDir;
use vdtool::chain::open::{ChainOptions, open};
use vdtool::chain::{Base, Chain};
use vdtool::formats;
use vdtool::image::check::{Finding, Repair, Severity};
use vdtool::image::open::OpenOptions;
use vdtool::storage::memory::{Change, MemoryStorage};

use crate::layers::{check, read_all};
use crate::util::{peer, requires, scratch, vdtool};

const CLUSTER: u64 = 4096;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What a repair of everything is to achieve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    /// Nothing is wrong any more, also for qemu-img, and the disk reads as it did.
    Whole,
    /// What pointed nowhere still does: no repair can tell where to.
    Lost,
}

/// An image in a file with all that a check looks at, and its bytes to be damaged.
struct Patient {
    directory: TempDir,
    bytes: Vec<u8>,
    content: Vec<u8>,
}

impl Patient {
    /// Data, shared and not, compressed clusters, a snapshot and a bitmap.
    fn new() -> Self {
        let directory = scratch();
        let run = |tool: &str, line: &[&str]| peer(tool, directory.path(), line);
        let create = [
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "cluster_size=4k",
            "a.qcow2",
            "4M",
        ];
        run("qemu-img", &create);
        let write = |what: &str| run("qemu-io", &["-c", what, "a.qcow2"]);
        write("write -P 1 0 256k");
        write("write -P 2 3M 100k");
        run("qemu-img", &["snapshot", "-c", "before", "a.qcow2"]);
        write("write -P 3 128k 512k");
        write("write -c -P 4 2M 32k");
        write("write -z 2600k 64k");
        run("qemu-img", &["bitmap", "--add", "a.qcow2", "changes"]);
        write("write -P 5 300k 8k");
        let path = directory.path().join("a.qcow2");
        let bytes = std::fs::read(&path).expect("reads");
        let content = content(&path).expect("reads");
        Self {
            directory,
            bytes,
            content,
        }
    }

    fn word(&self, at: u64) -> u64 {
        let at = usize::try_from(at).expect("small");
        u64::from_be_bytes(self.bytes[at..at + 8].try_into().expect("eight bytes"))
    }

    fn put(&mut self, at: u64, word: u64) {
        let at = usize::try_from(at).expect("small");
        self.bytes[at..at + 8].copy_from_slice(&word.to_be_bytes());
    }

    fn l1(&self) -> u64 {
        self.word(40)
    }

    fn refcount_table(&self) -> u64 {
        self.word(48)
    }

    fn refcount_block(&self) -> u64 {
        self.word(self.refcount_table())
    }

    /// Where the L2 entry of a guest offset is.
    fn l2(&self, guest: u64) -> u64 {
        let index = guest / CLUSTER;
        let table = self.word(self.l1() + index / 512 * 8) & OFFSET;
        table + index % 512 * 8
    }

    fn refcount(&mut self, host: u64, count: u16) {
        let at = usize::try_from(self.refcount_block() + host / CLUSTER * 2).expect("small");
        self.bytes[at..at + 2].copy_from_slice(&count.to_be_bytes());
    }

    /// Where a new cluster at the end is.
    fn append(&mut self) -> u64 {
        let host = self.bytes.len().next_multiple_of(4096);
        self.bytes.resize(host + 4096, 0xee);
        host as u64
    }

    /// Writes the damaged image to a file of its own.
    fn file(&self, name: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        std::fs::write(&path, &self.bytes).expect("writes");
        path
    }
}

fn content(path: &Path) -> vdtool::Result<Vec<u8>> {
    Ok(read_all(&open(path, &ChainOptions::default())?))
}

/// Corruptions and leaks, in that order, as a tool's JSON has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Verdict {
    corruptions: u64,
    leaks: u64,
}

fn verdict(json: &str) -> Option<Verdict> {
    let value: serde_json::Value = serde_json::from_str(json).ok()?;
    let number = |key: &str| value[key].as_u64().unwrap_or(0);
    Some(Verdict {
        corruptions: number("corruptions"),
        leaks: number("leaks"),
    })
}

fn qemu(path: &Path) -> Option<Verdict> {
    let line = ["check", "--output=json", "-f", "qcow2"];
    let output = Command::new("qemu-img").args(line).arg(path).output();
    verdict(&String::from_utf8_lossy(&output.expect("runs").stdout))
}

fn ours(path: &Path, repair: &[&str]) -> Verdict {
    let line = ["check", "--output", "json", "-f", "qcow2"];
    let output = vdtool().args(line).args(repair).arg(path).output();
    let output = output.expect("runs");
    let text = String::from_utf8_lossy(&output.stdout);
    verdict(&text).unwrap_or_else(|| panic!("{}", String::from_utf8_lossy(&output.stderr)))
}

/// One kind of damage: what it does, and what is left after a repair.
struct Damage {
    name: &'static str,
    after: After,
    /// qemu-img refuses the image, or calls the damage by other counts.
    differs: bool,
    make: fn(&mut Patient),
}

const fn damage(name: &'static str, make: fn(&mut Patient)) -> Damage {
    Damage {
        name,
        after: After::Whole,
        differs: false,
        make,
    }
}

const fn lost(name: &'static str, make: fn(&mut Patient)) -> Damage {
    Damage {
        after: After::Lost,
        ..alone(name, make)
    }
}

const fn alone(name: &'static str, make: fn(&mut Patient)) -> Damage {
    Damage {
        differs: true,
        ..damage(name, make)
    }
}

const DAMAGES: &[Damage] = &[
    damage("a cluster that nothing uses", |p| {
        let host = p.append();
        p.refcount(host, 1);
    }),
    damage("a data cluster that is not counted", |p| {
        let host = p.word(p.l2(400 << 10)) & OFFSET;
        p.refcount(host, 0);
    }),
    damage("a shared cluster that is counted once", |p| {
        let host = p.word(p.l2(3 << 20)) & OFFSET;
        p.refcount(host, 1);
    }),
    damage("a data cluster that is counted twice", |p| {
        let host = p.word(p.l2(400 << 10)) & OFFSET;
        p.refcount(host, 2);
    }),
    damage("an L2 table that is not counted", |p| {
        p.refcount(p.word(p.l1()) & OFFSET, 0);
    }),
    damage("a header that is not counted", |p| p.refcount(0, 0)),
    damage("an L1 table that is not counted", |p| p.refcount(p.l1(), 0)),
    damage("a refcount table that is not counted", |p| {
        p.refcount(p.refcount_table(), 0);
    }),
    damage("a refcount block that is not counted", |p| {
        p.refcount(p.refcount_block(), 0);
    }),
    damage("no counts at all", |p| {
        let at = usize::try_from(p.refcount_block()).expect("small");
        p.bytes[at..at + 4096].fill(0);
    }),
    damage("an L1 entry without its copied flag", |p| {
        p.put(p.l1(), p.word(p.l1()) & !COPIED);
    }),
    damage("an L2 entry without its copied flag", |p| {
        let at = p.l2(400 << 10);
        p.put(at, p.word(at) & !COPIED);
    }),
    damage("a shared cluster with a copied flag", |p| {
        let at = p.l2(3 << 20);
        p.put(at, p.word(at) | COPIED);
    }),
    damage("no refcount block", |p| p.put(p.refcount_table(), 0)),
    alone("a refcount block that is misaligned", |p| {
        p.put(p.refcount_table(), p.refcount_block() + 512);
    }),
    alone("a refcount block past the end", |p| {
        p.put(p.refcount_table(), 1 << 40);
    }),
    alone("a refcount block that is the L1 table", |p| {
        p.put(p.refcount_table(), p.l1());
    }),
    alone("a refcount table past the end", |p| p.put(48, 1 << 40)),
    alone("a refcount table that is misaligned", |p| p.put(48, 513)),
    alone("no refcount table", |p| p.put(48, 0)),
    alone("a compressed cluster with a copied flag", |p| {
        let at = p.l2(2 << 20);
        assert!(p.word(at) & COMPRESSED != 0);
        p.put(at, p.word(at) | COPIED);
    }),
    alone("an L1 table with the same L2 table twice", |p| {
        let table = p.word(p.l1());
        p.put(p.l1() + 8, table);
        let half = 2 << 20;
        p.content.copy_within(0..half, half);
    }),
    alone(
        "an L1 table of a snapshot with the same L2 table twice",
        |p| {
            let l1 = p.word(p.word(64));
            p.put(l1 + 8, p.word(l1) & OFFSET);
        },
    ),
    alone("a raw data file that is not there", |p| {
        p.put(88, p.word(88) | 2);
    }),
    alone("a backing file's name of no bytes", |p| p.put(8, 0x800)),
    lost("an L1 entry that lost its offset", |p| {
        p.put(p.l1(), COPIED);
    }),
    lost("an L1 entry of a snapshot that lost its offset", |p| {
        let l1 = p.word(p.word(64));
        p.put(l1, 1 << 60);
    }),
    alone("a dirty bit", |p| p.put(72, p.word(72) | 1)),
    alone("a corrupt bit", |p| p.put(72, p.word(72) | 2)),
    lost("a misaligned cluster", |p| {
        let at = p.l2(400 << 10);
        p.put(at, p.word(at) + 512);
    }),
    lost("a cluster past the end", |p| {
        let at = p.l2(400 << 10);
        p.put(at, 1 << 40 | COPIED);
    }),
    lost("a misaligned L2 table", |p| {
        p.put(p.l1(), p.word(p.l1()) + 512);
    }),
    lost("an L2 table past the end", |p| {
        p.put(p.l1(), 1 << 40 | COPIED);
    }),
    lost("a compressed cluster past the end", |p| {
        let at = p.l2(2 << 20);
        p.put(at, COMPRESSED | 1 << 40);
    }),
    lost("a cluster that is the L1 table", |p| {
        let at = p.l2(400 << 10);
        p.put(at, p.l1() | COPIED);
    }),
    lost("a snapshot whose L1 table is misaligned", |p| {
        let at = p.word(64);
        p.put(at, p.word(at) + 512);
    }),
];

#[test]
fn what_qemu_img_finds_in_a_damaged_qcow2_is_found_and_mended() {
    if !requires("qemu-img") {
        return;
    }
    let patient = Patient::new();
    let mut wrong = Vec::new();
    for damage in DAMAGES {
        let mut sick = Patient {
            directory: scratch(),
            bytes: patient.bytes.clone(),
            content: patient.content.clone(),
        };
        (damage.make)(&mut sick);
        let path = sick.file("sick.qcow2");
        let (found, theirs) = (ours(&path, &[]), qemu(&path));
        println!("{}: {found:?}, qemu-img {theirs:?}", damage.name);
        let marked = damage.name.ends_with(" bit");
        if found.corruptions + found.leaks == 0 && !marked {
            wrong.push(format!("{}: nothing found", damage.name));
        }
        if !damage.differs && theirs != Some(found) {
            wrong.push(format!("{}: {found:?}, qemu-img {theirs:?}", damage.name));
        }
        let before = std::fs::read(&path).expect("reads");
        if before != sick.bytes {
            wrong.push(format!("{}: a check changed the image", damage.name));
        }
        let after = ours(&path, &["-r", "all"]);
        let theirs = qemu(&path);
        let clean = Verdict {
            corruptions: 0,
            leaks: 0,
        };
        if damage.after == After::Lost {
            if after.corruptions == 0 {
                wrong.push(format!("{}: called mended: {after:?}", damage.name));
            }
            continue;
        }
        if after != clean || theirs != Some(clean) {
            let text = format!("{}: then {after:?}, qemu-img {theirs:?}", damage.name);
            wrong.push(text);
        }
        match content(&path) {
            Ok(found) if found == sick.content => {}
            Ok(_) => wrong.push(format!("{}: reads otherwise", damage.name)),
            Err(e) => wrong.push(format!("{}: {e}", damage.name)),
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_repair_of_leaks_touches_nothing_else() {
    if !requires("qemu-img") {
        return;
    }
    let mut patient = Patient::new();
    let at = patient.l2(3 << 20);
    patient.put(at, patient.word(at) | COPIED);
    let host = patient.append();
    patient.refcount(host, 1);
    let path = patient.file("leaky.qcow2");
    let after = ours(&path, &["-r", "leaks"]);
    let expected = Verdict {
        corruptions: 1,
        leaks: 0,
    };
    assert_eq!(after, expected);
    assert_eq!(qemu(&path), Some(expected));
}

#[test]
fn leaks_given_back_leave_the_copied_flags_right() {
    if !requires("qemu-img") {
        return;
    }
    let mut patient = Patient::new();
    // The snapshot is forgotten, as by a kill while it was deleted: what it shared is counted
    // twice, and used once.
    patient.bytes[60..72].fill(0);
    let path = patient.file("forgotten.qcow2");
    let before = ours(&path, &[]);
    assert!(before.leaks > 0 && before.corruptions == 0, "{before:?}");
    let clean = Verdict {
        corruptions: 0,
        leaks: 0,
    };
    assert_eq!(ours(&path, &["-r", "leaks"]), clean);
    assert_eq!(qemu(&path), Some(clean));
    assert!(content(&path).expect("reads") == patient.content);
}

#[test]
fn leaks_given_back_and_killed_anywhere_lose_nothing() {
    if !requires("qemu-img") {
        return;
    }
    let driver = formats::by_name("qcow2").expect("a known format");
    let mut patient = Patient::new();
    patient.bytes[60..72].fill(0);
    let storage = Arc::new(MemoryStorage::from_bytes(&patient.bytes));
    storage.record();
    check(driver, storage.clone(), Repair::Leaks).expect("it has a check");
    let changes = storage.changes();
    assert!(changes.len() > 3, "{changes:?}");
    for (made, state) in states(&patient.bytes, &changes).iter().enumerate() {
        let found = disk(state).expect("opens");
        assert!(found == patient.content, "{made}: reads otherwise");
        let report = check(driver, state.clone(), Repair::Nothing).expect("it has a check");
        // A flag that is not set yet costs a copy, no data.
        let harmless = |f: &Finding| {
            f.severity == Severity::Leak
                || f.text.contains("refcount of") && f.text.contains(" is 1 ")
        };
        assert!(
            report.findings.iter().all(harmless),
            "{made}: {:?}",
            report.findings
        );
        check(driver, state.clone(), Repair::All).expect("it has a check");
        let report = check(driver, state.clone(), Repair::Nothing).expect("it has a check");
        assert_eq!(report.corruptions + report.leaks, 0, "{made}");
        assert!(disk(state).expect("opens") == patient.content, "{made}");
    }
}

#[test]
fn an_image_that_was_not_closed_is_mended_before_it_is_written() {
    if !requires("qemu-img") {
        return;
    }
    let mut patient = Patient::new();
    patient.put(72, 1);
    let host = patient.word(patient.l2(400 << 10)) & OFFSET;
    patient.refcount(host, 0);
    let path = patient.file("dirty.qcow2");
    assert_eq!(content(&path).expect("reads while dirty"), patient.content);
    let chain = open(&path, &ChainOptions::write()).expect("is mended");
    chain.write_at(&[9; 5000], 1 << 20).expect("writes");
    chain.flush().expect("flushes");
    chain.close().expect("closes");
    drop(chain);
    let mut expected = patient.content.clone();
    expected[1 << 20..(1 << 20) + 5000].fill(9);
    assert!(content(&path).expect("reads") == expected);
    let bytes = std::fs::read(&path).expect("reads");
    assert_eq!(bytes[79] & 1, 0, "the dirty bit is gone");
    // A writer that does not keep bitmaps up leaves their clusters unused.
    assert_eq!(qemu(&path).map(|v| v.corruptions), Some(0));
}

#[test]
fn an_image_marked_corrupt_is_read_but_not_written_until_it_is_mended() {
    if !requires("qemu-img") {
        return;
    }
    let mut patient = Patient::new();
    patient.put(72, 2);
    let path = patient.file("corrupt.qcow2");
    assert!(content(&path).expect("reads") == patient.content);
    let error = open(&path, &ChainOptions::write()).expect_err("is marked");
    assert!(error.to_string().contains("check -r all"), "{error}");
    ours(&path, &["-r", "all"]);
    open(&path, &ChainOptions::write()).expect("is mended");
}

/// What the image in `storage` reads as.
fn disk(storage: &Arc<MemoryStorage>) -> vdtool::Result<Vec<u8>> {
    let driver = formats::by_name("qcow2").expect("a known format");
    let image = (driver.open)(storage.clone(), &OpenOptions::default())?;
    let chain = Chain::new(vec![image], Base::Zeroes, Arc::default())?;
    let mut bytes = vec![0; usize::try_from(chain.virtual_size()).expect("small")];
    chain.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// The states that a kill at any change of a repair leaves.
fn states(bytes: &[u8], changes: &[Change]) -> Vec<Arc<MemoryStorage>> {
    let state = |made: usize| {
        let storage = MemoryStorage::from_bytes(bytes);
        changes[..made].iter().for_each(|c| storage.apply(c));
        Arc::new(storage)
    };
    (0..=changes.len()).map(state).collect()
}

#[test]
fn a_repair_that_is_killed_anywhere_loses_nothing_and_can_be_done_again() {
    if !requires("qemu-img") {
        return;
    }
    let driver = formats::by_name("qcow2").expect("a known format");
    let patient = Patient::new();
    let mut seen = 0;
    for damage in DAMAGES.iter().filter(|d| d.after == After::Whole) {
        let mut sick = Patient {
            directory: scratch(),
            bytes: patient.bytes.clone(),
            content: patient.content.clone(),
        };
        (damage.make)(&mut sick);
        let storage = Arc::new(MemoryStorage::from_bytes(&sick.bytes));
        storage.record();
        check(driver, storage.clone(), Repair::All).expect("it has a check");
        for (made, state) in states(&sick.bytes, &storage.changes()).iter().enumerate() {
            seen += 1;
            let what = format!("{}, killed after {made}", damage.name);
            if let Ok(found) = disk(state) {
                assert!(found == sick.content, "{what}: reads otherwise");
            }
            check(driver, state.clone(), Repair::All).expect("it has a check");
            let report = check(driver, state.clone(), Repair::Nothing).expect("as before");
            let left = report.corruptions + report.leaks;
            assert_eq!(left, 0, "{what}: {:?}", report.findings);
            let found = disk(state).expect("opens again");
            assert!(
                found == sick.content,
                "{what}: repaired, it reads otherwise"
            );
        }
    }
    assert!(seen > 60, "{seen} states");
}

#[test]
fn an_overwrite_in_place_clears_what_the_writer_does_not_know() {
    if !requires("qemu-img") {
        return;
    }
    let mut patient = Patient::new();
    patient.put(88, patient.word(88) | 1 << 7);
    let path = patient.file("unknown.qcow2");
    let chain = open(&path, &ChainOptions::write()).expect("opens");
    chain.write_at(&[9; 100], 400 << 10).expect("writes");
    chain.flush().expect("flushes");
    drop(chain);
    let bytes = std::fs::read(&path).expect("reads");
    assert_eq!(bytes[95] & 1 << 7, 0, "the unknown autoclear bit");
    assert_eq!(bytes.len(), patient.bytes.len(), "nothing was allocated");
}

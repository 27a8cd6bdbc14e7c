//! Damaged qcow2 images: what our check calls clean is written, by us and by qemu, without a loss;
//! what it names at the first level is not written; and no repair gives data away.

use std::collections::HashSet;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use vdtool::chain::{Base, Chain};
use vdtool::formats;
use vdtool::image::bitmap::Recording;
use vdtool::image::check::{Finding, Repair, Report};
use vdtool::image::open::{OpenOptions, WriteOrder};
use vdtool::image::snapshot::Pick;
use vdtool::storage::Storage;
use vdtool::storage::memory::MemoryStorage;
use vdtool::storage::open::Access;

use crate::layers::{Disk, LayerSpec, Place, check, read_all};
use crate::util::{Seeded, requires, rounds, scratch};

const CLUSTER: u64 = 512;
const SIZE: u64 = 192 << 10;
const COPIED: u64 = 1 << 63;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// One damaged image in so many is tried; with as many rounds, all.
const SHARE: usize = 6;
/// Where the disk has no data before a test writes there.
const FREE: u64 = 160 << 10;

fn at(offset: u64) -> usize {
    usize::try_from(offset).expect("small")
}

fn word(bytes: &[u8], offset: u64) -> u64 {
    let offset = at(offset);
    u64::from_be_bytes(bytes[offset..offset + 8].try_into().expect("eight bytes"))
}

fn put(bytes: &mut [u8], offset: u64, word: u64) {
    bytes[at(offset)..at(offset) + 8].copy_from_slice(&word.to_be_bytes());
}

/// Three second-level tables with data, a snapshot that shares some of it, and a bitmap.
fn sample(version: &'static str) -> Vec<u8> {
    let options = match version {
        "2" => "cluster_size=512,compat=0.10",
        _ => "cluster_size=512",
    };
    let spec = LayerSpec {
        format: "qcow2",
        options,
        size: SIZE,
    };
    let disk = Disk::create(Place::Memory, &[spec]);
    let mut rng = Seeded::new("agree");
    let mut chain = disk.open(Access::Write, WriteOrder::Ordered);
    for start in [0, 64 << 10, 128 << 10] {
        let bytes = rng.bytes(10 << 10);
        chain.write_at(&bytes, start).expect("writes");
    }
    let snapshots = chain.top_mut().as_snapshots().expect("has some");
    let now = std::time::SystemTime::UNIX_EPOCH;
    snapshots.create("one".as_ref(), now).expect("creates");
    if version == "3" {
        let bitmaps = chain.top_mut().as_bitmaps().expect("has some");
        bitmaps
            .add("b".as_ref(), Some(512), Recording::On)
            .expect("adds");
    }
    let bytes = rng.bytes(5 << 10);
    chain.write_at(&bytes, 64 << 10).expect("writes");
    chain.write_at(&bytes[..512], 32 << 10).expect("writes");
    chain.close().expect("closes");
    disk.memory()[0].to_bytes()
}

/// Where metadata is, and what may be said of the words there.
struct Map {
    /// Words that writers judge before the first change.
    judged: Vec<u64>,
    /// Words that they only see when they come by.
    passed: Vec<u64>,
    /// Where metadata begins.
    places: Vec<u64>,
}

impl Map {
    fn of(bytes: &[u8]) -> Self {
        let (l1, reftable, snapshots) = (word(bytes, 40), word(bytes, 48), word(bytes, 64));
        let snapshot_l1 = word(bytes, snapshots);
        let l2 = word(bytes, l1) & OFFSET;
        let snapshot_l2 = word(bytes, snapshot_l1 + 8) & OFFSET;
        let block = word(bytes, reftable);
        let mut judged = vec![8, 40, 48, 64, snapshots];
        judged.extend((0..4).flat_map(|i| [l1 + i * 8, snapshot_l1 + i * 8]));
        judged.extend([reftable, reftable + 8]);
        let mut passed = vec![
            l2,
            l2 + 8,
            l2 + 80,
            snapshot_l2,
            block,
            block + 8,
            block + 64,
        ];
        let mut places = vec![
            0,
            l1,
            reftable,
            snapshots,
            snapshot_l1,
            l2,
            snapshot_l2,
            block,
        ];
        let kind = 0x2385_2875_u32.to_be_bytes();
        if let Some(found) = bytes[..512].windows(4).position(|w| w == kind) {
            let data = found as u64 + 8;
            let directory = word(bytes, data + 16);
            let table = word(bytes, directory);
            judged.extend([data + 16, directory, directory + 8, table]);
            passed.extend([data, data + 8]);
            places.extend([directory, table, word(bytes, table) & OFFSET]);
        }
        places.retain(|p| *p != OFFSET);
        Self {
            judged,
            passed,
            places,
        }
    }

    /// Words to try in the place of `old`.
    fn values(&self, old: u64, len: u64) -> Vec<u64> {
        let end = len.next_multiple_of(CLUSTER);
        let mut values = vec![
            COPIED,
            1,
            1 << 62,
            1 << 56,
            old ^ 1,
            old ^ COPIED,
            old + 512,
        ];
        values.extend([old | 1 << 60, end, end | COPIED, 1 << 40, u64::MAX]);
        let places = self.places.iter().filter(|p| **p != 0);
        values.extend(places.flat_map(|p| [*p, *p | COPIED]));
        values.retain(|v| *v != old);
        values
    }
}

/// Whether only those who read all second-level tables and refcount blocks can see it, which no
/// writer does: it meets each entry and count when it comes by.
fn is_deep(finding: &Finding) -> bool {
    let deep = [
        "(copied flag)",
        "L2 entry at ",
        " refcount ",
        "refcount block",
    ];
    deep.iter().any(|text| finding.text.contains(text))
}

/// Whether nothing is wrong; leaks are no harm.
fn is_clean(report: &Report) -> bool {
    report.corruptions + report.check_errors == 0
}

fn open(storage: &Arc<MemoryStorage>, access: Access) -> vdtool::Result<Chain> {
    view(storage, access, None)
}

fn view(
    storage: &Arc<MemoryStorage>,
    access: Access,
    snapshot: Option<&str>,
) -> vdtool::Result<Chain> {
    let driver = formats::by_name("qcow2").expect("a known format");
    let options = OpenOptions {
        access,
        snapshot: snapshot.map(|name| Pick::Any(name.into())),
        ..OpenOptions::default()
    };
    let image = (driver.open)(storage.clone(), &options)?;
    Chain::new(vec![image], Base::Zeroes, Arc::default())
}

/// What each cluster of a disk reads as, where it reads.
fn clusters(storage: &Arc<MemoryStorage>, snapshot: Option<&str>) -> Vec<Option<Vec<u8>>> {
    let Ok(chain) = view(storage, Access::Read, snapshot) else {
        return Vec::new();
    };
    let size = chain.virtual_size().min(SIZE);
    let mut whole = vec![0; at(size)];
    if chain.read_at(&mut whole, 0).is_ok() {
        return whole.chunks(512).map(|c| Some(c.to_vec())).collect();
    }
    let read = |at: u64| {
        let mut bytes = vec![0; 512];
        chain.read_at(&mut bytes, at).is_ok().then_some(bytes)
    };
    (0..size / CLUSTER).map(|i| read(i * CLUSTER)).collect()
}

/// Both disks, as far as they can be read.
fn all(storage: &Arc<MemoryStorage>) -> [Vec<Option<Vec<u8>>>; 2] {
    [clusters(storage, None), clusters(storage, Some("one"))]
}

/// One write in each table and one where nothing was yet; whether all were taken.
const WRITES: [u64; 5] = [
    CLUSTER,
    (64 << 10) + CLUSTER,
    (128 << 10) + 612,
    FREE,
    96 << 10,
];

fn write(storage: &Arc<MemoryStorage>) -> vdtool::Result<()> {
    let chain = open(storage, Access::Write)?;
    for place in WRITES {
        chain.write_at(&[0x5a; 300], place)?;
    }
    chain.flush()?;
    chain.close()
}

/// Does what `write` did to what was read before.
fn written(mut before: [Vec<Option<Vec<u8>>>; 2]) -> [Vec<Option<Vec<u8>>>; 2] {
    for place in WRITES {
        let cluster = before[0].get_mut(at(place / CLUSTER)).expect("is inside");
        if let Some(bytes) = cluster {
            let start = at(place % CLUSTER);
            bytes[start..start + 300].fill(0x5a);
        }
    }
    before
}

fn report(bytes: &[u8], repair: Repair) -> (Arc<MemoryStorage>, Option<Report>) {
    let driver = formats::by_name("qcow2").expect("a known format");
    let storage = Arc::new(MemoryStorage::from_bytes(bytes));
    let options = OpenOptions {
        purpose: vdtool::image::open::Purpose::Check,
        ..OpenOptions::default()
    };
    // What is refused even for a check is not judged.
    let opens = (driver.open)(storage.clone(), &options).is_ok();
    let report = opens.then(|| check(driver, storage.clone(), repair).expect("it has a check"));
    (storage, report)
}

/// An image, what was done to it, and whether writers judge that part before the first change.
struct Mutant {
    what: String,
    judged: bool,
    /// What is there now is a place that there is, so that nothing shows what was there before.
    plausible: bool,
    bytes: Vec<u8>,
}

/// Some of them: one in `SHARE`, or more where more rounds are asked for.
fn some() -> Vec<Mutant> {
    let mut rng = Seeded::new("some of them");
    let mut mutants: Vec<Mutant> = ["3", "2"].into_iter().flat_map(mutants).collect();
    // Short as it is, and what it finds is counted.
    let chosen = rounds(1000).max(1000);
    mutants.retain(|_| rng.usize(..SHARE * 1000) < chosen);
    mutants
}

fn mutants(version: &'static str) -> Vec<Mutant> {
    let sound = sample(version);
    let map = Map::of(&sound);
    let mut mutants = Vec::new();
    for (places, judged) in [(&map.judged, true), (&map.passed, false)] {
        for place in places {
            let old = word(&sound, *place);
            for value in map.values(old, sound.len() as u64) {
                let mut bytes = sound.clone();
                put(&mut bytes, *place, value);
                mutants.push(Mutant {
                    what: format!("version {version}: {place:#x}: {old:#x} is {value:#x}"),
                    judged,
                    plausible: map.places.contains(&(value & OFFSET)) || value == old + 512,
                    bytes,
                });
            }
        }
    }
    let mut rng = Seeded::new("bits of metadata");
    for _ in 0..rounds(200).max(200) {
        let place = map.places[rng.usize(..map.places.len())] + rng.u64(..112);
        let bit = 1 << rng.u32(..8);
        let mut bytes = sound.clone();
        if let Some(byte) = bytes.get_mut(at(place)) {
            *byte ^= bit;
            mutants.push(Mutant {
                what: format!("version {version}: {place:#x}: bit {bit:#x}"),
                judged: false,
                plausible: true,
                bytes,
            });
        }
    }
    mutants
}

#[test]
fn a_check_is_clean_exactly_where_writes_are_taken_and_a_write_keeps_the_rest() {
    let (mut wrong, mut clean, mut refused) = (Vec::new(), 0, 0);
    for mutant in some() {
        let what = &mutant.what;
        let (storage, Some(report)) = report(&mutant.bytes, Repair::Nothing) else {
            if open(
                &Arc::new(MemoryStorage::from_bytes(&mutant.bytes)),
                Access::Write,
            )
            .is_ok()
            {
                wrong.push(format!("{what}: written, though not even checked"));
            }
            continue;
        };
        let before = all(&storage);
        if before[0].len() != at(SIZE / CLUSTER) {
            // A disk of another size, or none.
            continue;
        }
        let done = write(&storage);
        match (is_clean(&report), &done) {
            (true, Err(e)) => wrong.push(format!("{what}: clean, but not written: {e}")),
            (true, Ok(())) => {
                clean += 1;
                if all(&storage) != written(before) {
                    wrong.push(format!("{what}: clean, and other bytes were lost"));
                }
            }
            (false, Ok(())) if mutant.judged && !report.findings.iter().all(is_deep) => {
                let texts: Vec<&str> = report.findings.iter().map(|f| &*f.text).collect();
                wrong.push(format!("{what}: written, though {texts:?}"));
            }
            (false, _) => refused += 1,
        }
    }
    assert!(wrong.is_empty(), "{}: {wrong:#?}", wrong.len());
    assert!(clean > 3 && refused > 30, "{clean} clean, {refused} not");
}

/// Whether qemu-img finds nothing worse than leaks.
fn qemu_is_content(path: &Path) -> Result<(), String> {
    let line = ["check", "-q", "-f", "qcow2"];
    let output = Command::new("qemu-img").args(line).arg(path).output();
    let output = output.expect("runs");
    match output.status.code() {
        Some(0 | 3) => Ok(()),
        _ => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

#[test]
fn what_a_check_calls_clean_qemu_calls_clean_and_writes_without_a_loss() {
    if !requires("qemu-img") || !requires("qemu-io") {
        return;
    }
    let dir = scratch();
    let path = dir.path().join("a.qcow2");
    let (mut wrong, mut seen) = (Vec::new(), 0);
    for mutant in some() {
        let (storage, report) = report(&mutant.bytes, Repair::Nothing);
        if !report.is_some_and(|r| is_clean(&r)) {
            continue;
        }
        if all(&storage)[0].len() != at(SIZE / CLUSTER) {
            continue;
        }
        seen += 1;
        std::fs::write(&path, &mutant.bytes).expect("writes");
        // It wants a length that fits of the marker that ends the list of extensions, too, which
        // nobody needs.
        let ends = |at: u64| mutant.what.contains(&format!("version 2: {at:#x}: bit"));
        if (76..80).any(ends) {
            continue;
        }
        if let Err(text) = qemu_is_content(&path) {
            wrong.push(format!("{}: {text}", mutant.what));
            continue;
        }
        let mut before = all(&storage);
        let mut line = vec!["-f".to_owned(), "qcow2".to_owned()];
        for place in WRITES {
            let place = place / 512 * 512;
            line.extend(["-c".to_owned(), format!("write -q -P 0x5a {place} 512")]);
            let cluster = before[0][at(place / CLUSTER)].as_mut().expect("reads");
            let start = at(place % CLUSTER);
            cluster[start..start + 512].fill(0x5a);
        }
        let done = Command::new("qemu-io").args(&line).arg(&path).output();
        let done = done.expect("runs");
        if !done.status.success() {
            let text = String::from_utf8_lossy(&done.stdout).into_owned();
            wrong.push(format!("{}: not written by qemu: {text}", mutant.what));
            continue;
        }
        let after = std::fs::read(&path).expect("reads");
        if all(&Arc::new(MemoryStorage::from_bytes(&after))) != before {
            wrong.push(format!("{}: qemu's write lost other bytes", mutant.what));
        }
    }
    assert!(wrong.is_empty(), "{}: {wrong:#?}", wrong.len());
    assert!(seen > 3, "{seen} clean");
}

/// The clusters of guest data in a file that are still there.
fn data(bytes: &[u8], known: &HashSet<Vec<u8>>) -> usize {
    let found = bytes.chunks(512).filter(|c| known.contains(*c));
    found.collect::<HashSet<_>>().len()
}

/// What is wrong after a repair: what was there reads otherwise or is not there any more, a second
/// one finds more to do.
fn after_repair(mutant: &Mutant, repair: Repair, known: &HashSet<Vec<u8>>) -> Vec<String> {
    let (storage, Some(first)) = report(&mutant.bytes, repair) else {
        return Vec::new();
    };
    let mut wrong = Vec::new();
    let before = all(&Arc::new(MemoryStorage::from_bytes(&mutant.bytes)));
    let after = all(&storage);
    // Where metadata reads as data, it may change.
    let lost = |(old, new): (&Option<Vec<u8>>, &Option<Vec<u8>>)| {
        old.as_ref().is_some_and(|c| known.contains(c)) && old != new
    };
    if (0..2).any(|i| before[i].iter().zip(&after[i]).any(lost)) {
        wrong.push("it reads otherwise".to_owned());
    }
    let driver = formats::by_name("qcow2").expect("a known format");
    let second = check(driver, storage.clone(), repair).expect("it has a check");
    let mended = second.corruptions_fixed + second.leaks_fixed;
    if mended > 0 || second.corruptions > first.corruptions || second.leaks > first.leaks {
        wrong.push(format!("a second one found {second:?}"));
    }
    let chain = open(&storage, Access::Write);
    if let (true, Err(e)) = (is_clean(&first), &chain) {
        wrong.push(format!("it is not written: {e}"));
    }
    // Counts that are too low are met by nobody but a check.
    if let (true, Ok(chain)) = (mutant.judged || is_clean(&first), chain) {
        // New data goes to what is free: nothing that was there may be gone.
        let there = data(&mutant.bytes, known);
        for i in 0..60 {
            let _ = chain.write_at(&[0x77; 512], FREE + i * CLUSTER);
        }
        let _ = chain.close();
        assert!(
            storage.size() < 1 << 30,
            "{}: {}",
            mutant.what,
            storage.size()
        );
        let left = data(&storage.to_bytes(), known);
        if !mutant.plausible && left < there {
            wrong.push(format!("{left} of {there} clusters are left"));
        }
    }
    let named = |text: String| format!("{}: after {repair:?}: {text}", mutant.what);
    wrong.into_iter().map(named).collect()
}

#[test]
fn no_repair_gives_away_what_damaged_metadata_may_refer_to_and_a_second_finds_nothing() {
    let storage = Arc::new(MemoryStorage::from_bytes(&sample("3")));
    let disks = all(&storage).into_iter().flatten().flatten();
    let known: HashSet<Vec<u8>> = disks.filter(|c| c.iter().any(|b| *b != 0)).collect();
    let wrong: Vec<String> = some()
        .iter()
        .flat_map(|m| [(m, Repair::Leaks), (m, Repair::All)])
        .flat_map(|(mutant, repair)| after_repair(mutant, repair, &known))
        .collect();
    assert!(wrong.is_empty(), "{}: {wrong:#?}", wrong.len());
}

#[test]
fn two_entries_on_one_table_are_named_and_each_gets_its_own() {
    let sound = sample("3");
    let l1 = word(&sound, 40);
    let snapshot_l1 = word(&sound, word(&sound, 64));
    for (what, table) in [("the disk", l1), ("the snapshot", snapshot_l1)] {
        let mut bytes = sound.clone();
        put(&mut bytes, table + 16, word(&sound, table));
        let (storage, found) = report(&bytes, Repair::Nothing);
        let found = found.expect("is checked");
        let named = |r: &Report| r.findings.iter().any(|f| f.text.contains("as another one"));
        assert!(named(&found), "{what}: {:?}", found.findings);
        assert!(write(&storage).is_err(), "{what}");
        let before = all(&storage);
        let (storage, repaired) = report(&bytes, Repair::All);
        let repaired = repaired.expect("is checked");
        let left = repaired.corruptions + repaired.leaks;
        assert_eq!(left, 0, "{what}: {:?}", repaired.findings);
        assert!(all(&storage) == before, "{what}: reads as before");
        write(&storage).expect("is mended");
        assert!(all(&storage) == written(before), "{what}");
    }
}

#[test]
fn reading_needs_no_refcounts_and_writing_without_them_is_refused_by_name() {
    let sound = sample("3");
    let storage = Arc::new(MemoryStorage::from_bytes(&sound));
    let content = all(&storage);
    let cut = |bytes: &mut Vec<u8>, place: u64, len: usize, value: u64| {
        let value = value.to_be_bytes();
        bytes[at(place)..at(place) + len].copy_from_slice(&value[8 - len..]);
    };
    let damages: [(u64, usize, u64); 5] = [
        (48, 8, 0),
        (48, 8, 1 << 40),
        (48, 8, 513),
        (56, 4, 0),
        (56, 4, 1 << 20),
    ];
    for (place, len, value) in damages {
        let mut bytes = sound.clone();
        cut(&mut bytes, place, len, value);
        let storage = Arc::new(MemoryStorage::from_bytes(&bytes));
        assert!(all(&storage) == content, "{place} {value:#x}");
        let error = write(&storage).expect_err("has no refcounts");
        assert!(error.to_string().contains("refcount table"), "{error}");
        assert!(storage.to_bytes() == bytes, "nothing is written");
        let found = report(&bytes, Repair::Nothing).1.expect("is checked");
        assert!(found.corruptions > 0, "{place} {value:#x}");
        let (storage, repaired) = report(&bytes, Repair::All);
        let repaired = repaired.expect("is checked");
        let left = repaired.corruptions + repaired.leaks;
        assert_eq!(left, 0, "{place} {value:#x}: {:?}", repaired.findings);
        assert!(all(&storage) == content, "{place} {value:#x}");
        write(&storage).expect("is mended");
    }
    assert_eq!(
        read_all(&open(&storage, Access::Read).expect("opens")).len(),
        at(SIZE)
    );
}

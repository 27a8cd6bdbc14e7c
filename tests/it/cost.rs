//! What works cost, counted: system calls, syncs of the image, and space of the target.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use vdtool::chain::{Base, Chain};
use vdtool::copy::rebase::{Store, rebase};
use vdtool::copy::{Before, Convert, Joined, Scan, commit, convert};
use vdtool::formats;
use vdtool::image::check::Repair;
use vdtool::image::open::{OpenOptions, WriteOrder};
use vdtool::storage::Storage;
use vdtool::storage::memory::{Change, Fault, MemoryStorage, Op};
use vdtool::storage::open::Access;
use vdtool::util::grace::Grace;
use vdtool::util::progress::Silent;

use crate::layers::{Disk, LayerSpec, Place, check, read_all};
use crate::util::{Seeded, len, peer, requires, rounds, scratch, vdtool};

const BINARY: &str = env!("CARGO_BIN_EXE_vdtool");
const SIZE: u64 = 24 << 20;
const QCOW2: LayerSpec = LayerSpec {
    format: "qcow2",
    options: "",
    size: SIZE,
};

fn syncs(changes: &[Change]) -> usize {
    changes.iter().filter(|c| **c == Change::Sync).count()
}

/// Writes 300 little pieces into the top layer of `chain`, and into what it is to read as.
fn scatter(chain: &Chain, model: &mut [u8], rng: &mut Seeded) {
    for _ in 0..300 {
        let at = rng.u64(0..SIZE - 20_000);
        let bytes = rng.bytes(20_000);
        chain.write_at(&bytes, at).expect("writes");
        model[len(at)..][..bytes.len()].copy_from_slice(&bytes);
    }
}

/// A chain of three images with little pieces in each, top first, and what it reads as.
fn three(rng: &mut Seeded) -> (Vec<Arc<MemoryStorage>>, Disk, Vec<u8>) {
    let mut disk = Disk::create(Place::Memory, &[]);
    let mut model = vec![0; len(SIZE)];
    for _ in 0..3 {
        disk.push(&QCOW2);
        let chain = disk.open(Access::Write, WriteOrder::Ordered);
        scatter(&chain, &mut model, rng);
        chain.close().expect("closes");
    }
    (disk.memory(), disk, model)
}

/// A chain of some of the layers, the first of which may be open for writing.
fn chain_of(storages: &[Arc<MemoryStorage>], access: Access, base: Base) -> Chain {
    let driver = formats::by_name("qcow2").expect("a known format");
    let grace = Arc::new(Grace::default());
    let images = storages.iter().enumerate().map(|(depth, storage)| {
        let options = OpenOptions {
            access: if depth == 0 { access } else { Access::Read },
            grace: Arc::clone(&grace),
            ..OpenOptions::default()
        };
        (driver.open)(Arc::clone(storage) as Arc<dyn Storage>, &options).expect("opens")
    });
    Chain::new(images.collect(), base, Arc::clone(&grace)).expect("a chain")
}

/// What power cuts may leave of `base` with `changes`: all of what was synced, and of what came
/// after that nothing, or some.
fn after_power_cuts(
    base: &[u8],
    changes: &[Change],
    rng: &mut Seeded,
    mut look: impl FnMut(Arc<MemoryStorage>, usize),
) {
    let stable = MemoryStorage::from_bytes(base);
    let mut synced = 0;
    for made in 0..=changes.len() {
        if made < changes.len() && changes[made] != Change::Sync {
            continue;
        }
        for round in 0..rounds(3) {
            let state = MemoryStorage::from_bytes(&stable.to_bytes());
            let kept = changes[synced..made].iter().filter(|_| match round {
                0 => false,
                _ => rng.bool(),
            });
            kept.for_each(|change| state.apply(change));
            look(Arc::new(state), made);
        }
        for change in &changes[synced..made] {
            stable.apply(change);
        }
        synced = made;
    }
}

#[test]
fn a_rebase_of_many_little_pieces_needs_few_syncs_and_survives_power_cuts() {
    let mut rng = Seeded::new("cost of rebase");
    let (layers, disk, model) = three(&mut rng);
    let base = layers[0].to_bytes();
    layers[0].record();
    let chain = chain_of(&layers, Access::Write, Base::Zeroes);
    let nothing = Joined::new(Vec::new()).expect("is short");
    rebase(&chain, &nothing, Store::Plain, 2, &Silent).expect("rebases");
    chain.flush().expect("flushes");
    let changes = layers[0].changes();
    assert!(syncs(&changes) <= 16, "{} syncs", syncs(&changes));
    assert!(read_all(&chain) == model);
    chain.close().expect("closes");
    let alone = chain_of(&layers[..1], Access::Read, Base::Zeroes);
    assert!(read_all(&alone) == model, "it needs nothing below it");
    let report = disk.check(Repair::Nothing).expect("checks");
    assert_eq!((report.leaks, report.corruptions), (0, 0));
    after_power_cuts(&base, &changes, &mut rng, |state, made| {
        let report = check(disk.driver(), state.clone(), Repair::Nothing).expect("checks");
        assert_eq!(report.corruptions, 0, "after {made}: {:?}", report.findings);
        let layers = [state, layers[1].clone(), layers[2].clone()];
        let chain = chain_of(&layers, Access::Read, Base::Zeroes);
        assert!(read_all(&chain) == model, "after {made}");
    });
}

#[test]
fn a_commit_of_many_little_pieces_needs_few_syncs_and_survives_power_cuts() {
    let mut rng = Seeded::new("cost of commit");
    let (layers, disk, model) = three(&mut rng);
    let old = layers[1].to_bytes();
    layers[1].record();
    let upper = chain_of(&layers[..1], Access::Read, Base::NotOpened);
    let base = chain_of(&layers[1..], Access::Write, Base::Zeroes);
    commit(&upper, &base, 2, &Silent).expect("commits");
    base.flush().expect("flushes");
    let changes = layers[1].changes();
    assert!(syncs(&changes) <= 16, "{} syncs", syncs(&changes));
    assert!(read_all(&base) == model);
    base.close().expect("closes");
    let report = check(disk.driver(), layers[1].clone(), Repair::Nothing).expect("checks");
    assert_eq!((report.leaks, report.corruptions), (0, 0));
    after_power_cuts(&old, &changes, &mut rng, |state, made| {
        let report = check(disk.driver(), state.clone(), Repair::Nothing).expect("checks");
        assert_eq!(report.corruptions, 0, "after {made}: {:?}", report.findings);
        let layers = [layers[0].clone(), state, layers[2].clone()];
        let chain = chain_of(&layers, Access::Read, Base::Zeroes);
        assert!(read_all(&chain) == model, "after {made}");
    });
}

#[test]
fn a_conversion_into_an_image_that_is_there_needs_few_syncs_and_survives_power_cuts() {
    let mut rng = Seeded::new("cost of convert -n");
    let mut model = vec![0; len(SIZE)];
    for _ in 0..300 {
        let at = rng.usize(..model.len() - 20_000);
        let bytes = rng.bytes(20_000);
        model[at..at + bytes.len()].copy_from_slice(&bytes);
    }
    let driver = formats::by_name("raw").expect("a known format");
    let source = Arc::new(MemoryStorage::from_bytes(&model));
    let source = (driver.open)(source, &OpenOptions::default()).expect("opens");
    let source = Chain::new(vec![source], Base::Zeroes, Arc::default()).expect("a chain");
    let sources = Joined::new(vec![source]).expect("is short");
    // Many pieces meet in one of the large clusters.
    for (workers, options) in [(1, ""), (3, ""), (3, "cluster_size=2M")] {
        let disk = Disk::create(Place::Memory, &[LayerSpec { options, ..QCOW2 }]);
        let target = disk.memory().remove(0);
        let before = target.to_bytes();
        target.record();
        let chain = disk.open(Access::Write, WriteOrder::Ordered);
        let options = Convert {
            workers,
            scan: Scan::Cheapest,
            before: Before::Unknown,
            backing: None,
            salvage: None,
            rate: None,
            only: None,
        };
        convert(&sources, &chain, &options, &Silent).expect("converts");
        let changes = target.changes();
        assert!(syncs(&changes) <= 8, "{} syncs", syncs(&changes));
        assert!(read_all(&chain) == model);
        chain.close().expect("closes");
        let report = disk.check(Repair::Nothing).expect("checks");
        assert_eq!((report.leaks, report.corruptions), (0, 0));
        assert!(target.size() <= SIZE + (10 << 20), "{}", target.size());
        after_power_cuts(&before, &changes, &mut rng, |state, made| {
            let report = check(disk.driver(), state.clone(), Repair::Nothing).expect("checks");
            assert_eq!(report.corruptions, 0, "after {made}: {:?}", report.findings);
            let found = read_all(&chain_of(&[state], Access::Read, Base::Zeroes));
            let parts = found.chunks(4096).zip(model.chunks(4096));
            let mut differing = parts.filter(|(found, wanted)| found != wanted);
            let old_or_new = |f: &[u8], w: &[u8]| f.iter().zip(w).all(|(f, w)| f == w || *f == 0);
            let explained = differing.all(|(f, w)| old_or_new(f, w));
            assert!(explained, "after {made}: neither old nor new");
        });
    }
}

/// KiB that a file takes on its host.
fn taken(dir: &Path, name: &str) -> u64 {
    let file = std::fs::File::open(dir.join(name)).expect("opens");
    file.sync_all().expect("syncs");
    file.metadata().expect("tells").blocks() / 2
}

#[test]
fn a_raw_target_takes_space_for_data_and_not_for_the_zeroes_among_it() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    let size = 16 << 20;
    for step in [64 << 10, 1 << 20] {
        let mut bytes = vec![0; size];
        for at in (0..size).step_by(step) {
            bytes[at..at + 4096].fill(7);
        }
        std::fs::write(dir.join("raw"), &bytes).expect("writes");
        let make = |name: &str, options: &[&str]| {
            let line = [
                &["convert", "-f", "raw", "-O", "qcow2"],
                options,
                &["raw", name],
            ];
            drop(peer("qemu-img", dir, line.concat()));
        };
        make("plain", &[]);
        make("packed", &["-c"]);
        make("large", &["-c", "-o", "cluster_size=2M"]);
        for source in ["raw", "plain", "packed", "large"] {
            for how in [&[][..], &["-S", "4k"], &["-S", "4k", "-j", "1"]] {
                let line = [&["convert", "-q", "-O", "raw"], how, &[source, "target"]];
                vdtool()
                    .current_dir(dir)
                    .args(line.concat())
                    .assert()
                    .success();
                assert!(std::fs::read(dir.join("target")).expect("reads") == bytes);
                let (found, data) = (taken(dir, "target"), (size / step * 4) as u64);
                // Extents of the file itself may need a block or a few.
                let most = data + data / 20 + 16;
                assert!(
                    found <= most,
                    "{source}, one in {step}, {how:?}: {found} KiB"
                );
            }
        }
    }
}

#[test]
fn many_little_discards_need_few_syncs_and_writes_and_survive_power_cuts() {
    let mut rng = Seeded::new("cost of discards");
    let disk = Disk::create(Place::Memory, &[QCOW2]);
    let image = disk.memory().remove(0);
    let mut model = rng.bytes(len(SIZE));
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    chain.write_at(&model, 0).expect("writes");
    chain.close().expect("closes");
    let (before, full) = (image.to_bytes(), model.clone());
    image.record();
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    let size = 64 << 10;
    let mut clusters: Vec<u64> = (0..SIZE / size).collect();
    rng.shuffle(&mut clusters);
    let gone = &clusters[..200];
    // What is gone already costs nothing.
    for cluster in gone.iter().chain(&gone[..100]) {
        let range = cluster * size..(cluster + 1) * size;
        model[len(range.start)..len(range.end)].fill(0);
        chain.discard(range).expect("discards");
    }
    chain.flush().expect("flushes");
    chain.close().expect("closes");
    let changes = image.changes();
    assert!(syncs(&changes) <= 3, "{} syncs", syncs(&changes));
    let writes = changes
        .iter()
        .filter(|c| matches!(c, Change::Write { .. }))
        .count();
    assert!(writes <= 200 + 8, "{writes} writes");
    let report = disk.check(Repair::Nothing).expect("checks");
    assert_eq!((report.leaks, report.corruptions), (0, 0));
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    assert!(read_all(&chain) == model);
    // What was given back is taken again.
    let end = image.size();
    chain.write_at(&full, 0).expect("writes");
    chain.close().expect("closes");
    assert_eq!(image.size(), end);
    after_power_cuts(&before, &changes, &mut rng, |state, made| {
        let report = check(disk.driver(), state.clone(), Repair::Nothing).expect("checks");
        assert_eq!(report.corruptions, 0, "after {made}: {:?}", report.findings);
        let found = read_all(&chain_of(&[state], Access::Read, Base::Zeroes));
        for (at, found) in found.chunks(len(size)).enumerate() {
            let part = at * len(size)..(at + 1) * len(size);
            let explained = found == &full[part.clone()] || found == &model[part];
            assert!(explained, "after {made}: cluster {at}");
        }
    });
}

#[test]
fn a_write_that_finds_no_room_gets_what_was_discarded_before() {
    let disk = Disk::create(Place::Memory, &[QCOW2]);
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    let image = disk.memory().remove(0);
    chain.write_at(&[7; 8 << 20], 0).expect("writes");
    chain.flush().expect("flushes");
    chain.discard(0..4 << 20).expect("discards");
    let full = |count| Fault {
        op: Op::Change,
        after: 0,
        count,
        errno: libc::ENOSPC,
    };
    // There is no room for more than was asked for, nor for that.
    image.inject(full(2));
    image.record();
    chain
        .write_at(&[8; 1 << 20], 16 << 20)
        .expect("there is room again");
    let given = image
        .changes()
        .iter()
        .any(|c| matches!(c, Change::Zero(r) if r.end - r.start >= 4 << 20));
    assert!(given, "{:?}", image.changes());
    // Nothing more can be given back, so the host's answer is the answer.
    image.inject(full(100));
    let error = chain
        .write_at(&[9; 1 << 20], 20 << 20)
        .expect_err("is full");
    assert_eq!(error.errno(), libc::ENOSPC);
}

#[test]
fn much_that_is_discarded_does_not_wait_for_a_flush() {
    let spec = LayerSpec {
        size: 200 << 20,
        options: "cluster_size=2M",
        ..QCOW2
    };
    let disk = Disk::create(Place::Memory, &[spec]);
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    let image = disk.memory().remove(0);
    for at in (0..spec.size).step_by(2 << 20) {
        chain.write_at(&[7], at).expect("writes");
    }
    chain.flush().expect("flushes");
    image.record();
    for at in (0..spec.size).step_by(2 << 20) {
        chain.discard(at..at + (2 << 20)).expect("discards");
    }
    let zeroed = |change: &Change| match change {
        Change::Zero(range) => range.end - range.start,
        _ => 0,
    };
    let given: u64 = image.changes().iter().map(zeroed).sum();
    assert!(given >= 100 << 20, "{} MiB", given >> 20);
}

/// How often each system call is made by vdtool.
fn calls(dir: &Path, line: &str) -> HashMap<String, u64> {
    let mut traced = Command::new("strace");
    traced.args(["-f", "-qq", "-o", "calls"]);
    traced.arg(BINARY).args(line.split(' '));
    traced.current_dir(dir).stdout(Stdio::null());
    assert!(traced.status().expect("runs").success(), "{line}");
    let lines = std::fs::read_to_string(dir.join("calls")).expect("was written");
    let mut counts = HashMap::new();
    for call in lines.lines().filter_map(|l| l.split_whitespace().nth(1)) {
        if let Some((name, _)) = call.split_once('(') {
            *counts.entry(name.to_owned()).or_default() += 1;
        }
    }
    counts
}

fn works(dir: &Path, line: &str) {
    let mut command = vdtool();
    command.current_dir(dir).args(line.split(' '));
    command.assert().success();
}

/// Has `io` run lines on an image.
fn io(dir: &Path, image: &str, lines: impl Iterator<Item = String>) {
    let lines: Vec<String> = lines.collect();
    let mut command = vdtool();
    command.current_dir(dir).args(["io", "-q", image]);
    command.write_stdin(lines.join("\n")).assert().success();
}

/// The extents that `map` lists, and how many of them are zeroes with space.
fn extents(dir: &Path, image: &str) -> (usize, usize) {
    let mut command = vdtool();
    command.current_dir(dir);
    let output = command.args(["map", "--output", "json", image]).output();
    let text = output.expect("runs").stdout;
    let list: Vec<serde_json::Value> = serde_json::from_slice(&text).expect("is a list");
    let holes = |e: &&serde_json::Value| e["present"] == true && e["zero"] == true;
    (list.len(), list.iter().filter(holes).count())
}

#[test]
fn map_and_measure_ask_for_holes_where_tables_were_made_ahead_of_the_data_and_nowhere_else() {
    if !requires("strace") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    works(dir, "create -q a.vhd 64M");
    works(dir, "create -q a.qcow2 64M");
    works(dir, "create -q -o preallocation=metadata ahead.qcow2 64M");
    for image in ["a.vhd", "a.qcow2", "ahead.qcow2"] {
        let piece = |i: u64| format!("write -P 5 {} {}", i * 262_144, 65_536);
        io(dir, image, (0..256).map(piece));
    }
    for image in ["a.vhd", "a.qcow2"] {
        for verb in ["map", "measure -O qcow2"] {
            let asked = calls(dir, &format!("{verb} {image}")).get("lseek").copied();
            assert!(
                asked.unwrap_or(0) <= 4,
                "{verb} {image}: {asked:?} questions"
            );
        }
    }
    assert_eq!(extents(dir, "a.vhd"), (32, 0));
    assert_eq!(extents(dir, "a.qcow2"), (512, 0));
    assert_eq!(extents(dir, "ahead.qcow2"), (512, 256));
    works(dir, "convert -q -O raw a.vhd a.raw");
    assert_eq!(extents(dir, "a.raw"), (512, 256));
}

/// A chain of three with 256 clusters in the base and 16 in each of the others, at other places.
fn three_files(dir: &Path) {
    works(dir, "create -q base.qcow2 64M");
    works(dir, "create -q -b base.qcow2 -F qcow2 middle.qcow2");
    works(dir, "create -q -b middle.qcow2 -F qcow2 top.qcow2");
    let pieces = [
        ("base.qcow2", 256, 262_144, 65_536, 1),
        ("middle.qcow2", 16, 4_194_304, 20_000, 2),
        ("top.qcow2", 16, 3_211_264, 20_000, 3),
    ];
    for (image, count, step, size, byte) in pieces {
        let piece = |i: u64| format!("write -P {byte} {} {size}", i * step);
        io(dir, image, (0..count).map(piece));
    }
}

#[test]
fn a_rebase_looks_at_no_more_than_what_may_differ() {
    if !requires("strace") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    three_files(dir);
    works(dir, "convert -q -O raw top.qcow2 before.raw");
    let calls = calls(dir, "rebase -q -b base.qcow2 -F qcow2 top.qcow2");
    works(dir, "compare -q -F raw top.qcow2 before.raw");
    let count = |name: &str| calls.get(name).copied().unwrap_or(0);
    // Once for what opening and the header need, and a few times for each piece that differs.
    assert!(count("fstat") <= 100, "{} fstat", count("fstat"));
    assert!(count("lseek") <= 48, "{} lseek", count("lseek"));
    let reads = count("pread64") + count("preadv");
    assert!(reads <= 32, "{reads} reads");
}

#[test]
fn a_commit_writes_in_place_where_the_base_has_space_and_asks_for_no_holes_in_little_pieces() {
    if !requires("strace") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    three_files(dir);
    // Where the middle has clusters of its own.
    let piece = |i: u64| format!("write -P 4 {} 20000", i * 4_194_304 + 4096);
    io(dir, "top.qcow2", (0..16).map(piece));
    works(dir, "convert -q -O raw top.qcow2 before.raw");
    let length = || {
        let file = std::fs::metadata(dir.join("middle.qcow2"));
        file.expect("is there").len()
    };
    let before = length();
    let calls = calls(dir, "commit -q --drop top.qcow2");
    works(dir, "compare -q -F raw middle.qcow2 before.raw");
    let count = |name: &str| calls.get(name).copied().unwrap_or(0);
    assert!(count("lseek") <= 8, "{} lseek", count("lseek"));
    let made = calls.get("fallocate").copied().unwrap_or(0);
    assert!(made <= 2, "{made} pieces given back or reserved");
    assert!(length() <= before + (16 << 16), "{} bytes", length());
}

#[test]
fn cache_mode_unsafe_has_nothing_synced_ever() {
    if !requires("strace") || !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    let calls = |line: &[&str]| {
        let mut traced = Command::new("strace");
        traced.args(["-f", "-qq", "-o", "trace", "-e"]);
        traced.args(["trace=fsync,fdatasync,sync,syncfs,sync_file_range,msync"]);
        let done = traced.arg(BINARY).args(line).current_dir(dir).output();
        let done = done.expect("runs");
        assert!(done.status.success(), "{line:?}: {done:?}");
        let trace = std::fs::read_to_string(dir.join("trace")).expect("reads");
        trace.lines().filter(|l| l.contains("sync")).count()
    };
    for format in ["qcow2", "vhd", "vdi"] {
        let make = |line: &[&str]| drop(vdtool().current_dir(dir).args(line).assert().success());
        make(&["create", "-q", "-f", format, "base", "8M"]);
        make(&["io", "-q", "-c", "write -P 1 0 4M", "base"]);
        make(&[
            "create", "-q", "-f", format, "-b", "base", "-F", format, "top",
        ]);
        let write = [
            "-c",
            "write -P 2 64k 3M",
            "-c",
            "flush",
            "-c",
            "write -P 3 6M 1M",
        ];
        let io = [&["io", "-q", "-t", "unsafe", "top"], &write[..]].concat();
        assert_eq!(calls(&io), 0, "{format}: io");
        let safe = [&["io", "-q", "top"], &write[..]].concat();
        assert!(calls(&safe) > 0, "{format}: io in its own mode");
        let mut lines = vec![
            vec![
                "convert", "-q", "-n", "-f", format, "-O", format, "top", "base2",
            ],
            vec!["convert", "-q", "-O", format, "top", "new"],
            vec![
                "bench", "-q", "-w", "-c", "64", "-t", "unsafe", "-f", format, "base2",
            ],
            vec!["check", "-q", "-r", "all", "-T", "unsafe", "base2"],
            vec!["commit", "-q", "-t", "unsafe", "top"],
        ];
        if format == "qcow2" {
            lines.push(vec!["amend", "-t", "unsafe", "-o", "compat=0.10", "base2"]);
            lines.push(vec!["rebase", "-q", "-t", "unsafe", "-b", "", "top"]);
        }
        make(&["create", "-q", "-f", format, "base2", "8M"]);
        for line in lines {
            assert_eq!(calls(&line), 0, "{line:?}");
        }
        for name in ["base", "base2", "top", "new"] {
            std::fs::remove_file(dir.join(name)).expect("is there");
        }
    }
}

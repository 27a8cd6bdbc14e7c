//! `vdtool snapshot` and `convert -l`, beside qemu-img.

use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use vdtool::image::open::WriteOrder;
use vdtool::image::snapshot::Pick;
use vdtool::storage::memory::{Change, MemoryStorage};
use vdtool::storage::open::Access;

use crate::layers::{Disk, LayerSpec, Place, read_all};
use crate::util::{Seeded, peer, requires, rounds, scratch, vdtool};

fn ours(dir: &Path, line: &[&str]) -> assert_cmd::assert::Assert {
    vdtool().current_dir(dir).args(line).assert()
}

fn theirs(dir: &Path, line: &[&str]) -> String {
    peer("qemu-img", dir, line)
}

/// What the disk reads as, through qemu-img.
fn content(dir: &Path, snapshot: Option<&str>) -> Vec<u8> {
    let mut line = vec!["convert", "-O", "raw"];
    if let Some(snapshot) = snapshot {
        line.extend(["-l", snapshot]);
    }
    line.extend(["a.qcow2", "out.raw"]);
    theirs(dir, &line);
    let bytes = std::fs::read(dir.join("out.raw")).expect("reads");
    let mut line: Vec<&str> = line[..line.len() - 1].to_vec();
    line.push("ours.raw");
    ours(dir, &line).success();
    let same = std::fs::read(dir.join("ours.raw")).expect("reads") == bytes;
    assert!(same, "both read the same of {snapshot:?}");
    bytes
}

fn check(dir: &Path) {
    let text = theirs(dir, &["check", "a.qcow2"]);
    assert!(text.contains("No errors were found"), "{text}");
}

const OPTIONS: [&str; 7] = [
    "cluster_size=64k",
    "compat=0.10",
    "cluster_size=512",
    "cluster_size=2M",
    "refcount_bits=2",
    "refcount_bits=64,cluster_size=4k",
    "extended_l2=on",
];

#[test]
fn what_either_tool_does_to_snapshots_the_other_reads_and_finds_clean() {
    if !requires("qemu-img") || !requires("qemu-io") {
        return;
    }
    for options in OPTIONS {
        for tool in [true, false] {
            // qemu-img needs one count more while it applies a snapshot.
            if !tool && options == "refcount_bits=2" {
                continue;
            }
            let dir = scratch();
            let dir = dir.path();
            let act = |line: &[&str]| match tool {
                true => drop(ours(dir, line).success()),
                false => drop(theirs(dir, line)),
            };
            let write = |commands: &[&str]| {
                let mut line = vec!["-f", "qcow2"];
                commands.iter().for_each(|c| line.extend(["-c", c]));
                line.push("a.qcow2");
                if tool {
                    line.insert(0, "io");
                    ours(dir, &line).success();
                } else {
                    peer("qemu-io", dir, &line);
                }
            };
            theirs(
                dir,
                &[
                    "create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", "6M",
                ],
            );
            write(&["write -P 1 0 1M", "write -P 2 3M 700k"]);
            let first = content(dir, None);
            act(&["snapshot", "-c", "first", "a.qcow2"]);
            check(dir);
            write(&["write -P 3 100k 1M", "discard 3M 256k", "write -z 0 64k"]);
            check(dir);
            let second = content(dir, None);
            act(&["snapshot", "-c", "second", "a.qcow2"]);
            write(&["write -P 4 5M 1M"]);
            check(dir);
            assert!(content(dir, Some("first")) == first, "{options}");
            assert!(content(dir, Some("snapshot.name=second")) == second);
            act(&["snapshot", "-a", "first", "a.qcow2"]);
            check(dir);
            assert!(content(dir, None) == first, "{options}");
            write(&["write -P 5 0 300k"]);
            check(dir);
            act(&["snapshot", "-d", "first", "a.qcow2"]);
            check(dir);
            act(&["snapshot", "-a", "2", "a.qcow2"]);
            check(dir);
            assert!(content(dir, None) == second, "{options}");
            act(&["snapshot", "-d", "second", "a.qcow2"]);
            check(dir);
            assert!(content(dir, None) == second, "{options}");
            assert_eq!(theirs(dir, &["snapshot", "-l", "a.qcow2"]), "");
            write(&["write -P 6 0 6M"]);
            check(dir);
        }
    }
}

#[test]
fn an_applied_snapshot_has_its_copied_flags_whoever_wrote_it() {
    if !requires("qemu-img") || !requires("qemu-io") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    theirs(dir, &["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    for (byte, name) in [("1", "first"), ("2", "second")] {
        let write = format!("write -q -P {byte} 0 64k");
        peer("qemu-io", dir, ["-c", &*write, "a.qcow2"]);
        theirs(dir, &["snapshot", "-c", name, "a.qcow2"]);
    }
    // qemu-img leaves flags in the tables of snapshots that ours copies without them.
    theirs(dir, &["snapshot", "-a", "first", "a.qcow2"]);
    ours(dir, &["snapshot", "-a", "second", "a.qcow2"]).success();
    check(dir);
    ours(dir, &["check", "a.qcow2"]).success();
}

#[test]
fn lists_are_those_of_qemu_img() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    theirs(dir, &["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    theirs(dir, &["snapshot", "-c", "one", "a.qcow2"]);
    ours(dir, &["snapshot", "-c", "zwei", "a.qcow2"]).success();
    let listed = theirs(dir, &["snapshot", "-l", "a.qcow2"]);
    assert!(listed.contains("zwei"), "{listed}");
    let found = ours(dir, &["snapshot", "-l", "a.qcow2"]).success();
    let found = String::from_utf8_lossy(&found.get_output().stdout).into_owned();
    let words = |text: &str| -> Vec<Vec<String>> {
        let split = |l: &str| l.split_whitespace().map(str::to_owned).collect();
        text.lines().map(split).collect()
    };
    assert_eq!(words(&found), words(&listed));
    let json = |tool: &str| -> serde_json::Value {
        let line = ["info", "--output", "json", "a.qcow2"];
        let text = match tool {
            "qemu-img" => theirs(dir, &line),
            _ => {
                let done = ours(dir, &line).success();
                String::from_utf8_lossy(&done.get_output().stdout).into_owned()
            }
        };
        let value: serde_json::Value = serde_json::from_str(&text).expect("is JSON");
        value["snapshots"].clone()
    };
    assert_eq!(json("vdtool"), json("qemu-img"));
}

#[test]
fn what_cannot_be_is_refused_and_nothing_is_changed() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    let make = |options: &str| {
        theirs(
            dir,
            &[
                "create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", "1M",
            ],
        );
        peer("qemu-io", dir, ["-c", "write 0 100k", "a.qcow2"]);
    };
    let refused = |line: &[&str], code: i32, words: &str| {
        let before = std::fs::read(dir.join("a.qcow2")).expect("reads");
        let done = ours(dir, line).code(code);
        let text = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
        assert!(text.contains(words), "{text}");
        let after = std::fs::read(dir.join("a.qcow2")).expect("reads");
        assert!(before == after || after.len() > before.len(), "{line:?}");
    };
    make("refcount_bits=1");
    refused(&["snapshot", "-c", "x", "a.qcow2"], 63, "1 bits");
    check(dir);
    make("data_file=a.raw");
    refused(&["snapshot", "-c", "x", "a.qcow2"], 63, "data file");
    make("cluster_size=64k");
    refused(&["snapshot", "-c", "", "a.qcow2"], 1, "1 to 255");
    refused(&["snapshot", "-a", "x", "a.qcow2"], 1, "no snapshot 'x'");
    refused(&["snapshot", "-d", "x", "a.qcow2"], 1, "no snapshot 'x'");
    refused(
        &["convert", "-l", "x", "a.qcow2", "b.raw"],
        1,
        "no snapshot",
    );
    ours(dir, &["create", "-q", "a.vhd", "1M"]).success();
    // As qemu-img has it: what cannot have any has none.
    ours(dir, &["snapshot", "-l", "a.vhd"]).success().stdout("");
    ours(dir, &["convert", "-l", "x", "a.vhd", "b.raw"]).code(63);
    ours(dir, &["snapshot", "-l", "-c", "x", "a.qcow2"]).code(2);
}

#[test]
fn a_snapshot_of_a_compressed_disk_and_of_another_size_comes_back() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    ours(dir, &["create", "-q", "a.raw", "3M"]).success();
    ours(dir, &["io", "-q", "-c", "write -P 7 0 2M", "a.raw"]).success();
    theirs(dir, &["convert", "-c", "-O", "qcow2", "a.raw", "a.qcow2"]);
    let first = content(dir, None);
    ours(dir, &["snapshot", "-c", "x", "a.qcow2"]).success();
    theirs(dir, &["resize", "-q", "a.qcow2", "5G"]);
    peer("qemu-io", dir, ["-c", "write -P 8 1M 2M", "a.qcow2"]);
    check(dir);
    ours(dir, &["snapshot", "-a", "x", "a.qcow2"]).success();
    check(dir);
    assert!(content(dir, None) == first, "size and content are back");
    ours(dir, &["snapshot", "-d", "x", "a.qcow2"]).success();
    check(dir);
    assert!(content(dir, None) == first);
}

/// After a kill at any change and a power cut at any sync, the image opens, reads as before or
/// after, and qemu-img finds nothing worse than leaks.
#[test]
fn a_change_of_snapshots_is_whole_or_not_there_after_a_crash() {
    if !requires("qemu-img") {
        return;
    }
    let mut rng = Seeded::new("snapshots");
    let dir = scratch();
    for (options, name) in [("cluster_size=512", "small"), ("cluster_size=4k", "4k")] {
        let spec = LayerSpec {
            format: "qcow2",
            options,
            size: 300 << 10,
        };
        let disk = Disk::create(Place::Memory, &[spec]);
        let memory = disk.memory()[0].clone();
        let write = |rng: &mut Seeded| {
            let chain = disk.open(Access::Write, WriteOrder::Ordered);
            for _ in 0..8 {
                let bytes = rng.bytes(20_000);
                chain.write_at(&bytes, rng.u64(0..280_000)).expect("writes");
            }
            chain.flush().expect("flushes");
            chain.close().expect("closes");
            read_all(&chain)
        };
        write(&mut rng);
        let steps = ["create a", "create b", "apply a", "delete a", "delete b"];
        for step in steps {
            let before = write(&mut rng);
            let base = memory.to_bytes();
            memory.record();
            let mut chain = disk.open(Access::Write, WriteOrder::Ordered);
            let snapshots = chain.top_mut().as_snapshots().expect("has some");
            let (verb, key) = step.split_once(' ').expect("two words");
            match verb {
                "create" => snapshots.create(key.as_ref(), UNIX_EPOCH + Duration::from_secs(9)),
                "apply" => snapshots.apply(&Pick::Any(key.into())),
                _ => snapshots.delete(&Pick::Any(key.into())),
            }
            .expect(step);
            chain.close().expect("closes");
            let after = read_all(&chain);
            drop(chain);
            let changes = memory.changes();
            let stride = (changes.len() / rounds(40)).max(1);
            let now = MemoryStorage::from_bytes(&base);
            for (made, change) in changes.iter().enumerate() {
                now.apply(change);
                let switch = matches!(change, Change::Write { host: 0, .. });
                if made % stride == 0 || switch || made + 1 == changes.len() {
                    let path = dir.path().join("state.qcow2");
                    std::fs::write(&path, now.to_bytes()).expect("has room");
                    let found = Disk::of_bytes("qcow2", &now.to_bytes());
                    let found = read_all(&found.open(Access::Read, WriteOrder::Ordered));
                    assert!(found == before || found == after, "{name} {step} {made}");
                    let out = std::process::Command::new("qemu-img")
                        .args(["check", "state.qcow2"])
                        .current_dir(dir.path())
                        .output()
                        .expect("runs");
                    let code = out.status.code();
                    let text = String::from_utf8_lossy(&out.stderr).into_owned();
                    assert!(matches!(code, Some(0 | 3)), "{name} {step} {made}: {text}");
                }
            }
            let synced = |i: usize| changes[..i].iter().rposition(|c| *c == Change::Sync);
            let header = changes
                .iter()
                .position(|c| matches!(c, Change::Write { host: 0, .. }))
                .expect("the header is switched");
            let last = (0..header).rev().find(|i| changes[*i] != Change::Sync);
            let around = &changes[header.saturating_sub(3)..=header];
            assert!(synced(header) > last, "{name} {step}: {header} {around:?}");
        }
    }
}

/// A table of any bytes is refused, and neither panics nor takes memory.
#[test]
fn a_damaged_table_is_refused_and_nothing_is_changed() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    theirs(dir, &["create", "-q", "-f", "qcow2", "a.qcow2", "8M"]);
    theirs(dir, &["snapshot", "-c", "the name", "a.qcow2"]);
    let whole = std::fs::read(dir.join("a.qcow2")).expect("reads");
    let name = whole.windows(8).rposition(|w| w == b"the name");
    // Before the name: the identifier, the extra data, the fixed part.
    let entry = name.expect("is there") - 1 - 24 - 40;
    let header = [60, 61, 64, 66, 71];
    let fields = [0, 7, 8, 36, 38].map(|at| entry + at);
    for at in header.into_iter().chain(fields) {
        let mut bytes = whole.clone();
        bytes[at] = 0xff;
        std::fs::write(dir.join("a.qcow2"), &bytes).expect("writes");
        for line in [
            &["snapshot", "-l", "a.qcow2"][..],
            &["snapshot", "-c", "y", "a.qcow2"],
            &["snapshot", "-a", "1", "a.qcow2"],
            &["snapshot", "-d", "1", "a.qcow2"],
            &["convert", "-l", "1", "a.qcow2", "b.raw"],
        ] {
            ours(dir, line).code(1);
        }
        let after = std::fs::read(dir.join("a.qcow2")).expect("reads");
        assert!(after == bytes);
    }
}

#[test]
fn a_disk_of_no_bytes_has_snapshots_too() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    theirs(dir, &["create", "-q", "-f", "qcow2", "a.qcow2", "0"]);
    for action in ["-c", "-a", "-d"] {
        ours(dir, &["snapshot", action, "x", "a.qcow2"]).success();
        check(dir);
    }
}

//! Snapshot tables that are incomplete, absurd or in the wrong place, beside qemu-img.

use std::path::Path;
use std::process::Command;

use crate::util::{peer, requires, scratch, vdtool};

/// One entry of a table, in parts.
#[derive(Debug, Clone)]
struct Entry {
    head: [u8; 40],
    extra: Vec<u8>,
    rest: Vec<u8>,
}

fn number(bytes: &[u8]) -> usize {
    bytes.iter().fold(0, |n, b| n << 8 | usize::from(*b))
}

fn entries(bytes: &[u8]) -> Vec<Entry> {
    let (count, mut at) = (number(&bytes[60..64]), number(&bytes[64..72]));
    let mut list = Vec::new();
    for _ in 0..count {
        let head: [u8; 40] = bytes[at..at + 40].try_into().expect("forty bytes");
        let extra = number(&head[36..40]);
        let names = number(&head[12..14]) + number(&head[14..16]);
        let rest = at + 40 + extra;
        list.push(Entry {
            head,
            extra: bytes[at + 40..rest].to_vec(),
            rest: bytes[rest..rest + names].to_vec(),
        });
        at = (rest + names).next_multiple_of(8);
    }
    list
}

/// The image with its table written again, in place.
fn with(bytes: &[u8], list: &[Entry]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let mut table = Vec::new();
    for entry in list {
        let mut head = entry.head;
        let len = u32::try_from(entry.extra.len()).expect("short");
        head[36..40].copy_from_slice(&len.to_be_bytes());
        table.extend(head);
        table.extend(&entry.extra);
        table.extend(&entry.rest);
        table.resize(table.len().next_multiple_of(8), 0);
    }
    let start = number(&bytes[64..72]);
    table.resize(table.len().max(4096), 0);
    if bytes.len() < start + table.len() {
        bytes.resize(start + table.len(), 0);
    }
    bytes[start..start + table.len()].copy_from_slice(&table);
    bytes
}

/// Two snapshots, and data since.
fn sample(dir: &Path) -> Vec<u8> {
    let qemu = |line: &[&str]| drop(peer("qemu-img", dir, line));
    qemu(&["create", "-q", "-f", "qcow2", "a.qcow2", "4M"]);
    let write = |what: &str| drop(peer("qemu-io", dir, ["-c", what, "a.qcow2"]));
    write("write -P 1 0 1M");
    qemu(&["snapshot", "-c", "the first", "a.qcow2"]);
    write("write -P 2 512k 1M");
    qemu(&["snapshot", "-c", "second", "a.qcow2"]);
    write("write -P 3 0 64k");
    std::fs::read(dir.join("a.qcow2")).expect("reads")
}

fn ours(dir: &Path, line: &[&str]) -> (Option<i32>, String) {
    let done = vdtool().current_dir(dir).args(line).output().expect("runs");
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    let errors = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(!errors.contains("panicked"), "{line:?}: {errors}");
    (done.status.code(), text + &errors)
}

fn theirs(dir: &Path, line: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new("qemu-img");
    let done = command.args(line).current_dir(dir).output().expect("runs");
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    let errors = String::from_utf8_lossy(&done.stderr).into_owned();
    (done.status.code(), text + &errors)
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

#[test]
fn entries_without_what_version_3_has_are_completed() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    let whole = sample(dir);
    let list = entries(&whole);
    let before: Vec<Vec<u8>> = ["1", "2"].map(|id| content(dir, id)).to_vec();
    for keep in [[0, 0], [8, 24], [24, 0], [12, 15], [0, 8]] {
        let mut short = list.clone();
        for (entry, keep) in short.iter_mut().zip(keep) {
            entry.extra.truncate(keep);
        }
        let bytes = with(&whole, &short);
        for mends in [true, false] {
            std::fs::write(dir.join("a.qcow2"), &bytes).expect("writes");
            assert_eq!(theirs(dir, &["check", "a.qcow2"]).0, Some(2), "{keep:?}");
            let (code, text) = ours(dir, &["check", "a.qcow2"]);
            assert_eq!(code, Some(2), "{keep:?}: {text}");
            assert!(text.contains("extra data"), "{text}");
            assert_eq!(ours(dir, &["check", "-r", "leaks", "a.qcow2"]).0, Some(2));
            let unchanged = std::fs::read(dir.join("a.qcow2")).expect("reads");
            assert!(unchanged == bytes, "leaks are all that was asked for");
            // Incomplete entries are read all the same.
            assert_eq!(ours(dir, &["snapshot", "-l", "a.qcow2"]).0, Some(0));
            let line = ["check", "-r", "all", "a.qcow2"];
            match mends {
                true => assert_eq!(ours(dir, &line).0, Some(0), "{keep:?}"),
                false => assert_eq!(theirs(dir, &line).0, Some(0), "{keep:?}"),
            }
            for check in [
                ours(dir, &["check", "a.qcow2"]),
                theirs(dir, &["check", "a.qcow2"]),
            ] {
                assert_eq!(check.0, Some(0), "{keep:?}: {}", check.1);
            }
            let line = ["snapshot", "-l", "a.qcow2"];
            assert_eq!(words(&ours(dir, &line).1), words(&theirs(dir, &line).1));
            for (id, before) in ["1", "2"].iter().zip(&before) {
                assert!(content(dir, id) == *before, "{keep:?} {id}");
            }
        }
    }
}

fn content(dir: &Path, id: &str) -> Vec<u8> {
    let line = ["convert", "-l", id, "-O", "raw", "a.qcow2", "out.raw"];
    peer("qemu-img", dir, line);
    let bytes = std::fs::read(dir.join("out.raw")).expect("reads");
    let (code, text) = ours(dir, &["convert", "-l", id, "a.qcow2", "ours.raw"]);
    assert_eq!(code, Some(0), "{text}");
    assert!(std::fs::read(dir.join("ours.raw")).expect("reads") == bytes);
    bytes
}

/// What is wrong is told by both, nothing is changed by a look, and nothing is lost by a repair.
#[test]
fn absurd_tables_are_told_as_qemu_img_tells_them() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    let whole = sample(dir);
    let table = number(&whole[64..72]);
    let size = whole.len() as u64;
    let l1 = u64::try_from(number(&whole[40..48])).expect("small");
    let reftable = u64::try_from(number(&whole[48..56])).expect("small");
    let mut cases: Vec<(String, Vec<u8>)> = Vec::new();
    let mut case = |what: &str, at: usize, value: &[u8]| {
        let mut bytes = whole.clone();
        bytes[at..at + value.len()].copy_from_slice(value);
        cases.push((what.to_owned(), bytes));
    };
    for count in [65_537u32, u32::MAX, 1 << 31, 1000] {
        case("count", 60, &count.to_be_bytes());
    }
    for offset in [
        0,
        512,
        1,
        l1,
        reftable,
        size,
        size + (1 << 20),
        u64::MAX,
        1 << 62,
        65_536 - 8,
    ] {
        case("offset", 64, &offset.to_be_bytes());
        case("L1 offset", table, &offset.to_be_bytes());
    }
    for entries in [u32::MAX, 1 << 22, (1 << 22) + 1, 100_000_000] {
        case("L1 length", table + 8, &entries.to_be_bytes());
    }
    for len in [u16::MAX, 40_000] {
        case("id length", table + 12, &len.to_be_bytes());
        case("name length", table + 14, &len.to_be_bytes());
    }
    for len in [1025u32, 4096, u32::MAX, 1 << 31] {
        case("extra length", table + 36, &len.to_be_bytes());
    }
    for disk in [u64::MAX, 1 << 63, 1 << 55] {
        case("disk size", table + 48, &disk.to_be_bytes());
    }
    let mut agreed = 0;
    for (number, (what, bytes)) in cases.iter().enumerate() {
        let path = dir.join("a.qcow2");
        std::fs::write(&path, bytes).expect("writes");
        let (found, text) = ours(dir, &["check", "a.qcow2"]);
        let (expected, their_text) = theirs(dir, &["check", "a.qcow2"]);
        let what = format!("{number} {what}: {text}\nqemu-img: {their_text}");
        // Theirs may not look at what only an apply would use.
        assert!(found != Some(0) || expected == Some(0), "{what}");
        agreed += usize::from((found == Some(0)) == (expected == Some(0)));
        for line in [
            &["snapshot", "-l", "a.qcow2"][..],
            &["snapshot", "-c", "x", "a.qcow2"],
            &["snapshot", "-a", "1", "a.qcow2"],
            &["convert", "-l", "1", "a.qcow2", "x.raw"],
            &["info", "a.qcow2"],
            &["map", "a.qcow2"],
        ] {
            std::fs::write(&path, bytes).expect("writes");
            let (code, text) = ours(dir, line);
            assert!(matches!(code, Some(0 | 1 | 63)), "{line:?} {what} {text}");
            if code != Some(0) {
                let after = std::fs::read(&path).expect("reads");
                // Space that was taken for the attempt and given back may have made it longer; what was
                // found to be metadata that nothing counted is counted from then on.
                let same = after.starts_with(bytes) || text.contains("metadata is in use");
                assert!(same, "{line:?} failed and changed the image: {what}");
            }
        }
        // A repair takes nothing from the disk, whatever it does about the snapshots.
        std::fs::write(&path, bytes).expect("writes");
        let read = [
            "io",
            "-r",
            "-c",
            "read -P 3 0 64k",
            "-c",
            "read -P 2 1M 512k",
            "a.qcow2",
        ];
        let (before, _) = ours(dir, &read);
        let _ = ours(dir, &["check", "-r", "all", "a.qcow2"]);
        assert!(before != Some(0) || ours(dir, &read).0 == Some(0), "{what}");
    }
    assert!(
        agreed * 10 >= cases.len() * 8,
        "{agreed} of {}",
        cases.len()
    );
}

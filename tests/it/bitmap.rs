//! `vdtool bitmap` and `convert --bitmaps`, beside qemu-img.

use std::ops::Range;
use std::path::Path;

use vdtool::image::bitmap::Recording;
use vdtool::image::open::WriteOrder;
use vdtool::image::snapshot::Pick;
use vdtool::storage::memory::MemoryStorage;
use vdtool::storage::open::Access;

use crate::layers::{Disk, LayerSpec, Place};
use crate::util::{peer, requires, scratch, vdtool};

fn ours(dir: &Path, line: &[&str]) -> assert_cmd::assert::Assert {
    vdtool().current_dir(dir).args(line).assert()
}

fn bitmaps(dir: &Path, tool: &str, file: &str) -> serde_json::Value {
    let line = ["info", "--output", "json", file];
    let text = match tool {
        "qemu-img" => peer("qemu-img", dir, line),
        _ => {
            let done = ours(dir, &line).success();
            String::from_utf8_lossy(&done.get_output().stdout).into_owned()
        }
    };
    let value: serde_json::Value = serde_json::from_str(&text).expect("is JSON");
    value["format-specific"]["data"]["bitmaps"].clone()
}

/// Both tools show the same bitmaps, and the image is clean; what they show.
fn agreed(dir: &Path, file: &str) -> serde_json::Value {
    let text = peer("qemu-img", dir, ["check", file]);
    assert!(text.contains("No errors were found"), "{text}");
    let found = bitmaps(dir, "vdtool", file);
    assert_eq!(found, bitmaps(dir, "qemu-img", file));
    found
}

/// The ranges that a bitmap has as dirty, through our library.
fn dirty(path: &Path, name: &str) -> Vec<Range<u64>> {
    let options = vdtool::chain::open::ChainOptions::read();
    let chain = vdtool::chain::open::open(path, &options).expect("opens");
    let bitmaps = chain.top().bitmaps().expect("has some");
    bitmaps.dirty(name.as_ref(), 0, 1000).expect("is sound")
}

/// The ranges that a bitmap has as dirty, through an NBD export of qemu-nbd.
fn their_dirty(dir: &Path, file: &str, name: &str) -> Vec<Range<u64>> {
    let socket = format!("unix:{}", dir.join("s").display());
    let export = format!("--bitmap={name}");
    let mut server = std::process::Command::new("qemu-nbd")
        .args(["-r", "-f", "qcow2", &export, "-k"])
        .arg(dir.join("s"))
        .arg(file)
        .current_dir(dir)
        .spawn()
        .expect("starts");
    while !dir.join("s").exists() {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{name}",
        socket.trim_start_matches("unix:")
    );
    let text = peer(
        "qemu-img",
        dir,
        ["map", "--output=json", "--image-opts", &options],
    );
    let _ = server.wait();
    let _ = std::fs::remove_file(dir.join("s"));
    let value: serde_json::Value = serde_json::from_str(&text).expect("is JSON");
    let rows = value.as_array().expect("a list").iter();
    let mut ranges: Vec<Range<u64>> = Vec::new();
    // The export shows what is dirty as holes.
    for row in rows.filter(|row| row["data"] == false) {
        let start = row["start"].as_u64().expect("a number");
        let end = start + row["length"].as_u64().expect("a number");
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => ranges.push(start..end),
        }
    }
    ranges
}

/// One range, as a list.
fn only(start: u64, end: u64) -> Vec<Range<u64>> {
    std::iter::once(start..end).collect()
}

#[test]
fn writes_are_recorded_as_qemu_records_them() {
    if !requires("qemu-img") || !requires("qemu-nbd") {
        return;
    }
    for options in ["cluster_size=64k", "cluster_size=512", "extended_l2=on"] {
        let dir = scratch();
        let dir = dir.path();
        for file in ["a.qcow2", "b.qcow2"] {
            let line = ["create", "-q", "-f", "qcow2", "-o", options, file, "8M"];
            peer("qemu-img", dir, line);
            peer("qemu-io", dir, ["-c", "write 0 1M", file]);
            ours(dir, &["bitmap", "--add", "-g", "4k", file, "fine"]).success();
            peer("qemu-img", dir, ["bitmap", "--add", file, "coarse"]);
            ours(dir, &["bitmap", "--add", "--disable", file, "off"]).success();
            agreed(dir, file);
        }
        let commands = [
            "write -P 1 100k 1k",
            "write -P 1 1023k 2k",
            "write -P 2 5M 300k",
            "write -c -P 4 2M 128k",
            "write -c -P 4 3M 64k",
            "write -P 5 3090k 2k",
            "write -z 64k 64k",
            "discard 6M 64k",
            "write -P 3 8191k 1k",
        ];
        let mut line = Vec::new();
        commands.iter().for_each(|c| line.extend(["-c", c]));
        ours(dir, &[&["io", "-q"], &line[..], &["a.qcow2"]].concat()).success();
        peer("qemu-io", dir, [&line[..], &["b.qcow2"]].concat());
        for name in ["fine", "coarse", "off"] {
            let found = dirty(&dir.join("a.qcow2"), name);
            assert_eq!(found, dirty(&dir.join("b.qcow2"), name), "{options} {name}");
            assert_eq!(found, their_dirty(dir, "a.qcow2", name), "{options} {name}");
            assert_eq!(found.is_empty(), name == "off");
        }
        agreed(dir, "a.qcow2");
    }
}

#[test]
fn compressed_writes_into_an_image_that_exists_are_recorded() {
    let dir = scratch();
    let dir = dir.path();
    for options in ["cluster_size=64k", "cluster_size=512", "extended_l2=on"] {
        let create = ["create", "-q", "-f", "qcow2", "-o", options];
        ours(dir, &[&create[..], &["a.qcow2", "8M"]].concat()).success();
        ours(dir, &["io", "-q", "-c", "write -P 9 1M 3M", "a.qcow2"]).success();
        ours(dir, &["bitmap", "--add", "-g", "4k", "a.qcow2", "b"]).success();
        // Text, noise, zeroes over data and zeroes over nothing.
        let mut bytes = vec![0; 6 << 20];
        bytes[..1 << 20].fill(b'a');
        fastrand::Rng::with_seed(3).fill(&mut bytes[1 << 20..2 << 20]);
        std::fs::write(dir.join("a.raw"), &bytes).expect("writes");
        let convert = ["convert", "-q", "-n", "-c", "-O", "qcow2"];
        ours(dir, &[&convert[..], &["a.raw", "a.qcow2"]].concat()).success();
        let found = dirty(&dir.join("a.qcow2"), "b");
        // All that reads otherwise than before is noted, and nothing past the source.
        assert_eq!(found.first().map(|r| r.start), Some(0), "{options}");
        assert!(found.iter().any(|r| r.contains(&((4 << 20) - 1))));
        assert!(found.windows(2).all(|r| r[0].end >= 4 << 20), "{found:?}");
        assert!(
            found.iter().all(|r| r.end <= 6 << 20),
            "{options} {found:?}"
        );
        if requires("qemu-img") {
            agreed(dir, "a.qcow2");
        }
    }
}

#[test]
fn every_verb_does_what_qemu_img_does() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    let path = dir.join("a.qcow2");
    peer(
        "qemu-img",
        dir,
        ["create", "-q", "-f", "qcow2", "a.qcow2", "64M"],
    );
    ours(dir, &["bitmap", "--add", "a.qcow2", "one"]).success();
    ours(dir, &["bitmap", "--add", "-g", "1M", "a.qcow2", "two"]).success();
    ours(dir, &["bitmap", "--disable", "a.qcow2", "two"]).success();
    ours(dir, &["io", "-q", "-c", "write 3M 70k", "a.qcow2"]).success();
    assert_eq!(dirty(&path, "one"), only(3 << 20, (3 << 20) + (128 << 10)));
    assert_eq!(dirty(&path, "two"), []);
    ours(dir, &["bitmap", "--merge", "one", "a.qcow2", "two"]).success();
    assert_eq!(dirty(&path, "two"), only(3 << 20, 4 << 20));
    ours(dir, &["bitmap", "--enable", "a.qcow2", "two"]).success();
    agreed(dir, "a.qcow2");
    ours(dir, &["bitmap", "--clear", "a.qcow2", "two"]).success();
    assert_eq!(dirty(&path, "two"), []);
    peer(
        "qemu-img",
        dir,
        ["bitmap", "--merge", "one", "a.qcow2", "two"],
    );
    assert_eq!(dirty(&path, "two"), only(3 << 20, 4 << 20));
    std::fs::copy(&path, dir.join("b.qcow2")).expect("copies");
    ours(dir, &["bitmap", "--clear", "a.qcow2", "one"]).success();
    let line = ["bitmap", "--merge", "one", "-b", "b.qcow2", "-F", "qcow2"];
    ours(dir, &[&line[..], &["a.qcow2", "one"]].concat()).success();
    assert_eq!(dirty(&path, "one"), only(3 << 20, (3 << 20) + (128 << 10)));
    ours(dir, &["bitmap", "--remove", "a.qcow2", "two"]).success();
    let left = agreed(dir, "a.qcow2");
    assert_eq!(left.as_array().map(Vec::len), Some(1), "{left}");
    ours(dir, &["bitmap", "--remove", "a.qcow2", "one"]).success();
    assert_eq!(agreed(dir, "a.qcow2"), serde_json::Value::Null);
    for (line, code) in [
        (&["--remove", "a.qcow2", "one"][..], 1),
        (&["--add", "-g", "1000", "a.qcow2", "x"], 1),
        (&["--add", "a.qcow2", ""], 1),
        (&["a.qcow2", "x"], 2),
        (&["--enable", "--disable", "a.qcow2", "x"], 2),
    ] {
        ours(dir, &[&["bitmap"], line].concat()).code(code);
    }
    ours(dir, &["create", "-q", "a.vhd", "1M"]).success();
    ours(dir, &["bitmap", "--add", "a.vhd", "x"]).code(63);
    let line = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "compat=0.10",
        "old.qcow2",
        "1M",
    ];
    peer("qemu-img", dir, line);
    ours(dir, &["bitmap", "--add", "old.qcow2", "x"]).code(63);
    agreed(dir, "a.qcow2");
}

#[test]
fn a_converted_image_has_the_bitmaps_of_its_source_where_that_is_asked_for() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    peer(
        "qemu-img",
        dir,
        ["create", "-q", "-f", "qcow2", "a.qcow2", "8M"],
    );
    ours(dir, &["bitmap", "--add", "-g", "4k", "a.qcow2", "on"]).success();
    ours(dir, &["io", "-q", "-c", "write 1M 10k", "a.qcow2"]).success();
    ours(dir, &["bitmap", "--add", "--disable", "a.qcow2", "off"]).success();
    ours(dir, &["convert", "--bitmaps", "a.qcow2", "b.qcow2"]).success();
    assert_eq!(agreed(dir, "b.qcow2"), agreed(dir, "a.qcow2"));
    assert_eq!(
        dirty(&dir.join("b.qcow2"), "on"),
        only(1 << 20, (1 << 20) + 12_288)
    );
    ours(dir, &["convert", "a.qcow2", "c.qcow2"]).success();
    assert_eq!(agreed(dir, "c.qcow2"), serde_json::Value::Null);
    ours(dir, &["convert", "--bitmaps", "a.qcow2", "c.raw"]).code(63);
    assert!(!dir.join("c.raw").exists());
    // As a writer leaves it that is killed.
    let mut bytes = std::fs::read(dir.join("a.qcow2")).expect("reads");
    let name = bytes
        .windows(2)
        .rposition(|w| w == b"on")
        .expect("is there");
    bytes[name - 24 + 15] |= 1;
    std::fs::write(dir.join("a.qcow2"), &bytes).expect("writes");
    let broken = bitmaps(dir, "vdtool", "a.qcow2");
    assert_eq!(broken[0]["flags"][0], "in-use", "{broken}");
    ours(dir, &["convert", "--bitmaps", "a.qcow2", "c.qcow2"]).code(1);
    let line = [
        "convert",
        "--bitmaps",
        "--skip-broken-bitmaps",
        "a.qcow2",
        "c.qcow2",
    ];
    ours(dir, &line).success();
    assert_eq!(agreed(dir, "c.qcow2").as_array().map(Vec::len), Some(1));
}

/// At every moment the image is clean but for leaks, and a bitmap either is in use or has every
/// write that reached the disk.
#[test]
fn a_crash_leaves_a_bitmap_in_use_or_complete() {
    if !requires("qemu-img") {
        return;
    }
    let spec = LayerSpec {
        format: "qcow2",
        options: "cluster_size=512",
        size: 300 << 10,
    };
    let disk = Disk::create(Place::Memory, &[spec]);
    let mut chain = disk.open(Access::Write, WriteOrder::Ordered);
    chain.write_at(&[1; 40_000], 20_000).expect("writes");
    let bitmaps = chain.top_mut().as_bitmaps().expect("has some");
    bitmaps
        .add("b".as_ref(), Some(512), Recording::On)
        .expect("adds");
    chain.close().expect("closes");
    drop(chain);
    let memory = disk.memory()[0].clone();
    let base = memory.to_bytes();
    memory.record();
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    for at in [21_000u64, 100_000, 250_000] {
        chain.write_at(&[2; 3000], at).expect("writes");
        let next = (at + 40_000) / 512 * 512;
        chain.write_compressed(&[3; 2048], next).expect("writes");
    }
    chain.close().expect("closes");
    drop(chain);
    let changes = memory.changes();
    let now = MemoryStorage::from_bytes(&base);
    let before = crate::layers::read_all(
        &Disk::of_bytes("qcow2", &base).open(Access::Read, WriteOrder::Ordered),
    );
    let dir = scratch();
    let mut in_use = 0;
    for (made, change) in changes.iter().enumerate() {
        now.apply(change);
        let found = Disk::of_bytes("qcow2", &now.to_bytes());
        let found = found.open(Access::Read, WriteOrder::Ordered);
        let list = found.top().bitmaps().expect("has some");
        let bitmap = list.list().expect("is sound").remove(0);
        in_use += usize::from(bitmap.in_use);
        if !bitmap.in_use {
            let dirty = list.dirty("b".as_ref(), 0, 1000).expect("is sound");
            let bytes = crate::layers::read_all(&found);
            for (at, (old, new)) in before.iter().zip(&bytes).enumerate() {
                let noted = dirty.iter().any(|r| r.contains(&(at as u64)));
                assert!(old == new || noted, "{made}: {at}");
            }
        }
        if made % 3 == 0 {
            std::fs::write(dir.path().join("a.qcow2"), now.to_bytes()).expect("has room");
            let out = std::process::Command::new("qemu-img")
                .args(["check", "a.qcow2"])
                .current_dir(dir.path())
                .output()
                .expect("runs");
            let text = String::from_utf8_lossy(&out.stderr).into_owned();
            assert!(matches!(out.status.code(), Some(0 | 3)), "{made}: {text}");
        }
    }
    assert!(in_use > 3, "the bitmap was in use while it was written");
    let list = Disk::of_bytes("qcow2", &now.to_bytes());
    let list = list.open(Access::Read, WriteOrder::Ordered);
    let list = list
        .top()
        .bitmaps()
        .expect("has some")
        .list()
        .expect("reads");
    assert!(!list[0].in_use, "a clean close takes the mark away");
}

#[test]
fn a_jump_to_a_snapshot_counts_as_a_write_to_all_of_whatever_size_it_is() {
    if !requires("qemu-img") || !requires("qemu-nbd") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    let line = ["create", "-q", "-f", "qcow2", "a.qcow2", "8M"];
    peer("qemu-img", dir, line);
    ours(dir, &["snapshot", "-c", "x", "a.qcow2"]).success();
    ours(dir, &["bitmap", "--add", "a.qcow2", "b"]).success();
    ours(dir, &["snapshot", "-a", "x", "a.qcow2"]).success();
    agreed(dir, "a.qcow2");
    assert_eq!(dirty(&dir.join("a.qcow2"), "b"), only(0, 8 << 20));
    ours(dir, &["bitmap", "--add", "a.qcow2", "off"]).success();
    ours(dir, &["bitmap", "--clear", "a.qcow2", "b"]).success();
    let write = ["io", "-q", "-c", "write 7M 64k", "a.qcow2"];
    ours(dir, &write).success();
    ours(dir, &["bitmap", "--disable", "a.qcow2", "off"]).success();
    for (size, other) in [("9M", "12G"), ("12G", "1M"), ("1M", "9M")] {
        // A snapshot of one size, and the disk of another.
        ours(dir, &["resize", "-q", "--shrink", "a.qcow2", size]).success();
        let bytes = size_of(dir);
        ours(dir, &["snapshot", "-c", size, "a.qcow2"]).success();
        ours(dir, &["resize", "-q", "--shrink", "a.qcow2", other]).success();
        ours(dir, &["bitmap", "--clear", "a.qcow2", "b"]).success();
        let kept = dirty(&dir.join("a.qcow2"), "off");
        ours(dir, &["snapshot", "-a", size, "a.qcow2"]).success();
        agreed(dir, "a.qcow2");
        ours(dir, &["check", "-q", "a.qcow2"]).success();
        assert_eq!(size_of(dir), bytes);
        assert_eq!(dirty(&dir.join("a.qcow2"), "b"), only(0, bytes), "{size}");
        assert_eq!(their_dirty(dir, "a.qcow2", "b"), only(0, bytes), "{size}");
        let found = dirty(&dir.join("a.qcow2"), "off");
        let cut = kept.into_iter().filter(|r| r.start < bytes);
        assert_eq!(found, cut.collect::<Vec<_>>(), "{size}");
        // It goes on recording.
        ours(dir, &["bitmap", "--clear", "a.qcow2", "b"]).success();
        ours(dir, &["io", "-q", "-c", "write 0 64k", "a.qcow2"]).success();
        assert_eq!(dirty(&dir.join("a.qcow2"), "b"), only(0, 64 << 10));
    }
}

/// The size of the disk of `a.qcow2`.
fn size_of(dir: &Path) -> u64 {
    let text = peer("qemu-img", dir, ["info", "--output=json", "a.qcow2"]);
    let value: serde_json::Value = serde_json::from_str(&text).expect("is JSON");
    value["virtual-size"].as_u64().expect("a number")
}

#[test]
fn bitmaps_follow_a_resize_as_in_qemu() {
    if !requires("qemu-img") || !requires("qemu-nbd") {
        return;
    }
    // A table of one entry, of many, and bits that end within a byte, a cluster, a table.
    for (options, granularity, sizes) in [
        ("cluster_size=64k", "64k", ["40M", "3G", "17M", "17408k"]),
        ("cluster_size=512", "512", ["40M", "43009k", "2049k", "5M"]),
        ("extended_l2=on", "4k", ["300M", "9M", "9217k", "5G"]),
    ] {
        let dir = scratch();
        let dir = dir.path();
        let both = ["a.qcow2", "b.qcow2"];
        for file in both {
            let line = ["create", "-q", "-f", "qcow2", "-o", options, file, "10M"];
            peer("qemu-img", dir, line);
            let line = ["bitmap", "--add", "-g", granularity, file, "on"];
            peer("qemu-img", dir, line);
            peer(
                "qemu-img",
                dir,
                ["bitmap", "--add", "-g", "1M", file, "off"],
            );
            let writes = ["-c", "write 0 70k", "-c", "write 9M 1M", file];
            peer("qemu-io", dir, writes);
            peer("qemu-img", dir, ["bitmap", "--disable", file, "off"]);
            peer("qemu-io", dir, ["-c", "write 4M 1k", file]);
        }
        let space = ["--preallocation=metadata", "--preallocation=falloc"];
        let steps = sizes.map(|size| ("--shrink", size)).into_iter();
        for (how, size) in steps.chain(space.into_iter().zip(["+3M", "+700k"])) {
            ours(dir, &["resize", "-q", how, both[0], size]).success();
            peer("qemu-img", dir, ["resize", "-q", how, both[1], size]);
            assert_eq!(agreed(dir, both[0]), agreed(dir, both[1]));
            ours(dir, &["check", both[0]]).success();
            for name in ["on", "off"] {
                let found = dirty(&dir.join(both[0]), name);
                let expected = dirty(&dir.join(both[1]), name);
                assert_eq!(found, expected, "{options} {size} {name}");
                assert_eq!(found, their_dirty(dir, both[0], name), "{options} {size}");
            }
            // Both go on recording.
            let write = ["-c", "write 2000k 40k", "-c", "write 1M 512"];
            ours(dir, &[&["io", "-q"], &write[..], &both[..1]].concat()).success();
            peer("qemu-io", dir, [&write[..], &both[1..]].concat());
        }
    }
}

#[test]
fn a_resize_between_writes_of_one_session_loses_no_bit() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    let line = ["create", "-q", "-f", "qcow2", "a.qcow2", "8M"];
    peer("qemu-img", dir, line);
    ours(dir, &["bitmap", "--add", "-g", "64k", "a.qcow2", "b"]).success();
    let commands = [
        "write 1M 64k",
        "truncate 12G",
        "write 11G 64k",
        "truncate 9M",
        "write 8M 64k",
    ];
    let mut line = vec!["io", "-q"];
    commands.iter().for_each(|c| line.extend(["-c", c]));
    ours(dir, &[&line[..], &["a.qcow2"]].concat()).success();
    agreed(dir, "a.qcow2");
    let found = dirty(&dir.join("a.qcow2"), "b");
    let (k, m) = (64 << 10, 1u64 << 20);
    assert_eq!(found, [m..m + k, 8 * m..8 * m + k]);
}

#[test]
fn a_bitmap_that_is_in_use_keeps_its_image_from_being_resized() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    let line = ["create", "-q", "-f", "qcow2", "a.qcow2", "8M"];
    peer("qemu-img", dir, line);
    ours(dir, &["bitmap", "--add", "a.qcow2", "the name"]).success();
    for (what, line, code) in [
        ("0", &["resize", "--shrink", "a.qcow2", "0"][..], 63),
        ("9M", &["resize", "a.qcow2", "9M"], 1),
    ] {
        let mut bytes = std::fs::read(dir.join("a.qcow2")).expect("reads");
        if what != "0" {
            let name = bytes.windows(8).rposition(|w| w == b"the name");
            bytes[name.expect("is there") - 24 + 15] |= 1;
            std::fs::write(dir.join("a.qcow2"), &bytes).expect("writes");
        }
        ours(dir, line).code(code);
        let after = std::fs::read(dir.join("a.qcow2")).expect("reads");
        assert!(after == bytes, "{what}");
    }
}

/// What a bitmap and the disk are in one state of a file.
#[derive(Debug, PartialEq, Eq)]
struct State {
    size: u64,
    dirty: Vec<Range<u64>>,
    recording: Vec<Range<u64>>,
    in_use: bool,
}

fn state(bytes: &[u8]) -> State {
    let disk = Disk::of_bytes("qcow2", bytes);
    let chain = disk.open(Access::Read, WriteOrder::Ordered);
    let bitmaps = chain.top().bitmaps().expect("has some");
    let in_use = bitmaps.list().expect("is sound").remove(0).in_use;
    State {
        size: chain.virtual_size(),
        dirty: bitmaps.dirty("b".as_ref(), 0, 1000).expect("is sound"),
        recording: bitmaps.dirty("c".as_ref(), 0, 1000).expect("is sound"),
        in_use,
    }
}

/// After a kill at any change, a bitmap is the one before or the one after, and never in use.
#[test]
fn a_crash_in_a_resize_a_merge_or_a_jump_leaves_the_bitmaps_before_or_after_it() {
    if !requires("qemu-img") {
        return;
    }
    for options in ["cluster_size=512", "cluster_size=4k"] {
        let spec = LayerSpec {
            format: "qcow2",
            options,
            size: 3 << 20,
        };
        let disk = Disk::create(Place::Memory, &[spec]);
        let mut chain = disk.open(Access::Write, WriteOrder::Ordered);
        let bitmaps = chain.top_mut().as_bitmaps().expect("has some");
        bitmaps
            .add("b".as_ref(), Some(512), Recording::On)
            .expect("adds");
        chain.write_at(&[1; 40_000], 20_000).expect("writes");
        chain
            .write_at(&[1; 4000], (3 << 20) - 4000)
            .expect("writes");
        let bitmaps = chain.top_mut().as_bitmaps().expect("has some");
        bitmaps
            .set_recording("b".as_ref(), Recording::Off)
            .expect("is there");
        bitmaps
            .add("c".as_ref(), Some(512), Recording::On)
            .expect("adds");
        chain.write_at(&[1; 90_000], 1 << 20).expect("writes");
        let snapshots = chain.top_mut().as_snapshots().expect("has some");
        let now = std::time::SystemTime::UNIX_EPOCH;
        snapshots.create("x".as_ref(), now).expect("has room");
        chain.close().expect("closes");
        drop(chain);
        let memory = disk.memory()[0].clone();
        for step in ["grow", "merge", "shrink", "grow", "jump"] {
            let base = memory.to_bytes();
            memory.record();
            let mut chain = disk.open(Access::Write, WriteOrder::Ordered);
            match step {
                "grow" => chain.resize(chain.virtual_size() * 2 + 512).expect("grows"),
                "shrink" => chain.resize((2 << 20) - 512).expect("shrinks"),
                "jump" => {
                    let snapshots = chain.top_mut().as_snapshots().expect("has some");
                    snapshots.apply(&Pick::Any("x".into())).expect("is there");
                }
                _ => {
                    let bitmaps = chain.top_mut().as_bitmaps().expect("has some");
                    bitmaps
                        .merge("b".as_ref(), "c".as_ref(), None)
                        .expect("merges");
                }
            }
            chain.close().expect("closes");
            drop(chain);
            let (before, after) = (state(&base), state(&memory.to_bytes()));
            assert_ne!(before, after);
            let now = MemoryStorage::from_bytes(&base);
            let dir = scratch();
            for (made, change) in memory.changes().iter().enumerate() {
                now.apply(change);
                let bytes = now.to_bytes();
                let found = state(&bytes);
                assert!(
                    found == before || found == after,
                    "{step} {made}: {found:?}"
                );
                if made % 7 == 0 {
                    std::fs::write(dir.path().join("a.qcow2"), &bytes).expect("has room");
                    let out = std::process::Command::new("qemu-img")
                        .args(["check", "a.qcow2"])
                        .current_dir(dir.path())
                        .output()
                        .expect("runs");
                    let text = String::from_utf8_lossy(&out.stderr).into_owned();
                    assert!(matches!(out.status.code(), Some(0 | 3)), "{made}: {text}");
                }
            }
            std::fs::write(dir.path().join("a.qcow2"), memory.to_bytes()).expect("has room");
            agreed(dir.path(), "a.qcow2");
        }
    }
}

/// A directory of any bytes is an error or a list, and neither panics nor takes long.
#[test]
fn a_damaged_directory_is_refused_by_writers_and_readers_do_without() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    let line = ["create", "-q", "-f", "qcow2", "a.qcow2", "8M"];
    peer("qemu-img", dir, line);
    ours(dir, &["bitmap", "--add", "a.qcow2", "the name"]).success();
    let whole = std::fs::read(dir.join("a.qcow2")).expect("reads");
    let name = whole.windows(8).rposition(|w| w == b"the name");
    let entry = name.expect("is there") - 24;
    for (at, byte) in [
        (0, 0xff),
        (7, 1),
        (8, 0xff),
        (13, 1),
        (16, 2),
        (17, 8),
        (17, 63),
        (18, 0xff),
        (20, 0xff),
        (23, 8),
    ] {
        let mut bytes = whole.clone();
        bytes[entry + at] = byte;
        std::fs::write(dir.join("a.qcow2"), &bytes).expect("writes");
        let info = ours(dir, &["info", "a.qcow2"]).success();
        let info = String::from_utf8_lossy(&info.get_output().stdout).into_owned();
        assert!(info.contains("bitmaps damaged"), "{at}: {info}");
        ours(dir, &["io", "-c", "write 0 4k", "a.qcow2"]).code(1);
        ours(dir, &["io", "-r", "-c", "read -P 0 0 4k", "a.qcow2"]).success();
        ours(dir, &["bitmap", "--add", "a.qcow2", "other"]).code(1);
        let after = std::fs::read(dir.join("a.qcow2")).expect("reads");
        assert!(after == bytes, "{at}");
    }
}

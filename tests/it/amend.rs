//! `vdtool amend`, beside qemu-img.

use std::path::Path;

use vdtool::image::open::WriteOrder;
use vdtool::image::options::OptionValues;
use vdtool::storage::memory::MemoryStorage;
use vdtool::storage::open::Access;

use crate::layers::{Disk, LayerSpec, Place, read_all};
use crate::util::{peer, requires, scratch, vdtool};

fn ours(dir: &Path, line: &[&str]) -> assert_cmd::assert::Assert {
    vdtool().current_dir(dir).args(line).assert()
}

fn amend(dir: &Path, options: &str) -> assert_cmd::assert::Assert {
    ours(dir, &["amend", "-o", options, "a.qcow2"])
}

fn content(dir: &Path) -> Vec<u8> {
    let text = peer("qemu-img", dir, ["check", "a.qcow2"]);
    assert!(text.contains("No errors were found"), "{text}");
    peer(
        "qemu-img",
        dir,
        ["convert", "-O", "raw", "a.qcow2", "theirs.raw"],
    );
    ours(dir, &["convert", "-q", "a.qcow2", "ours.raw"]).success();
    let bytes = std::fs::read(dir.join("theirs.raw")).expect("reads");
    assert!(std::fs::read(dir.join("ours.raw")).expect("reads") == bytes);
    bytes
}

fn detail(dir: &Path, key: &str) -> serde_json::Value {
    let text = peer("qemu-img", dir, ["info", "--output=json", "a.qcow2"]);
    let value: serde_json::Value = serde_json::from_str(&text).expect("is JSON");
    value["format-specific"]["data"][key].clone()
}

#[test]
fn the_version_goes_up_and_down_and_the_disk_stays() {
    if !requires("qemu-img") {
        return;
    }
    for backing in [&[][..], &["-b", "base.raw", "-F", "raw"]] {
        let dir = scratch();
        let dir = dir.path();
        ours(dir, &["create", "-q", "base.raw", "4M"]).success();
        ours(dir, &["io", "-q", "-c", "write -P 9 0 4M", "base.raw"]).success();
        let create = ["create", "-q", "-f", "qcow2"];
        peer(
            "qemu-img",
            dir,
            [&create[..], backing, &["a.qcow2", "4M"]].concat(),
        );
        let commands = [
            "-c",
            "write -P 1 0 1M",
            "-c",
            "write -z 512k 1M",
            "-c",
            "write -z 3M 5k",
        ];
        peer("qemu-io", dir, [&commands[..], &["a.qcow2"]].concat());
        let before = content(dir);
        amend(dir, "lazy_refcounts=on").success();
        assert_eq!(detail(dir, "lazy-refcounts"), true);
        amend(dir, "compat=0.10,lazy_refcounts=on").code(1);
        amend(dir, "compat=0.10").success();
        assert_eq!(detail(dir, "compat"), "0.10");
        assert!(content(dir) == before, "{backing:?}");
        amend(dir, "refcount_bits=32").code(1);
        amend(dir, "compat=1.1,refcount_bits=1,lazy_refcounts=on").success();
        assert_eq!(detail(dir, "compat"), "1.1");
        assert_eq!(detail(dir, "refcount-bits"), 1);
        assert!(content(dir) == before, "{backing:?}");
        amend(dir, "compat=v2,refcount_bits=16").success();
        assert!(content(dir) == before, "{backing:?}");
    }
}

#[test]
fn refcounts_of_every_width_become_those_of_every_other() {
    if !requires("qemu-img") {
        return;
    }
    for cluster in ["512", "64k"] {
        let dir = scratch();
        let dir = dir.path();
        let options = format!("cluster_size={cluster},refcount_bits=1");
        let line = [
            "create", "-q", "-f", "qcow2", "-o", &options, "a.qcow2", "4M",
        ];
        peer("qemu-img", dir, line);
        peer("qemu-io", dir, ["-c", "write -P 1 1k 3M", "a.qcow2"]);
        let before = content(dir);
        for bits in [64, 2, 16, 1, 32, 4, 8] {
            amend(dir, &format!("refcount_bits={bits}")).success();
            assert_eq!(detail(dir, "refcount-bits"), bits);
            assert!(content(dir) == before, "{cluster} {bits}");
        }
        ours(dir, &["snapshot", "-c", "x", "a.qcow2"]).success();
        amend(dir, "refcount_bits=1").code(63);
        amend(dir, "refcount_bits=2").success();
        assert!(content(dir) == before);
    }
}

#[test]
fn what_an_image_cannot_become_is_refused_by_name() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    let make = |options: &str| {
        let line = [
            "create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", "1M",
        ];
        peer("qemu-img", dir, line);
    };
    let refused = |options: &str, code: i32, words: &str| {
        let before = std::fs::read(dir.join("a.qcow2")).expect("reads");
        let done = amend(dir, options).code(code);
        let text = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
        assert!(text.contains(words), "{options}: {text}");
        assert!(std::fs::read(dir.join("a.qcow2")).expect("reads") == before);
    };
    make("extended_l2=on");
    refused("compat=0.10", 63, "extended L2");
    make("cluster_size=64k");
    refused("cluster_size=4k", 2, "no option 'cluster_size'");
    refused("refcount_bits=3", 1, "1, 2, 4");
    refused("data_file=x", 63, "data_file");
    refused("data_file_raw=on", 63, "data_file_raw");
    refused("backing_fmt=raw", 1, "there is none");
    ours(dir, &["bitmap", "--add", "a.qcow2", "b"]).success();
    refused("compat=0.10", 63, "bitmaps");
    ours(dir, &["create", "-q", "base.raw", "1M"]).success();
    let line = ["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw"];
    peer("qemu-img", dir, [&line[..], &["a.qcow2"]].concat());
    ours(dir, &["snapshot", "-c", "x", "a.qcow2"]).success();
    ours(dir, &["resize", "-q", "a.qcow2", "2M"]).success();
    refused("compat=0.10", 63, "snapshot 'x' is of a disk of");
    ours(dir, &["create", "-q", "a.vdi", "1M"]).success();
    ours(dir, &["amend", "-o", "compat=1.1", "a.vdi"]).code(63);
    let help = ours(dir, &["amend", "-o", "help", "a.qcow2"]).success();
    let help = String::from_utf8_lossy(&help.get_output().stdout).into_owned();
    assert!(help.contains("refcount_bits"), "{help}");
}

/// What a snapshot reads as, for qemu-img.
fn of_snapshot(dir: &Path, name: &str) -> Vec<u8> {
    let line = ["convert", "-l", name, "-O", "raw", "a.qcow2", "snap.raw"];
    peer("qemu-img", dir, line);
    std::fs::read(dir.join("snap.raw")).expect("reads")
}

/// qemu-img itself zeroes clusters that a snapshot shares here.
#[test]
fn zero_clusters_of_snapshots_go_with_version_3_and_all_read_as_before() {
    if !requires("qemu-img") {
        return;
    }
    let backing = ["-b", "base.raw", "-F", "raw"];
    for (cluster, backing) in [
        ("cluster_size=64k", &[][..]),
        ("cluster_size=512", &[]),
        ("cluster_size=64k", &backing),
        ("cluster_size=512", &backing),
    ] {
        let dir = scratch();
        let dir = dir.path();
        std::fs::write(dir.join("base.raw"), vec![9; 2 << 20]).expect("writes");
        let line = ["create", "-q", "-f", "qcow2", "-o", cluster];
        peer(
            "qemu-img",
            dir,
            [&line[..], backing, &["a.qcow2", "2M"]].concat(),
        );
        let io = |commands: &[&str]| {
            let mut line = Vec::new();
            commands.iter().for_each(|c| line.extend(["-c", *c]));
            line.push("a.qcow2");
            peer("qemu-io", dir, line);
        };
        // Zero clusters with space and without, shared and not, in tables shared and not.
        io(&["write -P 1 0 512k", "write -z 0 128k", "write -z 1M 64k"]);
        peer("qemu-img", dir, ["snapshot", "-c", "one", "a.qcow2"]);
        io(&["write -P 2 0 64k", "write -z 256k 64k"]);
        peer("qemu-img", dir, ["snapshot", "-c", "two", "a.qcow2"]);
        peer("qemu-img", dir, ["snapshot", "-c", "three", "a.qcow2"]);
        io(&["write -z -u 384k 64k", "write -P 4 1984k 64k"]);
        let before = content(dir);
        let names = ["one", "two", "three"];
        let snapshots = names.map(|name| of_snapshot(dir, name));
        amend(dir, "compat=0.10").success();
        assert_eq!(detail(dir, "compat"), "0.10");
        assert!(content(dir) == before, "{cluster}");
        ours(dir, &["check", "-q", "a.qcow2"]).success();
        for (name, before) in names.iter().zip(&snapshots) {
            assert!(of_snapshot(dir, name) == *before, "{cluster} {name}");
        }
        for (name, before) in names.iter().zip(&snapshots) {
            peer("qemu-img", dir, ["snapshot", "-a", name, "a.qcow2"]);
            assert!(content(dir) == *before, "{cluster} {name}");
            ours(dir, &["snapshot", "-d", name, "a.qcow2"]).success();
            assert!(content(dir) == *before, "{cluster} {name}");
        }
    }
}

#[test]
fn names_of_the_backing_file_and_the_data_file_change() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    ours(dir, &["create", "-q", "base.raw", "1M"]).success();
    ours(dir, &["io", "-q", "-c", "write -P 9 0 1M", "base.raw"]).success();
    peer(
        "qemu-img",
        dir,
        ["create", "-q", "-f", "qcow2", "a.qcow2", "1M"],
    );
    amend(dir, "backing_file=base.raw,backing_fmt=raw").success();
    assert!(content(dir).iter().all(|b| *b == 9));
    amend(dir, "backing_file=").success();
    assert!(content(dir).iter().all(|b| *b == 0));
    let line = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "data_file=d.raw,data_file_raw=on",
    ];
    peer("qemu-img", dir, [&line[..], &["a.qcow2", "1M"]].concat());
    peer("qemu-io", dir, ["-c", "write -P 3 0 1M", "a.qcow2"]);
    std::fs::rename(dir.join("d.raw"), dir.join("e.raw")).expect("moves");
    amend(dir, "data_file=e.raw").success();
    assert!(content(dir).iter().all(|b| *b == 3));
    amend(dir, "data_file_raw=off").success();
    assert_eq!(detail(dir, "data-file-raw"), false);
    assert!(content(dir).iter().all(|b| *b == 3));
}

/// Takes away all extra data of the first snapshot, as old images have it.
fn age_snapshot(path: &Path) {
    let mut bytes = std::fs::read(path).expect("reads");
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight"));
    let at = usize::try_from(word(64)).expect("small");
    let extra = usize::try_from(word(at + 32) & u64::from(u32::MAX)).expect("small");
    assert!(extra >= 16, "{extra}");
    // Identifier and name move to the front, zeroes behind them.
    bytes[at + 36..at + 40].fill(0);
    let tail = at + 40 + extra..at + 40 + extra + 64;
    bytes.copy_within(tail, at + 40);
    std::fs::write(path, bytes).expect("writes");
}

#[test]
fn snapshots_of_old_images_get_what_the_new_version_wants() {
    if !requires("qemu-img") || !requires("qemu-io") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    let create = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "compat=0.10",
        "a.qcow2",
        "1M",
    ];
    peer("qemu-img", dir, create);
    peer("qemu-io", dir, ["-c", "write -P 3 0 100k", "a.qcow2"]);
    peer("qemu-img", dir, ["snapshot", "-c", "old", "a.qcow2"]);
    peer("qemu-io", dir, ["-c", "write -P 4 0 10k", "a.qcow2"]);
    age_snapshot(&dir.join("a.qcow2"));
    let (disk, old) = (content(dir), of_snapshot(dir, "old"));
    ours(dir, &["check", "a.qcow2"]).success();
    amend(dir, "compat=1.1").success();
    ours(dir, &["check", "a.qcow2"]).success();
    peer("qemu-img", dir, ["check", "a.qcow2"]);
    assert!(content(dir) == disk && of_snapshot(dir, "old") == old);
}

#[test]
fn a_crash_while_refcounts_change_leaves_leaks_at_most() {
    if !requires("qemu-img") {
        return;
    }
    let spec = LayerSpec {
        format: "qcow2",
        options: "cluster_size=512",
        size: 200 << 10,
    };
    let disk = Disk::create(Place::Memory, &[spec]);
    let mut chain = disk.open(Access::Write, WriteOrder::Ordered);
    chain.write_at(&[1; 90_000], 20_000).expect("writes");
    chain.flush().expect("flushes");
    let memory = disk.memory()[0].clone();
    let base = memory.to_bytes();
    memory.record();
    let image = chain.top_mut().as_amend().expect("can");
    let values = OptionValues::parse(image.options(), "qcow2", ["refcount_bits=64"]);
    image.amend(&values.expect("valid")).expect("amends");
    chain.close().expect("closes");
    let wanted = read_all(&chain);
    let changes = memory.changes();
    let now = MemoryStorage::from_bytes(&base);
    let dir = scratch();
    let stride = (changes.len() / 60).max(1);
    for (made, change) in changes.iter().enumerate() {
        now.apply(change);
        if made % stride != 0 && made + 3 < changes.len() {
            continue;
        }
        let found = Disk::of_bytes("qcow2", &now.to_bytes());
        let found = found.open(Access::Read, WriteOrder::Ordered);
        assert!(read_all(&found) == wanted, "{made}");
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

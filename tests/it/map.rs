//! `vdtool map`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::Value;

use crate::util::{peer, requires, scratch, vdtool};

fn sparse(path: &Path, runs: u64) {
    let file = File::create(path).expect("can be made");
    for run in 0..runs {
        file.write_all_at(&[1; 65536], run << 18).expect("has room");
    }
    file.set_len(runs << 18).expect("has room");
}

fn map(dir: &Path, arguments: &[&str]) -> Vec<Value> {
    let mut command = vdtool();
    command.current_dir(dir).args(["map", "--output", "json"]);
    let output = command.args(arguments).output().expect("runs");
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).expect("is a list")
}

#[test]
fn extents_of_a_raw_image_are_those_of_qemu_img() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    sparse(&dir.path().join("disk.raw"), 5);
    for range in [&[][..], &["-s", "100k", "-l", "300k"], &["-s", "1M"]] {
        let mut ours = map(dir.path(), &[range, &["disk.raw"]].concat());
        for extent in &mut ours {
            let extent = extent.as_object_mut().expect("is an object");
            let file = extent.shift_remove("filename");
            assert_eq!(file, Some("disk.raw".into()));
        }
        let arguments = ["map", "-f", "raw", "--output", "json", "disk.raw"];
        let text = peer("qemu-img", dir.path(), arguments.iter().chain(range));
        let theirs: Vec<Value> = serde_json::from_str(&text).expect("is a list");
        assert_eq!(ours, theirs, "{range:?}");
    }
}

#[test]
fn extents_cover_the_disk_without_gaps() {
    let dir = scratch();
    sparse(&dir.path().join("disk.raw"), 300);
    let extents = map(dir.path(), &["disk.raw"]);
    let mut end = 0;
    for extent in &extents {
        assert_eq!(extent["start"], end);
        end += extent["length"].as_u64().expect("is a number");
    }
    assert_eq!(end, 300 << 18);
}

#[test]
fn a_range_past_the_end_has_no_extents() {
    let dir = scratch();
    sparse(&dir.path().join("disk.raw"), 1);
    assert_eq!(map(dir.path(), &["-s", "1G", "disk.raw"]), [] as [Value; 0]);
    let tail = map(dir.path(), &["-s", "255k", "-l", "7E", "disk.raw"]);
    assert_eq!(tail.len(), 1);
    assert_eq!(tail[0]["length"], 1024);
}

#[test]
fn extents_name_the_layer_that_has_them() {
    let dir = scratch();
    let lines: [&[&str]; 4] = [
        &["create", "-q", "a.vhd", "10M"],
        &["io", "-q", "-c", "write -P 1 0 2M", "a.vhd"],
        &["create", "-q", "-b", "a.vhd", "-F", "vhd", "b.vhd"],
        &["io", "-q", "-c", "write -P 2 2M 2M", "b.vhd"],
    ];
    for line in lines {
        vdtool().current_dir(&dir).args(line).assert().success();
    }
    let extents = map(dir.path(), &["b.vhd"]);
    let word = |index: usize, key: &str| extents[index][key].clone();
    assert_eq!(extents.len(), 3, "{extents:?}");
    for (index, depth, file, byte) in [(0, 1, "a.vhd", 1), (1, 0, "b.vhd", 2)] {
        assert_eq!(word(index, "depth"), depth);
        assert_eq!(word(index, "filename"), file);
        assert_eq!(word(index, "length"), 2 << 20);
        let host = word(index, "offset").as_u64().expect("is a number");
        let file = File::open(dir.path().join(file)).expect("opens");
        let mut bytes = vec![0; 2 << 20];
        file.read_exact_at(&mut bytes, host).expect("reads");
        assert!(bytes.iter().all(|b| *b == byte));
    }
    assert_eq!(word(2, "zero"), true);
    assert_eq!(word(2, "present"), false);
    assert_eq!(word(2, "offset"), Value::Null);
}

#[test]
fn extents_of_a_vhd_are_those_of_qemu_img() {
    if !requires("qemu-img") || !requires("qemu-io") {
        return;
    }
    let dir = scratch();
    peer(
        "qemu-img",
        dir.path(),
        ["create", "-q", "-f", "vpc", "a.vhd", "20M"],
    );
    let write = [
        "-f",
        "vpc",
        "-c",
        "write -P 1 0 2M",
        "-c",
        "write -P 2 8M 4M",
        "a.vhd",
    ];
    peer("qemu-io", dir.path(), write);
    let text = peer(
        "qemu-img",
        dir.path(),
        ["map", "-f", "vpc", "--output", "json", "a.vhd"],
    );
    let theirs: Vec<Value> = serde_json::from_str(&text).expect("is a list");
    let ours = map(dir.path(), &["a.vhd"]);
    // They split what is stored behind each other at the bitmaps of blocks; starts and states
    // are the same.
    let data = |extents: &[Value]| -> Vec<(u64, u64)> {
        let number = |e: &Value, key: &str| e[key].as_u64().expect("is a number");
        let stored = extents.iter().filter(|e| e["data"] == true);
        stored
            .map(|e| (number(e, "start"), number(e, "offset")))
            .collect()
    };
    assert_eq!(data(&ours), data(&theirs));
}

#[test]
fn extents_of_images_of_several_sizes_are_those_of_qemu_img() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    let works = |arguments: &[&str]| {
        vdtool()
            .current_dir(&dir)
            .args(arguments)
            .assert()
            .success();
    };
    works(&["create", "-q", "base.qcow2", "5M"]);
    works(&["io", "-q", "-c", "write 1M 64k", "base.qcow2"]);
    for (name, below, size) in [
        ("mid.qcow2", "base.qcow2", "3M"),
        ("short.qcow2", "mid.qcow2", "2M"),
        ("top.qcow2", "short.qcow2", "8M"),
    ] {
        works(&["create", "-q", "-b", below, "-F", "qcow2", name, size]);
    }
    works(&["io", "-q", "-c", "write 6M 64k", "top.qcow2"]);
    for image in ["mid.qcow2", "short.qcow2", "top.qcow2"] {
        let mut ours = map(dir.path(), &[image]);
        for extent in &mut ours {
            extent
                .as_object_mut()
                .expect("is an object")
                .shift_remove("filename");
        }
        let text = peer("qemu-img", dir.path(), ["map", "--output", "json", image]);
        let theirs: Vec<Value> = serde_json::from_str(&text).expect("is a list");
        assert_eq!(ours, theirs, "{image}");
    }
}

#[test]
fn an_extent_in_an_external_data_file_names_that_file() {
    let dir = scratch();
    let image = [
        "create",
        "-q",
        "-o",
        "data_file=disk.data",
        "disk.qcow2",
        "1M",
    ];
    vdtool().current_dir(&dir).args(image).assert().success();
    let write = ["io", "-q", "-c", "write 64k 64k", "disk.qcow2"];
    vdtool().current_dir(&dir).args(write).assert().success();
    let extents = map(dir.path(), &["disk.qcow2"]);
    let stored = extents
        .iter()
        .find(|e| e["data"] == true)
        .expect("was written");
    assert_eq!(
        (&stored["filename"], &stored["offset"]),
        (&"disk.data".into(), &65536.into())
    );
    let human = vdtool()
        .current_dir(&dir)
        .args(["map", "disk.qcow2"])
        .output()
        .expect("runs");
    let text = String::from_utf8(human.stdout).expect("is text");
    assert!(
        text.lines()
            .any(|l| l.contains("0x10000 ") && l.ends_with("data       disk.data")),
        "{text}"
    );
}

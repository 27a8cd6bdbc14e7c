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

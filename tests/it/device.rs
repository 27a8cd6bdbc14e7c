//! Block devices as sources and as targets, by loop devices; needs root.

use std::path::Path;
use std::process::Command;

use crate::util::{Seeded, peer, requires, scratch, skipped, vdtool};

const MIB: u64 = 1 << 20;

/// A loop device over a file.
struct Loop(String);

impl Loop {
    /// `None`, with a message, where this host lets us have none.
    fn new(backing: &Path) -> Option<Self> {
        let mut losetup = Command::new("losetup");
        losetup.args(["--find", "--show"]).arg(backing);
        match losetup.output() {
            Ok(done) if done.status.success() => {
                let name = String::from_utf8_lossy(&done.stdout);
                Some(Self(name.trim().to_owned()))
            }
            why => {
                skipped(&format!("no loop device here: {why:?}"));
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

/// A file of `len` bytes of which a third is not zero.
fn disk(path: &Path, len: u64) -> Vec<u8> {
    let mut rng = Seeded::new("device");
    let mut bytes = vec![0; usize::try_from(len).expect("small")];
    for chunk in bytes.chunks_mut(70_001).step_by(3) {
        rng.fill(chunk);
    }
    std::fs::write(path, &bytes).expect("room");
    bytes
}

#[test]
fn a_device_is_written_in_place_and_read_back_whatever_it_held_before() {
    let dir = scratch();
    let (source, backing) = (dir.path().join("source.raw"), dir.path().join("backing"));
    let bytes = disk(&source, 20 * MIB);
    // Zeroes of the source must not let the old content through.
    std::fs::write(&backing, vec![0xaa; 24 << 20]).expect("room");
    let Some(device) = Loop::new(&backing) else {
        return;
    };
    vdtool()
        .args(["convert", "-q", "--verify", "-f", "raw", "-O", "raw"])
        .args([&source, Path::new(&device.0)])
        .assert()
        .success();
    vdtool()
        .args(["convert", "-q", "-f", "raw", "-O", "vhd", &device.0])
        .arg(dir.path().join("back.vhd"))
        .assert()
        .success();
    vdtool()
        .args(["convert", "-q", "-O", "raw"])
        .args([dir.path().join("back.vhd"), dir.path().join("back.raw")])
        .assert()
        .success();
    let back = std::fs::read(dir.path().join("back.raw")).expect("is there");
    assert!(back[..bytes.len()] == bytes, "the disk came back changed");
    assert!(
        back[bytes.len()..].iter().all(|b| *b == 0xaa),
        "what lies past the end of the source was touched"
    );
}

#[test]
fn an_image_format_can_live_on_a_device() {
    let dir = scratch();
    let (source, backing) = (dir.path().join("source.raw"), dir.path().join("backing"));
    disk(&source, 9 * MIB);
    std::fs::write(&backing, vec![0x55; 24 << 20]).expect("room");
    let Some(device) = Loop::new(&backing) else {
        return;
    };
    vdtool()
        .args(["convert", "-q", "-f", "raw", "-O", "qcow2"])
        .args([&source, Path::new(&device.0)])
        .assert()
        .success();
    vdtool()
        .args(["compare", "-f", "raw", "-F", "qcow2"])
        .args([&source, Path::new(&device.0)])
        .assert()
        .success();
    vdtool()
        .args(["check", "-f", "qcow2", &device.0])
        .assert()
        .success();
}

#[test]
fn a_compressed_image_can_live_on_a_device() {
    let dir = scratch();
    let (source, backing) = (dir.path().join("source.raw"), dir.path().join("backing"));
    let bytes = disk(&source, 9 * MIB + 512);
    for (options, threads) in [
        ("compression_type=zlib", "1"),
        ("compression_type=zstd,cluster_size=4k", "4"),
        ("extended_l2=on,cluster_size=2M", "2"),
    ] {
        // What was there before must not show through, in data or in tables.
        std::fs::write(&backing, vec![0xaa; 24 << 20]).expect("room");
        let Some(device) = Loop::new(&backing) else {
            return;
        };
        vdtool()
            .args([
                "convert", "-q", "-c", "--verify", "-j", threads, "-f", "raw",
            ])
            .args(["-O", "qcow2", "-o", options])
            .args([&source, Path::new(&device.0)])
            .assert()
            .success();
        vdtool()
            .args(["check", "-q", "-f", "qcow2", &device.0])
            .assert()
            .success();
        vdtool()
            .args(["convert", "-q", "-f", "qcow2", "-O", "raw", &device.0])
            .arg(dir.path().join("back.raw"))
            .assert()
            .success();
        let back = std::fs::read(dir.path().join("back.raw")).expect("is there");
        assert!(back == bytes, "{options}: the disk came back changed");
        if requires("qemu-img") {
            peer(
                "qemu-img",
                dir.path(),
                ["check", "-q", "-f", "qcow2", &device.0],
            );
            let line = [
                "compare",
                "-f",
                "qcow2",
                "-F",
                "raw",
                &device.0,
                "source.raw",
            ];
            peer("qemu-img", dir.path(), line);
        }
    }
}

#[test]
fn a_device_that_is_too_small_is_refused_and_untouched() {
    let dir = scratch();
    let (source, backing) = (dir.path().join("source.raw"), dir.path().join("backing"));
    disk(&source, 9 * MIB);
    std::fs::write(&backing, vec![0x55; 8 << 20]).expect("room");
    let Some(device) = Loop::new(&backing) else {
        return;
    };
    let output = vdtool()
        .args(["convert", "-q", "-f", "raw", "-O", "raw"])
        .args([&source, Path::new(&device.0)])
        .assert()
        .code(1);
    let text = String::from_utf8_lossy(&output.get_output().stderr).into_owned();
    assert!(
        text.contains(&device.0) && text.lines().count() == 1,
        "{text}"
    );
    vdtool()
        .args(["convert", "-q", "-f", "raw", "-O", "vhd"])
        .args([&source, Path::new(&device.0)])
        .assert()
        .code(63);
    vdtool()
        .args(["resize", "-f", "raw", &device.0, "16M"])
        .assert()
        .failure();
    drop(device);
    let after = std::fs::read(&backing).expect("is there");
    assert!(after.iter().all(|b| *b == 0x55) && after.len() == 8 << 20);
}

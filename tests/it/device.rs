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
        .args(["-o", "subformat=fixed"])
        .args([&source, Path::new(&device.0)])
        .assert()
        .code(1);
    vdtool()
        .args(["resize", "-f", "raw", &device.0, "16M"])
        .assert()
        .failure();
    drop(device);
    let after = std::fs::read(&backing).expect("is there");
    assert!(after.iter().all(|b| *b == 0x55) && after.len() == 8 << 20);
}

/// Runs a line of words about a device, which stands for the word `DEV`.
fn on(device: &Loop, line: &str) -> assert_cmd::assert::Assert {
    let words = line.split_whitespace();
    let words = words.map(|word| if word == "DEV" { &device.0 } else { word });
    vdtool().args(words).assert()
}

fn io(device: &Loop, commands: &[&str]) -> assert_cmd::assert::Assert {
    let mut command = vdtool();
    command.args(["io", "-f", "vhd", "-q"]);
    for text in commands {
        command.args(["-c", text]);
    }
    command.arg(&device.0).assert()
}

/// Both footers are there: the copy at the start, and the one at the end of the device.
fn ends_with_a_footer(backing: &Path) {
    let bytes = std::fs::read(backing).expect("is there");
    let last = &bytes[bytes.len() - 512..];
    assert!(last.starts_with(b"conectix"), "no footer at the end");
}

#[test]
fn a_dynamic_vhd_lives_on_a_device_with_its_footer_at_the_end() {
    let dir = scratch();
    let backing = dir.path().join("backing");
    std::fs::write(&backing, vec![0xaa; 24 << 20]).expect("room");
    let Some(device) = Loop::new(&backing) else {
        return;
    };
    on(&device, "create -q -f vhd DEV 40M").success();
    io(
        &device,
        &[
            "read -P 0 0 40M",
            "write -P 7 20M 64k",
            "write -P 8 1M 4M",
            "read -P 7 20M 64k",
            "read -P 0 20544k 8M",
        ],
    )
    .success();
    on(&device, "check -f vhd DEV").success();
    ends_with_a_footer(&backing);
    on(&device, "resize -q -f vhd DEV +16M").success();
    let at_the_end = ["write -P 9 55M 1M", "read -P 8 1M 4M", "read -P 0 40M 15M"];
    io(&device, &at_the_end).success();
    // What has no room is refused, and what is there stays.
    let full = io(&device, &["write -P 5 24M 20M"]).failure();
    let text = String::from_utf8_lossy(&full.get_output().stderr).into_owned();
    assert!(text.contains("needed"), "{text}");
    let all = ["read -P 9 55M 1M", "read -P 8 1M 4M", "read -P 7 20M 64k"];
    io(&device, &all).success();
    on(&device, "check -f vhd DEV").success();
    on(&device, "resize -q --shrink -f vhd DEV 21M").success();
    io(&device, &["read -P 8 1M 4M", "read -P 7 20M 64k"]).success();
    on(&device, "check -f vhd DEV").success();
    if requires("qemu-io") {
        let line = ["-f", "vpc", "-c", "read -P 7 20M 64k", &device.0];
        let told = peer("qemu-io", dir.path(), line);
        assert!(!told.contains("failed"), "{told}");
    }
    ends_with_a_footer(&backing);
}

#[test]
fn a_vhd_copied_onto_a_larger_device_is_written_behind_its_last_block() {
    let dir = scratch();
    let (file, backing) = (dir.path().join("a.vhd"), dir.path().join("backing"));
    let source = dir.path().join("source.raw");
    disk(&source, 3 * MIB);
    vdtool()
        .args(["convert", "-q", "-f", "raw", "-O", "vhd"])
        .args([&source, &file])
        .assert()
        .success();
    let mut bytes = std::fs::read(&file).expect("is there");
    bytes.resize(24 << 20, 0xaa);
    std::fs::write(&backing, &bytes).expect("room");
    let Some(device) = Loop::new(&backing) else {
        return;
    };
    on(&device, "check -f vhd DEV").code(2);
    let mut compare = vdtool();
    compare.args(["compare", "-q", "-f", "raw", "-F", "vhd"]);
    compare.args([&source, Path::new(&device.0)]);
    compare.assert().success();
    io(&device, &["write -P 6 4k 8k", "read -P 6 4k 8k"]).success();
    // The first write that needed space, or a repair, put the footer where it belongs.
    on(&device, "check -r all -f vhd DEV").success();
    on(&device, "check -r all -f vhd DEV").success();
    ends_with_a_footer(&backing);
    on(&device, "resize -q -f vhd DEV 16M").success();
    io(&device, &["write -P 7 10M 64k", "read -P 7 10M 64k"]).success();
    on(&device, "check -f vhd DEV").success();
    ends_with_a_footer(&backing);
}

#[test]
fn a_fixed_vhd_on_a_device_grows_up_to_the_footer_at_its_end() {
    let dir = scratch();
    let backing = dir.path().join("backing");
    std::fs::write(&backing, vec![0xaa; 12 << 20]).expect("room");
    let Some(device) = Loop::new(&backing) else {
        return;
    };
    on(&device, "create -q -f vhd -o subformat=fixed DEV 12M").code(1);
    on(&device, "create -q -f vhd -o subformat=fixed DEV 8M").success();
    io(&device, &["read -P 0 0 8M", "write -P 7 7M 1M"]).success();
    on(&device, "check -f vhd DEV").success();
    on(&device, "resize -q -f vhd DEV 10M").success();
    io(
        &device,
        &["read -P 7 7M 1M", "read -P 0 8M 2M", "write -P 6 9M 1M"],
    )
    .success();
    on(&device, "resize -q --shrink -f vhd DEV 9M").success();
    on(&device, "resize -q -f vhd DEV 11M").success();
    io(&device, &["read -P 7 7M 1M", "read -P 0 8M 3M"]).success();
    on(&device, "resize -q -f vhd DEV 12M").code(1);
    on(&device, "check -r all -f vhd DEV").success();
    ends_with_a_footer(&backing);
}

#[test]
fn disks_of_every_kind_are_converted_onto_devices_and_back() {
    let dir = scratch();
    let (source, backing) = (dir.path().join("source.raw"), dir.path().join("backing"));
    let base = dir.path().join("base.vhd");
    disk(&source, 9 * MIB + 512);
    std::fs::write(&backing, vec![0xaa; 24 << 20]).expect("room");
    let Some(device) = Loop::new(&backing) else {
        return;
    };
    let name = Path::new(&device.0);
    for options in ["subformat=dynamic", "block_size=512k", "subformat=fixed"] {
        vdtool()
            .args(["convert", "-q", "--verify", "-f", "raw", "-O", "vhd"])
            .args(["-o", options])
            .args([&source, name])
            .assert()
            .success();
        on(&device, "check -q -f vhd DEV").success();
        ends_with_a_footer(&backing);
        vdtool()
            .args(["compare", "-q", "-f", "raw", "-F", "vhd"])
            .args([&source, name])
            .assert()
            .success();
    }
    // A child on the device, of a parent in a file.
    vdtool()
        .args(["convert", "-q", "-f", "raw", "-O", "vhd"])
        .args([&source, &base])
        .assert()
        .success();
    vdtool()
        .args(["create", "-q", "-f", "vhd", "-F", "vhd", "-b"])
        .args([&base, name])
        .assert()
        .success();
    let open = ["--allow-ref", "any"];
    vdtool()
        .args(["io", "-q", "-f", "vhd"])
        .args(open)
        .args(["-c", "write -P 7 1000 70000", "-c", "read -P 7 1000 70000"])
        .arg(name)
        .assert()
        .success();
    vdtool()
        .args(["check", "-q", "-f", "vhd"])
        .args(open)
        .arg(name)
        .assert()
        .success();
    vdtool()
        .args(["commit", "-q", "-f", "vhd"])
        .args(open)
        .arg(name)
        .assert()
        .success();
    vdtool()
        .args(["io", "-q", "-c", "read -P 7 1000 70000"])
        .arg(&base)
        .assert()
        .success();
    ends_with_a_footer(&backing);
}

#[test]
fn a_loop_device_over_a_file_of_the_disk_is_no_target() {
    let dir = scratch();
    let run = |line: &[&str]| vdtool().current_dir(&dir).args(line).assert();
    run(&["create", "-q", "-f", "qcow2", "base.qcow2", "1M"]).success();
    run(&["io", "-c", "write -q -P 5 0 64k", "base.qcow2"]).success();
    let child = ["-b", "base.qcow2", "-F", "qcow2", "top.qcow2"];
    run(&[&["create", "-q", "-f", "qcow2"][..], &child].concat()).success();
    let base = dir.path().join("base.qcow2");
    let before = std::fs::read(&base).expect("reads");
    let Some(device) = Loop::new(&base) else {
        return;
    };
    let name = device.0.as_str();
    let overlay = ["serve", "--nbd", "unix:s", "--overlay", name, "top.qcow2"];
    let lines: [&[&str]; 6] = [
        &["convert", "-O", "raw", "top.qcow2", name],
        &["convert", "-O", "qcow2", "top.qcow2", name],
        &["convert", "-n", "-O", "raw", "top.qcow2", name],
        &[
            "create",
            "-f",
            "raw",
            "-b",
            "top.qcow2",
            "-F",
            "qcow2",
            name,
        ],
        &["dd", "-O", "raw", "if=top.qcow2", &format!("of={name}")],
        &overlay,
    ];
    for line in lines {
        let done = run(line).failure();
        let text = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
        assert!(!text.is_empty(), "{line:?}");
        assert_eq!(before, std::fs::read(&base).expect("reads"), "{line:?}");
    }
    let refused = run(lines[0]).failure();
    let text = String::from_utf8_lossy(&refused.get_output().stderr).into_owned();
    assert!(text.contains("in use here"), "{text}");
    // The other way round: the file whose bytes the source has.
    let taken = run(&["convert", "-f", "raw", "-O", "raw", name, "base.qcow2"]);
    taken.failure();
    assert_eq!(before, std::fs::read(&base).expect("reads"));
    // Another one is as good a target as any.
    let other = dir.path().join("other.raw");
    std::fs::write(&other, vec![0; 1 << 20]).expect("has room");
    let Some(free) = Loop::new(&other) else {
        return;
    };
    run(&["convert", "-n", "-O", "raw", "top.qcow2", &free.0]).success();
}

#[test]
fn an_image_on_a_device_goes_into_its_base_and_is_not_removed() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).to_str().expect("is text").to_owned();
    // Elsewhere: in their directory it would be another image over the base.
    let elsewhere = scratch();
    let file = elsewhere.path().join("device");
    std::fs::write(&file, vec![0; 16 << 20]).expect("writes");
    let Some(device) = Loop::new(&file) else {
        return;
    };
    let (base, top, middle) = (path("base"), path("top"), &*device.0);
    let run = |line: &[&str]| vdtool().args(line).assert();
    let any = ["--allow-ref", "any"];
    run(&["create", "-q", "-f", "qcow2", &base, "8M"]).success();
    for (below, above) in [(&*base, middle), (middle, &*top)] {
        let line = [
            "create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", above,
        ];
        run(&[&line[..], &any].concat()).success();
    }
    let write = ["io", "-q", "-c", "write -P 5 1M 64k", middle];
    run(&[&write[..], &any].concat()).success();
    let line = ["commit", "-q", "-b", &base, "--children", &top];
    let removes = [&line[..], &["--remove", middle], &any].concat();
    let said = run(&removes).code(63).get_output().stderr.clone();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(
        said.contains("is no file, which could be removed"),
        "{said}"
    );
    run(&["io", "-q", "-r", "-c", "read -P 0 1M 64k", &base]).success();
    run(&[&line[..], &[middle], &any].concat()).success();
    for file in [&base, &top] {
        run(&["io", "-q", "-r", "-c", "read -P 5 1M 64k", file]).success();
    }
    let read = ["io", "-q", "-r", "-c", "read -P 5 1M 64k", middle];
    run(&[&read[..], &any].concat()).success();
}

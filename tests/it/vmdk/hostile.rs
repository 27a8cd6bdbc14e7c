//! Descriptors, headers and tables that nobody made in good faith: one line, nothing opened, no raw.

use std::fs;
use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

use crate::layers::LayerSpec;
use crate::mutate::{Expect, Sample};
use crate::util::{scratch, vdtool};
use crate::vmdk::{SECTOR, descriptor, ends, patch, quad};

#[test]
fn descriptors_open_nothing_that_the_user_did_not_point_at() {
    let scratch = scratch();
    let dir = scratch.path().join("images");
    fs::create_dir(&dir).expect("makes");
    fs::write(scratch.path().join("secret"), [7; 4096]).expect("writes");
    symlink("../secret", dir.join("link")).expect("links");
    rustix::fs::mkfifoat(rustix::fs::CWD, dir.join("pipe"), 0o600.into()).expect("makes");
    for (name, part) in [
        ("../secret", "allow"),
        ("/etc/passwd", "allow"),
        ("link", "allow"),
        ("/dev/null", "allow"),
        ("nbd://host/x", "servers are asked"),
        ("pipe", "is a pipe"),
        (".", "is a directory"),
        ("a.vmdk", "itself"),
        ("nobody", "which is not there"),
    ] {
        for kind in ["FLAT", "SPARSE", "VMFSSPARSE", "SESPARSE"] {
            let line = format!("RW 8 {kind} \"{name}\" 0");
            fs::write(dir.join("a.vmdk"), descriptor(&[&line])).expect("writes");
            let text = ends(&dir, &["convert", "a.vmdk", "out.raw"], 1);
            assert!(text.contains(part), "{name}: {text}");
            assert!(text.contains("extent 0"), "{name}: {text}");
            // What it is can be said all the same.
            ends(&dir, &["info", "a.vmdk"], 0);
        }
    }
    assert!(!dir.join("out.raw").exists());
    let text = descriptor(&["RW 8 FLAT \"../secret\" 0"]);
    fs::write(dir.join("a.vmdk"), text).expect("writes");
    ends(
        &dir,
        &[
            "convert",
            "-q",
            "--allow-ref",
            "../secret",
            "a.vmdk",
            "out.raw",
        ],
        0,
    );
    assert_eq!(fs::read(dir.join("out.raw")).expect("reads"), [7; 4096]);
}

#[test]
fn descriptors_that_cannot_be_right_are_refused_in_one_line_at_once() {
    let scratch = scratch();
    let dir = scratch.path();
    fs::write(dir.join("flat"), [7; 4096]).expect("writes");
    let flat = "RW 8 FLAT \"flat\" 0\n";
    let head = "# Disk DescriptorFile\nversion=1\nCID=1\n";
    let many = flat.repeat(100_000);
    let long = format!("x={}\n{flat}", "y".repeat(1 << 20));
    let wide: Vec<u8> = head.bytes().flat_map(|b| [b, 0]).collect();
    for (what, text, code) in [
        ("line 4", format!("{head}RW 8 FLAT flat 0\n{flat}"), 1),
        ("line 5", format!("{head}{flat}RX 8 FLAT \"flat\" 0\n"), 1),
        (
            "no number of sectors",
            format!("{head}RW -8 FLAT \"flat\" 0\n"),
            1,
        ),
        (
            "2^63",
            format!("{head}RW 18014398509481983 ZERO\nRW 18014398509481983 ZERO\n"),
            1,
        ),
        ("no extent", head.to_owned(), 1),
        ("longer than", format!("{head}{many}"), 1),
        ("4096 extents", format!("{head}{}", flat.repeat(5000)), 1),
        ("longer than", format!("{head}{long}"), 1),
        ("raw device", format!("{head}RW 8 VMFSRDM \"flat\"\n"), 63),
        (
            "raw device",
            format!("{head}createType=\"vmfsPassthroughRawDeviceMap\"\n{flat}"),
            63,
        ),
        (
            "encrypted",
            format!("{head}encryption.keySafe=\"x\"\n{flat}"),
            63,
        ),
        (
            "version '4'",
            format!("#Disk DescriptorFile\nversion=4\n{flat}"),
            63,
        ),
        (
            "hexadecimal",
            format!("# Disk DescriptorFile\nversion=1\nCID=xyz\n{flat}"),
            1,
        ),
        ("UTF-16", String::from_utf8(wide).expect("is UTF-8"), 63),
    ] {
        fs::write(dir.join("a.vmdk"), &text).expect("writes");
        let start = Instant::now();
        let said = ends(dir, &["convert", "a.vmdk", "out.raw"], code);
        assert!(said.contains(what), "{what}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(start.elapsed() < Duration::from_secs(10), "{what}");
        assert!(!dir.join("out.raw").exists());
    }
}

#[test]
fn headers_that_cannot_be_right_are_refused_by_the_name_of_the_field() {
    let scratch = scratch();
    let dir = scratch.path();
    ends(dir, &["create", "-q", "-f", "vmdk", "good.vmdk", "100M"], 0);
    ends(dir, &["io", "-c", "write -P 7 0 64k", "good.vmdk"], 0);
    let good = fs::read(dir.join("good.vmdk")).expect("reads");
    let quad_of = |value: u64| value.to_le_bytes().to_vec();
    let word_of = |value: u32| value.to_le_bytes().to_vec();
    for (what, at, new) in [
        ("version", 4, word_of(4)),
        ("version", 4, word_of(0)),
        ("flags", 8, word_of(3 | 1 << 16)),
        ("flags", 8, word_of(3 | 1 << 20)),
        ("capacity", 12, quad_of(1 << 63)),
        ("capacity", 12, quad_of(1 << 52)),
        ("grain size", 20, quad_of(0)),
        ("grain size", 20, quad_of(100)),
        ("grain size", 20, quad_of(1 << 40)),
        ("descriptor", 28, quad_of(u64::MAX)),
        ("descriptor", 36, quad_of(1 << 50)),
        ("entries in a grain table", 44, word_of(0)),
        ("entries in a grain table", 44, word_of(1 << 31)),
        ("grain directory", 48, quad_of(u64::MAX)),
        ("grain directory", 56, quad_of(u64::MAX)),
        ("grain directory", 56, quad_of(0)),
        ("grain directory", 56, quad_of(1 << 40)),
        ("first sector of data", 64, quad_of(1 << 40)),
        ("as text", 73, vec![b'\r']),
        ("compression", 77, vec![2]),
        ("incomplete", 0, b"kdmv".to_vec()),
    ] {
        fs::write(dir.join("a.vmdk"), &good).expect("writes");
        patch(&dir.join("a.vmdk"), at, &new);
        for arguments in [&["convert", "a.vmdk", "out.raw"][..], &["info", "a.vmdk"]] {
            let done = vdtool().current_dir(dir).args(arguments).assert();
            let said = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
            assert!(said.contains(what), "{what}: {said}");
        }
        assert!(!dir.join("out.raw").exists());
    }
    // A right magic with nothing behind it is no raw disk.
    for head in [
        &b"KDMV"[..],
        b"COWD and more",
        &0xcafe_babe_u64.to_le_bytes(),
    ] {
        fs::write(dir.join("a.vmdk"), head).expect("writes");
        let done = vdtool()
            .current_dir(dir)
            .args(["convert", "a.vmdk", "out.raw"])
            .assert();
        assert!(!done.get_output().status.success());
    }
}

#[test]
fn entries_that_lead_out_of_the_file_are_errors_and_never_zeroes() {
    let scratch = scratch();
    let dir = scratch.path();
    ends(dir, &["create", "-q", "-f", "vmdk", "good.vmdk", "100M"], 0);
    ends(dir, &["io", "-c", "write -P 7 0 64k", "good.vmdk"], 0);
    let good = fs::read(dir.join("good.vmdk")).expect("reads");
    let directory = usize::try_from(quad(&good, 56)).expect("small") * SECTOR;
    let table = crate::vmdk::word(&good, directory) as usize * SECTOR;
    for (what, at, new) in [
        ("entry 0 of the grain directory", directory, 0xffff_u32),
        ("entry 0 of the grain directory", directory, 1),
        ("grain 0", table, 0xff_ffff),
        ("grain 0", table, 1),
        ("grain 0", table, 3),
    ] {
        fs::write(dir.join("a.vmdk"), &good).expect("writes");
        patch(&dir.join("a.vmdk"), at, &new.to_le_bytes());
        let said = ends(dir, &["convert", "a.vmdk", "out.raw"], 1);
        assert!(said.contains(what), "{what}: {said}");
        let said = ends(dir, &["io", "-c", "write 0 512", "a.vmdk"], 1);
        assert!(said.contains("check -r all"), "{said}");
    }
}

fn sample(options: &'static str) -> Sample {
    let spec = LayerSpec {
        format: "vmdk",
        options,
        size: 128 << 10,
    };
    Sample::new(options, &[spec])
}

#[test]
fn any_byte_of_the_metadata_may_be_anything() {
    let sample = sample("grain_size=8k,zeroed_grain=on");
    let overhead = usize::try_from(quad(&sample.bytes, 64)).expect("small") * SECTOR;
    sample.flip(0..80, Expect::Any);
    sample.flip(SECTOR..SECTOR + 500, Expect::Any);
    sample.flip(21 * SECTOR..21 * SECTOR + 8, Expect::Any);
    let directory = usize::try_from(quad(&sample.bytes, 56)).expect("small") * SECTOR;
    sample.flip(directory..directory + 8, Expect::Any);
    sample.flip(directory + SECTOR..directory + SECTOR + 64, Expect::Any);
    sample.cut(&[0..100, 500..520, overhead - 3..overhead]);
}

//! Peers as judges: qemu-img and qemu-io, and libvhdi; each test is skipped where its peer is not
//! installed.

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::util::{Seeded, assert_same, peer, python, requires, rounds, scratch, vdtool};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Runs vdtool in `directory`; it must succeed.
pub(crate) fn run(directory: &Path, arguments: &[&str]) -> String {
    let done = vdtool()
        .current_dir(directory)
        .args(arguments)
        .assert()
        .success();
    String::from_utf8_lossy(&done.get_output().stdout).into_owned()
}

/// A write of one byte value.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pattern {
    byte: u8,
    at: u64,
    len: u64,
}

/// Writes here and there in a disk of `size` bytes, in whole sectors, as both tools take them.
pub(crate) fn patterns(rng: &mut Seeded, size: u64) -> Vec<Pattern> {
    let pattern = |_| {
        let at = rng.u64(0..size / 512) * 512;
        let longest = [8 * KIB, 64 * KIB, 3 * MIB][rng.usize(..3)];
        Pattern {
            byte: rng.u8(1..),
            at,
            len: (rng.u64(1..=longest / 512) * 512).min(size - at),
        }
    };
    let mut patterns: Vec<Pattern> = (0..12).map(pattern).collect();
    // The first and the last sector are where tools err.
    for at in [0, size - 512] {
        patterns.push(Pattern {
            byte: 0xf1,
            at,
            len: 512,
        });
    }
    patterns
}

/// The patterns as arguments of qemu-io and of `vdtool io`, which take the same.
pub(crate) fn as_commands(patterns: &[Pattern]) -> Vec<String> {
    let command = |p: &Pattern| format!("write -P {:#x} {} {}", p.byte, p.at, p.len);
    let commands = patterns.iter().map(command);
    commands.flat_map(|c| ["-c".to_owned(), c]).collect()
}

pub(crate) fn apply(patterns: &[Pattern], disk: &mut [u8]) {
    for p in patterns {
        let (start, end) = (as_len(p.at), as_len(p.at + p.len));
        disk[start..end].fill(p.byte);
    }
}

fn as_len(value: u64) -> usize {
    crate::util::len(value)
}

fn qemu_io(directory: &Path, file: &str, patterns: &[Pattern]) {
    let mut arguments = vec!["-f".to_owned(), "vpc".to_owned()];
    arguments.extend(as_commands(patterns));
    arguments.push(file.to_owned());
    let output = peer("qemu-io", directory, arguments);
    assert!(!output.contains("failed"), "{output}");
}

/// The disk in `file` as qemu-img reads it.
fn qemu_reads(directory: &Path, file: &str) -> Vec<u8> {
    let raw = format!("{file}.by-qemu");
    peer(
        "qemu-img",
        directory,
        ["convert", "-f", "vpc", "-O", "raw", file, &raw],
    );
    fs::read(directory.join(raw)).expect("reads")
}

/// The disk in `file` as vdtool reads it.
fn we_read(directory: &Path, file: &str) -> Vec<u8> {
    let raw = format!("{file}.by-us");
    run(
        directory,
        &["convert", "-f", "vhd", "-O", "raw", file, &raw],
    );
    fs::read(directory.join(raw)).expect("reads")
}

/// A raw file with data, zeroes and holes.
fn some_raw(path: &Path, rng: &mut Seeded, size: u64) -> Vec<u8> {
    let mut bytes = vec![0; as_len(size)];
    apply(&patterns(rng, size), &mut bytes);
    let noise = rng.bytes(300_000);
    let at = rng.usize(..bytes.len() - noise.len());
    bytes[at..at + noise.len()].copy_from_slice(&noise);
    fs::write(path, &bytes).expect("writes");
    bytes
}

#[test]
fn vhds_made_by_qemu_read_as_qemu_reads_them() {
    if !requires("qemu-img") || !requires("qemu-io") {
        return;
    }
    let mut rng = Seeded::new("from qemu");
    let directory = scratch();
    let directory = directory.path();
    for subformat in ["dynamic", "fixed"] {
        for force_size in ["on", "off"] {
            for size in [10 * MIB, 37 * MIB + 11 * 512] {
                let file = format!("{subformat}-{force_size}-{size}.vhd");
                let options = format!("subformat={subformat},force_size={force_size}");
                let asked = size.to_string();
                let create = ["create", "-f", "vpc", "-o", &options, &file, &asked];
                peer("qemu-img", directory, create);
                qemu_io(directory, &file, &patterns(&mut rng, size));
                let found = we_read(directory, &file);
                assert_same(&found, &qemu_reads(directory, &file), 0, &file);
                run(directory, &["check", &file]);
            }
        }
    }
}

#[test]
fn vhds_made_by_us_read_right_by_qemu() {
    if !requires("qemu-img") {
        return;
    }
    let mut rng = Seeded::new("to qemu");
    let directory = scratch();
    let directory = directory.path();
    let cases = [
        ("", 21 * MIB + 512),
        ("subformat=dynamic", 4 * MIB),
        ("subformat=dynamic,block_size=512k", 9 * MIB + 512),
        ("subformat=fixed", 5 * MIB + 512),
        ("profile=azure", 6 * MIB),
    ];
    for (options, size) in cases {
        let expected = some_raw(&directory.join("source.raw"), &mut rng, size);
        let mut arguments = vec!["convert", "-O", "vhd"];
        if !options.is_empty() {
            arguments.extend(["-o", options]);
        }
        arguments.extend(["source.raw", "ours.vhd"]);
        run(directory, &arguments);
        let what = format!("'{options}'");
        assert_same(&qemu_reads(directory, "ours.vhd"), &expected, 0, &what);
        let info = ["info", "-f", "vpc", "--output", "json", "ours.vhd"];
        let info: Value = serde_json::from_str(&peer("qemu-img", directory, info)).expect("JSON");
        assert_eq!(info["virtual-size"], size, "{what}");
        assert_same(&we_read(directory, "ours.vhd"), &expected, 0, &what);
        run(directory, &["check", "ours.vhd"]);
        run(directory, &["compare", "source.raw", "ours.vhd"]);
    }
}

#[test]
fn qemu_and_we_can_write_one_vhd_in_turn() {
    if !requires("qemu-img") || !requires("qemu-io") {
        return;
    }
    let mut rng = Seeded::new("in turn");
    let directory = scratch();
    let directory = directory.path();
    let size = 16 * MIB;
    let by_us = |file: &str, options: &str| {
        let asked = size.to_string();
        run(
            directory,
            &["create", "-f", "vhd", "-o", options, file, &asked],
        );
    };
    by_us("dynamic.vhd", "subformat=dynamic");
    by_us("blocks.vhd", "subformat=dynamic,block_size=1M");
    by_us("fixed.vhd", "subformat=fixed");
    let create = "create -f vpc -o force_size=on qemu.vhd 16M";
    peer("qemu-img", directory, create.split(' '));
    for file in ["dynamic.vhd", "blocks.vhd", "fixed.vhd", "qemu.vhd"] {
        let mut expected = vec![0; as_len(size)];
        for _ in 0..rounds(3) {
            let theirs = patterns(&mut rng, size);
            qemu_io(directory, file, &theirs);
            apply(&theirs, &mut expected);
            let ours = patterns(&mut rng, size);
            let commands = as_commands(&ours);
            let mut arguments = vec!["io", "-f", "vhd"];
            arguments.extend(commands.iter().map(String::as_str));
            arguments.push(file);
            run(directory, &arguments);
            apply(&ours, &mut expected);
            run(directory, &["check", "-f", "vhd", file]);
        }
        assert_same(&qemu_reads(directory, file), &expected, 0, file);
        assert_same(&we_read(directory, file), &expected, 0, file);
    }
}

/// QEMU ignores sector bitmaps when it reads, so what we discard and zero must be zero for it too.
#[test]
fn what_we_zero_and_discard_is_zero_for_qemu() {
    if !requires("qemu-img") {
        return;
    }
    let directory = scratch();
    let directory = directory.path();
    run(directory, &["create", "-f", "vhd", "x.vhd", "8M"]);
    let commands = [
        "write -P 0x55 0 8M",
        "write -z 1000 3000",
        "write -z -u 1M 3M",
        "discard 6M 1M",
        "discard 5k 100k",
        "write -P 0x66 2M 700",
    ];
    let mut arguments = vec!["io"];
    arguments.extend(commands.iter().flat_map(|c| ["-c", c]));
    arguments.push("x.vhd");
    run(directory, &arguments);
    let ours = we_read(directory, "x.vhd");
    assert_same(&ours, &qemu_reads(directory, "x.vhd"), 0, "x.vhd");
    let mut expected = vec![0x55; as_len(8 * MIB)];
    expected[1000..4000].fill(0);
    expected[as_len(MIB)..as_len(4 * MIB)].fill(0);
    expected[as_len(2 * MIB)..as_len(2 * MIB) + 700].fill(0x66);
    for (at, (found, before)) in ours.iter().zip(&expected).enumerate() {
        let discarded = (as_len(6 * MIB)..as_len(7 * MIB)).contains(&at)
            || (as_len(5 * KIB)..as_len(105 * KIB)).contains(&at);
        assert!(found == before || (discarded && *found == 0), "at {at:#x}");
    }
}

#[test]
fn an_image_that_qemu_has_open_is_not_opened_and_neither_the_other_way_round() {
    if !requires("qemu-img") || !requires("qemu-io") {
        return;
    }
    let directory = scratch();
    let directory = directory.path();
    run(directory, &["create", "-f", "vhd", "x.vhd", "4M"]);
    let mut holder = hold(
        Command::new("qemu-io").args(["-f", "vpc", "x.vhd"]),
        directory,
    );
    for command in [
        vec!["io", "-c", "write 0 512", "x.vhd"],
        vec!["resize", "x.vhd", "+1M"],
        vec!["convert", "x.vhd", "y.raw"],
        vec!["convert", "-O", "vhd", "y.raw", "x.vhd"],
    ] {
        fs::write(directory.join("y.raw"), [1; 512]).expect("writes");
        let refused = vdtool().current_dir(directory).args(&command).assert();
        let refused = refused.failure().code(1);
        let text = String::from_utf8_lossy(&refused.get_output().stderr).into_owned();
        assert_eq!(text.lines().count(), 1, "{command:?}: {text}");
    }
    run(directory, &["info", "-U", "x.vhd"]);
    end(&mut holder);
    let ours = env!("CARGO_BIN_EXE_vdtool");
    let mut holder = hold(Command::new(ours).args(["io", "x.vhd"]), directory);
    let refused = Command::new("qemu-io")
        .args(["-f", "vpc", "-c", "write 0 512", "x.vhd"])
        .current_dir(directory)
        .output()
        .expect("qemu-io starts");
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(text.contains("lock"), "{text}");
    end(&mut holder);
    qemu_io(directory, "x.vhd", &[]);
}

/// Starts a process that holds the image named in `command` open until `end`.
fn hold(command: &mut Command, directory: &Path) -> std::process::Child {
    let mut child = command
        .current_dir(directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    // Once a command was answered the image is open.
    let input = child.stdin.as_mut().expect("piped");
    input
        .write_all(b"read 0 512\n")
        .expect("it reads its input");
    input.flush().expect("it reads its input");
    let output = BufReader::new(child.stdout.as_mut().expect("piped"));
    let answered = |line: &std::io::Result<String>| line.as_ref().is_ok_and(|l| l.contains("512"));
    let found = output.lines().any(|line| answered(&line));
    assert!(found, "it answers");
    child
}

fn end(child: &mut std::process::Child) {
    drop(child.stdin.take());
    child.wait().expect("it ends");
}

/// Reads the disk of a chain of files, top first, by libvhdi.
const READ_BY_LIBVHDI: &str = "\
import sys, pyvhdi
files = []
for name in sys.argv[2:]:
    file = pyvhdi.file()
    file.open(name)
    files.append(file)
for child, parent in zip(files, files[1:]):
    child.set_parent(parent)
with open(sys.argv[1], 'wb') as out:
    left = files[0].get_media_size()
    while left:
        data = files[0].read_buffer(min(left, 1 << 20))
        assert data, 'no data'
        out.write(data)
        left -= len(data)
";

fn libvhdi_reads(python: &str, directory: &Path, chain: &[&str]) -> Vec<u8> {
    let mut arguments = vec!["-c", READ_BY_LIBVHDI, "by-libvhdi.raw"];
    arguments.extend(chain);
    peer(python, directory, arguments);
    fs::read(directory.join("by-libvhdi.raw")).expect("reads")
}

#[test]
fn vhds_made_by_us_read_right_by_libvhdi() {
    let Some(python) = python("pyvhdi") else {
        return;
    };
    let mut rng = Seeded::new("to libvhdi");
    let directory = scratch();
    let directory = directory.path();
    for (options, size) in [
        ("subformat=dynamic", 9 * MIB + 512),
        ("subformat=dynamic,block_size=512k", 3 * MIB),
        ("subformat=fixed", 5 * MIB),
    ] {
        let expected = some_raw(&directory.join("source.raw"), &mut rng, size);
        let convert = ["convert", "-O", "vhd", "-o", options];
        run(
            directory,
            &[&convert[..], &["source.raw", "x.vhd"]].concat(),
        );
        let found = libvhdi_reads(&python, directory, &["x.vhd"]);
        assert_same(&found, &expected, 0, options);
    }
}

#[test]
fn differencing_vhds_made_by_us_read_right_by_libvhdi() {
    let Some(python) = python("pyvhdi") else {
        return;
    };
    let mut rng = Seeded::new("chain to libvhdi");
    let directory = scratch();
    let directory = directory.path();
    let size = 7 * MIB;
    let mut expected = some_raw(&directory.join("source.raw"), &mut rng, size);
    run(directory, &["convert", "source.raw", "base.vhd"]);
    for (child, parent) in [("middle.vhd", "base.vhd"), ("top.vhd", "middle.vhd")] {
        run(directory, &["create", "-f", "vhd", "-b", parent, child]);
        let mut written = patterns(&mut rng, size);
        // libvhdi 20210425 reads zeroes for sectors that are not there where one before them in
        // the same byte of the bitmap is.
        for pattern in &mut written {
            let end = (pattern.at + pattern.len).next_multiple_of(8 * 512);
            pattern.at = pattern.at / 4096 * 4096;
            pattern.len = end - pattern.at;
        }
        let commands = as_commands(&written);
        let mut arguments = vec!["io"];
        arguments.extend(commands.iter().map(String::as_str));
        arguments.push(child);
        run(directory, &arguments);
        apply(&written, &mut expected);
    }
    let chain = ["top.vhd", "middle.vhd", "base.vhd"];
    assert_same(&we_read(directory, "top.vhd"), &expected, 0, "by us");
    let found = libvhdi_reads(&python, directory, &chain);
    assert_same(&found, &expected, 0, "by libvhdi");
}

#[test]
fn libvhdi_sees_the_size_the_type_and_the_parent_of_our_images() {
    if !requires("vhdiinfo") {
        return;
    }
    let directory = scratch();
    let directory = directory.path();
    run(directory, &["create", "-f", "vhd", "base.vhd", "10M"]);
    run(
        directory,
        &["create", "-f", "vhd", "-b", "base.vhd", "child.vhd"],
    );
    let fixed = ["create", "-f", "vhd", "-o", "subformat=fixed"];
    run(directory, &[&fixed[..], &["fixed.vhd", "10M"]].concat());
    let mut all = String::new();
    for (file, kind) in [
        ("base.vhd", "Dynamic"),
        ("child.vhd", "Differential"),
        ("fixed.vhd", "Fixed"),
    ] {
        let text = peer("vhdiinfo", directory, [file]);
        assert!(text.contains("10485760 bytes"), "{text}");
        assert!(text.contains(kind), "{text}");
        let _ = writeln!(all, "{text}");
    }
    assert!(all.contains("base.vhd"), "the parent's name: {all}");
}

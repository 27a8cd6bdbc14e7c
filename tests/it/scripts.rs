//! What scripts written for QEMU's tools type, and what they find then.

use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::util::{Seeded, peer, requires, scratch, skipped, vdtool};

const BINARY: &str = env!("CARGO_BIN_EXE_vdtool");
const MIB: usize = 1 << 20;

fn run(dir: &Path, line: &[&str]) -> assert_cmd::assert::Assert {
    vdtool().current_dir(dir).args(line).assert()
}

fn works(dir: &Path, line: &[&str]) -> String {
    let output = run(dir, line).success().get_output().stdout.clone();
    String::from_utf8(output).expect("is text")
}

fn fails(dir: &Path, line: &[&str], code: i32, part: &str) {
    let output = run(dir, line).code(code).get_output().stderr.clone();
    let text = String::from_utf8(output).expect("is text");
    assert!(text.contains(part), "{line:?}: {text}");
    assert_eq!(text.lines().count(), 1, "{line:?}: {text}");
}

/// What a disk reads as.
fn content(dir: &Path, file: &str) -> Vec<u8> {
    works(dir, &["convert", "-q", "-O", "raw", file, "content.raw"]);
    fs::read(dir.join("content.raw")).expect("reads")
}

/// What `info` says, as data.
fn info(dir: &Path, file: &str) -> Value {
    let text = works(dir, &["info", "--output", "json", file]);
    serde_json::from_str(&text).expect("is JSON")
}

/// A raw disk of random bytes.
fn random(dir: &Path, name: &str, len: usize) -> Vec<u8> {
    let bytes = Seeded::new(name).bytes(len);
    fs::write(dir.join(name), &bytes).expect("writes");
    bytes
}

#[test]
fn dd_copies_blocks_of_a_disk_into_a_new_image() {
    let scratch = scratch();
    let dir = scratch.path();
    let bytes = random(dir, "a.raw", 3 * MIB);
    works(dir, &["convert", "a.raw", "a.qcow2"]);
    let cases = [
        ("", 0..3 * MIB),
        ("count=3", 0..1536),
        ("bs=64k count=2", 0..128 << 10),
        ("bs=1M skip=2", 2 * MIB..3 * MIB),
        ("bs=1000 count=10 skip=7", 7000..17_000),
        ("bs=1M count=9 skip=1", MIB..3 * MIB),
        ("bs=1M skip=3", 0..0),
    ];
    for (operands, part) in cases {
        let mut line = vec!["dd", "if=a.qcow2", "of=new.raw"];
        line.extend(operands.split_whitespace());
        let done = run(dir, &line).success();
        assert!(done.get_output().stdout.is_empty() && done.get_output().stderr.is_empty());
        let found = fs::read(dir.join("new.raw")).expect("reads");
        assert!(found == bytes[part], "{operands}");
    }
    let done = run(dir, &["dd", "bs=1M", "skip=4", "if=a.qcow2", "of=new.raw"]);
    let text = String::from_utf8_lossy(&done.success().get_output().stderr).into_owned();
    assert!(text.contains("cannot skip to specified offset"), "{text}");
    assert_eq!(
        fs::metadata(dir.join("new.raw")).expect("is there").len(),
        0
    );
    works(
        dir,
        &[
            "dd",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "bs=1M",
            "count=1",
            "if=a.qcow2",
            "of=b.img",
        ],
    );
    assert_eq!(info(dir, "b.img")["format"], "qcow2");
    for (operands, part) in [
        ("if=a.raw", "of=OUTPUT"),
        ("of=new.raw", "if=INPUT"),
        ("if=a.raw of=new.raw seek=1", "'seek'"),
        ("if=a.raw of=new.raw bs=0", "'bs'"),
        ("if=a.raw of=new.raw count=x", "'count'"),
    ] {
        let mut line = vec!["dd"];
        line.extend(operands.split_whitespace());
        fails(dir, &line, 2, part);
    }
    fails(dir, &["dd", "if=a.raw", "of=./a.raw"], 1, "a.raw");
    let name = std::ffi::OsStr::from_bytes(b"of=\xff.raw");
    let mut command = vdtool();
    command
        .current_dir(dir)
        .args(["dd", "count=1", "if=a.raw"])
        .arg(name);
    command.assert().success();
    assert!(dir.join(std::ffi::OsStr::from_bytes(b"\xff.raw")).exists());
    assert!(fs::read(dir.join("a.raw")).expect("reads") == bytes);
}

#[test]
fn dd_makes_the_image_that_qemu_img_makes() {
    if !requires("qemu-img") {
        return;
    }
    let scratch = scratch();
    let dir = scratch.path();
    random(dir, "a.raw", 2 * MIB + 512);
    for operands in [
        "",
        "bs=1M count=1",
        "count=7",
        "bs=1M skip=1",
        "bs=3M",
        "bs=1024 skip=2000",
    ] {
        let words = ["dd", "-f", "raw", "-O", "raw", "if=a.raw"];
        let line = |of| {
            words
                .into_iter()
                .chain([of])
                .chain(operands.split_whitespace())
        };
        peer("qemu-img", dir, line("of=theirs.raw"));
        works(dir, &line("of=ours.raw").collect::<Vec<_>>());
        let read = |name: &str| fs::read(dir.join(name)).expect("reads");
        assert!(read("ours.raw") == read("theirs.raw"), "{operands}");
    }
}

#[test]
fn bench_says_what_it_does_in_the_words_of_qemu_img_and_does_that_many_requests() {
    let scratch = scratch();
    let dir = scratch.path();
    works(dir, &["create", "-q", "a.qcow2", "1M"]);
    let text = works(dir, &["bench", "-c", "50", "-d", "3", "a.qcow2"]);
    let mut lines = text.lines();
    assert_eq!(
        lines.next(),
        Some(
            "Sending 50 read requests, 4096 bytes each, 3 in parallel (starting at offset 0, \
             step size 4096)"
        )
    );
    let last = lines.next().expect("a second line");
    assert!(last.starts_with("Run completed in 0."), "{last}");
    assert!(last.ends_with(" seconds."), "{last}");
    assert_eq!(lines.next(), None);
    // Each at a place of its own: 16 of 4 KiB, 8 KiB apart, from 64 KiB on.
    for (drain, word) in [(None, ""), (Some("--no-drain"), "asynchronous ")] {
        let mut line = vec![
            "bench",
            "-w",
            "--pattern",
            "7",
            "-c",
            "16",
            "-d",
            "4",
            "-o",
            "64k",
        ];
        line.extend(["-S", "8k", "--flush-interval", "4"]);
        line.extend(drain);
        line.push("a.qcow2");
        let text = works(dir, &line);
        let flush = format!("Sending {word}flush every 4 requests");
        assert_eq!(text.lines().nth(1), Some(flush.as_str()), "{text}");
        let found = content(dir, "a.qcow2");
        for (index, page) in found.chunks(4096).enumerate() {
            let written = (16..48).contains(&index) && index.is_multiple_of(2);
            assert!(
                page.iter().all(|b| *b == if written { 7 } else { 0 }),
                "{index}"
            );
        }
    }
    assert_eq!(works(dir, &["bench", "-q", "-c", "1", "a.qcow2"]), "");
    works(dir, &["check", "-q", "a.qcow2"]);
    for (line, code, part) in [
        (
            "bench --flush-interval 10 -c 1 a.qcow2",
            2,
            "only available in write tests",
        ),
        (
            "bench -w --flush-interval 2 -d 4 a.qcow2",
            2,
            "--flush-interval is 2",
        ),
        ("bench -d 0 a.qcow2", 2, "--depth"),
        ("bench -c 0 a.qcow2", 2, "--count"),
        ("bench -s 0 a.qcow2", 2, "--buffer-size"),
        ("bench -s 2M -c 1 a.qcow2", 1, "request 0"),
        ("bench -o 1M -c 1 a.qcow2", 1, "past the end of the disk"),
        ("bench -w -U -c 1 a.qcow2", 2, "-U"),
        ("bench -i none a.qcow2", 2, "io_uring"),
    ] {
        let words: Vec<&str> = line.split_whitespace().skip(1).collect();
        let done = run(dir, &[&["bench"][..], &words].concat()).code(code);
        let text = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
        assert!(text.contains(part), "{line}: {text}");
    }
}

#[test]
fn a_benchmark_goes_round_the_disk_however_small_it_is() {
    let scratch = scratch();
    let dir = scratch.path();
    fs::write(dir.join("a.raw"), [1; 10_000]).expect("writes");
    works(
        dir,
        &["bench", "-c", "1000", "-d", "7", "-S", "512", "a.raw"],
    );
    works(
        dir,
        &[
            "bench", "-c", "100", "-s", "10000", "-i", "io_uring", "-n", "a.raw",
        ],
    );
    works(
        dir,
        &[
            "bench",
            "-w",
            "-c",
            "64",
            "-d",
            "64",
            "--flush-interval",
            "64",
            "a.raw",
        ],
    );
    assert_eq!(
        fs::metadata(dir.join("a.raw")).expect("is there").len(),
        10_000
    );
}

/// `base.qcow2` under `top.qcow2` of `size`, and a source that differs from the base in places.
fn overlay(dir: &Path, size: &str) -> Vec<u8> {
    let base = random(dir, "base.raw", 2 * MIB);
    works(dir, &["convert", "base.raw", "base.qcow2"]);
    works(
        dir,
        &[
            "create",
            "-q",
            "-b",
            "base.qcow2",
            "-F",
            "qcow2",
            "top.qcow2",
            size,
        ],
    );
    let mut source = base;
    source[100_000..100_100].fill(1);
    source[MIB..MIB + 70_000].fill(0);
    fs::write(dir.join("source.raw"), &source).expect("writes");
    source
}

#[test]
fn convert_into_an_image_that_exists_writes_what_differs_where_its_backing_image_is_named() {
    for compress in [None, Some("-c")] {
        let scratch = scratch();
        let dir = scratch.path();
        let source = overlay(dir, "3M");
        // What it has of its own already is not what the source has, and past its end it stays.
        let write = "write -P 5 1500k 4k";
        let end = "write -P 6 2047k 3k";
        works(dir, &["io", "-q", "-c", write, "-c", end, "top.qcow2"]);
        let mut line = vec!["convert", "-n", "-B", "base.qcow2", "-O", "qcow2"];
        line.extend(compress);
        line.extend(["source.raw", "top.qcow2"]);
        works(dir, &line);
        let mut wanted = source;
        wanted.resize(3 * MIB, 0);
        wanted[2 * MIB..2 * MIB + 2048].fill(6);
        assert!(content(dir, "top.qcow2") == wanted, "{compress:?}");
        works(dir, &["check", "-q", "top.qcow2"]);
        let map = works(dir, &["map", "--output", "json", "top.qcow2"]);
        let map: Value = serde_json::from_str(&map).expect("is JSON");
        let own = map.as_array().expect("a list").iter();
        let own: u64 = own
            .filter(|e| e["depth"] == 0 && e["start"].as_u64() < Some(2 << 20))
            .filter_map(|e| e["length"].as_u64())
            .sum();
        assert!(own <= 6 * 65_536, "only what differs: {map}");
    }
}

#[test]
fn convert_into_an_image_with_another_backing_image_than_the_one_named_is_refused() {
    let scratch = scratch();
    let dir = scratch.path();
    overlay(dir, "2M");
    let before = fs::read(dir.join("top.qcow2")).expect("reads");
    let convert = |more: &[&'static str]| [&["convert", "-n", "-O", "qcow2"], more].concat();
    fails(
        dir,
        &convert(&["-B", "base.raw", "source.raw", "top.qcow2"]),
        1,
        "base.qcow2",
    );
    fails(
        dir,
        &convert(&["-F", "raw", "source.raw", "top.qcow2"]),
        2,
        "-B",
    );
    let zero = [
        "--target-is-zero",
        "-B",
        "base.qcow2",
        "source.raw",
        "top.qcow2",
    ];
    fails(dir, &convert(&zero), 2, "--target-is-zero");
    works(dir, &["create", "-q", "alone.qcow2", "2M"]);
    fails(
        dir,
        &convert(&["-B", "base.qcow2", "source.raw", "alone.qcow2"]),
        1,
        "none",
    );
    assert!(fs::read(dir.join("top.qcow2")).expect("reads") == before);
}

#[test]
fn rebase_compresses_what_it_copies() {
    let scratch = scratch();
    let dir = scratch.path();
    let bytes = (0..2 << 20).map(|index: u32| (index / 1000).to_le_bytes()[0]);
    let mut base: Vec<u8> = bytes.collect();
    fs::write(dir.join("base.raw"), &base).expect("writes");
    let make = ["create", "-q", "-b", "base.raw", "-F", "raw", "top.qcow2"];
    works(dir, &make);
    works(dir, &["io", "-q", "-c", "write -P 9 70k 3k", "top.qcow2"]);
    base[70 << 10..73 << 10].fill(9);
    works(dir, &["rebase", "-c", "-b", "", "top.qcow2"]);
    assert!(content(dir, "top.qcow2") == base);
    let map = works(dir, &["map", "--output", "json", "top.qcow2"]);
    let map: Value = serde_json::from_str(&map).expect("is JSON");
    let packed = map.as_array().expect("a list").iter();
    let packed: u64 = packed
        .filter(|e| e["compressed"] == true)
        .filter_map(|e| e["length"].as_u64())
        .sum();
    // All but the cluster that was there.
    assert_eq!(packed, (2 << 20) - 65_536, "{map}");
    assert!(fs::metadata(dir.join("top.qcow2")).expect("is there").len() < 1 << 20);
    works(dir, &["check", "-q", "top.qcow2"]);
    works(dir, &["create", "-q", "-f", "vhd", "a.vhd", "2M"]);
    works(
        dir,
        &[
            "create", "-q", "-f", "vhd", "-b", "a.vhd", "-F", "vhd", "b.vhd",
        ],
    );
    fails(dir, &["rebase", "-c", "-b", "", "b.vhd"], 63, "b.vhd");
    fails(
        dir,
        &["rebase", "-c", "-u", "-b", "", "top.qcow2"],
        2,
        "--unsafe",
    );
}

#[test]
fn amend_makes_a_disk_larger_and_not_smaller() {
    let scratch = scratch();
    let dir = scratch.path();
    // What the backing image has past the old end must not show.
    let bytes = random(dir, "base.raw", 2 * MIB);
    let make = [
        "create",
        "-q",
        "-b",
        "base.raw",
        "-F",
        "raw",
        "top.qcow2",
        "1M",
    ];
    works(dir, &make);
    works(
        dir,
        &["amend", "-o", "size=2M,lazy_refcounts=on", "top.qcow2"],
    );
    let found = content(dir, "top.qcow2");
    assert!(found[..MIB] == bytes[..MIB] && found[MIB..].iter().all(|b| *b == 0));
    assert_eq!(found.len(), 2 * MIB);
    assert_eq!(
        info(dir, "top.qcow2")["format-specific"]["data"]["lazy-refcounts"],
        true
    );
    works(dir, &["amend", "-o", "size=2M", "top.qcow2"]);
    fails(
        dir,
        &["amend", "-o", "size=1M", "top.qcow2"],
        1,
        "resize --shrink",
    );
    fails(dir, &["amend", "-o", "size=x", "top.qcow2"], 2, "'size'");
    let both = "size=1M,lazy_refcounts=off";
    fails(dir, &["amend", "-o", both, "top.qcow2"], 1, "2097152");
    assert_eq!(
        info(dir, "top.qcow2")["format-specific"]["data"]["lazy-refcounts"],
        true
    );
    assert!(works(dir, &["amend", "-o", "help", "top.qcow2"]).contains("\nsize "));
    works(dir, &["check", "-q", "top.qcow2"]);
}

#[test]
fn amend_takes_the_name_of_a_data_file_away_and_gives_one_again() {
    let scratch = scratch();
    let dir = scratch.path();
    works(
        dir,
        &["create", "-q", "-o", "data_file=a.raw", "a.qcow2", "1M"],
    );
    works(dir, &["io", "-q", "-c", "write -P 3 0 1M", "a.qcow2"]);
    fs::rename(dir.join("a.raw"), dir.join("b.raw")).expect("renames");
    works(dir, &["amend", "-o", "data_file=", "a.qcow2"]);
    fails(dir, &["map", "a.qcow2"], 1, "does not name it");
    works(dir, &["amend", "-o", "data_file=b.raw", "a.qcow2"]);
    assert!(content(dir, "a.qcow2").iter().all(|b| *b == 3));
}

#[test]
fn what_is_read_from_below_is_kept_where_that_is_asked_for() {
    let scratch = scratch();
    let dir = scratch.path();
    let mut bytes = random(dir, "base.raw", MIB);
    bytes[256 << 10..384 << 10].fill(0);
    fs::write(dir.join("base.raw"), &bytes).expect("writes");
    let make = ["create", "-q", "-b", "base.raw", "-F", "raw", "top.qcow2"];
    works(dir, &make);
    let read = ["-c", "read 100k 1k", "-c", "read 200k 300k"];
    let line = [&["io", "-q", "-C"][..], &read, &["top.qcow2"]].concat();
    works(dir, &line);
    // Without its backing image it has what was read, in whole clusters.
    let alloc = works(dir, &["io", "-c", "alloc 0 1M", "top.qcow2"]);
    assert!(alloc.starts_with("393216/1048576 "), "{alloc}");
    works(dir, &["rebase", "-u", "-b", "", "top.qcow2"]);
    let found = content(dir, "top.qcow2");
    for kept in [64 << 10..128 << 10, 192 << 10..512 << 10] {
        assert!(found[kept.clone()] == bytes[kept]);
    }
    assert!(found[..64 << 10].iter().all(|b| *b == 0));
    assert!(found[512 << 10..].iter().all(|b| *b == 0));
    works(dir, &["check", "-q", "top.qcow2"]);
    fails(
        dir,
        &["io", "-C", "-r", "-c", "read 0 1k", "top.qcow2"],
        2,
        "--copy-on-read",
    );
    let open = ["io", "-c", "open -C -r top.qcow2"];
    fails(dir, &open, 1, "-C/--copy-on-read");
    works(
        dir,
        &[
            "io",
            "-q",
            "-c",
            "open -C -i threads top.qcow2",
            "-c",
            "read 0 1k",
        ],
    );
}

#[test]
fn a_write_takes_its_bytes_from_a_pipe_or_a_device() {
    let scratch = scratch();
    let dir = scratch.path();
    fs::write(dir.join("a.raw"), [9; 4096]).expect("writes");
    peer("mkfifo", dir, ["pipe"]);
    let path = dir.join("pipe");
    let writer = std::thread::spawn(move || {
        let mut pipe = fs::File::options().write(true).open(path).expect("opens");
        for part in [b"abc", b"def"] {
            pipe.write_all(part).expect("writes");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    });
    works(
        dir,
        &[
            "io",
            "-q",
            "-c",
            "write -s pipe 0 1k",
            "-c",
            "write -s /dev/zero 2k 1k",
            "a.raw",
        ],
    );
    writer.join().expect("writes all");
    let found = fs::read(dir.join("a.raw")).expect("reads");
    let wanted: Vec<u8> = b"abcdef".iter().copied().cycle().take(1024).collect();
    assert_eq!(found[..1024], wanted);
    assert_eq!(found[1024..2048], [9; 1024]);
    assert_eq!(found[2048..3072], [0; 1024]);
    fails(
        dir,
        &["io", "-c", "write -s /dev/null 0 1k", "a.raw"],
        1,
        "/dev/null: is empty",
    );
    // A range that is wrong is told of before a pipe is waited for.
    fails(
        dir,
        &["io", "-c", "write -s pipe 1G 1k", "a.raw"],
        1,
        "past the end",
    );
}

#[test]
fn a_size_is_given_once_or_the_same_twice() {
    let scratch = scratch();
    let dir = scratch.path();
    works(dir, &["create", "-q", "-o", "size=1M", "a.raw", "1024k"]);
    fails(
        dir,
        &["create", "-q", "-o", "size=2M", "b.raw", "1M"],
        2,
        "'size' is 2097152",
    );
    assert!(!dir.join("b.raw").exists());
    works(dir, &["create", "-q", "c.raw", "1024.0b"]);
    assert_eq!(
        fs::metadata(dir.join("c.raw")).expect("is there").len(),
        1024
    );
}

#[test]
fn an_image_of_a_format_without_snapshots_lists_none() {
    let scratch = scratch();
    let dir = scratch.path();
    fs::write(dir.join("a.raw"), [1; 512]).expect("writes");
    assert_eq!(works(dir, &["snapshot", "-l", "a.raw"]), "");
    assert_eq!(
        works(dir, &["snapshot", "-l", "--output", "json", "a.raw"]),
        "[]\n"
    );
    fails(
        dir,
        &["snapshot", "-c", "x", "a.raw"],
        63,
        "internal snapshots",
    );
}

#[test]
fn hints_about_the_file_are_given_to_the_host_or_the_user_hears_that_they_were_not() {
    let scratch = scratch();
    let dir = scratch.path();
    fs::write(dir.join("source.raw"), [1; 512]).expect("writes");
    for (line, size) in [
        (
            &["create", "-o", "extent_size_hint=1M", "a.raw", "1M"][..],
            1 << 20,
        ),
        (
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                "extent_size_hint=1M",
                "a.raw",
                "1M",
            ],
            0,
        ),
        (
            &[
                "convert",
                "-O",
                "raw",
                "-o",
                "extent_size_hint=64k,nocow=off",
                "source.raw",
                "a.raw",
            ],
            512,
        ),
    ] {
        let done = run(dir, line).success();
        let text = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
        // Where the host took it, nobody need hear of it.
        let is_told = text.contains("warning: a.raw: option 'extent_size_hint' has no effect");
        assert!(text.is_empty() || is_told, "{text}");
        if !is_told && requires("xfs_io") {
            let has = peer("xfs_io", dir, ["-r", "-c", "extsize", "a.raw"]);
            assert!(!has.contains("[0]"), "{has}");
        }
        if line.contains(&"-o") && line[0] == "create" && line[1] == "-o" {
            let said = String::from_utf8_lossy(&done.get_output().stdout).into_owned();
            assert!(said.contains(" extent_size_hint=1048576"), "{said}");
        }
        if size > 0 {
            assert_eq!(
                fs::metadata(dir.join("a.raw")).expect("is there").len(),
                size
            );
        }
        fs::remove_file(dir.join("a.raw")).expect("removes");
    }
    let done = run(dir, &["create", "-q", "-o", "nocow=on", "n.raw", "1M"]).success();
    let text = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
    let is_told = text.contains("warning: n.raw: option 'nocow' has no effect");
    if !is_told && requires("lsattr") {
        let has = peer("lsattr", dir, ["n.raw"]);
        let flags = has.split(' ').next().unwrap_or_default();
        assert!(flags.contains('C'), "{has}: {text}");
    }
    // 0 is no hint.
    let done = run(
        dir,
        &["create", "-q", "-o", "extent_size_hint=0", "a.raw", "1M"],
    );
    done.success().stderr("");
    let stream = [
        "convert",
        "-O",
        "qcow2",
        "-o",
        "extent_size_hint=1M",
        "source.raw",
        "-",
    ];
    fails(dir, &stream, 2, "stdout");
    for (option, part) in [
        ("extent_size_hint=5G", "4294967295"),
        ("extent_size_hint=x", "'extent_size_hint'"),
        ("nocow=perhaps", "on|off"),
    ] {
        fails(dir, &["create", "-o", option, "b.raw", "1M"], 2, part);
        fails(
            dir,
            &["convert", "-O", "raw", "-o", option, "source.raw", "b.raw"],
            2,
            part,
        );
    }
    assert!(!dir.join("b.raw").exists());
    assert!(works(dir, &["create", "-f", "raw", "-o", "help"]).contains("extent_size_hint"));
}

#[test]
fn the_way_the_host_is_asked_is_accepted_as_qemus_tools_have_it() {
    let scratch = scratch();
    let dir = scratch.path();
    fs::write(dir.join("a.raw"), [1; 512]).expect("writes");
    for mode in ["threads", "native", "io_uring"] {
        works(
            dir,
            &["io", "-q", "--aio", mode, "-c", "read 0 512", "a.raw"],
        );
    }
    fails(
        dir,
        &["io", "--aio", "fast", "-c", "read 0 512", "a.raw"],
        2,
        "io_uring",
    );
    fails(
        dir,
        &["serve", "--aio", "fast", "--nbd", "unix:s", "a.raw"],
        2,
        "io_uring",
    );
}

/// Marks a qcow2 image as encrypted; with LUKS, gives it the header of a volume, made here.
fn encrypt(path: &Path, method: u32) {
    let file = fs::File::options().write(true).open(path).expect("opens");
    let put = |bytes: &[u8], at: u64| file.write_all_at(bytes, at).expect("writes");
    put(&method.to_be_bytes(), 32);
    if method != 2 {
        return;
    }
    let at: u64 = 1 << 20;
    let mut extension = 0x0537_be77_u32.to_be_bytes().to_vec();
    extension.extend(16u32.to_be_bytes());
    extension.extend(at.to_be_bytes());
    extension.extend(0x20_0000u64.to_be_bytes());
    extension.extend([0; 8]);
    put(&extension, 112);
    let mut luks = vec![0; 592];
    luks[..8].copy_from_slice(b"LUKS\xba\xbe\0\x01");
    for (at, text) in [(8, "aes"), (40, "xts-plain64"), (72, "sha256")] {
        luks[at..at + text.len()].copy_from_slice(text.as_bytes());
    }
    let uuid = b"272ba454-c947-44c9-86bb-8efb2b56ad3f";
    luks[168..168 + uuid.len()].copy_from_slice(uuid);
    let mut word = |at: usize, value: u32| luks[at..at + 4].copy_from_slice(&value.to_be_bytes());
    word(104, 4040);
    word(108, 64);
    word(164, 9792);
    for slot in 0..8 {
        let at = 208 + slot * 48;
        word(at, if slot == 0 { 0x00ac_71f3 } else { 0xdead });
        word(at + 4, 1000);
        word(at + 40, 8);
        word(at + 44, 4000);
    }
    put(&luks, at);
}

#[test]
fn an_encrypted_image_is_described_and_its_content_is_refused() {
    let scratch = scratch();
    let dir = scratch.path();
    for (method, format) in [(1, "aes"), (2, "luks")] {
        works(dir, &["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
        encrypt(&dir.join("a.qcow2"), method);
        let found = info(dir, "a.qcow2");
        assert_eq!(found["encrypted"], true, "{found}");
        assert_eq!(found["virtual-size"], 1 << 20);
        let described = &found["format-specific"]["data"]["encrypt"];
        assert_eq!(described["format"], format, "{found}");
        if method == 2 {
            assert_eq!(described["cipher-alg"], "aes-256");
            assert_eq!(described["cipher-mode"], "xts");
            assert_eq!(described["ivgen-alg"], "plain64");
            assert_eq!(described["uuid"], "272ba454-c947-44c9-86bb-8efb2b56ad3f");
            assert_eq!(described["slots"][0]["active"], true);
            assert_eq!(described["slots"][1]["active"], false);
            assert_eq!(described["payload-offset"], 4040 * 512);
        }
        assert!(works(dir, &["info", "a.qcow2"]).contains("encrypted:"));
        works(
            dir,
            &[
                "create", "-q", "-u", "-b", "a.qcow2", "-F", "qcow2", "b.qcow2", "1M",
            ],
        );
        let chain = works(
            dir,
            &["info", "--backing-chain", "--output", "json", "b.qcow2"],
        );
        let chain: Value = serde_json::from_str(&chain).expect("is JSON");
        assert_eq!(chain[1]["encrypted"], true);
        let before = fs::read(dir.join("a.qcow2")).expect("reads");
        for line in [
            &["convert", "a.qcow2", "x.raw"][..],
            &["convert", "b.qcow2", "x.raw"],
            &["map", "a.qcow2"],
            &["io", "-c", "read 0 512", "a.qcow2"],
            &["resize", "a.qcow2", "2M"],
            &["commit", "b.qcow2"],
            &["create", "-b", "a.qcow2", "-F", "qcow2", "c.qcow2"],
        ] {
            let word = if method == 1 { "AES" } else { "LUKS" };
            fails(dir, line, 63, &format!("encrypted with {word}"));
        }
        assert!(fs::read(dir.join("a.qcow2")).expect("reads") == before);
    }
}

#[test]
fn an_encrypted_image_is_described_as_qemu_img_does() {
    if !requires("qemu-img") {
        return;
    }
    let scratch = scratch();
    let dir = scratch.path();
    for format in ["luks", "aes"] {
        let options = format!("encrypt.format={format},encrypt.key-secret=s");
        let options = match format {
            "luks" => format!("{options},encrypt.iter-time=10"),
            _ => options,
        };
        let secret = "secret,id=s,data=words";
        let line = [
            "create", "-q", "-f", "qcow2", "--object", secret, "-o", &options, "a.qcow2", "1M",
        ];
        let made = std::process::Command::new("qemu-img")
            .current_dir(dir)
            .args(line)
            .status();
        if !made.is_ok_and(|s| s.success()) {
            crate::util::skipped("this qemu-img makes no encrypted images");
            return;
        }
        let theirs = peer("qemu-img", dir, ["info", "--output", "json", "a.qcow2"]);
        let theirs: Value = serde_json::from_str(&theirs).expect("is JSON");
        let ours = info(dir, "a.qcow2");
        assert_eq!(ours["encrypted"], theirs["encrypted"]);
        let encrypt = |v: &Value| v["format-specific"]["data"]["encrypt"].clone();
        assert_eq!(encrypt(&ours), encrypt(&theirs));
    }
}

#[test]
fn options_that_only_qemu_img_has_a_use_for_are_accepted_or_refused_by_name() {
    let scratch = scratch();
    let dir = scratch.path();
    fs::write(dir.join("base.raw"), [1; 512]).expect("writes");
    works(
        dir,
        &["create", "-q", "-o", "encryption=off", "a.qcow2", "512"],
    );
    for option in ["encryption", "encryption=on", "encrypt.format=luks"] {
        fails(
            dir,
            &["create", "-f", "qcow2", "-o", option, "b.qcow2", "1M"],
            63,
            option,
        );
        fails(
            dir,
            &["convert", "-o", option, "base.raw", "b.qcow2"],
            63,
            option,
        );
    }
    assert!(!dir.join("b.qcow2").exists());
    works(dir, &["amend", "--force", "-o", "compat=1.1", "a.qcow2"]);
    let rebase = [
        "rebase",
        "-u",
        "-b",
        "base.raw",
        "--backing-format",
        "raw",
        "a.qcow2",
    ];
    works(dir, &rebase);
    let convert = [
        "convert",
        "-B",
        "base.raw",
        "--backing-format",
        "raw",
        "base.raw",
        "c.qcow2",
    ];
    run(dir, &convert).success().stderr("");
    works(dir, &["convert", "--progress", "base.raw", "d.qcow2"]);
}

#[test]
fn a_word_that_says_nothing_about_the_image_is_refused_and_named() {
    let scratch = scratch();
    let dir = scratch.path();
    works(dir, &["create", "-q", "a.qcow2", "1M"]);
    works(
        dir,
        &["create", "-q", "-b", "a.qcow2", "-F", "qcow2", "b.qcow2"],
    );
    fails(
        dir,
        &["create", "-F", "qcow2", "c.qcow2", "1M"],
        2,
        "-b, which is missing",
    );
    fails(
        dir,
        &["amend", "-o", "backing_fmt=foo", "b.qcow2"],
        2,
        "'backing_fmt': foo: unknown",
    );
    fails(
        dir,
        &["amend", "-o", "backing_fmt=qed", "b.qcow2"],
        63,
        "'qed'",
    );
    fails(
        dir,
        &["rebase", "-b", "b.qcow2", "-F", "qcow2", "b.qcow2"],
        1,
        "is the image itself",
    );
    assert!(!dir.join("c.qcow2").exists());
}

#[test]
fn an_identity_that_the_host_has_no_random_bytes_for_is_an_error_and_nothing_is_made() {
    let scratch = scratch();
    let dir = scratch.path();
    if !requires("strace") {
        return;
    }
    fs::write(dir.join("a.raw"), [1; 512]).expect("writes");
    fs::write(dir.join("old.vhd"), "old").expect("writes");
    for line in ["create -q new.vhd 1M", "convert a.raw old.vhd"] {
        // As an old kernel in a container without /dev has it.
        let mut command = Command::new("strace");
        command.args(["-f", "-o", "/dev/null", "-P", "/dev/urandom", "-P"]);
        command.args(["/dev/random", "-e", "inject=openat:error=ENOENT", "-e"]);
        command.args(["inject=getrandom:error=ENOSYS", BINARY]);
        let output = command.current_dir(dir).args(line.split(' ')).output();
        let output = output.expect("runs");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        if text.contains("ptrace") {
            return skipped("strace may not trace here");
        }
        assert_eq!(output.status.code(), Some(1), "{line}: {text}");
        let name = line.split(' ').find(|word| word.ends_with(".vhd"));
        let begin = format!(
            "vdtool: {}: cannot get random bytes",
            name.expect("has one")
        );
        assert!(text.starts_with(&begin), "{text}");
    }
    assert_eq!(fs::read(dir.join("old.vhd")).expect("reads"), b"old");
    assert!(!dir.join("new.vhd").exists());
}

#[test]
fn a_file_that_may_not_become_longer_fails_the_write_and_ends_nothing() {
    let scratch = scratch();
    let dir = scratch.path();
    if !requires("prlimit") {
        return;
    }
    works(dir, &["create", "-q", "a.qcow2", "4M"]);
    works(dir, &["io", "-c", "write -P 1 0 64k", "a.qcow2"]);
    for line in [
        &["snapshot", "-c", "s", "a.qcow2"][..],
        &["bitmap", "--add", "a.qcow2", "b"],
        &["io", "-c", "write -P 1 0 64k", "a.qcow2"],
    ] {
        let mut command = Command::new("prlimit");
        // The file is longer, and takes no more changes past that.
        command.args(["--fsize=100000", BINARY]).args(line);
        let output = command.current_dir(dir).output().expect("runs");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{line:?}: {text}");
        assert!(text.starts_with("vdtool: a.qcow2: "), "{line:?}: {text}");
        let check = run(dir, &["check", "a.qcow2"]).get_output().status.code();
        assert!(matches!(check, Some(0 | 3)), "{line:?}: {check:?}");
        works(dir, &["check", "-q", "-r", "leaks", "a.qcow2"]);
        works(dir, &["io", "-c", "read -P 1 0 64k", "a.qcow2"]);
    }
}

#[test]
fn what_a_device_that_is_full_was_not_told_is_an_error() {
    let scratch = scratch();
    let dir = scratch.path();
    for line in [&["--version"][..], &["help"], &["create", "--help"]] {
        let full = fs::File::create("/dev/full").expect("opens");
        let mut command = Command::new(BINARY);
        let child = command
            .args(line)
            .current_dir(dir)
            .stdout(full)
            .stderr(Stdio::piped());
        let output = child.output().expect("runs");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{line:?}");
        assert!(
            text.contains("standard output: No space"),
            "{line:?}: {text}"
        );
    }
}

#[test]
fn options_are_typed_as_getopt_and_qemu_img_have_them() {
    let scratch = scratch();
    let dir = scratch.path();
    // As much of a long option as names it.
    works(dir, &["create", "--quie", "--form", "qcow2", "a", "1M"]);
    assert_eq!(info(dir, "a")["format"], "qcow2");
    fails(
        dir,
        &["convert", "--sou", "none", "a", "b.raw"],
        2,
        "'--sou'",
    );
    // Words for yes and no.
    for (word, is) in [("y", true), ("n", false), ("yes", true), ("false", false)] {
        let option = format!("lazy_refcounts={word}");
        works(
            dir,
            &["create", "-q", "-f", "qcow2", "-o", &option, "a", "1M"],
        );
        assert_eq!(
            info(dir, "a")["format-specific"]["data"]["lazy-refcounts"],
            is
        );
    }
    works(
        dir,
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "encryption=n",
            "a",
            "1M",
        ],
    );
    // Help, wherever it is asked for, makes nothing.
    for options in ["help", "compat=1.1,help", "?", "help,compat=1.1"] {
        let text = works(
            dir,
            &["create", "-f", "qcow2", "-o", options, "no.qcow2", "1M"],
        );
        assert!(text.starts_with("Options of format 'qcow2':"), "{text}");
        works(
            dir,
            &["convert", "-O", "qcow2", "-o", options, "a", "no.qcow2"],
        );
        works(dir, &["measure", "-O", "qcow2", "-o", options, "a"]);
        works(dir, &["amend", "-o", options, "a"]);
    }
    fails(
        dir,
        &[
            "create",
            "-f",
            "qcow2",
            "-o",
            "compat=help",
            "no.qcow2",
            "1M",
        ],
        2,
        "'help'",
    );
    run(dir, &["create", "-o", "help"]).success().stderr("");
    run(dir, &["convert", "-o", "help"]).success().stderr("");
    assert!(!dir.join("no.qcow2").exists());
    // What is not there is refused by its name, by every command.
    let secret = "secret,id=s,data=x";
    for line in [
        &["create", "--object", secret, "no.qcow2", "1M"][..],
        &["info", "--object", secret, "a"],
        &["measure", "--object", secret, "--size", "1M"],
        &["convert", "--object", secret, "a", "no.raw"],
    ] {
        fails(dir, line, 2, "--object is not supported");
    }
    fails(
        dir,
        &["measure", "--image-opts", "--size", "1M"],
        2,
        "--image-opts is not",
    );
    assert!(!dir.join("no.qcow2").exists());
    // A rate of nothing is none.
    fs::write(dir.join("s.raw"), vec![7; MIB]).expect("writes");
    works(dir, &["convert", "-r", "0", "s.raw", "t.raw"]);
    let piped = run(dir, &["convert", "-r", "0", "-O", "raw", "s.raw", "-"]).success();
    assert_eq!(piped.get_output().stdout, vec![7; MIB]);
    assert_eq!(fs::read(dir.join("t.raw")).expect("reads"), vec![7; MIB]);
}

#[test]
fn one_thing_is_done_with_snapshots_at_a_time() {
    let scratch = scratch();
    let dir = scratch.path();
    works(dir, &["create", "-q", "a.qcow2", "1M"]);
    for twice in [
        ["-c", "a", "-c", "b"],
        ["-c", "a", "-d", "b"],
        ["-d", "a", "-d", "b"],
    ] {
        let line = [&["snapshot"][..], &twice, &["a.qcow2"]].concat();
        fails(dir, &line, 2, "cannot be used");
    }
    assert!(info(dir, "a.qcow2").get("snapshots").is_none());
}

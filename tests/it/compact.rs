//! `compact`: what is held for nothing is given back, and the disk stays what it is.

use std::path::Path;

use serde_json::Value;

use crate::crash::Act::{Close, Compact, Discard, Flush, Write, Zero};
use crate::crash::{Act, Session};
use crate::layers::{LayerSpec, Place, filled};
use crate::util::{Seeded, peer, requires, scratch, vdtool};

const SIZE: u64 = 24 * 4096;

fn spec(format: &'static str, options: &'static str) -> LayerSpec {
    LayerSpec {
        format,
        options,
        size: SIZE,
    }
}

/// Formats that can be compacted, small, and some over others.
const DISKS: [&[(&str, &str)]; 9] = [
    &[("vdi", "block_size=4k")],
    &[("vdi", "block_size=16k"), ("vdi", "block_size=4k")],
    &[("vhd", "block_size=4k")],
    &[("vhd", "block_size=16k")],
    &[("vhd", "block_size=4k"), ("raw", "")],
    &[("qcow2", "cluster_size=4k")],
    &[("qcow2", "cluster_size=512,compat=0.10")],
    &[("qcow2", "extended_l2=on,cluster_size=16k"), ("raw", "")],
    &[("qcow2", "compat=0.10,cluster_size=4k"), ("raw", "")],
];

#[test]
fn every_kill_and_power_cut_leaves_the_disk_as_it_was() {
    for layers in DISKS {
        let specs: Vec<LayerSpec> = layers.iter().map(|(f, o)| spec(f, o)).collect();
        let name = format!("compact {layers:?}");
        let (disk, _) = filled(Place::Memory, &specs, &mut Seeded::new(&name));
        let acts: [Act; 12] = [
            Write(0..SIZE / 2),
            Write(SIZE / 2..SIZE),
            Zero(8192..20_480),
            Flush,
            Discard(40_960..49_152),
            Zero(61_440..65_536),
            Compact,
            Write(10_000..30_000),
            Close,
            Discard(0..16_384),
            Compact,
            Write(100..200),
        ];
        let mut session = Session::of(&name, disk, None, &acts);
        session.every_kill();
        session.power_cuts();
    }
}

fn run(dir: &Path, line: &[&str]) -> assert_cmd::assert::Assert {
    vdtool().current_dir(dir).args(line).assert()
}

/// A disk of 32 MiB: data at its ends, zeroes that are stored between, and then nothing.
fn made(dir: &Path, format: &str, options: &str) -> String {
    let file = format!("disk.{format}");
    run(
        dir,
        &["create", "-q", "-f", format, "-o", options, &file, "32M"],
    )
    .success();
    let writes = ["write -P 1 0 8M", "write -P 0 8M 6M", "write -P 2 14M 9M"];
    let line = [
        "io",
        "-q",
        "-c",
        writes[0],
        "-c",
        writes[1],
        "-c",
        writes[2],
        "-c",
        "discard 2M 4M",
        &file,
    ];
    run(dir, &line).success();
    file
}

fn compacted(dir: &Path, line: &[&str]) -> Value {
    let line = [&["compact", "--output", "json"], line].concat();
    let output = run(dir, &line).success().get_output().stdout.clone();
    serde_json::from_slice(&output).expect("is JSON")
}

#[test]
fn a_disk_reads_as_before_and_its_file_is_as_short_as_it_can_be() {
    for (format, options) in [
        ("vhd", "block_size=2M"),
        ("vhd", "block_size=512k"),
        ("vdi", ""),
        ("qcow2", "cluster_size=64k"),
        ("qcow2", "compat=0.10"),
    ] {
        let dir = scratch();
        let dir = dir.path();
        let file = &*made(dir, format, options);
        std::fs::copy(dir.join(file), dir.join("before")).expect("copies");
        let told = compacted(dir, &["--dry-run", file]);
        let same = |a: &str, b: &str| {
            std::fs::read(dir.join(a)).expect("reads") == std::fs::read(dir.join(b)).expect("reads")
        };
        assert!(same(file, "before"), "a dry run changes nothing");
        let done = compacted(dir, &[file]);
        // Discarded blocks of a VDI are stored until then.
        let zero = if format == "vdi" { 10 } else { 6 };
        assert_eq!(told["zero-bytes"], zero << 20, "{format}: {told}");
        assert_eq!(done["zero-bytes"], told["zero-bytes"], "{format}");
        assert_eq!(done["unused-bytes"], told["unused-bytes"], "{format}");
        run(dir, &["check", "-q", file]).success();
        run(
            dir,
            &["compare", "-q", "-f", format, "-F", format, file, "before"],
        )
        .success();
        let length = done["length"].as_u64().expect("a number");
        let taken = done["actual-size"].as_u64().expect("a number");
        assert!(taken < 15 << 20, "{format} {options}: {done}");
        if format != "qcow2" {
            assert!(length <= 15 << 20, "{options}: {done}");
        }
        if requires("qemu-img") {
            let theirs = if format == "vhd" { "vpc" } else { format };
            let line = ["compare", "-f", theirs, "-F", theirs, file, "before"];
            peer("qemu-img", dir, line);
        }
        let again = compacted(dir, &[file]);
        assert_eq!(
            (&again["zero-bytes"], &again["moved-bytes"]),
            (&0.into(), &0.into())
        );
        assert_eq!(again["length"], done["length"], "nothing is left to do");
    }
}

#[test]
fn stored_zeroes_stay_where_they_are_not_looked_for() {
    for format in ["vhd", "qcow2"] {
        let dir = scratch();
        let dir = dir.path();
        let file = &*made(dir, format, "");
        let done = compacted(dir, &["--no-scan", file]);
        assert_eq!(done["zero-bytes"], 0);
        let done = compacted(dir, &[file]);
        assert_eq!(done["zero-bytes"], 6 << 20, "they were there until now");
        run(dir, &["check", "-q", file]).success();
    }
}

#[test]
fn a_child_is_packed_and_shows_nothing_of_its_parent() {
    for format in ["vhd", "vhdx", "vdi", "qcow2"] {
        let dir = scratch();
        let dir = dir.path();
        let create = ["create", "-q", "-f", format];
        run(dir, &[&create[..], &["base", "16M"]].concat()).success();
        run(dir, &["io", "-q", "-c", "write -P 9 0 16M", "base"]).success();
        run(
            dir,
            &[&create[..], &["-b", "base", "-F", format, "top"]].concat(),
        )
        .success();
        let line = [
            "io",
            "-q",
            "-c",
            "write -P 0 0 6M",
            "-c",
            "write -P 3 6M 4M",
            "top",
        ];
        run(dir, &line).success();
        run(dir, &["convert", "-q", "-O", "raw", "top", "before"]).success();
        let base = std::fs::read(dir.join("base")).expect("reads");
        let done = compacted(dir, &["top"]);
        run(dir, &["compare", "-q", "-F", "raw", "top", "before"]).success();
        run(dir, &["check", "-q", "top"]).success();
        assert!(base == std::fs::read(dir.join("base")).expect("reads"));
        // A child of the one has no way to say zero, one of the other has.
        let zero = if format == "vhd" { 0 } else { 6 << 20 };
        assert_eq!(done["zero-bytes"], zero, "{format}");
    }
}

#[test]
fn what_is_damaged_or_has_no_space_to_give_is_refused_and_left_alone() {
    let dir = scratch();
    let dir = dir.path();
    let file = &*made(dir, "qcow2", "cluster_size=64k");
    // A cluster in use that is counted as free.
    let mut bytes = std::fs::read(dir.join(file)).expect("reads");
    bytes[(2 << 16) + 20] = 0;
    bytes[(2 << 16) + 21] = 0;
    std::fs::write(dir.join(file), &bytes).expect("writes");
    let refused = run(dir, &["compact", file]).code(1);
    let text = String::from_utf8(refused.get_output().stderr.clone()).expect("is text");
    assert!(
        text.contains("check -r all") && text.lines().count() == 1,
        "{text}"
    );
    assert!(bytes == std::fs::read(dir.join(file)).expect("reads"));
    run(dir, &["create", "-q", "-f", "raw", "disk.raw", "1M"]).success();
    let refused = run(dir, &["compact", "disk.raw"]).code(63);
    let text = String::from_utf8(refused.get_output().stderr.clone()).expect("is text");
    assert!(text.contains("'raw'"), "{text}");
    run(
        dir,
        &[
            "create",
            "-q",
            "-f",
            "vhd",
            "-o",
            "subformat=fixed",
            "fixed.vhd",
            "1M",
        ],
    )
    .success();
    run(dir, &["compact", "fixed.vhd"]).code(63);
    run(dir, &["compact", "nowhere"]).code(1);
    run(dir, &["compact"]).code(2);
}

#[test]
fn bitmaps_take_no_note_of_it_and_snapshots_stay() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    let file = &*made(dir, "qcow2", "");
    run(dir, &["snapshot", "-c", "kept", file]).success();
    run(dir, &["io", "-q", "-c", "write -P 0 0 1M", file]).success();
    run(dir, &["bitmap", "--add", file, "since"]).success();
    run(
        dir,
        &["convert", "-q", "-l", "kept", "-O", "raw", file, "kept.raw"],
    )
    .success();
    run(dir, &["convert", "-q", "-O", "raw", file, "now.raw"]).success();
    let done = compacted(dir, &[file]);
    assert!(done["zero-bytes"].as_u64() >= Some(6 << 20), "{done}");
    run(dir, &["compare", "-q", "-F", "raw", file, "now.raw"]).success();
    run(
        dir,
        &[
            "convert",
            "-q",
            "-l",
            "kept",
            "-O",
            "raw",
            file,
            "again.raw",
        ],
    )
    .success();
    run(dir, &["compare", "-q", "again.raw", "kept.raw"]).success();
    peer("qemu-img", dir, ["check", "-q", file]);
    let info = run(dir, &["info", "--output", "json", file]).success();
    let info: Value = serde_json::from_slice(&info.get_output().stdout).expect("is JSON");
    let bitmaps = &info["format-specific"]["data"]["bitmaps"];
    assert_eq!(bitmaps.as_array().map(Vec::len), Some(1), "{info}");
}

#[test]
fn zeroes_before_what_shows_the_image_below_in_one_cluster_are_left_alone() {
    let dir = scratch();
    let dir = dir.path();
    run(dir, &["create", "-q", "-f", "raw", "base", "1M"]).success();
    run(
        dir,
        &["io", "-q", "-f", "raw", "-c", "write -P 9 0 1M", "base"],
    )
    .success();
    let options = "extended_l2=on,cluster_size=64k";
    let line = [
        "create", "-q", "-f", "qcow2", "-o", options, "-b", "base", "-F", "raw", "top",
    ];
    run(dir, &line).success();
    for (at, len) in [("0", "8k"), ("72k", "8k"), ("184k", "8k"), ("256k", "64k")] {
        let zero = format!("write -z -u {at} {len}");
        run(dir, &["io", "-q", "-c", &zero, "top"]).success();
    }
    run(dir, &["convert", "-q", "-O", "raw", "top", "before"]).success();
    compacted(dir, &["top"]);
    run(dir, &["compare", "-q", "-F", "raw", "top", "before"]).success();
}

#[test]
fn a_compaction_that_is_stopped_leaves_no_leaks() {
    let dir = scratch();
    let dir = dir.path();
    let file = &*made(dir, "qcow2", "");
    let line = format!(
        "{} compact {file} & pid=$!; kill -TERM $pid; wait $pid",
        env!("CARGO_BIN_EXE_vdtool")
    );
    let status = std::process::Command::new("sh")
        .current_dir(dir)
        .args(["-c", &line])
        .status();
    let code = status.expect("starts").code();
    assert!(matches!(code, Some(0 | 143)), "{code:?}");
    run(dir, &["check", "-q", file]).success();
}

#[test]
fn an_image_with_an_external_data_file_keeps_its_data() {
    for options in ["data_file=d.raw", "data_file=d.raw,data_file_raw=on"] {
        let dir = scratch();
        let dir = dir.path();
        let create = [
            "create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", "4M",
        ];
        run(dir, &create).success();
        let line = [
            "io",
            "-q",
            "-c",
            "write -P 3 0 1M",
            "-c",
            "write -P 0 1M 1M",
            "a.qcow2",
        ];
        run(dir, &line).success();
        run(dir, &["convert", "-q", "-O", "raw", "a.qcow2", "before"]).success();
        compacted(dir, &["-n", "a.qcow2"]);
        compacted(dir, &["a.qcow2"]);
        run(dir, &["compare", "-q", "-F", "raw", "a.qcow2", "before"]).success();
        run(dir, &["check", "-q", "a.qcow2"]).success();
    }
}

#[test]
fn pieces_that_hosts_cannot_give_back_are_not_told_of() {
    let dir = scratch();
    let dir = dir.path();
    let line = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=512"];
    run(dir, &[&line[..], &["a.qcow2", "4M"]].concat()).success();
    let mut line = vec!["io", "-q", "-c", "write -P 1 0 1M"];
    let discards: Vec<String> = (0..64)
        .map(|i| format!("discard {} 512", i * 1024))
        .collect();
    discards.iter().for_each(|text| line.extend(["-c", text]));
    line.push("a.qcow2");
    run(dir, &line).success();
    compacted(dir, &["a.qcow2"]);
    let told = compacted(dir, &["--dry-run", "a.qcow2"]);
    assert_eq!(told["unused-bytes"], 0, "{told}");
}

#[test]
fn a_file_that_is_nothing_but_long_is_cut_without_a_look_at_each_cluster() {
    let dir = scratch();
    let dir = dir.path();
    let line = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=512"];
    run(dir, &[&line[..], &["a.qcow2", "4M"]].concat()).success();
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(dir.join("a.qcow2"));
    let file = file.expect("opens");
    let before = file.metadata().expect("is there").len();
    file.set_len(8 << 40).expect("is sparse");
    let told = compacted(dir, &["--dry-run", "a.qcow2"]);
    assert_eq!(told["unused-bytes"], (8 << 40) - before, "{told}");
    compacted(dir, &["a.qcow2"]);
    assert_eq!(file.metadata().expect("is there").len(), before);
    run(dir, &["check", "-q", "a.qcow2"]).success();
}

//! `vdtool check`.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::Value;

use crate::util::{scratch, vdtool};

/// First word of the allocation table of our dynamic VHDs.
const TABLE: u64 = 1536;

fn run(dir: &Path, line: &str) -> assert_cmd::assert::Assert {
    vdtool().current_dir(dir).args(line.split(' ')).assert()
}

/// A dynamic VHD with data in its first block.
fn vhd(dir: &Path, name: &str) {
    run(dir, &format!("create -q -f vhd {name} 10M")).success();
    vdtool()
        .current_dir(dir)
        .args(["io", "-q", "-c", "write -P 1 0 64k", name])
        .assert()
        .success();
}

fn overwrite(dir: &Path, name: &str, bytes: &[u8], at: u64) {
    let file = OpenOptions::new().write(true).open(dir.join(name));
    let file = file.expect("is there");
    file.write_all_at(bytes, at).expect("has room");
}

/// Checks with JSON output; the report and the exit code.
fn report(dir: &Path, line: &str) -> (Value, i32) {
    let mut command = vdtool();
    command.current_dir(dir).args(["check", "--output", "json"]);
    let output = command.args(line.split(' ')).output().expect("runs");
    let value = serde_json::from_slice(&output.stdout).expect("is JSON");
    (value, output.status.code().expect("ends by itself"))
}

#[test]
fn a_repair_after_which_nothing_is_wrong_ends_with_0() {
    let dir = scratch();
    for bytes in [[0; 512], [0xc7; 512]] {
        vhd(dir.path(), "a.vhd");
        let end = std::fs::metadata(dir.path().join("a.vhd"))
            .expect("is there")
            .len()
            - 512;
        overwrite(dir.path(), "a.vhd", &bytes, end);
        let (found, code) = report(dir.path(), "a.vhd");
        assert_eq!((code, &found["corruptions"]), (2, &1.into()), "{found}");
        let (found, code) = report(dir.path(), "-r all a.vhd");
        assert_eq!(code, 0, "{found}");
        assert_eq!(
            (&found["corruptions"], &found["corruptions-fixed"]),
            (&0.into(), &1.into())
        );
        run(dir.path(), "check a.vhd").success();
    }
}

#[test]
fn a_clean_image_is_clean() {
    let dir = scratch();
    vhd(dir.path(), "a.vhd");
    let (found, code) = report(dir.path(), "a.vhd");
    assert_eq!(code, 0, "{found}");
    for (key, value) in [
        ("corruptions", 0),
        ("leaks", 0),
        ("check-errors", 0),
        ("total-clusters", 5),
        ("allocated-clusters", 1),
    ] {
        assert_eq!(found[key], value, "{key}");
    }
    assert_eq!(found["filename"], "a.vhd");
    assert_eq!(found["format"], "vhd");
    run(dir.path(), "check a.vhd").success().stderr("");
    run(dir.path(), "check -T none a.vhd").success().stderr("");
    run(dir.path(), "-q check a.vhd").success().stdout("");
}

#[test]
fn corruption_is_found_and_repaired_where_that_is_asked_for() {
    let dir = scratch();
    vhd(dir.path(), "a.vhd");
    // The size in the footer's copy, which its checksum covers.
    overwrite(dir.path(), "a.vhd", &[0x55], 0x30);
    let (found, code) = report(dir.path(), "a.vhd");
    assert_eq!(code, 2, "{found}");
    assert_ne!(found["corruptions"], 0);
    assert_eq!(found["corruptions-fixed"], 0);
    assert_eq!(found["findings"][0]["severity"], "corruption");
    // Errors are printed even when nothing else is.
    let quiet = run(dir.path(), "-q check a.vhd").code(2).stdout("");
    assert!(!quiet.get_output().stderr.is_empty());
    let (found, code) = report(dir.path(), "-r all a.vhd");
    assert_eq!(code, 0, "{found}");
    assert_eq!(found["corruptions"], 0);
    assert_ne!(found["corruptions-fixed"], 0);
    assert_eq!(report(dir.path(), "a.vhd").1, 0);
}

#[test]
fn leaks_are_found_and_repaired_where_that_is_asked_for() {
    let dir = scratch();
    vhd(dir.path(), "a.vhd");
    overwrite(dir.path(), "a.vhd", &[0xff; 4], TABLE);
    let (found, code) = report(dir.path(), "a.vhd");
    assert_eq!(code, 3, "{found}");
    assert_ne!(found["leaks"], 0);
    let (found, code) = report(dir.path(), "-r leaks a.vhd");
    assert_eq!(code, 0, "{found}");
    assert_ne!(found["leaks-fixed"], 0);
    assert_eq!(report(dir.path(), "a.vhd").1, 0);
}

#[test]
fn a_missing_or_wrong_parent_is_corruption() {
    let dir = scratch();
    vhd(dir.path(), "base.vhd");
    run(dir.path(), "create -q -b base.vhd -F vhd child.vhd").success();
    assert_eq!(report(dir.path(), "child.vhd").1, 0);
    std::fs::rename(dir.path().join("base.vhd"), dir.path().join("gone")).expect("renames");
    let (found, code) = report(dir.path(), "child.vhd");
    assert_eq!(code, 2, "{found}");
    assert_eq!(found["corruptions"], 1);
    vhd(dir.path(), "base.vhd");
    let (found, code) = report(dir.path(), "child.vhd");
    assert_eq!(code, 2, "{found}");
    std::fs::rename(dir.path().join("gone"), dir.path().join("base.vhd")).expect("renames");
    assert_eq!(report(dir.path(), "child.vhd").1, 0);
}

#[test]
fn a_parent_that_may_not_be_opened_was_not_checked() {
    let dir = scratch();
    std::fs::create_dir(dir.path().join("sub")).expect("can be made");
    vhd(dir.path(), "base.vhd");
    run(dir.path(), "create -q -b ../base.vhd -F vhd sub/child.vhd").success();
    let (found, code) = report(dir.path(), "sub/child.vhd");
    assert_eq!(code, 1, "{found}");
    assert_eq!(found["check-errors"], 1);
    assert_eq!(found["corruptions"], 0);
    let text = found["findings"][0]["text"].as_str().expect("is text");
    assert!(text.contains("--allow-ref"), "{text}");
    for allowed in ["any", "base.vhd"] {
        let line = format!("--allow-ref {allowed} sub/child.vhd");
        assert_eq!(report(dir.path(), &line).1, 0, "{allowed}");
    }
}

#[test]
fn raw_has_nothing_to_check() {
    let dir = scratch();
    std::fs::write(dir.path().join("disk.raw"), [7; 512]).expect("has room");
    for repair in [&[][..], &["-r", "leaks"], &["-r", "all"]] {
        vdtool()
            .current_dir(&dir)
            .args(["check", "disk.raw"])
            .args(repair)
            .assert()
            .code(63)
            .stdout("")
            .stderr("vdtool: disk.raw: format 'raw' has nothing to check\n");
    }
    let bytes = std::fs::read(dir.path().join("disk.raw")).expect("reads");
    assert_eq!(bytes, [7; 512]);
}

#[test]
fn what_cannot_be_opened_was_not_checked() {
    let dir = scratch();
    for file in ["no-such-file", "."] {
        vdtool()
            .current_dir(&dir)
            .args(["check", file])
            .assert()
            .code(1);
    }
}

/// Stops a job at once, or counts what it is told.
#[derive(Debug, Default)]
struct Watch {
    stop: bool,
    told: std::sync::atomic::AtomicU64,
}

impl vdtool::util::progress::Progress for Watch {
    fn advance(&self, bytes: u64) {
        self.told
            .fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
    }

    fn cancelled(&self) -> bool {
        self.stop
    }
}

#[test]
fn a_check_tells_how_far_it_is_and_stops_when_told() {
    let dir = scratch();
    for (format, options) in [("vhd", "block_size=512k"), ("qcow2", "cluster_size=4k")] {
        let name = format!("a.{format}");
        let lines: [&[&str]; 2] = [
            &["create", "-q", "-f", format, "-o", options, &name, "64M"],
            &[
                "io",
                "-q",
                "-c",
                "write -P 1 0 20M",
                "-c",
                "write 60M 64k",
                &name,
            ],
        ];
        for line in lines {
            vdtool().current_dir(&dir).args(line).assert().success();
        }
        let path = dir.path().join(&name);
        let chain = vdtool::chain::open::open(&path, &vdtool::chain::open::ChainOptions::read());
        let chain = chain.expect("opens");
        let check = chain.top().as_check().expect("can be checked");
        let watch = Watch::default();
        let nothing = vdtool::image::check::Repair::Nothing;
        check.check(nothing, &watch).expect("the host is well");
        assert!(check.work() > 0, "{format}");
        assert_eq!(watch.told.into_inner(), check.work(), "{format}");
        let stopping = Watch {
            stop: true,
            ..Watch::default()
        };
        let error = check
            .check(nothing, &stopping)
            .expect_err("is told to stop");
        assert_eq!(error.kind(), vdtool::ErrorKind::Cancelled, "{format}");
        let line = ["check", "--progress", "json", &name];
        let done = vdtool().current_dir(&dir).args(line).assert().success();
        let text = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
        let last = text.lines().last().expect("a line");
        let value: serde_json::Value = serde_json::from_str(last).expect("is JSON");
        assert_eq!(value["job"], "check");
        assert_eq!(value["done"], value["total"], "{text}");
    }
}

#[test]
fn with_chain_every_image_below_is_checked_and_so_is_every_link() {
    for format in ["qcow2", "vhd", "vdi", "vhdx", "vmdk"] {
        let dir = scratch();
        let dir = dir.path();
        let run = |line: &[&str]| vdtool().current_dir(dir).args(line).assert();
        run(&["create", "-q", "-f", format, "b", "8M"]).success();
        for (below, above, size) in [("b", "m", "8M"), ("m", "t", "9M")] {
            let over = ["-b", below, "-F", format, above, size];
            run(&[&["create", "-q", "-f", format][..], &over].concat()).success();
        }
        let images = |code| {
            let all = ["check", "--chain", "--output", "json", "t"];
            let out = run(&all).code(code).get_output().stdout.clone();
            let value: serde_json::Value = serde_json::from_slice(&out).expect("is JSON");
            value["images"].as_array().expect("is a list").clone()
        };
        let found = images(0);
        assert_eq!(found.len(), 3, "{format}: {found:?}");
        assert!(found.iter().all(|image| image["format"] == format));
        let notes = found[0]["findings"].to_string();
        assert!(
            notes.contains("zeroes are read behind"),
            "{format}: {notes}"
        );
        // Damage that does not keep it from being read.
        let mut bytes = std::fs::read(dir.join("b")).expect("reads");
        let kept = bytes.clone();
        let damaged = match format {
            // The first refcount of all, the copy of the footer, the count of blocks.
            "qcow2" => Some(0x2_0000..0x2_0002),
            "vhd" => Some(8..12),
            "vdi" => Some(0x184..0x185),
            _ => None,
        };
        if let Some(range) = damaged {
            bytes[range].fill(0x77);
            std::fs::write(dir.join("b"), &bytes).expect("writes");
            run(&["check", "t"]).success();
            let all = ["check", "--chain", "--output", "json", "t"];
            let code = run(&all).get_output().status.code();
            assert!(matches!(code, Some(2 | 3)), "{format}: {code:?}");
            let found = images(code.expect("ends by itself"));
            let sum = |image: &serde_json::Value| {
                let number = |key: &str| image[key].as_u64().expect("is a number");
                number("corruptions") + number("leaks")
            };
            let sums: Vec<u64> = found.iter().map(sum).collect();
            assert!(sums[..2] == [0, 0] && sums[2] > 0, "{format}: {sums:?}");
            // What lies below is only looked at.
            run(&["check", "-q", "--chain", "-r", "all", "t"]).failure();
            assert!(
                std::fs::read(dir.join("b")).expect("reads") == bytes,
                "{format}"
            );
            std::fs::write(dir.join("b"), &kept).expect("writes");
        }
        // Another image of the same name, where the one above knows which it was.
        if format != "qcow2" {
            std::fs::remove_file(dir.join("b")).expect("removes");
            run(&["create", "-q", "-f", format, "b", "8M"]).success();
            let found = images(2);
            assert_eq!(found.len(), 2, "{format}: {found:?}");
            assert_eq!(found[1]["corruptions"], 1, "{format}: {}", found[1]);
            std::fs::write(dir.join("b"), &kept).expect("writes");
        }
        std::fs::rename(dir.join("b"), dir.join("elsewhere-b")).expect("renames");
        if format == "vdi" {
            std::fs::remove_file(dir.join("elsewhere-b")).expect("removes");
        }
        let found = images(2);
        assert_eq!(found.len(), 2, "{format}: {found:?}");
        assert_eq!(found[0]["corruptions"], 0, "{format}");
        assert_eq!(found[1]["corruptions"], 1, "{format}: {}", found[1]);
    }
    // What has nothing to check is said so, and is no fault.
    let dir = scratch();
    let dir = dir.path();
    std::fs::write(dir.join("b.raw"), [1; 4096]).expect("writes");
    let line = [
        "create", "-q", "-f", "qcow2", "-b", "b.raw", "-F", "raw", "t",
    ];
    vdtool().current_dir(dir).args(line).assert().success();
    let shown = vdtool()
        .current_dir(dir)
        .args(["check", "--chain", "t"])
        .assert();
    let text = String::from_utf8_lossy(&shown.success().get_output().stdout).into_owned();
    assert!(
        text.contains("image: t\n") && text.contains("b.raw\nnote: format 'raw'"),
        "{text}"
    );
}

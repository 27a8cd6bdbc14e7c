//! `vdtool commit --children`: images are taken out of the middle of a chain.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use crate::util::{Seeded, killable, rounds, scratch, vdtool};

const FORMATS: [&str; 5] = ["qcow2", "vhd", "vdi", "vhdx", "vmdk"];

fn ours(dir: &Path, line: &[&str]) -> String {
    let done = vdtool().current_dir(dir).args(line).assert().success();
    String::from_utf8_lossy(&done.get_output().stdout).into_owned()
}

/// Runs what fails with `code`; what it said.
fn fails(dir: &Path, line: &[&str], code: i32) -> String {
    let failed = vdtool().current_dir(dir).args(line).assert().code(code);
    String::from_utf8_lossy(&failed.get_output().stderr).into_owned()
}

fn read(dir: &Path, file: &str) -> Vec<u8> {
    ours(dir, &["convert", "-q", "-O", "raw", file, "read.raw"]);
    fs::read(dir.join("read.raw")).expect("reads")
}

/// `b` below `m` below `n` below `t` and `u`, each with writes, zeroes and discards of its own.
fn family(dir: &Path, format: &str, rng: &mut Seeded) {
    let options = match format {
        "vhdx" => "block_size=1M",
        "vhd" => "block_size=512k",
        "qcow2" => "cluster_size=64k",
        _ => "",
    };
    let sizes = ["6M", "6M", "8M", "8M", "8M"];
    let below = ["", "b", "m", "n", "n"];
    for (at, name) in ["b", "m", "n", "t", "u"].into_iter().enumerate() {
        // The middle ones of some formats have one size; those that can differ do.
        let size = match format {
            "qcow2" => sizes[at],
            _ => "8M",
        };
        let mut line = vec!["create", "-q", "-f", format];
        if !options.is_empty() && at == 0 || format == "qcow2" {
            line.extend(["-o", options]);
        }
        if at > 0 {
            line.extend(["-b", below[at], "-F", format]);
        }
        ours(dir, &[&line[..], &[name, size]].concat());
        scribble(dir, name, rng, if size == "6M" { 6 << 20 } else { 8 << 20 });
    }
}

fn scribble(dir: &Path, file: &str, rng: &mut Seeded, size: u64) {
    let mut line = vec!["io".to_owned(), "-q".to_owned()];
    for _ in 0..8 {
        let at = rng.u64(0..size / 512) * 512;
        let len = (rng.u64(1..2000) * 512).min(size - at);
        let command = match rng.u32(0..4) {
            0 => format!("write -z {at} {len}"),
            _ => format!("write -P {} {at} {len}", rng.u8(1..)),
        };
        line.extend(["-c".to_owned(), command]);
    }
    line.push(file.to_owned());
    let line: Vec<&str> = line.iter().map(String::as_str).collect();
    ours(dir, &line);
}

const MERGE: [&str; 9] = [
    "commit",
    "-q",
    "-b",
    "b",
    "--children",
    "t",
    "--children",
    "u",
    "n",
];

fn layers(dir: &Path, file: &str) -> usize {
    ours(dir, &["info", "--backing-chain", file])
        .matches("image:")
        .count()
}

/// Bytes that an image stores itself.
fn own(dir: &Path, file: &str) -> u64 {
    let shown = ours(dir, &["chain", "--output", "json", file]);
    let shown: serde_json::Value = serde_json::from_str(&shown).expect("is JSON");
    let images = shown["images"].as_array().expect("is a list");
    let image = images.iter().find(|image| image["filename"] == file);
    image.expect("is shown")["own-size"]
        .as_u64()
        .expect("is a number")
}

/// Image `file` over `below`.
fn child(dir: &Path, format: &str, below: &str, file: &str) {
    let over = ["-b", below, "-F", format, file];
    ours(dir, &[&["create", "-q", "-f", format][..], &over].concat());
}

#[test]
fn what_lies_over_the_base_already_is_no_child_of_an_image_that_was_not_merged() {
    for format in FORMATS {
        let dir = scratch();
        let dir = dir.path();
        ours(dir, &["create", "-q", "-f", format, "b", "8M"]);
        child(dir, format, "b", "m");
        child(dir, format, "b", "x");
        ours(dir, &["io", "-q", "-c", "write -P 7 1M 64k", "m"]);
        let before = fs::read(dir.join("m")).expect("reads");
        for remove in [&[][..], &["--remove"]] {
            let line = [
                &["commit", "-b", "b", "--children", "x"][..],
                remove,
                &["m"],
            ]
            .concat();
            let said = fails(dir, &line, 1);
            assert!(
                said.contains("does not have what m has"),
                "{format}: {said}"
            );
            let kept = fs::read(dir.join("m")).expect("is there") == before;
            assert!(kept, "{format}: m has the only copy");
        }
    }
}

#[test]
fn a_child_that_was_linked_stays_so_when_the_others_follow() {
    // A VHDX has both states of the base recorded then: see `moments`.
    for format in ["qcow2", "vhd", "vdi", "vmdk"] {
        let dir = scratch();
        let dir = dir.path();
        ours(dir, &["create", "-q", "-f", format, "b", "8M"]);
        child(dir, format, "b", "m");
        ours(dir, &["io", "-q", "-c", "write -P 7 1M 2M", "m"]);
        child(dir, format, "m", "t");
        child(dir, format, "m", "u");
        let merge = [
            "commit",
            "-q",
            "-b",
            "b",
            "--children",
            "t",
            "--children",
            "u",
            "m",
        ];
        // Killed when the first of them was linked.
        fs::create_dir(dir.join("kept")).expect("makes a directory");
        for file in ["u", "m"] {
            fs::copy(dir.join(file), dir.join("kept").join(file)).expect("copies");
        }
        ours(dir, &merge);
        for file in ["u", "m"] {
            fs::rename(dir.join("kept").join(file), dir.join(file)).expect("renames");
        }
        ours(dir, &merge);
        for file in ["t", "u", "m"] {
            let reads = ["-c", "read -P 7 1M 2M", "-c", "read -P 0 3M 5M", file];
            ours(dir, &[&["io", "-q", "-r"][..], &reads].concat());
        }
        assert_eq!(["t", "u"].map(|file| layers(dir, file)), [2, 2], "{format}");
    }
}

#[test]
fn a_child_that_could_not_have_the_base_below_it_is_refused_before_anything_is_moved() {
    let dir = scratch();
    let dir = dir.path();
    // A VHD has VHDs below it, and this one would have a qcow2.
    ours(dir, &["create", "-q", "-f", "qcow2", "b", "8M"]);
    child(dir, "qcow2", "b", "m");
    ours(dir, &["io", "-q", "-c", "write -P 7 1M 64k", "m"]);
    ours(
        dir,
        &["create", "-q", "-f", "qcow2", "-b", "m", "-F", "qcow2", "t"],
    );
    ours(dir, &["create", "-q", "-f", "raw", "r", "8M"]);
    ours(
        dir,
        &["create", "-q", "-f", "vhd", "-b", "r", "-F", "raw", "v"],
    );
    ours(
        dir,
        &["create", "-q", "-f", "qcow2", "-b", "v", "-F", "vpc", "q"],
    );
    child(dir, "qcow2", "q", "w");
    // Past the end of FILE its child reads zeroes, and the base has something there.
    ours(dir, &["io", "-q", "-c", "write -P 9 7M 64k", "b"]);
    ours(dir, &["resize", "-q", "--shrink", "m", "6M"]);
    let before = fs::read(dir.join("b")).expect("reads");
    let said = fails(dir, &["commit", "-b", "b", "--children", "t", "m"], 1);
    assert!(said.contains("t: has 8388608 bytes"), "{said}");
    assert!(fs::read(dir.join("b")).expect("reads") == before);
    ours(dir, &["io", "-q", "-r", "-c", "read -P 0 6M 2M", "t"]);
    // Mixed formats, where the formats allow it.
    ours(dir, &["io", "-q", "-c", "write -P 5 1M 64k", "q"]);
    ours(
        dir,
        &[
            "commit",
            "-q",
            "-b",
            "v",
            "--children",
            "w",
            "--remove",
            "q",
        ],
    );
    ours(dir, &["io", "-q", "-r", "-c", "read -P 5 1M 64k", "w"]);
}

#[test]
fn children_read_as_before_and_lie_over_the_base() {
    for format in FORMATS {
        let mut rng = Seeded::new("coalesce");
        let dir = scratch();
        let dir = dir.path();
        family(dir, format, &mut rng);
        let before = ["t", "u", "n"].map(|file| read(dir, file));
        let base = fs::read(dir.join("b")).expect("reads");
        let dry = ours(
            dir,
            &[
                "commit",
                "-b",
                "b",
                "--children",
                "t",
                "--children",
                "u",
                "--dry-run",
                "n",
            ],
        );
        assert!(dry.contains("would be moved"), "{dry}");
        assert!(
            fs::read(dir.join("b")).expect("reads") == base,
            "{format}: it says what it would do"
        );
        ours(dir, &MERGE);
        for (file, like) in ["t", "u", "n", "m", "b"].into_iter().zip([0, 1, 2, 2, 2]) {
            let (now, before) = (read(dir, file), &before[like]);
            assert!(
                now[..] == before[..now.len()],
                "{format}: {file} reads as it should"
            );
        }
        assert_eq!(["t", "u"].map(|file| layers(dir, file)), [2, 2], "{format}");
        // A qcow2 here has a shorter one below it, behind whose end it would read zeroes.
        for file in if format == "qcow2" {
            &["m"][..]
        } else {
            &["m", "n"]
        } {
            assert_eq!(own(dir, file), 0, "{format}: {file} has nothing any more");
        }
        for file in ["b", "t", "u", "n", "m"] {
            ours(dir, &["check", "-q", file]);
        }
        let again = ours(
            dir,
            &[
                "commit",
                "-b",
                "b",
                "--children",
                "t",
                "--children",
                "u",
                "n",
            ],
        );
        assert!(again.contains("Nothing is left to do"), "{format}: {again}");
        ours(
            dir,
            &[
                "commit",
                "-q",
                "-b",
                "b",
                "--children",
                "u",
                "--children",
                "t",
                "--remove",
                "n",
            ],
        );
        assert!(
            !dir.join("n").exists() && !dir.join("m").exists(),
            "{format}"
        );
        ours(dir, &[&MERGE[..], &["--remove"]].concat());
        assert!(
            read(dir, "t") == before[0] && read(dir, "u") == before[1],
            "{format}"
        );
    }
}

#[test]
fn whatever_would_read_otherwise_afterwards_is_refused_by_name() {
    for format in ["qcow2", "vhd"] {
        let mut rng = Seeded::new("coalesce refused");
        let dir = scratch();
        let dir = dir.path();
        family(dir, format, &mut rng);
        ours(
            dir,
            &[
                "create", "-q", "-f", format, "-b", "m", "-F", format, "other",
            ],
        );
        let before = fs::read(dir.join("b")).expect("reads");
        let says = |line: &[&str], word: &str| {
            let said = fails(dir, line, 1);
            assert!(said.contains(word), "{line:?}: {said}");
            assert!(
                fs::read(dir.join("b")).expect("reads") == before,
                "{line:?}"
            );
        };
        says(&MERGE, "other too");
        fs::remove_file(dir.join("other")).expect("removes");
        says(&["commit", "-b", "b", "--children", "t", "n"], "u too");
        says(&["commit", "-b", "b", "--children", "m", "n"], "go into");
        says(&["commit", "-b", "x", "--children", "t", "n"], "'x'");
        says(
            &["commit", "-b", "b", "--children", "absent", "n"],
            "absent",
        );
        says(
            &["commit", "-b", "b", "--children", "b", "n"],
            "no image below it",
        );
        fails(dir, &["commit", "--remove", "n"], 2);
        ours(
            dir,
            &[
                "create", "-q", "-f", format, "-b", "b", "-F", format, "second",
            ],
        );
        says(&MERGE, "second too");
    }
}

#[test]
fn an_image_that_somebody_has_open_is_refused_before_anything_is_moved() {
    let mut rng = Seeded::new("coalesce locked");
    let dir = scratch();
    let dir = dir.path();
    family(dir, "vhd", &mut rng);
    let before = fs::read(dir.join("b")).expect("reads");
    let mut open = killable()
        .current_dir(dir)
        .args(["io", "-r", "-c", "sleep 20000", "t"])
        .stdout(Stdio::null())
        .spawn()
        .expect("runs");
    std::thread::sleep(Duration::from_millis(500));
    fails(dir, &MERGE, 1);
    open.kill().expect("is there");
    open.wait().expect("ends");
    assert!(fs::read(dir.join("b")).expect("reads") == before);
    ours(dir, &MERGE);
}

#[test]
fn killed_at_any_moment_all_children_read_as_before_and_the_command_ends_it() {
    let mut rng = Seeded::new("coalesce killed");
    for format in FORMATS {
        for round in 0..rounds(10) {
            let dir = scratch();
            let dir = dir.path();
            family(dir, format, &mut rng);
            let before = ["t", "u"].map(|file| read(dir, file));
            let line = match round % 2 {
                0 => MERGE.to_vec(),
                _ => [&MERGE[..], &["--remove"]].concat(),
            };
            for _ in 0..2 {
                let mut run = killable()
                    .current_dir(dir)
                    .args(&line)
                    .stderr(Stdio::null())
                    .spawn()
                    .expect("runs");
                std::thread::sleep(Duration::from_micros(rng.u64(0..60_000)));
                run.kill().expect("is there");
                run.wait().expect("ends");
                for (file, before) in ["t", "u"].into_iter().zip(&before) {
                    assert!(
                        read(dir, file) == *before,
                        "{format}: {file} reads as before"
                    );
                }
            }
            ours(dir, &line);
            for (file, before) in ["t", "u"].into_iter().zip(&before) {
                assert!(
                    read(dir, file) == *before,
                    "{format}: {file} reads as before"
                );
                assert_eq!(layers(dir, file), 2, "{format}");
            }
        }
    }
}

//! `vdtool fork`: an image becomes the base of an empty one that has its name.

use std::fs::{self, hard_link};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use crate::util::{Seeded, killable, rounds, scratch, vdtool};

fn ours(dir: &Path, line: &[&str]) {
    vdtool().current_dir(dir).args(line).assert().success();
}

/// Runs what fails with `code`; what it said.
fn fails(dir: &Path, line: &[&str], code: i32) -> String {
    let failed = vdtool().current_dir(dir).args(line).assert().code(code);
    String::from_utf8_lossy(&failed.get_output().stderr).into_owned()
}

/// The first MiB reads as `pattern`, the second as 9, as in `disk`.
fn reads(dir: &Path, file: &str, pattern: u8) {
    let first = format!("read -P {pattern} 0 1M");
    let rest = ["-c", "read -P 9 1M 1M", "-c", "read -P 0 2M 6M"];
    let line = [&["io", "-q", "-r", "-c", &first][..], &rest, &[file]].concat();
    ours(dir, &line);
}

/// A disk over another, each of which holds something.
fn disk(dir: &Path, format: &str, file: &str) {
    let below = format!("below.{format}");
    ours(dir, &["create", "-q", "-f", format, &below, "8M"]);
    ours(dir, &["io", "-q", "-c", "write -P 9 1M 1M", &below]);
    ours(
        dir,
        &[
            "create", "-q", "-f", format, "-b", &below, "-F", format, file,
        ],
    );
    ours(dir, &["io", "-q", "-c", "write -P 1 0 1M", file]);
}

const FORMATS: [&str; 5] = ["qcow2", "vhd", "vdi", "vhdx", "vmdk"];

#[test]
fn both_children_read_as_the_image_did_and_the_base_is_its_file() {
    for format in FORMATS {
        let dir = scratch();
        let dir = dir.path();
        disk(dir, format, "disk");
        let before = fs::metadata(dir.join("disk")).expect("is there");
        ours(dir, &["fork", "-q", "disk", "base", "test"]);
        let base = fs::metadata(dir.join("base")).expect("is there");
        assert_eq!((base.ino(), base.nlink()), (before.ino(), 1), "{format}");
        let after = fs::metadata(dir.join("disk")).expect("is there");
        assert_eq!((after.mode(), after.uid()), (before.mode(), before.uid()));
        for file in ["disk", "base", "test"] {
            reads(dir, file, 1);
        }
        ours(dir, &["io", "-q", "-c", "write -P 2 0 1M", "disk"]);
        ours(dir, &["io", "-q", "-c", "write -P 3 0 1M", "test"]);
        for (file, pattern) in [("disk", 2), ("test", 3), ("base", 1)] {
            reads(dir, file, pattern);
        }
        ours(dir, &["chain", "."]);
        // Once more: a chain.
        ours(dir, &["fork", "-q", "disk", "base2"]);
        reads(dir, "disk", 2);
        ours(dir, &["check", "disk"]);
    }
}

#[test]
fn what_cannot_be_forked_is_refused_and_nothing_is_changed() {
    let dir = scratch();
    let dir = dir.path();
    disk(dir, "qcow2", "disk");
    fs::write(dir.join("taken"), "somebody's").expect("writes");
    let before = fs::read(dir.join("disk")).expect("reads");
    for (line, code, word) in [
        (&["fork", "disk", "taken"][..], 1, "is there already"),
        (&["fork", "disk", "new", "new"], 1, "named twice"),
        (&["fork", "disk", "new", "taken"], 1, "is there already"),
        (&["fork", "below.qcow2", "new"], 1, "disk (allowed"),
        (&["fork", "absent", "new"], 1, "No such file"),
        (&["fork", "disk", "no/where"], 1, "No such file"),
        (&["fork", ".", "new"], 1, "directory"),
        (&["fork", "disk"], 2, "NEW"),
        (&["fork", "-f", "raw", "taken", "new"], 63, "raw"),
    ] {
        let said = fails(dir, line, code);
        assert!(said.contains(word), "{line:?}: {said}");
        assert!(!dir.join("new").exists(), "{line:?}");
        assert!(
            fs::read(dir.join("disk")).expect("reads") == before,
            "{line:?}"
        );
        assert_eq!(fs::read(dir.join("taken")).expect("reads"), b"somebody's");
    }
    let mut names: Vec<_> = fs::read_dir(dir)
        .expect("lists")
        .map(|e| e.expect("reads").file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["below.qcow2", "disk", "taken"]);
}

#[test]
fn a_file_that_could_be_written_to_by_another_name_is_refused() {
    let dir = scratch();
    let dir = dir.path();
    disk(dir, "vhd", "disk");
    hard_link(dir.join("disk"), dir.join("machine")).expect("links");
    for _ in 0..2 {
        let said = fails(dir, &["fork", "disk", "base"], 1);
        assert!(said.contains("hard links"), "{said}");
        reads(dir, "disk", 1);
        // Nor where a run that was killed has given it its new name.
        let _ = hard_link(dir.join("disk"), dir.join("base"));
    }
    fs::remove_file(dir.join("machine")).expect("removes");
    ours(dir, &["fork", "-q", "disk", "base"]);
    reads(dir, "disk", 1);
    // A symbolic link is followed: the file itself is forked.
    std::os::unix::fs::symlink("disk", dir.join("link")).expect("links");
    ours(dir, &["fork", "-q", "link", "base2"]);
    assert!(
        fs::symlink_metadata(dir.join("link"))
            .expect("is there")
            .is_symlink()
    );
    for file in ["disk", "link", "base2"] {
        reads(dir, file, 1);
    }
}

#[test]
fn a_new_name_that_is_the_files_own_is_refused() {
    let dir = scratch();
    let dir = dir.path();
    disk(dir, "qcow2", "disk");
    fs::create_dir(dir.join("sub")).expect("makes");
    std::os::unix::fs::symlink("disk", dir.join("link")).expect("links");
    std::os::unix::fs::symlink(".", dir.join("here")).expect("links");
    let before = fs::read(dir.join("disk")).expect("reads");
    for new in ["disk", "./disk", "sub/../disk", "link", "here/disk"] {
        for line in [&["fork", "disk", new][..], &["fork", "disk", "base", new]] {
            let said = fails(dir, line, 1);
            assert!(said.contains("is FILE itself"), "{line:?}: {said}");
            assert!(fs::read(dir.join("disk")).expect("reads") == before);
            assert!(!dir.join("base").exists());
        }
    }
    reads(dir, "disk", 1);
}

#[test]
fn an_image_that_somebody_has_open_is_refused() {
    let dir = scratch();
    let dir = dir.path();
    disk(dir, "vhd", "disk");
    let mut open = killable()
        .current_dir(dir)
        .args(["io", "-c", "write -q 0 512", "-c", "sleep 20000", "disk"])
        .stdout(Stdio::null())
        .spawn()
        .expect("runs");
    std::thread::sleep(Duration::from_millis(500));
    let said = fails(dir, &["fork", "disk", "base"], 1);
    open.kill().expect("is there");
    open.wait().expect("ends");
    assert!(said.contains("disk: "), "{said}");
    assert!(!dir.join("base").exists());
}

#[test]
fn a_base_in_another_directory_names_what_lies_below_it_from_there() {
    for format in FORMATS {
        let dir = scratch();
        let dir = dir.path();
        disk(dir, format, "disk");
        fs::create_dir(dir.join("bases")).expect("makes a directory");
        let fork = ["fork", "-q", "disk", "bases/base", "bases/test"];
        let said = fails(dir, &fork, 1);
        assert!(said.contains("--allow-ref"), "{format}: {said}");
        assert!(!dir.join("bases/base").exists());
        reads(dir, "disk", 1);
        let below = format!("below.{format}");
        // Without a name it is looked for in the directories that are allowed.
        let allow = match format {
            "vdi" => ["--allow-ref", ".", "--allow-ref", "bases"],
            _ => ["--allow-ref", &below, "--allow-ref", "bases/base"],
        };
        ours(dir, &[&fork[..], &allow].concat());
        for file in ["disk", "bases/base", "bases/test"] {
            let reads = ["-c", "read -P 1 0 1M", "-c", "read -P 9 1M 1M", file];
            ours(dir, &[&["io", "-q", "-r"][..], &allow, &reads].concat());
        }
    }
}

#[test]
fn what_a_killed_run_left_is_finished_by_the_same_command() {
    for format in FORMATS {
        let dir = scratch();
        let dir = dir.path();
        let fork = ["fork", "-q", "disk", "base", "test"];
        disk(dir, format, "disk");
        // Killed after the file had its new name.
        hard_link(dir.join("disk"), dir.join("base")).expect("links");
        ours(dir, &fork);
        // Killed before the second child.
        fs::remove_file(dir.join("test")).expect("removes");
        ours(dir, &fork);
        ours(dir, &fork);
        for file in ["disk", "base", "test"] {
            reads(dir, file, 1);
        }
        let chain = vdtool()
            .current_dir(dir)
            .args(["info", "--backing-chain", "disk"])
            .assert();
        let text = String::from_utf8_lossy(&chain.success().get_output().stdout).into_owned();
        assert_eq!(text.matches("image:").count(), 3, "{text}");
    }
    // Killed between the two names of a host without hard links.
    let dir = scratch();
    let dir = dir.path();
    disk(dir, "qcow2", "disk");
    ours(
        dir,
        &[
            "create", "-q", "-f", "qcow2", "-u", "-b", "base", "-F", "qcow2", "base", "8M",
        ],
    );
    ours(dir, &["fork", "-q", "disk", "base"]);
    reads(dir, "disk", 1);
    reads(dir, "base", 1);
}

#[test]
fn killed_at_any_moment_the_image_reads_as_before_and_the_command_ends_it() {
    let mut rng = Seeded::new("fork");
    for format in FORMATS {
        for _ in 0..rounds(8) {
            let dir = scratch();
            let dir = dir.path();
            disk(dir, format, "disk");
            let mut run = killable()
                .current_dir(dir)
                .args(["fork", "-q", "disk", "base", "test"])
                .spawn()
                .expect("runs");
            std::thread::sleep(Duration::from_micros(rng.u64(0..12_000)));
            run.kill().expect("is there");
            run.wait().expect("ends");
            reads(dir, "disk", 1);
            ours(dir, &["fork", "-q", "disk", "base", "test"]);
            for file in ["disk", "base", "test"] {
                reads(dir, file, 1);
            }
            ours(dir, &["chain", "."]);
        }
    }
}

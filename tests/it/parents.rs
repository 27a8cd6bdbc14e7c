//! Who a parent is and when it is: how images that record no path find what lies below them, and
//! what is refused because it was changed since.

use std::fs::File;
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;

use assert_cmd::assert::Assert;
use rustix::fs::{CWD, mkfifoat};
use serde_json::Value;
use tempfile::TempDir;
use vdtool::storage::open::{Access, StorageOptions, open};

use crate::util::{scratch, skipped, vdtool};

/// Where a VDI has its own identity, its state, and those of its parent.
const UUID: u64 = 392;
const STATE: u64 = 408;
const PARENT: u64 = 424;

fn run(dir: &Path, line: &str) -> Assert {
    let words = line.split_whitespace();
    vdtool().current_dir(dir).args(words).assert()
}

/// Runs what works; what it printed.
fn done(dir: &Path, line: &str) -> String {
    let output = run(dir, line).success().get_output().stdout.clone();
    String::from_utf8(output).expect("is text")
}

/// Runs what fails with `code`; what it said.
fn fails(dir: &Path, code: i32, line: &str) -> String {
    let output = run(dir, line).code(code).get_output().stderr.clone();
    String::from_utf8(output).expect("is text")
}

fn write(dir: &Path, file: &str, what: &str) {
    let words = ["io", "-q", "-c", what, file];
    vdtool().current_dir(dir).args(words).assert().success();
}

/// What the disk holds.
fn read(dir: &Path, line: &str) -> Vec<u8> {
    done(dir, &format!("convert -q -O raw {line} read.raw"));
    let bytes = std::fs::read(dir.join("read.raw")).expect("reads");
    std::fs::remove_file(dir.join("read.raw")).expect("is there");
    bytes
}

/// A fact of `info`.
fn fact(dir: &Path, file: &str, key: &str) -> Value {
    let text = done(dir, &format!("info -U --output json {file}"));
    let value: Value = serde_json::from_str(&text).expect("is JSON");
    value["format-specific"]["data"][key].clone()
}

fn who(dir: &Path, file: &str) -> Value {
    fact(dir, file, "uuid")
}

fn when(dir: &Path, file: &str) -> Value {
    fact(dir, file, "modify-uuid")
}

/// A base with a 1, a middle with a 2 and a top with a 3, each in a block of its own.
fn chain() -> TempDir {
    let home = scratch();
    let dir = home.path();
    done(dir, "create -q -f vdi base.vdi 4M");
    write(dir, "base.vdi", "write -P 1 0 4k");
    done(dir, "create -q -b base.vdi -F vdi mid.vdi");
    write(dir, "mid.vdi", "write -P 2 1M 4k");
    done(dir, "create -q -b mid.vdi -F vdi top.vdi");
    write(dir, "top.vdi", "write -P 3 2M 4k");
    home
}

fn is_chain(bytes: &[u8]) {
    assert_eq!(
        [0, 1 << 20, 2 << 20, 3 << 20].map(|at| bytes[at]),
        [1, 2, 3, 0]
    );
}

fn rename(dir: &Path, from: &str, to: &str) {
    std::fs::rename(dir.join(from), dir.join(to)).expect("moves");
}

fn copy(dir: &Path, from: &str, to: &str) {
    std::fs::copy(dir.join(from), dir.join(to)).expect("copies");
}

/// As VirtualBox has it: the children in a directory below that of the base.
fn snapshots() -> TempDir {
    let home = chain();
    let dir = home.path();
    std::fs::create_dir(dir.join("Snapshots")).expect("a directory");
    for file in ["mid.vdi", "top.vdi"] {
        rename(dir, file, &format!("Snapshots/{file}"));
    }
    home
}

fn put(dir: &Path, file: &str, at: u64, bytes: &[u8]) {
    let file = File::options().write(true).open(dir.join(file));
    file.expect("opens")
        .write_all_at(bytes, at)
        .expect("writes");
}

fn take(dir: &Path, file: &str, at: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    let file = File::open(dir.join(file)).expect("opens");
    file.read_exact_at(&mut bytes, at).expect("reads");
    bytes
}

#[test]
fn a_child_records_who_its_parent_is_and_when() {
    let home = chain();
    let dir = home.path();
    for (child, parent) in [("mid.vdi", "base.vdi"), ("top.vdi", "mid.vdi")] {
        assert_eq!(fact(dir, child, "parent-uuid"), who(dir, parent));
        assert_eq!(fact(dir, child, "parent-modify-uuid"), when(dir, parent));
    }
    done(dir, "convert -O vdi -B base.vdi -F vdi top.vdi made.vdi");
    assert_eq!(
        fact(dir, "made.vdi", "parent-modify-uuid"),
        when(dir, "base.vdi")
    );
    is_chain(&read(dir, "made.vdi"));
}

#[test]
fn a_parent_is_found_by_its_identity_whatever_it_is_called() {
    let home = chain();
    let dir = home.path();
    is_chain(&read(dir, "top.vdi"));
    rename(dir, "base.vdi", "no extension");
    rename(dir, "mid.vdi", "{mid}.VDI");
    is_chain(&read(dir, "top.vdi"));
    // From elsewhere too, and by a symbolic link.
    let elsewhere = scratch();
    symlink(dir.join("top.vdi"), elsewhere.path().join("link")).expect("links");
    is_chain(&read(elsewhere.path(), "link"));
}

#[test]
fn every_verb_that_reads_a_disk_finds_what_lies_below_it() {
    let home = snapshots();
    let dir = home.path();
    let top = "Snapshots/top.vdi";
    for line in [
        "info --backing-chain",
        "map",
        "check",
        "measure -O raw",
        "bench -c 1",
        "io -r -c length",
        "compare Snapshots/top.vdi",
        "convert -O raw",
    ] {
        let (target, code) = match line {
            "convert -O raw" => (" out.raw", 1),
            // Each has codes of its own for an image that does not open.
            "check" => ("", 2),
            line if line.starts_with("compare") => ("", 2),
            _ => ("", 1),
        };
        let said = match line {
            "check" => {
                String::from_utf8_lossy(&run(dir, &format!("{line} {top}")).get_output().stdout)
                    .into_owned()
            }
            _ => fails(dir, code, &format!("{line} {top}{target}")),
        };
        assert!(said.contains("backing file is not there"), "{line}: {said}");
        let parents = "--parent Snapshots/mid.vdi --parent base.vdi";
        let parents = match line.starts_with("compare") {
            true => format!("{parents} {parents}"),
            false => parents.to_owned(),
        };
        for how in [
            "--allow-ref .",
            "--allow-ref any",
            "--allow-ref base.vdi",
            &parents,
        ] {
            done(dir, &format!("{line} {how} {top}{target}"));
        }
    }
    done(
        dir,
        &format!("dd --allow-ref . bs=1M count=1 if={top} of=out.raw"),
    );
    // What is in no need of its parents takes none.
    done(dir, &format!("info {top}"));
}

#[test]
fn of_a_child_in_the_directory_of_virtualbox_the_message_says_what_helps() {
    let home = snapshots();
    let dir = home.path();
    let said = fails(dir, 1, "map Snapshots/top.vdi");
    assert!(said.starts_with("vdtool: Snapshots/mid.vdi: "), "{said}");
    let real = dir.canonicalize().expect("is there");
    let real = real.to_str().expect("is text");
    for words in [
        format!("--allow-ref {real} "),
        format!("--parent {real}/base.vdi "),
        "in 2 files in Snapshots);".to_owned(),
    ] {
        assert!(said.contains(&words), "{said}");
    }
    let parent = format!("--parent {real}/base.vdi");
    done(dir, &format!("map {parent} Snapshots/mid.vdi"));
    is_chain(&read(dir, &format!("--allow-ref {real} Snapshots/top.vdi")));
    for n in 0..5 {
        copy(dir, "Snapshots/top.vdi", &format!("{n}.vdi"));
    }
    let said = fails(dir, 1, "map Snapshots/top.vdi");
    assert!(said.contains("/2.vdi or one of 3 more says"), "{said}");
    // Elsewhere there is no such hint, and nothing is listed.
    rename(dir, "Snapshots", "elsewhere");
    let said = fails(dir, 1, "map elsewhere/top.vdi");
    assert!(
        !said.contains("VirtualBox") && said.contains("--parent FILE"),
        "{said}"
    );
}

#[test]
fn a_disk_beside_the_directory_for_children_finds_its_parent_in_there() {
    let home = snapshots();
    let dir = home.path();
    rename(dir, "Snapshots/top.vdi", "top.vdi");
    rename(dir, "base.vdi", "Snapshots/base.vdi");
    is_chain(&read(dir, "top.vdi"));
    // The directory is the image's own, not one that a link leads to.
    rename(dir, "Snapshots", "moved");
    let elsewhere = scratch();
    std::fs::rename(dir.join("moved"), elsewhere.path().join("moved")).expect("moves");
    symlink(elsewhere.path().join("moved"), dir.join("Snapshots")).expect("links");
    fails(dir, 1, "map top.vdi");
}

#[test]
fn a_parent_that_the_user_gives_must_be_the_one_meant() {
    let home = chain();
    let dir = home.path();
    done(dir, "create -q -f raw raw.img 4M");
    done(dir, "create -q -f vdi other.vdi 4M");
    mkfifoat(CWD, dir.join("pipe"), 0o600.into()).expect("makes a pipe");
    is_chain(&read(dir, "--parent mid.vdi --parent base.vdi top.vdi"));
    // Those that are not given are looked for.
    is_chain(&read(dir, "--parent mid.vdi top.vdi"));
    for (parents, said) in [
        ("--parent base.vdi --parent mid.vdi", "is another image"),
        ("--parent other.vdi", "is another image"),
        ("--parent raw.img", "given as the parent of top.vdi"),
        ("--parent gone.vdi", "given as the parent of top.vdi"),
        ("--parent pipe", "is a pipe"),
        ("--parent .", "is a directory"),
        ("--parent top.vdi", "a cycle"),
        ("--parent mid.vdi --parent top.vdi", "a cycle"),
        (
            "--parent mid.vdi --parent base.vdi --parent base.vdi",
            "was given 3 parents (--parent), and has 2 images below it",
        ),
    ] {
        let text = fails(dir, 1, &format!("map {parents} top.vdi"));
        assert!(text.contains(said), "{parents}: {text}");
    }
    let said = fails(dir, 1, "map --parent other.vdi base.vdi");
    assert!(
        said.contains("given 1 parents (--parent), and has 0 images"),
        "{said}"
    );
}

#[test]
fn parents_are_given_to_several_images_in_order() {
    let home = snapshots();
    let dir = home.path();
    let mid = "--parent base.vdi";
    let top = "--parent Snapshots/mid.vdi --parent base.vdi";
    let (a, b) = ("Snapshots/mid.vdi", "Snapshots/top.vdi");
    run(dir, &format!("compare {mid} {top} {a} {b}")).code(1);
    done(dir, &format!("compare {mid} {mid} {a} {a}"));
    fails(dir, 2, &format!("compare {top} {mid} {a} {b}"));
    let said = fails(dir, 1, &format!("compare {mid} {mid} {mid} {a} {a}"));
    assert!(said.contains("no image is left"), "{said}");
    let both = read(dir, &format!("{mid} {top} {a} {b}"));
    assert_eq!(both.len(), 8 << 20);
    is_chain(&both[4 << 20..]);
    fails(dir, 2, &format!("convert -O raw {mid} {mid} {a} x.raw"));
    fails(dir, 2, &format!("convert -O raw {mid} {mid} {a} -"));
    assert!(!dir.join("x.raw").exists());
    // The image below a new one comes last.
    done(
        dir,
        &format!("convert -O vdi {top} {mid} -B {a} -F vdi {b} new.vdi"),
    );
    is_chain(&read(dir, &format!("--allow-ref any {top} new.vdi")));
    done(
        dir,
        &format!("create -q {mid} -f vdi -b {a} -F vdi made.vdi"),
    );
    fails(dir, 2, &format!("create -q {mid} -f vdi lone.vdi 1M"));
    fails(dir, 2, &format!("serve --nbd unix:s {mid} a={a} b={a}"));
}

#[test]
fn a_parent_that_was_changed_since_is_refused_until_the_user_accepts_it() {
    let home = chain();
    let dir = home.path();
    let old = when(dir, "base.vdi");
    write(dir, "base.vdi", "write -P 9 3M 4k");
    let new = when(dir, "base.vdi");
    for line in [
        "map top.vdi",
        "info --backing-chain top.vdi",
        "io -c length top.vdi",
        "convert -O raw top.vdi x.raw",
        "commit top.vdi",
        "create -f vdi -b top.vdi -F vdi x.vdi",
        "resize top.vdi 8M",
        "map --parent mid.vdi --parent base.vdi top.vdi",
        "serve --nbd unix:s top.vdi",
    ] {
        let said = fails(dir, 1, line);
        for word in [&old, &new].map(|v| v.as_str().expect("is text")) {
            assert!(said.contains(word), "{line}: {said}");
        }
        assert!(said.contains("--parent-changed accept"), "{line}: {said}");
    }
    run(dir, "check top.vdi").code(2);
    done(dir, "check --parent-changed accept top.vdi");
    let bytes = read(dir, "--parent-changed accept top.vdi");
    assert_eq!(
        [0, 1 << 20, 2 << 20, 3 << 20].map(|at| bytes[at]),
        [1, 2, 3, 9]
    );
    // Its own state alone says nothing of what others may hold.
    done(dir, "info top.vdi");
    fails(dir, 2, "map --parent-changed perhaps top.vdi");
}

#[test]
fn whatever_changes_a_disk_changes_its_state_and_nothing_else_does() {
    let home = chain();
    let dir = home.path();
    let mut state = when(dir, "mid.vdi");
    let identity = who(dir, "mid.vdi");
    for what in [
        "write -P 1 1M 4k",
        "write -P 1 3M 4k",
        "write -z 0 1M",
        "write -z 1M 512",
        "write -zu 1M 1M",
        "discard 3M 1M",
    ] {
        write(dir, "mid.vdi", what);
        let now = when(dir, "mid.vdi");
        assert_ne!(now, state, "{what}");
        state = now;
    }
    done(dir, "resize -q mid.vdi 5M");
    assert_ne!(when(dir, "mid.vdi"), state);
    state = when(dir, "mid.vdi");
    for what in ["read 0 4M", "flush", "map"] {
        write(dir, "mid.vdi", what);
    }
    done(dir, "check -r all mid.vdi");
    done(dir, "info --backing-chain mid.vdi");
    assert_eq!(when(dir, "mid.vdi"), state);
    // Once a session, before the first change.
    write(dir, "mid.vdi", "read 0 512");
    vdtool()
        .current_dir(dir)
        .args([
            "io",
            "-q",
            "-c",
            "write 0 512",
            "-c",
            "flush",
            "-c",
            "write 2M 512",
            "mid.vdi",
        ])
        .assert()
        .success();
    assert_ne!(when(dir, "mid.vdi"), state);
    assert_eq!(who(dir, "mid.vdi"), identity);
}

#[test]
fn a_disk_without_identity_gets_one_at_its_first_change() {
    let home = scratch();
    let dir = home.path();
    done(dir, "create -q -f vdi a.vdi 4M");
    put(dir, "a.vdi", UUID, &[0; 32]);
    let said = fails(dir, 63, "create -f vdi -b a.vdi -F vdi b.vdi");
    assert!(said.contains("has an identity"), "{said}");
    write(dir, "a.vdi", "write 0 512");
    assert_ne!(take(dir, "a.vdi", UUID), [0; 16]);
    done(dir, "create -q -f vdi -b a.vdi -F vdi b.vdi");
    done(dir, "map b.vdi");
}

#[test]
fn two_files_with_one_identity_are_told_apart_by_state_or_by_the_user() {
    let home = chain();
    let dir = home.path();
    // Two names of one file are one.
    std::fs::hard_link(dir.join("base.vdi"), dir.join("again.vdi")).expect("links");
    is_chain(&read(dir, "top.vdi"));
    std::fs::remove_file(dir.join("again.vdi")).expect("is there");
    copy(dir, "base.vdi", "copy.vdi");
    let said = fails(dir, 1, "map top.vdi");
    for word in ["2 files", "base.vdi", "copy.vdi", "--parent"] {
        assert!(said.contains(word), "{said}");
    }
    is_chain(&read(dir, "--parent mid.vdi --parent copy.vdi top.vdi"));
    // A file that the user allows is one that he names.
    is_chain(&read(dir, "--allow-ref copy.vdi top.vdi"));
    write(dir, "copy.vdi", "write -P 9 0 4k");
    is_chain(&read(dir, "top.vdi"));
    write(dir, "base.vdi", "write -P 9 0 4k");
    for accept in ["", "--parent-changed accept"] {
        let said = fails(dir, 1, &format!("map {accept} top.vdi"));
        assert!(said.contains("2 files"), "{said}");
    }
}

/// The base in a directory of its own, and beside its children a copy of it that was changed.
fn changed_copy() -> TempDir {
    let home = chain();
    let dir = home.path();
    std::fs::create_dir(dir.join("kept")).expect("a directory");
    copy(dir, "base.vdi", "kept/base.vdi");
    write(dir, "base.vdi", "write -P 9 0 4k");
    home
}

#[test]
fn the_state_wanted_anywhere_is_better_than_another_nearby() {
    let home = changed_copy();
    let dir = home.path();
    assert!(fails(dir, 1, "map top.vdi").contains("changed since"));
    for allow in [
        "--allow-ref kept",
        "--parent-changed accept --allow-ref kept",
        "--allow-ref any --allow-ref kept",
        "--allow-ref kept/base.vdi",
    ] {
        is_chain(&read(dir, &format!("{allow} top.vdi")));
    }
    assert_eq!(read(dir, "--parent-changed accept top.vdi")[0], 9);
    // Files that may be there need not be.
    let said = fails(dir, 1, "map --allow-ref absent.vdi top.vdi");
    assert!(!said.contains("absent"), "{said}");
}

#[test]
fn a_directory_that_the_user_names_is_looked_through_however_full_the_own_one_is() {
    let home = chain();
    let dir = home.path();
    std::fs::create_dir(dir.join("kept")).expect("a directory");
    rename(dir, "base.vdi", "kept/z.vdi");
    rename(dir, "mid.vdi", "kept/y.vdi");
    for n in 0..5000 {
        File::create(dir.join(format!("a{n:04}.vdi"))).expect("makes a file");
    }
    is_chain(&read(dir, "--allow-ref kept top.vdi"));
}

#[test]
fn what_may_be_the_parent_and_is_not_looked_at_is_told() {
    let (home, elsewhere) = (chain(), scratch());
    let dir = home.path();
    let away = elsewhere.path().join("base.vdi");
    std::fs::rename(dir.join("base.vdi"), &away).expect("moves");
    symlink(&away, dir.join("base.vdi")).expect("links");
    mkfifoat(CWD, dir.join("pipe.vdi"), 0o600.into()).expect("makes a pipe");
    mkfifoat(CWD, dir.join("pipe"), 0o600.into()).expect("makes a pipe");
    let said = fails(dir, 1, "map --allow-ref pipe top.vdi");
    for word in [
        "pipe (",
        "base.vdi (a symbolic link that leads out of the directory)",
    ] {
        assert!(said.contains(word), "{word}: {said}");
    }
}

#[test]
fn a_directory_of_thousands_of_files_is_looked_through_to_a_bound() {
    let home = chain();
    let dir = home.path();
    for n in 0..5000 {
        File::create(dir.join(format!("a{n:04}.img"))).expect("makes a file");
    }
    // What is called as such images are comes first.
    is_chain(&read(dir, "top.vdi"));
    for n in 0..5000 {
        rename(dir, &format!("a{n:04}.img"), &format!("a{n:04}.vdi"));
    }
    let said = fails(dir, 1, "map top.vdi");
    assert!(said.contains("in 4096 files"), "{said}");
    assert!(said.contains("as many as are looked at"), "{said}");
    is_chain(&read(dir, "--parent mid.vdi --parent base.vdi top.vdi"));
    let said = fails(dir, 1, "map --allow-ref mid.vdi top.vdi");
    assert!(
        said.contains("mid.vdi: its backing file is not there"),
        "{said}"
    );
    is_chain(&read(
        dir,
        "--allow-ref mid.vdi --allow-ref base.vdi top.vdi",
    ));
}

#[test]
fn each_file_is_looked_at_once_for_a_chain_however_many_layers_it_has() {
    let home = scratch();
    let dir = home.path();
    done(dir, "create -q -f vdi 0.vdi 1M");
    for n in 1..100 {
        done(dir, &format!("create -q -b {}.vdi -F vdi {n}.vdi", n - 1));
    }
    // 100 layers among 4,000 files would be 400,000 looks.
    for n in 0..3900 {
        File::create(dir.join(format!("x{n}.vdi"))).expect("makes a file");
    }
    done(dir, "map 99.vdi");
    rename(dir, "0.vdi", "../0.vdi");
    let said = fails(dir, 1, "map 99.vdi");
    std::fs::remove_file(dir.join("../0.vdi")).expect("is there");
    assert!(said.contains("1.vdi: its backing file"), "{said}");
    assert!(said.contains("in 3999 files in .)"), "{said}");
}

#[test]
fn what_is_no_regular_file_of_the_directory_is_not_even_opened() {
    let (home, elsewhere) = (chain(), scratch());
    let dir = home.path();
    let away = elsewhere.path().join("base.vdi");
    std::fs::rename(dir.join("base.vdi"), &away).expect("moves");
    symlink(&away, dir.join("base.vdi")).expect("links");
    mkfifoat(CWD, dir.join("a.vdi"), 0o600.into()).expect("makes a pipe");
    std::fs::create_dir(dir.join("b.vdi")).expect("a directory");
    std::fs::create_dir(dir.join("sub")).expect("a directory");
    std::fs::copy(&away, dir.join("sub/base.vdi")).expect("copies");
    let said = fails(dir, 1, "map top.vdi");
    assert!(said.contains("in 2 files"), "{said}");
    is_chain(&read(
        dir,
        &format!("--allow-ref {} top.vdi", away.display()),
    ));
    is_chain(&read(dir, "--allow-ref sub top.vdi"));
}

#[test]
fn hostile_files_in_the_directory_are_passed_over() {
    let home = chain();
    let dir = home.path();
    let base = std::fs::read(dir.join("base.vdi")).expect("reads");
    for (name, at, bytes) in [
        // A file of one sector whose map has 4 Gi entries; blocks of 2 GiB; a version to come.
        ("a1.vdi", 384, u32::MAX),
        ("a2.vdi", 376, 1 << 31),
        ("a3.vdi", 68, 0x0002_0000),
        ("a4.vdi", 340, u32::MAX),
    ] {
        let mut bad = base[..512].to_vec();
        bad[at..at + 4].copy_from_slice(&bytes.to_le_bytes());
        std::fs::write(dir.join(name), bad).expect("writes");
    }
    std::fs::write(dir.join("a5.vdi"), &base[..100]).expect("writes");
    std::fs::write(dir.join("a6.vdi"), "").expect("writes");
    File::create(dir.join("a7.vdi"))
        .and_then(|f| f.set_len(1 << 40))
        .expect("makes a file");
    is_chain(&read(dir, "top.vdi"));
}

#[test]
fn a_child_that_is_its_own_parent_is_a_cycle() {
    let home = chain();
    let dir = home.path();
    std::fs::create_dir(dir.join("d")).expect("a directory");
    rename(dir, "top.vdi", "d/own.vdi");
    let own = take(dir, "d/own.vdi", UUID);
    put(dir, "d/own.vdi", PARENT, &own);
    let said = fails(dir, 1, "map d/own.vdi");
    assert!(said.contains("a cycle"), "{said}");
    // A copy of it names the copy, whose parent is the first again.
    copy(dir, "d/own.vdi", "d/copy.vdi");
    let said = fails(dir, 1, "map --parent-changed accept d/own.vdi");
    assert!(said.contains("a cycle"), "{said}");
}

#[test]
fn a_child_without_an_identity_of_its_parent_reads_what_it_is_given() {
    let home = chain();
    let dir = home.path();
    put(dir, "mid.vdi", PARENT, &[0; 32]);
    let said = fails(dir, 1, "map mid.vdi");
    assert!(said.contains("--parent"), "{said}");
    done(dir, "map --parent base.vdi mid.vdi");
    is_chain(&read(dir, "--parent mid.vdi --parent base.vdi top.vdi"));
    // In a disk that has a state alone, it still holds.
    put(dir, "mid.vdi", PARENT + 16, &take(dir, "top.vdi", STATE));
    let said = fails(dir, 1, "map --parent base.vdi mid.vdi");
    assert!(said.contains("was changed since"), "{said}");
}

#[test]
fn a_parent_of_another_user_is_not_looked_at_where_the_format_was_guessed() {
    let home = chain();
    let dir = home.path();
    if std::os::unix::fs::chown(dir.join("base.vdi"), Some(12345), None).is_err() {
        skipped("files cannot be given away here");
        return;
    }
    let said = fails(dir, 1, "map top.vdi");
    assert!(said.contains("in 2 files"), "{said}");
    assert!(said.contains("base.vdi (user 12345's"), "{said}");
    done(dir, "map -f vdi top.vdi");
    done(dir, "map --allow-ref base.vdi top.vdi");
    done(dir, "map --parent mid.vdi --parent base.vdi top.vdi");
}

#[test]
fn a_parent_is_looked_at_without_a_lock_and_read_with_one() {
    let home = chain();
    let dir = home.path();
    let options = StorageOptions {
        access: Access::Write,
        ..StorageOptions::default()
    };
    let writer = open(&dir.join("base.vdi"), &options).expect("opens");
    let said = fails(dir, 1, "map top.vdi");
    assert!(said.contains("vdtool: base.vdi: "), "{said}");
    done(dir, "map -U top.vdi");
    drop(writer);
    done(dir, "map top.vdi");
}

#[test]
fn commit_brings_the_record_of_the_child_up_to_date() {
    let home = chain();
    let dir = home.path();
    let before = when(dir, "mid.vdi");
    let said = run(dir, "commit top.vdi").success();
    assert!(!String::from_utf8_lossy(&said.get_output().stderr).contains("is not emptied"));
    assert_ne!(when(dir, "mid.vdi"), before);
    assert_eq!(
        fact(dir, "top.vdi", "parent-modify-uuid"),
        when(dir, "mid.vdi")
    );
    is_chain(&read(dir, "top.vdi"));
    is_chain(&read(dir, "mid.vdi"));
    write(dir, "top.vdi", "write -P 3 2M 4k");
    done(dir, "commit -b base.vdi top.vdi");
    is_chain(&read(dir, "base.vdi"));
    is_chain(&read(dir, "top.vdi"));
    done(dir, "commit -d mid.vdi");
    is_chain(&read(dir, "top.vdi"));
    // One that the base was changed under is committed once the user accepts that.
    write(dir, "base.vdi", "write -P 1 0 4k");
    fails(dir, 1, "commit mid.vdi");
    done(dir, "commit --parent-changed accept mid.vdi");
    is_chain(&read(dir, "top.vdi"));
}

#[test]
fn commit_finds_base_and_child_where_the_user_says() {
    let home = snapshots();
    let dir = home.path();
    let top = "Snapshots/top.vdi";
    fails(dir, 1, &format!("commit {top}"));
    let parents = "--parent Snapshots/mid.vdi --parent base.vdi";
    done(dir, &format!("commit -b base.vdi {parents} {top}"));
    is_chain(&read(dir, "base.vdi"));
    is_chain(&read(dir, &format!("--allow-ref . {top}")));
}

#[test]
fn rebase_gives_another_parent_or_none_and_the_disk_reads_the_same() {
    let home = chain();
    let dir = home.path();
    done(dir, "rebase -b base.vdi -F vdi top.vdi");
    assert_eq!(fact(dir, "top.vdi", "parent-uuid"), who(dir, "base.vdi"));
    std::fs::remove_file(dir.join("mid.vdi")).expect("is there");
    is_chain(&read(dir, "top.vdi"));
    done(dir, "check top.vdi");
    // The state alone, of a parent that was changed and is taken as it is.
    write(dir, "base.vdi", "write -P 1 0 4k");
    fails(dir, 1, "map top.vdi");
    done(dir, "rebase -u -b base.vdi -F vdi top.vdi");
    is_chain(&read(dir, "top.vdi"));
    run(dir, "rebase -b").code(2);
    vdtool()
        .current_dir(dir)
        .args(["rebase", "-b", "", "top.vdi"])
        .assert()
        .success();
    assert_eq!(fact(dir, "top.vdi", "subformat"), "dynamic");
    std::fs::remove_file(dir.join("base.vdi")).expect("is there");
    is_chain(&read(dir, "top.vdi"));
    done(dir, "check top.vdi");
    // What has none gets none: its free blocks would show what the new one has there.
    done(dir, "create -q -f vdi full.vdi 4M");
    write(dir, "full.vdi", "write -P 7 0 4M");
    fails(dir, 63, "rebase -b full.vdi -F vdi top.vdi");
    is_chain(&read(dir, "top.vdi"));
    // What has one hides it where it had zeroes.
    done(dir, "create -q -f vdi low.vdi 4M");
    done(dir, "create -q -b low.vdi -F vdi high.vdi");
    write(dir, "high.vdi", "write -P 1 0 4k");
    done(dir, "rebase -b full.vdi -F vdi high.vdi");
    let bytes = read(dir, "high.vdi");
    assert_eq!([0, 4096, 1 << 20].map(|at| bytes[at]), [1, 0, 0]);
    for (kind, target) in [("-f raw", "r.img"), ("-f vdi -o subformat=fixed", "f.vdi")] {
        done(dir, &format!("create -q {kind} {target} 4M"));
    }
    fails(dir, 63, "rebase -b r.img -F raw high.vdi");
    fails(dir, 63, "rebase -b full.vdi -F vdi f.vdi");
    is_chain(&read(dir, "top.vdi"));
}

#[test]
fn a_parent_whose_path_is_recorded_is_given_when_it_was_moved() {
    let home = scratch();
    let dir = home.path();
    for format in ["vhd", "qcow2"] {
        let [base, child, moved] = ["base", "child", "moved"].map(|n| format!("{n}.{format}"));
        done(dir, &format!("create -q -f {format} {base} 4M"));
        write(dir, &base, "write -P 1 0 4k");
        done(
            dir,
            &format!("create -q -f {format} -b {base} -F {format} {child}"),
        );
        rename(dir, &base, &moved);
        let said = fails(dir, 1, &format!("map {child}"));
        assert!(said.contains("--parent says where it is"), "{said}");
        done(dir, &format!("create -q -f {format} other.{format} 4M"));
        let parent = format!("--parent {moved}");
        assert_eq!(read(dir, &format!("{parent} {child}"))[0], 1);
        // It wins over the name.
        copy(dir, &format!("other.{format}"), &base);
        assert_eq!(read(dir, &format!("{parent} {child}"))[0], 1);
        if format == "vhd" {
            let said = fails(dir, 1, &format!("map --parent other.vhd {child}"));
            assert!(said.contains("is another image"), "{said}");
        }
        // No state is recorded, and nothing is refused for what changed.
        write(dir, &moved, "write -P 2 0 4k");
        assert_eq!(read(dir, &format!("{parent} {child}"))[0], 2);
    }
    assert!(fact(dir, "child.vhd", "parent-modified").is_string());
}

#[test]
fn an_image_that_was_guessed_below_another_has_its_parent_only_where_the_user_says_so() {
    let home = chain();
    let dir = home.path();
    done(dir, "create -q -f qcow2 -b top.vdi -F vdi q.qcow2");
    is_chain(&read(dir, "q.qcow2"));
    // As others do, with no format of what lies below.
    done(dir, "amend -o backing_file=top.vdi,backing_fmt= q.qcow2");
    let said = fails(dir, 1, "map q.qcow2");
    assert!(said.contains("--backing-format"), "{said}");
    is_chain(&read(dir, "--backing-format vdi q.qcow2"));
}

#[test]
fn who_reads_through_a_layer_that_a_commit_changed_is_refused() {
    let dir = scratch();
    let dir = dir.path();
    done(dir, "create -q -f vdi a.vdi 4M");
    write(dir, "a.vdi", "write -P 1 0 4M");
    for (base, child) in [("a", "b"), ("b", "c"), ("b", "c2")] {
        done(
            dir,
            &format!("create -q -f vdi -b {base}.vdi -F vdi {child}.vdi"),
        );
        write(dir, &format!("{child}.vdi"), "write -P 2 1M 1M");
    }
    write(dir, "c.vdi", "write -P 3 2M 1M");
    let before = read(dir, "c.vdi");
    done(dir, "commit -q -b a.vdi c.vdi");
    assert!(
        read(dir, "c.vdi") == before,
        "what was committed reads as before"
    );
    assert!(fails(dir, 1, "convert -O raw c2.vdi x.raw").contains("changed since"));
}

#[test]
fn a_rebase_that_keeps_the_disk_keeps_its_children_and_an_unsafe_one_does_not() {
    let dir = scratch();
    let dir = dir.path();
    done(dir, "create -q -f vdi a.vdi 4M");
    write(dir, "a.vdi", "write -P 1 0 4M");
    done(dir, "create -q -f vdi -b a.vdi -F vdi b.vdi");
    done(dir, "create -q -f vdi -b b.vdi -F vdi c.vdi");
    let before = read(dir, "c.vdi");
    done(dir, "create -q -f vdi other.vdi 4M");
    done(dir, "rebase -b other.vdi -F vdi b.vdi");
    assert!(read(dir, "c.vdi") == before);
    done(dir, "rebase -u -b a.vdi -F vdi b.vdi");
    assert!(fails(dir, 1, "convert -O raw c.vdi x.raw").contains("changed since"));
}

#[test]
fn a_child_has_blocks_as_large_as_its_parents_unless_it_is_told_otherwise() {
    let home = scratch();
    let dir = home.path();
    done(dir, "create -q -f vdi -o block_size=64k base.vdi 4M");
    done(dir, "create -q -f vdi -b base.vdi -F vdi child.vdi");
    assert_eq!(fact(dir, "child.vdi", "block-size"), 64 << 10);
    done(
        dir,
        "create -q -f vdi -b base.vdi -F vdi -o block_size=2M other.vdi",
    );
    assert_eq!(fact(dir, "other.vdi", "block-size"), 2 << 20);
    done(dir, "convert -O vdi -B base.vdi -F vdi child.vdi made.vdi");
    assert_eq!(fact(dir, "made.vdi", "block-size"), 64 << 10);
}

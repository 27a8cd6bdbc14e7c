//! What cannot be done: one clear line, the right exit code, nothing left, nothing changed.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use vdtool::ErrorKind;
use vdtool::chain::open::{ChainOptions, open};
use vdtool::image::open::WriteOrder;
use vdtool::storage::open::Access;

use crate::layers::{Disk, LayerSpec, Place};
use crate::mutate::put_checksum;
use crate::util::{peer, requires, scratch, skipped, vdtool};

/// Runs vdtool, which must fail with `code` and say so in one line that names `part`.
fn fails(directory: &Path, arguments: &[&str], code: i32, part: &str) {
    let done = vdtool().current_dir(directory).args(arguments).assert();
    let done = done.code(code);
    one_line(&done.get_output().stderr, part, &format!("{arguments:?}"));
}

fn one_line(stderr: &[u8], part: &str, what: &str) {
    let text = String::from_utf8_lossy(stderr);
    assert_eq!(text.lines().count(), 1, "{what}: {text}");
    assert!(text.starts_with("vdtool: "), "{what}: {text}");
    assert!(text.contains(part), "{what}: wanted '{part}' in: {text}");
}

fn works(directory: &Path, arguments: &[&str]) {
    vdtool()
        .current_dir(directory)
        .args(arguments)
        .assert()
        .success();
}

/// What lies in a directory, by name.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("reads");
    let name = |e: std::io::Result<fs::DirEntry>| {
        e.expect("reads").file_name().to_string_lossy().into_owned()
    };
    let mut names: Vec<String> = entries.map(name).collect();
    names.sort();
    names
}

#[test]
fn what_is_no_file_or_device_is_refused_by_every_command() {
    let scratch = scratch();
    let directory = scratch.path();
    fs::create_dir(directory.join("folder")).expect("creates");
    peer("mkfifo", directory, ["pipe"]);
    symlink("nowhere", directory.join("dangling")).expect("links");
    for name in ["missing", "folder", "pipe", "dangling", "/dev/null"] {
        for command in ["info", "map", "check"] {
            fails(directory, &[command, name], 1, name);
        }
        fails(directory, &["convert", name, "out.raw"], 1, name);
        fails(directory, &["compare", name, name], 2, name);
        fails(directory, &["resize", name, "1M"], 1, name);
        fails(directory, &["io", "-c", "read 0 512", name], 1, name);
    }
    assert_eq!(names(directory), ["dangling", "folder", "pipe"]);
}

#[test]
fn a_target_that_cannot_be_made_leaves_nothing() {
    let scratch = scratch();
    let directory = scratch.path();
    fs::create_dir(directory.join("folder")).expect("creates");
    fs::write(directory.join("a.raw"), [7; 5000]).expect("writes");
    for (target, part) in [
        ("folder", "folder"),
        ("missing/b.raw", "missing"),
        ("/proc/b.raw", "/proc"),
        ("a.raw/b.raw", "a.raw"),
    ] {
        let convert = ["convert", "-O", "raw", "a.raw", target];
        fails(directory, &convert, 1, part);
        fails(directory, &["create", "-f", "vhd", target, "1M"], 1, part);
    }
    assert_eq!(names(directory), ["a.raw", "folder"]);
    assert_eq!(fs::read(directory.join("a.raw")).expect("reads"), [7; 5000]);
}

#[test]
fn a_directory_without_write_permission_is_left_alone() {
    let scratch = scratch();
    let directory = scratch.path();
    let locked = directory.join("locked");
    fs::create_dir(&locked).expect("creates");
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o555)).expect("sets");
    if fs::write(locked.join("probe"), []).is_ok() {
        skipped("this user may write everywhere");
        return;
    }
    fs::write(directory.join("a.raw"), [7; 5000]).expect("writes");
    fails(directory, &["convert", "a.raw", "locked/b.raw"], 1, "b.raw");
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o755)).expect("sets");
    assert_eq!(names(&locked), Vec::<String>::new());
}

/// A source with more data than the limits below let through.
fn megabytes(path: &Path) {
    let bytes: Vec<u8> = (0..4 << 20).map(|i: u32| i.to_le_bytes()[1] | 1).collect();
    fs::write(path, bytes).expect("writes");
}

#[test]
fn a_convert_that_hits_the_limit_of_file_sizes_leaves_nothing() {
    let scratch = scratch();
    let directory = scratch.path();
    megabytes(&directory.join("a.raw"));
    fs::write(directory.join("old.raw"), b"old").expect("writes");
    let vdtool = env!("CARGO_BIN_EXE_vdtool");
    for (format, target) in [("raw", "b.raw"), ("vhd", "b.vhd"), ("raw", "old.raw")] {
        let script = format!(
            "trap '' XFSZ; ulimit -f 2000; exec {vdtool} convert -O {format} a.raw {target}"
        );
        let output = Command::new("sh")
            .args(["-c", &script])
            .current_dir(directory)
            .output()
            .expect("the shell starts");
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        one_line(&output.stderr, target, &script);
    }
    assert_eq!(names(directory), ["a.raw", "old.raw"]);
    assert_eq!(fs::read(directory.join("old.raw")).expect("reads"), b"old");
}

#[test]
fn a_convert_to_a_full_file_system_leaves_nothing() {
    let scratch = scratch();
    let directory = scratch.path();
    let mount = directory.join("small");
    fs::create_dir(&mount).expect("creates");
    megabytes(&directory.join("a.raw"));
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1m", "none"])
        .arg(&mount)
        .stderr(Stdio::null())
        .status();
    if !mounted.is_ok_and(|s| s.success()) {
        skipped("no tmpfs can be mounted here");
        return;
    }
    let result = std::panic::catch_unwind(|| {
        for (format, target) in [("raw", "small/b.raw"), ("vhd", "small/b.vhd")] {
            let command = ["convert", "-O", format, "a.raw", target];
            fails(directory, &command, 1, target);
            assert_eq!(names(&mount), Vec::<String>::new(), "{target}");
        }
    });
    peer("umount", directory, [&mount]);
    result.expect("nothing was left");
}

#[test]
fn a_truncated_vhd_is_refused_and_left_as_it_is() {
    let scratch = scratch();
    let directory = scratch.path();
    works(directory, &["create", "-f", "vhd", "x.vhd", "8M"]);
    works(directory, &["io", "-c", "write -P 1 0 5M", "x.vhd"]);
    let bytes = fs::read(directory.join("x.vhd")).expect("reads");
    for length in [100, 511, 512, 1000, 1536, 2000] {
        fs::write(directory.join("cut.vhd"), &bytes[..length]).expect("writes");
        fails(
            directory,
            &["convert", "-f", "vhd", "cut.vhd", "out.raw"],
            1,
            "cut.vhd",
        );
        fails(
            directory,
            &["io", "-f", "vhd", "-c", "write 0 512", "cut.vhd"],
            1,
            "cut.vhd",
        );
        let now = fs::read(directory.join("cut.vhd")).expect("reads");
        assert!(now == bytes[..length], "cut to {length}: changed");
    }
    // The table is whole and says that there are blocks, but they are gone.
    let length = bytes.len() / 2;
    fs::write(directory.join("cut.vhd"), &bytes[..length]).expect("writes");
    fails(
        directory,
        &["convert", "-f", "vhd", "cut.vhd", "out.raw"],
        1,
        "cut.vhd",
    );
    assert_eq!(names(directory), ["cut.vhd", "x.vhd"]);
}

#[test]
fn a_cycle_of_parents_is_refused() {
    let scratch = scratch();
    let directory = scratch.path();
    works(directory, &["create", "-f", "vhd", "base.vhd", "1M"]);
    works(
        directory,
        &["create", "-f", "vhd", "-b", "base.vhd", "a.vhd"],
    );
    works(directory, &["create", "-f", "vhd", "-b", "a.vhd", "b.vhd"]);
    // The parent of `a` is now `b`, under the name and with the identity that it wants.
    let b = fs::read(directory.join("b.vhd")).expect("reads");
    let mut a = fs::read(directory.join("a.vhd")).expect("reads");
    a[512 + 40..512 + 56].copy_from_slice(&b[68..84]);
    put_checksum(&mut a[512..512 + 1024], 36);
    fs::write(directory.join("a.vhd"), a).expect("writes");
    fs::rename(directory.join("b.vhd"), directory.join("base.vhd")).expect("renames");
    for name in ["a.vhd", "base.vhd"] {
        fails(directory, &["convert", name, "out.raw"], 1, ".vhd");
        fails(directory, &["map", name], 1, ".vhd");
        fails(directory, &["info", "--backing-chain", name], 1, ".vhd");
    }
    works(directory, &["info", "a.vhd"]);
    assert_eq!(names(directory), ["a.vhd", "base.vhd"]);
}

#[test]
fn a_parent_that_is_another_image_is_refused() {
    let scratch = scratch();
    let directory = scratch.path();
    works(directory, &["create", "-f", "vhd", "base.vhd", "1M"]);
    works(
        directory,
        &["create", "-f", "vhd", "-b", "base.vhd", "a.vhd"],
    );
    fs::remove_file(directory.join("base.vhd")).expect("removes");
    fails(directory, &["convert", "a.vhd", "out.raw"], 1, "base.vhd");
    works(directory, &["create", "-f", "vhd", "base.vhd", "1M"]);
    fails(directory, &["convert", "a.vhd", "out.raw"], 1, "base.vhd");
    assert_eq!(names(directory), ["a.vhd", "base.vhd"]);
}

#[test]
fn a_chain_of_five_hundred_links_works_and_a_longer_one_is_refused() {
    let spec = LayerSpec {
        format: "vhd",
        options: "block_size=4k",
        size: 1 << 20,
    };
    let mut disk = Disk::create(Place::Files, &[spec]);
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    chain.write_at(b"at the bottom", 777).expect("writes");
    chain.close().expect("closes");
    drop(chain);
    (0..500).for_each(|_| disk.push(&spec));
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    let mut found = [0; 13];
    chain.read_at(&mut found, 777).expect("reads");
    assert_eq!(&found, b"at the bottom");
    chain.write_at(b"on", 777).expect("writes");
    chain.read_at(&mut found, 777).expect("reads");
    assert_eq!(&found, b"on the bottom");
    drop(chain);
    disk.push(&spec);
    let error = open(&disk.path(), &ChainOptions::read()).expect_err("too deep");
    assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
    assert!(error.to_string().contains("501"), "{error}");
}

#[test]
fn a_parent_outside_the_directory_is_refused_until_it_is_allowed() {
    let scratch = scratch();
    let directory = scratch.path();
    fs::create_dir(directory.join("inside")).expect("creates");
    works(directory, &["create", "-f", "vhd", "base.vhd", "1M"]);
    let create = ["create", "-f", "vhd", "-b", "../base.vhd", "inside/a.vhd"];
    let allowed = ["--allow-ref", "base.vhd"];
    works(directory, &[&create[..], &allowed[..]].concat());
    fails(directory, &["map", "inside/a.vhd"], 1, "--allow-ref");
    works(directory, &["info", "inside/a.vhd"]);
    works(
        directory,
        &[&["map", "inside/a.vhd"][..], &allowed[..]].concat(),
    );
    works(directory, &["map", "--allow-ref", "any", "inside/a.vhd"]);
    // A link inside that leads outside is no way round.
    symlink("../base.vhd", directory.join("inside/base.vhd")).expect("links");
    let create = ["create", "-f", "vhd", "-b", "base.vhd", "inside/b.vhd"];
    let create = [&create[..], &["--allow-ref", "any"][..]].concat();
    works(directory, &create);
    fails(directory, &["map", "inside/b.vhd"], 1, "--allow-ref");
}

#[test]
fn sizes_that_a_vhd_cannot_have_are_refused() {
    let scratch = scratch();
    let directory = scratch.path();
    for size in ["2041G", "2040.5G", "8191P", "16E", "18446744073709551615"] {
        let create = vdtool()
            .current_dir(directory)
            .args(["create", "-f", "vhd", "x.vhd", size])
            .assert()
            .failure();
        let text = String::from_utf8_lossy(&create.get_output().stderr).into_owned();
        assert!(!text.contains("panicked"), "{size}: {text}");
    }
    assert_eq!(names(directory), Vec::<String>::new());
    works(directory, &["create", "-f", "vhd", "x.vhd", "2040G"]);
    fails(directory, &["resize", "x.vhd", "+512"], 1, "x.vhd");
    works(directory, &["check", "x.vhd"]);
}

/// A header that claims tables and blocks of any size is answered at once, in little memory.
#[test]
fn hostile_headers_take_little_memory_and_time() {
    if !requires("timeout") {
        return;
    }
    let scratch = scratch();
    let directory = scratch.path();
    works(directory, &["create", "-f", "vhd", "x.vhd", "2040G"]);
    let image = fs::read(directory.join("x.vhd")).expect("reads");
    let sizes = [1 << 20, 2040 << 30, 1 << 62, !511];
    for size in sizes {
        for entries in [1, 1 << 20, (1 << 31) - 1, u32::MAX] {
            for block in [512_u32, 2 << 20, 1 << 31] {
                let mut bytes = image.clone();
                hostile(&mut bytes, size, entries, block);
                fs::write(directory.join("bad.vhd"), &bytes).expect("writes");
                // Tables past the end of the file would be too easy to refuse.
                let file = fs::OpenOptions::new()
                    .write(true)
                    .open(directory.join("bad.vhd"))
                    .expect("opens");
                file.set_len(3 << 30).expect("grows");
                bounded(directory, "info");
                bounded(directory, "check");
                bounded(directory, "map");
                bounded(directory, "io -r -c 'read 0 4096'");
            }
        }
    }
}

fn hostile(bytes: &mut [u8], size: u64, entries: u32, block: u32) {
    bytes[40..48].copy_from_slice(&size.to_be_bytes());
    bytes[48..56].copy_from_slice(&size.to_be_bytes());
    put_checksum(&mut bytes[..512], 64);
    let header = &mut bytes[512..512 + 1024];
    header[28..32].copy_from_slice(&entries.to_be_bytes());
    header[32..36].copy_from_slice(&block.to_be_bytes());
    put_checksum(header, 36);
}

/// Runs a command with 20 seconds and 256 MiB of address space, in which it must end by itself.
fn bounded(directory: &Path, command: &str) {
    let vdtool = env!("CARGO_BIN_EXE_vdtool");
    let (verb, rest) = command.split_once(' ').unwrap_or((command, ""));
    let script = format!(
        "ulimit -v 262144; exec timeout 20 {vdtool} {verb} --no-mmap -f vhd {rest} bad.vhd"
    );
    let output = Command::new("sh")
        .args(["-c", &script])
        .current_dir(directory)
        .stdin(Stdio::null())
        .output()
        .expect("the shell starts");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let ended = matches!(output.status.code(), Some(0..=3 | 63));
    assert!(ended, "{command}: {:?}: {text}", output.status);
    assert!(!text.contains("panicked"), "{command}: {text}");
}

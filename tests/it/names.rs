//! Names are bytes, from the command line to the host and back.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use serde_json::Value;
use tempfile::TempDir;

use crate::util::{peer, requires, scratch, vdtool};

/// A line of arguments, in which `@` stands for a byte that no UTF-8 has.
fn line(words: &[&str]) -> Vec<OsString> {
    let word = |word: &&str| {
        let bytes = word.bytes().map(|b| if b == b'@' { 0xe9 } else { b });
        OsString::from_vec(bytes.collect())
    };
    words.iter().map(word).collect()
}

fn ours(dir: &TempDir, words: &[&str]) -> assert_cmd::assert::Assert {
    vdtool().current_dir(dir).args(line(words)).assert()
}

fn said(done: &assert_cmd::assert::Assert) -> String {
    let output = done.get_output();
    let bytes = [&*output.stdout, &*output.stderr].concat();
    String::from_utf8(bytes).expect("is UTF-8, whatever is named")
}

/// A scratch directory with `caf@.raw` in it, and, beside it, the file whose name looks like it.
fn bench() -> TempDir {
    let dir = scratch();
    let name = OsStr::from_bytes(b"caf\xe9.raw");
    std::fs::write(dir.path().join(name), [7; 65536]).expect("has room");
    std::fs::write(dir.path().join("caf\u{fffd}.raw"), [8; 65536]).expect("has room");
    dir
}

/// What every command makes of `a.qcow2`, which lies upon `caf@.raw`.
fn every_command_takes(dir: &TempDir) {
    let lines: [&[&str]; 8] = [
        &["info", "--backing-chain", "a.qcow2"],
        &["check", "a.qcow2"],
        &["map", "a.qcow2"],
        &["convert", "-q", "-O", "raw", "a.qcow2", "out@.raw"],
        &["compare", "-q", "-f", "raw", "caf@.raw", "out@.raw"],
        &["snapshot", "-l", "a.qcow2"],
        &["io", "-r", "-c", "read -P 7 0 64k", "a.qcow2"],
        &["rebase", "-u", "-b", "./caf@.raw", "-F", "raw", "a.qcow2"],
    ];
    for line in lines {
        ours(dir, line).success();
    }
    ours(dir, &["io", "-r", "-c", "read -P 7 0 64k", "a.qcow2"]).success();
    let text = said(&ours(dir, &["info", "a.qcow2"]).success());
    assert!(text.contains("./caf\\xE9.raw"), "{text}");
    let json = said(&ours(dir, &["info", "--output", "json", "a.qcow2"]).success());
    let json: Value = serde_json::from_str(&json).expect("is JSON");
    assert_eq!(json["backing-filename"], "./caf\u{fffd}.raw");
}

#[test]
fn a_backing_file_whose_name_is_not_utf_8_is_found_and_named() {
    let dir = bench();
    let create = [
        "create", "-f", "qcow2", "-b", "caf@.raw", "-F", "raw", "a.qcow2",
    ];
    let text = said(&ours(&dir, &create).success());
    assert!(text.contains("backing_file=caf\\xE9.raw"), "{text}");
    every_command_takes(&dir);
    let options = "backing_file=caf@.raw,backing_fmt=raw";
    ours(
        &dir,
        &["create", "-q", "-f", "qcow2", "-o", options, "a.qcow2"],
    )
    .success();
    every_command_takes(&dir);
    ours(&dir, &["amend", "-o", options, "a.qcow2"]).success();
    every_command_takes(&dir);
    ours(&dir, &["rebase", "-b", "", "a.qcow2"]).success();
    ours(&dir, &["rebase", "-b", "caf@.raw", "-F", "raw", "a.qcow2"]).success();
    every_command_takes(&dir);
    let convert = [
        "convert", "-q", "-O", "qcow2", "-B", "caf@.raw", "-F", "raw",
    ];
    ours(&dir, &[&convert[..], &["caf@.raw", "a.qcow2"]].concat()).success();
    every_command_takes(&dir);
    // A base is found by that name, too.
    ours(&dir, &["io", "-c", "write -P 9 0 512", "a.qcow2"]).success();
    ours(&dir, &["commit", "-q", "-b", "./caf@.raw", "a.qcow2"]).success();
    ours(
        &dir,
        &["io", "-r", "-f", "raw", "-c", "read -P 9 0 512", "caf@.raw"],
    )
    .success();
    let other = std::fs::read(dir.path().join("caf\u{fffd}.raw")).expect("reads");
    assert_eq!(other, [8; 65536]);
}

#[test]
fn images_of_qemu_with_such_names_are_read_and_ours_by_qemu() {
    if !requires("qemu-img") {
        return;
    }
    let dir = bench();
    let create = [
        "create", "-q", "-f", "qcow2", "-b", "caf@.raw", "-F", "raw", "a.qcow2",
    ];
    peer("qemu-img", dir.path(), line(&create));
    every_command_takes(&dir);
    ours(&dir, &create).success();
    let same = ["compare", "-F", "raw", "a.qcow2", "caf@.raw"];
    peer("qemu-img", dir.path(), line(&same));
    let create = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "data_file=d@",
        "b.qcow2",
        "1M",
    ];
    peer("qemu-img", dir.path(), line(&create));
    ours(&dir, &["io", "-c", "write -P 3 0 64k", "b.qcow2"]).success();
    let text = |tool: &str| match tool {
        "qemu-img" => peer(tool, dir.path(), ["info", "--output=json", "a.qcow2"]),
        _ => said(&ours(&dir, &["info", "--output", "json", "a.qcow2"]).success()),
    };
    let name = |tool: &str| {
        let value: Value = serde_json::from_str(&text(tool)).expect("is JSON");
        value["backing-filename"].clone()
    };
    assert_eq!(name("qemu-img"), name("vdtool"));
}

#[test]
fn a_data_file_whose_name_is_not_utf_8_is_that_file_and_no_other() {
    let dir = scratch();
    let create = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "data_file=d@",
        "b.qcow2",
        "1M",
    ];
    ours(&dir, &create).success();
    ours(&dir, &["io", "-c", "write -P 3 0 64k", "b.qcow2"]).success();
    let data = std::fs::read(dir.path().join(OsStr::from_bytes(b"d\xe9"))).expect("reads");
    assert_eq!(&data[..65536], [3; 65536]);
    assert!(!dir.path().join("d\u{fffd}").exists());
    let convert = [
        "convert",
        "-q",
        "-O",
        "qcow2",
        "-o",
        "data_file=e@",
        "b.qcow2",
        "c.qcow2",
    ];
    ours(&dir, &convert).success();
    ours(&dir, &["compare", "-q", "b.qcow2", "c.qcow2"]).success();
    ours(&dir, &["amend", "-o", "data_file=e@", "b.qcow2"]).success();
    ours(&dir, &["io", "-r", "-c", "read -P 3 0 64k", "b.qcow2"]).success();
    std::fs::remove_file(dir.path().join(OsStr::from_bytes(b"e\xe9"))).expect("removes");
    let text = said(&ours(&dir, &["io", "-r", "-c", "read 0 512", "b.qcow2"]).code(1));
    assert!(
        text.contains("b.qcow2: names 'e\\xE9' as its data file, which is not there"),
        "{text}"
    );
}

#[test]
fn snapshots_and_bitmaps_are_told_apart_by_bytes() {
    let dir = scratch();
    ours(&dir, &["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]).success();
    let lookalike = "s\u{fffd}";
    for name in ["s@", lookalike] {
        ours(&dir, &["snapshot", "-c", name, "a.qcow2"]).success();
        ours(&dir, &["bitmap", "--add", "a.qcow2", name]).success();
    }
    let text = said(&ours(&dir, &["snapshot", "-l", "a.qcow2"]).success());
    assert!(
        text.contains("s\\xE9 ") && text.contains(lookalike),
        "{text}"
    );
    ours(
        &dir,
        &["convert", "-q", "-O", "raw", "-l", "s@", "a.qcow2", "x"],
    )
    .success();
    let exactly = "snapshot.name=s@";
    ours(
        &dir,
        &["convert", "-q", "-O", "raw", "-l", exactly, "a.qcow2", "x"],
    )
    .success();
    ours(&dir, &["convert", "-q", "--bitmaps", "a.qcow2", "b.qcow2"]).success();
    ours(&dir, &["bitmap", "--merge", "s@", "b.qcow2", lookalike]).success();
    ours(&dir, &["bitmap", "--remove", "b.qcow2", "s@"]).success();
    ours(&dir, &["bitmap", "--clear", "b.qcow2", lookalike]).success();
    ours(&dir, &["snapshot", "-a", "s@", "a.qcow2"]).success();
    ours(&dir, &["snapshot", "-d", "s@", "a.qcow2"]).success();
    let text = said(&ours(&dir, &["snapshot", "-d", "s@", "a.qcow2"]).code(1));
    assert!(text.contains("has no snapshot 's\\xE9'"), "{text}");
    ours(&dir, &["snapshot", "-d", lookalike, "a.qcow2"]).success();
    ours(&dir, &["check", "a.qcow2"]).success();
}

#[test]
fn a_vhd_finds_its_parent_in_a_directory_whose_name_is_not_utf_8() {
    let dir = scratch();
    let inner = dir.path().join(OsStr::from_bytes(b"vm\xe9"));
    std::fs::create_dir(&inner).expect("a directory");
    let run = |words: &[&str]| vdtool().current_dir(&inner).args(line(words)).assert();
    run(&["create", "-q", "base.vhd", "1M"]).success();
    run(&["io", "-c", "write -P 4 0 64k", "base.vhd"]).success();
    run(&["create", "-q", "-b", "base.vhd", "child.vhd"]).success();
    run(&["io", "-r", "-c", "read -P 4 0 64k", "child.vhd"]).success();
    run(&["check", "child.vhd"]).success();
    // What UTF-16 cannot hold is refused by name, and nothing is made.
    std::fs::rename(
        inner.join("base.vhd"),
        inner.join(OsStr::from_bytes(b"b\xe9.vhd")),
    )
    .expect("renames");
    let refused = run(&["create", "-q", "-b", "b@.vhd", "-F", "vhd", "other.vhd"]).code(1);
    let text = said(&refused);
    assert!(text.contains("'b\\xE9.vhd' is not UTF-8"), "{text}");
    assert!(!inner.join("other.vhd").exists());
}

#[test]
fn images_with_such_names_are_served() {
    let dir = bench();
    for name in ["caf@.raw", "x=caf@.raw"] {
        let line = line(&["serve", "--nbd", "unix:sock", "-r", "-f", "raw", name]);
        let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_vdtool"))
            .current_dir(&dir)
            .args(line)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("starts");
        let mut said = [0];
        let mut out = child.stdout.take().expect("is a pipe");
        let read = std::io::Read::read(&mut out, &mut said).expect("reads");
        let pid = rustix::process::Pid::from_child(&child);
        // It may have failed already.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        assert!(child.wait().expect("ends").success());
        assert_eq!(read, 1, "the address of {name}");
    }
}

#[test]
fn commands_of_io_and_ctl_take_such_names() {
    let dir = bench();
    let lines: [&[&str]; 4] = [
        &[
            "io",
            "-c",
            "open -o driver=raw caf@.raw",
            "-c",
            "read -P 7 0 64k",
        ],
        &[
            "io",
            "-c",
            "open -odriver=raw 'caf@.raw'",
            "-c",
            "write -s caf@.raw 0 512",
        ],
        &["io", "--script", "script"],
        &["io", "-c", "@", "-c", "open -@", "-c", "read @ -P @"],
    ];
    let script = b"open -o driver=raw \"caf\xe9.raw\"\nread -P 7 0 64k\n";
    std::fs::write(dir.path().join("script"), script).expect("has room");
    for line in &lines[..3] {
        ours(&dir, line).success().stderr("");
    }
    let text = said(&ours(&dir, lines[3]).code(1));
    assert!(text.contains("command '\\xE9' not found"), "{text}");
    let serve = line(&[
        "serve",
        "--nbd",
        "unix:sock",
        "--persistent",
        "--control",
        "ctl",
        "-r",
        "-f",
        "raw",
    ]);
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_vdtool"))
        .current_dir(&dir)
        .args(serve)
        .arg("caf\u{fffd}.raw")
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("starts");
    let mut out = child.stdout.take().expect("is a pipe");
    let read = std::io::Read::read(&mut out, &mut [0]).expect("reads");
    assert_eq!(read, 1, "it serves");
    let change = ["ctl", "ctl", "change", "-f", "raw", "caf@.raw"];
    let changed = vdtool().current_dir(&dir).args(line(&change)).output();
    let uri = "nbd+unix:///?socket=sock";
    let found = vdtool()
        .current_dir(&dir)
        .args(["io", "-r", "-f", "raw", "-c", "read -P 7 0 64k", uri])
        .output();
    // A client of another language has no shell between.
    let mut socket =
        std::os::unix::net::UnixStream::connect(dir.path().join("ctl")).expect("listens");
    let order = [
        b"change --format=raw -- '",
        dir.path().as_os_str().as_bytes(),
        b"/gone\xe9'\n",
    ]
    .concat();
    std::io::Write::write_all(&mut socket, &order).expect("is taken");
    let mut answer = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(&socket), &mut answer)
        .expect("is UTF-8");
    drop(socket);
    let ended = vdtool()
        .current_dir(&dir)
        .args(["ctl", "ctl", "stop"])
        .output();
    assert!(ended.expect("runs").status.success());
    assert!(child.wait().expect("ends").success());
    let changed = changed.expect("runs");
    assert!(
        changed.status.success(),
        "{}",
        String::from_utf8_lossy(&changed.stderr)
    );
    let found = found.expect("runs");
    assert!(
        found.status.success(),
        "{}",
        String::from_utf8_lossy(&found.stdout)
    );
    assert!(answer.contains("gone\\\\xE9"), "{answer}");
}

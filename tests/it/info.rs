//! `vdtool info`.

use serde_json::Value;

use crate::util::{peer, requires, scratch, vdtool};

#[test]
fn json_of_a_raw_image_is_that_of_qemu_img() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    std::fs::write(dir.path().join("disk.raw"), vec![7; 1_000_448]).expect("has room");
    for chain in [&[][..], &["--backing-chain"]] {
        let arguments = ["info", "-f", "raw", "--output", "json", "disk.raw"];
        let all = arguments.iter().chain(chain);
        let theirs = peer("qemu-img", dir.path(), all.clone());
        let ours = vdtool().current_dir(&dir).args(all).output().expect("runs");
        let theirs: Value = serde_json::from_str(&theirs).expect("is JSON");
        let ours: Value = serde_json::from_slice(&ours.stdout).expect("is JSON");
        assert_eq!(ours, theirs);
    }
}

#[test]
fn a_reader_that_leaves_early_is_no_error() {
    let dir = scratch();
    std::fs::write(dir.path().join("disk.raw"), [7; 512]).expect("has room");
    for arguments in [
        &["info", "disk.raw"][..],
        &["info", "--output", "json", "disk.raw"],
        &["map", "--output", "json", "disk.raw"],
        &["create", "-f", "raw", "-o", "help"],
        &["completions", "bash"],
        &["resize", "disk.raw", "512"],
        &["--help"],
    ] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_vdtool"));
        command.current_dir(&dir).args(arguments).stdout(writer);
        let output = command.output().expect("runs");
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        assert!(output.stderr.is_empty(), "{arguments:?}: {output:?}");
    }
}

#[test]
fn a_full_disk_under_stdout_is_an_error() {
    let dir = scratch();
    std::fs::write(dir.path().join("disk.raw"), [7; 512]).expect("has room");
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full");
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_vdtool"));
    command.current_dir(&dir).args(["info", "disk.raw"]);
    let output = command.stdout(full.expect("opens")).output().expect("runs");
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        text.starts_with("vdtool: cannot write to standard output: "),
        "{text}"
    );
}

#[test]
fn names_of_files_cannot_move_the_cursor() {
    let dir = scratch();
    let name = "a\x1b[2Jb\n.raw";
    std::fs::write(dir.path().join(name), [7; 512]).expect("has room");
    for (arguments, code) in [(["info", name], 0), (["info", "no\x1b[2J"], 1)] {
        let output = vdtool().current_dir(&dir).args(arguments).output();
        let output = output.expect("runs");
        assert_eq!(output.status.code(), Some(code));
        let printed = [output.stdout, output.stderr].concat();
        assert!(!printed.contains(&0x1b), "{arguments:?}");
        assert!(!printed.is_empty());
    }
}

#[test]
fn no_other_file_is_opened_unless_that_is_asked_for() {
    let dir = scratch();
    for line in ["create -q a.vhd 10M", "create -q -b a.vhd -F vhd b.vhd"] {
        let mut command = vdtool();
        command.current_dir(&dir).args(line.split(' '));
        command.assert().success();
    }
    std::fs::remove_file(dir.path().join("a.vhd")).expect("is there");
    let info = |line: &str| {
        let mut command = vdtool();
        command.current_dir(&dir).args(line.split(' ')).assert()
    };
    let text = info("info b.vhd").success().get_output().stdout.clone();
    let text = String::from_utf8(text).expect("is text");
    assert!(text.contains("backing file:"), "{text}");
    let text = info("info --backing-chain b.vhd")
        .code(1)
        .stdout("")
        .get_output()
        .stderr
        .clone();
    let text = String::from_utf8(text).expect("is text");
    assert!(text.contains("a.vhd"), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
}

#[test]
fn a_vhd_has_the_size_that_qemu_img_sees() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    for name in ["dynamic", "fixed"] {
        let subformat = format!("subformat={name}");
        vdtool()
            .current_dir(&dir)
            .args([
                "create", "-q", "-f", "vhd", "-o", &subformat, name, "12345k",
            ])
            .assert()
            .success();
        let arguments = ["info", "-f", "vpc", "--output", "json", name];
        let theirs = peer("qemu-img", dir.path(), arguments);
        let ours = vdtool()
            .current_dir(&dir)
            .args(arguments)
            .output()
            .expect("runs");
        let theirs: Value = serde_json::from_str(&theirs).expect("is JSON");
        let ours: Value = serde_json::from_slice(&ours.stdout).expect("is JSON");
        for key in [
            "virtual-size",
            "actual-size",
            "cluster-size",
            "filename",
            "children",
        ] {
            assert_eq!(ours[key], theirs[key], "{name} {key}");
        }
    }
}

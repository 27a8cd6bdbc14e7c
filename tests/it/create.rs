//! `vdtool create`.

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;

use rustix::process::{Pid, Signal};
use serde_json::Value;

use crate::target::wait_until_begun;
use crate::util::{peer, requires, scratch, vdtool};

#[test]
fn a_new_raw_image_is_sparse_and_has_the_size_asked_for() {
    let dir = scratch();
    let path = dir.path().join("disk.raw");
    vdtool()
        .current_dir(&dir)
        .args(["create", "disk.raw", "1.5G"])
        .assert()
        .success()
        .stdout("Formatting 'disk.raw', fmt=raw size=1610612736 preallocation=off\n")
        .stderr("");
    let found = path.metadata().expect("is there");
    assert_eq!(found.len(), 1_610_612_736);
    assert!(found.blocks() * 512 < 1 << 20);
}

#[test]
fn preallocated_space_is_there() {
    for how in ["falloc", "full"] {
        let dir = scratch();
        let path = dir.path().join("disk.raw");
        vdtool()
            .args(["create", "-q", "-o"])
            .arg(format!("preallocation={how}"))
            .arg(&path)
            .arg("4M")
            .assert()
            .success()
            .stdout("");
        let found = path.metadata().expect("is there");
        assert_eq!(found.len(), 4 << 20);
        assert!(found.blocks() * 512 >= 4 << 20, "{how}");
        let bytes = std::fs::read(&path).expect("reads");
        assert!(bytes.iter().all(|b| *b == 0), "{how}");
    }
}

#[test]
fn an_image_that_was_there_is_replaced_and_one_that_cannot_be_made_is_not() {
    let dir = scratch();
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, "precious").expect("has room");
    vdtool()
        .args(["create", "-o", "preallocation=wrong"])
        .arg(&path)
        .arg("1M")
        .assert()
        .code(2);
    vdtool()
        .args(["create", "-f", "raw", "-b", "disk.raw", "-F", "raw"])
        .arg(dir.path().join("child"))
        .assert()
        .code(63);
    assert_eq!(std::fs::read(&path).expect("reads"), b"precious");
    let names = std::fs::read_dir(&dir).expect("reads").count();
    assert_eq!(names, 1, "something was left behind");
    vdtool()
        .arg("create")
        .arg(&path)
        .arg("1M")
        .assert()
        .success();
    assert_eq!(std::fs::read(&path).expect("reads"), vec![0; 1 << 20]);
}

#[test]
fn an_image_does_not_replace_the_one_it_lies_upon() {
    let dir = scratch();
    std::fs::write(dir.path().join("base.raw"), [1; 512]).expect("has room");
    std::os::unix::fs::symlink("base.raw", dir.path().join("link.vhd")).expect("links");
    let base = dir
        .path()
        .canonicalize()
        .expect("is there")
        .join("base.raw");
    for more in [&["-F", "raw"][..], &["-F", "raw", "-u"]] {
        vdtool()
            .current_dir(&dir)
            .args(["create", "-f", "raw", "-b", "base.raw"])
            .args(more)
            .args(["link.vhd", "512"])
            .assert()
            .code(1)
            .stderr(format!(
                "vdtool: link.vhd: would replace {}, which is in use here (allowed: another name)\n",
                base.display()
            ));
    }
    let bytes = std::fs::read(dir.path().join("base.raw")).expect("reads");
    assert_eq!(bytes, [1; 512]);
}

#[test]
fn a_signal_leaves_nothing_behind() {
    let dir = scratch();
    let old = dir.path().join("old.raw");
    std::fs::write(&old, "precious").expect("has room");
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_vdtool"))
            .current_dir(&dir)
            .args(["create", "-q", "-o", "preallocation=full", "old.raw", "2G"])
            .stderr(std::process::Stdio::piped())
            .spawn()
            .expect("starts");
        wait_until_begun(dir.path(), &mut child);
        let pid = Pid::from_child(&child);
        rustix::process::kill_process(pid, signal).expect("is there");
        let output = child.wait_with_output().expect("ends");
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{text}");
        assert_eq!(text, "vdtool: old.raw: stopped by a signal\n");
        let names = std::fs::read_dir(&dir).expect("reads").count();
        assert_eq!(names, 1, "something was left behind");
        assert_eq!(std::fs::read(&old).expect("reads"), b"precious");
    }
}

#[test]
fn work_is_done_even_when_nobody_reads_about_it() {
    let dir = scratch();
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_vdtool"));
    command.current_dir(&dir).args(["create", "disk.raw", "4k"]);
    let status = command.stdout(writer).status().expect("runs");
    assert_eq!(status.code(), Some(0));
    let found = dir.path().join("disk.raw").metadata().expect("is there");
    assert_eq!(found.len(), 4096);
}

#[test]
fn options_in_the_words_of_qemu_img_are_understood() {
    let dir = scratch();
    vdtool()
        .current_dir(&dir)
        .args([
            "create",
            "-f",
            "raw",
            "-o",
            "size=3M,preallocation=off",
            "x",
        ])
        .assert()
        .success();
    let len = dir.path().join("x").metadata().expect("is there").len();
    assert_eq!(len, 3 << 20);
}

#[test]
fn qemu_img_reads_what_was_made() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    vdtool()
        .current_dir(&dir)
        .args(["create", "-q", "disk.raw", "3M"])
        .assert()
        .success();
    let text = peer("qemu-img", dir.path(), ["info", "-f", "raw", "disk.raw"]);
    assert!(
        text.contains("virtual size: 3 MiB (3145728 bytes)"),
        "{text}"
    );
}

#[test]
fn a_child_has_the_size_of_its_parent_and_names_it_from_its_own_directory() {
    let dir = scratch();
    std::fs::create_dir(dir.path().join("sub")).expect("can be made");
    for line in [
        "create -q sub/base.vhd 10M",
        // The name is relative to the child, wherever the command is typed.
        "create -q -b base.vhd -F vpc sub/child.vhd",
    ] {
        let mut command = vdtool();
        command.current_dir(&dir).args(line.split(' '));
        command.assert().success().stderr("");
    }
    let info = vdtool()
        .current_dir(dir.path().join("sub"))
        .args(["info", "--backing-chain", "--output", "json", "child.vhd"])
        .output()
        .expect("runs");
    let layers: Vec<Value> = serde_json::from_slice(&info.stdout).expect("is a list");
    assert_eq!(layers.len(), 2);
    assert_eq!(layers[0]["virtual-size"], 10 << 20);
    assert_eq!(layers[0]["backing-filename"], "base.vhd");
    assert_eq!(layers[1]["filename"], layers[0]["full-backing-filename"]);
}

#[test]
fn a_parent_below_the_parent_is_not_replaced_either() {
    let dir = scratch();
    let run = |line: &str| {
        let mut command = vdtool();
        command.current_dir(&dir).args(line.split(' ')).assert()
    };
    run("create -q a.vhd 10M").success();
    run("create -q -b a.vhd -F vhd b.vhd").success();
    let before = std::fs::read(dir.path().join("a.vhd")).expect("reads");
    run("create -q -b b.vhd -F vhd a.vhd").code(1);
    let after = std::fs::read(dir.path().join("a.vhd")).expect("reads");
    assert!(before == after);
}

#[test]
fn an_image_that_a_machine_has_open_is_not_replaced() {
    if !requires("qemu-nbd") {
        return;
    }
    let dir = scratch();
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, [1; 512]).expect("has room");
    let socket = dir.path().join("socket");
    let mut server = std::process::Command::new("qemu-nbd")
        .args(["-f", "raw", "-t", "-k"])
        .arg(&socket)
        .arg(&path)
        .spawn()
        .expect("starts");
    // Its socket is there before it opens the image; it greets clients after that.
    let greeted = || {
        let mut client = UnixStream::connect(&socket)?;
        client.read_exact(&mut [0; 8])
    };
    while greeted().is_err() && server.try_wait().expect("waits").is_none() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let made = vdtool().arg("create").arg(&path).arg("1M").assert();
    let resized = vdtool().arg("resize").arg(&path).arg("1M").assert();
    server.kill().expect("ends");
    server.wait().expect("ends");
    made.code(1).stdout("");
    resized.code(1).stdout("");
    assert_eq!(std::fs::read(&path).expect("reads"), [1; 512]);
}

#[test]
fn the_size_of_a_vhd_is_forced_in_the_words_of_qemu_img() {
    let dir = scratch();
    let size = 5 * 1024 * 1024 + 512_u64;
    let made = |option: &str| {
        let options = format!("subformat=fixed,{option}");
        let arguments = ["create", "-q", "-f", "vpc", "-o", &options, "a.vhd"];
        let mut command = vdtool();
        command
            .current_dir(&dir)
            .args(arguments)
            .arg(size.to_string());
        command.assert()
    };
    let length = || {
        std::fs::metadata(dir.path().join("a.vhd"))
            .expect("is there")
            .len()
    };
    for exact in [
        "force_size",
        "force_size=on",
        "force_size=on,size_rule=exact",
    ] {
        made(exact).success();
        assert_eq!(length(), size + 512, "{exact}");
    }
    made("force_size=off").success();
    assert!(length() > size + 512);
    for wrong in ["force_size,size_rule=chs", "force_size=off,size_rule=exact"] {
        made(wrong).code(1);
    }
}

#[test]
fn what_a_profile_or_a_rule_makes_of_a_size_is_said() {
    let dir = scratch();
    for (options, size, made, subformat) in [
        ("profile=azure", "10000000", "10485760", "fixed"),
        ("size_rule=chs", "10M", "10514432", "dynamic"),
        ("force_size=on", "1000", "1024", "dynamic"),
    ] {
        let output = vdtool()
            .current_dir(dir.path())
            .args(["create", "-f", "vhd", "-o", options, "a.vhd", size])
            .assert()
            .success();
        let output = output.get_output();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            said.contains(&format!(" size={made} subformat={subformat} ")),
            "{said}"
        );
        let noted = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            noted.contains(made) && noted.lines().count() == 1,
            "{noted}"
        );
    }
    // Nothing to say where the size is as asked for.
    vdtool()
        .current_dir(dir.path())
        .args(["create", "-f", "vhd", "-o", "profile=azure", "a.vhd", "2M"])
        .assert()
        .success()
        .stderr("");
}

#[test]
fn a_disk_of_no_bytes_has_nothing_to_lose() {
    let dir = scratch();
    let run = |arguments: &[&str]| {
        let mut command = vdtool();
        command.current_dir(dir.path()).args(arguments);
        command.assert().success();
    };
    std::fs::write(dir.path().join("e.raw"), b"").expect("writes");
    run(&["create", "-q", "-f", "qcow2", "a.qcow2", "0"]);
    run(&["convert", "-f", "raw", "-O", "qcow2", "e.raw", "b.qcow2"]);
    run(&[
        "convert", "-c", "-f", "raw", "-O", "qcow2", "e.raw", "c.qcow2",
    ]);
    for name in ["a.qcow2", "b.qcow2", "c.qcow2"] {
        run(&["check", name]);
        run(&["resize", "-q", name, "3M"]);
        run(&["io", "-q", "-c", "write 1M 1M", name]);
        run(&["check", name]);
    }
}

//! `vdtool resize`.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::util::{scratch, vdtool};

fn resize(dir: &Path, arguments: &[&str]) -> assert_cmd::assert::Assert {
    vdtool()
        .current_dir(dir)
        .arg("resize")
        .args(arguments)
        .assert()
}

#[test]
fn sizes_may_be_changes_and_options_may_stand_anywhere() {
    let dir = scratch();
    let path = dir.path().join("disk.raw");
    for (arguments, len) in [
        (&["disk.raw", "1M"][..], 1 << 20),
        (&["disk.raw", "+1M"], 2 << 20),
        (&["--shrink", "disk.raw", "-512k"], 3 << 19),
        (&["disk.raw", "--shrink", "-512k"], 1 << 20),
        (&["disk.raw", "-512k", "--shrink"], 1 << 19),
        (&["--shrink", "disk.raw", "--", "-256k"], 1 << 18),
        (&["disk.raw", "+0", "-q"], 1 << 18),
        (&["disk.raw", "0", "--shrink"], 0),
        (&["-f", "raw", "disk.raw", "1000"], 1000),
    ] {
        if !path.exists() {
            std::fs::write(&path, []).expect("has room");
        }
        resize(dir.path(), arguments).success();
        assert_eq!(
            path.metadata().expect("is there").len(),
            len,
            "{arguments:?}"
        );
    }
}

#[test]
fn data_past_a_smaller_size_is_not_lost_unless_that_is_asked_for() {
    let dir = scratch();
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, [1; 4096]).expect("has room");
    for arguments in [&["disk.raw", "2k"][..], &["disk.raw", "-1"]] {
        let text = resize(dir.path(), arguments)
            .code(1)
            .get_output()
            .stderr
            .clone();
        let text = String::from_utf8_lossy(&text);
        assert!(text.contains("--shrink"), "{text}");
        assert_eq!(std::fs::read(&path).expect("reads"), [1; 4096]);
    }
    resize(dir.path(), &["disk.raw", "-8k", "--shrink"]).code(2);
    resize(
        dir.path(),
        &["disk.raw", "2k", "--shrink", "--preallocation", "full"],
    )
    .code(1);
    assert_eq!(std::fs::read(&path).expect("reads"), [1; 4096]);
    resize(dir.path(), &["disk.raw", "2k", "--shrink"])
        .success()
        .stdout("Image resized.\n");
    assert_eq!(std::fs::read(&path).expect("reads"), [1; 2048]);
}

#[test]
fn new_space_is_allocated_where_that_is_asked_for() {
    for how in ["falloc", "full"] {
        let dir = scratch();
        let path = dir.path().join("disk.raw");
        std::fs::write(&path, [1; 4096]).expect("has room");
        resize(dir.path(), &["disk.raw", "4M", "--preallocation", how]).success();
        let bytes = std::fs::read(&path).expect("reads");
        assert_eq!(bytes[..4096], [1; 4096]);
        assert!(bytes[4096..].iter().all(|b| *b == 0), "{how}");
        let found = path.metadata().expect("is there");
        assert!(found.blocks() * 512 >= 4 << 20, "{how}");
    }
}

#[test]
fn a_vhd_grows_and_the_new_bytes_are_zeroes() {
    let dir = scratch();
    for subformat in ["subformat=dynamic", "subformat=fixed"] {
        let lines: [&[&str]; 6] = [
            &["create", "-q", "-f", "vhd", "-o", subformat, "a.vhd", "4M"],
            &["io", "-q", "-c", "write -P 1 0 4M", "a.vhd"],
            &["resize", "-q", "a.vhd", "+4M"],
            &["io", "-q", "-c", "read -P 1 0 4M", "a.vhd"],
            &["io", "-q", "-c", "read -P 0 4M 4M", "a.vhd"],
            &["check", "-q", "a.vhd"],
        ];
        for line in lines {
            vdtool().current_dir(&dir).args(line).assert().success();
        }
    }
}

#[test]
fn space_cannot_be_allocated_ahead_in_an_image_that_allocates_as_it_goes() {
    let dir = scratch();
    let mut command = vdtool();
    command
        .current_dir(&dir)
        .args(["create", "-q", "a.vhd", "4M"]);
    command.assert().success();
    let before = std::fs::read(dir.path().join("a.vhd")).expect("reads");
    resize(dir.path(), &["a.vhd", "8M", "--preallocation", "full"]).code(63);
    let after = std::fs::read(dir.path().join("a.vhd")).expect("reads");
    assert!(before == after);
}

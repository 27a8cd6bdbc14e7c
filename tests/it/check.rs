//! `vdtool check`.

use crate::util::{scratch, vdtool};

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

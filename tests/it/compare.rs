//! `compare`: results, exit codes, messages.

use std::fs;
use std::path::Path;

use crate::util::{Seeded, scratch, vdtool};

/// Runs `compare`; its exit code, stdout and stderr.
fn compare(directory: &Path, arguments: &[&str]) -> (i32, String, String) {
    let output = vdtool()
        .current_dir(directory)
        .arg("compare")
        .args(arguments)
        .output()
        .expect("runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("is text");
    let code = output.status.code().expect("not by a signal");
    (code, text(output.stdout), text(output.stderr))
}

fn disks(directory: &Path) {
    let mut bytes = Seeded::new("compare").bytes(20 << 20);
    fs::write(directory.join("a.raw"), &bytes).expect("writes");
    bytes[12_345_678] ^= 1;
    bytes[19 << 20] ^= 1;
    fs::write(directory.join("b.raw"), &bytes).expect("writes");
    bytes[12_345_678] ^= 1;
    bytes[19 << 20] ^= 1;
    bytes.extend([0; 4096]);
    fs::write(directory.join("longer.raw"), &bytes).expect("writes");
}

#[test]
fn the_first_difference_is_named_and_the_exit_code_tells() {
    let scratch = scratch();
    let dir = scratch.path();
    disks(dir);
    let (code, out, _) = compare(dir, &["a.raw", "a.raw"]);
    assert_eq!((code, &*out), (0, "Images are identical.\n"));
    let (code, out, _) = compare(dir, &["a.raw", "b.raw"]);
    assert_eq!(
        (code, &*out),
        (1, "Content mismatch at offset 12345678 (0xbc614e)!\n")
    );
    let (code, out, _) = compare(dir, &["-q", "a.raw", "b.raw"]);
    assert_eq!((code, &*out), (1, ""));
}

#[test]
fn a_longer_disk_of_zeroes_is_the_same_unless_strict() {
    let scratch = scratch();
    let dir = scratch.path();
    disks(dir);
    let (code, out, err) = compare(dir, &["a.raw", "longer.raw"]);
    assert_eq!((code, &*out), (0, "Images are identical.\n"));
    assert!(err.contains("sizes differ"), "{err}");
    let (code, out, _) = compare(dir, &["-s", "a.raw", "longer.raw"]);
    assert_eq!((code, &*out), (1, "Strict mode: Image size mismatch!\n"));
}

#[test]
fn strict_tells_holes_from_zeroes() {
    let scratch = scratch();
    let dir = scratch.path();
    fs::write(dir.join("written.raw"), vec![0; 1 << 20]).expect("writes");
    let hole = fs::File::create(dir.join("hole.raw")).expect("creates");
    hole.set_len(1 << 20).expect("grows");
    assert_eq!(compare(dir, &["written.raw", "hole.raw"]).0, 0);
    let (code, out, _) = compare(dir, &["-s", "written.raw", "hole.raw"]);
    assert_eq!(code, 1);
    assert_eq!(out, "Strict mode: Offset 0 (0x0) block status mismatch!\n");
}

#[test]
fn json_tells_the_same() {
    let scratch = scratch();
    let dir = scratch.path();
    disks(dir);
    let value = |arguments: &[&str]| -> serde_json::Value {
        let (_, out, _) = compare(dir, &[&["--output", "json"], arguments].concat());
        serde_json::from_str(&out).expect("is JSON")
    };
    let same = value(&["a.raw", "a.raw"]);
    assert_eq!(same["identical"], true);
    assert!(same["offset"].is_null());
    let other = value(&["a.raw", "b.raw"]);
    assert_eq!(other["identical"], false);
    assert_eq!(other["difference"], "content");
    assert_eq!(other["offset"], 12_345_678);
}

#[test]
fn failures_have_exit_codes_of_their_own() {
    let scratch = scratch();
    let dir = scratch.path();
    disks(dir);
    let (code, _, err) = compare(dir, &["a.raw", "missing.raw"]);
    assert_eq!(code, 2);
    assert!(err.contains("missing.raw"), "{err}");
    assert_eq!(compare(dir, &["-f", "vhd", "a.raw", "a.raw"]).0, 2);
    assert_eq!(compare(dir, &["a.raw"]).0, 1);
    assert_eq!(compare(dir, &["--image-opts", "a.raw", "a.raw"]).0, 1);
}

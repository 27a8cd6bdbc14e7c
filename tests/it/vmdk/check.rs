//! What a check finds in disks that somebody damaged, and what it makes of them.

use std::fs;
use std::path::Path;

use crate::util::{scratch, vdtool};
use crate::vmdk::{SECTOR, ends, patch, quad, raw_disk, word};

/// A disk with data, and where its primary and its second directory and first tables are.
struct Made {
    bytes: Vec<u8>,
    primary: (usize, usize),
    second: (usize, usize),
}

fn made(dir: &Path) -> Made {
    raw_disk(dir, "check", 40 << 20);
    ends(dir, &["convert", "-q", "-O", "vmdk", "raw", "a.vmdk"], 0);
    let bytes = fs::read(dir.join("a.vmdk")).expect("reads");
    let at = |field: usize| {
        let directory = usize::try_from(quad(&bytes, field)).expect("small") * SECTOR;
        (directory, word(&bytes, directory) as usize * SECTOR)
    };
    Made {
        primary: at(56),
        second: at(48),
        bytes,
    }
}

#[test]
fn what_the_second_copy_knows_is_mended_and_the_disk_is_as_before() {
    let scratch = scratch();
    let dir = scratch.path();
    let made = made(dir);
    for (what, at, new) in [
        (
            "entry 0 of the grain directory",
            made.primary.0,
            0xff_ffff_u32,
        ),
        (
            "entry 1 of the grain directory",
            made.primary.0 + 4,
            0xff_ffff,
        ),
        ("have no second copy", made.second.0 + 4, 0xff_ffff),
        ("grain 0", made.primary.1, 0xff_ffff),
        ("grain 0", made.primary.1, 2),
        ("differ between", made.second.1, 0xff_ffff),
        ("have no second copy", made.second.0, 0xff_ffff),
        ("have no second copy", made.second.0, 0),
    ] {
        fs::write(dir.join("a.vmdk"), &made.bytes).expect("writes");
        patch(&dir.join("a.vmdk"), at, &new.to_le_bytes());
        let text = ends(dir, &["check", "a.vmdk"], 2);
        assert!(text.contains(what), "{what}: {text}");
        ends(dir, &["check", "-r", "all", "a.vmdk"], 0);
        let text = ends(dir, &["check", "a.vmdk"], 0);
        assert!(text.contains("No errors"), "{what}: {text}");
        ends(dir, &["compare", "raw", "a.vmdk"], 0);
    }
}

#[test]
fn what_no_copy_knows_is_told_and_kept() {
    let scratch = scratch();
    let dir = scratch.path();
    let made = made(dir);
    for at in [made.primary.1, made.second.1] {
        patch(&dir.join("a.vmdk"), at, &0xff_ffff_u32.to_le_bytes());
    }
    let text = ends(dir, &["check", "-r", "all", "a.vmdk"], 2);
    assert!(text.contains("grain 0"), "{text}");
    let text = ends(dir, &["convert", "a.vmdk", "out.raw"], 1);
    assert!(text.contains("grain 0"), "{text}");
    // Two that name one grain.
    fs::write(dir.join("a.vmdk"), &made.bytes).expect("writes");
    for table in [made.primary.1, made.second.1] {
        let first = made.bytes[table..table + 4].to_vec();
        patch(&dir.join("a.vmdk"), table + 40, &first);
    }
    let text = ends(dir, &["check", "a.vmdk"], 2);
    assert!(
        text.contains("grain 10") && text.contains("something else too"),
        "{text}"
    );
    ends(dir, &["check", "-r", "all", "a.vmdk"], 0);
    ends(dir, &["io", "-c", "write -P 5 0 64k", "a.vmdk"], 0);
    let read = format!("read -P 5 {} 64k", 10 * (64 << 10));
    let said = vdtool()
        .current_dir(dir)
        .args(["io", "-c", &read, "a.vmdk"])
        .assert();
    assert!(!said.get_output().status.success(), "each has its own now");
}

#[test]
fn leaks_and_missing_files_are_told_by_name() {
    let scratch = scratch();
    let dir = scratch.path();
    let mut bytes = made(dir).bytes;
    bytes.extend([7; 200_000]);
    fs::write(dir.join("a.vmdk"), &bytes).expect("writes");
    let text = ends(dir, &["check", "a.vmdk"], 3);
    assert!(text.contains("200000 bytes"), "{text}");
    ends(dir, &["check", "-r", "leaks", "a.vmdk"], 0);
    ends(dir, &["check", "a.vmdk"], 0);
    let option = "subformat=twoGbMaxExtentFlat";
    ends(
        dir,
        &["convert", "-q", "-O", "vmdk", "-o", option, "raw", "b.vmdk"],
        0,
    );
    let file = fs::File::options()
        .write(true)
        .open(dir.join("b-f001.vmdk"))
        .expect("opens");
    file.set_len(1000).expect("cuts");
    let text = ends(dir, &["check", "b.vmdk"], 2);
    assert!(text.contains("extent 0 ends at"), "{text}");
    fs::remove_file(dir.join("b-f001.vmdk")).expect("removes");
    let text = ends(dir, &["check", "b.vmdk"], 2);
    assert!(
        text.contains("b-f001.vmdk") && text.contains("missing"),
        "{text}"
    );
}

#[test]
fn a_writer_that_died_leaves_a_flag_that_is_cleared() {
    let scratch = scratch();
    let dir = scratch.path();
    let made = made(dir);
    patch(&dir.join("a.vmdk"), 72, &[1]);
    patch(&dir.join("a.vmdk"), made.second.1, &[0; 4]);
    let text = ends(dir, &["info", "a.vmdk"], 0);
    assert!(text.contains("dirty"), "{text}");
    // What was to be written to both copies and is in one alone harms nobody.
    let text = ends(dir, &["check", "a.vmdk"], 3);
    assert!(text.contains("was not closed"), "{text}");
    // The next writer sets it right.
    ends(dir, &["io", "-c", "write -P 5 20M 64k", "a.vmdk"], 0);
    let text = ends(dir, &["check", "a.vmdk"], 0);
    assert!(
        text.contains("No errors") && !text.contains("not closed"),
        "{text}"
    );
}

//! What may not get lost: files of other disks, and data beside what is given back or repaired.

use std::fs;
use std::path::Path;

use crate::util::{scratch, vdtool};
use crate::vmdk::{MIB, SECTOR, SUBFORMATS, descriptor, ends, patch, quad, raw_disk, word};

/// Runs vdtool in `dir`, which must refuse; what it said.
fn refused(dir: &Path, arguments: &[&str]) -> String {
    let done = vdtool().current_dir(dir).args(arguments).assert();
    let output = done.get_output();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{arguments:?}");
    text
}

#[test]
fn files_that_nobody_named_are_replaced_with_their_own_disk_alone() {
    let scratch = scratch();
    let dir = scratch.path();
    let flat = [
        "create",
        "-q",
        "-f",
        "vmdk",
        "-o",
        "subformat=monolithicFlat",
    ];
    let made = [
        "create",
        "-q",
        "-f",
        "vmdk",
        "-o",
        "subformat=monolithicFlat",
        "disk.vmdk",
        "1M",
    ];
    let make = |name: &str| refused(dir, &[&flat[..], &[name, "1M"]].concat());
    ends(dir, &made, 0);
    ends(dir, &["io", "-c", "write -P 5 0 64k", "disk.vmdk"], 0);
    let kept = fs::read(dir.join("disk-flat.vmdk")).expect("reads");
    // Another disk, whose file would have the same name.
    let text = make("disk");
    assert!(text.contains("disk-flat.vmdk"), "{text}");
    assert!(!dir.join("disk").exists());
    // The descriptor is lost, and the data is all that is left.
    fs::rename(dir.join("disk.vmdk"), dir.join("lost")).expect("renames");
    make("disk.vmdk");
    raw_disk(dir, "keeps", MIB);
    let convert = [
        "convert",
        "-q",
        "-O",
        "vmdk",
        "-o",
        "subformat=monolithicFlat",
    ];
    refused(dir, &[&convert[..], &["raw", "disk.vmdk"]].concat());
    assert_eq!(fs::read(dir.join("disk-flat.vmdk")).expect("reads"), kept);
    assert!(!dir.join("disk.vmdk").exists());
    fs::rename(dir.join("lost"), dir.join("disk.vmdk")).expect("renames");
    ends(dir, &made, 0);
    ends(dir, &["io", "-c", "read -P 0 0 1M", "disk.vmdk"], 0);
}

#[test]
fn grains_that_units_of_the_disk_have_a_part_of_are_not_given_back() {
    let scratch = scratch();
    let dir = scratch.path();
    fs::write(dir.join("flat"), vec![0; 32 << 10]).expect("writes");
    ends(dir, &["create", "-q", "-f", "vmdk", "part", "1M"], 0);
    let lines = ["RW 64 FLAT \"flat\" 0", "RW 2048 SPARSE \"part\""];
    fs::write(dir.join("a.vmdk"), descriptor(&lines)).expect("writes");
    for command in [
        "write -P 7 32k 32k",
        "write -P 0 64k 128k",
        "write -P 9 512k 4k",
    ] {
        ends(dir, &["io", "-c", command, "a.vmdk"], 0);
    }
    ends(dir, &["compact", "-q", "a.vmdk"], 0);
    for command in [
        "read -P 7 32k 32k",
        "read -P 0 64k 128k",
        "read -P 9 512k 4k",
    ] {
        ends(dir, &["io", "-c", command, "a.vmdk"], 0);
    }
    // Parts of whole grains alone are made.
    let option = "subformat=twoGbMaxExtentSparse,grain_size=2M";
    let made = ["create", "-q", "-f", "vmdk", "-o", option, "x.vmdk", "5G"];
    let said = refused(dir, &made);
    assert!(said.contains("1048576"), "{said}");
    assert!(!dir.join("x.vmdk").exists());
}

#[test]
fn tables_behind_the_grains_of_a_stream_are_not_cut_off() {
    let scratch = scratch();
    let dir = scratch.path();
    raw_disk(dir, "tables", 4 * MIB);
    let option = "subformat=streamOptimized";
    ends(
        dir,
        &["convert", "-q", "-O", "vmdk", "-o", option, "raw", "a.vmdk"],
        0,
    );
    let mut bytes = fs::read(dir.join("a.vmdk")).expect("reads");
    // The header says itself where the directory is, and nothing is said at the end.
    let footer = bytes.len() - 2 * SECTOR;
    let directory = quad(&bytes, footer + 56).to_le_bytes();
    bytes[56..64].copy_from_slice(&directory);
    fs::write(dir.join("a.vmdk"), &bytes).expect("writes");
    ends(dir, &["compare", "raw", "a.vmdk"], 0);
    ends(dir, &["check", "-r", "all", "a.vmdk"], 2);
    assert!(fs::read(dir.join("a.vmdk")).expect("reads") == bytes);
}

#[test]
fn what_lies_in_the_room_of_a_descriptor_stays_as_it_is() {
    let scratch = scratch();
    let dir = scratch.path();
    raw_disk(dir, "room", 4 * MIB);
    ends(dir, &["convert", "-q", "-O", "vmdk", "raw", "a.vmdk"], 0);
    let path = dir.join("a.vmdk");
    let bytes = fs::read(&path).expect("reads");
    let [second, first] =
        [48, 56].map(|at| usize::try_from(quad(&bytes, at)).expect("small") * SECTOR);
    let table = word(&bytes, second);
    // One copy alone, whose table lies in the room, which ends with it.
    patch(&path, 8, &1_u32.to_le_bytes());
    patch(&path, 48, &[0; 8]);
    patch(&path, first, &table.to_le_bytes());
    patch(&path, 36, &u64::from(table + 4 - 1).to_le_bytes());
    ends(dir, &["compare", "raw", "a.vmdk"], 0);
    ends(dir, &["check", "-r", "all", "a.vmdk"], 2);
    ends(dir, &["compare", "raw", "a.vmdk"], 0);
    // Behind the NUL at the end of a file of its own.
    fs::write(dir.join("flat"), [7; 4096]).expect("writes");
    let text = descriptor(&["RW 8 FLAT \"flat\" 0"]);
    let text = [text.as_bytes(), b"\0and more"].concat();
    let path = dir.join("b.vmdk");
    fs::write(&path, &text).expect("writes");
    let said = refused(dir, &["io", "-c", "write 0 512", "b.vmdk"]);
    assert!(said.contains("follows the descriptor"), "{said}");
    assert!(fs::read(&path).expect("reads") == text);
    let file = fs::File::options().write(true).open(&path).expect("opens");
    file.set_len(1 << 40).expect("grows");
    let said = refused(dir, &["io", "-c", "write 0 512", "b.vmdk"]);
    assert!(said.contains("allowed for writing"), "{said}");
}

#[test]
fn a_directory_entry_that_hides_the_parent_hides_it_after_a_write_too() {
    let scratch = scratch();
    let dir = scratch.path();
    ends(dir, &["create", "-q", "-f", "vmdk", "p.vmdk", "40M"], 0);
    ends(dir, &["io", "-c", "write -P 7 0 1M", "p.vmdk"], 0);
    let child = [
        "create",
        "-q",
        "-f",
        "vmdk",
        "-o",
        "zeroed_grain=on",
        "-b",
        "p.vmdk",
        "-F",
    ];
    ends(dir, &[&child[..], &["vmdk", "c.vmdk"]].concat(), 0);
    let path = dir.join("c.vmdk");
    let bytes = fs::read(&path).expect("reads");
    for field in [48, 56] {
        let directory = usize::try_from(quad(&bytes, field)).expect("small") * SECTOR;
        patch(&path, directory, &1_u32.to_le_bytes());
    }
    let text = ends(dir, &["check", "c.vmdk"], 0);
    assert!(text.contains("grain directory are 1"), "{text}");
    ends(dir, &["io", "-c", "write -P 5 128k 64k", "c.vmdk"], 0);
    for command in [
        "read -P 0 0 128k",
        "read -P 5 128k 64k",
        "read -P 0 192k 1M",
    ] {
        ends(dir, &["io", "-c", command, "c.vmdk"], 0);
    }
    ends(dir, &["check", "c.vmdk"], 0);
    // Where entries of tables cannot hide anything.
    fs::write(&path, &bytes).expect("writes");
    patch(&path, 8, &3_u32.to_le_bytes());
    for field in [48, 56] {
        let directory = usize::try_from(quad(&bytes, field)).expect("small") * SECTOR;
        patch(&path, directory, &1_u32.to_le_bytes());
    }
    let said = refused(dir, &["io", "-c", "write -P 5 0 64k", "c.vmdk"]);
    assert!(said.contains("hides the parent"), "{said}");
    ends(dir, &["io", "-c", "read -P 0 0 1M", "c.vmdk"], 0);
}

#[test]
fn what_a_header_says_of_its_tables_decides_how_far_a_disk_goes() {
    let scratch = scratch();
    let dir = scratch.path();
    ends(dir, &["create", "-q", "-f", "vmdk", "a.vmdk", "16M"], 0);
    let path = dir.join("a.vmdk");
    patch(&path, 44, &256_u32.to_le_bytes());
    let bytes = fs::read(&path).expect("reads");
    let said = refused(dir, &["resize", "-q", "a.vmdk", "32M"]);
    assert!(said.contains("256 entries"), "{said}");
    assert!(fs::read(&path).expect("reads") == bytes);
    // The disk ends within the last grain, and its line goes on.
    patch(&path, 12, &(16 * MIB / 512 - 1).to_le_bytes());
    let bytes = fs::read(&path).expect("reads");
    let said = refused(dir, &["io", "-c", "write 0 512", "a.vmdk"]);
    assert!(said.contains("fewer than its line says"), "{said}");
    assert!(fs::read(&path).expect("reads") == bytes);
}

#[test]
fn sparse_extents_that_are_only_read_are_not_changed() {
    let scratch = scratch();
    let dir = scratch.path();
    ends(dir, &["create", "-q", "-f", "vmdk", "part", "1M"], 0);
    ends(dir, &["io", "-c", "write -P 0 0 128k", "part"], 0);
    ends(dir, &["create", "-q", "-f", "vmdk", "own", "1M"], 0);
    let lines = ["RDONLY 2048 SPARSE \"part\"", "RW 2048 SPARSE \"own\""];
    fs::write(dir.join("a.vmdk"), descriptor(&lines)).expect("writes");
    let part = fs::read(dir.join("part")).expect("reads");
    ends(dir, &["io", "-c", "write -P 5 1M 64k", "a.vmdk"], 0);
    let said = refused(dir, &["io", "-c", "write -P 5 0 64k", "a.vmdk"]);
    assert!(said.contains("is RDONLY"), "{said}");
    ends(dir, &["compact", "-q", "a.vmdk"], 0);
    ends(dir, &["check", "-r", "all", "a.vmdk"], 0);
    assert!(fs::read(dir.join("part")).expect("reads") == part);
}

#[test]
fn a_disk_that_is_made_can_be_opened_however_small() {
    let scratch = scratch();
    let dir = scratch.path();
    for subformat in SUBFORMATS {
        let option = format!("subformat={subformat}");
        let name = format!("{subformat}.vmdk");
        let made = ["create", "-q", "-f", "vmdk", "-o", &option, &name, "0"];
        let done = vdtool().current_dir(dir).args(made).assert();
        match done.get_output().status.success() {
            true => drop(ends(dir, &["convert", "-q", &name, "out.raw"], 0)),
            false => assert!(!dir.join(&name).exists(), "{subformat}"),
        }
    }
}

#[test]
fn a_disk_to_which_nothing_is_done_does_not_say_that_it_is_another() {
    let scratch = scratch();
    let dir = scratch.path();
    ends(dir, &["create", "-q", "-f", "vmdk", "p.vmdk", "3M"], 0);
    ends(dir, &["io", "-q", "-c", "write -P 7 0 3M", "p.vmdk"], 0);
    let child = ["create", "-q", "-b", "p.vmdk", "-F", "vmdk"];
    ends(dir, &[&child[..], &["c.vmdk", "1025k"]].concat(), 0);
    let read = |name: &str| fs::read(dir.join(name)).expect("reads");
    let before = read("c.vmdk");
    // It would show what its parent has there.
    let text = ends(dir, &["resize", "-q", "c.vmdk", "2M"], 63);
    assert!(text.contains("over data of its parent"), "{text}");
    assert!(read("c.vmdk") == before);
    let text = ends(dir, &["io", "-c", "write -z 0 64k", "c.vmdk"], 0);
    assert!(!text.is_empty());
    assert!(read("c.vmdk") != before, "it hides its parent");
    ends(dir, &["create", "-q", "-f", "vmdk", "e.vmdk", "3M"], 0);
    let before = read("e.vmdk");
    for change in ["discard 0 1M", "write -z 64k 1M", "write -z -u 0 3M"] {
        ends(dir, &["io", "-q", "-c", change, "e.vmdk"], 0);
        assert!(read("e.vmdk") == before, "{change}");
    }
    ends(dir, &["io", "-q", "-c", "write 1M 64k", "e.vmdk"], 0);
    assert!(read("e.vmdk") != before);
}

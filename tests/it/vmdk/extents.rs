//! Disks of several extents: what a descriptor may say, and what is made of it.

use std::fs;

use crate::util::{Seeded, scratch, vdtool};
use crate::vmdk::{MIB, SECTOR, descriptor, ends, raw_disk};

#[test]
fn extents_of_all_kinds_make_one_disk() {
    let scratch = scratch();
    let dir = scratch.path();
    let mut rng = Seeded::new("extents");
    let flat = rng.bytes(40 * SECTOR);
    fs::write(dir.join("flat bytes"), &flat).expect("writes");
    raw_disk(dir, "part", MIB);
    let part = fs::read(dir.join("raw")).expect("reads");
    for (subformat, name) in [("twoGbMaxExtentSparse", "p.vmdk"), ("vmfsSparse", "c.vmdk")] {
        let option = format!("subformat={subformat}");
        ends(
            dir,
            &["convert", "-q", "-O", "vmdk", "-o", &option, "raw", name],
            0,
        );
    }
    let text = descriptor(&[
        "RW 8 FLAT \"flat bytes\" 3",
        "rw\t5  zero ",
        "RW 2048 SPARSE \"p-s001.vmdk\"",
        "RDONLY 4 FLAT \"flat bytes\" 20",
        "NOACCESS 3 FLAT \"nobody\" 0",
        "RW 2048 VMFSSPARSE \"c-delta.vmdk\"",
        "RW 30 VMFS \"flat bytes\"",
        "RW 6 FLAT \"flat bytes\" 37",
    ]);
    fs::write(dir.join("a.vmdk"), text.replace('\n', "\r\n")).expect("writes");
    let sectors = |from: usize, count: usize| &flat[from * SECTOR..(from + count) * SECTOR];
    let mut wanted = [sectors(3, 8), &[0; 5 * SECTOR], &part, sectors(20, 4)].concat();
    wanted.extend([&[0; 3 * SECTOR][..], &part, sectors(0, 30), sectors(37, 3)].concat());
    // The file ends before its extent does.
    wanted.extend([0; 3 * SECTOR]);
    ends(dir, &["convert", "-q", "a.vmdk", "out.raw"], 0);
    assert!(fs::read(dir.join("out.raw")).expect("reads") == wanted);
    let text = ends(dir, &["check", "a.vmdk"], 2);
    assert!(text.contains("extent 7 ends at"), "{text}");
    // One file twice is for reading.
    let text = ends(dir, &["io", "-c", "write 0 512", "a.vmdk"], 1);
    assert!(text.contains("as another does"), "{text}");
}

#[test]
fn writes_find_their_extents_and_those_that_are_not_written_to_refuse_by_name() {
    let scratch = scratch();
    let dir = scratch.path();
    for name in ["one", "two", "three"] {
        fs::write(dir.join(name), [7; 64 * SECTOR]).expect("writes");
    }
    let extents = [
        "RW 64 FLAT \"one\" 0",
        "RW 8 ZERO",
        "RW 64 FLAT \"two\" 0",
        "RDONLY 64 FLAT \"three\" 0",
    ];
    fs::write(dir.join("a.vmdk"), descriptor(&extents)).expect("writes");
    let done = vdtool()
        .current_dir(dir)
        .args([
            "io",
            "-c",
            "write -P 9 32256 512",
            "-c",
            "write -P 9 36864 1024",
            "a.vmdk",
        ])
        .assert();
    done.success();
    let one = fs::read(dir.join("one")).expect("reads");
    let two = fs::read(dir.join("two")).expect("reads");
    assert!(one[63 * SECTOR..] == [9; SECTOR] && one[..63 * SECTOR] == [7; 63 * SECTOR]);
    assert!(two[..2 * SECTOR] == [9; 2 * SECTOR] && two[2 * SECTOR..] == [7; 62 * SECTOR]);
    let text = fs::read_to_string(dir.join("a.vmdk")).expect("reads");
    assert!(
        !text.contains("CID=12345678"),
        "it is another state: {text}"
    );
    assert!(text.contains("RDONLY 64 FLAT \"three\" 0"), "{text}");
    for (at, why) in [("32k", "is of type ZERO"), ("69632", "is RDONLY")] {
        let text = ends(dir, &["io", "-c", &format!("write {at} 512"), "a.vmdk"], 1);
        assert!(text.contains(why), "{text}");
    }
    assert_eq!(
        fs::read(dir.join("three")).expect("reads"),
        [7; 64 * SECTOR]
    );
}

#[test]
fn a_new_disk_of_several_files_appears_whole_and_replaces_whole() {
    let scratch = scratch();
    let dir = scratch.path();
    raw_disk(dir, "files", 4 * MIB);
    // Parts of 2047 MiB, most of it holes.
    let raw = fs::File::options()
        .write(true)
        .open(dir.join("raw"))
        .expect("opens");
    raw.set_len(5000 * MIB).expect("grows");
    for (subformat, letter) in [("twoGbMaxExtentSparse", 's'), ("twoGbMaxExtentFlat", 'f')] {
        let option = format!("subformat={subformat}");
        for round in 0..2 {
            ends(
                dir,
                &[
                    "convert", "-q", "-O", "vmdk", "-o", &option, "raw", "a.vmdk",
                ],
                0,
            );
            let text = fs::read_to_string(dir.join("a.vmdk")).expect("reads");
            for number in 1..=3 {
                let name = format!("a-{letter}{number:03}.vmdk");
                assert!(
                    text.contains(&format!("\"{name}\"")),
                    "round {round}: {text}"
                );
                assert!(dir.join(name).exists());
            }
            ends(dir, &["compare", "raw", "a.vmdk"], 0);
        }
    }
    let mut names: Vec<String> = fs::read_dir(dir)
        .expect("reads")
        .map(|e| e.expect("reads").file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with("a-"))
        .collect();
    names.sort();
    assert_eq!(names, ["a.vmdk", "raw"], "nothing is left behind");
    // What a disk is read from is not replaced by one of its files.
    fs::copy(dir.join("raw"), dir.join("b-flat.vmdk")).expect("copies");
    let text = ends(
        dir,
        &[
            "convert",
            "-O",
            "vmdk",
            "-o",
            "subformat=vmfs",
            "-f",
            "raw",
            "b-flat.vmdk",
            "b.vmdk",
        ],
        1,
    );
    assert!(text.contains("would replace"), "{text}");
}

#[test]
fn a_disk_of_several_files_is_resized_at_its_end() {
    let scratch = scratch();
    let dir = scratch.path();
    for subformat in [
        "monolithicSparse",
        "twoGbMaxExtentSparse",
        "vmfs",
        "twoGbMaxExtentFlat",
    ] {
        raw_disk(dir, subformat, 4 * MIB);
        let option = format!("subformat={subformat}");
        ends(
            dir,
            &[
                "convert", "-q", "-O", "vmdk", "-o", &option, "raw", "a.vmdk",
            ],
            0,
        );
        for size in [90 * MIB + 512, 3 * MIB, 40 * MIB] {
            ends(
                dir,
                &["resize", "-q", "--shrink", "a.vmdk", &size.to_string()],
                0,
            );
            let raw = fs::File::options()
                .write(true)
                .open(dir.join("raw"))
                .expect("opens");
            raw.set_len(size).expect("resizes");
            let text = ends(dir, &["compare", "raw", "a.vmdk"], 0);
            let same = text.contains("identical") && !text.contains("mismatch");
            assert!(same, "{subformat}: {text}");
            let text = ends(dir, &["check", "a.vmdk"], 0);
            assert!(text.contains("No errors"), "{subformat}: {text}");
        }
    }
}

#[test]
fn options_reach_the_descriptor_as_other_programs_want_it() {
    let scratch = scratch();
    let dir = scratch.path();
    for (options, parts) in [
        (
            "adapter_type=lsilogic",
            &["\"64\"", "ddb.adapterType = \"lsilogic\""][..],
        ),
        (
            "adapter_type=ide",
            &[
                "ddb.geometry.heads = \"16\"",
                "ddb.geometry.sectors = \"63\"",
            ],
        ),
        ("compat6", &["virtualHWVersion = \"6\""]),
        (
            "hwversion=14,toolsversion=10272",
            &["\"14\"", "ddb.toolsVersion = \"10272\""],
        ),
        (
            "subformat=vmfs",
            &["RW 20480 VMFS \"a-flat.vmdk\"\n", "\"lsilogic\""],
        ),
        (
            "subformat=monolithicFlat",
            &["RW 20480 FLAT \"a-flat.vmdk\" 0\n"],
        ),
    ] {
        ends(
            dir,
            &["create", "-q", "-f", "vmdk", "-o", options, "a.vmdk", "10M"],
            0,
        );
        let bytes = fs::read(dir.join("a.vmdk")).expect("reads");
        let text = String::from_utf8_lossy(&bytes);
        for part in parts {
            assert!(text.contains(part), "{options}: {part}");
        }
        assert!(
            text.contains("# Disk DescriptorFile\nversion=1\nCID="),
            "{options}"
        );
    }
    for (options, part) in [
        ("grain_size=5k", "power of two"),
        ("subformat=vmfs,grain_size=4k", "sparse disks"),
        ("hwversion=x", "1 to 99"),
        ("compat6,hwversion=7", "contradict"),
        (
            "subformat=streamOptimized,zeroed_grain=on",
            "zeroed_grain is for",
        ),
    ] {
        let text = ends(
            dir,
            &["create", "-f", "vmdk", "-o", options, "b.vmdk", "10M"],
            1,
        );
        assert!(text.contains(part), "{options}: {text}");
        assert!(!dir.join("b.vmdk").exists());
    }
    let text = ends(dir, &["create", "-f", "vmdk", "a\"b.vmdk", "10M"], 1);
    assert!(text.contains("no quotes"), "{text}");
}

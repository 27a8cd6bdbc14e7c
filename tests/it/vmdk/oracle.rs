//! qemu-img, qemu-io and libvmdk as judges, both ways.

use std::fs;

use crate::oracle::{apply, as_commands, patterns};
use crate::util::{Seeded, peer, requires, rounds, scratch};
use crate::vmdk::{MIB, SUBFORMATS, ends, raw_disk};

#[test]
fn what_is_made_reads_alike_in_qemu_img_and_goes_on_being_written_by_both() {
    if !requires("qemu-img") || !requires("qemu-io") {
        return;
    }
    for subformat in SUBFORMATS {
        let scratch = scratch();
        let dir = scratch.path();
        raw_disk(dir, subformat, 20 * MIB);
        let option = format!("subformat={subformat}");
        ends(
            dir,
            &[
                "convert", "-q", "-O", "vmdk", "-o", &option, "raw", "a.vmdk",
            ],
            0,
        );
        let same = |what: &str| {
            let ours = ends(dir, &["compare", "raw", "a.vmdk"], 0);
            assert!(ours.contains("identical"), "{subformat}, {what}: {ours}");
            peer(
                "qemu-img",
                dir,
                ["compare", "-f", "raw", "-F", "vmdk", "raw", "a.vmdk"],
            );
            peer("qemu-img", dir, ["check", "-q", "-f", "vmdk", "a.vmdk"]);
            let found = ends(dir, &["check", "a.vmdk"], 0);
            assert!(found.contains("No errors"), "{subformat}, {what}: {found}");
        };
        same("as made");
        if subformat == "streamOptimized" {
            continue;
        }
        let mut rng = Seeded::new(subformat);
        // Where a table is missing in a copy-on-write extent, as in those that ESX makes, qemu-io
        // writes over the header.
        let both = subformat != "vmfsSparse";
        for round in 0..rounds(4) {
            let patterns = patterns(&mut rng, 20 * MIB);
            let mut disk = fs::read(dir.join("raw")).expect("reads");
            apply(&patterns, &mut disk);
            fs::write(dir.join("raw"), disk).expect("writes");
            let commands = as_commands(&patterns);
            let commands = commands.iter().map(String::as_str);
            match round % 2 {
                1 if both => {
                    let arguments: Vec<&str> = ["-f", "vmdk"].into_iter().chain(commands).collect();
                    peer("qemu-io", dir, [&arguments[..], &["a.vmdk"]].concat());
                }
                _ => {
                    let arguments: Vec<&str> = ["io"].into_iter().chain(commands).collect();
                    ends(dir, &[&arguments[..], &["a.vmdk"]].concat(), 0);
                }
            }
            same(&format!("after round {round}"));
        }
    }
}

#[test]
fn what_qemu_img_makes_reads_alike_and_is_written_on() {
    if !requires("qemu-img") {
        return;
    }
    for subformat in &SUBFORMATS[..5] {
        let scratch = scratch();
        let dir = scratch.path();
        raw_disk(dir, subformat, 20 * MIB);
        let option = format!("subformat={subformat}");
        peer(
            "qemu-img",
            dir,
            ["convert", "-O", "vmdk", "-o", &option, "raw", "a.vmdk"],
        );
        ends(dir, &["compare", "raw", "a.vmdk"], 0);
        let info = ends(dir, &["info", "--output", "json", "a.vmdk"], 0);
        assert!(
            info.contains(&format!("\"create-type\": \"{subformat}\"")),
            "{info}"
        );
        let write = ["io", "-c", "write -P 7 5M 3M", "a.vmdk"];
        if *subformat == "streamOptimized" {
            let before = fs::read(dir.join("a.vmdk")).expect("reads");
            let text = ends(dir, &write, 63);
            assert!(text.contains("streamOptimized"), "{text}");
            assert_eq!(fs::read(dir.join("a.vmdk")).expect("reads"), before);
            continue;
        }
        ends(dir, &write, 0);
        ends(
            dir,
            &["io", "-f", "raw", "-c", "write -P 7 5M 3M", "raw"],
            0,
        );
        peer(
            "qemu-img",
            dir,
            ["compare", "-f", "raw", "-F", "vmdk", "raw", "a.vmdk"],
        );
        ends(dir, &["check", "a.vmdk"], 0);
    }
}

#[test]
fn offsets_and_files_of_a_map_are_those_of_qemu_img() {
    if !requires("qemu-img") {
        return;
    }
    let scratch = scratch();
    let dir = scratch.path();
    raw_disk(dir, "map", 20 * MIB);
    for subformat in ["monolithicSparse", "twoGbMaxExtentSparse"] {
        let option = format!("subformat={subformat}");
        ends(
            dir,
            &[
                "convert", "-q", "-O", "vmdk", "-o", &option, "raw", "a.vmdk",
            ],
            0,
        );
        let ours = ends(dir, &["map", "--output", "json", "a.vmdk"], 0);
        let ours: serde_json::Value = serde_json::from_str(&ours).expect("is JSON");
        let theirs = peer(
            "qemu-img",
            dir,
            ["map", "-f", "vmdk", "--output=json", "a.vmdk"],
        );
        let theirs: serde_json::Value = serde_json::from_str(&theirs).expect("is JSON");
        let stored = |value: &serde_json::Value| {
            let list = value.as_array().expect("a list").clone();
            let list = list.into_iter().filter(|e| e["data"] == true);
            list.map(|e| (e["start"].clone(), e["length"].clone(), e["offset"].clone()))
                .collect::<Vec<_>>()
        };
        assert_eq!(stored(&ours), stored(&theirs), "{subformat}");
        let file = if subformat == "monolithicSparse" {
            "a.vmdk"
        } else {
            "a-s001.vmdk"
        };
        let named = ours.as_array().expect("a list").iter();
        let named: Vec<_> = named.filter_map(|e| e["filename"].as_str()).collect();
        assert!(
            !named.is_empty() && named.iter().all(|n| *n == file),
            "{named:?}"
        );
    }
}

#[test]
fn libvmdk_takes_what_is_made() {
    if !requires("vmdkinfo") {
        return;
    }
    for subformat in SUBFORMATS {
        let scratch = scratch();
        let dir = scratch.path();
        raw_disk(dir, subformat, 20 * MIB);
        let option = format!("subformat={subformat}");
        ends(
            dir,
            &[
                "convert", "-q", "-O", "vmdk", "-o", &option, "raw", "a.vmdk",
            ],
            0,
        );
        let text = peer("vmdkinfo", dir, ["a.vmdk"]);
        assert!(text.contains("20 MiB"), "{subformat}: {text}");
    }
}

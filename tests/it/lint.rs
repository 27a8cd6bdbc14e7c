//! `lint --for` and `convert --for`: what other places take.

use std::fs;
use std::path::Path;

use serde_json::Value;
use vdtool::formats::profiles::PROFILES;

use crate::util::{scratch, vdtool};

fn works(directory: &Path, arguments: &[&str]) {
    let mut command = vdtool();
    command
        .current_dir(directory)
        .args(arguments)
        .assert()
        .success();
}

/// Names of the rules that are broken, with what was found.
fn broken(directory: &Path, place: &str, file: &str) -> Vec<(String, String)> {
    let line = ["lint", "--for", place, "--output", "json", file];
    let output = vdtool()
        .current_dir(directory)
        .args(line)
        .output()
        .expect("runs");
    let value: Value = serde_json::from_slice(&output.stdout).expect("is JSON");
    let rules = value["rules"].as_array().expect("is a list");
    let broken: Vec<(String, String)> = rules
        .iter()
        .filter(|rule| rule["state"] == "breaks")
        .map(|rule| {
            let text = |key: &str| rule[key].as_str().expect("is text").to_owned();
            (text("rule"), text("found"))
        })
        .collect();
    assert_eq!(value["breaks"], broken.len());
    let code = if broken.is_empty() { 0 } else { 1 };
    assert_eq!(output.status.code(), Some(code), "{value}");
    broken
}

fn names(broken: &[(String, String)]) -> Vec<&str> {
    broken.iter().map(|(name, _)| &**name).collect()
}

fn disk(directory: &Path) {
    let mut bytes = vec![0; (3 << 20) + 512];
    bytes[70_000..80_000].fill(7);
    fs::write(directory.join("a.raw"), bytes).expect("writes");
}

#[test]
fn what_is_made_for_a_place_keeps_its_rules() {
    let scratch = scratch();
    let dir = scratch.path();
    disk(dir);
    for profile in PROFILES {
        if vdtool::formats::named(profile.format).is_err() {
            let line = ["convert", "--for", profile.name, "a.raw", "x"];
            vdtool().current_dir(dir).args(line).assert().code(63);
            continue;
        }
        let target = format!("{}.{}", profile.name, profile.format);
        works(
            dir,
            &[
                "convert",
                "-f",
                "raw",
                "--for",
                profile.name,
                "a.raw",
                &target,
            ],
        );
        let broken = broken(dir, profile.name, &target);
        assert!(broken.is_empty(), "{}: {broken:?}", profile.name);
        works(dir, &["lint", "--for", profile.name, &target]);
        // Nothing of the disk is lost.
        works(
            dir,
            &[
                "compare",
                "-f",
                profile.format,
                "-F",
                "raw",
                &target,
                "a.raw",
            ],
        );
    }
}

#[test]
fn rules_that_are_broken_are_told_with_what_was_found() {
    let scratch = scratch();
    let dir = scratch.path();
    disk(dir);
    for (line, place, expected) in [
        (
            &["x.vhd"][..],
            "azure",
            &["fixed", "whole-mib", "length"][..],
        ),
        (&["-o", "subformat=fixed", "x.vhd"], "azure", &["whole-mib"]),
        (&["x.qcow2"], "azure", &["format", "whole-mib"]),
        (&["x.vmdk"], "esxi", &["create-type", "adapter"]),
        (
            &["-o", "subformat=streamOptimized", "x.vmdk"],
            "workstation",
            &["create-type"],
        ),
        (&["x.vmdk"], "aws", &["streams"]),
        (&["x.qcow2"], "aws", &["format"]),
        (&["x.vmdk"], "xen", &["format"]),
        (&["x.qcow2"], "virtualbox", &["format"]),
        (&["x.vhd"], "hyperv-gen2", &["format"]),
        (&["x.vdi"], "hyperv-gen1", &["format"]),
        (&["x.vmdk"], "vsphere-ova", &["format"]),
    ] {
        let convert = ["convert", "-f", "raw"]
            .iter()
            .chain(&line[..line.len() - 1]);
        let target = line[line.len() - 1];
        let line: Vec<&str> = convert.copied().chain(["a.raw", target]).collect();
        works(dir, &line);
        let broken = broken(dir, place, target);
        assert_eq!(names(&broken), expected, "{place} {line:?}: {broken:?}");
    }
    let line = ["lint", "--for", "azure", "x.qcow2"];
    let done = vdtool().current_dir(dir).args(line).assert().code(1);
    let text = String::from_utf8_lossy(&done.get_output().stdout).into_owned();
    assert!(
        text.contains("BREAKS") && text.contains("found: qcow2"),
        "{text}"
    );
    assert!(text.contains("not the maker's own text"), "{text}");
}

#[test]
fn packages_are_judged_with_their_archive_and_their_disks() {
    let scratch = scratch();
    let dir = scratch.path();
    disk(dir);
    works(
        dir,
        &["convert", "-f", "raw", "-o", "name=vm", "a.raw", "x.ova"],
    );
    assert!(broken(dir, "vsphere-ova", "x.ova").is_empty());
    assert!(broken(dir, "virtualbox", "x.ova").is_empty());
    assert!(broken(dir, "aws", "x.ova").is_empty());
    works(
        dir,
        &[
            "convert",
            "-f",
            "raw",
            "-o",
            "name=vm,manifest=sha1",
            "a.raw",
            "y.ova",
        ],
    );
    assert_eq!(names(&broken(dir, "vsphere-ova", "y.ova")), ["digests"]);
    // The same members in another order, and another descriptor.
    let unpack = |dir: &Path| {
        crate::util::peer("tar", dir, ["-xf", "x.ova"]);
    };
    unpack(dir);
    let text = fs::read_to_string(dir.join("vm.ovf")).expect("reads");
    let text = text
        .replace("#streamOptimized", "#")
        .replace("vmx-13", "virtualbox-2.2")
        .replace("ovf:size=\"", "ovf:size=\"1")
        .replace("ovf:capacity=\"", "ovf:capacity=\"1")
        .replace("AllocationUnits=\"byte\"", "AllocationUnits=\"byte * 2^0\"");
    fs::write(dir.join("vm.ovf"), text).expect("writes");
    fs::create_dir(dir.join("d")).expect("makes");
    let pack = ["-cf", "z.ova", "vm-disk1.vmdk", "vm.mf", "vm.ovf", "d"];
    crate::util::peer("tar", dir, pack);
    let line = [
        "lint",
        "-f",
        "ova",
        "--for",
        "vsphere-ova",
        "--output",
        "json",
        "z.ova",
    ];
    let output = vdtool().current_dir(dir).args(line).output().expect("runs");
    let value: Value = serde_json::from_slice(&output.stdout).expect("is JSON");
    let rules = value["rules"].as_array().expect("is a list");
    let found: Vec<&str> = rules
        .iter()
        .filter(|rule| rule["state"] == "breaks")
        .filter_map(|rule| rule["rule"].as_str())
        .collect();
    let expected = [
        "descriptor-first",
        "hardware",
        "format-uri",
        "file-sizes",
        "capacities",
    ];
    assert_eq!(found, expected, "{value}");
}

#[test]
fn options_of_ones_own_follow_those_of_the_place() {
    let scratch = scratch();
    let dir = scratch.path();
    disk(dir);
    let line = [
        "convert",
        "-f",
        "raw",
        "--for",
        "esxi",
        "-o",
        "adapter_type=buslogic",
    ];
    let line: Vec<&str> = line.into_iter().chain(["a.raw", "x.vmdk"]).collect();
    works(dir, &line);
    assert!(broken(dir, "esxi", "x.vmdk").is_empty());
    let line = ["convert", "--for", "azure", "-O", "vdi", "a.raw", "x.vdi"];
    vdtool().current_dir(dir).args(line).assert().code(2);
    for line in [
        &["lint", "x.vmdk"][..],
        &["lint", "--for", "nowhere", "x.vmdk"],
        &["convert", "--for", "nowhere", "a.raw", "b.raw"],
    ] {
        vdtool().current_dir(dir).args(line).assert().code(2);
    }
    let missing = ["lint", "--for", "azure", "missing"];
    vdtool().current_dir(dir).args(missing).assert().code(1);
}

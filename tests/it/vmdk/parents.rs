//! Disks over others: by name, in the state that they were in.

use std::fs;

use crate::util::{peer, requires, scratch};
use crate::vmdk::ends;

#[test]
fn a_child_finds_its_parent_in_the_state_that_it_was_in() {
    let scratch = scratch();
    let dir = scratch.path();
    ends(dir, &["create", "-q", "-f", "vmdk", "b.vmdk", "2M"], 0);
    ends(dir, &["io", "-c", "write -P 7 0 1M", "b.vmdk"], 0);
    ends(
        dir,
        &["create", "-q", "-b", "b.vmdk", "-F", "vmdk", "c.vmdk"],
        0,
    );
    ends(dir, &["io", "-c", "write -P 9 512k 1M", "c.vmdk"], 0);
    ends(
        dir,
        &[
            "io",
            "-c",
            "read -P 7 0 512k",
            "-c",
            "read -P 9 512k 1M",
            "c.vmdk",
        ],
        0,
    );
    if requires("qemu-img") {
        peer(
            "qemu-img",
            dir,
            ["convert", "-f", "vmdk", "-O", "raw", "c.vmdk", "c.raw"],
        );
        ends(dir, &["compare", "c.raw", "c.vmdk"], 0);
    }
    ends(dir, &["convert", "-q", "c.vmdk", "d.raw"], 0);
    ends(dir, &["io", "-c", "write -P 1 0 512", "b.vmdk"], 0);
    let text = ends(dir, &["convert", "c.vmdk", "out.raw"], 1);
    assert!(text.contains("was changed since"), "{text}");
    let accept = ["--parent-changed", "accept"];
    ends(
        dir,
        &[&["convert", "-q"][..], &accept, &["c.vmdk", "out.raw"]].concat(),
        0,
    );
    ends(
        dir,
        &[&["commit", "-q"][..], &accept, &["c.vmdk"]].concat(),
        0,
    );
    ends(dir, &["compare", "out.raw", "b.vmdk"], 0);
    // The child goes with its parent as it is now.
    ends(dir, &["compare", "out.raw", "c.vmdk"], 0);
    fs::rename(dir.join("b.vmdk"), dir.join("e.vmdk")).expect("renames");
    ends(
        dir,
        &["rebase", "-q", "-u", "-b", "e.vmdk", "-F", "vmdk", "c.vmdk"],
        0,
    );
    ends(dir, &["compare", "out.raw", "c.vmdk"], 0);
    ends(dir, &["rebase", "-q", "-b", "", "c.vmdk"], 0);
    fs::remove_file(dir.join("e.vmdk")).expect("removes");
    ends(dir, &["compare", "out.raw", "c.vmdk"], 0);
}

#[test]
fn names_of_parents_are_followed_by_the_policy_and_windows_separators_are_understood() {
    let scratch = scratch();
    let dir = scratch.path();
    ends(dir, &["create", "-q", "-f", "vmdk", "b.vmdk", "2M"], 0);
    ends(dir, &["io", "-c", "write -P 7 0 1M", "b.vmdk"], 0);
    ends(
        dir,
        &[
            "create",
            "-q",
            "-f",
            "vmdk",
            "-o",
            "subformat=vmfsSparse",
            "-b",
            "b.vmdk",
            "-F",
            "vmdk",
            "c.vmdk",
        ],
        0,
    );
    let text = fs::read_to_string(dir.join("c.vmdk")).expect("reads");
    for (hint, code, part) in [
        ("C:\\Virtual Machines\\b.vmdk", 0, ""),
        (".\\b.vmdk", 0, ""),
        ("c.vmdk", 1, "cycle"),
        ("../../etc/passwd", 1, "parent"),
        ("nobody.vmdk", 1, "not there"),
        ("nbd://host/x", 1, "servers are asked"),
    ] {
        fs::write(
            dir.join("c.vmdk"),
            text.replace("\"b.vmdk\"", &format!("\"{hint}\"")),
        )
        .expect("writes");
        let text = ends(dir, &["io", "-c", "read -P 7 0 1M", "c.vmdk"], code);
        assert!(part.is_empty() || text.contains(part), "{hint}: {text}");
    }
    for target in ["raw", "qcow2"] {
        ends(dir, &["create", "-q", "-f", target, "x", "2M"], 0);
        let text = ends(
            dir,
            &["create", "-f", "vmdk", "-b", "x", "-F", target, "y.vmdk"],
            63,
        );
        assert!(text.contains("the parent of a VMDK is a VMDK"), "{text}");
    }
    let arguments = [
        "create",
        "-f",
        "vmdk",
        "-o",
        "subformat=vmfs",
        "-b",
        "b.vmdk",
        "-F",
        "vmdk",
        "z.vmdk",
    ];
    let text = ends(dir, &arguments, 1);
    assert!(text.contains("has no backing file"), "{text}");
}

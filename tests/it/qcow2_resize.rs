//! Longer and shorter qcow2 disks, looked at by qemu-img.

use std::path::Path;

use crate::util::{peer, requires, scratch, vdtool};

fn ours(directory: &Path, line: &[&str]) {
    vdtool()
        .current_dir(directory)
        .args(line)
        .assert()
        .success();
}

fn theirs(directory: &Path, line: &[&str]) {
    let text = peer("qemu-io", directory, line);
    assert!(!text.contains("failed"), "{text}");
}

#[test]
fn a_resized_qcow2_is_clean_for_qemu_img_and_new_bytes_are_zero() {
    if !requires("qemu-img") {
        return;
    }
    for options in [
        "cluster_size=512",
        "cluster_size=4k,refcount_bits=1",
        "cluster_size=64k",
        "extended_l2=on,cluster_size=16k",
        "compat=0.10",
        "data_file=data.bin",
        "data_file=data.bin,data_file_raw=on",
        "preallocation=metadata",
    ] {
        let directory = scratch();
        let at = directory.path();
        ours(
            at,
            &[
                "create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", "1500k",
            ],
        );
        theirs(at, &["-c", "write -P 1 0 1500k", "a.qcow2"]);
        ours(at, &["resize", "-q", "a.qcow2", "20M"]);
        theirs(
            at,
            &[
                "-c",
                "read -P 1 0 1500k",
                "-c",
                "read -P 0 1500k 18980k",
                "a.qcow2",
            ],
        );
        theirs(at, &["-c", "write -P 2 1M 19M", "a.qcow2"]);
        // Neither a multiple of a cluster nor of what a table covers.
        ours(at, &["resize", "-q", "--shrink", "a.qcow2", "1300992"]);
        peer("qemu-img", at, ["check", "a.qcow2"]);
        ours(at, &["check", "a.qcow2"]);
        ours(at, &["resize", "-q", "a.qcow2", "3M"]);
        let reads = [
            "read -P 1 0 1M",
            "read -P 2 1048576 252416",
            "read -P 0 1300992 1844736",
        ];
        theirs(
            at,
            &["-c", reads[0], "-c", reads[1], "-c", reads[2], "a.qcow2"],
        );
        peer("qemu-img", at, ["check", "a.qcow2"]);
        ours(at, &["check", "a.qcow2"]);
    }
}

#[test]
fn a_qcow2_with_snapshots_is_resized_and_they_keep_their_size() {
    if !requires("qemu-img") {
        return;
    }
    let directory = scratch();
    let at = directory.path();
    ours(
        at,
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "cluster_size=512",
            "a.qcow2",
            "1M",
        ],
    );
    theirs(at, &["-c", "write -P 1 0 1M", "a.qcow2"]);
    peer("qemu-img", at, ["snapshot", "-c", "one", "a.qcow2"]);
    ours(at, &["resize", "-q", "--shrink", "a.qcow2", "300032"]);
    ours(at, &["resize", "-q", "a.qcow2", "5M"]);
    theirs(
        at,
        &[
            "-c",
            "read -P 1 0 300032",
            "-c",
            "read -P 0 300032 4942848",
            "a.qcow2",
        ],
    );
    peer("qemu-img", at, ["check", "a.qcow2"]);
    ours(at, &["check", "a.qcow2"]);
    peer("qemu-img", at, ["snapshot", "-a", "one", "a.qcow2"]);
    theirs(at, &["-c", "read -P 1 0 1M", "a.qcow2"]);
    peer("qemu-img", at, ["check", "a.qcow2"]);
    ours(
        at,
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "compat=0.10",
            "b.qcow2",
            "1M",
        ],
    );
    peer("qemu-img", at, ["snapshot", "-c", "one", "b.qcow2"]);
    let line = ["resize", "b.qcow2", "2M"];
    let done = vdtool().current_dir(at).args(line).assert().failure();
    let text = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
    assert!(
        text.contains("version 2") && text.contains("snapshots"),
        "{text}"
    );
}

#[test]
fn a_qcow2_that_grows_over_a_longer_backing_file_does_not_show_it() {
    if !requires("qemu-img") {
        return;
    }
    for options in [
        "cluster_size=64k",
        "compat=0.10",
        "extended_l2=on",
        "cluster_size=512",
    ] {
        let directory = scratch();
        let at = directory.path();
        std::fs::write(at.join("base.raw"), vec![7; 3 << 20]).expect("writes");
        let create = [
            "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "-o",
        ];
        let size = ["a.qcow2", "1000448"];
        ours(at, &[&create[..], &[options], &size[..]].concat());
        ours(at, &["resize", "-q", "a.qcow2", "4M"]);
        theirs(
            at,
            &[
                "-c",
                "read -P 7 0 1000448",
                "-c",
                "read -P 0 1000448 3193856",
                "a.qcow2",
            ],
        );
        peer("qemu-img", at, ["check", "a.qcow2"]);
        ours(at, &["check", "a.qcow2"]);
    }
}

#[test]
fn a_qcow2_grows_with_its_space_where_that_is_asked_for() {
    if !requires("qemu-img") {
        return;
    }
    for options in [
        "cluster_size=64k",
        "cluster_size=512",
        "extended_l2=on",
        "compat=0.10",
        "data_file=data.bin",
        "data_file=data.bin,data_file_raw=on",
    ] {
        for how in ["metadata", "falloc", "full"] {
            let directory = scratch();
            let at = directory.path();
            let create = ["create", "-q", "-f", "qcow2", "-o", options, "a.qcow2"];
            ours(at, &[&create[..], &["1000448"]].concat());
            theirs(at, &["-c", "write -P 1 0 1000448", "a.qcow2"]);
            ours(
                at,
                &["resize", "-q", "--preallocation", how, "a.qcow2", "5M"],
            );
            let reads = [
                "-c",
                "read -P 1 0 1000448",
                "-c",
                "read -P 0 1000448 4242432",
            ];
            theirs(at, &[&reads[..], &["a.qcow2"]].concat());
            let check = peer("qemu-img", at, ["check", "--output=json", "a.qcow2"]);
            let value: serde_json::Value = serde_json::from_str(&check).expect("JSON");
            let (all, used) = (&value["total-clusters"], &value["allocated-clusters"]);
            assert_eq!(all, used, "{options} {how}: {check}");
            ours(at, &["check", "-q", "a.qcow2"]);
            let data = if options.contains("data_file") {
                "data.bin"
            } else {
                "a.qcow2"
            };
            let blocks = std::os::unix::fs::MetadataExt::blocks(
                &at.join(data).metadata().expect("is there"),
            );
            assert!(
                how == "metadata" || blocks * 512 >= 5 << 20,
                "{options} {how}: {blocks}"
            );
        }
    }
    let directory = scratch();
    let at = directory.path();
    std::fs::write(at.join("base.raw"), vec![7; 3 << 20]).expect("writes");
    for options in ["cluster_size=64k", "compat=0.10", "extended_l2=on"] {
        let create = [
            "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "-o",
        ];
        ours(
            at,
            &[&create[..], &[options, "a.qcow2", "1000448"]].concat(),
        );
        ours(
            at,
            &["resize", "-q", "--preallocation=falloc", "a.qcow2", "4M"],
        );
        let reads = [
            "-c",
            "read -P 7 0 1000448",
            "-c",
            "read -P 0 1000448 3193856",
        ];
        theirs(at, &[&reads[..], &["a.qcow2"]].concat());
        peer("qemu-img", at, ["check", "a.qcow2"]);
    }
    for line in [
        &[
            "resize",
            "--preallocation=full",
            "--shrink",
            "a.qcow2",
            "1M",
        ][..],
        &[
            "resize",
            "-f",
            "raw",
            "--preallocation=metadata",
            "base.raw",
            "4M",
        ],
    ] {
        let before = std::fs::read(at.join("base.raw")).expect("reads");
        vdtool().current_dir(at).args(line).assert().failure();
        assert!(std::fs::read(at.join("base.raw")).expect("reads") == before);
    }
}

//! New qcow2 images with every option, and `measure`, beside qemu-img.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::util::{Seeded, peer, requires, scratch, vdtool};

/// Option sets that each exercise another part of the layout.
const OPTIONS: [&str; 9] = [
    "cluster_size=64k",
    "compat=0.10",
    "cluster_size=512",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=4k,refcount_bits=1",
    "cluster_size=2M",
    "extended_l2=on",
    "extended_l2=on,cluster_size=16k",
    "preallocation=falloc",
];

fn ours(directory: &Path, line: &[&str]) -> String {
    let done = vdtool()
        .current_dir(directory)
        .args(line)
        .assert()
        .success();
    String::from_utf8_lossy(&done.get_output().stdout).into_owned()
}

/// The two numbers that both tools print, without their words.
fn numbers(text: &str) -> Vec<u64> {
    let lines = text.lines().filter_map(|l| l.rsplit(' ').next());
    lines.filter_map(|word| word.parse().ok()).collect()
}

#[test]
fn measure_agrees_with_qemu_img_to_the_byte() {
    if !requires("qemu-img") {
        return;
    }
    let directory = scratch();
    for options in OPTIONS {
        for size in ["0", "1", "512", "65537", "10M", "777777777", "100G", "128M"] {
            if size == "100G" && options.contains("=512") {
                continue;
            }
            let line = ["measure", "-O", "qcow2", "-o", options, "--size", size];
            let theirs = peer("qemu-img", directory.path(), line);
            let found = ours(directory.path(), &line);
            assert_eq!(numbers(&found).len(), 2, "{found}");
            assert_eq!(numbers(&found), numbers(&theirs), "{options} {size}");
        }
    }
}

#[test]
fn measure_of_a_sparse_disk_agrees_with_qemu_img_to_the_byte() {
    if !requires("qemu-img") {
        return;
    }
    let directory = scratch();
    let mut rng = Seeded::new("measure");
    for (number, size) in [3 << 20, (40 << 20) + 1536, 129 << 20]
        .into_iter()
        .enumerate()
    {
        let name = format!("sparse{number}.raw");
        let file = File::create(directory.path().join(&name)).expect("creates");
        file.set_len(size).expect("grows");
        for _ in 0..20 {
            let at = rng.u64(0..size - 70_000);
            let count = rng.usize(1..70_000);
            file.write_all_at(&rng.bytes(count), at).expect("writes");
        }
        file.sync_all().expect("syncs");
        for options in OPTIONS {
            let line = ["measure", "-f", "raw", "-O", "qcow2", "-o", options, &name];
            let theirs = peer("qemu-img", directory.path(), line);
            let found = ours(directory.path(), &line);
            assert_eq!(numbers(&found), numbers(&theirs), "{options} {name}");
        }
    }
}

#[test]
fn preallocated_images_are_clean_and_full_and_read_as_zeroes() {
    if !requires("qemu-img") {
        return;
    }
    for layout in [
        "cluster_size=64k",
        "cluster_size=512,refcount_bits=64",
        "extended_l2=on,cluster_size=16k",
        "compat=0.10,cluster_size=4k",
    ] {
        for how in ["metadata", "falloc", "full"] {
            let directory = scratch();
            let options = format!("{layout},preallocation={how}");
            let line = [
                "create", "-q", "-f", "qcow2", "-o", &options, "a.qcow2", "5M",
            ];
            ours(directory.path(), &line);
            let check = ["check", "--output=json", "a.qcow2"];
            let check = peer("qemu-img", directory.path(), check);
            let value: serde_json::Value = serde_json::from_str(&check).expect("JSON");
            let all = &value["total-clusters"];
            assert_eq!(&value["allocated-clusters"], all, "{options}: {check}");
            let read = ["-c", "read -P 0 0 5M", "-c", "write -P 1 1M 70k", "a.qcow2"];
            let read = peer("qemu-io", directory.path(), read);
            assert!(!read.contains("failed"), "{options}: {read}");
            ours(directory.path(), &["check", "a.qcow2"]);
        }
    }
}

#[test]
fn an_external_data_file_is_made_beside_the_image() {
    if !requires("qemu-img") {
        return;
    }
    for options in [
        "data_file=data.bin",
        "data_file=data.bin,data_file_raw=on",
        "data_file=data.bin,preallocation=full",
        "data_file=data.bin,extended_l2=on",
    ] {
        let directory = scratch();
        let at = directory.path();
        ours(
            at,
            &[
                "create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", "5M",
            ],
        );
        let wrote = [
            "-c",
            "write -P 7 1M 300k",
            "-c",
            "read -P 0 2M 1M",
            "a.qcow2",
        ];
        let wrote = peer("qemu-io", at, wrote);
        assert!(!wrote.contains("failed"), "{options}: {wrote}");
        ours(at, &["io", "-c", "write -P 8 3M 200k", "a.qcow2"]);
        peer("qemu-img", at, ["check", "a.qcow2"]);
        ours(at, &["check", "a.qcow2"]);
        peer(
            "qemu-img",
            at,
            ["convert", "-O", "raw", "a.qcow2", "theirs.raw"],
        );
        ours(at, &["compare", "-q", "a.qcow2", "theirs.raw"]);
        if options.contains("raw=on") {
            ours(
                at,
                &["compare", "-q", "-f", "raw", "data.bin", "theirs.raw"],
            );
        }
    }
}

#[test]
fn options_that_contradict_each_other_are_refused_and_leave_nothing() {
    let directory = scratch();
    let cases = [
        ("data_file_raw=on", "data_file"),
        ("compat=0.10,data_file=d", "compat=1.1"),
        ("data_file=a.qcow2", "itself"),
        ("cluster_size=8k,extended_l2=on", "16k"),
    ];
    for (options, word) in cases {
        let line = ["create", "-f", "qcow2", "-o", options, "a.qcow2", "5M"];
        let done = vdtool()
            .current_dir(directory.path())
            .args(line)
            .assert()
            .failure();
        let text = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
        assert!(text.contains(word), "{options}: {text}");
        let left = std::fs::read_dir(directory.path()).expect("lists").count();
        assert_eq!(left, 0, "{options}");
    }
}

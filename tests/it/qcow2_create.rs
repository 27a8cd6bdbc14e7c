//! New qcow2 images with every option, and `measure`, beside qemu-img.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::util::{Seeded, peer, requires, rounds, scratch, vdtool};

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

/// Both tools are asked with the same words; both must answer alike, or both refuse.
#[test]
fn measure_agrees_with_qemu_img_over_the_options() {
    if !requires("qemu-img") {
        return;
    }
    let directory = scratch();
    let at = directory.path();
    let line = ["create", "-q", "-f", "qcow2", "base.qcow2", "9M"];
    peer("qemu-img", at, line);
    peer("qemu-io", at, ["-c", "write 0 3M", "base.qcow2"]);
    let line = ["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F"];
    peer(
        "qemu-img",
        at,
        [&line[..], &["qcow2", "top.qcow2", "33M"]].concat(),
    );
    peer(
        "qemu-io",
        at,
        ["-c", "write 8M 5k", "-c", "write -z 0 1M", "top.qcow2"],
    );
    for (name, granularity) in [("one", "64k"), ("a longer name", "512"), ("off", "2M")] {
        let line = ["bitmap", "--add", "-g", granularity, "top.qcow2", name];
        peer("qemu-img", at, line);
    }
    peer("qemu-img", at, ["snapshot", "-c", "snap", "top.qcow2"]);
    peer(
        "qemu-img",
        at,
        [
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "compat=0.10",
            "old.qcow2",
            "9M",
        ],
    );
    let mut rng = Seeded::new("measure-matrix");
    let subjects = [
        &["--size", "777M"][..],
        &["--size", "1T"],
        &["base.qcow2"],
        &["top.qcow2"],
        &["old.qcow2"],
        &["-l", "snap", "top.qcow2"],
    ];
    let mut answered = 0;
    for round in 0..rounds(150) {
        let pick = |rng: &mut Seeded, of: &[&'static str]| of[rng.usize(0..of.len())];
        let parts = [
            pick(
                &mut rng,
                &[
                    "cluster_size=512",
                    "cluster_size=4k",
                    "cluster_size=64k",
                    "cluster_size=2M",
                    "lazy_refcounts=off",
                ],
            ),
            pick(
                &mut rng,
                &[
                    "refcount_bits=1",
                    "refcount_bits=16",
                    "refcount_bits=64",
                    "refcount_bits=8",
                ],
            ),
            pick(
                &mut rng,
                &["extended_l2=on", "extended_l2=off", "extended_l2=off"],
            ),
            pick(&mut rng, &["compat=1.1", "compat=1.1", "compat=0.10"]),
            pick(
                &mut rng,
                &["compression_type=zstd", "compression_type=zlib"],
            ),
            pick(
                &mut rng,
                &[
                    "preallocation=metadata",
                    "preallocation=off",
                    "preallocation=off",
                    "preallocation=full",
                ],
            ),
            pick(
                &mut rng,
                &[
                    "lazy_refcounts=off",
                    "backing_file=base.qcow2,backing_fmt=qcow2",
                    "data_file=d.bin",
                ],
            ),
        ];
        let subject = subjects[rng.usize(0..subjects.len())];
        let options = parts.join(",");
        if subject[0] == "--size" && subject[1] == "1T" && options.contains("=512") {
            continue;
        }
        let line = [
            &["measure", "--output=json", "-O", "qcow2", "-o", &options],
            subject,
        ]
        .concat();
        let theirs = std::process::Command::new("qemu-img")
            .args(&line)
            .current_dir(at)
            .output()
            .expect("runs");
        let found = vdtool().current_dir(at).args(&line).output().expect("runs");
        let what = format!(
            "{round}: {line:?}: {}",
            String::from_utf8_lossy(&found.stderr)
        );
        if found.status.success() != theirs.status.success() {
            // They measure what they do not make.
            assert!(theirs.status.success(), "{what}");
            let line = [
                "create", "-f", "qcow2", "-u", "-o", &options, "x.qcow2", "1M",
            ];
            let made = std::process::Command::new("qemu-img")
                .args(line)
                .current_dir(at)
                .output()
                .expect("runs");
            assert!(!made.status.success(), "{what}");
        }
        if found.status.success() {
            let value =
                |bytes: &[u8]| serde_json::from_slice::<serde_json::Value>(bytes).expect("JSON");
            assert_eq!(value(&found.stdout), value(&theirs.stdout), "{what}");
            answered += 1;
        }
    }
    let all = rounds(150);
    assert!(answered > all / 4, "{answered} of {all}");
    let line = ["measure", "-O", "qcow2", "top.qcow2"];
    assert_eq!(ours(at, &line), peer("qemu-img", at, line));
}

#[test]
fn a_converted_image_has_its_data_in_the_file_that_was_asked_for() {
    if !requires("qemu-img") {
        return;
    }
    let directory = scratch();
    let at = directory.path();
    let mut rng = Seeded::new("convert-data-file");
    let mut bytes = rng.bytes(3 << 20);
    bytes[1 << 20..2 << 20].fill(0);
    std::fs::write(at.join("src.raw"), &bytes).expect("writes");
    std::fs::create_dir(at.join("sub")).expect("makes");
    for options in [
        "data_file=d.bin",
        "data_file=d.bin,data_file_raw=on",
        "data_file=d.bin,extended_l2=on",
        "data_file=d.bin,preallocation=metadata",
    ] {
        let line = [
            "convert",
            "--verify",
            "-O",
            "qcow2",
            "-o",
            options,
            "src.raw",
            "sub/a.qcow2",
        ];
        ours(at, &line);
        let line = [
            "compare",
            "-f",
            "raw",
            "-F",
            "qcow2",
            "../src.raw",
            "a.qcow2",
        ];
        // qemu-img looks for a data file where it is run.
        let sub = &at.join("sub");
        let compared = peer("qemu-img", sub, line);
        assert!(compared.contains("identical"), "{options}");
        let check = peer("qemu-img", sub, ["check", "a.qcow2"]);
        assert!(check.contains("No errors"), "{options}: {check}");
        if options.contains("raw=on") {
            let data = std::fs::read(at.join("sub/d.bin")).expect("is there");
            assert!(data == bytes, "{options}");
        }
        let mut names: Vec<_> = std::fs::read_dir(at.join("sub"))
            .expect("lists")
            .map(|e| e.expect("reads").file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["a.qcow2", "d.bin"], "nothing else is left");
    }
    // The second and later rounds replaced a data file; that is said, and -q says nothing.
    let line = [
        "convert",
        "-O",
        "qcow2",
        "-o",
        "data_file=d.bin",
        "src.raw",
        "sub/a.qcow2",
    ];
    let done = vdtool().current_dir(at).args(line).assert().success();
    let text = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
    assert!(
        text.contains("d.bin") && text.contains("replaced"),
        "{text}"
    );
    // What is read is not the data file, and nothing of it is lost.
    for (options, sources) in [
        ("data_file=../src.raw", &["src.raw"][..]),
        ("data_file=d.bin", &["sub/a.qcow2"]),
    ] {
        let line = [
            &["convert", "-U", "-O", "qcow2", "-o", options],
            sources,
            &["sub/b.qcow2"],
        ]
        .concat();
        let before = std::fs::read(at.join("sub/d.bin")).expect("reads");
        vdtool().current_dir(at).args(&line).assert().code(1);
        assert!(std::fs::read(at.join("src.raw")).expect("reads") == bytes);
        assert!(std::fs::read(at.join("sub/d.bin")).expect("reads") == before);
        assert!(!at.join("sub/b.qcow2").exists());
    }
    // A failure leaves both files as they were.
    let line = [
        "convert",
        "-O",
        "qcow2",
        "-o",
        "data_file=d.bin,cluster_size=3",
        "src.raw",
        "sub/a.qcow2",
    ];
    let before = std::fs::read(at.join("sub/a.qcow2")).expect("reads");
    vdtool().current_dir(at).args(line).assert().code(1);
    assert!(std::fs::read(at.join("sub/a.qcow2")).expect("reads") == before);
    assert_eq!(std::fs::read_dir(at.join("sub")).expect("lists").count(), 2);
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

//! Our server with other clients.

use std::path::Path;
use std::sync::Arc;

use vdtool::backend::Backend;
use vdtool::chain::open::ChainOptions;

use super::{Serving, export, lasting};
use crate::util::{assert_same, peer, requires, scratch};

const MIB: usize = 1 << 20;

/// Eight MiB: data, a hole, data that no page boundary cuts.
fn content() -> Vec<u8> {
    let mut bytes = vec![0; 8 * MIB];
    for (index, byte) in bytes[..2 * MIB].iter_mut().enumerate() {
        *byte = u8::try_from(index % 251).expect("small") + 1;
    }
    for (index, byte) in bytes[5 * MIB..5 * MIB + 70_000].iter_mut().enumerate() {
        *byte = u8::try_from(index % 241).expect("small") + 1;
    }
    bytes
}

/// A sparse file of these bytes.
fn write_sparse(path: &Path, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::create(path).expect("creates");
    file.set_len(bytes.len() as u64).expect("sets the length");
    for (index, block) in bytes.chunks(4096).enumerate() {
        if block.iter().any(|b| *b != 0) {
            file.write_all_at(block, index as u64 * 4096)
                .expect("writes");
        }
    }
}

fn serving() -> (Serving, Vec<u8>) {
    let dir = scratch();
    let bytes = content();
    write_sparse(&dir.path().join("disk.raw"), &bytes);
    let image = dir.path().join("disk.raw");
    let exports = vec![export("", &image, &ChainOptions::write())];
    (Serving::new(dir, exports, lasting()), bytes)
}

#[test]
fn qemu_img_reads_an_export_as_it_is() {
    if !requires("qemu-img") {
        return;
    }
    let (serving, bytes) = serving();
    let (uri, dir) = (serving.uri(""), serving.dir.path());
    let info = peer("qemu-img", dir, ["info", "--output", "json", &uri]);
    let info: serde_json::Value = serde_json::from_str(&info).expect("JSON");
    assert_eq!(info["virtual-size"], bytes.len());
    peer("qemu-img", dir, ["convert", "-O", "raw", &uri, "copy.raw"]);
    let copy = std::fs::read(dir.join("copy.raw")).expect("reads");
    assert_same(&copy, &bytes, 0, "converted");
    let same = ["compare", "-f", "raw", "-F", "raw", &uri, "copy.raw"];
    peer("qemu-img", dir, same);
    let ours = peer("qemu-img", dir, ["map", "--output", "json", &uri]);
    let theirs = peer("qemu-img", dir, ["map", "--output", "json", "disk.raw"]);
    let extents = |text: &str| -> Vec<(u64, u64, bool)> {
        let map: serde_json::Value = serde_json::from_str(text).expect("JSON");
        let map = map.as_array().expect("a list").iter();
        map.map(|e| {
            let number = |key: &str| e[key].as_u64().expect("a number");
            (number("start"), number("length"), e["data"] == true)
        })
        .collect()
    };
    assert_eq!(extents(&ours), extents(&theirs));
}

#[test]
fn qemu_io_writes_zeroes_discards_and_reads_back() {
    if !requires("qemu-io") {
        return;
    }
    let (serving, mut bytes) = serving();
    let uri = serving.uri("");
    let commands = [
        "write -P 0x5a 100 200000",
        "write -f -P 0x5b 3M 64k",
        "write -z -u 1M 128k",
        "write -z 5M 4k",
        "discard 1536k 64k",
        "flush",
        "read -P 0x5a 100 200000",
        "read -P 0 1M 128k",
    ];
    let mut arguments = vec!["-f", "raw", &*uri];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    let told = peer("qemu-io", serving.dir.path(), arguments);
    assert!(!told.contains("failed"), "{told}");
    bytes[100..200_100].fill(0x5a);
    bytes[3 * MIB..3 * MIB + (64 << 10)].fill(0x5b);
    bytes[MIB..MIB + (128 << 10)].fill(0);
    bytes[5 * MIB..5 * MIB + 4096].fill(0);
    bytes[1536 << 10..1600 << 10].fill(0);
    let found = std::fs::read(serving.image()).expect("reads");
    assert_same(&found, &bytes, 0, "written");
}

#[test]
fn nbdcopy_copies_from_us_and_into_us() {
    if !requires("nbdcopy") {
        return;
    }
    let (serving, bytes) = serving();
    let dir = serving.dir.path();
    peer(
        "nbdcopy",
        dir,
        ["--requests=64", &serving.uri(""), "copy.raw"],
    );
    let copy = std::fs::read(dir.join("copy.raw")).expect("reads");
    assert_same(&copy, &bytes, 0, "copied out");
    let other = Serving::raw(&vec![9; bytes.len()], lasting());
    peer("nbdcopy", dir, ["--flush", "copy.raw", &other.uri("")]);
    let found = std::fs::read(other.image()).expect("reads");
    assert_same(&found, &bytes, 0, "copied in");
    // From one of ours to another, with both kinds of sparseness.
    let third = Serving::raw(&vec![9; bytes.len()], lasting());
    let (from, to) = (serving.uri(""), third.uri(""));
    peer(
        "nbdcopy",
        dir,
        [
            "--destination-is-zero",
            "--request-size=1048576",
            &from,
            &to,
        ],
    );
    peer("nbdcopy", dir, [&*from, &*to]);
    let found = std::fs::read(third.image()).expect("reads");
    assert_same(&found, &bytes, 0, "copied from server to server");
}

#[test]
fn nbdinfo_finds_all_exports_and_what_they_can_do() {
    if !requires("nbdinfo") {
        return;
    }
    let dir = scratch();
    let (a, b) = (dir.path().join("a.raw"), dir.path().join("b.raw"));
    std::fs::write(&a, vec![1; MIB]).expect("writes");
    std::fs::write(&b, vec![2; 2 * MIB]).expect("writes");
    let exports = vec![
        export("first", &a, &ChainOptions::write()),
        export("zweites ü", &b, &ChainOptions::read()),
    ];
    let serving = Serving::new(dir, exports, lasting());
    let list = ["--list", "--json", &serving.uri("")];
    let told = peer("nbdinfo", serving.dir.path(), list);
    let told: serde_json::Value = serde_json::from_str(&told).expect("JSON");
    let exports = told["exports"].as_array().expect("a list");
    let facts: Vec<_> = exports
        .iter()
        .map(|e| {
            let text = |key: &str| e[key].as_str().expect("text").to_owned();
            (
                text("export-name"),
                e["export-size"].clone(),
                e["is_read_only"].clone(),
            )
        })
        .collect();
    let expected = [
        ("first".to_owned(), MIB.into(), false.into()),
        ("zweites ü".to_owned(), (2 * MIB).into(), true.into()),
    ];
    assert_eq!(facts, expected);
    for flag in [
        "can_fua",
        "can_trim",
        "can_zero",
        "can_multi_conn",
        "can_df",
        "can_fast_zero",
    ] {
        assert_eq!(exports[0][flag], true, "{flag}");
    }
    assert_eq!(exports[1]["can_trim"], false);
    assert_eq!(exports[0]["description"], "the disk first");
    assert_eq!(exports[0]["contexts"][0], "base:allocation");
}

#[test]
fn a_qcow2_chain_tells_its_depths_and_its_bitmap() {
    if !requires("qemu-img") || !requires("nbdinfo") {
        return;
    }
    let dir = scratch();
    let run = |arguments: &str| peer("qemu-img", dir.path(), arguments.split(' '));
    run("create -q -f qcow2 base.qcow2 4M");
    peer(
        "qemu-io",
        dir.path(),
        ["-c", "write -P 1 0 1M", "base.qcow2"],
    );
    run("create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2");
    run("bitmap --add top.qcow2 b0");
    peer(
        "qemu-io",
        dir.path(),
        ["-c", "write -P 2 1M 64k", "top.qcow2"],
    );
    let image = dir.path().join("top.qcow2");
    let exports = vec![export("", &image, &ChainOptions::read())];
    let options = super::Options {
        bitmaps: vec!["b0".to_owned()],
        ..lasting()
    };
    let serving = Serving::new(dir, exports, options);
    let map = |context: &str| -> Vec<(u64, u64, u64)> {
        let map = format!("--map={context}");
        let told = peer(
            "nbdinfo",
            serving.dir.path(),
            ["--json", &map, &serving.uri("")],
        );
        let told: serde_json::Value = serde_json::from_str(&told).expect("JSON");
        let number = |e: &serde_json::Value, key: &str| e[key].as_u64().expect("a number");
        let extents = told.as_array().expect("a list").iter();
        extents
            .map(|e| (number(e, "offset"), number(e, "length"), number(e, "type")))
            .collect()
    };
    let mib = 1 << 20;
    let end = mib + (64 << 10);
    let rest = 4 * mib - end;
    let expected = [(0, mib, 2), (mib, 64 << 10, 1), (end, rest, 0)];
    assert_eq!(map("qemu:allocation-depth"), expected);
    let expected = [(0, mib, 0), (mib, 64 << 10, 1), (end, rest, 0)];
    assert_eq!(map("qemu:dirty-bitmap:b0"), expected);
    assert_eq!(map("base:allocation"), [(0, end, 0), (end, rest, 3)]);
}

/// Serves a new image of a format, of 64 MiB; its backend is to be finished when the server has
/// ended.
fn serving_new(format: &str) -> (Serving, Arc<Backend>) {
    let dir = scratch();
    let image = dir.path().join("disk");
    crate::util::vdtool()
        .args(["create", "-q", "-f", format])
        .arg(&image)
        .arg("64M")
        .assert()
        .success();
    let options = ChainOptions {
        format: vdtool::formats::by_name(format),
        ..ChainOptions::write()
    };
    let export = export("", &image, &options);
    let backend = Arc::clone(&export.backend);
    (Serving::new(dir, vec![export], lasting()), backend)
}

#[test]
fn fio_finds_what_it_wrote_trimmed_and_overwrote_at_random() {
    let has_nbd = || {
        let asked = std::process::Command::new("fio")
            .arg("--enghelp=nbd")
            .output();
        asked.is_ok_and(|o| o.status.success())
    };
    if !requires("fio") {
        return;
    }
    if !has_nbd() {
        return crate::util::skipped("fio has no nbd engine");
    }
    for format in ["raw", "vhd", "vdi", "qcow2"] {
        let (serving, backend) = serving_new(format);
        let uri = format!("--uri={}", serving.uri(""));
        let fio = |arguments: &[&str]| {
            let common = ["--name=verify", "--ioengine=nbd", &uri, "--size=64M"];
            let all = [&common[..], &["--output-format=terse"], arguments].concat();
            peer("fio", serving.dir.path(), all);
        };
        let verify = [
            "--verify=crc32c",
            "--verify_fatal=1",
            "--do_verify=1",
            "--iodepth=32",
            "--randseed=77",
        ];
        for shape in [
            &[
                "--rw=randwrite",
                "--bsrange=512-64k",
                "--bs_unaligned=0",
                "--blockalign=512",
            ][..],
            &["--rw=randrw", "--bs=4k", "--verify_backlog=64"],
            &["--rw=randwrite", "--bs=64k", "--fsync=16"],
            // One at a time: each trim must be done before the write over it begins.
            &["--rw=randtrimwrite", "--bs=16k", "--iodepth=1"],
            &["--rw=write", "--bs=1M", "--fsync=4"],
        ] {
            fio(&[&verify[..], shape].concat());
        }
        // Two connections at once, each in its own half.
        let halves = [
            "--numjobs=2",
            "--size=32M",
            "--offset_increment=32M",
            "--rw=randrw",
        ];
        fio(&[&halves[..], &["--bs=8k"], &verify[..]].concat());
        // The disk is in order afterwards.
        let Serving { server, dir, .. } = serving;
        server.stop();
        server.wait().expect("ends well");
        drop(server);
        backend.finish().expect("closes");
        if format != "raw" {
            crate::util::vdtool()
                .args(["check", "-f", format])
                .arg(dir.path().join("disk"))
                .assert()
                .success();
        }
    }
}

#[test]
fn nbdcopy_copies_both_ways_however_it_asks() {
    if !requires("nbdcopy") {
        return;
    }
    let (source, bytes) = serving();
    let dir = source.dir.path();
    let plain = dir.join("disk.raw");
    let plain = plain.to_str().expect("UTF-8");
    for options in [
        &["--requests=1", "--connections=1"][..],
        &["--requests=64", "--connections=1"],
        &["--requests=16", "--connections=4", "--threads=4"],
        &["--synchronous"],
        &["--no-extents", "--sparse=0", "--request-size=2097152"],
        &["--allocated", "--requests=8"],
    ] {
        let run = |from: &str, to: &str| {
            peer("nbdcopy", dir, [options, &[from, to]].concat());
        };
        run(&source.uri(""), "copy.raw");
        let found = std::fs::read(dir.join("copy.raw")).expect("reads");
        assert_same(&found, &bytes, 0, "copied out");
        std::fs::remove_file(dir.join("copy.raw")).expect("removes");
        let target = Serving::raw(&vec![9; bytes.len()], lasting());
        run(plain, &target.uri(""));
        let found = std::fs::read(target.image()).expect("reads");
        assert_same(&found, &bytes, 0, "copied in");
        for format in ["qcow2", "vhd", "vdi"] {
            let (target, _backend) = serving_new(format);
            run(plain, &target.uri(""));
            let found = target.uri("");
            peer("nbdcopy", dir, [&*found, "back.raw"]);
            let found = std::fs::read(dir.join("back.raw")).expect("reads");
            assert_same(&found[..bytes.len()], &bytes, 0, format);
            assert!(found[bytes.len()..].iter().all(|b| *b == 0));
        }
    }
}

#[test]
fn nbdinfo_sums_up_each_context_and_tells_block_sizes() {
    if !requires("nbdinfo") {
        return;
    }
    let (serving, bytes) = serving();
    let uri = serving.uri("");
    let told = peer("nbdinfo", serving.dir.path(), ["--json", &uri]);
    let told: serde_json::Value = serde_json::from_str(&told).expect("JSON");
    let export = &told["exports"][0];
    assert_eq!(told["protocol"], "newstyle-fixed");
    assert_eq!(export["block_size_minimum"], 1);
    assert_eq!(export["block_size_preferred"], 4096);
    assert_eq!(export["block_size_maximum"], 32 << 20);
    let sum = |context: &str| {
        let map = format!("--map={context}");
        let arguments = ["--json", "--totals", &map, &uri];
        let told = peer("nbdinfo", serving.dir.path(), arguments);
        let told: serde_json::Value = serde_json::from_str(&told).expect("JSON");
        let rows = told.as_array().expect("a list").iter();
        let sizes = rows.map(|r| r["size"].as_u64().expect("a number"));
        sizes.collect::<Vec<_>>()
    };
    let all = bytes.len() as u64;
    let base = sum("base:allocation");
    assert_eq!((base.len(), base.iter().sum()), (2, all));
    assert_eq!(sum("qemu:allocation-depth"), [all]);
    for (what, code) in [("write", true), ("trim", true), ("tls", false)] {
        let done = std::process::Command::new("nbdinfo")
            .args(["--can", what, &uri])
            .status();
        assert_eq!(done.expect("runs").success(), code, "{what}");
    }
}

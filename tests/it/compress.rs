//! Compressed qcow2: what we write, peers read, and the other way round; streams; refusals.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use vdtool::chain::Chain;
use vdtool::copy::progress::Silent;
use vdtool::copy::{Before, Convert, Joined, Scan};
use vdtool::image::check::Repair;
use vdtool::image::open::WriteOrder;
use vdtool::storage::memory::{Fault, Op};
use vdtool::storage::open::Access;

use crate::layers::{Disk, LayerSpec, Place, read_all};
use crate::util::{Seeded, assert_same, peer, requires, scratch, vdtool};

/// Every kind of image that can hold compressed clusters.
const KINDS: [&str; 12] = [
    "cluster_size=512",
    "cluster_size=512,refcount_bits=1",
    "cluster_size=4k,refcount_bits=2,compression_type=zstd",
    "cluster_size=4k,compat=0.10",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=64k",
    "cluster_size=64k,refcount_bits=1",
    "cluster_size=64k,compression_type=zstd,refcount_bits=64",
    "cluster_size=64k,extended_l2=on,compression_type=zstd,refcount_bits=8",
    "cluster_size=256k,lazy_refcounts=on",
    "cluster_size=2M",
    "cluster_size=2M,compression_type=zstd",
];

/// Text, noise, zeroes and what is between, at odd places; the end is not that of a cluster.
fn content() -> Vec<u8> {
    let mut random = Seeded::new("compress");
    let mut bytes = vec![0; (5 << 20) + 3 * 512];
    let end = bytes.len();
    let mut at = 0;
    while at < end {
        let next = (at + random.usize(1..400_000)).min(end);
        match random.u32(0..4) {
            0 => {}
            1 => {
                let noise = random.bytes(next - at);
                bytes[at..next].copy_from_slice(&noise);
            }
            _ => {
                let word = random.u32(..);
                let text = format!("{word} bottles, {at} crates; ");
                let text = text.bytes().cycle().take(next - at);
                bytes.splice(at..next, text);
            }
        }
        at = next;
    }
    bytes[end - 700..].fill(b'e');
    bytes
}

fn works(directory: &Path, arguments: &[&str]) -> Vec<u8> {
    let done = vdtool().current_dir(directory).args(arguments).assert();
    done.success().get_output().stdout.clone()
}

fn fails(directory: &Path, arguments: &[&str], code: i32) -> String {
    let done = vdtool().current_dir(directory).args(arguments).assert();
    let error = done.code(code).get_output().stderr.clone();
    String::from_utf8(error).expect("is text")
}

fn compressed_clusters(directory: &Path, name: &str) -> u64 {
    let text = works(directory, &["check", "--output", "json", name]);
    let report: serde_json::Value = serde_json::from_slice(&text).expect("is JSON");
    assert_eq!(report["leaks"].as_u64().unwrap_or(0), 0, "{name}");
    report["compressed-clusters"].as_u64().unwrap_or(0)
}

/// The image holds `bytes` and is sound, in our eyes and in QEMU's.
fn sound(directory: &Path, name: &str, bytes: &[u8], what: &str) {
    assert!(compressed_clusters(directory, name) > 0, "{what}");
    works(directory, &["convert", "-O", "raw", name, "back.raw"]);
    let found = fs::read(directory.join("back.raw")).expect("reads");
    assert_same(&found, bytes, 0, what);
    if requires("qemu-img") {
        peer("qemu-img", directory, ["check", "-q", name]);
        let arguments = ["convert", "-O", "raw", name, "qemu.raw"];
        peer("qemu-img", directory, arguments);
        let found = fs::read(directory.join("qemu.raw")).expect("reads");
        assert_same(&found, bytes, 0, what);
    }
}

#[test]
fn every_kind_of_image_reads_the_same_in_qemu_written_to_a_file_or_as_a_stream() {
    let scratch = scratch();
    let dir = scratch.path();
    let bytes = content();
    fs::write(dir.join("a.raw"), &bytes).expect("writes");
    for kind in KINDS {
        works(dir, &["convert", "-c", "-o", kind, "a.raw", "a.qcow2"]);
        sound(dir, "a.qcow2", &bytes, kind);
        let arguments = ["convert", "-c", "-O", "qcow2", "-o", kind, "a.raw", "-"];
        fs::write(dir.join("s.qcow2"), works(dir, &arguments)).expect("writes");
        sound(dir, "s.qcow2", &bytes, &format!("{kind}, stream"));
    }
}

#[test]
fn levels_and_the_strict_window_read_the_same_in_qemu() {
    let scratch = scratch();
    let dir = scratch.path();
    let bytes = content();
    fs::write(dir.join("a.raw"), &bytes).expect("writes");
    for options in [
        "compression_level=12",
        "strict_window=on",
        "strict_window=on,compression_level=1,cluster_size=2M",
        "strict_window=on,compression_level=9,cluster_size=4k",
        "compression_type=zstd,compression_level=19",
    ] {
        works(dir, &["convert", "-c", "-o", options, "a.raw", "a.qcow2"]);
        sound(dir, "a.qcow2", &bytes, options);
    }
}

#[test]
fn what_qemu_compressed_is_read_and_written_again() {
    if !requires("qemu-img") {
        return;
    }
    let scratch = scratch();
    let dir = scratch.path();
    let bytes = content();
    fs::write(dir.join("a.raw"), &bytes).expect("writes");
    for kind in KINDS {
        let arguments = [
            "convert", "-c", "-O", "qcow2", "-o", kind, "a.raw", "q.qcow2",
        ];
        peer("qemu-img", dir, arguments);
        sound(dir, "q.qcow2", &bytes, kind);
        works(dir, &["convert", "-c", "q.qcow2", "a.qcow2"]);
        sound(dir, "a.qcow2", &bytes, &format!("{kind}, written again"));
    }
}

#[test]
fn the_file_and_the_stream_are_the_same_whatever_the_number_of_threads() {
    let scratch = scratch();
    let dir = scratch.path();
    fs::write(dir.join("a.raw"), content()).expect("writes");
    for kind in [
        "cluster_size=4k",
        "compression_type=zstd",
        "cluster_size=2M",
    ] {
        let made = |jobs: &str| {
            let all = ["convert", "-c", "-j", jobs, "-o", kind, "a.raw", "a.qcow2"];
            works(dir, &all);
            let stream = [
                "convert", "-c", "-O", "qcow2", "-j", jobs, "-o", kind, "a.raw", "-",
            ];
            let file = fs::read(dir.join("a.qcow2")).expect("reads");
            (file, works(dir, &stream))
        };
        let one = made("1");
        for jobs in ["2", "5"] {
            let (file, stream) = made(jobs);
            assert_same(&file, &one.0, 0, kind);
            assert_same(&stream, &one.1, 0, kind);
        }
    }
}

#[test]
fn a_stream_without_compression_is_an_image_too() {
    let scratch = scratch();
    let dir = scratch.path();
    let bytes = content();
    fs::write(dir.join("a.raw"), &bytes).expect("writes");
    for kind in KINDS {
        let arguments = ["convert", "-O", "qcow2", "-o", kind, "a.raw", "-"];
        fs::write(dir.join("s.qcow2"), works(dir, &arguments)).expect("writes");
        assert_eq!(compressed_clusters(dir, "s.qcow2"), 0);
        works(dir, &["convert", "s.qcow2", "back.raw"]);
        let found = fs::read(dir.join("back.raw")).expect("reads");
        assert_same(&found, &bytes, 0, kind);
        if requires("qemu-img") {
            peer("qemu-img", dir, ["check", "-q", "s.qcow2"]);
            peer("qemu-img", dir, ["compare", "-q", "a.raw", "s.qcow2"]);
        }
        // It takes writes like any other image.
        let text = ["io", "-q", "-c", "write -P 7 1M 300k", "s.qcow2"];
        works(dir, &text);
        works(dir, &["check", "-q", "s.qcow2"]);
    }
    works(dir, &["create", "-q", "empty.raw", "3T"]);
    let arguments = ["convert", "-c", "-O", "qcow2", "empty.raw", "-"];
    let empty = works(dir, &arguments);
    assert!(empty.len() < 1 << 20, "{}", empty.len());
    fs::write(dir.join("s.qcow2"), empty).expect("writes");
    works(dir, &["check", "-q", "s.qcow2"]);
}

#[test]
fn with_a_backing_image_only_clusters_that_differ_are_stored() {
    let scratch = scratch();
    let dir = scratch.path();
    let base = content();
    let mut bytes = base.clone();
    bytes[70_000] ^= 1;
    bytes[2_000_000..2_200_000].fill(0);
    bytes[3_000_000..3_000_100].fill(b'x');
    bytes.resize(bytes.len() + (200 << 10), 0);
    fs::write(dir.join("base.raw"), &base).expect("writes");
    fs::write(dir.join("a.raw"), &bytes).expect("writes");
    for kind in [
        "cluster_size=64k",
        "cluster_size=16k,extended_l2=on,compression_type=zstd",
        "cluster_size=4k,compat=0.10",
        "cluster_size=512",
    ] {
        works(
            dir,
            &[
                "convert",
                "-c",
                "-O",
                "qcow2",
                "-B",
                "base.raw",
                "-F",
                "raw",
                "-o",
                kind,
                "a.raw",
                "top.qcow2",
            ],
        );
        sound(dir, "top.qcow2", &bytes, kind);
        assert!(fs::metadata(dir.join("top.qcow2")).expect("is there").len() < 700_000);
        let text = works(dir, &["map", "--output", "json", "top.qcow2"]);
        let extents: Vec<serde_json::Value> = serde_json::from_slice(&text).expect("is JSON");
        let at = |offset: u64| {
            let has = |e: &&serde_json::Value| {
                let start = e["start"].as_u64().unwrap_or(0);
                offset >= start && offset < start + e["length"].as_u64().unwrap_or(0)
            };
            extents.iter().find(has).expect("extents cover the disk")
        };
        assert_eq!(at(0)["depth"], 1, "{kind}: {:?}", at(0));
        assert_eq!(at(3_000_050)["depth"], 0, "{kind}");
        assert_eq!(at(3_000_050)["compressed"], true, "{kind}");
        assert_eq!(at(2_100_000)["zero"], true, "{kind}");
    }
}

#[test]
fn an_image_that_exists_has_its_clusters_replaced_and_their_space_given_back() {
    let scratch = scratch();
    let dir = scratch.path();
    let mut bytes = content();
    fs::write(dir.join("a.raw"), &bytes).expect("writes");
    for kind in ["cluster_size=64k", "cluster_size=16k,extended_l2=on"] {
        works(
            dir,
            &["create", "-q", "-f", "qcow2", "-o", kind, "t.qcow2", "6M"],
        );
        let fill = ["io", "-q", "-c", "write -P 9 0 6M", "t.qcow2"];
        works(dir, &fill);
        works(dir, &["snapshot", "-c", "before", "t.qcow2"]);
        let convert = [
            "convert",
            "-n",
            "-c",
            "-o",
            "compression_level=2",
            "-O",
            "qcow2",
        ];
        let mut expected = bytes.clone();
        expected.resize(6 << 20, 9);
        for _ in 0..2 {
            works(dir, &[&convert[..], &["a.raw", "t.qcow2"]].concat());
            sound(dir, "t.qcow2", &expected, kind);
        }
        works(dir, &["convert", "-l", "before", "t.qcow2", "before.raw"]);
        let before = fs::read(dir.join("before.raw")).expect("reads");
        assert_same(&before, &vec![9; 6 << 20], 0, "the snapshot");
        works(dir, &["snapshot", "-d", "before", "t.qcow2"]);
        sound(dir, "t.qcow2", &expected, kind);
    }
    // What was compressed is overwritten, zeroed and discarded like anything else.
    works(dir, &["convert", "-c", "a.raw", "a.qcow2"]);
    let commands = ["write -P 3 100000 100000", "zero 1M 200k", "discard 2M 1M"];
    let commands = commands.iter().flat_map(|c| ["-c", c]);
    let all: Vec<&str> = ["io", "-q"].into_iter().chain(commands).collect();
    works(dir, &[&all[..], &["a.qcow2"]].concat());
    bytes[100_000..200_000].fill(3);
    bytes[1 << 20..(1 << 20) + (200 << 10)].fill(0);
    bytes[2 << 20..3 << 20].fill(0);
    sound(dir, "a.qcow2", &bytes, "changed");
}

#[test]
fn noise_is_stored_as_it_is_and_zeroes_not_at_all() {
    let scratch = scratch();
    let dir = scratch.path();
    let mut bytes = Seeded::new("noise").bytes(1 << 20);
    bytes[256 << 10..512 << 10].fill(0);
    fs::write(dir.join("a.raw"), &bytes).expect("writes");
    works(dir, &["convert", "-c", "a.raw", "a.qcow2"]);
    assert_eq!(compressed_clusters(dir, "a.qcow2"), 0);
    let len = fs::metadata(dir.join("a.qcow2")).expect("is there").len();
    assert!(len <= (768 << 10) + 5 * 65_536, "{len}");
    // Written zeroes are data where all is to take space.
    works(dir, &["convert", "-c", "-S", "0", "a.raw", "full.qcow2"]);
    assert_eq!(compressed_clusters(dir, "full.qcow2"), 4);
}

#[test]
fn compression_is_refused_where_it_cannot_be() {
    let scratch = scratch();
    let dir = scratch.path();
    fs::write(dir.join("a.raw"), vec![1; 100_000]).expect("writes");
    for target in ["b.vhd", "b.raw", "-"] {
        let error = fails(dir, &["convert", "-c", "a.raw", target], 63);
        assert!(error.contains("compressed"), "{error}");
    }
    let data = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "data_file=d.raw",
        "e.qcow2",
        "1M",
    ];
    works(dir, &data);
    let error = fails(dir, &["convert", "-n", "-c", "a.raw", "e.qcow2"], 63);
    assert!(error.contains("data file"), "{error}");
    for (arguments, code, part) in [
        (&["-o", "compression_level=3"][..], 2, "-c"),
        (&["-c", "-o", "preallocation=full"], 2, "preallocation"),
        (&["-c", "-o", "compression_level=13"], 1, "1 to 12"),
        (&["-c", "-o", "compression_level=x"], 1, "number"),
        (
            &["-c", "-o", "strict_window,compression_type=zstd"],
            1,
            "zlib",
        ),
    ] {
        let all = [&["convert"], arguments, &["a.raw", "b.qcow2"]].concat();
        let error = fails(dir, &all, code);
        assert!(error.contains(part), "{error}");
        let all = [&["convert", "-O", "qcow2"], arguments, &["a.raw", "-"]].concat();
        let done = vdtool().current_dir(dir).args(all).assert().failure();
        assert!(done.get_output().stdout.is_empty());
    }
    for arguments in [&["-B", "a.raw"][..], &["--verify"], &["-o", "data_file=x"]] {
        let all = [&["convert", "-O", "qcow2"], arguments, &["a.raw", "-"]].concat();
        let done = vdtool().current_dir(dir).args(all).assert().failure();
        assert!(done.get_output().stdout.is_empty());
    }
    assert!(!dir.join("b.qcow2").exists());
}

#[test]
fn a_full_disk_leaves_nothing_under_the_name() {
    let scratch = scratch();
    let dir = scratch.path();
    fs::write(dir.join("a.raw"), content()).expect("writes");
    let before = fs::read_dir(dir).expect("reads").count();
    let script = "ulimit -f 1000; exec \"$0\" convert -c a.raw b.qcow2";
    let status = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_vdtool")])
        .current_dir(dir)
        .stderr(Stdio::null())
        .status()
        .expect("starts");
    assert_eq!(status.code(), Some(1));
    assert_eq!(fs::read_dir(dir).expect("reads").count(), before);
}

fn qcow2(options: &'static str) -> [LayerSpec; 1] {
    [LayerSpec {
        format: "qcow2",
        options,
        size: 1 << 20,
    }]
}

fn compress_into(source: Chain, target: &Chain) -> vdtool::Result<()> {
    let options = Convert {
        workers: 3,
        scan: Scan::Cheapest,
        before: Before::Unknown,
        backing: None,
        salvage: None,
        rate: None,
        only: None,
    };
    vdtool::copy::compress(&Joined::new(vec![source])?, target, &options, &Silent)
}

#[test]
fn an_image_that_a_full_disk_stopped_is_sound_and_takes_the_rest_later() {
    let mut random = Seeded::new("full");
    for options in ["cluster_size=512", "cluster_size=4k,extended_l2=off"] {
        for after in 0..60 {
            let disk = Disk::create(Place::Memory, &qcow2(options));
            let source = Disk::of_bytes("raw", &content()[..1 << 20]);
            let open = || source.open(Access::Read, WriteOrder::Ordered);
            let chain = disk.open(Access::Write, WriteOrder::Ordered);
            disk.memory()[0].inject(Fault {
                op: Op::Change,
                after: after * random.usize(1..12),
                count: random.usize(1..4),
                errno: libc::ENOSPC,
            });
            let failed = compress_into(open(), &chain).is_err();
            disk.memory()[0].heal();
            if let Some(report) = disk.check(Repair::Nothing) {
                assert_eq!(report.corruptions, 0, "{:?}", report.findings);
            }
            if failed {
                compress_into(open(), &chain).expect("there is room again");
            }
            assert!(read_all(&chain) == content()[..1 << 20]);
            chain.close().expect("closes");
            drop(chain);
            let report = disk.check(Repair::Nothing).expect("has a check");
            assert_eq!(report.corruptions, 0, "{:?}", report.findings);
            assert!(Arc::strong_count(&disk.memory()[0]) > 0);
        }
    }
}

#[test]
fn io_writes_compressed_clusters_as_qemu_io_does() {
    let scratch = scratch();
    let dir = scratch.path();
    let size = ["create", "-q", "-f", "qcow2", "c.qcow2", "1049088"];
    works(dir, &size);
    let io = |command: &str| {
        let all = ["io", "-c", command, "c.qcow2"];
        vdtool().current_dir(dir).args(all).assert()
    };
    io("write -c -P 1 0 64k").success();
    io("write -c -P 2 128k 192k").success();
    // To the end of the disk, which is not that of a cluster.
    io("write -c -P 3 1M 512").success();
    io("write -P 4 512k 100").success();
    for (command, part) in [
        ("write -c 0 64k", "is allocated"),
        ("write -c 64k 128k", "is allocated"),
        ("write -c 512k 64k", "is allocated"),
        ("write -c 64k 32k", "allowed: multiples"),
        ("write -c 100 64k", "allowed: multiples"),
        ("write -c -f 64k 64k", "-f and -b or -c"),
        ("write -c -z 64k 64k", "-c and -z"),
    ] {
        let done = io(command).failure();
        let text = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
        let out = String::from_utf8_lossy(&done.get_output().stdout).into_owned();
        assert!(
            format!("{text}{out}").contains(part),
            "{command}: {text}{out}"
        );
    }
    io("write -z 64k 64k").success();
    io("write -c -P 5 64k 64k").success();
    let mut bytes = vec![0; 1_049_088];
    bytes[..64 << 10].fill(1);
    bytes[64 << 10..128 << 10].fill(5);
    bytes[128 << 10..320 << 10].fill(2);
    bytes[512 << 10..][..100].fill(4);
    bytes[1 << 20..].fill(3);
    sound(dir, "c.qcow2", &bytes, "io");
    assert_eq!(compressed_clusters(dir, "c.qcow2"), 6);
    // More than goes through memory at a time: all of it, or, refused, nothing.
    works(dir, &["create", "-q", "-f", "qcow2", "d.qcow2", "20M"]);
    let long = |command: &str| {
        let all = ["io", "-c", command, "d.qcow2"];
        vdtool().current_dir(dir).args(all).assert()
    };
    let before = fs::read(dir.join("d.qcow2")).expect("reads");
    long("write -c -P 6 64k 9217k").failure();
    assert!(fs::read(dir.join("d.qcow2")).expect("reads") == before);
    long("write -c -P 6 64k 9M").success();
    let mut disk = vec![0; 20 << 20];
    disk[64 << 10..(64 << 10) + (9 << 20)].fill(6);
    sound(dir, "d.qcow2", &disk, "a long write");
    assert_eq!(compressed_clusters(dir, "d.qcow2"), 144);
    if requires("qemu-io") {
        // QEMU goes on where we ended.
        let command = ["-c", "write -c -P 6 704k 64k", "c.qcow2"];
        peer("qemu-io", dir, command);
        bytes[704 << 10..768 << 10].fill(6);
        sound(dir, "c.qcow2", &bytes, "io and QEMU");
    }
}

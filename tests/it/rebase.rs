//! `vdtool commit` and `vdtool rebase`, beside qemu-img.

use std::path::Path;

use vdtool::chain::open::{self, ChainOptions};
use vdtool::image::check::Repair;
use vdtool::image::create::CreateBacking;
use vdtool::image::open::WriteOrder;
use vdtool::storage::memory::MemoryStorage;
use vdtool::storage::open::Access;

use crate::layers::Disk;
use crate::util::{Seeded, peer, requires, scratch, vdtool};

fn ours(dir: &Path, line: &[&str]) -> assert_cmd::assert::Assert {
    vdtool().current_dir(dir).args(line).assert()
}

fn read(dir: &Path, file: &str) -> Vec<u8> {
    ours(dir, &["convert", "-q", "-O", "raw", file, "read.raw"]).success();
    std::fs::read(dir.join("read.raw")).expect("reads")
}

fn check(dir: &Path, file: &str) {
    let text = peer("qemu-img", dir, ["check", file]);
    assert!(text.contains("No errors were found"), "{text}");
    peer(
        "qemu-img",
        dir,
        ["convert", "-O", "raw", file, "theirs.raw"],
    );
    let theirs = std::fs::read(dir.join("theirs.raw")).expect("reads");
    assert!(theirs == read(dir, file), "both read the same of {file}");
}

/// Random writes, zeroes and discards.
fn scribble(dir: &Path, file: &str, rng: &mut Seeded, size: u64) {
    let mut line = vec!["io".to_owned()];
    for _ in 0..12 {
        let at = rng.u64(0..size / 512) * 512;
        let len = (rng.u64(1..400) * 512).min(size - at);
        let command = match rng.u32(0..4) {
            0 => format!("write -z {at} {len}"),
            _ => format!("write -P {} {at} {len}", rng.u8(1..)),
        };
        line.extend(["-c".to_owned(), command]);
    }
    line.extend(["-q".to_owned(), file.to_owned()]);
    let line: Vec<&str> = line.iter().map(String::as_str).collect();
    ours(dir, &line).success();
}

/// A base of 3 MiB, a middle of `middle` and a top of 4 MiB, each scribbled upon.
fn chain(dir: &Path, options: &str, middle: &str, rng: &mut Seeded) {
    let create = |line: &[&str]| drop(peer("qemu-img", dir, line));
    let qcow2 = ["create", "-q", "-f", "qcow2", "-o", options];
    create(&[&qcow2[..], &["base.qcow2", "3M"]].concat());
    let on = |below: &'static str| ["-b", below, "-F", "qcow2"];
    create(&[&qcow2[..], &on("base.qcow2"), &["mid.qcow2", middle]].concat());
    create(&[&qcow2[..], &on("mid.qcow2"), &["top.qcow2", "4M"]].concat());
    scribble(dir, "base.qcow2", rng, 3 << 20);
    scribble(dir, "mid.qcow2", rng, 2 << 20);
    scribble(dir, "top.qcow2", rng, 4 << 20);
}

const OPTIONS: [&str; 4] = [
    "cluster_size=64k",
    "compat=0.10",
    "cluster_size=512",
    "extended_l2=on",
];

#[test]
fn a_commit_leaves_the_disk_in_the_base_whatever_the_layers() {
    if !requires("qemu-img") {
        return;
    }
    let mut rng = Seeded::new("commit");
    for options in OPTIONS {
        for (middle, base) in [("3M", None), ("2M", None), ("2M", Some("base.qcow2"))] {
            let dir = scratch();
            let dir = dir.path();
            chain(dir, options, middle, &mut rng);
            let before = read(dir, "top.qcow2");
            let mut line = vec!["commit"];
            line.extend(base.iter().flat_map(|b| ["-b", b]));
            line.push("top.qcow2");
            let done = ours(dir, &line).success();
            assert_eq!(done.get_output().stdout, b"Image committed.\n");
            let target = base.unwrap_or("mid.qcow2");
            assert!(read(dir, target) == before, "{options} {middle} {base:?}");
            check(dir, target);
            if base.is_none() {
                check(dir, "top.qcow2");
                assert!(read(dir, "top.qcow2") == before);
                let map = peer("qemu-img", dir, ["map", "--output=json", "top.qcow2"]);
                assert!(!map.contains("\"depth\": 0, \"present\": true"), "{map}");
            }
        }
    }
}

#[test]
fn a_commit_into_raw_and_with_d_leaves_the_top_as_it_is() {
    let dir = scratch();
    let dir = dir.path();
    for format in ["qcow2", "vhd"] {
        let top = format!("top.{format}");
        ours(dir, &["create", "-q", "base.raw", "4M"]).success();
        ours(dir, &["io", "-q", "-c", "write -P 1 0 3M", "base.raw"]).success();
        let line = [
            "create", "-q", "-f", format, "-b", "base.raw", "-F", "raw", &top,
        ];
        ours(dir, &line).success();
        ours(dir, &["io", "-q", "-c", "write -P 2 1M 1M", &top]).success();
        let before = read(dir, &top);
        let bytes = std::fs::read(dir.join(&top)).expect("reads");
        ours(dir, &["commit", "-q", "-d", &top])
            .success()
            .stdout("");
        assert!(std::fs::read(dir.join("base.raw")).expect("reads") == before);
        assert!(std::fs::read(dir.join(&top)).expect("reads") == bytes);
        ours(dir, &["commit", "-q", "base.raw"]).code(1);
        ours(dir, &["commit", "-q", "-b", "read.raw", &top]).code(1);
    }
}

#[test]
fn a_rebase_keeps_the_disk_and_copies_no_more_than_it_must() {
    if !requires("qemu-img") {
        return;
    }
    let mut rng = Seeded::new("rebase");
    for options in OPTIONS {
        let dir = scratch();
        let dir = dir.path();
        for target in ["base.qcow2", "other.raw", ""] {
            chain(dir, options, "2M", &mut rng);
            ours(dir, &["create", "-q", "other.raw", "1M"]).success();
            scribble(dir, "other.raw", &mut rng, 1 << 20);
            let before = read(dir, "top.qcow2");
            std::fs::copy(dir.join("top.qcow2"), dir.join("their.qcow2")).expect("copies");
            let format = if target.ends_with("raw") {
                "raw"
            } else {
                "qcow2"
            };
            let name: &[&str] = match target {
                "" => &["-b", ""],
                target => &["-b", target, "-F", format],
            };
            ours(dir, &[&["rebase"], name, &["top.qcow2"]].concat()).success();
            assert!(read(dir, "top.qcow2") == before, "{options} {target}");
            check(dir, "top.qcow2");
            peer(
                "qemu-img",
                dir,
                [&["rebase"], name, &["their.qcow2"]].concat(),
            );
            let len = |file: &str| std::fs::metadata(dir.join(file)).expect("is there").len();
            // Zeroes among what is copied may be stored, where qemu-img says them by metadata.
            let most = len("their.qcow2") + (320 << 10);
            assert!(
                len("top.qcow2") <= most,
                "{options} {target}: copied too much: {} bytes where {most} are allowed",
                len("top.qcow2")
            );
            let info = peer("qemu-img", dir, ["info", "top.qcow2"]);
            assert_eq!(info.contains("backing file:"), !target.is_empty(), "{info}");
        }
    }
}

#[test]
fn an_unsafe_rebase_changes_the_name_and_nothing_else() {
    if !requires("qemu-img") {
        return;
    }
    let mut rng = Seeded::new("unsafe rebase");
    let dir = scratch();
    let dir = dir.path();
    chain(dir, "cluster_size=64k", "2M", &mut rng);
    let before = read(dir, "top.qcow2");
    std::fs::rename(
        dir.join("mid.qcow2"),
        dir.join("a longer name for it.qcow2"),
    )
    .expect("moves");
    ours(dir, &["info", "--backing-chain", "top.qcow2"]).code(1);
    let line = ["rebase", "-u", "-b", "a longer name for it.qcow2"];
    ours(dir, &[&line[..], &["-F", "qcow2", "top.qcow2"]].concat()).success();
    assert!(read(dir, "top.qcow2") == before);
    check(dir, "top.qcow2");
    // The format that is recorded is that of the image under its new name, too.
    ours(dir, &[&line[..], &["top.qcow2"]].concat()).success();
    assert!(read(dir, "top.qcow2") == before);
    check(dir, "top.qcow2");
    ours(dir, &["rebase", "-u", "-b", "", "top.qcow2"]).success();
    check(dir, "top.qcow2");
    // Nothing is recorded any more.
    ours(dir, &[&line[..], &["top.qcow2"]].concat()).code(2);
    ours(
        dir,
        &["rebase", "-b", "top.qcow2", "-F", "qcow2", "top.qcow2"],
    )
    .code(1);
    let refused = ours(
        dir,
        &[
            "rebase",
            "-u",
            "-b",
            &"n".repeat(2000),
            "-F",
            "raw",
            "top.qcow2",
        ],
    );
    let text = String::from_utf8_lossy(&refused.code(1).get_output().stderr).into_owned();
    assert!(text.contains("1023"), "{text}");
    check(dir, "top.qcow2");
}

/// The same through vhd, which QEMU has no chains of.
#[test]
fn a_vhd_is_committed_and_rebased_and_checks_clean() {
    let mut rng = Seeded::new("vhd rebase");
    let clean = |dir: &Path, file: &str| drop(ours(dir, &["check", "-q", file]).success());
    for target in ["base.vhd", "other.raw", ""] {
        let dir = scratch();
        let dir = dir.path();
        let create = ["create", "-q", "-f", "vhd"];
        ours(dir, &[&create[..], &["base.vhd", "5M"]].concat()).success();
        for (name, below) in [("mid.vhd", "base.vhd"), ("top.vhd", "mid.vhd")] {
            ours(dir, &[&create[..], &["-b", below, name]].concat()).success();
        }
        ours(dir, &["create", "-q", "other.raw", "5M"]).success();
        for file in ["base.vhd", "mid.vhd", "top.vhd", "other.raw"] {
            scribble(dir, file, &mut rng, 5 << 20);
        }
        let before = read(dir, "top.vhd");
        let format = if target.ends_with("raw") {
            "raw"
        } else {
            "vhd"
        };
        let name: &[&str] = match target {
            "" => &["-b", ""],
            target => &["-b", target, "-F", format],
        };
        ours(dir, &[&["rebase"], name, &["top.vhd"]].concat()).success();
        assert!(read(dir, "top.vhd") == before, "{target}");
        clean(dir, "top.vhd");
        scribble(dir, "top.vhd", &mut rng, 5 << 20);
        clean(dir, "top.vhd");
        let before = read(dir, "top.vhd");
        if target.is_empty() {
            ours(dir, &["commit", "top.vhd"]).code(1);
            ours(dir, &["rebase", "-b", "base.vhd", "top.vhd"]).code(63);
            continue;
        }
        ours(dir, &["commit", "top.vhd"]).success();
        assert!(read(dir, target) == before, "{target}");
        std::fs::rename(dir.join(target), dir.join("moved")).expect("moves");
        let line = ["rebase", "-u", "-b", "moved", "-F", format, "top.vhd"];
        ours(dir, &line).success();
        assert!(read(dir, "top.vhd") == before, "{target}");
        clean(dir, "top.vhd");
    }
}

/// After a kill at any change the image has its old parent or its new one.
#[test]
fn a_vhd_that_is_given_another_parent_survives_a_kill_at_any_moment() {
    let dir = scratch();
    let dir = dir.path();
    for name in ["old.vhd", "new.vhd"] {
        ours(dir, &["create", "-q", name, "1M"]).success();
    }
    ours(
        dir,
        &["create", "-q", "-b", "old.vhd", "-F", "vhd", "top.vhd"],
    )
    .success();
    scribble(dir, "top.vhd", &mut Seeded::new("vhd kill"), 1 << 20);
    let path = dir.join("new.vhd");
    let chain = open::open_top(&path, &ChainOptions::read()).expect("opens");
    let backing = CreateBacking {
        name: "new.vhd".into(),
        relative: "new.vhd".into(),
        format: "vhd",
        identity: chain.top().identity(),
        state: None,
        modified: std::time::SystemTime::now(),
        virtual_size: chain.virtual_size(),
        cluster_size: None,
        sector_size: None,
        physical_sector_size: None,
        absolute: path,
    };
    let base = std::fs::read(dir.join("top.vhd")).expect("reads");
    for backing in [Some(&backing), None] {
        let disk = Disk::of_bytes("vhd", &base);
        let memory = disk.memory()[0].clone();
        memory.record();
        let mut top = disk.open(Access::Write, WriteOrder::Ordered);
        let relink = top.top_mut().as_relink().expect("can");
        relink.relink(backing).expect("relinks");
        top.close().expect("closes");
        let wanted = top.top().backing();
        assert_eq!(wanted.is_some(), backing.is_some());
        let before = Disk::of_bytes("vhd", &base);
        let before = before
            .open(Access::Read, WriteOrder::Ordered)
            .top()
            .backing();
        let now = MemoryStorage::from_bytes(&base);
        for (made, change) in memory.changes().iter().enumerate() {
            now.apply(change);
            let disk = Disk::of_bytes("vhd", &now.to_bytes());
            let found = disk.open(Access::Read, WriteOrder::Ordered).top().backing();
            assert!(found == before || found == wanted, "{made}: {found:?}");
            let report = disk.check(Repair::Nothing).expect("checks");
            assert_eq!(report.corruptions, 0, "{made}: {:?}", report.findings);
        }
        let last = Disk::of_bytes("vhd", &now.to_bytes());
        assert_eq!(
            last.open(Access::Read, WriteOrder::Ordered).top().backing(),
            wanted
        );
        let report = last.check(Repair::Nothing).expect("checks");
        assert_eq!(
            (report.corruptions, report.leaks),
            (0, 0),
            "{:?}",
            report.findings
        );
    }
}

//! Files that are made of two disks.

use std::path::Path;
use std::sync::Arc;

use vdtool::chain::{Base, Chain};
use vdtool::copy::{self, Joined};
use vdtool::formats::{self, android_cow, raw};
use vdtool::image::open::OpenOptions;
use vdtool::image::options::OptionValues;
use vdtool::storage::memory::MemoryStorage;
use vdtool::util::progress::Silent;

use super::made::{BLOCK, text};
use super::{checked, reads_as};
use crate::util::{Seeded, assert_same, peer, rounds, scratch, vdtool};

fn disk(bytes: &[u8]) -> Joined {
    let storage = Arc::new(MemoryStorage::from_bytes(bytes));
    let image = (raw::DRIVER.open)(storage, &OpenOptions::default()).expect("any bytes are one");
    let chain = Chain::new(vec![image], Base::Zeroes, Arc::default()).expect("one layer");
    Joined::new(vec![chain]).expect("is small")
}

/// What makes `new` of `old`.
pub(crate) fn made(
    old: &[u8],
    new: &[u8],
    options: &str,
    workers: usize,
) -> vdtool::Result<Vec<u8>> {
    let maker = formats::delta_maker(&android_cow::DRIVER).expect("there is one");
    let values = OptionValues::parse(maker.options, "android-cow", [options])?;
    let plan = (maker.plan)(&values)?;
    let storage = MemoryStorage::new();
    let (old, new) = (disk(old), disk(new));
    copy::delta(&old, &new, &*plan, &storage, workers, &Silent)?;
    Ok(storage.to_bytes())
}

/// Two disks: blocks that stay, move by any distance over each other, change places, change a little,
/// are new, and become zeroes.
pub(crate) fn disks(rng: &mut Seeded, blocks: usize) -> (Vec<u8>, Vec<u8>) {
    let mut old = text(rng, blocks * BLOCK);
    for block in old.chunks_mut(BLOCK) {
        match rng.u32(0..10) {
            0 => block.fill(0),
            1 => rng.fill(block),
            _ => {
                let salt = rng.u64(..).to_le_bytes();
                block[..8].copy_from_slice(&salt);
            }
        }
    }
    let mut new = old.clone();
    new.resize(old.len() + BLOCK * rng.usize(0..4), 0);
    let all = new.len() / BLOCK;
    for _ in 0..rng.usize(1..8) {
        let count = rng.usize(1..=(blocks / 3).max(1));
        let (from, to) = (rng.usize(0..=blocks - count), rng.usize(0..=all - count));
        let part = BLOCK * to..BLOCK * (to + count);
        match rng.u32(0..6) {
            0 | 1 => new[part].copy_from_slice(&old[BLOCK * from..BLOCK * (from + count)]),
            2 => {
                // Two runs change places.
                let there = BLOCK * from..BLOCK * (from + count);
                let (a, b) = (new[part.clone()].to_vec(), new[there.clone()].to_vec());
                new[there].copy_from_slice(&a);
                new[part].copy_from_slice(&b);
            }
            3 => new[part].iter_mut().step_by(97).for_each(|b| *b ^= 0x55),
            4 => new[part].fill(0),
            _ => {
                let bytes = text(rng, part.len());
                new[part].copy_from_slice(&bytes);
            }
        }
    }
    (old, new)
}

const OPTIONS: [&str; 9] = [
    "version=2,compression=none",
    "version=2,compression=gz",
    "version=2,compression=lz4",
    "version=2,compression=brotli",
    "version=2,compression=zstd",
    "version=3,compression=none",
    "version=3,compression=gz,block_factor=4k",
    "version=3,compression=lz4",
    "version=3,compression=zstd,block_factor=256k",
];

#[test]
fn what_is_made_of_two_disks_makes_the_new_one_of_the_old_one_and_merges() {
    let mut rng = Seeded::new("android-cow made");
    for round in 0..rounds(36) {
        let options = OPTIONS[round % OPTIONS.len()];
        let blocks = rng.usize(1..120);
        let (old, new) = disks(&mut rng, blocks);
        let cow = made(&old, &new, options, 1).expect("is made");
        reads_as(&cow, &old, &new, options);
        // The order is judged too.
        assert_eq!(checked(&cow).findings, [], "{options}");
        let again = made(&old, &new, options, 5).expect("is made");
        assert_same(&again, &cow, 0, "whatever the number of threads is");
    }
}

#[test]
fn blocks_that_are_there_already_take_no_data_and_close_ones_take_little() {
    let mut rng = Seeded::new("android-cow small");
    let mut old = vec![0; 600 * BLOCK];
    rng.fill(&mut old);
    // Everything one block further, from block 3 on.
    let mut new = old.clone();
    new.copy_within(3 * BLOCK..599 * BLOCK, 4 * BLOCK);
    for options in ["version=2", "version=3"] {
        let cow = made(&old, &new, options, 2).expect("is made");
        let room = (2 << 20) + 1024 * 20 + 600 * 20 + 300;
        assert!(cow.len() < room, "{}: {}", options, cow.len());
        reads_as(&cow, &old, &new, options);
        let mut close = old.clone();
        close.iter_mut().step_by(BLOCK).for_each(|b| *b ^= 1);
        let cow = made(&old, &close, options, 2).expect("is made");
        assert!(cow.len() < room + 600 * 60, "{}: {}", options, cow.len());
        reads_as(&cow, &old, &close, options);
        let same = made(&old, &old, options, 2).expect("is made");
        assert!(same.len() < room, "{options}: {}", same.len());
        reads_as(&same, &old, &old, options);
    }
}

#[test]
fn disks_that_the_format_cannot_tell_of_are_refused() {
    let old = vec![1; 4 * BLOCK];
    for (new, text) in [
        (vec![1; 3 * BLOCK], "shrinks"),
        (vec![1; 5 * BLOCK + 512], "multiple of 4096"),
    ] {
        let error = made(&old, &new, "version=2", 1).expect_err("is refused");
        assert!(error.to_string().contains(text), "{error}");
    }
    for (options, text) in [
        ("version=2,block_factor=8k", "is for version=3"),
        ("version=3,block_factor=512k", "allowed: a power of two"),
        ("version=3,block_factor=5k", "allowed: a power of two"),
    ] {
        let error = made(&old, &old, options, 1).expect_err("is refused");
        assert!(error.to_string().contains(text), "{error}");
    }
}

/// Has the independent reader apply a file; `None` where it cannot decompress it.
fn theirs(dir: &Path, options: &str, verb: &str) -> Option<Vec<u8>> {
    let module = match options {
        o if o.contains("brotli") => "brotli",
        o if o.contains("zstd") => "zstandard",
        _ => "zlib",
    };
    let python = crate::util::python(module)?;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/android_cow/apply.py");
    std::fs::copy(dir.join("old.raw"), dir.join("merged.raw")).expect("copies");
    let (args, out) = match verb {
        "build" => (
            vec![script, "build", "old.raw", "a.cow", "built.raw"],
            "built.raw",
        ),
        _ => (vec![script, "merge", "merged.raw", "a.cow"], "merged.raw"),
    };
    peer(&python, dir, args);
    Some(std::fs::read(dir.join(out)).expect("reads"))
}

#[test]
fn an_independent_reader_rebuilds_the_new_disk_and_merges_in_place() {
    let mut rng = Seeded::new("android-cow python");
    let dir = scratch();
    let dir = dir.path();
    for options in OPTIONS {
        let (old, new) = disks(&mut rng, 90);
        std::fs::write(dir.join("old.raw"), &old).expect("writes");
        std::fs::write(dir.join("new.raw"), &new).expect("writes");
        let make = [
            "convert",
            "-q",
            "--verify",
            "-O",
            "android-cow",
            "-B",
            "old.raw",
        ];
        let run = |more: &[&str]| vdtool().current_dir(dir).args(make).args(more).assert();
        run(&["-o", options, "-j", "1", "new.raw", "a.cow"]).success();
        run(&["-o", options, "-j", "3", "new.raw", "b.cow"]).success();
        let read = |name: &str| std::fs::read(dir.join(name)).expect("reads");
        assert!(read("a.cow") == read("b.cow"), "{options}");
        for verb in ["build", "merge"] {
            let Some(found) = theirs(dir, options, verb) else {
                break;
            };
            assert_same(&found, &new, 0, &format!("{options} {verb}"));
        }
    }
    let done = vdtool()
        .current_dir(dir)
        .args(["convert", "-O", "android-cow", "new.raw", "x.cow"])
        .assert();
    let text = String::from_utf8_lossy(&done.code(2).get_output().stderr).into_owned();
    assert!(text.contains("-B names the old one"), "{text}");
    assert!(!dir.join("x.cow").exists());
}

#[test]
fn files_by_aosp_are_written_back_and_make_the_same() {
    let Some(images) = crate::corpus::images() else {
        return;
    };
    let of = |name: &str| images.join("generated/aosp-libsnapshot").join(name);
    let dir = scratch();
    let dir = dir.path();
    std::fs::copy(of("base.raw"), dir.join("old.raw")).expect("copies");
    let new = std::fs::read(of("target.raw")).expect("reads");
    for options in ["version=2,compression=gz", "version=3,compression=lz4"] {
        let mut command = vdtool();
        command.current_dir(dir).args([
            "convert",
            "-q",
            "-O",
            "android-cow",
            "-B",
            "old.raw",
            "-o",
            options,
        ]);
        command
            .arg(of("target.raw"))
            .arg("a.cow")
            .assert()
            .success();
        for verb in ["build", "merge"] {
            let found = theirs(dir, options, verb).expect("has what it needs");
            assert_same(&found, &new, 0, options);
        }
    }
}

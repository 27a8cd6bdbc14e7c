//! Options of qcow2 crossed at random: what one tool writes the other reads, byte for byte, finds
//! clean and maps alike.  `VDTOOL_SEED=random` takes other combinations each time.

use std::path::Path;

use serde_json::Value;

use crate::util::{Seeded, assert_same, len, peer, requires, scratch, vdtool};

/// Combinations tried in one run.
const ROUNDS: usize = 24;

fn ours(dir: &Path, line: &[&str]) -> String {
    let done = vdtool().current_dir(dir).args(line).assert().success();
    String::from_utf8_lossy(&done.get_output().stdout).into_owned()
}

/// What an image is made with.
#[derive(Debug)]
struct Combination {
    options: String,
    backing: bool,
    compressed: bool,
    size: u64,
    data_file: bool,
}

fn pick(rng: &mut Seeded, of: &[&'static str]) -> &'static str {
    of[rng.usize(0..of.len())]
}

impl Combination {
    fn new(rng: &mut Seeded) -> Self {
        let extended = rng.u8(0..3) == 0;
        let cluster = match extended {
            true => pick(rng, &["16k", "64k", "2M"]),
            false => pick(rng, &["512", "1k", "4k", "64k", "2M"]),
        };
        let data_file = rng.u8(0..4) == 0;
        let raw = data_file && rng.bool();
        let backing = !raw && rng.bool();
        let old = !extended && !data_file && rng.u8(0..4) == 0;
        let mut options = format!("cluster_size={cluster}");
        if old {
            options += ",compat=0.10";
        } else {
            let bits = pick(rng, &["1", "2", "4", "8", "16", "32", "64"]);
            options += &format!(",refcount_bits={bits}");
            options += &format!(",compression_type={}", pick(rng, &["zlib", "zstd"]));
            options += &format!(",lazy_refcounts={}", pick(rng, &["on", "off"]));
        }
        if extended {
            options += ",extended_l2=on";
        }
        if data_file {
            options += ",data_file=data.bin";
        }
        if raw {
            options += ",data_file_raw=on";
        }
        if !backing && !raw && rng.u8(0..3) == 0 {
            options += &format!(
                ",preallocation={}",
                pick(rng, &["metadata", "falloc", "full"])
            );
        }
        Self {
            options,
            backing,
            // qemu-io writes compressed clusters; a refcount of one bit has no room for them.
            compressed: !data_file && rng.bool(),
            size: rng.u64(1..40) * 100_352,
            data_file,
        }
    }
}

/// A write of a pattern, or of zeroes, that both tools take.
#[derive(Debug)]
struct Write {
    at: u64,
    len: u64,
    pattern: u8,
}

fn writes(rng: &mut Seeded, size: u64) -> Vec<Write> {
    let one = |rng: &mut Seeded| {
        let at = rng.u64(0..size / 512) * 512;
        let len = (rng.u64(1..200) * 512).min(size - at);
        let pattern = if rng.u8(0..4) == 0 { 0 } else { rng.u8(1..255) };
        Write { at, len, pattern }
    };
    (0..12).map(|_| one(rng)).collect()
}

fn commands(list: &[Write]) -> Vec<String> {
    let command = |w: &Write| match w.pattern {
        0 => format!("write -z {} {}", w.at, w.len),
        p => format!("write -P {p} {} {}", w.at, w.len),
    };
    list.iter().map(command).collect()
}

fn apply(list: &[Write], disk: &mut [u8]) {
    for write in list {
        disk[len(write.at)..len(write.at + write.len)].fill(write.pattern);
    }
}

fn io(dir: &Path, tool: &str, file: &str, list: &[String]) {
    let mut line = Vec::new();
    list.iter().for_each(|c| line.extend(["-c", c.as_str()]));
    match tool {
        "vdtool" => {
            ours(dir, &[&["io"], &line[..], &[file]].concat());
        }
        _ => {
            let text = peer("qemu-io", dir, [&line[..], &[file]].concat());
            assert!(!text.contains("failed"), "{list:?}: {text}");
        }
    }
}

/// Extents with what both tools must agree on; neighbours that read alike are one.
fn extents(text: &str) -> Vec<(u64, u64, Value)> {
    let list: Vec<Value> = serde_json::from_str(text).expect("is JSON");
    let mut found: Vec<(u64, u64, Value)> = Vec::new();
    for row in list {
        let (start, len) = (row["start"].as_u64(), row["length"].as_u64());
        let (start, len) = (start.expect("a number"), len.expect("a number"));
        let mut kind = serde_json::json!({});
        for key in ["depth", "zero", "data", "present", "compressed"] {
            kind[key] = row[key].clone();
        }
        if row["present"] == false {
            // Where no layer has it, they name one or another.
            kind["depth"] = Value::Null;
        }
        // What is stored in one piece continues.
        let stored = row["data"] == true;
        if stored {
            // They look for holes in what is stored only where space was laid out ahead.
            kind["zero"] = Value::Null;
        }
        if let Some(offset) = row["offset"].as_u64().filter(|_| stored) {
            kind["origin"] = offset.wrapping_sub(start).into();
        }
        match found.last_mut() {
            Some((_, last, before)) if *before == kind => *last += len,
            _ => found.push((start, len, kind)),
        }
    }
    found
}

/// Both tools find the image clean, read it alike and map it alike.
fn agree(dir: &Path, file: &str, expected: &[u8], what: &str) {
    let clean = peer("qemu-img", dir, ["check", file]);
    assert!(clean.contains("No errors were found"), "{what}: {clean}");
    ours(dir, &["check", "-q", file]);
    peer(
        "qemu-img",
        dir,
        ["convert", "-O", "raw", file, "theirs.raw"],
    );
    let theirs = std::fs::read(dir.join("theirs.raw")).expect("reads");
    assert_same(&theirs, expected, 0, what);
    ours(dir, &["convert", "-q", "-O", "raw", file, "ours.raw"]);
    let found = std::fs::read(dir.join("ours.raw")).expect("reads");
    assert_same(&found, expected, 0, what);
    let line = ["map", "--output=json", file];
    let (found, theirs) = (ours(dir, &line), peer("qemu-img", dir, line));
    assert_eq!(extents(&found), extents(&theirs), "{what}");
}

#[test]
fn combinations_of_options_written_by_one_are_read_by_the_other() {
    if !requires("qemu-img") || !requires("qemu-io") {
        return;
    }
    let mut rng = Seeded::new("qcow2-matrix");
    for round in 0..ROUNDS {
        let combination = Combination::new(&mut rng);
        let maker = if rng.bool() { "vdtool" } else { "qemu-img" };
        let what = format!("{round} {maker} {combination:?}");
        let dir = scratch();
        let dir = dir.path();
        let size = combination.size;
        let mut disk = vec![0; len(size)];
        let mut line = vec!["create", "-q", "-f", "qcow2", "-o", &combination.options];
        if combination.backing {
            // Shorter than the disk above it, or longer.
            let below = rng.u64(1..2 * size / 512) * 512;
            let mut bytes = rng.bytes(len(below));
            let middle = bytes.len() / 2;
            bytes[middle..].fill(0);
            std::fs::write(dir.join("base.raw"), &bytes).expect("writes");
            let both = disk.len().min(bytes.len());
            disk[..both].copy_from_slice(&bytes[..both]);
            line.extend(["-b", "base.raw", "-F", "raw"]);
        }
        let text = size.to_string();
        line.extend(["a.qcow2", &text]);
        match maker {
            "vdtool" => drop(ours(dir, &line)),
            _ => drop(peer("qemu-img", dir, &line)),
        }
        agree(dir, "a.qcow2", &disk, &format!("{what}: new"));
        if combination.compressed {
            // Whole clusters only, the first of them.
            let cluster = 2u64 << 20;
            if size >= cluster {
                io(
                    dir,
                    "qemu-io",
                    "a.qcow2",
                    &["write -c -P 7 0 2M".to_owned()],
                );
                disk[..2 << 20].fill(7);
                agree(dir, "a.qcow2", &disk, &format!("{what}: compressed"));
            }
        }
        for turn in ["qemu-io", "vdtool", "qemu-io"] {
            let list = writes(&mut rng, size);
            io(dir, turn, "a.qcow2", &commands(&list));
            apply(&list, &mut disk);
            agree(dir, "a.qcow2", &disk, &format!("{what}: {turn} {list:?}"));
        }
        // The same disk copied by each tool is the same for the other.
        let plain = "-O qcow2".split(' ').collect::<Vec<_>>();
        let line = [&["convert"], &plain[..], &["a.qcow2"]].concat();
        ours(dir, &[&line[..], &["b.qcow2"]].concat());
        agree(dir, "b.qcow2", &disk, &format!("{what}: converted"));
        peer("qemu-img", dir, [&line[..], &["c.qcow2"]].concat());
        agree(
            dir,
            "c.qcow2",
            &disk,
            &format!("{what}: converted by qemu-img"),
        );
        assert!(!combination.data_file || dir.join("data.bin").exists());
    }
}

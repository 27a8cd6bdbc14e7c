//! Options of qcow2 crossed so that every pair of values that can be together is tried: what one
//! tool writes the other reads, byte for byte, finds clean and maps alike.  `VDTOOL_SEED=random`
//! takes other combinations each time.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use crate::util::{Seeded, assert_same, len, peer, requires, scratch, share, vdtool};

/// Combinations at random from which those are taken that are tried.
const POOL: usize = 1500;
/// Halves of the list, each a test of its own, so that they run beside each other.
const PARTS: usize = 2;

fn ours(dir: &Path, line: &[&str]) -> String {
    let done = vdtool().current_dir(dir).args(line).assert().success();
    String::from_utf8_lossy(&done.get_output().stdout).into_owned()
}

/// What an image is made with.
#[derive(Debug, Clone)]
struct Combination {
    options: String,
    maker: &'static str,
    backing: bool,
    compressed: bool,
    size: u64,
    data_file: bool,
    /// The values that are crossed.
    values: Vec<String>,
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
        let space = match !backing && !raw && rng.u8(0..3) == 0 {
            true => pick(rng, &["metadata", "falloc", "full"]),
            false => "off",
        };
        options += &format!(",preallocation={space}");
        let mut size = rng.u64(1..40) * 100_352;
        // Into clusters that have no space, and whole ones.
        let compressed = !data_file && space == "off" && rng.bool();
        if compressed {
            size = size.max(22 * 100_352);
        }
        let maker = pick(rng, &["vdtool", "qemu-img"]);
        let mut values: Vec<String> = options
            .split(',')
            .filter(|o| !o.starts_with("lazy") && !o.starts_with("data"))
            .map(str::to_owned)
            .collect();
        values.push(format!("maker={maker}"));
        values.push(format!("extended={extended}"));
        values.push(format!("data={data_file} raw={raw}"));
        values.push(format!("backing={backing}"));
        values.push(format!("compressed={compressed}"));
        Self {
            options,
            maker,
            backing,
            compressed,
            size,
            data_file,
            values,
        }
    }

    /// Its values, two by two.
    fn pairs(&self) -> BTreeSet<(String, String)> {
        let mut pairs = BTreeSet::new();
        for (index, one) in self.values.iter().enumerate() {
            for other in &self.values[index + 1..] {
                pairs.insert((one.clone(), other.clone()));
            }
        }
        pairs
    }
}

/// Combinations in which every pair of values is that can be: each time the one that has most of
/// what is missing.
fn combinations(rng: &mut Seeded) -> Vec<Combination> {
    let pool: Vec<_> = (0..POOL).map(|_| Combination::new(rng)).collect();
    let mut pool: Vec<_> = pool.into_iter().map(|c| (c.pairs(), c)).collect();
    let mut chosen = Vec::new();
    loop {
        let best = pool.iter().max_by_key(|(pairs, _)| pairs.len());
        let Some((pairs, best)) = best.filter(|(pairs, _)| !pairs.is_empty()).cloned() else {
            return chosen;
        };
        chosen.push(best);
        for (missing, _) in &mut pool {
            missing.retain(|pair| !pairs.contains(pair));
        }
    }
}

#[test]
fn every_value_of_an_option_meets_every_other_that_it_can_meet() {
    let chosen = combinations(&mut Seeded::new("qcow2-matrix"));
    let met: BTreeSet<_> = chosen.iter().flat_map(Combination::pairs).collect();
    let clusters = ["512", "1k", "4k", "64k", "2M"];
    let bits = ["1", "2", "4", "8", "16", "32", "64"];
    let met = |a: &str, b: &str| {
        let pair = (a.to_owned(), b.to_owned());
        assert!(met.contains(&pair), "{pair:?}");
    };
    for cluster in clusters.map(|c| format!("cluster_size={c}")) {
        for bits in bits.map(|b| format!("refcount_bits={b}")) {
            met(&cluster, &bits);
            met(&bits, "extended=true");
            met(&bits, "compressed=true");
            met(&bits, "data=true raw=true");
            met(&bits, "backing=true");
        }
        met(&cluster, "compression_type=zstd");
        met(&cluster, "compression_type=zlib");
        met(&cluster, "compat=0.10");
        met(&cluster, "data=true raw=false");
        met(&cluster, "data=true raw=true");
        met(&cluster, "backing=true");
        met(&cluster, "compressed=true");
        met(&cluster, "preallocation=full");
    }
    for cluster in ["16k", "64k", "2M"] {
        met(&format!("cluster_size={cluster}"), "extended=true");
    }
    met("compression_type=zstd", "compressed=true");
    met("extended=true", "data=true raw=true");
    met("data=true raw=false", "backing=true");
    met("extended=true", "compressed=true");
    met("backing=true", "compressed=true");
    assert!(chosen.len() < POOL / 10, "{}", chosen.len());
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
    try_part(0);
}

#[test]
fn more_combinations_of_options_written_by_one_are_read_by_the_other() {
    try_part(1);
}

fn try_part(part: usize) {
    if !requires("qemu-img") || !requires("qemu-io") {
        return;
    }
    let mut rng = Seeded::new("qcow2-matrix");
    let chosen = combinations(&mut rng);
    let all = chosen.iter().enumerate();
    for (round, combination) in share(all.filter(|(round, _)| round % PARTS == part)) {
        try_one(round, combination, &mut rng);
    }
}

fn try_one(round: usize, combination: &Combination, rng: &mut Seeded) {
    let maker = combination.maker;
    let what = format!("{round} {combination:?}");
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
        // Whole clusters only, the first of them, by whoever did not make the image.
        let writer = if maker == "vdtool" {
            "qemu-io"
        } else {
            "vdtool"
        };
        let write = "write -c -P 7 0 2M".to_owned();
        io(dir, writer, "a.qcow2", &[write]);
        disk[..2 << 20].fill(7);
        agree(dir, "a.qcow2", &disk, &format!("{what}: compressed"));
    }
    for turn in ["qemu-io", "vdtool"] {
        let list = writes(rng, size);
        io(dir, turn, "a.qcow2", &commands(&list));
        apply(&list, &mut disk);
        agree(dir, "a.qcow2", &disk, &format!("{what}: {turn} {list:?}"));
    }
    // The same disk copied by each tool is the same for the other.
    let line = ["convert", "-O", "qcow2", "a.qcow2"];
    ours(dir, &[&line[..], &["b.qcow2"]].concat());
    agree(dir, "b.qcow2", &disk, &format!("{what}: converted"));
    peer("qemu-img", dir, [&line[..], &["c.qcow2"]].concat());
    let what = format!("{what}: converted by qemu-img");
    agree(dir, "c.qcow2", &disk, &what);
    assert!(!combination.data_file || dir.join("data.bin").exists());
}

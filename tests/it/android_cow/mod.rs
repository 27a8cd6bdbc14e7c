//! Android COW files: AOSP's own, and such as are made here byte by byte.

use std::path::Path;
use std::sync::Arc;

use vdtool::ErrorKind;
use vdtool::chain::{Base, Chain};
use vdtool::formats::{android_cow, raw};
use vdtool::image::check::{Repair, Report};
use vdtool::image::open::{OpenOptions, Purpose};
use vdtool::image::operations::Operation;
use vdtool::image::options::OptionValues;
use vdtool::storage::memory::MemoryStorage;
use vdtool::util::progress::Silent;

use crate::exercise::exercise;
use crate::util::{Seeded, assert_same, len, peer, scratch, vdtool};
use made::{BLOCK, Do, Plan, all_kinds, apply, text};

pub(crate) mod made;
mod merge;
mod rules;
pub(crate) mod write;

/// Opens files over each other, the top one first, over a raw disk.
fn chain(cows: &[&[u8]], base: &[u8], label: Option<u64>) -> vdtool::Result<Chain> {
    let mut layers = Vec::new();
    for cow in cows {
        let specs = android_cow::DRIVER.open_options;
        let given = label.map(|label| format!("label={label}"));
        let options = OpenOptions {
            values: OptionValues::parse(specs, "android-cow", given)?,
            ..OpenOptions::default()
        };
        let storage = Arc::new(MemoryStorage::from_bytes(cow));
        layers.push((android_cow::DRIVER.open)(storage, &options)?);
    }
    let storage = Arc::new(MemoryStorage::from_bytes(base));
    layers.push((raw::DRIVER.open)(storage, &OpenOptions::default())?);
    for pair in layers.windows(2).rev() {
        pair[0].lies_over(pair[1].virtual_size());
    }
    Chain::new(layers, Base::Zeroes, Arc::default())
}

fn content(chain: &Chain) -> vdtool::Result<Vec<u8>> {
    let mut all = vec![0; len(chain.virtual_size())];
    chain.read_at(&mut all, 0).map(|()| all)
}

fn reads_as(cow: &[u8], base: &[u8], model: &[u8], what: &str) {
    let chain = chain(&[cow], base, None).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_same(&content(&chain).expect("reads"), model, 0, what);
}

fn refused(cow: &[u8], base: &[u8]) -> String {
    let done = chain(&[cow], base, None).and_then(|chain| content(&chain));
    done.expect_err("is refused").to_string()
}

fn checked(cow: &[u8]) -> Report {
    let options = OpenOptions {
        purpose: Purpose::Check,
        ..OpenOptions::default()
    };
    let storage = Arc::new(MemoryStorage::from_bytes(cow));
    let image = (android_cow::DRIVER.open)(storage, &options).expect("opens to be checked");
    let check = image.as_check().expect("has a check");
    check.check(Repair::Nothing, &Silent).expect("checks")
}

/// All the ways in which the files of these tests are made.
const WAYS: [(u16, u8, u32); 8] = [
    (1, 0, 6),
    (1, 1, 0),
    (2, 0, 0),
    (2, 1, 6),
    (2, 4, 200),
    (3, 0, 0),
    (3, 1, 0),
    (3, 4, 0),
];

fn plans(name: &str) -> impl Iterator<Item = (Plan, Vec<u8>)> {
    let mut rng = Seeded::new(name);
    WAYS.into_iter()
        .map(move |(version, compression, cluster)| {
            let old = text(&mut rng, 40 * BLOCK);
            let mut plan = all_kinds(version, compression, &mut rng, &old);
            plan.cluster = cluster;
            (plan, old)
        })
}

#[test]
fn a_file_of_all_operations_reads_as_they_say_in_any_pieces() {
    for (plan, old) in plans("android-cow pieces") {
        let what = format!("version {} compression {}", plan.version, plan.compression);
        let (cow, model) = (plan.bytes(&old), plan.model(&old));
        let mut rng = Seeded::new(&what);
        reads_as(&cow, &old, &model, &what);
        let chain = chain(&[&cow], &old, None).expect("opens");
        assert_eq!(chain.virtual_size(), model.len() as u64, "{what}");
        for _ in 0..300 {
            let at = rng.usize(0..model.len());
            let count = rng.usize(1..=(model.len() - at).min(40_000));
            let mut buf = vec![0; count];
            chain.read_at(&mut buf, at as u64).expect("reads");
            assert_same(&buf, &model[at..at + count], at as u64, &what);
        }
        let mut end = 0;
        for extent in chain.extents(0..chain.virtual_size()).expect("inside") {
            let extent = extent.expect("maps");
            assert_eq!(extent.start, end);
            end = extent.end();
        }
        assert_eq!(end, chain.virtual_size());
        let report = checked(&cow);
        assert_eq!(report.findings, [], "{what}");
        assert!(report.compressed_clusters > 0 || plan.compression == 0);
    }
}

#[test]
fn a_disk_is_as_large_as_the_larger_of_base_and_last_block() {
    let mut plan = Plan::new(2, 0);
    plan.add(3, Do::Zero);
    for (base, size) in [
        (BLOCK, 4 * BLOCK),
        (10 * BLOCK, 10 * BLOCK),
        (9 * BLOCK + 512, 9 * BLOCK + 512),
    ] {
        let old = vec![7; base];
        let cow = plan.bytes(&old);
        let mut model = plan.model(&old);
        model.resize(size, 0);
        reads_as(&cow, &old, &model, "a size");
    }
}

#[test]
fn a_file_without_a_footer_is_read_up_to_a_label() {
    for (mut plan, old) in plans("android-cow labels") {
        plan.footer = false;
        let cow = plan.bytes(&old);
        if plan.version < 3 {
            let text = refused(&cow, &old);
            assert!(text.contains("--open-options label=3"), "{text}");
        }
        for label in 1..=3 {
            let mut part = plan.clone();
            let is_it = |what: &Do| matches!(what, Do::Label(l) if *l == label);
            let end = plan.ops.iter().position(|(_, what)| is_it(what));
            part.ops.truncate(end.expect("there is one"));
            let chain = chain(&[&cow], &old, Some(label)).expect("opens");
            assert_same(
                &content(&chain).expect("reads"),
                &part.model(&old),
                0,
                "a label",
            );
        }
        let error = chain(&[&cow], &old, Some(99)).expect_err("there is none");
        assert!(error.to_string().contains("no label 99"), "{error}");
    }
}

#[test]
fn updates_over_each_other_are_one_disk() {
    let mut rng = Seeded::new("android-cow chain");
    let mut disk = text(&mut rng, 40 * BLOCK);
    let (base, mut cows) = (disk.clone(), Vec::new());
    for version in [2, 3, 2] {
        let plan = all_kinds(version, 4, &mut rng, &disk);
        cows.insert(0, plan.bytes(&disk));
        disk = plan.model(&disk);
    }
    let cows: Vec<&[u8]> = cows.iter().map(|c| &**c).collect();
    let chain = chain(&cows, &base, None).expect("opens");
    assert_same(&content(&chain).expect("reads"), &disk, 0, "three updates");
}

/// The operations of a plan in the order of a merge, as the description of the format has it.
fn merge_order(plan: &Plan) -> Vec<(u64, Do)> {
    let ops = plan
        .ops
        .iter()
        .filter(|(_, what)| !matches!(what, Do::Label(_) | Do::Sequence(_)));
    let mut ops: Vec<(u64, Do)> = ops.cloned().collect();
    let listed = plan.ops.iter().find_map(|(_, what)| match what {
        Do::Sequence(blocks) => Some(blocks.clone()),
        _ => None,
    });
    if let Some(listed) = listed {
        let place = |block: u64| listed.iter().position(|l| u64::from(*l) == block);
        ops.sort_by_key(|(block, _)| (place(*block).unwrap_or(usize::MAX), *block));
    } else if plan.version < 3 {
        let ordered = |what: &Do| matches!(what, Do::Copy(_) | Do::Xor(..));
        let (first, mut rest): (Vec<_>, Vec<_>) = ops.into_iter().partition(|(_, w)| ordered(w));
        rest.sort_by_key(|(block, _)| *block);
        ops = first.into_iter().chain(rest).collect();
    }
    ops
}

#[test]
fn a_file_that_is_merged_in_part_reads_the_same_at_every_step() {
    for (mut plan, old) in plans("android-cow merged") {
        for listed in [false, true] {
            if listed && plan.version < 3 && plan.cluster == 0 {
                continue;
            }
            if listed {
                // Another order that loses nothing.
                plan.ops
                    .insert(0, (0, Do::Sequence(vec![21, 1, 0, 20, 9, 10, 45, 4])));
            }
            let model = plan.model(&old);
            let order = merge_order(&plan);
            let mut base = old.clone();
            for merged in 0..=order.len() {
                plan.merged = merged as u64;
                reads_as(
                    &plan.bytes(&old),
                    &base,
                    &model,
                    &format!("{merged} merged"),
                );
                if let Some((block, what)) = order.get(merged) {
                    apply(*block, what, &old, &mut base);
                }
            }
            plan.merged = order.len() as u64 + 1;
            let text = refused(&plan.bytes(&old), &base);
            assert!(text.contains("num_merge_ops"), "{text}");
        }
    }
}

#[test]
fn a_window_that_was_ready_is_read_from_the_scratch_area() {
    for (plan, old) in plans("android-cow window").filter(|(p, _)| p.version > 1) {
        let (mut cow, model) = (plan.bytes(&old), plan.model(&old));
        let header = if plan.version == 3 { 78 } else { 38 };
        let mut base = old.clone();
        cow[header] = 2;
        for (index, block) in [0u64, 1, 9].into_iter().enumerate() {
            let (entry, at) = (header + 1 + 16 * index, header + 8192 + BLOCK * index);
            cow[entry..entry + 8].copy_from_slice(&block.to_le_bytes());
            cow[entry + 8..entry + 16].copy_from_slice(&(at as u64).to_le_bytes());
            let from = len(block) * BLOCK;
            cow[at..at + BLOCK].copy_from_slice(&model[from..from + BLOCK]);
            // Written in part, and lost.
            base[from..from + BLOCK].fill(0xee);
        }
        // Block 9 is what 0 and 1 are made of.
        reads_as(&cow, &base, &model, "a window");
        for (state, text) in [(3, "state of the scratch"), (2, "not in the scratch area")] {
            let mut bad = cow.clone();
            bad[header] = state;
            bad[header + 9] ^= 0xff;
            bad[header + 12] ^= 0xff;
            assert!(
                refused(&bad, &base).contains(text),
                "{}",
                refused(&bad, &base)
            );
        }
    }
}

#[test]
fn what_cannot_be_read_right_is_refused_by_name() {
    let old = vec![5; 40 * BLOCK];
    let make = |version: u16, cluster: u32, ops: &[(u64, Do)]| {
        let mut plan = Plan::new(version, 0);
        plan.cluster = cluster;
        plan.ops = ops.to_vec();
        plan.bytes(&old)
    };
    let seq = |blocks: &[u32]| (0, Do::Sequence(blocks.to_vec()));
    let one = (7, Do::Copy(3));
    let many = (6, Do::Replace(vec![1; 2 * BLOCK]));
    let mut in_scratch = make(2, 6, &[(7, Do::Replace(vec![1; BLOCK]))]);
    let source = 38 + (2 << 20) + 12;
    in_scratch[source..source + 8].copy_from_slice(&0x1000u64.to_le_bytes());
    for (cow, text) in [
        (
            make(2, 6, &[one.clone(), (7, Do::Zero)]),
            "two operations make block 7",
        ),
        (
            make(3, 0, &[many, one.clone()]),
            "two operations make block 7",
        ),
        (
            make(2, 0, &[seq(&[7]), one.clone()]),
            "no clusters of operations",
        ),
        (make(2, 6, &[seq(&[7, 8]), one.clone()]), "names block 8"),
        (make(3, 0, &[seq(&[7, 8]), one.clone()]), "names block 8"),
        (make(2, 6, &[seq(&[7, 7]), one.clone()]), "one before it"),
        (make(2, 6, &[(7, Do::Copy(40))]), "which has 163840 bytes"),
        (make(3, 0, &[(7, Do::Copy(40))]), "which has 163840 bytes"),
        (in_scratch, "its data is at 0x1000"),
    ] {
        assert!(
            refused(&cow, &old).contains(text),
            "{}: {text}",
            refused(&cow, &old)
        );
    }
    let mut odd = make(2, 6, &[seq(&[7]), one]);
    odd[38 + (2 << 20) + 2] = 3;
    assert!(
        refused(&odd, &old).contains("end inside an entry"),
        "{}",
        refused(&odd, &old)
    );
}

#[test]
fn an_order_that_loses_data_is_a_corruption_and_still_reads() {
    let old = text(&mut Seeded::new("android-cow unsafe"), 40 * BLOCK);
    for version in [2, 3] {
        let mut plan = Plan::new(version, 1);
        plan.add(5, Do::Zero)
            .add(6, Do::Copy(7))
            .add(8, Do::Copy(6));
        let cow = plan.bytes(&old);
        let report = checked(&cow);
        assert_eq!(report.corruptions, 1, "{:?}", report.findings);
        assert!(report.findings[0].text.contains("makes block 8 of block 6"));
        reads_as(&cow, &old, &plan.model(&old), "an order that loses data");
    }
    // What comes before an ordered operation and is not read is no harm, which version 3 has.
    let mut plan = Plan::new(3, 1);
    plan.add(5, Do::Zero).add(8, Do::Copy(6));
    assert_eq!(checked(&plan.bytes(&old)).findings, []);
    // A difference that begins within a block reads two.
    plan.add(9, Do::Xor(old[..BLOCK].to_vec(), 7 * BLOCK as u64 + 1));
    assert_eq!(checked(&plan.bytes(&old)).corruptions, 1);
}

#[test]
fn data_that_does_not_decode_is_found_and_what_is_beside_it_reads() {
    for (plan, old) in plans("android-cow data").filter(|(p, _)| p.compression > 0) {
        let mut cow = plan.bytes(&old);
        let mut data = 0..0;
        let image = chain(&[&cow], &old, None).expect("opens");
        let operations = image.top().as_operations().expect("has some");
        let mut last = |op: &Operation| {
            if op.kind == "replace" {
                data = op.data_offset.expect("has data")..op.data_offset.expect("has data") + 8;
            }
            Ok(())
        };
        operations.each(&mut last).expect("are right");
        let at = len(data.start);
        cow[at..at + 8].fill(0xff);
        let report = checked(&cow);
        assert!(report.corruptions >= 1, "{plan:?}");
        let chain = chain(&[&cow], &old, None).expect("opens");
        let error = content(&chain).expect_err("is damaged");
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        let mut first = vec![0; 2 * BLOCK];
        chain.read_at(&mut first, 0).expect("is right");
    }
}

#[test]
fn every_field_at_its_edges_is_read_or_refused_and_no_more() {
    let mut rng = Seeded::new("android-cow edges");
    for (mut plan, old) in plans("android-cow edges") {
        plan.scratch = plan.scratch.min(16 << 10);
        let cow = plan.bytes(&old);
        let ops = match plan.version {
            1 => 34,
            2 => 38 + (16 << 10),
            _ => 78 + (16 << 10) + 64,
        };
        for at in (0..78).chain(ops..ops + 100) {
            for width in [1, 2, 4, 8] {
                let value = match rng.u32(0..4) {
                    0 => u64::MAX,
                    1 => 1 << 63,
                    2 => rng.u64(..),
                    _ => 1,
                };
                let mut bad = cow.clone();
                bad[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
                if let Ok(chain) = chain(&[&bad], &old, None) {
                    let mut buf = vec![0; 9000];
                    let at = rng.u64(0..50) * 4096;
                    let _ = chain.read_at(&mut buf[..], at);
                }
            }
        }
        for cut in 0..40 {
            let end = cow.len() * cut / 40;
            if let Ok(chain) = chain(&[&cow[..end]], &old, None) {
                assert!(content(&chain).is_ok() || cut < 40);
            }
        }
        exercise(&cow);
    }
}

/// AOSP's files with base and target.
fn collected(directory: &Path) -> Vec<std::path::PathBuf> {
    let dir = directory.join("generated/aosp-libsnapshot");
    let all = std::fs::read_dir(dir).expect("is there");
    let mut all: Vec<_> = all.map(|e| e.expect("reads").path()).collect();
    all.retain(|path| path.extension().is_some_and(|e| e == "cow"));
    all.sort();
    all
}

#[test]
fn files_by_aosp_flatten_to_their_target() {
    let Some(images) = crate::corpus::images() else {
        return;
    };
    let Some(more) = crate::corpus::more() else {
        return;
    };
    let of = |name: &str| images.join("generated/aosp-libsnapshot").join(name);
    let target = std::fs::read(of("target.raw")).expect("is there");
    let (base, dir) = (of("base.raw"), scratch());
    let out = dir.path().join("out.raw");
    let (mut all, more) = (collected(&images), collected(&more));
    assert!(all.len() >= 4 && more.len() >= 2, "{all:?} {more:?}");
    all.extend(more);
    for cow in all {
        let args = ["convert", "-q", "-O", "raw", "--parent"];
        let done = vdtool().args(args).arg(&base).arg(&cow).arg(&out).assert();
        done.success();
        let found = std::fs::read(&out).expect("was made");
        assert_same(&found, &target, 0, &cow.display().to_string());
        vdtool().arg("check").arg(&cow).assert().success();
        let listed = vdtool()
            .args(["info", "--ops"])
            .arg(&cow)
            .assert()
            .success();
        let lines = String::from_utf8(listed.get_output().stdout.clone()).expect("is text");
        let copies = lines
            .lines()
            .filter(|l| l.contains("\"type\":\"copy\""))
            .count();
        assert_eq!(copies, 120, "{}", cow.display());
    }
}

#[test]
fn operations_are_listed_one_a_line_with_their_fields() {
    let dir = scratch();
    let mut rng = Seeded::new("android-cow ops");
    let old = text(&mut rng, 40 * BLOCK);
    let mut plan = all_kinds(2, 1, &mut rng, &old);
    plan.add(0, Do::Sequence(vec![9]));
    std::fs::write(dir.path().join("a.cow"), plan.bytes(&old)).expect("writes");
    let done = vdtool()
        .current_dir(dir.path())
        .args(["info", "--ops", "a.cow"])
        .assert();
    let text = String::from_utf8(done.success().get_output().stdout.clone()).expect("is text");
    let lines: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).expect("is JSON"))
        .collect();
    let keys = |index: usize| {
        let keys = lines[index].as_object().expect("an object").keys();
        keys.map(String::as_str).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(keys(0), "index type new-block blocks source-block");
    assert_eq!(keys(2), "index type label");
    assert_eq!(keys(5), "index type skip");
    let xor = "index type new-block blocks source-offset data-offset data-length compression";
    assert_eq!(keys(6), xor);
    let replace = lines
        .iter()
        .position(|l| l["type"] == "replace")
        .expect("one");
    assert_eq!(
        keys(replace),
        "index type new-block blocks data-offset data-length compression"
    );
    let sequence = lines
        .iter()
        .position(|l| l["type"] == "sequence")
        .expect("one");
    assert_eq!(keys(sequence), "index type data-offset data-length");
    assert_eq!(lines[6]["compression"], "gz");
    for (index, line) in lines.iter().enumerate() {
        assert_eq!(line["index"], index);
    }
    // The independent reader sees the same.
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/android_cow/apply.py");
    let theirs = peer("python3", dir.path(), [script, "ops", "a.cow"]);
    for (ours, theirs) in lines.iter().zip(theirs.lines()) {
        let theirs: serde_json::Value = serde_json::from_str(theirs).expect("is JSON");
        assert_eq!(ours["type"], theirs["type"]);
        for (key, other) in [("new-block", "new"), ("data-length", "length")] {
            if let Some(value) = ours.get(key) {
                assert_eq!(*value, theirs[other], "{ours} {theirs}");
            }
        }
    }
}

#[test]
fn a_file_is_read_only_and_its_parent_must_be_named() {
    let dir = scratch();
    let mut rng = Seeded::new("android-cow commands");
    let old = text(&mut rng, 40 * BLOCK);
    let plan = all_kinds(3, 4, &mut rng, &old);
    let write = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes);
    write("a.cow", &plan.bytes(&old)).expect("writes");
    write("base.raw", &old).expect("writes");
    write("new.raw", &plan.model(&old)).expect("writes");
    let run = |args: &[&str]| vdtool().current_dir(dir.path()).args(args).assert();
    let text = |done: &assert_cmd::assert::Assert| {
        String::from_utf8_lossy(&done.get_output().stderr).into_owned()
    };
    let done = run(&["convert", "a.cow", "x.raw"]).code(1);
    assert!(text(&done).contains("--parent"), "{}", text(&done));
    let over = ["--parent", "base.raw"];
    run(&["info", "a.cow"]).success();
    run(&["check", "a.cow"]).success();
    run(&["map", over[0], over[1], "a.cow"]).success();
    run(&["compare", over[0], over[1], "a.cow", "new.raw"]).success();
    let done = run(&["io", over[0], over[1], "-c", "write 0 512", "a.cow"]).code(1);
    assert!(text(&done).contains("read-only"), "{}", text(&done));
    run(&[
        "io",
        "-s",
        over[0],
        over[1],
        "-c",
        "write -P 9 0 512",
        "-c",
        "read -P 9 0 512",
        "a.cow",
    ])
    .success();
    // Blocks that are copied are elsewhere in what both have below them.
    let onto = [
        "convert", "-O", "qcow2", "-B", "base.raw", "-F", "raw", over[0], over[1],
    ];
    run(&[&onto[..], &["a.cow", "onto.qcow2"]].concat()).success();
    run(&["compare", "onto.qcow2", "new.raw"]).success();
    let done = run(&["info", "--ops", "base.raw"]).code(63);
    assert!(text(&done).contains("no operations"), "{}", text(&done));
}

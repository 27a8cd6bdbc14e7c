//! VHDX as we leave it: by the rules of the specification, and as other programs see it.

use std::path::Path;

use vdtool::chain::open::{ChainOptions, Follow, open};
use vdtool::image::check::Repair;
use vdtool::image::open::WriteOrder;
use vdtool::storage::Storage;
use vdtool::storage::open::Access;

use crate::layers::{Disk, LayerSpec, Place, read_all};
use crate::util::{Seeded, len, peer, python, requires, rounds, scratch, vdtool};
use crate::vhdx_made::{DATA, MIB, made};
use crate::vhdx_walk::walk;

fn spec(options: &'static str, size: u64) -> LayerSpec {
    LayerSpec {
        format: "vhdx",
        options,
        size,
    }
}

fn run(dir: &Path, line: &str) -> assert_cmd::assert::Assert {
    vdtool()
        .current_dir(dir)
        .args(line.split_whitespace())
        .assert()
}

fn io(dir: &Path, commands: &[&str], file: &str) {
    let mut words = vec!["io", "-q"];
    words.extend(commands.iter().flat_map(|command| ["-c", command]));
    words.push(file);
    vdtool().current_dir(dir).args(words).assert().success();
}

/// Changes a disk at random, and what it is to read as.
fn change(disk: &Disk, model: &mut Vec<u8>, rng: &mut Seeded) {
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    for _ in 0..rng.usize(1..12) {
        let size = model.len() as u64;
        let start = rng.u64(0..size / 512) * 512;
        let end = (start + rng.u64(1..5000) * 512).min(size);
        let part = len(start)..len(end);
        match rng.u32(0..8) {
            0..4 => {
                let bytes = rng.bytes(part.len());
                chain.write_at(&bytes, start).expect("writes");
                model[part].copy_from_slice(&bytes);
            }
            4 => {
                chain
                    .zero(start..end, vdtool::storage::Zeroing::MayUnmap)
                    .expect("zeroes");
                model[part].fill(0);
            }
            5 => {
                chain
                    .zero(start..end, vdtool::storage::Zeroing::KeepSpace)
                    .expect("zeroes");
                model[part].fill(0);
            }
            6 => chain.flush().expect("flushes"),
            _ => {
                let size = rng.u64(1..16) * MIB / 2;
                chain.resize(size).expect("resizes");
                model.resize(len(size), 0);
            }
        }
    }
    chain.close().expect("closes");
}

#[test]
fn what_is_made_and_changed_keeps_every_rule_and_holds_what_it_reads_as() {
    for options in [
        "block_size=1M",
        "block_size=2M,logical_sector_size=4096,log_size=3M",
        "block_size=1M,subformat=fixed",
        "block_size=1M,block_state_zero=on",
    ] {
        let size = 6 * MIB;
        let disk = Disk::create(Place::Memory, &[spec(options, size)]);
        let mut model = vec![0; len(size)];
        let mut rng = Seeded::new(options);
        let first = walk(&disk.memory()[0].to_bytes());
        let mut state = first.state;
        for round in 0..rounds(6) {
            change(&disk, &mut model, &mut rng);
            let file = disk.memory()[0].to_bytes();
            let walked = walk(&file);
            assert!(walked.content(&file, &[]) == model, "{options} {round}");
            assert!(read_all(&disk.open(Access::Read, WriteOrder::Ordered)) == model);
            let report = disk.check(Repair::Nothing).expect("checks");
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
            assert_ne!(walked.state, first.state, "it was changed");
            state = walked.state;
        }
        // To read it changes nothing.
        let before = disk.memory()[0].to_bytes();
        drop(disk.open(Access::Read, WriteOrder::Ordered));
        drop(disk.open(Access::Write, WriteOrder::Ordered));
        assert!(disk.memory()[0].to_bytes() == before);
        assert_eq!(walk(&before).state, state);
    }
}

#[test]
fn a_child_that_is_made_and_changed_keeps_every_rule() {
    let specs = [
        spec("block_size=1M", 5 * MIB),
        spec("block_size=2M", 6 * MIB),
    ];
    let mut disk = Disk::create(Place::Memory, &specs[1..]);
    let mut below = vec![0; len(6 * MIB)];
    let mut rng = Seeded::new("vhdx child");
    change(&disk, &mut below, &mut rng);
    disk.push(&LayerSpec {
        size: below.len() as u64,
        ..specs[0]
    });
    let mut model = below.clone();
    let parent = walk(&disk.memory()[1].to_bytes());
    for round in 0..rounds(6) {
        change(&disk, &mut model, &mut rng);
        let file = disk.memory()[0].to_bytes();
        let walked = walk(&file);
        let mut parent_bytes = below.clone();
        parent_bytes.resize(model.len(), 0);
        assert!(walked.content(&file, &parent_bytes) == model, "{round}");
        let linkage = uuid::Uuid::from_bytes_le(parent.state).braced().to_string();
        assert_eq!(walked.pairs["parent_linkage"], linkage);
        assert_eq!(walked.pairs["relative_path"], r".\0");
    }
}

#[test]
fn options_are_those_of_qemu_img_and_those_it_lacks() {
    let home = scratch();
    let dir = home.path();
    let bytes = |name: &str| std::fs::read(dir.join(name)).expect("reads");
    run(dir, "create -q -f vhdx a 10G").success();
    let walked = walk(&bytes("a"));
    assert_eq!(
        (walked.block, walked.logical, walked.size),
        (2 * MIB, 512, 10 << 30)
    );
    run(
        dir,
        "create -q -f vhdx -o block_size=32M,logical_sector_size=4096 a 64T",
    )
    .success();
    let walked = walk(&bytes("a"));
    assert_eq!(
        (walked.block, walked.logical, walked.size),
        (32 * MIB, 4096, 64 << 40)
    );
    run(dir, "create -q -f vhdx -o logical_sector_size=4096 a 5000").success();
    assert_eq!(walk(&bytes("a")).size, 8192);
    run(dir, "create -q -f vhdx -o block_state_zero=on a 10M").success();
    assert_eq!(walk(&bytes("a")).blocks.len(), 5);
    run(
        dir,
        "create -q -f vhdx -o subformat=fixed,preallocation=falloc a 10M",
    )
    .success();
    assert!(walk(&bytes("a")).blocks.values().all(Option::is_some));
    run(dir, "create -q -f vhdx -b a -F vhdx b").success();
    let (parent, child) = (walk(&bytes("a")), walk(&bytes("b")));
    assert_eq!(child.pairs["relative_path"], r".\a");
    let state = uuid::Uuid::from_bytes_le(parent.state).braced().to_string();
    assert_eq!(child.pairs["parent_linkage"], state);
    for options in [
        "block_size=512k",
        "block_size=3M",
        "block_size=512M",
        "log_size=512k",
        "log_size=0",
        "logical_sector_size=1024",
        "preallocation=full",
    ] {
        let failed = run(dir, &format!("create -q -f vhdx -o {options} c 10M")).failure();
        assert!(!failed.get_output().stderr.is_empty());
    }
    run(dir, "create -q -f vhdx c 0").failure();
    run(dir, "create -q -f vhdx c 65T").failure();
    run(
        dir,
        "create -q -f vhdx -o block_state_zero=on -b a -F vhdx c",
    )
    .code(1);
    run(
        dir,
        "create -q -f vhdx -o logical_sector_size=4096 -b a -F vhdx c",
    )
    .code(1);
    run(dir, "create -q -f raw r 1M").success();
    run(dir, "create -q -f vhdx -b r -F raw c").code(63);
    assert!(!dir.join("c").exists());
}

/// qemu-img's content of a file.
fn by_qemu(dir: &Path, file: &str) -> Vec<u8> {
    peer(
        "qemu-img",
        dir,
        ["convert", "-f", "vhdx", "-O", "raw", file, "by-qemu.raw"],
    );
    std::fs::read(dir.join("by-qemu.raw")).expect("reads")
}

#[test]
fn what_a_kill_leaves_is_replayed_by_qemu() {
    if !requires("qemu-img") {
        return;
    }
    let home = scratch();
    let dir = home.path();
    for options in ["block_size=1M", "block_size=1M,log_size=2M"] {
        let disk = Disk::create(Place::Files, &[spec(options, 40 * MIB)]);
        let chain = disk.open(Access::Write, WriteOrder::Ordered);
        let mut rng = Seeded::new(options);
        for round in 0..rounds(4) {
            // Often enough for the log to come round.
            for _ in 0..60 {
                let block = rng.u64(0..40) * MIB;
                match rng.u32(0..4) {
                    0 => chain.discard(block..(block + MIB)).expect("discards"),
                    _ => chain
                        .write_at(&[rng.u8(1..=255); 700], block)
                        .expect("writes"),
                }
            }
            let mut expected = vec![0; len(40 * MIB)];
            chain.read_at(&mut expected, 0).expect("reads");
            std::fs::copy(disk.path(), dir.join("killed.vhdx")).expect("copies");
            let ours = {
                let chain = open(&dir.join("killed.vhdx"), &ChainOptions::read()).expect("opens");
                assert!(chain.top().is_dirty());
                read_all(&chain)
            };
            assert!(ours == expected, "{options} {round}");
            peer(
                "qemu-img",
                dir,
                ["check", "-q", "-r", "all", "-f", "vhdx", "killed.vhdx"],
            );
            assert!(by_qemu(dir, "killed.vhdx") == expected, "{options} {round}");
            run(dir, "check -q killed.vhdx");
        }
        chain.close().expect("closes");
    }
}

#[test]
fn qemu_and_we_take_turns() {
    if !requires("qemu-img") || !requires("qemu-io") {
        return;
    }
    let home = scratch();
    let dir = home.path();
    for options in [
        "subformat=dynamic",
        "subformat=fixed",
        "block_size=1M,log_size=4M",
    ] {
        let create = ["create", "-q", "-f", "vhdx", "-o", options, "q.vhdx", "40M"];
        peer("qemu-img", dir, create);
        for (n, at) in [(1, "0"), (2, "9M"), (3, "33M")] {
            io(
                dir,
                &[&format!("write -P {n} {at} 3000k"), "discard 20M 8M"],
                "q.vhdx",
            );
            peer("qemu-img", dir, ["check", "-q", "-f", "vhdx", "q.vhdx"]);
            let write = format!("write -P {} 18M 5M", n + 10);
            peer("qemu-io", dir, ["-f", "vhdx", "-c", &write, "q.vhdx"]);
            run(dir, "check -q q.vhdx").success();
        }
        run(dir, "convert -q -O raw q.vhdx ours.raw").success();
        let ours = std::fs::read(dir.join("ours.raw")).expect("reads");
        assert!(by_qemu(dir, "q.vhdx") == ours, "{options}");
        assert_eq!(
            (ours[0], ours[len(9 * MIB)], ours[len(18 * MIB)]),
            (1, 2, 13)
        );
        run(dir, "resize -q q.vhdx 90M").success();
        io(dir, &["write -P 9 88M 2M"], "q.vhdx");
        peer("qemu-img", dir, ["check", "-q", "-f", "vhdx", "q.vhdx"]);
        assert_eq!(by_qemu(dir, "q.vhdx")[len(89 * MIB)], 9);
    }
}

/// Programs that read VHDX: a command that prints the disk's content.
fn readers(file: &str) -> Vec<(&'static str, Vec<String>)> {
    let by = |module: &str, code: String| {
        let python = python(module)?;
        Some(vec![python, "-c".to_owned(), code])
    };
    let libvhdi = format!(
        "import pyvhdi,sys\nf=pyvhdi.file()\nf.open('{file}')\nn=f.get_media_size()\nsys.stdout.buffer.write(f.read_buffer(n))"
    );
    let dissect = format!(
        "import sys\nfrom pathlib import Path\nfrom dissect.hypervisor.disk.vhdx import VHDX\nd=VHDX(Path('{file}'))\nsys.stdout.buffer.write(d.read(d.size))"
    );
    let mut readers = Vec::new();
    if let Some(words) = by("pyvhdi", libvhdi) {
        readers.push(("libvhdi", words));
    }
    if let Some(words) = by("dissect.hypervisor", dissect) {
        readers.push(("dissect", words));
    }
    if requires("7zz") {
        readers.push((
            "7-Zip",
            ["7zz", "x", "-so", file].map(str::to_owned).to_vec(),
        ));
    }
    readers
}

#[test]
fn other_programs_read_what_we_make() {
    let home = scratch();
    let dir = home.path();
    for (options, name) in [
        ("block_size=1M", "a.vhdx"),
        ("logical_sector_size=4096", "b.vhdx"),
        ("subformat=fixed", "c.vhdx"),
    ] {
        run(dir, &format!("create -q -f vhdx -o {options} {name} 20M")).success();
        io(
            dir,
            &["write -P 1 0 3M", "write -P 2 9M 5000k", "write -P 0 1M 1M"],
            name,
        );
        run(dir, &format!("convert -q -O raw {name} ours.raw")).success();
        let ours = std::fs::read(dir.join("ours.raw")).expect("reads");
        for (reader, words) in readers(name) {
            let output = std::process::Command::new(&words[0])
                .args(&words[1..])
                .current_dir(dir)
                .output()
                .expect("runs");
            assert!(output.stdout == ours, "{reader}: {name}: {output:.0?}");
        }
    }
}

#[test]
fn discarded_blocks_give_their_space_back_and_are_used_again() {
    let disk = Disk::create(Place::Memory, &[spec("block_size=1M", 16 * MIB)]);
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    chain.write_at(&vec![1; len(16 * MIB)], 0).expect("writes");
    chain.flush().expect("flushes");
    let full = disk.memory()[0].size();
    chain.discard(0..8 * MIB).expect("discards");
    chain.flush().expect("flushes");
    chain.flush().expect("flushes");
    let storage = &disk.memory()[0];
    let hole = storage.run(DATA, 8 * MIB).expect("tells");
    assert!(!hole.data && hole.len >= 7 * MIB, "{hole:?}");
    for _ in 0..3 {
        chain.write_at(&vec![2; len(8 * MIB)], 0).expect("writes");
        chain.flush().expect("flushes");
        chain.discard(0..8 * MIB).expect("discards");
        chain.flush().expect("flushes");
        chain.flush().expect("flushes");
    }
    // But for what is made ready ahead.
    assert!(storage.size() <= full + 32 * MIB, "{:#x}", storage.size());
    chain.discard(8 * MIB..16 * MIB).expect("discards");
    chain.close().expect("closes");
    assert_eq!(storage.size(), DATA, "the file ends behind what is in use");
    walk(&storage.to_bytes());
}

#[test]
fn a_table_that_has_no_room_moves_and_all_that_was_there_stays() {
    let disk = Disk::create(Place::Memory, &[spec("block_size=1M", 3 * MIB)]);
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    chain.write_at(&[1; 5000], 2 * MIB).expect("writes");
    // Room for 131072 entries, of which one in 4097 is for a sector bitmap.
    chain.resize(200_000 * MIB).expect("grows");
    chain.write_at(&[2; 5000], 199_999 * MIB).expect("writes");
    chain.write_at(&[3; 5000], 5000 * MIB).expect("writes");
    chain.resize(400_000 * MIB).expect("grows");
    chain.close().expect("closes");
    let file = disk.memory()[0].to_bytes();
    let walked = walk(&file);
    let blocks: Vec<u64> = walked.blocks.keys().copied().collect();
    assert_eq!(blocks, [2, 5000, 199_999]);
    for (block, byte) in [(2, 1), (199_999, 2), (5000, 3)] {
        let host = walked.blocks[&block].expect("has space");
        assert_eq!(file[len(host)], byte);
    }
    let report = disk.check(Repair::Nothing).expect("checks");
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    chain.resize(4 * MIB).expect("shrinks");
    chain.resize(150_000 * MIB).expect("grows");
    let mut bytes = [9; 8];
    chain.read_at(&mut bytes, 5000 * MIB).expect("reads");
    assert_eq!(bytes, [0; 8], "what was cut off is gone");
    chain.close().expect("closes");
    walk(&disk.memory()[0].to_bytes());
}

#[test]
fn entries_that_are_wrong_are_told_of_and_set_right() {
    let base = || made(8 * MIB, MIB).word(0, DATA | 6).fill(DATA, MIB, 1);
    for (made, says, byte) in [
        (base().word(3, DATA | 6), "overlaps", 1),
        (base().word(3, (40 * MIB) | 6), "behind the end", 0),
        (base().word(3, MIB | 6), "other metadata", 0),
        (base().word(3, DATA | 4), "state that it cannot have", 0),
        (
            base().word(3, (DATA + MIB) | 7).fill(DATA + MIB, MIB, 4),
            "without a parent",
            4,
        ),
        (
            base()
                .word(3, (DATA + MIB) | 8 | 6)
                .fill(DATA + MIB, MIB, 5),
            "bits that mean nothing",
            5,
        ),
        (base().word(3, DATA | 2), "bits that mean nothing", 0),
        (base().word(8192, DATA | 6), "sector bitmap", 0),
    ] {
        let mut made = made;
        if says == "sector bitmap" {
            // Of a chunk that is followed by another.
            made.item(crate::vhdx_made::SIZE).bytes = (8194 * MIB).to_le_bytes().to_vec();
            made.words.retain(|(index, _)| *index != 8192);
            made = made.word(4096, (DATA + MIB) | 6);
        }
        let disk = Disk::of_bytes("vhdx", &made.to_bytes());
        let report = disk.check(Repair::Nothing).expect("checks");
        assert_eq!(report.corruptions, 1, "{says}: {report:?}");
        assert!(report.findings[0].text.contains(says), "{says}: {report:?}");
        let report = disk.check(Repair::All).expect("checks");
        assert_eq!(
            (report.corruptions, report.corruptions_fixed),
            (0, 1),
            "{says}: {report:?}"
        );
        let report = disk.check(Repair::Nothing).expect("checks");
        assert_eq!(report.corruptions, 0, "{says}: {report:?}");
        let chain = disk.open(Access::Write, WriteOrder::Ordered);
        for (block, byte) in [(0, 1), (3, byte)] {
            let mut found = [9; 512];
            chain.read_at(&mut found, block * MIB + 600).expect("reads");
            assert_eq!(found, [byte; 512], "{says}");
        }
        chain.write_at(&[7; 100], 3 * MIB).expect("writes");
        let mut found = [0; 1];
        chain.read_at(&mut found, 0).expect("reads");
        assert_eq!(found, [1], "{says}");
        chain.close().expect("closes");
        walk(&disk.memory()[0].to_bytes());
    }
}

#[test]
fn a_repair_leaves_the_data_of_blocks_that_it_cannot_set_right() {
    // Partially present without a sector bitmap, at the end of the file, and something to mend.
    let host = DATA + 7 * MIB;
    let made = made(8 * MIB, MIB)
        .child(MIB, &[("parent_linkage", "{}")])
        .word(0, DATA | 4)
        .word(1, (DATA + MIB) | 6)
        .word(2, (DATA + MIB) | 6)
        .word(3, host | 7)
        .fill(host, MIB, 5);
    let disk = Disk::of_bytes("vhdx", &made.to_bytes());
    let report = disk.check(Repair::All).expect("checks");
    assert_eq!(report.corruptions, 1, "{report:?}");
    assert_eq!(report.corruptions_fixed, 2, "{report:?}");
    let after = disk.memory()[0].to_bytes();
    let host = usize::try_from(host).expect("fits");
    assert!(after.len() >= host + (1 << 20), "{:#x}", after.len());
    assert!(after[host..host + (1 << 20)].iter().all(|b| *b == 5));
}

#[test]
fn space_kept_for_blocks_without_data_is_nobody_elses() {
    for state in [1, 3] {
        let kept = DATA + 5 * MIB;
        let made = made(8 * MIB, MIB)
            .word(0, DATA | 6)
            .word(3, kept | state)
            .fill(kept, MIB, 9);
        let disk = Disk::of_bytes("vhdx", &made.to_bytes());
        assert_eq!(disk.check(Repair::Nothing).expect("checks").corruptions, 0);
        let chain = disk.open(Access::Write, WriteOrder::Ordered);
        for block in [1, 2, 4, 5, 6, 7] {
            chain.write_at(&[7; 512], block * MIB).expect("writes");
        }
        chain.close().expect("closes");
        let file = disk.memory()[0].to_bytes();
        let at = usize::try_from(kept).expect("fits");
        assert!(file[at..at + (1 << 20)].iter().all(|b| *b == 9), "{state}");
        // The first write to it names other space.
        let chain = disk.open(Access::Write, WriteOrder::Ordered);
        chain.write_at(&[8; 512], 3 * MIB).expect("writes");
        chain.close().expect("closes");
        walk(&disk.memory()[0].to_bytes());
        assert_eq!(disk.check(Repair::Nothing).expect("checks").corruptions, 0);
        // Cut off, or another's.
        for wrong in [DATA, 40 * MIB, MIB] {
            let mut made = made.clone();
            made.words.retain(|(index, _)| *index != 3);
            let disk = Disk::of_bytes("vhdx", &made.word(3, wrong | state).to_bytes());
            let report = disk.check(Repair::Nothing).expect("checks");
            assert_eq!(report.corruptions, 1, "{report:?}");
            assert!(
                report.findings[0].text.contains("kept for it"),
                "{report:?}"
            );
            let report = disk.check(Repair::All).expect("checks");
            assert_eq!(report.corruptions, 0, "{report:?}");
            let disk = disk.open(Access::Write, WriteOrder::Ordered);
            disk.close().expect("closes");
        }
    }
}

/// A base with a 1, a middle with a 2 and a top with a 3, each in a block of its own.
fn chain_of_three(dir: &Path) -> Vec<u8> {
    run(dir, "create -q -f vhdx -o block_size=1M base.vhdx 6M").success();
    io(dir, &["write -P 1 0 4k"], "base.vhdx");
    for (below, above, write) in [
        ("base", "mid", "write -P 2 1M 4k"),
        ("mid", "top", "write -P 3 2M 4k"),
    ] {
        let line =
            format!("create -q -f vhdx -o block_size=1M -b {below}.vhdx -F vhdx {above}.vhdx");
        run(dir, &line).success();
        io(dir, &[write], &format!("{above}.vhdx"));
    }
    content(dir, "top.vhdx")
}

fn content(dir: &Path, file: &str) -> Vec<u8> {
    run(dir, &format!("convert -q -O raw {file} content.raw")).success();
    std::fs::read(dir.join("content.raw")).expect("reads")
}

#[test]
fn children_are_committed_and_rebased_and_their_links_follow() {
    let home = scratch();
    let dir = home.path();
    let disk = chain_of_three(dir);
    run(dir, "commit -q top.vhdx").success();
    assert!(content(dir, "top.vhdx") == disk && content(dir, "mid.vhdx") == disk);
    let top = walk(&std::fs::read(dir.join("top.vhdx")).expect("reads"));
    assert!(top.blocks.is_empty(), "it was emptied");
    assert!(
        !top.pairs.contains_key("parent_linkage2"),
        "{:?}",
        top.pairs
    );
    io(dir, &["write -P 4 3M 4k"], "top.vhdx");
    let disk = content(dir, "top.vhdx");
    run(dir, "rebase -q -b base.vhdx -F vhdx top.vhdx").success();
    std::fs::rename(dir.join("mid.vhdx"), dir.join("away")).expect("moves");
    assert!(content(dir, "top.vhdx") == disk);
    run(dir, "check -q top.vhdx").success();
    // The base changes behind its back.
    io(dir, &["write -P 9 5M 4k"], "base.vhdx");
    run(dir, "map top.vhdx").code(1);
    run(dir, "rebase -q -u -b base.vhdx -F vhdx top.vhdx").success();
    let disk = content(dir, "top.vhdx");
    assert_eq!((disk[0], disk[len(3 * MIB)], disk[len(5 * MIB)]), (1, 4, 9));
    vdtool()
        .current_dir(dir)
        .args(["rebase", "-q", "-b", "", "top.vhdx"])
        .assert()
        .success();
    std::fs::remove_file(dir.join("base.vhdx")).expect("is there");
    assert!(content(dir, "top.vhdx") == disk);
    let file = std::fs::read(dir.join("top.vhdx")).expect("reads");
    assert!(walk(&file).content(&file, &[]) == disk);
    assert!(walk(&file).pairs.is_empty());
    run(dir, "create -q -f vhdx base.vhdx 6M").success();
    run(dir, "rebase -b base.vhdx -F vhdx top.vhdx").code(63);
}

#[test]
fn a_commit_that_ends_anywhere_leaves_the_child_over_its_parent() {
    let home = scratch();
    let dir = home.path();
    let disk = chain_of_three(dir);
    let writer = |name: &str| {
        let options = ChainOptions {
            follow: Follow::No,
            ..ChainOptions::write()
        };
        open(&dir.join(name), &options).expect("opens")
    };
    let mid = writer("mid.vhdx");
    let next = mid.top().next_state().expect("tells").expect("has one");
    let mut top = writer("top.vhdx");
    let relink = top.top_mut().as_relink().expect("names its parent");
    relink.expect_state(next).expect("writes");
    drop(top);
    assert!(mid.top().state() != Some(next));
    let allocated = mid.top().allocate(2 * MIB, 512, &mut |slot| {
        let bytes = vec![3; len(slot.guest.end - slot.guest.start)];
        slot.storage.write_at(&bytes, slot.host)
    });
    assert!(allocated.expect("has room") > 0);
    assert_eq!(mid.top().state(), Some(next));
    // Killed here: what was to be committed is in both.
    drop(mid);
    assert!(content(dir, "top.vhdx") == disk);
    run(dir, "commit -q top.vhdx").success();
    assert!(content(dir, "top.vhdx") == disk);
    let top = walk(&std::fs::read(dir.join("top.vhdx")).expect("reads"));
    assert!(
        !top.pairs.contains_key("parent_linkage2"),
        "{:?}",
        top.pairs
    );
}

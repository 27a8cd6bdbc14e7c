//! VHDX: rules that strangers found broken, of the specification and of our own.

use std::fs;
use std::os::unix::fs::MetadataExt;

use vdtool::image::check::Repair;
use vdtool::image::open::WriteOrder;
use vdtool::storage::memory::Change as Changed;
use vdtool::storage::open::Access;
use vdtool::storage::{Storage, Zeroing};

use crate::layers::{Disk, read_all};
use crate::util::{len, scratch, vdtool};
use crate::vhdx_made::{DATA, Entry, LOG, MIB, Made, Region, entry, made, table_page};

const UNKNOWN: &str = "01234567-89ab-4cde-8f01-23456789abcd";

fn one_block() -> Made {
    made(8 * MIB, MIB).word(0, DATA | 6).fill(DATA, MIB, 1)
}

fn disk(made: &Made) -> Disk {
    Disk::of_bytes("vhdx", &made.to_bytes())
}

fn byte_at(disk: &Disk, at: u64) -> Option<u8> {
    let chain = disk.open(Access::Read, WriteOrder::Ordered);
    let mut byte = [0];
    chain.read_at(&mut byte, at).ok().map(|()| byte[0])
}

#[test]
fn a_sound_log_of_a_file_that_was_cut_is_put_in_place_by_a_repair() {
    let page = table_page(&[
        (0, DATA | 6),
        (1, (DATA + MIB) | 6),
        (2, (DATA + 9 * MIB) | 6),
    ]);
    let logged = Entry {
        flushed: 14 * MIB,
        last: 14 * MIB,
        ..entry(1, 0, &[page])
    };
    let made = one_block()
        .fill(DATA + MIB, MIB, 2)
        .logged(vec![(0, logged.bytes())]);
    let disk = disk(&made);
    let report = disk.check(Repair::Nothing).expect("checks");
    assert_eq!((report.corruptions, report.allocated_clusters), (2, 3));
    let report = disk.check(Repair::All).expect("checks");
    assert_eq!((report.corruptions, report.corruptions_fixed), (0, 2));
    assert!(report.findings[0].text.contains("as its log says"));
    let bytes = [0, MIB, 2 * MIB].map(|at| byte_at(&disk, at));
    assert_eq!(bytes, [Some(1), Some(2), Some(0)], "what is there is read");
    assert_eq!(disk.check(Repair::Nothing).expect("checks").corruptions, 0);
}

#[test]
fn regions_of_others_are_neither_written_over_nor_cost_data() {
    let region = |offset| Region {
        guid: UNKNOWN,
        offset,
        len: 1 << 20,
        flags: 0,
    };
    // Behind the end of the file: what grows it would take its place.
    let mut far = one_block();
    far.regions.push(region(20 * MIB));
    let far = disk(&far);
    let report = far.check(Repair::Nothing).expect("checks");
    assert_eq!(report.corruptions, 1, "{report:?}");
    let storage = far.memory()[0].clone() as std::sync::Arc<dyn Storage>;
    let error = far.try_open_with(vec![storage], Access::Write, WriteOrder::Ordered);
    assert!(error.expect_err("may grow").to_string().contains(UNKNOWN));
    let before = far.memory()[0].to_bytes();
    let report = far.check(Repair::All).expect("checks");
    assert_eq!((report.corruptions, report.corruptions_fixed), (1, 0));
    assert!(far.memory()[0].to_bytes() == before);
    assert_eq!(byte_at(&far, 0), Some(1));
    // A block in it keeps its data elsewhere, and the region what it holds.
    let mut met = one_block().word(3, (DATA + 2 * MIB) | 6);
    met.regions.push(region(DATA + 2 * MIB));
    let met = disk(&met.fill(DATA + 2 * MIB, MIB, 0x77));
    let report = met.check(Repair::All).expect("checks");
    assert_eq!((report.corruptions, report.corruptions_fixed), (0, 1));
    let chain = met.open(Access::Write, WriteOrder::Ordered);
    chain.write_at(&[9; 512], 3 * MIB).expect("writes");
    chain.close().expect("closes");
    assert_eq!(byte_at(&met, 3 * MIB + 512), Some(0x77));
    let bytes = met.memory()[0].to_bytes();
    let kept = &bytes[len(DATA + 2 * MIB)..len(DATA + 3 * MIB)];
    assert!(kept.iter().all(|byte| *byte == 0x77));
}

#[test]
fn entries_of_the_log_have_whole_mib_and_a_log_that_is_begun_is_of_our_version() {
    let mut made = one_block();
    made.len += 512;
    made.heads.iter_mut().for_each(|head| head.log_version = 1);
    let disk = disk(&made);
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    for block in 1..6 {
        chain.write_at(&[5; 512], block * MIB).expect("writes");
    }
    chain.flush().expect("flushes");
    let bytes = disk.memory()[0].to_bytes();
    let log = &bytes[len(LOG)..len(LOG + MIB)];
    let mut entries = 0;
    for sector in log.chunks(4096).filter(|s| s.starts_with(b"loge")) {
        for at in [48, 56] {
            let size = u64::from_le_bytes(sector[at..at + 8].try_into().expect("eight"));
            assert!(size.is_multiple_of(MIB) && size > 0, "{size:#x}");
        }
        entries += 1;
    }
    assert!(entries > 1, "{entries}");
    // As a kill leaves it.
    let killed = Disk::of_bytes("vhdx", &bytes);
    let found = read_all(&killed.open(Access::Read, WriteOrder::Ordered));
    assert_eq!(found[len(5 * MIB)], 5);
    drop(chain);
}

#[test]
fn a_large_block_that_is_here_in_part_is_copied_without_its_holes() {
    let block = 8 * MIB;
    let bitmap = DATA;
    let mut made = made(64 * MIB, block)
        .child(block, &[("parent_linkage", "{}")])
        .word(0, (DATA + MIB) | 7)
        .word(512, bitmap | 6)
        .fill(bitmap, 1536, 0xff)
        .fill(DATA + MIB + 4 * MIB, 4096, 3);
    made.len = 16 * MIB;
    let disk = disk(&made);
    let storage = disk.memory().remove(0);
    let data = DATA + MIB;
    for part in [data..data + 4 * MIB, data + 4 * MIB + 4096..data + block] {
        let hole = storage.zero(part, Zeroing::MayUnmap);
        hole.expect("makes a hole");
    }
    storage.record();
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    chain.write_at(&[9; 4096], 7 * MIB).expect("writes");
    let written: usize = storage
        .changes()
        .iter()
        .map(|change| match change {
            Changed::Write { bytes, .. } => bytes.len(),
            _ => 0,
        })
        .sum();
    assert!(written < 2 << 20, "{written} bytes");
    let found = read_all(&chain);
    for (at, byte) in [
        (7 * MIB, 9),
        (7 * MIB + 4096, 0),
        (4 * MIB, 3),
        (4 * MIB + 4096, 0),
    ] {
        assert_eq!(found[len(at)], byte, "{at:#x}");
    }
}

#[test]
fn no_byte_of_the_metadata_is_read_as_the_disks() {
    // The table is behind block 0, and block 1 is said to lie there.
    let mut made = one_block();
    let table = 9 * MIB;
    made.regions[0].offset = table;
    made.words.clear();
    for (index, word) in [(0, (table - MIB) | 6), (1, table | 6)] {
        let bytes = u64::to_le_bytes(word).to_vec();
        made.bytes.push((table + index * 8, bytes));
    }
    let disk = disk(&made);
    let chain = disk.open(Access::Read, WriteOrder::Ordered);
    chain.read_at(&mut vec![0; 1 << 20], 0).expect("block 0");
    for (at, count) in [(0, 2 << 20), (MIB - 512, 1024), (MIB, 512)] {
        let error = chain.read_at(&mut vec![0; count], at);
        assert!(
            error
                .expect_err("the table")
                .to_string()
                .contains("block 1")
        );
    }
}

#[test]
fn a_compacted_file_is_no_larger_than_what_was_written() {
    let scratch = scratch();
    let dir = scratch.path();
    let run = |line: &[&str]| {
        vdtool().current_dir(dir).args(line).assert().success();
    };
    for (format, options) in [("vhdx", "block_size=32M"), ("vdi", "block_size=8M")] {
        run(&["create", "-q", "-f", format, "-o", options, "a", "256M"]);
        for number in 0..8 {
            let write = format!("write -q -P 1 {}M 4096", number * 32);
            run(&["io", "-c", &write, "a"]);
        }
        run(&["io", "-c", "write -q -z -u 0 128M", "a"]);
        run(&["compact", "a"]);
        let size = fs::metadata(dir.join("a")).expect("is there").blocks() * 512;
        assert!(size < 8 << 20, "{format}: {size}");
        run(&[
            "io",
            "-c",
            "read -P 1 224M 4096",
            "-c",
            "read -P 0 4k 4k",
            "a",
        ]);
        fs::remove_file(dir.join("a")).expect("removes");
    }
}

#[test]
fn a_child_has_its_parents_sectors_and_ignores_what_only_fixed_disks_have() {
    let scratch = scratch();
    let dir = scratch.path();
    let run = |line: &str| {
        let done = vdtool().current_dir(dir).args(line.split(' ')).assert();
        String::from_utf8_lossy(&done.success().get_output().stdout).into_owned()
    };
    run("create -q -f vhdx -o physical_sector_size=512 base.vhdx 64M");
    run("create -q -f vhdx -b base.vhdx -F vhdx child.vhdx");
    run("create -q -f vhdx -o physical_sector_size=512 base2.vhdx 64M");
    run("fork -q base2.vhdx below.vhdx");
    for file in ["child.vhdx", "base2.vhdx"] {
        let info: serde_json::Value =
            serde_json::from_str(&run(&format!("info --output json {file}"))).expect("is JSON");
        let data = &info["format-specific"]["data"];
        assert_eq!(data["physical-sector-size"], 512, "{file}: {info}");
    }
    // Space of all blocks is kept by disks without a parent.
    for (flags, grown) in [(3, false), (1, true)] {
        let mut made = match flags {
            3 => made(8 * MIB, MIB).child(MIB, &[("parent_linkage", "{}")]),
            _ => made(8 * MIB, MIB),
        };
        made.parameters(MIB, flags);
        let disk = disk(&made);
        let chain = disk.open(Access::Write, WriteOrder::Ordered);
        chain.write_at(&[1; 512], 0).expect("writes");
        chain.close().expect("closes");
        let len = disk.memory()[0].size();
        assert_eq!(len >= 12 * MIB, grown, "{flags}: {len:#x}");
        let report = disk.check(Repair::All).expect("checks");
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
        assert_eq!(disk.memory()[0].size(), len);
    }
}

//! VHDX as others leave it: states of blocks, sector bitmaps, logs that were not replayed, parents, and
//! what a hostile hand writes.

use std::path::Path;

use vdtool::ErrorKind;
use vdtool::chain::Chain;
use vdtool::image::check::Repair;
use vdtool::image::open::WriteOrder;
use vdtool::storage::Storage;
use vdtool::storage::memory::MemoryStorage;
use vdtool::storage::open::Access;

use crate::layers::{Disk, read_all};
use crate::mutate::{Expect, Sample};
use crate::util::Seeded;
use crate::util::{len, rounds, scratch, vdtool};
use crate::vhdx_made::{
    BAT, BAT_REGION, Change, DATA, Entry, INCOMPLETE, LOCATOR, LOG, LOGICAL, MIB, Made, PARAMETERS,
    Region, SIZE, STATE, entry, guid, item, locator, made, table_page,
};

/// Entries of a log by their place in it.
type Ring = Vec<(u64, Vec<u8>)>;

/// A region and a metadata item that nobody knows.
const UNKNOWN: &str = "01234567-89ab-4cde-8f01-23456789abcd";

fn read(bytes: &[u8]) -> Vec<u8> {
    read_all(&Disk::of_bytes("vhdx", bytes).open(Access::Read, WriteOrder::Ordered))
}

fn try_open(bytes: &[u8], access: Access) -> vdtool::Result<Chain> {
    let storage: Vec<std::sync::Arc<dyn Storage>> =
        vec![std::sync::Arc::new(MemoryStorage::from_bytes(bytes))];
    Disk::of_bytes("vhdx", bytes).try_open_with(storage, access, WriteOrder::Ordered)
}

/// Why a file is not opened, to be read or to be written.
fn refused(made: &Made, kind: ErrorKind, says: &str) {
    let bytes = made.to_bytes();
    for access in [Access::Read, Access::Write] {
        let error = try_open(&bytes, access).expect_err(says);
        assert!(error.to_string().contains(says), "{error}, expected {says}");
        assert_eq!(error.kind(), kind, "{error}");
    }
}

fn fails_to_read(bytes: &[u8], at: u64, says: &str) {
    let chain = try_open(bytes, Access::Read).expect("opens");
    let error = chain.read_at(&mut [0; 512], at).expect_err(says);
    assert!(error.to_string().contains(says), "{error}, expected {says}");
}

/// A disk of eight blocks of 1 MiB, the first of which is full of 1.
fn one_block() -> Made {
    made(8 * MIB, MIB).word(0, DATA | 6).fill(DATA, MIB, 1)
}

fn is_full_of(disk: &[u8], block: u64, byte: u8) {
    let part = &disk[len(block * MIB)..len((block + 1) * MIB)];
    let other = part.iter().position(|b| *b != byte);
    assert_eq!(other, None, "block {block} is not full of {byte}");
}

#[test]
fn a_block_in_each_state_reads_as_the_format_has_it() {
    let states = |made: Made| {
        // Places of blocks that have none may be left over.
        let made = made.word(1, 1).word(2, 2).word(3, 3).word(4, DATA | 3);
        let made = made.word(5, DATA).word(6, (DATA + MIB) | 6);
        made.fill(DATA + MIB, MIB, 6).fill(DATA, MIB, 9)
    };
    let base = read(&states(made(8 * MIB, MIB)).to_bytes());
    for (block, byte) in [0, 0, 0, 0, 0, 0, 6, 0].into_iter().enumerate() {
        is_full_of(&base, block as u64, byte);
    }
    let parent = (0..8).fold(made(8 * MIB, MIB), |made, n| {
        made.word(n, (DATA + n * MIB) | 6)
            .fill(DATA + n * MIB, MIB, 7)
    });
    let child = states(made(8 * MIB, MIB).child(MIB, &[("parent_linkage", "{}")]));
    let mut disk = Disk::of_bytes("vhdx", &parent.to_bytes());
    disk.push_bytes("vhdx", &child.to_bytes());
    let disk = read_all(&disk.open(Access::Read, WriteOrder::Ordered));
    for (block, byte) in [7, 0, 0, 0, 0, 7, 6, 7].into_iter().enumerate() {
        is_full_of(&disk, block as u64, byte);
    }
    for state in [4, 5] {
        let bytes = made(8 * MIB, MIB).word(3, DATA | state).to_bytes();
        fails_to_read(&bytes, 3 * MIB, "block 3: its BAT entry has the state");
    }
    let bytes = made(8 * MIB, MIB).word(3, DATA | 7).to_bytes();
    fails_to_read(&bytes, 3 * MIB, "without a parent");
}

#[test]
fn blocks_where_none_can_be_are_refused_and_never_read() {
    for (host, says) in [
        (0, "apart from its metadata"),
        (LOG, "apart from its metadata"),
        (BAT, "apart from its metadata"),
        (12 * MIB, "inside the file"),
        (u64::MAX << 20, "inside the file"),
    ] {
        let bytes = made(8 * MIB, MIB).word(3, host | 6).to_bytes();
        fails_to_read(&bytes, 3 * MIB, says);
        let error = try_open(&bytes, Access::Write).expect_err("is not written to");
        assert!(error.to_string().contains("check -r all"), "{error}");
    }
    // What the end of the file cuts off reads as zeroes.
    let mut cut = made(8 * MIB, MIB)
        .word(3, (11 * MIB) | 6)
        .fill(11 * MIB, 4096, 5);
    cut.len = 11 * MIB + 4096;
    let disk = read(&cut.to_bytes());
    assert!(
        disk[len(3 * MIB)..len(3 * MIB) + 4096]
            .iter()
            .all(|b| *b == 5)
    );
    assert!(disk[len(3 * MIB) + 4096..].iter().all(|b| *b == 0));
}

#[test]
fn sectors_of_a_block_that_is_here_in_part_come_from_where_its_bitmap_says() {
    for sector in [512, 4096] {
        let ratio = (1 << 23) * u64::from(sector) / MIB;
        let parent = (0..4).fold(made(4 * MIB, MIB).sectors(sector), |made, n| {
            made.word(n, (DATA + n * MIB) | 6)
                .fill(DATA + n * MIB, MIB, 7)
        });
        let mut child = made(4 * MIB, MIB)
            .sectors(sector)
            .child(MIB, &[("parent_linkage", "{}")])
            .word(0, (DATA + MIB) | 6)
            .word(2, (DATA + 2 * MIB) | 7)
            .word(ratio, DATA | 6)
            .fill(DATA + MIB, 2 * MIB, 1);
        // The table has entries for a whole chunk.
        child.regions[0].len = u32::try_from((ratio + 1) * 8)
            .expect("fits")
            .next_multiple_of(1 << 20);
        child.regions[0].offset = 12 * MIB;
        child.len = 16 * MIB + u64::from(child.regions[0].len);
        let words = std::mem::take(&mut child.words);
        for (index, word) in words {
            child
                .bytes
                .push((12 * MIB + index * 8, word.to_le_bytes().to_vec()));
        }
        // Sectors 1, 2, 70 and the last of block 2; those of block 0 are not looked at.
        let per_block = MIB / u64::from(sector);
        let bits = [1, 2, 70, per_block - 1].map(|bit| 2 * per_block + bit);
        for bit in bits {
            let byte = DATA + bit / 8;
            let others = bits.iter().filter(|other| *other / 8 == bit / 8);
            let value = others.map(|other| 1 << (other % 8)).sum::<u8>();
            child.bytes.push((byte, vec![value]));
        }
        let mut disk = Disk::of_bytes("vhdx", &parent.to_bytes());
        disk.push_bytes("vhdx", &child.to_bytes());
        let chain = disk.open(Access::Read, WriteOrder::Ordered);
        let mut expected = vec![7; len(4 * MIB)];
        expected[..len(MIB)].fill(1);
        for bit in bits {
            let start = len(bit * u64::from(sector));
            expected[start..start + sector as usize].fill(1);
        }
        assert!(read_all(&chain) == expected, "{sector}");
        drop(chain);
        // Written to, the block is here as a whole.
        let chain = disk.open(Access::Write, WriteOrder::Ordered);
        chain.write_at(&[9; 100], 2 * MIB + 5000).expect("writes");
        expected[len(2 * MIB) + 5000..len(2 * MIB) + 5100].fill(9);
        assert!(read_all(&chain) == expected, "{sector}");
        chain.close().expect("closes");
        drop(chain);
        let chain = disk.open(Access::Read, WriteOrder::Ordered);
        assert!(read_all(&chain) == expected, "{sector}");
        let report = disk.check(Repair::Nothing).expect("checks");
        assert_eq!(report.corruptions, 0, "{report:?}");
    }
}

#[test]
fn what_the_log_holds_is_read_and_the_file_stays_as_it_is() {
    let with = |host: u64| table_page(&[(0, DATA | 6), (1, host | 6)]);
    let page = |byte: u8| vec![byte; 4096];
    let (a, b) = (DATA + MIB, DATA + 2 * MIB);
    let base = || one_block().fill(a, MIB, 2).fill(b, MIB, 3);
    let one = |sequence, tail, host| entry(sequence, tail, &[with(host)]).bytes();
    let two = 8192;
    // The log, what block 1 reads as, and why.
    let cases: Vec<(Ring, u8, &str)> = vec![
        (vec![(0, one(1, 0, a))], 2, "one entry"),
        (
            vec![(0, one(1, 0, a)), (two, one(2, 0, b))],
            3,
            "the later one of two",
        ),
        (
            vec![(0, one(9, 0, b)), (two, one(2, 8192, a))],
            3,
            "the higher number",
        ),
        (
            vec![(0, one(1, 0, a)), (two, one(9, 0, b))],
            2,
            "what does not follow counts not",
        ),
        (
            vec![(0, one(1, 0, b)), (two, entry(2, 8192, &[]).bytes())],
            0,
            "from the tail on",
        ),
        (
            vec![(MIB - 4096, one(u64::MAX - 1, 0xf_f000, a))],
            2,
            "over the end of the ring",
        ),
        (
            vec![(0, entry(4, 0, &[with(a), Change::Zero(BAT, 4096)]).bytes())],
            0,
            "zeroes after a page",
        ),
        (
            vec![(0, entry(4, 0, &[Change::Zero(BAT, 8192), with(b)]).bytes())],
            3,
            "a page after zeroes",
        ),
        (
            vec![(
                0,
                entry(4, 0, &[with(a), Change::Page(a + 4096, page(8))]).bytes(),
            )],
            2,
            "data of the guest too",
        ),
        (
            vec![
                (4096, one(1, 4096, a)),
                (3 * 4096, {
                    let mut torn = one(2, 4096, b);
                    torn[5000] ^= 1;
                    torn
                }),
            ],
            2,
            "what was not written as a whole counts not",
        ),
    ];
    for (log, byte, why) in cases {
        let bytes = base().logged(log).to_bytes();
        let disk = Disk::of_bytes("vhdx", &bytes);
        let chain = disk.open(Access::Read, WriteOrder::Ordered);
        assert!(chain.top().is_dirty());
        let found = read_all(&chain);
        let expected = if byte == 0 && why.starts_with("zeroes") {
            0
        } else {
            found[0]
        };
        assert_eq!(found[0], expected, "{why}");
        assert_eq!(found[len(MIB)], byte, "{why}");
        if why.starts_with("data") {
            assert_eq!(found[len(MIB) + 4096], 8, "{why}");
        }
        drop(chain);
        assert!(
            disk.memory()[0].to_bytes() == bytes,
            "{why}: the file changed"
        );
        // Opened to be written it is replayed in the file, and reads the same.
        let chain = disk.open(Access::Write, WriteOrder::Ordered);
        assert!(!chain.top().is_dirty());
        assert!(read_all(&chain) == found, "{why}");
        chain.write_at(&[0x55; 512], 3 * MIB).expect("writes");
        chain.close().expect("closes");
        drop(chain);
        let chain = disk.open(Access::Read, WriteOrder::Ordered);
        assert!(!chain.top().is_dirty());
        let after = read_all(&chain);
        assert!(after[..len(3 * MIB)] == found[..len(3 * MIB)], "{why}");
        assert_eq!(after[len(3 * MIB)], 0x55);
    }
}

#[test]
fn a_log_that_cannot_be_replayed_is_refused_and_dropped_only_on_demand() {
    let page = table_page(&[(0, DATA | 6), (1, (DATA + MIB) | 6)]);
    let good = entry(1, 0, std::slice::from_ref(&page));
    let other_guid = {
        let mut bytes = good.bytes();
        bytes[32] ^= 1;
        crate::vhdx_made::seal(&mut bytes);
        bytes
    };
    for log in [
        vec![],
        vec![(0, other_guid)],
        vec![(0, entry(0, 0, std::slice::from_ref(&page)).bytes())],
        vec![(0, entry(1, 4096, std::slice::from_ref(&page)).bytes())],
        vec![(0, entry(1, 8191, std::slice::from_ref(&page)).bytes())],
        vec![(0, entry(1, 1 << 20, std::slice::from_ref(&page)).bytes())],
        vec![(0, entry(1, 0, &[Change::Zero(64 << 10, 4096)]).bytes())],
        vec![(0, entry(1, 0, &[Change::Zero(LOG, 4096)]).bytes())],
        vec![(0, entry(1, 0, &[Change::Zero(1 << 63, 4096)]).bytes())],
        vec![(0, entry(1, 0, &[Change::Zero(BAT, 1 << 63)]).bytes())],
        vec![(0, entry(1, 0, &[Change::Zero(BAT + 512, 4096)]).bytes())],
        vec![(
            0,
            Entry {
                len: Some(0),
                ..good.clone()
            }
            .bytes(),
        )],
        vec![(
            0,
            Entry {
                len: Some(u32::MAX),
                ..good.clone()
            }
            .bytes(),
        )],
        vec![(
            0,
            Entry {
                len: Some(1 << 20),
                ..good.clone()
            }
            .bytes(),
        )],
        vec![(
            0,
            Entry {
                len: Some(8191),
                ..good.clone()
            }
            .bytes(),
        )],
        vec![(
            0,
            Entry {
                count: Some(u32::MAX),
                ..good.clone()
            }
            .bytes(),
        )],
        vec![(
            0,
            Entry {
                count: Some(0),
                ..good.clone()
            }
            .bytes(),
        )],
        vec![(512, good.bytes())],
    ] {
        let made = one_block().logged(log);
        refused(&made, ErrorKind::Corrupt, "no entries that go together");
        let disk = Disk::of_bytes("vhdx", &made.to_bytes());
        let report = disk.check(Repair::Nothing).expect("checks");
        assert_eq!(report.corruptions, 1, "{report:?}");
        let report = disk.check(Repair::Leaks).expect("checks");
        assert_eq!(report.corruptions_fixed, 0, "{report:?}");
        let report = disk.check(Repair::All).expect("checks");
        assert_eq!((report.corruptions, report.corruptions_fixed), (0, 1));
        let disk = read_all(&disk.open(Access::Write, WriteOrder::Ordered));
        is_full_of(&disk, 0, 1);
        is_full_of(&disk, 1, 0);
    }
    let mut cut = one_block().logged(vec![(
        0,
        Entry {
            flushed: 13 * MIB,
            ..good.clone()
        }
        .bytes(),
    )]);
    refused(&cut, ErrorKind::Corrupt, "as its log says");
    cut.heads[1].log_version = 1;
    refused(&cut, ErrorKind::Unsupported, "the log's version");
}

#[test]
fn a_log_full_of_beginnings_takes_no_time() {
    // Each sector begins a run of its own.
    let entries = (0..256).map(|n| {
        (
            n * 4096,
            entry(1 + 2 * n, u32::try_from(n * 4096).expect("fits"), &[]).bytes(),
        )
    });
    let bytes = one_block().logged(entries.collect()).to_bytes();
    is_full_of(&read(&bytes), 0, 1);
    // Long entries that lie over each other: only the last one is whole.
    let zero = vec![Change::Zero(12 * MIB, 4096); 30_000];
    let long = entry(1, 0, &zero).bytes();
    let mut log = one_block().logged(vec![(0, long.clone())]);
    log.log
        .extend((1..20).map(|n| (n * 4096, long[..64].to_vec())));
    let error = try_open(&log.to_bytes(), Access::Read);
    drop(error);
    // A log of nothing but numbers at their end.
    let last = entry(u64::MAX, 0, &[]).bytes();
    let bytes = one_block().logged(vec![(0, last)]).to_bytes();
    is_full_of(&read(&bytes), 0, 1);
}

#[test]
fn a_log_makes_the_file_as_long_as_it_says() {
    let page = table_page(&[(0, DATA | 6), (1, (12 * MIB) | 6)]);
    let log = Entry {
        last: 13 * MIB,
        ..entry(1, 0, &[page])
    };
    let bytes = one_block().logged(vec![(0, log.bytes())]).to_bytes();
    let disk = Disk::of_bytes("vhdx", &bytes);
    is_full_of(
        &read_all(&disk.open(Access::Read, WriteOrder::Ordered)),
        1,
        0,
    );
    let report = disk.check(Repair::Nothing).expect("checks");
    assert_eq!(report.corruptions, 0, "{report:?}");
    drop(disk.open(Access::Write, WriteOrder::Ordered));
    assert_eq!(disk.memory()[0].size(), 13 * MIB);
}

#[test]
fn the_later_of_two_headers_counts_and_doubt_is_refused() {
    let state = |made: &Made| {
        let chain = try_open(&made.to_bytes(), Access::Read).expect("opens");
        chain.top().state().expect("has one").to_string()
    };
    let mut made = one_block();
    assert_eq!(state(&made), STATE);
    made.heads[0].sequence = 6;
    assert_ne!(state(&made), STATE);
    made.heads[0].sequence = u64::MAX;
    assert_ne!(state(&made), STATE);
    let error = try_open(&made.to_bytes(), Access::Write).expect("opens");
    let error = error.write_at(&[1; 512], 0).expect_err("no number is left");
    assert!(error.to_string().contains("sequence number"), "{error}");
    made.heads[0] = made.heads[1].clone();
    assert_eq!(state(&made), STATE, "alike");
    made.heads[0].state = UNKNOWN;
    refused(&made, ErrorKind::Corrupt, "differ");
    made.heads[0].sequence = 0;
    made.heads[1].version = 2;
    refused(&made, ErrorKind::Unsupported, "version is 2");
    // One that is damaged does not count, and is written anew.
    let mut made = one_block();
    made.heads[0].sequence = 6;
    let mut bytes = made.to_bytes();
    bytes[(64 << 10) + 5] ^= 1;
    let disk = Disk::of_bytes("vhdx", &bytes);
    let chain = disk.open(Access::Read, WriteOrder::Ordered);
    assert_eq!(chain.top().state().expect("has one").to_string(), STATE);
    drop(chain);
    let report = disk.check(Repair::Leaks).expect("checks");
    assert!(report.findings[0].text.contains("header 1"), "{report:?}");
    let report = disk.check(Repair::Nothing).expect("checks");
    assert!(
        report.findings.iter().all(|f| !f.text.contains("header")),
        "{report:?}"
    );
    bytes[(128 << 10) + 5] ^= 1;
    let error = try_open(&bytes, Access::Read).expect_err("neither counts");
    assert!(error.to_string().contains("neither header"), "{error}");
    for (len, offset) in [
        (0, LOG),
        (1 << 20, 512),
        (4096, LOG),
        (1 << 20, 12 * MIB),
        (u32::MAX, LOG),
    ] {
        let mut made = one_block().logged(vec![]);
        (made.heads[1].log_len, made.heads[1].log_offset) = (len, offset);
        refused(&made, ErrorKind::Corrupt, "the log is at");
    }
}

#[test]
fn regions_that_one_must_know_are_refused_by_name_and_others_kept() {
    let region = |offset: u64, len: u32, flags: u32| Region {
        guid: UNKNOWN,
        offset,
        len,
        flags,
    };
    let with = |region: Region| {
        let mut made = one_block();
        made.regions.push(region);
        made
    };
    refused(
        &with(region(6 * MIB, 1 << 20, 1)),
        ErrorKind::Unsupported,
        UNKNOWN,
    );
    refused(
        &with(region(6 * MIB, 1 << 20, 2)),
        ErrorKind::Unsupported,
        "flags",
    );
    for (offset, len) in [
        (6 * MIB, 0),
        (6 * MIB + 512, 1 << 20),
        (0, 1 << 20),
        (u64::MAX - 4095, 1 << 20),
        (6 * MIB, 4096),
    ] {
        refused(&with(region(offset, len, 0)), ErrorKind::Corrupt, UNKNOWN);
    }
    for offset in [LOG, BAT] {
        refused(
            &with(region(offset, 1 << 20, 0)),
            ErrorKind::Corrupt,
            "overlaps",
        );
    }
    let mut twice = one_block();
    twice.regions.push(Region {
        offset: 7 * MIB,
        ..twice.regions[0].clone()
    });
    refused(&twice, ErrorKind::Corrupt, "the same GUID");
    let mut gone = one_block();
    gone.regions.remove(0);
    refused(&gone, ErrorKind::Corrupt, "names no BAT region");
    let mut far = one_block();
    far.regions[0].offset = 12 * MIB;
    refused(&far, ErrorKind::Corrupt, BAT_REGION);
    // What is optional stays, whatever is written.
    let kept = with(region(5 * MIB, 1 << 20, 0)).fill(5 * MIB, MIB, 0x77);
    let disk = Disk::of_bytes("vhdx", &kept.to_bytes());
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    chain.write_at(&vec![9; len(8 * MIB)], 0).expect("writes");
    chain.resize(700 * (1 << 30)).expect("grows");
    chain.close().expect("closes");
    let bytes = disk.memory()[0].to_bytes();
    assert!(bytes[len(5 * MIB)..len(6 * MIB)].iter().all(|b| *b == 0x77));
    assert_eq!(disk.check(Repair::Nothing).expect("checks").corruptions, 0);
    let table = &bytes[192 << 10..256 << 10];
    assert!(table.windows(16).any(|part| part == guid(UNKNOWN)));
    // Copies that differ are told of, and made alike.
    let mut bytes = one_block().to_bytes();
    bytes[(256 << 10) + 9000] = 1;
    let disk = Disk::of_bytes("vhdx", &bytes);
    assert_eq!(disk.check(Repair::Nothing).expect("checks").corruptions, 1);
    assert_eq!(
        disk.check(Repair::All).expect("checks").corruptions_fixed,
        1
    );
    assert_eq!(disk.check(Repair::Nothing).expect("checks").corruptions, 0);
}

#[test]
fn metadata_that_one_must_know_is_refused_by_name_and_other_items_are_kept() {
    let with = |new| {
        let mut made = one_block();
        made.items.push(new);
        made
    };
    refused(
        &with(item(UNKNOWN, 4, b"x")),
        ErrorKind::Unsupported,
        UNKNOWN,
    );
    refused(&with(item(UNKNOWN, 5, b"x")), ErrorKind::Corrupt, UNKNOWN);
    refused(&with(item(SIZE, 6, &[0; 8])), ErrorKind::Corrupt, "twice");
    refused(
        &with(item(INCOMPLETE, 0, b"x")),
        ErrorKind::Corrupt,
        "never made as a whole",
    );
    for place in [
        (65_535, 8),
        (0, 8),
        (65_536, 0),
        (1 << 20, 8),
        (u32::MAX, u32::MAX),
        (65_536, 2 << 20),
    ] {
        let mut new = item(UNKNOWN, 0, b"12345678");
        new.place = Some(place);
        refused(&with(new), ErrorKind::Corrupt, UNKNOWN);
    }
    let mut over = item(UNKNOWN, 0, b"12345678");
    over.place = Some((65_540, 8));
    refused(&with(over), ErrorKind::Corrupt, "overlap");
    for (name, bytes, says) in [
        (
            PARAMETERS,
            [3 << 20, 0].map(u32::to_le_bytes).concat(),
            "block size",
        ),
        (
            PARAMETERS,
            [512 << 20, 0].map(u32::to_le_bytes).concat(),
            "block size",
        ),
        (
            PARAMETERS,
            [0_u32, 0].map(u32::to_le_bytes).concat(),
            "block size",
        ),
        (PARAMETERS, vec![0; 4], "file parameters has 4 bytes"),
        (SIZE, 0_u64.to_le_bytes().to_vec(), "virtual disk size"),
        (SIZE, 513_u64.to_le_bytes().to_vec(), "virtual disk size"),
        (
            SIZE,
            (65_u64 << 40).to_le_bytes().to_vec(),
            "virtual disk size",
        ),
        (
            SIZE,
            (64_u64 << 40).to_le_bytes().to_vec(),
            "the BAT region has",
        ),
        (
            LOGICAL,
            1024_u32.to_le_bytes().to_vec(),
            "logical sector size",
        ),
    ] {
        let mut made = one_block();
        made.item(name).bytes = bytes;
        refused(&made, ErrorKind::Corrupt, says);
    }
    let mut kept = with(item(UNKNOWN, 1, b"somebody's own"));
    kept.items.push(item(UNKNOWN, 0, b"another's"));
    let disk = Disk::of_bytes("vhdx", &kept.to_bytes());
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    chain.write_at(&[9; 5000], 3 * MIB).expect("writes");
    chain.resize(9 * MIB).expect("grows");
    chain.close().expect("closes");
    let bytes = disk.memory()[0].to_bytes();
    for text in [&b"somebody's own"[..], b"another's"] {
        assert!(
            bytes[len(2 * MIB)..len(3 * MIB)]
                .windows(text.len())
                .any(|part| part == text)
        );
    }
}

fn run(dir: &Path, line: &str) -> assert_cmd::assert::Assert {
    vdtool()
        .current_dir(dir)
        .args(line.split_whitespace())
        .assert()
}

fn said(dir: &Path, code: i32, line: &str) -> String {
    let output = run(dir, line).code(code).get_output().stderr.clone();
    String::from_utf8(output).expect("is text")
}

#[test]
fn a_parent_is_found_by_its_paths_and_known_by_its_state() {
    let home = scratch();
    let dir = home.path();
    std::fs::create_dir(dir.join("sub")).expect("makes one");
    let base = one_block().to_bytes();
    std::fs::write(dir.join("sub/p.vhdx"), &base).expect("writes");
    std::fs::write(dir.join("q.vhdx"), &base).expect("writes");
    let linkage = ("parent_linkage", &*format!("{{{}}}", STATE.to_uppercase()));
    let child = |pairs: &[(&str, &str)]| {
        let pairs = [&[linkage], pairs].concat();
        let bytes = made(8 * MIB, MIB).child(MIB, &pairs).to_bytes();
        std::fs::write(dir.join("c.vhdx"), bytes).expect("writes");
    };
    for pairs in [
        &[("relative_path", r"sub\p.vhdx")][..],
        &[
            ("relative_path", r".\sub\p.vhdx"),
            ("absolute_win32_path", r"\\?\c:\gone.vhdx"),
        ],
        &[
            ("relative_path", r"..\gone\p.vhdx"),
            ("absolute_win32_path", r"\\?\c:\vm\q.vhdx"),
        ],
        &[(
            "volume_path",
            r"\\?\Volume{12345678-0000-0000-0000-000000000000}\vm\q.vhdx",
        )],
    ] {
        child(pairs);
        let line = ["io", "-q", "-c", "read -P 1 0 1M", "c.vhdx"];
        vdtool().current_dir(dir).args(line).assert().success();
    }
    child(&[("relative_path", r"gone\p.vhdx")]);
    assert!(said(dir, 1, "map c.vhdx").contains("--parent"));
    run(dir, "map --parent q.vhdx c.vhdx").success();
    // Another state: its data is another.
    let mut other = one_block();
    other.heads[1].state = UNKNOWN;
    std::fs::write(dir.join("q.vhdx"), other.to_bytes()).expect("writes");
    child(&[("relative_path", "q.vhdx")]);
    assert!(said(dir, 1, "map c.vhdx").contains("changed since"));
    run(dir, "map --parent-changed accept c.vhdx").success();
    // Unless that is the one it is to come to by a merge that goes on.
    let second = format!("{{{UNKNOWN}}}");
    child(&[("relative_path", "q.vhdx"), ("parent_linkage2", &second)]);
    run(dir, "map c.vhdx").success();
    // A log that was not replayed is part of it.
    let page = table_page(&[(0, DATA | 6), (1, DATA | 6)]);
    let dirty = one_block()
        .logged(vec![(0, entry(1, 0, &[page]).bytes())])
        .to_bytes();
    std::fs::write(dir.join("q.vhdx"), &dirty).expect("writes");
    child(&[("relative_path", "q.vhdx")]);
    let line = ["io", "-q", "-c", "read -P 1 1M 1M", "c.vhdx"];
    vdtool().current_dir(dir).args(line).assert().success();
    assert!(std::fs::read(dir.join("q.vhdx")).expect("reads") == dirty);
    // Itself.
    child(&[("relative_path", "c.vhdx")]);
    assert!(said(dir, 1, "map c.vhdx").contains("a cycle"));
    // Sectors of another length.
    std::fs::write(dir.join("q.vhdx"), one_block().sectors(4096).to_bytes()).expect("writes");
    child(&[("relative_path", "q.vhdx")]);
    assert!(said(dir, 1, "map c.vhdx").contains("sectors of 4096"));
}

#[test]
fn a_locator_that_cannot_be_right_is_refused() {
    let child = |item: Vec<u8>| {
        let mut made = made(8 * MIB, MIB).child(MIB, &[]);
        made.item(LOCATOR).bytes = item;
        made
    };
    refused(
        &child(locator(&[("relative_path", "p")])),
        ErrorKind::Corrupt,
        "no parent_linkage",
    );
    let mut other = locator(&[("parent_linkage", "{}")]);
    other[0] ^= 1;
    refused(
        &child(other),
        ErrorKind::Unsupported,
        "parent locator is of type",
    );
    let mut many = locator(&[("parent_linkage", "{}")]);
    many[18..20].copy_from_slice(&[0xff, 0xff]);
    refused(&child(many), ErrorKind::Corrupt, "65535 entries");
    for (at, value) in [(20, 200), (28, 27), (24, 250), (30, 5), (27, 0xff)] {
        let mut item = locator(&[("parent_linkage", "{}")]);
        item[at] = value;
        refused(&child(item), ErrorKind::Corrupt, "parent locator");
    }
    let mut none = made(8 * MIB, MIB);
    none.parameters(MIB, 2);
    refused(&none, ErrorKind::Corrupt, "no parent locator");
}

#[test]
fn a_changed_byte_of_the_metadata_is_an_error_or_harmless() {
    let page = table_page(&[(0, DATA | 6), (1, (DATA + MIB) | 6)]);
    let plain = one_block();
    let logged = one_block().logged(vec![(0, entry(1, 0, &[page]).bytes())]);
    for (name, made) in [("vhdx", plain), ("vhdx with a log", logged)] {
        let sample = Sample::of(name, Disk::of_bytes("vhdx", &made.to_bytes()));
        let mut rng = Seeded::new(name);
        let places = [
            0..4096,
            64 << 10..65_620,
            128 << 10..131_160,
            192 << 10..196_700,
            len(LOG)..len(LOG) + 9000,
            len(2 * MIB)..len(2 * MIB) + 200,
            len(2 * MIB) + 65_536..len(2 * MIB) + 65_600,
            len(BAT)..len(BAT) + 64,
        ];
        for _ in 0..rounds(20) {
            let place = places[rng.usize(0..places.len())].clone();
            let at = rng.usize(place);
            let bit = 1 << rng.u32(0..8);
            let mut bytes = sample.bytes.clone();
            bytes[at] ^= bit;
            sample.exercise(&bytes, Expect::Any, &|| format!("bit {bit:#x} of {at:#x}"));
        }
    }
}

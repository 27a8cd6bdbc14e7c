//! What the checker finds, and what a repair makes of it.

use std::sync::Arc;

use uuid::Uuid;
use vdtool::ErrorKind;
use vdtool::image::check::{Repair, Report};
use vdtool::image::open::{OpenOptions, Purpose, WriteOrder};
use vdtool::storage::Storage;
use vdtool::storage::memory::MemoryStorage;
use vdtool::storage::open::Access;

use super::{BLOCK, chain, check, content, create, dynamic, open, options};

/// Where our tables begin.
const TABLE: u64 = 1536;

/// A disk of eight blocks, each filled with its number plus one.
fn filled() -> Arc<MemoryStorage> {
    let storage = dynamic(8 * BLOCK);
    let disk = chain(&[&storage], WriteOrder::Ordered);
    for block in 0..8u8 {
        let bytes = vec![block + 1; usize::try_from(BLOCK).expect("small")];
        disk.write_at(&bytes, u64::from(block) * BLOCK)
            .expect("writes");
    }
    disk.close().expect("closes");
    storage
}

fn is_intact(storage: &Arc<MemoryStorage>) -> bool {
    let bytes = content(&chain(&[storage], WriteOrder::Ordered));
    let block = usize::try_from(BLOCK).expect("small");
    (0..8u8).all(|b| {
        let at = usize::from(b) * block;
        bytes[at..at + block].iter().all(|x| *x == b + 1)
    })
}

fn word(storage: &MemoryStorage, index: u64) -> u32 {
    let mut bytes = [0; 4];
    storage
        .read_at(&mut bytes, TABLE + index * 4)
        .expect("reads");
    u32::from_be_bytes(bytes)
}

fn set_word(storage: &MemoryStorage, index: u64, word: u32) {
    storage
        .write_at(&word.to_be_bytes(), TABLE + index * 4)
        .expect("writes");
}

fn finds(report: &Report, text: &str) {
    assert!(
        report.findings.iter().any(|f| f.text.contains(text)),
        "no '{text}' in {report:?}"
    );
}

fn checking() -> OpenOptions {
    OpenOptions {
        purpose: Purpose::Check,
        ..options(Access::Read)
    }
}

/// Checks, repairs all, checks again.
fn repaired(storage: &Arc<MemoryStorage>, text: &str) {
    let found = check(storage, Repair::Nothing);
    assert!(found.corruptions > 0, "{found:?}");
    finds(&found, text);
    let fixed = check(storage, Repair::All);
    assert_eq!(fixed.corruptions, 0, "{fixed:?}");
    assert!(fixed.corruptions_fixed > 0, "{fixed:?}");
    check(storage, Repair::Leaks);
    let again = check(storage, Repair::Nothing);
    assert_eq!((again.corruptions, again.leaks), (0, 0), "{again:?}");
}

#[test]
fn a_whole_image_is_clean_and_counted() {
    let report = check(&filled(), Repair::Nothing);
    assert!(report.findings.is_empty(), "{report:?}");
    assert_eq!((report.total_clusters, report.allocated_clusters), (8, 8));
    assert_eq!(report.fragmented_clusters, 0);
}

#[test]
fn a_damaged_footer_is_restored_from_its_copy() {
    for bytes in [[0x55; 512], [0xc7; 512]] {
        let storage = filled();
        storage
            .write_at(&bytes, storage.size() - 512)
            .expect("writes");
        assert!(open(&storage, &options(Access::Read)).is_ok());
        repaired(&storage, "footer at the end");
        assert!(is_intact(&storage));
    }
}

#[test]
fn an_image_that_tapdisk_has_open_takes_no_writes() {
    let storage = filled();
    storage
        .write_at(&[0xc7; 512], storage.size() - 512)
        .expect("writes");
    let error = open(&storage, &options(Access::Write)).expect_err("is in use");
    assert_eq!(error.kind(), ErrorKind::Locked);
}

#[test]
fn a_footer_that_was_cut_off_is_put_back() {
    let storage = filled();
    storage.set_len(storage.size() - 300).expect("cuts");
    repaired(&storage, "footer at the end");
    assert!(is_intact(&storage));
}

#[test]
fn a_damaged_copy_is_written_anew() {
    let storage = filled();
    storage.write_at(&[1], 85).expect("writes");
    repaired(&storage, "copy of the footer");
    assert!(is_intact(&storage));
}

#[test]
fn a_header_whose_checksum_is_wrong_is_reported_and_nothing_is_repaired_by_it() {
    let storage = filled();
    storage.write_at(&[9], 512 + 39).expect("writes");
    let error = open(&storage, &options(Access::Read)).expect_err("is refused");
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    let before = storage.to_bytes();
    let report = check(&storage, Repair::All);
    finds(&report, "header's checksum");
    assert_eq!((report.corruptions, report.corruptions_fixed), (1, 0));
    assert!(storage.to_bytes() == before, "nothing was changed");
}

#[test]
fn blocks_upon_each_other_get_copies_of_their_own() {
    let storage = filled();
    let first = word(&storage, 2);
    set_word(&storage, 5, first);
    let before = content(&chain(&[&storage], WriteOrder::Ordered));
    repaired(&storage, "upon another block");
    assert_ne!(word(&storage, 2), word(&storage, 5));
    assert!(content(&chain(&[&storage], WriteOrder::Ordered)) == before);
}

#[test]
fn a_block_past_the_end_stays_an_error_whatever_is_repaired() {
    let storage = filled();
    set_word(&storage, 3, 0x7f00_0000);
    let report = check(&storage, Repair::All);
    finds(&report, "past the end");
    assert_eq!(report.corruptions, 1, "{report:?}");
    let disk = chain(&[&storage], WriteOrder::Ordered);
    let error = disk
        .read_at(&mut [0; 1], 3 * BLOCK)
        .expect_err("is not there");
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("block 3"), "{error}");
}

#[test]
fn in_a_differencing_disk_a_lost_block_does_not_become_the_parents() {
    let parent = filled();
    let child = create(8 * BLOCK, &["block_size=16k"], Some(Uuid::new_v4()));
    let disk = chain(&[&child, &parent], WriteOrder::Ordered);
    disk.write_at(&[9; 512], 0).expect("writes");
    disk.close().expect("closes");
    set_word(&child, 0, 0x7f00_0000);
    let report = check(&child, Repair::All);
    assert_eq!(report.corruptions, 1, "{report:?}");
    let disk = chain(&[&child, &parent], WriteOrder::Ordered);
    disk.read_at(&mut [0; 1], 0)
        .expect_err("is still not there");
}

#[test]
fn a_truncated_file_is_never_read_as_zeroes() {
    let storage = filled();
    storage
        .set_len(storage.size() - BLOCK - 5000)
        .expect("cuts");
    let disk = chain(&[&storage], WriteOrder::Ordered);
    let bytes = &mut [0; 16];
    disk.read_at(bytes, 0).expect("is there");
    disk.read_at(bytes, 7 * BLOCK).expect_err("is not there");
    let error = disk.write_at(&[1], 7 * BLOCK).expect_err("neither");
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(check(&storage, Repair::Nothing).corruptions >= 2);
}

#[test]
fn unused_space_is_a_leak_and_is_cut_off() {
    let storage = filled();
    let len = storage.size();
    let mut footer = [0; 512];
    storage.read_at(&mut footer, len - 512).expect("reads");
    storage.write_at(&[7; 512], len - 512).expect("writes");
    storage.write_at(&footer, len + 3 * BLOCK).expect("writes");
    let report = check(&storage, Repair::Nothing);
    assert!(report.leaks > 0 && report.corruptions == 0, "{report:?}");
    let report = check(&storage, Repair::Leaks);
    assert!(report.leaks_fixed > 0 && report.leaks == 0, "{report:?}");
    assert_eq!(storage.size(), len);
    assert!(is_intact(&storage));
}

#[test]
fn a_gap_between_blocks_is_a_leak_until_its_space_is_given_back() {
    let storage = filled();
    set_word(&storage, 3, u32::MAX);
    let report = check(&storage, Repair::Nothing);
    assert!(report.leaks > 0 && report.corruptions == 0, "{report:?}");
    check(&storage, Repair::Leaks);
    let report = check(&storage, Repair::Nothing);
    assert_eq!(report.leaks, 0, "{report:?}");
}

#[test]
fn a_fixed_disk_keeps_its_footer_through_repairs() {
    let storage = create(4 * BLOCK, &["subformat=fixed"], None);
    let len = storage.size();
    let mut footer = [0; 512];
    storage.read_at(&mut footer, len - 512).expect("reads");
    footer[85] = 1;
    storage.write_at(&footer, len - 512).expect("writes");
    assert!(open(&storage, &options(Access::Read)).is_err());
    let report = check(&storage, Repair::All);
    assert_eq!(
        (report.corruptions, report.corruptions_fixed),
        (1, 0),
        "{report:?}"
    );
    let mut after = [0; 512];
    storage.read_at(&mut after, len - 512).expect("reads");
    assert_eq!(after, footer, "what may be right is not made to look right");
    footer[85] = 0;
    storage.write_at(&footer, len - 512).expect("writes");
    storage.set_len(len - 1).expect("cuts");
    let report = check(&storage, Repair::All);
    finds(&report, "lacks its last byte");
    assert_eq!(storage.size(), len);
}

#[test]
fn a_511_byte_footer_is_read_and_survives_writing() {
    let storage = filled();
    storage.set_len(storage.size() - 1).expect("cuts");
    assert!(is_intact(&storage));
    let disk = chain(&[&storage], WriteOrder::Ordered);
    disk.resize(20 * BLOCK).expect("grows");
    disk.write_at(&[1; 5000], 15 * BLOCK).expect("writes");
    disk.close().expect("closes");
    let report = check(&storage, Repair::Nothing);
    assert!(report.findings.is_empty(), "{report:?}");
}

#[test]
fn no_changed_byte_of_the_metadata_is_read_as_wrong_data() {
    let size = 8192;
    let storage = create(size, &["block_size=4k"], None);
    let disk = chain(&[&storage], WriteOrder::Ordered);
    disk.write_at(&[5; 8192], 0).expect("writes");
    disk.close().expect("closes");
    let whole = storage.to_bytes();
    // All fields; of text, reserved bytes and data only some.
    let footer = whole.len() - 512;
    let fields = [
        0..100,
        512..580,
        1088..1120,
        1536..1548,
        footer..footer + 100,
    ];
    let rest = (0..whole.len()).step_by(41);
    for at in fields.into_iter().flatten().chain(rest) {
        let mut bytes = whole.clone();
        bytes[at] ^= [0x01, 0x80, 0xff][at % 3];
        let left = Arc::new(MemoryStorage::from_bytes(&bytes));
        let image = open(&left, &options(Access::Read));
        let same_size = image.is_ok_and(|image| image.virtual_size() == size);
        if same_size {
            let disk = chain(&[&left], WriteOrder::Ordered);
            let mut buf = [0; 8192];
            let read = disk.read_at(&mut buf, 0);
            // The format has no checksums over its table, bitmaps and data.
            let table = (1536..2048).contains(&at);
            let block = (2048..whole.len() - 512).contains(&at);
            assert!(
                table || block || (read.is_ok() && buf == [5; 8192]),
                "byte {at:#x}"
            );
        }
        if let Ok(image) = open(&left, &checking()) {
            let checker = image.as_check().expect("can be checked");
            checker
                .check(Repair::Nothing, &vdtool::util::progress::Silent)
                .expect("the host is well");
        }
    }
}

#[test]
fn no_cut_file_is_read_as_other_data() {
    let whole = filled().to_bytes();
    for len in (0..whole.len()).step_by(333) {
        let left = Arc::new(MemoryStorage::from_bytes(&whole[..len]));
        if open(&left, &options(Access::Read)).is_err() {
            continue;
        }
        let disk = chain(&[&left], WriteOrder::Ordered);
        for block in 0..8u8 {
            let mut byte = [0];
            let at = u64::from(block) * BLOCK + 77;
            if disk.read_at(&mut byte, at).is_ok() {
                assert_eq!(byte[0], block + 1, "length {len}");
            }
        }
        check(&left, Repair::Nothing);
    }
}

#[test]
fn a_damaged_footer_behind_unused_space_is_mended_in_one_run() {
    let storage = filled();
    let end = storage.size() - 512;
    storage.write_at(&[0; 512], end).expect("writes");
    storage.write_at(&[3; 3 << 16], end).expect("writes");
    let fixed = check(&storage, Repair::All);
    finds(&fixed, "footer at the end");
    finds(&fixed, "belong to nothing");
    assert_eq!((fixed.corruptions, fixed.leaks), (0, 0), "{fixed:?}");
    let again = check(&storage, Repair::All);
    assert!(again.findings.is_empty(), "{again:?}");
    assert!(is_intact(&storage));
}

#[test]
fn a_block_whose_bitmap_hides_its_data_is_mentioned() {
    let storage = filled();
    let host = u64::from(word(&storage, 3)) * 512;
    storage.write_at(&[0; 512], host).expect("writes");
    let report = check(&storage, Repair::Nothing);
    finds(&report, "block 3: its bitmap");
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
    let zeroes = vec![0; usize::try_from(BLOCK).expect("small")];
    storage.write_at(&zeroes, host + 512).expect("writes");
    let report = check(&storage, Repair::Nothing);
    assert!(report.findings.is_empty(), "no data is hidden: {report:?}");
}

#[test]
fn a_batmap_that_is_lost_with_its_footer_is_named() {
    let storage = filled();
    let mut copy = vec![0; 512];
    storage.read_at(&mut copy, 0).expect("reads");
    copy[28..36].copy_from_slice(b"tap\0\0\x01\0\x03");
    crate::mutate::put_checksum(&mut copy, 64);
    storage.write_at(&copy, 0).expect("writes");
    repaired(&storage, "XenServer's batmap is lost");
    assert!(is_intact(&storage));
}

//! Changes of size.

use std::sync::Arc;

use uuid::Uuid;
use vdtool::ErrorKind;
use vdtool::chain::Chain;
use vdtool::image::check::Repair;
use vdtool::image::open::WriteOrder;
use vdtool::storage::Storage;
use vdtool::storage::memory::{Fault, MemoryStorage, Op};
use vdtool::storage::open::Access;

use super::{BLOCK, chain, check, content, create, dynamic, open, options};
use crate::util::len;

fn size_of(storage: &Arc<MemoryStorage>) -> u64 {
    open(storage, &options(Access::Read))
        .expect("opens")
        .virtual_size()
}

fn clean(storage: &Arc<MemoryStorage>) {
    let report = check(storage, Repair::Nothing);
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
}

fn fill(chain: &Chain, byte: u8) {
    let len = usize::try_from(chain.virtual_size()).expect("small");
    chain.write_at(&vec![byte; len], 0).expect("writes");
}

#[test]
fn a_dynamic_disk_grows_with_and_without_room_behind_its_table() {
    for (start, written) in [
        (3 * BLOCK, true),
        (3 * BLOCK, false),
        (3 * BLOCK + 512, true),
    ] {
        let storage = dynamic(start);
        let disk = chain(&[&storage], WriteOrder::Ordered);
        if written {
            fill(&disk, 7);
        }
        // 128 words fill a sector, so the last of these needs more table than there is.
        let mut size = start;
        for blocks in [4, 100, 127, 128, 129, 5000] {
            size = blocks * BLOCK - 512;
            disk.resize(size).expect("grows");
            assert_eq!(disk.virtual_size(), size);
        }
        disk.write_at(&[9; 1000], size - 1000)
            .expect("writes at the new end");
        disk.close().expect("closes");
        let bytes = content(&chain(&[&storage], WriteOrder::Ordered));
        let (old, new) = bytes.split_at(usize::try_from(start).expect("small"));
        assert!(old.iter().all(|b| *b == if written { 7 } else { 0 }));
        let (zero, last) = new.split_at(new.len() - 1000);
        assert!(zero.iter().all(|b| *b == 0));
        assert!(last.iter().all(|b| *b == 9));
        clean(&storage);
    }
}

#[test]
fn what_was_cut_off_reads_as_zeroes_when_the_disk_grows_again() {
    for texts in [&["block_size=16k"][..], &["subformat=fixed"]] {
        let storage = create(8 * BLOCK, texts, None);
        let disk = chain(&[&storage], WriteOrder::Ordered);
        fill(&disk, 5);
        disk.resize(2 * BLOCK + 1024).expect("shrinks");
        disk.resize(6 * BLOCK).expect("grows");
        disk.close().expect("closes");
        let bytes = content(&disk);
        let (kept, new) = bytes.split_at(usize::try_from(2 * BLOCK + 1024).expect("small"));
        assert!(kept.iter().all(|b| *b == 5));
        assert!(new.iter().all(|b| *b == 0), "{texts:?}");
        clean(&storage);
    }
}

#[test]
fn shrinking_gives_the_space_back() {
    let storage = dynamic(64 * BLOCK);
    let disk = chain(&[&storage], WriteOrder::Ordered);
    fill(&disk, 5);
    disk.flush().expect("flushes");
    let full = storage.size();
    disk.resize(BLOCK).expect("shrinks");
    disk.close().expect("closes");
    assert!(storage.size() < full / 16, "{} of {full}", storage.size());
    clean(&storage);
}

#[test]
fn what_a_longer_parent_holds_does_not_show_in_new_bytes() {
    let parent = dynamic(8 * BLOCK);
    fill(&chain(&[&parent], WriteOrder::Ordered), 3);
    let child = create(BLOCK + 512, &["block_size=16k"], Some(Uuid::new_v4()));
    let disk = chain(&[&child, &parent], WriteOrder::Ordered);
    disk.write_at(&[4; 100], BLOCK).expect("writes");
    disk.resize(12 * BLOCK).expect("grows");
    disk.close().expect("closes");
    let bytes = content(&chain(&[&child, &parent], WriteOrder::Ordered));
    let at = usize::try_from(BLOCK).expect("small");
    assert!(bytes[..at].iter().all(|b| *b == 3));
    assert!(bytes[at..at + 100].iter().all(|b| *b == 4));
    assert!(bytes[at + 100..at + 512].iter().all(|b| *b == 3));
    assert!(bytes[at + 512..].iter().all(|b| *b == 0));
    clean(&child);
    let alone = chain(&[&child], WriteOrder::Ordered);
    drop(alone);
}

#[test]
fn sizes_that_cannot_be_are_refused_and_change_nothing() {
    let storage = dynamic(BLOCK);
    let disk = chain(&[&storage], WriteOrder::Ordered);
    for (size, kind) in [
        (BLOCK + 1, ErrorKind::Invalid),
        ((2040 << 30) + 512, ErrorKind::OutOfRange),
        (u64::MAX - 511, ErrorKind::OutOfRange),
    ] {
        assert_eq!(disk.resize(size).expect_err("is refused").kind(), kind);
        assert_eq!(size_of(&storage), BLOCK);
    }
}

#[test]
fn every_crash_while_resizing_leaves_one_size_or_the_other_and_all_data() {
    for texts in [&["block_size=16k"][..], &["subformat=fixed"]] {
        for (from, to) in [
            (3 * BLOCK, 200 * BLOCK),
            (20 * BLOCK, 2 * BLOCK + 512),
            (BLOCK, BLOCK + 512),
        ] {
            let storage = create(from, texts, None);
            let disk = chain(&[&storage], WriteOrder::Ordered);
            fill(&disk, 6);
            disk.flush().expect("flushes");
            let before = storage.to_bytes();
            storage.record();
            disk.resize(to).expect("resizes");
            disk.close().expect("closes");
            let changes = storage.changes();
            for prefix in 0..=changes.len() {
                let left = Arc::new(MemoryStorage::from_bytes(&before));
                changes[..prefix].iter().for_each(|c| left.apply(c));
                let size = size_of(&left);
                assert!(size == from || size == to, "prefix {prefix}: {size}");
                let kept = usize::try_from(from.min(to)).expect("small");
                let bytes = content(&chain(&[&left], WriteOrder::Ordered));
                assert!(bytes[..kept].iter().all(|b| *b == 6), "prefix {prefix}");
                check(&left, Repair::All);
                clean(&left);
                let bytes = content(&chain(&[&left], WriteOrder::Ordered));
                assert!(bytes[..kept].iter().all(|b| *b == 6), "prefix {prefix}");
            }
        }
    }
}

#[test]
fn a_resize_that_fails_leaves_no_leak_before_the_header_is_written() {
    let (mut failed, mut leaking, mut grown, mut done_at_once) = (0, 0, 0, 0);
    for after in 0.. {
        let storage = dynamic(3 * BLOCK);
        let disk = chain(&[&storage], WriteOrder::Ordered);
        fill(&disk, 7);
        disk.close().expect("closes");
        let full = Fault {
            op: Op::Change,
            after,
            count: 1,
            errno: rustix::io::Errno::NOSPC.raw_os_error(),
        };
        storage.inject(full);
        let done = disk.resize(5000 * BLOCK);
        storage.heal();
        if done.is_ok() {
            // Erasing the old table may fail; behind the last change nothing does.
            done_at_once += 1;
            if done_at_once > 1 {
                break;
            }
            continue;
        }
        failed += 1;
        // Once the footer at the end says so, the disk has its size, whatever becomes of the copy.
        grown += u64::from(disk.virtual_size() != 3 * BLOCK);
        disk.close().expect("closes");
        let report = check(&storage, Repair::Nothing);
        assert_eq!(report.corruptions, 0, "{after}: {report:?}");
        leaking += u64::from(report.leaks > 0);
        let bytes = content(&chain(&[&storage], WriteOrder::Ordered));
        let (old, new) = bytes.split_at(usize::try_from(3 * BLOCK).expect("small"));
        assert!(old.iter().all(|b| *b == 7), "{after}");
        assert!(new.iter().all(|b| *b == 0), "{after}");
    }
    assert!(failed > 5 && grown <= 1, "{failed}, {grown}");
    // A header write that fails may have reached the medium: then the new table must stay.
    assert!(leaking <= 1, "{leaking} of {failed}");
}

#[test]
fn a_fixed_disk_with_slack_before_its_footer_resizes_to_any_size_and_keeps_no_slack() {
    let (data, slack) = (8 * BLOCK, 2 * BLOCK);
    let sizes = [
        data - BLOCK,
        data + BLOCK,
        data + slack - 512,
        data + slack,
        data + slack + 512,
        data + slack + 1024,
        data + 2 * slack,
    ];
    for size in sizes {
        let storage = create(data, &["subformat=fixed"], None);
        let mut bytes = storage.to_bytes();
        let footer = bytes.split_off(len(data));
        bytes.fill(7);
        // What is there is nobody's, and must not show.
        bytes.resize(len(data + slack), 0x11);
        bytes.extend(footer);
        let storage = Arc::new(MemoryStorage::from_bytes(&bytes));
        let disk = chain(&[&storage], WriteOrder::Ordered);
        assert_eq!(disk.virtual_size(), data);
        disk.resize(size).expect("resizes");
        disk.close().expect("closes");
        let found = content(&disk);
        let kept = len(size.min(data));
        assert!(found[..kept].iter().all(|b| *b == 7), "{size}");
        assert!(found[kept..].iter().all(|b| *b == 0), "{size}");
        assert_eq!(storage.size(), size + 512, "{size}");
        clean(&storage);
    }
}

/// Says in both footers that the disk has `size` bytes, and nothing else.
fn say_size(storage: &MemoryStorage, size: u64) {
    for at in [0, storage.size() - 512] {
        let mut footer = [0; 512];
        storage.read_at(&mut footer, at).expect("reads");
        footer[48..56].copy_from_slice(&size.to_be_bytes());
        footer[64..68].fill(0);
        let sum: u32 = footer.iter().map(|b| u32::from(*b)).sum();
        footer[64..68].copy_from_slice(&(!sum).to_be_bytes());
        storage.write_at(&footer, at).expect("writes");
    }
}

#[test]
fn blocks_behind_the_end_of_the_disk_never_show_and_go_when_it_grows() {
    // With room in the table for the new size, and without.
    for blocks in [8, 500] {
        let storage = dynamic(8 * BLOCK);
        let disk = chain(&[&storage], WriteOrder::Ordered);
        fill(&disk, 6);
        disk.close().expect("closes");
        say_size(&storage, 6 * BLOCK);
        let disk = chain(&[&storage], WriteOrder::Ordered);
        disk.resize(blocks * BLOCK).expect("grows");
        let bytes = content(&disk);
        let (old, new) = bytes.split_at(len(6 * BLOCK));
        assert!(old.iter().all(|b| *b == 6), "{blocks}");
        assert!(new.iter().all(|b| *b == 0), "{blocks}");
        disk.close().expect("closes");
        clean(&storage);
    }
}

//! Bugs that were found once, each named by what happened.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use vdtool::image::check::Repair;
use vdtool::image::open::WriteOrder;
use vdtool::storage::Storage;
use vdtool::storage::open::{Access, StorageOptions, open};

use crate::layers::{Disk, LayerSpec, Place, read_all};
use crate::util::{Seeded, scratch};

/// Children that another thread was just starting held a duplicate of the descriptor, and with it
/// the locks of a file that was closed.
#[test]
fn a_file_that_was_closed_stayed_locked_while_a_process_was_started() {
    let directory = scratch();
    let path = directory.path().join("a.raw");
    std::fs::write(&path, [0; 4096]).expect("writes");
    let stop = AtomicBool::new(false);
    let options = StorageOptions {
        access: Access::Write,
        ..StorageOptions::default()
    };
    let failure = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let status = Command::new("true").stdin(Stdio::null()).status();
                assert!(status.is_ok_and(|s| s.success()));
            }
        });
        let failure = (0..4000).find_map(|_| open(&path, &options).err());
        stop.store(true, Ordering::Relaxed);
        failure
    });
    assert!(failure.is_none(), "{failure:?}");
}

/// A file was cut where its first-level table begins; the repair did not see that the table was
/// missing, and put new refcounts there, which then passed for the table.
#[test]
fn a_first_level_table_behind_the_end_of_a_cut_file_was_made_the_place_of_new_refcounts() {
    for cut in [0, 4] {
        let spec = LayerSpec {
            format: "qcow2",
            options: "cluster_size=4k",
            size: 100 << 10,
        };
        let disk = Disk::create(Place::Memory, &[spec]);
        let mut bytes = disk.memory()[0].to_bytes();
        let word = |bytes: &[u8], at: usize| {
            let word: [u8; 8] = bytes[at..at + 8].try_into().expect("eight bytes");
            usize::try_from(u64::from_be_bytes(word)).expect("small")
        };
        let (l1, refcounts) = (word(&bytes, 40), word(&bytes, 48));
        bytes[refcounts..refcounts + 4096].fill(1);
        bytes.truncate(l1 + cut);
        let disk = Disk::of_bytes("qcow2", &bytes);
        let report = disk.check(Repair::All).expect("has a check");
        assert!(report.corruptions > 0, "nobody opens it: {report:?}");
        assert!(
            disk.memory()[0].to_bytes().len() <= l1 + cut,
            "it did not grow"
        );
    }
}

/// The new place of the footer overlapped the old one, so the footer went further and the repair
/// left more behind than it had found.
#[test]
fn a_repair_of_a_few_lost_bytes_in_a_fixed_vhd_lost_a_thousand() {
    for extra in [18, 300, 512, 1024, 1500] {
        let spec = LayerSpec {
            format: "vhd",
            options: "subformat=fixed",
            size: 100 << 10,
        };
        let disk = Disk::create(Place::Memory, &[spec]);
        let mut bytes = disk.memory()[0].to_bytes();
        let footer = bytes.split_off(bytes.len() - 512);
        let end = bytes.len();
        bytes.resize(end + extra, 7);
        bytes.extend(footer);
        let disk = Disk::of_bytes("vhd", &bytes);
        let report = disk.check(Repair::Leaks).expect("has a check");
        assert_eq!((report.leaks, report.leaks_fixed), (0, 1), "{extra}");
        let again = disk.check(Repair::Nothing).expect("has a check");
        assert_eq!(again.leaks, 0, "{extra}: {again:?}");
        assert_eq!(disk.memory()[0].to_bytes().len(), end + 512, "{extra}");
    }
}

/// The last block of the file was freed, the end of the used space was looked for only then, and
/// two blocks got the same space: one from the list of freed blocks, one at that end.
#[test]
fn two_blocks_got_the_space_of_the_last_one_that_was_freed() {
    let spec = LayerSpec {
        format: "vhd",
        options: "block_size=64k",
        size: 4 << 16,
    };
    let disk = Disk::create(Place::Memory, &[spec]);
    let block = |index: u64| index << 16..(index + 1) << 16;
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    chain.write_at(&[1; 1 << 16], 0).expect("writes");
    chain.close().expect("closes");
    drop(chain);
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    chain.discard(block(0)).expect("discards");
    chain.flush().expect("flushes");
    chain
        .write_at(&[2; 1 << 16], block(1).start)
        .expect("writes");
    chain
        .write_at(&[3; 1 << 16], block(2).start)
        .expect("writes");
    let found = read_all(&chain);
    assert!(found[1 << 16..2 << 16].iter().all(|b| *b == 2));
    assert!(found[2 << 16..3 << 16].iter().all(|b| *b == 3));
}

#[test]
fn a_cluster_in_use_that_is_counted_as_free_is_not_given_to_another() {
    let spec = LayerSpec {
        format: "qcow2",
        options: "cluster_size=512",
        size: 256 << 10,
    };
    for snapshot in [false, true] {
        let disk = Disk::create(Place::Memory, &[spec]);
        let mut chain = disk.open(Access::Write, WriteOrder::Ordered);
        let bytes = Seeded::new("counted as free").bytes(20 << 10);
        chain.write_at(&bytes, 0).expect("writes");
        if snapshot {
            let snapshots = chain.top_mut().as_snapshots().expect("has some");
            let now = std::time::SystemTime::UNIX_EPOCH;
            snapshots.create("kept".as_ref(), now).expect("creates");
            chain.discard(0..20 << 10).expect("discards");
        }
        chain.close().expect("closes");
        let storage = disk.memory().remove(0);
        let image = storage.to_bytes();
        // The counts of all clusters that hold the data are 0.
        let word = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().expect("eight"));
        let host = |at: usize| usize::try_from(word(at) & 0x00ff_ffff_ffff_fe00).expect("small");
        let l1 = match snapshot {
            false => host(40),
            true => host(host(64)),
        };
        let counts = host(host(48));
        for index in 0..40 {
            let cluster = host(host(l1) + index * 8) / 512;
            storage
                .write_at(&[0, 0], (counts + cluster * 2) as u64)
                .expect("writes");
        }
        drop(chain);
        let mut chain = disk.open(Access::Write, WriteOrder::Ordered);
        chain.write_at(&[1; 100 << 10], 64 << 10).expect("writes");
        if snapshot {
            let snapshots = chain.top_mut().as_snapshots().expect("has some");
            let pick = vdtool::image::snapshot::Pick::Any("kept".into());
            snapshots.apply(&pick).expect("is there");
        } else {
            chain.flush().expect("flushes");
        }
        let mut found = vec![0; bytes.len()];
        chain.read_at(&mut found, 0).expect("reads");
        assert!(found == bytes, "was overwritten (snapshot: {snapshot})");
    }
}

#[test]
fn a_snapshot_is_not_put_where_a_cluster_in_use_is_counted_as_free() {
    let spec = LayerSpec {
        format: "qcow2",
        options: "cluster_size=512",
        size: 64 << 10,
    };
    let disk = Disk::create(Place::Memory, &[spec]);
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    let bytes = Seeded::new("no room for a snapshot").bytes(20 << 10);
    chain.write_at(&bytes, 0).expect("writes");
    chain.close().expect("closes");
    drop(chain);
    let storage = disk.memory().remove(0);
    let image = storage.to_bytes();
    let word = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().expect("eight"));
    let host = |at: usize| usize::try_from(word(at) & 0x00ff_ffff_ffff_fe00).expect("small");
    let (l1, counts) = (host(40), host(host(48)));
    for index in 0..40 {
        let cluster = host(host(l1) + index * 8) / 512;
        let at = (counts + cluster * 2) as u64;
        storage.write_at(&[0, 0], at).expect("writes");
    }
    let mut chain = disk.open(Access::Write, WriteOrder::Ordered);
    let snapshots = chain.top_mut().as_snapshots().expect("has some");
    let now = std::time::SystemTime::UNIX_EPOCH;
    snapshots.create("kept".as_ref(), now).expect("creates");
    // Each is named twice now: what the disk lets go of is still the snapshot's.
    chain.write_at(&[1; 20 << 10], 0).expect("writes");
    chain.flush().expect("flushes");
    let snapshots = chain.top_mut().as_snapshots().expect("has some");
    let pick = vdtool::image::snapshot::Pick::Any("kept".into());
    snapshots.apply(&pick).expect("is there");
    let mut found = vec![0; bytes.len()];
    chain.read_at(&mut found, 0).expect("reads");
    assert!(found == bytes, "was overwritten");
}

//! Clusters that hold something and must move before they change: few syncs, nothing lost, nothing
//! left behind.

use std::sync::Arc;
use std::time::SystemTime;

use vdtool::chain::Chain;
use vdtool::image::check::Repair;
use vdtool::image::open::{OpenOptions, WriteOrder};
use vdtool::image::snapshot::Pick;
use vdtool::storage::Storage;
use vdtool::storage::memory::{Change, Fault, MemoryStorage, Op};
use vdtool::storage::open::Access;

use crate::layers::{Disk, LayerSpec, Place, read_all};
use crate::util::{assert_same, len};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;

fn spec(format: &'static str, options: &'static str, size: u64) -> LayerSpec {
    LayerSpec {
        format,
        options,
        size,
    }
}

/// A disk whose every byte is there and must move before it changes.
fn full(top: LayerSpec, below: Option<LayerSpec>, how: &str) -> Disk {
    let specs: Vec<LayerSpec> = below.into_iter().collect();
    let mut disk = Disk::create(Place::Memory, &specs);
    if below.is_none() {
        disk.push(&top);
    }
    let mut chain = disk.open(Access::Write, WriteOrder::Unordered);
    let bytes = vec![1; len(chain.virtual_size().min(4 * MIB))];
    for at in (0..chain.virtual_size()).step_by(bytes.len()) {
        match how {
            "compressed" => chain.write_compressed(&bytes, at).expect("compresses"),
            _ => chain.write_at(&bytes, at).expect("writes"),
        }
    }
    if how == "snapshot" {
        let snapshots = chain.top_mut().as_snapshots().expect("has some");
        snapshots
            .create("kept".as_ref(), SystemTime::UNIX_EPOCH)
            .expect("has room");
    }
    chain.flush().expect("flushes");
    chain.close().expect("closes");
    if below.is_some() {
        disk.push(&top);
    }
    disk
}

fn syncs(top: &MemoryStorage) -> usize {
    let changes = top.changes();
    changes.iter().filter(|c| **c == Change::Sync).count()
}

/// Overwrites the disk by requests of `step` bytes; how many syncs that takes.
fn overwrite(disk: &Disk, step: u64, order: &str) -> usize {
    let top = Arc::clone(&disk.memory()[0]);
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    top.record();
    let bytes = vec![2; len(step)];
    let mut starts: Vec<u64> = (0..SIZE).step_by(len(step)).collect();
    if order == "backwards" {
        starts.reverse();
    }
    for at in starts {
        let bytes = &bytes[..len(step.min(SIZE - at))];
        chain.write_at(bytes, at).expect("writes");
    }
    let made = syncs(&top);
    chain.close().expect("closes");
    drop(chain);
    let chain = disk.open(Access::Read, WriteOrder::Ordered);
    assert!(read_all(&chain).iter().all(|b| *b == 2), "{step}: content");
    let report = disk.check(Repair::Nothing).expect("checks");
    assert_eq!((report.leaks, report.corruptions), (0, 0), "{step}");
    made
}

/// What a snapshot reads as.
fn read_snapshot(disk: &Disk, bytes: &[u8], size: u64) -> Vec<u8> {
    let options = OpenOptions {
        snapshot: Some(Pick::Any("kept".into())),
        ..OpenOptions::default()
    };
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes(bytes));
    let image = (disk.driver().open)(storage, &options).expect("opens");
    let chain = Chain::new(vec![image], vdtool::chain::Base::Zeroes, options.grace);
    let mut found = vec![0; len(size)];
    chain
        .expect("has a layer")
        .read_at(&mut found, 0)
        .expect("reads");
    found
}

#[test]
fn clusters_that_a_snapshot_shares_are_overwritten_by_few_syncs() {
    for (options, step, order, most) in [
        ("", 64 << 10, "forwards", 10),
        ("", 64 << 10, "backwards", 10),
        ("", MIB, "forwards", 10),
        ("", 16 * MIB, "forwards", 4),
        // Each second-level table has 2 MiB.
        ("cluster_size=4k", MIB, "forwards", 10),
        ("cluster_size=4k", 64 << 10, "backwards", 10),
        ("extended_l2=on", 100 << 10, "forwards", 10),
    ] {
        let disk = full(spec("qcow2", options, SIZE), None, "snapshot");
        let made = overwrite(&disk, step, order);
        assert!(made <= most, "{options} {step} {order}: {made} syncs");
        let bytes = disk.memory()[0].to_bytes();
        let kept = read_snapshot(&disk, &bytes, SIZE);
        assert!(kept.iter().all(|b| *b == 1), "{options}: the snapshot");
    }
}

#[test]
fn clusters_of_the_layer_below_are_overwritten_by_few_syncs() {
    for (top, options, below, most) in [
        ("qcow2", "", "raw", 10),
        ("qcow2", "extended_l2=on", "qcow2", 10),
        ("vhd", "", "vhd", 10),
        // The footer moves more often: every fifteen blocks.
        ("vhd", "block_size=512k", "raw", 18),
    ] {
        for step in [64 << 10, MIB, 16 * MIB] {
            let top = spec(top, options, SIZE);
            let disk = full(top, Some(spec(below, "", SIZE)), "");
            let made = overwrite(&disk, step, "forwards");
            assert!(made <= most, "{top:?} {step}: {made} syncs");
        }
    }
}

#[test]
fn compressed_clusters_are_overwritten_by_few_syncs() {
    for step in [64 << 10, 16 * MIB] {
        let disk = full(spec("qcow2", "", SIZE), None, "compressed");
        let made = overwrite(&disk, step, "forwards");
        assert!(made <= 10, "{step}: {made} syncs");
    }
}

#[test]
fn each_further_8_mib_cost_one_more_sync_at_most_the_close_counted() {
    let raw = spec("raw", "", SIZE);
    for (top, below, how) in [
        (spec("qcow2", "", SIZE), None, "snapshot"),
        (spec("qcow2", "cluster_size=4k", SIZE), None, "snapshot"),
        (spec("qcow2", "", SIZE), None, "compressed"),
        (spec("qcow2", "cluster_size=4k", SIZE), Some(raw), ""),
        (spec("vhd", "", SIZE), Some(raw), ""),
    ] {
        for mib in [1, 8, 16, 64] {
            let disk = full(top, below, how);
            let chain = disk.open(Access::Write, WriteOrder::Ordered);
            disk.memory()[0].record();
            chain.write_at(&vec![2; len(mib * MIB)], 0).expect("writes");
            chain.close().expect("closes");
            let made = syncs(&disk.memory()[0]);
            // The footer of a VHD moves first.
            let most = 2 + mib.max(if top.format == "vhd" { 8 } else { 0 }) / 8;
            assert!(
                made <= len(most),
                "{top:?} {how}: {made} syncs for {mib} MiB"
            );
        }
    }
}

#[test]
fn threads_that_overwrite_what_is_shared_lose_nothing_to_each_other() {
    const LEN: u64 = 2 * MIB;
    const STRIPE: usize = 1700;
    for options in ["cluster_size=4k", "cluster_size=512", "extended_l2=on", ""] {
        for how in ["snapshot", "compressed"] {
            let disk = full(spec("qcow2", options, LEN), None, how);
            let chain = disk.open(Access::Write, WriteOrder::Ordered);
            let stripes = len(LEN) / STRIPE;
            std::thread::scope(|scope| {
                for thread in 0..4 {
                    let chain = &chain;
                    scope.spawn(move || {
                        for stripe in (thread..stripes).step_by(4) {
                            // Two go forwards, two backwards.
                            let stripe = match thread % 2 {
                                0 => stripe,
                                _ => stripes / 4 * 4 + 2 * thread - stripe,
                            };
                            if stripe >= stripes {
                                continue;
                            }
                            let bytes = [100 + u8::try_from(thread).expect("small"); STRIPE];
                            let at = (stripe * STRIPE) as u64;
                            chain.write_at(&bytes, at).expect("writes");
                            let mut found = [0; STRIPE];
                            chain.read_at(&mut found, at).expect("reads");
                            assert!(found == bytes, "{options} {how}: {stripe}");
                        }
                    });
                }
            });
            chain.close().expect("closes");
            let bytes = read_all(&chain);
            for (stripe, found) in bytes.chunks(STRIPE).enumerate().take(stripes) {
                let thread = 100 + u8::try_from(stripe % 4).expect("small");
                let old_or_new = |b: &u8| *b == found[0] && (*b == 1 || *b == thread);
                assert!(found.iter().all(old_or_new), "{options} {how}: {stripe}");
            }
            drop(chain);
            let report = disk.check(Repair::Nothing).expect("checks");
            assert_eq!((report.leaks, report.corruptions), (0, 0), "{options}");
            if how == "snapshot" {
                let kept = read_snapshot(&disk, &disk.memory()[0].to_bytes(), LEN);
                assert!(kept.iter().all(|b| *b == 1), "{options}: the snapshot");
            }
        }
    }
}

#[test]
fn who_writes_here_and_there_has_no_more_copied_than_a_cluster_each() {
    let disk = full(spec("qcow2", "", SIZE), None, "snapshot");
    let top = Arc::clone(&disk.memory()[0]);
    let before = top.size();
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    for round in 0..16 {
        chain
            .write_at(&[3; 512], (round * 7 % 16) * 4 * MIB)
            .expect("writes");
    }
    // And a second-level table.
    assert!(top.size() <= before + (17 << 16), "{}", top.size() - before);
}

#[test]
fn copying_what_was_not_asked_for_may_fail() {
    for top in ["qcow2", "vhd"] {
        let disk = full(spec(top, "", 8 * MIB), Some(spec("raw", "", 8 * MIB)), "");
        let chain = disk.open(Access::Write, WriteOrder::Ordered);
        chain.write_at(&vec![2; 64 << 10], 0).expect("writes");
        disk.memory()[1].inject(Fault {
            op: Op::Read,
            after: 0,
            count: usize::MAX,
            errno: libc::EIO,
        });
        for unit in 1..20u64 {
            chain
                .write_at(&vec![2; 64 << 10], unit << 16)
                .expect("needs nothing of the layer below");
        }
        chain
            .write_at(&[2; 100], 40 << 16)
            .expect_err("needs the rest of a cluster");
        disk.memory()[1].heal();
        let found = read_all(&chain);
        let mut wanted = vec![1; len(8 * MIB)];
        wanted[..20 << 16].fill(2);
        assert_same(&found, &wanted, 0, top);
        chain.close().expect("closes");
        let report = disk.check(Repair::Nothing).expect("checks");
        assert_eq!((report.leaks, report.corruptions), (0, 0), "{top}");
    }
}

#[test]
fn a_full_host_takes_what_was_asked_for_where_it_has_no_room_for_more() {
    let disk = full(spec("qcow2", "", 8 * MIB), None, "snapshot");
    let top = Arc::clone(&disk.memory()[0]);
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    chain.write_at(&[2; 100], 0).expect("writes");
    // Counts of two runs, then both parts of the cluster asked for; not those that come next.
    top.inject(Fault {
        op: Op::Change,
        after: 4,
        count: 1,
        errno: libc::ENOSPC,
    });
    chain.write_at(&[2; 100], 1 << 16).expect("writes");
    top.heal();
    let mut wanted = vec![1; len(8 * MIB)];
    wanted[..100].fill(2);
    wanted[1 << 16..(1 << 16) + 100].fill(2);
    assert_same(&read_all(&chain), &wanted, 0, "after a full host");
    chain.close().expect("closes");
    let report = disk.check(Repair::Nothing).expect("checks");
    assert_eq!((report.leaks, report.corruptions), (0, 0));
}

/// Bytes of an object that take space.
pub(crate) fn allocated(storage: &MemoryStorage) -> u64 {
    let (mut at, mut sum) = (0, 0);
    while at < storage.size() {
        let run = storage.run(at, storage.size() - at).expect("memory");
        sum += if run.data { run.len } else { 0 };
        at += run.len;
    }
    sum
}

#[test]
fn a_discard_above_another_image_gives_space_back_and_shows_nothing_of_it() {
    const LEN: u64 = 16 * MIB;
    for options in ["", "extended_l2=on", "compat=0.10", "compressed"] {
        let layer = match options {
            "compressed" => spec("qcow2", "", LEN),
            options => spec("qcow2", options, LEN),
        };
        let disk = full(layer, Some(spec("raw", "", LEN)), "");
        let top = Arc::clone(&disk.memory()[0]);
        let chain = disk.open(Access::Write, WriteOrder::Ordered);
        // The last quarter stays below.
        let own = LEN / 4 * 3;
        let bytes = vec![5; len(own)];
        match options {
            "compressed" => chain.write_compressed(&bytes, 0).expect("compresses"),
            _ => chain.write_at(&bytes, 0).expect("writes"),
        }
        chain.close().expect("closes");
        drop(chain);
        let chain = disk.open(Access::Write, WriteOrder::Ordered);
        chain.discard(0..LEN).expect("is taken");
        chain.flush().expect("flushes");
        chain.close().expect("closes");
        assert!(allocated(&top) < MIB, "{options}: {}", allocated(&top));
        let found = read_all(&chain);
        assert!(found[..len(own)].iter().all(|b| *b == 0), "{options}");
        assert!(found[len(own)..].iter().all(|b| *b == 1), "{options}");
        drop(chain);
        let report = disk.check(Repair::Nothing).expect("checks");
        assert_eq!((report.leaks, report.corruptions), (0, 0), "{options}");
    }
}

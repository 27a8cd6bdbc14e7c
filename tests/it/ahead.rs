//! Space made ready ahead of writes: few syncs, nothing left behind.

use std::sync::{Arc, Barrier};

use vdtool::image::check::Repair;
use vdtool::image::open::WriteOrder;
use vdtool::storage::Storage;
use vdtool::storage::memory::{Change, Fault, MemoryStorage, Op};
use vdtool::storage::open::Access;

use crate::layers::{Disk, LayerSpec, Place, check, read_all};

const SIZE: u64 = 64 << 20;

fn spec(format: &'static str, options: &'static str) -> LayerSpec {
    LayerSpec {
        format,
        options,
        size: SIZE,
    }
}

fn syncs(changes: &[Change]) -> usize {
    changes.iter().filter(|c| **c == Change::Sync).count()
}

/// Writes a little into each unit of `step` bytes, last to first; what the disk reads as then.
fn write_apart(chain: &vdtool::chain::Chain, step: u64) -> Vec<u8> {
    let mut model = vec![0; usize::try_from(SIZE).expect("fits")];
    for unit in (0..SIZE / step).rev() {
        let at = unit * step + 512;
        chain.write_at(&[7; 1024], at).expect("writes");
        let at = usize::try_from(at).expect("fits");
        model[at..at + 1024].fill(7);
    }
    model
}

#[test]
fn writes_into_a_thousand_new_clusters_share_a_few_syncs() {
    let cases = [
        ("qcow2", "", 64 << 10, 30),
        ("qcow2", "extended_l2=on", 64 << 10, 30),
        ("qcow2", "cluster_size=4k", 64 << 10, 30),
        ("vhd", "", 2 << 20, 12),
        ("vhd", "block_size=512k", 512 << 10, 40),
        ("vhdx", "", 2 << 20, 12),
        ("vhdx", "block_size=1M", 1 << 20, 12),
        ("vdi", "", 1 << 20, 12),
        ("vdi", "block_size=64k", 64 << 10, 80),
    ];
    for (format, options, step, most) in cases {
        let disk = Disk::create(Place::Memory, &[spec(format, options)]);
        let top = Arc::clone(&disk.memory()[0]);
        let chain = disk.open(Access::Write, WriteOrder::Ordered);
        top.record();
        let model = write_apart(&chain, step);
        let made = syncs(&top.changes());
        assert!(made <= most, "{format} {options}: {made} syncs");
        assert!(read_all(&chain) == model, "{format} {options}");
        chain.close().expect("closes");
        let report = disk.check(Repair::Nothing).expect("checks");
        assert_eq!((report.leaks, report.corruptions), (0, 0), "{format}");
        assert!(read_all(&disk.open(Access::Read, WriteOrder::Ordered)) == model);
    }
}

#[test]
fn a_little_written_takes_little_space_even_before_the_close() {
    let disk = Disk::create(Place::Memory, &[spec("qcow2", "")]);
    let top = Arc::clone(&disk.memory()[0]);
    let before = top.size();
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    chain.write_at(&[1; 512], 0).expect("writes");
    // A second-level table, the cluster, and no more than as much again.
    assert!(top.size() <= before + (4 << 16), "{}", top.size() - before);
    chain.close().expect("closes");
    assert_eq!(top.size(), before + (2 << 16));
}

#[test]
fn a_close_cuts_off_what_was_made_ready_and_not_used() {
    let disk = Disk::create(Place::Memory, &[spec("qcow2", "")]);
    let top = Arc::clone(&disk.memory()[0]);
    let before = top.size();
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    for unit in 0..100 {
        chain.write_at(&[1; 512], unit << 16).expect("writes");
    }
    assert!(top.size() > before + (101 << 16));
    chain.close().expect("closes");
    assert_eq!(top.size(), before + (101 << 16));
    chain.write_at(&[2; 512], 200 << 16).expect("is still open");
    chain.close().expect("closes");
    assert_eq!(top.size(), before + (102 << 16));
}

#[test]
fn a_kill_leaves_leaks_and_nothing_worse() {
    for (format, options, step) in [
        ("qcow2", "", 64 << 10),
        ("vhd", "", 2 << 20),
        ("vdi", "", 1 << 20),
    ] {
        let disk = Disk::create(Place::Memory, &[spec(format, options)]);
        let top = Arc::clone(&disk.memory()[0]);
        let chain = disk.open(Access::Write, WriteOrder::Ordered);
        let model = write_apart(&chain, step * 5);
        let killed = Arc::new(MemoryStorage::from_bytes(&top.to_bytes()));
        let report = check(disk.driver(), killed.clone(), Repair::Nothing).expect("checks");
        assert_eq!(report.corruptions, 0, "{format}");
        check(disk.driver(), killed.clone(), Repair::Leaks).expect("mends");
        let report = check(disk.driver(), killed.clone(), Repair::Nothing).expect("checks");
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{format}");
        let storages: Vec<Arc<dyn Storage>> = vec![killed];
        let after = disk.open_with(storages, Access::Write, WriteOrder::Ordered);
        assert!(read_all(&after) == model, "{format}");
        chain.close().expect("closes");
    }
}

#[test]
fn space_that_threads_set_aside_for_one_range_at_once_is_lost_to_none_of_them() {
    for format in ["qcow2", "vdi"] {
        for _ in 0..20 {
            let disk = Disk::create(Place::Memory, &[spec(format, "")]);
            let chain = disk.open(Access::Write, WriteOrder::Unordered);
            let start = Barrier::new(4);
            std::thread::scope(|threads| {
                for _ in 0..4 {
                    threads.spawn(|| {
                        let layout = chain.top().as_layout().expect("it allocates");
                        start.wait();
                        let all = std::slice::from_ref(&(0..SIZE));
                        layout.assign(all).expect("has room");
                    });
                }
            });
            chain.close().expect("closes");
            let report = disk.check(Repair::Nothing).expect("has a check");
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{format}");
        }
    }
}

#[test]
fn where_the_host_has_no_room_for_what_is_set_aside_nothing_is() {
    let mut failed = 0;
    for after in 0..40 {
        let disk = Disk::create(Place::Memory, &[spec("qcow2", "cluster_size=64k")]);
        let chain = disk.open(Access::Write, WriteOrder::Unordered);
        chain.write_at(&[1], 0).expect("writes");
        let layout = chain.top().as_layout().expect("it allocates");
        disk.memory()[0].inject(Fault {
            op: Op::Change,
            after,
            count: 1,
            errno: libc::ENOSPC,
        });
        let range = 1 << 20..2 << 20;
        let done = layout.assign(std::slice::from_ref(&range));
        failed += usize::from(done.is_err());
        let report = disk.check(Repair::Nothing).expect("has a check");
        let held = if failed > after { 0 } else { 16 };
        assert_eq!(report.leaks, held, "change {after}");
    }
    assert!((1..40).contains(&failed), "{failed}");
}

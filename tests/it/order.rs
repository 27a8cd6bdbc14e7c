//! What must be on stable media before what: short sessions, each for one path of allocation, in
//! which every power cut is looked at.

use std::ffi::OsStr;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::time::SystemTime;

use vdtool::chain::Chain;
use vdtool::image::check::Repair;
use vdtool::image::compress::{Existing, Form, Unit};
use vdtool::image::create::CreateOptions;
use vdtool::image::open::{Companions, OpenOptions, WriteOrder};
use vdtool::image::options::OptionValues;
use vdtool::image::{Image, Run, Slot, Source, Wait};
use vdtool::storage::Storage;
use vdtool::storage::memory::{Change, Fault, MemoryStorage, Op};
use vdtool::storage::open::Access;

use crate::crash::{Act, Session};
use crate::layers::{Disk, LayerSpec, Place, read_all};
use crate::util::len;

fn spec(format: &'static str, options: &'static str, size: u64) -> LayerSpec {
    LayerSpec {
        format,
        options,
        size,
    }
}

/// A disk of `specs`, top first; those below are full of data.
fn over(place: Place, specs: &[LayerSpec]) -> Disk {
    let mut disk = Disk::create(place, &[]);
    for (index, layer) in specs.iter().rev().enumerate() {
        disk.push(layer);
        if index + 1 < specs.len() {
            write(&disk, 0..layer.size, 0x40);
        }
    }
    disk
}

/// Writes bytes that tell where they are, and by whom they were written.
fn write(disk: &Disk, range: std::ops::Range<u64>, by: u8) {
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    let bytes: Vec<u8> = range.clone().map(|at| by | (at / 512 % 64) as u8).collect();
    chain.write_at(&bytes, range.start).expect("writes");
    chain.close().expect("closes");
}

/// Stores what a disk reads as in a snapshot, and says what that is.
fn snapshot(disk: &Disk) -> Vec<u8> {
    let mut chain = disk.open(Access::Write, WriteOrder::Ordered);
    let snapshots = chain.top_mut().as_snapshots().expect("has some");
    snapshots
        .create("kept".as_ref(), SystemTime::UNIX_EPOCH)
        .expect("has room");
    chain.close().expect("closes");
    read_all(&chain)
}

fn look(name: &str, disk: Disk, kept: Option<Vec<u8>>, acts: &[Act]) {
    let mut session = Session::of(name, disk, kept, acts);
    session.every_kill();
    session.power_cuts();
}

use Act::{Assign, Close, Discard, Flush, Pack, Place as Store, Resize, Write, Zero};

const SIZE: u64 = 64 << 10;

#[test]
fn clusters_that_a_snapshot_shares() {
    for (options, unit) in [
        ("cluster_size=4k", 4096),
        ("cluster_size=512", 512),
        ("extended_l2=on,cluster_size=16k", 16 << 10),
    ] {
        let disk = over(Place::Memory, &[spec("qcow2", options, SIZE)]);
        write(&disk, 0..SIZE - 700, 0);
        let kept = snapshot(&disk);
        let acts = [
            // The table is copied by the first, and is its own after that.
            Write(100..unit + 200),
            Write(2 * unit..2 * unit + 300),
            Flush,
            Write(unit..2 * unit + 100),
            Write(SIZE - 1000..SIZE),
        ];
        look(options, disk, Some(kept), &acts);
    }
}

#[test]
fn shared_and_compressed_clusters_that_space_is_set_aside_for() {
    let disk = over(Place::Memory, &[spec("qcow2", "cluster_size=4k", SIZE)]);
    write(&disk, 0..SIZE - 700, 0);
    let kept = snapshot(&disk);
    let acts = [
        Assign(0..SIZE),
        Write(100..4296),
        Write(12_288..12_600),
        Flush,
        Write(20_000..40_000),
    ];
    look("set aside, shared", disk, Some(kept), &acts);
    let disk = over(Place::Memory, &[spec("qcow2", "cluster_size=4k", SIZE)]);
    let acts = [
        Pack(0..32_768),
        Flush,
        Assign(0..SIZE),
        Write(100..4296),
        Write(12_288..12_600),
        Flush,
        Write(20_000..40_000),
    ];
    look("set aside, compressed", disk, None, &acts);
}

#[test]
fn shared_clusters_and_tables_that_are_let_go() {
    let shared = || {
        let disk = over(Place::Memory, &[spec("qcow2", "cluster_size=4k", SIZE)]);
        write(&disk, 0..SIZE, 0);
        let kept = snapshot(&disk);
        (disk, Some(kept))
    };
    let discards = |at: u64| [Discard(at..at + 4096), Discard(at + 8192..at + 12_288)];
    for first in [Zero(0..4096), Discard(0..4096), Write(0..100)] {
        let acts = [&[first][..], &discards(20_480), &discards(40_960)].concat();
        let (disk, kept) = shared();
        look("let go", disk, kept, &acts);
    }
    // The table is its own, the clusters are not; what a request lets go of is given back by the
    // second after it, and these let nothing go themselves.
    let nothing = Discard(40_960..45_056);
    let acts = [
        nothing.clone(),
        Flush,
        Write(5000..5100),
        nothing.clone(),
        nothing,
    ];
    let (disk, kept) = shared();
    look("its own", disk, kept, &acts);
}

#[test]
fn a_shared_table_that_is_let_go_by_new_clusters() {
    const COVERED: u64 = 32 << 10;
    let disk = over(
        Place::Memory,
        &[spec("qcow2", "cluster_size=512", 4 * COVERED)],
    );
    for table in 0..4 {
        write(&disk, table * COVERED..(table + 1) * COVERED - 4096, 0);
    }
    let kept = snapshot(&disk);
    let hole = COVERED - 4096;
    let acts = [
        // Makes a cluster ready, then two.
        Write(hole..hole + 100),
        Write(hole + 512..hole + 600),
        Write(hole + COVERED..hole + COVERED + 100),
        Discard(COVERED - 512..COVERED),
        Discard(COVERED - 512..COVERED),
    ];
    look("table", disk, Some(kept), &acts);
}

/// Fails one sync of an open disk.
fn lose(chain: &Chain, top: &MemoryStorage) {
    top.inject(one_fault(Op::Sync));
    chain.flush().expect_err("fails");
    top.heal();
}

/// Whether something failed because a sync had failed before.
fn is_lost(done: vdtool::Result<()>) -> bool {
    let error = done.expect_err("rests on what may be lost");
    let text = error.to_string();
    error.errno() == libc::EIO && text.contains("/memory/") && text.contains("opening it anew")
}

const ALL: [(&str, &str); 3] = [
    ("vhd", "block_size=16k"),
    ("vdi", "block_size=16k"),
    ("qcow2", "cluster_size=16k"),
];

#[test]
fn after_a_sync_that_failed_nothing_is_durable_until_the_image_is_opened_anew() {
    let others = [
        ("raw", ""),
        ("vhd", "subformat=fixed"),
        ("vhdx", "block_size=1M"),
        ("vmdk", "grain_size=16k"),
    ];
    for (format, options) in ALL.iter().chain(&others) {
        let disk = over(Place::Memory, &[spec(format, options, SIZE)]);
        write(&disk, 0..20_000, 0);
        let top = Arc::clone(&disk.memory()[0]);
        let chain = disk.open(Access::Write, WriteOrder::Ordered);
        chain.write_at(&[1; 500], 0).expect("writes");
        lose(&chain, &top);
        chain
            .write_at(&[2; 500], 0)
            .expect("is not said to be durable");
        assert!(is_lost(chain.flush()) && is_lost(chain.flush()), "{format}");
        if *format != "raw" {
            assert!(is_lost(chain.resize(2 * SIZE)), "{format}");
        }
        top.record();
        assert!(is_lost(chain.close()) && is_lost(chain.close()), "{format}");
        assert!(top.changes().is_empty(), "{format}: {:x?}", top.changes());
        drop(chain);
        let chain = disk.open(Access::Write, WriteOrder::Ordered);
        chain.flush().expect("has lost nothing that it shows");
        chain.close().expect("closes");
    }
}

#[test]
fn what_waits_for_stable_media_is_not_published_after_a_sync_that_failed() {
    for (name, disk) in that_wait() {
        let top = Arc::clone(&disk.memory()[0]);
        let chain = disk.open(Access::Write, WriteOrder::Ordered);
        let layout = chain.top().as_layout().expect("has one");
        drop(layout.assign(std::slice::from_ref(&(16_384..32_768))));
        lose(&chain, &top);
        let before = read_all(&chain);
        assert!(is_lost(chain.write_at(&[3; 700], 16_500)), "{name}");
        drop(chain);
        let chain = disk.open(Access::Read, WriteOrder::Ordered);
        assert!(read_all(&chain) == before, "{name}");
    }
}

#[test]
fn what_a_failed_sync_may_have_brought_back_is_neither_reused_nor_cut_off() {
    for (format, options) in ALL {
        let disk = over(Place::Memory, &[spec(format, options, SIZE)]);
        write(&disk, 0..SIZE, 0);
        let top = Arc::clone(&disk.memory()[0]);
        let host_of = |chain: &Chain, at| match chain.top().map(at, 1, Wait::Yes) {
            Ok(Run {
                source: Source::Stored { host, .. },
                ..
            }) => host,
            other => panic!("{format}: {other:?}"),
        };
        let chain = disk.open(Access::Write, WriteOrder::Ordered);
        let kept = host_of(&chain, 2 * 16_384);
        chain.discard(3 * 16_384..SIZE).expect("discards");
        chain.flush().expect("flushes");
        chain.discard(2 * 16_384..3 * 16_384).expect("discards");
        lose(&chain, &top);
        let end = kept + 16_384;
        if chain.write_at(&[9; 16_384], 3 * 16_384).is_ok() {
            let taken = host_of(&chain, 3 * 16_384);
            assert!(
                format == "vdi" || end <= taken || taken + 16_384 <= kept,
                "{format}: space that stable media may still name is used again"
            );
        }
        chain.discard(3 * 16_384..SIZE).expect("discards");
        assert!(is_lost(chain.close()), "{format}");
        assert!(top.size() >= end, "{format}: it is cut off");
        drop(chain);
        let report = disk.check(Repair::Nothing).expect("checks");
        assert_eq!(report.corruptions, 0, "{format}: {report:?}");
    }
}

#[test]
fn syncs_that_an_image_makes_by_itself_count_like_those_of_its_clients() {
    // Its refcounts get a new block, which is made durable before anything names it.
    let small = spec("qcow2", "cluster_size=512,refcount_bits=64", SIZE);
    let mut failed = 0;
    for after in 0..40 {
        let disk = over(Place::Memory, &[small]);
        let top = Arc::clone(&disk.memory()[0]);
        let chain = disk.open(Access::Write, WriteOrder::Ordered);
        chain.write_at(&[1; 512], 0).expect("writes");
        top.inject(Fault {
            after,
            ..one_fault(Op::Sync)
        });
        let done = chain.write_at(&[1; 40_000], 512);
        top.heal();
        if done.is_err() {
            failed += 1;
            assert!(is_lost(chain.flush()), "{after}");
        }
    }
    assert!(failed > 1, "{failed}");
}

#[test]
fn space_is_set_aside_in_order_where_the_host_cannot_make_it_zero() {
    for (format, options) in ALL {
        for fails in 0..4 {
            let specs = [spec(format, options, SIZE)];
            let disk = Disk::create(Place::Device(4 << 20), &specs);
            let top = Arc::clone(&disk.memory()[0]);
            let chain = disk.open(Access::Write, WriteOrder::Ordered);
            chain.write_at(&[0; 10], 0).expect("writes");
            // One of the changes is that.
            top.inject(Fault {
                errno: libc::EOPNOTSUPP,
                after: fails,
                ..one_fault(Op::Change)
            });
            let layout = chain.top().as_layout().expect("has one");
            let done = layout.assign(std::slice::from_ref(&(16_384..SIZE)));
            top.heal();
            if done.is_err() {
                continue;
            }
            let mut hosts = Vec::new();
            for at in [48 << 10, 32 << 10, 16 << 10] {
                chain.write_at(&[3; 700], at).expect("writes");
                let run = chain.top().map(at, 1, Wait::Yes).expect("maps");
                if let Source::Stored { host, .. } = run.source {
                    hosts.insert(0, host);
                }
            }
            assert!(
                hosts.len() == 3 && hosts.is_sorted(),
                "{format}, {fails}: {hosts:x?}"
            );
            let mut expected = vec![0; len(SIZE)];
            for at in [16 << 10, 32 << 10, 48 << 10] {
                expected[at..at + 700].fill(3);
            }
            assert!(read_all(&chain) == expected, "{format}");
            chain.close().expect("closes");
            let report = disk.check(Repair::Nothing).expect("checks");
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
        }
    }
}

#[test]
fn what_was_surely_not_published_is_given_back_when_a_publication_fails_midway() {
    const UNIT: u64 = 16 << 10;
    let child = [
        spec("vhd", "block_size=16k", 4 * UNIT),
        spec("raw", "", 4 * UNIT),
    ];
    let disk = over(Place::Memory, &child);
    write(&disk, 0..1000, 0);
    let before = disk.memory()[0].to_bytes();
    let below = disk.memory()[1].to_bytes();
    let mut failed = 0;
    for after in 0..40 {
        let mut disk = Disk::create(Place::Memory, &child[1..]);
        disk.memory()[0].write_at(&below, 0).expect("writes");
        disk.push_bytes("vhd", &before);
        let top = Arc::clone(&disk.memory()[0]);
        let image = open_top(&disk);
        top.inject(Fault {
            after,
            ..one_fault(Op::Change)
        });
        let mut fill = |slot: Slot<'_>| {
            let bytes = vec![5; len(slot.guest.end - slot.guest.start)];
            slot.storage.write_at(&bytes, slot.host)
        };
        let done = image.allocate(UNIT / 2, 3 * UNIT, &mut fill);
        top.heal();
        let run = image.map(UNIT / 2, 1, Wait::Yes).expect("maps");
        let published = matches!(run.source, Source::Stored { .. });
        image.close().expect("closes");
        let report = disk.check(Repair::Nothing).expect("checks");
        assert_eq!(report.corruptions, 0, "{after}: {report:?}");
        if done.is_err() && !published {
            failed += 1;
            assert_eq!(report.leaks, 0, "{after}: {report:?}");
        }
    }
    assert!(failed > 2, "{failed}");
}

#[test]
fn a_broken_block_fails_no_write_to_the_block_before_it() {
    const UNIT: u64 = 16 << 10;
    let child = [
        spec("vhd", "block_size=16k", 4 * UNIT),
        spec("raw", "", 4 * UNIT),
    ];
    let disk = over(Place::Memory, &child);
    write(&disk, 0..1000, 0);
    write(&disk, UNIT..UNIT + 1000, 0);
    let top = Arc::clone(&disk.memory()[0]);
    // The word of block 1: far behind the end of the file.
    top.write_at(&[0x10, 0, 0, 0], 1536 + 4).expect("writes");
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    let mut fill = |slot: Slot<'_>| {
        let bytes = vec![5; len(slot.guest.end - slot.guest.start)];
        slot.storage.write_at(&bytes, slot.host)
    };
    let image = chain.top();
    let done = image.allocate(UNIT / 2, UNIT, &mut fill).expect("its own");
    assert_eq!(done, UNIT / 2);
    image
        .allocate(UNIT, UNIT, &mut fill)
        .expect_err("is broken");
}

#[test]
fn runs_of_shared_clusters_in_several_tables() {
    let disk = over(
        Place::Memory,
        &[spec("qcow2", "cluster_size=512", 4 * 32768)],
    );
    write(&disk, 0..4 * 32768, 0);
    let kept = snapshot(&disk);
    let acts = [
        Write(40_000..40_300),
        Flush,
        // One table of its own, two that are shared, by one sync.
        Write(50_000..110_000),
        Write(20_000..30_000),
    ];
    look("tables", disk, Some(kept), &acts);
}

#[test]
fn clusters_of_the_layer_below() {
    for options in ["cluster_size=4k", "extended_l2=on,cluster_size=16k"] {
        let specs = [spec("qcow2", options, SIZE), spec("raw", "", SIZE - 700)];
        let acts = [
            Write(100..5000),
            Write(9000..9100),
            Write(17_000..17_100),
            Flush,
            Write(20_000..30_000),
            Write(SIZE - 1000..SIZE),
            Write(600..700),
        ];
        look(options, over(Place::Memory, &specs), None, &acts);
    }
}

#[test]
fn compressed_clusters_and_whole_ones_in_their_place() {
    let disk = over(Place::Memory, &[spec("qcow2", "cluster_size=4k", SIZE)]);
    let acts = [
        Pack(0..12 << 10),
        Pack(12 << 10..20 << 10),
        Flush,
        Write(100..200),
        Write(5000..6000),
        Flush,
        // In the space that these have left.
        Pack(24 << 10..32 << 10),
        Store(8 << 10..16 << 10),
        Write(40_000..40_100),
        Store(0..8 << 10),
        Flush,
        Pack(48 << 10..52 << 10),
        Write(60_000..60_100),
        Discard(44 << 10..48 << 10),
        Flush,
        Store(48 << 10..52 << 10),
        // Two requests that let nothing go: the second gives back what is no longer there.
        Discard(44 << 10..48 << 10),
        Discard(44 << 10..48 << 10),
    ];
    look("packed", disk, None, &acts);
}

#[test]
fn space_that_was_freed_and_is_taken_again() {
    let disk = over(Place::Memory, &[spec("qcow2", "cluster_size=4k", SIZE)]);
    write(&disk, 0..SIZE / 2, 0);
    let acts = [
        Discard(0..8192),
        Write(40_000..40_100),
        Zero(8192..16_384),
        Write(50_000..58_000),
        Discard(16_384..20_480),
        Flush,
        Write(0..100),
        Close,
        Discard(20_480..28_672),
        Close,
    ];
    look("freed", disk, None, &acts);
}

#[test]
fn space_that_was_assigned() {
    let disk = over(Place::Memory, &[spec("qcow2", "cluster_size=4k", SIZE)]);
    write(&disk, 0..SIZE / 2, 0);
    let acts = [
        Discard(4096..20_480),
        Flush,
        Assign(32_768..49_152),
        Write(33_000..33_100),
        Write(40_960..45_056),
        Assign(0..SIZE),
        Write(50_000..50_100),
    ];
    look("assigned", disk, None, &acts);
}

/// Bytes of the header that say where the refcount table is.
const TABLE: std::ops::Range<usize> = 48..60;

#[test]
fn refcount_blocks_and_tables_that_have_to_be_made() {
    const SIZE: u64 = 6 << 20;
    let filled = |clusters: u64| {
        let layer = spec("qcow2", "cluster_size=512,refcount_bits=64", SIZE);
        let disk = over(Place::Memory, &[layer]);
        let chain = disk.open(Access::Write, WriteOrder::Unordered);
        chain
            .write_at(&vec![1; len(clusters * 512)], 0)
            .expect("writes");
        chain.close().expect("closes");
        let place = disk.memory()[0].to_bytes()[TABLE].to_vec();
        (disk, place)
    };
    let (_, first) = filled(1);
    let (mut few, mut many) = (1, SIZE / 512);
    assert!(filled(many).1 != first, "the table never grew");
    while many - few > 16 {
        let middle = few.midpoint(many);
        match filled(middle).1 == first {
            true => few = middle,
            false => many = middle,
        }
    }
    let (disk, _) = filled(few);
    let at = few * 512;
    let acts = [
        Write(at..at + 20 * 512),
        Write(at + 80 * 512..at + 90 * 512),
    ];
    look("refcounts", disk, None, &acts);
    // Far from the end of the table: several blocks at once.
    let (disk, _) = filled(400);
    let acts = [Write(400 * 512..500 * 512), Write(505 * 512..506 * 512)];
    look("blocks", disk, None, &acts);
}

#[test]
fn blocks_of_a_vhd() {
    for (place, name) in [
        (Place::Memory, "file"),
        (Place::Device(200 << 10), "device"),
    ] {
        let dynamic = spec("vhd", "block_size=4k", SIZE);
        let disk = over(place, &[dynamic]);
        let acts = [
            Write(100..9000),
            Write(20_000..20_100),
            Flush,
            Discard(0..8192),
            Write(40_000..48_000),
            Flush,
            Write(30_000..36_000),
            Close,
            Write(56_000..60_000),
        ];
        look(name, disk, None, &acts);
        let specs = [dynamic, spec("raw", "", SIZE)];
        let child = LayerSpec {
            options: "block_size=8k",
            ..specs[0]
        };
        let disk = over(Place::Memory, &[child, specs[1]]);
        let acts = [
            Write(100..600),
            Write(3000..3100),
            Write(9000..20_000),
            Flush,
            Write(30_000..60_000),
            Write(2000..5000),
        ];
        look(name, disk, None, &acts);
    }
}

#[test]
fn blocks_of_a_vdi() {
    let small = spec("vdi", "block_size=4k", SIZE);
    let child = spec("vdi", "block_size=8k", SIZE);
    for (name, specs) in [("vdi", &[small][..]), ("vdi over vdi", &[child, small])] {
        let acts = [
            Write(100..9000),
            Write(20_000..20_100),
            Flush,
            Discard(0..8192),
            Write(40_000..48_000),
            Resize(SIZE * 2),
            Write(SIZE + 100..SIZE + 200),
            Resize(SIZE),
            Write(30_000..36_000),
            Close,
            Write(56_000..60_000),
        ];
        look(name, over(Place::Memory, specs), None, &acts);
    }
}

#[test]
fn grains_of_a_vmdk() {
    let small = spec("vmdk", "grain_size=4k", SIZE);
    let child = spec("vmdk", "grain_size=8k,zeroed_grain=on", SIZE);
    for (name, specs) in [("vmdk", &[small][..]), ("vmdk over vmdk", &[child, small])] {
        let acts = [
            Write(100..9000),
            Flush,
            Discard(0..8192),
            Write(40_000..48_000),
            Resize(SIZE * 2),
            Write(SIZE + 100..SIZE + 200),
            Resize(SIZE),
            Close,
            Write(56_000..60_000),
        ];
        look(name, over(Place::Memory, specs), None, &acts);
    }
}

#[test]
fn blocks_of_a_vhdx() {
    const BLOCK: u64 = 1 << 20;
    let acts = [
        Write(BLOCK - 500..BLOCK + 500),
        Flush,
        Discard(0..BLOCK),
        Resize(BLOCK * 2 + SIZE),
        Write(BLOCK * 2..BLOCK * 2 + 700),
        Resize(BLOCK + SIZE),
        Close,
        Write(100..900),
    ];
    let disk = over(
        Place::Memory,
        &[spec("vhdx", "block_size=1M", BLOCK + SIZE)],
    );
    look("vhdx", disk, None, &acts);
}

#[test]
fn blocks_of_a_vhd_that_were_freed_and_are_taken_again() {
    let layer = spec("vhd", "block_size=4k", SIZE);
    let disk = over(Place::Memory, &[layer]);
    write(&disk, 0..SIZE / 2, 0);
    let acts = [
        // Makes room for more, so that what follows needs no sync.
        Write(32_768..33_000),
        Discard(0..8192),
        Write(36_864..37_000),
        Write(40_960..41_100),
        Flush,
        Discard(8192..24_576),
        Write(45_056..45_100),
        Flush,
        Write(50_000..50_100),
        Discard(45_056..53_248),
        Close,
    ];
    look("freed", disk, None, &acts);
    let disk = over(Place::Memory, &[layer]);
    write(&disk, 0..SIZE, 0);
    let before = disk.memory()[0].size();
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    chain.discard(SIZE / 2..SIZE).expect("is taken");
    chain.close().expect("closes");
    assert!(disk.memory()[0].size() < before - SIZE / 3, "is given back");
}

#[test]
fn a_block_of_a_vhd_where_the_footer_was() {
    for gap in (512..8192).step_by(512) {
        let disk = over(Place::Memory, &[spec("vhd", "block_size=4k", SIZE)]);
        let top = Arc::clone(&disk.memory()[0]);
        let bytes = top.to_bytes();
        let (rest, footer) = bytes.split_at(bytes.len() - 512);
        let end = rest.len() as u64;
        // Further away than it has to be, as a writer that was killed leaves it.
        top.write_at(&[0; 512], end).expect("writes");
        top.write_at(footer, end + gap).expect("writes");
        let acts = [Write(3000..3100), Write(9000..9100)];
        look("footer", disk, None, &acts);
    }
}

#[test]
fn a_close_is_a_flush() {
    for (format, options) in [
        ("raw", ""),
        ("vhd", "subformat=fixed"),
        ("vhd", "block_size=4k"),
        ("vdi", "block_size=4k"),
        ("vhdx", "block_size=1M"),
        ("vmdk", "grain_size=4k"),
        ("qcow2", "cluster_size=4k"),
    ] {
        let disk = over(Place::Memory, &[spec(format, options, SIZE)]);
        write(&disk, 0..SIZE, 0);
        look(options, disk, None, &[Write(100..9000), Close]);
    }
}

/// The top layer alone, open for writing.
fn open_top(disk: &Disk) -> Box<dyn Image> {
    let options = OpenOptions {
        access: Access::Write,
        ..OpenOptions::default()
    };
    let storage = Arc::clone(&disk.memory()[0]);
    storage.open_anew();
    (disk.driver().open)(storage, &options).expect("opens")
}

fn one_fault(op: Op) -> Fault {
    Fault {
        op,
        after: 0,
        count: 1,
        errno: libc::EIO,
    }
}

/// Disks whose cluster at 16 KiB has to be given space, by a way that waits for stable media.
fn that_wait() -> Vec<(&'static str, Disk)> {
    let small = [spec("qcow2", "cluster_size=4k", SIZE)];
    let shared = over(Place::Memory, &small);
    write(&shared, 0..SIZE, 0);
    snapshot(&shared);
    // The table is not shared any more.
    write(&shared, 0..100, 0);
    let packed = over(Place::Memory, &small);
    let chain = packed.open(Access::Write, WriteOrder::Ordered);
    chain.write_compressed(&[1; 32768], 0).expect("compresses");
    chain.close().expect("closes");
    let raw = spec("raw", "", SIZE);
    let extended = [spec("qcow2", "extended_l2=on,cluster_size=16k", SIZE), raw];
    let parts = over(Place::Memory, &extended);
    write(&parts, 20_480..20_580, 0);
    let child = [spec("vhd", "block_size=8k", SIZE), raw];
    let block = over(Place::Memory, &child);
    let sectors = over(Place::Memory, &child);
    write(&sectors, 18_000..18_100, 0);
    let over_raw = over(Place::Memory, &[small[0], raw]);
    vec![
        ("shared", shared),
        ("packed", packed),
        ("below", over_raw),
        ("part of a cluster", parts),
        ("block", block),
        ("sectors", sectors),
    ]
}

#[test]
fn a_sync_that_fails_while_a_writer_fills_fails_the_writer_too() {
    for (name, disk) in that_wait() {
        let top = Arc::clone(&disk.memory()[0]);
        let image = open_top(&disk);
        let mut fills = 0;
        let done = image.allocate(16_384, 100, &mut |slot: Slot<'_>| {
            slot.storage.write_at(&[7; 100], slot.host)?;
            fills += 1;
            if fills == 1 {
                top.inject(one_fault(Op::Sync));
                image.flush().expect_err("fails");
                top.heal();
            }
            Ok(())
        });
        assert!(fills > 0, "{name}: nothing was filled");
        let error = done.expect_err("what was filled may be lost");
        assert_eq!(error.errno(), libc::EIO, "{name}");
        drop(image);
        let image = open_top(&disk);
        let mut end = 0;
        let done = image.allocate(16_384, 100, &mut |slot: Slot<'_>| {
            end = end.max(slot.host + slot.guest.end - slot.guest.start);
            Ok(())
        });
        done.expect(name);
        // However little of it was written.
        assert!(top.size() >= end, "{name}: the file ends within a cluster");
    }
}

#[test]
fn a_sync_that_fails_while_whole_clusters_are_placed_fails_them_too() {
    let disk = over(Place::Memory, &[spec("qcow2", "cluster_size=4k", SIZE)]);
    let top = Arc::clone(&disk.memory()[0]);
    let image = open_top(&disk);
    let compress = image.as_compress().expect("has clusters");
    let unit = Unit {
        at: 8192,
        form: Form::Plain,
    };
    let placed = compress.place(&[unit], Existing::Replace).expect("places");
    top.inject(one_fault(Op::Sync));
    image.flush().expect_err("fails");
    top.heal();
    let error = placed
        .store(&[1; 4096])
        .expect_err("its counts may be lost");
    assert_eq!(error.errno(), libc::EIO);
}

/// Stops as a bug does.
fn unwinds(work: impl FnOnce()) {
    catch_unwind(AssertUnwindSafe(work)).expect_err("unwinds");
}

fn stop() -> ! {
    resume_unwind(Box::new("a bug"))
}

#[test]
fn a_writer_that_unwinds_leaves_no_leak_and_keeps_nobody_waiting() {
    let mut disks = that_wait();
    let new = over(Place::Memory, &[spec("qcow2", "cluster_size=4k", SIZE)]);
    disks.push(("new", new));
    let hidden = over(Place::Memory, &[spec("qcow2", "cluster_size=4k", SIZE)]);
    write(&hidden, 0..SIZE, 0);
    snapshot(&hidden);
    disks.push(("table", hidden));
    for (name, disk) in disks {
        let image = open_top(&disk);
        unwinds(|| {
            let done = image.allocate(16_384, 100, &mut |_| stop());
            done.map(drop).expect("never gets here");
        });
        image.flush().expect("flushes");
        image.close().expect("closes");
        drop(image);
        let report = disk.check(Repair::Nothing).expect("checks");
        let found = (report.leaks, report.corruptions);
        assert_eq!(found, (0, 0), "{name}: {:?}", report.findings);
        let image = open_top(&disk);
        unwinds(|| drop(image.allocate(16_384, 100, &mut |_| stop())));
        let done = image.allocate(16_384, 100, &mut |_| Ok(()));
        assert!(done.expect("nobody waits") > 0, "{name}");
    }
}

#[test]
fn whole_clusters_whose_writer_unwinds_leave_no_leak() {
    let disk = over(Place::Memory, &[spec("qcow2", "cluster_size=4k", SIZE)]);
    let image = open_top(&disk);
    let compress = image.as_compress().expect("has clusters");
    unwinds(|| {
        let forms = [Form::Packed(1000), Form::Plain, Form::Packed(3000)];
        let units = forms.iter().zip((0..).step_by(4096));
        let units: Vec<Unit> = units.map(|(form, at)| Unit { at, form: *form }).collect();
        let _placed = compress.place(&units, Existing::Replace).expect("places");
        stop();
    });
    image.close().expect("closes");
    drop(image);
    let report = disk.check(Repair::Nothing).expect("checks");
    assert_eq!((report.leaks, report.corruptions), (0, 0));
}

/// Gives an image its data file.
#[derive(Debug)]
struct DataFile(Arc<MemoryStorage>);

impl Companions for DataFile {
    fn open(&self, _name: &OsStr, _what: &str) -> vdtool::Result<Arc<dyn Storage>> {
        Ok(self.0.clone())
    }
}

#[test]
fn entries_and_flushes_wait_for_the_data_file_and_for_the_image() {
    let driver = vdtool::formats::by_name("qcow2").expect("a known format");
    let creator = driver.creator.as_ref().expect("is written");
    let (file, data) = (
        Arc::new(MemoryStorage::new()),
        Arc::new(MemoryStorage::new()),
    );
    let options = CreateOptions {
        size: SIZE,
        values: OptionValues::parse(creator.options, "qcow2", ["data_file=d", "cluster_size=4k"])
            .expect("valid"),
        files: vec![data.clone()],
        ..CreateOptions::default()
    };
    (creator.create)(&*file, &options).expect("creates");
    let options = OpenOptions {
        access: Access::Write,
        companions: Some(Arc::new(DataFile(Arc::clone(&data)))),
        ..OpenOptions::default()
    };
    for failing in [&data, &file] {
        let image = (driver.open)(file.clone(), &options).expect("opens");
        // The table is there from now on.
        image.allocate(0, 100, &mut |_| Ok(())).expect("writes");
        let table = file.to_bytes();
        failing.inject(one_fault(Op::Sync));
        let done = image.allocate(32_768, 100, &mut |_| Ok(()));
        done.expect_err("its data is not on stable media");
        assert!(file.to_bytes() == table, "and no entry says that it is");
        failing.heal();
        image.flush().expect_err("not all is on stable media");
        image.close().expect_err("nor is it later");
        drop(image);
        failing.open_anew();
    }
}

#[test]
fn a_promise_that_is_not_kept_is_taken_back_before_anything_changes() {
    let disk = over(Place::Memory, &[spec("qcow2", "cluster_size=4k", SIZE)]);
    let top = Arc::clone(&disk.memory()[0]);
    // An autoclear bit that nobody knows.
    top.write_at(&[0x40], 88).expect("writes");
    let image = open_top(&disk);
    top.record();
    image.allocate(0, 100, &mut |_| Ok(())).expect("writes");
    let changes = top.changes();
    let cleared = Change::Write {
        host: 88,
        bytes: vec![0; 8],
    };
    assert_eq!(changes[..2], [cleared, Change::Sync]);
}

#[test]
fn the_file_reaches_the_end_of_a_new_cluster_however_little_of_it_was_written() {
    let disk = over(Place::Memory, &[spec("qcow2", "cluster_size=4k", SIZE)]);
    let chain = disk.open(Access::Write, WriteOrder::Unordered);
    chain.write_at(&[1; 100], 8192).expect("writes");
    let size = disk.memory()[0].size();
    assert!(size.is_multiple_of(4096), "{size:#x}");
}

#[test]
fn what_a_killed_shrink_leaves_behind_the_end_does_not_show_when_the_disk_grows() {
    let qcow2 = [
        "cluster_size=512",
        "cluster_size=4k",
        "compat=0.10,cluster_size=512",
        "extended_l2=on,cluster_size=16k",
    ];
    let qcow2 = qcow2.map(|options| ("qcow2", options));
    for (format, options) in ALL.iter().chain(&qcow2) {
        // Two tables of the smallest clusters, and a part of another.
        let size = 80 << 10;
        let disk = over(Place::Memory, &[spec(format, options, size)]);
        write(&disk, 0..size, 0x80);
        let top = Arc::clone(&disk.memory()[0]);
        let before = top.to_bytes();
        let chain = disk.open(Access::Write, WriteOrder::Ordered);
        let old = read_all(&chain);
        top.record();
        chain.resize(18 << 10).expect("shrinks");
        chain.close().expect("closes");
        drop(chain);
        let (mut long, mut short) = (0, 0);
        for made in 0..=top.changes().len() {
            let now = MemoryStorage::from_bytes(&before);
            top.changes()[..made].iter().for_each(|c| now.apply(c));
            let disk = Disk::of_bytes(format, &now.to_bytes());
            let chain = disk.open(Access::Write, WriteOrder::Ordered);
            let mut expected = old.clone();
            if chain.virtual_size() == size {
                long += 1;
            } else {
                short += 1;
                expected[18 << 10..].fill(0);
                chain.resize(size).expect("grows");
            }
            assert!(read_all(&chain) == expected, "{format} {options}: {made}");
            chain.close().expect("closes");
            drop(chain);
            let report = disk.check(Repair::Nothing).expect("checks");
            assert_eq!(report.corruptions, 0, "{format} {options}: {report:?}");
        }
        assert!(long > 0 && short > 1, "{format}: {long}, {short}");
    }
}

#[test]
fn a_first_level_table_that_moves_is_the_old_or_the_new_one_whatever_fails() {
    // One cluster of it is full.
    let size = 64 * 32_768;
    for (op, errno) in [(Op::Change, libc::ENOSPC), (Op::Sync, libc::EIO)] {
        let (mut failed, mut after) = (0, 0);
        loop {
            let disk = over(Place::Memory, &[spec("qcow2", "cluster_size=512", size)]);
            write(&disk, 0..3000, 0);
            write(&disk, size - 3000..size, 0x40);
            let top = Arc::clone(&disk.memory()[0]);
            let chain = disk.open(Access::Write, WriteOrder::Ordered);
            let old = read_all(&chain);
            let fault = one_fault(op);
            top.inject(Fault {
                after,
                errno,
                ..fault
            });
            let done = chain.resize(size + 102_400);
            top.heal();
            let mut wanted = old.clone();
            wanted.resize(len(chain.virtual_size()), 0);
            let is_long = wanted.len() > old.len();
            assert!(read_all(&chain) == wanted, "{after}");
            // Tables that go where the table of tables says.
            let written = chain.write_at(&[9; 2000], 1 << 20);
            if written.is_ok() {
                wanted[1 << 20..(1 << 20) + 2000].fill(9);
            }
            let closed = chain.close();
            assert_eq!(closed.is_ok(), done.is_ok() || op == Op::Change, "{after}");
            drop(chain);
            let report = disk.check(Repair::Nothing).expect("checks");
            assert_eq!(report.corruptions, 0, "{after}: {report:?}");
            let chain = disk.open(Access::Write, WriteOrder::Ordered);
            assert!(read_all(&chain) == wanted, "{after}");
            if done.is_ok() {
                assert!(is_long, "{after}");
                break;
            }
            chain.resize(size + 102_400).expect("grows");
            wanted.resize(len(size) + 102_400, 0);
            assert!(read_all(&chain) == wanted, "{after}");
            chain.close().expect("closes");
            (failed, after) = (failed + 1, after + 1);
        }
        assert!(failed > 2, "{failed}");
    }
}

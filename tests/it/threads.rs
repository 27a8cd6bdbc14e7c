//! Several threads on one disk: none loses a byte to another.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use vdtool::chain::Chain;
use vdtool::image::check::Repair;
use vdtool::image::open::WriteOrder;
use vdtool::storage::Zeroing;
use vdtool::storage::open::Access;

use crate::layers::{Disk, LayerSpec, Place, filled, read_all};
use crate::util::{Seeded, assert_same, len, rounds};

const THREADS: usize = 4;
const ROUNDS: usize = 1500;

/// Length of a stripe: neither a divisor nor a multiple of a sector, so that neighbours share
/// sectors and blocks.
const STRIPE: u64 = 1700;

fn vhd(options: &'static str, size: u64) -> LayerSpec {
    LayerSpec {
        format: "vhd",
        options,
        size,
    }
}

fn qcow2(options: &'static str, size: u64) -> LayerSpec {
    LayerSpec {
        format: "qcow2",
        options,
        size,
    }
}

fn raw(size: u64) -> LayerSpec {
    LayerSpec {
        format: "raw",
        options: "",
        size,
    }
}

/// What is tried with several threads: a name, and layers top first.
fn shapes() -> Vec<(&'static str, Place, Vec<LayerSpec>)> {
    let size = 600 * 512;
    vec![
        ("raw", Place::Memory, vec![raw(size)]),
        ("raw file", Place::Files, vec![raw(size)]),
        ("fixed", Place::Memory, vec![vhd("subformat=fixed", size)]),
        (
            "dynamic 4k",
            Place::Memory,
            vec![vhd("block_size=4k", size)],
        ),
        ("dynamic", Place::Memory, vec![vhd("block_size=64k", size)]),
        (
            "vdi",
            Place::Memory,
            vec![LayerSpec {
                format: "vdi",
                ..vhd("block_size=16k", size)
            }],
        ),
        (
            "vmdk",
            Place::Memory,
            vec![LayerSpec {
                format: "vmdk",
                ..vhd("grain_size=16k", 640 * 512)
            }],
        ),
        (
            "vmdk of ESX",
            Place::Files,
            vec![LayerSpec {
                format: "vmdk",
                ..vhd("subformat=vmfsSparse,grain_size=4k", 640 * 512)
            }],
        ),
        (
            "vmdk in parts",
            Place::Files,
            vec![LayerSpec {
                format: "vmdk",
                ..vhd("subformat=twoGbMaxExtentSparse,grain_size=16k", 640 * 512)
            }],
        ),
        (
            "vhdx",
            Place::Memory,
            vec![LayerSpec {
                format: "vhdx",
                ..vhd("block_size=1M", 3 << 20)
            }],
        ),
        (
            "vhdx over vhdx",
            Place::Memory,
            ["block_size=1M", "block_size=2M"]
                .map(|options| LayerSpec {
                    format: "vhdx",
                    ..vhd(options, 3 << 20)
                })
                .to_vec(),
        ),
        (
            "dynamic on a device",
            Place::Device(64 << 20),
            vec![vhd("block_size=16k", size)],
        ),
        ("dynamic file", Place::Files, vec![vhd("", size)]),
        (
            "over raw",
            Place::Memory,
            vec![vhd("block_size=16k", size), raw(size - 5000)],
        ),
        (
            "over two",
            Place::Files,
            vec![
                vhd("block_size=8k", size),
                vhd("block_size=64k", size),
                vhd("", size),
            ],
        ),
        (
            "qcow2 512",
            Place::Memory,
            vec![qcow2("cluster_size=512", size)],
        ),
        (
            "qcow2 4k file",
            Place::Files,
            vec![qcow2("cluster_size=4k,refcount_bits=1", size)],
        ),
        ("qcow2 64k", Place::Memory, vec![qcow2("", size)]),
        (
            "qcow2 extended",
            Place::Memory,
            vec![qcow2("extended_l2=on,cluster_size=16k", size)],
        ),
        (
            "qcow2 version 2 over raw",
            Place::Memory,
            vec![qcow2("compat=0.10,cluster_size=4k", size), raw(size - 5000)],
        ),
        (
            "qcow2 over qcow2",
            Place::Memory,
            vec![
                qcow2("extended_l2=on,cluster_size=32k", size),
                qcow2("cluster_size=4k", size),
            ],
        ),
    ]
}

/// One thread's stripes: every `THREADS`-th one.
fn stripe(thread: usize, index: u64, size: u64) -> Range<u64> {
    let start = (index * THREADS as u64 + thread as u64) * STRIPE;
    start.min(size)..(start + STRIPE).min(size)
}

/// Random operations on the thread's own stripes; gives its view of the disk.
fn own_stripes(chain: &Chain, thread: usize, name: &str, mut model: Vec<u8>) -> Vec<u8> {
    let mut rng = Seeded::new(&format!("{name} {thread}"));
    let size = chain.virtual_size();
    let stripes = size.div_ceil(STRIPE * THREADS as u64);
    for _ in 0..rounds(ROUNDS) {
        let whole = stripe(thread, rng.u64(0..stripes), size);
        if whole.is_empty() {
            continue;
        }
        let start = rng.u64(whole.clone());
        let range = start..rng.u64(start + 1..=whole.end);
        let part = len(range.start)..len(range.end);
        let mut found = vec![0xee; part.len()];
        match rng.u32(0..20) {
            0..9 => {
                rng.fill(&mut found);
                chain.write_at(&found, range.start).expect("writes");
                model[part].copy_from_slice(&found);
            }
            9..12 => {
                chain.zero(range, Zeroing::MayUnmap).expect("zeroes");
                model[part].fill(0);
            }
            12..14 => {
                chain.discard(range.clone()).expect("discards");
                chain.read_at(&mut found, range.start).expect("reads");
                for (now, before) in found.iter().zip(&model[part.clone()]) {
                    assert!(*now == 0 || now == before, "{name}: discard in {range:#x?}");
                }
                model[part].copy_from_slice(&found);
            }
            14 => chain.flush().expect("flushes"),
            _ => {
                chain.read_at(&mut found, range.start).expect("reads");
                assert_same(&found, &model[part], range.start, name);
            }
        }
    }
    model
}

fn disjoint(name: &str, place: Place, specs: &[LayerSpec]) {
    let mut rng = Seeded::new(name);
    let (disk, model) = filled(place, specs, &mut rng);
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    let run = |thread| own_stripes(&chain, thread, name, model.clone());
    let run = &run;
    let views: Vec<Vec<u8>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| scope.spawn(move || run(thread)))
            .collect();
        let view = |t: std::thread::ScopedJoinHandle<'_, _>| t.join().expect("it ends well");
        threads.into_iter().map(view).collect()
    });
    let mut expected = model;
    let size = expected.len() as u64;
    for (thread, view) in views.iter().enumerate() {
        for index in 0..size.div_ceil(STRIPE * THREADS as u64) {
            let range = stripe(thread, index, size);
            let part = len(range.start)..len(range.end);
            expected[part.clone()].copy_from_slice(&view[part]);
        }
    }
    assert_same(&read_all(&chain), &expected, 0, name);
    chain.close().expect("closes");
    drop(chain);
    checks_clean(&disk, name);
    let chain = disk.open(Access::Read, WriteOrder::Ordered);
    assert_same(&read_all(&chain), &expected, 0, name);
}

fn checks_clean(disk: &Disk, name: &str) {
    if let Some(report) = disk.check(Repair::Nothing) {
        assert_eq!(report.corruptions, 0, "{name}: {:?}", report.findings);
    }
}

#[test]
fn threads_on_interleaved_stripes_of_shared_blocks_lose_nothing() {
    for (name, place, specs) in shapes() {
        disjoint(name, place, &specs);
    }
}

/// The byte that `thread` writes; others come from nowhere.
fn mark(thread: usize) -> u8 {
    0xa0 + u8::try_from(thread).expect("few threads")
}

/// What a byte may be once the whole disk was written with `BASE` and threads with marks, zeroes
/// and discards overlap on it.
fn allowed(byte: u8) -> bool {
    byte == 0 || byte == BASE || (mark(0)..mark(THREADS)).contains(&byte)
}

const BASE: u8 = 0x77;
/// In the layer below: once covered it may never be seen again.
const BELOW: u8 = 0x11;

fn overlap(chain: &Chain, thread: usize, name: &str) {
    let mut rng = Seeded::new(&format!("overlap {name} {thread}"));
    let size = chain.virtual_size();
    for _ in 0..rounds(ROUNDS) {
        let start = rng.u64(0..size);
        let end = (start + rng.u64(1..40_000)).min(size);
        match rng.u32(0..10) {
            0..5 => {
                let bytes = vec![mark(thread); len(end - start)];
                chain.write_at(&bytes, start).expect("writes");
            }
            5..7 => chain.zero(start..end, Zeroing::MayUnmap).expect("zeroes"),
            7..9 => chain.discard(start..end).expect("discards"),
            _ => chain.flush().expect("flushes"),
        }
    }
}

/// Reads for as long as others write, and sees only what somebody wrote.
fn watch(chain: &Chain, stop: &AtomicBool, name: &str) {
    let mut rng = Seeded::new(name);
    let size = chain.virtual_size();
    let mut buf = vec![0; 20_000];
    while !stop.load(Ordering::Relaxed) {
        let at = rng.u64(0..size - buf.len() as u64);
        chain.read_at(&mut buf, at).expect("reads");
        if let Some(offset) = buf.iter().position(|b| !allowed(*b)) {
            let found = buf[offset];
            panic!(
                "{name}: nobody wrote the {found:#04x} at {:#x}",
                at + offset as u64
            );
        }
        for extent in chain.extents(at..at + 5000).expect("inside") {
            extent.expect("maps");
        }
    }
}

fn overlapping(name: &str, place: Place, specs: &[LayerSpec]) {
    let mut disk = Disk::create(place, &[]);
    for (index, spec) in specs.iter().rev().enumerate() {
        disk.push(spec);
        if index + 1 < specs.len() {
            let chain = disk.open(Access::Write, WriteOrder::Ordered);
            let below = vec![BELOW; len(spec.size)];
            chain.write_at(&below, 0).expect("writes");
            chain.close().expect("closes");
        }
    }
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    let size = chain.virtual_size();
    chain.write_at(&vec![BASE; len(size)], 0).expect("writes");
    let stop = AtomicBool::new(false);
    let running = AtomicUsize::new(THREADS);
    std::thread::scope(|scope| {
        scope.spawn(|| watch(&chain, &stop, name));
        for thread in 0..THREADS {
            let (chain, stop, running) = (&chain, &stop, &running);
            scope.spawn(move || {
                let _end = End { stop, running };
                overlap(chain, thread, name);
            });
        }
    });
    let before = read_all(&chain);
    assert!(before.iter().all(|b| allowed(*b)), "{name}");
    chain.close().expect("closes");
    drop(chain);
    checks_clean(&disk, name);
    let chain = disk.open(Access::Read, WriteOrder::Ordered);
    assert_same(&read_all(&chain), &before, 0, name);
}

/// Stops the reader once the last writer has ended, also where it panicked.
struct End<'a> {
    stop: &'a AtomicBool,
    running: &'a AtomicUsize,
}

impl Drop for End<'_> {
    fn drop(&mut self) {
        if self.running.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.stop.store(true, Ordering::Relaxed);
        }
    }
}

#[test]
fn threads_that_overlap_leave_only_bytes_that_somebody_wrote() {
    for (name, place, specs) in shapes() {
        overlapping(name, place, &specs);
    }
}

#[test]
fn threads_that_write_the_same_new_blocks_lose_nothing() {
    for (name, place, specs) in shapes() {
        let mut rng = Seeded::new(name);
        let (disk, mut expected) = filled(place, &specs, &mut rng);
        let chain = disk.open(Access::Write, WriteOrder::Ordered);
        let size = chain.virtual_size();
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let chain = &chain;
                scope.spawn(move || {
                    // All threads pass the same blocks at the same time, in order.
                    for index in 0..size.div_ceil(STRIPE * THREADS as u64) {
                        let range = stripe(thread, index, size);
                        let bytes = vec![mark(thread); len(range.end - range.start)];
                        chain.write_at(&bytes, range.start).expect("writes");
                    }
                });
            }
        });
        for (at, byte) in expected.iter_mut().enumerate() {
            *byte = mark(at / len(STRIPE) % THREADS);
        }
        assert_same(&read_all(&chain), &expected, 0, name);
        chain.close().expect("closes");
        drop(chain);
        checks_clean(&disk, name);
    }
}

//! Clusters that become something else while others look: compressed, zero, hole, shared, and back.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, SystemTime};

use vdtool::chain::Chain;
use vdtool::error::ErrorKind;
use vdtool::image::check::Repair;
use vdtool::image::open::WriteOrder;
use vdtool::storage::Zeroing;
use vdtool::storage::open::Access;

use crate::layers::{Disk, LayerSpec, Place, read_all};
use crate::util::{Seeded, assert_same, len, rounds};

const SIZE: u64 = 1024 * 512;
const WRITERS: usize = 3;
const READERS: usize = 2;
const ROUNDS: usize = 250;
/// Longest that a thread may wait for another that is gone, before the test says that it hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the disk holds at first at an offset.
fn first(at: u64) -> u8 {
    1 + spread(at)
}

/// What is written there.
fn second(at: u64) -> u8 {
    129 + spread(at)
}

/// Tells offsets apart, so that bytes from elsewhere are seen.  Compressible.
fn spread(at: u64) -> u8 {
    let mixed = (at / 64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    u8::try_from(mixed % 120).expect("below 120")
}

fn bytes(range: &Range<u64>, what: fn(u64) -> u8) -> Vec<u8> {
    range.clone().map(what).collect()
}

/// A disk to be changed by several threads.
struct Shape {
    name: &'static str,
    place: Place,
    /// Top first; the last is filled.
    layers: Vec<LayerSpec>,
    /// The top layer has a snapshot of what it holds at first.
    snapshot: bool,
}

fn layer(format: &'static str, options: &'static str) -> LayerSpec {
    LayerSpec {
        format,
        options,
        size: SIZE,
    }
}

fn shapes() -> Vec<Shape> {
    let memory = |name, layers: &[(&'static str, &'static str)], snapshot| Shape {
        name,
        place: Place::Memory,
        layers: layers.iter().map(|(f, o)| layer(f, o)).collect(),
        snapshot,
    };
    vec![
        memory("qcow2 4k", &[("qcow2", "cluster_size=4k")], false),
        memory(
            "qcow2 512, zstd",
            &[("qcow2", "cluster_size=512,compression_type=zstd")],
            false,
        ),
        memory("qcow2 4k, shared", &[("qcow2", "cluster_size=4k")], true),
        memory(
            "qcow2 extended",
            &[("qcow2", "extended_l2=on,cluster_size=16k")],
            false,
        ),
        memory(
            "qcow2 extended, shared",
            &[("qcow2", "extended_l2=on,cluster_size=16k")],
            true,
        ),
        memory(
            "qcow2 over qcow2",
            &[
                ("qcow2", "extended_l2=on,cluster_size=16k"),
                ("qcow2", "cluster_size=4k"),
            ],
            false,
        ),
        Shape {
            place: Place::Files,
            ..memory("qcow2 in a file", &[("qcow2", "cluster_size=16k")], false)
        },
        memory("vhd 4k", &[("vhd", "block_size=4k")], false),
        memory("vhd 64k", &[("vhd", "block_size=64k")], false),
        memory("vdi 64k", &[("vdi", "block_size=64k")], false),
        memory("vhdx", &[("vhdx", "block_size=1M")], false),
        memory(
            "vdi over vdi",
            &[("vdi", "block_size=16k"), ("vdi", "block_size=4k")],
            false,
        ),
        memory("vmdk 16k", &[("vmdk", "grain_size=16k")], false),
        memory(
            "vmdk over vmdk",
            &[
                ("vmdk", "grain_size=16k,zeroed_grain=on"),
                ("vmdk", "grain_size=4k"),
            ],
            false,
        ),
        Shape {
            place: Place::Device(64 << 20),
            ..memory("vhd on a device", &[("vhd", "block_size=32k")], false)
        },
        memory(
            "vhd over vhd",
            &[("vhd", "block_size=16k"), ("vhd", "block_size=4k")],
            false,
        ),
        Shape {
            place: Place::Files,
            ..memory(
                "vhd over raw",
                &[("vhd", "block_size=64k"), ("raw", "")],
                false,
            )
        },
    ]
}

impl Shape {
    /// The disk, with `first` everywhere: compressed, where its last layer can.
    fn filled(&self) -> Disk {
        let mut disk = Disk::create(self.place, &[]);
        for (index, spec) in self.layers.iter().rev().enumerate() {
            disk.push(spec);
            if index > 0 {
                continue;
            }
            let chain = disk.open(Access::Write, WriteOrder::Ordered);
            let whole = bytes(&(0..SIZE), first);
            match chain.top().as_compress().is_ok() {
                true => chain.write_compressed(&whole, 0).expect("compresses"),
                false => chain.write_at(&whole, 0).expect("writes"),
            }
            chain.close().expect("closes");
        }
        if self.snapshot {
            let mut chain = disk.open(Access::Write, WriteOrder::Ordered);
            let snapshots = chain.top_mut().as_snapshots().expect("has snapshots");
            snapshots
                .create("before".as_ref(), SystemTime::now())
                .expect("keeps it");
            chain.close().expect("closes");
        }
        disk
    }
}

/// One thread's clusters, whose bytes nobody else changes.
struct Writer<'a> {
    chain: &'a Chain,
    name: &'a str,
    unit: u64,
    rng: Seeded,
}

impl Writer<'_> {
    fn run(mut self, thread: usize, mut model: Vec<u8>) -> Vec<u8> {
        let clusters = SIZE.div_ceil(self.unit);
        for _ in 0..rounds(ROUNDS) {
            let index = self.rng.u64(0..clusters.div_ceil(WRITERS as u64)) * WRITERS as u64;
            let start = (index + thread as u64) * self.unit;
            if start < SIZE {
                self.change(start..(start + self.unit).min(SIZE), &mut model);
            }
        }
        model
    }

    /// Turns a cluster, or a part of it, into something else, and sees that it is that.
    fn change(&mut self, whole: Range<u64>, model: &mut [u8]) {
        let start = self.rng.u64(whole.clone());
        let part = start..self.rng.u64(start + 1..=whole.end);
        let set = |model: &mut [u8], range: &Range<u64>, what: fn(u64) -> u8| {
            model[len(range.start)..len(range.end)].copy_from_slice(&bytes(range, what));
        };
        let chain = self.chain;
        let write = |range: &Range<u64>, what| {
            let buf = bytes(range, what);
            chain.write_at(&buf, range.start).expect("writes");
        };
        match self.rng.u32(0..12) {
            0..2 => {
                write(&whole, second);
                set(model, &whole, second);
            }
            2..5 => {
                write(&part, second);
                set(model, &part, second);
            }
            5 => {
                write(&part, first);
                set(model, &part, first);
            }
            6 => {
                chain
                    .zero(whole.clone(), Zeroing::MayUnmap)
                    .expect("zeroes");
                set(model, &whole, |_| 0);
            }
            7 => {
                chain
                    .zero(part.clone(), Zeroing::KeepSpace)
                    .expect("zeroes");
                set(model, &part, |_| 0);
            }
            8 => self.discard(&whole, model),
            9 => chain.flush().expect("flushes"),
            _ => {
                self.discard(&whole, model);
                match chain.write_compressed(&bytes(&whole, first), whole.start) {
                    Ok(()) => set(model, &whole, first),
                    // What lies over another layer keeps its space.
                    Err(e) => assert!(
                        matches!(e.kind(), ErrorKind::Invalid | ErrorKind::Unsupported),
                        "{}: {e}",
                        self.name
                    ),
                }
            }
        }
        let mut found = vec![0xee; len(whole.end - whole.start)];
        chain.read_at(&mut found, whole.start).expect("reads");
        let expected = &model[len(whole.start)..len(whole.end)];
        assert_same(&found, expected, whole.start, self.name);
    }

    /// Each byte is zero then, or as it was.
    fn discard(&self, range: &Range<u64>, model: &mut [u8]) {
        self.chain.discard(range.clone()).expect("discards");
        let mut found = vec![0xee; len(range.end - range.start)];
        self.chain.read_at(&mut found, range.start).expect("reads");
        let before = &mut model[len(range.start)..len(range.end)];
        for (now, was) in found.iter().zip(&*before) {
            assert!(
                *now == 0 || now == was,
                "{}: discard in {range:#x?}",
                self.name
            );
        }
        before.copy_from_slice(&found);
    }
}

/// Reads, and asks where things are, for as long as others change them.
fn watch(chain: &Chain, stop: &AtomicBool, name: &str, thread: usize) {
    let mut rng = Seeded::new(&format!("{name} reads {thread}"));
    let mut buf = vec![0; 70_000];
    while !stop.load(Ordering::Relaxed) {
        let at = rng.u64(0..SIZE);
        let count = rng.u64(1..=(SIZE - at).min(buf.len() as u64));
        let buf = &mut buf[..len(count)];
        chain.read_at(buf, at).expect("nothing is wrong");
        for (at, byte) in (at..).zip(&*buf) {
            assert!(
                [0, first(at), second(at)].contains(byte),
                "{name}: nobody wrote the {byte:#04x} at {at:#x}"
            );
        }
        let mut next = at;
        for extent in chain.extents(at..at + count).expect("inside") {
            let extent = extent.expect("nothing is wrong");
            assert!(extent.len > 0 && extent.start == next, "{name}: {extent:?}");
            next = extent.end();
        }
    }
}

/// Stops the readers once the last writer has ended, also where it panicked.
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

fn race(shape: &Shape) {
    let (name, disk) = (shape.name, shape.filled());
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    let unit = chain.top().cluster_size().unwrap_or(4096).max(4096);
    let before = bytes(&(0..SIZE), first);
    let (stop, running) = (AtomicBool::new(false), AtomicUsize::new(WRITERS));
    let views: Vec<Vec<u8>> = std::thread::scope(|scope| {
        for thread in 0..READERS {
            let (chain, stop) = (&chain, &stop);
            scope.spawn(move || watch(chain, stop, name, thread));
        }
        let writers: Vec<_> = (0..WRITERS)
            .map(|thread| {
                let (chain, before) = (&chain, before.clone());
                let end = End {
                    stop: &stop,
                    running: &running,
                };
                let rng = Seeded::new(&format!("{name} writes {thread}"));
                scope.spawn(move || {
                    let _end = end;
                    let writer = Writer {
                        chain,
                        name,
                        unit,
                        rng,
                    };
                    writer.run(thread, before)
                })
            })
            .collect();
        let view = |t: std::thread::ScopedJoinHandle<'_, _>| t.join().expect("it ends well");
        writers.into_iter().map(view).collect()
    });
    let mut expected = before;
    for (index, start) in (0..SIZE).step_by(len(unit)).enumerate() {
        let part = len(start)..len((start + unit).min(SIZE));
        expected[part.clone()].copy_from_slice(&views[index % WRITERS][part]);
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
fn readers_beside_writers_that_change_what_clusters_are_see_no_error_and_no_wrong_byte() {
    for shape in shapes() {
        race(&shape);
    }
}

/// A writer unwinds while it fills space for the bytes at `at`; the next one is served.
fn unwinds(shape: &Shape, at: u64, before: impl Fn(&Chain)) {
    let (name, disk) = (shape.name, shape.filled());
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    before(&chain);
    let mut expected = read_all(&chain);
    let mut asked = false;
    let unwound = catch_unwind(AssertUnwindSafe(|| {
        chain.top().allocate(at, 4096, &mut |_| {
            asked = true;
            resume_unwind(Box::new("a bug"))
        })
    }));
    assert!(unwound.is_err() && asked, "{name}: it was to unwind");
    let chain = Arc::new(chain);
    let (sender, receiver) = channel();
    let next = Arc::clone(&chain);
    std::thread::spawn(move || {
        let written = next.write_at(&[0x5a; 1000], at);
        let zeroed = next.zero(at + 65_536..at + 131_072, Zeroing::MayUnmap);
        let freed = next.discard(at + 65_536..at + 131_072);
        sender.send(written.and(zeroed).and(freed).and(next.flush()))
    });
    let answer = receiver.recv_timeout(PATIENCE);
    answer
        .unwrap_or_else(|_| panic!("{name}: the next writer still waits"))
        .expect("the next writer is served");
    expected[len(at)..len(at) + 1000].fill(0x5a);
    expected[len(at) + 65_536..len(at) + 131_072].fill(0);
    assert_same(&read_all(&chain), &expected, 0, name);
    chain.close().expect("closes");
    drop(chain);
    checks_clean(&disk, name);
    let chain = disk.open(Access::Read, WriteOrder::Ordered);
    assert_same(&read_all(&chain), &expected, 0, name);
}

#[test]
fn a_writer_that_unwinds_leaves_its_clusters_to_the_next() {
    // Blocks on a device keep their space, so none is new.
    let on_device = |shape: &Shape| matches!(shape.place, Place::Device(_));
    for shape in shapes().into_iter().filter(|shape| !on_device(shape)) {
        let freed = |chain: &Chain| chain.discard(0..SIZE).expect("discards");
        match shape.layers.len() {
            // Its blocks keep their space, so new ones are where nothing was yet.
            1 if shape.layers[0].format == "vdi" => {
                let grown = |chain: &Chain| chain.resize(2 * SIZE).expect("grows");
                unwinds(&shape, SIZE + 4096, grown);
            }
            // Holes where there was data.
            1 => unwinds(&shape, 4096, freed),
            // Nothing yet, and then a part of a cluster that has space.
            _ => {
                unwinds(&shape, 4096, |_| {});
                // Those of VDI and VMDK have all of it.
                if ["vdi", "vmdk"].contains(&shape.layers[0].format) {
                    continue;
                }
                unwinds(&shape, 8192, |chain| {
                    chain.write_at(&[7; 512], 16_384 - 512).expect("writes");
                });
            }
        }
        if shape.layers[0].format == "qcow2" && shape.layers.len() == 1 {
            // A compressed cluster that is overwritten.
            unwinds(&shape, 4096, |_| {});
        }
    }
}

//! Small qcow2 images with any byte of their metadata changed and cut anywhere: an error or data,
//! never a panic, a hang, a heap of memory, or guest data over metadata.

use std::ops::Range;
use std::sync::Arc;

use vdtool::storage::Storage;
use vdtool::storage::memory::MemoryStorage;
use vdtool::storage::open::Access;

use crate::layers::LayerSpec;
use crate::mutate::{EDGES, Expect, Sample};

const SIZE: u64 = 40 * 1024 + 512;

fn layer(format: &'static str, options: &'static str) -> LayerSpec {
    LayerSpec {
        format,
        options,
        size: SIZE,
    }
}

fn samples() -> Vec<Sample> {
    let small = layer("qcow2", "cluster_size=512");
    let extended = layer("qcow2", "cluster_size=16k,extended_l2=on");
    let old = layer("qcow2", "cluster_size=4k,compat=0.10");
    vec![
        Sample::new("qcow2 512", &[small]),
        Sample::new("qcow2 extended", &[extended]),
        Sample::new("qcow2 version 2 over raw", &[old, layer("raw", "")]),
    ]
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn place(value: u64) -> usize {
    usize::try_from(value & 0x00ff_ffff_ffff_fe00).expect("small")
}

/// Where metadata is, as the sound image has it.
struct Metadata {
    l1: usize,
    l1_len: usize,
    refcount_table: usize,
    refcount_block: usize,
    cluster: usize,
}

impl Metadata {
    fn of(bytes: &[u8]) -> Self {
        let number = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four"));
        let refcount_table = place(word(bytes, 48));
        Self {
            l1: place(word(bytes, 40)),
            l1_len: number(36) as usize,
            refcount_table,
            refcount_block: place(word(bytes, refcount_table)),
            cluster: 1 << number(20),
        }
    }

    fn l2(&self, bytes: &[u8]) -> usize {
        let tables = (0..self.l1_len).map(|i| place(word(bytes, self.l1 + i * 8)));
        tables
            .filter(|host| *host != 0)
            .min()
            .expect("there is one")
    }
}

fn set(sample: &Sample, at: usize, value: u64) -> Vec<u8> {
    let mut bytes = sample.bytes.clone();
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
    bytes
}

#[test]
fn a_changed_byte_in_the_header_of_a_qcow2_never_panics() {
    for sample in samples() {
        sample.flip(0..112, Expect::Any);
        // The extensions: lengths above all.
        sample.flip(112..128, Expect::Any);
    }
}

#[test]
fn header_fields_of_a_qcow2_at_their_edges_never_panic() {
    for sample in samples() {
        let file = sample.bytes.len() as u64;
        for at in [8, 24, 40, 48, 64, 72, 80, 88] {
            for value in EDGES.into_iter().chain([file - 512, file, file + 512]) {
                let bytes = set(&sample, at, value);
                sample.exercise(&bytes, Expect::Any, &|| format!("{at} is {value:#x}"));
            }
        }
        for at in [4, 16, 20, 32, 36, 56, 60, 96, 100] {
            for value in EDGES.into_iter().filter(|v| *v < 1 << 32) {
                let mut bytes = sample.bytes.clone();
                bytes[at..at + 4].copy_from_slice(&value.to_be_bytes()[4..]);
                sample.exercise(&bytes, Expect::Any, &|| format!("{at} is {value:#x}"));
            }
        }
    }
}

#[test]
fn a_changed_byte_in_the_tables_of_a_qcow2_never_panics() {
    for sample in samples() {
        let metadata = Metadata::of(&sample.bytes);
        let l2 = metadata.l2(&sample.bytes);
        for start in [
            metadata.l1,
            l2,
            metadata.refcount_table,
            metadata.refcount_block,
        ] {
            sample.flip(start..start + 24, Expect::Any);
        }
    }
}

/// Offsets and flags that a table's entry may have.
fn entries(metadata: &Metadata, bytes: &[u8]) -> Vec<u64> {
    let clusters = (0..bytes.len() + 2 * metadata.cluster).step_by(metadata.cluster.max(4096));
    let mut offsets: Vec<u64> = clusters.map(|at| at as u64).collect();
    offsets.extend(EDGES);
    for at in [
        metadata.l1,
        metadata.l2(bytes),
        metadata.refcount_table,
        metadata.refcount_block,
    ] {
        offsets.push(at as u64);
    }
    let flags = [0, 1 << 63, 1 << 62, 1 << 63 | 1];
    let with = |offset: &u64| flags.map(|flag| offset | flag);
    offsets.iter().flat_map(with).collect()
}

#[test]
fn entries_of_a_qcow2_anywhere_never_panic_and_never_let_data_over_metadata() {
    for sample in samples() {
        let metadata = Metadata::of(&sample.bytes);
        let l2 = metadata.l2(&sample.bytes);
        for value in entries(&metadata, &sample.bytes) {
            for at in [metadata.l1, l2, l2 + 16, metadata.refcount_table] {
                let bytes = set(&sample, at, value);
                let what = || format!("the entry at {at:#x} is {value:#x}");
                sample.exercise(&bytes, Expect::Any, &what);
                metadata_stays(&sample, &bytes, &metadata, &what);
            }
        }
    }
}

/// Writes of one byte value, all over the disk, are nowhere in what was metadata before.
fn metadata_stays(sample: &Sample, bytes: &[u8], metadata: &Metadata, what: &dyn Fn() -> String) {
    let storage = Arc::new(MemoryStorage::from_bytes(bytes));
    let Ok(chain) = sample.open(&storage, Access::Write) else {
        return;
    };
    for at in (0..chain.virtual_size() - 700).step_by(1900) {
        let _ = chain.write_at(&[0x5a; 700], at);
    }
    drop(chain);
    let parts: [Range<usize>; 3] = [
        0..112,
        metadata.l1..metadata.l1 + metadata.l1_len * 8,
        metadata.refcount_table..metadata.refcount_table + 64,
    ];
    for part in parts {
        let mut now = vec![0; part.len()];
        storage.read_at(&mut now, part.start as u64).expect("reads");
        let over = now.windows(8).any(|w| w == [0x5a; 8]);
        assert!(!over, "{}: {}: data in {part:#x?}", sample.name, what());
    }
}

#[test]
fn a_qcow2_cut_anywhere_gives_an_error_or_data() {
    for sample in samples() {
        let metadata = Metadata::of(&sample.bytes);
        // A cluster of data may be there in part, as writers leave the last one; not a table.
        let near = |at: usize| at - 1..at + 1;
        let mut ranges = vec![0..60, 60..130];
        for start in [
            metadata.l1,
            metadata.l2(&sample.bytes),
            metadata.refcount_table,
            metadata.refcount_block,
        ] {
            ranges.push(near(start));
            ranges.push(near(start + 17));
            ranges.push(near(start + metadata.cluster));
        }
        sample.cut(&ranges);
        sample.append();
    }
}

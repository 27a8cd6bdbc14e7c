//! Guest data never goes over metadata, whatever tables and refcounts say.

use std::sync::Arc;

use vdtool::chain::Chain;
use vdtool::image::bitmap::Recording;
use vdtool::image::open::WriteOrder;
use vdtool::storage::memory::MemoryStorage;
use vdtool::storage::open::Access;

use crate::layers::{Disk, LayerSpec, Place};

const CLUSTER: u64 = 512;
const COPIED: u64 = 1 << 63;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// What the guest writes; no metadata looks like it.
const DATA: [u8; 512] = [0x5a; 512];

fn at(offset: u64) -> usize {
    usize::try_from(offset).expect("small")
}

fn word(bytes: &[u8], offset: u64) -> u64 {
    let offset = at(offset);
    u64::from_be_bytes(bytes[offset..offset + 8].try_into().expect("eight bytes"))
}

fn put(bytes: &mut [u8], offset: u64, word: u64) {
    let offset = at(offset);
    bytes[offset..offset + 8].copy_from_slice(&word.to_be_bytes());
}

/// Where the entry of a guest offset is in the file.
fn entry(bytes: &[u8], guest: u64) -> u64 {
    let per_table = CLUSTER / 8;
    let index = guest / CLUSTER;
    let table = word(bytes, word(bytes, 40) + index / per_table * 8) & OFFSET;
    assert_ne!(table, 0, "the test wrote there before");
    table + index % per_table * 8
}

fn set_refcount(bytes: &mut [u8], host: u64, count: u16) {
    let cluster = host / CLUSTER;
    let block = word(bytes, word(bytes, 48) + cluster / (CLUSTER / 2) * 8) & OFFSET;
    let offset = at(block + cluster % (CLUSTER / 2) * 2);
    bytes[offset..offset + 2].copy_from_slice(&count.to_be_bytes());
}

/// The data of the bitmaps extension: count, length, offset of the directory.
fn directory(bytes: &[u8]) -> u64 {
    let kind = 0x2385_2875_u32.to_be_bytes();
    let found = bytes[..512].windows(4).position(|w| w == kind);
    word(bytes, found.expect("is there") as u64 + 8 + 16)
}

/// A disk with data, a snapshot, of which some tables are its own, and a bitmap that has bits.
fn sample() -> Vec<u8> {
    let spec = LayerSpec {
        format: "qcow2",
        options: "cluster_size=512",
        size: 2 << 20,
    };
    let disk = Disk::create(Place::Memory, &[spec]);
    let mut chain = disk.open(Access::Write, WriteOrder::Ordered);
    chain.write_at(&[1; 60_000], 0).expect("writes");
    let snapshots = chain.top_mut().as_snapshots().expect("has some");
    let now = std::time::SystemTime::UNIX_EPOCH;
    snapshots.create("one".as_ref(), now).expect("creates");
    let bitmaps = chain.top_mut().as_bitmaps().expect("has some");
    bitmaps
        .add("b".as_ref(), Some(512), Recording::On)
        .expect("adds");
    chain.write_at(&[2; 60_000], 0).expect("writes");
    chain.close().expect("closes");
    disk.memory()[0].to_bytes()
}

/// What may not be written over, by name.
fn metadata(bytes: &[u8]) -> Vec<(&'static str, u64)> {
    let snapshot_table = word(bytes, 64);
    let snapshot_l1 = word(bytes, snapshot_table);
    let bitmap_table = word(bytes, directory(bytes));
    let reftable = word(bytes, 48);
    vec![
        ("header", 0),
        ("L1 table", word(bytes, 40)),
        ("L2 table", word(bytes, word(bytes, 40)) & OFFSET),
        ("refcount table", reftable),
        ("refcount block", word(bytes, reftable)),
        ("snapshot table", snapshot_table),
        ("L1 table of the snapshot", snapshot_l1),
        (
            "L2 table of the snapshot",
            word(bytes, snapshot_l1) & OFFSET,
        ),
        ("bitmap directory", directory(bytes)),
        ("table of the bitmap", bitmap_table),
        ("bits of the bitmap", word(bytes, bitmap_table) & OFFSET),
    ]
}

fn open(bytes: &[u8]) -> (Disk, Arc<MemoryStorage>, vdtool::Result<Chain>) {
    let disk = Disk::of_bytes("qcow2", bytes);
    let memory = disk.memory()[0].clone();
    let storages = vec![memory.clone() as Arc<dyn vdtool::storage::Storage>];
    let chain = disk.try_open_with(storages, Access::Write, WriteOrder::Ordered);
    (disk, memory, chain)
}

/// The file has no guest data in the cluster at `host`.
fn untouched(memory: &MemoryStorage, host: u64, what: &str) {
    let now = memory.to_bytes();
    let cluster = &now[at(host)..at(host + CLUSTER)];
    assert!(!cluster.windows(16).any(|w| w == [0x5a; 16]), "{what}");
}

#[test]
fn an_entry_that_points_at_any_metadata_is_not_written_through() {
    let sound = sample();
    for (what, host) in metadata(&sound) {
        let guest = 30 * CLUSTER;
        let mut bytes = sound.clone();
        let place = entry(&bytes, guest);
        put(&mut bytes, place, host | COPIED);
        let (_disk, memory, chain) = open(&bytes);
        let Ok(chain) = chain else { continue };
        for at in [guest, guest + 100] {
            let done = chain.write_at(&DATA[..300], at);
            assert!(done.is_err(), "{what}: {done:?}");
        }
        let zeroed = chain.zero(guest..guest + 512, vdtool::storage::Zeroing::KeepSpace);
        untouched(&memory, host, what);
        // Zeroing by metadata may be done: it lets go of the cluster, but does not give it back.
        if zeroed.is_ok() {
            for round in 0..200 {
                let _ = chain.write_at(&DATA, (1 << 20) + round * CLUSTER);
            }
            untouched(&memory, host, what);
        }
    }
}

#[test]
fn a_run_of_clusters_that_goes_on_into_metadata_is_written_as_far_as_that() {
    let sound = sample();
    for (what, host) in metadata(&sound) {
        let guest = 30 * CLUSTER;
        let mut bytes = sound.clone();
        for (cluster, host) in [(30, host.saturating_sub(CLUSTER)), (31, host)] {
            let place = entry(&bytes, cluster * CLUSTER);
            put(&mut bytes, place, host | COPIED);
        }
        let (_disk, memory, chain) = open(&bytes);
        let Ok(chain) = chain else { continue };
        // The first change of all looks at each cluster by itself.
        chain.write_at(&DATA, 0).expect("is elsewhere");
        let done = chain.write_at(&[DATA, DATA].concat(), guest);
        assert!(done.is_err(), "{what}: {done:?}");
        untouched(&memory, host, what);
    }
}

#[test]
fn an_entry_behind_the_end_of_the_file_names_nothing_that_comes_there_later() {
    let sound = sample();
    let end = sound.len() as u64;
    let (stale, other) = (30 * CLUSTER, 1 << 20);
    for (ahead, compressed) in [(0, 0), (1, 0), (3, 0), (8, 0), (1, 1u64 << 62)] {
        let mut bytes = sound.clone();
        let place = entry(&bytes, stale);
        let flags = if compressed == 0 { COPIED } else { compressed };
        put(&mut bytes, place, (end + ahead * CLUSTER) | flags);
        let (_disk, _, chain) = open(&bytes);
        let chain = chain.expect("is not looked through");
        chain
            .write_at(&[7; 20_000], other)
            .expect("has a table of its own");
        let mut found = [0; 512];
        let read = chain.read_at(&mut found, stale);
        assert!(read.is_err(), "{ahead}: {read:?}");
        assert!(chain.write_at(&DATA, stale).is_err(), "{ahead}");
        let mut found = [0; 20_000];
        chain.read_at(&mut found, other).expect("reads");
        assert!(found == [7; 20_000], "{ahead}");
    }
}

#[test]
fn metadata_whose_refcount_says_that_it_is_free_is_not_taken() {
    let sound = sample();
    for (what, host) in metadata(&sound) {
        let mut bytes = sound.clone();
        set_refcount(&mut bytes, host, 0);
        let (_disk, memory, chain) = open(&bytes);
        let Ok(chain) = chain else { continue };
        let mut refused = 0;
        // Far apart, so that tables, bitmap clusters and refcount blocks are made, too.
        for round in 0..400 {
            let at = (round * 37 * CLUSTER) % ((2 << 20) - 512);
            refused += usize::from(chain.write_at(&DATA, at).is_err());
        }
        let _ = chain.close();
        untouched(&memory, host, what);
        assert!(refused > 0, "{what}: the damage was met");
        assert!(refused < 100, "{what}: and was passed: {refused}");
        let after = memory.to_bytes();
        assert_eq!(
            after[at(host)..at(host) + 8] == bytes[at(host)..at(host) + 8],
            // The bitmap's bits and the tables in use do change, by themselves.
            after[at(host)..at(host) + 8] == sound[at(host)..at(host) + 8],
            "{what}"
        );
    }
}

#[test]
fn a_refcount_block_made_after_the_first_write_is_guarded_too() {
    let sound = sample();
    let writes = |chain: &Chain| -> Vec<vdtool::Result<()>> {
        let write = |i: u64| chain.write_at(&[0x77; 512], (1 << 20) + i * CLUSTER);
        (0..1500).map(write).collect()
    };
    // Where the blocks will be.
    let (_disk, memory, chain) = open(&sound);
    let chain = chain.expect("opens");
    assert!(writes(&chain).iter().all(Result::is_ok));
    let later = memory.to_bytes();
    let table = word(&later, 48);
    let before = word(&sound, 48);
    let blocks: Vec<u64> = (0..60).map(|i| word(&later, table + i * 8)).collect();
    let known: Vec<u64> = (0..60).map(|i| word(&sound, before + i * 8)).collect();
    let new: Vec<u64> = blocks
        .into_iter()
        .filter(|b| *b != 0 && !known.contains(b))
        .collect();
    assert!(new.len() > 2, "{new:x?}");
    for host in new {
        let guest = 30 * CLUSTER;
        let mut bytes = sound.clone();
        let place = entry(&bytes, guest);
        put(&mut bytes, place, host | COPIED);
        let (_disk, memory, chain) = open(&bytes);
        let chain = chain.expect("opens");
        writes(&chain);
        let done = chain.write_at(&DATA, guest);
        assert!(done.is_err(), "{host:#x}: {done:?}");
        untouched(&memory, host, "refcount block");
    }
}

#[test]
fn tables_that_overlap_keep_an_image_from_being_written() {
    let sound = sample();
    let all = metadata(&sound);
    let place = |name: &str| all.iter().find(|(n, _)| *n == name).expect("is there").1;
    let pointers = [
        ("snapshot table", 64),
        ("L1 table of the snapshot", place("snapshot table")),
        ("table of the bitmap", directory(&sound)),
    ];
    for (what, field) in pointers {
        for (other, host) in &all {
            if *other == what || *other == "header" {
                continue;
            }
            let mut bytes = sound.clone();
            put(&mut bytes, field, *host);
            let (_disk, memory, chain) = open(&bytes);
            let Ok(chain) = chain else { continue };
            let done = chain.write_at(&DATA, 0);
            // Two tables of snapshots may be one; what they point at is not known to be alone.
            let shared = matches!(*other, "L2 table of the snapshot" | "bits of the bitmap");
            assert!(done.is_err() || shared, "{what} at the {other}");
            untouched(&memory, *host, what);
        }
    }
}

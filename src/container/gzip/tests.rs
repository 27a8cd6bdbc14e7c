//! Files by an encoder, put together and damaged by hand.

use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};

use flate2::Compression;
use flate2::write::GzEncoder;

use super::*;
use crate::storage::memory::MemoryStorage;
use crate::util::progress::Progress;

fn gz(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).expect("memory has room");
    encoder.finish().expect("memory has room")
}

fn open(bytes: &[u8]) -> Result<Gunzipped> {
    Gunzipped::open(
        Arc::new(MemoryStorage::from_bytes(bytes)),
        u64::MAX,
        &Watcher::default(),
    )
}

/// Bytes that deflate makes shorter, but not by much.
fn content(len: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 56).to_le_bytes()[0] & 63
    };
    (0..len).map(|_| next()).collect()
}

#[test]
fn every_offset_reads_as_what_was_compressed() {
    let expected = content(9 << 20);
    let cut = 5 << 20;
    // Of several members, one of them empty, and with padding.
    let file = [
        gz(&expected[..cut]),
        gz(b""),
        gz(&expected[cut..]),
        vec![0; 1000],
    ]
    .concat();
    let storage = open(&file).expect("is right");
    assert_eq!(storage.size(), expected.len() as u64);
    assert!(storage.points.len() > 6, "{}", storage.points.len());
    let mut buf = vec![0; 300_000];
    let mut at = 0;
    for step in 0..200 {
        // Forward, back, over the seams of pieces and of members.
        at = (at + 2_097_143 * (step % 5 + 1)) % expected.len();
        let len = buf.len().min(expected.len() - at);
        storage.read_at(&mut buf, at as u64).expect("reads");
        assert!(buf[..len] == expected[at..at + len], "{at}");
        assert!(buf[len..].iter().all(|b| *b == 0));
    }
    let mut all = vec![1; expected.len() + 10];
    storage.read_at(&mut all, 0).expect("reads");
    assert!(all[..expected.len()] == expected);
}

#[test]
fn threads_read_at_the_same_time() {
    let expected = content(3 << 20);
    let storage = open(&gz(&expected)).expect("is right");
    std::thread::scope(|scope| {
        for thread in 0..4usize {
            let (storage, expected) = (&storage, &expected);
            scope.spawn(move || {
                let mut buf = vec![0; 70_000];
                for step in 0..40 {
                    let at = (step * 4 + thread) * 17_001 % (expected.len() - buf.len());
                    storage.read_at(&mut buf, at as u64).expect("reads");
                    assert!(buf == expected[at..at + buf.len()]);
                }
            });
        }
    });
}

#[test]
fn places_to_go_on_from_are_bounded_however_long_it_is() {
    let memory = |bytes: &[u8]| Arc::new(MemoryStorage::from_bytes(bytes));
    let file = gz(&vec![0; 1 << 20]).repeat(40);
    // Pieces are as long as the least spacing.
    let storage =
        Gunzipped::spaced(memory(&file), u64::MAX, 1, &Watcher::default()).expect("is right");
    assert_eq!(storage.size(), 40 << 20);
    assert!(storage.points.len() > 100, "{}", storage.points.len());
    let file = gz(&vec![0; 1 << 20]).repeat(160);
    let storage =
        Gunzipped::spaced(memory(&file), u64::MAX, 1, &Watcher::default()).expect("is right");
    assert!(
        storage.points.len() <= MAX_POINTS,
        "{}",
        storage.points.len()
    );
    assert!(
        storage.points.len() > MAX_POINTS / 4,
        "{}",
        storage.points.len()
    );
    let error = Gunzipped::open(memory(&file), 20 << 20, &Watcher::default());
    assert_eq!(error.expect_err("is more").kind(), ErrorKind::OutOfRange);
}

#[test]
fn what_is_damaged_or_cut_is_refused_when_it_is_opened() {
    let file = gz(&content(100_000));
    for len in [11, 500, file.len() - 9, file.len() - 8, file.len() - 1] {
        let error = open(&file[..len]).expect_err("was cut");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{len}: {error}");
    }
    for at in [5000, file.len() - 3, file.len() - 7] {
        let mut file = file.clone();
        file[at] ^= 0x10;
        let error = open(&file).expect_err("is damaged");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{at}: {error}");
    }
    for more in [&b"x"[..], b"\0\0x", &file[..5], &file[..100]] {
        let error = open(&[&file, more].concat()).expect_err("has more");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    }
    for none in [&b""[..], b"PK", &[0; 100]] {
        let error = open(none).expect_err("is none");
        assert_eq!(error.kind(), ErrorKind::WrongFormat, "{error}");
    }
}

/// Counts, and stops after so many bytes.
struct Until(AtomicU64, u64);

impl Progress for Until {
    fn advance(&self, bytes: u64) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }

    fn cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed) >= self.1
    }
}

#[test]
fn who_waits_for_it_to_be_opened_is_told_how_far_it_is_and_may_stop_it() {
    let file = gz(&content(4 << 20));
    let memory = Arc::new(MemoryStorage::from_bytes(&file));
    let all = Arc::new(Until(AtomicU64::new(0), u64::MAX));
    let watcher = Watcher::new(all.clone());
    Gunzipped::open(memory.clone(), u64::MAX, &watcher).expect("is right");
    assert_eq!(all.0.load(Ordering::Relaxed), file.len() as u64);
    let some = Arc::new(Until(AtomicU64::new(0), 1 << 20));
    let error = Gunzipped::open(memory, u64::MAX, &Watcher::new(some.clone()));
    assert_eq!(error.expect_err("stops").kind(), ErrorKind::Cancelled);
    assert!(some.0.load(Ordering::Relaxed) < 2 << 20);
}

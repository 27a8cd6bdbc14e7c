//! Random sessions, threads, crashes, full disks.

use std::sync::Arc;

use uuid::Uuid;
use vdtool::chain::Chain;
use vdtool::image::check::Repair;
use vdtool::image::open::WriteOrder;
use vdtool::image::{Source, Wait};
use vdtool::storage::Zeroing;
use vdtool::storage::memory::{Change, Fault, MemoryStorage, Op};

use super::{BLOCK, chain, check, content, create, dynamic};

/// A random session on `chain` against a model; what the model must hold at the end.
fn session(chain: &Chain, model: &mut [u8], rng: &mut fastrand::Rng, steps: usize) {
    let size = model.len();
    for _ in 0..steps {
        let start = rng.usize(0..size);
        let len = match rng.u8(0..4) {
            0 => rng.usize(1..=size - start),
            1 => rng.usize(1..=600.min(size - start)),
            _ => rng.usize(1..=20_000.min(size - start)),
        };
        let (at, part) = (start as u64, start..start + len);
        let range = at..at + len as u64;
        match rng.u8(0..12) {
            0..6 => {
                let bytes: Vec<u8> = (0..len).map(|_| rng.u8(..)).collect();
                chain.write_at(&bytes, at).expect("writes");
                model[part].copy_from_slice(&bytes);
            }
            6 => {
                chain.zero(range, Zeroing::MayUnmap).expect("zeroes");
                model[part].fill(0);
            }
            7 => {
                chain.zero(range, Zeroing::KeepSpace).expect("zeroes");
                model[part].fill(0);
            }
            8 => {
                chain.discard(range).expect("discards");
                // Each byte reads as zero or as before.
                let mut now = vec![0; len];
                chain.read_at(&mut now, at).expect("reads");
                for (now, was) in now.iter().zip(&mut model[part]) {
                    assert!(*now == 0 || now == was);
                    *was = *now;
                }
            }
            9 => chain.flush().expect("flushes"),
            _ => {
                let mut now = vec![0; len];
                chain.read_at(&mut now, at).expect("reads");
                assert!(now == model[part], "differs in {range:#x?}");
            }
        }
    }
}

#[test]
fn a_random_session_reads_what_it_wrote_across_reopening() {
    for seed in 0..6 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let size = 300_000 / 512 * 512;
        let base = dynamic(size);
        let middle = create(size, &["block_size=16k"], Some(Uuid::new_v4()));
        let top = create(size, &["block_size=32k"], Some(Uuid::new_v4()));
        let layers: &[&Arc<MemoryStorage>] = match seed % 3 {
            0 => &[&base],
            1 => &[&middle, &base],
            _ => &[&top, &middle, &base],
        };
        let order = match seed % 2 {
            0 => WriteOrder::Ordered,
            _ => WriteOrder::Unordered,
        };
        let mut model = vec![0; usize::try_from(size).expect("small")];
        for depth in (0..layers.len()).rev() {
            for _ in 0..4 {
                let chain = chain(&layers[depth..], order);
                session(&chain, &mut model, &mut rng, 150);
                chain.close().expect("closes");
                let report = check(layers[depth], Repair::Nothing);
                assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
            }
        }
        assert!(content(&chain(layers, order)) == model, "seed {seed}");
    }
}

#[test]
fn writers_from_many_threads_lose_nothing() {
    for parent in [None, Some(Uuid::new_v4())] {
        let size = 64 * BLOCK;
        let base = dynamic(size);
        let top = create(size, &["block_size=16k"], parent);
        let layers: &[&Arc<MemoryStorage>] = match parent {
            None => &[&top],
            Some(_) => &[&top, &base],
        };
        let chain = chain(layers, WriteOrder::Ordered);
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let chain = &chain;
                scope.spawn(move || {
                    // Neighbouring 200-byte pieces go to different threads.
                    for piece in (thread..size / 200).step_by(4) {
                        let byte = u8::try_from(piece % 251).expect("small") + 1;
                        chain.write_at(&[byte; 200], piece * 200).expect("writes");
                    }
                });
            }
        });
        chain.close().expect("closes");
        let bytes = content(&chain);
        for piece in 0..size / 200 {
            let at = usize::try_from(piece * 200).expect("small");
            let byte = u8::try_from(piece % 251).expect("small") + 1;
            assert!(bytes[at..at + 200].iter().all(|b| *b == byte), "{piece}");
        }
        let report = check(&top, Repair::Nothing);
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
    }
}

#[test]
fn threads_that_free_and_write_blocks_keep_them_apart() {
    let size = 64 * BLOCK;
    let storage = dynamic(size);
    let chain = chain(&[&storage], WriteOrder::Ordered);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let chain = &chain;
            scope.spawn(move || {
                let mut rng = fastrand::Rng::with_seed(thread);
                // Each thread has blocks of its own.
                for round in 0..300u64 {
                    let at = (rng.u64(0..16) * 4 + thread) * BLOCK;
                    let byte = u8::try_from(round % 250).expect("small") + 1;
                    let mut buf = vec![byte; usize::try_from(BLOCK).expect("small")];
                    chain.write_at(&buf, at).expect("writes");
                    if rng.bool() {
                        chain.discard(at..at + BLOCK).expect("discards");
                        buf.fill(0);
                    }
                    let mut now = vec![1; buf.len()];
                    chain.read_at(&mut now, at).expect("reads");
                    assert!(now == buf);
                    if round % 32 == 0 {
                        chain.flush().expect("flushes");
                    }
                }
            });
        }
    });
    chain.close().expect("closes");
    let report = check(&storage, Repair::Nothing);
    assert_eq!(report.corruptions, 0, "{report:?}");
}

/// What a crash may leave: the first `prefix` changes, but for some of those after the last sync.
fn crashed(before: &[u8], changes: &[Change], drop: impl Fn(usize) -> bool) -> Arc<MemoryStorage> {
    let storage = Arc::new(MemoryStorage::from_bytes(before));
    let synced = changes
        .iter()
        .rposition(|c| *c == Change::Sync)
        .unwrap_or(0);
    for (i, change) in changes.iter().enumerate() {
        if i < synced || !drop(i) {
            storage.apply(change);
        }
    }
    storage
}

/// The disk after a step: how many changes of the file it took, whether they were flushed.
struct Step {
    changes: usize,
    flushed: bool,
    model: Vec<u8>,
}

/// Whether every byte is as some step from the last flushed one on left it.
fn holds(now: &[u8], steps: &[Step], prefix: usize, killed: bool) -> bool {
    let done = steps.iter().rposition(|s| s.changes <= prefix).unwrap_or(0);
    let first = match killed {
        // A kill loses nothing acknowledged.
        true => done,
        false => (0..=done).rev().find(|i| steps[*i].flushed).unwrap_or(0),
    };
    let last = (done + 1).min(steps.len() - 1);
    (0..now.len()).all(|i| steps[first..=last].iter().any(|s| s.model[i] == now[i]))
}

/// One random write, zeroing or discard of a session of which every crash is tried.
fn step(chain: &Chain, model: &mut [u8], rng: &mut fastrand::Rng) {
    let block = rng.u64(0..12);
    let (at, len) = match rng.u8(0..5) {
        0 => (block * BLOCK, BLOCK),
        1 => (block * BLOCK + 1000, 700),
        2 => (block * BLOCK + 4096, 4096),
        _ => (block * BLOCK, rng.u64(1..BLOCK)),
    };
    let part = usize::try_from(at).expect("small")..usize::try_from(at + len).expect("small");
    if rng.u8(0..4) == 0 {
        chain.zero(at..at + len, Zeroing::MayUnmap).expect("zeroes");
        model[part].fill(0);
    } else {
        let byte = rng.u8(1..);
        chain.write_at(&vec![byte; part.len()], at).expect("writes");
        model[part].fill(byte);
    }
}

#[test]
fn every_crash_leaves_an_image_that_opens_and_holds_what_was_flushed() {
    for (seed, parent) in [(1, None), (2, Some(Uuid::new_v4())), (3, None)] {
        let mut rng = fastrand::Rng::with_seed(seed);
        let size = 12 * BLOCK;
        let base = dynamic(size);
        let top = create(size, &["block_size=16k"], parent);
        let mut model = vec![0u8; usize::try_from(size).expect("small")];
        if parent.is_some() {
            let below = chain(&[&base], WriteOrder::Ordered);
            session(&below, &mut model, &mut rng, 30);
            below.close().expect("closes");
        }
        let with_base = |top: &Arc<MemoryStorage>| match parent {
            None => chain(&[top], WriteOrder::Ordered),
            Some(_) => chain(&[top, &base], WriteOrder::Ordered),
        };
        let before = top.to_bytes();
        top.record();
        let mut steps = vec![Step {
            changes: 0,
            flushed: true,
            model: model.clone(),
        }];
        let written = with_base(&top);
        for i in 0..20 {
            step(&written, &mut model, &mut rng);
            let flushed = i % 3 == 0;
            if flushed {
                written.flush().expect("flushes");
            }
            let (changes, model) = (top.changes().len(), model.clone());
            steps.push(Step {
                changes,
                flushed,
                model,
            });
        }
        written.close().expect("closes");
        let changes = top.changes();
        for prefix in 0..=changes.len() {
            for pattern in 0..3 {
                let mut dice = fastrand::Rng::with_seed(prefix as u64 * 4 + pattern);
                let dropped: Vec<bool> = (0..prefix).map(|_| dice.bool()).collect();
                let left = crashed(&before, &changes[..prefix], |i| pattern > 0 && dropped[i]);
                let what = format!("seed {seed} prefix {prefix} pattern {pattern}");
                let report = check(&left, Repair::Nothing);
                assert_eq!(report.corruptions, 0, "{what}: {report:?}");
                let now = content(&with_base(&left));
                assert!(holds(&now, &steps, prefix, pattern == 0), "{what}");
            }
        }
    }
}

#[test]
fn a_full_disk_leaves_the_mapping_as_it_was() {
    let size = 40 * BLOCK;
    for after in 0..6 {
        let storage = dynamic(size);
        let chain = chain(&[&storage], WriteOrder::Ordered);
        chain.write_at(&[1; 5000], 0).expect("writes");
        storage.inject(Fault {
            op: Op::Change,
            after,
            // Less is asked for, and what is held is given back, before it is full.
            count: 12,
            errno: libc::ENOSPC,
        });
        let mut failed = false;
        for block in 1..20 {
            failed |= chain.write_at(&[2; 3000], block * BLOCK).is_err();
        }
        assert!(failed);
        storage.heal();
        for block in 1..20 {
            chain.write_at(&[3; 4000], block * BLOCK).expect("writes");
        }
        chain.close().expect("closes");
        let bytes = content(&chain);
        assert!(bytes[..5000].iter().all(|b| *b == 1));
        for block in 1..20 {
            let at = usize::try_from(block * BLOCK).expect("small");
            assert!(bytes[at..at + 4000].iter().all(|b| *b == 3));
            assert!(bytes[at + 4000..at + 8000].iter().all(|b| *b == 0));
        }
        assert_eq!(check(&storage, Repair::Nothing).corruptions, 0);
    }
}

#[test]
fn a_failed_sync_is_the_failure_of_the_write_that_needed_it() {
    let storage = dynamic(4 * BLOCK);
    let chain = chain(&[&storage], WriteOrder::Ordered);
    storage.inject(Fault {
        op: Op::Sync,
        after: 1,
        count: 1,
        errno: libc::EIO,
    });
    chain
        .write_at(&[1; 512], 0)
        .expect_err("was not made durable");
    assert!(content(&chain).iter().all(|b| *b == 0));
    chain
        .write_at(&[1; 512], 0)
        .expect_err("nor is a later one");
    chain.flush().expect_err("until it is opened anew");
    chain.close().expect_err("as it is");
    drop(chain);
    storage.open_anew();
    let chain = self::chain(&[&storage], WriteOrder::Ordered);
    chain.write_at(&[1; 512], 0).expect("is made durable");
    chain.flush().expect("flushes");
    let run = chain.top().map(0, 512, Wait::Yes).expect("maps");
    assert!(matches!(run.source, Source::Stored { writable: true, .. }));
}

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::chain::Base;
use crate::formats::raw;
use crate::image::open::OpenOptions;
use crate::storage::memory::{Fault, MemoryStorage, Op};
use crate::storage::open::Access;

const QUEUE: QueueId = QueueId(0);

fn chain(storage: Arc<MemoryStorage>, access: Access) -> Chain {
    let options = OpenOptions {
        access,
        ..OpenOptions::default()
    };
    let image = (raw::DRIVER.open)(storage, &options).expect("raw opens");
    Chain::new(vec![image], Base::Zeroes, options.grace).expect("one layer")
}

fn backend(access: Access) -> Backend {
    Backend::new(chain(
        Arc::new(MemoryStorage::from_bytes(&[5; 4096])),
        access,
    ))
}

fn stopping() -> (Backend, Arc<MemoryStorage>) {
    let storage = Arc::new(MemoryStorage::from_bytes(&[5; 4096]));
    let settings = Settings {
        policy: Policy {
            on_read: OnError::Report,
            on_write: OnError::Enospc,
        },
        ..Settings::default()
    };
    let chain = chain(Arc::clone(&storage), Access::Write);
    let backend = Backend::with_settings(chain, settings).expect("settings make sense");
    (backend, storage)
}

fn write(backend: &Backend, at: u64, bytes: &[u8]) -> Result<()> {
    let request = Request::Write {
        at,
        buf: bytes,
        fua: false,
    };
    backend.submit(QUEUE, request)
}

#[test]
fn requests_past_the_end_are_refused_and_counted_as_invalid() {
    let backend = backend(Access::Write);
    for at in [4096, 4095, u64::MAX] {
        let mut buf = [0; 2];
        let error = backend
            .submit(QUEUE, Request::Read { at, buf: &mut buf })
            .expect_err("past the end");
        assert_eq!(error.kind(), ErrorKind::OutOfRange);
    }
    let totals = backend.totals(Kind::Read);
    assert_eq!(
        (totals.invalid, totals.operations, totals.failed),
        (3, 0, 0)
    );
}

#[test]
fn a_read_only_disk_takes_no_change() {
    let backend = backend(Access::Read);
    let error = backend
        .submit(QUEUE, Request::Discard { range: 0..512 })
        .expect_err("read-only");
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
}

#[test]
fn operations_and_bytes_are_counted() {
    let backend = backend(Access::Write);
    let request = Request::Write {
        at: 0,
        buf: &[1; 100],
        fua: true,
    };
    backend.submit(QUEUE, request).expect("writes");
    backend.submit(QUEUE, Request::Flush).expect("flushes");
    assert_eq!(backend.totals(Kind::Write).bytes, 100);
    assert_eq!(backend.totals(Kind::Flush).operations, 1);
}

#[test]
fn a_full_host_stops_the_disk_until_it_is_resumed_and_the_write_is_made_again() {
    let (backend, storage) = stopping();
    storage.inject(Fault {
        op: Op::Change,
        after: 0,
        count: 1,
        errno: libc::ENOSPC,
    });
    let woken = Arc::new(AtomicU32::new(0));
    let counter = Arc::clone(&woken);
    let _handle = backend.on_wake(move || {
        counter.fetch_add(1, Ordering::SeqCst);
    });
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| write(&backend, 0, &[7; 512]));
        while backend.io_status() == IoStatus::Ok {
            std::thread::yield_now();
        }
        assert_eq!(backend.io_status(), IoStatus::NoSpace);
        let read = Shape {
            kind: Kind::Read,
            range: 0..1,
            fua: false,
        };
        while !matches!(backend.admit(QUEUE, &read), Admission::Held) {
            std::thread::yield_now();
        }
        assert!(!writer.is_finished());
        backend.resume();
        writer.join().expect("ends").expect("is made again");
    });
    assert_eq!(woken.load(Ordering::SeqCst), 1);
    assert_eq!(backend.io_status(), IoStatus::Ok);
    assert_eq!(storage.to_bytes()[..512], [7; 512]);
    assert_eq!(backend.totals(Kind::Write).failed, 1);
}

#[test]
fn a_pause_waits_for_what_is_under_way_and_holds_the_rest() {
    let backend = backend(Access::Write);
    let shape = Shape {
        kind: Kind::Write,
        range: 0..512,
        fua: false,
    };
    let Admission::Admitted(ticket) = backend.admit(QUEUE, &shape) else {
        panic!("nothing holds it");
    };
    std::thread::scope(|scope| {
        let pause = scope.spawn(|| backend.pause());
        while !matches!(backend.admit(QUEUE, &shape), Admission::Held) {
            std::thread::yield_now();
        }
        assert!(!pause.is_finished());
        let verdict = backend.complete(ticket, Ok(()));
        assert!(matches!(verdict, Verdict::Answer(Ok(()))));
        pause.join().expect("ends");
    });
    backend.resume();
    write(&backend, 0, &[1; 512]).expect("goes on");
}

#[test]
fn a_disk_that_is_shut_refuses_what_it_held() {
    let backend = backend(Access::Write);
    backend.pause();
    std::thread::scope(|scope| {
        let held = scope.spawn(|| write(&backend, 0, &[1; 512]));
        backend.shut();
        let error = held.join().expect("ends").expect_err("is over");
        assert_eq!(error.errno(), libc::ESHUTDOWN);
    });
}

#[test]
fn requests_that_are_not_whole_blocks_are_refused_but_for_the_end_of_the_disk() {
    let storage = Arc::new(MemoryStorage::from_bytes(&[5; 1000]));
    let settings = Settings {
        logical_block_size: 512,
        ..Settings::default()
    };
    let chain = chain(storage, Access::Write);
    let backend = Backend::with_settings(chain, settings).expect("makes sense");
    for (at, len) in [(1, 511), (0, 511), (512, 100)] {
        let error = write(&backend, at, &vec![1; len]).expect_err("not whole blocks");
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
    write(&backend, 0, &[1; 512]).expect("a whole block");
    write(&backend, 512, &[1; 488]).expect("up to the end");
}

#[test]
fn a_transfer_longer_than_the_longest_is_made_in_pieces() {
    let storage = Arc::new(MemoryStorage::from_bytes(&[0; 10_000]));
    storage.record();
    let settings = Settings {
        max_transfer: 4096,
        ..Settings::default()
    };
    let chain = chain(Arc::clone(&storage), Access::Write);
    let backend = Backend::with_settings(chain, settings).expect("makes sense");
    let bytes: Vec<u8> = (0..10_000).map(|i| (i % 251) as u8).collect();
    write(&backend, 0, &bytes).expect("writes");
    assert_eq!(storage.changes().len(), 3);
    let mut back = vec![0; 9999];
    let request = Request::Read {
        at: 1,
        buf: &mut back,
    };
    backend.submit(QUEUE, request).expect("reads");
    assert!(back == bytes[1..]);
}

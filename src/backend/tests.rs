use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::chain::Base;
use crate::formats::raw;
use crate::image::open::OpenOptions;
use crate::storage::highwater::HighWater;
use crate::storage::memory::{Change, Fault, MemoryStorage, Op};
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

/// A backend over `bytes` set up as `settings` say, and the storage under it, which records.
fn recorded(bytes: &[u8], settings: Settings) -> (Backend, Arc<MemoryStorage>) {
    let storage = Arc::new(MemoryStorage::from_bytes(bytes));
    storage.record();
    let chain = chain(Arc::clone(&storage), Access::Write);
    let backend = Backend::with_settings(chain, settings).expect("makes sense");
    (backend, storage)
}

fn fault(op: Op, errno: i32) -> Fault {
    Fault {
        op,
        after: 0,
        count: 1,
        errno,
    }
}

#[test]
fn durability_is_as_the_cache_mode_says() {
    let synced = |durability, fua| {
        let settings = Settings {
            durability,
            ..Settings::default()
        };
        let (backend, storage) = recorded(&[0; 4096], settings);
        let request = Request::Write {
            at: 0,
            buf: &[1; 512],
            fua,
        };
        backend.submit(QUEUE, request).expect("writes");
        let after_write = storage.changes().contains(&Change::Sync);
        backend.submit(QUEUE, Request::Flush).expect("flushes");
        (after_write, storage.changes().contains(&Change::Sync))
    };
    assert_eq!(synced(Durability::OnFlush, false), (false, true));
    assert_eq!(synced(Durability::OnFlush, true), (true, true));
    assert_eq!(synced(Durability::EveryWrite, false), (true, true));
    assert_eq!(synced(Durability::Never, true), (false, false));
}

#[test]
fn a_write_of_zeroes_is_zeroed_where_that_is_asked_for() {
    let changes = |detect_zeroes, bytes: &[u8]| {
        let settings = Settings {
            detect_zeroes,
            ..Settings::default()
        };
        let (backend, storage) = recorded(&[5; 4096], settings);
        write(&backend, 512, bytes).expect("writes");
        assert_eq!(storage.to_bytes()[512..1024], *bytes);
        storage.changes()
    };
    let zeroed = [Change::Zero(512..1024)];
    for detect in [DetectZeroes::KeepSpace, DetectZeroes::MayUnmap] {
        assert_eq!(changes(detect, &[0; 512]), zeroed);
        let mut one = [0; 512];
        one[511] = 1;
        assert!(matches!(changes(detect, &one)[..], [Change::Write { .. }]));
    }
    let off = changes(DetectZeroes::Off, &[0; 512]);
    assert!(matches!(off[..], [Change::Write { .. }]));
}

#[test]
fn discards_that_are_ignored_change_nothing_but_are_still_checked() {
    let settings = Settings {
        discard: Discard::Ignore,
        ..Settings::default()
    };
    let (backend, storage) = recorded(&[5; 4096], settings);
    let discard = |range| backend.submit(QUEUE, Request::Discard { range });
    discard(0..4096).expect("is ignored");
    discard(0..4097).expect_err("is out of bounds");
    assert_eq!(storage.changes(), []);
    assert_eq!(backend.geometry().discard_align, 0);
}

#[test]
fn an_error_that_is_ignored_is_told_to_the_listener_and_not_to_the_client() {
    let told = Arc::new(Mutex::new(Vec::new()));
    let list = Arc::clone(&told);
    let settings = Settings {
        policy: Policy {
            on_read: OnError::Ignore,
            on_write: OnError::Report,
        },
        listener: Listener::new(move |event| {
            if let Event::IoError { kind, action, .. } = event {
                list.lock().push((*kind, *action));
            }
        }),
        ..Settings::default()
    };
    let (backend, storage) = recorded(&[5; 4096], settings);
    storage.inject(fault(Op::Read, libc::EIO));
    let mut buf = [0; 512];
    let request = Request::Read {
        at: 0,
        buf: &mut buf,
    };
    backend.submit(QUEUE, request).expect("is ignored");
    storage.inject(fault(Op::Change, libc::ENOSPC));
    let error = write(&backend, 0, &[1; 512]).expect_err("is reported");
    assert_eq!(error.errno(), libc::ENOSPC);
    let expected = [(Kind::Read, Action::Ignore), (Kind::Write, Action::Report)];
    assert_eq!(*told.lock(), expected);
    // The first one sticks.
    assert_eq!(backend.io_status(), IoStatus::Failed);
    backend.resume();
    assert_eq!(backend.io_status(), IoStatus::Ok);
}

#[test]
fn limits_are_kept_to_in_virtual_time_and_a_wait_is_no_request_under_way() {
    let backend = backend(Access::Write);
    let limits = Limits::parse(["iops=10"].into_iter()).expect("makes sense");
    backend.set_group(Some(&Arc::new(Group::new(limits))));
    let shape = Shape {
        kind: Kind::Read,
        range: 0..512,
        fua: false,
    };
    let mut now = Instant::now();
    let end = now + Duration::from_secs(100);
    let mut admitted = 0;
    while now < end {
        match backend.admit_at(QUEUE, &shape, backend.moment_of(now)) {
            Admission::Admitted(_) => admitted += 1,
            Admission::NotBefore(at) => now = at,
            other => panic!("{other:?}"),
        }
    }
    assert!((999..=1002).contains(&admitted), "{admitted}");
    let depth: u32 = backend.stats().iter().map(|q| q.depth).sum();
    assert_eq!(depth, 0);
    let wrong = Shape {
        range: 0..1 << 40,
        ..shape.clone()
    };
    let answer = backend.admit_at(QUEUE, &wrong, backend.moment_of(now));
    assert!(matches!(answer, Admission::Refused(_)), "is wrong at once");
    backend.set_group(None);
    for _ in 0..100 {
        let answer = backend.admit_at(QUEUE, &shape, backend.moment_of(now));
        assert!(matches!(answer, Admission::Admitted(_)));
    }
}

#[test]
fn a_mark_that_is_passed_is_told_once_whoever_moved_the_bytes() {
    let told = Arc::new(Mutex::new(Vec::new()));
    let list = Arc::clone(&told);
    let settings = Settings {
        listener: Listener::new(move |event| {
            if let Event::Watermark { mark, end } = event {
                list.lock().push((*mark, *end));
            }
        }),
        ..Settings::default()
    };
    let storage = Arc::new(MemoryStorage::from_bytes(&[5; 4096]));
    let medium = Medium {
        chain: chain(storage, Access::Write),
        high_water: Some(Arc::new(HighWater::new(Some(1000)))),
    };
    let backend = Backend::with_settings(medium, settings).expect("makes sense");
    let shape = Shape {
        kind: Kind::Write,
        range: 0..512,
        fua: false,
    };
    for end in [1000, 1001, 4096] {
        let Admission::Admitted(ticket) = backend.admit(QUEUE, &shape) else {
            panic!("nothing holds it");
        };
        ticket.wrote(end);
        backend.complete(ticket, Ok(()));
    }
    assert_eq!(*told.lock(), [(1000, 1001)]);
    assert_eq!(backend.highest_offset(), Some(4096));
}

#[test]
fn a_request_that_meets_a_bug_fails_alone() {
    #[derive(Debug)]
    struct Bug(MemoryStorage);
    impl crate::storage::Storage for Bug {
        fn size(&self) -> u64 {
            self.0.size()
        }

        fn has_fixed_len(&self) -> bool {
            false
        }
        fn limits(&self) -> crate::storage::Limits {
            self.0.limits()
        }
        fn path(&self) -> Option<&std::path::Path> {
            None
        }

        fn host_id(&self) -> Option<crate::storage::HostId> {
            None
        }
        fn fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
            None
        }
        fn read_at(&self, buf: &mut [u8], host: u64) -> Result<()> {
            assert!(host != 512, "a bug that a test put here");
            self.0.read_at(buf, host)
        }
        fn write_at(&self, buf: &[u8], host: u64) -> Result<()> {
            self.0.write_at(buf, host)
        }
        fn zero(&self, host: std::ops::Range<u64>, how: crate::storage::Zeroing) -> Result<()> {
            self.0.zero(host, how)
        }
        fn discard(&self, host: std::ops::Range<u64>) -> Result<()> {
            self.0.discard(host)
        }
        fn run(&self, host: u64, len: u64) -> Result<crate::storage::HostRun> {
            self.0.run(host, len)
        }
        fn set_len(&self, len: u64) -> Result<()> {
            self.0.set_len(len)
        }
        fn sync_now(&self) -> Result<()> {
            self.0.sync_now()
        }
        fn syncs(&self) -> &crate::storage::syncs::Syncs {
            self.0.syncs()
        }
        fn reserve(&self, host: std::ops::Range<u64>) -> Result<()> {
            self.0.reserve(host)
        }
    }
    let options = OpenOptions::default();
    let storage = Arc::new(Bug(MemoryStorage::from_bytes(&[5; 4096])));
    let image = (raw::DRIVER.open)(storage, &options).expect("raw opens");
    let chain = Chain::new(vec![image], Base::Zeroes, options.grace).expect("one layer");
    let backend = Backend::new(chain);
    let read = |at| {
        let mut buf = [0; 512];
        let request = Request::Read { at, buf: &mut buf };
        backend.submit(QUEUE, request).map(|()| buf[0])
    };
    let error = read(512).expect_err("meets the bug");
    assert_eq!(error.kind(), ErrorKind::Io);
    assert_eq!(read(0).expect("reads"), 5);
    backend.pause();
    assert_eq!(backend.totals(Kind::Read).failed, 1);
}

#[test]
fn queues_are_counted_apart_and_one_too_many_shares() {
    let settings = Settings {
        queues: 2,
        ..Settings::default()
    };
    let (backend, _) = recorded(&[5; 4096], settings);
    for queue in [0, 1, 1, 3] {
        let mut buf = [0; 512];
        let request = Request::Read {
            at: 0,
            buf: &mut buf,
        };
        backend.submit(QueueId(queue), request).expect("reads");
    }
    let counts: Vec<u64> = backend
        .stats()
        .iter()
        .map(|q| q.kind(Kind::Read).operations)
        .collect();
    assert_eq!(counts, [1, 3]);
    assert_eq!(backend.totals(Kind::Read).operations, 4);
    for queues in [0, settings::MAX_QUEUES + 1] {
        let storage = Arc::new(MemoryStorage::from_bytes(&[5; 512]));
        let settings = Settings {
            queues,
            ..Settings::default()
        };
        let wrong = Backend::with_settings(chain(storage, Access::Read), settings);
        assert_eq!(
            wrong.expect_err("too few or many").kind(),
            ErrorKind::Invalid
        );
    }
}

#[test]
fn pauses_and_stops_under_load_lose_no_write() {
    let settings = Settings {
        queues: 4,
        policy: Policy {
            on_read: OnError::Stop,
            on_write: OnError::Stop,
        },
        ..Settings::default()
    };
    let (backend, storage) = recorded(&[0; 64 << 10], settings);
    storage.inject(fault(Op::Change, libc::EIO));
    let done = &std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..4u8)
            .map(|queue| {
                let backend = &backend;
                scope.spawn(move || {
                    for block in 0..32u64 {
                        let at = (block * 4 + u64::from(queue)) * 512;
                        let request = Request::Write {
                            at,
                            buf: &[queue + 1; 512],
                            fua: false,
                        };
                        let queue = QueueId(queue.into());
                        backend.submit(queue, request).expect("is made, in the end");
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            for round in 0.. {
                if done.load(Ordering::SeqCst) {
                    break;
                }
                // Not each time: a round may be too short for more than the write that fails.
                if round % 3 == 0 {
                    storage.inject(fault(Op::Change, libc::EIO));
                }
                backend.pause();
                let depth: u32 = backend.stats().iter().map(|q| q.depth).sum();
                assert_eq!(depth, 0);
                backend.resume();
                // Long enough for writers to get in between.
                std::thread::sleep(Duration::from_millis(1));
            }
            storage.heal();
            backend.resume();
        });
        while !writers
            .iter()
            .all(std::thread::ScopedJoinHandle::is_finished)
        {
            std::thread::sleep(Duration::from_millis(1));
        }
        done.store(true, Ordering::SeqCst);
    });
    for (block, bytes) in storage.to_bytes().chunks(512).enumerate() {
        let writer = u8::try_from(block % 4).expect("is small") + 1;
        assert!(bytes.iter().all(|b| *b == writer), "block {block}");
    }
    let totals = backend.totals(Kind::Write);
    assert_eq!(totals.operations, 128);
    assert!(totals.failed > 0);
}

#[test]
fn a_flush_that_failed_is_told_of_and_never_made_again_in_silence() {
    let settings = Settings {
        policy: Policy {
            on_read: OnError::Stop,
            on_write: OnError::Stop,
        },
        ..Settings::default()
    };
    let (backend, storage) = recorded(&[0; 4096], settings);
    storage.inject(fault(Op::Sync, libc::EIO));
    let fails = || {
        let error = backend.submit(QUEUE, Request::Flush);
        assert_eq!(error.expect_err("is told").errno(), libc::EIO);
        assert_eq!(backend.run_state(), RunState::Stopped);
        backend.resume();
    };
    fails();
    storage.heal();
    // Until it is opened anew.
    fails();
    backend.flush().expect_err("for its owner too");
    // A write with FUA is held until then.
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let request = Request::Write {
                at: 0,
                buf: &[1; 512],
                fua: true,
            };
            backend.submit(QUEUE, request)
        });
        while backend.run_state() != RunState::Stopped {
            std::thread::yield_now();
        }
        let anew = || {
            storage.open_anew();
            Ok(chain(Arc::clone(&storage), Access::Write).into())
        };
        backend
            .reopen(anew)
            .expect("the old one is given up as it is");
        backend.resume();
        writer.join().expect("ends").expect("is made again");
    });
    // What was written before may be lost all the same.
    let error = backend.submit(QUEUE, Request::Flush).expect_err("is told");
    assert!(error.message().contains("lost"), "{error}");
    backend.resume();
    backend.submit(QUEUE, Request::Flush).expect("but once");
    backend.finish().expect("closes");
}

#[test]
fn a_sync_that_failed_fails_all_that_is_to_be_durable() {
    let (backend, storage) = recorded(&[0; 4096], Settings::default());
    storage.inject(fault(Op::Sync, libc::EIO));
    let errno = |done: Result<()>| done.expect_err("is not durable").errno();
    assert_eq!(errno(backend.submit(QUEUE, Request::Flush)), libc::EIO);
    storage.heal();
    assert_eq!(errno(backend.submit(QUEUE, Request::Flush)), libc::EIO);
    let write = |fua| {
        let buf = &[1; 512];
        backend.submit(QUEUE, Request::Write { at: 0, buf, fua })
    };
    assert_eq!(errno(write(true)), libc::EIO);
    write(false).expect("need not be");
    assert_eq!(errno(backend.finish()), libc::EIO);
}

#[test]
fn groups_that_are_set_at_once_leave_all_queues_with_one_of_them() {
    let settings = Settings {
        queues: 8,
        ..Settings::default()
    };
    let backend = Backend::with_settings(chain(Arc::default(), Access::Write), settings)
        .expect("makes sense");
    let groups: [_; 2] = std::array::from_fn(|_| Arc::new(Group::new(Limits::default())));
    for _ in 0..200 {
        std::thread::scope(|scope| {
            for group in &groups {
                scope.spawn(|| backend.set_group(Some(group)));
            }
        });
        let limits = backend.limits().expect("are set");
        for place in &backend.lanes {
            let of_queue = place.lane().limits.clone().expect("are set");
            assert!(Arc::ptr_eq(&of_queue, &limits));
        }
    }
}

#[test]
fn a_disk_changes_its_size_only_when_nobody_looks_and_no_pause_keeps_who_looks_out() {
    let backend = backend(Access::Write);
    backend.pause();
    std::thread::scope(|scope| {
        let resize = std::cell::OnceCell::new();
        let seen = backend.look(QUEUE, |chain| {
            let _ = resize.set(scope.spawn(|| backend.resize(512)));
            // It waits for whoever looks once it keeps others out.
            while backend.gate.flags() & BUSY == 0 {
                std::thread::yield_now();
            }
            Ok(chain.virtual_size())
        });
        assert_eq!(seen.expect("looks"), 4096);
        let resize = resize.into_inner().expect("it began");
        resize.join().expect("ends").expect("resizes");
    });
    let size = backend.look(QUEUE, |chain| Ok(chain.virtual_size()));
    assert_eq!(size.expect("looks, paused or not"), 512);
    let bug = || {
        backend.look(QUEUE, |_| -> Result<()> {
            std::panic::resume_unwind(Box::new(0))
        })
    };
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(bug)).is_err());
    backend.resize(1024).expect("waits for nobody who is gone");
    backend.finish().expect("ends");
    backend
        .look(QUEUE, |_| Ok(()))
        .expect_err("nothing is there to look at");
}

#[test]
fn what_replaces_an_image_is_the_next_one_or_the_old_one_again_or_there_is_none() {
    let (backend, storage) = stopping();
    write(&backend, 0, &[1; 512]).expect("writes");
    let read = |backend: &Backend| {
        let mut buf = [0; 512];
        let request = Request::Read {
            at: 0,
            buf: &mut buf,
        };
        backend.submit(QUEUE, request).map(|()| buf[0])
    };
    let other = || Arc::new(MemoryStorage::from_bytes(&[7; 4096]));
    let next = |old: &Chain| {
        let mut buf = [0; 512];
        old.read_at(&mut buf, 0)?;
        assert_eq!(buf, [1; 512], "it is closed and there");
        Ok(chain(other(), Access::Write).into())
    };
    let fails = || Err(Error::new(ErrorKind::NotFound, "gone"));
    let again = || Ok(chain(Arc::clone(&storage), Access::Write).into());
    let error = backend.replace(|_| fails(), again).expect_err("is told");
    assert_eq!(error.message(), "gone");
    assert_eq!(read(&backend).expect("goes on"), 1);
    write(&backend, 512, &[2; 512]).expect("goes on");
    backend.replace(next, fails).expect("is replaced");
    assert_eq!(read(&backend).expect("reads"), 7);
    let error = backend.replace(|_| fails(), fails).expect_err("is told");
    assert!(error.message().contains("requests wait"), "{error}");
    assert_eq!(backend.run_state(), RunState::NoImage);
    backend
        .change(chain(other(), Access::Write).into())
        .expect("there is one again");
    assert_eq!(read(&backend).expect("reads"), 7);
    // One that cannot be closed stays.
    let (backend, storage) = stopping();
    write(&backend, 0, &[1; 512]).expect("writes");
    storage.inject(Fault {
        op: Op::Sync,
        after: 0,
        count: 1,
        errno: libc::EIO,
    });
    backend
        .replace(|_| panic!("is not asked"), fails)
        .expect_err("is told");
    assert_eq!(read(&backend).expect("goes on"), 1);
}

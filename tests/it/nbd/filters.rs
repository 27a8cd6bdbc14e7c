//! Our client with an nbdkit whose filters make life hard.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vdtool::storage::nbd::{NbdStorage, Options};
use vdtool::storage::open::Access;
use vdtool::storage::{Storage, Zeroing};
use vdtool::{ErrorKind, Result};

use super::client::{exercise, nbdkit, quick};
use crate::util::{Seeded, requires, scratch, vdtool};

type Call = fn(&NbdStorage) -> Result<()>;

const CALLS: [(&str, Call); 5] = [
    ("pread", |s| s.read_at(&mut [0; 512], 0)),
    ("pwrite", |s| s.write_at(&[2; 512], 0)),
    ("zero", |s| s.zero(0..4096, Zeroing::MayUnmap)),
    ("trim", |s| s.discard(0..4096)),
    ("extents", |s| {
        let run = s.run(0, 1 << 20)?;
        assert!(run.len > 0);
        Ok(())
    }),
];

#[test]
fn each_kind_of_request_that_fails_keeps_its_error_and_the_next_succeeds() {
    if !requires("nbdkit") {
        return;
    }
    for (call, make) in CALLS {
        for (name, errno) in [
            ("EIO", libc::EIO),
            ("EPERM", libc::EPERM),
            ("ENOMEM", libc::ENOMEM),
            ("EINVAL", libc::EINVAL),
            ("ENOSPC", libc::ENOSPC),
        ] {
            let dir = scratch();
            let trigger = dir.path().join("trigger");
            let which = format!("error-{call}={name}");
            let rate = format!("error-{call}-rate=100%");
            let file = format!("error-{call}-file={}", trigger.display());
            let arguments = ["--filter=error", "memory", "1M", &which, &rate, &file];
            let (_peer, uri) = nbdkit(dir.path(), &arguments);
            let storage = NbdStorage::connect(&uri, &quick(Access::Write)).expect("connects");
            storage.write_at(&[1; 8192], 0).expect("writes");
            std::fs::write(&trigger, b"").expect("writes");
            let error = make(&storage).expect_err("fails");
            assert_eq!(error.errno(), errno, "{call} {name}: {error}");
            // The others, over the same connection, are not harmed.
            for (other, make) in CALLS {
                if other != call {
                    make(&storage).expect(other);
                }
            }
            std::fs::remove_file(&trigger).expect("removes");
            make(&storage).expect("succeeds again");
            storage.sync().expect("nothing that succeeded is lost");
        }
    }
}

/// A server that is a script for each call.
fn scripted(dir: &Path, calls: &[&str]) -> (super::Peer, String) {
    let mut arguments = vec![
        "eval",
        "get_size=echo 1048576",
        "pread=dd if=/dev/zero count=$3 iflag=count_bytes status=none",
    ];
    arguments.extend(["can_write=exit 0", "pwrite=cat >/dev/null"]);
    arguments.extend(calls);
    nbdkit(dir, &arguments)
}

#[test]
fn a_flush_that_fails_is_told_until_the_disk_is_opened_anew() {
    if !requires("nbdkit") {
        return;
    }
    let dir = scratch();
    let trigger = dir.path().join("trigger");
    let flush = format!(
        "flush=if [ -e {} ]; then echo ENOSPC no room >&2; exit 1; fi",
        trigger.display()
    );
    let (_peer, uri) = scripted(dir.path(), &["can_flush=exit 0", &flush]);
    let storage = NbdStorage::connect(&uri, &quick(Access::Write)).expect("connects");
    storage.write_at(&[1; 512], 0).expect("writes");
    std::fs::write(&trigger, b"").expect("writes");
    let error = storage.sync().expect_err("fails");
    let expected = (ErrorKind::NoSpace, libc::ENOSPC);
    assert_eq!((error.kind(), error.errno()), expected, "{error}");
    std::fs::remove_file(&trigger).expect("removes");
    // What the server dropped does not come back.
    let error = storage.sync().expect_err("is told still");
    assert_eq!(error.kind(), ErrorKind::Io, "{error}");
    drop(storage);
    let storage = NbdStorage::connect(&uri, &quick(Access::Write)).expect("connects");
    storage.sync().expect("flushes");
}

#[test]
fn a_server_without_flushes_and_fua_is_for_reading_or_for_the_unsafe() {
    if !requires("nbdkit") {
        return;
    }
    let dir = scratch();
    let (_peer, uri) = scripted(dir.path(), &[]);
    let error = NbdStorage::connect(&uri, &quick(Access::Write));
    let error = error.expect_err("cannot flush");
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    NbdStorage::connect(&uri, &quick(Access::Read)).expect("reads");
}

#[test]
fn errors_at_random_are_told_or_do_no_harm() {
    if !requires("nbdkit") {
        return;
    }
    let dir = scratch();
    let (_peer, uri) = nbdkit(
        dir.path(),
        &["--filter=error", "memory", "1M", "error-rate=20%"],
    );
    let storage = NbdStorage::connect(&uri, &quick(Access::Write)).expect("connects");
    let mut random = Seeded::new("errors at random");
    let mut expected = vec![Some(0u8); 1 << 20];
    let (mut failed, mut done) = (0, 0);
    for _ in 0..400 {
        let start = random.usize(0..expected.len());
        let len = random.usize(1..50_000).min(expected.len() - start);
        let part = &mut expected[start..start + len];
        if random.bool() {
            let data = random.bytes(len);
            match storage.write_at(&data, start as u64) {
                Ok(()) => part.iter_mut().zip(data).for_each(|(e, b)| *e = Some(b)),
                // Any part of it may have been written.
                Err(e) => {
                    assert_eq!(e.errno(), libc::EIO, "{e}");
                    part.fill(None);
                    failed += 1;
                }
            }
            continue;
        }
        let mut found = vec![0xee; len];
        match storage.read_at(&mut found, start as u64) {
            Ok(()) => {
                let same = found
                    .iter()
                    .zip(part)
                    .all(|(f, e)| e.is_none_or(|e| e == *f));
                assert!(same, "{start} {len}");
                done += 1;
            }
            Err(e) => {
                assert_eq!(e.errno(), libc::EIO, "{e}");
                failed += 1;
            }
        }
    }
    assert!(failed > 20 && done > 20, "{failed} {done}");
}

#[test]
fn a_server_that_retries_by_itself_looks_like_one_without_errors() {
    if !requires("nbdkit") {
        return;
    }
    let dir = scratch();
    let arguments = [
        "--filter=retry",
        "--filter=error",
        "memory",
        "2M",
        "error-rate=3%",
        "retries=20",
        "retry-delay=1",
        "retry-exponential=no",
    ];
    let (_peer, uri) = nbdkit(dir.path(), &arguments);
    let storage = NbdStorage::connect(&uri, &quick(Access::Write)).expect("connects");
    let mut random = Seeded::new("retry");
    for round in 0..60u8 {
        let at = random.u64(0..(2 << 20) - 4096);
        storage.write_at(&[round; 4096], at).expect("writes");
        let mut found = [0; 4096];
        storage.read_at(&mut found, at).expect("reads");
        assert_eq!(found, [round; 4096]);
    }
    storage.sync().expect("flushes");
}

#[test]
fn a_server_that_says_it_is_about_to_end_is_asked_again_over_a_new_connection() {
    if !requires("nbdkit") {
        return;
    }
    let dir = scratch();
    let trigger = dir.path().join("trigger");
    let file = format!("error-file={}", trigger.display());
    let arguments = ["--filter=error", "memory", "1M", "error=ESHUTDOWN"];
    let arguments = [&arguments[..], &["error-rate=30%", &file]].concat();
    let (_peer, uri) = nbdkit(dir.path(), &arguments);
    let storage = NbdStorage::connect(&uri, &quick(Access::Write)).expect("connects");
    std::fs::write(&trigger, b"").expect("writes");
    for at in 0..12 {
        storage.read_at(&mut [0; 512], at * 512).expect("reads on");
    }
    std::fs::remove_file(&trigger).expect("removes");
    let mut random = Seeded::new("about to end");
    exercise(&storage, &mut random);
}

/// How long something takes.
fn time(run: impl FnOnce()) -> Duration {
    let start = Instant::now();
    run();
    start.elapsed()
}

#[test]
fn requests_to_a_slow_server_are_under_way_together() {
    if !requires("nbdkit") {
        return;
    }
    let dir = scratch();
    let delays = [
        "--filter=delay",
        "memory",
        "4M",
        "rdelay=200ms",
        "wdelay=200ms",
        "delay-zero=200ms",
        "delay-trim=200ms",
        "delay-extents=200ms",
    ];
    let (_peer, uri) = nbdkit(dir.path(), &delays);
    let storage = NbdStorage::connect(&uri, &quick(Access::Write)).expect("connects");
    for (what, make) in CALLS {
        let took = time(|| make(&storage).expect(what));
        assert!(took >= Duration::from_millis(190), "{what}: {took:?}");
    }
    let took = time(|| {
        std::thread::scope(|scope| {
            for index in 0..32u64 {
                let storage = &storage;
                scope.spawn(move || match index % 2 {
                    0 => storage.read_at(&mut [0; 512], index * 512),
                    _ => storage.write_at(&[1; 512], index * 512),
                });
            }
        });
    });
    // One after the other would take more than six seconds.
    assert!(took < Duration::from_secs(3), "{took:?}");
}

#[test]
fn each_kind_of_request_that_takes_too_long_is_given_up() {
    if !requires("nbdkit") {
        return;
    }
    for (what, make) in CALLS {
        let dir = scratch();
        let option = match what {
            "pread" => "rdelay=5".to_owned(),
            "pwrite" => "wdelay=5".to_owned(),
            other => format!("delay-{other}=5"),
        };
        let arguments = ["--filter=delay", "memory", "1M", &option];
        let (_peer, uri) = nbdkit(dir.path(), &arguments);
        let options = Options {
            timeout: Duration::from_millis(1500),
            retry: Duration::ZERO,
            ..quick(Access::Write)
        };
        let storage = NbdStorage::connect(&uri, &options).expect("connects");
        let error = make(&storage).expect_err("too slow");
        assert!(error.message().contains("in time"), "{what}: {error}");
    }
}

/// A raw file of 4 MiB: data and holes.
fn source(dir: &Path) -> PathBuf {
    let path = dir.join("source.raw");
    let mut bytes = Seeded::new("filters").bytes(1 << 20);
    bytes.resize(4 << 20, 0);
    bytes[(3 << 20)..(3 << 20) + 100].fill(7);
    std::fs::write(&path, bytes).expect("writes");
    path
}

#[test]
fn commands_end_with_one_line_where_a_server_fails_and_well_where_it_is_slow() {
    if !requires("nbdkit") {
        return;
    }
    let dir = scratch();
    let source = source(dir.path());
    let failing = |option: &str| {
        let below = scratch();
        let image = source.to_str().expect("UTF-8");
        let arguments = ["--filter=error", "file", image, option];
        let (peer, uri) = nbdkit(below.path(), &arguments);
        (below, peer, uri)
    };
    for option in ["error-pread-rate=100%", "error-extents-rate=100%"] {
        let (_dir, _peer, uri) = failing(option);
        let convert = ["convert", "-f", "raw", "-O", "raw", &*uri, "copy.raw"];
        let done = vdtool()
            .current_dir(dir.path())
            .args(convert)
            .assert()
            .code(1);
        let told = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
        assert!(
            told.contains("nbd+unix") && told.lines().count() == 1,
            "{told}"
        );
        assert!(!dir.path().join("copy.raw").exists());
    }
    let below = scratch();
    let image = source.to_str().expect("UTF-8");
    let delays = [
        "--filter=delay",
        "file",
        image,
        "rdelay=100ms",
        "delay-extents=50ms",
    ];
    let (_peer, uri) = nbdkit(below.path(), &delays);
    let convert = ["convert", "-f", "raw", "-O", "raw", &*uri, "copy.raw"];
    vdtool()
        .current_dir(dir.path())
        .args(convert)
        .assert()
        .success();
    let same = std::fs::read(dir.path().join("copy.raw")).expect("reads")
        == std::fs::read(&source).expect("reads");
    assert!(same);
}

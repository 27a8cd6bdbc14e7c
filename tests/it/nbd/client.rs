//! Our client with other servers, and with ours.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vdtool::ErrorKind;
use vdtool::chain::open::ChainOptions;
use vdtool::storage::nbd::{NbdStorage, Options};
use vdtool::storage::open::Access;
use vdtool::storage::{Storage, Zeroing};

use super::{Peer, Serving, export, lasting, uri};
use crate::util::{Seeded, assert_same, peer, requires, scratch, vdtool};

pub(super) fn quick(access: Access) -> Options {
    Options {
        timeout: Duration::from_secs(10),
        retry: Duration::from_secs(10),
        ..Options::new(access)
    }
}

/// Runs vdtool in a directory; what it prints.
fn run(dir: &Path, arguments: &[&str]) -> String {
    let done = vdtool().current_dir(dir).args(arguments).assert().success();
    String::from_utf8_lossy(&done.get_output().stdout).into_owned()
}

/// Random changes and reads, beside a plain vector.
pub(super) fn exercise(storage: &dyn Storage, random: &mut Seeded) {
    let size = usize::try_from(storage.size()).expect("small");
    let mut expected = vec![0; size];
    storage.read_at(&mut expected, 0).expect("reads");
    for _ in 0..150 {
        let start = random.usize(0..size);
        let len = random.usize(1..200_000).min(size - start);
        let (at, end) = (start as u64, start + len);
        match random.u8(0..4) {
            0 => {
                let data = random.bytes(len);
                storage.write_at(&data, at).expect("writes");
                expected[start..end].copy_from_slice(&data);
            }
            1 => {
                let how = match random.bool() {
                    true => Zeroing::MayUnmap,
                    false => Zeroing::KeepSpace,
                };
                vdtool::storage::zero_or_write(storage, at..end as u64, how).expect("zeroes");
                expected[start..end].fill(0);
            }
            2 => {
                let run = storage.run(at, len as u64).expect("tells extents");
                assert!(run.len > 0 && run.len <= len as u64);
                let stretch = &expected[start..start + crate::util::len(run.len)];
                assert!(
                    run.data || stretch.iter().all(|b| *b == 0),
                    "a hole with data"
                );
            }
            _ => {
                let mut data = vec![0xee; len];
                storage.read_at(&mut data, at).expect("reads");
                assert_same(&data, &expected[start..end], at, "read");
            }
        }
    }
    storage.sync().expect("flushes");
    let mut past = [9; 20];
    storage.read_at(&mut past, size as u64 - 10).expect("reads");
    assert_eq!(past[..10], expected[size - 10..]);
    assert_eq!(past[10..], [0; 10]);
    let error = storage.write_at(&[1; 20], size as u64 - 10);
    assert_eq!(error.expect_err("past the end").kind(), ErrorKind::NoSpace);
}

#[test]
fn an_export_of_our_own_is_used_as_storage() {
    let mut random = Seeded::new("our own export");
    let serving = Serving::raw(&random.bytes(2_000_003), lasting());
    let storage = NbdStorage::connect(&serving.uri(""), &quick(Access::Write));
    exercise(&storage.expect("connects"), &mut random);
}

#[test]
fn an_export_of_qemu_nbd_is_used_as_storage() {
    if !requires("qemu-nbd") {
        return;
    }
    let mut random = Seeded::new("qemu-nbd");
    let dir = scratch();
    let (socket, image) = (dir.path().join("s"), dir.path().join("disk.raw"));
    std::fs::write(&image, random.bytes(2 << 20)).expect("writes");
    let arguments = ["-t", "-e", "8", "-f", "raw", "-x", "a b", "-k"];
    let paths = [
        socket.to_str().expect("UTF-8"),
        image.to_str().expect("UTF-8"),
    ];
    let arguments: Vec<&str> = arguments.iter().chain(&paths).copied().collect();
    let _peer = Peer::start("qemu-nbd", &arguments, &socket);
    let storage = NbdStorage::connect(&uri(&socket, "a%20b"), &quick(Access::Write));
    exercise(&storage.expect("connects"), &mut random);
    let error = NbdStorage::connect(&uri(&socket, "other"), &quick(Access::Read));
    assert_eq!(error.expect_err("not there").kind(), ErrorKind::NotFound);
}

/// nbdkit on a socket in `dir`, with further arguments.
pub(super) fn nbdkit(dir: &Path, arguments: &[&str]) -> (Peer, String) {
    let socket = dir.join("nbdkit.sock");
    let mut all = vec!["-f", "-U", socket.to_str().expect("UTF-8")];
    all.extend(arguments);
    let peer = Peer::start("nbdkit", &all, &socket);
    (peer, uri(&socket, ""))
}

#[test]
fn a_server_that_takes_only_whole_blocks_is_given_them() {
    if !requires("nbdkit") {
        return;
    }
    let mut random = Seeded::new("whole blocks");
    let dir = scratch();
    let (_peer, uri) = nbdkit(
        dir.path(),
        &[
            "--filter=blocksize-policy",
            "memory",
            "1M",
            "blocksize-minimum=4096",
            "blocksize-maximum=65536",
            "blocksize-error-policy=error",
        ],
    );
    let storage = NbdStorage::connect(&uri, &quick(Access::Write)).expect("connects");
    assert_eq!(storage.limits().align, 4096);
    exercise(&storage, &mut random);
    // Threads that write to parts of the same blocks lose nothing.
    std::thread::scope(|scope| {
        for part in 0..4u8 {
            let storage = &storage;
            scope.spawn(move || {
                for block in 0..16u64 {
                    let at = block * 4096 + u64::from(part) * 1000;
                    storage.write_at(&[part + 1; 1000], at).expect("writes");
                }
            });
        }
    });
    let mut bytes = vec![0; 16 * 4096];
    storage.read_at(&mut bytes, 0).expect("reads");
    for block in bytes.chunks(4096) {
        for part in 0..4 {
            let found = &block[part * 1000..(part + 1) * 1000];
            assert!(found.iter().all(|b| usize::from(*b) == part + 1));
        }
    }
}

#[test]
fn errors_of_a_server_keep_their_number_and_do_not_end_the_connection() {
    if !requires("nbdkit") {
        return;
    }
    let dir = scratch();
    let trigger = dir.path().join("trigger");
    let file = format!("error-file={}", trigger.display());
    let (_peer, uri) = nbdkit(
        dir.path(),
        &[
            "--filter=error",
            "memory",
            "1M",
            "error=ENOSPC",
            "error-pwrite-rate=100%",
            &file,
        ],
    );
    let storage = NbdStorage::connect(&uri, &quick(Access::Write)).expect("connects");
    storage.write_at(&[1; 512], 0).expect("writes");
    std::fs::write(&trigger, b"").expect("writes");
    let error = storage.write_at(&[2; 512], 0).expect_err("fails");
    assert_eq!(
        (error.kind(), error.errno()),
        (ErrorKind::NoSpace, libc::ENOSPC)
    );
    std::fs::remove_file(&trigger).expect("removes");
    storage.write_at(&[3; 512], 0).expect("writes again");
}

#[test]
fn a_server_that_is_slow_is_waited_for_and_one_that_is_too_slow_is_not() {
    if !requires("nbdkit") {
        return;
    }
    let dir = scratch();
    let filter = ["--filter=delay", "memory", "1M", "rdelay=300ms", "wdelay=3"];
    let (_peer, uri) = nbdkit(dir.path(), &filter);
    let options = Options {
        timeout: Duration::from_secs(1),
        retry: Duration::ZERO,
        ..quick(Access::Write)
    };
    let storage = NbdStorage::connect(&uri, &options).expect("connects");
    std::thread::scope(|scope| {
        for at in 0..8 {
            let storage = &storage;
            scope.spawn(move || storage.read_at(&mut [0; 512], at * 512).expect("reads"));
        }
    });
    let error = storage.write_at(&[1; 512], 0).expect_err("too slow");
    assert!(error.message().contains("in time"), "{error}");
}

#[test]
fn a_reply_is_taken_whoever_reads_and_whoever_sends() {
    let serving = Serving::raw(&vec![7; 8 << 20], lasting());
    // A reply that nobody takes is an error here, after a time.
    let options = Options {
        timeout: Duration::from_secs(10),
        retry: Duration::ZERO,
        connections: 1,
        ..Options::new(Access::Write)
    };
    let storage = NbdStorage::connect(&serving.uri(""), &options).expect("connects");
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let storage = &storage;
            scope.spawn(move || {
                // Long writes keep their threads in the sending for long.
                let len = if thread < 2 { 1 << 20 } else { 512 };
                let rounds = if thread < 2 { 60 } else { 3000 };
                let mut buf = vec![7; len];
                for round in 0..rounds {
                    let at = (round * 4096 + thread) % (7 << 20);
                    match thread % 2 {
                        0 => storage.write_at(&buf, at).expect("is answered"),
                        _ => storage.read_at(&mut buf, at).expect("is answered"),
                    }
                }
            });
        }
    });
}

#[test]
fn a_connection_that_is_lost_is_made_again() {
    let dir = scratch();
    let image = dir.path().join("disk.raw");
    let bytes = Seeded::new("lost").bytes(1 << 20);
    std::fs::write(&image, &bytes).expect("writes");
    let socket = dir.path().join("server.sock");
    let listen = vdtool::server::nbd::Listen::parse(&format!("unix:{}", socket.display()));
    let listen = listen.expect("an address");
    let serve = || {
        let exports = vec![export("", &image, &ChainOptions::write())];
        vdtool::server::nbd::start(&listen, exports, lasting()).expect("starts")
    };
    let first = serve();
    let storage = NbdStorage::connect(&uri(&socket, ""), &quick(Access::Write));
    let storage = Arc::new(storage.expect("connects"));
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let threads: Vec<_> = (0..3)
        .map(|thread| {
            let (storage, stop, bytes) = (Arc::clone(&storage), Arc::clone(&stop), bytes.clone());
            std::thread::spawn(move || {
                let mut rounds = 0;
                let mut buf = vec![0; 30_000];
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let at = (thread * 7919 + rounds * 4001) % 900_000;
                    storage.read_at(&mut buf, at as u64).expect("reads on");
                    assert_same(&buf, &bytes[at..at + buf.len()], at as u64, "read");
                    storage.write_at(&buf, at as u64).expect("writes on");
                    rounds += 1;
                }
                rounds
            })
        })
        .collect();
    std::thread::sleep(Duration::from_millis(200));
    drop(first);
    std::thread::sleep(Duration::from_millis(300));
    let _second = serve();
    std::thread::sleep(Duration::from_millis(500));
    let error = storage.sync().expect_err("writes may be lost");
    assert!(error.message().contains("may be lost"), "{error}");
    storage.sync().expect_err("until it is opened anew");
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    for thread in threads {
        assert!(thread.join().expect("goes on") > 0);
    }
}

#[test]
fn an_export_that_changed_while_the_connection_was_lost_is_not_taken_for_the_same() {
    let dir = scratch();
    let image = dir.path().join("disk.raw");
    let listen = format!("unix:{}", dir.path().join("s").display());
    let listen = vdtool::server::nbd::Listen::parse(&listen).expect("an address");
    let serve = |size: usize| {
        std::fs::write(&image, vec![1; size]).expect("writes");
        let exports = vec![export("", &image, &ChainOptions::write())];
        vdtool::server::nbd::start(&listen, exports, lasting()).expect("starts")
    };
    let first = serve(4096);
    let storage = NbdStorage::connect(&uri(&dir.path().join("s"), ""), &quick(Access::Write));
    let storage = storage.expect("connects");
    drop(first);
    let _second = serve(8192);
    let error = storage.read_at(&mut [0; 10], 0).expect_err("another disk");
    assert!(error.message().contains("another one"), "{error}");
}

#[test]
fn a_read_only_export_is_not_opened_for_writing() {
    let dir = scratch();
    let image = dir.path().join("disk.raw");
    std::fs::write(&image, [1; 4096]).expect("writes");
    let exports = vec![export("", &image, &ChainOptions::read())];
    let serving = Serving::new(dir, exports, lasting());
    let error = NbdStorage::connect(&serving.uri(""), &quick(Access::Write));
    assert_eq!(error.expect_err("read-only").kind(), ErrorKind::ReadOnly);
    NbdStorage::connect(&serving.uri(""), &quick(Access::Read)).expect("reads");
}

#[test]
fn zeroes_at_the_server_are_holes_to_the_client_until_they_are_written_to() {
    let serving = Serving::raw(&vec![9; 4 << 20], lasting());
    let storage = NbdStorage::connect(&serving.uri(""), &quick(Access::Write));
    let storage = storage.expect("connects");
    let run = |at: u64| {
        let run = storage.run(at, 4 << 20).expect("tells extents");
        (run.data, run.len)
    };
    assert_eq!(run(0), (true, 4 << 20));
    let hole = (1 << 20)..(2 << 20);
    storage
        .zero(hole.clone(), Zeroing::MayUnmap)
        .expect("zeroes");
    assert_eq!((run(0), run(1 << 20)), ((true, 1 << 20), (false, 1 << 20)));
    assert_eq!(run((2 << 20) - 512), (false, 512));
    let mut bytes = vec![1; 1 << 20];
    storage.read_at(&mut bytes, hole.start).expect("reads");
    assert!(bytes.iter().all(|b| *b == 0));
    storage.write_at(&[5; 4096], hole.start).expect("writes");
    assert_eq!(run(1 << 20), (true, 4096));
    storage.discard((3 << 20)..(4 << 20)).expect("discards");
    assert_eq!(run(3 << 20), (false, 1 << 20));
    let uri = serving.uri("");
    let map = crate::nbd::client::run(serving.dir.path(), &["map", "--output", "json", &uri]);
    assert_eq!(map.matches("\"data\": false").count(), 2, "{map}");
}

#[test]
fn commands_take_uris_where_they_take_files() {
    if !requires("qemu-img") {
        return;
    }
    let mut random = Seeded::new("commands");
    let mut bytes = random.bytes(1 << 20);
    bytes.resize(4 << 20, 0);
    let source = Serving::raw(&bytes, lasting());
    let dir = source.dir.path();
    std::fs::write(dir.join("plain.raw"), &bytes).expect("writes");
    let from = source.uri("");
    let info = run(dir, &["info", "--output", "json", &from]);
    let info: serde_json::Value = serde_json::from_str(&info).expect("JSON");
    assert_eq!(
        (&info["format"], &info["virtual-size"]),
        (&"raw".into(), &(4 << 20).into())
    );
    run(dir, &["convert", "-O", "qcow2", &from, "copy.qcow2"]);
    peer("qemu-img", dir, ["compare", "copy.qcow2", "plain.raw"]);
    run(dir, &["compare", &from, "copy.qcow2"]);
    // Into a server: raw, whatever was there before, and qcow2 inside one.
    let target = Serving::raw(&vec![9; 4 << 20], lasting());
    run(
        dir,
        &["convert", "-O", "raw", "copy.qcow2", &target.uri("")],
    );
    let found = std::fs::read(target.image()).expect("reads");
    assert_same(&found, &bytes, 0, "converted");
    let inner = Serving::raw(&vec![0; 8 << 20], lasting());
    run(
        dir,
        &["convert", "--verify", "-O", "qcow2", &from, &inner.uri("")],
    );
    let inside = inner.uri("");
    let info = run(dir, &["info", "--output", "json", &inside]);
    assert!(info.contains("\"qcow2\""), "{info}");
    run(dir, &["check", &inside]);
    run(dir, &["compare", &inside, "plain.raw"]);
    let copy = ["convert", "-f", "qcow2", "-O", "raw", &*inside, "again.raw"];
    peer("qemu-img", dir, copy);
    run(dir, &["compare", "again.raw", "plain.raw"]);
    let write = [
        "io",
        "-c",
        "write -P 7 1k 2k",
        "-c",
        "read -P 7 1k 2k",
        &*inside,
    ];
    run(dir, &write);
    // A target too small for it, and one that is the source.
    let small = Serving::raw(&[9; 4096], lasting());
    let small = ["convert", "-O", "raw", &*from, &small.uri("")];
    vdtool().current_dir(dir).args(small).assert().code(1);
    vdtool()
        .args(["convert", "-O", "raw", &*from, &*from])
        .assert()
        .code(1);
}

#[test]
fn a_uri_as_backing_name_is_followed_only_where_the_user_names_it() {
    let bytes = Seeded::new("backing").bytes(1 << 20);
    let base = Serving::raw(&bytes, lasting());
    let (dir, uri) = (base.dir.path(), base.uri(""));
    std::fs::write(dir.join("plain.raw"), &bytes).expect("writes");
    run(
        dir,
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            &uri,
            "-F",
            "raw",
            "top.qcow2",
        ],
    );
    let refused = |options: &[&str]| {
        let all = [&["compare"][..], options, &["top.qcow2", "plain.raw"]].concat();
        let done = vdtool().current_dir(dir).args(all).assert().code(2);
        String::from_utf8_lossy(&done.get_output().stderr).into_owned()
    };
    for options in [
        &[][..],
        &["--allow-ref", "any"],
        &["--allow-ref", "nbd://localhost/"],
    ] {
        let told = refused(options);
        assert!(told.contains("--allow-ref"), "{told}");
    }
    run(
        dir,
        &["compare", "--allow-ref", &uri, "top.qcow2", "plain.raw"],
    );
    let both = [
        "compare",
        "--allow-ref",
        "any",
        "--allow-ref",
        &*uri,
        "top.qcow2",
        "plain.raw",
    ];
    run(dir, &both);
    // Without the chain nobody is asked.
    run(dir, &["info", "top.qcow2"]);
    // Formats that know only files do not take it.
    let vhd = ["create", "-q", "-b", &*uri, "-F", "raw", "top.vhd"];
    vdtool().current_dir(dir).args(vhd).assert().code(63);
    // A new image over it, converted.
    let over = [
        "convert",
        "-O",
        "qcow2",
        "-B",
        &*uri,
        "-F",
        "raw",
        "plain.raw",
        "over.qcow2",
    ];
    run(dir, &over);
    run(
        dir,
        &["compare", "--allow-ref", &uri, "over.qcow2", "plain.raw"],
    );
}

#[test]
fn an_image_at_a_server_names_no_files_of_this_host() {
    let dir = scratch();
    run(dir.path(), &["create", "-q", "-f", "raw", "base.raw", "1M"]);
    run(
        dir.path(),
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            "base.raw",
            "-F",
            "raw",
            "top.qcow2",
        ],
    );
    // The file itself is served, not what is in it.
    let image = dir.path().join("top.qcow2");
    let raw = ChainOptions {
        format: vdtool::formats::by_name("raw"),
        ..ChainOptions::read()
    };
    let serving = Serving::new(dir, vec![export("", &image, &raw)], lasting());
    let uri = serving.uri("");
    let dir = serving.dir.path();
    run(dir, &["info", &uri]);
    for options in [&[][..], &["--allow-ref", "any"]] {
        let all = [&["map"][..], options, &[&*uri]].concat();
        let done = vdtool().current_dir(dir).args(all).assert().code(1);
        let told = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
        assert!(
            told.contains("base.raw") && told.contains("server"),
            "{told}"
        );
    }
}

#[test]
fn uris_that_are_wrong_are_told_in_one_line() {
    for uri in ["nbd://", "nbd+unix:///x", "nbd://h/?x=y", "nbd+vsock://1/"] {
        let done = vdtool()
            .args(["info", uri])
            .assert()
            .code(predicates_failure(uri));
        let told = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
        assert!(told.contains(uri) && told.lines().count() == 1, "{told}");
    }
    let nobody = "nbd+unix:///?socket=/nowhere/at/all";
    let done = vdtool().args(["info", nobody]).assert().code(1);
    let told = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
    assert!(told.contains("cannot connect"), "{told}");
}

/// vsock is known and not supported; the others are no URIs.
fn predicates_failure(uri: &str) -> i32 {
    if uri.contains("vsock") { 63 } else { 1 }
}

//! What our client says of writes that a server acknowledged and then lost.

use std::sync::Barrier;
use std::time::Duration;

use vdtool::chain::open::ChainOptions;
use vdtool::nbd::wire::{can, command, flag};
use vdtool::storage::nbd::{NbdStorage, Options};
use vdtool::storage::open::{Access, Flushing};
use vdtool::storage::{Storage, Zeroing};
use vdtool::{ErrorKind, Result};

use super::fake::{CHANGES, Ends, Fake, Manners};
use super::{Peer, Serving, export, lasting, until, uri};
use crate::util::{requires, scratch, vdtool};

const SIZE: usize = 1 << 20;
const FLUSHES: u16 = CHANGES | can::FLUSH;

fn options() -> Options {
    Options {
        retry: Duration::from_secs(20),
        ..Options::new(Access::Write)
    }
}

fn connect(fake: &Fake) -> NbdStorage {
    NbdStorage::connect(&fake.uri(), &options()).expect("connects")
}

/// With as much patience as a server needs that ends in this way.
fn connect_for(fake: &Fake, ends: Ends) -> NbdStorage {
    let options = Options {
        timeout: match ends {
            Ends::Told => options().timeout,
            Ends::Silent => Duration::from_secs(2),
        },
        ..options()
    };
    NbdStorage::connect(&fake.uri(), &options).expect("connects")
}

/// Flushes that tell of a loss: all of them, until the export is opened anew.
fn has_lost(storage: &dyn Storage) {
    for _ in 0..3 {
        let error = storage.sync().expect_err("something may be lost");
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, libc::EIO));
        assert!(error.message().contains("may be lost"), "{error}");
    }
}

fn byte(storage: &dyn Storage, at: u64) -> u8 {
    let mut byte = [0xee];
    storage.read_at(&mut byte, at).expect("reads");
    byte[0]
}

type Change = fn(&dyn Storage) -> Result<()>;

const ALL: [(&str, Change); 4] = [
    ("write", |s| s.write_at(&[8; 512], 0)),
    ("zero", |s| s.zero(0..512, Zeroing::MayUnmap)),
    ("zero and keep", |s| s.zero(0..512, Zeroing::KeepSpace)),
    ("discard", |s| s.discard(0..512)),
];

#[test]
fn a_change_that_was_not_flushed_when_the_server_died_fails_all_flushes_that_follow() {
    for ends in [Ends::Told, Ends::Silent] {
        for (what, change) in ALL {
            let fake = Fake::start(SIZE, Manners::flags(FLUSHES));
            let storage = connect_for(&fake, ends);
            storage.write_at(&[7; 4096], 0).expect("writes");
            storage.sync().expect("flushes");
            change(&storage).expect("is acknowledged");
            fake.crash(ends);
            has_lost(&storage);
            assert_eq!(byte(&storage, 0), 7, "{what}: the server has lost it");
        }
    }
}

#[test]
fn a_change_that_was_flushed_is_not_lost_with_the_connection() {
    for (_, change) in ALL {
        let fake = Fake::start(SIZE, Manners::flags(FLUSHES));
        let storage = connect(&fake);
        change(&storage).expect("is acknowledged");
        storage.sync().expect("flushes");
        fake.crash(Ends::Told);
        storage.sync().expect("nothing was lost");
        // One that only reads has nothing to lose either.
        assert_eq!(byte(&storage, 5000), 0);
        fake.crash(Ends::Told);
        storage.sync().expect("nothing was lost");
    }
}

#[test]
fn requests_that_go_on_after_a_loss_do_not_hide_it() {
    let fake = Fake::start(SIZE, Manners::flags(FLUSHES));
    let storage = connect(&fake);
    storage.write_at(&[8; 512], 0).expect("writes");
    fake.crash(Ends::Told);
    // Both find a new connection.
    assert_eq!(byte(&storage, 0), 0);
    storage.write_at(&[9; 512], 512).expect("writes");
    has_lost(&storage);
    assert_eq!((byte(&storage, 0), byte(&storage, 512)), (0, 9));
    let storage = connect(&fake);
    // Two losses before the next flush are told as one.
    for _ in 0..2 {
        storage.write_at(&[9; 512], 0).expect("writes");
        fake.crash(Ends::Told);
        assert_eq!(byte(&storage, 512), 9);
    }
    has_lost(&storage);
}

/// Has threads write until several connections have brought writes.
fn write_on_several_connections(fake: &Fake, storage: &NbdStorage) {
    until("several connections are used", || {
        let together = Barrier::new(4);
        std::thread::scope(|scope| {
            for part in 0..4u8 {
                let together = &together;
                scope.spawn(move || {
                    together.wait();
                    let at = u64::from(part) * 4096;
                    storage.write_at(&[part + 1; 4096], at).expect("writes");
                });
            }
        });
        fake.connections_with(command::WRITE) > 1
    });
}

#[test]
fn a_loss_is_found_though_other_connections_to_the_new_server_work() {
    let manners = Manners {
        delay: Duration::from_millis(20),
        ..Manners::flags(FLUSHES | can::MULTI_CONN)
    };
    for ends in [Ends::Told, Ends::Silent] {
        let fake = Fake::start(SIZE, manners);
        let storage = connect_for(&fake, ends);
        write_on_several_connections(&fake, &storage);
        storage.sync().expect("flushes");
        storage.sync().expect("flushes");
        write_on_several_connections(&fake, &storage);
        fake.crash(ends);
        has_lost(&storage);
    }
}

#[test]
fn a_flush_goes_over_every_connection_that_had_changes_and_no_other() {
    let manners = Manners {
        delay: Duration::from_millis(20),
        ..Manners::flags(FLUSHES | can::MULTI_CONN)
    };
    let fake = Fake::start(SIZE, manners);
    let storage = connect(&fake);
    write_on_several_connections(&fake, &storage);
    storage.sync().expect("flushes");
    let used = fake.connections_with(command::WRITE);
    assert_eq!(fake.connections_with(command::FLUSH), used);
    let flushes = || {
        let seen = fake.seen().into_iter();
        seen.filter(|s| s.command == command::FLUSH).count()
    };
    let before = flushes();
    storage.sync().expect("flushes what others wrote");
    assert_eq!(flushes(), before + 1);
    storage.write_at(&[1; 512], 0).expect("writes");
    storage.sync().expect("flushes");
    assert_eq!(flushes(), before + 2);
}

#[test]
fn a_flush_does_not_cover_what_is_written_while_it_is_under_way() {
    let manners = Manners {
        late_flush: true,
        ..Manners::flags(FLUSHES)
    };
    let fake = Fake::start(SIZE, manners);
    let storage = connect(&fake);
    storage.write_at(&[1; 512], 0).expect("writes");
    std::thread::scope(|scope| {
        let flush = scope.spawn(|| storage.sync());
        until("the flush is there", || {
            fake.connections_with(command::FLUSH) == 1
        });
        storage.write_at(&[2; 512], 512).expect("writes");
        flush.join().expect("ends").expect("flushes the first");
    });
    fake.crash(Ends::Told);
    let error = storage.sync().expect_err("the second write is lost");
    assert!(error.message().contains("may be lost"), "{error}");
    assert_eq!((byte(&storage, 0), byte(&storage, 512)), (1, 0));
}

#[test]
fn a_flush_that_the_server_refuses_fails_those_that_follow() {
    let fake = Fake::start(SIZE, Manners::flags(FLUSHES));
    let storage = connect(&fake);
    storage.write_at(&[1; 512], 0).expect("writes");
    fake.fail_flush();
    let error = storage.sync().expect_err("refused");
    assert!(!error.message().contains("may be lost"), "{error}");
    has_lost(&storage);
    connect(&fake).sync().expect("is opened anew");
}

#[test]
fn a_server_without_flushes_is_sent_durable_writes() {
    let fake = Fake::start(SIZE, Manners::flags(CHANGES | can::FUA));
    let storage = connect(&fake);
    for (_, change) in ALL {
        change(&storage).expect("is durable");
    }
    storage.write_at(&[5; 512], 0).expect("is durable");
    fake.crash(Ends::Told);
    storage.sync().expect("nothing was lost");
    assert_eq!(byte(&storage, 511), 5);
    let seen = fake.seen();
    assert!(seen.iter().all(|s| s.command != command::FLUSH));
    let is_durable = |s: &super::fake::Seen| s.flags & flag::FUA != 0;
    let changes = seen.iter().filter(|s| s.command != command::READ);
    assert_eq!(changes.clone().count(), ALL.len() + 1);
    assert!(changes.clone().all(is_durable));
    // Where there are flushes, they are cheaper.
    let fake = Fake::start(SIZE, Manners::flags(FLUSHES | can::FUA));
    let storage = connect(&fake);
    storage.write_at(&[5; 512], 0).expect("writes");
    assert!(!fake.seen().iter().any(is_durable));
}

#[test]
fn a_server_that_cannot_say_what_is_durable_is_written_to_only_in_mode_unsafe() {
    let fake = Fake::start(SIZE, Manners::flags(CHANGES));
    let error = NbdStorage::connect(&fake.uri(), &options());
    let error = error.expect_err("cannot flush");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.message().contains("unsafe"), "{error}");
    NbdStorage::connect(&fake.uri(), &Options::new(Access::Read)).expect("may be read");
    let waived = Options {
        flushing: Flushing::Waived,
        ..options()
    };
    let storage = NbdStorage::connect(&fake.uri(), &waived).expect("nobody relies on it");
    storage.write_at(&[3; 512], 0).expect("writes");
    storage.sync().expect("there is nothing to do");
    drop(storage);
    let uri = fake.uri();
    let write = ["io", "-f", "raw", "-c", "write -P 4 0 512", &*uri];
    vdtool().args(write).assert().code(63);
    let write = [
        "io",
        "-f",
        "raw",
        "-t",
        "unsafe",
        "-c",
        "write -P 4 0 512",
        &*uri,
    ];
    vdtool().args(write).assert().success();
    let read = ["io", "-f", "raw", "-r", "-c", "read -P 4 0 512", &*uri];
    vdtool().args(read).assert().success();
    let source = fake.dir.path().join("source.raw");
    std::fs::write(&source, vec![6; SIZE]).expect("writes");
    let convert = |mode: &str| {
        let arguments = ["convert", "-f", "raw", "-O", "raw", "-t", mode];
        vdtool().args(arguments).arg(&source).arg(&*uri).assert()
    };
    convert("writeback").code(63);
    convert("unsafe").success();
}

#[test]
fn a_conversion_into_a_server_that_dies_on_the_way_fails() {
    let dir = scratch();
    let source = dir.path().join("source.raw");
    std::fs::write(&source, vec![6; 16 << 20]).expect("writes");
    for format in ["raw", "qcow2"] {
        for write in [2, 4] {
            let manners = Manners {
                crash_at_write: Some(write),
                ..Manners::flags(FLUSHES)
            };
            let fake = Fake::start(32 << 20, manners);
            let uri = fake.uri();
            let done = vdtool()
                .args(["convert", "-f", "raw", "-O", format])
                .arg(&source)
                .arg(&*uri)
                .assert()
                .code(1);
            assert!(fake.crashed());
            let told = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
            assert!(
                told.contains("may be lost"),
                "{format}, write {write}: {told}"
            );
            assert_eq!(told.lines().count(), 1, "{told}");
        }
    }
    let manners = Manners {
        crash_at_write: Some(2),
        ..Manners::flags(FLUSHES)
    };
    let fake = Fake::start(32 << 20, manners);
    let create = ["create", "-f", "qcow2", &*fake.uri(), "8M"];
    vdtool().args(create).assert().code(1);
    assert!(fake.crashed());
}

#[test]
fn a_server_that_takes_few_connections_is_not_asked_for_more_with_every_request() {
    let manners = Manners {
        delay: Duration::from_millis(1),
        most: 1,
        ..Manners::flags(FLUSHES | can::MULTI_CONN)
    };
    let fake = Fake::start(SIZE, manners);
    let storage = connect(&fake);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for at in 0..50 {
                    storage.read_at(&mut [0; 512], at * 512).expect("reads");
                }
            });
        }
    });
    let came = fake.connections();
    assert!((2..=8).contains(&came), "{came} connections");
}

/// A server of the same file again and again, killed in between.
fn killed_and_restarted(tool: &str, arguments: impl Fn(&str, &str) -> Vec<String>) {
    if !requires(tool) {
        return;
    }
    let dir = scratch();
    let (socket, image) = (dir.path().join("s"), dir.path().join("disk.raw"));
    std::fs::write(&image, vec![0; SIZE]).expect("writes");
    let text = |path: &std::path::Path| path.to_str().expect("UTF-8").to_owned();
    let arguments = arguments(&text(&socket), &text(&image));
    let arguments: Vec<&str> = arguments.iter().map(|a| &**a).collect();
    let mut server = Peer::start(tool, &arguments, &socket);
    let storage = NbdStorage::connect(&uri(&socket, ""), &options()).expect("connects");
    let restart = |server: &mut Peer| {
        server.kill();
        // Some do not take over a socket that is there.
        std::fs::remove_file(&socket).expect("removes");
        *server = Peer::start(tool, &arguments, &socket);
    };
    storage.write_at(&[1; 512], 0).expect("writes");
    restart(&mut server);
    has_lost(&storage);
    let storage = NbdStorage::connect(&uri(&socket, ""), &options()).expect("connects");
    storage.write_at(&[2; 512], 0).expect("writes");
    storage.sync().expect("flushes");
    restart(&mut server);
    storage.sync().expect("all was flushed");
    assert_eq!(byte(&storage, 0), 2);
    storage.discard(0..65_536).expect("discards");
    restart(&mut server);
    storage.write_at(&[3; 512], 4096).expect("writes on");
    has_lost(&storage);
}

#[test]
fn nbdkit_killed_and_restarted_has_lost_what_was_not_flushed() {
    killed_and_restarted("nbdkit", |socket, image| {
        let arguments = ["-f", "-U", socket, "file", image];
        arguments.map(ToOwned::to_owned).to_vec()
    });
}

#[test]
fn qemu_nbd_killed_and_restarted_has_lost_what_was_not_flushed() {
    killed_and_restarted("qemu-nbd", |socket, image| {
        let arguments = [
            "-t",
            "-e",
            "8",
            "-f",
            "raw",
            "--discard=unmap",
            "-k",
            socket,
            image,
        ];
        arguments.map(ToOwned::to_owned).to_vec()
    });
}

#[test]
fn a_flush_that_failed_fails_sessions_jobs_and_clients() {
    let fake = Fake::start(SIZE, Manners::flags(FLUSHES));
    let told = |arguments: &[&str]| {
        fake.fail_flush();
        let done = vdtool().args(arguments).arg(fake.uri()).assert().code(1);
        let output = done.get_output();
        [&*output.stdout, &*output.stderr]
            .map(String::from_utf8_lossy)
            .concat()
    };
    let text = told(&[
        "io",
        "-f",
        "raw",
        "-c",
        "write 0 512",
        "-c",
        "flush",
        "-c",
        "flush",
    ]);
    assert!(text.contains("opening it anew"), "{text}");
    let dir = scratch();
    let from = dir.path().join("from.raw");
    std::fs::write(&from, vec![1; SIZE]).expect("writes");
    told(&[
        "convert",
        "-n",
        "-f",
        "raw",
        "-O",
        "raw",
        from.to_str().expect("UTF-8"),
    ]);
    // All clients of a server in front of it.
    let options = ChainOptions {
        format: vdtool::formats::by_name("raw"),
        ..ChainOptions::write()
    };
    let backed = export("", fake.uri().as_ref(), &options);
    let serving = Serving::new(scratch(), vec![backed], lasting());
    fake.fail_flush();
    for _ in 0..3 {
        let client = NbdStorage::connect(&uri(&serving.socket, ""), &self::options());
        let error = client.expect("connects").sync().expect_err("was lost");
        assert_eq!(error.errno(), libc::EIO);
    }
}

//! Clients that come while others hold all the places.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use vdtool::backend::Backend;
use vdtool::chain::open::ChainOptions;
use vdtool::nbd::wire::{Headers, answer, command, option};
use vdtool::server::nbd::{Listen, Persistence, start};
use vdtool::storage::Storage;
use vdtool::storage::nbd::{NbdStorage, Options};
use vdtool::storage::open::Access;

use super::wire::Raw;
use super::{Serving, export, is_served, lasting, until};
use crate::util::scratch;

/// What is less than a client waits for a place.
const AT_ONCE: Duration = Duration::from_millis(700);

fn few(connections: usize) -> super::Options {
    super::Options {
        connections,
        ..lasting()
    }
}

fn connect(uri: &str) -> NbdStorage {
    let options = Options {
        connections: 1,
        retry: Duration::ZERO,
        ..Options::new(Access::Write)
    };
    NbdStorage::connect(uri, &options).expect("finds a place")
}

/// A server all whose places are kept by clients that hung up, because a request of theirs is held
/// until the backend of its export goes on.
fn held_up(places: usize, persistence: Persistence) -> (Serving, Arc<Backend>) {
    let dir = scratch();
    let image = dir.path().join("disk.raw");
    std::fs::write(&image, [7; 5000]).expect("writes the image");
    let export = export("", &image, &ChainOptions::write());
    let backend = Arc::clone(&export.backend);
    let options = super::Options {
        persistence,
        ..few(places)
    };
    let serving = Serving::new(dir, vec![export], options);
    let ready = |_| Raw::ready(&serving.socket, Headers::Simple);
    let mut all: Vec<_> = (0..places).map(ready).collect();
    for raw in &mut all {
        assert_eq!(raw.call(command::READ, 0, 0, 1).data, [7]);
    }
    backend.pause();
    for raw in &mut all {
        raw.request(command::READ, 0, 0, 1);
    }
    // So that the server has them in hand.
    thread::sleep(Duration::from_millis(100));
    drop(all);
    (serving, backend)
}

/// What is said to a further client, and after which time.
fn told(serving: &Serving) -> (u32, Duration) {
    let mut raw = Raw::connect(&serving.socket);
    let start = Instant::now();
    let told = raw.ask(option::STRUCTURED_REPLY, &[]);
    if told.kind != answer::ACK {
        let text = String::from_utf8_lossy(&told.data).into_owned();
        assert!(text.contains("too many"), "{text}");
        assert!(raw.ended().is_empty());
    }
    (told.kind, start.elapsed())
}

#[test]
fn who_leaves_and_comes_again_at_once_finds_the_only_place_free() {
    let serving = Serving::raw(&[7; 5000], few(1));
    for _ in 0..50 {
        let storage = connect(&serving.uri(""));
        storage.write_at(&[8; 512], 512).expect("writes");
        drop(storage);
        // Without a farewell.
        let mut raw = Raw::ready(&serving.socket, Headers::Extended);
        raw.request(command::READ, 0, 0, 512);
        drop(raw);
    }
}

#[test]
fn who_leaves_and_comes_again_at_once_finds_the_only_place_free_over_tcp() {
    let dir = scratch();
    let image = dir.path().join("disk.raw");
    std::fs::write(&image, [7; 5000]).expect("writes the image");
    let listen = Listen::parse("127.0.0.1:0").expect("an address");
    let exports = vec![export("", &image, &ChainOptions::write())];
    let server = start(&listen, exports, few(1)).expect("starts");
    for _ in 0..50 {
        let storage = connect(&server.addresses()[0]);
        storage.write_at(&[8; 512], 512).expect("writes");
    }
}

#[test]
fn a_place_is_had_though_the_server_sees_only_later_that_its_client_hung_up() {
    let serving = Serving::raw(&[7; 5000], few(1));
    let raw = Raw::ready(&serving.socket, Headers::Extended);
    // As a child process has one until it starts its program.
    let other = raw.stream.try_clone().expect("a second descriptor");
    drop(raw);
    let closes = thread::spawn(|| {
        thread::sleep(Duration::from_millis(100));
        drop(other);
    });
    drop(connect(&serving.uri("")));
    closes.join().expect("closes");
}

#[test]
fn all_who_leave_and_come_again_together_find_places() {
    const MANY: usize = 48;
    let (serving, backend) = held_up(MANY, Persistence::Stopped);
    let uri = serving.uri("");
    thread::scope(|scope| {
        // They have all been let in to wait before there is a place.
        let all: Vec<_> = (0..MANY).map(|_| Raw::connect(&serving.socket)).collect();
        let all = all.into_iter().map(|mut raw| {
            scope.spawn(move || {
                raw.go("");
                assert_eq!(raw.call(command::READ, 0, 0, 1).data, [7]);
            })
        });
        let all: Vec<_> = all.collect();
        thread::sleep(Duration::from_millis(100));
        backend.resume();
        for one in all {
            one.join().expect("is in");
        }
    });
    let mut inside = Vec::new();
    for _ in 0..10 {
        drop(inside);
        inside = thread::scope(|scope| {
            let all: Vec<_> = (0..MANY).map(|_| scope.spawn(|| connect(&uri))).collect();
            let all = all.into_iter().map(|one| one.join().expect("is in"));
            all.collect()
        });
    }
    assert_eq!(told(&serving).0, answer::SHUTDOWN);
}

#[test]
fn the_place_of_one_that_hung_up_is_had_once_its_requests_have_ended() {
    let (serving, backend) = held_up(1, Persistence::Stopped);
    let mut second = Raw::connect(&serving.socket);
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(100));
            backend.resume();
        });
        second.go("");
    });
    assert_eq!(second.call(command::READ, 0, 0, 5000).data, [7; 5000]);
    // From then on it is in as all others are.
    let (kind, time) = told(&serving);
    assert_eq!(kind, answer::SHUTDOWN);
    assert!(time < AT_ONCE, "nobody is leaving, but it took {time:?}");
    drop(second);
    assert_eq!(told(&serving).0, answer::ACK);
}

#[test]
fn a_place_that_does_not_become_free_is_not_waited_for_for_long() {
    let (serving, backend) = held_up(1, Persistence::Stopped);
    let (kind, time) = told(&serving);
    assert_eq!(kind, answer::SHUTDOWN);
    assert!(time < Duration::from_secs(5), "{time:?}");
    // Who looks around and goes is not held up.
    let mut passing = Raw::connect(&serving.socket);
    let start = Instant::now();
    assert_eq!(passing.ask(option::ABORT, &[]).kind, answer::ACK);
    assert!(start.elapsed() < AT_ONCE);
    // Nor does a crowd that waits in vain keep a place from becoming free.
    let crowd: Vec<_> = (0..100).map(|_| Raw::silent(&serving.socket)).collect();
    backend.resume();
    drop(crowd);
    until("there is room again", || is_served(&serving.socket));
}

#[test]
fn a_server_without_persistence_goes_on_for_one_that_waits_for_the_last_place() {
    let (serving, backend) = held_up(1, Persistence::LastClient);
    let mut second = Raw::connect(&serving.socket);
    backend.resume();
    second.go("");
    assert_eq!(second.call(command::READ, 0, 0, 1).data, [7]);
    drop(second);
    serving.server.wait().expect("ends well");
}

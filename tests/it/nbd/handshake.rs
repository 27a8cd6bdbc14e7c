//! The handshake of our server, with clients that a test scripts.

use std::time::Duration;

use vdtool::chain::open::ChainOptions;
use vdtool::nbd::wire::{Headers, OPTION, answer, can, info, option, put_string};
use vdtool::server::nbd::{Listen, Options, Persistence, start};

use super::wire::{Raw, wanted};
use super::{Serving, export, is_served, lasting, until};
use crate::util::{Seeded, scratch};

#[test]
fn an_export_is_described_as_far_as_a_client_asks() {
    let serving = Serving::raw(&[7; 5000], lasting());
    let mut raw = Raw::connect(&serving.socket);
    let asked = wanted("", &[info::NAME, info::DESCRIPTION, info::BLOCK_SIZE, 77]);
    raw.option(option::INFO, &asked);
    let mut told = Vec::new();
    loop {
        let answer = raw.answer(option::INFO);
        if answer.kind == answer::ACK {
            break;
        }
        assert_eq!(answer.kind, answer::INFO);
        told.push(answer.data);
    }
    told.sort();
    let fact = |kind: u16, data: &[u8]| [&kind.to_be_bytes()[..], data].concat();
    let sizes: Vec<u8> = [1u32, 4096, 32 << 20]
        .iter()
        .flat_map(|n| n.to_be_bytes())
        .collect();
    assert_eq!(told[1], fact(info::NAME, b""));
    assert_eq!(told[2], fact(info::DESCRIPTION, b"the disk "));
    assert_eq!(told[3], fact(info::BLOCK_SIZE, &sizes));
    assert_eq!(told[0][..10], fact(info::EXPORT, &5000u64.to_be_bytes()));
    // The same connection goes on to use it.
    raw.go("");
    assert_eq!((raw.size, raw.flags & can::DF), (5000, 0));
    assert_eq!(raw.call(0, 0, 4990, 10).data, [7; 10]);
}

#[test]
fn what_is_not_known_or_makes_no_sense_is_refused_and_the_client_may_go_on() {
    let serving = Serving::raw(&[7; 5000], lasting());
    let mut raw = Raw::connect(&serving.socket);
    let long = vec![0; 100_000];
    for (number, data, expected) in [
        (99, &b"x"[..], answer::UNSUPPORTED),
        (option::LIST, b"x", answer::INVALID),
        (option::STRUCTURED_REPLY, b"x", answer::INVALID),
        (option::EXTENDED_HEADERS, b"x", answer::INVALID),
        (option::STARTTLS, b"", answer::POLICY),
        (option::GO, b"", answer::INVALID),
        (option::GO, &wanted("nobody", &[]), answer::UNKNOWN),
        (option::INFO, &[0xff; 12], answer::INVALID),
        (option::GO, &wanted("", &[1, 2, 3])[..8], answer::INVALID),
        (option::SET_META_CONTEXT, b"", answer::INVALID),
        (option::GO, &long, answer::TOO_BIG),
    ] {
        assert_eq!(raw.ask(number, data).kind, expected, "option {number}");
    }
    raw.raise(Headers::Structured);
    let mut absurd = Vec::new();
    put_string(&mut absurd, "");
    absurd.extend(u32::MAX.to_be_bytes());
    for number in [option::SET_META_CONTEXT, option::LIST_META_CONTEXT] {
        assert_eq!(raw.ask(number, &absurd).kind, answer::INVALID);
    }
    raw.raise(Headers::Extended);
    let again = raw.ask(option::EXTENDED_HEADERS, &[]);
    assert_eq!(again.kind, answer::INVALID);
    let lower = raw.ask(option::STRUCTURED_REPLY, &[]);
    assert_eq!(lower.kind, answer::EXTENDED_HEADERS_REQUIRED);
    raw.go("");
    assert_eq!(raw.size, 5000);
    assert_eq!(raw.call(0, 0, 0, 5000).data, [7; 5000]);
}

#[test]
fn old_clients_name_an_export_and_may_want_padding() {
    let serving = Serving::raw(&[7; 5000], lasting());
    for (flags, padding) in [(1u32, 124), (3, 0)] {
        let mut raw = Raw::silent(&serving.socket);
        raw.bytes(18);
        raw.send(&flags.to_be_bytes());
        raw.option(option::EXPORT_NAME, b"");
        assert_eq!(raw.u64(), 5000);
        let can = raw.u16();
        assert_ne!(can & can::WRITE_ZEROES, 0);
        assert!(raw.bytes(padding).iter().all(|b| *b == 0));
        assert_eq!(raw.call(0, 0, 1, 3).data, [7; 3]);
    }
    let mut raw = Raw::connect(&serving.socket);
    raw.option(option::EXPORT_NAME, b"nobody");
    assert!(raw.ended().is_empty());
}

#[test]
fn contexts_are_listed_by_namespace_and_chosen_by_name() {
    let serving = Serving::raw(&[7; 5000], lasting());
    let mut raw = Raw::connect(&serving.socket);
    raw.raise(Headers::Structured);
    let list = option::LIST_META_CONTEXT;
    let all = ["base:allocation", "qemu:allocation-depth"];
    assert_eq!(raw.contexts(list, "", &[]), all);
    assert_eq!(raw.contexts(list, "", &["base:"]), all[..1]);
    assert_eq!(raw.contexts(list, "", &["qemu:"]), all[1..]);
    assert!(raw.contexts(list, "", &["qemu:dirty-bitmap:"]).is_empty());
    let set = option::SET_META_CONTEXT;
    assert!(raw.contexts(set, "", &["base:"]).is_empty());
    assert_eq!(raw.contexts(set, "", &["x:y", all[0]]), all[..1]);
    raw.go("");
    assert_eq!(raw.call(7, 0, 0, 5000).extents.len(), 1);
}

#[test]
fn what_is_no_handshake_ends_the_connection_at_once() {
    let serving = Serving::raw(&[7; 5000], lasting());
    // Flags that nobody knows.
    let mut raw = Raw::silent(&serving.socket);
    raw.bytes(18);
    raw.send(&[0xff; 4]);
    assert!(raw.ended().is_empty());
    // No option.
    let mut raw = Raw::connect(&serving.socket);
    raw.send(&[0x55; 16]);
    assert!(raw.ended().is_empty());
    // An option of four gigabytes.
    let mut raw = Raw::connect(&serving.socket);
    raw.send(&OPTION.to_be_bytes());
    raw.send(&option::GO.to_be_bytes());
    raw.send(&u32::MAX.to_be_bytes());
    assert!(raw.ended().is_empty());
    // A client that says goodbye is answered.
    let mut raw = Raw::connect(&serving.socket);
    assert_eq!(raw.ask(option::ABORT, &[]).kind, answer::ACK);
    assert!(raw.ended().is_empty());
}

#[test]
fn who_takes_too_long_to_agree_is_sent_away() {
    let options = Options {
        handshake: Duration::from_millis(200),
        ..lasting()
    };
    let serving = Serving::raw(&[7; 5000], options);
    let mut silent = Raw::silent(&serving.socket);
    assert_eq!(silent.ended().len(), 18);
    // One that has agreed may be silent for as long as it likes.
    let mut raw = Raw::ready(&serving.socket, Headers::Simple);
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(raw.call(0, 0, 0, 1).data, [7]);
}

#[test]
fn clients_beyond_the_limit_are_told_so_and_the_others_go_on() {
    let options = Options {
        connections: 2,
        ..lasting()
    };
    let serving = Serving::raw(&[7; 5000], options);
    let mut first = Raw::ready(&serving.socket, Headers::Simple);
    let second = Raw::ready(&serving.socket, Headers::Simple);
    let mut third = Raw::connect(&serving.socket);
    let told = third.ask(option::GO, &wanted("", &[]));
    assert_eq!(told.kind, answer::SHUTDOWN);
    assert!(String::from_utf8_lossy(&told.data).contains("too many"));
    assert!(third.ended().is_empty());
    // Of a crowd that says nothing, most are not even told, and none is in the way.
    let crowd: Vec<_> = (0..200).map(|_| Raw::silent(&serving.socket)).collect();
    assert_eq!(first.call(0, 0, 0, 5000).data, [7; 5000]);
    drop((second, crowd));
    until("there is room again", || is_served(&serving.socket));
}

#[test]
fn without_persistence_the_server_ends_with_its_last_client() {
    let options = Options {
        persistence: Persistence::LastClient,
        ..lasting()
    };
    let serving = Serving::raw(&[7; 5000], options);
    // Looking around is no use of it.
    drop(Raw::connect(&serving.socket));
    let first = Raw::ready(&serving.socket, Headers::Simple);
    let mut second = Raw::ready(&serving.socket, Headers::Simple);
    drop(first);
    assert_eq!(second.call(0, 0, 0, 1).data, [7]);
    drop(second);
    serving.server.wait().expect("ends well");
    assert!(!serving.socket.exists(), "the socket is removed");
}

#[test]
fn a_stop_answers_what_is_under_way_and_removes_the_socket() {
    let serving = Serving::raw(&[7; 5000], lasting());
    let mut raw = Raw::ready(&serving.socket, Headers::Simple);
    assert_eq!(raw.call(0, 0, 0, 1).data, [7]);
    serving.server.stop();
    serving.server.wait().expect("ends well");
    assert!(raw.ended().is_empty());
    assert!(!serving.socket.exists());
}

#[test]
fn exports_are_found_over_tcp_at_a_port_of_the_hosts_choice() {
    let dir = scratch();
    let image = dir.path().join("disk.raw");
    std::fs::write(&image, [7; 5000]).expect("writes");
    let listen = Listen::parse("127.0.0.1:0").expect("an address");
    let exports = vec![export("a b", &image, &ChainOptions::read())];
    let server = start(&listen, exports, lasting()).expect("starts");
    let uri = &server.addresses()[0];
    assert!(
        uri.starts_with("nbd://127.0.0.1:") && uri.ends_with("/a%20b"),
        "{uri}"
    );
    let options = vdtool::storage::nbd::Options::new(vdtool::storage::open::Access::Read);
    let storage = vdtool::storage::nbd::open(uri, &options).expect("connects");
    let mut buf = [0; 10];
    storage.read_at(&mut buf, 4995).expect("reads");
    assert_eq!(buf, [7, 7, 7, 7, 7, 0, 0, 0, 0, 0]);
}

#[test]
fn names_that_clash_and_bitmaps_that_are_not_there_are_refused() {
    let dir = scratch();
    let image = dir.path().join("disk.raw");
    std::fs::write(&image, [7; 5000]).expect("writes");
    let one = || export("a", &image, &ChainOptions::read());
    let listen = Listen::parse(&format!("unix:{}", dir.path().join("s").display()));
    let listen = listen.expect("an address");
    start(&listen, vec![one(), one()], lasting()).expect_err("two of a name");
    start(&listen, Vec::new(), lasting()).expect_err("nothing to serve");
    let options = Options {
        bitmaps: vec!["b".to_owned()],
        ..lasting()
    };
    let error = start(&listen, vec![one()], options).expect_err("no bitmap");
    assert!(error.message().contains("'b'"), "{error}");
    assert!(!dir.path().join("s").exists(), "nothing was left behind");
}

/// Each byte of a session that a client may send is changed in turn; the server must survive all.
#[test]
fn a_damaged_session_harms_nobody_but_its_client() {
    let bytes = [7; 5000];
    let serving = Serving::raw(&bytes, lasting());
    let session = session();
    let mut random = Seeded::new("a damaged session");
    let mut witness = Raw::ready(&serving.socket, Headers::Simple);
    for index in 0..session.len() {
        let mut damaged = session.clone();
        damaged[index] ^= 1 << random.u8(0..8);
        if random.bool() {
            damaged.truncate(index + 1);
        }
        let mut raw = Raw::silent(&serving.socket);
        let limit = Some(Duration::from_millis(300));
        raw.stream.set_read_timeout(limit).expect("sets a limit");
        use std::io::{Read, Write};
        // The server may hang up in the middle.
        let _ = raw.stream.write_all(&damaged);
        let _ = raw.stream.shutdown(std::net::Shutdown::Write);
        let mut answers = Vec::new();
        let _ = raw.stream.read_to_end(&mut answers);
        assert!(answers.len() < 1 << 20);
        assert_eq!(witness.call(0, 0, 4999, 1).errno, 0);
    }
}

/// What a client says from its first word to its last.
fn session() -> Vec<u8> {
    use vdtool::nbd::wire::{Request, command, flag};
    let mut said = 3u32.to_be_bytes().to_vec();
    let mut option = |number: u32, data: &[u8]| {
        said.extend(OPTION.to_be_bytes());
        said.extend(number.to_be_bytes());
        said.extend(u32::try_from(data.len()).expect("short").to_be_bytes());
        said.extend(data);
    };
    option(option::LIST, &[]);
    option(option::EXTENDED_HEADERS, &[]);
    let mut queries = Vec::new();
    put_string(&mut queries, "");
    queries.extend(1u32.to_be_bytes());
    put_string(&mut queries, "base:allocation");
    option(option::SET_META_CONTEXT, &queries);
    option(option::GO, &wanted("", &[info::BLOCK_SIZE]));
    for (command, flags, offset, len) in [
        (command::READ, 0, 0, 1000),
        (command::WRITE, flag::PAYLOAD, 100, 16),
        (command::WRITE_ZEROES, flag::NO_HOLE, 200, 16),
        (command::TRIM, 0, 0, 4096),
        (command::CACHE, 0, 0, 4096),
        (command::BLOCK_STATUS, 0, 0, 5000),
        (command::FLUSH, 0, 0, 0),
        (command::DISCONNECT, 0, 0, 0),
    ] {
        let request = Request {
            flags,
            command,
            cookie: 5,
            offset,
            len,
        };
        request.encode(Headers::Extended, &mut said);
        if command == command::WRITE {
            said.extend([9; 16]);
        }
    }
    said
}

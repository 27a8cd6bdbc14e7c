//! The protocol at random, against our server and our client, for a few seconds;
//! `VDTOOL_NBD_FUZZ=SECONDS` for longer, `VDTOOL_SEED=random` for others each time.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use vdtool::nbd::wire::{
    BASE_ALLOCATION, EXTENDED_REPLY, GREETING, Headers, OPTION, OPTION_REPLY, Request,
    SIMPLE_REPLY, STRUCTURED_REPLY, answer, can, chunk, command, errno, flag, info, option,
    put_string,
};
use vdtool::storage::nbd::{NbdStorage, Options};
use vdtool::storage::open::Access;
use vdtool::storage::{Storage, Zeroing};

use super::requests::write;
use super::wire::{Raw, wanted};
use super::{SOON, Serving, lasting, uri};
use crate::util::{Seeded, assert_same, scratch};

const HEADERS: [Headers; 3] = [Headers::Simple, Headers::Structured, Headers::Extended];

/// Numbers that find edges.
const EDGES: [u64; 14] = [
    0,
    1,
    2,
    7,
    8,
    12,
    511,
    4096,
    (32 << 20) + 1,
    0x7fff_ffff,
    0xffff_ffff,
    1 << 32,
    1 << 63,
    u64::MAX,
];

fn how_long() -> Duration {
    let seconds = std::env::var("VDTOOL_NBD_FUZZ");
    let seconds = seconds.map_or(2, |s| s.parse().expect("VDTOOL_NBD_FUZZ is in seconds"));
    Duration::from_secs(seconds)
}

/// Changes some bytes: an edge in place of a field, a flipped bit, a piece left out or doubled.
fn damage(random: &mut Seeded, bytes: &mut Vec<u8>) {
    for _ in 0..random.usize(1..4) {
        if bytes.is_empty() {
            return;
        }
        let at = random.usize(0..bytes.len());
        match random.u8(0..5) {
            0 => bytes[at] ^= 1 << random.u8(0..8),
            1 | 2 => {
                let width = [1, 2, 4, 8][random.usize(0..4)].min(bytes.len() - at);
                let edge = EDGES[random.usize(0..EDGES.len())].to_be_bytes();
                bytes[at..at + width].copy_from_slice(&edge[8 - width..]);
            }
            3 => {
                let end = (at + random.usize(1..40)).min(bytes.len());
                bytes.drain(at..end);
            }
            _ => {
                let end = (at + random.usize(1..40)).min(bytes.len());
                let piece = bytes[at..end].to_vec();
                bytes.splice(at..at, piece);
            }
        }
    }
}

/// An offset or a length: mostly inside a disk of `size` bytes, sometimes at an edge.
fn number(random: &mut Seeded, size: u64) -> u64 {
    match random.u8(0..8) {
        0 => EDGES[random.usize(0..EDGES.len())],
        1 => size.wrapping_add(random.u64(0..4)).wrapping_sub(2),
        _ => random.u64(0..size / 4),
    }
}

#[test]
fn every_framed_request_has_one_answer_and_does_what_a_plain_vector_does() {
    let mut random = Seeded::new("nbd framed requests");
    let mut disk = random.bytes(1 << 20);
    let size = disk.len() as u64;
    let serving = Serving::raw(&disk, lasting());
    let until = Instant::now() + how_long();
    let mut refused = 0;
    let mut done = 0;
    while Instant::now() < until {
        let headers = HEADERS[random.usize(0..3)];
        let mut raw = Raw::connect(&serving.socket);
        raw.raise(headers);
        if headers != Headers::Simple {
            raw.contexts(option::SET_META_CONTEXT, "", &[BASE_ALLOCATION]);
        }
        raw.go("");
        for _ in 0..40 {
            let (at, len) = (number(&mut random, size), number(&mut random, size));
            let kind = random.u16(0..10);
            let mut flags = match random.u8(0..4) {
                0 => 1 << random.u16(0..16),
                _ => 0,
            };
            let errno = if kind == command::WRITE {
                // As many bytes as are announced, or the next request would be in them.
                let data = random.bytes(crate::util::len(len.min(1 << 18)));
                flags &= !flag::PAYLOAD;
                let errno = write(&mut raw, flags, at, &data);
                if errno == 0 {
                    let start = crate::util::len(at);
                    disk[start..start + data.len()].copy_from_slice(&data);
                }
                errno
            } else if kind == command::DISCONNECT {
                continue;
            } else {
                // A payload that is announced and not sent, or a length that does not fit.
                if headers == Headers::Extended {
                    flags &= !flag::PAYLOAD;
                }
                let len = match headers {
                    Headers::Extended => len,
                    _ => len & 0xffff_ffff,
                };
                framed(&mut raw, kind, flags, at, len, &mut disk)
            };
            match errno {
                0 => done += 1,
                errno::PERM | errno::INVAL | errno::NOSPC | errno::OVERFLOW | errno::NOTSUP => {
                    refused += 1;
                }
                other => panic!("error {other} for {kind} {flags:#x} {at:#x} {len:#x}"),
            }
        }
    }
    assert!(done > 100 && refused > 100, "{done} {refused}");
    let mut raw = Raw::ready(&serving.socket, Headers::Simple);
    assert_same(
        &raw.call(command::READ, 0, 0, size).data,
        &disk,
        0,
        "at the end",
    );
}

/// A request without payload: its error, after a look at what it brought and did.
fn framed(raw: &mut Raw, kind: u16, flags: u16, at: u64, len: u64, disk: &mut [u8]) -> u32 {
    raw.request(kind, flags, at, len);
    // What is refused brings nothing, however long it is said to be.
    let inside = at
        .checked_add(len)
        .is_some_and(|end| end <= disk.len() as u64);
    let expected = match kind == command::READ && inside {
        true => len,
        false => 0,
    };
    let reply = raw.reply(at, expected);
    if reply.errno != 0 || len == 0 {
        return reply.errno;
    }
    assert!(inside, "{kind} {flags:#x} {at:#x} {len:#x} past the end");
    let range = crate::util::len(at)..crate::util::len(at + len);
    match kind {
        command::READ => assert_same(&reply.data, &disk[range], at, "read"),
        command::WRITE_ZEROES => disk[range].fill(0),
        command::TRIM => {
            // What is left there is the disk's affair.
            let now = raw.call(command::READ, 0, at, len).data;
            disk[range].copy_from_slice(&now);
        }
        _ => {}
    }
    reply.errno
}

/// What a client may say, mostly right.
fn client_says(random: &mut Seeded) -> Vec<u8> {
    let mut said = random.u32(0..4).to_be_bytes().to_vec();
    let mut put = |number: u32, data: &[u8]| {
        said.extend(OPTION.to_be_bytes());
        said.extend(number.to_be_bytes());
        said.extend(u32::try_from(data.len()).expect("short").to_be_bytes());
        said.extend(data);
    };
    let headers = HEADERS[random.usize(0..3)];
    match headers {
        Headers::Simple => {}
        Headers::Structured => put(option::STRUCTURED_REPLY, &[]),
        Headers::Extended => put(option::EXTENDED_HEADERS, &[]),
    }
    for _ in 0..random.usize(0..5) {
        let number = random.u32(0..13);
        let mut queries = Vec::new();
        put_string(&mut queries, ["", "x"][random.usize(0..2)]);
        let count = random.u32(0..40);
        queries.extend(count.to_be_bytes());
        for _ in 0..count {
            let names = [BASE_ALLOCATION, "qemu:", "qemu:allocation-depth", "", "x:"];
            put_string(&mut queries, names[random.usize(0..names.len())]);
        }
        let go = wanted("", &[info::BLOCK_SIZE, info::NAME, 99]);
        match random.u8(0..4) {
            0 => put(number, &[]),
            1 => put(number, &go),
            _ => put(number, &queries),
        }
    }
    put(option::GO, &wanted("", &[]));
    for _ in 0..random.usize(1..12) {
        let request = Request {
            flags: random.u16(0..64),
            command: random.u16(0..9),
            cookie: random.u64(..),
            offset: number(random, 65_536),
            len: number(random, 65_536),
        };
        request.encode(headers, &mut said);
        if request.command == command::WRITE {
            let len = request.len.min(9000);
            said.extend(std::iter::repeat_n(9, crate::util::len(len)));
        }
    }
    said
}

#[test]
fn a_client_that_says_anything_harms_nobody_else() {
    let mut random = Seeded::new("nbd client says anything");
    let serving = Serving::raw(&[7; 65_536], lasting());
    let mut witness = Raw::ready(&serving.socket, Headers::Simple);
    let until = Instant::now() + how_long();
    let mut rounds = 0;
    while Instant::now() < until {
        let mut said = client_says(&mut random);
        if random.u8(0..4) > 0 {
            damage(&mut random, &mut said);
        }
        let mut raw = Raw::silent(&serving.socket);
        let mut hearing = raw.stream.try_clone().expect("clones");
        let heard = thread::spawn(move || {
            let mut heard = Vec::new();
            // Some do not listen.
            let _ = hearing.read_to_end(&mut heard);
            heard.len()
        });
        // The server may hang up in the middle.
        let _ = raw.stream.write_all(&said);
        let _ = raw.stream.shutdown(std::net::Shutdown::Write);
        let start = Instant::now();
        let heard = heard.join().expect("hears it out");
        assert!(start.elapsed() < SOON, "the server does not let go");
        assert!(heard < 16 << 20, "{heard} bytes for {}", said.len());
        raw.stream.flush().expect("nothing to do");
        if rounds % 16 == 0 {
            assert_eq!(witness.call(command::READ, 0, 65_535, 1).errno, 0);
        }
        rounds += 1;
    }
    assert!(rounds > 50, "{rounds} rounds");
    serving.server.stop();
    serving.server.wait().expect("ends well");
}

/// What a server says to our client from its greeting to its last reply, mostly right.
fn server_says(random: &mut Seeded, size: u64) -> Vec<u8> {
    let headers = HEADERS[random.usize(0..3)];
    let mut said = GREETING.to_be_bytes().to_vec();
    said.extend(OPTION.to_be_bytes());
    said.extend(3u16.to_be_bytes());
    let mut put = |number: u32, kind: u32, data: &[u8]| {
        said.extend(OPTION_REPLY.to_be_bytes());
        said.extend(number.to_be_bytes());
        said.extend(kind.to_be_bytes());
        said.extend(u32::try_from(data.len()).expect("short").to_be_bytes());
        said.extend(data);
    };
    let extended = match headers {
        Headers::Extended => answer::ACK,
        _ => answer::UNSUPPORTED,
    };
    put(option::EXTENDED_HEADERS, extended, b"");
    if headers != Headers::Extended {
        let structured = match headers {
            Headers::Simple => answer::UNSUPPORTED,
            _ => answer::ACK,
        };
        put(option::STRUCTURED_REPLY, structured, b"");
    }
    if headers != Headers::Simple {
        let mut context = 7u32.to_be_bytes().to_vec();
        context.extend(BASE_ALLOCATION.as_bytes());
        put(option::SET_META_CONTEXT, answer::META_CONTEXT, &context);
        put(option::SET_META_CONTEXT, answer::ACK, b"");
    }
    let mut main = info::EXPORT.to_be_bytes().to_vec();
    main.extend(size.to_be_bytes());
    let flags = can::HAS_FLAGS | can::FLUSH | can::TRIM | can::WRITE_ZEROES | can::FUA;
    main.extend(flags.to_be_bytes());
    put(option::GO, answer::INFO, &main);
    let mut blocks = info::BLOCK_SIZE.to_be_bytes().to_vec();
    for size in [1u32, 4096, 1 << 20] {
        blocks.extend(size.to_be_bytes());
    }
    put(option::GO, answer::INFO, &blocks);
    put(option::GO, answer::ACK, b"");
    for cookie in 1..7 {
        reply(random, headers, cookie, &mut said);
    }
    said
}

/// The reply to request `cookie` of [`use_it`], or another one.
fn reply(random: &mut Seeded, headers: Headers, cookie: u64, said: &mut Vec<u8>) {
    if headers == Headers::Simple {
        let errno = [0, 0, 0, errno::IO, errno::SHUTDOWN, 9999][random.usize(0..6)];
        said.extend(SIMPLE_REPLY.to_be_bytes());
        said.extend(errno.to_be_bytes());
        said.extend(cookie.to_be_bytes());
        if cookie == 1 && errno == 0 {
            said.extend(random.bytes(1024));
        }
        return;
    }
    let mut put = |flags: u16, kind: u16, payload: &[u8]| {
        let len = payload.len() as u64;
        match headers {
            Headers::Extended => {
                said.extend(EXTENDED_REPLY.to_be_bytes());
                said.extend(flags.to_be_bytes());
                said.extend(kind.to_be_bytes());
                said.extend(cookie.to_be_bytes());
                said.extend(0u64.to_be_bytes());
                said.extend(len.to_be_bytes());
            }
            _ => {
                said.extend(STRUCTURED_REPLY.to_be_bytes());
                said.extend(flags.to_be_bytes());
                said.extend(kind.to_be_bytes());
                said.extend(cookie.to_be_bytes());
                said.extend(u32::try_from(len).expect("short").to_be_bytes());
            }
        }
        said.extend(payload);
    };
    let data = |at: u64, len: usize| [&at.to_be_bytes()[..], &vec![5; len]].concat();
    let hole = [&512u64.to_be_bytes()[..], &512u32.to_be_bytes()].concat();
    let mut extents = 7u32.to_be_bytes().to_vec();
    let kind = match headers {
        Headers::Extended => {
            extents.extend(2u32.to_be_bytes());
            for word in [4096u64, 0, 1 << 40, 3] {
                extents.extend(word.to_be_bytes());
            }
            chunk::STATUS_EXTENDED
        }
        _ => {
            for word in [4096u32, 0, 1 << 20, 3] {
                extents.extend(word.to_be_bytes());
            }
            chunk::STATUS
        }
    };
    let error = [
        &errno::IO.to_be_bytes()[..],
        &4u16.to_be_bytes(),
        b"oh\x1b!",
    ]
    .concat();
    match (random.u8(0..12), cookie) {
        (0, _) => put(chunk::DONE, chunk::ERROR, &error),
        (1, _) => put(0, chunk::NONE, b""),
        (_, 1) => {
            put(0, chunk::DATA, &data(0, 512));
            put(chunk::DONE, chunk::HOLE, &hole);
        }
        (_, 2) => put(chunk::DONE, kind, &extents),
        _ => put(chunk::DONE, chunk::NONE, b""),
    }
}

/// Uses storage in all ways; errors are as good as answers.
fn use_it(storage: &NbdStorage) {
    let mut buf = vec![0xee; 1024];
    let read = storage.read_at(&mut buf, 0);
    if let Err(error) = read {
        assert!(!error.to_string().contains('\x1b'), "{error:?}");
    }
    if let Ok(run) = storage.run(0, 1 << 16) {
        assert!((1..=1 << 16).contains(&run.len));
    }
    let size = storage.size();
    assert!(i64::try_from(size).is_ok());
    let _ = storage.write_at(&[1; 512], 0);
    let _ = storage.zero(0..512, Zeroing::MayUnmap);
    let _ = storage.discard(0..512);
    let _ = storage.sync();
}

#[test]
fn a_server_that_says_anything_is_an_error_or_harmless() {
    let mut random = Seeded::new("nbd server says anything");
    let dir = scratch();
    let socket = dir.path().join("s");
    let listener = UnixListener::bind(&socket).expect("binds");
    let says = Arc::new(Mutex::new(Vec::new()));
    let shared = Arc::clone(&says);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let words = shared.lock().clone();
            thread::spawn(move || {
                // The client may have heard enough before the end.
                let _ = stream.write_all(&words);
                let _ = stream.shutdown(std::net::Shutdown::Write);
                let _ = stream.read_to_end(&mut Vec::new());
            });
        }
    });
    let options = Options {
        timeout: Duration::from_secs(5),
        retry: Duration::ZERO,
        connections: 1,
        ..Options::new(Access::Write)
    };
    let until = Instant::now() + how_long();
    let (mut agreed, mut rounds) = (0, 0);
    while Instant::now() < until {
        let mut words = server_says(&mut random, 1 << 20);
        if random.u8(0..4) > 0 {
            damage(&mut random, &mut words);
        }
        if random.u8(0..8) == 0 {
            words.truncate(random.usize(0..=words.len()));
        }
        *says.lock() = words;
        let start = Instant::now();
        if let Ok(storage) = NbdStorage::connect(&uri(&socket, ""), &options) {
            use_it(&storage);
            agreed += 1;
        }
        assert!(start.elapsed() < SOON, "round {rounds}");
        rounds += 1;
    }
    assert!(agreed > 10 && rounds > 50, "{agreed} of {rounds}");
}

//! Our client with servers that mean no good.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vdtool::nbd::wire::{
    BASE_ALLOCATION, GREETING, OPTION, OPTION_REPLY, STRUCTURED_REPLY, answer, can, chunk, info,
    option,
};
use vdtool::storage::Storage;
use vdtool::storage::nbd::{NbdStorage, Options};
use vdtool::storage::open::Access;
use vdtool::{ErrorKind, Result};

use super::{SOON, uri};
use crate::util::{Seeded, scratch};

/// A server that says the same to everybody, whatever it is asked, and then what `after` says.
struct Script {
    socket: PathBuf,
    _dir: TempDir,
}

/// What a server does when it has said all.
#[derive(Clone, Copy)]
enum After {
    HangUp,
    SayNothing,
    /// These bytes again and again.
    Repeat(&'static [u8]),
}

impl Script {
    fn new(words: &[u8], after: After) -> Self {
        let dir = scratch();
        let socket = dir.path().join("hostile.sock");
        let listener = UnixListener::bind(&socket).expect("binds");
        let words: Arc<[u8]> = words.into();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (Ok(stream), words) = (stream, Arc::clone(&words)) else {
                    return;
                };
                thread::spawn(move || speak(stream, &words, after));
            }
        });
        Self { socket, _dir: dir }
    }

    fn connect(&self) -> Result<NbdStorage> {
        let options = Options {
            timeout: Duration::from_millis(500),
            retry: Duration::ZERO,
            connections: 1,
            ..Options::new(Access::Write)
        };
        NbdStorage::connect(&uri(&self.socket, "e"), &options)
    }
}

fn speak(mut stream: UnixStream, words: &[u8], after: After) {
    // The client may have heard enough before the end.
    let mut listening = stream.try_clone().expect("clones");
    let _ = stream.write_all(words);
    match after {
        After::HangUp => {
            let _ = stream.shutdown(std::net::Shutdown::Write);
        }
        After::SayNothing => {}
        After::Repeat(words) => {
            thread::spawn(move || while stream.write_all(words).is_ok() {});
        }
    }
    let _ = listening.read_to_end(&mut Vec::new());
}

/// What a well-behaved server says, part by part.
#[derive(Default)]
struct Words(Vec<u8>);

impl Words {
    fn greeting() -> Self {
        let mut words = Self::default();
        words.0.extend(GREETING.to_be_bytes());
        words.0.extend(OPTION.to_be_bytes());
        words.0.extend(3u16.to_be_bytes());
        words
    }

    /// As far as the export, of `size` bytes.
    fn agreed(size: u64) -> Self {
        let mut context = 7u32.to_be_bytes().to_vec();
        context.extend(BASE_ALLOCATION.as_bytes());
        let flags = can::HAS_FLAGS | can::FLUSH | can::TRIM | can::WRITE_ZEROES;
        let mut main = info::EXPORT.to_be_bytes().to_vec();
        main.extend(size.to_be_bytes());
        main.extend(flags.to_be_bytes());
        Self::greeting()
            .answer(option::EXTENDED_HEADERS, answer::UNSUPPORTED, b"no")
            .answer(option::STRUCTURED_REPLY, answer::ACK, b"")
            .answer(option::SET_META_CONTEXT, answer::META_CONTEXT, &context)
            .answer(option::SET_META_CONTEXT, answer::ACK, b"")
            .answer(option::GO, answer::INFO, &blocks(512, 1 << 20))
            .answer(option::GO, answer::INFO, &main)
            .answer(option::GO, answer::ACK, b"")
    }

    fn answer(mut self, number: u32, kind: u32, data: &[u8]) -> Self {
        self.0.extend(OPTION_REPLY.to_be_bytes());
        self.0.extend(number.to_be_bytes());
        self.0.extend(kind.to_be_bytes());
        let len = u32::try_from(data.len()).expect("short");
        self.0.extend(len.to_be_bytes());
        self.0.extend(data);
        self
    }

    fn chunk(mut self, cookie: u64, flags: u16, kind: u16, payload: &[u8]) -> Self {
        self.0.extend(STRUCTURED_REPLY.to_be_bytes());
        self.0.extend(flags.to_be_bytes());
        self.0.extend(kind.to_be_bytes());
        self.0.extend(cookie.to_be_bytes());
        let len = u32::try_from(payload.len()).expect("short");
        self.0.extend(len.to_be_bytes());
        self.0.extend(payload);
        self
    }

    fn data(self, cookie: u64, flags: u16, at: u64, bytes: &[u8]) -> Self {
        let payload = [&at.to_be_bytes()[..], bytes].concat();
        self.chunk(cookie, flags, chunk::DATA, &payload)
    }
}

fn blocks(min: u32, max: u32) -> Vec<u8> {
    let mut data = info::BLOCK_SIZE.to_be_bytes().to_vec();
    for size in [min, 4096, max] {
        data.extend(size.to_be_bytes());
    }
    data
}

fn status(context: u32, extents: &[(u32, u32)]) -> Vec<u8> {
    let mut payload = context.to_be_bytes().to_vec();
    for (len, flags) in extents {
        payload.extend(len.to_be_bytes());
        payload.extend(flags.to_be_bytes());
    }
    payload
}

/// A session of a read, a look at extents, and a flush.
fn session() -> Vec<u8> {
    let hole = [&512u64.to_be_bytes()[..], &512u32.to_be_bytes()].concat();
    Words::agreed(1 << 20)
        .data(1, 0, 0, &[5; 512])
        .chunk(1, chunk::DONE, chunk::HOLE, &hole)
        .chunk(
            2,
            chunk::DONE,
            chunk::STATUS,
            &status(7, &[(4096, 0), (65_536, 3)]),
        )
        .chunk(3, chunk::DONE, chunk::NONE, b"")
        .0
}

fn use_it(storage: &dyn Storage) -> Result<(Vec<u8>, u64)> {
    let mut buf = vec![0xee; 1024];
    storage.read_at(&mut buf, 0)?;
    let run = storage.run(0, 1 << 20)?;
    storage.sync()?;
    Ok((buf, run.len))
}

#[test]
fn the_session_that_is_to_be_damaged_is_right() {
    let script = Script::new(&session(), After::HangUp);
    let storage = script.connect().expect("agrees");
    assert_eq!(storage.size(), 1 << 20);
    let (bytes, run) = use_it(&storage).expect("answers");
    assert_eq!(
        (&bytes[..512], &bytes[512..]),
        (&[5; 512][..], &[0; 512][..])
    );
    assert_eq!(run, 4096);
}

#[test]
fn any_damage_is_an_error_or_harmless() {
    let whole = session();
    let mut random = Seeded::new("hostile server");
    for index in 0..whole.len() {
        let mut words = whole.clone();
        words[index] ^= 1 << random.u8(0..8);
        if random.u8(0..4) == 0 {
            words.truncate(index + 1);
        }
        let start = Instant::now();
        let script = Script::new(&words, After::HangUp);
        if let Ok(storage) = script.connect() {
            let size = storage.size();
            assert!(i64::try_from(size).is_ok());
            if let Ok((bytes, _)) = use_it(&storage) {
                assert_eq!(bytes.len(), 1024);
            }
        }
        assert!(start.elapsed() < SOON, "byte {index}");
    }
}

#[test]
fn replies_that_violate_the_protocol_are_told_as_such() {
    let over = [&(u64::MAX - 3).to_be_bytes()[..], &[1; 16]].concat();
    let hole = [&0u64.to_be_bytes()[..], &4096u32.to_be_bytes()].concat();
    let done = chunk::DONE;
    let cases: Vec<(&str, Words)> = vec![
        (
            "another request",
            Words::agreed(4096).data(9, done, 0, &[1; 1024]),
        ),
        (
            "too little",
            Words::agreed(4096).data(1, done, 0, &[1; 512]),
        ),
        (
            "too much",
            Words::agreed(4096)
                .data(1, 0, 0, &[1; 1024])
                .data(1, done, 0, &[1; 1]),
        ),
        (
            "elsewhere",
            Words::agreed(4096).data(1, done, 1, &[1; 1024]),
        ),
        (
            "overflow",
            Words::agreed(4096).chunk(1, done, chunk::DATA, &over),
        ),
        (
            "a long hole",
            Words::agreed(4096).chunk(1, done, chunk::HOLE, &hole),
        ),
        (
            "no data",
            Words::agreed(4096).chunk(1, done, chunk::NONE, b""),
        ),
        (
            "data of none",
            Words::agreed(4096).chunk(1, done, chunk::NONE, b"x"),
        ),
        ("unknown", Words::agreed(4096).chunk(1, done, 77, b"x")),
        (
            "extents",
            Words::agreed(4096).chunk(1, done, chunk::STATUS, &status(7, &[(1, 1)])),
        ),
        (
            "a cut error",
            Words::agreed(4096).chunk(1, done, chunk::ERROR, b"abc"),
        ),
        (
            "a lying error",
            Words::agreed(4096).chunk(1, done, chunk::ERROR, &[0xff; 8]),
        ),
        (
            "no magic",
            Words([&Words::agreed(4096).0[..], &[9; 64]].concat()),
        ),
    ];
    for (what, words) in cases {
        let script = Script::new(&words.0, After::SayNothing);
        let storage = script.connect().expect("agrees");
        let error = storage.read_at(&mut [0; 1024], 0).expect_err(what);
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {error}");
    }
    for extents in [&[][..], &[(0, 3)], &[(4096, 0), (0, 0)]] {
        let words = Words::agreed(4096).chunk(1, done, chunk::STATUS, &status(7, extents));
        let script = Script::new(&words.0, After::SayNothing);
        let storage = script.connect().expect("agrees");
        let error = storage.run(0, 4096).expect_err("extents of nothing");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    }
}

#[test]
fn exports_and_block_sizes_that_cannot_be_are_refused() {
    let go = |data: &[u8]| {
        let mut main = info::EXPORT.to_be_bytes().to_vec();
        main.extend(4096u64.to_be_bytes());
        main.extend(1u16.to_be_bytes());
        Words::greeting()
            .answer(option::EXTENDED_HEADERS, answer::UNSUPPORTED, b"")
            .answer(option::STRUCTURED_REPLY, answer::UNSUPPORTED, b"")
            .answer(option::GO, answer::INFO, &main)
            .answer(option::GO, answer::INFO, data)
            .answer(option::GO, answer::ACK, b"")
            .0
    };
    for words in [
        Words::agreed(u64::MAX).0,
        Words::agreed(1 << 63).0,
        go(&blocks(0, 4096)),
        go(&blocks(3, 4096)),
        go(&blocks(1 << 20, 1 << 21)),
        go(&blocks(4096, 512)),
        go(b""),
        go(&[0; 5]),
    ] {
        let error = Script::new(&words, After::SayNothing).connect();
        let error = error.expect_err("cannot be");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    }
}

#[test]
fn a_server_that_never_ends_its_answer_is_given_up() {
    // Told in big letters: no request, no answer, no reply goes on for ever.
    const CONTEXT: &[u8] = &[
        0x00, 0x03, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9, 0, 0, 0, 10, 0, 0, 0, 4, 0, 0, 0, 19, 0, 0,
        0, 7, b'b', b'a', b's', b'e', b':', b'a', b'l', b'l', b'o', b'c', b'a', b't', b'i', b'o',
        b'n',
    ];
    const NONE: &[u8] = &[
        0x66, 0x8e, 0x33, 0xef, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0,
    ];
    let start = Instant::now();
    let words = Words::greeting()
        .answer(option::EXTENDED_HEADERS, answer::UNSUPPORTED, b"")
        .answer(option::STRUCTURED_REPLY, answer::ACK, b"");
    let endless = Script::new(&words.0, After::Repeat(CONTEXT));
    endless.connect().expect_err("endless contexts");
    let endless = Script::new(&Words::agreed(4096).0, After::Repeat(NONE));
    let storage = endless.connect().expect("agrees");
    let error = storage.read_at(&mut [0; 512], 0);
    error.expect_err("endless chunks");
    for words in [Vec::new(), Words::greeting().0, vec![0x4e; 7]] {
        let silent = Script::new(&words, After::SayNothing);
        let error = silent.connect().expect_err("says nothing more");
        assert!(error.message().contains("in time"), "{error}");
    }
    let silent = Script::new(&Words::agreed(4096).0, After::SayNothing);
    let storage = silent.connect().expect("agrees");
    let error = storage.read_at(&mut [0; 512], 0).expect_err("no reply");
    assert!(error.message().contains("in time"), "{error}");
    assert!(start.elapsed() < SOON * 2);
}

#[test]
fn a_long_answer_or_an_absurd_one_takes_no_memory() {
    for len in [1 << 20, u32::MAX] {
        let mut words = Words::greeting().0;
        words.extend(OPTION_REPLY.to_be_bytes());
        words.extend(option::EXTENDED_HEADERS.to_be_bytes());
        words.extend(answer::UNSUPPORTED.to_be_bytes());
        words.extend(len.to_be_bytes());
        let error = Script::new(&words, After::SayNothing).connect();
        assert_eq!(error.expect_err("long").kind(), ErrorKind::Corrupt);
        let mut words = Words::agreed(4096).0;
        words.extend(STRUCTURED_REPLY.to_be_bytes());
        words.extend([0, 1, 0x80, 1, 0, 0, 0, 0, 0, 0, 0, 1]);
        words.extend(len.to_be_bytes());
        let script = Script::new(&words, After::SayNothing);
        let storage = script.connect().expect("agrees");
        let error = storage.read_at(&mut [0; 512], 0).expect_err("long");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    }
}

#[test]
fn what_a_server_says_is_made_safe_for_terminals() {
    let words = Words::greeting()
        .answer(option::EXTENDED_HEADERS, answer::UNSUPPORTED, b"")
        .answer(option::STRUCTURED_REPLY, answer::UNSUPPORTED, b"")
        .answer(option::GO, answer::POLICY, b"go away\x1b[2J");
    let error = Script::new(&words.0, After::HangUp).connect();
    let text = error.expect_err("refused").to_string();
    assert!(text.contains("go away") && !text.contains('\x1b'), "{text}");
}

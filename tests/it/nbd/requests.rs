//! Requests to our server, right and wrong ones, in all three kinds of headers.

use std::io::Write;
use std::time::Duration;

use vdtool::chain::open::ChainOptions;
use vdtool::nbd::wire::{Headers, Request, answer, can, command, errno, flag, option};

use super::wire::Raw;
use super::{Serving, export, lasting, until};
use crate::util::{Seeded, assert_same, scratch};

const ALL: [Headers; 3] = [Headers::Simple, Headers::Structured, Headers::Extended];

/// Sends a write and takes its reply.
pub(super) fn write(raw: &mut Raw, flags: u16, offset: u64, data: &[u8]) -> u32 {
    let payload = match raw.headers {
        Headers::Extended => flag::PAYLOAD,
        _ => 0,
    };
    raw.request(command::WRITE, flags | payload, offset, data.len() as u64);
    raw.send(data);
    raw.reply(offset, 0).errno
}

#[test]
fn requests_that_make_no_sense_are_refused_and_the_next_one_is_served() {
    let size: u64 = 1 << 20;
    for headers in ALL {
        let serving = Serving::raw(&vec![7; 1 << 20], lasting());
        let mut raw = Raw::ready(&serving.socket, headers);
        let wrong = [
            (command::READ, 0, size, 1, errno::INVAL),
            (command::READ, 0, size - 1, 2, errno::INVAL),
            (command::READ, 0, u64::MAX, 2, errno::INVAL),
            (command::READ, 0, 0, (32 << 20) + 1, errno::OVERFLOW),
            (command::READ, 1 << 9, 0, 1, errno::INVAL),
            (command::TRIM, 0, size - 1, 2, errno::INVAL),
            (command::CACHE, 0, size, 1, errno::INVAL),
            (command::WRITE_ZEROES, 0, size - 1, 2, errno::NOSPC),
            (
                command::WRITE_ZEROES,
                0,
                u64::MAX,
                u32::MAX.into(),
                errno::NOSPC,
            ),
            (command::WRITE_ZEROES, flag::REQ_ONE, 0, 1, errno::INVAL),
            (command::FLUSH, 0, 1, 0, errno::INVAL),
            (command::BLOCK_STATUS, 0, 0, 1, errno::INVAL),
            (99, 0, 0, 1, errno::INVAL),
            (u16::MAX, 0xff & !flag::PAYLOAD, u64::MAX, 1, errno::INVAL),
        ];
        for (command, flags, offset, len, expected) in wrong {
            raw.request(command, flags, offset, len);
            let reply = raw.reply(offset, 0);
            assert_eq!(
                reply.errno, expected,
                "{headers:?} {command} {flags} {offset} {len}"
            );
            assert_eq!(raw.call(command::READ, 0, 5, 3).data, [7; 3]);
        }
        // A write's bytes are taken though they go nowhere.
        assert_eq!(write(&mut raw, 0, size - 1, &[1; 2]), errno::NOSPC);
        assert_eq!(write(&mut raw, flag::DF, 0, &[1; 2]), errno::INVAL);
        assert_eq!(
            write(&mut raw, 0, 0, &vec![1; (32 << 20) + 1]),
            errno::OVERFLOW
        );
        assert_eq!(raw.call(command::READ, 0, 0, 3).data, [7; 3]);
        // Nothing at all is no error.
        assert_eq!(raw.call(command::READ, 0, 5, 0).errno, 0);
        assert_eq!(raw.call(command::READ, 0, size, 0).errno, 0);
        assert_eq!(raw.call(command::TRIM, 0, 0, 0).errno, 0);
        assert_eq!(raw.call(command::WRITE_ZEROES, 0, 0, 0).errno, 0);
        assert_eq!(write(&mut raw, 0, 0, &[]), 0);
    }
}

#[test]
fn a_read_only_export_takes_no_change() {
    let dir = scratch();
    let image = dir.path().join("disk.raw");
    std::fs::write(&image, [7; 5000]).expect("writes");
    let exports = vec![export("", &image, &ChainOptions::read())];
    let serving = Serving::new(dir, exports, lasting());
    for headers in ALL {
        let mut raw = Raw::ready(&serving.socket, headers);
        assert_ne!(raw.flags & can::READ_ONLY, 0);
        assert_eq!(write(&mut raw, 0, 0, &[1; 10]), errno::PERM);
        assert_eq!(raw.call(command::TRIM, 0, 0, 10).errno, errno::PERM);
        assert_eq!(raw.call(command::WRITE_ZEROES, 0, 0, 10).errno, errno::PERM);
        assert_eq!(raw.call(command::FLUSH, 0, 0, 0).errno, 0);
        assert_eq!(raw.call(command::READ, 0, 0, 5000).data, [7; 5000]);
    }
}

#[test]
fn random_requests_leave_what_a_plain_vector_has() {
    let mut random = Seeded::new("random requests");
    for headers in ALL {
        let mut expected = random.bytes(3_000_001);
        let serving = Serving::raw(&expected, lasting());
        let mut raw = Raw::ready(&serving.socket, headers);
        for _ in 0..300 {
            let longest = if random.bool() { 1 << 20 } else { 5000 };
            let start = random.usize(0..expected.len());
            let len = random.usize(1..longest).min(expected.len() - start);
            let (at, end) = (start as u64, start + len);
            let fua = if random.u8(0..8) == 0 { flag::FUA } else { 0 };
            match random.u8(0..5) {
                0 => {
                    let data = random.bytes(len);
                    assert_eq!(write(&mut raw, fua, at, &data), 0);
                    expected[start..end].copy_from_slice(&data);
                }
                1 => {
                    let flags = fua | if random.bool() { flag::NO_HOLE } else { 0 };
                    let reply = raw.call(command::WRITE_ZEROES, flags, at, len as u64);
                    assert_eq!(reply.errno, 0);
                    expected[start..end].fill(0);
                }
                2 if headers != Headers::Simple => {
                    let reply = raw.call(command::READ, flag::DF, at, len as u64);
                    assert_same(&reply.data, &expected[start..end], at, "in one piece");
                }
                _ => {
                    let reply = raw.call(command::READ, 0, at, len as u64);
                    assert_same(&reply.data, &expected[start..end], at, "read");
                }
            }
        }
        assert_eq!(raw.call(command::FLUSH, 0, 0, 0).errno, 0);
        let found = std::fs::read(serving.image()).expect("reads");
        assert_same(&found, &expected, 0, "in the end");
    }
}

#[test]
fn reads_through_tiny_memory_are_the_same() {
    let mut random = Seeded::new("tiny memory");
    let bytes = random.bytes(3 << 20);
    let options = super::Options {
        memory: 0,
        ..lasting()
    };
    for headers in ALL {
        let serving = Serving::raw(&bytes, options.clone());
        let mut raw = Raw::ready(&serving.socket, headers);
        // Not from whole pages, so that it does not go by reference in one piece.
        let reply = raw.call(command::READ, 0, 1, (3 << 20) - 2);
        assert_same(&reply.data, &bytes[1..(3 << 20) - 1], 1, "read");
        assert_eq!(write(&mut raw, flag::FUA, 77, &bytes[..2 << 20]), 0);
        let reply = raw.call(command::READ, 0, 77, 2 << 20);
        assert_same(&reply.data, &bytes[..2 << 20], 77, "written in pieces");
    }
}

#[test]
fn extents_are_told_for_each_context_that_was_chosen() {
    let dir = scratch();
    let image = dir.path().join("disk.raw");
    let file = std::fs::File::create(&image).expect("creates");
    file.set_len(1 << 20).expect("sets the length");
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; 65536], 131_072).expect("writes");
    let exports = vec![export("", &image, &ChainOptions::write())];
    let serving = Serving::new(dir, exports, lasting());
    for headers in [Headers::Structured, Headers::Extended] {
        let mut raw = Raw::connect(&serving.socket);
        raw.raise(headers);
        let contexts = ["base:allocation", "qemu:allocation-depth"];
        raw.contexts(option::SET_META_CONTEXT, "", &contexts);
        raw.go("");
        let reply = raw.call(command::BLOCK_STATUS, 0, 0, 1 << 20);
        assert_eq!(reply.extents.len(), 2);
        let holes: [(u64, u64); 3] = [(131_072, 3), (65_536, 0), ((1 << 20) - 196_608, 3)];
        assert_eq!(extents(&reply.extents[0], headers), (0, holes.to_vec()));
        assert_eq!(extents(&reply.extents[1], headers), (1, vec![(1 << 20, 1)]));
        let reply = raw.call(command::BLOCK_STATUS, flag::REQ_ONE, 10, 1 << 19);
        assert_eq!(extents(&reply.extents[0], headers), (0, vec![(131_062, 3)]));
        // A read tells what it found.
        let data = raw.call(command::READ, 0, 100_000, 100_000).data;
        assert!(data[..31_072].iter().all(|b| *b == 0));
        assert!(data[31_072..96_608].iter().all(|b| *b == 7));
    }
}

/// The context's number and the extents of a chunk.
pub(super) fn extents(payload: &[u8], headers: Headers) -> (u32, Vec<(u64, u64)>) {
    let mut fields = vdtool::nbd::wire::Fields::new(payload);
    let context = fields.u32().expect("a number");
    let count = match headers {
        Headers::Extended => fields.u32().expect("a count") as usize,
        _ => fields.rest().len() / 8,
    };
    let mut found = Vec::new();
    while !fields.rest().is_empty() {
        found.push(match headers {
            Headers::Extended => (fields.u64().expect("long"), fields.u64().expect("flags")),
            _ => {
                let (len, flags) = (fields.u32().expect("long"), fields.u32().expect("flags"));
                (len.into(), flags.into())
            }
        });
    }
    assert_eq!(found.len(), count);
    (context, found)
}

#[test]
fn a_fast_zero_that_would_not_be_fast_is_refused_and_changes_nothing() {
    let dir = scratch();
    let image = dir.path().join("disk.qcow2");
    let size = "1M";
    crate::util::vdtool()
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&image)
        .arg(size)
        .assert()
        .success();
    let exports = vec![export("", &image, &ChainOptions::write())];
    let serving = Serving::new(dir, exports, lasting());
    let mut raw = Raw::ready(&serving.socket, Headers::Structured);
    assert_eq!(write(&mut raw, 0, 0, &[7; 200_000]), 0);
    let whole = raw.call(command::WRITE_ZEROES, flag::FAST_ZERO, 65_536, 65_536);
    assert_eq!(whole.errno, 0);
    let part = raw.call(command::WRITE_ZEROES, flag::FAST_ZERO, 10, 100);
    assert_eq!(part.errno, errno::NOTSUP);
    let data = raw.call(command::READ, 0, 0, 200_000).data;
    assert!(data[..65_536].iter().all(|b| *b == 7));
    assert!(data[65_536..131_072].iter().all(|b| *b == 0));
    assert!(data[131_072..].iter().all(|b| *b == 7));
}

#[test]
fn clients_that_are_connected_use_a_new_size_at_once() {
    let dir = scratch();
    let image = dir.path().join("disk.raw");
    std::fs::write(&image, [7; 8192]).expect("writes");
    let export = export("", &image, &ChainOptions::write());
    let backend = std::sync::Arc::clone(&export.backend);
    let serving = Serving::new(dir, vec![export], lasting());
    for headers in ALL {
        backend.resize(8192).expect("resizes");
        let mut raw = Raw::connect(&serving.socket);
        raw.raise(headers);
        if headers != Headers::Simple {
            raw.contexts(option::SET_META_CONTEXT, "", &["base:allocation"]);
        }
        raw.go("");
        assert_eq!(raw.size, 8192);
        assert_eq!(raw.call(command::READ, 0, 8190, 4).errno, errno::INVAL);
        backend.resize(16_384).expect("grows");
        assert_eq!(raw.call(command::READ, 0, 8190, 4).data[2..], [0, 0]);
        assert_eq!(write(&mut raw, 0, 16_000, &[9; 384]), 0);
        assert_eq!(raw.call(command::READ, 0, 16_383, 1).data, [9]);
        let zero = raw.call(command::WRITE_ZEROES, 0, 16_000, 380);
        assert_eq!(zero.errno, 0);
        assert_eq!(raw.call(command::TRIM, 0, 12_288, 4096).errno, 0);
        if headers != Headers::Simple {
            let reply = raw.call(command::BLOCK_STATUS, 0, 0, 16_384);
            assert_eq!(reply.extents.len(), 1);
        }
        assert_eq!(Raw::ready(&serving.socket, headers).size, 16_384);
        backend.resize(4096).expect("shrinks");
        assert_eq!(raw.call(command::READ, 0, 4095, 2).errno, errno::INVAL);
        assert_eq!(write(&mut raw, 0, 4095, &[9; 2]), errno::NOSPC);
        let zero = raw.call(command::WRITE_ZEROES, 0, 8192, 1);
        assert_eq!(zero.errno, errno::NOSPC);
        assert_eq!(raw.call(command::TRIM, 0, 0, 4097).errno, errno::INVAL);
        if headers != Headers::Simple {
            let reply = raw.call(command::BLOCK_STATUS, 0, 0, 8192);
            assert_eq!(reply.errno, errno::INVAL);
        }
        assert_eq!(raw.call(command::READ, 0, 4095, 1).data, [7]);
        assert_eq!(
            std::fs::metadata(serving.image()).expect("is there").len(),
            4096
        );
    }
}

#[test]
fn many_requests_under_way_at_once_are_all_answered() {
    let mut random = Seeded::new("many requests");
    let bytes = random.bytes(4 << 20);
    let serving = Serving::raw(&bytes, lasting());
    let mut raw = Raw::ready(&serving.socket, Headers::Structured);
    const COUNT: u64 = 400;
    let shape = |index: u64| match index % 3 {
        0 => (index * 4096, 4096),
        1 => (index * 5000, 70_000),
        _ => (index * 7, 513),
    };
    let mut requests = Vec::new();
    for index in 0..COUNT {
        let (offset, len) = shape(index);
        let request = Request {
            flags: flag::DF,
            command: command::READ,
            cookie: index,
            offset,
            len,
        };
        request.encode(Headers::Structured, &mut requests);
    }
    let mut sender = raw.stream.try_clone().expect("clones");
    let sending = std::thread::spawn(move || sender.write_all(&requests).expect("sends"));
    let mut seen = vec![false; crate::util::len(COUNT)];
    for _ in 0..COUNT {
        assert_eq!(raw.u32(), vdtool::nbd::wire::STRUCTURED_REPLY);
        assert_eq!((raw.u16(), raw.u16()), (1, 1));
        let cookie = raw.u64();
        let (offset, len) = shape(cookie);
        assert_eq!(u64::from(raw.u32()), len + 8);
        assert_eq!(raw.u64(), offset);
        let (start, len) = (crate::util::len(offset), crate::util::len(len));
        assert_same(&raw.bytes(len), &bytes[start..start + len], offset, "read");
        assert!(!std::mem::replace(
            &mut seen[crate::util::len(cookie)],
            true
        ));
    }
    sending.join().expect("sent");
}

#[test]
fn a_client_that_never_reads_or_stops_in_a_message_blocks_only_itself() {
    let serving = Serving::raw(
        &vec![7; 4 << 20],
        super::Options {
            // As much as two of them want.
            memory: 8 << 20,
            ..lasting()
        },
    );
    let mut stuck = Vec::new();
    for index in 0..8 {
        let mut raw = Raw::ready(&serving.socket, Headers::Simple);
        raw.stream
            .set_write_timeout(Some(Duration::from_millis(200)))
            .expect("sets a limit");
        if index % 2 == 0 {
            // Asks for much and takes nothing of it.
            for _ in 0..20 {
                raw.request(command::READ, 0, 1, (4 << 20) - 1);
            }
        } else {
            // Announces much and sends little of it.
            raw.request(command::WRITE, 0, 0, 4 << 20);
            raw.send(&[7; 1000]);
        }
        stuck.push(raw);
    }
    std::thread::sleep(Duration::from_millis(200));
    for headers in ALL {
        let mut raw = Raw::ready(&serving.socket, headers);
        assert_eq!(
            raw.call(command::READ, 0, 1, 3 << 20).data,
            vec![7; 3 << 20]
        );
        assert_eq!(write(&mut raw, 0, 0, &vec![7; 2 << 20]), 0);
        assert_eq!(raw.call(command::FLUSH, 0, 0, 0).errno, 0);
    }
    serving.server.stop();
    serving.server.wait().expect("ends though they are stuck");
}

/// Whether the server grants headers; false: it has no room for the client.
fn is_raised(raw: &mut Raw, headers: Headers) -> bool {
    let number = match headers {
        Headers::Extended => option::EXTENDED_HEADERS,
        _ => option::STRUCTURED_REPLY,
    };
    let kind = raw.ask(number, &[]).kind;
    raw.headers = headers;
    assert!(kind == answer::ACK || kind == answer::SHUTDOWN, "{kind:#x}");
    kind == answer::ACK
}

#[test]
fn clients_that_vanish_leave_nothing_behind() {
    let serving = Serving::raw(
        &vec![7; 1 << 20],
        super::Options {
            connections: 4,
            ..lasting()
        },
    );
    for round in 0..40 {
        let mut raw = Raw::connect(&serving.socket);
        if round % 4 == 0 {
            continue;
        }
        let headers = ALL[round % 3];
        // The server may be slow to see that those before are gone.
        while headers != Headers::Simple && !is_raised(&mut raw, headers) {
            std::thread::sleep(Duration::from_millis(5));
            raw = Raw::connect(&serving.socket);
        }
        raw.option(option::GO, &super::wire::wanted("", &[]));
        if round % 4 == 1 {
            continue;
        }
        drop(raw);
    }
    until("all places are free again", || {
        let all: Vec<_> = (0..4)
            .map(|_| {
                let mut raw = Raw::connect(&serving.socket);
                let kind = raw.ask(option::STRUCTURED_REPLY, &[]).kind;
                (raw, kind == answer::ACK)
            })
            .collect();
        all.iter().all(|(_, is_taken)| *is_taken)
    });
}

//! `io`: parts of sectors, by address and by byte; and the iterator below it against bytes.

use vdtool::chain::open::{ChainOptions, open};
use vdtool::image::disc::{Form, RAW};
use vdtool::image::sector::{self, Parts, Segment, Segments, Unit};

use super::made::{Files, cut, sector, sectors};
use crate::util::{Seeded, len, rounds};

/// The bytes of a dump.
fn dumped(text: &str) -> Vec<u8> {
    let lines = text.lines().filter_map(|line| line.split_once(":  "));
    let numbers = lines.flat_map(|(_, rest)| rest.split("  ").next().unwrap_or("").split(' '));
    numbers
        .map(|n| u8::from_str_radix(n, 16).expect("a byte"))
        .collect()
}

#[test]
fn parts_are_read_by_sector_and_by_byte() {
    let (files, user) = Files::mode1("cue-parts", 30);
    let bin = files.read("x.bin");
    let read = |words: &str| {
        let command = format!("read -v {words}");
        dumped(&files.done(&["io", "-r", "-c", &command, "x.cue"]))
    };
    assert!(
        read("--parts edc,ecc --lba 16 --count 4") == {
            let sectors = &bin[16 * RAW..20 * RAW];
            let parts = sectors
                .chunks(RAW)
                .flat_map(|s| [&s[2064..2068], &s[2076..]].concat());
            parts.collect::<Vec<u8>>()
        }
    );
    assert!(read("--parts all --lba 3 --count 2") == bin[3 * RAW..5 * RAW]);
    assert!(
        read("--parts data --lba 3 --lba 1") == {
            [&user[3 * 2048..4 * 2048], &user[2048..2 * 2048]].concat()
        }
    );
    assert_eq!(read("--parts sync,header --parts zero --lba 0 --lba 1"), {
        [&bin[..16], &bin[RAW + 2068..RAW + 2076]].concat()
    });
    // Bytes of whole sectors: the end of one's data and the start of the next one's.
    assert_eq!(
        read("--parts data 2060 320"),
        [&bin[2060..2064], &bin[RAW + 16..RAW + 28]].concat()
    );
    assert_eq!(
        read("--parts all 0 4 2350 4"),
        [&bin[..4], &bin[2350..2354]].concat()
    );
    let text = files.done(&[
        "io",
        "-r",
        "-c",
        "read --parts zero -P 0 --lba 0 --count 30",
        "x.cue",
    ]);
    assert!(text.contains("read 240/240 bytes at offset 2068"), "{text}");
    let differs = ["io", "-r", "-c", "read --parts sync -P 0 --lba 2", "x.cue"];
    let (code, text, _) = files.run(&differs);
    assert_eq!(code, 1);
    assert!(text.contains(&format!(
        "Pattern verification failed at offset {}",
        2 * RAW + 1
    )));
}

#[test]
fn written_data_has_its_codes_made_anew() {
    let (files, mut user) = Files::mode1("cue-parts-write", 30);
    let data = Seeded::new("cue-new").bytes(4096);
    files.write("new", &data);
    files.done(&[
        "io",
        "-c",
        "write --parts data -s new --lba 16 --count 2",
        "x.cue",
    ]);
    user[16 * 2048..18 * 2048].copy_from_slice(&data);
    files.done(&["check", "x.cue"]);
    assert!(files.disk(&[]) == user);
    // A few bytes of two sectors.
    let at = 4 * RAW + 2062;
    let command = format!("write --parts data -P 0xee {at} 400");
    files.done(&["io", "-c", &command, "x.cue"]);
    user[4 * 2048 + 2046..5 * 2048].fill(0xee);
    user[5 * 2048..5 * 2048 + 94].fill(0xee);
    files.done(&["check", "x.cue"]);
    assert!(files.disk(&[]) == user);
    // Codes by themselves are written as they are given.
    files.done(&["io", "-c", "write --parts edc -P 1 --lba 9", "x.cue"]);
    assert_eq!(files.run(&["check", "x.cue"]).0, 2);
    // New codes for a part of it would hide that the rest is wrong.
    files.damage("x.bin", (100..2000).map(|n| 9 * RAW + n));
    let before = files.read("x.bin");
    let part = format!("write --parts data -P 1 {} 10", 9 * RAW + 20);
    files.fails(&["io", "-c", &part, "x.cue"], 1, "would hide that");
    assert!(files.read("x.bin") == before);
    files.done(&["io", "-c", "write --parts data -P 7 --lba 9", "x.cue"]);
    user[9 * 2048..10 * 2048].fill(7);
    files.done(&["check", "x.cue"]);
    assert!(files.disk(&[]) == user);
    files.fails(
        &["io", "-r", "-c", "write --parts data --lba 1", "x.cue"],
        1,
        "read-only",
    );
}

#[test]
fn form_2_keeps_its_missing_code_and_plain_sectors_have_data_alone() {
    let mut rng = Seeded::new("cue-parts-form2");
    let mut bin = sector(Form::Form2, 0, &rng.bytes(2324)).to_vec();
    bin.extend(sector(Form::Form2, 1, &rng.bytes(2324)));
    bin[2348..2352].fill(0);
    bin.extend(cut(&sector(Form::Mode1, 2, &rng.bytes(2048)), 16..2064));
    let sheet = b"FILE x.bin BINARY\nTRACK 01 MODE2/2352\nINDEX 01 00:00:00\nTRACK 02 MODE1/2048\nINDEX 01 00:00:02\n";
    let files = Files::new(&[("x.cue", sheet), ("x.bin", &bin)]);
    files.done(&[
        "io",
        "-c",
        "write --parts data -P 3 --lba 0 --count 3",
        "x.cue",
    ]);
    let written = files.read("x.bin");
    assert_eq!(written[2348..2352], [0; 4]);
    assert_ne!(written[2 * RAW - 4..2 * RAW], bin[2 * RAW - 4..2 * RAW]);
    assert!(written[2 * RAW..].iter().all(|b| *b == 3) && written.len() == bin.len());
    files.done(&["check", "x.cue"]);
    files.fails(
        &["io", "-r", "-c", "read --parts edc --lba 2", "x.cue"],
        1,
        "none of these sectors",
    );
    files.fails(
        &["io", "-c", "write --parts edc --lba 2", "x.cue"],
        1,
        "it has: data",
    );
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let (files, _) = Files::mode1("cue-parts-bad", 3);
    files.write("x.raw", &[0; 4096]);
    let cases = [
        ("read --parts edc --lba 3", "x.cue", "past the end"),
        (
            "read --parts edc --lba 1 --count 99",
            "x.cue",
            "past the end",
        ),
        (
            "read --parts edc --lba 9223372036854775807",
            "x.cue",
            "2^63",
        ),
        ("read --parts nothing --lba 1", "x.cue", "allowed: sync"),
        ("read --parts edc", "x.cue", "needs --lba"),
        ("read --lba 1", "x.cue", "--parts is given once"),
        (
            "read --parts edc --lba 1 0 10",
            "x.cue",
            "instead of OFFSET",
        ),
        ("read --parts edc 0", "x.cue", "pairs of"),
        (
            "read --parts edc --count 2 --lba 1 --count 3",
            "x.cue",
            "once for each",
        ),
        ("read --parts edc --lbas 1", "x.cue", "no option --lbas"),
        ("read --parts edc --lba 1", "x.raw", "no sectors with parts"),
        ("write -z --parts data --lba 1", "x.cue", "-z is not for"),
        ("read 0", "x.cue", "bad argument count 1 (allowed: 2)"),
    ];
    for (command, file, part) in cases {
        files.fails(&["io", "-c", command, file], 1, part);
    }
}

/// Reads and writes of segments at random, against a vector of all bytes.
#[test]
fn segments_at_random_read_and_change_the_bytes_that_a_vector_says() {
    let mut rng = Seeded::new("cue-model");
    let forms = [Form::Mode1, Form::Form1, Form::Form2, Form::Formless];
    let mut bin = Vec::new();
    let count = 24;
    let forms: Vec<Form> = (0..count).map(|_| forms[rng.usize(0..4)]).collect();
    for (lba, form) in (0..).zip(&forms) {
        bin.extend(sectors(&mut rng, *form, lba, 1).0);
    }
    let sheet = b"FILE x.bin BINARY\nTRACK 01 MODE2/2352\nINDEX 01 00:00:00\n";
    let files = Files::new(&[("x.cue", sheet), ("x.bin", &bin)]);
    let chain = open(&files.file("x.cue"), &ChainOptions::write()).expect("opens");
    let disc = chain.top().as_sectors().expect("has sectors");
    let sets = [
        Parts::ALL,
        Parts::DATA,
        Parts::EDC.union(Parts::ECC),
        Parts::HEADER.union(Parts::DATA),
    ];
    for _ in 0..rounds(300) {
        let unit = if rng.bool() {
            Unit::Blocks
        } else {
            Unit::Bytes
        };
        let whole = if unit == Unit::Blocks { 1 } else { RAW as u64 };
        let list: Vec<Segment> = (0..rng.usize(1..4))
            .map(|_| {
                let start = rng.u64(0..count * whole);
                let most = (count * whole - start).min(5 * whole);
                let parts = sets[rng.usize(0..sets.len())];
                let len = rng.u64(1..most + 1);
                Segment { start, len, parts }
            })
            .collect();
        let segments = Segments::new(unit, list.clone()).expect("is right");
        // By the definition, byte by byte.
        let mut expected = Vec::new();
        for segment in &list {
            for at in 0..bin.len() {
                let (lba, byte) = (at / RAW, at % RAW);
                let address = if unit == Unit::Blocks {
                    lba as u64
                } else {
                    at as u64
                };
                let is_in = (segment.start..segment.start + segment.len).contains(&address);
                let mut parts = forms[lba].parts().iter();
                let part = parts.find(|(_, range)| range.contains(&byte));
                if is_in && part.is_some_and(|(part, _)| segment.parts.has(*part)) {
                    expected.push(at);
                }
            }
        }
        let mut found = Vec::new();
        let read = sector::read(disc, &segments, &mut |piece, bytes| {
            let at = len(piece.lba) * RAW + piece.range.start;
            found.extend(bytes.iter().enumerate().map(|(n, byte)| (at + n, *byte)));
            Ok(())
        });
        let right: Vec<(usize, u8)> = expected.iter().map(|at| (*at, bin[*at])).collect();
        assert!(found == right, "{segments:?}");
        assert_eq!(read.expect("reads"), expected.len() as u64);
        // Data alone is written: the codes follow, and nothing else changes.
        if list.iter().all(|s| s.parts == Parts::DATA) && !expected.is_empty() {
            write(disc, &segments, &mut bin, &forms, &mut rng);
            let stored = files.read("x.bin");
            assert!(stored == bin, "{segments:?}");
        }
    }
    drop(chain);
    files.done(&["check", "x.cue"]);
}

/// Writes bytes at random, to the disc and to the vector, which gets its codes by the library.
fn write(
    disc: &dyn sector::Sectors,
    segments: &Segments,
    bin: &mut [u8],
    forms: &[Form],
    rng: &mut Seeded,
) {
    let mut given = Vec::new();
    let written = sector::write(disc, segments, &mut |piece, buf| {
        let bytes = rng.bytes(buf.len());
        buf.copy_from_slice(&bytes);
        given.push((len(piece.lba), piece.range.clone(), bytes));
        Ok(())
    });
    match written {
        Ok(_) => {}
        // The last bytes of a sector may be no data.
        Err(e) => assert!(e.to_string().contains("none of these parts"), "{e}"),
    }
    for (lba, range, bytes) in given {
        let sector = &mut bin[lba * RAW..(lba + 1) * RAW];
        sector[range].copy_from_slice(&bytes);
        let mut raw: [u8; RAW] = sector.try_into().expect("a sector");
        vdtool::image::disc::make_codes(&mut raw, forms[lba]);
        sector.copy_from_slice(&raw);
    }
}

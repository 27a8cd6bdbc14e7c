//! Streams: what ovftool, vSphere and ESXi want of them, rule by rule, walked apart from the driver.

use std::fs;
use std::io::Read;

use crate::util::{scratch, vdtool};
use crate::vmdk::{MIB, SECTOR, ends, patch, quad, raw_disk, word};

/// What a walk from the first byte to the last found.
#[derive(Debug, Default)]
struct Walk {
    /// First sectors of grains of the disk, in file order, with the sectors at which they are.
    grains: Vec<(u64, u64)>,
    /// Sectors of tables, with the number of grains before each.
    tables: Vec<(u64, usize)>,
    directory: u64,
    footer: u64,
    /// The sector of the end, and those of the file.
    end: u64,
    sectors: u64,
}

fn walk(bytes: &[u8], disk: &[u8]) -> Walk {
    let mut walk = Walk {
        sectors: (bytes.len() / SECTOR) as u64,
        ..Walk::default()
    };
    assert_eq!(bytes.len() % SECTOR, 0, "whole sectors");
    let mut at = usize::try_from(quad(bytes, 64)).expect("small");
    loop {
        let marker = &bytes[at * SECTOR..];
        let (value, size, kind) = (quad(marker, 0), word(marker, 8), word(marker, 12));
        if size != 0 {
            let size = size as usize;
            assert!(size <= 66_036, "a grain of {size} bytes");
            let mut grain = Vec::new();
            let mut data = flate2::read::ZlibDecoder::new(&marker[12..12 + size]);
            data.read_to_end(&mut grain).expect("is zlib");
            assert_eq!(grain.len(), 128 * SECTOR, "full, the last one too");
            let first = usize::try_from(value).expect("small") * SECTOR;
            let part = &disk[first..disk.len().min(first + grain.len())];
            assert_eq!(&grain[..part.len()], part);
            assert!(part.iter().any(|b| *b != 0), "no grain of zeroes");
            let end = (12 + size).next_multiple_of(SECTOR);
            assert!(
                marker[12 + size..end].iter().all(|b| *b == 0),
                "zeroes behind"
            );
            walk.grains.push((value, at as u64));
            at += end / SECTOR;
            continue;
        }
        assert!(
            marker[16..SECTOR].iter().all(|b| *b == 0),
            "a marker's sector"
        );
        let next = at as u64 + 1;
        match kind {
            0 => {
                assert_eq!(value, 0);
                walk.end = at as u64;
                return walk;
            }
            1 => {
                assert_eq!(value, 4, "sectors of a table");
                walk.tables.push((next, walk.grains.len()));
            }
            2 => walk.directory = next,
            3 => {
                assert_eq!(value, 1, "sectors of a footer");
                walk.footer = next;
            }
            other => panic!("a marker of type {other}"),
        }
        at += 1 + usize::try_from(value).expect("small");
    }
}

/// Makes a stream of a disk of this size and walks it.
fn made(size: u64) {
    let scratch = scratch();
    let dir = scratch.path();
    raw_disk(dir, "stream", size);
    let convert = [
        "convert",
        "-q",
        "-O",
        "vmdk",
        "-o",
        "subformat=streamOptimized",
        "raw",
    ];
    ends(dir, &[&convert[..], &["a.vmdk"]].concat(), 0);
    let bytes = fs::read(dir.join("a.vmdk")).expect("reads");
    let disk = fs::read(dir.join("raw")).expect("reads");
    assert_eq!(&bytes[..4], b"KDMV");
    assert_eq!((word(&bytes, 4), word(&bytes, 8)), (3, 0x3_0001));
    assert_eq!(quad(&bytes, 12), size.div_ceil(65_536) * 128);
    assert_eq!((quad(&bytes, 20), word(&bytes, 44)), (128, 512));
    assert_eq!(
        (quad(&bytes, 48), quad(&bytes, 56)),
        (0, u64::MAX),
        "rgd, gd"
    );
    assert_eq!(&bytes[72..79], b"\0\n \r\n\x01\0");
    let text = SECTOR..21 * SECTOR;
    let text = String::from_utf8_lossy(&bytes[text]).into_owned();
    assert!(text.contains("createType=\"streamOptimized\""), "{text}");
    assert!(text.contains("ddb.toolsVersion = \"2147483647\""), "{text}");
    let walk = walk(&bytes, &disk);
    assert_eq!(
        walk.end + 1,
        walk.sectors,
        "the end of the stream is the end of the file"
    );
    assert_eq!(walk.footer, walk.end - 1);
    let footer = &bytes[usize::try_from(walk.footer).expect("small") * SECTOR..];
    assert_eq!(footer[..56], bytes[..56]);
    assert_eq!(quad(footer, 56), walk.directory);
    assert!(walk.grains.is_sorted(), "in guest order");
    // Each table follows its own grains and names them; others are none.
    let directory = &bytes[usize::try_from(walk.directory).expect("small") * SECTOR..];
    let mut from = 0;
    for (table, before) in &walk.tables {
        let grains = &walk.grains[from..*before];
        let number = grains[0].0 / 128 / 512;
        let named = word(directory, usize::try_from(number).expect("small") * 4);
        assert_eq!(u64::from(named), *table);
        let words = &bytes[usize::try_from(*table).expect("small") * SECTOR..];
        for slot in 0..512 {
            let first = (number * 512 + slot) * 128;
            let grain = grains.iter().find(|(value, _)| *value == first);
            let named = word(words, usize::try_from(slot).expect("small") * 4);
            assert_eq!(u64::from(named), grain.map_or(0, |(_, at)| *at));
        }
        from = *before;
    }
    assert_eq!(from, walk.grains.len(), "all grains are named");
    let used = walk.tables.len();
    let named = directory[..usize::try_from(size.div_ceil(32 * MIB)).expect("small") * 4]
        .chunks_exact(4)
        .filter(|word| **word != [0; 4]);
    assert_eq!(named.count(), used);
    ends(dir, &["compare", "raw", "a.vmdk"], 0);
    ends(dir, &["check", "a.vmdk"], 0);
    // The same bytes whatever the number of threads, and on stdout; but for what names the disk.
    for (jobs, target) in [("1", "b.vmdk"), ("7", "b.vmdk"), ("3", "-")] {
        let arguments = [&convert[..], &["-j", jobs, target]].concat();
        let done = vdtool().current_dir(dir).args(arguments).assert().success();
        let other = match target {
            "-" => done.get_output().stdout.clone(),
            file => fs::read(dir.join(file)).expect("reads"),
        };
        assert!(other[..SECTOR] == bytes[..SECTOR], "{jobs} {target}");
        assert!(
            other[21 * SECTOR..] == bytes[21 * SECTOR..],
            "{jobs} {target}"
        );
    }
}

#[test]
fn a_stream_keeps_every_rule_of_those_who_import_it() {
    made(70 * MIB);
}

#[test]
fn a_stream_of_an_odd_size_is_full_to_its_last_grain() {
    made(33 * MIB + 1536);
}

#[test]
fn an_empty_disk_is_a_stream_too() {
    let scratch = scratch();
    let dir = scratch.path();
    ends(
        dir,
        &[
            "create",
            "-q",
            "-f",
            "vmdk",
            "-o",
            "subformat=streamOptimized",
            "a.vmdk",
            "100M",
        ],
        0,
    );
    let bytes = fs::read(dir.join("a.vmdk")).expect("reads");
    let walk = walk(&bytes, &[]);
    assert_eq!((walk.grains.len(), walk.tables.len()), (0, 0));
    assert_eq!(walk.end + 1, walk.sectors);
    fs::write(dir.join("raw"), []).expect("writes");
    fs::File::options()
        .write(true)
        .open(dir.join("raw"))
        .and_then(|f| f.set_len(100 * MIB))
        .expect("grows");
    ends(dir, &["compare", "raw", "a.vmdk"], 0);
}

#[test]
fn grains_that_are_not_what_their_markers_say_are_errors() {
    let scratch = scratch();
    let dir = scratch.path();
    raw_disk(dir, "bad grains", 10 * MIB);
    let convert = [
        "convert",
        "-q",
        "-O",
        "vmdk",
        "-o",
        "subformat=streamOptimized",
        "raw",
        "a.vmdk",
    ];
    ends(dir, &convert, 0);
    let good = fs::read(dir.join("a.vmdk")).expect("reads");
    let first = usize::try_from(quad(&good, 64)).expect("small") * SECTOR;
    for (what, at, new) in [
        ("says sector 5", first, &5_u64.to_le_bytes()[..]),
        ("compressed bytes", first + 8, &[0xff; 4]),
        ("compressed bytes", first + 8, &[0, 0, 4, 0]),
        ("not valid zlib", first + 12, &[0x11]),
        ("not valid zlib", first + 900, &[0xaa, 0x55, 0xaa]),
    ] {
        fs::write(dir.join("a.vmdk"), &good).expect("writes");
        patch(&dir.join("a.vmdk"), at, new);
        let text = ends(dir, &["convert", "-q", "a.vmdk", "out.raw"], 1);
        assert!(
            text.contains(what) && text.contains("grain 0"),
            "{what}: {text}"
        );
        assert!(!dir.join("out.raw").exists());
        let text = ends(dir, &["check", "a.vmdk"], 2);
        assert!(text.contains(what), "{what}: {text}");
    }
    for len in [
        good.len() - 1,
        good.len() - SECTOR,
        good.len() / 2,
        good.len() + SECTOR,
    ] {
        let mut cut = good.clone();
        cut.resize(len, 0);
        fs::write(dir.join("a.vmdk"), cut).expect("writes");
        let text = ends(dir, &["convert", "-q", "a.vmdk", "out.raw"], 1);
        assert!(text.contains("footer"), "{text}");
    }
}

#[test]
fn a_stream_takes_a_level_of_compression_with_and_without_its_option() {
    let scratch = scratch();
    let dir = scratch.path();
    raw_disk(dir, "levels", 4 * MIB);
    let text: Vec<u8> = (0..400_000_u32)
        .flat_map(|n| n.to_string().into_bytes())
        .collect();
    let mut disk = fs::read(dir.join("raw")).expect("reads");
    disk[..2 << 20].copy_from_slice(&text[..2 << 20]);
    fs::write(dir.join("raw"), &disk).expect("writes");
    let len = |options: &str, flags: &[&str]| {
        let options = format!("subformat=streamOptimized{options}");
        let convert = [
            "convert", "-q", "-O", "vmdk", "-o", &options, "raw", "a.vmdk",
        ];
        ends(dir, &[&convert[..], flags].concat(), 0);
        let bytes = fs::read(dir.join("a.vmdk")).expect("reads");
        walk(&bytes, &disk);
        bytes.len()
    };
    let usual = len("", &[]);
    assert_eq!(usual, len(",compression_level=5", &[]));
    assert_eq!(usual, len(",compression_level=5", &["-c"]));
    assert_ne!(len(",compression_level=1", &[]), usual);
    assert!(len(",compression_level=12", &["-c"]) < usual);
    let convert = "convert -O vmdk -o compression_level=5 raw b.vmdk";
    let told = ends(dir, &convert.split(' ').collect::<Vec<_>>(), 2);
    assert!(told.contains("is for -c"), "{told}");
    let convert = "convert -O vmdk -o subformat=streamOptimized,compression_level=5 raw -";
    let out = vdtool().current_dir(dir).args(convert.split(' ')).output();
    assert_eq!(out.expect("starts").stdout.len(), usual);
}

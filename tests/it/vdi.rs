//! VDI as others make it, as a hostile hand leaves it, and as qemu-img sees it.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use vdtool::ErrorKind;
use vdtool::chain::{Base, Chain};
use vdtool::formats::vdi::DRIVER;
use vdtool::image::Image;
use vdtool::image::check::{Repair, Report};
use vdtool::image::open::OpenOptions;
use vdtool::storage::memory::MemoryStorage;
use vdtool::storage::open::Access;
use vdtool::storage::{Storage, Zeroing};
use vdtool::util::grace::Grace;

use crate::crash::{Act, Session};
use crate::layers::{Disk, check, read_all};
use crate::mutate::{EDGES, Expect, Sample};
use crate::oracle::{apply, as_commands, patterns, run};
use crate::util::{Seeded, assert_same, len, peer, requires, rounds, scratch, vdtool};

const FREE: u32 = u32::MAX;
const ZERO: u32 = u32::MAX - 1;
const MIB: u64 = 1 << 20;

/// A disk as another program may have made it: block number n of the file is full of n + 1, and what
/// lies before it is full of 0xee.
#[derive(Debug, Clone)]
pub(crate) struct Made {
    version: u32,
    header_len: u32,
    kind: u32,
    flags: u32,
    map: u32,
    data: u32,
    disk: u64,
    block: u32,
    extra: u32,
    entries: Vec<u32>,
    count: u32,
    /// Blocks that the file has.
    blocks: u32,
}

/// A dynamic disk of version 1.1 with no room between anything.
pub(crate) fn made(block: u32, entries: &[u32]) -> Made {
    let blocks = entries
        .iter()
        .filter(|e| **e < ZERO)
        .max()
        .map_or(0, |e| e + 1);
    let words = u32::try_from(entries.len()).expect("few");
    Made {
        version: 0x0001_0001,
        header_len: 384,
        kind: 1,
        flags: 0,
        map: 512,
        data: 512 + words * 4,
        disk: u64::from(block) * entries.len() as u64,
        block,
        extra: 0,
        entries: entries.to_vec(),
        count: blocks,
        blocks,
    }
}

impl Made {
    fn first_version(self) -> Self {
        let words = u32::try_from(self.entries.len()).expect("few");
        Self {
            version: 2,
            map: 420,
            data: 420 + words * 4,
            ..self
        }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.data as usize];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        let words = u32::try_from(self.entries.len()).expect("few");
        put(0, b"<<< Somebody's Disk Image >>>\n");
        put(64, &0xbeda_107f_u32.to_le_bytes());
        put(68, &self.version.to_le_bytes());
        let (kind, disk, uuids) = match self.version {
            2 => (72, 352, 372),
            _ => (76, 368, 392),
        };
        if self.version != 2 {
            put(72, &self.header_len.to_le_bytes());
            put(340, &self.map.to_le_bytes());
            put(344, &self.data.to_le_bytes());
            put(380, &self.extra.to_le_bytes());
        }
        put(kind, &self.kind.to_le_bytes());
        put(kind + 4, &self.flags.to_le_bytes());
        put(kind + 8, b"made by \x1b[31mhand");
        put(disk, &self.disk.to_le_bytes());
        put(disk + 8, &self.block.to_le_bytes());
        let counts = if self.version == 2 {
            disk + 12
        } else {
            disk + 16
        };
        put(counts, &words.to_le_bytes());
        put(counts + 4, &self.count.to_le_bytes());
        put(uuids, &[0x11; 16]);
        put(uuids + 16, &[0x22; 16]);
        if self.kind > 2 {
            put(uuids + 32, &[0x33; 16]);
        }
        for (index, entry) in self.entries.iter().enumerate() {
            put(self.map as usize + index * 4, &entry.to_le_bytes());
        }
        for number in 0..self.blocks {
            bytes.resize(bytes.len() + self.extra as usize, 0xee);
            let byte = u8::try_from(number + 1).expect("few");
            bytes.resize(bytes.len() + self.block as usize, byte);
        }
        bytes
    }

    /// What it reads as where nothing lies below.
    pub(crate) fn content(&self) -> Vec<u8> {
        let block = |entry: &u32| {
            let byte = u8::try_from(entry.saturating_add(1)).unwrap_or(0);
            vec![byte; self.block as usize]
        };
        let mut content: Vec<u8> = self.entries.iter().flat_map(block).collect();
        content.truncate(len(self.disk / 512 * 512));
        content
    }

    fn memory(&self) -> Arc<MemoryStorage> {
        Arc::new(MemoryStorage::from_bytes(&self.bytes()))
    }
}

fn open(storage: &Arc<MemoryStorage>, access: Access) -> vdtool::Result<Box<dyn Image>> {
    let options = OpenOptions {
        access,
        ..OpenOptions::default()
    };
    (DRIVER.open)(storage.clone(), &options)
}

fn chain(storage: &Arc<MemoryStorage>, access: Access) -> vdtool::Result<Chain> {
    Chain::new(
        vec![open(storage, access)?],
        Base::Zeroes,
        Arc::new(Grace::default()),
    )
}

fn read(storage: &Arc<MemoryStorage>) -> Vec<u8> {
    read_all(&chain(storage, Access::Read).expect("opens"))
}

fn checked(storage: &Arc<MemoryStorage>, repair: Repair) -> Report {
    check(&DRIVER, storage.clone(), repair).expect("has a check")
}

fn is_clean(storage: &Arc<MemoryStorage>, what: &str) {
    let report = checked(storage, Repair::Nothing);
    let found = (report.corruptions, report.leaks);
    assert_eq!(found, (0, 0), "{what}: {:?}", report.findings);
}

/// Writes here and there, closes, and sees that it is all there.
fn writes(storage: &Arc<MemoryStorage>, what: &str) {
    let mut rng = Seeded::new(what);
    let mut model = read(storage);
    let chain = chain(storage, Access::Write).unwrap_or_else(|e| panic!("{what}: {e}"));
    for _ in 0..rounds(20) {
        let at = rng.usize(0..model.len());
        let count = rng.usize(1..=(model.len() - at).min(700));
        let bytes = rng.bytes(count);
        chain.write_at(&bytes, at as u64).expect("writes");
        model[at..at + count].copy_from_slice(&bytes);
    }
    chain.close().expect("closes");
    drop(chain);
    assert_same(&read(storage), &model, 0, what);
    is_clean(storage, what);
}

/// All shapes that readers of the field take, by name.
fn shapes() -> Vec<(&'static str, Made)> {
    let entries = [2, FREE, 0, ZERO, 1];
    let plain = made(4096, &entries);
    vec![
        ("version 0", plain.clone().first_version()),
        (
            "version 1.0",
            Made {
                version: 0x0001_0000,
                ..plain.clone()
            },
        ),
        (
            "version 1.7",
            Made {
                version: 0x0001_0007,
                ..plain.clone()
            },
        ),
        (
            "long header",
            Made {
                header_len: 900,
                map: 1024,
                data: 1044,
                ..plain.clone()
            },
        ),
        (
            "map at once",
            Made {
                map: 456,
                data: 500,
                ..plain.clone()
            },
        ),
        ("sectors", made(512, &entries)),
        ("2 MiB", made(2 << 20, &entries)),
        (
            "extra",
            Made {
                extra: 512,
                ..plain.clone()
            },
        ),
        (
            "large extra",
            Made {
                extra: 8192,
                ..plain.clone()
            },
        ),
        (
            "cut",
            Made {
                disk: 4 * 4096 + 512,
                ..plain.clone()
            },
        ),
        (
            "odd size",
            Made {
                disk: 4 * 4096 + 700,
                ..plain.clone()
            },
        ),
        (
            "more entries than needed",
            Made {
                disk: 3 * 4096,
                ..plain.clone()
            },
        ),
        (
            "fixed",
            Made {
                kind: 2,
                ..made(4096, &[2, 0, 1])
            },
        ),
        ("child", Made { kind: 4, ..plain }),
    ]
}

#[test]
fn versions_block_sizes_and_room_before_blocks_read_and_write_as_they_are() {
    for (name, made) in shapes() {
        let storage = made.memory();
        assert_same(&read(&storage), &made.content(), 0, name);
        is_clean(&storage, name);
        let before = storage.to_bytes();
        writes(&storage, name);
        let after = storage.to_bytes();
        let uuids = if made.version == 2 { 372 } else { 392 };
        assert_eq!(
            after[..uuids - 4],
            before[..uuids - 4],
            "{name}: the header"
        );
        assert_eq!(
            after[uuids..uuids + 16],
            before[uuids..uuids + 16],
            "{name}: who it is"
        );
        assert_ne!(
            after[uuids + 16..uuids + 32],
            [0x22; 16],
            "{name}: when it is"
        );
        let rest = uuids + 32..made.map as usize;
        assert_eq!(after[rest.clone()], before[rest], "{name}: what follows");
        for number in 0..made.blocks as usize {
            let at = made.data as usize + number * (made.block + made.extra) as usize;
            let room = at..at + made.extra as usize;
            assert_eq!(
                after[room.clone()],
                before[room],
                "{name}: before block {number}"
            );
        }
    }
}

#[test]
fn all_shapes_grow_and_shrink_but_for_the_first_version_which_does_not_grow_past_its_map() {
    for (name, made) in shapes() {
        let storage = made.memory();
        let mut model = made.content();
        for blocks in [7, 2, 90, 3, 1, 40] {
            let size = (u64::from(made.block) * blocks).next_multiple_of(512) + 512;
            let chain = chain(&storage, Access::Write).expect("opens");
            match chain.resize(size) {
                Err(e) if made.version == 2 => {
                    assert_eq!(e.kind(), ErrorKind::OutOfRange, "{e}");
                    assert!(blocks >= 5, "{e}");
                }
                done => {
                    done.unwrap_or_else(|e| panic!("{name}: to {size:#x}: {e}"));
                    model.resize(len(size), 0);
                }
            }
            assert_eq!(chain.virtual_size(), model.len() as u64, "{name}");
            let at = model.len() as u64 / 2;
            chain.write_at(&[0x77; 300], at).expect("writes");
            model[len(at)..len(at) + 300].fill(0x77);
            assert_same(&read_all(&chain), &model, 0, name);
            chain.close().expect("closes");
            drop(chain);
            assert_same(&read(&storage), &model, 0, name);
            is_clean(&storage, name);
        }
    }
}

#[test]
fn growing_over_the_first_blocks_and_shrinking_survive_kills_and_power_cuts() {
    let entries = [3, FREE, 0, 2, ZERO, 1];
    for (name, made) in [
        ("grows", made(512, &entries)),
        (
            "grows with extra",
            Made {
                extra: 256,
                ..made(512, &entries)
            },
        ),
        (
            "grows fixed",
            Made {
                kind: 2,
                ..made(512, &[1, 0, 2])
            },
        ),
    ] {
        let acts = [
            Act::Write(512..700),
            Act::Resize(300 * 512),
            Act::Write(600..2000),
            Act::Flush,
            Act::Resize(1536),
            Act::Write(0..1536),
            Act::Resize(900 * 512),
            Act::Write(800 * 512..801 * 512),
            Act::Close,
        ];
        let disk = Disk::of_bytes("vdi", &made.bytes());
        let mut session = Session::of(name, disk, None, &acts);
        session.every_kill();
        session.power_cuts();
    }
}

#[test]
fn undo_images_are_read_over_what_lies_below_and_never_written() {
    let below = made(4096, &[4, 3, 2, 1, 0]);
    for kind in [3, 4] {
        let top = Made {
            kind,
            ..made(8192, &[FREE, 0, ZERO])
        };
        let storage = top.memory();
        let layers = vec![
            open(&storage, Access::Read).expect("opens"),
            open(&below.memory(), Access::Read).expect("opens"),
        ];
        let backing = layers[0].backing().expect("has something below");
        assert_eq!(
            backing.identity.map(uuid::Uuid::into_bytes),
            Some([0x33; 16])
        );
        let chain = Chain::new(layers, Base::Zeroes, Arc::new(Grace::default()));
        let found = read_all(&chain.expect("has layers"));
        let expected = [&below.content()[..8192], &[1; 8192], &[0; 8192]].concat();
        assert_same(&found, &expected, 0, "over another");
    }
    let undo = Made {
        kind: 3,
        ..made(4096, &[0])
    };
    let flags = Made {
        flags: 1,
        ..made(4096, &[0])
    };
    for made in [undo, flags] {
        let storage = made.memory();
        let error = open(&storage, Access::Write).expect_err("is only read");
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert_eq!(storage.to_bytes(), made.bytes());
    }
}

#[test]
fn zeroes_over_what_a_child_does_not_have_reach_the_file_and_stored_blocks_keep_their_space() {
    let child = Made {
        kind: 4,
        ..made(4096, &[FREE, 0, FREE])
    };
    let storage = child.memory();
    let image = open(&storage, Access::Write).expect("opens");
    image.zero(0..8192, Zeroing::MayUnmap).expect("zeroes");
    image.discard(4096..3 * 4096).expect("discards");
    image.close().expect("closes");
    let bytes = storage.to_bytes();
    let entries: Vec<u8> = [ZERO, 0, FREE]
        .iter()
        .flat_map(|e| e.to_le_bytes())
        .collect();
    assert_eq!(bytes[512..524], entries);
    assert!(bytes[524..].iter().all(|b| *b == 0) && bytes.len() == 524 + 4096);
    is_clean(&storage, "zeroed");
}

/// What is said of an image that is not opened.
fn refusal(bytes: &[u8], access: Access) -> String {
    let storage = Arc::new(MemoryStorage::from_bytes(bytes));
    let error = open(&storage, access).map(|_| ()).expect_err("is refused");
    assert_eq!(storage.to_bytes(), bytes, "{error}: nothing changes");
    error.to_string()
}

#[test]
fn headers_that_contradict_themselves_are_refused_by_field() {
    let plain = made(4096, &[0, FREE]);
    let patch = |at: usize, value: &[u8]| {
        let mut bytes = plain.bytes();
        bytes[at..at + value.len()].copy_from_slice(value);
        bytes
    };
    let word = |at: usize, value: u32| patch(at, &value.to_le_bytes());
    let mut short = word(384, u32::MAX);
    short.truncate(1024);
    for (what, bytes) in [
        ("map of 4294967295 entries", short),
        ("map", word(384, u32::MAX - 1)),
        ("block size is 1 ", word(376, 1)),
        ("block size is 3 ", word(376, 3)),
        ("block size is 256 ", word(376, 256)),
        ("block size is 2147483648", word(376, 1 << 31)),
        ("2147483648 bytes before", word(380, 1 << 31)),
        ("3 bytes before", word(380, 3)),
        ("the data at 0x100", word(344, 256)),
        ("the data at 0x204", word(344, 516)),
        ("the map is at 0x64", word(340, 100)),
        ("the map is at 0x1ca", word(340, 458)),
        ("map", word(340, u32::MAX - 3)),
        ("18446744073709551615 bytes", patch(368, &[0xff; 8])),
        ("8704 bytes", patch(368, &8704_u64.to_le_bytes())),
        ("type is 5", word(76, 5)),
        ("type is 0", word(76, 0)),
        ("version is 0x00020000", word(68, 0x0002_0000)),
        ("version is 0x00000001", word(68, 1)),
        ("length is 383", word(72, 383)),
        ("signature", word(64, 1)),
        ("ends within the header", plain.bytes()[..511].to_vec()),
        ("map", plain.bytes()[..515].to_vec()),
    ] {
        for access in [Access::Read, Access::Write] {
            let text = refusal(&bytes, access);
            assert!(text.contains(what), "{what}: {text}");
        }
    }
}

#[test]
fn entries_that_cannot_be_are_named_where_they_are_read_and_nothing_is_written_beside_them() {
    for (entries, blocks, what) in [
        (vec![0, 0xffff_fffd], 1, "behind the end of the file"),
        (vec![0, 7], 1, "behind the end of the file"),
        (vec![1, 1, 0], 2, "another entry too"),
    ] {
        let made = Made {
            blocks,
            ..made(4096, &entries)
        };
        let text = refusal(&made.bytes(), Access::Write);
        assert!(
            text.contains(what) && text.contains("check -r all"),
            "{text}"
        );
        let storage = made.memory();
        let chain = chain(&storage, Access::Read).expect("is read");
        let mut found = vec![0; 4096];
        chain.read_at(&mut found, 0).expect("the first is right");
        if blocks == 1 {
            let error = chain.read_at(&mut found, 4096).expect_err("is nowhere");
            assert!(error.to_string().contains("block 1"), "{error}");
        }
        drop(chain);
        let report = checked(&storage, Repair::All);
        assert_eq!(
            (report.corruptions, report.corruptions_fixed),
            (0, 1),
            "{report:?}"
        );
        is_clean(&storage, what);
        let content = read(&storage);
        match blocks {
            1 => assert!(content == [vec![1; 4096], vec![0; 4096]].concat()),
            _ => assert!(content == [vec![2; 8192], vec![1; 4096]].concat()),
        }
        writes(&storage, what);
    }
    // A hole of numbers that nobody can hold in memory.
    let text = refusal(
        &Made {
            entries: vec![0; 100],
            ..made(512, &[0; 100])
        }
        .bytes(),
        Access::Write,
    );
    assert!(text.contains("block 1:"), "{text}");
}

#[test]
fn a_block_that_the_file_cuts_off_reads_as_zeroes_there_and_is_mended() {
    let made = made(4096, &[1, 0]);
    let mut bytes = made.bytes();
    bytes.truncate(bytes.len() - 1000);
    let storage = Arc::new(MemoryStorage::from_bytes(&bytes));
    let mut expected = made.content();
    expected[3096..4096].fill(0);
    assert_same(&read(&storage), &expected, 0, "cut");
    assert!(refusal(&bytes, Access::Write).contains("cut off"));
    let report = checked(&storage, Repair::Leaks);
    assert_eq!(
        (report.corruptions, report.corruptions_fixed),
        (1, 0),
        "{report:?}"
    );
    let report = checked(&storage, Repair::All);
    assert_eq!(
        (report.corruptions, report.corruptions_fixed),
        (0, 1),
        "{report:?}"
    );
    assert_same(&read(&storage), &expected, 0, "mended");
    writes(&storage, "mended");
}

#[test]
fn a_count_that_is_wrong_is_never_followed_and_set_right() {
    let entries = [2, FREE, 0, FREE];
    for (count, corruptions, leaks) in
        [(0, 1, 0), (2, 1, 0), (3, 0, 0), (4, 0, 1), (u32::MAX, 0, 1)]
    {
        let made = Made {
            count,
            ..made(4096, &entries)
        };
        let what = format!("{count} counted");
        let found = checked(&made.memory(), Repair::Nothing);
        assert_eq!(found.corruptions, corruptions, "{what}: {found:?}");
        assert_eq!(found.leaks > 1, leaks > 0, "{what}: {found:?}");
        let storage = made.memory();
        let report = checked(&storage, Repair::Leaks);
        assert_eq!(
            (report.corruptions, report.leaks),
            (0, 0),
            "{what}: {report:?}"
        );
        assert_same(&read(&storage), &made.content(), 0, &what);
        // Two blocks are in use: the last one went to the gap.
        assert_eq!(storage.size(), u64::from(made.data) + 2 * 4096, "{what}");
        is_clean(&storage, &what);
        writes(&storage, &what);
        // And without a repair no block is written over.
        let storage = made.memory();
        let chain = chain(&storage, Access::Write).expect("opens");
        let mut expected = made.content();
        for at in [4096, 3 * 4096] {
            chain.write_at(&[0x99; 4096], at).expect("writes");
            expected[len(at)..len(at) + 4096].fill(0x99);
        }
        chain.close().expect("closes");
        drop(chain);
        assert_same(&read(&storage), &expected, 0, &what);
        is_clean(&storage, &what);
    }
}

#[test]
fn what_follows_the_last_block_is_a_leak_that_is_cut_off() {
    let made = made(4096, &[0, FREE]);
    let mut bytes = made.bytes();
    bytes.resize(bytes.len() + 9000, 0xcc);
    let storage = Arc::new(MemoryStorage::from_bytes(&bytes));
    let report = checked(&storage, Repair::Nothing);
    assert_eq!((report.corruptions, report.leaks), (0, 3), "{report:?}");
    // What others left there does not show.
    let copy = Arc::new(MemoryStorage::from_bytes(&bytes));
    let chain = chain(&copy, Access::Write).expect("opens");
    chain.write_at(&[5; 10], 5000).expect("writes");
    chain.close().expect("closes");
    let mut expected = made.content();
    expected[5000..5010].fill(5);
    assert_same(&read(&copy), &expected, 0, "written");
    checked(&storage, Repair::Leaks);
    assert_eq!(storage.to_bytes(), made.bytes());
}

#[test]
fn a_disk_without_identity_gets_one_at_its_first_change() {
    let mut bytes = made(4096, &[0]).bytes();
    bytes[392..408].fill(0);
    let storage = Arc::new(MemoryStorage::from_bytes(&bytes));
    let image = open(&storage, Access::Read).expect("opens");
    assert_eq!(image.identity(), None);
    writes(&storage, "nobody");
    let image = open(&storage, Access::Read).expect("opens");
    assert!(image.identity().is_some());
}

#[test]
fn comments_are_shown_without_what_terminals_obey() {
    let directory = scratch();
    fs::write(directory.path().join("x.vdi"), made(4096, &[0]).bytes()).expect("has room");
    for output in ["human", "json"] {
        let mut command = vdtool();
        command.current_dir(&directory);
        let done = command
            .args(["info", "--output", output, "x.vdi"])
            .assert()
            .success();
        let text = String::from_utf8_lossy(&done.get_output().stdout).into_owned();
        assert!(text.contains("hand") && !text.contains('\x1b'), "{text}");
    }
}

/// Samples whose every byte is tried.
fn samples() -> Vec<Sample> {
    let plain = made(4096, &[2, FREE, 0, ZERO, 1]);
    let of = |name, made: &Made| Sample::of(name, Disk::of_bytes("vdi", &made.bytes()));
    vec![
        of("vdi", &plain),
        of(
            "vdi with extra",
            &Made {
                extra: 512,
                ..made(512, &[1, 0, FREE])
            },
        ),
        of("vdi of the first version", &plain.first_version()),
    ]
}

#[test]
fn a_changed_byte_in_the_header_or_the_map_of_a_vdi_never_panics() {
    for sample in samples() {
        sample.flip(64..84, Expect::Any);
        sample.flip(336..540, Expect::Any);
    }
}

#[test]
fn header_fields_and_entries_of_a_vdi_at_their_edges_never_panic() {
    for sample in samples() {
        for at in [
            68, 72, 76, 340, 344, 352, 360, 364, 368, 376, 380, 384, 388, 420, 512, 516,
        ] {
            for value in EDGES {
                let mut bytes = sample.bytes.clone();
                let word = value.to_le_bytes();
                let wide = [352, 368].contains(&at) && value >= 1 << 32;
                let word = if wide { &word[..] } else { &word[..4] };
                bytes[at..at + word.len()].copy_from_slice(word);
                sample.exercise(&bytes, Expect::Any, &|| format!("{at} is {value:#x}"));
            }
        }
    }
}

#[test]
fn a_vdi_cut_or_lengthened_anywhere_never_panics() {
    let sample = &samples()[0];
    for length in (0..540)
        .chain(4620..4640)
        .chain(8720..8730)
        .chain(12_800..12_820)
    {
        let cut = &sample.bytes[..length];
        sample.exercise(cut, Expect::Any, &|| format!("cut to {length:#x}"));
    }
    sample.append();
}

fn qemu_io(directory: &Path, file: &str, commands: &[String]) {
    let arguments = [
        &["-f".to_owned(), "vdi".to_owned()],
        commands,
        &[file.to_owned()],
    ]
    .concat();
    let output = peer("qemu-io", directory, arguments);
    assert!(!output.contains("failed"), "{output}");
}

fn we_io(directory: &Path, file: &str, commands: &[String]) {
    let mut arguments = vec!["io", "-f", "vdi"];
    arguments.extend(commands.iter().map(String::as_str));
    arguments.push(file);
    run(directory, &arguments);
}

/// The disk in `file` as both read it, with nothing found to be wrong by either.
fn both_read(directory: &Path, file: &str, expected: &[u8]) {
    peer("qemu-img", directory, ["check", "-f", "vdi", file]);
    run(directory, &["check", "-f", "vdi", file]);
    let theirs = ["convert", "-f", "vdi", "-O", "raw", file, "theirs.raw"];
    peer("qemu-img", directory, theirs);
    run(
        directory,
        &["convert", "-f", "vdi", "-O", "raw", file, "ours.raw"],
    );
    for raw in ["theirs.raw", "ours.raw"] {
        let found = fs::read(directory.join(raw)).expect("reads");
        assert_same(&found, expected, 0, &format!("{file}, {raw}"));
    }
}

#[test]
fn qemu_and_we_write_one_vdi_in_turn_whatever_its_size_becomes() {
    if !requires("qemu-img") || !requires("qemu-io") {
        return;
    }
    let mut rng = Seeded::new("vdi in turn");
    let directory = scratch();
    let directory = directory.path();
    run(directory, &["create", "-q", "-f", "vdi", "ours.vdi", "9M"]);
    run(
        directory,
        &[
            "create",
            "-q",
            "-f",
            "vdi",
            "-o",
            "static=on",
            "fixed.vdi",
            "9M",
        ],
    );
    peer(
        "qemu-img",
        directory,
        ["create", "-q", "-f", "vdi", "theirs.vdi", "9M"],
    );
    for file in ["ours.vdi", "fixed.vdi", "theirs.vdi"] {
        let mut size = 9 * MIB;
        let mut expected = vec![0; len(size)];
        // 200 entries need more room than QEMU leaves for them.
        for next in [12 * MIB, 5 * MIB + 512, 200 * MIB, 7 * MIB] {
            let theirs = patterns(&mut rng, size);
            qemu_io(directory, file, &as_commands(&theirs));
            apply(&theirs, &mut expected);
            let ours = patterns(&mut rng, size);
            we_io(directory, file, &as_commands(&ours));
            apply(&ours, &mut expected);
            let at = rng.u64(0..size / MIB - 1) * MIB;
            let commands = [format!("write -z -u {at} 1M"), format!("discard {at} 1M")];
            we_io(
                directory,
                file,
                &commands.map(|c| ["-c".to_owned(), c]).concat(),
            );
            expected[len(at)..len(at + MIB)].fill(0);
            both_read(directory, file, &expected);
            size = next;
            expected.resize(len(size), 0);
            run(
                directory,
                &["resize", "-q", "--shrink", file, &size.to_string()],
            );
            both_read(directory, file, &expected);
        }
    }
}

#[test]
fn both_convert_what_the_other_made() {
    if !requires("qemu-img") {
        return;
    }
    let mut rng = Seeded::new("vdi converted");
    let directory = scratch();
    let directory = directory.path();
    let size = 11 * MIB + 512;
    let mut expected = vec![0; len(size)];
    apply(&patterns(&mut rng, size), &mut expected);
    fs::write(directory.join("source.raw"), &expected).expect("has room");
    for (options, file) in [("static=off", "dynamic.vdi"), ("static=on", "fixed.vdi")] {
        let arguments = ["convert", "-O", "vdi", "-o", options, "source.raw", file];
        run(directory, &arguments);
        both_read(directory, file, &expected);
        peer("qemu-img", directory, arguments);
        both_read(directory, file, &expected);
        run(directory, &["convert", "-O", "qcow2", file, "a.qcow2"]);
        run(directory, &["compare", "-q", "a.qcow2", "source.raw"]);
    }
}

#[test]
fn a_disk_is_measured_as_large_as_it_becomes() {
    let directory = scratch();
    let directory = directory.path();
    fs::write(directory.join("a.raw"), vec![1; 5 << 20]).expect("has room");
    for options in ["static=off", "static=on", "block_size=64k"] {
        let arguments = [
            "measure", "--output", "json", "-O", "vdi", "-o", options, "a.raw",
        ];
        let told: serde_json::Value =
            serde_json::from_str(&run(directory, &arguments)).expect("JSON");
        run(
            directory,
            &["convert", "-O", "vdi", "-o", options, "a.raw", "a.vdi"],
        );
        let found = fs::metadata(directory.join("a.vdi"))
            .expect("is there")
            .len();
        assert_eq!(told["required"], found, "{options}");
    }
}

#[test]
fn blocks_behind_the_end_of_the_disk_never_show_and_go_when_it_shrinks() {
    let behind = Made {
        disk: 2 * 4096,
        ..made(4096, &[2, FREE, 0, 1])
    };
    let storage = behind.memory();
    let disk = chain(&storage, Access::Write).expect("opens");
    disk.resize(4 * 4096).expect("grows");
    let mut expected = behind.content();
    expected.resize(4 * 4096, 0);
    assert_same(&read_all(&disk), &expected, 0, "grown");
    disk.close().expect("closes");
    is_clean(&storage, "grown");
    let storage = behind.memory();
    let disk = chain(&storage, Access::Write).expect("opens");
    disk.resize(4096).expect("shrinks");
    disk.close().expect("closes");
    assert_eq!(storage.size(), u64::from(behind.data) + 4096);
    is_clean(&storage, "shrunk");
    assert_same(&read(&storage), &expected[..4096], 0, "shrunk");
}

#[test]
fn blocks_that_a_cut_took_are_errors_and_no_leaks_and_zeroes_in_their_place_are_another_state() {
    let made = made(4096, &[0, 3, 1, 2, FREE]);
    let mut bytes = made.bytes();
    bytes.truncate(made.data as usize + 4096);
    let cut = || Arc::new(MemoryStorage::from_bytes(&bytes));
    let state = |storage: &Arc<MemoryStorage>| open(storage, Access::Read).expect("opens").state();
    let storage = cut();
    let before = state(&storage);
    for repair in [Repair::Nothing, Repair::Leaks] {
        let report = checked(&storage, repair);
        assert_eq!((report.corruptions, report.leaks), (3, 0), "{report:?}");
        assert_eq!(report.leaks_fixed, 0, "{report:?}");
        assert_eq!(state(&storage), before, "reads as before");
    }
    let report = checked(&storage, Repair::All);
    let found = (report.corruptions, report.corruptions_fixed);
    assert_eq!(found, (0, 3), "{report:?}");
    assert_ne!(state(&storage), before, "reads as something else");
    let mut expected = made.content();
    expected[4096..].fill(0);
    assert_same(&read(&storage), &expected, 0, "mended");
    is_clean(&storage, "mended");
    assert_eq!(storage.size(), u64::from(made.data) + 4096);
}

#[test]
fn more_wrong_entries_than_are_listed_are_counted_all_the_same() {
    let entries: Vec<u32> = (0..3000).collect();
    let made = Made {
        blocks: 1,
        ..made(512, &entries)
    };
    let storage = made.memory();
    let report = checked(&storage, Repair::Nothing);
    assert_eq!((report.corruptions, report.leaks), (2999, 0));
    assert_eq!(report.findings.len(), 1000);
    assert_eq!(checked(&storage, Repair::All).corruptions_fixed, 2999);
    is_clean(&storage, "mended");
}

//! What new images look like, and what is refused.

use uuid::Uuid;
use vdtool::ErrorKind;
use vdtool::formats::vhd::DRIVER;
use vdtool::image::create::CreateOptions;
use vdtool::image::open::WriteOrder;
use vdtool::storage::Storage;
use vdtool::storage::memory::MemoryStorage;
use vdtool::storage::open::Access;

use super::{chain, create, open, options, values};

fn made(size: u64, texts: &[&str]) -> vdtool::Result<u64> {
    let storage = MemoryStorage::new();
    let options = CreateOptions {
        size,
        backing: None,
        values: values(texts),
        ..CreateOptions::default()
    };
    let creator = DRIVER.creator.as_ref().expect("makes images");
    (creator.create)(&storage, &options)?;
    let storage = std::sync::Arc::new(storage);
    let image = open(&storage, &super::options(Access::Read))?;
    assert_eq!((creator.measure)(&options, 0)?, storage.size(), "{texts:?}");
    Ok(image.virtual_size())
}

fn detail(storage: &std::sync::Arc<MemoryStorage>, key: &str) -> String {
    let image = open(storage, &options(Access::Read)).expect("opens");
    let details = image.details().into_iter();
    let found = details.filter(|d| d.key == key).map(|d| d.value);
    found.map(|v| v.to_string()).collect()
}

#[test]
fn sizes_are_exact_in_whole_sectors_unless_asked_otherwise() {
    for (size, texts, expected) in [
        (0, &[][..], 0),
        (1, &[], 512),
        (10 << 20, &["subformat=fixed"], 10 << 20),
        (127 << 30, &[], 127 << 30),
        (2040 << 30, &[], 2040 << 30),
        ((10 << 20) + 5, &["profile=azure"], 11 << 20),
        (10 << 20, &["size_rule=chs"], 10_514_432),
        (200 << 30, &["size_rule=chs"], 200 << 30),
        (10 << 20, &["block_size=4k"], 10 << 20),
    ] {
        assert_eq!(made(size, texts).expect("creates"), expected, "{texts:?}");
    }
}

#[test]
fn what_the_format_cannot_hold_is_refused_with_nothing_written() {
    for (size, texts, kind) in [
        ((2040 << 30) + 1, &[][..], ErrorKind::OutOfRange),
        (u64::MAX, &["profile=azure"], ErrorKind::OutOfRange),
        (1 << 40, &["block_size=4k"], ErrorKind::OutOfRange),
        (1 << 20, &["block_size=3M"], ErrorKind::Invalid),
        (1 << 20, &["block_size=512M"], ErrorKind::Invalid),
        (
            1 << 20,
            &["subformat=fixed,block_size=2M"],
            ErrorKind::Invalid,
        ),
        (
            1 << 20,
            &["profile=azure,subformat=dynamic"],
            ErrorKind::Invalid,
        ),
        (
            1 << 20,
            &["profile=azure,size_rule=chs"],
            ErrorKind::Invalid,
        ),
        (1 << 20, &["preallocation=full"], ErrorKind::Unsupported),
    ] {
        let error = made(size, texts).expect_err("is refused");
        assert_eq!(error.kind(), kind, "{texts:?}: {error}");
    }
}

#[test]
fn creators_say_which_size_counts() {
    let exact = create(10 << 20, &[], None);
    assert_eq!(detail(&exact, "creator-application"), "\"win\"");
    assert_eq!(detail(&exact, "chs-size"), "10479616");
    let chs = create(10 << 20, &["size_rule=chs"], None);
    assert_eq!(detail(&chs, "creator-application"), "\"qemu\"");
    assert_eq!(detail(&chs, "chs-size"), detail(&chs, "current-size"));
}

#[test]
fn a_child_names_its_parent_in_every_way_readers_look_for() {
    let uuid = Uuid::new_v4();
    let child = create(4 << 20, &[], Some(uuid));
    let image = open(&child, &options(Access::Read)).expect("opens");
    let backing = image.backing().expect("has a parent");
    assert_eq!(backing.identity, Some(uuid));
    assert_eq!(backing.format.as_deref(), Some("vhd"));
    let names: Vec<_> = backing
        .names
        .iter()
        .map(|n| (n.path.to_str().expect("is UTF-8"), n.origin.as_str()))
        .collect();
    assert_eq!(names, [("parent.vhd", "W2ru"), ("/vm/parent.vhd", "W2ku")]);
    let locators = detail(&child, "parent-locators");
    for part in [
        r#".\\parent.vhd"#,
        "file://./parent.vhd",
        "W2ru",
        "W2ku",
        "MacX",
    ] {
        assert!(locators.contains(part), "{locators}");
    }
    assert_eq!(detail(&child, "parent-name"), "\"parent.vhd\"");
}

#[test]
fn a_raw_parent_has_no_identity() {
    let child = create(4 << 20, &[], Some(Uuid::nil()));
    let image = open(&child, &options(Access::Read)).expect("opens");
    let backing = image.backing().expect("has a parent");
    assert_eq!(backing.identity, None);
    assert_eq!(backing.format.as_deref(), Some("raw"));
}

#[test]
fn measured_lengths_are_what_writing_gives() {
    let texts = ["block_size=64k"];
    let storage = create(8 << 20, &texts, None);
    let chain = chain(&[&storage], WriteOrder::Unordered);
    for block in [3, 7, 100] {
        chain
            .write_at(&[1; 100], block * (64 << 10))
            .expect("writes");
    }
    chain.close().expect("closes");
    let creator = DRIVER.creator.as_ref().expect("makes images");
    let options = CreateOptions {
        size: 8 << 20,
        backing: None,
        values: values(&texts),
        ..CreateOptions::default()
    };
    let measured = (creator.measure)(&options, 3).expect("measures");
    assert_eq!(measured, storage.size());
    assert_eq!((creator.cluster_size)(&options).expect("plans"), 64 << 10);
}

#[test]
fn space_assigned_ahead_is_used_in_guest_order() {
    let blocks = 64u64 << 10;
    let layouts: Vec<Vec<u8>> = [[0u64, 1, 2, 5], [5, 2, 1, 0]]
        .iter()
        .map(|order| {
            let storage = create(8 << 20, &["block_size=64k"], None);
            let chain = chain(&[&storage], WriteOrder::Unordered);
            let layout = chain.top().as_layout().expect("lays out");
            layout
                .assign(&[
                    0..3 * blocks,
                    5 * blocks + 7..5 * blocks + 9,
                    9 * blocks..10 * blocks,
                ])
                .expect("assigns");
            for block in order {
                chain
                    .write_at(&[u8::try_from(*block).expect("small"); 700], block * blocks)
                    .expect("writes");
            }
            chain.close().expect("closes");
            let mut bytes = storage.to_bytes();
            // Times and identities differ.
            let len = bytes.len();
            bytes[..512].fill(0);
            bytes[len - 512..].fill(0);
            bytes
        })
        .collect();
    assert!(layouts[0] == layouts[1]);
    // Block 9 was assigned and never written: its space at the end was given back.
    assert_eq!(layouts[0].len(), layouts[1].len());
}

use std::fs::File;
use std::os::unix::fs::symlink;
use std::time::SystemTime;

use tempfile::TempDir;
use uuid::Uuid;

use super::*;
use crate::chain::MAX_LAYERS;
use crate::formats::vhd;
use crate::image::create::{CreateBacking, CreateOptions};
use crate::storage::file::FileStorage;

const SIZE: u64 = 1 << 20;

/// What a child says of its parent.
struct Parent<'a> {
    relative: &'a str,
    absolute: &'a Path,
    identity: Option<Uuid>,
}

fn scratch() -> TempDir {
    tempfile::tempdir().expect("a scratch directory")
}

/// Makes a VHD and returns its identity.
fn make(path: &Path, parent: Option<&Parent<'_>>) -> Uuid {
    let mut new = File::options();
    let file = new.read(true).write(true).create_new(true).open(path);
    let storage = FileStorage::new(file.expect("is new"), path).expect("wraps");
    let backing = parent.map(|p| CreateBacking {
        name: p.relative.into(),
        absolute: p.absolute.to_owned(),
        relative: p.relative.into(),
        format: if p.identity.is_some() { "vhd" } else { "raw" },
        identity: p.identity,
        state: None,
        modified: SystemTime::now(),
        virtual_size: SIZE,
        cluster_size: None,
        sector_size: None,
        physical_sector_size: None,
    });
    let options = CreateOptions {
        size: SIZE,
        backing,
        ..CreateOptions::default()
    };
    let creator = vhd::DRIVER.creator.as_ref().expect("is written");
    (creator.create)(&storage, &options).expect("creates");
    drop(storage);
    let chain = open_top(path, &ChainOptions::read()).expect("opens");
    chain.top().identity().expect("has one")
}

/// A child called `child.vhd` whose parent is `relative`, of identity `identity`.
fn child(dir: &Path, relative: &str, identity: Uuid) -> PathBuf {
    let path = dir.join("child.vhd");
    let parent = Parent {
        relative,
        absolute: &dir.join(relative),
        identity: Some(identity),
    };
    make(&path, Some(&parent));
    path
}

fn fails(path: &Path, options: &ChainOptions) -> Error {
    open(path, options)
        .map(|_| ())
        .expect_err("must be refused")
}

#[test]
fn a_chain_has_its_layers_and_opening_the_top_has_one() {
    let dir = scratch();
    let base = dir.path().join("base.vhd");
    let identity = make(&base, None);
    let path = child(dir.path(), "base.vhd", identity);
    let chain = open(&path, &ChainOptions::read()).expect("opens both");
    assert_eq!(chain.layers().len(), 2);
    assert_eq!(chain.base(), Base::Zeroes);
    assert_eq!(chain.layers()[1].storage().path(), Some(&*base));
    let top = open_top(&path, &ChainOptions::read()).expect("opens one");
    assert_eq!((top.layers().len(), top.base()), (1, Base::NotOpened));
}

#[test]
fn a_raw_parent_is_read_and_never_probed() {
    let dir = scratch();
    // A raw parent that holds what looks like a VHD is still raw.
    make(&dir.path().join("parent.img"), None);
    let bytes = std::fs::read(dir.path().join("parent.img")).expect("reads");
    let path = dir.path().join("child.vhd");
    let parent = Parent {
        relative: "parent.img",
        absolute: &dir.path().join("parent.img"),
        identity: None,
    };
    make(&path, Some(&parent));
    let chain = open(&path, &ChainOptions::read()).expect("opens both");
    assert_eq!(chain.layers()[1].driver().name, "raw");
    let mut buf = [0; 512];
    chain.read_at(&mut buf, 0).expect("reads");
    assert_eq!(buf, bytes[..512]);
}

#[test]
fn a_missing_parent_is_an_error_that_names_where_it_was_looked_for() {
    let dir = scratch();
    let path = child(dir.path(), "gone/base.vhd", Uuid::new_v4());
    let error = fails(&path, &ChainOptions::read());
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(error.path(), Some(&*path));
    assert!(
        error.message().contains("'gone/base.vhd' (W2ru)"),
        "{error}"
    );
    open_top(&path, &ChainOptions::read()).expect("does not need it");
}

#[test]
fn another_image_in_the_place_of_the_parent_is_told_by_both_uuids() {
    let dir = scratch();
    let is = make(&dir.path().join("base.vhd"), None);
    let wanted = Uuid::new_v4();
    let path = child(dir.path(), "base.vhd", wanted);
    let error = fails(&path, &ChainOptions::read());
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    for uuid in [is, wanted] {
        assert!(error.message().contains(&uuid.to_string()), "{error}");
    }
}

#[test]
fn the_first_name_with_the_right_identity_is_taken() {
    let dir = scratch();
    make(&dir.path().join("wrong.vhd"), None);
    let identity = make(&dir.path().join("right.vhd"), None);
    let path = dir.path().join("child.vhd");
    let parent = Parent {
        relative: "wrong.vhd",
        absolute: &dir.path().join("right.vhd"),
        identity: Some(identity),
    };
    make(&path, Some(&parent));
    let chain = open(&path, &ChainOptions::read()).expect("finds the second");
    assert_eq!(chain.layers()[1].identity(), Some(identity));
}

#[test]
fn a_parent_outside_the_directory_is_denied_until_the_user_names_it() {
    let dir = scratch();
    let inner = dir.path().join("inner");
    std::fs::create_dir(&inner).expect("a directory");
    let base = dir.path().join("base.vhd");
    let identity = make(&base, None);
    for (name, relative, absolute) in [
        ("up.vhd", "../base.vhd", inner.join("../base.vhd")),
        ("absolute.vhd", "gone.vhd", base.clone()),
        ("link.vhd", "link", inner.join("link")),
    ] {
        let path = inner.join(name);
        if !inner.join("link").exists() {
            symlink("../base.vhd", inner.join("link")).expect("links");
        }
        let parent = Parent {
            relative,
            absolute: &absolute,
            identity: Some(identity),
        };
        make(&path, Some(&parent));
        let error = fails(&path, &ChainOptions::read());
        assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
        assert_eq!(error.path(), Some(&*path));
        assert!(error.message().contains("--allow-ref"), "{error}");
        for references in [
            References::ANY,
            References::Confined {
                allowed: vec![inner.clone(), base.clone()],
            },
        ] {
            let options = ChainOptions {
                references,
                ..ChainOptions::read()
            };
            let chain = open(&path, &options).expect("the user allows it");
            assert_eq!(chain.layers().len(), 2);
        }
        let options = ChainOptions {
            references: References::Confined {
                allowed: vec![path.clone()],
            },
            ..ChainOptions::read()
        };
        assert_eq!(fails(&path, &options).kind(), ErrorKind::Denied);
    }
}

#[test]
fn an_absolute_name_into_the_own_directory_is_fine() {
    let dir = scratch();
    let base = dir.path().join("base.vhd");
    let identity = make(&base, None);
    let path = dir.path().join("child.vhd");
    let parent = Parent {
        relative: "gone.vhd",
        absolute: &base,
        identity: Some(identity),
    };
    make(&path, Some(&parent));
    open(&path, &ChainOptions::read()).expect("is in the directory");
}

#[test]
fn a_symbolic_link_to_an_image_finds_the_parent_beside_the_image() {
    let (dir, elsewhere) = (scratch(), scratch());
    let identity = make(&dir.path().join("base.vhd"), None);
    let path = child(dir.path(), "base.vhd", identity);
    let link = elsewhere.path().join("link.vhd");
    symlink(&path, &link).expect("links");
    open(&link, &ChainOptions::read()).expect("looks beside the real file");
}

#[test]
fn a_pipe_as_parent_is_refused_at_once() {
    let dir = scratch();
    let pipe = dir.path().join("pipe");
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, 0o600.into()).expect("makes a pipe");
    let path = child(dir.path(), "pipe", Uuid::new_v4());
    for references in [References::default(), References::ANY] {
        let options = ChainOptions {
            references,
            ..ChainOptions::read()
        };
        let error = fails(&path, &options);
        assert!(error.message().contains("is a pipe"), "{error}");
    }
}

#[test]
fn a_chain_that_comes_back_to_itself_is_a_cycle() {
    let dir = scratch();
    let (a, b) = (dir.path().join("a.vhd"), dir.path().join("b.vhd"));
    let parent = |name, path| Parent {
        relative: name,
        absolute: path,
        identity: Some(Uuid::from_u128(1)),
    };
    make(&a, Some(&parent("b.vhd", &b)));
    make(&b, Some(&parent("a.vhd", &a)));
    let own = dir.path().join("own.vhd");
    make(&own, Some(&parent("own.vhd", &own)));
    let error = fails(&own, &ChainOptions::read());
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.message().contains("cycle"), "{error}");
    // The identity is wrong too, which is found first; either way it ends.
    assert_eq!(fails(&a, &ChainOptions::read()).kind(), ErrorKind::Corrupt);
}

#[test]
fn five_hundred_links_work_and_one_more_is_refused() {
    let dir = scratch();
    let name = |i: usize| format!("{i}.vhd");
    let mut identity = make(&dir.path().join(name(0)), None);
    for i in 1..=MAX_LAYERS {
        let parent = Parent {
            relative: &name(i - 1),
            absolute: &dir.path().join(name(i - 1)),
            identity: Some(identity),
        };
        identity = make(&dir.path().join(name(i)), Some(&parent));
    }
    let longest = dir.path().join(name(MAX_LAYERS - 1));
    let chain = open(&longest, &ChainOptions::read()).expect("500 links");
    assert_eq!(chain.layers().len(), MAX_LAYERS);
    let mut buf = [1; 512];
    chain.read_at(&mut buf, 0).expect("reads through all");
    assert_eq!(buf, [0; 512]);
    let error = fails(&dir.path().join(name(MAX_LAYERS)), &ChainOptions::read());
    assert_eq!(error.kind(), ErrorKind::OutOfRange);
}

#[test]
fn the_parent_is_locked_against_writers() {
    let dir = scratch();
    let base = dir.path().join("base.vhd");
    let identity = make(&base, None);
    let path = child(dir.path(), "base.vhd", identity);
    let chain = open(&path, &ChainOptions::read()).expect("opens both");
    assert_eq!(
        fails(&base, &ChainOptions::write()).kind(),
        ErrorKind::Locked
    );
    open(&base, &ChainOptions::read()).expect("readers share");
    drop(chain);
    let writer = open(&base, &ChainOptions::write()).expect("nobody is left");
    let error = fails(&path, &ChainOptions::read());
    assert_eq!(error.kind(), ErrorKind::Locked);
    assert_eq!(error.path(), Some(&*base), "the layer at fault is named");
    drop(writer);
}

#[test]
fn a_parent_of_another_owner_is_denied_where_the_format_was_guessed() {
    let dir = scratch();
    let base = dir.path().join("base.vhd");
    let identity = make(&base, None);
    let path = child(dir.path(), "base.vhd", identity);
    if std::os::unix::fs::chown(&base, Some(12345), None).is_err() {
        crate::util::skipped::skipped("files cannot be given away here");
        return;
    }
    let error = fails(&path, &ChainOptions::read());
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(error.message().contains("another user"), "{error}");
    for options in [
        ChainOptions {
            format: Some(&vhd::DRIVER),
            ..ChainOptions::read()
        },
        ChainOptions {
            references: References::Confined {
                allowed: vec![base.clone()],
            },
            ..ChainOptions::read()
        },
    ] {
        open(&path, &options).expect("allowed");
    }
}

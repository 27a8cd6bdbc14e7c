use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{CWD, Mode, RenameFlags, openat, renameat_with};

use super::home::beneath_by_hand;
use super::*;

/// A directory with `image`, `file`, `sub/file`, and links out of and within it.
fn tree() -> tempfile::TempDir {
    let outer = tempfile::tempdir().expect("a scratch directory");
    let dir = outer.path().join("dir");
    std::fs::create_dir_all(dir.join("sub")).expect("directories");
    for name in ["image", "file", "sub/file", "../secret"] {
        std::fs::write(dir.join(name), name).expect("writes");
    }
    for (to, from) in [
        ("../secret", "out"),
        ("/etc/passwd", "absolute"),
        ("..", "up"),
        ("sub/file", "within"),
        ("loop", "loop"),
    ] {
        symlink(to, dir.join(from)).expect("links");
    }
    outer
}

fn namer(outer: &tempfile::TempDir, trust: Trust) -> Namer {
    let path = outer.path().join("dir/image");
    Namer::new(&File::open(&path).expect("opens"), &path, trust).expect("looks")
}

fn kind(namer: &Namer, name: &str) -> Option<ErrorKind> {
    let opened = namer.open(
        OsStr::new(name),
        "file",
        Access::Read,
        &References::default(),
        &[],
    );
    opened.err().map(|e| e.kind())
}

#[test]
fn only_files_in_the_directory_and_below_are_opened() {
    let outer = tree();
    let namer = namer(&outer, Trust::Stated);
    for name in ["file", "./file", "sub/file", "sub/../file", "within"] {
        assert_eq!(kind(&namer, name), None, "{name}");
    }
    for name in [
        "../secret",
        "out",
        "absolute",
        "up/secret",
        "loop",
        "/etc/passwd",
        "sub/../../secret",
    ] {
        assert_eq!(kind(&namer, name), Some(ErrorKind::Denied), "{name}");
    }
    for name in ["gone", "", "gone/../../x"] {
        assert_eq!(kind(&namer, name), Some(ErrorKind::NotFound), "{name}");
    }
    for name in [".", "sub"] {
        assert_eq!(kind(&namer, name), Some(ErrorKind::Invalid), "{name}");
    }
    assert!(kind(&namer, "a\0b").is_some(), "no file has such a name");
}

#[test]
fn an_image_that_was_guessed_to_be_one_below_another_names_nothing() {
    let outer = tree();
    assert_eq!(
        kind(&namer(&outer, Trust::None), "file"),
        Some(ErrorKind::Denied)
    );
    assert_eq!(kind(&namer(&outer, Trust::Probed), "file"), None);
}

#[test]
fn without_openat2_links_are_not_followed_and_nothing_escapes() {
    let outer = tree();
    let directory = OFlags::PATH | OFlags::DIRECTORY;
    let directory = openat(CWD, outer.path().join("dir"), directory, Mode::empty()).expect("opens");
    for flags in [OFlags::RDONLY, OFlags::PATH] {
        let open = |name: &str| beneath_by_hand(&directory, Path::new(name), flags).err();
        for name in ["file", "sub/file", "./sub/./file"] {
            assert_eq!(open(name), None, "{name}");
        }
        for name in [
            "out",
            "within",
            "up/secret",
            "../secret",
            "/etc/passwd",
            "sub/../file",
            "",
        ] {
            assert!(open(name).is_some(), "{name}");
        }
    }
}

#[test]
fn a_companion_is_opened_by_the_same_policy() {
    let outer = tree();
    let companions = Confined {
        namer: namer(&outer, Trust::Stated),
        references: References::default(),
        remotes: Vec::new(),
        storage: StorageOptions::default(),
        stand_ins: Vec::new(),
        ours: Vec::new(),
    };
    let storage = companions
        .open("sub/file".as_ref(), "extent")
        .expect("is below");
    assert_eq!(storage.size(), 8);
    let error = companions
        .open("sub/../image".as_ref(), "extent")
        .expect_err("is the image");
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    let error = companions
        .open("../secret".as_ref(), "extent")
        .expect_err("is above");
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(error.message().contains("as its extent"), "{error}");
}

/// A directory `dir` with `image` and `file`, a directory `other` that has them too, and a link to
/// it; whoever opens `file` may see that of `dir` alone.
fn swapped() -> tempfile::TempDir {
    let outer = tempfile::tempdir().expect("a scratch directory");
    for name in ["dir", "other"] {
        let dir = outer.path().join(name);
        std::fs::create_dir(&dir).expect("a directory");
        std::fs::write(dir.join("image"), name).expect("writes");
        std::fs::write(dir.join("file"), name).expect("writes");
    }
    symlink("other", outer.path().join("link")).expect("links");
    outer
}

/// Tells the other thread to end, also where this one panics.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_directory_that_changes_places_while_names_are_followed_gives_no_other_directorys_files() {
    const ROUNDS: usize = 2000;
    let outer = swapped();
    let path = |name: &str| outer.path().join(name);
    let done = AtomicBool::new(false);
    let (mut opened, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let (dir, link) = (path("dir"), path("link"));
                renameat_with(CWD, &dir, CWD, &link, RenameFlags::EXCHANGE).expect("swaps");
                std::thread::yield_now();
            }
        });
        let _done = Done(&done);
        for round in 0..ROUNDS {
            let image = path("dir/image");
            // At the moment it is the other's own.
            let Ok(file) = File::open(&image) else {
                continue;
            };
            let namer = Namer::new(&file, &image, Trust::Stated).expect("looks");
            let references = match round % 3 {
                0 => References::ANY,
                1 => References::default(),
                _ => References::Confined {
                    allowed: vec![path("dir/file"), path("other/file")],
                },
            };
            match namer.open(OsStr::new("file"), "file", Access::Read, &references, &[]) {
                Ok(Found::File { file: found, .. }) => {
                    let read = |file| std::io::read_to_string(file).expect("reads");
                    assert_eq!(read(found), read(file));
                    opened += 1;
                }
                Ok(Found::Remote { .. }) => panic!("a server has it"),
                Err(e) => {
                    assert_eq!(e.kind(), ErrorKind::Io, "{e}");
                    refused += 1;
                }
            }
        }
    });
    assert!(opened > 0, "{opened} opened, {refused} refused");
}

#[test]
fn names_are_followed_from_where_the_image_is_though_its_directory_was_moved_meanwhile() {
    let outer = swapped();
    let path = |name: &str| outer.path().join(name);
    let file = File::open(path("dir/image")).expect("opens");
    let namer = Namer::new(&file, &path("dir/image"), Trust::Stated).expect("looks");
    let open = |name: &str| {
        let references = References::default();
        let found = namer.open(OsStr::new(name), "file", Access::Read, &references, &[]);
        match found.expect("is there") {
            Found::File { file, .. } => std::io::read_to_string(file).expect("reads"),
            Found::Remote { .. } => panic!("a server has it"),
        }
    };
    assert_eq!(open("image"), "dir");
    std::fs::rename(path("dir"), path("moved")).expect("renames");
    std::fs::rename(path("link"), path("dir")).expect("renames");
    assert_eq!(open("file"), "dir");
}

#[test]
fn what_is_not_there_is_not_called_forbidden_and_no_option_is_named_that_would_not_help() {
    let outer = tree();
    let namer = namer(&outer, Trust::Stated);
    for name in ["../gone", "/no/such/file", "up/gone"] {
        let references = References::default();
        let found = namer.open(OsStr::new(name), "file", Access::Read, &references, &[]);
        let error = found.expect_err("is not there");
        assert_eq!(error.kind(), ErrorKind::NotFound, "{name}");
        assert!(!error.message().contains("allow-ref"), "{error}");
    }
}

#[test]
fn a_companion_that_fails_is_named_with_the_image_that_named_it() {
    let outer = tree();
    std::fs::create_dir(outer.path().join("dir/folder")).expect("a directory");
    let companions = Confined {
        namer: namer(&outer, Trust::Stated),
        references: References::default(),
        remotes: Vec::new(),
        storage: StorageOptions::default(),
        stand_ins: Vec::new(),
        ours: Vec::new(),
    };
    let fails = |name: &str| {
        let opened = companions.open(OsStr::new(name), "data file");
        opened.expect_err(name).to_string()
    };
    let image = outer.path().join("dir/image");
    let image = image.to_str().expect("is UTF-8");
    assert_eq!(
        fails("gone"),
        format!("{image}: names 'gone' as its data file, which is not there")
    );
    let error = fails("folder");
    let note = format!("(the data file of {image}, named 'folder' in its header)");
    assert!(error.ends_with(&note), "{error}");
}

use std::os::unix::fs::symlink;

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
    let opened = namer.open(name, "file", Access::Read, &References::default(), &[]);
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
        stand_in: None,
    };
    let storage = companions.open("sub/file", "extent").expect("is below");
    assert_eq!(storage.size(), 8);
    let error = companions
        .open("sub/../image", "extent")
        .expect_err("is the image");
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    let error = companions
        .open("../secret", "extent")
        .expect_err("is above");
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(error.message().contains("as its extent"), "{error}");
}

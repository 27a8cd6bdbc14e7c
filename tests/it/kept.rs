//! Nothing that is made anew takes the place of a file that a disk in use is made of.

use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use tempfile::TempDir;
use vdtool::chain::open::{ChainOptions, home, open, open_from, open_in_two};
use vdtool::image::Role;

use crate::util::{rounds, scratch, vdtool};

fn ours(dir: &TempDir, line: &[&str]) -> assert_cmd::assert::Assert {
    vdtool().current_dir(dir).args(line).assert()
}

/// Every file, by name, number and content; of links, where they lead.
fn all(dir: &Path) -> Vec<(String, u64, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(dir).expect("reads") {
        let path = entry.expect("reads").path();
        let inode = path.symlink_metadata().expect("is there").ino();
        let bytes = match path.is_symlink() {
            true => Vec::new(),
            false => std::fs::read(&path).expect("reads"),
        };
        all.push((path.display().to_string(), inode, bytes));
    }
    all.sort();
    all
}

/// `root.raw`, below `mid.qcow2`, which keeps its data in `mid.data`, below `top.qcow2`; other
/// names of two of them.
fn chain() -> TempDir {
    let dir = scratch();
    std::fs::write(dir.path().join("root.raw"), [9; 65536]).expect("has room");
    let line = ["create", "-q", "-f", "qcow2", "-b", "root.raw", "-F", "raw"];
    ours(
        &dir,
        &[&line[..], &["-o", "data_file=mid.data", "mid.qcow2"]].concat(),
    )
    .success();
    let line = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "mid.qcow2",
        "-F",
        "qcow2",
    ];
    ours(&dir, &[&line[..], &["top.qcow2"]].concat()).success();
    ours(&dir, &["io", "-c", "write -P 7 0 512", "mid.qcow2"]).success();
    std::fs::hard_link(dir.path().join("mid.data"), dir.path().join("hard")).expect("links");
    symlink("root.raw", dir.path().join("soft")).expect("links");
    dir
}

const CHAIN: [&str; 6] = [
    "root.raw",
    "mid.qcow2",
    "mid.data",
    "top.qcow2",
    "hard",
    "soft",
];

#[test]
fn create_and_convert_replace_no_file_of_a_chain_under_any_of_its_names() {
    let dir = chain();
    let before = all(dir.path());
    for name in CHAIN {
        let data = format!("data_file={name}");
        let lines: [&[&str]; 6] = [
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-b",
                "top.qcow2",
                "-F",
                "qcow2",
                name,
            ],
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-b",
                "top.qcow2",
                "-F",
                "qcow2",
                "-o",
                &data,
                "new",
            ],
            &["convert", "-q", "-O", "raw", "top.qcow2", name],
            &[
                "convert",
                "-q",
                "-O",
                "qcow2",
                "-o",
                &data,
                "top.qcow2",
                "new",
            ],
            &[
                "convert",
                "-q",
                "-O",
                "qcow2",
                "-B",
                "top.qcow2",
                "-F",
                "qcow2",
                "top.qcow2",
                name,
            ],
            &["convert", "-q", "-n", "-U", "-O", "raw", "top.qcow2", name],
        ];
        for line in lines {
            let refused = ours(&dir, line).code(1);
            let text = String::from_utf8_lossy(&refused.get_output().stderr).into_owned();
            assert!(text.contains("would replace"), "{line:?}: {text}");
            assert!(all(dir.path()) == before, "{line:?}");
        }
    }
}

#[test]
fn create_u_replaces_no_file_of_a_chain_that_is_there_though_it_need_not_be() {
    let dir = chain();
    let before = all(dir.path());
    let line = ["create", "-q", "-f", "qcow2", "-u", "-b"];
    let refused = |more: &[&str]| {
        let refused = ours(&dir, &[&line[..], more].concat()).code(1);
        let text = String::from_utf8_lossy(&refused.get_output().stderr).into_owned();
        assert!(text.contains("would replace"), "{more:?}: {text}");
        assert!(all(dir.path()) == before, "{more:?}");
    };
    for name in CHAIN {
        let data = format!("data_file={name}");
        refused(&["top.qcow2", "-F", "qcow2", name, "1M"]);
        refused(&["top.qcow2", "-F", "qcow2", "-o", &data, "new", "1M"]);
    }
    // What lies below it is gone.
    std::fs::remove_file(dir.path().join("root.raw")).expect("removes");
    let before = all(dir.path());
    let line = [&line[..], &["mid.qcow2", "-F", "qcow2", "mid.data", "1M"]].concat();
    ours(&dir, &line).code(1);
    assert!(all(dir.path()) == before);
}

#[test]
fn an_existing_target_that_keeps_its_data_in_a_source_is_not_written_to() {
    let dir = chain();
    let before = all(dir.path());
    let line = [
        "convert",
        "-q",
        "-n",
        "-U",
        "-O",
        "qcow2",
        "mid.data",
        "mid.qcow2",
    ];
    let refused = ours(&dir, &line).code(1);
    let text = String::from_utf8_lossy(&refused.get_output().stderr).into_owned();
    assert!(text.contains("would replace"), "{text}");
    assert!(all(dir.path()) == before);
}

#[test]
fn an_image_and_its_data_file_are_two_files() {
    let dir = scratch();
    symlink("new.qcow2", dir.path().join("link")).expect("links");
    for name in ["new.qcow2", "./new.qcow2", "link"] {
        let data = format!("data_file={name}");
        let line = [
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            &data,
            "new.qcow2",
            "1M",
        ];
        let done = ours(&dir, &line).code(1);
        let text = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
        assert!(text.contains("would be the image itself"), "{text}");
        assert!(!dir.path().join("new.qcow2").exists());
    }
    let line = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "data_file=d",
        "new.qcow2",
        "1M",
    ];
    ours(&dir, &line).success();
    let before = all(dir.path());
    ours(&dir, &["amend", "-o", "data_file=new.qcow2", "new.qcow2"]).code(1);
    ours(&dir, &["amend", "-o", "data_file=link", "new.qcow2"]).code(1);
    assert!(all(dir.path()) == before);
}

#[test]
fn an_image_does_not_become_its_own_backing_image() {
    let dir = chain();
    let before = all(dir.path());
    for (name, format) in [("mid.data", "raw"), ("hard", "raw"), ("mid.qcow2", "qcow2")] {
        for more in [&[][..], &["-u"]] {
            let line = ["rebase", "-b", name, "-F", format, "mid.qcow2"];
            // Nothing but the header is open then.
            if !more.is_empty() && format == "raw" {
                continue;
            }
            let refused = ours(&dir, &[&line[..], more].concat()).code(1);
            let text = String::from_utf8_lossy(&refused.get_output().stderr).into_owned();
            assert!(text.contains("the image itself"), "{line:?}: {text}");
            assert!(all(dir.path()) == before, "{line:?}");
        }
    }
}

#[test]
fn a_process_id_is_written_over_nothing_but_a_process_id() {
    let dir = chain();
    std::fs::write(dir.path().join("letter"), "Dear reader").expect("has room");
    std::fs::write(dir.path().join("other.raw"), [0; 4096]).expect("has room");
    let before = all(dir.path());
    for name in CHAIN.iter().chain(&["letter", "other.raw"]) {
        let line = ["serve", "--nbd", "unix:sock", "-r", "--pid-file", name];
        let refused = ours(&dir, &[&line[..], &["top.qcow2"]].concat()).code(1);
        let text = String::from_utf8_lossy(&refused.get_output().stderr).into_owned();
        assert!(
            text.contains("would replace") || text.contains("process id"),
            "{name}: {text}"
        );
        assert!(all(dir.path()) == before, "{name}");
    }
}

#[test]
fn addresses_are_not_written_into_an_image_that_is_served() {
    let dir = chain();
    let before = all(dir.path());
    for name in ["root.raw", "mid.data"] {
        let line = format!("exec \"$0\" serve --nbd unix:sock -r --ready-fd 7 top.qcow2 7<>{name}");
        let refused = assert_cmd::Command::new("sh")
            .current_dir(&dir)
            .args(["-c", &line, env!("CARGO_BIN_EXE_vdtool")])
            // Where it is not refused it serves.
            .timeout(std::time::Duration::from_secs(60))
            .assert()
            .code(1);
        let text = String::from_utf8_lossy(&refused.get_output().stderr).into_owned();
        assert!(text.contains("would replace"), "{name}: {text}");
        assert!(all(dir.path()) == before, "{name}");
    }
}

#[test]
fn what_is_no_overlay_of_the_image_is_not_even_opened_for_writing() {
    let dir = chain();
    let make = "create -q -o lazy_refcounts=on,compat=1.1 dirty.qcow2 1M";
    ours(&dir, &make.split(' ').collect::<Vec<_>>()).success();
    // Not closed cleanly: whoever opens it for writing mends it, and says so in this byte.
    let path = dir.path().join("dirty.qcow2");
    let mut bytes = std::fs::read(&path).expect("reads");
    bytes[79] |= 1;
    std::fs::write(&path, bytes).expect("writes");
    let before = all(dir.path());
    for name in ["dirty.qcow2", "root.raw", "mid.qcow2", "hard", "soft"] {
        let line = [
            "serve",
            "--nbd",
            "unix:sock",
            "--overlay",
            name,
            "top.qcow2",
        ];
        ours(&dir, &line).code(1);
        assert!(all(dir.path()) == before, "{name}");
    }
}

#[test]
fn commit_takes_the_base_by_the_name_that_the_chain_has_for_it_and_else_by_its_path() {
    for base in [
        "mid.qcow2",
        "sub/mid.qcow2",
        "./sub/../sub/mid.qcow2",
        "link",
    ] {
        let outer = scratch();
        let sub = outer.path().join("sub");
        std::fs::create_dir(&sub).expect("a directory");
        symlink("sub/mid.qcow2", outer.path().join("link")).expect("links");
        let run = |line: &[&str]| vdtool().current_dir(&sub).args(line).assert().success();
        run(&["create", "-q", "-f", "qcow2", "base.qcow2", "1M"]);
        for (below, above) in [("base", "mid"), ("mid", "top"), ("top", "last")] {
            let (below, above) = (format!("{below}.qcow2"), format!("{above}.qcow2"));
            run(&[
                "create", "-q", "-f", "qcow2", "-b", &below, "-F", "qcow2", &above,
            ]);
        }
        run(&["io", "-c", "write -P 5 0 64k", "last.qcow2"]);
        ours(&outer, &["commit", "-b", base, "sub/last.qcow2"]).success();
        run(&["io", "-r", "-c", "read -P 5 0 64k", "mid.qcow2"]);
        run(&["io", "-r", "-c", "read -P 0 0 64k", "base.qcow2"]);
        let refused = ours(&outer, &["commit", "-b", "nobody", "sub/last.qcow2"]).code(1);
        let text = String::from_utf8_lossy(&refused.get_output().stderr).into_owned();
        assert!(
            text.contains("sub/last.qcow2: has no image below it"),
            "{text}"
        );
        ours(&outer, &["commit", "-b", "last.qcow2", "sub/last.qcow2"]).code(1);
    }
}

#[test]
fn the_image_that_names_a_file_is_named_where_the_file_is_at_fault() {
    let dir = scratch();
    std::fs::write(dir.path().join("base.qcow2"), [1; 4096]).expect("has room");
    std::fs::create_dir(dir.path().join("folder")).expect("a directory");
    let top = |backing: &str, format: &str| {
        let line = [
            "create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", format,
        ];
        ours(&dir, &[&line[..], &["top.qcow2", "1M"]].concat()).success();
        let failed = ours(&dir, &["info", "--backing-chain", "top.qcow2"]).code(1);
        String::from_utf8_lossy(&failed.get_output().stderr).into_owned()
    };
    let note =
        |name: &str| format!("(the backing file of top.qcow2, named '{name}' in its header)");
    for (name, format) in [("base.qcow2", "qcow2"), ("folder", "raw")] {
        let text = top(name, format);
        assert!(text.contains(&note(name)), "{text}");
        assert!(text.starts_with(&format!("vdtool: {name}: ")), "{text}");
    }
    for name in ["gone.raw", "../gone.raw", "/gone/gone.raw"] {
        let text = top(name, "raw");
        assert!(!text.contains("--allow-ref"), "{text}");
        let expected = format!(
            "vdtool: top.qcow2: its backing file is not there (looked for '{name}' (header))"
        );
        assert!(text.starts_with(&expected), "{text}");
    }
    let text = top("/etc/passwd", "raw");
    assert!(
        text.contains("--allow-ref '/etc/passwd' allows it"),
        "{text}"
    );
}

/// Runs `work` while `dir` and the link to `other` beside it change places all the time.
fn swapping(outer: &Path, work: impl FnOnce()) {
    let (dir, link) = (outer.join("dir"), outer.join("link"));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                renameat_with(CWD, &dir, CWD, &link, RenameFlags::EXCHANGE).expect("swaps");
                std::thread::yield_now();
            }
        });
        // A panic must not leave the other thread alone.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        done.store(true, Ordering::Relaxed);
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
}

/// `dir` with `top.qcow2` upon `base.raw` of ones, and `other`, whose `base.raw` is of twos; a link
/// leads to it.
fn two_directories() -> TempDir {
    let outer = scratch();
    for (name, byte) in [("dir", 1), ("other", 2)] {
        let dir = outer.path().join(name);
        std::fs::create_dir(&dir).expect("a directory");
        std::fs::write(dir.join("base.raw"), vec![byte; 65536]).expect("has room");
    }
    symlink("other", outer.path().join("link")).expect("links");
    let line = ["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw"];
    ours(&outer, &[&line[..], &["dir/top.qcow2"]].concat()).success();
    outer
}

const ROUNDS: usize = 600;

/// Does `work`, which says whether it found the directory as it was, so many times, and as much
/// longer as it never did: on a busy machine the other one may be there for long.
fn again_and_again(mut work: impl FnMut() -> bool) {
    let mut found = false;
    for round in 0..100 * rounds(ROUNDS) {
        if found && round >= rounds(ROUNDS) {
            return;
        }
        found |= work();
    }
    assert!(found, "it never was what it was at first");
}

#[test]
fn a_commit_writes_into_no_file_of_a_directory_that_took_the_place_of_the_images_own() {
    let outer = two_directories();
    let top = outer.path().join("dir/top.qcow2");
    let chain = open(&top, &ChainOptions::read()).expect("opens");
    let mut files = chain.files().into_iter();
    let base = files.find(|f| f.layer == 1 && f.role == Role::Header);
    let base = base.expect("has a base");
    drop(chain);
    let mut written = 0;
    swapping(outer.path(), || {
        again_and_again(|| {
            let opened = open_in_two(&top, &ChainOptions::read(), &base);
            let wrote = opened.map(|(_, lower)| lower.write_at(&[3; 512], 0).expect("writes"));
            written += usize::from(wrote.is_ok());
            wrote.is_ok()
        });
    });
    let other = std::fs::read(outer.path().join("other/base.raw")).expect("reads");
    assert!(other == vec![2; 65536], "after {written} writes");
}

#[test]
fn a_chain_and_the_names_of_a_rebase_lead_to_no_other_directory() {
    let outer = two_directories();
    let top = outer.path().join("dir/top.qcow2");
    swapping(outer.path(), || {
        again_and_again(|| {
            let Ok(chain) = open(&top, &ChainOptions::read()) else {
                return false;
            };
            let mut byte = [0];
            chain.read_at(&mut byte, 0).expect("reads");
            assert_eq!(byte, [1], "the base is that of the other directory");
            let Ok(home) = home(&chain) else {
                return false;
            };
            let (name, shown) = ("base.raw".as_ref(), Path::new("base.raw"));
            let base = open_from(&home, name, shown, &ChainOptions::read());
            let Ok(base) = base else {
                return false;
            };
            base.read_at(&mut byte, 0).expect("reads");
            assert_eq!(byte, [1], "the new base is that of the other directory");
            true
        });
    });
}

#[test]
fn a_directory_that_is_held_open_is_that_one_wherever_its_name_leads_by_then() {
    let outer = two_directories();
    let chain = open(&outer.path().join("dir/top.qcow2"), &ChainOptions::read()).expect("opens");
    let home = home(&chain).expect("is there");
    let (dir, link) = (outer.path().join("dir"), outer.path().join("link"));
    renameat_with(CWD, &dir, CWD, &link, RenameFlags::EXCHANGE).expect("swaps");
    let (name, shown) = ("base.raw".as_ref(), Path::new("base.raw"));
    let base = open_from(&home, name, shown, &ChainOptions::read()).expect("is there");
    let mut byte = [0];
    base.read_at(&mut byte, 0).expect("reads");
    assert_eq!(byte, [1]);
}

#[test]
fn a_base_that_is_another_file_by_now_is_not_committed_into() {
    let outer = two_directories();
    let path = |name: &str| outer.path().join(name);
    let top = path("dir/top.qcow2");
    let chain = open(&top, &ChainOptions::read()).expect("opens");
    let base = chain.files().pop().expect("has a base");
    drop(chain);
    std::fs::rename(path("other/base.raw"), path("dir/base.raw")).expect("renames");
    let error = open_in_two(&top, &ChainOptions::read(), &base).expect_err("another one");
    assert_eq!(error.kind(), vdtool::ErrorKind::Io, "{error}");
    assert!(error.message().contains("has changed"), "{error}");
}

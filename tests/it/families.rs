//! `vdtool chain`: which images lie below which, and what is said of links that are wrong.

use std::path::Path;
use std::time::Instant;

use serde_json::Value;

use crate::util::{scratch, vdtool};

fn ours(dir: &Path, line: &[&str]) {
    vdtool().current_dir(dir).args(line).assert().success();
}

fn images(dir: &Path, line: &[&str], code: i32) -> Vec<Value> {
    let all = ["chain", "--output", "json"];
    let shown = vdtool().current_dir(dir).args(all).args(line).assert();
    let out = shown.code(code).get_output().stdout.clone();
    let value: Value = serde_json::from_slice(&out).expect("is JSON");
    value["images"].as_array().expect("is a list").clone()
}

fn image<'a>(images: &'a [Value], name: &str) -> &'a Value {
    let is_it = |image: &&Value| {
        let path = image["filename"].as_str().expect("has a name");
        Path::new(path).file_name() == Some(name.as_ref())
    };
    let found = images.iter().find(is_it);
    found.unwrap_or_else(|| panic!("{name} is shown: {images:?}"))
}

/// The kind of the one thing that is wrong with an image's link, and the command that mends it.
fn problem(images: &[Value], name: &str) -> (String, Option<Vec<String>>) {
    let problems = image(images, name)["problems"].as_array().expect("a list");
    let [problem] = &**problems else {
        panic!("one thing is wrong with {name}: {problems:?}");
    };
    let words = problem["command"].as_array().map(|words| {
        let words = words.iter().map(|word| word.as_str().expect("is a word"));
        words.map(str::to_owned).collect()
    });
    (
        problem["kind"].as_str().expect("is a word").to_owned(),
        words,
    )
}

/// Runs a command that mends something.
fn mend(dir: &Path, words: &[String]) {
    assert_eq!(words[0], "vdtool");
    vdtool()
        .current_dir(dir)
        .args(&words[1..])
        .assert()
        .success();
}

/// A base with two children, one of which has a child: `b`, `m` and `n`, `t`.
fn family(dir: &Path, format: &str) {
    let name = |stem: &str| format!("{stem}.{format}");
    ours(dir, &["create", "-q", &name("b"), "8M"]);
    for (below, above) in [("b", "m"), ("b", "n"), ("m", "t")] {
        let (below, above) = (name(below), name(above));
        ours(dir, &["create", "-q", "-b", &below, "-F", format, &above]);
    }
    ours(dir, &["io", "-q", "-c", "write -P 7 0 1M", &name("t")]);
}

const FORMATS: [&str; 3] = ["qcow2", "vhd", "vdi"];

#[test]
fn a_directory_shows_trees_with_what_each_image_has_itself() {
    for format in FORMATS {
        let dir = scratch();
        family(dir.path(), format);
        std::fs::write(dir.path().join("notes.txt"), "no image").expect("writes");
        let images = images(dir.path(), &["."], 0);
        assert_eq!(images.len(), 4, "{format}: {images:?}");
        let depths = |name: &str| image(&images, &format!("{name}.{format}"))["depth"].clone();
        assert_eq!(
            ["b", "m", "n", "t"].map(depths),
            [0, 1, 1, 2].map(Value::from),
            "{format}"
        );
        assert_eq!(image(&images, &format!("b.{format}"))["own-size"], 0);
        let top = image(&images, &format!("t.{format}"));
        assert!(top["own-size"].as_u64() >= Some(1 << 20), "{format}: {top}");
        assert_eq!(images[0]["children"].as_array().map(Vec::len), Some(2));
    }
}

#[test]
fn of_a_file_all_that_lies_below_it_is_shown_and_nothing_else() {
    for format in ["qcow2", "vhd"] {
        let dir = scratch();
        family(dir.path(), format);
        let images = images(dir.path(), &[&format!("t.{format}")], 0);
        let names = images
            .iter()
            .map(|i| i["filename"].as_str().expect("a name"));
        let expected = ["b", "m", "t"].map(|stem| format!("{stem}.{format}"));
        assert!(names.eq(expected.iter().map(String::as_str)), "{images:?}");
    }
}

#[test]
fn the_trees_are_drawn() {
    let dir = scratch();
    family(dir.path(), "qcow2");
    let shown = vdtool()
        .current_dir(dir.path())
        .args(["chain", "."])
        .assert();
    let text = String::from_utf8(shown.success().get_output().stdout.clone()).expect("is text");
    let lines = text.lines().skip(1);
    let names: Vec<&str> = lines
        .filter_map(|line| Some(line.split_once("  qcow2")?.0.trim_end()))
        .collect();
    assert_eq!(
        names,
        [
            "./b.qcow2",
            "├─ ./m.qcow2",
            "│  └─ ./t.qcow2",
            "└─ ./n.qcow2"
        ],
        "{text}"
    );
}

#[test]
fn what_moved_is_found_by_its_identity_and_the_command_shown_links_it_again() {
    for format in ["qcow2", "vhd"] {
        let dir = scratch();
        let dir = dir.path();
        family(dir, format);
        std::fs::create_dir(dir.join("old")).expect("makes a directory");
        // What has an identity may have another name by then.
        let name = match format {
            "vhd" => "old/base-1.vhd".to_owned(),
            _ => format!("old/b.{format}"),
        };
        std::fs::rename(dir.join(format!("b.{format}")), dir.join(name)).expect("renames");
        let alone = images(dir, &["."], 2);
        let (kind, words) = problem(&alone, &format!("m.{format}"));
        assert_eq!((&*kind, words), ("missing", None), "{format}");
        let both = images(dir, &[".", "old"], 2);
        let kinds = [("vhd", "moved"), ("qcow2", "missing")];
        for stem in ["m", "n"] {
            let (kind, words) = problem(&both, &format!("{stem}.{format}"));
            assert!(kinds.contains(&(format, &*kind)), "{format} {kind}");
            mend(dir, &words.expect("is known where it is"));
        }
        images(dir, &[".", "old"], 0);
        let top = format!("t.{format}");
        ours(
            dir,
            &[
                "io",
                "-q",
                "-c",
                "read -P 7 0 1M",
                "-c",
                "read -P 0 1M 7M",
                &top,
            ],
        );
    }
}

#[test]
fn another_image_in_its_place_is_told_from_a_changed_one() {
    let dir = scratch();
    let dir = dir.path();
    family(dir, "vhd");
    std::fs::rename(dir.join("b.vhd"), dir.join("kept.vhd")).expect("renames");
    ours(dir, &["create", "-q", "b.vhd", "8M"]);
    let found = images(dir, &["."], 2);
    let (kind, words) = problem(&found, "m.vhd");
    assert_eq!(kind, "replaced");
    mend(dir, &words.expect("is known where it is"));
    assert_eq!(problem(&found, "n.vhd").0, "replaced");

    let dir = scratch();
    let dir = dir.path();
    family(dir, "vdi");
    ours(dir, &["io", "-q", "-c", "write -P 9 2M 1M", "b.vdi"]);
    let found = images(dir, &["."], 2);
    let (kind, words) = problem(&found, "m.vdi");
    assert_eq!(kind, "changed");
    assert_eq!(
        image(&found, "m.vdi")["depth"],
        1,
        "it is its parent all the same"
    );
    mend(dir, &words.expect("the user may take it as it is"));
    assert!(image(&images(dir, &["."], 2), "m.vdi")["problems"] == Value::Array(Vec::new()));
}

#[test]
fn a_circle_is_shown_once_and_told() {
    let dir = scratch();
    let dir = dir.path();
    family(dir, "qcow2");
    ours(
        dir,
        &["rebase", "-u", "-b", "t.qcow2", "-F", "qcow2", "b.qcow2"],
    );
    for places in [&["."][..], &["t.qcow2"], &["m.qcow2", "."]] {
        let found = images(dir, places, 2);
        for name in ["b.qcow2", "m.qcow2", "t.qcow2"] {
            assert_eq!(problem(&found, name).0, "cycle", "{places:?}");
        }
    }
    assert!(image(&images(dir, &["."], 2), "n.qcow2")["problems"] == Value::Array(Vec::new()));
}

#[test]
fn nothing_outside_the_places_named_is_opened() {
    let dir = scratch();
    let dir = dir.path();
    std::fs::create_dir(dir.join("in")).expect("makes a directory");
    ours(dir, &["create", "-q", "out.qcow2", "8M"]);
    ours(
        dir,
        &[
            "create",
            "-q",
            "-b",
            "../out.qcow2",
            "-F",
            "qcow2",
            "in/a.qcow2",
        ],
    );
    std::os::unix::fs::symlink("../out.qcow2", dir.join("in/link.qcow2")).expect("links");
    std::fs::remove_file(dir.join("in/link.qcow2")).expect("removes");
    let found = images(dir, &["in"], 2);
    assert_eq!(found.len(), 1);
    assert_eq!(problem(&found, "a.qcow2").0, "outside");
    assert_eq!(images(dir, &["--allow-ref", "out.qcow2", "in"], 0).len(), 2);
    assert_eq!(images(dir, &["in", "."], 2).len(), 2);
    std::os::unix::fs::symlink("../out.qcow2", dir.join("in/link.qcow2")).expect("links");
    let shown = vdtool()
        .current_dir(dir)
        .args(["chain", "in"])
        .assert()
        .code(2);
    let text = String::from_utf8_lossy(&shown.get_output().stdout).into_owned();
    assert!(text.contains("link.qcow2: was not looked at"), "{text}");
}

#[test]
fn what_a_guest_wrote_into_a_raw_parent_is_not_followed() {
    let dir = scratch();
    let dir = dir.path();
    ours(
        dir,
        &[
            "create",
            "-q",
            "-b",
            "/etc/passwd",
            "-F",
            "raw",
            "-u",
            "base.img",
            "-f",
            "qcow2",
            "8M",
        ],
    );
    ours(
        dir,
        &["create", "-q", "-b", "base.img", "-F", "raw", "top.qcow2"],
    );
    for places in [["top.qcow2"], ["."]] {
        let found = images(dir, &places, 0);
        assert_eq!(image(&found, "base.img")["format"], "raw", "{places:?}");
        assert_eq!(found.len(), 2);
    }
}

#[test]
fn damaged_images_of_a_directory_are_listed_and_a_named_one_is_an_error() {
    let dir = scratch();
    let dir = dir.path();
    family(dir, "qcow2");
    let mut bytes = std::fs::read(dir.join("n.qcow2")).expect("reads");
    bytes[20..24].copy_from_slice(&99_u32.to_be_bytes());
    std::fs::write(dir.join("n.qcow2"), &bytes).expect("writes");
    let all = ["chain", "--output", "json", "."];
    let shown = vdtool().current_dir(dir).args(all).assert().code(2);
    let value: Value = serde_json::from_slice(&shown.get_output().stdout).expect("is JSON");
    assert_eq!(value["unreadable"][0]["filename"], "./n.qcow2");
    assert_eq!(value["images"].as_array().map(Vec::len), Some(3));
    vdtool()
        .current_dir(dir)
        .args(["chain", "n.qcow2"])
        .assert()
        .code(1);
    vdtool()
        .current_dir(dir)
        .args(["chain", "absent"])
        .assert()
        .code(1);
    vdtool().current_dir(dir).args(["chain"]).assert().code(1);
}

#[test]
fn a_thousand_images_are_looked_at_in_one_go() {
    let dir = scratch();
    let dir = dir.path();
    for format in FORMATS {
        let (base, child) = (format!("b.{format}"), format!("c0.{format}"));
        ours(dir, &["create", "-q", &base, "1G"]);
        ours(dir, &["create", "-q", "-b", &base, "-F", format, &child]);
        for index in 1..300 {
            let copy = dir.join(format!("c{index}.{format}"));
            std::fs::copy(dir.join(&child), copy).expect("copies");
        }
    }
    let start = Instant::now();
    // Copies have one identity: nothing is below them, so nothing is wrong.
    let found = images(dir, &["."], 0);
    eprintln!("{} images: {:?}", found.len(), start.elapsed());
    assert_eq!(found.len(), 903);
    assert_eq!(
        found.iter().filter(|image| image["depth"] == 1).count(),
        900
    );
}

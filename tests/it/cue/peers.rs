//! Other programs, and discs that they made.

use std::path::Path;

use super::made::Files;
use crate::corpus;
use crate::util::{peer, requires};

/// What `bchunk` makes of a disc.
fn bchunk(files: &Files) -> Vec<u8> {
    peer("bchunk", files.path(), ["x.bin", "x.cue", "peer"]);
    files.read("peer01.iso")
}

#[test]
fn bchunk_reads_the_same_data() {
    if !requires("bchunk") {
        return;
    }
    let (files, user) = Files::mode1("cue-bchunk", 500);
    assert!(bchunk(&files) == user);
    assert!(files.disk(&[]) == user);
}

#[test]
fn discs_of_the_corpus_are_right_or_refused_by_what_they_lack() {
    let Some(directory) = corpus::images() else {
        return;
    };
    let data = |name: &str| directory.join("libcdio_libcdio/test/data").join(name);
    let copy = |names: &[(&str, &str)]| {
        let files = Files::new(&[]);
        for (from, to) in names {
            std::fs::copy(data(from), files.file(to)).expect("copies");
        }
        files
    };
    // The sheet has the name in capitals.
    let files = copy(&[("isofs-m1.cue", "x.cue"), ("isofs-m1.bin", "isofs-m1.bin")]);
    let report = files.json(&["check", "--output", "json", "x.cue"]);
    assert_eq!(report["findings"], serde_json::json!([]));
    let disk = files.disk(&[]);
    assert_eq!(disk.len(), 302 * 2048);
    assert_eq!(disk[16 * 2048 + 1..16 * 2048 + 6], *b"CD001");
    if requires("bchunk") {
        std::fs::rename(files.file("isofs-m1.bin"), files.file("x.bin")).expect("renames");
        assert!(bchunk(&files) == disk);
    }
    let files = copy(&[("cdda.cue", "x.cue"), ("cdda.bin", "cdda.bin")]);
    assert_eq!(files.tracks()[0]["mode"], "AUDIO");
    assert!(files.disk(&["--open-options", "track=1"]) == files.read("cdda.bin"));
    missing(&directory);
}

/// Sheets whose files are not in the collection, and such as make no sense.
fn missing(directory: &Path) {
    let sheets = [
        ("libcdio_libcdio/test/data/cdda_4_5.cue", "'cdda_4_5.bin'"),
        ("libcdio_libcdio/test/vcd_demo.cue", "'vcd_demo.bin'"),
        ("libcdio_libcdio/parse/test/t1.cue", "'t1.bin'"),
        (
            "libcdio_libcdio/parse/test/t2.cue",
            "line 3: the file is of type 'AUDIO'",
        ),
        ("libcdio_libcdio/parse/test/t3.cue", "line 7:"),
        ("libcdio_libcdio-paranoia/test/data/cdda.cue", "'BOING.BIN'"),
        (
            "libcdio_libcdio-paranoia/test/data/cdda2.cue",
            "'BOING2.BIN'",
        ),
        (
            "libcdio_libcdio-paranoia/test/data/hidden-track.cue",
            "'hidden-track.bin'",
        ),
    ];
    let files = Files::new(&[]);
    for (name, part) in sheets {
        std::fs::copy(directory.join(name), files.file("x.cue")).expect("copies");
        files.fails(&["info", "x.cue"], 1, part);
    }
    // With files that fit they are read.
    std::fs::copy(directory.join(sheets[0].0), files.file("x.cue")).expect("copies");
    files.write("cdda_4_5.bin", &vec![0; 2352 * 302]);
    let numbers: Vec<_> = files
        .tracks()
        .iter()
        .map(|t| (t["number"].clone(), t["lba"].clone()))
        .collect();
    assert_eq!(
        serde_json::json!(numbers),
        serde_json::json!([[4, 0], [5, 150]])
    );
    std::fs::copy(directory.join(sheets[1].0), files.file("x.cue")).expect("copies");
    files.write("vcd_demo.bin", &vec![0; 2352 * 2000]);
    let lbas: Vec<_> = files.tracks().iter().map(|t| t["lba"].clone()).collect();
    assert_eq!(serde_json::json!(lbas), serde_json::json!([0, 1182, 1721]));
}

//! `check`: the codes of every sector, and their repair.

use serde_json::{Value, json};
use vdtool::image::disc::{Form, RAW};

use super::made::{Files, cut, sector, sectors};
use crate::util::Seeded;

fn sectors_of(report: &Value) -> Vec<(u64, Value, bool)> {
    let list = report["sectors"].as_array().expect("has sectors");
    let one = |s: &Value| {
        let lba = s["lba"].as_u64().expect("a number");
        (lba, s["parts"].clone(), s["correctable"] == true)
    };
    list.iter().map(one).collect()
}

fn report(files: &Files, words: &[&str]) -> (i32, Value) {
    let words = [&["check", "--output", "json"], words, &["x.cue"]].concat();
    let (code, out, errors) = files.run(&words);
    let value = serde_json::from_str(&out);
    (code, value.unwrap_or_else(|e| panic!("{e}: {errors}")))
}

#[test]
fn wrong_sectors_are_listed_by_address_and_part_and_repaired_where_that_is_sure() {
    let (files, user) = Files::mode1("cue-check", 700);
    let right = files.read("x.bin");
    assert_eq!(report(&files, &[]).0, 0);
    files.damage("x.bin", [5 * RAW + 500, 6 * RAW + 2300, 333 * RAW + 4]);
    files.damage("x.bin", (100..2000).map(|n| 600 * RAW + n));
    let lost = files.read("x.bin")[600 * RAW..601 * RAW].to_vec();
    let expected = [
        (5, json!(["edc", "p", "q"]), true),
        (6, json!(["q"]), true),
        (333, json!(["sync", "edc"]), true),
        (600, json!(["edc", "p", "q"]), false),
    ];
    let (code, found) = report(&files, &[]);
    assert_eq!((code, sectors_of(&found)), (2, expected.to_vec()));
    assert_eq!(found["corruptions"], 4);
    let text = files.run(&["check", "x.cue"]).1;
    assert!(
        text.contains("sector 5 (00:02:05, track 1): wrong: edc, p, q"),
        "{text}"
    );
    // Nothing is changed unless that is asked for.
    assert_eq!(report(&files, &["-r", "leaks"]).0, 2);
    let (code, found) = report(&files, &["-r", "all"]);
    assert_eq!((code, sectors_of(&found)), (2, expected[3..].to_vec()));
    assert_eq!(
        (&found["corruptions"], &found["corruptions-fixed"]),
        (&json!(1), &json!(3))
    );
    let mut mended = right.clone();
    mended[600 * RAW..601 * RAW].copy_from_slice(&lost);
    assert!(files.read("x.bin") == mended);
    // With the last one right again nothing is left.
    files.damage(
        "x.bin",
        (100..2000).map(|n| 600 * RAW + n).chain([7 * RAW + 20]),
    );
    let (code, found) = report(&files, &["-r", "all"]);
    assert_eq!((code, sectors_of(&found)), (0, Vec::new()));
    assert!(files.read("x.bin") == right);
    assert!(files.disk(&[]) == user);
}

#[test]
fn form_2_may_have_no_code_and_sound_is_not_judged() {
    let mut rng = Seeded::new("cue-check-form2");
    let (mut bin, _) = sectors(&mut rng, Form::Form2, 0, 10);
    bin[3 * RAW + 2348..4 * RAW].fill(0);
    bin[4 * RAW + 100] ^= 1;
    bin.extend(rng.bytes(RAW * 5));
    let sheet = b"FILE x.bin BINARY\nTRACK 01 MODE2/2352\nINDEX 01 00:00:00\nTRACK 02 AUDIO\nINDEX 01 00:00:10\n";
    let files = Files::new(&[("x.cue", sheet), ("x.bin", &bin)]);
    let (code, found) = report(&files, &["-r", "all"]);
    assert_eq!(
        (code, sectors_of(&found)),
        (2, vec![(4, json!(["edc"]), false)])
    );
    assert!(files.read("x.bin") == bin);
}

#[test]
fn sectors_without_headers_are_verified_and_repaired_too() {
    let (all, user) = sectors(&mut Seeded::new("cue-2336"), Form::Form1, 0, 50);
    let bin = cut(&all, 16..2352);
    let sheet = b"FILE x.bin BINARY\nTRACK 01 MODE2/2336\nINDEX 01 00:00:00\n";
    let files = Files::new(&[("x.cue", sheet), ("x.bin", &bin)]);
    assert_eq!(report(&files, &[]).0, 0);
    files.damage("x.bin", [9 * 2336, 10 * 2336 + 2335]);
    let (code, found) = report(&files, &[]);
    assert_eq!(code, 2);
    let lbas: Vec<u64> = sectors_of(&found).iter().map(|(lba, ..)| *lba).collect();
    assert_eq!(lbas, [9, 10]);
    assert_eq!(report(&files, &["-r", "all"]).0, 0);
    assert!(files.read("x.bin") == bin);
    assert!(files.disk(&[]) == user);
}

#[test]
fn headers_that_disagree_with_their_place_are_told_and_kept() {
    let mut rng = Seeded::new("cue-headers");
    let mut bin = sectors(&mut rng, Form::Mode1, 0, 10).0;
    bin.extend(sectors(&mut rng, Form::Mode1, 160, 10).0);
    bin.extend(sector(Form::Mode1, 20, &rng.bytes(2048)));
    let sheet = b"FILE x.bin BINARY\nTRACK 01 MODE1/2352\nINDEX 01 00:00:00\n";
    let files = Files::new(&[("x.cue", sheet), ("x.bin", &bin)]);
    let (code, found) = report(&files, &["-r", "all"]);
    assert_eq!((code, found["corruptions-fixed"].clone()), (0, json!(0)));
    let findings = found["findings"].as_array().expect("a list");
    assert_eq!(findings.len(), 1, "{found}");
    assert_eq!(findings[0]["severity"], "note");
    let text = findings[0]["text"].as_str().expect("a text");
    assert!(
        text.contains("sectors 10 to 19 are +150 sectors off"),
        "{text}"
    );
    assert!(files.read("x.bin") == bin);
}

#[test]
fn discs_without_codes_have_nothing_wrong() {
    let (all, _) = sectors(&mut Seeded::new("cue-plain"), Form::Mode1, 0, 50);
    let sheet = b"FILE x.bin BINARY\nTRACK 01 MODE1/2048\nINDEX 01 00:00:00\n";
    let files = Files::new(&[("x.cue", sheet), ("x.bin", &cut(&all, 16..2064))]);
    let (code, found) = report(&files, &[]);
    assert_eq!((code, sectors_of(&found)), (0, Vec::new()));
}

#[test]
fn holes_of_zeroes_are_damage_that_is_told_and_kept() {
    let (files, mut user) = Files::mode1("cue-hole", 20);
    let mut bin = files.read("x.bin");
    bin[7 * RAW..9 * RAW].fill(0);
    files.write("x.bin", &bin);
    let expected = [7, 8].map(|lba| (lba, json!(["sync"]), false));
    for words in [&[][..], &["-r", "all"]] {
        let (code, found) = report(&files, words);
        assert_eq!((code, sectors_of(&found)), (2, expected.to_vec()));
    }
    assert!(files.read("x.bin") == bin);
    files.fails(&["convert", "x.cue", "out.iso"], 1, "cannot be read: 7-8");
    files.fails(
        &["convert", "-O", "cue", "x.cue", "y.cue"],
        1,
        "what was there: 7-8",
    );
    let write = "write --parts data --lba 7";
    files.fails(&["io", "-c", write, "x.cue"], 1, "--parts all replaces it");
    user[7 * 2048..9 * 2048].fill(0);
    assert!(files.disk(&["--salvage"]) == user);
}

#[test]
fn files_of_a_sheet_that_are_one_file_are_opened_once() {
    let (files, user) = Files::mode1("cue-aliases", 20);
    let right = files.read("x.bin");
    std::fs::hard_link(files.file("x.bin"), files.file("hard.bin")).expect("links");
    std::os::unix::fs::symlink("x.bin", files.file("soft.bin")).expect("links");
    let names = ["x.bin", "x.bin", "./x.bin", "X.BIN", "hard.bin", "soft.bin"];
    let lines = (1..).zip(names).map(|(n, name)| {
        format!("FILE {name} BINARY\nTRACK {n:02} MODE1/2352\nINDEX 01 00:00:00\n")
    });
    files.write("x.cue", lines.collect::<String>().as_bytes());
    files.damage("x.bin", [3 * RAW + 77]);
    assert_eq!(report(&files, &["-r", "all"]).0, 0);
    assert!(files.read("x.bin") == right);
    files.done(&["io", "-c", "write --parts edc -P 0 --lba 103", "x.cue"]);
    assert_eq!(report(&files, &[]).0, 2);
    assert!(files.disk(&["--open-options", "track=5"]) == user);
    let info = files.json(&["info", "--output", "json", "x.cue"]);
    let size = info["actual-size"].as_u64().expect("a number");
    assert!(size < 2 * right.len() as u64 + (64 << 10), "{size}");
}

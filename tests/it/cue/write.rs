//! Discs that are made: of disks, of other discs, sound files of them.

use serde_json::json;
use vdtool::image::disc::{Form, RAW};

use super::made::{Files, cut, sector, sectors, swapped, wave};
use crate::util::{Seeded, killable};

#[test]
fn a_disk_becomes_a_disc_and_is_the_same_again() {
    let mut rng = Seeded::new("cue-new");
    let user = rng.bytes(500 * 2048);
    for (mode, track, size) in [
        ("2352", "MODE1/2352", 2352),
        ("2048", "MODE1/2048", 2048),
        ("mode2-form1", "MODE2/2352", 2352),
    ] {
        let files = Files::new(&[("d.iso", &user)]);
        let option = format!("mode={mode}");
        files.done(&[
            "convert", "-O", "cue", "-o", &option, "--verify", "d.iso", "x.cue",
        ]);
        assert_eq!(files.read("x.bin").len(), 500 * size);
        let sheet = String::from_utf8(files.read("x.cue")).expect("is text");
        let expected =
            format!("FILE \"x.bin\" BINARY\r\n  TRACK 01 {track}\r\n    INDEX 01 00:00:00\r\n");
        assert_eq!(sheet, expected);
        assert!(files.disk(&[]) == user, "{mode}");
        let report = files.json(&["check", "--output", "json", "x.cue"]);
        assert_eq!(report["findings"], json!([]), "{mode}");
    }
    // By the extension alone, and with a last sector that is filled up.
    let files = Files::new(&[("d.iso", &user[..5000])]);
    files.done(&["convert", "d.iso", "x.cue"]);
    let mut filled = user[..5000].to_vec();
    filled.resize(3 * 2048, 0);
    assert!(files.disk(&[]) == filled);
}

#[test]
fn mode_1_without_its_codes_and_back_is_the_same_bytes() {
    let (files, _) = Files::mode1("cue-round", 700);
    let before = files.read("x.bin");
    files.done(&["convert", "-o", "mode=2048", "x.cue", "small.cue"]);
    assert_eq!(files.read("small.bin").len(), 700 * 2048);
    files.done(&["convert", "-o", "mode=2352", "small.cue", "large.cue"]);
    assert!(files.read("large.bin") == before);
    // By way of the disk alone.
    files.done(&["convert", "x.cue", "d.iso"]);
    files.done(&["convert", "-O", "cue", "d.iso", "again.cue"]);
    assert!(files.read("again.bin") == before);
}

/// Data, then two tracks of sound with pauses of both kinds, in files of three kinds.
fn disc() -> (Files, Vec<u8>, [Vec<u8>; 2]) {
    let mut rng = Seeded::new("cue-disc");
    let (data, user) = sectors(&mut rng, Form::Mode1, 0, 400);
    let (_, two) = sectors(&mut rng, Form::Audio, 0, 200);
    let (_, three) = sectors(&mut rng, Form::Audio, 0, 310);
    let sheet = "CATALOG 0000012101954\nTITLE \"A disc\"\nFILE a.bin BINARY\nTRACK 01 MODE1/2352\nINDEX 01 00:00:00\nPOSTGAP 00:01:00\nFILE b.bin MOTOROLA\nTRACK 02 AUDIO\nTITLE \"One\"\nFLAGS DCP\nISRC ABCDE1234567\nPREGAP 00:02:00\nINDEX 01 00:00:00\nFILE c.wav WAVE\nTRACK 03 AUDIO\nINDEX 00 00:00:00\nINDEX 01 00:02:10\nINDEX 02 00:03:00\n";
    let files = Files::new(&[
        ("x.cue", sheet.as_bytes()),
        ("a.bin", &data),
        ("b.bin", &swapped(&two)),
        ("c.wav", &wave(&three)),
    ]);
    (files, user, [two, three])
}

#[test]
fn a_disc_is_laid_out_in_one_file_or_in_one_for_each_track_and_stays_the_disc() {
    let (files, user, [two, three]) = disc();
    let places = |name: &str| -> Vec<serde_json::Value> {
        let info = files.json(&["info", "--output", "json", name]);
        let tracks = info["format-specific"]["data"]["tracks"]
            .as_array()
            .expect("has")
            .clone();
        let keys = [
            "number", "mode", "lba", "msf", "sectors", "pregap", "flags", "isrc",
        ];
        tracks
            .iter()
            .map(|t| keys.map(|key| t[key].clone()).into_iter().collect())
            .collect()
    };
    let before = places("x.cue");
    files.done(&["convert", "-O", "cue", "x.cue", "one.cue"]);
    files.done(&["convert", "-o", "layout=per-track", "one.cue", "many.cue"]);
    files.done(&["convert", "-o", "layout=single", "many.cue", "back.cue"]);
    for name in ["one.cue", "many.cue", "back.cue"] {
        assert_eq!(places(name), before, "{name}");
        let disk = |option: &str| {
            files.done(&["convert", "--open-options", option, name, "out.raw"]);
            files.read("out.raw")
        };
        assert!(disk("track=1") == user, "{name}");
        assert!(disk("track=2") == two, "{name}");
        assert!(disk("track=3") == three[160 * RAW..], "{name}");
        let text = String::from_utf8(files.read(name)).expect("is text");
        for part in [
            "CATALOG 0000012101954\r\n",
            "TITLE \"A disc\"",
            "    TITLE \"One\"",
            "PREGAP 00:02:00",
            "POSTGAP 00:01:00",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }
    assert!(files.read("one.bin") == [files.read("a.bin"), two.clone(), three.clone()].concat());
    assert!(files.read("back.bin") == files.read("one.bin"));
    assert!(files.read("many (Track 03).bin") == three);
    assert!(files.read("many (Track 02).bin") == two);
}

#[test]
fn sound_becomes_a_file_for_each_track() {
    let (files, _, [two, three]) = disc();
    files.done(&["convert", "-O", "wav", "x.cue", "sound"]);
    assert!(files.read("sound/track02.wav") == wave(&two));
    assert!(files.read("sound/track03.wav") == wave(&three[160 * RAW..]));
    assert_eq!(
        std::fs::read_dir(files.file("sound"))
            .expect("reads")
            .count(),
        2
    );
    files.done(&[
        "convert",
        "-O",
        "wav",
        "--open-options",
        "track=2",
        "x.cue",
        "two.wav",
    ]);
    assert!(files.read("two.wav") == wave(&two));
    files.fails(
        &[
            "convert",
            "-O",
            "wav",
            "--open-options",
            "track=1",
            "x.cue",
            "one.wav",
        ],
        63,
        "wav is made of tracks",
    );
    files.write("d.iso", &[1; 4096]);
    files.fails(
        &["convert", "-O", "wav", "d.iso", "none"],
        63,
        "which only discs have",
    );
    assert!(!files.file("none").exists());
}

#[test]
fn damage_is_corrected_on_the_way_or_ends_it_with_nothing_made() {
    let (files, _) = Files::mode1("cue-way", 100);
    let right = files.read("x.bin");
    files.damage("x.bin", [5 * RAW + 99, 6 * RAW + 2100]);
    let (code, _, errors) = files.run(&["convert", "-O", "cue", "x.cue", "new.cue"]);
    assert!(
        code == 0 && errors.contains("corrected by their codes: 5-6"),
        "{errors}"
    );
    assert!(files.read("new.bin") == right);
    files.damage("x.bin", (100..2000).map(|n| 60 * RAW + n));
    let wrong = files.read("x.bin");
    files.fails(
        &["convert", "-O", "cue", "x.cue", "other.cue"],
        1,
        "what was there: 60 (--salvage",
    );
    assert!(!files.file("other.cue").exists() && !files.file("other.bin").exists());
    files.done(&["convert", "-O", "cue", "--salvage", "x.cue", "other.cue"]);
    assert!(files.read("other.bin")[60 * RAW..61 * RAW] == wrong[60 * RAW..61 * RAW]);
    assert_eq!(files.run(&["check", "other.cue"]).0, 2);
}

#[test]
fn modes_that_hold_more_keep_it_and_those_that_hold_less_say_what_is_lost() {
    let mut rng = Seeded::new("cue-lossy");
    let mut bin = sectors(&mut rng, Form::Form1, 0, 20).0;
    let sheet = |mode: &str| format!("FILE x.bin BINARY\nTRACK 01 {mode}\nINDEX 01 00:00:00\n");
    let files = Files::new(&[("x.cue", sheet("MODE2/2352").as_bytes()), ("x.bin", &bin)]);
    // From the subheader on, and back with a header.
    files.write(
        "y.cue",
        sheet("MODE2/2336").replace("x.bin", "y.bin").as_bytes(),
    );
    files.write("y.bin", &cut(&bin, 16..2352));
    files.done(&["convert", "-o", "mode=2352", "y.cue", "z.cue"]);
    assert!(files.read("z.bin") == bin);
    let other = sector(Form::Form2, 7, &rng.bytes(2324));
    bin[7 * RAW..8 * RAW].copy_from_slice(&other);
    files.write("x.bin", &bin);
    files.done(&["convert", "-O", "cue", "x.cue", "same.cue"]);
    assert!(files.read("same.bin") == bin);
    files.fails(
        &["convert", "-o", "mode=2048", "x.cue", "data.cue"],
        1,
        "7 (--salvage",
    );
}

#[test]
fn targets_take_no_options_that_mean_nothing_and_replace_no_source() {
    let (files, user) = Files::mode1("cue-options", 20);
    files.write("d.iso", &user);
    for (words, code, part) in [
        (&["-n"][..], 63, "-n is not for"),
        (&["-c"], 63, "-c is not for"),
        (&["-o", "mode=2336"], 2, "2048|2352|mode2-form1"),
        (&["-o", "size=4k"], 2, "not for discs"),
    ] {
        let words = [&["convert", "-O", "cue"], words, &["d.iso", "new.cue"]].concat();
        files.fails(&words, code, part);
    }
    files.write("empty.iso", b"");
    files.fails(
        &["convert", "-O", "cue", "empty.iso", "new.cue"],
        1,
        "a disc of 0 sectors",
    );
    files.fails(&["convert", "-O", "cue", "d.iso", "d.iso"], 1, "d.iso");
    files.fails(
        &["convert", "-O", "cue", "x.cue", "x.cue"],
        1,
        "would replace",
    );
    files.fails(
        &["convert", "-O", "cue", "d.iso", "new.bin"],
        1,
        "its own name",
    );
    std::fs::rename(files.file("x.bin"), files.file("new.bin")).expect("renames");
    files.write(
        "x.cue",
        b"FILE new.bin BINARY\nTRACK 01 MODE1/2352\nINDEX 01 00:00:00\n",
    );
    files.fails(
        &["convert", "-O", "cue", "x.cue", "new.cue"],
        1,
        "would replace",
    );
    files.fails(
        &["create", "-f", "cue", "c.cue", "1M"],
        63,
        "are made by \"convert -O cue\" alone",
    );
    for words in [
        &["d.iso", "-"][..],
        &["-", "c.cue"],
        &["-f", "raw", "-", "c.cue"],
    ] {
        let words = [&["convert", "-O", "cue"], words].concat();
        files.fails(
            &words,
            63,
            "a stream: it has files whose lengths must be known",
        );
    }
    files.fails(
        &["convert", "-O", "cue", "d.iso", "a\nb.cue"],
        1,
        "a\\u{a}b: a CUE sheet has no names with line ends",
    );
    let help = files.done(&["convert", "-O", "cue", "-o", "help"]);
    assert!(
        help.contains("layout") && help.contains("per-track"),
        "{help}"
    );
}

#[test]
fn a_disc_that_is_replaced_is_the_old_one_or_the_new_one() {
    let mut rng = Seeded::new("cue-replace");
    let (old, new) = (rng.bytes(300 * 2048), rng.bytes(310 * 2048));
    let files = Files::new(&[("old.iso", &old), ("new.iso", &new)]);
    files.done(&["convert", "-O", "cue", "old.iso", "x.cue"]);
    for after in 0..12u64 {
        let mut child = killable()
            .current_dir(files.path())
            .args(["convert", "-O", "cue", "new.iso", "x.cue"])
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("starts");
        std::thread::sleep(std::time::Duration::from_millis(after * 7));
        child.kill().expect("is killed, or has ended");
        child.wait().expect("ends");
        let disk = files.disk(&[]);
        assert!(disk == old || disk == new, "after {after}");
        if disk == new {
            files.done(&["convert", "-q", "-O", "cue", "old.iso", "x.cue"]);
            assert!(files.disk(&[]) == old);
        }
    }
    files.done(&["convert", "-q", "-O", "cue", "new.iso", "x.cue"]);
    let sheet = String::from_utf8(files.read("x.cue")).expect("is text");
    assert!(sheet.contains("FILE \"x.bin\" BINARY"), "{sheet}");
    let hidden = |name: &str| name.starts_with('.');
    let names = std::fs::read_dir(files.path()).expect("reads");
    let names = names.map(|e| e.expect("reads").file_name().to_string_lossy().into_owned());
    assert_eq!(names.filter(|name| hidden(name)).count(), 0);
}

#[test]
fn an_image_that_a_link_leads_to_has_its_files_beside_itself() {
    let (files, user) = Files::mode1("cue-link", 20);
    files.write("d.iso", &user);
    std::fs::create_dir(files.file("in")).expect("makes");
    // To a name that is free, and to one that is taken.
    for _ in 0..2 {
        let _ = std::os::unix::fs::symlink("in/real.cue", files.file("link.cue"));
        files.done(&[
            "convert", "-q", "-O", "cue", "--verify", "d.iso", "link.cue",
        ]);
        assert!(files.file("in/real.bin").exists() && !files.file("link.bin").exists());
        for name in ["link.cue", "in/real.cue"] {
            files.done(&["convert", name, "out.iso"]);
            assert!(files.read("out.iso") == user, "{name}");
        }
    }
}

#[test]
fn discs_and_sound_are_compared_when_they_were_made_and_measured_before() {
    let (files, _, _) = disc();
    let size = |words: &[&str]| -> u64 {
        let words = [&["measure", "--output", "json", "-O", "cue"], words].concat();
        let found = files.json(&words);
        assert_eq!(found["required"], found["fully-allocated"]);
        found["required"].as_u64().expect("a number")
    };
    let len = |name: &str| files.read(name).len() as u64;
    files.done(&["convert", "-O", "cue", "--verify", "x.cue", "x2.cue"]);
    // The name is as long as that of the source.
    assert_eq!(size(&["x.cue"]) + 2, len("x2.cue") + len("x2.bin") + 1);
    files.done(&["convert", "-O", "wav", "--verify", "x.cue", "sound"]);
    files.write("d.iso", &[7; 5000]);
    files.done(&["convert", "-O", "cue", "-o", "mode=2048", "d.iso", "e.cue"]);
    let small = len("e.cue") + len("e.bin");
    assert_eq!(size(&["-o", "mode=2048", "d.iso"]), small);
    assert_eq!(size(&["-o", "mode=2048", "--size", "5000"]), small + 3);
    files.fails(&["measure", "-O", "cue"], 2, "needs FILE or --size");
    files.fails(
        &["measure", "-O", "cue", "--size", "0"],
        1,
        "a disc of 0 sectors",
    );
}

#[test]
fn a_track_by_itself_has_no_pause_before_it() {
    let (files, _, [two, _]) = disc();
    files.done(&[
        "convert",
        "-O",
        "cue",
        "--open-options",
        "track=2",
        "x.cue",
        "two.cue",
    ]);
    let sheet = String::from_utf8(files.read("two.cue")).expect("is text");
    assert!(
        !sheet.contains("GAP") && sheet.contains("INDEX 01 00:00:00"),
        "{sheet}"
    );
    assert!(files.read("two.bin") == two);
}

#[test]
fn a_sheet_that_could_not_be_read_again_is_not_written() {
    let (files, _) = Files::mode1("cue-long", 5);
    let mut text = files.read("x.cue");
    text.extend(format!("REM {}\n", "x".repeat(195)).repeat(5200).bytes());
    files.write("x.cue", &text);
    files.done(&["info", "x.cue"]);
    files.fails(
        &["convert", "-O", "cue", "x.cue", "new.cue"],
        1,
        "a sheet of ",
    );
    assert!(!files.file("new.cue").exists() && !files.file("new.bin").exists());
}

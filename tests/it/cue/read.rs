//! Sheets of all kinds: where their tracks lie, and what the disk reads as.

use serde_json::json;
use vdtool::image::disc::Form;

use super::made::{Files, cut, sectors, swapped, wave};
use crate::util::Seeded;

fn one_track(mode: &str) -> String {
    format!("FILE x.bin BINARY\n  TRACK 01 {mode}\n    INDEX 01 00:00:00\n")
}

#[test]
fn the_data_is_the_same_however_its_sectors_are_stored() {
    let mut rng = Seeded::new("cue-modes");
    let cases = [
        ("MODE1/2048", Form::Mode1, 16..2064),
        ("MODE1/2352", Form::Mode1, 0..2352),
        ("MODE2/2048", Form::Form1, 24..2072),
        ("MODE2/2336", Form::Form1, 16..2352),
        ("MODE2/2352", Form::Form1, 0..2352),
        ("CDI/2336", Form::Form1, 16..2352),
        ("CDI/2352", Form::Form1, 0..2352),
        // Sheets that say the wrong mode: the sectors know better.
        ("MODE2/2352", Form::Mode1, 0..2352),
        ("MODE1/2352", Form::Form1, 0..2352),
    ];
    for (mode, form, window) in cases {
        let (bin, user) = sectors(&mut rng, form, 0, 300);
        let bin = cut(&bin, window);
        let files = Files::new(&[("x.cue", one_track(mode).as_bytes()), ("x.bin", &bin)]);
        assert!(files.disk(&["--verify"]) == user, "{mode}");
        let info = files.json(&["info", "--output", "json", "x.cue"]);
        assert_eq!(info["virtual-size"], 300 * 2048, "{mode}");
        let size = mode
            .split_once('/')
            .expect("has one")
            .1
            .parse::<u64>()
            .expect("is one");
        assert_eq!(bin.len() as u64, 300 * size);
        files.done(&["compare", "x.cue", "out.iso"]);
        // Reads that begin and end anywhere.
        files.write("part", &user[5000..15_000]);
        files.done(&["dd", "if=x.cue", "of=some", "bs=5000", "skip=1", "count=2"]);
        assert!(files.read("some") == files.read("part"), "{mode}");
    }
}

#[test]
fn a_file_of_sectors_without_a_sheet_is_read_by_their_size() {
    let mut rng = Seeded::new("cue-bare");
    for (form, window, sector) in [
        (Form::Mode1, 0..2352, "2352"),
        (Form::Form1, 0..2352, "2352"),
        (Form::Mode1, 16..2064, "2048"),
        (Form::Form1, 16..2352, "2336"),
        (Form::Audio, 0..2352, "2352"),
    ] {
        let (bin, user) = sectors(&mut rng, form, 0, 20);
        let files = Files::new(&[("x.bin", &cut(&bin, window))]);
        let option = format!("sector={sector}");
        // The sound of a disc begins like no data.
        let words = [
            "convert",
            "-f",
            "cue",
            "--open-options",
            &option,
            "x.bin",
            "out.raw",
        ];
        match form {
            Form::Audio => files.fails(&words, 63, "track=N"),
            _ => {
                files.done(&words);
                assert!(files.read("out.raw") == user, "{form:?}");
            }
        }
        let option = format!("{option},track=1");
        files.done(&[
            "convert",
            "-f",
            "cue",
            "--open-options",
            &option,
            "x.bin",
            "out.raw",
        ]);
        assert!(files.read("out.raw") == user, "{form:?}");
    }
    let files = Files::new(&[("x.bin", &[0; 2352])]);
    files.fails(&["info", "-f", "cue", "x.bin"], 1, "sector=2352");
    let wrong = ["info", "-f", "cue", "--open-options", "sector=512", "x.bin"];
    files.fails(&wrong, 1, "allowed: 2048, 2324, 2336, 2352, 2448");
}

/// Data, then sound in a file of the other order, and sound in a file with a head: with pauses of
/// both kinds.
fn mixed(rng: &mut Seeded) -> (Files, Vec<u8>, Vec<u8>, Vec<u8>) {
    let (data, user) = sectors(rng, Form::Mode1, 0, 400);
    let (_, two) = sectors(rng, Form::Audio, 0, 200);
    let (_, three) = sectors(rng, Form::Audio, 0, 310);
    let sheet = "\u{feff}REM DATE 1999\r\nCATALOG 0000012101954\r\nTITLE \"A disc\"\r\n\
        FILE \"x.bin\" BINARY\r\n  TRACK 01 MODE1/2352\r\n    INDEX 01 00:00:00\r\n    POSTGAP 00:01:00\r\n\
        FILE \"two.bin\" MOTOROLA\r\n  TRACK 02 AUDIO\r\n    FLAGS DCP\r\n    ISRC ABCDE1234567\r\n    PREGAP 00:02:00\r\n    INDEX 01 00:00:00\r\n\
        FILE \"three.wav\" WAVE\r\n  TRACK 03 AUDIO\r\n    INDEX 00 00:00:00\r\n    INDEX 01 00:02:10\r\n    INDEX 02 00:03:00\r\n";
    let files = Files::new(&[
        ("x.cue", sheet.as_bytes()),
        ("x.bin", &data),
        ("two.bin", &swapped(&two)),
        ("three.wav", &wave(&three)),
    ]);
    (files, user, two, three)
}

#[test]
fn tracks_lie_where_pauses_and_files_before_them_put_them() {
    let (files, user, two, three) = mixed(&mut Seeded::new("cue-mixed"));
    let tracks = files.tracks();
    let row = |number: usize| {
        let track = &tracks[number - 1];
        json!([track["mode"], track["lba"], track["msf"], track["sectors"]])
    };
    assert_eq!(row(1), json!(["MODE1/2352", 0, "00:02:00", 400]));
    assert_eq!(row(2), json!(["AUDIO", 625, "00:10:25", 200]));
    assert_eq!(row(3), json!(["AUDIO", 985, "00:15:10", 150]));
    assert_eq!(tracks[1]["flags"], "DCP");
    assert_eq!(tracks[1]["isrc"], "ABCDE1234567");
    assert_eq!(tracks[2]["offset"], 44 + 160 * 2352);
    let text = files.done(&["info", "x.cue"]);
    assert!(
        text.contains("track 3:") && text.contains("msf 00:15:10"),
        "{text}"
    );
    // The disk is the data; other tracks when they are asked for.
    assert!(files.disk(&[]) == user);
    assert!(files.disk(&["--open-options", "track=2"]) == two);
    assert!(files.disk(&["--open-options", "track=3"]) == three[160 * 2352..]);
    files.fails(
        &["convert", "--open-options", "track=4", "x.cue", "o.iso"],
        1,
        "1 to 3",
    );
}

#[test]
fn the_disk_ends_where_the_pause_of_the_next_track_begins() {
    let mut rng = Seeded::new("cue-end");
    let (data, user) = sectors(&mut rng, Form::Mode1, 0, 100);
    let (sound, _) = sectors(&mut rng, Form::Audio, 0, 250);
    let sheet = "FILE x.bin BINARY\nTRACK 01 MODE1/2352\nINDEX 01 00:00:00\nTRACK 02 AUDIO\nINDEX 00 00:01:25\nINDEX 01 00:03:25\n";
    let bin = [data, sound].concat();
    let files = Files::new(&[("x.cue", sheet.as_bytes()), ("x.bin", &bin)]);
    assert!(files.disk(&[]) == user);
    let tracks = files.tracks();
    assert_eq!(
        (&tracks[1]["lba"], &tracks[1]["pregap"]),
        (&json!(250), &json!(150))
    );
    let map = files.json(&["map", "--output", "json", "x.cue"]);
    let [extent] = &**map.as_array().expect("a list") else {
        panic!("one extent: {map}");
    };
    assert_eq!(
        (&extent["start"], &extent["length"]),
        (&json!(0), &json!(204_800))
    );
    assert_eq!(
        (&extent["offset"], &extent["filename"]),
        (&json!(0), &json!("x.bin"))
    );
    let map = files.json(&[
        "map",
        "--output",
        "json",
        "--open-options",
        "track=2",
        "x.cue",
    ]);
    assert_eq!(
        (&map[0]["offset"], &map[0]["length"]),
        (&json!(250 * 2352), &json!(235_200))
    );
}

#[test]
fn sessions_are_told_and_lie_apart() {
    let mut rng = Seeded::new("cue-sessions");
    let (sound, _) = sectors(&mut rng, Form::Audio, 0, 100);
    let (data, user) = sectors(&mut rng, Form::Form1, 11_500, 50);
    let sheet = "REM SESSION 01\nFILE a.bin BINARY\nTRACK 01 AUDIO\nINDEX 01 00:00:00\nREM LEAD-OUT 00:03:25\nREM SESSION 02\nREM LEAD-IN 01:00:00\nFILE b.bin BINARY\nTRACK 02 MODE2/2352\nINDEX 01 00:00:00\n";
    let files = Files::new(&[
        ("x.cue", sheet.as_bytes()),
        ("a.bin", &sound),
        ("b.bin", &data),
    ]);
    let tracks = files.tracks();
    let sessions: Vec<_> = tracks.iter().map(|t| t["session"].clone()).collect();
    assert_eq!(sessions, [1, 2]);
    assert_eq!(tracks[1]["lba"], 11_500);
    assert!(files.disk(&[]) == user);
    // The headers agree with that place.
    let report = files.json(&["check", "--output", "json", "x.cue"]);
    assert_eq!(report["findings"], json!([]));
}

#[test]
fn names_are_as_written_or_the_only_ones_that_differ_in_case() {
    let (files, user) = Files::mode1("cue-case", 20);
    std::fs::rename(files.file("x.bin"), files.file("X.Bin")).expect("renames");
    assert!(files.disk(&[]) == user);
    files.write("x.BIN", b"another");
    files.fails(
        &["convert", "x.cue", "out.iso"],
        1,
        "differ from it in case alone",
    );
    std::fs::rename(files.file("X.Bin"), files.file("x.bin")).expect("renames");
    assert!(files.disk(&[]) == user);
}

#[test]
fn a_sheet_is_known_by_its_content_and_its_name_together() {
    let (files, _) = Files::mode1("cue-probe", 3);
    let format = |name: &str| files.json(&["info", "--output", "json", name])["format"].clone();
    assert_eq!(format("x.cue"), "cue");
    std::fs::copy(files.file("x.cue"), files.file("x.txt")).expect("copies");
    assert_eq!(format("x.txt"), "raw");
    files.write("y.cue", &[7; 4096]);
    assert_eq!(format("y.cue"), "raw");
    files.write("z.CUE", &files.read("x.cue"));
    assert_eq!(format("z.CUE"), "cue");
    let info = files.json(&["info", "-f", "cue", "--output", "json", "x.txt"]);
    assert_eq!(info["virtual-size"], 3 * 2048);
}

#[test]
fn sound_alone_is_no_disk_unless_it_is_asked_for() {
    let (_, sound) = sectors(&mut Seeded::new("cue-sound"), Form::Audio, 0, 10);
    // A WAVE file that ends within a sector.
    let wave = wave(&sound[..sound.len() - 100]);
    let sheet = b"FILE a.wav WAVE\nTRACK 01 AUDIO\nINDEX 01 00:00:00\n";
    let files = Files::new(&[("x.cue", sheet), ("a.wav", &wave)]);
    assert_eq!(files.tracks()[0]["sectors"], 10);
    files.fails(&["convert", "x.cue", "out.raw"], 63, "no track with data");
    let mut expected = sound;
    let end = expected.len() - 100;
    expected[end..].fill(0);
    assert!(files.disk(&["--open-options", "track=1"]) == expected);
}

#[test]
fn map_shows_where_every_index_of_every_track_lies() {
    let mut rng = Seeded::new("cue-map");
    let data = sectors(&mut rng, Form::Mode1, 0, 10).0;
    let sound = sectors(&mut rng, Form::Audio, 0, 200).1;
    let sheet = "FILE a.bin BINARY\nTRACK 01 MODE1/2352\nINDEX 01 00:00:00\nFILE b.bin BINARY\nTRACK 02 AUDIO\nPREGAP 00:00:05\nINDEX 00 00:00:00\nINDEX 01 00:02:00\n";
    let files = Files::new(&[
        ("x.cue", sheet.as_bytes()),
        ("a.bin", &data),
        ("b.bin", &sound),
    ]);
    let rows = |words: &[&str]| -> Vec<String> {
        let text = files.done(words);
        let (_, tracks) = text.split_once("\n\n").expect("has tracks");
        let lines = tracks.lines().skip(1);
        lines
            .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect()
    };
    let expected = [
        "01 01 0 10 0x0 a.bin",
        "02 00 10 5 - -",
        "02 00 15 150 0x0 b.bin",
        "02 01 165 50 0x56220 b.bin",
    ];
    assert_eq!(rows(&["map", "x.cue"]), expected);
    // Without data there is no disk.
    let sheet = "FILE b.bin BINARY\nTRACK 01 AUDIO\nINDEX 01 00:00:00\n";
    files.write("y.cue", sheet.as_bytes());
    assert_eq!(rows(&["map", "y.cue"]), ["01 01 0 200 0x0 b.bin"]);
    assert_eq!(
        files.json(&["map", "--output", "json", "y.cue"]),
        serde_json::json!([])
    );
}

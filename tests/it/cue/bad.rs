//! Sheets and files that are wrong, or mean harm.

use std::fmt::Write as _;

use vdtool::image::disc::{Form, RAW};

use super::made::{Files, sectors};
use crate::util::Seeded;

const SHEET: &str = "FILE x.bin BINARY\nTRACK 01 MODE1/2352\nINDEX 01 00:00:00\n";

/// All that reads an image refuses this one in a moment, and says why.
fn refused(sheet: &str, bin: &[u8], part: &str) {
    let files = Files::new(&[("x.cue", sheet.as_bytes()), ("x.bin", bin)]);
    for words in [
        &["info", "x.cue"][..],
        &["check", "x.cue"],
        &["map", "x.cue"],
        &["convert", "x.cue", "out.iso"],
    ] {
        files.fails(words, 1, part);
    }
    assert!(!files.file("out.iso").exists());
}

#[test]
fn sheets_that_are_too_long_or_have_too_much_in_them_are_refused() {
    let bin = [0; 10 * RAW];
    refused(
        &format!("{SHEET}{}", "REM x\n".repeat(3 << 20)),
        &bin,
        "allowed: 1048576",
    );
    refused(
        &format!("{SHEET}{}", " ".repeat(16 << 20)),
        &bin,
        "allowed: 1048576",
    );
    let mut text = "FILE x.bin BINARY\n".to_owned();
    for n in 1..=10_000 {
        let _ = write!(text, "TRACK {n:02} AUDIO\nINDEX 01 00:00:00\n");
    }
    refused(&text, &bin, "0 to 99");
    refused(
        &format!("{}{SHEET}", "FILE x.bin BINARY\n".repeat(9000)),
        &bin,
        "one more file",
    );
}

#[test]
fn indexes_and_files_that_do_not_fit_each_other_are_refused() {
    let bin = vec![0; 10 * RAW];
    refused(
        "FILE x.bin BINARY\nTRACK 01 MODE1/2352\nINDEX 01 -1:00:00",
        &bin,
        "no time",
    );
    refused(
        "FILE x.bin BINARY\nTRACK 01 MODE1/2352\n",
        &bin,
        "no INDEX 01",
    );
    let second = "TRACK 02 AUDIO\nINDEX 01 00:00:01\nTRACK 03 AUDIO\nINDEX 01 00:00:00";
    refused(&format!("{SHEET}{second}"), &bin, "before the one above");
    refused(
        &format!("{SHEET}TRACK 02 AUDIO\nINDEX 01 9999:00:00"),
        &bin,
        "which ends at",
    );
    refused(SHEET, &bin[..10 * RAW - 1], "2351 bytes (allowed: 2352)");
    refused(SHEET, &[], "no sectors");
    refused(
        &SHEET
            .replace("BINARY", "WAVE")
            .replace("MODE1/2352", "AUDIO"),
        &bin,
        "no WAVE file",
    );
    let files = Files::new(&[("x.cue", SHEET.replace("BINARY", "FLAC").as_bytes())]);
    files.fails(&["info", "x.cue"], 63, "type 'FLAC'");
    refused("TITLE x\n", &bin, "has no track");
    refused(&format!("{SHEET}FROB"), &bin, "line 4: 'FROB' is no word");
}

#[test]
fn files_that_are_missing_or_elsewhere_are_refused() {
    let bin = [0; RAW];
    refused(
        &SHEET.replace("x.bin", "y.bin"),
        &bin,
        "names 'y.bin' as its file (line 1), which is not there",
    );
    for name in ["../x.bin", "/etc/hostname", "../../../../etc/hostname"] {
        refused(&SHEET.replace("x.bin", name), &bin, "");
    }
    let (files, user) = Files::mode1("cue-outside", 5);
    std::fs::create_dir(files.file("in")).expect("makes");
    std::fs::rename(files.file("x.cue"), files.file("in/x.cue")).expect("renames");
    let sheet = SHEET.replace("x.bin", "../x.bin");
    files.write("in/x.cue", sheet.as_bytes());
    files.fails(&["convert", "in/x.cue", "out.iso"], 1, "--allow-ref");
    files.done(&["convert", "--allow-ref", "x.bin", "in/x.cue", "out.iso"]);
    assert!(files.read("out.iso") == user);
    // Links lead out as well, and a pipe would never end.
    std::os::unix::fs::symlink("../x.bin", files.file("in/x.bin")).expect("links");
    files.write("in/x.cue", SHEET.as_bytes());
    files.fails(&["info", "in/x.cue"], 1, "--allow-ref");
    files.write("in/y.cue", SHEET.replace("x.bin", "y.cue").as_bytes());
    files.fails(&["info", "in/y.cue"], 1, "names itself");
    let fifo = std::process::Command::new("mkfifo")
        .arg(files.file("in/z.bin"))
        .status();
    assert!(fifo.expect("runs").success());
    files.write("in/z.cue", SHEET.replace("x.bin", "z.bin").as_bytes());
    files.fails(&["info", "in/z.cue"], 1, "");
}

#[test]
fn files_of_the_sheet_are_not_replaced_by_what_is_made_of_it() {
    let (files, _) = Files::mode1("cue-kept", 5);
    let before = files.read("x.bin");
    files.fails(&["convert", "x.cue", "x.bin"], 1, "x.bin");
    assert!(files.read("x.bin") == before);
}

#[test]
fn sectors_that_lie_about_themselves_are_errors_by_address() {
    let (mut bin, _) = sectors(&mut Seeded::new("cue-lies"), Form::Mode1, 0, 10);
    // Another mode, no sync pattern, no address.
    bin[2 * RAW + 15] = 2;
    bin[3 * RAW..3 * RAW + 12].fill(0xaa);
    bin[4 * RAW + 12] = 0xff;
    bin[5 * RAW..6 * RAW].fill(0x77);
    let files = Files::new(&[("x.cue", SHEET.as_bytes()), ("x.bin", &bin)]);
    let (code, text, _) = files.run(&["check", "x.cue"]);
    assert_eq!(code, 2);
    for lba in 2..6 {
        assert!(text.contains(&format!("sector {lba} ")), "{text}");
    }
    files.fails(&["convert", "x.cue", "out.iso"], 1, "cannot be read: 5 ");
}

#[test]
fn encodings_that_have_ascii_in_them_are_read_and_others_are_refused() {
    let (files, user) = Files::mode1("cue-encoding", 5);
    let sheet = SHEET.replace('\n', "\r");
    let latin = [
        b"\xef\xbb\xbfTITLE \"caf\xe9\"\r".as_slice(),
        sheet.as_bytes(),
    ];
    files.write("x.cue", &latin.concat());
    assert!(files.disk(&[]) == user);
    let name = std::os::unix::ffi::OsStrExt::as_bytes(std::ffi::OsStr::new("caf"));
    let mut name = name.to_vec();
    name.extend(b"\xe9.bin");
    let path = files
        .path()
        .join(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(&name));
    std::fs::rename(files.file("x.bin"), path).expect("renames");
    let sheet = [
        b"FILE \"".as_slice(),
        &name,
        b"\" BINARY\nTRACK 01 MODE1/2352\nINDEX 01 00:00:00\n",
    ];
    files.write("x.cue", &sheet.concat());
    assert!(files.disk(&[]) == user);
    let wide: Vec<u8> = SHEET.encode_utf16().flat_map(u16::to_le_bytes).collect();
    files.write("x.cue", &[b"\xff\xfe".as_slice(), &wide].concat());
    files.fails(&["info", "-f", "cue", "x.cue"], 1, "");
}

#[test]
fn what_would_change_the_disk_is_refused_by_what_changes_sectors() {
    let (files, _) = Files::mode1("cue-unchanged", 5);
    let before = files.read("x.bin");
    for command in ["write 0 2k", "write -z 0 2k", "discard 0 2k", "truncate 4k"] {
        files.fails(&["io", "-c", command, "x.cue"], 1, "write --parts data");
    }
    files.fails(
        &["resize", "x.cue", "+2k"],
        1,
        "the disk of a disc is read-only",
    );
    let command = "write --parts data --lba 1";
    files.fails(
        &["io", "-r", "-c", command, "x.cue"],
        1,
        "is open read-only",
    );
    assert!(files.read("x.bin") == before);
}

#[test]
fn texts_of_a_sheet_do_nothing_to_a_terminal() {
    let (files, _) = Files::mode1("cue-escape", 5);
    let name = "e\u{1b}[31m.bin";
    files.write(name, &files.read("x.bin"));
    let sheet = format!(
        "CATALOG \u{1b}[2J\nTITLE \u{1b}[31m\nFILE \"{name}\" BINARY\nTRACK 01 MODE1/2352\nISRC \u{7}x\nINDEX 01 00:00:00\n"
    );
    files.write("x.cue", sheet.as_bytes());
    files.damage(name, [500]);
    for words in [&["info"][..], &["map"], &["check"], &["chain"]] {
        let (_, out, errors) = files.run(&[words, &["x.cue"]].concat());
        let is_plain = |text: &str| text.chars().all(|c| c == '\n' || !c.is_control());
        assert!(
            is_plain(&out) && is_plain(&errors),
            "{words:?}: {out}{errors}"
        );
    }
    // In JSON they are what they are.
    let info = files.json(&["info", "--output", "json", "x.cue"]);
    assert_eq!(info["format-specific"]["data"]["catalog"], "\u{1b}[2J");
    let wrong = sheet.replace("MODE1/2352", "\u{1b}[31m");
    files.write("x.cue", wrong.as_bytes());
    files.fails(&["info", "x.cue"], 1, "of mode '\\u{1b}[31m'");
}

//! Formats that vdtool knows and does not have: answered by name, everywhere they can be named, and
//! never taken for raw.

use std::fs;
use std::path::Path;

use vdtool::formats::{DRIVERS, refused};

use crate::util::{scratch, vdtool};

/// Runs vdtool, which must exit with 63 and name `format` in its one line.
fn refuses(directory: &Path, arguments: &[&str], format: &str) {
    let done = vdtool().current_dir(directory).args(arguments).assert();
    let done = done.code(63);
    let text = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
    let named = format!("'{format}'");
    assert!(text.contains(&named), "{arguments:?}: {text}");
    assert_eq!(text.lines().count(), 1, "{arguments:?}: {text}");
    assert!(!text.contains("unknown format"), "{arguments:?}: {text}");
}

fn works(directory: &Path, arguments: &[&str]) {
    let mut command = vdtool();
    command
        .current_dir(directory)
        .args(arguments)
        .assert()
        .success();
}

/// A directory with a qcow2 image, one upon it, and what both are.
fn images() -> tempfile::TempDir {
    let scratch = scratch();
    let dir = scratch.path();
    works(dir, &["create", "-q", "a.qcow2", "1M"]);
    let upon = ["create", "-q", "-b", "a.qcow2", "-F", "qcow2", "b.qcow2"];
    works(dir, &upon);
    scratch
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("reads");
    let name = |e: std::io::Result<fs::DirEntry>| {
        e.expect("reads").file_name().to_string_lossy().into_owned()
    };
    let mut names: Vec<String> = entries.map(name).collect();
    names.sort();
    names
}

#[test]
fn every_option_that_takes_a_format_knows_those_that_are_not_supported() {
    let scratch = images();
    let dir = scratch.path();
    let before = fs::read(dir.join("b.qcow2")).expect("reads");
    for name in ["parallels", "qed"] {
        for arguments in [
            &["info", "-f", name, "a.qcow2"][..],
            &["map", "-f", name, "a.qcow2"],
            &["check", "-f", name, "a.qcow2"],
            &["compare", "-f", name, "a.qcow2", "b.qcow2"],
            &["compare", "-F", name, "a.qcow2", "b.qcow2"],
            &["measure", "-O", name, "--size", "1M"],
            &["measure", "-f", name, "a.qcow2"],
            &["convert", "-f", name, "a.qcow2", "new.raw"],
            &["convert", "-O", name, "a.qcow2", "new.raw"],
            &[
                "convert",
                "-B",
                "a.qcow2",
                "-F",
                name,
                "a.qcow2",
                "new.qcow2",
            ],
            &["create", "-f", name, "new.raw", "1M"],
            &["create", "-b", "a.qcow2", "-F", name, "new.qcow2"],
            &[
                "create",
                "-o",
                &format!("backing_file=a.qcow2,backing_fmt={name}"),
                "new.qcow2",
            ],
            &["rebase", "-u", "-b", "a.qcow2", "-F", name, "b.qcow2"],
            &["rebase", "-b", "a.qcow2", "-F", name, "b.qcow2"],
            &["commit", "-f", name, "b.qcow2"],
            &["resize", "-f", name, "b.qcow2", "2M"],
            &["snapshot", "-f", name, "-l", "b.qcow2"],
            &["bitmap", "-f", name, "--add", "b.qcow2", "x"],
            &["amend", "-f", name, "-o", "compat=1.1", "b.qcow2"],
            &["serve", "-f", name, "--nbd", "unix:socket", "a.qcow2"],
            &["io", "-f", name, "-c", "read 0 512", "a.qcow2"],
            &["dd", "-f", name, "if=a.qcow2", "of=new.raw"],
            &["dd", "-O", name, "if=a.qcow2", "of=new.raw"],
            &["bench", "-f", name, "-c", "1", "a.qcow2"],
            &["info", "--backing-format", name, "b.qcow2"],
        ] {
            refuses(dir, arguments, name);
        }
        let open = format!("open -o driver={name} a.qcow2");
        let done = vdtool().current_dir(dir).args(["io", "-c", &open]).assert();
        let text = String::from_utf8_lossy(&done.code(1).get_output().stderr).into_owned();
        assert!(text.contains("not supported"), "{text}");
    }
    assert_eq!(names(dir), ["a.qcow2", "b.qcow2"]);
    assert_eq!(fs::read(dir.join("b.qcow2")).expect("reads"), before);
}

#[test]
fn every_name_of_such_a_format_is_answered_by_the_format() {
    let scratch = images();
    let dir = scratch.path();
    let contract = [
        "qcow",
        "qed",
        "parallels",
        "luks",
        "dmg",
        "cloop",
        "bochs",
        "android-sparse",
    ];
    for name in contract {
        assert!(refused::by_name(name).is_some(), "{name}");
    }
    let mut names = Vec::new();
    for format in refused::all() {
        for name in [format.name].iter().chain(format.aliases) {
            let error = vdtool::formats::named(name).expect_err(name);
            assert!(error.to_string().contains(format.name), "{error}");
            assert!(DRIVERS.iter().all(|d| !d.is_called(name)), "{name}");
            names.push(*name);
        }
        refuses(dir, &["info", "-f", format.name, "a.qcow2"], format.name);
    }
    let all = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), all, "a name stands for one format");
}

#[test]
fn a_target_whose_extension_stands_for_such_a_format_is_not_written_as_raw_by_accident() {
    let scratch = images();
    let dir = scratch.path();
    for format in refused::all() {
        for extension in format.extensions {
            assert!(vdtool::formats::by_extension(extension).is_none());
            let found = refused::by_extension(&extension.to_uppercase());
            assert_eq!(found.map(|f| f.name), Some(format.name));
        }
    }
    for (target, format) in [
        ("x.QED", "qed"),
        ("x.vhds", "vhds"),
        ("x.hdd", "parallels"),
        ("x.raw.gz", "gzip"),
    ] {
        refuses(dir, &["convert", "a.qcow2", target], format);
        refuses(dir, &["create", target, "1M"], format);
        refuses(dir, &["dd", "if=a.qcow2", &format!("of={target}")], format);
        fs::write(dir.join(target), [7; 512]).expect("writes");
        refuses(dir, &["convert", "-n", "a.qcow2", target], format);
        assert_eq!(fs::read(dir.join(target)).expect("reads"), [7; 512]);
        fs::remove_file(dir.join(target)).expect("removes");
    }
    assert_eq!(names(dir), ["a.qcow2", "b.qcow2"]);
    // Whoever says raw gets raw.
    works(dir, &["convert", "-O", "raw", "a.qcow2", "x.qed"]);
    works(dir, &["create", "-q", "-f", "raw", "y.qed", "1M"]);
    assert_eq!(
        fs::metadata(dir.join("x.qed")).expect("is there").len(),
        1 << 20
    );
}

/// The beginnings and ends that say which format it is; the length of the file where it counts.
fn samples() -> Vec<(&'static str, Vec<u8>, Vec<u8>)> {
    let mut tar = vec![0; 512];
    tar[..10].copy_from_slice(b"member.ovf");
    tar[124..135].copy_from_slice(b"00000000000");
    tar[148..156].fill(b' ');
    tar[156] = b'0';
    tar[257..265].copy_from_slice(b"ustar\x0000");
    let with_sum = |mut header: Vec<u8>| {
        let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        header
    };
    let mut xva = tar.clone();
    xva[..10].copy_from_slice(b"ova.xml\0\0\0");
    let mut plain = tar.clone();
    plain[..10].copy_from_slice(b"disk.raw\0\0");
    let head = |bytes: &[u8]| bytes.to_vec();
    let xml = "<?xml version='1.0' encoding='UTF-8'?>\n<!DOCTYPE x>\n";
    let mut samples = vec![
        ("qcow", head(b"QFI\xfb\0\0\0\x01"), vec![]),
        ("qed", head(b"QED\0"), vec![]),
        ("parallels", head(b"WithoutFreeSpace"), vec![]),
        ("parallels", head(b"WithouFreSpacExt"), vec![]),
        (
            "parallels",
            format!("{xml}<Parallels_disk_image Version=\"1.0\">").into(),
            vec![],
        ),
        ("luks", head(b"LUKS\xba\xbe\0\x01"), vec![]),
        ("dmg", head(b"anything"), b"koly\0\0\0\x04".to_vec()),
        ("dmg-encrypted", head(b"encrcdsa\0\0\0\x02"), vec![]),
        (
            "cloop",
            head(b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0"),
            vec![],
        ),
        ("bochs", head(b"Bochs Virtual HD Image\0"), vec![]),
        (
            "bochs-sparse",
            0x0246_8ace_u32.to_le_bytes().to_vec(),
            vec![],
        ),
        (
            "android-sparse",
            0xed26_ff3a_u32.to_le_bytes().to_vec(),
            vec![],
        ),
        ("xva", with_sum(xva), vec![]),
        ("tar", with_sum(plain), vec![]),
        ("asif", head(b"shdw\0\0\0\x01\0\0\x02\0"), vec![]),
        ("sparseimage", head(b"sprs\0\0\0\x03"), vec![]),
        ("vma", head(b"VMA\0\0\0\0\x01"), vec![]),
        ("gzip", head(&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3]), vec![]),
        ("bzip2", head(b"BZh91AY&SY"), vec![]),
        ("xz", head(b"\xfd7zXZ\0"), vec![]),
        ("zstd", head(&[0x28, 0xb5, 0x2f, 0xfd]), vec![]),
        ("zip", head(b"PK\x03\x04"), vec![]),
        ("ewf", head(b"EVF\t\r\n\xff\0"), vec![]),
        ("chd", head(b"MComprHD"), vec![]),
        ("page", head(b"\n<!DOCTYPE html>"), vec![]),
        (
            "git-lfs",
            head(b"version https://git-lfs.github.com/spec/v1\n"),
            vec![],
        ),
    ];
    let mut end = vec![0; 512];
    end[504..].copy_from_slice(b"cdsaencr");
    samples.push(("dmg-encrypted", vec![], end));
    let mut end = vec![0; 512];
    end[500..504].copy_from_slice(b"NER5");
    samples.push(("nrg", vec![], end));
    samples
}

/// A file of 64 KiB that begins and ends with these bytes.
fn file(path: &Path, head: &[u8], tail: &[u8]) {
    let mut bytes = vec![0; 64 << 10];
    bytes[..head.len()].copy_from_slice(head);
    let end = bytes.len() - 512;
    bytes[end..end + tail.len()].copy_from_slice(tail);
    fs::write(path, bytes).expect("writes");
}

#[test]
fn such_a_format_is_known_by_its_bytes() {
    let scratch = images();
    let dir = scratch.path();
    for (format, head, tail) in samples() {
        file(&dir.join("image"), &head, &tail);
        refuses(dir, &["info", "image"], format);
    }
    // One of them with every command that reads.
    for arguments in [
        &["map", "image"][..],
        &["check", "image"],
        &["compare", "image", "a.qcow2"],
        &["compare", "a.qcow2", "image"],
        &["measure", "image"],
        &["convert", "image", "new.raw"],
        &["create", "-b", "image", "new.qcow2"],
        &["rebase", "-b", "image", "b.qcow2"],
        &["resize", "image", "2M"],
        &["snapshot", "-l", "image"],
        &["amend", "-o", "compat=1.1", "image"],
        &["serve", "--nbd", "unix:socket", "image"],
        &["io", "-c", "read 0 512", "image"],
        &["dd", "if=image", "of=new.raw"],
        &["bench", "-c", "1", "image"],
    ] {
        file(&dir.join("image"), b"QED\0", &[]);
        refuses(dir, arguments, "qed");
        works(dir, &["info", "-f", "raw", "image"]);
    }
    assert_eq!(names(dir), ["a.qcow2", "b.qcow2", "image"]);
}

#[test]
fn what_only_resembles_such_a_format_stays_raw() {
    let scratch = images();
    let dir = scratch.path();
    let is_raw = |what: &str| {
        let done = vdtool().current_dir(dir).args(["info", "image"]).assert();
        let text = String::from_utf8_lossy(&done.success().get_output().stdout).into_owned();
        assert!(text.contains("raw"), "{what}: {text}");
    };
    for (format, head, tail) in samples() {
        // One byte later, where it begins with something of its own and is not lines of text.
        if !tail.is_empty() || head.starts_with(b"\n") {
            continue;
        }
        let shifted: Vec<u8> = [1].into_iter().chain(head.iter().copied()).collect();
        file(&dir.join("image"), &shifted, &[]);
        is_raw(format);
    }
    for (what, head) in [
        ("gzip of another method", &[0x1f, 0x8b, 7, 0][..]),
        ("notes", b"version=1 of my notes"),
        (
            "text that speaks of files",
            b"FILE a list of things\nTRACK them\n",
        ),
        ("asif of another version", b"shdw\0\0\0\0"),
        ("Java", &[0xca, 0xfe, 0xba, 0xbe]),
        ("bzip2's first letters", b"BZh9"),
        ("an empty disk", b""),
    ] {
        file(&dir.join("image"), head, &[]);
        is_raw(what);
    }
    // A disk with partitions whose boot code begins as something else does.
    let mut disk = vec![0; 512];
    disk[..4].copy_from_slice(b"PK\x03\x04");
    disk[446 + 4] = 0x83;
    disk[510..].copy_from_slice(&[0x55, 0xaa]);
    file(&dir.join("image"), &disk, &[]);
    is_raw("boot code");
}

#[test]
fn a_backing_file_recorded_as_of_such_a_format_is_refused_by_its_name() {
    let scratch = images();
    let dir = scratch.path();
    let mut bytes = fs::read(dir.join("b.qcow2")).expect("reads");
    let at = bytes
        .windows(5)
        .position(|w| w == b"qcow2")
        .expect("is recorded");
    bytes[at..at + 5].copy_from_slice(b"qed\0\0");
    bytes[at - 1] = 3;
    fs::write(dir.join("b.qcow2"), bytes).expect("writes");
    refuses(dir, &["map", "b.qcow2"], "qed");
}

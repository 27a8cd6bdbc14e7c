//! Appliances that nobody should make: a named bound, one line, nothing written.

use super::*;

/// Reading the only disk fails with this in its one line, and leaves nothing.
fn refused(dir: &Path, part: &str, code: i32) {
    for line in [
        &["convert", "-f", "ova", "x.ova", "out.raw"][..],
        &["convert", "-f", "ova", "--no-manifest", "x.ova", "out.raw"],
    ] {
        let text = fails(dir, line, code);
        assert!(text.contains(part), "{part}: {text}");
        assert!(!dir.join("out.raw").exists(), "{part}");
    }
}

fn ovf(name: &str, more: &str) -> Vec<u8> {
    let text = descriptor(&[(name, 1024, more)]);
    member("x.ovf", b'0', text.as_bytes())
}

#[test]
fn links_sparse_members_and_second_members_are_refused_by_name() {
    let scratch = scratch();
    let dir = scratch.path();
    let secret = dir.join("secret");
    fs::write(&secret, [7; 1024]).expect("writes");
    for letter in [b'1', b'2', b'3', b'4', b'5', b'6'] {
        let mut link = header("d.raw", letter, b"00000000000");
        let target = secret.to_str().expect("is text");
        link[157..157 + target.len()].copy_from_slice(target.as_bytes());
        archive(dir, "x.ova", &[ovf("d.raw", ""), summed(link).to_vec()]);
        refused(dir, "'d.raw' is", 63);
    }
    archive(
        dir,
        "x.ova",
        &[ovf("d.raw", ""), member("d.raw", b'S', &[7; 1024])],
    );
    refused(dir, "sparse", 63);
    let pax = member("x", b'x', b"22 GNU.sparse.major=1\n");
    archive(
        dir,
        "x.ova",
        &[ovf("d.raw", ""), pax, member("d.raw", b'0', &[7; 1024])],
    );
    refused(dir, "sparse", 63);
    let (one, other) = (
        member("d.raw", b'0', &[7; 1024]),
        member("./d.raw", b'0', &[8; 1024]),
    );
    archive(dir, "x.ova", &[ovf("d.raw", ""), one.clone(), other]);
    refused(dir, "second member 'd.raw'", 1);
    archive(
        dir,
        "x.ova",
        &[ovf("d.raw", ""), member("y.ovf", b'0', b""), one.clone()],
    );
    refused(dir, "'y.ovf'", 1);
    archive(dir, "x.ova", &[one]);
    refused(dir, "no descriptor", 1);
    archive(
        dir,
        "x.ova",
        &[ovf("../secret", ""), member("e.raw", b'0', &[8; 1024])],
    );
    refused(dir, "'../secret'", 1);
    archive(dir, "x.ova", &[ovf("x.ovf", "")]);
    // The descriptor is a file like others, and no disk of whole sectors is asked for.
    works(dir, &["convert", "-f", "ova", "x.ova", "ovf.raw"]);
}

#[test]
fn an_archive_that_was_cut_anywhere_is_an_error() {
    let scratch = scratch();
    let dir = scratch.path();
    let disk = member("d.raw", b'0', &[7; 2000]);
    let manifest = member("x.mf", b'0', b"");
    archive(dir, "whole.ova", &[ovf("d.raw", ""), disk, manifest]);
    works(dir, &["convert", "--no-manifest", "whole.ova", "whole.raw"]);
    let whole = fs::read(dir.join("whole.ova")).expect("reads");
    let end = whole.len() - 1024;
    for len in (512..=end).step_by(256) {
        fs::write(dir.join("x.ova"), &whole[..len]).expect("writes");
        let text = fails(dir, &["convert", "-f", "ova", "x.ova", "out.raw"], 1);
        assert!(
            text.contains("cut") || text.contains("is no tar"),
            "{len}: {text}"
        );
        assert!(!dir.join("out.raw").exists());
        fails(dir, &["info", "-f", "ova", "x.ova"], 1);
    }
}

#[test]
fn descriptors_that_are_bombs_or_lead_elsewhere_open_nothing() {
    let scratch = scratch();
    let dir = scratch.path();
    let disk = member("d.raw", b'0', &[7; 1024]);
    let good = descriptor(&[("d.raw", 1024, "")]);
    let begin = "<Envelope ";
    let with = |text: &str| good.replacen(begin, &format!("{text}{begin}"), 1);
    let lol = "<!DOCTYPE x [<!ENTITY a 'lol'><!ENTITY b '&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;'>\
               <!ENTITY c '&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;'>]>";
    let outside = "<!DOCTYPE x [<!ENTITY a SYSTEM 'file:///etc/passwd'>]>";
    let deep = good.replace("<Info>", &"<a>".repeat(400_000));
    let many = good.replace("<Info>", &("<a/>".repeat(400_000) + "<Info>"));
    let disks = (0..20_000)
        .map(|n| format!("<Disk ovf:diskId='n{n}' ovf:capacity='1'/>"))
        .collect::<String>();
    let disks = good.replace("<Info>Disks</Info>", &disks);
    let large = good.replace("<Info>", &(" ".repeat(17 << 20) + "<Info>"));
    let attributes: String = (0..500_000).map(|n| format!(" a{n}=''")).collect();
    let attributes = good.replace("<Info>", &format!("<b{attributes}/><Info>"));
    let cases = [
        (with(lol), "document type"),
        (with(outside), "document type"),
        (deep, "more than 300000"),
        (many, "more than 300000"),
        (disks, "more than 10000 disks"),
        (large, "allowed: 16777216"),
        (attributes, "more than 256 attributes"),
        (good.replace("</Envelope>", ""), "no well-formed XML"),
        (good.replace("Envelope", "Other"), "<Other>"),
        (
            good.replace("fileRef=\"file0\"", "fileRef=\"x\""),
            "file 'x'",
        ),
        (
            good.replace("d.raw", "file:///etc/passwd"),
            "file:///etc/passwd",
        ),
        (good.replace("d.raw", "http://host/d.raw"), "http://host"),
        (good.replace("d.raw", "/etc/passwd"), "'/etc/passwd'"),
        (good.replace("d.raw", "d%00.raw"), "no name"),
    ];
    for (text, part) in cases {
        let ovf = member("x.ovf", b'0', text.as_bytes());
        archive(dir, "x.ova", &[ovf, disk.clone()]);
        refused(dir, part, 1);
    }
    for (more, part) in [
        ("ovf:compression='lzma'", "'lzma'"),
        ("ovf:chunkSize='100'", "chunkSize"),
    ] {
        archive(dir, "x.ova", &[ovf("d.raw", more), disk.clone()]);
        refused(dir, part, 63);
    }
    let parent = good.replace("capacity=", "parentRef='disk0' ovf:capacity=");
    archive(
        dir,
        "x.ova",
        &[member("x.ovf", b'0', parent.as_bytes()), disk.clone()],
    );
    refused(dir, "disk 'disk0'", 63);
    let empty = good.replace("ovf:fileRef=\"file0\"", "");
    archive(
        dir,
        "x.ova",
        &[member("x.ovf", b'0', empty.as_bytes()), disk],
    );
    refused(dir, "is empty", 63);
}

#[test]
fn disks_that_name_others_stay_in_the_package() {
    let scratch = scratch();
    let dir = scratch.path();
    works(dir, &["create", "-q", "base.qcow2", "1M"]);
    works(
        dir,
        &[
            "create",
            "-q",
            "-b",
            "base.qcow2",
            "-F",
            "qcow2",
            "child.qcow2",
        ],
    );
    works(
        dir,
        &[
            "create",
            "-q",
            "-o",
            "data_file=data.raw",
            "split.qcow2",
            "1M",
        ],
    );
    works(dir, &["io", "-c", "write -P 9 0 64k", "split.qcow2"]);
    let read = |name: &str| fs::read(dir.join(name)).expect("reads");
    let child = member("child.qcow2", b'0', &read("child.qcow2"));
    archive(dir, "x.ova", &[ovf("child.qcow2", ""), child]);
    refused(dir, "another image below it, 'base.qcow2'", 63);
    let split = member("split.qcow2", b'0', &read("split.qcow2"));
    let data = member("data.raw", b'0', &read("data.raw"));
    archive(dir, "y.ova", &[ovf("split.qcow2", ""), split.clone(), data]);
    works(dir, &["convert", "y.ova", "ours.raw"]);
    works(dir, &["compare", "split.qcow2", "ours.raw"]);
    // What lies beside the archive is not in it.
    archive(dir, "x.ova", &[ovf("split.qcow2", ""), split]);
    refused(dir, "'data.raw'", 1);
    // An appliance in an appliance, or another archive, is no disk.
    let inner = member("y.ova", b'0', &read("y.ova"));
    archive(dir, "x.ova", &[ovf("y.ova", ""), inner]);
    refused(dir, "'tar'", 63);
}

#[test]
fn compressed_members_that_are_bombs_or_damaged_are_refused() {
    let scratch = scratch();
    let dir = scratch.path();
    let gz = |bytes: &[u8]| {
        fs::write(dir.join("plain"), bytes).expect("writes");
        let packed = std::process::Command::new("gzip")
            .arg("-c")
            .arg("plain")
            .current_dir(dir)
            .output();
        packed.expect("runs").stdout
    };
    let compressed = "ovf:compression='gzip'";
    let disk = gz(&content("bombs"));
    let mut cases = vec![
        (gz(&vec![0; 200 << 20]), "decompresses to more than"),
        (disk[..disk.len() / 2].to_vec(), "was cut"),
        (
            [&disk[..], b"more"].concat(),
            "something else behind its end",
        ),
        (b"no gzip at all".to_vec(), "not compressed by gzip"),
    ];
    let mut flipped = disk.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 0x55;
    cases.push((flipped, "gzip"));
    for (bytes, part) in cases {
        archive(
            dir,
            "x.ova",
            &[
                ovf("d.raw.gz", compressed),
                member("d.raw.gz", b'0', &bytes),
            ],
        );
        refused(dir, part, 1);
        let text = works(dir, &["info", "x.ova"]);
        assert!(text.contains(part), "{text}");
    }
    // Members of nothing: linear, and no disk.
    let nothing = gz(b"").repeat(100_000);
    archive(
        dir,
        "x.ova",
        &[
            ovf("d.raw.gz", compressed),
            member("d.raw.gz", b'0', &nothing),
        ],
    );
    works(dir, &["convert", "x.ova", "empty.raw"]);
    assert_eq!(
        fs::metadata(dir.join("empty.raw")).expect("is there").len(),
        0
    );
}

#[test]
fn a_manifest_in_another_directory_is_compared_too() {
    let scratch = scratch();
    let dir = scratch.path();
    let (disk, text) = ([7; 1024], descriptor(&[("d.raw", 1024, "")]));
    let digests = |folder: &str, disk: &[u8]| {
        let [text, disk] = [text.as_bytes(), disk].map(|b| hex(&Sha256::digest(b)));
        format!("SHA256({folder}x.ovf)= {text}\nSHA256({folder}d.raw)= {disk}\n")
    };
    for manifest in ["x.mf", "other/x.mf", "s/x.mf", "s/y.mf"] {
        for folder in ["", "s/"] {
            for (sealed, code) in [([7; 1024], 0), ([8; 1024], 1)] {
                let members = [
                    member("s/x.ovf", b'0', text.as_bytes()),
                    member(manifest, b'0', digests(folder, &sealed).as_bytes()),
                    member("s/d.raw", b'0', &disk),
                ];
                archive(dir, "x.ova", &members);
                let line = ["convert", "-q", "-f", "ova", "x.ova", "out.raw"];
                vdtool().current_dir(dir).args(line).assert().code(code);
                assert_eq!(
                    dir.join("out.raw").exists(),
                    code == 0,
                    "{manifest} {folder}"
                );
                let _ = fs::remove_file(dir.join("out.raw"));
            }
        }
    }
}

#[test]
fn records_that_are_to_be_of_all_members_are_refused_as_readers_differ() {
    let scratch = scratch();
    let dir = scratch.path();
    for record in [&b"12 size=512\n"[..], b"14 path=e.raw\n"] {
        let global = member("x", b'g', record);
        let disk = member("d.raw", b'0', &[7; 1024]);
        archive(dir, "x.ova", &[ovf("d.raw", ""), global, disk]);
        refused(dir, "that of all members", 1);
    }
    let global = member("x", b'g', b"15 comment=abc\n");
    let disk = member("d.raw", b'0', &[7; 1024]);
    archive(dir, "x.ova", &[ovf("d.raw", ""), global, disk]);
    works(dir, &["convert", "x.ova", "out.raw"]);
}

#[test]
fn a_disk_that_is_described_as_of_a_format_and_is_of_none_is_not_read_as_raw() {
    let scratch = scratch();
    let dir = scratch.path();
    for uri in [
        "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized",
        "http://www.gnome.org/~markmc/qcow-image-format.html",
        "http://go.microsoft.com/fwlink/?LinkId=137171",
    ] {
        let text = descriptor(&[("d.raw", 1024, "")]);
        let text = text.replace("ovf:diskId", &format!("ovf:format=\"{uri}\" ovf:diskId"));
        let text = member("x.ovf", b'0', text.as_bytes());
        archive(dir, "x.ova", &[text, member("d.raw", b'0', &[7; 1024])]);
        refused(dir, "of no known format", 1);
        let line = ["convert", "--open-options", "format=raw", "x.ova", "raw"];
        works(dir, &line);
    }
}

#[test]
fn a_file_of_many_disks_is_looked_at_and_described_once() {
    let scratch = scratch();
    let dir = scratch.path();
    let files = vec![("d.raw", 1024, ""); 200];
    let text = member("x.ovf", b'0', descriptor(&files).as_bytes());
    archive(dir, "x.ova", &[text, member("d.raw", b'0', &[7; 1024])]);
    let found = info(dir, "x.ova");
    let disks = found["disks"].as_array().expect("a list");
    assert_eq!(disks.len(), 200);
    assert!(
        disks[1..].iter().all(|d| d["same-file-as"] == "disk0"),
        "{found}"
    );
}

#[test]
fn a_disk_over_another_is_refused_beside_a_descriptor_too() {
    let scratch = scratch();
    let dir = scratch.path();
    works(dir, &["create", "-q", "base.qcow2", "1M"]);
    works(
        dir,
        &["create", "-q", "-b", "base.qcow2", "-F", "qcow2", "c.qcow2"],
    );
    fs::write(dir.join("x.ovf"), descriptor(&[("c.qcow2", 1024, "")])).expect("writes");
    // What lies below it is in no manifest.
    let text = fails(dir, &["convert", "x.ovf", "out.raw"], 63);
    assert!(text.contains("'base.qcow2'"), "{text}");
}

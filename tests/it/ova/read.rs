//! Appliances as others make them.

use super::*;
use crate::util::{assert_same, requires};

fn same(directory: &Path, found: &str, number: usize, what: &str) {
    let found = fs::read(directory.join(found)).expect("reads");
    let expected = fs::read(directory.join(format!("{number}.bin"))).expect("reads");
    assert_same(&found, &expected, 0, what);
}

#[test]
fn disks_of_every_format_are_read_out_of_every_flavour_of_tar() {
    let scratch = package();
    let dir = scratch.path();
    for format in ["gnu", "oldgnu", "ustar", "posix", "v7"] {
        tar(dir, "x.ova", format, &ALL);
        for (number, name) in DISKS.iter().enumerate() {
            let by_number = (number + 1).to_string();
            for member in [&*by_number, name, &format!("disk{number}")] {
                works(dir, &["convert", "--member", member, "x.ova", "out.raw"]);
                same(dir, "out.raw", number, format);
            }
        }
    }
    let first = ["d e.vdi", "x.mf", "c.vhd", "b.qcow2", "a.raw", "x.ovf"];
    tar(dir, "y.ova", "gnu", &first);
    works(
        dir,
        &["convert", "-f", "ova", "--member", "4", "y.ova", "out.raw"],
    );
    same(dir, "out.raw", 3, "any order");
    // Names that begin with a directory, and the directory itself.
    fs::create_dir(dir.join("sub")).expect("makes");
    for name in ALL {
        fs::copy(dir.join(name), dir.join("sub").join(name)).expect("copies");
    }
    tar(dir, "z.ova", "posix", &["./sub/x.ovf"]);
    peer(
        "tar",
        dir,
        ["-rf", "z.ova", "sub/x.mf", "sub/a.raw", "sub/b.qcow2"],
    );
    works(dir, &["convert", "--member", "a.raw", "z.ova", "out.raw"]);
    same(dir, "out.raw", 0, "in a directory");
}

#[test]
fn what_is_read_is_what_tar_and_qemu_img_make_of_it() {
    if !requires("qemu-img") {
        return;
    }
    let scratch = package();
    let dir = scratch.path();
    tar(dir, "x.ova", "gnu", &ALL);
    fs::create_dir(dir.join("unpacked")).expect("makes");
    peer("tar", dir, ["-xf", "x.ova", "-C", "unpacked"]);
    for (number, format) in [(1, "qcow2"), (2, "vpc"), (3, "vdi")] {
        let source = format!("unpacked/{}", DISKS[number]);
        let line = ["convert", "-f", format, "-O", "raw", &source, "theirs.raw"];
        peer("qemu-img", dir, line);
        let member = (number + 1).to_string();
        works(dir, &["convert", "--member", &member, "x.ova", "ours.raw"]);
        let theirs = fs::read(dir.join("theirs.raw")).expect("reads");
        let ours = fs::read(dir.join("ours.raw")).expect("reads");
        // QEMU rounds a VHD up to its geometry.
        assert_same(&theirs[..ours.len()], &ours, 0, format);
        assert!(theirs[ours.len()..].iter().all(|b| *b == 0), "{format}");
    }
}

#[test]
fn a_descriptor_beside_its_disks_is_the_same_package() {
    let scratch = package();
    let dir = scratch.path();
    for (number, name) in DISKS.iter().enumerate() {
        works(dir, &["convert", "--member", name, "x.ovf", "out.raw"]);
        same(dir, "out.raw", number, name);
    }
    let listed = info(dir, "x.ovf");
    assert_eq!(listed["format"], "ovf");
    assert_eq!(listed["disks"][1]["capacity-size"], SIZE);
    assert_eq!(listed["disks"][1]["format"], "qcow2");
    let text = works(dir, &["info", "--member", "2", "x.ovf"]);
    assert!(text.contains("qcow2"), "{text}");
    let elsewhere = dir.join("elsewhere");
    fs::create_dir(&elsewhere).expect("makes");
    let outside = dir.join("a.raw");
    let outside = outside.to_str().expect("is text");
    for (href, code) in [
        ("../a.raw", 1),
        (outside, 1),
        ("http://host/a.raw", 1),
        ("missing", 1),
    ] {
        fs::write(elsewhere.join("y.ovf"), descriptor(&[(href, 1, "")])).expect("writes");
        let text = fails(&elsewhere, &["convert", "y.ovf", "out.raw"], code);
        assert!(text.contains(href), "{text}");
        assert!(!elsewhere.join("out.raw").exists());
    }
    fs::write(elsewhere.join("y.ovf"), descriptor(&[("../a.raw", 1, "")])).expect("writes");
    let allowed = ["convert", "--allow-ref", "../a.raw", "y.ovf", "out.raw"];
    works(&elsewhere, &allowed);
    same(dir, "elsewhere/out.raw", 0, "allowed");
}

#[test]
fn info_lists_disks_with_what_they_are_and_what_was_said_of_them() {
    let scratch = package();
    let dir = scratch.path();
    tar(dir, "x.ova", "ustar", &ALL);
    let listed = info(dir, "x.ova");
    assert_eq!(listed["format"], "ova");
    let disks = listed["disks"].as_array().expect("is a list");
    for (disk, format) in disks.iter().zip(["raw", "qcow2", "vhd", "vdi"]) {
        assert_eq!(disk["format"], format);
        assert_eq!(disk["virtual-size"], SIZE);
        assert_eq!(disk["capacity-size"], SIZE);
        assert_eq!(disk["file-size"], disk["described-file-size"]);
        assert!(disk.get("note").is_none(), "{disk}");
    }
    assert_eq!(listed["manifest"]["digests"][0], "SHA256");
    assert_eq!(listed["manifest"]["files"], 5);
    assert!(listed["manifest"].get("missing").is_none(), "{listed}");
    let text = works(dir, &["info", "x.ova"]);
    assert!(
        text.contains("4 (disk3)") && text.contains("d e.vdi"),
        "{text}"
    );
    // One disk is the disk.
    fs::write(dir.join("y.ovf"), descriptor(&[("a.raw", 5, "")])).expect("writes");
    tar(dir, "y.ova", "ustar", &["y.ovf", "a.raw"]);
    let listed = info(dir, "y.ova");
    assert_eq!(listed["virtual-size"], SIZE);
    assert_eq!(listed["manifest"], "none");
    let note = listed["disks"][0]["note"].as_str().expect("is said");
    assert!(note.contains("file size"), "{note}");
    works(dir, &["compare", "y.ova", "0.bin"]);
    works(dir, &["map", "y.ova"]);
    works(dir, &["io", "-r", "-c", "read 0 512", "y.ova"]);
    works(dir, &["check", "--member", "b.qcow2", "x.ova"]);
}

#[test]
fn which_disk_is_meant_is_never_guessed() {
    let scratch = package();
    let dir = scratch.path();
    tar(dir, "x.ova", "ustar", &ALL);
    let text = fails(dir, &["convert", "x.ova", "out.raw"], 1);
    assert!(
        text.contains("--member") && text.contains("2 (disk1)"),
        "{text}"
    );
    for member in ["0", "5", "nothing", ""] {
        let line = ["convert", "--member", member, "x.ova", "out.raw"];
        let text = fails(dir, &line, 1);
        assert!(text.contains("there are 1 (disk0)"), "{text}");
    }
    let text = fails(dir, &["convert", "--member", "1", "a.raw", "out.raw"], 1);
    assert!(text.contains("one disk"), "{text}");
    assert!(!dir.join("out.raw").exists());
    // The appliance itself is not replaced by what is read from it.
    let before = fs::read(dir.join("x.ova")).expect("reads");
    let line = ["convert", "-O", "raw", "--member", "1", "x.ova", "x.ova"];
    fails(dir, &line, 1);
    assert_eq!(fs::read(dir.join("x.ova")).expect("reads"), before);
    let line = ["io", "--member", "1", "-c", "write 0 512", "x.ova"];
    vdtool().current_dir(dir).args(line).assert().failure();
    assert_eq!(fs::read(dir.join("x.ova")).expect("reads"), before);
}

#[test]
fn a_manifest_is_compared_when_a_disk_is_read_whole() {
    let scratch = package();
    let dir = scratch.path();
    let right = fs::read_to_string(dir.join("x.mf")).expect("reads");
    let changed = |from: &str, to: &str| right.replace(from, to);
    let digest = |name: &str| {
        let start = right.find(&format!("({name})= ")).expect("is there") + name.len() + 4;
        right[start..start + 64].to_owned()
    };
    let (other, disk, text) = ("0".repeat(64), digest("a.raw"), digest("x.ovf"));
    for (manifest, part) in [
        (changed(&disk, &other), "'a.raw'"),
        (changed(&text, &other), "'x.ovf'"),
        (
            changed("SHA256(a.raw)", "SHA256(z.raw)"),
            "no digest of 'a.raw'",
        ),
        ("nonsense\n".to_owned(), "line 1"),
    ] {
        fs::write(dir.join("x.mf"), manifest).expect("writes");
        tar(dir, "x.ova", "ustar", &ALL);
        for source in ["x.ova", "x.ovf"] {
            for target in ["out.raw", "out.qcow2"] {
                let line = ["convert", "--member", "1", source, target];
                let text = fails(dir, &line, 1);
                assert!(
                    text.contains(part) && text.contains("--no-manifest"),
                    "{text}"
                );
                assert!(!dir.join(target).exists(), "{part}");
            }
            let line = [
                "convert",
                "--no-manifest",
                "--member",
                "1",
                source,
                "out.raw",
            ];
            works(dir, &line);
            same(dir, "out.raw", 0, part);
            fs::remove_file(dir.join("out.raw")).expect("removes");
            let line = ["convert", "-O", "raw", "--member", "1", source, "-"];
            let done = vdtool().current_dir(dir).args(line).assert().code(1);
            let text = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
            assert!(text.contains(part), "{text}");
        }
    }
    // A check reads all of it, and what is not read is not compared.
    fs::write(dir.join("x.mf"), changed(&disk, &other)).expect("writes");
    tar(dir, "x.ova", "ustar", &ALL);
    let line = ["check", "--member", "a.raw", "x.ova"];
    let done = vdtool().current_dir(dir).args(line).assert().code(2);
    let text = String::from_utf8_lossy(&done.get_output().stdout).into_owned();
    assert!(text.contains("'a.raw'"), "{text}");
    works(dir, &["check", "--member", "b.qcow2", "x.ova"]);
    // So does a comparison that finds nothing else, and a copy of all of it.
    let compare = ["compare", "--member", "1", "x.ova", "a.raw"];
    let text = fails(dir, &compare, 4);
    assert!(text.contains("'a.raw'"), "{text}");
    works(dir, &[&compare[..], &["--no-manifest"]].concat());
    let changed_disk = fs::read(dir.join("a.raw")).expect("reads");
    fs::write(dir.join("other.raw"), [&[1], &changed_disk[1..]].concat()).expect("writes");
    let line = ["compare", "--member", "1", "x.ova", "other.raw"];
    let done = vdtool().current_dir(dir).args(line).assert().code(1);
    assert!(done.get_output().stderr.is_empty(), "they differ anyway");
    let copy = [
        "dd",
        "--member",
        "1",
        "-O",
        "raw",
        "if=x.ova",
        "of=copy.raw",
    ];
    let text = fails(dir, &copy, 1);
    assert!(text.contains("'a.raw'"), "{text}");
    works(dir, &[&copy[..], &["bs=64k", "count=1"]].concat());
    works(dir, &["convert", "--member", "2", "x.ova", "out.raw"]);
    works(dir, &["info", "x.ova"]);
    // Kinds that nobody knows are told of; the others count all the same.
    let unknown = changed(
        &format!("SHA256(x.ovf)= {}", digest("x.ovf")),
        "BLAKE3(x.ovf)= 00",
    );
    for (manifest, code) in [(unknown.clone(), 0), (unknown.replace(&disk, &other), 1)] {
        fs::write(dir.join("x.mf"), manifest).expect("writes");
        tar(dir, "x.ova", "ustar", &ALL);
        let line = ["convert", "--member", "1", "x.ova", "out.raw"];
        let done = vdtool().current_dir(dir).args(line).assert().code(code);
        let text = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
        let told = text.contains("warning: ") && text.contains("'BLAKE3'");
        assert_eq!(told, code == 0, "{text}");
        assert!(told || text.contains("'a.raw'"), "{text}");
        let line = ["check", "--member", "1", "x.ova"];
        let done = vdtool().current_dir(dir).args(line).assert().code(2 * code);
        let text = String::from_utf8_lossy(&done.get_output().stdout).into_owned();
        assert!(code == 1 || text.contains("'BLAKE3'"), "{text}");
    }
    for (kind, sum) in [("SHA1", "sha1sum"), ("SHA512", "sha512sum")] {
        let line = |name: &&str| {
            let sum = peer(sum, dir, [*name]);
            let digest = sum.split(' ').next().expect("a digest").to_owned();
            format!("{kind} ({name}) = {digest}\r\n")
        };
        let text: String = ["x.ovf", "a.raw"].iter().map(line).collect();
        fs::write(dir.join("x.mf"), text).expect("writes");
        tar(dir, "x.ova", "ustar", &ALL);
        works(dir, &["convert", "--member", "1", "x.ova", "out.raw"]);
    }
}

#[test]
fn a_member_of_more_than_8_gib_is_read_whichever_way_its_size_is_written() {
    let scratch = scratch();
    let dir = scratch.path();
    let size: u64 = 9 << 30;
    let ovf = descriptor(&[("big.raw", 0, "")]);
    let mut base = [0; 12];
    base[0] = 0x80;
    base[4..].copy_from_slice(&size.to_be_bytes());
    let record = format!("19 size={size}\n");
    let flavours = [
        header("big.raw", b'0', &base).to_vec(),
        [
            member("x", b'x', record.as_bytes()),
            header("big.raw", b'0', b"00000000000").to_vec(),
        ]
        .concat(),
    ];
    for bytes in flavours {
        let head = [member("x.ovf", b'0', ovf.as_bytes()), bytes].concat();
        let file = fs::File::create(dir.join("x.ova")).expect("creates");
        std::os::unix::fs::FileExt::write_all_at(&file, &head, 0).expect("writes");
        let start = head.len() as u64;
        std::os::unix::fs::FileExt::write_all_at(&file, b"last", start + size - 4).expect("writes");
        file.set_len(start + size + 1024).expect("grows");
        let listed = info(dir, "x.ova");
        assert_eq!(listed["virtual-size"], size);
        works(dir, &["convert", "x.ova", "out.qcow2"]);
        let read = ["io", "-r", "-c", "read -v 9663676412 4", "out.qcow2"];
        let text = works(dir, &read);
        assert!(text.contains("6c 61 73 74"), "{text}");
    }
}

#[test]
fn compressed_members_are_read_at_any_offset_and_their_manifest_is_of_what_is_stored() {
    let scratch = package();
    let dir = scratch.path();
    let mut files = Vec::new();
    let names: Vec<String> = DISKS.iter().map(|name| format!("{name}.gz")).collect();
    for (disk, name) in DISKS.iter().zip(&names) {
        let packed = std::process::Command::new("gzip")
            .args(["-k", disk])
            .current_dir(dir)
            .status();
        assert!(packed.expect("runs").success());
        files.push((&**name, 1, "ovf:compression='gzip'"));
    }
    fs::write(dir.join("x.ovf"), descriptor(&files)).expect("writes");
    let mut all = vec!["x.ovf"];
    all.extend(names.iter().map(|name| &**name));
    fs::write(dir.join("x.mf"), manifest(dir, &all)).expect("writes");
    all.insert(1, "x.mf");
    tar(dir, "x.ova", "ustar", &all);
    for source in ["x.ova", "x.ovf"] {
        for number in 0..DISKS.len() {
            let member = (number + 1).to_string();
            works(dir, &["convert", "--member", &member, source, "out.raw"]);
            same(dir, "out.raw", number, source);
        }
    }
    let listed = info(dir, "x.ova");
    assert_eq!(listed["disks"][3]["format"], "vdi");
    assert_eq!(listed["disks"][3]["compression"], "gzip");
    // Nothing was left beside it, in the directory for temporary files either.
    let left = fs::read_dir(dir).expect("reads").count();
    works(dir, &["compare", "--member", "a.raw.gz", "x.ova", "0.bin"]);
    assert_eq!(fs::read_dir(dir).expect("reads").count(), left);
}

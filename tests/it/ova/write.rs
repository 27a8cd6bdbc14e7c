//! Appliances that are made: what importers and other readers find in them.

use super::*;
use crate::util::{assert_same, requires};

/// Three sources of other formats, whose contents are `0.bin` to `2.bin`, of other sizes.
fn sources() -> TempDir {
    let scratch = scratch();
    let dir = scratch.path();
    for (number, name) in ["a.qcow2", "b.vhd", "c.raw"].iter().enumerate() {
        let mut bytes = content(&format!("write{number}"));
        bytes.truncate(SIZE - number * (1 << 20));
        fs::write(dir.join(format!("{number}.bin")), bytes).expect("writes");
        let source = format!("{number}.bin");
        works(dir, &["convert", "-f", "raw", &source, name]);
    }
    scratch
}

const SOURCES: [&str; 3] = ["a.qcow2", "b.vhd", "c.raw"];

fn convert<'a>(options: &[&'a str], target: &'a str) -> Vec<&'a str> {
    let line = ["convert", "-O", "ova"].into_iter();
    let line = line.chain(options.iter().copied()).chain(SOURCES);
    line.chain([target]).collect()
}

#[test]
fn each_source_is_one_disk_in_order_and_reads_back_the_same() {
    let scratch = sources();
    let dir = scratch.path();
    works(dir, &convert(&["--verify"], "x.ova"));
    for number in 0..SOURCES.len() {
        let member = (number + 1).to_string();
        works(dir, &["convert", "--member", &member, "x.ova", "out.raw"]);
        let found = fs::read(dir.join("out.raw")).expect("reads");
        let expected = fs::read(dir.join(format!("{number}.bin"))).expect("reads");
        assert_same(&found, &expected, 0, &member);
    }
    let listed = info(dir, "x.ova");
    for (number, disk) in listed["disks"]
        .as_array()
        .expect("a list")
        .iter()
        .enumerate()
    {
        assert_eq!(disk["format"], "vmdk", "{disk}");
        assert_eq!(disk["capacity-size"], SIZE - number * (1 << 20), "{disk}");
        assert_eq!(disk["file-size"], disk["described-file-size"], "{disk}");
        assert!(disk.get("note").is_none(), "{disk}");
    }
    assert_eq!(listed["manifest"]["files"], 4);
    assert!(listed["manifest"].get("missing").is_none(), "{listed}");
    // The name alone says the format, and every extension of the parts.
    works(dir, &["convert", "a.qcow2", "y.ova"]);
    assert_eq!(info(dir, "y.ova")["virtual-size"], SIZE);
}

#[test]
fn members_are_in_the_order_that_importers_want_and_their_digests_are_right() {
    let scratch = sources();
    let dir = scratch.path();
    for (sum, tool) in [
        ("sha1", "sha1sum"),
        ("sha256", "sha256sum"),
        ("sha512", "sha512sum"),
    ] {
        let option = format!("manifest={sum},name=vm");
        works(dir, &convert(&["-o", &option], "x.ova"));
        let list = peer("tar", dir, ["-tvf", "x.ova"]);
        let names: Vec<&str> = list
            .lines()
            .map(|line| line.rsplit(' ').next().expect("a name"))
            .collect();
        let expected = [
            "vm.ovf",
            "vm.mf",
            "vm-disk1.vmdk",
            "vm-disk2.vmdk",
            "vm-disk3.vmdk",
        ];
        assert_eq!(names, expected);
        assert!(
            list.lines().all(|line| line.starts_with("-rw-r--r-- ")),
            "{list}"
        );
        let unpacked = dir.join(sum);
        fs::create_dir(&unpacked).expect("makes");
        peer("tar", dir, ["-xf", "x.ova", "-C", sum]);
        let text = fs::read_to_string(unpacked.join("vm.mf")).expect("reads");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4, "{text}");
        for (line, name) in lines
            .iter()
            .zip(["vm.ovf", expected[2], expected[3], expected[4]])
        {
            let digest = peer(tool, &unpacked, [name]);
            let digest = digest.split(' ').next().expect("a digest");
            assert_eq!(*line, format!("{}({name})= {digest}", sum.to_uppercase()));
        }
        let bytes = fs::read(dir.join("x.ova")).expect("reads");
        assert_eq!(&bytes[257..265], b"ustar\x0000");
        assert!(bytes.len().is_multiple_of(10_240));
    }
    works(dir, &convert(&["-o", "manifest=none"], "x.ova"));
    assert_eq!(info(dir, "x.ova")["manifest"], "none");
}

#[test]
fn other_tools_read_what_is_in_it() {
    let scratch = sources();
    let dir = scratch.path();
    works(dir, &convert(&["-o", "name=vm"], "x.ova"));
    fs::create_dir(dir.join("u")).expect("makes");
    peer("tar", dir, ["-xf", "x.ova", "-C", "u"]);
    for number in 0..SOURCES.len() {
        let disk = format!("u/vm-disk{}.vmdk", number + 1);
        let bytes = fs::read(dir.join(&disk)).expect("reads");
        assert!(bytes.ends_with(&[0; 512]), "the end of stream is last");
        if requires("qemu-img") {
            let line = ["convert", "-f", "vmdk", "-O", "raw", &disk, "theirs.raw"];
            peer("qemu-img", dir, line);
            let theirs = fs::read(dir.join("theirs.raw")).expect("reads");
            let expected = fs::read(dir.join(format!("{number}.bin"))).expect("reads");
            assert_same(&theirs, &expected, 0, &disk);
        }
    }
    if requires("python3") {
        let script = "import tarfile,sys\n\
                      t=tarfile.open('x.ova')\n\
                      print([m.name for m in t.getmembers()], t.format)\n";
        let out = peer("python3", dir, ["-c", script]);
        assert!(out.contains("'vm.ovf', 'vm.mf', 'vm-disk1.vmdk'"), "{out}");
    }
}

/// An archive without what is made up anew each time: identities of disks, and so their digests.
fn masked(mut bytes: Vec<u8>) -> Vec<u8> {
    let storage = vdtool::storage::memory::MemoryStorage::from_bytes(&bytes);
    let members = vdtool::container::tar::members(&storage).expect("is an archive");
    for member in members {
        let name = member.name.to_str().expect("is text");
        let start = crate::util::len(member.data.start);
        let end = crate::util::len(member.data.end);
        match name.rsplit('.').next() {
            Some("mf") => bytes[start..end].fill(0),
            // The descriptor in the disk.
            Some("vmdk") => bytes[start + 512..start + 21 * 512].fill(0),
            _ => {}
        }
    }
    bytes
}

#[test]
fn the_file_is_the_same_through_a_pipe_and_with_any_number_of_threads() {
    let scratch = sources();
    let dir = scratch.path();
    for tar in ["gnu", "posix"] {
        let option = format!("tar={tar},name=vm");
        works(dir, &convert(&["-o", &option, "-j", "1"], "x.ova"));
        let expected = masked(fs::read(dir.join("x.ova")).expect("reads"));
        for jobs in ["1", "4"] {
            works(
                dir,
                &convert(&["-o", &option, "-j", jobs, "--verify"], "y.ova"),
            );
            let found = masked(fs::read(dir.join("y.ova")).expect("reads"));
            assert_same(&found, &expected, 0, jobs);
            let line = convert(&["-o", &option, "-j", jobs], "-");
            let done = vdtool().current_dir(dir).args(line).assert().success();
            let piped = done.get_output().stdout.clone();
            fs::write(dir.join("z.ova"), &piped).expect("writes");
            assert_same(&masked(piped), &expected, 0, "stdout");
            // The digests are those of what was sent.
            works(dir, &["convert", "--member", "2", "z.ova", "out.raw"]);
            works(dir, &["compare", "out.raw", "b.vhd"]);
        }
        peer("tar", dir, ["-tf", "x.ova"]);
    }
}

#[test]
fn options_describe_the_machine_and_a_descriptor_of_ones_own_is_kept() {
    let scratch = sources();
    let dir = scratch.path();
    let option = "cpus=3,memory=2G,firmware=efi,controller=pvscsi,network=A & B,\
                  os_type=ubuntu64Guest,hwversion=19,name=vm,compression_level=9";
    works(dir, &convert(&["-o", option], "x.ova"));
    peer("tar", dir, ["-xf", "x.ova", "vm.ovf"]);
    let text = fs::read_to_string(dir.join("vm.ovf")).expect("reads");
    for part in [
        "<rasd:VirtualQuantity>3</rasd:VirtualQuantity>",
        "<rasd:VirtualQuantity>2048</rasd:VirtualQuantity>",
        "vmw:value=\"efi\"",
        "VirtualSCSI",
        "A &amp; B",
        "vmw:osType=\"ubuntu64Guest\"",
        "vmx-19",
        "html#streamOptimized\"",
        "<rasd:HostResource>ovf:/disk/vmdisk3</rasd:HostResource>",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(info(dir, "x.ova")["virtual-hardware"][0], "vmx-19");
    fs::write(dir.join("own.ovf"), text.replace("<Name>", "<Name>Mine ")).expect("writes");
    works(dir, &convert(&["--ovf", "own.ovf", "--verify"], "y.ova"));
    peer("tar", dir, ["-xf", "y.ova", "y.ovf"]);
    let own = fs::read_to_string(dir.join("y.ovf")).expect("reads");
    assert!(own.contains("<Name>Mine "), "{own}");
    let help = works(dir, &["convert", "-O", "ova", "-o", "help"]);
    assert!(
        help.contains("firmware") && help.contains("bios|efi"),
        "{help}"
    );
}

#[test]
fn what_cannot_be_made_is_refused_and_nothing_is_left() {
    let scratch = sources();
    let dir = scratch.path();
    fs::write(dir.join("x.ova"), "before").expect("writes");
    let names = || {
        let entries = fs::read_dir(dir).expect("reads");
        let mut names: Vec<_> = entries.map(|e| e.expect("reads").file_name()).collect();
        names.sort();
        names
    };
    let before = names();
    for (line, code, part) in [
        (&["-o", "cpus=0"][..], 1, "'cpus'"),
        (&["-o", "subformat=flat"], 2, "no option 'subformat'"),
        (&["-o", "size=1G"], 2, "size"),
        (&["-n"], 2, "-n"),
        (&["-B", "c.raw", "-F", "raw"], 2, "-B"),
        (&["--ovf", "missing.ovf"], 1, "missing.ovf"),
        (&["--ovf", "c.raw"], 1, "c.raw"),
        (&["--ovf", "c.raw", "-o", "memory=2G"], 1, "'memory'"),
        (&["--ovf", "c.raw", "-o", "os_type=x"], 1, "'os_type'"),
        (&["--member", "1"], 1, "--member"),
    ] {
        let line = convert(line, "x.ova");
        let done = vdtool().current_dir(dir).args(&line).assert().code(code);
        let text = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
        assert!(text.contains(part), "{line:?}: {text}");
        assert_eq!(fs::read(dir.join("x.ova")).expect("reads"), b"before");
        assert_eq!(names(), before, "{line:?}");
    }
    // A source whose digest is another.
    let bytes = fs::read(dir.join("c.raw")).expect("reads");
    let ovf = descriptor(&[("c.raw", bytes.len(), "")]);
    let manifest = format!("SHA256(s.ovf)= {}\n", hex(&Sha256::digest(ovf.as_bytes())));
    let manifest = manifest + &format!("SHA256(c.raw)= {}\n", "0".repeat(64));
    let members = [
        member("s.ovf", b'0', ovf.as_bytes()),
        member("s.mf", b'0', manifest.as_bytes()),
        member("c.raw", b'0', &bytes),
    ];
    archive(dir, "s.ova", &members);
    let text = fails(dir, &["convert", "s.ova", "x.ova"], 1);
    assert!(text.contains("'c.raw'"), "{text}");
    assert_eq!(fs::read(dir.join("x.ova")).expect("reads"), b"before");
    let line = ["convert", "-O", "ova", "s.ova", "-"];
    let done = vdtool().current_dir(dir).args(line).assert().code(1);
    assert!(done.get_output().stdout.is_empty());
    works(
        dir,
        &["convert", "--no-manifest", "--verify", "s.ova", "t.ova"],
    );
    // Itself, under any name.
    let done = vdtool()
        .current_dir(dir)
        .args(["convert", "t.ova", "./t.ova"])
        .assert();
    done.code(1);
    let text = fails(dir, &["convert", "a.qcow2", "x.ovf"], 63);
    assert!(text.contains("'ovf'"), "{text}");
}

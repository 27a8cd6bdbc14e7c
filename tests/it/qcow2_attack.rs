//! Known attacks on readers of qcow2, and the answer to each.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::util::{assert_same, peer, requires, scratch, vdtool};

fn works(dir: &Path, line: &[&str]) -> String {
    let done = vdtool().current_dir(dir).args(line).assert().success();
    String::from_utf8_lossy(&done.get_output().stdout).into_owned()
}

/// Runs vdtool, which must fail with `code` and name `part`.
fn fails(dir: &Path, line: &[&str], code: i32, part: &str) {
    let done = vdtool().current_dir(dir).args(line).assert().code(code);
    let text = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
    assert!(text.contains(part), "{line:?}: wanted '{part}' in: {text}");
    assert_eq!(text.lines().count(), 1, "{line:?}: {text}");
}

/// Runs a command with 20 seconds and 256 MiB of address space, in which it must end by itself.
fn bounded(dir: &Path, line: &str, what: &str) -> Option<i32> {
    let vdtool = env!("CARGO_BIN_EXE_vdtool");
    let script = format!("ulimit -v 262144; exec timeout 20 {vdtool} {line}");
    let output = Command::new("sh")
        .args(["-c", &script])
        .current_dir(dir)
        .stdin(Stdio::null())
        .output()
        .expect("the shell starts");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let ended = matches!(output.status.code(), Some(0..=3 | 63));
    assert!(ended, "{what}: {line}: {:?}: {text}", output.status);
    assert!(!text.contains("panicked"), "{what}: {line}: {text}");
    output.status.code()
}

/// All that looks at an image, and what writes to it.
const COMMANDS: [&str; 8] = [
    "info --no-mmap bad.qcow2",
    "check --no-mmap bad.qcow2",
    "map --no-mmap bad.qcow2",
    "snapshot --no-mmap -l bad.qcow2",
    "io --no-mmap -r -c 'read 0 64k' bad.qcow2",
    "io --no-mmap -c 'write 0 64k' bad.qcow2",
    "resize --no-mmap bad.qcow2 +1M",
    "check --no-mmap -r all bad.qcow2",
];

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn place(value: u64) -> usize {
    usize::try_from(value & 0x00ff_ffff_ffff_fe00).expect("small")
}

/// An image with data, a snapshot and compressed clusters.
fn sample(dir: &Path) -> Vec<u8> {
    let create = ["create", "-q", "-f", "qcow2", "a.qcow2", "64M"];
    peer("qemu-img", dir, create);
    let writes = [
        "-c",
        "write -P 1 0 1M",
        "-c",
        "write -c -P 2 8M 64k",
        "a.qcow2",
    ];
    peer("qemu-io", dir, writes);
    peer("qemu-img", dir, ["snapshot", "-c", "x", "a.qcow2"]);
    fs::read(dir.join("a.qcow2")).expect("reads")
}

/// Writes the image, long enough that tables past its end would be too easy to refuse.
fn put(dir: &Path, bytes: &[u8]) {
    let path = dir.join("bad.qcow2");
    fs::write(&path, bytes).expect("writes");
    let file = fs::OpenOptions::new()
        .write(true)
        .open(path)
        .expect("opens");
    file.set_len(3 << 30).expect("grows");
}

#[test]
fn tables_that_are_huge_or_overlap_take_little_memory_and_time() {
    if !requires("qemu-img") || !requires("timeout") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    let sound = sample(dir);
    let (l1, reftable, snapshots) = (word(&sound, 40), word(&sound, 48), word(&sound, 64));
    let places = [0, 0x100, l1, reftable, snapshots, 1 << 30, 1 << 62, !0xffff];
    let case = |what: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = sound.clone();
        change(&mut bytes);
        for command in COMMANDS {
            put(dir, &bytes);
            bounded(dir, command, what);
        }
    };
    for (what, offset_at, len_at) in [("L1", 40, 36), ("refcounts", 48, 56), ("snapshots", 64, 60)]
    {
        for place in places {
            case(what, &|b| {
                b[offset_at..offset_at + 8].copy_from_slice(&place.to_be_bytes());
            });
        }
        for len in [
            0u32,
            1,
            128,
            65_536,
            65_537,
            1 << 22,
            (1 << 22) + 1,
            u32::MAX,
        ] {
            case(what, &|b| {
                b[len_at..len_at + 4].copy_from_slice(&len.to_be_bytes());
            });
        }
    }
    // A table of snapshots, a second-level table and a refcount block that are each other.
    for at in [place(l1), place(reftable), place(snapshots)] {
        for value in [l1, reftable, snapshots, 0x1_0000, 0] {
            case("loop", &|b| {
                b[at..at + 8].copy_from_slice(&(value | 1 << 63).to_be_bytes());
            });
        }
    }
}

/// Whether qemu-img opens an image.
fn opens(dir: &Path, name: &str) -> bool {
    let line = ["info", "-f", "qcow2", name];
    let done = Command::new("qemu-img")
        .args(line)
        .current_dir(dir)
        .output();
    done.expect("runs").status.success()
}

/// What must be said where a header's field is this.
struct Wrong {
    field: usize,
    value: Vec<u8>,
    says: &'static str,
}

#[test]
fn a_table_that_is_nowhere_or_on_another_is_named_and_nothing_is_written() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    let sound = sample(dir);
    let (l1, reftable, snapshots) = (word(&sound, 40), word(&sound, 48), word(&sound, 64));
    let offset = |field, value: u64, says| Wrong {
        field,
        value: value.to_be_bytes().to_vec(),
        says,
    };
    let count = |field, value: u32, says| Wrong {
        field,
        value: value.to_be_bytes().to_vec(),
        says,
    };
    let cases = [
        offset(40, 0, "the L1 table is at 0x0"),
        offset(40, 0x100, "the L1 table is at 0x100"),
        offset(40, reftable, "check names the damage"),
        offset(40, snapshots, "check names the damage"),
        offset(40, 1 << 62, "the L1 table ends at"),
        offset(40, !0xffff, "the L1 table is at"),
        count(36, 0, "the L1 table has 0 entries"),
        count(36, 1 << 16, "check names the damage"),
        count(36, (1 << 22) + 1, "the L1 table has 4194305 entries"),
        count(36, u32::MAX, "the L1 table has 4294967295 entries"),
        offset(48, 0, "the refcount table is at 0x0"),
        offset(48, 0x100, "the refcount table is at 0x100"),
        offset(48, l1, "check names the damage"),
        offset(48, snapshots, "check names the damage"),
        offset(48, 1 << 30, "check names the damage"),
        offset(48, 1 << 62, "the refcount table ends at"),
        offset(48, !0xffff, "the refcount table is at"),
        count(56, 0, "the refcount table has 0 bytes"),
        count(56, 128, "check names the damage"),
        count(56, 1 << 16, "the refcount table has 4294967296 bytes"),
        count(56, u32::MAX, "the refcount table has"),
        offset(64, 0, "the snapshot table is at 0x0"),
        offset(64, 0x100, "the snapshot table is at 0x100"),
        offset(64, l1, "check names the damage"),
        offset(64, reftable, "check names the damage"),
        offset(64, 1 << 62, "the snapshot table reaches past"),
        offset(64, !0xffff, "the snapshot table is at"),
        count(60, 65_537, "the header counts 65537 snapshots"),
        count(60, u32::MAX, "the header counts 4294967295 snapshots"),
    ];
    for Wrong { field, value, says } in cases {
        let mut bytes = sound.clone();
        bytes[field..field + value.len()].copy_from_slice(&value);
        put(dir, &bytes);
        fails(dir, &["io", "-c", "write 0 64k", "bad.qcow2"], 1, says);
        let file = fs::File::open(dir.join("bad.qcow2")).expect("opens");
        let mut after = vec![0; bytes.len()];
        file.read_exact_at(&mut after, 0).expect("reads");
        assert_same(&after, &bytes, 0, &format!("{field} {value:x?}"));
    }
}

#[test]
fn headers_and_extensions_of_all_lengths_end_in_an_error_or_an_image() {
    if !requires("qemu-img") || !requires("timeout") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    let sound = sample(dir);
    let edges = [
        0u32,
        1,
        7,
        8,
        71,
        72,
        103,
        104,
        105,
        111,
        112,
        120,
        511,
        4095,
        4096,
        4097,
        65_528,
        65_536,
        1 << 31,
        u32::MAX - 7,
        u32::MAX,
    ];
    let mut opened = 0;
    for (at, name_at) in [
        (100, 0),
        (116, 0),
        (16, 0),
        (16, 512),
        (16, 65_000),
        (12, 0),
    ] {
        for value in edges {
            let mut bytes = sound.clone();
            bytes[8..16].copy_from_slice(&u64::to_be_bytes(name_at));
            bytes[512..2048].fill(b'n');
            bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
            fs::write(dir.join("bad.qcow2"), &bytes).expect("writes");
            let what = format!("{at} is {value}, the name at {name_at}");
            let code = bounded(dir, "info --no-mmap bad.qcow2", &what);
            opened += usize::from(code == Some(0));
            // They bound a header by its cluster, we by 4 KiB; where a name of no bytes is said to
            // be somewhere, we do not look.
            let bound = at == 100 && (4097..=65_536).contains(&value);
            if at != 12 {
                assert_eq!(code == Some(0), !bound && opens(dir, "bad.qcow2"), "{what}");
            }
            bounded(dir, "io --no-mmap -c 'write 0 4k' bad.qcow2", &what);
            bounded(dir, "check --no-mmap bad.qcow2", &what);
        }
    }
    assert!(opened > 5, "{opened}");
}

#[test]
fn compressed_clusters_past_the_end_and_bombs_are_errors_where_they_are_read() {
    if !requires("qemu-img") || !requires("timeout") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    let sound = sample(dir);
    let table = place(word(&sound, place(word(&sound, 40))));
    let entry = table + (8 << 20) / 65_536 * 8;
    let right = word(&sound, entry);
    assert_ne!(right & 1 << 62, 0, "the cluster is compressed");
    let host = right & ((1 << 54) - 1);
    let end = sound.len() as u64;
    for (what, value) in [
        ("past the end", 1 << 62 | end),
        ("far past the end", 1 << 62 | ((1 << 54) - 1)),
        ("the header", 1 << 62),
        ("a table", 1 << 62 | word(&sound, 48)),
        ("of many sectors", 1 << 62 | 0xff << 54 | host),
    ] {
        let mut bytes = sound.clone();
        bytes[entry..entry + 8].copy_from_slice(&value.to_be_bytes());
        fs::write(dir.join("bad.qcow2"), &bytes).expect("writes");
        let read = bounded(dir, "io --no-mmap -r -c 'read -P 2 8M 64k' bad.qcow2", what);
        // More sectors than the data needs do no harm.
        assert_eq!(read == Some(0), what == "of many sectors", "{what}");
        assert_eq!(
            bounded(dir, "io --no-mmap -r -c 'read -P 1 0 1M' bad.qcow2", what),
            Some(0)
        );
        bounded(dir, "convert --no-mmap bad.qcow2 out.raw", what);
        bounded(dir, "check --no-mmap bad.qcow2", what);
    }
    // A stream that goes on for much longer than a cluster, in as many bytes as there is room for.
    let mut encoder = libdeflater::Compressor::new(libdeflater::CompressionLvl::best());
    let plain = vec![0; 200 << 20];
    let mut bomb = vec![0; 1 << 20];
    let made = encoder
        .deflate_compress(&plain, &mut bomb)
        .expect("it fits");
    let mut bytes = sound.clone();
    let at = bytes.len();
    bytes.extend(&bomb[..made.min(65_536)]);
    bytes.resize(bytes.len().next_multiple_of(65_536), 0);
    let value = 1u64 << 62 | 0x7f << 54 | at as u64;
    bytes[entry..entry + 8].copy_from_slice(&value.to_be_bytes());
    fs::write(dir.join("bad.qcow2"), &bytes).expect("writes");
    let code = bounded(
        dir,
        "io --no-mmap -r -c 'read -P 0 8M 64k' bad.qcow2",
        "bomb",
    );
    assert_eq!(code, Some(1));
}

#[test]
fn a_backing_file_that_is_itself_or_leads_back_is_refused() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    let link = |name: &str, to: &str| {
        let line = [
            "create", "-q", "-f", "qcow2", "-u", "-b", to, "-F", "qcow2", name, "1M",
        ];
        peer("qemu-img", dir, line);
    };
    works(dir, &["create", "-q", "-f", "qcow2", "self.qcow2", "1M"]);
    let itself = "backing_file=self.qcow2,backing_fmt=qcow2";
    works(dir, &["amend", "-o", itself, "self.qcow2"]);
    link("a.qcow2", "b.qcow2");
    link("b.qcow2", "c.qcow2");
    link("c.qcow2", "a.qcow2");
    fs::hard_link(dir.join("self.qcow2"), dir.join("other.qcow2")).expect("links");
    for name in ["self.qcow2", "other.qcow2", "a.qcow2", "b.qcow2", "c.qcow2"] {
        fails(dir, &["convert", name, "out.raw"], 1, "cycle");
        fails(dir, &["io", "-c", "read 0 512", name], 1, "cycle");
        fails(dir, &["info", "--backing-chain", name], 1, "cycle");
        works(dir, &["info", name]);
    }
}

#[test]
fn names_of_protocols_are_names_of_files() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    fs::write(dir.join("secret"), vec![9; 1 << 20]).expect("writes");
    for name in [
        "json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"secret\"}}",
        "file:secret",
        "nbd:localhost:1",
        "nbd://localhost:1/x",
        "fat:rw:.",
        "blkdebug::secret",
        "http://localhost/x",
        "/dev/fd/0",
        "/proc/self/environ",
    ] {
        let line = [
            "create", "-q", "-f", "qcow2", "-u", "-b", name, "-F", "raw", "a.qcow2", "1M",
        ];
        works(dir, &line);
        let info = works(dir, &["info", "--output", "json", "a.qcow2"]);
        let info: serde_json::Value = serde_json::from_str(&info).expect("is JSON");
        assert_eq!(info["backing-filename"], name);
        let done = vdtool()
            .current_dir(dir)
            .args(["convert", "a.qcow2", "out.raw"])
            .assert();
        done.code(1);
        assert!(!dir.join("out.raw").exists(), "{name}");
    }
    // A file that is called so is that file, and nothing is read from where the name leads to.
    fs::write(dir.join("file:secret"), vec![3; 1 << 20]).expect("writes");
    let line = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "file:secret",
        "-F",
        "raw",
        "a.qcow2",
    ];
    works(dir, &line);
    works(dir, &["io", "-c", "read -P 3 0 1M", "a.qcow2"]);
}

#[test]
fn files_outside_the_directory_are_refused_until_they_are_allowed() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    fs::create_dir(dir.join("in")).expect("makes");
    fs::write(dir.join("secret.raw"), vec![9; 1 << 20]).expect("writes");
    let at = &dir.join("in");
    let line = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-u",
        "-b",
        "../secret.raw",
        "-F",
        "raw",
        "over.qcow2",
        "1M",
    ];
    peer("qemu-img", at, line);
    let options = "data_file=../data.bin,data_file_raw=on";
    peer(
        "qemu-img",
        at,
        [
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            options,
            "data.qcow2",
            "1M",
        ],
    );
    // A writer that is led to a file of someone else would write there.
    fs::copy(dir.join("secret.raw"), dir.join("data.bin")).expect("copies");
    for name in ["over.qcow2", "data.qcow2"] {
        fails(at, &["convert", name, "out.raw"], 1, "--allow-ref");
        fails(at, &["io", "-c", "write 0 512", name], 1, "--allow-ref");
        fails(at, &["map", name], 1, "--allow-ref");
        works(at, &["info", name]);
        works(at, &["io", "--allow-ref", "any", "-c", "read 0 512", name]);
    }
    let allowed = [
        "io",
        "--allow-ref",
        "../secret.raw",
        "-c",
        "read -P 9 0 1M",
        "over.qcow2",
    ];
    works(at, &allowed);
    // `info` opens neither: it answers the same when they are not there, or no files.
    for name in ["secret.raw", "data.bin"] {
        fs::remove_file(dir.join(name)).expect("removes");
        peer("mkfifo", dir, [name]);
    }
    works(at, &["info", "over.qcow2"]);
    works(at, &["info", "data.qcow2"]);
}

#[test]
fn a_raw_disk_stays_raw_whatever_the_guest_writes_into_it() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    fs::write(dir.join("secret.raw"), vec![9; 1 << 20]).expect("writes");
    let line = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-u",
        "-b",
        "secret.raw",
        "-F",
        "raw",
        "evil.qcow2",
        "1M",
    ];
    peer("qemu-img", dir, line);
    // The guest's disk, raw, and an overlay on it that says so.
    fs::write(dir.join("disk.raw"), vec![0; 1 << 20]).expect("writes");
    works(
        dir,
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            "disk.raw",
            "-F",
            "raw",
            "top.qcow2",
        ],
    );
    let header = fs::read(dir.join("evil.qcow2")).expect("reads");
    let mut disk = vec![0; 1 << 20];
    disk[..header.len()].copy_from_slice(&header);
    fs::write(dir.join("disk.raw"), &disk).expect("writes");
    works(dir, &["convert", "top.qcow2", "out.raw"]);
    assert!(fs::read(dir.join("out.raw")).expect("reads") == disk);
    works(dir, &["convert", "-f", "raw", "disk.raw", "out.raw"]);
    assert!(fs::read(dir.join("out.raw")).expect("reads") == disk);
    // Where nobody says so, it is what it looks like, but leads nowhere from below another.
    let line = [
        "create", "-q", "-f", "qcow2", "-u", "-b", "disk.raw", "-F", "raw",
    ];
    works(dir, &[&line[..], &["guess.qcow2", "1M"]].concat());
    let mut guess = fs::read(dir.join("guess.qcow2")).expect("reads");
    let format = guess.windows(4).position(|w| w == [0xe2, 0x79, 0x2a, 0xca]);
    let format = format.expect("the format is recorded");
    guess[format..format + 4].fill(0x55);
    fs::write(dir.join("guess.qcow2"), guess).expect("writes");
    fails(dir, &["convert", "guess.qcow2", "out.raw"], 1, "secret.raw");
    // On its own it stays what it was found to be for as long as it is open.
    fs::write(dir.join("disk.raw"), vec![0; 1 << 20]).expect("writes");
    fs::write(dir.join("head"), &header[..65_536]).expect("writes");
    let commands = [
        "write -s head 0 64k",
        "reopen",
        "read -P 0 64k 64k",
        "length",
    ];
    let commands = commands.iter().flat_map(|c| ["-c", c]);
    let line: Vec<&str> = ["io"].into_iter().chain(commands).collect();
    let text = works(dir, &[&line[..], &["disk.raw"]].concat());
    assert!(text.contains("1 MiB"), "{text}");
    let after = fs::read(dir.join("disk.raw")).expect("reads");
    assert!(after[..65_536] == header[..65_536] && after.len() == 1 << 20);
}

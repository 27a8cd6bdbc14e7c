//! Damage to qcow2 images that only other programs mind, or that only bitmaps and data files can
//! have: a check names it, a repair mends it by one run, and qemu-img finds nothing afterwards.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::util::{peer, requires, scratch, vdtool};

const COPIED: u64 = 1 << 63;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const CLUSTER: u64 = 4096;

/// An image in a directory of its own, and its bytes.
struct Image {
    directory: TempDir,
    bytes: Vec<u8>,
}

impl Image {
    /// 1 MiB with some data, created with `options`.
    fn new(options: &[&str]) -> Self {
        let directory = scratch();
        let mut line = vec!["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k"];
        line.extend(options);
        line.extend(["a.qcow2", "1M"]);
        let image = Self {
            directory,
            bytes: Vec::new(),
        };
        image.run(&line);
        image.run(&["io", "-c", "write -q -P 7 0 64k", "a.qcow2"]);
        image.read()
    }

    fn read(mut self) -> Self {
        self.bytes = std::fs::read(self.path()).expect("reads");
        self
    }

    fn with_bitmaps(names: &[&str]) -> Self {
        let image = Self::new(&[]);
        for name in names {
            image.run(&["bitmap", "--add", "a.qcow2", name]);
        }
        image.run(&["io", "-c", "write -q -P 8 128k 64k", "a.qcow2"]);
        image.read()
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("a.qcow2")
    }

    fn run(&self, line: &[&str]) -> String {
        let done = vdtool()
            .current_dir(self.directory.path())
            .args(line)
            .assert();
        String::from_utf8_lossy(&done.success().get_output().stdout).into_owned()
    }

    fn word(&self, at: u64) -> u64 {
        let at = usize::try_from(at).expect("small");
        u64::from_be_bytes(self.bytes[at..at + 8].try_into().expect("eight bytes"))
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        let at = usize::try_from(at).expect("small");
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(self.path(), &self.bytes).expect("writes");
    }

    /// Where the L2 entry of a guest cluster is.
    fn entry(&self, cluster: u64) -> u64 {
        (self.word(self.word(40)) & OFFSET) + cluster * 8
    }

    /// Where the data of an extension is.
    fn extension(&self, kind: u32) -> u64 {
        let found = self.bytes[..4096].windows(4);
        let mut found = found.enumerate().filter(|(_, w)| *w == kind.to_be_bytes());
        found.next().expect("it is there").0 as u64 + 8
    }

    fn refcount_at(&self, host: u64) -> u64 {
        self.word(self.word(48)) + host / CLUSTER * 2
    }

    fn content(&self) -> Vec<u8> {
        let line = ["convert", "-q", "-O", "raw", "a.qcow2", "a.raw"];
        self.run(&line);
        std::fs::read(self.directory.path().join("a.raw")).expect("reads")
    }

    fn check(&self, more: &[&str]) -> (i32, String) {
        let mut line = vec!["check", "-f", "qcow2"];
        line.extend(more);
        line.push("a.qcow2");
        let command = vdtool()
            .current_dir(self.directory.path())
            .args(line)
            .output();
        let output = command.expect("runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.code().unwrap_or(-1), text)
    }

    /// A check names `text`; one repair mends it, the disk reads as before, and neither of the two
    /// checkers finds anything more.
    fn is_mended(&self, text: &str) {
        let before = self.content();
        let (code, found) = self.check(&[]);
        assert!(code == 2 && found.contains(text), "{code} {found}");
        let (code, found) = self.check(&["-r", "all"]);
        assert!(code == 0 && found.contains(text), "{code} {found}");
        let (code, found) = self.check(&["-r", "all"]);
        assert!(code == 0 && !found.contains("repaired"), "{code} {found}");
        assert_eq!(before, self.content());
        is_clean(&self.path());
        self.run(&["io", "-c", "write -q -P 9 512k 64k", "a.qcow2"]);
        is_clean(&self.path());
    }
}

fn is_clean(path: &Path) {
    if requires("qemu-img") {
        let directory = path.parent().expect("has one");
        let line = [OsStr::new("check"), OsStr::new("-q"), path.as_os_str()];
        peer("qemu-img", directory, line);
    }
}

#[test]
fn the_end_of_the_header_extensions_has_no_length_that_others_refuse() {
    for version in ["compat=1.1", "compat=0.10"] {
        let mut image = Image::new(&["-o", version]);
        let end = match version {
            "compat=0.10" => 72,
            _ => {
                let names = image.extension(0x6803_f857);
                names + (image.word(names - 8) & 0xffff_ffff)
            }
        };
        image.put(end + 4, &0x10_0000_u32.to_be_bytes());
        image.is_mended("the end of the header extensions");
    }
}

#[test]
fn a_snapshot_table_of_no_entries_is_nowhere_that_others_refuse() {
    for place in [1, u64::MAX << 12] {
        let mut image = Image::new(&[]);
        image.put(64, &place.to_be_bytes());
        image.is_mended("the snapshot table of no entries");
    }
}

#[test]
fn a_cluster_in_a_data_file_has_the_copied_flag() {
    let mut image = Image::new(&["-o", "data_file=a.data"]);
    let at = image.entry(3);
    let word = image.word(at) & !COPIED;
    image.put(at, &word.to_be_bytes());
    image.is_mended("(copied flag)");
}

#[test]
fn a_cluster_in_a_data_file_is_at_its_own_offset_and_where_not_it_is_not_written() {
    for raw in ["data_file_raw=off", "data_file_raw=on"] {
        let mut image = Image::new(&["-o", "data_file=a.data", "-o", raw]);
        let at = image.entry(3);
        image.put(at, &((5 * CLUSTER) | COPIED).to_be_bytes());
        let (code, found) = image.check(&[]);
        assert!(code == 2 && found.contains("of the data file"), "{found}");
        let data = image.directory.path().join("a.data");
        let before = std::fs::read(&data).expect("reads");
        // The data of cluster 5 would change with that of cluster 3.
        for what in ["write -P 9 12k 4k", "write -z 12k 4k", "write -P 9 12k 100"] {
            let line = ["io", "-c", what, "a.qcow2"];
            let done = vdtool()
                .current_dir(image.directory.path())
                .args(line)
                .assert();
            let output = done.code(1).get_output().clone();
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(text.contains("check names the damage"), "{what}: {text}");
        }
        assert_eq!(before, std::fs::read(&data).expect("reads"));
        image.run(&["io", "-c", "write -q -P 9 20k 4k", "a.qcow2"]);
    }
}

#[test]
fn an_image_that_does_not_name_its_data_file_is_not_called_clean() {
    let mut image = Image::new(&["-o", "data_file=a.data"]);
    let name = image.extension(0x4441_5441);
    image.put(name - 8, &0x4441_5440_u32.to_be_bytes());
    for repair in [&[][..], &["-r", "all"]] {
        let (code, found) = image.check(repair);
        assert!(code == 2 && found.contains("does not name it"), "{found}");
    }
}

#[test]
fn a_backing_format_of_a_length_that_others_refuse_is_named() {
    let image = Image::new(&[]);
    image.run(&[
        "create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "b.qcow2",
    ]);
    let path = image.directory.path().join("b.qcow2");
    let mut bytes = std::fs::read(&path).expect("reads");
    // The names of features are long.
    for (kind, becomes) in [
        (0xe279_2aca_u32, 0x1111_1111_u32),
        (0x6803_f857, 0xe279_2aca),
    ] {
        let found = bytes.windows(4).position(|w| w == kind.to_be_bytes());
        let at = found.expect("is there");
        bytes[at..at + 4].copy_from_slice(&becomes.to_be_bytes());
    }
    std::fs::write(&path, bytes).expect("writes");
    let mut command = vdtool();
    command.current_dir(image.directory.path());
    let output = command.args(["check", "b.qcow2"]).output().expect("runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains("the name of the backing file's format has"),
        "{text}"
    );
    assert!(!output.status.success());
}

/// Where the directory of bitmaps is.
fn directory(image: &Image) -> u64 {
    image.word(image.extension(0x2385_2875) + 16)
}

#[test]
fn a_bitmap_that_is_damaged_is_taken_away_and_the_others_stay() {
    type Damage = fn(&mut Image, u64);
    let damages: [(&str, Damage); 7] = [
        ("its flags are", |i, at| i.put(at + 12, &[0, 0, 0, 0xf0])),
        ("its type is", |i, at| i.put(at + 16, &[2])),
        ("its granularity is", |i, at| i.put(at + 17, &[60])),
        ("its table has 0 entries", |i, at| {
            i.put(at + 8, &[0; 4]);
        }),
        ("bytes long (the file ends at", |i, at| {
            i.put(at, &(1_u64 << 40).to_be_bytes());
        }),
        ("has another use too", |i, at| {
            let l1 = i.word(40);
            i.put(at, &l1.to_be_bytes());
        }),
        ("an entry of the table of bitmap 1 is", |i, at| {
            let table = i.word(at);
            i.put(table, &(1_u64 << 60).to_be_bytes());
        }),
    ];
    for (text, make) in damages {
        let mut image = Image::with_bitmaps(&["one", "two", "three"]);
        // Entries of such names are 32 bytes long.
        let second = directory(&image) + 32;
        make(&mut image, second);
        image.is_mended(text);
        let info = image.run(&["info", "a.qcow2"]);
        assert!(info.contains("one") && info.contains("three"), "{info}");
        assert!(!info.contains("two"), "{info}");
    }
}

#[test]
fn a_writer_that_counts_anew_takes_no_bitmap_away() {
    let mut image = Image::with_bitmaps(&["one", "two"]);
    let first = directory(&image);
    image.put(first + 16, &[2]);
    // The dirty bit.
    image.put(79, &[1]);
    let line = ["io", "-c", "write -P 9 0 4k", "a.qcow2"];
    let mut command = vdtool();
    command.current_dir(image.directory.path());
    command.args(line).assert().code(1);
    let image = image.read();
    assert_eq!(image.word(directory(&image) + 16) >> 56, 2);
    image.is_mended("its type is");
}

#[test]
fn a_directory_of_bitmaps_that_is_damaged_is_taken_away_as_a_whole() {
    type Damage = fn(&mut Image, u64);
    let damages: [(&str, Damage); 5] = [
        ("ends within entry 1", |i, at| {
            i.put(at + 8, &63_u64.to_be_bytes());
        }),
        ("after its last entry", |i, at| {
            i.put(at + 8, &72_u64.to_be_bytes());
        }),
        ("in a reserved field", |i, at| i.put(at + 7, &[1])),
        ("a multiple of 0x1000", |i, at| i.put(at + 23, &[8])),
        ("has another use too", |i, at| {
            let l1 = i.word(40);
            i.put(at + 16, &l1.to_be_bytes());
        }),
    ];
    for (text, make) in damages {
        let mut image = Image::with_bitmaps(&["one", "two"]);
        let extension = image.extension(0x2385_2875);
        make(&mut image, extension);
        image.is_mended(text);
    }
}

#[test]
fn leaks_that_a_stopped_repair_gave_back_are_mended_to_the_end_by_the_next() {
    let mut image = Image::new(&[]);
    let at = image.entry(2);
    let host = image.word(at) & OFFSET;
    // As after the counts, and before the flags.
    image.put(at, &host.to_be_bytes());
    let leak = image.word(image.entry(4)) & OFFSET;
    let count = image.refcount_at(leak);
    image.put(count, &[0, 2]);
    let before = image.content();
    let (code, found) = image.check(&["-r", "leaks"]);
    assert_eq!(code, 0, "{found}");
    assert_eq!(image.check(&[]).0, 0);
    assert_eq!(before, image.content());
    is_clean(&image.path());
}

#[test]
fn what_only_qemu_refuses_in_a_bitmap_is_clean() {
    // The format allows the flag for extra data, of which there may be none.
    let mut image = Image::with_bitmaps(&["one"]);
    let first = directory(&image);
    image.put(first + 12, &[0, 0, 0, 6]);
    assert_eq!(image.check(&[]).0, 0);
    if requires("qemu-img") {
        let line = ["check", "-q", "a.qcow2"];
        let mut command = Command::new("qemu-img");
        let output = command
            .current_dir(image.directory.path())
            .args(line)
            .output();
        assert!(!output.expect("runs").status.success());
    }
}

//! Appliances: disks of OVAs and beside OVFs, read where they are.

mod hostile;
mod read;
mod write;

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::util::{Seeded, peer, scratch, vdtool};

const KIB: usize = 1024;
/// Size of the disks here: whole MiB, as appliances have it.
const SIZE: usize = 4 << 20;

fn works(directory: &Path, arguments: &[&str]) -> String {
    let done = vdtool().current_dir(directory).args(arguments).assert();
    let output = done.success().get_output().stdout.clone();
    String::from_utf8(output).expect("is text")
}

/// Runs vdtool, which must end with `code` and one line.
fn fails(directory: &Path, arguments: &[&str], code: i32) -> String {
    let done = vdtool().current_dir(directory).args(arguments).assert();
    let error = done.code(code).get_output().stderr.clone();
    let text = String::from_utf8(error).expect("is text");
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

fn info(directory: &Path, file: &str) -> serde_json::Value {
    let text = works(directory, &["info", "--output", "json", file]);
    serde_json::from_str(&text).expect("is JSON")
}

/// A disk's bytes: data here and there, and holes.
fn content(seed: &str) -> Vec<u8> {
    let mut random = Seeded::new(seed);
    let mut bytes = vec![0; SIZE];
    for (at, len) in [(0, 70 * KIB), (SIZE / 2 - 700, 5000), (SIZE - 600, 600)] {
        bytes[at..at + len].copy_from_slice(&random.bytes(len));
    }
    bytes
}

/// A descriptor of files, each of them a disk: name, size as it is written, further attributes.
fn descriptor(files: &[(&str, usize, &str)]) -> String {
    let mut text = String::from(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
         <Envelope xmlns=\"http://schemas.dmtf.org/ovf/envelope/1\" \
         xmlns:ovf=\"http://schemas.dmtf.org/ovf/envelope/1\">\n<References>\n",
    );
    for (number, (name, size, more)) in files.iter().enumerate() {
        let name = name.replace(' ', "%20");
        let _ = writeln!(
            text,
            "<File ovf:id=\"file{number}\" ovf:href=\"{name}\" ovf:size=\"{size}\" {more}/>"
        );
    }
    text.push_str("</References>\n<DiskSection><Info>Disks</Info>\n");
    for number in 0..files.len() {
        let _ = writeln!(
            text,
            "<Disk ovf:diskId=\"disk{number}\" ovf:fileRef=\"file{number}\" ovf:capacity=\"{}\" \
             ovf:capacityAllocationUnits=\"byte * 2^20\"/>",
            SIZE >> 20
        );
    }
    text.push_str("</DiskSection><VirtualSystem ovf:id=\"vm\"/>\n</Envelope>\n");
    text
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// A manifest of files in a directory.
fn manifest(directory: &Path, names: &[&str]) -> String {
    let line = |name: &&str| {
        let bytes = fs::read(directory.join(name)).expect("reads");
        format!("SHA256({name})= {}\n", hex(&Sha256::digest(&bytes)))
    };
    names.iter().map(line).collect()
}

/// A directory with `a.raw`, `b.qcow2`, `c.vhd`, `d e.vdi`, of which the contents are `0.bin` to
/// `3.bin`, and with their `x.ovf` and `x.mf`.
fn package() -> TempDir {
    let scratch = scratch();
    let dir = scratch.path();
    for (number, name) in DISKS.iter().enumerate() {
        let bytes = content(&format!("ova{number}"));
        fs::write(dir.join(format!("{number}.bin")), bytes).expect("writes");
        let source = format!("{number}.bin");
        works(dir, &["convert", "-f", "raw", &source, name]);
    }
    let size = |name: &str| fs::metadata(dir.join(name)).expect("is there").len();
    let files: Vec<(&str, usize, &str)> = DISKS
        .iter()
        .map(|name| (*name, usize::try_from(size(name)).expect("is small"), ""))
        .collect();
    fs::write(dir.join("x.ovf"), descriptor(&files)).expect("writes");
    let names = ["x.ovf", DISKS[0], DISKS[1], DISKS[2], DISKS[3]];
    fs::write(dir.join("x.mf"), manifest(dir, &names)).expect("writes");
    scratch
}

const DISKS: [&str; 4] = ["a.raw", "b.qcow2", "c.vhd", "d e.vdi"];

/// Packs files with the system's tar.
fn tar(directory: &Path, archive: &str, format: &str, names: &[&str]) {
    let format = format!("--format={format}");
    let line = ["-c", &format, "-f", archive].into_iter();
    peer("tar", directory, line.chain(names.iter().copied()));
}

/// All of the package in the order that importers want.
const ALL: [&str; 6] = ["x.ovf", "x.mf", "a.raw", "b.qcow2", "c.vhd", "d e.vdi"];

/// A header of tar by hand.
fn header(name: &str, letter: u8, size: &[u8]) -> [u8; 512] {
    let mut block = [0; 512];
    block[..name.len()].copy_from_slice(name.as_bytes());
    block[100..107].copy_from_slice(b"0000644");
    block[124..124 + size.len()].copy_from_slice(size);
    block[156] = letter;
    block[257..265].copy_from_slice(b"ustar\x0000");
    summed(block)
}

fn summed(mut block: [u8; 512]) -> [u8; 512] {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

/// A member with its padding.
fn member(name: &str, letter: u8, data: &[u8]) -> Vec<u8> {
    let size = format!("{:011o}", data.len());
    let mut bytes = header(name, letter, size.as_bytes()).to_vec();
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

/// An archive of members, with its end.
fn archive(directory: &Path, name: &str, members: &[Vec<u8>]) {
    let mut bytes = members.concat();
    bytes.extend([0; 1024]);
    fs::write(directory.join(name), bytes).expect("writes");
}

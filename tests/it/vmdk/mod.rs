//! VMDK as others make it, as a hostile hand leaves it, and as its peers see it.

mod check;
pub(crate) mod esx;
mod extents;
mod hostile;
mod keeps;
mod oracle;
mod parents;
mod stream;

use std::fs;
use std::path::Path;

use crate::util::{Seeded, vdtool};

const MIB: u64 = 1 << 20;
const SECTOR: usize = 512;

/// All that are made.
const SUBFORMATS: [&str; 7] = [
    "monolithicSparse",
    "monolithicFlat",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "streamOptimized",
    "vmfs",
    "vmfsSparse",
];

/// Runs vdtool in `directory`, which must end with `code`; what it said.
fn ends(directory: &Path, arguments: &[&str], code: i32) -> String {
    let done = vdtool().current_dir(directory).args(arguments).assert();
    let output = done.get_output().clone();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
    text
}

/// A raw disk with data here and there, as `raw` in `directory`.
fn raw_disk(directory: &Path, name: &str, size: u64) {
    let mut rng = Seeded::new(name);
    let mut bytes = vec![0; usize::try_from(size).expect("small")];
    for (at, len) in [
        (700, 70_000),
        (bytes.len() / 2, 300_000),
        (bytes.len() - 900, 900),
    ] {
        let data = rng.bytes(len);
        bytes[at..at + len].copy_from_slice(&data);
    }
    fs::write(directory.join("raw"), bytes).expect("writes");
}

/// A descriptor with these extents.
fn descriptor(extents: &[&str]) -> String {
    let extents = extents.join("\n");
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"custom\"\n\n\
         # Extent description\n{extents}\n\n# The Disk Data Base\n#DDB\n"
    )
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four"))
}

fn quad(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight"))
}

/// Changes bytes of a file.
fn patch(path: &Path, at: usize, new: &[u8]) {
    let mut bytes = fs::read(path).expect("reads");
    bytes[at..at + new.len()].copy_from_slice(new);
    fs::write(path, bytes).expect("writes");
}

//! The body of the fuzz target on some thousand images with changes at random, in a process with a
//! limit of memory.  `VDTOOL_SEED=random` takes others each time, `VDTOOL_FUZZ_SECONDS=N` goes on
//! for so long; `VDTOOL_CORPUS=DIR` writes the samples there, for the fuzzer to begin with.

use std::process::Command;
use std::time::{Duration, Instant};

use vdtool::image::bitmap::Recording;
use vdtool::image::disc::Form;
use vdtool::image::open::WriteOrder;
use vdtool::storage::open::Access;

use crate::android_cow::made::{BLOCK, Do, all_kinds, text};
use crate::cue::made;
use crate::exercise::exercise;
use crate::layers::{Disk, LayerSpec, Place};
use crate::util::{Seeded, rounds, scratch, vdtool};
use crate::vmdk::esx::se_sparse;

/// Inputs tried in one run.
const ROUNDS: usize = 2000;
/// Address space of the process that tries them, in KiB.
const MEMORY: u32 = 1 << 20;
/// Values that find edges.
const EDGES: [u64; 12] = [
    0,
    1,
    511,
    512,
    1 << 16,
    1 << 31,
    u32::MAX as u64,
    1 << 40,
    1 << 56,
    1 << 62,
    1 << 63,
    u64::MAX,
];

/// Small images with everything in them that a format has.
fn samples() -> Vec<Vec<u8>> {
    let specs = [
        ("qcow2", "cluster_size=512"),
        ("qcow2", "cluster_size=4k,refcount_bits=1"),
        ("qcow2", "cluster_size=16k,extended_l2=on"),
        ("qcow2", "cluster_size=512,compat=0.10"),
        (
            "qcow2",
            "cluster_size=1k,refcount_bits=64,compression_type=zstd",
        ),
        ("vhd", "block_size=4k"),
        ("vhd", "subformat=fixed"),
        ("vdi", "block_size=4k"),
        ("vmdk", "grain_size=4k,zeroed_grain=on"),
        ("vhdx", "block_size=1M"),
    ];
    let mut samples = Vec::new();
    for (format, options) in specs {
        let spec = LayerSpec {
            format,
            options,
            size: 100 << 10,
        };
        let disk = Disk::create(Place::Memory, &[spec]);
        let mut chain = disk.open(Access::Write, WriteOrder::Ordered);
        chain.write_at(&[1; 9000], 300).expect("writes");
        samples.push(disk.memory()[0].to_bytes());
        if let Some(snapshots) = chain.top_mut().as_snapshots() {
            let _ = snapshots.create("one".as_ref(), std::time::SystemTime::UNIX_EPOCH);
        }
        if let Some(bitmaps) = chain.top_mut().as_bitmaps() {
            let _ = bitmaps.add("bits".as_ref(), Some(512), Recording::On);
        }
        chain.write_at(&[2; 5000], 4000).expect("writes");
        chain.close().expect("closes");
        samples.push(disk.memory()[0].to_bytes());
    }
    samples.extend(packages(&samples[0]));
    samples.extend(extents());
    samples.extend(discs());
    samples.extend(updates());
    samples
}

/// A stream, and extents of ESX by themselves.
fn extents() -> Vec<Vec<u8>> {
    let scratch = scratch();
    let dir = scratch.path();
    let mut disk = vec![0; 300 << 10];
    disk[70_000..150_000].fill(7);
    std::fs::write(dir.join("raw"), &disk).expect("has room");
    let convert = |options: &str, target: &str| {
        let line = ["convert", "-q", "-O", "vmdk", "-o", options, "raw", target];
        vdtool().current_dir(dir).args(line).assert().success();
        std::fs::read(dir.join(target)).expect("reads")
    };
    let stream = convert("subformat=streamOptimized,grain_size=16k", "s.vmdk");
    convert("subformat=vmfsSparse", "c.vmdk");
    let sparse = std::fs::read(dir.join("c-delta.vmdk")).expect("reads");
    vec![stream, sparse, se_sparse()]
}

/// Packages with that image in them: as it is, compressed, and the parts by themselves.
fn packages(image: &[u8]) -> Vec<Vec<u8>> {
    let package = |name: &str, more: &str, disk: &[u8]| {
        let ovf = format!(
            "<?xml version=\"1.0\"?><Envelope xmlns=\"http://schemas.dmtf.org/ovf/envelope/1\" \
             xmlns:ovf=\"http://schemas.dmtf.org/ovf/envelope/1\"><References><File ovf:id=\"f\" \
             ovf:href=\"{name}\" ovf:size=\"{}\" {more}/></References><DiskSection><Info/><Disk \
             ovf:diskId=\"d\" ovf:fileRef=\"f\" ovf:capacity=\"100\" \
             ovf:capacityAllocationUnits=\"byte * 2^10\"/></DiskSection></Envelope>",
            disk.len()
        );
        let manifest = format!("SHA256({name})= {}\nSHA1(x.ovf)= 00", "ab".repeat(32));
        let members = [
            ("x.ovf", ovf.as_bytes()),
            ("x.mf", manifest.as_bytes()),
            (name, disk),
        ];
        let mut bytes = Vec::new();
        for (name, data) in members {
            let header = vdtool::container::tar::write::header(name, data.len() as u64);
            bytes.extend(header.expect("is small"));
            bytes.extend(data);
            bytes.resize(bytes.len().next_multiple_of(512), 0);
        }
        bytes.resize(bytes.len() + 1024, 0);
        (bytes, ovf.into_bytes())
    };
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut encoder, image).expect("has room");
    let packed = encoder.finish().expect("has room");
    let (plain, ovf) = package("a.qcow2", "", image);
    let (compressed, _) = package("a.gz", "ovf:compression=\"gzip\"", &packed);
    vec![plain, compressed, ovf, packed]
}

/// Gives headers of tar the sums that they should have, so that what is behind them is looked at.
fn sum_again(bytes: &mut [u8]) {
    for block in bytes.chunks_exact_mut(512) {
        if block[257..262] == *b"ustar" {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
}

/// Gives headers, tables of regions and entries of the log of VHDX the checksums that they should
/// have, so that what is behind them is looked at.
fn seal_vhdx(bytes: &mut [u8]) {
    if !bytes.starts_with(b"vhdxfile") {
        return;
    }
    for at in (0..bytes.len()).step_by(4096) {
        let len = match bytes.get(at..at + 16) {
            Some([b'h', b'e', b'a', b'd', ..]) => 4096,
            Some([b'r', b'e', b'g', b'i', ..]) => 64 << 10,
            Some([b'l', b'o', b'g', b'e', _, _, _, _, len @ ..]) => {
                u32::from_le_bytes([len[0], len[1], len[2], len[3]]) as usize
            }
            _ => continue,
        };
        let end = at.saturating_add(len).min(bytes.len());
        if end < at + 16 {
            continue;
        }
        bytes[at + 4..at + 8].fill(0);
        let sum = crc32c::crc32c(&bytes[at..end]).to_le_bytes();
        bytes[at + 4..at + 8].copy_from_slice(&sum);
    }
}

/// Android COW files with all operations, and one whose merge was stopped within a window.
fn updates() -> Vec<Vec<u8>> {
    let mut rng = Seeded::new("fuzz-updates");
    let old = text(&mut rng, 40 * BLOCK);
    let mut samples = Vec::new();
    for (version, compression) in [(1, 0), (2, 1), (2, 4), (3, 1), (3, 4)] {
        let mut plan = all_kinds(version, compression, &mut rng, &old);
        plan.scratch = plan.scratch.min(16 << 10);
        let blocks = vec![21, 1, 0, 20, 9, 10, 45, 4];
        plan.ops.insert(0, (0, Do::Sequence(blocks)));
        samples.push(plan.bytes(&old));
        plan.merged = 2;
        let mut cow = plan.bytes(&old);
        let header = if version == 3 { 78 } else { 38 };
        if version > 1 {
            cow[header] = 2;
            cow[header + 1..header + 17].fill(0);
            let at = (header + 64).to_le_bytes();
            cow[header + 9..header + 17].copy_from_slice(&at);
        }
        samples.push(cow);
    }
    samples
}

/// Sheets, each with the file that all names in it lead to behind a zero byte.
fn discs() -> Vec<Vec<u8>> {
    let mut rng = Seeded::new("fuzz-discs");
    let forms = [Form::Mode1, Form::Form1, Form::Form2, Form::Formless];
    let mut bin = Vec::new();
    for (lba, form) in (0..).zip(forms.iter().cycle().take(12)) {
        bin.extend(made::sectors(&mut rng, *form, lba, 1).0);
    }
    let sheets = [
        "FILE a BINARY\nTRACK 01 MODE2/2352\nINDEX 01 00:00:00\nTRACK 02 AUDIO\nPREGAP 00:00:01\nINDEX 00 00:00:08\nINDEX 01 00:00:10\n",
        "\u{feff}CATALOG 1\rFILE \"a b\" MOTOROLA\rTRACK 01 CDG\rFLAGS DCP\rINDEX 01 00:00:00\rREM SESSION 02\rFILE b BINARY\rTRACK 02 MODE1/2352\rINDEX 01 00:00:00\rPOSTGAP 00:01:00",
        "FILE a BINARY\nTRACK 01 MODE2/2336\nINDEX 01 00:00:00\nTRACK 02 MODE1/2048\nINDEX 01 00:00:05\nTRACK 03 MODE2/2324\nINDEX 01 00:00:06",
        "FILE a WAVE\nTRACK 01 AUDIO\nINDEX 01 00:00:00\n",
    ];
    let wave = made::wave(&bin[..2352 * 3 + 4]);
    let lens = [bin.len(), 2448 * 11, 2336 * 5 + 2048 + 2324 * 2];
    let bins = lens
        .iter()
        .map(|len| &bin[..(*len).min(bin.len())])
        .chain([&*wave]);
    let pairs = sheets.iter().zip(bins);
    pairs
        .map(|(sheet, bin)| [sheet.as_bytes(), &[0], bin].concat())
        .collect()
}

/// A number in either order of bytes.
fn ordered(rng: &mut Seeded, value: u64) -> [u8; 8] {
    match rng.bool() {
        true => value.to_be_bytes(),
        false => value.to_le_bytes(),
    }
}

/// Where VHDX has what it is made of, whose first bytes are looked at most.
const VHDX_PLACES: [usize; 7] = [64, 128, 192, 1024, 2048, 2112, 3072];

/// Changes a few things, near the start of a cluster more often than elsewhere.
fn mutate(rng: &mut Seeded, bytes: &mut Vec<u8>, others: &[Vec<u8>]) {
    let is_vhdx = bytes.starts_with(b"vhdxfile");
    for _ in 0..rng.usize(1..6) {
        let len = bytes.len().max(512);
        let place = match rng.u8(0..4) {
            0..3 if is_vhdx => {
                let place = VHDX_PLACES[rng.usize(0..VHDX_PLACES.len())];
                (place << 10) + rng.usize(0..512) / 2 * 2
            }
            0 => rng.usize(0..128),
            1 => rng.usize(0..len / 512) * 512 + rng.usize(0..6) * 8,
            _ => rng.usize(0..len),
        };
        bytes.resize(len, 0);
        let at = place.min(len - 8);
        match rng.u8(0..8) {
            0 => bytes[at] ^= 1 << rng.u8(0..8),
            1 => bytes[at] = rng.u8(..),
            2 | 3 => {
                let value = EDGES[rng.usize(0..EDGES.len())].wrapping_add(rng.u64(0..3));
                bytes[at..at + 8].copy_from_slice(&ordered(rng, value));
            }
            4 => {
                let value = (rng.u64(0..400) * 512) | (u64::from(rng.bool()) << 63);
                bytes[at / 8 * 8..at / 8 * 8 + 8].copy_from_slice(&ordered(rng, value));
            }
            5 => {
                let edge = EDGES[rng.usize(0..7)];
                let value = ordered(rng, edge);
                let half = if value[..4] == [0; 4] { 4 } else { 0 };
                bytes[at..at + 4].copy_from_slice(&value[half..half + 4]);
            }
            6 => bytes.truncate(at),
            _ => {
                let other = &others[rng.usize(0..others.len())];
                let end = (at + 512).min(len).min(other.len());
                if at < end {
                    bytes[at..end].copy_from_slice(&other[at..end]);
                }
            }
        }
    }
}

#[test]
fn images_with_changes_at_random_never_panic_and_take_little_memory() {
    let samples = samples();
    if let Some(directory) = std::env::var_os("VDTOOL_CORPUS") {
        for (number, sample) in samples.iter().enumerate() {
            let path = std::path::Path::new(&directory).join(format!("sample{number}"));
            std::fs::write(path, sample).expect("has room");
        }
    }
    let this = std::env::current_exe().expect("has a name");
    let script = format!(
        "ulimit -v {MEMORY}; exec '{}' --exact fuzz::inputs --ignored --nocapture --test-threads 1",
        this.display()
    );
    let output = Command::new("sh")
        .args(["-c", &script])
        .output()
        .expect("starts");
    let (out, errors) = (
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    );
    assert!(
        output.status.success(),
        "{:?}: {out}{errors}",
        output.status
    );
    assert!(out.contains("1 passed"), "{out}");
}

#[test]
#[ignore = "run by the test above, in a process with a limit of memory"]
fn inputs() {
    let samples = samples();
    samples.iter().for_each(|s| exercise(s));
    let mut rng = Seeded::new("fuzz");
    let seconds = std::env::var("VDTOOL_FUZZ_SECONDS").map_or(0, |s| s.parse().expect("a number"));
    let end = Instant::now() + Duration::from_secs(seconds);
    for round in 0.. {
        if round >= rounds(ROUNDS) && Instant::now() >= end {
            break;
        }
        let mut bytes = samples[rng.usize(0..samples.len())].clone();
        mutate(&mut rng, &mut bytes, &samples);
        if rng.u8(0..8) > 0 {
            sum_again(&mut bytes);
            seal_vhdx(&mut bytes);
        }
        let result = std::panic::catch_unwind(|| exercise(&bytes));
        if let Err(panic) = result {
            let path = std::env::temp_dir().join("vdtool-fuzz-input");
            let _ = std::fs::write(&path, &bytes);
            eprintln!("round {round}: the input is in {}", path.display());
            std::panic::resume_unwind(panic);
        }
    }
}

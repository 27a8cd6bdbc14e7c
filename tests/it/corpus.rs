//! Real images by other producers: each reads as its list says, or is refused.
//!
//! The collection is not part of the project: `VDTOOL_CORPUS` names its directory, else
//! `../shared/corpus` is looked for; without it these tests are skipped.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use sha2::{Digest, Sha256};
use vdtool::Result;
use vdtool::chain::open::{ChainOptions, open};
use vdtool::chain::{Chain, State};
use vdtool::image::check::Repair;
use vdtool::storage::open::Access;

use crate::util::{assert_same, len, peer, requires, scratch, skipped};

const BLOCK: usize = 4096;
const CHUNK: u64 = 1 << 20;

/// Where the collection is, `None` with a message where it is not.
fn corpus() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/corpus");
    let path = std::env::var_os("VDTOOL_CORPUS").map_or(beside, PathBuf::from);
    if !path.join("index.tsv").is_file() {
        skipped("no corpus");
        return None;
    }
    let tools = ["tar", "zstd", "bzip2"];
    tools.into_iter().all(requires).then_some(path)
}

/// Unpacks an archive of the collection once, and keeps it for later runs.
fn unpacked(corpus: &Path, archive: &'static str) -> PathBuf {
    static LOCK: OnceLock<parking_lot::Mutex<()>> = OnceLock::new();
    let _one_at_a_time = LOCK.get_or_init(Default::default).lock();
    let packed = corpus.join(format!("{archive}.tar.zst"));
    let size = fs::metadata(&packed).expect("the archive is there").len();
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{archive}-{size}"));
    if !target.is_dir() {
        let new = scratch();
        let packed = packed.to_str().expect("a plain path");
        peer("tar", new.path(), ["--zstd", "-xf", packed]);
        // Another process may have been faster; its directory holds the same.
        let _ = fs::rename(new.path(), &target);
    }
    target
}

/// The images of the collection, unpacked; `None` with a message where it is not there.
pub(crate) fn images() -> Option<PathBuf> {
    corpus().map(|corpus| unpacked(&corpus, "images"))
}

/// The further ones.
pub(crate) fn more() -> Option<PathBuf> {
    corpus().map(|corpus| unpacked(&corpus, "more"))
}

/// One line of the list.
#[derive(Debug)]
struct Row {
    name: String,
    stored: PathBuf,
    format: String,
    class: String,
    virtual_size: String,
    image_sha256: String,
    raw_sha256: String,
    nz_digest: String,
    nz_count: String,
}

fn rows(corpus: &Path) -> Vec<Row> {
    let directory = unpacked(corpus, "images");
    let text = fs::read_to_string(corpus.join("index.tsv")).expect("the list reads");
    let parse = |line: &str| {
        let columns: Vec<&str> = line.split('\t').collect();
        let column = |index: usize| columns[index].to_owned();
        Row {
            name: column(0),
            stored: directory.join(columns[1]),
            format: column(2),
            class: column(5),
            virtual_size: column(6),
            image_sha256: column(8),
            raw_sha256: column(9),
            nz_digest: column(10),
            nz_count: column(11),
        }
    };
    text.lines().skip(1).map(parse).collect()
}

/// The image as it was made: some are stored compressed once more.
fn image(row: &Row, directory: &Path) -> PathBuf {
    let name = Path::new(&row.name).file_name().expect("it has a name");
    let path = directory.join(name);
    fs::copy(&row.stored, directory.join("stored")).expect("copies");
    match row.stored.extension().is_some_and(|e| e == "bz2") {
        true => {
            fs::rename(directory.join("stored"), directory.join("stored.bz2")).expect("renames");
            peer("bzip2", directory, ["-d", "stored.bz2"]);
            fs::rename(directory.join("stored"), &path).expect("renames");
        }
        false => fs::rename(directory.join("stored"), &path).expect("renames"),
    }
    path
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Calls `f` with each non-empty piece of the disk; zeroes of more than a chunk come as `None`.
fn pieces(chain: &Chain, mut f: impl FnMut(u64, u64, Option<&[u8]>)) -> Result<()> {
    let mut buf = vec![0; len(CHUNK)];
    for extent in chain.extents(0..chain.virtual_size())? {
        let extent = extent?;
        if matches!(extent.state, State::Zero | State::Hole) {
            f(extent.start, extent.len, None);
            continue;
        }
        let mut at = extent.start;
        while at < extent.end() {
            let count = (extent.end() - at).min(CHUNK);
            let bytes = &mut buf[..len(count)];
            chain.read_at(bytes, at)?;
            f(at, count, Some(bytes));
            at += count;
        }
    }
    Ok(())
}

fn sha256(chain: &Chain) -> Result<String> {
    let zeroes = vec![0; len(CHUNK)];
    let mut hash = Sha256::new();
    pieces(chain, |_, count, bytes| match bytes {
        Some(bytes) => hash.update(bytes),
        None => {
            let mut rest = count;
            while rest > 0 {
                let step = rest.min(CHUNK);
                hash.update(&zeroes[..len(step)]);
                rest -= step;
            }
        }
    })?;
    Ok(hex(&hash.finalize()))
}

/// Number of non-zero blocks of 4 KiB, and the first 12 digits of the digest over them and their
/// offsets.
fn nonzero(chain: &Chain) -> Result<(u64, String)> {
    let (mut hash, mut count) = (Sha256::new(), 0);
    let size = chain.virtual_size();
    let mut next = 0;
    let mut blocks = Vec::new();
    pieces(chain, |at, count, bytes| {
        if bytes.is_some() {
            let first = (at / BLOCK as u64).max(next);
            next = (at + count).div_ceil(BLOCK as u64);
            blocks.extend(first..next);
        }
    })?;
    for block in blocks {
        let at = block * BLOCK as u64;
        let mut bytes = [0; BLOCK];
        let inside = len((size - at).min(BLOCK as u64));
        chain.read_at(&mut bytes[..inside], at)?;
        if bytes != [0; BLOCK] {
            count += 1;
            hash.update(at.to_le_bytes());
            hash.update(bytes);
        }
    }
    let digest = hex(&hash.finalize());
    Ok((count, digest[..12].to_owned()))
}

fn current_size() -> ChainOptions {
    ChainOptions {
        values: vec!["size_rule=current_size".into()],
        ..ChainOptions::default()
    }
}

/// Bytes of the longest disk that is hashed with its zeroes.
const MOST_HASHED: u64 = 300 << 20;

fn reads_right(row: &Row) {
    let directory = scratch();
    let path = image(row, directory.path());
    let chain = open(&path, &ChainOptions::default()).expect("the image opens");
    assert_eq!(
        chain.top().driver().name,
        row.format,
        "{}: probed",
        row.name
    );
    let listed: u64 = row.virtual_size.parse().expect("a size");
    let chain = match chain.virtual_size() == listed {
        true => chain,
        // By default QEMU's rule of sizes holds; the list has the current size.
        false => open(&path, &current_size()).expect("the image opens"),
    };
    assert_eq!(chain.virtual_size(), listed, "{}: size", row.name);
    // Of a long disk the digest of all blocks that are not zero says as much, in less time.
    if row.raw_sha256.len() == 64 && listed <= MOST_HASHED {
        let found = sha256(&chain).expect("reads");
        assert_eq!(found, row.raw_sha256, "{}: content", row.name);
    }
    let (count, digest) = nonzero(&chain).expect("reads");
    assert_eq!(digest, row.nz_digest, "{}: non-zero blocks", row.name);
    assert_eq!(count.to_string(), row.nz_count, "{}", row.name);
}

#[test]
fn disks_by_other_producers_read_as_listed() {
    let Some(corpus) = corpus() else { return };
    let rows = rows(&corpus);
    for (format, least) in [("vhd", 15), ("vhdx", 5), ("vdi", 3), ("vmdk", 13)] {
        let classes = ["valid", "damaged", "dirty-log"];
        let right: Vec<&Row> = rows
            .iter()
            .filter(|r| r.format == format && classes.contains(&&*r.class))
            // Its data is in another file, which the collection does not have.
            .filter(|r| !r.name.ends_with("vbox-A-Fixed.vmdk"))
            .collect();
        assert!(right.len() >= least, "the list has {} of them", right.len());
        right.into_iter().for_each(reads_right);
    }
}

#[test]
fn disks_that_are_malformed_or_truncated_are_refused() {
    let Some(corpus) = corpus() else { return };
    let rows = rows(&corpus);
    let formats = ["vhd", "vhdx", "vmdk"];
    let bad =
        |r: &&Row| formats.contains(&&*r.format) && ["malformed", "truncated"].contains(&&*r.class);
    let bad: Vec<&Row> = rows.iter().filter(bad).collect();
    assert!(bad.len() >= 5, "the list has {} of them", bad.len());
    for row in bad {
        let directory = scratch();
        let path = image(row, directory.path());
        let error = open(&path, &ChainOptions::default()).expect_err(&row.name);
        println!("{}: {error}", row.name);
    }
}

#[test]
fn raw_images_by_other_producers_read_as_they_are() {
    let Some(corpus) = corpus() else { return };
    let rows = rows(&corpus);
    let raw: Vec<&Row> = rows.iter().filter(|r| r.format == "raw/ref").collect();
    assert!(!raw.is_empty(), "the list has raw images");
    for row in raw {
        let directory = scratch();
        let path = image(row, directory.path());
        let chain = open(&path, &ChainOptions::default()).expect("raw opens");
        let found = sha256(&chain).expect("reads");
        assert_eq!(found, row.image_sha256, "{}", row.name);
    }
}

#[test]
fn no_image_by_another_producer_makes_a_probe_or_a_read_panic() {
    let Some(corpus) = corpus() else { return };
    for row in rows(&corpus) {
        let Ok(chain) = open(&row.stored, &ChainOptions::default()) else {
            continue;
        };
        let mut buf = [0; BLOCK];
        let size = chain.virtual_size();
        for at in [0, size / 2, size.saturating_sub(BLOCK as u64)] {
            let inside = len((size - at).min(BLOCK as u64));
            let _ = chain.read_at(&mut buf[..inside], at);
        }
    }
}

/// What we write into images by others stays, and nothing else changes.
#[test]
fn disks_by_other_producers_can_be_written() {
    let Some(corpus) = corpus() else { return };
    for row in rows(&corpus) {
        let is_one = ["vhd", "vhdx", "vdi", "vmdk"].contains(&&*row.format);
        if !is_one || !["valid", "dirty-log"].contains(&&*row.class) {
            continue;
        }
        // Streams are written once; of one disk the data is elsewhere.
        let stream = ["iotest-version3", "tream.vmdk", "vbox-A-Fixed"];
        if stream.iter().any(|part| row.name.contains(part)) {
            continue;
        }
        let directory = scratch();
        let path = image(&row, directory.path());
        let chain = open(&path, &ChainOptions::write()).expect("opens for writing");
        let size = chain.virtual_size();
        let first = len(size.min(3 * CHUNK));
        let mut expected = vec![0; first];
        chain.read_at(&mut expected, 0).expect("reads");
        for at in [5, first / 3, first - 3000] {
            let bytes = [0x96; 2900];
            chain.write_at(&bytes, at as u64).expect("writes");
            expected[at..at + bytes.len()].copy_from_slice(&bytes);
        }
        chain.write_at(&[0x69; 700], size - 700).expect("writes");
        if size == first as u64 {
            expected[first - 700..].fill(0x69);
        }
        chain.flush().expect("flushes");
        chain.close().expect("closes");
        drop(chain);
        let chain = open(&path, &ChainOptions::read()).expect("opens again");
        let mut found = vec![0; first];
        chain.read_at(&mut found, 0).expect("reads");
        assert_same(&found, &expected, 0, &row.name);
        let mut last = [0; 700];
        chain.read_at(&mut last, size - 700).expect("reads");
        assert_eq!(last, [0x69; 700], "{}", row.name);
        let check = chain.top().as_check().expect("it has a check");
        let report = check
            .check(Repair::Nothing, &vdtool::util::progress::Silent)
            .expect("the check runs");
        assert_eq!(report.corruptions, 0, "{}: {report:?}", row.name);
    }
}

#[test]
fn vhds_that_a_hostile_writer_leaves_are_refused() {
    let Some(corpus) = corpus() else { return };
    let directory = unpacked(&corpus, "malformed");
    let text = fs::read_to_string(corpus.join("malformed.tsv")).expect("the list reads");
    let mut seen = 0;
    for line in text.lines().filter(|l| l.starts_with("vpc\t")) {
        let columns: Vec<&str> = line.split('\t').collect();
        let path = directory.join("malformed").join(columns[2]);
        for access in [Access::Read, Access::Write] {
            let mut options = ChainOptions::default();
            options.storage.access = access;
            let error = open(&path, &options).expect_err(columns[2]);
            println!("{}: {error}", columns[2]);
        }
        seen += 1;
    }
    assert!(seen >= 3, "the list has {seen} of them");
}

#[test]
fn images_that_name_other_files_do_not_get_them_opened() {
    let Some(corpus) = corpus() else { return };
    let directory = unpacked(&corpus, "probes").join("security-probes");
    for name in ["bk.qcow2", "nofmt.qcow2", "rel.qcow2"] {
        match open(&directory.join(name), &ChainOptions::default()) {
            Err(e) => println!("{name}: {e}"),
            Ok(chain) => assert_eq!(chain.layers().len(), 1, "{name}: opened another file"),
        }
    }
}

#[test]
fn qcow2s_by_other_producers_read_as_listed_and_check_as_in_qemu_img() {
    let Some(corpus) = corpus() else { return };
    let rows = rows(&corpus);
    let valid = |r: &&Row| r.format == "qcow2" && r.class == "valid";
    let valid: Vec<&Row> = rows.iter().filter(valid).collect();
    assert!(valid.len() >= 14, "the list has {} of them", valid.len());
    for row in valid {
        reads_right(row);
        let directory = scratch();
        let path = image(row, directory.path());
        let chain = open(&path, &ChainOptions::default()).expect("opens");
        let check = chain.top().as_check().expect("qcow2 has a check");
        let report = check
            .check(Repair::Nothing, &vdtool::util::progress::Silent)
            .expect("the check runs");
        assert_eq!(report.corruptions, 0, "{}: {report:?}", row.name);
        if !requires("qemu-img") {
            continue;
        }
        let name = path.to_str().expect("a plain path");
        let theirs = peer(
            "qemu-img",
            directory.path(),
            ["check", "--output=json", name],
        );
        let theirs: serde_json::Value = serde_json::from_str(&theirs).expect("is JSON");
        let number = |key: &str| theirs[key].as_u64().unwrap_or(0);
        let ours = [
            ("leaks", report.leaks),
            ("total-clusters", report.total_clusters),
            ("allocated-clusters", report.allocated_clusters),
            ("compressed-clusters", report.compressed_clusters),
            ("fragmented-clusters", report.fragmented_clusters),
            ("image-end-offset", report.image_end_offset),
        ];
        for (key, value) in ours {
            assert_eq!(value, number(key), "{}: {key}", row.name);
        }
    }
}

#[test]
fn qcow2s_that_are_truncated_are_refused() {
    let Some(corpus) = corpus() else { return };
    let rows = rows(&corpus);
    let bad = |r: &&Row| r.format == "qcow2" && r.class == "truncated";
    let bad: Vec<&Row> = rows.iter().filter(bad).collect();
    assert!(bad.len() >= 2, "the list has {} of them", bad.len());
    for row in bad {
        let directory = scratch();
        let path = image(row, directory.path());
        let error = open(&path, &ChainOptions::default()).expect_err(&row.name);
        println!("{}: {error}", row.name);
    }
}

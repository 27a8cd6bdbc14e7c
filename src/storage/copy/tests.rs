use std::path::Path;
use std::sync::Arc;

use super::*;
use crate::error::ErrorKind;
use crate::storage::file::FileStorage;
use crate::storage::memory::MemoryStorage;
use crate::storage::open::Caching;

fn file(caching: Caching) -> Arc<dyn Storage> {
    let file = tempfile::tempfile().expect("a temporary file");
    Arc::new(FileStorage::with_caching(file, Path::new("scratch"), caching).expect("wraps"))
}

fn kinds() -> Vec<Arc<dyn Storage>> {
    vec![
        file(Caching::Mapped),
        file(Caching::Buffered),
        Arc::new(MemoryStorage::new()),
    ]
}

fn pattern(len: usize) -> Vec<u8> {
    (1..=253).cycle().take(len).collect()
}

#[test]
fn every_pair_of_kinds_copies_at_odd_offsets() {
    let bytes = pattern(3 * CHUNK + 777);
    for src in kinds() {
        src.write_at(&bytes, 0).expect("writes");
        for dst in kinds() {
            let len = len64(bytes.len()) - 100;
            copy(&*src, 100, &*dst, 51, len).expect("copies");
            assert_eq!(dst.size(), 51 + len);
            let mut back = vec![0; bytes.len() - 100];
            dst.read_at(&mut back, 51).expect("reads");
            assert!(back == bytes[100..]);
        }
    }
}

#[test]
fn a_copy_past_the_end_of_the_source_copies_zeroes() {
    for src in kinds() {
        src.write_at(&[1; 100], 0).expect("writes");
        let dst = MemoryStorage::from_bytes(&[9; 200]);
        copy(&*src, 50, &dst, 0, 150).expect("copies");
        assert_eq!(dst.to_bytes()[..50], [1; 50]);
        assert_eq!(dst.to_bytes()[50..150], [0; 100]);
        assert_eq!(dst.to_bytes()[150..], [9; 50]);
    }
}

#[test]
fn units_with_data_are_found_and_merged() {
    for src in kinds() {
        src.set_len(5 << 20).expect("sparse");
        for at in [5000, 9000, (1 << 20) - 1, 1 << 20, (5 << 20) - 1] {
            src.write_at(&[1], at).expect("writes");
        }
        let found = nonzero(&*src, 0..5 << 20, 4096).expect("scans");
        let mib = 1 << 20;
        let expected = [4096..12288, mib - 4096..mib + 4096, 5 * mib - 4096..5 * mib];
        assert_eq!(found, expected);
        // Units are counted from the start of the range, and the last may be short.
        let found = nonzero(&*src, 4999..5003, 2).expect("scans");
        assert_eq!(found, vec![4999..5001; 1]);
        let found = nonzero(&*src, 4000..9001, 1000).expect("scans");
        assert_eq!(found, [5000..6000, 9000..9001]);
        // A unit that is no divisor of a chunk, and one that is longer.
        let found = nonzero(&*src, 0..5 << 20, 3 * 4096).expect("scans");
        let chunk = |at: u64| at / 12288 * 12288;
        assert_eq!(found[0], 0..12288);
        assert_eq!(found[1], chunk(mib)..chunk(mib) + 12288);
        let found = nonzero(&*src, 0..5 << 20, 2 << 20).expect("scans");
        assert_eq!(found, [0..2 * mib, 4 * mib..5 * mib]);
        nonzero(&*src, 0..1, 0).expect_err("no unit");
    }
}

#[test]
fn a_source_that_shrinks_is_an_error_of_the_copy_and_of_the_scan() {
    for caching in [Caching::Mapped, Caching::Buffered] {
        let named = tempfile::NamedTempFile::new().expect("a temporary file");
        let file = named.reopen().expect("opens");
        let src = FileStorage::with_caching(file, named.path(), caching).expect("wraps");
        src.write_at(&pattern(CHUNK), 0).expect("writes");
        named.as_file().set_len(4096).expect("truncates");
        for dst in kinds() {
            let error = copy(&src, 0, &*dst, 0, len64(CHUNK)).expect_err("gone");
            assert_eq!(error.kind(), ErrorKind::Io);
        }
        nonzero(&src, 0..len64(CHUNK), 4096).expect_err("gone");
    }
}

#[test]
fn a_source_cut_within_its_last_page_is_an_error_too() {
    let named = tempfile::NamedTempFile::new().expect("a temporary file");
    let src = FileStorage::new(named.reopen().expect("opens"), named.path()).expect("wraps");
    src.write_at(&pattern(10_000), 0).expect("writes");
    named.as_file().set_len(9_999).expect("truncates");
    copy(&src, 0, &MemoryStorage::new(), 0, 10_000).expect_err("a byte is gone");
    nonzero(&src, 0..10_000, 4096).expect_err("a byte is gone");
    copy(&src, 0, &MemoryStorage::new(), 0, 9_999).expect("the rest is there");
}

#[test]
fn blocks_that_cannot_be_shared_are_refused_with_nothing_changed() {
    let src = MemoryStorage::from_bytes(&[1; 4096]);
    let dst = file(Caching::Mapped);
    dst.write_at(&[2; 4096], 0).expect("writes");
    for (from, to, len) in [(0, 0, 4096), (1, 0, 10)] {
        let error = share(&src, from, &*dst, to, len).expect_err("memory has no blocks");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }
    let file_src = file(Caching::Mapped);
    file_src.write_at(&[1; 4096], 0).expect("writes");
    let error = share(&*file_src, 1, &*dst, 3, 100).expect_err("not aligned");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    let mut buf = [0; 4096];
    dst.read_at(&mut buf, 0).expect("reads");
    assert_eq!(buf, [2; 4096]);
}

#[test]
fn a_chunk_longer_than_allowed_is_refused() {
    let src = MemoryStorage::new();
    let error = Reader::new().chunk(&src, 0..len64(CHUNK) + 1).map(|_| ());
    assert_eq!(error.expect_err("too long").kind(), ErrorKind::Invalid);
}

/// Needs a directory on a file system that shares blocks, named by `VDTOOL_REFLINK_DIR`.
#[test]
fn blocks_are_shared_where_the_file_system_can() {
    let Some(dir) = std::env::var_os("VDTOOL_REFLINK_DIR") else {
        crate::util::skipped::skipped("VDTOOL_REFLINK_DIR names no directory");
        return;
    };
    let storage = || {
        let file = tempfile::tempfile_in(&dir).expect("a temporary file");
        FileStorage::new(file, Path::new("scratch")).expect("wraps")
    };
    let (src, dst) = (storage(), storage());
    src.write_at(&pattern(1 << 20), 0).expect("writes");
    let error = share(&src, 0, &dst, 0, 1 << 20).expect_err("the target is too short");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    dst.set_len(2 << 20).expect("grows");
    share(&src, 65536, &dst, 1 << 20, 65536).expect("shares");
    let mut buf = vec![0; 65536];
    dst.read_at(&mut buf, 1 << 20).expect("reads");
    assert!(buf == pattern(1 << 20)[65536..131_072]);
    let error = share(&src, 1, &dst, 0, 4096).expect_err("not aligned");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

#[test]
fn a_look_at_few_bytes_says_yes_only_where_data_is() {
    for src in [file(Caching::Mapped), file(Caching::Buffered)] {
        src.set_len(1 << 20).expect("sparse");
        src.write_at(&[1], 70_000).expect("writes");
        src.write_at(&[1], 200_511).expect("writes");
        for (host, found) in [
            (0..65_536, false),
            (65_536..131_072, false),
            (70_000..70_001, true),
            (69_500..69_900, false),
            (200_000..300_000, true),
            (199_999..300_000, false),
            ((1 << 20) - 1..2 << 20, false),
            (5 << 20..6 << 20, false),
        ] {
            assert_eq!(peek(&*src, &host), found, "{host:?}");
        }
    }
    // Without a descriptor it knows nothing.
    assert!(!peek(&MemoryStorage::from_bytes(&[1; 600]), &(0..600)));
}

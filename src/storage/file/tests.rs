use tempfile::NamedTempFile;

use super::*;

fn storage(caching: Caching) -> (NamedTempFile, FileStorage) {
    let named = NamedTempFile::new().expect("a temporary file");
    let file = named.reopen().expect("opens again");
    let storage = FileStorage::with_caching(file, named.path(), caching).expect("wraps");
    (named, storage)
}

const BOTH: [Caching; 2] = [Caching::Mapped, Caching::Buffered];

#[test]
fn bytes_past_the_end_read_as_zeroes() {
    for caching in BOTH {
        let (_named, storage) = storage(caching);
        storage.write_at(b"abc", 10).expect("writes");
        let mut buf = [9; 8];
        storage.read_at(&mut buf, 8).expect("reads");
        assert_eq!(&buf, b"\0\0abc\0\0\0");
        storage
            .read_at(&mut buf, u64::MAX - 3)
            .expect("far past the end");
        assert_eq!(buf, [0; 8]);
    }
}

#[test]
fn a_file_that_shrank_is_an_error_and_no_zeroes() {
    for caching in BOTH {
        let (named, storage) = storage(caching);
        storage.write_at(&[7; 1 << 20], 0).expect("writes");
        let mut buf = [0; 4096];
        storage.read_at(&mut buf, 1 << 19).expect("reads");
        named.as_file().set_len(5000).expect("truncates");
        let error = storage.read_at(&mut buf, 1 << 19).expect_err("gone");
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.message().contains("truncated"), "{error}");
        let mut large = vec![0; 1 << 20];
        storage.read_at(&mut large, 0).expect_err("partly gone");
        storage.run(1 << 19, 4096).expect_err("is no hole");
        storage.read_at(&mut buf, 0).expect("is still there");
        assert_eq!(buf, [7; 4096]);
        storage
            .read_at(&mut buf, 1000)
            .expect_err("cut within a page");
    }
}

#[test]
fn a_file_that_shrank_and_grew_again_reads_as_it_is() {
    let (named, storage) = storage(Caching::Mapped);
    storage.write_at(&[7; 1 << 20], 0).expect("writes");
    let mut buf = [0; 4096];
    storage.read_at(&mut buf, 1 << 19).expect("reads");
    named.as_file().set_len(0).expect("truncates");
    storage.read_at(&mut buf, 1 << 19).expect_err("gone");
    named.as_file().set_len(1 << 20).expect("grows");
    for _ in 0..2 {
        storage.read_at(&mut buf, 1 << 19).expect("reads");
        assert_eq!(buf, [0; 4096]);
    }
}

#[test]
fn holes_are_told_from_data_and_clamped_to_what_was_asked() {
    let (_named, storage) = storage(Caching::Buffered);
    storage.set_len(1 << 20).expect("sparse");
    storage.write_at(&[1; 65536], 65536).expect("writes");
    let run = |host, len| storage.run(host, len).expect("tells");
    assert_eq!(
        run(0, 100),
        HostRun {
            data: false,
            len: 100
        }
    );
    assert_eq!(
        run(0, 1 << 20),
        HostRun {
            data: false,
            len: 65536
        }
    );
    assert_eq!(
        run(65536, 10),
        HostRun {
            data: true,
            len: 10
        }
    );
    assert_eq!(
        run(65536, 1 << 20),
        HostRun {
            data: true,
            len: 65536
        }
    );
    assert_eq!(
        run(1 << 21, 7),
        HostRun {
            data: false,
            len: 7
        }
    );
}

#[test]
fn zeroing_with_space_kept_keeps_length_and_blocks() {
    use std::os::unix::fs::MetadataExt;
    let (named, storage) = storage(Caching::Mapped);
    storage.write_at(&[1; 1 << 20], 0).expect("writes");
    storage.sync().expect("syncs");
    let blocks = named.as_file().metadata().expect("metadata").blocks();
    match storage.zero(4096..1 << 20, Zeroing::KeepSpace) {
        Err(e) if e.kind() == ErrorKind::Unsupported => return,
        done => done.expect("zeroes"),
    }
    let metadata = named.as_file().metadata().expect("metadata");
    assert_eq!(metadata.len(), 1 << 20);
    assert!(metadata.blocks() >= blocks, "space was given back");
    let mut buf = [1; 4097];
    storage.read_at(&mut buf, 4095).expect("reads");
    assert_eq!((buf[0], &buf[1..]), (1, &[0; 4096][..]));
}

#[test]
fn punching_gives_space_back_at_any_offset() {
    use std::os::unix::fs::MetadataExt;
    let (named, storage) = storage(Caching::Mapped);
    storage.write_at(&[1; 1 << 20], 0).expect("writes");
    storage
        .zero(5..(1 << 20) - 5, Zeroing::MayUnmap)
        .expect("punches");
    let metadata = named.as_file().metadata().expect("metadata");
    assert!(
        metadata.blocks() < 100,
        "{} blocks are left",
        metadata.blocks()
    );
    let mut buf = vec![9; 1 << 20];
    storage.read_at(&mut buf, 0).expect("reads");
    assert_eq!(buf[..6], [1, 1, 1, 1, 1, 0]);
    assert_eq!(buf[(1 << 20) - 6..], [0, 1, 1, 1, 1, 1]);
}

#[test]
fn the_length_follows_writes_and_set_len() {
    let (named, storage) = storage(Caching::Mapped);
    storage.write_at(&[1], 99).expect("writes");
    storage.write_at(&[], 1000).expect("writes nothing");
    assert_eq!(storage.size(), 100);
    storage.set_len(10).expect("shrinks");
    assert_eq!(storage.size(), 10);
    storage.reserve(0..1 << 16).expect("reserves");
    assert_eq!(storage.size(), 10);
    assert_eq!(named.as_file().metadata().expect("metadata").len(), 10);
}

#[test]
fn ends_past_the_end_of_numbers_are_refused() {
    let (_named, storage) = storage(Caching::Mapped);
    for host in [u64::MAX, i64::MAX as u64] {
        storage.write_at(&[1], host).expect_err("too far");
    }
    storage.set_len(u64::MAX).expect_err("too long");
    assert_eq!(storage.size(), 0);
}

#[test]
fn a_full_file_system_is_an_error_of_its_own_kind() {
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/full")
        .expect("is on Linux");
    let storage = FileStorage::with_caching(file, Path::new("/dev/full"), Caching::Buffered);
    let error = storage.expect("wraps").write_at(&[1], 0).expect_err("full");
    assert_eq!(error.kind(), ErrorKind::NoSpace);
}

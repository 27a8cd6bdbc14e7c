//! Archives made by hand, as others make them and as nobody should.

use std::sync::Arc;

use super::*;
use crate::storage::memory::MemoryStorage;

/// A header with a right checksum.
fn header(name: &str, letter: u8, size: &str) -> Vec<u8> {
    let mut block = [0; 512];
    block[..name.len()].copy_from_slice(name.as_bytes());
    block[100..107].copy_from_slice(b"0000644");
    block[124..124 + size.len()].copy_from_slice(size.as_bytes());
    block[156] = letter;
    block[257..263].copy_from_slice(b"ustar\0");
    block[263..265].copy_from_slice(b"00");
    summed(block)
}

fn summed(mut block: [u8; 512]) -> Vec<u8> {
    let (sum, _) = header::sums(&block);
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block.to_vec()
}

fn with_data(mut header: Vec<u8>, data: &[u8]) -> Vec<u8> {
    header.extend_from_slice(data);
    let end = header.len().next_multiple_of(512);
    header.resize(end, 0);
    header
}

fn file(name: &str, data: &[u8]) -> Vec<u8> {
    with_data(header(name, b'0', &format!("{:011o}", data.len())), data)
}

fn extension(letter: u8, data: &[u8]) -> Vec<u8> {
    with_data(header("x", letter, &format!("{:011o}", data.len())), data)
}

fn list(parts: &[&[u8]]) -> Result<Vec<Member>> {
    members(&MemoryStorage::from_bytes(&parts.concat()))
}

const END: &[u8] = &[0; 512];

#[test]
fn members_are_found_by_their_headers_in_every_flavour() {
    let name = "d/".repeat(60) + "a.vmdk";
    let long = extension(b'L', format!("{name}\0").as_bytes());
    let pax = extension(b'x', b"9 size=7\n21 path=x/y z.vmdk  \n");
    let mut base = [0; 512];
    base.copy_from_slice(&file("base", b""));
    base[124..136].copy_from_slice(&[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3]);
    let mut old = [0; 512];
    old.copy_from_slice(&file("old", b""));
    old[257..265].fill(0);
    old[156] = 0;
    let parts: [&[u8]; 12] = [
        &extension(b'g', b"17 comment=12345\n"),
        &header("dir/", b'5', "00000000000"),
        &file("./a.ovf", b"<x/>"),
        &long,
        &file("short", b"12345"),
        &pax,
        &file("short", b"1234567"),
        &with_data(summed(base), b"123"),
        &summed(old),
        &header("link", b'2', "00000000000"),
        END,
        b"anything",
    ];
    let members = list(&parts).expect("is right");
    let found: Vec<(&str, Kind, u64)> = members
        .iter()
        .map(|m| {
            let name = m.name.to_str().expect("is text");
            (name, m.kind, m.data.end - m.data.start)
        })
        .collect();
    let expected = [
        ("dir", Kind::Directory, 0),
        ("a.ovf", Kind::File, 4),
        (&*name, Kind::File, 5),
        ("x/y z.vmdk  ", Kind::File, 7),
        ("base", Kind::File, 3),
        ("old", Kind::File, 0),
        ("link", Kind::SymbolicLink, 0),
    ];
    assert_eq!(found, expected);
    let bytes = parts.concat();
    let at = usize::try_from(members[3].data.start).expect("is small");
    assert_eq!(&bytes[at..at + 7], b"1234567");
    assert_eq!(first_name(&parts[2..].concat()).expect("is there"), "a.ovf");
    assert_eq!(first_name(&parts[3..].concat()).expect("is there"), *name);
    assert_eq!(
        first_name(&parts[5..].concat()).expect("is there"),
        "x/y z.vmdk  "
    );
}

#[test]
fn what_is_damaged_is_an_error_with_its_offset_and_never_a_quiet_end() {
    let first = file("a", b"1");
    let mut bad = file("b", b"2");
    bad[3] ^= 1;
    let mut negative = [0; 512];
    negative.copy_from_slice(&header("b", b'0', ""));
    negative[124..136].fill(0xff);
    let mut huge = negative;
    huge[124..136].copy_from_slice(&[
        0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
    ]);
    let cases: &[(&[u8], &str)] = &[
        (&bad, "checksum"),
        (&[], "was cut"),
        (&[0; 511], "was cut"),
        (&file("b", b"2")[..512], "(allowed: inside"),
        (&file("b", b"2")[..600], "was cut"),
        (&file("a", b"2"), "second member 'a'"),
        (&file("./a", b"2"), "second member 'a'"),
        (&header("b", b'0', "0000000009"), "octal digits"),
        (&header("b", b'0', ""), "octal digits"),
        (&summed(negative), "0 and more"),
        (&summed(huge), "inside the file"),
        (
            &header("b", b'2', "00000000001"),
            "symbolic link of 1 bytes",
        ),
        (&header("", b'0', "00000000000"), "without a name"),
        (
            &[extension(b'x', b"0 size=1\n"), file("b", b"")].concat(),
            "record of pax 0 bytes",
        ),
        (
            &[extension(b'x', b"9 size=1\n"), END.to_vec()].concat(),
            "before the member",
        ),
        (
            &[extension(b'L', b"b"), extension(b'L', b"c"), file("d", b"")].concat(),
            "second long",
        ),
        (
            &[extension(b'x', b""), extension(b'x', b""), file("d", b"")].concat(),
            "second header",
        ),
        (&header("x", b'L', "00000020000"), "(allowed: 4096)"),
        (&header("x", b'x', "77777777777"), "(allowed: 1048576)"),
    ];
    for (bytes, part) in cases {
        let end: &[u8] = if part.contains("cut") || part.contains("(allowed: inside") {
            &[]
        } else {
            END
        };
        let error = list(&[&first, bytes, end]).expect_err(part);
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{part}: {error}");
        let text = error.to_string();
        assert!(text.contains(part) && text.contains("0x"), "{part}: {text}");
    }
    for bytes in [&b""[..], &[0; 1024], &[7; 1024]] {
        let error = list(&[bytes]).expect_err("is none");
        assert_eq!(error.kind(), ErrorKind::WrongFormat);
    }
}

#[test]
fn sparse_members_are_told_from_files() {
    let mut sparse = [0; 512];
    sparse.copy_from_slice(&header("old", b'S', "00000000005"));
    sparse[482] = 1;
    let sparse = summed(sparse);
    let (mut more, last) = ([1; 512], [0; 512]);
    more[504] = 1;
    let old = [
        sparse.clone(),
        more.to_vec(),
        with_data(last.to_vec(), b"12345"),
    ]
    .concat();
    let pax = extension(b'x', b"22 GNU.sparse.major=1\n");
    let members = list(&[&old, &pax, &file("new", b"1"), &file("c", b""), END]).expect("is right");
    let kinds: Vec<Kind> = members.iter().map(|m| m.kind).collect();
    assert_eq!(kinds, [Kind::Sparse, Kind::Sparse, Kind::File]);
    assert_eq!(members[0].data, 1536..1541);
    let endless = [sparse, [1; 512].repeat(3)].concat();
    list(&[&endless]).expect_err("has no end");
}

#[test]
fn a_thousand_members_are_read_in_pieces_of_a_header() {
    let mut bytes = Vec::new();
    for number in 0..1000 {
        bytes.extend(file(&format!("f{number}"), &[1; 700]));
    }
    bytes.extend(END);
    let storage = Arc::new(MemoryStorage::from_bytes(&bytes));
    assert_eq!(members(&*storage).expect("is right").len(), 1000);
}

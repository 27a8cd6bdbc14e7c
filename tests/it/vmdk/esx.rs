//! Extents of ESX: copy-on-write files and space-efficient ones, made by hand.

use std::fs;

use crate::util::{peer, requires, scratch};
use crate::vmdk::{SECTOR, descriptor, ends, patch};

const GRAIN: usize = 8 * SECTOR;

/// A seSparse file of 40 MiB: in its first table grain 0 is stored, 1 unmapped, 2 zero, 5 stored out of
/// order; the second table is none; grain 3 of the third is stored.
pub(crate) fn se_sparse() -> Vec<u8> {
    let mut bytes = vec![0; 300 * SECTOR];
    let mut put = |at: usize, value: u64| bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    let (volatile, gd, tables, grains) = (1, 8, 64, 256);
    for (at, value) in [
        (0, 0xcafe_babe),
        (8, 0x2_0000_0001),
        (16, 40 << 11),
        (24, 8),
        (32, 64),
        (80, volatile),
        (88, 1),
        (96, 2),
        (104, 1),
        (112, 3),
        (120, 1),
        (128, gd),
        (136, 1),
        (144, tables),
        (152, 128),
        (160, 192),
        (168, 1),
        (176, 200),
        (184, 1),
        (192, grains),
        (200, 44),
    ] {
        put(at, value);
    }
    put(SECTOR, 0xcafe_cafe);
    let (gd, tables) = (8 * SECTOR, 64 * SECTOR);
    put(gd, 0x1000_0000 << 32);
    put(gd + 16, 0x1000_0000 << 32 | 1);
    // The number's low twelve bits stand above the others.
    let stored = |number: u64| 3 << 60 | (number & 0xfff) << 48 | number >> 12;
    for (slot, entry) in [(0, stored(1)), (1, 1 << 60), (2, 2 << 60), (5, stored(0))] {
        put(tables + slot * 8, entry);
    }
    put(tables + 64 * SECTOR + 3 * 8, stored(2));
    for number in 0..3 {
        let at = 256 * SECTOR + number * GRAIN;
        bytes[at..at + GRAIN].fill(u8::try_from(number).expect("small") + 1);
    }
    bytes
}

fn wanted() -> Vec<u8> {
    let mut disk = vec![0; 40 << 20];
    for (grain, byte) in [(0, 2), (5, 1), (2 * 4096 + 3, 3)] {
        disk[grain * GRAIN..(grain + 1) * GRAIN].fill(byte);
    }
    disk
}

#[test]
fn a_space_efficient_extent_is_read_and_not_written() {
    let scratch = scratch();
    let dir = scratch.path();
    fs::write(dir.join("d-sesparse.vmdk"), se_sparse()).expect("writes");
    fs::write(dir.join("raw"), wanted()).expect("writes");
    let text = descriptor(&["RW 81920 SESPARSE \"d-sesparse.vmdk\""]);
    let text = text.replace("\"custom\"", "\"seSparse\"");
    fs::write(dir.join("d.vmdk"), text).expect("writes");
    for name in ["d.vmdk", "d-sesparse.vmdk"] {
        ends(dir, &["compare", "raw", name], 0);
    }
    if requires("qemu-img") {
        peer(
            "qemu-img",
            dir,
            ["compare", "-f", "raw", "-F", "vmdk", "raw", "d.vmdk"],
        );
    }
    ends(dir, &["check", "d.vmdk"], 0);
    let text = ends(dir, &["io", "-c", "write 0 512", "d.vmdk"], 63);
    assert!(text.contains("SESPARSE"), "{text}");
    let bad: [(&str, usize, u64, i32); 7] = [
        ("journal", SECTOR + 24, 1, 63),
        ("volatile header", SECTOR, 0, 1),
        ("version", 8, 1, 63),
        ("capacity", 16, 1 << 60, 1),
        ("grain directory", 128, 1 << 40, 1),
        ("entry 0 of the grain directory", 8 * SECTOR, 7, 1),
        ("grain 0", 64 * SECTOR, 3 << 60 | 0xffff, 1),
    ];
    for (part, at, value, code) in bad {
        fs::write(dir.join("d-sesparse.vmdk"), se_sparse()).expect("writes");
        patch(&dir.join("d-sesparse.vmdk"), at, &value.to_le_bytes());
        let text = ends(dir, &["convert", "d.vmdk", "out.raw"], code);
        assert!(
            text.contains(part) && text.contains("d-sesparse.vmdk"),
            "{part}: {text}"
        );
    }
}

#[test]
fn a_copy_on_write_extent_gets_its_tables_as_it_is_written() {
    let scratch = scratch();
    let dir = scratch.path();
    let option = "subformat=vmfsSparse";
    ends(
        dir,
        &["create", "-q", "-f", "vmdk", "-o", option, "d.vmdk", "20M"],
        0,
    );
    let free = |bytes: &[u8]| crate::vmdk::word(bytes, 28) as usize * SECTOR;
    let empty = fs::read(dir.join("d-delta.vmdk")).expect("reads");
    assert_eq!(free(&empty), empty.len());
    assert_eq!(&empty[..4], b"COWD");
    ends(dir, &["io", "-c", "write -P 7 5M 1536", "d.vmdk"], 0);
    let bytes = fs::read(dir.join("d-delta.vmdk")).expect("reads");
    // A table, and three grains of one sector; others take space behind them.
    assert_eq!(bytes.len(), empty.len() + 32 * SECTOR + 3 * SECTOR);
    assert_eq!(free(&bytes), bytes.len());
    ends(
        dir,
        &[
            "io",
            "-c",
            "read -P 7 5M 1536",
            "-c",
            "read -P 0 0 5M",
            "d.vmdk",
        ],
        0,
    );
    for (part, at, value) in [
        ("version", 4, 2_u32),
        ("grain size", 16, 0),
        ("grain size", 16, 3),
        ("grain directory", 20, 1 << 30),
        ("grain directory", 24, 1),
        ("grain directory", 24, u32::MAX),
    ] {
        fs::write(dir.join("d-delta.vmdk"), &bytes).expect("writes");
        patch(&dir.join("d-delta.vmdk"), at, &value.to_le_bytes());
        let code = if part == "version" { 63 } else { 1 };
        let text = ends(dir, &["convert", "d.vmdk", "out.raw"], code);
        assert!(
            text.contains(part) && text.contains("d-delta.vmdk"),
            "{part}: {text}"
        );
    }
}

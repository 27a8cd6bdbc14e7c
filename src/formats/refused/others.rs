//! What holds a disk, or does not, and is no format of virtual disks: backups, discs, containers.

use super::bytes::{
    ends, has, is_bzip2, is_error_page, is_gzip, is_tar, is_xml, is_zstd, mentions, short, starts,
    tail_word, tar_name, word_be,
};
use super::row;
use crate::image::probe::Refused;

/// Backups, discs, containers, and what is no image at all.
pub(super) static OTHERS: &[Refused] = &[
    row("vma", &[], &["vma"], "Proxmox backup archive", |i| {
        short(i, b"VMA\0") && word_be(i, 4) == Some(1)
    }),
    row(
        "pbs-index",
        &[],
        &["fidx", "didx"],
        "Proxmox Backup index",
        |i| {
            starts(i, &[0x2f, 0x7f, 0x41, 0xed, 0x91, 0xfd, 0x0f, 0xcd])
                || starts(i, &[0x1c, 0x91, 0x4e, 0xa5, 0x19, 0xba, 0xb3, 0xcd])
        },
    ),
    row(
        "rbd-export",
        &[],
        &[],
        "export of a Ceph block device",
        |i| {
            [
                "rbd diff v1\n",
                "rbd diff v2\n",
                "rbd image v1\n",
                "rbd image v2\n",
            ]
            .iter()
            .any(|magic| starts(i, magic.as_bytes()))
        },
    ),
    row("vmware-ctk", &[], &[], "VMware change map", |i| {
        starts(i, &[0xa2, 0x72, 0x19, 0xf6, 1, 0, 0, 0])
    }),
    row("ffu", &[], &["ffu"], "Windows full flash update", |i| {
        has(i, 4, b"SignedImage ")
    }),
    row(
        "wim",
        &["esd"],
        &["wim", "esd"],
        "Windows imaging file",
        |i| starts(i, b"MSWIM\0\0\0") || starts(i, b"WLPWM\0\0\0"),
    ),
    row(
        "machine",
        &[],
        &["vbox", "pvs", "vmx"],
        "description of a virtual machine",
        |i| is_xml(i) && (mentions(i, "<VirtualBox") || mentions(i, "ParallelsVirtualMachine")),
    ),
    row(
        "ewf",
        &["e01"],
        &["e01", "ex01", "l01", "lx01"],
        "forensic image",
        |i| {
            starts(i, b"EVF\t\r\n\xff\0")
                || starts(i, b"LVF\t\r\n\xff\0")
                || starts(i, b"EVF2\r\n\x81\0")
                || starts(i, b"LEF2\r\n\x81\0")
        },
    ),
    row("aff", &[], &["aff", "afd", "afm"], "forensic image", |i| {
        starts(i, b"AFF10\r\n\0")
    }),
    row("tib", &[], &["tib", "tibx"], "Acronis backup", |i| {
        starts(i, &[0xce, 0x24, 0xb9, 0xa2, 0x20, 0, 0, 0])
    }),
    row(
        "partclone",
        &[],
        &[],
        "partclone backup of a file system",
        |i| starts(i, b"partclone-image\0"),
    ),
    row(
        "partimage",
        &[],
        &[],
        "partimage backup of a file system",
        |i| starts(i, b"PaRtImAgE-VoLuMe"),
    ),
    row(
        "ntfsclone",
        &[],
        &[],
        "ntfsclone backup of a file system",
        |i| starts(i, b"\0ntfsclone-image"),
    ),
    row("btrfs-stream", &[], &[], "stream of btrfs send", |i| {
        starts(i, b"btrfs-stream\0")
    }),
    row("mds", &[], &["mds"], "Media Descriptor of a disc", |i| {
        starts(i, b"MEDIA DESCRIPTOR")
    }),
    row("nrg", &[], &["nrg"], "Nero disc image", |i| {
        let at = i.tail.len().checked_sub(12);
        let modern = at.is_some_and(|at| i.tail[at..].starts_with(b"NER5"));
        modern || at.is_some_and(|at| i.tail[at + 4..].starts_with(b"NERO"))
    }),
    row("cdi", &[], &["cdi"], "DiscJuggler disc image", |i| {
        matches!(tail_word(i, 8), Some(0x8000_0004..=0x8000_0006))
            && tail_word(i, 4).is_some_and(|at| at != 0 && u64::from(at) < i.len)
    }),
    row("chd", &[], &["chd"], "MAME compressed disk", |i| {
        starts(i, b"MComprHD")
    }),
    row(
        "cso",
        &["zso"],
        &["cso", "zso"],
        "compressed disc image",
        |i| short(i, b"CISO") || short(i, b"ZISO"),
    ),
    row("isz", &[], &["isz"], "compressed disc image", |i| {
        short(i, b"IsZ!")
    }),
    row("daa", &[], &["daa"], "compressed disc image", |i| {
        short(i, b"DAA\0")
    }),
    row("2mg", &[], &["2mg"], "Apple II disk image", |i| {
        short(i, b"2IMG")
    }),
    row(
        "hdi",
        &["nhd"],
        &["hdi", "nhd"],
        "PC-98 hard disk image",
        |i| starts(i, b"T98HDDIMAGE.R0"),
    ),
    row("hdf", &[], &[], "ZX Spectrum hard disk image", |i| {
        short(i, b"RS-IDE\x1a")
    }),
    row("gzip", &["gz"], &["gz", "tgz"], "compressed file", is_gzip),
    row(
        "bzip2",
        &["bz2"],
        &["bz2", "tbz2"],
        "compressed file",
        is_bzip2,
    ),
    row("xz", &[], &["xz", "txz"], "compressed file", |i| {
        short(i, b"\xfd7zXZ\0")
    }),
    row(
        "zstd",
        &["zst"],
        &["zst", "tzst"],
        "compressed file",
        is_zstd,
    ),
    row("lz4", &[], &["lz4"], "compressed file", |i| {
        short(i, &[0x04, 0x22, 0x4d, 0x18]) || short(i, &[0x02, 0x21, 0x4c, 0x18])
    }),
    row("lzip", &["lz"], &["lz"], "compressed file", |i| {
        short(i, b"LZIP\x01")
    }),
    row("lzop", &["lzo"], &["lzo"], "compressed file", |i| {
        starts(i, &[0x89, b'L', b'Z', b'O', 0, 0x0d, 0x0a, 0x1a, 0x0a])
    }),
    row("zip", &[], &["zip"], "archive", |i| short(i, b"PK\x03\x04")),
    row("7z", &[], &["7z"], "archive", |i| {
        short(i, b"7z\xbc\xaf\x27\x1c")
    }),
    row("rar", &[], &["rar"], "archive", |i| {
        short(i, b"Rar!\x1a\x07")
    }),
    row("cab", &[], &["cab"], "archive", |i| {
        short(i, b"MSCF\0\0\0\0")
    }),
    row(
        "xva",
        &[],
        &["xva"],
        "XenServer virtual machine in a tar file",
        |i| is_tar(i) && tar_name(i) == b"ova.xml",
    ),
    row("tar", &[], &["tar"], "archive", is_tar),
    row("git-lfs", &[], &[], "pointer to a file in Git LFS", |i| {
        starts(i, b"version https://git-lfs")
    }),
    row(
        "git-annex",
        &[],
        &[],
        "pointer to a file in git-annex",
        |i| starts(i, b"/annex/objects/"),
    ),
    row(
        "page",
        &[],
        &[],
        "answer of a web server, as of a failed download",
        is_error_page,
    ),
    row("openssl", &[], &[], "file encrypted by openssl", |i| {
        starts(i, b"Salted__")
    }),
    row("uif", &[], &["uif"], "MagicISO disc image", |i| {
        let at = i.tail.len().checked_sub(64);
        at.is_some_and(|at| i.tail[at..].starts_with(b"bbis")) && !ends(i, &[0x55, 0xaa])
    }),
];

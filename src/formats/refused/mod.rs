//! Formats that are recognised and not supported: they are refused by name, and never read or
//! written as raw by accident.
//!
//! One row each: what users call it, the extensions that stand for it, how its bytes begin or end.
//! A short magic occurs in boot code as well, so a partition table tells more than it does.

use crate::error::Error;
use crate::image::probe::{ProbeInput, Refused};

mod bytes;
mod others;

use bytes::{ends, is_parallels_descriptor, short, starts, word_be};
use others::OTHERS;

/// Formats of virtual disks.
static DISKS: &[Refused] = &[
    row(
        "qcow",
        &["qcow1"],
        &["qcow"],
        "QEMU's first copy-on-write format",
        |i| starts(i, b"QFI\xfb\0\0\0\x01"),
    ),
    row("qed", &[], &["qed"], "QEMU enhanced disk", |i| {
        short(i, b"QED\0")
    }),
    row("vhds", &[], &["vhds"], "Hyper-V VHD set", |_| false),
    row(
        "parallels",
        &["hdd"],
        &["hdd", "hds"],
        "Parallels disk image",
        |i| {
            starts(i, b"WithoutFreeSpace")
                || starts(i, b"WithouFreSpacExt")
                || is_parallels_descriptor(i)
        },
    ),
    row("luks", &[], &["luks"], "LUKS encrypted volume", |i| {
        short(i, b"LUKS\xba\xbe")
    }),
    row("dmg", &["udif"], &["dmg"], "Apple disk image", |i| {
        i.tail.starts_with(b"koly")
    }),
    row(
        "dmg-encrypted",
        &[],
        &[],
        "encrypted Apple disk image",
        |i| starts(i, b"encrcdsa") || ends(i, b"cdsaencr"),
    ),
    row("cloop", &[], &["cloop"], "compressed loopback image", |i| {
        starts(i, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop")
    }),
    row("bochs", &[], &["bochs"], "Bochs growing disk image", |i| {
        starts(i, b"Bochs Virtual HD Image")
    }),
    row("bochs-sparse", &[], &[], "Bochs sparse disk image", |i| {
        short(i, &[0xce, 0x8a, 0x46, 0x02])
    }),
    row(
        "android-sparse",
        &["simg"],
        &["simg"],
        "Android sparse image",
        |i| short(i, &[0x3a, 0xff, 0x26, 0xed]),
    ),
    row("asif", &[], &["asif"], "Apple sparse image", |i| {
        starts(i, b"shdw") && word_be(i, 4) == Some(1)
    }),
    row(
        "sparseimage",
        &[],
        &["sparseimage"],
        "Apple sparse disk image",
        |i| short(i, b"sprs") && word_be(i, 4) == Some(3),
    ),
    row(
        "uml-cow",
        &[],
        &[],
        "copy-on-write file of User Mode Linux",
        |i| short(i, b"OOOM") && matches!(word_be(i, 4), Some(1..=4)),
    ),
];

const fn row(
    name: &'static str,
    aliases: &'static [&'static str],
    extensions: &'static [&'static str],
    about: &'static str,
    probe: fn(&ProbeInput<'_>) -> bool,
) -> Refused {
    Refused {
        name,
        aliases,
        extensions,
        about,
        probe,
    }
}

/// Every such format.  Those that a driver reads are not among them.
pub static REFUSED: &[&[Refused]] = &[DISKS, OTHERS];

/// The format called `name`, by its name or an alias.
pub fn by_name(name: &str) -> Option<&'static Refused> {
    all().find(|format| format.name == name || format.aliases.contains(&name))
}

/// The format that a file name extension stands for.
pub fn by_extension(extension: &str) -> Option<&'static Refused> {
    let extension = extension.to_ascii_lowercase();
    all().find(|format| format.extensions.contains(&extension.as_str()))
}

/// All of them.
pub fn all() -> impl Iterator<Item = &'static Refused> {
    REFUSED.iter().copied().flatten()
}

impl Refused {
    /// The error for one who asks for this format by name.
    pub fn error(&self) -> Error {
        Error::unsupported(format!(
            "format '{}' ({}) is not supported",
            self.name, self.about
        ))
    }
}

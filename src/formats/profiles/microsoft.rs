//! Hyper-V and Azure.

use crate::formats::profiles::rules::{alone, at_most, closed, format, is_word, keeps, whole};
use crate::formats::profiles::{Profile, Rule, Verdict};

const GIB: u64 = 1 << 30;
const GENERATIONS: &str =
    "Microsoft: Should I create a generation 1 or 2 virtual machine in Hyper-V?";
const ABOUT_VHDS: &str =
    "Microsoft: About VHDs in Azure (msdn.microsoft.com/library/azure/dn790344)";
const SPECIFICATION: &str = "Microsoft: Virtual Hard Disk Image Format Specification 1.0";

/// Azure.
pub(super) static AZURE: Profile = Profile {
    name: "azure",
    about: "Azure: uploaded disks",
    format: "vhd",
    options: &["profile=azure"],
    rules: &[
        Rule {
            name: "format",
            text: "the disk is a VHD",
            source: ABOUT_VHDS,
            is_makers_own: true,
            check: |f| format(f, &["vhd"]),
        },
        Rule {
            name: "fixed",
            text: "it is a fixed VHD",
            source: ABOUT_VHDS,
            is_makers_own: true,
            check: |f| is_word(f, &["vhd"], "subformat", &["fixed"]),
        },
        Rule {
            name: "whole-mib",
            text: "its size is a whole number of MiB",
            source: "azure-linux-image-tools issue 96; azure-docs pull request 3913",
            is_makers_own: false,
            check: |f| whole(f, 1 << 20),
        },
        Rule {
            name: "length",
            text: "the file is the disk and a footer of 512 bytes",
            source: SPECIFICATION,
            is_makers_own: true,
            check: |f| match (f.format, f.virtual_size) {
                ("vhd", Some(size)) => keeps(f.file_len == size.saturating_add(512), || {
                    format!("{} bytes for a disk of {size}", f.file_len)
                }),
                _ => Verdict::Silent,
            },
        },
        Rule {
            name: "exact",
            text: "readers agree on its size: by its geometry it would not be another",
            source: "coreos/scripts issue 621; osbuild pull request 165",
            is_makers_own: false,
            check: |f| is_word(f, &["vhd"], "size-rule", &["current_size"]),
        },
    ],
};

/// Hyper-V, generation 1.
pub(super) static HYPERV_GEN1: Profile = Profile {
    name: "hyperv-gen1",
    about: "Hyper-V: boot disks of virtual machines of generation 1",
    format: "vhd",
    options: &[],
    rules: &[
        Rule {
            name: "format",
            text: "the disk is a VHD or a VHDX",
            source: GENERATIONS,
            is_makers_own: true,
            check: |f| format(f, &["vhd", "vhdx"]),
        },
        Rule {
            name: "size-vhd",
            text: "a VHD has at most 2040 GiB",
            source: GENERATIONS,
            is_makers_own: true,
            check: |f| at_most(f, &["vhd"], 2040 * GIB),
        },
        Rule {
            name: "size-vhdx",
            text: "a VHDX to boot from has at most 2 TiB",
            source: GENERATIONS,
            is_makers_own: true,
            check: |f| at_most(f, &["vhdx"], 2048 * GIB),
        },
        Rule {
            name: "sectors",
            text: "its size is a whole number of sectors",
            source: SPECIFICATION,
            is_makers_own: true,
            check: |f| whole(f, 512),
        },
        CLOSED,
    ],
};

/// Hyper-V, generation 2.
pub(super) static HYPERV_GEN2: Profile = Profile {
    name: "hyperv-gen2",
    about: "Hyper-V: boot disks of virtual machines of generation 2",
    format: "vhdx",
    options: &[],
    rules: &[
        Rule {
            name: "format",
            text: "the disk is a VHDX",
            source: "Microsoft: Introduction to Hyper-V in Windows 10 Part 3 (archived blog)",
            is_makers_own: true,
            check: |f| format(f, &["vhdx"]),
        },
        Rule {
            name: "size",
            text: "it has at most 64 TiB",
            source: GENERATIONS,
            is_makers_own: true,
            check: |f| at_most(f, &["vhdx"], 65_536 * GIB),
        },
        CLOSED,
        Rule {
            name: "whole",
            text: "nothing lies below it",
            source: "our own judgement: a parent has to be where the disk says",
            is_makers_own: false,
            check: alone,
        },
    ],
};

const CLOSED: Rule = Rule {
    name: "closed",
    text: "it was closed cleanly",
    source: "our own judgement: what replays it would write to it",
    is_makers_own: false,
    check: closed,
};

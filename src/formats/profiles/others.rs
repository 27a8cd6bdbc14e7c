//! AWS, Xen, VirtualBox.

use crate::formats::profiles::rules::{alone, at_most, every, format, is_word, keeps, word};
use crate::formats::profiles::{Profile, Rule, Verdict};

const AWS_FORMATS: &str = "AWS: VM Import/Export user guide, system requirements, image formats";
const AWS_LIMITS: &str =
    "AWS: VM Import/Export user guide, limitations for resources being imported";
const MOST_VOLUMES: usize = 21;
const GIB: u64 = 1 << 30;

/// AWS VM Import.
pub(super) static AWS: Profile = Profile {
    name: "aws",
    about: "AWS VM Import/Export",
    format: "vmdk",
    options: &["subformat=streamOptimized", "adapter_type=lsilogic"],
    rules: &[
        Rule {
            name: "format",
            text: "it is an OVA, a VMDK, a VHD, a VHDX or raw",
            source: AWS_FORMATS,
            is_makers_own: true,
            check: |f| format(f, &["ova", "vmdk", "vhd", "vhdx", "raw"]),
        },
        Rule {
            name: "streams",
            text: "a VMDK is streamOptimized",
            source: AWS_FORMATS,
            is_makers_own: true,
            check: |f| match f.disks {
                None => is_word(f, &["vmdk"], "create-type", &["streamOptimized"]),
                Some(_) => every(f, |disk| {
                    let kind = word(&disk.image, "create-type");
                    let other = disk.format == Some("vmdk") && kind != "streamOptimized";
                    other.then(|| kind.to_owned())
                }),
            },
        },
        Rule {
            name: "kind",
            text: "a VHD or VHDX is fixed or dynamic",
            source: AWS_FORMATS,
            is_makers_own: true,
            check: |f| is_word(f, &["vhd", "vhdx"], "subformat", &["fixed", "dynamic"]),
        },
        Rule {
            name: "plain",
            text: "its data is not encrypted",
            source: AWS_LIMITS,
            is_makers_own: true,
            check: |f| keeps(!f.is_encrypted, || "it is encrypted".to_owned()),
        },
        Rule {
            name: "volumes",
            text: "there are at most 21 disks",
            source: AWS_LIMITS,
            is_makers_own: true,
            check: |f| match f.disks {
                Some(disks) => keeps(disks.len() <= MOST_VOLUMES, || disks.len().to_string()),
                None => Verdict::Silent,
            },
        },
        Rule {
            name: "whole",
            text: "nothing lies below it",
            source: "our own judgement: one file is uploaded",
            is_makers_own: false,
            check: alone,
        },
    ],
};

/// XenServer and XCP-ng.
pub(super) static XEN: Profile = Profile {
    name: "xen",
    about: "XenServer and XCP-ng: disks that are imported",
    format: "vhd",
    options: &[],
    rules: &[
        Rule {
            name: "format",
            text: "the disk is a VHD",
            source: "source of blktap",
            is_makers_own: true,
            check: |f| format(f, &["vhd"]),
        },
        Rule {
            name: "size",
            text: "it has at most 2040 GiB",
            source: "XCP-ng documentation as others quote it; blktap issue 35",
            is_makers_own: false,
            check: |f| at_most(f, &["vhd"], 2040 * GIB),
        },
        Rule {
            name: "kind",
            text: "it is dynamic or fixed",
            source: "our own judgement: one file is imported",
            is_makers_own: false,
            check: |f| is_word(f, &["vhd"], "subformat", &["dynamic", "fixed"]),
        },
    ],
};

/// VirtualBox.
pub(super) static VIRTUALBOX: Profile = Profile {
    name: "virtualbox",
    about: "VirtualBox: disks and appliances",
    format: "vdi",
    options: &[],
    rules: &[
        Rule {
            name: "format",
            text: "it is a VDI, a VMDK, a VHD, a QED, an OVA or an OVF",
            source: "source of VirtualBox 7.1 (Storage)",
            is_makers_own: true,
            check: |f| format(f, &["vdi", "vmdk", "vhd", "qed", "ova", "ovf"]),
        },
        Rule {
            name: "create-type",
            text: "a VMDK is hosted or a stream",
            source: "source of VirtualBox 7.1 (Storage/VMDK.cpp)",
            is_makers_own: true,
            check: |f| {
                let kinds = [
                    "monolithicSparse",
                    "monolithicFlat",
                    "twoGbMaxExtentSparse",
                    "twoGbMaxExtentFlat",
                    "streamOptimized",
                    "vmfs",
                ];
                is_word(f, &["vmdk"], "create-type", &kinds)
            },
        },
        Rule {
            name: "capacity-units",
            text: "the descriptor has capacities in bytes: units are not looked at",
            source: "source of VirtualBox 7.1 (Main/xml/ovfreader.cpp)",
            is_makers_own: true,
            check: |f| {
                every(f, |disk| {
                    let units = word(&disk.details, "capacity-units");
                    (!units.is_empty() && units != "byte").then(|| format!("'{units}'"))
                })
            },
        },
        Rule {
            name: "capacities",
            text: "every disk of a descriptor has a capacity",
            source: "source of VirtualBox 7.1 (Main/xml/ovfreader.cpp)",
            is_makers_own: true,
            check: |f| {
                every(f, |disk| {
                    let has = disk.details.iter().any(|d| d.key == "capacity-size");
                    (!has).then(|| "none".to_owned())
                })
            },
        },
    ],
};

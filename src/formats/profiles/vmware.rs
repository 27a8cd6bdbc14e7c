//! ESXi, vSphere, Workstation.

use serde_json::Value;

use crate::formats::profiles::rules::{
    alone, at_most, closed, detail, every, format, is_word, keeps, word,
};
use crate::formats::profiles::{Facts, Profile, Rule, Verdict};

const DISK_FORMATS: &str = "VMware: vSphere Storage 7.0, Supported Disk Formats (vmkfstools -d)";
const VDDK: &str = "VMware: Virtual Disk API, Virtual Disk Types";
const TIB: u64 = 1 << 40;

/// Disks on datastores.
pub(super) static ESXI: Profile = Profile {
    name: "esxi",
    about: "ESXi: disks on a datastore",
    format: "vmdk",
    options: &["subformat=vmfs", "adapter_type=lsilogic"],
    rules: &[
        Rule {
            name: "format",
            text: "the disk is a VMDK",
            source: DISK_FORMATS,
            is_makers_own: true,
            check: |f| format(f, &["vmdk"]),
        },
        Rule {
            name: "create-type",
            text: "it is of a kind that ESXi runs from (vmfs, thin or thick, or a delta of it): hosted \
                   kinds are imported by vmkfstools -i first, and streams by an import of the package",
            source: DISK_FORMATS,
            is_makers_own: true,
            check: |f| {
                is_word(
                    f,
                    &["vmdk"],
                    "create-type",
                    &["vmfs", "vmfsThin", "vmfsSparse", "seSparse"],
                )
            },
        },
        Rule {
            name: "size",
            text: "it has at most 62 TiB",
            source: "configuration maximums of vSphere as others report them",
            is_makers_own: false,
            check: |f| at_most(f, &["vmdk"], 62 * TIB),
        },
        Rule {
            name: "adapter",
            text: "it names a SCSI controller",
            source: "home-assistant/os pull request 1674",
            is_makers_own: false,
            check: |f| {
                is_word(
                    f,
                    &["vmdk"],
                    "adapter-type",
                    &["lsilogic", "buslogic", "pvscsi", "lsisas1068", "legacyESX"],
                )
            },
        },
        Rule {
            name: "closed",
            text: "it was closed cleanly",
            source: "our own judgement: what was lost may show",
            is_makers_own: false,
            check: closed,
        },
    ],
};

/// Disks of hosted products.
pub(super) static WORKSTATION: Profile = Profile {
    name: "workstation",
    about: "VMware Workstation, Player and Fusion: disks",
    format: "vmdk",
    options: &["subformat=monolithicSparse"],
    rules: &[
        Rule {
            name: "format",
            text: "the disk is a VMDK",
            source: VDDK,
            is_makers_own: true,
            check: |f| format(f, &["vmdk"]),
        },
        Rule {
            name: "create-type",
            text: "it is of a hosted kind",
            source: VDDK,
            is_makers_own: true,
            check: |f| {
                let hosted = [
                    "monolithicSparse",
                    "monolithicFlat",
                    "twoGbMaxExtentSparse",
                    "twoGbMaxExtentFlat",
                ];
                is_word(f, &["vmdk"], "create-type", &hosted)
            },
        },
        Rule {
            name: "closed",
            text: "it was closed cleanly",
            source: "our own judgement: it is repaired when it is opened",
            is_makers_own: false,
            check: closed,
        },
        Rule {
            name: "whole",
            text: "nothing lies below it",
            source: "our own judgement: a parent has to be where the disk says",
            is_makers_own: false,
            check: alone,
        },
    ],
};

/// Packages for import.
pub(super) static VSPHERE_OVA: Profile = Profile {
    name: "vsphere-ova",
    about: "vSphere and ESXi: packages that are imported",
    format: "ova",
    options: &[],
    rules: &[
        Rule {
            name: "format",
            text: "it is an OVA",
            source: "DMTF DSP0243",
            is_makers_own: false,
            check: |f| format(f, &["ova"]),
        },
        Rule {
            name: "descriptor-first",
            text: "the descriptor is the first member of the archive",
            source: "osbuild/image-builder issue 431; fedora-coreos-tracker issue 391",
            is_makers_own: false,
            check: |f| member(f, 0, "ovf"),
        },
        Rule {
            name: "manifest-second",
            text: "the manifest, where there is one, is the second",
            source: "DMTF DSP0243; osbuild/image-builder issue 431",
            is_makers_own: false,
            check: |f| match detail(f.details, "manifest") {
                Some(Value::Object(_)) => member(f, 1, "mf"),
                _ => Verdict::Silent,
            },
        },
        Rule {
            name: "flat-names",
            text: "members lie in no directory",
            source: "gist goodjob1114/9ededff0de32c1119cf7",
            is_makers_own: false,
            check: flat_names,
        },
        Rule {
            name: "digests",
            text: "the manifest has SHA256: newer releases refuse SHA1, older ones know no other",
            source: "OpenCTI issue 1642; nextcloud/vm issue 2607",
            is_makers_own: false,
            check: digests,
        },
        Rule {
            name: "manifest-whole",
            text: "the manifest has digests of all files",
            source: "DMTF DSP0243",
            is_makers_own: false,
            check: |f| match detail(f.details, "manifest") {
                Some(Value::Object(manifest)) => {
                    let missing = manifest.get("missing");
                    keeps(missing.is_none(), || {
                        format!("none of {}", missing.unwrap_or(&Value::Null))
                    })
                }
                _ => Verdict::Silent,
            },
        },
        Rule {
            name: "version",
            text: "the descriptor is OVF 1",
            source: "our own judgement: VirtualBox alone writes OVF 2, and vSphere reads OVF 1",
            is_makers_own: false,
            check: |f| is_word(f, &["ova", "ovf"], "ovf-version", &["1"]),
        },
        Rule {
            name: "hardware",
            text: "the virtual hardware is of a family of VMware (vmx-NN)",
            source: "gist evanjs/1fa1e1d3379750143347762164ed18e4",
            is_makers_own: false,
            check: hardware,
        },
        Rule {
            name: "streams",
            text: "disks are streamOptimized VMDK",
            source: "VMware: README of open-vmdk",
            is_makers_own: true,
            check: |f| {
                every(f, |disk| {
                    let kind = word(&disk.image, "create-type");
                    let found = || match disk.format {
                        Some(format) => format!("{format} {kind}").trim_end().to_owned(),
                        None => disk.problem.clone().unwrap_or_else(|| "no file".to_owned()),
                    };
                    (disk.format != Some("vmdk") || kind != "streamOptimized").then(found)
                })
            },
        },
        Rule {
            name: "format-uri",
            text: "the descriptor says so, by the URI that ends with #streamOptimized",
            source: "ilbers/isar issue 106",
            is_makers_own: false,
            check: |f| {
                every(f, |disk| {
                    let uri = word(&disk.details, "described-format");
                    let is_right = uri
                        == "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized";
                    (!is_right).then(|| format!("'{uri}'"))
                })
            },
        },
        Rule {
            name: "file-sizes",
            text: "the descriptor has the right sizes of files",
            source: "gardenlinux issue 2322; fedora-coreos-tracker issue 391; packer-plugin-vsphere issue 20",
            is_makers_own: false,
            check: |f| {
                every(f, |disk| {
                    let sizes =
                        ["file-size", "described-file-size"].map(|key| detail(&disk.details, key));
                    let [found, said] = sizes;
                    (found != said).then(|| {
                        let said = said.map_or("none".to_owned(), Value::to_string);
                        format!("{said} in the descriptor")
                    })
                })
            },
        },
        Rule {
            name: "capacities",
            text: "the descriptor has the right capacities",
            source: "open-vmdk issue 82",
            is_makers_own: false,
            check: |f| {
                every(f, |disk| {
                    let said = detail(&disk.details, "capacity-size").and_then(Value::as_u64);
                    let differs = disk.virtual_size.is_some() && said != disk.virtual_size;
                    differs.then(|| {
                        said.map_or("no size".to_owned(), |said| {
                            format!("{said} bytes in the descriptor")
                        })
                    })
                })
            },
        },
    ],
};

fn names<'a>(facts: &Facts<'a>) -> Option<Vec<&'a str>> {
    let names = detail(facts.details, "members")?.as_array()?;
    Some(names.iter().filter_map(Value::as_str).collect())
}

/// The member with this number, counted from 0, has the extension.
fn member(facts: &Facts<'_>, number: usize, extension: &str) -> Verdict {
    let Some(names) = names(facts) else {
        return Verdict::Silent;
    };
    let name = names.get(number).copied().unwrap_or_default();
    let found = std::path::Path::new(name).extension();
    keeps(
        found.is_some_and(|e| e.eq_ignore_ascii_case(extension)),
        || format!("'{name}'"),
    )
}

fn flat_names(facts: &Facts<'_>) -> Verdict {
    match names(facts) {
        None => Verdict::Silent,
        // There may be more members than are told by name.
        Some(_) => match word(facts.details, "in-directory") {
            "" => Verdict::Keeps,
            name => Verdict::Breaks(format!("'{name}'")),
        },
    }
}

fn digests(facts: &Facts<'_>) -> Verdict {
    match detail(facts.details, "manifest") {
        Some(Value::Object(manifest)) => {
            let kinds = manifest.get("digests").and_then(Value::as_array);
            let kinds = kinds.map(Vec::as_slice).unwrap_or_default();
            let other = kinds.iter().find(|kind| kind.as_str() != Some("SHA256"));
            match (other, kinds.is_empty()) {
                (Some(other), _) => Verdict::Breaks(other.to_string()),
                (None, true) => Verdict::Breaks("no digests".to_owned()),
                (None, false) => Verdict::Keeps,
            }
        }
        _ => Verdict::Silent,
    }
}

fn hardware(facts: &Facts<'_>) -> Verdict {
    let Some(families) = detail(facts.details, "virtual-hardware").and_then(Value::as_array) else {
        return Verdict::Silent;
    };
    // One element may name several.
    let known = |family: &&Value| {
        let words = family.as_str().unwrap_or_default().split_ascii_whitespace();
        words.into_iter().any(|word| word.starts_with("vmx-"))
    };
    let other = families.iter().find(|family| !known(family));
    other.map_or(Verdict::Keeps, |other| Verdict::Breaks(other.to_string()))
}

//! Formats that are recognised and not supported: they are refused by name, and never read as raw
//! by accident.

use crate::image::probe::{ProbeInput, Refused};

fn starts(input: &ProbeInput<'_>, magic: &[u8]) -> bool {
    input.head.starts_with(magic)
}

fn has(input: &ProbeInput<'_>, at: usize, magic: &[u8]) -> bool {
    input
        .head
        .get(at..)
        .is_some_and(|rest| rest.starts_with(magic))
}

/// A descriptor is text: comments and blank lines may come before its version.
fn is_vmdk_descriptor(input: &ProbeInput<'_>) -> bool {
    let text = String::from_utf8_lossy(input.head);
    let first = text
        .lines()
        .map(str::trim)
        .find(|line| !line.is_empty() && !line.starts_with('#'));
    starts(input, b"# Disk DescriptorFile")
        || first.is_some_and(|line| {
            line.to_ascii_lowercase().starts_with("version=") && text.contains("createType")
        })
}

/// Every such format.  Those that a driver reads are not among them.
pub static REFUSED: &[Refused] = &[
    Refused {
        name: "qcow",
        probe: |i| starts(i, b"QFI\xfb\0\0\0\x01"),
    },
    Refused {
        name: "qed",
        probe: |i| starts(i, b"QED\0"),
    },
    Refused {
        name: "vhdx",
        probe: |i| starts(i, b"vhdxfile"),
    },
    Refused {
        name: "vdi",
        probe: |i| has(i, 64, &[0x7f, 0x10, 0xda, 0xbe]),
    },
    Refused {
        name: "vmdk",
        probe: |i| starts(i, b"KDMV") || starts(i, b"COWD") || is_vmdk_descriptor(i),
    },
    Refused {
        name: "parallels",
        probe: |i| starts(i, b"WithoutFreeSpace") || starts(i, b"WithouFreSpacExt"),
    },
    Refused {
        name: "luks",
        probe: |i| starts(i, b"LUKS\xba\xbe"),
    },
    Refused {
        name: "dmg",
        probe: |i| i.tail.starts_with(b"koly"),
    },
    Refused {
        name: "cloop",
        probe: |i| starts(i, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop"),
    },
    Refused {
        name: "bochs",
        probe: |i| starts(i, b"Bochs Virtual HD Image"),
    },
    Refused {
        name: "android-sparse",
        probe: |i| starts(i, &[0x3a, 0xff, 0x26, 0xed]),
    },
    Refused {
        name: "asif",
        probe: |i| starts(i, b"shdw"),
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    fn name(head: &[u8], tail: &[u8]) -> Option<&'static str> {
        let input = ProbeInput {
            head,
            tail,
            len: 1 << 20,
            extension: None,
        };
        REFUSED
            .iter()
            .find(|format| (format.probe)(&input))
            .map(|format| format.name)
    }

    #[test]
    fn formats_that_are_not_supported_are_known_by_their_bytes() {
        let mut vdi = vec![0; 512];
        vdi[64..68].copy_from_slice(&0xbeda_107f_u32.to_le_bytes());
        let cases: [(&[u8], &[u8], &str); 7] = [
            (b"KDMV\x01\0\0\0", b"", "vmdk"),
            (b"# Disk DescriptorFile\nversion=1\n", b"", "vmdk"),
            (b"#a\n\nversion=1\ncreateType=\"x\"\n", b"", "vmdk"),
            (&vdi, b"", "vdi"),
            (b"vhdxfile", b"", "vhdx"),
            (b"QFI\xfb\0\0\0\x01", b"", "qcow"),
            (b"anything", b"koly\0\0\0\x04", "dmg"),
        ];
        for (head, tail, expected) in cases {
            assert_eq!(name(head, tail), Some(expected), "{}", head.escape_ascii());
        }
        assert_eq!(name(&[0; 512], &[0; 512]), None);
        assert_eq!(name(b"version=1 of my notes", b""), None);
    }
}

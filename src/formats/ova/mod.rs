//! OVA and OVF: appliances.  *A package is a descriptor (OVF) with files; an OVA is one in a tar
//! archive.*
//!
//! The descriptor, XML, says which of the files are disks, of any format; a manifest has digests of
//! them all.  A file is a part of the archive and read there.  Nothing that the descriptor says
//! decides how a disk is read: its format is told by its bytes, and its size by its format.

mod bounds;
mod descriptor;
mod list;
mod manifest;
mod member;
mod open;
mod package;
mod write;

use crate::container::tar;
use crate::image::Driver;
use crate::image::contents::Container;
use crate::image::options::{OptionKind, OptionSpec};
use crate::image::probe::ProbeInput;

/// The registry row of packages in one file.
pub static DRIVER: Driver = Driver {
    name: "ova",
    aliases: &[],
    extensions: &["ova"],
    about: "appliances: disks and their description in a tar archive",
    is_plain: false,
    names_uris: false,
    probe: probe_archive,
    open: |storage, options| open::archive(storage, options),
    open_options: OPEN,
    creator: None,
};

/// The registry row of packages of several files.
pub static LOOSE: Driver = Driver {
    name: "ovf",
    aliases: &[],
    extensions: &["ovf"],
    about: "descriptions of appliances, with disks beside them",
    is_plain: false,
    names_uris: false,
    probe: probe_descriptor,
    open: |storage, options| open::beside(storage, options),
    open_options: OPEN,
    creator: None,
};

/// What lists the disks of packages.
pub static CONTAINERS: [Container; 2] = [
    Container {
        driver: &DRIVER,
        contents: list::archive,
        assembler: Some(&write::ASSEMBLER),
    },
    Container {
        driver: &LOOSE,
        contents: list::beside,
        assembler: None,
    },
];

const OPEN: &[OptionSpec] = &[OptionSpec {
    name: "format",
    kind: OptionKind::Text,
    default: "",
    help: "format of the disk; without it its content decides",
}];

/// The first member is the descriptor, or the manifest, which comes second where all is in order.
fn probe_archive(input: &ProbeInput<'_>) -> u8 {
    let Some(name) = tar::first_name(input.head) else {
        return 0;
    };
    let extension = std::path::Path::new(&name).extension();
    let is_package = ["ovf", "mf", "cert"]
        .iter()
        .any(|known| extension.is_some_and(|found| found.eq_ignore_ascii_case(known)));
    match is_package {
        true => 100,
        false => 0,
    }
}

fn probe_descriptor(input: &ProbeInput<'_>) -> u8 {
    let text = input.head.strip_prefix(b"\xef\xbb\xbf");
    let text = text.unwrap_or(input.head).trim_ascii_start();
    let mentions = |words: &str| {
        let mut parts = text.windows(words.len());
        parts.any(|part| part == words.as_bytes())
    };
    let is_xml = text.starts_with(b"<?xml")
        || text.starts_with(b"<Envelope")
        || text.starts_with(b"<ovf:Envelope");
    match is_xml
        && mentions("Envelope")
        && (mentions(descriptor::NAMESPACE) || mentions(descriptor::NAMESPACE_OLD))
    {
        true => 100,
        false => 0,
    }
}

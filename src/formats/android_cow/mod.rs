//! Android COW files, the snapshots of Virtual A/B: what an update writes of a partition.
//!
//! A file is a list of operations, each of which makes blocks of the new disk of the old one: copies
//! of other blocks, differences, zeroes, and data of its own.  It names no disk that it lies over.
//! Once the update is accepted, a merge writes the new blocks into the old disk; how far that is, is
//! in the file.

mod check;
mod details;
mod header;
mod image;
mod merge;
mod ops;
mod table;
mod window;
pub(in crate::formats) mod write;

use crate::image::Driver;
use crate::image::options::{OptionKind, OptionSpec};
use crate::image::probe::ProbeInput;

/// The registry row.
pub static DRIVER: Driver = Driver {
    name: "android-cow",
    aliases: &["acow"],
    extensions: &["cow"],
    about: "Android snapshots: copy-on-write files of Virtual A/B updates",
    is_plain: false,
    names_uris: false,
    probe,
    open: |storage, options| Ok(Box::new(image::AndroidCow::open(storage, options)?)),
    open_options: &[OptionSpec {
        name: "label",
        kind: OptionKind::Number,
        default: "",
        help: "read up to this label, also where the file was not finished; what follows is left out",
    }],
    creator: None,
};

fn probe(input: &ProbeInput<'_>) -> u8 {
    match input.head.starts_with(&header::MAGIC.to_le_bytes()) {
        true => 100,
        false => 0,
    }
}

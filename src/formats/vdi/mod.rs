//! VDI, the format of VirtualBox.  *VDI calls a cluster a block.*
//!
//! A header, a map of one 32-bit number a block, and blocks in the order in which they were given
//! space.  A number says where the block is behind the start of the data, that it reads as zeroes,
//! or that it is free: zero, or in a differencing disk what the parent has.  The header counts the
//! blocks that have space, and other programs take the next one by that count alone: it is raised
//! before the map names a block, and never lowered while something is behind it.

mod check;
mod create;
mod header;
mod image;
mod relink;
mod resize;
mod units;

use crate::image::Driver;
use crate::image::probe::ProbeInput;

/// The registry row.
pub static DRIVER: Driver = Driver {
    name: "vdi",
    aliases: &[],
    extensions: &["vdi"],
    about: "VirtualBox disks: dynamic, fixed and differencing",
    is_plain: false,
    names_uris: false,
    probe,
    open: |storage, options| Ok(Box::new(image::Vdi::open(storage, options)?)),
    open_options: &[],
    creator: Some(create::CREATOR),
};

fn probe(input: &ProbeInput<'_>) -> u8 {
    let signature = input.head.get(64..).and_then(|rest| rest.first_chunk());
    match signature.copied().map(u32::from_le_bytes) {
        Some(header::SIGNATURE) => 100,
        _ => 0,
    }
}

//! VMDK, the format of VMware.  *VMDK calls a cluster a grain.*
//!
//! A descriptor in words names the extents that the disk is made of, one after the other: ranges of
//! plain files, sparse files of grains behind a directory of tables, zeroes.  It is a file of its own,
//! or lies inside the only sparse extent.  A sparse file whose grains are compressed, each behind a
//! marker, is a stream: written once, from its start to its end.
//!
//! What a line or a header says decides how data is read; the name of the kind of disk
//! (`createType`) is shown, and decides what is refused.

mod check;
mod check_sparse;
mod check_stream;
mod compact;
mod cowd;
mod create;
mod descriptor;
mod extent;
mod header;
mod image;
mod line;
mod open;
mod options;
mod relink;
mod resize;
mod sequence;
mod sesparse;
mod session;
mod space;
mod spans;
mod sparse;
mod stream;
mod tables;
mod units;
mod write;

use crate::image::Driver;
use crate::image::probe::ProbeInput;

/// The registry row.
pub static DRIVER: Driver = Driver {
    name: "vmdk",
    aliases: &[],
    extensions: &["vmdk"],
    about: "VMware disks: sparse, flat, split, stream-optimized, of ESX",
    is_plain: false,
    names_uris: false,
    probe,
    open: |storage, options| Ok(Box::new(open::open(storage, options)?)),
    open_options: &[],
    creator: Some(create::CREATOR),
};

fn probe(input: &ProbeInput<'_>) -> u8 {
    let head = input.head;
    let is_sparse = [*b"KDMV", *b"kdmv", *b"COWD"]
        .iter()
        .any(|magic| head.starts_with(magic));
    let is_se_sparse = head.starts_with(&sesparse::MAGIC.to_le_bytes());
    match is_sparse || is_se_sparse || descriptor::is_one(head) {
        true => 100,
        false => 0,
    }
}

//! VHDX, the format of Hyper-V ([MS-VHDX]).  *VHDX calls a cluster a block.*
//!
//! Everything lies at multiples of 1 MiB, in any order: two headers of which the later one counts, two
//! copies of a table of regions, metadata items, the block allocation table (BAT), blocks of 1 to 256
//! MiB, and in differencing disks sector bitmaps for blocks that are here in part.  All metadata but
//! the headers changes through a log: entries of whole pages, which whoever opens the file replays.

mod active;
mod bat;
mod bytes;
mod check;
mod compact;
mod create;
mod entry;
mod header;
mod image;
mod items;
mod journal;
mod locator;
mod lookup;
mod metadata;
mod patches;
mod region;
mod relink;
mod resize;
mod scan;
mod session;
mod units;

use crate::image::Driver;
use crate::image::probe::ProbeInput;

/// The registry row.
pub static DRIVER: Driver = Driver {
    name: "vhdx",
    aliases: &[],
    extensions: &["vhdx", "avhdx"],
    about: "Hyper-V disks: dynamic, fixed and differencing",
    is_plain: false,
    names_uris: false,
    probe,
    open: |storage, options| Ok(Box::new(image::Vhdx::open(storage, options)?)),
    open_options: &[],
    creator: Some(create::CREATOR),
};

fn probe(input: &ProbeInput<'_>) -> u8 {
    match input.head.starts_with(header::FILE) {
        true => 100,
        false => 0,
    }
}

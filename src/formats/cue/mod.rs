//! CUE sheets: optical discs as a text that says where in which files their tracks lie.
//!
//! As a disk, such an image is the user data of one track, 2048 bytes a sector; as sectors
//! ([`crate::image::sector`]) it is all that is stored.  Where sectors are stored with codes,
//! reading the disk does what a drive does: what is wrong is corrected where the codes tell beyond
//! doubt what was there, and cannot be read otherwise.

mod check;
pub(super) mod create;
mod details;
mod image;
mod open;
mod parse;
mod place;
mod scan;
mod sectors;
mod sheet;
pub(super) mod wave;

use crate::image::Driver;
use crate::image::options::{OptionKind, OptionSpec};
use crate::image::probe::ProbeInput;

/// The registry row.
pub static DRIVER: Driver = Driver {
    name: "cue",
    aliases: &[],
    extensions: &["cue"],
    about: "optical discs: CUE sheets and their BIN files",
    is_plain: false,
    names_uris: false,
    probe,
    open: |storage, options| Ok(Box::new(image::Cue::open(storage, options)?)),
    open_options: &[
        OptionSpec {
            name: "track",
            kind: OptionKind::Number,
            default: "",
            help: "number of the track that is the disk; without it the first that holds data",
        },
        OptionSpec {
            name: "sector",
            kind: OptionKind::Number,
            default: "",
            help: "the file is no sheet but sectors of so many bytes: 2048, 2324, 2336, 2352, 2448",
        },
    ],
    creator: None,
};

/// The one format where the name counts: any text could begin so.
fn probe(input: &ProbeInput<'_>) -> u8 {
    match input.extension == Some("cue") && parse::is_sheet(input.head) {
        true => 100,
        false => 0,
    }
}

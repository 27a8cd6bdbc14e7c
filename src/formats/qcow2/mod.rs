//! qcow2: QEMU's copy-on-write format, versions 2 and 3.

mod amend;
mod behind;
mod bitmap;
mod bitmap_change;
mod bitmap_dir;
mod check;
mod compact;
mod compress;
mod create;
mod encryption;
mod entry;
mod expand;
mod extension;
mod feature;
mod guard;
mod header;
mod image;
mod lookup;
mod metadata;
mod open;
mod packing;
mod recorder;
mod refblock;
mod refcount;
mod relink;
mod resize;
mod rewrite;
mod sequence;
mod snapshot;
mod snapshot_table;
mod space;
mod switch;
mod uncounted;
mod units;
mod writer;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::image::Driver;
use crate::image::driver::Creator;
use crate::image::probe::ProbeInput;
use crate::storage::Storage;
use crate::util::progress::Watcher;

use crate::image::codec::{Codec, Decoded, encode};
use entry::Layout;
use header::Header;
use lookup::Tables;
use writer::Writer;

/// The registry row.
pub static DRIVER: Driver = Driver {
    name: "qcow2",
    aliases: &[],
    extensions: &["qcow2", "qcow2c"],
    about: "QEMU's copy-on-write format, versions 2 and 3",
    is_plain: false,
    names_uris: true,
    probe,
    open: |storage, options| Ok(Box::new(Qcow2::open(storage, options)?)),
    open_options: encode::OPTIONS,
    creator: Some(Creator {
        create: create::create,
        settle: |options| Ok(options.clone()),
        measure: create::measure,
        measure_bitmaps: create::measure_bitmaps,
        cluster_size: create::cluster_size,
        options: create::OPTIONS,
        compress: Some(encode::OPTIONS),
        sequence: Some(sequence::sequence),
    }),
};

fn probe(input: &ProbeInput<'_>) -> u8 {
    let word = |at: usize| {
        let bytes = input.head.get(at..at + 4)?;
        Some(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    };
    match (word(0), word(4)) {
        (Some(header::MAGIC), Some(2 | 3)) => 100,
        // Versions to come are refused by name, not read as raw.
        (Some(header::MAGIC), Some(4..)) => 50,
        _ => 0,
    }
}

/// An open image.
#[derive(Debug)]
struct Qcow2 {
    file: Arc<dyn Storage>,
    /// Where guest data is: the file itself, or the external data file; `None`: not opened.
    data: Option<Arc<dyn Storage>>,
    /// As it was on opening; `size` and `tables` know what has changed since.
    header: Header,
    /// Virtual size in bytes.
    size: AtomicU64,
    layout: Layout,
    tables: Tables,
    decoded: Decoded,
    /// How clusters are compressed.
    codec: Codec,
    /// `None`: opened for reading.
    writer: Option<Writer>,
    /// Who is told how far a change of it all is.
    watcher: Watcher,
}

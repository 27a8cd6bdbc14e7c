//! One row of the format registry.

use std::fmt;
use std::sync::Arc;

use crate::error::Result;
use crate::image::Image;
use crate::image::bitmap::Bitmap;
use crate::image::compress::Sequence;
use crate::image::create::CreateOptions;
use crate::image::open::OpenOptions;
use crate::image::options::{OptionSpec, OptionValues};
use crate::image::probe::ProbeInput;
use crate::storage::Storage;

/// Opens an image; reads headers and tables, opens nothing else.
pub type Open = fn(Arc<dyn Storage>, &OpenOptions) -> Result<Box<dyn Image>>;

/// Plans a new image that is written in order; at most so many clusters will hold data.
///
/// # Errors
/// As [`Creator::create`], and for options that a stream cannot have.  The last argument is what
/// compressed data is written with; `None`: data is written as it is.
pub type NewSequence =
    fn(&CreateOptions, data_clusters: u64, Option<&OptionValues>) -> Result<Box<dyn Sequence>>;

/// How new images of a format are made.
#[derive(Debug)]
pub struct Creator {
    /// Formats an empty object.
    ///
    /// # Errors
    /// `Invalid` or `OutOfRange` where the options contradict each other or the format's limits,
    /// with nothing written; the host's.
    pub create: fn(&dyn Storage, &CreateOptions) -> Result<()>,
    /// What the options come to: the size as the disk will have it, and options that follow from
    /// others.
    ///
    /// # Errors
    /// As [`Creator::create`].
    pub settle: fn(&CreateOptions) -> Result<CreateOptions>,
    /// Length in bytes of the file for a disk of `options.size` bytes in which `data_clusters`
    /// clusters (of `cluster_size`) hold data: what `measure` prints.
    pub measure: fn(&CreateOptions, data_clusters: u64) -> Result<u64>,
    /// Bytes that copies of these bitmaps of a disk of `options.size` bytes take beside that, at
    /// most; `None`: an image with these options has none.
    pub measure_bitmaps: fn(&CreateOptions, &[Bitmap]) -> Option<u64>,
    /// Unit of allocation in bytes with these options, for planning.
    pub cluster_size: fn(&CreateOptions) -> Result<u64>,
    /// The `-o` options it takes.
    pub options: &'static [OptionSpec],
    /// What `-o` takes beside them where data is written compressed: options of `open`; `None`:
    /// the format has no compressed data.
    pub compress: Option<&'static [OptionSpec]>,
    /// Makes images in order, where the format allows it.
    pub sequence: Option<NewSequence>,
}

/// One row of the format registry.
pub struct Driver {
    /// The name users type and headers record, such as `qcow2`.
    pub name: &'static str,
    /// Other names accepted on the command line, such as `vpc` for `vhd`.
    pub aliases: &'static [&'static str],
    /// File name extensions that stand for it, lower case.
    pub extensions: &'static [&'static str],
    /// One line for `--help` and the man page.
    pub about: &'static str,
    /// Images are their disks' bytes as they are, at the same offsets, and any bytes are one: they
    /// come and go in a stream, and making one writes none of them, so that on a device it shows what
    /// was there.
    pub is_plain: bool,
    /// A header can name what a server has, an NBD URI, as the image below.
    pub names_uris: bool,
    /// Whether the bytes look like this format: 0 no, 100 the magic and the version match.
    pub probe: fn(&ProbeInput<'_>) -> u8,
    /// Opens an image.
    pub open: Open,
    /// Options that `open` takes.
    pub open_options: &'static [OptionSpec],
    /// Makes new images, where vdtool can.
    pub creator: Option<Creator>,
}

impl Driver {
    /// Whether `name` is the driver's name or one of its aliases.
    pub fn is_called(&self, name: &str) -> bool {
        self.name == name || self.aliases.contains(&name)
    }
}

impl PartialEq for Driver {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for Driver {}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Driver({})", self.name)
    }
}

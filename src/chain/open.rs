//! From a path to a chain: formats, the layers below, and the policy for files an image names.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::chain::{Base, Chain};
use crate::error::{Context, Result};
use crate::formats::DRIVERS;
use crate::image::open::{OpenOptions, Purpose, WriteOrder};
use crate::image::options::OptionValues;
use crate::image::{Driver, Image, probe};
use crate::storage;
use crate::storage::open::{Access, StorageOptions};
use crate::util::grace::Grace;

/// Which files an image may make us open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum References {
    /// Those in the image's own directory and below, and those listed.
    Confined {
        /// Further files that may be opened.
        allowed: Vec<PathBuf>,
    },
    /// Any.
    Any,
}

impl Default for References {
    fn default() -> Self {
        Self::Confined {
            allowed: Vec::new(),
        }
    }
}

/// What to do about the layers below the top one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Follow {
    /// Open them all.
    #[default]
    Yes,
    /// Open none of them: data that is there cannot be read.
    No,
}

/// How to open a chain.
#[derive(Debug, Clone, Default)]
pub struct ChainOptions {
    /// How the top layer's file is opened; the layers below are opened alike, but for reading.
    pub storage: StorageOptions,
    /// Format of the top layer; `None`: probed by content.
    pub format: Option<&'static Driver>,
    /// Format of the layer below the top where it is not recorded; `None`: probed once.
    pub backing_format: Option<&'static Driver>,
    /// What to do about the layers below.
    pub follow: Follow,
    /// Which files an image may make us open.
    pub references: References,
    /// Whether the top layer's metadata waits for its data.
    pub order: WriteOrder,
    /// Why the top layer is opened.
    pub purpose: Purpose,
    /// Format options as typed (`K=V,..`), checked against the top layer's format.
    pub values: Vec<String>,
}

impl ChainOptions {
    /// For reading a disk, everything else as it comes.
    pub fn read() -> Self {
        Self::default()
    }

    /// For reading and writing a disk, everything else as it comes.
    pub fn write() -> Self {
        let storage = StorageOptions {
            access: Access::Write,
            ..StorageOptions::default()
        };
        Self {
            storage,
            ..Self::default()
        }
    }
}

/// Opens the image at `path` and, as `options` say, the layers below it.
///
/// # Errors
/// Those of the host and of the formats; `Denied` where an image names a file that the policy
/// does not let us open; `OutOfRange` for too many layers; `Corrupt` for a cycle.
pub fn open(path: &Path, options: &ChainOptions) -> Result<Chain> {
    let grace = Arc::new(Grace::default());
    let image = open_image(path, options, &grace)?;
    let base = if image.backing().is_some() {
        Base::NotOpened
    } else {
        Base::Zeroes
    };
    Chain::new(vec![image], base, grace)
}

fn open_image(path: &Path, options: &ChainOptions, grace: &Arc<Grace>) -> Result<Box<dyn Image>> {
    let storage = storage::open::open(path, &options.storage)?;
    let driver = match options.format {
        Some(driver) => driver,
        None => probe::probe(DRIVERS, &*storage)?,
    };
    let texts = options.values.iter().map(String::as_str);
    let image = OpenOptions {
        companions: None,
        access: options.storage.access,
        order: options.order,
        purpose: options.purpose,
        grace: Arc::clone(grace),
        values: OptionValues::parse(driver.open_options, driver.name, texts).at(path)?,
    };
    (driver.open)(storage, &image).at(path)
}

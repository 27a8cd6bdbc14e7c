//! What a new image is made with.

use std::ffi::{OsStr, OsString};
use std::ops::{Range, RangeInclusive};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use uuid::Uuid;

use crate::error::{Error, Result};
use crate::image::options::{OptionKind, OptionSpec, OptionValues};
use crate::storage::{Storage, fill_space, give_space};

/// How much of a new image is allocated at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// Tables, but no data.
    Metadata,
    /// Space, without writing it.
    Falloc,
    /// Space, written with zeroes.
    Full,
}

impl Preallocation {
    /// The values as users type them.
    pub const WORDS: [&'static str; 4] = ["off", "metadata", "falloc", "full"];

    /// From a word of `WORDS`.
    pub fn from_word(word: &str) -> Option<Self> {
        match word {
            "off" => Some(Self::Off),
            "metadata" => Some(Self::Metadata),
            "falloc" => Some(Self::Falloc),
            "full" => Some(Self::Full),
            _ => None,
        }
    }
}

/// The row for formats that take `off`, `falloc` and `full`.
pub const PREALLOCATION: OptionSpec = OptionSpec {
    name: "preallocation",
    kind: OptionKind::Choice(&["off", "falloc", "full"]),
    default: "off",
    help: "how much space is allocated at once",
};

/// The row for formats whose disks get space as data comes, or all of it at once.
pub const SUBFORMAT: OptionSpec = OptionSpec {
    name: "subformat",
    kind: OptionKind::Choice(&["dynamic", "fixed"]),
    default: "dynamic",
    help: "space as data comes, or all of it at once",
};

/// Gives a range of a new object space, and writes it, as far as is wanted; it reads as zeroes.
///
/// # Errors
/// The host's.
pub fn preallocate(storage: &dyn Storage, host: Range<u64>, how: Preallocation) -> Result<()> {
    match how {
        Preallocation::Off | Preallocation::Metadata => Ok(()),
        Preallocation::Falloc => give_space(storage, host),
        Preallocation::Full => fill_space(storage, host),
    }
}

/// The image below a new one.
#[derive(Debug, Clone)]
pub struct CreateBacking {
    /// Its name as the user gave it: relative to the new image's directory, or absolute.
    pub name: OsString,
    /// Its absolute path.
    pub absolute: PathBuf,
    /// Its path relative to the new image's directory.
    pub relative: PathBuf,
    /// Its format's name.
    pub format: &'static str,
    /// Its identity, where its format has one.
    pub identity: Option<Uuid>,
    /// Its state, where its format has such a thing.
    pub state: Option<Uuid>,
    /// When its file last changed.
    pub modified: SystemTime,
    /// Its virtual size in bytes.
    pub virtual_size: u64,
    /// Its unit of allocation in bytes, where its format has one and it was opened.
    pub cluster_size: Option<u64>,
    /// Bytes of a sector of its disk, where its format says so and it was opened.
    pub sector_size: Option<u64>,
    /// What its guest is told that hardware has as a sector, where its format says so and it was opened.
    pub physical_sector_size: Option<u64>,
}

/// What a new image is made with.
#[derive(Debug, Clone, Default)]
pub struct CreateOptions {
    /// Virtual size in bytes.
    pub size: u64,
    /// The image below.
    pub backing: Option<CreateBacking>,
    /// Options of the format, checked against its rows.
    pub values: OptionValues,
    /// The empty objects that are to be further files of the image, in the order of
    /// [`CreateOptions::further`].
    pub files: Vec<Arc<dyn Storage>>,
    /// The name that the image is to have, without its directory, for formats whose further files are
    /// called after it; empty where it has none.
    pub name: OsString,
    /// Names of further files that follow from all this, as the format's `settle` leaves them.
    pub named: Vec<OsString>,
    /// The image can only be written in the order of its bytes, as the format's `settle` leaves it.
    pub in_order: bool,
}

impl CreateOptions {
    /// The further files of the image: what they are, as messages call them, and their names.
    pub fn further(&self) -> impl Iterator<Item = (&str, &OsStr)> {
        let given = self.values.files().map(|(key, name)| (key as &str, name));
        given.chain(self.named.iter().map(|name| ("extent", &**name)))
    }

    /// As [`CreateOptions::preallocation`], of a disk that is fixed or is not: none in others.
    ///
    /// # Errors
    /// `Invalid` for a fixed disk of `format` that has something below it; `Unsupported` for others of
    /// which space is wanted at once.
    pub fn preallocation_of(&self, format: &str, fixed: bool) -> Result<Preallocation> {
        let preallocation = self.preallocation();
        if fixed && self.backing.is_some() {
            return Err(Error::invalid(format!(
                "a fixed {format} has no backing file (allowed with one: subformat=dynamic)"
            )));
        }
        match fixed || preallocation == Preallocation::Off {
            true => Ok(preallocation),
            false => Err(Error::unsupported(
                "preallocation is for subformat=fixed (allowed for others: off)",
            )),
        }
    }

    /// The `block_size` option, where it was given.
    ///
    /// # Errors
    /// `Invalid` for what is no power of two, or not among those that are `allowed`.
    pub fn block_size(&self, allowed: &RangeInclusive<u64>) -> Result<Option<u64>> {
        let size = self.values.number("block_size");
        match size.is_none_or(|size| size.is_power_of_two() && allowed.contains(&size)) {
            true => Ok(size),
            false => Err(Error::invalid(format!(
                "block_size is {} (allowed: a power of two from {} to {})",
                size.unwrap_or_default(),
                allowed.start(),
                allowed.end()
            ))),
        }
    }

    /// The `preallocation` option; `Off` where it was not given.
    pub fn preallocation(&self) -> Preallocation {
        self.values
            .text("preallocation")
            .and_then(Preallocation::from_word)
            .unwrap_or_default()
    }
}

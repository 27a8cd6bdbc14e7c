//! New files made of a disc, or of a disk that becomes one.

use std::ffi::{OsStr, OsString};
use std::fmt;

use super::{Mode, Table};
use crate::error::Result;
use crate::image::options::{OptionSpec, OptionValues};

/// Where sectors come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A disk, 2048 bytes a sector, from this sector on.
    Disk(u64),
    /// A disc, from this address on.
    Disc(u64),
}

/// A run of sectors of a new file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Where they come from.
    pub origin: Origin,
    /// How many.
    pub sectors: u64,
    /// How they are stored there; of a disk, the data of the mode that is made.
    pub from: Mode,
    /// How they are to be stored.
    pub mode: Mode,
    /// The address of the first on the new disc.
    pub lba: u64,
    /// Offset of the first in the new file.
    pub host: u64,
}

/// One new file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewFile {
    /// Its name, in the directory of the target.
    pub name: OsString,
    /// What it begins with.
    pub head: Vec<u8>,
    /// Its sectors, in order.
    pub pieces: Vec<Piece>,
    /// Its length in bytes.
    pub len: u64,
}

/// A text with names in it that may become others.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Template {
    /// What stands before each name; the last stands behind the last name.
    pub between: Vec<Vec<u8>>,
}

impl Template {
    /// The text with these names.
    pub fn with<N: AsRef<OsStr>>(&self, names: &[N]) -> Vec<u8> {
        let names = names.iter().map(|name| name.as_ref().as_encoded_bytes());
        let names = names.map(Some).chain(std::iter::repeat(None));
        let parts = self.between.iter().zip(names);
        parts
            .flat_map(|(text, name)| [text, name.unwrap_or_default()].concat())
            .collect()
    }
}

/// What is to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The files that hold sectors.
    pub files: Vec<NewFile>,
    /// The text of the image that names them; `None`: they stand for themselves.
    pub text: Option<Template>,
}

/// How files of a format are made of discs.
pub struct Maker {
    /// What `-o` takes.
    pub options: &'static [OptionSpec],
    /// Of a disk of so many bytes; the last is the name of the target without its extension.
    ///
    /// # Errors
    /// `Unsupported` where the format holds no disks; `OutOfRange` for too many or no bytes.
    pub of_disk: fn(u64, &OptionValues, &OsStr) -> Result<Plan>,
    /// Of a disc, or of one track of it.
    ///
    /// # Errors
    /// `Unsupported` where it has nothing that the format holds; `Invalid` for names that cannot
    /// be.
    pub of_disc: fn(&Table, Option<u8>, &OptionValues, &OsStr) -> Result<Plan>,
}

impl fmt::Debug for Maker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Maker").finish_non_exhaustive()
    }
}

//! What a new image is made with.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use uuid::Uuid;

use crate::image::options::{OptionKind, OptionSpec, OptionValues};
use crate::storage::Storage;

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
    /// The empty objects that the options name as further files of the image, in the order of
    /// [`OptionValues::files`].
    pub files: Vec<Arc<dyn Storage>>,
}

impl CreateOptions {
    /// The `preallocation` option; `Off` where it was not given.
    pub fn preallocation(&self) -> Preallocation {
        self.values
            .text("preallocation")
            .and_then(Preallocation::from_word)
            .unwrap_or_default()
    }
}

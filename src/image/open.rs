//! What an image is opened with.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::sync::Arc;

use crate::error::Result;
use crate::image::options::OptionValues;
use crate::image::snapshot::Pick;
use crate::storage::Storage;
use crate::storage::open::Access;
use crate::util::grace::Grace;

/// Whether metadata waits for the data it points at to be on stable media.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WriteOrder {
    /// Data, then metadata, then the answer: safe against kills and power cuts.
    #[default]
    Ordered,
    /// No order until `flush`: for a new image that nobody sees before it is whole.
    Unordered,
}

/// Why an image is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Purpose {
    /// To use the disk: damaged metadata is refused.
    #[default]
    Use,
    /// To say what it is: nothing of its disk is read, so that what keeps it from being read, such
    /// as encryption, is no reason to refuse it.
    Describe,
    /// To check it: everything that still lets the checker work is let through, and reported.
    Check,
}

/// Opens further files of one image (external data files, extents), as the user's policy allows.
pub trait Companions: fmt::Debug + Send + Sync {
    /// Opens the file that the image calls `name`, relative to the image's directory or absolute,
    /// with the access the image was opened with.  `what` says what it is, for messages.
    ///
    /// # Errors
    /// `Denied` where the policy does not let us; the host's.
    fn open(&self, name: &OsStr, what: &str) -> Result<Arc<dyn Storage>>;
}

/// What an image is opened with.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Opens further files of the image; `None`: they are not wanted, and data there cannot be
    /// read.
    pub companions: Option<Arc<dyn Companions>>,
    /// Whether changes are wanted; never more than the storage was opened for.
    pub access: Access,
    /// Whether metadata waits for data.
    pub order: WriteOrder,
    /// Why it is opened.
    pub purpose: Purpose,
    /// Shared with everything that reads through this image.
    pub grace: Arc<Grace>,
    /// The internal snapshot to show instead of the disk as it is now; read-only.
    pub snapshot: Option<Pick>,
    /// Which disk of a file that holds several: its number, counted from 1, or its name.
    pub member: Option<OsString>,
    /// Options of the format, checked against its `open_options`.
    pub values: OptionValues,
}

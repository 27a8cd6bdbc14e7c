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
use crate::util::progress::Watcher;

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
    /// The same; where no file has that name, the one in the image's own directory whose name
    /// differs in case alone, if there is one and no more.  A file that is among `opened` already,
    /// under whatever name, is not opened again, which its own lock might not allow.
    ///
    /// # Errors
    /// As there; `Invalid` where there are several.
    fn open_in_any_case(
        &self,
        name: &OsStr,
        what: &str,
        opened: &[Arc<dyn Storage>],
    ) -> Result<Arc<dyn Storage>> {
        let _ = opened;
        self.open(name, what)
    }
}

/// What to do about data that its own codes say is wrong, and that they cannot correct.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Damaged {
    /// It cannot be read.
    #[default]
    Refuse,
    /// It is read as it is stored.
    AsStored,
}

/// What an image is opened with.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Opens further files of the image; `None`: they are not wanted, and data there cannot be
    /// read.
    pub companions: Option<Arc<dyn Companions>>,
    /// Opens files without which nothing is known of the image, not even its size: whatever is
    /// wanted of others.  `None`: the image is nowhere, so that it has none.
    pub needed: Option<Arc<dyn Companions>>,
    /// What to do about data whose codes are wrong.
    pub damaged: Damaged,
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
    /// It is opened to list the operations that it consists of, in formats that are lists of such: none of
    /// them is kept, so that the disk cannot be read.
    pub listed: bool,
    /// Options of the format, checked against its `open_options`.
    pub values: OptionValues,
    /// Told of what must be read whole before the image can be used, and asked whether to stop.
    pub watcher: Watcher,
}

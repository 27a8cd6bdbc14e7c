//! What an image is opened with.

use std::sync::Arc;

use crate::image::options::OptionValues;
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
    /// To check it: everything that still lets the checker work is let through, and reported.
    Check,
}

/// What an image is opened with.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Whether changes are wanted; never more than the storage was opened for.
    pub access: Access,
    /// Whether metadata waits for data.
    pub order: WriteOrder,
    /// Why it is opened.
    pub purpose: Purpose,
    /// Shared with everything that reads through this image.
    pub grace: Arc<Grace>,
    /// Options of the format, checked against its `open_options`.
    pub values: OptionValues,
}

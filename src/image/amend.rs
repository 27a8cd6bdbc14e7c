//! Change of an existing image's format options, in place.

use crate::error::Result;
use crate::image::options::{OptionSpec, OptionValues};

/// Change of format options.
///
/// The image must have been opened for writing, with no other request under way.
pub trait Amend {
    /// The options that can be changed.
    fn options(&self) -> &'static [OptionSpec];
    /// Changes what `values`, which was checked against [`Amend::options`], has, and nothing else;
    /// but not `size`, for which the layers below are needed: the caller resizes.
    /// Durable when it returns.  The chain must then be opened anew.
    ///
    /// # Errors
    /// `Unsupported`, `Invalid` for what the image cannot become, with nothing changed; the
    /// host's; then the changes before the one at fault are made.
    fn amend(&mut self, values: &OptionValues) -> Result<()>;
}

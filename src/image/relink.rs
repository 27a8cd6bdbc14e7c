//! Changes of what lies below an image, made in place.

use std::ffi::OsStr;

use uuid::Uuid;

use crate::error::Result;
use crate::image::create::CreateBacking;

/// Naming another backing image.
///
/// The image must have been opened for writing, with no other request under way.
pub trait Relink {
    /// Makes the header name `backing`, or none, and nothing else: what the image does not have
    /// itself is read there from now on.  Durable when it returns; at every moment before, the
    /// header names the old image or the new one.  The chain must then be opened anew.
    ///
    /// # Errors
    /// `Unsupported`, `Invalid` where the header cannot say it, with nothing changed; the host's.
    fn relink(&mut self, backing: Option<&CreateBacking>) -> Result<()>;
    /// Makes the header say that the image below is in this state now, and that what the image itself
    /// has goes with it.  Durable when it returns.  Formats that record no state have nothing to say.
    ///
    /// # Errors
    /// `ReadOnly`; the host's.
    fn accept_state(&mut self, _state: Uuid) -> Result<()> {
        Ok(())
    }
    /// Gives the image another state, since what it reads as has changed with what lies below it.
    /// Durable when it returns.  Formats that have no state have nothing to say.
    ///
    /// # Errors
    /// `ReadOnly`; the host's.
    fn renew_state(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Naming the further files that an image is made of otherwise.
pub trait Rename {
    /// Has the image call its further files so, in their order, and changes nothing else.  Durable when
    /// it returns; the image must have been opened for writing, with no other request under way.
    ///
    /// # Errors
    /// `Invalid` for names that the image cannot record, and for another number of them, with nothing
    /// changed; the host's.
    fn rename(&mut self, names: &[&OsStr]) -> Result<()>;
}

/// Dropping all that an image has itself.
pub trait Empty {
    /// Gives back the space of all guest data, so that all of it is read below; what snapshots
    /// keep stays.  Durable when it returns, and there as a whole or not at all.
    ///
    /// # Errors
    /// `Unsupported`, with nothing changed; the host's.
    fn empty(&mut self) -> Result<()>;
}

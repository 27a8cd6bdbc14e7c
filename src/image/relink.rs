//! Changes of what lies below an image, made in place.

use std::ffi::OsStr;

use uuid::Uuid;

use crate::error::Result;
use crate::image::create::CreateBacking;

/// Naming another backing image.
///
/// The image must have been opened for writing, with no other request under way.
pub trait Relink {
    /// Whether [`Relink::relink`] would be refused for what `backing` is; changes nothing.
    ///
    /// # Errors
    /// `Unsupported`, `Invalid`, as there.
    fn may_relink(&self, _backing: Option<&CreateBacking>) -> Result<()> {
        Ok(())
    }
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
    /// Makes the header say that the image below may be in this state too, since changes of it on this
    /// one's behalf begin.  Durable when it returns.  Most formats have no place for it.
    ///
    /// # Errors
    /// `ReadOnly`; the host's.
    fn expect_state(&mut self, _state: Uuid) -> Result<()> {
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
    /// Gives back the space of all guest data, so that all of it is read below, where it is to be
    /// already; what snapshots keep stays.  Durable when it returns; where it fails, or is killed, a
    /// part of the data may be gone.
    ///
    /// # Errors
    /// `Unsupported`, with nothing changed; the host's.
    fn empty(&mut self) -> Result<()>;
}

//! How a long job tells of its progress and is told to stop.

use std::fmt;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};

/// Told of the progress of a job; called from any of its threads.
pub trait Progress: Send + Sync {
    /// `bytes` more are done, of the total that the job was started with.
    fn advance(&self, bytes: u64);
    /// Whether the user asked to stop; the job then ends with `Cancelled`.
    fn cancelled(&self) -> bool;
    /// `Cancelled` where the user asked to stop.
    ///
    /// # Errors
    /// As it says.
    fn check(&self) -> Result<()> {
        match self.cancelled() {
            true => Err(Error::new(ErrorKind::Cancelled, "stopped by a signal")),
            false => Ok(()),
        }
    }
}

/// Tells nobody and never stops.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn advance(&self, _bytes: u64) {}

    fn cancelled(&self) -> bool {
        false
    }
}

/// Whoever is told how far a change of an image is, which ends by itself.
#[derive(Clone)]
pub struct Watcher(Arc<dyn Progress>);

impl Watcher {
    /// Tells `progress`.
    pub fn new(progress: Arc<dyn Progress>) -> Self {
        Self(progress)
    }

    /// `bytes` more are done.
    pub fn advance(&self, bytes: u64) {
        self.0.advance(bytes);
    }

    /// `Cancelled` where the user asked to stop.
    ///
    /// # Errors
    /// As it says.
    pub fn check(&self) -> Result<()> {
        self.0.check()
    }
}

impl Default for Watcher {
    fn default() -> Self {
        Self(Arc::new(Silent))
    }
}

impl fmt::Debug for Watcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watcher")
    }
}

//! Disks for clients: the kernel, or whoever speaks a protocol.
//!
//! A server moves requests between its clients and [`Backend`]s, and knows nothing of images.  It
//! is started by a function of its own that returns once clients may come; the rest of its life
//! goes through [`Server`].
//!
//! For each request a server either calls [`Backend::submit`] on a thread that may block, or goes
//! by its steps: [`Backend::admit`] on a thread that may not; then the transfer, by itself where
//! [`crate::backend::Ticket::moving`] allows it, else by [`Backend::execute`] on a worker; then
//! [`Backend::complete`].  Requests that are held, or told to wait, are the server's to keep until
//! [`Backend::on_wake`] calls it.

use std::fmt;
use std::sync::Arc;

use crate::backend::{Backend, Kind};
use crate::error::Result;

pub mod ublk;

#[cfg(test)]
pub(crate) mod fake;
pub mod nbd;

/// One disk as clients know it.
#[derive(Debug, Clone)]
pub struct Export {
    /// What clients ask for; unique among the exports of a server, and may be empty.
    pub name: String,
    /// What people are shown; may be empty.
    pub description: String,
    /// The disk.
    pub backend: Arc<Backend>,
}

/// A running server.
///
/// All methods may be called from any thread.  Dropping it is a `stop`, and waits for its threads.
pub trait Server: fmt::Debug + Send + Sync {
    /// Where clients find the exports: a device or a URI for each, in the order of the exports.
    fn addresses(&self) -> Vec<String>;
    /// Returns when the server has ended: after `stop`, when its last client has left and it was
    /// to serve only as long, or because it cannot go on.
    ///
    /// # Errors
    /// Why it cannot go on.
    fn wait(&self) -> Result<()>;
    /// Takes no more requests, answers those that are under way, and ends.  Returns at once; so
    /// does a second call.  Requests that the server keeps because they are held or have to wait
    /// are answered with an error.
    fn stop(&self);
    /// Ends, and leaves what clients have open, and what they ask for meanwhile, to the next server:
    /// requests under way are answered.  Returns at once.  The backends are paused then and stay so.
    ///
    /// # Errors
    /// `Unsupported` where clients cannot wait for another server; `Invalid` where it ends already.
    fn hand_over(&self) -> Result<()> {
        Err(crate::error::Error::unsupported(
            "clients of this kind of server cannot wait for another one",
        ))
    }
    /// Tells clients that the size of an export has changed; `export.backend` has the new one.
    ///
    /// # Errors
    /// `Unsupported` where clients cannot be told; the host's.
    fn resized(&self, export: &Export) -> Result<()>;
    /// Whether clients could be told of another size; asked before it changes.
    ///
    /// # Errors
    /// `Unsupported` where they cannot.
    fn may_resize(&self, export: &Export) -> Result<()> {
        let _ = export;
        Ok(())
    }
    /// Whether requests that come between `stop` and the end are carried out: its client is a
    /// kernel that writes back what it holds before it lets go.  The backends must then stay open
    /// until `wait` has returned.
    fn drains(&self) -> bool {
        false
    }
    /// How many requests of this kind the client joined with others before they came; `None` where
    /// nobody counts that.
    fn merged(&self, export: usize, kind: Kind) -> Option<u64> {
        let _ = (export, kind);
        None
    }
    /// What it uses of the host, for reports: names and values for the export of this number.
    fn in_use(&self, export: usize) -> Vec<(&'static str, String)> {
        let _ = export;
        Vec::new()
    }
}

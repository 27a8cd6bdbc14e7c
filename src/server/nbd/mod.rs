//! The NBD server: exports for clients on Unix and TCP sockets.
//!
//! One thread accepts.  Each connection has threads of its own, so that a client that never reads,
//! or stops in the middle of a message, blocks nobody else: whoever holds the connection's input
//! reads the next request and lets go before carrying it out, and there are only as many of these
//! threads as the storage keeps busy.  Replies go out as they are ready.  Memory for requests is
//! bounded over all connections; where it is used up, requests go in small pieces.

use std::sync::Arc;
use std::time::Duration;

use crate::error::Result;
use crate::nbd::tls;
use crate::server::{Export, Server};

mod accept;
mod bitmap;
mod budget;
mod change;
mod gate;
mod guests;
mod handshake;
mod input;
mod listen;
mod option;
mod output;
mod pipe;
mod read;
mod server;
mod session;
mod status;

pub use listen::Listen;

/// When a server ends by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Persistence {
    /// After the last client has left, once there was one.
    #[default]
    LastClient,
    /// Never.
    Stopped,
}

/// How a server is set up.
#[derive(Debug, Clone)]
pub struct Options {
    /// Most clients at once, at least 1; further ones are told so and turned away, where none of
    /// the others is about to leave.
    pub connections: usize,
    /// When it ends by itself.
    pub persistence: Persistence,
    /// TLS, which then is required; `None`: plain.
    pub tls: Option<tls::Server>,
    /// Dirty bitmaps of the top layers that clients may look at.
    pub bitmaps: Vec<String>,
    /// How long a client may take to agree on an export.
    pub handshake: Duration,
    /// Most bytes of requests under way, over all connections.
    pub memory: usize,
    /// Most requests under way on one connection.
    pub depth: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connections: 128,
            persistence: Persistence::default(),
            tls: None,
            bitmaps: Vec::new(),
            handshake: Duration::from_secs(10),
            memory: 256 << 20,
            depth: 16,
        }
    }
}

/// Starts a server; clients can connect when it returns.
///
/// The first export is also found under the empty name, where no export has that.
///
/// # Errors
/// The host's; `Invalid` for no exports, two of one name, names that are too long, and bitmaps whose
/// bits cannot be relied on; `NotFound` for bitmaps that are not there.
pub fn start(listen: &Listen, exports: Vec<Export>, options: Options) -> Result<Arc<dyn Server>> {
    Ok(Arc::new(server::NbdServer::start(
        listen, exports, options,
    )?))
}

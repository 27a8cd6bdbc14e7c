//! The servers there are: their arguments, and how each is started.

use std::sync::Arc;

use super::ublk::{self, UblkArgs};
use super::{Export, Server, usage};

/// Which server, and what only that one needs.
#[derive(Debug, clap::Args)]
pub struct TransportArgs {
    /// Block devices.
    #[command(flatten)]
    pub ublk: UblkArgs,
}

/// Starts the server that was asked for; clients may come when this returns.
///
/// # Errors
/// A usage error where none was named; those of the server.
pub fn start(args: &super::Args, exports: &[Export]) -> anyhow::Result<Arc<dyn Server>> {
    match ublk::start(args, exports)? {
        Some(server) => Ok(server),
        None => Err(usage("no server was named (--ublk)")),
    }
}

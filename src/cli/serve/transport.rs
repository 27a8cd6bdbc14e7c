//! The servers there are: their arguments, and how each is started.

use super::{Export, Server, usage};

/// Which server, and what only that one needs.
#[derive(Debug, clap::Args)]
pub struct TransportArgs {}

/// Starts the server that was asked for; clients may come when this returns.
///
/// # Errors
/// A usage error where none was named; those of the server.
pub fn start(_args: &super::Args, _exports: Vec<Export>) -> anyhow::Result<Box<dyn Server>> {
    Err(usage("no server was named"))
}

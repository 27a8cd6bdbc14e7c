//! The servers there are: their arguments, and how each is started.

use std::path::PathBuf;
use std::sync::Arc;

use super::ublk::{self, UblkArgs};
use super::{Export, Server, usage};
use crate::error::Context;
use crate::nbd::tls::{self, Peers};
use crate::server::nbd::{self, Listen, Persistence};

/// Which server, and what only that one needs.
#[derive(Debug, clap::Args)]
pub struct TransportArgs {
    /// Serve NBD clients on a Unix socket, a TCP port, or the socket that a service manager hands over.
    #[arg(long, value_name = "unix:PATH|HOST:PORT|inherited", value_parser = parse_listen)]
    pub nbd: Option<Listen>,
    /// What clients of the one image that has no NAME= ask for.
    #[arg(long, value_name = "NAME", default_value = "", requires = "nbd")]
    pub name: String,
    /// Most NBD clients at once; further ones are told so.
    #[arg(long, value_name = "N", default_value_t = 128, requires = "nbd",
          value_parser = clap::value_parser!(u16).range(1..))]
    pub connections: u16,
    /// Go on after the last NBD client has left.
    #[arg(long, requires = "nbd")]
    pub persistent: bool,
    /// Let NBD clients see this dirty bitmap of the images; repeatable.
    #[arg(long, value_name = "NAME", requires = "nbd")]
    pub bitmap: Vec<String>,
    /// Require TLS, with server-cert.pem and server-key.pem in this directory.
    #[arg(long, value_name = "DIR", requires = "nbd")]
    pub tls: Option<PathBuf>,
    /// Take only clients with a certificate that ca-cert.pem, in the same directory, vouches for.
    #[arg(long, requires = "tls")]
    pub tls_verify_peer: bool,
    /// Block devices.
    #[command(flatten)]
    pub ublk: UblkArgs,
}

/// Starts the server that was asked for; clients may come when this returns.
///
/// # Errors
/// A usage error where none was named; those of the server.
pub fn start(args: &super::Args, exports: Vec<Export>) -> anyhow::Result<Arc<dyn Server>> {
    if let Some(server) = ublk::start(args, &exports)? {
        return Ok(server);
    }
    match &args.transport.nbd {
        Some(listen) => Ok(nbd::start(listen, exports, options(&args.transport)?)?),
        None => Err(usage("no server was named (--ublk, --nbd)")),
    }
}

fn options(args: &TransportArgs) -> anyhow::Result<nbd::Options> {
    let peers = match args.tls_verify_peer {
        true => Peers::Verified,
        false => Peers::Any,
    };
    let tls = args.tls.as_deref();
    let tls = tls.map(|directory| tls::Server::load(directory, peers).at(directory));
    Ok(nbd::Options {
        connections: args.connections.into(),
        persistence: match args.persistent {
            true => Persistence::Stopped,
            false => Persistence::LastClient,
        },
        tls: tls.transpose()?,
        bitmaps: args.bitmap.clone(),
        ..nbd::Options::default()
    })
}

fn parse_listen(text: &str) -> Result<Listen, String> {
    Listen::parse(text).map_err(|e| e.to_string())
}

//! The NBD protocol: what the server and the client share.
//!
//! Numbers of the wire, URIs, sockets with time limits, and TLS.  Nothing here knows images.

pub mod link;
pub mod resolve;
pub mod socket;
pub mod tls;
pub mod uri;
pub mod wire;

pub use link::Link;
pub use uri::Uri;

//! Virtual disk images: open, read, write, create, convert, check.
//!
//! The layers, lowest first; each one imports only those before it:
//!
//! ```text
//! util      sizes, alignment, ranges, on-disk words
//! nbd       the NBD protocol: wire, URIs, sockets, TLS
//! storage   host bytes: files, block devices, memory
//! container files that hold files: tar, gzip
//! image     one layer: where a format keeps its guest bytes
//! formats   one entry per format, and the registry
//! chain     layers resolved into one disk
//! backend   bounds, alignment and accounting in front of a chain
//! copy      moving whole disks: convert, compare
//! server    disks for clients: what every server does
//! cli       what users type            (the binary only)
//! output    what they read             (the binary only)
//! ```
//!
//! # Example
//!
//! ```
//! use vdtool::chain::open::{ChainOptions, open};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path().join("disk.img");
//! # std::fs::write(&path, vec![0; 1 << 20])?;
//! let disk = open(&path, &ChainOptions::write())?;
//! disk.write_at(b"hello", 4096)?;
//! let mut bytes = [0; 5];
//! disk.read_at(&mut bytes, 4096)?;
//! assert_eq!(&bytes, b"hello");
//! disk.flush()?;
//! disk.close()?;
//! # Ok(())
//! # }
//! ```
//!
//! The library prints nothing, never exits the process, and has no global state but one signal
//! handler, installed when the first file is mapped, that turns the loss of a mapped file's bytes
//! into an I/O error.

pub mod backend;
pub mod chain;
pub mod container;
pub mod copy;
pub mod dirty;
pub mod error;
pub mod formats;
pub mod image;
pub mod nbd;
pub mod server;
pub mod storage;
pub mod util;

#[doc(hidden)]
pub mod cli;
#[doc(hidden)]
pub mod output;

pub use error::{Context, Error, ErrorKind, Result};

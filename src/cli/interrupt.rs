//! Stopping a long change where a signal finds it.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;

use crate::cli::signal;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{HostRun, Limits, Storage, Zeroing};

/// Whether to go on.
///
/// # Errors
/// `Cancelled` where SIGINT or SIGTERM came.
pub fn check() -> Result<()> {
    if signal::caught() {
        return Err(Error::new(ErrorKind::Cancelled, "stopped by a signal"));
    }
    Ok(())
}

/// Storage that takes no more changes once a signal came, so that whoever writes to it, a format
/// that fills a new image for one, stops at its next write.
#[derive(Debug)]
pub struct Interruptible {
    storage: Arc<dyn Storage>,
}

impl Interruptible {
    /// Wraps `storage`.
    pub fn new(storage: Arc<dyn Storage>) -> Self {
        Self { storage }
    }
}

impl Storage for Interruptible {
    fn size(&self) -> u64 {
        self.storage.size()
    }

    fn limits(&self) -> Limits {
        self.storage.limits()
    }

    fn path(&self) -> Option<&Path> {
        self.storage.path()
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.storage.fd()
    }

    fn read_at(&self, buf: &mut [u8], host: u64) -> Result<()> {
        self.storage.read_at(buf, host)
    }

    fn write_at(&self, buf: &[u8], host: u64) -> Result<()> {
        check()?;
        self.storage.write_at(buf, host)
    }

    fn zero(&self, host: Range<u64>, how: Zeroing) -> Result<()> {
        check()?;
        self.storage.zero(host, how)
    }

    fn discard(&self, host: Range<u64>) -> Result<()> {
        check()?;
        self.storage.discard(host)
    }

    fn run(&self, host: u64, len: u64) -> Result<HostRun> {
        self.storage.run(host, len)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        check()?;
        self.storage.set_len(len)
    }

    fn sync(&self) -> Result<()> {
        self.storage.sync()
    }

    fn write_back(&self, host: Range<u64>) {
        self.storage.write_back(host);
    }

    fn reserve(&self, host: Range<u64>) -> Result<()> {
        check()?;
        self.storage.reserve(host)
    }
}

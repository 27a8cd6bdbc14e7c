//! Stopping a long change where a signal finds it.

use std::fmt;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;

use crate::cli::signal;
use crate::copy::progress::Progress;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::syncs::Syncs;
use crate::storage::{HostId, HostRun, Limits, Storage, Zeroing};
use crate::util::align::len64;

/// Whether to go on.
///
/// # Errors
/// `Cancelled` where SIGINT or SIGTERM came.
pub fn check() -> Result<()> {
    match signal::caught() {
        true => Err(Error::new(ErrorKind::Cancelled, "stopped by a signal")),
        false => Ok(()),
    }
}

/// Storage that takes no more changes once a signal came, so that whoever writes to it, a format
/// that fills a new image for one, stops at its next write; and that tells how far that is.
pub struct Interruptible {
    storage: Arc<dyn Storage>,
    progress: Option<Arc<dyn Progress>>,
}

impl fmt::Debug for Interruptible {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.storage.fmt(f)
    }
}

impl Interruptible {
    /// Wraps `storage`; what is written to it counts as `progress`.
    pub fn new(storage: Arc<dyn Storage>, progress: Option<Arc<dyn Progress>>) -> Self {
        Self { storage, progress }
    }
}

impl Storage for Interruptible {
    fn size(&self) -> u64 {
        self.storage.size()
    }

    fn has_fixed_len(&self) -> bool {
        self.storage.has_fixed_len()
    }

    fn limits(&self) -> Limits {
        self.storage.limits()
    }

    fn path(&self) -> Option<&Path> {
        self.storage.path()
    }

    fn host_id(&self) -> Option<HostId> {
        self.storage.host_id()
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.storage.fd()
    }

    fn read_at(&self, buf: &mut [u8], host: u64) -> Result<()> {
        self.storage.read_at(buf, host)
    }

    fn read_alone(&self, buf: &mut [u8], host: u64) -> Result<()> {
        self.storage.read_alone(buf, host)
    }

    fn write_at(&self, buf: &[u8], host: u64) -> Result<()> {
        check()?;
        self.storage.write_at(buf, host)?;
        if let Some(progress) = &self.progress {
            progress.advance(len64(buf.len()));
        }
        Ok(())
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

    fn sync_now(&self) -> Result<()> {
        self.storage.sync_now()
    }

    fn syncs(&self) -> &Syncs {
        self.storage.syncs()
    }

    fn write_back(&self, host: Range<u64>) {
        self.storage.write_back(host);
    }

    fn reserve(&self, host: Range<u64>) -> Result<()> {
        check()?;
        self.storage.reserve(host)
    }
}

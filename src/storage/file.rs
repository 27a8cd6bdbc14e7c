//! Regular files: mapped or positioned reads, positioned writes, holes, preallocation.

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::{Errno, retry_on_intr};
use rustix::process::{Resource, getrlimit};

use crate::error::{Error, ErrorKind, Result};
use crate::storage::copy;
use crate::storage::filesystem::FileSystem;
use crate::storage::known::{Found, Known, Next};
use crate::storage::mmap::Mapping;
use crate::storage::open::{Caching, Flushing};
use crate::storage::positioned::Positioned;
use crate::storage::syncs::Syncs;
use crate::storage::{HostId, HostRun, Limits, Storage, Zeroing};
use crate::util::align::len64;
use crate::util::moment::moment;

/// Longer reads gain nothing from the windows that stay: one system call costs less than the page
/// faults, and leaves no page tables behind.
pub(super) const MAPPED_READ: usize = 64 << 10;

/// A regular file.
#[derive(Debug)]
pub struct FileStorage {
    host: Positioned,
    /// As of the last change made through this object; never more than the file's own length but
    /// while it grows, so that reads up to it stay inside.
    len: AtomicU64,
    /// Longest file this process may write (`RLIMIT_FSIZE`); past it the kernel sends a signal
    /// that ends the process, so we do not go there.
    most: Option<u64>,
    /// `None` where reads are to be system calls.
    mapping: Option<Mapping>,
    /// What of it is data.
    known: Known,
}

impl FileStorage {
    /// Wraps an open regular file, with mapped reads on local file systems.
    ///
    /// # Errors
    /// The host's, when asked for the length.
    pub fn new(file: File, path: &Path) -> Result<Self> {
        Self::with_caching(file, path, Caching::Mapped)
    }

    /// Wraps an open regular file.  With `Direct` the descriptor has `O_DIRECT` set already, and
    /// the caller keeps to its alignment.
    ///
    /// # Errors
    /// The host's, when asked for the length.
    pub fn with_caching(file: File, path: &Path, caching: Caching) -> Result<Self> {
        let host = Positioned::new(file, path);
        let metadata = host.file.metadata();
        let len = metadata
            .map_err(|e| host.fail("read the length".to_owned(), e))?
            .len();
        let mapped =
            caching == Caching::Mapped && FileSystem::of(host.file.as_fd()) == FileSystem::Local;
        Ok(Self {
            host,
            len: AtomicU64::new(len),
            most: getrlimit(Resource::Fsize).current,
            mapping: mapped.then(Mapping::new),
            known: Known::default(),
        })
    }

    /// The same, where syncs are as `flushing` says.
    pub(super) fn with_flushing(mut self, flushing: Flushing) -> Self {
        self.host.flushing = flushing;
        self
    }

    /// Refuses an end past what the process may write, or past the end of numbers.
    fn check_end(&self, host: u64, len: u64) -> Result<()> {
        let end = host.checked_add(len).filter(|e| i64::try_from(*e).is_ok());
        let most = self.most.unwrap_or(u64::MAX);
        match end {
            Some(end) if end <= most || end <= self.size() => Ok(()),
            Some(end) => Err(Error::new(
                ErrorKind::NoSpace,
                format!(
                    "{end:#x} is past the longest file this process may write \
                     (allowed: {most:#x}, see ulimit -f)"
                ),
            )
            .at(&self.host.path)),
            None => Err(Error::invalid(format!(
                "{len} bytes at {host:#x} reach past the longest file there can be"
            ))
            .at(&self.host.path)),
        }
    }

    fn fallocate(&self, doing: &str, mode: FallocateFlags, range: &Range<u64>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let (start, len) = (range.start, range.end - range.start);
        moment();
        let done = retry_on_intr(|| fallocate(&self.host.file, mode, start, len));
        // Also where it failed: a part may be gone.
        if mode.intersects(FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE) {
            self.known.forget(range);
        }
        done.map_err(|e| self.host.fail(format!("{doing} at {start:#x}"), e))
    }

    fn grown(&self, end: u64) {
        self.len.fetch_max(end, Ordering::AcqRel);
    }

    /// The answer where no more data is found: a hole of `len` bytes.
    fn hole_to_the_end(&self, len: u64) -> Result<HostRun> {
        // What was cut off is no hole; calling it one would pass zeroes off as data.
        self.check_not_truncated(self.size())?;
        Ok(HostRun { data: false, len })
    }

    /// Refuses an `end` that the file no longer reaches.
    fn check_not_truncated(&self, end: u64) -> Result<()> {
        let stat = rustix::fs::fstat(&self.host.file);
        let stat = stat.map_err(|e| self.host.fail("read the length".to_owned(), e))?;
        let now = u64::try_from(stat.st_size).unwrap_or(0);
        // What we cut off ourselves meanwhile is no loss.
        match now < end.min(self.size()) {
            true => Err(self.host.shrank(now, self.size())),
            false => Ok(()),
        }
    }
}

impl Storage for FileStorage {
    fn size(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    fn has_fixed_len(&self) -> bool {
        false
    }

    fn limits(&self) -> Limits {
        Limits {
            align: 1,
            buf_align: 1,
            zero_align: 1,
            discard_align: 1,
        }
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.host.path)
    }

    fn host_id(&self) -> Option<HostId> {
        self.host.id()
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.host.file.as_fd())
    }

    fn read_at(&self, buf: &mut [u8], host: u64) -> Result<()> {
        let len = self.size();
        if let Some(mapping) = &self.mapping
            && buf.len() <= MAPPED_READ
            && host.checked_add(len64(buf.len())).is_some_and(|e| e <= len)
            && mapping.read(&self.host.file, buf, host).is_ok()
        {
            // Where a truncation cuts a page, the rest of that page reads as zeroes and no signal
            // tells.  What was lost then goes on to the end of `buf`.
            return match buf.last() {
                Some(0) => self.check_not_truncated(host + len64(buf.len())),
                _ => Ok(()),
            };
        }
        self.host.read(buf, host, len)
    }

    fn read_alone(&self, buf: &mut [u8], host: u64) -> Result<()> {
        self.host.read(buf, host, self.size())
    }

    fn write_at(&self, buf: &[u8], host: u64) -> Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        self.check_end(host, len64(buf.len()))?;
        moment();
        self.host.write(buf, host)?;
        self.grown(host + len64(buf.len()));
        Ok(())
    }

    fn zero(&self, host: Range<u64>, how: Zeroing) -> Result<()> {
        let mode = match how {
            Zeroing::MayUnmap => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            Zeroing::KeepSpace => FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
        };
        self.fallocate("zero", mode, &host)
    }

    fn discard(&self, host: Range<u64>) -> Result<()> {
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        self.fallocate("discard", mode, &host)
    }

    fn run(&self, host: u64, len: u64) -> Result<HostRun> {
        let inside = self.size().saturating_sub(host);
        if inside == 0 {
            return Ok(HostRun { data: false, len });
        }
        let run = |data, end: u64| HostRun {
            data,
            len: (end - host).min(len),
        };
        let found = self.known.find(host, |next, at| {
            let from = match next {
                Next::Data => SeekFrom::Data(at),
                Next::Hole => SeekFrom::Hole(at),
            };
            match seek(&self.host.file, from) {
                Ok(found) => Ok(Some(found)),
                Err(Errno::NXIO) => Ok(None),
                Err(e) => Err(e),
            }
        });
        match found {
            Ok(Found::Data(end)) => Ok(run(true, end)),
            Ok(Found::Hole(Some(end))) => Ok(run(false, end)),
            Ok(Found::Hole(None)) => self.hole_to_the_end(len),
            // This host does not tell.
            Err(Errno::INVAL) => Ok(run(true, host.saturating_add(inside))),
            Err(e) => Err(self.host.fail(format!("look for data at {host:#x}"), e)),
        }
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.check_end(0, len)?;
        let before = self.size();
        if len < before {
            // Readers stop at the new end before the bytes go.
            self.len.store(len, Ordering::Release);
        }
        moment();
        let done = self.host.file.set_len(len);
        self.known.forget(&(len..u64::MAX));
        if let Err(e) = done {
            self.grown(before);
            return Err(self.host.fail(format!("set the length to {len}"), e));
        }
        self.len.store(len, Ordering::Release);
        Ok(())
    }

    fn sync_now(&self) -> Result<()> {
        moment();
        self.host.sync()
    }

    fn syncs(&self) -> &Syncs {
        &self.host.syncs
    }

    fn write_back(&self, host: Range<u64>) {
        if self.host.flushing == Flushing::Needed {
            copy::write_back(self.host.file.as_fd(), &host);
        }
    }

    fn reserve(&self, host: Range<u64>) -> Result<()> {
        self.check_end(host.start, host.end.saturating_sub(host.start))?;
        self.fallocate("reserve space", FallocateFlags::KEEP_SIZE, &host)
    }
}

#[cfg(test)]
mod tests;

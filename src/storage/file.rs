//! Regular files: positioned reads and writes, holes, punching, preallocation.

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::storage::{HostRun, Limits, Storage, Zeroing};
use crate::util::align::len64;

/// A regular file, by positioned system calls.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    path: PathBuf,
    len: AtomicU64,
}

impl FileStorage {
    /// Wraps an open regular file.
    ///
    /// # Errors
    /// The host's, when asked for the length.
    pub fn new(file: File, path: &Path) -> Result<Self> {
        let len = file
            .metadata()
            .map_err(|e| Error::io("read the length", e).at(path))?
            .len();
        Ok(Self {
            file,
            path: path.to_owned(),
            len: AtomicU64::new(len),
        })
    }

    fn fail(&self, doing: String, source: impl Into<std::io::Error>) -> Error {
        Error::io(doing, source.into()).at(&self.path)
    }

    fn fallocate(&self, doing: &str, mode: FallocateFlags, host: &Range<u64>) -> Result<()> {
        if host.is_empty() {
            return Ok(());
        }
        loop {
            match fallocate(&self.file, mode, host.start, host.end - host.start) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(e) => return Err(self.fail(format!("{doing} at {:#x}", host.start), e)),
            }
        }
    }
}

impl Storage for FileStorage {
    fn size(&self) -> u64 {
        self.len.load(Ordering::Acquire)
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
        Some(&self.path)
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }

    fn read_at(&self, buf: &mut [u8], host: u64) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let at = host.saturating_add(len64(done));
            match self.file.read_at(&mut buf[done..], at) {
                Ok(0) if at < self.size() => {
                    return Err(Error::new(
                        crate::error::ErrorKind::Io,
                        format!("the file ends at {at:#x}, it was {:#x} long", self.size()),
                    )
                    .at(&self.path));
                }
                Ok(0) => {
                    buf[done..].fill(0);
                    break;
                }
                Ok(n) => done += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.fail(format!("read at {at:#x}"), e)),
            }
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], host: u64) -> Result<()> {
        self.file
            .write_all_at(buf, host)
            .map_err(|e| self.fail(format!("write at {host:#x}"), e))?;
        self.len
            .fetch_max(host + len64(buf.len()), Ordering::AcqRel);
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
        if host >= self.size() {
            return Ok(HostRun { data: false, len });
        }
        let data = match seek(&self.file, SeekFrom::Data(host)) {
            Ok(data) => data,
            Err(Errno::NXIO) => return Ok(HostRun { data: false, len }),
            Err(Errno::INVAL) => return Ok(HostRun { data: true, len }),
            Err(e) => return Err(self.fail(format!("find data at {host:#x}"), e)),
        };
        if data > host {
            return Ok(HostRun {
                data: false,
                len: (data - host).min(len),
            });
        }
        match seek(&self.file, SeekFrom::Hole(host)) {
            Ok(hole) if hole > host => Ok(HostRun {
                data: true,
                len: (hole - host).min(len),
            }),
            Ok(_) | Err(Errno::NXIO) => Ok(HostRun { data: false, len }),
            Err(e) => Err(self.fail(format!("find a hole at {host:#x}"), e)),
        }
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.file
            .set_len(len)
            .map_err(|e| self.fail(format!("set the length to {len}"), e))?;
        self.len.store(len, Ordering::Release);
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.file
            .sync_data()
            .map_err(|e| self.fail("sync".to_owned(), e))
    }

    fn reserve(&self, host: Range<u64>) -> Result<()> {
        self.fallocate("reserve space", FallocateFlags::KEEP_SIZE, &host)
    }
}

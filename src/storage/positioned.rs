//! Whole reads and writes at an offset, as files and devices share them.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::error::{Error, ErrorKind, Result};
use crate::storage::HostId;
use crate::storage::lock::unlock;
use crate::storage::open::Flushing;
use crate::storage::syncs::Syncs;
use crate::util::align::{clamp_len, len64};

/// An open descriptor and the path that messages show.
#[derive(Debug)]
pub(super) struct Positioned {
    pub(super) file: File,
    pub(super) path: PathBuf,
    /// Which object it is; what a descriptor is open on never changes.
    id: OnceLock<Option<HostId>>,
    pub(super) flushing: Flushing,
    pub(super) syncs: Syncs,
}

impl Drop for Positioned {
    fn drop(&mut self) {
        unlock(self.file.as_fd());
    }
}

impl Positioned {
    pub(super) fn new(file: File, path: &Path) -> Self {
        Self {
            file,
            path: path.to_owned(),
            id: OnceLock::new(),
            flushing: Flushing::Needed,
            syncs: Syncs::default(),
        }
    }

    /// Has the kernel put every completed write on stable media, where anybody relies on that.
    pub(super) fn sync(&self) -> Result<()> {
        match self.flushing {
            Flushing::Needed => {
                let synced = self.file.sync_data();
                synced.map_err(|e| self.fail("sync".to_owned(), e))
            }
            Flushing::Waived => Ok(()),
        }
    }

    /// Which host object it is.
    pub(super) fn id(&self) -> Option<HostId> {
        *self.id.get_or_init(|| HostId::of_fd(&self.file))
    }

    /// The failure of a call to the host about this object; `doing` completes "cannot ...".
    pub(super) fn fail(&self, doing: String, source: impl Into<io::Error>) -> Error {
        Error::io(doing, source.into()).at(&self.path)
    }

    /// The error for bytes before `len` that are no longer there.
    pub(super) fn shrank(&self, end: u64, len: u64) -> Error {
        Error::new(
            ErrorKind::Io,
            format!("was truncated while open: it ends at {end:#x} (it was {len:#x} long)"),
        )
        .at(&self.path)
    }

    /// Fills `buf` from `host`; bytes from `len` on are zeroes, whatever is there.
    pub(super) fn read(&self, buf: &mut [u8], host: u64, len: u64) -> Result<()> {
        let inside = clamp_len(len.saturating_sub(host), buf.len());
        let mut done = 0;
        // The whole buffer is offered, so that a direct read at the end keeps its alignment.
        while done < inside {
            let at = host + len64(done);
            match self.file.read_at(&mut buf[done..], at) {
                Ok(0) => return Err(self.shrank(at, len)),
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.fail(format!("read at {at:#x}"), e)),
            }
        }
        buf[inside..].fill(0);
        Ok(())
    }

    /// Writes all of `buf` at `host`.
    pub(super) fn write(&self, buf: &[u8], host: u64) -> Result<()> {
        self.file
            .write_all_at(buf, host)
            .map_err(|e| self.fail(format!("write at {host:#x}"), e))
    }
}

//! The bytes of requests, moved by reading and writing the character device.

use std::fs::File;
use std::sync::Arc;

use libublk::sys;

use crate::error::{Error, Result};
use crate::util::align::len64;
use crate::util::buf::zeroes;

/// The character device of a disk; any thread may use it.
#[derive(Debug, Clone)]
pub(super) struct Channel(Arc<File>);

/// The bytes of one request there, for as long as the request is not answered.
#[derive(Debug)]
pub(super) struct Place<'a> {
    device: &'a File,
    start: u64,
}

impl Channel {
    /// Through an open character device.
    pub(super) fn new(device: File) -> Self {
        Self(Arc::new(device))
    }

    /// The character device itself.
    pub(super) fn file(&self) -> &File {
        &self.0
    }

    /// The bytes of a tag's request.
    pub(super) fn place(&self, queue: u16, tag: u16) -> Place<'_> {
        Place {
            device: &self.0,
            start: u64::from(sys::UBLKSRV_IO_BUF_OFFSET)
                + (u64::from(queue) << sys::UBLK_QID_OFF)
                + (u64::from(tag) << sys::UBLK_TAG_OFF),
        }
    }
}

impl Place<'_> {
    /// Fills `buf` with the bytes of a write from its offset `at` on.
    ///
    /// # Errors
    /// The driver's, when the request is no longer ours.
    pub(super) fn fetch(&self, at: usize, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let from = self.start + len64(at + done);
            let read = rustix::io::retry_on_intr(|| {
                rustix::io::pread(self.device, &mut buf[done..], from)
            });
            done += moved(read)?;
        }
        Ok(())
    }

    /// Makes `buf` the bytes of a read from its offset `at` on.
    ///
    /// # Errors
    /// As [`Place::fetch`].
    pub(super) fn store(&self, at: usize, buf: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let to = self.start + len64(at + done);
            let written =
                rustix::io::retry_on_intr(|| rustix::io::pwrite(self.device, &buf[done..], to));
            done += moved(written)?;
        }
        Ok(())
    }

    /// Makes bytes of a read zeroes.
    ///
    /// # Errors
    /// As [`Place::fetch`].
    pub(super) fn clear(&self, at: usize, len: usize) -> Result<()> {
        let zeroes = zeroes();
        let mut done = 0;
        while done < len {
            let step = (len - done).min(zeroes.len());
            self.store(at + done, &zeroes[..step])?;
            done += step;
        }
        Ok(())
    }
}

fn moved(count: rustix::io::Result<usize>) -> Result<usize> {
    let failed = |e| Error::io("move the bytes of a request", e);
    match count {
        Ok(0) => Err(failed(std::io::Error::from_raw_os_error(libc::EIO))),
        Ok(count) => Ok(count),
        Err(e) => Err(failed(e.into())),
    }
}

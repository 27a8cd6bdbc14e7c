//! From a file to a socket by reference: pages of the page cache pass through a pipe and are not
//! copied.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::io::{Errno, retry_on_intr, write};
use rustix::pipe::{
    PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, splice,
};

use crate::util::align::len64;

/// Wanted capacity: as much as users without privileges may have.
const CAPACITY: usize = 1 << 20;
/// Room kept for the header, and for a first page that is only partly used.
const SPARE: usize = 16 << 10;
/// Most pipes of the process; each takes two descriptors.
const MOST: usize = 128;

static PIPES: AtomicUsize = AtomicUsize::new(0);

/// A pipe of one thread; empty between uses.
#[derive(Debug)]
pub(super) struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    capacity: usize,
}

impl Pipe {
    /// A pipe; `None` where there are enough or the host has none to give.
    pub(super) fn new() -> Option<Self> {
        if PIPES.fetch_add(1, Ordering::Relaxed) >= MOST {
            PIPES.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        match Self::open() {
            Ok((read, write, capacity)) if capacity > 2 * SPARE => Some(Self {
                read,
                write,
                capacity,
            }),
            _ => {
                PIPES.fetch_sub(1, Ordering::Relaxed);
                None
            }
        }
    }

    fn open() -> rustix::io::Result<(OwnedFd, OwnedFd, usize)> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        // A hint: the usual size serves as well.
        let _ = fcntl_setpipe_size(&write, CAPACITY);
        let capacity = fcntl_getpipe_size(&write)?;
        Ok((read, write, capacity))
    }

    /// Most bytes of a file that [`Pipe::load`] takes.
    pub(super) fn room(&self) -> usize {
        self.capacity - SPARE
    }

    /// Takes in a header, and `len` bytes of `file` from `at`, at most [`Pipe::room`].  False: not
    /// all are to be had this way, and the pipe must be dropped.
    pub(super) fn load(&self, header: &[u8], file: BorrowedFd<'_>, at: u64, len: usize) -> bool {
        if retry_on_intr(|| write(&self.write, header)) != Ok(header.len()) {
            return false;
        }
        let mut done = 0;
        while done < len {
            let mut from = at + len64(done);
            let flags = SpliceFlags::NONBLOCK;
            match splice(file, Some(&mut from), &self.write, None, len - done, flags) {
                Ok(0) => return false,
                Ok(moved) => done += moved,
                Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
        true
    }

    /// Sends all `len` bytes that it holds.
    ///
    /// # Errors
    /// The host's; then the pipe must be dropped.
    pub(super) fn send(&self, to: BorrowedFd<'_>, len: usize) -> io::Result<()> {
        let mut left = len;
        while left > 0 {
            match splice(&self.read, None, to, None, left, SpliceFlags::empty()) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(moved) => left -= moved,
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        PIPES.fetch_sub(1, Ordering::Relaxed);
    }
}

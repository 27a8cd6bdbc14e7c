//! Reading from what may have nothing for a long time.

use std::io::Read;
use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::cli::signal;

/// How long a read from a pipe waits before it looks whether the user wants to stop.
const WAIT: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// Reads from a descriptor, and gives up when the user wants to stop.
#[derive(Debug)]
pub(super) struct Patient<R> {
    input: R,
}

impl<R: Read + AsFd> Patient<R> {
    /// Reads from `input`.
    pub(super) fn new(input: R) -> Self {
        Self { input }
    }
}

impl<R: Read + AsFd> Read for Patient<R> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        loop {
            // The caller asks why, and hears that it was cancelled.
            if signal::caught() {
                return Err(std::io::ErrorKind::Interrupted.into());
            }
            let mut fds = [PollFd::new(&self.input, PollFlags::IN)];
            match poll(&mut fds, Some(&WAIT)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return self.input.read(buf),
                Err(e) => return Err(e.into()),
            }
        }
    }
}

//! An object as a stream that is written.

use std::io::{self, Write};

use crate::storage::Storage;
use crate::util::align::len64;

/// An object that is written from an offset on.
#[derive(Debug)]
pub struct Appended<'a> {
    storage: &'a dyn Storage,
    end: u64,
}

impl<'a> Appended<'a> {
    /// What is written goes to `storage` from the offset `start` on.
    pub fn new(storage: &'a dyn Storage, start: u64) -> Self {
        Self {
            storage,
            end: start,
        }
    }
}

impl Write for Appended<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let written = self.storage.write_at(buf, self.end);
        written.map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        self.end += len64(buf.len());
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

//! Bytes from one storage to another without passing through a buffer, where the host can.

use std::ops::Range;

use crate::error::Result;
use crate::storage::Storage;
use crate::util::align::{clamp_len, len64};
use crate::util::buf::is_zero;

/// How a range got to its target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moved {
    /// The file system shares the blocks; no data moved.
    Shared,
    /// Bytes were copied.
    Copied,
}

/// Shares the blocks of `src` at `from` with `dst` at `to`, without moving data.
///
/// # Errors
/// `Unsupported`, with nothing changed, where the file system or the alignment does not allow it.
pub fn share(src: &dyn Storage, from: u64, dst: &dyn Storage, to: u64, len: u64) -> Result<()> {
    let _ = (src, from, dst, to, len);
    Err(crate::error::Error::unsupported("blocks cannot be shared"))
}

/// Copies `len` bytes of `src` at `from` to `dst` at `to`, by the cheapest means the host has.
///
/// # Errors
/// The host's; then any part of the target range may have been written.
pub fn copy(src: &dyn Storage, from: u64, dst: &dyn Storage, to: u64, len: u64) -> Result<()> {
    let mut buf = vec![0; clamp_len(len, 1 << 20)];
    let mut done = 0;
    while done < len {
        let n = clamp_len(len - done, buf.len());
        src.read_at(&mut buf[..n], from + done)?;
        dst.write_at(&buf[..n], to + done)?;
        done += len64(n);
    }
    Ok(())
}

/// The parts of `host` that hold a non-zero byte, in units of `unit` bytes counted from
/// `host.start`, in ascending order, neighbours merged.
///
/// # Errors
/// The host's.
pub fn nonzero(src: &dyn Storage, host: Range<u64>, unit: u64) -> Result<Vec<Range<u64>>> {
    let mut buf = vec![0; clamp_len(unit, 1 << 20)];
    let mut parts = Vec::new();
    let mut at = host.start;
    while at < host.end {
        let n = clamp_len(host.end - at, buf.len());
        src.read_at(&mut buf[..n], at)?;
        if !is_zero(&buf[..n]) {
            crate::util::range::push_merged(&mut parts, at..at + len64(n));
        }
        at += len64(n);
    }
    Ok(parts)
}

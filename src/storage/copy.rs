//! Bytes from one storage to another: shared, copied by a server, or through a small buffer.
//!
//! A worker holds one [`Reader`] and takes a [`Chunk`] at a time from it: read, scanned for zeroes
//! and written while it is still in the processor's cache.  A mapping of the source would save one
//! copy and cost more than that in page tables, which bytes that are looked at once do not repay.

#![allow(unsafe_code)]

use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::fs::copy_file_range;
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::storage::Storage;
use crate::storage::filesystem::FileSystem;
use crate::util::align::{clamp_len, len64};
use crate::util::buf::{AlignedBuf, nonzero as nonzero_parts};
use crate::util::range::{self, push_merged};

/// Most bytes of a [`Chunk`]: they fit the cache that a core has for itself, and a system call for
/// them costs little beside them.
pub const CHUNK: usize = 256 << 10;

/// How a range got to its target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moved {
    /// The file system shares the blocks; no data moved.
    Shared,
    /// Bytes were copied.
    Copied,
}

/// Shares the blocks of `src` at `from` with `dst` at `to`, without moving data.  The target range
/// lies inside `dst`.
///
/// # Errors
/// `Unsupported`, with nothing changed, where the file system, the alignment or the kind of
/// storage does not allow it; an engine that is told so once need not ask again for these two.
pub fn share(src: &dyn Storage, from: u64, dst: &dyn Storage, to: u64, len: u64) -> Result<()> {
    if len == 0 {
        return Ok(());
    }
    let refused = || Error::unsupported("blocks cannot be shared between these two");
    let (Some(src_fd), Some(dst_fd)) = (src.fd(), dst.fd()) else {
        return Err(refused());
    };
    // Growth is left to `write_at`, which keeps the length and minds the process's limit.
    if to.checked_add(len).is_none_or(|end| end > dst.size()) {
        return Err(refused());
    }
    match clone_range(src_fd, from, dst_fd, to, len) {
        Ok(()) => Ok(()),
        Err(e) if cannot(e) => Err(refused()),
        Err(e) => Err(Error::io(format!("share blocks at {to:#x}"), e.into()).at_opt(dst.path())),
    }
}

/// Begins to write what the page cache has of a range to the media.  A hint: failures show when it
/// is synced.
pub(super) fn write_back(fd: BorrowedFd<'_>, host: &Range<u64>) {
    let (Ok(start), Ok(len)) = (i64::try_from(host.start), i64::try_from(range::len(host))) else {
        return;
    };
    // SAFETY: the call takes numbers alone; the descriptor is open for as long as it is borrowed.
    let _ =
        unsafe { libc::sync_file_range(fd.as_raw_fd(), start, len, libc::SYNC_FILE_RANGE_WRITE) };
}

/// Whether an errno of `FICLONERANGE` or `copy_file_range` means that it cannot be done here.
fn cannot(error: Errno) -> bool {
    matches!(
        error,
        Errno::OPNOTSUPP
            | Errno::XDEV
            | Errno::INVAL
            | Errno::NOTTY
            | Errno::NOSYS
            | Errno::PERM
            | Errno::BADF
            | Errno::TXTBSY
    )
}

fn clone_range(
    src: BorrowedFd<'_>,
    from: u64,
    dst: BorrowedFd<'_>,
    to: u64,
    len: u64,
) -> std::result::Result<(), Errno> {
    let range = libc::file_clone_range {
        src_fd: src.as_raw_fd().into(),
        src_offset: from,
        src_length: len,
        dest_offset: to,
    };
    loop {
        // SAFETY: the request takes a pointer to this structure, which it only reads; both
        // descriptors are open for as long as they are borrowed.
        let result = unsafe { libc::ioctl(dst.as_raw_fd(), libc::FICLONERANGE, &raw const range) };
        if result == 0 {
            return Ok(());
        }
        match Errno::from_io_error(&std::io::Error::last_os_error()) {
            Some(Errno::INTR) => {}
            Some(e) => return Err(e),
            None => return Err(Errno::IO),
        }
    }
}

/// Copies `len` bytes of `src` at `from` to `dst` at `to`, by the cheapest means the host has.
///
/// # Errors
/// The host's; then any part of the target range may have been written.
pub fn copy(src: &dyn Storage, from: u64, dst: &dyn Storage, to: u64, len: u64) -> Result<()> {
    let mut done = offload(src, from, dst, to, len)?;
    let mut reader = Reader::new();
    while done < len {
        let n = (len - done).min(len64(CHUNK));
        let at = from + done;
        let chunk = reader.chunk(src, at..at + n)?;
        dst.write_at(chunk.bytes, to + done)?;
        done += n;
    }
    Ok(())
}

/// Has the server copy, where both ends lie on the same remote file system: the bytes then do not
/// cross the network twice.  Returns how many bytes it did.
fn offload(src: &dyn Storage, from: u64, dst: &dyn Storage, to: u64, len: u64) -> Result<u64> {
    let (Some(src_fd), Some(dst_fd)) = (src.fd(), dst.fd()) else {
        return Ok(0);
    };
    let inside = |s: &dyn Storage, at: u64| at.checked_add(len).is_some_and(|end| end <= s.size());
    if !same_remote(src_fd, dst_fd) || !inside(src, from) || !inside(dst, to) {
        return Ok(0);
    }
    let mut done = 0;
    while done < len {
        let (mut at, mut put) = (from + done, to + done);
        let step = clamp_len(len - done, 1 << 30);
        match copy_file_range(src_fd, Some(&mut at), dst_fd, Some(&mut put), step) {
            // The source ends early: reading it will say why.
            Ok(0) => break,
            Ok(n) => done += len64(n),
            Err(Errno::INTR) => {}
            Err(e) if cannot(e) => break,
            Err(e) => {
                return Err(Error::io(format!("copy to {put:#x}"), e.into()).at_opt(dst.path()));
            }
        }
    }
    Ok(done)
}

/// Whether [`copy`] between the two is done by a server, so that no other way can be as fast.
pub fn offloads(src: &dyn Storage, dst: &dyn Storage) -> bool {
    match (src.fd(), dst.fd()) {
        (Some(src), Some(dst)) => same_remote(src, dst),
        _ => false,
    }
}

fn same_remote(src: BorrowedFd<'_>, dst: BorrowedFd<'_>) -> bool {
    let device = |fd| rustix::fs::fstat(fd).map(|s| s.st_dev).ok();
    FileSystem::of(src) == FileSystem::Remote
        && FileSystem::of(dst) == FileSystem::Remote
        && device(src).is_some_and(|d| Some(d) == device(dst))
}

/// The parts of `host` that hold a non-zero byte, in units of `unit` bytes counted from
/// `host.start`, in ascending order, neighbours merged.
///
/// # Errors
/// The host's; `Invalid` for a unit of 0.
pub fn nonzero(src: &dyn Storage, host: Range<u64>, unit: u64) -> Result<Vec<Range<u64>>> {
    let step = chunk_len(unit)?;
    let mut reader = Reader::new();
    let mut parts = Vec::new();
    let mut at = host.start;
    while at < host.end {
        let end = at.saturating_add(step).min(host.end);
        for part in reader.chunk(src, at..end)?.nonzero(unit) {
            push_merged(&mut parts, part);
        }
        at = end;
    }
    if unit > len64(CHUNK) {
        parts = widen(&parts, &host, unit);
    }
    Ok(parts)
}

/// Bytes to scan at a time: whole units where they are shorter than a chunk.
fn chunk_len(unit: u64) -> Result<u64> {
    let chunk = len64(CHUNK);
    match unit {
        0 => Err(Error::invalid("a unit of 0 bytes")),
        unit if unit < chunk => Ok(chunk - chunk % unit),
        _ => Ok(chunk),
    }
}

/// `parts` grown to whole units.
fn widen(parts: &[Range<u64>], host: &Range<u64>, unit: u64) -> Vec<Range<u64>> {
    let mut wide: Vec<Range<u64>> = Vec::new();
    for part in parts {
        let start = host.start + (part.start - host.start) / unit * unit;
        let units = (part.end - host.start).div_ceil(unit);
        let end = units.saturating_mul(unit).saturating_add(host.start);
        let start = start.max(wide.last().map_or(0, |last| last.end));
        push_merged(&mut wide, start..end.min(host.end));
    }
    wide
}

/// Bytes that [`peek`] looks at.
const PEEK: usize = 512;

/// Whether a non-zero byte is found at the start of `host` by a look at few bytes there; where
/// none is, there may be one all the same.
///
/// It leaves no trace in memory, as a read from a mapping would with the page tables that it fills,
/// and what the host has against it a proper read will say.
pub fn peek(src: &dyn Storage, host: &Range<u64>) -> bool {
    let Some(fd) = src.fd().filter(|_| src.limits().align == 1) else {
        return false;
    };
    let mut bytes = [0; PEEK];
    let len = clamp_len(range::len(host), PEEK);
    match rustix::io::pread(fd, &mut bytes[..len], host.start) {
        Ok(found) => bytes.iter().take(found).any(|b| *b != 0),
        Err(_) => false,
    }
}

/// One worker's means of reading; holds at most one chunk of memory.
#[derive(Debug, Default)]
pub struct Reader {
    buf: Option<AlignedBuf>,
}

impl Reader {
    /// A reader, which takes its memory with the first chunk.
    pub fn new() -> Self {
        Self::default()
    }

    /// The bytes of `src` in `host`, at most [`CHUNK`] of them, ready to be looked at.
    ///
    /// # Errors
    /// The host's; `Invalid` for more than that.
    pub fn chunk(&mut self, src: &dyn Storage, host: Range<u64>) -> Result<Chunk<'_>> {
        let len = range::len(&host);
        if len > len64(CHUNK) {
            return Err(Error::invalid(format!(
                "a chunk of {len} bytes (allowed: {CHUNK})"
            )));
        }
        let len = clamp_len(len, CHUNK);
        let buf = self.buf.get_or_insert_with(|| AlignedBuf::new(CHUNK, 4096));
        let bytes = &mut buf[..len];
        src.read_at(bytes, host.start)?;
        Ok(Chunk { host, bytes })
    }
}

/// Bytes of a storage object.
#[derive(Debug)]
pub struct Chunk<'a> {
    host: Range<u64>,
    bytes: &'a [u8],
}

impl Chunk<'_> {
    /// The parts of the chunk that hold a non-zero byte, as the function [`nonzero`] has them.
    pub fn nonzero(&self, unit: u64) -> Vec<Range<u64>> {
        let at = |part: usize| self.host.start + len64(part);
        nonzero_parts(self.bytes, clamp_len(unit.max(1), CHUNK))
            .into_iter()
            .map(|part| at(part.start)..at(part.end))
            .collect()
    }

    /// The bytes of `part`, which lies inside the chunk.
    pub fn bytes(&self, part: &Range<u64>) -> &[u8] {
        let start = clamp_len(part.start - self.host.start, self.bytes.len());
        let end = clamp_len(part.end - self.host.start, self.bytes.len());
        &self.bytes[start..end]
    }
}

#[cfg(test)]
mod tests;

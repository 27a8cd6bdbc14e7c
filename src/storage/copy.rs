//! Bytes from one storage to another without passing through a buffer, where the host can.
//!
//! A worker holds one [`Reader`] and takes a [`Chunk`] at a time from it.  A chunk is mapped and
//! read ahead once; then it is scanned for zeroes and written straight from the mapping, and
//! unmapped when it is dropped, so that page tables stay small whatever the image's size.  Where
//! the source has no mapping the chunk lies in the reader's buffer.

#![allow(unsafe_code)]

use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::fs::copy_file_range;
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::storage::Storage;
use crate::storage::filesystem::FileSystem;
use crate::storage::mmap::{Lost, Window};
use crate::util::align::{clamp_len, len64};
use crate::util::buf::is_zero;
use crate::util::range::{self, push_merged};

/// Most bytes of a [`Chunk`].
pub const CHUNK: usize = 1 << 20;
/// Most bytes of a [`Span`] that are mapped in one piece: their page tables take 64 KiB.
pub const SPAN: usize = 32 << 20;

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
        reader
            .chunk(src, at..at + n)?
            .write(at..at + n, dst, to + done)?;
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
        for part in reader.chunk(src, at..end)?.nonzero(unit)? {
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

/// One worker's means of reading; holds at most one chunk of memory.
#[derive(Debug, Default)]
pub struct Reader {
    buf: Vec<u8>,
}

impl Reader {
    /// A reader; takes memory only when it reads without a mapping.
    pub fn new() -> Self {
        Self::default()
    }

    /// The bytes of `src` in `host`, at most [`CHUNK`] of them, ready to be looked at.
    ///
    /// # Errors
    /// The host's; `Invalid` for more than that.
    pub fn chunk<'a>(&'a mut self, src: &'a dyn Storage, host: Range<u64>) -> Result<Chunk<'a>> {
        if range::len(&host) > len64(CHUNK) {
            return Err(Error::invalid(format!(
                "a chunk of {} bytes (allowed: {CHUNK})",
                range::len(&host)
            )));
        }
        let window = src.window(host.clone()).map(Held::Own);
        Chunk::ready(src, host, window, &mut self.buf)
    }

    /// The bytes of `src` in `host`, to be looked at chunk by chunk: mapped in one piece where they
    /// are at most [`SPAN`], since unmapping stops all other threads of the process for a moment.
    pub fn span<'a>(&'a mut self, src: &'a dyn Storage, host: Range<u64>) -> Span<'a> {
        let one = range::len(&host) <= len64(SPAN);
        let window = one.then(|| src.window(host)).flatten();
        Span {
            src,
            window,
            reader: self,
        }
    }
}

/// A longer range of a storage object, whose chunks are looked at one after the other.
#[derive(Debug)]
pub struct Span<'a> {
    src: &'a dyn Storage,
    window: Option<Window>,
    reader: &'a mut Reader,
}

impl Span<'_> {
    /// The bytes in `host`, which lies inside the span and is at most [`CHUNK`] long.
    ///
    /// # Errors
    /// As [`Reader::chunk`].
    pub fn chunk(&mut self, host: Range<u64>) -> Result<Chunk<'_>> {
        match &self.window {
            Some(window) if range::len(&host) <= len64(CHUNK) => Chunk::ready(
                self.src,
                host,
                Some(Held::Lent(window)),
                &mut self.reader.buf,
            ),
            _ => self.reader.chunk(self.src, host),
        }
    }
}

/// A mapping: the chunk's own, or that of its span.
#[derive(Debug)]
enum Held<'a> {
    Own(Window),
    Lent(&'a Window),
}

impl std::ops::Deref for Held<'_> {
    type Target = Window;

    fn deref(&self) -> &Window {
        match self {
            Self::Own(window) => window,
            Self::Lent(window) => window,
        }
    }
}

/// Bytes of a storage object: mapped, or in a buffer.
#[derive(Debug)]
pub struct Chunk<'a> {
    src: &'a dyn Storage,
    host: Range<u64>,
    /// `None` once the bytes are in `buf`.
    window: Option<Held<'a>>,
    buf: &'a mut Vec<u8>,
}

impl<'a> Chunk<'a> {
    fn ready(
        src: &'a dyn Storage,
        host: Range<u64>,
        window: Option<Held<'a>>,
        buf: &'a mut Vec<u8>,
    ) -> Result<Self> {
        if let Some(window) = &window {
            window.populate(&host);
        }
        let mut chunk = Self {
            src,
            host,
            window,
            buf,
        };
        if chunk.window.is_none() {
            chunk.load()?;
        }
        Ok(chunk)
    }
}

impl Chunk<'_> {
    /// The parts of the chunk that hold a non-zero byte, as the function [`nonzero`] has them.
    ///
    /// # Errors
    /// The host's.
    pub fn nonzero(&mut self, unit: u64) -> Result<Vec<Range<u64>>> {
        let parts = self.scan(unit)?;
        match self.tail_cut() {
            true => self.load().and_then(|()| self.scan(unit)),
            false => Ok(parts),
        }
    }

    fn scan(&mut self, unit: u64) -> Result<Vec<Range<u64>>> {
        let mut parts = Vec::new();
        let mut at = self.host.start;
        while at < self.host.end {
            let end = at.saturating_add(unit.max(1)).min(self.host.end);
            if !self.is_zero(&(at..end))? {
                push_merged(&mut parts, at..end);
            }
            at = end;
        }
        Ok(parts)
    }

    fn is_zero(&mut self, part: &Range<u64>) -> Result<bool> {
        match self.window.as_ref().map(|w| w.is_zero(part)) {
            Some(Ok(zero)) => return Ok(zero),
            Some(Err(Lost)) => self.load()?,
            None => {}
        }
        Ok(is_zero(self.bytes(part)))
    }

    /// Copies the bytes of `part`, which lies inside the chunk, into `buf`, which is as long.
    ///
    /// # Errors
    /// The host's.
    pub fn read(&mut self, part: Range<u64>, buf: &mut [u8]) -> Result<()> {
        match self.window.as_ref().map(|w| w.read(buf, part.start)) {
            Some(Ok(())) if !self.tail_cut() => return Ok(()),
            Some(Ok(())) => self.load()?,
            Some(Err(Lost)) => self.load()?,
            None => {}
        }
        buf.copy_from_slice(self.bytes(&part));
        Ok(())
    }

    /// Writes the bytes of `part`, which lies inside the chunk, to `dst` at `to`.
    ///
    /// # Errors
    /// The host's; then any part of the target range may have been written.
    pub fn write(&mut self, part: Range<u64>, dst: &dyn Storage, to: u64) -> Result<()> {
        let mapped = self.window.as_ref();
        match mapped.map(|w| dst.write_mapped(w, part.clone(), to)) {
            Some(Err(e)) if e.errno() == libc::EFAULT => self.load()?,
            Some(Ok(())) if self.tail_cut() => self.load()?,
            Some(done) => return done,
            None => {}
        }
        dst.write_at(self.bytes(&part), to)
    }

    /// Whether the source was cut inside the last page of the chunk, which no signal tells: the
    /// rest of that page reads as zeroes in the mapping.
    fn tail_cut(&self) -> bool {
        let Some(fd) = self.src.fd().filter(|_| self.window.is_some()) else {
            return false;
        };
        let len = rustix::fs::fstat(fd)
            .ok()
            .and_then(|s| u64::try_from(s.st_size).ok());
        len.is_none_or(|len| len < self.host.end)
    }

    /// Reads the chunk into the buffer; where the mapping lost its bytes this tells why.
    fn load(&mut self) -> Result<()> {
        self.window = None;
        self.buf.resize(clamp_len(range::len(&self.host), CHUNK), 0);
        self.src.read_at(self.buf, self.host.start)
    }

    fn bytes(&self, part: &Range<u64>) -> &[u8] {
        let start = clamp_len(part.start - self.host.start, self.buf.len());
        let end = clamp_len(part.end - self.host.start, self.buf.len());
        &self.buf[start..end]
    }
}

#[cfg(test)]
mod tests;

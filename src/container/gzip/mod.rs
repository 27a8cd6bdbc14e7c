//! gzip (RFC 1952): a file that is compressed as a whole, read at any offset.
//!
//! Deflate is read from its start.  So it is decoded once when it is opened, which also tells its
//! length and checks its sums, and places are remembered from which decoding can go on: the state of
//! the decoder and the 32 KiB before it.  There are a bounded number of them, farther apart in a
//! longer file.  Nothing is unpacked anywhere.

use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::error::{Error, ErrorKind, Result};
use crate::storage::syncs::Syncs;
use crate::storage::{HostId, HostRun, Limits, Storage, Zeroing};
use crate::util::align::{clamp_len, len64};
use crate::util::progress::Watcher;

mod cursor;
mod header;

use cursor::{Cursor, Point};

/// Most places that are remembered; each takes some 44 KiB.
const MAX_POINTS: usize = 512;
/// How far apart they are at first, in decoded bytes.
const FIRST_SPACING: u64 = 1 << 20;
/// Decoded bytes that are kept together.
const CHUNK: usize = 256 << 10;
const CHUNK64: u64 = CHUNK as u64;
/// Such pieces kept at a time.
const MAX_CHUNKS: usize = 64;

/// What a gzip file holds, read-only.
#[derive(Debug)]
pub struct Gunzipped {
    inner: Arc<dyn Storage>,
    size: u64,
    points: Vec<Point>,
    engine: Mutex<Engine>,
}

/// What decodes, one thread at a time.
#[derive(Debug)]
struct Engine {
    cursor: Cursor,
    /// Pieces by their numbers, the oldest first.
    chunks: VecDeque<(u64, Arc<[u8]>)>,
}

impl Gunzipped {
    /// Decodes all of `inner` once, which may give `most` bytes.  `watcher` is told how many bytes of
    /// `inner` were decoded.
    ///
    /// # Errors
    /// `WrongFormat` where it is not gzip; `Corrupt` where it is damaged or cut; `OutOfRange` where it
    /// gives more; `Cancelled` where the watcher is to stop; the host's.
    pub fn open(inner: Arc<dyn Storage>, most: u64, watcher: &Watcher) -> Result<Self> {
        Self::spaced(inner, most, FIRST_SPACING, watcher)
    }

    /// As [`Gunzipped::open`], with places `spacing` bytes apart at first.
    fn spaced(
        inner: Arc<dyn Storage>,
        most: u64,
        mut spacing: u64,
        watcher: &Watcher,
    ) -> Result<Self> {
        let mut cursor = Cursor::new(Arc::clone(&inner), true);
        let mut points: Vec<Point> = Vec::new();
        let mut buf = vec![0; CHUNK];
        loop {
            watcher.check()?;
            let before = cursor.offset();
            let len = cursor.read(&mut buf)?;
            watcher.advance(cursor.offset() - before);
            if len == 0 {
                break;
            }
            if cursor.at() > most {
                let text = format!("decompresses to more than {most} bytes, which are allowed");
                return Err(Error::new(ErrorKind::OutOfRange, text).at_opt(inner.path()));
            }
            let last = points.last().map_or(0, |point| point.at());
            if cursor.at() - last >= spacing {
                points.extend(cursor.point());
            }
            if points.len() > MAX_POINTS {
                spacing *= 2;
                let mut keep = false;
                points.retain(|_| {
                    keep = !keep;
                    !keep
                });
            }
        }
        Ok(Self {
            size: cursor.at(),
            points,
            engine: Mutex::new(Engine {
                cursor: Cursor::new(Arc::clone(&inner), false),
                chunks: VecDeque::with_capacity(MAX_CHUNKS),
            }),
            inner,
        })
    }

    /// The piece with this number, which is inside.
    fn chunk(&self, number: u64) -> Result<Arc<[u8]>> {
        let mut engine = self.engine.lock();
        if let Some((_, chunk)) = engine.chunks.iter().find(|(n, _)| *n == number) {
            return Ok(Arc::clone(chunk));
        }
        let start = number * CHUNK64;
        let after = self.points.partition_point(|point| point.at() <= start);
        let point = after.checked_sub(1).map(|index| &self.points[index]);
        let nearest = point.map_or(0, Point::at);
        let now = engine.cursor.at();
        if now > start || now < nearest {
            engine.cursor = match point {
                Some(point) => Cursor::resume(Arc::clone(&self.inner), point),
                None => Cursor::new(Arc::clone(&self.inner), false),
            };
        }
        loop {
            let (at, chunk) = engine.next(self.size)?;
            if at == start {
                return Ok(chunk);
            }
        }
    }

    fn inside(&self, host: u64) -> u64 {
        self.size.saturating_sub(host)
    }

    fn refuse(&self) -> Error {
        Error::read_only().at_opt(self.inner.path())
    }
}

impl Engine {
    /// Decodes up to the end of the piece that the cursor is in; a piece that was decoded from its
    /// start is kept.  Where that was, and what it is.
    fn next(&mut self, size: u64) -> Result<(u64, Arc<[u8]>)> {
        let at = self.cursor.at();
        let end = (at / CHUNK64 + 1).saturating_mul(CHUNK64).min(size);
        let mut bytes = vec![0; clamp_len(end.saturating_sub(at), CHUNK)];
        let mut done = 0;
        while done < bytes.len() {
            match self.cursor.read(&mut bytes[done..])? {
                0 => return Err(self.cursor.damaged("has changed since it was opened")),
                more => done += more,
            }
        }
        if bytes.is_empty() {
            return Err(self.cursor.damaged("has changed since it was opened"));
        }
        let chunk: Arc<[u8]> = bytes.into();
        if at.is_multiple_of(CHUNK64) {
            if self.chunks.len() == MAX_CHUNKS {
                self.chunks.pop_front();
            }
            self.chunks.push_back((at / CHUNK64, Arc::clone(&chunk)));
        }
        Ok((at, chunk))
    }
}

impl Storage for Gunzipped {
    fn size(&self) -> u64 {
        self.size
    }

    fn has_fixed_len(&self) -> bool {
        true
    }

    fn limits(&self) -> Limits {
        Limits {
            align: 1,
            buf_align: 1,
            zero_align: 0,
            discard_align: 0,
        }
    }

    fn path(&self) -> Option<&Path> {
        self.inner.path()
    }

    /// That of the object that it is compressed in.
    fn host_id(&self) -> Option<HostId> {
        self.inner.host_id()
    }

    /// None: the bytes there are others.
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn fd_for(&self, _host: &Range<u64>, _unit: u64) -> Option<BorrowedFd<'_>> {
        None
    }

    fn read_at(&self, buf: &mut [u8], host: u64) -> Result<()> {
        let inside = clamp_len(self.inside(host), buf.len());
        let (mut rest, past) = buf.split_at_mut(inside);
        past.fill(0);
        let mut at = host;
        while !rest.is_empty() {
            let chunk = self.chunk(at / CHUNK64)?;
            let within = clamp_len(at % CHUNK64, CHUNK);
            let len = rest.len().min(chunk.len() - within);
            let (piece, others) = rest.split_at_mut(len);
            piece.copy_from_slice(&chunk[within..within + len]);
            rest = others;
            at += len64(len);
        }
        Ok(())
    }

    fn write_at(&self, _buf: &[u8], _host: u64) -> Result<()> {
        Err(self.refuse())
    }

    fn zero(&self, _host: Range<u64>, _how: Zeroing) -> Result<()> {
        Err(self.refuse())
    }

    fn discard(&self, _host: Range<u64>) -> Result<()> {
        Err(self.refuse())
    }

    fn run(&self, host: u64, len: u64) -> Result<HostRun> {
        Ok(match self.inside(host) {
            0 => HostRun { data: false, len },
            inside => HostRun {
                data: true,
                len: len.min(inside),
            },
        })
    }

    fn set_len(&self, _len: u64) -> Result<()> {
        Err(self.refuse())
    }

    fn sync_now(&self) -> Result<()> {
        self.inner.sync_now()
    }

    fn syncs(&self) -> &Syncs {
        self.inner.syncs()
    }

    fn reserve(&self, _host: Range<u64>) -> Result<()> {
        Err(self.refuse())
    }
}

#[cfg(test)]
mod tests;

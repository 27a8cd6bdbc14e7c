//! An NBD export as storage.
//!
//! Any number of threads have requests under way, over one connection or, where the server allows
//! it, several.  A connection that is lost is made again, and what was under way is asked again:
//! all requests may be repeated.  What a server had acknowledged and not flushed by then may be
//! lost, so all syncs fail from then on.  A server without flushes is sent writes that are durable
//! when they are answered (FUA); where it has neither, it is not opened for writing unless nobody
//! relies on flushes.  The server is not trusted: what it says is checked, nothing it
//! says makes us allocate without bound, and it has to answer within a time.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;

use crate::error::{Error, ErrorKind, Result};
use crate::nbd::Uri;
use crate::nbd::wire::{BASE_ALLOCATION, MAX_PAYLOAD, can};
use crate::storage::open::{Access, Flushing};
use crate::storage::syncs::Syncs;
use crate::storage::{HostId, HostRun, Limits, Storage, Zeroing};
use crate::util::align::{clamp_len, down, is_aligned, len64, up};

mod connection;
mod dirty;
mod extents;
mod losses;
mod negotiate;
mod pool;
mod reply;

use connection::Op;
pub use dirty::dirty_bitmap;
use extents::Extents;
use pool::Pool;

/// Most bytes of one request to zero or discard, so that even a server that writes zeroes answers
/// in time.
const MAX_RANGE: u64 = 128 << 20;

/// How a client goes about its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Whether changes are wanted.
    pub access: Access,
    /// Whether changes may go to a server that cannot say when they are durable.
    pub flushing: Flushing,
    /// How long the server may take to answer one request, or to agree on a connection.
    pub timeout: Duration,
    /// How long a lost connection is tried to be made again.
    pub retry: Duration,
    /// Most connections, where the server allows several; at least 1.
    pub connections: usize,
}

impl Options {
    /// For an access, everything else as it comes.
    pub fn new(access: Access) -> Self {
        Self {
            access,
            flushing: Flushing::Needed,
            timeout: Duration::from_secs(60),
            retry: Duration::from_secs(30),
            connections: 4,
        }
    }
}

/// An export of an NBD server.
#[derive(Debug)]
pub struct NbdStorage {
    name: PathBuf,
    pool: Pool,
    extents: Extents,
    /// Whole blocks are written under a shared lock, parts of blocks under an exclusive one.
    edges: RwLock<()>,
    syncs: Syncs,
}

/// Opens the export that a URI names.
///
/// # Errors
/// `Invalid` and `Unsupported` for URIs that are wrong; `NotFound` for exports that are not there;
/// `ReadOnly`; `Unsupported` for changes that no flush could make durable; the host's; `Corrupt` for a server that violates the protocol.
pub fn open(uri: &str, options: &Options) -> Result<Arc<dyn Storage>> {
    Ok(Arc::new(NbdStorage::connect(uri, options)?))
}

impl NbdStorage {
    /// As [`open`].
    ///
    /// # Errors
    /// As [`open`].
    pub fn connect(uri: &str, options: &Options) -> Result<Self> {
        let parsed = Uri::parse(uri)?;
        let context = BASE_ALLOCATION.to_owned();
        let pool = Pool::connect(parsed, context, *options).map_err(|e| e.at(uri))?;
        let storage = Self {
            name: uri.into(),
            pool,
            extents: Extents::default(),
            edges: RwLock::new(()),
            syncs: Syncs::default(),
        };
        if options.access == Access::Write {
            storage.check_writable(options.flushing)?;
        }
        Ok(storage)
    }

    fn check_writable(&self, flushing: Flushing) -> Result<()> {
        let error = if self.can(can::READ_ONLY) {
            Error::new(ErrorKind::ReadOnly, "the server exports it read-only")
        } else if flushing == Flushing::Needed && !self.can(can::FLUSH) && !self.can(can::FUA) {
            Error::unsupported(
                "the server has neither flushes nor durable writes (FUA), so nothing tells what \
                 is on stable media (allowed for writing: cache mode unsafe)",
            )
        } else {
            return Ok(());
        };
        Err(error.at(&self.name))
    }

    fn can(&self, flag: u16) -> bool {
        self.pool.facts().flags & flag != 0
    }

    fn block(&self) -> u64 {
        self.pool.facts().min.into()
    }

    /// Most bytes of one read or write.
    fn step(&self) -> usize {
        let max = self.pool.facts().max.min(MAX_PAYLOAD);
        clamp_len(down(max.into(), self.block()), usize::MAX)
    }

    fn call(&self, mut op: Op<'_>) -> Result<()> {
        self.pool.call(&mut op).map_err(|e| e.at(&self.name))
    }

    /// Whole blocks that hold a range of bytes inside the export.
    fn around(&self, range: Range<u64>) -> Range<u64> {
        let end = up(range.end, self.block()).unwrap_or(u64::MAX);
        down(range.start, self.block())..end.min(self.size())
    }

    fn is_whole(&self, range: &Range<u64>) -> bool {
        let end = is_aligned(range.end, self.block()) || range.end == self.size();
        is_aligned(range.start, self.block()) && end
    }

    /// Reads whole blocks.
    fn read_blocks(&self, buf: &mut [u8], host: u64) -> Result<()> {
        let mut at = host;
        for buf in buf.chunks_mut(self.step()) {
            let len = len64(buf.len());
            self.call(Op::Read { at, buf })?;
            at += len;
        }
        Ok(())
    }

    /// Writes whole blocks.
    fn write_blocks(&self, buf: &[u8], host: u64) -> Result<()> {
        let mut at = host;
        for buf in buf.chunks(self.step()) {
            self.call(Op::Write { at, buf })?;
            at += len64(buf.len());
        }
        Ok(())
    }

    /// Writes parts of blocks: what they hold besides is read first.
    fn write_parts(&self, buf: &[u8], host: u64) -> Result<()> {
        let range = host..host + len64(buf.len());
        let whole = self.around(range.clone());
        let _alone = self.edges.write();
        let mut blocks = vec![0; clamp_len(whole.end - whole.start, usize::MAX)];
        self.read_blocks(&mut blocks, whole.start)?;
        let first = clamp_len(host - whole.start, blocks.len());
        blocks[first..first + buf.len()].copy_from_slice(buf);
        self.write_blocks(&blocks, whole.start)
    }

    fn write_inside(&self, buf: &[u8], host: u64) -> Result<()> {
        let range = host..host + len64(buf.len());
        if self.is_whole(&range) {
            let _beside = (self.block() > 1).then(|| self.edges.read());
            return self.write_blocks(buf, host);
        }
        // At most one part at each end; short requests are one part.
        let body = up(host, self.block()).unwrap_or(u64::MAX)..down(range.end, self.block());
        if body.start >= body.end {
            return self.write_parts(buf, host);
        }
        let (head, rest) = buf.split_at(clamp_len(body.start - host, buf.len()));
        let (middle, tail) = rest.split_at(clamp_len(body.end - body.start, rest.len()));
        if !head.is_empty() {
            self.write_parts(head, host)?;
        }
        self.write_inside(middle, body.start)?;
        match tail.is_empty() {
            true => Ok(()),
            false => self.write_parts(tail, body.end),
        }
    }

    /// Calls `each` for whole blocks of a range, which lies inside the export.
    fn in_ranges(&self, range: Range<u64>, each: impl Fn(Range<u64>) -> Result<()>) -> Result<()> {
        if !self.is_whole(&range) {
            return Err(Error::unsupported(format!(
                "{:#x}..{:#x} is not made of whole blocks of {} bytes",
                range.start,
                range.end,
                self.block()
            ))
            .at(&self.name));
        }
        self.check_end(&range)?;
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min(at + MAX_RANGE);
            each(at..end)?;
            at = end;
        }
        Ok(())
    }

    fn check_end(&self, range: &Range<u64>) -> Result<()> {
        match range.end <= self.size() {
            true => Ok(()),
            false => Err(Error::new(
                ErrorKind::NoSpace,
                format!(
                    "{:#x} is past the end of the export at {:#x}, which does not grow",
                    range.end,
                    self.size()
                ),
            )
            .at(&self.name)),
        }
    }

    fn refuse(&self, what: &str) -> Error {
        Error::unsupported(format!("the server cannot {what}")).at(&self.name)
    }
}

impl Storage for NbdStorage {
    fn size(&self) -> u64 {
        self.pool.facts().size
    }

    fn has_fixed_len(&self) -> bool {
        true
    }

    fn limits(&self) -> Limits {
        let facts = self.pool.facts();
        let offered = |flag| match facts.flags & flag {
            0 => 0,
            _ => facts.min,
        };
        Limits {
            align: facts.min,
            buf_align: 1,
            zero_align: offered(can::WRITE_ZEROES),
            discard_align: offered(can::TRIM),
        }
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.name)
    }

    fn host_id(&self) -> Option<HostId> {
        None
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn read_at(&self, buf: &mut [u8], host: u64) -> Result<()> {
        let inside = clamp_len(self.size().saturating_sub(host), buf.len());
        let (buf, past) = buf.split_at_mut(inside);
        past.fill(0);
        if buf.is_empty() {
            return Ok(());
        }
        let range = host..host + len64(buf.len());
        if self.is_whole(&range) {
            return self.read_blocks(buf, host);
        }
        let step = clamp_len(down(1 << 20, self.block()).max(self.block()), usize::MAX);
        let whole = self.around(range.clone());
        let mut bounce = vec![0; clamp_len(whole.end - whole.start, step)];
        let mut at = whole.start;
        while at < range.end {
            let piece = &mut bounce[..clamp_len(whole.end - at, step)];
            self.read_blocks(piece, at)?;
            let end = at + len64(piece.len());
            let part = at.max(range.start)..end.min(range.end);
            let to = clamp_len(part.start - range.start, buf.len());
            let from = clamp_len(part.start - at, piece.len());
            let len = clamp_len(part.end - part.start, piece.len());
            buf[to..to + len].copy_from_slice(&piece[from..from + len]);
            at = end;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], host: u64) -> Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        let end = host.saturating_add(len64(buf.len()));
        self.check_end(&(host..end))?;
        let change = self.extents.change();
        let done = self.write_inside(buf, host);
        drop(change);
        done
    }

    fn zero(&self, host: Range<u64>, how: Zeroing) -> Result<()> {
        if !self.can(can::WRITE_ZEROES) {
            return Err(self.refuse("write zeroes by itself"));
        }
        let _change = self.extents.change();
        let _beside = (self.block() > 1).then(|| self.edges.read());
        self.in_ranges(host, |range| self.call(Op::Zero { range, how }))
    }

    fn discard(&self, host: Range<u64>) -> Result<()> {
        if !self.can(can::TRIM) {
            return Err(self.refuse("discard"));
        }
        let _change = self.extents.change();
        let _beside = (self.block() > 1).then(|| self.edges.read());
        self.in_ranges(host, |range| self.call(Op::Trim { range }))
    }

    fn run(&self, host: u64, len: u64) -> Result<HostRun> {
        let inside = self.size().saturating_sub(host).min(len);
        if inside == 0 {
            return Ok(HostRun { data: false, len });
        }
        if !self.pool.facts().tells_extents() {
            return Ok(HostRun {
                data: true,
                len: inside,
            });
        }
        self.extents.run(host, inside, |at, found| {
            let start = down(at, self.block());
            let len = self.pool.facts().longest_status(self.size() - start);
            self.call(Op::Status {
                at: start,
                len,
                found,
            })?;
            Ok(start)
        })
    }

    fn set_len(&self, len: u64) -> Result<()> {
        match len == self.size() {
            true => Ok(()),
            false => Err(self.refuse(&format!(
                "set the length to {len}: an export has a fixed one, {}",
                self.size()
            ))),
        }
    }

    fn syncs(&self) -> &Syncs {
        &self.syncs
    }

    fn sync_now(&self) -> Result<()> {
        match self.can(can::FLUSH) {
            true => self.pool.flush().map_err(|e| e.at(&self.name)),
            // All that was answered is durable, or nobody needs it to be.
            false => Ok(()),
        }
    }

    fn reserve(&self, _host: Range<u64>) -> Result<()> {
        Err(self.refuse("reserve space"))
    }
}

//! Direct I/O: any offset and length in front of a file that takes only aligned ones.
//!
//! What is not aligned goes through aligned buffers; the blocks at the edges of a write are read,
//! changed and written back while every other writer of them waits.  A block that reaches past the
//! end of the object is not written whole, which would make the file longer than it is to be, but
//! through the page cache.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::Path;

use parking_lot::{Condvar, Mutex};
use rustix::fs::{AtFlags, OFlags, StatxFlags, fcntl_getfl, fcntl_setfl, statx};

use crate::error::{Error, Result};
use crate::storage::syncs::Syncs;
use crate::storage::{HostId, HostRun, Limits, Storage, Zeroing};
use crate::util::align::{clamp_len, down, is_aligned, len64, up};
use crate::util::buf::AlignedBuf;
use crate::util::range;

/// Alignment where the host does not tell: what every disk takes.
const DEFAULT_ALIGN: u32 = 4096;
/// Most alignment that is believed, and the unit of the range lock: no page is larger, so a write
/// through the page cache never meets a direct one in the same page.
const LOCK_UNIT: u64 = 64 << 10;
/// Most bytes bounced at a time.
const BOUNCE: u64 = 1 << 20;

/// Storage whose descriptor has `O_DIRECT` set, made to take any request.
#[derive(Debug)]
pub struct AlignedStorage<S> {
    inner: S,
    align: u32,
    buf_align: u32,
    /// Taken by every writer for the time of its write; `uncached` is taken inside it.
    writers: RangeLock,
    /// Held while `O_DIRECT` is off.
    uncached: Mutex<()>,
}

impl<S: Storage> AlignedStorage<S> {
    /// Wraps storage that has a descriptor, with `O_DIRECT` set.
    ///
    /// # Errors
    /// `Unsupported` where the host says that direct I/O is not possible here.
    pub fn new(inner: S) -> Result<Self> {
        let told = inner.fd().and_then(|fd| {
            let found = statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
            let told = found.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
            told.then_some((found.stx_dio_offset_align, found.stx_dio_mem_align))
        });
        let (align, buf_align) = told.unwrap_or((DEFAULT_ALIGN, DEFAULT_ALIGN));
        let usable = |a: u32| a.is_power_of_two() && u64::from(a) <= LOCK_UNIT;
        if !usable(align) || !usable(buf_align) {
            return Err(
                Error::unsupported("the file system has no direct I/O for this file")
                    .at_opt(inner.path()),
            );
        }
        Ok(Self {
            inner,
            align,
            buf_align,
            writers: RangeLock::default(),
            uncached: Mutex::new(()),
        })
    }

    fn unit(&self) -> u64 {
        u64::from(self.align)
    }

    fn buffer(&self, len: u64) -> AlignedBuf {
        let align = clamp_len(u64::from(self.buf_align), usize::MAX);
        AlignedBuf::new(clamp_len(len, usize::MAX), align)
    }

    fn is_direct(&self, buf: &[u8], host: u64) -> bool {
        is_aligned(host, self.unit())
            && is_aligned(len64(buf.len()), self.unit())
            && is_aligned(len64(buf.as_ptr() as usize), u64::from(self.buf_align))
    }

    fn end(&self, host: u64, len: usize) -> Result<u64> {
        let end = host.checked_add(len64(len));
        end.filter(|e| i64::try_from(*e).is_ok()).ok_or_else(|| {
            Error::invalid(format!(
                "{len} bytes at {host:#x} reach past the longest file there can be"
            ))
            .at_opt(self.path())
        })
    }

    /// Writes whole blocks from any buffer.
    fn write_body(&self, buf: &[u8], host: u64) -> Result<()> {
        if buf.is_empty() || self.is_direct(buf, host) {
            return self.inner.write_at(buf, host);
        }
        let mut bounce = self.buffer(len64(buf.len()).min(BOUNCE));
        let mut at = host;
        for part in buf.chunks(bounce.len()) {
            bounce[..part.len()].copy_from_slice(part);
            self.inner.write_at(&bounce[..part.len()], at)?;
            at += len64(part.len());
        }
        Ok(())
    }

    /// Writes a part of one block.
    fn write_edge(&self, buf: &[u8], host: u64) -> Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        let start = down(host, self.unit());
        if start + self.unit() > self.inner.size() {
            return self.write_cached(buf, host);
        }
        let mut block = self.buffer(self.unit());
        self.inner.read_at(&mut block, start)?;
        let first = clamp_len(host - start, block.len());
        block[first..first + buf.len()].copy_from_slice(buf);
        self.inner.write_at(&block, start)
    }

    /// Writes through the page cache.  Aligned requests that others make meanwhile go the same
    /// way, which is as right, only slower.
    fn write_cached(&self, buf: &[u8], host: u64) -> Result<()> {
        let _alone = self.uncached.lock();
        self.set_direct(false)?;
        let written = self.inner.write_at(buf, host);
        self.set_direct(true)?;
        written
    }

    fn set_direct(&self, direct: bool) -> Result<()> {
        let Some(fd) = self.inner.fd() else {
            return Ok(());
        };
        let set = fcntl_getfl(fd).and_then(|mut flags| {
            flags.set(OFlags::DIRECT, direct);
            fcntl_setfl(fd, flags)
        });
        set.map_err(|e| Error::io("set the file's flags", e.into()).at_opt(self.path()))
    }
}

impl<S: Storage> Storage for AlignedStorage<S> {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn has_fixed_len(&self) -> bool {
        self.inner.has_fixed_len()
    }

    fn limits(&self) -> Limits {
        let inner = self.inner.limits();
        Limits {
            align: self.align.max(inner.align),
            buf_align: self.buf_align,
            ..inner
        }
    }

    fn path(&self) -> Option<&Path> {
        self.inner.path()
    }

    fn host_id(&self) -> Option<HostId> {
        self.inner.host_id()
    }

    /// None: it does not take reads and writes at every offset.
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn locked_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.locked_fd()
    }

    /// Nobody is kept from the range meanwhile, so it must hold whole blocks that no write of a
    /// part of them can be for, and lie apart from the end, where writes go by the page cache.
    fn fd_for(&self, host: &Range<u64>, unit: u64) -> Option<BorrowedFd<'_>> {
        let aligned = is_aligned(host.start, self.unit()) && is_aligned(host.end, self.unit());
        let apart = up(host.end, LOCK_UNIT).is_some_and(|end| end <= self.size());
        let takes = aligned && apart && self.unit() <= unit && u64::from(self.buf_align) <= 4096;
        self.inner.fd().filter(|_| takes)
    }

    fn read_at(&self, buf: &mut [u8], host: u64) -> Result<()> {
        let size = self.size();
        let inside = clamp_len(size.saturating_sub(host), buf.len());
        let (buf, past) = buf.split_at_mut(inside);
        past.fill(0);
        if buf.is_empty() || self.is_direct(buf, host) {
            return self.inner.read_at(buf, host);
        }
        let mut bounce = self.buffer((len64(buf.len()) + 2 * self.unit()).min(BOUNCE));
        let mut done = 0;
        while done < buf.len() {
            let at = host + len64(done);
            let start = down(at, self.unit());
            let skip = clamp_len(at - start, bounce.len());
            let n = (bounce.len() - skip).min(buf.len() - done);
            let blocks = up(len64(skip + n), self.unit()).unwrap_or(BOUNCE);
            let blocks = clamp_len(blocks, bounce.len());
            self.inner.read_at(&mut bounce[..blocks], start)?;
            buf[done..done + n].copy_from_slice(&bounce[skip..skip + n]);
            done += n;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], host: u64) -> Result<()> {
        let end = self.end(host, buf.len())?;
        let _held = self.writers.lock(&(host..end));
        let cut = range::cut(&(host..end), self.unit());
        let at = |offset: u64| clamp_len(offset - host, buf.len());
        self.write_edge(&buf[..at(cut.head.end)], cut.head.start)?;
        let body = &buf[at(cut.body.start)..at(cut.body.end)];
        self.write_body(body, cut.body.start)?;
        self.write_edge(&buf[at(cut.tail.start)..], cut.tail.start)
    }

    fn zero(&self, host: Range<u64>, how: Zeroing) -> Result<()> {
        let _held = self.writers.lock(&host);
        self.inner.zero(host, how)
    }

    fn discard(&self, host: Range<u64>) -> Result<()> {
        let _held = self.writers.lock(&host);
        self.inner.discard(host)
    }

    fn run(&self, host: u64, len: u64) -> Result<HostRun> {
        self.inner.run(host, len)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        let _held = self.writers.lock(&(0..u64::MAX));
        self.inner.set_len(len)
    }

    fn sync_now(&self) -> Result<()> {
        self.inner.sync_now()
    }

    fn syncs(&self) -> &Syncs {
        self.inner.syncs()
    }

    fn reserve(&self, host: Range<u64>) -> Result<()> {
        self.inner.reserve(host)
    }
}

/// Ranges that are being written.
#[derive(Debug, Default)]
struct RangeLock {
    held: Mutex<Vec<Range<u64>>>,
    freed: Condvar,
}

/// A range that nobody else writes for as long as this lives.
struct Held<'a> {
    lock: &'a RangeLock,
    range: Range<u64>,
}

impl RangeLock {
    /// Waits until nobody writes in the units that `range` touches, and takes them.
    fn lock(&self, range: &Range<u64>) -> Held<'_> {
        let end = up(range.end, LOCK_UNIT).unwrap_or(u64::MAX);
        let range = down(range.start, LOCK_UNIT)..end;
        let mut held = self.held.lock();
        while held.iter().any(|h| range::intersect(h, &range).is_some()) {
            self.freed.wait(&mut held);
        }
        held.push(range.clone());
        Held { lock: self, range }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut held = self.lock.held.lock();
        if let Some(i) = held.iter().position(|h| *h == self.range) {
            held.swap_remove(i);
        }
        self.lock.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::storage::open::{Access, Caching, Sharing, StorageOptions, adopt};

    /// A file opened for direct I/O beside the build, where there is a disk; `None` where there
    /// is no direct I/O.
    fn direct() -> Option<(tempfile::NamedTempFile, Arc<dyn Storage>)> {
        let named = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).ok()?;
        let options = StorageOptions {
            access: Access::Write,
            sharing: Sharing::Locked,
            caching: Caching::Direct,
            ..StorageOptions::default()
        };
        match adopt(named.reopen().ok()?, named.path(), &options) {
            Ok(storage) => Some((named, storage)),
            Err(e) => {
                crate::util::skipped::skipped(&e.to_string());
                None
            }
        }
    }

    #[test]
    fn others_may_move_whole_blocks_that_no_write_is_for_a_part_of_and_the_end_is_left_alone() {
        let Some((_named, storage)) = direct() else {
            return;
        };
        let unit = u64::from(storage.limits().align);
        storage
            .set_len(4 * LOCK_UNIT + unit)
            .expect("sets the length");
        let may = |host: Range<u64>, block: u64| storage.fd_for(&host, block).is_some();
        assert!(storage.fd().is_none());
        assert!(may(0..unit, unit) && may(unit..3 * LOCK_UNIT, 2 * unit));
        assert!(may(4 * LOCK_UNIT - unit..4 * LOCK_UNIT, unit));
        assert!(!may(4 * LOCK_UNIT..4 * LOCK_UNIT + unit, unit));
        assert!(!may(0..unit, unit / 2));
        assert!(!may(unit / 2..2 * unit, unit) && !may(0..unit / 2, unit));
        assert!(!may(0..u64::MAX, unit));
    }

    #[test]
    fn any_offset_and_length_reads_and_writes_as_in_memory() {
        let Some((named, storage)) = direct() else {
            return;
        };
        let mut model = Vec::new();
        let mut random = fastrand::Rng::with_seed(7);
        for round in 0..300u32 {
            let at = random.usize(0..200_000);
            let len = random.usize(1..20_000);
            let bytes = vec![random.u8(..); len];
            if round % 50 == 49 {
                model.resize(at, 0);
                storage.set_len(at as u64).expect("sets the length");
            }
            if model.len() < at + len {
                model.resize(at + len, 0);
            }
            model[at..at + len].copy_from_slice(&bytes);
            storage.write_at(&bytes, at as u64).expect("writes");
            assert_eq!(storage.size(), model.len() as u64, "round {round}");
            let from = random.usize(0..model.len());
            let mut back = vec![1; random.usize(0..30_000)];
            storage.read_at(&mut back, from as u64).expect("reads");
            let end = model.len().min(from + back.len());
            assert!(back[..end - from] == model[from..end], "round {round}");
            assert!(back[end - from..].iter().all(|b| *b == 0));
        }
        storage.sync().expect("syncs");
        assert!(std::fs::read(named.path()).expect("reads") == model);
    }

    #[test]
    fn threads_that_write_parts_of_one_block_lose_nothing() {
        let Some((_named, storage)) = direct() else {
            return;
        };
        storage.set_len(64 << 10).expect("sets the length");
        std::thread::scope(|scope| {
            for thread in 0..4u8 {
                let storage = &storage;
                scope.spawn(move || {
                    for i in (usize::from(thread)..4096).step_by(4) {
                        storage
                            .write_at(&[thread + 1; 16], i as u64 * 16)
                            .expect("writes");
                    }
                });
            }
        });
        let mut back = vec![0; 64 << 10];
        storage.read_at(&mut back, 0).expect("reads");
        for (i, byte) in back.iter().enumerate() {
            assert_eq!(usize::from(*byte), i / 16 % 4 + 1, "at {i}");
        }
    }
}

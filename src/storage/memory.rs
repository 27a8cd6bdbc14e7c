//! Storage in memory, with a recorder and a fault script for tests.
//!
//! The recorder keeps every change in order, so that a test can rebuild what a crash would have
//! left: any prefix of the changes, and, of those after the last sync, any subset.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;

use crate::error::{Error, ErrorKind, Result};
use crate::storage::syncs::Syncs;
use crate::storage::{HostId, HostRun, Limits, Storage, Zeroing};
use crate::util::align::{clamp_len, down, len64};
use crate::util::buf::is_zero;

const PAGE: usize = 4096;
const PAGE64: u64 = PAGE as u64;

/// One change, as the recorder keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Bytes were written at an offset.
    Write {
        /// Where.
        host: u64,
        /// What.
        bytes: Vec<u8>,
    },
    /// A range was made to read as zeroes.
    Zero(Range<u64>),
    /// The length was set.
    SetLen(u64),
    /// All changes before this one are on stable media.
    Sync,
}

/// An operation that can be made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// `read_at`.
    Read,
    /// `write_at`, `zero`, `discard`, `set_len` and `reserve`.
    Change,
    /// `sync`.
    Sync,
}

/// From the `after`-th call (counted from 0) of `op` on, `count` calls fail with `errno`.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    /// What fails.
    pub op: Op,
    /// How many calls succeed first.
    pub after: usize,
    /// How many fail then.
    pub count: usize,
    /// With which errno.
    pub errno: i32,
}

#[derive(Debug, Default)]
struct Inner {
    pages: BTreeMap<u64, Box<[u8; PAGE]>>,
    len: u64,
    changes: Option<Vec<Change>>,
    faults: Vec<Fault>,
    calls: [usize; 3],
}

/// A sparse object in memory.
#[derive(Debug, Default)]
pub struct MemoryStorage {
    inner: Mutex<Inner>,
    syncs: Syncs,
    path: Option<PathBuf>,
    fixed: bool,
}

impl MemoryStorage {
    /// An empty object.
    pub fn new() -> Self {
        Self::default()
    }

    /// An object that holds `bytes`.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let storage = Self::new();
        storage.inner.lock().write(bytes, 0);
        storage
    }

    /// The same object under a path that messages show.
    #[must_use]
    pub fn with_path(mut self, path: impl Into<PathBuf>) -> Self {
        self.path = Some(path.into());
        self
    }

    /// The same object with the length it has now for ever, as devices have it.
    #[must_use]
    pub fn with_fixed_len(mut self) -> Self {
        self.fixed = true;
        self
    }

    /// Refuses a change past the end, where that does not move.
    fn check_end(&self, inner: &Inner, end: u64) -> Result<()> {
        match self.fixed && end > inner.len {
            true => Err(Error::new(
                ErrorKind::NoSpace,
                format!(
                    "a change up to {end:#x} (the object ends at {:#x})",
                    inner.len
                ),
            )),
            false => Ok(()),
        }
    }

    /// All its bytes; for small objects.
    pub fn to_bytes(&self) -> Vec<u8> {
        let inner = self.inner.lock();
        let mut bytes = vec![0; clamp_len(inner.len, usize::MAX)];
        inner.read(&mut bytes, 0);
        bytes
    }

    /// Starts recording changes, from an empty list.
    pub fn record(&self) {
        self.inner.lock().changes = Some(Vec::new());
    }

    /// The changes since `record`.
    pub fn changes(&self) -> Vec<Change> {
        self.inner.lock().changes.clone().unwrap_or_default()
    }

    /// Adds a fault; the calls it counts begin now.
    pub fn inject(&self, fault: Fault) {
        let mut inner = self.inner.lock();
        let now = inner.calls[fault.op as usize];
        inner.faults.push(Fault {
            after: fault.after + now,
            ..fault
        });
    }

    /// Removes all faults.
    pub fn heal(&self) {
        self.inner.lock().faults.clear();
    }

    /// It is opened anew: no sync of it has failed.
    pub fn open_anew(&self) {
        self.syncs.open_anew();
    }

    /// Makes a recorded change, as a replay does.
    pub fn apply(&self, change: &Change) {
        let mut inner = self.inner.lock();
        match change {
            Change::Write { host, bytes } => inner.write(bytes, *host),
            Change::Zero(range) => inner.zero(range),
            Change::SetLen(len) => inner.set_len(*len),
            Change::Sync => {}
        }
    }
}

impl Inner {
    fn call(&mut self, op: Op, doing: &str) -> Result<()> {
        let call = self.calls[op as usize];
        self.calls[op as usize] += 1;
        let hit = |f: &&Fault| f.op == op && call >= f.after && call - f.after < f.count;
        match self.faults.iter().find(hit) {
            Some(fault) => Err(Error::io(
                doing,
                std::io::Error::from_raw_os_error(fault.errno),
            )),
            None => Ok(()),
        }
    }

    fn note(&mut self, change: impl FnOnce() -> Change) {
        if let Some(changes) = &mut self.changes {
            changes.push(change());
        }
    }

    fn read(&self, buf: &mut [u8], host: u64) {
        let inside = clamp_len(self.len.saturating_sub(host), buf.len());
        buf[inside..].fill(0);
        each_page(host, inside, |page, within, part| {
            match self.pages.get(&page) {
                Some(bytes) => {
                    buf[part.clone()].copy_from_slice(&bytes[within..within + part.len()]);
                }
                None => buf[part].fill(0),
            }
        });
    }

    fn write(&mut self, bytes: &[u8], host: u64) {
        each_page(host, bytes.len(), |page, within, part| {
            let to = self
                .pages
                .entry(page)
                .or_insert_with(|| Box::new([0; PAGE]));
            to[within..within + part.len()].copy_from_slice(&bytes[part]);
        });
        self.len = self.len.max(host + len64(bytes.len()));
    }

    fn zero(&mut self, range: &Range<u64>) {
        let pages: Vec<u64> = self
            .pages
            .range(range.start / PAGE64..range.end.div_ceil(PAGE64))
            .map(|(p, _)| *p)
            .collect();
        for page in pages {
            let start = range.start.max(page * PAGE64) - page * PAGE64;
            let end = range.end.min((page + 1) * PAGE64) - page * PAGE64;
            let (start, end) = (clamp_len(start, PAGE), clamp_len(end, PAGE));
            if let Some(bytes) = self.pages.get_mut(&page) {
                bytes[start..end].fill(0);
                if is_zero(&bytes[..]) {
                    self.pages.remove(&page);
                }
            }
        }
    }

    fn set_len(&mut self, len: u64) {
        if len < self.len {
            let end = self.len;
            self.zero(&(len..end));
        }
        self.len = len;
    }
}

/// Calls `f(page, offset within it, part of the buffer)` for each page of a range.
fn each_page(host: u64, len: usize, mut f: impl FnMut(u64, usize, Range<usize>)) {
    let mut done = 0;
    while done < len {
        let at = host + len64(done);
        let within = clamp_len(at - down(at, PAGE64), PAGE);
        let part = (PAGE - within).min(len - done);
        f(at / PAGE64, within, done..done + part);
        done += part;
    }
}

impl Storage for MemoryStorage {
    fn size(&self) -> u64 {
        self.inner.lock().len
    }

    fn has_fixed_len(&self) -> bool {
        self.fixed
    }

    fn limits(&self) -> Limits {
        Limits {
            align: 1,
            buf_align: 1,
            zero_align: 1,
            discard_align: 1,
        }
    }

    fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    fn host_id(&self) -> Option<HostId> {
        None
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn read_at(&self, buf: &mut [u8], host: u64) -> Result<()> {
        let mut inner = self.inner.lock();
        inner.call(Op::Read, &format!("read at {host:#x}"))?;
        inner.read(buf, host);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], host: u64) -> Result<()> {
        let mut inner = self.inner.lock();
        inner.call(Op::Change, &format!("write at {host:#x}"))?;
        let Some(end) = host.checked_add(len64(buf.len())) else {
            return Err(Error::invalid(format!(
                "offset {host:#x} is past the end of numbers"
            )));
        };
        self.check_end(&inner, end)?;
        inner.note(|| Change::Write {
            host,
            bytes: buf.to_vec(),
        });
        inner.write(buf, host);
        Ok(())
    }

    fn zero(&self, host: Range<u64>, _how: Zeroing) -> Result<()> {
        let mut inner = self.inner.lock();
        inner.call(Op::Change, &format!("zero at {:#x}", host.start))?;
        self.check_end(&inner, host.end)?;
        inner.note(|| Change::Zero(host.clone()));
        inner.zero(&host);
        Ok(())
    }

    fn discard(&self, host: Range<u64>) -> Result<()> {
        self.zero(host, Zeroing::MayUnmap)
    }

    fn run(&self, host: u64, len: u64) -> Result<HostRun> {
        let inner = self.inner.lock();
        let end = host.saturating_add(len);
        if self.fixed && host < inner.len {
            let len = end.min(inner.len) - host;
            return Ok(HostRun { data: true, len });
        }
        let data = inner.pages.contains_key(&(host / PAGE64));
        let mut page = host / PAGE64;
        while page * PAGE64 < end && inner.pages.contains_key(&page) == data {
            page = match data {
                true => page + 1,
                false => inner
                    .pages
                    .range(page..)
                    .next()
                    .map_or(end.div_ceil(PAGE64), |(p, _)| *p),
            };
        }
        Ok(HostRun {
            data,
            len: (page * PAGE64).min(end) - host,
        })
    }

    fn set_len(&self, len: u64) -> Result<()> {
        let mut inner = self.inner.lock();
        inner.call(Op::Change, "set the length")?;
        if self.fixed && len != inner.len {
            return Err(Error::unsupported("is an object of fixed length"));
        }
        inner.note(|| Change::SetLen(len));
        inner.set_len(len);
        Ok(())
    }

    fn syncs(&self) -> &Syncs {
        &self.syncs
    }

    fn sync_now(&self) -> Result<()> {
        let mut inner = self.inner.lock();
        inner.call(Op::Sync, "sync")?;
        inner.note(|| Change::Sync);
        Ok(())
    }

    fn reserve(&self, host: Range<u64>) -> Result<()> {
        let mut inner = self.inner.lock();
        inner.call(Op::Change, "reserve")?;
        self.check_end(&inner, host.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_never_written_reads_as_zeroes_and_is_a_hole() {
        let storage = MemoryStorage::new();
        storage
            .write_at(b"abc", 3 * PAGE64 + 5)
            .expect("memory has room");
        let mut buf = [1; 8];
        storage.read_at(&mut buf, 3 * PAGE64 + 4).expect("reads");
        assert_eq!(&buf, b"\0abc\0\0\0\0");
        assert_eq!(
            storage.run(0, 1 << 20).expect("runs"),
            HostRun {
                data: false,
                len: 3 * PAGE64
            }
        );
        assert_eq!(
            storage.run(3 * PAGE64, 1 << 20).expect("runs"),
            HostRun {
                data: true,
                len: PAGE64
            }
        );
    }

    #[test]
    fn any_offset_may_be_read() {
        let storage = MemoryStorage::from_bytes(b"abc");
        for host in [2, 3, u64::MAX - 1, u64::MAX] {
            let mut buf = [9; 8];
            storage.read_at(&mut buf, host).expect("reads");
            assert_eq!(buf[0], if host == 2 { b'c' } else { 0 });
            assert_eq!(buf[1..], [0; 7]);
        }
    }

    #[test]
    fn a_replay_of_all_changes_gives_the_same_bytes() {
        let storage = MemoryStorage::new();
        storage.record();
        storage.write_at(&[7; 9000], 100).expect("writes");
        storage.zero(200..5000, Zeroing::MayUnmap).expect("zeroes");
        storage.set_len(8000).expect("shrinks");
        storage.sync().expect("syncs");
        let copy = MemoryStorage::new();
        storage.changes().iter().for_each(|c| copy.apply(c));
        assert_eq!(copy.to_bytes(), storage.to_bytes());
    }

    #[test]
    fn a_fault_hits_the_calls_it_names_and_no_others() {
        let storage = MemoryStorage::new();
        storage.inject(Fault {
            op: Op::Change,
            after: 1,
            count: 1,
            errno: libc::ENOSPC,
        });
        storage.write_at(b"a", 0).expect("the first call succeeds");
        assert_eq!(
            storage
                .write_at(b"b", 0)
                .expect_err("the second fails")
                .errno(),
            libc::ENOSPC
        );
        storage.write_at(b"c", 0).expect("the third succeeds");
    }
}

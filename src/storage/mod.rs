//! Host bytes: the only place that touches files.
//!
//! A [`Storage`] is a file, a block device or memory.  Offsets are absolute and methods take
//! `&self`, so any number of threads share one object.  Reads may be served from a mapping;
//! every change is a system call, so that order, full disks and the crash recorder see it.

use std::fmt;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::Path;

use crate::error::{Error, ErrorKind, Result};
use crate::storage::syncs::Syncs;
use crate::util::align::{clamp_len, len64};
use crate::util::buf::zeroes;

pub mod aligned;
pub mod append;
pub mod attributes;
pub mod copy;
pub mod device;
pub mod file;
pub mod filesystem;
pub mod highwater;
mod identity;
mod known;
pub mod lock;
pub mod memory;
mod mmap;
pub mod nbd;
pub mod open;
mod positioned;
pub mod syncs;
pub mod window;

pub use identity::HostId;

/// A run of host bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostRun {
    /// Data, as opposed to a hole, which reads as zeroes.
    pub data: bool,
    /// Bytes from the offset asked for; never 0.
    pub len: u64,
}

/// What a storage object or image asks of the requests made to it.
///
/// Every field is in bytes and a power of two unless it says otherwise.  Requests at any offset
/// and of any length are taken everywhere; these are the units that cost least.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Reads and writes that start and end at multiples of this need no read-modify-write.
    pub align: u32,
    /// Buffers whose address is a multiple of this need no bounce.
    pub buf_align: u32,
    /// Ranges given to `zero` start and end at multiples of this; 0: never cheaper than writing.
    pub zero_align: u32,
    /// Ranges given to `discard` start and end at multiples of this; 0: nothing to give back.
    pub discard_align: u32,
}

/// What `zero` may do with the space under the range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zeroing {
    /// Give the space back where that still reads as zeroes.
    MayUnmap,
    /// Keep the space, so that a later write cannot fail for want of it.
    KeepSpace,
}

/// A host object that holds bytes: a file, a block device, memory.
///
/// Methods take `&self` and an absolute host offset, so that any number of threads share one
/// object.  Overlapping writes from two threads leave either's bytes, never others.  Transfers
/// are whole: there are no short counts, and an interrupted call is made again inside.
pub trait Storage: fmt::Debug + Send + Sync {
    /// Length in bytes, as of the last change made through this object.
    fn size(&self) -> u64;
    /// Whether the length is what it is: a device, a server's export.  All of its space is there,
    /// and where nobody has written yet there may be anything.
    fn has_fixed_len(&self) -> bool;
    /// What requests to this object should keep to.
    fn limits(&self) -> Limits;
    /// The path it was opened from, for messages and for resolving relative names.
    fn path(&self) -> Option<&Path>;
    /// Which host object it is; `None`: the host does not know it, as memory and what a server has.
    fn host_id(&self) -> Option<HostId>;
    /// The host's descriptor, where there is one that takes reads and writes at byte offsets.
    fn fd(&self) -> Option<BorrowedFd<'_>>;
    /// As [`Storage::fd`], for a transfer of this range alone, inside the object, from or to memory
    /// at a multiple of 4096: also where not every transfer may go to the descriptor.  All writes
    /// by the disk's clients start and end at multiples of `unit` of the disk.
    fn fd_for(&self, host: &Range<u64>, unit: u64) -> Option<BorrowedFd<'_>> {
        let _ = (host, unit);
        self.fd()
    }
    /// The host's descriptor that has its locks, whatever may be done by it; not for transfers.
    fn locked_fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd()
    }
    /// Fills all of `buf` from `host`; bytes past the end read as zeroes.
    ///
    /// # Errors
    /// The host's, and the loss of bytes that were there when the object was opened.
    fn read_at(&self, buf: &mut [u8], host: u64) -> Result<()>;
    /// As [`Storage::read_at`], for few bytes far from others that are read: what is around them is
    /// not read ahead, and nothing stays mapped.
    ///
    /// # Errors
    /// Those of [`Storage::read_at`].
    fn read_alone(&self, buf: &mut [u8], host: u64) -> Result<()> {
        self.read_at(buf, host)
    }
    /// Writes all of `buf` at `host`, growing the object where it can grow.
    ///
    /// # Errors
    /// The host's; then any part of the range may have been written.
    fn write_at(&self, buf: &[u8], host: u64) -> Result<()>;
    /// Makes a range within the object read as zeroes.
    ///
    /// # Errors
    /// `Unsupported`, with nothing changed, where writing zeroes would be as fast.
    fn zero(&self, host: Range<u64>, how: Zeroing) -> Result<()>;
    /// Gives the range back; it reads as anything afterwards.
    ///
    /// # Errors
    /// `Unsupported` where the host cannot.
    fn discard(&self, host: Range<u64>) -> Result<()>;
    /// Whether `host` lies in data or in a hole, and how far that goes, at most `len`, which is
    /// not 0.  Past the end is a hole.  A host that cannot tell says data.
    ///
    /// # Errors
    /// The host's.
    fn run(&self, host: u64, len: u64) -> Result<HostRun>;
    /// Sets the length; new bytes read as zeroes.
    ///
    /// # Errors
    /// The host's, and `Unsupported` for objects of fixed length.
    fn set_len(&self, len: u64) -> Result<()>;
    /// Has the host put every completed write on stable media; called by [`Storage::sync`] alone.
    ///
    /// # Errors
    /// The host's.
    fn sync_now(&self) -> Result<()>;

    /// The syncs of the object, which all its users share.
    fn syncs(&self) -> &Syncs;

    /// Returns once every completed write is on stable media.
    ///
    /// # Errors
    /// The host's; what was written since the last successful call may be lost, and every later call
    /// fails, as `Io`, until the object is opened anew.
    fn sync(&self) -> Result<()> {
        self.syncs().wait(self.path(), || self.sync_now())
    }
    /// Begins to write the range to stable media, and does not wait for it: a sync that follows soon
    /// has less to do then.
    fn write_back(&self, host: Range<u64>) {
        let _ = host;
    }
    /// Gives the range space in as few pieces as the host can before it is written; what it
    /// reads as is unchanged, and so is the length.
    ///
    /// # Errors
    /// `Unsupported` where the host cannot; `NoSpace` where it has not enough.
    fn reserve(&self, host: Range<u64>) -> Result<()>;
}

/// Makes a range read as zeroes by whatever means: `Storage::zero`, else by writing zeroes.
///
/// # Errors
/// The host's; then any part of the range may have been zeroed.
pub fn zero_or_write(storage: &dyn Storage, host: Range<u64>, how: Zeroing) -> Result<()> {
    match storage.zero(host.clone(), how) {
        Err(e) if e.kind() == ErrorKind::Unsupported => {}
        done => return done,
    }
    write_zeroes(storage, host)
}

/// Writes zeroes to a range.
///
/// # Errors
/// The host's; then any part of the range may have been written.
pub fn write_zeroes(storage: &dyn Storage, host: Range<u64>) -> Result<()> {
    let mut at = host.start;
    while at < host.end {
        let len = clamp_len(host.end - at, zeroes().len());
        storage.write_at(&zeroes()[..len], at)?;
        at += len64(len);
    }
    Ok(())
}

/// Gives a range that reads as zeroes space, as far as the host can say that: by
/// [`Storage::reserve`], else by writing the zeroes.
///
/// # Errors
/// The host's; then any part of the range may have space.
pub fn give_space(storage: &dyn Storage, host: Range<u64>) -> Result<()> {
    match storage.reserve(host.clone()) {
        Err(e) if e.kind() == ErrorKind::Unsupported => write_zeroes(storage, host),
        done => done,
    }
}

/// As [`give_space`], and writes the zeroes, so that no later write has to make them.
///
/// # Errors
/// The host's; then any part of the range may have space.
pub fn fill_space(storage: &dyn Storage, host: Range<u64>) -> Result<()> {
    match storage.reserve(host.clone()) {
        Err(e) if e.kind() == ErrorKind::Unsupported => {}
        done => done?,
    }
    write_zeroes(storage, host)
}

/// Makes the object hold `len` zero bytes, whatever it held.  Of a block device, which has a length
/// of its own, only the first `len` bytes are zeroed.
///
/// # Errors
/// The host's; `NoSpace` for a device that is shorter.
pub fn start_over(storage: &dyn Storage, len: u64) -> Result<()> {
    match storage.set_len(0) {
        Err(e) if e.kind() == ErrorKind::Unsupported => {
            has_room(storage, len)?;
            zero_or_write(storage, 0..len, Zeroing::MayUnmap)
        }
        Err(e) => Err(e),
        Ok(()) => storage.set_len(len),
    }
}

/// Refuses a device that is shorter than `len` bytes.
///
/// # Errors
/// `NoSpace`.
pub fn has_room(storage: &dyn Storage, len: u64) -> Result<()> {
    match storage.size() {
        size if size < len => Err(Error::new(
            ErrorKind::NoSpace,
            format!("the device has {size} bytes, and {len} are needed"),
        )
        .at_opt(storage.path())),
        _ => Ok(()),
    }
}

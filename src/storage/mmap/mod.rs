//! Mapped reads.
//!
//! A file is mapped in windows.  Small reads copy from windows that stay, so that they cost no
//! system call; the copy engine takes windows of its own for as long as one chunk lasts, so that
//! page tables stay small whatever the image's size.  Nothing is ever written through a mapping.
//!
//! Bytes of a mapping may change or vanish at any time, so no reference to them exists: they are
//! copied, scanned by volatile loads, or handed to the kernel by address.  A window whose bytes
//! were lost says so afterwards, and the caller reads again by `pread`, which knows why.

#![allow(unsafe_code)]

mod sigbus;

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use memmap2::{MmapOptions, MmapRaw};

use crate::util::align::{clamp_len, down, len64};
use crate::util::range;
use sigbus::{Registration, Use};

/// Length of the windows that stay.
const WINDOW: u64 = 16 << 20;
/// How many of them one file has at most.
const SLOTS: usize = 256;
/// Windows start at a multiple of this: the largest page size there is.
const START_ALIGN: u64 = 64 << 10;

/// The bytes of a window are gone: the file was truncated, or its disk fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lost;

/// A part of a file, mapped for reading.
#[derive(Debug)]
pub struct Window {
    // Dropped first: the handler must not know a window that is no longer mapped.
    registration: Registration,
    map: MmapRaw,
    /// Offset of the window's first byte in the file.
    host: u64,
}

impl Window {
    /// Maps `host` of `file`; `None` where that cannot be, so the caller reads without.
    ///
    /// The range may reach past the end of the file; nobody may look there.
    pub(super) fn new(file: &File, host: &Range<u64>) -> Option<Self> {
        Self::of_use(file, host, Use::Passing)
    }

    fn of_use(file: &File, host: &Range<u64>, used: Use) -> Option<Self> {
        let start = down(host.start, START_ALIGN);
        let len = usize::try_from(host.end.checked_sub(start)?).ok()?;
        if len > sigbus::MAX_LEN {
            return None;
        }
        let map = MmapOptions::new()
            .offset(start)
            .len(len)
            .map_raw_read_only(file)
            .ok()?;
        let registration = Registration::new(map.as_ptr() as usize, map.len(), used)?;
        Some(Self {
            registration,
            map,
            host: start,
        })
    }

    /// The part of the file that it shows.
    pub fn host(&self) -> Range<u64> {
        self.host..self.host + len64(self.map.len())
    }

    /// Reads a range ahead, so that looking at it takes no page faults; only a hint.
    pub(super) fn populate(&self, host: &Range<u64>) {
        let Some(part) = self.part(host) else { return };
        let skip = part.start % clamp_len(START_ALIGN, usize::MAX);
        // SAFETY: the range lies in our mapping, which stays mapped during the call; the advice
        // changes nothing but page tables.  Its start is rounded down to a page inside the
        // mapping, which starts at a multiple of the page size.
        unsafe {
            libc::madvise(
                self.map.as_mut_ptr().add(part.start - skip).cast(),
                part.len() + skip,
                libc::MADV_POPULATE_READ,
            );
        }
    }

    /// Copies the bytes from `host` on into `buf`.
    ///
    /// # Errors
    /// `Lost` where they are not there; `buf` then holds anything.
    pub fn read(&self, buf: &mut [u8], host: u64) -> Result<(), Lost> {
        let end = host.checked_add(len64(buf.len())).ok_or(Lost)?;
        let part = self.part(&(host..end)).ok_or(Lost)?;
        // SAFETY: `part` lies inside our mapping and is as long as `buf`, which is no mapping of
        // ours.  The bytes may change under the copy, as with any shared memory: they are plain
        // bytes, any value is valid, and no reference to them exists.  Where they are gone the
        // signal handler supplies zeroes.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.map.as_ptr().add(part.start),
                buf.as_mut_ptr(),
                part.len(),
            );
        }
        self.check()
    }

    /// Whether all bytes of a range are zero.
    ///
    /// # Errors
    /// `Lost` where they are not there.
    pub fn is_zero(&self, host: &Range<u64>) -> Result<bool, Lost> {
        let part = self.part(host).ok_or(Lost)?;
        // SAFETY: `part` lies inside our mapping, which lives as long as `self`.
        let zero = unsafe { scan_zero(self.map.as_ptr().add(part.start), part.len()) };
        self.check()?;
        Ok(zero)
    }

    /// Writes a range of the window to `to` at `at`, straight from the mapping.
    ///
    /// # Errors
    /// The host's; `EFAULT` where the bytes are gone.
    pub(super) fn pwrite(&self, host: &Range<u64>, to: BorrowedFd<'_>, at: u64) -> io::Result<()> {
        let fault = || io::Error::from_raw_os_error(libc::EFAULT);
        let part = self.part(host).ok_or_else(fault)?;
        let too_far = || io::Error::from_raw_os_error(libc::EFBIG);
        let mut done = 0;
        while done < part.len() {
            let at = at.checked_add(len64(done)).ok_or_else(too_far)?;
            let at = libc::off64_t::try_from(at).map_err(|_| too_far())?;
            // SAFETY: the range lies inside our mapping; the kernel reads it, and answers EFAULT
            // where there is nothing to read.
            let written = unsafe {
                let from = self.map.as_ptr().add(part.start + done);
                libc::pwrite64(to.as_raw_fd(), from.cast(), part.len() - done, at)
            };
            match usize::try_from(written) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => done += n,
                Err(_) => match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => {}
                    e => return Err(e),
                },
            }
        }
        // A page that an earlier scan found missing is zeroes by now, which the kernel copies.
        self.check().map_err(|Lost| fault())
    }

    fn check(&self) -> Result<(), Lost> {
        if self.registration.lost() {
            return Err(Lost);
        }
        Ok(())
    }

    /// Offsets in the mapping of a range of the file.
    fn part(&self, host: &Range<u64>) -> Option<Range<usize>> {
        let start = usize::try_from(host.start.checked_sub(self.host)?).ok()?;
        let len = usize::try_from(range::len(host)).ok()?;
        let end = start.checked_add(len)?;
        (end <= self.map.len()).then_some(start..end)
    }
}

/// Whether `len` bytes at `at` are all zero.
///
/// # Safety
/// They must be mapped for reading; they may change meanwhile.
unsafe fn scan_zero(at: *const u8, len: usize) -> bool {
    const WORDS: usize = 16;
    let head = at.align_offset(size_of::<u64>()).min(len);
    let bytes = |from: usize, to: usize| {
        // SAFETY: `to` is at most `len` in both calls.
        (from..to).all(|i| unsafe { at.add(i).read_volatile() } == 0)
    };
    if !bytes(0, head) {
        return false;
    }
    let mut next = head;
    while len - next >= WORDS * size_of::<u64>() {
        // SAFETY: at least that many bytes are left, and `next` is a multiple of a word away.
        let words: *const u64 = unsafe { at.add(next) }.cast();
        let mut all = 0;
        for i in 0..WORDS {
            // SAFETY: as above.
            all |= unsafe { words.add(i).read_volatile() };
        }
        if all != 0 {
            return false;
        }
        next += WORDS * size_of::<u64>();
    }
    bytes(next, len)
}

/// The windows of one file that stay.
pub(super) struct Mapping {
    slots: Box<[ArcSwapOption<Window>]>,
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let held = self.slots.iter().filter(|s| s.load().is_some()).count();
        f.debug_struct("Mapping").field("windows", &held).finish()
    }
}

impl Mapping {
    /// No window yet.
    pub(super) fn new() -> Self {
        Self {
            slots: (0..SLOTS).map(|_| ArcSwapOption::empty()).collect(),
        }
    }

    /// Copies the bytes from `host` on into `buf`; the caller has checked that they lie inside
    /// the file.
    ///
    /// # Errors
    /// `Lost` where the caller has to read without the mapping, whatever the reason.
    pub(super) fn read(&self, file: &File, buf: &mut [u8], host: u64) -> Result<(), Lost> {
        let mut done = 0;
        while done < buf.len() {
            let at = host + len64(done);
            let left = WINDOW - at % WINDOW;
            let len = clamp_len(left, buf.len() - done);
            self.read_in_window(file, &mut buf[done..done + len], at)?;
            done += len;
        }
        Ok(())
    }

    fn read_in_window(&self, file: &File, buf: &mut [u8], host: u64) -> Result<(), Lost> {
        let index = host / WINDOW;
        let slot = &self.slots[clamp_len(index % len64(SLOTS), SLOTS - 1)];
        let held = slot.load();
        let start = index * WINDOW;
        match held.as_ref() {
            Some(window) if window.host == start => {
                let copied = window.read(buf, host);
                if copied.is_err() {
                    // Whoever comes next maps what is there then.
                    slot.compare_and_swap(&*held, None);
                }
                copied
            }
            // Another part of the file holds the slot: not thrown out, or two readers in turn
            // would map and unmap for ever.
            Some(_) => Err(Lost),
            None => {
                let end = start.checked_add(WINDOW).ok_or(Lost)?;
                let window =
                    Arc::new(Window::of_use(file, &(start..end), Use::Staying).ok_or(Lost)?);
                let copied = window.read(buf, host);
                if copied.is_ok() {
                    slot.compare_and_swap(&*held, Some(window));
                }
                copied
            }
        }
    }
}

#[cfg(test)]
mod tests;

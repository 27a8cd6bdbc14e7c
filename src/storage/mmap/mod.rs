//! Mapped reads.
//!
//! A file is mapped in windows that stay, so that small reads (table entries, the blocks of a file
//! system) cost no system call.  Long reads do not come here: see `storage/copy.rs`.  Nothing is
//! ever written through a mapping.
//!
//! Bytes of a mapping may change or vanish at any time, so no reference to them exists: they are
//! copied.  A window whose bytes were lost says so afterwards, and the caller reads again by
//! `pread`, which knows why.

#![allow(unsafe_code)]

mod sigbus;

use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};

use crate::util::align::{clamp_len, down, len64};
use crate::util::cached::CacheSlots;
use sigbus::Registration;

/// Length of the windows that stay.
const WINDOW: u64 = 16 << 20;
/// How many of them one file has at most.
const SLOTS: usize = 256;
/// Windows start at a multiple of this: the largest page size there is.
const START_ALIGN: u64 = 64 << 10;

/// The bytes of a window are gone: the file was truncated, or its disk fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lost;

/// A part of a file, mapped for reading.
#[derive(Debug)]
struct Window {
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
    fn new(file: &File, host: &Range<u64>) -> Option<Self> {
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
        let registration = Registration::new(map.as_ptr() as usize, map.len())?;
        Some(Self {
            registration,
            map,
            host: start,
        })
    }

    /// Copies the bytes from `host` on into `buf`.
    ///
    /// # Errors
    /// `Lost` where they are not there; `buf` then holds anything.
    fn read(&self, buf: &mut [u8], host: u64) -> Result<(), Lost> {
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

    fn check(&self) -> Result<(), Lost> {
        if self.registration.lost() {
            return Err(Lost);
        }
        Ok(())
    }

    /// Offsets in the mapping of a range of the file.
    fn part(&self, host: &Range<u64>) -> Option<Range<usize>> {
        let start = usize::try_from(host.start.checked_sub(self.host)?).ok()?;
        let len = usize::try_from(crate::util::range::len(host)).ok()?;
        let end = start.checked_add(len)?;
        (end <= self.map.len()).then_some(start..end)
    }
}

/// The windows of one file that stay.
pub(super) struct Mapping {
    slots: CacheSlots<Window>,
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let held = self.slots.made().filter(|s| s.load().is_some()).count();
        f.debug_struct("Mapping").field("windows", &held).finish()
    }
}

impl Mapping {
    /// No window yet.
    pub(super) fn new() -> Self {
        Self {
            slots: CacheSlots::new(SLOTS),
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
        let slot = self.slots.make(index);
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
                let window = Arc::new(Window::new(file, &(start..end)).ok_or(Lost)?);
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

//! A part of another object, read where it is: a member of an archive.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::storage::syncs::Syncs;
use crate::storage::{HostId, HostRun, Limits, Storage, Zeroing};
use crate::util::align::clamp_len;

/// A range of another object, read-only.
#[derive(Debug)]
pub struct Window {
    inner: Arc<dyn Storage>,
    range: Range<u64>,
    /// As messages show it.
    path: Option<PathBuf>,
}

impl Window {
    /// The bytes `range` of `inner`, which messages call `name` in it.
    ///
    /// # Errors
    /// `OutOfRange` where they are not all inside.
    pub fn new(inner: Arc<dyn Storage>, range: Range<u64>, name: &Path) -> Result<Self> {
        let size = inner.size();
        if range.start > range.end || range.end > size {
            let text = format!(
                "the part {:#x}..{:#x} is not inside the {size:#x} bytes that there are",
                range.start, range.end
            );
            return Err(Error::new(ErrorKind::OutOfRange, text).at_opt(inner.path()));
        }
        let path = inner.path().map(|path| path.join(name));
        Ok(Self { inner, range, path })
    }

    fn inside(&self, host: u64) -> u64 {
        self.size().saturating_sub(host)
    }
}

impl Storage for Window {
    fn size(&self) -> u64 {
        self.range.end - self.range.start
    }

    fn has_fixed_len(&self) -> bool {
        true
    }

    fn limits(&self) -> Limits {
        Limits {
            zero_align: 0,
            discard_align: 0,
            ..self.inner.limits()
        }
    }

    fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// That of the object that it is a part of.
    fn host_id(&self) -> Option<HostId> {
        self.inner.host_id()
    }

    /// None: offsets there are others.
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn fd_for(&self, _host: &Range<u64>, _unit: u64) -> Option<BorrowedFd<'_>> {
        None
    }

    fn read_at(&self, buf: &mut [u8], host: u64) -> Result<()> {
        let inside = clamp_len(self.inside(host), buf.len());
        buf[inside..].fill(0);
        match inside {
            0 => Ok(()),
            _ => self
                .inner
                .read_at(&mut buf[..inside], self.range.start + host),
        }
    }

    fn read_alone(&self, buf: &mut [u8], host: u64) -> Result<()> {
        let inside = clamp_len(self.inside(host), buf.len());
        buf[inside..].fill(0);
        match inside {
            0 => Ok(()),
            _ => self
                .inner
                .read_alone(&mut buf[..inside], self.range.start + host),
        }
    }

    fn write_at(&self, _buf: &[u8], _host: u64) -> Result<()> {
        Err(Error::read_only().at_opt(self.path()))
    }

    fn zero(&self, _host: Range<u64>, _how: Zeroing) -> Result<()> {
        Err(Error::read_only().at_opt(self.path()))
    }

    fn discard(&self, _host: Range<u64>) -> Result<()> {
        Err(Error::read_only().at_opt(self.path()))
    }

    fn run(&self, host: u64, len: u64) -> Result<HostRun> {
        match self.inside(host) {
            0 => Ok(HostRun { data: false, len }),
            inside => {
                let len = len.min(inside);
                let run = self.inner.run(self.range.start + host, len)?;
                let len = run.len.min(len);
                Ok(HostRun { len, ..run })
            }
        }
    }

    fn set_len(&self, _len: u64) -> Result<()> {
        Err(Error::read_only().at_opt(self.path()))
    }

    fn sync_now(&self) -> Result<()> {
        self.inner.sync_now()
    }

    fn syncs(&self) -> &Syncs {
        self.inner.syncs()
    }

    fn reserve(&self, _host: Range<u64>) -> Result<()> {
        Err(Error::read_only().at_opt(self.path()))
    }
}

/// All bytes of a small object.
///
/// # Errors
/// `OutOfRange` for one of more than `most` bytes, which is what `what` may have; the host's.
pub fn all_bytes(storage: &dyn Storage, most: u64, what: &str) -> Result<Vec<u8>> {
    let len = storage.size();
    if len > most {
        let text = format!("{what} has {len} bytes (allowed: {most})");
        return Err(Error::new(ErrorKind::OutOfRange, text).at_opt(storage.path()));
    }
    all_bytes_of(storage, &(0..len))
}

/// The bytes of a range, which the caller has bounded.
///
/// # Errors
/// The host's.
pub fn all_bytes_of(storage: &dyn Storage, range: &Range<u64>) -> Result<Vec<u8>> {
    let len = range.end.saturating_sub(range.start);
    let mut bytes = vec![0; clamp_len(len, usize::MAX)];
    storage.read_at(&mut bytes, range.start)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryStorage;

    #[test]
    fn a_window_shows_its_range_and_nothing_beside_it() {
        let bytes: Vec<u8> = (0..=255).collect();
        let inner = Arc::new(MemoryStorage::from_bytes(&bytes).with_path("a.ova"));
        let window = Window::new(inner.clone(), 10..20, Path::new("b.vmdk")).expect("is inside");
        assert_eq!(window.path(), Some(Path::new("a.ova/b.vmdk")));
        let mut buf = [9; 12];
        window.read_at(&mut buf, 4).expect("reads");
        assert_eq!(buf, [14, 15, 16, 17, 18, 19, 0, 0, 0, 0, 0, 0]);
        window.read_at(&mut buf, u64::MAX).expect("reads nothing");
        assert_eq!(buf, [0; 12]);
        assert_eq!(window.run(8, 100).expect("tells").len, 2);
        assert!(!window.run(10, 100).expect("tells").data);
        assert_eq!(
            window.write_at(&[1], 0).expect_err("is read-only").kind(),
            ErrorKind::ReadOnly
        );
        Window::new(inner, 10..257, Path::new("c")).expect_err("is not inside");
    }
}

//! Block devices: their real size and block sizes, discard and zeroing by the device.

#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{FallocateFlags, fallocate, ioctl_blkpbszget, ioctl_blksszget};
use rustix::io::Errno;
use rustix::ioctl;

use crate::error::{Error, ErrorKind, Result};
use crate::storage::file::MAPPED_READ;
use crate::storage::mmap::Mapping;
use crate::storage::open::{Access, Caching, Flushing};
use crate::storage::positioned::Positioned;
use crate::storage::syncs::Syncs;
use crate::storage::{HostId, HostRun, Limits, Storage, Zeroing, zero_or_write};
use crate::util::align::len64;
use crate::util::range;

/// Size in bytes, as a u64 that the kernel calls a size_t.
const BLKGETSIZE64: ioctl::Opcode = ioctl::opcode::read::<usize>(0x12, 114);
/// Whether the device takes no writes.
const BLKROGET: ioctl::Opcode = ioctl::opcode::none(0x12, 94);
/// Discards a range, given as offset and length in bytes.
const BLKDISCARD: ioctl::Opcode = ioctl::opcode::none(0x12, 119);

/// Attributes of a file as `struct fsxattr` has them: flags, size of extents, five words more.
type Attributes = [u32; 7];
/// Reads and sets them.
const FS_IOC_FSGETXATTR: ioctl::Opcode = ioctl::opcode::read::<Attributes>(b'X', 31);
const FS_IOC_FSSETXATTR: ioctl::Opcode = ioctl::opcode::write::<Attributes>(b'X', 32);
/// The flag that says that the size of extents counts.
const FS_XFLAG_EXTSIZE: u32 = 0x800;

/// Has the host give a file that is empty space in units of `bytes`.
///
/// # Errors
/// The host's.
pub(super) fn set_extent_size(file: BorrowedFd<'_>, bytes: u32) -> Result<(), Errno> {
    let getter = ioctl::Getter::<FS_IOC_FSGETXATTR, Attributes>::new;
    // SAFETY: the opcode fills a struct of seven words through the pointer it is given.
    let mut attributes = unsafe { ioctl::ioctl(file, getter()) }?;
    attributes[0] |= FS_XFLAG_EXTSIZE;
    attributes[1] = bytes;
    // SAFETY: the opcode reads a struct of seven words through the pointer it is given.
    unsafe { ioctl::ioctl(file, ioctl::Setter::<FS_IOC_FSSETXATTR, _>::new(attributes)) }
}

/// A block device.  Its length is fixed.
#[derive(Debug)]
pub struct DeviceStorage {
    host: Positioned,
    len: u64,
    logical_block: u32,
    physical_block: u32,
    /// `None` where reads are to be system calls.
    mapping: Option<Mapping>,
    /// What `/sys` says that one command can do; 0: the device has no such command.
    zero_most: u64,
    discard_most: u64,
}

impl DeviceStorage {
    /// Wraps an open block device.
    ///
    /// # Errors
    /// The host's; `ReadOnly` where `access` asks for more than the device takes.
    pub fn new(file: File, path: &Path, access: Access, caching: Caching) -> Result<Self> {
        let host = Positioned::new(file, path);
        let fail = |e: Errno| host.fail("read the size of the device".to_owned(), e);
        // SAFETY: the opcode fills a u64 through the pointer it is given.
        let len = unsafe { ioctl::ioctl(&host.file, ioctl::Getter::<BLKGETSIZE64, u64>::new()) };
        let len = len.map_err(fail)?;
        // SAFETY: the opcode fills an int through the pointer it is given.
        let read_only = unsafe { ioctl::ioctl(&host.file, ioctl::Getter::<BLKROGET, i32>::new()) };
        if access == Access::Write && read_only.map_err(fail)? != 0 {
            return Err(Error::new(ErrorKind::ReadOnly, "is a read-only device").at(path));
        }
        let metadata = host.file.metadata();
        let id = metadata
            .map_err(|e| host.fail("look at the device".to_owned(), e))?
            .rdev();
        Ok(Self {
            len,
            logical_block: ioctl_blksszget(&host.file).map_err(fail)?,
            physical_block: ioctl_blkpbszget(&host.file).map_err(fail)?,
            mapping: (caching == Caching::Mapped).then(Mapping::new),
            zero_most: queue_limit(id, "write_zeroes_max_bytes"),
            discard_most: queue_limit(id, "discard_max_bytes"),
            host,
        })
    }

    /// The same, where syncs are as `flushing` says.
    pub(super) fn with_flushing(mut self, flushing: Flushing) -> Self {
        self.host.flushing = flushing;
        self
    }

    /// Refuses a write past the end, before any of it is done.
    fn check_end(&self, host: u64, len: u64) -> Result<()> {
        match host.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(Error::new(
                ErrorKind::NoSpace,
                format!(
                    "{len} bytes at {host:#x} do not fit the device (it ends at {:#x})",
                    self.len
                ),
            )
            .at(&self.host.path)),
        }
    }

    /// The part of a range that whole logical blocks cover, and the edges.
    fn cut(&self, host: &Range<u64>) -> range::Cut {
        range::cut(host, u64::from(self.logical_block))
    }

    fn refused(&self, what: &str) -> Error {
        Error::unsupported(format!("the device cannot {what} this range")).at(&self.host.path)
    }
}

/// A number from the queue directory of a block device or of the disk that it is a part of; 0
/// where the host does not tell.
fn queue_limit(device: u64, name: &str) -> u64 {
    let (major, minor) = (libc::major(device), libc::minor(device));
    let base = format!("/sys/dev/block/{major}:{minor}");
    [
        format!("{base}/queue/{name}"),
        format!("{base}/../queue/{name}"),
    ]
    .iter()
    .find_map(|path| std::fs::read_to_string(path).ok()?.trim().parse().ok())
    .unwrap_or(0)
}

impl Storage for DeviceStorage {
    fn size(&self) -> u64 {
        self.len
    }

    fn has_fixed_len(&self) -> bool {
        true
    }

    fn limits(&self) -> Limits {
        let unit = |most: u64| if most == 0 { 0 } else { self.logical_block };
        Limits {
            align: self.physical_block,
            buf_align: 1,
            zero_align: unit(self.zero_most),
            discard_align: unit(self.discard_most),
        }
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.host.path)
    }

    fn host_id(&self) -> Option<HostId> {
        self.host.id()
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.host.file.as_fd())
    }

    fn read_at(&self, buf: &mut [u8], host: u64) -> Result<()> {
        let inside = || {
            host.checked_add(len64(buf.len()))
                .is_some_and(|e| e <= self.len)
        };
        if let Some(mapping) = &self.mapping
            && buf.len() <= MAPPED_READ
            && inside()
            && mapping.read(&self.host.file, buf, host).is_ok()
        {
            return Ok(());
        }
        self.host.read(buf, host, self.len)
    }

    fn read_alone(&self, buf: &mut [u8], host: u64) -> Result<()> {
        self.host.read(buf, host, self.len)
    }

    fn write_at(&self, buf: &[u8], host: u64) -> Result<()> {
        self.check_end(host, len64(buf.len()))?;
        self.host.write(buf, host)
    }

    fn zero(&self, host: Range<u64>, how: Zeroing) -> Result<()> {
        let cut = self.cut(&host);
        if self.zero_most == 0 || cut.body.is_empty() {
            return Err(self.refused("zero"));
        }
        // On a device these zero the range without writing it: the first may unmap, the second not.
        let mode = match how {
            Zeroing::MayUnmap => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            Zeroing::KeepSpace => FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
        };
        let (start, len) = (cut.body.start, range::len(&cut.body));
        match rustix::io::retry_on_intr(|| fallocate(&self.host.file, mode, start, len)) {
            Ok(()) => {}
            Err(Errno::INVAL) => return Err(self.refused("zero")),
            Err(e) => return Err(self.host.fail(format!("zero at {start:#x}"), e)),
        }
        for edge in [cut.head, cut.tail] {
            if !edge.is_empty() {
                zero_or_write(self, edge, how)?;
            }
        }
        Ok(())
    }

    fn discard(&self, host: Range<u64>) -> Result<()> {
        let body = self.cut(&host).body;
        if self.discard_most == 0 || body.is_empty() {
            return Err(self.refused("discard"));
        }
        let span = [body.start, range::len(&body)];
        // SAFETY: the opcode reads an offset and a length through the pointer it is given.
        let discard = || unsafe {
            let request = ioctl::Setter::<BLKDISCARD, [u64; 2]>::new(span);
            ioctl::ioctl(&self.host.file, request)
        };
        rustix::io::retry_on_intr(discard)
            .map_err(|e| self.host.fail(format!("discard at {:#x}", body.start), e))
    }

    fn run(&self, host: u64, len: u64) -> Result<HostRun> {
        let inside = self.len.saturating_sub(host);
        Ok(match inside {
            0 => HostRun { data: false, len },
            _ => HostRun {
                data: true,
                len: len.min(inside),
            },
        })
    }

    fn set_len(&self, len: u64) -> Result<()> {
        if len == self.len {
            return Ok(());
        }
        Err(Error::unsupported(format!(
            "is a device of {} bytes, whose length cannot be set to {len}",
            self.len
        ))
        .at(&self.host.path))
    }

    fn sync_now(&self) -> Result<()> {
        self.host.sync()
    }

    fn syncs(&self) -> &Syncs {
        &self.host.syncs
    }

    fn reserve(&self, host: Range<u64>) -> Result<()> {
        // All of a device's space is there.
        self.check_end(host.start, range::len(&host))
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::sync::Arc;

    use super::*;
    use crate::storage::open::{Sharing, StorageOptions, open};

    /// A loop device over a scratch file of `len` bytes; `None`, with a message, where this host
    /// lets us have none.
    struct Loop {
        device: String,
        _backing: tempfile::NamedTempFile,
    }

    impl Loop {
        fn new(len: u64, options: &[&str]) -> Option<Self> {
            let backing = tempfile::NamedTempFile::new().expect("a temporary file");
            backing.as_file().set_len(len).expect("sparse");
            let mut losetup = Command::new("losetup");
            losetup.args(["--find", "--show"]).args(options);
            match losetup.arg(backing.path()).output() {
                Ok(done) if done.status.success() => Some(Self {
                    device: String::from_utf8_lossy(&done.stdout).trim().to_owned(),
                    _backing: backing,
                }),
                why => {
                    crate::util::skipped::skipped(&format!("no loop device here: {why:?}"));
                    None
                }
            }
        }

        fn open(&self, caching: Caching) -> Arc<dyn Storage> {
            let options = StorageOptions {
                access: Access::Write,
                sharing: Sharing::Locked,
                caching,
                ..StorageOptions::default()
            };
            open(Path::new(&self.device), &options).expect("opens")
        }
    }

    impl Drop for Loop {
        fn drop(&mut self) {
            let _ = Command::new("losetup").args(["-d", &self.device]).status();
        }
    }

    #[test]
    fn a_device_has_its_size_and_takes_any_offset() {
        for caching in [Caching::Mapped, Caching::Buffered, Caching::Direct] {
            let Some(device) = Loop::new((4 << 20) + 512, &[]) else {
                return;
            };
            let storage = device.open(caching);
            assert_eq!(storage.size(), (4 << 20) + 512);
            let mut buf = vec![1; 6000];
            storage.write_at(&vec![7; 5000], 777).expect("writes");
            storage.read_at(&mut buf, 776).expect("reads");
            assert_eq!((buf[0], buf[1], buf[5000], buf[5001]), (0, 7, 7, 0));
            let end = storage.size();
            storage
                .write_at(&[8; 100], end - 100)
                .expect("writes the last bytes");
            storage
                .read_at(&mut buf[..200], end - 100)
                .expect("reads past the end");
            assert_eq!((buf[99], buf[100]), (8, 0));
            let error = storage
                .write_at(&[8; 100], end - 99)
                .expect_err("past the end");
            assert_eq!(error.kind(), ErrorKind::NoSpace);
            storage.sync().expect("syncs");
            storage.set_len(end).expect("is its length");
            let error = storage.set_len(end - 512).expect_err("fixed");
            assert_eq!(error.kind(), ErrorKind::Unsupported);
        }
    }

    #[test]
    fn zeroing_by_the_device_leaves_the_bytes_around_it() {
        let Some(device) = Loop::new(4 << 20, &[]) else {
            return;
        };
        let storage = device.open(Caching::Mapped);
        for how in [Zeroing::MayUnmap, Zeroing::KeepSpace] {
            storage.write_at(&[7; 1 << 20], 0).expect("writes");
            match storage.zero(1000..900_000, how) {
                Err(e) if e.kind() == ErrorKind::Unsupported => {
                    assert_eq!(storage.limits().zero_align, 0);
                }
                done => {
                    done.expect("zeroes");
                    let mut buf = vec![1; 1 << 20];
                    storage.read_at(&mut buf, 0).expect("reads");
                    assert!(buf[..1000].iter().all(|b| *b == 7));
                    assert!(buf[1000..900_000].iter().all(|b| *b == 0));
                    assert!(buf[900_000..].iter().all(|b| *b == 7));
                }
            }
        }
        match storage.discard(4096..1 << 20) {
            Err(e) => assert_eq!(e.kind(), ErrorKind::Unsupported),
            Ok(()) => assert_ne!(storage.limits().discard_align, 0),
        }
    }

    #[test]
    fn a_read_only_device_is_refused_for_writing_and_read() {
        let Some(device) = Loop::new(1 << 20, &["--read-only"]) else {
            return;
        };
        let path = Path::new(&device.device);
        let mut options = StorageOptions {
            access: Access::Write,
            ..StorageOptions::default()
        };
        let error = open(path, &options).expect_err("read-only");
        assert!(
            matches!(error.kind(), ErrorKind::ReadOnly | ErrorKind::Permission),
            "{error}"
        );
        options.access = Access::Read;
        let mut buf = [1; 512];
        let storage = open(path, &options).expect("opens");
        storage.read_at(&mut buf, 0).expect("reads");
        assert_eq!(buf, [0; 512]);
    }
}

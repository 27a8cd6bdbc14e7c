//! What a host can be told about a file while it is empty.

use std::os::fd::BorrowedFd;

use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::storage::{Storage, device};

/// One such thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attribute {
    /// Give it space in units of this many bytes.
    ExtentSize(u32),
    /// Write it in place instead of beside.
    NoCopyOnWrite,
}

/// A size of extents that a host can be told.
///
/// # Errors
/// `Invalid` for one of more than 32 bits.
pub fn extent_size(bytes: u64) -> Result<u32> {
    u32::try_from(bytes).map_err(|_| {
        let most = u32::MAX;
        Error::invalid(format!("{bytes} bytes (allowed: up to {most}, 0 for none)"))
    })
}

/// Tells the host.
///
/// # Errors
/// The host's; `Unsupported` where it has no such attribute.
pub fn set(storage: &dyn Storage, attribute: Attribute) -> Result<()> {
    let fd = storage.fd().ok_or_else(|| {
        let text = "what has no file of this host has no attributes of one";
        Error::unsupported(text).at_opt(storage.path())
    })?;
    let done = match attribute {
        Attribute::ExtentSize(bytes) => device::set_extent_size(fd, bytes),
        Attribute::NoCopyOnWrite => no_copy_on_write(fd),
    };
    done.map_err(|e| Error::io("set the attribute of the file", e.into()).at_opt(storage.path()))
}

fn no_copy_on_write(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let flags = ioctl_getflags(fd)?;
    ioctl_setflags(fd, flags | IFlags::NOCOW)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryStorage;

    #[test]
    fn an_extent_size_has_32_bits_and_memory_has_no_attributes() {
        assert_eq!(extent_size(1 << 20).ok(), Some(1 << 20));
        let error = extent_size(5 << 30).expect_err("too large");
        assert!(error.to_string().contains("4294967295"), "{error}");
        let error = set(&MemoryStorage::new(), Attribute::NoCopyOnWrite);
        error.expect_err("no file");
    }
}

//! From a path to storage: file or device, locked, mapped or not, direct or not.

use std::fs::OpenOptions as FileOptions;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::storage::Storage;
use crate::storage::file::FileStorage;

/// Whether changes are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Access {
    /// Reads only.
    #[default]
    Read,
    /// Reads and writes.
    Write,
}

/// What protects against other processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sharing {
    /// Take the locks that QEMU takes; fail where another process holds conflicting ones.
    #[default]
    Locked,
    /// Take no locks (`--force-share`); for reading only.
    Force,
}

/// How the host's page cache is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Caching {
    /// Reads from a mapping where the file system is local, else positioned reads.
    #[default]
    Mapped,
    /// Positioned reads and writes through the page cache (`--no-mmap`).
    Buffered,
    /// `O_DIRECT` (`-t none`, `-t directsync`).
    Direct,
}

/// How to open a host object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StorageOptions {
    /// Whether changes are wanted.
    pub access: Access,
    /// What protects against other processes.
    pub sharing: Sharing,
    /// How the host's page cache is used.
    pub caching: Caching,
}

/// Opens a regular file or a block device.
///
/// # Errors
/// The host's; `Invalid` for directories, pipes, sockets and character devices; `Locked` where
/// another process holds it.
pub fn open(path: &Path, options: &StorageOptions) -> Result<Arc<dyn Storage>> {
    let file = FileOptions::new()
        .read(true)
        .write(options.access == Access::Write)
        .open(path)
        .map_err(|e| Error::io("open", e).at(path))?;
    Ok(Arc::new(FileStorage::new(file, path)?))
}

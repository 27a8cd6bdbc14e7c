//! What `info` shows, as data.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result};
use crate::image::{Backing, Image, Role, Snapshot};
use crate::storage::Storage;

/// One fact that only a format has.
#[derive(Debug, Clone, PartialEq)]
pub struct Detail {
    /// The JSON key, lower case with hyphens, such as `creator-application`.
    pub key: &'static str,
    /// The value.
    pub value: Value,
}

impl Detail {
    /// A fact.
    pub fn new(key: &'static str, value: impl Into<Value>) -> Self {
        Self {
            key,
            value: value.into(),
        }
    }
}

/// What kind of host object holds an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostKind {
    /// A regular file.
    File,
    /// A block device.
    Device,
    /// Memory, or anything else without a descriptor.
    Other,
}

/// The host object that holds an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostInfo {
    /// What it is.
    pub kind: HostKind,
    /// Its length in bytes: the end of the file.
    pub len: u64,
    /// Bytes it really occupies on the host; `None` where the host does not say.
    pub disk_size: Option<u64>,
}

impl HostInfo {
    /// Asks the host about the objects of an image: their space counts together, all else is that of
    /// the one with its header.
    ///
    /// # Errors
    /// The host's.
    pub fn of_image(image: &dyn Image) -> Result<Self> {
        let mut all = Self::of(image.storage())?;
        for part in image.parts().into_iter().filter(|p| p.role == Role::Data) {
            let other = Self::of(part.storage)?.disk_size;
            all.disk_size = all.disk_size.zip(other).map(|(a, b)| a.saturating_add(b));
        }
        Ok(all)
    }

    /// Asks the host about `storage`.
    ///
    /// # Errors
    /// The host's.
    pub fn of(storage: &dyn Storage) -> Result<Self> {
        let len = storage.size();
        let Some(fd) = storage.fd() else {
            return Ok(Self {
                kind: HostKind::Other,
                len,
                disk_size: None,
            });
        };
        let stat = rustix::fs::fstat(fd)
            .map_err(|e| Error::io("read its state", e.into()).at_opt(storage.path()))?;
        let kind = match rustix::fs::FileType::from_raw_mode(stat.st_mode) {
            rustix::fs::FileType::RegularFile => HostKind::File,
            rustix::fs::FileType::BlockDevice => HostKind::Device,
            _ => HostKind::Other,
        };
        // st_blocks counts units of 512 bytes whatever the file system's own unit is.
        let disk_size = u64::try_from(stat.st_blocks)
            .ok()
            .and_then(|blocks| blocks.checked_mul(512));
        Ok(Self {
            kind,
            len,
            disk_size,
        })
    }

    /// Whether it takes notably less space than it is long; also where the host does not say.
    pub fn is_sparse(&self) -> bool {
        self.disk_size
            .is_none_or(|size| size < self.len - self.len / 10)
    }
}

/// What `info` shows about one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageInfo {
    /// The path it was opened from.
    pub path: Option<PathBuf>,
    /// Its format's name.
    pub format: &'static str,
    /// Size of the disk it holds, in bytes.
    pub virtual_size: u64,
    /// Unit of allocation in bytes, where the format has one.
    pub cluster_size: Option<u64>,
    /// The host object that holds it.
    pub host: HostInfo,
    /// What its header says lies below it.
    pub backing: Option<Backing>,
    /// Where the image below is: where it was found, or where its first name leads.  Nothing was
    /// opened to learn this, so it need not exist.
    pub backing_path: Option<PathBuf>,
    /// Its internal snapshots, in order.
    pub snapshots: Vec<Snapshot>,
    /// Its data is encrypted.
    pub encrypted: bool,
    /// It was not closed cleanly.
    pub dirty: bool,
    /// What only its format has, in order.
    pub details: Vec<Detail>,
}

impl ImageInfo {
    /// Gathers what an open image knows about itself; opens nothing.
    ///
    /// # Errors
    /// The host's.
    pub fn of(image: &dyn Image) -> Result<Self> {
        let storage = image.storage();
        let path = storage.path().map(Path::to_owned);
        let backing = image.backing();
        let backing_path = backing
            .as_ref()
            .and_then(|b| b.names.first())
            .map(|name| beside(path.as_deref(), &name.path));
        Ok(Self {
            format: image.driver().name,
            virtual_size: image.virtual_size(),
            cluster_size: image.cluster_size(),
            host: HostInfo::of_image(image)?,
            backing,
            backing_path,
            snapshots: image.snapshots().map_err(|e| e.at_opt(path.as_deref()))?,
            encrypted: image.is_encrypted(),
            dirty: image.is_dirty(),
            details: image.details(),
            path,
        })
    }
}

/// Where `name` leads from the directory of the image at `path`; an absolute name leads there.
fn beside(path: Option<&Path>, name: impl AsRef<Path>) -> PathBuf {
    path.and_then(Path::parent)
        .unwrap_or(Path::new(""))
        .join(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryStorage;

    #[test]
    fn names_lead_from_the_directory_of_the_image() {
        for (path, name, leads) in [
            (Some("/d/top.vhd"), "base.vhd", "/d/base.vhd"),
            (Some("top.vhd"), "base.vhd", "base.vhd"),
            (Some("/d/top.vhd"), "/e/base.vhd", "/e/base.vhd"),
            (None, "base.vhd", "base.vhd"),
        ] {
            assert_eq!(beside(path.map(Path::new), name), Path::new(leads));
        }
    }

    #[test]
    fn memory_has_a_length_but_no_disk_size() {
        let host = HostInfo::of(&MemoryStorage::from_bytes(&[0; 700])).expect("asks nobody");
        assert_eq!((host.kind, host.len), (HostKind::Other, 700));
        assert_eq!(host.disk_size, None);
    }
}

//! What a host object is, whatever it is called.

use std::ffi::OsStr;
use std::fs::Metadata;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::fs::{FileType, Stat, fstat, major, makedev, minor};

/// Most objects below one block device that are looked at.
const MAX_BELOW: usize = 256;

/// Which host object it is: all its names, hard links and symbolic ones among them, and all its
/// descriptors have the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HostId {
    /// A file, by the device of its file system and its number there.
    File {
        /// The device of the file system.
        device: u64,
        /// The number of the file.
        inode: u64,
    },
    /// A block device, by its own number: several nodes may lead to it.
    Device(u64),
}

impl HostId {
    /// That of the object that `metadata` is about.
    pub fn of(metadata: &Metadata) -> Self {
        match metadata.file_type().is_block_device() {
            true => Self::Device(metadata.rdev()),
            false => Self::File {
                device: metadata.dev(),
                inode: metadata.ino(),
            },
        }
    }

    /// That of the object that `stat` is about.
    pub(crate) fn of_stat(stat: &Stat) -> Self {
        match FileType::from_raw_mode(stat.st_mode).is_block_device() {
            true => Self::Device(stat.st_rdev),
            false => Self::File {
                device: stat.st_dev,
                inode: stat.st_ino,
            },
        }
    }

    /// That of an open object; `None` where the host does not say.
    pub fn of_fd(object: impl AsFd) -> Option<Self> {
        fstat(object).ok().map(|stat| Self::of_stat(&stat))
    }

    /// That of what `path` leads to, through symbolic links; `None` where it leads nowhere.
    pub fn named(path: impl AsRef<Path>) -> Option<Self> {
        std::fs::metadata(path).ok().map(|found| Self::of(&found))
    }

    /// What a block device keeps its bytes in: the file of a loop device, the disk of a partition,
    /// what a mapped device is mapped to, and what those keep theirs in; nothing for a file, and
    /// where the host does not say.
    pub fn stands_on(self) -> Vec<Self> {
        let mut found = Vec::new();
        let mut next = vec![self];
        while let Some(id) = next.pop() {
            for below in id.directly_below() {
                if found.len() < MAX_BELOW && below != self && !found.contains(&below) {
                    found.push(below);
                    next.push(below);
                }
            }
        }
        found
    }

    /// As `stands_on`; of a file, what its file system is on.
    pub fn lies_on(self) -> Vec<Self> {
        match self {
            Self::Device(_) => self.stands_on(),
            Self::File { device, .. } => {
                let device = Self::Device(device);
                let mut found = device.stands_on();
                found.push(device);
                found
            }
        }
    }

    fn directly_below(self) -> Vec<Self> {
        let Self::Device(number) = self else {
            return Vec::new();
        };
        let home = format!("/sys/dev/block/{}:{}", major(number), minor(number));
        let home = Path::new(&home);
        let mut below = Vec::new();
        if let Ok(mut file) = std::fs::read(home.join("loop/backing_file")) {
            file.pop_if(|last| *last == b'\n');
            below.extend(Self::named(OsStr::from_bytes(&file)));
        }
        if home.join("partition").exists() {
            let disk = std::fs::canonicalize(home).ok();
            let disk = disk.as_deref().and_then(Path::parent);
            below.extend(disk.and_then(numbered));
        }
        let slaves = std::fs::read_dir(home.join("slaves")).into_iter().flatten();
        below.extend(slaves.filter_map(|slave| numbered(&slave.ok()?.path())));
        below
    }
}

/// The block device that the host describes in a directory.
fn numbered(home: &Path) -> Option<HostId> {
    let text = std::fs::read_to_string(home.join("dev")).ok()?;
    let (first, second) = text.trim().split_once(':')?;
    let number = makedev(first.parse().ok()?, second.parse().ok()?);
    Some(HostId::Device(number))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn all_names_and_descriptors_of_a_file_are_one_object() {
        let dir = tempfile::tempdir().expect("a scratch directory");
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("a"), "a").expect("writes");
        std::fs::write(path("b"), "a").expect("writes");
        std::fs::hard_link(path("a"), path("hard")).expect("links");
        symlink("hard", path("soft")).expect("links");
        let id = HostId::named(path("a")).expect("is there");
        for name in ["hard", "soft", "../"] {
            let same = HostId::named(path(name)) == Some(id);
            assert_eq!(same, name != "../", "{name}");
        }
        assert_ne!(HostId::named(path("b")), Some(id));
        let open = File::open(path("soft")).expect("opens");
        assert_eq!(HostId::of_fd(&open), Some(id));
        assert_eq!(HostId::named(path("gone")), None);
    }
}

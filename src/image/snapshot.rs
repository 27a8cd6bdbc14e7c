//! Internal snapshots: states of a disk kept in the image itself.

use std::ffi::{OsStr, OsString};
use std::time::SystemTime;

use crate::error::{Error, ErrorKind, Result};
use crate::util::text::printable;

/// One internal snapshot, as its image's table has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// What identifies it within the image; usually a number.
    pub id: OsString,
    /// The name the user gave it: bytes; need not be unique.
    pub name: OsString,
    /// Bytes of the saved state of a virtual machine; 0: none.
    pub vm_state_size: u64,
    /// When it was made: seconds since 1970, UTC.
    pub date_sec: u32,
    /// When it was made: nanoseconds after `date_sec`.
    pub date_nsec: u32,
    /// How long the virtual machine had run, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Instructions the virtual machine had run, where that was recorded.
    pub icount: Option<u64>,
    /// Size of the disk it holds, in bytes.
    pub disk_size: u64,
}

/// Which snapshot is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pick {
    /// The first with this identifier, else the first with this name.
    Any(OsString),
    /// The first with this name, else the first with this identifier.
    NameFirst(OsString),
    /// The first that has all that is given.
    Exactly {
        /// Its identifier.
        id: Option<OsString>,
        /// Its name.
        name: Option<OsString>,
    },
}

impl Pick {
    /// The index of the snapshot meant.
    ///
    /// # Errors
    /// `NotFound`, naming what was looked for.
    pub fn find(&self, list: &[Snapshot]) -> Result<usize> {
        let id = |id: &OsStr| list.iter().position(|s| s.id == id);
        let name = |name: &OsStr| list.iter().position(|s| s.name == name);
        let found = match self {
            Self::Any(key) => id(key).or_else(|| name(key)),
            Self::NameFirst(key) => name(key).or_else(|| id(key)),
            Self::Exactly { id, name } => list.iter().position(|s| {
                id.as_ref().is_none_or(|id| *id == s.id)
                    && name.as_ref().is_none_or(|name| *name == s.name)
            }),
        };
        found.ok_or_else(|| {
            let text = format!(
                "has no snapshot {} (it has {})",
                self.in_words(),
                list.len()
            );
            Error::new(ErrorKind::NotFound, text)
        })
    }

    fn in_words(&self) -> String {
        let quoted = |text: &OsStr| format!("'{}'", printable(text));
        match self {
            Self::Any(key) | Self::NameFirst(key) => quoted(key),
            Self::Exactly { id, name } => {
                let id = id.as_deref().map(|id| format!("with id {}", quoted(id)));
                let name = name.as_deref().map(|n| format!("with name {}", quoted(n)));
                let words: Vec<String> = id.into_iter().chain(name).collect();
                words.join(" and ")
            }
        }
    }
}

/// Making, applying and deleting internal snapshots.
///
/// The image must have been opened for writing.  A change is there as a whole or not at all,
/// after kills and power cuts too, when space may be lost to leaks; when the call returns it is
/// on stable media.
pub trait Snapshots {
    /// Keeps the disk as it is now under `name`, of 1 to 255 bytes, dated `now`.
    ///
    /// # Errors
    /// `Invalid` for the name; `Unsupported` where the image cannot hold it; `Corrupt`; the
    /// host's.
    fn create(&mut self, name: &OsStr, now: SystemTime) -> Result<()>;
    /// Makes the disk what it was, its size and the state of the virtual machine included; what
    /// it was until now is lost.
    ///
    /// # Errors
    /// `NotFound`; else as [`Snapshots::create`].
    fn apply(&mut self, which: &Pick) -> Result<()>;
    /// Deletes a snapshot and gives back the space that only it needed.
    ///
    /// # Errors
    /// `NotFound`; else as [`Snapshots::create`].
    fn delete(&mut self, which: &Pick) -> Result<()>;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(id: &str, name: &str) -> Snapshot {
        Snapshot {
            id: id.into(),
            name: name.into(),
            vm_state_size: 0,
            date_sec: 0,
            date_nsec: 0,
            vm_clock_nsec: 0,
            icount: None,
            disk_size: 0,
        }
    }

    #[test]
    fn a_snapshot_is_found_by_id_or_name_in_the_order_asked_for() {
        let list = [snapshot("1", "2"), snapshot("2", "b"), snapshot("3", "b")];
        let find = |pick: Pick| pick.find(&list).ok();
        assert_eq!(find(Pick::Any("2".into())), Some(1));
        assert_eq!(find(Pick::NameFirst("2".into())), Some(0));
        assert_eq!(find(Pick::Any("b".into())), Some(1));
        let exactly = |id: Option<&str>, name: Option<&str>| Pick::Exactly {
            id: id.map(Into::into),
            name: name.map(Into::into),
        };
        assert_eq!(find(exactly(Some("3"), Some("b"))), Some(2));
        assert_eq!(find(exactly(Some("b"), None)), None);
        let error = Pick::Any("x\x1b".into()).find(&list).expect_err("none");
        assert!(error.message().contains("'x\\u{1b}'"), "{error}");
    }
}

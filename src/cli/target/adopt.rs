//! What a file that is replaced passes on to the one that replaces it: owner, mode, access control
//! list, extended attributes.

use std::ffi::{CStr, CString};
use std::fs::{Metadata, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{XattrFlags, getxattr, listxattr, removexattr, setxattr};
use rustix::io::Errno;

use crate::error::{Error, Result};

/// Most bytes of an attribute, and of the list of their names, that Linux takes.
const MAX_ATTRIBUTE: usize = 64 << 10;
/// The access control list, whose mask shows as the group's bits of the mode: without it the
/// group would be allowed what the list allows to others.
const ACL: &CStr = c"system.posix_acl_access";
/// What says something about the old content, or about programs.
const NOT_KEPT: [&CStr; 3] = [c"security.capability", c"security.evm", c"security.ima"];

/// Gives a new file the owner, mode, access control list and extended attributes of the old one.
/// Attributes other than the list and the user's own are kept as far as this process may.
///
/// # Errors
/// The host's.
pub(super) fn adopt(temp: &Path, path: &Path, old: &Metadata) -> Result<()> {
    let new = std::fs::metadata(temp).map_err(|e| Error::io("open", e).at(temp))?;
    if (new.uid(), new.gid()) != (old.uid(), old.gid()) {
        std::os::unix::fs::chown(temp, Some(old.uid()), Some(old.gid())).map_err(|e| {
            let doing = format!(
                "replace it by a file of the same owner ({}:{})",
                old.uid(),
                old.gid()
            );
            Error::io(doing, e).at(temp)
        })?;
    }
    let failed = |what: String| move |e: Errno| Error::io(what, io::Error::from(e)).at(temp);
    // Before the mode, which is what the new file has from its directory's default list until then.
    let names = names(path).map_err(failed("list its attributes".to_owned()))?;
    copy_acl(temp, path, &names).map_err(failed("keep the access control list".to_owned()))?;
    for name in names.iter().filter(|n| n.as_c_str() != ACL) {
        let copied = copy(temp, path, name);
        if name.as_bytes().starts_with(b"user.") {
            copied.map_err(failed(format!("keep the attribute {name:?}")))?;
        }
    }
    // After the owner: changing that clears bits of the mode.
    std::fs::set_permissions(temp, Permissions::from_mode(old.mode() & 0o7777))
        .map_err(|e| Error::io("keep the mode", e).at(temp))
}

/// The names of a file's attributes; none where the file system has no attributes.
fn names(path: &Path) -> std::result::Result<Vec<CString>, Errno> {
    let mut list = vec![0; MAX_ATTRIBUTE];
    let len = match listxattr(path, &mut list[..]) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => 0,
        listed => listed?,
    };
    let names = list[..len].split_inclusive(|b| *b == 0);
    let names = names.filter_map(|n| CStr::from_bytes_with_nul(n).ok());
    let kept = names.filter(|n| !NOT_KEPT.contains(n));
    Ok(kept.map(CStr::to_owned).collect())
}

/// Copies the list, or drops the one that the new file has from its directory.
fn copy_acl(temp: &Path, path: &Path, names: &[CString]) -> std::result::Result<(), Errno> {
    if names.iter().any(|n| n.as_c_str() == ACL) {
        return copy(temp, path, ACL);
    }
    match removexattr(temp, ACL) {
        Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
        removed => removed,
    }
}

fn copy(temp: &Path, path: &Path, name: &CStr) -> std::result::Result<(), Errno> {
    let mut value = vec![0; MAX_ATTRIBUTE];
    let len = getxattr(path, name, &mut value[..])?;
    setxattr(temp, name, &value[..len], XattrFlags::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An access control list as Linux keeps it: version 2, then tag, rights and id of each entry.
    fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let mut bytes = 2u32.to_le_bytes().to_vec();
        for (tag, rights, id) in entries {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(rights.to_le_bytes());
            bytes.extend(id.to_le_bytes());
        }
        bytes
    }

    /// The owner may all, user 1234 may read and write, the group and others may nothing.
    fn one_more_user() -> Vec<u8> {
        let none = u32::MAX;
        acl(&[
            (1, 6, none),
            (2, 6, 1234),
            (4, 0, none),
            (16, 6, none),
            (32, 0, none),
        ])
    }

    fn value(path: &Path, name: &CStr) -> Option<Vec<u8>> {
        let mut value = vec![0; MAX_ATTRIBUTE];
        let len = getxattr(path, name, &mut value[..]).ok()?;
        Some(value[..len].to_vec())
    }

    fn put(path: &Path, name: &CStr, value: &[u8]) -> bool {
        let done = setxattr(path, name, value, XattrFlags::empty());
        if let Err(e) = done {
            crate::util::skipped::skipped(&format!("no attribute {name:?} here: {e}"));
        }
        done.is_ok()
    }

    #[test]
    fn lists_and_attributes_are_those_of_the_old_file() {
        let dir = tempfile::tempdir().expect("a directory");
        let (old, new) = (dir.path().join("old"), dir.path().join("new"));
        for path in [&old, &new] {
            std::fs::write(path, b"").expect("writes");
        }
        if !put(&old, ACL, &one_more_user()) || !put(&old, c"user.note", b"mine") {
            return;
        }
        let found = std::fs::metadata(&old).expect("is there");
        adopt(&new, &old, &found).expect("keeps all");
        assert_eq!(value(&new, ACL), value(&old, ACL));
        assert_eq!(value(&new, c"user.note").as_deref(), Some(&b"mine"[..]));
        let mode = std::fs::metadata(&new).expect("is there").mode();
        assert_eq!(mode & 0o7777, 0o660);
    }

    #[test]
    fn a_list_that_the_directory_gives_does_not_stay_on_a_file_that_had_none() {
        let dir = tempfile::tempdir().expect("a directory");
        let (old, new) = (dir.path().join("old"), dir.path().join("new"));
        std::fs::write(&old, b"").expect("writes");
        std::fs::set_permissions(&old, Permissions::from_mode(0o660)).expect("sets");
        if !put(dir.path(), c"system.posix_acl_default", &one_more_user()) {
            return;
        }
        std::fs::write(&new, b"").expect("writes");
        assert!(value(&new, ACL).is_some());
        let found = std::fs::metadata(&old).expect("is there");
        adopt(&new, &old, &found).expect("keeps all");
        assert_eq!(value(&new, ACL), None);
    }
}

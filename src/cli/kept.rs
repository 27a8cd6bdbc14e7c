//! What may not be replaced: the files that an open disk is made of.

use std::path::Path;

use crate::chain::HostFile;
use crate::cli::target::look;
use crate::error::{Error, Result};
use crate::image::Role;
use crate::nbd::uri::is_uri;
use crate::storage::HostId;
use crate::util::text::printable;

/// Refuses to put something at `target` where one of `files` is, whatever it is called there.
pub(super) fn refuse(target: &Path, files: &[HostFile]) -> Result<()> {
    let id = match is_uri(target) {
        true => None,
        false => HostId::named(target),
    };
    let below = below(id);
    let lost = |f: &&HostFile| f.is_same(id, target) || meets(f, id, &below);
    match files.iter().find(lost) {
        None => Ok(()),
        Some(file) => Err(would_lose(file).at(target)),
    }
}

/// What a target that is a device keeps its bytes in.
fn below(target: Option<HostId>) -> Vec<HostId> {
    target.map_or_else(Vec::new, HostId::stands_on)
}

/// Whether a target keeps its bytes in a file of the disk, or the file its bytes in the target.
fn meets(file: &HostFile, target: Option<HostId>, below: &[HostId]) -> bool {
    let (Some(file), Some(target)) = (file.id, target) else {
        return false;
    };
    below.contains(&file) || file.lies_on().contains(&target)
}

/// The same for what is open already.
pub(super) fn refuse_open(target: &Path, id: Option<HostId>, files: &[HostFile]) -> Result<()> {
    let below = below(id);
    let lost = |f: &&HostFile| id.is_some() && (f.id == id || meets(f, id, &below));
    match files.iter().find(lost) {
        None => Ok(()),
        Some(file) => Err(would_lose(file).at(target)),
    }
}

fn would_lose(file: &HostFile) -> Error {
    let shown = |path: &Option<std::path::PathBuf>| path.as_ref().map(printable);
    let path = shown(&file.path).unwrap_or_default();
    Error::invalid(match (file.role, shown(&file.image)) {
        (Role::Data, Some(image)) => {
            format!("would replace {path}, which holds data of {image} (allowed: another name)")
        }
        _ => format!("would replace {path}, which is in use here (allowed: another name)"),
    })
}

/// Whether two names, of which there may be nothing yet, are of one file.
pub(super) fn is_same_place(a: &Path, b: &Path) -> Result<bool> {
    let ((a, _), (b, _)) = (look(a)?, look(b)?);
    Ok(match (HostId::named(&a), HostId::named(&b)) {
        (Some(a), Some(b)) => a == b,
        (None, None) => {
            let directory = |path: &Path| match path.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => HostId::named(parent),
                _ => HostId::named("."),
            };
            a.file_name() == b.file_name() && directory(&a) == directory(&b)
        }
        _ => false,
    })
}

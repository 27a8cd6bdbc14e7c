//! Whether an image will find what is to lie below it.

use std::path::Path;

use crate::chain::open::References;
use crate::cli::backing::clean;
use crate::cli::removed::parent;
use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::util::text::printable;

/// Whether an image names what lies below it, so that it is not looked for.
pub(super) fn has_names(image: &dyn Image) -> bool {
    image
        .backing()
        .is_some_and(|backing| !backing.names.is_empty())
}

/// Refuses to have `below` lie below the image at `file`, where that, by a name or, without
/// `has_names`, by its identity, would not find it as `references` are; both paths are absolute.
///
/// # Errors
/// `Denied`.
pub(super) fn refuse_unreachable(
    has_names: bool,
    below: &Path,
    file: &Path,
    references: &References,
) -> Result<()> {
    let is_near = match has_names {
        true => below.starts_with(parent(file)),
        // It is looked for in its own directory.
        false => parent(below) == parent(file),
    };
    let is_allowed = match references {
        References::Any { .. } if has_names => true,
        references => references.allowed().iter().any(|path| {
            let path = clean(path);
            path == below || (!has_names && path == parent(below))
        }),
    };
    if is_near || is_allowed {
        return Ok(());
    }
    let text = format!(
        "{} is not in its directory or below, so that it could not be opened below it \
         (--allow-ref '{}', which every later command needs as well, allows it)",
        printable(below),
        printable(below)
    );
    Err(Error::new(ErrorKind::Denied, text).at(file))
}

//! Dirty bitmaps of an export, as its server tells of them.

use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};
use crate::nbd::Uri;
use crate::nbd::wire::DIRTY_BITMAP;
use crate::storage::nbd::Options;
use crate::storage::nbd::connection::Op;
use crate::storage::nbd::pool::Pool;
use crate::util::text::printable;

/// The flag of an extent in which something was written.
const DIRTY: u32 = 1;

/// Tells `each` of the ranges of an export that its server's bitmap `name` calls dirty, ascending; bytes
/// of the export.  Over a connection of its own.
///
/// # Errors
/// `NotFound` where the server has no such bitmap; those of [`super::open`]; those of `each`.
pub fn dirty_bitmap(
    uri: &str,
    name: &str,
    options: &Options,
    mut each: impl FnMut(Range<u64>) -> Result<()>,
) -> Result<u64> {
    let context = format!("{DIRTY_BITMAP}{name}");
    let options = Options {
        connections: 1,
        ..*options
    };
    let pool = Pool::connect(Uri::parse(uri)?, context, options).map_err(|e| e.at(uri))?;
    let facts = *pool.facts();
    if !facts.tells_extents() {
        let text = format!("the server tells of no dirty bitmap '{}'", printable(name));
        return Err(Error::new(ErrorKind::NotFound, text).at(uri));
    }
    let (mut at, mut found) = (0, Vec::new());
    while at < facts.size {
        found.clear();
        let mut op = Op::Status {
            at,
            len: facts.longest_status(facts.size - at),
            found: &mut found,
        };
        pool.call(&mut op).map_err(|e| e.at(uri))?;
        let before = at;
        for (len, flags) in found.drain(..) {
            let end = at.saturating_add(len).min(facts.size);
            if flags & DIRTY != 0 && at < end {
                each(at..end)?;
            }
            at = end;
        }
        if at == before {
            return Err(Error::corrupt("the server tells of no extents").at(uri));
        }
    }
    Ok(facts.size)
}

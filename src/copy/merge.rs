//! An image merged into the disk right below it, in place.

use crate::chain::Chain;
use crate::copy::progress::Progress;
use crate::error::{Error, Result};
use crate::image::Below;
use crate::image::merge::MergeBase;

/// The disk below, which may be shorter than what is read of it.
struct Base<'a>(&'a Chain);

impl Below for Base<'_> {
    fn read_at(&self, buf: &mut [u8], at: u64) -> Result<()> {
        let inside = self.0.virtual_size().saturating_sub(at);
        let len = usize::try_from(inside).unwrap_or(usize::MAX).min(buf.len());
        let (there, past) = buf.split_at_mut(len);
        past.fill(0);
        match there.is_empty() {
            true => Ok(()),
            false => self.0.read_at(there, at),
        }
    }
}

impl MergeBase for Base<'_> {
    fn write_at(&self, buf: &[u8], at: u64) -> Result<()> {
        self.0.write_at(buf, at)
    }

    fn flush(&self) -> Result<()> {
        self.0.flush()
    }
}

/// Merges `upper`, one image that can be ([`Image::as_merge`]), into `base`, which lies right below it and
/// is open for writing.  A base that is smaller grows first.
///
/// # Errors
/// `Unsupported` for other images, and where the base cannot grow or be written; those of
/// [`Merge::merge`].
///
/// [`Image::as_merge`]: crate::image::Image::as_merge
/// [`Merge::merge`]: crate::image::merge::Merge::merge
pub fn merge(upper: &Chain, base: &Chain, progress: &dyn Progress) -> Result<()> {
    let top = upper.top();
    let Some(merge) = top.as_merge().filter(|_| upper.layers().len() == 1) else {
        return Err(
            Error::unsupported("is no image that is merged in place").at_opt(top.storage().path())
        );
    };
    if !base.top().caps().write {
        let path = base.top().storage().path();
        return Err(base.top().read_only().at_opt(path));
    }
    if merge.left() > 0 && base.virtual_size() < upper.virtual_size() {
        base.resize(upper.virtual_size())?;
        base.flush()?;
    }
    let done = merge.merge(&Base(base), progress);
    done.map_err(|e| e.at_opt(top.storage().path()))
}

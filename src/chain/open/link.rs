//! One link of a chain by itself.

use crate::chain::open::{ChainOptions, Layer, Walk};
use crate::chain::reference::search::Search;
use crate::chain::reference::{Found, Trust};
use crate::error::{Error, Result};
use crate::storage::open::Access;

/// An image and what lies right below it.
pub(in crate::chain) struct Link {
    /// The image.
    pub(in crate::chain) above: Layer,
    /// What lies below it; `None`: it has nothing there.  An error is what every other command says
    /// that would read the image.
    pub(in crate::chain) below: Result<Option<Layer>>,
}

impl Link {
    /// Opens an image, which where its format is stated is believed as far as `stated` says, and
    /// what lies below it.  What was learnt of directories is kept in `search` for the next.
    ///
    /// # Errors
    /// Those of the image itself, as of [`super::open`].
    pub(in crate::chain) fn open(
        found: Found,
        options: &ChainOptions,
        stated: Trust,
        search: &mut Search,
    ) -> Result<Self> {
        let mut walk = Walk::begin_as(found, options, stated)?;
        std::mem::swap(&mut walk.search, search);
        let there = walk.descend(Access::Read);
        std::mem::swap(&mut walk.search, search);
        let mut layers = walk.layers.into_iter();
        let above = layers
            .next()
            .ok_or_else(|| Error::invalid("a chain has at least one layer"))?;
        Ok(Self {
            above,
            below: there.map(|_| layers.next()),
        })
    }
}

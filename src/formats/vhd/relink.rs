//! Another parent for a differencing disk, or none.
//!
//! The dynamic header is longer than a sector and has a checksum, so it is never changed in place
//! while it counts: a copy at the end of the file, with the new parent and new locators, takes
//! over by way of the footers, then the header in its usual place is written and takes over
//! again.

use crate::error::{Error, Result};
use crate::formats::vhd::batmap;
use crate::formats::vhd::create::{new_parent, parent_paths, room, write_paths};
use crate::formats::vhd::footer::Kind;
use crate::formats::vhd::header;
use crate::formats::vhd::open::End;
use crate::formats::vhd::sparse::{Shape, Sparse, read_locators};
use crate::image::create::CreateBacking;
use crate::image::relink::Relink;
use crate::image::units::Units;

impl Relink for Sparse {
    fn may_relink(&self, backing: Option<&CreateBacking>) -> Result<()> {
        self.whole_footer("another parent")?;
        if backing.is_some() && self.kind != Kind::Differencing {
            return Err(Error::unsupported(
                "a dynamic VHD has no parent (allowed: differencing VHDs)",
            ));
        }
        backing.map(|b| new_parent(b, 0)).transpose().map(drop)
    }

    fn relink(&mut self, backing: Option<&CreateBacking>) -> Result<()> {
        self.may_relink(backing)?;
        let kind = match (self.kind, backing) {
            (Kind::Differencing, None) => Kind::Dynamic,
            (_, None) => return Ok(()),
            (kind, Some(_)) => kind,
        };
        self.switch_parent(backing, kind)?;
        self.locators = read_locators(&*self.storage, &self.shape.load().header)?;
        self.kind = kind;
        Ok(())
    }
}

impl Sparse {
    /// Refuses a change that the footers tell of, where there are not two.
    pub(super) fn whole_footer(&self, what: &str) -> Result<()> {
        self.allocator()?;
        match *self.end.lock() {
            End::Killed | End::Damaged(_) => Err(Error::corrupt(format!(
                "the footer at the end is damaged (allowed: {what} after `check -r all`)"
            ))),
            End::Whole | End::Short => Ok(()),
        }
    }

    fn switch_parent(&self, backing: Option<&CreateBacking>, kind: Kind) -> Result<()> {
        let shape = self.shape.load_full();
        let paths = backing.map(parent_paths).unwrap_or_default();
        let rooms: u64 = paths.iter().map(|(_, data)| room(data)).sum();
        let mut space = self.space.lock();
        let host = self.take_bytes(&mut space, &shape, rooms + header::LEN64)?;
        let parent = backing.map(|b| new_parent(b, host)).transpose()?;
        let changed = shape.header.with_parent(parent.as_ref());
        let at = write_paths(&*self.storage, paths, host)?;
        self.storage.write_at(&changed.to_bytes(), at)?;
        self.allocator.order.settle()?;
        let usual = shape.footer.header_offset();
        self.replace_footers(&space, &shape, shape.footer.with_header(at, kind))?;
        self.write_in_order(&changed.to_bytes(), usual)?;
        let footer = shape.footer.with_header(usual, kind);
        // The batmap, where there is one, is read again.
        let now = Shape::new(footer, changed, self.rule, batmap::Found::None);
        self.replace_footers(&space, &now, footer)?;
        self.storage.sync()?;
        self.cut(&mut space, &self.shape.load_full(), at)?;
        self.storage.sync()
    }
}

//! Another parent for a disk, or none, and other names for its files: lines of its descriptor.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use uuid::Uuid;

use crate::error::{Error, Result};
use crate::formats::vmdk::descriptor::NO_CID;
use crate::formats::vmdk::extent::{Data, Extent};
use crate::formats::vmdk::image::Vmdk;
use crate::formats::vmdk::line::ExtentLine;
use crate::formats::vmdk::session::Session;
use crate::image::create::CreateBacking;
use crate::image::relink::{Empty, Relink, Rename};
use crate::image::units::Units;
use crate::util::text::printable;

impl Vmdk {
    /// The descriptor, where it may be changed.
    pub(super) fn changed(&self) -> Result<&Session> {
        let session = self.session.as_deref();
        session.filter(|_| self.write).ok_or_else(Error::read_only)
    }
}

impl Empty for Vmdk {
    fn empty(&mut self) -> Result<()> {
        self.changed()?;
        let written = |extent: &Extent| extent.session().map(drop);
        self.extents.iter().try_for_each(written)?;
        self.extents
            .iter()
            .try_for_each(|extent| match &extent.data {
                Data::Sparse(sparse) => sparse.allocator()?.empty(&**sparse),
                _ => Err(Error::unsupported("an extent of it has all of its part")),
            })
    }
}

impl Relink for Vmdk {
    fn may_relink(&self, backing: Option<&CreateBacking>) -> Result<()> {
        if backing.is_some()
            && !self
                .extents
                .iter()
                .any(|e| matches!(e.data, Data::Sparse(_)))
        {
            return Err(Error::unsupported(
                "a flat VMDK has no parent: it has all of the disk itself",
            ));
        }
        backing.map_or(Ok(()), |backing| check_name(&backing.name))
    }

    fn relink(&mut self, backing: Option<&CreateBacking>) -> Result<()> {
        self.may_relink(backing)?;
        let session = self.changed()?;
        let cid = match backing {
            None => NO_CID,
            // Who does not look at the parent does not know its state; it stays what was recorded.
            Some(backing) if backing.state.is_none() => {
                let recorded = session.descriptor().parent_cid();
                recorded.map_or_else(|| parent_of(backing), Ok)?
            }
            Some(backing) => parent_of(backing)?,
        };
        session.change(|descriptor| {
            descriptor.set("parentCID", format!("{cid:08x}").as_bytes());
            match backing {
                Some(backing) => descriptor.set("parentFileNameHint", backing.name.as_bytes()),
                None => descriptor.remove("parentfilenamehint"),
            }
        })
    }

    fn accept_state(&mut self, state: Uuid) -> Result<()> {
        let cid = cid_of(state);
        self.changed()?
            .change(|descriptor| descriptor.set("parentCID", format!("{cid:08x}").as_bytes()))
    }

    fn renew_state(&mut self) -> Result<()> {
        self.changed()?.renew_state()
    }
}

impl Rename for Vmdk {
    fn rename(&mut self, names: &[&OsStr]) -> Result<()> {
        let session = self.changed()?;
        let mut lines: Vec<ExtentLine> = session.descriptor().extents().cloned().collect();
        let mut named: Vec<&mut ExtentLine> =
            lines.iter_mut().filter(|l| l.name.is_some()).collect();
        if named.len() != names.len() {
            return Err(Error::invalid(format!(
                "{} names for {} extents that have files",
                names.len(),
                named.len()
            )));
        }
        for (line, name) in named.iter_mut().zip(names) {
            check_name(name)?;
            line.name = Some((*name).to_owned());
        }
        session.change(|descriptor| descriptor.set_extents(lines))
    }
}

/// Refuses names that a descriptor cannot have.
fn check_name(name: &OsStr) -> Result<()> {
    match name.as_bytes().iter().any(|b| b"\"\n\r\0".contains(b)) {
        false => Ok(()),
        true => Err(Error::invalid(format!(
            "the name '{}' cannot be written in a descriptor (allowed: no quotes and no line ends)",
            printable(name)
        ))),
    }
}

fn cid_of(state: Uuid) -> u32 {
    u32::try_from(state.as_u128() & u128::from(u32::MAX)).unwrap_or(NO_CID)
}

/// The CID by which a child knows in which state `backing` is.
///
/// # Errors
/// `Unsupported` for what is no VMDK, and for one without a CID; `Invalid` for a name that a descriptor
/// cannot have.
pub(super) fn parent_of(backing: &CreateBacking) -> Result<u32> {
    check_name(&backing.name)?;
    match backing.state {
        Some(state) if backing.format == super::DRIVER.name => Ok(cid_of(state)),
        _ => Err(Error::unsupported(
            "the parent of a VMDK is a VMDK that has a CID",
        )),
    }
}

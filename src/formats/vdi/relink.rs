//! Another parent for a disk, or none: all that is said of it lies in the header's sector.

use uuid::Uuid;

use crate::error::{Error, Result};
use crate::formats::vdi::header::{KIND, Kind, PARENT_ID, PARENT_STATE_ID, STATE_ID};
use crate::formats::vdi::image::Vdi;
use crate::image::create::CreateBacking;
use crate::image::relink::Relink;
use crate::image::units::Units;
use crate::util::random;

impl Relink for Vdi {
    fn may_relink(&self, backing: Option<&CreateBacking>) -> Result<()> {
        self.plan(backing).map(drop)
    }

    fn relink(&mut self, backing: Option<&CreateBacking>) -> Result<()> {
        let Some((kind, identity, state)) = self.plan(backing)? else {
            return Ok(());
        };
        self.rewrite(|header| {
            header.set_word(KIND, kind as u64);
            header.set(PARENT_ID, &identity.to_bytes_le());
            header.set(PARENT_STATE_ID, &state.to_bytes_le());
        })?;
        self.kind = kind;
        Ok(())
    }

    fn accept_state(&mut self, state: Uuid) -> Result<()> {
        self.allocator()?;
        self.rewrite(|header| header.set(PARENT_STATE_ID, &state.to_bytes_le()))
    }

    fn renew_state(&mut self) -> Result<()> {
        self.allocator()?;
        let state = random::uuid()?;
        self.rewrite(|header| header.set(STATE_ID, &state.to_bytes_le()))
    }
}

impl Vdi {
    /// What the header is to say: which kind of disk it is, the parent's identity and its state; nothing
    /// where nothing changes.
    fn plan(&self, backing: Option<&CreateBacking>) -> Result<Option<(Kind, Uuid, Uuid)>> {
        self.allocator()?;
        let kind = match (self.kind, backing) {
            (Kind::Differencing, Some(_)) => Kind::Differencing,
            (Kind::Differencing, None) => Kind::Dynamic,
            (Kind::Dynamic | Kind::Fixed, None) => return Ok(None),
            // Of others, what is free reads as zeroes and would not any more.
            (kind, _) => {
                return Err(Error::unsupported(format!(
                    "a VDI of type '{}' is given no other parent (allowed: differencing)",
                    kind.word()
                )));
            }
        };
        let (identity, state) = match backing {
            Some(backing) => (parent_of(backing)?, backing.state.unwrap_or_default()),
            None => (Uuid::nil(), Uuid::nil()),
        };
        Ok(Some((kind, identity, state)))
    }
}

/// The identity by which a child names `backing`.
///
/// # Errors
/// `Unsupported` for what is no VDI, and for one without identity.
pub(super) fn parent_of(backing: &CreateBacking) -> Result<Uuid> {
    match backing.identity {
        Some(identity) if backing.format == super::DRIVER.name => Ok(identity),
        _ => Err(Error::unsupported(
            "the parent of a VDI is a VDI that has an identity",
        )),
    }
}

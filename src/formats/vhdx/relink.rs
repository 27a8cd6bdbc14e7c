//! Another parent for a disk, or none.

use std::collections::BTreeSet;

use uuid::Uuid;

use crate::error::{Error, Result};
use crate::formats::vhdx::bat::{Block, Shape, Use};
use crate::formats::vhdx::entry::SECTOR;
use crate::formats::vhdx::image::{Vhdx, read_locator};
use crate::formats::vhdx::journal::MAX_PAGES;
use crate::formats::vhdx::locator::Locator;
use crate::image::Wait;
use crate::image::create::CreateBacking;
use crate::image::relink::Relink;
use crate::image::units::Units;
use crate::storage::Zeroing;
use crate::util::align::{clamp_len, down, len64};
use crate::util::random;

/// Bytes of the file that change, by their place.
type Changes = Vec<(u64, Vec<u8>)>;

impl Relink for Vhdx {
    fn may_relink(&self, backing: Option<&CreateBacking>) -> Result<()> {
        self.plan(backing).map(drop)
    }

    fn relink(&mut self, backing: Option<&CreateBacking>) -> Result<()> {
        let Some(changes) = self.plan(backing)? else {
            return Ok(());
        };
        if backing.is_none() {
            self.complete_all()?;
        }
        self.change_metadata(&changes)?;
        self.end_session()
    }

    fn accept_state(&mut self, state: Uuid) -> Result<()> {
        self.allocator()?;
        let locator = self.locator.as_ref().map(|old| old.with_state(state));
        match locator.transpose()? {
            Some(locator) => {
                self.write_locator(Some(&locator))?;
                self.end_session()
            }
            None => Ok(()),
        }
    }

    fn expect_state(&mut self, state: Uuid) -> Result<()> {
        self.allocator()?;
        let locator = self.locator.as_ref().map(|old| old.with_other_state(state));
        match locator.transpose()? {
            Some(locator) => {
                self.write_locator(Some(&locator))?;
                self.end_session()
            }
            None => Ok(()),
        }
    }

    fn renew_state(&mut self) -> Result<()> {
        self.allocator()?;
        self.journal.announce(Some(random::uuid()?))
    }
}

impl Vhdx {
    /// What changes with another parent, or none; nothing where it has none.  All of it fits in one
    /// entry of the log.
    fn plan(&self, backing: Option<&CreateBacking>) -> Result<Option<Changes>> {
        self.allocator()?;
        if self.locator.is_none() {
            return match backing {
                None => Ok(None),
                // What has no space reads as zeroes and would not any more.
                Some(_) => Err(Error::unsupported(format!(
                    "a {} VHDX is given no parent (allowed: differencing)",
                    self.kind()
                ))),
            };
        }
        let shape = self.shape.load_full();
        let own = shape.grid.sector;
        let sector = backing.and_then(|backing| backing.sector_size);
        if sector.is_some_and(|sector| sector != own) {
            return Err(Error::unsupported(format!(
                "a parent with sectors of {} bytes (allowed: {own}, as the disk has it)",
                sector.unwrap_or_default()
            )));
        }
        let locator = backing.map(Locator::new).transpose()?;
        let mut changes = locator_changes(&shape, locator.as_ref())?;
        if locator.is_none() {
            self.add_completions(&shape, &mut changes)?;
        }
        Ok(Some(changes))
    }

    /// Has the metadata name the parent, or none.
    fn write_locator(&mut self, locator: Option<&Locator>) -> Result<()> {
        let changes = locator_changes(&self.shape.load(), locator)?;
        self.change_metadata(&changes)
    }

    /// Changes all of it at once, and goes by it.
    fn change_metadata(&mut self, changes: &Changes) -> Result<()> {
        let changes: Vec<(u64, &[u8])> = changes.iter().map(|(at, b)| (*at, &**b)).collect();
        self.journal.change(&changes)?;
        self.allocator.order.settle()?;
        let shape = self.reread()?;
        self.locator = match shape.metadata.has_parent {
            true => Some(read_locator(&shape, &*self.journal)?),
            false => None,
        };
        Ok(())
    }

    /// Adds the entries of blocks that are here in part, as they are once they are here as a whole, and
    /// those of sector bitmaps, which are gone then.
    ///
    /// # Errors
    /// `Unsupported` for more than one entry of the log holds, with the other changes.
    fn add_completions(&self, shape: &Shape, changes: &mut Changes) -> Result<()> {
        let page = |at: u64| down(at, SECTOR);
        let others = changes.iter().flat_map(|(at, bytes)| {
            (page(*at)..at + len64(bytes.len())).step_by(clamp_len(SECTOR, usize::MAX))
        });
        let mut pages: BTreeSet<u64> = others.collect();
        shape.table.each_stored(&*self.journal, |index, word| {
            let new = match (shape.grid.of(index), Block::from_word(word)) {
                (Use::Block(block), Block::Partial(_)) if block < shape.blocks() => {
                    match self.find(shape, block, Wait::Yes)? {
                        Block::Partial(host) => Block::Present(host).word(),
                        _ => return Ok(()),
                    }
                }
                (Use::Bitmap(_), _) if word != 0 => 0,
                _ => return Ok(()),
            };
            let at = shape.table.host() + index * 8;
            pages.insert(page(at));
            match pages.len() <= MAX_PAGES {
                true => changes.push((at, new.to_le_bytes().to_vec())),
                false => {
                    return Err(Error::unsupported(format!(
                        "blocks that are here in part have entries in more pages of the table than change at once with the parent (allowed: {MAX_PAGES} pages in all; a rebase without -u, or a copy)"
                    )));
                }
            }
            Ok(())
        })
    }

    /// Has the data of blocks that are here in part be there as a whole: what is the parent's reads as
    /// zeroes once their entries say so.
    fn complete_all(&self) -> Result<()> {
        let shape = self.shape.load_full();
        shape.table.each_stored(&*self.journal, |index, word| {
            match (shape.grid.of(index), Block::from_word(word)) {
                (Use::Block(block), Block::Partial(_)) if block < shape.blocks() => {
                    self.complete(&shape, block)
                }
                _ => Ok(()),
            }
        })?;
        self.allocator.order.settle()
    }

    /// Zeroes what of a partially present block is not here.
    fn complete(&self, shape: &Shape, block: u64) -> Result<()> {
        let Block::Partial(host) = self.find(shape, block, Wait::Yes)? else {
            return Ok(());
        };
        let mut at = 0;
        while at < self.block {
            let (here, end) = self.sectors(shape, block, at..self.block, Wait::Yes)?;
            if !here {
                self.zero_within(host, at..end, Zeroing::KeepSpace)?;
            }
            at = end;
        }
        Ok(())
    }
}

/// What changes with the parent locator.
fn locator_changes(shape: &Shape, locator: Option<&Locator>) -> Result<Changes> {
    let item = locator.map(Locator::to_bytes);
    let region = &shape.regions.metadata;
    shape.metadata.with_locator(region, item.as_deref())
}

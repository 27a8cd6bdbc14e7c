//! Another parent for a disk, or none.

use uuid::Uuid;

use crate::error::{Error, Result};
use crate::formats::vhdx::bat::{Block, Shape, Use};
use crate::formats::vhdx::image::{Vhdx, read_locator};
use crate::formats::vhdx::locator::Locator;
use crate::image::Wait;
use crate::image::create::CreateBacking;
use crate::image::relink::Relink;
use crate::image::units::Units;
use crate::storage::Zeroing;
use crate::util::random;

impl Relink for Vhdx {
    fn relink(&mut self, backing: Option<&CreateBacking>) -> Result<()> {
        self.allocator()?;
        if self.locator.is_none() {
            return match backing {
                None => Ok(()),
                // What has no space reads as zeroes and would not any more.
                Some(_) => Err(Error::unsupported(format!(
                    "a {} VHDX is given no parent (allowed: differencing)",
                    self.kind()
                ))),
            };
        }
        let own = self.shape.load().grid.sector;
        let sector = backing.and_then(|backing| backing.sector_size);
        if sector.is_some_and(|sector| sector != own) {
            return Err(Error::unsupported(format!(
                "a parent with sectors of {} bytes (allowed: {own}, as the disk has it)",
                sector.unwrap_or_default()
            )));
        }
        let locator = backing.map(Locator::new).transpose()?;
        if locator.is_none() {
            self.complete_all()?;
        }
        self.write_locator(locator.as_ref())?;
        self.end_session()
    }

    fn accept_state(&mut self, state: Uuid) -> Result<()> {
        self.allocator()?;
        let locator = self.locator.as_ref().map(|old| old.with_state(state));
        match locator {
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
        match locator {
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
    /// Has the metadata name the parent, or none.
    fn write_locator(&mut self, locator: Option<&Locator>) -> Result<()> {
        let shape = self.shape.load_full();
        let item = locator.map(Locator::to_bytes);
        let region = &shape.regions.metadata;
        let changes = shape.metadata.with_locator(region, item.as_deref())?;
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

    /// Has no block be here in part: what is the parent's reads as zeroes.
    fn complete_all(&self) -> Result<()> {
        let shape = self.shape.load_full();
        let mut partial = Vec::new();
        let mut bitmaps = Vec::new();
        shape.table.each_stored(&*self.journal, |index, word| {
            match (shape.grid.of(index), Block::from_word(word)) {
                (Use::Block(block), Block::Partial(_)) => partial.push(block),
                (Use::Bitmap(_), _) if word != 0 => bitmaps.push(index),
                _ => {}
            }
            Ok(())
        })?;
        for block in &partial {
            self.complete(&shape, *block)?;
        }
        self.allocator.order.settle()?;
        for block in partial {
            if let Block::Partial(host) = self.find(&shape, block, Wait::Yes)? {
                let word = Block::Present(host).word();
                shape
                    .table
                    .publish(&*self.journal, shape.grid.index(block), &[word])?;
            }
        }
        for index in bitmaps {
            shape.table.publish(&*self.journal, index, &[0])?;
        }
        Ok(())
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

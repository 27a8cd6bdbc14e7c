//! Metadata items: what the disk is ([MS-VHDX] 2.6).

use std::ops::Range;

use uuid::Uuid;

use crate::error::{Error, Result};
use crate::formats::vhdx::bytes::{MB, guid_at, put, u32_at, u64_at};
use crate::formats::vhdx::items::{
    DISK, ID, Item, KNOWN, LOCATOR, LOGICAL, MAX_ITEM, PARAMETERS, PHYSICAL, REQUIRED, SIZE, TABLE,
    USER, check, find, parse, room, table_of, to_bytes,
};
use crate::storage::Storage;
use crate::util::align::{clamp_len, len64};

/// Flags of the file parameters: all blocks have space; there is a parent.
const LEAVE_ALLOCATED: u32 = 1;
const HAS_PARENT: u32 = 2;

/// Blocks of a disk, in bytes.
pub(super) const BLOCKS: std::ops::RangeInclusive<u64> = MB..=256 << 20;
/// The largest disk.
pub(super) const MAX_DISK: u64 = 64 << 40;

/// What the metadata says.
#[derive(Debug, Clone)]
pub(super) struct Metadata {
    /// Bytes of the disk.
    pub(super) size: u64,
    /// Bytes of a block.
    pub(super) block: u64,
    /// All blocks have space of their own and keep it.
    pub(super) fixed: bool,
    /// The same, as the file says it: of a disk with a parent it means nothing.
    leave: bool,
    /// What the disk does not have itself is in a parent.
    pub(super) has_parent: bool,
    /// What the guest sees as the disk's own name (SCSI page 83).
    pub(super) id: Uuid,
    /// Bytes of a sector: the smallest part that can be written, and what hardware would take.
    pub(super) logical: u64,
    pub(super) physical: u64,
    items: Vec<Item>,
}

impl Metadata {
    /// Reads the metadata in `region`.
    ///
    /// # Errors
    /// `Corrupt`, by item; `Unsupported` for items that must be understood and are not known; the
    /// host's.
    pub(super) fn read(storage: &dyn Storage, region: &Range<u64>) -> Result<Self> {
        let mut table = vec![0; clamp_len(TABLE, usize::MAX)];
        storage.read_at(&mut table, region.start)?;
        let items = parse(&table, region)?;
        check(&items)?;
        let read = |guid, what: &str, len: u64| -> Result<Vec<u8>> {
            let item = find(&items, guid);
            let item = item.ok_or_else(|| {
                Error::corrupt(format!("the metadata has no item {what} ({guid})"))
            })?;
            if item.host.end - item.host.start < len {
                return Err(Error::corrupt(format!(
                    "metadata item {what} has {} bytes (allowed: {len})",
                    item.host.end - item.host.start
                )));
            }
            let mut bytes = vec![0; clamp_len(len, usize::MAX)];
            storage.read_at(&mut bytes, item.host.start)?;
            Ok(bytes)
        };
        let parameters = read(PARAMETERS, "file parameters", 8)?;
        let sector = |guid, what: &str| -> Result<u64> {
            match u32_at(&read(guid, what, 4)?, 0) {
                len @ (512 | 4096) => Ok(len.into()),
                len => Err(Error::corrupt(format!(
                    "the {what} is {len} (allowed: 512, 4096)"
                ))),
            }
        };
        let flags = u32_at(&parameters, 4);
        let metadata = Self {
            size: u64_at(&read(SIZE, "virtual disk size", 8)?, 0),
            block: u32_at(&parameters, 0).into(),
            fixed: flags & LEAVE_ALLOCATED != 0 && flags & HAS_PARENT == 0,
            leave: flags & LEAVE_ALLOCATED != 0,
            has_parent: flags & HAS_PARENT != 0,
            id: guid_at(&read(ID, "virtual disk ID", 16)?, 0),
            logical: sector(LOGICAL, "logical sector size")?,
            physical: sector(PHYSICAL, "physical sector size")?,
            items,
        };
        metadata.check().map(|()| metadata)
    }

    fn check(&self) -> Result<()> {
        if !self.block.is_power_of_two() || !BLOCKS.contains(&self.block) {
            return Err(Error::corrupt(format!(
                "the block size is {} (allowed: powers of two from {} to {})",
                self.block,
                BLOCKS.start(),
                BLOCKS.end()
            )));
        }
        match self.size > 0 && self.size <= MAX_DISK && self.size.is_multiple_of(self.logical) {
            true => Ok(()),
            false => Err(Error::corrupt(format!(
                "the virtual disk size is {} (allowed: multiples of {} from there to {MAX_DISK})",
                self.size, self.logical
            ))),
        }
    }

    /// Where the item is that holds the disk's size.
    pub(super) fn size_at(&self) -> u64 {
        find(&self.items, SIZE).map_or(0, |item| item.host.start)
    }

    /// What says where the parent is.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn locator(&self, storage: &dyn Storage) -> Result<Option<Vec<u8>>> {
        let Some(item) = find(&self.items, LOCATOR) else {
            return Ok(None);
        };
        let len = clamp_len(
            item.host.end - item.host.start,
            clamp_len(MAX_ITEM, usize::MAX),
        );
        let mut bytes = vec![0; len];
        storage.read_at(&mut bytes, item.host.start)?;
        Ok(Some(bytes))
    }

    /// What has to be written, all at once, for another locator or none: ranges of the file.
    ///
    /// # Errors
    /// `NoSpace` where the region, at `region`, has no room for it.
    pub(super) fn with_locator(
        &self,
        region: &Range<u64>,
        locator: Option<&[u8]>,
    ) -> Result<Vec<(u64, Vec<u8>)>> {
        let is_other = |item: &&Item| item.guid != LOCATOR || item.flags & USER != 0;
        let mut items: Vec<Item> = self.items.iter().filter(is_other).cloned().collect();
        let mut changes = Vec::new();
        if let Some(bytes) = locator {
            let host = room(&items, region, len64(bytes.len()))?;
            changes.push((host.start, bytes.to_vec()));
            items.push(Item {
                guid: LOCATOR,
                flags: REQUIRED,
                host,
            });
        }
        changes.push((region.start, table_of(&items, region, self.items.len())));
        let parameters = parameters(self.block, self.leave, locator.is_some());
        if let Some(item) = find(&self.items, PARAMETERS) {
            changes.push((item.host.start, parameters.to_vec()));
        }
        Ok(changes)
    }

    /// How many items there are that only others know.
    pub(super) fn unknown(&self) -> usize {
        let unknown = |item: &&Item| !KNOWN.contains(&item.guid) || item.flags & USER != 0;
        self.items.iter().filter(unknown).count()
    }
}

fn parameters(block: u64, fixed: bool, has_parent: bool) -> [u8; 8] {
    let flags = if fixed { LEAVE_ALLOCATED } else { 0 } | if has_parent { HAS_PARENT } else { 0 };
    let mut bytes = [0; 8];
    put(
        &mut bytes,
        0,
        &u32::try_from(block).unwrap_or(0).to_le_bytes(),
    );
    put(&mut bytes, 4, &flags.to_le_bytes());
    bytes
}

/// What the metadata of a new file says.
#[derive(Debug)]
pub(super) struct NewMetadata<'a> {
    pub(super) size: u64,
    pub(super) block: u64,
    pub(super) fixed: bool,
    pub(super) id: Uuid,
    pub(super) logical: u64,
    pub(super) physical: u64,
    /// What says where the parent is.
    pub(super) locator: Option<&'a [u8]>,
}

impl NewMetadata<'_> {
    /// The bytes of the region, from its start.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let sector = |len: u64| u32::try_from(len).unwrap_or(0).to_le_bytes().to_vec();
        let has_parent = self.locator.is_some();
        let mut items = vec![
            (
                PARAMETERS,
                REQUIRED,
                parameters(self.block, self.fixed, has_parent).to_vec(),
            ),
            (SIZE, REQUIRED | DISK, self.size.to_le_bytes().to_vec()),
            (LOGICAL, REQUIRED | DISK, sector(self.logical)),
            (PHYSICAL, REQUIRED | DISK, sector(self.physical)),
            (ID, REQUIRED | DISK, self.id.to_bytes_le().to_vec()),
        ];
        if let Some(locator) = self.locator {
            items.push((LOCATOR, REQUIRED, locator.to_vec()));
        }
        to_bytes(&items)
    }
}

//! Metadata items: what the disk is ([MS-VHDX] 2.6).

use std::ops::Range;

use uuid::{Uuid, uuid};

use crate::error::{Error, ErrorKind, Result};
use crate::formats::vhdx::bytes::{MB, guid_at, put, u16_at, u32_at, u64_at};
use crate::storage::Storage;
use crate::util::align::{clamp_len, len64};
use crate::util::range::intersect;

const SIGNATURE: &[u8; 8] = b"metadata";
/// Bytes of the table.
pub(super) const TABLE: u64 = 64 << 10;
/// Where its entries begin, and bytes of each.
const ENTRY: usize = 32;
/// Most entries; most of those that users made.
const MAX_ENTRIES: u16 = 2047;
const MAX_USER: usize = 1024;
/// The longest item.
pub(super) const MAX_ITEM: u64 = 1 << 20;

/// Flags of an entry: a user made it; it describes the disk and goes with it; it must be understood.
const USER: u32 = 1;
const DISK: u32 = 2;
const REQUIRED: u32 = 4;

/// Flags of the file parameters: all blocks have space; there is a parent.
const LEAVE_ALLOCATED: u32 = 1;
const HAS_PARENT: u32 = 2;

const PARAMETERS: Uuid = uuid!("caa16737-fa36-4d43-b3b6-33f0aa44e76b");
const SIZE: Uuid = uuid!("2fa54224-cd1b-4876-b211-5dbed83bf4b8");
const ID: Uuid = uuid!("beca12ab-b2e6-4523-93ef-c309e000c746");
const LOGICAL: Uuid = uuid!("8141bf1d-a96f-4709-ba47-f233a8faab5f");
const PHYSICAL: Uuid = uuid!("cda348c7-445d-4471-9cc9-e9885251c556");
const LOCATOR: Uuid = uuid!("a8d35f2d-b30b-454d-abf7-d3d84834ab0c");
/// Known to Microsoft's own reader alone: geometry, and a label of persistent memory.
const CHS: Uuid = uuid!("da02d7bc-3d3a-423c-ac88-2a36ab21479b");
const PMEM: Uuid = uuid!("10e1ae8a-4b7e-4169-a40f-cd70de928393");
/// What a file has until it is made as a whole.
const INCOMPLETE: Uuid = uuid!("71cc85f0-1b69-4e28-9558-c3bf83ae75d3");
const KNOWN: [Uuid; 8] = [PARAMETERS, SIZE, ID, LOGICAL, PHYSICAL, LOCATOR, CHS, PMEM];

/// Blocks of a disk, in bytes.
pub(super) const BLOCKS: std::ops::RangeInclusive<u64> = MB..=256 << 20;
/// The largest disk.
pub(super) const MAX_DISK: u64 = 64 << 40;

/// Where an item is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Item {
    guid: Uuid,
    flags: u32,
    /// In the file.
    pub(super) host: Range<u64>,
}

/// What the metadata says.
#[derive(Debug, Clone)]
pub(super) struct Metadata {
    /// Bytes of the disk.
    pub(super) size: u64,
    /// Bytes of a block.
    pub(super) block: u64,
    /// All blocks have space of their own and keep it.
    pub(super) fixed: bool,
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
            fixed: flags & LEAVE_ALLOCATED != 0,
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
        let mut table = vec![0; ENTRY * (1 + self.items.len().max(items.len()))];
        put(&mut table, 0, SIGNATURE);
        let count = u16::try_from(items.len()).unwrap_or(0);
        put(&mut table, 10, &count.to_le_bytes());
        for (item, at) in items.iter().zip((ENTRY..).step_by(ENTRY)) {
            let len = item.host.end - item.host.start;
            let offset = if len == 0 {
                0
            } else {
                item.host.start - region.start
            };
            put(&mut table, at, &entry(item.guid, item.flags, offset, len));
        }
        changes.push((region.start, table));
        let parameters = parameters(self.block, self.fixed, locator.is_some());
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

fn find(items: &[Item], guid: Uuid) -> Option<&Item> {
    let mut items = items.iter();
    items.find(|item| item.guid == guid && item.flags & USER == 0)
}

/// Where in the region there is room for an item of `len` bytes beside others.
fn room(items: &[Item], region: &Range<u64>, len: u64) -> Result<Range<u64>> {
    let mut hosts: Vec<&Range<u64>> = items.iter().map(|item| &item.host).collect();
    hosts.retain(|host| !host.is_empty());
    hosts.sort_by_key(|host| host.start);
    let mut start = region.start + TABLE;
    for host in hosts {
        if start + len <= host.start {
            break;
        }
        start = start.max(host.end.next_multiple_of(8));
    }
    match len <= MAX_ITEM && start + len <= region.end {
        true => Ok(start..start + len),
        false => Err(Error::new(
            ErrorKind::NoSpace,
            format!("the metadata region has no room for {len} bytes more"),
        )),
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

fn parse(table: &[u8], region: &Range<u64>) -> Result<Vec<Item>> {
    let count = u16_at(table, 10);
    if !table.starts_with(SIGNATURE) || count > MAX_ENTRIES {
        return Err(Error::corrupt(format!(
            "the metadata table at {:#x} has the signature '{}' and {count} entries (allowed: metadata, up to {MAX_ENTRIES})",
            region.start,
            table.get(..8).unwrap_or(&[]).escape_ascii()
        )));
    }
    let room = region.end - region.start;
    let entry = |at: usize| {
        let guid = guid_at(table, at);
        let (offset, len) = (
            u64::from(u32_at(table, at + 16)),
            u64::from(u32_at(table, at + 20)),
        );
        let is_empty = len == 0 && offset == 0;
        if !is_empty && (offset < TABLE || len == 0 || len > MAX_ITEM || offset + len > room) {
            return Err(Error::corrupt(format!(
                "metadata item {guid} is at {offset:#x}, {len:#x} bytes long (allowed: up to {MAX_ITEM:#x} bytes, within {TABLE:#x}..{room:#x} of the region)"
            )));
        }
        let start = region.start + offset;
        Ok(Item {
            guid,
            flags: u32_at(table, at + 24),
            host: start..start + len,
        })
    };
    (ENTRY..)
        .step_by(ENTRY)
        .take(count.into())
        .map(entry)
        .collect()
}

/// Refuses items that must be understood and are not known, and those that contradict each other.
fn check(items: &[Item]) -> Result<()> {
    for item in items {
        let Item { guid, flags, .. } = item;
        if flags & USER != 0 && flags & REQUIRED != 0 {
            return Err(Error::corrupt(format!(
                "metadata item {guid} is a user's and has the flags {flags:#x} (allowed: not {REQUIRED:#x})"
            )));
        }
        if *guid == INCOMPLETE && flags & USER == 0 {
            return Err(Error::corrupt(
                "the file says that it was never made as a whole (the incomplete file item)",
            ));
        }
        if flags & REQUIRED != 0 && !KNOWN.contains(guid) {
            return Err(Error::unsupported(format!(
                "metadata item {guid} must be understood and is not known"
            )));
        }
    }
    let user = items.iter().filter(|item| item.flags & USER != 0).count();
    if user > MAX_USER {
        return Err(Error::corrupt(format!(
            "the metadata has {user} items of users (allowed: up to {MAX_USER})"
        )));
    }
    let mut names: Vec<_> = items
        .iter()
        .map(|item| (item.flags & USER, item.guid))
        .collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::corrupt(format!(
            "metadata item {} is there twice",
            pair[0].1
        )));
    }
    let mut hosts: Vec<&Item> = items.iter().filter(|item| !item.host.is_empty()).collect();
    hosts.sort_by_key(|item| item.host.start);
    match hosts
        .windows(2)
        .find(|p| intersect(&p[0].host, &p[1].host).is_some())
    {
        None => Ok(()),
        Some(pair) => Err(Error::corrupt(format!(
            "metadata items {} and {} overlap",
            pair[0].guid, pair[1].guid
        ))),
    }
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

/// A table and what its entries name, one behind the other.
fn to_bytes(items: &[(Uuid, u32, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = vec![0; clamp_len(TABLE, usize::MAX)];
    put(&mut bytes, 0, SIGNATURE);
    let count = u16::try_from(items.len()).unwrap_or(0);
    put(&mut bytes, 10, &count.to_le_bytes());
    for ((guid, flags, item), at) in items.iter().zip((ENTRY..).step_by(ENTRY)) {
        let entry = entry(*guid, *flags, len64(bytes.len()), len64(item.len()));
        put(&mut bytes, at, &entry);
        bytes.extend(item);
        // Fields of the next one are aligned.
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    bytes
}

fn entry(guid: Uuid, flags: u32, offset: u64, len: u64) -> [u8; ENTRY] {
    let mut bytes = [0; ENTRY];
    put(&mut bytes, 0, &guid.to_bytes_le());
    put(
        &mut bytes,
        16,
        &u32::try_from(offset).unwrap_or(0).to_le_bytes(),
    );
    put(
        &mut bytes,
        20,
        &u32::try_from(len).unwrap_or(0).to_le_bytes(),
    );
    put(&mut bytes, 24, &flags.to_le_bytes());
    bytes
}

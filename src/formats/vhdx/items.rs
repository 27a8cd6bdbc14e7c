//! Metadata items: which there are and where ([MS-VHDX] 2.6.1).

use std::ops::Range;

use uuid::{Uuid, uuid};

use crate::error::{Error, ErrorKind, Result};
use crate::formats::vhdx::bytes::{guid_at, put, u16_at, u32_at};
use crate::util::align::{clamp_len, len64};
use crate::util::range::intersect;

pub(super) const SIGNATURE: &[u8; 8] = b"metadata";
/// Bytes of the table.
pub(super) const TABLE: u64 = 64 << 10;
/// Where its entries begin, and bytes of each.
pub(super) const ENTRY: usize = 32;
/// Most entries; most of those that users made.
pub(super) const MAX_ENTRIES: u16 = 2047;
pub(super) const MAX_USER: usize = 1024;
/// The longest item.
pub(super) const MAX_ITEM: u64 = 1 << 20;

/// Flags of an entry: a user made it; it describes the disk and goes with it; it must be understood.
pub(super) const USER: u32 = 1;
pub(super) const DISK: u32 = 2;
pub(super) const REQUIRED: u32 = 4;

pub(super) const PARAMETERS: Uuid = uuid!("caa16737-fa36-4d43-b3b6-33f0aa44e76b");
pub(super) const SIZE: Uuid = uuid!("2fa54224-cd1b-4876-b211-5dbed83bf4b8");
pub(super) const ID: Uuid = uuid!("beca12ab-b2e6-4523-93ef-c309e000c746");
pub(super) const LOGICAL: Uuid = uuid!("8141bf1d-a96f-4709-ba47-f233a8faab5f");
pub(super) const PHYSICAL: Uuid = uuid!("cda348c7-445d-4471-9cc9-e9885251c556");
pub(super) const LOCATOR: Uuid = uuid!("a8d35f2d-b30b-454d-abf7-d3d84834ab0c");
/// Known to Microsoft's own reader alone: geometry, and a label of persistent memory.
pub(super) const CHS: Uuid = uuid!("da02d7bc-3d3a-423c-ac88-2a36ab21479b");
pub(super) const PMEM: Uuid = uuid!("10e1ae8a-4b7e-4169-a40f-cd70de928393");
/// What a file has until it is made as a whole.
pub(super) const INCOMPLETE: Uuid = uuid!("71cc85f0-1b69-4e28-9558-c3bf83ae75d3");
pub(super) const KNOWN: [Uuid; 8] = [PARAMETERS, SIZE, ID, LOGICAL, PHYSICAL, LOCATOR, CHS, PMEM];

/// Where an item is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Item {
    pub(super) guid: Uuid,
    pub(super) flags: u32,
    /// In the file.
    pub(super) host: Range<u64>,
}

pub(super) fn find(items: &[Item], guid: Uuid) -> Option<&Item> {
    let mut items = items.iter();
    items.find(|item| item.guid == guid && item.flags & USER == 0)
}

/// Where in the region there is room for an item of `len` bytes beside others.
pub(super) fn room(items: &[Item], region: &Range<u64>, len: u64) -> Result<Range<u64>> {
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

pub(super) fn parse(table: &[u8], region: &Range<u64>) -> Result<Vec<Item>> {
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
pub(super) fn check(items: &[Item]) -> Result<()> {
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

/// The table of items in `region`, with zeroes where the old one had more, of `old` entries.
pub(super) fn table_of(items: &[Item], region: &Range<u64>, old: usize) -> Vec<u8> {
    let mut table = vec![0; ENTRY * (1 + old.max(items.len()))];
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
    table
}

/// A table and what its entries name, one behind the other.
pub(super) fn to_bytes(items: &[(Uuid, u32, Vec<u8>)]) -> Vec<u8> {
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

pub(super) fn entry(guid: Uuid, flags: u32, offset: u64, len: u64) -> [u8; ENTRY] {
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

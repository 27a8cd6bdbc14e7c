//! Region tables: where the table of blocks and the metadata are ([MS-VHDX] 2.2.3).

use std::ops::Range;

use uuid::{Uuid, uuid};

use crate::error::{Error, Result};
use crate::formats::vhdx::bytes::{self, MB, guid_at, is_sound, put, u32_at, u64_at};
use crate::storage::Storage;
use crate::util::align::{clamp_len, len64};

const SIGNATURE: &[u8; 4] = b"regi";
/// Where the two copies are.
pub(super) const PLACES: [u64; 2] = [192 << 10, 256 << 10];
/// Bytes of a table.
pub(super) const LEN: usize = 64 << 10;
/// Where the entries begin, and bytes of each.
const FIRST: usize = 16;
const ENTRY: usize = 32;
/// Most entries of a table.
const MAX_ENTRIES: u32 = 2047;

const BAT: Uuid = uuid!("2dc27766-f623-4200-9d64-115e9bfd4a08");
const METADATA: Uuid = uuid!("8b7ca206-4790-4b9a-b8fe-575f050f886e");

/// One region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Region {
    guid: Uuid,
    pub(super) host: Range<u64>,
    required: bool,
}

/// All regions of a file.
#[derive(Debug, Clone)]
pub(super) struct Regions {
    all: Vec<Region>,
    /// Where the table of blocks is.
    pub(super) bat: Range<u64>,
    /// Where the metadata is.
    pub(super) metadata: Range<u64>,
    /// What is wrong with one of the copies.
    pub(super) fault: Option<String>,
}

impl Regions {
    /// The regions of a new file.
    pub(super) fn new(bat: Range<u64>, metadata: Range<u64>) -> Self {
        let region = |guid, host: &Range<u64>| Region {
            guid,
            host: host.clone(),
            required: true,
        };
        Self {
            all: vec![region(BAT, &bat), region(METADATA, &metadata)],
            bat,
            metadata,
            fault: None,
        }
    }

    /// Reads the table from the first copy that is valid; `log` is where the log is.
    ///
    /// # Errors
    /// `Corrupt` for places that cannot be; `Unsupported` for regions that one must know and we do not,
    /// by name; the host's.
    pub(super) fn read(storage: &dyn Storage, log: &Range<u64>) -> Result<Self> {
        let mut copies = Vec::new();
        for place in PLACES {
            let mut bytes = vec![0; LEN];
            storage.read_at(&mut bytes, place)?;
            copies.push(bytes);
        }
        let sound = [0, 1].map(|n: usize| is_sound(&copies[n], SIGNATURE));
        let wrong = |n: usize| {
            format!(
                "region table {} at {:#x} has a wrong signature or checksum",
                n + 1,
                PLACES[n]
            )
        };
        let (bytes, fault) = match sound {
            [true, true] if copies[0] != copies[1] => (
                &copies[0],
                Some("the two region tables differ; the first one counts".to_owned()),
            ),
            [true, true] => (&copies[0], None),
            [true, false] => (&copies[0], Some(wrong(1))),
            [false, true] => (&copies[1], Some(wrong(0))),
            [false, false] => {
                let text =
                    "neither region table, at 0x30000 and 0x40000, has its signature and checksum";
                return Err(Error::corrupt(text));
            }
        };
        let all = parse(bytes)?;
        check(&all, log, storage.size())?;
        let find = |guid, what| {
            let region = all.iter().find(|region: &&Region| region.guid == guid);
            region.map(|region| region.host.clone()).ok_or_else(|| {
                Error::corrupt(format!("the region table names no {what} region ({guid})"))
            })
        };
        let (bat, metadata) = (find(BAT, "BAT")?, find(METADATA, "metadata")?);
        Ok(Self {
            bat,
            metadata,
            fault,
            all,
        })
    }

    /// Where the regions are that only others know.
    pub(super) fn optional(&self) -> impl Iterator<Item = &Range<u64>> {
        let known = |region: &&Region| [BAT, METADATA].contains(&region.guid);
        let optional = self.all.iter().filter(move |region| !known(region));
        optional.map(|region| &region.host)
    }

    /// Which region does not lie inside a file of `size` bytes, where one does not: what grows the file
    /// would take its place.
    pub(super) fn beyond(&self, size: u64) -> Option<String> {
        let region = self.all.iter().find(|region| region.host.end > size)?;
        Some(format!(
            "region {} is at {:#x}..{:#x}, and the file has {size:#x} bytes",
            region.guid, region.host.start, region.host.end
        ))
    }

    /// The same with the table of blocks elsewhere.
    pub(super) fn with_bat(&self, bat: Range<u64>) -> Self {
        let mut new = self.clone();
        for region in new.all.iter_mut().filter(|region| region.guid == BAT) {
            region.host = bat.clone();
        }
        new.bat = bat;
        new
    }

    /// The bytes of a table.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; LEN];
        put(&mut bytes, 0, SIGNATURE);
        let count = u32::try_from(self.all.len()).unwrap_or(0);
        put(&mut bytes, 8, &count.to_le_bytes());
        for (region, at) in self.all.iter().zip((FIRST..).step_by(ENTRY)) {
            let len = u32::try_from(region.host.end - region.host.start).unwrap_or(0);
            put(&mut bytes, at, &region.guid.to_bytes_le());
            put(&mut bytes, at + 16, &region.host.start.to_le_bytes());
            put(&mut bytes, at + 24, &len.to_le_bytes());
            put(
                &mut bytes,
                at + 28,
                &u32::from(region.required).to_le_bytes(),
            );
        }
        bytes::seal(&mut bytes);
        bytes
    }
}

fn parse(bytes: &[u8]) -> Result<Vec<Region>> {
    let count = u32_at(bytes, 8);
    if count > MAX_ENTRIES {
        return Err(Error::corrupt(format!(
            "the region table has {count} entries (allowed: up to {MAX_ENTRIES})"
        )));
    }
    let places = (FIRST..)
        .step_by(ENTRY)
        .take(clamp_len(count.into(), usize::MAX));
    let entry = |at: usize| {
        let (guid, flags) = (guid_at(bytes, at), u32_at(bytes, at + 28));
        let (start, len) = (u64_at(bytes, at + 16), u32_at(bytes, at + 24));
        if flags > 1 {
            return Err(Error::unsupported(format!(
                "region {guid} has the flags {flags:#x} (allowed: 0x1)"
            )));
        }
        let end = start.checked_add(len.into()).filter(|end| *end < 1 << 63);
        let aligned = start.is_multiple_of(MB) && u64::from(len).is_multiple_of(MB);
        match end.filter(|_| aligned && start >= MB && len > 0) {
            Some(end) => Ok(Region {
                guid,
                host: start..end,
                required: flags == 1,
            }),
            None => Err(Error::corrupt(format!(
                "region {guid} is at {start:#x}, {len:#x} bytes long (allowed: multiples of {MB:#x}, from {MB:#x} on)"
            ))),
        }
    };
    places.map(entry).collect()
}

/// Refuses regions that overlap each other or the log, lie outside the file, or are not known where
/// they must be.
fn check(all: &[Region], log: &Range<u64>, size: u64) -> Result<()> {
    let mut hosts: Vec<(&Range<u64>, Option<Uuid>)> = Vec::with_capacity(all.len() + 1);
    for region in all {
        let known = [BAT, METADATA].contains(&region.guid);
        if region.required && !known {
            return Err(Error::unsupported(format!(
                "region {} must be understood and is not known (allowed: BAT, metadata, optional ones)",
                region.guid
            )));
        }
        if known && region.host.end > size {
            return Err(Error::corrupt(format!(
                "region {} is at {:#x}..{:#x} (allowed: inside the file of {size:#x} bytes)",
                region.guid, region.host.start, region.host.end
            )));
        }
        hosts.push((&region.host, Some(region.guid)));
    }
    if !log.is_empty() {
        hosts.push((log, None));
    }
    hosts.sort_by_key(|(host, _)| host.start);
    let name =
        |guid: Option<Uuid>| guid.map_or("the log".to_owned(), |guid| format!("region {guid}"));
    for pair in hosts.windows(2) {
        let [(a, first), (b, second)] = [pair[0], pair[1]];
        if a.end > b.start {
            return Err(Error::corrupt(format!(
                "{} at {:#x}..{:#x} overlaps {} at {:#x}..{:#x}",
                name(first),
                a.start,
                a.end,
                name(second),
                b.start,
                b.end
            )));
        }
    }
    let mut guids: Vec<Uuid> = all.iter().map(|region| region.guid).collect();
    guids.sort_unstable();
    guids.dedup();
    match len64(guids.len()) == len64(all.len()) {
        true => Ok(()),
        false => Err(Error::corrupt("two regions have the same GUID")),
    }
}

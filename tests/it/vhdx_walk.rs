//! A walk through a VHDX file by the specification, written apart from the driver: what Hyper-V asks
//! of a file that was closed.

use std::collections::BTreeMap;

use crate::vhdx_made::{
    BAT_REGION, ID, LOCATOR, LOGICAL, METADATA_REGION, MIB, PARAMETERS, PHYSICAL, SIZE, at, crc32c,
    guid,
};

/// What a walk finds.
#[derive(Debug)]
pub(crate) struct Walked {
    pub(crate) size: u64,
    pub(crate) block: u64,
    pub(crate) logical: u64,
    /// Where each block is that has space; `None`: it says zero.
    pub(crate) blocks: BTreeMap<u64, Option<u64>>,
    pub(crate) pairs: BTreeMap<String, String>,
    pub(crate) state: [u8; 16],
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight"))
}

fn is_sealed(bytes: &[u8]) -> bool {
    let mut zeroed = bytes.to_vec();
    zeroed[4..8].fill(0);
    crc32c(&zeroed) == u32_at(bytes, 4)
}

/// Takes `host` for one thing.
fn claim(taken: &mut Vec<(u64, u64)>, host: u64, len: u64, file: &[u8]) {
    assert!(host >= MIB && host.is_multiple_of(MIB), "{host:#x}");
    assert!(len.is_multiple_of(MIB) && len > 0, "{len:#x}");
    assert!(
        host + len <= file.len() as u64,
        "{host:#x} is behind the end"
    );
    let meets = |(start, end): &(u64, u64)| host < *end && *start < host + len;
    assert!(!taken.iter().any(meets), "{host:#x} overlaps");
    taken.push((host, host + len));
}

/// Walks through a file that was closed, and fails where a rule is broken.
pub(crate) fn walk(file: &[u8]) -> Walked {
    assert_eq!(&file[..8], b"vhdxfile");
    assert!((file.len() as u64).is_multiple_of(MIB), "{:#x}", file.len());
    let mut taken = Vec::new();
    // Both headers are valid and one counts; the log is empty.
    let heads = [64 << 10, 128 << 10].map(|start| &file[start..start + 4096]);
    for head in heads {
        assert!(&head[..4] == b"head" && is_sealed(head));
        assert_eq!(head[48..64], [0; 16], "the log is empty");
        assert_eq!((u32_at(head, 64), u32_at(head, 64) >> 16), (1 << 16, 1));
        assert!(head[80..].iter().all(|byte| *byte == 0));
        assert_ne!(head[16..32], [0; 16]);
        assert_ne!(head[32..48], [0; 16]);
    }
    assert_ne!(u64_at(heads[0], 8), u64_at(heads[1], 8));
    assert_eq!(heads[0][32..48], heads[1][32..48], "one state");
    claim(
        &mut taken,
        u64_at(heads[0], 72),
        u32_at(heads[0], 68).into(),
        file,
    );
    // Both region tables are alike.
    let table = &file[192 << 10..256 << 10];
    assert!(&table[..4] == b"regi" && is_sealed(table));
    assert_eq!(table, &file[256 << 10..320 << 10]);
    let mut regions = BTreeMap::new();
    for entry in table[16..].chunks(32).take(at(u32_at(table, 8).into())) {
        let (host, len) = (u64_at(entry, 16), u64::from(u32_at(entry, 24)));
        claim(&mut taken, host, len, file);
        let flags = u32_at(entry, 28);
        assert!(flags <= 1);
        regions.insert(entry[..16].to_vec(), (host, len, flags));
    }
    let (metadata, metadata_len, 1) = regions[&guid(METADATA_REGION)[..]] else {
        panic!("the metadata is required")
    };
    let items = metadata_items(&file[at(metadata)..at(metadata + metadata_len)]);
    let get = |name: &str, flags: u32| {
        let (found, bytes) = items
            .get(&guid(name)[..])
            .unwrap_or_else(|| panic!("{name}"));
        assert_eq!(*found, flags, "{name}");
        bytes
    };
    let parameters = get(PARAMETERS, 4);
    let block = u64::from(u32_at(parameters, 0));
    let flags = u32_at(parameters, 4);
    let size = u64_at(get(SIZE, 6), 0);
    let logical = u64::from(u32_at(get(LOGICAL, 6), 0));
    assert!([512, 4096].contains(&u32_at(get(PHYSICAL, 6), 0)));
    assert!([512, 4096].contains(&logical) && size.is_multiple_of(logical));
    assert!(block.is_power_of_two() && (MIB..=256 * MIB).contains(&block));
    assert_eq!(get(ID, 6).len(), 16);
    let is_child = flags & 2 != 0;
    let pairs = match is_child {
        true => locator_pairs(get(LOCATOR, 4)),
        false => {
            assert!(!items.contains_key(&guid(LOCATOR)[..]));
            BTreeMap::new()
        }
    };
    let (bat, bat_len, 1) = regions[&guid(BAT_REGION)[..]] else {
        panic!("the table is required")
    };
    let ratio = (1 << 23) * logical / block;
    let count = size.div_ceil(block);
    let needed = match is_child {
        true => count.div_ceil(ratio) * (ratio + 1),
        false => count + (count - 1) / ratio,
    };
    assert!(needed * 8 <= bat_len);
    let mut blocks = BTreeMap::new();
    for number in 0..count {
        let word = u64_at(file, at(bat + (number + number / ratio) * 8));
        assert_eq!(word & 0xf_fff8, 0, "reserved bits of {word:#x}");
        match word & 7 {
            6 => {
                claim(&mut taken, word & !0xf_ffff, block, file);
                blocks.insert(number, Some(word & !0xf_ffff));
            }
            0 | 2 => {
                assert_eq!(word >> 20, 0, "no place of what has none");
                assert_eq!(flags & 1, 0, "fixed disks have all blocks");
                if word == 2 {
                    blocks.insert(number, None);
                }
            }
            other => panic!("block {number} has the state {other}"),
        }
    }
    for chunk in 0..needed / (ratio + 1) {
        let word = u64_at(file, at(bat + (chunk * (ratio + 1) + ratio) * 8));
        assert_eq!(word, 0, "no sector bitmap is needed");
    }
    Walked {
        size,
        block,
        logical,
        blocks,
        pairs,
        state: heads[0][32..48].try_into().expect("sixteen"),
    }
}

fn metadata_items(region: &[u8]) -> BTreeMap<Vec<u8>, (u32, Vec<u8>)> {
    assert_eq!(&region[..8], b"metadata");
    assert!(region[12..32].iter().all(|byte| *byte == 0));
    let count = usize::from(u16::from_le_bytes([region[10], region[11]]));
    let mut items = BTreeMap::new();
    let mut places: Vec<(usize, usize)> = Vec::new();
    for entry in region[32..].chunks(32).take(count) {
        let (offset, len) = (at(u32_at(entry, 16).into()), at(u32_at(entry, 20).into()));
        assert!(offset >= 64 << 10 && offset + len <= region.len());
        assert!(
            places
                .iter()
                .all(|(start, end)| offset + len <= *start || *end <= offset)
        );
        places.push((offset, offset + len));
        let item = (u32_at(entry, 24), region[offset..offset + len].to_vec());
        assert!(items.insert(entry[..16].to_vec(), item).is_none());
    }
    items
}

fn locator_pairs(item: &[u8]) -> BTreeMap<String, String> {
    let count = usize::from(u16::from_le_bytes([item[18], item[19]]));
    let text = |start: u32, len: &[u8]| {
        let len = usize::from(u16::from_le_bytes([len[0], len[1]]));
        let units = item[at(start.into())..][..len].chunks(2);
        let units: Vec<u16> = units.map(|u| u16::from_le_bytes([u[0], u[1]])).collect();
        String::from_utf16(&units).expect("is text")
    };
    let entries = item[20..].chunks(12).take(count);
    let pair = |e: &[u8]| (text(u32_at(e, 0), &e[8..]), text(u32_at(e, 4), &e[10..]));
    entries.map(pair).collect()
}

impl Walked {
    /// The disk's bytes over those of its parent.
    pub(crate) fn content(&self, file: &[u8], parent: &[u8]) -> Vec<u8> {
        let mut disk = parent.to_vec();
        disk.resize(at(self.size), 0);
        for (number, host) in &self.blocks {
            let start = number * self.block;
            let len = at(self.block.min(self.size - start));
            let part = &mut disk[at(start)..at(start) + len];
            match host {
                Some(host) => part.copy_from_slice(&file[at(*host)..at(*host) + len]),
                None => part.fill(0),
            }
        }
        disk
    }
}

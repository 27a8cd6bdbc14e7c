//! VHDX files made by the specification, apart from the driver: every field as a test wants it.

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const LOG: u64 = MIB;
pub(crate) const METADATA: u64 = 2 * MIB;
pub(crate) const BAT: u64 = 3 * MIB;
/// Where blocks begin.
pub(crate) const DATA: u64 = 4 * MIB;

pub(crate) const BAT_REGION: &str = "2dc27766-f623-4200-9d64-115e9bfd4a08";
pub(crate) const METADATA_REGION: &str = "8b7ca206-4790-4b9a-b8fe-575f050f886e";
pub(crate) const PARAMETERS: &str = "caa16737-fa36-4d43-b3b6-33f0aa44e76b";
pub(crate) const SIZE: &str = "2fa54224-cd1b-4876-b211-5dbed83bf4b8";
pub(crate) const ID: &str = "beca12ab-b2e6-4523-93ef-c309e000c746";
pub(crate) const LOGICAL: &str = "8141bf1d-a96f-4709-ba47-f233a8faab5f";
pub(crate) const PHYSICAL: &str = "cda348c7-445d-4471-9cc9-e9885251c556";
pub(crate) const LOCATOR: &str = "a8d35f2d-b30b-454d-abf7-d3d84834ab0c";
pub(crate) const LOCATOR_TYPE: &str = "b04aefb7-d19e-4a81-b789-25b8e9445913";
pub(crate) const INCOMPLETE: &str = "71cc85f0-1b69-4e28-9558-c3bf83ae75d3";
/// The log of a file that has one.
pub(crate) const LOG_GUID: &str = "11111111-2222-4333-8444-555555555555";
/// The state of a file.
pub(crate) const STATE: &str = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee";

/// The bytes of a GUID on disk.
pub(crate) fn guid(text: &str) -> [u8; 16] {
    uuid::Uuid::parse_str(text).expect("is one").to_bytes_le()
}

/// CRC-32C, bit by bit.
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| match crc & 1 {
        1 => crc >> 1 ^ 0x82f6_3b78,
        _ => crc >> 1,
    };
    let byte = |crc: u32, byte: &u8| (0..8).fold(crc ^ u32::from(*byte), step);
    !bytes.iter().fold(u32::MAX, byte)
}

/// Puts a structure's checksum where it belongs.
pub(crate) fn seal(bytes: &mut [u8]) {
    bytes[4..8].fill(0);
    let crc = crc32c(bytes);
    bytes[4..8].copy_from_slice(&crc.to_le_bytes());
}

pub(crate) fn at(offset: u64) -> usize {
    usize::try_from(offset).expect("fits")
}

/// An entry of a region table or of the metadata table.
#[derive(Debug, Clone)]
pub(crate) struct Region {
    pub(crate) guid: &'static str,
    pub(crate) offset: u64,
    pub(crate) len: u32,
    pub(crate) flags: u32,
}

/// A metadata item.
#[derive(Debug, Clone)]
pub(crate) struct Item {
    pub(crate) guid: &'static str,
    pub(crate) flags: u32,
    pub(crate) bytes: Vec<u8>,
    /// Its place in the region and its length, where that is not as it should be.
    pub(crate) place: Option<(u32, u32)>,
}

pub(crate) fn item(guid: &'static str, flags: u32, bytes: &[u8]) -> Item {
    Item {
        guid,
        flags,
        bytes: bytes.to_vec(),
        place: None,
    }
}

/// A header.
#[derive(Debug, Clone)]
pub(crate) struct Head {
    pub(crate) sequence: u64,
    pub(crate) state: &'static str,
    pub(crate) log: Option<&'static str>,
    pub(crate) log_version: u16,
    pub(crate) version: u16,
    pub(crate) log_len: u32,
    pub(crate) log_offset: u64,
}

impl Head {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, b"head");
        put(8, &self.sequence.to_le_bytes());
        put(16, &[7; 16]);
        put(32, &guid(self.state));
        put(48, &self.log.map_or([0; 16], guid));
        put(64, &self.log_version.to_le_bytes());
        put(66, &self.version.to_le_bytes());
        put(68, &self.log_len.to_le_bytes());
        put(72, &self.log_offset.to_le_bytes());
        seal(&mut bytes);
        bytes
    }
}

/// A file.
#[derive(Debug, Clone)]
pub(crate) struct Made {
    pub(crate) heads: [Head; 2],
    pub(crate) regions: Vec<Region>,
    pub(crate) items: Vec<Item>,
    /// Words of the table.
    pub(crate) words: Vec<(u64, u64)>,
    /// Bytes of the log, by offset in it.
    pub(crate) log: Vec<(u64, Vec<u8>)>,
    /// Other bytes, by offset in the file.
    pub(crate) bytes: Vec<(u64, Vec<u8>)>,
    /// Length of the file.
    pub(crate) len: u64,
}

/// A dynamic disk of `size` bytes without any block, in a file of 12 MiB.
pub(crate) fn made(size: u64, block: u64) -> Made {
    let head = Head {
        sequence: 5,
        state: STATE,
        log: None,
        log_version: 0,
        version: 1,
        log_len: 1 << 20,
        log_offset: LOG,
    };
    let region = |guid, offset| Region {
        guid,
        offset,
        len: 1 << 20,
        flags: 1,
    };
    let other = Head {
        sequence: 4,
        state: "99999999-9999-4999-8999-999999999999",
        ..head.clone()
    };
    let mut made = Made {
        heads: [other, head],
        regions: vec![region(BAT_REGION, BAT), region(METADATA_REGION, METADATA)],
        items: vec![
            item(PARAMETERS, 4, &[]),
            item(SIZE, 6, &size.to_le_bytes()),
            item(LOGICAL, 6, &512_u32.to_le_bytes()),
            item(PHYSICAL, 6, &4096_u32.to_le_bytes()),
            item(ID, 6, &[3; 16]),
        ],
        words: Vec::new(),
        log: Vec::new(),
        bytes: Vec::new(),
        len: 12 * MIB,
    };
    made.parameters(block, 0);
    made
}

impl Made {
    pub(crate) fn parameters(&mut self, block: u64, flags: u32) {
        let block = u32::try_from(block).expect("fits");
        let bytes = [block.to_le_bytes(), flags.to_le_bytes()].concat();
        self.item(PARAMETERS).bytes = bytes;
    }

    pub(crate) fn item(&mut self, guid: &str) -> &mut Item {
        let mut items = self.items.iter_mut();
        items.find(|item| item.guid == guid).expect("is there")
    }

    /// A child, with pairs of its locator.
    pub(crate) fn child(mut self, block: u64, pairs: &[(&str, &str)]) -> Self {
        self.parameters(block, 2);
        self.items.push(item(LOCATOR, 4, &locator(pairs)));
        self
    }

    pub(crate) fn sectors(mut self, logical: u32) -> Self {
        self.item(LOGICAL).bytes = logical.to_le_bytes().to_vec();
        self
    }

    pub(crate) fn word(mut self, index: u64, word: u64) -> Self {
        self.words.push((index, word));
        self
    }

    pub(crate) fn fill(mut self, host: u64, len: u64, byte: u8) -> Self {
        self.bytes.push((host, vec![byte; at(len)]));
        self
    }

    /// With these entries in its log, each at an offset of the ring.
    pub(crate) fn logged(mut self, entries: Vec<(u64, Vec<u8>)>) -> Self {
        self.heads[1].log = Some(LOG_GUID);
        self.log = entries;
        self
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut file = vec![0; at(self.len)];
        let mut put = |host: u64, bytes: &[u8]| {
            file[at(host)..at(host) + bytes.len()].copy_from_slice(bytes);
        };
        put(0, b"vhdxfile");
        put(
            8,
            &"somebody"
                .encode_utf16()
                .flat_map(u16::to_le_bytes)
                .collect::<Vec<_>>(),
        );
        for (head, host) in self.heads.iter().zip([64 << 10, 128 << 10]) {
            put(host, &head.bytes());
        }
        let regions = self.region_table();
        put(192 << 10, &regions);
        put(256 << 10, &regions);
        put(METADATA, &self.metadata());
        for (index, word) in &self.words {
            put(BAT + index * 8, &word.to_le_bytes());
        }
        for (offset, bytes) in &self.log {
            let (first, rest) = bytes.split_at(bytes.len().min(at(MIB - offset)));
            put(LOG + offset, first);
            put(LOG, rest);
        }
        for (host, bytes) in &self.bytes {
            put(*host, bytes);
        }
        file
    }

    pub(crate) fn region_table(&self) -> Vec<u8> {
        let mut bytes = vec![0; 64 << 10];
        bytes[..4].copy_from_slice(b"regi");
        let count = u32::try_from(self.regions.len()).expect("few");
        bytes[8..12].copy_from_slice(&count.to_le_bytes());
        for (region, at) in self.regions.iter().zip((16..).step_by(32)) {
            bytes[at..at + 16].copy_from_slice(&guid(region.guid));
            bytes[at + 16..at + 24].copy_from_slice(&region.offset.to_le_bytes());
            bytes[at + 24..at + 28].copy_from_slice(&region.len.to_le_bytes());
            bytes[at + 28..at + 32].copy_from_slice(&region.flags.to_le_bytes());
        }
        seal(&mut bytes);
        bytes
    }

    fn metadata(&self) -> Vec<u8> {
        let mut bytes = vec![0; 64 << 10];
        bytes[..8].copy_from_slice(b"metadata");
        let count = u16::try_from(self.items.len()).expect("few");
        bytes[10..12].copy_from_slice(&count.to_le_bytes());
        for (item, at) in self.items.iter().zip((32..).step_by(32)) {
            let end = u32::try_from(bytes.len()).expect("fits");
            let len = u32::try_from(item.bytes.len()).expect("fits");
            let (offset, len) = item.place.unwrap_or((end, len));
            bytes[at..at + 16].copy_from_slice(&guid(item.guid));
            bytes[at + 16..at + 20].copy_from_slice(&offset.to_le_bytes());
            bytes[at + 20..at + 24].copy_from_slice(&len.to_le_bytes());
            bytes[at + 24..at + 28].copy_from_slice(&item.flags.to_le_bytes());
            bytes.extend(&item.bytes);
        }
        bytes
    }
}

/// A parent locator.
pub(crate) fn locator(pairs: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = guid(LOCATOR_TYPE).to_vec();
    bytes.extend([0, 0]);
    bytes.extend(u16::try_from(pairs.len()).expect("few").to_le_bytes());
    let mut texts = Vec::new();
    let first = 20 + 12 * pairs.len();
    let mut lens = Vec::new();
    for text in pairs.iter().flat_map(|(key, value)| [key, value]) {
        let start = u32::try_from(first + texts.len()).expect("fits");
        let len = texts.len();
        texts.extend(text.encode_utf16().flat_map(u16::to_le_bytes));
        lens.push((start, u16::try_from(texts.len() - len).expect("fits")));
    }
    for pair in lens.chunks(2) {
        bytes.extend(pair[0].0.to_le_bytes());
        bytes.extend(pair[1].0.to_le_bytes());
        bytes.extend(pair[0].1.to_le_bytes());
        bytes.extend(pair[1].1.to_le_bytes());
    }
    bytes.extend(texts);
    bytes
}

/// A change that a log entry makes.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    Page(u64, Vec<u8>),
    Zero(u64, u64),
}

/// An entry of the log.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) sequence: u64,
    pub(crate) tail: u32,
    pub(crate) flushed: u64,
    pub(crate) last: u64,
    pub(crate) changes: Vec<Change>,
    /// Its length as its header has it, where that is wrong.
    pub(crate) len: Option<u32>,
    /// How many descriptors it says there are, where that is wrong.
    pub(crate) count: Option<u32>,
}

pub(crate) fn entry(sequence: u64, tail: u32, changes: &[Change]) -> Entry {
    Entry {
        sequence,
        tail,
        flushed: 0,
        last: 12 * MIB,
        changes: changes.to_vec(),
        len: None,
        count: None,
    }
}

impl Entry {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let table = (64 + 32 * self.changes.len()).next_multiple_of(4096);
        let mut bytes = vec![0; table];
        for (number, change) in self.changes.iter().enumerate() {
            let mut descriptor = [0; 32];
            match change {
                Change::Page(host, page) => {
                    descriptor[..4].copy_from_slice(b"desc");
                    descriptor[4..8].copy_from_slice(&page[4092..]);
                    descriptor[8..16].copy_from_slice(&page[..8]);
                    descriptor[16..24].copy_from_slice(&host.to_le_bytes());
                    let mut sector = page.clone();
                    let words = self.sequence.to_le_bytes();
                    sector[..4].copy_from_slice(b"data");
                    sector[4..8].copy_from_slice(&words[4..]);
                    sector[4092..].copy_from_slice(&words[..4]);
                    bytes.extend(sector);
                }
                Change::Zero(host, len) => {
                    descriptor[..4].copy_from_slice(b"zero");
                    descriptor[8..16].copy_from_slice(&len.to_le_bytes());
                    descriptor[16..24].copy_from_slice(&host.to_le_bytes());
                }
            }
            descriptor[24..].copy_from_slice(&self.sequence.to_le_bytes());
            let at = 64 + 32 * number;
            bytes[at..at + 32].copy_from_slice(&descriptor);
        }
        let len = u32::try_from(bytes.len()).expect("fits");
        let count = u32::try_from(self.changes.len()).expect("few");
        bytes[..4].copy_from_slice(b"loge");
        bytes[8..12].copy_from_slice(&self.len.unwrap_or(len).to_le_bytes());
        bytes[12..16].copy_from_slice(&self.tail.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.count.unwrap_or(count).to_le_bytes());
        bytes[32..48].copy_from_slice(&guid(LOG_GUID));
        bytes[48..56].copy_from_slice(&self.flushed.to_le_bytes());
        bytes[56..64].copy_from_slice(&self.last.to_le_bytes());
        seal(&mut bytes);
        bytes
    }
}

/// A page of the table with these words.
pub(crate) fn table_page(words: &[(u64, u64)]) -> Change {
    let mut page = vec![0; 4096];
    for (index, word) in words {
        page[at(index * 8)..at(index * 8) + 8].copy_from_slice(&word.to_le_bytes());
    }
    Change::Page(BAT, page)
}

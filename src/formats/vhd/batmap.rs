//! XenServer's batmap: one bit per block, set where the block is wholly present, so that its
//! bitmap need not be read.

use std::ops::Range;

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{Error, Result};
use crate::formats::vhd::footer::Footer;
use crate::formats::vhd::header::Header;
use crate::storage::Storage;
use crate::util::align::{self, clamp_len};

/// Length of its header in bytes.
pub(super) const LEN: usize = 512;
/// Where in it the marker is.
pub(super) const MARKER: u64 = 24 + 4;
/// Largest map we read, in bytes: eight million blocks.
const MAX_MAP: u64 = 1 << 20;
const COOKIE: [u8; 8] = *b"tdbatmap";
/// The version whose checksum is well defined; 1.1 summed signed bytes.
const VERSION: u32 = 0x0001_0002;

/// The bytes; big-endian.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawBatmap {
    /// "tdbatmap".
    cookie: [u8; 8],
    /// Offset of the map.
    offset: U64,
    /// Its length in sectors.
    sectors: U32,
    /// Version, major and minor.
    version: U32,
    /// Complement of the sum of the map's bytes.
    checksum: U32,
    /// XenServer's own.
    marker: u8,
    /// 1 where a key is recorded: the data is encrypted.
    key_cookie: u8,
    /// Number used once, hashed with the key.
    key_nonce: [u8; 32],
    /// SHA-256 of nonce and key.
    key_hash: [u8; 32],
    /// Zero.
    reserved: [u8; 418],
}

const _: () = assert!(size_of::<RawBatmap>() == LEN);
const _: () = assert!(std::mem::offset_of!(RawBatmap, marker) as u64 == MARKER);

/// A batmap that can be trusted.
#[derive(Debug)]
pub(super) struct Batmap {
    bits: Box<[u8]>,
    ranges: [Range<u64>; 2],
    marker: u8,
}

/// What was found where a batmap is due.
#[derive(Debug)]
pub(super) enum Found {
    /// The creator writes none.
    None,
    /// One that can be trusted.
    Trusted(Batmap),
    /// One that cannot, and why.
    Damaged(String),
}

impl Batmap {
    /// Whether the map says that the block is wholly present.
    pub(super) fn is_full(&self, block: u64) -> bool {
        let byte = clamp_len(block / 8, usize::MAX);
        let bit = 0x80u8 >> (block % 8);
        self.bits.get(byte).is_some_and(|b| b & bit != 0)
    }

    /// XenServer's own.
    pub(super) fn marker(&self) -> u8 {
        self.marker
    }

    /// The bytes of the file that it occupies.
    pub(super) fn ranges(&self) -> &[Range<u64>] {
        &self.ranges
    }
}

/// Whether the program that made the image also makes a batmap.
pub(super) fn is_due(footer: &Footer) -> bool {
    &footer.creator_app == b"tap\0" && footer.creator_version.get() >= VERSION
}

/// Reads the batmap of an image, where its creator makes one.
///
/// # Errors
/// The host's; `Unsupported` where the image is encrypted.
pub(super) fn read(storage: &dyn Storage, footer: &Footer, header: &Header) -> Result<Found> {
    if !is_due(footer) {
        return Ok(Found::None);
    }
    let table_end = header.table_offset() + header.max_entries() * 4;
    let host = table_end.next_multiple_of(512);
    let mut bytes = [0; LEN];
    storage.read_at(&mut bytes, host)?;
    let raw: RawBatmap = zerocopy::transmute!(bytes);
    if raw.cookie == COOKIE && raw.key_cookie != 0 {
        return Err(Error::unsupported(
            "the image is encrypted by tapdisk (its batmap holds a key hash): not supported",
        ));
    }
    let map = match judge(&raw, storage.size(), header.max_entries()) {
        Ok(map) => map,
        Err(why) => return Ok(Found::Damaged(why)),
    };
    let mut bits = vec![0; clamp_len(map.end - map.start, usize::MAX)];
    storage.read_at(&mut bits, map.start)?;
    let sum = sum(&bits);
    if sum != raw.checksum.get() {
        return Ok(Found::Damaged(format!(
            "the batmap's checksum is {:#010x} (its bytes give {sum:#010x})",
            raw.checksum
        )));
    }
    let ranges = [host..host + align::len64(LEN), map];
    let bits = bits.into_boxed_slice();
    Ok(Found::Trusted(Batmap {
        bits,
        ranges,
        marker: raw.marker,
    }))
}

fn sum(map: &[u8]) -> u32 {
    !map.iter()
        .fold(0u32, |sum, b| sum.wrapping_add(u32::from(*b)))
}

/// Where the map is, or what is wrong with its header.
fn judge(raw: &RawBatmap, size: u64, entries: u64) -> std::result::Result<Range<u64>, String> {
    if raw.cookie != COOKIE {
        return Err(format!(
            "the batmap begins with '{}' (allowed: 'tdbatmap')",
            raw.cookie.escape_ascii()
        ));
    }
    if raw.version.get() != VERSION {
        return Err(format!(
            "batmap version {:#010x} (trusted: {VERSION:#010x})",
            raw.version
        ));
    }
    let len = u64::from(raw.sectors.get()) * 512;
    let offset = raw.offset.get();
    if len > MAX_MAP || len * 8 < entries {
        return Err(format!(
            "the batmap has {len} bytes (allowed: {} to {MAX_MAP})",
            entries.div_ceil(8)
        ));
    }
    match offset.checked_add(len) {
        Some(end) if offset >= 512 && end <= size => Ok(offset..end),
        _ => Err(format!(
            "the batmap at {offset:#x} with {len} bytes is not inside the file"
        )),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::formats::vhd::footer::{Creator, Kind, NewFooter, Strictness};
    use crate::formats::vhd::geometry::Geometry;
    use crate::storage::memory::MemoryStorage;

    /// Turns an image with at most 4096 blocks and free space after its table into one by tapdisk.
    pub(in crate::formats::vhd) fn add(storage: &MemoryStorage, at: u64, full: &[u64]) {
        let mut map = [0u8; 512];
        for block in full {
            map[clamp_len(block / 8, 511)] |= 0x80 >> (block % 8);
        }
        let raw = RawBatmap {
            cookie: COOKIE,
            offset: (at + 512).into(),
            sectors: 1.into(),
            version: VERSION.into(),
            checksum: sum(&map).into(),
            marker: 0,
            key_cookie: 0,
            key_nonce: [0; 32],
            key_hash: [0; 32],
            reserved: [0; 418],
        };
        storage.write_at(raw.as_bytes(), at).expect("writes");
        storage.write_at(&map, at + 512).expect("writes");
    }

    /// The footer with tapdisk as its creator.
    pub(in crate::formats::vhd) fn tap_footer(footer: &Footer) -> Footer {
        let mut bytes = footer.to_bytes();
        bytes[28..36].copy_from_slice(b"tap\0\0\x01\0\x03");
        let footer = Footer::parse(&bytes, Strictness::Lax).expect("lax");
        footer.sealed()
    }

    fn parts() -> (Footer, Header) {
        let new = NewFooter {
            kind: Kind::Dynamic,
            size: 8 << 20,
            geometry: Geometry::for_size(8 << 20),
            creator: Creator::Win,
            uuid: uuid::Uuid::new_v4(),
        };
        let footer = tap_footer(&Footer::new(&new, SystemTime::now()));
        (footer, Header::new(1536, 4, 2 << 20, None))
    }

    #[test]
    fn set_bits_are_read() {
        let (footer, header) = parts();
        let storage = MemoryStorage::new();
        add(&storage, 2048, &[1, 3]);
        let Found::Trusted(map) = read(&storage, &footer, &header).expect("reads") else {
            panic!("it is whole");
        };
        let full: Vec<bool> = (0..5).map(|b| map.is_full(b)).collect();
        assert_eq!(full, [false, true, false, true, false]);
    }

    #[test]
    fn damage_is_noticed_and_named() {
        let (footer, header) = parts();
        for (at, text) in [
            (2048, "begins with"),
            (2048 + 23, "version"),
            (2048 + 27, "checksum"),
            (2048 + 9, "inside the file"),
            (2048 + 16, "bytes (allowed"),
            (2560, "checksum"),
        ] {
            let storage = MemoryStorage::new();
            add(&storage, 2048, &[0]);
            storage.write_at(&[0x55], at).expect("writes");
            match read(&storage, &footer, &header).expect("reads") {
                Found::Damaged(why) => assert!(why.contains(text), "{why}"),
                other => panic!("{at}: {other:?}"),
            }
        }
    }

    #[test]
    fn an_encrypted_image_is_refused_by_name() {
        let (footer, header) = parts();
        let storage = MemoryStorage::new();
        add(&storage, 2048, &[]);
        storage.write_at(&[1], 2048 + 29).expect("writes");
        let error = read(&storage, &footer, &header).expect_err("encrypted");
        assert!(error.to_string().contains("encrypted"), "{error}");
    }
}

//! Compressed grains, each behind a marker, and the footer of a file that was written in one go.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::formats::vmdk::header::{Header, SECTOR};
use crate::formats::vmdk::tables::{Entry, Geometry, Tables};
use crate::image::Wait;
use crate::image::codec::Decoded;
use crate::storage::Storage;
use crate::util::align::{clamp_len, len64};

/// Bytes of a grain's marker before its data: the first sector of the disk that it holds, and the
/// length of the data.
pub(super) const MARKER: u64 = 12;
/// The same, as a length in memory.
pub(super) const MARKER_LEN: usize = 12;
/// Type of the marker before a footer.
pub(super) const FOOTER: u32 = 3;
/// Sectors at the end of a file that has a footer: its marker, itself, the end of the stream.
const END: u64 = 3;

/// What grains are decoded with.
#[derive(Debug)]
pub(super) struct Packed {
    decoded: Decoded,
}

/// What the footer of a stream says, whose header says that there is one.
///
/// # Errors
/// `Corrupt` where there is none, or where it is not that of the header; the host's.
pub(super) fn footer(storage: &dyn Storage, header: &Header) -> Result<Geometry> {
    let size = storage.size();
    let none = |why: &str| {
        Error::corrupt(format!(
            "the stream has no footer: {why} (allowed: a marker, the footer and the end of the stream as the last {END} sectors of the file)"
        ))
    };
    let start = size
        .checked_sub(END * SECTOR)
        .filter(|s| s.is_multiple_of(SECTOR));
    let start = start.ok_or_else(|| none("the file is cut off"))?;
    let mut marker = [0; 16];
    storage.read_at(&mut marker, start)?;
    let [value, kind] = [&marker[..8], &marker[8..]]
        .map(|part| part.first_chunk().copied().map_or(0, u64::from_le_bytes));
    if (value, kind) != (1, u64::from(FOOTER) << 32) {
        return Err(none("no marker says so"));
    }
    let footer = Header::read(storage, start + SECTOR).map_err(|e| none(e.message()))?;
    let same = |other: &Header| {
        let geometry = (
            other.capacity(),
            other.grain(),
            other.flags(),
            other.version(),
        );
        (geometry, other.per_table())
    };
    if same(&footer) != same(header) {
        return Err(Error::corrupt(
            "the footer is not that of the header: capacity, grain size, flags or version differ",
        ));
    }
    if footer.is_at_end() {
        return Err(none("it says itself that the directory is elsewhere"));
    }
    footer.geometry(size)
}

impl Packed {
    /// For grains of so many bytes.
    pub(super) fn new(grain: u64) -> Self {
        let decoded = Decoded::new(grain);
        Self { decoded }
    }

    /// Fills `buf` from `at` on, as far as grains have data.
    ///
    /// # Errors
    /// `Corrupt` where a grain is not what its marker and the table say; the host's.
    pub(super) fn read(
        &self,
        storage: &dyn Storage,
        tables: &Tables,
        buf: &mut [u8],
        at: u64,
    ) -> Result<usize> {
        let size = tables.geometry.grain;
        let mut done = 0;
        while done < buf.len() {
            let at = at + len64(done);
            let index = at / size;
            if at >= tables.geometry.capacity {
                break;
            }
            let Entry::At(host) = tables.entry(storage, index, Wait::Yes)? else {
                break;
            };
            let within = clamp_len(at % size, usize::MAX);
            let whole = clamp_len(size, usize::MAX);
            let rest = &mut buf[done..];
            let decode = |out: &mut [u8]| {
                let decoded = self.decode(storage, &tables.geometry, index, host, out);
                decoded.map_err(|e| {
                    let text = format!("grain {index} at {host:#x}: {}", e.message());
                    Error::new(e.kind(), text)
                })
            };
            if within == 0 && rest.len() >= whole {
                decode(&mut rest[..whole])?;
                done += whole;
                continue;
            }
            let grain: Arc<[u8]> = self.decoded.get(host, || {
                let mut grain = vec![0; whole];
                decode(&mut grain).map(|()| grain)
            })?;
            let len = (whole - within).min(rest.len());
            rest[..len].copy_from_slice(&grain[within..within + len]);
            done += len;
        }
        Ok(done)
    }

    /// Decodes one grain, all of it.
    fn decode(
        &self,
        storage: &dyn Storage,
        geometry: &Geometry,
        index: u64,
        host: u64,
        out: &mut [u8],
    ) -> Result<()> {
        let mut marker = [0; MARKER_LEN];
        storage.read_at(&mut marker, host)?;
        let (first, len) = marker_of(&marker);
        let wanted = index * (geometry.grain / SECTOR);
        if first != wanted {
            return Err(Error::corrupt(format!(
                "its marker says sector {first} of the disk (allowed: {wanted})"
            )));
        }
        let end = (host + MARKER).checked_add(len);
        if len == 0 || len > 2 * geometry.grain || end.is_none_or(|end| end > storage.size()) {
            return Err(Error::corrupt(format!(
                "its marker says {len} compressed bytes (allowed: up to {}, inside the file)",
                2 * geometry.grain
            )));
        }
        let len = clamp_len(len, usize::MAX);
        let got = self.decoded.with(|decoders| {
            storage.read_at(decoders.input(len), host + MARKER)?;
            decoders.unzlib_input(len, out)
        })?;
        // Some write the last grain no longer than the disk.
        let needed = geometry
            .grain
            .min(geometry.capacity - index * geometry.grain);
        if len64(got) < needed {
            return Err(Error::corrupt(format!(
                "it decodes to {got} bytes (allowed: {})",
                geometry.grain
            )));
        }
        out[got..].fill(0);
        Ok(())
    }
}

/// The first sector and the length of a grain, as its marker has them.
pub(super) fn marker_of(marker: &[u8; MARKER_LEN]) -> (u64, u64) {
    let first = marker.first_chunk().copied().map_or(0, u64::from_le_bytes);
    let len = marker.last_chunk().copied().map_or(0, u32::from_le_bytes);
    (first, u64::from(len))
}

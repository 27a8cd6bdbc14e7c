//! The two headers: which of them counts, and how they change ([MS-VHDX] 2.2.1, 2.2.2).

use std::ops::Range;

use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::formats::vhdx::bytes::{self, MB, guid_at, is_sound, put, u16_at, u32_at, u64_at};
use crate::storage::Storage;

/// What a file begins with.
pub(super) const FILE: &[u8; 8] = b"vhdxfile";
const SIGNATURE: &[u8; 4] = b"head";
/// Where the headers are.
const PLACES: [u64; 2] = [64 << 10, 128 << 10];
/// Bytes of a header.
const LEN: usize = 4096;
/// Bytes of a header that say something.
const USED: usize = 80;
/// Where what counts from one header to the next begins: behind the signature and the checksum.
const CONTENT: usize = 8;
/// The version of the format.
const VERSION: u16 = 1;
/// The largest log that is read: what other readers take.
pub(super) const MAX_LOG: u64 = 1 << 30;

/// One header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    /// The header with the larger one counts.
    pub(super) sequence: u64,
    /// Another one for whoever writes to the file.
    pub(super) file_write: Uuid,
    /// Another one whenever the disk's data changes: what a child knows its parent by.
    pub(super) data_write: Uuid,
    /// Whose entries of the log count; nil: the log holds nothing.
    pub(super) log_guid: Uuid,
    pub(super) log_version: u16,
    version: u16,
    log_len: u32,
    log_offset: u64,
}

impl Header {
    /// The first header of a new file.
    pub(super) fn new(file_write: Uuid, data_write: Uuid, log: &Range<u64>) -> Self {
        Self {
            sequence: 0,
            file_write,
            data_write,
            log_guid: Uuid::nil(),
            log_version: 0,
            version: VERSION,
            log_len: u32::try_from(log.end - log.start).unwrap_or(0),
            log_offset: log.start,
        }
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        Self {
            sequence: u64_at(bytes, 8),
            file_write: guid_at(bytes, 16),
            data_write: guid_at(bytes, 32),
            log_guid: guid_at(bytes, 48),
            log_version: u16_at(bytes, 64),
            version: u16_at(bytes, 66),
            log_len: u32_at(bytes, 68),
            log_offset: u64_at(bytes, 72),
        }
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; LEN];
        put(&mut bytes, 0, SIGNATURE);
        put(&mut bytes, 8, &self.sequence.to_le_bytes());
        put(&mut bytes, 16, &self.file_write.to_bytes_le());
        put(&mut bytes, 32, &self.data_write.to_bytes_le());
        put(&mut bytes, 48, &self.log_guid.to_bytes_le());
        put(&mut bytes, 64, &self.log_version.to_le_bytes());
        put(&mut bytes, 66, &self.version.to_le_bytes());
        put(&mut bytes, 68, &self.log_len.to_le_bytes());
        put(&mut bytes, 72, &self.log_offset.to_le_bytes());
        bytes::seal(&mut bytes);
        bytes
    }

    /// Where the log is.
    pub(super) fn log(&self) -> Range<u64> {
        self.log_offset..self.log_offset.saturating_add(self.log_len.into())
    }

    /// Whether the log may hold changes that are not in place yet.
    pub(super) fn has_log(&self) -> bool {
        !self.log_guid.is_nil()
    }

    /// Refuses what is not understood, and a log that cannot be.
    fn check(&self, size: u64) -> Result<()> {
        if self.version != VERSION {
            return Err(Error::unsupported(format!(
                "the header's version is {} (allowed: {VERSION})",
                self.version
            )));
        }
        if self.has_log() && self.log_version != 0 {
            return Err(Error::unsupported(format!(
                "the log's version is {} (allowed: 0)",
                self.log_version
            )));
        }
        let (log, len) = (self.log(), u64::from(self.log_len));
        if len == 0 && !self.has_log() {
            return Ok(());
        }
        let aligned = len.is_multiple_of(MB) && log.start.is_multiple_of(MB);
        let inside = log.start >= MB && log.end <= size && log.end - log.start == len;
        match aligned && inside && (1..=MAX_LOG).contains(&len) {
            true => Ok(()),
            false => Err(Error::corrupt(format!(
                "the log is at {:#x}, {len:#x} bytes long (allowed: multiples of {MB:#x}, from {MB:#x} on, inside the file of {size:#x} bytes, up to {MAX_LOG:#x} bytes)",
                log.start
            ))),
        }
    }
}

/// The header that counts.
#[derive(Debug, Clone)]
pub(super) struct Current {
    pub(super) header: Header,
    /// Which of the two places it is in.
    slot: usize,
    /// What is wrong with the other one.
    pub(super) fault: Option<String>,
}

impl Current {
    /// Reads both headers.
    ///
    /// # Errors
    /// `Corrupt` where none is valid or nobody knows which counts; `Unsupported`; the host's.
    pub(super) fn read(storage: &dyn Storage) -> Result<Self> {
        let mut file = [0; FILE.len()];
        storage.read_at(&mut file, 0)?;
        if file != *FILE {
            return Err(Error::corrupt(format!(
                "the file begins with '{}' (allowed: vhdxfile)",
                file.escape_ascii()
            )));
        }
        let mut found = [vec![0; LEN], vec![0; LEN]];
        for (bytes, at) in found.iter_mut().zip(PLACES) {
            storage.read_at(bytes, at)?;
        }
        let sound = [0, 1].map(|slot| is_sound(&found[slot], SIGNATURE));
        let fault = |slot: usize| match sound[slot] {
            true => None,
            false => Some(format!(
                "header {} at {:#x} has a wrong signature or checksum",
                slot + 1,
                PLACES[slot]
            )),
        };
        let sequence = |slot: usize| sound[slot].then(|| u64_at(&found[slot], CONTENT));
        let slot = match (sequence(0), sequence(1)) {
            (None, None) => {
                let text = format!(
                    "neither header, at {:#x} and {:#x}, has its signature and checksum",
                    PLACES[0], PLACES[1]
                );
                return Err(Error::corrupt(text));
            }
            (a, b) if a == b && found[0][CONTENT..USED] != found[1][CONTENT..USED] => {
                let text = format!(
                    "both headers have the sequence number {} and differ (allowed: one is later)",
                    a.unwrap_or_default()
                );
                return Err(Error::corrupt(text));
            }
            (a, b) => usize::from(b > a),
        };
        let header = Header::from_bytes(&found[slot]);
        header.check(storage.size())?;
        let fault = fault(1 - slot);
        Ok(Self {
            header,
            slot,
            fault,
        })
    }

    /// Has a changed header take the place of the other one, from which on it counts once that is on
    /// stable media.
    ///
    /// # Errors
    /// `OutOfRange` where no later sequence number is left; the host's.
    pub(super) fn write(
        &mut self,
        storage: &dyn Storage,
        change: impl FnOnce(&mut Header),
    ) -> Result<()> {
        let mut header = self.header.clone();
        let next = header.sequence.checked_add(1).ok_or_else(|| {
            let text = "the header's sequence number is the last there is (allowed: a copy)";
            Error::new(ErrorKind::OutOfRange, text)
        })?;
        header.sequence = next;
        change(&mut header);
        let slot = 1 - self.slot;
        storage.write_at(&header.to_bytes(), PLACES[slot])?;
        *self = Self {
            header,
            slot,
            fault: None,
        };
        Ok(())
    }
}

/// Writes the beginning of a new file: what it is, and both headers.
///
/// # Errors
/// The host's.
pub(super) fn create(storage: &dyn Storage, creator: &str, header: &Header) -> Result<()> {
    let mut file = FILE.to_vec();
    file.extend(creator.encode_utf16().flat_map(u16::to_le_bytes));
    storage.write_at(&file, 0)?;
    for (place, sequence) in PLACES.into_iter().zip(1..) {
        let header = Header {
            sequence,
            ..header.clone()
        };
        storage.write_at(&header.to_bytes(), place)?;
    }
    Ok(())
}

/// The program that made the file, as far as that is text.
///
/// # Errors
/// The host's.
pub(super) fn creator(storage: &dyn Storage) -> Result<String> {
    let mut bytes = [0; 512];
    storage.read_at(&mut bytes, 8)?;
    Ok(bytes::utf16(&bytes).unwrap_or_default())
}

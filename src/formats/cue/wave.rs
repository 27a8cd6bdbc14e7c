//! RIFF files with the sound of a disc: where the samples are, and the head of a new one.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::storage::Storage;

/// Most chunks that are passed on the way to the samples.
const MAX_CHUNKS: usize = 1024;
/// Bytes of the head of a new file.
pub(in crate::formats) const HEAD: usize = 44;
/// Bytes a second.
const RATE: u32 = 44_100 * 4;

fn word16(bytes: &[u8], at: usize) -> u16 {
    let bytes = bytes.get(at..).and_then(|rest| rest.first_chunk());
    bytes.copied().map_or(0, u16::from_le_bytes)
}

fn word32(bytes: &[u8], at: usize) -> u32 {
    let bytes = bytes.get(at..).and_then(|rest| rest.first_chunk());
    bytes.copied().map_or(0, u32::from_le_bytes)
}

/// Where the samples of a file are.
///
/// # Errors
/// `Corrupt` where it is no RIFF file with samples; `Unsupported` for sound that is not that of a
/// disc; the host's.
pub(super) fn samples(storage: &dyn Storage) -> Result<Range<u64>> {
    let len = storage.size();
    let mut head = [0; 12];
    storage.read_at(&mut head, 0)?;
    if &head[..4] != b"RIFF" || &head[8..] != b"WAVE" {
        return Err(Error::corrupt(
            "is no WAVE file (allowed: RIFF and WAVE at its start)",
        ));
    }
    let mut at = 12;
    let mut is_sound = false;
    for _ in 0..MAX_CHUNKS {
        if at + 8 > len {
            break;
        }
        let mut chunk = [0; 8];
        storage.read_at(&mut chunk, at)?;
        let (start, size) = (at + 8, u64::from(word32(&chunk, 4)));
        match &chunk[..4] {
            b"fmt " => {
                check_format(storage, start, size)?;
                is_sound = true;
            }
            b"data" if !is_sound => return Err(Error::corrupt("has samples before their format")),
            // Recorders that are stopped leave a length that is too large.
            b"data" => return Ok(start..(start + size).min(len)),
            _ => {}
        }
        at = start + size + size % 2;
    }
    Err(Error::corrupt("has no samples (no data chunk)"))
}

fn check_format(storage: &dyn Storage, start: u64, size: u64) -> Result<()> {
    const PCM: u16 = 1;
    const EXTENSIBLE: u16 = 0xfffe;
    let mut format = [0; 26];
    storage.read_at(&mut format, start)?;
    let coding = match word16(&format, 0) {
        EXTENSIBLE if size >= 26 => word16(&format, 24),
        coding => coding,
    };
    let found = (
        coding,
        word16(&format, 2),
        word32(&format, 4),
        word16(&format, 14),
    );
    match size >= 16 && found == (PCM, 2, 44_100, 16) {
        true => Ok(()),
        false => Err(Error::unsupported(format!(
            "its sound is of coding {}, {} channels, {} Hz, {} bits (allowed: PCM (1), 2, 44100, 16)",
            found.0, found.1, found.2, found.3
        ))),
    }
}

/// The head of a file with so many bytes of samples; `None` where a file cannot be so long.
pub(in crate::formats) fn head(samples: u64) -> Option<[u8; HEAD]> {
    let data = u32::try_from(samples).ok()?;
    let whole = data.checked_add(36)?;
    let mut head = [0; HEAD];
    let mut at = 0;
    let mut put = |bytes: &[u8]| {
        head[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    };
    put(b"RIFF");
    put(&whole.to_le_bytes());
    put(b"WAVEfmt ");
    put(&16u32.to_le_bytes());
    put(&1u16.to_le_bytes());
    put(&2u16.to_le_bytes());
    put(&44_100u32.to_le_bytes());
    put(&RATE.to_le_bytes());
    put(&4u16.to_le_bytes());
    put(&16u16.to_le_bytes());
    put(b"data");
    put(&data.to_le_bytes());
    Some(head)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryStorage;

    fn of(bytes: &[u8]) -> Result<Range<u64>> {
        samples(&MemoryStorage::from_bytes(bytes))
    }

    fn file(samples: usize) -> Vec<u8> {
        let mut bytes = head(samples as u64).expect("is short").to_vec();
        bytes.resize(HEAD + samples, 7);
        bytes
    }

    #[test]
    fn samples_are_found_behind_other_chunks_and_end_with_the_file() {
        assert_eq!(of(&file(100)).expect("is right"), 44..144);
        let mut more = file(100);
        more.splice(36..36, *b"LIST\x03\0\0\0abc\0");
        assert_eq!(of(&more).expect("is right"), 56..156);
        assert_eq!(of(&file(100)[..90]).expect("is cut"), 44..90);
        let mut after = file(100);
        after.extend(b"LIST\x03\0\0\0abc\0");
        assert_eq!(of(&after).expect("is right"), 44..144);
    }

    #[test]
    fn what_is_no_sound_of_a_disc_is_refused() {
        for (at, byte) in [
            (0, b'X'),
            (8, b'X'),
            (20, 3),
            (22, 1),
            (24, 0),
            (34, 8),
            (36, b'x'),
        ] {
            let mut bytes = file(100);
            bytes[at] = byte;
            of(&bytes).expect_err("is another");
        }
        of(b"RIFF").expect_err("is cut");
        // Chunks without end.
        let mut bytes = b"RIFF\0\0\0\0WAVE".to_vec();
        bytes.extend(b"JUNK\0\0\0\0".repeat(5000));
        of(&bytes).expect_err("has no samples");
    }
}

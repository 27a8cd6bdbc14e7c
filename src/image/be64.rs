//! Big-endian 64-bit words of on-disk structures, read and written whole.

use std::ops::Range;

use crate::error::Result;
use crate::storage::Storage;
use crate::util::align::clamp_len;
use crate::util::range;

/// The bytes of a range, whose length the caller has bounded.
///
/// # Errors
/// The host's.
pub fn read_bytes(storage: &dyn Storage, host: Range<u64>) -> Result<Vec<u8>> {
    let mut bytes = vec![0; clamp_len(range::len(&host), usize::MAX)];
    storage.read_at(&mut bytes, host.start)?;
    Ok(bytes)
}

/// The words of a range, whose length the caller has bounded.
///
/// # Errors
/// The host's.
pub fn read(storage: &dyn Storage, host: Range<u64>) -> Result<Vec<u64>> {
    Ok(words(&read_bytes(storage, host)?).collect())
}

/// The word at `host`.
///
/// # Errors
/// The host's.
pub fn read_one(storage: &dyn Storage, host: u64) -> Result<u64> {
    let mut word = [0; 8];
    storage.read_at(&mut word, host)?;
    Ok(u64::from_be_bytes(word))
}

/// The words that some bytes are.
pub fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    let words = bytes.as_chunks::<8>().0.iter();
    words.map(|word| u64::from_be_bytes(*word))
}

/// The bytes of some words.
pub fn bytes(words: impl IntoIterator<Item = u64>) -> Vec<u8> {
    words.into_iter().flat_map(u64::to_be_bytes).collect()
}

/// Writes bytes at `host`, with zeroes up to a multiple of `unit`.
///
/// # Errors
/// The host's.
pub fn write_padded(storage: &dyn Storage, mut bytes: Vec<u8>, host: u64, unit: u64) -> Result<()> {
    bytes.resize(bytes.len().next_multiple_of(clamp_len(unit, usize::MAX)), 0);
    storage.write_at(&bytes, host)
}

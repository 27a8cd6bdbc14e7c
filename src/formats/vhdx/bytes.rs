//! Fields of structures in memory: little-endian, at offsets that lie inside.

use uuid::Uuid;

/// Blocks, regions and the log begin at multiples of this.
pub(super) const MB: u64 = 1 << 20;

/// The bytes of a field; zeroes where it is not there.
fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let rest = bytes.get(at..).and_then(|rest| rest.first_chunk());
    rest.copied().unwrap_or([0; N])
}

/// A field of 16 bits.
pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(field(bytes, at))
}

/// A field of 32 bits.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(field(bytes, at))
}

/// A field of 64 bits.
pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(field(bytes, at))
}

/// A GUID.
pub(super) fn guid_at(bytes: &[u8], at: usize) -> Uuid {
    Uuid::from_bytes_le(field(bytes, at))
}

/// Changes a field.
pub(super) fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

/// The checksum that the four bytes at offset 4 of a structure are to hold.
pub(super) fn checksum(bytes: &[u8]) -> u32 {
    let (head, rest) = bytes.split_at(bytes.len().min(4));
    let crc = crc32c::crc32c_append(crc32c::crc32c(head), &[0; 4]);
    crc32c::crc32c_append(crc, rest.get(4..).unwrap_or(&[]))
}

/// Whether a structure of which the first four bytes are `signature` holds its checksum.
pub(super) fn is_sound(bytes: &[u8], signature: &[u8; 4]) -> bool {
    bytes.starts_with(signature) && u32_at(bytes, 4) == checksum(bytes)
}

/// Puts the checksum where it belongs.
pub(super) fn seal(bytes: &mut [u8]) {
    let crc = checksum(bytes);
    put(bytes, 4, &crc.to_le_bytes());
}

/// Text in UTF-16 up to the first zero; `None` where it is not valid.
pub(super) fn utf16(bytes: &[u8]) -> Option<String> {
    let units = bytes.as_chunks::<2>().0.iter();
    let units = units.map(|unit| u16::from_le_bytes(*unit));
    let text = char::decode_utf16(units.take_while(|unit| *unit != 0));
    text.collect::<std::result::Result<_, _>>().ok()
}

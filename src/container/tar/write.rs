//! Headers of new archives: plain files with short names, the same bytes for the same files.

use crate::container::tar::BLOCK;
use crate::container::tar::header::sums;
use crate::error::{Error, Result};
use crate::util::align::up;

/// Sizes from here on have no eleven octal digits.
const LARGE: u64 = 8 << 30;
/// What an archive is filled up to, as tar does.
const RECORD: u64 = 10_240;
/// Most bytes of a name that has its place in a header.
const MAX_NAME: usize = 100;

/// How sizes of 8 GiB and more are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Flavour {
    /// In base 256, as GNU tar does.
    #[default]
    Gnu,
    /// In a record of pax before the member; smaller sizes too, so that all headers are as long.
    Pax,
}

impl Flavour {
    /// Bytes of what stands before a member whose size may be large.
    pub fn header_len(self) -> u64 {
        match self {
            Self::Gnu => BLOCK,
            Self::Pax => 3 * BLOCK,
        }
    }

    /// What stands before the data of a file called `name`, of `size` bytes, which may be large.
    ///
    /// # Errors
    /// Those of [`header`].
    pub fn header(self, name: &str, size: u64) -> Result<Vec<u8>> {
        match self {
            Self::Gnu if size < LARGE => header(name, size),
            Self::Gnu => gnu(name, size),
            Self::Pax => {
                let records = record("size", size);
                let mut bytes = block("PaxHeaders/size", b'x', &octal(records.len() as u64))?;
                bytes.extend(records.as_bytes());
                bytes.resize(2 * 512, 0);
                // Who does not know records finds no more than the largest size there is.
                bytes.extend(block(name, b'0', &octal(size.min(LARGE - 1)))?);
                Ok(bytes)
            }
        }
    }
}

/// The header of a small file, of `size` bytes.
///
/// # Errors
/// `Invalid` for a name that is too long or is not plain ASCII, and for 8 GiB and more.
pub fn header(name: &str, size: u64) -> Result<Vec<u8>> {
    match size < LARGE {
        true => block(name, b'0', &octal(size)),
        false => Err(Error::invalid(format!(
            "a member of {size} bytes (allowed: less than {LARGE})"
        ))),
    }
}

/// Bytes from the end of a member to the next header.
pub fn padding(size: u64) -> u64 {
    up(size, BLOCK).map_or(0, |end| end - size)
}

/// Bytes of zeroes that end an archive whose last member ends at `at`.
pub fn end(at: u64) -> u64 {
    up(at.saturating_add(2 * BLOCK), RECORD).map_or(2 * BLOCK, |end| end - at)
}

fn octal(size: u64) -> [u8; 12] {
    let mut field = [0; 12];
    field[..11].copy_from_slice(format!("{size:011o}").as_bytes());
    field
}

fn gnu(name: &str, size: u64) -> Result<Vec<u8>> {
    let mut field = [0; 12];
    field[0] = 0x80;
    field[4..].copy_from_slice(&size.to_be_bytes());
    let mut bytes = block(name, b'0', &field)?;
    bytes[257..265].copy_from_slice(b"ustar  \0");
    seal(&mut bytes);
    Ok(bytes)
}

fn block(name: &str, letter: u8, size: &[u8; 12]) -> Result<Vec<u8>> {
    let is_plain = name.bytes().all(|b| b.is_ascii_graphic());
    if name.is_empty() || name.len() > MAX_NAME || !is_plain {
        return Err(Error::invalid(format!(
            "the name '{}' in an archive (allowed: 1 to {MAX_NAME} visible ASCII characters)",
            crate::util::text::printable(name)
        )));
    }
    let mut bytes = vec![0; 512];
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    bytes[100..108].copy_from_slice(b"0000644\0");
    bytes[108..116].copy_from_slice(b"0000000\0");
    bytes[116..124].copy_from_slice(b"0000000\0");
    bytes[124..136].copy_from_slice(size);
    bytes[136..148].copy_from_slice(b"00000000000\0");
    bytes[156] = letter;
    bytes[257..265].copy_from_slice(b"ustar\x0000");
    seal(&mut bytes);
    Ok(bytes)
}

fn seal(bytes: &mut [u8]) {
    if let Some(block) = bytes.first_chunk() {
        let (sum, _) = sums(block);
        bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
}

/// `LENGTH KEY=VALUE\n`, where the length counts itself.
fn record(key: &str, value: u64) -> String {
    let rest = format!(" {key}={value}\n");
    let mut len = rest.len() + 1;
    while len.to_string().len() + rest.len() != len {
        len += 1;
    }
    format!("{len}{rest}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::tar::{Kind, members};
    use crate::storage::Storage;
    use crate::storage::memory::MemoryStorage;

    #[test]
    fn what_is_written_is_read_whatever_its_size() {
        for flavour in [Flavour::Gnu, Flavour::Pax] {
            for size in [0, 7, 512, LARGE - 1, LARGE, 1 << 45] {
                let storage = MemoryStorage::new();
                let head = header("a.ovf", 3).expect("is small");
                storage.write_at(&head, 0).expect("writes");
                storage.write_at(b"abc", 512).expect("writes");
                let disk = flavour.header("b.vmdk", size).expect("is a name");
                assert_eq!(disk.len() as u64, flavour.header_len());
                storage.write_at(&disk, 1024).expect("writes");
                let start = 1024 + flavour.header_len();
                let last = start + size + padding(size);
                storage.set_len(last + end(last)).expect("grows");
                assert!(storage.size().is_multiple_of(RECORD), "{size}");
                let members = members(&storage).expect("is right");
                assert_eq!(members[1].data, start..start + size, "{flavour:?} {size}");
                assert!(members.iter().all(|m| m.kind == Kind::File));
            }
        }
    }

    #[test]
    fn names_that_importers_trip_over_are_refused() {
        for name in ["", "a b", "ä", &"a".repeat(101), "a\n"] {
            header(name, 1).expect_err(name);
        }
        header("a", LARGE).expect_err("is large");
    }

    #[test]
    fn the_length_of_a_record_counts_itself() {
        assert_eq!(record("size", 7), "9 size=7\n");
        assert_eq!(record("size", 12), "11 size=12\n");
        assert_eq!(record("size", 8 << 30).len(), 19);
    }
}

//! The header of a member: 512 bytes of text fields.

use std::ops::Range;

use crate::container::tar::Kind;

const NAME: Range<usize> = 0..100;
const SIZE: Range<usize> = 124..136;
const SUM: Range<usize> = 148..156;
const LETTER: usize = 156;
const MAGIC: Range<usize> = 257..263;
const PREFIX: Range<usize> = 345..500;
/// In an old sparse member: whether more of the map follows the header.
const MORE: usize = 482;

/// A header whose checksum is right.
#[derive(Debug, Clone)]
pub(super) struct Header([u8; 512]);

impl Header {
    /// A header, or `None` for a block of zeroes.
    ///
    /// # Errors
    /// Why it is neither.
    pub(super) fn parse(block: [u8; 512]) -> Result<Option<Self>, String> {
        if block == [0; 512] {
            return Ok(None);
        }
        let stored = number(&block[SUM]).map_err(|e| format!("its checksum {e}"))?;
        let (plain, signed) = sums(&block);
        // Old tar of SunOS added signed bytes.
        if stored != u64::from(plain) && i64::try_from(stored) != Ok(i64::from(signed)) {
            return Err(format!(
                "no header of a member: the checksum is {stored:#o}, and its bytes add up to \
                 {plain:#o}"
            ));
        }
        Ok(Some(Self(block)))
    }

    pub(super) fn letter(&self) -> u8 {
        self.0[LETTER]
    }

    pub(super) fn kind(&self) -> Kind {
        match self.letter() {
            // Old tar marks a directory by its name.
            0 if self.text(NAME).ends_with(b"/") => Kind::Directory,
            b'0' | 0 | b'7' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::SymbolicLink,
            b'3' | b'4' | b'6' => Kind::Device,
            b'5' => Kind::Directory,
            b'S' => Kind::Sparse,
            other => Kind::Other(other),
        }
    }

    /// Bytes of data.
    ///
    /// # Errors
    /// Why the field is no size.
    pub(super) fn size(&self) -> Result<u64, String> {
        number(&self.0[SIZE]).map_err(|e| format!("its size {e}"))
    }

    pub(super) fn name(&self) -> Vec<u8> {
        let name = self.text(NAME);
        let prefix = match self.is_ustar() {
            true => self.text(PREFIX),
            false => &[],
        };
        match prefix.is_empty() {
            true => name.to_vec(),
            false => [prefix, b"/", name].concat(),
        }
    }

    /// Whether more of the map of an old sparse member follows.
    pub(super) fn has_more_map(&self) -> bool {
        self.letter() == b'S' && self.0[MORE] != 0
    }

    /// GNU's own headers have other fields where the prefix is.
    fn is_ustar(&self) -> bool {
        &self.0[MAGIC] == b"ustar\0"
    }

    fn text(&self, range: Range<usize>) -> &[u8] {
        let field = &self.0[range];
        let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
        &field[..end]
    }
}

/// The sum of all bytes, those of the checksum as blanks; of bytes without and with a sign.
pub(super) fn sums(block: &[u8; 512]) -> (u32, i32) {
    let bytes = block.iter().enumerate();
    let bytes = bytes.map(|(at, byte)| if SUM.contains(&at) { b' ' } else { *byte });
    bytes.fold((0, 0), |(plain, signed), byte| {
        (
            plain + u32::from(byte),
            signed + i32::from(byte.cast_signed()),
        )
    })
}

/// A number in octal digits, or in base 256 where its first byte is 0x80.
fn number(field: &[u8]) -> Result<u64, String> {
    let shown = || format!("is '{}'", field.escape_ascii());
    match field.first() {
        Some(0x80) => {
            let (high, low) = field[1..].split_at(field.len().saturating_sub(9));
            match (high.iter().all(|b| *b == 0), low.first_chunk()) {
                (true, Some(low)) => Ok(u64::from_be_bytes(*low)),
                _ => Err(format!("{} (allowed: less than 2^64)", shown())),
            }
        }
        Some(0x81..) => Err(format!("{} (allowed: 0 and more)", shown())),
        _ => octal(field).ok_or_else(|| format!("{} (allowed: octal digits)", shown())),
    }
}

fn octal(field: &[u8]) -> Option<u64> {
    let start = field.iter().position(|b| *b != b' ')?;
    let digits = &field[start..];
    let end = digits.iter().position(|b| matches!(b, b' ' | 0));
    let (digits, rest) = digits.split_at(end.unwrap_or(digits.len()));
    if digits.is_empty() || rest.iter().any(|b| !matches!(b, b' ' | 0)) {
        return None;
    }
    digits.iter().try_fold(0u64, |value, digit| match digit {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(u64::from(digit - b'0')),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_base_256_and_never_negative() {
        let mut base = [0; 12];
        base[0] = 0x80;
        base[7] = 2;
        for (field, value) in [
            (&b"00000000017\0"[..], Some(15)),
            (b"  17 \0", Some(15)),
            (b"17 \0 \0", Some(15)),
            (b"77777777777", Some(8_589_934_591)),
            (&base, Some(2 << 32)),
            (b"18 ", None),
            (b"\0\0\0\0", None),
            (b"    ", None),
            (b"17\x009", None),
            (b"-7", None),
            (&[0xff; 12], None),
            (&[0x80, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0], None),
            (
                &[
                    0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
                ],
                Some(u64::MAX),
            ),
        ] {
            assert_eq!(number(field).ok(), value, "{}", field.escape_ascii());
        }
    }
}

//! What a write writes, and what a read is compared with.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::{Error, ErrorKind, Result};
use crate::util::align::{clamp_len, len64};
use crate::util::range;
use crate::util::text::printable;

/// The byte that `write` writes where no other is asked for.
pub(super) const DEFAULT: u8 = 0xcd;

/// A pattern byte: decimal, `0x` hexadecimal, or octal with a leading `0`.
///
/// # Errors
/// Names what is not one.
pub(super) fn parse_byte(text: &str) -> anyhow::Result<u8> {
    let lower = text.to_ascii_lowercase();
    let value = match (lower.strip_prefix("0x"), lower.strip_prefix('0')) {
        (Some(hex), _) => u8::from_str_radix(hex, 16),
        (None, Some(octal)) if !octal.is_empty() => u8::from_str_radix(octal, 8),
        _ => lower.parse(),
    };
    let digits = lower.bytes().all(|b| b.is_ascii_alphanumeric());
    value.ok().filter(|_| digits).ok_or_else(|| {
        let text = printable(text);
        anyhow::anyhow!("{text} is not a valid pattern byte (allowed: 0 to 255)")
    })
}

/// Where the bytes of a write come from.
#[derive(Debug)]
pub(super) enum Bytes {
    /// One byte, over and over.
    Same(u8),
    /// A file's content, over and over.
    File {
        /// The file.
        file: File,
        /// Its length, not 0.
        len: u64,
    },
}

impl Bytes {
    /// The content of the regular file at `path`.
    ///
    /// # Errors
    /// The host's; `Invalid` for what is not a regular file, or is empty.
    pub(super) fn from_file(path: &Path) -> Result<Self> {
        let invalid = |what: &str| Err(Error::invalid(what).at(path));
        // Not opened before it is known to be a file: opening a pipe would wait for its writer.
        let found = std::fs::metadata(path).map_err(|e| Error::io("open", e).at(path))?;
        if !found.is_file() {
            return invalid("is not a regular file, so it cannot be a pattern");
        }
        let file = File::open(path).map_err(|e| Error::io("open", e).at(path))?;
        match found.len() {
            0 => invalid("is empty, so it cannot be a pattern"),
            len => Ok(Self::File { file, len }),
        }
    }

    /// Fills `buf` with the bytes from `from` of the write on.
    ///
    /// # Errors
    /// The host's; `Io` where the file has become shorter.
    pub(super) fn fill(&self, buf: &mut [u8], from: u64) -> Result<()> {
        let (file, len) = match self {
            Self::Same(byte) => {
                buf.fill(*byte);
                return Ok(());
            }
            Self::File { file, len } => (file, *len),
        };
        let mut done = 0;
        while done < buf.len() {
            let at = from.wrapping_add(len64(done)) % len;
            let step = clamp_len(len - at, buf.len() - done);
            file.read_exact_at(&mut buf[done..done + step], at)
                .map_err(|e| match e.kind() {
                    std::io::ErrorKind::UnexpectedEof => Error::new(
                        ErrorKind::Io,
                        format!("the pattern file has become shorter than {len} bytes"),
                    ),
                    _ => Error::io("read the pattern file", e),
                })?;
            done += step;
        }
        Ok(())
    }
}

/// What a read is compared with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Expected {
    /// The byte that should be everywhere.
    pub(super) byte: u8,
    /// In this part of the read, counted from its start.
    pub(super) part: Range<u64>,
}

impl Expected {
    /// Bytes that are compared.
    pub(super) fn len(&self) -> u64 {
        range::len(&self.part)
    }

    /// Whether `buf`, which begins `from` bytes into the read, holds what is expected of it.
    pub(super) fn holds(&self, buf: &[u8], from: u64) -> bool {
        let first = clamp_len(self.part.start.saturating_sub(from), buf.len());
        let end = clamp_len(self.part.end.saturating_sub(from), buf.len());
        let part = buf.get(first..end).unwrap_or_default();
        part.iter().all(|b| *b == self.byte)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn pattern_bytes_are_decimal_hexadecimal_or_octal() {
        for (text, byte) in [
            ("0", 0),
            ("255", 255),
            ("0xfF", 255),
            ("0XA", 10),
            ("010", 8),
        ] {
            assert_eq!(parse_byte(text).ok(), Some(byte), "{text}");
        }
        for text in [
            "", "256", "-1", "+1", "x", "0x", "0x100", "08", "0x+1", "1k",
        ] {
            assert!(parse_byte(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_file_is_repeated_from_wherever_the_write_is() {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(b"abc").expect("writes");
        let bytes = Bytes::from_file(file.path()).expect("opens");
        let mut buf = [0; 8];
        bytes.fill(&mut buf, 4).expect("fills");
        assert_eq!(&buf, b"bcabcabc");
        file.as_file().set_len(1).expect("cuts");
        assert!(bytes.fill(&mut buf, 0).is_err());
        file.as_file().set_len(0).expect("cuts");
        assert!(Bytes::from_file(file.path()).is_err());
        assert!(Bytes::from_file(Path::new("/dev/zero")).is_err());
    }

    #[test]
    fn only_the_part_asked_for_is_compared() {
        let expected = Expected {
            byte: 1,
            part: 10..20,
        };
        let mut buf = [0; 30];
        buf[10..20].fill(1);
        assert!(expected.holds(&buf, 0));
        assert!(expected.holds(&buf[5..], 5));
        assert!(expected.holds(&buf[12..15], 12));
        assert!(expected.holds(&buf[20..], 20));
        buf[19] = 0;
        assert!(!expected.holds(&buf, 0));
        assert!(!expected.holds(&buf[19..], 19));
    }
}

//! What a write writes, and what a read is compared with.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use crate::cli::interrupt;
use crate::cli::patient::Patient;
use crate::error::{Error, ErrorKind, Result};
use crate::util::align::{clamp_len, len64};
use crate::util::range;
use crate::util::text::printable;

/// Bytes read from a pipe at a time.
const SPOOL_STEP: usize = 64 << 10;

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
    /// The content of the file or block device at `path`; of a pipe or another device the first
    /// `most` bytes, or as many as come.
    ///
    /// # Errors
    /// The host's; `Invalid` for what cannot be read, or is empty; `Cancelled`.
    pub(super) fn from_file(path: &Path, most: u64) -> Result<Self> {
        let fail = |e| Error::io("open", e).at(path);
        let mut options = File::options();
        // Opening a pipe would wait for its writer, where no signal ends it.
        options
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        let mut file = options.open(path).map_err(fail)?;
        let kind = file.metadata().map_err(fail)?.file_type();
        if kind.is_dir() {
            return Err(Error::invalid("is a directory, so it cannot be a pattern").at(path));
        }
        let (file, len) = match kind.is_file() || kind.is_block_device() {
            true => {
                let len = file.seek(SeekFrom::End(0)).map_err(fail)?;
                (file, len)
            }
            false => spooled(file, most).map_err(|e| e.at(path))?,
        };
        match len {
            0 => Err(Error::invalid("is empty, so it cannot be a pattern").at(path)),
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

/// What a pipe has, up to `most` bytes, in a file without a name.
fn spooled(source: File, most: u64) -> Result<(File, u64)> {
    let fail = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::Interrupted => interrupt::check()
            .err()
            .unwrap_or_else(|| Error::io("read it", e)),
        _ => Error::io("read it", e),
    };
    let mut spool = tempfile::tempfile().map_err(|e| Error::io("make a temporary file", e))?;
    let mut source = Patient::new(source).take(most);
    let mut buf = vec![0; clamp_len(most, SPOOL_STEP)];
    let mut len = 0;
    loop {
        match source.read(&mut buf).map_err(fail)? {
            0 => return Ok((spool, len)),
            more => spool
                .write_all(&buf[..more])
                .map_err(|e| Error::io("write to a temporary file", e))?,
        }
        len = most - source.limit();
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
        let bytes = Bytes::from_file(file.path(), 8).expect("opens");
        let mut buf = [0; 8];
        bytes.fill(&mut buf, 4).expect("fills");
        assert_eq!(&buf, b"bcabcabc");
        file.as_file().set_len(1).expect("cuts");
        assert!(bytes.fill(&mut buf, 0).is_err());
        file.as_file().set_len(0).expect("cuts");
        assert!(Bytes::from_file(file.path(), 8).is_err());
        assert!(Bytes::from_file(Path::new("/"), 8).is_err());
        assert!(Bytes::from_file(Path::new("/dev/null"), 8).is_err());
    }

    #[test]
    fn a_device_without_end_is_read_as_far_as_it_is_needed() {
        let bytes = Bytes::from_file(Path::new("/dev/zero"), 8).expect("opens");
        let mut buf = [1; 8];
        bytes.fill(&mut buf, 0).expect("fills");
        assert_eq!(buf, [0; 8]);
        assert!(matches!(bytes, Bytes::File { len: 8, .. }));
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

//! Lines of a descriptor that name extents.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use crate::error::{Error, Result};
use crate::formats::vmdk::header::SECTOR;
use crate::util::text::printable;

/// What may be done with an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// It is read and written.
    ReadWrite,
    /// It is read.
    ReadOnly,
    /// Neither: what it has is not to be seen.
    None,
}

/// How an extent keeps its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// As they are, in a file.
    Flat,
    /// The same, as ESX calls it.
    Vmfs,
    /// Not at all: they are zeroes.
    Zero,
    /// In a hosted sparse file.
    Sparse,
    /// In a copy-on-write file of ESX.
    VmfsSparse,
    /// In a space-efficient sparse file.
    SeSparse,
}

impl Access {
    const WORDS: [(&'static str, Self); 3] = [
        ("RW", Self::ReadWrite),
        ("RDONLY", Self::ReadOnly),
        ("NOACCESS", Self::None),
    ];

    fn word(self) -> &'static str {
        let word = Self::WORDS.iter().find(|(_, access)| *access == self);
        word.map_or("", |(word, _)| word)
    }
}

impl Kind {
    const WORDS: [(&'static str, Self); 6] = [
        ("FLAT", Self::Flat),
        ("VMFS", Self::Vmfs),
        ("ZERO", Self::Zero),
        ("SPARSE", Self::Sparse),
        ("VMFSSPARSE", Self::VmfsSparse),
        ("SESPARSE", Self::SeSparse),
    ];

    /// As a line has it.
    pub(super) fn word(self) -> &'static str {
        let word = Self::WORDS.iter().find(|(_, kind)| *kind == self);
        word.map_or("", |(word, _)| word)
    }
}

/// Kinds whose data is on a device that no file system shows.
const DEVICES: [&str; 3] = ["VMFSRDM", "VMFSRDMP", "VMFSRAW"];

/// One extent, as its line has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ExtentLine {
    pub(super) access: Access,
    /// Length in sectors.
    pub(super) sectors: u64,
    pub(super) kind: Kind,
    /// Name of the file: untrusted.
    pub(super) name: Option<OsString>,
    /// Sectors of the file before it.
    pub(super) offset: u64,
}

/// Whether a line, without blanks around it, is meant to name an extent.
pub(super) fn is_extent(line: &[u8]) -> bool {
    let (first, rest) = word(line);
    let known = Access::WORDS
        .iter()
        .any(|(word, _)| first.eq_ignore_ascii_case(word.as_bytes()));
    known && !rest.trim_ascii_start().starts_with(b"=")
}

impl ExtentLine {
    /// Parses a line.
    ///
    /// # Errors
    /// `Corrupt`, saying what of it is wrong; `Unsupported` for kinds that are not read.
    pub(super) fn parse(line: &[u8]) -> Result<Self> {
        let (access, rest) = word(line);
        let access = find(&Access::WORDS, access).ok_or_else(|| wrong("access", access))?;
        let (sectors, rest) = word(rest);
        let sectors = number(sectors).ok_or_else(|| wrong("number of sectors", sectors))?;
        let (kind, rest) = word(rest);
        if DEVICES
            .iter()
            .any(|d| kind.eq_ignore_ascii_case(d.as_bytes()))
        {
            let text = "its data is on a raw device, which is not read";
            return Err(Error::unsupported(format!(
                "{}: {text}",
                printable(text_of(kind))
            )));
        }
        let kind = find(&Kind::WORDS, kind).ok_or_else(|| wrong("type", kind))?;
        let rest = rest.trim_ascii();
        let (name, rest) = match rest.strip_prefix(b"\"") {
            None if rest.is_empty() => (None, rest),
            None => return Err(wrong("file name, which stands in quotes", rest)),
            Some(quoted) => {
                let end = quoted.iter().position(|b| *b == b'"');
                let end = end.ok_or_else(|| wrong("file name, whose quotes end", rest))?;
                (Some(&quoted[..end]), &quoted[end + 1..])
            }
        };
        let (offset, _) = word(rest);
        let offset = match offset.is_empty() {
            true => 0,
            false => number(offset).ok_or_else(|| wrong("offset", offset))?,
        };
        let name = name.filter(|name| !name.is_empty());
        if name.is_none() && kind != Kind::Zero && access != Access::None {
            return Err(Error::corrupt("it names no file"));
        }
        Ok(Self {
            access,
            sectors,
            kind,
            name: name.map(|name| OsString::from_vec(name.to_vec())),
            offset,
        })
    }

    /// Length in bytes.
    ///
    /// # Errors
    /// `Corrupt` past 2^63.
    pub(super) fn len(&self) -> Result<u64> {
        bytes(self.sectors)
    }

    /// The line, in the form that all readers take.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut line = format!(
            "{} {} {}",
            self.access.word(),
            self.sectors,
            self.kind.word()
        );
        let Some(name) = &self.name else {
            return line.into_bytes();
        };
        line.push_str(" \"");
        let mut line = line.into_bytes();
        line.extend_from_slice(name.as_bytes());
        line.push(b'"');
        // Of some kinds QEMU wants an offset, of others none.
        if self.kind == Kind::Flat || self.offset > 0 {
            line.extend_from_slice(format!(" {}", self.offset).as_bytes());
        }
        line
    }
}

/// So many sectors in bytes.
///
/// # Errors
/// `Corrupt` past 2^63.
pub(super) fn bytes(sectors: u64) -> Result<u64> {
    let bytes = sectors.checked_mul(SECTOR);
    bytes
        .filter(|bytes| i64::try_from(*bytes).is_ok())
        .ok_or_else(|| Error::corrupt(format!("{sectors} sectors (allowed: less than 2^63 bytes)")))
}

fn text_of(bytes: &[u8]) -> &OsStr {
    OsStr::from_bytes(bytes.get(..200).unwrap_or(bytes))
}

fn wrong(what: &str, found: &[u8]) -> Error {
    Error::corrupt(format!("'{}' is no {what}", printable(text_of(found))))
}

/// The first word, and what follows it.
fn word(line: &[u8]) -> (&[u8], &[u8]) {
    let line = line.trim_ascii_start();
    let end = line.iter().position(u8::is_ascii_whitespace);
    line.split_at(end.unwrap_or(line.len()))
}

fn find<T: Copy>(words: &[(&str, T)], found: &[u8]) -> Option<T> {
    let mut words = words.iter();
    let found = words.find(|(word, _)| found.eq_ignore_ascii_case(word.as_bytes()));
    found.map(|(_, value)| *value)
}

fn number(text: &[u8]) -> Option<u64> {
    let text = str::from_utf8(text).ok()?;
    let digits = text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|_| digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_in_any_sane_spelling() {
        for (line, sectors, kind, name, offset) in [
            (
                "RW 100 FLAT \"a b.vmdk\" 7",
                100,
                Kind::Flat,
                Some("a b.vmdk"),
                7,
            ),
            ("rw\t100  flat\t\"a\"", 100, Kind::Flat, Some("a"), 0),
            (
                "RW 9 VMFS \"x-flat.vmdk\"",
                9,
                Kind::Vmfs,
                Some("x-flat.vmdk"),
                0,
            ),
            ("RDONLY 1 ZERO ", 1, Kind::Zero, None, 0),
            ("NOACCESS 1 FLAT", 1, Kind::Flat, None, 0),
            ("RW 5 SESPARSE \"a=b\"", 5, Kind::SeSparse, Some("a=b"), 0),
            (
                "RW 5 FLAT \"/dev/sdb\" 63 partitionUUID \"x\" 3",
                5,
                Kind::Flat,
                Some("/dev/sdb"),
                63,
            ),
        ] {
            assert!(is_extent(line.as_bytes()), "{line}");
            let found = ExtentLine::parse(line.as_bytes()).expect(line);
            assert_eq!(
                (found.sectors, found.kind, found.offset),
                (sectors, kind, offset)
            );
            assert_eq!(found.name.as_deref(), name.map(OsStr::new), "{line}");
        }
    }

    #[test]
    fn what_does_not_parse_says_what_of_it_is_wrong() {
        for (line, part) in [
            ("RW -1 FLAT \"a\" 0", "'-1' is no number of sectors"),
            ("RW 1 FLAT a 0", "quotes"),
            ("RW 1 FLAT \"a 0", "quotes end"),
            ("RW 1 FLAT", "names no file"),
            ("RW 1 FLAT \"\" 0", "names no file"),
            ("RW 1 BENT \"a\" 0", "'BENT' is no type"),
            ("RW 1 FLAT \"a\" x", "'x' is no offset"),
            ("RW 1 VMFSRDM \"a\"", "raw device"),
            ("RW 99999999999999999999 ZERO", "number of sectors"),
        ] {
            let error = ExtentLine::parse(line.as_bytes()).expect_err(line);
            assert!(error.to_string().contains(part), "{line}: {error}");
        }
        bytes(1 << 60).expect_err("2^69 bytes");
        assert!(!is_extent(b"RW = 7") && !is_extent(b"CID=1"));
    }

    #[test]
    fn a_line_is_written_as_all_readers_take_it() {
        for line in [
            "RW 100 FLAT \"a b.vmdk\" 0",
            "RW 9 VMFS \"x-flat.vmdk\"",
            "RW 9 SPARSE \"x-s001.vmdk\"",
            "RW 1 ZERO",
        ] {
            let parsed = ExtentLine::parse(line.as_bytes()).expect(line);
            assert_eq!(String::from_utf8_lossy(&parsed.to_bytes()), line);
        }
    }
}

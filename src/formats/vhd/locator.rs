//! Parent locators: the paths under which a differencing disk looks for its parent.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::image::BackingName;
use crate::image::windows::{from_windows, to_windows};

/// Bytes of an entry in the header.
pub(super) const ENTRY_LEN: usize = 24;
/// Longest path we read, in bytes: Windows knows no longer ones.
pub(super) const MAX_DATA: u64 = 64 << 10;
/// Below this, `data_space` counts sectors, as the specification has it; from it on bytes, as
/// many writers have it.
const SECTORS_BELOW: u32 = 512;

/// What a locator's data is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Code {
    /// Relative path for Windows, UTF-16, least significant byte first.
    W2ru,
    /// Absolute path for Windows, UTF-16, least significant byte first.
    W2ku,
    /// File URL, UTF-8.
    MacX,
    /// A kind that is obsolete or that nothing writes; the four bytes.
    Other([u8; 4]),
}

impl Code {
    /// Those we read, best first.
    const READ: [Self; 3] = [Self::W2ru, Self::W2ku, Self::MacX];

    fn bytes(self) -> [u8; 4] {
        match self {
            Self::W2ru => *b"W2ru",
            Self::W2ku => *b"W2ku",
            Self::MacX => *b"MacX",
            Self::Other(bytes) => bytes,
        }
    }

    fn from_bytes(bytes: [u8; 4]) -> Self {
        let known = Self::READ.into_iter().find(|c| c.bytes() == bytes);
        known.unwrap_or(Self::Other(bytes))
    }

    /// Whether the format defines it: the obsolete ones too.
    pub(super) fn is_defined(self) -> bool {
        match self {
            Self::W2ru | Self::W2ku | Self::MacX => true,
            Self::Other(bytes) => [*b"Wi2r", *b"Wi2k", *b"Mac "].contains(&bytes),
        }
    }

    /// The four characters, as text.
    pub(super) fn word(self) -> String {
        self.bytes().escape_ascii().to_string()
    }
}

/// The bytes of an entry; big-endian.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawLocator {
    /// Which kind.
    code: [u8; 4],
    /// Room for the data: sectors, or bytes.
    space: U32,
    /// Length of the data in bytes.
    len: U32,
    /// Zero.
    reserved: U32,
    /// Offset of the data in the file.
    offset: U64,
}

const _: () = assert!(size_of::<RawLocator>() == ENTRY_LEN);

/// One entry of the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Locator {
    /// What its data is.
    pub(super) code: Code,
    /// Room for the data, as written: sectors or bytes.
    pub(super) space: u32,
    /// Length of the data in bytes.
    pub(super) len: u32,
    /// Offset of the data in the file.
    pub(super) offset: u64,
}

impl Locator {
    /// Reads an entry.
    pub(super) fn from_bytes(bytes: &[u8; ENTRY_LEN]) -> Self {
        let raw: RawLocator = zerocopy::transmute!(*bytes);
        Self {
            code: Code::from_bytes(raw.code),
            space: raw.space.get(),
            len: raw.len.get(),
            offset: raw.offset.get(),
        }
    }

    /// The bytes to be written.
    pub(super) fn to_bytes(self) -> [u8; ENTRY_LEN] {
        zerocopy::transmute!(RawLocator {
            code: self.code.bytes(),
            space: self.space.into(),
            len: self.len.into(),
            reserved: 0.into(),
            offset: self.offset.into(),
        })
    }

    /// Whether the entry is empty.
    pub(super) fn is_unused(&self) -> bool {
        self.code.bytes() == [0; 4]
    }

    /// Room for the data in bytes: the larger of what it says and what the data needs.
    pub(super) fn space_bytes(&self) -> u64 {
        let space = u64::from(self.space);
        let bytes = match self.space < SECTORS_BELOW {
            true => space * 512,
            false => space,
        };
        bytes.max(u64::from(self.len))
    }
}

/// Text of UTF-16 units up to the first zero; `None` where it is not valid: no file here has such
/// a name, and one that looks like it is another file.
pub(super) fn utf16(units: impl Iterator<Item = u16>) -> Option<String> {
    let decoded = char::decode_utf16(units.take_while(|u| *u != 0));
    decoded.collect::<std::result::Result<_, _>>().ok()
}

/// The text of a locator's data: UTF-8, or, of a file URL, any bytes.
pub(super) fn text(code: Code, data: &[u8]) -> Option<OsString> {
    match code {
        Code::W2ru | Code::W2ku => {
            let (pairs, _) = data.as_chunks::<2>();
            utf16(pairs.iter().map(|p| u16::from_le_bytes(*p))).map(OsString::from)
        }
        Code::MacX => {
            let end = data
                .iter()
                .rposition(|b| *b != 0)
                .map_or(0, |last| last + 1);
            Some(OsStr::from_bytes(&data[..end]).to_owned())
        }
        Code::Other(_) => None,
    }
}

/// The names to try, best first, each once: relative paths, absolute ones, file URLs, and the
/// name in the header.
pub(super) fn names(texts: &[(Code, OsString)], header: Option<&str>) -> Vec<BackingName> {
    let mut names: Vec<BackingName> = Vec::new();
    let mut add = |path: Option<OsString>, origin: &str| {
        if let Some(path) = path.filter(|p| !p.is_empty() && !p.as_bytes().contains(&0))
            && names.iter().all(|n| n.path != path)
        {
            names.push(BackingName {
                path,
                origin: origin.to_owned(),
            });
        }
    };
    for code in Code::READ {
        for (_, text) in texts.iter().filter(|(c, _)| *c == code) {
            let path = match code {
                Code::MacX => from_url(text),
                _ => text.to_str().and_then(from_windows).map(OsString::from),
            };
            add(path, &code.word());
        }
    }
    add(header.and_then(from_windows).map(OsString::from), "header");
    names
}

/// The path of a file URL; libvhd writes relative ones too, and some leave the scheme out.
fn from_url(url: &OsStr) -> Option<OsString> {
    let url = url.as_bytes();
    let path = match url.strip_prefix(b"file://") {
        Some(rest) => rest.strip_prefix(b"localhost").unwrap_or(rest),
        None => url,
    };
    let mut path = &*percent_decoded(path);
    while let Some(mut after) = path.strip_prefix(b"./") {
        while let Some(rest) = after.strip_prefix(b"/") {
            after = rest;
        }
        path = after;
    }
    (!path.is_empty()).then(|| OsStr::from_bytes(path).to_owned())
}

fn percent_decoded(text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        let hex = tail.get(..2).and_then(|h| std::str::from_utf8(h).ok());
        let decoded = hex
            .filter(|_| *first == b'%')
            .and_then(|h| u8::from_str_radix(h, 16).ok());
        bytes.push(decoded.unwrap_or(*first));
        rest = match decoded {
            Some(_) => &tail[2..],
            None => tail,
        };
    }
    bytes
}

/// Data of a locator for `path`, which is relative to the image's directory or absolute.
pub(super) fn data(code: Code, path: &str) -> Vec<u8> {
    match code {
        Code::MacX => to_url(path).into_bytes(),
        _ => to_windows(path)
            .encode_utf16()
            .flat_map(u16::to_le_bytes)
            .collect(),
    }
}

fn to_url(path: &str) -> String {
    let mut url = "file://".to_owned();
    if !path.starts_with('/') && !path.starts_with("../") {
        url.push_str("./");
    }
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte) {
            url.push(char::from(byte));
        } else {
            url.push_str(&format!("%{byte:02X}"));
        }
    }
    url
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(texts: &[(Code, &str)], header: &str) -> Vec<(OsString, String)> {
        let texts: Vec<_> = texts.iter().map(|(c, t)| (*c, (*t).into())).collect();
        let names = names(&texts, Some(header)).into_iter();
        names.map(|n| (n.path, n.origin)).collect()
    }

    #[test]
    fn relative_paths_come_first_and_each_name_once() {
        let found = paths(
            &[
                (Code::MacX, "file:///vm/my%20base.vhd"),
                (Code::Other(*b"Wi2k"), "C:\\old.vhd"),
                (Code::W2ku, "C:\\vm\\base.vhd"),
                (Code::W2ru, ".\\sub\\base.vhd"),
            ],
            "base.vhd",
        );
        let pair = |p: &str, o: &str| (OsString::from(p), o.to_owned());
        assert_eq!(
            found,
            [
                pair("sub/base.vhd", "W2ru"),
                pair("base.vhd", "W2ku"),
                pair("/vm/my base.vhd", "MacX"),
            ]
        );
    }

    #[test]
    fn what_is_written_is_read_back_as_the_same_path() {
        for path in ["base.vhd", "../a b/ü.vhd", "/abs/x.vhd", "sub/%41.vhd"] {
            for code in Code::READ {
                let data = data(code, path);
                let text = text(code, &data).expect("is a kind we read");
                let text = text.to_str().expect("is UTF-8");
                assert_eq!(paths(&[(code, text)], "")[0].0, path, "{text}");
            }
        }
    }

    #[test]
    fn servers_and_drives_leave_only_the_file_name() {
        for text in ["\\\\server\\share\\p.vhd", "d:p.vhd", "D:\\x\\p.vhd"] {
            assert_eq!(paths(&[(Code::W2ku, text)], "")[0].0, "p.vhd");
        }
        assert!(paths(&[(Code::W2ku, "C:\\")], "").is_empty());
    }

    #[test]
    fn what_is_not_utf_16_gives_no_name_rather_than_one_that_looks_like_it() {
        assert_eq!(utf16([0xd800, 0x41].into_iter()), None);
        assert_eq!(text(Code::W2ku, &[0, 0xd8, 0x41, 0]), None);
        assert!(names(&[], None).is_empty());
    }

    #[test]
    fn a_file_url_holds_any_bytes() {
        let found = paths(&[(Code::MacX, "file://./caf%e9%ff.vhd")], "");
        assert_eq!(found[0].0.as_bytes(), b"caf\xe9\xff.vhd");
        let text = text(Code::MacX, b"file:///vm/caf\xe9.vhd\0\0").expect("is a name");
        let found = names(&[(Code::MacX, text)], None);
        assert_eq!(found[0].path.as_bytes(), b"/vm/caf\xe9.vhd");
        assert_eq!(paths(&[(Code::MacX, "100%")], "")[0].0, "100%");
    }

    #[test]
    fn space_below_512_counts_sectors() {
        let mut locator = Locator::from_bytes(&[0; ENTRY_LEN]);
        locator.space = 2;
        assert_eq!(locator.space_bytes(), 1024);
        locator.space = 1024;
        assert_eq!(locator.space_bytes(), 1024);
        assert!(locator.is_unused());
    }
}

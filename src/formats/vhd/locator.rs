//! Parent locators: the paths under which a differencing disk looks for its parent.

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::image::BackingName;

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

/// Text of UTF-16 units up to the first zero; what is not valid becomes U+FFFD.
pub(super) fn utf16(units: impl Iterator<Item = u16>) -> String {
    char::decode_utf16(units.take_while(|u| *u != 0))
        .map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER))
        .collect()
}

/// The text of a locator's data.
pub(super) fn text(code: Code, data: &[u8]) -> Option<String> {
    match code {
        Code::W2ru | Code::W2ku => {
            let (pairs, _) = data.as_chunks::<2>();
            Some(utf16(pairs.iter().map(|p| u16::from_le_bytes(*p))))
        }
        Code::MacX => {
            let text = String::from_utf8_lossy(data);
            Some(text.trim_end_matches('\0').to_owned())
        }
        Code::Other(_) => None,
    }
}

/// The names to try, best first, each once: relative paths, absolute ones, file URLs, and the
/// name in the header.
pub(super) fn names(texts: &[(Code, String)], header: &str) -> Vec<BackingName> {
    let mut names: Vec<BackingName> = Vec::new();
    let mut add = |path: Option<String>, origin: &str| {
        if let Some(path) = path.filter(|p| !p.is_empty() && !p.contains('\0'))
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
                _ => from_windows(text),
            };
            add(path, &code.word());
        }
    }
    add(from_windows(header), "header");
    names
}

/// A path as Windows writes it, for here: separators translated; of a path with a drive letter or
/// a server only the file name, which is looked for beside the image.  A path that begins with a
/// slash was written here and is kept.
fn from_windows(path: &str) -> Option<String> {
    if path.is_empty() {
        return None;
    }
    if path.starts_with('/') {
        return Some(path.to_owned());
    }
    let path = path.replace('\\', "/");
    let drive = path.as_bytes().get(1) == Some(&b':')
        && path.as_bytes().first().is_some_and(u8::is_ascii_alphabetic);
    if drive || path.starts_with('/') {
        let name = path.rsplit(['/', ':']).next().unwrap_or_default();
        return (!name.is_empty()).then(|| name.to_owned());
    }
    Some(strip_dots(&path))
}

fn strip_dots(path: &str) -> String {
    let mut rest = path;
    while let Some(after) = rest.strip_prefix("./") {
        rest = after.trim_start_matches('/');
    }
    rest.to_owned()
}

/// The path of a file URL; libvhd writes relative ones too, and some leave the scheme out.
fn from_url(url: &str) -> Option<String> {
    let path = match url.strip_prefix("file://") {
        Some(rest) => rest.strip_prefix("localhost").unwrap_or(rest),
        None => url,
    };
    let path = percent_decoded(path)?;
    (!path.is_empty()).then(|| strip_dots(&path))
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
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
    String::from_utf8(bytes).ok()
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

/// A relative path as VirtualBox, Hyper-V and XenServer read it: `.\name`; an absolute one as it
/// is, since there is no drive to name.
fn to_windows(path: &str) -> String {
    if path.starts_with('/') {
        return path.to_owned();
    }
    let path = path.replace('/', "\\");
    match path == ".." || path.starts_with("..\\") {
        true => path,
        false => format!(".\\{path}"),
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

    fn paths(texts: &[(Code, &str)], header: &str) -> Vec<(String, String)> {
        let texts: Vec<_> = texts.iter().map(|(c, t)| (*c, (*t).to_owned())).collect();
        let names = names(&texts, header).into_iter();
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
        let pair = |p: &str, o: &str| (p.to_owned(), o.to_owned());
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
                assert_eq!(paths(&[(code, &text)], "")[0].0, path, "{text}");
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
    fn broken_text_gives_no_name() {
        assert!(paths(&[(Code::MacX, "file://%ff%fe")], "").is_empty());
        assert_eq!(paths(&[(Code::MacX, "100%")], "")[0].0, "100%");
        assert_eq!(utf16([0xd800, 0x41].into_iter()), "\u{fffd}A");
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

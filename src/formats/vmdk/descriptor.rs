//! The descriptor: lines of text, kept as they are but for those that change.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use crate::error::{Error, Result};
use crate::formats::vmdk::line::{ExtentLine, is_extent};
use crate::storage::Storage;
use crate::util::align::{clamp_len, len64};

/// Longest descriptor.
pub(super) const MAX_LEN: u64 = 1 << 20;
/// Most extents; VirtualBox takes 1100.
pub(super) const MAX_EXTENTS: usize = 4096;
/// A CID that says: there is none.
pub(super) const NO_CID: u32 = u32::MAX;
/// A CID that says: nothing was ever written.
const NEW_CID: u32 = u32::MAX - 1;
/// What some editors put before a text in UTF-8.
const MARK: &[u8] = b"\xef\xbb\xbf";

/// One line.
#[derive(Debug, Clone)]
struct Line {
    /// As it stands, without its end.
    text: Vec<u8>,
    what: What,
}

#[derive(Debug, Clone)]
enum What {
    /// A comment, or nothing.
    Nothing,
    /// `KEY = VALUE`; the key in lower case, the value without quotes.
    Pair(String, Vec<u8>),
    Extent(ExtentLine),
}

/// A descriptor.
#[derive(Debug, Clone, Default)]
pub(super) struct Descriptor {
    lines: Vec<Line>,
    has_returns: bool,
}

/// Whether a file begins as a descriptor does.
pub(super) fn is_one(head: &[u8]) -> bool {
    let head = head.strip_prefix(MARK).unwrap_or(head);
    if is_utf16(head) {
        return true;
    }
    if starts_as_one(head) {
        return true;
    }
    let mut lines = head.split(|b| *b == b'\n').map(<[u8]>::trim_ascii);
    let first = lines.find(|line| !line.is_empty() && !line.starts_with(b"#"));
    let mentions = |words: &[u8]| {
        head.windows(words.len())
            .any(|w| w.eq_ignore_ascii_case(words))
    };
    let versioned = first
        .and_then(pair)
        .is_some_and(|(key, _)| key == "version");
    versioned && mentions(b"createType")
}

fn starts_as_one(head: &[u8]) -> bool {
    let first = head.trim_ascii_start();
    let Some(rest) = first.strip_prefix(b"#") else {
        return false;
    };
    let rest: Vec<u8> = rest
        .iter()
        .take(24)
        .filter(|b| **b != b' ')
        .copied()
        .collect();
    rest.to_ascii_lowercase().starts_with(b"diskdescriptorfile")
}

/// Whether it is a descriptor in UTF-16, with or without a mark, as some editors leave it.
fn is_utf16(head: &[u8]) -> bool {
    let text = match head {
        [0xff, 0xfe, rest @ ..] | [0xfe, 0xff, 0, rest @ ..] => rest,
        _ => head,
    };
    let bytes: Vec<u8> = text.iter().step_by(2).take(24).copied().collect();
    text.get(1) == Some(&0) && starts_as_one(&bytes)
}

impl Descriptor {
    /// Reads the descriptor in a range of a file, up to its first NUL.
    ///
    /// # Errors
    /// As [`Descriptor::parse`]; `Corrupt` for one that is too long; the host's.
    pub(super) fn read(storage: &dyn Storage, host: u64, len: u64) -> Result<Self> {
        let mut bytes = vec![0; clamp_len(len.min(MAX_LEN + 1), usize::MAX)];
        storage.read_at(&mut bytes, host)?;
        if let Some(end) = bytes.iter().position(|b| *b == 0)
            && !is_utf16(&bytes)
        {
            bytes.truncate(end);
        }
        if len64(bytes.len()) > MAX_LEN {
            return Err(Error::corrupt(format!(
                "the descriptor is longer than {MAX_LEN} bytes (allowed: that)"
            )));
        }
        Self::parse(&bytes)
    }

    /// Parses a descriptor.
    ///
    /// # Errors
    /// `Corrupt` for a line that is neither a comment nor a pair nor an extent, for numbers that are
    /// none, and for too many extents; `Unsupported` for another version, and for what is encrypted.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self> {
        if is_utf16(bytes) {
            let text = "the descriptor is in UTF-16 (allowed: UTF-8)";
            return Err(Error::unsupported(text));
        }
        let mut this = Self::default();
        let mut extents = 0;
        let bytes = bytes.strip_prefix(MARK).unwrap_or(bytes);
        for (index, text) in bytes.split(|b| *b == b'\n').enumerate() {
            let text = match text.strip_suffix(b"\r") {
                Some(text) => {
                    this.has_returns = true;
                    text
                }
                None => text,
            };
            let line = Line::parse(text).map_err(|e| {
                Error::new(
                    e.kind(),
                    format!("line {} of the descriptor: {}", index + 1, e.message()),
                )
            })?;
            extents += usize::from(matches!(line.what, What::Extent(_)));
            if extents > MAX_EXTENTS {
                let text = format!(
                    "the descriptor has more than {MAX_EXTENTS} extents (allowed: that many)"
                );
                return Err(Error::corrupt(text));
            }
            this.lines.push(line);
        }
        // What follows the last end of a line is no line.
        if this.lines.last().is_some_and(|line| line.text.is_empty()) {
            this.lines.pop();
        }
        this.check()?;
        Ok(this)
    }

    fn check(&self) -> Result<()> {
        match self.text("version").as_deref() {
            None | Some("1" | "2" | "3") => {}
            Some(other) => {
                return Err(Error::unsupported(format!(
                    "the descriptor is of version '{other}' (allowed: 1, 2, 3)"
                )));
            }
        }
        for key in ["cid", "parentcid"] {
            if let Some(value) = self.get(key)
                && hex(value).is_none()
            {
                return Err(Error::corrupt(format!(
                    "the {key} of the descriptor is '{}' (allowed: up to 8 hexadecimal digits)",
                    String::from_utf8_lossy(value).escape_debug()
                )));
            }
        }
        Ok(())
    }

    /// Why its data cannot be read, where it is encrypted.
    pub(super) fn encrypted(&self) -> Option<String> {
        let mut lines = self.lines.iter();
        lines.find_map(|line| match &line.what {
            What::Pair(key, value) => {
                let filters = String::from_utf8_lossy(value).to_ascii_lowercase();
                let filtered = key == "ddb.iofilters" && filters.contains("vmwarevmcrypt");
                let named = key.starts_with("encrypt") || key.starts_with("ddb.encrypt");
                (named || filtered).then(|| format!("the disk is encrypted ({key})"))
            }
            _ => None,
        })
    }

    /// The value of a key, which is given in lower case; of several the first.
    pub(super) fn get(&self, wanted: &str) -> Option<&[u8]> {
        self.lines.iter().find_map(|line| match &line.what {
            What::Pair(key, value) if key == wanted => Some(&**value),
            _ => None,
        })
    }

    /// The same as text.
    pub(super) fn text(&self, wanted: &str) -> Option<String> {
        let value = self.get(wanted)?;
        Some(String::from_utf8_lossy(value).into_owned())
    }

    /// In which state the disk is.
    pub(super) fn cid(&self) -> Option<u32> {
        hex(self.get("cid")?)
    }

    /// In which state its parent was; `None`: it has no parent.
    pub(super) fn parent_cid(&self) -> Option<u32> {
        hex(self.get("parentcid")?).filter(|cid| *cid != NO_CID)
    }

    /// The name of its parent: untrusted.
    pub(super) fn parent_name(&self) -> Option<OsString> {
        let name = self.get("parentfilenamehint")?;
        (!name.is_empty()).then(|| OsString::from_vec(name.to_vec()))
    }

    /// Whether it has no lines but comments.
    pub(super) fn is_empty(&self) -> bool {
        self.lines
            .iter()
            .all(|line| matches!(line.what, What::Nothing))
    }

    /// Its extents, in order.
    pub(super) fn extents(&self) -> impl Iterator<Item = &ExtentLine> {
        self.lines.iter().filter_map(|line| match &line.what {
            What::Extent(extent) => Some(extent),
            _ => None,
        })
    }
}

/// Changes; all that is not named stays as it is.
impl Descriptor {
    /// Gives a key this value: in its line where there is one, else in a new line.
    pub(super) fn set(&mut self, key: &str, value: &[u8]) {
        let wanted = key.to_ascii_lowercase();
        let is_it = |line: &Line| matches!(&line.what, What::Pair(key, _) if *key == wanted);
        match self.lines.iter().position(is_it) {
            Some(at) => self.lines[at].set(value),
            None => {
                let is_ddb = wanted.starts_with("ddb.");
                let plain = ["version", "cid", "parentcid"].contains(&&*wanted);
                let (before, after) = match (is_ddb, plain) {
                    (true, _) => (" = \"", "\""),
                    (false, true) => ("=", ""),
                    (false, false) => ("=\"", "\""),
                };
                let text = [key.as_bytes(), before.as_bytes(), value, after.as_bytes()].concat();
                let line = Line {
                    text,
                    what: What::Pair(wanted, value.to_vec()),
                };
                let at = match is_ddb {
                    true => self.lines.len(),
                    false => self.head_end(),
                };
                self.lines.insert(at, line);
            }
        }
    }

    /// Behind the last pair that is not about the disk as a device.
    fn head_end(&self) -> usize {
        let is_head =
            |line: &Line| matches!(&line.what, What::Pair(key, _) if !key.starts_with("ddb."));
        self.lines.iter().rposition(is_head).map_or(0, |at| at + 1)
    }

    /// Drops the lines of a key, which is given in lower case.
    pub(super) fn remove(&mut self, wanted: &str) {
        let is_it = |line: &Line| matches!(&line.what, What::Pair(key, _) if key == wanted);
        self.lines.retain(|line| !is_it(line));
    }

    /// Puts these extents in the place of those that it has.
    pub(super) fn set_extents(&mut self, extents: Vec<ExtentLine>) {
        let is_one = |line: &Line| matches!(line.what, What::Extent(_));
        let at = self.lines.iter().position(is_one);
        let at = at.unwrap_or_else(|| self.head_end());
        let old: Vec<ExtentLine> = self.extents().cloned().collect();
        // What did not change stays as it was written.
        let same = old.iter().zip(&extents).take_while(|(a, b)| a == b).count();
        let mut seen = 0;
        self.lines.retain(|line| {
            let counts = is_one(line);
            seen += usize::from(counts);
            !counts || seen <= same
        });
        let line = |extent: ExtentLine| Line {
            text: extent.to_bytes(),
            what: What::Extent(extent),
        };
        let last = self.lines.iter().rposition(is_one).map_or(at, |at| at + 1);
        let new = extents.into_iter().skip(same).map(line);
        let rest = self.lines.split_off(last.min(self.lines.len()));
        self.lines.extend(new);
        self.lines.extend(rest);
    }

    /// Has the disk be in another state, whose CID this is.
    pub(super) fn set_cid(&mut self, cid: u32, longer: u128) {
        // As long as the old one, where that is long enough: what follows stays in its place.
        let digits = self.get("cid").map_or(8, |old| old.trim_ascii().len());
        let (cid, digits) = match digits {
            7 if cid & 0xfff_ffff != 0 => (cid & 0xfff_ffff, 7),
            _ => (cid, 8),
        };
        self.set("CID", format!("{cid:0digits$x}").as_bytes());
        if self.get("ddb.longcontentid").is_some() {
            let id = longer << 32 | u128::from(cid);
            self.set("ddb.longContentID", format!("{id:032x}").as_bytes());
        }
    }

    /// As it is in a file.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let end: &[u8] = if self.has_returns { b"\r\n" } else { b"\n" };
        let lines = self.lines.iter().flat_map(|line| [&line.text, end]);
        lines.flatten().copied().collect()
    }
}

/// Whether a CID can be that of a disk.
pub(super) fn is_cid(cid: u32) -> bool {
    ![0, NEW_CID, NO_CID].contains(&cid)
}

impl Line {
    /// Gives its pair this value, with blanks and quotes as they are.
    fn set(&mut self, value: &[u8]) {
        let What::Pair(_, old) = &mut self.what else {
            return;
        };
        let equals = self.text.iter().position(|b| *b == b'=').unwrap_or(0);
        let behind = equals + 1;
        let at = match old.is_empty() {
            true => self
                .text
                .iter()
                .rposition(|b| *b == b'"')
                .unwrap_or(self.text.len()),
            false => {
                let mut places = self.text[behind..].windows(old.len());
                let at = places.position(|part| part == old.as_slice());
                at.map_or(behind, |at| behind + at)
            }
        };
        self.text.splice(at..at + old.len(), value.iter().copied());
        *old = value.to_vec();
    }

    fn parse(text: &[u8]) -> Result<Self> {
        let trimmed = text.trim_ascii();
        let what = if trimmed.is_empty() || trimmed.starts_with(b"#") {
            What::Nothing
        } else if is_extent(trimmed) {
            What::Extent(ExtentLine::parse(trimmed)?)
        } else {
            let (key, value) = pair(trimmed).ok_or_else(|| {
                let shown = trimmed.get(..80).unwrap_or(trimmed);
                let shown = String::from_utf8_lossy(shown);
                let shown = shown.escape_debug();
                Error::corrupt(format!("'{shown}' is neither KEY=VALUE nor an extent"))
            })?;
            What::Pair(key, value.to_vec())
        };
        let text = text.to_vec();
        Ok(Self { text, what })
    }
}

/// The key, in lower case, and the value, without quotes, of a line.
fn pair(line: &[u8]) -> Option<(String, &[u8])> {
    let at = line.iter().position(|b| *b == b'=')?;
    let key = str::from_utf8(line[..at].trim_ascii()).ok()?;
    let odd = |c: char| c.is_whitespace() || c == '"';
    if key.is_empty() || key.contains(odd) {
        return None;
    }
    let value = line[at + 1..].trim_ascii();
    let inner = value
        .strip_prefix(b"\"")
        .and_then(|v| v.strip_suffix(b"\""));
    Some((key.to_ascii_lowercase(), inner.unwrap_or(value)))
}

fn hex(value: &[u8]) -> Option<u32> {
    let text = str::from_utf8(value).ok()?.trim();
    let digits = text.bytes().all(|b| b.is_ascii_hexdigit());
    u32::from_str_radix(text, 16).ok().filter(|_| digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_is_changed_in_its_place_and_the_rest_stays_byte_for_byte() {
        let text = "# Disk DescriptorFile\r\nversion=1\r\n CID = 1a2b \r\nparentCID=ffffffff\r\n\
            x.y=\"\"\r\n# Extent description\r\nRW  8\tFLAT \"a\" 0\r\nRW 9 ZERO\r\n#DDB\r\n\
            ddb.longContentID = \"0123456789abcdef0123456700001a2b\"\r\n";
        let mut found = Descriptor::parse(text.as_bytes()).expect("parses");
        assert_eq!(String::from_utf8_lossy(&found.to_bytes()), text);
        found.set_cid(0xdead_beef, 7);
        found.set("x.y", b"z");
        found.set("parentFileNameHint", b"p.vmdk");
        found.set("ddb.adapterType", b"ide");
        let mut extents: Vec<ExtentLine> = found.extents().cloned().collect();
        extents[1].sectors = 10;
        extents.push(extents[1].clone());
        found.set_extents(extents);
        let wanted = "# Disk DescriptorFile\r\nversion=1\r\n CID = deadbeef \r\n\
            parentCID=ffffffff\r\nx.y=\"z\"\r\nparentFileNameHint=\"p.vmdk\"\r\n\
            # Extent description\r\nRW  8\tFLAT \"a\" 0\r\nRW 10 ZERO\r\nRW 10 ZERO\r\n#DDB\r\n\
            ddb.longContentID = \"000000000000000000000007deadbeef\"\r\n\
            ddb.adapterType = \"ide\"\r\n";
        assert_eq!(String::from_utf8_lossy(&found.to_bytes()), wanted);
        found.remove("parentfilenamehint");
        assert_eq!(found.parent_name(), None);
        let again = Descriptor::parse(&found.to_bytes()).expect("parses");
        assert_eq!(again.to_bytes(), found.to_bytes());
    }

    #[test]
    fn keys_are_read_in_any_sane_spelling() {
        let text =
            b"# Disk DescriptorFile\r\nVERSION = 1\r\nparentCID=FFFFFFFF\r\n\tcid = 1a2b \r\n\
            createType=\"vmfs\"\r\n\r\nRW 8 VMFS \"a\"\r\nddb.adapterType = \"ide\"\r\n\0rubbish";
        let text = text.split(|b| *b == 0).next().expect("has a start");
        let found = Descriptor::parse(text).expect("parses");
        assert_eq!((found.cid(), found.parent_cid()), (Some(0x1a2b), None));
        assert_eq!(found.text("createtype").as_deref(), Some("vmfs"));
        assert_eq!(found.text("ddb.adaptertype").as_deref(), Some("ide"));
        assert_eq!(found.extents().count(), 1);
    }

    #[test]
    fn what_is_not_understood_is_an_error_with_the_number_of_its_line() {
        for (text, part) in [
            ("#\nversion=4", "'4'"),
            ("version=1\nCID=xyz", "'xyz'"),
            ("version=1\nCID=123456789", "8 hexadecimal"),
            ("version=1\n\nbla bla", "line 3"),
            ("version=1\nXX 100 FLAT \"a=b\" 0", "line 2"),
            ("RW 1 FLAT a", "line 1"),
        ] {
            let error = Descriptor::parse(text.as_bytes()).expect_err(text);
            assert!(error.to_string().contains(part), "{text}: {error}");
        }
        let many = "RW 1 ZERO\n".repeat(MAX_EXTENTS + 1);
        Descriptor::parse(many.as_bytes()).expect_err("too many extents");
    }

    #[test]
    fn descriptors_are_known_by_their_first_words() {
        for head in [
            "# Disk DescriptorFile\n",
            "#Disk Descriptor File\r\n",
            "\n#Disk DescriptorFile",
            "version=1\nCID=1\ncreateType=\"x\"",
            "#!\n# x\nVersion = 1\ncreatetype=\"x\"",
        ] {
            assert!(is_one(head.as_bytes()), "{head}");
            let wide: Vec<u8> = head.bytes().flat_map(|b| [b, 0]).collect();
            if head.starts_with('#') && !head.starts_with("#!") {
                assert!(is_one(&wide), "{head}");
                Descriptor::parse(&wide).expect_err("in UTF-16");
            }
        }
        assert!(!is_one(b"version=1\n") && !is_one(b"# Disk of mine") && !is_one(b""));
    }
}

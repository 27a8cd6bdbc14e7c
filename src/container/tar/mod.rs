//! tar archives: what is in them and where.
//!
//! Old tar, ustar, GNU and pax.  Every member has a header of 512 bytes, its data, and zeroes up to
//! the next multiple of 512; a block of zeroes ends the archive.  Readers disagree about what is
//! damaged: some end quietly, some look for the next header.  Here, after the first header, what is
//! neither a header nor a block of zeroes is an error with its offset, and so is the end of the file
//! before a block of zeroes: a member may be gone.

use std::collections::HashSet;
use std::ffi::OsString;
use std::ops::Range;
use std::os::unix::ffi::OsStringExt;

use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;
use crate::storage::window::all_bytes_of;
use crate::util::align::up;
use crate::util::text::printable;

mod header;
mod pax;
pub mod write;

use header::Header;
use pax::Records;

/// Bytes of a block: of a header, and of what data is rounded up to.
pub const BLOCK: u64 = 512;
/// Most members of an archive.
pub const MAX_MEMBERS: usize = 100_000;
/// Most bytes of all names together.
const MAX_NAMES: usize = 16 << 20;
/// Most bytes of a name.
pub const MAX_NAME: u64 = 4096;
/// Most bytes of the records that a header of pax brings.
const MAX_RECORDS: u64 = 1 << 20;
/// Most further blocks of the map of an old sparse member.
const MAX_SPARSE_BLOCKS: u32 = 1 << 16;

/// What a member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A file, whose bytes are there as they are.
    File,
    /// A file of which only the bytes that are no holes are there.
    Sparse,
    /// A second name of a member.
    HardLink,
    /// A name that leads elsewhere.
    SymbolicLink,
    /// A directory.
    Directory,
    /// A device or a pipe.
    Device,
    /// Something else, by the letter that its header has.
    Other(u8),
}

impl Kind {
    /// What it is, in words.
    pub fn words(self) -> String {
        match self {
            Self::File => "a file".to_owned(),
            Self::Sparse => "a sparse file".to_owned(),
            Self::HardLink => "a hard link".to_owned(),
            Self::SymbolicLink => "a symbolic link".to_owned(),
            Self::Directory => "a directory".to_owned(),
            Self::Device => "a device or a pipe".to_owned(),
            Self::Other(letter) => format!("of the unknown kind {letter:#x}"),
        }
    }
}

/// One member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its name, without a leading `./`: bytes, never to be followed on the host.
    pub name: OsString,
    /// What it is.
    pub kind: Kind,
    /// Where its data is in the archive, in bytes.
    pub data: Range<u64>,
}

/// Lists the members of the archive in `storage`, in order.  Reads their headers alone.
///
/// # Errors
/// `WrongFormat` where it does not begin with a header; `Corrupt` for what is damaged, cut, or has
/// two members of one name; `OutOfRange` past the bounds above; the host's.
pub fn members(storage: &dyn Storage) -> Result<Vec<Member>> {
    let mut walk = Walk {
        storage,
        at: 0,
        global: false,
        next: Next::default(),
        names: HashSet::new(),
        names_len: 0,
        members: Vec::new(),
    };
    while walk.step()? {}
    Ok(walk.members)
}

/// What the headers before a member's own say about it.
#[derive(Debug, Default)]
struct Next {
    records: Option<Records>,
    name: Option<Vec<u8>>,
    link: bool,
}

struct Walk<'a> {
    storage: &'a dyn Storage,
    at: u64,
    /// All members from here on are sparse.
    global: bool,
    next: Next,
    names: HashSet<OsString>,
    /// Bytes of all names.
    names_len: usize,
    members: Vec<Member>,
}

impl Walk<'_> {
    /// Takes the header at hand; whether there may be another.
    fn step(&mut self) -> Result<bool> {
        let Some(header) = self.header()? else {
            return self.end();
        };
        match header.letter() {
            b'x' | b'X' => {
                let records = self.records(&header)?;
                if self.next.records.replace(records).is_some() {
                    return Err(self.corrupt("a second header of pax for one member"));
                }
            }
            b'g' => {
                let records = self.records(&header)?;
                if records.path.is_some() || records.size.is_some() {
                    // Some readers go by it for all members that follow, others for none.
                    let text = "a name or a size that is to be that of all members";
                    return Err(self.corrupt(text));
                }
                self.global |= records.sparse;
            }
            b'L' => {
                let name = self.long_name(&header)?;
                if self.next.name.replace(name).is_some() {
                    return Err(self.corrupt("a second long name for one member"));
                }
            }
            b'K' => {
                self.long_name(&header)?;
                if std::mem::replace(&mut self.next.link, true) {
                    return Err(self.corrupt("a second long link for one member"));
                }
            }
            _ => self.member(&header)?,
        }
        Ok(true)
    }

    /// The header at hand; `None` for the block of zeroes.
    fn header(&self) -> Result<Option<Header>> {
        let size = self.storage.size();
        if size.saturating_sub(self.at) < BLOCK {
            if self.at == 0 {
                return Err(self.no_archive("it has less than 512 bytes"));
            }
            return Err(self.corrupt(&format!(
                "the file ends at {size:#x}, before the block of zeroes that ends an archive: it \
                 was cut",
            )));
        }
        let mut block = [0; 512];
        self.storage.read_alone(&mut block, self.at)?;
        match Header::parse(block) {
            Ok(header) => Ok(header),
            Err(what) if self.at == 0 => Err(self.no_archive(&what)),
            Err(what) => Err(self.corrupt(&what)),
        }
    }

    fn end(&self) -> Result<bool> {
        if self.at == 0 {
            return Err(self.no_archive("it begins with zeroes"));
        }
        match self.next.records.is_some() || self.next.name.is_some() || self.next.link {
            true => Err(self.corrupt("the archive ends before the member of a long name")),
            false => Ok(false),
        }
    }

    /// Where the data of a header at hand is.
    fn data(&self, start: u64, size: u64, what: &str) -> Result<Range<u64>> {
        let end = start.checked_add(size);
        match end.filter(|end| *end <= self.storage.size()) {
            Some(end) => Ok(start..end),
            None => Err(self.corrupt(&format!(
                "{what} has {size} bytes at {start:#x} (allowed: inside the file of {:#x} bytes: \
                 it may have been cut)",
                self.storage.size()
            ))),
        }
    }

    /// What follows a header that describes the next one.
    fn extension(&mut self, header: &Header, most: u64, what: &str) -> Result<Vec<u8>> {
        let size = header.size().map_err(|e| self.corrupt(&e))?;
        if size > most {
            return Err(self.corrupt(&format!("{what} of {size} bytes (allowed: {most})")));
        }
        let data = self.data(self.at + BLOCK, size, what)?;
        let bytes = all_bytes_of(self.storage, &data)?;
        self.at = self.after(data.end)?;
        Ok(bytes)
    }

    /// Where the next header is.
    fn after(&self, end: u64) -> Result<u64> {
        up(end, BLOCK).ok_or_else(|| self.corrupt("the archive is longer than 2^64 bytes"))
    }

    fn records(&mut self, header: &Header) -> Result<Records> {
        let at = self.at;
        let bytes = self.extension(header, MAX_RECORDS, "a header of pax")?;
        Records::parse(&bytes).map_err(|what| damaged(self.storage, at, &what))
    }

    fn long_name(&mut self, header: &Header) -> Result<Vec<u8>> {
        let mut name = self.extension(header, MAX_NAME, "a long name")?;
        let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
        name.truncate(end);
        Ok(name)
    }

    fn member(&mut self, header: &Header) -> Result<()> {
        let next = std::mem::take(&mut self.next);
        let records = next.records.unwrap_or_default();
        let name = records.path.or(next.name);
        let name = clean(&name.unwrap_or_else(|| header.name()));
        let shown = format!("member '{}'", printable(&name));
        let size = match records.size {
            Some(size) => size,
            None => header
                .size()
                .map_err(|e| self.corrupt(&format!("{shown}: {e}")))?,
        };
        let mut kind = header.kind();
        if kind == Kind::File && (records.sparse || self.global) {
            kind = Kind::Sparse;
        }
        if size > 0 && !matches!(kind, Kind::File | Kind::Sparse | Kind::Other(_)) {
            // Some readers take it that data follows, others that none does.
            return Err(self.corrupt(&format!(
                "{shown} is {} of {size} bytes (allowed: 0)",
                kind.words()
            )));
        }
        let start = self.at + BLOCK + self.map_blocks(header, &shown)?;
        let data = self.data(start, size, &shown)?;
        let following = self.after(data.end)?;
        self.add(Member { name, kind, data })?;
        self.at = following;
        Ok(())
    }

    /// Bytes of the map that an old sparse member has behind its header.
    fn map_blocks(&self, header: &Header, shown: &str) -> Result<u64> {
        let mut more = header.has_more_map();
        let mut blocks = 0;
        while more {
            blocks += 1;
            if blocks > MAX_SPARSE_BLOCKS {
                let text = format!("{shown}: its map has no end (allowed: {MAX_SPARSE_BLOCKS})");
                return Err(self.corrupt(&text));
            }
            let at = self.at + u64::from(blocks) * BLOCK;
            let block = self.data(at, BLOCK, shown)?;
            let mut last = [0];
            // The flag is behind 21 entries of 24 bytes.
            self.storage.read_alone(&mut last, block.start + 504)?;
            more = last != [0];
        }
        Ok(u64::from(blocks) * BLOCK)
    }

    fn add(&mut self, member: Member) -> Result<()> {
        self.names_len += member.name.len();
        if self.members.len() == MAX_MEMBERS || self.names_len > MAX_NAMES {
            let text = format!(
                "has more than {MAX_MEMBERS} members, or names of more than {MAX_NAMES} bytes"
            );
            return Err(Error::new(ErrorKind::OutOfRange, text).at_opt(self.storage.path()));
        }
        let shown = printable(&member.name);
        if member.name.is_empty() && member.kind != Kind::Directory {
            return Err(self.corrupt("a member without a name"));
        }
        // Which of the two is meant depends on who reads.
        if member.kind != Kind::Directory && !self.names.insert(member.name.clone()) {
            return Err(self.corrupt(&format!("a second member '{shown}'")));
        }
        self.members.push(member);
        Ok(())
    }

    fn corrupt(&self, what: &str) -> Error {
        damaged(self.storage, self.at, what)
    }

    fn no_archive(&self, what: &str) -> Error {
        let text = format!("is no tar archive: {what}");
        Error::new(ErrorKind::WrongFormat, text).at_opt(self.storage.path())
    }
}

fn damaged(storage: &dyn Storage, at: u64, what: &str) -> Error {
    Error::corrupt(format!("the archive is damaged at {at:#x}: {what}")).at_opt(storage.path())
}

/// A name without what says no more than "here", and without the slash of a directory.
fn clean(name: &[u8]) -> OsString {
    let mut name = name;
    while let Some(rest) = name.strip_prefix(b"./") {
        name = rest;
    }
    while let Some(rest) = name.strip_suffix(b"/") {
        name = rest;
    }
    OsString::from_vec(name.to_vec())
}

/// The name of the first member, told from the beginning of an archive; `None` where it is none, or
/// does not tell.
pub fn first_name(head: &[u8]) -> Option<OsString> {
    let mut at: usize = 0;
    let mut long: Option<Vec<u8>> = None;
    loop {
        let block = head.get(at..)?.first_chunk()?;
        let header = Header::parse(*block).ok()??;
        let size = usize::try_from(header.size().ok()?).ok()?;
        let data = || head.get(at + 512..)?.get(..size);
        match header.letter() {
            b'x' | b'X' => {
                let records = Records::parse(data()?).ok()?;
                long = records.path.or(long);
            }
            b'L' => {
                let name = data()?.split(|b| *b == 0).next();
                long = long.or(name.map(<[u8]>::to_vec));
            }
            b'g' | b'K' => {}
            b'5' => long = None,
            _ => return Some(clean(&long.unwrap_or_else(|| header.name()))),
        }
        at = at
            .checked_add(512)?
            .checked_add(size)?
            .checked_next_multiple_of(512)?;
    }
}

#[cfg(test)]
mod tests;

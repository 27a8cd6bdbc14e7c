//! Changing the header of an image that exists, so that at any moment it is the old or the new
//! one, whatever a power cut leaves of a write.
//!
//! The first sector holds the fields and is taken to be written as a whole or not at all.  The
//! list of extensions and the backing file's name may reach past it.  What lies there is written
//! where the header in force does not look.  To make room, a header is in force meanwhile that does
//! without the feature name table, the one extension that nobody needs: first the old one so, then
//! the new one.  Where that is not enough the change is refused.

use std::ops::Range;
use std::os::unix::ffi::OsStrExt;

use super::extension::FEATURE_NAMES;
use super::header::{Header, MAX_BACKING_NAME};
use crate::error::{Error, Result};
use crate::image::be64;
use crate::storage::Storage;
use crate::util::align::{clamp_len, len64};
use crate::util::range::intersect;

/// Written as a whole or not at all.
const SECTOR: usize = 512;

/// Where a header has the name of its backing file: offset and length; 0: no name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Name {
    pub(super) at: u64,
    pub(super) len: u64,
}

impl Name {
    /// The same, or what says that there is none.
    pub(super) fn or_none(self) -> Self {
        match (self.at, self.len) {
            (0, _) | (_, 0) => Self { at: 0, len: 0 },
            _ => self,
        }
    }

    fn range(self) -> Range<u64> {
        self.at..self.at + self.len
    }
}

/// The header in force, and where it looks.
struct Old {
    header: Header,
    name: Name,
    /// End of its list of extensions.
    end: u64,
    /// The same without the feature name table.
    bare_end: u64,
}

impl Old {
    fn read(file: &dyn Storage) -> Result<Self> {
        let header = Header::read(file)?;
        Ok(Self {
            name: old_name(file)?,
            end: list_end(&header, |_| true),
            bare_end: list_end(&header, is_needed),
            header,
        })
    }

    /// Whether its list without the feature name table lies within the first sector.
    fn can_be_bare(&self) -> bool {
        self.bare_end <= len64(SECTOR)
    }
}

/// Makes `new` the header of `file`, durably.  What was written before is durable before.
///
/// # Errors
/// `Invalid` where the first cluster has no room for it, `Unsupported` where a power cut on the
/// way could leave neither header, both with nothing changed; the host's.
pub(super) fn switch(file: &dyn Storage, new: &Header) -> Result<()> {
    let old = Old::read(file)?;
    let (name, free_when_bare) = place(new, &old)?;
    let whole = encode(new, name, |_| true);
    let end = list_end(new, |_| true);
    let sector = len64(SECTOR);
    // What is to be written past the first sector: the rest of the list, and of the name.
    let list = sector..end.max(sector);
    let name_part = name.at.max(sector)..(name.at + name.len).max(sector);
    let list_is_there = is_there(file, &whole, &list)?;
    let name_is_there = is_there(file, &whole, &name_part)?;
    let bare_new = list_end(new, is_needed) <= sector;
    let seen = sector..old.end.max(sector);
    // The list cannot wait for a header that does without it, and the one in force looks there.
    let clobbers = !list_is_there && !bare_new;
    let meets = |with: &Range<u64>| {
        intersect(&list, with)
            .is_some_and(|both| !matches!(is_there(file, &whole, &both), Ok(true)))
    };
    let bare_first = free_when_bare || (clobbers && meets(&seen));
    if clobbers && meets(&old.name.range()) || bare_first && !old.can_be_bare() {
        return Err(Error::unsupported(format!(
            "the header's extensions end at {end:#x}, past the first sector, and cannot change so that a power cut does no harm (allowed: {SECTOR} bytes without the feature names)"
        )));
    }
    file.sync()?;
    if bare_first {
        write_sector(file, &encode(&old.header, old.name, is_needed))?;
    }
    if !name_is_there {
        write_part(file, &whole, &name_part)?;
    }
    if !list_is_there {
        if bare_new {
            write_sector(file, &encode(new, name, is_needed))?;
        }
        write_part(file, &whole, &list)?;
    }
    write_sector(file, &whole)
}

/// Whether `whole` has in a part what is on disk already.
fn is_there(file: &dyn Storage, whole: &[u8], part: &Range<u64>) -> Result<bool> {
    let bytes = slice(whole, part);
    let mut found = vec![0; bytes.len()];
    file.read_at(&mut found, part.start)?;
    Ok(found == bytes)
}

fn slice<'b>(whole: &'b [u8], part: &Range<u64>) -> &'b [u8] {
    let end = clamp_len(part.end, whole.len());
    &whole[clamp_len(part.start, end)..end]
}

fn write_part(file: &dyn Storage, whole: &[u8], part: &Range<u64>) -> Result<()> {
    file.write_at(slice(whole, part), part.start)?;
    file.sync()
}

fn write_sector(file: &dyn Storage, bytes: &[u8]) -> Result<()> {
    let mut sector = bytes.get(..SECTOR).unwrap_or(bytes).to_vec();
    sector.resize(SECTOR, 0);
    file.write_at(&sector, 0)?;
    file.sync()
}

fn old_name(file: &dyn Storage) -> Result<Name> {
    let (at, len) = (be64::read_one(file, 8)?, be64::read_one(file, 16)? >> 32);
    Ok(Name { at, len }.or_none())
}

/// Where the backing file's name goes: within the first sector, else where it is already, else
/// where the old header does not look, else where it will not look without the feature names; and
/// whether it is there.
fn place(new: &Header, old: &Old) -> Result<(Name, bool)> {
    let end = list_end(new, |_| true);
    let cluster = new.cluster_size();
    let len = len64(new.backing_name.as_ref().map_or(0, |name| name.len()));
    if len > u64::from(MAX_BACKING_NAME) || end + len > cluster {
        return Err(Error::invalid(format!(
            "the header would have {} bytes with a backing file's name of {len} (allowed: {cluster}, {MAX_BACKING_NAME})",
            end + len
        )));
    }
    let same = new.backing_name == old.header.backing_name && old.name.at >= end;
    let name = Name { at: end, len }.or_none();
    if len == 0 || end + len <= len64(SECTOR) {
        return Ok((name, false));
    }
    if same {
        return Ok((old.name, false));
    }
    let taken = old.name.range();
    let free = |at: &u64| at + len <= cluster && intersect(&(*at..at + len), &taken).is_none();
    let found = |end: u64| [end, end.max(taken.end)].into_iter().find(free);
    let at = found(end.max(old.end)).map(|at| (at, false));
    let at = at.or_else(|| found(end.max(old.bare_end)).map(|at| (at, true)));
    match at {
        Some((at, when_bare)) => Ok((Name { at, len }, when_bare)),
        None => Err(Error::unsupported(format!(
            "the first cluster of {cluster} bytes has no room for a backing file's name of {len} bytes beside the old one of {} (allowed after the old name is taken away)",
            old.name.len
        ))),
    }
}

/// Whether the image needs the extensions of a kind.
fn is_needed(kind: u32) -> bool {
    kind != FEATURE_NAMES
}

/// Where the extensions of a header end that `keep` accepts.
pub(super) fn list_end(header: &Header, keep: impl Fn(u32) -> bool) -> u64 {
    let list = header.extensions.iter().filter(|e| keep(e.kind));
    let extensions: usize = list.map(|e| 8 + e.data.len().next_multiple_of(8)).sum();
    header.len() + len64(extensions) + 8
}

/// The fields, the extensions of the kinds that `keep` accepts, and the backing file's name.
pub(super) fn encode(header: &Header, name: Name, keep: impl Fn(u32) -> bool) -> Vec<u8> {
    let mut bytes = header.encode(name.at, name.len);
    for extension in header.extensions.iter().filter(|e| keep(e.kind)) {
        extension.encode_into(&mut bytes);
    }
    bytes.extend([0; 8]);
    if let Some(text) = header.backing_name.as_deref().filter(|_| name.len > 0) {
        let at = clamp_len(name.at, usize::MAX);
        let end = at + text.len();
        bytes.resize(bytes.len().max(end), 0);
        bytes[at..end].copy_from_slice(text.as_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;
    use crate::formats::qcow2::{create, extension};
    use crate::image::create::CreateOptions;
    use crate::image::options::OptionValues;
    use crate::storage::memory::{Change, MemoryStorage};

    fn image(options: &'static str) -> MemoryStorage {
        let storage = MemoryStorage::new();
        let values = OptionValues::parse(create::OPTIONS, "qcow2", [options]).expect("valid");
        let options = CreateOptions {
            size: 1 << 20,
            values,
            ..CreateOptions::default()
        };
        create::create(&storage, &options).expect("creates");
        storage
    }

    fn bare(header: &Header) -> Header {
        let mut bare = header.clone();
        bare.extensions.retain(|e| is_needed(e.kind));
        bare
    }

    /// Every header that a power cut may leave is the old one or the new one, perhaps without names
    /// of features.
    fn torn(storage: &MemoryStorage, new: &Header) {
        let old = Header::read(storage).expect("reads");
        let base = storage.to_bytes();
        storage.record();
        switch(storage, new).expect("switches");
        let changes = storage.changes();
        let stable = MemoryStorage::from_bytes(&base);
        let mut pending: Vec<Change> = Vec::new();
        let allowed = [&old, new, &bare(&old), &bare(new)].map(Clone::clone);
        let mut rng = fastrand::Rng::with_seed(7);
        for change in &changes {
            if *change == Change::Sync {
                pending.drain(..).for_each(|c| stable.apply(&c));
                continue;
            }
            let Change::Write { host, bytes } = change else {
                panic!("{change:?}");
            };
            // Each sector alone, and sectors at random.
            let count = bytes.len().div_ceil(SECTOR);
            for round in 0..count + 8 {
                let state = MemoryStorage::from_bytes(&stable.to_bytes());
                // A write that does not begin with a sector is torn at the sectors of the disk.
                let first = SECTOR - clamp_len(*host, usize::MAX) % SECTOR;
                let (head, rest) = bytes.split_at(first.min(bytes.len()));
                let parts = std::iter::once(head).chain(rest.chunks(SECTOR));
                let mut at = *host;
                for (index, part) in parts.enumerate() {
                    if index == round || round >= count && rng.bool() {
                        state.write_at(part, at).expect("memory has room");
                    }
                    at += len64(part.len());
                }
                let found = Header::read(&state).expect("a header");
                assert!(allowed.contains(&found), "{found:?}");
            }
            pending.push(change.clone());
        }
        assert_eq!(Header::read(storage).expect("reads"), *new);
    }

    /// As `torn`, or refused with nothing changed; whether it was done.
    fn torn_or_refused(storage: &MemoryStorage, new: &Header) -> bool {
        let before = storage.to_bytes();
        let trial = MemoryStorage::from_bytes(&before);
        match switch(&trial, new) {
            Ok(()) => torn(storage, new),
            Err(e) => {
                let kinds = [crate::ErrorKind::Unsupported, crate::ErrorKind::Invalid];
                assert!(kinds.contains(&e.kind()), "{e}");
                assert_eq!(trial.to_bytes(), before);
                return false;
            }
        }
        true
    }

    #[test]
    fn long_names_in_small_clusters_are_changed_safely_or_refused() {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut done = [0; 2];
        for round in 0..400 {
            let options = ["cluster_size=1k", "cluster_size=2k", "cluster_size=4k"];
            let storage = image(options[round % 3]);
            for _ in 0..6 {
                let mut new = Header::read(&storage).expect("reads");
                let name: String = (0..rng.usize(0..700)).map(|_| rng.alphabetic()).collect();
                match rng.u8(0..4) {
                    0 => {
                        let len = rng.usize(1..600);
                        let data = (rng.bool()).then(|| vec![b'd'; len]);
                        extension::set(&mut new.extensions, extension::DATA_FILE_NAME, data);
                    }
                    1 => {
                        let data = rng.bool().then(|| vec![rng.u8(..); 24]);
                        extension::set(&mut new.extensions, 0x0bad_cafe, data);
                    }
                    _ => new.set_backing(
                        Some(OsStr::new(&name)).filter(|n| !n.is_empty()),
                        Some("raw"),
                    ),
                }
                done[usize::from(torn_or_refused(&storage, &new))] += 1;
            }
        }
        assert!(done[0] > 50 && done[1] > 1000, "{done:?}");
    }

    #[test]
    fn a_header_is_the_old_or_the_new_one_whatever_a_power_cut_leaves() {
        for options in ["cluster_size=64k", "cluster_size=2k", "cluster_size=512"] {
            let storage = image(options);
            for (name, format) in [
                ("base.raw", Some("raw")),
                ("another/base.qcow2", Some("qcow2")),
                (&*"n".repeat(300), Some("a format with a name")),
                ("x", None),
            ] {
                if options == "cluster_size=512" && name.len() + format.map_or(0, str::len) > 9 {
                    continue;
                }
                let mut new = Header::read(&storage).expect("reads");
                new.set_backing(Some(OsStr::new(name)), format);
                torn(&storage, &new);
            }
            let mut new = Header::read(&storage).expect("reads");
            new.set_backing(None, None);
            torn(&storage, &new);
        }
    }

    #[test]
    fn a_name_that_does_not_fit_is_refused_and_nothing_is_changed() {
        let storage = image("cluster_size=512");
        let before = storage.to_bytes();
        let mut new = Header::read(&storage).expect("reads");
        new.set_backing(Some(OsStr::new(&"n".repeat(200))), Some("raw"));
        assert!(switch(&storage, &new).is_err());
        assert_eq!(storage.to_bytes(), before);
    }
}

//! Changing the header of an image that exists, so that at any moment it is the old or the new
//! one, whatever a power cut leaves of a write.
//!
//! The first sector holds the fields and is taken to be written as a whole or not at all.  The
//! list of extensions and the backing file's name may reach past it.  What lies there is written
//! first, where the old header does not look, or while a header is in force that does without the
//! feature name table, the one extension that nobody needs.

use super::extension::{self, FEATURE_NAMES};
use super::header::{Header, MAX_BACKING_NAME};
use crate::error::{Error, Result};
use crate::storage::Storage;
use crate::util::align::{clamp_len, len64};

/// Written as a whole or not at all.
const SECTOR: usize = 512;

/// Where a header has the name of its backing file: offset and length; 0: no name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Name {
    at: u64,
    len: u64,
}

/// Makes `new` the header of `file`, durably.  What was written before is durable before.
///
/// # Errors
/// `Invalid`, with nothing changed, where the first cluster has no room for it; the host's.
pub(super) fn switch(file: &dyn Storage, new: &Header) -> Result<()> {
    let old = old_name(file)?;
    let old_header = Header::read(file)?;
    let old_end = list_end(&old_header, &old_header.extensions).max(old.at + old.len);
    let name = place(new, &old_header, old, old_end)?;
    let text = new.backing_name.as_deref().unwrap_or_default().as_bytes();
    let whole = with_name(encode(new, name, |_| true), name, text);
    file.sync()?;
    if whole.len() > SECTOR && name.at >= old_end {
        file.write_at(text, name.at)?;
        file.sync()?;
    }
    if reads_alike(file, &whole)? {
        return write_sector(file, &whole);
    }
    let short = encode(new, name, |kind| kind != FEATURE_NAMES);
    if short.len() <= SECTOR {
        write_sector(file, &with_name(short, name, text))?;
    }
    file.write_at(&whole[SECTOR..], len64(SECTOR))?;
    file.sync()?;
    write_sector(file, &whole)
}

/// Whether what lies past the first sector is on disk already.
fn reads_alike(file: &dyn Storage, whole: &[u8]) -> Result<bool> {
    let Some(rest) = whole.get(SECTOR..) else {
        return Ok(true);
    };
    let mut found = vec![0; rest.len()];
    file.read_at(&mut found, len64(SECTOR))?;
    Ok(found == rest)
}

fn write_sector(file: &dyn Storage, bytes: &[u8]) -> Result<()> {
    let mut sector = bytes.get(..SECTOR).unwrap_or(bytes).to_vec();
    sector.resize(SECTOR, 0);
    file.write_at(&sector, 0)?;
    file.sync()
}

fn old_name(file: &dyn Storage) -> Result<Name> {
    let mut field = [0; 12];
    file.read_at(&mut field, 8)?;
    let (at, len) = field.split_at(8);
    let number = |bytes: &[u8]| bytes.iter().fold(0, |n, b| n << 8 | u64::from(*b));
    Ok(match (number(at), number(len)) {
        (0, _) | (_, 0) => Name { at: 0, len: 0 },
        (at, len) => Name { at, len },
    })
}

/// Where the backing file's name goes: within the first sector, else where it is already, else
/// where the old header does not look, else behind the new one's extensions.
fn place(new: &Header, old_header: &Header, old: Name, old_end: u64) -> Result<Name> {
    let end = list_end(new, &new.extensions);
    let cluster = new.cluster_size();
    let len = len64(new.backing_name.as_ref().map_or(0, String::len));
    if len > u64::from(MAX_BACKING_NAME) || end + len > cluster {
        return Err(Error::invalid(format!(
            "the header would have {} bytes with a backing file's name of {len} (allowed: {cluster}, {MAX_BACKING_NAME})",
            end + len
        )));
    }
    if len == 0 {
        return Ok(Name { at: 0, len: 0 });
    }
    let fits = |at: u64| at + len <= cluster;
    let same = new.backing_name == old_header.backing_name;
    let at = if end + len <= len64(SECTOR) {
        end
    } else if same && old.at >= end {
        old.at
    } else if fits(end.max(old_end)) {
        end.max(old_end)
    } else {
        end
    };
    Ok(Name { at, len })
}

/// Where the extensions of a header end.
fn list_end(header: &Header, list: &[extension::Extension]) -> u64 {
    let extensions: usize = list
        .iter()
        .map(|e| 8 + e.data.len().next_multiple_of(8))
        .sum();
    header.len() + len64(extensions) + 8
}

/// The fields and the extensions of the kinds that `keep` accepts.
fn encode(header: &Header, name: Name, keep: impl Fn(u32) -> bool) -> Vec<u8> {
    let mut bytes = header.encode(name.at, name.len);
    for extension in header.extensions.iter().filter(|e| keep(e.kind)) {
        extension.encode_into(&mut bytes);
    }
    bytes.extend([0; 8]);
    bytes
}

fn with_name(mut bytes: Vec<u8>, name: Name, text: &[u8]) -> Vec<u8> {
    if name.len == 0 {
        return bytes;
    }
    let at = clamp_len(name.at, usize::MAX);
    let end = at + text.len();
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
    bytes[at..end].copy_from_slice(text);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::qcow2::create;
    use crate::image::create::CreateOptions;
    use crate::image::options::OptionValues;
    use crate::storage::memory::{Change, MemoryStorage};

    fn image(options: &'static str) -> MemoryStorage {
        let storage = MemoryStorage::new();
        let values = OptionValues::parse(create::OPTIONS, "qcow2", [options]).expect("valid");
        let options = CreateOptions {
            size: 1 << 20,
            backing: None,
            values,
            data_file: None,
        };
        create::create(&storage, &options).expect("creates");
        storage
    }

    /// Every header that a power cut may leave is the old one, the new one, or the new one
    /// without names of features.
    fn torn(storage: &MemoryStorage, new: &Header) {
        let old = Header::read(storage).expect("reads");
        let base = storage.to_bytes();
        storage.record();
        switch(storage, new).expect("switches");
        let changes = storage.changes();
        let stable = MemoryStorage::from_bytes(&base);
        let mut pending: Vec<Change> = Vec::new();
        for change in &changes {
            if *change == Change::Sync {
                pending.drain(..).for_each(|c| stable.apply(&c));
                continue;
            }
            let Change::Write { host, bytes } = change else {
                panic!("{change:?}");
            };
            for (index, sector) in bytes.chunks(SECTOR).enumerate() {
                let host = host + len64(index * SECTOR);
                let state = MemoryStorage::from_bytes(&stable.to_bytes());
                state.write_at(sector, host).expect("memory has room");
                let found = Header::read(&state).expect("a header");
                let mut bare = new.clone();
                bare.extensions.retain(|e| e.kind != FEATURE_NAMES);
                assert!([&old, new, &bare].contains(&&found), "{found:?}");
            }
            pending.push(change.clone());
        }
        assert_eq!(Header::read(storage).expect("reads"), *new);
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
                new.set_backing(Some(name), format);
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
        new.set_backing(Some(&"n".repeat(200)), Some("raw"));
        assert!(switch(&storage, &new).is_err());
        assert_eq!(storage.to_bytes(), before);
    }
}

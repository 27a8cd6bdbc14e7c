//! The manifest: digests of the files of a package.
//!
//! One line each, `SHA256(NAME)= HEX`.  Blanks, capitals and carriage returns are met and read.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use crate::error::{Error, Result};
use crate::storage::Storage;
use crate::util::align::{clamp_len, len64};
use crate::util::digest::{Algorithm, Hasher};
use crate::util::progress::Progress;
use crate::util::text::printable;

/// Most bytes of a manifest.
pub(super) const MAX_BYTES: u64 = 4 << 20;
/// Bytes that are read at a time.
const PIECE: usize = 1 << 20;

/// One line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// As it is written.
    pub(super) kind: String,
    /// `None`: nobody knows this kind.
    pub(super) algorithm: Option<Algorithm>,
    digest: String,
}

/// The digests of a manifest, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Manifest {
    entries: HashMap<OsString, Entry>,
}

impl Manifest {
    /// Reads a manifest.
    ///
    /// # Errors
    /// `Corrupt` for a line that is no digest, and for two of one name that differ.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self> {
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
        let mut manifest = Self::default();
        for (number, line) in bytes.split(|b| *b == b'\n').enumerate() {
            let line = line.trim_ascii();
            if line.is_empty() {
                continue;
            }
            let (name, entry) = parse_line(line).ok_or_else(|| {
                let line = printable(OsStr::from_bytes(line.get(..200).unwrap_or(line)));
                let text = format!("line {} of the manifest is no digest: '{line}'", number + 1);
                Error::corrupt(text)
            })?;
            match manifest.entries.get(&name) {
                Some(other) if *other != entry => {
                    let text = format!("the manifest has two digests of '{}'", printable(&name));
                    return Err(Error::corrupt(text));
                }
                _ => manifest.entries.insert(name, entry),
            };
        }
        Ok(manifest)
    }

    /// How many files it has digests of.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// What it has of the file called `name`.
    pub(super) fn get(&self, name: &OsStr) -> Option<&Entry> {
        self.entries.get(name)
    }

    /// Kinds of digests in it, in order.
    pub(super) fn kinds(&self) -> Vec<&str> {
        let mut kinds: Vec<&str> = self.entries.values().map(|entry| &*entry.kind).collect();
        kinds.sort_unstable();
        kinds.dedup();
        kinds
    }

    /// Reads all of `storage`, which is the file called `name`, and compares its digest.
    ///
    /// # Errors
    /// `Corrupt` where it is another, and where there is none; `Unsupported` for one of a kind that
    /// nobody knows; `Cancelled`; the host's.
    pub(super) fn verify(
        &self,
        name: &OsStr,
        storage: &dyn Storage,
        progress: &dyn Progress,
    ) -> Result<()> {
        let shown = printable(name);
        let Some(entry) = self.get(name) else {
            let text = format!("the manifest has no digest of '{shown}'");
            return Err(Error::corrupt(text).noted(SKIP));
        };
        let Some(algorithm) = entry.algorithm else {
            let text = format!(
                "the digest of '{shown}' in the manifest is of kind '{}' (allowed: SHA1, SHA256, \
                 SHA512)",
                printable(&entry.kind)
            );
            return Err(Error::unsupported(text));
        };
        let found = digest_of(storage, algorithm, progress)?;
        match found == entry.digest {
            true => Ok(()),
            false => Err(Error::corrupt(format!(
                "the {} of '{shown}' is {found}, and the manifest has {}",
                algorithm.name(),
                entry.digest
            ))
            .noted(SKIP)),
        }
    }
}

const SKIP: &str = "--no-manifest reads it all the same";

fn digest_of(
    storage: &dyn Storage,
    algorithm: Algorithm,
    progress: &dyn Progress,
) -> Result<String> {
    let mut hasher = Hasher::new(algorithm);
    let mut buf = vec![0; PIECE];
    let (mut at, end) = (0, storage.size());
    while at < end {
        progress.check()?;
        let piece = &mut buf[..clamp_len(end - at, PIECE)];
        storage.read_at(piece, at)?;
        hasher.update(piece);
        at += len64(piece.len());
        progress.advance(len64(piece.len()));
    }
    Ok(hasher.finish())
}

/// `KIND(NAME)= HEX`; names may have parentheses.
fn parse_line(line: &[u8]) -> Option<(OsString, Entry)> {
    let open = line.iter().position(|b| *b == b'(')?;
    let close = line.iter().rposition(|b| *b == b')')?;
    let kind = std::str::from_utf8(&line[..open]).ok()?.trim();
    let name = line.get(open + 1..close)?;
    let rest = line[close + 1..].trim_ascii_start();
    let digest = rest.strip_prefix(b"=")?.trim_ascii();
    let digest = std::str::from_utf8(digest).ok()?.to_ascii_lowercase();
    let algorithm = Algorithm::of(kind);
    let is_hex = !digest.is_empty() && digest.bytes().all(|b| b.is_ascii_hexdigit());
    let is_whole = algorithm.is_none_or(|a| a.digits() == digest.len());
    if kind.is_empty() || name.is_empty() || !is_hex || !is_whole {
        return None;
    }
    let entry = Entry {
        kind: kind.to_owned(),
        algorithm,
        digest,
    };
    Some((OsStr::from_bytes(name).to_owned(), entry))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::storage::memory::MemoryStorage;
    use crate::util::progress::Silent;

    const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn lines_are_read_as_they_are_met() {
        let text = format!(
            "SHA256(a (1).vmdk)= {EMPTY}\r\nsha-256 (b) = {}\n\nSHA2-256(c)={EMPTY}\nMD9(d)= 00",
            EMPTY.to_uppercase()
        );
        let manifest = Manifest::parse(text.as_bytes()).expect("is right");
        let empty = MemoryStorage::new();
        for name in ["a (1).vmdk", "b", "c"] {
            manifest
                .verify(name.as_ref(), &empty, &Silent)
                .expect("is empty");
        }
        let error = manifest.verify("d".as_ref(), &empty, &Silent);
        assert_eq!(
            error.expect_err("is of no kind").kind(),
            ErrorKind::Unsupported
        );
        let error = manifest.verify("e".as_ref(), &empty, &Silent);
        assert_eq!(error.expect_err("is missing").kind(), ErrorKind::Corrupt);
        let other = MemoryStorage::from_bytes(&[0]);
        let error = manifest.verify("b".as_ref(), &other, &Silent);
        assert!(error.expect_err("lies").to_string().contains(EMPTY));
    }

    #[test]
    fn what_is_no_manifest_is_refused() {
        for text in [
            "SHA256(a)= 00",
            "(a)= 00",
            "SHA256()= e3",
            "MD9(a)=",
            "hello",
            "MD9(a)= zz",
            "MD9)a(= 00",
            "MD9(a)= 00\nMD9(a)= 01",
        ] {
            let error = Manifest::parse(text.as_bytes()).expect_err(text);
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{text}");
        }
    }
}

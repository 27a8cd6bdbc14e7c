//! The parent locator: which disk lies below, and where ([MS-VHDX] 2.6.2.6).

use uuid::{Uuid, uuid};

use crate::error::{Error, Result};
use crate::formats::vhdx::bytes::{guid_at, put, u16_at, u32_at, utf16};
use crate::image::create::CreateBacking;
use crate::image::windows;
use crate::image::{Backing, BackingName};
use crate::util::align::{clamp_len, len64};
use crate::util::text::printable;

/// The locator of a VHDX.
const TYPE: Uuid = uuid!("b04aefb7-d19e-4a81-b789-25b8e9445913");
/// Where the entries begin, and bytes of each.
const FIRST: usize = 20;
const ENTRY: usize = 12;
/// Most pairs that are read.
const MAX_PAIRS: u16 = 256;

const LINKAGE: &str = "parent_linkage";
const LINKAGE_2: &str = "parent_linkage2";
/// Keys of paths, in the order in which they are tried.
const PATHS: [&str; 3] = ["relative_path", "volume_path", "absolute_win32_path"];

/// What a differencing disk says of its parent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Locator {
    pairs: Vec<(String, String)>,
}

impl Locator {
    /// Reads an item.
    ///
    /// # Errors
    /// `Corrupt`; `Unsupported` for the locators of other formats.
    pub(super) fn from_bytes(item: &[u8]) -> Result<Self> {
        let (guid, count) = (guid_at(item, 0), u16_at(item, 18));
        if guid != TYPE {
            return Err(Error::unsupported(format!(
                "the parent locator is of type {guid} (allowed: {TYPE}, a VHDX)"
            )));
        }
        if count > MAX_PAIRS {
            return Err(Error::corrupt(format!(
                "the parent locator has {count} entries (allowed: up to {MAX_PAIRS})"
            )));
        }
        let text = |at: usize, len: usize| {
            let at = clamp_len(u32_at(item, at).into(), usize::MAX);
            let len = usize::from(u16_at(item, len));
            let bytes = at.checked_add(len).and_then(|end| item.get(at..end));
            let bytes = bytes.filter(|bytes| bytes.len().is_multiple_of(2));
            bytes.and_then(utf16).ok_or_else(|| {
                Error::corrupt(format!(
                    "the parent locator names {len} bytes at {at:#x} (allowed: UTF-16 inside its {} bytes)",
                    item.len()
                ))
            })
        };
        let places = (FIRST..).step_by(ENTRY).take(count.into());
        let pairs = places.map(|at| Ok((text(at, at + 8)?, text(at + 4, at + 10)?)));
        let locator = Self {
            pairs: pairs.collect::<Result<_>>()?,
        };
        match locator.get(LINKAGE) {
            Some(_) => Ok(locator),
            None => Err(Error::corrupt(format!(
                "the parent locator has no {LINKAGE}"
            ))),
        }
    }

    fn get(&self, key: &str) -> Option<&str> {
        let mut pairs = self.pairs.iter();
        pairs.find(|(k, _)| k == key).map(|(_, value)| &**value)
    }

    fn guid(&self, key: &str) -> Option<Uuid> {
        self.get(key).and_then(|text| Uuid::try_parse(text).ok())
    }

    /// What it says of the parent.
    pub(super) fn backing(&self) -> Backing {
        let mut names: Vec<BackingName> = Vec::new();
        for key in PATHS {
            let path = self.get(key).and_then(windows::from_windows);
            let known = |path: &String| names.iter().any(|name| name.path == **path);
            if let Some(path) = path.filter(|path| !path.contains('\0') && !known(path)) {
                names.push(BackingName {
                    path: path.into(),
                    origin: key.to_owned(),
                });
            }
        }
        Backing {
            names,
            format: Some(super::DRIVER.name.to_owned()),
            identity: None,
            // What is no GUID is nobody's.
            state: Some(self.guid(LINKAGE).unwrap_or_default()),
        }
    }

    /// The state in which the parent may be too, while it is changed on this disk's behalf.
    pub(super) fn other_state(&self) -> Option<Uuid> {
        self.guid(LINKAGE_2)
    }

    /// The locator of a child of `backing`.
    ///
    /// # Errors
    /// `Unsupported` for what is no VHDX; `Invalid` for a path that it cannot hold.
    pub(super) fn new(backing: &CreateBacking) -> Result<Self> {
        let state = backing
            .state
            .filter(|_| backing.format == super::DRIVER.name);
        let state = state.ok_or_else(|| {
            Error::unsupported(format!(
                "a VHDX over a backing file of format '{}' (allowed: vhdx)",
                backing.format
            ))
        })?;
        let relative = backing.relative.to_str().ok_or_else(|| {
            Error::invalid(format!(
                "the backing file's path '{}' is not UTF-8, so a VHDX, which has UTF-16, cannot hold it",
                printable(&backing.relative)
            ))
        })?;
        let mut pairs = vec![
            (LINKAGE, state.braced().to_string()),
            (PATHS[0], windows::to_windows(relative)),
        ];
        pairs.extend(
            backing
                .absolute
                .to_str()
                .map(|path| (PATHS[2], path.to_owned())),
        );
        let locator = Self {
            pairs: pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect(),
        };
        let longest = locator
            .pairs
            .iter()
            .map(|(_, value)| value.encode_utf16().count() * 2);
        match longest.max().is_none_or(|len| u16::try_from(len).is_ok()) {
            true => Ok(locator),
            false => Err(Error::invalid(
                "the backing file's path is too long for a VHDX",
            )),
        }
    }

    /// The same with other values for some keys; an empty one takes its key away.
    ///
    /// # Errors
    /// `Unsupported` where it would have more pairs than are read.
    fn with(&self, changes: &[(&str, String)]) -> Result<Self> {
        let mut pairs = self.pairs.clone();
        for (key, value) in changes {
            match pairs.iter_mut().find(|(k, _)| k == key) {
                Some(pair) => pair.1.clone_from(value),
                None => pairs.push(((*key).to_owned(), value.clone())),
            }
        }
        pairs.retain(|(_, value)| !value.is_empty());
        match pairs.len() <= usize::from(MAX_PAIRS) {
            true => Ok(Self { pairs }),
            false => Err(Error::unsupported(format!(
                "the parent locator would have {} entries (allowed: up to {MAX_PAIRS})",
                pairs.len()
            ))),
        }
    }

    /// The same with the parent in another state.
    ///
    /// # Errors
    /// As [`Locator::with`].
    pub(super) fn with_state(&self, state: Uuid) -> Result<Self> {
        self.with(&[
            (LINKAGE, state.braced().to_string()),
            (LINKAGE_2, String::new()),
        ])
    }

    /// The same with another state in which the parent may be too.
    ///
    /// # Errors
    /// As [`Locator::with`].
    pub(super) fn with_other_state(&self, state: Uuid) -> Result<Self> {
        self.with(&[(LINKAGE_2, state.braced().to_string())])
    }

    /// The item's bytes.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; FIRST + ENTRY * self.pairs.len()];
        put(&mut bytes, 0, &TYPE.to_bytes_le());
        let count = u16::try_from(self.pairs.len()).unwrap_or(0);
        put(&mut bytes, 18, &count.to_le_bytes());
        for ((key, value), at) in self.pairs.iter().zip((FIRST..).step_by(ENTRY)) {
            for (n, text) in [key, value].into_iter().enumerate() {
                let start = bytes.len();
                bytes.extend(text.encode_utf16().flat_map(u16::to_le_bytes));
                let len = u16::try_from(bytes.len() - start).unwrap_or(u16::MAX);
                let start = u32::try_from(len64(start)).unwrap_or(u32::MAX);
                put(&mut bytes, at + 4 * n, &start.to_le_bytes());
                put(&mut bytes, at + 8 + 2 * n, &len.to_le_bytes());
            }
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_locator_is_made_that_would_not_be_read_again() {
        let pair = |n: u16| (format!("key{n}"), "value".to_owned());
        let mut pairs = vec![(LINKAGE.to_owned(), Uuid::nil().braced().to_string())];
        pairs.extend((1..MAX_PAIRS).map(pair));
        let full = Locator { pairs };
        assert_eq!(Locator::from_bytes(&full.to_bytes()).expect("full"), full);
        let e = full
            .with_other_state(Uuid::nil())
            .expect_err("one too many");
        assert!(e.message().contains("257 entries"), "{e}");
        full.with_state(Uuid::nil()).expect("as many as before");
    }
}

//! A descriptor that the user has, for disks that are made now.
//!
//! All of it stays as it is but the sizes of the files, which nobody can know before.

use std::ops::Range;

use roxmltree::{Document, ParsingOptions};

use crate::error::{Error, Result};
use crate::formats::ova::descriptor::{
    Capacity, Envelope, MAX_BYTES, MAX_NODES, NAMESPACE, name_of,
};
use crate::formats::ova::write::xml::{DIGITS, STREAMED, digits};
use crate::util::align::len64;
use crate::util::text::printable;

/// A descriptor, and where the sizes of its files stand.
#[derive(Debug)]
pub(super) struct Adopted {
    text: String,
    /// Names of the files, disk by disk.
    names: Vec<String>,
    /// For each disk, where the size of its file stands in the text; ascending by file.
    sizes: Vec<Range<usize>>,
    /// Where blanks do not matter: before the end of the root.
    blank: usize,
}

impl Adopted {
    /// Takes a descriptor of disks of these virtual sizes.
    ///
    /// # Errors
    /// `Invalid` where it describes other disks; those of [`Envelope::parse`].
    pub(super) fn of(bytes: &[u8], disks: &[u64]) -> Result<Self> {
        if len64(bytes.len()) > MAX_BYTES {
            let text = format!("the descriptor has more than {MAX_BYTES} bytes");
            return Err(Error::invalid(text));
        }
        let envelope = Envelope::parse(bytes)?;
        let mut names = Vec::with_capacity(disks.len());
        if envelope.disks.len() != disks.len() || envelope.files.len() != disks.len() {
            return Err(Error::invalid(format!(
                "the descriptor has {} disks and {} files, and there are {} sources (allowed: one \
                 disk and one file each, in order)",
                envelope.disks.len(),
                envelope.files.len(),
                disks.len()
            )));
        }
        let mut places = Vec::with_capacity(disks.len());
        for (disk, size) in envelope.disks.iter().zip(disks) {
            let shown = printable(&disk.id);
            let refuse = |what: &str, found: String, allowed: String| {
                Err(Error::invalid(format!(
                    "disk '{shown}' of the descriptor has {what} {found} (allowed: {allowed})"
                )))
            };
            if disk.capacity != Capacity::Bytes(*size) {
                let found = match &disk.capacity {
                    Capacity::Bytes(bytes) => bytes.to_string(),
                    Capacity::Unknown(text) => printable(text),
                };
                return refuse("the capacity", found, format!("that of its source, {size}"));
            }
            if disk.format.as_deref() != Some(STREAMED) {
                let found = disk
                    .format
                    .as_deref()
                    .map_or_else(|| "none".to_owned(), printable);
                return refuse("the format", found, STREAMED.to_owned());
            }
            let Some(place) = disk.file else {
                return refuse("the file", "none".to_owned(), "a file".to_owned());
            };
            if places.contains(&place) {
                return refuse(
                    "the file",
                    "of another disk".to_owned(),
                    "its own".to_owned(),
                );
            }
            let file = &envelope.files[place];
            if file.compression.is_some() || file.chunk.is_some() {
                return refuse(
                    "a file",
                    "compressed or in parts".to_owned(),
                    "a plain file".to_owned(),
                );
            }
            let name = name_of(&file.href)?;
            names.push(name.to_string_lossy().into_owned());
            places.push(place);
        }
        let text = std::str::from_utf8(bytes).unwrap_or_default().to_owned();
        let (all, blank) = sizes(&text)?;
        let sizes = places.iter().map(|place| all[*place].clone()).collect();
        Ok(Self {
            text,
            names,
            sizes,
            blank,
        })
    }

    pub(super) fn names(&self) -> &[String] {
        &self.names
    }

    /// The text with these sizes of the files, disk by disk.  Its length does not depend on them.
    pub(super) fn text(&self, stored: &[u64]) -> String {
        let mut changes: Vec<(Range<usize>, String)> = self
            .sizes
            .iter()
            .cloned()
            .zip(stored.iter().map(u64::to_string))
            .collect();
        let blanks: usize = stored.iter().map(|size| DIGITS - digits(*size)).sum();
        changes.push((self.blank..self.blank, " ".repeat(blanks)));
        changes.sort_by_key(|(range, _)| range.start);
        let mut text = String::with_capacity(self.text.len() + DIGITS * stored.len());
        let mut at = 0;
        for (range, new) in changes {
            text += &self.text[at..range.start];
            text += &new;
            at = range.end;
        }
        text += &self.text[at..];
        text
    }
}

/// Where the sizes of all files stand, and where the end of the root begins.
fn sizes(text: &str) -> Result<(Vec<Range<usize>>, usize)> {
    let options = ParsingOptions {
        allow_dtd: false,
        nodes_limit: MAX_NODES,
        ..ParsingOptions::default()
    };
    let document = Document::parse_with_options(text, options)
        .map_err(|e| Error::corrupt(format!("the descriptor: {}", printable(&e.to_string()))))?;
    let root = document.root_element();
    let references = root
        .children()
        .filter(|n| n.tag_name().name() == "References");
    let files = references.flat_map(|r| r.children().filter(|n| n.tag_name().name() == "File"));
    let mut sizes = Vec::new();
    for file in files {
        let mut attributes = file.attributes();
        let size = attributes.find(|a| {
            let is_ovf = a.namespace().is_none_or(|n| n.starts_with(NAMESPACE));
            a.name() == "size" && is_ovf
        });
        let size = size.ok_or_else(|| {
            Error::invalid("a File of the descriptor has no size (allowed: any, it is replaced)")
        })?;
        sizes.push(size.range_value());
    }
    let whole = root.range();
    let close = text.get(whole.clone()).and_then(|t| t.rfind("</"));
    match close {
        Some(at) => Ok((sizes, whole.start + at)),
        None => Err(Error::corrupt("the descriptor is empty")),
    }
}

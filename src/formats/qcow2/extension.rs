//! Header extensions: kind, length, data, padded to eight bytes.  Unknown ones are kept.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::image::be64;
use crate::storage::Storage;
use crate::util::align::{clamp_len, len64};

/// Ends the list.
const END: u32 = 0;
/// Name of the backing file's format.
pub(super) const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Names of feature bits.
pub(super) const FEATURE_NAMES: u32 = 0x6803_f857;
/// Name of the external data file.
pub(super) const DATA_FILE_NAME: u32 = 0x4441_5441;
/// Where the bitmap directory is.
pub(super) const BITMAPS: u32 = 0x2385_2875;
/// Where the header of LUKS is: offset and length, 8 bytes each.
pub(super) const ENCRYPTION: u32 = 0x0537_be77;
/// Most extensions looked at.
const MAX_COUNT: usize = 256;

/// One extension.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Extension {
    /// Its kind, one of the constants above or unknown.
    pub(super) kind: u32,
    /// Its data, without padding.
    pub(super) data: Vec<u8>,
}

impl Extension {
    /// Adds it with its padding.
    pub(super) fn encode_into(&self, bytes: &mut Vec<u8>) {
        bytes.extend(self.kind.to_be_bytes());
        bytes.extend(u32::try_from(self.data.len()).unwrap_or(0).to_be_bytes());
        bytes.extend(&self.data);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
}

/// Reads the extensions in a range of the first cluster, in order.  The list ends with its end
/// marker or with the range; others refuse a marker that is wrong, which nobody needs: what is
/// wrong with it.
pub(super) fn read(
    storage: &dyn Storage,
    range: Range<u64>,
) -> Result<(Vec<Extension>, Option<String>)> {
    let bytes = be64::read_bytes(storage, range.clone())?;
    let mut rest = &bytes[..];
    let mut list = Vec::new();
    let mut fault = None;
    while let Some((head, tail)) = rest.split_first_chunk::<8>() {
        let kind = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
        let len = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
        let at = range.end - len64(rest.len());
        if kind == END {
            fault = (u64::from(len) > len64(tail.len())).then(|| {
                format!("the end of the header extensions at {at:#x} has {len} bytes (expected: 0)")
            });
            break;
        }
        let data = tail
            .get(..clamp_len(u64::from(len), usize::MAX))
            .ok_or_else(|| {
                Error::corrupt(format!(
                    "header extension {kind:#010x} at {at:#x} has {len} bytes (allowed: {})",
                    tail.len()
                ))
            })?;
        if list.len() >= MAX_COUNT {
            return Err(Error::corrupt(format!(
                "there are more than {MAX_COUNT} header extensions"
            )));
        }
        list.push(Extension {
            kind,
            data: data.to_vec(),
        });
        rest = tail
            .get(data.len().next_multiple_of(8)..)
            .unwrap_or_default();
    }
    Ok((list, fault))
}

/// The data of the first extension of a kind.
pub(super) fn data(list: &[Extension], kind: u32) -> Option<&[u8]> {
    let found = list.iter().find(|e| e.kind == kind)?;
    Some(&found.data)
}

/// Makes `data` the data of the only extension of a kind, at the place of the first one there
/// was, else first; `None`: takes them away.
pub(super) fn set(list: &mut Vec<Extension>, kind: u32, data: Option<Vec<u8>>) {
    let place = list.iter().position(|e| e.kind == kind).unwrap_or(0);
    list.retain(|e| e.kind != kind);
    if let Some(data) = data {
        list.insert(place, Extension { kind, data });
    }
}

//! What the header says about encryption: enough to describe it, and nothing to decrypt with.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use serde_json::{Map, Value, json};

use super::extension;
use super::header::Header;
use crate::error::{Error, Result};
use crate::storage::Storage;
use crate::util::align::len64;
use crate::util::text::printable;

/// Bytes of a LUKS header of version 1: its fields and eight key slots.
const LUKS_LEN: usize = 592;
const LUKS_MAGIC: &[u8] = b"LUKS\xba\xbe";
/// Where its key slots begin, and the bytes of each.
const SLOTS: usize = 208;
const SLOT_LEN: usize = 48;
/// The state of a slot that holds a key.
const ACTIVE: u32 = 0x00ac_71f3;
/// Offsets in it count these.
const SECTOR: u64 = 512;

/// How guest data is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encryption {
    /// By AES with a passphrase as key, of old.
    Aes,
    /// As in LUKS volumes; the LUKS header is in a file of the image's own.
    Luks,
}

impl Encryption {
    /// What the header's method stands for.
    ///
    /// # Errors
    /// `Corrupt` for what is no method.
    pub(super) fn of(method: u32) -> Result<Option<Self>> {
        match method {
            0 => Ok(None),
            1 => Ok(Some(Self::Aes)),
            2 => Ok(Some(Self::Luks)),
            other => Err(Error::corrupt(format!(
                "the header's encryption method is {other} (allowed: 0 to 2)"
            ))),
        }
    }

    /// The error for one who wants to use the disk.
    pub(super) fn refusal(self) -> Error {
        Error::unsupported(match self {
            Self::Aes => "the image is encrypted with AES, which is not supported",
            Self::Luks => "the image is encrypted with LUKS, which is not supported",
        })
    }

    /// What is known of it, with the keys that qemu-img has.
    pub(super) fn describe(self, file: &dyn Storage, header: &Header) -> Value {
        match self {
            Self::Aes => json!({ "format": "aes" }),
            Self::Luks => match luks(file, header) {
                Ok(object) => Value::Object(object),
                // As much as is known.
                Err(e) => json!({ "format": "luks", "damaged": e.message() }),
            },
        }
    }
}

/// What the LUKS header says.
fn luks(file: &dyn Storage, header: &Header) -> Result<Map<String, Value>> {
    let place = header
        .extensions
        .iter()
        .find(|e| e.kind == extension::ENCRYPTION);
    let place = place.and_then(|e| e.data.first_chunk());
    let offset = place.map(|bytes| u64::from_be_bytes(*bytes));
    let offset = offset.ok_or_else(|| Error::corrupt("no extension says where its header is"))?;
    let is_inside = offset
        .checked_add(len64(LUKS_LEN))
        .is_some_and(|end| end <= file.size());
    let mut bytes = [0; LUKS_LEN];
    if is_inside {
        file.read_at(&mut bytes, offset)?;
    }
    if !bytes.starts_with(LUKS_MAGIC) {
        return Err(Error::corrupt(format!("no LUKS header is at {offset:#x}")));
    }
    match bytes[6..8] {
        [0, 1] => Ok(volume(&bytes)),
        _ => {
            let version = u16::from_be_bytes([bytes[6], bytes[7]]);
            let text = format!("the LUKS header is of version {version} (allowed: 1)");
            Err(Error::corrupt(text))
        }
    }
}

fn volume(bytes: &[u8; LUKS_LEN]) -> Map<String, Value> {
    let mode = text(bytes, 40, 32);
    let (mode, iv) = mode.split_once('-').unwrap_or((&mode, ""));
    let (iv, iv_hash) = iv.split_once(':').map_or((iv, None), |(a, b)| (a, Some(b)));
    // Of the key of XTS one half is the cipher's.
    let bits = word(bytes, 108).saturating_mul(if mode == "xts" { 4 } else { 8 });
    let mut object = Map::new();
    let mut set = |key: &str, value: Value| object.insert(key.to_owned(), value);
    set("ivgen-alg", iv.into());
    if let Some(hash) = iv_hash {
        set("ivgen-hash-alg", hash.into());
    }
    set("detached-header", false.into());
    set("hash-alg", text(bytes, 72, 32).into());
    set(
        "cipher-alg",
        format!("{}-{bits}", text(bytes, 8, 32)).into(),
    );
    set("uuid", text(bytes, 168, 40).into());
    set("format", "luks".into());
    set("cipher-mode", mode.into());
    let slots: Vec<Value> = (SLOTS..LUKS_LEN)
        .step_by(SLOT_LEN)
        .map(|at| slot(bytes, at))
        .collect();
    set("slots", slots.into());
    let payload = u64::from(word(bytes, 104)) * SECTOR;
    set("payload-offset", payload.into());
    set("master-key-iters", word(bytes, 164).into());
    object
}

fn slot(bytes: &[u8; LUKS_LEN], at: usize) -> Value {
    let key_offset = u64::from(word(bytes, at + 40)) * SECTOR;
    match word(bytes, at) == ACTIVE {
        true => json!({
            "active": true,
            "iters": word(bytes, at + 4),
            "key-offset": key_offset,
            "stripes": word(bytes, at + 44),
        }),
        false => json!({ "active": false, "key-offset": key_offset }),
    }
}

fn word(bytes: &[u8; LUKS_LEN], at: usize) -> u32 {
    let word = bytes.get(at..).and_then(|rest| rest.first_chunk());
    word.map_or(0, |word| u32::from_be_bytes(*word))
}

/// A text that ends at a zero byte.
fn text(bytes: &[u8; LUKS_LEN], at: usize, len: usize) -> String {
    let field = bytes.get(at..at + len).unwrap_or_default();
    let field = field.split(|b| *b == 0).next().unwrap_or_default();
    printable(OsStr::from_bytes(field))
}

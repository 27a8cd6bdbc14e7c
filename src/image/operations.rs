//! Images that are lists of operations: what each of them does, for those who want to see it.

use std::fmt;

use serde::Serialize;

use crate::error::Result;

/// One operation, as `info --ops` shows it; what an operation does not have is left out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Operation {
    /// Its place in the list, counted from 0.
    pub index: u64,
    /// What it does.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The first block of the disk that it makes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub new_block: Option<u64>,
    /// How many blocks it makes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocks: Option<u64>,
    /// The block of the disk below that it copies.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_block: Option<u64>,
    /// Offset in bytes in the disk below of what it combines its data with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_offset: Option<u64>,
    /// Offset of its data in the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_offset: Option<u64>,
    /// Length in bytes of its data there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_length: Option<u64>,
    /// How its data is compressed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compression: Option<&'static str>,
    /// The number of a label: up to there the file was on stable media.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<u64>,
    /// Bytes from the end of this operation to the next.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skip: Option<u64>,
}

/// Called once for each operation; an error ends the walk.
pub type Visit<'v> = dyn FnMut(&Operation) -> Result<()> + 'v;

/// The operations of an image.
pub trait Operations: fmt::Debug {
    /// Hands over one operation after the other, as they are in the file; no more than one is in
    /// memory.
    ///
    /// # Errors
    /// `Corrupt` where the list is damaged, after those before; those of `visit`; the host's.
    fn each(&self, visit: &mut Visit<'_>) -> Result<()>;
}

//! One open image in several chains.
//!
//! It can do all that needs no owner of its own: what takes `&mut` is for who has the image alone.
//! Each method of [`Image`] with a default is here too, as a default would answer for the format.

use std::ops::Range;
use std::sync::Arc;

use uuid::Uuid;

use super::{
    Backing, Below, Bitmaps, Caps, Check, Compact, Compress, Driver, Fill, Image, Layout, Part,
    Resize, Run, Snapshot, Store, Wait, contents, disc, info, merge, operations, sector,
};
use crate::error::{Error, Result};
use crate::storage::{Limits, Storage, Zeroing};

impl Image for Arc<dyn Image> {
    fn driver(&self) -> &'static Driver {
        (**self).driver()
    }

    fn virtual_size(&self) -> u64 {
        (**self).virtual_size()
    }

    fn cluster_size(&self) -> Option<u64> {
        (**self).cluster_size()
    }

    fn limits(&self) -> Limits {
        (**self).limits()
    }

    fn caps(&self) -> Caps {
        (**self).caps()
    }

    fn storage(&self) -> &dyn Storage {
        (**self).storage()
    }

    fn map(&self, at: u64, len: u64, wait: Wait) -> Result<Run<'_>> {
        (**self).map(at, len, wait)
    }

    fn store(&self) -> Option<&dyn Store> {
        (**self).store()
    }

    fn read_encoded(&self, buf: &mut [u8], at: u64) -> Result<usize> {
        (**self).read_encoded(buf, at)
    }

    fn read_encoded_over(&self, buf: &mut [u8], at: u64, below: &dyn Below) -> Result<usize> {
        (**self).read_encoded_over(buf, at, below)
    }

    fn lies_over(&self, size: u64) {
        (**self).lies_over(size);
    }

    fn read_only(&self) -> Error {
        (**self).read_only()
    }

    fn allocate(&self, at: u64, len: u64, fill: &mut Fill<'_>) -> Result<u64> {
        (**self).allocate(at, len, fill)
    }

    fn allocate_ahead(&self, at: u64, len: u64, fill: &mut Fill<'_>) -> Result<u64> {
        (**self).allocate_ahead(at, len, fill)
    }

    fn zero(&self, range: Range<u64>, how: Zeroing) -> Result<()> {
        (**self).zero(range, how)
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        (**self).discard(range)
    }

    fn flush(&self) -> Result<()> {
        (**self).flush()
    }

    fn close(&self) -> Result<()> {
        (**self).close()
    }

    fn parts(&self) -> Vec<Part<'_>> {
        (**self).parts()
    }

    fn backing(&self) -> Option<Backing> {
        (**self).backing()
    }

    fn identity(&self) -> Option<Uuid> {
        (**self).identity()
    }

    fn state(&self) -> Option<Uuid> {
        (**self).state()
    }

    fn next_state(&self) -> Result<Option<Uuid>> {
        (**self).next_state()
    }

    fn other_state(&self) -> Option<Uuid> {
        (**self).other_state()
    }

    fn sector_size(&self) -> Option<u64> {
        (**self).sector_size()
    }

    fn physical_sector_size(&self) -> Option<u64> {
        (**self).physical_sector_size()
    }

    fn keep_state(&self) {
        (**self).keep_state();
    }

    fn may_be_unwritten(&self) -> bool {
        (**self).may_be_unwritten()
    }

    fn is_encrypted(&self) -> bool {
        (**self).is_encrypted()
    }

    fn is_dirty(&self) -> bool {
        (**self).is_dirty()
    }

    fn details(&self) -> Vec<info::Detail> {
        (**self).details()
    }

    fn as_check(&self) -> Option<&dyn Check> {
        (**self).as_check()
    }

    fn as_compact(&self) -> Option<&dyn Compact> {
        (**self).as_compact()
    }

    fn as_resize(&self) -> Option<&dyn Resize> {
        (**self).as_resize()
    }

    fn bitmaps(&self) -> Option<&dyn Bitmaps> {
        (**self).bitmaps()
    }

    fn snapshots(&self) -> Result<Vec<Snapshot>> {
        (**self).snapshots()
    }

    fn sealed(&self) -> Option<&dyn contents::Sealed> {
        (**self).sealed()
    }

    fn as_compress(&self) -> Result<&dyn Compress> {
        (**self).as_compress()
    }

    fn as_merge(&self) -> Option<&dyn merge::Merge> {
        (**self).as_merge()
    }

    fn as_operations(&self) -> Option<&dyn operations::Operations> {
        (**self).as_operations()
    }

    fn as_sectors(&self) -> Option<&dyn sector::Sectors> {
        (**self).as_sectors()
    }

    fn as_disc(&self) -> Option<&dyn disc::Disc> {
        (**self).as_disc()
    }

    fn as_layout(&self) -> Option<&dyn Layout> {
        (**self).as_layout()
    }
}

#[cfg(test)]
mod tests {
    /// The methods of `text` that take `&self`.
    fn methods(text: &str) -> Vec<&str> {
        let lines = text.lines().map(str::trim_start);
        let named = lines.filter_map(|line| line.strip_prefix("fn ")?.split_once("(&self"));
        named.map(|(name, _)| name).collect()
    }

    #[test]
    fn no_method_is_answered_by_its_default() {
        let all = include_str!("mod.rs");
        let (_, all) = all.split_once("pub trait Image:").expect("is there");
        let (all, _) = all.split_once("\n}\n").expect("ends");
        let own = include_str!("shared.rs");
        let (own, _) = own.split_once("cfg(test)").expect("has tests");
        assert_eq!(methods(all), methods(own));
    }
}

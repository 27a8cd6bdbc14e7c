//! What `info` shows that only this format has.

use super::{Qcow2, feature};
use crate::image::bitmap::{Bitmap, Bitmaps, Recording};
use crate::image::codec::Compression;
use crate::image::info::Detail;
use crate::util::text::replaced;

impl Qcow2 {
    /// [`crate::image::Image::details`].
    pub(super) fn list_details(&self) -> Vec<Detail> {
        let header = &self.header;
        let compat = if header.version == 2 { "0.10" } else { "1.1" };
        let compression = match header.compression {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        };
        let mut details = vec![
            Detail::new("compat", compat),
            Detail::new("compression-type", compression),
            Detail::new("refcount-bits", 1u64 << header.refcount_order),
        ];
        if header.version >= 3 {
            let lazy = header.compatible & feature::LAZY_REFCOUNTS != 0;
            details.push(Detail::new("lazy-refcounts", lazy));
            let corrupt = header.incompatible & feature::CORRUPT != 0;
            details.push(Detail::new("corrupt", corrupt));
            details.push(Detail::new(
                "dirty",
                header.incompatible & feature::DIRTY != 0,
            ));
            details.push(Detail::new("extended-l2", header.extended_l2()));
        }
        if let Some(encryption) = header.encryption {
            let described = encryption.describe(&*self.file, header);
            details.push(Detail::new("encrypt", described));
        }
        match self.list() {
            Ok(list) if list.is_empty() => {}
            Ok(list) => {
                let list: Vec<serde_json::Value> = list.iter().map(bitmap_detail).collect();
                details.push(Detail::new("bitmaps", list));
            }
            Err(e) => details.push(Detail::new("bitmaps-damaged", e.message())),
        }
        if let Some(name) = header.data_file_name() {
            details.push(Detail::new("data-file", replaced(&name)));
            let raw = header.autoclear & feature::DATA_FILE_RAW != 0;
            details.push(Detail::new("data-file-raw", raw));
        }
        details
    }
}

/// A bitmap with the keys that qemu-img has.
fn bitmap_detail(bitmap: &Bitmap) -> serde_json::Value {
    let in_use = bitmap.in_use.then_some("in-use");
    let auto = (bitmap.recording == Recording::On).then_some("auto");
    let flags: Vec<&str> = in_use.into_iter().chain(auto).collect();
    serde_json::json!({
        "flags": flags,
        "name": replaced(&bitmap.name),
        "granularity": bitmap.granularity,
    })
}

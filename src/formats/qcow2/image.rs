//! The image as the layers above see it.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::lookup::Place;
use super::snapshot_table::SnapshotTable;
use super::{DRIVER, Qcow2, feature};
use crate::error::{Error, ErrorKind, Result};
use crate::image::amend::Amend;
use crate::image::bitmap::{Bitmap, Bitmaps, Recording};
use crate::image::check::Check;
use crate::image::codec::Compression;
use crate::image::compress::Compress;
use crate::image::info::{Detail, HostInfo};
use crate::image::open::WriteOrder;
use crate::image::relink::{Empty, Relink};
use crate::image::snapshot::{Snapshot, Snapshots};
use crate::image::units::Units;
use crate::image::{
    Backing, BackingName, Caps, Compact, Driver, Image, Part, Resize, Role, Run, Source, Wait,
};
use crate::storage::{Limits, Storage, Zeroing};
use crate::util::align::{clamp_len, down, len64};
use crate::util::progress::Watcher;
use crate::util::text::replaced;

impl Qcow2 {
    /// Virtual size in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Whether guest data is in an external data file.
    pub(super) fn has_data_file(&self) -> bool {
        self.header.has_data_file()
    }

    /// The external data file, where there is one and it is open.
    pub(super) fn external(&self) -> Option<&dyn Storage> {
        self.data.as_deref().filter(|_| self.has_data_file())
    }

    /// The compressed cluster of `at`, whose bytes are at `range`, decoded.
    pub(super) fn decode_kept(&self, range: Range<u64>, at: u64) -> Result<Arc<[u8]>> {
        self.decoded.get(range.start, || {
            let mut out = vec![0; clamp_len(self.layout.cluster_size(), usize::MAX)];
            self.decode(range, at, &mut out)?;
            Ok(out)
        })
    }

    /// Where the compressed bytes of the cluster of `at` are; `None` where it is not compressed,
    /// any more perhaps.
    pub(super) fn packed(&self, at: u64) -> Result<Option<Range<u64>>> {
        Ok(self.entry(at)?.cluster.packed())
    }

    /// Decodes a cluster into `out`, which is as long as one.
    pub(super) fn decode(&self, range: Range<u64>, at: u64, out: &mut [u8]) -> Result<()> {
        let len = self.file.size();
        if range.start >= len {
            return Err(Error::corrupt(format!(
                "the compressed cluster of {at:#x} is at {:#x} (the file ends at {len:#x})",
                range.start
            )));
        }
        self.not_behind(range.start, 1, at)?;
        // The last cluster's sectors may reach past the end of the file.
        let len = clamp_len(range.end.min(len) - range.start, usize::MAX);
        self.decoded.with(|decoders| {
            self.file.read_at(decoders.input(len), range.start)?;
            decoders
                .decode_input(self.header.compression, len, out)
                .map_err(|e| Error::corrupt(format!("at guest offset {at:#x}: {}", e.message())))
        })
    }

    /// Decodes the whole cluster at `at` into `out`, without keeping it: who reads clusters whole
    /// does not come back for them, and those that others come back for stay.
    pub(super) fn decode_whole(&self, range: Range<u64>, at: u64, out: &mut [u8]) -> Result<()> {
        match self.decoded.kept(range.start) {
            Some(bytes) => out.copy_from_slice(&bytes),
            None => self.decode(range, at, out)?,
        }
        Ok(())
    }

    /// The run of `len` bytes at `host`, which is cut where metadata in use follows that it would
    /// be written over.
    fn stored(&self, host: u64, len: u64, copied: bool, at: u64) -> Result<Run<'_>> {
        let Some(data) = &self.data else {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("the data at {at:#x} is in the external data file, which was not opened"),
            ));
        };
        // The last cluster of a file may be there in part.
        if down(host, self.layout.cluster_size()) >= data.size() {
            return Err(Error::corrupt(format!(
                "the cluster of {at:#x} is at {host:#x} (the data file ends at {:#x})",
                data.size()
            )));
        }
        let len = self.not_behind(host, len, at)?;
        // The first change is made by `allocate`, which sees to the header.
        let started = self
            .writer
            .as_ref()
            .is_some_and(|w| w.allocator.has_begun());
        let unguarded = match copied && started && !self.is_misplaced(host, at) {
            true => self.unguarded(host, len),
            false => 0,
        };
        let writable = unguarded > 0;
        Ok(Run {
            len: if writable { unguarded } else { len },
            source: Source::Stored {
                storage: &**data,
                host,
                writable,
            },
        })
    }
}

impl Image for Qcow2 {
    fn driver(&self) -> &'static Driver {
        &DRIVER
    }

    fn virtual_size(&self) -> u64 {
        self.size()
    }

    fn cluster_size(&self) -> Option<u64> {
        Some(self.layout.cluster_size())
    }

    fn limits(&self) -> Limits {
        let unit = u32::try_from(self.layout.subcluster_size()).unwrap_or(0);
        Limits {
            align: 1,
            buf_align: 1,
            zero_align: unit,
            discard_align: unit,
        }
    }

    fn caps(&self) -> Caps {
        Caps {
            write: self.writer.is_some(),
            backing: self.header.backing_name.is_some(),
            host_offsets: true,
            offsets_stay: false,
            encoded: Some(self.layout.cluster_size()),
        }
    }

    fn storage(&self) -> &dyn Storage {
        &*self.file
    }

    fn parts(&self) -> Vec<Part<'_>> {
        let part = |role, storage| Part { role, storage };
        let header = part(Role::Header, self.storage());
        let data = self.external().map(|data| part(Role::Data, data));
        std::iter::once(header).chain(data).collect()
    }

    fn map(&self, at: u64, len: u64, wait: Wait) -> Result<Run<'_>> {
        if let Some(encryption) = self.header.encryption {
            return Err(encryption.refusal());
        }
        let len = len.min(self.size().saturating_sub(at));
        let found = self.tables.find(at, len, wait)?;
        let source = match found.place {
            Place::Below => Source::Below,
            Place::Zero => Source::Zero,
            Place::Compressed => Source::Encoded,
            Place::Stored { host, copied } => {
                let recorded = match copied {
                    true => self.recorded(&(at..at + found.len)),
                    false => 0,
                };
                return match recorded {
                    0 => self.stored(host, found.len, false, at),
                    len => self.stored(host, len, true, at),
                };
            }
        };
        Ok(Run {
            len: found.len,
            source,
        })
    }

    fn read_encoded(&self, buf: &mut [u8], at: u64) -> Result<usize> {
        let size = self.layout.cluster_size();
        let mut done = 0;
        while done < buf.len() {
            let at = at + len64(done);
            // Looked up anew: a write may have made it something else since it was mapped.
            let Some(range) = self.packed(at)? else {
                break;
            };
            let within = clamp_len(at % size, usize::MAX);
            let whole = clamp_len(size, usize::MAX);
            if within == 0 && buf.len() - done >= whole {
                self.decode_whole(range, at, &mut buf[done..done + whole])?;
                done += whole;
                continue;
            }
            let cluster = self.decode_kept(range, at)?;
            let len = (cluster.len() - within).min(buf.len() - done);
            buf[done..done + len].copy_from_slice(&cluster[within..within + len]);
            done += len;
        }
        Ok(done)
    }

    fn store(&self) -> Option<&dyn crate::image::Store> {
        Some(self)
    }

    fn zero(&self, range: Range<u64>, how: Zeroing) -> Result<()> {
        self.zero_range(&range, how)
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        self.discard_range(&range)
    }

    fn close(&self) -> Result<()> {
        self.allocator()?.order.sound()?;
        self.release_assigned()?;
        self.finish_bitmaps()?;
        match self.allocator()?.order.policy() {
            WriteOrder::Ordered => self.flush(),
            WriteOrder::Unordered => self.release_freed(),
        }
    }

    fn as_compact(&self) -> Option<&dyn Compact> {
        Some(self)
    }

    fn as_resize(&self) -> Option<&dyn Resize> {
        Some(self)
    }

    fn as_layout(&self) -> Option<&dyn crate::image::Layout> {
        self.writer.is_some().then_some(self)
    }

    fn as_compress(&self) -> Result<&dyn Compress> {
        self.compressing()
    }

    fn as_relink(&mut self) -> Option<&mut dyn Relink> {
        Some(self)
    }

    fn as_empty(&mut self) -> Option<&mut dyn Empty> {
        Some(self)
    }

    fn snapshots(&self) -> Result<Vec<Snapshot>> {
        let table = SnapshotTable::read(&*self.file, &self.header)?;
        Ok(table.describe(self.size()))
    }

    fn as_amend(&mut self) -> Option<&mut dyn Amend> {
        Some(self)
    }

    fn bitmaps(&self) -> Option<&dyn Bitmaps> {
        // Version 2 has none.
        (self.header.version >= 3).then_some(self)
    }

    fn as_bitmaps(&mut self) -> Option<&mut dyn Bitmaps> {
        Some(self)
    }

    fn as_snapshots(&mut self) -> Option<&mut dyn Snapshots> {
        Some(self)
    }

    fn backing(&self) -> Option<Backing> {
        let path = self.header.backing_name.clone()?;
        Some(Backing {
            names: vec![BackingName {
                path,
                origin: "header".to_owned(),
            }],
            format: self.header.backing_format(),
            identity: None,
            state: None,
        })
    }

    fn may_be_unwritten(&self) -> bool {
        // Tables that were made ahead of the data, as a file shows that is mostly holes.
        self.has_data_file() || HostInfo::of(&*self.file).map_or(true, |file| file.is_sparse())
    }

    fn is_encrypted(&self) -> bool {
        self.header.encryption.is_some()
    }

    fn is_dirty(&self) -> bool {
        self.header.incompatible & feature::DIRTY != 0
    }

    fn watch(&mut self, watcher: Watcher) {
        self.watcher = watcher;
    }

    fn as_check(&self) -> Option<&dyn Check> {
        Some(self)
    }

    fn details(&self) -> Vec<Detail> {
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
            details.push(Detail::new("dirty", self.is_dirty()));
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
            let raw = header.data_file_is_raw();
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

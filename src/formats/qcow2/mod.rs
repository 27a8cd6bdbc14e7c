//! qcow2: QEMU's copy-on-write format, versions 2 and 3.

mod allocate;
mod amend;
mod bitmap;
mod bitmap_copy;
mod bitmap_dir;
mod check;
mod compress;
mod counts;
mod create;
mod decode;
mod encode;
mod entry;
mod expand;
mod extension;
mod feature;
mod guard;
mod guard_fixed;
mod header;
mod lookup;
mod measure;
mod packing;
mod preallocate;
mod recorder;
mod refblock;
mod refcount;
mod relink;
mod resize;
mod rewrite;
mod sequence;
mod snapshot;
mod snapshot_table;
mod space;
mod switch;
mod writer;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, ErrorKind, Result};
use crate::image::amend::Amend;
use crate::image::bitmap::{Bitmap, Bitmaps, Recording};
use crate::image::check::{Check, Repair};
use crate::image::compress::Compress;
use crate::image::driver::Creator;
use crate::image::info::Detail;
use crate::image::open::{OpenOptions, Purpose};
use crate::image::probe::ProbeInput;
use crate::image::relink::{Empty, Relink};
use crate::image::snapshot::{Pick, Snapshot, Snapshots};
use crate::image::{Backing, BackingName, Caps, Driver, Fill, Image, Resize, Run, Source, Wait};
use crate::storage::open::Access;
use crate::storage::{Limits, Storage, Zeroing};
use crate::util::align::{clamp_len, down, len64};
use crate::util::progress::Silent;

use decode::Decoded;
use encode::Codec;
use entry::{Cluster, Layout, Packed};
use header::{Compression, Header};
use lookup::{Place, Tables};
use refcount::Refcounts;
use snapshot_table::SnapshotTable;
use writer::Writer;

/// The registry row.
pub static DRIVER: Driver = Driver {
    name: "qcow2",
    aliases: &[],
    extensions: &["qcow2", "qcow2c"],
    about: "QEMU's copy-on-write format, versions 2 and 3",
    probe,
    open: |storage, options| Ok(Box::new(Qcow2::open(storage, options)?)),
    open_options: encode::OPTIONS,
    creator: Some(Creator {
        create: create::create,
        measure: measure::measure,
        measure_bitmaps: measure::measure_bitmaps,
        cluster_size: create::cluster_size,
        options: create::OPTIONS,
        compress: Some(encode::OPTIONS),
        sequence: Some(sequence::sequence),
    }),
};

fn probe(input: &ProbeInput<'_>) -> u8 {
    let word = |at: usize| {
        let bytes = input.head.get(at..at + 4)?;
        Some(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    };
    match (word(0), word(4)) {
        (Some(header::MAGIC), Some(2 | 3)) => 100,
        // Versions to come are refused by name, not read as raw.
        (Some(header::MAGIC), Some(4..)) => 50,
        _ => 0,
    }
}

/// An open image.
#[derive(Debug)]
struct Qcow2 {
    file: Arc<dyn Storage>,
    /// Where guest data is: the file itself, or the external data file; `None`: not opened.
    data: Option<Arc<dyn Storage>>,
    /// As it was on opening; `size` and `tables` know what has changed since.
    header: Header,
    /// Virtual size in bytes.
    size: AtomicU64,
    layout: Layout,
    tables: Tables,
    decoded: Decoded,
    /// How clusters are compressed.
    codec: Codec,
    /// `None`: opened for reading.
    writer: Option<Writer>,
}

impl Qcow2 {
    fn open(file: Arc<dyn Storage>, options: &OpenOptions) -> Result<Self> {
        let mut header = Header::read_for(&*file, options.purpose)?;
        let using = options.purpose == Purpose::Use;
        let writing = using && options.access == Access::Write;
        if writing && header.incompatible & feature::CORRUPT != 0 {
            return Err(Error::corrupt(
                "the image is marked corrupt (incompatible bit 1) and is not written; check -r all may mend it",
            ));
        }
        let l1_end = header
            .l1_offset
            .saturating_add(u64::from(header.l1_len) * 8);
        if using && l1_end > file.size() {
            return Err(Error::corrupt(format!(
                "the L1 table ends at {l1_end:#x} (the file ends at {:#x})",
                file.size()
            )));
        }
        if writing && header.incompatible & feature::DIRTY != 0 {
            mend(&*file)?;
            header = Header::read(&*file)?;
        }
        let external = header.incompatible & feature::DATA_FILE != 0;
        let data = match external {
            true => open_data_file(&header, options)?,
            false => Some(Arc::clone(&file)),
        };
        if let Some(pick) = &options.snapshot {
            view(&*file, &mut header, pick, options.access)?;
        }
        let layout = Layout {
            cluster_bits: header.cluster_bits,
            extended: header.extended_l2(),
            version: header.version,
        };
        let (offset, len) = (header.l1_offset, u64::from(header.l1_len));
        let tables = Tables::new(layout, header.l2_bits(), offset, len, external);
        let decoded = Decoded::new(header.cluster_size());
        let codec = Codec::new(header.compression, &options.values)?;
        let writer = match options.access {
            Access::Read => None,
            Access::Write => Some(open_writer(&*file, &header, options)?),
        };
        Ok(Self {
            file,
            data,
            size: AtomicU64::new(header.size),
            header,
            layout,
            tables,
            decoded,
            codec,
            writer,
        })
    }

    /// Virtual size in bytes.
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Whether guest data is in an external data file.
    fn has_data_file(&self) -> bool {
        self.header.incompatible & feature::DATA_FILE != 0
    }

    /// The external data file, where there is one and it is open.
    fn external(&self) -> Option<&dyn Storage> {
        let external = self.header.incompatible & feature::DATA_FILE != 0;
        self.data.as_deref().filter(|_| external)
    }

    /// The compressed cluster that `at` lies in, decoded.
    fn decoded(&self, at: u64) -> Result<Arc<[u8]>> {
        let range = self.packed(at)?;
        self.decoded.get(range.start, || {
            let mut out = vec![0; clamp_len(self.layout.cluster_size(), usize::MAX)];
            self.decode(range, at, &mut out)?;
            Ok(out)
        })
    }

    /// Where the compressed bytes of the cluster of `at` are.
    fn packed(&self, at: u64) -> Result<Packed> {
        let entry = self.tables.entry_offset(&*self.file, at, Wait::Yes)?;
        let cluster = match entry {
            Some(entry) => self.tables.cluster(&*self.file, entry, Wait::Yes)?,
            None => Cluster::Unallocated,
        };
        match cluster {
            Cluster::Compressed(range) => Ok(range),
            _ => Err(Error::corrupt(format!(
                "the cluster at {at:#x} is not compressed"
            ))),
        }
    }

    /// Decodes a cluster into `out`, which is as long as one.
    fn decode(&self, range: Packed, at: u64, out: &mut [u8]) -> Result<()> {
        let len = self.file.size();
        if range.start >= len {
            return Err(Error::corrupt(format!(
                "the compressed cluster of {at:#x} is at {:#x} (the file ends at {len:#x})",
                range.start
            )));
        }
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
    fn decode_whole(&self, at: u64, out: &mut [u8]) -> Result<()> {
        let range = self.packed(at)?;
        match self.decoded.kept(range.start) {
            Some(bytes) => out.copy_from_slice(&bytes),
            None => self.decode(range, at, out)?,
        }
        Ok(())
    }

    fn stored(&self, host: u64, copied: bool, at: u64) -> Result<Source<'_>> {
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
        // The first change is made by `allocate`, which sees to the header.
        let started = self.writer.as_ref().is_some_and(Writer::has_started);
        Ok(Source::Stored {
            storage: &**data,
            host,
            writable: copied && started && !self.is_guarded(host),
        })
    }
}

/// Makes a header show a snapshot: its tables, its size.
fn view(file: &dyn Storage, header: &mut Header, pick: &Pick, access: Access) -> Result<()> {
    if access == Access::Write {
        return Err(Error::unsupported(
            "a snapshot is read-only (apply it to write to what it holds)",
        ));
    }
    let table = SnapshotTable::read(file, header)?;
    let list = table.describe(header.size);
    let index = pick.find(&list)?;
    let (Some(entry), Some(snapshot)) = (table.entries.get(index), list.get(index)) else {
        return Err(Error::corrupt("the snapshot table changed"));
    };
    let needed = header.l1_needed(snapshot.disk_size);
    if u64::from(entry.l1_len()) < needed {
        return Err(Error::corrupt(format!(
            "the L1 table of snapshot {index} has {} entries, its disk of {} bytes needs {needed}",
            entry.l1_len(),
            snapshot.disk_size
        )));
    }
    header.size = snapshot.disk_size;
    header.l1_offset = entry.l1_offset();
    header.l1_len = entry.l1_len();
    Ok(())
}

/// Counts anew what a writer with lazy refcounts left behind.
fn mend(file: &dyn Storage) -> Result<()> {
    let report = check::check(file, Repair::All, &Silent)?;
    if report.corruptions + report.check_errors > 0 {
        return Err(Error::corrupt(format!(
            "the image was not closed cleanly (dirty bit) and cannot be mended: {} corruptions remain; check names them",
            report.corruptions
        )));
    }
    Ok(())
}

fn open_writer(file: &dyn Storage, header: &Header, options: &OpenOptions) -> Result<Writer> {
    let place = refcount::Place {
        cluster_bits: header.cluster_bits,
        width: refblock::Width::new(header.refcount_order),
        table: header.reftable_offset,
        table_clusters: u64::from(header.reftable_clusters),
    };
    let refcounts = Refcounts::new(place, file.size(), options.order);
    Ok(Writer::new(
        refcounts,
        options.order,
        Arc::clone(&options.grace),
    ))
}

fn open_data_file(header: &Header, options: &OpenOptions) -> Result<Option<Arc<dyn Storage>>> {
    let Some(companions) = &options.companions else {
        return Ok(None);
    };
    let name = header.data_file_name().ok_or_else(|| {
        Error::corrupt("the image has an external data file, but does not name it")
    })?;
    companions.open(&name, "data file").map(Some)
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
        }
    }

    fn storage(&self) -> &dyn Storage {
        &*self.file
    }

    fn companions(&self) -> Vec<&dyn Storage> {
        self.external().into_iter().collect()
    }

    fn map(&self, at: u64, len: u64, wait: Wait) -> Result<Run<'_>> {
        let len = len.min(self.size().saturating_sub(at));
        let mut found = self.tables.find(&*self.file, at, len, wait)?;
        let source = match found.place {
            Place::Below => Source::Below,
            Place::Zero => Source::Zero,
            Place::Compressed => Source::Encoded,
            Place::Stored { host, copied } => {
                let recorded = match copied {
                    true => self.recorded(&(at..at + found.len)),
                    false => 0,
                };
                let source = self.stored(host, recorded > 0, at)?;
                if recorded > 0 {
                    found.len = recorded;
                }
                source
            }
        };
        Ok(Run {
            len: found.len,
            source,
        })
    }

    fn read_encoded(&self, buf: &mut [u8], at: u64) -> Result<()> {
        let size = self.layout.cluster_size();
        let mut done = 0;
        while done < buf.len() {
            let at = at + len64(done);
            let within = clamp_len(at % size, usize::MAX);
            let whole = clamp_len(size, usize::MAX);
            if within == 0 && buf.len() - done >= whole {
                self.decode_whole(at, &mut buf[done..done + whole])?;
                done += whole;
                continue;
            }
            let cluster = self.decoded(at)?;
            let len = (cluster.len() - within).min(buf.len() - done);
            buf[done..done + len].copy_from_slice(&cluster[within..within + len]);
            done += len;
        }
        Ok(())
    }

    fn allocate(&self, at: u64, len: u64, fill: &mut Fill<'_>) -> Result<u64> {
        self.allocate_range(at, len, fill)
    }

    fn zero(&self, range: Range<u64>, how: Zeroing) -> Result<()> {
        self.zero_range(&range, how)
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        self.discard_range(&range)
    }

    fn flush(&self) -> Result<()> {
        let Some(writer) = &self.writer else {
            return Ok(());
        };
        self.flush_all(writer)?;
        self.release_freed()
    }

    fn close(&self) -> Result<()> {
        self.release_assigned()?;
        self.release_freed()?;
        self.finish_bitmaps()
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
        })
    }

    fn is_dirty(&self) -> bool {
        self.header.incompatible & feature::DIRTY != 0
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
            details.push(Detail::new(
                "dirty",
                header.incompatible & feature::DIRTY != 0,
            ));
            details.push(Detail::new("extended-l2", header.extended_l2()));
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
            details.push(Detail::new("data-file", name));
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
        "name": bitmap.name,
        "granularity": bitmap.granularity,
    })
}

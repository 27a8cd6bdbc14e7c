//! An open file: the disk that it makes of the one below.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::details::details;
use super::header::{BLOCK, BLOCK_LEN, Header, Packing, Reader};
use super::ops::{End, Kind, Ops, resume_points};
use super::table::{Entry, Table, Wanted};
use super::window;
use crate::error::{Error, ErrorKind, Result};
use crate::image::codec::Decoded;
use crate::image::info::Detail;
use crate::image::merge::{Merge, MergeBase};
use crate::image::open::{OpenOptions, Purpose};
use crate::image::operations::{Operation, Operations, Visit};
use crate::image::{Backing, Below, Caps, Check, Driver, Image, Run, Source, Wait};
use crate::storage::{Limits, Storage};
use crate::util::align::{clamp_len, len64};

/// Entries that one look-up goes over at most.
const MOST_JOINED: usize = 4096;

/// An open file.
#[derive(Debug)]
pub(super) struct AndroidCow {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) header: Header,
    pub(super) table: Table,
    /// Blocks that a merge had ready when it was stopped, and where their bytes are.
    pub(super) window: BTreeMap<u64, u64>,
    /// Whether a merge was stopped with such.
    pub(super) within: bool,
    pub(super) end: End,
    /// What is wrong with it, where it is opened to be checked all the same.
    pub(super) faults: Vec<String>,
    decoded: Decoded,
    /// The most bytes that are decoded together.
    largest: u64,
    size: AtomicU64,
    /// Bytes of the disk below; all ones: not known.
    below: AtomicU64,
}

/// Where the bytes of a piece of one entry are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Below,
    Stored(u64),
    Encoded,
    Zero,
    Moved(u64),
}

impl Place {
    /// The same `len` bytes further.
    fn after(self, len: u64) -> Self {
        match self {
            Self::Stored(host) => Self::Stored(host + len),
            Self::Moved(at) => Self::Moved(at + len),
            same => same,
        }
    }
}

impl AndroidCow {
    /// Opens the file in `storage`.
    ///
    /// # Errors
    /// Those of the header, the operations and the scratch area.
    pub(super) fn open(storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<Self> {
        let header = Header::read(&*storage)?;
        let end = match options.values.number("label") {
            Some(label) => End::Label(label),
            None => End::Whole,
        };
        let mut faults = Vec::new();
        let wanted = match options.listed {
            true => Wanted::Counts,
            false => Wanted::All,
        };
        let table = Table::read(&*storage, &header, end, wanted, &options.watcher);
        let mut table = reported(table, options.purpose, &mut faults)?;
        let within = window::is_ready(&*storage, &header)?;
        let window = match wanted {
            Wanted::All => window::read(&*storage, &header, &table),
            Wanted::Counts => Ok(BTreeMap::new()),
        };
        let window = reported(window, options.purpose, &mut faults)?;
        table.mark_lost(&window);
        let lens = table.entries.iter().map(|entry| {
            let blocks = entry.blocks();
            (blocks.end - blocks.start) * BLOCK
        });
        let largest = lens.max().unwrap_or(BLOCK);
        Ok(Self {
            size: AtomicU64::new(table.end * BLOCK),
            below: AtomicU64::new(u64::MAX),
            decoded: Decoded::new(largest),
            largest,
            storage,
            header,
            table,
            window,
            within,
            end,
            faults,
        })
    }

    /// Where the bytes of `entry` from `skip` on are.
    fn place(&self, entry: &Entry, skip: u64) -> Result<Place> {
        if let Some(host) = self.window.get(&u64::from(entry.block)) {
            return Ok(Place::Stored(host + skip));
        }
        if entry.is_merged() {
            self.was_merged(entry)?;
            return Ok(Place::Below);
        }
        if entry.is_lost() {
            return Err(Error::corrupt(format!(
                "block {} was to be made of what the merge has overwritten by now",
                entry.block
            )));
        }
        Ok(match entry.kind() {
            Kind::Zero => Place::Zero,
            Kind::Copy => {
                self.is_below(entry, entry.source() * BLOCK)?;
                Place::Moved(entry.source() * BLOCK + skip)
            }
            Kind::Replace if is_plain(entry) => Place::Stored(entry.data().start + skip),
            _ => Place::Encoded,
        })
    }

    /// Refuses a disk below that is too short to hold what was merged into it.
    fn was_merged(&self, entry: &Entry) -> Result<()> {
        let below = self.below.load(Ordering::Acquire);
        let most = below.checked_next_multiple_of(BLOCK).unwrap_or(u64::MAX);
        match entry.blocks().end * BLOCK <= most {
            true => Ok(()),
            false => Err(Error::corrupt(format!(
                "block {} was merged into the disk below, and that has {below} bytes: it is another, or was cut",
                entry.block
            ))),
        }
    }

    /// Refuses what is read from past the end of the disk below.
    pub(super) fn is_below(&self, entry: &Entry, at: u64) -> Result<()> {
        let below = self.below.load(Ordering::Acquire);
        let most = below.checked_next_multiple_of(BLOCK).unwrap_or(u64::MAX);
        match at + BLOCK <= most {
            true => Ok(()),
            false => Err(Error::corrupt(format!(
                "block {} is made of what lies at {at:#x} of the disk below, which has {below} bytes",
                entry.block
            ))),
        }
    }

    /// The part of `entry` from `skip` on, no more than `buf` has room for; how much that is.
    fn make(&self, entry: &Entry, skip: u64, buf: &mut [u8], below: &dyn Below) -> Result<usize> {
        let blocks = entry.blocks();
        let whole = clamp_len((blocks.end - blocks.start) * BLOCK, usize::MAX);
        let skip = clamp_len(skip, whole);
        let len = (whole - skip).min(buf.len());
        let buf = &mut buf[..len];
        match entry.kind() {
            Kind::Xor => {
                let mut made = [0; BLOCK_LEN];
                self.decode(entry, &mut made)?;
                self.is_below(entry, entry.source())?;
                let mut old = [0; BLOCK_LEN];
                below.read_at(&mut old, entry.source())?;
                for (to, (a, b)) in buf.iter_mut().zip(made.iter().zip(&old).skip(skip)) {
                    *to = a ^ b;
                }
            }
            _ if len == whole => self.decode(entry, buf)?,
            _ => {
                // By what it makes: several may share their data, and read it otherwise.
                let chunk = self.decoded.get(u64::from(entry.block) * BLOCK, || {
                    let mut chunk = vec![0; whole];
                    self.decode(entry, &mut chunk).map(|()| chunk)
                })?;
                let part = chunk.get(skip..skip + len);
                let part =
                    part.ok_or_else(|| Error::corrupt("the file changed while it was read"))?;
                buf.copy_from_slice(part);
            }
        }
        Ok(len)
    }

    /// Decodes the data of an entry, all of it.
    ///
    /// # Errors
    /// `Corrupt` where it does not fill `out`; the host's.
    pub(super) fn decode(&self, entry: &Entry, out: &mut [u8]) -> Result<()> {
        let data = entry.data();
        let Packing::Packed(method) = entry.packing() else {
            return self.storage.read_at(out, data.start);
        };
        if is_plain(entry) {
            return self.storage.read_at(out, data.start);
        }
        let len = clamp_len(data.end - data.start, usize::MAX);
        let done = self.decoded.with(|decoders| {
            self.storage
                .read_at(&mut decoders.input(len)[..len], data.start)?;
            method.decode(decoders, len, out)
        });
        done.map_err(|e| {
            let text = format!(
                "block {}, data at {:#x}: {}",
                entry.block,
                data.start,
                e.message()
            );
            match e.kind() {
                ErrorKind::Corrupt => Error::corrupt(text),
                _ => e,
            }
        })
    }
}

impl AndroidCow {
    /// What an operation makes, all of it, of the disk below as it was.
    ///
    /// # Errors
    /// Those of reading it.
    pub(super) fn made(&self, entry: &Entry, buf: &mut [u8], below: &dyn MergeBase) -> Result<()> {
        match entry.kind() {
            Kind::Zero => buf.fill(0),
            Kind::Copy => below.read_at(buf, Self::read_from(entry))?,
            _ => {
                self.make(entry, 0, buf, below)?;
            }
        }
        Ok(())
    }

    /// Where the old bytes are that an operation reads.
    pub(super) fn read_from(entry: &Entry) -> u64 {
        match entry.kind() {
            Kind::Copy => entry.source() * BLOCK,
            _ => entry.source(),
        }
    }
}

/// What was read; nothing, and a fault, where it is damaged and that is what is looked for.
fn reported<T: Default>(read: Result<T>, purpose: Purpose, faults: &mut Vec<String>) -> Result<T> {
    match read {
        Err(e) if e.kind() == ErrorKind::Corrupt && purpose == Purpose::Check => {
            faults.push(e.message().to_owned());
            Ok(T::default())
        }
        read => read,
    }
}

/// Whether the data of a replacing operation is stored as it is: by its length, which compressors of
/// which files keep to the rule.
pub(super) fn is_plain(entry: &Entry) -> bool {
    use crate::image::codec::Method;
    let (blocks, data) = (entry.blocks(), entry.data());
    let is_whole = data.end - data.start == (blocks.end - blocks.start) * BLOCK;
    match entry.packing() {
        Packing::Plain => true,
        Packing::Packed(Method::Lz4 | Method::Zstd) => is_whole,
        Packing::Packed(Method::Gz | Method::Brotli) => is_whole && entry.is_third(),
    }
}

impl Image for AndroidCow {
    fn driver(&self) -> &'static Driver {
        &super::DRIVER
    }

    fn virtual_size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn cluster_size(&self) -> Option<u64> {
        Some(BLOCK)
    }

    fn limits(&self) -> Limits {
        self.storage.limits()
    }

    fn caps(&self) -> Caps {
        Caps {
            backing: true,
            encoded: Some(self.largest),
            ..Caps::STORED
        }
    }

    fn read_only(&self) -> Error {
        let text = "Android COW files are read-only (commit merges one into its base; serve and io \
                    write to an overlay)";
        Error::new(ErrorKind::ReadOnly, text)
    }

    fn storage(&self) -> &dyn Storage {
        &*self.storage
    }

    fn map(&self, at: u64, len: u64, _wait: Wait) -> Result<Run<'_>> {
        let (place, len) = self.look(at, len)?;
        let source = match place {
            Place::Below => Source::Below,
            Place::Zero => Source::Zero,
            Place::Encoded => Source::Encoded,
            Place::Moved(at) => Source::Moved(at),
            Place::Stored(host) => Source::Stored {
                storage: &*self.storage,
                host,
                writable: false,
            },
        };
        Ok(Run { len, source })
    }

    fn read_encoded_over(&self, buf: &mut [u8], at: u64, below: &dyn Below) -> Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            let at = at + len64(done);
            let Ok(found) = self.table.find(at / BLOCK) else {
                break;
            };
            let entry = &self.table.entries[found];
            let skip = at - u64::from(entry.block) * BLOCK;
            if self.place(entry, skip)? != Place::Encoded {
                break;
            }
            done += self.make(entry, skip, &mut buf[done..], below)?;
        }
        Ok(done)
    }

    fn lies_over(&self, size: u64) {
        self.below.store(size, Ordering::Release);
        self.size.fetch_max(size, Ordering::AcqRel);
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn close(&self) -> Result<()> {
        Ok(())
    }

    fn backing(&self) -> Option<Backing> {
        Some(Backing {
            names: Vec::new(),
            format: None,
            identity: None,
            state: None,
        })
    }

    fn details(&self) -> Vec<Detail> {
        details(self)
    }

    fn as_check(&self) -> Option<&dyn Check> {
        Some(self)
    }

    fn as_merge(&self) -> Option<&dyn Merge> {
        Some(self)
    }

    fn as_operations(&self) -> Option<&dyn Operations> {
        Some(self)
    }
}

impl AndroidCow {
    /// Where the bytes from `at` are, and how far that goes, at most `len`.
    fn look(&self, at: u64, len: u64) -> Result<(Place, u64)> {
        if self.table.making > len64(self.table.entries.len()) {
            return Err(Error::unsupported(
                "was opened to be listed, not to be read",
            ));
        }
        let found = match self.table.find(at / BLOCK) {
            Ok(found) => found,
            Err(next) => return Ok((Place::Below, self.gap(next, at, len))),
        };
        let mut entry = &self.table.entries[found];
        let place = self.place(entry, at - u64::from(entry.block) * BLOCK)?;
        let (mut end, last) = (entry.blocks().end * BLOCK, at + len);
        for next in self.table.entries.iter().skip(found + 1).take(MOST_JOINED) {
            let follows = entry.blocks().end == u64::from(next.block);
            if end >= last || !follows {
                break;
            }
            // What is wrong with the next is told to who reads it.
            let there = self.place(next, 0).ok();
            if there != Some(place.after(end - at)) {
                break;
            }
            entry = next;
            end = entry.blocks().end * BLOCK;
        }
        Ok((place, end.min(last) - at))
    }

    /// How far it is from `at` to the entry at `next`, at most `len`.
    fn gap(&self, next: usize, at: u64, len: u64) -> u64 {
        let next = self.table.entries.get(next);
        next.map_or(len, |e| len.min(u64::from(e.block) * BLOCK - at))
    }
}

impl Operations for AndroidCow {
    fn each(&self, visit: &mut Visit<'_>) -> Result<()> {
        let storage = &*self.storage;
        let mut points = resume_points(&self.header, &mut Reader::new(storage))?;
        points.sort_by_key(|(_, count)| *count);
        let mut points = points.into_iter().peekable();
        if let Some(tables) = self.header.third.as_ref().filter(|t| t.sequence > 0) {
            visit(&Operation {
                index: 0,
                kind: "sequence",
                data_offset: Some(self.header.sequence_at()),
                data_length: Some(4 * tables.sequence),
                ..Operation::default()
            })?;
        }
        let mut labels = |upto: u64, visit: &mut Visit<'_>| -> Result<()> {
            while let Some((label, index)) = points.next_if(|(_, count)| *count <= upto) {
                visit(&Operation {
                    index,
                    kind: "label",
                    label: Some(label),
                    ..Operation::default()
                })?;
            }
            Ok(())
        };
        let mut ops = Ops::new(storage, &self.header, self.end)?;
        let mut count = 0;
        while let Some(op) = ops.next()? {
            labels(op.index, visit)?;
            visit(&op.shown())?;
            count = op.index + 1;
        }
        labels(count, visit)
    }
}

//! One sparse file: its grains, behind a directory of tables.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::formats::vmdk::header::Header;
use crate::formats::vmdk::session::Session;
use crate::formats::vmdk::space::InUse;
use crate::formats::vmdk::stream::Packed;
use crate::formats::vmdk::tables::{Entry, Geometry, Tables};
use crate::formats::vmdk::{cowd, stream};
use crate::image::units::Allocator;
use crate::image::{Run, Source, Wait};
use crate::storage::Storage;

/// An open sparse file.
#[derive(Debug)]
pub(super) struct Sparse {
    pub(super) storage: Arc<dyn Storage>,
    /// The last writer did not close it, or is at work.
    pub(super) unclean: AtomicBool,
    /// Where its header says from where on others take space.
    pub(super) free_field: Option<u64>,
    /// Host bytes of the descriptor, where that is inside.
    pub(super) kept: Option<Range<u64>>,
    /// The header at its end says where the tables are.
    pub(super) ends_with_footer: bool,
    /// Flags of its header that are not known.
    pub(super) odd_flags: u32,
    /// What a writer needs.
    pub(super) writer: Option<Writer>,
    pub(super) tables: ArcSwap<Tables>,
    /// What grains are decoded with, where they are compressed.
    pub(super) packed: Option<Packed>,
}

/// What a writer needs.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) allocator: Allocator,
    pub(super) session: Arc<Session>,
    /// What no grain has is read from the parent.
    pub(super) has_backing: bool,
    pub(super) space: Mutex<InUse>,
    /// A write failed that would have made the two copies of a table the same.
    pub(super) torn: AtomicBool,
    /// Held while a table is made.
    pub(super) making: Mutex<()>,
}

impl Sparse {
    /// A hosted sparse file with this header.
    ///
    /// # Errors
    /// `Corrupt` and the like for what its header or its footer says; the host's.
    pub(super) fn hosted(storage: Arc<dyn Storage>, header: &Header) -> Result<Self> {
        let geometry = match header.is_at_end() {
            true => stream::footer(&*storage, header)?,
            false => header.geometry(storage.size())?,
        };
        let packed = header.is_stream().then(|| Packed::new(geometry.grain));
        let mut sparse = Self::new(storage, geometry, packed);
        sparse.unclean = AtomicBool::new(header.is_unclean());
        sparse.ends_with_footer = header.is_at_end();
        sparse.odd_flags = header.odd_flags();
        sparse.kept = header.descriptor();
        Ok(sparse)
    }

    /// A copy-on-write file of ESX.
    ///
    /// # Errors
    /// `Corrupt` and the like for what its header says; the host's.
    pub(super) fn cowd(storage: Arc<dyn Storage>) -> Result<Self> {
        let header = cowd::Header::read(&*storage)?;
        let geometry = header.geometry(storage.size())?;
        let mut sparse = Self::new(storage, geometry, None);
        sparse.free_field = Some(cowd::FREE);
        Ok(sparse)
    }

    fn new(storage: Arc<dyn Storage>, geometry: Geometry, packed: Option<Packed>) -> Self {
        Self {
            storage,
            unclean: AtomicBool::new(false),
            free_field: None,
            kept: None,
            ends_with_footer: false,
            odd_flags: 0,
            writer: None,
            tables: ArcSwap::from_pointee(Tables::new(geometry)),
            packed,
        }
    }

    /// Whether it is a hosted one, with a flag that says whether somebody writes.
    pub(super) fn is_hosted(&self) -> bool {
        self.free_field.is_none()
    }

    /// What a writer needs.
    ///
    /// # Errors
    /// `ReadOnly`.
    pub(super) fn writer(&self) -> Result<&Writer> {
        self.writer.as_ref().ok_or_else(Error::read_only)
    }

    /// What its header says.
    pub(super) fn geometry(&self) -> Geometry {
        self.tables.load().geometry
    }

    /// As [`crate::image::Image::map`]; past its end are zeroes.
    pub(super) fn map(&self, at: u64, len: u64, wait: Wait) -> Result<Run<'_>> {
        let tables = self.tables.load();
        let geometry = tables.geometry;
        if at >= geometry.capacity {
            let source = Source::Zero;
            return Ok(Run { len, source });
        }
        let (storage, grain) = (&*self.storage, geometry.grain);
        let end = geometry.capacity.min(at.saturating_add(len));
        let (index, last) = (at / grain, end.div_ceil(grain));
        let run = |last: u64, source| {
            let len = end.min(last.saturating_mul(grain)) - at;
            Ok(Run { len, source })
        };
        let entry = tables.entry(storage, index, wait)?;
        match entry {
            Entry::Below | Entry::Zero => {
                let last = tables.alike(storage, index, last, |_, next| next == entry);
                let source = match entry {
                    Entry::Zero => Source::Zero,
                    _ => Source::Below,
                };
                run(last, source)
            }
            Entry::At(_) if self.packed.is_some() => {
                let is_at = |next| matches!(next, Entry::At(_));
                let last = tables.alike(storage, index, last, |_, next| is_at(next));
                run(last, Source::Encoded)
            }
            Entry::At(host) => {
                let follows = |n: u64, next| next == Entry::At(host + n * grain);
                let last = tables.alike(storage, index, last, follows);
                let host = host + (at - index * grain);
                let found = run(last, self.stored(host))?;
                // The file may end within a grain; what it cuts off reads as zeroes.
                let there = storage.size().saturating_sub(host);
                Ok(match there {
                    0 => Run {
                        source: Source::Zero,
                        ..found
                    },
                    there => Run {
                        len: found.len.min(there),
                        ..found
                    },
                })
            }
        }
    }

    fn stored(&self, host: u64) -> Source<'_> {
        Source::Stored {
            storage: &*self.storage,
            host,
            // The first change is made by `allocate`, which sees to the header.
            writable: self
                .writer
                .as_ref()
                .is_some_and(|w| w.allocator.has_begun()),
        }
    }

    /// As [`crate::image::Image::read_encoded`].
    pub(super) fn read_encoded(&self, buf: &mut [u8], at: u64) -> Result<usize> {
        let Some(packed) = &self.packed else {
            return Err(Error::unsupported("the extent has no compressed data"));
        };
        let tables = self.tables.load();
        packed.read(&*self.storage, &tables, buf, at)
    }
}

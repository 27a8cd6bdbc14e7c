//! One sparse file: its grains, behind a directory of tables.

use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::error::{Error, Result};
use crate::formats::vmdk::header::Header;
use crate::formats::vmdk::stream::Packed;
use crate::formats::vmdk::tables::{Entry, Geometry, Tables};
use crate::formats::vmdk::{cowd, stream};
use crate::image::{Run, Source, Wait};
use crate::storage::Storage;

/// An open sparse file.
#[derive(Debug)]
pub(super) struct Sparse {
    pub(super) storage: Arc<dyn Storage>,
    /// The last writer did not close it.
    pub(super) unclean: bool,
    pub(super) tables: ArcSwap<Tables>,
    /// What grains are decoded with, where they are compressed.
    pub(super) packed: Option<Packed>,
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
        let unclean = header.is_unclean();
        Ok(Self::new(storage, geometry, packed, unclean))
    }

    /// A copy-on-write file of ESX.
    ///
    /// # Errors
    /// `Corrupt` and the like for what its header says; the host's.
    pub(super) fn cowd(storage: Arc<dyn Storage>) -> Result<Self> {
        let header = cowd::Header::read(&*storage)?;
        let geometry = header.geometry(storage.size())?;
        Ok(Self::new(storage, geometry, None, false))
    }

    fn new(
        storage: Arc<dyn Storage>,
        geometry: Geometry,
        packed: Option<Packed>,
        unclean: bool,
    ) -> Self {
        Self {
            storage,
            unclean,
            tables: ArcSwap::from_pointee(Tables::new(geometry)),
            packed,
        }
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
            writable: false,
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

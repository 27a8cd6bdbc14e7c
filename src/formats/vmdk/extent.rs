//! One extent of an open disk: a range of it, and where that is.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, ErrorKind, Result};
use crate::formats::vmdk::header;
use crate::formats::vmdk::line::{Access, ExtentLine, Kind};
use crate::formats::vmdk::sesparse::SeSparse;
use crate::formats::vmdk::session::Session;
use crate::formats::vmdk::sparse::Sparse;
use crate::image::{Run, Source, Wait};
use crate::storage::Storage;
use crate::util::text::printable;

/// One extent.
#[derive(Debug)]
pub(super) struct Extent {
    /// The first byte of the disk that it holds.
    pub(super) start: u64,
    /// Behind the last.
    pub(super) end: AtomicU64,
    pub(super) line: ExtentLine,
    pub(super) data: Data,
    /// The file, which is the one that holds the descriptor where that is inside.
    pub(super) storage: Option<Arc<dyn Storage>>,
    /// Of a disk that is written to.
    pub(super) session: Option<Arc<Session>>,
}

/// Where an extent's bytes are.
#[derive(Debug)]
pub(super) enum Data {
    /// In its file as they are, from this offset on.
    Flat(u64),
    Sparse(Box<Sparse>),
    SeSparse(Box<SeSparse>),
    /// Nowhere: they are zeroes.
    Zero,
    /// In a file that is not open.
    Missing(Option<Error>),
}

impl Data {
    /// What an extent of this kind has in `storage`.
    ///
    /// # Errors
    /// Those of the header of a sparse file; the host's.
    pub(super) fn open(line: &ExtentLine, storage: &Arc<dyn Storage>) -> Result<Self> {
        let storage = Arc::clone(storage);
        Ok(match line.kind {
            Kind::Zero => Self::Zero,
            Kind::Flat | Kind::Vmfs => {
                let start = crate::formats::vmdk::line::bytes(line.offset)?;
                let end = start.checked_add(line.len()?);
                end.ok_or_else(|| Error::corrupt("it ends behind 2^64"))?;
                Self::Flat(start)
            }
            Kind::Sparse => {
                let header = header::Header::read(&*storage, 0)?;
                if header.is_only_descriptor() {
                    return Err(Error::corrupt("it holds a descriptor and no data"));
                }
                Self::Sparse(Box::new(Sparse::hosted(storage, &header)?))
            }
            Kind::VmfsSparse => Self::Sparse(Box::new(Sparse::cowd(storage)?)),
            Kind::SeSparse => Self::SeSparse(Box::new(SeSparse::open(storage)?)),
        })
    }
}

impl Extent {
    /// Bytes of the disk that it holds.
    pub(super) fn guest(&self) -> Range<u64> {
        self.start..self.end()
    }

    /// Behind the last of them.
    pub(super) fn end(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }

    /// Its unit of allocation in bytes, where it has one.
    pub(super) fn grain(&self) -> Option<u64> {
        match &self.data {
            Data::Sparse(sparse) => Some(sparse.geometry().grain),
            Data::SeSparse(_) => Some(SeSparse::grain()),
            _ => None,
        }
    }

    /// Where the bytes from `at` of the disk are, which lies in it.
    ///
    /// # Errors
    /// As [`crate::image::Image::map`]; `NotFound` where its file is not open.
    pub(super) fn map(&self, at: u64, len: u64, wait: Wait) -> Result<Run<'_>> {
        let within = at - self.start;
        let len = len.min(self.end() - at);
        if self.line.access == Access::None {
            let source = Source::Zero;
            return Ok(Run { len, source });
        }
        let run = match &self.data {
            Data::Zero => Ok(Run {
                len,
                source: Source::Zero,
            }),
            Data::Flat(start) => Ok(self.flat(start + within, len)),
            Data::Sparse(sparse) => sparse.map(within, len, wait),
            Data::SeSparse(sparse) => sparse.map(within, len, wait),
            Data::Missing(why) => Err(self.missing(why.as_ref())),
        };
        run.map_err(|e| e.at_opt(self.path()))
    }

    /// A file that is shorter than its line says ends in zeroes.
    fn flat(&self, host: u64, len: u64) -> Run<'_> {
        let Some(storage) = &self.storage else {
            let source = Source::Zero;
            return Run { len, source };
        };
        match storage.size().saturating_sub(host) {
            0 => Run {
                len,
                source: Source::Zero,
            },
            there => Run::in_place(&**storage, host, len.min(there), self.is_open()),
        }
    }

    fn missing(&self, why: Option<&Error>) -> Error {
        let name = self.line.name.clone().unwrap_or_default();
        match why {
            Some(e) => Error::new(e.kind(), e.message()).at_opt(e.path()),
            None => Error::new(
                ErrorKind::NotFound,
                format!("the extent '{}' was not opened", printable(&name)),
            ),
        }
    }

    /// As [`crate::image::Image::read_encoded`].
    pub(super) fn read_encoded(&self, buf: &mut [u8], at: u64) -> Result<usize> {
        match &self.data {
            Data::Sparse(sparse) => sparse
                .read_encoded(buf, at - self.start)
                .map_err(|e| e.at_opt(self.path())),
            _ => Err(Error::unsupported("the extent has no compressed data")),
        }
    }

    /// The path of its file, for messages.
    pub(super) fn path(&self) -> Option<&std::path::Path> {
        self.storage.as_ref().and_then(|s| s.path())
    }
}

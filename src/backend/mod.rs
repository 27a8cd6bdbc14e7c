//! A disk as consumers use it: any thread, any request, checked and counted.
//!
//! Bounds and access are checked here once; the stages are plain functions in order.

use std::ops::Range;
use std::time::Instant;

use crate::chain::Chain;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Zeroing;
use crate::util::align::len64;

pub mod account;

pub use account::{Account, Kind, Totals};

/// One request; buffers belong to the caller.
#[derive(Debug)]
pub enum Request<'a> {
    /// Fill the buffer from `at`.
    Read {
        /// Guest offset in bytes.
        at: u64,
        /// What to fill.
        buf: &'a mut [u8],
    },
    /// Write the buffer at `at`.
    Write {
        /// Guest offset in bytes.
        at: u64,
        /// What to write.
        buf: &'a [u8],
        /// Durable before it completes.
        fua: bool,
    },
    /// Make a range read as zeroes.
    Zero {
        /// Guest range in bytes.
        range: Range<u64>,
        /// What may become of the space.
        how: Zeroing,
        /// What to do where that needs data to be written.
        fallback: Fallback,
        /// Durable before it completes.
        fua: bool,
    },
    /// Give a range's space back.
    Discard {
        /// Guest range in bytes.
        range: Range<u64>,
    },
    /// Make completed writes durable.
    Flush,
}

/// What to do where a range cannot be zeroed by metadata or holes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fallback {
    /// Write zeroes.
    Write,
    /// Fail with `Unsupported`, with nothing changed.
    Refuse,
}

/// What may be told to a client of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Size in bytes.
    pub virtual_size: u64,
    /// Whether writes are taken.
    pub writable: bool,
    /// Zeroing at multiples of this needs no data written; 0: never.
    pub zero_align: u32,
    /// Discards at multiples of this give space back; 0: never.
    pub discard_align: u32,
}

/// A disk as servers and `io` use it.
#[derive(Debug)]
pub struct Backend {
    chain: Chain,
    account: Account,
}

impl Backend {
    /// A backend in front of `chain`.
    pub fn new(chain: Chain) -> Self {
        Self {
            chain,
            account: Account::default(),
        }
    }

    /// The disk itself.
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// What has been counted so far.
    pub fn account(&self) -> &Account {
        &self.account
    }

    /// Virtual size and what may be offered to a client.
    pub fn geometry(&self) -> Geometry {
        let top = self.chain.top();
        let limits = top.limits();
        Geometry {
            virtual_size: self.chain.virtual_size(),
            writable: top.caps().write,
            zero_align: limits.zero_align,
            discard_align: limits.discard_align,
        }
    }

    /// Runs one request, blocking until it is done, and counts it.
    ///
    /// # Errors
    /// `OutOfRange` and `ReadOnly`, counted as invalid, with nothing done; those of the chain,
    /// counted as failed.
    pub fn submit(&self, request: Request<'_>) -> Result<()> {
        let (kind, range, change) = shape(&request);
        if let Err(e) = self.check(range.as_ref(), change) {
            self.account.invalid(kind);
            return Err(e);
        }
        let bytes = range.map_or(0, |r| r.end - r.start);
        let start = Instant::now();
        let result = self.run(request);
        self.account
            .done(kind, bytes, start.elapsed(), result.is_ok());
        result
    }

    fn check(&self, range: Option<&Range<u64>>, change: bool) -> Result<()> {
        let path = self.chain.top().storage().path();
        let size = self.chain.virtual_size();
        if let Some(range) = range
            && (range.start > range.end || range.end > size)
        {
            let text = format!(
                "the request for {:#x}..{:#x} reaches past the end of the disk at {size:#x}",
                range.start, range.end
            );
            return Err(Error::new(ErrorKind::OutOfRange, text).at_opt(path));
        }
        match change && !self.chain.top().caps().write {
            true => Err(Error::read_only().at_opt(path)),
            false => Ok(()),
        }
    }

    fn run(&self, request: Request<'_>) -> Result<()> {
        let chain = &self.chain;
        let fua = match request {
            Request::Read { at, buf } => return chain.read_at(buf, at),
            Request::Flush => return chain.flush(),
            Request::Discard { range } => return chain.discard(range),
            Request::Write { at, buf, fua } => {
                chain.write_at(buf, at)?;
                fua
            }
            Request::Zero {
                range,
                how,
                fallback,
                fua,
            } => {
                match fallback {
                    Fallback::Write => chain.zero(range, how)?,
                    Fallback::Refuse => chain.zero_fast(range, how)?,
                }
                fua
            }
        };
        if fua { chain.flush() } else { Ok(()) }
    }
}

/// Kind, range and whether it changes the disk.  A range past the end of numbers ends there.
fn shape(request: &Request<'_>) -> (Kind, Option<Range<u64>>, bool) {
    let span = |at: u64, len: usize| at..at.saturating_add(len64(len));
    match request {
        Request::Read { at, buf } => (Kind::Read, Some(span(*at, buf.len())), false),
        Request::Write { at, buf, .. } => (Kind::Write, Some(span(*at, buf.len())), true),
        Request::Zero { range, .. } => (Kind::Zero, Some(range.clone()), true),
        Request::Discard { range } => (Kind::Discard, Some(range.clone()), true),
        Request::Flush => (Kind::Flush, None, false),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::chain::Base;
    use crate::formats::raw;
    use crate::image::open::OpenOptions;
    use crate::storage::memory::MemoryStorage;
    use crate::storage::open::Access;

    fn backend(access: Access) -> Backend {
        let storage = Arc::new(MemoryStorage::from_bytes(&[5; 4096]));
        let options = OpenOptions {
            access,
            ..OpenOptions::default()
        };
        let image = (raw::DRIVER.open)(storage, &options).expect("raw opens");
        Backend::new(Chain::new(vec![image], Base::Zeroes, options.grace).expect("one layer"))
    }

    #[test]
    fn requests_past_the_end_are_refused_and_counted_as_invalid() {
        let backend = backend(Access::Write);
        for at in [4096, 4095, u64::MAX] {
            let mut buf = [0; 2];
            let error = backend
                .submit(Request::Read { at, buf: &mut buf })
                .expect_err("past the end");
            assert_eq!(error.kind(), ErrorKind::OutOfRange);
        }
        let totals = backend.account().totals(Kind::Read);
        assert_eq!(
            (totals.invalid, totals.operations, totals.failed),
            (3, 0, 0)
        );
    }

    #[test]
    fn a_read_only_disk_takes_no_change() {
        let backend = backend(Access::Read);
        let error = backend
            .submit(Request::Discard { range: 0..512 })
            .expect_err("read-only");
        assert_eq!(error.kind(), ErrorKind::ReadOnly);
    }

    #[test]
    fn operations_and_bytes_are_counted() {
        let backend = backend(Access::Write);
        backend
            .submit(Request::Write {
                at: 0,
                buf: &[1; 100],
                fua: true,
            })
            .expect("writes");
        backend.submit(Request::Flush).expect("flushes");
        assert_eq!(backend.account().totals(Kind::Write).bytes, 100);
        assert_eq!(backend.account().totals(Kind::Flush).operations, 1);
    }
}

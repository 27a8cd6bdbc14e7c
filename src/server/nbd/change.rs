//! Requests that change the disk, flush it, or read ahead.

use crate::backend::{Fallback, Request as Asked};
use crate::chain::Chain;
use crate::error::{Error, Result};
use crate::image::{Source, Wait};
use crate::nbd::wire::{Request, flag};
use crate::server::nbd::session::{Ended, Session};
use crate::storage::Zeroing;

impl Session {
    pub(super) fn write(&self, request: &Request, bytes: &[u8]) -> Result<(), Ended> {
        let fua = request.flags & flag::FUA != 0;
        self.answer(request, self.write_bytes(bytes, request.offset, fua))
    }

    pub(super) fn write_bytes(&self, bytes: &[u8], at: u64, fua: bool) -> Result<()> {
        let buf = bytes;
        self.submit(Asked::Write { at, buf, fua })
    }

    pub(super) fn flush(&self, request: &Request) -> Result<(), Ended> {
        self.answer(request, self.submit(Asked::Flush))
    }

    pub(super) fn trim(&self, request: &Request) -> Result<(), Ended> {
        let range = request.offset..request.offset + request.len;
        let mut done = self.submit(Asked::Discard { range });
        if done.is_ok() && request.flags & flag::FUA != 0 {
            done = self.submit(Asked::Flush);
        }
        self.answer(request, done)
    }

    pub(super) fn write_zeroes(&self, request: &Request) -> Result<(), Ended> {
        let how = match request.flags & flag::NO_HOLE {
            0 => Zeroing::MayUnmap,
            _ => Zeroing::KeepSpace,
        };
        let fallback = match request.flags & flag::FAST_ZERO {
            0 => Fallback::Write,
            _ => Fallback::Refuse,
        };
        let done = self.submit(Asked::Zero {
            range: request.offset..request.offset + request.len,
            how,
            fallback,
            fua: request.flags & flag::FUA != 0,
        });
        self.answer(request, done)
    }

    /// Has the host read ahead what is stored as it is.
    pub(super) fn cache(&self, request: &Request) -> Result<(), Ended> {
        let backend = &self.export.export.backend;
        let done = backend.look(self.queue, |chain| read_ahead(chain, request));
        self.answer(request, done)
    }

    pub(super) fn submit(&self, asked: Asked<'_>) -> Result<()> {
        let backend = &self.export.export.backend;
        self.shared.gate.submit(backend, self.queue, asked)
    }
}

/// Has the host read ahead what a range that a client asked for is stored in.
fn read_ahead(chain: &Chain, request: &Request) -> Result<()> {
    let _ticket = chain.enter();
    let (mut at, end) = (request.offset, request.offset + request.len);
    while at < end {
        let found = chain.resolve(at, end - at, Wait::Yes)?;
        if let Source::Stored { storage, host, .. } = found.source
            && let Some(fd) = storage.fd()
        {
            let len = std::num::NonZeroU64::new(found.len);
            let advice = rustix::fs::Advice::WillNeed;
            rustix::fs::fadvise(fd, host, len, advice)
                .map_err(|e| Error::io(format!("read ahead at {host:#x}"), e.into()))?;
        }
        at += found.len;
    }
    Ok(())
}

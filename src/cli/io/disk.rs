//! An open image, and how it was opened.

use std::ffi::OsString;
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::backend::{Backend, Durability, Fallback, QueueId, Request};
use crate::chain::HostFile;
use crate::chain::open as chain_open;
use crate::cli::cache::{CacheMode, DiscardMode};
use crate::cli::common::OpenArgs;
use crate::cli::io::args::Parsed;
use crate::cli::io::layout::pieces;
use crate::cli::{exit, interrupt};
use crate::error::{Error, ErrorKind};
use crate::image::Driver;
use crate::storage::Zeroing;
use crate::storage::open::{Access, Caching};
use crate::util::align::{clamp_len, len64};
use crate::util::buf::is_zero;
use crate::util::text::printable;

/// Most bytes of a read that are in memory at a time; longer ones are made of several requests.
pub(super) const STEP: u64 = 4 << 20;
/// Most bytes of a write that are in memory: each request that overwrites shared clusters costs a
/// sync.
pub(super) const WRITE_STEP: u64 = 16 << 20;
/// Most bytes of a request that writes one byte all over its range.
pub(super) const FILL_STEP: u64 = 64 << 20;

/// Where writes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Target {
    /// Into the image.
    #[default]
    Image,
    /// Into a temporary layer above it.
    Overlay,
}

/// How an image is, or is to be, opened.
#[derive(Debug, Clone)]
pub(super) struct Spec {
    /// Which file.
    pub(super) path: PathBuf,
    /// Its format; `None`: probed.
    pub(super) format: Option<&'static Driver>,
    /// Whether it takes writes.
    pub(super) access: Access,
    /// Where they go.
    pub(super) target: Target,
    /// Which caches are used.
    pub(super) cache: CacheMode,
    /// What becomes of discards.
    pub(super) discard: DiscardMode,
    /// Whether what is read from the layers below is written into the top layer.
    pub(super) copies: bool,
    /// Format options, as typed.
    pub(super) values: Vec<OsString>,
    /// How files are shared and found.
    pub(super) args: OpenArgs,
}

impl Spec {
    /// Opens the image.
    ///
    /// # Errors
    /// A usage error for options that contradict each other; those of the chain.
    pub(super) fn open(self) -> anyhow::Result<Disk> {
        if self.copies && self.access == Access::Read {
            return Err(exit::usage(
                "-C/--copy-on-read writes into the image, which is opened for reading only",
            ));
        }
        let access = match self.target {
            Target::Image => self.access,
            Target::Overlay => Access::Read,
        };
        let args = OpenArgs {
            open_options: self.values.clone(),
            ..self.args.clone()
        };
        let mut options = args.plan(self.format, access)?;
        if self.cache.direct() {
            options.storage.caching = Caching::Direct;
        }
        options.storage.flushing = self.cache.flushing();
        let chain = chain_open::open(&self.path, &options)?;
        let format = chain.top().driver();
        let chain = match (self.target, self.access) {
            (Target::Overlay, Access::Write) => chain.with_overlay()?,
            _ => chain,
        };
        // The format stays what it was found to be: what is written is never probed.
        let spec = Self {
            format: Some(format),
            ..self
        };
        let backend = Backend::new(chain);
        Ok(Disk { backend, spec })
    }
}

/// An open image.
#[derive(Debug)]
pub(super) struct Disk {
    /// The disk.
    pub(super) backend: Backend,
    /// How it was opened, with the format it was found to have.
    pub(super) spec: Spec,
}

impl Disk {
    /// All files that it is made of.
    pub(super) fn files(&self) -> Vec<HostFile> {
        self.backend.chain().files()
    }

    /// Runs one request, and says how long it took.
    ///
    /// # Errors
    /// Why it failed, as `PATH: VERB failed: why`.
    pub(super) fn submit(
        &self,
        verb: &'static str,
        request: Request<'_>,
    ) -> anyhow::Result<Duration> {
        let start = Instant::now();
        self.backend
            .submit(QueueId(0), request)
            .map_err(|e| failed(verb, e))?;
        Ok(start.elapsed())
    }

    /// Writes into the top layer what a read of `buf` at `at` found below it.
    ///
    /// # Errors
    /// As `submit`.
    pub(super) fn keep(&self, buf: &[u8], at: u64) -> anyhow::Result<()> {
        let end = at + len64(buf.len());
        let below: Vec<Range<u64>> = {
            let chain = self.backend.chain();
            let pieces = pieces("read", &chain, at..end);
            let below = pieces.filter(|p| !p.as_ref().is_ok_and(|p| p.allocated));
            below.map(|p| Ok(p?.range)).collect::<anyhow::Result<_>>()?
        };
        for range in below {
            let part = clamp_len(range.start - at, buf.len())..clamp_len(range.end - at, buf.len());
            let bytes = &buf[part];
            let request = match is_zero(bytes) {
                true => Request::Zero {
                    range,
                    how: Zeroing::MayUnmap,
                    fallback: Fallback::Write,
                    fua: false,
                },
                false => Request::Write {
                    at: range.start,
                    buf: bytes,
                    fua: false,
                },
            };
            self.submit("read", request)?;
        }
        Ok(())
    }

    /// The range of a command, if it lies inside the disk: a long command must not fail half done
    /// for what was known before.
    ///
    /// # Errors
    /// `OutOfRange`, as `submit`.
    pub(super) fn range(
        &self,
        verb: &'static str,
        at: u64,
        len: u64,
    ) -> anyhow::Result<Range<u64>> {
        let chain = self.backend.chain();
        let size = chain.virtual_size();
        let end = at.checked_add(len).filter(|end| *end <= size);
        end.map(|end| at..end).ok_or_else(|| {
            let text =
                format!("{len} bytes at {at:#x} reach past the end of the disk at {size:#x}");
            let error = Error::new(ErrorKind::OutOfRange, text);
            failed(verb, error.at_opt(chain.top().storage().path()))
        })
    }

    /// Refuses a compressed write of a range that is not made of whole clusters, before a part of
    /// it is written.
    ///
    /// # Errors
    /// `Invalid`, as `submit`.
    pub(super) fn check_whole(&self, verb: &'static str, range: &Range<u64>) -> anyhow::Result<()> {
        let chain = self.backend.chain();
        let done = chain.check_compressed(range);
        done.map_err(|e| failed(verb, e.at_opt(chain.top().storage().path())))
    }

    /// Whether a write must be durable when it completes, given that the command asked for it or
    /// not.
    pub(super) fn fua(&self, parsed: &Parsed) -> bool {
        parsed.has('f') || self.spec.cache.durability() == Durability::EveryWrite
    }

    /// Makes completed writes durable, unless the cache mode says that nothing has to be.
    ///
    /// # Errors
    /// As `submit`.
    pub(super) fn flush(&self) -> anyhow::Result<()> {
        if self.spec.cache != CacheMode::Unsafe {
            self.submit("flush", Request::Flush)?;
        }
        Ok(())
    }

    /// Leaves the file as a clean close leaves it, on stable media; does nothing for one that was
    /// opened for reading or whose writes are dropped.
    ///
    /// # Errors
    /// As `submit`; the image is no longer open then.
    pub(super) fn close(self) -> anyhow::Result<()> {
        if self.spec.access == Access::Read || self.spec.target == Target::Overlay {
            return Ok(());
        }
        let chain = self.backend.chain();
        let Err(error) = chain.close() else {
            return Ok(());
        };
        // What was written is to be durable all the same.
        drop(self.flush());
        Err(failed("close", error.at_opt(chain.top().storage().path())))
    }
}

/// The pieces of a range that are in memory at a time, `step` bytes each, in order.
///
/// # Errors
/// Each piece is `Cancelled` once SIGINT or SIGTERM came.
pub(super) fn steps(
    verb: &'static str,
    range: Range<u64>,
    step: u64,
) -> impl Iterator<Item = anyhow::Result<Range<u64>>> {
    let mut next = Some(range.start);
    std::iter::from_fn(move || {
        let start = next?;
        let end = range.end.min(start.saturating_add(step));
        next = (end < range.end).then_some(end);
        Some(uninterrupted(verb).map(|()| start..end))
    })
}

/// Fails once SIGINT or SIGTERM came.
///
/// # Errors
/// `Cancelled`.
pub(super) fn uninterrupted(verb: &'static str) -> anyhow::Result<()> {
    interrupt::check().map_err(|e| failed(verb, e))
}

/// A failed request.
#[derive(Debug)]
struct Failed {
    verb: &'static str,
    error: Error,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = self.error.path() {
            write!(f, "{}: ", printable(path))?;
        }
        write!(f, "{} failed: {}", self.verb, self.error.message())
    }
}

impl std::error::Error for Failed {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

/// The error of a request that failed.
pub(super) fn failed(verb: &'static str, error: Error) -> anyhow::Error {
    Failed { verb, error }.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_cover_a_range_once_and_an_empty_one_with_one_step() {
        let all = |range| -> Vec<(u64, u64)> {
            steps("read", range, STEP)
                .map(|s| s.expect("not interrupted"))
                .map(|s| (s.start, s.end))
                .collect()
        };
        assert_eq!(all(5..5), [(5, 5)]);
        assert_eq!(all(5..9), [(5, 9)]);
        assert_eq!(
            all(1..STEP * 2 + 2),
            [
                (1, STEP + 1),
                (STEP + 1, STEP * 2 + 1),
                (STEP * 2 + 1, STEP * 2 + 2)
            ]
        );
        assert_eq!(all(u64::MAX - 1..u64::MAX).len(), 1);
    }
}

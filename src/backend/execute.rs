//! Carrying out a request on a chain.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::backend::{DetectZeroes, Discard, Durability, Fallback, Request, Settings};
use crate::chain::Chain;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Zeroing;
use crate::util::align::{clamp_len, len64};
use crate::util::buf::is_zero;

/// Runs one request to its end.
///
/// Where an image was given up a sync of which had failed, `lost` says so until a flush has told of it:
/// what was written before must not pass for durable.
pub(super) fn run(
    chain: &Chain,
    request: &mut Request<'_>,
    settings: &Settings,
    lost: &AtomicBool,
) -> Result<()> {
    let step = clamp_len(u64::from(settings.max_transfer), usize::MAX);
    let fua = match request {
        Request::Read { at, buf } => {
            return pieces(*at, buf.chunks_mut(step), |at, buf| chain.read_at(buf, at));
        }
        Request::Flush => {
            flush(chain, settings)?;
            return match lost.swap(false, Ordering::SeqCst) {
                true => Err(was_lost(chain)),
                false => Ok(()),
            };
        }
        Request::Discard { range } => return discard(chain, range, settings),
        Request::Write { at, buf, fua } => {
            pieces(*at, buf.chunks(step), |at, buf| {
                write(chain, buf, at, settings)
            })?;
            *fua
        }
        Request::Fill { range, byte, fua } => {
            let mut at = range.start;
            while at < range.end {
                let end = range.end.min(at.saturating_add(len64(step)));
                fill(chain, at..end, *byte, settings)?;
                at = end;
            }
            *fua
        }
        Request::Compress { at, buf } => {
            chain.write_compressed(buf, *at)?;
            false
        }
        Request::Zero {
            range,
            how,
            fallback,
            fua,
        } => {
            let how = allowed(*how, settings);
            match fallback {
                Fallback::Write => chain.zero(range.clone(), how)?,
                Fallback::Refuse => chain.zero_fast(range.clone(), how)?,
            }
            *fua
        }
    };
    match fua || settings.durability == Durability::EveryWrite {
        true => flush(chain, settings),
        false => Ok(()),
    }
}

fn was_lost(chain: &Chain) -> Error {
    let text =
        "an earlier sync failed: what was written before the image was opened anew may be lost";
    Error::new(ErrorKind::Io, text).at_opt(chain.top().storage().path())
}

fn write(chain: &Chain, buf: &[u8], at: u64, settings: &Settings) -> Result<()> {
    match zeroing(settings).filter(|_| is_zero(buf)) {
        Some(how) => chain.zero(at..at + len64(buf.len()), how),
        None => chain.write_at(buf, at),
    }
}

fn fill(chain: &Chain, range: Range<u64>, byte: u8, settings: &Settings) -> Result<()> {
    match zeroing(settings).filter(|_| byte == 0) {
        Some(how) => chain.zero(range, how),
        None => chain.fill_with(byte, range),
    }
}

/// How zeroes that clients write are zeroed; `None`: they are written.
fn zeroing(settings: &Settings) -> Option<Zeroing> {
    match settings.detect_zeroes {
        DetectZeroes::Off => None,
        DetectZeroes::KeepSpace => Some(Zeroing::KeepSpace),
        DetectZeroes::MayUnmap => Some(allowed(Zeroing::MayUnmap, settings)),
    }
}

fn discard(chain: &Chain, range: &Range<u64>, settings: &Settings) -> Result<()> {
    match settings.discard {
        Discard::Unmap => chain.discard(range.clone()),
        Discard::Ignore => Ok(()),
    }
}

/// What zeroing may do with the space, where discards do nothing.
fn allowed(how: Zeroing, settings: &Settings) -> Zeroing {
    match settings.discard {
        Discard::Unmap => how,
        Discard::Ignore => Zeroing::KeepSpace,
    }
}

fn flush(chain: &Chain, settings: &Settings) -> Result<()> {
    match settings.durability {
        Durability::Never => Ok(()),
        Durability::OnFlush | Durability::EveryWrite => chain.flush(),
    }
}

/// Calls `f` for each piece of a buffer with its offset on the disk.
fn pieces<B: std::ops::Deref<Target = [u8]>>(
    at: u64,
    parts: impl Iterator<Item = B>,
    mut f: impl FnMut(u64, B) -> Result<()>,
) -> Result<()> {
    let mut at = at;
    for part in parts {
        let len = len64(part.len());
        f(at, part)?;
        at += len;
    }
    Ok(())
}

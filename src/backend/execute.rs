//! Carrying out a request on a chain.

use crate::backend::{Durability, Fallback, Request, Settings};
use crate::chain::Chain;
use crate::error::Result;
use crate::util::align::{clamp_len, len64};

/// Runs one request to its end.
pub(super) fn run(chain: &Chain, request: &mut Request<'_>, settings: &Settings) -> Result<()> {
    let step = clamp_len(u64::from(settings.max_transfer), usize::MAX);
    let fua = match request {
        Request::Read { at, buf } => {
            return pieces(*at, buf.chunks_mut(step), |at, buf| chain.read_at(buf, at));
        }
        Request::Flush => return flush(chain, settings),
        Request::Discard { range } => return chain.discard(range.clone()),
        Request::Write { at, buf, fua } => {
            pieces(*at, buf.chunks(step), |at, buf| chain.write_at(buf, at))?;
            *fua
        }
        Request::Zero {
            range,
            how,
            fallback,
            fua,
        } => {
            match fallback {
                Fallback::Write => chain.zero(range.clone(), *how)?,
                Fallback::Refuse => chain.zero_fast(range.clone(), *how)?,
            }
            *fua
        }
    };
    match fua || settings.durability == Durability::EveryWrite {
        true => flush(chain, settings),
        false => Ok(()),
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

//! Block status: what a client learns of the extents of a range.

use std::borrow::Cow;
use std::io::IoSlice;
use std::ops::Range;

use crate::chain::{Chain, State};
use crate::error::Result;
use crate::nbd::wire::{
    ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_BITMAP, Headers, Request, allocation, chunk, errno,
    flag,
};
use crate::server::nbd::bitmap;
use crate::server::nbd::output::{self, More};
use crate::server::nbd::server::Served;
use crate::server::nbd::session::{Ended, Session};

/// Most extents of one reply; a client asks again for the rest.
const MOST: usize = 16 << 10;
/// Most look-ups for one reply: neighbours of one kind are merged.
const LOOKS: usize = 64 << 10;

/// What is told of extents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Context {
    /// `base:allocation`.
    Allocation,
    /// `qemu:allocation-depth`.
    Depth,
    /// `qemu:dirty-bitmap:NAME`, by its place among those of the export.
    Bitmap(usize),
}

impl Context {
    /// Its number on the wire.
    pub(super) fn id(self) -> u32 {
        match self {
            Self::Allocation => 0,
            Self::Depth => 1,
            Self::Bitmap(index) => u32::try_from(index).unwrap_or(u32::MAX).saturating_add(2),
        }
    }

    /// Its name.
    pub(super) fn name(self, export: &Served) -> Cow<'static, str> {
        match self {
            Self::Allocation => BASE_ALLOCATION.into(),
            Self::Depth => ALLOCATION_DEPTH.into(),
            Self::Bitmap(index) => format!("{DIRTY_BITMAP}{}", export.bitmaps[index]).into(),
        }
    }

    fn extents(
        self,
        export: &Served,
        chain: &Chain,
        range: Range<u64>,
        most: usize,
    ) -> Result<Vec<(u64, u32)>> {
        match self {
            Self::Allocation => merged(chain, range, most, |state, _| match state {
                State::Data | State::Encoded => 0,
                State::Zero | State::Hole => allocation::HOLE | allocation::ZERO,
            }),
            Self::Depth => merged(chain, range, most, |_, depth| {
                match depth < chain.layers().len() {
                    true => u32::try_from(depth + 1).unwrap_or(u32::MAX),
                    false => 0,
                }
            }),
            Self::Bitmap(index) => {
                let runs = bitmap::runs(chain, &export.bitmaps[index], range, most)?;
                Ok(runs
                    .into_iter()
                    .map(|(len, dirty)| (len, dirty.into()))
                    .collect())
            }
        }
    }
}

/// The extents of a range, where those that `tell` says the same of are one.
fn merged(
    chain: &Chain,
    range: Range<u64>,
    most: usize,
    tell: impl Fn(State, usize) -> u32,
) -> Result<Vec<(u64, u32)>> {
    let mut extents: Vec<(u64, u32)> = Vec::new();
    let mut at = range.start;
    let mut looks = 0;
    while at < range.end && looks < LOOKS {
        let found = chain.extent(at, range.end - at)?;
        let flags = tell(found.state, found.depth);
        let is_full = extents.len() == most;
        match extents.last_mut() {
            Some((len, same)) if *same == flags => *len += found.len,
            _ if is_full => break,
            _ => extents.push((found.len, flags)),
        }
        at += found.len;
        looks += 1;
    }
    Ok(extents)
}

impl Session {
    /// Answers a request for block status.
    pub(super) fn block_status(&self, request: &Request) -> Result<(), Ended> {
        if self.contexts.is_empty() || request.len == 0 {
            let text = "no metadata context was chosen, or no bytes are asked for";
            return self.fail(request, errno::INVAL, text);
        }
        let backend = &self.export.export.backend;
        let most = match request.flags & flag::REQ_ONE {
            0 => MOST,
            _ => 1,
        };
        let range = request.offset..request.offset + request.len;
        let mut reply = Vec::new();
        for (index, context) in self.contexts.iter().enumerate() {
            let found = backend.look(self.queue, |chain| {
                context.extents(&self.export, chain, range.clone(), most)
            });
            let extents = match found {
                Ok(extents) => extents,
                Err(e) => return self.answer(request, Err(e)),
            };
            let more = match index + 1 == self.contexts.len() {
                true => More::Done,
                false => More::Follows,
            };
            self.put_extents(&mut reply, request, *context, &extents, more);
        }
        self.send(&mut [IoSlice::new(&reply)])
    }

    fn put_extents(
        &self,
        reply: &mut Vec<u8>,
        request: &Request,
        context: Context,
        extents: &[(u64, u32)],
        more: More,
    ) {
        let extended = self.headers == Headers::Extended;
        let mut payload = context.id().to_be_bytes().to_vec();
        if extended {
            payload.extend(u32::try_from(extents.len()).unwrap_or(0).to_be_bytes());
        }
        for (len, flags) in extents {
            match extended {
                true => {
                    payload.extend(len.to_be_bytes());
                    payload.extend(u64::from(*flags).to_be_bytes());
                }
                false => {
                    // The request had no more than fits.
                    payload.extend(u32::try_from(*len).unwrap_or(u32::MAX).to_be_bytes());
                    payload.extend(flags.to_be_bytes());
                }
            }
        }
        let kind = match extended {
            true => chunk::STATUS_EXTENDED,
            false => chunk::STATUS,
        };
        let header = output::piece(self.headers, request, kind, more, payload.len());
        reply.extend(header.bytes());
        reply.extend(payload);
    }
}

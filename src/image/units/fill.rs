//! Filling new space: what the request brings, and what was there where it brings nothing.

use std::ops::Range;

use crate::error::Result;
use crate::image::open::WriteOrder;
use crate::image::units::plan::{Goal, Move};
use crate::image::units::{Content, Space, Units};
use crate::image::{Fill, Old, Slot};
use crate::util::align::clamp_len;
use crate::util::range::{self, intersect};

/// Bytes filled at a time where entries wait, unless a unit is longer.
const PIECE: u64 = 2 << 20;
/// Bytes of old content in memory.
const COPY: u64 = 1 << 20;

/// Where the bytes of a piece are that the request does not bring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    /// Not wanted: the request brings all.
    Replaced,
    /// In the layer below.
    Below,
    /// Nowhere: zeroes.
    Zero,
    /// At this offset of the data.
    Host(u64),
    /// In the compressed unit that this move is of.
    Encoded(usize),
}

/// A part of a run that is filled at once.
#[derive(Debug)]
struct Piece {
    guest: Range<u64>,
    host: u64,
    held: Held,
    /// The space reads as zeroes.
    zeroed: bool,
    /// The request is not done without it.
    required: bool,
}

impl Piece {
    /// Takes what follows in the disk and in the file, and comes from there too.
    fn join(&mut self, next: &Self, most: u64) -> bool {
        let len = range::len(&self.guest);
        let (alike, most) = match (self.held, next.held) {
            (Held::Host(host), Held::Host(next)) => (host + len == next, COPY),
            (Held::Encoded(_), _) => (false, 0),
            (held, next) => (held == next, most),
        };
        let joins = alike
            && self.guest.end == next.guest.start
            && self.host + len == next.host
            && (self.zeroed, self.required) == (next.zeroed, next.required)
            && len + range::len(&next.guest) <= most;
        if joins {
            self.guest.end = next.guest.end;
        }
        joins
    }
}

impl<U: Units> Goal<'_, U> {
    /// Has all moves filled, those that were asked for first; false where what nobody asked for could
    /// not be copied.
    pub(super) fn fill(&self, moves: &[Move], fill: &mut Fill<'_>) -> Result<bool> {
        let mut pieces: Vec<Piece> = Vec::new();
        let most = if self.waits { PIECE } else { u64::MAX };
        for (number, unit) in moves.iter().enumerate() {
            for piece in self.pieces(number, unit)? {
                if !pieces.last_mut().is_some_and(|p| p.join(&piece, most)) {
                    pieces.push(piece);
                }
            }
        }
        pieces.sort_by_key(|piece| !piece.required);
        let mut left = pieces.len();
        for piece in &pieces {
            left -= 1;
            match self.fill_piece(piece, moves, left, fill) {
                Err(_) if !piece.required => return Ok(false),
                done => done?,
            }
        }
        Ok(true)
    }

    /// What of a unit is filled, with what each part holds.
    fn pieces(&self, number: usize, unit: &Move) -> Result<Vec<Piece>> {
        let size = self.units.unit_len();
        let start = unit.index * size;
        let parts = match unit.unit.whole {
            Some(content) => vec![(content, 0..size)],
            None if unit.unit.is_own() => self.units.parts(unit.index, &unit.unit, &unit.filled)?,
            None => self.units.parts(unit.index, &unit.unit, &(0..size))?,
        };
        let mut pieces = Vec::new();
        for (content, part) in parts {
            let stored = content == Content::Stored;
            let part = match stored && !unit.unit.is_own() {
                true => part,
                false => intersect(&part, &unit.filled).unwrap_or(0..0),
            };
            // All of it, or what was asked for apart from what was not.
            let apart = !stored && !self.units.stores_whole();
            let cuts = match apart {
                true => [part.start, unit.asked.start, unit.asked.end, part.end],
                false => [part.start, part.end, part.end, part.end],
            };
            for cut in cuts.windows(2) {
                let piece = cut[0].max(part.start)..cut[1].min(part.end);
                let guest = start + piece.start..(start + piece.end).min(self.units.disk_end());
                if piece.is_empty() || guest.is_empty() {
                    continue;
                }
                let asked = intersect(&piece, &unit.asked).is_some();
                pieces.push(Piece {
                    held: self.held(number, unit, content, &guest),
                    guest,
                    host: unit.host + piece.start,
                    zeroed: unit.taken.is_some_and(|taken| taken.zeroed),
                    required: asked || !apart && !unit.asked.is_empty(),
                });
            }
        }
        Ok(pieces)
    }

    fn held(&self, number: usize, unit: &Move, content: Content, guest: &Range<u64>) -> Held {
        let within = guest.start - unit.index * self.units.unit_len();
        match (content, unit.unit.space) {
            _ if self.request.start <= guest.start && guest.end <= self.request.end => {
                Held::Replaced
            }
            (Content::Below, _) if self.units.has_backing() => Held::Below,
            (Content::Stored, Space::Own(host) | Space::Shared(host)) => Held::Host(host + within),
            (Content::Stored, Space::Encoded { .. }) => Held::Encoded(number),
            (Content::Below | Content::Zero | Content::Stored, _) => Held::Zero,
        }
    }

    /// Fills a piece, after which `left` more follow.
    fn fill_piece(
        &self,
        piece: &Piece,
        moves: &[Move],
        left: usize,
        fill: &mut Fill<'_>,
    ) -> Result<()> {
        let data = self.units.data()?;
        let len = range::len(&piece.guest);
        let mut slot = Slot {
            guest: piece.guest.clone(),
            storage: data,
            host: piece.host,
            old: Old::Zero,
            zeroed: piece.zeroed,
        };
        match piece.held {
            Held::Zero => fill(slot)?,
            Held::Below => fill(Slot {
                old: Old::Below,
                ..slot
            })?,
            Held::Replaced => fill(Slot {
                old: Old::Replaced,
                ..slot
            })?,
            Held::Host(host) if len > COPY => copied(&slot, host, fill)?,
            Held::Host(host) => {
                let mut bytes = vec![0; clamp_len(len, usize::MAX)];
                data.read_at(&mut bytes, host)?;
                slot.old = Old::Bytes(&bytes);
                fill(slot)?;
            }
            Held::Encoded(number) => {
                let unit = &moves[number];
                let bytes = self.units.decoded(unit.index, &unit.unit)?;
                slot.old = Old::Bytes(&bytes[..clamp_len(len, bytes.len())]);
                fill(slot)?;
            }
        }
        // The sync that follows has less to wait for.
        let order = self.units.allocator()?.order.policy();
        if self.waits && left > 0 && len >= COPY && order == WriteOrder::Ordered {
            data.write_back(piece.host..piece.host + len);
        }
        Ok(())
    }
}

/// Fills a slot with what is stored from `host` on, little by little; holes are not read.
fn copied(slot: &Slot<'_>, host: u64, fill: &mut Fill<'_>) -> Result<()> {
    let mut bytes = Vec::new();
    let mut at = slot.guest.start;
    while at < slot.guest.end {
        let done = at - slot.guest.start;
        let run = slot
            .storage
            .run(host + done, (slot.guest.end - at).min(COPY))?;
        let old = match run.data {
            true => {
                bytes.resize(clamp_len(run.len, usize::MAX), 0);
                slot.storage.read_at(&mut bytes, host + done)?;
                Old::Bytes(&bytes)
            }
            false => Old::Zero,
        };
        fill(Slot {
            guest: at..at + run.len,
            storage: slot.storage,
            host: slot.host + done,
            old,
            zeroed: slot.zeroed,
        })?;
        at += run.len;
    }
    Ok(())
}

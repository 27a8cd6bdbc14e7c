//! The walk over a list of segments.

use std::ops::Range;

use super::{Layout, Parts, Segment, Segments, Unit};
use crate::util::align::{clamp_len, len64};

/// A run of bytes of one part of one sector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// The sector.
    pub lba: u64,
    /// The part: one, never several.
    pub part: Parts,
    /// Where in the whole sector.
    pub range: Range<usize>,
    /// Whether that is all that is stored of the part.
    pub is_whole: bool,
}

/// What one segment means of one sector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pieces {
    lba: u64,
    parts: Parts,
    /// Which bytes of the whole sector may be meant.
    window: Range<usize>,
}

impl Segments {
    /// What is meant, sector by sector, in the order of the list; `whole` is the length of a whole
    /// sector, not 0.
    pub fn sectors(&self, whole: usize) -> impl Iterator<Item = Pieces> + use<> {
        let segments = self.clone();
        let whole = len64(whole.max(1));
        (0..segments.count()).flat_map(move |index| {
            let unit = segments.unit();
            let segment = segments.get(index).unwrap_or(Segment {
                start: 0,
                len: 0,
                parts: Parts::NONE,
            });
            let end = segment.start + segment.len;
            let lbas = match (unit, segment.len) {
                (_, 0) => 0..0,
                (Unit::Blocks, _) => segment.start..end,
                (Unit::Bytes, _) => segment.start / whole..end.div_ceil(whole),
            };
            lbas.map(move |lba| Pieces {
                lba,
                parts: segment.parts,
                window: match unit {
                    Unit::Blocks => 0..usize::MAX,
                    Unit::Bytes => {
                        let first = segment.start.saturating_sub(lba * whole);
                        clamp_len(first, usize::MAX)..clamp_len(end - lba * whole, usize::MAX)
                    }
                },
            })
        })
    }
}

impl Pieces {
    /// The sector.
    pub fn lba(&self) -> u64 {
        self.lba
    }

    /// The parts that are meant, whether the sector has them or not.
    pub fn parts(&self) -> Parts {
        self.parts
    }

    /// The pieces of a sector with this layout, in order.
    pub fn of<'l>(&self, layout: &'l Layout) -> impl Iterator<Item = Piece> + use<'l> {
        let Self { lba, parts, window } = self.clone();
        layout.spans().iter().filter_map(move |span| {
            let range = span.start.max(window.start)..span.end.min(window.end);
            let is_meant = parts.has(span.part) && range.start < range.end;
            is_meant.then(|| Piece {
                lba,
                part: span.part,
                is_whole: range == (span.start..span.end),
                range,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: usize = 10;

    fn layout(lba: u64) -> Layout {
        let stored = if lba.is_multiple_of(2) { 0..10 } else { 2..8 };
        let parts = [
            (Parts::SYNC, 0..3),
            (Parts::DATA, 3..7),
            (Parts::EDC, 7..10),
        ];
        Layout::new(parts, &stored)
    }

    /// All bytes that are meant, as (sector, byte).
    fn walked(segments: &Segments) -> Vec<(u64, usize)> {
        let mut all = Vec::new();
        for sector in segments.sectors(WHOLE) {
            let layout = layout(sector.lba());
            for piece in sector.of(&layout) {
                all.extend(piece.range.map(|byte| (piece.lba, byte)));
            }
        }
        all
    }

    /// The same from the definition: every byte of the disc in order is looked at by itself.
    fn defined(segments: &Segments) -> Vec<(u64, usize)> {
        let mut all = Vec::new();
        for index in 0..segments.count() {
            let segment = segments.get(index).expect("is there");
            let range = segment.start..segment.start + segment.len;
            for at in 0..40 * WHOLE {
                let (lba, byte) = (len64(at / WHOLE), at % WHOLE);
                let is_addressed = match segments.unit() {
                    Unit::Blocks => range.contains(&lba),
                    Unit::Bytes => range.contains(&len64(at)),
                };
                let layout = layout(lba);
                let span = layout
                    .spans()
                    .iter()
                    .find(|s| (s.start..s.end).contains(&byte));
                if is_addressed && span.is_some_and(|s| segment.parts.has(s.part)) {
                    all.push((lba, byte));
                }
            }
        }
        all
    }

    #[test]
    fn the_walk_yields_the_bytes_that_a_look_at_every_byte_yields() {
        let mut rng = fastrand::Rng::with_seed(16);
        let sets = [
            Parts::ALL,
            Parts::DATA,
            Parts::SYNC.union(Parts::EDC),
            Parts::ECC,
        ];
        for _ in 0..2000 {
            let unit = if rng.bool() {
                Unit::Blocks
            } else {
                Unit::Bytes
            };
            let most = if unit == Unit::Blocks { 20 } else { 200 };
            let list: Vec<Segment> = (0..rng.usize(0..5))
                .map(|_| Segment {
                    start: rng.u64(0..most),
                    len: rng.u64(0..most),
                    parts: sets[rng.usize(0..sets.len())],
                })
                .collect();
            let segments = Segments::new(unit, list).expect("is right");
            assert_eq!(walked(&segments), defined(&segments), "{segments:?}");
        }
    }

    #[test]
    fn a_clone_is_the_same_list_and_walks_do_not_disturb_each_other() {
        let segment = |start, len| Segment {
            start,
            len,
            parts: Parts::ALL,
        };
        let segments = Segments::new(Unit::Blocks, [segment(3, 2), segment(1, 1)]).expect("right");
        let (mut one, mut other) = (segments.sectors(WHOLE), segments.clone().sectors(WHOLE));
        assert_eq!(one.next(), other.next());
        one.next();
        assert_eq!(other.next().map(|p| p.lba()), Some(4));
        assert_eq!(one.next().map(|p| p.lba()), Some(1));
        assert!(one.next().is_none());
    }

    #[test]
    fn lists_that_end_nowhere_or_mean_nothing_are_refused() {
        let new = |start, len, parts| Segments::new(Unit::Bytes, [Segment { start, len, parts }]);
        new(u64::MAX, 1, Parts::ALL).expect_err("ends past 2^64");
        new(1 << 62, 1 << 62, Parts::ALL).expect_err("ends past 2^63 - 1");
        new(0, 1, Parts::NONE).expect_err("means nothing");
        let many = vec![
            Segment {
                start: 0,
                len: 1,
                parts: Parts::ALL
            };
            Segments::MAX + 1
        ];
        Segments::new(Unit::Blocks, many).expect_err("too many");
    }
}

//! How many things point at each cluster of the file, counted from the metadata.
//!
//! Two bytes for a cluster, in pieces that exist only where something points: an image of 1 TiB
//! in clusters of 64 KiB takes 32 MiB.

use std::cell::Cell;
use std::collections::HashMap;

use crate::error::{Error, ErrorKind, Result};
use crate::util::align::clamp_len;

/// Clusters in one piece.
const PIECE: usize = 4096;
/// Most pieces: 1 GiB of counts, which is 32 TiB in clusters of 64 KiB.
const MAX_PIECES: usize = 1 << 17;
/// Pieces that any image may have: 64 MiB of counts.
const FREE_PIECES: usize = 1 << 13;
/// References for each piece beyond those: images that are real fill the pieces they touch.
const PER_PIECE: u64 = 64;
/// Set in a count: what points there takes it for a table.
const TABLE: u16 = 1 << 15;
/// From this count on the true one is kept aside.
const LARGE: u16 = TABLE - 1;

/// What a cluster is taken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Guest data.
    Data,
    /// Metadata.
    Table,
}

/// Whether a cluster was already taken for something of the other kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Met {
    /// It was not.
    Nothing,
    /// It was.
    OtherKind,
}

/// Counts by cluster.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pieces: Vec<Box<[u16; PIECE]>>,
    index: HashMap<u64, usize>,
    /// Number and place of the piece used last.
    last: Cell<Option<(u64, usize)>>,
    large: HashMap<u64, u64>,
    /// Calls of `add`.
    added: u64,
}

impl Counts {
    /// Counts `times` more references to a cluster, at least one.
    ///
    /// # Errors
    /// `OutOfRange` where the counts would take too much memory.
    pub(super) fn add(&mut self, cluster: u64, times: u64, kind: Kind) -> Result<Met> {
        self.added += 1;
        let (number, within) = split(cluster);
        let piece = match self.piece(number) {
            Some(piece) => piece,
            None => self.new_piece(number)?,
        };
        let word = &mut self.pieces[piece][within];
        let (old, was_table) = (*word & !TABLE, *word & TABLE != 0);
        let flag = if was_table || kind == Kind::Table {
            TABLE
        } else {
            0
        };
        let exact = match old {
            LARGE => self.large.get(&cluster).copied().unwrap_or(0),
            small => u64::from(small),
        };
        let new = exact.saturating_add(times);
        match u16::try_from(new) {
            Ok(small) if small < LARGE => *word = small | flag,
            _ => {
                *word = LARGE | flag;
                self.large.insert(cluster, new);
            }
        }
        let other = old != 0 && was_table != (kind == Kind::Table);
        Ok(if other { Met::OtherKind } else { Met::Nothing })
    }

    /// How many things point at a cluster.
    pub(super) fn get(&self, cluster: u64) -> u64 {
        let (number, within) = split(cluster);
        let Some(piece) = self.piece(number) else {
            return 0;
        };
        match self.pieces[piece][within] & !TABLE {
            LARGE => self.large.get(&cluster).copied().unwrap_or(0),
            small => u64::from(small),
        }
    }

    /// Counts one reference less to a cluster that has some.
    pub(super) fn drop_one(&mut self, cluster: u64) {
        let (number, within) = split(cluster);
        let Some(piece) = self.piece(number) else {
            return;
        };
        let word = &mut self.pieces[piece][within];
        match *word & !TABLE {
            0 => {}
            LARGE => {
                let count = self.large.entry(cluster).or_insert(1);
                *count = count.saturating_sub(1);
            }
            _ => *word -= 1,
        }
    }

    /// Whether something takes a cluster for a table.
    pub(super) fn is_table(&self, cluster: u64) -> bool {
        let (number, within) = split(cluster);
        let piece = self.piece(number);
        piece.is_some_and(|piece| self.pieces[piece][within] & TABLE != 0)
    }

    /// Numbers of the blocks of `1 << bits` clusters that may have counts other than 0, ascending.
    pub(super) fn blocks(&self, bits: u32) -> Vec<u64> {
        let piece = PIECE as u64;
        let mut blocks: Vec<u64> = self
            .index
            .keys()
            .flat_map(|number| (number * piece) >> bits..=((number + 1) * piece - 1) >> bits)
            .collect();
        blocks.sort_unstable();
        blocks.dedup();
        blocks
    }

    /// Whether all of the clusters in a range have no piece, and so count 0.
    pub(super) fn is_empty(&self, clusters: std::ops::Range<u64>) -> bool {
        let (first, last) = (
            clusters.start / PIECE as u64,
            clusters.end.saturating_sub(1) / PIECE as u64,
        );
        (first..=last).all(|number| !self.index.contains_key(&number))
    }

    fn piece(&self, number: u64) -> Option<usize> {
        if let Some((last, piece)) = self.last.get()
            && last == number
        {
            return Some(piece);
        }
        let piece = self.index.get(&number).copied()?;
        self.last.set(Some((number, piece)));
        Some(piece)
    }

    fn new_piece(&mut self, number: u64) -> Result<usize> {
        let earned = FREE_PIECES + clamp_len(self.added / PER_PIECE, MAX_PIECES);
        let most = earned.min(MAX_PIECES);
        if self.pieces.len() >= most {
            let text = format!(
                "the image's metadata points at too many places to be counted (allowed: {most} pieces of {PIECE} clusters)"
            );
            return Err(Error::new(ErrorKind::OutOfRange, text));
        }
        let piece = self.pieces.len();
        self.pieces.push(Box::new([0; PIECE]));
        self.index.insert(number, piece);
        self.last.set(Some((number, piece)));
        Ok(piece)
    }
}

fn split(cluster: u64) -> (u64, usize) {
    let piece = PIECE as u64;
    (cluster / piece, clamp_len(cluster % piece, PIECE - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_add_up_past_what_two_bytes_hold() {
        let mut counts = Counts::default();
        for cluster in [0, 4095, 4096, 1 << 26] {
            for _ in 0..3 {
                counts.add(cluster, 20_000, Kind::Data).expect("room");
            }
            assert_eq!(counts.get(cluster), 60_000, "{cluster}");
            assert_eq!(counts.get(cluster + 1), 0, "{cluster}");
        }
        assert_eq!(counts.blocks(12), [0, 1, 1 << 14]);
        assert_eq!(counts.blocks(20), [0, 1 << 6]);
        assert!(counts.is_empty(8192..1 << 26));
        assert!(!counts.is_empty(8192..(1 << 26) + 1));
    }

    #[test]
    fn a_table_that_is_also_data_is_met() {
        let mut counts = Counts::default();
        let mut add = |kind| counts.add(7, 1, kind).expect("room");
        assert_eq!(add(Kind::Table), Met::Nothing);
        assert_eq!(add(Kind::Table), Met::Nothing);
        assert_eq!(add(Kind::Data), Met::OtherKind);
        assert_eq!(counts.get(7), 3);
    }
}

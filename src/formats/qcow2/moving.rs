//! Moving clusters that hold something into space of their own before they change: those that
//! snapshots share, compressed ones, those that the layer below has.
//!
//! A run of them moves at once, with one sync: new clusters are counted, get what the request brings
//! and, where it brings nothing, what they held; when all of that is on stable media, their entries
//! appear, those of each second-level table in one piece.  At any moment each byte is the old one or
//! the new one, whatever a power cut leaves: the entries lead to where all is that the guest saw, or
//! to where it was, and the old clusters are given back only after the new entries are on stable
//! media.
//!
//! Writers that go on where they were have the clusters moved that come next, by the same sync;
//! those hold what they held, and change in place from then on.

use std::ops::Range;

use super::Qcow2;
use super::allocate::{Unit, mask};
use super::entry::{COPIED, Cluster, Packed, SUBCLUSTERS, Subcluster};
use super::writer::{Table, Unnamed};
use crate::error::Result;
use crate::image::open::WriteOrder;
use crate::image::{Fill, Old, Slot};
use crate::util::align::{clamp_len, down, len64};
use crate::util::range::{self, intersect};

/// Bytes filled at a time, unless a cluster is longer.
const PIECE: u64 = 2 << 20;
/// Bytes of old content in memory, unless a cluster is longer.
const COPY: u64 = 1 << 20;
/// Runs of new clusters that a run may move to.
const MAX_RUNS: usize = 64;

/// A cluster that moves.
#[derive(Debug)]
struct Move<'a> {
    /// Its guest offset.
    start: u64,
    /// What it holds.
    unit: Unit,
    /// Where it goes.
    host: u64,
    /// That space reads as zeroes.
    zeroed: bool,
    /// That space, until its entry appears.
    taken: Unnamed<'a>,
}

/// Where the bytes of a piece are that the request does not bring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    /// Not wanted: the request brings all.
    Replaced,
    /// In the layer below.
    Below,
    /// Nowhere: zeroes.
    Zero,
    /// At this offset of the data file.
    Host(u64),
    /// In the compressed cluster at this guest offset, whose bytes are there.
    Packed(Packed, u64),
}

/// A part of a run that is filled at once.
#[derive(Debug)]
struct Piece {
    guest: Range<u64>,
    host: u64,
    held: Held,
    zeroed: bool,
    /// The request touches its cluster.
    asked: bool,
}

impl Piece {
    /// Takes what follows in the disk and in the file, and comes from there too.
    fn join(&mut self, next: &Self) -> bool {
        let len = range::len(&self.guest);
        let (held, most) = match (self.held, next.held) {
            (Held::Host(host), Held::Host(next)) => (host + len == next, COPY),
            (Held::Packed(..), _) => (false, 0),
            (held, next) => (held == next, PIECE),
        };
        let joins = held
            && self.guest.end == next.guest.start
            && self.host + len == next.host
            && (self.zeroed, self.asked) == (next.zeroed, next.asked)
            && len + range::len(&next.guest) <= most;
        if joins {
            self.guest.end = next.guest.end;
        }
        joins
    }
}

impl Qcow2 {
    /// Whether a cluster has to move before it changes, and holds more than zeroes.
    pub(super) fn moves(&self, unit: Unit) -> bool {
        match unit.cluster {
            Cluster::Standard { copied, zero, .. } => !copied && !zero,
            Cluster::Compressed(_) => true,
            Cluster::Unallocated => {
                self.header.backing_name.is_some() && !unit.is_zero(self.layout.extended)
            }
            Cluster::Zero => false,
        }
    }

    /// Moves the clusters of a request and those `around` it, as far as they have to move and lie
    /// side by side; how much of the request that was.  All of `around` is reserved.
    pub(super) fn move_run(
        &self,
        request: &Range<u64>,
        around: &Range<u64>,
        fill: &mut Fill<'_>,
    ) -> Result<u64> {
        let since = self.moment()?;
        let mut moves = self.find_moves(request, around)?;
        let tables = self.tables_to_change(request.start, &mut moves)?;
        self.give_space(request, &mut moves)?;
        let words = self.fill_moves(request, &mut moves, fill)?;
        let (shown, hidden): (Vec<_>, Vec<_>) = tables.into_iter().partition(|(_, t)| t.shows());
        // Nobody sees these tables before their own entries appear.
        for (part, table) in &hidden {
            self.publish_moves(part, table, &moves, &words)?;
        }
        self.settle_since(since)?;
        // From here on the file may name the clusters, whatever the answer: they stay counted.
        for cluster in &mut moves {
            cluster.taken.name();
        }
        for (part, table) in &shown {
            self.publish_moves(part, table, &moves, &words)?;
        }
        let mut hidden = hidden.into_iter();
        hidden.try_for_each(|(_, table)| self.show(table))?;
        let moved = moves.iter().map(|m| self.free_cluster(m.unit.cluster));
        moved.collect::<Result<()>>()?;
        let (Some(first), Some(last)) = (moves.first(), moves.last()) else {
            return Ok(0);
        };
        let end = last.start + self.layout.cluster_size();
        self.writer()?.followed.worked_on(first.start..end);
        Ok(request.end.min(end) - request.start)
    }

    /// The second-level tables of a run, each with the part of the disk that it covers: that of
    /// guest offset `at`, and those before and after it.  Where one cannot be had now, the run ends
    /// there.
    fn tables_to_change(
        &self,
        at: u64,
        moves: &mut Vec<Move<'_>>,
    ) -> Result<Vec<(Range<u64>, Table<'_>)>> {
        let bits = self.layout.cluster_bits + self.header.l2_bits();
        let part = |index: u64| index << bits..(index + 1) << bits;
        let asked = at >> bits;
        let mut run = part(asked);
        let mut tables = vec![(run.clone(), self.table_to_change(asked)?)];
        let index = |m: Option<&Move<'_>>| m.map_or(asked, |m| m.start >> bits);
        let (first, last) = (index(moves.first()), index(moves.last()));
        for index in asked + 1..=last {
            let Ok(Some(table)) = self.another_to_change(index) else {
                break;
            };
            tables.push((part(index), table));
            run.end = part(index).end;
        }
        for index in (first..asked).rev() {
            let Ok(Some(table)) = self.another_to_change(index) else {
                break;
            };
            tables.push((part(index), table));
            run.start = part(index).start;
        }
        moves.retain(|m| run.contains(&m.start));
        Ok(tables)
    }

    /// Publishes those of the entries that are in a table, which covers `part` of the disk.
    fn publish_moves(
        &self,
        part: &Range<u64>,
        table: &Table<'_>,
        moves: &[Move<'_>],
        words: &[u64],
    ) -> Result<()> {
        let first = moves.partition_point(|m| m.start < part.start);
        let end = moves.partition_point(|m| m.start < part.end);
        let Some(start) = moves[first..end].first().map(|m| m.start) else {
            return Ok(());
        };
        let len = words.len() / moves.len();
        self.publish(table.host(), start, &words[first * len..end * len])
    }

    /// The clusters that are to move: that of the start of the request, and those before and after
    /// it without a gap.
    fn find_moves(&self, request: &Range<u64>, around: &Range<u64>) -> Result<Vec<Move<'_>>> {
        let size = self.layout.cluster_size();
        let first = down(request.start, size);
        let at = |start: u64| -> Result<Move<'_>> {
            Ok(Move {
                start,
                unit: self.unit(start)?,
                host: 0,
                zeroed: false,
                taken: self.unnamed([]),
            })
        };
        let mut moves = Vec::new();
        let mut start = first;
        while start >= around.start + size {
            start -= size;
            let before = at(start)?;
            if !self.moves(before.unit) {
                break;
            }
            moves.push(before);
        }
        moves.reverse();
        moves.push(at(first)?);
        let mut start = first + size;
        while start < around.end {
            let next = at(start)?;
            if !self.moves(next.unit) {
                break;
            }
            moves.push(next);
            start += size;
        }
        Ok(moves)
    }

    /// Gives all of them new space; where there is not enough, at least to the start of the request,
    /// and then the others are no longer among them.
    fn give_space<'a>(&'a self, request: &Range<u64>, moves: &mut Vec<Move<'a>>) -> Result<()> {
        let size = self.layout.cluster_size();
        let mut hosts: Vec<(u64, bool, Unnamed<'_>)> = Vec::new();
        for _ in 0..MAX_RUNS {
            let missing = moves.len() - hosts.len();
            let Some(next) = moves.get(hosts.len()) else {
                break;
            };
            match self.space(next.start, len64(missing)) {
                Ok(space) => {
                    let run = space.taken.as_ref();
                    hosts.extend((0..space.count).map(|i| {
                        let taken = run.map(|run| self.part(run, i..i + 1));
                        (space.host + i * size, space.fresh, self.unnamed(taken))
                    }));
                }
                Err(e) if hosts.is_empty() => return Err(e),
                Err(_) => break,
            }
        }
        let first = down(request.start, size);
        let before = moves.partition_point(|m| m.start < first);
        let missing = moves.len() - hosts.len();
        moves.drain(..before.min(missing));
        moves.truncate(hosts.len());
        for (cluster, (host, zeroed, taken)) in moves.iter_mut().zip(hosts) {
            (cluster.host, cluster.zeroed, cluster.taken) = (host, zeroed, taken);
        }
        Ok(())
    }

    /// Has the new clusters filled; their entries.  Where copying what was not asked for fails, only
    /// the clusters of the request are left.
    fn fill_moves(
        &self,
        request: &Range<u64>,
        moves: &mut Vec<Move<'_>>,
        fill: &mut Fill<'_>,
    ) -> Result<Vec<u64>> {
        let size = self.layout.cluster_size();
        let mut pieces = Vec::new();
        for cluster in moves.iter() {
            self.add_pieces(request, cluster, &mut pieces)?;
        }
        pieces.sort_by_key(|piece| !piece.asked);
        let mut left = pieces.len();
        for piece in &pieces {
            left -= 1;
            match self.fill_piece(piece, left, fill) {
                Err(_) if !piece.asked => {
                    let asked = down(request.start, size)..request.end;
                    moves.retain(|m| asked.contains(&m.start));
                    break;
                }
                done => done?,
            }
        }
        let data = self.data()?;
        let end = |m: &Move<'_>| m.host + size.min(self.size() - m.start);
        if let Some(end) = moves.iter().map(end).max()
            && data.size() < end
        {
            // Grows the file and never cuts it, whatever other threads write behind us.
            data.write_at(&[0], end - 1)?;
        }
        let words = moves.iter().map(|m| self.words(request, m));
        let words: Result<Vec<Vec<u64>>> = words.collect();
        Ok(words?.concat())
    }

    /// The parts of a cluster that are filled, as ranges within it, with what each holds.
    fn filled_parts(
        &self,
        request: &Range<u64>,
        cluster: &Move<'_>,
    ) -> Result<Vec<(Subcluster, Range<u64>)>> {
        let (start, size) = (cluster.start, self.layout.cluster_size());
        let unit = self.layout.subcluster_size();
        // Of a cluster that is copied for what comes next, all.
        let asked = intersect(&(start..start + size), request).map_or(0..size, |part| {
            down(part.start - start, unit)..(part.end - start).next_multiple_of(unit)
        });
        let parts = self.parts(cluster.unit)?.into_iter();
        let parts = parts.filter_map(|(kind, part)| match kind {
            Subcluster::Stored => Some((kind, part)),
            _ => intersect(&part, &asked).map(|part| (kind, part)),
        });
        Ok(parts.collect())
    }

    fn add_pieces(
        &self,
        request: &Range<u64>,
        cluster: &Move<'_>,
        pieces: &mut Vec<Piece>,
    ) -> Result<()> {
        let (start, size) = (cluster.start, self.layout.cluster_size());
        let asked = intersect(&(start..start + size), request).is_some();
        for (kind, part) in self.filled_parts(request, cluster)? {
            let guest = start + part.start..(start + part.end).min(self.size());
            if guest.is_empty() {
                continue;
            }
            let replaced = request.start <= guest.start && guest.end <= request.end;
            let held = match (kind, cluster.unit.cluster) {
                _ if replaced => Held::Replaced,
                (Subcluster::Below, _) => Held::Below,
                (Subcluster::Stored, Cluster::Standard { host, .. }) => {
                    Held::Host(host + part.start)
                }
                (Subcluster::Stored, Cluster::Compressed(packed)) => Held::Packed(packed, start),
                (Subcluster::Zero | Subcluster::Stored, _) => Held::Zero,
            };
            let piece = Piece {
                guest,
                host: cluster.host + part.start,
                held,
                zeroed: cluster.zeroed,
                asked,
            };
            if !pieces.last_mut().is_some_and(|last| last.join(&piece)) {
                pieces.push(piece);
            }
        }
        Ok(())
    }

    /// Fills a piece, after which `left` more follow.
    fn fill_piece(&self, piece: &Piece, left: usize, fill: &mut Fill<'_>) -> Result<()> {
        let data = self.data()?;
        let len = range::len(&piece.guest);
        let bytes = match piece.held {
            Held::Host(host) => {
                let mut bytes = vec![0; clamp_len(len, usize::MAX)];
                data.read_at(&mut bytes, host)?;
                Some(bytes)
            }
            Held::Packed(packed, start) => Some(self.decoded(packed, start)?.to_vec()),
            _ => None,
        };
        let old = match (piece.held, &bytes) {
            (_, Some(bytes)) => Old::Bytes(bytes),
            (Held::Below, _) => Old::Below,
            (Held::Replaced, _) => Old::Replaced,
            _ => Old::Zero,
        };
        fill(Slot {
            guest: piece.guest.clone(),
            storage: data,
            host: piece.host,
            old,
            zeroed: piece.zeroed,
        })?;
        // The sync that follows has less to wait for.
        if left > 0 && len >= COPY && self.writer()?.order() == WriteOrder::Ordered {
            data.write_back(piece.host..piece.host + len);
        }
        Ok(())
    }

    /// The entry of a cluster that has moved.
    fn words(&self, request: &Range<u64>, cluster: &Move<'_>) -> Result<Vec<u64>> {
        let mut words = vec![cluster.host | COPIED];
        if self.layout.extended {
            let unit = self.layout.subcluster_size();
            let mut bits = cluster.unit.bits;
            for (_, part) in self.filled_parts(request, cluster)? {
                bits |= mask(&part, unit);
                bits &= !(mask(&part, unit) << SUBCLUSTERS);
            }
            words.push(bits);
        }
        Ok(words)
    }
}

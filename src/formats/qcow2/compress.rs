//! Storing clusters compressed: space in guest order, data, then the entries that show it.

use std::ops::Range;

use super::Qcow2;
use super::entry::Cluster;
use super::packing::Packing;
use super::units::Entry as Old;
use crate::error::{Error, Result};
use crate::image::compress::{Compress, Encoder, Existing, Form, Placed, Unit};
use crate::image::units::{Moment, Taken, Units, Unnamed};
use crate::util::align::{clamp_len, len64};
use crate::util::range::push_merged;

/// Host clusters that are given to plain units in one piece at most.
const MAX_RUN: u64 = 1 << 16;

impl Qcow2 {
    /// [`crate::image::Image::as_compress`].
    pub(super) fn compressing(&self) -> Result<&dyn Compress> {
        if self.has_data_file() {
            return Err(Error::unsupported(
                "an image with an external data file has no compressed clusters",
            ));
        }
        self.writer().map(|_| self as &dyn Compress)
    }

    /// First-level entries of units, without repetition.
    fn tables_of(&self, units: &[Unit]) -> impl Iterator<Item = u64> {
        let bits = self.layout.cluster_bits + self.header.l2_bits();
        let mut indices: Vec<u64> = units.iter().map(|u| u.at >> bits).collect();
        indices.dedup();
        indices.into_iter()
    }

    fn check_units(&self, units: &[Unit], existing: Existing) -> Result<()> {
        let size = self.layout.cluster_size();
        for unit in units {
            let fits = match unit.form {
                Form::Packed(len) => len > 0 && len < size,
                Form::Plain => true,
            };
            if unit.at % size != 0 || unit.at >= self.size() || !fits {
                return Err(Error::invalid(format!(
                    "{unit:?} is no cluster of the disk"
                )));
            }
            if existing == Existing::Refuse {
                self.check_new(unit.at, self.entry(unit.at)?)?;
            }
        }
        Ok(())
    }

    /// Refuses a cluster that has space already, of its own or shared.
    fn check_new(&self, at: u64, old: Old) -> Result<()> {
        if matches!(old.cluster, Cluster::Unallocated | Cluster::Zero) {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "the cluster at {at:#x} is allocated (allowed for compressed writes: clusters that are not)"
        )))
    }

    /// Space for all units: first for those that are compressed, so that they lie in one piece.
    fn hosts(&self, units: &[Unit]) -> Result<Vec<u64>> {
        let lens: Vec<u64> = units.iter().filter_map(packed_len).collect();
        let plain = len64(units.len() - lens.len());
        let mut runs = Unnamed::new(self, Vec::new());
        let mut missing = plain;
        // Plain ones are taken after the others, and lie behind them.
        let packing = self.pack(&lens)?;
        while missing > 0 {
            match self.take_clusters(1..missing.min(MAX_RUN) + 1) {
                Ok(taken) => {
                    missing -= taken.count;
                    runs.runs.push(taken);
                }
                Err(e) => {
                    self.unpack(packing.hosts.iter().copied().zip(lens));
                    return Err(e);
                }
            }
        }
        let runs = runs.named();
        self.prepare_space(&packing, &runs);
        let size = self.layout.cluster_size();
        let mut packed = packing.hosts.into_iter();
        let mut whole = runs
            .iter()
            .flat_map(|t| (0..t.count).map(move |number| t.host + number * size));
        let host = |unit: &Unit| match unit.form {
            Form::Packed(_) => packed.next(),
            Form::Plain => whole.next(),
        };
        Ok(units.iter().filter_map(host).collect())
    }

    /// Publishes entries of one second-level table.
    fn show_run(&self, start: u64, words: &[u64]) -> Result<()> {
        let table = start >> (self.layout.cluster_bits + self.header.l2_bits());
        self.publish_entries(
            self.own_table(table)?,
            start >> self.layout.cluster_bits,
            words,
        )
    }

    fn pack(&self, lens: &[u64]) -> Result<Packing> {
        let limit = self.layout.packed_limit();
        self.taking(|refcounts| refcounts.pack(&*self.file, lens, limit, &self.allowed()))
    }

    fn unpack(&self, packed: impl Iterator<Item = (u64, u64)>) {
        let Some(writer) = &self.writer else { return };
        let mut refcounts = writer.refcounts.lock();
        for (host, len) in packed {
            // Where this fails too, they stay a leak.
            drop(refcounts.unpack(&*self.file, host, len));
        }
    }

    /// New clusters hold no tables any more, and get space in large pieces.
    fn prepare_space(&self, packing: &Packing, runs: &[Taken]) {
        let mut all: Vec<Range<u64>> = Vec::new();
        let mut clusters = packing.taken.clone();
        let bits = self.layout.cluster_bits;
        clusters.extend(
            runs.iter()
                .map(|t| t.host >> bits..(t.host >> bits) + t.count),
        );
        clusters.sort_by_key(|c| c.start);
        clusters.into_iter().for_each(|c| push_merged(&mut all, c));
        for run in all {
            let host = run.start << bits..run.end << bits;
            self.tables.forget(host.clone());
            // Where the host has no room, the write will say so.
            drop(self.file.reserve(host));
        }
    }

    /// Where the units' bytes go: neighbours in `bytes` and in the file are one piece.
    fn pieces(&self, units: &[Unit], hosts: &[u64]) -> Vec<(u64, Range<usize>)> {
        let mut pieces: Vec<(u64, Range<usize>)> = Vec::new();
        let mut at = 0;
        for (unit, host) in units.iter().zip(hosts) {
            let len = clamp_len(unit.stored_len(self.layout.cluster_size()), usize::MAX);
            match pieces.last_mut() {
                Some((first, part)) if *first + len64(part.len()) == *host => part.end += len,
                _ => pieces.push((*host, at..at + len)),
            }
            at += len;
        }
        pieces
    }
}

fn packed_len(unit: &Unit) -> Option<u64> {
    match unit.form {
        Form::Packed(len) => Some(len),
        Form::Plain => None,
    }
}

impl Compress for Qcow2 {
    fn encoder(&self) -> Result<Box<dyn Encoder>> {
        self.codec.encoder()
    }

    fn place<'a>(&'a self, units: &[Unit], existing: Existing) -> Result<Box<dyn Placed + 'a>> {
        self.start_writing()?;
        self.check_units(units, existing)?;
        let since = self.writer()?.allocator.order.now();
        // Tables come first, in guest order too.
        for table in self.tables_of(units) {
            self.own_table(table)?;
        }
        let hosts = self.hosts(units)?;
        Ok(Box::new(Space {
            image: self,
            units: units.to_vec(),
            hosts,
            existing,
            since,
            written: since,
            shown: false,
        }))
    }
}

/// Space that does not show yet.
struct Space<'a> {
    image: &'a Qcow2,
    units: Vec<Unit>,
    hosts: Vec<u64>,
    existing: Existing,
    /// Before the first write that the entries must come after.
    since: Moment,
    /// After the last of them.
    written: Moment,
    /// Entries may show it.
    shown: bool,
}

impl Placed for Space<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let image = self.image;
        for (host, part) in image.pieces(&self.units, &self.hosts) {
            let bytes = bytes.get(part);
            let bytes = bytes.ok_or_else(|| Error::invalid("fewer bytes than the units have"))?;
            image.file.write_at(bytes, host)?;
        }
        self.written = image.allocator()?.order.now();
        Ok(())
    }

    fn show(mut self: Box<Self>) -> Result<()> {
        let (Some(first), Some(last)) = (self.units.first(), self.units.last()) else {
            return Ok(());
        };
        let image = self.image;
        let size = image.layout.cluster_size();
        let span = first.at..last.at + size;
        let allocator = image.allocator()?;
        if !allocator.order.is_settled(self.since, self.written) {
            allocator.order.settle(self.since)?;
        }
        let _reserved = allocator.reservations.wait(&span);
        let olds: Result<Vec<Old>> = self.units.iter().map(|u| image.entry(u.at)).collect();
        let olds = olds?;
        if self.existing == Existing::Refuse {
            for (unit, old) in self.units.iter().zip(&olds) {
                image.check_new(unit.at, *old)?;
            }
        }
        for unit in &self.units {
            image.record(&(unit.at..(unit.at + size).min(image.size())))?;
        }
        self.shown = true;
        self.publish()?;
        olds.iter()
            .try_for_each(|old| image.free_cluster(old.cluster))
    }
}

impl Space<'_> {
    /// Publishes the entries, neighbours in one piece.
    fn publish(&self) -> Result<()> {
        let (image, size) = (self.image, self.image.layout.cluster_size());
        let bits = image.layout.cluster_bits + image.header.l2_bits();
        let mut run: Option<(u64, Vec<u64>, u64)> = None;
        for (unit, host) in self.units.iter().zip(&self.hosts) {
            let words = match unit.form {
                Form::Packed(len) => image.layout.packed_words(*host, len),
                Form::Plain => image.layout.stored_words(*host),
            };
            match &mut run {
                Some((start, all, end)) if *end == unit.at && *start >> bits == unit.at >> bits => {
                    all.extend(words);
                    *end += size;
                }
                _ => {
                    if let Some((start, all, _)) = run.take() {
                        image.show_run(start, &all)?;
                    }
                    run = Some((unit.at, words, unit.at + size));
                }
            }
        }
        match run {
            Some((start, all, _)) => image.show_run(start, &all),
            None => Ok(()),
        }
    }
}

impl Drop for Space<'_> {
    fn drop(&mut self) {
        if self.shown {
            return;
        }
        for (unit, host) in self.units.iter().zip(&self.hosts) {
            match unit.form {
                Form::Packed(len) => self.image.unpack(std::iter::once((*host, len))),
                Form::Plain => self.image.untake(&Taken::new(*host, 1, 0)),
            }
        }
    }
}

//! Storing clusters compressed: space in guest order, data, then the entries that show it.

use std::ops::Range;

use super::Qcow2;
use super::packing::Packing;
use super::units::Entry as Old;
use super::writer::Loose;
use crate::error::{Error, Result};
use crate::image::compress::{Compress, Encoder, Existing, Form, Placed, Unit};
use crate::image::units::{Moment, Units};
use crate::util::align::{clamp_len, len64};
use crate::util::range::push_merged;

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
        if self.layout.host(old.cluster).is_empty() {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "the cluster at {at:#x} is allocated (allowed for compressed writes: clusters that are not)"
        )))
    }

    /// Space for all units: first for those that are compressed, so that they lie in one piece.
    fn hosts(&self, units: &[Unit]) -> Result<Vec<u64>> {
        let lens: Vec<u64> = units.iter().filter_map(packed_len).collect();
        let mut whole = Loose::new(self);
        // Plain ones are taken after the others, and lie behind them.
        let packing = self.pack(&lens)?;
        let plain = match whole.take_each(len64(units.len() - lens.len())) {
            Ok(plain) => plain,
            Err(e) => {
                self.unpack(packing.hosts.iter().copied().zip(lens));
                return Err(e);
            }
        };
        self.prepare_space(packing.taken, &whole);
        whole.keep();
        let (mut packed, mut plain) = (packing.hosts.into_iter(), plain.into_iter());
        let host = |unit: &Unit| match unit.form {
            Form::Packed(_) => packed.next(),
            Form::Plain => plain.next(),
        };
        Ok(units.iter().filter_map(host).collect())
    }

    fn pack(&self, lens: &[u64]) -> Result<Packing> {
        let limit = self.layout.packed_limit();
        self.refcounts()?.pack(lens, limit, &self.allowed())
    }

    fn unpack(&self, packed: impl Iterator<Item = (u64, u64)>) {
        let Some(writer) = &self.writer else { return };
        let mut refcounts = writer.refcounts.lock();
        for (host, len) in packed {
            // Where this fails too, they stay a leak.
            drop(refcounts.unpack(host, len));
        }
    }

    /// New clusters hold no tables any more, and get space in large pieces.
    fn prepare_space(&self, packed: Vec<Range<u64>>, whole: &Loose<'_>) {
        let size = self.layout.cluster_size();
        let packed = packed.into_iter().map(|c| c.start * size..c.end * size);
        let mut hosts: Vec<Range<u64>> = packed.chain(whole.runs.iter().cloned()).collect();
        hosts.sort_by_key(|host| host.start);
        let mut all = Vec::new();
        hosts
            .into_iter()
            .for_each(|host| push_merged(&mut all, host));
        for host in all {
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
            written: self.allocator()?.order.now(),
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
    /// After the last write that the entries must come after.
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
        if !allocator.order.is_settled(self.written) {
            allocator.order.settle()?;
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
        let (image, layout) = (self.image, self.image.layout);
        let table = |at: u64| at >> (layout.cluster_bits + image.header.l2_bits());
        let units: Vec<(&Unit, &u64)> = self.units.iter().zip(&self.hosts).collect();
        let joins = |a: &(&Unit, &u64), b: &(&Unit, &u64)| {
            a.0.at + layout.cluster_size() == b.0.at && table(a.0.at) == table(b.0.at)
        };
        for run in units.chunk_by(joins) {
            let words = run.iter().flat_map(|(unit, host)| match unit.form {
                Form::Packed(len) => layout.packed_words(**host, len),
                Form::Plain => layout.stored_words(**host),
            });
            let (start, words) = (run[0].0.at, words.collect::<Vec<u64>>());
            let host = image.own_table(table(start))?;
            image.publish_entries(host, start >> layout.cluster_bits, &words)?;
        }
        Ok(())
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
                // Where this fails too, they stay a leak.
                Form::Plain => drop(self.image.uncount(&(*host..*host + 1))),
            }
        }
    }
}

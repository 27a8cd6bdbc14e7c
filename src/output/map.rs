//! `map`: the extents of a disk, written one by one so that their number does not matter.

use std::io::{self, Write};
use std::path::Path;

use crate::chain::{Chain, Extent, State};
use crate::image::disc::Disc;
use crate::image::{Image, ObjectId};
use crate::output::{json, table};
use crate::util::align::len64;

/// Writes extents as lines for people.
#[derive(Debug)]
pub struct Human {
    layers: Vec<Layer>,
}

/// Writes extents as qemu-img's JSON: a list with one object a line.
#[derive(Debug)]
pub struct Json {
    layers: Vec<Layer>,
    any: bool,
}

/// What there is to say about a layer.
#[derive(Debug)]
struct Layer {
    file: Option<String>,
    /// The files that its bytes are in.
    objects: Vec<(ObjectId, String)>,
    /// Virtual size in bytes.
    size: u64,
    /// Bytes are stored as they are, so that an offset means something to others.
    offsets: bool,
    /// Where sectors lie that a disk is a part of.
    sectors: Option<SectorMap>,
    /// Space is given bit by bit, so that what has some is worth telling even where it is a hole.
    allocates: bool,
}

/// Where sectors lie of which each gives the disk some bytes.
#[derive(Debug)]
struct SectorMap {
    /// Offset of the first.
    host: u64,
    /// Bytes that each takes.
    stored: u64,
    /// Bytes that each gives.
    unit: u64,
    /// The file that they are in.
    file: Option<String>,
}

impl SectorMap {
    fn of(image: &dyn Image, name: fn(&Path) -> String) -> Option<Self> {
        let disc = image.as_disc()?;
        let track = disc.track()?;
        let stored = track.body().next()?.stored?;
        Some(Self {
            file: disc
                .file(stored.file)
                .and_then(|file| file.path().map(name)),
            host: stored.host,
            stored: len64(track.mode.len()),
            unit: image.caps().encoded?,
        })
    }
}

/// Where in which file an extent lies.
#[derive(Clone, Copy)]
struct Place<'f> {
    host: u64,
    file: &'f str,
}

impl Human {
    /// A writer for extents of `chain`.
    pub fn new(chain: &Chain) -> Self {
        Self {
            layers: layers(chain, table::path),
        }
    }

    /// Writes what comes before the first extent.
    ///
    /// # Errors
    /// The writer's.
    pub fn start(&self, out: &mut dyn Write) -> io::Result<()> {
        row(out, ["Offset", "Length", "Mapped to", "State", "File"])
    }

    /// Writes one extent.
    ///
    /// # Errors
    /// The writer's.
    pub fn extent(&self, out: &mut dyn Write, extent: &Extent) -> io::Result<()> {
        let state = match extent.state {
            State::Data => "data",
            State::Encoded => "compressed",
            State::Zero => "zero",
            State::Hole => "hole",
        };
        let place = place(&self.layers, extent);
        let mapped = place.map_or("-".to_owned(), |p| format!("{:#x}", p.host));
        let layer = self.layers.get(extent.depth);
        let (start, len) = (format!("{:#x}", extent.start), format!("{:#x}", extent.len));
        let file = place.map(|p| p.file);
        let file = file.or_else(|| layer.and_then(|l| l.file.as_deref()));
        row(out, [&start, &len, &mapped, state, file.unwrap_or("-")])
    }
}

fn row(out: &mut dyn Write, [start, len, mapped, state, file]: [&str; 5]) -> io::Result<()> {
    writeln!(out, "{start:<15} {len:<15} {mapped:<15} {state:<10} {file}")
}

/// Writes for people where the tracks of a disc lie, index by index; the disk is one of them.
///
/// # Errors
/// The writer's.
pub fn tracks(out: &mut dyn Write, disc: &dyn Disc) -> io::Result<()> {
    writeln!(out)?;
    track(
        out,
        ["Track", "Index", "LBA", "Sectors", "Mapped to", "File"],
    )?;
    for line in &disc.table().tracks {
        for run in &line.runs {
            let mapped = run.stored.map(|stored| format!("{:#x}", stored.host));
            let file = run.stored.and_then(|stored| disc.file(stored.file)?.path());
            track(
                out,
                [
                    &format!("{:02}", line.number),
                    &format!("{:02}", run.index),
                    &run.lba.to_string(),
                    &run.sectors.to_string(),
                    mapped.as_deref().unwrap_or("-"),
                    file.map(table::path).as_deref().unwrap_or("-"),
                ],
            )?;
        }
    }
    Ok(())
}

fn track(out: &mut dyn Write, row: [&str; 6]) -> io::Result<()> {
    let [track, index, lba, sectors, mapped, file] = row;
    writeln!(
        out,
        "{track:<7} {index:<7} {lba:<15} {sectors:<15} {mapped:<15} {file}"
    )
}

impl Json {
    /// A writer for extents of `chain`.
    pub fn new(chain: &Chain) -> Self {
        Self {
            layers: layers(chain, json::path),
            any: false,
        }
    }

    /// Writes one extent.
    ///
    /// # Errors
    /// The writer's.
    pub fn extent(&mut self, out: &mut dyn Write, extent: &Extent) -> io::Result<()> {
        if extent.state != State::Hole {
            return self.object(out, extent, extent.depth);
        }
        let mut rest = *extent;
        while rest.len > 0 {
            let (depth, end) = self.shortest(rest.start, rest.end());
            let len = end - rest.start;
            self.object(out, &Extent { len, ..rest }, depth)?;
            (rest.start, rest.len) = (end, rest.len - len);
        }
        Ok(())
    }

    /// The layer that is said to be the reason why the bytes at `at` are a hole, and up to where it
    /// is, at most `end`: as qemu-img has it, the first whose backing image ends before them, else
    /// the last.
    fn shortest(&self, at: u64, end: u64) -> (usize, u64) {
        let below = self.layers.iter().skip(1).map(|layer| layer.size);
        let sizes = below.take_while(|size| *size > at);
        let end = sizes.clone().fold(end, u64::min);
        (sizes.count(), end)
    }

    fn object(&mut self, out: &mut dyn Write, extent: &Extent, depth: usize) -> io::Result<()> {
        let Extent {
            start, len, state, ..
        } = *extent;
        let present = state != State::Hole;
        let zero = matches!(state, State::Zero | State::Hole);
        let compressed = state == State::Encoded;
        let layer = self.layers.get(extent.depth);
        let stored = extent.host.is_some() && layer.is_some_and(|l| l.allocates);
        out.write_all(if self.any { b",\n" } else { b"[" })?;
        self.any = true;
        write!(
            out,
            "{{ \"start\": {start}, \"length\": {len}, \"depth\": {depth}, \
             \"present\": {present}, \"zero\": {zero}, \"data\": {}, \"compressed\": {compressed}",
            !zero || stored
        )?;
        if let Some(Place { host, file }) = place(&self.layers, extent) {
            let file = serde_json::to_string(file)?;
            write!(out, ", \"offset\": {host}, \"filename\": {file}")?;
        }
        out.write_all(b"}")
    }

    /// Writes what comes after the last extent.
    ///
    /// # Errors
    /// The writer's.
    pub fn finish(&self, out: &mut dyn Write) -> io::Result<()> {
        out.write_all(if self.any { b"]\n" } else { b"[]\n" })
    }
}

fn layers(chain: &Chain, name: fn(&Path) -> String) -> Vec<Layer> {
    let layer = |image: &dyn Image| Layer {
        file: image.storage().path().map(name),
        objects: objects(image, name),
        size: image.virtual_size(),
        offsets: image.caps().host_offsets,
        sectors: SectorMap::of(image, name),
        allocates: image.cluster_size().is_some(),
    };
    chain.layers().iter().map(|image| layer(&**image)).collect()
}

fn objects(image: &dyn Image, name: fn(&Path) -> String) -> Vec<(ObjectId, String)> {
    let named = image.parts().into_iter().filter_map(|part| {
        let path = part.storage.path()?;
        Some((ObjectId::of(part.storage), name(path)))
    });
    named.collect()
}

fn place<'f>(layers: &'f [Layer], extent: &Extent) -> Option<Place<'f>> {
    let layer = layers.get(extent.depth)?;
    if let Some(map) = &layer.sectors {
        return Some(Place {
            host: map.host + extent.start / map.unit * map.stored,
            file: map.file.as_deref().or(layer.file.as_deref())?,
        });
    }
    let host = extent.host.filter(|_| layer.offsets)?;
    let mut objects = layer.objects.iter();
    let object = objects.find(|(id, _)| Some(*id) == extent.object);
    let file = object.map(|(_, name)| &**name).or(layer.file.as_deref())?;
    Some(Place { host, file })
}

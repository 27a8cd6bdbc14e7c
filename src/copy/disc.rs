//! Sectors of a disc, or of a disk, into new files.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::copy::joined::Joined;
use crate::copy::salvage::{Lost, Reader};
use crate::error::{Error, ErrorKind, Result};
use crate::image::disc::plan::{NewFile, Origin, Piece};
use crate::image::disc::{Disc, RAW, USER, recode};
use crate::storage::Storage;
use crate::util::align::len64;
use crate::util::parallel::for_each;
use crate::util::progress::Progress;

/// Sectors that are moved at a time.
const BATCH: u64 = 64;
/// Addresses of sectors that cannot be read that are remembered.
const MAX_BAD: usize = 500_000;

/// Where sectors come from.
#[derive(Clone, Copy)]
pub struct From<'a> {
    /// The disks.
    pub sources: &'a Joined,
    /// The only one of them as a disc, where it is one.
    pub disc: Option<&'a dyn Disc>,
    /// What cannot be read becomes zeroes that this is told of; `None`: it ends the job.
    pub salvage: Option<&'a Lost<'a>>,
}

impl std::fmt::Debug for From<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("From")
            .field("disc", &self.disc)
            .finish_non_exhaustive()
    }
}

/// A new file, and where it is written.
#[derive(Debug)]
pub struct Made<'a> {
    /// What it is to hold.
    pub file: &'a NewFile,
    /// The empty object.
    pub storage: Arc<dyn Storage>,
}

/// Bytes that [`make`] tells its progress of in all.
pub fn total(files: &[NewFile]) -> u64 {
    files
        .iter()
        .fold(0, |sum, file| sum + file.len - len64(file.head.len()))
}

/// One run of a piece.
struct Job<'a> {
    made: &'a Made<'a>,
    piece: Piece,
    /// Which of its sectors.
    first: u64,
    count: u64,
}

/// What a worker has for itself.
#[derive(Default)]
struct Scratch {
    source: Vec<u8>,
    out: Vec<u8>,
}

/// Writes all sectors of new files.  Returns the addresses of those that cannot be read, in order;
/// where there are any, the files are not whole.
///
/// # Errors
/// Those of the sources but for damage of single sectors of a disc, and of the host; `Cancelled`;
/// `OutOfRange` for a sector whose address no header can hold.
pub fn make(
    from: From<'_>,
    files: &[Made<'_>],
    workers: usize,
    progress: &dyn Progress,
) -> Result<Vec<u64>> {
    for Made { file, storage } in files {
        storage.set_len(file.len)?;
        storage.write_at(&file.head, 0)?;
    }
    each(from, files, workers, progress, &|storage, bytes, host| {
        storage.write_at(bytes, host)
    })
}

/// Reads files back that [`make`] made, and compares them with their sources.
///
/// # Errors
/// `Corrupt` where they differ; those of [`make`].
pub fn verify(
    from: From<'_>,
    files: &[Made<'_>],
    workers: usize,
    progress: &dyn Progress,
) -> Result<()> {
    let same = |storage: &dyn Storage, bytes: &[u8], host: u64| {
        let mut found = vec![0; bytes.len()];
        storage.read_at(&mut found, host)?;
        let differs = found.iter().zip(bytes).position(|(a, b)| a != b);
        differs.map_or(Ok(()), |n| {
            let at = host + len64(n);
            let text = format!("differs from the source at {at:#x} when read back");
            Err(Error::corrupt(text).at_opt(storage.path()))
        })
    };
    for Made { file, storage } in files {
        if storage.size() != file.len {
            let (len, found) = (file.len, storage.size());
            let text = format!("has {found} bytes when read back (allowed: {len})");
            return Err(Error::corrupt(text).at_opt(storage.path()));
        }
        same(&**storage, &file.head, 0)?;
    }
    each(from, files, workers, progress, &same).map(drop)
}

/// What is done with sectors as they are stored in a file, at an offset there.
type Store<'s> = dyn Fn(&dyn Storage, &[u8], u64) -> Result<()> + Sync + 's;

/// Makes the sectors of new files, and hands them on; the addresses of those that cannot be read.
fn each(
    from: From<'_>,
    files: &[Made<'_>],
    workers: usize,
    progress: &dyn Progress,
    store: &Store<'_>,
) -> Result<Vec<u64>> {
    let pieces = files
        .iter()
        .flat_map(|made| made.file.pieces.iter().map(move |p| (made, *p)));
    let mut jobs = pieces.flat_map(|(made, piece)| {
        let batches = 0..piece.sectors.div_ceil(BATCH);
        batches.map(move |n| Job {
            made,
            piece,
            first: n * BATCH,
            count: (piece.sectors - n * BATCH).min(BATCH),
        })
    });
    let bad = Mutex::new(Vec::new());
    for_each(workers, &mut jobs, Scratch::default, |scratch, job| {
        progress.check()?;
        let mut own = move_one(from, &job, scratch, store)?;
        let mut all = bad.lock();
        own.truncate(MAX_BAD.saturating_sub(all.len()));
        all.append(&mut own);
        progress.advance(len64(scratch.out.len()));
        Result::Ok(())
    })?;
    let mut bad = bad.into_inner();
    bad.sort_unstable();
    Ok(bad)
}

/// Moves some sectors; those that cannot be read.
fn move_one(
    from: From<'_>,
    job: &Job<'_>,
    scratch: &mut Scratch,
    store: &Store<'_>,
) -> Result<Vec<u64>> {
    let Job { piece, first, .. } = *job;
    let size = piece.mode.len();
    scratch.out.clear();
    scratch.out.resize(
        crate::util::align::clamp_len(job.count, usize::MAX) * size,
        0,
    );
    let bad = match (piece.origin, from.disc) {
        (Origin::Disk(start), _) => {
            of_disk(from, job, start + first, scratch)?;
            Vec::new()
        }
        (Origin::Disc(start), Some(disc)) => of_disc(from, disc, job, start + first, scratch)?,
        (Origin::Disc(_), None) => return Err(Error::invalid("the source is no disc")),
    };
    let host = piece.host + first * len64(size);
    store(&*job.made.storage, &scratch.out, host)?;
    Ok(bad)
}

fn of_disk(from: From<'_>, job: &Job<'_>, start: u64, scratch: &mut Scratch) -> Result<()> {
    let Scratch { source, out } = scratch;
    let piece = job.piece;
    source.clear();
    source.resize(out.len() / piece.mode.len() * USER, 0);
    let reader = Reader {
        sources: from.sources,
        salvage: from.salvage,
    };
    reader.read_at(source, start * len64(USER))?;
    let mut sector = [0; RAW];
    let sectors = source.chunks(USER).zip(out.chunks_mut(piece.mode.len()));
    for (lba, (data, out)) in (piece.lba + job.first..).zip(sectors) {
        sector[piece.from.stored()].copy_from_slice(data);
        let form = piece
            .from
            .form()
            .ok_or_else(|| Error::invalid("data has no form"))?;
        recode(&sector, form, piece.from, piece.mode, lba, out)?;
    }
    Ok(())
}

fn of_disc(
    from: From<'_>,
    disc: &dyn Disc,
    job: &Job<'_>,
    start: u64,
    scratch: &mut Scratch,
) -> Result<Vec<u64>> {
    let Scratch { source, out } = scratch;
    let piece = job.piece;
    source.resize(disc.whole_len(), 0);
    let mut bad = Vec::new();
    for (n, out) in (0..).zip(out.chunks_mut(piece.mode.len())) {
        let (lba, new) = (start + n, piece.lba + job.first + n);
        let read = disc.corrected(lba, source);
        let done = read.and_then(|form| recode(source, form, piece.from, piece.mode, new, out));
        match (done, from.salvage) {
            (Err(e), None) if e.kind() == ErrorKind::Corrupt => bad.push(lba),
            (Err(e), Some(lost)) if e.kind() != ErrorKind::OutOfRange => {
                out.fill(0);
                lost(lba * len64(USER), len64(out.len()), &e);
            }
            (done, _) => done?,
        }
    }
    Ok(bad)
}

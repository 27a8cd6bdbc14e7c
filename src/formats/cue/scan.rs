//! Looking at every sector of some tracks, on all cores.

use std::ops::Range;

use parking_lot::Mutex;

use super::image::{BATCH, Cue};
use super::sectors::{Stored, expand};
use crate::error::Result;
use crate::image::check::Report;
use crate::image::disc::{Raw, Track};
use crate::util::align::len64;
use crate::util::parallel::{cores, for_each};
use crate::util::progress::Progress;

/// Called for each sector with its track and address; what it finds is kept.
pub(super) type Look<'l, T> = dyn Fn(&Track, u64, &Raw) -> Option<T> + Sync + 'l;

/// Some sectors, side by side.
struct Job<'a> {
    track: &'a Track,
    stored: Stored,
    /// Address of the first of `stored`.
    lba: u64,
    sectors: Range<u64>,
}

impl Cue {
    /// Looks at all sectors that are stored of these tracks.  What is found, by address; of more
    /// than [`Report::MAX_SECTORS`] the rest is dropped, and `dropped` is told of each.
    ///
    /// # Errors
    /// The host's, and `Cancelled`.
    pub(super) fn scan<T: Send>(
        &self,
        tracks: &[usize],
        progress: &dyn Progress,
        look: &Look<'_, T>,
        dropped: &(dyn Fn(&T) + Sync),
    ) -> Result<Vec<(u64, T)>> {
        let mut runs = Vec::new();
        for track in tracks.iter().filter_map(|n| self.table.tracks.get(*n)) {
            let stored = |run| Some((track, Stored::of_run(track, run)?, run.lba));
            runs.extend(track.runs.iter().filter_map(stored));
        }
        let mut jobs = runs.iter().flat_map(|(track, stored, lba)| {
            let batches = 0..stored.sectors.div_ceil(BATCH);
            batches.map(move |n| Job {
                track,
                stored: *stored,
                lba: *lba,
                sectors: n * BATCH..stored.sectors.min((n + 1) * BATCH),
            })
        });
        let found = Mutex::new(Vec::new());
        for_each(cores(), &mut jobs, Vec::new, |buf, job| {
            let mut own = self.look_at(&job, buf, progress, look)?;
            let mut all = found.lock();
            let kept = own.len().min(Report::MAX_SECTORS.saturating_sub(all.len()));
            own.drain(kept..).for_each(|(_, found)| dropped(&found));
            all.append(&mut own);
            Result::Ok(())
        })?;
        let mut found = found.into_inner();
        found.sort_by_key(|(lba, _)| *lba);
        Ok(found)
    }

    fn look_at<T>(
        &self,
        job: &Job<'_>,
        buf: &mut Vec<u8>,
        progress: &dyn Progress,
        look: &Look<'_, T>,
    ) -> Result<Vec<(u64, T)>> {
        progress.check()?;
        job.stored.read(&self.files, job.sectors.clone(), buf)?;
        let mut found = Vec::new();
        let sectors = buf.chunks(job.stored.mode.len());
        for (n, bytes) in job.sectors.clone().zip(sectors) {
            let lba = job.lba + n;
            let raw = expand(bytes, job.stored.mode);
            found.extend(look(job.track, lba, &raw).map(|what| (lba, what)));
        }
        progress.advance(len64(buf.len()));
        Ok(found)
    }
}

//! Checking the codes of every sector, and correcting what they tell how to.

use std::sync::atomic::{AtomicU64, Ordering};

use super::image::Cue;
use crate::error::Result;
use crate::image::check::{BadSector, Check, Repair, Report, Severity};
use crate::image::disc::{self, Faults, Msf, Raw, Track};
use crate::util::align::len64;
use crate::util::progress::Progress;

/// What there is to say about a sector.
struct Fault {
    faults: Faults,
    correctable: bool,
    /// Sectors by which its header is off, where that is all.
    off: Option<i64>,
}

impl Cue {
    /// Tracks whose sectors say themselves what they are.
    fn coded(&self) -> Vec<usize> {
        let tracks = self.table.tracks.iter().enumerate();
        let coded = tracks.filter(|(_, track)| track.mode.form().is_none());
        coded.map(|(n, _)| n).collect()
    }

    fn report(&self, lba: u64, fault: &Fault, report: &mut Report, repair: Repair) -> Result<()> {
        let parts = fault.faults.names();
        let number = self.table.find(lba).map_or(0, |(track, _)| track.number);
        let text = format!(
            "sector {lba} ({}, track {number}): wrong: {}",
            Msf::of_lba(lba),
            parts.join(", ")
        );
        if !fault.faults.has_wrong_codes() && !fault.faults.sync {
            report.note(text);
            return Ok(());
        }
        let repaired = match repair {
            Repair::All if fault.correctable => self.mend(lba)?.map(|_| "corrected".to_owned()),
            _ => None,
        };
        let text = match (&repaired, fault.correctable) {
            (None, true) => format!("{text}; it can be corrected (check -r all)"),
            (None, false) => format!("{text}; it cannot be corrected"),
            (Some(_), _) => text,
        };
        if repaired.is_none()
            && let Some(sectors) = &mut report.sectors
        {
            sectors.push(BadSector {
                lba,
                parts,
                correctable: fault.correctable,
            });
        }
        report.add(Severity::Corruption, 1, text, repaired);
        Ok(())
    }
}

/// What is wrong with a sector; `None`: nothing.
fn look(track: &Track, lba: u64, raw: &Raw) -> Option<Fault> {
    let declared = track.mode.declared();
    let faults = disc::judge(raw, declared).faults;
    let is_bad = faults.has_wrong_codes() || faults.sync;
    let off = match track.mode.has_header() && !is_bad {
        true => off(raw, lba),
        false => None,
    };
    (!faults.is_none() || off.is_some()).then(|| Fault {
        correctable: is_bad && disc::correct(raw, declared).is_some(),
        faults,
        off,
    })
}

/// By how much the address in the header is off; as far as it can be where it is none.  Past minute
/// 99 no header can be right.
fn off(raw: &Raw, lba: u64) -> Option<i64> {
    let frames = |msf: Msf| (msf.minutes * 60 + msf.seconds) * disc::FRAMES + msf.frames;
    let place = Msf::of_lba(lba);
    place.to_header()?;
    let place = frames(place);
    let said = Msf::from_header([raw[12], raw[13], raw[14]]).map(frames);
    let off = said.map_or(i64::MAX, |said| said.cast_signed() - place.cast_signed());
    (off != 0).then_some(off)
}

/// Notes of headers that disagree with the place of their sectors, one for each run that is off
/// alike.
fn note_headers(found: &[(u64, Fault)], report: &mut Report) {
    let mut rest = found
        .iter()
        .filter_map(|(lba, fault)| Some((*lba, fault.off?)))
        .peekable();
    while let Some((first, off)) = rest.next() {
        let mut last = first;
        while rest
            .next_if(|(lba, other)| *lba == last + 1 && *other == off)
            .is_some()
        {
            last += 1;
        }
        let at = Msf::of_lba(first);
        let (which, is, holds) = match first == last {
            true => (format!("header of sector {first} ({at})"), "is", "holds"),
            false => (
                format!("headers of sectors {first} to {last}"),
                "are",
                "hold",
            ),
        };
        let from = if first == last {
            String::new()
        } else {
            format!(" (the first is at {at})")
        };
        report.note(match off {
            i64::MAX => format!("{which} {holds} no address{from}"),
            off => format!("{which} {is} {off:+} sectors off{from}"),
        });
    }
}

impl Check for Cue {
    fn check(&self, repair: Repair, progress: &dyn Progress) -> Result<Report> {
        let mut report = Report {
            sectors: Some(Vec::new()),
            ..Report::default()
        };
        let more = AtomicU64::new(0);
        let found = self.scan(&self.coded(), progress, &look, &|fault| {
            more.fetch_add(u64::from(!fault.faults.is_none()), Ordering::Relaxed);
        })?;
        for (lba, fault) in &found {
            if !fault.faults.is_none() {
                progress.check()?;
                self.report(*lba, fault, &mut report, repair)?;
            }
        }
        let more = more.into_inner();
        if more > 0 {
            let most = Report::MAX_SECTORS;
            let text = format!("{more} sectors more are wrong than the {most} that are listed");
            report.add(Severity::Corruption, more, text, None);
        }
        note_headers(&found, &mut report);
        Ok(report)
    }

    fn work(&self) -> u64 {
        let tracks = self.coded().into_iter().map(|n| &self.table.tracks[n]);
        let runs = tracks.flat_map(|track| track.runs.iter().map(move |run| (track, run)));
        let stored = runs.filter(|(_, run)| run.stored.is_some());
        stored.fold(0, |sum, (track, run)| {
            sum + run.sectors * len64(track.mode.len())
        })
    }
}

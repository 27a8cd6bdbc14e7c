//! Sectors as they are stored, and as a whole.

use std::ops::Range;

use super::image::Cue;
use super::open::Bin;
use super::sheet::FileKind;
use crate::error::{Error, ErrorKind, Result};
use crate::image::disc::table::Run;
use crate::image::disc::{self, Faults, Form, Mode, RAW, Raw, SUBCHANNEL, SYNC, Track};
use crate::image::sector::{Layout, Parts, Sectors, Whole, past_the_end};
use crate::util::align::{clamp_len, len64};
use crate::util::buf::is_zero;

impl Bin {
    /// Whether what it has of such a track is stored with its bytes in pairs swapped.
    pub(super) fn is_swapped(&self, mode: Mode) -> bool {
        self.kind == FileKind::Motorola && mode.is_audio()
    }
}

/// Sectors of one track that are stored one after the other.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stored {
    pub(super) mode: Mode,
    pub(super) file: usize,
    /// Offset of the first.
    pub(super) host: u64,
    /// Where what is stored ends: from there on they are zero.
    pub(super) end: u64,
    pub(super) sectors: u64,
}

impl Stored {
    /// The track from its index 1 on, which is stored in one file.
    pub(super) fn of(track: &Track) -> Option<Self> {
        let first = track.body().next()?.stored?;
        let sectors = track.sectors();
        let end = first.host + sectors * len64(track.mode.len());
        Some(Self {
            mode: track.mode,
            file: first.file,
            host: first.host,
            end: first.end.min(end),
            sectors,
        })
    }

    /// One run of a track; `None`: it is not stored.
    pub(super) fn of_run(track: &Track, run: &Run) -> Option<Self> {
        let stored = run.stored?;
        Some(Self {
            mode: track.mode,
            file: stored.file,
            host: stored.host,
            end: stored.end,
            sectors: run.sectors,
        })
    }

    /// Fills `buf` with these sectors, counted from its first, as they are stored but for the order
    /// of bytes.
    pub(super) fn read(&self, files: &[Bin], sectors: Range<u64>, buf: &mut Vec<u8>) -> Result<()> {
        let Some(file) = files.get(self.file) else {
            return Err(Error::corrupt("a track is in no file"));
        };
        let size = len64(self.mode.len());
        let host = self.host + sectors.start * size;
        buf.resize(
            clamp_len((sectors.end - sectors.start) * size, usize::MAX),
            0,
        );
        let inside = clamp_len(self.end.saturating_sub(host), buf.len());
        buf[inside..].fill(0);
        let read = file.storage.read_at(&mut buf[..inside], host);
        read.map_err(|e| e.at_opt(file.storage.path()))?;
        if file.is_swapped(self.mode) {
            swap(buf, self.mode);
        }
        Ok(())
    }
}

/// Swaps the bytes of each sample of sound.
fn swap(bytes: &mut [u8], mode: Mode) {
    for sector in bytes.chunks_mut(mode.len()) {
        let sound = sector.len().min(RAW);
        sector[..sound]
            .as_chunks_mut::<2>()
            .0
            .iter_mut()
            .for_each(|pair| pair.reverse());
    }
}

/// A sector as a whole, without subchannels; what is not stored of it is made where it is known.
pub(super) fn expand(stored: &[u8], mode: Mode) -> Raw {
    let mut raw = [0; RAW];
    let window = mode.stored();
    let end = window.end.min(RAW);
    let len = (end - window.start).min(stored.len());
    raw[window.start..window.start + len].copy_from_slice(&stored[..len]);
    if matches!(mode, Mode::Mode2Data | Mode::CdiData) {
        raw[..SYNC.len()].copy_from_slice(&SYNC);
        raw[15] = 2;
    }
    raw
}

/// Where a sector is stored.
struct Place<'a> {
    track: &'a Track,
    stored: Stored,
    /// Which of those it is.
    index: u64,
}

impl Cue {
    fn find(&self, lba: u64) -> Result<Place<'_>> {
        let missing = |text: String| Error::new(ErrorKind::NotFound, text);
        let Some((track, run)) = self.table.find(lba) else {
            return Err(match lba < self.table.end {
                true => missing(format!(
                    "sector {lba} is between two sessions: it is not stored"
                )),
                false => past_the_end(lba, self.table.end),
            });
        };
        let Some(stored) = Stored::of_run(track, run) else {
            let number = track.number;
            let text = format!("sector {lba} is in a gap of track {number} that is not stored");
            return Err(missing(text));
        };
        Ok(Place {
            track,
            stored,
            index: lba - run.lba,
        })
    }

    /// Reads one sector as a whole, with subchannels where it has them; what is not stored is 0.
    fn whole(&self, place: &Place<'_>, buf: &mut [u8]) -> Result<Form> {
        let mut bytes = Vec::new();
        place
            .stored
            .read(&self.files, place.index..place.index + 1, &mut bytes)?;
        let window = place.track.mode.stored();
        buf.fill(0);
        buf[window].copy_from_slice(&bytes);
        Ok(form(place.track.mode, &expand(&bytes, place.track.mode)))
    }

    /// Reads one sector as a whole, corrected.
    pub(super) fn drive(&self, lba: u64, buf: &mut [u8]) -> Result<Form> {
        let place = self.find(lba)?;
        let mode = place.track.mode;
        let mut bytes = Vec::new();
        place
            .stored
            .read(&self.files, place.index..place.index + 1, &mut bytes)?;
        buf.fill(0);
        buf[mode.stored()].copy_from_slice(&bytes);
        if let Some(form) = mode.form() {
            return Ok(form);
        }
        let decoded = self.decode(lba, mode, &expand(&bytes, mode))?;
        let window = mode.stored();
        buf[window.clone()].copy_from_slice(&decoded.raw[window]);
        self.note(lba, &decoded);
        Ok(decoded.form)
    }

    /// Writes what differs of a sector.
    fn store(&self, place: &Place<'_>, old: &[u8], new: &[u8]) -> Result<()> {
        let mode = place.track.mode;
        let (mut old, mut new) = (old[mode.stored()].to_vec(), new[mode.stored()].to_vec());
        let Some(file) = self.files.get(place.stored.file) else {
            return Ok(());
        };
        if file.is_swapped(mode) {
            swap(&mut old, mode);
            swap(&mut new, mode);
        }
        let differs = |n: &usize| old[*n] != new[*n];
        let (Some(first), Some(last)) =
            ((0..old.len()).find(differs), (0..old.len()).rfind(differs))
        else {
            return Ok(());
        };
        let host = place.stored.host + place.index * len64(mode.len());
        if host + len64(last) >= place.stored.end {
            return Err(Error::unsupported("the file ends within the sector"));
        }
        let written = file
            .storage
            .write_at(&new[first..=last], host + len64(first));
        written.map_err(|e| e.at_opt(file.storage.path()))
    }

    /// Puts a corrected sector in the place of what is stored of it.
    pub(super) fn mend(&self, lba: u64) -> Result<Option<Faults>> {
        let _one = self.changing.lock();
        let place = self.find(lba)?;
        let mode = place.track.mode;
        let mut old = vec![0; self.whole_len()];
        self.whole(&place, &mut old)?;
        let raw = expand(&old[mode.stored()], mode);
        let Some((_, found)) = disc::correct(&raw, mode.declared()) else {
            return Ok(None);
        };
        let mut new = old.clone();
        let window = mode.stored();
        new[window.clone()].copy_from_slice(&found[window]);
        self.store(&place, &old, &new)?;
        Ok(Some(disc::judge(&found, mode.declared()).faults))
    }
}

/// The form of a sector of a track.
fn form(mode: Mode, raw: &Raw) -> Form {
    mode.form()
        .unwrap_or_else(|| disc::judge(raw, mode.declared()).form)
}

impl Sectors for Cue {
    fn end(&self) -> u64 {
        self.table.end
    }

    fn whole_len(&self) -> usize {
        let has_more = self
            .table
            .tracks
            .iter()
            .any(|track| track.mode == Mode::Cdg);
        RAW + if has_more { SUBCHANNEL } else { 0 }
    }

    fn fetch(&self, lba: u64, buf: &mut [u8]) -> Result<Layout> {
        let place = self.find(lba)?;
        let form = self.whole(&place, buf)?;
        Ok(form.layout(&place.track.mode.stored()))
    }

    fn change(
        &self,
        lba: u64,
        parts: Parts,
        change: &mut dyn FnMut(&mut [u8], &Layout) -> Result<Whole>,
    ) -> Result<()> {
        if !self.write {
            return Err(Error::read_only());
        }
        let _one = self.changing.lock();
        let place = self.find(lba)?;
        let mode = place.track.mode;
        let mut old = vec![0; self.whole_len()];
        let was = self.whole(&place, &mut old)?;
        if was == Form::Empty && parts.has(Parts::DATA) && !parts.has(Parts::ALL) {
            return Err(Error::invalid(format!(
                "sector {lba} is of mode 0, which has no data but zeroes (--parts all replaces it)"
            )));
        }
        let mut new = old.clone();
        let whole = change(&mut new, &was.layout(&mode.stored()))?;
        let codes = Parts::EDC.union(Parts::ECC);
        if mode.form().is_none() && !parts.without(codes).is_empty() {
            let replaced = parts.has(Parts::DATA) && whole == Whole::Yes;
            let before = expand(&old[mode.stored()], mode);
            let judged = disc::judge(&before, mode.declared());
            if judged.is_damaged() && !replaced {
                return Err(Error::corrupt(format!(
                    "sector {lba}: its {} are wrong, and new codes for a part of it would hide that (check -r all corrects it, or all of its data is written)",
                    judged.faults.names().join(", ")
                )));
            }
            renew(&mut new, &old, mode, parts);
        }
        self.store(&place, &old, &new)
    }
}

/// Makes the codes of a sector anew that are not among `parts`.
fn renew(new: &mut [u8], old: &[u8], mode: Mode, parts: Parts) {
    let window = mode.stored();
    let mut raw = expand(&new[window.clone()], mode);
    let form = form(mode, &raw);
    let given = raw;
    disc::make_codes(&mut raw, form);
    if form == Form::Form2 && is_zero(&old[2348..RAW]) {
        // It has no code, and need not.
        raw[2348..].fill(0);
    }
    for (part, range) in form.parts() {
        let is_code = matches!(*part, Parts::EDC | Parts::ECC);
        if is_code && parts.has(*part) {
            raw[range.clone()].copy_from_slice(&given[range.clone()]);
        }
    }
    let end = window.end.min(RAW);
    new[window.start..end].copy_from_slice(&raw[window.start..end]);
}

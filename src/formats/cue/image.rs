//! An open disc: the track that is the disk, and where its bytes are.

use std::sync::Arc;

use parking_lot::Mutex;

use super::open::{Bin, Opened, open};
use super::sectors::{Stored, expand};
use crate::error::{Error, ErrorKind, Result};
use crate::image::disc::{self, Damage, Disc, Form, Mode, RAW, Raw, Table, Track, USER};
use crate::image::info::Detail;
use crate::image::open::{Damaged, OpenOptions, Purpose};
use crate::image::sector::Sectors;
use crate::image::{Caps, Check, Driver, Image, Part, Role, Run, Source, Wait};
use crate::storage::open::Access;
use crate::storage::{Limits, Storage};
use crate::util::align::{clamp_len, len64};
use crate::util::progress::Progress;

/// Sectors that are read at a time.
pub(super) const BATCH: u64 = 64;

/// An open disc.
#[derive(Debug)]
pub(super) struct Cue {
    header: Arc<dyn Storage>,
    pub(super) files: Vec<Bin>,
    pub(super) table: Table,
    /// The track that is the disk, and where it is stored.
    disk: Option<(usize, Stored)>,
    pub(super) write: bool,
    damaged: Damaged,
    damage: Mutex<Damage>,
    /// Held by whoever changes a sector: it is read, and written with new codes.
    pub(super) changing: Mutex<()>,
}

impl Cue {
    /// Opens the disc that `header` describes, or is.
    pub(super) fn open(header: Arc<dyn Storage>, options: &OpenOptions) -> Result<Self> {
        let Opened { files, table } = open(&header, options)?;
        let track = chosen(&table, options)?;
        let disk = track.and_then(|n| Some((n, Stored::of(&table.tracks[n])?)));
        Ok(Self {
            header,
            files,
            disk,
            table,
            write: options.access == Access::Write,
            damaged: options.damaged,
            damage: Mutex::default(),
            changing: Mutex::new(()),
        })
    }

    /// Bytes of a sector as a part of the disk.
    fn unit(mode: Mode) -> u64 {
        len64(if mode.is_audio() { RAW } else { USER })
    }

    fn disk(&self) -> Option<(&Track, &Stored)> {
        let (track, stored) = self.disk.as_ref()?;
        Some((self.table.tracks.get(*track)?, stored))
    }

    fn no_disk() -> Error {
        Error::unsupported("has no track that is the disk")
    }

    /// Where the bytes of the disk are stored as they are: offset of the first, and of the end.
    fn in_place(&self, stored: &Stored) -> Option<std::ops::Range<u64>> {
        let swapped = self
            .files
            .get(stored.file)
            .is_some_and(|f| f.is_swapped(stored.mode));
        let is_plain = matches!(
            stored.mode,
            Mode::Mode1Data | Mode::Mode2Form1 | Mode::Audio
        );
        (is_plain && !swapped).then_some(stored.host..stored.end)
    }

    /// What the sector at `lba` is to one who reads the disk.
    pub(super) fn decode(&self, lba: u64, mode: Mode, raw: &Raw) -> Result<Decoded> {
        if let Some(form) = mode.form() {
            return Ok(Decoded {
                form,
                raw: *raw,
                what: What::Right,
            });
        }
        let judged = disc::judge(raw, mode.declared());
        if !judged.is_damaged() {
            return Ok(Decoded {
                form: judged.form,
                raw: *raw,
                what: What::Right,
            });
        }
        if let Some((form, raw)) = disc::correct(raw, mode.declared()) {
            return Ok(Decoded {
                form,
                raw,
                what: What::Corrected,
            });
        }
        match self.damaged {
            Damaged::AsStored => Ok(Decoded {
                form: judged.form,
                raw: *raw,
                what: What::AsStored,
            }),
            Damaged::Refuse => Err(Error::corrupt(format!(
                "sector {lba} ({}) is damaged: its {} are wrong and do not tell what was there",
                disc::Msf::of_lba(lba),
                judged.faults.names().join(", ")
            ))),
        }
    }

    /// The bytes that the sector at `lba` gives the disk.
    fn user(&self, lba: u64, mode: Mode, raw: &Raw, out: &mut [u8]) -> Result<()> {
        if mode.is_audio() {
            out.copy_from_slice(raw);
            return Ok(());
        }
        let decoded = self.decode(lba, mode, raw)?;
        let user = decoded.user(lba)?;
        out.copy_from_slice(&decoded.raw[user]);
        self.note(lba, &decoded);
        Ok(())
    }

    /// Remembers what was wrong with a sector that was read.
    pub(super) fn note(&self, lba: u64, decoded: &Decoded) {
        match decoded.what {
            What::Right => {}
            What::Corrected => drop(self.damage.lock().corrected.insert(lba)),
            What::AsStored => drop(self.damage.lock().as_stored.insert(lba)),
        }
    }
}

/// A sector as it is read.
pub(super) struct Decoded {
    pub(super) form: Form,
    pub(super) raw: Raw,
    what: What,
}

enum What {
    Right,
    Corrected,
    AsStored,
}

impl Decoded {
    /// Where the data of the disk is in it.
    pub(super) fn user(&self, lba: u64) -> Result<std::ops::Range<usize>> {
        self.form.user().ok_or_else(|| {
            Error::corrupt(format!(
                "sector {lba} ({}) is of {}, and has no 2048 bytes of a disk",
                disc::Msf::of_lba(lba),
                self.form.name()
            ))
        })
    }
}

/// The track that is the disk.
fn chosen(table: &Table, options: &OpenOptions) -> Result<Option<usize>> {
    let index = |track: &Track| table.tracks.iter().position(|t| t.number == track.number);
    let (first, last) = (table.tracks.first(), table.tracks.last());
    let numbers = |track: Option<&Track>| track.map_or(0, |track| track.number);
    let allowed = format!("{} to {}", numbers(first), numbers(last));
    if let Some(number) = options.values.number("track") {
        let Some(track) = table.track(number) else {
            return Err(Error::invalid(format!(
                "has no track {number} (allowed: {allowed})"
            )));
        };
        return Ok(index(track));
    }
    match (table.first_data().and_then(index), options.purpose) {
        (None, Purpose::Use) => Err(Error::unsupported(format!(
            "has no track with data, so it is no disk (--open-options track=N takes the sound of track N, {allowed})"
        ))),
        (track, _) => Ok(track),
    }
}

impl Image for Cue {
    fn driver(&self) -> &'static Driver {
        &super::DRIVER
    }

    fn virtual_size(&self) -> u64 {
        self.disk()
            .map_or(0, |(_, stored)| stored.sectors * Self::unit(stored.mode))
    }

    fn cluster_size(&self) -> Option<u64> {
        None
    }

    fn limits(&self) -> Limits {
        let is_audio = self.disk().is_some_and(|(track, _)| track.mode.is_audio());
        Limits {
            align: if is_audio { 4 } else { 2048 },
            buf_align: 1,
            zero_align: 0,
            discard_align: 0,
        }
    }

    fn caps(&self) -> Caps {
        let disk = self.disk().map(|(_, stored)| stored);
        let encoded = disk.filter(|stored| self.in_place(stored).is_none());
        let encoded = encoded.map(|stored| Self::unit(stored.mode));
        Caps {
            host_offsets: encoded.is_none(),
            offsets_stay: encoded.is_none(),
            encoded,
            ..Caps::STORED
        }
    }

    fn read_only(&self) -> Error {
        let text =
            "the disk of a disc is read-only (io -c \"write --parts data\" changes its sectors)";
        Error::new(ErrorKind::ReadOnly, text)
    }

    fn storage(&self) -> &dyn Storage {
        &*self.header
    }

    fn map(&self, at: u64, len: u64, _wait: Wait) -> Result<Run<'_>> {
        let (_, stored) = self.disk().ok_or_else(Self::no_disk)?;
        let len = len.min(self.virtual_size().saturating_sub(at));
        let file = self.files.get(stored.file).ok_or_else(Self::no_disk)?;
        let Some(host) = self.in_place(stored) else {
            let source = Source::Encoded;
            return Ok(Run { len, source });
        };
        let inside = (host.end - host.start).saturating_sub(at);
        Ok(match inside {
            0 => Run {
                len,
                source: Source::Zero,
            },
            inside => Run {
                len: len.min(inside),
                source: Source::Stored {
                    storage: &*file.storage,
                    host: host.start + at,
                    writable: false,
                },
            },
        })
    }

    fn read_encoded(&self, buf: &mut [u8], at: u64) -> Result<usize> {
        let (track, stored) = self.disk().ok_or_else(Self::no_disk)?;
        let unit = Self::unit(stored.mode);
        let size = clamp_len(unit, RAW);
        let mut sector = [0; RAW];
        let mut scratch = Vec::new();
        let mut done = 0;
        while done < buf.len() {
            let first = (at + len64(done)) / unit;
            let last = (at + len64(buf.len()))
                .div_ceil(unit)
                .min(first + BATCH)
                .min(stored.sectors);
            if last <= first {
                break;
            }
            stored.read(&self.files, first..last, &mut scratch)?;
            for (n, bytes) in (first..last).zip(scratch.chunks(stored.mode.len())) {
                let raw = expand(bytes, stored.mode);
                self.user(track.lba + n, stored.mode, &raw, &mut sector[..size])?;
                let skipped = clamp_len((at + len64(done)).saturating_sub(n * unit), size);
                let len = (size - skipped).min(buf.len() - done);
                buf[done..done + len].copy_from_slice(&sector[skipped..skipped + len]);
                done += len;
            }
        }
        Ok(done)
    }

    fn flush(&self) -> Result<()> {
        match self.write {
            true => self.files.iter().try_for_each(|file| file.storage.sync()),
            false => Ok(()),
        }
    }

    fn close(&self) -> Result<()> {
        self.flush()
    }

    fn parts(&self) -> Vec<Part<'_>> {
        let part = |role, storage| Part { role, storage };
        let is_header = |file: &Bin| Arc::ptr_eq(&file.storage, &self.header);
        // A file that is named several times is one.
        let is_new = |n: usize, file: &Bin| {
            let mut before = self.files[..n].iter();
            !before.any(|other| Arc::ptr_eq(&other.storage, &file.storage))
        };
        let files = self.files.iter().enumerate();
        let files = files.filter(|(n, file)| !is_header(file) && is_new(*n, file));
        let files = files.map(|(_, file)| part(Role::Data, &*file.storage));
        std::iter::once(part(Role::Header, self.storage()))
            .chain(files)
            .collect()
    }

    fn details(&self) -> Vec<Detail> {
        super::details::details(self)
    }

    fn as_check(&self) -> Option<&dyn Check> {
        Some(self)
    }

    fn as_sectors(&self) -> Option<&dyn Sectors> {
        Some(self)
    }

    fn as_disc(&self) -> Option<&dyn Disc> {
        Some(self)
    }
}

impl Disc for Cue {
    fn table(&self) -> &Table {
        &self.table
    }

    fn file(&self, index: usize) -> Option<&dyn Storage> {
        self.files.get(index).map(|file| &*file.storage)
    }

    fn track(&self) -> Option<&Track> {
        self.disk().map(|(track, _)| track)
    }

    fn corrected(&self, lba: u64, buf: &mut [u8]) -> Result<Form> {
        self.drive(lba, buf)
    }

    fn damage(&self) -> Damage {
        self.damage.lock().clone()
    }

    fn unreadable(&self, progress: &dyn Progress) -> Result<Vec<u64>> {
        let Some((number, stored)) = self.disk else {
            return Ok(Vec::new());
        };
        if self.in_place(&stored).is_some() {
            return Ok(Vec::new());
        }
        let look = |track: &Track, lba: u64, raw: &Raw| {
            let decoded = self.decode(lba, track.mode, raw);
            decoded.and_then(|d| d.user(lba)).is_err().then_some(())
        };
        let found = self.scan(&[number], progress, &look, &|()| {})?;
        Ok(found.into_iter().map(|(lba, ())| lba).collect())
    }
}

//! Writing, zeroing, discarding: overwrite in place, or get space and copy what is not covered.

use std::ops::Range;

use crate::chain::Chain;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Old, Slot, Source, Wait};
use crate::storage::{Storage, Zeroing, zero_or_write};
use crate::util::align::{clamp_len, len64};
use crate::util::buf::AlignedBuf;
use crate::util::range;

/// Copy-on-write moves at most this much at a time.
const COW_STEP: u64 = 256 << 10;
/// How often space is asked for that others are said to have made first.
const LOOKS: u32 = 100_000;
/// Bytes in memory of what is the same all over: they fit a processor's own cache.
const SAME_STEP: usize = 1 << 20;
/// Where they begin: fit for direct I/O.
const SAME_ALIGN: usize = 4096;

/// Told where bytes are stored.
pub type Stored<'f> = dyn FnMut(&dyn Storage, Range<u64>) -> Result<()> + 'f;

/// What a slot's part of the request is filled with.
#[derive(Debug, Clone, Copy)]
enum With<'a> {
    /// These bytes, the first of which belongs at the start of the range.
    Bytes(&'a [u8]),
    /// These bytes, all the same, over and over.
    Same(&'a [u8]),
    /// Zeroes.
    Zeroes(Zeroing),
}

impl With<'_> {
    /// What belongs `done` bytes after the start of the range.
    fn after(self, done: u64) -> Self {
        match self {
            Self::Bytes(bytes) => Self::Bytes(&bytes[clamp_len(done, bytes.len())..]),
            same => same,
        }
    }

    /// Writes the first `len` bytes.
    fn write(self, storage: &dyn Storage, host: u64, len: u64) -> Result<()> {
        match self {
            Self::Bytes(bytes) => storage.write_at(&bytes[..clamp_len(len, bytes.len())], host),
            Self::Same(bytes) => {
                let mut done = 0;
                while done < len {
                    let step = clamp_len(len - done, bytes.len());
                    storage.write_at(&bytes[..step], host + done)?;
                    done += len64(step);
                }
                Ok(())
            }
            Self::Zeroes(how) => zero_or_write(storage, host..host + len, how),
        }
    }
}

impl Chain {
    /// Writes all of `buf` at `at`, into the top layer.
    ///
    /// # Errors
    /// `OutOfRange` past the end of the disk; `ReadOnly`; those of the layers.  After an error any
    /// part of the range may have been written.
    pub fn write_at(&self, buf: &[u8], at: u64) -> Result<()> {
        self.write_all(at..at.saturating_add(len64(buf.len())), With::Bytes(buf))
    }

    /// Writes `byte` all over a range, into the top layer.
    ///
    /// # Errors
    /// As [`Chain::write_at`].
    pub fn fill_with(&self, byte: u8, range: Range<u64>) -> Result<()> {
        let mut buf = AlignedBuf::new(clamp_len(range::len(&range), SAME_STEP), SAME_ALIGN);
        buf.fill(byte);
        self.write_all(range, With::Same(&buf))
    }

    fn write_all(&self, range: Range<u64>, with: With<'_>) -> Result<()> {
        self.check_write(range.start, range::len(&range))?;
        let _ticket = self.enter();
        let (mut at, mut looks) = (range.start, 0);
        while at < range.end {
            let left = range.end - at;
            let rest = with.after(at - range.start);
            let done = match self.writable_at(at, left)? {
                Place::Stored { storage, host, len } => {
                    let len = len.min(left);
                    rest.write(storage, host, len)?;
                    len
                }
                Place::Unallocated => self.allocate(at, left, rest)?.min(left),
            };
            looks = if done == 0 { looks + 1 } else { 0 };
            if looks == LOOKS {
                return Err(self.no_space(at));
            }
            at += done;
        }
        Ok(())
    }

    fn no_space(&self, at: u64) -> Error {
        let text = format!("the bytes at {at:#x} got no space in {LOOKS} tries");
        Error::new(ErrorKind::Io, text).at_opt(self.top().storage().path())
    }

    /// Makes a range read as zeroes, by metadata or holes where that is possible.
    ///
    /// # Errors
    /// As [`Chain::write_at`].
    pub fn zero(&self, range: Range<u64>, how: Zeroing) -> Result<()> {
        self.check_write(range.start, range::len(&range))?;
        let _ticket = self.enter();
        let cut = self.cut(&range, self.top().limits().zero_align);
        if cut.body.is_empty() {
            return self.zero_runs(range, how);
        }
        match self.top().zero(cut.body.clone(), how) {
            Ok(()) => {
                self.zero_runs(cut.head, how)?;
                self.zero_runs(cut.tail, how)
            }
            Err(e) if e.kind() == ErrorKind::Unsupported => self.zero_runs(range, how),
            Err(e) => Err(e.at_opt(self.top().storage().path())),
        }
    }

    /// Makes a range read as zeroes where that needs no data to be written.
    ///
    /// # Errors
    /// `Unsupported`, with nothing changed, where it does; else as [`Chain::write_at`].
    pub fn zero_fast(&self, range: Range<u64>, how: Zeroing) -> Result<()> {
        self.check_write(range.start, range::len(&range))?;
        let _ticket = self.enter();
        let top = self.top();
        let cut = self.cut(&range, top.limits().zero_align);
        let done = match (cut.head.is_empty(), cut.tail.is_empty()) {
            (true, true) if range.is_empty() => Ok(()),
            (true, true) => top.zero(cut.body, how),
            _ => Err(Error::unsupported(format!(
                "zeroing {:#x}..{:#x} needs data to be written: it is not made of whole clusters",
                range.start, range.end
            ))),
        };
        done.map_err(|e| e.at_opt(top.storage().path()))
    }

    /// Gives all of a range that has none space of its own in the top layer, zeroes there; what is
    /// stored stays.  Calls `stored` with where each part is then, in order.  All of the range reads
    /// as zeroes, so that bitmaps take no note.  Called when no request is under way.
    ///
    /// # Errors
    /// As [`Chain::write_at`]; those of `stored`.
    pub fn give_space(&self, range: Range<u64>, stored: &mut Stored<'_>) -> Result<()> {
        self.check_write(range.start, range::len(&range))?;
        let _ticket = self.enter();
        let mut give = || self.give_all(&range, stored);
        match self.top().as_resize() {
            Some(resize) => resize.unrecorded(&mut give),
            None => give(),
        }
    }

    fn give_all(&self, range: &Range<u64>, stored: &mut Stored<'_>) -> Result<()> {
        let (mut at, mut looks) = (range.start, 0);
        while at < range.end {
            match self.writable_at(at, range.end - at)? {
                Place::Stored { storage, host, len } => {
                    stored(storage, host..host + len)?;
                    at += len;
                    looks = 0;
                }
                Place::Unallocated if looks == LOOKS => return Err(self.no_space(at)),
                Place::Unallocated => {
                    self.allocate(at, range.end - at, With::Zeroes(Zeroing::KeepSpace))?;
                    looks += 1;
                }
            }
        }
        Ok(())
    }

    /// Gives back what space a range has, where that is possible; each byte of it reads afterwards
    /// as zero or as before.  What the top layer has never shows what lies below again.
    ///
    /// # Errors
    /// As [`Chain::write_at`]; that a format or host cannot is not an error.
    pub fn discard(&self, range: Range<u64>) -> Result<()> {
        self.check_write(range.start, range::len(&range))?;
        let _ticket = self.enter();
        let cut = self.cut(&range, self.top().limits().discard_align);
        if cut.body.is_empty() {
            return self.punch_runs(range);
        }
        match self.top().discard(cut.body.clone()) {
            Ok(()) => {
                self.punch_runs(cut.head)?;
                self.punch_runs(cut.tail)
            }
            Err(e) if e.kind() == ErrorKind::Unsupported => self.punch_runs(range),
            Err(e) => Err(e.at_opt(self.top().storage().path())),
        }
    }

    pub(super) fn check_write(&self, at: u64, len: u64) -> Result<()> {
        self.check_range(at, len)?;
        match self.top().caps().write {
            true => Ok(()),
            false => Err(self.top().read_only().at_opt(self.top().storage().path())),
        }
    }

    /// Cuts a range at a unit, where 0 stands for "never aligned".  A range that ends with the
    /// disk ends aligned.
    fn cut(&self, range: &Range<u64>, unit: u32) -> range::Cut {
        if unit == 0 {
            let none = range.end..range.end;
            return range::Cut {
                head: range.clone(),
                body: none.clone(),
                tail: none,
            };
        }
        let mut cut = range::cut(range, u64::from(unit));
        if range.end == self.virtual_size() && cut.head.end < range.end {
            cut.body.end = range.end;
            cut.tail.start = range.end;
        }
        cut
    }

    fn writable_at(&self, at: u64, len: u64) -> Result<Place<'_>> {
        let run = self.top().map(at, len, Wait::Yes);
        let run = run.map_err(|e| e.at_opt(self.top().storage().path()))?;
        Ok(match run.source {
            Source::Stored {
                storage,
                host,
                writable: true,
            } => Place::Stored {
                storage,
                host,
                len: run.len,
            },
            _ => Place::Unallocated,
        })
    }

    /// Has the top layer give space to the bytes from `at`; 0 when another thread was first.
    fn allocate(&self, at: u64, len: u64, with: With<'_>) -> Result<u64> {
        let request = at..at + len;
        let mut fill = |slot: Slot<'_>| self.fill(&slot, &request, with);
        let done = self.top().allocate_ahead(at, len, &mut fill);
        done.map_err(|e| e.at_opt(self.top().storage().path()))
    }

    /// Writes a slot: the request's part from `with`, the rest as it was.
    fn fill(&self, slot: &Slot<'_>, request: &Range<u64>, with: With<'_>) -> Result<()> {
        let Some(part) = range::intersect(&slot.guest, request) else {
            return self.keep(slot, slot.guest.clone());
        };
        self.keep(slot, slot.guest.start..part.start)?;
        let host = slot.host + (part.start - slot.guest.start);
        if !(slot.zeroed && matches!(with, With::Zeroes(_))) {
            let with = with.after(part.start - request.start);
            with.write(slot.storage, host, range::len(&part))?;
        }
        self.keep(slot, part.end..slot.guest.end)
    }

    /// Writes the part of a slot that the request does not cover as it was before.
    fn keep(&self, slot: &Slot<'_>, part: Range<u64>) -> Result<()> {
        if part.is_empty() {
            return Ok(());
        }
        let host = slot.host + (part.start - slot.guest.start);
        match slot.old {
            Old::Zero if slot.zeroed => Ok(()),
            Old::Zero => zero_or_write(
                slot.storage,
                host..host + range::len(&part),
                Zeroing::MayUnmap,
            ),
            Old::Bytes(bytes) => {
                let first = clamp_len(part.start - slot.guest.start, bytes.len());
                let end = clamp_len(part.end - slot.guest.start, bytes.len());
                slot.storage.write_at(&bytes[first..end], host)
            }
            Old::Below => self.copy_up(slot, part, host),
            Old::Replaced => Err(Error::invalid(format!(
                "the bytes at {:#x} are gone, and the request does not bring them",
                part.start
            ))),
        }
    }

    fn copy_up(&self, slot: &Slot<'_>, part: Range<u64>, host: u64) -> Result<()> {
        let mut buf = vec![0; clamp_len(range::len(&part).min(COW_STEP), usize::MAX)];
        let mut at = part.start;
        while at < part.end {
            let step = clamp_len(part.end - at, buf.len());
            let found = self.resolve_from(1, at, len64(step), Wait::Yes)?;
            let zero = matches!(found.source, Source::Zero | Source::Below);
            if zero && slot.zeroed {
                at += found.len;
                continue;
            }
            self.read_from(1, &mut buf[..step], at)?;
            slot.storage
                .write_at(&buf[..step], host + (at - part.start))?;
            at += len64(step);
        }
        Ok(())
    }

    /// Zeroes run by run: nothing to do for zeroes, in place for what is stored, new space
    /// otherwise.
    fn zero_runs(&self, range: Range<u64>, how: Zeroing) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let found = self.resolve_from(0, at, range.end - at, Wait::Yes)?;
            at += match found.source {
                Source::Zero | Source::Below => found.len,
                Source::Stored {
                    storage,
                    host,
                    writable: true,
                } if found.depth == 0 => {
                    zero_or_write(storage, host..host + found.len, how)?;
                    found.len
                }
                _ => self.allocate(at, found.len, With::Zeroes(how))?,
            };
        }
        Ok(())
    }

    /// Punches what the top layer stores in a range; what cannot be punched stays.
    fn punch_runs(&self, range: Range<u64>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let top = self.top();
            let run = top.map(at, range.end - at, Wait::Yes);
            let run = run.map_err(|e| e.at_opt(top.storage().path()))?;
            if let Source::Stored {
                storage,
                host,
                writable: true,
            } = run.source
            {
                match storage.zero(host..host + run.len, Zeroing::MayUnmap) {
                    Err(e) if e.kind() == ErrorKind::Unsupported => {}
                    done => done?,
                }
            }
            at += run.len;
        }
        Ok(())
    }
}

/// Where a write goes.
enum Place<'a> {
    /// Straight to the storage.
    Stored {
        storage: &'a dyn crate::storage::Storage,
        host: u64,
        len: u64,
    },
    /// To new space.
    Unallocated,
}

//! A decoder that goes forward, and the places from which it can begin.

use std::fmt;
use std::sync::Arc;

use libdeflater::Crc;
use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_HAS_MORE_INPUT;
use miniz_oxide::inflate::core::{DecompressorOxide, TINFL_LZ_DICT_SIZE, decompress};

use crate::container::gzip::header;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;
use crate::util::align::{clamp_len, len64};

/// Bytes of what is compressed that are read at a time.
const INPUT: usize = 64 << 10;

/// Bytes of a header without texts.
const SHORT: usize = 10;

/// Where in a member the decoder is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Before a header, or at the end.
    Header,
    Data,
    /// Before the sums behind the data.
    Sums,
}

/// A place from which decoding can go on.
#[derive(Clone)]
pub(super) struct Point {
    at: u64,
    input: u64,
    decoder: Box<DecompressorOxide>,
    window: Box<[u8]>,
    place: usize,
}

impl Point {
    /// Decoded bytes before it.
    pub(super) fn at(&self) -> u64 {
        self.at
    }
}

impl fmt::Debug for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Point({:#x})", self.at)
    }
}

/// A decoder that goes forward.
pub(super) struct Cursor {
    storage: Arc<dyn Storage>,
    /// Whether the sums of members are compared.
    compare: bool,
    /// Decoded bytes that were handed out.
    at: u64,
    /// Where what is in `input` begins in `storage`, and how much of it was taken.
    start: u64,
    input: Vec<u8>,
    taken: usize,
    phase: Phase,
    decoder: Box<DecompressorOxide>,
    /// The last 32 KiB, in a ring.
    window: Box<[u8]>,
    /// Where in the ring the next byte goes.
    place: usize,
    /// Of the bytes before `place`, those that were not handed out.
    waiting: usize,
    /// Of this member.
    sum: Crc,
    len: u32,
    /// Members that were whole.
    members: u64,
}

impl fmt::Debug for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cursor({:#x})", self.at)
    }
}

impl Cursor {
    /// At the start.
    pub(super) fn new(storage: Arc<dyn Storage>, compare: bool) -> Self {
        Self {
            storage,
            compare,
            at: 0,
            start: 0,
            input: Vec::new(),
            taken: 0,
            phase: Phase::Header,
            decoder: Box::default(),
            window: vec![0; TINFL_LZ_DICT_SIZE].into(),
            place: 0,
            waiting: 0,
            sum: Crc::new(),
            len: 0,
            members: 0,
        }
    }

    /// At a place that another one was at.  The sums of members are not compared.
    pub(super) fn resume(storage: Arc<dyn Storage>, point: &Point) -> Self {
        let point = point.clone();
        Self {
            at: point.at,
            start: point.input,
            phase: Phase::Data,
            decoder: point.decoder,
            window: point.window,
            place: point.place,
            members: 1,
            ..Self::new(storage, false)
        }
    }

    /// Decoded bytes before where it is.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// Where it is, as far as decoding can go on from there.
    pub(super) fn point(&self) -> Option<Point> {
        (self.phase == Phase::Data && self.waiting == 0).then(|| Point {
            at: self.at,
            input: self.offset(),
            decoder: self.decoder.clone(),
            window: self.window.clone(),
            place: self.place,
        })
    }

    /// Decodes into `buf`, which is not empty; 0 is the end.
    ///
    /// # Errors
    /// `WrongFormat` where it does not begin as gzip does; `Corrupt`; the host's.
    pub(super) fn read(&mut self, buf: &mut [u8]) -> Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            if self.waiting > 0 {
                done += self.hand_out(&mut buf[done..]);
                continue;
            }
            match self.phase {
                Phase::Header => {
                    if !self.header()? {
                        break;
                    }
                }
                Phase::Data => self.decode()?,
                Phase::Sums => self.sums()?,
            }
        }
        self.at += len64(done);
        Ok(done)
    }

    /// The error of what is wrong where it is.
    pub(super) fn damaged(&self, what: &str) -> Error {
        let at = self.offset();
        Error::corrupt(format!("what is compressed by gzip {what} (at {at:#x})"))
            .at_opt(self.storage.path())
    }

    /// Bytes of what is compressed before where it is.
    pub(super) fn offset(&self) -> u64 {
        self.start + len64(self.taken)
    }

    fn hand_out(&mut self, buf: &mut [u8]) -> usize {
        let from = self.place.wrapping_sub(self.waiting) & (TINFL_LZ_DICT_SIZE - 1);
        let len = buf.len().min(self.waiting);
        // What is decoded at a time ends with the ring.
        buf[..len].copy_from_slice(&self.window[from..from + len]);
        self.waiting -= len;
        len
    }

    /// Has at least `len` bytes of input at hand, as far as there are so many.
    fn want(&mut self, len: usize) -> Result<()> {
        if self.input.len() - self.taken >= len {
            return Ok(());
        }
        self.start = self.offset();
        self.taken = 0;
        let rest = self.storage.size().saturating_sub(self.start);
        self.input.resize(clamp_len(rest, len.max(INPUT)), 0);
        self.storage.read_at(&mut self.input, self.start)
    }

    fn rest(&self) -> &[u8] {
        &self.input[self.taken..]
    }

    /// Whether there is input behind what is at hand.
    fn has_more(&self) -> bool {
        self.start + len64(self.input.len()) < self.storage.size()
    }

    /// Takes the header of a member; whether there is one.
    fn header(&mut self) -> Result<bool> {
        self.want(SHORT)?;
        if self.members > 0 && self.is_padding()? {
            return Ok(false);
        }
        let mut found = header::len(self.rest());
        if found == Ok(None) {
            self.want(header::MAX)?;
            found = header::len(self.rest());
        }
        match found {
            Ok(Some(len)) => self.taken += len,
            Ok(None) if self.members == 0 && self.rest().len() < SHORT => {
                let text = "is not compressed by gzip: it has less than 10 bytes";
                return Err(self.no_gzip(text));
            }
            Ok(None) => return Err(self.damaged("was cut within a header")),
            Err(what) if self.members == 0 => return Err(self.no_gzip(what)),
            Err(_) => return Err(self.damaged("has something else behind its end")),
        }
        *self.decoder = DecompressorOxide::new();
        (self.sum, self.len) = (Crc::new(), 0);
        self.phase = Phase::Data;
        Ok(true)
    }

    fn no_gzip(&self, text: &str) -> Error {
        Error::new(ErrorKind::WrongFormat, text).at_opt(self.storage.path())
    }

    /// Whether nothing follows but zeroes, which are taken.
    fn is_padding(&mut self) -> Result<bool> {
        if self.rest().first().is_some_and(|byte| *byte != 0) {
            return Ok(false);
        }
        loop {
            if self.rest().iter().any(|byte| *byte != 0) {
                return Err(self.damaged("has something else behind its end"));
            }
            self.taken = self.input.len();
            self.want(1)?;
            if self.rest().is_empty() {
                return Ok(true);
            }
        }
    }

    fn decode(&mut self) -> Result<()> {
        self.want(1)?;
        let flags = match self.has_more() {
            true => TINFL_FLAG_HAS_MORE_INPUT,
            false => 0,
        };
        let input = &self.input[self.taken..];
        let (window, place) = (&mut self.window, self.place);
        let (status, taken, len) = decompress(&mut self.decoder, input, window, place, flags);
        self.taken += taken;
        if self.compare {
            self.sum.update(&self.window[place..place + len]);
        }
        self.place = (place + len) & (TINFL_LZ_DICT_SIZE - 1);
        self.waiting = len;
        self.len = self
            .len
            .wrapping_add(u32::try_from(len).unwrap_or_default());
        match status {
            TINFLStatus::Done => self.phase = Phase::Sums,
            TINFLStatus::HasMoreOutput => {}
            TINFLStatus::NeedsMoreInput if taken > 0 || len > 0 => {}
            TINFLStatus::NeedsMoreInput | TINFLStatus::FailedCannotMakeProgress => {
                return Err(self.damaged("was cut"));
            }
            _ => return Err(self.damaged("does not decode")),
        }
        Ok(())
    }

    fn sums(&mut self) -> Result<()> {
        self.want(8)?;
        let Some(sums) = self.rest().first_chunk::<8>().copied() else {
            return Err(self.damaged("was cut before its sums"));
        };
        let stored = u64::from_le_bytes(sums);
        let found = u64::from(self.len) << 32 | u64::from(self.sum.sum());
        if self.compare && stored != found {
            return Err(self.damaged(&format!(
                "has other sums than its data (length and CRC-32 {found:#018x}, stored \
                 {stored:#018x})"
            )));
        }
        self.taken += sums.len();
        self.members += 1;
        self.phase = Phase::Header;
        Ok(())
    }
}

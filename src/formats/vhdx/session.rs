//! Writing the log: when it begins, how entries follow each other, and when it ends ([MS-VHDX] 2.3.3).

use uuid::Uuid;

use crate::error::{Error, Result};
use crate::formats::vhdx::bytes::MB;
use crate::formats::vhdx::entry::{self, NewEntry, SECTOR};
use crate::formats::vhdx::header::{Current, Header};
use crate::formats::vhdx::journal::{Journal, Pages};
use crate::formats::vhdx::patches::Patches;
use crate::util::align::len64;
use crate::util::random;

/// Bytes of the log that are used before they are put in place: as much is kept in memory.
const MAX_LOGGED: u64 = 16 << 20;
/// Bytes that stay free behind the last entry.
const MARGIN: u64 = 2 * SECTOR;

/// What is known of the file's headers and its log.
#[derive(Debug)]
pub(super) struct State {
    pub(super) current: Current,
    /// The header says that somebody else than before writes to the file.
    pub(super) named: bool,
    pub(super) session: Option<Session>,
    /// A header may name a log of this opening that ended: all of it is in place.
    pub(super) ending: bool,
    /// The file is as long as this on stable media.
    pub(super) stable: u64,
}

/// A log that is written to: from the beginning of its space on, and never around its end, where other
/// readers lose their way.
#[derive(Debug)]
pub(super) struct Session {
    guid: Uuid,
    /// The next entry's.
    sequence: u64,
    /// Where the next entry goes.
    head: u64,
}

impl Session {
    /// Writes an entry, for which there is room.
    pub(super) fn append(&mut self, journal: &Journal, stable: u64, pages: &Pages) -> Result<()> {
        let entry = NewEntry {
            guid: self.guid,
            sequence: self.sequence,
            // None is in place before the log ends.
            tail: 0,
            flushed: stable,
            last: journal.file.size().next_multiple_of(MB),
        };
        let bytes = entry.to_bytes(pages);
        journal.ring.write(&*journal.file, &bytes, self.head)?;
        self.sequence += 1;
        self.head += len64(bytes.len());
        Ok(())
    }
}

impl Journal {
    /// Says in one of the headers that somebody else writes now, once.
    pub(super) fn rename(&self, state: &mut State) -> Result<()> {
        if state.named {
            return Ok(());
        }
        let guid = random::uuid()?;
        self.write_header(state, |header| header.file_write = guid)?;
        state.named = true;
        Ok(())
    }

    pub(super) fn write_header(
        &self,
        state: &mut State,
        change: impl FnOnce(&mut Header),
    ) -> Result<()> {
        state.current.write(&*self.file, change)?;
        self.order.settle()
    }

    /// Changes both headers, one after the other.
    pub(super) fn write_headers(
        &self,
        state: &mut State,
        change: impl Fn(&mut Header),
    ) -> Result<()> {
        self.write_header(state, &change)?;
        self.write_header(state, |_| {})
    }

    pub(super) fn end_log(&self, state: &mut State) -> Result<()> {
        self.write_headers(state, |header| header.log_guid = Uuid::nil())
    }

    /// Writes what is logged where it belongs; on stable media when it returns.
    pub(super) fn put_in_place(&self) -> Result<()> {
        self.patches.read().apply(&*self.file, &self.ring)?;
        self.order.settle()
    }

    /// Begins a log, and changes the headers as they name it.
    pub(super) fn begin(&self, state: &mut State, change: impl Fn(&mut Header)) -> Result<()> {
        if state.ending {
            self.end(state)?;
        }
        if self.ring.len() == 0 || state.current.header.has_log() {
            return Err(Error::unsupported(
                "the file has no log, or one that was not replayed (allowed: a copy)",
            ));
        }
        let mut session = Session {
            guid: random::uuid()?,
            sequence: 1,
            head: 0,
        };
        let size = self.file.size();
        // The headers name it only once there is an entry.
        session.append(self, self.ring.host.end, &Vec::new())?;
        self.order.settle()?;
        let guid = session.guid;
        state.ending = true;
        self.write_headers(state, |header| {
            change(header);
            header.log_guid = guid;
        })?;
        state.stable = size;
        state.session = Some(session);
        state.ending = false;
        Ok(())
    }

    /// Has room for an entry of `pages` pages.
    pub(super) fn make_room(&self, state: &mut State, pages: usize) -> Result<()> {
        let wanted = entry::len(pages) + MARGIN;
        let room = self.ring.len().min(MAX_LOGGED);
        let session = state.session.as_ref();
        if session.is_some_and(|session| session.head + wanted > room) {
            self.end(state)?;
        }
        if state.session.is_some() {
            return Ok(());
        }
        let guid = (!state.named).then(random::uuid).transpose()?;
        self.begin(state, |header| {
            header.file_write = guid.unwrap_or(header.file_write)
        })?;
        state.named = true;
        Ok(())
    }

    /// Puts in place what is logged, and says that nothing is.
    pub(super) fn end(&self, state: &mut State) -> Result<()> {
        if state.session.is_some() {
            self.order.settle()?;
            self.put_in_place()?;
            // Nothing more goes to a log that a header may not name any more.
            state.session = None;
            state.ending = true;
            *self.patches.write() = Patches::default();
        }
        if state.ending {
            self.end_log(state)?;
            state.ending = false;
        }
        Ok(())
    }
}

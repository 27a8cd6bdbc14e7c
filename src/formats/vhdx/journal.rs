//! The file as its log makes it read, and changes of it through the log ([MS-VHDX] 2.3).
//!
//! Readers see what the log holds and what is in place as one.  A change of metadata is an entry of
//! the log first; the pages follow later, many together, once the entries are on stable media.  Nothing
//! of the log from the oldest entry on that is not in place yet is written over.  Where order does not
//! matter nothing is logged: changes go where they belong.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::formats::vhdx::bytes::MB;
use crate::formats::vhdx::entry::{self, Head, MAX_DESCRIPTORS, NewEntry, PAGE, Ring, SECTOR};
use crate::formats::vhdx::header::{Current, Header};
use crate::formats::vhdx::patches::Patches;
use crate::image::open::WriteOrder;
use crate::image::units::{Moment, Order};
use crate::storage::{HostId, HostRun, Limits, Storage, Zeroing};
use crate::util::align::{clamp_len, down, len64};
use crate::util::random;

/// Most pages of an entry, so that the smallest log has room for it.
pub(super) const MAX_PAGES: usize = 192;

/// Bytes of the log that are used before they are put in place: as much is kept in memory.
const MAX_LOGGED: u64 = 16 << 20;

/// Pages by their place in the file.
type Pages = Vec<(u64, Box<[u8; PAGE]>)>;

/// A file and its log.  Locks, outermost first: `state`, `patches`.
#[derive(Debug)]
pub(super) struct Journal {
    file: Arc<dyn Storage>,
    order: Arc<Order>,
    ring: Ring,
    state: Mutex<State>,
    patches: RwLock<Patches>,
}

#[derive(Debug)]
struct State {
    current: Current,
    /// The header says that somebody else than before writes to the file.
    named: bool,
    session: Option<Session>,
    /// The file is as long as this on stable media.
    stable: u64,
}

/// A log that is written to.
#[derive(Debug)]
struct Session {
    /// Before anything was written to it.
    began: Moment,
    /// Before anything was written to it that is not known to be on stable media.
    since: Moment,
    guid: Uuid,
    /// The next entry's.
    sequence: u64,
    /// Where the oldest entry is that is not in place yet, and where the next one goes.
    tail: u64,
    head: u64,
    /// Bytes from the one to the other.
    used: u64,
}

impl Session {
    /// Writes an entry, unless it is too long.
    fn append(&mut self, journal: &Journal, stable: u64, pages: &Pages) -> Result<()> {
        let entry = NewEntry {
            guid: self.guid,
            sequence: self.sequence,
            tail: self.tail,
            flushed: stable,
            last: journal.file.size().next_multiple_of(MB),
        };
        let bytes = entry.to_bytes(pages);
        journal.ring.write(&*journal.file, &bytes, self.head)?;
        let len = len64(bytes.len());
        self.sequence += 1;
        self.head = journal.ring.step(self.head, len);
        self.used += len;
        Ok(())
    }
}

impl Journal {
    /// Reads the headers of `file`, and what its log holds.
    ///
    /// # Errors
    /// `Corrupt`, `Unsupported`, by field; the host's.
    pub(super) fn open(file: Arc<dyn Storage>, order: Arc<Order>) -> Result<Self> {
        let current = Current::read(&*file)?;
        Ok(Self {
            file,
            order,
            ring: Ring {
                host: current.header.log(),
            },
            state: Mutex::new(State {
                current,
                named: false,
                session: None,
                stable: 0,
            }),
            patches: RwLock::default(),
        })
    }

    /// Takes into account what the log holds that is not in place yet.
    ///
    /// # Errors
    /// `Corrupt` where it cannot be replayed; the host's.
    pub(super) fn load_log(&self) -> Result<()> {
        let header = self.header();
        if !header.has_log() {
            return Ok(());
        }
        let run = entry::active(&*self.file, &self.ring, header.log_guid)?;
        let Some(last) = run.last() else {
            return Err(Error::corrupt(
                "the header says that the log holds changes, and it has no entries that go together (allowed: after `check -r all`, which drops the log)",
            ));
        };
        if self.file.size() < last.flushed {
            return Err(Error::corrupt(format!(
                "the file has {:#x} bytes (allowed: {:#x} at least, as its log says)",
                self.file.size(),
                last.flushed
            )));
        }
        *self.patches.write() = self.collect(&run, last.last)?;
        Ok(())
    }

    fn collect(&self, run: &[Head], size: u64) -> Result<Patches> {
        let mut patches = Patches::default();
        patches.size = size;
        let mut count = 0;
        for head in run {
            let descriptors = head.read(&*self.file, &self.ring)?;
            let descriptors =
                descriptors.ok_or_else(|| Error::corrupt("the log changes meanwhile"))?;
            count += len64(descriptors.len());
            if count > MAX_DESCRIPTORS {
                return Err(Error::corrupt(format!(
                    "the log holds {count} changes (allowed: up to {MAX_DESCRIPTORS})"
                )));
            }
            descriptors.into_iter().for_each(|d| patches.add(d));
        }
        Ok(patches)
    }

    /// The header that counts.
    pub(super) fn header(&self) -> Header {
        self.state.lock().current.header.clone()
    }

    /// Where the log is.
    pub(super) fn header_log(&self) -> &Range<u64> {
        &self.ring.host
    }

    /// What is wrong with the other header.
    pub(super) fn fault(&self) -> Option<String> {
        self.state.lock().current.fault.clone()
    }

    /// Whether there are changes that are not in place yet, of others before this opening.
    pub(super) fn is_dirty(&self) -> bool {
        let state = self.state.lock();
        state.session.is_none() && state.current.header.has_log()
    }

    /// Puts in place what the log held when the file was opened.
    ///
    /// # Errors
    /// The host's; the log is then as it was.
    pub(super) fn replay(&self) -> Result<()> {
        let mut state = self.state.lock();
        if state.session.is_some() || !state.current.header.has_log() {
            return Ok(());
        }
        self.rename(&mut state)?;
        self.put_in_place()?;
        self.end_log(&mut state)?;
        *self.patches.write() = Patches::default();
        Ok(())
    }

    /// Drops what the log held when the file was opened.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn drop_log(&self) -> Result<()> {
        let mut state = self.state.lock();
        self.rename(&mut state)?;
        self.end_log(&mut state)?;
        *self.patches.write() = Patches::default();
        Ok(())
    }

    /// Says in one of the headers that somebody else writes now, once.
    fn rename(&self, state: &mut State) -> Result<()> {
        if state.named {
            return Ok(());
        }
        let guid = random::uuid()?;
        self.write_header(state, |header| header.file_write = guid)?;
        state.named = true;
        Ok(())
    }

    fn write_header(&self, state: &mut State, change: impl FnOnce(&mut Header)) -> Result<()> {
        let since = self.order.now();
        state.current.write(&*self.file, change)?;
        self.order.settle(since)
    }

    /// Changes both headers, one after the other.
    fn write_headers(&self, state: &mut State, change: impl Fn(&mut Header)) -> Result<()> {
        self.write_header(state, &change)?;
        self.write_header(state, |_| {})
    }

    fn end_log(&self, state: &mut State) -> Result<()> {
        self.write_headers(state, |header| header.log_guid = Uuid::nil())
    }

    /// Writes what is logged where it belongs; on stable media when it returns.
    fn put_in_place(&self) -> Result<()> {
        let since = self.order.now();
        self.patches.read().apply(&*self.file, &self.ring)?;
        self.order.settle(since)
    }

    /// Says that the file is written to from now on, and that its data is in this state, where there is
    /// one.
    ///
    /// # Errors
    /// The host's; then nothing is changed.
    pub(super) fn announce(&self, data_write: Option<Uuid>) -> Result<()> {
        let mut state = self.state.lock();
        let file_write = random::uuid()?;
        let named = std::mem::replace(&mut state.named, true);
        let change = |header: &mut Header| {
            header.data_write = data_write.unwrap_or(header.data_write);
            if !named {
                header.file_write = file_write;
            }
        };
        let done = match (self.order.policy(), &state.session) {
            (WriteOrder::Ordered, None) => self.begin(&mut state, change),
            _ => self.write_headers(&mut state, change),
        };
        if done.is_err() {
            state.named = named;
        }
        done
    }

    /// Begins a log, and changes the headers as they name it.
    fn begin(&self, state: &mut State, change: impl Fn(&mut Header)) -> Result<()> {
        if self.ring.len() == 0 || state.current.header.has_log() {
            return Err(Error::unsupported(
                "the file has no log, or one that was not replayed (allowed: a copy)",
            ));
        }
        let since = self.order.now();
        let mut session = Session {
            began: since,
            since,
            guid: random::uuid()?,
            sequence: 1,
            tail: 0,
            head: 0,
            used: 0,
        };
        let size = self.file.size();
        // The headers name it only once there is an entry.
        session.append(self, self.ring.host.end, &Vec::new())?;
        self.order.settle(since)?;
        let guid = session.guid;
        self.write_headers(state, |header| {
            change(header);
            header.log_guid = guid;
        })?;
        state.stable = size;
        state.session = Some(session);
        Ok(())
    }

    /// Has room for an entry of `pages` pages.
    fn make_room(&self, state: &mut State, pages: usize) -> Result<()> {
        let lost = |session: &Session| self.order.has_failed_since(session.began);
        if state.session.as_ref().is_some_and(lost) {
            // Entries may be lost, and all that follow them with them.
            self.end(state)?;
        }
        if state.session.is_none() {
            let guid = (!state.named).then(random::uuid).transpose()?;
            self.begin(state, |header| {
                header.file_write = guid.unwrap_or(header.file_write)
            })?;
            state.named = true;
        }
        // An entry that says where the tail is must have room behind it.
        let wanted = entry::len(pages) + SECTOR;
        let room = self.ring.len().min(MAX_LOGGED);
        if state
            .session
            .as_ref()
            .is_some_and(|s| s.used + wanted > room)
        {
            self.checkpoint(state)?;
        }
        Ok(())
    }

    /// Puts in place what is logged, and gives its part of the log to others.
    fn checkpoint(&self, state: &mut State) -> Result<()> {
        let Some(since) = state.session.as_ref().map(|session| session.since) else {
            return Ok(());
        };
        let size = self.file.size();
        self.order.settle(since)?;
        state.stable = size;
        self.put_in_place()?;
        let since = self.order.now();
        if let Some(session) = &mut state.session {
            let old = (session.tail, session.used);
            (session.tail, session.used) = (session.head, 0);
            let done = session.append(self, size, &Vec::new());
            let done = done.and_then(|()| self.order.settle(since));
            if let Err(e) = done {
                // What is before it may be wanted still.
                (session.tail, session.used) = (old.0, old.1 + session.used);
                return Err(e);
            }
            session.since = since;
        }
        *self.patches.write() = Patches::default();
        Ok(())
    }

    /// Puts in place what is logged, and says that nothing is.
    fn end(&self, state: &mut State) -> Result<()> {
        let Some(session) = &state.session else {
            return Ok(());
        };
        if !self.order.has_failed_since(session.began) {
            self.order.settle(session.since)?;
        }
        self.put_in_place()?;
        self.end_log(state)?;
        state.session = None;
        *self.patches.write() = Patches::default();
        Ok(())
    }

    /// Puts in place all that is logged, on stable media, and says so in the headers.  The file may be
    /// cut then.
    ///
    /// # Errors
    /// The host's; the log then holds what it held.
    pub(super) fn finish(&self) -> Result<()> {
        self.end(&mut self.state.lock())
    }

    /// Changes ranges of the file by one entry: all of them, or none.
    ///
    /// # Errors
    /// `Unsupported` for more than an entry holds; the host's.
    pub(super) fn change(&self, changes: &[(u64, &[u8])]) -> Result<()> {
        if self.order.policy() == WriteOrder::Unordered {
            return changes
                .iter()
                .try_for_each(|(host, bytes)| self.file.write_at(bytes, *host));
        }
        let mut state = self.state.lock();
        let pages = self.pages(changes)?;
        if pages.len() > MAX_PAGES {
            return Err(Error::unsupported(format!(
                "a change of {} pages at once (allowed: up to {MAX_PAGES})",
                pages.len()
            )));
        }
        self.make_room(&mut state, pages.len())?;
        let stable = state.stable;
        if let Some(session) = &mut state.session {
            session.append(self, stable, &pages)?;
        }
        self.patches.write().add_pages(pages);
        Ok(())
    }

    /// The pages that changes touch, as they are to be.
    fn pages(&self, changes: &[(u64, &[u8])]) -> Result<Pages> {
        let mut pages: BTreeMap<u64, Box<[u8; PAGE]>> = BTreeMap::new();
        for (host, bytes) in changes {
            let mut rest = *bytes;
            let mut at = *host;
            while !rest.is_empty() {
                let start = down(at, SECTOR);
                let within = clamp_len(at - start, PAGE);
                let (part, after) = rest.split_at(rest.len().min(PAGE - within));
                let page = match pages.entry(start) {
                    std::collections::btree_map::Entry::Occupied(found) => found.into_mut(),
                    std::collections::btree_map::Entry::Vacant(new) => {
                        let mut page = Box::new([0; PAGE]);
                        self.read_at(&mut page[..], start)?;
                        new.insert(page)
                    }
                };
                page[within..within + part.len()].copy_from_slice(part);
                at += len64(part.len());
                rest = after;
            }
        }
        Ok(pages.into_iter().collect())
    }
}

/// Readers see the log's changes; what is written is logged.
impl Storage for Journal {
    fn size(&self) -> u64 {
        self.file.size().max(self.patches.read().size)
    }

    fn has_fixed_len(&self) -> bool {
        self.file.has_fixed_len()
    }

    fn limits(&self) -> Limits {
        self.file.limits()
    }

    fn path(&self) -> Option<&Path> {
        self.file.path()
    }

    fn host_id(&self) -> Option<HostId> {
        self.file.host_id()
    }

    /// None: not all that it holds is in place.
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn read_at(&self, buf: &mut [u8], host: u64) -> Result<()> {
        // Held until both are read, so that nothing is put in place in between.
        let patches = self.patches.read();
        self.file.read_at(buf, host)?;
        match patches.is_empty() {
            true => Ok(()),
            false => patches.lay_over(&*self.file, &self.ring, buf, host),
        }
    }

    /// In pieces that an entry holds.
    fn write_at(&self, buf: &[u8], host: u64) -> Result<()> {
        let mut at = host;
        let mut rest = buf;
        while !rest.is_empty() {
            let end = down(at, SECTOR) + len64(MAX_PAGES) * SECTOR;
            let (part, after) = rest.split_at(clamp_len(end - at, rest.len()));
            self.change(&[(at, part)])?;
            at += len64(part.len());
            rest = after;
        }
        Ok(())
    }

    fn zero(&self, _host: Range<u64>, _how: Zeroing) -> Result<()> {
        Err(Error::unsupported("metadata is not zeroed, but written"))
    }

    fn discard(&self, _host: Range<u64>) -> Result<()> {
        Err(Error::unsupported("metadata is not discarded"))
    }

    fn run(&self, host: u64, len: u64) -> Result<HostRun> {
        match self.patches.read().is_empty() {
            true => self.file.run(host, len),
            false => Ok(HostRun { data: true, len }),
        }
    }

    fn set_len(&self, _len: u64) -> Result<()> {
        Err(Error::new(
            ErrorKind::Unsupported,
            "the file is not cut while its log counts",
        ))
    }

    fn sync(&self) -> Result<()> {
        self.file.sync()
    }

    fn reserve(&self, host: Range<u64>) -> Result<()> {
        self.file.reserve(host)
    }
}

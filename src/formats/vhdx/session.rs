//! Writing the log: when it begins, how entries follow each other, and when it ends ([MS-VHDX] 2.3.3).

use uuid::Uuid;

use crate::error::{Error, Result};
use crate::formats::vhdx::bytes::MB;
use crate::formats::vhdx::entry::{self, NewEntry, SECTOR};
use crate::formats::vhdx::header::{Current, Header};
use crate::formats::vhdx::journal::{Journal, Pages};
use crate::formats::vhdx::patches::Patches;
use crate::util::align::{down, len64};
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
    /// The file is as long as this on stable media; whole MiB, as readers demand.
    pub(super) stable: u64,
    /// The log is sound, and the file shorter than it says.
    pub(super) cut: bool,
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
            // Whatever it was: this is the log that is begun.
            header.log_version = 0;
        })?;
        state.stable = down(size, MB);
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
            header.file_write = guid.unwrap_or(header.file_write);
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::formats::vhdx::entry::{Descriptor, Head, PAGE, page};
    use crate::formats::vhdx::header;
    use crate::image::open::WriteOrder;
    use crate::image::units::Order;
    use crate::storage::Storage;
    use crate::storage::memory::{Fault, MemoryStorage, Op};

    /// Where the pages are that change: the log is before them.
    const PAGES: u64 = 2 * MB;

    fn file() -> Arc<MemoryStorage> {
        let file = Arc::new(MemoryStorage::from_bytes(&vec![0; 4 << 20]));
        let header = Header::new(Uuid::from_u128(1), Uuid::from_u128(2), &(MB..2 * MB));
        header::create(&*file, "test", &header).expect("written");
        file
    }

    fn journal(file: &Arc<MemoryStorage>) -> Journal {
        let storage: Arc<dyn Storage> = file.clone();
        let order = Arc::new(Order::new(WriteOrder::Ordered, storage.clone(), None));
        Journal::open(storage, order).expect("opens")
    }

    /// The pages as a reader has them that takes the run of entries whose first one has the highest
    /// number, from wherever it begins in the log, and looks at no tail.
    fn as_others_replay(file: &MemoryStorage) -> Vec<u8> {
        let current = Current::read(file).expect("headers");
        let mut bytes = file.to_bytes();
        let (guid, log) = (current.header.log_guid, current.header.log());
        if guid.is_nil() {
            return bytes.split_off(2 << 20);
        }
        let ring = crate::formats::vhdx::entry::Ring { host: log };
        let head_at = |at: u64| {
            let mut sector = [0; PAGE];
            ring.read(file, &mut sector, at).expect("reads");
            let head = Head::parse(&sector, at, guid, &ring)?;
            let changes = head.read(file, &ring).expect("reads")?;
            Some((head, changes))
        };
        let mut runs: Vec<Vec<(Head, Vec<Descriptor>)>> = Vec::new();
        let mut at = 0;
        while at < ring.len() {
            let Some(entry) = head_at(at) else {
                at += SECTOR;
                continue;
            };
            at += entry.0.len;
            assert!(at + MARGIN <= ring.len(), "an entry ends at {at:#x}");
            match runs.last_mut() {
                Some(run)
                    if run
                        .last()
                        .is_some_and(|e| e.0.sequence + 1 == entry.0.sequence) =>
                {
                    run.push(entry);
                }
                _ => runs.push(vec![entry]),
            }
        }
        let run = runs.into_iter().max_by_key(|run| run[0].0.sequence);
        for (_, changes) in run.expect("the header names a log") {
            for change in changes {
                let Descriptor::Data {
                    host,
                    sector,
                    lead,
                    trail,
                } = change
                else {
                    panic!("none is made");
                };
                let mut data = [0; PAGE];
                ring.read(file, &mut data, sector).expect("reads");
                let host = usize::try_from(host).expect("fits");
                bytes[host..host + PAGE].copy_from_slice(&page(data, lead, trail));
            }
        }
        bytes.split_off(2 << 20)
    }

    #[test]
    fn at_every_entry_others_replay_exactly_what_was_changed() {
        let file = file();
        let journal = journal(&file);
        let mut model = vec![0; 2 << 20];
        let pages = [
            1_u64, 1, 2, 1, 60, 1, 1, 63, 1, 2, 3, 192, 1, 1, 192, 62, 61, 60, 1,
        ];
        for (n, pages) in pages.into_iter().cycle().take(120).enumerate() {
            let first = len64(n) * 37 % (512 - pages);
            let byte = u8::try_from(n + 1).expect("fits");
            let bytes = vec![byte; usize::try_from(pages * SECTOR).expect("fits")];
            journal
                .change(&[(PAGES + first * SECTOR, &bytes)])
                .expect("logged");
            let at = usize::try_from(first * SECTOR).expect("fits");
            model[at..at + bytes.len()].copy_from_slice(&bytes);
            assert!(as_others_replay(&file) == model, "entry {n}");
        }
        journal.finish().expect("ends");
        assert!(!Current::read(&*file).expect("headers").header.has_log());
        assert!(as_others_replay(&file) == model, "in place");
    }

    #[test]
    fn a_thousand_small_changes_take_few_syncs() {
        let file = file();
        let journal = journal(&file);
        file.record();
        for n in 0..1000 {
            let host = PAGES + n * 311 % 512 * SECTOR;
            journal.change(&[(host, &[1; 8])]).expect("logged");
        }
        let is_sync = |change: &&crate::storage::memory::Change| {
            matches!(change, crate::storage::memory::Change::Sync)
        };
        let syncs = file.changes().iter().filter(is_sync).count();
        assert!(syncs <= 60, "{syncs} syncs");
    }

    #[test]
    fn whatever_change_of_the_file_fails_what_was_acknowledged_is_found_again() {
        for after in 0..24 {
            let file = file();
            let journal = journal(&file);
            file.inject(Fault {
                op: Op::Change,
                after,
                count: 1,
                errno: libc::EIO,
            });
            let mut model = vec![0; 2 << 20];
            for n in 0..12 {
                let bytes = [n + 1; PAGE];
                let at = usize::from(n) * 5 * PAGE;
                if journal.change(&[(PAGES + len64(at), &bytes)]).is_ok() {
                    model[at..at + PAGE].copy_from_slice(&bytes);
                }
                if n % 3 == 2 {
                    drop(journal.finish());
                }
                // As a kill leaves it.
                assert!(
                    as_others_replay(&file) == model,
                    "change {n}, fault {after}"
                );
            }
            journal.finish().expect("the fault is over");
            assert!(as_others_replay(&file) == model, "fault {after}");
        }
    }
}

//! The file as its log makes it read, and changes of it through the log ([MS-VHDX] 2.3).
//!
//! Readers see what the log holds and what is in place as one.  A change of metadata is an entry of
//! the log first; the pages follow later, all together, once the entries are on stable media and
//! before the log begins anew under another name.  Where order does not matter nothing is logged: changes
//! go where they belong.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::formats::vhdx::active::active;
use crate::formats::vhdx::entry::{Head, MAX_DESCRIPTORS, PAGE, Ring, SECTOR};
use crate::formats::vhdx::header::{Current, Header};
use crate::formats::vhdx::patches::Patches;
use crate::formats::vhdx::session::State;
use crate::image::open::WriteOrder;
use crate::image::units::Order;
use crate::storage::syncs::Syncs;
use crate::storage::{HostId, HostRun, Limits, Storage, Zeroing};
use crate::util::align::{clamp_len, down, len64};
use crate::util::random;

/// Most pages of an entry, so that the smallest log has room for it.
pub(super) const MAX_PAGES: usize = 192;

/// Pages by their place in the file.
pub(super) type Pages = Vec<(u64, Box<[u8; PAGE]>)>;

/// A file and its log.  Locks, outermost first: `state`, `patches`.
#[derive(Debug)]
pub(super) struct Journal {
    pub(super) file: Arc<dyn Storage>,
    pub(super) order: Arc<Order>,
    pub(super) ring: Ring,
    state: Mutex<State>,
    pub(super) patches: RwLock<Patches>,
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
                ending: false,
                stable: 0,
                cut: false,
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
        let run = active(&*self.file, &self.ring, header.log_guid)?;
        let Some(last) = run.last() else {
            return Err(Error::corrupt(
                "the header says that the log holds changes, and it has no entries that go together (allowed: after `check -r all`, which drops the log)",
            ));
        };
        let cut = self.file.size() < last.flushed;
        // What is lost of the file does not come back by making it longer.
        let size = if cut { 0 } else { last.last };
        *self.patches.write() = self.collect(&run, size)?;
        if cut {
            self.state.lock().cut = true;
            return Err(Error::corrupt(format!(
                "the file has {:#x} bytes (allowed: {:#x} at least, as its log says)",
                self.file.size(),
                last.flushed
            )));
        }
        Ok(())
    }

    /// Whether the log is sound, and the file shorter than it says: what it holds can be put in place.
    pub(super) fn is_cut(&self) -> bool {
        self.state.lock().cut
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
        state.session.is_none() && !state.ending && state.current.header.has_log()
    }

    /// Puts in place what the log held when the file was opened.
    ///
    /// # Errors
    /// The host's; the log is then as it was.
    pub(super) fn replay(&self) -> Result<()> {
        let mut state = self.state.lock();
        if state.session.is_some() || state.ending || !state.current.header.has_log() {
            return Ok(());
        }
        self.rename(&mut state)?;
        self.put_in_place()?;
        self.end_log(&mut state)?;
        *self.patches.write() = Patches::default();
        Ok(())
    }

    /// Drops what the log held when the file was opened, after which the data may be another.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn drop_log(&self) -> Result<()> {
        let mut state = self.state.lock();
        self.rename(&mut state)?;
        let data_write = random::uuid()?;
        self.write_headers(&mut state, |header| {
            header.log_guid = Uuid::nil();
            header.data_write = data_write;
        })?;
        *self.patches.write() = Patches::default();
        Ok(())
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

    fn sync_now(&self) -> Result<()> {
        self.file.sync_now()
    }

    fn syncs(&self) -> &Syncs {
        self.file.syncs()
    }

    fn reserve(&self, host: Range<u64>) -> Result<()> {
        self.file.reserve(host)
    }
}

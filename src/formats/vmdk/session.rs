//! The descriptor of an open disk, and the first change of a session: another state, once.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use crate::error::{Error, ErrorKind, Result};
use crate::formats::vmdk::descriptor::{Descriptor, is_cid};
use crate::image::open::WriteOrder;
use crate::storage::Storage;
use crate::util::align::{clamp_len, len64};
use crate::util::random;

/// Where a descriptor is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// It is a file of its own.
    File,
    /// In this range of a sparse file.
    Inside(Range<u64>),
    /// There is none.
    Nowhere,
}

/// The descriptor of an open disk.
#[derive(Debug)]
pub(super) struct Session {
    storage: Arc<dyn Storage>,
    pub(super) place: Place,
    descriptor: ArcSwap<Descriptor>,
    order: WriteOrder,
    begun: AtomicBool,
    changing: Mutex<()>,
}

impl Session {
    /// Of the disk whose descriptor is in `storage`.
    pub(super) fn new(
        storage: Arc<dyn Storage>,
        place: Place,
        descriptor: Descriptor,
        order: WriteOrder,
    ) -> Self {
        Self {
            storage,
            place,
            descriptor: ArcSwap::from_pointee(descriptor),
            order,
            begun: AtomicBool::new(false),
            changing: Mutex::new(()),
        }
    }

    pub(super) fn descriptor(&self) -> Arc<Descriptor> {
        self.descriptor.load_full()
    }

    /// Whether the disk says that it is another now.
    pub(super) fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Acquire)
    }

    /// Has changes leave the state as it is.
    pub(super) fn begin_unannounced(&self) {
        self.begun.store(true, Ordering::Release);
    }

    /// Before the first change: has the disk say that it is another from now on, durably.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn begin(&self) -> Result<()> {
        if self.has_begun() {
            return Ok(());
        }
        let _changing = self.changing.lock();
        if !self.has_begun() {
            self.renew()?;
            self.begun.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Gives the disk another state, durably.
    ///
    /// # Errors
    /// As [`Session::change`].
    pub(super) fn renew_state(&self) -> Result<()> {
        let _changing = self.changing.lock();
        self.renew()
    }

    fn renew(&self) -> Result<()> {
        let mut new = (*self.descriptor()).clone();
        let old = new.cid();
        let (cid, longer) = new_cid(old)?;
        new.set_cid(cid, longer);
        self.write(new)
    }

    /// Changes the descriptor, durably.  With no change under way.
    ///
    /// # Errors
    /// `OutOfRange` for one that does not fit where it is; the host's.
    pub(super) fn change(&self, change: impl FnOnce(&mut Descriptor)) -> Result<()> {
        let _changing = self.changing.lock();
        let mut new = (*self.descriptor()).clone();
        change(&mut new);
        self.write(new)
    }

    /// Whether the descriptor would fit with this change.
    ///
    /// # Errors
    /// As [`Session::change`].
    pub(super) fn fits(&self, change: impl FnOnce(&mut Descriptor)) -> Result<()> {
        let mut new = (*self.descriptor()).clone();
        change(&mut new);
        let bytes = new.to_bytes();
        self.room(&bytes)?;
        self.old(len64(bytes.len())).map(drop)
    }

    /// The bytes that a descriptor of `len` bytes, which has room, takes the place of: up to the
    /// first NUL, and behind that, where it is longer, nothing but zeroes.
    fn old(&self, len: u64) -> Result<Vec<u8>> {
        let (start, end) = match &self.place {
            Place::Inside(room) => (room.start, room.end),
            Place::File => (0, self.storage.size()),
            Place::Nowhere => return Ok(Vec::new()),
        };
        let most = super::descriptor::MAX_LEN;
        if end - start > most {
            return Err(Error::unsupported(format!(
                "the descriptor has room of {} bytes (allowed for writing: up to {most})",
                end - start
            )));
        }
        let mut old = vec![0; clamp_len(end - start, usize::MAX)];
        self.storage.read_at(&mut old, start)?;
        let text = old.iter().position(|byte| *byte == 0).unwrap_or(old.len());
        // One more, with which a text ends that others follow.
        let needed = match &self.place {
            Place::Inside(_) => clamp_len(len + 1, old.len()).max(text),
            _ => old.len(),
        };
        if let Some(at) = old[text..needed].iter().position(|byte| *byte != 0) {
            return Err(Error::unsupported(format!(
                "something follows the descriptor at {:#x}, where it would be written (allowed: zeroes)",
                start + len64(text + at)
            )));
        }
        if matches!(self.place, Place::Inside(_)) {
            old.truncate(text.max(clamp_len(len, old.len())));
        }
        Ok(old)
    }

    /// Where the descriptor may be, for one of these bytes.
    fn room(&self, bytes: &[u8]) -> Result<Range<u64>> {
        let len = len64(bytes.len());
        let room = match &self.place {
            Place::File => 0..super::descriptor::MAX_LEN,
            Place::Inside(room) => room.clone(),
            Place::Nowhere => 0..0,
        };
        match len <= room.end - room.start {
            true => Ok(room),
            false => Err(Error::new(
                ErrorKind::OutOfRange,
                format!(
                    "the descriptor would have {len} bytes (allowed: {}, as many as there is room for)",
                    room.end - room.start
                ),
            )),
        }
    }

    fn write(&self, new: Descriptor) -> Result<()> {
        if self.place == Place::Nowhere {
            self.descriptor.store(Arc::new(new));
            return Ok(());
        }
        let mut bytes = new.to_bytes();
        let room = self.room(&bytes)?;
        let is_file = self.place == Place::File;
        let start = if is_file { 0 } else { room.start };
        let end = len64(bytes.len());
        let mut old = self.old(end)?;
        let len = len64(old.len());
        // Blank lines at the end of a file that becomes shorter; it is cut after that.
        let fill = if is_file { b'\n' } else { 0 };
        bytes.resize(bytes.len().max(old.len()), fill);
        old.resize(bytes.len(), fill);
        let differs = |(a, b): (&u8, &u8)| a != b;
        let mut pairs = bytes.iter().zip(&old);
        if let Some(first) = pairs.position(differs) {
            let last = bytes.iter().zip(&old).rposition(differs).unwrap_or(first);
            let grown = if is_file && end > len {
                bytes.len() - 1
            } else {
                last
            };
            let part = &bytes[first..=last.max(grown)];
            self.storage.write_at(part, start + len64(first))?;
        }
        if is_file && end < len && !self.storage.has_fixed_len() {
            self.storage.set_len(end)?;
        }
        if self.order == WriteOrder::Ordered {
            self.storage.sync()?;
        }
        self.descriptor.store(Arc::new(new));
        Ok(())
    }
}

/// A CID that is not the `old` one, and more of the same kind.
///
/// # Errors
/// The host's, where it gives no random bytes.
pub(super) fn new_cid(old: Option<u32>) -> Result<(u32, u128)> {
    loop {
        let random = random::uuid()?.as_u128();
        let cid = u32::try_from(random & u128::from(u32::MAX)).unwrap_or(0);
        if is_cid(cid) && Some(cid) != old {
            return Ok((cid, random >> 32));
        }
    }
}

//! Fixed disks: all bytes in order, then the footer.

use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::formats::vhd::details;
use crate::formats::vhd::footer::Footer;
use crate::formats::vhd::geometry::SizeRule;
use crate::formats::vhd::open::{End, Found};
use crate::image::info::Detail;
use crate::image::open::{OpenOptions, Purpose, WriteOrder};
use crate::image::{Caps, Check, Driver, Fill, Image, Layout, Resize, Run, Wait};
use crate::storage::open::Access;
use crate::storage::{Limits, Storage, Zeroing};

/// An open fixed disk.
#[derive(Debug)]
pub(super) struct Fixed {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) write: bool,
    pub(super) order: WriteOrder,
    pub(super) rule: SizeRule,
    /// What the footer at the end is.  Locked before `state`.
    pub(super) end: Mutex<End>,
    pub(super) size: AtomicU64,
    pub(super) state: Mutex<State>,
}

/// What a change of size changes.
#[derive(Debug, Clone, Copy)]
pub(super) struct State {
    /// As it is in the file.
    pub(super) footer: Footer,
    /// Where it begins.
    pub(super) data_end: u64,
}

impl Fixed {
    /// Opens a fixed disk whose footer was found.
    ///
    /// # Errors
    /// `Corrupt` where the file does not hold the whole disk.
    pub(super) fn open(
        storage: Arc<dyn Storage>,
        options: &OpenOptions,
        found: Found,
        rule: SizeRule,
    ) -> Result<Self> {
        let mut size = rule.size(&found.footer, found.data_end);
        if size > found.data_end {
            if options.purpose != Purpose::Check {
                return Err(Error::corrupt(format!(
                    "the disk has {size} bytes, the file only {} before its footer",
                    found.data_end
                )));
            }
            size = found.data_end;
        }
        Ok(Self {
            storage,
            write: options.access == Access::Write,
            order: options.order,
            rule,
            end: Mutex::new(found.end),
            size: AtomicU64::new(size),
            state: Mutex::new(State {
                footer: found.footer,
                data_end: found.data_end,
            }),
        })
    }
}

impl Image for Fixed {
    fn driver(&self) -> &'static Driver {
        &super::DRIVER
    }

    fn virtual_size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn cluster_size(&self) -> Option<u64> {
        None
    }

    fn limits(&self) -> Limits {
        self.storage.limits()
    }

    fn caps(&self) -> Caps {
        Caps {
            write: self.write,
            backing: false,
            host_offsets: true,
            // Where the disk gets smaller, the footer moves to where data was.
            offsets_stay: false,
            encoded: None,
        }
    }

    fn storage(&self) -> &dyn Storage {
        &*self.storage
    }

    fn map(&self, at: u64, len: u64, _wait: Wait) -> Result<Run<'_>> {
        let inside = len.min(self.virtual_size().saturating_sub(at));
        Ok(Run::in_place(&*self.storage, at, inside, self.write))
    }

    fn allocate(&self, _at: u64, _len: u64, _fill: &mut Fill<'_>) -> Result<u64> {
        // Everything is stored already, so `map` never sends anyone here but on a read-only image.
        Err(Error::read_only())
    }

    fn zero(&self, range: Range<u64>, how: Zeroing) -> Result<()> {
        if !self.write {
            return Err(Error::read_only());
        }
        self.storage.zero(range, how)
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        self.zero(range, Zeroing::MayUnmap)
    }

    fn flush(&self) -> Result<()> {
        self.storage.sync()
    }

    fn close(&self) -> Result<()> {
        match self.order {
            WriteOrder::Ordered => self.flush(),
            WriteOrder::Unordered => Ok(()),
        }
    }

    fn identity(&self) -> Option<Uuid> {
        Some(self.state.lock().footer.uuid())
    }

    fn details(&self) -> Vec<Detail> {
        let end = self.end.lock();
        details::of_footer(&self.state.lock().footer, &end, self.rule)
    }

    fn as_check(&self) -> Option<&dyn Check> {
        Some(self)
    }

    fn as_resize(&self) -> Option<&dyn Resize> {
        Some(self)
    }

    fn as_layout(&self) -> Option<&dyn Layout> {
        Some(self)
    }
}

impl Layout for Fixed {
    fn assign(&self, ranges: &[Range<u64>]) -> Result<()> {
        if !self.write {
            return Err(Error::read_only());
        }
        for range in ranges {
            match self.storage.reserve(range.clone()) {
                Err(e) if e.kind() == ErrorKind::Unsupported => break,
                done => done?,
            }
        }
        Ok(())
    }
}

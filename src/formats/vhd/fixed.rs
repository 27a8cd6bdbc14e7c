//! Fixed disks: all bytes in order, then the footer.

use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;
use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::formats::vhd::details;
use crate::formats::vhd::footer::Footer;
use crate::formats::vhd::geometry::SizeRule;
use crate::formats::vhd::open::{End, Found};
use crate::image::flat::Flat;
use crate::image::info::Detail;
use crate::image::open::{OpenOptions, Purpose};
use crate::image::{Caps, Check, Driver, Image, Layout, Resize, Run, Store, Wait};
use crate::storage::{Limits, Storage};

/// An open fixed disk.
#[derive(Debug)]
pub(super) struct Fixed {
    pub(super) disk: Flat,
    pub(super) rule: SizeRule,
    /// What the footer at the end is.  Locked before `state`.
    pub(super) end: Mutex<End>,
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
            disk: Flat::new(storage, options, size),
            rule,
            end: Mutex::new(found.end),
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
        self.disk.size()
    }

    fn cluster_size(&self) -> Option<u64> {
        None
    }

    fn limits(&self) -> Limits {
        self.disk.storage.limits()
    }

    fn caps(&self) -> Caps {
        Caps {
            // Where the disk gets smaller, the footer moves to where data was.
            offsets_stay: false,
            ..self.disk.caps()
        }
    }

    fn storage(&self) -> &dyn Storage {
        &*self.disk.storage
    }

    fn map(&self, at: u64, len: u64, _wait: Wait) -> Result<Run<'_>> {
        Ok(self.disk.map(at, len))
    }

    fn store(&self) -> Option<&dyn Store> {
        Some(&self.disk)
    }

    fn close(&self) -> Result<()> {
        self.disk.close()
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
        self.disk.may_write()?;
        for range in ranges {
            match self.disk.storage.reserve(range.clone()) {
                Err(e) if e.kind() == ErrorKind::Unsupported => break,
                done => done?,
            }
        }
        Ok(())
    }
}

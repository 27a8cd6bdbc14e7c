//! An open disk: its extents, one after the other.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::formats::vmdk::descriptor::Descriptor;
use crate::formats::vmdk::extent::{Data, Extent};
use crate::formats::vmdk::line::Access as LineAccess;
use crate::formats::vmdk::session::{Place, Session};
use crate::image::info::Detail;
use crate::image::open::{OpenOptions, Purpose, WriteOrder};
use crate::image::{
    Backing, BackingName, Caps, Check, Compact, Driver, Empty, Image, Layout, Part, Relink, Rename,
    Resize, Role, Run, Store, Wait,
};
use crate::storage::open::Access;
use crate::storage::{Limits, Storage};
use crate::util::text::{printable, replaced};

/// An open disk.
#[derive(Debug)]
pub(super) struct Vmdk {
    /// What holds the descriptor.
    storage: Arc<dyn Storage>,
    /// Its descriptor; `None`: it is one extent alone.
    pub(super) session: Option<Arc<Session>>,
    pub(super) extents: Vec<Extent>,
    pub(super) write: bool,
    order: WriteOrder,
    size: AtomicU64,
}

impl Vmdk {
    /// A disk of these extents.
    ///
    /// # Errors
    /// `Unsupported` for writing to what is only read; those of [`Sparse::start_writing`].
    ///
    /// [`Sparse::start_writing`]: crate::formats::vmdk::sparse::Sparse::start_writing
    pub(super) fn new(
        storage: Arc<dyn Storage>,
        descriptor: Option<Descriptor>,
        place: Place,
        extents: Vec<Extent>,
        options: &OpenOptions,
    ) -> Result<Self> {
        let size = extents.last().map_or(0, |last| last.end());
        let session = |d| Session::new(Arc::clone(&storage), place, d, options.order);
        let mut this = Self {
            session: descriptor.map(session).map(Arc::new),
            storage,
            extents,
            write: options.access == Access::Write,
            order: options.order,
            size: AtomicU64::new(size),
        };
        if this.write {
            this.start_writing(options)?;
        }
        Ok(this)
    }

    fn start_writing(&mut self, options: &OpenOptions) -> Result<()> {
        if options.purpose == Purpose::Use {
            self.may_change()?;
        }
        let has_backing = self.backing().is_some();
        let Some(session) = &self.session else {
            return Ok(());
        };
        for extent in &mut self.extents {
            extent.session = Some(Arc::clone(session));
            let path = extent.storage.as_ref().and_then(|s| s.path());
            let path = path.map(std::path::Path::to_owned);
            if let Data::Sparse(sparse) = &mut extent.data
                && sparse.packed.is_none()
                && extent.line.access == LineAccess::ReadWrite
            {
                let learns = options.purpose == Purpose::Use;
                let started = sparse.start_writing(options, session, has_backing, learns);
                started.map_err(|e| e.at_opt(path.as_deref()))?;
            }
        }
        Ok(())
    }

    /// Refuses to change what is only read.
    ///
    /// # Errors
    /// `Unsupported`, saying why.
    pub(super) fn may_change(&self) -> Result<()> {
        let refuse = |why: String| Err(Error::unsupported(why));
        let Some(session) = &self.session else {
            return refuse(
                "an extent alone is not written to (allowed: the disk, by its descriptor)"
                    .to_owned(),
            );
        };
        let descriptor = session.descriptor();
        if let Some(path) = descriptor.text("changetrackpath") {
            return refuse(format!(
                "its changes are tracked in '{}', which would not be told (changeTrackPath): it is not written to",
                printable(&path)
            ));
        }
        let snapshot = descriptor.text("isnativesnapshot");
        if snapshot.is_some_and(|word| word.eq_ignore_ascii_case("yes")) {
            return refuse(
                "the array keeps it (isNativeSnapshot): it is not written to".to_owned(),
            );
        }
        for (index, extent) in self.extents.iter().enumerate() {
            let device = extent.storage.as_ref().is_some_and(|s| s.has_fixed_len());
            let why = match &extent.data {
                Data::SeSparse(_) => "is of type SESPARSE".to_owned(),
                Data::Sparse(sparse) if sparse.packed.is_some() => {
                    "is a stream (streamOptimized), which is written once".to_owned()
                }
                Data::Sparse(sparse) if sparse.odd_flags != 0 => {
                    format!("has flags {:#x} that are not known", sparse.odd_flags)
                }
                Data::Sparse(sparse) => {
                    let room = sparse.geometry().capacity;
                    match extent.end() - extent.start > room {
                        true => format!("holds {room} bytes, fewer than its line says"),
                        false => continue,
                    }
                }
                Data::Flat(_) if device => "is on a device".to_owned(),
                _ => continue,
            };
            return refuse(format!(
                "extent {index} {why}: it is not written to in place"
            ));
        }
        Ok(())
    }

    /// Shows another size.
    pub(super) fn set_size(&self, size: u64) {
        self.size.store(size, Ordering::Release);
    }

    pub(super) fn descriptor(&self) -> Option<Arc<Descriptor>> {
        self.session.as_ref().map(|s| s.descriptor())
    }

    /// The extent that has the byte at `at`.
    pub(super) fn extent(&self, at: u64) -> Result<&Extent> {
        let index = self.extents.partition_point(|e| e.end() <= at);
        let found = self.extents.get(index);
        found.ok_or_else(|| Error::corrupt(format!("no extent has the byte at {at:#x}")))
    }

    fn text(&self, key: &str) -> Option<String> {
        self.descriptor()?.text(key)
    }

    fn described(&self, extent: &Extent) -> Value {
        let mut value = json!({
            "virtual-size": extent.end() - extent.start,
            "format": extent.line.kind.word(),
        });
        if let Some(name) = &extent.line.name {
            value["filename"] = replaced(name).into();
        }
        if let Some(grain) = extent.grain() {
            value["cluster-size"] = grain.into();
        }
        if let Data::Sparse(sparse) = &extent.data {
            value["compressed"] = sparse.packed.is_some().into();
        }
        if extent.line.access != LineAccess::ReadWrite {
            value["access"] = match extent.line.access {
                LineAccess::None => "none",
                _ => "read-only",
            }
            .into();
        }
        if let Data::Missing(Some(why)) = &extent.data {
            value["missing"] = why.to_string().into();
        }
        value
    }
}

/// Names of the parent: as it stands, with the separators of this system, and without directories.
fn names(hint: &std::ffi::OsStr) -> Vec<BackingName> {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let mut names = vec![hint.as_bytes().to_vec()];
    let separated: Vec<u8> = hint
        .as_bytes()
        .iter()
        .map(|b| if *b == b'\\' { b'/' } else { *b })
        .collect();
    let last = separated
        .rsplit(|b| *b == b'/')
        .next()
        .unwrap_or_default()
        .to_vec();
    for name in [separated, last] {
        if !name.is_empty() && !names.contains(&name) {
            names.push(name);
        }
    }
    let named = |name| BackingName {
        path: std::ffi::OsString::from_vec(name),
        origin: "parentFileNameHint".to_owned(),
    };
    names.into_iter().map(named).collect()
}

/// A CID as what says in which state an image is.
pub(super) fn state_of(cid: u32) -> Uuid {
    Uuid::from_u128(cid.into())
}

impl Image for Vmdk {
    fn driver(&self) -> &'static Driver {
        &super::DRIVER
    }

    fn virtual_size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn cluster_size(&self) -> Option<u64> {
        self.extents.iter().filter_map(Extent::grain).max()
    }

    fn limits(&self) -> Limits {
        let mut limits = self.storage.limits();
        let files = self.extents.iter().filter_map(|e| e.storage.as_ref());
        for file in files {
            let other = file.limits();
            limits.align = limits.align.max(other.align);
            limits.buf_align = limits.buf_align.max(other.buf_align);
            limits.zero_align = limits.zero_align.max(other.zero_align);
            limits.discard_align = limits.discard_align.max(other.discard_align);
        }
        if let Some(grain) = self.cluster_size() {
            // An extent that begins within a grain of another has no grains of the disk.
            let aligned = self.extents.iter().all(|e| e.start.is_multiple_of(grain));
            let unit = if aligned {
                u32::try_from(grain).unwrap_or(0)
            } else {
                0
            };
            (limits.zero_align, limits.discard_align) = (unit, unit);
        }
        limits
    }

    fn caps(&self) -> Caps {
        let packed = self.extents.iter().filter(|e| match &e.data {
            Data::Sparse(sparse) => sparse.packed.is_some(),
            _ => false,
        });
        Caps {
            write: self.write,
            backing: self.backing().is_some(),
            encoded: packed.filter_map(Extent::grain).max(),
            ..Caps::STORED
        }
    }

    fn storage(&self) -> &dyn Storage {
        &*self.storage
    }

    fn map(&self, at: u64, len: u64, wait: Wait) -> Result<Run<'_>> {
        self.extent(at)?.map(at, len, wait)
    }

    fn read_encoded(&self, buf: &mut [u8], at: u64) -> Result<usize> {
        let extent = self.extent(at)?;
        let most = usize::try_from(extent.end() - at).unwrap_or(usize::MAX);
        let len = buf.len().min(most);
        extent.read_encoded(&mut buf[..len], at)
    }

    fn store(&self) -> Option<&dyn Store> {
        self.write.then_some(self)
    }

    fn as_check(&self) -> Option<&dyn Check> {
        Some(self)
    }

    fn as_compact(&self) -> Option<&dyn Compact> {
        self.is_compacted().then_some(self)
    }

    fn as_resize(&self) -> Option<&dyn Resize> {
        self.session.is_some().then_some(self)
    }

    fn as_relink(&mut self) -> Option<&mut dyn Relink> {
        self.session.is_some().then_some(self)
    }

    fn as_empty(&mut self) -> Option<&mut dyn Empty> {
        self.session.is_some().then_some(self)
    }

    fn as_rename(&mut self) -> Option<&mut dyn Rename> {
        self.session.is_some().then_some(self)
    }

    fn as_layout(&self) -> Option<&dyn Layout> {
        self.write.then_some(self)
    }

    fn close(&self) -> Result<()> {
        self.extents.iter().try_for_each(Extent::close)?;
        match self.order {
            WriteOrder::Ordered => Image::flush(self),
            WriteOrder::Unordered => Ok(()),
        }
    }

    fn parts(&self) -> Vec<Part<'_>> {
        let mut parts = vec![Part {
            role: Role::Header,
            storage: self.storage(),
        }];
        for extent in &self.extents {
            let Some(storage) = &extent.storage else {
                continue;
            };
            if !parts
                .iter()
                .any(|p| std::ptr::addr_eq(p.storage, &**storage))
            {
                let role = Role::Data;
                let storage = &**storage;
                parts.push(Part { role, storage });
            }
        }
        parts
    }

    fn backing(&self) -> Option<Backing> {
        let descriptor = self.descriptor()?;
        let cid = descriptor.parent_cid()?;
        let hint = descriptor.parent_name();
        Some(Backing {
            names: hint.map(|hint| names(&hint)).unwrap_or_default(),
            format: Some(super::DRIVER.name.to_owned()),
            identity: None,
            state: Some(state_of(cid)),
        })
    }

    fn state(&self) -> Option<Uuid> {
        self.descriptor()?.cid().map(state_of)
    }

    fn keep_state(&self) {
        if let Some(session) = &self.session {
            session.begin_unannounced();
        }
    }

    fn may_be_unwritten(&self) -> bool {
        self.extents.iter().any(|e| matches!(e.data, Data::Flat(_)))
    }

    fn is_encrypted(&self) -> bool {
        self.descriptor()
            .as_ref()
            .is_some_and(|d| d.encrypted().is_some())
    }

    fn is_dirty(&self) -> bool {
        self.extents.iter().any(|e| match &e.data {
            Data::Sparse(sparse) => sparse.unclean.load(Ordering::Acquire),
            _ => false,
        })
    }

    fn details(&self) -> Vec<Detail> {
        let mut details = Vec::new();
        let kind = self.text("createtype");
        details.push(Detail::new("create-type", kind));
        if let Some(descriptor) = self.descriptor() {
            let cid = |key: &str| {
                let cid = descriptor.text(key);
                cid.and_then(|cid| u32::from_str_radix(cid.trim(), 16).ok())
            };
            details.push(Detail::new("cid", cid("cid")));
            details.push(Detail::new("parent-cid", cid("parentcid")));
        }
        details.push(Detail::new(
            "descriptor",
            match self.session.as_ref().map(|s| &s.place) {
                None => "none: an extent alone",
                Some(Place::File) => "file",
                Some(_) => "inside",
            },
        ));
        for (key, name) in [
            ("adapter-type", "ddb.adaptertype"),
            ("hardware-version", "ddb.virtualhwversion"),
            ("tools-version", "ddb.toolsversion"),
            ("uuid", "ddb.uuid"),
            ("change-tracking", "changetrackpath"),
        ] {
            if let Some(value) = self.text(name) {
                details.push(Detail::new(key, value));
            }
        }
        let extents: Vec<Value> = self.extents.iter().map(|e| self.described(e)).collect();
        details.push(Detail::new("extents", extents));
        details
    }
}

//! An open disk: its extents, one after the other.

use std::sync::Arc;

use serde_json::{Value, json};
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::formats::vmdk::descriptor::Descriptor;
use crate::formats::vmdk::extent::{Data, Extent};
use crate::formats::vmdk::line::Access as LineAccess;
use crate::image::info::Detail;
use crate::image::open::{OpenOptions, Purpose};
use crate::image::{Backing, BackingName, Caps, Driver, Image, Part, Role, Run, Wait};
use crate::storage::open::Access;
use crate::storage::{Limits, Storage};
use crate::util::text::replaced;

/// Where the descriptor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Within {
    /// In a file of its own.
    File,
    /// In a sparse file, or nowhere.
    Sparse,
}

/// An open disk.
#[derive(Debug)]
pub(super) struct Vmdk {
    /// What holds the descriptor.
    storage: Arc<dyn Storage>,
    descriptor: Option<Descriptor>,
    within: Within,
    extents: Vec<Extent>,
    size: u64,
}

impl Vmdk {
    /// A disk of these extents.
    ///
    /// # Errors
    /// `Unsupported` for writing.
    pub(super) fn new(
        storage: Arc<dyn Storage>,
        descriptor: Option<Descriptor>,
        within: Within,
        extents: Vec<Extent>,
        options: &OpenOptions,
    ) -> Result<Self> {
        if options.access == Access::Write && options.purpose != Purpose::Describe {
            return Err(Error::unsupported("VMDKs are not written to in place"));
        }
        Ok(Self {
            storage,
            descriptor,
            within,
            size: extents.last().map_or(0, |last| last.guest.end),
            extents,
        })
    }

    /// The extent that has the byte at `at`.
    fn extent(&self, at: u64) -> Result<&Extent> {
        let index = self.extents.partition_point(|e| e.guest.end <= at);
        let found = self.extents.get(index);
        found.ok_or_else(|| Error::corrupt(format!("no extent has the byte at {at:#x}")))
    }

    fn text(&self, key: &str) -> Option<String> {
        self.descriptor.as_ref()?.text(key)
    }

    fn described(&self, extent: &Extent) -> Value {
        let mut value = json!({
            "virtual-size": extent.guest.end - extent.guest.start,
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
        self.size
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
        }
        limits
    }

    fn caps(&self) -> Caps {
        let packed = self.extents.iter().filter(|e| match &e.data {
            Data::Sparse(sparse) => sparse.packed.is_some(),
            _ => false,
        });
        Caps {
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
        let most = usize::try_from(extent.guest.end - at).unwrap_or(usize::MAX);
        let len = buf.len().min(most);
        extent.read_encoded(&mut buf[..len], at)
    }

    fn close(&self) -> Result<()> {
        Ok(())
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
        let descriptor = self.descriptor.as_ref()?;
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
        self.descriptor.as_ref()?.cid().map(state_of)
    }

    fn may_be_unwritten(&self) -> bool {
        self.extents.iter().any(|e| matches!(e.data, Data::Flat(_)))
    }

    fn is_encrypted(&self) -> bool {
        self.descriptor
            .as_ref()
            .is_some_and(|d| d.encrypted().is_some())
    }

    fn is_dirty(&self) -> bool {
        self.extents.iter().any(|e| match &e.data {
            Data::Sparse(sparse) => sparse.unclean,
            _ => false,
        })
    }

    fn details(&self) -> Vec<Detail> {
        let mut details = Vec::new();
        let kind = self.text("createtype");
        details.push(Detail::new("create-type", kind));
        if let Some(descriptor) = &self.descriptor {
            let cid = |key: &str| {
                let cid = descriptor.text(key);
                cid.and_then(|cid| u32::from_str_radix(cid.trim(), 16).ok())
            };
            details.push(Detail::new("cid", cid("cid")));
            details.push(Detail::new("parent-cid", cid("parentcid")));
        }
        details.push(Detail::new(
            "descriptor",
            match (&self.descriptor, self.within) {
                (None, _) => "none: an extent alone",
                (Some(_), Within::File) => "file",
                (Some(_), Within::Sparse) => "inside",
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

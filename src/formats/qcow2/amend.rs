//! Change of an existing image's options: version, refcounts, backing file, data file.

use std::os::unix::ffi::OsStrExt;

use super::extension;
use super::feature;
use super::header::Header;
use super::refblock::Width;
use super::rewrite::Needs;
use super::snapshot_table::SnapshotTable;
use super::{Qcow2, create, relink};
use crate::error::{Error, Result};
use crate::image::amend::Amend;
use crate::image::options::{OptionKind, OptionSpec, OptionValues};
use crate::util::align::len64;
use crate::util::text::printable;

/// The options that can be changed.
const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "compat",
        kind: OptionKind::Choice(&["0.10", "v2", "1.1", "v3"]),
        default: "",
        help: "version: 0.10 (v2) or 1.1 (v3)",
    },
    OptionSpec {
        name: "lazy_refcounts",
        kind: OptionKind::Bool,
        default: "",
        help: "let QEMU put off refcount updates",
    },
    OptionSpec {
        name: "refcount_bits",
        kind: OptionKind::Number,
        default: "",
        help: "width of a reference count: 1, 2, 4, 8, 16, 32 or 64",
    },
    OptionSpec {
        name: "backing_file",
        kind: OptionKind::Name,
        default: "",
        help: "name of the backing file, which is not opened; empty: none",
    },
    OptionSpec {
        name: "backing_fmt",
        kind: OptionKind::Text,
        default: "",
        help: "format of the backing file",
    },
    OptionSpec {
        name: "data_file",
        kind: OptionKind::File,
        default: "",
        help: "name of the external data file, of images that have one; empty: no name",
    },
    OptionSpec {
        name: "data_file_raw",
        kind: OptionKind::Bool,
        default: "",
        help: "off: the data file need not read as the disk does",
    },
    OptionSpec {
        name: "size",
        kind: OptionKind::Size,
        default: "",
        help: "size of the disk, which may grow",
    },
];

/// What is to be changed, checked as far as the options alone allow.
struct Plan {
    version: u32,
    refcount_order: u32,
    lazy: Option<bool>,
}

impl Plan {
    fn new(header: &Header, values: &OptionValues) -> Result<Self> {
        let version = match values.text("compat") {
            None => header.version,
            Some("0.10" | "v2") => 2,
            Some(_) => 3,
        };
        let refcount_order = match values.number("refcount_bits") {
            None => header.refcount_order,
            Some(bits) => create::refcount_order(bits)?,
        };
        let lazy = values.bool("lazy_refcounts");
        if version == 2 && (refcount_order != 4 || lazy == Some(true)) {
            return Err(Error::invalid(format!(
                "refcounts of {} bits and lazy_refcounts={} need compat=1.1 (allowed with 0.10: refcount_bits=16, lazy_refcounts=off)",
                Width::new(refcount_order).bits(),
                if lazy == Some(true) { "on" } else { "off" }
            )));
        }
        Ok(Self {
            version,
            refcount_order,
            lazy,
        })
    }
}

impl Amend for Qcow2 {
    fn options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    fn amend(&mut self, values: &OptionValues) -> Result<()> {
        self.writer()?;
        self.release_assigned()?;
        self.reload()?;
        let plan = Plan::new(&self.header, values)?;
        self.amended(&plan, values)?;
        if plan.version < self.header.version {
            self.check_downgrade()?;
        }
        self.start_writing()?;
        if plan.version > self.header.version {
            self.complete_snapshots()?;
        }
        // Version 3 comes first and version 2 last: what lies between needs the former.
        let mut header = self.amended(&plan, values)?;
        let version = header.version.max(plan.version);
        set_version(&mut header, version);
        self.change_header(|now| *now = header)?;
        if plan.refcount_order != self.header.refcount_order {
            let needs = Needs {
                refcount_order: Some(plan.refcount_order),
                ..Needs::default()
            };
            self.rewrite(&needs, |_| Ok(()))?;
        }
        if plan.version < self.header.version {
            self.expand_zeroes_of_snapshots()?;
            self.start_writing()?;
            self.expand_zeroes()?;
            self.settle()?;
            self.change_header(|now| set_version(now, plan.version))?;
        }
        Ok(())
    }
}

/// Makes a header one of version 2 or 3.
fn set_version(header: &mut Header, version: u32) {
    if header.version == version {
        return;
    }
    header.version = version;
    header
        .extensions
        .retain(|e| e.kind != extension::FEATURE_NAMES);
    if version == 2 {
        (header.incompatible, header.compatible, header.autoclear) = (0, 0, 0);
        header.rest.clear();
    } else {
        let mut new = Header::new(version);
        header.rest = new.rest;
        header.extensions.append(&mut new.extensions);
    }
}

impl Qcow2 {
    /// Gives snapshots of old images what version 3 wants of them, which version 2 has room for.
    fn complete_snapshots(&mut self) -> Result<()> {
        let mut table = SnapshotTable::read(&*self.file, &self.header)?;
        let next = Header {
            version: 3,
            ..self.header.clone()
        };
        if table.incomplete(&next).is_none() {
            return Ok(());
        }
        table.complete(self.size());
        let needs = Needs {
            runs: &[len64(table.encode()?.len())],
            ..Needs::default()
        };
        self.rewrite(&needs, |rewrite| rewrite.replace_snapshots(&table))
    }

    /// The header with all changes that are in it alone.
    fn amended(&self, plan: &Plan, values: &OptionValues) -> Result<Header> {
        let mut header = Header::read(&*self.file)?;
        if let Some(lazy) = plan.lazy {
            header.compatible &= !feature::LAZY_REFCOUNTS;
            if lazy {
                header.compatible |= feature::LAZY_REFCOUNTS;
            }
        }
        let name = match values.name("backing_file") {
            None => header.backing_name.clone(),
            Some(name) => Some(name.to_owned()).filter(|n| !n.is_empty()),
        };
        let format = match values.text("backing_fmt") {
            None => header.backing_format(),
            Some(format) => Some(relink::recorded_format(format).to_owned()),
        };
        if name.is_none() && values.text("backing_fmt").is_some_and(|f| !f.is_empty()) {
            return Err(Error::invalid(
                "backing_fmt is the format of a backing file, and there is none",
            ));
        }
        if name.is_some() && self.has_data_file() && header.data_file_is_raw() {
            return Err(Error::unsupported(
                "an image whose data file is raw has no backing file",
            ));
        }
        let format = format.filter(|f| name.is_some() && !f.is_empty());
        if values.name("backing_file").is_some() || values.text("backing_fmt").is_some() {
            header.set_backing(name.as_deref(), format.as_deref());
        }
        self.amend_data_file(&mut header, values)?;
        Ok(header)
    }

    fn amend_data_file(&self, header: &mut Header, values: &OptionValues) -> Result<()> {
        if let Some(name) = values.name("data_file") {
            if !self.has_data_file() {
                return Err(Error::unsupported(
                    "data_file can be changed only in images that have one",
                ));
            }
            let data = Some(name.as_bytes().to_vec()).filter(|name| !name.is_empty());
            extension::set(&mut header.extensions, extension::DATA_FILE_NAME, data);
        }
        match values.bool("data_file_raw") {
            None => {}
            Some(true) if header.data_file_is_raw() => {}
            Some(true) => {
                return Err(Error::unsupported(
                    "data_file_raw cannot be switched on in an image that exists",
                ));
            }
            Some(false) => header.autoclear &= !feature::DATA_FILE_RAW,
        }
        Ok(())
    }

    /// Refuses what version 2 cannot have and what nothing is done about.
    fn check_downgrade(&self) -> Result<()> {
        let header = &self.header;
        let why = |text: String| Err(Error::unsupported(format!("compat=0.10: {text}")));
        let incompatible = header.incompatible & !feature::DIRTY;
        if incompatible != 0 {
            return why(format!(
                "the image has features of version 3: incompatible bits {incompatible:#x} (data file 0x4, compression type 0x8, extended L2 0x10)"
            ));
        }
        if header.autoclear & feature::BITMAPS != 0 {
            return why("the image has bitmaps (bitmap --remove takes them away)".to_owned());
        }
        let table = SnapshotTable::read(&*self.file, header)?;
        for snapshot in table.describe(self.size()) {
            let name = printable(&snapshot.name);
            if snapshot.disk_size != self.size() || u32::try_from(snapshot.vm_state_size).is_err() {
                return why(format!(
                    "snapshot '{name}' is of a disk of {} bytes with {} bytes of VM state (allowed: {}, less than 4 GiB)",
                    snapshot.disk_size,
                    snapshot.vm_state_size,
                    self.size()
                ));
            }
        }
        self.plan_expansion().map(drop)
    }
}

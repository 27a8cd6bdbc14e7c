//! From a file to an open disk: the descriptor, and the files that it names.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::formats::vmdk::descriptor::{self, Descriptor};
use crate::formats::vmdk::extent::{Data, Extent};
use crate::formats::vmdk::header::{Header, SECTOR};
use crate::formats::vmdk::image::Vmdk;
use crate::formats::vmdk::line::{Access, ExtentLine, Kind};
use crate::formats::vmdk::sesparse;
use crate::formats::vmdk::sesparse::SeSparse;
use crate::formats::vmdk::session::Place;
use crate::formats::vmdk::sparse::Sparse;
use crate::image::open::{OpenOptions, Purpose};
use crate::storage::Storage;
use crate::util::text::printable;

/// Kinds of disks whose data is on devices that only the server sees.
const DEVICES: [&str; 4] = [
    "vmfsrdm",
    "vmfsrdmp",
    "vmfsrawdevicemap",
    "vmfspassthroughrawdevicemap",
];

/// Opens the disk in `storage`: a descriptor, a sparse file with one, or one extent alone.
pub(super) fn open(storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<Vmdk> {
    let mut magic = [0; 8];
    storage.read_at(&mut magic, 0)?;
    let header = match magic {
        [b'K' | b'k', b'D' | b'd', b'M' | b'm', b'V' | b'v', ..] => {
            Some(Header::read(&*storage, 0)?)
        }
        _ => None,
    };
    let (descriptor, place) = match &header {
        Some(header) => (
            embedded(&*storage, header)?,
            header.descriptor().map_or(Place::Nowhere, Place::Inside),
        ),
        None if magic.starts_with(b"COWD") => (None, Place::Nowhere),
        None if u64::from_le_bytes(magic) == sesparse::MAGIC => (None, Place::Nowhere),
        None => (Some(apart(&storage)?), Place::File),
    };
    let Some(descriptor) = descriptor else {
        return alone(storage, header.as_ref(), options);
    };
    refuse(&descriptor, options)?;
    let itself = header.filter(|header| !header.is_only_descriptor());
    let extents = extents(&storage, &descriptor, itself.as_ref(), options)?;
    Vmdk::new(storage, Some(descriptor), place, extents, options)
}

/// The descriptor inside a sparse file; `None` where there is only room for one.
fn embedded(storage: &dyn Storage, header: &Header) -> Result<Option<Descriptor>> {
    let Some(host) = header.descriptor() else {
        return Ok(None);
    };
    let found = Descriptor::read(storage, host.start, host.end - host.start)?;
    match found.is_empty() {
        true if header.is_only_descriptor() => Err(Error::corrupt("the descriptor is empty")),
        true => Ok(None),
        false => Ok(Some(found)),
    }
}

/// A descriptor that is a file of its own.
fn apart(storage: &Arc<dyn Storage>) -> Result<Descriptor> {
    let mut head = [0; 4096];
    storage.read_at(&mut head, 0)?;
    if !descriptor::is_one(&head) {
        return Err(Error::new(
            ErrorKind::WrongFormat,
            "is no VMDK (allowed: KDMV, COWD, seSparse or a descriptor at its start)",
        ));
    }
    Descriptor::read(&**storage, 0, storage.size())
}

/// Refuses disks whose data cannot be read.
fn refuse(descriptor: &Descriptor, options: &OpenOptions) -> Result<()> {
    let kind = descriptor.text("createtype").unwrap_or_default();
    if DEVICES.contains(&&*kind.to_ascii_lowercase()) {
        return Err(Error::unsupported(format!(
            "createType is '{}': the data is on a raw device, which is not read",
            printable(&kind)
        )));
    }
    match descriptor.encrypted() {
        Some(why) if options.purpose != Purpose::Describe => Err(Error::unsupported(why)),
        _ => Ok(()),
    }
}

/// One extent that no descriptor says anything about.
fn alone(
    storage: Arc<dyn Storage>,
    header: Option<&Header>,
    options: &OpenOptions,
) -> Result<Vmdk> {
    let mut magic = [0; 4];
    storage.read_at(&mut magic, 0)?;
    let (kind, data, len) = match header {
        Some(header) => {
            let sparse = Sparse::hosted(Arc::clone(&storage), header)?;
            let len = sparse.geometry().capacity;
            (Kind::Sparse, Data::Sparse(Box::new(sparse)), len)
        }
        None if magic.starts_with(b"COWD") => {
            let sparse = Sparse::cowd(Arc::clone(&storage))?;
            let len = sparse.geometry().capacity;
            (Kind::VmfsSparse, Data::Sparse(Box::new(sparse)), len)
        }
        None => {
            let sparse = SeSparse::open(Arc::clone(&storage))?;
            let len = sparse.capacity();
            (Kind::SeSparse, Data::SeSparse(Box::new(sparse)), len)
        }
    };
    let extent = Extent {
        start: 0,
        end: AtomicU64::new(len),
        line: ExtentLine {
            access: Access::ReadWrite,
            sectors: len / SECTOR,
            kind,
            name: None,
            offset: 0,
        },
        data,
        storage: Some(Arc::clone(&storage)),
        session: None,
    };
    Vmdk::new(storage, None, Place::Nowhere, vec![extent], options)
}

/// The extents of a disk, open as far as that is wanted.
fn extents(
    storage: &Arc<dyn Storage>,
    descriptor: &Descriptor,
    itself: Option<&Header>,
    options: &OpenOptions,
) -> Result<Vec<Extent>> {
    let mut files = Files {
        options,
        open: BTreeMap::new(),
    };
    let mut extents = Vec::new();
    let mut start = 0_u64;
    for (index, line) in descriptor.extents().enumerate() {
        let end = line.len().ok().and_then(|len| start.checked_add(len));
        let end = end
            .filter(|end| i64::try_from(*end).is_ok())
            .ok_or_else(|| {
                Error::corrupt(format!(
                    "extent {index} ends behind 2^63 bytes (allowed: up to there)"
                ))
            })?;
        // Files are renamed: inside a sparse file the first extent is that file.
        let (data, file) = match itself.filter(|_| index == 0) {
            Some(header) if line.kind == Kind::Sparse => {
                let sparse = Sparse::hosted(Arc::clone(storage), header)?;
                (Data::Sparse(Box::new(sparse)), Some(Arc::clone(storage)))
            }
            Some(_) => {
                return Err(Error::corrupt(format!(
                    "extent 0 is of type {}, and the descriptor lies in a sparse file (allowed: SPARSE)",
                    line.kind.word()
                )));
            }
            None => files.extent(index, line)?,
        };
        extents.push(Extent {
            start,
            end: AtomicU64::new(end),
            line: line.clone(),
            data,
            storage: file,
            session: None,
        });
        start = end;
    }
    match extents.is_empty() {
        true => Err(Error::corrupt("the descriptor names no extent")),
        false => Ok(extents),
    }
}

/// The files that a descriptor names, each open once.
struct Files<'a> {
    options: &'a OpenOptions,
    open: BTreeMap<OsString, Arc<dyn Storage>>,
}

impl Files<'_> {
    fn extent(
        &mut self,
        index: usize,
        line: &ExtentLine,
    ) -> Result<(Data, Option<Arc<dyn Storage>>)> {
        if line.kind == Kind::Zero || line.access == Access::None {
            return Ok((Data::Zero, None));
        }
        let file = match self.file(index, line) {
            Ok(Some(file)) => file,
            Ok(None) => return Ok((Data::Missing(None), None)),
            Err(e) if self.may_miss(&e) => return Ok((Data::Missing(Some(e)), None)),
            Err(e) => return Err(e),
        };
        match Data::open(line, &file) {
            Ok(data) => Ok((data, Some(file))),
            Err(e) if self.options.purpose == Purpose::Describe => {
                let e = e.at_opt(file.path());
                Ok((Data::Missing(Some(e)), Some(file)))
            }
            Err(e) => Err(e).at(file.path().unwrap_or(std::path::Path::new(""))),
        }
    }

    /// Whoever asks what a disk is, or what is wrong with it, is told of others too.
    fn may_miss(&self, error: &Error) -> bool {
        match self.options.purpose {
            Purpose::Use => false,
            Purpose::Check => error.kind() == ErrorKind::NotFound,
            Purpose::Describe => true,
        }
    }

    fn file(&mut self, index: usize, line: &ExtentLine) -> Result<Option<Arc<dyn Storage>>> {
        let (Some(companions), Some(name)) = (&self.options.companions, &line.name) else {
            return Ok(None);
        };
        if let Some(open) = self.open.get(name) {
            return match self.options.access {
                crate::storage::open::Access::Read => Ok(Some(Arc::clone(open))),
                crate::storage::open::Access::Write => Err(Error::corrupt(format!(
                    "extent {index} names '{}' as another does (allowed: for reading)",
                    printable(name)
                ))),
            };
        }
        let file = companions.open(name, &format!("extent {index}"))?;
        self.open.insert(name.clone(), Arc::clone(&file));
        Ok(Some(file))
    }
}

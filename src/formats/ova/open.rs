//! From a package to one of its disks.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::Arc;

use crate::container::gzip::Gunzipped;
use crate::error::{Error, Result};
use crate::formats;
use crate::formats::ova::descriptor::{Capacity, Disk, File};
use crate::formats::ova::member::{Held, Inside};
use crate::formats::ova::package::Package;
use crate::formats::refused::REFUSED;
use crate::image::contents::choose;
use crate::image::open::{Companions, OpenOptions};
use crate::image::{Driver, Image, probe};
use crate::storage::Storage;
use crate::storage::open::Access;
use crate::util::progress::Watcher;
use crate::util::text::printable;

/// Bytes by which what is compressed may be longer than its disk and an eighth of it: tables.
const MORE_THAN_CAPACITY: u64 = 64 << 20;

/// A file that holds a disk.
#[derive(Debug)]
pub(super) struct Source<'a> {
    /// As the descriptor calls it.
    pub(super) name: OsString,
    pub(super) file: Option<&'a File>,
    /// What the descriptor calls its format.
    pub(super) format: Option<&'a str>,
    /// Size of the disk, as the descriptor has it.
    pub(super) capacity: Option<u64>,
}

/// Opens the disk that is wanted of the archive in `storage`.
pub(super) fn archive(storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<Box<dyn Image>> {
    refuse_writing(options)?;
    chosen(&Arc::new(Package::archive(storage)?), options)
}

/// Opens the disk that is wanted of those beside the descriptor in `storage`.
pub(super) fn beside(storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<Box<dyn Image>> {
    refuse_writing(options)?;
    chosen(&Arc::new(Package::beside(storage, options)?), options)
}

fn refuse_writing(options: &OpenOptions) -> Result<()> {
    match options.access {
        Access::Read => Ok(()),
        Access::Write => Err(Error::unsupported(
            "the disks of an appliance are not written in place (convert makes another)",
        )),
    }
}

fn chosen(package: &Arc<Package>, options: &OpenOptions) -> Result<Box<dyn Image>> {
    let source = pick(package, options.member.as_deref())?;
    let image = open(package, &source, options)?;
    Ok(Box::new(image))
}

/// The disk that the user named, or the only one; any file of an archive by its name.
fn pick<'a>(package: &'a Package, wanted: Option<&OsStr>) -> Result<Source<'a>> {
    let envelope = &package.envelope;
    let mut names = Vec::with_capacity(envelope.disks.len());
    for disk in &envelope.disks {
        let file = disk.file.and_then(|place| package.file_name(place).ok());
        let id = OsString::from(&disk.id);
        names.push([Some(id), file].into_iter().flatten().collect());
    }
    match choose(wanted, &names) {
        Ok(place) => source_of(package, &envelope.disks[place]),
        Err(why) => {
            let is_there = |name: &&OsStr| package.members().iter().any(|m| m.name == **name);
            match wanted.filter(is_there) {
                Some(name) => Ok(Source {
                    name: name.to_owned(),
                    file: None,
                    format: None,
                    capacity: None,
                }),
                None => Err(Error::invalid(why)),
            }
        }
    }
}

/// The file that holds a disk.
///
/// # Errors
/// `Unsupported` for what is in no file, or in more than one.
pub(super) fn source_of<'a>(package: &'a Package, disk: &'a Disk) -> Result<Source<'a>> {
    let shown = printable(&disk.id);
    let Some(place) = disk.file else {
        let text = format!("disk '{shown}' is empty: it has no file (create makes an empty disk)");
        return Err(Error::unsupported(text));
    };
    if let Some(parent) = &disk.parent {
        let text = format!(
            "disk '{shown}' is what differs from disk '{}', which is not supported",
            printable(parent)
        );
        return Err(Error::unsupported(text));
    }
    Ok(Source {
        name: package.file_name(place)?,
        file: package.envelope.files.get(place),
        format: disk.format.as_deref(),
        capacity: match disk.capacity {
            Capacity::Bytes(bytes) => Some(bytes),
            Capacity::Unknown(_) => None,
        },
    })
}

/// Opens a disk.
pub(super) fn open(
    package: &Arc<Package>,
    source: &Source<'_>,
    options: &OpenOptions,
) -> Result<Held> {
    let files = Arc::new(Inside::new(Arc::clone(package)));
    let stored = files.take(&source.name, "disk")?;
    let storage = plain(stored, source, &options.watcher)?;
    let driver = driver_of(&*storage, source, options)?;
    // What a disk names is in the package too, and for one beside its descriptor in its directory.
    let companions = Arc::clone(&files) as Arc<dyn Companions>;
    let inner = OpenOptions {
        companions: options.companions.as_ref().map(|_| companions),
        values: crate::image::options::OptionValues::default(),
        member: None,
        ..options.clone()
    };
    let path = storage.path().map(Path::to_owned);
    let image = (driver.open)(storage, &inner).map_err(|e| e.at_opt(path.as_deref()))?;
    if let Some(backing) = image.backing() {
        let name = backing.names.first().map(|name| printable(&name.path));
        let text = format!(
            "has another image below it, '{}' (allowed in an appliance: disks that are whole)",
            name.unwrap_or_default()
        );
        return Err(Error::unsupported(text).at_opt(path.as_deref()));
    }
    Ok(Held { image, files })
}

/// The bytes of the disk's file.
fn plain(
    stored: Arc<dyn Storage>,
    source: &Source<'_>,
    watcher: &Watcher,
) -> Result<Arc<dyn Storage>> {
    let shown = printable(&source.name);
    let Some(file) = source.file else {
        return Ok(stored);
    };
    if file.chunk.is_some() {
        let text = format!("'{shown}' is in several parts (chunkSize), which is not supported");
        return Err(Error::unsupported(text));
    }
    match file.compression.as_deref() {
        None | Some("" | "identity") => Ok(stored),
        Some("gzip") => {
            let most = source.capacity.map_or(u64::MAX, |capacity| {
                capacity
                    .saturating_add(capacity / 8)
                    .saturating_add(MORE_THAN_CAPACITY)
            });
            Ok(Arc::new(Gunzipped::open(stored, most, watcher)?))
        }
        Some(other) => Err(Error::unsupported(format!(
            "'{shown}' is compressed by '{}', which is not supported",
            printable(other)
        ))),
    }
}

/// Parts of the URIs by which descriptors call formats whose files tell what they are.
const DESCRIBED: [&str; 3] = ["vmdk", "qcow", "LinkId=137171"];

/// The format of a disk: as the user says, else by its bytes.
///
/// # Errors
/// `Corrupt` for bytes that no format has, where the descriptor says that they are of one: they are
/// not the disk's.
fn driver_of(
    storage: &dyn Storage,
    source: &Source<'_>,
    options: &OpenOptions,
) -> Result<&'static Driver> {
    let drivers: Vec<&'static Driver> = formats::DRIVERS
        .iter()
        .copied()
        .filter(|driver| formats::container(driver).is_none())
        .collect();
    let Some(name) = options.values.text("format") else {
        let found = probe::probe(&drivers, REFUSED, storage)?;
        let said = source.format.unwrap_or_default();
        if found.is_plain && DESCRIBED.iter().any(|part| said.contains(part)) {
            let text = format!(
                "is of no known format, and the descriptor calls it '{}' (--open-options format=raw \
                 reads it as it is)",
                printable(said)
            );
            return Err(Error::corrupt(text).at_opt(storage.path()));
        }
        return Ok(found);
    };
    let driver = formats::named(name).map_err(|e| e.noted("option 'format'"))?;
    match drivers.contains(&driver) {
        true => Ok(driver),
        false => Err(Error::invalid(format!(
            "option 'format' is '{name}' (allowed: a format of disks)"
        ))),
    }
}

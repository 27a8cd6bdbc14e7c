//! What is in a package, for `info`.

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::error::Result;
use crate::formats::ova::descriptor::{Capacity, Disk, File};
use crate::formats::ova::open::{open, source_of};
use crate::formats::ova::package::{Package, Seal};
use crate::formats::ova::{DRIVER, LOOSE};
use crate::image::contents::{Contents, Held};
use crate::image::info::{Detail, HostInfo};
use crate::image::open::OpenOptions;
use crate::image::{Driver, Image};
use crate::storage::Storage;
use crate::util::text::replaced;

/// Most characters of what is said again of each disk in a file.
const MAX_REPEATED: usize = 200;
/// Members that are told by name at most.
const MAX_TOLD: usize = 100;

/// Lists the archive in `storage`.
pub(super) fn archive(storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<Contents> {
    list(&Arc::new(Package::archive(storage)?), &DRIVER, options)
}

/// Lists the package that the descriptor in `storage` describes.
pub(super) fn beside(storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<Contents> {
    let package = Arc::new(Package::beside(storage, options)?);
    list(&package, &LOOSE, options)
}

fn list(
    package: &Arc<Package>,
    driver: &'static Driver,
    options: &OpenOptions,
) -> Result<Contents> {
    let storage = package.storage();
    let mut disks: Vec<Held> = Vec::with_capacity(package.envelope.disks.len());
    // A file is looked at once and described once, however many disks are said to be in it, and by
    // however many references.
    let mut seen: HashMap<(OsString, Option<String>), usize> = HashMap::new();
    for disk in &package.envelope.disks {
        let file = disk.file.and_then(|p| package.envelope.files.get(p));
        let name = disk.file.and_then(|p| package.file_name(p).ok());
        let key = name.map(|name| (name, file.and_then(|f| f.compression.clone())));
        let before = key.as_ref().and_then(|key| seen.get(key));
        let held = match before.and_then(|place| disks.get(*place)) {
            Some(same) => Held {
                name: disk.id.clone(),
                file: same.file.clone(),
                format: same.format,
                virtual_size: same.virtual_size,
                details: [
                    vec![Detail::new("same-file-as", &*same.name)],
                    said(disk, None),
                ]
                .concat(),
                image: Vec::new(),
                problem: same.problem.as_ref().map(|why| shortened(why)),
            },
            None => held(package, disk, options),
        };
        if let Some(key) = key {
            seen.entry(key).or_insert(disks.len());
        }
        disks.push(held);
    }
    Ok(Contents {
        path: storage.path().map(Path::to_owned),
        format: driver.name,
        host: HostInfo::of(&**storage)?,
        details: details(package),
        disks,
    })
}

/// What is told once for each of many disks.
fn shortened(why: &str) -> String {
    why.chars().take(MAX_REPEATED).collect()
}

fn details(package: &Package) -> Vec<Detail> {
    let envelope = &package.envelope;
    let mut details = vec![
        Detail::new("descriptor", replaced(&package.descriptor.0)),
        Detail::new("ovf-version", &*envelope.version),
        Detail::new("manifest", seal(package)),
    ];
    if package.certificate {
        details.push(Detail::new("certificate", "present, not verified"));
    }
    if !envelope.systems.is_empty() {
        details.push(Detail::new("virtual-systems", envelope.systems.clone()));
    }
    if !envelope.hardware.is_empty() {
        details.push(Detail::new("virtual-hardware", envelope.hardware.clone()));
    }
    let members = package.members();
    if !members.is_empty() {
        let names = members.iter().take(MAX_TOLD).map(|m| replaced(&m.name));
        details.push(Detail::new("members", names.collect::<Vec<_>>()));
    }
    let nested = members.iter().filter(|m| m.name.as_bytes().contains(&b'/'));
    if let Some(first) = nested.clone().next() {
        details.push(Detail::new("in-directories", nested.count()));
        details.push(Detail::new("in-directory", replaced(&first.name)));
    }
    let others = others(package);
    if !others.is_empty() {
        details.push(Detail::new("other-files", others));
    }
    details
}

/// What is known of the manifest without reading disks.
fn seal(package: &Package) -> Value {
    match &package.seal {
        Seal::None => "none".into(),
        Seal::Unknown => "not looked for".into(),
        Seal::Damaged(why) => json!({ "state": "damaged", "problem": why.message() }),
        Seal::Manifest(manifest) => {
            let referred =
                (0..package.envelope.files.len()).filter_map(|p| package.file_name(p).ok());
            let wanted = std::iter::once(package.descriptor.0.clone()).chain(referred);
            let missing: Vec<String> = wanted
                .filter(|name| manifest.get(name).is_none())
                .map(|name| replaced(&name))
                .collect();
            let mut value = json!({
                "state": "present, compared when a disk is read whole",
                "digests": manifest.kinds(),
                "files": manifest.len(),
            });
            if !missing.is_empty() {
                value["missing"] = missing.into();
            }
            value
        }
    }
}

/// Files that the descriptor refers to and that are no disks, and members that it does not know.
fn others(package: &Package) -> Vec<String> {
    let disks = package.envelope.disks.iter().filter_map(|disk| disk.file);
    let disks: std::collections::HashSet<usize> = disks.collect();
    let files = package.envelope.files.iter().enumerate();
    let names = files.filter(|(place, _)| !disks.contains(place));
    names.map(|(_, file)| file.href.clone()).collect()
}

fn held(package: &Arc<Package>, disk: &Disk, options: &OpenOptions) -> Held {
    let file = disk
        .file
        .and_then(|place| package.envelope.files.get(place));
    let name: Option<OsString> = disk.file.and_then(|place| package.file_name(place).ok());
    let mut held = Held {
        name: disk.id.clone(),
        file: name,
        format: None,
        virtual_size: None,
        details: said(disk, file),
        image: Vec::new(),
        problem: None,
    };
    if !package.is_open() && disk.file.is_some() && disk.parent.is_none() {
        return held;
    }
    let opened = source_of(package, disk).and_then(|source| open(package, &source, options));
    match opened {
        Ok(opened) => {
            held.format = Some(opened.driver().name);
            held.virtual_size = Some(opened.virtual_size());
            held.image = opened.details();
            look(&mut held, disk, file, &*opened.image, opened.stored());
        }
        Err(_) if disk.file.is_none() => {}
        Err(e) => held.problem = Some(e.message().to_owned()),
    }
    held
}

/// What the descriptor says of a disk.
fn said(disk: &Disk, file: Option<&File>) -> Vec<Detail> {
    let mut details = Vec::new();
    let capacity = match &disk.capacity {
        Capacity::Bytes(bytes) => Detail::new("capacity-size", *bytes),
        Capacity::Unknown(text) => Detail::new("capacity", &**text),
    };
    details.push(capacity);
    if let Some(units) = &disk.units {
        details.push(Detail::new("capacity-units", &**units));
    }
    if let Some(size) = disk.populated {
        details.push(Detail::new("populated-size", size));
    }
    if let Some(size) = file.and_then(|file| file.size) {
        details.push(Detail::new("described-file-size", size));
    }
    if let Some(format) = &disk.format {
        details.push(Detail::new("described-format", &**format));
    }
    if let Some(compression) = file.and_then(|file| file.compression.as_deref()) {
        details.push(Detail::new("compression", compression));
    }
    if let Some(parent) = &disk.parent {
        details.push(Detail::new("parent", &**parent));
    }
    details
}

/// Compares what the descriptor says with what there is.
fn look(held: &mut Held, disk: &Disk, file: Option<&File>, image: &dyn Image, stored: u64) {
    held.details.insert(0, Detail::new("file-size", stored));
    let mut differs = Vec::new();
    if file
        .and_then(|file| file.size)
        .is_some_and(|size| size != stored)
    {
        differs.push("file size");
    }
    if disk.capacity != Capacity::Bytes(image.virtual_size()) {
        differs.push("capacity");
    }
    if !differs.is_empty() {
        let text = format!(
            "the descriptor has another {}",
            differs.join(" and another ")
        );
        held.details.push(Detail::new("note", text));
    }
}

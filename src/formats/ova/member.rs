//! A disk of a package, open: an image of any format, of which the bytes are in the package.

use std::ffi::{OsStr, OsString};
use std::ops::Range;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::formats::ova::manifest::Manifest;
use crate::formats::ova::package::{Package, Seal};
use crate::image::check::{Repair, Report};
use crate::image::contents::Sealed;
use crate::image::info::Detail;
use crate::image::open::Companions;
use crate::image::{
    Backing, Bitmaps, Caps, Check, Driver, Image, Part, Run, Snapshot, Snapshots, Wait,
};
use crate::storage::{Limits, Storage, Zeroing};
use crate::util::progress::Progress;

/// A file of a package that was opened: what the manifest calls it, and its bytes as they are there.
type Opened = (OsString, Arc<dyn Storage>);

/// Opens further files of one disk: those of its package, and no others.
#[derive(Debug)]
pub(super) struct Inside {
    package: Arc<Package>,
    opened: Mutex<Vec<Opened>>,
}

impl Inside {
    pub(super) fn new(package: Arc<Package>) -> Self {
        Self {
            package,
            opened: Mutex::default(),
        }
    }

    /// Opens the file that the descriptor calls `name`, and remembers that it was.
    pub(super) fn take(&self, name: &OsStr, what: &str) -> Result<Arc<dyn Storage>> {
        let storage = self.package.open(name, what)?;
        let entry = (name.to_owned(), Arc::clone(&storage));
        self.opened.lock().push(entry);
        Ok(storage)
    }
}

impl Companions for Inside {
    fn open(&self, name: &OsStr, what: &str) -> Result<Arc<dyn Storage>> {
        self.take(name, what)
    }
}

/// An open disk of a package.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) image: Box<dyn Image>,
    pub(super) files: Arc<Inside>,
}

impl Held {
    /// Bytes of its file as it is in the package.
    pub(super) fn stored(&self) -> u64 {
        let opened = self.files.opened.lock();
        opened.first().map_or(0, |(_, storage)| storage.size())
    }
}

impl Image for Held {
    /// That of the disk: the package is no more than where it is.
    fn driver(&self) -> &'static Driver {
        self.image.driver()
    }

    fn virtual_size(&self) -> u64 {
        self.image.virtual_size()
    }

    fn cluster_size(&self) -> Option<u64> {
        self.image.cluster_size()
    }

    fn limits(&self) -> Limits {
        self.image.limits()
    }

    fn caps(&self) -> Caps {
        Caps {
            write: false,
            ..self.image.caps()
        }
    }

    fn storage(&self) -> &dyn Storage {
        self.image.storage()
    }

    fn map(&self, at: u64, len: u64, wait: Wait) -> Result<Run<'_>> {
        self.image.map(at, len, wait)
    }

    fn read_encoded(&self, buf: &mut [u8], at: u64) -> Result<usize> {
        self.image.read_encoded(buf, at)
    }

    fn zero(&self, _range: Range<u64>, _how: Zeroing) -> Result<()> {
        Err(Error::read_only())
    }

    fn discard(&self, _range: Range<u64>) -> Result<()> {
        Err(Error::read_only())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn close(&self) -> Result<()> {
        Ok(())
    }

    fn parts(&self) -> Vec<Part<'_>> {
        self.image.parts()
    }

    fn backing(&self) -> Option<Backing> {
        self.image.backing()
    }

    fn identity(&self) -> Option<Uuid> {
        self.image.identity()
    }

    fn state(&self) -> Option<Uuid> {
        self.image.state()
    }

    fn may_be_unwritten(&self) -> bool {
        self.image.may_be_unwritten()
    }

    fn is_encrypted(&self) -> bool {
        self.image.is_encrypted()
    }

    fn is_dirty(&self) -> bool {
        self.image.is_dirty()
    }

    fn details(&self) -> Vec<Detail> {
        self.image.details()
    }

    fn as_check(&self) -> Option<&dyn Check> {
        let has_any = self.image.as_check().is_some() || self.sealed().is_some();
        has_any.then_some(self)
    }

    fn bitmaps(&self) -> Option<&dyn Bitmaps> {
        self.image.bitmaps()
    }

    fn snapshots(&self) -> Result<Vec<Snapshot>> {
        self.image.snapshots()
    }

    fn as_snapshots(&mut self) -> Option<&mut dyn Snapshots> {
        self.image.as_snapshots()
    }

    fn sealed(&self) -> Option<&dyn Sealed> {
        match self.files.package.seal {
            Seal::None | Seal::Unknown => None,
            Seal::Damaged(_) | Seal::Manifest(_) => Some(self),
        }
    }
}

/// The disk's own metadata, where it has such, and the digests of what holds it.
impl Check for Held {
    fn check(&self, repair: Repair, progress: &dyn Progress) -> Result<Report> {
        let mut report = match self.image.as_check() {
            Some(check) => check.check(repair, progress)?,
            None => Report::default(),
        };
        let compared = self.sealed().map(|seal| seal.verify(progress));
        match compared.transpose() {
            Err(e) if e.kind() == ErrorKind::Corrupt => report.corruption(e.message(), None),
            unknown => unknown?
                .into_iter()
                .flatten()
                .for_each(|text| report.note(text)),
        }
        Ok(report)
    }

    fn work(&self) -> u64 {
        let own = self.image.as_check().map_or(0, Check::work);
        own.saturating_add(self.sealed().map_or(0, Sealed::bytes))
    }
}

impl Sealed for Held {
    fn bytes(&self) -> u64 {
        let descriptor = self.files.package.descriptor.1.size();
        let opened = self.files.opened.lock();
        opened
            .iter()
            .map(|(_, storage)| storage.size())
            .sum::<u64>()
            + descriptor
    }

    fn verify(&self, progress: &dyn Progress) -> Result<Vec<String>> {
        let package = &self.files.package;
        let manifest = match &package.seal {
            Seal::Manifest(manifest) => manifest,
            Seal::Damaged(why) => {
                return Err(Error::corrupt(why.message()).noted("--no-manifest reads all the same"));
            }
            Seal::None | Seal::Unknown => return Ok(Vec::new()),
        };
        let folder = package.folder();
        let descriptor = package.descriptor.clone();
        let opened = self.files.opened.lock().clone();
        let mut unknown = Vec::new();
        for (name, storage) in std::iter::once(descriptor).chain(opened) {
            let name = name_in_manifest(manifest, folder, &name);
            match manifest.verify(&name, &*storage, progress) {
                Err(e) if e.kind() == ErrorKind::Unsupported => {
                    unknown.push(e.message().to_owned());
                }
                compared => compared?,
            }
        }
        Ok(unknown)
    }
}

/// What a manifest calls the file `name` of the package in `folder`: as the descriptor does, with the
/// folder of both, or without any.
fn name_in_manifest(manifest: &Manifest, folder: &[u8], name: &OsStr) -> OsString {
    let whole = OsString::from_vec([folder, name.as_bytes()].concat());
    let last = Path::new(name).file_name().unwrap_or(name);
    let names = [name, &whole];
    let found = names.into_iter().find(|name| manifest.get(name).is_some());
    found.unwrap_or(last).to_owned()
}

//! Disks of a few layers for tests, in memory or in files.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use tempfile::TempDir;
use vdtool::chain::open::{self, ChainOptions};
use vdtool::chain::{Base, Chain};
use vdtool::formats;
use vdtool::image::check::{Repair, Report};
use vdtool::image::create::{CreateBacking, CreateOptions};
use vdtool::image::open::{OpenOptions, Purpose, WriteOrder};
use vdtool::image::options::OptionValues;
use vdtool::image::{Driver, Image};
use vdtool::storage::Storage;
use vdtool::storage::memory::MemoryStorage;
use vdtool::storage::open::{Access, Caching, Flushing, Sharing, StorageOptions};
use vdtool::util::grace::Grace;
use vdtool::util::progress::Silent;

use crate::util::{Seeded, len, scratch};

const WRITE: StorageOptions = StorageOptions {
    access: Access::Write,
    sharing: Sharing::Locked,
    caching: Caching::Mapped,
    flushing: Flushing::Needed,
};

/// One layer to be made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LayerSpec {
    pub(crate) format: &'static str,
    pub(crate) options: &'static str,
    pub(crate) size: u64,
}

/// Where layers are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Memory,
    /// In memory, each layer of this length, which does not change, with anything in it.
    Device(usize),
    Files,
}

#[derive(Debug)]
enum Home {
    Memory(Arc<MemoryStorage>),
    File(PathBuf),
}

#[derive(Debug)]
struct Layer {
    driver: &'static Driver,
    home: Home,
}

/// A disk of a few layers, top first, that is opened and closed at will.
#[derive(Debug)]
pub(crate) struct Disk {
    layers: Vec<Layer>,
    directory: Option<TempDir>,
    place: Place,
}

impl Disk {
    /// Makes the layers, `specs` top first, each on top of the next.
    pub(crate) fn create(place: Place, specs: &[LayerSpec]) -> Self {
        let mut disk = Self {
            layers: Vec::new(),
            directory: (place == Place::Files).then(scratch),
            place,
        };
        for spec in specs.iter().rev() {
            disk.push(spec);
        }
        disk
    }

    /// A disk of one layer that is there already.
    pub(crate) fn of_bytes(format: &str, bytes: &[u8]) -> Self {
        let layer = Layer {
            driver: formats::by_name(format).expect("a known format"),
            home: Home::Memory(Arc::new(MemoryStorage::from_bytes(bytes))),
        };
        Self {
            layers: vec![layer],
            directory: None,
            place: Place::Memory,
        }
    }

    /// Adds a layer on top that is there already.
    pub(crate) fn push_bytes(&mut self, format: &str, bytes: &[u8]) {
        let top = Self::of_bytes(format, bytes).layers;
        self.layers.splice(0..0, top);
    }

    /// Adds a layer on top.
    pub(crate) fn push(&mut self, spec: &LayerSpec) {
        let driver = formats::by_name(spec.format).expect("a known format");
        let creator = driver.creator.as_ref().expect("a format that is written");
        let values = [spec.options].into_iter().filter(|o| !o.is_empty());
        let mut options = CreateOptions {
            size: spec.size,
            backing: self.backing(),
            values: OptionValues::parse(creator.options, driver.name, values).expect("valid"),
            ..CreateOptions::default()
        };
        let home = match &self.directory {
            None => {
                let name = format!("/memory/{}", self.layers.len());
                let storage = match self.place {
                    Place::Device(len) => {
                        MemoryStorage::from_bytes(&vec![0xaa; len]).with_fixed_len()
                    }
                    Place::Memory | Place::Files => MemoryStorage::new(),
                };
                Home::Memory(Arc::new(storage.with_path(name)))
            }
            Some(directory) => {
                let name = format!("layer{}.{}", self.layers.len(), driver.name);
                options.name = name.clone().into();
                options.named = (creator.settle)(&options).expect("valid").named;
                let path = directory.path().join(name);
                std::fs::File::create_new(&path).expect("the file is new");
                let further: Vec<_> = options.further().map(|(_, name)| name.to_owned()).collect();
                for name in further {
                    let path = directory.path().join(name);
                    std::fs::File::create_new(&path).expect("the file is new");
                    let storage = vdtool::storage::open::open(&path, &WRITE);
                    options.files.push(storage.expect("opens"));
                }
                Home::File(path)
            }
        };
        let layer = Layer { driver, home };
        (creator.create)(&*layer.storage(Access::Write), &options).expect("creates");
        options.files.clear();
        self.layers.insert(0, layer);
    }

    fn backing(&self) -> Option<CreateBacking> {
        let below = self.layers.first()?;
        let image = below.open(&OpenOptions::default());
        let storage = below.storage(Access::Read);
        let absolute = storage.path().expect("it has one").to_owned();
        let relative = PathBuf::from(absolute.file_name().expect("it has one"));
        Some(CreateBacking {
            name: relative.as_os_str().to_owned(),
            absolute,
            relative,
            format: below.driver.name,
            identity: image.identity(),
            // A VMDK names its parent by that alone, a VHDX by that of its data.
            state: image
                .state()
                .filter(|_| ["vmdk", "vhdx"].contains(&below.driver.name)),
            modified: SystemTime::now(),
            virtual_size: image.virtual_size(),
            cluster_size: None,
            sector_size: image.sector_size(),
            physical_sector_size: image.physical_sector_size(),
        })
    }

    /// Opens the disk; in files, the layers below are found by what the images name.
    pub(crate) fn open(&self, access: Access, order: WriteOrder) -> Chain {
        let top = self.layers.first().expect("there is a layer");
        if let Home::File(path) = &top.home {
            let options = ChainOptions {
                storage: StorageOptions {
                    access,
                    ..StorageOptions::default()
                },
                format: Some(top.driver),
                order,
                ..ChainOptions::default()
            };
            let chain = open::open(path, &options).expect("the disk opens");
            assert_eq!(chain.layers().len(), self.layers.len(), "all layers");
            return chain;
        }
        let storages = self.layers.iter().map(|l| l.storage(access)).collect();
        self.open_with(storages, access, order)
    }

    /// Opens the disk on other storages, top first.
    pub(crate) fn open_with(
        &self,
        storages: Vec<Arc<dyn Storage>>,
        access: Access,
        order: WriteOrder,
    ) -> Chain {
        self.try_open_with(storages, access, order)
            .expect("the disk opens")
    }

    /// As `open_with`, where the top layer may be refused.
    pub(crate) fn try_open_with(
        &self,
        storages: Vec<Arc<dyn Storage>>,
        access: Access,
        order: WriteOrder,
    ) -> vdtool::Result<Chain> {
        let grace = Arc::new(Grace::default());
        let mut images = Vec::new();
        for (depth, (layer, storage)) in self.layers.iter().zip(storages).enumerate() {
            let options = OpenOptions {
                access: if depth == 0 { access } else { Access::Read },
                order,
                grace: Arc::clone(&grace),
                ..OpenOptions::default()
            };
            images.push((layer.driver.open)(storage, &options)?);
        }
        Chain::new(images, Base::Zeroes, grace)
    }

    /// The file of the top layer.
    pub(crate) fn path(&self) -> PathBuf {
        match &self.layers[0].home {
            Home::File(path) => path.clone(),
            Home::Memory(_) => panic!("the layers are in memory"),
        }
    }

    /// The layers in memory, top first.
    pub(crate) fn memory(&self) -> Vec<Arc<MemoryStorage>> {
        let memory = |layer: &Layer| match &layer.home {
            Home::Memory(storage) => Arc::clone(storage),
            Home::File(_) => panic!("the layers are in files"),
        };
        self.layers.iter().map(memory).collect()
    }

    /// The registry row of the top layer.
    pub(crate) fn driver(&self) -> &'static Driver {
        self.layers[0].driver
    }

    /// Checks, and repairs as told, the top layer, which nobody has open; `None` where the format
    /// has nothing to check.
    pub(crate) fn check(&self, repair: Repair) -> Option<Report> {
        let access = match repair {
            Repair::Nothing => Access::Read,
            Repair::Leaks | Repair::All => Access::Write,
        };
        let Home::File(path) = &self.layers[0].home else {
            let storage = self.layers[0].storage(access);
            return check(self.driver(), storage, repair);
        };
        // With the other files that it is made of.
        let options = ChainOptions {
            storage: StorageOptions {
                access,
                ..StorageOptions::default()
            },
            format: Some(self.driver()),
            purpose: Purpose::Check,
            follow: open::Follow::Layers(1),
            ..ChainOptions::default()
        };
        let chain = open::open(path, &options).expect("opens for a check");
        let check = chain.top().as_check()?;
        Some(check.check(repair, &Silent).expect("the check runs"))
    }
}

/// Checks the image in `storage`; `None` where the format has nothing to check.
pub(crate) fn check(
    driver: &'static Driver,
    storage: Arc<dyn Storage>,
    repair: Repair,
) -> Option<Report> {
    let options = OpenOptions {
        access: match repair {
            Repair::Nothing => Access::Read,
            Repair::Leaks | Repair::All => Access::Write,
        },
        purpose: Purpose::Check,
        ..OpenOptions::default()
    };
    let image = (driver.open)(storage, &options).expect("opens for a check");
    let check = image.as_check()?;
    Some(check.check(repair, &Silent).expect("the check runs"))
}

impl Layer {
    fn storage(&self, access: Access) -> Arc<dyn Storage> {
        match &self.home {
            Home::Memory(storage) => {
                storage.open_anew();
                storage.clone()
            }
            Home::File(path) => {
                let options = StorageOptions {
                    access,
                    ..StorageOptions::default()
                };
                vdtool::storage::open::open(path, &options).expect("the file opens")
            }
        }
    }

    fn open(&self, options: &OpenOptions) -> Box<dyn Image> {
        (self.driver.open)(self.storage(options.access), options).expect("the layer opens")
    }
}

/// All bytes of a disk.
pub(crate) fn read_all(chain: &Chain) -> Vec<u8> {
    let mut bytes = vec![0; len(chain.virtual_size())];
    chain.read_at(&mut bytes, 0).expect("reads");
    bytes
}

/// Makes the layers of `specs` (top first), each but the top one with random data in places, and
/// gives the disk with what it reads as.
pub(crate) fn filled(place: Place, specs: &[LayerSpec], rng: &mut Seeded) -> (Disk, Vec<u8>) {
    let mut disk = Disk::create(place, &[]);
    let mut model: Vec<u8> = Vec::new();
    for (index, spec) in specs.iter().rev().enumerate() {
        disk.push(spec);
        model.resize(len(spec.size), 0);
        if index + 1 == specs.len() {
            break;
        }
        let chain = disk.open(Access::Write, WriteOrder::Ordered);
        for _ in 0..12 {
            let at = rng.usize(..model.len());
            let count = rng.usize(1..=(model.len() - at).min(model.len() / 6 + 1));
            let bytes = rng.bytes(count);
            chain.write_at(&bytes, at as u64).expect("writes");
            model[at..at + count].copy_from_slice(&bytes);
        }
        chain.close().expect("closes");
    }
    (disk, model)
}

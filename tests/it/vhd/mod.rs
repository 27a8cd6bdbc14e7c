//! VHD on storage in memory: models, threads, crashes.

mod check;
mod create;
mod resize;
mod session;

use std::sync::Arc;

use uuid::Uuid;
use vdtool::Result;
use vdtool::chain::{Base, Chain};
use vdtool::formats::vhd::DRIVER;
use vdtool::image::Image;
use vdtool::image::check::{Repair, Report};
use vdtool::image::create::{CreateBacking, CreateOptions};
use vdtool::image::open::{OpenOptions, Purpose, WriteOrder};
use vdtool::image::options::OptionValues;
use vdtool::storage::Storage;
use vdtool::storage::memory::MemoryStorage;
use vdtool::storage::open::Access;

const BLOCK: u64 = 16 << 10;

fn values(texts: &[&str]) -> OptionValues {
    let specs = DRIVER.creator.as_ref().expect("makes images").options;
    OptionValues::parse(specs, "vhd", texts.iter().copied()).expect("options are right")
}

fn create(size: u64, texts: &[&str], parent: Option<Uuid>) -> Arc<MemoryStorage> {
    let storage = Arc::new(MemoryStorage::new());
    let backing = parent.map(|uuid| CreateBacking {
        name: "parent.vhd".into(),
        absolute: "/vm/parent.vhd".into(),
        relative: "parent.vhd".into(),
        format: if uuid.is_nil() { "raw" } else { "vhd" },
        identity: (!uuid.is_nil()).then_some(uuid),
        state: None,
        modified: std::time::SystemTime::now(),
        virtual_size: size,
        cluster_size: None,
        sector_size: None,
        physical_sector_size: None,
    });
    let options = CreateOptions {
        size,
        backing,
        values: values(texts),
        ..CreateOptions::default()
    };
    let creator = DRIVER.creator.as_ref().expect("makes images");
    (creator.create)(&*storage, &options).expect("creates");
    storage
}

fn dynamic(size: u64) -> Arc<MemoryStorage> {
    create(size, &["block_size=16k"], None)
}

fn options(access: Access) -> OpenOptions {
    OpenOptions {
        access,
        ..OpenOptions::default()
    }
}

fn open(storage: &Arc<MemoryStorage>, options: &OpenOptions) -> Result<Box<dyn Image>> {
    (DRIVER.open)(Arc::clone(storage) as Arc<dyn Storage>, options)
}

/// A chain of images, top first, the top for writing.
fn chain(layers: &[&Arc<MemoryStorage>], order: WriteOrder) -> Chain {
    let mut top = options(Access::Write);
    top.order = order;
    let below = OpenOptions {
        access: Access::Read,
        ..top.clone()
    };
    let images = layers.iter().enumerate().map(|(depth, storage)| {
        let options = if depth == 0 { &top } else { &below };
        open(storage, options).expect("opens")
    });
    Chain::new(images.collect(), Base::Zeroes, top.grace.clone()).expect("is a chain")
}

fn content(chain: &Chain) -> Vec<u8> {
    let len = usize::try_from(chain.virtual_size()).expect("small");
    let mut bytes = vec![0; len];
    chain.read_at(&mut bytes, 0).expect("reads");
    bytes
}

fn check(storage: &Arc<MemoryStorage>, repair: Repair) -> Report {
    let mut options = options(match repair {
        Repair::Nothing => Access::Read,
        _ => Access::Write,
    });
    options.purpose = Purpose::Check;
    let image = open(storage, &options).expect("opens for checking");
    let check = image.as_check().expect("can be checked");
    let report = check.check(repair, &vdtool::util::progress::Silent);
    report.expect("the host is well")
}

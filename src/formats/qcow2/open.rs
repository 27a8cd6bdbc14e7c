//! From a file to an open image: which tables it shows, what a writer needs.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::behind::Behind;
use super::guard::Guard;
use super::header::{Header, Need};
use super::lookup::Tables;
use super::refblock::Place;
use super::refcount::Refcounts;
use super::snapshot_table::SnapshotTable;
use super::writer::Writer;
use super::{Qcow2, check, feature};
use crate::error::{Error, Result};
use crate::image::check::{Repair, settle};
use crate::image::codec::{Codec, Decoded};
use crate::image::open::{OpenOptions, Purpose};
use crate::image::snapshot::Pick;
use crate::image::units::{Allocator, Order};
use crate::storage::Storage;
use crate::storage::open::Access;
use crate::util::progress::{Silent, Watcher};
use crate::util::range;

impl Qcow2 {
    /// Opens the image in `file`.
    pub(super) fn open(file: Arc<dyn Storage>, options: &OpenOptions) -> Result<Self> {
        let mut header = Header::read_for(&*file, Need::of(options.purpose, options.access))?;
        let using = options.purpose != Purpose::Check;
        let writing = using && options.access == Access::Write;
        if writing && header.incompatible & feature::CORRUPT != 0 {
            return Err(Error::corrupt(
                "the image is marked corrupt (incompatible bit 1) and is not written; check -r all may mend it",
            ));
        }
        let l1_end = header.l1().end;
        if using && l1_end > file.size() {
            return Err(Error::corrupt(format!(
                "the L1 table ends at {l1_end:#x} (the file ends at {:#x})",
                file.size()
            )));
        }
        if writing && header.incompatible & feature::DIRTY != 0 {
            mend(&file)?;
            header = Header::read(&*file)?;
        }
        let external = header.has_data_file();
        let data = match external {
            true => open_data_file(&header, options)?,
            false => Some(Arc::clone(&file)),
        };
        if let Some(pick) = &options.snapshot {
            view(&*file, &mut header, pick, options.access)?;
        }
        let layout = header.layout();
        let (l2_bits, l1) = (header.l2_bits(), header.l1());
        let tables = Tables::new(Arc::clone(&file), layout, l2_bits, &l1, external);
        let decoded = Decoded::new(header.cluster_size());
        let codec = Codec::new(header.compression, &options.values)?;
        let writer = match options.access {
            Access::Read => None,
            Access::Write => {
                let data = data.clone().filter(|_| external);
                Some(open_writer(&file, data, &header, options))
            }
        };
        Ok(Self {
            file,
            data,
            size: AtomicU64::new(header.size),
            header,
            layout,
            tables,
            decoded,
            codec,
            writer,
            watcher: Watcher::default(),
        })
    }
}

/// Makes a header show a snapshot: its tables, its size.
fn view(file: &dyn Storage, header: &mut Header, pick: &Pick, access: Access) -> Result<()> {
    if access == Access::Write {
        return Err(Error::unsupported(
            "a snapshot is read-only (apply it to write to what it holds)",
        ));
    }
    let table = SnapshotTable::read(file, header)?;
    let list = table.describe(header.size);
    let index = pick.find(&list)?;
    let (Some(entry), Some(snapshot)) = (table.entries.get(index), list.get(index)) else {
        return Err(Error::corrupt("the snapshot table changed"));
    };
    let needed = header.l1_needed(snapshot.disk_size);
    if u64::from(entry.l1_len()) < needed {
        return Err(Error::corrupt(format!(
            "the L1 table of snapshot {index} has {} entries, its disk of {} bytes needs {needed}",
            entry.l1_len(),
            snapshot.disk_size
        )));
    }
    header.size = snapshot.disk_size;
    header.l1_offset = entry.l1().start;
    header.l1_len = entry.l1_len();
    Ok(())
}

/// Counts anew what a writer with lazy refcounts left behind.
fn mend(file: &Arc<dyn Storage>) -> Result<()> {
    let report = settle(Repair::All, |_| check::recount(file, &Silent))?;
    if report.corruptions + report.check_errors > 0 {
        return Err(Error::corrupt(format!(
            "the image was not closed cleanly (dirty bit) and cannot be mended: {} corruptions remain; check names them",
            report.corruptions
        )));
    }
    Ok(())
}

fn open_writer(
    file: &Arc<dyn Storage>,
    data: Option<Arc<dyn Storage>>,
    header: &Header,
    options: &OpenOptions,
) -> Writer {
    let guard = Arc::new(Guard::default());
    let place = Place::of(header);
    let refcounts = Refcounts::new(Arc::clone(file), place, options.order, Arc::clone(&guard));
    let order = Order::new(options.order, Arc::clone(file), data);
    let allocator = Allocator::new(order, Arc::clone(&options.grace));
    let end = file.size().next_multiple_of(header.cluster_size());
    let behind = Behind::new(end, range::len(&header.l1()) / 8);
    Writer::new(refcounts, guard, behind, allocator)
}

fn open_data_file(header: &Header, options: &OpenOptions) -> Result<Option<Arc<dyn Storage>>> {
    let Some(companions) = &options.companions else {
        return Ok(None);
    };
    let Some(name) = header.data_file_name() else {
        return match options.purpose {
            Purpose::Use => Err(Error::corrupt(
                header.unnamed_data_file().unwrap_or_default(),
            )),
            // Who checks it says so.
            Purpose::Describe | Purpose::Check => Ok(None),
        };
    };
    match companions.open(&name, "data file") {
        // What the image is can be said without, and whether its tables are right.
        Err(_) if options.purpose != Purpose::Use => Ok(None),
        opened => opened.map(Some),
    }
}

//! The loops of this module over a toy format with clusters of 4 KiB.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::chain::{Base, Chain, State};
use crate::error::{Error, ErrorKind, Result};
use crate::formats::raw;
use crate::image::{Caps, Driver, Fill, Image, Old, Run, Slot, Source, Wait};
use crate::storage::memory::{Fault, MemoryStorage, Op};
use crate::storage::{Limits, Storage, Zeroing};
use crate::util::grace::Grace;

const CLUSTER: u64 = 4096;

/// Each cluster is below, zero, or stored at its own place.
#[derive(Debug)]
struct Toy {
    size: u64,
    storage: Arc<MemoryStorage>,
    clusters: Mutex<Vec<Cluster>>,
    backing: bool,
    fills: Arc<AtomicUsize>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Cluster {
    Below,
    Zero,
    Stored,
    Reserved,
}

impl Toy {
    fn new(size: u64, backing: bool) -> Self {
        let count = usize::try_from(size.div_ceil(CLUSTER)).expect("small");
        Self {
            size,
            storage: Arc::default(),
            clusters: Mutex::new(vec![Cluster::Below; count]),
            backing,
            fills: Arc::default(),
        }
    }
}

impl Image for Toy {
    fn driver(&self) -> &'static Driver {
        &raw::DRIVER
    }
    fn virtual_size(&self) -> u64 {
        self.size
    }
    fn cluster_size(&self) -> Option<u64> {
        Some(CLUSTER)
    }
    fn limits(&self) -> Limits {
        Limits {
            align: 1,
            buf_align: 1,
            zero_align: 4096,
            discard_align: 4096,
        }
    }
    fn caps(&self) -> Caps {
        Caps {
            write: true,
            backing: self.backing,
            host_offsets: true,
            offsets_stay: false,
            encoded: None,
        }
    }
    fn storage(&self) -> &dyn Storage {
        &*self.storage
    }
    fn map(&self, at: u64, len: u64, _wait: Wait) -> Result<Run<'_>> {
        let index = usize::try_from(at / CLUSTER).expect("small");
        let source = match self.clusters.lock()[index] {
            Cluster::Below | Cluster::Reserved => Source::Below,
            Cluster::Zero => Source::Zero,
            Cluster::Stored => Source::Stored {
                storage: &*self.storage,
                host: at,
                writable: true,
            },
        };
        Ok(Run {
            len: len.min(CLUSTER - at % CLUSTER),
            source,
        })
    }
    fn read_encoded(&self, _buf: &mut [u8], _at: u64) -> Result<usize> {
        Err(Error::unsupported("not compressed"))
    }
    fn allocate(&self, at: u64, len: u64, fill: &mut Fill<'_>) -> Result<u64> {
        let index = usize::try_from(at / CLUSTER).expect("small");
        let mut clusters = self.clusters.lock();
        let before = clusters[index];
        let old = match before {
            Cluster::Below => Old::Below,
            Cluster::Zero => Old::Zero,
            Cluster::Stored | Cluster::Reserved => return Ok(0),
        };
        clusters[index] = Cluster::Reserved;
        drop(clusters);
        self.fills.fetch_add(1, Ordering::SeqCst);
        let start = at - at % CLUSTER;
        let guest = start..(start + CLUSTER).min(self.size);
        let slot = Slot {
            guest,
            storage: &*self.storage,
            host: start,
            old,
            zeroed: false,
        };
        let done = fill(slot);
        self.clusters.lock()[index] = if done.is_ok() {
            Cluster::Stored
        } else {
            before
        };
        done.map(|()| len.min(CLUSTER - at % CLUSTER))
    }
    fn zero(&self, range: Range<u64>, _how: Zeroing) -> Result<()> {
        for at in range.step_by(4096) {
            self.clusters.lock()[usize::try_from(at / CLUSTER).expect("small")] = Cluster::Zero;
        }
        Ok(())
    }
    fn discard(&self, range: Range<u64>) -> Result<()> {
        self.zero(range, Zeroing::MayUnmap)
    }
    fn flush(&self) -> Result<()> {
        self.storage.sync()
    }
    fn close(&self) -> Result<()> {
        Ok(())
    }
}

fn base(bytes: &[u8]) -> Box<dyn Image> {
    let storage = Arc::new(MemoryStorage::from_bytes(bytes));
    (raw::DRIVER.open)(storage, &crate::image::open::OpenOptions::default()).expect("raw opens")
}

fn chain(layers: Vec<Box<dyn Image>>) -> Chain {
    Chain::new(layers, Base::Zeroes, Arc::new(Grace::default())).expect("a few layers")
}

#[test]
fn a_small_write_keeps_its_neighbours_from_a_shorter_layer_below() {
    let chain = chain(vec![Box::new(Toy::new(10_000, true)), base(&[7; 5000])]);
    chain.write_at(&[1; 10], 4500).expect("writes");
    let mut buf = vec![9; 10_000];
    chain.read_at(&mut buf, 0).expect("reads");
    let mut expected = vec![7; 5000];
    expected.resize(10_000, 0);
    expected[4500..4510].fill(1);
    assert_eq!(buf, expected);
}

#[test]
fn a_failed_fill_leaves_the_disk_as_it_was() {
    let toy = Toy::new(8192, true);
    let storage = Arc::clone(&toy.storage);
    let chain = chain(vec![Box::new(toy), base(&[7; 8192])]);
    storage.inject(Fault {
        op: Op::Change,
        after: 0,
        count: 1,
        errno: libc::ENOSPC,
    });
    let error = chain.write_at(&[1; 100], 50).expect_err("the disk is full");
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    let mut buf = vec![0; 8192];
    chain.read_at(&mut buf, 0).expect("reads");
    assert_eq!(buf, [7; 8192]);
}

#[test]
fn zeroing_and_discarding_never_show_what_lies_below() {
    let chain = chain(vec![Box::new(Toy::new(16_384, true)), base(&[7; 16_384])]);
    chain.write_at(&[3; 16_384], 0).expect("writes");
    chain.discard(100..9000).expect("discards");
    chain.zero(9000..16_384, Zeroing::MayUnmap).expect("zeroes");
    let mut buf = vec![9; 16_384];
    chain.read_at(&mut buf, 0).expect("reads");
    assert_eq!(buf[..100], [3; 100]);
    assert!(buf[100..9000].iter().all(|b| *b == 0 || *b == 3));
    assert!(buf[9000..].iter().all(|b| *b == 0));
}

#[test]
fn zeroing_without_writing_takes_whole_clusters_only() {
    let chain = chain(vec![Box::new(Toy::new(16_384, true)), base(&[7; 16_384])]);
    for range in [100..4096, 4096..8191] {
        let error = chain
            .zero_fast(range, Zeroing::MayUnmap)
            .expect_err("part of a cluster");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }
    let mut buf = [0; 16_384];
    chain.read_at(&mut buf, 0).expect("reads");
    assert_eq!(buf, [7; 16_384]);
    chain
        .zero_fast(4096..8192, Zeroing::MayUnmap)
        .expect("one cluster");
    chain.read_at(&mut buf, 0).expect("reads");
    assert!(buf[4096..8192].iter().all(|b| *b == 0));
    assert_eq!(buf[8192..], [7; 8192]);
}

#[test]
fn threads_that_write_into_the_same_clusters_lose_nothing() {
    let toy = Toy::new(64 * CLUSTER, true);
    let fills = Arc::clone(&toy.fills);
    let chain = Arc::new(chain(vec![Box::new(toy), base(&[7; 100_000])]));
    std::thread::scope(|scope| {
        for thread in 0..4u8 {
            let chain = &chain;
            scope.spawn(move || {
                for cluster in 0..64 {
                    let at = cluster * CLUSTER + u64::from(thread) * 1000;
                    chain.write_at(&[thread + 1; 1000], at).expect("writes");
                }
            });
        }
    });
    assert_eq!(
        fills.load(Ordering::SeqCst),
        64,
        "each cluster is given space once"
    );
    let mut buf = vec![0; 64 * 4096];
    chain.read_at(&mut buf, 0).expect("reads");
    for (index, byte) in buf.iter().enumerate() {
        let expected = match index % 4096 {
            within if within < 4000 => u8::try_from(within / 1000).expect("small") + 1,
            _ if index < 100_000 => 7,
            _ => 0,
        };
        assert_eq!(*byte, expected, "{index}");
    }
}

#[test]
fn extents_of_one_kind_are_merged_and_tell_their_layer() {
    let chain = chain(vec![
        Box::new(Toy::new(5 * CLUSTER, true)),
        base(&[7; 8192]),
    ]);
    chain.write_at(&[1; 8192], 4096).expect("writes");
    chain
        .zero(3 * CLUSTER..4 * CLUSTER, Zeroing::MayUnmap)
        .expect("zeroes");
    let found: Vec<_> = chain
        .extents(0..5 * CLUSTER)
        .expect("inside the disk")
        .map(|e| e.map(|e| (e.start, e.len, e.state, e.depth)))
        .collect::<Result<_>>()
        .expect("reads");
    let expected = [
        (0, 4096, State::Data, 1),
        (4096, 8192, State::Data, 0),
        (12_288, 4096, State::Zero, 0),
        (16_384, 4096, State::Hole, 2),
    ];
    assert_eq!(found, expected);
}

#[test]
fn what_is_in_an_image_that_was_not_opened_is_an_error_and_not_zeroes() {
    let toy: Vec<Box<dyn Image>> = vec![Box::new(Toy::new(8192, true))];
    let chain = Chain::new(toy, Base::NotOpened, Arc::new(Grace::default())).expect("one layer");
    let error = chain
        .read_at(&mut [0; 10], 0)
        .expect_err("the backing image is not there");
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

//! A layer that takes writes and is gone with the process: what `-s/--snapshot` writes to.
//!
//! Clusters of 64 KiB are appended to an unlinked temporary file in the order of their first
//! write.  Nothing is ever moved or freed while the layer is open, so that a reader may keep
//! using what `map` told it.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use crate::error::{Error, ErrorKind, Result};
use crate::image::{Caps, Driver, Fill, Image, LayerBelow, Old, Resize, Run, Slot, Source, Wait};
use crate::storage::file::FileStorage;
use crate::storage::{Limits, Storage, Zeroing, zero_or_write};
use crate::util::align;
use crate::util::range;

mod map;

use map::{ClusterMap, Place};

const CLUSTER: u64 = 64 << 10;

/// Most clusters that one `allocate` takes: 4 MiB, so that a long write holds the lock for a
/// bounded time.
const ALLOCATE_CLUSTERS: u64 = 64;

/// Not in the registry: nobody can name, probe or create it.
static DRIVER: Driver = Driver {
    name: "overlay",
    aliases: &[],
    extensions: &[],
    about: "writes of this process, dropped at its end",
    is_plain: false,
    names_uris: false,
    probe: |_| 0,
    open: |_, _| {
        Err(Error::unsupported(
            "a temporary overlay cannot be opened again",
        ))
    },
    open_options: &[],
    creator: None,
};

/// A temporary layer above a disk.
///
/// Lock order: `next`, then `state`.  `next` is held while new clusters are filled, which makes
/// changes of the map take turns; `state` is held only for look-ups and updates, so readers never
/// wait for I/O.
#[derive(Debug)]
pub struct Overlay {
    storage: Arc<dyn Storage>,
    /// The first slot that was never handed out.
    next: Mutex<u64>,
    state: RwLock<State>,
}

#[derive(Debug)]
struct State {
    map: ClusterMap,
    size: u64,
    /// From here on the layer below is not looked at: the disk was once shorter.
    below: u64,
}

/// Clusters that can be given space together, and their bytes by what they held.
#[derive(Debug)]
struct Vacant {
    clusters: Range<u64>,
    below: Range<u64>,
    zero: Range<u64>,
}

impl Overlay {
    /// An overlay of `virtual_size` bytes that keeps its clusters in `storage`, which is empty.
    pub fn new(storage: Arc<dyn Storage>, virtual_size: u64) -> Self {
        Self {
            storage,
            next: Mutex::new(0),
            state: RwLock::new(State {
                map: ClusterMap::default(),
                size: virtual_size,
                below: virtual_size,
            }),
        }
    }

    /// An overlay in an unlinked file in `TMPDIR`; messages call it `name`.
    ///
    /// # Errors
    /// The host's.
    pub fn temporary(virtual_size: u64, name: &Path) -> Result<Self> {
        let file = tempfile::tempfile()
            .map_err(|e| Error::io("make a temporary file", e).at(std::env::temp_dir()))?;
        let storage = FileStorage::new(file, name)?;
        Ok(Self::new(Arc::new(storage), virtual_size))
    }

    /// Fills `slot` and what follows it with the old and the new bytes of vacant clusters.
    fn fill(&self, vacant: &Vacant, slot: u64, fill: &mut Fill<'_>) -> Result<()> {
        let pieces = [(&vacant.below, Old::Below), (&vacant.zero, Old::Zero)];
        for (guest, old) in pieces {
            if !guest.is_empty() {
                fill(Slot {
                    guest: guest.clone(),
                    storage: &*self.storage,
                    host: slot * CLUSTER + (guest.start - vacant.clusters.start * CLUSTER),
                    old,
                    zeroed: true,
                })?;
            }
        }
        Ok(())
    }
}

/// The clusters a range touches.
fn touched(range: &Range<u64>) -> Range<u64> {
    range.start / CLUSTER..range.end.div_ceil(CLUSTER)
}

impl State {
    /// The clusters from the one at `at` on that have no space, or `None` where that one has.
    fn vacant(&self, at: u64, len: u64) -> Option<Vacant> {
        let end = at.saturating_add(len).min(self.size);
        let clusters = touched(&(at..end));
        let limit = (clusters.end - clusters.start).min(ALLOCATE_CLUSTERS);
        let (place, count) = self.map.find(clusters.start, limit);
        if matches!(place, Some(Place::Slot(_))) {
            return None;
        }
        let clusters = clusters.start..clusters.start + count;
        let start = clusters.start * CLUSTER;
        let end = (clusters.end.saturating_mul(CLUSTER)).min(self.size);
        let below = match place {
            Some(_) => start,
            None => self.below.clamp(start, end),
        };
        Some(Vacant {
            clusters,
            below: start..below,
            zero: below..end,
        })
    }
}

impl Image for Overlay {
    fn driver(&self) -> &'static Driver {
        &DRIVER
    }

    fn virtual_size(&self) -> u64 {
        self.state.read().size
    }

    fn cluster_size(&self) -> Option<u64> {
        Some(CLUSTER)
    }

    fn limits(&self) -> Limits {
        const UNIT: u32 = 64 << 10;
        Limits {
            zero_align: UNIT,
            discard_align: UNIT,
            ..self.storage.limits()
        }
    }

    fn caps(&self) -> Caps {
        Caps {
            write: true,
            backing: true,
            host_offsets: true,
            offsets_stay: false,
            encoded: None,
        }
    }

    fn storage(&self) -> &dyn Storage {
        &*self.storage
    }

    fn map(&self, at: u64, len: u64, _wait: Wait) -> Result<Run<'_>> {
        let state = self.state.read();
        let len = len.min(state.size.saturating_sub(at));
        let clusters = touched(&(at..at + len));
        let (place, count) = state
            .map
            .find(clusters.start, clusters.end - clusters.start);
        let end = (clusters.start + count).saturating_mul(CLUSTER);
        let len = len.min(end - at);
        let (len, source) = match place {
            Some(Place::Slot(slot)) => {
                let source = Source::Stored {
                    storage: &*self.storage,
                    host: slot * CLUSTER + at % CLUSTER,
                    writable: true,
                };
                (len, source)
            }
            Some(Place::Zero) => (len, Source::Zero),
            None if at < state.below => (len.min(state.below - at), Source::Below),
            None => (len, Source::Zero),
        };
        Ok(Run { len, source })
    }

    fn read_encoded(&self, _buf: &mut [u8], _at: u64) -> Result<usize> {
        Err(Error::unsupported("an overlay has no compressed data"))
    }

    fn allocate(&self, at: u64, len: u64, fill: &mut Fill<'_>) -> Result<u64> {
        let mut next = self.next.lock();
        let Some(vacant) = self.state.read().vacant(at, len) else {
            return Ok(0);
        };
        let slot = *next;
        let count = vacant.clusters.end - vacant.clusters.start;
        let end = slot
            .checked_add(count)
            .filter(|end| end.checked_mul(CLUSTER).is_some())
            .ok_or_else(|| Error::new(ErrorKind::NoSpace, "the overlay is full"))?;
        // Taken even where filling fails: what may have been written there must not be taken for
        // zeroes.
        *next = end;
        self.fill(&vacant, slot, fill)?;
        let mut state = self.state.write();
        state.map.set(vacant.clusters, Place::Slot(slot));
        Ok(len.min(vacant.zero.end - at))
    }

    /// Keeps no space: a cluster that had none gets none, as the layer does not outlive a full
    /// disk anyway.
    fn zero(&self, range: Range<u64>, how: Zeroing) -> Result<()> {
        let _turn = self.next.lock();
        let clusters = touched(&range);
        let mut cluster = clusters.start;
        while cluster < clusters.end {
            let found = self.state.read().map.find(cluster, clusters.end - cluster);
            let (place, count) = found;
            match place {
                Some(Place::Slot(slot)) => {
                    let host = slot * CLUSTER..(slot + count) * CLUSTER;
                    let end = host.end.min(self.storage.size());
                    zero_or_write(&*self.storage, host.start..end.max(host.start), how)?;
                }
                Some(Place::Zero) => {}
                None => {
                    let run = cluster..cluster + count;
                    self.state.write().map.set(run, Place::Zero);
                }
            }
            cluster += count;
        }
        Ok(())
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        self.zero(range, Zeroing::MayUnmap)
    }

    fn flush(&self) -> Result<()> {
        // Nothing here outlives the process, so nothing is worth waiting for.
        Ok(())
    }

    fn close(&self) -> Result<()> {
        Ok(())
    }

    fn as_resize(&self) -> Option<&dyn Resize> {
        Some(self)
    }
}

impl Resize for Overlay {
    fn resize(&self, virtual_size: u64, _below: LayerBelow) -> Result<()> {
        let _turn = self.next.lock();
        let mut state = self.state.write();
        if virtual_size < state.size {
            let cut = align::down(virtual_size, CLUSTER);
            let (place, _) = state.map.find(cut / CLUSTER, 1);
            if let Some(Place::Slot(slot)) = place {
                // The rest of the cluster must read as zeroes should the disk grow again.
                let host = slot * CLUSTER + (virtual_size - cut)..(slot + 1) * CLUSTER;
                let host = range::intersect(&host, &(0..self.storage.size()));
                if let Some(host) = host {
                    zero_or_write(&*self.storage, host, Zeroing::MayUnmap)?;
                }
            }
            let gone = virtual_size.div_ceil(CLUSTER)..state.size.div_ceil(CLUSTER);
            state.map.forget(&gone);
            state.below = state.below.min(virtual_size);
        }
        state.size = virtual_size;
        Ok(())
    }
}

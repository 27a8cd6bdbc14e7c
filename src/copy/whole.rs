//! Whole clusters on their way into an image, stored together: many of them by one sync.
//!
//! A write that gives a cluster space must have its data on stable media before the table word that
//! shows it, a sync for each write that stands alone.  A job that knows all it will write needs no
//! more than one for every few MiB.

use std::collections::BTreeMap;

use parking_lot::Mutex;

use crate::chain::Chain;
use crate::error::Result;
use crate::image::compress::{Existing, Form, Unit};
use crate::image::{Source, Wait};
use crate::util::align::{clamp_len, down, len64};

/// Bytes kept until they are stored.
const MOST: usize = 16 << 20;
/// Larger clusters are not kept.
const MOST_CLUSTER: u64 = 2 << 20;

/// Where bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Home {
    /// To where they are now; so many of them.
    InPlace(u64),
    /// To new space for the cluster at this guest offset.
    Cluster(u64),
}

/// Clusters that wait to be stored in the top layer of a chain.
pub(super) struct Whole<'a> {
    target: &'a Chain,
    cluster: u64,
    /// By guest offset.
    waiting: Mutex<BTreeMap<u64, Vec<u8>>>,
}

impl<'a> Whole<'a> {
    /// For a target that can take whole clusters; `None`: writes go to it one by one.
    pub(super) fn new(target: &'a Chain) -> Option<Self> {
        let top = target.top();
        let cluster = top.cluster_size().filter(|c| *c <= MOST_CLUSTER)?;
        // Parts of clusters that have space of their own would be given it for nothing.
        let fits = u64::from(top.limits().zero_align) == cluster && top.as_compress().is_ok();
        fits.then(|| Self {
            target,
            cluster,
            waiting: Mutex::default(),
        })
    }

    /// Bytes of a cluster.
    pub(super) fn cluster(&self) -> u64 {
        self.cluster
    }

    /// Where bytes from `at` on, `len` of them at most, go.
    ///
    /// # Errors
    /// Those of the target.
    pub(super) fn home(&self, at: u64, len: u64) -> Result<Home> {
        let run = self.target.top().map(at, len, Wait::Yes)?;
        Ok(match run.source {
            Source::Stored { writable: true, .. } => Home::InPlace(run.len),
            _ => Home::Cluster(down(at, self.cluster)),
        })
    }

    /// Takes the bytes of the cluster at `at`; what the last one of the disk lacks is zeroes.  They
    /// do not show before they are stored, by this call or a later one.
    ///
    /// # Errors
    /// Those of the target.
    pub(super) fn add(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let mut whole = bytes.to_vec();
        whole.resize(clamp_len(self.cluster, usize::MAX), 0);
        let full = {
            let mut waiting = self.waiting.lock();
            waiting.insert(at, whole);
            let full = waiting.len() * clamp_len(self.cluster, usize::MAX) >= MOST;
            full.then(|| std::mem::take(&mut *waiting))
        };
        full.map_or(Ok(()), |clusters| self.store(clusters))
    }

    /// Stores what waits.
    ///
    /// # Errors
    /// Those of the target.
    pub(super) fn finish(&self) -> Result<()> {
        let rest = std::mem::take(&mut *self.waiting.lock());
        self.store(rest)
    }

    fn store(&self, clusters: BTreeMap<u64, Vec<u8>>) -> Result<()> {
        if clusters.is_empty() {
            return Ok(());
        }
        let mut bytes = Vec::with_capacity(clusters.len() * clamp_len(self.cluster, usize::MAX));
        let mut units = Vec::with_capacity(clusters.len());
        for (at, cluster) in clusters {
            debug_assert_eq!(len64(cluster.len()), self.cluster);
            units.push(Unit {
                at,
                form: Form::Plain,
            });
            bytes.extend(cluster);
        }
        let top = self.target.top();
        let _ticket = self.target.enter();
        let stored = top
            .as_compress()
            .and_then(|c| c.place(&units, Existing::Replace)?.store(&bytes));
        stored.map_err(|e| e.at_opt(top.storage().path()))
    }
}

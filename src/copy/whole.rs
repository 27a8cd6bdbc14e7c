//! Whole clusters on their way into an image, stored together: many of them by one sync.
//!
//! A write that gives a cluster space must have its data on stable media before the table word that
//! shows it, a sync for each write that stands alone.  A job that knows all it will write needs no
//! more than one for every few MiB.  What was written waits for it in the file, not in memory.

use std::collections::BTreeMap;
use std::sync::Once;

use parking_lot::Mutex;

use crate::chain::Chain;
use crate::error::Result;
use crate::image::compress::{Compress, Existing, Form, Placed, Unit};
use crate::image::{Source, Wait};
use crate::util::align::{clamp_len, down};

/// Bytes kept until they are written.
const PART: usize = 1 << 20;
/// Bytes written until they show, all of them after one sync.
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
    /// The target was told that it is going to be changed.
    announced: Once,
    /// What all workers add to.
    part: Mutex<Part>,
    /// Memory of parts that were written.
    spare: Mutex<Vec<Part>>,
    /// What was written and does not show.
    written: Mutex<Written<'a>>,
}

/// Clusters that are to be written together.
#[derive(Debug, Default)]
struct Part {
    /// Where in `bytes` they are, by guest offset.
    starts: BTreeMap<u64, usize>,
    /// One after another, as they came.
    bytes: Vec<u8>,
    /// Memory for the same in guest order.
    sorted: Vec<u8>,
}

#[derive(Default)]
struct Written<'a> {
    parts: Vec<Box<dyn Placed + 'a>>,
    len: usize,
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
            announced: Once::new(),
            part: Mutex::default(),
            spare: Mutex::default(),
            written: Mutex::default(),
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
        let mut run = self.target.top().map(at, len, Wait::Yes)?;
        if matches!(run.source, Source::Stored { writable, .. } if !writable) {
            // Nothing is writable before the first change.
            let mut done = Ok(());
            self.announced.call_once(|| done = self.announce());
            done?;
            run = self.target.top().map(at, len, Wait::Yes)?;
        }
        Ok(match run.source {
            Source::Stored { writable: true, .. } => Home::InPlace(run.len),
            _ => Home::Cluster(down(at, self.cluster)),
        })
    }

    /// Places nothing, which begins the changes all the same.
    fn announce(&self) -> Result<()> {
        self.tell(|compress| compress.place(&[], Existing::Replace).map(drop))
    }

    /// Takes the bytes of the cluster at `at`; what the last one of the disk lacks is zeroes.  They
    /// do not show before they are stored, by this call or a later one.
    ///
    /// # Errors
    /// Those of the target.
    pub(super) fn add(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let mut part = self.part.lock();
        let start = part.bytes.len();
        part.bytes.extend_from_slice(bytes);
        part.bytes
            .resize(start + clamp_len(self.cluster, usize::MAX), 0);
        part.starts.insert(at, start);
        if part.bytes.len() < PART {
            return Ok(());
        }
        let next = self.spare.lock().pop().unwrap_or_default();
        let full = std::mem::replace(&mut *part, next);
        drop(part);
        self.write(full)
    }

    /// Stores what waits.
    ///
    /// # Errors
    /// Those of the target.
    pub(super) fn finish(&self) -> Result<()> {
        let rest = std::mem::take(&mut *self.part.lock());
        if !rest.starts.is_empty() {
            self.write(rest)?;
        }
        self.show(std::mem::take(&mut *self.written.lock()))
    }

    /// Writes a part, in guest order, and shows what was written where that is enough.
    fn write(&self, mut part: Part) -> Result<()> {
        let Part {
            starts,
            bytes,
            sorted,
        } = &mut part;
        let cluster = clamp_len(self.cluster, usize::MAX);
        let mut units = Vec::with_capacity(starts.len());
        sorted.clear();
        for (at, start) in std::mem::take(starts) {
            units.push(Unit {
                at,
                form: Form::Plain,
            });
            sorted.extend_from_slice(&bytes[start..start + cluster]);
        }
        let len = bytes.len();
        bytes.clear();
        let placed = self.tell(|compress| {
            let mut placed = compress.place(&units, Existing::Replace)?;
            placed.write(sorted)?;
            Ok(placed)
        })?;
        self.spare.lock().push(part);
        let full = {
            let mut written = self.written.lock();
            written.parts.push(placed);
            written.len += len;
            (written.len >= MOST).then(|| std::mem::take(&mut *written))
        };
        full.map_or(Ok(()), |written| self.show(written))
    }

    fn show(&self, written: Written<'a>) -> Result<()> {
        let _ticket = self.target.enter();
        let mut parts = written.parts.into_iter();
        self.tell(|_| parts.try_for_each(|part| part.show()))
    }

    /// Does something with the target, which an error names.
    fn tell<T>(&self, work: impl FnOnce(&'a dyn Compress) -> Result<T>) -> Result<T> {
        let top = self.target.top();
        let done = top.as_compress().and_then(work);
        done.map_err(|e| e.at_opt(top.storage().path()))
    }
}

//! What keeps a disk the same when another image is put below its top layer.

use std::ops::Range;

use crate::chain::Chain;
use crate::copy::commit::range_size;
use crate::copy::engine::Engine;
use crate::copy::find::{Found, Place, Unwritten, same_object};
use crate::copy::joined::Joined;
use crate::copy::progress::Progress;
use crate::copy::whole::Whole;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Source, Wait};
use crate::storage::Zeroing;
use crate::util::align::{self, clamp_len, len64};
use crate::util::buf::is_zero;

/// Bytes of each disk compared at a time.
const STEP: u64 = 2 << 20;

/// Writes into the top layer of `chain` what it does not have itself and what would read
/// otherwise if `below` were there instead of the layers under it; `below` reads as zeroes past
/// its end, everywhere where it holds no disk.  Tells `progress` of as many bytes as the disk has.
///
/// With [`Store::Compressed`], whole clusters are compressed.
///
/// The disk reads the same all the time.  Nothing is flushed.
///
/// # Errors
/// `Cancelled`; `Unsupported` where the top layer has no compressed data; those of the chains.
pub fn rebase(
    chain: &Chain,
    below: &Joined,
    store: Store,
    workers: usize,
    progress: &dyn Progress,
) -> Result<()> {
    let idle = |at: u64, end: u64| -> Result<u64> {
        let _tickets = (chain.enter(), below.enter());
        let run = chain.top().map(at, end - at, Wait::Yes)?;
        match run.source {
            Source::Below => Ok(0),
            _ => Ok(run.len),
        }
    };
    if store == Store::Compressed {
        chain.top().as_compress()?;
    }
    let engine = Engine::new(chain.virtual_size(), range_size(chain), &idle, progress);
    let keeper = Keeper {
        chain,
        below,
        old_holes: Unwritten::of([chain]),
        new_holes: Unwritten::of(below.chains()),
        unit: unit(chain, store),
        whole: match store {
            Store::Plain => Whole::new(chain),
            Store::Compressed => None,
        },
        store,
        progress,
    };
    let workers = workers.clamp(1, super::MAX_WORKERS);
    engine.run(workers, Buffers::default, |buffers, job| {
        keeper.range(job.range.clone(), buffers)
    })?;
    keeper.whole.map_or(Ok(()), |whole| whole.finish())
}

/// How what is copied is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Store {
    /// As it is.
    Plain,
    /// Compressed, where a whole cluster is copied.
    Compressed,
}

/// What the top layer is given as a whole.
fn unit(chain: &Chain, store: Store) -> u64 {
    let unit = match (store, chain.top().cluster_size()) {
        (Store::Compressed, Some(cluster)) => cluster,
        _ => u64::from(chain.top().limits().zero_align),
    };
    match unit {
        0 => 4096,
        unit => unit.min(STEP),
    }
}

#[derive(Default)]
struct Buffers {
    old: Vec<u8>,
    new: Vec<u8>,
}

struct Keeper<'a> {
    chain: &'a Chain,
    below: &'a Joined,
    old_holes: Unwritten,
    new_holes: Unwritten,
    unit: u64,
    /// Where many units are written by one sync.
    whole: Option<Whole<'a>>,
    store: Store,
    progress: &'a dyn Progress,
}

impl Keeper<'_> {
    fn range(&self, range: Range<u64>, buffers: &mut Buffers) -> Result<(), Error> {
        let _tickets = (self.chain.enter(), self.below.enter());
        let mut at = range.start;
        while at < range.end {
            self.progress.check()?;
            let top = self.chain.top();
            let run = top
                .map(at, range.end - at, Wait::Yes)
                .map_err(|e| e.at_opt(top.storage().path()))?;
            if matches!(run.source, Source::Below) {
                self.keep(at..at + run.len, buffers)?;
            }
            at += run.len;
        }
        Ok(())
    }

    /// Keeps what a range reads as that the top layer does not have.
    fn keep(&self, range: Range<u64>, buffers: &mut Buffers) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let (alike, len) = self.alike(at, range.end - at)?;
            if alike {
                at += len;
                continue;
            }
            // In whole units, as the top layer is given space: what comes before is alike.
            let at_unit = at - at % self.unit;
            let most = at_unit.saturating_add(STEP).min(range.end);
            let start = at_unit.max(range.start);
            let end = self.unlike_end(at + len, most)?;
            let len = clamp_len(end - start, usize::MAX);
            buffers.old.resize(len, 0);
            buffers.new.resize(len, 0);
            self.chain.read_at(&mut buffers.old, start)?;
            self.below.read_at(&mut buffers.new, start)?;
            self.differing(start..end, buffers)?;
            at = end;
        }
        Ok(())
    }

    /// Whether both read the same at `at`, which the top layer does not have, without a look at
    /// bytes, and how far that goes.
    fn alike(&self, at: u64, len: u64) -> Result<(bool, u64)> {
        let old = Found::of(self.chain.resolve_below(at, len, Wait::Yes)?);
        let new = self.below.locate(at, old.len)?;
        if alike(&old, &new) {
            return Ok((true, new.len));
        }
        // Both may be holes of the host.
        let new = self.new_holes.ask(new)?;
        if !new.is_zero() {
            return Ok((false, new.len));
        }
        let len = new.len;
        let old = self.old_holes.ask(Found { len, ..old })?;
        Ok((old.is_zero(), old.len))
    }

    /// Where units that must be looked at end, that go on to `at` at least; at most `most`.
    fn unlike_end(&self, at: u64, most: u64) -> Result<u64> {
        let mut at = at;
        loop {
            at = align::up(at, self.unit).unwrap_or(most).min(most);
            if at == most {
                return Ok(at);
            }
            let (alike, len) = self.alike(at, most - at)?;
            if alike {
                return Ok(at);
            }
            at += len;
        }
    }

    /// Writes the units that differ, neighbours in one go.
    fn differing(&self, range: Range<u64>, buffers: &Buffers) -> Result<()> {
        let mut at = range.start;
        let mut pending = at..at;
        while at < range.end {
            let end = (at - at % self.unit + self.unit).min(range.end);
            let part = within(&range, &(at..end));
            if buffers.old[part.clone()] != buffers.new[part] {
                if pending.end != at {
                    self.write(&range, pending, buffers)?;
                    pending = at..at;
                }
                pending.end = end;
            }
            at = end;
        }
        self.write(&range, pending, buffers)
    }

    fn write(&self, range: &Range<u64>, part: Range<u64>, buffers: &Buffers) -> Result<()> {
        if part.is_empty() {
            return Ok(());
        }
        let bytes = &buffers.old[within(range, &part)];
        let aligned = part.start.is_multiple_of(self.unit)
            && (part.end.is_multiple_of(self.unit) || part.end == self.chain.virtual_size());
        match &self.whole {
            Some(whole) if aligned && whole.cluster() == self.unit => {
                self.write_units(whole, bytes, part)
            }
            _ if aligned && is_zero(bytes) && self.zero(&part)? => Ok(()),
            _ => match aligned && self.store == Store::Compressed {
                true => self.chain.write_compressed(bytes, part.start),
                false => self.chain.write_at(bytes, part.start),
            },
        }
    }

    /// Leaves whole units to be stored, those of zeroes as zeroes.
    fn write_units(&self, whole: &Whole<'_>, bytes: &[u8], part: Range<u64>) -> Result<()> {
        let mut at = part.start;
        for unit in bytes.chunks(clamp_len(self.unit, usize::MAX)) {
            let end = at + len64(unit.len());
            if !is_zero(unit) || !self.zero(&(at..end))? {
                whole.add(at, unit)?;
            }
            at = end;
        }
        Ok(())
    }

    /// Has the top layer say that whole units are zeroes, whatever the layers below hold; whether
    /// it can.
    fn zero(&self, units: &Range<u64>) -> Result<bool> {
        match self.chain.top().zero(units.clone(), Zeroing::MayUnmap) {
            Err(e) if e.kind() == ErrorKind::Unsupported => Ok(false),
            done => done.map(|()| true),
        }
    }
}

fn within(range: &Range<u64>, part: &Range<u64>) -> Range<usize> {
    let offset = |at: u64| clamp_len(at - range.start, usize::MAX);
    offset(part.start)..offset(part.end)
}

/// Whether both read the same without looking at bytes.
fn alike(old: &Found<'_>, new: &Found<'_>) -> bool {
    match (old.place, new.place) {
        (
            Place::Stored { storage, host },
            Place::Stored {
                storage: other,
                host: there,
            },
        ) => host == there && same_object(storage, other),
        _ => old.is_zero() && new.is_zero(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::chain::Base;
    use crate::copy::joined::tests::raw_chain;
    use crate::copy::progress::Silent;
    use crate::image::overlay::Overlay;
    use crate::storage::memory::MemoryStorage;

    fn raw(bytes: &[u8]) -> Chain {
        raw_chain(Arc::new(MemoryStorage::from_bytes(bytes)))
    }

    #[test]
    fn the_top_layer_gets_what_differs_and_no_more() {
        let mut old = vec![1u8; 1 << 20];
        old[300_000..400_000].fill(0);
        let mut new = old.clone();
        new[310_000] = 7;
        new[900_000] = 7;
        new.truncate(1_000_000);
        let top = Arc::new(MemoryStorage::new());
        let overlay = Overlay::new(top, len64(old.len()));
        let below = (crate::formats::raw::DRIVER.open)(
            Arc::new(MemoryStorage::from_bytes(&old)),
            &crate::image::open::OpenOptions::default(),
        );
        let layers: Vec<Box<dyn crate::image::Image>> =
            vec![Box::new(overlay), below.expect("opens")];
        let chain = Chain::new(layers, Base::Zeroes, Arc::default()).expect("two layers");
        chain.write_at(&[9; 5000], 70_000).expect("writes");
        let mut wanted = old.clone();
        wanted[70_000..75_000].fill(9);
        let joined = Joined::new(vec![raw(&new)]).expect("short");
        for workers in [1, 3] {
            rebase(&chain, &joined, Store::Plain, workers, &Silent).expect("rebases");
            let mut now = vec![0; new.len()];
            joined.read_at(&mut now, 0).expect("reads");
            now.resize(old.len(), 0);
            for at in 0..old.len() {
                let run = chain.top().map(len64(at), 1, Wait::Yes).expect("maps");
                assert!(
                    !matches!(run.source, Source::Below) || now[at] == wanted[at],
                    "{at}"
                );
            }
            let run = chain.top().map(1 << 19, 1, Wait::Yes).expect("maps");
            assert!(matches!(run.source, Source::Below), "the same in both");
            let mut read = vec![0; old.len()];
            chain.read_at(&mut read, 0).expect("reads");
            assert!(read == wanted);
        }
    }
}

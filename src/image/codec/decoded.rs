//! Decoded chunks, kept in a bounded cache; each is decoded by one thread at a time.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::error::Result;
use crate::image::codec::decode::Decoders;

/// Decoded bytes kept in all.
const CACHE_BYTES: u64 = 16 << 20;
/// Independent parts of the cache, so that threads seldom meet.
const SHARDS: u64 = 8;
/// Chunks kept in each part at most, however small they are; looking through them stays cheap.
const MAX_KEPT: u64 = 64;

/// Decoded chunks by the host offset of their compressed bytes.
#[derive(Debug)]
pub struct Decoded {
    shards: Vec<Mutex<VecDeque<Kept>>>,
    keep: usize,
    /// Decoders that no thread uses now.
    idle: Mutex<Vec<Decoders>>,
}

/// A chunk: its bytes, unless they are being decoded, or could not be.
type Cell = Arc<Mutex<Option<Arc<[u8]>>>>;

#[derive(Debug, Clone)]
struct Kept {
    host: u64,
    cell: Cell,
}

impl Decoded {
    /// A cache for chunks of `chunk` bytes each.
    pub fn new(chunk: u64) -> Self {
        let keep = (CACHE_BYTES / SHARDS / chunk).clamp(1, MAX_KEPT);
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            keep: usize::try_from(keep).unwrap_or(1),
            idle: Mutex::default(),
        }
    }

    /// Lends decoders to `work`.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn with<T>(&self, work: impl FnOnce(&mut Decoders) -> Result<T>) -> Result<T> {
        let idle = self.idle.lock().pop();
        let mut decoders = idle.unwrap_or_default();
        let done = work(&mut decoders);
        self.idle.lock().push(decoders);
        done
    }

    fn shard(&self, host: u64) -> &Mutex<VecDeque<Kept>> {
        &self.shards[usize::try_from(host / 512 % SHARDS).unwrap_or(0)]
    }

    /// The decoded chunk whose compressed bytes start at `host`, where it is kept; waits for nobody.
    pub fn kept(&self, host: u64) -> Option<Arc<[u8]>> {
        let shard = self.shard(host).lock();
        let found = shard.iter().find(|k| k.host == host)?;
        found.cell.try_lock()?.clone()
    }

    /// The decoded chunk whose compressed bytes start at `host`, by `decode` where it is not kept.
    /// Who wants one that another thread decodes waits for it.
    ///
    /// # Errors
    /// Those of `decode`; then it is not kept.
    pub fn get(&self, host: u64, decode: impl FnOnce() -> Result<Vec<u8>>) -> Result<Arc<[u8]>> {
        let cell = self.cell(host);
        let mut kept = cell.lock();
        if let Some(bytes) = &*kept {
            return Ok(Arc::clone(bytes));
        }
        let bytes: Arc<[u8]> = decode()?.into();
        *kept = Some(Arc::clone(&bytes));
        Ok(bytes)
    }

    fn cell(&self, host: u64) -> Cell {
        let mut shard = self.shard(host).lock();
        if let Some(found) = shard.iter().find(|k| k.host == host) {
            return Arc::clone(&found.cell);
        }
        if shard.len() >= self.keep {
            shard.pop_front();
        }
        let cell = Cell::default();
        shard.push_back(Kept {
            host,
            cell: Arc::clone(&cell),
        });
        cell
    }

    /// Forgets everything, what is being decoded too; for when compressed space is freed.
    pub fn clear(&self) {
        self.shards.iter().for_each(|s| s.lock().clear());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_bounded_and_decodes_once() {
        let cache = Decoded::new(65_536);
        let mut decoded = 0;
        for host in [0, 0, 512, 0] {
            let get = cache.get(host, || {
                decoded += 1;
                Ok(vec![1; 10])
            });
            assert_eq!(get.expect("decodes").len(), 10);
        }
        assert_eq!(decoded, 2);
        (0..10_000).for_each(|i| drop(cache.get(i * 512, || Ok(vec![0; 10]))));
        let kept: usize = cache.shards.iter().map(|s| s.lock().len()).sum();
        assert!(kept <= 8 * 32, "{kept}");
    }

    #[test]
    fn a_chunk_is_decoded_once_however_many_want_it() {
        let cache = Decoded::new(65_536);
        let decoded = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let bytes = cache.get(4096, || {
                        decoded.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        std::thread::sleep(std::time::Duration::from_millis(20));
                        Ok(vec![7; 10])
                    });
                    assert_eq!(&*bytes.expect("decodes"), [7; 10]);
                });
            }
        });
        assert_eq!(decoded.into_inner(), 1);
        let failing = || Err(crate::error::Error::corrupt("it is damaged"));
        cache.get(0, failing).expect_err("is told");
        assert!(cache.kept(0).is_none());
        assert_eq!(cache.get(0, || Ok(vec![1])).expect("tries again").len(), 1);
    }

    #[test]
    fn what_is_forgotten_while_it_is_decoded_is_not_kept() {
        let cache = Decoded::new(65_536);
        let decode = || {
            cache.clear();
            Ok(vec![1; 10])
        };
        assert_eq!(cache.get(0, decode).expect("decodes").len(), 10);
        assert!(cache.kept(0).is_none());
    }
}

//! Compressed clusters: decoded once, kept in a bounded cache.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;

use super::header::Compression;
use crate::error::{Error, Result};

/// Decoded bytes kept in all.
const CACHE_BYTES: u64 = 16 << 20;
/// Independent parts of the cache, so that threads seldom meet.
const SHARDS: u64 = 8;
/// Clusters kept in each part at most, however small they are; looking through them stays cheap.
const MAX_KEPT: u64 = 64;

/// Decoded clusters by the host offset of their compressed bytes.
#[derive(Debug)]
pub(super) struct Decoded {
    shards: Vec<Mutex<VecDeque<Kept>>>,
    keep: usize,
}

#[derive(Debug, Clone)]
struct Kept {
    host: u64,
    bytes: Arc<[u8]>,
}

impl Decoded {
    /// A cache for clusters of `cluster_size` bytes.
    pub(super) fn new(cluster_size: u64) -> Self {
        let keep = (CACHE_BYTES / SHARDS / cluster_size).clamp(1, MAX_KEPT);
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            keep: usize::try_from(keep).unwrap_or(1),
        }
    }

    /// The decoded cluster whose compressed bytes start at `host`, by `decode` where it is not
    /// kept.  Two threads may decode the same cluster at once; neither waits for the other.
    pub(super) fn get(
        &self,
        host: u64,
        decode: impl FnOnce() -> Result<Vec<u8>>,
    ) -> Result<Arc<[u8]>> {
        let shard = &self.shards[usize::try_from(host / 512 % SHARDS).unwrap_or(0)];
        if let Some(found) = shard.lock().iter().find(|k| k.host == host) {
            return Ok(Arc::clone(&found.bytes));
        }
        let bytes: Arc<[u8]> = decode()?.into();
        let mut kept = shard.lock();
        if kept.len() >= self.keep {
            kept.pop_front();
        }
        kept.push_back(Kept {
            host,
            bytes: Arc::clone(&bytes),
        });
        Ok(bytes)
    }

    /// Forgets everything; for when compressed space is freed.
    pub(super) fn clear(&self) {
        self.shards.iter().for_each(|s| s.lock().clear());
    }
}

/// Decodes one cluster: exactly `len` bytes come out, whatever the input says.
pub(super) fn decode(compression: Compression, input: &[u8], len: usize) -> Result<Vec<u8>> {
    let mut out = vec![0; len];
    let got = match compression {
        Compression::Zlib => inflate(input, &mut out)?,
        Compression::Zstd => unzstd(input, &mut out)?,
    };
    if got != len {
        return Err(Error::corrupt(format!(
            "a compressed cluster decodes to {got} bytes (allowed: {len})"
        )));
    }
    Ok(out)
}

fn inflate(input: &[u8], out: &mut [u8]) -> Result<usize> {
    libdeflater::Decompressor::new()
        .deflate_decompress(input, out)
        .map_err(|e| Error::corrupt(format!("a compressed cluster is not valid deflate: {e}")))
}

fn unzstd(input: &[u8], out: &mut [u8]) -> Result<usize> {
    let bad = |e: &str| Error::corrupt(format!("a compressed cluster is not valid zstd: {e}"));
    // What follows the frame belongs to the next cluster.
    let frame = zstd::zstd_safe::find_frame_compressed_size(input)
        .map_err(|code| bad(zstd::zstd_safe::get_error_name(code)))?;
    let frame = input
        .get(..frame)
        .ok_or_else(|| bad("the frame is cut off"))?;
    zstd::bulk::decompress_to_buffer(frame, out).map_err(|e| bad(&e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_decodes_with_the_next_one_behind_it() {
        let plain = vec![7u8; 65_536];
        let mut deflated = vec![0; 1000];
        let mut compressor = libdeflater::Compressor::new(libdeflater::CompressionLvl::default());
        let n = compressor
            .deflate_compress(&plain, &mut deflated)
            .expect("it fits");
        deflated[n..].fill(0xaa);
        assert_eq!(
            decode(Compression::Zlib, &deflated, 65_536).expect("valid"),
            plain
        );
        let mut frame = zstd::bulk::compress(&plain, 1).expect("it compresses");
        frame.extend([0xaa; 300]);
        assert_eq!(
            decode(Compression::Zstd, &frame, 65_536).expect("valid"),
            plain
        );
    }

    #[test]
    fn a_bomb_or_a_short_cluster_is_an_error() {
        for len in [0usize, 100, 200_000] {
            let frame = zstd::bulk::compress(&vec![0; len], 1).expect("it compresses");
            assert!(decode(Compression::Zstd, &frame, 65_536).is_err(), "{len}");
        }
        assert!(decode(Compression::Zlib, &[0xff; 64], 65_536).is_err());
        assert!(decode(Compression::Zstd, &[], 65_536).is_err());
    }

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
}

//! Compressed clusters: decoded once, kept in a bounded cache.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;
use zstd::zstd_safe::{self, DCtx};

use super::header::Compression;
use crate::error::{Error, ErrorKind, Result};

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
    /// Decoders that no thread uses now.
    idle: Mutex<Vec<Decoders>>,
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
            idle: Mutex::default(),
        }
    }

    /// Lends decoders to `work`.
    pub(super) fn with<T>(&self, work: impl FnOnce(&mut Decoders) -> Result<T>) -> Result<T> {
        let idle = self.idle.lock().pop();
        let mut decoders = idle.unwrap_or_default();
        let done = work(&mut decoders);
        self.idle.lock().push(decoders);
        done
    }

    fn shard(&self, host: u64) -> &Mutex<VecDeque<Kept>> {
        &self.shards[usize::try_from(host / 512 % SHARDS).unwrap_or(0)]
    }

    /// The decoded cluster whose compressed bytes start at `host`, where it is kept.
    pub(super) fn kept(&self, host: u64) -> Option<Arc<[u8]>> {
        let shard = self.shard(host).lock();
        let found = shard.iter().find(|k| k.host == host)?;
        Some(Arc::clone(&found.bytes))
    }

    /// The decoded cluster whose compressed bytes start at `host`, by `decode` where it is not
    /// kept.  Two threads may decode the same cluster at once; neither waits for the other.
    pub(super) fn get(
        &self,
        host: u64,
        decode: impl FnOnce() -> Result<Vec<u8>>,
    ) -> Result<Arc<[u8]>> {
        if let Some(bytes) = self.kept(host) {
            return Ok(bytes);
        }
        let bytes: Arc<[u8]> = decode()?.into();
        let mut kept = self.shard(host).lock();
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

/// The state that decoding takes, kept from one cluster to the next.
#[derive(Default)]
pub(super) struct Decoders {
    deflate: Option<libdeflater::Decompressor>,
    zstd: Option<DCtx<'static>>,
    /// The compressed bytes.
    input: Vec<u8>,
}

impl fmt::Debug for Decoders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Decoders")
    }
}

impl Decoders {
    /// A buffer for `len` compressed bytes; what is in it is anything.
    pub(super) fn input(&mut self, len: usize) -> &mut [u8] {
        if self.input.len() < len {
            self.input.resize(len, 0);
        }
        &mut self.input[..len]
    }

    /// As [`Decoders::decode`], of the first `len` bytes of the buffer.
    pub(super) fn decode_input(
        &mut self,
        compression: Compression,
        len: usize,
        out: &mut [u8],
    ) -> Result<()> {
        let input = std::mem::take(&mut self.input);
        let done = self.decode(compression, &input[..len], out);
        self.input = input;
        done
    }

    /// Decodes one cluster: it fills `out` exactly, whatever the input says.
    pub(super) fn decode(
        &mut self,
        compression: Compression,
        input: &[u8],
        out: &mut [u8],
    ) -> Result<()> {
        let got = match compression {
            Compression::Zlib => self.inflate(input, out)?,
            Compression::Zstd => self.unzstd(input, out)?,
        };
        if got == out.len() {
            return Ok(());
        }
        Err(Error::corrupt(format!(
            "a compressed cluster decodes to {got} bytes (allowed: {})",
            out.len()
        )))
    }

    fn inflate(&mut self, input: &[u8], out: &mut [u8]) -> Result<usize> {
        self.deflate
            .get_or_insert_with(libdeflater::Decompressor::new)
            .deflate_decompress(input, out)
            .map_err(|e| Error::corrupt(format!("a compressed cluster is not valid deflate: {e}")))
    }

    fn unzstd(&mut self, input: &[u8], out: &mut [u8]) -> Result<usize> {
        let bad = |e: &str| Error::corrupt(format!("a compressed cluster is not valid zstd: {e}"));
        if self.zstd.is_none() {
            self.zstd = DCtx::try_create();
        }
        let Some(context) = &mut self.zstd else {
            return Err(Error::new(
                ErrorKind::Io,
                "there is no memory to decode zstd",
            ));
        };
        // What follows the frame belongs to the next cluster.
        let frame = zstd_safe::find_frame_compressed_size(input)
            .map_err(|code| bad(zstd_safe::get_error_name(code)))?;
        let frame = input
            .get(..frame)
            .ok_or_else(|| bad("the frame is cut off"))?;
        context
            .decompress(out, frame)
            .map_err(|code| bad(zstd_safe::get_error_name(code)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(compression: Compression, input: &[u8], len: usize) -> Result<Vec<u8>> {
        let mut out = vec![0; len];
        Decoders::default()
            .decode(compression, input, &mut out)
            .map(|()| out)
    }

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

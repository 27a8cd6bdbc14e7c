//! Writing compressed: whole clusters, into the top layer.

use std::ops::Range;

use crate::chain::Chain;
use crate::error::{Error, Result};
use crate::image::compress::{Compress, Encoder, Existing, Form, Unit};
use crate::util::align::{clamp_len, len64};

/// Bytes encoded before they are given space together, where a cluster is not longer.
const BATCH: u64 = 2 << 20;

impl Chain {
    /// Writes all of `buf` at `at` into the top layer, compressed: whole clusters, or up to the end
    /// of the disk, that the top layer does not have yet.  Clusters that do not shrink are stored
    /// as they are.
    ///
    /// # Errors
    /// `Unsupported` where the top layer has no compressed data; `Invalid` for a range that is not
    /// made of whole clusters, and for clusters that are allocated; else as [`Chain::write_at`].
    pub fn write_compressed(&self, buf: &[u8], at: u64) -> Result<()> {
        self.check_write(at, len64(buf.len()))?;
        let _ticket = self.enter();
        let done = self.compress(buf, at);
        done.map_err(|e| e.at_opt(self.top().storage().path()))
    }

    /// Refuses a range that [`Chain::write_compressed`] refuses for where it starts and ends.
    ///
    /// # Errors
    /// `Invalid`.
    pub fn check_compressed(&self, range: &Range<u64>) -> Result<()> {
        let cluster = self.top().cluster_size().unwrap_or(1).max(1);
        let whole = |at: u64| at.is_multiple_of(cluster);
        if whole(range.start) && (whole(range.end) || range.end == self.virtual_size()) {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "a compressed write of {:#x}..{:#x} (allowed: multiples of {cluster:#x}, and the end of the disk)",
            range.start, range.end
        )))
    }

    fn compress(&self, buf: &[u8], at: u64) -> Result<()> {
        let top = self.top();
        let compress = top.as_compress()?;
        let cluster = top.cluster_size().unwrap_or(1).max(1);
        self.check_compressed(&(at..at + len64(buf.len())))?;
        let mut encoder = compress.encoder()?;
        let step = BATCH.max(cluster) / cluster * cluster;
        let mut at = at;
        for part in buf.chunks(clamp_len(step, usize::MAX)) {
            let cluster = clamp_len(cluster, usize::MAX);
            store(compress, &mut *encoder, part, at, cluster)?;
            at += len64(part.len());
        }
        Ok(())
    }
}

/// Encodes, places and stores clusters of `cluster` bytes; what the last one lacks is zeroes.
fn store(
    compress: &dyn Compress,
    encoder: &mut dyn Encoder,
    buf: &[u8],
    at: u64,
    cluster: usize,
) -> Result<()> {
    let (mut units, mut bytes) = (Vec::new(), Vec::new());
    let mut last = Vec::new();
    for (index, chunk) in buf.chunks(cluster).enumerate() {
        let unit = match chunk.len() == cluster {
            true => chunk,
            false => {
                last.extend_from_slice(chunk);
                last.resize(cluster, 0);
                &last
            }
        };
        let first = bytes.len();
        bytes.resize(first + cluster, 0);
        let form = match encoder.encode(unit, &mut bytes[first..])? {
            Some(len) => {
                bytes.truncate(first + len);
                Form::Packed(len64(len))
            }
            None => {
                bytes[first..].copy_from_slice(unit);
                Form::Plain
            }
        };
        units.push(Unit {
            at: at + len64(index * cluster),
            form,
        });
    }
    compress.place(&units, Existing::Refuse)?.store(&bytes)
}

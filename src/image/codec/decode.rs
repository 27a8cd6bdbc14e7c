//! Decoding of chunks: they fill what they are to fill, whatever their bytes say.

use std::fmt;

use zstd::zstd_safe::{self, DCtx};

use crate::error::{Error, ErrorKind, Result};
use crate::image::codec::Compression;

/// The state that decoding takes, kept from one cluster to the next.
#[derive(Default)]
pub struct Decoders {
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
    pub fn input(&mut self, len: usize) -> &mut [u8] {
        if self.input.len() < len {
            self.input.resize(len, 0);
        }
        &mut self.input[..len]
    }

    /// As [`Decoders::decode`], of the first `len` bytes of the buffer.
    pub fn decode_input(
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

    /// Decodes one chunk: it fills `out` exactly, whatever the input says.
    pub fn decode(&mut self, compression: Compression, input: &[u8], out: &mut [u8]) -> Result<()> {
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

    /// Decodes a zlib stream, whose checksum must be right, from the first `len` bytes of the buffer;
    /// how many bytes of `out` it filled.
    ///
    /// # Errors
    /// `Corrupt` for one that is longer than `out`, and for what is none.
    pub fn unzlib_input(&mut self, len: usize, out: &mut [u8]) -> Result<usize> {
        let decompressor = self
            .deflate
            .get_or_insert_with(libdeflater::Decompressor::new);
        decompressor
            .zlib_decompress(&self.input[..len], out)
            .map_err(|e| Error::corrupt(format!("a compressed cluster is not valid zlib: {e}")))
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
}

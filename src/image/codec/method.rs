//! Chunks as streams of well-known compressors: each whole by itself, with no word of its own about
//! how long what it decodes to is.

use std::fmt;
use std::io::Cursor;

use brotli::enc::{BrotliEncoderParams, StandardAlloc};
use brotli::{BrotliDecompressStream, BrotliResult, BrotliState};
use libdeflater::{CompressionError, CompressionLvl, Compressor};
use zstd::zstd_safe::{self, CCtx, CParameter};

use crate::error::{Error, ErrorKind, Result};
use crate::image::codec::{Compression, Decoders};
use crate::image::compress::Encoder;

/// A compressor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// A zlib stream, with its checksum.
    Gz,
    /// A Brotli stream.
    Brotli,
    /// One block of LZ4, without a frame.
    Lz4,
    /// A Zstandard frame.
    Zstd,
}

/// Efforts at which chunks are compressed.
const GZ_LEVEL: i32 = 6;
const BROTLI_QUALITY: i32 = 5;
const ZSTD_LEVEL: i32 = 3;

impl Method {
    /// Its name, as options and reports have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gz => "gz",
            Self::Brotli => "brotli",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }

    /// Decodes the first `len` bytes of the input of `decoders`: they fill `out` exactly.
    ///
    /// # Errors
    /// `Corrupt` where they do not.
    pub fn decode(self, decoders: &mut Decoders, len: usize, out: &mut [u8]) -> Result<()> {
        let got = match self {
            Self::Gz => decoders.unzlib_input(len, out)?,
            Self::Zstd => {
                decoders.decode_input(Compression::Zstd, len, out)?;
                out.len()
            }
            Self::Lz4 => lz4_flex::block::decompress_into(&decoders.input(len)[..len], out)
                .map_err(|e| bad("lz4", e))?,
            Self::Brotli => unbrotli(&decoders.input(len)[..len], out)?,
        };
        match got == out.len() {
            true => Ok(()),
            false => Err(Error::corrupt(format!(
                "it decodes to {got} bytes (allowed: {})",
                out.len()
            ))),
        }
    }

    /// Encodes bytes that do not shrink, of Gz and Brotli, which have a way to hold such.
    ///
    /// # Errors
    /// `Unsupported` for the others; `Io` where the compressor fails.
    pub fn encode_longer(self, bytes: &[u8]) -> Result<Vec<u8>> {
        match self {
            Self::Gz => {
                let mut state = Compressor::new(CompressionLvl::fastest());
                let mut out = vec![0; state.zlib_compress_bound(bytes.len())];
                let len = state
                    .zlib_compress(bytes, &mut out)
                    .map_err(|e| failed(&e.to_string()))?;
                out.truncate(len);
                Ok(out)
            }
            Self::Brotli => {
                let mut out = Vec::new();
                brotlied(bytes, &mut out)?;
                Ok(out)
            }
            Self::Lz4 | Self::Zstd => Err(Error::unsupported("it is stored as it is")),
        }
    }

    /// The state of one thread that compresses.
    ///
    /// # Errors
    /// `Io` where there is no memory for it.
    pub fn encoder(self) -> Result<Box<dyn Encoder>> {
        let state = match self {
            Self::Gz => {
                let level = CompressionLvl::new(GZ_LEVEL).unwrap_or_default();
                State::Gz(Compressor::new(level))
            }
            Self::Brotli => State::Brotli(Vec::new()),
            Self::Lz4 => State::Lz4(Vec::new()),
            Self::Zstd => {
                let mut context =
                    CCtx::try_create().ok_or_else(|| failed("there is no memory for its state"))?;
                context
                    .set_parameter(CParameter::CompressionLevel(ZSTD_LEVEL))
                    .map_err(|code| failed(zstd_safe::get_error_name(code)))?;
                State::Zstd(context)
            }
        };
        Ok(Box::new(Encoding(state)))
    }
}

fn bad(what: &str, why: impl fmt::Display) -> Error {
    Error::corrupt(format!("it is not valid {what}: {why}"))
}

fn failed(why: &str) -> Error {
    Error::new(ErrorKind::Io, format!("cannot compress: {why}"))
}

fn unbrotli(input: &[u8], out: &mut [u8]) -> Result<usize> {
    // Strict: no window is larger than 16 MiB, whatever the stream says.
    let mut state = BrotliState::new_strict(
        StandardAlloc::default(),
        StandardAlloc::default(),
        StandardAlloc::default(),
    );
    let (mut left, mut at, mut room, mut got, mut total) = (input.len(), 0, out.len(), 0, 0);
    let done = BrotliDecompressStream(
        &mut left, &mut at, input, &mut room, &mut got, out, &mut total, &mut state,
    );
    match done {
        BrotliResult::ResultSuccess => Ok(got),
        BrotliResult::NeedsMoreInput => Err(bad("brotli", "it is cut off")),
        BrotliResult::NeedsMoreOutput => Err(bad("brotli", "it is too long")),
        BrotliResult::ResultFailure => Err(bad("brotli", "it is damaged")),
    }
}

fn brotlied(unit: &[u8], out: &mut Vec<u8>) -> Result<()> {
    let params = BrotliEncoderParams {
        quality: BROTLI_QUALITY,
        size_hint: unit.len(),
        ..BrotliEncoderParams::default()
    };
    brotli::BrotliCompress(&mut Cursor::new(unit), out, &params)
        .map_err(|e| failed(&e.to_string()))?;
    Ok(())
}

enum State {
    Gz(Compressor),
    Brotli(Vec<u8>),
    /// Where the block comes out: whatever goes in has room.
    Lz4(Vec<u8>),
    Zstd(CCtx<'static>),
}

struct Encoding(State);

impl fmt::Debug for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Encoding")
    }
}

impl Encoder for Encoding {
    fn encode(&mut self, unit: &[u8], out: &mut [u8]) -> Result<Option<usize>> {
        let room = unit.len().saturating_sub(1).min(out.len());
        let out = &mut out[..room];
        match &mut self.0 {
            State::Gz(state) => match state.zlib_compress(unit, out) {
                Ok(len) => Ok(Some(len)),
                Err(CompressionError::InsufficientSpace) => Ok(None),
            },
            State::Zstd(state) => {
                /// `ZSTD_error_dstSize_tooSmall`, as functions return errors.
                const NO_ROOM: usize = 0usize.wrapping_sub(70);
                match state.compress2(out, unit) {
                    Ok(len) => Ok(Some(len)),
                    Err(NO_ROOM) => Ok(None),
                    Err(code) => Err(failed(zstd_safe::get_error_name(code))),
                }
            }
            State::Lz4(buf) => {
                buf.resize(lz4_flex::block::get_maximum_output_size(unit.len()), 0);
                let len = lz4_flex::block::compress_into(unit, buf)
                    .map_err(|e| failed(&e.to_string()))?;
                Ok(put(&buf[..len], out))
            }
            State::Brotli(buf) => {
                buf.clear();
                brotlied(unit, buf)?;
                Ok(put(buf, out))
            }
        }
    }
}

/// Copies what was encoded where it has room.
fn put(encoded: &[u8], out: &mut [u8]) -> Option<usize> {
    out.get_mut(..encoded.len())?.copy_from_slice(encoded);
    Some(encoded.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Method; 4] = [Method::Gz, Method::Brotli, Method::Lz4, Method::Zstd];

    fn decode(method: Method, input: &[u8], len: usize) -> Result<Vec<u8>> {
        let mut decoders = Decoders::default();
        decoders.input(input.len())[..input.len()].copy_from_slice(input);
        let mut out = vec![0; len];
        method
            .decode(&mut decoders, input.len(), &mut out)
            .map(|()| out)
    }

    #[test]
    fn what_each_encodes_it_decodes_to_the_same_and_to_no_other_length() {
        let mut rng = fastrand::Rng::with_seed(3);
        for size in [4096, 65_536] {
            let text: Vec<u8> = (0u8..50).cycle().flat_map(|i| [i; 7]).take(size).collect();
            let mut noise = vec![0; size];
            rng.fill(&mut noise);
            for method in ALL {
                let mut encoder = method.encoder().expect("there is memory");
                let mut out = vec![0; size];
                for _ in 0..2 {
                    let none = encoder.encode(&noise, &mut out).expect("encodes");
                    assert_eq!(none, None, "{method:?}: noise does not shrink");
                    let len = encoder.encode(&text, &mut out).expect("encodes");
                    let packed = &out[..len.expect("it shrinks")];
                    assert!(decode(method, packed, size).expect("decodes") == text);
                    for other in [size - 1, size + 1, 0] {
                        let error = decode(method, packed, other).expect_err("another length");
                        assert_eq!(error.kind(), ErrorKind::Corrupt, "{method:?}");
                    }
                    decode(method, &packed[..packed.len() / 2], size).expect_err("cut off");
                }
            }
        }
    }

    #[test]
    fn whatever_the_bytes_are_decoding_ends() {
        let mut rng = fastrand::Rng::with_seed(4);
        for round in 0..2000 {
            let mut input = vec![0; rng.usize(0..200)];
            rng.fill(&mut input);
            let method = ALL[round % ALL.len()];
            drop(decode(method, &input, 4096));
        }
    }
}

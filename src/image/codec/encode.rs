//! Clusters on their way in: by deflate or zstd, with the state that one thread needs.

use std::fmt;

use flate2::{Compress as Deflate, Compression as Level, FlushCompress, Status};
use libdeflater::{CompressionError, CompressionLvl, Compressor};
use zstd::zstd_safe::{self, CCtx, CParameter};

use crate::error::{Error, ErrorKind, Result};
use crate::image::codec::Compression;
use crate::image::compress::Encoder;
use crate::image::options::{OptionKind, OptionSpec, OptionValues};

/// Options of compressed writes.
pub const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "compression_level",
        kind: OptionKind::Number,
        default: "",
        help: "effort of compression: zlib 1 to 12 (1), with strict_window 1 to 9 (6), zstd 1 to 22 (2)",
    },
    OptionSpec {
        name: "strict_window",
        kind: OptionKind::Bool,
        default: "off",
        help: "zlib only: keep to the 4 KiB window of QEMU's own writer",
    },
];

/// log2 of the window that QEMU writes with, and names when it reads.
const WINDOW_BITS: u8 = 12;

/// How clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// Deflate with a window of 32 KiB, by libdeflate.
    Deflate(i32),
    /// Deflate with a window of 4 KiB.
    Strict(u32),
    /// Zstandard.
    Zstd(i32),
}

impl Codec {
    /// What `values` ask for in an image of this compression type.
    ///
    /// # Errors
    /// `Invalid` for a level out of range, and for a window that zstd does not have.
    pub fn new(compression: Compression, values: &OptionValues) -> Result<Self> {
        let strict = values.bool("strict_window") == Some(true);
        let (default, most) = match (compression, strict) {
            (Compression::Zlib, false) => (1, 12),
            (Compression::Zlib, true) => (6, 9),
            (Compression::Zstd, false) => (2, 22),
            (Compression::Zstd, true) => {
                return Err(Error::invalid(
                    "strict_window=on is for compression_type=zlib, not for zstd",
                ));
            }
        };
        let asked = values.number("compression_level").unwrap_or(default);
        let level = u8::try_from(asked).ok().filter(|l| (1..=most).contains(l));
        let Some(level) = level else {
            return Err(Error::invalid(format!(
                "compression_level is {asked} (allowed: 1 to {most})"
            )));
        };
        Ok(match (compression, strict) {
            (Compression::Zlib, false) => Self::Deflate(i32::from(level)),
            (Compression::Zlib, true) => Self::Strict(u32::from(level)),
            (Compression::Zstd, _) => Self::Zstd(i32::from(level)),
        })
    }

    /// The state of one thread.
    ///
    /// # Errors
    /// `Io` where there is no memory for it.
    pub fn encoder(self) -> Result<Box<dyn Encoder>> {
        Ok(match self {
            Self::Deflate(level) => {
                let level = CompressionLvl::new(level)
                    .map_err(|e| Error::invalid(format!("compression_level {level}: {e:?}")))?;
                Box::new(LibDeflate(Compressor::new(level)))
            }
            Self::Strict(level) => Box::new(Strict {
                level,
                state: strict(level),
                out: Vec::new(),
            }),
            Self::Zstd(level) => {
                let mut context =
                    CCtx::try_create().ok_or_else(|| failed("there is no memory for its state"))?;
                context
                    .set_parameter(CParameter::CompressionLevel(level))
                    .map_err(|code| failed(zstd_safe::get_error_name(code)))?;
                Box::new(Zstd(context))
            }
        })
    }
}

fn failed(why: &str) -> Error {
    Error::new(ErrorKind::Io, format!("cannot compress: {why}"))
}

struct LibDeflate(Compressor);

impl fmt::Debug for LibDeflate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LibDeflate")
    }
}

impl Encoder for LibDeflate {
    fn encode(&mut self, unit: &[u8], out: &mut [u8]) -> Result<Option<usize>> {
        match self.0.deflate_compress(unit, shorter(unit, out)) {
            Ok(len) => Ok(Some(len)),
            Err(CompressionError::InsufficientSpace) => Ok(None),
        }
    }
}

fn strict(level: u32) -> Deflate {
    Deflate::new_with_window_bits(Level::new(level), false, WINDOW_BITS)
}

#[derive(Debug)]
struct Strict {
    level: u32,
    state: Deflate,
    /// Has room for whatever comes out: a stream that is not taken to its end leaves bytes behind
    /// that its state does not forget.
    out: Vec<u8>,
}

impl Encoder for Strict {
    fn encode(&mut self, unit: &[u8], out: &mut [u8]) -> Result<Option<usize>> {
        self.state.reset();
        self.out.resize(unit.len() + unit.len() / 4 + 256, 0);
        let done = self
            .state
            .compress(unit, &mut self.out, FlushCompress::Finish)
            .map_err(|e| failed(&e.to_string()))?;
        if done != Status::StreamEnd {
            self.state = strict(self.level);
            return Ok(None);
        }
        let len = usize::try_from(self.state.total_out()).unwrap_or(usize::MAX);
        let (Some(from), Some(to)) = (self.out.get(..len), shorter(unit, out).get_mut(..len))
        else {
            return Ok(None);
        };
        to.copy_from_slice(from);
        Ok(Some(len))
    }
}

struct Zstd(CCtx<'static>);

impl fmt::Debug for Zstd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Zstd")
    }
}

impl Encoder for Zstd {
    fn encode(&mut self, unit: &[u8], out: &mut [u8]) -> Result<Option<usize>> {
        /// `ZSTD_error_dstSize_tooSmall`, as functions return errors.
        const NO_ROOM: usize = 0usize.wrapping_sub(70);
        match self.0.compress2(shorter(unit, out), unit) {
            Ok(len) => Ok(Some(len)),
            Err(NO_ROOM) => Ok(None),
            Err(code) => Err(failed(zstd_safe::get_error_name(code))),
        }
    }
}

/// The part of `out` that is one byte shorter than the unit: what does not fit there is stored as
/// it is.
fn shorter<'o>(unit: &[u8], out: &'o mut [u8]) -> &'o mut [u8] {
    let len = unit.len().saturating_sub(1).min(out.len());
    &mut out[..len]
}

#[cfg(test)]
mod tests {
    use super::super::decode::Decoders;
    use super::*;

    fn values(texts: &[&str]) -> OptionValues {
        OptionValues::parse(OPTIONS, "qcow2", texts.iter().copied()).expect("known")
    }

    fn units() -> Vec<Vec<u8>> {
        let mut rng = fastrand::Rng::with_seed(5);
        let mut text = Vec::new();
        while text.len() < 65_536 {
            let word = rng.u16(0..300);
            text.extend(format!("word {word} ").bytes());
        }
        text.truncate(65_536);
        let mut noise = vec![0; 65_536];
        rng.fill(&mut noise);
        let mut mixed = text.clone();
        mixed[..30_000].copy_from_slice(&noise[..30_000]);
        vec![text.clone(), vec![0; 65_536], noise, mixed, text]
    }

    #[test]
    fn what_is_encoded_decodes_to_the_same_whatever_was_encoded_before() {
        for (compression, texts) in [
            (Compression::Zlib, &[][..]),
            (Compression::Zlib, &["compression_level=12"]),
            (Compression::Zlib, &["strict_window=on"]),
            (Compression::Zlib, &["strict_window,compression_level=1"]),
            (Compression::Zstd, &[]),
            (Compression::Zstd, &["compression_level=22"]),
        ] {
            let codec = Codec::new(compression, &values(texts)).expect("in range");
            let mut encoder = codec.encoder().expect("there is memory");
            let mut lens = Vec::new();
            let (mut out, mut back) = (vec![0; 65_536], vec![0; 65_536]);
            for (index, unit) in units().iter().enumerate() {
                let len = encoder.encode(unit, &mut out).expect("encodes");
                lens.push(len);
                let Some(len) = len else {
                    assert_eq!(index, 2, "{texts:?}: only noise does not shrink");
                    continue;
                };
                assert!(len < unit.len());
                Decoders::default()
                    .decode(compression, &out[..len], &mut back)
                    .expect("decodes");
                assert!(back == *unit, "{texts:?} {index}");
            }
            assert_eq!(lens[2], None, "{texts:?}");
            assert_eq!(lens[0], lens[4], "{texts:?}: the same again");
        }
    }

    #[test]
    fn noise_again_and_again_leaves_no_traces_in_an_encoder() {
        let all = units();
        for (compression, texts) in [
            (Compression::Zlib, &[][..]),
            (Compression::Zlib, &["strict_window=on"]),
            (Compression::Zstd, &[]),
        ] {
            let codec = Codec::new(compression, &values(texts)).expect("in range");
            let mut encoder = codec.encoder().expect("there is memory");
            let mut out = vec![0; 4096];
            let text = encoder.encode(&all[0][..4096], &mut out).expect("encodes");
            for part in all[2].chunks(4096).cycle().take(100) {
                assert_eq!(encoder.encode(part, &mut out).expect("encodes"), None);
            }
            let again = encoder.encode(&all[0][..4096], &mut out).expect("encodes");
            assert_eq!(text, again, "{texts:?}");
        }
    }

    #[test]
    fn a_strict_stream_never_looks_back_further_than_4_kib() {
        // What repeats after 5000 bytes shrinks with the larger window alone.
        let mut rng = fastrand::Rng::with_seed(6);
        let mut part = vec![0; 5000];
        rng.fill(&mut part);
        let unit: Vec<u8> = part.iter().copied().cycle().take(65_536).collect();
        let mut out = vec![0; 65_536];
        let mut len = |texts: &[&str]| {
            let codec = Codec::new(Compression::Zlib, &values(texts)).expect("in range");
            let mut encoder = codec.encoder().expect("there is memory");
            encoder.encode(&unit, &mut out).expect("encodes")
        };
        assert!(len(&[]).is_some_and(|len| len < 10_000));
        assert_eq!(len(&["strict_window=on"]), None);
    }

    #[test]
    fn levels_out_of_range_and_windows_of_zstd_are_refused() {
        for (compression, texts, part) in [
            (Compression::Zlib, &["compression_level=0"][..], "1 to 12"),
            (Compression::Zlib, &["compression_level=13"], "1 to 12"),
            (
                Compression::Zlib,
                &["compression_level=10,strict_window"],
                "1 to 9",
            ),
            (Compression::Zstd, &["compression_level=23"], "1 to 22"),
            (Compression::Zstd, &["compression_level=256"], "1 to 22"),
            (Compression::Zstd, &["strict_window"], "zlib"),
        ] {
            let error = Codec::new(compression, &values(texts)).expect_err("refused");
            assert!(error.message().contains(part), "{error}");
        }
    }
}

//! Chunks of data that are stored compressed: encoding, decoding, and a cache of what was decoded.

pub mod decode;
pub mod decoded;
pub mod encode;
pub mod method;

pub use decode::Decoders;
pub use decoded::Decoded;
pub use encode::Codec;
pub use method::Method;

/// How chunks are compressed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate.
    #[default]
    Zlib,
    /// Zstandard.
    Zstd,
}

//! Digests by the algorithms that manifests have.

use sha1::Sha1;
use sha2::{Digest as _, Sha256, Sha512};

/// How a digest is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// SHA-1.
    Sha1,
    /// SHA-256.
    Sha256,
    /// SHA-512.
    Sha512,
}

impl Algorithm {
    /// As manifests have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "SHA1",
            Self::Sha256 => "SHA256",
            Self::Sha512 => "SHA512",
        }
    }

    /// By a name as it is met, whatever its case.
    pub fn of(word: &str) -> Option<Self> {
        match &*word.to_ascii_uppercase().replace('-', "") {
            "SHA1" => Some(Self::Sha1),
            // The second as OpenSSL 3 has it.
            "SHA256" | "SHA2256" => Some(Self::Sha256),
            "SHA512" | "SHA2512" => Some(Self::Sha512),
            _ => None,
        }
    }

    /// Hexadecimal digits of a digest.
    pub fn digits(self) -> usize {
        match self {
            Self::Sha1 => 40,
            Self::Sha256 => 64,
            Self::Sha512 => 128,
        }
    }
}

/// A digest that is being made.
#[derive(Debug, Clone)]
pub struct Hasher(Kind);

#[derive(Debug, Clone)]
enum Kind {
    Sha1(Sha1),
    Sha256(Sha256),
    Sha512(Sha512),
}

impl Hasher {
    /// Of nothing so far.
    pub fn new(algorithm: Algorithm) -> Self {
        Self(match algorithm {
            Algorithm::Sha1 => Kind::Sha1(Sha1::new()),
            Algorithm::Sha256 => Kind::Sha256(Sha256::new()),
            Algorithm::Sha512 => Kind::Sha512(Sha512::new()),
        })
    }

    /// Of these bytes too.
    pub fn update(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            Kind::Sha1(hash) => hash.update(bytes),
            Kind::Sha256(hash) => hash.update(bytes),
            Kind::Sha512(hash) => hash.update(bytes),
        }
    }

    /// The digest in hexadecimal digits, lower case.
    pub fn finish(self) -> String {
        let bytes = match self.0 {
            Kind::Sha1(hash) => hash.finalize().to_vec(),
            Kind::Sha256(hash) => hash.finalize().to_vec(),
            Kind::Sha512(hash) => hash.finalize().to_vec(),
        };
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

//! Digests by the algorithms that manifests have.

use std::fmt;

use ring::digest::{Context, SHA256, SHA512};
use sha1::{Digest as _, Sha1};

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

#[derive(Clone)]
enum Kind {
    Sha1(Sha1),
    Sha2(Context),
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sha1(_) => "SHA-1",
            Self::Sha2(_) => "SHA-2",
        })
    }
}

impl Hasher {
    /// Of nothing so far.
    pub fn new(algorithm: Algorithm) -> Self {
        Self(match algorithm {
            Algorithm::Sha1 => Kind::Sha1(Sha1::new()),
            Algorithm::Sha256 => Kind::Sha2(Context::new(&SHA256)),
            Algorithm::Sha512 => Kind::Sha2(Context::new(&SHA512)),
        })
    }

    /// Of these bytes too.
    pub fn update(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            Kind::Sha1(hash) => hash.update(bytes),
            Kind::Sha2(hash) => hash.update(bytes),
        }
    }

    /// The digest in hexadecimal digits, lower case.
    pub fn finish(self) -> String {
        let bytes = match self.0 {
            Kind::Sha1(hash) => hash.finalize().to_vec(),
            Kind::Sha2(hash) => hash.finish().as_ref().to_vec(),
        };
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_the_standard_in_whatever_pieces_bytes_come() {
        let cases = [
            (Algorithm::Sha1, "a9993e364706816aba3e25717850c26c9cd0d89d"),
            (
                Algorithm::Sha256,
                "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            ),
            (
                Algorithm::Sha512,
                "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a\
                 2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
            ),
        ];
        for (algorithm, digest) in cases {
            let mut hasher = Hasher::new(algorithm);
            hasher.update(b"a");
            let mut other = hasher.clone();
            other.update(b"d");
            hasher.update(b"bc");
            assert_eq!(hasher.finish(), digest);
            assert_ne!(other.finish(), digest);
            assert_eq!(digest.len(), algorithm.digits());
        }
    }
}

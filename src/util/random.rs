//! What the host makes up at random.

use std::io;

use uuid::Uuid;

use crate::error::{Error, Result};

/// A new identity, which nothing else has.
///
/// # Errors
/// The host's, where it gives no random bytes.
pub fn uuid() -> Result<Uuid> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)
        .map_err(|e| Error::io("get random bytes for an identity", io::Error::from(e)))?;
    Ok(uuid::Builder::from_random_bytes(bytes).into_uuid())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_are_random_ones_of_their_standard_and_differ() {
        let (a, b) = (uuid().expect("is there"), uuid().expect("is there"));
        assert_ne!(a, b);
        assert_eq!(
            (a.get_version_num(), a.get_variant()),
            (4, uuid::Variant::RFC4122)
        );
    }
}

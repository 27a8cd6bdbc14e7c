//! Which parts of a sector are meant.

use crate::error::{Error, Result};

/// A set of parts of a sector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Parts(u8);

impl Parts {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// The pattern by which a drive finds the sector.
    pub const SYNC: Self = Self(1);
    /// Its address and mode.
    pub const HEADER: Self = Self(1 << 1);
    /// What CD-ROM XA has before the data: file, channel, submode, coding, twice.
    pub const SUBHEADER: Self = Self(1 << 2);
    /// User data.
    pub const DATA: Self = Self(1 << 3);
    /// The code that detects errors.
    pub const EDC: Self = Self(1 << 4);
    /// Bytes that are kept zero.
    pub const ZERO: Self = Self(1 << 5);
    /// The code that corrects errors: P, then Q.
    pub const ECC: Self = Self(1 << 6);
    /// What subchannels hold beside the sector; only as a part of [`Parts::ALL`].
    pub const SUBCHANNEL: Self = Self(1 << 7);
    /// Everything that is stored.
    pub const ALL: Self = Self(0xff);

    /// The parts that have names, as users type them.
    const NAMES: [(&'static str, Self); 8] = [
        ("sync", Self::SYNC),
        ("header", Self::HEADER),
        ("subheader", Self::SUBHEADER),
        ("data", Self::DATA),
        ("edc", Self::EDC),
        ("zero", Self::ZERO),
        ("ecc", Self::ECC),
        ("all", Self::ALL),
    ];

    /// Both.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// What is in both.
    #[must_use]
    pub const fn both(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// What is in this one alone.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether there is none.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether all of `other` is in it.
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// From names with commas between them.
    ///
    /// # Errors
    /// `Invalid` for a name that is none, with those that are, and for an empty list.
    pub fn parse(text: &str) -> Result<Self> {
        let mut parts = Self::NONE;
        for name in text.split(',') {
            let found = Self::NAMES.iter().find(|(known, _)| *known == name);
            let Some((_, part)) = found else {
                let known = Self::NAMES.map(|(name, _)| name).join(", ");
                let text = format!("'{name}' is no part of a sector (allowed: {known})");
                return Err(Error::invalid(text));
            };
            parts = parts.union(*part);
        }
        Ok(parts)
    }

    /// The names of those that have one, in the order in which they are stored.
    pub fn names(self) -> Vec<&'static str> {
        let single = Self::NAMES.iter().filter(|(_, part)| *part != Self::ALL);
        let named = single.filter(|(_, part)| self.has(*part));
        named.map(|(name, _)| *name).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed_and_told_in_the_order_of_the_sector() {
        let parts = Parts::parse("ecc,edc").expect("are parts");
        assert_eq!(parts.names(), ["edc", "ecc"]);
        assert_eq!(parts.without(Parts::ECC), Parts::EDC);
        assert_eq!(Parts::parse("all").expect("is one"), Parts::ALL);
        for wrong in ["", "edc,", "EDC", "p"] {
            let error = Parts::parse(wrong).expect_err(wrong).to_string();
            assert!(error.contains("allowed: sync, header"), "{error}");
        }
    }
}

//! Options of formats as typed rows: what `-o` takes, what `-o help` lists.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use crate::error::{Error, Result};
use crate::util::size;
use crate::util::text::{printable, split_equals};

/// What an option's value may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptionKind {
    /// A size in bytes.
    Size,
    /// `on` or `off`.
    Bool,
    /// A whole number.
    Number,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// Any text.
    Text,
    /// A name of a file: bytes, as the host has them.
    Name,
    /// The same, of a further file that the image is made of.
    File,
}

/// One option.
#[derive(Debug, Clone, Copy)]
pub struct OptionSpec {
    /// The key, as in `-o key=value`.
    pub name: &'static str,
    /// What its value may be.
    pub kind: OptionKind,
    /// The value where it is left out, as one would type it; empty: none.
    pub default: &'static str,
    /// One line on its meaning.
    pub help: &'static str,
}

/// A value, parsed as its kind says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OptionValue {
    /// Of a `Size` or `Number`.
    Number(u64),
    /// Of a `Bool`.
    Bool(bool),
    /// Of a `Choice` or `Text`.
    Text(String),
    /// Of a `Name`.
    Name(OsString),
    /// Of a `File`.
    File(OsString),
}

impl fmt::Display for OptionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Size => f.write_str("size"),
            Self::Bool => f.write_str("on|off"),
            Self::Number => f.write_str("number"),
            Self::Choice(words) => f.write_str(&words.join("|")),
            Self::Text => f.write_str("text"),
            Self::Name | Self::File => f.write_str("name"),
        }
    }
}

impl OptionSpec {
    fn parse(&self, value: &OsStr) -> Result<OptionValue> {
        let fail = || {
            Error::invalid(format!(
                "option '{}' is '{}' (allowed: {})",
                self.name,
                printable(value),
                self.kind
            ))
        };
        match self.kind {
            OptionKind::Name => return Ok(OptionValue::Name(value.to_owned())),
            OptionKind::File => return Ok(OptionValue::File(value.to_owned())),
            _ => {}
        }
        let text = value.to_str().ok_or_else(fail)?;
        match self.kind {
            OptionKind::Size => size::parse(text)
                .map(OptionValue::Number)
                .map_err(|e| Error::invalid(format!("option '{}': {e}", self.name))),
            OptionKind::Number => text.parse().map(OptionValue::Number).map_err(|_| fail()),
            OptionKind::Bool => match text {
                "on" | "true" | "yes" | "y" => Ok(OptionValue::Bool(true)),
                "off" | "false" | "no" | "n" => Ok(OptionValue::Bool(false)),
                _ => Err(fail()),
            },
            OptionKind::Choice(words) if words.contains(&text) => {
                Ok(OptionValue::Text(text.to_owned()))
            }
            OptionKind::Choice(_) => Err(fail()),
            OptionKind::Text | OptionKind::Name | OptionKind::File => {
                Ok(OptionValue::Text(text.to_owned()))
            }
        }
    }
}

/// Options that were given, checked against the rows of a format.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OptionValues {
    values: BTreeMap<&'static str, OptionValue>,
}

impl OptionValues {
    /// Parses `K=V,K=V`; `,,` stands for a comma within a value; a lone `K` is `K=on`.
    ///
    /// # Errors
    /// `Invalid` for an unknown key, naming those that are known, and for a value that is not of
    /// its kind.
    pub fn parse<T: AsRef<OsStr>>(
        specs: &'static [OptionSpec],
        format: &str,
        texts: impl IntoIterator<Item = T>,
    ) -> Result<Self> {
        let mut values = BTreeMap::new();
        for text in texts {
            for pair in split_commas(text.as_ref()) {
                let (key, value) = split_equals(&pair).unwrap_or((&pair, OsStr::new("on")));
                let spec = specs.iter().find(|s| s.name == key).ok_or_else(|| {
                    let known: Vec<&str> = specs.iter().map(|s| s.name).collect();
                    Error::invalid(format!(
                        "format '{format}' has no option '{}' (allowed: {})",
                        printable(key),
                        if known.is_empty() {
                            "none".to_owned()
                        } else {
                            known.join(", ")
                        }
                    ))
                })?;
                values.insert(spec.name, spec.parse(value)?);
            }
        }
        Ok(Self { values })
    }

    /// Whether `help` or `?` stands among the options, as a word of its own.
    pub fn ask_for_help<T: AsRef<OsStr>>(texts: impl IntoIterator<Item = T>) -> bool {
        let mut texts = texts.into_iter();
        texts.any(|text| {
            let mut words = split_commas(text.as_ref()).into_iter();
            words.any(|word| word == "help" || word == "?")
        })
    }

    /// The same with `text` for an option, as if it had been given.
    ///
    /// # Errors
    /// `Invalid` for a value that is not of its kind.
    pub fn with(mut self, spec: &OptionSpec, text: &str) -> Result<Self> {
        self.values.insert(spec.name, spec.parse(OsStr::new(text))?);
        Ok(self)
    }

    /// The number given for `name`.
    pub fn number(&self, name: &str) -> Option<u64> {
        match self.values.get(name) {
            Some(OptionValue::Number(n)) => Some(*n),
            _ => None,
        }
    }

    /// The switch given for `name`.
    pub fn bool(&self, name: &str) -> Option<bool> {
        match self.values.get(name) {
            Some(OptionValue::Bool(b)) => Some(*b),
            _ => None,
        }
    }

    /// The name of a file given for `name`.
    pub fn name(&self, name: &str) -> Option<&OsStr> {
        match self.values.get(name) {
            Some(OptionValue::Name(n) | OptionValue::File(n)) => Some(n),
            _ => None,
        }
    }

    /// The further files that the image is made of: option and name, in the order of the keys.
    pub fn files(&self) -> impl Iterator<Item = (&'static str, &OsStr)> {
        self.values.iter().filter_map(|(key, value)| match value {
            OptionValue::File(name) => Some((*key, &**name)),
            _ => None,
        })
    }

    /// The word or text given for `name`.
    pub fn text(&self, name: &str) -> Option<&str> {
        match self.values.get(name) {
            Some(OptionValue::Text(t)) => Some(t),
            _ => None,
        }
    }
}

/// The pairs of `K=V,K=V`; `,,` stands for a comma within one.
pub fn split_commas(text: &OsStr) -> Vec<OsString> {
    let mut pairs = vec![Vec::new()];
    let mut bytes = text.as_bytes().iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        match byte {
            b',' if bytes.next_if_eq(&b',').is_some() => {
                pairs.last_mut().into_iter().for_each(|p| p.push(b','));
            }
            b',' => pairs.push(Vec::new()),
            byte => pairs.last_mut().into_iter().for_each(|p| p.push(byte)),
        }
    }
    pairs.retain(|p| !p.is_empty());
    pairs.into_iter().map(OsString::from_vec).collect()
}

/// One pair for a list of them: the opposite of [`split_commas`].
pub fn double_commas(pair: &OsStr) -> OsString {
    let mut bytes = Vec::with_capacity(pair.len());
    for byte in pair.as_bytes() {
        bytes.push(*byte);
        if *byte == b',' {
            bytes.push(b',');
        }
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPECS: &[OptionSpec] = &[
        OptionSpec {
            name: "size",
            kind: OptionKind::Size,
            default: "",
            help: "",
        },
        OptionSpec {
            name: "lazy",
            kind: OptionKind::Bool,
            default: "off",
            help: "",
        },
        OptionSpec {
            name: "kind",
            kind: OptionKind::Choice(&["a", "b"]),
            default: "a",
            help: "",
        },
        OptionSpec {
            name: "name",
            kind: OptionKind::Text,
            default: "",
            help: "",
        },
        OptionSpec {
            name: "file",
            kind: OptionKind::Name,
            default: "",
            help: "",
        },
    ];

    #[test]
    fn values_are_parsed_as_their_kind_says() {
        let values = OptionValues::parse(SPECS, "x", ["size=4k,lazy", "kind=b,name=a,,b=c"])
            .expect("all are right");
        assert_eq!(values.number("size"), Some(4096));
        assert_eq!(values.bool("lazy"), Some(true));
        assert_eq!(values.text("kind"), Some("b"));
        assert_eq!(values.text("name"), Some("a,b=c"));
    }

    #[test]
    fn names_of_files_are_bytes_and_nothing_else_is() {
        let texts = [OsStr::from_bytes(b"file=caf\xe9,,b")];
        let values = OptionValues::parse(SPECS, "x", texts).expect("is a name");
        assert_eq!(values.name("file"), Some(OsStr::from_bytes(b"caf\xe9,b")));
        assert_eq!(values.text("file"), None);
        let error = OptionValues::parse(SPECS, "x", [OsStr::from_bytes(b"name=caf\xe9")]);
        let error = error.expect_err("is no text").to_string();
        assert!(error.contains("caf\\xE9"), "{error}");
    }

    #[test]
    fn a_pair_with_commas_is_one_pair_again() {
        let pair = OsStr::from_bytes(b"a=,b,,\xff,");
        assert_eq!(split_commas(&double_commas(pair)), [pair]);
    }

    #[test]
    fn unknown_keys_and_wrong_values_are_refused_by_name() {
        for (text, part) in [
            ("sizes=1", "size, lazy"),
            ("kind=c", "a|b"),
            ("lazy=2", "on|off"),
        ] {
            let error = OptionValues::parse(SPECS, "x", [text]).expect_err(text);
            assert!(error.to_string().contains(part), "{error}");
        }
    }
}

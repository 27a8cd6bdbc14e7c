//! Options of formats as typed rows: what `-o` takes, what `-o help` lists.

use std::collections::BTreeMap;
use std::fmt;

use crate::error::{Error, Result};
use crate::util::size;
use crate::util::text::printable;

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
}

impl fmt::Display for OptionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Size => f.write_str("size"),
            Self::Bool => f.write_str("on|off"),
            Self::Number => f.write_str("number"),
            Self::Choice(words) => f.write_str(&words.join("|")),
            Self::Text => f.write_str("text"),
        }
    }
}

impl OptionSpec {
    fn parse(&self, text: &str) -> Result<OptionValue> {
        let fail = || {
            Error::invalid(format!(
                "option '{}' is '{}' (allowed: {})",
                self.name,
                printable(text),
                self.kind
            ))
        };
        match self.kind {
            OptionKind::Size => size::parse(text)
                .map(OptionValue::Number)
                .map_err(|e| Error::invalid(format!("option '{}': {e}", self.name))),
            OptionKind::Number => text.parse().map(OptionValue::Number).map_err(|_| fail()),
            OptionKind::Bool => match text {
                "on" | "true" | "yes" => Ok(OptionValue::Bool(true)),
                "off" | "false" | "no" => Ok(OptionValue::Bool(false)),
                _ => Err(fail()),
            },
            OptionKind::Choice(words) if words.contains(&text) => {
                Ok(OptionValue::Text(text.to_owned()))
            }
            OptionKind::Choice(_) => Err(fail()),
            OptionKind::Text => Ok(OptionValue::Text(text.to_owned())),
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
    pub fn parse<'t>(
        specs: &'static [OptionSpec],
        format: &str,
        texts: impl IntoIterator<Item = &'t str>,
    ) -> Result<Self> {
        let mut values = BTreeMap::new();
        for text in texts {
            for pair in split_commas(text) {
                let (key, value) = pair.split_once('=').unwrap_or((&pair, "on"));
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

    /// The same with `text` for an option, as if it had been given.
    ///
    /// # Errors
    /// `Invalid` for a value that is not of its kind.
    pub fn with(mut self, spec: &OptionSpec, text: &str) -> Result<Self> {
        self.values.insert(spec.name, spec.parse(text)?);
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

    /// The word or text given for `name`.
    pub fn text(&self, name: &str) -> Option<&str> {
        match self.values.get(name) {
            Some(OptionValue::Text(t)) => Some(t),
            _ => None,
        }
    }
}

/// The pairs of `K=V,K=V`; `,,` stands for a comma within one.
pub fn split_commas(text: &str) -> Vec<String> {
    let mut pairs = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            ',' if chars.peek() == Some(&',') => {
                chars.next();
                pairs.last_mut().into_iter().for_each(|p| p.push(','));
            }
            ',' => pairs.push(String::new()),
            c => pairs.last_mut().into_iter().for_each(|p| p.push(c)),
        }
    }
    pairs.retain(|p| !p.is_empty());
    pairs
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

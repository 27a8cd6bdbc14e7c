//! What `info` shows, as data.

use serde_json::Value;

/// One fact that only a format has.
#[derive(Debug, Clone, PartialEq)]
pub struct Detail {
    /// The JSON key, lower case with hyphens, such as `creator-application`.
    pub key: &'static str,
    /// The value.
    pub value: Value,
}

impl Detail {
    /// A fact.
    pub fn new(key: &'static str, value: impl Into<Value>) -> Self {
        Self {
            key,
            value: value.into(),
        }
    }
}

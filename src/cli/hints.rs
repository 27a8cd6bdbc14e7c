//! What the host is told about the file of a new image (`-o`), whatever its format.

use std::ffi::OsStr;
use std::fmt;
use std::path::Path;

use crate::cli::create::option;
use crate::cli::exit::complain;
use crate::error::Result;
use crate::image::options::{OptionKind, OptionSpec, OptionValues};
use crate::storage::Storage;
use crate::storage::attributes::{self, Attribute};
use crate::util::text::{printable, split_equals};

/// What may be given.
pub const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "extent_size_hint",
        kind: OptionKind::Size,
        default: "",
        help: "unit in which the host gives the file space, where it can be told (XFS)",
    },
    OptionSpec {
        name: "nocow",
        kind: OptionKind::Bool,
        default: "",
        help: "on: the host writes the file in place, where it can be told (btrfs)",
    },
];

/// What was given.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Hints {
    extent_size: Option<u32>,
    no_copy_on_write: Option<bool>,
}

impl Hints {
    /// Takes `pair` (`K=V`), if it is one of these; whether it is.
    pub(super) fn take(&mut self, pair: &OsStr) -> anyhow::Result<bool> {
        let key = split_equals(pair).map_or(pair, |(key, _)| key);
        let Some(OptionSpec { name: key, .. }) = OPTIONS.iter().find(|o| key == o.name) else {
            return Ok(false);
        };
        let values = OptionValues::parse(OPTIONS, "file", [pair]).map_err(|e| option(key, &e))?;
        if let Some(size) = values.number("extent_size_hint") {
            let size = attributes::extent_size(size).map_err(|e| option(key, &e))?;
            self.extent_size = Some(size);
        }
        self.no_copy_on_write = values.bool("nocow").or(self.no_copy_on_write);
        Ok(true)
    }

    /// Whether anything was given.
    pub(super) fn are_given(&self) -> bool {
        *self != Self::default()
    }

    /// Tells the host about an empty file.  A hint that it does not take changes nothing about
    /// what the file will hold, so the user is told and the file is made all the same.
    pub(super) fn give(&self, storage: &dyn Storage, name: &Path) {
        let given = |key: &str, done: Result<()>| {
            if let Err(error) = done {
                let cause = std::error::Error::source(&error).map(|e| format!(": {e}"));
                complain(&format!(
                    "warning: {}: option '{key}' has no effect: {}{}",
                    printable(name),
                    error.message(),
                    cause.unwrap_or_default()
                ));
            }
        };
        match self.extent_size {
            // 0: no hint.
            None | Some(0) => {}
            Some(size) => given(
                "extent_size_hint",
                attributes::set(storage, Attribute::ExtentSize(size)),
            ),
        }
        if self.no_copy_on_write == Some(true) {
            given("nocow", attributes::set(storage, Attribute::NoCopyOnWrite));
        }
    }
}

impl fmt::Display for Hints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(on) = self.no_copy_on_write {
            write!(f, " nocow={}", if on { "on" } else { "off" })?;
        }
        match self.extent_size {
            Some(size) => write!(f, " extent_size_hint={size}"),
            None => Ok(()),
        }
    }
}

//! What `-o` was given, by what it is for.

use std::ffi::OsString;

use crate::cli::convert::Args;
use crate::cli::create::{Generic, creator};
use crate::cli::exit::usage;
use crate::error::Error;
use crate::image::Driver;
use crate::image::options::OptionSpec;
use crate::util::text::{printable, split_equals};

/// What `-o` was given.
pub(super) struct Given {
    /// For the new image.
    pub(super) new: Generic,
    /// For how its data is compressed.
    pub(super) compress: Vec<OsString>,
}

/// Sorts what `-o` was given.
pub(super) fn given(args: &Args, driver: &'static Driver) -> anyhow::Result<Given> {
    let mut new = Generic::take(&args.options)?;
    let specs = codec_options(driver);
    let is_codec = |pair: &OsString| {
        let key = split_equals(pair).map_or(&**pair, |(key, _)| key);
        specs.iter().any(|s| s.name == key)
    };
    let (compress, others): (Vec<_>, Vec<_>) = new.others.into_iter().partition(is_codec);
    new.others = others;
    Ok(Given { new, compress })
}

impl Given {
    /// Refuses options of compression where nothing is compressed: without -c, but for an image
    /// that has nothing else (`in_order`).
    pub(super) fn refuse_idle(&self, args: &Args, in_order: bool) -> anyhow::Result<()> {
        match self.compress.first() {
            Some(pair) if !args.compress && !in_order => {
                let pair = printable(pair);
                Err(usage(format!("option '{pair}' is for -c")))
            }
            _ => Ok(()),
        }
    }
}

/// The options of compressed writes.
pub(super) fn codec_options(driver: &'static Driver) -> &'static [OptionSpec] {
    let creator = driver.creator.as_ref();
    creator.and_then(|c| c.compress).unwrap_or_default()
}

/// Refuses what the format of the target has not.
pub(super) fn refuse(args: &Args, target: &'static Driver) -> anyhow::Result<()> {
    if args.compress && creator(target)?.compress.is_none() {
        let text = format!("format '{}' has no compressed data (-c)", target.name);
        return Err(Error::unsupported(text).into());
    }
    Ok(())
}

//! The disks that `convert` reads.

use std::path::PathBuf;

use crate::chain;
use crate::cli::convert::{Args, is_stream};
use crate::cli::exit::usage;
use crate::copy::Joined;
use crate::storage::open::Access;

/// Opens the sources and joins them.
pub(super) fn open(args: &Args, paths: &[PathBuf]) -> anyhow::Result<Joined> {
    if paths.iter().any(|p| is_stream(p)) {
        return Err(usage("- (stdin) cannot be joined with other sources"));
    }
    let mut options = args.open.plan(args.format, Access::Read)?;
    if let Some(caching) = args.source_cache.caching() {
        options.storage.caching = caching;
    }
    let mut chains = Vec::with_capacity(paths.len());
    for path in paths {
        chains.push(chain::open::open(path, &options)?);
    }
    Ok(Joined::new(chains)?)
}

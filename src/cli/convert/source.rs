//! The disks that `convert` reads.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use crate::chain::{self, Chain};
use crate::cli::convert::{Args, is_stream};
use crate::cli::exit::usage;
use crate::copy::Joined;
use crate::image::open::{Damaged, Purpose};
use crate::image::options::split_commas;
use crate::image::snapshot::Pick;
use crate::storage::open::Access;
use crate::util::text::{printable, split_equals};

/// Opens the sources and joins them.
pub(super) fn open(args: &Args, paths: &[PathBuf]) -> anyhow::Result<Joined> {
    Ok(Joined::new(open_each(args, paths)?)?)
}

/// Opens the sources.
pub(super) fn open_each(args: &Args, paths: &[PathBuf]) -> anyhow::Result<Vec<Chain>> {
    open_as(args, paths, Purpose::Use)
}

/// As [`open`], for a target that takes discs as a whole: they need not be disks.
pub(super) fn open_for(args: &Args, paths: &[PathBuf]) -> anyhow::Result<Joined> {
    // Several are joined as disks.
    let [_] = paths else {
        return open(args, paths);
    };
    let sources = open_as(args, paths, Purpose::Describe)?;
    let is_disc = sources.iter().all(|chain| chain.top().as_disc().is_some());
    match is_disc {
        true => Ok(Joined::new(sources)?),
        // What is no disc is read, and what keeps that from being done is told.
        false => {
            drop(sources);
            open(args, paths)
        }
    }
}

fn open_as(args: &Args, paths: &[PathBuf], purpose: Purpose) -> anyhow::Result<Vec<Chain>> {
    if paths.iter().any(|p| is_stream(p)) {
        return Err(usage("- (stdin) cannot be joined with other sources"));
    }
    let mut options = args.open.plan(args.format, Access::Read)?;
    options.purpose = purpose;
    if let Some(caching) = args.source_cache.caching() {
        options.storage.caching = caching;
    }
    if args.salvage {
        options.damaged = Damaged::AsStored;
    }
    options.snapshot = args.snapshot.as_deref().map(pick).transpose()?;
    let mut chains = Vec::with_capacity(paths.len());
    for path in paths {
        chains.push(chain::open::open_next(path, &mut options)?);
    }
    Ok(chains)
}

/// A snapshot as qemu-img's users name it: by id or name, or `snapshot.id=ID,snapshot.name=NAME`.
pub(crate) fn pick(text: &OsStr) -> anyhow::Result<Pick> {
    if !text.as_bytes().starts_with(b"snapshot.") {
        return Ok(Pick::Any(text.to_owned()));
    }
    let (mut id, mut name) = (None, None);
    for pair in split_commas(text) {
        let (key, value) = split_equals(&pair).unwrap_or((OsStr::new(""), &pair));
        match key.to_str() {
            Some("snapshot.id") => id = Some(value.to_owned()),
            Some("snapshot.name") => name = Some(value.to_owned()),
            _ => {
                return Err(usage(format!(
                    "-l: '{}' is unknown (allowed: snapshot.id=ID, snapshot.name=NAME)",
                    printable(&pair)
                )));
            }
        }
    }
    Ok(Pick::Exactly { id, name })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_named_alone_or_by_id_and_name() {
        let pick = |text: &str| pick(OsStr::new(text));
        assert_eq!(pick("a").expect("right"), Pick::Any("a".into()));
        let both = pick("snapshot.id=1,snapshot.name=a,,b").expect("right");
        let (id, name) = (Some("1".into()), Some("a,b".into()));
        assert_eq!(both, Pick::Exactly { id, name });
        assert!(pick("snapshot.size=1").is_err());
        assert!(pick("snapshot.id").is_err());
    }
}
